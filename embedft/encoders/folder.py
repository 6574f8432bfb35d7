"""Reads and writes the files of a model folder: weights, tokenizer, sentence-transformers' module files.

Reading is strict: a field of the wrong type, and anything unknown to the encoder family or missing, is an error that
names it. Nothing is unpickled. Files are written atomically, in the format of sentence-transformers before version 6.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from posixpath import normpath
from types import ModuleType
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..files import atomic_write, read_json, read_object, write_json
from . import bert, custom
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import FORMATS, ROLES, fill, naming
from .pooling import Pooling
from .tokenization import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer

# By `model_type` of config.json. A family's module has Config, Encoder, key_map, CARRIED, PREFIX and RENAMED.
FAMILIES: dict[str, ModuleType] = {
    "bert": bert,
}
CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE = "config.json", "model.safetensors", "modules.json"
TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
# The modules of modules.json that are supported, by class name and in this order.
MODULES, MODULE_TYPE = ("Transformer", "Pooling", "Normalize"), "sentence_transformers.models."
POOLING_FOLDER = "1_Pooling"
# An adapter may follow, saved twice: as our own files, and as a Router with routes for queries and documents.
ADAPTER_FOLDER, ROUTER = "adapter", "Router"
# The only files ever downloaded: weights in safetensors, and small JSON files.
HUB_FILES = [WEIGHTS_FILE, CONFIG_FILE, MODULES_FILE, TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE, TOKENIZER_FILE]
HUB_FILES += [TOKENIZER_CONFIG_FILE, *(f"{ADAPTER_FOLDER}/{name}" for name in FORMATS["embedft"])]
HUB_FILES += [f"{place}/{name}" for place in ("0_*", "*_Pooling") for name in ("*.json", WEIGHTS_FILE)]

# Pooling mode -> its key in 1_Pooling/config.json of sentence-transformers before 6.
LEGACY_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}

# The fields that are read: {field: (what is expected, whether a value is valid)}. null counts as an absent field.
Schema = Mapping[str, tuple[str, Callable[[Any], bool]]]
BOOL = ("true or false", lambda x: isinstance(x, bool))
# Without lone surrogates, which JSON can spell but no tokenizer accepts.
TEXT = ("a string", lambda x: x is None or (isinstance(x, str) and x == x.encode(errors="ignore").decode()))
TOKEN = ("a token", lambda x: isinstance(x.get("content") if isinstance(x, dict) else x, str))
LENGTH = ("a number of tokens", lambda x: type(x) in (int, float) and x >= 1)
PLACE = ("one in this folder", lambda x: type(x) is str and "\0" not in x and not normpath(x).startswith(("..", "/")))
SCHEMAS: dict[str, Schema] = {
    CONFIG_FILE: {
        "model_type": (f"one of {', '.join(FAMILIES)}", lambda x: x in [*FAMILIES, custom.MODEL_TYPE]),
        **dict.fromkeys(("dtype", "torch_dtype"), TEXT),
    },
    MODULES_FILE: {"type": TEXT, "path": PLACE},
    POOLING_FOLDER: {
        "pooling_mode": ("a name or a list", lambda x: all(map(TEXT[1], x if isinstance(x, list) else [x]))),
        "include_prompt": BOOL,
        **dict.fromkeys(LEGACY_POOLING_KEYS.values(), BOOL),
    },
    TRANSFORMER_CONFIG_FILE: {"max_seq_length": LENGTH, "do_lower_case": BOOL},
    MODEL_CONFIG_FILE: {
        "prompts": ("an object of strings", lambda x: isinstance(x, dict) and all(map(TEXT[1], x.values()))),
        **dict.fromkeys(("default_prompt_name", "similarity_fn_name"), TEXT),
        "truncate_dim": ("a whole number", lambda x: type(x) is int),
    },
    TOKENIZER_CONFIG_FILE: {
        "model_max_length": LENGTH,
        "truncation_side": ("left or right", lambda x: x in ("left", "right")),
        "tokenizer_class": TEXT,
        **dict.fromkeys(("cls_token", "sep_token", "unk_token"), TOKEN),
        **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), BOOL),
        "added_tokens_decoder": ("an object", lambda x: isinstance(x, dict)),
        "additional_special_tokens": ("a list", lambda x: isinstance(x, list)),
        "extra_special_tokens": ("a list or an object", lambda x: isinstance(x, list | dict)),
    },
}
TYPES = {bool: BOOL, str: TEXT, int: ("a whole number of at least 1", lambda x: type(x) is int and x >= 1)}
TYPES[float] = "a finite number", lambda x: type(x) in (int, float) and abs(x) < math.inf


class Source(NamedTuple):
    """Where an Embedder came from, and what `save` writes back unchanged."""

    name: str
    folder: Path
    family: ModuleType | custom.Family
    config: dict[str, Any]  # config.json
    carried: dict[str, Tensor]  # tensors of the checkpoint that the encoder does not use
    default_prompt: str | None  # for sentence-transformers' plain `encode`; here every text has a role


def _check(path: Path, values: Mapping[str, Any], schema: Schema) -> None:
    for field, (expected, is_right) in schema.items():
        if field in values and not is_right(values[field]):
            raise ValueError(f"{path}: {field} is {repr(values[field])[:60]}, expected {expected}")


def read_fields(path: Path, schema: str | None = None) -> dict[str, Any]:
    """The object in a JSON file, without nulls; {} if there is no file. Raises `ValueError` naming an invalid field."""
    values = {key: value for key, value in read_object(path).items() if value is not None} if path.is_file() else {}
    _check(path, values, SCHEMAS[schema or path.name])
    return values


def read_modules(folder: Path) -> dict[str, str]:
    """{class name of a module: its subfolder} from modules.json; {} for a Hugging Face folder, which has none.
    An adapter's Router and what follows it are left out, because the adapter is read from its own folder."""
    path, kinds, places = folder / MODULES_FILE, [], []
    if not path.is_file():
        return {}
    found = read_json(path)
    for module in found if isinstance(found, list) else [found]:
        if not (isinstance(module, dict) and SCHEMAS[MODULES_FILE].keys() <= module.keys()):
            raise ValueError(f'{path}: a module is {repr(module)[:60]}, expected an object with "type" and "path"')
        _check(path, module, SCHEMAS[MODULES_FILE])
        kinds.append(str(module["type"]).rsplit(".", 1)[-1])
        places.append(module["path"])
    if ROUTER in kinds and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():
        kinds = kinds[: kinds.index(ROUTER)]
    if tuple(kinds) not in (MODULES[:2], MODULES):
        found, wanted = ", ".join(kinds).encode("unicode_escape").decode()[:200], ", ".join(MODULES)
        raise ValueError(f"{path}: modules are {found}, expected {wanted} (the last is optional)")
    return dict(zip(kinds, places, strict=False))


def read_config(folder: Path) -> tuple[ModuleType | custom.Family, Any, dict[str, Any]]:
    """The family that config.json names, that family's Config, and the whole file."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE}, so this is not a model folder")
    values = read_fields(path)
    if "model_type" not in values:
        raise ValueError(f"{path}: model_type is missing, expected one of {', '.join(FAMILIES)}")
    if values["model_type"] == custom.MODEL_TYPE:
        with naming(path):
            return *custom.read_family(values), values
    family = FAMILIES[values["model_type"]]
    known = {field.name: field for field in fields(family.Config)}
    _check(path, values, {name: TYPES[field.type] for name, field in known.items()})
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in values]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    with naming(path):
        return family, family.Config(**{name: values[name] for name in known.keys() & values.keys()}), values


def read_tokenizer(folder: Path, config: Any, max_length: int | None) -> Tokenizer:
    """The tokenizer, with `max_length` or, if None, the folder's maximum length, capped at the encoder's positions."""
    settings, limit = read_fields(folder / TRANSFORMER_CONFIG_FILE), config.max_length
    length, lower_case = limit if max_length is None else max_length, settings.get("do_lower_case", False)
    own = read_fields(folder / TOKENIZER_CONFIG_FILE)
    tokenizer = Tokenizer.load(folder, own, max_length=length, lower_case=lower_case)
    if max_length is None:
        folder_length = settings.get("max_seq_length") or own.get("model_max_length") or limit
        with naming(folder):
            tokenizer.max_length = int(min(folder_length, limit))
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if largest >= getattr(config, "vocab_size", math.inf):
        raise ValueError(f"{folder}: token ids reach {largest}, the encoder's vocab_size is {config.vocab_size}")
    return tokenizer


def read_pooling(folder: Path, modules: Mapping[str, str], hidden_size: int) -> Pooling:
    """The pooling module, with its weights if it has any; mean pooling if modules.json lists none."""
    if "Pooling" not in modules:
        return Pooling(("mean",), hidden_size)
    path = folder / modules["Pooling"] / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {CONFIG_FILE}, which says how tokens are pooled")
    values = read_fields(path, POOLING_FOLDER)
    legacy = [mode for mode, key in LEGACY_POOLING_KEYS.items() if values.get(key)] or ["mean"]
    names, weights = values.get("pooling_mode", legacy), path.with_name(WEIGHTS_FILE)
    with naming(path):
        names = [names] if isinstance(names, str) else names
        pooling = Pooling(names, hidden_size, include_prompt=values.get("include_prompt", True))
    if pooling.state_dict():
        with _opened(weights) as file:
            fill(pooling, {name: file.get_tensor(name) for name in file.keys()}, weights)  # noqa: SIM118
    return pooling


def read_encoder(folder: Path, family: Any, config: Any, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """The encoder with its weights, and the checkpoint's other tensors, which are only carried along.
    Raises `ValueError` for a size in config.json that exceeds any tensor's, before building a module, and for
    tensors that are missing, unexpected, or of the wrong shape or type, naming them."""
    path = folder / WEIGHTS_FILE
    with _opened(path) as file:
        names = list(file.keys())
        if isinstance(family, custom.Family):
            tensors = {name: file.get_tensor(name) for name in names}
            with naming(folder):
                for device in ("meta", "cpu"):  # compares shapes before it allocates memory
                    encoder = custom.build(family, config, device)
                    fill(encoder, tensors, WEIGHTS_FILE)
            return encoder.to(dtype), {}
        largest = max((max(file.get_slice(name).get_shape(), default=0) for name in names[:10_000]), default=0)
    for field in fields(config):
        value = getattr(config, field.name)
        limit, what = (len(names), "tensors") if field.name.startswith("num_") else (largest, "rows or columns at most")
        if field.type is int and value > limit:
            found = f"{field.name} is {str(value)[:60]}"
            raise ValueError(f"{folder / CONFIG_FILE}: {found}, but {WEIGHTS_FILE} has {limit} {what}")
    with torch.device("meta"):
        encoder = family.Encoder(config)
    state, carried = _read_state(path, encoder, family)
    encoder.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return encoder, carried


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        found = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".bin", ".pt", ".safetensors"))
        raise ValueError(f"{path.parent}: no {WEIGHTS_FILE} (weights found: {', '.join(found) or 'none'})")
    try:
        with path.open("rb") as file:
            if file.read(8) == b"version ":  # where a safetensors file has the length of its header
                raise ValueError(f"{path}: is a Git LFS pointer, not the weights; download them with `git lfs pull`")
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({' '.join(str(error).split())[:200]})") from None


def _read_state(path: Path, encoder: nn.Module, family: ModuleType) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the encoder's state, the other tensors) of a checkpoint."""
    own, keys = encoder.state_dict(), family.key_map(encoder.config)
    wanted = {name for theirs in keys.values() for name in theirs}
    with _opened(path) as file:
        stored: dict[str, str] = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            new = name.removeprefix(family.PREFIX)
            for old, better in family.RENAMED.items():
                new = new.replace(old, better)
            if new in stored:
                raise ValueError(f"{path}: {new} is stored twice, under this name and an older one")
            stored[new] = name
        faults = [f"missing {name}" for name in sorted(wanted - stored.keys())]
        faults += [f"unexpected {x}" for x in sorted(stored.keys() - wanted) if not x.startswith(family.CARRIED)]
        for ours, theirs in keys.items():
            shape = (own[ours].shape[0] // len(theirs), *own[ours].shape[1:])
            for name in (name for name in theirs if name in stored):
                found = file.get_slice(stored[name])
                if tuple(found.get_shape()) != shape:
                    faults.append(f"{name} has shape {tuple(found.get_shape())}, expected {shape}")
                elif found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    faults.append(f"{name} has type {found.get_dtype()}, expected a floating-point one")
        if faults:
            more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
            lacking = sorted(wanted - stored.keys())
            prefixes = (name.removesuffix(lacking[0]) for name in stored if lacking and name.endswith(lacking[0]))
            prefix = next((text for text in prefixes if stored.keys() >= {text + name for name in lacking}), "")
            hint = f"; all are there with {prefix!r} in front: rename them" if prefix else ""
            raise ValueError(f"{path}: {', '.join(faults[:5])}{more}{hint}")
        tensors = {name: file.get_tensor(stored[name]) for name in stored}
    state = {ours: torch.cat([tensors.pop(name) for name in theirs]) for ours, theirs in keys.items()}
    return state, tensors


def write_folder(folder: Path, embedder: nn.Module) -> None:
    """Writes an `Embedder`; see `Embedder.save`."""
    source, tokenizer, adapter = embedder.source, embedder.tokenizer, embedder.adapter
    # First, because a nonlinear map raises, and so does an encoder that could not be built again.
    dense = {role: part and part.dense() for role in ROLES if adapter for part in [adapter.map_of(role)]}
    config, tensors = _encoder_parts(embedder.encoder, source)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    # transformers loads weights in the dtype that config.json names, so it must match theirs.
    dtype = str(next(embedder.encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**config, "torch_dtype": dtype, "dtype": dtype})
    tokenizer.save(folder)
    settings = {"max_seq_length": tokenizer.max_length, "do_lower_case": tokenizer.lower_case}
    write_json(folder / TRANSFORMER_CONFIG_FILE, settings)
    _write_pooling(folder / POOLING_FOLDER, embedder.pooling, embedder.encoder.config.hidden_size)
    default = source.default_prompt if source and source.default_prompt in embedder.prompts else None
    settings = {"prompts": embedder.prompts, "default_prompt_name": default}
    settings |= {"similarity_fn_name": embedder.similarity, "truncate_dim": embedder.truncate_dim}
    write_json(folder / MODEL_CONFIG_FILE, settings)
    modules = list(MODULES if embedder.normalize else MODULES[:2])
    if adapter is not None:
        adapter.save(folder / ADAPTER_FOLDER, base=embedder.base())
        _write_router(folder / f"{len(modules)}_{ROUTER}", dense)
        modules += [ROUTER, *modules[2:]]
    elif (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():  # left by a model saved here before
        shutil.rmtree(folder / ADAPTER_FOLDER)
    paths = {i: f"{i}_{kind}" if i else "" for i, kind in enumerate(modules)}
    entries = [{"idx": i, "name": str(i), "path": paths[i], "type": MODULE_TYPE + modules[i]} for i in paths]
    write_json(folder / MODULES_FILE, entries)


def _encoder_parts(encoder: nn.Module, source: Source | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the tensors by the names of the checkpoint."""
    family = next((family for family in FAMILIES.values() if type(encoder) is family.Encoder), None)
    if family is None:
        return custom.describe(encoder), encoder.state_dict()
    if source is None or source.family is not family:
        raise ValueError(f"cannot save {type(encoder)}: this Embedder was not loaded from a model folder of its family")
    keys, tensors, config = family.key_map(encoder.config), dict(source.carried), source.config
    if any(config.get(name, value) != value for name, value in vars(encoder.config).items()):
        tensors, config = {}, config | vars(encoder.config)  # the carried tensors fit only the encoder that was loaded
    for ours, parameter in encoder.state_dict().items():
        tensors |= zip(keys[ours], parameter.chunk(len(keys[ours])), strict=True)
    return config, tensors


def _write_pooling(folder: Path, pooling: Pooling, hidden_size: int) -> None:
    config: dict[str, Any] = {key: mode in pooling.names for mode, key in LEGACY_POOLING_KEYS.items()}
    if tuple(mode for mode in LEGACY_POOLING_KEYS if mode in pooling.names) != pooling.names:
        config = {"pooling_mode": pooling.names}  # an order or mode that the old form cannot express
    config |= {"word_embedding_dimension": hidden_size, "include_prompt": pooling.include_prompt}
    write_json(folder / CONFIG_FILE, config)
    if pooling.state_dict():
        write_tensors(folder / WEIGHTS_FILE, pooling.state_dict())
    if not set(pooling.names) <= LEGACY_POOLING_KEYS.keys():
        warnings.warn(f"{folder}: sentence-transformers cannot load {' + '.join(pooling.names)} pooling", stacklevel=4)


def _write_router(folder: Path, dense: dict[str, tuple[Tensor, Tensor | None] | None]) -> None:
    """A Router with a route per role (default: documents), each a Dense module without activation, or empty."""
    structure = {role: [f"{role}_0_Dense"] if layer else [] for role, layer in dense.items()}
    types = {name: MODULE_TYPE + "Dense" for names in structure.values() for name in names}
    for name, (weight, bias) in zip(types, filter(None, dense.values()), strict=True):
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
        write_json(folder / name / CONFIG_FILE, {**sizes, "activation_function": "torch.nn.modules.linear.Identity"})
        tensors = {"linear.weight": weight} if bias is None else {"linear.weight": weight, "linear.bias": bias}
        write_tensors(folder / name / WEIGHTS_FILE, tensors)
    parameters = {"default_route": "document", "allow_empty_key": True}
    write_json(folder / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, atomically."""
    # It cannot hold tensors that share memory, such as those of a module used twice, so all but one are copied.
    owners = {x.untyped_storage().data_ptr(): name for name, x in tensors.items()}.values()
    separate = {k: (x if k in owners else x.clone()).detach().contiguous() for k, x in tensors.items()}
    with atomic_write(path, "wb") as file:
        file.write(save(separate, metadata={"format": "pt"}))
