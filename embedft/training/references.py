"""Vectors that stay fixed in training, looked up by id: those of a guide, a teacher or the base model.

Each text is encoded once, before the first step. Losses find them in `Targets.references`.

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
    """Batch -> (Q [B, D], D [M, D]): the rows of two arrays [queries, D] and [documents, D] for the batch's ids.

    Each id occurs once.
    """

    def __init__(
        self,
        query_ids: Sequence[str],
        query_embeddings: np.ndarray,
        document_ids: Sequence[str],
        document_embeddings: np.ndarray,
    ):
        self.queries = _Rows("query", query_ids, query_embeddings)
        self.documents = _Rows("document", document_ids, document_embeddings)

    @classmethod
    def encode(cls, embedder: Any, dataset: RetrievalDataset, *, dim: int | None = None) -> "FrozenEmbeddings":
        """Encodes the queries and documents of `dataset` with an `Embedder`, or anything with its `encode`.

        Keeps `dim` leading features; None: as many as `encode` returns.
        """
        options = {} if dim is None else {"dim": dim}
        return cls(
            list(dataset.queries),
            embedder.encode(list(dataset.queries.values()), role="query", **options),
            list(dataset.corpus),
            embedder.encode(dataset.document_texts(), role="document", **options),
        )

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
            raise ValueError(
                f"reference {name!r} gave {len(Q)} and {len(D)} vectors, expected {expected[0]} and {expected[1]}:"
                " one per query and one per document of the batch"
            )
        found[name] = Q, D
    return replace(batch.targets, references=found)
