"""How vectors are searched: in how many dimensions, as what they are stored, and through which index.

| precision | stored of a vector | scored as |
|-----------|--------------------|-----------|
| float32 | 4 bytes a dimension | query . vector |
| int8 | 1 byte a dimension, ranges from the corpus | query . what the codes stand for |
| binary | 1 bit a dimension | Hamming distance; the first four times `depth` again by query . signs (+1, -1) |

Queries stay float32, and nothing is rescored with vectors finer than those that are stored. The index is "flat" (every
document), a preset of `build_index` (hnsw, ivf, ivfpq), a string for FAISS's `index_factory`, or "adaptive-64": the
first 64 dimensions find four times `depth` documents, which all dimensions order. int8 and binary go with flat, hnsw
and ivf. Under hnsw and ivf it is what the codes stand for that is searched, in float32: quality and bytes are those of
the codes, the speed is not. Over passages all but "flat" find windows, and then score all windows of the documents that
these are of (passages.py); they go with all but "adaptive".

    check_settings(embedder, [Setting(128, "int8", "hnsw")], [None], "max")
    built = build(vectors_ND, None, Setting(128, "int8", "hnsw"), aggregate="max", depth=100)
    scores, rows = built.search(queries_QD, 100)

Not here: the indices themselves (index.py, approximate.py, quantization.py, adaptive.py, passages.py), and where the
vectors come from (search.py).

Shapes: Q queries, N documents or windows, D dimensions, K = min(depth, documents) results.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .adaptive import AdaptiveIndex
from .approximate import build_index, check_index
from .index import Found, search_exact, slices_of
from .passages import PassageIndex, check_aggregate
from .quantization import QuantizedIndex, bytes_per_document, calibrate, from_binary, from_int8, to_binary, to_int8

PRECISIONS = ("float32", "int8", "binary")
# Indices that hold every vector as it is given, so one of codes in its place.
KEEP_VECTORS = ("hnsw", "ivf")
# Documents of a shortlist for each of `depth`: adaptive retrieval, and the rescoring of bits.
SHORTLIST_FACTOR = 4


class Setting(NamedTuple):
    """How documents are searched. dim None: as many dimensions as the embedder gives."""

    dim: int | None
    precision: str
    index: str

    @property
    def is_exact(self) -> bool:
        return self.precision == "float32" and self.index == "flat"


class Built(NamedTuple):
    """An index of any kind: search(queries [Q, D], depth), bytes of a vector in it, and what there is to know of it."""

    search: Callable[[np.ndarray, int], Found]
    bytes_per_vector: float
    facts: dict


def check_settings(
    embedder: object,
    settings: Sequence[Setting],
    passages: Sequence[Sequence[int] | None],
    aggregate: str,
    *,
    num_documents: int | None = None,
) -> None:
    """Raises `ValueError`, before anything is encoded, for what will not work with any of `passages`, naming all of it.

    What depends on the width of vectors is found here when the embedder has a `full_dim`, otherwise by `resolved`.
    """
    check_aggregate(aggregate)
    for windows in passages:
        if windows is not None and not hasattr(embedder, "encode_passages"):
            kind = type(embedder).__name__
            raise ValueError(f"passages is {tuple(windows)}: {kind} cannot cut documents into windows")
    impossible = []
    for (_, precision, index), windows in itertools.product(settings, passages):
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        if index.startswith("adaptive") and not _short_dim(index):
            raise ValueError(f"index is {index!r}, expected adaptive-DIM, as in adaptive-64")
        if precision != "float32" and index not in ("flat", *KEEP_VECTORS):
            impossible.append(f"{precision} with {index} (it goes with flat, {', '.join(KEEP_VECTORS)})")
        if _short_dim(index) and windows is not None:
            impossible.append(f"{index} with passages")
    _refuse(impossible)
    width = getattr(embedder, "full_dim", None)
    if width is not None:
        resolved(embedder, settings, width, num_documents=num_documents if None in passages else None)


def resolved(
    embedder: object, settings: Sequence[Setting], width: int, *, num_documents: int | None = None
) -> list[Setting]:
    """The settings with their number of dimensions, of a model whose vectors have `width`.

    Raises `ValueError` for one that is beyond the model's, for a shortlist as wide as the vectors, and for an index
    that FAISS cannot make of them, or of so few documents (None: that is left open).
    """
    found, impossible = [], []
    for setting in settings:
        dim = (getattr(embedder, "truncate_dim", None) or width) if setting.dim is None else setting.dim
        if not 1 <= dim <= width:
            raise ValueError(f"dim is {dim}, expected 1 to {width}")
        short_dim = _short_dim(setting.index)
        if short_dim >= dim:
            impossible.append(f"{setting.index} at {dim} dimensions")
        if setting.index != "flat" and not short_dim:
            check_index(setting.index, dim, num_documents=num_documents)
        found.append(setting._replace(dim=dim))
    _refuse(impossible)
    return found


def _refuse(impossible: list[str]) -> None:
    if impossible:
        raise ValueError(f"there is no such search: {'; '.join(dict.fromkeys(impossible))}")


def _short_dim(index: str) -> int:
    """The 64 of "adaptive-64"; 0 for other indices."""
    found = re.fullmatch(r"adaptive-([1-9]\d*)", index)
    return int(found[1]) if found else 0


def build(
    vectors_ND: np.ndarray,
    source_N: np.ndarray | None,
    setting: Setting,
    *,
    aggregate: str,
    depth: int,
    queries: np.ndarray | None = None,
) -> Built:
    """An index over vectors of `setting.dim` dimensions.

    Facts: of an approximate index its `factory` (FAISS's description) and `effort` (nprobe or efSearch); of "adaptive"
    its `shortlist`; of codes `rescore`, the precision that scores a shortlist (None: there is none).

    Args:
        source_N: the documents of windows, rising; None: each vector is a document.
        depth: the largest that will be asked for.
        queries: [Q, D], on which an approximate index sets its effort: no judgement is seen. None: documents.
    """
    stored_ND, size = vectors_ND, bytes_per_document(setting.dim, setting.precision)
    if setting.precision != "float32" and (setting.index != "flat" or source_N is not None):
        stored_ND = _decoded(vectors_ND, setting.precision)
    index, num_bytes, facts = None, size, {}
    if setting.precision != "float32":
        facts["rescore"] = "binary" if setting.precision == "binary" and setting.index == "flat" else None
    short_dim = _short_dim(setting.index)
    if short_dim:
        index = AdaptiveIndex(vectors_ND, short_dim, SHORTLIST_FACTOR * depth)
        num_bytes, facts = index.bytes_per_document, {"shortlist": SHORTLIST_FACTOR * depth}
    elif setting.index != "flat":
        index = build_index(stored_ND, setting.index, queries=queries)
        facts |= {"factory": index.factory, "effort": index.effort}
        num_bytes = index.bytes_per_document
        if setting.index in KEEP_VECTORS:
            num_bytes += size - bytes_per_document(setting.dim, "float32")
        elif source_N is not None:
            num_bytes += size  # the windows of a document that is found are scored by their vectors
    elif setting.precision == "binary" or (setting.precision == "int8" and source_N is None):
        index = QuantizedIndex(vectors_ND, setting.precision, rescore=facts["rescore"], rescore_factor=SHORTLIST_FACTOR)
    if index is None:
        return Built(search_of(stored_ND, source_N, aggregate), num_bytes, facts)
    if source_N is None:
        return Built(index.search, num_bytes, facts)
    return Built(search_of(stored_ND, source_N, aggregate, candidates=index), num_bytes, facts)


def search_of(
    vectors_ND: np.ndarray, source_N: np.ndarray | None, aggregate: str, *, device: object = None, **options
) -> Callable[[np.ndarray, int], Found]:
    """Exact search of all vectors on `device`; of windows on the CPU, with the `options` of `PassageIndex.search`."""
    if source_N is None:
        return lambda queries_QD, depth: search_exact(queries_QD, vectors_ND, depth, device=device)
    passages = PassageIndex(vectors_ND.shape[1], aggregate=aggregate)
    passages.add(vectors_ND, source_N)
    return lambda queries_QD, depth: Found(*passages.search(queries_QD, depth, **options))


def _decoded(vectors_ND: np.ndarray, precision: str) -> np.ndarray:
    """What the codes of vectors stand for, [N, D] float32."""
    decoded_ND = np.empty_like(vectors_ND)
    ranges_2D = calibrate(vectors_ND) if precision == "int8" else None
    for first, part in slices_of(vectors_ND, vectors_ND.shape[1]):
        if precision == "int8":
            decoded_ND[first : first + len(part)] = from_int8(to_int8(part, ranges_2D), ranges_2D)
        else:
            decoded_ND[first : first + len(part)] = from_binary(to_binary(part), part.shape[1])
    return decoded_ND
