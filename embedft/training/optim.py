"""AdamW and the learning rate's schedule.

optimizer = build_optimizer(embedder.parameters(), lr=2e-5, weight_decay=0.01)
factor = lr_factor("linear", num_steps=1000, warmup=0.1)      # lr of step i: 2e-5 * factor(i)
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch.nn import Parameter

Schedule = Literal["linear", "cosine", "constant"]
SCHEDULES = get_args(Schedule)


def build_optimizer(parameters: Iterable[Parameter], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), betas (0.9, 0.999), eps 1e-8, one fused kernel a step.

    Matrices are decayed; biases and norms, which have one dimension, are not.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in parameters):
        raise ValueError("the weights are in half precision, which rounds small steps away: load them in float32")
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def lr_factor(schedule: str, *, num_steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on the learning rate of step i, from 0: i / warmup while warming up, then

    - linear: down to 0 at `num_steps`
    - cosine: (1 + cos(pi * share of the remaining steps done)) / 2
    - constant: 1

    `warmup` counts steps; below 1 it is a share of all steps, rounded up. As in the schedules of transformers.
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
