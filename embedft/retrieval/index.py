"""Exact nearest-neighbour search by inner product, in FAISS on the CPU and in torch on CUDA and MPS.

Embeddings of a cosine model are unit rows already, so the inner product is right for cosine and dot product alike.

    index = FlatIndex(384)
    index.add(document_embeddings)
    scores, rows = index.search(query_embeddings, depth=100)
    scores, rows = search_exact(query_embeddings, np.load("documents.npy", mmap_mode="r"), depth=100)   # in slices

Results are the first `depth` under the order (computed score descending, row ascending), a total order: which of
several documents tied at the cut-off are returned is left to no library. Equal vectors tie as far as the matrix product
gives them equal scores.

Not here: indices that find most of them sooner (approximate.py), smaller vectors (quantization.py), shorter ones first
(adaptive.py).

Shapes: Q queries, N documents (rows, numbered from 0 as added), D dimensions, K = min(depth, N) results, W >= K.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..progress import progress_bar

# FAISS works through 4,096 queries at a time itself; blocks of that size cost nothing and let the bar move.
QUERY_BLOCK = 4096
# Queries searched at once when ties force a wider search: bounds memory when a whole corpus has one score.
TIED_BLOCK = 16
# Documents of a slice: 100 MB at 384 dimensions. With torch, scores of a block of queries: 256 MB.
DOCUMENT_SLICE = 65_536
TORCH_QUERY_BLOCK = 1024
# Vectors gathered at once to score shortlists.
GATHERED_BLOCK = 16_384

# (queries [Q, D], width W) -> scores [Q, W] and rows [Q, W]: the best W, in any order and with any choice among ties.
Nearest = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Found(NamedTuple):
    """Results of a search. scores [Q, K] float32 descending, rows [Q, K] int64; -inf and -1 where there is none."""

    scores: np.ndarray
    rows: np.ndarray


def require_finite(embeddings_ND: np.ndarray, kind: str, names: Sequence) -> None:
    """Raises `ValueError` naming the first row of [N, D] embeddings with NaN or infinity, as `kind` names[row]."""
    for start in range(0, len(embeddings_ND), DOCUMENT_SLICE):
        finite_N = np.isfinite(embeddings_ND[start : start + DOCUMENT_SLICE]).all(axis=1)
        if not finite_N.all():
            name = names[start + int(finite_N.argmin())]
            raise ValueError(f"the embedding of {kind} {name!r} has values that are not finite")


def require_depth(depth: int) -> None:
    """Raises `ValueError` on a depth below 1."""
    if depth < 1:
        raise ValueError(f"search depth must be at least 1, not {depth}")


def checked_embeddings(embeddings_ND: np.ndarray, dim: int | None, *, first_row: int = 0) -> np.ndarray:
    """The embeddings as contiguous float32, not copied when they are that.

    Args:
        dim: the D expected; None: any from 1.
        first_row: the number of the first of them, for the error.

    Raises:
        ValueError: on another shape than [N, D], NaN or inf.
    """
    if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != (dim or max(embeddings_ND.shape[1], 1)):
        expected = "D" if dim is None else dim
        raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, {expected}]")
    embeddings_ND = np.ascontiguousarray(embeddings_ND, dtype=np.float32)
    require_finite(embeddings_ND, "row", range(first_row, first_row + len(embeddings_ND)))
    return embeddings_ND


class FlatIndex:
    """Every query against every document, by inner product, in float32, from a copy of the documents that FAISS holds.

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
        self._index.add(checked_embeddings(embeddings_ND, self.dim, first_row=len(self)))

    def search(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The `depth` documents of largest inner product for each query, or all of them when there are fewer.

        Returns:
            scores [Q, K] float32, never rising along a row, and rows [Q, K] int64, ascending among equal scores.

        Raises:
            ValueError: on an empty index, a depth below 1, a wrong width, NaN or inf.
        """
        require_depth(depth)
        if len(self) == 0:
            raise ValueError("search in an empty index: add documents first")
        queries_QD = checked_embeddings(queries_QD, self.dim)
        keys_QK = np.empty((len(queries_QD), min(depth, len(self))), dtype=np.uint64)
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, len(queries_QD), QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                keys_QK[block] = first_keys(self._index.search, queries_QD[block], depth, len(self))
                bar.update(len(queries_QD[block]))
        return from_keys(keys_QK)


def search_exact(
    queries_QD: np.ndarray,
    documents: np.ndarray | Iterable[np.ndarray],
    depth: int,
    *,
    device: torch.device | str | None = None,
) -> Found:
    """What `FlatIndex` finds, without holding the documents: each slice is searched once and dropped.

    Memory beside the arguments: one slice (in float32), 8 bytes for each of Q x K results, and with torch a block of
    scores; never [Q, N].

    Args:
        documents: [N, D], an array or a memory map of any float type; or an iterable of such, [n, D] each, whose rows
            are numbered on from one to the next.
        device: where the products are computed; None and the CPU: by FAISS. On CUDA they are as exact as
            `torch.get_float32_matmul_precision()` says.

    Returns:
        scores [Q, K] float32 and rows [Q, K] int64, ordered as by `FlatIndex`.

    Raises:
        ValueError: on no documents, a depth below 1, a wrong width, NaN or inf.
    """
    device = torch.device(device or "cpu")
    return _search_slices(
        _nearest_faiss if device.type == "cpu" else _nearest_torch(device), queries_QD, documents, depth
    )


def merge_keys(keys_QK: np.ndarray, found: Found, first_row: int, depth: int) -> np.ndarray:
    """The first `depth` of what earlier slices gave (keys) and of what was found in one that begins at `first_row`."""
    both_QK = np.concatenate([keys_QK, to_keys(found.scores, found.rows + first_row)], axis=1)
    both_QK.sort(axis=1)
    return both_QK[:, :depth].copy()


def search_shortlist(queries_QD: np.ndarray, rows_QS: np.ndarray, vectors_of: Callable, depth: int) -> Found:
    """Scores the documents of each query's shortlist by inner product, and keeps the first `depth`.

    Equal vectors get equal scores, whatever their place in the shortlist.

    Args:
        rows_QS: [Q, S] distinct rows a query; -1: none.
        vectors_of: rows [M] ascending -> their vectors [M, D].

    Returns:
        scores and rows [Q, min(depth, S)].
    """
    keys_QK = np.empty((len(queries_QD), min(depth, rows_QS.shape[1])), dtype=np.uint64)
    block_size = max(1, GATHERED_BLOCK // max(rows_QS.shape[1], 1))
    for start in range(0, len(queries_QD), block_size):
        block = slice(start, start + block_size)
        # A memory map is read in its order, each of its rows once.
        unique_M, place = np.unique(np.maximum(rows_QS[block], 0), return_inverse=True)
        vectors_MD = np.asarray(vectors_of(unique_M), dtype=np.float32)
        gathered_QSD = vectors_MD[place.reshape(rows_QS[block].shape)]
        # No BLAS: its kernels round differently by place, and equal vectors would not tie.
        scores_QS = np.einsum("qsd,qd->qs", gathered_QSD, queries_QD[block].astype(np.float32, copy=False))
        keys_QS = to_keys(np.where(rows_QS[block] < 0, -np.inf, scores_QS).astype(np.float32), rows_QS[block])
        keys_QS.sort(axis=1)
        keys_QK[block] = keys_QS[:, :depth]
    return from_keys(keys_QK)


def recall_against(rows_QK: np.ndarray, exact_rows_QK: np.ndarray) -> np.ndarray:
    """The share of the exact results that were found, a value for each query: |found & exact| / |exact|, [Q] float64.

    Args:
        rows_QK: distinct rows found for each query; -1: none. Its K may differ from that of `exact_rows_QK`, whose
            width is the k of recall@k.

    Raises:
        ValueError: on different numbers of queries, or a query without exact results.
    """
    if len(rows_QK) != len(exact_rows_QK):
        raise ValueError(f"results of {len(rows_QK)} queries against exact results of {len(exact_rows_QK)}")
    wanted_QK = exact_rows_QK >= 0
    if not wanted_QK.any(axis=1).all():
        raise ValueError(f"query {int(wanted_QK.any(axis=1).argmin())} has no exact results")
    found_QK = np.array([np.isin(exact, rows) for rows, exact in zip(rows_QK, exact_rows_QK, strict=True)], dtype=bool)
    return (found_QK.reshape(wanted_QK.shape) & wanted_QK).sum(axis=1) / wanted_QK.sum(axis=1)


# Score and row of a result in one number, whose ascending order is (score descending, row ascending): NumPy sorts
# these several times as fast as it sorts by two keys. Rows must be below 2**32 - 1, which stands for none.


def to_keys(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 keys of float32 scores (no NaN) and int64 rows (-1: none) of one shape. -0.0 is 0.0."""
    bits = (scores + np.float32(0)).view(np.uint32)
    # As unsigned numbers, bits of negative floats ascend as the floats fall, and come after those of positive ones.
    descending = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))
    return (descending.astype(np.uint64) << np.uint64(32)) | (rows.astype(np.uint64) & np.uint64(0xFFFFFFFF))


def from_keys(keys: np.ndarray) -> Found:
    """The scores and rows of keys."""
    descending = (keys >> np.uint64(32)).astype(np.uint32)
    scores = np.where(descending >> 31, descending, descending ^ np.uint32(0x7FFFFFFF)).view(np.float32)
    rows = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return Found(scores, np.where(rows == 0xFFFFFFFF, -1, rows))


def first_keys(nearest: Nearest, queries_QD: np.ndarray, depth: int, total: int, *, width: int = 0) -> np.ndarray:
    """Sorted keys [Q, min(depth, N)] of the first results of a search that is exact but for its choice among ties.

    Args:
        nearest: searches `total` documents.
        width: results asked for at first; 0: one more than `depth`.
    """
    depth = min(depth, total)
    width = min(width or depth + 1, total)
    scores_QW, rows_QW = nearest(queries_QD, width)
    keys_QW = to_keys(scores_QW, rows_QW)
    keys_QW.sort(axis=1)
    keys_QK = keys_QW[:, :depth]
    if width < total:
        # Any of the documents that tie at the cut-off may have come: only a last score below the depth-th tells that
        # all of those tied at the depth-th are here.
        tied = np.flatnonzero(keys_QW[:, -1] >> np.uint64(32) == keys_QK[:, -1] >> np.uint64(32))
        for start in range(0, len(tied), TIED_BLOCK):
            block = tied[start : start + TIED_BLOCK]
            keys_QK[block] = first_keys(nearest, queries_QD[block], depth, total, width=2 * width)
    return keys_QK


def slices_of(documents: np.ndarray | Iterable[np.ndarray], dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, contiguous float32 [n, D]) for at most `DOCUMENT_SLICE` documents at a time.

    Raises:
        ValueError: on a wrong width, NaN or inf, naming the row.
    """
    first_row = 0
    for part in [documents] if isinstance(documents, np.ndarray) else documents:
        for start in range(0, len(part), DOCUMENT_SLICE):
            slice_ND = checked_embeddings(part[start : start + DOCUMENT_SLICE], dim, first_row=first_row)
            yield first_row, slice_ND
            first_row += len(slice_ND)


def _search_slices(nearest_in: Callable[[np.ndarray], Nearest], queries_QD: np.ndarray, documents, depth: int) -> Found:
    """`search_exact` by any search of a slice: nearest_in(slice [n, D])."""
    require_depth(depth)
    queries_QD = checked_embeddings(queries_QD, None)
    keys_QK = np.empty((len(queries_QD), 0), dtype=np.uint64)
    total, num_documents = 0, len(documents) if isinstance(documents, np.ndarray) else None
    with progress_bar(num_documents, "searching", unit="document") as bar:
        for first_row, slice_ND in slices_of(documents, queries_QD.shape[1]):
            nearest = nearest_in(slice_ND)
            total = first_row + len(slice_ND)
            merged_QK = np.empty((len(queries_QD), min(depth, total)), dtype=np.uint64)
            for start in range(0, len(queries_QD), QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                new = first_keys(nearest, queries_QD[block], depth, len(slice_ND)) + np.uint64(first_row)
                both = np.concatenate([keys_QK[block], new], axis=1)
                both.sort(axis=1)
                merged_QK[block] = both[:, :depth]
            keys_QK = merged_QK
            bar.update(len(slice_ND))
    if total == 0:
        raise ValueError("search among no documents")
    return from_keys(keys_QK)


def _nearest_faiss(documents_ND: np.ndarray) -> Nearest:
    import faiss

    def nearest(queries_QD: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        return faiss.knn(queries_QD, documents_ND, width, metric=faiss.METRIC_INNER_PRODUCT)

    return nearest


def _nearest_torch(device: torch.device) -> Callable[[np.ndarray], Nearest]:
    def nearest_in(documents_ND: np.ndarray) -> Nearest:
        # A copy: torch warns of arrays that may not be written to, as memory maps are.
        documents = torch.tensor(documents_ND, device=device)

        def nearest(queries_QD: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            found = []
            for block in torch.tensor(queries_QD).split(TORCH_QUERY_BLOCK):
                best = torch.topk(block.to(device) @ documents.T, width, dim=1, sorted=False)
                found.append((best.values.cpu(), best.indices.cpu()))
            scores, rows = zip(*found, strict=True)
            return torch.cat(scores).numpy(), torch.cat(rows).numpy()

        return nearest

    return nearest_in
