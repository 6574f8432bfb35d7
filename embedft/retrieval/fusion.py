"""Combines several runs into one: reciprocal rank fusion and z-score fusion.

    report = evaluate_run(fuse([bm25, dense], method="zscore", weights=(0.3, 0.7)), dataset)

Shapes: R runs, Q queries, K ranks, P pairs of a query and a document that some run retrieves for it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .run import Run

Method = Literal["rrf", "zscore"]


def fuse(
    runs: Sequence[Run],
    *,
    method: Method = "rrf",
    weights: Sequence[float] | None = None,
    k: float = 60,
    depth: int | None = None,
    block_queries: int = 1024,
) -> Run:
    """One run that scores a document by the weighted sum of its values in each run; ties are ordered by ascending id.

    - "rrf": 1 / (k + rank), or 0 if the run does not retrieve the document.
    - "zscore": (score - mean) / standard deviation over what the run retrieves for the query, 0 if all scores are
      equal; for other documents, the query's lowest value (0 if there is none). Fuse runs of the same depth.

    `weights` are one per run, at least 0 [1 each]; the order of runs with equal weights does not matter. `depth`
    documents are kept per query [all that any run retrieves].

    Source: Cormack, Clarke & Buettcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning
    Methods", SIGIR 2009 ("rrf", k 60); Montague & Aslam, "Relevance Score Normalization for Metasearch", CIKM 2001
    ("zscore", their zero-mean, unit-variance norm)."""
    weights_R = np.array([1] * len(runs) if weights is None else weights, dtype=np.float64)
    weighted = weights_R.shape == (len(runs),) and (weights_R >= 0).all() and 0 < weights_R.sum() < np.inf
    one_each = f"one number of at least 0 for each of {len(runs)} runs, not all 0"
    for valid, found, expected in (
        (len(runs), "no runs", "at least one"),
        (method in ("rrf", "zscore"), f"method is {method!r}", "rrf or zscore"),
        (0 <= k < np.inf, f"k is {k}", "a number of at least 0"),
        (depth is None or depth >= 1, f"depth is {depth}", "at least 1"),
        (weighted, f"weights are {weights_R.tolist()}", one_each),
    ):
        if not valid:
            raise ValueError(f"fusion: {found}, expected {expected}")
    query_ids = list(dict.fromkeys(query_id for run in runs for query_id in run.query_ids))
    document_ids = sorted({document_id for run in runs for document_id in run.document_ids})
    number = {document_id: index for index, document_id in enumerate(document_ids)}
    aligned = []  # each run's documents, as indices into all, and scores
    for run in (run.select(query_ids) for run in runs):
        new_N = np.array([*map(number.get, run.document_ids), -1], dtype=np.int64)  # for index -1, no document
        aligned.append((new_N[run.indices], run.scores.astype(np.float64)))
    width = min(sum(run.indices.shape[1] for run in runs), np.inf if depth is None else depth)
    indices_QK = np.full((len(query_ids), width), -1, dtype=np.int64)
    scores_QK = np.full((len(query_ids), width), -np.inf)
    for start in range(0, len(query_ids), block_queries):
        block = slice(start, start + block_queries)
        valued = [(indices[block], *_values(indices[block], scores[block], method, k)) for indices, scores in aligned]
        query_P, document_P, total_P = _totals(valued, weights_R, len(document_ids))
        order_P = np.lexsort((document_P, -total_P, query_P))  # query_P is ascending already
        rank_P = np.arange(len(query_P)) - np.searchsorted(query_P, query_P)
        kept = rank_P < width
        place = (start + query_P[kept], rank_P[kept])
        indices_QK[place], scores_QK[place] = document_P[order_P][kept], total_P[order_P][kept]
    used = int((indices_QK >= 0).sum(axis=1).max(initial=0))
    return Run(query_ids, document_ids, indices_QK[:, :used], scores_QK[:, :used])


def _totals(
    valued: list[tuple[np.ndarray, np.ndarray, np.ndarray]], weights_R: np.ndarray, num_documents: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query row, document and fused score of each pair. `valued`: each run's indices, values, and value of the rest."""
    keys = [(np.arange(len(i_QK))[:, None] * num_documents + i_QK)[i_QK >= 0] for i_QK, _, _ in valued]
    # Sorted and filtered by hand: np.unique, which hashes in NumPy 2, took half of the total time.
    key_P = np.sort(np.concatenate(keys))
    key_P = key_P[np.diff(key_P, prepend=-1) > 0]
    query_P, document_P = np.divmod(key_P, num_documents)
    values_RP = np.empty((len(valued), len(key_P)))
    for values_P, weight, key, (i_QK, values_QK, missing_Q) in zip(values_RP, weights_R, keys, valued, strict=True):
        values_P[:] = weight * missing_Q[query_P]
        values_P[np.searchsorted(key_P, key)] = weight * values_QK[i_QK >= 0]
    # Summed in ascending order, so that documents that swap places between runs of equal weight tie exactly.
    return query_P, document_P, np.sort(values_RP, axis=0).sum(axis=0)


def _values(indices_QK: np.ndarray, scores_QK: np.ndarray, method: Method, k: float) -> tuple[np.ndarray, np.ndarray]:
    """The value of each rank [Q, K], and of a document that the run does not retrieve [Q]."""
    if method == "rrf":
        values_QK = np.broadcast_to(1 / (k + np.arange(1, indices_QK.shape[1] + 1)), indices_QK.shape)
        return values_QK, np.zeros(len(indices_QK))
    z_QK = zscores(scores_QK, indices_QK >= 0)
    return z_QK, z_QK.min(axis=1, initial=0.0)


def zscores(scores_QK: np.ndarray, there_QK: np.ndarray) -> np.ndarray:
    """(score - mean) / standard deviation over the scores that are there in each row; 0 if all are equal, and for the
    rest."""
    count_Q1 = np.maximum(there_QK.sum(axis=1, keepdims=True), 1)
    scores_QK = np.where(there_QK, scores_QK, 0.0)
    centred_QK = np.where(there_QK, scores_QK - scores_QK.sum(axis=1, keepdims=True) / count_Q1, 0.0)
    deviation_Q1 = np.sqrt((centred_QK**2).sum(axis=1, keepdims=True) / count_Q1)
    # Rounding can give equal scores a deviation slightly above 0, so compare the extremes.
    low_Q1 = np.where(there_QK, scores_QK, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high_Q1 = np.where(there_QK, scores_QK, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    varies_Q1 = (high_Q1 > low_Q1) & (deviation_Q1 > 0)
    return np.where(varies_Q1, centred_QK / np.where(varies_Q1, deviation_Q1, 1.0), 0.0)
