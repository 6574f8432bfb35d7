"""Batches of a dataset by epoch, from a list of examples, a sampler and a collate function, each replaceable.

    batches = make_batches(dataset, embedder.pack, batch_size=64, seed=0)
    for batch in batches.epoch(0): ...

    batches = Batches(batches.examples, MySampler(), batches.collate)       # anything with __len__ and plan(epoch)
    batches = Batches([("q1", "d1"), ("q2", "d2")], sampler, my_collate)    # or every part your own

An epoch depends only on the seed and its number, so training can resume from an epoch and a batch number.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..encoders.packing import Packed
from .collate import Batch, Collate, Example
from .dataset import RetrievalDataset
from .sampler import Sampler

ExampleKind = Literal["pairs", "queries", "lists", "scored", "texts"]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches by epoch."""

    examples: Sequence[Example]  # the training examples, see `list_examples`
    sampler: Sampler  # len(sampler) batches per epoch; sampler.plan(epoch) lists each one's indices in `examples`
    collate: Callable[..., Batch]  # (examples of a batch, draw=(epoch, batch)) -> Batch; `Collate` is one

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of epoch `number` (from 0), starting at batch `start`, 0 to len(self)."""
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
    examples: ExampleKind = "pairs",
    target_scores: bool = False,
    no_duplicates: bool = False,
    **options: Any,
) -> Batches:
    """Batches of one dataset.

    Args:
        batch_size, batch_tokens, seed: see `Sampler`; pack, options: see `Collate`. Tokens of queries, documents and
            hard negatives are counted as `pack` truncates them, when the first batch is needed.
        examples: see `list_examples`. All but "pairs" put grades into the targets, "scored" also the scores.
        target_scores: put `dataset.scores` into the targets.
        no_duplicates: no query, document or hard negative appears in two rows of a batch. Equal documents are never
            each other's negatives anyway; use this for equal queries, or for losses that need one document per row.

    Raises `ValueError` without training examples, for too high a `num_negatives`, or for a missing score."""
    rows = list_examples(dataset, examples)
    scores = {"relevance": examples != "pairs", "target_scores": target_scores or examples == "scored"}
    collate = Collate(dataset, pack, seed=seed, **scores, **options)
    most = max(len(dataset.negatives.get(query_id, ())) for query_id, _ in rows)
    if collate.num_negatives > most:
        raise ValueError(f"num_negatives is {collate.num_negatives}, but no query has more than {most} hard negatives")
    for row in rows if collate.target_scores else ():
        if unscored := [i for i in collate.listed(row) if i not in dataset.scores.get(row[0], {})]:
            raise ValueError(f"query {row[0]!r} has no score for document {unscored[0]!r}")
    texts = [[dataset.queries[row[0]], *(dataset.texts[i] for i in collate.listed(row))] for row in rows]

    @functools.cache
    def tokens() -> list[int]:
        of_query = collate.count_tokens([query for query, *_ in texts], role="query")
        of_document = collate.count_tokens([text for _, *documents in texts for text in documents], role="document")
        return [of_query[query] + sum(of_document[text] for text in documents) for query, *documents in texts]

    how = {"batch_size": batch_size, "batch_tokens": batch_tokens, "tokens": tokens}
    return Batches(rows, Sampler(len(rows), seed=seed, apart=texts if no_duplicates else [], **how), collate)


def list_examples(dataset: RetrievalDataset, kind: ExampleKind = "pairs") -> list[Example]:
    """The examples of a dataset, in its order. Raises `ValueError` if there are none.
    `kind` is "pairs": every query with every relevant document; "queries": every query once, with all its relevant
    documents; "lists": the same, and every query that has hard negatives alone; "scored": every query with every
    document that `dataset.scores` has for it, relevant or not; or "texts": each query with some document, in order and
    whatever is known of the two, where the shorter side starts over until the longer one ends."""
    if kind not in (kinds := get_args(ExampleKind)):
        raise ValueError(f"examples is {kind!r}, expected one of {', '.join(kinds)}")
    if kind == "scored":
        examples = [(q, d) for q, scores in dataset.scores.items() for d in scores]
    elif kind == "texts":
        queries, documents = list(dataset.queries), list(dataset.corpus)
        number = max(len(queries), len(documents))
        examples = [(queries[i % len(queries)], documents[i % len(documents)]) for i in range(number)]
    elif kind == "lists":
        examples = [(q, None) for q in dataset.queries if dataset.relevant(q) or dataset.negatives.get(q)]
    elif kind == "queries":
        examples = [(q, None) for q in dataset.qrels if dataset.relevant(q)]
    else:
        examples = [(q, d) for q in dataset.qrels for d in dataset.relevant(q)]
    if not examples:
        scored, relevant_to_it = ("scored ", "") if kind == "scored" else ("", " relevant to it")
        raise ValueError(f"the training set has no {scored}pair of a query and a document{relevant_to_it}")
    return examples
