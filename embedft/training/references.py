"""What is encoded before training: the vectors of reference models, and the windows most similar to each query.

    guide = FrozenEmbeddings(load_embedder("BAAI/bge-base-en-v1.5"), dataset)
    train(embedder, batches, loss, config, references={"guide": guide})
    collate = replace(batches.collate, best_windows=best_windows(embedder, batches))

Shapes: B queries and M documents of a batch, W windows of some documents, D features.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batches
from ..data.collate import Batch
from ..data.dataset import RetrievalDataset
from ..encoders.embedder import Embedder
from ..losses.targets import Targets

Reference = Callable[[Batch], tuple[Tensor, Tensor]]


class FrozenEmbeddings:
    """Batch -> (Q [B, D], D [M, D]) on the CPU, looked up by id among the texts of a dataset, which are encoded once.
    `dim` is as in `Embedder.encode`. Calls raise `ValueError` for an id that is not in the dataset."""

    def __init__(
        self,
        embedder: Embedder,
        dataset: RetrievalDataset,
        *,
        dim: int | None = None,
        roles: Sequence[str] = ("query", "document"),
    ):
        self.embeddings, self.row = {}, {}
        for role in roles:
            texts = dataset.queries if role == "query" else dataset.texts
            self.embeddings[role] = embedder.encode(list(texts.values()), role=role, dim=dim)
            self.row[role] = {id_: row for row, id_ in enumerate(texts)}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.vectors("query", batch), self.vectors("document", batch)

    def vectors(self, role: str, batch: Batch) -> Tensor:
        """Those of one side of a batch."""
        ids, row = batch.query_ids if role == "query" else batch.document_ids, self.row[role]
        if missing := [id_ for id_ in ids if id_ not in row]:
            raise ValueError(f"{role} {missing[0]!r} is not among the {len(row):,} frozen embeddings")
        return torch.from_numpy(self.embeddings[role][[row[id_] for id_ in ids]])


def targets_with(references: Mapping[str, Reference], batch: Batch) -> Targets:
    """The batch's targets with the vectors of every reference, [B, E] and [C, E] by name, without gradient."""
    if not references:
        return batch.targets
    with torch.no_grad():
        found = {name: tuple(X.detach() for X in reference(batch)) for name, reference in references.items()}
    return replace(batch.targets, references={**batch.targets.references, **found})


def best_windows(embedder: Embedder, batches: Batches, *, at_a_time: int = 4_096) -> dict[str, dict[str, int]]:
    """{query id: {document id: its most similar window, the first on ties}}, for documents with several windows."""
    collate = batches.collate
    queries_of: dict[str, dict[str, None]] = defaultdict(dict)
    for example in batches.examples:
        for document_id in collate.listed(example):
            queries_of[document_id][example[0]] = None
    query_ids = list(dict.fromkeys(query_id for query_id, _ in batches.examples))
    queries = embedder.encode([collate.dataset.queries[i] for i in query_ids], role="query", dim=embedder.full_dim)
    row = {query_id: i for i, query_id in enumerate(query_ids)}
    document_ids, best = list(queries_of), defaultdict(dict)
    for start in range(0, len(document_ids), at_a_time):
        part = document_ids[start : start + at_a_time]
        texts = [collate.dataset.texts[i] for i in part]
        vectors_WD, source_W = embedder.encode_passages(texts, collate.passages, dim=embedder.full_dim)
        edges = np.searchsorted(source_W, np.arange(len(part) + 1)).tolist()
        for document_id, first, last in zip(part, edges, edges[1:], strict=False):
            if last - first > 1:
                asking = list(queries_of[document_id])
                scores = queries[[row[i] for i in asking]] @ vectors_WD[first:last].T
                for query_id, window in zip(asking, scores.argmax(axis=1).tolist(), strict=True):
                    best[query_id][document_id] = window
    return dict(best)
