"""The precision of training's forward pass. Weights, gradients, losses and the optimizer are float32 throughout.

bfloat16 has the range of float32. float16 has not: small gradients would be 0, so the loss is multiplied by a scale, a
power of two, and gradients are divided by it before they are used. A step whose gradients overflow is skipped, and the
scale halved; after 2,000 steps without one it is doubled.

Source: Micikevicius et al. 2018 (Mixed precision training), section 3.2.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

NAMED_IDS = 16  # in an error about a batch; train.jsonl has all of them


class NonFiniteError(ValueError):
    """A loss or gradient is not finite. `.step`, `.query_ids`, `.document_ids` say where."""

    def __init__(self, what: str, step: int, query_ids: list[str], document_ids: list[str]):
        self.what, self.step, self.query_ids, self.document_ids = what, step, query_ids, document_ids
        names = [", ".join(ids[:NAMED_IDS]) + ", ..." * (len(ids) > NAMED_IDS) for ids in (query_ids, document_ids)]
        super().__init__(f"step {step}: the {what}; queries {names[0]}; documents {names[1]}")


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Contexts in which to compute vectors; the only autocast in training, so that losses are computed in float32."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=precision != "float32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in float16; otherwise the scale is 1 and no step is skipped."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    scaler.scale(torch.zeros((), device=device))  # until its first use, it has no scale
    return scaler
