"""The reply to POST /embeddings: one vector per text, as numbers or base64.

vectors = read_vectors(reply, num_texts=256)      # each an array [D], or what is wrong with it
unit_MD = unit_rows(np.stack(vectors))
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def read_vectors(reply: Mapping[str, Any], num_texts: int) -> list[np.ndarray | str]:
    """For each text its vector [D] float64, or what is wrong with it, by `index`.

    Raises:
        TypeError, LookupError, AttributeError: the reply is not a list of embeddings.
        ValueError: it does not have exactly one vector per text.
    """
    items = list(reply["data"])
    if len(items) != num_texts:
        raise ValueError(f"{len(items):,} vectors came back for {num_texts:,} texts")
    indices = [item.get("index") for item in items]
    if all(index is None for index in indices):  # some servers leave it out everywhere, some where it is 0
        indices = list(range(num_texts))
    vectors: dict[int, np.ndarray | str] = {}
    for index, item in zip(indices, items, strict=True):
        row = 0 if index is None else index
        if type(row) is not int or not 0 <= row < num_texts or row in vectors:
            raise ValueError(f"index {str(row)[:40]!r} came back, expected each of 0 to {num_texts - 1:,} once")
        vectors[row] = _decode(item["embedding"])
    return [vectors[row] for row in range(num_texts)]


def _decode(value: Any) -> np.ndarray | str:
    """A list of numbers, or base64 of little-endian float32, as [D] float64; what is wrong when it is neither."""
    try:
        if isinstance(value, str):
            value = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
        vector = np.asarray(value, dtype=np.float64)  # null, as JSON writes a NaN, becomes one
    except (ValueError, TypeError, OverflowError):
        vector = np.empty(0)
    if vector.ndim != 1 or not len(vector):
        return "a vector that is neither a list of numbers nor base64 of float32"
    if not np.isfinite(vector).all():
        return "a vector with values that are not finite"
    return vector if vector.any() else "a vector of length zero"


def unit_rows(vectors_MD: np.ndarray) -> np.ndarray:
    """Rows scaled to length one, as float32; NaN where a row is all zero."""
    # By the largest value first: squares of very large or small values leave the range of float64.
    with np.errstate(invalid="ignore"):
        scaled_MD = vectors_MD / np.abs(vectors_MD).max(axis=1, keepdims=True)
        return (scaled_MD / np.linalg.norm(scaled_MD, axis=1, keepdims=True)).astype(np.float32)
