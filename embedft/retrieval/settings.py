"""How a corpus is searched, and the index that does it: dim, precision, index, passages and aggregate.

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
from .index import FlatIndex, Index
from .passages import WindowIndex, check_aggregate
from .quantization import PRECISIONS, QuantizedIndex, bytes_per_vector

# FAISS indices that hold every vector as it is, so they can hold what codes stand for.
HOLD_VECTORS = ("hnsw", "ivf")


class Setting(NamedTuple):
    """How a corpus is searched. dim None: as many dimensions as the embedder gives; passages None: whole documents."""

    dim: int | None = None
    precision: str = "float32"
    index: str = "flat"
    passages: Sequence[int] | None = None
    aggregate: str = "max"

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
        values = {**self._asdict(), "passages": self.passages and list(self.passages)}
        return {name: value for name, value in values.items() if name != "aggregate" or self.passages}


def check_settings(
    embedder: object, settings: Sequence[Setting], *, width: int | None = None, num_documents: int | None = None
) -> list[Setting]:
    """The settings with their number of dimensions, if `width`, that of the model's vectors, is given or the embedder
    has a `full_dim`.

    Raises `ValueError` for what cannot work, too few documents to train an index on (None: not checked) included;
    combinations that are not supported are all listed.
    """
    width = getattr(embedder, "full_dim", None) if width is None else width
    found, unsupported = [], []
    for setting in settings:
        _check_values(embedder, setting)
        index, short_dim = setting.index, setting.short_dim
        if setting.precision != "float32" and split_name(index)[0] not in ("flat", *HOLD_VECTORS):
            unsupported.append(f"{setting.precision} with {index} (it works with flat, {', '.join(HOLD_VECTORS)})")
        if short_dim and setting.passages is not None:
            unsupported.append(f"{index} with passages")
        if width is not None:
            if setting.dim is None:
                setting = setting._replace(dim=getattr(embedder, "truncate_dim", None) or width)
            if not 1 <= setting.dim <= width:
                raise ValueError(f"dim is {setting.dim}, expected 1 to {width}")
            if short_dim >= setting.dim:
                unsupported.append(f"{index} at {setting.dim} dimensions")
        found.append(setting)
    if unsupported:
        raise ValueError(f"unsupported search: {'; '.join(dict.fromkeys(unsupported))}")
    for setting in found:
        if width is not None and setting.index != "flat" and not setting.short_dim:
            check_index(setting.index, setting.dim, num_documents=None if setting.passages else num_documents)
    return found


def _check_values(embedder: object, setting: Setting) -> None:
    check_aggregate(setting.aggregate)
    if setting.passages is not None and not hasattr(embedder, "encode_passages"):
        kind = type(embedder).__name__
        raise ValueError(f"passages is {tuple(setting.passages)}: {kind} cannot cut documents into windows")
    if setting.precision not in PRECISIONS:
        raise ValueError(f"precision is {setting.precision!r}, expected one of {', '.join(PRECISIONS)}")
    if setting.index.startswith("adaptive") and not setting.short_dim:
        raise ValueError(f"index is {setting.index!r}, expected adaptive-DIM, e.g. adaptive-64")


def build(vectors_ND: np.ndarray, source_N: np.ndarray | None, setting: Setting) -> tuple[Index, float, dict]:
    """An index over vectors of `setting.dim` dimensions, the bytes of each vector in it, and what a report says of it:
    `factory` and `parameters` of FAISS's. source_N: the document of each window; None: each vector is a document."""
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
        index = WindowIndex(vectors_ND, source_N, aggregate=setting.aggregate, candidates=index)
    return FlatIndex(vectors_ND) if index is None else index, num_bytes, facts
