"""approximate.py: FAISS's indices against exact search on clustered vectors; adaptive retrieval by hand."""

import faiss
import numpy as np
import pytest
from naming import naming

from embedft.retrieval.approximate import FaissIndex, check_index, split_name
from embedft.retrieval.index import recall_against, search_exact
from embedft.retrieval.quantization import AdaptiveIndex
from embedft.vectors import unit_rows

DIM = 16


def clustered(number, seed, *, dim=DIM, clusters=60):
    """Unit vectors around centers that do not depend on the seed."""
    centers = np.random.default_rng(99).standard_normal((clusters, dim))
    rng = np.random.default_rng(seed)
    return unit_rows(centers[rng.integers(0, clusters, number)] + 0.5 * rng.standard_normal((number, dim))).astype("f4")


DOCUMENTS, QUERIES = clustered(3000, 0), clustered(400, 1)
EXACT = search_exact(QUERIES, DOCUMENTS, 10).rows


def mean_recall(index):
    return recall_against(index.search(QUERIES, 10).rows, EXACT).mean()


# Names.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hnsw", ("hnsw", "")),
        ("hnsw,efSearch=128", ("hnsw", "efSearch=128")),
        ("IVF16(HNSW8),Flat,nprobe=4,quantizer_efSearch=20", ("IVF16(HNSW8),Flat", "nprobe=4,quantizer_efSearch=20")),
    ],
)
def test_search_parameters_are_the_parts_with_an_equals_sign(name, expected):
    assert split_name(name) == expected
    FaissIndex(DOCUMENTS[:100], name)


def test_search_parameters_reach_faiss():
    for name, parameters, nprobe in (("ivf", "nprobe=16", 16), ("ivf,nprobe=5", "nprobe=5", 5)):
        index = FaissIndex(DOCUMENTS, name)
        assert (index.factory, index.parameters) == ("IVF76,Flat", parameters)
        assert faiss.extract_index_ivf(index._index).nprobe == nprobe
    graph = FaissIndex(DOCUMENTS[:100], "hnsw,efSearch=99")._index.hnsw
    assert (graph.efSearch, graph.efConstruction) == (99, 200)
    assert FaissIndex(DOCUMENTS[:100], "hnsw")._index.hnsw.efSearch == 64


def test_lists_follow_the_number_of_documents():
    """4 sqrt(3,000) is 219; 3,000 / 39 documents train 76. Below 78 documents there is one list."""

    def factory(name, number, dim):
        return FaissIndex(clustered(number, 0, dim=dim, clusters=2), name).factory

    assert FaissIndex(DOCUMENTS, "ivf").factory == "IVF76,Flat"
    assert factory("ivf", 77, DIM) == "IVF1,Flat"
    assert factory("ivfpq", 300, 24) == "IVF7,PQ3x8np"
    assert factory("ivfpq", 300, 50) == "IVF7,PQ5x8np"  # parts of equal width
    assert factory("ivfpq", 300, 5) == "IVF7,PQ1x8np"
    assert factory("hnsw", 5, 5) == "HNSW32,Flat"
    assert factory("ivf", 30_000, 2) == "IVF693,Flat"  # 4 sqrt(30,000)


# Search.


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("hnsw", 0.98), ("ivf", 0.95), ("ivf,nprobe=76", 1.0), ("ivfpq", 0.1), ("IVF16,Flat,nprobe=8", 0.9)),
        *(("PCA8,IVF16,PQ4x4np,nprobe=8", 0.2), ("IVF16,PQ4x4np,RFlat", 0.3), ("HNSW8,Flat", 0.7), ("PCA8,Flat", 0.2)),
    ],
)
def test_presets_and_factory_strings_find_their_share(name, least):
    assert mean_recall(FaissIndex(DOCUMENTS, name)) >= least


def test_scores_are_inner_products_in_order():
    for name in ("hnsw", "ivf", "IVF16,SQ8"):
        scores, rows = FaissIndex(DOCUMENTS, name).search(QUERIES, 10)
        assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
        assert (np.diff(scores, axis=1) <= 0).all()
        expected = np.einsum("qd,qkd->qk", QUERIES, DOCUMENTS[rows])
        np.testing.assert_allclose(scores, expected, atol=0.02 if "SQ8" in name else 1e-5)


def test_equal_documents_are_ordered_by_row():
    documents = np.repeat(DOCUMENTS[:50], 6, axis=0)
    for name in ("ivf", "hnsw"):
        rows = FaissIndex(documents, name).search(DOCUMENTS[:50], 6).rows
        np.testing.assert_array_equal(rows, np.arange(300).reshape(50, 6))


def test_missing_results_and_a_depth_beyond_the_corpus():
    scores, rows = FaissIndex(DOCUMENTS, "ivf,nprobe=1").search(QUERIES, 5000)
    assert rows.shape == (400, 3000)
    missing = rows == -1
    assert missing[:, -1].all()
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    np.testing.assert_array_equal(scores == -np.inf, missing)
    all_rows = FaissIndex(DOCUMENTS, "ivf,nprobe=76").search(QUERIES[:3], 5000).rows
    np.testing.assert_array_equal(np.sort(all_rows, axis=1), [np.arange(3000)] * 3)
    one = FaissIndex(DOCUMENTS[:1], "hnsw")
    np.testing.assert_array_equal(one.search(QUERIES[:2], 3).rows, [[0], [0]])
    assert one.search(QUERIES[:0], 3).rows.shape == (0, 1)


def test_a_memory_map_gives_the_same_index(tmp_path):
    np.save(tmp_path / "documents.npy", DOCUMENTS)
    expected = FaissIndex(DOCUMENTS, "ivf", seed=4).search(QUERIES, 10)
    found = FaissIndex(np.load(tmp_path / "documents.npy", mmap_mode="r"), "ivf", seed=4).search(QUERIES, 10)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_seed_decides():
    indices = [FaissIndex(DOCUMENTS, "ivf", seed=seed) for seed in (0, 0, 1)]
    centroids = [index._index.quantizer.reconstruct_n(0, 76) for index in indices]
    np.testing.assert_array_equal(centroids[0], centroids[1])
    assert not np.array_equal(centroids[0], centroids[2])


def test_size_is_that_of_the_file(tmp_path):
    for name, least in (("hnsw", 4 * DIM + 256), ("ivf", 4 * DIM + 8), ("IVF16,PQ4x4np", 2 + 8)):
        index = FaissIndex(DOCUMENTS, name)
        faiss.write_index(index._index, str(tmp_path / "index"))
        assert index.bytes_per_vector == (tmp_path / "index").stat().st_size / 3000
        assert least <= index.bytes_per_vector < least + 30


# Misuse.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("annoy", "parse"),
        ("hnws", "parse"),
        ("PQ5", "multiple"),
        ("HNSW8_PQ4", "product"),  # distances: the smallest would have to come first
        ("hnsw,nprobe=3", "set_index_parameter"),
        ("ivf,efSearch=3", "set_index_parameter"),
        ("ivf,nprobe=many", "interpret"),
    ],
)
def test_a_name_is_refused_before_there_are_vectors(name, reason):
    with pytest.raises(ValueError, match=naming("index", f"'{name}'", DIM, "flat", "hnsw", "ivf", "ivfpq", reason)):
        check_index(name, DIM)


@pytest.mark.parametrize(
    ("name", "reason"), [("PQ4x12", 4096), ("IVF0,Flat", "cur_nprobe"), ("IVF4,Flat,nprobe=0", "cur_nprobe")]
)
def test_a_name_is_refused_when_faiss_trains_or_searches(name, reason):
    with pytest.raises(ValueError, match=naming("index", f"'{name}'", DIM, "flat", "ivfpq", reason)) as caught:
        FaissIndex(DOCUMENTS[:300], name).search(QUERIES, 1)
    assert ".cpp" not in str(caught.value)


def test_known_names_are_accepted_before_there_are_vectors():
    for name in ("hnsw", "ivf", "SQ8", "IVF9,PQ4", "ivf,nprobe=3"):
        check_index(name, DIM, num_documents=300)
    check_index("hnsw", DIM, num_documents=1)


def test_embeddings_that_cannot_be_indexed():
    for wrong in (DOCUMENTS[:0], DOCUMENTS[:, :0], DOCUMENTS[0]):
        with pytest.raises(ValueError, match=naming("embeddings", wrong.shape, "[N, D]", "document")):
            FaissIndex(wrong, "hnsw")
    damaged = DOCUMENTS.copy()
    damaged[2999, 0] = np.nan
    for name in ("hnsw", "ivf"):
        with pytest.raises(ValueError, match=naming("row", 2999, "finite")):
            FaissIndex(damaged, name)


@pytest.mark.parametrize(("name", "needed", "number"), [("ivfpq", 256, 255), ("IVF40,Flat", 40, 39), ("PQ4", 256, 100)])
def test_too_few_documents_to_train_on(name, needed, number):
    for call in (
        lambda: FaissIndex(DOCUMENTS[:number], name),
        lambda: check_index(name, DIM, num_documents=number),
    ):
        with pytest.raises(ValueError, match=naming("index", f"'{name}'", needed, "documents", number)):
            call()
    check_index(name, DIM, num_documents=needed)
    check_index(name, DIM)


@pytest.mark.parametrize("index", [FaissIndex(DOCUMENTS, "ivf"), AdaptiveIndex(DOCUMENTS, 4)])
def test_misuse_of_searching(index):
    with pytest.raises(ValueError, match=naming("depth", 0, 1)):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match=naming("embeddings", (400, 3), "[N, 16]")):
        index.search(QUERIES[:, :3], 1)
    with pytest.raises(ValueError, match=naming("row", 0, "finite")):
        index.search(QUERIES * np.inf, 1)


# Adaptive retrieval.


def test_adaptive_retrieval_by_hand_misses_what_short_vectors_miss():
    """Query (0.6, 0, 0.8). In full: 0.36, 0.796, 0.96, 0.936.

    On two dimensions, at unit length, the query is (1, 0) and the documents are (0.6, 0.8), (0, 1), (1, 0), (1, 0):
    0.6, 0, 1, 1. A shortlist of two is rows 2 and 3. On the first two dimensions of (0, 0.6, 0.8) all but row 1 lie
    behind: (0, 1) has 0.8, 1, 0, 0, so a shortlist of two is 1 and 0, though in full (0.48, 0.856, 0.48, 0.768) row 3
    is second.
    """
    documents = np.array([[0.6, 0.8, 0], [0, 0.1, 0.995], [0.8, 0, 0.6], [0.28, 0, 0.96]], dtype=np.float32)
    queries = np.array([[0.6, 0, 0.8], [0, 0.6, 0.8]])
    scores, rows = AdaptiveIndex(documents, 2, shortlist_factor=1).search(queries, 2)
    np.testing.assert_array_equal(rows, [[2, 3], [1, 0]])
    np.testing.assert_allclose(scores, [[0.96, 0.936], [0.856, 0.48]], rtol=1e-6)
    np.testing.assert_array_equal(search_exact(queries[1:], documents, 2).rows, [[1, 3]])


@pytest.mark.parametrize(("short_dim", "factor", "depth"), [(4, 4, 10), (15, 1, 10), (1, 2, 3), (8, 500, 10)])
def test_adaptive_retrieval_equals_a_naive_one(short_dim, factor, depth, tmp_path):
    documents = DOCUMENTS[:300] * 2
    np.save(tmp_path / "documents.npy", documents)
    index = AdaptiveIndex(np.load(tmp_path / "documents.npy", mmap_mode="r"), short_dim, shortlist_factor=factor)
    assert len(index) == 300
    scores, rows = index.search(QUERIES[:20], depth)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    short = unit_rows(documents[:, :short_dim].astype(np.float64))
    for query, found_scores, found_rows in zip(QUERIES[:20].astype(np.float64), scores, rows, strict=True):
        shortlist = np.lexsort((np.arange(300), -(short @ query[:short_dim]).round(6)))[: factor * depth]
        full = documents.astype(np.float64) @ query
        expected = sorted(shortlist.tolist(), key=lambda row: (-full[row], row))[:depth]
        if short_dim > 1:  # one dimension is a sign: many tie, and the float64 shortlist above is not ours
            np.testing.assert_array_equal(found_rows, expected)
        np.testing.assert_allclose(found_scores, full[found_rows], atol=1e-5)


def test_a_shortlist_of_all_documents_is_exact_at_any_depth():
    for depth in (1, 40, 500):
        index = AdaptiveIndex(DOCUMENTS[:120], 2, shortlist_factor=120)
        expected = search_exact(QUERIES[:9], DOCUMENTS[:120], depth).rows
        np.testing.assert_array_equal(index.search(QUERIES[:9], depth).rows, expected)


def test_misuse_of_adaptive_retrieval():
    with pytest.raises(ValueError, match=naming("embeddings", (16,), "[N, D]")):
        AdaptiveIndex(DOCUMENTS[0], 1)
