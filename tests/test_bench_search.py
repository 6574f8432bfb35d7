"""benchmarks/bench_search.py on a few vectors of the tiny BERT."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from in_process import InProcess
from naming import naming
from test_bench_evaluate import write_questions

from benchmarks import bench_search
from benchmarks.bench_search import main, make_data, require_equal
from benchmarks.vectors import perturbed
from embedft import load_embedder
from embedft.retrieval.index import Found
from experiments.repro_matryoshka_finance import read_rows


@pytest.fixture
def options(tmp_path, write_tiny, monkeypatch) -> Namespace:
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr(bench_search, "Worker", InProcess)
    write_questions(tmp_path)
    sizes = {"documents": 300, "ivf": 600, "hnsw": 200, "queries": 80, "depth": 20, "texts": 50, "rounds": 2}
    sizes["indices"] = ["ivf", "hnsw"]
    rest = {"base": str(write_tiny(tmp_path / "base")), "data": str(tmp_path), "folder": str(tmp_path), "dim": 16}
    rest |= {"device": "cpu", "dtype": "float32"}
    return Namespace(**sizes, **rest, noise=0.5)


def test_the_benchmark(options):
    exact, from_file, ivf, hnsw = main(options)
    assert (exact.case, from_file.case) == ("search_exact", "search_exact, from a file")
    assert exact.peer.startswith("FAISS IndexFlatIP")
    assert exact.more == {"documents": 300, "queries": 80, "depth": 20}
    assert ivf.case.startswith("ivf (IVF15,Flat), nprobe=16")
    assert hnsw.case.startswith("hnsw (HNSW32,Flat), efConstruction=200,efSearch=64")
    assert [row.more["documents"] for row in (ivf, hnsw)] == [600, 200]
    assert all(row.more["recall@10"] >= 0.9 and row.peer == "flat" for row in (ivf, hnsw))
    assert all(len(row.seconds) == len(row.peer_seconds) == 2 for row in (exact, from_file, ivf, hnsw))
    assert all(row.peak_bytes == row.peer_peak_bytes == 2**30 for row in (exact, from_file, ivf, hnsw))
    assert not list(Path(options.folder).rglob("*.npy"))


def test_the_data(options, tmp_path):
    path, queries = make_data(options, str(tmp_path))
    documents = np.load(path)
    assert (documents.shape, queries.shape) == ((600, 16), (80, 16))
    dataset, _ = read_rows(tmp_path / "Financial-QA-10k.csv")
    texts = [list(dataset.texts.values())[:50], list(dataset.queries.values())[:50]]
    contexts, questions = (
        load_embedder(options.base).encode(part, role=role, dim=16)
        for part, role in zip(texts, ("document", "query"), strict=True)
    )
    np.testing.assert_array_equal(documents, perturbed(contexts, range(600), 0.5, 0))
    np.testing.assert_array_equal(queries, perturbed(questions, range(80), 0.5, 1))


def test_a_difference_is_found():
    scores = np.array([[0.9, 0.5, 0.5, 0.2, 0.1]], dtype=np.float32)
    expected = Found(scores, np.array([[4, 2, 7, 1, 3]]))
    # Documents that tie may change places; what stands last may tie with what was cut off.
    require_equal(Found(scores + np.float32(5e-6), np.array([[4, 7, 2, 1, 8]])), expected, "ours")
    with pytest.raises(ValueError, match=naming("ours", "scores", "0.0e+00", "documents", 2)):
        require_equal(Found(scores, np.array([[1, 2, 7, 4, 3]])), expected, "ours")
    with pytest.raises(ValueError, match=naming("ours", "scores", "1.0e-02", "documents", 0)):
        require_equal(Found(scores + np.float32(0.01), expected.rows), expected, "ours")
    with pytest.raises(ValueError, match=naming("ours", "scores", "nan")):
        require_equal(Found(scores * np.float32("nan"), expected.rows), expected, "ours")


def test_unequal_results_stop_the_benchmark(options, monkeypatch, capsys):
    search = bench_search.search_exact

    def shifted(*given, **options) -> Found:
        found = search(*given, **options)
        return found._replace(rows=found.rows + 1)

    monkeypatch.setattr(bench_search, "search_exact", shifted)
    monkeypatch.setattr(bench_search, "measure", None)  # no time is taken
    with pytest.raises(ValueError, match=naming("search_exact", "scores", "documents")):
        main(options)
    assert capsys.readouterr().out == ""
