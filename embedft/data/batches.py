"""Batches of a dataset, by epoch: a list of examples, a sampler and a collate function, each replaceable.

    batches = make_batches(dataset, embedder.pack, batch_size=64, seed=0)
    for batch in batches.epoch(0): ...

    batches = Batches(batches.examples, MySampler(), batches.collate)       # anything with __len__ and plan(epoch)
    batches = Batches([("q1", "d1"), ("q2", "d2")], sampler, my_collate)    # or every part your own

An epoch follows from seed and epoch number alone, so training resumes from two numbers, epoch and batch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..encoders.packing import Packed
from .collate import Batch, Collate
from .dataset import RetrievalDataset
from .examples import Example, ExampleKind, list_examples
from .sampler import Sampler


class Batches:
    """Batches by epoch.

    Args:
        examples: what there is to train on; `list_examples` makes (query id, document id) pairs of a dataset.
        sampler: `len(sampler)` batches per epoch; `sampler.plan(epoch)` lists the places in `examples` of each.
        collate: (examples of a batch, draw=(epoch, batch)) -> Batch; `Collate` is one.
    """

    def __init__(self, examples: Sequence[Example], sampler: Sampler, collate: Callable[..., Batch]):
        self.examples, self.sampler, self.collate = examples, sampler, collate

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), beginning with batch `start`, 0 to len(self)."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}, expected 0 to {len(self)}, the batches of an epoch")
        for place, rows in enumerate(self.sampler.plan(number)[start:], start):
            yield self.collate([self.examples[row] for row in rows], draw=(number, place))


def make_batches(
    dataset: RetrievalDataset,
    pack: Callable[..., Packed],
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    **options: Any,
) -> Batches:
    """Batches of one dataset, of `batch_size` examples or `batch_tokens` tokens; `options` are those of `prepare`."""
    examples, collate, make_sampler = prepare(dataset, pack, **options)
    return Batches(examples, make_sampler(batch_size=batch_size, batch_tokens=batch_tokens), collate)


def prepare(
    dataset: RetrievalDataset,
    pack: Callable[..., Packed],
    *,
    seed: int,
    examples: ExampleKind = "pairs",
    target_scores: bool = False,
    no_duplicates: bool = False,
    length_window: int = 0,
    **options: Any,
) -> tuple[list[Example], Collate, Callable[..., Sampler]]:
    """The examples of a dataset, what collates them, and what makes a `Sampler` for those from `start` to `stop`.

    Args:
        seed, length_window: see `Sampler`. Tokens are those of queries, documents and hard negatives together, as
            `pack` cuts them; texts are tokenized once for it, when the first batch is needed.
        examples: see `list_examples`. "queries" and "scored" put grades into the targets, "scored" also the scores.
        target_scores: put `dataset.scores` into the targets.
        no_duplicates: no text appears in two rows of a batch, be it a query, document or hard negative (`apart` of
            `Sampler`). Equal documents are never each other's negatives anyway; this is for equal queries and for
            losses that want one document per query.
        pack, options: see `Collate`.

    Raises:
        ValueError: nothing to train on, no query with `num_negatives` hard negatives, a missing score.
    """
    rows = list_examples(dataset, examples)
    scores = {"relevance": examples != "pairs", "target_scores": target_scores or examples == "scored"}
    collate = Collate(dataset, pack, seed=seed, **scores, **options)
    _check_listed(rows, collate)

    @functools.cache
    def tokens() -> list[int]:
        listed = [collate.listed(example) for example in rows]
        queries = collate.count_tokens([dataset.queries[query_id] for query_id, _ in rows], role="query")
        used = list(dict.fromkeys(i for ids in listed for i in ids))
        counts = collate.count_tokens([collate.texts[i] for i in used], role="document")
        documents = dict(zip(used, counts, strict=True))
        return [count + sum(documents[i] for i in ids) for count, ids in zip(queries, listed, strict=True)]

    def make_sampler(*, start: int = 0, stop: int = len(rows), **sizes: int | None) -> Sampler:
        part, apart = rows[start:stop], None
        if no_duplicates:
            apart = ([dataset.queries[row[0]], *(collate.texts[i] for i in collate.listed(row))] for row in part)
        sizes |= {"seed": seed, "length_window": length_window}
        return Sampler(len(part), tokens=lambda: tokens()[start:stop], apart=apart, **sizes)

    return rows, collate, make_sampler


def _check_listed(examples: Sequence[Example], collate: Collate) -> None:
    """Hard negatives and scores that `collate` needs are there."""
    dataset, wanted = collate.dataset, collate.num_negatives
    most = max(len(dataset.negatives.get(query_id, ())) for query_id, _ in examples)
    if wanted > most:
        raise ValueError(f"num_negatives is {wanted}, but no query has more than {most} hard negatives")
    for example in examples if collate.target_scores else ():
        for document_id in collate.listed(example):
            if document_id not in dataset.scores.get(example[0], {}):
                raise ValueError(f"query {example[0]!r} has no score for document {document_id!r}")
