"""Unit vectors, and the documents of windows, in pure NumPy."""

import numpy as np


def unit_rows(vectors_ND: np.ndarray) -> np.ndarray:
    """x / ||x|| for each row, in the same dtype; zero rows stay zero. No row's squares overflow or underflow."""
    _, exponent_N1 = np.frexp(np.abs(vectors_ND).max(axis=1, keepdims=True))
    scaled_ND = np.ldexp(vectors_ND, -exponent_N1)  # a power of two, so this does not round
    lengths_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    return scaled_ND / np.where(lengths_N1 == 0, 1, lengths_N1)


def checked_source(source: np.ndarray, num_windows: int) -> np.ndarray:
    """The document of each window, [num_windows] int64. Raises `ValueError` unless they ascend from 0 without gaps."""
    source = np.asarray(source)
    if source.shape != (num_windows,) or not np.issubdtype(source.dtype, np.integer):
        raise ValueError(f"source is {list(source.shape)} {source.dtype}, expected [{num_windows:,}] whole numbers")
    source = source.astype(np.int64)
    wrong = np.flatnonzero(~np.isin(np.diff(source, prepend=-1), (0, 1)) | (source < 0))
    if len(wrong):
        found = f"window row {wrong[0]:,} is of document {source[wrong[0]]:,}"
        raise ValueError(f"source: {found}, expected documents ascending from 0 without gaps")
    return source
