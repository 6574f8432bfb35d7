"""plan.py: what a grid's cells are named after, and what is refused before the first one starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from naming import naming
from tiny import make_dataset, make_embedder
from tiny_grid import write_inputs

from embedft import RetrievalDataset
from embedft.ablation import plan as plans
from embedft.ablation import settings
from embedft.ablation.plan import plan

AXES = {"loss.temperature": [0.02, 0.05, 0.1], "lr": [1e-5, 2e-5]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def place(inputs, monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(inputs)
    return tmp_path / "out"


def planned(**changes):
    base = {"model": "model", "data": ["train.jsonl"], "validation": "val.jsonl", "epochs": 1, "batch_size": 4}
    how = {"axes": AXES, "tests": {"uber": "uber.jsonl", "scifact": "scifact.jsonl"}, "seeds": [0, 1]}
    how |= {name: changes.pop(name) for name in list(changes) if name in ("axes", "points", "tests", "seeds")}
    return plan(base | changes, "out", **how)


def test_a_product_has_base_first_and_each_cell_once():
    """Six points, of which none is BASE, whose temperature is the loss's default: seven by two seeds, and the base."""
    grid = planned()
    assert grid.points[0] == {"loss.temperature": 0.05, "lr": 5e-5}
    assert [tuple(point.values()) for point in grid.points[1:]] == [
        (t, lr) for t in (0.02, 0.05, 0.1) for lr in AXES["lr"]
    ]
    assert [(cell.point, cell.seed) for cell in grid.cells[1:]] == [(p, s) for p in grid.points for s in (0, 1)]
    assert (grid.cells[0].seed, grid.cells[0].run) == (None, None)
    assert len({cell.key for cell in grid.cells}) == len({cell.run for cell in grid.cells}) == 15
    assert all(len(cell.key) == 16 for cell in grid.cells)
    assert grid.cells[3].config["loss"] == {"name": "in_batch_negatives", "temperature": 0.02}
    assert grid.cells[3].config["lr"] == 1e-5
    assert grid.cells[3].config["weight_decay"] == 0.0  # defaults included


def test_a_point_that_is_the_base_is_not_run_twice():
    grid = planned(lr=2e-5, **{"loss": {"name": "in_batch_negatives", "temperature": 0.1}})
    assert grid.points[0] == {"loss.temperature": 0.1, "lr": 2e-5}
    assert len(grid.points) == 6


def test_points_may_be_given_and_leave_the_rest_to_the_base():
    grid = planned(points=[{"lr": 1e-5}, {"batch-size": 2, "lr": 1e-5}], axes=None)
    assert grid.axes == {"lr": [1e-5], "batch_size": [2]}
    assert grid.points == [{"lr": 5e-5, "batch_size": 4}, {"lr": 1e-5, "batch_size": 4}, {"lr": 1e-5, "batch_size": 2}]


def test_what_is_said_of_several_points_is_said_once():
    with pytest.warns(UserWarning, match=naming("memorisation")) as caught:
        planned(validation="train.jsonl")
    assert len([one for one in caught if "memorisation" in str(one.message)]) == 1


def test_some_points_of_the_product_may_leave_an_axis_at_the_base():
    points = [{"lr": 1e-5, "epochs": 1}, {"lr": 2e-5, "epochs": 1}]
    grid = planned(axes={"lr": [1e-5, 2e-5], "epochs": [1, 2]}, points=points)
    assert grid.points == [{"lr": 5e-5, "epochs": 1}, *points]
    assert grid.axes["epochs"] == [1, 2]


def test_cells_that_differ_in_evaluation_share_their_training():
    axes = {"lr": [1e-5], "evaluate.passages": [None, [8, 4]], "evaluate.fuse_weight": [None, 0.5]}
    grid = planned(axes=axes)
    trained = [cell for cell in grid.cells if cell.seed is not None]
    assert len(trained) == 2 * 5
    assert len({cell.run for cell in trained}) == 2 * 2
    untrained = [cell for cell in grid.cells if cell.seed is None]
    ways = {json.dumps(cell.config["evaluate"]) for cell in trained}
    assert len(untrained) == 4
    assert {json.dumps(cell.config["evaluate"]) for cell in untrained} == ways


def test_options_of_bm25_count_only_where_it_is_fused():
    axes = {"evaluate.fuse_weight": [None, 0.5]}
    grid = planned(axes=axes, evaluate={"bm25_ngram": 2})
    found = {(cell.config["evaluate"]["fuse_weight"], cell.config["evaluate"]["bm25_ngram"]) for cell in grid.cells}
    assert found == {(None, 1), (0.5, 2)}
    plain = planned(axes=axes)
    assert len({cell.key for cell in grid.cells} & {cell.key for cell in plain.cells}) == len(grid.cells) // 2


def test_a_teachers_bm25_is_part_of_a_cell():
    teaching = {"num_negatives": 2, "target_scores": True, "loss": {"name": "listwise_kl"}}
    points = [teaching | {"teacher": {"models": "bm25", "bm25": how}} for how in ({}, {"b": 1.0})]
    runs = [cell.run for cell in planned(points=points, axes=None, seeds=[0]).cells if cell.run]
    assert len(set(runs)) == 3


def test_windows_of_training_are_those_of_evaluation_unless_said_otherwise():
    grid = planned(passages=[8, 4], axes={"lr": [1e-5]})
    assert {str(cell.config["evaluate"]["passages"]) for cell in grid.cells} == {"[8, 4]"}
    grid = planned(passages=[8, 4], axes={"evaluate.passages": [None, [8, 4]]})
    assert [point["evaluate.passages"] for point in grid.points] == [[8, 4], None]
    grid = planned(passages=[8, 4], axes={"evaluate.passages": [[8, 4], [8, 4, 6, 2]]})
    assert [point["evaluate.passages"] for point in grid.points] == [[8, 4], [8, 4, 6, 2]]


def test_questions_and_bare_texts_are_loaded_as_each_point_says(tmp_path):
    (tmp_path / "texts.txt").write_text("a b c\nd e f\n")
    distil = {"loss": {"name": "embedding_distillation"}, "references": {"teacher": "model"}, "examples": "texts"}
    grid = planned(points=[{"data": str(tmp_path / "texts.txt"), **distil}], axes=None)
    assert len({cell.hashes["train"] for cell in grid.cells if cell.run}) == 2
    with pytest.raises(ValueError, match=naming("texts.txt")):
        planned(
            points=[{"data": str(tmp_path / "texts.txt"), **distil}, {"data": str(tmp_path / "texts.txt")}], axes=None
        )


def test_principal_components_are_of_each_points_own_training_data():
    points = [
        {"data": "train.jsonl", "evaluate.pca": 4},
        {"data": "other.jsonl", "evaluate.pca": 4},
        {"data": "other.jsonl"},
    ]
    make_dataset(8, 8, seed=5).save("other.jsonl")
    untrained = [cell for cell in planned(points=points, axes=None).cells if cell.seed is None]
    assert [cell.config["evaluate"]["pca"] for cell in untrained] == [None, 4, 4]
    assert "train" not in untrained[0].hashes
    assert untrained[1].hashes["train"] != untrained[2].hashes["train"]


def test_an_adapter_is_trained_by_its_own_settings_alone():
    """Its defaults included; and cells that differ in evaluation share it."""
    points = [{"adapter": {"side": "both"}}, {"adapter": {"side": "both"}, "evaluate.dim": 4}, {"adapter.lr": 0.1}]
    grid = planned(points=points, axes=None)
    assert [point["adapter"] for point in grid.points] == [{}, {"side": "both"}, {"side": "both"}, {}]
    runs = [cell.run for cell in grid.cells if cell.seed == 0]
    assert (runs[1], len(set(runs))) == (runs[2], 3)
    assert [cell.seed for cell in grid.cells].count(None) == 2  # with and without the dim
    same = {"tests": {"uber": "uber.jsonl"}, "axes": None, "adapter": {"side": "both"}}
    one = planned(**same, points=[{"adapter.lr": 0.1}])
    assert one.points[0] == {"adapter.lr": 1e-3}
    other = planned(**same | {"adapter": {"side": "both", "lr": 1e-3}}, points=[{"adapter.lr": 0.1}], epochs=3, lr=1.0)
    assert [cell.key for cell in other.cells] == [cell.key for cell in one.cells]
    assert [cell.key for cell in planned(**same, points=[{"adapter.lr": 0.1}], max_length=8).cells] != [
        cell.key for cell in one.cells
    ]


def keys(**changes) -> list[str]:
    return [cell.key for cell in planned(**changes, axes={"lr": [1e-5]}).cells]


def test_a_key_depends_on_everything_that_changes_results(tmp_path, monkeypatch):
    before = keys()
    assert keys() == before
    # Where equal data is, and what changes no result, does not matter.
    RetrievalDataset.load("train.jsonl").save(tmp_path / "copy.jsonl")
    assert keys(data=[str(tmp_path / "copy.jsonl")], checkpoint_every=1, token_memory=7) == before
    for changes in (
        {"warmup": 0.1},
        {"model": str(make_embedder(tmp_path / "other", dropout=0.2).source.folder)},
        {"data": ["uber.jsonl"], "tests": {"scifact": "scifact.jsonl"}},
        {"tests": {"uber": "scifact.jsonl", "scifact": "uber.jsonl"}},
        {"validation": None},
        {"validation": ["a=val.jsonl", "b=val.jsonl"]},
        {"loss": {"name": "in_batch_negatives", "temperature": 0.06}},
        {"evaluate": {"dim": 16}},
    ):
        assert set(keys(**changes)[1:]).isdisjoint(before), changes
    monkeypatch.setattr(plans, "code_sha256", lambda: "changed")
    assert set(keys()).isdisjoint(before)


def test_references_and_teachers_are_known_by_content(tmp_path):
    teacher = {"name": "listwise_kl"}
    for given in (
        lambda model: {"references": {"guide": model}, "loss": {"name": "guided_in_batch_negatives"}},
        lambda model: {"teacher": {"models": {model: 1.0}}, "num_negatives": 2, "loss": teacher, "target_scores": True},
    ):
        model = tmp_path / "frozen"
        make_embedder(model)
        before = keys(**given(str(model)))
        assert keys(**given(str(model))) == before
        shutil.rmtree(model)
        make_embedder(model, dropout=0.3)
        assert set(keys(**given(str(model)))[1:]).isdisjoint(before)
        shutil.rmtree(model)


def test_a_changed_default_of_a_loss_makes_new_cells(monkeypatch):
    before, completed = keys(), settings._complete_loss
    monkeypatch.setattr(settings, "_complete_loss", lambda spec: completed(spec) | {"temperature": 0.07})
    assert set(keys()[1:]).isdisjoint(before)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"axes": {"loss.temprature": [1]}}, ("loss.temprature=1", "temprature", "temperature")),
        ({"axes": {"epcohs": [1, 2]}}, ("epcohs", "epochs")),
        ({"axes": {"evaluate.dims": [1, 2]}}, ("dims", "dim", "evaluate")),
        ({"axes": {"evaluate": [3]}}, ("evaluate=3", "evaluate", 3)),
        ({"axes": {"seed": [1, 2]}}, ("seed", "seeds")),
        ({"axes": {"store": ["a"]}}, ("store",)),
        ({"axes": {"lr": []}}, ("lr", "[]")),
        ({"axes": {"lr": [1e-5, 1e-5]}}, ("lr", "1e-05")),
        ({"axes": {"lr": [1e-5], "lr-decay": [0.5], "lr_decay": [0.6]}}, ("lr_decay", "twice")),
        ({"axes": {"lr": [5e-5]}}, ("lr", "5e-05", "nothing")),
        ({"axes": {"evaluate.passages": [None]}}, ("evaluate.passages", "null", "nothing")),
        ({"points": [{"epochs": 1, "lr": 1e-5}], "axes": None}, ("epochs", 1, "nothing")),
        ({"axes": {"checkpoint_every": [1, 2]}}, ("checkpoint_every", 1, 2, "nothing")),
        ({"axes": {"merge": [True, False]}}, ("merge", "true", "false", "nothing")),
        ({"axes": {"lr": [1e-5, 0]}}, ("lr=0", "lr", "above", 0)),
        ({"axes": {"loss.name": ["triplet", "nothing"]}}, ("loss.name=nothing", "nothing", "triplet")),
        ({"axes": {"lr.x": [1]}}, ("lr.x", "lr", "5e-05")),
        ({"axes": {"num_negatives": [0, 2]}}, ("num_negatives=2", 2, 0)),
        ({"axes": {"examples": ["scored"]}}, ("examples=scored", "scored")),
        ({"axes": {"passages": [[8, 4], [99, 4]]}}, ("passages=[99, 4]", 99)),
        ({"axes": {"evaluate.passages": [[99, 4]]}}, ("evaluate.passages=[99, 4]", 99)),
        ({"axes": {"evaluate.passages": [[8, 4, 99, 4]]}}, ("evaluate.passages=[8, 4, 99, 4]", 99)),
        ({"axes": {"passages": [[8, 4, 6, 2]]}}, ("passages=[8, 4, 6, 2]", [8, 4, 6, 2], "training")),
        ({"max_length": 24, "axes": {"evaluate.passages": [[32, 4]]}}, ("evaluate.passages=[32, 4]", 32, 24)),
        ({"axes": {"evaluate.dim": [16, 33]}}, ("evaluate.dim=33", 33, 32)),
        ({"axes": {"evaluate.dim": [None, 32]}}, ("evaluate.dim", "null", 32, "nothing")),
        ({"axes": {"max_length": [48, None]}}, ("max_length", 48, "null", "nothing")),
        ({"axes": {"max_length": [48]}}, ("max_length", "nothing")),
        ({"axes": {"evaluate.pca": [8]}}, ("evaluate.pca=8", "pca", 8, 7, "8 documents")),
        ({"axes": {"evaluate.dtype": ["float8"]}}, ("evaluate.dtype=float8", "dtype", "float8", "int8")),
        ({"axes": {"evaluate.pca": [4]}, "evaluate": {"dim": 4}}, ("evaluate.pca=4", "dim", "pca")),
        ({"axes": {"adapter": [{"kind": "cubic"}]}}, ("kind", "cubic", "low_rank")),
        ({"axes": {"adapter": ["linear"]}}, ("adapter=linear", "linear")),
        ({"axes": {"adapter.seed": [1]}}, ("adapter", "seed", "seeds")),
        ({"axes": {"adapter": [{"out_dim": 4}]}}, ("queries", "documents", 4, 32)),
        ({"axes": {"adapter": [{"kind": "linear"}], "lr": [1e-5]}}, ("lr", "adapter.KEY")),
        ({"axes": {"adapter": [{"kind": "linear"}]}, "evaluate": {"pca": 4}}, ("adapter", "pca", 4)),
        ({"axes": {"adapter": [{"objective": "in_batch", "loss": {"name": "marginn"}}]}}, ("marginn",)),
        ({"axes": {"evaluate.fuse_weight": [1.5]}}, ("evaluate.fuse_weight=1.5", "fuse_weight", 1)),
        ({"axes": {"evaluate.bm25_b": [1.5]}, "evaluate": {"fuse_weight": 0.5}}, ("evaluate.bm25_b=1.5", "bm25_b", 1)),
        ({"axes": {"evaluate.bm25_ngram": [1, 2]}}, ("evaluate.bm25_ngram", 1, 2, "nothing")),
        ({"axes": {"lora.targets": [["nothing"]]}}, ("nothing", "targets")),
        ({"axes": {"max_length": [24, 512]}}, ("max_length=512", "max_length", 512, 48)),
        ({"axes": {"model": ["model", "gone"]}}, ("gone",)),
        ({"axes": {"data": ["uber2.jsonl"]}}, ("uber2.jsonl",)),
        ({"points": [{"lr": 1e-5}, {"lr": 1e-5}], "axes": None}, ("lr=1e-05",)),
        ({"points": [{"lr": 1e-5}, {"epochs": 2, "lr": 1e-5}, {"lr": 1e-5, "epochs": 1}], "axes": None}, ("lr=1e-05",)),
        ({"axes": {"validation": [["val.jsonl", "scifact.jsonl"]]}}, ("scifact", 8, "validation")),
        ({"validation": ["val.jsonl", "val=val.jsonl"]}, ("val", "val.jsonl")),
        ({"validation": ["a=val.jsonl", "mean=val.jsonl"]}, ("mean",)),
        ({"validation": ["a=val.jsonl", "b=val.jsonl"], "select": "c/ndcg@10"}, ("c/ndcg@10", "a", "b")),
        ({"tests": {}}, ("tests",)),
        ({"tests": {"a/b": "uber.jsonl"}}, ("a/b",)),
        ({"tests": {"..": "uber.jsonl"}}, ("..",)),
        ({"tests": {"validation": "uber.jsonl"}}, ("validation",)),
        ({"tests": {"average": "uber.jsonl"}}, ("average",)),
        ({"tests": {"uber": "gone.jsonl"}}, ("gone.jsonl",)),
        ({"tests": {"lyft": "train.jsonl"}}, ("lyft", 8, "training")),
        ({"tests": {"lyft": "val.jsonl"}}, ("lyft", 8, "validation")),
        ({"seeds": []}, ("seeds", "[]")),
        ({"seeds": [1, 1]}, ("seeds", "[1, 1]")),
        ({"seeds": ["one"]}, ("seed", "'one'")),
        ({"seeds": [2**62]}, ("seed", 2**62)),
        ({"select": "ndgc@10"}, ("select", "ndgc@10")),
        ({"epcohs": 1}, ("epcohs", "epochs")),
        ({"resume": True}, ("resume",)),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        planned(**changes)


def test_a_test_without_answers_is_named(tmp_path):
    dataset = make_dataset()
    replace(dataset, qrels={q: dict.fromkeys(grades, 0) for q, grades in dataset.qrels.items()}).save(
        tmp_path / "none", format="beir"
    )
    with pytest.raises(ValueError, match=naming("none")):
        planned(tests={"none": str(tmp_path / "none")})
