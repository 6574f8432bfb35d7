"""Exact nearest-neighbour search: a FAISS flat index over inner products.

Embeddings of a cosine model are unit rows already, so the inner product is right for cosine and dot product alike.

    index = FlatIndex(384)
    index.add(document_embeddings)
    scores, rows = index.search(query_embeddings, depth=100)

Shapes: Q queries, N documents (rows, numbered from 0 as added), D dimensions, K = min(depth, N) results.
"""

from collections.abc import Sequence

import numpy as np

from ..progress import progress_bar

# FAISS works through 4,096 queries at a time itself; blocks of that size cost nothing and let the bar move.
QUERY_BLOCK = 4096
# Queries searched at once when ties force a wider search: bounds memory when a whole corpus has one score.
TIED_BLOCK = 16


def require_finite(embeddings_ND: np.ndarray, kind: str, names: Sequence) -> None:
    """Raises `ValueError` naming the first row of [N, D] embeddings with NaN or infinity, as `kind` names[row]."""
    finite_N = np.isfinite(embeddings_ND).all(axis=1)
    if not finite_N.all():
        raise ValueError(f"the embedding of {kind} {names[int(finite_N.argmin())]!r} has values that are not finite")


class FlatIndex:
    """Every query against every document, by inner product, in float32.

    Results are the first `depth` under the order (computed score descending, row ascending), a total order: which of
    several documents tied at the cut-off are returned is not left to FAISS. Equal vectors tie as far as the matrix
    product gives them equal scores.

    Args:
        dim: D, the width of the embeddings.
    """

    def __init__(self, dim: int):
        import faiss

        self.dim = dim
        self._index = faiss.IndexFlatIP(dim)

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, embeddings_ND: np.ndarray) -> None:
        """Adds documents; their rows follow those added before. Raises `ValueError` on a wrong width, NaN or inf."""
        embeddings_ND = self._checked(embeddings_ND, range(len(self), len(self) + len(embeddings_ND)))
        self._index.add(embeddings_ND)

    def search(self, queries_QD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The `depth` documents of largest inner product for each query, or all of them when there are fewer.

        Returns:
            scores [Q, K] float32, never rising along a row, and rows [Q, K] int64, ascending among equal scores.

        Raises:
            ValueError: on an empty index, a depth below 1, a wrong width, NaN or inf.
        """
        if depth < 1:
            raise ValueError(f"search depth must be at least 1, not {depth}")
        if len(self) == 0:
            raise ValueError("search in an empty index: add documents first")
        queries_QD = self._checked(queries_QD, range(len(queries_QD)))
        depth = min(depth, len(self))
        scores_QK = np.empty((len(queries_QD), depth), dtype=np.float32)
        rows_QK = np.empty((len(queries_QD), depth), dtype=np.int64)
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, len(queries_QD), QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                scores_QK[block], rows_QK[block] = self._first(queries_QD[block], depth, min(depth + 1, len(self)))
                bar.update(len(queries_QD[block]))
        return scores_QK, rows_QK

    def _first(self, queries_QD: np.ndarray, depth: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` without its checks, from FAISS's best `width`; widened where a tie reaches the last of them."""
        scores_QW, rows_QW = self._index.search(queries_QD, width)
        order_QK = np.lexsort((rows_QW, -scores_QW), axis=1)[:, :depth]
        scores_QK = np.take_along_axis(scores_QW, order_QK, axis=1)
        rows_QK = np.take_along_axis(rows_QW, order_QK, axis=1)
        if width < len(self):
            # FAISS returns any of the documents that tie at its cut-off: only a last score below the depth-th tells
            # that all of those tied at the depth-th are here.
            tied = np.flatnonzero(scores_QW.min(axis=1) == scores_QK[:, -1])
            for start in range(0, len(tied), TIED_BLOCK):
                block = tied[start : start + TIED_BLOCK]
                wider = min(2 * width, len(self))
                scores_QK[block], rows_QK[block] = self._first(queries_QD[block], depth, wider)
        return scores_QK, rows_QK

    def _checked(self, embeddings_ND: np.ndarray, rows: range) -> np.ndarray:
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != self.dim:
            raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, {self.dim}]")
        embeddings_ND = np.ascontiguousarray(embeddings_ND, dtype=np.float32)
        require_finite(embeddings_ND, "row", rows)
        return embeddings_ND
