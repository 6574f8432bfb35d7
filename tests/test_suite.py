"""Several datasets: suite.py by hand, `evaluate`, `finetune` and their commands on two, beside one at a time."""

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naming import names, naming
from test_tables import make_report
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, Report, RetrievalDataset, Suite, evaluate, finetune
from embedft.cli import main
from embedft.files import read_json, read_jsonl, write_json
from embedft.recipe import job
from embedft.retrieval.suite import about, check_names, describe_change, format_suites, load_reports, report_files
from embedft.retrieval.tables import format_change
from embedft.training.distributed import OtherRankError

CONFIG = FinetuneConfig(epochs=2, batch_size=4, lr=1e-2)
A, B = make_dataset(seed=1), make_dataset(10, 8, seed=2)
UNJUDGED = RetrievalDataset({"q": "x"}, {"d": "y"}, {"q": {"d": 0}})
FILES = {"metrics.json", "per_query.jsonl", "run.trec"}


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# By hand.


def test_a_mean_counts_every_dataset_the_same():
    """MRR@10 is 1, 0, 1/2 and 0 on four questions, 1 on the only other one: (3/8 + 1) / 2, not 2.5 / 5."""
    suite = Suite(many=make_report([1, 0, 2, 0]), one=make_report([1]))
    assert suite["many"].metrics["mrr@10"] == suite.metrics["many/mrr@10"] == 0.375
    assert suite.metrics["one/mrr@10"] == 1.0
    assert suite.metrics["mrr@10"] == 0.6875
    assert suite.metrics["hit_rate@1"] == (0.25 + 1) / 2


def test_metrics_that_one_dataset_lacks_have_no_mean():
    suite = Suite(a=make_report([1], ks=(1, 5)), b=make_report([3], ks=(5, 10)))
    assert suite.metrics["mrr@5"] == (1 + 1 / 3) / 2
    assert "mrr@1" not in suite.metrics
    assert suite.metrics["a/mrr@1"] == 1.0
    assert suite.metrics["b/mrr@10"] == 1 / 3


def test_table():
    suites = {"m": Suite(many=make_report([1, 0, 2, 0]), one=make_report([1]))}
    suites["bm25"] = Suite(many=make_report([0, 0, 0, 1]), one=make_report([0]))
    lines = format_suites(suites, style="text").splitlines()
    assert lines[0].split() == ["metric", "report", "many", "one", "mean"]
    assert lines[3].split() == ["mrr@10", "m", "0.3750", "1.0000", "0.6875"]
    assert lines[4].split() == ["mrr@10", "bm25", "0.2500", "0.0000", "0.1250"]
    rows = list(csv.DictReader(io.StringIO(format_suites(suites, style="csv"))))
    ndcg = (1 + 1 / torch.tensor(3.0, dtype=torch.float64).log2().item()) / 4
    assert next(row for row in rows if row["metric"] == "ndcg@10") == {
        "metric": "ndcg@10",
        "report": "m",
        "many": str(suites["m"]["many"].metrics["ndcg@10"]),
        "one": "1.0",
        "mean": str(suites["m"].metrics["ndcg@10"]),
    }
    assert suites["m"].metrics["ndcg@10"] == pytest.approx((ndcg + 1) / 2, abs=1e-12)
    assert str(suites["m"]) == format_suites({"model": suites["m"]}, style="text")


def test_save_and_load(tmp_path):
    suite = Suite(b=make_report([1, 2]), a=make_report([3]))
    suite.save(tmp_path / "eval")
    assert tree(tmp_path / "eval") == {"suite.json", *(f"{name}/{file}" for name in "ab" for file in FILES)}
    found = load_reports(tmp_path / "eval")
    assert list(found) == ["b", "a"]
    assert found.metrics == suite.metrics
    assert read_json(tmp_path / "eval" / "suite.json")["metrics"] == suite.metrics
    assert load_reports(tmp_path / "eval" / "b").metrics == suite["b"].metrics
    assert {str(x.relative_to(tmp_path / "eval")) for x in report_files(tmp_path / "eval")} == tree(tmp_path / "eval")
    assert report_files(tmp_path) == []


def test_suite_json_is_written_last(tmp_path, monkeypatch):
    Suite(a=make_report([1]), b=make_report([1])).save(tmp_path)
    monkeypatch.setattr(Report, "save", lambda *arguments: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match=naming("full")):
        Suite(a=make_report([2]), b=make_report([2])).save(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "suite.json")):
        Suite.load(tmp_path)


def test_damaged_suites(tmp_path):
    Suite(a=make_report([1]), b=make_report([1])).save(tmp_path)
    for value, *facts in (
        ({}, "datasets", None),
        ({"datasets": []}, "datasets", []),
        ({"datasets": ["../a"]}, tmp_path / "suite.json", "'../a'"),
    ):
        write_json(tmp_path / "suite.json", value)
        with pytest.raises(ValueError, match=naming(*facts)):
            Suite.load(tmp_path)
    write_json(tmp_path / "suite.json", {"datasets": ["a", "c"]})
    with pytest.raises(ValueError, match=naming(tmp_path / "c", "metrics.json")):
        Suite.load(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a b", "a\n", "-x", "a=b"])
def test_names_that_cannot_be_folders(name):
    with pytest.raises(ValueError, match=naming("dataset", repr(name), "letters", "digits")):
        check_names(["fine", name])


def test_names_that_can():
    check_names(["uber", "beir-scifact", "10.k", "größe_2", "語"])


def test_errors_begin_with_the_name_of_the_dataset():
    """But those of a kind of their own stay what they are, and so do all where there is one dataset."""
    for name, kind, expected in (("a", ValueError, "a: gone"), ("", ValueError, "gone"), ("a", OtherRankError, "gone")):
        with pytest.raises(kind) as caught, about(name):
            raise kind("gone")
        assert (caught.type, str(caught.value)) == (kind, expected)


# evaluate.


def test_evaluate_is_evaluate_on_each(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    options = {"dim": 8, "metrics": ["ndcg@10", "mrr@5"], "passages": (6, 3)}
    suite = evaluate(embedder, {"a": A, "b": B}, **options)
    assert list(suite) == ["a", "b"]
    for name, dataset in (("a", A), ("b", B)):
        alone = evaluate(embedder, dataset, **options)
        assert suite[name].metrics == alone.metrics
        assert suite[name].setting == alone.setting
        assert suite[name].run.to_dict() == alone.run.to_dict()


@pytest.mark.parametrize(
    ("datasets", "facts"),
    [
        ({}, ("no", "dataset")),
        ({"a": A, "b": UNJUDGED}, ("b", "none", 1, "relevant")),
        ({"a": A, "b/c": B}, ("'b/c'", "letters")),
    ],
)
def test_every_dataset_is_checked_before_the_first_is_encoded(tmp_path, monkeypatch, datasets, facts):
    embedder = make_embedder(tmp_path / "base")
    monkeypatch.setattr(embedder, "encode", None)
    with pytest.raises(ValueError, match=naming(*facts)):
        evaluate(embedder, datasets)


# finetune.


def test_each_dataset_and_their_mean_are_validated(tmp_path):
    """Each report is what `evaluate` gives; config.json and the weights do not depend on how validation is given."""
    embedder, out = make_embedder(tmp_path / "base"), tmp_path / "run"
    before = evaluate(embedder, {"a": A, "b": B})
    finetune(embedder, make_dataset(), CONFIG, validation={"a": A, "b": B}, out=out)
    after = evaluate(embedder, {"a": A, "b": B})
    found = [load_reports(out / "eval" / name) for name in ("validation-base", "validation")]
    assert found[0].metrics == before.metrics
    assert found[1].metrics == after.metrics
    assert found[1]["b"].setting["model"].endswith(" + fine-tuned")
    measured = [record["metrics"] for _, record in read_jsonl(out / "train.jsonl") if "metrics" in record]
    assert len(measured) == 3
    assert measured[0] == before.metrics
    best = max(measured, key=lambda metrics: metrics["ndcg@10"])
    assert best == after.metrics
    for metrics in measured:
        assert metrics["ndcg@10"] == (metrics["a/ndcg@10"] + metrics["b/ndcg@10"]) / 2
    hashes = read_json(out / "environment.json")["sha256"]
    assert {name: hashes[name] for name in ("validation a", "validation b")} == {
        "validation a": A.sha256(),
        "validation b": B.sha256(),
    }
    assert describe_change(*found, select="ndcg@10") in (out / "model" / "README.md").read_text()


def test_the_card_has_each_dataset_and_the_mean():
    base, tuned = (
        Suite({name: replace(make_report(r), setting={"max_length": 48}) for name, r in (("a", ranks), ("b", [1]))})
        for ranks in ([2, 0], [1, 0])
    )
    text = describe_change(base, tuned, select="a/mrr@10")
    assert names(text, "a/mrr@10", 2, "a", 1, "b", 48)
    assert re.search(r"\| mrr@10 +\| fine-tuned \| 0\.5000 \| 1\.0000 \| 0\.7500 \|", text)
    for name in "ab":
        assert f"{name}:\n\n{format_change(base[name], tuned[name], select='mrr@10')}" in text
    one = describe_change(base["a"], tuned["a"], select="mrr@10")
    table = format_change(base["a"], tuned["a"], select="mrr@10")
    assert one == f"On the 2 held-out questions that chose the weights; the base at max_length 48:\n\n{table}"


@pytest.mark.parametrize(("select", "best"), [("mrr@10", 2), ("a/mrr@10", 1), ("b/mrr@10", 2)])
def test_select_takes_the_mean_or_one_dataset(tmp_path, monkeypatch, select, best):
    """Ranks of the only question of a are 5, 1, 4, those of b 9, 4, 1: MRR 0.2, 1, 0.25 and 0.11, 0.25, 1."""
    found = iter([Suite(a=make_report([a]), b=make_report([b])) for a, b in ((5, 9), (1, 4), (4, 1))])
    monkeypatch.setattr(job, "evaluate", lambda *arguments, **options: next(found))
    seen = []

    def weights(state, record):
        seen.append({name: weight.clone() for name, weight in embedder.state_dict().items()})

    embedder = make_embedder(tmp_path / "base")
    steps = {"batch_size": 6, "epochs": 1, "eval_every": 1, "select": select}
    config = FinetuneConfig(**{**vars(CONFIG), **steps})
    if select == "mrr@10":  # of 0.16, 0.625 and 0.625, the first of equals
        best = 1
    finetune(embedder, make_dataset(), config, validation={"a": A, "b": B}, on_step=weights)
    assert len(seen) == 2
    assert all(torch.equal(weight, seen[best - 1][name]) for name, weight in embedder.state_dict().items())


@pytest.mark.parametrize(
    ("validation", "select", "facts"),
    [
        ({"a": A, "b": B}, "c/ndcg@10", ("select", "'c/ndcg@10'", "'c'", "a, b")),
        ({"a": A, "b": B}, "a/ndcg@ten", ("select", "'a/ndcg@ten'")),
        ({"a": A, "b": B}, "a/", ("select", "'a/'")),
        ({"a": A, "b": B}, "/ndcg@10", ("select", "'/ndcg@10'", "a, b")),
        (A, "/ndcg@10", ("select", "'/ndcg@10'", "one", "dataset")),
        (A, "a/ndcg@10", ("select", "'a/ndcg@10'", "'a'", "one", "dataset")),
        ({"a": A, "b": UNJUDGED}, "ndcg@10", ("b", "relevant")),
        ({"a": A, "": B}, "ndcg@10", ("''", "letters")),
        ({}, "ndcg@10", ("validation", "empty")),
    ],
)
def test_validation_is_checked_before_training(tmp_path, monkeypatch, validation, select, facts):
    monkeypatch.setattr("embedft.recipe.finetune.train", None)
    config = FinetuneConfig(**{**vars(CONFIG), "select": select})
    with pytest.raises(ValueError, match=naming(*facts)):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), config, validation=validation, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_shared_with_training_is_told_by_name(tmp_path):
    with pytest.warns(UserWarning, match=naming("b", ..., 12, 12, "questions", "training")):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, validation={"a": A, "b": make_dataset()})


def test_resumed_after_half_a_report_on_the_base(tmp_path, monkeypatch):
    """Killed between the reports of two datasets; with another dataset, the run is not resumed."""
    embedder, out, datasets = make_embedder(tmp_path / "base"), tmp_path / "run", {"a": A, "b": B}
    expected, save, saved = evaluate(embedder, datasets).metrics, Report.save, []

    def killed(self, folder):
        if saved:
            raise KeyboardInterrupt
        saved.append(folder)
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(embedder, make_dataset(), CONFIG, validation=datasets, out=out)
    assert tree(out / "eval") == {f"validation-base/a/{file}" for file in FILES}
    with pytest.raises(ValueError, match=naming("validation", "b", "SHA-256")):
        finetune(embedder, make_dataset(), CONFIG, validation={"a": A, "b": A}, out=out, existing="resume")
    with pytest.raises(ValueError, match=naming("validation", "SHA-256")):
        finetune(embedder, make_dataset(), CONFIG, validation=A, out=out, existing="resume")
    finetune(embedder, make_dataset(), CONFIG, validation=datasets, out=out, existing="resume")
    assert Suite.load(out / "eval" / "validation-base").metrics == expected
    assert (out / "DONE").exists()


# The commands.


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a model and two datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset().save("train.json")
    A.save("a.json")
    B.save("b.jsonl.gz")
    return tmp_path


def run(capsys, arguments: str) -> str:
    """What a command that succeeds prints."""
    assert main(arguments.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, arguments: str, *facts: object) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert names(error, *facts), error


def test_the_command_on_two(place, capsys):
    embedder = make_embedder(place / "model")
    out = run(capsys, "evaluate model a.json other=b.jsonl.gz --fuse --out eval")
    suites = {name: Suite.load(f"eval/{name}") for name in ("", "bm25", "fused")}
    assert suites[""].metrics == evaluate(embedder, {"a": A, "other": B}).metrics
    run(capsys, "evaluate model b.jsonl.gz --fuse --out alone")
    for name in suites:
        assert suites[name]["other"].metrics == Report.load(f"alone/{name}").metrics
    heading, table = out.split("\n\n")[:2]
    assert names(heading, "model", "a", 12, "queries", "other", 10, "queries")
    assert table == format_suites({"model": suites[""], "bm25": suites["bm25"], "fused": suites["fused"]}, style="text")
    assert "each counting the same" in out
    assert tree(place / "eval") == {
        f"{kind}{file}"
        for kind in ("", "bm25/", "fused/")
        for file in ("suite.json", *(f"{name}/{x}" for name in ("a", "other") for x in FILES))
    }
    printed = json.loads(run(capsys, "evaluate model a.json other=b.jsonl.gz --json"))
    assert printed == suites[""].metrics | {"bm25": suites["bm25"].metrics}
    out = run(capsys, "evaluate model a.json other=b.jsonl.gz --style csv --no-bm25")
    assert out == format_suites({"model": suites[""]}, style="csv") + "\n"
    assert names(run(capsys, "compare eval/other eval/bm25/other"), 10, "questions")
    refused(capsys, "compare eval eval/bm25", "eval", "eval/a", "eval/other")


def test_reports_are_replaced_whatever_they_were_of(place, capsys):
    run(capsys, "evaluate model a.json --out eval")
    for data in ("x=a.json y=b.jsonl.gz", "x=a.json z=b.jsonl.gz --no-bm25"):
        refused(capsys, f"evaluate model {data} --out eval", "eval", "--overwrite")
        run(capsys, f"evaluate model {data} --out eval --overwrite")
    assert tree(place / "eval") == {"suite.json", *(f"{name}/{file}" for name in "xz" for file in FILES)}
    assert {path.name for path in (place / "eval").iterdir() if path.is_dir()} == {"x", "z"}
    (place / "eval" / "z" / "notes.txt").write_text("mine")
    run(capsys, "evaluate model a.json --out eval --overwrite --no-bm25")
    assert tree(place / "eval") == FILES | {"z/notes.txt"}


def test_a_report_of_several_is_refused_while_it_is_half_replaced(place, capsys):
    run(capsys, "evaluate model a.json b.jsonl.gz --out eval")
    (place / "eval" / ".replacing").touch()
    for folder in (".", "bm25"):
        with pytest.raises(ValueError, match=naming("eval", "killed")):
            Report.load(Path("eval", folder, "a"))


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("a.json a.json", ("a.json", "'a'", "NAME=DATA")),
        ("a.json bm25=b.jsonl.gz", ("'bm25'", "NAME=DATA")),
        ("a.json mean=b.jsonl.gz", ("'mean'", "NAME=DATA")),
        ("a.json suite.json=b.jsonl.gz", ("'suite.json'", "NAME=DATA")),
        ("a.json run.trec=b.jsonl.gz", ("'run.trec'", "NAME=DATA")),
        ("a.json b=", ("'b='", "NAME=DATA")),
        ("a.json x/y=b.jsonl.gz", ("'x/y'", "letters")),
        ("a.json b.jsonl.gz --dims 8 16", (2, "datasets", "single", "setting")),
        ("a.json b.jsonl.gz --metrics ndcg@ten", ("'ndcg@ten'",)),
        ("a.json no.json", ("no.json", "file", "folder")),
        ("a.json b.jsonl.gz --split dev", ("a.json", "'dev'", "beir")),
    ],
)
def test_what_evaluate_refuses(place, capsys, arguments, facts):
    shutil.rmtree("model")  # nothing is loaded before
    refused(capsys, f"evaluate model {arguments}", *facts)


def test_finetune_with_two(place, capsys):
    options = "--out run --epochs 1 --batch-size 4 --select b/mrr@10"
    out = run(capsys, f"finetune model train.json --validation first=a.json b.jsonl.gz {options}").splitlines()
    log = [record["metrics"] for _, record in read_jsonl("run/train.jsonl") if "metrics" in record]
    best = max(log, key=lambda metrics: metrics["b/mrr@10"])
    assert names(out[1], "b/mrr@10", f"{log[0]['b/mrr@10']:.4f}", ..., f"{best['b/mrr@10']:.4f}")
    before, after = (Suite.load(f"run/eval/{name}") for name in ("validation-base", "validation"))
    assert list(after) == ["first", "b"]
    for line, name in zip(out[2:4], after, strict=True):
        change = " -> ".join(f"{suite[name].metrics['mrr@10']:.4f}" for suite in (before, after))
        assert line.startswith(f"{name}: mrr@10: {change},")
    refused(capsys, "compare run run/eval/validation/b", "run/eval/validation/first")


def test_one_dataset_with_a_name_is_one_dataset(place, capsys):
    """Its files are those of a dataset without a name."""
    for name, data in (("named", "x=a.json"), ("plain", "a.json")):
        run(capsys, f"finetune model train.json --validation {data} --out {name} --epochs 1 --batch-size 4")
        run(capsys, f"evaluate model {data} --out eval-{name}")
    assert tree(place / "named") == tree(place / "plain")
    assert tree(place / "eval-named") == tree(place / "eval-plain")
    assert not any(name.endswith("suite.json") for name in tree(place / "named"))
    hashes = read_json("named/environment.json")["sha256"]
    assert hashes == read_json("plain/environment.json")["sha256"]
    assert list(hashes) == ["model", "train", "validation"]


def test_settings_from_a_file(place, capsys):
    """As one text, which older files have, or as a list."""
    for data, names_of in (("a.json", [""]), (["a.json", "b.jsonl.gz"], ["a", "b"])):
        write_json("settings.json", {"data": data, "out": "eval", "overwrite": os.path.exists("eval")})
        run(capsys, "evaluate model --config settings.json")
        assert [Path("eval", name, "metrics.json").is_file() for name in names_of] == [True] * len(names_of)
    write_json("settings.json", {"data": []})
    refused(capsys, "evaluate model --config settings.json", "DATA")
