"""index.py against brute force. Integer embeddings make inner products exact, so ties are exact too."""

import functools

import numpy as np
import pytest
import torch
from naming import naming

from embedft.retrieval import index as index_module
from embedft.retrieval.index import (
    FlatIndex,
    first_keys,
    from_keys,
    recall_against,
    require_finite,
    search_exact,
    to_keys,
)
from embedft.retrieval.quantization import search_shortlist


def brute_force(queries, documents, depth):
    """The whole order by (-score, row), in float64."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    rows = np.lexsort((np.broadcast_to(np.arange(len(documents)), scores.shape), -scores), axis=1)[:, :depth]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.fixture(params=["faiss", "torch"], autouse=True)
def backend(request, monkeypatch):
    """Runs both product kernels on the CPU; torch's is normally for other devices."""
    if request.param == "torch":
        nearest = functools.partial(index_module._nearest_torch, device=torch.device("cpu"), block_queries=3)
        monkeypatch.setattr(index_module, "_nearest_faiss", nearest)
    return request.param


def check(queries, documents, depth, **options):
    scores, rows = search_exact(queries, documents, depth, **options)
    expected_scores, expected_rows = brute_force(queries, documents, depth)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
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


def test_queries_with_ties_are_searched_in_blocks():
    rng = np.random.default_rng(0)
    queries, documents = (rng.integers(-3, 4, size=(n, 5)).astype(np.float32) for n in (23, 300))
    nearest, widths = index_module._nearest_faiss(documents), []

    def noted(queries_QD, width):
        widths.append((len(queries_QD), width))
        return nearest(queries_QD, width)

    found = from_keys(first_keys(noted, queries, 20, 300, block_queries=2))
    assert widths[0] == (23, 21)
    assert max(number for number, width in widths if width == 42) == 2
    np.testing.assert_array_equal(found.rows, brute_force(queries, documents, 20)[1])


def test_real_valued_embeddings():
    rng = np.random.default_rng(1)
    documents, queries = (rng.standard_normal((n, 24)).astype(np.float32) for n in (1000, 50))
    index = FlatIndex(documents)
    assert len(index) == 1000
    scores, rows = index.search(queries, 10)
    expected_scores, expected_rows = brute_force(queries, documents, 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_a_corpus_of_one_and_a_depth_beyond_it():
    scores, rows = search_exact(np.array([[1.0, 0.0], [0.0, -1.0]]), np.array([[0.6, 0.8]]), 100)
    np.testing.assert_array_equal(rows, [[0], [0]])
    np.testing.assert_allclose(scores, [[0.6], [-0.8]], atol=1e-7)


# Keys.


def test_keys_order_by_score_then_row_and_give_both_back():
    """0.0 and -0.0 are one score, so row 1 comes before row 4; none (row -1) comes last."""
    scores = np.array([-0.0, 0.0, 2.5, -1.5, -np.inf, np.inf, -1.5], dtype=np.float32)
    rows = np.array([4, 1, 9, 2**32 - 2, -1, 0, 3])
    found = from_keys(np.sort(to_keys(scores, rows)))
    np.testing.assert_array_equal(found.rows, [0, 9, 1, 4, 3, 2**32 - 2, -1])
    np.testing.assert_array_equal(found.scores, [np.inf, 2.5, 0, 0, -1.5, -1.5, -np.inf])
    assert not np.signbit(found.scores[2:4]).any()


def test_keys_order_as_sorting_by_two_keys_does():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.standard_normal(500), rng.integers(-3, 4, 500) / 4, rng.standard_normal(99) * 1e-40])
    scores = scores.astype(np.float32)
    rows = rng.permutation(len(scores))
    order = np.lexsort((rows, -scores))
    found = from_keys(np.sort(to_keys(scores, rows)))
    np.testing.assert_array_equal(found.rows, rows[order])
    np.testing.assert_array_equal(found.scores, scores[order])


# Search in slices.


def test_search_exact_by_hand():
    """Query (1, 2) against (1, 0), (0, 1), (1, 1), (2, 0): scores 1, 2, 3, 2; the second and the fourth tie."""
    documents = np.array([[1, 0], [0, 1], [1, 1], [2, 0]], dtype=np.float32)
    scores, rows = search_exact(np.array([[1.0, 2.0]]), [documents[:3], documents[3:]], 3)
    np.testing.assert_array_equal(scores, [[3, 2, 2]])
    np.testing.assert_array_equal(rows, [[2, 1, 3]])


@pytest.mark.parametrize("depth", [1, 7, 100, 1500])
def test_search_exact_orders_ties_across_slices_and_blocks(depth):
    rng = np.random.default_rng(depth)
    documents = rng.integers(-2, 3, size=(1200, 5)).astype(np.float32)
    queries = rng.integers(-2, 3, size=(9, 5)).astype(np.float32)
    options = {"slice_documents": 350}
    check(queries, documents, depth, **options)
    expected = brute_force(queries, documents, depth)[1]
    for cuts in ([1, 400], [0, 3, 3, 1200]):
        parts = np.split(documents, cuts)
        np.testing.assert_array_equal(search_exact(queries, iter(parts), depth, **options).rows, expected)


def test_search_exact_of_a_memory_map_in_half_precision(tmp_path):
    rng = np.random.default_rng(2)
    documents = rng.standard_normal((500, 24)).astype(np.float16)
    np.save(tmp_path / "documents.npy", documents)
    queries = rng.standard_normal((30, 24)).astype(np.float32)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    scores, rows = search_exact(queries, mapped, 20, slice_documents=128)
    expected_scores, expected_rows = brute_force(queries, documents, 20)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_search_exact_holds_one_slice_at_a_time():
    """A slice is dropped before the one after the next is asked for."""
    alive = []

    class Slice(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive.remove(self.shape)

    def slices():
        for number in range(1, 9):
            alive.append((number, 4))
            assert len(alive) <= 2, alive
            made = Slice((number, 4), dtype=np.float32)
            made[:] = number
            yield made
            del made

    rows = search_exact(np.ones((2, 4)), slices(), 3).rows
    np.testing.assert_array_equal(rows, [[28, 29, 30]] * 2)


def test_search_exact_without_queries():
    found = search_exact(np.empty((0, 3)), np.eye(3), 2)
    assert found.scores.shape == found.rows.shape == (0, 2)


def test_search_exact_on_a_device_goes_through_torch(monkeypatch):
    asked = []

    def nearest_torch(documents, device):
        asked.append(device)
        return index_module._nearest_faiss(documents)

    monkeypatch.setattr(index_module, "_nearest_torch", nearest_torch)
    for device in (None, "cpu", torch.device("cpu"), "meta", torch.device("cuda:1")):
        search_exact(np.ones((1, 2)), np.ones((1, 2)), 1, device=device)
    assert asked == [torch.device("meta"), torch.device("cuda:1")]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_misuse_of_search_exact(bad):
    documents = np.ones((5, 3), dtype=np.float32)
    with pytest.raises(ValueError, match=naming("depth", 0, 1)):
        search_exact(documents, documents, 0)
    for none in ([], documents[:0], iter([documents[:0]])):
        with pytest.raises(ValueError, match=naming("no", "documents")):
            search_exact(documents, none, 1)
    with pytest.raises(ValueError, match=naming("embeddings", (5, 2), "[N, 3]")):
        search_exact(documents, [documents, documents[:, :2]], 1)
    with pytest.raises(ValueError, match=naming("embeddings", (3,), "[N, D]")):
        search_exact(documents[0], documents, 1)
    with pytest.raises(ValueError, match=naming("embeddings", (5, 0), "[N, D]")):
        search_exact(documents[:, :0], documents, 1)
    damaged = documents.copy()
    damaged[2, 1] = bad
    with pytest.raises(ValueError, match=naming("row", 7, "finite")):
        search_exact(documents, [documents, damaged], 1)
    with pytest.raises(ValueError, match=naming("row", 2, "finite")):
        search_exact(damaged, documents, 1)


def test_a_value_that_is_not_finite_is_named_in_a_later_slice():
    embeddings = np.zeros((5, 2))
    embeddings[3, 0] = np.inf
    with pytest.raises(ValueError, match=naming("query", "'d'", "finite")):
        require_finite(embeddings, "query", list("abcde"), slice_rows=2)


# Shortlists and recall.


def test_a_shortlist_by_hand():
    """(1, 2) against rows 3, 0, 2 of the documents above: 2, 1, 3; nothing is at -1."""
    documents = np.array([[1, 0], [0, 1], [1, 1], [2, 0]], dtype=np.float32)
    scores, rows = search_shortlist(np.array([[1.0, 2.0]]), np.array([[3, -1, 0, 2]]), documents.__getitem__, 4)
    np.testing.assert_array_equal(rows, [[2, 3, 0, -1]])
    np.testing.assert_array_equal(scores, [[3, 2, 1, -np.inf]])


def test_a_shortlist_of_all_documents_is_exact_and_ties_equal_vectors():
    rng = np.random.default_rng(3)
    documents = rng.standard_normal((40, 33)).astype(np.float32)[rng.integers(0, 40, 90)]
    queries = rng.standard_normal((400, 33)).astype(np.float32)
    shortlist = np.stack([rng.permutation(90) for _ in queries])
    read = []

    def vectors_of(rows):
        read.append(rows)
        return documents[rows]

    scores, rows = search_shortlist(queries, shortlist, vectors_of, 90)
    assert len(read) == 3  # 16,384 // 90 = 182 queries at a time
    assert all((np.diff(rows) > 0).all() for rows in read)
    np.testing.assert_array_equal(np.sort(rows, axis=1), [np.arange(90)] * 400)
    for query, found_scores, found_rows in list(zip(queries, scores, rows, strict=True))[::20]:
        np.testing.assert_allclose(found_scores, documents[found_rows] @ query, atol=1e-5)
        order = list(zip(-found_scores, found_rows, strict=True))
        assert order == sorted(order)
        for row in range(90):
            equal = found_scores[(documents[found_rows] == documents[row]).all(axis=1)]
            assert len(set(equal.tolist())) == 1


def test_recall_by_hand():
    """Of 1, 2, 3 are 3 and 1 found: 2/3. Of 4 and 5 (and no third): 5, 1/2. -1 is never found."""
    recall = recall_against(np.array([[3, 9, 1, 7], [5, -1, -1, -1]]), np.array([[1, 2, 3], [4, 5, -1]]))
    np.testing.assert_allclose(recall, [2 / 3, 1 / 2])
    assert recall_against(np.empty((0, 3), dtype=np.int64), np.empty((0, 2), dtype=np.int64)).shape == (0,)
