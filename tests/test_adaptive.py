"""adaptive.py: a search worked out by hand, and stages against a naive reimplementation."""

import numpy as np
import pytest

from embedft.retrieval.adaptive import AdaptiveIndex
from embedft.retrieval.index import FlatIndex, search_exact


def random_embeddings(number, dim, seed):
    embeddings = np.random.default_rng(seed).standard_normal((number, dim)).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


DOCUMENTS = np.array([[0.6, 0.8, 0.0], [0.0, 0.1, 0.995], [0.8, 0.0, 0.6], [0.28, 0.0, 0.96]], dtype=np.float32)


def test_by_hand_a_shortlist_that_misses_the_best():
    """Query (0.6, 0, 0.8). In full: 0.36, 0.796, 0.96, 0.936.

    On two features, at unit length, the query is (1, 0) and the documents are (0.6, 0.8), (0, 1), (1, 0), (1, 0): 0.6,
    0, 1, 1. A shortlist of two is rows 2 and 3. On the first two features of (0, 0.6, 0.8) all but row 1 lie behind:
    (0, 1) has 0.8, 1, 0, 0, so a shortlist of two is 1 and 0, though in full 0.48, 0.856, 0.48, 0.768 row 3 is second.
    """
    index = AdaptiveIndex(DOCUMENTS, 2, 2)
    scores, rows = index.search(np.array([[0.6, 0, 0.8], [0, 0.6, 0.8]]), 2)
    np.testing.assert_array_equal(rows, [[2, 3], [1, 0]])
    np.testing.assert_allclose(scores, [[0.96, 0.936], [0.856, 0.48]], rtol=1e-6)
    exact = search_exact(np.array([[0, 0.6, 0.8]]), DOCUMENTS, 2).rows
    np.testing.assert_array_equal(exact, [[1, 3]])


def naive(query, documents, dims, shortlists, depth):
    rows = np.arange(len(documents))
    for dim, keep in [*zip(dims, shortlists, strict=True), (documents.shape[1], depth)]:
        vectors, short = documents[rows, :dim].astype(np.float64), query[:dim].astype(np.float64)
        if dim < documents.shape[1]:
            vectors, short = vectors / np.linalg.norm(vectors, axis=1)[:, None], short / np.linalg.norm(short)
        scores = vectors @ short
        order = np.lexsort((rows, -scores))[:keep]
        rows, scores = rows[order], scores[order]
    return scores, rows


@pytest.mark.parametrize(
    ("dims", "shortlists"), [(8, 40), ((4, 8, 16), (100, 50, 25)), ((4, 8), (20, 20)), (31, 10), (8, 999)]
)
def test_stages_equal_a_naive_funnel(dims, shortlists, tmp_path):
    documents, queries = random_embeddings(300, 32, 0) * 2, random_embeddings(20, 32, 1)
    np.save(tmp_path / "documents.npy", documents)
    index = AdaptiveIndex(np.load(tmp_path / "documents.npy", mmap_mode="r"), dims, shortlists)
    scores, rows = index.search(queries, 10)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    for query, found_scores, found_rows in zip(queries, scores, rows, strict=True):
        stages = (np.atleast_1d(dims), np.atleast_1d(shortlists))
        expected_scores, expected_rows = naive(query, documents, *stages, 10)
        np.testing.assert_array_equal(found_rows, expected_rows)
        np.testing.assert_allclose(found_scores, expected_scores, atol=1e-5)


def test_a_shortlist_of_the_corpus_is_exact_at_any_depth():
    documents, queries = random_embeddings(120, 16, 2), random_embeddings(9, 16, 3)
    flat = FlatIndex(16)
    flat.add(documents)
    for depth in (1, 120, 500):
        rows = AdaptiveIndex(documents, 2, 120).search(queries, depth).rows
        np.testing.assert_array_equal(rows, flat.search(queries, depth).rows)


def test_an_approximate_first_stage():
    documents = random_embeddings(600, 16, 4)
    index = AdaptiveIndex(documents, 8, 50, preset="ivf", seed=3)
    assert index._index.preset == "ivf"
    np.testing.assert_array_equal(index.search(documents[:40], 1).rows[:, 0], np.arange(40))


def test_size():
    index = AdaptiveIndex(random_embeddings(1000, 32, 5), 8, 10)
    assert len(index) == 1000
    assert index.bytes_per_document == pytest.approx(4 * 8 + 4 * 32, abs=1)


@pytest.mark.parametrize("dims", [0, 3, (1, 1), (2, 1), ()])
def test_dims_that_do_not_rise_below_all(dims):
    with pytest.raises(ValueError, match="expected to rise from at least 1 to below D = 3"):
        AdaptiveIndex(DOCUMENTS, dims, 2)


@pytest.mark.parametrize("shortlists", [0, (2,), (1, 2), (2, 0), (3, 2, 1)])
def test_shortlists_that_rise_or_are_of_another_number(shortlists):
    with pytest.raises(ValueError, match=r"shortlists \(.*\), expected one of at least 1 for each of 2 dims"):
        AdaptiveIndex(DOCUMENTS, (1, 2), shortlists)


def test_misuse():
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \[N, D\]"):
        AdaptiveIndex(DOCUMENTS[0], 1, 1)
    with pytest.raises(ValueError, match=r"shape \(0, 2\), expected \[N, D\] with documents"):
        AdaptiveIndex(DOCUMENTS[:0], 2, 1)
    index = AdaptiveIndex(DOCUMENTS, 2, 2)
    with pytest.raises(ValueError, match="depth 3 is above the last shortlist, 2"):
        index.search(DOCUMENTS, 3)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        index.search(DOCUMENTS, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 2\), expected \[N, 3\]"):
        index.search(DOCUMENTS[:, :2], 1)
