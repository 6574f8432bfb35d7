"""Losses by name, for configurations and the command line. A new loss is one function and one line in `LOSSES`.

    loss = build_loss({"name": "matryoshka", "dims": [384, 128], "inner": {"name": "in_batch_negatives"}})
    loss(Q, D, targets)

Your own loss, a function of (Q, D, targets) or an nn.Module called like one, needs no name: `build_loss` and every
option that takes a loss accept the object.
"""

import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import contrastive, distillation, guided, listwise, pairwise
from .components import unrecorded
from .matryoshka import Loss, Matryoshka, WeightedSum
from .quantized import Quantized
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
    "listwise_cross_entropy": pairwise.listwise_cross_entropy,
    "binary_cross_entropy": pairwise.binary_cross_entropy,
    "contrastive": pairwise.contrastive,
    "online_contrastive": pairwise.online_contrastive,
    "cosine_mse": pairwise.cosine_mse,
    "cosent": pairwise.cosent,
    "angle": pairwise.angle,
    "margin_mse": distillation.margin_mse,
    "listwise_kl": distillation.listwise_kl,
    "approx_ndcg": listwise.approx_ndcg,
    "ranknet": listwise.ranknet,
    "pearson": listwise.pearson,
    "embedding_distillation": distillation.embedding_distillation,
    "projected_distillation": distillation.ProjectedDistillation,
    "toward_base": distillation.toward_base,
    "global_orthogonal": contrastive.global_orthogonal,
    "matryoshka": Matryoshka,
    "quantized": Quantized,
    "sum": WeightedSum,
}


def build_loss(spec: Mapping[str, Any] | Loss) -> Loss:
    """A loss from its name and options, e.g. {"name": "in_batch_negatives", "temperature": 0.05}. Options that are
    losses are specs too; a function or module is used as it is. Raises `ValueError` for an unknown name, option or
    value: as a function checks options when called, this calls it once, on two queries and four documents."""
    if callable(spec):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"loss is {spec!r}, expected a name with options, like {{'name': 'in_batch_negatives'}}")
    given = dict(spec)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"loss name is {name!r}, expected one of {', '.join(LOSSES)}")
    valid = loss_options(LOSSES[name])
    if unknown := [option for option in given if option not in valid]:
        raise ValueError(f"{name} has no option {unknown[0]!r}, expected one of {', '.join(valid) or 'none'}")
    for option, parameter in valid.items():
        kind = parameter.annotation
        if option not in given:
            if parameter.default is parameter.empty:
                raise ValueError(f"{name} needs the option {option}, {_kind(kind)}")
        elif not _fits(given[option], kind):
            raise ValueError(f"{name}: {option} is {given[option]!r}, expected {_kind(kind)}")
        elif kind == Loss:
            given[option] = build_loss(given[option])
        elif kind == Sequence[Loss]:
            given[option] = [build_loss(part) for part in given[option]]
    if isinstance(LOSSES[name], type):
        return LOSSES[name](**given)
    loss = functools.partial(LOSSES[name], **given)
    Q, D = torch.zeros(2, 2), torch.zeros(4, 2)
    references = dict.fromkeys(("guide", "base", "teacher"), (Q, D))
    with torch.no_grad(), unrecorded():
        loss(Q, D, Targets(torch.tensor([[0, 2], [1, 3]]), target_scores=torch.eye(2), references=references))
    return loss


def describe_losses() -> str:
    """For each loss, its options and their defaults (options without one are required), and what it computes."""
    lines = []
    for name, loss in LOSSES.items():
        options = (k if x.default is x.empty else f"{k}={json.dumps(x.default)}" for k, x in loss_options(loss).items())
        first, *_ = re.split(r"(?<=\.)\s", inspect.getdoc(loss) or "", maxsplit=1)
        lines += [" ".join([f"{name}:", *options]), f"  {' '.join(first.split())}".rstrip()]
    return "\n".join(lines)


def loss_options(loss: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a loss; in place of **options, those of its `options_of`."""
    options = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[name] = parameter
        elif parameter.kind is parameter.VAR_KEYWORD:
            for own, option in loss_options(loss.options_of).items():
                options.setdefault(own, option)
    return options


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of the annotated type; types not listed here are left to the loss to check."""
    if isinstance(wanted, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(wanted))
    if wanted == Loss:
        return isinstance(value, Mapping) or callable(value)
    if typing.get_origin(wanted) is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(entry, *typing.get_args(wanted)) for entry in value)
    if wanted not in (float, int, bool, str, types.NoneType):
        return True
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _kind(wanted: Any) -> str:
    if isinstance(wanted, types.UnionType):
        return " or ".join(map(_kind, typing.get_args(wanted)))
    if typing.get_origin(wanted) is Sequence:
        return f"[{_kind(*typing.get_args(wanted))}, ...]"
    return {Loss: '{"name": loss, ...}', types.NoneType: "null"}.get(wanted, getattr(wanted, "__name__", str(wanted)))
