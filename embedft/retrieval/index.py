"""Exact nearest-neighbor search by inner product, which is the cosine for unit vectors.

    scores, rows = search_exact(query_embeddings, np.load("documents.npy", mmap_mode="r"), depth=100)   # in slices

Results are in order (score descending, row ascending), even at the cutoff. Equal vectors tie if their products do.

Shapes: Q queries, N documents (rows, numbered from 0), D dimensions, K = min(depth, N) results, W >= K.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..progress import progress_bar

Nearest = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # (queries, W) -> the best W in any order
SLICE_DOCUMENTS = 65_536  # 100 MB at 384 dimensions


class Found(NamedTuple):
    """Search results. scores [Q, K] float32 descending, rows [Q, K] int64; -inf and -1 where there is no result."""

    scores: np.ndarray
    rows: np.ndarray


class Index:
    """The base class of indices over N documents of D dimensions. A subclass's `_search` gets checked queries."""

    def __init__(self, embeddings_ND: np.ndarray):
        if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
            raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, D] with at least one document")
        self.num_documents, self.dim = embeddings_ND.shape

    def __len__(self) -> int:
        return self.num_documents

    def search(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The first `depth` documents. Raises `ValueError` for a depth below 1, a wrong width, NaN or infinity."""
        require_depth(depth)
        return self._search(checked_embeddings(queries_QD, self.dim), depth)


def require_finite(embeddings_ND: np.ndarray, kind: str, names: Sequence, *, slice_rows: int = SLICE_DOCUMENTS) -> None:
    """Raises `ValueError` for NaN or infinity, naming the first such row as names[row]."""
    for start in range(0, len(embeddings_ND), slice_rows):
        finite_N = np.isfinite(embeddings_ND[start : start + slice_rows]).all(axis=1)
        if not finite_N.all():
            name = names[start + int(finite_N.argmin())]
            raise ValueError(f"the embedding of {kind} {name!r} has values that are not finite")


def require_depth(depth: int) -> None:
    """Raises `ValueError` below 1."""
    if depth < 1:
        raise ValueError(f"search depth must be at least 1, not {depth}")


def checked_embeddings(embeddings_ND: np.ndarray, dim: int | None = None, *, first_row: int = 0) -> np.ndarray:
    """The array as contiguous float32. Raises `ValueError` for a shape other than [N, dim] (None: any D from 1) and for
    NaN or infinity, naming the row, counted from `first_row`."""
    if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != (dim or max(embeddings_ND.shape[1], 1)):
        raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, {dim or 'D'}]")
    embeddings_ND = np.ascontiguousarray(embeddings_ND, dtype=np.float32)
    require_finite(embeddings_ND, "row", range(first_row, first_row + len(embeddings_ND)))
    return embeddings_ND


def slices_of(
    documents: np.ndarray | Iterable[np.ndarray], dim: int, *, slice_documents: int = SLICE_DOCUMENTS
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, float32 [n, D]) for at most `slice_documents` documents at a time, checked."""
    first_row = 0
    for part in [documents] if isinstance(documents, np.ndarray) else documents:
        for start in range(0, len(part), slice_documents):
            slice_ND = checked_embeddings(part[start : start + slice_documents], dim, first_row=first_row)
            yield first_row, slice_ND
            first_row += len(slice_ND)


def search_exact(
    queries_QD: np.ndarray,
    documents: np.ndarray | Iterable[np.ndarray],
    depth: int,
    *,
    device: torch.device | str | None = None,
    slice_documents: int = SLICE_DOCUMENTS,
) -> Found:
    """The `depth` documents with the largest inner product for each query, or all of them if there are fewer.

    documents: [N, D], an array or a memory map of any float type; or an iterable of such arrays, each searched once and
    dropped, with rows numbered consecutively. device: FAISS computes products on the CPU (None), torch elsewhere.

    Memory: one slice in float32, three times the results and, with torch, the scores of 1,024 queries; never [Q, N].
    Raises `ValueError` for no documents, a depth below 1, a wrong width, NaN or infinity."""
    require_depth(depth)
    device = torch.device(device or "cpu")
    queries_QD = checked_embeddings(queries_QD)
    keys_QK = np.empty((len(queries_QD), 0), dtype=np.uint64)
    num_documents = len(documents) if isinstance(documents, np.ndarray) else None
    with progress_bar(num_documents, "searching", unit="document") as bar:
        for first_row, slice_ND in slices_of(documents, queries_QD.shape[1], slice_documents=slice_documents):
            nearest = _nearest_faiss(slice_ND) if device.type == "cpu" else _nearest_torch(slice_ND, device)
            new_QK = first_keys(nearest, queries_QD, depth, len(slice_ND)) + np.uint64(first_row)
            keys_QK = merge_keys(keys_QK, new_QK, depth)
            bar.update(len(slice_ND))
    if keys_QK.shape[1] == 0:
        raise ValueError("there are no documents to search")
    return from_keys(keys_QK)


class FlatIndex(Index):
    """`search_exact` over documents [N, D], which are not copied."""

    def __init__(self, documents_ND: np.ndarray):
        super().__init__(documents_ND)
        self.documents_ND = documents_ND

    def _search(self, queries_QD: np.ndarray, depth: int) -> Found:
        return search_exact(queries_QD, self.documents_ND, depth)


def recall_against(rows_QK: np.ndarray, exact_rows_QK: np.ndarray) -> np.ndarray:
    """Share of the exact results that were found, per query: |found & exact| / |exact|, [Q]. The two K may differ."""
    pairs = zip(rows_QK, np.where(exact_rows_QK < 0, -2, exact_rows_QK), strict=True)
    return np.array([np.isin(exact, rows).sum() for rows, exact in pairs]) / (exact_rows_QK >= 0).sum(axis=1)


# A key packs score and row into one integer, whose ascending order is (score descending, row ascending): NumPy sorts
# these several times faster than it sorts by two keys. Rows must be below 2**32 - 1, which stands for "none".


def to_keys(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 keys of float32 scores (no NaN) and int64 rows (-1: none) of the same shape. -0.0 becomes 0.0."""
    bits = (scores + np.float32(0)).view(np.uint32)
    # Read as unsigned integers, negative floats ascend as their values fall, and follow the positive ones.
    descending = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))
    return (descending.astype(np.uint64) << np.uint64(32)) | (rows.astype(np.uint64) & np.uint64(0xFFFFFFFF))


def from_keys(keys: np.ndarray) -> Found:
    """The scores and rows of keys."""
    descending = (keys >> np.uint64(32)).astype(np.uint32)
    scores = np.where(descending >> 31, descending, descending ^ np.uint32(0x7FFFFFFF)).view(np.float32)
    rows = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return Found(scores, np.where(rows == 0xFFFFFFFF, -1, rows))


def first_of(scores: np.ndarray, rows: np.ndarray, depth: int) -> Found:
    """The first `depth` of [Q, W] scores and rows. Row -1 means that there is no result."""
    return from_keys(np.sort(to_keys(np.where(rows < 0, np.float32(-np.inf), scores), rows), axis=1)[:, :depth])


def merge_keys(keys_QK: np.ndarray, new_QK: np.ndarray, depth: int) -> np.ndarray:
    """The first `depth` of two arrays of keys, sorted."""
    return np.sort(np.concatenate([keys_QK, new_QK], axis=1), axis=1)[:, :depth].copy()


def first_keys(
    nearest: Nearest, queries_QD: np.ndarray, depth: int, total: int, *, width: int = 0, block_queries: int = 16
) -> np.ndarray:
    """Sorted keys [Q, min(depth, N)] of the first of `total` documents, given a search that is exact except among ties.
    Queries with ties at the cutoff are searched again with double the width, `block_queries` at a time."""
    depth = min(depth, total)
    width = min(width or depth + 1, total)
    keys_QW = to_keys(*nearest(queries_QD, width))
    keys_QW.sort(axis=1)
    keys_QK = keys_QW[:, :depth]
    if width < total:
        # All documents tied at rank `depth` are here only if the last score is below theirs.
        tied = np.flatnonzero(keys_QW[:, -1] >> np.uint64(32) == keys_QK[:, -1] >> np.uint64(32))
        for start in range(0, len(tied), block_queries):
            part = tied[start : start + block_queries]
            keys_QK[part] = first_keys(nearest, queries_QD[part], depth, total, width=2 * width)
    return keys_QK


def _nearest_faiss(documents_ND: np.ndarray) -> Nearest:
    import faiss

    return lambda queries_QD, width: faiss.knn(queries_QD, documents_ND, width, metric=faiss.METRIC_INNER_PRODUCT)


def _nearest_torch(documents_ND: np.ndarray, device: torch.device, *, block_queries: int = 1024) -> Nearest:
    """Computes in blocks of queries, whose scores take 256 MB at 65,536 documents."""
    documents = torch.tensor(documents_ND, device=device)  # copied: torch warns about read-only arrays (memory maps)

    def nearest(queries_QD: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = torch.tensor(queries_QD).split(block_queries)
        found = [[x.cpu() for x in torch.topk(block.to(device) @ documents.T, width, sorted=False)] for block in blocks]
        return tuple(torch.cat(parts).numpy() for parts in zip(*found, strict=True))

    return nearest
