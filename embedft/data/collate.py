"""Collates examples into a Batch of packed texts and Targets.

    collate = Collate(dataset, embedder.pack, num_negatives=2)
    batch = collate([("q1", "d1"), ("q2", "d2")])

A document appears once per batch, however many queries list it. Every pair known to be relevant is marked, so that no
query's own document becomes its negative, and so is one of equal texts; rows with the same query are marked, too.

Shapes: B queries, M documents, C columns for them (windows, if passages), G listed documents per query, K known pairs.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..encoders.packing import Packed, take
from ..losses.targets import Targets
from .dataset import RetrievalDataset

# A row of a batch: a query and one document, or None for all documents relevant to the query.
Example = tuple[str, str | None]


class Batch(NamedTuple):
    """The input of a training step: packed texts, targets, and ids for messages."""

    queries: Packed  # B sequences
    documents: Packed  # M sequences; with passages C, and `source` says which document each belongs to
    targets: Targets
    query_ids: list[str]  # [B]
    document_ids: list[str]  # [M]
    sources: list[str] | None = None  # [B], each query's dataset; None: there is only one


@dataclass(frozen=True, eq=False)
class Collate:
    """Turns examples into a Batch, merging documents of equal text (title included) under the first id.
    With `passages`, (size, stride) in tokens, `pack` cuts documents into windows: columns with the document's number.
    Each has at most `windows_per_document`: the best one for each of its queries in the batch, then random ones."""

    dataset: RetrievalDataset
    pack: Callable[..., Packed]  # (texts, role="query" | "document") -> Packed, as Embedder.pack
    num_negatives: int = 0  # maximum hard negatives per query: the first in the dataset
    relevance: bool = False  # put the grades of listed documents into the targets
    target_scores: bool = False  # put `dataset.scores` of listed documents into the targets
    passages: Sequence[int] | None = None
    windows_per_document: int = 4
    # {query id: {document id: number of the best window}}, see training/references.py
    best_windows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seed: int = 0  # for the random windows
    with_sources: bool = False  # fill `Batch.sources` with the part of each query id before its "/" (mixture.py)

    def __post_init__(self) -> None:
        for name, least in (("num_negatives", 0), ("windows_per_document", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")

    def listed(self, example: Example) -> list[str]:
        """The documents listed for an example: its own, then its hard negatives (a scored one may be both)."""
        query_id, document_id = example
        listed = self.dataset.relevant(query_id) if document_id is None else [document_id]
        negatives = self.dataset.negatives.get(query_id, ())[: self.num_negatives]
        return listed + [i for i in negatives if i != document_id]

    def count_tokens(self, texts: Sequence[str], *, role: str) -> dict[str, int]:
        """{text: its tokens as packed}; with passages, those of a document's `windows_per_document` longest windows."""
        distinct, counts, at_a_time = list(dict.fromkeys(texts)), [], 1_024
        for part in (distinct[first : first + at_a_time] for first in range(0, len(distinct), at_a_time)):
            if role == "query" or self.passages is None:
                counts += self.pack(part, role=role).lengths().tolist()
            else:
                packed = self.pack(part, role=role, passages=self.passages)
                windows = packed.lengths().split(packed.source.bincount().tolist())
                counts += [int(x.sort(descending=True)[0][: self.windows_per_document].sum()) for x in windows]
        return dict(zip(distinct, counts, strict=True))

    def __call__(self, examples: Sequence[Example], *, draw: tuple[int, int] = (0, 0)) -> Batch:
        """Collates examples; `draw`, usually (epoch, batch), and the seed decide which windows are drawn."""
        query_ids = [query_id for query_id, _ in examples]
        # {text: document id}, for each row and for the batch.
        rows = [(example[0], self._distinct(self.listed(example))) for example in examples]
        # All first listed documents, then all second ones, and so on.
        in_order = itertools.chain(*itertools.zip_longest(*(row.values() for _, row in rows)))
        documents = self._distinct(i for i in in_order if i is not None)
        column_of = {text: column for column, text in enumerate(documents)}
        # As in ArguAna and Quora, a document may be the query itself: no answer could score higher.
        never = {
            q: [self.dataset.queries[q], *map(self.dataset.texts.get, self.dataset.relevant(q))] for q in query_ids
        }
        pairs = ((row, text) for row, q in enumerate(query_ids) for text in never[q])
        known = dict.fromkeys((row, column_of[text]) for row, text in pairs if text in column_of)
        packed = self._pack_documents(documents, rows, draw)
        number_of = {query_id: number for number, query_id in enumerate(dict.fromkeys(query_ids))}
        has_twice = len(number_of) < len(query_ids)
        targets = self._targets(rows, [[column_of[text] for text in row] for _, row in rows])
        targets = replace(
            targets,
            known=torch.tensor(list(known), dtype=torch.int64).reshape(-1, 2),
            document=None if self.passages is None else packed.source,
            query=torch.tensor([number_of[query_id] for query_id in query_ids]) if has_twice else None,
        )
        queries = self.pack([self.dataset.queries[query_id] for query_id in query_ids], role="query")
        sources = [query_id.partition("/")[0] for query_id in query_ids] if self.with_sources else None
        return Batch(queries, packed, targets, query_ids, list(documents.values()), sources)

    def _targets(self, rows: list[tuple[str, dict[str, str]]], columns: list[list[int]]) -> Targets:
        """Group, relevance and target scores; `columns`: those of the documents of each row."""
        width = max(1 + self.num_negatives, *(len(row) for _, row in rows))

        def look_up(given: Mapping[str, Mapping[str, float]]) -> Tensor:
            return _table([[given.get(q, {}).get(i, 0) for i in row.values()] for q, row in rows], width, 0).float()

        return Targets(
            group=_table(columns, width, -1),
            relevance=look_up(self.dataset.qrels) if self.relevance else None,
            target_scores=look_up(self.dataset.scores) if self.target_scores else None,
        )

    def _distinct(self, document_ids: Iterable[str]) -> dict[str, str]:
        """{text: the first document id that has it}."""
        distinct: dict[str, str] = {}
        for document_id in document_ids:
            distinct.setdefault(self.dataset.texts[document_id], document_id)
        return distinct

    def _pack_documents(self, documents: dict[str, str], rows: list[tuple[str, dict]], draw: tuple[int, int]) -> Packed:
        """The packed documents of a batch; as passages, at most `windows_per_document` windows of each, in order."""
        if self.passages is None:
            return self.pack(list(documents), role="document")
        packed = self.pack(list(documents), role="document", passages=self.passages)
        best: dict[str, list[int]] = {text: [] for text in documents}
        for query_id, row in rows:
            of_query = self.best_windows.get(query_id, {})
            for text, document_id in row.items():
                best[text] += [of_query[document_id]] if document_id in of_query else []
        generator = np.random.default_rng([self.seed % 2**64, *draw])
        kept, first = [], 0
        for (text, windows), count in zip(best.items(), packed.source.bincount().tolist(), strict=True):
            if (last := max(windows, default=0)) >= count:
                raise ValueError(f"document {documents[text]!r} has {count} windows, but its best window is {last}")
            chosen = range(count)
            if count > self.windows_per_document:
                # Its queries' best windows, in the order of the batch, then all in random order.
                order = dict.fromkeys([*windows, *generator.permutation(count).tolist()])
                chosen = sorted(itertools.islice(order, self.windows_per_document))
            kept += [first + window for window in chosen]
            first += count
        return take(packed, torch.tensor(kept))


@dataclass(frozen=True, eq=False)
class PairCollate(Collate):
    """Collates for a cross-encoder: the batch's documents are pairs of a query and a document listed for it, one column
    each, so only losses over listed documents can use them. `pack`, `pack_pairs`: as `Scorer.pack`, `pack_pairs`."""

    pack_pairs: Callable[[Sequence[tuple[str, str]]], Packed] | None = None

    def __call__(self, examples: Sequence[Example], *, draw: tuple[int, int] = (0, 0)) -> Batch:
        """Collates examples; nothing is drawn."""
        rows = [(example[0], self._distinct(self.listed(example))) for example in examples]
        texts = [self.dataset.queries[query_id] for query_id, _ in rows]
        pairs = [(text, document) for text, (_, row) in zip(texts, rows, strict=True) for document in row]
        places = itertools.count()
        targets = self._targets(rows, [[next(places) for _ in row] for _, row in rows])
        document_ids = [document_id for _, row in rows for document_id in row.values()]
        queries = self.pack(texts, role="query")
        return Batch(queries, self.pack_pairs(pairs), targets, [query_id for query_id, _ in rows], document_ids)


def _table(rows: list[list[float]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
