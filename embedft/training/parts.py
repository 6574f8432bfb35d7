"""Which parameters train, and how fast: freezing, learning rates by name, layer-wise decay.

    with without_gradient(embedder, frozen_names(embedder, freeze=["embeddings"], below=2)):
        rates = learning_rates(embedder, lr=2e-5, parts={"embeddings": 1e-5}, decay=0.9)

A name is parts in a row of a parameter's dotted name, ours or the checkpoint's: "layers.0", "encoder.layer.0",
"embeddings", "pooling", "lora". A tensor that stacks several of the checkpoint needs a name for all of them.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import device as devices
from ..data.collate import Batch
from ..data.dataset import RetrievalDataset
from ..encoders.depth import check_depths
from ..encoders.dtypes import check_trains
from ..encoders.embedder import Embedder
from ..encoders.folder import encoder_keys
from ..encoders.lora import LoraConfig, add_lora
from ..encoders.weights import matches, tensor_keys
from .memory import check_memory
from .references import FrozenEmbeddings

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """{parameter: names of all that it stacks, by the checkpoint}; no names where there are none but ours."""
    names = {name: [] for name, _ in model.named_parameters()}
    if isinstance(model, Embedder) and model.query_side is not None:
        names |= {f"query_side.{name}": theirs for name, theirs in names_of(model.query_side).items()}
    if isinstance(model, Embedder) and (keys := encoder_keys(model.encoder)):
        stacks = tensor_keys(model.encoder.state_dict(), keys)
        names |= {f"encoder.{name}": list(stack) for name, stack in stacks.items() if f"encoder.{name}" in names}
    return names


def named_by(pattern: str, names: Mapping[str, list[str]], option: str) -> set[str]:
    """The parameters that a pattern names. Raises `ValueError` for none, and for a part of a stack."""
    found = set()
    for ours, theirs in names.items():
        hits = [matches(pattern, name) for name in theirs]
        if matches(pattern, ours) or (hits and all(hits)):
            found.add(ours)
        elif any(hits):
            raise ValueError(
                f"{option} has {pattern!r}, which is only a part of {ours}: name all of {', '.join(theirs)}"
            )
    if not found:
        some = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        raise ValueError(f"{option} has {pattern!r}, expected parts of the parameters' names: {', '.join(some)}")
    return found


def layer_numbers(names: Iterable[str], option: str) -> dict[str, tuple[int, int]]:
    """{parameter: (the number of its layer, how many layers its encoder has)}, given in the order of the model: -1 for
    what precedes the first layer (embeddings), and that number of layers for what follows (a last norm, pooling). An
    encoder for queries alone is counted by itself. Raises `ValueError` if no parameter is in a layer."""
    found, sides = {}, {}
    for name in names:
        sides.setdefault(name.startswith("query_side."), []).append(name)
    for side in sides.values():
        layers = {name: int(match[1]) for name in side if (match := LAYER.search(name))}
        num_layers, is_before = max(layers.values(), default=-1) + 1, bool(layers)
        for name in side:
            is_before = is_before and name not in layers
            found[name] = layers.get(name, -1 if is_before else num_layers), num_layers
    if not any(num_layers for _, num_layers in found.values()):
        raise ValueError(f"{option}, but no parameter is called layers.0, layers.1 and so on")
    return found


def learning_rates(model: nn.Module, *, lr: float, parts: Mapping[str, Any], decay: float) -> dict[str, float]:
    """{parameter: its peak learning rate}: that of the last name in `parts` that names it, otherwise `lr`; times
    `decay` to the power of how many layers below its encoder's last one it is, 0 for what follows them.
    Source: Howard and Ruder 2018 (ULMFiT), section 3.2; Clark et al. 2020 (ELECTRA), appendix A."""
    names = names_of(model)
    rates = dict.fromkeys(names, lr)
    for pattern, value in flattened(parts).items():
        rates |= dict.fromkeys(named_by(pattern, names, "lr_parts"), value)
    if decay != 1:
        for name, (number, num_layers) in layer_numbers(names, f"lr_decay is {decay}").items():
            rates[name] *= decay ** max(0, num_layers - 1 - number)
    return rates


def flattened(parts: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"layers.0": 1e-5} also from {"layers": {"0": 1e-5}}, as --lr-parts.layers.0 reads.
    Raises `ValueError` for a value that is not a positive number."""
    found = {}
    for name, value in parts.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"lr_parts: {prefix}{name} is {value!r}, expected a learning rate above 0")
        else:
            found[prefix + name] = float(value)
    return found


def frozen_names(embedder: Embedder, freeze: Sequence[str], below: int | None) -> set[str]:
    """Parameters that are not trained: those that `freeze` names, what is below layer number `below` (with the
    embeddings) and, with LoRA, all others."""
    names = names_of(embedder)
    frozen = set().union(*(named_by(pattern, names, "freeze") for pattern in freeze))
    if below is not None:
        numbers = layer_numbers(names, f"freeze_below is {below}")
        if below > (most := max(num_layers for _, num_layers in numbers.values())):
            raise ValueError(f"freeze_below is {below}, expected at most {most}, the encoder's layers")
        frozen |= {name for name, (number, _) in numbers.items() if number < below}
    if embedder.lora is not None:
        frozen |= {name for name in names if not name.startswith("lora.")}
    return frozen


def choose_parts(embedder: Embedder, config: Any) -> set[str]:
    """Adds LoRA as a `FinetuneConfig` says, and returns the parameters that are not trained.
    Raises `ValueError` for weights in int8, for names and depths that the model lacks, and like `check_memory`."""
    check_trains(embedder)
    check_memory(embedder, config)
    if config.depths is not None:
        if embedder.query_side is not None:
            raise ValueError(f"depths is {config.depths}, but queries have an encoder of their own")
        check_depths(embedder.encoder, config.depths)
    if (lora := config.lora_config()) is not None:
        with devices.seeded(config.seed, embedder.device):
            add_lora(embedder, lora)
    frozen = frozen_names(embedder, config.freeze, config.freeze_below)
    if frozen >= {name for name, _ in embedder.named_parameters()}:
        name = "freeze" if config.freeze_below is None else "freeze_below"
        raise ValueError(f"{name} is {getattr(config, name)}, which leaves nothing of the model to train")
    if config.depths is not None:
        numbers, least = layer_numbers(names_of(embedder), f"depths is {config.depths}"), min(config.depths)
        if all(name in frozen or least <= number < count for name, (number, count) in numbers.items()):
            raise ValueError(f"depths is {config.depths}, but nothing of the first {least} layers is trained")
    learning_rates(embedder, lr=config.lr, parts=config.lr_parts, decay=config.lr_decay)  # raises for unknown names
    return frozen


def constant_vectors(
    embedder: Embedder, dataset: RetrievalDataset, lora: LoraConfig | None
) -> dict[str, Callable[[Batch], Tensor]]:
    """With LoRA of one side, the vectors of the other, which training does not change: {role: batch -> vectors}."""
    if lora is None or lora.side == "both":
        return {}
    role = "document" if lora.side == "query" else "query"
    vectors = FrozenEmbeddings(embedder, dataset, dim=embedder.full_dim, roles=[role])
    return {role: functools.partial(vectors.vectors, role)}


@contextlib.contextmanager
def without_gradient(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Parameters of these names require no gradient, until the context ends."""
    chosen = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    try:
        for parameter in chosen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)
