"""Less memory in training: layers whose activations are computed again for the backward pass, smaller mini-batches.

    with recomputing(embedder):
        loss(*embedder.embed_pair(queries, documents), targets).backward()

Source: Chen et al. 2016 (Training deep nets with sublinear memory cost), section 4.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import device as devices
from ..data.collate import Batch
from ..encoders.embedder import Embedder
from .checkpoint import TrainState
from .distributed import rank_and_size
from .sharding import check_sharding

T = TypeVar("T")


def layers_of(embedder: Embedder) -> list[nn.Module]:
    """The layers of its encoders. Raises `ValueError` for an encoder that has no list of them."""
    query_side, layers = getattr(embedder, "query_side", None), []  # a cross-encoder has none
    for encoder in (side.encoder for side in (embedder, query_side) if side is not None):
        if not isinstance(getattr(encoder, "layers", None), nn.ModuleList):
            raise ValueError(f"checkpoint_activations is true, but {type(encoder).__name__} has no list of layers")
        layers += encoder.layers
    return layers


@contextlib.contextmanager
def recomputing(embedder: Embedder, enabled: bool = True) -> Iterator[None]:
    """Until the context ends, each layer keeps only its input for the backward pass, which computes the rest again: the
    same bits, under dropout too, for a third more computation. A step of 4,600 tokens with all-MiniLM-L6-v2 takes 0.9
    GiB on top of the model instead of 1.2, most of it for attention and feed-forward of one layer (2026-11-30)."""
    layers = layers_of(embedder) if enabled else []
    try:
        for layer in layers:
            layer.forward = functools.partial(_checkpointed, layer, layer.forward)
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's is there again


def _checkpointed(layer: nn.Module, forward: Any, *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    again = _with_hooks(layer)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again))


def _with_hooks(layer: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which the layer's parts have the hooks that they have now: LoRA's are gone in the backward pass."""
    then = {part: part._forward_hooks.copy() for part in layer.modules()}

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        now = {part: part._forward_hooks for part in then}
        try:
            for part, hooks in then.items():
                part._forward_hooks = hooks
            yield
        finally:
            for part, hooks in now.items():
                part._forward_hooks = hooks

    return again()


def check_memory(embedder: Embedder, config: Any) -> None:
    """Raises `ValueError` for an encoder that lacks the layers to compute again or cannot be sharded, and for "auto" on
    several ranks: one that runs out of memory would leave the others waiting for it."""
    if config.checkpoint_activations:
        layers_of(embedder)
    if config.shard_weights:
        check_sharding(embedder, num_ranks=rank_and_size()[1])
    if config.mini_batch_tokens == "auto" and (size := rank_and_size()[1]) > 1:
        raise ValueError(f"mini_batch_tokens is 'auto', expected a number of tokens on {size} ranks")


def backing_off(compute: Callable[[int | None], T], state: TrainState, parts: list[Batch]) -> T:
    """compute(tokens per mini-batch) of the batches of a step, None at first: no gradient caching. Where memory runs
    out, a mini-batch gets half as many tokens from then on, and the step starts again from the same random state, so
    that it ends as if it had never been tried with more. Raises `ValueError` where a single text takes too much."""
    packed, device = [side for part in parts for side in (part.queries, part.documents)], state.embedder.device
    before, longest = devices.random_state(device), max(side.max_seqlen for side in packed)
    while True:
        try:
            return compute(state.mini_batch_tokens)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            if state.mini_batch_tokens is not None and state.mini_batch_tokens <= longest:
                found = f"memory ran out at {state.mini_batch_tokens} tokens; the longest text has {longest}"
                raise ValueError(
                    f"mini_batch_tokens is 'auto': {found}, so smaller mini-batches cannot help"
                ) from error
        # Not in the handler: there, the error would keep the tensors of the failed attempt.
        whole = max(len(part.queries.input_ids) + len(part.documents.input_ids) for part in parts)
        state.mini_batch_tokens = max(longest, (state.mini_batch_tokens or whole) // 2)
        state.optimizer.zero_grad()
        devices.release_memory(device)
        devices.set_random_state(before, device)
