"""Thousands of seeded faults in model folders of every family: each loads and embeds, or is refused in one line.

The folders have between them all that folders may have: shards, Dense and LayerNorm modules, a Router, static tables.
"""

import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write
from families import write_family
from safetensors.torch import load_file, save_file
from test_properties import is_refused, spoil

from embedft import load_embedder
from embedft.encoders.folder import FAMILIES
from embedft.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
BLOCKS = 4  # pytest-xdist runs them side by side
TEXTS = ["what is a limit order?", "", "word " * 100, "[MASK] é語 [SEP]"]
NUMBERS = [-(10**9), -1, 0, 1, 2, 3, 7, 8, 16, 24, 33, 48, 64, 113, 128, 1000, 10**6, 10**9, 10**12, 2**31, 10**30]
NUMBERS += [10**400, 0.0, 0.5, 1e-320, 1e-300, 1e300, float("inf")]
SECONDS, GIGABYTES = 20, 3  # at most for one folder


def add_modules(folder: Path, *, first: str, routed: bool) -> None:
    """Adds a Dense, a LayerNorm and a Normalize module, or a Router with a Dense for each role."""
    places = {first: ""} if first == "StaticEmbedding" else {first: "", "Pooling": "1_Pooling"}
    places |= {"Router": "2_Router"} if routed else {"Dense": "2_Dense", "LayerNorm": "3_LayerNorm"}
    places |= {"Normalize": "4_Normalize"}
    generator, kind = torch.Generator().manual_seed(0), "sentence_transformers.models."
    for place in ("2_Router/query_0_Dense", "2_Router/document_0_Dense") if routed else ("2_Dense",):
        write(folder / place / "config.json", {"in_features": 32, "out_features": 24, "bias": True})
        tensors = {"linear.weight": torch.randn(24, 32, generator=generator), "linear.bias": torch.ones(24)}
        save_file(tensors, folder / place / "model.safetensors")
    if routed:
        structure = {role: [f"{role}_0_Dense"] for role in ("query", "document")}
        types = {place: f"{kind}Dense" for places in structure.values() for place in places}
        write(folder / "2_Router" / "router_config.json", {"types": types, "structure": structure, "parameters": {}})
    else:
        write(folder / "3_LayerNorm" / "config.json", {"dimension": 24})
        tensors = {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
        save_file(tensors, folder / "3_LayerNorm" / "model.safetensors")
    modules = [{"idx": i, "name": str(i), "path": places[x], "type": kind + x} for i, x in enumerate(places)]
    write(folder / "modules.json", modules)


def write_folders(base: Path) -> list[Path]:
    """A folder of each family, with and without modules, a Router and shards in turn."""
    folders = []
    for i, model_type in enumerate(FAMILIES):
        is_static = model_type == "model2vec"
        options = {"modules": True, "settings": {"prompts": {"query": "q: "}}} if i % 4 else {}
        shards = 0 if i % 3 or is_static else 2
        folders.append(write_family(base / model_type, model_type, shards=shards, **options))
        if i % 4 > 1 or is_static:
            add_modules(folders[-1], first="StaticEmbedding" if is_static else "Transformer", routed=i % 4 == 3)
    return folders


def changed(value: object, values: list, generator: random.Random) -> object:
    """A copy of a JSON value, one of whose innermost parts is one of `values`."""
    if not (isinstance(value, dict | list) and value):
        return generator.choice(values)
    copy = dict(value) if isinstance(value, dict) else list(value)
    place = generator.choice(sorted(copy) if isinstance(copy, dict) else range(len(copy)))
    copy[place] = changed(copy[place], values, generator)
    return copy


def change_setting(path: Path, generator: random.Random) -> None:
    """Another number, or another value that the file has, in a place of a JSON file."""
    settings = read_json(path)
    others = list(settings.values()) if isinstance(settings, dict) else settings
    write(path, changed(settings, [*NUMBERS, *others], generator))


def change_tensors(path: Path, generator: random.Random) -> None:
    """A whole safetensors file, with a tensor that is missing, misnamed, misshapen, or not of finite numbers."""
    tensors = load_file(path)
    name = generator.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed = [
        {},
        {name.replace("e", "a", 1): tensor},
        {name: tensor, f"{name}.more": tensor.clone()},
        {name: tensor[:0]},
        {name: tensor[:-1].clone()},
        {name: tensor[None].clone()},
        {name: tensor.flatten()[0].clone()},
        {name: tensor.to(torch.int32)},
        {name: tensor.to(torch.float8_e4m3fn)},
        {name: tensor.to(torch.bfloat16)},
        {name: torch.full_like(tensor, float("nan"))},
        {name: tensor * 1e38},
        {f"module.{name}": tensor},
    ]
    save_file(tensors | generator.choice(changed), path)


def change(folder: Path, generator: random.Random) -> None:
    """One fault in a file of the folder, most often in one that says what the model is."""
    files, draw = sorted(path for path in folder.rglob("*") if path.is_file()), generator.random()
    if draw < 0.15:
        change_setting(generator.choice([path for path in files if path.suffix == ".json"]), generator)
    elif draw < 0.4:
        own = folder / "config.json"
        inner = [path for path in files if path.name == "config.json" and path != own]
        change_setting(generator.choice(inner) if inner and generator.random() < 0.2 else own, generator)
    elif draw < 0.5:
        change_tensors(generator.choice([path for path in files if path.suffix == ".safetensors"]), generator)
    else:
        spoil(generator.choice(files), generator)


@contextmanager
def limited() -> Iterator[None]:
    """Fails what takes more than `SECONDS`, or `GIGABYTES` on top of what the process has."""

    def stop(*_):
        raise AssertionError(f"took more than {SECONDS} seconds")

    pages, old = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTES * 2**30, old[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def embed(folder: Path) -> None:
    """Loads the model, and checks the vectors it gives."""
    embedder = load_embedder(folder, device="cpu")
    for role in ("query", "document"):
        vectors_ND = embedder.encode(TEXTS, role=role)
        assert vectors_ND.shape == (len(TEXTS), embedder.dim)
        lengths = np.linalg.norm(vectors_ND.astype(np.float64), axis=1)
        assert embedder.similarity == "dot" or np.allclose(lengths[lengths > 0], 1, atol=1e-5), lengths


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_family(tmp_path, block):
    folders, num_refused = write_folders(tmp_path / "base"), 0
    for seed in range(block, 2000, BLOCKS):
        generator, folder = random.Random(seed), tmp_path / f"model-{seed}"
        shutil.copytree(folders[seed // BLOCKS % len(folders)], folder)
        change(folder, generator)
        with limited():
            num_refused += is_refused(lambda folder=folder: embed(folder), str(folder))
        shutil.rmtree(folder)
    assert 150 < num_refused < 550
