"""Search over documents of several vectors, the windows of a long text: a document scores by its windows.

    vectors_WD, source_W = embedder.encode_passages(texts, (128, 64))
    index = PassageIndex(384, aggregate="max")
    index.add(vectors_WD, source_W)
    scores, rows = index.search(query_embeddings, depth=100)      # rows of documents, not of windows

Exact unless asked otherwise: of every block of documents the windows are scored, and reduced to one score a document
before anything is dropped, so many good windows of one document push out no other. There is never a [Q, N] matrix.
Not here: how texts are cut (encoders/tokenization.py), and approximate indices (index.py), which `search` takes.

Shapes: Q queries, W windows of N documents (rows, numbered from 0), D dimensions, K = min(depth, N) results; B queries
of a block, P documents of a block, C candidates of a query.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..progress import progress_bar
from .index import require_depth, require_finite

# Scores held at a time: 64 MB in float32.
BLOCK_SCORES = 1 << 24
QUERY_BLOCK = 1024
QUERY_ROWS = 8


class WindowIndex(Protocol):
    """An index, exact or not, over the windows of a `PassageIndex` in their order."""

    def __len__(self) -> int: ...

    def search(self, queries_QD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [Q, K] of windows, best first; a row of -1 is none."""
        ...


class Block(NamedTuple):
    """Windows of documents `first`, `first` + 1, ...; document p's begin at starts_P[p]."""

    first: int
    windows_WD: np.ndarray
    starts_P: np.ndarray


def aggregate_windows(scores_BW: np.ndarray, starts_P: np.ndarray, aggregate: str = "max") -> np.ndarray:
    """Scores of documents [B, P] from those of their windows [B, W]; document p's begin at column starts_P[p].

    - "max": the best window (MaxP).
    - "mean": the mean over its windows.
    - "first": the first window (FirstP), what truncation to one window gives.
    - "sum_top_m", as in "sum_top_3": the sum of its m best windows, of all where it has fewer.

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
    """The m of "sum_top_m", 0 for the others. Raises `ValueError` for a name that is none of them."""
    found = re.fullmatch(r"sum_top_([1-9]\d*)", aggregate)
    if not found and aggregate not in ("max", "mean", "first"):
        raise ValueError(f"aggregate is {aggregate!r}, expected max, mean, first or sum_top_M, as in sum_top_3")
    return int(found[1]) if found else 0


class PassageIndex:
    """Every query against every window, by inner product, in float32; results are documents.

    Results are the first `depth` under the order (score descending, row ascending), as `FlatIndex` has it.

    Args:
        dim: D, the width of the vectors.
        aggregate: how a document scores by its windows, see `aggregate_windows`.
    """

    def __init__(self, dim: int, *, aggregate: str = "max"):
        check_aggregate(aggregate)
        self.dim, self.aggregate = dim, aggregate
        self.num_windows = 0
        self._blocks: list[Block] = []
        self._num_documents = 0

    def __len__(self) -> int:
        """Documents, N."""
        return self._num_documents

    def add(self, vectors_WD: np.ndarray, source_W: np.ndarray) -> None:
        """Adds documents with all their windows; their rows follow those added before.

        Float32 arrays that may be written to are not copied.

        Args:
            source_W: the document of each window, from 0 in each call: rising, none left out.

        Raises:
            ValueError: a wrong width, NaN or inf (naming the document), a `source_W` that is not as said.
        """
        vectors_WD, source_W = _checked(vectors_WD, self.dim), np.asarray(source_W)
        if source_W.shape != (len(vectors_WD),):
            raise ValueError(f"{len(vectors_WD)} windows, the documents of {source_W.shape} are told")
        if not len(source_W):
            return
        steps = np.diff(source_W, prepend=-1)
        if steps[0] != 1 or not np.isin(steps, (0, 1)).all():
            raise ValueError("the windows' documents have to be numbered from 0, rising, with none left out")
        require_finite(vectors_WD, "a window of document", (source_W + len(self)).tolist())
        self._blocks.append(Block(len(self), vectors_WD, np.flatnonzero(steps)))
        self._num_documents += int(source_W[-1]) + 1
        self.num_windows += len(vectors_WD)

    def search(
        self, queries_QD: np.ndarray, depth: int, *, candidates: WindowIndex | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `depth` best documents of each query, or all of them when there are fewer.

        Args:
            candidates: an index over the windows, in the order they were added. Its results are widened by doubling
                until `depth` documents are among them; all windows of these are then scored exactly, so a score is
                always the document's own. A query for which it has no more before that (lists that are not probed) is
                scored against every document. None: all are.

        Returns:
            scores [Q, K] float32, never rising along a row, and rows [Q, K] int64, ascending among equal scores.

        Raises:
            ValueError: an empty index, a depth below 1, a wrong width, NaN or inf, `candidates` over another number of
                windows.
        """
        require_depth(depth)
        if len(self) == 0:
            raise ValueError("search in an empty index: add documents first")
        queries_QD = _checked(queries_QD, self.dim)
        require_finite(queries_QD, "row", range(len(queries_QD)))
        if candidates is not None and len(candidates) != self.num_windows:
            raise ValueError(f"candidates are from {len(candidates):,} windows, there are {self.num_windows:,}")
        depth = min(depth, len(self))
        scores_QK = np.empty((len(queries_QD), depth), dtype=np.float32)
        rows_QK = np.empty((len(queries_QD), depth), dtype=np.int64)
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, len(queries_QD), QUERY_BLOCK):
                part = slice(start, start + QUERY_BLOCK)
                if candidates is None:
                    scores_QK[part], rows_QK[part] = self._exact(queries_QD[part], depth)
                else:
                    scores_QK[part], rows_QK[part] = self._among(queries_QD[part], depth, candidates)
                bar.update(len(queries_QD[part]))
        return scores_QK, rows_QK

    def _exact(self, queries_BD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        scores_BK = np.empty((len(queries_BD), 0), dtype=np.float32)
        rows_BK = np.empty((len(queries_BD), 0), dtype=np.int64)
        for block in self._blocks:
            for part in _parts(block, max(1, BLOCK_SCORES // max(1, len(queries_BD)))):
                scores_BP = aggregate_windows(_products(queries_BD, part.windows_WD), part.starts_P, self.aggregate)
                rows_BP = np.broadcast_to(part.first + np.arange(scores_BP.shape[1]), scores_BP.shape)
                # Rows rise along both, so the first of those that tie is the one with the smaller row.
                both = np.hstack([scores_BK, scores_BP]), np.hstack([rows_BK, rows_BP])
                keep_BK = _first_largest(both[0], depth)
                scores_BK, rows_BK = (np.take_along_axis(x, keep_BK, axis=1) for x in both)
        order_BK = np.argsort(-scores_BK, axis=1, kind="stable")
        return np.take_along_axis(scores_BK, order_BK, axis=1), np.take_along_axis(rows_BK, order_BK, axis=1)

    def _among(self, queries_BD: np.ndarray, depth: int, candidates: WindowIndex) -> tuple[np.ndarray, np.ndarray]:
        scores_BK = np.empty((len(queries_BD), depth), dtype=np.float32)
        rows_BK = np.empty((len(queries_BD), depth), dtype=np.int64)
        document_W = np.concatenate(
            [block.first + np.repeat(np.arange(len(block.starts_P)), _counts(block)) for block in self._blocks]
        )
        left, width = np.arange(len(queries_BD)), depth
        while len(left):
            width = min(2 * width, self.num_windows)
            _, windows = candidates.search(queries_BD[left], width)
            short = []
            for query, windows_C in zip(left, windows, strict=True):
                found_C = windows_C[windows_C >= 0]
                documents = np.unique(document_W[found_C])
                if len(documents) < depth:
                    if len(found_C) == width < self.num_windows:
                        short.append(query)
                    else:  # it has no more, however wide
                        exact = self._exact(queries_BD[query : query + 1], depth)
                        scores_BK[query], rows_BK[query] = exact[0][0], exact[1][0]
                    continue
                scores = self._scores_of(queries_BD[query], documents)
                order = np.argsort(-scores, kind="stable")[:depth]
                scores_BK[query], rows_BK[query] = scores[order], documents[order]
            left = np.array(short, dtype=np.int64)
        return scores_BK, rows_BK

    def _scores_of(self, query_D: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Scores of some documents, their rows rising."""
        ends = np.searchsorted(documents, [block.first + len(block.starts_P) for block in self._blocks])
        scores = [np.empty(0, dtype=np.float32)]
        for block, here in zip(self._blocks, np.split(documents, ends[:-1]), strict=True):
            if len(here):
                counts = _counts(block)[here - block.first]
                new_starts = np.cumsum(counts) - counts
                rows = np.repeat(block.starts_P[here - block.first] - new_starts, counts) + np.arange(counts.sum())
                scores_1W = _products(query_D[None], block.windows_WD[rows])
                scores.append(aggregate_windows(scores_1W, new_starts, self.aggregate)[0])
        return np.concatenate(scores)


def _products(queries_BD: np.ndarray, windows_WD: np.ndarray) -> np.ndarray:
    """Inner products, [B, W]: equal windows get equal scores, wherever they stand.

    So it is by torch, and of a multiple of 8 queries. Of random cases with equal windows NumPy's product gave some of
    them several scores in 47%, torch's of any number of queries in 1.4%, this in none of 8,309 (one core of an AMD
    EPYC, 2026-11-21).
    """
    padded_BD = np.zeros((-(-len(queries_BD) // QUERY_ROWS) * QUERY_ROWS, queries_BD.shape[1]), dtype=np.float32)
    padded_BD[: len(queries_BD)] = queries_BD
    return (torch.from_numpy(padded_BD) @ torch.from_numpy(windows_WD).T).numpy()[: len(queries_BD)]


def _counts(block: Block) -> np.ndarray:
    """Windows of each document, [P]."""
    return np.diff(block.starts_P, append=len(block.windows_WD))


def _parts(block: Block, num_windows: int) -> Iterator[Block]:
    """The block in parts of whole documents with at most `num_windows` windows; a document with more goes alone."""
    ends_P = np.append(block.starts_P[1:], len(block.windows_WD))
    start = 0
    while start < len(ends_P):
        offset = block.starts_P[start]
        stop = max(start + 1, int(np.searchsorted(ends_P, offset + num_windows, side="right")))
        yield Block(
            block.first + start, block.windows_WD[offset : ends_P[stop - 1]], block.starts_P[start:stop] - offset
        )
        start = stop


def _first_largest(scores_BP: np.ndarray, depth: int) -> np.ndarray:
    """The columns of the `depth` largest of each row, rising; of those that tie at the end, the first ones."""
    if scores_BP.shape[1] <= depth:
        return np.broadcast_to(np.arange(scores_BP.shape[1]), scores_BP.shape)
    last_B1 = -np.partition(-scores_BP, depth - 1, axis=1)[:, depth - 1 : depth]
    tied_BP = scores_BP == last_B1
    room_B1 = depth - (scores_BP > last_B1).sum(axis=1, keepdims=True)
    kept_BP = (scores_BP > last_B1) | (tied_BP & (tied_BP.cumsum(axis=1) <= room_B1))
    return np.nonzero(kept_BP)[1].reshape(len(scores_BP), depth)


def _checked(embeddings: np.ndarray, dim: int) -> np.ndarray:
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise ValueError(f"embeddings of shape {embeddings.shape}, expected [N, {dim}]")
    return np.require(embeddings, np.float32, ["C", "W"])  # torch warns of arrays that may not be written to
