"""One training on several devices: a process for each, a rank, all of them in one torch.distributed process group.

Every rank iterates the same batches and embeds only its own share of their texts. The vectors of all ranks are
gathered, and each rank computes the loss once, on the whole batch: as much a batch as on one device, so the number of
ranks changes neither negatives nor gradients. After the backward pass the gradients of the encoder are summed.
`train` calls all of this; with one rank, or without a process group, every function here does nothing.

    torchrun --nproc-per-node 2 -m embedft finetune MODEL pairs.csv --out runs/first

or from Python, in each process:

    with process_group():                              # or torch.distributed.init_process_group(...), nccl or gloo
        finetune(embedder, dataset, config, out="runs/first")

Not here: weights or optimizer state cut over devices; a model has to fit on each.

A rank that waits for another waits as long as the process group's timeout and then stops with an error: set it
above the time that rank 0 takes to validate (`process_group` allows two hours). What stops one rank stops the others:
an error of rank 0 in what it does alone is told to them, and when a process ends torchrun ends the rest.

Shapes: B sequences of a batch, N sequences of one rank, S ranks, T tokens, D features.
"""

import contextlib
import datetime
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from .. import device as devices
from ..encoders.packing import Packed, sort_by_length, take

TIMEOUT = datetime.timedelta(hours=2)
# Elements that are summed over ranks in one call: 64 MiB of float32.
BUCKET_ELEMENTS = 2**24

T = TypeVar("T")


class OtherRankError(ValueError):
    """Another rank stopped, and this one with it."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The process group that torchrun describes in the environment, for the block; nothing when it is of one process.

    Tensors on CUDA are sent by nccl, those on the CPU by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group(timeout=TIMEOUT)
    try:
        yield
        dist.barrier()  # none leaves while another still sends
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank, from 0, and how many ranks there are; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def rank_device(name: str | None = None) -> str | None:
    """Where this rank computes: on the device of that name, "cuda" being its own of the machine's, cuda:LOCAL_RANK.

    None is CUDA, else the CPU (gloo does not send from MPS). With one rank the name as it is.
    """
    if rank_and_size()[1] == 1:
        return name
    if name is None:
        name = "cuda" if devices.default_device().type == "cuda" else "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


class Share(NamedTuple):
    """What one rank embeds of a batch: of the queries, and of the documents, in order of length every S-th.

    share = Share.of(batch.queries, batch.documents)
    Q, D = share.gather(*embedder.embed_pair(share.queries, share.documents))      # those of the whole batch
    """

    queries: Packed
    documents: Packed
    query_order: Tensor | None  # [B] int64, rows in order of length, longest first; None: one rank, which has them all
    document_order: Tensor | None

    @classmethod
    def of(cls, queries: Packed, documents: Packed) -> "Share":
        """The share of this rank; may be without queries, without documents, or without both."""
        rank, size = rank_and_size()
        if size == 1:
            return cls(queries, documents, None, None)
        parts, orders = [], []
        for packed in (queries, documents):
            in_order, place_B = sort_by_length(packed)
            parts.append(take(in_order, torch.arange(packed.num_sequences)[rank::size]))
            orders.append(place_B.argsort())
        return cls(*parts, *orders)

    def gather(self, Q: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of the whole batch, in its order, from those of this rank's queries and documents."""
        if self.query_order is None:
            return Q, D
        return gather(Q, self.query_order), gather(D, self.document_order)


def gather(own_ND: Tensor, order_B: Tensor) -> Tensor:
    """The vectors of all ranks in the batch's order, [B, D]: this rank's with gradient, the others' without.

    A gradient of the loss on [B, D] comes back as its rows of this rank, once: the other ranks compute the same loss,
    but each takes the gradient on into its own texts only.

    Args:
        own_ND: of rows order_B[rank], order_B[rank + S], ... of the batch; may have no row.
        order_B: int64, the same on every rank, on any device.
    """
    rank, size = rank_and_size()
    order_B = order_B.to(own_ND.device)
    # Blocks of one size, as the collective wants them; which rows are padding every rank knows.
    block = own_ND.new_zeros(-(-len(order_B) // size), own_ND.shape[1])
    block[: len(own_ND)] = own_ND.detach()
    blocks = [torch.empty_like(block) for _ in range(size)]
    dist.all_gather(blocks, block)
    in_order_BD = torch.stack(blocks, dim=1).flatten(0, 1)[: len(order_B)]
    others_BD = torch.empty_like(in_order_BD).index_copy(0, order_B, in_order_BD)
    return others_BD.index_copy(0, order_B[rank::size], own_ND)


def sum_gradients(parameters: Iterable[Parameter], of_first: Iterable[Parameter] = ()) -> None:
    """Replaces each gradient by its sum over ranks; one that is missing on some ranks counts as zero there.

    A parameter without gradient on every rank stays without, so the optimizer leaves it alone as on one device.

    Args:
        of_first: parameters of which every rank has the whole gradient, those of the loss: rank 0's is taken, so that
            devices that round differently do not come apart.
    """
    rank, size = rank_and_size()
    if size == 1:
        return
    gradients = {p: p.grad for p in parameters} | {p: p.grad if rank == 0 else None for p in of_first}
    there = torch.tensor([grad is not None for grad in gradients.values()], device=next(iter(gradients)).device).int()
    dist.all_reduce(there)
    for bucket in _buckets(itertools.compress(gradients.items(), there.tolist())):
        flat = torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for p, grad in bucket])
        dist.all_reduce(flat)
        for (p, _), part in zip(bucket, flat.split([p.numel() for p, _ in bucket]), strict=True):
            # The loss's own parameters may be in float32 where the weights are in float64.
            p.grad = part.view_as(p).to(p.dtype)


def _buckets(pairs: Iterable[tuple[Parameter, Tensor | None]]) -> Iterator[list[tuple[Parameter, Tensor | None]]]:
    """The parameters with their gradients, as many at a time as have `BUCKET_ELEMENTS`; a larger one goes alone."""
    bucket, num_elements = [], 0
    for pair in pairs:
        if bucket and num_elements + pair[0].numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, num_elements = [], 0
        bucket.append(pair)
        num_elements += pair[0].numel()
    if bucket:
        yield bucket


def broadcast_weights(*modules: nn.Module) -> None:
    """Gives the parameters and buffers of every rank the values of rank 0."""
    if rank_and_size()[1] == 1:
        return
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def reseed(*numbers: int, apart: bool) -> None:
    """Seeds torch's generators from `numbers` and, with `apart`, from the rank; leaves them as they are on one rank.

    Apart, ranks draw different dropout; not apart, a loss that draws from torch's generators draws alike on all of
    them. A run that resumes on as many ranks needs the state of none.
    """
    rank, size = rank_and_size()
    if size == 1:
        return
    digest = hashlib.sha256(repr((numbers, rank if apart else None)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "little"))


def from_first(compute: Callable[[], T]) -> T:
    """compute() of rank 0, on every rank: what is done once, such as writing a file. The others wait for it.

    Raises on rank 0 what `compute` raises, and `OtherRankError` on the others then.
    """
    rank, size = rank_and_size()
    if size == 1:
        return compute()
    found: list[Any] = [None]
    try:
        if rank == 0:
            found = [(compute(),)]
    finally:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        raise OtherRankError("rank 0 has stopped; the error is told there")
    return found[0][0]


def together(compute: Callable[[], T]) -> T:
    """compute() of each rank, when it succeeds on all of them.

    Raises what `compute` raises if that is a ValueError or an OSError, and `OtherRankError` on the other ranks then.
    """
    rank, size = rank_and_size()
    if size == 1:
        return compute()
    result = error = None
    try:
        result = compute()
    except (ValueError, OSError) as raised:
        error = raised
    errors = _from_each(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise OtherRankError(f"rank {rank}: {message}")
    return result


def check_same(values: Mapping[str, Any]) -> None:
    """Raises `ValueError`, on every rank, for the first value {name: value} that differs between ranks."""
    if rank_and_size()[1] == 1:
        return
    first, *others = _from_each(dict(values))
    for rank, found in enumerate(others, 1):
        for name in {**first, **found}:
            if found.get(name) != first.get(name):
                raise ValueError(f"{name} is {first.get(name)!r} on rank 0 and {found.get(name)!r} on rank {rank}")


def _from_each(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    values = [None] * rank_and_size()[1]
    dist.all_gather_object(values, value)
    return values
