"""The reply to POST /embeddings: one vector for each text, by its index, as numbers or as base64, or a clear error.

    pairs, usage = read_reply(text)
    vectors_MD = in_order(pairs, num_texts=256)
    unit_MD, is_good_M = unit_rows(vectors_MD)

Shapes: M texts of a request, D features.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def read_reply(text: str) -> tuple[list[tuple[Any, Any]], tuple[int, int] | None]:
    """[(index, embedding)] as they came, and the tokens read (with 0 written); None: not reported, or nonsense.

    Raises:
        ValueError: it is something else.
    """
    try:
        reply = json.loads(text)
        pairs = [(item["index"], item["embedding"]) for item in reply["data"]]
        return pairs, _usage(reply.get("usage"))
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("the answer is no list of embeddings") from None


def _usage(reported: Any) -> tuple[int, int] | None:
    """Tokens that were read, or None when a server reports none, or nonsense."""
    count = reported.get("prompt_tokens") if isinstance(reported, dict) else None
    return (count, 0) if type(count) is int and count >= 0 else None


def in_order(pairs: Sequence[tuple[Any, Any]], num_texts: int) -> np.ndarray:
    """Vectors by their index, [M, D] float64. Raises `ValueError` when they are not one for each text, of one size."""
    if len(pairs) != num_texts:
        raise ValueError(f"{len(pairs):,} vectors came back for {num_texts:,} texts")
    by_index = {index: vector for index, vector in pairs if type(index) is int}
    if by_index.keys() != set(range(num_texts)):
        wrong = next(index for i, (index, _) in enumerate(pairs) if _is_wrong(index, pairs[:i], num_texts))
        raise ValueError(f"vectors came back with index {wrong!r}, expected each of 0 to {num_texts - 1:,} once")
    vectors = [_decoded(by_index[row]) for row in range(num_texts)]
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise ValueError(f"vectors of {sizes[0]} and of {sizes[-1]} dimensions came back, expected one size")
    if sizes == [0]:
        raise ValueError("vectors without a value came back")
    return np.stack(vectors)


def _is_wrong(index: Any, before: Sequence[tuple[Any, Any]], num_texts: int) -> bool:
    return type(index) is not int or not 0 <= index < num_texts or any(index == other for other, _ in before)


def _decoded(value: Any) -> np.ndarray:
    """A list of numbers, or base64 of little-endian float32, as [D] float64."""
    try:
        if isinstance(value, str):
            return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4").astype(np.float64)
        vector = np.asarray(value, dtype=np.float64)  # null, as JSON has a NaN, becomes one
    except (ValueError, TypeError, OverflowError):
        vector = None
    if vector is None or vector.ndim != 1:
        raise ValueError("a vector came back that is neither a list of numbers nor base64 of float32")
    return vector


def unit_rows(vectors_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 rows at length one, as float32, and which could be: those that are finite and not all zero."""
    peak_M1 = np.abs(vectors_MD).max(axis=1, keepdims=True)
    is_good_M = np.isfinite(peak_M1[:, 0]) & (peak_M1[:, 0] > 0)
    # By the largest first: squares of very large or small values leave the range of a float64.
    scaled_MD = np.divide(vectors_MD, peak_M1, out=np.zeros_like(vectors_MD), where=is_good_M[:, None])
    lengths_M1 = np.linalg.norm(scaled_MD, axis=1, keepdims=True)
    unit_MD = np.divide(scaled_MD, lengths_M1, out=scaled_MD, where=is_good_M[:, None])
    return unit_MD.astype(np.float32), is_good_M
