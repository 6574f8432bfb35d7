"""One hash over everything that vectors depend on besides their text: weights, settings, precision and source code.

fingerprint([embedder.encoder, embedder.pooling], {"max_length": 256})      # "3f0c..."
"""

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..objects import describe_object, source, split_object
from .packing import pack
from .tokenization import Tokenizer

# Per module: what its tensors looked like when they were last hashed, and the hash.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[bytes, str]] = weakref.WeakKeyDictionary()


def fingerprint(
    modules: list[nn.Module], settings: dict[str, Any], *, functions: Iterable[Callable] = (), library: bool = True
) -> str:
    """A SHA-256 over the modules' weights, the settings (their `repr`), and the code of the modules and functions.
    `library`: include embedft's own code; False: only other code, so that the hash survives an upgrade."""
    sources: dict[str, str] = {}
    for thing in {type(part) for module in modules for part in module.modules()} | set(functions):
        _collect_sources(thing, sources)
    own = __name__.partition(".")[0]
    code = sorted(item for item in sources.items() if library or item[0].partition(".")[0] != own)
    weights = [weights_sha256(module) for module in modules]
    return hashlib.sha256(repr((weights, sorted(settings.items()), code)).encode()).hexdigest()


def fingerprint_of_side(embedder: nn.Module, role: str, settings: dict[str, Any], *, library: bool) -> str:
    """The fingerprint of what an `Embedder` makes vectors of texts of a role with, before the adapter; `settings` are
    those besides the parts' own."""
    side, lora = embedder.side(role), embedder._lora(role)
    more = {"config": sorted(vars(side.encoder.config).items()), "tokenizer": side.tokenizer.sha256()}
    more |= {"include_prompt": side.pooling.include_prompt}
    modules = [side.encoder, side.pooling, *([side.heads[role]] if len(side.heads[role]) else [])]
    if lora is not None:
        modules, more = [*modules, lora], more | {"lora": lora.config.alpha / lora.config.rank}
    functions = [*side.pooling.functions, Tokenizer, pack, type(embedder)._pooled, type(embedder)._finished]
    return fingerprint(modules, settings | more, functions=functions, library=library)


def weights_sha256(module: nn.Module) -> str:
    """A SHA-256 over every tensor's name, type, shape and bytes, cached until a tensor changes.
    Integer sums over 8 KiB blocks detect changes, in 12 ms for 90 MB; the hash takes 220 ms (one busy core of an EPYC,
    2026-11-29). torch's own version counters miss fused optimizers and changes through `tensor.data`."""
    tensors = module.state_dict()
    kinds = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    counts = [0 if x.is_inference() else x._version for x in tensors.values()]
    sums = [_block_sums(x) for x in tensors.values()]
    looks = repr((kinds, counts)).encode() + (torch.cat(sums).cpu().numpy().tobytes() if sums else b"")
    if _KNOWN.get(module, (b"", ""))[0] != looks:
        sha256 = hashlib.sha256()
        for name, (dtype, shape) in kinds.items():
            sha256.update(f"{name} {dtype} {shape};".encode())
            sha256.update(_bytes(tensors[name]).cpu().numpy())
        _KNOWN[module] = looks, sha256.hexdigest()
    return _KNOWN[module][1]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _block_sums(tensor: Tensor, words: int = 1024) -> Tensor:
    """Sums over blocks of 64-bit words, then the bytes after the last whole block, as int64."""
    content = _bytes(tensor)
    content = content.clone() if content.storage_offset() % 8 else content
    whole = len(content) // (8 * words) * 8 * words
    return torch.cat([content[:whole].view(torch.int64).view(-1, words).sum(1), content[whole:].long()])


def _collect_sources(thing: Any, sources: dict[str, str]) -> None:
    """Adds {qualified name: code} of a class or function, its bound values, and all it uses from its own package."""
    thing, values = split_object(thing)
    module = getattr(thing, "__module__", None) or ""
    name, package = f"{module}.{getattr(thing, '__qualname__', repr(type(thing)))}", module.partition(".")[0]
    sources[f"{name} with {values}"] = ""
    if package == "torch":
        sources[name] = torch.__version__.partition("+")[0]
    elif name not in sources:
        sources[name], names = source(thing)
        scope = vars(sys.modules[module]) if module in sys.modules else {}
        for other in names:
            value = scope.get(other)
            if type(value) in (bool, int, float, str, tuple):
                sources[f"{module}.{other}"] = repr(describe_object(value))
            elif isinstance(value, type | FunctionType) and value.__module__.partition(".")[0] == package:
                _collect_sources(value, sources)


def precision(device: torch.device) -> tuple[str, ...]:
    """torch's settings that change float32 products: autocast, and lower precisions such as TF32."""
    cast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"
    places = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.mkldnn.matmul)
    return cast, *(place.fp32_precision for place in places)
