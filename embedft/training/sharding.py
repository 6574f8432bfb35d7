"""An encoder's weights, gradients and optimizer states in S parts, one on each rank, for what no device can hold whole.

    sharding = Sharding(embedder)
    train_on(sharding.trained)                          # the same embedder, but for its encoder's weights
    with sharding.whole() as embedder: evaluate(embedder)       # on every rank at the same time
    sharding.finish()                                   # embedder has the trained weights

A rank keeps 1 / S of the encoder's weights, gradients and moments, and gathers the weights of one layer at a time, for
its forward and for its backward pass. `whole` gathers all weights, a quarter of what training takes on one device. What
is small stays whole on every rank: heads, adapters, the loss's parameters.

Gathering is a joint operation, so all ranks make equally many passes; those without texts pass `FILLER`.

Source: Zhao et al. 2023 (PyTorch FSDP), section 3, as implemented by torch.distributed.fsdp.fully_shard.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..encoders.embedder import Embedder
from ..encoders.packing import pack
from .distributed import broadcast_weights, rank_and_size

FILLER = pack([[0]])


class Sharding:
    """`trained` shares everything with the embedder but the encoder. The embedder's own encoder has no weights, except
    within `whole` and after `finish`; so none after an error, when ranks cannot gather them any more. While this is
    made, a rank holds the weights twice. Raises `ValueError` for a `refresh`, which would encode with `trained`."""

    def __init__(self, embedder: Embedder, refresh: Any = None):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if refresh is not None:
            raise ValueError("shard_weights is true, which cannot be combined with a refresh of the batches")
        broadcast_weights(embedder)
        self.embedder, self.trained = embedder, copy.copy(embedder)
        self.trained._modules = embedder._modules | {"encoder": copy.deepcopy(embedder.encoder)}
        encoder, mesh = self.trained.encoder, init_device_mesh(embedder.device.type, (rank_and_size()[1],))
        for part in (*encoder.layers, encoder):
            fully_shard(part, mesh=mesh)
        for part in encoder.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # sums, as in distributed.summing_gradients
                part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        self._free()

    @contextlib.contextmanager
    def whole(self) -> Iterator[Embedder]:
        """The embedder with all its weights, in inference mode; on every rank at the same time."""
        self._gather()
        try:
            yield self.embedder
        finally:
            self._free()

    def finish(self) -> Embedder:
        """The embedder with the trained weights; `trained` is not used any more."""
        self._gather()
        return self.embedder

    @torch.no_grad()
    def _gather(self) -> None:
        for own, part in self._pairs():
            own.data = part.full_tensor()
        self.embedder.eval()

    def _free(self) -> None:
        for own, _ in self._pairs():
            own.data = own.data.new_empty(0)

    def _pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self.embedder.encoder.parameters(), self.trained.encoder.parameters(), strict=True)


def check_sharding(embedder: Embedder, *, num_ranks: int) -> None:
    """Raises `ValueError` for an encoder that cannot be sharded, and for a single rank."""
    if num_ranks == 1:
        raise ValueError("shard_weights is true, but there is one rank: start several with torchrun")
    if not isinstance(embedder, Embedder):
        raise ValueError(f"shard_weights is true, which a {type(embedder).__name__} cannot be trained with")
    if embedder.query_side is not None:
        raise ValueError("shard_weights is true, but queries have an encoder of their own")
    if not isinstance(getattr(embedder.encoder, "layers", None), nn.ModuleList):
        raise ValueError(f"shard_weights is true, but {type(embedder.encoder).__name__} has no list of layers")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it has a part of a tensor on each rank."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor | None:
    """A sharded tensor, whole, on the CPU of rank 0 (others get None); any other as it is. On every rank."""
    if not is_sharded(tensor):
        return tensor
    whole = tensor.detach().full_tensor()
    return whole.cpu() if rank_and_size()[0] == 0 else None


def sharded_like(own: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor, if `own` of the same shape is sharded. On every rank."""
    if not is_sharded(own) or whole.shape != own.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of gradients of which some are sharded. On every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [x.to_local() for x in gradients if is_sharded(x)]
    if not parts:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    square = torch.nn.utils.get_total_norm(parts) ** 2
    dist.all_reduce(square)
    rest = [x for x in gradients if not is_sharded(x)]
    norm = (square + (torch.nn.utils.get_total_norm(rest) ** 2 if rest else 0)).sqrt()
    for x in (*parts, *rest):
        x.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
