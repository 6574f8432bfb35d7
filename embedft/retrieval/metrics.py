"""Retrieval metrics per query, in NumPy alone; means come last and elsewhere (evaluate.py).

Conventions, for every metric here:
- A document is relevant to a query when its grade is above 0. What the qrels do not mention is not relevant. For
  metrics of "relevant from grade 2 on", set lower grades to 0.
- Ranks count from 1 in the order of the run; ties were settled when the run was made (`Run.reordered` changes that).
- A ranking shorter than k is taken as it is: what is missing is not relevant, precision still divides by k.
- Queries without a relevant document have no value: `judge` drops and counts them.

    judgments = judge(run, {"q1": {"d3": 1}})
    values_Q = ndcg(judgments, 10)
    by_name = measure(judgments, ["ndcg@20", "rprec", "map", "judged@10"])

Shapes: Q judged queries, K ranks of the run, J pairs of a query and a document that the qrels grade, P relevant ones.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .run import Run

Qrels = Mapping[str, Mapping[str, float]]
Gain = Literal["binary", "graded"]
Denominator = Literal["cutoff", "relevant"]


@dataclass(frozen=True, eq=False)
class Judgments:
    """What metrics need to know of a run and its qrels, as arrays.

    Args:
        query_ids: Q queries of the run that have a relevant document, in the run's order.
        num_without_relevant: how many queries of the run have none.
        grades_QK: [Q, K] float64, the grade of the document at each rank, 0 where it is not relevant.
        judged_QK: [Q, K] bool, whether the qrels grade the document at each rank, as 0 or less too.
        pair_query_P: [P] int64, the row of the query of each relevant pair, ascending.
        pair_grade_P: [P] float64, its grade, descending within a query.
    """

    query_ids: list[str]
    num_without_relevant: int
    grades_QK: np.ndarray
    judged_QK: np.ndarray
    pair_query_P: np.ndarray
    pair_grade_P: np.ndarray

    @property
    def num_relevant_Q(self) -> np.ndarray:
        return np.bincount(self.pair_query_P, minlength=len(self.query_ids))


def has_relevant(grades: Mapping[str, float]) -> bool:
    """Whether any document of {document id: grade} is relevant; NaN counts as such, for `judge` to refuse."""
    return any(not grade <= 0 for grade in grades.values())


def judge(run: Run, qrels: Qrels) -> Judgments:
    """Looks up the grade of every retrieved document.

    Queries of the qrels that the run lacks are not seen here; `Run.select` adds them as empty rows. Relevant documents
    that the run does not know count as relevant and not retrieved.

    Raises:
        ValueError: when no query of the run has a relevant document, or a grade is not a finite number.
    """
    rows = [row for row, query_id in enumerate(run.query_ids) if has_relevant(qrels.get(query_id, {}))]
    kept = [run.query_ids[row] for row in rows]
    if not kept:
        raise ValueError(f"none of the {len(run.query_ids)} queries has a relevant document: nothing can be measured")
    indices_QK = run.indices[rows]
    index_of = {document_id: index for index, document_id in enumerate(run.document_ids)}
    unknown = len(index_of)  # no index of the run is this one
    query_J = np.repeat(np.arange(len(kept)), [len(qrels[query_id]) for query_id in kept])
    document_J = np.array([index_of.get(document_id, unknown) for query_id in kept for document_id in qrels[query_id]])
    grade_J = np.array([grade for query_id in kept for grade in qrels[query_id].values()], dtype=np.float64)
    if not np.isfinite(grade_J).all():
        query_id = kept[query_J[~np.isfinite(grade_J)][0]]
        raise ValueError(f"qrels: query {query_id!r} has a grade that is not a finite number")

    # A pair as one integer: a binary search over the J judged ones then finds the grade of every [Q, K] at once.
    key_J = query_J * (unknown + 1) + document_J
    order_J = np.argsort(key_J)
    sorted_key_J, sorted_grade_J = key_J[order_J], np.maximum(grade_J[order_J], 0.0)
    key_QK = np.where(indices_QK < 0, -1, np.arange(len(kept))[:, None] * (unknown + 1) + indices_QK)
    place_QK = np.searchsorted(sorted_key_J[:-1], key_QK)  # without the last one, so that every place exists
    judged_QK = sorted_key_J[place_QK] == key_QK
    grades_QK = np.where(judged_QK, sorted_grade_J[place_QK], 0.0)

    query_P, grade_P = query_J[grade_J > 0], grade_J[grade_J > 0]
    best_first_P = np.lexsort((-grade_P, query_P))
    num_without_relevant = len(run.query_ids) - len(kept)
    return Judgments(kept, num_without_relevant, grades_QK, judged_QK, query_P[best_first_P], grade_P[best_first_P])


def hit_rate(judgments: Judgments, k: int) -> np.ndarray:
    """1 when any of the first k documents is relevant, else 0. [Q] float64.

    Also called accuracy@k (sentence-transformers) and success@k (trec_eval).

    Source: trec_eval `m_success.c`; sentence-transformers `InformationRetrievalEvaluator`, accuracy@k.
    """
    return (judgments.grades_QK[:, :k] > 0).any(axis=1).astype(np.float64)


def precision(judgments: Judgments, k: int) -> np.ndarray:
    """(relevant documents among the first k) / k, also where fewer than k were retrieved. [Q] float64.

    Source: trec_eval `m_P.c`.
    """
    return (judgments.grades_QK[:, :k] > 0).sum(axis=1) / k


def recall(judgments: Judgments, k: int) -> np.ndarray:
    """(relevant documents among the first k) / (all relevant documents of the query). [Q] float64.

    Source: trec_eval `m_recall.c`.
    """
    return (judgments.grades_QK[:, :k] > 0).sum(axis=1) / judgments.num_relevant_Q


def r_precision(judgments: Judgments) -> np.ndarray:
    """(relevant documents among the first R) / R, R the query's number of relevant documents. [Q] float64.

    Source: trec_eval `m_Rprec.c`; Buckley & Voorhees, "Evaluating Evaluation Measure Stability", SIGIR 2000.
    """
    num_relevant_Q = judgments.num_relevant_Q
    relevant_QK = judgments.grades_QK > 0
    return (relevant_QK & (_ranks(relevant_QK) <= num_relevant_Q[:, None])).sum(axis=1) / num_relevant_Q


def judged(judgments: Judgments, k: int) -> np.ndarray:
    """(documents among the first k that the qrels grade, as 0 or less too) / k, as precision divides. [Q] float64.

    How much of what was measured rests on a judgment; where it differs between two runs, so may their metrics by that
    alone. For queries with a relevant document, as every metric here.

    Source: ir_measures, `Judged@k`.
    """
    return judgments.judged_QK[:, :k].sum(axis=1) / k


def mrr(judgments: Judgments, k: int | None = None) -> np.ndarray:
    """Reciprocal rank: 1 / (rank of the first relevant document among the first k), 0 when there is none. [Q] float64.

    Without k over the whole ranking, trec_eval's recip_rank.

    Source: Voorhees, "The TREC-8 Question Answering Track Report", 1999.
    """
    relevant_QK = judgments.grades_QK[:, :k] > 0
    return (relevant_QK / _ranks(relevant_QK)).max(axis=1, initial=0.0)


def average_precision(judgments: Judgments, k: int | None = None, *, denominator: Denominator = "cutoff") -> np.ndarray:
    """Sum of precision@i over the ranks i <= k of relevant documents, / a number of relevant documents. [Q] float64.

    Without k over the whole ranking and by all relevant documents, trec_eval's map.

    Args:
        denominator: "cutoff": min(k, relevant documents), so that the best ranking has 1 (sentence-transformers).
            "relevant": all of them, so that a query with more than k cannot reach 1 (trec_eval's map_cut). The two are
            equal where no query has more than k.

    Source: sentence-transformers `InformationRetrievalEvaluator`, map@k; trec_eval `m_map.c`, `m_map_cut.c`; Buckley &
    Voorhees, "Evaluating Evaluation Measure Stability", SIGIR 2000.
    """
    if denominator not in ("cutoff", "relevant"):
        raise ValueError(f"unknown denominator {denominator!r}; valid: cutoff, relevant")
    relevant_QK = judgments.grades_QK[:, :k] > 0
    precision_QK = np.cumsum(relevant_QK, axis=1) / _ranks(relevant_QK)
    best_Q = judgments.num_relevant_Q
    if k is not None and denominator == "cutoff":
        best_Q = np.minimum(best_Q, k)
    return (precision_QK * relevant_QK).sum(axis=1) / best_Q


def ndcg(judgments: Judgments, k: int | None = None, *, gain: Gain = "binary") -> np.ndarray:
    """DCG@k / ideal DCG@k, where DCG@k = sum over ranks i <= k of gain_i / log2(i + 1). [Q] float64.

    The ideal ranking holds the query's relevant documents by descending gain, retrieved or not, cut at k. Without k
    both are whole, trec_eval's ndcg.

    Args:
        gain: "binary": 1 for a relevant document (sentence-transformers). "graded": its grade (trec_eval's ndcg_cut,
            BEIR), not 2^grade - 1.

    Source: Jarvelin & Kekalainen, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 2002; trec_eval
    `m_ndcg_cut.c`.
    """
    if gain not in ("binary", "graded"):
        raise ValueError(f"unknown gain {gain!r}; valid: binary, graded")
    grades_QK, grade_P = judgments.grades_QK[:, :k], judgments.pair_grade_P
    if gain == "binary":
        grades_QK, grade_P = grades_QK > 0, grade_P > 0
    dcg_Q = (grades_QK / np.log2(_ranks(grades_QK) + 1)).sum(axis=1)

    # Pairs are grouped by query, best first: a pair's ideal rank is its distance from where its query starts.
    num_relevant_Q = judgments.num_relevant_Q
    start_Q = np.cumsum(num_relevant_Q) - num_relevant_Q
    rank_P = np.arange(1, len(grade_P) + 1) - start_Q[judgments.pair_query_P]
    ideal_P = grade_P / np.log2(rank_P + 1)
    if k is not None:
        ideal_P = np.where(rank_P <= k, ideal_P, 0.0)
    return dcg_Q / np.bincount(judgments.pair_query_P, weights=ideal_P, minlength=len(judgments.query_ids))


class _Metric(NamedTuple):
    function: Callable[..., np.ndarray]
    cutoff: Literal["needed", "optional", "none"] = "needed"
    options: tuple[str, ...] = ()  # those of `measure` that it takes


METRICS = {
    "hit_rate": _Metric(hit_rate),
    "accuracy": _Metric(hit_rate),
    "precision": _Metric(precision),
    "recall": _Metric(recall),
    "mrr": _Metric(mrr, "optional"),
    "ndcg": _Metric(ndcg, "optional", ("gain",)),
    "map": _Metric(average_precision, "optional", ("denominator",)),
    "rprec": _Metric(r_precision, "none"),
    "judged": _Metric(judged),
}


def measure(
    judgments: Judgments, names: Sequence[str], *, gain: Gain = "binary", denominator: Denominator = "cutoff"
) -> dict[str, np.ndarray]:
    """The metrics of these names, as {"ndcg@20": [Q] float64, ...}.

    A name is a metric (METRICS) and a cutoff, "ndcg@20". ndcg, map and mrr also stand without one for the whole
    ranking, rprec always does. accuracy is another name of hit_rate.

    Args:
        gain: of ndcg.
        denominator: of map, see `average_precision`.

    Raises:
        ValueError: on an unknown name (listing the valid ones), or a cutoff that is missing, not wanted or below 1.
    """
    options = {"gain": gain, "denominator": denominator}
    values = {}
    for name in names:
        function, k, taken = _parse_name(name)
        arguments = () if k is None else (k,)
        values[name] = function(judgments, *arguments, **{option: options[option] for option in taken})
    return values


def per_query_metrics(
    judgments: Judgments, *, ks: Sequence[int], depth: int, gain: Gain = "binary"
) -> dict[str, np.ndarray]:
    """The metrics of a report, as {"ndcg@10": [Q] float64, ...}.

    Keys: hit_rate@k and accuracy@k (the same values under both names), precision@k, recall@k, mrr@k and ndcg@k for
    each k of `ks`, and map@depth.
    """
    of_each = ("hit_rate", "accuracy", "precision", "recall", "mrr", "ndcg")
    return measure(judgments, [*(f"{name}@{k}" for k in ks for name in of_each), f"map@{depth}"], gain=gain)


def _parse_name(name: str) -> tuple[Callable[..., np.ndarray], int | None, tuple[str, ...]]:
    """The function of a metric's name, its cutoff and the options it takes."""
    metric, at, cutoff = name.partition("@")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {name!r}; valid, with a cutoff as in ndcg@10: {', '.join(METRICS)}")
    function, wanted, options = METRICS[metric]
    if not at:
        if wanted == "needed":
            raise ValueError(f"metric {name!r} needs a cutoff, as in {metric}@10")
        return function, None, options
    if wanted == "none":
        raise ValueError(f"metric {name!r}: {metric} takes no cutoff")
    if not re.fullmatch("[1-9][0-9]*", cutoff):
        raise ValueError(f"metric {name!r}: the cutoff must be a whole number from 1 on, found {cutoff!r}")
    return function, int(cutoff), options


def _ranks(array_QK: np.ndarray) -> np.ndarray:
    return np.arange(1, array_QK.shape[1] + 1)
