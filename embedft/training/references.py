"""Vectors of a guide, a teacher or the base model, looked up by id; losses find them in `Targets.references`.

    guide = FrozenEmbeddings(load_embedder("BAAI/bge-base-en-v1.5"), dataset)
    train(embedder, batches, loss, config, references={"guide": guide})

Shapes: B queries and M documents of a batch, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..data.collate import Batch
from ..data.dataset import RetrievalDataset
from ..encoders.embedder import Embedder
from ..losses.targets import Targets

Reference = Callable[[Batch], tuple[Tensor, Tensor]]


class FrozenEmbeddings:
    """Batch -> (Q [B, D], D [M, D]) on the CPU: the texts of a dataset, encoded once, by id.

    `dim` is that of `Embedder.encode`. Calls raise `ValueError` for an id that is not in the dataset.
    """

    def __init__(self, embedder: Embedder, dataset: RetrievalDataset, *, dim: int | None = None):
        queries = embedder.encode(list(dataset.queries.values()), role="query", dim=dim)
        documents = embedder.encode(dataset.document_texts(), role="document", dim=dim)
        ids = {"query": dataset.queries, "document": dataset.corpus}
        self.row = {role: {id_: row for row, id_ in enumerate(ids[role])} for role in ids}
        self.embeddings = {"query": queries, "document": documents}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = []
        for role, ids in (("query", batch.query_ids), ("document", batch.document_ids)):
            row = self.row[role]
            if missing := [id_ for id_ in ids if id_ not in row]:
                raise ValueError(f"{role} {missing[0]!r} is not among the {len(row):,} frozen embeddings")
            found.append(torch.from_numpy(self.embeddings[role][[row[id_] for id_ in ids]]))
        return tuple(found)


def targets_with(references: Mapping[str, Reference], batch: Batch) -> Targets:
    """The batch's targets with the vectors of every reference, [B, E] and [C, E] by name, without gradient."""
    if not references:
        return batch.targets
    with torch.no_grad():
        found = {name: tuple(X.detach() for X in reference(batch)) for name, reference in references.items()}
    return replace(batch.targets, references={**batch.targets.references, **found})
