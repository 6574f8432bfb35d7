"""Samplers, which assign examples to the batches of an epoch.

    sampler = Sampler(1_000, batch_size=32, seed=0)
    sampler.plan(0)             # [[17, 803, ...], ...]: indices of examples, one list per batch

A sampler is any object with `len(sampler)`, the batches per epoch, and a `plan` that depends only on the epoch.

Shapes: P examples, N batches per epoch.
"""

import functools
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sampler:
    """Shuffled batches in which every example appears once per epoch.

    Epoch e is `torch.randperm` from a generator seeded with seed + e (as in the sentence-transformers trainer), cut
    into batches. With `batch_tokens` these are ceil(all tokens / batch_tokens) batches of similar size: at most
    batch_tokens on average, and each less than one example above that average.

    Examples that share an item of `apart` go into different batches: each waits for one that can take it. Frequent
    items lead to more and smaller batches (with a warning), and may overfill one if they fit nowhere else."""

    num_examples: int
    _: KW_ONLY
    seed: int
    batch_size: int | None = None  # examples per batch; the last batch of an epoch may be smaller
    batch_tokens: int | None = None  # tokens per batch, instead of batch_size
    tokens: Callable[[], Sequence[int]] | None = None  # () -> the tokens of each example, [P]; called when first needed
    apart: Sequence[Iterable[Hashable]] = ()  # what each example contains (texts, for example), [P]

    def __post_init__(self) -> None:
        size, tokens = self.batch_size, self.batch_tokens
        if (size is None) == (tokens is None):
            raise ValueError(f"batch_size is {size}, batch_tokens is {tokens}: expected one of the two")
        for name in ("num_examples", "batch_size", "batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if tokens is not None and self.tokens is None:
            raise ValueError(f"batch_tokens is {tokens}, which needs the tokens of each example")

    def __len__(self) -> int:
        return self._num_batches

    def plan(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch (from 0), as indices into the list of examples."""
        order_P = torch.randperm(self.num_examples, generator=torch.Generator().manual_seed(self.seed + epoch))
        place_P = self._place(order_P)
        counts = place_P.bincount(minlength=len(self)).tolist()
        plan = [part.tolist() for part in order_P[place_P.argsort(stable=True)].split(counts)]
        # An example longer than a batch, or many that had to wait, can leave a batch empty.
        for batch in plan:
            if not batch:
                batch.append(max(plan, key=len).pop())
        return plan

    def _place(self, order_P: Tensor) -> Tensor:
        """The batch of each shuffled example: the one whose share contains its last unit (example or token)."""
        sizes_P, bounds_N = self._sizes_P[order_P], self._bounds_N
        rows, num_batches = order_P.tolist(), len(self)
        waiting = [i for i, row in enumerate(rows) if row in self._shared]
        # Spread evenly, to leave room for those that have to wait.
        natural = [i * num_batches // len(rows) for i in waiting]
        moved, loads_N = self._place_apart([rows[i] for i in waiting], natural)
        free_P = torch.ones(len(rows), dtype=torch.bool)
        free_P[waiting] = False
        room_N = (bounds_N.diff(prepend=bounds_N.new_zeros(1)) - torch.tensor(loads_N)).clamp(min=0)
        place_P = torch.empty_like(order_P)
        place_P[free_P] = torch.searchsorted(room_N.cumsum(0), sizes_P[free_P].cumsum(0))
        place_P[waiting] = torch.tensor(moved, dtype=torch.int64)
        return place_P

    def _place_apart(self, rows: list[int], natural: list[int]) -> tuple[list[int], list[int]]:
        """The batches of examples that share items with others, and the resulting load of every batch.
        Each goes to its natural batch or the first one after it (cyclically) that is not full and shares nothing with
        it; if all of those are full, to the least loaded one that shares nothing with it."""
        full, num_batches = self.batch_size or self.batch_tokens, len(self)
        held: list[set[int]] = [set() for _ in range(num_batches)]
        loads, placed = [0] * num_batches, []
        spare = list(range(num_batches))  # batches that are not full, ascending
        for row, first, size in zip(rows, natural, self._sizes_P[rows].tolist(), strict=True):
            items, start = self._shared[row], bisect_left(spare, first)
            for place in range(start - len(spare), start):  # a negative one counts from the end
                if held[spare[place]].isdisjoint(items):
                    batch = spare[place]
                    if loads[batch] + size >= full:
                        del spare[place]
                    break
            else:
                batch = min((k for k in range(num_batches) if held[k].isdisjoint(items)), key=loads.__getitem__)
            held[batch].update(items)
            loads[batch] += size
            placed.append(batch)
        return placed, loads

    @functools.cached_property
    def _num_batches(self) -> int:
        size, total = self.batch_size or self.batch_tokens, int(self._sizes_P.sum())
        least = -(-total // size)
        # At most this many others can conflict with an example, so with one batch more there is always room for it.
        count = Counter(item for items in self._shared.values() for item in items)
        most = max((sum(count[item] - 1 for item in items) for items in self._shared.values()), default=0)
        apart = min(most + 1, self.num_examples)
        if apart <= least:
            return min(least, self.num_examples)
        found = f"{apart:,} batches of about {total // apart:,}, not {least:,} of {size:,}"
        warnings.warn(f"no_duplicates: some texts are in so many rows that an epoch has {found}", stacklevel=2)
        return apart

    @functools.cached_property
    def _bounds_N(self) -> Tensor:
        """Where the share of each batch ends, in examples or tokens of the epoch."""
        ends_N, total = torch.arange(1, len(self) + 1), int(self._sizes_P.sum())
        if self.batch_size and len(self) == -(-total // self.batch_size):
            return ends_N * self.batch_size
        return ends_N * total // len(self)

    @functools.cached_property
    def _sizes_P(self) -> Tensor:
        """How much of a batch each example takes: 1, or its tokens."""
        return torch.as_tensor(self.tokens()) if self.batch_tokens else torch.ones(self.num_examples, dtype=torch.int64)

    @functools.cached_property
    def _shared(self) -> dict[int, tuple[int, ...]]:
        """{example: its items that other examples also have, as numbers}."""
        number: dict[Hashable, int] = {}
        items_P = [{number.setdefault(item, len(number)) for item in items} for items in self.apart]
        count = Counter(item for items in items_P for item in items)
        shared = (tuple(item for item in items if count[item] > 1) for items in items_P)
        return {row: items for row, items in enumerate(shared) if items}
