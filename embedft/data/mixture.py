"""Batches from several datasets: each batch from one source, or mixed, with a share for each source.

    datasets = {"finance": finance, "news": news}
    batches = make_mixture(datasets, embedder.pack, batch_size=64, seed=0, sampling="temperature")
    for batch in batches.epoch(0): ...              # batch.sources says where each query comes from

Each source has its own epochs: if an epoch of the mixture takes only part of a source, the next one continues there;
if it takes more, the source starts over. Ids are prefixed with the source ("news/q12").
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..encoders.packing import Packed
from .batches import Batches, make_batches
from .dataset import FIELDS, RetrievalDataset
from .sampler import Sampler

Sampling = Literal["proportional", "round_robin", "temperature"]


def make_mixture(
    datasets: Mapping[str, RetrievalDataset],
    pack: Callable[..., Packed],
    *,
    sampling: Sampling = "proportional",
    temperature: float = 2.0,
    mixed: bool = False,
    **options: Any,
) -> Batches:
    """Batches of several datasets.

    Args:
        datasets: {source: dataset}; source names must not be empty or contain "/".
        sampling: each source's share of an epoch's batches (or, if mixed, of a batch's examples), at least one.
            "proportional": its share of all examples; an epoch is every example once. "round_robin": equal shares, in
            turn, until the shortest source is used up. "temperature": proportional to its number of examples to the
            power 1 / temperature (1: proportional, infinity: equal).
        mixed: each batch has its share of every source; otherwise it and its negatives come from one source.
        options: as in `make_batches`. `no_duplicates` looks across sources only in mixed, proportional batches."""
    if not temperature >= 1:
        raise ValueError(f"temperature is {temperature}, expected at least 1")
    powers = {"proportional": 1.0, "round_robin": 0.0, "temperature": 1 / temperature}
    if sampling not in powers:
        raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(powers)}")
    if options.get("examples") == "texts":
        raise ValueError(f"examples is 'texts', which is for one dataset, found {len(datasets)}")
    whole = make_batches(join_datasets(datasets), pack, with_sources=True, **options)
    counts = Counter(query_id.partition("/")[0] for query_id, _ in whole.examples)
    if empty := [name for name in datasets if not counts[name]]:
        raise ValueError(f"source {empty[0]!r} has nothing to train on")
    if mixed and sampling == "proportional":
        return whole
    weights = {name: counts[name] ** powers[sampling] for name in datasets}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    if mixed and (batch_size := whole.sampler.batch_size) is not None:
        weights = {name: number / batch_size for name, number in apportion(batch_size, weights).items()}
    shares = weights if mixed else dict.fromkeys(datasets, 1.0)
    ends = zip(datasets, itertools.accumulate(counts[name] for name in datasets), strict=True)
    samplers = {name: _part(whole.sampler, slice(end - counts[name], end), shares[name]) for name, end in ends}

    @functools.cache  # lazy, since samplers may have to count tokens
    def parts() -> list[list[str]]:
        numbers = {name: len(sampler) for name, sampler in samplers.items()}
        if mixed or sampling == "round_robin":
            return [list(datasets)] * len(whole) if mixed else [[name] for name in numbers] * min(numbers.values())
        if sampling == "temperature":
            numbers = apportion(sum(numbers.values()), weights)
        return [[name] for name, number in numbers.items() for _ in range(number)]

    seed = None if sampling == "round_robin" else whole.sampler.seed
    return replace(whole, sampler=MixtureSampler(samplers, parts, seed))


def _part(whole: Sampler, rows: slice, share: float) -> Sampler:
    sizes = {"batch_size": whole.batch_size, "batch_tokens": whole.batch_tokens}
    sizes = {name: None if size is None else max(1, round(size * share)) for name, size in sizes.items()}
    part = {"num_examples": rows.stop - rows.start, "apart": whole.apart[rows], "tokens": lambda: whole.tokens()[rows]}
    return replace(whole, **part, **sizes)


@dataclass(frozen=True, eq=False)
class MixtureSampler:
    """Builds each batch from the next batches of one or more samplers."""

    samplers: Mapping[str, Sampler]  # {source: its sampler}, in the order of their examples
    parts: Callable[[], list[list[str]]]  # () -> the sources of each batch of an epoch; called when first needed
    seed: int | None  # shuffles the parts in each epoch; None: as they are

    def __len__(self) -> int:
        return len(self.parts())

    def plan(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch, as indices into the list of examples."""
        order = range(len(self))
        if self.seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        counts, batches, first = Counter(itertools.chain(*self.parts())), {}, 0
        for name, sampler in self.samplers.items():
            batches[name] = _rows(sampler, first, epoch * counts[name])
            first += sampler.num_examples
        return [[row for name in self.parts()[i] for row in next(batches[name])] for i in order]


def _rows(sampler: Sampler, first: int, place: int) -> Iterator[list[int]]:
    """A sampler's batches from number `place` on, counted over all its epochs; its examples begin at `first`."""
    epoch, batch = divmod(place, len(sampler))
    batches = itertools.chain.from_iterable(map(sampler.plan, itertools.count(epoch)))
    return ([first + row for row in rows] for rows in itertools.islice(batches, batch, None))


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divides a batch size by weight into whole numbers: one for each source, the rest by largest remainder."""
    if total < len(weights):
        raise ValueError(f"batch_size is {total}, expected at least {len(weights)}, one per source")
    exact = {name: max(0.0, total * weight / sum(weights.values()) - 1) for name, weight in weights.items()}
    rest = total - len(weights)
    scale = rest / sum(exact.values()) if rest else 0.0
    parts = {name: int(value * scale) for name, value in exact.items()}
    behind = sorted(weights, key=lambda name: parts[name] - exact[name] * scale)
    for name in behind[: rest - sum(parts.values())]:
        parts[name] += 1
    return {name: part + 1 for name, part in parts.items()}


def join_datasets(datasets: RetrievalDataset | Mapping[str, RetrievalDataset]) -> RetrievalDataset:
    """Joins datasets into one, prefixing every id with its source: "news/q12". A single one stays as it is."""
    if isinstance(datasets, RetrievalDataset):
        return datasets
    if not datasets:
        raise ValueError("expected at least one dataset, found none")
    for name in datasets:
        if not name or "/" in name:
            raise ValueError(f"source name {name!r}: expected a name without '/'")
    fields: dict[str, dict] = {name: {} for name in FIELDS}
    for source, dataset in datasets.items():
        for name, joined in fields.items():
            for i, value in getattr(dataset, name).items():
                if isinstance(value, dict):
                    value = {f"{source}/{d}": x for d, x in value.items()}
                elif isinstance(value, list):
                    value = [f"{source}/{d}" for d in value]
                joined[f"{source}/{i}"] = value
    return RetrievalDataset(**fields)
