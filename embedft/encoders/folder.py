"""Reads and writes a model folder: its configuration, tokenizer, and sentence-transformers' module files.

The weights are read by weights.py; schema.py has what each JSON file may hold. Reading is strict: a field of the wrong
type, and anything missing or unknown, is an error that names it. A model is written whole or not at all, in the
format of sentence-transformers before version 6.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files import replace_files, write_json
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
    static,
)
from .adapter import FORMATS, ROLES, fill, naming
from .dtypes import check_trains
from .head import PARTS, dense_of, read_part, width, write_part
from .modules import (
    ADAPTER_FOLDER,
    POOLING,
    ROUTER_CONFIG_FILE,
    ROUTERS,
    STATIC,
    TRANSFORMER,
    Module,
    Routes,
    write_modules,
    write_routes,
)
from .pickles import PICKLE_FILE
from .pooling import Pooling
from .schema import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    LEGACY_POOLING_KEYS,
    LORA_FILES,
    MODEL_CONFIG_FILE,
    MODULES_FILE,
    POOLING_FOLDER,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TRANSFORMER_CONFIG_FILE,
    read_dataclass,
    read_fields,
    stored_names,
)
from .tokenization import TOKENIZER_FILE, Tokenizer
from .weights import INDEX_FILE, SHARDS, WEIGHTS_FILE, Keys, checkpoint_tensors, read_tensors, write_tensors

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
    static.MODEL_TYPE: static,
}
NORMALIZE, ROUTER = "Normalize", ROUTERS[0]
# The only files ever downloaded: weights in safetensors, and small JSON files. Here * stands for folders too.
HUB_FILES = [WEIGHTS_FILE, CONFIG_FILE, MODULES_FILE, TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE, TOKENIZER_FILE]
HUB_FILES += [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, INDEX_FILE, SHARDS]
HUB_FILES += LORA_FILES
HUB_FILES += [f"{ADAPTER_FOLDER}/{name}" for name in FORMATS["embedft"]]
PLACES = ["0_*", *(f"*_{kind}" for kind in (TRANSFORMER, POOLING, STATIC, *ROUTERS, *PARTS))]
HUB_FILES += [ROUTER_CONFIG_FILE, *(f"{place}/{name}" for place in PLACES for name in ("*.json", WEIGHTS_FILE))]
# With `allow_pickle`, these too.
HUB_PICKLES = [PICKLE_FILE, *(f"{place}/{PICKLE_FILE}" for place in PLACES)]


class Source(NamedTuple):
    """Where an Embedder came from, and what `save` writes back unchanged."""

    name: str
    folder: Path
    family: ModuleType | custom.Family
    config: dict[str, Any]  # config.json
    carried: dict[str, Tensor]  # tensors of the checkpoint that the encoder does not use
    default_prompt: str | None  # for sentence-transformers' plain `encode`; here every text has a role


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
    check_ids(folder, tokenizer, getattr(config, "vocab_size", math.inf))
    return tokenizer


def read_static_tokenizer(folder: Path, max_length: int | None) -> Tokenizer:
    """The tokenizer of static embeddings, which add no special tokens, as tokenizer.json has it."""
    tokenizer = Tokenizer.load_bare(folder, max_length=static.Config.max_length)
    if max_length is not None:
        tokenizer.max_length = max_length
    return tokenizer


def check_ids(folder: Path, tokenizer: Tokenizer, vocab_size: float) -> None:
    """Raises `ValueError` for a tokenizer with ids that the encoder has no vector for."""
    # The post-processor may add what the vocabulary does not have.
    ids = *tokenizer.backend.get_vocab(with_added_tokens=True).values(), *tokenizer.backend.encode("").ids
    largest = max(ids)
    if largest >= vocab_size:
        raise ValueError(f"{folder}: token ids reach {largest}, the encoder's vocab_size is {vocab_size}")


def read_pooling(folder: Path | None, hidden_size: int) -> Pooling:
    """The pooling module in a folder, with its weights if it has any; None: mean pooling."""
    if folder is None:
        return Pooling(("mean",), hidden_size)
    path = folder / CONFIG_FILE
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


def read_heads(
    modules: Mapping[str, Sequence[Module]], in_features: Mapping[str, int], dtype: torch.dtype, *, allow_pickle: bool
) -> tuple[dict[str, nn.Sequential], bool]:
    """{role: what follows pooling}, and whether a Normalize comes last, which is left out. `modules` and `in_features`
    are those of each role; a module of both is read once."""
    normalize = all(sequence and sequence[-1].kind == NORMALIZE for sequence in modules.values())
    parts: dict[tuple[Module, int], nn.Module] = {}
    heads: dict[str, nn.Sequential] = {}
    for role, sequence in modules.items():
        heads[role] = nn.Sequential()
        for module in sequence[: len(sequence) - normalize]:
            features = width(heads[role], in_features[role])
            if (module, features) not in parts:
                part = read_part(*module, in_features=features, dtype=dtype, allow_pickle=allow_pickle)
                parts[module, features] = part
            heads[role].append(parts[module, features])
    if len({tuple(map(id, head)) for head in heads.values()}) == 1:
        heads = dict.fromkeys(heads, heads[ROLES[0]])
    return heads, normalize


def write_folder(folder: Path, embedder: nn.Module, write_more: Callable[[Path], object]) -> None:
    """Writes an `Embedder`; see `Embedder.save`. `write_more` adds files to the folder that it is given."""
    check_trains(embedder)
    if embedder.lora is not None and not embedder.lora.config.merges:
        embedder.lora.check_folder(folder)
    # What a model saved here before had, and this one may not.
    stale = [*LORA_FILES, *(f"{ADAPTER_FOLDER}/{name}" for name in FORMATS["embedft"])]
    with replace_files(folder, stale=stale) as new:
        _write_files(new, embedder)
        write_more(new)


def _write_files(folder: Path, embedder: nn.Module) -> None:
    source, adapter, sides = embedder.source, embedder.adapter, {role: embedder.side(role) for role in ROLES}
    # First what may raise: a nonlinear map, and an encoder that could not be built again.
    dense = {role: part and part.dense() for role in ROLES if adapter for part in [adapter.map_of(role)]}
    encoders = {side: encoder_parts(side.encoder, side.source, side.lora) for side in sides.values()}
    default = source.default_prompt if source and source.default_prompt in embedder.prompts else None
    settings = {"prompts": embedder.prompts, "default_prompt_name": default}
    settings |= {"similarity_fn_name": embedder.similarity, "truncate_dim": embedder.truncate_dim}
    write_json(folder / MODEL_CONFIG_FILE, settings)
    heads = {role: list(side.heads[role]) for role, side in sides.items()}
    modules: list[tuple[str, str]] = []
    if len(encoders) == 1:
        modules = [(kind, f"{i}_{kind}" if i else "") for i, kind in enumerate(_base_kinds(embedder))]
        _write_base(folder, modules, embedder, *encoders[embedder])
    else:
        routes = {}
        for role, side in sides.items():
            routes[role] = [(kind, f"{role}_{i}_{kind}") for i, kind in enumerate(_base_kinds(side))]
            _write_base(folder, routes[role], side, *encoders[side])
        modules = [(ROUTER, "")]
        _write_router(folder, heads, routes)
        heads = {}
    if heads and len({tuple(map(id, head)) for head in heads.values()}) == 1:
        for part in heads[ROLES[0]]:
            modules.append((type(part).__name__, f"{len(modules)}_{type(part).__name__}"))
            write_part(folder / modules[-1][1], part)
    elif heads:
        modules.append((ROUTER, f"{len(modules)}_{ROUTER}"))
        _write_router(folder / modules[-1][1], heads)
    last = [NORMALIZE] if embedder.normalize else []
    modules += [(kind, f"{len(modules)}_{kind}") for kind in last]
    if adapter is not None:
        adapter.save(folder / ADAPTER_FOLDER, base=embedder.base())
        modules.append((ROUTER, f"{len(modules)}_{ROUTER}"))
        _write_router(
            folder / modules[-1][1], {role: [dense_of(*map_)] if map_ else [] for role, map_ in dense.items()}
        )
        modules += [(kind, f"{len(modules)}_{kind}") for kind in last]
    write_modules(folder, modules)


def _base_kinds(side: nn.Module) -> list[str]:
    if not isinstance(side.encoder, static.Encoder):
        return [TRANSFORMER, POOLING]
    if side.pooling.names != ("mean",):
        raise ValueError(f"pooling is {', '.join(side.pooling.names)}, static embeddings can be saved with mean alone")
    return [STATIC]


def _write_base(
    folder: Path, modules: list[tuple[str, str]], side: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """The encoder with its tokenizer, and its pooling if it has one. `modules`: (class name, subfolder) of each."""
    first = folder / modules[0][1]
    if side.lora is not None and not side.lora.config.merges:
        side.lora.save(first, side.encoder)  # instead of weights: loading starts from the base, which it names
    else:
        write_tensors(first / WEIGHTS_FILE, tensors)
        # transformers loads weights in the dtype that config.json names, so it must match theirs.
        dtype = str(next(side.encoder.parameters()).dtype).removeprefix("torch.")
        write_json(first / CONFIG_FILE, {**config, "torch_dtype": dtype, "dtype": dtype})
    side.tokenizer.save(first)
    settings = {"max_seq_length": side.tokenizer.max_length, "do_lower_case": side.tokenizer.lower_case}
    write_json(first / TRANSFORMER_CONFIG_FILE, settings)
    for _, place in modules[1:]:
        _write_pooling(folder / place, side.pooling, side.encoder.config.hidden_size)


def family_of(encoder: nn.Module) -> ModuleType | None:
    """The family in FAMILIES that an encoder belongs to; None for a class of your own."""
    return next((family for family in FAMILIES.values() if type(encoder) is family.Encoder), None)


def encoder_keys(encoder: nn.Module) -> Keys:
    """The key map of an encoder; {} for a class of your own, whose checkpoints have its own names."""
    family = family_of(encoder)
    return {} if family is None else family.key_map(encoder.config)


def encoder_parts(
    encoder: nn.Module, source: Source | None, lora: nn.Module | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the tensors by the names of the checkpoint, with the updates of `lora` if they are merged."""
    state = lora.merged(encoder) if lora is not None and lora.config.merges else encoder.state_dict()
    family = family_of(encoder)
    if family is None:
        return custom.describe(encoder), state
    if source is None or source.family is not family:
        raise ValueError(f"cannot save {type(encoder)}: this Embedder was not loaded from a model folder of its family")
    carried, config = source.carried, source.config
    names = stored_names(family.Config, config)
    current = {names[name]: value for name, value in vars(encoder.config).items()}
    if any(config.get(name, value) != value for name, value in current.items()):
        carried, config = {}, config | current  # the carried tensors fit only the encoder that was loaded
    # transformers does not know the names under which some fields were published, so its own are written beside them.
    aliases = {
        published: ours for published, ours in getattr(family.Config, "aliases", {}).items() if published in config
    }
    both = {name: getattr(encoder.config, ours) for published, ours in aliases.items() for name in (published, ours)}
    return config | both, carried | checkpoint_tensors(state, family.key_map(encoder.config))


def _write_pooling(folder: Path, pooling: Pooling, hidden_size: int) -> None:
    config: dict[str, Any] = {key: mode in pooling.names for mode, key in LEGACY_POOLING_KEYS.items()}
    if tuple(mode for mode in LEGACY_POOLING_KEYS if mode in pooling.names) != pooling.names:
        config = {"pooling_mode": pooling.names}  # an order or mode that the old form cannot express
    config |= {"word_embedding_dimension": hidden_size, "include_prompt": pooling.include_prompt}
    write_json(folder / CONFIG_FILE, config)
    if pooling.state_dict():
        write_tensors(folder / WEIGHTS_FILE, pooling.state_dict())
    if not set(pooling.names) <= LEGACY_POOLING_KEYS.keys():
        what = f"sentence-transformers cannot load {' + '.join(pooling.names)} pooling"
        warnings.warn(f"{folder.name}: {what}", stacklevel=6)


def _write_router(folder: Path, heads: dict[str, list[nn.Module]], routes: Routes | None = None) -> None:
    """A Router with a route for each role: `routes`, which are written already, and then the parts of its head."""
    places: dict[int, tuple[str, str]] = {}
    routes = {role: list(route) for role, route in (routes or {role: [] for role in heads}).items()}
    for role, head in heads.items():
        for part in head:
            if id(part) not in places:
                kind = type(part).__name__
                places[id(part)] = kind, f"{role}_{len(routes[role])}_{kind}"
                write_part(folder / places[id(part)][1], part)
            routes[role].append(places[id(part)])
    write_routes(folder, routes)
