"""metrics.py against arithmetic by hand, a naive reimplementation, and trec_eval."""

import math
from functools import partial

import numpy as np
import pytest
from naming import naming

from embedft.retrieval.metrics import (
    METRICS,
    average_precision,
    hit_rate,
    judge,
    judged,
    measure,
    mrr,
    ndcg,
    precision,
    r_precision,
    recall,
    select_metrics,
)
from embedft.retrieval.run import Run


def ranked_run(rankings: dict[str, list[str]]) -> Run:
    """A run with exactly these rankings; scores fall by one per rank."""
    return Run.from_dict({q: {d: -float(rank) for rank, d in enumerate(ds)} for q, ds in rankings.items()})


def random_case(rng: np.random.Generator, num_queries: int):
    """Results with many ties, some only as float32, and graded qrels, with grades of 0 and below.

    Among them empty rankings, queries only in one of the two, with nothing relevant, with nothing judged.
    """
    documents = [f"d{i:02d}" for i in range(23)] + ["ü", "Z"]
    results, qrels = {}, {}
    for i in range(num_queries):
        if rng.random() < 0.95:
            retrieved = rng.choice(documents, size=rng.integers(0, 20), replace=False)
            results[f"q{i}"] = {str(d): rng.integers(0, 6) / 3 + rng.integers(0, 3) * 1e-10 for d in retrieved}
        if rng.random() < 0.95:
            graded = rng.choice([*documents, "x1", "x2"], size=rng.integers(0, 15), replace=False)
            qrels[f"q{i}"] = {str(d): int(rng.integers(-2, 4)) for d in graded}
    return results, qrels


# One query: retrieved a b c d e, relevant b d and z, z not retrieved. Hits stand at ranks 2 and 4.
HAND = judge(ranked_run({"q": list("abcde")}), {"q": {"b": 1, "d": 1, "z": 1, "a": 0}})


@pytest.mark.parametrize(
    ("metric", "k", "expected"),
    [
        (hit_rate, 1, 0.0),
        (hit_rate, 3, 1.0),
        (precision, 3, 1 / 3),
        (precision, 5, 2 / 5),
        (precision, 10, 2 / 10),  # five retrieved: still by k
        (recall, 3, 1 / 3),
        (recall, 5, 2 / 3),
        (mrr, 1, 0.0),
        (mrr, 5, 1 / 2),
        (average_precision, 2, (1 / 2) / 2),  # precision 1/2 at rank 2; min(2, 3 relevant) = 2
        (average_precision, None, (1 / 2 + 2 / 4) / 3),
        (mrr, None, 1 / 2),
        (judged, 1, 1.0),  # a has grade 0
        (judged, 3, 2 / 3),  # a and b
        (judged, 10, 3 / 10),  # a, b, d of five retrieved: by k, as precision
        (average_precision, 100, (1 / 2 + 2 / 4) / 3),  # 1/2 at rank 2 and 2/4 at rank 4; min(100, 3) = 3
        # DCG@2 = 1/log2(3) = 0.6309; the ideal has hits at ranks 1 and 2: 1 + 0.6309 = 1.6309
        (ndcg, 2, 0.6309297535714575 / 1.6309297535714575),
        # DCG@5 = 1/log2(3) + 1/log2(5) = 0.6309 + 0.4307; ideal, three relevant: 1 + 0.6309 + 1/log2(4) = 2.1309
        (ndcg, 5, (0.6309297535714575 + 0.43067655807339306) / 2.1309297535714578),
        (ndcg, None, (0.6309297535714575 + 0.43067655807339306) / 2.1309297535714578),
    ],
)
def test_by_hand(metric, k, expected):
    np.testing.assert_allclose(metric(HAND, k), [expected], atol=1e-12)


def test_r_precision_by_hand():
    # Three relevant (b, d, z), b among the first three: 1/3. Were a ranking shorter than R, R still divides.
    np.testing.assert_allclose(r_precision(HAND), [1 / 3])
    short = judge(ranked_run({"q": ["b"], "p": ["a", "b"]}), {"q": {"b": 1, "c": 2, "d": 1}, "p": {"b": 1, "a": -1}})
    np.testing.assert_allclose(r_precision(short), [1 / 3, 0.0])


def test_judged_counts_every_grade():
    run = ranked_run({"q": ["a", "b", "c"], "p": ["a"], "empty": []})
    judgments = judge(run, {"q": {"a": -1, "b": 0, "z": 1}, "p": {"z": 1}, "empty": {"a": 1}})
    np.testing.assert_allclose(judged(judgments, 3), [2 / 3, 0.0, 0.0])
    np.testing.assert_array_equal(judgments.grades_QK, np.zeros((3, 3)))  # a grade below 0 is not relevant


def test_metrics_by_name():
    values = measure(HAND, ["ndcg@2", "rprec", "map", "map@2", "judged@3", "accuracy@3", "mrr", "ndcg"])
    assert {name: value.tolist() for name, value in values.items()} == {
        "ndcg@2": ndcg(HAND, 2).tolist(),
        "rprec": [1 / 3],
        "map": average_precision(HAND).tolist(),
        "map@2": [1 / 4],
        "judged@3": [2 / 3],
        "accuracy@3": [1.0],
        "mrr": [1 / 2],
        "ndcg": ndcg(HAND).tolist(),
    }
    assert measure(HAND, []) == {}
    judgments = judge(ranked_run({"q": ["a", "b"]}), {"q": {"a": 1, "b": 3}})
    values = measure(judgments, ["ndcg@2", "ndcg"], gain="graded")
    assert values["ndcg@2"] == values["ndcg"] == ndcg(judgments, 2, gain="graded") != ndcg(judgments, 2)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("ndgc@10", ("metric", "'ndgc@10'", "hit_rate", "judged")),
        ("", ("metric", "''", "hit_rate", "judged")),
        ("precision", ("metric", "'precision'", "cutoff", 1, "precision@10")),
        ("judged", ("metric", "'judged'", "cutoff", 1, "judged@10")),
        ("rprec@5", ("metric", "'rprec@5'", "no", "cutoff")),
        ("ndcg@0", ("metric", "'ndcg@0'", "cutoff", 1)),
        ("map@", ("metric", "'map@'", "cutoff", 1)),
        ("map@1e2", ("metric", "'map@1e2'", "cutoff", 1)),
        (partial(mrr, k=3), ("metric", "functools.partial", "name", "function")),
        (lambda judgments: None, ("metric", "lambda", "name", "function")),
        (3, ("metric", 3, "name", "function")),
    ],
)
def test_invalid_metrics(name, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        measure(HAND, ["map", name])
    with pytest.raises(ValueError, match=naming(*facts)):
        select_metrics([name], ks=(), depth=100)


def test_a_metric_of_ones_own():
    def first_grade(judgments, k=None):
        assert k is None
        return judgments.grades_QK[:, 0]

    def graded(judgments, k=None, *, gain="none"):
        return np.full(len(judgments.query_ids), len(gain) if k is None else k)

    judgments = judge(ranked_run({"q": ["a", "b"], "p": ["b"]}), {"q": {"a": 3}, "p": {"a": 1}})
    values = measure(judgments, [first_grade, graded, "mrr"], gain="graded")
    assert {name: value.tolist() for name, value in values.items()} == {
        "first_grade": [3.0, 0.0],
        "graded": [6.0, 6.0],
        "mrr": [1.0, 0.0],
    }
    assert all(value.dtype == np.float64 for value in values.values())


def test_one_line_registers_a_metric(monkeypatch):
    monkeypatch.setitem(METRICS, "cutoff", lambda judgments, k: np.full(len(judgments.query_ids), k))
    assert measure(HAND, ["cutoff@7"])["cutoff@7"].tolist() == [7.0]
    with pytest.raises(ValueError, match=naming("metric", "'cutoff'", 1, "cutoff@10")):
        measure(HAND, ["cutoff"])


def test_a_metric_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "by_path.py").write_text(
        "import numpy as np\ndef cutoff(judgments, k=3): return np.full(1, k)\nX = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(measure(HAND, ["by_path.cutoff@7", "by_path.cutoff"]).items()) == [
        ("by_path.cutoff@7", [7.0]),
        ("by_path.cutoff", [3.0]),
    ]
    with pytest.raises(ValueError, match=naming("metric", "'by_path.X'", "module.function")):
        measure(HAND, ["by_path.X"])
    with pytest.raises(ValueError, match=naming("by_path.none", "AttributeError")):
        measure(HAND, ["by_path.none@5"])
    with pytest.raises(ValueError, match=naming("no_such_module.x", "PYTHONPATH")):
        measure(HAND, ["no_such_module.x"])


def test_values_of_ones_own_metric_are_checked():
    for values in (np.ones(2), np.ones((1, 1)), [math.nan], 1.0):

        def mine(judgments, k=None, values=values):
            return values

        with pytest.raises(ValueError, match=naming("metric", "'mine'", np.shape(values), 1, "finite")):
            measure(HAND, [mine])

    def ndcg(judgments, k=None):
        return np.ones(1)

    with pytest.raises(ValueError, match=naming("two", "metrics", "'ndcg'")):
        measure(HAND, ["ndcg", ndcg])


def test_the_metrics_of_an_evaluation():
    assert select_metrics(ks=(1, 5), depth=7) == [
        *("hit_rate@1", "accuracy@1", "precision@1", "recall@1", "mrr@1", "ndcg@1"),
        *("hit_rate@5", "accuracy@5", "precision@5", "recall@5", "mrr@5", "ndcg@5"),
        "map@7",
    ]
    assert select_metrics(["ndcg@7", "rprec", mrr], ks=(50,), depth=7) == ["ndcg@7", "rprec", mrr]
    with pytest.raises(ValueError, match=naming("metric", "'ndcg@8'", 8, "depth", 7)):
        select_metrics(["map", "ndcg@8"], ks=(1,), depth=7)
    for ks in ((), (0, 1), (8,)):
        with pytest.raises(ValueError, match=naming("ks", ks, 1, "depth", 7)):
            select_metrics(ks=ks, depth=7)
    for metrics in ([], "ndcg@5"):
        with pytest.raises(ValueError, match=naming("metrics", repr(metrics), "list")):
            select_metrics(metrics, ks=(1,), depth=7)


def test_grades_that_are_no_numbers_are_refused():
    run = ranked_run({"p": ["a"], "q": ["a"]})
    for grade in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=naming("qrels", "'q'", "grade", grade, "finite")):
            judge(run, {"p": {"a": 1}, "q": {"a": 1, "b": grade}})
        with pytest.raises(ValueError, match=naming("qrels", "'q'", "grade", grade, "finite")):
            judge(run, {"p": {"a": 1}, "q": {"b": grade}})  # which is not a query without relevant documents


def test_graded_ndcg_by_hand():
    # Retrieved: a (grade 1), b (3). Relevant besides: c (2), not retrieved.
    judgments = judge(ranked_run({"q": ["a", "b"]}), {"q": {"a": 1, "b": 3, "c": 2}})
    # DCG@2 = 1/1 + 3/log2(3); ideal 3, 2: 3/1 + 2/log2(3)
    expected = (1 + 3 / math.log2(3)) / (3 + 2 / math.log2(3))
    np.testing.assert_allclose(ndcg(judgments, 2, gain="graded"), [expected], atol=1e-12)
    np.testing.assert_allclose(ndcg(judgments, 2, gain="binary"), [1.0], atol=1e-12)
    with pytest.raises(ValueError, match=naming("gain", "'exponential'", "binary", "graded")):
        ndcg(judgments, 2, gain="exponential")


def test_perfect_ranking_is_one_at_every_cutoff():
    judgments = judge(ranked_run({"q": ["a", "b", "c"]}), {"q": {"a": 3, "b": 2, "c": 1}})
    for k in (1, 2, 3, 50):
        for metric in (hit_rate, mrr, ndcg, average_precision):
            assert metric(judgments, k)[0] == pytest.approx(1.0, abs=1e-12)
        assert ndcg(judgments, k, gain="graded")[0] == pytest.approx(1.0, abs=1e-12)


def test_queries_without_relevant_documents_are_dropped_and_counted():
    run = ranked_run({"none": ["a"], "zero": ["a"], "good": ["b", "a"], "empty": []})
    judgments = judge(run, {"zero": {"a": 0}, "good": {"a": 1}, "empty": {"a": 2}, "elsewhere": {"a": 1}})
    assert judgments.query_ids == ["good", "empty"]
    assert judgments.num_without_relevant == 2
    np.testing.assert_array_equal(mrr(judgments, 10), [0.5, 0.0])
    with pytest.raises(ValueError, match=naming(4, "queries", "relevant")):
        judge(run, {"zero": {"a": 0}})


@pytest.mark.parametrize("rankings", [{"q": []}, {"q": ["x"]}])
def test_nothing_found_is_zero_everywhere(rankings):
    values = measure(judge(ranked_run(rankings), {"q": {"a": 1, "b": 1}}), select_metrics(ks=(1, 10), depth=100))
    assert len(values) == 2 * 6 + 1
    assert all(value.tolist() == [0.0] for value in values.values())


def naive_metrics(ranking: list[str], grades: dict[str, int], ks: list[int], depth: int, gain: str) -> dict[str, float]:
    relevant = {d for d, grade in grades.items() if grade > 0}
    gain_of = {d: (grades[d] if gain == "graded" else 1) for d in relevant}
    values = {}
    for k in ks:
        hits = [rank for rank, d in enumerate(ranking[:k], start=1) if d in relevant]
        dcg = sum(gain_of[ranking[rank - 1]] / math.log2(rank + 1) for rank in hits)
        ideal = sorted(gain_of.values(), reverse=True)[:k]
        values[f"hit_rate@{k}"] = values[f"accuracy@{k}"] = float(len(hits) > 0)
        values[f"precision@{k}"] = len(hits) / k
        values[f"recall@{k}"] = len(hits) / len(relevant)
        values[f"mrr@{k}"] = 1 / hits[0] if hits else 0.0
        values[f"ndcg@{k}"] = dcg / sum(g / math.log2(rank + 1) for rank, g in enumerate(ideal, start=1))
    hits = [rank for rank, d in enumerate(ranking[:depth], start=1) if d in relevant]
    values[f"map@{depth}"] = sum((i + 1) / rank for i, rank in enumerate(hits)) / min(depth, len(relevant))
    return values


@pytest.mark.parametrize("gain", ["binary", "graded"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_naive_reimplementation(seed, gain):
    results, qrels = random_case(np.random.default_rng(seed), 200)
    judgments = judge(Run.from_dict(results), qrels)
    ks, depth = [1, 2, 3, 7, 30], 12
    names = [name for name in select_metrics(ks=ks, depth=30) if name != "map@30"]
    values = measure(judgments, [*names, f"map@{depth}"], gain=gain)
    relevant = [q for q in results if any(grade > 0 for grade in qrels.get(q, {}).values())]
    assert judgments.query_ids == relevant
    assert judgments.num_without_relevant == len(results) - len(relevant)
    for row, query_id in enumerate(relevant):
        ranking = sorted(results[query_id], key=lambda d, scores=results[query_id]: (-scores[d], d))
        expected = naive_metrics(ranking, qrels[query_id], ks, depth, gain)
        assert {name: value[row] for name, value in values.items()} == pytest.approx(expected, abs=1e-12)


def in_trec_eval_order(results) -> Run:
    """Scores rounded to float32, equal ones by descending id; the score of a rank stands for its own."""
    by_rank = {}
    for query_id, row in results.items():
        ranking = sorted(
            row, key=lambda document_id, row=row: (np.float32(row[document_id]), document_id), reverse=True
        )
        by_rank[query_id] = {document_id: -float(rank) for rank, document_id in enumerate(ranking)}
    return Run.from_dict(by_rank)


@pytest.mark.parametrize("gain", ["binary", "graded"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_trec_eval(seed, gain):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    results, qrels = random_case(np.random.default_rng(100 + seed), 1000)
    run = in_trec_eval_order(results)
    judgments = judge(run, qrels)
    # Its C code may crash on grades below -1, and gives them the meaning of -1.
    trec_qrels = {
        q: {d: int(g > 0) if gain == "binary" else max(g, -1) for d, g in row.items()} for q, row in qrels.items()
    }
    ks = [1, 2, 3, 5, 10, 30]
    cuts = ",".join(map(str, ks))
    of_each = {"P": "precision", "recall": "recall", "success": "hit_rate", "ndcg_cut": "ndcg"}
    whole = {"recip_rank": "mrr", "map": "map", "ndcg": "ndcg", "Rprec": "rprec"}
    measures = {f"{name}.{cuts}" for name in (*of_each, "map_cut")} | whole.keys()
    expected = pytrec_eval.RelevanceEvaluator(trec_qrels, measures).evaluate(results)
    rows = [row for row, query_id in enumerate(judgments.query_ids) if results[query_id]]  # it has no empty rankings
    assert len(rows) > 700

    names = whole | {f"{theirs}_{k}": f"{ours}@{k}" for theirs, ours in of_each.items() for k in ks}
    values = measure(judgments, list(names.values()), gain=gain)
    # Its map_cut divides by all relevant documents, as does map without a cutoff over a run that is cut.
    for k in ks:
        cut = Run(run.query_ids, run.document_ids, run.indices[:, :k], run.scores[:, :k])
        values[f"map_cut_{k}"] = average_precision(judge(cut, qrels))
    for theirs, ours in {**names, **{f"map_cut_{k}": f"map_cut_{k}" for k in ks}}.items():
        found = [expected[judgments.query_ids[row]][theirs] for row in rows]
        np.testing.assert_allclose(values[ours][rows], found, rtol=0, atol=1e-9, err_msg=theirs)
    # trec_eval has no cut for the reciprocal rank; where the first hit is behind the cut, ours is 0.
    reciprocal = values["mrr"]
    np.testing.assert_allclose(mrr(judgments, 3), np.where(reciprocal >= 1 / 3 - 1e-12, reciprocal, 0.0))


def test_trec_eval_orders_ties_as_said():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    results, qrels = {"q": {"d1": 1.0, "d10": 1.0, "d2": 1.0 - 1e-10, "ü": 0.5, "z": 0.5}}, {"q": {"d1": 1, "z": 1}}
    run = Run.from_dict(results)
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"map"}).evaluate(results)["q"]["map"]
    # d2 d10 d1 ü z: 1/3 at rank 3 and 2/5 at rank 5. By ascending id as float64 d1 is first and z fourth.
    assert expected == pytest.approx((1 / 3 + 2 / 5) / 2)
    assert measure(judge(in_trec_eval_order(results), qrels), ["map"])["map"] == pytest.approx(expected)
    assert measure(judge(run, qrels), ["map"])["map"] == pytest.approx((1 / 1 + 2 / 4) / 2)
