"""The first layers of an encoder as an encoder: shorter for good, or for one batch.

    encoder = truncated(encoder, 6)         # load_embedder(..., num_layers=6)
    with at_depth(encoder, 6):              # one step of training for several depths
        embedder.embed(packed, role="query")

Both give the same vectors: what follows the layers (a last norm, the pooling) follows the last one that is left.

2D Matryoshka, vectors that may be cut in layers and in dimensions, is a draw and a loss. Each batch is embedded at one
depth, drawn from `FinetuneConfig.depths` by seed and step, so that the loss stays a function of (Q, D, targets) and
gradient caching and ranks need nothing new. In expectation that is the mean of the loss over the depths; name a depth
twice to weigh it twice. With the loss `matryoshka`, its dims apply at each depth. Unlike the paper, a step does not
compute the last layer besides the drawn one, nor a divergence between the two, and costs only the layers it runs.

Source: Li et al. 2024 (2D Matryoshka Sentence Embeddings), section 3.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from .schema import Layers


def truncated(encoder: nn.Module, num_layers: int) -> nn.Module:
    """A copy of the encoder, in the same mode, with its first `num_layers` layers, whose weights it shares.
    Raises `ValueError` unless it has that many."""
    config = _truncated_config(encoder, num_layers)
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    with at_depth(encoder, num_layers):
        shorter = copy.deepcopy(encoder, shared)
    shorter.config = config
    return shorter


def check_depths(encoder: nn.Module, depths: Sequence[int]) -> None:
    """Raises `ValueError` unless the encoder has `layers`, and as many as each of `depths`."""
    layers = getattr(encoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"depths is {list(depths)}, but {type(encoder).__name__} has no list of layers")
    if not depths or not 1 <= min(depths) <= max(depths) <= len(layers):
        raise ValueError(f"depths is {list(depths)}, expected 1 to {len(layers)}, the encoder's layers")


@contextlib.contextmanager
def at_depth(encoder: nn.Module, num_layers: int | None) -> Iterator[None]:
    """Runs only the first `num_layers` layers, until the context ends; None: all."""
    left_out = [] if num_layers is None else list(encoder.layers)[num_layers:]
    if left_out:
        del encoder.layers[num_layers:]
    try:
        yield
    finally:
        if left_out:
            encoder.layers.extend(left_out)


def drawn_depth(depths: Sequence[int] | None, seed: int, batch: int) -> int | None:
    """One of `depths` for the batch of that number, the same on every rank and in a resumed run; None: no depths."""
    if depths is None:
        return None
    # The generator takes 32 bits; the factor keeps neighbouring seeds from drawing the same, one batch apart.
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + batch) % 2**32)
    return depths[int(torch.randint(len(depths), (), generator=generator, device="cpu"))]


def _truncated_config(encoder: nn.Module, num_layers: int) -> Any:
    """The configuration with fewer layers, and lists of one entry per layer shortened."""
    config = encoder.config
    count = next((f.name for f in fields(config) if f.type is Layers), None) if is_dataclass(config) else None
    if count is None or not isinstance(getattr(encoder, "layers", None), nn.ModuleList):
        raise ValueError(f"num_layers is {num_layers}, but {type(encoder).__name__} has no list of layers")
    before = getattr(config, count)
    if not 1 <= num_layers <= before:
        raise ValueError(f"num_layers is {num_layers}, expected 1 to {before}, the encoder's layers")
    per_layer = {f.name: value for f in fields(config) if isinstance(value := getattr(config, f.name), list | tuple)}
    shorter = {name: value[:num_layers] for name, value in per_layer.items() if len(value) == before}
    return replace(config, **{count: num_layers}, **shorter)
