"""How a corpus is searched, and the index that does it: dim, precision, index and passages.

    (setting,) = check_settings(embedder, [Setting(128, "int8", "hnsw")])       # before anything is encoded
    scores, rows = build(vectors_ND, None, setting)[0].search(queries_QD, 100)

- precision: float32, int8 or binary, as what vectors are stored (quantization.py).
- index: "flat" (every document); hnsw, ivf, ivfpq or a factory string of FAISS, with parameters as in
  "hnsw,efSearch=128" (approximate.py); or "adaptive-64": 64 dimensions find 4 x `depth` documents, all order them.
- int8 and binary work with flat, hnsw and ivf. hnsw and ivf then search what the codes stand for, in float32: quality
  and bytes are those of the codes, speed is not.
- With passages an index other than flat finds windows, and all windows of their documents are scored (not adaptive).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .approximate import AdaptiveIndex, FaissIndex, check_index, split_name
from .encoding import SupportsEncode
from .index import FlatIndex, Index
from .passages import WindowIndex
from .quantization import PRECISIONS, QuantizedIndex, bytes_per_vector

# FAISS indices that hold every vector as it is, so they can hold what codes stand for.
HOLD_VECTORS = ("hnsw", "ivf")


class Setting(NamedTuple):
    """How a corpus is searched. dim None: as many dimensions as the embedder gives; passages None: whole documents."""

    dim: int | None = None
    precision: str = "float32"
    index: str = "flat"
    passages: Sequence[int] | None = None

    @property
    def is_exact(self) -> bool:
        return self.precision == "float32" and self.index == "flat"

    @property
    def short_dim(self) -> int:
        """The 64 of "adaptive-64"; 0 for other indices."""
        found = re.fullmatch(r"adaptive-([1-9]\d*)", self.index)
        return int(found[1]) if found else 0

    def describe(self) -> dict:
        """What a report says of it."""
        return {**self._asdict(), "passages": self.passages and list(self.passages)}


def check_settings(
    embedder: SupportsEncode, settings: Sequence[Setting], *, width: int | None = None, num_documents: int | None = None
) -> list[Setting]:
    """The settings with their number of dimensions, if the model's `width` is given or the embedder has a `full_dim`.

    Raises `ValueError` for what cannot work, too few documents to train an index on (None: not checked) included.
    """
    width, found, unsupported = width or getattr(embedder, "full_dim", None), [], []
    for setting in settings:
        dim, precision, index, passages = setting
        if passages is not None and not hasattr(embedder, "encode_passages"):
            kind = type(embedder).__name__
            raise ValueError(f"passages is {tuple(passages)}: {kind} cannot cut documents into windows")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        if index.startswith("adaptive") and not setting.short_dim:
            raise ValueError(f"index is {index!r}, expected adaptive-DIM, e.g. adaptive-64")
        if precision != "float32" and split_name(index)[0] not in ("flat", *HOLD_VECTORS):
            unsupported.append(f"{precision} with {index} (it works with flat, {', '.join(HOLD_VECTORS)})")
        if setting.short_dim and passages is not None:
            unsupported.append(f"{index} with passages")
        if width is not None:
            dim = (getattr(embedder, "truncate_dim", None) or width) if dim is None else dim
            if not 1 <= dim <= width:
                raise ValueError(f"dim is {dim}, expected 1 to {width}")
            if setting.short_dim >= dim:
                unsupported.append(f"{index} at {dim} dimensions")
        found.append(setting._replace(dim=dim))
    if unsupported:
        raise ValueError(f"unsupported search: {'; '.join(dict.fromkeys(unsupported))}")
    for dim, _, index, passages in found:
        if width is not None and index != "flat" and not index.startswith("adaptive"):
            check_index(index, dim, num_documents=None if passages else num_documents)
    return found


def build(vectors_ND: np.ndarray, source_N: np.ndarray | None, setting: Setting) -> tuple[Index, float, dict]:
    """An index over vectors of `setting.dim` dimensions, the bytes of each vector in it, and what a report says of it.

    source_N: the document of each window; None: each vector is a document.
    """
    index, facts, is_flat, windows = None, {}, setting.index == "flat", source_N is not None
    num_bytes = bytes_per_vector(setting.dim, setting.precision)
    if setting.precision != "float32":
        codes = QuantizedIndex(vectors_ND, setting.precision)
        if is_flat and not (windows and setting.precision == "int8"):  # int8 windows are all scored: no candidates
            index = codes
        if not is_flat or windows:
            vectors_ND = codes.decode()
    if setting.short_dim:
        index = AdaptiveIndex(vectors_ND, setting.short_dim)
        num_bytes = index.bytes_per_vector
    elif not is_flat:
        index = FaissIndex(vectors_ND, setting.index)
        facts = {"factory": index.factory, "parameters": index.parameters}
        if split_name(setting.index)[0] in HOLD_VECTORS:  # the bytes of codes in place of those of float32
            num_bytes += index.bytes_per_vector - bytes_per_vector(setting.dim, "float32")
        else:  # all windows of a document that is found are scored by their vectors
            num_bytes = index.bytes_per_vector + (num_bytes if windows else 0)
    if windows:
        index = WindowIndex(vectors_ND, source_N, candidates=index)
    return FlatIndex(vectors_ND) if index is None else index, num_bytes, facts
