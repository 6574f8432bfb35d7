"""Checks of options. A tensor, which is a learned value, is not read: that would wait for the device."""

import math
from collections.abc import Sequence

from torch import Tensor


def check_above_zero(name: str, value: float | Tensor) -> None:
    """A number is above 0 and finite."""
    if not isinstance(value, Tensor) and not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected above 0 and finite")


def check_finite(name: str, value: float | Tensor, *, least: float = -math.inf) -> None:
    """A number is finite, and at least `least`."""
    if not isinstance(value, Tensor) and not (math.isfinite(value) and value >= least):
        expected = "a finite number" if least == -math.inf else f"at least {least:g} and finite"
        raise ValueError(f"{name} is {value}, expected {expected}")


def check_one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """An option has one of its values."""
    if value not in valid:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(valid)}")
