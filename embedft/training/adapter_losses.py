"""The losses that an adapter is fitted with, batch by batch: over the whole corpus, or over the batch's own documents.

    epochs = full_corpus_losses(adapter, queries_ND, documents, relevant, temperature=0.03, batch_size=64, ...)
    for compute in epochs.epoch():
        compute().backward()

Shapes: N queries, B queries or pairs of a step, C document vectors of a step, G listed documents, D features.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..encoders.adapter import Adapter
from ..losses.registry import Loss
from ..losses.targets import Targets
from .corpus_softmax import Documents, Pairs, full_corpus_softmax


class Epochs:
    """The batches of an epoch, as functions that compute their loss.

    Args:
        make: (examples of a batch, as numbers) -> the function.
    """

    def __init__(self, num_examples: int, make: Callable, *, batch_size: int | None, shuffle: bool, seed: int):
        self.size, self.num_examples, self.make = min(batch_size or num_examples, num_examples), num_examples, make
        self.shuffle = shuffle and self.size < num_examples
        self.generator, self._all = torch.Generator().manual_seed(seed), None

    def __len__(self) -> int:
        return -(-self.num_examples // self.size)

    def epoch(self) -> Iterator[Callable[[], Tensor]]:
        if self.size == self.num_examples:
            # Always the same batch: prepared once.
            self._all = self._all or self.make(list(range(self.num_examples)))
            yield self._all
            return
        order = range(self.num_examples)
        if self.shuffle:
            order = torch.randperm(self.num_examples, generator=self.generator).tolist()
        for first in range(0, self.num_examples, self.size):
            yield self.make(list(order[first : first + self.size]))


def full_corpus_losses(
    adapter: Adapter,
    queries_ND: Tensor,
    documents: Documents,
    relevant: Mapping[int, list[int]],
    *,
    temperature: float,
    **order: int | bool | None,
) -> Epochs:
    """The softmax over all documents, of some queries at a time."""
    query_rows = list(relevant)

    def make(chosen: list[int]) -> Callable[[], Tensor]:
        rows = [query_rows[i] for i in chosen]
        pairs, batch_BD = Pairs.of(relevant, rows, documents), queries_ND[rows]
        options = {"temperature": temperature, "document_map": adapter.document}
        return lambda: full_corpus_softmax(adapter(batch_BD, "query"), documents, pairs, **options)

    return Epochs(len(query_rows), make, **order)


def in_batch_losses(
    adapter: Adapter,
    queries_ND: Tensor,
    documents: Documents,
    graded: Mapping[int, Mapping[int, int]],
    loss: Loss,
    *,
    merge_documents: bool,
    **order: int | bool | None,
) -> Epochs:
    """`loss` of some pairs at a time: each row lists a document that answers, then the query's hard negatives."""
    relevant = {q: sorted(place for place, grade in grades.items() if grade > 0) for q, grades in graded.items()}
    negatives = {q: sorted(grades.keys() - relevant[q]) for q, grades in graded.items()}
    examples = [(q, [place, *negatives[q]]) for q in relevant for place in relevant[q]]
    num_listed, device = max(len(places) for _, places in examples), queries_ND.device

    def make(chosen: list[int]) -> Callable[[], Tensor]:
        rows, lists = zip(*(examples[i] for i in chosen), strict=True)
        columns: dict[tuple[int, int], int] = {}  # of a document (place), or of a row's own (row, place)
        group_BG = torch.full((len(rows), num_listed), -1)
        scores_BG = torch.zeros(len(rows), num_listed, dtype=queries_ND.dtype)
        for b, (q, places) in enumerate(zip(rows, lists, strict=True)):
            keys = [(0 if merge_documents else b, place) for place in places]
            group_BG[b, : len(keys)] = torch.tensor([columns.setdefault(key, len(columns)) for key in keys])
            scores_BG[b, : len(keys)] = torch.tensor([graded[q][place] for place in places])
        known = None
        if merge_documents:
            known = [(b, columns[0, p]) for b, q in enumerate(rows) for p in relevant[q] if (0, p) in columns]
            known = torch.tensor(known, device=device)
        Q_BD = queries_ND[list(rows)]
        windows = [documents.windows(place) for _, place in columns]
        document_C = torch.tensor([column for column, places in enumerate(windows) for _ in places], device=device)
        D_CD = documents.take(torch.tensor([w for places in windows for w in places], device=device), unit=False)
        targets = Targets(
            document=None if documents.source is None else document_C,
            group=group_BG.to(device),
            known=known,
            target_scores=scores_BG.to(device),
            references=dict.fromkeys(("base", "guide", "teacher"), (Q_BD, D_CD)),
        )
        return lambda: loss(adapter(Q_BD, "query"), adapter(D_CD, "document"), targets)

    return Epochs(len(examples), make, **order)
