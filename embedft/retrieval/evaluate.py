"""From an embedder and a dataset, or from a run, to a report.

    before = evaluate(embedder, dataset)
    ...                                     # train
    print(compare(before, evaluate(embedder, dataset), metric="ndcg@10"))     # compare: report.py
    evaluate(embedder, dataset, passages=(128, 64))       # documents by their best window of 128 tokens

What is exact here: search is exhaustive; documents of equal score are ordered by ascending id, at the cut-off too, as
sentence-transformers orders them; queries without a relevant document are left out of the means and counted.

Shapes: Q queries, D dimensions.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from ..data.dataset import RetrievalDataset
from .index import FlatIndex, require_finite
from .metrics import Gain, Qrels, has_relevant, judge, per_query_metrics
from .passages import PassageIndex, check_aggregate
from .report import Report
from .run import Run

# Documents encoded at a time: only the index holds the embeddings of all of them.
DOCUMENT_SLICE = 65_536
# The same where they become windows: a document may have many.
PASSAGES_SLICE = 4_096


class SupportsEncode(Protocol):
    """What `evaluate` asks of an embedder. Rows are of unit length where similarity is "cosine"."""

    similarity: Literal["cosine", "dot"]

    def encode(self, texts: list[str], *, role: str, dim: int | None) -> np.ndarray: ...


def evaluate(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    dim: int | None = None,
    passages: Sequence[int] | None = None,
    aggregate: str = "max",
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    gain: Gain = "binary",
) -> Report:
    """Encodes queries and documents, searches exactly and measures.

    Args:
        dim: leading dimensions to keep (Matryoshka); None: all.
        passages: (size, stride) in tokens: documents are cut into windows as `Embedder.encode_passages` does, the title
            part of the text, and score by them. None: a document is one vector, of as much as the model reads.
        aggregate: how a document scores by its windows: max, mean, first or sum_top_M, see `aggregate_windows`.
        ks: cutoffs of the metrics.
        depth: documents retrieved a query, and the cutoff of MAP. May be larger than the corpus.
        gain: of nDCG, see `metrics.ndcg`.

    Raises:
        ValueError: on a cutoff above `depth`, a dataset in which no query has a relevant document, embeddings that are
            not finite (naming the query or document), or passages of an embedder that cannot cut any.
    """
    _check_cutoffs(ks, depth)
    check_aggregate(aggregate)
    if passages is not None and not hasattr(embedder, "encode_passages"):
        raise ValueError(f"passages is {tuple(passages)}: {type(embedder).__name__} cannot cut documents into windows")
    query_ids = [query_id for query_id in dataset.queries if has_relevant(dataset.qrels.get(query_id, {}))]
    if not query_ids:
        raise ValueError(f"none of the {len(dataset.queries)} queries of the dataset has a relevant document")
    costs: dict[str, float] = {}
    with _timed(costs, "query_encoding_seconds"):
        query_texts = [dataset.queries[query_id] for query_id in query_ids]
        queries_QD = _encode(embedder, query_texts, query_ids, role="query", dim=dim)

    # The index orders ties by row: with the documents in the order of their ids, that is by ascending id.
    document_ids, texts = zip(*sorted(zip(dataset.corpus, dataset.document_texts(), strict=True)), strict=True)
    width = queries_QD.shape[1]
    index = FlatIndex(width) if passages is None else PassageIndex(width, aggregate=aggregate)
    at_once = DOCUMENT_SLICE if passages is None else PASSAGES_SLICE
    for start in range(0, len(texts), at_once):
        part = slice(start, start + at_once)
        with _timed(costs, "document_encoding_seconds"):
            if passages is None:
                added = (_encode(embedder, list(texts[part]), document_ids[part], role="document", dim=dim),)
            else:
                added = embedder.encode_passages(list(texts[part]), passages, role="document", dim=dim)
                require_finite(added[0], "a window of document", [document_ids[part][row] for row in added[1]])
        with _timed(costs, "search_seconds"):
            index.add(*added)
    with _timed(costs, "search_seconds"):
        scores_QK, indices_QK = index.search(queries_QD, depth)

    run = Run(query_ids, list(document_ids), indices_QK, scores_QK)
    report = evaluate_run(run, dataset, ks=ks, depth=depth, gain=gain)
    setting = {"dim": index.dim, "similarity": embedder.similarity, **report.setting}
    costs = {**costs, **report.costs, "bytes_per_document": queries_QD.itemsize * index.dim}
    if passages is not None:
        setting |= {"passages": list(passages), "aggregate": aggregate}
        costs["windows_per_document"] = index.num_windows / len(index)
        costs["bytes_per_document"] *= costs["windows_per_document"]
    return dataclasses.replace(report, setting=setting, costs=costs)


def evaluate_run(
    run: Run,
    dataset_or_qrels: RetrievalDataset | Qrels,
    *,
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    gain: Gain = "binary",
) -> Report:
    """Measures a run from anywhere. A query with relevant documents that the run lacks counts as found nothing.

    Args:
        dataset_or_qrels: qrels as {query id: {document id: grade}}, or a dataset, whose ids are then checked too.
        depth: the cutoff of MAP and the largest allowed in `ks`.

    Raises:
        ValueError: on a query or document that the dataset does not have, a cutoff above `depth`, or when no query has
            a relevant document.
    """
    _check_cutoffs(ks, depth)
    setting = {"depth": depth, "ks": list(ks), "gain": gain}
    if isinstance(dataset_or_qrels, Mapping):
        qrels = dataset_or_qrels
        query_ids = list(dict.fromkeys([*qrels, *run.query_ids]))
    else:
        qrels, query_ids = dataset_or_qrels.qrels, list(dataset_or_qrels.queries)
        _check_known(run.query_ids, dataset_or_qrels.queries, "query", "the dataset")
        _check_known(run.document_ids, dataset_or_qrels.corpus, "document", "the corpus")
        setting["num_documents"] = len(dataset_or_qrels.corpus)
    costs: dict[str, float] = {}
    with _timed(costs, "metrics_seconds"):
        judgments = judge(run.select(query_ids), qrels)
        per_query = per_query_metrics(judgments, ks=ks, depth=depth, gain=gain)
    return Report(
        query_ids=judgments.query_ids,
        per_query=per_query,
        clusters=question_clusters(judgments.query_ids, qrels),
        num_without_relevant=judgments.num_without_relevant,
        setting={**setting, "num_queries": len(judgments.query_ids)},
        costs=costs,
        run=run.select(judgments.query_ids),
    )


def question_clusters(query_ids: Sequence[str], qrels: Qrels) -> list[str]:
    """The cluster of each query: queries that share a relevant document, directly or through others, have one cluster.

    Its id is the smallest id among the relevant documents of the cluster's queries.
    """
    parent: dict[str, str] = {}

    def root(document_id: str) -> str:
        while parent.setdefault(document_id, document_id) != document_id:
            parent[document_id] = parent[parent[document_id]]
            document_id = parent[document_id]
        return document_id

    relevant = [[document_id for document_id, grade in qrels[query_id].items() if grade > 0] for query_id in query_ids]
    for first, *others in relevant:
        for other in others:
            smaller, larger = sorted((root(first), root(other)))
            parent[larger] = smaller
    return [root(document_ids[0]) for document_ids in relevant]


def _encode(
    embedder: SupportsEncode, texts: list[str], ids: Sequence[str], *, role: str, dim: int | None
) -> np.ndarray:
    embeddings = embedder.encode(texts, role=role, dim=dim)
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ValueError(f"{len(texts)} texts were encoded as an array of shape {embeddings.shape}")
    require_finite(embeddings, role, ids)
    return embeddings


def _check_cutoffs(ks: Sequence[int], depth: int) -> None:
    if not ks or min(ks) < 1 or max(ks) > depth:
        raise ValueError(f"cutoffs ks={tuple(ks)} must be at least 1 and at most depth={depth}")


def _check_known(ids: Sequence[str], known: Mapping[str, str], kind: str, where: str) -> None:
    unknown = [id_ for id_ in ids if id_ not in known]
    if unknown:
        raise ValueError(f"run: {kind} id {unknown[0]!r} is not in {where} ({len(unknown):,} such ids)")


@contextlib.contextmanager
def _timed(costs: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    costs[name] = costs.get(name, 0.0) + time.perf_counter() - start
