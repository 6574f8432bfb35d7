"""Writes a model folder in the layout of sentence-transformers before version 6, each file atomically.

write_folder(Path("model"), embedder.source, embedder.encoder, embedder.tokenizer, pooling=embedder.pooling, ...)
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import named_errors, write_json
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import ROLES, Adapter, Base
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
    Source,
)
from .pooling import Pooling
from .tokenization import Tokenizer

ROUTER_CONFIG_FILE = "router_config.json"


def checkpoint_tensors(encoder: nn.Module, family: Family) -> dict[str, Tensor]:
    """The encoder's weights under the checkpoint's names: the inverse of `load_weights`."""
    keys = family.key_map(encoder.config)
    return {
        name: part.contiguous()
        for ours, parameter in encoder.state_dict().items()
        for name, part in zip(keys[ours], parameter.cpu().chunk(len(keys[ours])), strict=True)
    }


def write_folder(
    folder: Path,
    source: Source,
    encoder: nn.Module,
    tokenizer: Tokenizer,
    *,
    pooling: Pooling,
    prompts: dict[str, str],
    similarity: str,
    normalize: bool,
    truncate_dim: int | None,
    adapter: Adapter | None = None,
    base: Base | None = None,
) -> None:
    """Writes a model in the sentence-transformers layout, each file atomically; see `Embedder.save`.

    Raises `ValueError`, before anything is written, for an adapter that Dense modules cannot hold.
    """
    dense = {role: part and part.dense() for role in ROLES if adapter for part in [adapter.map_of(role)]}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / WEIGHTS_FILE, {**checkpoint_tensors(encoder, source.family), **source.carried})
    # transformers loads in the type that config.json names, so it has to be that of the weights.
    dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**source.config, "torch_dtype": dtype, "dtype": dtype})
    tokenizer.save(folder)
    lengths = {"max_seq_length": tokenizer.max_length, "do_lower_case": tokenizer.lower_case}
    write_json(folder / TRANSFORMER_CONFIG_FILE, lengths)
    _write_pooling(folder / POOLING_FOLDER, pooling, encoder.config.hidden_size)
    settings = {"similarity_fn_name": similarity, "truncate_dim": truncate_dim}
    default = source.default_prompt if source.default_prompt in prompts else None
    write_json(folder / MODEL_CONFIG_FILE, {"prompts": prompts, "default_prompt_name": default, **settings})
    modules = list(MODULES if normalize else MODULES[:2])
    if adapter is not None:
        adapter.save(folder / ADAPTER_FOLDER, base=base)
        _write_router(folder / f"{len(modules)}_{ROUTER}", dense)
        modules += [ROUTER, *modules[2:]]
    elif (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():  # of a model that was saved here before
        shutil.rmtree(folder / ADAPTER_FOLDER)
    paths = ["", *(f"{i}_{module}" for i, module in enumerate(modules) if i)]
    types = [f"sentence_transformers.models.{module}" for module in modules]
    entries = enumerate(zip(paths, types, strict=True))
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in entries]
    write_json(folder / MODULES_FILE, modules)


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
    """A Router with one route per role: a Dense module without activation, or nothing if the role has no map.

    `encode` of sentence-transformers, which has no role, takes the documents' route.
    """
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
    types = {name: "sentence_transformers.models.Dense" for names in structure.values() for name in names}
    parameters = {"default_route": "document", "allow_empty_key": True}
    write_json(folder / ROUTER_CONFIG_FILE, {"types": types, "structure": structure, "parameters": parameters})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    # safetensors makes a file that only its owner can read; this one gets the permissions of any new file.
    temporary.touch()
    mode = temporary.stat().st_mode
    # Cloned, because a safetensors file cannot hold tensors that share memory.
    separate = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    try:
        with named_errors(path):
            save_file(separate, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
