"""Retrieval metrics per query, in NumPy alone; means come last and elsewhere (evaluate.py).

Conventions, for every metric here:
- A document is relevant to a query when its grade is above 0. What the qrels do not mention is not relevant.
- Ranks count from 1 in the order of the run; ties were settled when the run was made (Run, FlatIndex).
- A ranking shorter than k is taken as it is: what is missing is not relevant, precision still divides by k.
- Queries without a relevant document have no value: `judge` drops and counts them.

    judgments = judge(run, {"q1": {"d3": 1}})
    values_Q = ndcg(judgments, 10)
    everything = per_query_metrics(judgments, ks=(1, 10), depth=100)

Shapes: Q judged queries, K ranks of the run, P pairs of a query and a document relevant to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .run import Run

Qrels = Mapping[str, Mapping[str, float]]
Gain = Literal["binary", "graded"]


@dataclass(frozen=True, eq=False)
class Judgments:
    """What metrics need to know of a run and its qrels, as arrays.

    Args:
        query_ids: Q queries of the run that have a relevant document, in the run's order.
        num_without_relevant: how many queries of the run have none.
        grades_QK: [Q, K] float64, the grade of the document at each rank, 0 where it is not relevant.
        pair_query_P: [P] int64, the row of the query of each relevant pair, ascending.
        pair_grade_P: [P] float64, its grade, descending within a query.
    """

    query_ids: list[str]
    num_without_relevant: int
    grades_QK: np.ndarray
    pair_query_P: np.ndarray
    pair_grade_P: np.ndarray

    @property
    def num_relevant_Q(self) -> np.ndarray:
        return np.bincount(self.pair_query_P, minlength=len(self.query_ids))


def has_relevant(grades: Mapping[str, float]) -> bool:
    """Whether any document of {document id: grade} is relevant."""
    return any(grade > 0 for grade in grades.values())


def judge(run: Run, qrels: Qrels) -> Judgments:
    """Looks up the grade of every retrieved document.

    Queries of the qrels that the run lacks are not seen here; `Run.select` adds them as empty rows. Relevant documents
    that the run does not know count as relevant and not retrieved.

    Raises:
        ValueError: when no query of the run has a relevant document.
    """
    rows = [row for row, query_id in enumerate(run.query_ids) if has_relevant(qrels.get(query_id, {}))]
    kept = [run.query_ids[row] for row in rows]
    if not kept:
        raise ValueError(f"none of the {len(run.query_ids)} queries has a relevant document: nothing can be measured")
    indices_QK = run.indices[rows]
    index_of = {document_id: index for index, document_id in enumerate(run.document_ids)}
    unknown = len(index_of)  # no index of the run is this one
    pairs = [
        (row, index_of.get(document_id, unknown), grade)
        for row, query_id in enumerate(kept)
        for document_id, grade in qrels[query_id].items()
        if grade > 0
    ]
    query_P, document_P, grade_P = np.array(pairs, dtype=np.float64).reshape(-1, 3).T
    query_P, document_P = query_P.astype(np.int64), document_P.astype(np.int64)

    # A pair as one integer: a binary search over the P relevant ones then finds the grade of every [Q, K] at once.
    key_P = query_P * (unknown + 1) + document_P
    order_P = np.argsort(key_P)
    sorted_key_P, sorted_grade_P = key_P[order_P], grade_P[order_P]
    key_QK = np.where(indices_QK < 0, -1, np.arange(len(kept))[:, None] * (unknown + 1) + indices_QK)
    place_QK = np.searchsorted(sorted_key_P[:-1], key_QK)  # without the last one, so that every place exists
    grades_QK = np.where(sorted_key_P[place_QK] == key_QK, sorted_grade_P[place_QK], 0.0)

    best_first_P = np.lexsort((-grade_P, query_P))
    num_without_relevant = len(run.query_ids) - len(kept)
    return Judgments(kept, num_without_relevant, grades_QK, query_P[best_first_P], grade_P[best_first_P])


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


def mrr(judgments: Judgments, k: int) -> np.ndarray:
    """Reciprocal rank: 1 / (rank of the first relevant document among the first k), 0 when there is none. [Q] float64.

    Source: Voorhees, "The TREC-8 Question Answering Track Report", 1999.
    """
    relevant_QK = judgments.grades_QK[:, :k] > 0
    return (relevant_QK / _ranks(relevant_QK)).max(axis=1, initial=0.0)


def average_precision(judgments: Judgments, k: int) -> np.ndarray:
    """Sum of precision@i over the ranks i <= k of relevant documents, / min(k, relevant documents). [Q] float64.

    trec_eval's map_cut divides by all relevant documents instead, so that a query with more than k of them cannot
    reach 1; the two are equal where no query has more than k.

    Source: sentence-transformers `InformationRetrievalEvaluator`, map@k; Buckley & Voorhees, "Evaluating Evaluation
    Measure Stability", SIGIR 2000.
    """
    relevant_QK = judgments.grades_QK[:, :k] > 0
    precision_QK = np.cumsum(relevant_QK, axis=1) / _ranks(relevant_QK)
    return (precision_QK * relevant_QK).sum(axis=1) / np.minimum(judgments.num_relevant_Q, k)


def ndcg(judgments: Judgments, k: int, *, gain: Gain = "binary") -> np.ndarray:
    """DCG@k / ideal DCG@k, where DCG@k = sum over ranks i <= k of gain_i / log2(i + 1). [Q] float64.

    The ideal ranking holds the query's relevant documents by descending gain, retrieved or not, cut at k.

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
    ideal_P = np.where(rank_P <= k, grade_P / np.log2(rank_P + 1), 0.0)
    return dcg_Q / np.bincount(judgments.pair_query_P, weights=ideal_P, minlength=len(judgments.query_ids))


def per_query_metrics(
    judgments: Judgments, *, ks: Sequence[int], depth: int, gain: Gain = "binary"
) -> dict[str, np.ndarray]:
    """Every metric at every cutoff, as {"ndcg@10": [Q] float64, ...}.

    Keys: hit_rate@k and accuracy@k (the same values under both names), precision@k, recall@k, mrr@k and ndcg@k for
    each k of `ks`, and map@depth.
    """
    values = {}
    for k in ks:
        values[f"hit_rate@{k}"] = values[f"accuracy@{k}"] = hit_rate(judgments, k)
        values[f"precision@{k}"] = precision(judgments, k)
        values[f"recall@{k}"] = recall(judgments, k)
        values[f"mrr@{k}"] = mrr(judgments, k)
        values[f"ndcg@{k}"] = ndcg(judgments, k, gain=gain)
    values[f"map@{depth}"] = average_precision(judgments, depth)
    return values


def _ranks(array_QK: np.ndarray) -> np.ndarray:
    return np.arange(1, array_QK.shape[1] + 1)
