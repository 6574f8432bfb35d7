"""benchmarks/bench_evaluate.py in one process on a few vectors of the tiny BERT; benchmarks/vectors.py."""

import csv
import random
import threading
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from conftest import LETTERS
from in_process import InProcess
from naming import naming

from benchmarks import bench_evaluate, vectors
from benchmarks.bench_evaluate import Ours, Task, main, require_close
from benchmarks.vectors import perturbed, rounded, write_perturbed
from embedft import RetrievalDataset, Run
from embedft.vectors import unit_rows

DIM = 32


def unit_vectors(number: int, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((number, DIM), dtype=np.float32))


# Vectors.


def test_perturbed_is_as_far_as_said():
    texts_CD = unit_vectors(3)
    for noise in (0.5, 2.0):
        found_ND = perturbed(texts_CD, range(7, 3000), noise, 0)
        np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1, rtol=1e-6)
        # Noise of length n at right angles, as most directions nearly are: cosine 1 / sqrt(1 + n^2).
        cosines = (found_ND * texts_CD[np.arange(7, 3000) % 3]).sum(axis=1)
        assert cosines.mean() == pytest.approx(1 / np.sqrt(1 + noise**2), abs=0.02)
    np.testing.assert_array_equal(perturbed(texts_CD, range(6, 9), 0.5, 0), perturbed(texts_CD, range(6, 9), 0.5, 0))
    assert (perturbed(texts_CD, range(6, 9), 0.5, 0) != perturbed(texts_CD, range(6, 9), 0.5, 1)).all()
    assert (perturbed(texts_CD, range(9, 12), 0.5, 0) != perturbed(texts_CD, range(6, 9), 0.5, 0)).all()


def test_write_perturbed_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "SLICE", 4)
    texts_CD = unit_vectors(3)
    documents_ND = write_perturbed(tmp_path / "d.npy", texts_CD, 10, noise=0.5)
    parts = [perturbed(texts_CD, rows, 0.5, 0) for rows in (range(4), range(4, 8), range(8, 10))]
    np.testing.assert_array_equal(documents_ND, np.concatenate(parts))
    assert isinstance(documents_ND, np.memmap)
    assert not documents_ND.flags.writeable
    few_ND = write_perturbed(str(tmp_path / "r.npy"), texts_CD, 10, noise=0.5, steps=64)
    np.testing.assert_array_equal(few_ND, np.round(documents_ND * 64) / 64)


@pytest.mark.parametrize("steps", [256, 2048])
def test_products_of_rounded_vectors_are_exact(steps):
    queries_QD, documents_ND = (rounded(unit_vectors(200, seed), steps) for seed in (1, 2))
    assert queries_QD.dtype == np.float32
    np.testing.assert_allclose(queries_QD, unit_vectors(200, 1), rtol=0, atol=0.5 / steps)
    exact_QN = queries_QD.astype(np.float64) @ documents_ND.T.astype(np.float64)
    assert (exact_QN * steps**2 % 1 == 0).all()
    # Added in three orders, in float32.
    backwards_QN = queries_QD[:, ::-1].copy() @ documents_ND[:, ::-1].T.copy()
    one_by_one_QN = np.zeros((200, 200), dtype=np.float32)
    for d in range(DIM):
        one_by_one_QN += queries_QD[:, d : d + 1] * documents_ND[:, d]
    for found_QN in (queries_QD @ documents_ND.T, backwards_QN, one_by_one_QN):
        np.testing.assert_array_equal(found_QN, exact_QN)


# The benchmark.


def write_questions(folder: Path) -> None:
    """60 questions with contexts of ten words each."""
    generator = random.Random(0)
    with open(folder / "Financial-QA-10k.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[f"what is {i}", "no", " ".join(generator.choices(LETTERS, k=10)), "X", "2023"] for i in range(60)]
        csv.writer(file).writerows([("question", "answer", "context", "ticker", "filing"), *rows])


class InThisProcess(InProcess):
    """Every call takes half a second."""

    took = 0.5


@pytest.fixture
def options(tmp_path, write_tiny, monkeypatch) -> Namespace:
    """60 questions and contexts, and workers that are none."""
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr(bench_evaluate, "Worker", InThisProcess)
    monkeypatch.setattr(bench_evaluate, "NUM_SAMPLES", 200)
    monkeypatch.setattr(bench_evaluate, "NUM_QUESTIONS", 50)
    monkeypatch.setattr(bench_evaluate, "INTERVAL_TOLERANCE", 1.0)
    write_questions(tmp_path)
    sizes = {"documents": 600, "queries": 80, "peer_documents": 300, "peer_queries": 20, "depth": 100}
    base = str(write_tiny(tmp_path / "base"))
    rest = {"base": base, "data": str(tmp_path), "folder": str(tmp_path), "texts": 50, "dim": None}
    return Namespace(**sizes, **rest, noise=0.5, rounds=1, device="cpu", dtype="float32")


def test_the_benchmark(options, capsys):
    small, large, *metrics, interval, _, p_value = main(options)
    peer = f"sentence-transformers {version('sentence-transformers')}"
    assert (small.case, small.seconds, small.peer, small.peer_seconds) == ("evaluate 300 x 20", [0.5], peer, [0.5])
    # 600 x 80 / (300 x 20) = 8: 0.5 s become 4 s.
    assert (large.case, large.peer, large.peer_seconds) == ("evaluate 600 x 80", f"{peer}, linear, x 8", [4.0])
    assert all(row.case.startswith("metrics of 80 x 100, from ") for row in metrics)
    peers = {row.peer: row.largest_difference for row in metrics}
    assert peers["trec_eval (pytrec_eval), from dicts"] <= 1e-9
    assert ("ranx is not installed" in capsys.readouterr().out) == ("ranx, from dicts" not in peers)
    assert interval.case == "bootstrap interval"
    assert interval.peer.startswith("scipy")
    assert (interval.seconds, interval.peer_seconds) == ([0.5], [0.5])  # of a worker each
    assert (p_value.case, p_value.peer) == ("sign-flip p-value", None)
    assert not list(Path(options.folder).rglob("*.npy"))


def test_the_peer_is_asked_for_all_when_that_is_little(options):
    options.peer_documents, options.peer_queries, options.depth = 10_000, 10_000, 10
    first, second, *_ = main(options)
    assert first.case == "evaluate 600 x 80"
    assert second.case.startswith("metrics")


def test_the_tasks(options, tmp_path):
    large, small = bench_evaluate.make_tasks(options, str(tmp_path))
    documents_ND = np.load(large.path)
    assert documents_ND.shape == (600, DIM)
    for task, sizes in ((large, (600, 80)), (small, (300, 20))):
        assert (task.num_documents, len(task.relevant), len(task.queries_QD)) == (*sizes, sizes[1])
        firsts = [rows[0] for rows in task.relevant]
        assert len(set(firsts)) == len(firsts)  # another document each
        cosines = (documents_ND[firsts] * task.queries_QD).sum(axis=1)
        assert cosines.mean() == pytest.approx(1 / np.sqrt(5), abs=0.05)  # noise of length 2
        for i, rows in enumerate(task.relevant):
            same_text = range(rows[0], task.num_documents, 50)  # 50 contexts
            assert rows == [*same_text][: 4 if i % 4 == 0 else 1]
        dataset = task.dataset()
        assert list(dataset.corpus) == sorted(dataset.corpus)
        assert list(dataset.queries) == sorted(dataset.queries)
        assert dataset.qrels["q000004"] == {f"d{row:08d}": 1 for row in task.relevant[4]}
    assert max(map(len, large.relevant)) == 4
    assert (large.queries_QD * 256 % 1 == 0).all()
    assert (documents_ND * 256 % 1 == 0).all()


def test_rows_in_any_order(tmp_path):
    np.save(tmp_path / "d.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    queries_QD = np.ones((3, 2), dtype=np.float32)
    ours = Ours(Task(str(tmp_path / "d.npy"), 5, queries_QD, [[0], [1], [2]]), 10)

    def firsts(*texts: str) -> list[float]:
        return ours.encode(list(texts), role="document", dim=None)[:, 0].tolist()

    assert firsts("1", "2", "3") == [2, 4, 6]
    assert firsts("3", "1", "1") == [6, 2, 2]
    assert firsts() == []
    assert np.shares_memory(ours.encode(["2", "3"], role="document", dim=None), ours.documents_ND)
    assert len(ours.documents_ND) == 5
    assert ours.encode(["2"], role="query", dim=None).tolist() == [[1, 1]]


def test_memory_that_an_evaluation_takes(tmp_path, monkeypatch):
    class Hungry(Ours):
        def evaluate(self):
            self.block = np.ones(64 << 17)  # 64 MiB
            time.sleep(1.0)  # many times as long as the pauses between looks, on a busy machine too
            del self.block
            return {"mrr@10": 1.0}

    np.save(tmp_path / "d.npy", np.ones((3, 2), dtype=np.float32))
    contestant = Hungry(Task(str(tmp_path / "d.npy"), 3, np.ones((1, 2), dtype=np.float32), [[0]]), 10)
    metrics, before, most = contestant.watched()
    assert metrics == {"mrr@10": 1.0}
    assert 60 << 20 < most - before < 100 << 20

    num_threads = threading.active_count()
    monkeypatch.setattr(contestant, "dataset", None)
    monkeypatch.setattr(Hungry, "evaluate", Ours.evaluate)
    with pytest.raises(ValueError, match=naming("dataset")):
        contestant.watched()
    assert threading.active_count() == num_threads  # else the process would never end


def test_a_row_of_memory():
    task = Task("", 1 << 20, np.empty((5, 128), dtype=np.float32), [[0]] * 5)
    # 2^20 x 128 x 4 bytes = 512 MiB; 700 - 60 = 640 MiB beside them, 5/4.
    row = bench_evaluate.row_of(task, [1.0], 60 << 20, 700 << 20)
    assert (row.case, row.peak_bytes) == ("evaluate 1,048,576 x 5", 640 << 20)
    assert row.more == {"embeddings_bytes": 512 << 20, "memory_ratio": 1.25}


def test_a_difference_is_found():
    values = {"a": np.array([0.5, 1.0]), "b": np.array([0.0, 0.0]), "more": np.array([9.0])}
    expected = {"a": np.array([0.5, 1.0]), "b": np.array([0.0, 3e-10])}
    assert require_close(values, expected, "it", 1e-9) == 3e-10
    with pytest.raises(ValueError, match=naming("b", "it", "3.0e-10", "1e-10")):
        require_close(values, expected, "it", 1e-10)


@pytest.mark.parametrize("wrong", ["mrr@10", "map@100"])
def test_unequal_figures_stop_the_benchmark(options, monkeypatch, wrong):
    plain = Ours.evaluate
    monkeypatch.setattr(Ours, "evaluate", lambda self: {**plain(self), wrong: plain(self)[wrong] + 1e-8})
    with pytest.raises(ValueError, match=naming(wrong, "sentence-transformers", "1.0e-08", "1e-09")):
        main(options)


def test_wrong_metrics_stop_the_benchmark(options, monkeypatch):
    plain = bench_evaluate.measure
    monkeypatch.setattr(
        bench_evaluate,
        "measure",
        lambda *arguments, **options: {name: value + 1e-8 for name, value in plain(*arguments, **options).items()},
    )
    with pytest.raises(ValueError, match=naming("hit_rate@1", "trec_eval", "1.0e-08", "1e-09")):
        main(options)


def test_metrics_in_the_order_that_each_gives_to_ties(monkeypatch):
    monkeypatch.setattr(
        bench_evaluate.importlib.util, "find_spec", lambda name: None
    )  # ranx compiles for half a minute
    # Four of one score: the relevant one is first by ascending id and last by trec_eval's descending ids.
    found = Run.from_dict({"q": dict.fromkeys(["d1", "d2", "d3", "d4"], 1.0)})
    dataset = RetrievalDataset({"q": "?"}, dict.fromkeys(["d1", "d2", "d3", "d4"], "text"), {"q": {"d1": 1}})
    rows = bench_evaluate.metrics_alone(Namespace(depth=10, rounds=1), found, dataset)
    assert rows[0].case == "metrics of 1 x 10, from arrays"


def test_a_wrong_interval_stops_the_benchmark(options, monkeypatch):
    monkeypatch.setattr(bench_evaluate, "paired_bootstrap_interval", lambda *_, **__: (0.0, 0.0))
    with pytest.raises(ValueError, match=naming("interval", "SciPy", "7e-02")):
        main(options)
