"""Several runs as one: reciprocal rank fusion and z-score fusion, and the weight of two runs by training questions.

Any runs: BM25, dense, of several models. NumPy alone; how runs come about is elsewhere (bm25.py, evaluate.py).

    weights = choose_weight([train_bm25, train_dense], train_set)
    fused = fuse([bm25, dense], method="zscore", weights=weights)
    evaluate_run(fused, dataset)

Shapes: R runs, Q queries, K ranks, P pairs of a query and a document that some run retrieves for it.
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..data.dataset import RetrievalDataset
from .metrics import Qrels, judge, measure
from .run import Run

Method = Literal["rrf", "zscore"]
METHODS = ("rrf", "zscore")
# Queries fused together: bounds memory.
QUERY_BLOCK = 1024


def fuse(
    runs: Sequence[Run],
    *,
    method: Method = "rrf",
    weights: Sequence[float] | None = None,
    k: float = 60,
    depth: int | None = None,
) -> Run:
    """One run whose score of a document is the weighted sum of what each run says of it.

    "rrf": 1 / (k + rank), the rank from 1; 0 from a run that does not retrieve the document for this query. Scores do
    not count, so any runs go together.

    "zscore": (score - mean) / standard deviation, over the documents that the run retrieves for this query; all 0 where
    its scores are equal. From a run that does not retrieve the document the lowest that it gives for this query: it
    would have scored no more than the last one retrieved, by how much less is not known. A run without any document
    for a query says 0 of all. Mean and deviation depend on how deep a run is: fuse runs of one depth.

    Args:
        runs: their queries and documents are united; a query that a run lacks is an empty row there.
        weights: one a run, 0 or more; None: 1 each.
        k: of "rrf"; the larger, the less the first ranks stand out.
        depth: documents kept a query; None: all that any run retrieves.

    Returns:
        A run over the queries in the order in which they first appear, equal scores by ascending document id; scores
        are float64 and do not depend on the order of runs of equal weight.

    Raises:
        ValueError: no runs, an unknown method, weights of another number, below 0, not finite or all 0, k below 0,
            depth below 1.

    Source: Cormack, Clarke & Buettcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning
    Methods", SIGIR 2009 ("rrf", k 60); Montague & Aslam, "Relevance Score Normalization for Metasearch", CIKM 2001
    ("zscore", their zero-mean, unit-variance norm).
    """
    runs = list(runs)
    if not runs:
        raise ValueError("fusion: no runs")
    if method not in METHODS:
        raise ValueError(f"unknown fusion method {method!r}; valid: {', '.join(METHODS)}")
    if not (np.isfinite(k) and k >= 0):
        raise ValueError(f"fusion: k is {k}, expected a number of at least 0")
    if depth is not None and depth < 1:
        raise ValueError(f"fusion: depth must be at least 1, not {depth}")
    weights_R = np.ones(len(runs)) if weights is None else np.array(weights, dtype=np.float64)
    if weights_R.shape != (len(runs),):
        raise ValueError(f"fusion: weights of shape {weights_R.shape} for {len(runs)} runs")
    if not np.isfinite(weights_R).all() or (weights_R < 0).any() or not weights_R.any():
        raise ValueError(f"fusion: weights are {weights_R.tolist()}, expected numbers of at least 0, not all 0")

    query_ids = list(dict.fromkeys(query_id for run in runs for query_id in run.query_ids))
    document_ids = sorted({document_id for run in runs for document_id in run.document_ids})
    aligned = [_align(run, query_ids, document_ids) for run in runs]
    width = sum(run.indices.shape[1] for run in runs)
    width = width if depth is None else min(width, depth)
    indices_QK = np.full((len(query_ids), width), -1, dtype=np.int64)
    scores_QK = np.full((len(query_ids), width), -np.inf)
    for start in range(0, len(query_ids), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        parts = [(indices[block], scores[block]) for indices, scores in aligned]
        query_P, document_P, total_P = _totals(parts, weights_R, method, k, len(document_ids))
        order_P = np.lexsort((document_P, -total_P, query_P))
        query_P = query_P[order_P]
        rank_P = np.arange(len(query_P)) - np.searchsorted(query_P, query_P)
        kept = rank_P < width
        place = (start + query_P[kept], rank_P[kept])
        indices_QK[place], scores_QK[place] = document_P[order_P][kept], total_P[order_P][kept]
    used = int((indices_QK >= 0).sum(axis=1).max(initial=0))
    return Run(query_ids, document_ids, indices_QK[:, :used], scores_QK[:, :used])


def _align(run: Run, query_ids: list[str], document_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The run's indices into `document_ids` and its scores as float64, [Q, K] for `query_ids`."""
    number = {document_id: index for index, document_id in enumerate(document_ids)}
    # The -1 at the end is what index -1, no document, finds.
    new_N = np.array([*(number[document_id] for document_id in run.document_ids), -1], dtype=np.int64)
    selected = run.select(query_ids)
    return new_N[selected.indices], selected.scores.astype(np.float64)


def _totals(
    parts: list[tuple[np.ndarray, np.ndarray]], weights_R: np.ndarray, method: Method, k: float, num_documents: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of a block of queries: query row, document, fused score. Each part: a run's indices and scores."""
    # A pair as one integer, ascending by query.
    keys = [(np.arange(len(i_QK))[:, None] * num_documents + i_QK)[i_QK >= 0] for i_QK, _ in parts]
    # Not np.unique: by hashing, as NumPy 2 does it, this took half of all the time.
    key_P = np.sort(np.concatenate(keys))
    key_P = key_P[np.diff(key_P, prepend=-1) > 0]
    query_P, document_P = np.divmod(key_P, num_documents)
    values_RP = np.empty((len(parts), len(key_P)))
    for values_P, weight, key, (indices_QK, scores_QK) in zip(values_RP, weights_R, keys, parts, strict=True):
        there_QK = indices_QK >= 0
        if method == "rrf":
            values_QK = np.broadcast_to(1 / (k + np.arange(1, indices_QK.shape[1] + 1)), indices_QK.shape)
            missing_Q = np.zeros(len(indices_QK))
        else:
            values_QK, missing_Q = _z_scores(scores_QK, there_QK)
        values_P[:] = weight * missing_Q[query_P]
        values_P[np.searchsorted(key_P, key)] = weight * values_QK[there_QK]
    # Added from the smallest, not by run: documents that change places between runs of equal weight tie exactly.
    return query_P, document_P, np.sort(values_RP, axis=0).sum(axis=0)


def _z_scores(scores_QK: np.ndarray, there_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[Q, K], 0 where there is no document, and the lowest of each row, [Q]."""
    count_Q1 = np.maximum(there_QK.sum(axis=1, keepdims=True), 1)
    scores_QK = np.where(there_QK, scores_QK, 0.0)
    centred_QK = np.where(there_QK, scores_QK - scores_QK.sum(axis=1, keepdims=True) / count_Q1, 0.0)
    deviation_Q1 = np.sqrt((centred_QK**2).sum(axis=1, keepdims=True) / count_Q1)
    # Rounding gives equal scores a deviation a little above 0, so it is not asked.
    low_Q1 = np.where(there_QK, scores_QK, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high_Q1 = np.where(there_QK, scores_QK, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    varies_Q1 = (high_Q1 > low_Q1) & (deviation_Q1 > 0)
    z_QK = np.where(varies_Q1, centred_QK / np.where(varies_Q1, deviation_Q1, 1.0), 0.0)
    return z_QK, z_QK.min(axis=1, initial=0.0)


def choose_weight(
    runs: Sequence[Run],
    dataset_or_qrels: RetrievalDataset | Qrels,
    *,
    metric: str = "mrr@10",
    method: Method = "zscore",
    grid: Sequence[float] = tuple(i / 10 for i in range(11)),
) -> tuple[float, float]:
    """The weights (w, 1 - w) of two runs whose fusion has the best mean of a metric; w from a grid.

    For training questions: a weight chosen on the questions that it is measured on flatters. Of several best ones it
    is the nearest to one half. A query that neither run has makes no difference.

    Args:
        dataset_or_qrels: qrels as {query id: {document id: grade}}, or a dataset.
        metric: a name of `metrics.measure`.
        grid: values of w, 0 to 1.

    Raises:
        ValueError: another number of runs than two, a grid that is empty or outside 0 to 1, an unknown metric, or
            no query of the runs with a relevant document.
    """
    if len(runs) != 2:
        raise ValueError(f"fusion: {len(runs)} runs, expected two to choose a weight for")
    if not len(grid) or not all(0 <= weight <= 1 for weight in grid):
        raise ValueError(f"fusion: grid is {list(grid)}, expected weights of 0 to 1")
    qrels = dataset_or_qrels.qrels if isinstance(dataset_or_qrels, RetrievalDataset) else dataset_or_qrels
    found = {}
    cutoff = re.search(r"@(\d+)$", metric)
    depth = int(cutoff[1]) if cutoff else None
    for weight in grid:
        fused = fuse(runs, method=method, weights=(weight, 1 - weight), depth=depth)
        (values_Q,) = measure(judge(fused, qrels), [metric]).values()
        found[weight] = round(float(values_Q.mean()), 12)  # equal means may differ in their last bits
    best = min(found, key=lambda weight: (-found[weight], abs(weight - 0.5)))
    return float(best), round(1 - float(best), 12)
