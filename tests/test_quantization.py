"""quantization.py by hand, against sentence-transformers' codes, and against naive search over the codes."""

import numpy as np
import pytest
from naming import naming
from sentence_transformers.util.quantization import quantize_embeddings

from embedft.retrieval.quantization import (
    QuantizedIndex,
    bytes_per_vector,
    calibrate,
    from_binary,
    from_int8,
    to_binary,
    to_int8,
)


def random_embeddings(number, dim, seed):
    embeddings = np.random.default_rng(seed).standard_normal((number, dim)).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def first_rows(scores_QN, depth):
    """By (-score, row)."""
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :depth]


# Codes.

RANGES = np.array([[0, -1, 3], [255, 1.55, 3]], dtype=np.float32)


def test_int8_by_hand():
    """Steps 1, 0.01 and, of the empty range, 1.

    0.9: floor(0.9) = 0, 0 - 128 = -128.  255: 255 - 128 = 127.  -0.995: floor(0.005 / 0.01) = 0.  0.005: floor(100.5)
    = 100.  Beyond the range: 300 and -7 are clipped to 127 and -128.
    """
    embeddings = np.array([[0.9, -0.995, 3], [255, 0.005, 3], [300, -7, 3]], dtype=np.float32)
    codes = to_int8(embeddings, RANGES)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, [[-128, -128, -128], [127, -28, -128], [127, -128, -128]])
    back = from_int8(codes, RANGES)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, [[0.5, -0.995, 3], [255.5, 0.005, 3], [255.5, -0.995, 3]], atol=1e-5)


def test_what_is_in_range_comes_back_within_half_a_step():
    embeddings = random_embeddings(500, 37, 0)
    ranges = calibrate(embeddings)
    step = (ranges[1] - ranges[0]) / 255
    error = np.abs(from_int8(to_int8(embeddings, ranges), ranges) - embeddings) / step
    assert 0.49 < error.max() < 0.501


def test_binary_by_hand():
    """Signs + - - + - - - + then - +: bits 10010001 = 145 and 01 filled up, 01000000 = 64; 0 is not above 0."""
    embedding = np.array([[0.1, -1, 0, 2, -3, -1, -0.0, 1e-9, -5, 5]])
    codes = to_binary(embedding)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, [[145, 64]])
    np.testing.assert_array_equal(from_binary(codes, 10), [[1, -1, -1, 1, -1, -1, -1, 1, -1, 1]])


@pytest.mark.parametrize("dim", [8, 37, 384])
def test_codes_are_those_of_sentence_transformers(dim):
    embeddings, others = random_embeddings(300, dim, 1), random_embeddings(50, dim, 2) * 1.5
    embeddings[:, 3] = 0.25
    ranges = calibrate(embeddings)
    for values in (embeddings, others):
        codes = to_int8(values, ranges)
        np.testing.assert_array_equal(codes, quantize_embeddings(values, "int8", ranges=ranges))
        np.testing.assert_array_equal(codes, quantize_embeddings(values, "int8", calibration_embeddings=embeddings))
        np.testing.assert_array_equal(to_binary(values), quantize_embeddings(values, "ubinary"))


def test_calibration_by_hand_and_on_a_sample():
    embeddings = np.array([[1, 5], [-2, 5], [0, 5], [7, 5]], dtype=np.float16)
    ranges = calibrate(embeddings)
    assert ranges.dtype == np.float32
    np.testing.assert_array_equal(ranges, [[-2, 5], [7, 5]])
    many = np.arange(1000.0)[:, None]
    samples = [calibrate(many, num_documents=3) for _ in range(2)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert 0 <= samples[0][0, 0] < samples[0][1, 0] <= 999


def test_sizes():
    sizes = [[bytes_per_vector(dim, name) for name in ("float32", "int8", "binary")] for dim in (384, 10)]
    assert sizes == [[1536, 384, 48], [40, 10, 2]]


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_codes_of_a_memory_map_in_slices(precision, tmp_path):
    documents = random_embeddings(100, 20, 1)
    np.save(tmp_path / "documents.npy", documents)
    index = QuantizedIndex(np.load(tmp_path / "documents.npy", mmap_mode="r"), precision, slice_documents=33)
    ranges = calibrate(documents)
    if precision == "int8":
        expected, decoded = to_int8(documents, ranges), from_int8(to_int8(documents, ranges), ranges)
    else:
        expected, decoded = to_binary(documents), np.where(documents > 0, np.float32(1), np.float32(-1))
    np.testing.assert_array_equal(index.codes, expected)
    np.testing.assert_array_equal(index.decode(), decoded)
    np.testing.assert_array_equal(index.vectors(np.array([3, 90])), decoded[[3, 90]])


# Search.

BY_HAND = np.array([[1, 1, -1], [-1, 2, -3], [-1, -1, 1], [3, 1, 1]], dtype=np.float32)
QUERY_BY_HAND = np.array([[0.5, 0.1, -2]])


def test_hamming_search_by_hand():
    """Query signs + + -. Distances: + + - 0, - + - 1, - - + 3, + + + 1. Rows 1 and 3 tie at 1."""
    scores, rows = QuantizedIndex(BY_HAND, "binary").search_hamming(QUERY_BY_HAND, 3)
    np.testing.assert_array_equal(rows, [[0, 1, 3]])
    np.testing.assert_array_equal(scores, [[0, -1, -1]])
    assert not np.signbit(scores[0, 0])


def test_rescoring_by_hand():
    """As above, rescored by signs: 0.5 + 0.1 + 2 = 2.6, 1.6, -1.4, and last row 2 with -0.5 - 0.1 - 2."""
    scores, rows = QuantizedIndex(BY_HAND, "binary").search(QUERY_BY_HAND, 3)
    np.testing.assert_array_equal(rows, [[0, 1, 3]])
    np.testing.assert_allclose(scores, [[2.6, 1.6, -1.4]], rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 10, 150, 1000])
def test_hamming_ties_are_ordered_by_row_and_at_the_cutoff_too(depth):
    documents, queries = random_embeddings(700, 12, 3), random_embeddings(25, 12, 4)
    scores, rows = QuantizedIndex(documents, "binary").search_hamming(queries, depth)
    distances = ((queries[:, None] > 0) != (documents > 0)).sum(axis=2)
    expected = first_rows(-distances, depth)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, -np.take_along_axis(distances, expected, axis=1))
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


def test_int8_search_is_exact_over_the_codes():
    documents, queries = random_embeddings(700, 24, 5), random_embeddings(25, 24, 6)
    scores, rows = QuantizedIndex(documents, "int8", slice_documents=128).search(queries, 20)
    ranges = calibrate(documents)
    expected = queries.astype(np.float64) @ from_int8(to_int8(documents, ranges), ranges).T
    np.testing.assert_array_equal(rows, first_rows(expected, 20))
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), atol=1e-5)
    # Queries are not quantized.
    assert np.abs(scores - np.take_along_axis(queries @ documents.T, rows, axis=1)).max() < 0.01


def test_rescoring_orders_the_shortlist():
    documents, queries = random_embeddings(600, 40, 7), random_embeddings(20, 40, 8)
    index = QuantizedIndex(documents, "binary")
    scores, rows = index.search(queries, 10)
    vectors = np.where(documents > 0, 1.0, -1.0)
    shortlist = index.search_hamming(queries, 40).rows
    for query, in_list, found_scores, found_rows in zip(queries, shortlist, scores, rows, strict=True):
        expected = (vectors[in_list] @ query).astype(np.float64)
        order = np.lexsort((in_list, -expected))[:10]
        np.testing.assert_array_equal(found_rows, in_list[order])
        np.testing.assert_allclose(found_scores, expected[order], atol=1e-5)


def test_a_constant_dimension_divides_nothing_by_zero():
    documents = np.array([[0.5, 1], [0.5, 2], [0.5, 3]], dtype=np.float32)
    with np.errstate(all="raise"):
        scores, rows = QuantizedIndex(documents, "int8").search(np.array([[10.0, 1.0]]), 3)
    np.testing.assert_array_equal(rows, [[2, 1, 0]])
    np.testing.assert_allclose(scores, [[8, 7, 6]], atol=0.01)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_edges_and_misuse(precision):
    index = QuantizedIndex(np.array([[0.6, -0.8]]), precision)
    assert len(index) == 1
    np.testing.assert_array_equal(index.search(np.ones((2, 2)), 9).rows, [[0], [0]])
    assert index.search(np.empty((0, 2)), 3).rows.shape == (0, 1)
    with pytest.raises(ValueError, match=naming("depth", -1, 1)):
        index.search(np.ones((2, 2)), -1)
    with pytest.raises(ValueError, match=naming("embeddings", (2, 3), "[N, 2]")):
        index.search(np.ones((2, 3)), 1)
    documents = np.ones((3, 4), dtype=np.float32)
    for wrong in (documents[:0], documents[:, :0], documents[0]):
        with pytest.raises(ValueError, match=naming("embeddings", wrong.shape, "[N, D]", "document")):
            QuantizedIndex(wrong, precision)
    documents[1, 2] = np.inf
    with pytest.raises(ValueError, match=naming("row", 1, "finite")):
        QuantizedIndex(documents, precision)
