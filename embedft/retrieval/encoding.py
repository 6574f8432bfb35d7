"""Texts to vectors: queries at once, the corpus one slice at a time, whole texts or windows of them.

    ids, texts = sorted_corpus(dataset)
    for part in encode_documents(embedder, ids, texts, passages=(128, 64)):
        ...                                          # part.vectors, part.source; freed before the next slice is encoded

Shapes: N documents or windows, W dimensions of the model, D of them kept.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..data.dataset import RetrievalDataset
from .index import require_finite


class SupportsEncode(Protocol):
    """What search needs of an embedder; it may have an `Embedder`'s full_dim, truncate_dim, normalize, device and
    encode_passages too. Rows have unit length if similarity is "cosine"."""

    similarity: Literal["cosine", "dot"]

    def encode(self, texts: list[str], *, role: str, dim: int | None) -> np.ndarray: ...


class Slice(NamedTuple):
    """Vectors [N, W] of the documents from `first` on. source_N: the document, within the slice, of each window."""

    first: int
    vectors: np.ndarray
    source: np.ndarray | None = None


def sorted_corpus(dataset: RetrievalDataset) -> tuple[list[str], list[str]]:
    """Document ids in ascending order, and their texts, titles included. Search orders ties by row, so by id."""
    texts = dict(sorted(zip(dataset.corpus, dataset.document_texts(), strict=True)))
    return list(texts), list(texts.values())


def encode(embedder: SupportsEncode, texts: list[str], ids: Sequence[str], *, role: str) -> np.ndarray:
    """Vectors of texts in all dimensions of the model, [N, W] float32, all finite."""
    embeddings = embedder.encode(texts, role=role, dim=getattr(embedder, "full_dim", None))
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ValueError(f"encoding {len(texts)} texts returned an array of shape {embeddings.shape}")
    require_finite(embeddings, role, ids)
    return np.asarray(embeddings, dtype=np.float32)


def encode_documents(
    embedder: SupportsEncode,
    ids: Sequence[str],
    texts: list[str],
    *,
    passages: Sequence[int] | None,
    slice_documents: int | None = None,
    costs: dict[str, float] | None = None,
) -> Iterator[Slice]:
    """Yields the vectors of the corpus slice by slice, in all dimensions; keeps none of them.

    A slice has 65,536 documents by default, 4,096 with passages. The seconds are added to `costs`.
    """
    step, width = slice_documents or (65_536 if passages is None else 4_096), getattr(embedder, "full_dim", None)
    for first in range(0, len(ids), step):
        part_ids, part_texts = ids[first : first + step], texts[first : first + step]
        with timed({} if costs is None else costs, "document_encoding_seconds"):
            if passages is None:
                part = Slice(first, encode(embedder, part_texts, part_ids, role="document"))
            else:
                vectors, source = embedder.encode_passages(part_texts, passages, role="document", dim=width)
                found = len(np.unique(source))
                if (len(source), found) != (len(vectors), len(part_ids)):
                    raise ValueError(f"{len(part_ids)} documents gave {len(vectors)} windows of {found} documents")
                require_finite(vectors, "a window of document", [part_ids[row] for row in source])
                part = Slice(first, np.asarray(vectors, dtype=np.float32), np.asarray(source))
                del vectors
        yield part
        del part


def truncate(embedder: SupportsEncode, vectors_NW: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` dimensions, normalized again if the model's vectors are: what `Embedder.encode(dim=)` returns on
    the CPU, bit for bit."""
    if dim == vectors_NW.shape[1]:
        return vectors_NW
    vectors_ND = np.ascontiguousarray(vectors_NW[:, :dim])
    if not getattr(embedder, "normalize", embedder.similarity == "cosine"):
        return vectors_ND
    return F.normalize(torch.from_numpy(vectors_ND), dim=1).numpy()


def join_slices(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray | None]:
    """All vectors in one array, and the document of each window. Each slice is taken from the list and dropped once it
    is copied, so the vectors are never held twice."""
    sources = [part.source + part.first for part in slices if part.source is not None]
    source_N = np.concatenate(sources) if sources else None
    vectors_NW = np.empty((sum(len(part.vectors) for part in slices), slices[0].vectors.shape[1]), dtype=np.float32)
    row = 0
    while slices:
        part = slices.pop(0).vectors
        vectors_NW[row : row + len(part)] = part
        row += len(part)
    return vectors_NW, source_N


@contextlib.contextmanager
def timed(costs: dict, name: object) -> Iterator[None]:
    """Adds the seconds that a block takes to costs[name]."""
    start = time.perf_counter()
    yield
    costs[name] = costs.get(name, 0.0) + time.perf_counter() - start
