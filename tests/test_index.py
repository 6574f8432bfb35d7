"""index.py against brute force. Whole-number embeddings make inner products exact, so ties are exact too."""

import numpy as np
import pytest

from embedft.retrieval import index as index_module
from embedft.retrieval.index import FlatIndex


def brute_force(queries, documents, depth):
    """The whole order by (-score, row), in float64."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    rows = np.lexsort((np.broadcast_to(np.arange(len(documents)), scores.shape), -scores), axis=1)[:, :depth]
    return np.take_along_axis(scores, rows, axis=1), rows


def filled(documents):
    index = FlatIndex(documents.shape[1])
    index.add(documents)
    return index


def check(queries, documents, depth):
    scores, rows = filled(documents).search(queries, depth)
    expected_scores, expected_rows = brute_force(queries, documents, depth)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


# FAISS keeps a heap below 100 results and a reservoir, with another choice among ties, from 100 on.
@pytest.mark.parametrize("depth", [1, 5, 99, 100, 150, 2999, 3000, 5000])
@pytest.mark.parametrize("num_queries", [1, 30])
def test_ties_are_ordered_by_row_and_at_the_cutoff_too(depth, num_queries):
    rng = np.random.default_rng(depth)
    documents = rng.integers(-2, 3, size=(3000, 6)).astype(np.float32)
    check(rng.integers(-2, 3, size=(num_queries, 6)).astype(np.float32), documents, depth)


@pytest.mark.parametrize("depth", [3, 120])
def test_a_corpus_of_equal_documents(depth):
    check(np.ones((40, 4), dtype=np.float32), np.ones((2500, 4), dtype=np.float32), depth)


def test_blocks_of_queries(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = (rng.integers(-3, 4, size=(n, 5)).astype(np.float32) for n in (23, 300))
    monkeypatch.setattr(index_module, "QUERY_BLOCK", 7)
    monkeypatch.setattr(index_module, "TIED_BLOCK", 2)
    check(queries, documents, 20)


def test_real_valued_embeddings_added_in_parts():
    rng = np.random.default_rng(1)
    documents, queries = (rng.standard_normal((n, 24)).astype(np.float32) for n in (1000, 50))
    index = FlatIndex(24)
    for part in np.array_split(documents, 7):
        index.add(part)
    assert len(index) == 1000
    scores, rows = index.search(queries, 10)
    expected_scores, expected_rows = brute_force(queries, documents, 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_a_corpus_of_one_and_a_depth_beyond_it():
    scores, rows = filled(np.array([[0.6, 0.8]], dtype=np.float32)).search(np.array([[1.0, 0.0], [0.0, -1.0]]), 100)
    np.testing.assert_array_equal(rows, [[0], [0]])
    np.testing.assert_allclose(scores, [[0.6], [-0.8]], atol=1e-7)


def test_no_queries():
    scores, rows = filled(np.eye(3, dtype=np.float32)).search(np.empty((0, 3), dtype=np.float32), 2)
    assert scores.shape == rows.shape == (0, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad):
    index = filled(np.zeros((5, 3), dtype=np.float32))
    embeddings = np.zeros((4, 3), dtype=np.float32)
    embeddings[2, 1] = bad
    with pytest.raises(ValueError, match="the embedding of row 7 has values that are not finite"):
        index.add(embeddings)
    with pytest.raises(ValueError, match="the embedding of row 2 has"):
        index.search(embeddings, 1)
    assert len(index) == 5


def test_misuse():
    index = FlatIndex(3)
    with pytest.raises(ValueError, match="empty index"):
        index.search(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \[N, 3\]"):
        index.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \[N, 3\]"):
        index.add(np.zeros(3))
    index.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        index.search(np.zeros((1, 3)), 0)
