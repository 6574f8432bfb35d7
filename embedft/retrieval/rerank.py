"""Cross-encoders in retrieval: rescoring a run, and scores of a teacher for training.

    run = rerank(scorer, dataset, bm25_run(dataset, tokenize=embedder.tokenize), depth=100)
    evaluate_run(run, dataset).metrics["ndcg@10"]
    taught = with_scores(scorer, mine(embedder, dataset))        # then: loss={"name": "listwise_kl"}

Shapes: Q queries, K documents of each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ..data.dataset import RetrievalDataset
from ..progress import progress_bar
from .run import Run

AT_A_TIME = 64  # queries


class SupportsScore(Protocol):
    """What these functions need of a `Scorer`."""

    def score(self, pairs: Sequence[tuple[str, str]], *, sigmoid: bool | None, progress: bool | None) -> np.ndarray: ...


def rerank(scorer: SupportsScore, dataset: RetrievalDataset, run: Run, *, depth: int = 100) -> Run:
    """The first `depth` documents of each query, ordered by the scorer's logits; equal ones by id. The rest is dropped.
    Raises `ValueError` for a `depth` below 1 or an id that is not in the dataset."""
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1")
    for kind, ids, known in (("query", run.query_ids, dataset.queries), ("document", run.document_ids, dataset.texts)):
        if unknown := [i for i in ids if i not in known]:
            raise ValueError(f"run: {kind} id {unknown[0]!r} is not in the dataset ({len(unknown):,} such ids)")
    listed = {query_id: list(row)[:depth] for query_id, row in run.to_dict().items()}
    return Run.from_dict(score_listed(scorer, dataset, listed, sigmoid=False))


def with_scores(scorer: SupportsScore, dataset: RetrievalDataset) -> RetrievalDataset:
    """The dataset with the scorer's logits of each query's relevant documents and hard negatives as `scores`, the
    teacher's for `listwise_kl` and `margin_mse`; the rest is unchanged."""
    listed = {i: [*dataset.relevant(i), *dataset.negatives.get(i, ())] for i in dataset.queries}
    return dataclasses.replace(dataset, scores=score_listed(scorer, dataset, listed, sigmoid=False))


def score_listed(
    scorer: SupportsScore,
    dataset: RetrievalDataset,
    listed: Mapping[str, Sequence[str]],
    *,
    sigmoid: bool | None = None,
) -> dict[str, dict[str, float]]:
    """{query id: {document id: score}} for the documents listed for each query, those of a few queries at a time."""
    scores, query_ids = {}, [query_id for query_id, documents in listed.items() if documents]
    with progress_bar(len(query_ids), "score", unit="query") as bar:
        for start in range(0, len(query_ids), AT_A_TIME):
            part = query_ids[start : start + AT_A_TIME]
            pairs = [(dataset.queries[i], dataset.texts[document]) for i in part for document in listed[i]]
            found = iter(scorer.score(pairs, sigmoid=sigmoid, progress=False).tolist())
            scores |= {i: {document: next(found) for document in listed[i]} for i in part}
            bar.update(len(part))
    return scores
