"""Vectors of a guide, a teacher or the base model, looked up by id; losses find them in `Targets.references`.

    guide = FrozenEmbeddings.encode(load_embedder("BAAI/bge-base-en-v1.5"), dataset)
    train(embedder, batches, loss, config, references={"guide": guide})

Shapes: B queries and M documents of a batch, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.collate import Batch
from ..data.dataset import RetrievalDataset
from ..losses.targets import Targets

Reference = Callable[[Batch], tuple[Tensor, Tensor]]


class FrozenEmbeddings:
    """Batch -> (Q [B, D], D [M, D]): the rows of two arrays [ids, D] for the batch's ids. Each id occurs once."""

    def __init__(
        self, query_ids: Sequence[str], queries: np.ndarray, document_ids: Sequence[str], documents: np.ndarray
    ):
        self.queries, self.documents = _Rows("query", query_ids, queries), _Rows("document", document_ids, documents)

    @classmethod
    def encode(cls, embedder: Any, dataset: RetrievalDataset, *, dim: int | None = None) -> "FrozenEmbeddings":
        """Encodes a dataset with an `Embedder`, or anything with the same `encode`; `dim` None: all features."""
        options = {} if dim is None else {"dim": dim}
        queries = embedder.encode(list(dataset.queries.values()), role="query", **options)
        documents = embedder.encode(dataset.document_texts(), role="document", **options)
        return cls(list(dataset.queries), queries, list(dataset.corpus), documents)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Q [B, D], D [M, D]) on the CPU. Raises `ValueError` for an id that has no vector."""
        return self.queries.of(batch.query_ids), self.documents.of(batch.document_ids)


class _Rows:
    """An array whose rows have ids."""

    def __init__(self, kind: str, ids: Sequence[str], embeddings: np.ndarray):
        if embeddings.ndim != 2 or len(embeddings) != len(ids):
            raise ValueError(f"{kind} embeddings have shape {embeddings.shape}, expected [{len(ids):,} ids, features]")
        self.kind, self.embeddings = kind, embeddings
        self.row = {id_: row for row, id_ in enumerate(ids)}
        if len(self.row) < len(ids):
            raise ValueError(f"{len(ids):,} {kind} ids, but only {len(self.row):,} different ones: expected each once")

    def of(self, ids: Sequence[str]) -> Tensor:
        missing = [id_ for id_ in ids if id_ not in self.row]
        if missing:
            raise ValueError(f"{self.kind} {missing[0]!r} is not among the {len(self.row):,} frozen embeddings")
        return torch.from_numpy(self.embeddings[[self.row[id_] for id_ in ids]])


def targets_with(references: Mapping[str, Reference], batch: Batch) -> Targets:
    """The batch's targets with the vectors of every reference, [B, E] and [C, E] by name, without gradient."""
    if not references:
        return batch.targets
    found = dict(batch.targets.references)
    expected = [batch.queries.num_sequences, batch.documents.num_sequences]
    for name, reference in references.items():
        with torch.no_grad():
            Q, D = (vectors.detach() for vectors in reference(batch))
        if [len(Q), len(D)] != expected:
            wanted = f"{expected[0]} and {expected[1]}, the batch's queries and documents"
            raise ValueError(f"reference {name!r} gave {len(Q)} and {len(D)} vectors, expected {wanted}")
        found[name] = Q, D
    return replace(batch.targets, references=found)
