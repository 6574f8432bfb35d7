"""approximate.py: presets against exact search, on clustered vectors; what is tuned, kept, and refused."""

import json

import faiss
import numpy as np
import pytest

from embedft.retrieval import approximate
from embedft.retrieval import index as index_module
from embedft.retrieval.approximate import build_index, check_index, load_index, unit_rows
from embedft.retrieval.index import FlatIndex, recall_against, search_exact
from embedft.retrieval.index_files import opened

DIM = 16


def clustered(number, seed, *, dim=DIM, clusters=60):
    """Unit vectors around the same centres whatever the seed."""
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    rng = np.random.default_rng(seed)
    return unit_rows(centres[rng.integers(0, clusters, number)] + 0.5 * rng.standard_normal((number, dim))).astype("f4")


DOCUMENTS, QUERIES = clustered(3000, 0), clustered(400, 1)
EXACT = search_exact(QUERIES, DOCUMENTS, 10).rows


def mean_recall(index):
    return recall_against(index.search(QUERIES, 10).rows, EXACT).mean()


def test_unit_rows_by_hand():
    with np.errstate(all="raise"):
        np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


# Presets.


@pytest.mark.parametrize("depth", [1, 20, 150, 5000])
def test_flat_is_the_flat_index_ties_included(depth):
    rng = np.random.default_rng(depth)
    documents, queries = (rng.integers(-2, 3, size=(n, 5)).astype(np.float32) for n in (900, 20))
    flat = FlatIndex(5)
    flat.add(documents)
    for ours, theirs in zip(build_index(documents).search(queries, depth), flat.search(queries, depth), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("preset", ["hnsw", "ivf"])
@pytest.mark.parametrize("target", [0.7, 0.95])
def test_the_target_is_reached_on_other_queries_with_no_more_than_needed(preset, target):
    index = build_index(DOCUMENTS, preset, queries=clustered(1000, 2), target_recall=target)
    assert index.recall >= target
    assert mean_recall(index) >= target
    assert mean_recall(index) == pytest.approx(index.recall, abs=0.03)
    if index.effort > (1 if preset == "ivf" else 10):
        reached = index.effort
        index.effort = reached // 2
        assert mean_recall(index) < target + 0.02


def test_without_queries_documents_are_the_queries_and_do_not_count_as_found():
    """With one list probed every document finds itself; its neighbours in the next list it does not."""
    index = build_index(DOCUMENTS, "ivf", target_recall=0.3)
    first = index.recall
    exact = search_exact(DOCUMENTS, DOCUMENTS, 11).rows
    found = index.search(DOCUMENTS, 11).rows
    others = [
        len(set(a) & set(b) - {row}) / len(set(b) - {row}) for row, (a, b) in enumerate(zip(found, exact, strict=True))
    ]
    assert first == pytest.approx(np.mean(others), abs=0.01)
    with_themselves = recall_against(found, exact).mean()
    assert with_themselves == pytest.approx((10 * np.mean(others) + 1) / 11)
    assert first < with_themselves


def test_scores_are_inner_products_in_order():
    for preset in ("hnsw", "ivf", "IVF16,SQ8"):
        scores, rows = build_index(DOCUMENTS, preset).search(QUERIES, 10)
        assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
        assert (np.diff(scores, axis=1) <= 0).all()
        expected = np.einsum("qd,qkd->qk", QUERIES, DOCUMENTS[rows])
        np.testing.assert_allclose(scores, expected, atol=0.02 if "SQ8" in preset else 1e-5)


def test_equal_documents_are_ordered_by_row():
    documents = np.repeat(DOCUMENTS[:50], 6, axis=0)
    for preset in ("ivf", "hnsw"):
        rows = build_index(documents, preset, effort=7).search(DOCUMENTS[:50], 6).rows
        np.testing.assert_array_equal(rows, np.arange(300).reshape(50, 6))


def test_lists_follow_the_number_of_documents():
    """4 sqrt(3,000) is 219; 3,000 / 39 documents train 76. One list stands for fewer than 78."""
    assert build_index(DOCUMENTS, "ivf").factory == "IVF76,Flat"
    assert build_index(DOCUMENTS[:77], "ivf").factory == "IVF1,Flat"
    assert approximate._factory("ivf", 1_000_000, 384) == "IVF4000,Flat"
    assert approximate._factory("ivfpq", 1_000_000, 384) == "IVF4000,PQ48x8np"
    assert approximate._factory("ivfpq", 1_000_000, 100) == "IVF4000,PQ10x8np"
    assert approximate._factory("ivfpq", 1_000_000, 5) == "IVF4000,PQ1x8np"
    assert approximate._factory("hnsw", 5, 5) == "HNSW32,Flat"


def test_product_quantisation_stops_where_more_probing_adds_nothing():
    index = build_index(DOCUMENTS, "ivfpq", queries=QUERIES)
    assert index.factory == "IVF76,PQ2x8np"
    assert 0.05 < index.recall < 0.95
    assert index.effort < 76
    assert mean_recall(index) == pytest.approx(index.recall)
    index.effort = 76
    assert mean_recall(index) == pytest.approx(index.recall, abs=0.02)


@pytest.mark.parametrize(
    "factory", ["IVF16,Flat", "PCA8,IVF16,PQ4x4np", "IVF16,PQ4x4np,RFlat", "HNSW8,Flat", "PCA8,Flat"]
)
def test_any_factory_string(factory):
    index = build_index(DOCUMENTS, factory, queries=QUERIES)
    assert index.factory == index.preset == factory
    assert (index.effort is None) == (factory == "PCA8,Flat") == (index.recall is None)
    assert mean_recall(index) > 0.2
    if index.effort is not None:
        index.effort = 3
        assert index.effort == 3


def test_an_effort_that_is_given_is_not_tuned():
    index = build_index(DOCUMENTS, "ivf", effort=5)
    assert (index.effort, index.recall) == (5, None)
    assert faiss.extract_index_ivf(index._index).nprobe == 5


# Documents.


def test_a_memory_map_in_slices_gives_the_same_index(tmp_path, monkeypatch):
    np.save(tmp_path / "documents.npy", DOCUMENTS)
    expected = build_index(DOCUMENTS, "ivf", seed=4).search(QUERIES, 10)
    monkeypatch.setattr(index_module, "DOCUMENT_SLICE", 700)
    monkeypatch.setattr(approximate, "QUERY_BLOCK", 90)
    found = build_index(np.load(tmp_path / "documents.npy", mmap_mode="r"), "ivf", seed=4).search(QUERIES, 10)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_seed_decides():
    indices = [build_index(DOCUMENTS, "ivf", seed=seed, effort=1) for seed in (0, 0, 1)]
    centroids = [index._index.quantizer.reconstruct_n(0, 76) for index in indices]
    np.testing.assert_array_equal(centroids[0], centroids[1])
    assert not np.array_equal(centroids[0], centroids[2])


def test_cosine_is_dot_of_unit_rows():
    lengths = np.random.default_rng(5).uniform(0.1, 10, (3000, 1)).astype(np.float32)
    for preset in ("flat", "ivf"):
        index = build_index(DOCUMENTS * lengths, preset, metric="cosine", queries=QUERIES * 3)
        assert mean_recall(index) > 0.94
        scores, rows = index.search(QUERIES * 7, 10)
        np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", QUERIES, DOCUMENTS[rows]), atol=1e-5)
    assert mean_recall(build_index(DOCUMENTS * lengths)) < 0.5


def test_missing_results_and_a_depth_beyond_the_corpus():
    index = build_index(DOCUMENTS, "ivf", effort=1)
    scores, rows = index.search(QUERIES, 5000)
    assert rows.shape == (400, 3000)
    missing = rows == -1
    assert missing[:, -1].all()
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    np.testing.assert_array_equal(scores == -np.inf, missing)
    index.effort = 76
    np.testing.assert_array_equal(np.sort(index.search(QUERIES[:3], 5000).rows, axis=1), [np.arange(3000)] * 3)
    one = build_index(DOCUMENTS[:1], "hnsw")
    np.testing.assert_array_equal(one.search(QUERIES[:2], 3).rows, [[0], [0]])
    assert one.search(QUERIES[:0], 3).rows.shape == (0, 1)


def test_size_is_that_of_the_file(tmp_path):
    for preset, least in (("flat", 4 * DIM), ("hnsw", 4 * DIM + 256), ("ivf", 4 * DIM + 8), ("IVF16,PQ4x4np", 2 + 8)):
        index = build_index(DOCUMENTS, preset)
        faiss.write_index(index._index, str(tmp_path / "index"))
        assert index.bytes_per_document == (tmp_path / "index").stat().st_size / 3000
        assert least <= index.bytes_per_document < least + 30


# Files.


@pytest.mark.parametrize("preset", ["flat", "hnsw", "ivf", "PCA8,IVF16,PQ4x4np"])
def test_saved_and_loaded(tmp_path, preset):
    ids = [f"document\n{row} ä" for row in range(3000)]
    index = build_index(DOCUMENTS, preset, metric="cosine", ids=ids, queries=QUERIES)
    index.save(tmp_path / "a" / "index")
    loaded = load_index(tmp_path / "a" / "index", dim=DIM, metric="cosine")
    for name in ("preset", "factory", "metric", "dim", "ids", "recall", "effort", "bytes_per_document"):
        assert getattr(loaded, name) == getattr(index, name), name
    assert len(loaded) == 3000
    for ours, theirs in zip(index.search(QUERIES, 7), loaded.search(QUERIES, 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    description = json.loads((tmp_path / "a" / "index" / "index.json").read_text())
    assert description["num_documents"] == 3000
    assert description["faiss_version"] == faiss.__version__


def test_what_cannot_be_loaded(tmp_path):
    build_index(DOCUMENTS[:100]).save(tmp_path)
    with pytest.raises(ValueError, match="an index of dim 16, expected 384"):
        load_index(tmp_path, dim=384)
    with pytest.raises(ValueError, match="an index of metric 'dot', expected 'cosine'"):
        load_index(tmp_path, metric="cosine")
    # Whole by its hash, and yet nothing that FAISS reads.
    foreign = approximate.write_hashed(tmp_path, "index", ".faiss", lambda file: file.write(b"not of FAISS" * 9))
    approximate.finish(tmp_path, {**opened(tmp_path, kind="faiss")[0], "files": {"faiss": foreign}})
    with pytest.raises(ValueError, match=r"FAISS .* cannot read it \(.*\); written by"):
        load_index(tmp_path)


# Misuse.


def test_misuse_of_building():
    with pytest.raises(
        ValueError, match="'annoy' at 16 dimensions: expected one of flat, hnsw, ivf, ivfpq, or a string"
    ):
        build_index(DOCUMENTS, "annoy")
    with pytest.raises(ValueError, match="metric is 'l2', expected one of dot, cosine"):
        build_index(DOCUMENTS, metric="l2")
    for target in (0, 1.01):
        with pytest.raises(ValueError, match=r"target recall is .*, expected above 0 and at most 1"):
            build_index(DOCUMENTS, target_recall=target)
    for wrong in (DOCUMENTS[:0], DOCUMENTS[:, :0], DOCUMENTS[0]):
        with pytest.raises(ValueError, match=r"embeddings of shape .*, expected \[N, D\] with documents to index"):
            build_index(wrong)
    with pytest.raises(ValueError, match="2 ids for 3,000 documents"):
        build_index(DOCUMENTS, ids=["a", "b"])
    # Distances for inner products: the smallest would have to come first.
    with pytest.raises(ValueError, match=r"'HNSW8_PQ4' at 16 dimensions: .* \(it does not search by inner product\)"):
        check_index("HNSW8_PQ4", DIM)
    for factory in ("PQ4x12", "IDMap,Flat", "IVF0,Flat"):  # FAISS finds out when it trains, fills or searches
        message = rf"'{factory}' at 16 dimensions: expected one of flat, hnsw, .* \(\w.*\)"
        with pytest.raises(ValueError, match=message) as caught:
            build_index(DOCUMENTS[:300], factory)
        assert ".cpp" not in str(caught.value)
    with pytest.raises(ValueError, match="no queries to tune on"):
        build_index(DOCUMENTS, "ivf", queries=QUERIES[:0])
    with pytest.raises(ValueError, match=r"shape \(400, 3\), expected \[N, 16\]"):
        build_index(DOCUMENTS, "ivf", queries=QUERIES[:, :3])
    damaged = DOCUMENTS.copy()
    damaged[2999, 0] = np.nan
    for preset in ("flat", "hnsw", "ivf"):
        with pytest.raises(ValueError, match="the embedding of row 2999 has"):
            build_index(damaged, preset)


@pytest.mark.parametrize(
    ("preset", "needed", "number"), [("ivfpq", "256", 255), ("IVF40,Flat", "40", 39), ("PQ4", "256", 100)]
)
def test_too_few_documents_to_train_on(preset, needed, number):
    with pytest.raises(ValueError, match=f"'{preset}' is trained on at least {needed} documents, found {number}"):
        build_index(DOCUMENTS[:number], preset)
    with pytest.raises(ValueError, match=f"'{preset}' is trained on at least {needed} documents, found {number}"):
        check_index(preset, DIM, num_documents=number)
    check_index(preset, DIM, num_documents=int(needed))
    check_index(preset, DIM)


def test_an_index_can_be_checked_before_there_are_vectors():
    for preset in ("flat", "hnsw", "ivf", "SQ8", "IVF9,PQ4"):
        check_index(preset, DIM, num_documents=300)
    check_index("hnsw", DIM, num_documents=1)
    with pytest.raises(ValueError, match="index 'hnws' at 16 dimensions: expected one of flat, hnsw, ivf, ivfpq, or a"):
        check_index("hnws", DIM)
    with pytest.raises(ValueError, match="index 'PQ5' at 16 dimensions"):
        check_index("PQ5", DIM)


def test_misuse_of_searching():
    index = build_index(DOCUMENTS)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match=r"shape \(400, 3\), expected \[N, 16\]"):
        index.search(QUERIES[:, :3], 1)
    with pytest.raises(ValueError, match="the embedding of row 0 has"):
        index.search(QUERIES * np.inf, 1)
    with pytest.raises(ValueError, match="'Flat' has no effort to be set"):
        index.effort = 3
    with pytest.raises(ValueError, match=r"effort \(nprobe\) must be at least 1, not 0"):
        build_index(DOCUMENTS, "ivf", effort=0)
