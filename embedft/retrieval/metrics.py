"""Retrieval metrics in NumPy: one float64 value per query, [Q].

    judgments = judge(run, {"q1": {"d3": 1}})
    by_name = measure(judgments, ["ndcg@20", "rprec", "map", "judged@10"])

- A document is relevant if its grade is above 0; documents missing from the qrels are not. Queries without a relevant
  document have no value: `judge` drops and counts them.
- Ranks start at 1 and follow the run, even among ties. Beyond the end of a ranking, nothing is relevant.
- To add a metric, write a function of `Judgments` that returns [Q] values and add it to METRICS. A parameter `k` makes
  it take a cutoff (optional if `k` has a default); a parameter `gain` gets the gain of the evaluation.

Shapes: Q judged queries, K ranks of the run, J graded (query, document) pairs, P relevant pairs.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..objects import find_object
from .run import Run

Qrels = Mapping[str, Mapping[str, float]]
Gain = Literal["binary", "graded"]


@dataclass(frozen=True, eq=False)
class Judgments:
    """A run and its qrels as arrays: everything a metric needs."""

    query_ids: list[str]  # the Q queries of the run that have a relevant document
    num_without_relevant: int  # the other queries
    grades_QK: np.ndarray  # float64, grade of the document at each rank, 0 if it is not relevant
    judged_QK: np.ndarray  # bool, whether the qrels grade the document at each rank, even with 0 or less
    pair_query_P: np.ndarray  # int64, query row of each relevant pair, ascending
    pair_grade_P: np.ndarray  # float64, its grade, descending within a query

    @property
    def num_relevant_Q(self) -> np.ndarray:
        return np.bincount(self.pair_query_P, minlength=len(self.query_ids))


def has_relevant(grades: Mapping[str, float]) -> bool:
    """Whether {document id: grade} has a relevant document. NaN counts as relevant, so that `judge` can reject it."""
    return any(not grade <= 0 for grade in grades.values())


def judge(run: Run, qrels: Qrels) -> Judgments:
    """The grade of every document in the run. Raises `ValueError` if no query has a relevant one."""
    rows = [row for row, query_id in enumerate(run.query_ids) if has_relevant(qrels.get(query_id, {}))]
    kept = [run.query_ids[row] for row in rows]
    if not kept:
        raise ValueError(f"none of the {len(run.query_ids)} queries has a relevant document; nothing to measure")
    indices_QK = run.indices[rows]
    index_of = {document_id: index for index, document_id in enumerate(run.document_ids)}
    unknown = len(index_of)
    query_J = np.repeat(np.arange(len(kept)), [len(qrels[query_id]) for query_id in kept])
    document_J = np.array([index_of.get(document_id, unknown) for query_id in kept for document_id in qrels[query_id]])
    grade_J = np.array([grade for query_id in kept for grade in qrels[query_id].values()], dtype=np.float64)
    if not np.isfinite(grade_J).all():
        j = int(np.argmin(np.isfinite(grade_J)))
        raise ValueError(f"qrels: query {kept[query_J[j]]!r} has the grade {grade_J[j]}, expected a finite number")
    # With each pair encoded as one integer, a single binary search over the J graded pairs looks up all [Q, K] grades.
    key_J = query_J * (unknown + 1) + document_J
    order_J = np.argsort(key_J)
    sorted_key_J, sorted_grade_J = key_J[order_J], np.maximum(grade_J[order_J], 0.0)
    key_QK = np.where(indices_QK < 0, -1, np.arange(len(kept))[:, None] * (unknown + 1) + indices_QK)
    place_QK = np.searchsorted(sorted_key_J[:-1], key_QK)  # the last key is left out so that no index is out of range
    judged_QK = sorted_key_J[place_QK] == key_QK
    grades_QK = np.where(judged_QK, sorted_grade_J[place_QK], 0.0)
    query_P, grade_P = query_J[grade_J > 0], grade_J[grade_J > 0]
    order_P = np.lexsort((-grade_P, query_P))  # by query, best first
    return Judgments(kept, len(run.query_ids) - len(kept), grades_QK, judged_QK, query_P[order_P], grade_P[order_P])


def hit_rate(judgments: Judgments, k: int) -> np.ndarray:
    """1 if any of the first k documents is relevant, else 0. Source: trec_eval `m_success.c`."""
    return (judgments.grades_QK[:, :k] > 0).any(axis=1).astype(np.float64)


def precision(judgments: Judgments, k: int) -> np.ndarray:
    """(relevant documents among the first k) / k, even if fewer than k were retrieved. Source: trec_eval `m_P.c`."""
    return (judgments.grades_QK[:, :k] > 0).sum(axis=1) / k


def recall(judgments: Judgments, k: int) -> np.ndarray:
    """(relevant documents among the first k) / (all relevant documents). Source: trec_eval `m_recall.c`."""
    return (judgments.grades_QK[:, :k] > 0).sum(axis=1) / judgments.num_relevant_Q


def r_precision(judgments: Judgments) -> np.ndarray:
    """(relevant documents among the first R) / R, R the query's number of relevant documents.
    Source: trec_eval `m_Rprec.c`; Buckley & Voorhees, "Evaluating Evaluation Measure Stability", SIGIR 2000."""
    first_QK = _ranks(judgments.grades_QK) <= judgments.num_relevant_Q[:, None]
    return (first_QK & (judgments.grades_QK > 0)).sum(axis=1) / judgments.num_relevant_Q


def judged(judgments: Judgments, k: int) -> np.ndarray:
    """(graded documents among the first k, whatever their grade) / k. Source: ir_measures, `Judged@k`."""
    return judgments.judged_QK[:, :k].sum(axis=1) / k


def mrr(judgments: Judgments, k: int | None = None) -> np.ndarray:
    """1 / (rank of the first relevant document), 0 if it is not among the first k.
    Source: Voorhees, "The TREC-8 Question Answering Track Report", 1999; without k, trec_eval's recip_rank."""
    relevant_QK = judgments.grades_QK[:, :k] > 0
    return (relevant_QK / _ranks(relevant_QK)).max(axis=1, initial=0.0)


def average_precision(judgments: Judgments, k: int | None = None) -> np.ndarray:
    """(sum of precision@i over the ranks i <= k of relevant documents) / min(k, number of relevant documents).

    trec_eval's map_cut divides by all relevant documents instead: for that, cut the run at k and measure without k.

    Source: sentence-transformers `InformationRetrievalEvaluator`, map@k; without k, trec_eval `m_map.c`; Buckley &
    Voorhees, "Evaluating Evaluation Measure Stability", SIGIR 2000."""
    relevant_QK = judgments.grades_QK[:, :k] > 0
    precision_QK = np.cumsum(relevant_QK, axis=1) / _ranks(relevant_QK)
    best_Q = judgments.num_relevant_Q if k is None else np.minimum(judgments.num_relevant_Q, k)
    return (precision_QK * relevant_QK).sum(axis=1) / best_Q


def ndcg(judgments: Judgments, k: int | None = None, *, gain: Gain = "binary") -> np.ndarray:
    """DCG@k / ideal DCG@k, where DCG@k = sum over ranks i <= k of gain_i / log2(i + 1).

    The ideal ranking lists all relevant documents by descending gain: 1 ("binary", as in sentence-transformers) or the
    grade, not 2^grade - 1 ("graded", as in trec_eval and BEIR).

    Source: Jarvelin & Kekalainen, "Cumulated Gain-Based Evaluation of IR Techniques", 2002; trec_eval m_ndcg_cut.c."""
    if gain not in ("binary", "graded"):
        raise ValueError(f"unknown gain {gain!r}; valid: binary, graded")
    grades_QK, grade_P = judgments.grades_QK[:, :k], judgments.pair_grade_P
    if gain == "binary":
        grades_QK, grade_P = grades_QK > 0, grade_P > 0
    dcg_Q = (grades_QK / np.log2(_ranks(grades_QK) + 1)).sum(axis=1)
    # Pairs are grouped by query, best first, so a pair's ideal rank is its offset within its query.
    query_P = judgments.pair_query_P
    rank_P = np.arange(1, len(grade_P) + 1) - np.searchsorted(query_P, query_P)
    ideal_P = np.where(rank_P <= (k or np.inf), grade_P / np.log2(rank_P + 1), 0.0)
    return dcg_Q / np.bincount(judgments.pair_query_P, weights=ideal_P, minlength=len(judgments.query_ids))


def _ranks(array_QK: np.ndarray) -> np.ndarray:
    return np.arange(1, array_QK.shape[1] + 1)


METRICS: dict[str, Callable[..., np.ndarray]] = {
    "hit_rate": hit_rate,
    "accuracy": hit_rate,
    "success": hit_rate,
    "precision": precision,
    "recall": recall,
    "mrr": mrr,
    "ndcg": ndcg,
    "map": average_precision,
    "rprec": r_precision,
    "judged": judged,
}

Metric = str | Callable[..., np.ndarray]  # "ndcg@20", "my.function@5", or a function (judgments, k=None) -> [Q]


def select_metrics(metrics: Sequence[Metric] | None = None, *, ks: Sequence[int], depth: int) -> list[Metric]:
    """The metrics of an evaluation, checked. Default: hit rate, precision, recall, MRR and nDCG at `ks`, map@depth."""
    if metrics is None:
        if not ks or min(ks) < 1 or max(ks) > depth:
            raise ValueError(f"cutoffs ks={tuple(ks)} must be at least 1 and at most depth={depth}")
        names = ("hit_rate", "accuracy", "precision", "recall", "mrr", "ndcg")
        return [*(f"{name}@{k}" for k in ks for name in names), f"map@{depth}"]
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics is {metrics!r}, expected a list of at least one")
    for metric in metrics:
        name, _, options = _resolve(metric)
        if (k := options.get("k", 0)) > depth:
            raise ValueError(f"metric {name!r} needs a depth of at least {k}, found depth={depth}")
    return list(metrics)


def measure(judgments: Judgments, metrics: Sequence[Metric], *, gain: Gain = "binary") -> dict[str, np.ndarray]:
    """The values of several metrics, {"ndcg@20": [Q] float64, ...}: names of METRICS or of importable functions
    ("my_metrics.last_rank@10"), with a cutoff (optional for ndcg, map, mrr; none for rprec), or functions (judgments,
    k=None) -> [Q], called without a cutoff, under their own names.
    Raises `ValueError` for an invalid name or cutoff, a name given twice, or values that are not Q finite numbers."""
    functions, values = {}, {}
    for metric in metrics:
        name, function, options = _resolve(metric)
        if functions.setdefault(name, function) is not function:
            raise ValueError(f"two metrics are called {name!r}; rename the function")
        if "gain" in inspect.signature(function).parameters:
            options["gain"] = gain
        found_Q = np.asarray(function(judgments, **options), dtype=np.float64)
        if found_Q.shape != (len(judgments.query_ids),) or not np.isfinite(found_Q).all():
            number = len(judgments.query_ids)
            raise ValueError(f"metric {name!r} returned shape {found_Q.shape}, expected {number} finite numbers")
        values[name] = found_Q
    return values


def _resolve(metric: Metric) -> tuple[str, Callable[..., np.ndarray], dict[str, Any]]:
    """A metric's full name, its function and {"k": its cutoff}."""
    if not isinstance(metric, str):
        name = getattr(metric, "__name__", "")
        if not (callable(metric) and name.isidentifier()):
            raise ValueError(f"metric {metric!r}: expected a name or a named function")
        return name, metric, {}
    name, at, cutoff = metric.partition("@")
    function = METRICS.get(name) or ("." in name and find_object(name))
    if not callable(function):
        valid = f"{', '.join(METRICS)}, or module.function"
        raise ValueError(f"unknown metric {metric!r}; valid, with a cutoff as in ndcg@10: {valid}")
    parameter = inspect.signature(function).parameters.get("k")
    if at and parameter is None:
        raise ValueError(f"metric {metric!r}: {name} takes no cutoff")
    needs_cutoff = parameter is not None and parameter.default is parameter.empty
    if (at or needs_cutoff) and not re.fullmatch("[1-9][0-9]*", cutoff):
        raise ValueError(f"metric {metric!r} needs a cutoff of at least 1, as in {name}@10")
    return metric, function, {"k": int(cutoff)} if at else {}
