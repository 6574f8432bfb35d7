"""Hard negatives: documents that a model finds for a query, and that are not known to answer it.

    dataset = mine(embedder, dataset, ranks=(10, 100), num_negatives=4, seed=0)
    finetune(embedder, dataset, FinetuneConfig(num_negatives=4), out="runs/mined")

Not everything that answers a query is known to, and what is not is found first: training on such false negatives does
harm. `ranks` passes over the first documents; the margins ask that a negative scores clearly below what is known to
answer; and a text that answers is no negative under another id either. Not here: second opinions by a cross-encoder.

Shapes: Q queries, W windows of some documents (one each without passages), D dimensions, K = last rank.
"""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from ..data.dataset import RetrievalDataset
from .index import Found, from_keys, merge_keys
from .metrics import has_relevant
from .passages import aggregate_windows
from .search import Documents, SupportsEncode, cut, encode, encode_documents, in_order_of_ids
from .settings import Setting, check_settings, resolved, search_of

Sampling = Literal["random", "top"]
SAMPLINGS = get_args(Sampling)


def mine(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    ranks: Sequence[int] = (10, 100),
    num_negatives: int = 4,
    seed: int = 0,
    sampling: Sampling = "random",
    relative_margin: float | None = None,
    absolute_margin: float | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    replace: bool = False,
    dim: int | None = None,
    passages: Sequence[int] | None = None,
    aggregate: str = "max",
) -> RetrievalDataset:
    """The dataset with `negatives` for every query that has a relevant document; all else is as it was.

    Candidates for a query are the documents at `ranks` of an exact search of the whole corpus, as `search` finds them
    (score descending, then id ascending), less those whose text is that of a relevant document, of a negative that the
    query keeps, or of a candidate before. Let p be the lowest score of a document relevant to the query. The score s of
    a candidate must hold

        s <= p - absolute_margin,   s <= p - relative_margin * |p|,   min_score <= s <= max_score

    as far as they are given. A query gets fewer than `num_negatives` where fewer candidates are left, none included. In
    `negatives` they stand in the order of their ranks, the hardest first.

    Memory: the vectors of the queries and of one slice of documents, as in `search`, and 8 bytes for each of Q x K
    results.

    Args:
        ranks: first and last rank, from 1, both among the candidates. Ranks count every document, relevant ones too.
        num_negatives: mined for each query.
        seed: of the draw. What a query draws follows from seed, its id and its candidates, not from other queries.
        sampling: "random": drawn evenly from the candidates; "top": the first of them.
        relative_margin: 0.05 keeps what scores at most 95% of p, where p is above 0.
        replace: drop the negatives that the dataset has. False: they stay, in front of those that are mined, and
            beyond `num_negatives`.
        dim: leading dimensions of the vectors; None: all.
        passages, aggregate: documents score by their windows, as in `evaluate`.

    Raises:
        ValueError: a setting out of its range; no query with a relevant document; a corpus that ends before the first
            rank; vectors that are not finite; passages of an embedder that cannot cut any.

    Source: Moreira et al. 2024 (NV-Retriever), positive-aware mining: TopK-MarginPos and TopK-PercPos.
    """
    first, last = _checked_ranks(ranks, num_negatives, len(dataset.corpus))
    _check_guards(sampling, relative_margin, absolute_margin, min_score, max_score)
    settings = [Setting(dim, "float32", "flat")]
    check_settings(embedder, settings, [passages], aggregate)
    relevant = {
        query_id: [document_id for document_id, grade in dataset.qrels[query_id].items() if grade > 0]
        for query_id in dataset.queries
        if has_relevant(dataset.qrels.get(query_id, {}))
    }
    if not relevant:
        raise ValueError(f"none of the {len(dataset.queries)} queries of the dataset has a relevant document")
    queries_QW = encode(embedder, [dataset.queries[query_id] for query_id in relevant], list(relevant), role="query")
    (setting,) = resolved(embedder, settings, queries_QW.shape[1])
    queries_QD, documents = cut(embedder, queries_QW, setting.dim), in_order_of_ids(dataset)
    (scores_QK, rows_QK), lowest_Q = _search(
        embedder, documents, queries_QD, relevant, last, passages=passages, aggregate=aggregate
    )
    least = -math.inf if min_score is None else min_score
    most_Q = np.full(len(relevant), math.inf if max_score is None else max_score)
    if absolute_margin is not None:
        most_Q = np.minimum(most_Q, lowest_Q - absolute_margin)
    if relative_margin is not None:
        most_Q = np.minimum(most_Q, lowest_Q - relative_margin * np.abs(lowest_Q))

    texts, found = dict(zip(*documents, strict=True)), {} if replace else dict(dataset.negatives)
    for query, (query_id, answers) in enumerate(relevant.items()):
        kept = found.get(query_id, [])
        barred = {texts[document_id] for document_id in (*answers, *kept)}
        candidates = []
        scored = zip(rows_QK[query, first - 1 :].tolist(), scores_QK[query, first - 1 :].tolist(), strict=True)
        for document_id, score in ((documents.ids[row], score) for row, score in scored):
            if least <= score <= most_Q[query] and texts[document_id] not in barred:
                barred.add(texts[document_id])
                candidates.append(document_id)
        if sampling == "random":
            candidates = _drawn(candidates, num_negatives, seed, query_id)
        if candidates:
            found[query_id] = [*kept, *candidates[:num_negatives]]
    in_order = {query_id: found[query_id] for query_id in dataset.queries if query_id in found}
    return dataclasses.replace(dataset, negatives=in_order)


def _search(
    embedder: SupportsEncode,
    documents: Documents,
    queries_QD: np.ndarray,
    relevant: Mapping[str, Sequence[str]],
    depth: int,
    *,
    passages: Sequence[int] | None,
    aggregate: str,
) -> tuple[Found, np.ndarray]:
    """The first documents of each query, as rows of `documents`; and the lowest score among its relevant ones, [Q].

    The queries are those of `relevant`, in its order.
    """
    asking: dict[str, list[int]] = defaultdict(list)
    for query, document_ids in enumerate(relevant.values()):
        for document_id in document_ids:
            asking[document_id].append(query)
    device, lowest_Q = getattr(embedder, "device", None), np.full(len(queries_QD), np.inf)
    keys_QK, start = np.empty((len(queries_QD), 0), dtype=np.uint64), 0
    for part in encode_documents(embedder, documents, passages, {}):
        vectors_WD = cut(embedder, part.vectors, queries_QD.shape[1])
        found = search_of(vectors_WD, part.source, aggregate, device=device)(queries_QD, depth)
        keys_QK = merge_keys(keys_QK, found, start, depth)
        source_W = np.arange(len(vectors_WD)) if part.source is None else part.source
        num_documents = int(source_W[-1]) + 1
        edges = np.searchsorted(source_W, np.arange(num_documents + 1)).tolist()
        for row, document_id in enumerate(documents.ids[start : start + num_documents]):
            if queries := asking.get(document_id):
                scores_QW = queries_QD[queries] @ vectors_WD[edges[row] : edges[row + 1]].T
                scores_Q1 = aggregate_windows(scores_QW, np.zeros(1, dtype=np.int64), aggregate)
                lowest_Q[queries] = np.minimum(lowest_Q[queries], scores_Q1[:, 0])
        start += num_documents
        del part, vectors_WD  # before the next slice is made
    return from_keys(keys_QK), lowest_Q


def _drawn(candidates: list[str], number: int, seed: int, query_id: str) -> list[str]:
    """So many of the candidates, all when there are no more, in their order."""
    digest = hashlib.sha256(repr((seed, query_id)).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    places = generator.choice(len(candidates), min(number, len(candidates)), replace=False)
    return [candidates[place] for place in sorted(places.tolist())]


def _checked_ranks(ranks: Sequence[int], num_negatives: int, num_documents: int) -> tuple[int, int]:
    first, last = ranks if isinstance(ranks, Sequence) and len(ranks) == 2 else (0, 0)
    if not all(type(rank) is int for rank in (first, last)) or not 1 <= first <= last:
        raise ValueError(f"ranks is {ranks!r}, expected first and last rank, whole numbers from 1")
    if first > num_documents:
        raise ValueError(f"ranks begin at {first:,}, the corpus has {num_documents:,} documents")
    if num_negatives < 1:
        raise ValueError(f"num_negatives is {num_negatives}, expected at least 1")
    if num_negatives > last - first + 1:
        raise ValueError(f"num_negatives is {num_negatives}, ranks {first} to {last} hold {last - first + 1}")
    return first, last


def _check_guards(
    sampling: str,
    relative_margin: float | None,
    absolute_margin: float | None,
    min_score: float | None,
    max_score: float | None,
) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
    for name, value in (("relative_margin", relative_margin), ("absolute_margin", absolute_margin)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected at least 0")
    for name, value in (("min_score", min_score), ("max_score", max_score)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
    if min_score is not None and max_score is not None and min_score > max_score:
        raise ValueError(f"min_score is {min_score}, above max_score, {max_score}")
