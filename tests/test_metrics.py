"""metrics.py against arithmetic by hand, a naive reimplementation, and trec_eval."""

import math

import numpy as np
import pytest

from embedft.retrieval.metrics import (
    average_precision,
    hit_rate,
    judge,
    mrr,
    ndcg,
    per_query_metrics,
    precision,
    recall,
)
from embedft.retrieval.run import Run


def ranked_run(rankings: dict[str, list[str]]) -> Run:
    """A run with exactly these rankings; scores fall by one a rank."""
    return Run.from_dict({q: {d: -float(rank) for rank, d in enumerate(ds)} for q, ds in rankings.items()})


def random_case(rng: np.random.Generator, num_queries: int):
    """Results with many ties, and graded qrels: empty rankings, queries only in one of the two, none relevant."""
    documents = [f"d{i:02d}" for i in range(25)]
    results, qrels = {}, {}
    for i in range(num_queries):
        if rng.random() < 0.95:
            retrieved = rng.choice(documents, size=rng.integers(0, 20), replace=False)
            results[f"q{i}"] = {str(d): float(rng.integers(0, 6)) / 3 for d in retrieved}
        if rng.random() < 0.95:
            judged = rng.choice([*documents, "x1", "x2"], size=rng.integers(0, 15), replace=False)
            qrels[f"q{i}"] = {str(d): int(rng.integers(0, 4)) for d in judged}
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
        (average_precision, 100, (1 / 2 + 2 / 4) / 3),  # 1/2 at rank 2 and 2/4 at rank 4; min(100, 3) = 3
        # DCG@2 = 1/log2(3) = 0.6309; the ideal has hits at ranks 1 and 2: 1 + 0.6309 = 1.6309
        (ndcg, 2, 0.6309297535714575 / 1.6309297535714575),
        # DCG@5 = 1/log2(3) + 1/log2(5) = 0.6309 + 0.4307; ideal, three relevant: 1 + 0.6309 + 1/log2(4) = 2.1309
        (ndcg, 5, (0.6309297535714575 + 0.43067655807339306) / 2.1309297535714578),
    ],
)
def test_by_hand(metric, k, expected):
    np.testing.assert_allclose(metric(HAND, k), [expected], atol=1e-12)


def test_graded_ndcg_by_hand():
    # Retrieved: a (grade 1), b (3). Relevant besides: c (2), not retrieved.
    judgments = judge(ranked_run({"q": ["a", "b"]}), {"q": {"a": 1, "b": 3, "c": 2}})
    # DCG@2 = 1/1 + 3/log2(3); ideal 3, 2: 3/1 + 2/log2(3)
    expected = (1 + 3 / math.log2(3)) / (3 + 2 / math.log2(3))
    np.testing.assert_allclose(ndcg(judgments, 2, gain="graded"), [expected], atol=1e-12)
    np.testing.assert_allclose(ndcg(judgments, 2, gain="binary"), [1.0], atol=1e-12)
    with pytest.raises(ValueError, match="unknown gain 'exponential'; valid: binary, graded"):
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
    with pytest.raises(ValueError, match="none of the 4 queries has a relevant document"):
        judge(run, {"zero": {"a": 0}})


@pytest.mark.parametrize("rankings", [{"q": []}, {"q": ["x"]}])
def test_nothing_found_is_zero_everywhere(rankings):
    values = per_query_metrics(judge(ranked_run(rankings), {"q": {"a": 1, "b": 1}}), ks=(1, 10), depth=100)
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
    values = per_query_metrics(judgments, ks=ks, depth=depth, gain=gain)
    relevant = [q for q in results if any(grade > 0 for grade in qrels.get(q, {}).values())]
    assert judgments.query_ids == relevant
    assert judgments.num_without_relevant == len(results) - len(relevant)
    for row, query_id in enumerate(relevant):
        ranking = sorted(results[query_id], key=lambda d, scores=results[query_id]: (-scores[d], d))
        expected = naive_metrics(ranking, qrels[query_id], ks, depth, gain)
        assert {name: value[row] for name, value in values.items()} == pytest.approx(expected, abs=1e-12)


def trec_ordered_run(results: dict[str, dict[str, float]]) -> Run:
    """A run in trec_eval's order: by score as float32, then by descending document id."""
    rankings = {
        q: sorted(scores, key=lambda d, scores=scores: (np.float32(scores[d]), d), reverse=True)
        for q, scores in results.items()
    }
    return ranked_run(rankings)


@pytest.mark.parametrize("gain", ["binary", "graded"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_trec_eval(seed, gain):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    results, qrels = random_case(np.random.default_rng(100 + seed), 1000)
    judgments = judge(trec_ordered_run(results), qrels)
    trec_qrels = {q: {d: int(g > 0) if gain == "binary" else g for d, g in row.items()} for q, row in qrels.items()}
    ks = [1, 3, 5, 10]
    cuts = ",".join(map(str, ks))
    measures = {f"{name}.{cuts}" for name in ("P", "recall", "success", "ndcg_cut", "map_cut")} | {"recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(trec_qrels, measures).evaluate(results)
    rows = [row for row, query_id in enumerate(judgments.query_ids) if results[query_id]]  # it has no empty rankings
    query_ids = [judgments.query_ids[row] for row in rows]
    assert len(rows) > 700

    def check(values, measure, scale=1.0):
        ours = values[rows] * scale
        np.testing.assert_allclose(ours, [expected[q][measure] for q in query_ids], rtol=0, atol=1e-9)

    num_relevant = np.array([sum(g > 0 for g in qrels[q].values()) for q in query_ids])
    for k in ks:
        check(precision(judgments, k), f"P_{k}")
        check(recall(judgments, k), f"recall_{k}")
        check(hit_rate(judgments, k), f"success_{k}")
        check(ndcg(judgments, k, gain=gain), f"ndcg_cut_{k}")
        # trec_eval divides by all relevant documents, we by at most k of them: times min(k, R) / R.
        check(average_precision(judgments, k), f"map_cut_{k}", np.minimum(num_relevant, k) / num_relevant)
    check(mrr(judgments, 1000), "recip_rank")
    # trec_eval has no cut for it; where the first hit is behind the cut, ours is 0.
    whole = mrr(judgments, 1000)
    np.testing.assert_allclose(mrr(judgments, 3), np.where(whole >= 1 / 3 - 1e-12, whole, 0.0))
