"""A dataset's training pairs in seeded, shuffled batches.

One example is one (query, relevant document) pair. An epoch is a permutation of them that follows from seed and
epoch alone, so training resumes anywhere from two numbers. In a batch a document is there once, however many of its
queries are, and every pair that the data knows to be relevant is marked: no query's own document is its negative.

    batches = Batches(dataset, embedder.pack, batch_size=64, seed=0)
    for batch in batches.epoch(0): ...

Shapes: B pairs of a batch, G listed documents a query, K known pairs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..encoders.packing import Packed
from ..losses.targets import Targets
from .dataset import RetrievalDataset


class Batch(NamedTuple):
    """What a training step gets: packed texts, what is relevant to whom, and the ids for messages."""

    queries: Packed  # B sequences
    documents: Packed  # M sequences
    targets: Targets
    query_ids: list[str]  # [B]
    document_ids: list[str]  # [M]


class Batches:
    """Batches of a dataset, by epoch.

    Args:
        dataset: pairs are its qrels with a grade above 0.
        pack: (texts, role="query" | "document") -> Packed, as `Embedder.pack`.
        batch_size: pairs a batch; the last batch of an epoch may be smaller.
        seed: of the order; epoch e is `torch.randperm` from a generator seeded with seed + e, as in the trainer of
            sentence-transformers.
        num_negatives: hard negatives listed for each query, the first ones that the dataset has for it.

    Raises:
        ValueError: no pairs, or a query with fewer than `num_negatives` hard negatives.
    """

    def __init__(
        self,
        dataset: RetrievalDataset,
        pack: Callable[..., Packed],
        *,
        batch_size: int,
        seed: int,
        num_negatives: int = 0,
    ):
        self.pairs = [(q, d) for q, grades in dataset.qrels.items() for d, grade in grades.items() if grade > 0]
        if not self.pairs:
            raise ValueError("the training set has no pair of a query and a document relevant to it")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        for query_id, _ in self.pairs if num_negatives else ():
            found = len(dataset.negatives.get(query_id, ()))
            if found < num_negatives:
                raise ValueError(f"query {query_id!r} has {found} hard negatives, num_negatives is {num_negatives}")
        self.dataset, self.pack = dataset, pack
        self.batch_size, self.seed, self.num_negatives = batch_size, seed, num_negatives
        self.texts = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.pairs) // self.batch_size)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), from batch `start` on."""
        order = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(self.seed + number)).tolist()
        for first in range(start * self.batch_size, len(order), self.batch_size):
            yield self.collate([self.pairs[i] for i in order[first : first + self.batch_size]])

    def collate(self, pairs: list[tuple[str, str]]) -> Batch:
        """A batch of the pairs given: positives first, then the hard negatives, each document once."""
        query_ids = [query_id for query_id, _ in pairs]
        listed = [[document_id] for _, document_id in pairs]
        if self.num_negatives:
            for documents, query_id in zip(listed, query_ids, strict=True):
                documents += self.dataset.negatives[query_id][: self.num_negatives]
        # Column by column: all positives, then all first hard negatives, and so on.
        column = {}
        for documents in zip(*listed, strict=True):
            for document_id in documents:
                column.setdefault(document_id, len(column))
        known = [
            (row, column[document_id])
            for row, query_id in enumerate(query_ids)
            for document_id, grade in self.dataset.qrels[query_id].items()
            if grade > 0 and document_id in column
        ]
        targets = Targets(
            group=torch.tensor([[column[document_id] for document_id in documents] for documents in listed]),
            known=torch.tensor(known),
        )
        return Batch(
            queries=self.pack([self.dataset.queries[query_id] for query_id in query_ids], role="query"),
            documents=self.pack([self.texts[document_id] for document_id in column], role="document"),
            targets=targets,
            query_ids=query_ids,
            document_ids=list(column),
        )
