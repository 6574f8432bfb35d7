"""LoRA: low-rank updates of an encoder's Linear layers, trained while the weights themselves stay as they are.

    add_lora(embedder, LoraConfig(rank=8, targets=["query", "value"], side="query"))
    embedder.save("adapter")        # one side, or save="adapter": PEFT's layout, without weights; otherwise merged
    merge_lora(embedder)            # adds the updates to the weights

A layer W x becomes W x + alpha / rank * B A dropout(x). At first A [R, D] is uniform in +-1/sqrt(D) and B [E, R] zero,
so that training starts from the model's own vectors, bit for bit. A layer that stacks several of the checkpoint (qkv)
has an A and a B for each; their dropout is shared.

The updates live beside the encoder, whose modules and tensors do not change: they are added by hooks while a text of
their side is embedded. So with one side only, the other has the vectors, and the place in a `Store`, of the base.

Source: Hu et al. 2021 (LoRA), section 4.1; initial A as in PEFT.

Shapes: T tokens, D features in, E features out, R rank, P parts of a layer that are updated.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_types, option
from ..files import write_json
from .adapter import naming
from .dtypes import check_trains
from .fingerprint import weights_sha256
from .folder import encoder_keys
from .layers import Dropout
from .schema import LORA_CONFIG_FILE, LORA_SIDE_FILE, LORA_WEIGHTS_FILE, read_fields
from .weights import WEIGHTS_FILE, Keys, matches, read_file, tensor_keys, write_tensors

PREFIX = "base_model.model."  # of the names of tensors in PEFT's files
# What an adapter of PEFT may have that is not LoRA as above: the field of its configuration, and the value without it.
WITHOUT = {"bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
WITHOUT |= {"rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False, "layer_replication": None}


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA."""

    rank: int = option(8, "rank of the updates", least=1)
    alpha: float = option(16.0, "updates are multiplied by alpha / rank", above=0, most=65_504)  # as float16 holds
    dropout: float = option(0.0, "dropout of an update's input", least=0, below=1)
    targets: list[str] = option([], "names of layers, ours or the checkpoint's, or parts of them [all Linear layers]")
    side: Literal["both", "query", "document"] = option("both", "whose vectors are updated")
    save: Literal["merged", "adapter"] | None = option(None, "how to save [merged; with one side: adapter]")

    def __post_init__(self):
        check_types(type(self), vars(self))
        if self.side != "both" and self.save == "merged":
            raise ValueError(f"save is 'merged', but side is {self.side!r}: the weights serve both sides")

    @property
    def merges(self) -> bool:
        """Whether a model is saved with the updates added to its weights."""
        return self.side == "both" and self.save != "adapter"


class Update(nn.Module):
    """The update of one layer, added to its output. `rows`: {module of the checkpoint: its rows of the output}."""

    def __init__(self, layer: nn.Linear, rows: Mapping[str, range], config: LoraConfig):
        super().__init__()
        self.rows, self.rank, self.scale, like = dict(rows), config.rank, config.alpha / config.rank, layer.weight
        first_PRD = torch.empty(len(rows) * config.rank, layer.in_features)
        nn.init.uniform_(first_PRD, -1 / math.sqrt(layer.in_features), 1 / math.sqrt(layer.in_features))
        self.A = nn.Parameter(first_PRD.to(like))
        self.B = nn.Parameter(like.new_zeros(sum(map(len, rows.values())), config.rank))
        self.dropout = Dropout(config.dropout)

    def parts(self) -> Iterator[tuple[str, range, Tensor, Tensor]]:
        """(module of the checkpoint, its rows, its A [R, D], its B [E, R])."""
        lengths = [len(rows) for rows in self.rows.values()]
        yield from zip(self.rows, self.rows.values(), self.A.split(self.rank), self.B.split(lengths), strict=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., E] + scale * B A x [..., D], on the rows of each part; a user's own encoder may pad its batches."""
        # Not oneDNN, which takes four times as long for the gradients of such thin matrices.
        inner, added, done = F.linear(self.dropout(x), self.A).split(self.rank, dim=-1), [], 0
        for (_, rows, _, B), part in zip(self.parts(), inner, strict=True):
            added += [y.new_zeros(*y.shape[:-1], rows.start - done)] * (rows.start > done) + [F.linear(part, B)]
            done = rows.stop
        if done < y.shape[-1]:
            added.append(y.new_zeros(*y.shape[:-1], y.shape[-1] - done))
        # In place: no gradient needs the layer's output.
        return y.add_(added[0] if len(added) == 1 else torch.cat(added, dim=-1), alpha=self.scale)


class Lora(nn.Module):
    """The updates of an encoder, in a tree of modules with its names: "layers.0.qkv" has the `Update` of that layer.

    `keys`: the encoder's key map; {} if its names are those of the checkpoint. `base`: the model's name or folder.
    Raises `ValueError` for a target that names no Linear layer, too high a rank, or an encoder without any."""

    def __init__(self, encoder: nn.Module, keys: Keys, config: LoraConfig, base: str = ""):
        super().__init__()
        self.config, self.places = config, []
        self.base = str(Path(base).resolve()) if os.path.isdir(base) else base
        layers = dict(linear_layers(encoder, keys))
        if not layers:
            raise ValueError("LoRA updates Linear layers, but the encoder has none")
        if config.rank > (widest := max(max(layer.weight.shape) for layer, _ in layers.values())):
            raise ValueError(f"rank is {config.rank}, expected at most {widest}, the features of the widest layer")
        chosen = {place: chosen_rows(place, rows, config.targets) for place, (_, rows) in layers.items()}
        names = sorted({name.rpartition(".")[2] for place, (_, rows) in layers.items() for name in (place, *rows)})
        for target in config.targets:
            if not any(chosen_rows(place, rows, [target]) for place, (_, rows) in layers.items()):
                raise ValueError(f"targets has {target!r}, expected names of Linear layers, such as {', '.join(names)}")
        for place, rows in chosen.items():
            if rows:
                self.places.append(place)
                _put(self, place, Update(layers[place][0], rows, config))

    def updates(self) -> dict[str, Update]:
        """{place of a layer in the encoder: its update}."""
        return {place: self.get_submodule(place) for place in self.places}

    def serves(self, role: str) -> bool:
        """Whether texts of a role are embedded with the updates."""
        return self.config.side in ("both", role)

    @contextlib.contextmanager
    def applied(self, encoder: nn.Module) -> Iterator[None]:
        """Adds the updates to the layers' outputs, until the context ends."""
        updates, handles = self.updates(), []
        try:
            for place, layer in encoder.named_modules():
                if place in updates:
                    hook = updates[place]
                    handles.append(layer.register_forward_hook(lambda _, inputs, y, hook=hook: hook(inputs[0], y)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def merged(self, encoder: nn.Module) -> dict[str, Tensor]:
        """The encoder's state with the updates added. Raises `ValueError` if they are for one side only."""
        if self.config.side != "both":
            raise ValueError(f"LoRA has side {self.config.side!r}, but the encoder's weights serve both")
        state = encoder.state_dict()
        for place, update in self.updates().items():
            before = state[f"{place}.weight"]
            exact = before.to("cpu", copy=True).double()  # MPS has no float64
            for _, rows, A, B in update.parts():
                exact[rows.start : rows.stop] += update.scale * (B.cpu().double() @ A.cpu().double())
            state[f"{place}.weight"] = exact.to(before.dtype).to(before.device)
        return state

    def check_folder(self, folder: Path) -> None:
        """Raises `ValueError` if a model's weights are in the folder that `save` would write to, or without a base."""
        if (folder / WEIGHTS_FILE).exists():
            raise ValueError(f"{folder}: has a model's weights, which LoRA would be taken for; choose another folder")
        if not self.base:
            raise ValueError("cannot save LoRA without its base model: this Embedder was not loaded from a folder")

    def save(self, folder: Path, encoder: nn.Module) -> None:
        """Writes PEFT's adapter_config.json and adapter_model.safetensors and, in lora.json, what PEFT has no fields
        for: the side, and the SHA-256 of the base's weights."""
        if self.config.side != "both":
            warnings.warn(f"PEFT would apply LoRA to both sides, not only {self.config.side}", stacklevel=6)
        config, tensors = self.config, {}
        for update in self.updates().values():
            for name, _, A, B in update.parts():
                tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        names = sorted(name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if "_A." in name)
        values = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": self.base}
        values |= {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        values |= {"target_modules": names, "inference_mode": True, **WITHOUT}
        write_tensors(folder / LORA_WEIGHTS_FILE, tensors)
        write_json(folder / LORA_CONFIG_FILE, values)
        base = {"base_sha256": weights_sha256(encoder)} if _is_float32(encoder) else {}
        write_json(folder / LORA_SIDE_FILE, {"side": config.side, **base})


def add_lora(embedder: nn.Module, config: LoraConfig) -> None:
    """Updates an Embedder's layers from now on, at first by zero; initial weights are drawn from torch's generator.
    Raises `ValueError` for an unknown target, if there is LoRA already, and for one encoder per side."""
    check_trains(embedder)
    if embedder.lora is not None:
        raise ValueError("the embedder has LoRA already: merge it first")
    if embedder.query_side is not None:
        raise ValueError("LoRA is for one encoder, but this model has one for queries and one for documents")
    base = embedder.source.name if embedder.source else ""
    embedder.lora = Lora(embedder.encoder, encoder_keys(embedder.encoder), config, base)


def merge_lora(embedder: nn.Module) -> None:
    """Adds the updates to the encoder's weights. Raises `ValueError` if they are for one side only."""
    if embedder.lora is not None:
        embedder.encoder.load_state_dict(embedder.lora.merged(embedder.encoder))
        embedder.lora = None


def read_lora(folder: Path, encoder: nn.Module, keys: Keys) -> Lora:
    """The updates that PEFT or `Lora.save` wrote.
    Raises `ValueError` for what is not LoRA as above, and for tensors that do not fit the encoder."""
    path = folder / LORA_CONFIG_FILE
    values, own, layers = read_fields(path), read_fields(folder / LORA_SIDE_FILE), dict(linear_layers(encoder, keys))
    for field, expected in {"peft_type": "LORA", **WITHOUT}.items():
        if (found := values.get(field, expected)) != expected and found:
            raise ValueError(f"{path}: {field} is {repr(found)[:60]}, expected {expected!r}")
    if "base_sha256" in own and _is_float32(encoder) and own["base_sha256"] != weights_sha256(encoder):
        base = values.get("base_model_name_or_path")
        raise ValueError(f"{folder / LORA_SIDE_FILE}: base_sha256 is not that of the weights of {base}")
    places = {name: place for place, (_, rows) in layers.items() for name in rows}
    found = {}  # by the name of the module
    for name, tensor in read_file(folder / LORA_WEIGHTS_FILE).items():
        module, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        known = next((place for place in places if f".{module}".endswith(f".{place}")), None)
        if known is None or kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{folder / LORA_WEIGHTS_FILE}: {name} is for no Linear layer of the encoder")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            raise ValueError(f"{folder / LORA_WEIGHTS_FILE}: {name} has type {tensor.dtype}, expected float16 or wider")
        found.setdefault(known, {})[kind[0]] = tensor
    if not found:
        raise ValueError(f"{folder / LORA_WEIGHTS_FILE}: has no tensors")
    with naming(path):
        options = {"rank": values["r"], "alpha": values["lora_alpha"], "dropout": values.get("lora_dropout", 0.0)}
        config = LoraConfig(**options, targets=sorted(found), side=own.get("side", "both"), save="adapter")
        lora = Lora(encoder, keys, config, values.get("base_model_name_or_path", ""))
    for update in lora.updates().values():
        for name, _, *wanted in update.parts():
            for kind, empty in zip("AB", wanted, strict=True):
                tensor = found[name].get(kind)
                if tensor is None or tensor.shape != empty.shape:
                    has = "missing" if tensor is None else list(tensor.shape)
                    raise ValueError(f"{folder}: lora_{kind} of {name} is {has}, expected {list(empty.shape)}")
                empty.data.copy_(tensor)
    return lora


def linear_layers(encoder: nn.Module, keys: Keys) -> Iterator[tuple[str, tuple[nn.Linear, dict[str, range]]]]:
    """(place in the encoder, (layer, {module of the checkpoint: its rows})) of every Linear layer."""
    for place, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear):
            weight = f"{place}.weight"
            stack = tensor_keys({weight: layer.weight}, keys)[weight] if keys else {weight: layer.out_features}
            rows, start = {}, 0
            for name, count in stack.items():
                rows[name.removesuffix(".weight")] = range(start, start + count)
                start += count
            yield place, (layer, rows)


def chosen_rows(place: str, rows: Mapping[str, range], targets: list[str]) -> dict[str, range]:
    """The parts of a layer that targets name, by our name or the checkpoint's; without targets, all."""
    if not targets or any(matches(target, place) for target in targets):
        return dict(rows)
    return {name: part for name, part in rows.items() if any(matches(target, name) for target in targets)}


def _is_float32(encoder: nn.Module) -> bool:
    return all(parameter.dtype is torch.float32 for parameter in encoder.parameters())


def _put(root: nn.Module, place: str, module: nn.Module) -> None:
    *parents, last = place.split(".")
    for name in parents:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)
