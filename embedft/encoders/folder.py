"""The files of a model folder: config.json, model.safetensors, the tokenizer, sentence-transformers' module files.

Read strictly: what the family does not know, or misses, is an error that names it. Written in the form that versions
of sentence-transformers before 6 read too. Nothing is ever unpickled. Not here: where a folder comes from, and the
Embedder made of it (loading.py).

    family, config, _ = read_config(folder)
    carried = load_weights(family.encoder(config), folder / WEIGHTS_FILE, family, torch.float32)
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import read_json, read_object, write_json
from . import bert
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import ROLES, Adapter, Base
from .pooling import POOLING_MODES
from .tokenization import Tokenizer

CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE = "config.json", "model.safetensors", "modules.json"
TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
# The modules of modules.json that are understood, by class name and in this order.
MODULES = ("Transformer", "Pooling", "Normalize")
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"
# Behind them may stand an adapter: as our own files, and as a Router whose routes are queries and documents.
ADAPTER_FOLDER, ROUTER, ROUTER_CONFIG_FILE = "adapter", "Router", "router_config.json"

# Pooling mode -> its key in 1_Pooling/config.json of sentence-transformers before 6.
LEGACY_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


class Family(NamedTuple):
    """What loading needs to know of an encoder family; the values live in the family's own file."""

    config: Callable[[dict[str, Any]], Any]
    encoder: Callable[..., nn.Module]
    key_map: Callable[[Any], dict[str, tuple[str, ...]]]
    carried: tuple[str, ...]
    prefix: str
    renamed: dict[str, str]


# By `model_type` of config.json.
FAMILIES = {
    "bert": Family(bert.BertConfig.from_dict, bert.Bert, bert.key_map, bert.CARRIED, bert.PREFIX, bert.RENAMED),
}


class Source(NamedTuple):
    """Where an Embedder came from, and what goes back into its folder as it was."""

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]  # config.json
    carried: dict[str, Tensor]  # tensors of the checkpoint that the encoder does not use
    default_prompt: str | None  # of sentence-transformers' plain `encode`; here every text has a role


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is none."""
    return read_object(path) if path.is_file() else {}


def read_modules(folder: Path) -> dict[str, str]:
    """{module's class name: its subfolder} of modules.json; a Hugging Face folder has none and gets mean pooling.

    A Router, with what stands behind it, is left out when it is that of an adapter, which is read from its own folder.
    """
    if not folder.joinpath(MODULES_FILE).is_file():
        return {}
    modules = {}
    for module in read_json(folder / MODULES_FILE):
        if not isinstance(module, dict) or not {"type", "path"} <= module.keys():
            raise ValueError(f'{folder / MODULES_FILE}: a module is {module!r}, expected an object with "type", "path"')
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == ROUTER and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():
            break
        if kind in modules:
            raise ValueError(f"{folder / MODULES_FILE}: two modules are a {kind}, expected one")
        modules[kind] = module["path"]
    if tuple(modules) not in (MODULES[:2], MODULES):
        found, wanted = ", ".join(modules), ", ".join(MODULES)
        raise ValueError(f"{folder / MODULES_FILE}: modules are {found}, expected {wanted} (the last may be absent)")
    return modules


def read_pooling(folder: Path) -> tuple[tuple[str, ...], bool]:
    """(modes, include_prompt) of a pooling config, new or legacy."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE}, which says how tokens are pooled")
    config = read_object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in LEGACY_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in POOLING_MODES:
            raise ValueError(f"{path}: pooling mode is {mode!r}, expected one of {', '.join(POOLING_MODES)}")
    return modes, config.get("include_prompt", True)


def read_config(folder: Path) -> tuple[Family, Any, dict[str, Any]]:
    """The family that config.json names, the family's own configuration, and all of the file."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE}, so this is no model folder")
    values = read_object(path)
    family = FAMILIES.get(values.get("model_type"))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}, expected one of {known}")
    try:
        return family, family.config(values), values
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_tokenizer(folder: Path, config: Any, max_length: int | None) -> Tokenizer:
    """The tokenizer with its maximum length: asked for, else the folder's; never above the encoder's positions."""
    settings = read_optional(folder / TRANSFORMER_CONFIG_FILE)
    limit = config.max_length
    lower_case = bool(settings.get("do_lower_case"))
    tokenizer = Tokenizer.load(folder, max_length=limit if max_length is None else max_length, lower_case=lower_case)
    if max_length is None:
        folder_length = settings.get("max_seq_length") or tokenizer.config.get("model_max_length") or limit
        if not isinstance(folder_length, (int, float)):
            raise ValueError(f"{folder}: the maximum length is {folder_length!r}, expected a number of tokens")
        tokenizer.max_length = int(min(folder_length, limit))
    if tokenizer.largest_id >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer gives ids up to {tokenizer.largest_id}, "
            f"the encoder's vocab_size is {config.vocab_size}"
        )
    return tokenizer


def load_weights(encoder: nn.Module, path: Path, family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fills an encoder (on the meta device) from a safetensors file; gives the tensors that it carries along.

    Raises `ValueError` naming the keys that are missing, unexpected, or of the wrong shape.
    """
    if not path.is_file():
        found = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".bin", ".pt", ".safetensors"))
        raise ValueError(f"{path.parent}: no {WEIGHTS_FILE} (weights found: {', '.join(found) or 'none'})")
    try:
        stored = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    tensors = {}
    for name, tensor in stored.items():
        name = name.removeprefix(family.prefix)
        for old, new in family.renamed.items():
            name = name.replace(old, new)
        if name in tensors:
            raise ValueError(f"{path}: {name} is there twice, under this name and an older one")
        tensors[name] = tensor
    carried = {name: tensors.pop(name) for name in list(tensors) if name.startswith(family.carried)}

    keys = family.key_map(encoder.config)
    wanted = {name for theirs in keys.values() for name in theirs}
    faults = [f"missing {name}" for name in sorted(wanted - tensors.keys())]
    faults += [f"unexpected {name}" for name in sorted(tensors.keys() - wanted)]
    state = {}
    for ours, parameter in encoder.state_dict().items():
        theirs = [name for name in keys[ours] if name in tensors]
        shape = (parameter.shape[0] // len(keys[ours]), *parameter.shape[1:])
        faults += [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
            for name in theirs
            if tensors[name].shape != shape
        ]
        if not faults:
            state[ours] = torch.cat([tensors.pop(name) for name in theirs]).to(dtype)
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path}: {', '.join(faults[:5])}{more}")
    encoder.load_state_dict(state, assign=True)
    return carried


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
    pooling: tuple[str, ...],
    include_prompt: bool,
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
    dense = {} if adapter is None else {role: part and part.dense() for role, part in _maps(adapter).items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**checkpoint_tensors(encoder, source.family), **source.carried}
    _write_tensors(folder / WEIGHTS_FILE, tensors)
    # transformers loads in the type that config.json names, so the name has to be that of the weights.
    dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**source.config, "torch_dtype": dtype, "dtype": dtype})
    tokenizer.save(folder)
    write_json(
        folder / TRANSFORMER_CONFIG_FILE,
        {"max_seq_length": tokenizer.max_length, "do_lower_case": tokenizer.lower_case},
    )
    pooling_config = {key: mode in pooling for mode, key in LEGACY_POOLING_KEYS.items()}
    if tuple(mode for mode in LEGACY_POOLING_KEYS if mode in pooling) != pooling:
        pooling_config = {"pooling_mode": pooling}  # an order that the old form cannot tell
    write_json(
        folder / POOLING_FOLDER / CONFIG_FILE,
        {
            "word_embedding_dimension": encoder.config.hidden_size,
            **pooling_config,
            "include_prompt": include_prompt,
        },
    )
    write_json(
        folder / MODEL_CONFIG_FILE,
        {
            "prompts": prompts,
            "default_prompt_name": source.default_prompt if source.default_prompt in prompts else None,
            "similarity_fn_name": similarity,
            "truncate_dim": truncate_dim,
        },
    )
    modules = list(MODULES if normalize else MODULES[:2])
    if adapter is None:
        # A folder that is written again may have one, of a model that had an adapter.
        if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():
            shutil.rmtree(folder / ADAPTER_FOLDER)
    else:
        adapter.save(folder / ADAPTER_FOLDER, base=base)
        _write_router(folder / f"{len(modules)}_{ROUTER}", dense)
        modules += [ROUTER, *modules[2:]]
    write_json(
        folder / MODULES_FILE,
        [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{module}" if i else "",
                "type": f"sentence_transformers.models.{module}",
            }
            for i, module in enumerate(modules)
        ],
    )


def _maps(adapter: Adapter) -> dict[str, Any]:
    return {role: adapter.map_of(role) for role in ROLES}


def _write_router(folder: Path, dense: dict[str, tuple[Tensor, Tensor | None] | None]) -> None:
    """A Router with a route a role: a Dense module without activation, or nothing where there is no map.

    `encode` of sentence-transformers, which knows no role, takes the documents' route.
    """
    types, structure = {}, {}
    for role, layer in dense.items():
        structure[role] = [] if layer is None else [f"{role}_0_Dense"]
        if layer is None:
            continue
        weight, bias = layer
        (name,) = structure[role]
        types[name] = "sentence_transformers.models.Dense"
        write_json(
            folder / name / CONFIG_FILE,
            {
                "in_features": weight.shape[1],
                "out_features": weight.shape[0],
                "bias": bias is not None,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        tensors = {"linear.weight": weight} if bias is None else {"linear.weight": weight, "linear.bias": bias}
        _write_tensors(folder / name / WEIGHTS_FILE, tensors)
    write_json(
        folder / ROUTER_CONFIG_FILE,
        {
            "types": types,
            "structure": structure,
            "parameters": {"default_route": "document", "allow_empty_key": True},
        },
    )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    # What the umask gives to a new file: safetensors makes one that its owner alone can read.
    temporary.touch()
    mode = temporary.stat().st_mode
    # A copy of each, for the file holds no tensor that shares memory with another.
    save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    os.replace(temporary, path)
