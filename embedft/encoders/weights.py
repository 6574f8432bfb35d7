"""Reads and writes the weights of a model folder: safetensors, whole or in shards, by the names of the checkpoint.

    encoder, carried = read_encoder(folder, bert, config, torch.float32)
    write_tensors(folder / WEIGHTS_FILE, checkpoint_tensors(encoder.state_dict(), bert.key_map(config)))

Reading is strict: tensors that are missing, unknown to the encoder family, or of the wrong shape or type are errors
that name them. Nothing is unpickled unless `allow_pickle` says so (pickles.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..files import atomic_write, read_object
from . import custom
from .adapter import fill, naming
from .layers import without_memory
from .pickles import PICKLE_FILE, read_pickle
from .schema import CONFIG_FILE, PLACE, Layers, Rows, Size, stored_names

WEIGHTS_FILE, INDEX_FILE, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
# Our module -> the checkpoint's; or, for several that are stacked along the first dimension, {the checkpoint's: rows}.
Keys = Mapping[str, str | Mapping[str, int]]
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def layer_keys(num_layers: int, ours: str, theirs: str, keys: Keys) -> dict[str, str | dict[str, int]]:
    """The keys of one layer for all: `ours` and `theirs` are what precedes them, with {} for the layer's number."""
    found = {}
    for i in range(num_layers):
        for name, value in keys.items():
            prefix = theirs.format(i)
            stack = prefix + value if isinstance(value, str) else {prefix + x: rows for x, rows in value.items()}
            found[ours.format(i) + name] = stack
    return found


def tensor_keys(state: Mapping[str, Tensor], keys: Keys) -> dict[str, dict[str, int]]:
    """{tensor of an encoder's state: {the checkpoint's: its rows}} from the keys of its modules."""
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        stack, suffix = (keys[name], "") if name in keys else (keys[module], f".{kind}")
        stack = {stack: len(tensor)} if isinstance(stack, str) else stack
        found[name] = {theirs + suffix: rows for theirs, rows in stack.items()}
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name has the parts of `pattern` in a row: "layers.1" names "layers.1.qkv", not "layers.12"."""
    return f".{pattern}." in f".{name}."


def checkpoint_tensors(state: Mapping[str, Tensor], keys: Keys) -> dict[str, Tensor]:
    """The tensors of an encoder's state, or their gradients, by the names of the checkpoint."""
    tensors = {}
    for ours, stack in tensor_keys(state, keys).items():
        tensors |= zip(stack, state[ours].split(list(stack.values())), strict=True)
    return tensors


@contextmanager
def opened(folder: Path, *, allow_pickle: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file that lists the folder's tensors, and {name of a tensor: the open file that holds it}."""
    path, index, pickled = folder / WEIGHTS_FILE, folder / INDEX_FILE, folder / PICKLE_FILE
    if not path.is_file() and not index.is_file():
        if allow_pickle and pickled.is_file():
            _check_no_pointer(pickled)
            file = read_pickle(pickled)
            yield pickled, dict.fromkeys(file.keys(), file)
            return
        files = folder.iterdir() if folder.is_dir() else ()
        found = sorted(file.name for file in files if file.suffix in (".bin", ".pt", ".safetensors"))
        way = "" if allow_pickle else f"; {PICKLE_FILE} is read only with allow_pickle"
        raise ValueError(f"{folder}: no {WEIGHTS_FILE} (weights found: {', '.join(found) or 'none'}){way}")
    with ExitStack() as stack:
        if path.is_file():
            file = stack.enter_context(_opened_file(path))
            yield path, dict.fromkeys(file.keys(), file)
            return
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(map(PLACE[1], shards.values())):
            raise ValueError(f"{index}: weight_map is {repr(shards)[:60]}, expected an object of files in this folder")
        files = {name: stack.enter_context(_opened_file(folder / name)) for name in sorted(set(shards.values()))}
        held = {name: set(file.keys()) for name, file in files.items()}
        if lost := [f"{name} is not in {shard}" for name, shard in shards.items() if name not in held[shard]]:
            raise ValueError(f"{index}: {lost[0]}")
        yield index, {name: files[shard] for name, shard in shards.items()}


@contextmanager
def _opened_file(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, which {INDEX_FILE} lists")
    try:
        _check_no_pointer(path)
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({' '.join(str(error).split())[:200]})") from None


def _check_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(8) == b"version ":  # where a safetensors file has the length of its header
            raise ValueError(f"{path}: is a Git LFS pointer, not the weights; download them with `git lfs pull`")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    with opened(folder) as (_, files):
        return {name: file.get_tensor(name) for name, file in files.items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}")
    with _opened_file(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def read_encoder(
    folder: Path,
    family: Any,
    config: Any,
    dtype: torch.dtype,
    *,
    carried: tuple[str, ...] = (),
    allow_pickle: bool = False,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The encoder with its weights, and the checkpoint's other tensors, which are only carried along.
    `carried`: beginnings of the names of tensors that may be there besides the family's CARRIED.
    Raises `ValueError` for a size in config.json that exceeds any tensor's, before building a module, and for
    tensors that are missing, unexpected, or of the wrong shape or type, naming them."""
    if isinstance(family, custom.Family):
        tensors = read_tensors(folder)
        with naming(folder):
            for device in ("meta", "cpu"):  # compares shapes before it allocates memory
                encoder = custom.build(family, config, device)
                fill(encoder, tensors, WEIGHTS_FILE)
        return encoder.to(dtype), {}
    with opened(folder, allow_pickle=allow_pickle) as (path, files):
        check_sizes(folder / CONFIG_FILE, config, files, path.name)
        with without_memory():
            encoder = family.Encoder(config)
        names = _read_names(path, files, encoder, family, (*family.CARRIED, *carried))
        keys = tensor_keys(encoder.state_dict(), family.key_map(config))
        tensors = {name: files[stored].get_tensor(stored) for name, stored in names.items()}
    state = {ours: torch.cat([tensors.pop(name).to(dtype) for name in stack]) for ours, stack in keys.items()}
    encoder.load_state_dict(state, assign=True)
    return encoder, tensors


def check_sizes(path: Path, config: Any, files: Mapping[str, Any], listed: str) -> None:
    """Raises `ValueError` naming a field of `path` that no tensor bears out."""
    shapes = (file.get_slice(name).get_shape() for name, file in list(files.items())[:10_000])
    largest = max((max(shape, default=0) for shape in shapes), default=0)
    limits = {
        **dict.fromkeys((Size, Size | None, Rows), (largest, "rows or columns at most")),
        Layers: (len(files), "tensors"),
    }
    for field in fields(config):
        limit, what = limits.get(field.type, (0, ""))
        if what and (value := getattr(config, field.name) or 0) > limit:
            name = stored_names(type(config), read_object(path))[field.name]
            raise ValueError(f"{path}: {name} is {str(value)[:60]}, but {listed} has {limit} {what}")


def _read_names(
    path: Path, files: Mapping[str, Any], encoder: nn.Module, family: ModuleType, carried: tuple[str, ...]
) -> dict[str, str]:
    """{name of a tensor, without a prefix and in the newer form: its name in the file}, having checked them all."""
    state = encoder.state_dict()
    keys = tensor_keys(state, family.key_map(encoder.config))
    wanted = {name for stack in keys.values() for name in stack}
    prefix, stored = _prefix(files, wanted), {}
    for name in files:
        new = _without_prefix(name, prefix)
        for old, better in OLD_NAMES.items():
            new = new.replace(old, better)
        if new in stored:
            raise ValueError(f"{path}: {new} is stored twice, as {stored[new]} and as {name}")
        stored[new] = name
    faults = [f"missing {name}" for name in sorted(wanted - stored.keys())]
    faults += [f"unexpected {x}" for x in sorted(stored.keys() - wanted) if not x.startswith(carried)]
    for ours, stack in keys.items():
        for name, rows in stack.items():
            if name not in stored:
                continue
            found, expected = files[stored[name]].get_slice(stored[name]), (rows, *state[ours].shape[1:])
            if tuple(found.get_shape()) != expected:
                faults.append(f"{name} has shape {tuple(found.get_shape())}, expected {expected}")
            elif found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                faults.append(f"{name} has type {found.get_dtype()}, expected a floating-point one")
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path}: {', '.join(faults[:5])}{more}")
    return stored


def _prefix(names: Iterable[str], wanted: set[str]) -> str:
    """What precedes the encoder's tensors in a checkpoint that has more, such as "bert." or "model.": the prefix under
    which most of the wanted names are there; "" among equals."""
    stored = set(names)
    for old, better in OLD_NAMES.items():
        stored = {name.replace(old, better) for name in stored}
    first = min(wanted)
    prefixes = {"", *(name.removesuffix(first) for name in stored if name.endswith("." + first))}
    return max(sorted(prefixes), key=lambda prefix: sum(prefix + name in stored for name in wanted))


def _without_prefix(name: str, prefix: str) -> str:
    """Heads have only the first words of the encoder's prefix: "module." beside "module.bert."."""
    while not name.startswith(prefix):
        prefix = prefix[: prefix.rfind(".", 0, -1) + 1]
    return name.removeprefix(prefix)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, atomically."""
    # It cannot hold tensors that share memory, such as those of a module used twice, so all but one are copied.
    owners = {x.untyped_storage().data_ptr(): name for name, x in tensors.items()}.values()
    separate = {k: (x if k in owners else x.clone()).detach().contiguous() for k, x in tensors.items()}
    with atomic_write(path, "wb") as file:
        file.write(save(separate, metadata={"format": "pt"}))
