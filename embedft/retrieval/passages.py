"""Search over windows: a document has several vectors, and its score is that of its best window (MaxP).

    vectors_WD, source_W = embedder.encode_passages(texts, (128, 64))
    scores, rows = WindowIndex(vectors_WD, source_W).search(query_embeddings, depth=100)      # rows are documents

With windows of S sizes, it is the mean over the sizes of the score of the best window of each.

Source: Dai and Callan 2019, section 3 (MaxP); the mean over sizes is our own ("both sizes" in experiments/LOG.md).
Shapes: Q queries, W windows of N documents (rows, numbered from 0), D dimensions, K = min(depth, N) results; B queries
in a block, P documents in a block, X = P S, C candidates of a query.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..progress import progress_bar
from ..vectors import checked_source
from .index import Found, Index, from_keys, merge_keys, require_finite, to_keys


class WindowIndex(Index):
    """Scores every query against every window by inner product, in float32, and returns documents.

    Args:
        windows_WD: not copied if a writable float32 array.
        source_W: ascending from 0 without gaps: the document of each window; with `num_sizes` S, for windows of the
            s-th size, from 0, of document d, S d + s.
        candidates: an index over the same windows, searched ever deeper until it finds `depth` documents, whose windows
            are then all scored; with several sizes, others may score higher even if the index is exact. If it runs out
            of results (as when IVF probes few lists), every document is scored.
        max_scores: window scores held at a time, 64 MB in float32."""

    def __init__(
        self,
        windows_WD: np.ndarray,
        source_W: np.ndarray,
        *,
        num_sizes: int = 1,
        candidates: Index | None = None,
        max_scores: int = 2**24,
    ):
        super().__init__(windows_WD)
        source_W = checked_source(source_W, len(windows_WD))
        self.document_W = source_W // num_sizes
        require_finite(windows_WD, "a window of document", self.document_W.tolist())
        self.windows_WD = np.require(windows_WD, np.float32, ["C", "W"])  # torch warns about read-only arrays
        starts = np.flatnonzero(np.diff(source_W, prepend=-1))  # each document has windows of each size
        if len(starts) % num_sizes:
            raise ValueError(f"source ends with {source_W[-1]}, expected windows of {num_sizes} sizes of each document")
        self.starts_NS = starts.reshape(-1, num_sizes)
        self.lengths_NS = np.diff(starts, append=len(windows_WD)).reshape(-1, num_sizes)
        self.ends_N = self.starts_NS[:, -1] + self.lengths_NS[:, -1]
        self.num_documents = len(self.starts_NS)
        self.candidates, self.max_scores = candidates, max_scores

    def _search(self, queries_QD: np.ndarray, depth: int) -> Found:
        depth = min(depth, len(self))
        search, parts = self._exact if self.candidates is None else self._among, []
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, max(1, len(queries_QD)), 1024):
                parts.append(search(queries_QD[start : start + 1024], depth))
                bar.update(len(parts[-1].rows))
        return Found(*map(np.concatenate, zip(*parts, strict=True)))

    def _exact(self, queries_BD: np.ndarray, depth: int) -> Found:
        keys_BK, first = np.empty((len(queries_BD), 0), dtype=np.uint64), 0
        num_windows = max(1, self.max_scores // max(1, len(queries_BD)))
        while first < len(self):  # whole documents of at most `num_windows` windows, or one that has more
            offset = self.starts_NS[first, 0]
            stop = max(first + 1, int(np.searchsorted(self.ends_N, offset + num_windows, side="right")))
            scores_BW = _products(queries_BD, self.windows_WD[offset : self.ends_N[stop - 1]])
            scores_BP = _mean_of_best(scores_BW, self.starts_NS[first:stop] - offset)
            keys_BP = to_keys(scores_BP, np.broadcast_to(np.arange(first, stop), scores_BP.shape))
            if keys_BP.shape[1] > depth:  # keys are distinct, so there are no ties to settle
                keys_BP = np.partition(keys_BP, depth - 1, axis=1)[:, :depth]
            keys_BK, first = merge_keys(keys_BK, keys_BP, depth), stop
        return from_keys(keys_BK)

    def _among(self, queries_BD: np.ndarray, depth: int) -> Found:
        found = Found(np.empty((len(queries_BD), depth), np.float32), np.empty((len(queries_BD), depth), np.int64))
        left, width = np.arange(len(queries_BD)), depth
        while len(left):
            width, too_few = min(2 * width, len(self.document_W)), []
            for query, windows_C in zip(left, self.candidates.search(queries_BD[left], width).rows, strict=True):
                windows_C = windows_C[windows_C >= 0]
                documents = np.unique(self.document_W[windows_C])
                if len(documents) >= depth:
                    (scores,) = self.scores_of(queries_BD[query : query + 1], documents)
                    order = np.argsort(-scores, kind="stable")[:depth]
                    found.scores[query], found.rows[query] = scores[order], documents[order]
                elif len(windows_C) == width < len(self.document_W):
                    too_few.append(query)
                else:  # a wider search would find no more
                    (found.scores[query],), (found.rows[query],) = self._exact(queries_BD[query : query + 1], depth)
            left = np.array(too_few, dtype=np.int64)
        return found

    def scores_of(self, queries_BD: np.ndarray, documents: Sequence[int] | np.ndarray) -> np.ndarray:
        """The scores of some documents, in their order, [B, P] float32: the same as in a search."""
        counts = self.lengths_NS[documents].ravel()
        starts = np.cumsum(counts) - counts
        rows = np.repeat(self.starts_NS[documents].ravel() - starts, counts) + np.arange(counts.sum())
        return _mean_of_best(_products(queries_BD, self.windows_WD[rows]), starts.reshape(len(documents), -1))


def _mean_of_best(scores_BW: np.ndarray, starts_PS: np.ndarray) -> np.ndarray:
    """The mean over sizes of the largest score of the windows from each start to the next, [B, P]."""
    best_BX, num_sizes = np.maximum.reduceat(scores_BW, starts_PS.ravel(), axis=1), starts_PS.shape[1]
    # Added in the order of sizes, so equal documents have equal scores, however many are added at once.
    return sum(best_BX[:, size::num_sizes] for size in range(num_sizes)) / np.float32(num_sizes)


def _products(queries_BD: np.ndarray, windows_WD: np.ndarray) -> np.ndarray:
    """Inner products, [B, W]: equal windows get equal scores, wherever they stand."""
    # By torch, for a multiple of 8 queries: in 8,309 random cases with equal windows, NumPy's product scored some of
    # them differently in 47%, torch's for any number of queries in 1.4%, this one in none (AMD EPYC, 2026-11-21).
    padded_BD = np.pad(queries_BD, ((0, -len(queries_BD) % 8), (0, 0)))
    return (torch.from_numpy(padded_BD) @ torch.from_numpy(windows_WD).T).numpy()[: len(queries_BD)]
