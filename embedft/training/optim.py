"""Optimizers and learning-rate schedules.

optimizer = build_optimizer(embedder, lr=2e-5, weight_decay=0.01)
lr = 2e-5 * lr_factor("linear", step, num_steps=1000, warmup=0.1)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from .parts import learning_rates

Schedule = Literal["linear", "cosine", "constant"]
# Named parameter groups -> an optimizer of them; see `parameter_groups`.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def build_optimizer(
    model: nn.Module,
    loss: Any = None,
    *,
    lr: float,
    loss_lr: float | None = None,
    lr_parts: Mapping[str, Any] | None = None,
    lr_decay: float = 1.0,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) of `parameter_groups`, with betas (0.9, 0.999) and eps 1e-8.
    `lr_parts` and `lr_decay`, as for `parts.learning_rates`, divide a group by learning rate, those at `lr` first."""
    groups = parameter_groups(model, loss)
    if loss_lr is not None and groups[-1]["name"] == "loss":
        groups[-1]["lr"] = loss_lr
    if lr_parts or lr_decay != 1:
        rates = learning_rates(model, lr=lr, parts=lr_parts or {}, decay=lr_decay)
        groups = [part for group in groups for part in _by_rate(group, rates, lr)]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def make_optimizer(model: nn.Module, loss: Any, config: Any, make: MakeOptimizer | None) -> torch.optim.Optimizer:
    """AdamW as configured, or what `make` returns; each group records its peak learning rate as "initial_lr"."""
    if isinstance(loss, nn.Module):
        loss.to(model.device).train()
    names = ("lr", "loss_lr", "lr_parts", "lr_decay", "weight_decay")
    if make is None:
        optimizer = build_optimizer(model, loss, **{name: getattr(config, name) for name in names})
    else:
        config.check_unused(names, "the argument optimizer replaces it")
        optimizer = make(parameter_groups(model, loss))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer returned {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(model: nn.Module, loss: Any = None) -> list[dict[str, Any]]:
    """What a `train(..., optimizer=...)` callable gets: groups of (name, parameter) pairs, as torch.optim accepts.
    They are "matrices", "vectors" (biases and norms; weight_decay 0) and, if the loss has any, "loss" (weight_decay 0).
    Example: lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if half := {p.dtype for _, p in named} & {torch.float16, torch.bfloat16}:
        raise ValueError(f"the weights are {half.pop()}, which rounds small steps away: load them in float32")
    own = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    groups = [
        {"name": "matrices", "params": [(name, p) for name, p in named if p.ndim > 1]},
        {"name": "vectors", "params": [(name, p) for name, p in named if p.ndim <= 1], "weight_decay": 0.0},
        {"name": "loss", "params": [(f"loss/{name}", p) for name, p in own if p.requires_grad], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _by_rate(group: dict[str, Any], rates: Mapping[str, float], lr: float) -> list[dict[str, Any]]:
    found: dict[float, list] = {}
    for name, parameter in group["params"]:
        found.setdefault(rates.get(name, group.get("lr", lr)), []).append((name, parameter))
    return [
        {**group, "params": found[rate], "lr": rate} for rate in sorted(found, key=lambda rate: (rate != lr, -rate))
    ]


def lr_factor(schedule: Schedule, step: int, *, num_steps: int, warmup: float) -> float:
    """The factor on the learning rate at a step, from 0: step / warmup during warmup; then "linear" decays to 0 at
    `num_steps`, "cosine" is (1 + cos(pi * fraction of the remaining steps done)) / 2, and "constant" is 1. `warmup` is
    a number of steps or, below 1, a fraction of all, rounded up. As in the schedules of transformers."""
    if schedule not in (names := get_args(Schedule)):
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(names)}")
    if warmup >= 1 and warmup != int(warmup):
        raise ValueError(f"warmup is {warmup}, expected a whole number of steps, or a fraction below 1")
    num_warmup = math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
    if step < num_warmup:
        return step / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0
