"""evaluate_grid and search.py: by hand, against `evaluate` and naive search; memory; what is refused."""

import itertools
import json
import time
import weakref

import faiss
import numpy as np
import pytest
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset, Searcher, evaluate, evaluate_grid, mine, search
from embedft.retrieval import search as search_module
from embedft.retrieval.index import search_exact
from embedft.retrieval.quantization import QuantizedIndex, calibrate, from_int8, to_int8
from embedft.retrieval.report import Report
from embedft.retrieval.search import Setting, check_settings
from embedft.vectors import unit_rows

EVERY = {"precisions": ("float32", "int8", "binary"), "indices": ("flat", "hnsw", "ivf")}


@pytest.fixture(autouse=True)
def one_faiss_thread():
    """HNSW links documents in several threads at once: with one, twice the same index is twice the same graph."""
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(num_threads)


class TableEmbedder:
    """Vectors from a table {text: [windows, D]}, the first one standing for the whole text."""

    def __init__(self, table: dict, similarity: str = "dot"):
        self.table = {text: np.atleast_2d(np.array(vectors, dtype=np.float32)) for text, vectors in table.items()}
        self.similarity = similarity
        self.calls: list[tuple[str, int]] = []
        self.alive: list[int] = []
        self.made: list[weakref.ref] = []

    def encode(self, texts, *, role, dim):
        self.calls.append((role, len(texts)))
        self._count()
        vectors = np.stack([self.table[text][0] for text in texts])
        if role == "document":
            self.made.append(weakref.ref(vectors))
        return vectors

    def encode_passages(self, texts, passages, *, role, dim):
        self.calls.append((f"{role} windows {tuple(passages)}", len(texts)))
        self._count()
        windows = [self.table[text] for text in texts]
        vectors = np.concatenate(windows)
        self.made.append(weakref.ref(vectors))
        return vectors, np.repeat(np.arange(len(texts)), [len(vectors) for vectors in windows])

    def _count(self):
        """How many of the documents' slices made before are still held."""
        self.alive.append(sum(made() is not None for made in self.made))


def dataset_of(documents: dict, queries: dict, relevant: dict | None = None) -> RetrievalDataset:
    """Texts are the ids; every query has the first document for relevant, unless told."""
    first = next(iter(documents))
    qrels = {query: {(relevant or {}).get(query, first): 1} for query in queries}
    return RetrievalDataset({q: q for q in queries}, {d: d for d in documents}, qrels)


def by_hand(documents: dict, queries: dict, similarity: str = "dot"):
    return TableEmbedder({**documents, **queries}, similarity), dataset_of(documents, queries)


def clustered(number: int, dim: int, seed: int) -> np.ndarray:
    centres = np.random.default_rng(7).standard_normal((12, dim))
    rng = np.random.default_rng(seed)
    return unit_rows(centres[rng.integers(0, 12, number)] + 0.6 * rng.standard_normal((number, dim))).astype("f4")


def random_data(num_documents=300, num_queries=20, dim=32, most_windows=1, similarity="cosine"):
    counts = np.random.default_rng(3).integers(1, most_windows + 1, num_documents)
    windows = np.split(clustered(counts.sum(), dim, 0), np.cumsum(counts)[:-1])
    documents = {f"d{i:03d}": vectors for i, vectors in enumerate(windows)}
    queries = dict(zip((f"q{i:02d}" for i in range(num_queries)), clustered(num_queries, dim, 1), strict=True))
    relevant = {query: f"d{(7 * i) % num_documents:03d}" for i, query in enumerate(queries)}
    return TableEmbedder({**documents, **queries}, similarity), dataset_of(documents, queries, relevant)


def without_seconds(report: Report) -> dict:
    return {n: v for n, v in report.costs.items() if not n.endswith("_seconds") and n != "queries_per_second"}


def assert_same(report: Report, expected: Report):
    settings = [{key: found for key, found in r.setting.items() if key != "model_sha256"} for r in (report, expected)]
    assert settings[0] == settings[1]
    assert report.metrics == expected.metrics
    assert without_seconds(report) == without_seconds(expected)
    np.testing.assert_array_equal(report.run.indices, expected.run.indices)
    np.testing.assert_array_equal(report.run.scores, expected.run.scores)  # to the bit


# By hand.


def test_binary_by_hand():
    """Query (1, 3). a (9, -1): 6. b (-1, 1): 2. c (-5, -5): -20, so exact search finds a.

    Signs: a (+, -) and b (-, +) differ in one from the query's, c in two. Rescored: a 1 - 3 = -2, b -1 + 3 = 2: b.
    """
    embedder, dataset = by_hand({"a": [9, -1], "b": [-1, 1], "c": [-5, -5]}, {"q": [1, 3]})
    exact, binary = evaluate_grid(embedder, dataset, precisions=("float32", "binary"), depth=1, ks=(1,))
    assert exact.run.to_dict() == {"q": {"a": 6.0}}
    assert binary.run.to_dict() == {"q": {"b": 2.0}}
    assert (exact.costs["recall@10_of_exact"], binary.costs["recall@10_of_exact"]) == (1.0, 0.0)
    assert (exact.costs["bytes_per_document"], binary.costs["bytes_per_document"]) == (8, 1)
    assert (exact.metrics["mrr@1"], binary.metrics["mrr@1"]) == (1.0, 0.0)
    assert binary.setting["precision"] == "binary"
    assert evaluate(embedder, dataset, precision="binary").costs["recall@10_of_exact"] == 1.0  # the first 3 of 3


def test_int8_by_hand():
    """Values from 0 to 255: steps of 1. a 254.2 and b 254.9 are both code 254, which stands for 254.5: a tie, a first.

    Exact search finds b (254.9); of its first two, b and a, both are found.
    """
    embedder, dataset = by_hand({"a": [254.2], "b": [254.9], "c": [0.0], "d": [255.0]}, {"q": [1.0], "p": [-1.0]})
    report = evaluate(embedder, dataset, precision="int8", depth=2, ks=(1,))
    assert report.run.to_dict() == {"q": {"d": 255.5, "a": 254.5}, "p": {"c": -0.5, "a": -254.5}}
    # Of q exact search finds d and b, of p c and a: 1/2 and 1.
    assert report.costs["recall@10_of_exact"] == 0.75
    assert report.costs["bytes_per_document"] == 1


def test_adaptive_by_hand():
    """On one feature, at unit length, a to e are 1 and f is -1; a shortlist of 4 x depth = 4 is a to d.

    Query (1, 1) in full: 1, 2, 3, 4, 10, 19: d of the shortlist, f of all. Query (1, -1): 1, 2, 3, 4, -8, -21: d.
    """
    documents = {"a": [1, 0], "b": [2, 0], "c": [3, 0], "d": [4, 0], "e": [1, 9], "f": [-1, 20]}
    embedder, dataset = by_hand(documents, {"p": [1, 1], "q": [1, -1]})
    report = evaluate(embedder, dataset, index="adaptive-1", depth=1, ks=(1,))
    assert report.run.to_dict() == {"p": {"d": 4.0}, "q": {"d": 4.0}}
    assert report.costs["recall@10_of_exact"] == 0.5
    assert report.costs["bytes_per_document"] == 4 * 1 + 4 * 2


def test_windows_by_hand():
    """Query (1, 0), of which one dimension is kept: a 3, b the larger of 1 and 7, c of 5 and 4; first windows: b 1."""
    embedder, dataset = by_hand({"a": [[3, 9]], "b": [[1, 0], [7, 0]], "c": [[5, 1], [4, 0]]}, {"q": [1, 0]})
    whole, cut = evaluate_grid(embedder, dataset, dims=(1,), passages=(None, (6, 3)))
    assert whole.run.to_dict() == {"q": {"c": 5.0, "a": 3.0, "b": 1.0}}
    assert cut.run.to_dict() == {"q": {"b": 7.0, "c": 5.0, "a": 3.0}}
    assert (whole.setting["passages"], cut.setting["passages"]) == (None, [6, 3])
    assert cut.costs["windows_per_document"] == pytest.approx(5 / 3)
    assert cut.costs["bytes_per_document"] == pytest.approx(4 * 5 / 3)
    assert "windows_per_document" not in whole.costs
    assert embedder.calls == [("query", 1), ("document", 3), ("document windows (6, 3)", 3)]


class Sizes(TableEmbedder):
    """Windows of 6 are all of a document's vectors, those of 4 all but the last, if it has several."""

    def encode_passages(self, texts, passages, *, role, dim):
        vectors, source = super().encode_passages(texts, passages, role=role, dim=dim)
        kept = np.append(source[1:] == source[:-1], False) | (np.bincount(source)[source] == 1)
        return (vectors[kept], source[kept]) if passages[0] == 4 else (vectors, source)


def test_two_sizes_by_hand():
    """Query (1, 0): a (3 + 3) / 2; b (7 + 1) / 2; c (5 + 5) / 2. One dimension of (2, 9): a 3, b 4, c 5."""
    documents, queries = {"a": [[3, 9]], "b": [[1, 0], [7, 0]], "c": [[5, 1], [4, 0]]}, {"q": [1, 0]}
    embedder, dataset = Sizes({**documents, **queries}, "dot"), dataset_of(documents, queries)
    for slice_documents in (None, 2, 1):
        options = {"dims": (1,), "passages": [(6, 3), (6, 3, 4, 2)], "slice_documents": slice_documents}
        one, two = evaluate_grid(embedder, dataset, **options)
        assert one.run.to_dict() == {"q": {"b": 7.0, "c": 5.0, "a": 3.0}}
        assert two.run.to_dict() == {"q": {"c": 5.0, "b": 4.0, "a": 3.0}}
        assert (one.setting["passages"], two.setting["passages"]) == ([6, 3], [6, 3, 4, 2])
        assert two.costs["windows_per_document"] == pytest.approx((5 + 3) / 3)
    assert embedder.calls[:4] == [
        ("query", 1),
        *((f"document windows {passages}", 3) for passages in ((6, 3), (6, 3), (4, 2))),
    ]


@pytest.mark.parametrize(("precision", "index"), list(itertools.product(*EVERY.values())))
def test_two_sizes_however_they_are_stored(precision, index):
    """Against the mean of what each size gives alone, of the same decoded vectors: every score must be the exact mean
    over all of a document's windows, and exact searches find the first documents by it."""
    _, dataset = (made := random_data(80, most_windows=4))
    embedder = Sizes(made[0].table, "cosine")
    texts = sorted(dataset.corpus)
    parts = [embedder.encode_passages(texts, passages, role="document", dim=None) for passages in ((6, 3), (4, 2))]
    vectors = np.concatenate([vectors for vectors, _ in parts]).astype(np.float32)
    numbers = np.concatenate([2 * source + size for size, (_, source) in enumerate(parts)])
    order = np.argsort(numbers, kind="stable")
    vectors, numbers = vectors[order], numbers[order]
    if precision != "float32":
        vectors = QuantizedIndex(vectors, precision).decode()
    queries = embedder.encode(list(dataset.queries), role="query", dim=None).astype(np.float32)
    scores = np.stack([(queries @ vectors[numbers == number].T).max(axis=1) for number in range(160)], axis=1)
    scores = scores.reshape(20, 80, 2).mean(axis=2)
    options = {"precision": precision, "index": index, "passages": (6, 3, 4, 2)}
    for slice_documents in (None, 7):
        run = evaluate(embedder, dataset, depth=10, slice_documents=slice_documents, **options).run
        assert run.document_ids == texts
        np.testing.assert_allclose(run.scores, np.take_along_axis(scores, run.indices, axis=1), atol=1e-6)
        if index == "flat" and precision != "binary":
            np.testing.assert_allclose(run.scores, -np.sort(-scores, axis=1)[:, :10], atol=1e-6)
        found = Searcher(embedder, dataset, depth=10, slice_documents=slice_documents, **options).search(
            dataset.queries
        )
        np.testing.assert_array_equal(found.indices, run.indices)


def test_windows_by_numbers_of_numpy(tmp_path):
    embedder, dataset = by_hand({"a": [[3, 9]], "b": [[1, 0], [7, 0]]}, {"q": [1, 0]})
    expected = evaluate(embedder, dataset, passages=(6, 3))
    for passages in (np.array([6, 3]), tuple(np.array([6, 3]))):
        for report in (
            evaluate(embedder, dataset, passages=passages),
            *evaluate_grid(embedder, dataset, passages=passages),
        ):
            report.save(tmp_path)
            assert Report.load(tmp_path).setting == expected.setting


def test_codes_of_windows_by_hand():
    """Signs of windows, query (1, 3): b's second window (+, +) has 4, a's (-, +) 2, c's best (+, -) -2."""
    documents = {"a": [[-1, 1]], "b": [[-9, -9], [0.1, 0.1]], "c": [[9, -1], [-1, -1]]}
    embedder, dataset = by_hand(documents, {"q": [1, 3]})
    report = evaluate(embedder, dataset, passages=(6, 3), precision="binary")
    assert report.run.to_dict() == {"q": {"b": 4.0, "a": 2.0, "c": -2.0}}
    assert report.costs["bytes_per_document"] == pytest.approx(1 * 5 / 3)


# The grid is `evaluate` of each setting.


@pytest.mark.parametrize("passages", [(None,), ((6, 3),)])
def test_a_grid_is_evaluate_of_each_setting_in_order(passages):
    embedder, dataset = random_data(most_windows=1 if passages == (None,) else 4)
    dims = (None, 16)
    start = time.perf_counter()
    options = {"depth": 20, "slice_documents": 128}
    reports = evaluate_grid(embedder, dataset, dims=dims, **EVERY, passages=passages, **options)
    spent = sum(report.costs[f"{part}_seconds"] for report in reports for part in ("build", "search", "metrics"))
    assert spent < time.perf_counter() - start
    assert [role.split()[0] for role, _ in embedder.calls] == ["query", *["document"] * 3]  # one encoding
    settings = list(itertools.product(passages, dims, EVERY["precisions"], EVERY["indices"]))
    assert len(reports) == len(settings) == 18
    for report, (windows, dim, precision, index) in zip(reports, settings, strict=True):
        expected = {"dim": dim or 32, "precision": precision, "index": index}
        assert {name: report.setting[name] for name in expected} == expected
        setting = {"dim": dim, "precision": precision, "index": index, "passages": windows}
        assert_same(report, evaluate(embedder, dataset, **setting, **options))
        assert report.setting["similarity"] == "cosine"
        assert ("factory" in report.setting) == ("parameters" in report.setting) == (index != "flat")
        assert report.costs["queries_per_second"] == pytest.approx(20 / report.costs["search_seconds"])
        assert (report.costs["build_seconds"] > 0) == (precision != "float32" or index != "flat")


def test_dims_equal_the_embedders_to_the_bit(tmp_path):
    embedder, dataset = make_embedder(tmp_path / "model"), make_dataset(40, 30)
    ids = sorted(dataset.corpus)
    reports = evaluate_grid(embedder, dataset, dims=(None, 16, 5))
    for report, dim in zip(reports, (32, 16, 5), strict=True):
        assert_same(report, evaluate(embedder, dataset, dim=dim))
        queries = embedder.encode(list(dataset.queries.values()), role="query", dim=dim)
        documents = embedder.encode([dataset.corpus[i] for i in ids], role="document", dim=dim)
        expected = search_exact(queries, documents, 100)
        np.testing.assert_array_equal(report.run.indices, expected.rows)
        np.testing.assert_array_equal(report.run.scores, expected.scores)
    windows = evaluate_grid(embedder, dataset, dims=(32, 16), passages=(8, 4))
    embedder.truncate_dim = 16  # what None stands for then; more may be asked for all the same
    cut, whole = evaluate_grid(embedder, dataset, dims=(None, 32))
    assert_same(cut, reports[1])
    assert_same(whole, reports[0])
    for report, expected in zip(
        evaluate_grid(embedder, dataset, dims=(32, None), passages=(8, 4)), windows, strict=True
    ):
        assert_same(report, expected)


def test_exact_search_runs_where_the_embedder_is(tmp_path, monkeypatch):
    embedder, dataset = make_embedder(tmp_path / "model"), make_dataset(8, 6)
    devices = []

    def searched(*arguments, device):
        devices.append(device)
        return search_exact(*arguments)

    monkeypatch.setattr(search_module, "search_exact", searched)
    evaluate(embedder, dataset)
    mine(embedder, dataset, ranks=(1, 6), num_negatives=1)
    assert devices == [embedder.device, embedder.device]


def test_dot_products_are_not_normalised_unless_the_model_does(tmp_path):
    embedder, dataset = by_hand({"a": [3, 4], "b": [1, 0]}, {"q": [2, 0]})
    assert evaluate(embedder, dataset, dim=1).run.to_dict() == {"q": {"a": 6.0, "b": 2.0}}
    embedder.normalize = True
    assert evaluate(embedder, dataset, dim=1).run.to_dict() == {"q": {"a": 1.0, "b": 1.0}}
    embedder, dataset = by_hand({"a": [3, 4], "b": [1, 0]}, {"q": [2, 0]}, "cosine")
    assert evaluate(embedder, dataset, dim=1).run.to_dict() == {"q": {"a": 1.0, "b": 1.0}}


def test_graded_gain():
    """b (grade 3) first, then a (grade 1) is the ideal order; a first: (1 + 3/log2(3)) / (3 + 1/log2(3))."""
    documents = {"a": [2.0], "b": [1.0]}
    embedder = TableEmbedder({**documents, "q": [1.0]})
    dataset = RetrievalDataset({"q": "q"}, {"a": "a", "b": "b"}, {"q": {"a": 1, "b": 3}})
    assert evaluate(embedder, dataset).metrics["ndcg@10"] == pytest.approx(1)
    log = np.log2(3)
    assert evaluate(embedder, dataset, gain="graded").metrics["ndcg@10"] == pytest.approx((1 + 3 / log) / (3 + 1 / log))


def test_a_report_can_be_saved(tmp_path):
    embedder, dataset = random_data()
    for number, report in enumerate(evaluate_grid(embedder, dataset, indices=("hnsw", "adaptive-8"), depth=20)):
        report.save(tmp_path / str(number))
        loaded = Report.load(tmp_path / str(number))
        assert (loaded.setting, loaded.costs) == (report.setting, report.costs)
        json.dumps(report.setting)


def test_a_pair_of_numbers_is_one_passages_setting():
    embedder, dataset = random_data(most_windows=2)
    for passages in ((6, 3), [6, 3], [(6, 3)], (6, 3, 4, 2), [(6, 3, 4, 2)]):
        (report,) = evaluate_grid(embedder, dataset, passages=passages)
        assert report.setting["passages"] == list(np.ravel(passages))
    (report,) = evaluate_grid(embedder, dataset, passages=None)
    assert report.setting["passages"] is None


# Against naive search.


def naive_windows(queries, windows, decode=lambda vectors: vectors):
    """Scores [Q, N] of documents by the best of their windows, as they come back from their codes."""
    scores = queries @ decode(np.concatenate(windows)).T
    parts = np.split(scores, np.cumsum([len(w) for w in windows])[:-1], axis=1)
    return np.stack([part.max(axis=1) for part in parts], axis=1)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_windows_equal_naive_search(precision, index):
    """As deep as the corpus: where a graph misses a document, all are scored. Scores are those of all windows."""
    embedder, dataset = random_data(60, 9, 16, most_windows=5)
    options = {"passages": (6, 3), "depth": 60}
    report = evaluate(embedder, dataset, precision=precision, index=index, **options)
    decode = {
        "float32": lambda vectors: vectors,
        "int8": lambda vectors: from_int8(to_int8(vectors, calibrate(vectors)), calibrate(vectors)),
        "binary": lambda vectors: np.where(vectors > 0, 1.0, -1.0),
    }[precision]
    queries = np.concatenate([embedder.table[text] for text in dataset.queries.values()])
    scores = naive_windows(queries, [embedder.table[i] for i in sorted(dataset.corpus)], decode)
    assert (report.run.indices >= 0).all()
    own = np.take_along_axis(scores, report.run.indices, axis=1)
    np.testing.assert_allclose(report.run.scores, own, atol=1e-5)
    exact = naive_windows(queries, [embedder.table[i] for i in sorted(dataset.corpus)])
    first = zip(np.argsort(-exact, axis=1)[:, :10], report.run.indices[:, :10], strict=True)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in first])
    assert report.costs["recall@10_of_exact"] == pytest.approx(recall)
    assert recall < 1 if precision == "binary" else recall > 0.8


@pytest.mark.parametrize("index", ["hnsw", "ivf"])
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_hnsw_and_ivf_index_decoded_vectors(index, precision):
    embedder, dataset = random_data(200, 9, 16)
    report = evaluate(embedder, dataset, precision=precision, index=index, depth=20)
    queries = np.concatenate([embedder.table[text] for text in dataset.queries.values()])
    documents = np.concatenate([embedder.table[i] for i in sorted(dataset.corpus)])
    ranges = calibrate(documents)
    stored = (
        from_int8(to_int8(documents, ranges), ranges) if precision == "int8" else np.where(documents > 0, 1.0, -1.0)
    )
    own = np.take_along_axis(queries @ stored.T, report.run.indices, axis=1)
    np.testing.assert_allclose(report.run.scores, own, atol=1e-5)


def test_bytes_of_a_document():
    """32 dimensions: 128, 32, 4. A graph costs the same whatever its vectors are; lists have 8 bytes of a row each."""
    embedder, dataset = random_data(900)
    reports = evaluate_grid(embedder, dataset, **EVERY, depth=20)
    sizes = np.array([report.costs["bytes_per_document"] for report in reports]).reshape(3, 3)
    np.testing.assert_array_equal(sizes[:, 0], [128, 32, 4])
    np.testing.assert_allclose(sizes[:, 1] - sizes[:, 0], sizes[0, 1] - 128, atol=3)
    np.testing.assert_allclose(sizes[:, 2] - sizes[:, 0], sizes[0, 2] - 128, atol=3)
    assert 250 < sizes[0, 1] - 128 < 300
    assert 8 < sizes[0, 2] - 128 < 24
    quantised = evaluate(embedder, dataset, index="ivfpq", depth=20).costs["bytes_per_document"]
    windows = evaluate(embedder, dataset, index="ivfpq", depth=20, passages=(6, 3)).costs["bytes_per_document"]
    assert windows == pytest.approx(quantised + 128)  # whose windows are scored by their vectors


def test_recall_is_of_the_first_ten():
    embedder, dataset = random_data(900)
    report = evaluate(embedder, dataset, index="IVF30,Flat", depth=50)
    exact = evaluate(embedder, dataset, depth=50)
    shares = [len(set(a[:10]) & set(b[:10])) / 10 for a, b in zip(report.run.indices, exact.run.indices, strict=True)]
    assert report.costs["recall@10_of_exact"] == pytest.approx(np.mean(shares))
    assert report.setting["factory"] == "IVF30,Flat"


def test_search_parameters_are_part_of_the_index_name():
    embedder, dataset = random_data(900)
    one, all_lists = evaluate_grid(embedder, dataset, indices=("ivf,nprobe=1", "ivf,nprobe=23"), depth=20)
    assert (one.setting["index"], one.setting["factory"]) == ("ivf,nprobe=1", "IVF23,Flat")
    assert (one.setting["parameters"], all_lists.setting["parameters"]) == ("nprobe=1", "nprobe=23")
    assert one.costs["recall@10_of_exact"] < all_lists.costs["recall@10_of_exact"] == 1
    codes = evaluate(embedder, dataset, index="ivf,nprobe=1", precision="int8", depth=20)
    assert codes.setting["parameters"] == "nprobe=1"


# Memory.


@pytest.mark.parametrize("options", [{}, {"dims": (None, 16, 8)}, {"passages": [(6, 3)]}])
def test_exact_search_holds_a_slice_at_a_time(options):
    embedder, dataset = random_data(50, most_windows=3)
    whole = evaluate_grid(embedder, dataset, **options)
    embedder, _ = random_data(50, most_windows=3)
    reports = evaluate_grid(embedder, dataset, **options, slice_documents=8)
    assert [number for _, number in embedder.calls] == [20, *[8] * 6, 2]
    assert embedder.alive == [0] * 8
    for report, expected in zip(reports, whole, strict=True):
        np.testing.assert_array_equal(report.run.indices, expected.run.indices)
        np.testing.assert_allclose(report.run.scores, expected.run.scores, atol=1e-6)
    run = search(embedder, dataset, dataset.queries, slice_documents=8)
    assert run.to_dict().keys() == dataset.queries.keys()
    assert max(embedder.alive) == 0


def test_other_settings_keep_the_vectors_until_they_are_one_array():
    embedder, dataset = random_data(50)
    evaluate_grid(embedder, dataset, precisions=("int8",), slice_documents=8)
    assert embedder.alive == [0, *range(7)]
    embedder._count()
    assert embedder.alive[-1] == 0
    embedder, dataset = random_data(50, most_windows=3)
    evaluate_grid(embedder, dataset, precisions=("int8",), passages=[None, (6, 3)])
    assert embedder.alive == [0, 0, 0]  # none of whole documents when windows are encoded


def test_slices_of_the_corpus_change_no_tie():
    """Whole numbers, so that inner products are exact and ties many; ids in another order than the corpus."""
    rng = np.random.default_rng(0)
    documents = {f"d{i:02d}": rng.integers(-2, 3, 3) for i in rng.permutation(70)}
    queries = {f"q{i}": rng.integers(-2, 3, 3) for i in range(9)}
    embedder, dataset = by_hand(documents, queries)
    for depth in (5, 16, 30, 70, 100):
        report = evaluate(embedder, dataset, depth=depth, ks=(1,), slice_documents=16)
        for query, vector in queries.items():
            ranking = sorted((-float(vector @ documents[i]), i) for i in documents)[:depth]
            assert list(report.run.to_dict()[query].items()) == [(i, -score) for score, i in ranking]


# search.


def test_search_orders_ties_by_id_and_takes_any_questions():
    documents = {"c": [1, 0], "b": [2, 0], "a": [1, 0], "d": [0, 5]}
    embedder = TableEmbedder({**documents, "first?": [1, 0], "second?": [0, 1]})
    dataset = dataset_of(documents, {"unused": None})
    run = search(embedder, dataset, {"y": "second?", "x": "first?"}, depth=3)
    expected = {"y": {"d": 5.0, "a": 0.0, "b": 0.0}, "x": {"b": 2.0, "a": 1.0, "c": 1.0}}
    assert run.to_dict() == expected
    assert run.query_ids == ["y", "x"]
    assert [list(row) for row in run.to_dict().values()] == [["d", "a", "b"], ["b", "a", "c"]]
    by_place = search(embedder, dataset, ["second?", "first?", "second?"], depth=3)
    assert by_place.to_dict() == {"0": expected["y"], "1": expected["x"], "2": expected["y"]}
    assert search(embedder, dataset, ["first?"]).indices.shape == (1, 4)  # as many as there are
    searcher = Searcher(embedder, dataset, depth=3)
    embedder.calls.clear()
    assert searcher.search({"y": "second?", "x": "first?"}).to_dict() == expected
    assert searcher.search(["first?"]).to_dict() == {"0": expected["x"]}
    assert embedder.calls == [("query", 2), ("query", 1)]


@pytest.mark.parametrize("passages", [None, (6, 3), (6, 3, 4, 2)])
@pytest.mark.parametrize(
    ("precision", "index"), [*itertools.product(*EVERY.values()), ("float32", "adaptive-8"), ("float32", "SQ8")]
)
def test_search_is_the_run_of_evaluate(passages, precision, index):
    if passages and index == "adaptive-8":
        passages = None
    embedder, dataset = random_data(most_windows=3)
    options = {"dim": 16, "passages": passages, "precision": precision, "index": index, "depth": 20}
    options["slice_documents"] = 128
    run = search(embedder, dataset, dataset.queries, **options)
    expected = evaluate(embedder, dataset, **options)
    assert run.query_ids == expected.query_ids
    np.testing.assert_array_equal(run.indices, expected.run.indices)
    np.testing.assert_array_equal(run.scores, expected.run.scores)
    again = Searcher(embedder, dataset, **options).search(dataset.queries)
    np.testing.assert_array_equal(again.indices, run.indices)
    np.testing.assert_allclose(again.scores, run.scores, atol=1e-6)


def test_a_searcher_over_slices_of_windows():
    embedder, dataset = random_data(50, most_windows=4)
    expected = Searcher(embedder, dataset, passages=(6, 3), depth=10).search(dataset.queries)
    run = Searcher(embedder, dataset, passages=(6, 3), depth=10, slice_documents=7).search(dataset.queries)
    np.testing.assert_array_equal(run.indices, expected.indices)


def test_an_embedder_with_a_store(tmp_path):
    """Nothing is computed twice, whatever the grid."""
    dataset = make_dataset(20, 15)
    plain = make_embedder(tmp_path / "model")
    stored = make_embedder(tmp_path / "model", store=tmp_path / "store")
    options = {"dims": (32, 8), "precisions": ("float32", "int8"), "passages": (None, (8, 4))}
    reports, expected = (evaluate_grid(embedder, dataset, **options) for embedder in (stored, plain))
    misses = stored.store.misses
    again = evaluate_grid(stored, dataset, **options)
    assert stored.store.misses == misses > 0
    for report, same, other in zip(reports, again, expected, strict=True):
        assert_same(report, same)
        assert report.setting == other.setting
        assert report.metrics["ndcg@10"] == pytest.approx(other.metrics["ndcg@10"], abs=0.05)


# Queries that are documents of the corpus.


def own_documents(**changes) -> tuple[TableEmbedder, RetrievalDataset]:
    """As in ArguAna: the claims a and b are documents too; the answer to each is the next nearest."""
    vectors = {"claim a": [1, 0, 0, 0], "to a": [0.8, 0.6, 0, 0], "claim b": [0, 0, 1, 0], "to b": [0, 0, 0.8, 0.6]}
    claims, answers = {"a": "claim a", "b": "claim b"}, {"ra": "to a", "rb": "to b"}
    fields = {"queries": claims, "corpus": claims | answers, "qrels": {"a": {"ra": 1}, "b": {"rb": 1}}}
    return TableEmbedder(vectors, "cosine"), RetrievalDataset(**(fields | changes))


@pytest.mark.parametrize(
    "setting", [{}, {"index": "hnsw"}, {"index": "adaptive-3"}, {"precision": "binary"}, {"passages": (6, 3)}]
)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_query_does_not_find_itself(setting, depth):
    """Without its own document a query has its answer first, at any depth; with it second, which is 1 / log2(3)."""
    embedder, dataset = own_documents()
    options = {**setting, "depth": depth, "ks": (1,)}
    with pytest.warns(UserWarning, match=naming(2, "queries", "'a'", "exclude_identical_ids=False")):
        report = evaluate(embedder, dataset, **options)
    assert report.metrics["ndcg@1"] == 1
    found = report.run.to_dict()["a"]
    assert "a" not in found
    assert len(found) == min(depth, 3)
    if setting not in ({"precision": "binary"}, {"index": "hnsw"}):  # which choose among ties as they like
        assert report.costs["recall@10_of_exact"] == 1
    kept = evaluate(embedder, dataset, exclude_identical_ids=False, **(options | {"depth": 2, "ks": (1, 2)}))
    assert kept.metrics["hit_rate@1"] == 0
    assert kept.metrics["ndcg@2"] == pytest.approx(1 / np.log2(3))
    with pytest.warns(UserWarning, match=naming(2, "queries")):
        run = search(embedder, dataset, dataset.queries, depth=depth, **setting)
    np.testing.assert_array_equal(run.indices, report.run.indices)
    with pytest.warns(UserWarning, match=naming(1, "queries", "'b'")):
        one = Searcher(embedder, dataset, depth=depth, **setting).search({"b": "claim b"})
    assert one.to_dict() == {"b": report.run.to_dict()["b"]}


def test_a_query_finds_its_own_document_if_that_is_judged_relevant():
    embedder, dataset = own_documents(qrels={"a": {"a": 1}, "b": {"b": 0, "rb": 1}})
    with pytest.warns(UserWarning, match=naming(2, "queries")):
        found = evaluate(embedder, dataset).run.to_dict()
    assert list(found["a"])[:2] == ["a", "ra"]
    assert next(iter(found["b"])) == "rb"


def test_other_questions_under_the_id_of_a_document_find_it(recwarn):
    embedder, dataset = own_documents()
    embedder.table["other"] = embedder.table["claim b"]
    assert list(search(embedder, dataset, {"b": "other"}).to_dict()["b"])[:2] == ["b", "rb"]
    renamed = own_documents(queries={"qa": "claim a"}, qrels={"qa": {"ra": 1}})[1]
    assert list(evaluate(embedder, renamed).run.to_dict()["qa"])[:2] == ["a", "ra"]
    assert not recwarn.list


# What is refused.


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"precisions": ("float32", "int4")}, ("precision", "'int4'", "float32", "int8", "binary")),
        ({"indices": ("hnws",)}, ("index", "'hnws'", 32, "flat", "hnsw", "ivf", "ivfpq")),
        ({"indices": ("adaptive",)}, ("index", "'adaptive'", "adaptive-DIM")),
        ({"indices": ("adaptive-08",)}, ("index", "'adaptive-08'", "adaptive-DIM")),
        (
            {"precisions": ("float32", "int8", "binary"), "indices": ("flat", "ivfpq", "adaptive-8")},
            ("int8", "binary", "ivfpq", "adaptive-8"),
        ),
        *(
            ({"precisions": (precision,), "indices": ("flat", index)}, (precision, index, "flat", "hnsw", "ivf"))
            for precision in ("int8", "binary")
            for index in ("ivfpq", "adaptive-8")
        ),
        ({"dims": (None, 32, 8), "indices": ("flat", "adaptive-8", "adaptive-16")}, ("adaptive-8", "adaptive-16", 8)),
        ({"indices": ("adaptive-8",), "passages": (None, (6, 3))}, ("adaptive-8", "passages")),
        ({"dims": (33,)}, ("dim", 33, 1, 32)),
        ({"dims": (0,)}, ("dim", 0, 1, 32)),
        ({"indices": ("ivfpq",)}, ("index", "'ivfpq'", 256, "documents", 9)),
        ({"dims": ()}, ("dims", (), "list")),
        ({"dims": 8}, ("dims", 8, "list")),
        ({"precisions": "int8"}, ("precisions", "'int8'", "list")),
        ({"indices": []}, ("indices", [], "list")),
        ({"ks": (5,), "depth": 4}, ("ks", (5,), 1, "depth", 4)),
    ],
)
def test_a_grid_refuses_before_anything_is_encoded(tmp_path, monkeypatch, options, facts):
    embedder = make_embedder(tmp_path / "model")
    monkeypatch.setattr(embedder, "encode", None)
    with pytest.raises(ValueError, match=naming(*facts)):
        evaluate_grid(embedder, make_dataset(), **options)


def test_windows_may_be_enough_where_documents_are_too_few():
    """PQ is trained on 256: there are 100 documents, of about 300 windows."""
    embedder, dataset = random_data(100, most_windows=5)
    embedder.full_dim = 32
    with pytest.raises(ValueError, match=naming("index", "'ivfpq'", 256, "documents", 100)):
        evaluate(embedder, dataset, index="ivfpq")
    assert embedder.calls == []
    report = evaluate(embedder, dataset, index="ivfpq", passages=(6, 3), depth=10)
    assert report.setting["factory"].endswith("PQ4x8np")
    assert 2.56 < report.costs["windows_per_document"] < 3.5


def test_a_width_that_is_not_known_is_checked_before_documents_are_encoded():
    embedder, dataset = random_data(20)
    for options, facts in (
        ({"dim": 33}, ("dim", 33, 1, 32)),
        ({"index": "adaptive-32"}, ("adaptive-32", 32)),
        ({"index": "hnws"}, ("index", "'hnws'", 32)),
    ):
        embedder.calls.clear()
        with pytest.raises(ValueError, match=naming(*facts)):
            evaluate(embedder, dataset, **options)
        assert embedder.calls == [("query", 20)]


def test_search_refuses():
    embedder, dataset = random_data(20)
    for call in (lambda *a, **o: search(embedder, dataset, *a, **o), Searcher(embedder, dataset).search):
        with pytest.raises(ValueError, match=naming("queries", "'q00'", "list", "{query id: text}")):
            call("q00")
        for none in ([], {}):
            with pytest.raises(ValueError, match=naming("no", "queries")):
                call(none)
    embedder.calls.clear()
    for index in ("flat", "hnsw"):
        with pytest.raises(ValueError, match=naming("no", "queries")):
            search(embedder, dataset, [], index=index)
        with pytest.raises(ValueError, match=naming("depth", 0, 1)):
            search(embedder, dataset, ["q00"], depth=0, index=index)
    with pytest.raises(ValueError, match=naming("binary", "ivfpq")):
        search(embedder, dataset, ["q00"], index="ivfpq", precision="binary")
    with pytest.raises(ValueError, match=naming("dim", 40, 1, 32)):
        Searcher(embedder, dataset, dim=40)
    assert {role for role, _ in embedder.calls} == {"document"}  # whose width was not known before
    embedder.table["q01"][:] = np.nan
    with pytest.raises(ValueError, match=naming("query", "'1'", "finite")):
        search(embedder, dataset, ["q00", "q01"])
    embedder.encode_passages = lambda texts, *_, **__: (np.ones((3, 32), np.float32), [0, 0, 1])
    with pytest.raises(ValueError, match=naming(20, "documents", 3, "windows", 2)):
        search(embedder, dataset, ["q00"], passages=(6, 3))
    with pytest.raises(ValueError, match=naming("passages", (6, 3), "object")):
        check_settings(object(), [Setting(passages=(6, 3))])


def test_vectors_are_cut_once_per_dim_outside_the_build_time(monkeypatch):
    (embedder, dataset), cut, copies = random_data(), [], []

    def slowly(embedder, vectors_NW, dim, truncate=search_module.truncate):
        if len(vectors_NW) < len(dataset.corpus):
            return truncate(embedder, vectors_NW, dim)
        cut.append(dim)
        assert len(cut) <= 3 or not any(copy() is not None for copy in copies)  # one at a time, after exact search
        time.sleep(0.5)
        vectors_ND = truncate(embedder, vectors_NW, dim)
        copies.extend([weakref.ref(vectors_ND)] * (dim < 32))
        return vectors_ND

    monkeypatch.setattr(search_module, "truncate", slowly)
    reports = evaluate_grid(embedder, dataset, dims=(16, 8, 32), precisions=("int8", "binary"))
    assert sorted(cut) == [8, 8, 16, 16, 32, 32]  # for exact search, and for both precisions
    assert max(report.costs["build_seconds"] for report in reports) < 0.5
