"""Optimizers and learning-rate schedules.

optimizer = build_optimizer(embedder.parameters(), lr=2e-5, weight_decay=0.01)
factor = lr_factor("linear", num_steps=1000, warmup=0.1)      # learning rate of step i: 2e-5 * factor(i)
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import Parameter

Schedule = Literal["linear", "cosine", "constant"]
SCHEDULES = get_args(Schedule)
# Named parameter groups -> an optimizer of them; see `parameter_groups`.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def build_optimizer(parameters: Iterable[Parameter], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) with betas (0.9, 0.999) and eps 1e-8.

    Weight decay applies to matrices, not to biases and norms, which have one dimension.
    """
    parameters = _trainable(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def parameter_groups(model: nn.Module, loss: Any = None) -> list[dict[str, Any]]:
    """What a `train(..., optimizer=...)` callable gets: groups of (name, parameter) pairs, as torch.optim takes them.

    "matrices", "vectors" (biases and norms; weight_decay 0) and, when the loss has parameters, "loss" (weight_decay 0).

        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _trainable(named.values())
    groups = [
        {"name": "matrices", "params": [(name, p) for name, p in named.items() if p.ndim > 1]},
        {"name": "vectors", "params": [(name, p) for name, p in named.items() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    own = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    if own := [(f"loss/{name}", p) for name, p in own if p.requires_grad]:
        groups.append({"name": "loss", "params": own, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _trainable(parameters: Iterable[Parameter]) -> list[Parameter]:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in parameters):
        raise ValueError("the weights are in half precision, which rounds small steps away: load them in float32")
    return parameters


def lr_factor(schedule: str, *, num_steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on the learning rate at step i, from 0: i / warmup during warmup, then

    - linear: decays to 0 at `num_steps`
    - cosine: (1 + cos(pi * fraction of the remaining steps done)) / 2
    - constant: 1

    `warmup` is a number of steps or, below 1, a fraction of all steps, rounded up. As in the schedules of transformers.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    num_warmup = math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)

    def factor(step: int) -> float:
        if step < num_warmup:
            return step / num_warmup
        done = (step - num_warmup) / max(1, num_steps - num_warmup)
        if schedule == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0

    return factor
