"""What a loss reports besides its value: its parts, a learned temperature, the share of masked negatives.

    with collect() as found:
        value = loss(Q, D, targets)
    found                                   # {"in_batch_negatives": tensor(1.3), "toward_base": tensor(0.02)}

A loss calls `record("masked_negatives", share)`, which does nothing outside `collect`; `scope("384")` prefixes "384/".
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# What has been recorded so far, and the prefix of further names; None: not collecting.
_CURRENT: ContextVar[tuple[dict[str, Tensor], str] | None] = ContextVar("components", default=None)


@contextmanager
def _setting(current: tuple[dict[str, Tensor], str] | None) -> Iterator[None]:
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def collect() -> Iterator[dict[str, Tensor]]:
    """Yields a dict that losses called inside the block fill: {name: detached scalar}."""
    with _setting((found := {}, "")):
        yield found


def scope(name: str) -> AbstractContextManager[None]:
    """Prefixes names recorded inside with "name/"; once only if directly inside a scope of the same name."""
    if (current := _CURRENT.get()) and not f"/{current[1]}".endswith(f"/{name}/"):
        current = current[0], f"{current[1]}{name}/"
    return _setting(current)


def record(name: str, value: Tensor | float) -> None:
    """Reports a scalar by name; a name that is taken gets a number ("margin_2")."""
    if (current := _CURRENT.get()) is None:
        return
    found, prefix = current
    names = (prefix + name + (f"_{number}" if number > 1 else "") for number in itertools.count(1))
    unique = next(name for name in names if name not in found)
    found[unique] = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")


def unrecorded() -> AbstractContextManager[None]:
    """Records nothing inside: for losses computed piece by piece, or again in the backward pass."""
    return _setting(None)


def loss_name(loss: Callable[..., Any]) -> str:
    """The name of a loss in reports: its function's name, or its class name in snake case."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    if isinstance(loss, nn.Module) or not hasattr(loss, "__name__"):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(loss).__name__).lower()
    return loss.__name__.strip("<>")
