"""Adaptive retrieval: the first features of Matryoshka embeddings find a shortlist, all features order it.

    index = AdaptiveIndex(document_embeddings, 64, 200)                        # 64 of 384 features, 200 documents
    index = AdaptiveIndex(document_embeddings, (16, 32, 64), (200, 100, 50))   # a funnel
    scores, rows = index.search(query_embeddings, depth=10)

Not here: training such embeddings (losses/matryoshka.py).

Shapes: Q queries, N documents, D dimensions, S of a shortlist, K = min(depth, N) results.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .approximate import build_index, unit_rows
from .index import Found, checked_embeddings, require_depth, search_shortlist


class AdaptiveIndex:
    """A search on the first `short_dim` features, normalised again, whose `shortlist` is scored by the full vectors.

    With several dims each stage scores the shortlist of the one before it by its own features, normalised again, and
    keeps its own share. What the short vectors miss stays missed; with a shortlist of N the results are the exact ones.
    The last scores are inner products of the vectors as they are given.

    Args:
        embeddings_ND: an array or a memory map; not copied, rows are read from it for every shortlist. The short
            vectors of the first stage are held in memory, in an index.
        short_dim: features of each stage, rising, below D; one number for one stage.
        shortlist: documents that each stage keeps, not rising; at least the depth asked for.
        preset: of the first stage, and `seed`: see `build_index`.

    Raises:
        ValueError: on no documents, a wrong shape, NaN or inf, dims that do not rise or reach D, shortlists that rise,
            are below 1, or of another number than the dims.

    Source: Kusupati et al. 2022, section 4.3.1 (adaptive and funnel retrieval).
    """

    def __init__(
        self,
        embeddings_ND: np.ndarray,
        short_dim: int | Sequence[int],
        shortlist: int | Sequence[int],
        *,
        preset: str = "flat",
        seed: int = 0,
    ):
        if embeddings_ND.ndim != 2:
            raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, D]")
        self.short_dims = (short_dim,) if isinstance(short_dim, int) else tuple(short_dim)
        self.shortlists = (shortlist,) if isinstance(shortlist, int) else tuple(shortlist)
        self.dim = embeddings_ND.shape[1]
        steps = (0, *self.short_dims, self.dim)
        if len(steps) < 3 or any(low >= high for low, high in pairwise(steps)):
            raise ValueError(f"short dims {self.short_dims}, expected to rise from at least 1 to below D = {self.dim}")
        falling = sorted(self.shortlists, reverse=True) == list(self.shortlists)
        if len(self.shortlists) != len(self.short_dims) or not falling or self.shortlists[-1] < 1:
            raise ValueError(
                f"shortlists {self.shortlists}, expected one of at least 1 for each of {len(self.short_dims)} dims,"
                " none larger than the one before it"
            )
        self._embeddings_ND = embeddings_ND
        self._index = build_index(embeddings_ND[:, : self.short_dims[0]], preset, metric="cosine", seed=seed)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def bytes_per_document(self) -> float:
        """Of the first stage's index and of the full vectors, wherever they are."""
        return self._index.bytes_per_document + self.dim * self._embeddings_ND.itemsize

    def search(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The first `depth` of the last shortlist for each query, ordered by (score descending, row ascending).

        Returns:
            scores [Q, K] float32 and rows [Q, K] int64; -inf and -1 where an approximate first stage found fewer.

        Raises:
            ValueError: on a depth below 1 or above the last shortlist (unless that holds all documents), a wrong
                width, NaN or inf.
        """
        require_depth(depth)
        queries_QD = checked_embeddings(queries_QD, self.dim)
        if depth > self.shortlists[-1] < len(self):
            raise ValueError(f"search depth {depth} is above the last shortlist, {self.shortlists[-1]}")
        first, *others = self.short_dims
        rows_QS = self._index.search(queries_QD[:, :first], self.shortlists[0]).rows
        for dim, keep in zip(others, self.shortlists[1:], strict=True):
            short_QD = unit_rows(queries_QD[:, :dim])
            rows_QS = search_shortlist(short_QD, rows_QS, lambda rows, d=dim: self._first_features(rows, d), keep).rows
        return search_shortlist(queries_QD, rows_QS, self._embeddings_ND.__getitem__, min(depth, len(self)))

    def _first_features(self, rows_M: np.ndarray, dim: int) -> np.ndarray:
        return unit_rows(self._embeddings_ND[rows_M, :dim].astype(np.float32, copy=False))
