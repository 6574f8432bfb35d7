"""Encodes queries all at once and the corpus one slice at a time, as whole texts or windows of them.

    for part in encode_documents(embedder, sorted_corpus(dataset), (128, 64), None, {}):
        ...                                          # part.vectors, part.source; freed before the next slice is encoded

Shapes: N documents or windows, W dimensions of the model, D of them kept.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..data.dataset import RetrievalDataset
from ..encoders.token_ids import window_sizes
from .index import require_finite

Passages = Sequence[int] | None  # (size, stride) of windows in tokens, or several such pairs; None: whole documents


class SupportsEncode(Protocol):
    """What search needs of an embedder; its vectors have unit length if similarity is "cosine". It may also have the
    full_dim, truncate_dim, normalize, device, pack and encode_passages of an `Embedder`."""

    similarity: Literal["cosine", "dot"]

    def encode(self, texts: list[str], *, role: str, dim: int | None) -> np.ndarray: ...


class Slice(NamedTuple):
    """Vectors [N, W] of the documents from `first` on. With windows, source [N] ascends: for windows of the s-th of S
    sizes, from 0, of the slice's document d it is S d + s, which is d with one size."""

    first: int
    vectors: np.ndarray
    source: np.ndarray | None = None
    num_sizes: int = 1


def sorted_corpus(dataset: RetrievalDataset) -> dict[str, str]:
    """{document id: text with title}, ids ascending: search orders ties by row, and thus by id."""
    return dict(sorted(dataset.texts.items()))


def encode(embedder: SupportsEncode, texts: Mapping[str, str], role: str) -> np.ndarray:
    """Vectors of {id: text} in all dimensions of the model, [N, W] float32, all finite."""
    embeddings = embedder.encode(list(texts.values()), role=role, dim=getattr(embedder, "full_dim", None))
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ValueError(f"encoding {len(texts)} texts returned an array of shape {embeddings.shape}")
    require_finite(embeddings, role, list(texts))
    return np.asarray(embeddings, dtype=np.float32)


def encode_documents(
    embedder: SupportsEncode, documents: Mapping[str, str], passages: Passages, slice_documents: int | None, costs: dict
) -> Iterator[Slice]:
    """Yields full vectors of {id: text}, 65,536 documents [passages: 4,096] at a time; adds the seconds to `costs`."""
    step, items = slice_documents or (65_536 if passages is None else 4_096), list(documents.items())
    for first in range(0, len(items), step):
        texts = dict(items[first : first + step])
        with timed(costs, "document_encoding_seconds"):
            if passages is None:
                part = Slice(first, encode(embedder, texts, "document"))
            else:
                part = Slice(first, *_encode_windows(embedder, texts, passages), num_sizes(passages))
        yield part
        del part


def num_sizes(passages: Passages) -> int:
    """The number of window sizes; 1 for whole documents."""
    return 1 if passages is None else len(passages) // 2


def _encode_windows(
    embedder: SupportsEncode, texts: Mapping[str, str], passages: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all windows of {id: text}, and their source, as a `Slice` has them."""
    options, ids = {"role": "document", "dim": getattr(embedder, "full_dim", None)}, list(texts)
    pairs, parts, sources = window_sizes(passages), [], []
    for size, pair in enumerate(pairs):
        vectors, source = embedder.encode_passages(list(texts.values()), pair, **options)
        found = len(np.unique(source))
        if (len(source), found) != (len(vectors), len(ids)):
            raise ValueError(f"{len(ids)} documents gave {len(vectors)} windows of {found} documents")
        require_finite(vectors, "a window of document", [ids[row] for row in source])
        parts.append(np.asarray(vectors, dtype=np.float32))
        sources.append(np.asarray(source) * len(pairs) + size)
        del vectors
    if len(pairs) == 1:
        return parts[0], sources[0]
    source_N, vectors_NW = np.concatenate(sources), np.concatenate(parts)
    parts.clear()  # so that at most two copies are held
    order_N = np.argsort(source_N, kind="stable")
    return vectors_NW[order_N], source_N[order_N]


def truncate(embedder: SupportsEncode, vectors_NW: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` dimensions, renormalized if the model normalizes, as `Embedder.encode(dim=)` does on the CPU."""
    if dim == vectors_NW.shape[1]:
        return vectors_NW
    vectors_ND = np.ascontiguousarray(vectors_NW[:, :dim])
    if not getattr(embedder, "normalize", embedder.similarity == "cosine"):
        return vectors_ND
    return F.normalize(torch.from_numpy(vectors_ND), dim=1).numpy()


def join_slices(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray | None]:
    """All vectors in one array, and their source, as of one slice. Empties the list, so no vectors are held twice."""
    sources = [part.source + part.first * part.num_sizes for part in slices if part.source is not None]
    source_N = np.concatenate(sources) if sources else None
    if len(slices) == 1:
        return slices.pop().vectors, source_N
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
