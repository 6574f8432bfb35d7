"""Gradient caching: forward and backward of a batch with the memory of a mini-batch, for any loss.

It costs a third more computation and gives the same gradients. It does not reduce the memory of the loss itself.

    value = cached_backward(embedder, batch.queries, batch.documents, batch.targets, loss, mini_batch_tokens=4_096)

Shapes: B sequences, N sequences of a mini-batch, D features.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from .. import device as devices
from ..encoders.embedder import Embedder
from ..encoders.packing import Packed, cut_by_tokens, sort_by_length, take
from ..losses.registry import Loss
from ..losses.targets import Targets
from .sharding import FILLER


def cached_backward(
    embedder: Embedder,
    queries: Packed,
    documents: Packed,
    targets: Targets,
    loss: Loss,
    *,
    mini_batch_tokens: int,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    before_last: Callable[[], None] = lambda: None,
    num_passes: Callable[[int], int] = int,
) -> Tensor:
    """Computes loss(Q, D, targets), a scalar, and adds its gradients to those of the embedder and of the loss itself.

    With L the loss and v_N a mini-batch's vectors, dL/dweights = sum over mini-batches of (dL/dv_N)(dv_N/dweights):
    1. compute every v_N without gradient, saving the state of the random generators before each;
    2. compute L once on all vectors, with its gradient on each v_N (and on the loss's own parameters);
    3. compute every v_N again from its random state, with gradient, and backpropagate dL/dv_N through it.

    Exact for any loss and under dropout: gradients and random generators end as after one backward pass over the same
    mini-batches, of `mini_batch_tokens` or one longer text. `queries` and `documents`, one text per row of Q and D, may
    be empty (distributed.py). `autocast` returns the context for computing vectors, both times; `before_last` is called
    before the last mini-batch's backward pass, if there is one; num_passes(mini-batches of a side), at least as many,
    is how many passes to make, those without texts on `FILLER` (sharding.py).

    Source: Gao et al. 2021 (Scaling deep contrastive learning batch size under memory limited setup), section 3.2."""
    device = embedder.device

    def embed(part: Packed, role: str) -> Tensor:
        # One context per mini-batch: autocast caches cast weights, and those cast without gradient would never get one.
        with autocast():
            return embedder.embed(part, role=role)

    sides, vectors = [], []
    for packed, role in ((queries, "query"), (documents, "document")):
        parts, place_B = mini_batches(packed, mini_batch_tokens)
        idle = num_passes(len(parts)) - len(parts)
        states, embedded = _without_gradient(lambda part, role=role: embed(part, role), parts, idle, device)
        in_order = torch.cat(embedded) if embedded else no_vectors(embedder)
        place_B, order_B = devices.transfer([place_B, place_B.argsort()], device)
        vectors.append(in_order[place_B].detach().requires_grad_())
        sides.append((role, parts, states, order_B, idle))
    value = loss(*vectors, targets)
    value.backward()
    after, is_trained = devices.random_state(device), any(p.requires_grad for p in embedder.parameters())
    passes = []
    for (role, parts, states, order_B, idle), X in zip(sides, vectors, strict=True):
        if X.grad is not None and is_trained:  # the loss may ignore queries or documents
            gradients = X.grad[order_B].split([part.num_sequences for part in parts])
            passes += [(role, *each) for each in zip(parts, states, gradients, strict=True)]
            passes += [(role, FILLER, after, X.grad.new_zeros(1, X.shape[1]))] * idle
    for number, (role, part, state, gradient_ND) in enumerate(passes, start=1):
        devices.set_random_state(state, device)
        if number == len(passes):
            before_last()
        embed(part, role).backward(gradient_ND)
        devices.release_memory(device)
    devices.set_random_state(after, device)
    return value.detach()


@torch.no_grad()
def _without_gradient(
    embed: Callable[[Packed], Tensor], parts: list[Packed], idle: int, device: torch.device
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """The random state before each part, and its vectors; after them, `idle` passes for nothing."""
    states, embedded = [], []
    for part in parts:
        states.append(devices.random_state(device))
        embedded.append(embed(part))
    for _ in range(idle):
        embed(FILLER)
    return states, embedded


def no_vectors(embedder: Embedder) -> Tensor:
    """Vectors of no texts, [0, D], that require a gradient, so that a loss on them has a backward pass."""
    weight = next(embedder.parameters())
    return torch.zeros(0, embedder.full_dim, dtype=weight.dtype, device=weight.device, requires_grad=True)


def mini_batches(packed: Packed, max_tokens: int) -> tuple[list[Packed], Tensor]:
    """Mini-batches of at most `max_tokens`, longest sequences first, and place_B [B], the place of each sequence.
    A longer sequence is a mini-batch of its own."""
    in_order, place_B = sort_by_length(packed)
    ranges = cut_by_tokens(in_order.host_lengths.tolist(), max_tokens)
    return [take(in_order, torch.tensor(rows)) for rows in ranges], place_B
