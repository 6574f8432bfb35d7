"""The benchmarks of adapters, batches, chunks, questions, stores and threads, in one process on a tiny encoder."""

import json
import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bench_evaluate import InThisProcess
from test_pdf import pdf_bytes

from benchmarks import bench_adapter, bench_store, suite, workers
from benchmarks.shapes import make_texts, write_model
from embedft import RetrievalDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
Script = Callable[..., list[dict]]


@pytest.fixture
def script(tmp_path, monkeypatch) -> Script:
    """Runs a script with these options; returns the rows that it wrote."""
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr(workers, "Worker", InThisProcess)
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


def test_adapter(script, base, questions):
    stored, cold, full = script("adapter", "--base", base, "--data", questions, "--number", "6")
    assert stored["largest_difference"] <= 1e-5
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
    options = ("--base", base, "--peer", "none", "--sizes", "2", "--memory", "--precision", "bfloat16")
    assert [row["case"] for row in script("batch", *options)] == ["2 pairs"]


def test_chunk(script, base, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.pdf").write_bytes(pdf_bytes(["One page of text.\nTwo lines.", "Another page."]))
    rows = script("chunk", *(str(tmp_path / f"{name}.pdf") for name in "ab"), "--pages", "1", "--base", base)
    assert [row["case"] for row in rows] == ["a process per core", "one process"]
    assert {(row["pages"], row["peer"].split()[0]) for row in rows} == {(2, "pypdf")}


@pytest.mark.slow
def test_questions(script):
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


def test_float32_is_computed_in_float32(base, questions):
    """Where inference would lower it, on CUDA: vectors must agree to 1e-5."""
    options = Namespace(base=base, device="cpu", dtype="float32")
    fitting = bench_adapter.Fitting(base, questions, f"{questions}/store", "cpu", 2)
    assert [x.autocast for x in (bench_store.load(options), fitting.embedder, fitting.stored)] == [False] * 3


def test_threads(script, base, questions, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 0)  # no busy neighbours
    rows = script("threads", "--base", base, "--data", questions, "--models", "small")
    assert len(rows) == 2 * 3 * 2  # idle and busy; step, encode, query; two other ways to wait
    assert rows[0]["case"] == "small, idle machine: step"
    assert [row["peer"] for row in rows[:2]] == ["passive", "10,000 spins"]


def test_a_pdf_that_is_not_there(script, base, capsys):
    with pytest.raises(SystemExit):
        script("chunk", str(Path("nowhere.pdf")), "--base", base)
    assert "nowhere.pdf" in capsys.readouterr().err
