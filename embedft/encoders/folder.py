"""The files of a model folder: config.json, model.safetensors, the tokenizer, sentence-transformers' module files.

Reading is strict: a field of the wrong type, or anything the encoder family does not know or misses, is an error that
names it. Nothing is unpickled. Not here: where a folder comes from (loading.py); writing (saving.py).
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from ..files import read_json, read_object
from . import bert
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .pooling import Pooling
from .tokenization import TOKENIZER_CONFIG_FILE, Tokenizer

CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE = "config.json", "model.safetensors", "modules.json"
TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
# The modules of modules.json that are understood, by class name and in this order.
MODULES = ("Transformer", "Pooling", "Normalize")
POOLING_FOLDER = "1_Pooling"
# An adapter may follow: as our own files, and as a Router whose routes are queries and documents.
ADAPTER_FOLDER, ROUTER = "adapter", "Router"

# Pooling mode -> its key in 1_Pooling/config.json of sentence-transformers before 6.
LEGACY_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def _is_text(value: Any) -> bool:
    """A string without half a surrogate pair, which JSON can spell and no tokenizer takes."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(text is None or _is_text(text) for text in value.values())


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


# The fields that are read: {field: (what it should be, whether a value is that)}. null stands for an absent field.
BOOL = ("true or false", lambda value: isinstance(value, bool))
TEXT = ("a string", lambda value: isinstance(value, str))
LENGTH = ("a number of tokens", lambda value: type(value) in (int, float) and value >= 1)
SCHEMA = {
    CONFIG_FILE: {"model_type": TEXT, "dtype": TEXT, "torch_dtype": TEXT},
    POOLING_FOLDER: {
        "pooling_mode": ("a name or a list of names", _is_names),
        "include_prompt": BOOL,
        **dict.fromkeys(LEGACY_POOLING_KEYS.values(), BOOL),
    },
    TRANSFORMER_CONFIG_FILE: {"max_seq_length": LENGTH, "do_lower_case": BOOL},
    MODEL_CONFIG_FILE: {
        "prompts": ("an object of strings", _is_texts),
        "default_prompt_name": TEXT,
        "similarity_fn_name": TEXT,
        "truncate_dim": ("a whole number", lambda value: type(value) is int),
    },
    TOKENIZER_CONFIG_FILE: {
        "model_max_length": LENGTH,
        "truncation_side": ("left or right", lambda value: value in ("left", "right")),
        "tokenizer_class": TEXT,
        **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), BOOL),
        "added_tokens_decoder": ("an object", lambda value: isinstance(value, dict)),
        "additional_special_tokens": ("a list", lambda value: isinstance(value, list)),
        "extra_special_tokens": ("a list or an object", lambda value: isinstance(value, list | dict)),
    },
}


class Family(NamedTuple):
    """What loading needs to know about an encoder family; the values are in the family's own file."""

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
    """Where an Embedder came from, and what goes back into its folder unchanged."""

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]  # config.json
    carried: dict[str, Tensor]  # tensors of the checkpoint that the encoder does not use
    default_prompt: str | None  # for sentence-transformers' plain `encode`; here every text has a role


@contextmanager
def naming(path: Path):
    """Puts the file in front of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_fields(path: Path, schema: str | None = None) -> dict[str, Any]:
    """The object in a JSON file without its nulls; {} if there is none. Raises `ValueError` naming a bad field."""
    values = {key: value for key, value in read_object(path).items() if value is not None} if path.is_file() else {}
    for field, (expected, is_right) in SCHEMA[schema or path.name].items():
        if field in values and not is_right(values[field]):
            raise ValueError(f"{path}: {field} is {repr(values[field])[:60]}, expected {expected}")
    return values


def read_modules(folder: Path) -> dict[str, str]:
    """{module's class name: its subfolder} of modules.json; {} for a Hugging Face folder, which has none.

    A Router and what follows it are left out if they are those of an adapter, which is read from its own folder.
    """
    path, modules = folder / MODULES_FILE, {}
    if not path.is_file():
        return {}
    found = read_json(path)
    for module in found if isinstance(found, list) else [found]:
        kind, place = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not (isinstance(kind, str) and isinstance(place, str)):
            raise ValueError(f'{path}: a module is {repr(module)[:60]}, expected an object with "type" and "path"')
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\0" in place:
            raise ValueError(f"{path}: path is {place[:60]!r}, expected one inside the folder")
        kind = kind.rsplit(".", 1)[-1]
        if kind == ROUTER and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():
            break
        if kind in modules:
            raise ValueError(f"{path}: two modules are a {kind[:60]}, expected one")
        modules[kind] = place
    if tuple(modules) not in (MODULES[:2], MODULES):
        found, wanted = ", ".join(modules).encode("unicode_escape").decode()[:200], ", ".join(MODULES)
        raise ValueError(f"{path}: modules are {found}, expected {wanted} (the last is optional)")
    return modules


def read_pooling(folder: Path, hidden_size: int) -> Pooling:
    """The pooling in a folder, with its weights if it has any."""
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE}, which says how tokens are pooled")
    values = read_fields(path, POOLING_FOLDER)
    legacy = [mode for mode, key in LEGACY_POOLING_KEYS.items() if values.get(key)] or ["mean"]
    names = values.get("pooling_mode", legacy)
    with naming(path):
        names = [names] if isinstance(names, str) else names
        pooling = Pooling(names, hidden_size, include_prompt=values.get("include_prompt", True))
    if pooling.state_dict():
        expected = {name: (name,) for name in pooling.state_dict()}
        pooling.load_state_dict(_read_state(weights, pooling, expected, lambda name: name, ())[0])
    return pooling


def read_config(folder: Path) -> tuple[Family, Any, dict[str, Any]]:
    """The family that config.json names, the family's own configuration, and the whole file."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE}, so this is not a model folder")
    values = read_fields(path)
    family = FAMILIES.get(values.get("model_type"))
    if family is None:
        found = values.get("model_type") and values["model_type"][:60]
        raise ValueError(f"{path}: model_type is {found!r}, expected one of {', '.join(FAMILIES)}")
    with naming(path):
        return family, family.config(values), values


def load_tokenizer(folder: Path, config: Any, max_length: int | None) -> Tokenizer:
    """The tokenizer, with the maximum length asked for, else the folder's, but no more than the encoder's positions."""
    settings, limit = read_fields(folder / TRANSFORMER_CONFIG_FILE), config.max_length
    tokenizer = Tokenizer.load(
        folder,
        read_fields(folder / TOKENIZER_CONFIG_FILE),
        max_length=limit if max_length is None else max_length,
        lower_case=settings.get("do_lower_case", False),
    )
    if max_length is None:
        folder_length = settings.get("max_seq_length") or tokenizer.config.get("model_max_length") or limit
        with naming(folder):
            tokenizer.max_length = int(min(folder_length, limit))
    if tokenizer.largest_id >= config.vocab_size:
        ids = f"ids up to {tokenizer.largest_id}, the encoder's vocab_size is {config.vocab_size}"
        raise ValueError(f"{folder}: the tokenizer gives {ids}")
    return tokenizer


def check_sizes(folder: Path, config: Any) -> None:
    """Raises `ValueError` for a size in config.json that no tensor of the checkpoint has, before a module is built."""
    with _opened(folder / WEIGHTS_FILE) as file:
        names = list(file.keys())
        largest = max((max(file.get_slice(name).get_shape(), default=0) for name in names[:10_000]), default=0)
    for field in fields(config):
        value = getattr(config, field.name)
        limit, what = (len(names), "tensors") if field.name.startswith("num_") else (largest, "rows or columns at most")
        if field.type is int and value > limit:
            where = f"{WEIGHTS_FILE} has {limit} {what}"
            raise ValueError(f"{folder / CONFIG_FILE}: {field.name} is {str(value)[:60]}, but {where}")


@contextmanager
def _opened(path: Path):
    """A safetensors file, without reading its tensors."""
    if not path.is_file():
        found = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".bin", ".pt", ".safetensors"))
        raise ValueError(f"{path.parent}: no {WEIGHTS_FILE} (weights found: {', '.join(found) or 'none'})")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({' '.join(str(error).split())[:200]})") from None


def load_weights(encoder: nn.Module, path: Path, family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fills an encoder (on the meta device) from a safetensors file; returns the tensors that it only carries along.

    Raises `ValueError` naming the keys that are missing, unexpected, or of the wrong shape or type.
    """

    def rename(name: str) -> str:
        name = name.removeprefix(family.prefix)
        for old, new in family.renamed.items():
            name = name.replace(old, new)
        return name

    state, carried = _read_state(path, encoder, family.key_map(encoder.config), rename, family.carried)
    encoder.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return carried


def _read_state(
    path: Path,
    module: nn.Module,
    keys: Mapping[str, tuple[str, ...]],
    rename: Callable[[str], str],
    carried: tuple[str, ...],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the state of a module, the tensors carried along) from a file; `keys`: ours -> the file's, stacked in order."""
    own, wanted = module.state_dict(), {name for theirs in keys.values() for name in theirs}
    with _opened(path) as file:
        stored: dict[str, str] = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if rename(name) in stored:
                raise ValueError(f"{path}: {rename(name)} is there twice, under this name and an older one")
            stored[rename(name)] = name
        extra = sorted(name for name in stored.keys() - wanted if not (carried and name.startswith(carried)))
        faults = [f"missing {name}" for name in sorted(wanted - stored.keys())]
        faults += [f"unexpected {name}" for name in extra]
        for ours, theirs in keys.items():
            shape = (own[ours].shape[0] // len(theirs), *own[ours].shape[1:])
            for name in theirs if not extra else ():
                found = file.get_slice(stored[name]) if name in stored else None
                if found and tuple(found.get_shape()) != shape:
                    faults.append(f"{name} has shape {tuple(found.get_shape())}, expected {shape}")
                elif found and found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    faults.append(f"{name} has type {found.get_dtype()}, expected a floating-point one")
        if faults:
            more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ValueError(f"{path}: {', '.join(faults[:5])}{more}")
        tensors = {name: file.get_tensor(stored[name]) for name in stored}
    state = {ours: torch.cat([tensors.pop(name) for name in theirs]) for ours, theirs in keys.items()}
    return state, tensors
