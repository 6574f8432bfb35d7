"""Writes a model folder in the layout of sentence-transformers before version 6, each file atomically.

write_folder(Path("model"), embedder)
"""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor, nn

from ..files import atomic_write, write_json
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import ROLES
from .folder import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    LEGACY_POOLING_KEYS,
    MODEL_CONFIG_FILE,
    MODULES,
    MODULES_FILE,
    POOLING_FOLDER,
    ROUTER,
    TRANSFORMER_CONFIG_FILE,
    WEIGHTS_FILE,
    Family,
)
from .pooling import Pooling

if TYPE_CHECKING:
    from .embedder import Embedder

ROUTER_CONFIG_FILE, MODULE_TYPE = "router_config.json", "sentence_transformers.models."


def checkpoint_tensors(encoder: nn.Module, family: Family) -> dict[str, Tensor]:
    """The encoder's weights under the checkpoint's names: the inverse of `load_weights`."""
    keys = family.key_map(encoder.config)
    return {
        name: part.contiguous()
        for ours, parameter in encoder.state_dict().items()
        for name, part in zip(keys[ours], parameter.cpu().chunk(len(keys[ours])), strict=True)
    }


def write_folder(folder: Path, embedder: "Embedder") -> None:
    """Writes a model in the sentence-transformers layout; see `Embedder.save`."""
    source, tokenizer, adapter = embedder.source, embedder.tokenizer, embedder.adapter
    # First, because it raises: an adapter whose maps are not linear.
    dense = {role: part and part.dense() for role in ROLES if adapter for part in [adapter.map_of(role)]}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(embedder.encoder, source.family)
    _write_tensors(folder / WEIGHTS_FILE, {**tensors, **source.carried})
    # transformers loads in the type that config.json names, so it has to be that of the weights.
    dtype = str(next(embedder.encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**source.config, "torch_dtype": dtype, "dtype": dtype})
    tokenizer.save(folder)
    lengths = {"max_seq_length": tokenizer.max_length, "do_lower_case": tokenizer.lower_case}
    write_json(folder / TRANSFORMER_CONFIG_FILE, lengths)
    _write_pooling(folder / POOLING_FOLDER, embedder.pooling, embedder.encoder.config.hidden_size)
    settings = {
        "prompts": embedder.prompts,
        "default_prompt_name": source.default_prompt if source.default_prompt in embedder.prompts else None,
        "similarity_fn_name": embedder.similarity,
        "truncate_dim": embedder.truncate_dim,
    }
    write_json(folder / MODEL_CONFIG_FILE, settings)
    modules = list(MODULES if embedder.normalize else MODULES[:2])
    if adapter is not None:
        adapter.save(folder / ADAPTER_FOLDER, base=embedder.base())
        _write_router(folder / f"{len(modules)}_{ROUTER}", dense)
        modules += [ROUTER, *modules[2:]]
    elif (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():  # of a model that was saved here before
        shutil.rmtree(folder / ADAPTER_FOLDER)
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": MODULE_TYPE + kind}
        for i, kind in enumerate(modules)
    ]
    write_json(folder / MODULES_FILE, entries)


def _write_pooling(folder: Path, pooling: Pooling, hidden_size: int) -> None:
    config: dict[str, Any] = {key: mode in pooling.names for mode, key in LEGACY_POOLING_KEYS.items()}
    if tuple(mode for mode in LEGACY_POOLING_KEYS if mode in pooling.names) != pooling.names:
        config = {"pooling_mode": pooling.names}  # another order or another mode than the old form can express
    theirs = {"word_embedding_dimension": hidden_size, **config, "include_prompt": pooling.include_prompt}
    write_json(folder / CONFIG_FILE, theirs)
    if pooling.state_dict():
        _write_tensors(folder / WEIGHTS_FILE, pooling.state_dict())
    if not set(pooling.names) <= LEGACY_POOLING_KEYS.keys():
        warnings.warn(f"{folder}: sentence-transformers cannot load {' + '.join(pooling.names)} pooling", stacklevel=4)


def _write_router(folder: Path, dense: dict[str, tuple[Tensor, Tensor | None] | None]) -> None:
    """A Router with a route per role (documents' is the default): a Dense module without activation, or nothing."""
    structure = {role: [] if layer is None else [f"{role}_0_Dense"] for role, layer in dense.items()}
    for role, layer in dense.items():
        if layer is None:
            continue
        weight, bias = layer
        place = folder / structure[role][0]
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
        write_json(place / CONFIG_FILE, {**sizes, "activation_function": "torch.nn.modules.linear.Identity"})
        tensors = {"linear.weight": weight} if bias is None else {"linear.weight": weight, "linear.bias": bias}
        _write_tensors(place / WEIGHTS_FILE, tensors)
    types = {name: MODULE_TYPE + "Dense" for names in structure.values() for name in names}
    parameters = {"default_route": "document", "allow_empty_key": True}
    write_json(folder / ROUTER_CONFIG_FILE, {"types": types, "structure": structure, "parameters": parameters})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Cloned, because a safetensors file cannot hold tensors that share memory.
    separate = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    with atomic_write(path, "wb") as file:
        file.write(save(separate, metadata={"format": "pt"}))
