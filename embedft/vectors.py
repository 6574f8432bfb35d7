"""Unit vectors, in pure NumPy."""

import numpy as np


def unit_rows(vectors_ND: np.ndarray) -> np.ndarray:
    """x / ||x|| for each row, in the same dtype; zero rows stay zero. No row's squares overflow or underflow."""
    _, exponent_N1 = np.frexp(np.abs(vectors_ND).max(axis=1, keepdims=True))
    scaled_ND = np.ldexp(vectors_ND, -exponent_N1)  # a power of two, so this does not round
    lengths_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    return scaled_ND / np.where(lengths_N1 == 0, 1, lengths_N1)
