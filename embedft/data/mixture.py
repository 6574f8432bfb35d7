"""Several data sets in one training: batches of one source each, or mixed ones, by a share for each source.

    batches = Mixture({"finance": finance, "news": news}, embedder.pack, batch_size=64, seed=0, sampling="temperature")
    for batch in batches.epoch(0): ...              # batch.sources says where each query is from
    batches.shares()                                # {"finance": 0.61, "news": 0.39}

Every source is read in its own epochs, each of its examples once in each of them. Where an epoch of the mixture takes
less of a source than all of it, the next one goes on there; where it takes more, the source begins anew. So all follows
from seed, epoch and batch number, and resumes anywhere as `Batches` does.

Ids are those of the data sets with the source in front ("news/q12"): one id never means two texts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch

from ..encoders.packing import Packed
from .batches import Batch, Batches, Example
from .dataset import RetrievalDataset

Sampling = Literal["proportional", "round_robin", "temperature"]
SAMPLINGS = get_args(Sampling)


class Mixture:
    """Batches of several data sets, by epoch; `train` takes it as it takes `Batches`.

    Args:
        datasets: {source: data set}, at least one; a source's name is not empty and has no "/".
        pack: as in `Batches`.
        batch_size, batch_tokens: of a batch, one of the two.
        seed: of the order of sources, and of every source's own order.
        sampling: what share of the batches (mixed: of a batch) each source has. Batches, and examples of a mixed
            batch, are whole and at least one of each source: `shares` says what comes of it.
            "proportional": its share of all examples; an epoch is every example once.
            "round_robin": the same for all, one after the other, until the shortest is through.
            "temperature": proportional to its number of examples to the power 1 / temperature.
        temperature: 1 is proportional, infinity is equal.
        mixed: False: a batch is of one source, so no query has a negative of another source. True: each batch has
            its share of every source.
        options: the others of `Batches`, for every source. `no_duplicates` looks across sources only where mixed
            batches are proportional; elsewhere within each.

    `dataset` is all of them in one, with the ids of the batches.

    An epoch has as many batches as the sources have together; "round_robin" without `mixed`: as the shortest has times
    the number of sources.
    """

    def __init__(
        self,
        datasets: Mapping[str, RetrievalDataset],
        pack: Callable[..., Packed],
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        seed: int,
        sampling: Sampling = "proportional",
        temperature: float = 2.0,
        mixed: bool = False,
        **options: Any,
    ):
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
        if not temperature >= 1:
            raise ValueError(f"temperature is {temperature}, expected at least 1")
        self.seed, self.sampling, self.mixed = seed, sampling, mixed

        sizes = {"batch_size": batch_size, "batch_tokens": batch_tokens}

        def of_source(name: str, share: float = 1.0) -> Batches:
            dataset = join_datasets({name: datasets[name]})
            changed = {name: size if size is None else max(1, round(size * share)) for name, size in sizes.items()}
            # As many as are asked for have to be in one of the sources, not in all of them.
            most = max(map(len, dataset.negatives.values()), default=0)
            changed["num_negatives"] = min(most, options.get("num_negatives", 0))
            source = Batches(dataset, pack, seed=seed, **{**options, **changed})
            source.lengths = self.all.lengths
            return source

        self.all = Batches(join_datasets(datasets), pack, seed=seed, **sizes, **options)
        self.dataset = self.all.dataset
        whole = {name: of_source(name) for name in datasets}
        num_examples = {name: len(source.examples) for name, source in whole.items()}
        power = {"proportional": 1.0, "round_robin": 0.0, "temperature": 1 / temperature}[sampling]
        weights = {name: number**power for name, number in num_examples.items()}
        self.weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        # Examples of each source in a batch, where that is a number.
        self._dealt: dict[str, int] = {}
        if not mixed:
            self.sources = whole
        elif sampling == "proportional":
            self.sources = {}
        else:
            if batch_size is not None and batch_size < len(datasets):
                raise ValueError(
                    f"batch_size is {batch_size}, expected at least one of each of {len(datasets)} sources"
                )
            shares = self.weights.items()
            if batch_size is not None:
                self._dealt = apportion(batch_size, self.weights)
                shares = [(name, n / batch_size) for name, n in self._dealt.items()]
            self.sources = {name: of_source(name, share) for name, share in shares}
        self._counted: dict[str, int] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        if self.mixed:
            return len(self.all)
        return sum(self._counts().values())

    def shares(self) -> dict[str, float]:
        """The share of each source: in the batches of an epoch, or with `mixed` in the examples of a full batch.

        Exact where these are counted, so "round_robin" of 4 examples of 3 sources is 2 : 1 : 1 and a source of any
        size has at least one. Mixed and proportional, or of so many tokens, batches have their shares on average.
        """
        if self.mixed and self._dealt:
            return {name: number / sum(self._dealt.values()) for name, number in self._dealt.items()}
        if self.mixed:
            return dict(self.weights)
        counts = self._counts()
        return {name: count / sum(counts.values()) for name, count in counts.items()}

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), from batch `start` on, which may be the one behind the last."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}, expected 0 to {len(self)}, the batches of an epoch")
        for place, examples in enumerate(self._examples(number, start), start):
            batch = self.all.collate(examples, draw=(number, place))
            yield batch._replace(sources=[query_id.partition("/")[0] for query_id in batch.query_ids])

    def _examples(self, number: int, start: int) -> Iterator[list[Example]]:
        if self.mixed and not self.sources:
            for rows in self.all.plan(number)[start:]:
                yield [self.all.examples[row] for row in rows]
        elif self.mixed:
            for place in range(number * len(self) + start, (number + 1) * len(self)):
                yield [example for name in self.sources for example in self._batch(name, place)]
        else:
            counts, seen = self._counts(), Counter()
            for place, name in enumerate(self._schedule(number)):
                if place >= start:
                    yield self._batch(name, number * counts[name] + seen[name])
                seen[name] += 1

    def _batch(self, name: str, place: int) -> list[Example]:
        """Batch `place` of a source, counted over all its epochs."""
        source = self.sources[name]
        epoch, batch = divmod(place, len(source))
        return [source.examples[row] for row in source.plan(epoch)[batch]]

    def _counts(self) -> dict[str, int]:
        """Batches of each source in an epoch, when they are of one source each."""
        if self._counted is None:
            lengths = {name: len(source) for name, source in self.sources.items()}
            if self.sampling == "proportional":
                self._counted = lengths
            elif self.sampling == "round_robin":
                self._counted = dict.fromkeys(lengths, min(lengths.values()))
            else:
                self._counted = apportion(sum(lengths.values()), self.weights)
        return self._counted

    def _schedule(self, number: int) -> list[str]:
        """The source of each batch of an epoch: in turn, or shuffled."""
        counts = self._counts()
        if self.sampling == "round_robin":
            return list(counts) * min(counts.values())
        names = [name for name, count in counts.items() for _ in range(count)]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed + number))
        return [names[i] for i in order.tolist()]


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`total` dealt out by weight, at least 1 each: one for each, then the rest by largest remainder.

    Raises `ValueError` when `total` is less than one each.
    """
    if total < len(weights):
        raise ValueError(f"{total} cannot be dealt out to {len(weights)} sources, at least one each")
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
    """One data set of several, every id with its source in front: "news/q12".

    Raises `ValueError` when there is none, or a name is empty or has a "/".
    """
    if not datasets:
        raise ValueError("there is no data set to join")
    for name in datasets:
        if not name or "/" in name:
            raise ValueError(f"a source is called {name!r}, expected a name without '/'")
    queries, corpus, qrels, negatives, scores, titles = {}, {}, {}, {}, {}, {}
    for name, dataset in datasets.items():
        for whole, part in ((queries, dataset.queries), (corpus, dataset.corpus), (titles, dataset.titles)):
            whole.update({f"{name}/{i}": text for i, text in part.items()})
        for whole, part in ((qrels, dataset.qrels), (scores, dataset.scores)):
            whole.update({f"{name}/{q}": {f"{name}/{d}": x for d, x in by.items()} for q, by in part.items()})
        negatives.update({f"{name}/{q}": [f"{name}/{d}" for d in ids] for q, ids in dataset.negatives.items()})
    return RetrievalDataset(queries, corpus, qrels, negatives, scores, titles)
