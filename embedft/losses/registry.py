"""Losses by name, for configurations and the command line. A new loss is one function and one line in `LOSSES`.

    loss = build_loss({"name": "matryoshka", "dims": [384, 128], "inner": {"name": "in_batch_negatives"}})
    loss(Q, D, targets)

A loss of your own, a function of (Q, D, targets) or an nn.Module of that call, needs no name: `build_loss` and every
option that takes a loss accept the object.
"""

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import contrastive, distillation, guided, pairwise, regularisers, scored
from .components import unrecorded
from .matryoshka import Loss, Matryoshka, WeightedSum
from .targets import Targets

# A function of (Q, D, targets) with options as keywords, or a module whose constructor takes the options.
LOSSES: dict[str, Callable[..., Any]] = {
    "in_batch_negatives": contrastive.in_batch_negatives,
    "symmetric_in_batch_negatives": contrastive.symmetric_in_batch_negatives,
    "learnable_temperature": contrastive.LearnableTemperature,
    "multi_positive": contrastive.multi_positive,
    "sigmoid": contrastive.sigmoid,
    "learnable_sigmoid": contrastive.LearnableSigmoid,
    "guided_in_batch_negatives": guided.guided_in_batch_negatives,
    "triplet": pairwise.triplet,
    "contrastive": pairwise.contrastive,
    "online_contrastive": pairwise.online_contrastive,
    "cosine_mse": scored.cosine_mse,
    "cosent": scored.cosent,
    "angle": scored.angle,
    "margin_mse": distillation.margin_mse,
    "listwise_kl": distillation.listwise_kl,
    "embedding_distillation": distillation.embedding_distillation,
    "projected_distillation": distillation.ProjectedDistillation,
    "toward_base": regularisers.toward_base,
    "global_orthogonal": regularisers.global_orthogonal,
    "matryoshka": Matryoshka,
    "sum": WeightedSum,
}

# What messages call an option's type: (one of them, several of them).
KINDS = {
    float: ("a number", "numbers"),
    int: ("a whole number", "whole numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Loss: ("a loss", "losses"),
    types.NoneType: ("null", "nulls"),
}


def build_loss(spec: Mapping[str, Any] | Loss) -> Loss:
    """A loss from its name and options, e.g. {"name": "in_batch_negatives", "temperature": 0.05}.

    Options that are losses are specs of their own: `inner` of "matryoshka", `losses` of "sum". A function or module is
    used as it is. Raises `ValueError` for an unknown name, option or value: a loss made of names alone is tried on two
    queries and four documents, so that errors appear before training.
    """
    loss = _build(spec)
    if not _has_object(spec):
        _try(loss)
    return loss


def describe_losses() -> str:
    """One line per loss, with its options and their defaults; options without a default are required."""
    lines = []
    for name, loss in LOSSES.items():
        defaults = {option.name: option.default for option in loss_options(loss).values()}
        options = (k if x is inspect.Parameter.empty else f"{k}={json.dumps(x)}" for k, x in defaults.items())
        lines.append(" ".join([f"{name}:", *options]))
    return "\n".join(lines)


def loss_options(loss: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a loss; **options stands for those of the function it names in `options_of`."""
    options = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[name] = parameter
        elif parameter.kind is parameter.VAR_KEYWORD:
            for own, option in loss_options(loss.options_of).items():
                options.setdefault(own, option)
    return options


def _build(spec: Any) -> Loss:
    if callable(spec):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"loss is {spec!r}, expected a name with options, like {{'name': 'in_batch_negatives'}}")
    given = dict(spec)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"loss name is {name!r}, expected one of {', '.join(LOSSES)}")
    valid = loss_options(LOSSES[name])
    for option in given:
        if option not in valid:
            raise ValueError(f"{name} has no option {option!r}, expected one of {', '.join(valid) or 'none'}")
    for option, parameter in valid.items():
        if parameter.default is parameter.empty and option not in given:
            raise ValueError(f"{name} needs {option}, {_kind(parameter.annotation)}")
    for option, value in given.items():
        wanted = valid[option].annotation
        if not _fits(value, wanted):
            raise ValueError(f"{name}: {option} is {value!r}, expected {_kind(wanted)}")
        if wanted == Loss:
            given[option] = _build(value)
        elif wanted == Sequence[Loss]:
            given[option] = [_build(part) for part in value]
    return LOSSES[name](**given) if isinstance(LOSSES[name], type) else functools.partial(LOSSES[name], **given)


def _has_object(spec: Any) -> bool:
    """Whether a spec contains a function or module: it may need other data than a trial has."""
    if isinstance(spec, Mapping):
        return any(map(_has_object, spec.values()))
    return any(map(_has_object, spec)) if isinstance(spec, (list, tuple)) else callable(spec)


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of the annotated type. Other types than those in KINDS are for the loss to judge."""
    if isinstance(wanted, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(wanted))
    if wanted == Loss:
        return isinstance(value, Mapping) or callable(value)
    if typing.get_origin(wanted) is Sequence:
        (kind,) = typing.get_args(wanted)
        return isinstance(value, (list, tuple)) and all(_fits(entry, kind) for entry in value)
    if wanted not in KINDS:
        return True
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _kind(wanted: Any) -> str:
    if isinstance(wanted, types.UnionType):
        return " or ".join(_kind(kind) for kind in typing.get_args(wanted))
    if typing.get_origin(wanted) is Sequence:
        (kind,) = typing.get_args(wanted)
        return f"a list of {KINDS[kind][1] if kind in KINDS else kind}"
    return KINDS[wanted][0] if wanted in KINDS else str(wanted)


def _try(loss: Loss) -> None:
    """One call on data that has everything a loss may ask for, with vectors as wide as the spec says."""
    modules = list(loss.modules()) if isinstance(loss, nn.Module) else []
    projections = [module for module in modules if isinstance(module, distillation.ProjectedDistillation)]
    widths = [module.dims[0] for module in modules if isinstance(module, Matryoshka)]
    width = max([*widths, *(module.student_dim for module in projections)], default=2)
    teacher_width = projections[0].teacher_dim if projections else width
    Q, D = torch.zeros(2, width), torch.zeros(4, width)
    teacher = torch.zeros(2, teacher_width), torch.zeros(4, teacher_width)
    targets = Targets(
        group=torch.tensor([[0, 2], [1, 3]]),
        target_scores=torch.tensor([[1.0, 0.0], [0.5, 0.0]]),
        references={"guide": (Q, D), "base": (Q, D), "teacher": teacher},
    )
    # In training mode the loss would count the call, but the first step has to be number 0.
    for module in modules:
        module.eval()
    with torch.no_grad(), unrecorded():
        loss(Q, D, targets)
    for module in modules:
        module.train()
