"""Vectors of length one, in NumPy alone."""

import numpy as np


def unit_rows(vectors_ND: np.ndarray) -> np.ndarray:
    """x / ||x|| for each row, in its dtype; a row of zeros stays. No row is too short or too long for its squares."""
    _, exponent_N1 = np.frexp(np.abs(vectors_ND).max(axis=1, keepdims=True))
    scaled_ND = np.ldexp(vectors_ND, -exponent_N1)  # by a power of two: without rounding
    lengths_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    return scaled_ND / np.where(lengths_N1 == 0, 1, lengths_N1)
