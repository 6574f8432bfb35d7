"""Reads and writes a model folder: its configuration, tokenizer, and sentence-transformers' module files.

The weights are read by weights.py; schema.py has what each JSON file may hold. Reading is strict: a field of the wrong
type, and anything missing or unknown, is an error that names it. Files are written atomically, in the format of
sentence-transformers before version 6.
"""

import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..files import read_json, write_json
from . import (
    bert,
    custom,
    distilbert,
    electra,
    gemma3,
    gte,
    llama,
    mistral,
    modernbert,
    mpnet,
    nomic_bert,
    qwen3,
    roberta,
)
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import FORMATS, ROLES, fill, naming
from .pooling import Pooling
from .schema import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    LEGACY_POOLING_KEYS,
    MODEL_CONFIG_FILE,
    MODULES_FILE,
    POOLING_FOLDER,
    SCHEMAS,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TRANSFORMER_CONFIG_FILE,
    check,
    read_dataclass,
    read_fields,
    stored_names,
)
from .tokenization import TOKENIZER_FILE, Tokenizer
from .weights import INDEX_FILE, SHARDS, WEIGHTS_FILE, checkpoint_tensors, read_tensors, write_tensors

# By `model_type` of config.json. A family's module has Config, Encoder, key_map and CARRIED.
FAMILIES: dict[str, ModuleType] = {
    "bert": bert,
    "roberta": roberta,
    "camembert": roberta,
    "xlm-roberta": roberta,
    "distilbert": distilbert,
    "electra": electra,
    "mpnet": mpnet,
    "qwen3": qwen3,
    "llama": llama,
    "mistral": mistral,
    "gemma3_text": gemma3,
    "nomic_bert": nomic_bert,
    "new": gte,
    "gte": gte,
    "modernbert": modernbert,
}
# The modules of modules.json that are supported, by class name and in this order.
MODULES, MODULE_TYPE = ("Transformer", "Pooling", "Normalize"), "sentence_transformers.models."
# An adapter may follow, saved twice: as our own files, and as a Router with routes for queries and documents.
ADAPTER_FOLDER, ROUTER = "adapter", "Router"
# The only files ever downloaded: weights in safetensors, and small JSON files.
HUB_FILES = [WEIGHTS_FILE, CONFIG_FILE, MODULES_FILE, TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE, TOKENIZER_FILE]
HUB_FILES += [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, INDEX_FILE, SHARDS]
HUB_FILES += [f"{ADAPTER_FOLDER}/{name}" for name in FORMATS["embedft"]]
HUB_FILES += [f"{place}/{name}" for place in ("0_*", "*_Pooling") for name in ("*.json", WEIGHTS_FILE)]


class Source(NamedTuple):
    """Where an Embedder came from, and what `save` writes back unchanged."""

    name: str
    folder: Path
    family: ModuleType | custom.Family
    config: dict[str, Any]  # config.json
    carried: dict[str, Tensor]  # tensors of the checkpoint that the encoder does not use
    default_prompt: str | None  # for sentence-transformers' plain `encode`; here every text has a role


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
        check(path, module, SCHEMAS[MODULES_FILE])
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
    kind = values.get("model_type")
    if kind == custom.MODEL_TYPE:
        with naming(path):
            return *custom.read_family(values), values
    if kind not in FAMILIES:
        found = "missing" if kind is None else repr(kind)[:60]
        raise ValueError(f"{path}: model_type is {found}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    return family, read_dataclass(path, values, family.Config), values


def read_tokenizer(folder: Path, config: Any, max_length: int | None) -> Tokenizer:
    """The tokenizer, with `max_length` or, if None, the folder's maximum length, capped at the encoder's positions."""
    settings, limit = read_fields(folder / TRANSFORMER_CONFIG_FILE), config.max_length
    length, lower_case = limit if max_length is None else max_length, settings.get("do_lower_case", False)
    own = read_fields(folder / TOKENIZER_CONFIG_FILE)
    options = {"lower_case": lower_case, "model_type": read_fields(folder / CONFIG_FILE).get("model_type")}
    tokenizer = Tokenizer.load(folder, own, max_length=length, **options)
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
    names = values.get("pooling_mode", legacy)
    with naming(path):
        names = [names] if isinstance(names, str) else names
        pooling = Pooling(names, hidden_size, include_prompt=values.get("include_prompt", True))
    if pooling.state_dict():
        fill(pooling, read_tensors(path.parent), path.with_name(WEIGHTS_FILE))
    return pooling


def write_folder(folder: Path, embedder: nn.Module) -> None:
    """Writes an `Embedder`; see `Embedder.save`."""
    source, tokenizer, adapter = embedder.source, embedder.tokenizer, embedder.adapter
    # First, because a nonlinear map raises, and so does an encoder that could not be built again.
    dense = {role: part and part.dense() for role in ROLES if adapter for part in [adapter.map_of(role)]}
    config, tensors = encoder_parts(embedder.encoder, source)
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


def encoder_parts(encoder: nn.Module, source: Source | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the tensors by the names of the checkpoint."""
    family = next((family for family in FAMILIES.values() if type(encoder) is family.Encoder), None)
    if family is None:
        return custom.describe(encoder), encoder.state_dict()
    if source is None or source.family is not family:
        raise ValueError(f"cannot save {type(encoder)}: this Embedder was not loaded from a model folder of its family")
    carried, config = source.carried, source.config
    names = stored_names(family.Config, config)
    current = {names[name]: value for name, value in vars(encoder.config).items()}
    if any(config.get(name, value) != value for name, value in current.items()):
        carried, config = {}, config | current  # the carried tensors fit only the encoder that was loaded
    return config, carried | checkpoint_tensors(encoder.state_dict(), family.key_map(encoder.config))


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
