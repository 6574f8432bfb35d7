"""commands/adapter.py: `embedft adapter` and `embedft evaluate --adapter`, by `main` and once in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import names
from tiny import make_dataset, make_embedder

import embedft
from embedft import Adapter, AdapterConfig, compare, evaluate, fit_adapter, load_embedder
from embedft.cli import main
from embedft.files import read_json, read_jsonl

FIT = ["adapter", "model", "pairs.json", "--epochs", "20", "--held_out", "0.2", "--seed", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, data to fit on and other data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset(30, 20).save("pairs.json")
    make_dataset(12, 9, seed=1).save("other.json")
    return tmp_path


def test_fits_measures_and_evaluates(place, capsys):
    assert main([*FIT, "--out", "adapter", "--validation", "other.json"]) == 0
    out = capsys.readouterr().out
    assert "held-out questions" in out
    assert "mrr@10" in out
    assert out.endswith("adapter: adapter\n")
    assert sorted(p.name for p in (place / "adapter").iterdir()) == [
        "adapter.json", "adapter.safetensors", "config.json", "train.jsonl"]  # fmt: skip
    assert read_json("adapter/config.json")["epochs"] == 20
    assert sum("loss" in record for _, record in read_jsonl("adapter/train.jsonl")) == 20
    # The adapter is of this model, and evaluate goes through it.
    adapter, embedder = Adapter.load("adapter"), load_embedder("model")
    assert adapter.base == embedder.base()
    embedder.attach(adapter)
    expected = evaluate(embedder, make_dataset(12, 9, seed=1)).metrics
    assert main(["evaluate", "model", "other.json", "--adapter", "adapter", "--json", "--no-bm25"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)


def test_each_text_is_embedded_once(place, capsys, monkeypatch):
    """With a measurement before and after, and no store asked for."""
    embedded = []
    token_ids = load_embedder("model").tokenizer.__class__.token_ids
    monkeypatch.setattr(
        "embedft.encoders.tokenization.Tokenizer.token_ids",
        lambda self, texts: embedded.extend(texts) or token_ids(self, texts),
    )
    assert main([*FIT, "--out", "adapter", "--validation", "other.json"]) == 0
    assert len(embedded) == len(set(embedded)) >= 60
    assert not names(capsys.readouterr().err, "texts")  # nothing of a store


def test_through_a_store(place, capsys):
    assert main([*FIT, "--out", "one", "--store", "store"]) == 0
    assert "0 texts found, 50 computed" in capsys.readouterr().err
    assert main([*FIT, "--out", "two", "--store", "store"]) == 0
    assert "50 texts found, 0 computed" in capsys.readouterr().err
    one, two = Adapter.load("one"), Adapter.load("two")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert (place / "one" / "train.jsonl").read_bytes() == (place / "two" / "train.jsonl").read_bytes()


def test_without_held_out_documents(place, capsys):
    assert main([*FIT, "--out", "adapter", "--held-out", "0"]) == 0
    assert "weights of the last step, 20" in capsys.readouterr().out
    assert main([*FIT, "--out", "far", "--lr", "1000"]) == 0
    assert "kept the start, which no step improved on" in capsys.readouterr().out


def test_start_and_overwrite(place, capsys):
    assert main([*FIT, "--out", "adapter"]) == 0
    assert main([*FIT, "--out", "adapter"]) == 2
    assert names(capsys.readouterr().err, "embedft adapter", "adapter/adapter.json", "--overwrite")
    first = Adapter.load("adapter")
    assert main([*FIT, "--out", "adapter", "--overwrite", "--start", "adapter", "--epochs", "1", "--lr", "1e-9"]) == 0
    np.testing.assert_allclose(Adapter.load("adapter").query.weight.detach(), first.query.weight.detach(), atol=1e-6)
    (place / "folder").mkdir()
    (place / "folder" / "mine.txt").write_text("")
    assert main([*FIT, "--out", "folder", "--overwrite"]) == 2
    assert names(capsys.readouterr().err, "folder", "adapter.json")
    # What a command leaves that is killed before its first file, or between two.
    (place / "begun" / ".0123abcd.tmp").mkdir(parents=True)
    assert main([*FIT, "--out", "begun", "--epochs", "1"]) == 0
    (place / "begun" / ".replacing").touch()
    (place / "begun" / "adapter.json").unlink()
    assert main([*FIT, "--out", "begun", "--epochs", "1"]) == 0
    assert not list((place / "begun").glob(".*"))


def test_the_training_split_of_a_beir_folder(place, capsys):
    make_dataset(30, 20).save("beir", format="beir")
    (place / "beir" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    command = ["adapter", "model", "beir", "--out", "adapter", "--held-out", "0", "--epochs", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("2 questions, 20 documents")
    assert main([*command, "--overwrite", "--split", "test"]) == 0
    assert capsys.readouterr().out.startswith("30 questions, 20 documents")


def test_over_passages(place, capsys):
    """Windows of 6 tokens: what the library fits on them, measured over them too."""
    dataset, other = make_dataset(30, 20), make_dataset(12, 9, seed=1)
    fit = [*FIT, "--held-out", "0"]
    assert main([*fit, "--out", "adapter", "--validation", "other.json", "--passages", "6", "2"]) == 0
    out = capsys.readouterr().out
    embedder, adapter = load_embedder("model"), Adapter.load("adapter")
    vectors, source = embedder.encode_passages(list(dataset.texts.values()), (6, 2))
    assert len(vectors) > source[-1] + 1 == 20
    queries = embedder.encode(list(dataset.queries.values()), role="query")
    config = AdapterConfig(epochs=20, seed=1)
    expected = fit_adapter(queries, vectors, dataset.qrels_by_row(), config, source=source)
    assert torch.equal(adapter.query.weight, expected.query.weight)
    assert out.startswith("30 questions, 20 documents, ")
    before = evaluate(embedder, other, passages=(6, 2))
    embedder.attach(adapter)
    assert str(compare(before, evaluate(embedder, other, passages=(6, 2)), metric="mrr@10")) in out
    # Whole documents give another adapter.
    assert main([*fit, "--out", "whole"]) == 0
    assert not torch.equal(Adapter.load("whole").query.weight, adapter.query.weight)


def test_passages_through_a_store(place, capsys):
    command = [*FIT, "--passages", "6", "2", "--store", "store"]
    assert main([*command, "--out", "one"]) == 0
    assert " 0 computed" not in capsys.readouterr().err
    assert main([*command, "--out", "two"]) == 0
    assert " 0 computed" in capsys.readouterr().err
    assert (place / "one" / "train.jsonl").read_bytes() == (place / "two" / "train.jsonl").read_bytes()


def test_a_model_that_cuts_no_passages_is_refused(place, capsys, monkeypatch):
    """As one behind an API; before anything is embedded."""

    class Whole:
        adapter = store = None

    monkeypatch.setattr("embedft.commands.adapter.load_encoder", lambda options: Whole())
    assert main([*FIT, "--out", "adapter", "--passages", "6", "2"]) == 2
    assert names(capsys.readouterr().err, "passages", (6, 2), "Whole")


def test_hard_negatives_of_the_data_train(place, capsys):
    (place / "pairs.csv").write_text("query,document,negative\na b,c d,e f\ng h,i j,c d\n")
    command = ["adapter", "model", "pairs.csv", "--objective", "in_batch", "--loss.name", "triplet", "--epochs", "2"]
    assert main([*command, "--out", "adapter"]) == 0
    assert capsys.readouterr().out.startswith("2 questions, 3 documents")
    (place / "pairs.csv").write_text("query,document\na b,c d\ng h,i j\n")
    assert main([*command, "--out", "other"]) == 2
    assert names(capsys.readouterr().err, "triplet", "documents", 1, "negatives")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--kind", "cubic"], ("kind", "'cubic'", "'linear'", "'two_layer'")),
        (["--loss.name", "nothing"], ("loss", "'nothing'", "in_batch_negatives")),
        (["--start", "model"], ("model", "adapter.json")),
        (["--validation", "missing.json"], ("missing.json", "file", "folder")),
        (["--passages", "6", "8"], ("passages", 8, 1, 6)),
        (["--passages", "6", "2", "4", "2"], ("passages", [6, 2, 4, 2], "(size, stride)")),
        (["--passages", "600", "8"], ("passages", 600, 3, 48)),
        (["--held-out", "0.99"], ("--held-out", 0.99, 30)),
    ],
)
def test_errors_are_one_line(place, capsys, arguments, facts):
    assert main([*FIT, "--out", "adapter", *arguments]) == 2
    error = capsys.readouterr().err
    assert names(error, *facts)
    assert error.count("\n") == 1
    assert not (place / "adapter").exists()


def test_an_adapter_of_another_model_is_refused(place, capsys):
    assert main([*FIT, "--out", "adapter"]) == 0
    other = make_embedder(place / "model")
    with torch.no_grad():
        next(other.encoder.parameters())[0, 0] += 1
    other.save("other")
    capsys.readouterr()
    assert main(["evaluate", "other", "other.json", "--adapter", "adapter"]) == 2
    assert names(capsys.readouterr().err, "adapter", "model", "other", "query")
    assert main(["adapter", "other", "pairs.json", "--out", "new", "--start", "adapter"]) == 2
    assert names(capsys.readouterr().err, "adapter", "model", "other", "query")


def test_a_model_with_an_adapter_is_refused(place, capsys):
    embedder = load_embedder("model")
    assert main([*FIT, "--out", "adapter"]) == 0
    embedder.attach(Adapter.load("adapter"))
    embedder.save("adapted")
    assert main(["adapter", "adapted", "pairs.json", "--out", "new"]) == 2
    assert names(capsys.readouterr().err, "adapted", "--start")


def test_in_a_process(place):
    command = [sys.executable, "-m", "embedft", *FIT, "--out", "adapter", "--device", "cpu", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(embedft.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "adapter" / "adapter.json").is_file()
