"""vectors.py: by hand, and against plain division."""

import numpy as np
import pytest
from naming import naming

from embedft.vectors import checked_source, unit_rows


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


def test_the_documents_of_windows():
    for source in ([0, 0, 1, 2, 2], np.array([0, 0, 1, 2, 2], np.uint8)):
        found = checked_source(source, 5)
        assert found.dtype == np.int64
        assert found.tolist() == [0, 0, 1, 2, 2]
    for source, *facts in (
        ([0, 1], "[2]", "int64", "[3]"),
        ([0.0, 1.0, 2.0], "float64", "[3]"),
        ([0, 2, 3], "row", 1, "document", 2),
        ([0, 1, 0], "row", 2, "document", 0),
        ([-1, 0, 1], "row", 0, "document", -1),
    ):
        with pytest.raises(ValueError, match=naming("source", *facts)):
            checked_source(source, 3)
