"""merging.py and `embedft merge`: averages by hand for what a model may have; what may not be averaged; the curve."""

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_folder
from naming import names, naming
from tiny import make_dataset

from embedft import Adapter, evaluate, load_embedder
from embedft.cli import main
from embedft.encoders.embedder import Embedder
from embedft.encoders.head import Dense, DenseConfig
from embedft.encoders.lora import LoraConfig, add_lora, merge_lora
from embedft.encoders.maps import LinearMap
from embedft.encoders.pooling import Pooling
from embedft.training.merging import interpolate, soup

load = functools.partial(load_embedder, device="cpu", dtype=torch.float64)


@pytest.fixture
def models(tmp_path) -> list[Embedder]:
    """Three models of one architecture, with different weights."""
    return [load(write_tiny_folder(tmp_path / f"seed{seed}", seed=seed)) for seed in range(3)]


def weights_of(embedder: Embedder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in embedder.state_dict().items()}


def assert_average(found: Embedder, states: list[dict], weights: list[float], tolerance: float = 1e-14) -> None:
    state = found.state_dict()
    assert all(state.keys() == other.keys() for other in states)
    for name, x in state.items():
        expected = sum(weight * other[name] for weight, other in zip(weights, states, strict=True))
        torch.testing.assert_close(x, expected, rtol=0, atol=tolerance, msg=name)


def test_by_hand(models):
    before = [weights_of(model) for model in models]
    assert_average(soup(models), before, [1 / 3] * 3)
    assert_average(soup(models, [0.2, 0.3, 0.5]), before, [0.2, 0.3, 0.5])
    assert_average(interpolate(*models[:2], 0.75), before[:2], [0.25, 0.75])
    for model, state in zip(models, before, strict=True):  # which are not changed
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert model.query_side is model.lora is model.adapter is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_once_and_exact_at_the_ends(tmp_path, dtype):
    """(1 - 0.9) a + 0.9 b of float32 numbers, as float64 has it, is rounded to the nearest one of the type."""
    folders = [write_tiny_folder(tmp_path / f"seed{seed}", seed=seed) for seed in range(2)]
    base, tuned = (load(folder, dtype=dtype) for folder in folders)
    for model, share in ((base, 0.0), (tuned, 1.0)):
        for name, x in interpolate(base, tuned, share).state_dict().items():
            assert torch.equal(x, model.state_dict()[name]), name
    one, other = base.state_dict(), tuned.state_dict()
    for name, x in interpolate(base, tuned, 0.9).state_dict().items():
        assert torch.equal(x, ((1 - 0.9) * one[name].double() + 0.9 * other[name].double()).to(dtype)), name


def make_sides(folder: Path, seed: int) -> Embedder:
    """Two encoders with heads, attention pooling, and an adapter: everything that may have weights."""
    torch.manual_seed(seed)
    sides = []
    for side in range(2):
        model = load(write_tiny_folder(folder / f"{seed}-{side}", seed=10 * seed + side))
        pooling, head = Pooling(("attention",), 32).double(), Dense(DenseConfig(32, 8)).double()
        for parameter in pooling.parameters():
            torch.nn.init.normal_(parameter)
        sides.append(
            Embedder(
                model.encoder,
                model.tokenizer,
                source=model.source,
                pooling=pooling,
                heads=dict.fromkeys(("query", "document"), torch.nn.Sequential(head)),
            )
        )
    found, queries = sides
    found.attach_query_side(queries)
    adapter = Adapter(LinearMap(8))
    torch.nn.init.normal_(adapter.query.weight)
    found.attach(adapter)
    return found.eval()


@pytest.mark.filterwarnings("ignore:.*attention pooling", "ignore:.*does not record")
def test_everything_with_weights(tmp_path):
    models = [make_sides(tmp_path, seed) for seed in range(2)]
    before = [weights_of(model) for model in models]
    assert {name.split(".")[0] for name in before[0]} == {"encoder", "pooling", "heads", "query_side", "adapter"}
    merged = interpolate(*models, 0.3)
    assert_average(merged, before, [0.7, 0.3], tolerance=1e-6)  # the adapter is in float32


@pytest.mark.filterwarnings("ignore:.*does not record")
def test_a_merged_adapter_is_for_the_merged_model(tmp_path, models):
    for seed, model in enumerate(models[:2]):
        torch.manual_seed(seed)
        adapter = Adapter(LinearMap(32))
        torch.nn.init.normal_(adapter.query.weight)
        model.attach(adapter)
    merged = interpolate(*models[:2], 0.3)
    merged.save(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert loaded.adapter is not None
    assert (loaded.encode(["a b"], role="query") == merged.encode(["a b"], role="query")).all()


def with_lora(model: Embedder, side: str = "both") -> Embedder:
    add_lora(model, LoraConfig(rank=2, side=side, save="adapter"))
    for update in model.lora.updates().values():
        torch.nn.init.normal_(update.B)
    return model


def test_lora_counts_as_merged(models):
    base, tuned = models[0], with_lora(models[1])
    found = interpolate(base, tuned, 0.4)
    assert tuned.lora is not None
    merge_lora(tuned)
    assert_average(found, [base.state_dict(), tuned.state_dict()], [0.6, 0.4])
    assert found.lora is None
    with pytest.raises(ValueError, match=naming("other", "query", "both")):
        soup([base, with_lora(models[2], "query")], names=["base", "other"])


def test_the_result_is_the_last_model_but_for_its_weights(models):
    models[1].max_length = 11
    assert soup(models[:2]).max_length == 11
    assert soup(models[1::-1]).max_length == models[0].max_length != 11


DIFFERENT = {
    "num_hidden_layers": {"num_hidden_layers": 1},
    "hidden_act": {"hidden_act": "relu"},
    "vocab_size": {"vocab_size": 200},
    "pooling": {"modules": True, "pooling": {"pooling_mode_cls_token": True}},
    "prompt of query": {"modules": True, "settings": {"prompts": {"query": "ask: "}}},
    "tokenizer (SHA-256)": {"modules": True, "lower_case": True},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_named(tmp_path, what):
    models = [load(write_tiny_folder(tmp_path / "one", modules="modules" in DIFFERENT[what]))]
    models.append(load(write_tiny_folder(tmp_path / "two", **DIFFERENT[what])))
    with pytest.raises(ValueError, match=naming(tmp_path / "one", ..., tmp_path / "two", ..., what)):
        soup(models)


@pytest.mark.filterwarnings("ignore:.*does not record")
def test_one_with_an_adapter_and_one_without(models):
    models[1].attach(Adapter(LinearMap(32)))
    with pytest.raises(ValueError, match=naming("adapter", "none", "query")):
        soup(models[:2])


@pytest.mark.parametrize(
    ("weights", "facts"),
    [([0.5], (1, 2)), ([0.5, 0.6], (0.6, 1)), ([-0.5, 1.5], (-0.5, 0)), ([float("nan"), 1], ("nan",)), ([], (0, 2))],
)
def test_weights(models, weights, facts):
    with pytest.raises(ValueError, match=naming("weights", *facts)):
        soup(models[:2], weights)


def test_a_share_beyond_the_models_and_no_models(models):
    with pytest.raises(ValueError, match=naming("share", 1.5, 0, 1)):
        interpolate(*models[:2], 1.5)
    with pytest.raises(ValueError, match=naming("weights", 0)):
        soup([])


# The command.


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for seed, name in enumerate(("base", "tuned", "third")):
        write_tiny_folder(tmp_path / name, seed=seed)
    for seed, name in enumerate(("train", "test", "validation")):
        make_dataset(20, 20, seed=seed).save(tmp_path / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_curve(place, capsys):
    """A row per share, a column per test set; the best on validation is saved, and says what it is made of."""
    words = "merge base tuned --shares 0 0.5 1 --test a=test.jsonl train.jsonl --validation validation.jsonl"
    assert main([*words.split(), "--out", "merged", "--style", "csv", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    header, *rows = (line.split(",") for line in printed.out.splitlines())
    assert header == ["share", "validation", "a", "train"]
    base, tuned = (load_embedder(name, device="cpu") for name in ("base", "tuned"))
    values = {}
    for share, *found in rows:
        model = interpolate(base, tuned, float(share))
        sets = (make_dataset(20, 20, seed=seed) for seed in (2, 1, 0))
        expected = [evaluate(model, dataset).metrics["ndcg@10"] for dataset in sets]
        assert found == [f"{value:.4f}" for value in expected]
        values[share] = expected[0]
    assert list(values) == ["0", "0.5", "1"]
    best = max(values, key=values.get)
    assert names(printed.err, "validation", best)
    expected = interpolate(base, tuned, float(best)).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in load_embedder("merged", device="cpu").state_dict().items())
    card = (place / "merged" / "README.md").read_text()
    assert names(card, "weight of tuned", best)


def test_every_share_has_a_row(place, capsys):
    """Also those equal to six digits; twice the same has one."""
    words = "merge base tuned --shares 0.3 0.3000001 1 0.3 1e-7 --test test.jsonl --style csv --device cpu"
    assert main(words.split()) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.partition(",")[0] for row in rows] == ["0.3", "0.3000001", "1", "1e-07"]


def test_a_soup(place, capsys):
    assert main(["merge", "base", "tuned", "third", "--out", "soup", "--device", "cpu"]) == 0
    models = [load_embedder(name, device="cpu") for name in ("base", "tuned", "third")]
    expected = soup(models).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in load_embedder("soup", device="cpu").state_dict().items())
    assert capsys.readouterr().out == "model: soup\n"


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("base --out x", ("MODEL", 1)),
        ("base tuned", ("--out", "--test", "--validation")),
        ("base tuned third --shares 0 1 --test test.jsonl", ("--shares", 3)),
        ("base tuned --shares 0 1 --out x", ("--shares", 2, "--validation")),
        ("base tuned --shares 0 1 --weights 0 1 --out x", ("--shares", "--weights")),
        ("base tuned --shares 0 1.5 --test test.jsonl", ("--shares", 1.5, 0, 1)),
        ("base openai:m --out x", ("openai:m", "API")),
        ("base nowhere --weights 1 --out x", ("--weights", 1, 2)),
        ("base nowhere --weights -1 2 --out x", ("--weights", -1.0, 2.0)),
        ("base nowhere --weights 0.5 0.6 --test nothing.jsonl", ("--weights", 0.6, 1)),
        ("base tuned --test test.jsonl --select nonsense@10", ("nonsense",)),
        ("base tuned --test validation=test.jsonl --validation validation.jsonl", ("'validation'",)),
        ("base nowhere --out x", ("nowhere",)),
        ("base tuned --out base", ("--overwrite",)),
        ("base tuned --out notes --overwrite", ("notes", "modules.json")),
    ],
)
def test_refuses(place, capsys, words, facts):
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("")
    assert main(["merge", *words.split()]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert names(error, *facts)
    assert sorted(path.name for path in (place / "notes").iterdir()) == ["mine.txt"]
    assert json.loads((place / "base" / "config.json").read_text())
    assert not (place / "x").exists()
