"""The losses that an adapter is fitted with, step by step: over the whole corpus, or over the step's own documents.

Shapes: N queries, B queries or pairs of a step, C document vectors of a step, G listed documents, D features.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..encoders.adapter import Adapter
from ..losses.registry import Loss
from ..losses.targets import Targets
from .corpus_softmax import Documents, Pairs, full_corpus_softmax

Make = Callable[[list[int]], Callable[[], Tensor]]  # examples of a step, as numbers -> what computes their loss


def every_loss(make: Make, num_examples: int, size: int, *, shuffle: bool, seed: int) -> Iterator[Callable[[], Tensor]]:
    """What computes the loss of each step, `size` examples at a time, without end."""
    generator, order = torch.Generator().manual_seed(seed), list(range(num_examples))
    if size == num_examples:
        yield from itertools.repeat(make(order))
    while True:
        if shuffle:
            order = torch.randperm(num_examples, generator=generator).tolist()
        for first in range(0, num_examples, size):
            yield make(order[first : first + size])


def full_corpus_losses(
    adapter: Adapter, queries_ND: Tensor, documents: Documents, relevant: Mapping[int, list[int]], *, temperature: float
) -> tuple[Make, int]:
    """What makes the softmax over all documents of some queries, and the number of queries."""
    query_rows = list(relevant)

    def make(chosen: list[int]) -> Callable[[], Tensor]:
        rows = [query_rows[i] for i in chosen]
        pairs, batch_BD = Pairs.of(relevant, rows, documents), queries_ND[rows]
        options = {"temperature": temperature, "document_map": adapter.document}
        return lambda: full_corpus_softmax(adapter(batch_BD, "query"), documents, pairs, **options)

    return make, len(query_rows)


def in_batch_losses(
    adapter: Adapter,
    queries_ND: Tensor,
    documents: Documents,
    graded: Mapping[int, Mapping[int, int]],
    loss: Loss,
    *,
    merge_documents: bool,
) -> tuple[Make, int]:
    """What makes `loss` of some pairs, and the number of pairs.

    A row lists a document that answers, then the query's hard negatives.
    """
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
        D_CD = documents.vectors(torch.tensor([w for places in windows for w in places], device=device), unit=False)
        targets = Targets(
            document=None if documents.source is None else document_C,
            group=group_BG.to(device),
            known=known,
            target_scores=scores_BG.to(device),
            references=dict.fromkeys(("base", "guide", "teacher"), (Q_BD, D_CD)),
        )
        return lambda: loss(adapter(Q_BD, "query"), adapter(D_CD, "document"), targets)

    return make, len(examples)
