"""evaluate.py and report.py: sentence-transformers' evaluator on real data, reports on disk, comparisons."""

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from naming import names, naming

from embedft.data.dataset import RetrievalDataset
from embedft.files import REPLACING, write_json
from embedft.retrieval.evaluate import evaluate, evaluate_grid, evaluate_run, question_clusters
from embedft.retrieval.report import Comparison, Report, compare, compare_seeds
from embedft.retrieval.run import Run
from embedft.retrieval.significance import recipe_interval

LYFT_UBER = Path(__file__).resolve().parents[2] / "shared" / "data" / "lyft_uber" / "val_dataset.json"


class StoredEmbedder:
    """Embeddings from a table {text: [D]}; remembers how many texts each call had."""

    def __init__(self, embeddings: dict[str, np.ndarray], similarity: str = "cosine"):
        self.embeddings, self.similarity = embeddings, similarity
        self.calls: list[tuple[str, int]] = []

    def encode(self, texts, *, role="document", dim=None):
        self.calls.append((role, len(texts)))
        embeddings = np.stack([self.embeddings[text] for text in texts])[:, :dim].astype(np.float32)
        if self.similarity == "cosine":
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings


def toy_dataset(num_queries=12, num_documents=9, **changes) -> RetrievalDataset:
    """Query i is relevant to document i mod num_documents; "lonely" has none."""
    fields = {
        "queries": {f"q{i}": f"query {i}" for i in range(num_queries)} | {"lonely": "nothing answers this"},
        "corpus": {f"d{i}": f"document {i}" for i in range(num_documents)},
        "qrels": {f"q{i}": {f"d{i % num_documents}": 1} for i in range(num_queries)},
    }
    return RetrievalDataset(**(fields | changes))


def toy_embedder(dataset: RetrievalDataset, noise: float, seed: int = 0, similarity: str = "cosine") -> StoredEmbedder:
    """Documents are random; a query is its document plus noise."""
    rng = np.random.default_rng(seed)
    documents = {document_id: rng.standard_normal(8) for document_id in dataset.corpus}
    embeddings = dict(zip(dataset.texts.values(), documents.values(), strict=True))
    for query_id, text in dataset.queries.items():
        center = sum((documents[d] for d in dataset.qrels.get(query_id, {})), np.zeros(8))
        embeddings[text] = center + noise * rng.standard_normal(8)
    return StoredEmbedder(embeddings, similarity)


# Against sentence-transformers, on the Uber questions and chunks.


@pytest.fixture(scope="module")
def uber() -> tuple[RetrievalDataset, dict[str, np.ndarray]]:
    """The validation set with random vectors: a question's is its chunk's and noise. Equal chunks are made unequal."""
    if not LYFT_UBER.exists():
        pytest.skip("no ../shared/data")
    full = RetrievalDataset.load(LYFT_UBER)
    dataset = dataclasses.replace(full, corpus={i: f"{i} {text[:50]}" for i, text in full.corpus.items()})
    rng = np.random.default_rng(0)
    table = dict(zip(dataset.corpus.values(), rng.standard_normal((len(dataset.corpus), 384)), strict=True))
    for query_id, text in dataset.queries.items():
        (answer,) = dataset.qrels[query_id]
        table[text] = table[dataset.corpus[answer]] + 4 * rng.standard_normal(384)
    return dataset, {text: (vector / np.linalg.norm(vector)).astype(np.float32) for text, vector in table.items()}


class SentenceTransformersStub:
    """What InformationRetrievalEvaluator asks of a model, over stored embeddings."""

    def __init__(self, embeddings, similarity):
        import torch

        self.table = embeddings
        self.similarity_fn_name = similarity
        self.similarity = lambda a, b: a @ b.T  # unit rows already where similarity is cosine
        self.tensor = torch.from_numpy
        self.model_card_data = self  # takes the results, as model cards do

    def encode_query(self, texts, **_):
        return self.tensor(np.stack([self.table[text] for text in texts]))

    encode_document = encode_query

    def set_evaluation_metrics(self, *_):
        pass


@pytest.mark.parametrize("case", ["float32", "many ties", "many ties, deeper than the corpus"])
def test_equals_sentence_transformers(uber, case):
    evaluators = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    dataset, embeddings = uber
    similarity, depth = "cosine", 100
    if case != "float32":
        # Few whole numbers: exact scores, dozens of documents with the same one, at the cutoff as well.
        embeddings = {text: np.round(vector[:24] * 8).astype(np.float32) for text, vector in embeddings.items()}
        similarity = "dot"
    if "deeper" in case:
        depth = 500
    report = evaluate(StoredEmbedder(embeddings, similarity), dataset, depth=depth)
    cutoffs = {"mrr_at_k": [1, 3, 5, 10], "ndcg_at_k": [1, 3, 5, 10], "map_at_k": [depth]}
    relevant = {query_id: set(grades) for query_id, grades in dataset.qrels.items()}
    evaluator = evaluators.InformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, relevant, write_csv=False, corpus_chunk_size=150, **cutoffs
    )
    theirs = evaluator(SentenceTransformersStub(embeddings, similarity))
    ours = {f"{similarity}_{name}": mean for name, mean in report.metrics.items() if not name.startswith("hit_rate")}
    assert ours == pytest.approx(theirs, rel=0, abs=1e-9)
    assert len(set(report.clusters)) == 395  # of 790 questions, two a chunk
    if case == "many ties":
        scores = report.run.scores
        assert (scores[:, -1] == scores[:, -2]).mean() > 0.2


# What a report says.


def test_report_of_a_toy_evaluation():
    dataset = toy_dataset()
    embedder = toy_embedder(dataset, noise=0.0)
    report = evaluate(embedder, dataset, ks=(1, 3))
    assert report.query_ids == [f"q{i}" for i in range(12)]
    assert report.num_queries == 12
    assert report.num_without_relevant == 1
    assert list(report.metrics) == [
        *(f"{metric}@{k}" for k in (1, 3) for metric in ("hit_rate", "accuracy", "precision", "recall", "mrr", "ndcg")),
        "map@100",
    ]
    assert report.metrics["accuracy@1"] == report.metrics["ndcg@3"] == report.metrics["map@100"] == 1.0
    assert report.metrics["precision@3"] == pytest.approx(1 / 3)
    questions = sorted([f"q{i}", f"query {i}"] for i in range(12))
    assert report.setting == {
        "dim": 8,
        "precision": "float32",
        "index": "flat",
        "passages": None,
        "similarity": "cosine",
        "depth": 100,
        "ks": [1, 3],
        "gain": "binary",
        "num_documents": 9,
        "data_sha256": dataset.sha256(),
        "questions_sha256": hashlib.sha256(json.dumps(questions).encode()).hexdigest(),
        "num_queries": 12,
    }
    assert report.run.indices.shape == (12, 9)  # fewer documents than the depth
    assert report.clusters == [f"d{i % 9}" for i in range(12)]
    assert report.costs["bytes_per_document"] == 32
    assert {name for name in report.costs if name.endswith("_seconds")} == {
        "query_encoding_seconds",
        "document_encoding_seconds",
        "build_seconds",
        "search_seconds",
        "metrics_seconds",
    }
    assert report.costs["build_seconds"] == 0
    assert report.costs["queries_per_second"] == pytest.approx(12 / report.costs["search_seconds"])
    assert report.costs["recall@10_of_exact"] == 1
    assert embedder.calls == [("query", 12), ("document", 9)]
    text = str(report).splitlines()
    assert text[0] == "12 queries (1 without relevant documents left out)"
    assert text[1].split() == ["@1", "@3", "@100"]
    assert "ndcg         1.0000   1.0000" in text
    assert "map                            1.0000" in text
    assert not any(line.startswith("accuracy") for line in text)


def test_slices_of_the_corpus_change_nothing():
    dataset = toy_dataset()
    whole = evaluate(toy_embedder(dataset, noise=1.0), dataset)
    embedder = toy_embedder(dataset, noise=1.0)
    assert evaluate(embedder, dataset, slice_documents=4).run.to_dict() == whole.run.to_dict()
    assert embedder.calls == [("query", 12), ("document", 4), ("document", 4), ("document", 1)]


def test_equal_documents_are_ordered_by_id_not_by_place():
    dataset = toy_dataset(queries={"q": "query"}, corpus={"b": "same", "c": "same", "a": "same"}, qrels={"q": {"b": 1}})
    embedder = StoredEmbedder({"query": np.ones(2), "same": np.ones(2)})
    report = evaluate(embedder, dataset, ks=(1, 2), depth=2)
    assert list(report.run.to_dict()["q"]) == ["a", "b"]
    assert report.metrics["mrr@2"] == 0.5


def test_dim_and_dot_product():
    dataset = toy_dataset(num_queries=2, num_documents=2, queries={"q0": "query"}, qrels={"q0": {"d0": 1}})
    table = {"query": [1, 1], "document 0": [1, -2], "document 1": [0.5, 3]}
    embedder = StoredEmbedder({text: np.array(vector) for text, vector in table.items()}, similarity="dot")
    assert evaluate(embedder, dataset).run.to_dict() == {"q0": {"d1": 3.5, "d0": -1.0}}
    report = evaluate(embedder, dataset, dim=1)
    assert report.run.to_dict() == {"q0": {"d0": 1.0, "d1": 0.5}}
    assert report.setting["dim"] == 1
    assert report.setting["similarity"] == "dot"
    assert report.costs["bytes_per_document"] == 4


def test_titles_are_embedded():
    dataset = toy_dataset(queries={"q0": "query"}, corpus={"d0": "text"}, qrels={"q0": {"d0": 1}}, titles={"d0": "T"})
    embedder = StoredEmbedder({"query": np.ones(2), "T text": np.ones(2)})
    assert evaluate(embedder, dataset).metrics["mrr@1"] == 1.0


def test_a_corpus_of_one():
    dataset = toy_dataset(num_queries=3, num_documents=1)
    report = evaluate(toy_embedder(dataset, noise=5.0), dataset)
    assert report.run.indices.tolist() == [[0], [0], [0]]
    assert report.metrics["hit_rate@10"] == report.metrics["map@100"] == report.metrics["ndcg@10"] == 1.0
    assert report.metrics["precision@10"] == pytest.approx(0.1)


def test_bad_input():
    dataset = toy_dataset()
    embedder = toy_embedder(dataset, noise=0.0)
    with pytest.raises(ValueError, match=naming(13, "queries", "relevant")):
        evaluate(embedder, toy_dataset(qrels={"q0": {"d0": 0}, "q1": {}}))
    for ks in ((0, 1), (), (5, 101)):
        with pytest.raises(ValueError, match=naming("ks", ks, 1, "depth", 100)):
            evaluate(embedder, dataset, ks=ks)
    assert embedder.calls == []  # before work starts
    embedder.embeddings["document 4"] = np.full(8, np.nan)
    with pytest.raises(ValueError, match=naming("document", "'d4'", "finite")):
        evaluate(embedder, dataset)
    embedder.embeddings["query 7"] = np.full(8, np.inf)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=naming("query", "'q7'", "finite")):
        evaluate(embedder, dataset)
    embedder.encode = lambda texts, **_: np.zeros((3, 8), dtype=np.float32)
    with pytest.raises(ValueError, match=naming(12, "texts", (3, 8))):
        evaluate(embedder, dataset)


# Runs from elsewhere.


def test_evaluate_run_counts_missing_queries_as_zero():
    run = Run.from_dict({"q1": {"d1": 1.0}, "q0": {"d5": 2.0, "d0": 1.0}, "lonely": {"d1": 1.0}})
    report = evaluate_run(run, toy_dataset(num_queries=4))
    assert report.query_ids == ["q0", "q1", "q2", "q3"]
    assert report.per_query["mrr@10"].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert report.num_without_relevant == 1
    assert report.run.to_dict()["q3"] == {}
    assert report.setting["num_documents"] == 9
    by_qrels = evaluate_run(run, toy_dataset(num_queries=4).qrels)
    assert by_qrels.per_query["mrr@10"].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert by_qrels.num_without_relevant == 1


def test_evaluate_run_refuses_unknown_ids():
    dataset = toy_dataset()
    with pytest.raises(ValueError, match=naming("run", "query", "'p'", 1)):
        evaluate_run(Run.from_dict({"p": {"d0": 1.0}}), dataset)
    with pytest.raises(ValueError, match=naming("run", "document", "'e'", 2)):
        evaluate_run(Run.from_dict({"q0": {"d0": 1.0, "e": 0.5, "f": 0.1}}), dataset)
    with pytest.raises(ValueError, match=naming(1, "queries", "relevant")):
        evaluate_run(Run.from_dict({"q0": {"d0": 1.0}}), {})


def test_graded_gain():
    run, qrels = Run.from_dict({"q": {"a": 2.0, "b": 1.0}}), {"q": {"a": 1, "b": 3}}
    assert evaluate_run(run, qrels).metrics["ndcg@10"] == pytest.approx(1.0)
    report = evaluate_run(run, qrels, gain="graded")
    # (1 + 3/log2(3)) / (3 + 1/log2(3))
    assert report.metrics["ndcg@10"] == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    assert report.setting["gain"] == "graded"


def test_clusters_are_connected_components():
    qrels = {
        "q1": {"d9": 1},
        "q2": {"d9": 1, "d5": 1},
        "q3": {"d5": 2, "d7": 1},  # joined with q1 through q2
        "q4": {"d8": 1, "d7": 0},  # grade 0 joins nothing
        "q5": {"d1": 1},
        "q6": {"d1": 1},
        "q7": {"d7": 1},
    }
    assert question_clusters(list(qrels), qrels) == ["d5", "d5", "d5", "d8", "d1", "d1", "d5"]
    assert question_clusters(["q3", "q1"], qrels) == ["d5", "d9"]  # without q2 nothing joins them


@pytest.mark.parametrize("seed", range(20))
def test_clusters_equal_a_naive_merge(seed):
    rng = np.random.default_rng(seed)
    qrels = {
        f"q{i}": {f"d{d:02d}": int(rng.integers(0, 2)) for d in rng.choice(40, size=rng.integers(1, 4))} | {f"d{i}": 1}
        for i in range(20, 40)
    }
    groups = [{d for d, grade in grades.items() if grade > 0} for grades in qrels.values()]
    for _ in groups:  # as often as the longest chain could need
        groups = [set().union(*(other for other in groups if other & group)) for group in groups]
    assert question_clusters(list(qrels), qrels) == [min(group) for group in groups]


def first_grade(judgments, k=None):
    return judgments.grades_QK[:, 0]


def test_any_metrics_replace_the_default_ones(tmp_path):
    dataset = toy_dataset()
    metrics = ["ndcg@20", "rprec", "map@10", "success@5", "judged@10", first_grade]
    options = {"metrics": metrics, "depth": 20}
    report = evaluate(toy_embedder(dataset, noise=3.0), dataset, **options)
    names = ["ndcg@20", "rprec", "map@10", "success@5", "judged@10", "first_grade"]
    assert list(report.metrics) == names
    default = evaluate(toy_embedder(dataset, noise=3.0), dataset, ks=(1, 5, 20), depth=20)
    for name, other in (("ndcg@20", "ndcg@20"), ("success@5", "hit_rate@5"), ("first_grade", "precision@1")):
        assert report.metrics[name] == default.metrics[other]
    (grid,) = evaluate_grid(toy_embedder(dataset, noise=3.0), dataset, **options)
    again = evaluate_run(report.run, dataset, **options)
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    for other in (grid, again, loaded):
        assert other.metrics == report.metrics
        assert compare(report, other, metric="first_grade").difference == 0
    assert "ks" not in report.setting
    with pytest.raises(ValueError, match=naming("'ndcg@20'", 20, "depth", 7)):
        evaluate(None, dataset, metrics=metrics, depth=7)  # before anything is encoded


# On disk.


@pytest.fixture
def report() -> Report:
    dataset = toy_dataset()
    return evaluate(toy_embedder(dataset, noise=3.0), dataset)


def test_report_round_trip_is_exact(tmp_path, report):
    report.save(tmp_path / "eval")
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [
        "metrics.json",
        "per_query.jsonl",
        "run.trec",
    ]
    loaded = Report.load(tmp_path / "eval")
    assert loaded.metrics == report.metrics
    assert list(loaded.per_query) == list(report.per_query)
    for name, values in report.per_query.items():
        np.testing.assert_array_equal(loaded.per_query[name], values)
    for name in ("query_ids", "clusters", "num_without_relevant", "setting", "costs"):
        assert getattr(loaded, name) == getattr(report, name)
    assert loaded.run.to_dict() == report.run.to_dict()
    assert str(loaded) == str(report)


def test_report_round_trip_with_a_query_that_found_nothing(tmp_path):
    report = evaluate_run(Run.from_dict({"q0": {"d0": 0.1}, "q1": {}}), {"q0": {"d0": 1}, "q1": {"d1": 1}})
    report.save(tmp_path)
    assert Report.load(tmp_path).run.to_dict() == {"q0": {"d0": 0.1}, "q1": {}}


def test_load_refuses_damage(tmp_path, report):
    report.save(tmp_path)
    lines = (tmp_path / "per_query.jsonl").read_text().splitlines(keepends=True)

    def damaged(text, *facts):
        (tmp_path / "per_query.jsonl").write_text(text)
        with pytest.raises(ValueError, match=naming(tmp_path, *facts)) as caught:
            Report.load(tmp_path)
        return str(caught.value)

    damaged("".join(lines[:-1]), "damaged", "metrics.json", "per_query.jsonl", "hit_rate@1", "map@100")
    better = "".join(lines).replace('"mrr@10": 0.', '"mrr@10": 1.')
    told = damaged(better, "damaged", "metrics.json", "per_query.jsonl", "mrr@10")  # a file of another report
    assert not names(told, "map@100")
    damaged("".join(lines)[:-20], "per_query.jsonl", 12, "JSON")
    damaged("".join(lines).replace('"cluster"', '"group"'), "per_query.jsonl", 1, "cluster")
    damaged("[1]\n", "per_query.jsonl", 1, [1], "object")
    line = json.loads(lines[0])
    for value in (None, "half", [1]):
        text = json.dumps(line | {"metrics": {**line["metrics"], "mrr@10": value}}) + "\n"
        damaged(text, "per_query.jsonl", 1, "mrr@10", repr(value), "number")
    summary = json.loads((tmp_path / "metrics.json").read_text())
    for name, value, kind in (("setting", None, "object"), ("costs", 3, "object"), ("num_queries", "x", "number")):
        write_json(tmp_path / "metrics.json", summary | {name: value})
        damaged("".join(lines), "metrics.json", name, repr(value), kind)
    write_json(tmp_path / "metrics.json", summary | {"metrics": {"mrr@10": "half"}})
    damaged("".join(lines), "metrics.json", "mrr@10", "'half'", "number")
    for damage in ("[]", "{}", "", '{"metrics": {', json.dumps({k: v for k, v in summary.items() if k != "setting"})):
        (tmp_path / "metrics.json").write_text(damage)
        told = damaged("".join(lines), "metrics.json")
        assert "Error" not in told  # not Python's own words
    (tmp_path / "per_query.jsonl").unlink()
    with pytest.raises(ValueError, match=naming(tmp_path, "no", "per_query.jsonl")):
        Report.load(tmp_path)


def test_a_report_that_does_not_fit_together_is_refused(report):
    with pytest.raises(ValueError, match=naming(12, "query", 11, "clusters")):
        dataclasses.replace(report, clusters=report.clusters[1:])
    with pytest.raises(ValueError, match=naming(12, "query", "run", "other")):
        dataclasses.replace(report, run=report.run.select(report.query_ids[::-1]))


def test_a_report_of_metrics_without_a_cutoff(report):
    values = {**report.per_query, "rprec": np.full(12, 0.25), "judged@10": np.full(12, 0.5)}
    lines = str(dataclasses.replace(report, per_query=values)).splitlines()
    assert lines[1].split() == ["@1", "@3", "@5", "@10", "@100", "all"]
    assert lines[-2].split() == ["rprec", "0.2500"]
    assert len(lines[-2]) == len(lines[1])


# Comparisons.


def test_compare_with_itself(report):
    comparison = compare(report, report)
    assert comparison.difference == 0.0
    assert comparison.interval == (0.0, 0.0)
    assert comparison.p_value == 1.0
    assert comparison.base == comparison.other == report.metrics["ndcg@10"]
    assert (comparison.wins, comparison.ties, comparison.losses) == (0, 12, 0)


def test_compare_by_hand():
    # Reciprocal ranks 1, 1/2, 0, 1 and 1, 1, 1/2, 1/2: differences 0, 1/2, 1/2, -1/2, mean 1/8.
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(4)}
    base = {"q0": {"d0": 1}, "q1": {"x": 2, "d1": 1}, "q2": {"x": 1}, "q3": {"d3": 1}}
    other = {"q0": {"d0": 1}, "q1": {"d1": 1}, "q2": {"x": 2, "d2": 1}, "q3": {"x": 2, "d3": 1}}
    reports = [evaluate_run(Run.from_dict(results), qrels) for results in (base, other)]
    comparison = compare(*reports, metric="mrr@10")
    assert (comparison.base, comparison.other, comparison.difference) == (0.625, 0.75, 0.125)
    assert (comparison.wins, comparison.ties, comparison.losses) == (2, 1, 1)
    # Of the 8 sign patterns of three halves, all have at least one half left: p = 1.
    assert comparison.p_value == 1.0
    assert str(comparison).endswith("2 better, 1 equal, 1 worse of 4 questions in 4 clusters")
    assert "\n" not in str(comparison)


def random_reports(num_queries=200, num_clusters=100, lift=0.0) -> tuple[Report, Report]:
    """Two reports with hits at random ranks; the second has better ranks by `lift`."""
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{i % num_clusters}": 1} for i in range(num_queries)}
    reports = []
    for gain in (0.0, lift):
        places = {q: rng.random() < 0.5 + gain for q in qrels}
        results = {q: {next(iter(qrels[q])): float(places[q]), "other": 0.5} for q in qrels}
        reports.append(evaluate_run(Run.from_dict(results), qrels))
    return tuple(reports)


def test_compare_two():
    base, other = random_reports(lift=0.3)
    comparison = compare(base, other, metric="mrr@10")
    differences = other.per_query["mrr@10"] - base.per_query["mrr@10"]
    assert isinstance(comparison, Comparison)
    assert comparison.difference == differences.mean() > 0
    low, high = comparison.interval
    assert 0 < low < comparison.difference < high
    assert comparison.p_value < 0.01
    assert (comparison.num_queries, comparison.num_clusters) == (200, 100)
    assert str(comparison).startswith(f"mrr@10: {comparison.base:.4f} -> {comparison.other:.4f}, difference +")
    assert compare(base, other, metric="mrr@10") == comparison  # same seed, same bits
    mirrored = compare(other, base, metric="mrr@10")
    assert mirrored.difference == -comparison.difference
    assert mirrored.p_value == comparison.p_value
    json.dumps(dataclasses.asdict(comparison), allow_nan=False)


def test_compare_pairs_questions_by_id(report):
    order = list(range(report.num_queries))[::-1]
    query_ids = [report.query_ids[i] for i in order]
    reordered = dataclasses.replace(
        report,
        query_ids=query_ids,
        per_query={name: values[order] for name, values in report.per_query.items()},
        clusters=[report.clusters[i] for i in order],
        run=report.run.select(query_ids),
    )
    assert compare(report, reordered).interval == (0.0, 0.0)


def test_compare_several_adjusts_p_values():
    base, other = random_reports(lift=0.1)
    single = compare(base, other, metric="mrr@10")
    first, second, third = compare(base, other, base, other, metric="mrr@10")
    assert 0.001 < single.p_value < 0.33
    assert first.p_value == third.p_value == pytest.approx(3 * single.p_value)
    assert second.p_value == 1.0
    assert first.num_comparisons == 3
    assert "(Holm over 3)" in str(first)
    assert first.interval == single.interval


def test_one_cluster_shows_nothing():
    base, other = random_reports(num_clusters=1, lift=0.4)
    comparison = compare(base, other, metric="mrr@10")
    assert comparison.difference > 0
    assert comparison.interval == (-1.0, 1.0)
    assert comparison.p_value == 1.0
    assert compare(base, base).interval == (0.0, 0.0)
    independent = dataclasses.replace(base, clusters=base.query_ids)
    assert compare(independent, other, metric="mrr@10").p_value < 0.01


def test_compare_refuses(report):
    qrels = {f"q{i}": {"d0": 1} for i in range(4, 14)}
    other = evaluate_run(Run.from_dict({"q4": {"d0": 1.0}}), qrels)
    with pytest.raises(
        ValueError, match=naming(4, ..., "base", ..., ["q0", "q1", "q2"], ..., 2, ..., "other", ..., ["q12", "q13"])
    ):
        compare(report, other)
    with pytest.raises(ValueError, match=naming("metric", "'ndcg@7'", "hit_rate@1", "map@100")):
        compare(report, report, metric="ndcg@7")
    with pytest.raises(ValueError, match=naming("compare", "base", "other")):
        compare(report)
    with pytest.raises(ValueError, match=naming("metric", "'mrr@10'", "ndcg@10")) as caught:
        compare(
            report, dataclasses.replace(report, per_query={"ndcg@10": report.per_query["ndcg@10"]}), metric="mrr@10"
        )
    assert not names(str(caught.value), "hit_rate@1")  # which they do not share
    for key, value in (("gain", "graded"), ("num_documents", 7), ("questions_sha256", "ab12")):
        first, second = (dataclasses.replace(report, setting={**report.setting, key: v}) for v in ("binary", value))
        with pytest.raises(ValueError, match=naming(key, "binary", ..., "base", ..., value, ..., "other")):
            compare(first, second)


# What was evaluated.


class NamedEmbedder(StoredEmbedder):
    """With what an `Embedder` says of itself."""

    max_length = 256

    def __init__(self, embeddings):
        super().__init__(embeddings)
        self.source, self.prompts = SimpleNamespace(name="org/my model"), {"query": "q: "}

    def sha256(self):
        return "ab12"


def test_a_report_names_its_model_and_data(tmp_path):
    dataset = toy_dataset()
    embeddings = toy_embedder(dataset, noise=1.0).embeddings
    report = evaluate(NamedEmbedder(embeddings), dataset)
    expected = {
        "model": "org/my model",
        "model_sha256": "ab12",
        "max_length": 256,
        "prompts": {"query": "q: "},
        "data_sha256": dataset.sha256(),
    }
    assert {name: report.setting[name] for name in expected} == expected
    report.save(tmp_path)
    assert (tmp_path / "run.trec").read_text().splitlines()[0].split()[-1] == "org/my-model"
    assert Report.load(tmp_path).setting == report.setting
    assert report.name == "org/my model"
    plain = evaluate(StoredEmbedder(embeddings), dataset)
    assert not {"model", "model_sha256", "max_length", "prompts"} & plain.setting.keys()
    assert dataclasses.replace(plain, setting={}).name == "model"
    assert dataclasses.replace(plain, setting={"index": "bm25"}).name == "bm25"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("max_length", (256, 128)),
        ("data_sha256", ("ab", "cd")),
        ("prompts", ({"query": "q: "}, None)),
    ],
)
def test_compare_warns_of_other_differences(report, key, values):
    first, second = (dataclasses.replace(report, setting={"model": "m", key: value}) for value in values)
    with pytest.warns(UserWarning, match=naming(key, values[0], ..., "base", ..., values[1], ..., "other")):
        compare(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(first, first)
        compare(first, dataclasses.replace(report, setting={}))  # saved by an earlier version
        for other in ({"dim": 7}, {"model": "n", "prompts": {"query": "other"}}):  # meant to differ
            compare(first, dataclasses.replace(first, setting={**first.setting, **other}))


def test_questions_are_told_apart_by_their_texts_alone():
    """A paired test over different questions means nothing; documents and judgements may have been corrected."""
    dataset = toy_dataset()
    run = Run.from_dict({"q0": {"d0": 1.0}})
    first = evaluate_run(run, dataset)
    others = {name: {**getattr(dataset, name)} for name in ("queries", "corpus", "qrels")}
    corrected = dataclasses.replace(dataset, corpus=others["corpus"] | {"d1": "corrected"})
    shuffled = dataclasses.replace(dataset, queries=dict(reversed(others["queries"].items())))
    without = dataclasses.replace(dataset, queries=others["queries"] | {"lonely": "not asked anyway"})
    for other in (corrected, shuffled, without):
        with pytest.warns(UserWarning, match=naming("data_sha256")):
            compare(first, evaluate_run(run, other))
    with pytest.raises(ValueError, match=naming("questions_sha256", "base", "other")):
        compare(first, evaluate_run(run, dataclasses.replace(dataset, queries=others["queries"] | {"q3": "other"})))


# Seeds.


def of_values(values, clusters=None) -> Report:
    query_ids = [f"q{i}" for i in range(len(values))]
    run = Run.from_dict({query_id: {} for query_id in query_ids})
    return Report(query_ids, {"mrr": np.array(values)}, clusters or query_ids, 0, {}, {}, run)


def test_wins_by_hand():
    values = [0.5, -0.1, 0.0, 0.2, 0.1 + 0.2 - 0.3, -1e-13]  # the last two are rounding errors
    found = compare(of_values([0.0] * 6), of_values(values), metric="mrr")
    assert (found.wins, found.ties, found.losses) == (2, 3, 1)


def test_compare_seeds_by_hand():
    # Differences 0, 2 and 2, 4: test_recipe_by_hand in test_significance.py.
    base, seeds = of_values([1.0, 1.0]), [of_values([1.0, 3.0]), of_values([3.0, 5.0])]
    found = compare_seeds([base], seeds, metric="mrr")
    reach = 4.302653 * np.sqrt(2)
    assert (found.base, found.other, found.difference) == (1.0, 3.0, 2.0)
    assert found.interval == pytest.approx((2 - reach, 2 + reach), abs=1e-5)
    assert found.p_value == pytest.approx(1 - np.sqrt(2) / 2)
    assert (found.question_error, found.seed_error) == pytest.approx((1.0, 1.0))
    assert (found.num_seeds, found.wins, found.ties, found.losses) == (2, 2, 0, 0)
    assert str(found).endswith("in 2 clusters, 2 seeds")
    # A base for each seed, with which half of the difference of the seeds goes.
    paired = compare_seeds([base, of_values([2.0, 2.0])], seeds, metric="mrr")
    assert (paired.base, paired.difference, paired.seed_error) == (1.5, 1.5, 0.5)


def test_compare_seeds_pairs_questions_by_id_and_uses_clusters():
    base = of_values([0.0, 0.5, 0.5, 1.0], ["a", "a", "b", "c"])
    first, second = of_values([0.5, 0.5, 1.0, 1.0]), of_values([0.0, 1.0, 1.0, 0.5])
    order = [3, 1, 0, 2]
    turned = dataclasses.replace(
        second,
        query_ids=[f"q{i}" for i in order],
        per_query={"mrr": second.per_query["mrr"][order]},
        run=second.run.select([f"q{i}" for i in order]),
    )
    found = compare_seeds([base], [first, turned], metric="mrr")
    assert found == compare_seeds([base], [first, second], metric="mrr")
    assert found.num_clusters == 3
    differences = [report.per_query["mrr"] - base.per_query["mrr"] for report in (first, second)]
    assert found.interval == recipe_interval(np.stack(differences), base.clusters)["interval"]


def test_compare_seeds_refuses():
    base, seeds = of_values([1.0, 1.0]), [of_values([1.0, 3.0]), of_values([3.0, 5.0]), of_values([1.0, 2.0])]
    with pytest.raises(ValueError, match=naming("base", 2, ..., "seeds", 3, 1, 3)):
        compare_seeds([base] * 2, seeds, metric="mrr")
    with pytest.raises(ValueError, match=naming((1, 2), "seeds", 2)):
        compare_seeds([base], seeds[:1], metric="mrr")
    with pytest.raises(ValueError, match=naming("metric", "'ndcg@10'", "mrr")):
        compare_seeds([base], seeds)
    with pytest.raises(ValueError, match=naming("cluster", 1, 2)):
        compare_seeds([of_values([1.0, 1.0], ["a", "a"])], seeds, metric="mrr")


@pytest.mark.parametrize("place", [".", ".."])
def test_a_report_of_which_some_files_are_replaced_is_refused(tmp_path, place):
    dataset, folder = toy_dataset(), tmp_path / "eval" / "bm25"
    evaluate(toy_embedder(dataset, 0.5), dataset).save(folder)
    (folder / place / REPLACING).touch()
    with pytest.raises(ValueError, match=naming((folder / place).resolve(), "new", "old")):
        Report.load(folder)
