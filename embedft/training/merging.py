"""One model from several of the same architecture: the weighted average of their weights.

    merged = interpolate(load_embedder(base), load_embedder("runs/first/model"), 0.7)     # 0.7 of the tuned weights
    soup([load_embedder(f"runs/seed-{seed}/model") for seed in range(3)]).save("soup")

Averaging works between a model and what was tuned from it, or between models tuned from the same one.

Source: Wortsman et al. 2022 (WiSE-FT), section 3; Xiao et al. 2023 (LM-Cocktail), section 3; Wortsman et al. 2022
(Model soups), section 2.
"""

import copy
import hashlib
import json
import math
from collections.abc import Sequence

from torch import Tensor

from ..encoders.adapter import ROLES
from ..encoders.dtypes import check_trains
from ..encoders.embedder import Embedder
from ..encoders.head import describe
from ..encoders.lora import merge_lora


def interpolate(base: Embedder, tuned: Embedder, share: float) -> Embedder:
    """A model with (1 - share) * the weights of `base` + share * those of `tuned`, from 0 to 1; the rest, like its
    max_length, is that of `tuned`. Raises like `soup`."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected 0 to 1")
    return soup([base, tuned], [1 - share, share])


def soup(
    models: Sequence[Embedder], weights: Sequence[float] | None = None, *, names: Sequence[str] | None = None
) -> Embedder:
    """A model with the weighted average of the models' weights; the rest, like its max_length, is that of the last one.

    Computed in float64 and rounded once. LoRA of both sides counts as merged.

    Args:
        weights: one for each model, at least 0, with a sum of 1; None: equal.
        names: what errors call the models; None: their names when they were loaded.
    Raises `ValueError` for weights that do not fit, and for the first difference between two models in architecture,
    tokenizer, pooling, prompts, head, adapter or tensors."""
    weights = [1 / len(models) for _ in models] if weights is None else list(weights)
    check_weights(weights, len(models))
    names = names or [model.source.name if model.source else f"model {i}" for i, model in enumerate(models, start=1)]
    models = [_merged(model, name) for model, name in zip(models, names, strict=True)]
    for model, name in zip(models[1:], names[1:], strict=True):
        _check_alike(models[0], model, f"{names[0]} and {name} cannot be averaged")
    states, result = [model.state_dict() for model in models], models[-1]
    result.load_state_dict({name: weighted_average([s[name] for s in states], weights) for name in states[0]})
    if result.adapter is not None:
        result.adapter.base = result.base()
    return result


def check_weights(weights: Sequence[float], num_models: int) -> None:
    """Raises `ValueError` unless there is a weight of at least 0 for each model, with a sum of 1."""
    if not weights or len(weights) != num_models:
        raise ValueError(f"weights has {len(weights)} entries, expected one for each of {num_models} models")
    if not all(0 <= weight < math.inf for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights is {list(weights)}, expected numbers of at least 0 with a sum of 1")


def weighted_average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of weight * tensor, in float64 on the CPU, then rounded to the type of the last one."""
    exact = sum(weight * x.detach().cpu().double() for weight, x in zip(weights, tensors, strict=True))
    return exact.to(tensors[-1].dtype).to(tensors[-1].device)  # in two steps, as MPS has no float64


def _merged(model: Embedder, name: str) -> Embedder:
    """A copy with LoRA merged, and without a store."""
    check_trains(model)
    if model.lora is not None and model.lora.config.side != "both":
        raise ValueError(f"{name}: has LoRA of side {model.lora.config.side!r}, expected LoRA of both or none")
    shared = [model.store, *(model.side(role).source for role in ROLES)]
    model = copy.deepcopy(model, {id(x): x for x in shared})
    model.store = None
    merge_lora(model)
    return model


def _check_alike(first: Embedder, other: Embedder, what: str) -> None:
    facts, theirs = _facts(first), _facts(other)
    for name in facts | theirs:
        if (one := facts.get(name, "missing")) != (two := theirs.get(name, "missing")):
            raise ValueError(f"{what}: {name} is {str(one)[:80]}, and {str(two)[:80]}")


def _facts(model: Embedder) -> dict[str, object]:
    """What must be the same for weights to mean the same, the most telling first."""
    found: dict[str, object] = {}
    sides = {"": model} if model.query_side is None else {"query_side ": model.query_side, "": model}
    found["query_side"] = "an encoder for queries" if len(sides) > 1 else "none"
    for prefix, side in sides.items():
        found[f"{prefix}architecture"] = type(side.encoder).__module__.rpartition(".")[2]
        found |= {f"{prefix}{name}": value for name, value in vars(side.encoder.config).items()}
        found[f"{prefix}tokenizer (SHA-256)"] = _tokenizer_sha256(side)
        found[f"{prefix}pooling"] = f"{', '.join(side.pooling.names)}, include_prompt {side.pooling.include_prompt}"
        found |= {f"{prefix}head of {role}": describe(head) for role, head in side.heads.items()}
    found |= {f"prompt of {role}": repr(model.prompt(role)) for role in ROLES}
    found |= {"similarity": model.similarity, "normalize": model.normalize}
    maps = {} if model.adapter is None else dict(model.adapter.named_children())
    found["adapter"] = {role: part.settings for role, part in maps.items()} or "none"
    return found | {name: f"{list(x.shape)} {x.dtype}" for name, x in model.state_dict().items()}


def _tokenizer_sha256(side: Embedder) -> str:
    """That of the tokenizer but for where it truncates texts, which may differ."""
    parts = json.loads(side.tokenizer.backend.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
