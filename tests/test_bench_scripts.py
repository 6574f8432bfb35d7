"""The benchmarks of adapters, batches, chunks, questions, stores and threads, in one process on a tiny encoder."""

import json
import multiprocessing
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from naming import names
from test_bench_evaluate import InThisProcess
from test_pdf import pdf_bytes

from benchmarks import bench_adapter, bench_encode, bench_store, suite, workers
from benchmarks.shapes import make_texts, write_model
from embedft import RetrievalDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
Script = Callable[..., list[dict]]


@pytest.fixture
def script(tmp_path, monkeypatch) -> Script:
    """Runs a script with these options; returns the rows that it wrote."""
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr(workers, "Worker", InThisProcess)
    monkeypatch.setattr(bench_encode, "Worker", InThisProcess)
    monkeypatch.setattr(suite, "batch_tokens", lambda device: 64)  # a small matrix product

    def run(name: str, *options: str) -> list[dict]:
        file = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [name, *options, "--rounds", "2", "--json", str(file)])
        runpy.run_module(f"benchmarks.bench_{name}", run_name="__main__")
        found = json.loads(file.read_text())
        assert (found["benchmark"], found["arguments"]["rounds"]) == (name, 2)
        return found["rows"]

    return run


@pytest.fixture
def base(tmp_path) -> str:
    return str(write_model(tmp_path / "base", "tiny"))


@pytest.fixture
def questions(tmp_path) -> str:
    """A folder with a question about each of 12 documents, twice."""
    texts = make_texts([12] * 24, vocabulary=100)
    queries, corpus = ({f"{kind}{i}": text for i, text in enumerate(texts[i::2])} for i, kind in enumerate("qd"))
    dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(12)})
    for name in ("train_dataset.json", "val_dataset.json"):
        dataset.save(tmp_path / name)
    return str(tmp_path)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_adapter(script, base, questions, dtype, most):
    given = ("--base", base, "--data", questions, "--number", "6", "--dtype", dtype)
    stored, cold, full = script("adapter", *given)
    assert stored["largest_difference"] <= most
    assert (cold["peer"], cold["peer_seconds"]) == ("embedding in the loop", [0.5])
    assert len(full["seconds"]) == 2


def test_batch(script, base):
    rows = script("batch", "--base", base, "--peer", "none", "--sizes", "3", "2", "--memory", "2")
    assert [row["case"] for row in rows] == ["2 pairs", "3 pairs", "memory, 2 pairs"]
    # 0.5 s for two pairs, then for three.
    assert [row["ms_per_pair"] for row in rows[:2]] == pytest.approx([250, 500 / 3])
    assert rows[1]["of_smallest"] == pytest.approx(2 / 3)
    # Two layers of 8,192 weights in matrices; 64 tokens a pair; four passes.
    assert rows[0]["flops"] == 4 * (4 * 32 * 2 * 2 * 8_192 + 4 * 32**2 * 2 * 4 * 32)
    assert rows[2]["peak_bytes"] == 2**30 - 2 * 2 * 32 * 4


def test_batch_in_half_precision(script, base):
    options = ("--base", base, "--peer", "none", "--sizes", "2", "--memory", "--dtype", "bfloat16")
    assert [row["case"] for row in script("batch", *options)] == ["2 pairs"]


def test_batch_of_ones_own_pairs(script, base, questions, capsys):
    file = f"{questions}/train_dataset.json"
    given = ("--base", base, "--peer", "none", "--memory", "--data", file)
    (row,) = script("batch", *given, "--sizes", "3")
    assert (row["texts"], row["tokens"]) == (6, 6 * 12)
    with pytest.raises(SystemExit):
        script("batch", *given, "--sizes", "13")
    assert names(capsys.readouterr().err, file, 12, 13)


def test_batch_against_peers(script, base):
    pytest.importorskip("sentence_transformers")
    given = ("--base", base, "--sizes", "2", "--memory", "2")
    rows = script("batch", *given, "--peer", "sentence-transformers", "sentence-transformers-bf16")
    assert [row["peer"].split()[0] for row in rows] == 2 * ["sentence-transformers", "sentence-transformers-bf16"]


def test_chunk(script, base, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.pdf").write_bytes(pdf_bytes(["One page of text.\nTwo lines.", "Another page."]))
    rows = script("chunk", *(str(tmp_path / f"{name}.pdf") for name in "ab"), "--pages", "1", "--base", base)
    assert [row["case"] for row in rows] == ["a process per core", "one process"]
    assert {(row["pages"], row["peer"].split()[0]) for row in rows} == {(2, "pypdf")}


@pytest.mark.slow
def test_questions(script, questions):
    assert script("questions", "--chunks", "3", "--data", f"{questions}/train_dataset.json")
    rows = script("questions", "--chunks", "3")
    assert [(row["case"], row["peer"].split(",")[0]) for row in rows] == [
        ("0% faults", "bare loop"),
        ("20% faults", "bare loop"),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_store(script, base, dtype):
    written, *opened, through = script("store", "--base", base, "--texts", "30", "--rows", "50", "--dtype", dtype)
    assert written["case"] == "write, 50 x 384"
    assert [row["case"].split(",")[0] for row in opened] == ["open", "look up", "look up again"]
    assert (through["case"], through["peer"]) == (
        "30 texts through the store, 3 of them new",
        "the new ones alone",
    )


def test_texts_of_ones_own(script, base, questions):
    through = script("store", "--base", base, "--rows", "50", "--data", f"{questions}/train_dataset.json")[-1]
    assert through["case"] == "12 texts through the store, 1 of them new"
    assert (
        suite.own_texts(f"{questions}/train_dataset.json", 2)
        == suite.own_texts(f"{questions}/train_dataset.json", 12)[:2]
    )
    assert suite.own_texts(questions, 2) == suite.own_texts(None, 2) == []  # a folder of published data; none


def test_float32_is_computed_in_float32(base, questions):
    """Where inference would lower it, on CUDA: vectors must agree to 1e-5."""
    options = Namespace(base=base, device="cpu", dtype="float32", data=questions, number=2)
    fitting = bench_adapter.Fitting(base, f"{questions}/store", options)
    assert [x.autocast for x in (bench_store.load(options), fitting.embedder, fitting.stored)] == [False] * 3


class Started:
    """Stands in for a busy process."""

    made = 0

    def __init__(self, target, daemon):
        pass

    def start(self):
        Started.made += 1

    def kill(self):
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads(script, base, questions, monkeypatch, dtype, capsys):
    monkeypatch.setattr(multiprocessing, "Process", Started)
    monkeypatch.setattr(Started, "made", 0)
    given = ("--base", base, "--data", questions, "--models", "small", "--dtype", dtype)
    rows = script("threads", *given)
    assert Started.made == 1  # however many cores
    with pytest.raises(SystemExit):
        script("threads", *given, "--busy", "0")
    assert names(capsys.readouterr().err, "--busy", 0, 1)
    assert len(rows) == 2 * 3 * 2  # idle and busy; step, encode, query; two other ways to wait
    assert rows[0]["case"] == "small, idle machine: step"
    assert [row["peer"] for row in rows[:2]] == ["passive", "1,000 spins"]


def test_a_pdf_that_is_not_there(script, base, capsys):
    with pytest.raises(SystemExit):
        script("chunk", str(Path("nowhere.pdf")), "--base", base)
    assert "nowhere.pdf" in capsys.readouterr().err
