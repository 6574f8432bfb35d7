"""Data-parallel training, one process (rank) per device, in a torch.distributed process group.

Each rank embeds its part of a batch's texts; the vectors are gathered, and every rank computes the loss on the whole
batch, so the number of ranks changes neither negatives nor gradients. Each has all weights (but see sharding.py).

    with process_group():                              # or torch.distributed.init_process_group(...), nccl or gloo
        embedder = load_embedder("BAAI/bge-base-en-v1.5", device=rank_device())
        finetune(embedder, dataset, config, validation=held_out, out="runs/first")
        report = encoding_together(embedder, lambda: evaluate(embedder, test_set))    # the same on every rank

Shapes: B sequences of a batch, N sequences of one rank, S ranks, D features.
"""

import contextlib
import datetime
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from .. import device as devices
from ..encoders.layers import inference
from ..encoders.packing import Packed, sort_by_length, take

T = TypeVar("T")
BATCHES_AT_ONCE = 4  # that a rank encodes before all wait for the slowest


class OtherRankError(ValueError):
    """Another rank failed, so this one stops."""


@contextlib.contextmanager
def process_group(*, timeout_hours: float = 2) -> Iterator[None]:
    """Joins the process group that torchrun describes in the environment; "cuda" then means this rank's own device.
    `timeout_hours`: how long a rank waits for others, as they do while rank 0 validates."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(_own_cuda_device())
    dist.init_process_group(timeout=datetime.timedelta(hours=timeout_hours))
    try:
        yield
        dist.barrier()  # no rank leaves while another is still sending
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank, from 0, and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def rank_device(name: str | None = None) -> str | None:
    """With several ranks, this one's device: cuda:LOCAL_RANK for "cuda"; CUDA or the CPU for None (gloo lacks MPS)."""
    if rank_and_size()[1] == 1:
        return name
    name = name or ("cuda" if devices.default_device().type == "cuda" else "cpu")
    return _own_cuda_device() if name == "cuda" else name


def _own_cuda_device() -> str:
    """Ranks of a machine take its devices in turn; more ranks than devices share them."""
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    return f"cuda:{number % count if count else number}"


class LocalBatch(NamedTuple):
    """The texts of a batch that this rank embeds: every S-th query and document, in order of length."""

    queries: Packed
    documents: Packed
    query_order: Tensor | None  # [B] int64, rows in order of length, longest first; None: a single rank
    document_order: Tensor | None

    @classmethod
    def of(cls, queries: Packed, documents: Packed) -> "LocalBatch":
        """This rank's part; it may have no queries, no documents, or neither."""
        rank, size = rank_and_size()
        if size == 1:
            return cls(queries, documents, None, None)
        in_order = [sort_by_length(packed) for packed in (queries, documents)]
        parts = [take(packed, torch.arange(packed.num_sequences)[rank::size]) for packed, _ in in_order]
        return cls(*parts, *(place_B.argsort() for _, place_B in in_order))

    def gather(self, Q: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of the whole batch, in order, given those of this rank's texts."""
        if self.query_order is None:
            return Q, D
        return gather(Q, self.query_order), gather(D, self.document_order)


def gather(own_ND: Tensor, order_B: Tensor) -> Tensor:
    """The vectors of all ranks in the batch's order, [B, D]: this rank's with gradient, the others' without.
    This rank has rows order_B[rank], order_B[rank + S], ... of the batch, or none."""
    rank, size = rank_and_size()
    order_B = order_B.to(own_ND.device)
    # The collective needs blocks of equal size; every rank knows which rows are padding.
    block = own_ND.new_zeros(-(-len(order_B) // size), own_ND.shape[1])
    block[: len(own_ND)] = own_ND.detach()
    blocks = [torch.empty_like(block) for _ in range(size)]
    dist.all_gather(blocks, block)
    in_order_BD = torch.stack(blocks, dim=1).flatten(0, 1)[: len(order_B)]
    others_BD = torch.empty_like(in_order_BD).index_copy(0, order_B, in_order_BD)
    return others_BD.index_copy(0, order_B[rank::size], own_ND)


@contextlib.contextmanager
def summing_gradients(
    parameters: Iterable[Parameter], of_first: Iterable[Parameter] = ()
) -> Iterator[Callable[[], None]]:
    """At the end of the block, replaces each gradient by its sum over ranks, and those of `of_first`, the loss's
    parameters, by rank 0's: every rank already has their whole gradient. A gradient that no rank has is None again, so
    that the optimizer skips it. Yields a function to call before the last backward pass in the block: sums then begin
    while it goes on, each once its gradient and those of all later parameters are complete."""
    rank, size = rank_and_size()
    if size == 1:
        yield lambda: None
        return
    # Ranks sum in one order, also what some of them lack. From the last parameter, as a backward pass completes them.
    left = deque(reversed([p for p in parameters if p.requires_grad]))
    complete, hooks, existed, sums = set(), [], {}, []

    def begin(p: Parameter) -> None:
        existed[p] = p.grad is not None
        p.grad = p.grad.contiguous() if existed[p] else torch.zeros_like(p)
        sums.append(dist.all_reduce(p.grad, async_op=True))

    def is_complete(p: Parameter) -> None:
        complete.add(p)
        while left and left[0] in complete:
            begin(left.popleft())

    try:
        yield lambda: hooks.extend([p.register_post_accumulate_grad_hook(is_complete) for p in left])
    finally:
        for hook in hooks:
            hook.remove()
    for p in of_first:
        p.grad = p.grad if rank == 0 else None
        left.append(p)
    while left:
        begin(left.popleft())
    if not existed:
        return
    counts = torch.tensor([*existed.values()], device=next(iter(existed)).device).int()
    dist.all_reduce(counts)
    for work in sums:
        work.wait()
    for p, count in zip(existed, counts.tolist(), strict=True):
        p.grad = p.grad if count else None


def broadcast_weights(*modules: nn.Module) -> None:
    """Copies the parameters and buffers of rank 0 to every rank."""
    if rank_and_size()[1] == 1:
        return
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def most(number: int) -> int:
    """The largest of the ranks' numbers."""
    return max(_from_each(number))


def reseed(*numbers: int, apart: bool) -> None:
    """Seeds torch's generators from `numbers` and, with `apart`, the rank, for different dropout; saves no state."""
    rank, size = rank_and_size()
    if size == 1:
        return
    digest = hashlib.sha256(repr((numbers, rank if apart else None)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "little"))


def from_first(compute: Callable[[], T]) -> T:
    """Runs compute() on rank 0 and returns its result on every rank. If it raises, the others get `OtherRankError`."""
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
        raise OtherRankError("rank 0 failed; its own message says why")
    return found[0][0]


def encoding_together(embedder: nn.Module, compute: Callable[[], T]) -> T:
    """`from_first`; meanwhile, all ranks share in what rank 0 encodes with `embedder`, whose weights each has.
    Batches are what a single process would encode at a time, so the vectors have the same bits."""
    rank, size = rank_and_size()
    if size == 1 or not hasattr(embedder, "map_batches"):
        return from_first(compute)
    if rank > 0:
        with inference(embedder):
            _encode_for_first(embedder.vectors_of)

    def spreading() -> T:
        embedder.map_batches = _spread
        try:
            return compute()
        finally:
            embedder.map_batches = devices.fetched
            dist.scatter_object_list([None], [None] * size, src=0)  # the others leave their loop

    return from_first(spreading)


def _spread(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`device.fetched` on rank 0, with the help of the others, which are in `_encode_for_first`."""
    size, items = rank_and_size()[1], iter(items)
    while some := list(itertools.islice(items, size * BATCHES_AT_ONCE)):
        own: list[Any] = [None]
        dist.scatter_object_list(own, [some[rank::size] for rank in range(size)], src=0)
        found = _gathered(function, own[0])
        for place in range(len(some)):
            yield found[place % size][place // size]


def _encode_for_first(function: Callable[[Any], Any]) -> None:
    while True:
        own: list[Any] = [None]
        dist.scatter_object_list(own, None, src=0)
        if own[0] is None:
            return
        with contextlib.suppress(Exception):  # rank 0 has been told, and ends the loop
            _gathered(function, own[0])


def _gathered(function: Callable[[Any], Any], own: list[Any]) -> list[list[Any]]:
    """On rank 0, the arrays of all ranks' own items, by rank. A rank that fails tells rank 0."""
    rank, size = rank_and_size()
    found: list[Any] = [None] * size
    told: list[Any] | str = "interrupted"
    try:
        told = list(devices.fetched(function, own))
    except Exception as error:
        told = str(error) or type(error).__name__
        raise
    finally:
        dist.gather_object(told, found if rank == 0 else None, dst=0)
    for other, result in enumerate(found if rank == 0 else ()):
        if isinstance(result, str):
            raise OtherRankError(f"rank {other}: {result}")
    return found


def together(compute: Callable[[], T]) -> T:
    """compute() of each rank, once all succeed. After a ValueError or OSError, other ranks get `OtherRankError`."""
    try:
        result = compute()
    except (ValueError, OSError) as error:
        _from_each(str(error))
        raise
    for rank, message in enumerate(_from_each(None)):
        if message is not None:
            raise OtherRankError(f"rank {rank}: {message}")
    return result


def check_same(values: Mapping[str, Any]) -> None:
    """Raises `ValueError`, on every rank, for the first value {name: value} that differs between ranks."""
    first, *others = _from_each(dict(values))
    for rank, found in enumerate(others, 1):
        for name in {**first, **found}:
            if found.get(name) != first.get(name):
                raise ValueError(f"{name} is {first.get(name)!r} on rank 0 and {found.get(name)!r} on rank {rank}")


def totals(*numbers: int) -> list[int]:
    """The sum over ranks of each number."""
    return [sum(found) for found in zip(*_from_each(numbers), strict=True)]


def _from_each(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
