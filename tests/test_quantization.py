"""quantization.py by hand, against sentence-transformers' codes, and against naive search over the codes."""

import json

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from embedft.retrieval import index as index_module
from embedft.retrieval import quantization
from embedft.retrieval.index import search_exact
from embedft.retrieval.quantization import (
    QuantizedIndex,
    bytes_per_document,
    calibrate,
    from_binary,
    from_int8,
    load_quantized,
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


def test_calibration_by_hand_in_slices_and_on_a_sample(monkeypatch):
    embeddings = np.array([[1, 5], [-2, 5], [0, 5], [7, 5]], dtype=np.float16)
    monkeypatch.setattr(index_module, "DOCUMENT_SLICE", 2)
    ranges = calibrate(embeddings)
    assert ranges.dtype == np.float32
    np.testing.assert_array_equal(ranges, [[-2, 5], [7, 5]])
    monkeypatch.setattr(quantization, "CALIBRATION_DOCUMENTS", 3)
    many = np.arange(1000.0)[:, None]
    samples = [calibrate(many, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).all()
    assert 0 <= samples[0][0, 0] < samples[0][1, 0] <= 999


def test_sizes():
    sizes = [[bytes_per_document(dim, name) for name in ("float32", "int8", "binary")] for dim in (384, 10)]
    assert sizes == [[1536, 384, 48], [40, 10, 2]]
    with pytest.raises(ValueError, match="precision is 'int4', expected one of float32, int8, binary"):
        bytes_per_document(384, "int4")


# Search.


def test_hamming_search_by_hand():
    """Query signs + + -. Distances: + + - 0, - + - 1, - - + 3, + + + 1. Rows 1 and 3 tie at 1."""
    documents = np.array([[1, 1, -1], [-1, 2, -3], [-1, -1, 1], [3, 1, 1]], dtype=np.float32)
    scores, rows = QuantizedIndex(documents, "binary").search(np.array([[0.5, 0.1, -2]]), 3)
    np.testing.assert_array_equal(rows, [[0, 1, 3]])
    np.testing.assert_array_equal(scores, [[0, -1, -1]])
    assert not np.signbit(scores[0, 0])


def test_rescoring_by_hand():
    """As above, with a shortlist of 3 rescored: by signs 0.5 + 0.1 + 2 = 2.6, 1.6 and -1.4; by vectors 2.6, 5.7, -0.4.

    Row 2, at distance 3, would have -0.5 - 0.1 - 2: it is not in the shortlist, and not missed.
    """
    documents = np.array([[1, 1, -1], [-1, 2, -3], [-1, -1, 1], [3, 1, 1]], dtype=np.float32)
    query = np.array([[0.5, 0.1, -2]])
    for rescore, expected_scores, expected_rows in (
        ("binary", [2.6, 1.6, -1.4], [0, 1, 3]),
        ("float32", [5.7, 2.6, -0.4], [1, 0, 3]),
    ):
        scores, rows = QuantizedIndex(documents, "binary", rescore=rescore, rescore_factor=1).search(query, 3)
        np.testing.assert_array_equal(rows, [expected_rows])
        np.testing.assert_allclose(scores, [expected_scores], rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 10, 150, 1000])
def test_hamming_ties_are_ordered_by_row_and_at_the_cutoff_too(depth, monkeypatch):
    documents, queries = random_embeddings(700, 12, 3), random_embeddings(25, 12, 4)
    monkeypatch.setattr(quantization, "QUERY_BLOCK", 8)
    scores, rows = QuantizedIndex(documents, "binary").search(queries, depth)
    distances = ((queries[:, None] > 0) != (documents > 0)).sum(axis=2)
    expected = first_rows(-distances, depth)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, -np.take_along_axis(distances, expected, axis=1))
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


def test_int8_search_is_exact_over_the_codes(monkeypatch):
    documents, queries = random_embeddings(700, 24, 5), random_embeddings(25, 24, 6)
    monkeypatch.setattr(quantization, "DOCUMENT_SLICE", 128)
    index = QuantizedIndex(documents, "int8")
    scores, rows = index.search(queries, 20)
    expected = queries.astype(np.float64) @ from_int8(to_int8(documents, calibrate(documents)), index.ranges).T
    np.testing.assert_array_equal(rows, first_rows(expected, 20))
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), atol=1e-5)
    # Not by way of the codes of the query.
    assert np.abs(scores - np.take_along_axis(queries @ documents.T, rows, axis=1)).max() < 0.01


@pytest.mark.parametrize(
    ("precision", "rescore"), [("int8", "float32"), ("binary", "binary"), ("binary", "int8"), ("binary", "float32")]
)
def test_rescoring_orders_the_shortlist(precision, rescore):
    documents, queries = random_embeddings(600, 40, 7), random_embeddings(20, 40, 8)
    index = QuantizedIndex(documents, precision, rescore=rescore, rescore_factor=3)
    scores, rows = index.search(queries, 10)
    shortlist = QuantizedIndex(documents, precision).search(queries, 30).rows
    ranges = calibrate(documents)
    vectors = {
        "float32": documents,
        "int8": from_int8(to_int8(documents, ranges), ranges),
        "binary": np.where(documents > 0, 1.0, -1.0),
    }[rescore]
    for query, in_list, found_scores, found_rows in zip(queries, shortlist, scores, rows, strict=True):
        expected = (vectors[in_list] @ query).astype(np.float64)
        order = np.lexsort((in_list, -expected))[:10]
        np.testing.assert_array_equal(found_rows, in_list[order])
        np.testing.assert_allclose(found_scores, expected[order], atol=1e-5)


def test_rescoring_finds_more_and_all_of_it_when_the_shortlist_is_the_corpus():
    documents = random_embeddings(2000, 64, 9)
    queries = documents[:100] + random_embeddings(100, 64, 10)
    exact = search_exact(queries, documents, 10).rows
    found = {
        rescore: QuantizedIndex(documents, "binary", rescore=rescore).search(queries, 10).rows
        for rescore in (None, "binary", "float32")
    }
    shares = [np.mean([np.isin(a, b).mean() for a, b in zip(exact, rows, strict=True)]) for rows in found.values()]
    assert shares[0] < shares[1] < shares[2]
    everything = QuantizedIndex(documents, "binary", rescore="float32", rescore_factor=200)
    np.testing.assert_array_equal(everything.search(queries, 10).rows, exact)


def test_a_constant_dimension_divides_nothing_by_zero():
    documents = np.array([[0.5, 1], [0.5, 2], [0.5, 3]], dtype=np.float32)
    with np.errstate(all="raise"):
        index = QuantizedIndex(documents, "int8")
        scores, rows = index.search(np.array([[10.0, 1.0]]), 3)
    np.testing.assert_array_equal(rows, [[2, 1, 0]])
    np.testing.assert_allclose(scores, [[8, 7, 6]], atol=0.01)


def test_one_document_no_queries_and_a_depth_beyond_the_corpus():
    for precision, rescores in quantization.RESCORES.items():
        for rescore in rescores:
            index = QuantizedIndex(np.array([[0.6, -0.8]]), precision, rescore=rescore)
            np.testing.assert_array_equal(index.search(np.ones((2, 2)), 9).rows, [[0], [0]])
            assert index.search(np.empty((0, 2)), 3).rows.shape == (0, 1)


def test_bytes_of_an_index_count_what_rescores():
    documents = random_embeddings(4, 384, 0)
    sizes = {
        (precision, rescore): QuantizedIndex(documents, precision, rescore=rescore).bytes_per_document
        for precision, rescores in quantization.RESCORES.items()
        for rescore in rescores
    }
    assert sizes == {
        ("int8", None): 384,
        ("int8", "float32"): 384 + 1536,
        ("binary", None): 48,
        ("binary", "binary"): 48,
        ("binary", "int8"): 48 + 384,
        ("binary", "float32"): 48 + 1536,
    }


def test_a_memory_map_in_slices_and_given_ranges(tmp_path, monkeypatch):
    documents = random_embeddings(100, 16, 1)
    np.save(tmp_path / "documents.npy", documents)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    monkeypatch.setattr(index_module, "DOCUMENT_SLICE", 33)
    ranges = np.array([[-0.5] * 16, [0.5] * 16])
    index = QuantizedIndex(mapped, "binary", rescore="int8", ranges=ranges)
    np.testing.assert_array_equal(index._codes["int8"], to_int8(documents, ranges.astype(np.float32)))
    np.testing.assert_array_equal(index._codes["binary"], to_binary(documents))
    np.testing.assert_array_equal(index.ranges, ranges)
    assert QuantizedIndex(mapped, "int8", rescore="float32")._embeddings_ND is mapped


# Files.


@pytest.mark.parametrize(
    ("precision", "rescore"), [(p, r) for p, all_r in quantization.RESCORES.items() for r in all_r]
)
def test_saved_and_loaded(tmp_path, precision, rescore):
    documents, queries = random_embeddings(200, 20, 2), random_embeddings(7, 20, 3)
    index = QuantizedIndex(documents, precision, rescore=rescore, rescore_factor=2)
    index.save(tmp_path / "index")
    given = documents if rescore == "float32" else None
    loaded = load_quantized(tmp_path / "index", embeddings_ND=given, dim=20)
    assert len(loaded) == 200
    assert loaded.bytes_per_document == index.bytes_per_document
    assert (loaded.ranges is None) == ("int8" not in (precision, rescore))
    for ours, theirs in zip(index.search(queries, 9), loaded.search(queries, 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_loaded(tmp_path):
    documents = random_embeddings(50, 20, 2)
    QuantizedIndex(documents, "int8", rescore="float32").save(tmp_path)
    with pytest.raises(ValueError, match=r"needs the embeddings, \(50, 20\), found none"):
        load_quantized(tmp_path)
    with pytest.raises(ValueError, match=r"needs the embeddings, \(50, 20\), found shape \(49, 20\)"):
        load_quantized(tmp_path, embeddings_ND=documents[1:])
    with pytest.raises(ValueError, match="an index of dim 20, expected 384"):
        load_quantized(tmp_path, embeddings_ND=documents, dim=384)
    codes = tmp_path / json.loads((tmp_path / "index.json").read_text())["files"]["int8"]["name"]
    whole = codes.read_bytes()
    codes.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"bytes, expected .*: it is cut short"):
        load_quantized(tmp_path, embeddings_ND=documents)
    codes.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"its SHA-256 is not that in index.json"):
        load_quantized(tmp_path, embeddings_ND=documents)


def test_misuse():
    documents = np.ones((3, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="precision is 'float16', expected one of int8, binary"):
        QuantizedIndex(documents, "float16")
    with pytest.raises(ValueError, match=r"rescore is 'int8', expected one of \(None, 'float32'\) with 'int8'"):
        QuantizedIndex(documents, "int8", rescore="int8")
    with pytest.raises(ValueError, match="rescore_factor must be at least 1, not 0"):
        QuantizedIndex(documents, "binary", rescore_factor=0)
    for make in (calibrate, lambda embeddings: QuantizedIndex(embeddings, "binary")):
        for wrong in (documents[:0], documents[:, :0], documents[0]):
            with pytest.raises(ValueError, match=r"embeddings of shape \(.*\), expected \[N, D\]"):
                make(wrong)
        damaged = documents.copy()
        damaged[1, 2] = np.inf
        with pytest.raises(ValueError, match="the embedding of row 1 has"):
            make(damaged)
    for ranges in (np.zeros((2, 3)), np.ones((2, 4)) * [[1], [0]], np.full((2, 4), np.nan)):
        with pytest.raises(ValueError, match=r"ranges of shape .*, expected \[2, 4\]"):
            QuantizedIndex(documents, "int8", ranges=ranges)
    index = QuantizedIndex(documents, "int8")
    with pytest.raises(ValueError, match="depth must be at least 1, not -1"):
        index.search(documents, -1)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \[N, 4\]"):
        index.search(documents[:, :2], 1)
