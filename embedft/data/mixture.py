"""Several datasets in one training run: batches of one source each, or mixed batches, with a share for each source.

    datasets = {"finance": finance, "news": news}
    batches = make_mixture(datasets, embedder.pack, batch_size=64, seed=0, sampling="temperature")
    for batch in batches.epoch(0): ...              # batch.sources says where each query comes from
    batches.sampler.shares()                        # {"finance": 0.61, "news": 0.39}

Every source is read in epochs of its own, each of its examples once per epoch. Where an epoch of the mixture takes only
a part of a source, the next epoch continues there; where it takes more, the source starts over. Everything follows from
seed, epoch and batch number, so training resumes anywhere. Ids get the source in front ("news/q12").
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from ..encoders.packing import Packed
from .batches import Batches, check_listed, make_sampler
from .collate import Collate
from .dataset import RetrievalDataset
from .examples import Example, ExampleKind, TokenCounter, list_examples
from .sampler import PlansEpochs, Sampler

Sampling = Literal["proportional", "round_robin", "temperature"]
SAMPLINGS = get_args(Sampling)


def make_mixture(
    datasets: Mapping[str, RetrievalDataset],
    pack: Callable[..., Packed],
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    seed: int,
    sampling: Sampling = "proportional",
    temperature: float = 2.0,
    mixed: bool = False,
    examples: ExampleKind = "pairs",
    no_duplicates: bool = False,
    length_window: int = 0,
    target_scores: bool = False,
    **options: Any,
) -> Batches:
    """Batches of several datasets.

    Args:
        datasets: {source: dataset}, at least one; the name of a source is not empty and has no "/".
        sampling: the share of each source in the batches of an epoch (or, mixed, in the examples of a batch).
            "proportional": its share of all examples; an epoch is every example once.
            "round_robin": equal shares, in turn, until the shortest source is used up.
            "temperature": proportional to its number of examples to the power 1 / temperature.
            Every source gets at least one; `batches.sampler.shares()` tells the exact shares.
        temperature: 1 is proportional, infinity is equal shares.
        mixed: False: each batch comes from one source, so no query has negatives from another. True: each batch has
            its share of every source.
        pack, batch_size, batch_tokens, seed, examples, no_duplicates, length_window, target_scores, options: as in
            `make_batches`. `no_duplicates` looks across sources only in mixed, proportional batches.

    An epoch has as many batches as the sources have together; "round_robin" without `mixed`: as many as the shortest
    source has, times the number of sources.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
    if not temperature >= 1:
        raise ValueError(f"temperature is {temperature}, expected at least 1")
    scores = {"relevance": examples != "pairs", "target_scores": target_scores or examples == "scored"}
    collate = Collate(join_datasets(datasets), pack, seed=seed, with_sources=True, **scores, **options)
    rows = list_examples(collate.dataset, examples)
    check_listed(rows, collate)
    counter = TokenCounter(pack, passages=collate.passages, windows_per_document=collate.windows_per_document)

    def sampler(part: Sequence[Example], share: float = 1.0) -> Sampler:
        sizes = {"batch_size": batch_size, "batch_tokens": batch_tokens}
        sizes = {name: None if size is None else max(1, round(size * share)) for name, size in sizes.items()}
        common = {"seed": seed, "no_duplicates": no_duplicates, "length_window": length_window}
        return make_sampler(part, collate, counter, **sizes, **common)

    parts = _by_source(rows, datasets)
    power = {"proportional": 1.0, "round_robin": 0.0, "temperature": 1 / temperature}[sampling]
    weights = {name: len(part) ** power for name, part in parts.items()}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    if mixed:
        return Batches(rows, _mix(rows, parts, weights, sampler, sampling, batch_size), collate)
    samplers = {name: sampler(part) for name, part in parts.items()}
    return Batches(rows, SourceSampler(samplers, seed=seed, sampling=sampling, weights=weights), collate)


def _mix(
    rows: Sequence[Example],
    parts: Mapping[str, Sequence[Example]],
    weights: Mapping[str, float],
    sampler: Callable[..., Sampler],
    sampling: Sampling,
    batch_size: int | None,
) -> PlansEpochs:
    """The sampler of mixed batches."""
    if sampling == "proportional":
        return sampler(rows)
    if batch_size is not None:
        if batch_size < len(parts):
            raise ValueError(f"batch_size is {batch_size}, expected at least one of each of {len(parts)} sources")
        weights = {name: number / batch_size for name, number in apportion(batch_size, weights).items()}
    samplers = {name: sampler(part, weights[name]) for name, part in parts.items()}
    return MixedSampler(samplers, num_batches=len(sampler(rows)), weights=weights)


def _by_source(rows: Sequence[Example], names: Iterable[str]) -> dict[str, list[Example]]:
    """{source: its examples}; those of a source follow each other in `rows`."""
    parts: dict[str, list[Example]] = {name: [] for name in names}
    for row in rows:
        parts[row[0].partition("/")[0]].append(row)
    for name, part in parts.items():
        if not part:
            raise ValueError(f"source {name!r} has nothing to train on")
    return parts


class _OfSources:
    """What both samplers share: batch after batch of every source, and where its examples begin in the whole list."""

    def __init__(self, samplers: Mapping[str, Sampler], weights: Mapping[str, float]):
        self.samplers, self.weights, self.first = dict(samplers), dict(weights), {}
        num_examples = 0
        for name, sampler in samplers.items():
            self.first[name] = num_examples
            num_examples += sampler.num_examples

    def batch(self, source: str, place: int) -> list[int]:
        """Batch `place` of a source, counted over all its epochs."""
        epoch, batch = divmod(place, len(self.samplers[source]))
        return [self.first[source] + row for row in self.samplers[source].plan(epoch)[batch]]


class SourceSampler(_OfSources):
    """Batches of one source each.

    Args:
        samplers: {source: its sampler}; the whole list of examples is that of the sources, one after another.
        seed: seed of the order of sources.
        sampling: as in `make_mixture`.
        weights: {source: share}, for "temperature".
    """

    def __init__(self, samplers: Mapping[str, Sampler], *, seed: int, sampling: Sampling, weights: Mapping[str, float]):
        super().__init__(samplers, weights)
        self.seed, self.sampling = seed, sampling

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Batches of each source in an epoch."""
        lengths = {name: len(sampler) for name, sampler in self.samplers.items()}
        if self.sampling == "proportional":
            return lengths
        if self.sampling == "round_robin":
            return dict.fromkeys(lengths, min(lengths.values()))
        return apportion(sum(lengths.values()), self.weights)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return sum(self.counts.values())

    def shares(self) -> dict[str, float]:
        """The share of each source in the batches of an epoch."""
        return {name: count / len(self) for name, count in self.counts.items()}

    def plan(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch, as places in the list of examples."""
        seen: Counter[str] = Counter()
        plan = []
        for name in self._schedule(epoch):
            plan.append(self.batch(name, epoch * self.counts[name] + seen[name]))
            seen[name] += 1
        return plan

    def _schedule(self, epoch: int) -> list[str]:
        """The source of each batch of an epoch: in turn, or shuffled."""
        if self.sampling == "round_robin":
            return list(self.counts) * min(self.counts.values())
        names = [name for name, count in self.counts.items() for _ in range(count)]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed + epoch))
        return [names[i] for i in order.tolist()]


class MixedSampler(_OfSources):
    """Batches with a share of every source.

    Args:
        samplers: {source: its sampler}, whose batches are the source's part of a batch; as in `SourceSampler`.
        num_batches: batches of an epoch.
        weights: {source: its share of a full batch}; on average, if batches are measured in tokens.
    """

    def __init__(self, samplers: Mapping[str, Sampler], *, num_batches: int, weights: Mapping[str, float]):
        super().__init__(samplers, weights)
        self.num_batches = num_batches

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.num_batches

    def shares(self) -> dict[str, float]:
        """The share of each source in the examples of a full batch."""
        return self.weights

    def plan(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch, as places in the list of examples."""
        places = range(epoch * len(self), (epoch + 1) * len(self))
        return [[row for name in self.samplers for row in self.batch(name, place)] for place in places]


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`total` divided by weight into whole numbers of at least 1: one for each, the rest by largest remainder.

    Raises `ValueError` when `total` is smaller than the number of weights.
    """
    if total < len(weights):
        raise ValueError(f"{total} cannot be divided among {len(weights)} sources, at least one for each")
    everything = sum(weights.values())
    exact = {name: max(0.0, total * weight / everything - 1) for name, weight in weights.items()}
    rest = total - len(weights)
    scale = rest / sum(exact.values()) if rest else 0.0
    parts = {name: int(value * scale) for name, value in exact.items()}
    behind = sorted(weights, key=lambda name: parts[name] - exact[name] * scale)
    for name in behind[: rest - sum(parts.values())]:
        parts[name] += 1
    return {name: part + 1 for name, part in parts.items()}


def join_datasets(datasets: Mapping[str, RetrievalDataset]) -> RetrievalDataset:
    """One dataset made of several; every id gets its source in front: "news/q12".

    Raises `ValueError` when there is none, or a name is empty or contains a "/".
    """
    if not datasets:
        raise ValueError("expected at least one dataset, found none")
    for name in datasets:
        if not name or "/" in name:
            raise ValueError(f"source name {name!r}: expected a name without '/'")
    queries, corpus, qrels, negatives, scores, titles, missing = {}, {}, {}, {}, {}, {}, {}
    for name, dataset in datasets.items():
        for whole, part in ((queries, dataset.queries), (corpus, dataset.corpus), (titles, dataset.titles)):
            whole.update({f"{name}/{i}": text for i, text in part.items()})
        for whole, part in ((qrels, dataset.qrels), (scores, dataset.scores), (missing, dataset.missing)):
            whole.update({f"{name}/{q}": {f"{name}/{d}": x for d, x in by.items()} for q, by in part.items()})
        negatives.update({f"{name}/{q}": [f"{name}/{d}" for d in ids] for q, ids in dataset.negatives.items()})
    return RetrievalDataset(queries, corpus, qrels, negatives, scores, titles, missing)
