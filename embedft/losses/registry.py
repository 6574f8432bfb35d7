"""Losses by name, for configurations and the command line. A new loss is one function and one line in `LOSSES`.

loss = build_loss({"name": "in_batch_negatives", "temperature": 0.05})
loss(Q, D, targets)
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .contrastive import in_batch_negatives
from .targets import Targets

Loss = Callable[[Tensor, Tensor, Targets], Tensor]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "in_batch_negatives": in_batch_negatives,
}


def build_loss(spec: Mapping[str, Any]) -> Loss:
    """A loss from its name and options, e.g. {"name": "in_batch_negatives", "temperature": 0.05}.

    Raises `ValueError` that lists the valid names, or the valid options of the named loss, or says what is wrong with
    an option's value: the loss is tried on one query and one document, not at the first step of a run.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"loss name is {name!r}, expected one of {', '.join(LOSSES)}")
    parameters = list(inspect.signature(LOSSES[name]).parameters.values())[3:]
    valid = {parameter.name: parameter.default for parameter in parameters}
    for option, value in options.items():
        if option not in valid:
            raise ValueError(f"{name} has no option {option!r}, expected one of {', '.join(valid)}")
        if isinstance(valid[option], float) and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise ValueError(f"{name}: {option} is {value!r}, expected a number")
    loss = functools.partial(LOSSES[name], **options)
    loss(torch.zeros(1, 1), torch.zeros(1, 1), Targets(group=torch.zeros(1, 1, dtype=torch.int64)))
    return loss
