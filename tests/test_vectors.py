"""vectors.py: by hand, and against plain division."""

import numpy as np
import pytest

from embedft.vectors import unit_rows


@pytest.mark.parametrize(("dtype", "exponent"), [("f8", 200), ("f4", 30)])
def test_length_one_by_hand(dtype, exponent):
    """(3, 4) has length 5. Squares of 1e200 and of 1e-200 are beyond a float64, their directions are not."""
    rows = [
        [3, 4],
        [3 * 10.0**exponent, -4 * 10.0**exponent],
        [3 / 10.0**exponent, 4 / 10.0**exponent],
        [0, -2],
        [0, 0],
    ]
    unit_ND = unit_rows(np.array(rows, dtype))
    assert unit_ND.dtype == dtype
    np.testing.assert_allclose(unit_ND, [[0.6, 0.8], [0.6, -0.8], [0.6, 0.8], [0, -1], [0, 0]], rtol=1e-6)
    plain_ND = np.random.default_rng(0).normal(size=(50, 7)).astype(dtype)
    np.testing.assert_array_equal(unit_rows(plain_ND), plain_ND / np.linalg.norm(plain_ND, axis=1, keepdims=True))
