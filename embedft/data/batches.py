"""Batches of a dataset, by epoch: a list of examples, a sampler and a collate function, each replaceable.

    batches = make_batches(dataset, embedder.pack, batch_size=64, seed=0)
    for batch in batches.epoch(0): ...

    batches = Batches(batches.examples, MySampler(), batches.collate)       # anything with __len__ and plan(epoch)
    batches = Batches([("q1", "d1"), ("q2", "d2")], sampler, my_collate)    # or every part your own

An epoch follows from seed and epoch number alone, so training resumes from two numbers, epoch and batch. Not here:
several datasets (mixture.py), and mini-batches that save memory (training/cached.py).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..encoders.packing import Packed
from .collate import Batch, Collate
from .dataset import RetrievalDataset
from .examples import Example, ExampleKind, TokenCounter, list_examples
from .sampler import PlansEpochs, Sampler


class Batches:
    """Batches by epoch.

    Args:
        examples: what there is to train on; `list_examples` makes (query id, document id) pairs of a dataset.
        sampler: `len(sampler)` batches per epoch; `sampler.plan(epoch)` lists the places in `examples` of each.
        collate: (examples of a batch, draw=(epoch, batch)) -> Batch; `Collate` is one.
    """

    def __init__(self, examples: Sequence[Example], sampler: PlansEpochs, collate: Callable[..., Batch]):
        self.examples, self.sampler, self.collate = examples, sampler, collate

    def __len__(self) -> int:
        """Batches of an epoch."""
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
    seed: int,
    num_negatives: int = 0,
    examples: ExampleKind = "pairs",
    target_scores: bool = False,
    no_duplicates: bool = False,
    length_window: int = 0,
    passages: Sequence[int] | None = None,
    windows_per_document: int = 4,
    merge_equal_texts: bool = True,
) -> Batches:
    """Batches of one dataset.

    Args:
        dataset: judgements with a grade above 0 are what is trained on.
        pack, num_negatives, passages, windows_per_document, merge_equal_texts: see `Collate`.
        batch_size, batch_tokens, seed, length_window: see `Sampler`. Tokens are those of queries, documents and hard
            negatives together, as `pack` cuts them; texts are tokenized once for it, when the first batch is needed.
        examples: see `list_examples`. "queries" and "scored" put grades into the targets, "scored" also the scores.
        target_scores: put `dataset.scores` into the targets.
        no_duplicates: no text appears in two rows of a batch, be it a query, document or hard negative (`apart` of
            `Sampler`). Equal documents are never each other's negatives anyway; this is for equal queries and for
            losses that want one document per query.

    Raises:
        ValueError: nothing to train on, no query with `num_negatives` hard negatives, a missing score.
    """
    rows = list_examples(dataset, examples)
    collate = Collate(
        dataset,
        pack,
        num_negatives=num_negatives,
        relevance=examples != "pairs",
        target_scores=target_scores or examples == "scored",
        merge_equal_texts=merge_equal_texts,
        passages=passages,
        windows_per_document=windows_per_document,
        seed=seed,
    )
    check_listed(rows, collate)
    options = {"batch_size": batch_size, "batch_tokens": batch_tokens, "seed": seed, "length_window": length_window}
    counter = TokenCounter(pack, passages=passages, windows_per_document=windows_per_document)
    return Batches(rows, make_sampler(rows, collate, counter, no_duplicates=no_duplicates, **options), collate)


def make_sampler(
    examples: Sequence[Example], collate: Collate, counter: TokenCounter, *, no_duplicates: bool, **options: Any
) -> Sampler:
    """A `Sampler` with `options` for examples that `collate` will turn into batches."""

    def tokens() -> list[int]:
        listed = [collate.listed(example) for example in examples]
        queries = counter([collate.dataset.queries[query_id] for query_id, _ in examples], role="query")
        used = list(dict.fromkeys(i for ids in listed for i in ids))
        documents = dict(zip(used, counter([collate.texts[i] for i in used], role="document"), strict=True))
        return [count + sum(documents[i] for i in ids) for count, ids in zip(queries, listed, strict=True)]

    apart = None
    if no_duplicates:
        apart = (
            [collate.dataset.queries[example[0]], *(collate.texts[i] for i in collate.listed(example))]
            for example in examples
        )
    return Sampler(len(examples), tokens=tokens, apart=apart, **options)


def check_listed(examples: Sequence[Example], collate: Collate) -> None:
    """Raises `ValueError` when hard negatives or scores that `collate` needs are missing."""
    dataset = collate.dataset
    if collate.num_negatives:
        most = max(len(dataset.negatives.get(query_id, ())) for query_id, _ in examples)
        if collate.num_negatives > most:
            raise ValueError(
                f"num_negatives is {collate.num_negatives}, but no query has more than {most} hard negatives"
            )
    for example in examples if collate.target_scores else ():
        for document_id in collate.listed(example):
            if document_id not in dataset.scores.get(example[0], {}):
                raise ValueError(f"query {example[0]!r} has no score for document {document_id!r}")
