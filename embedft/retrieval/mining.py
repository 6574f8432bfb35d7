"""Hard negatives: documents that a model ranks high for a query and that are not known to answer it.

    dataset = mine(embedder, dataset, ranks=(10, 100), num_negatives=4, seed=0)
    finetune(embedder, dataset, FinetuneConfig(num_negatives=4), out="runs/mined")

Unjudged answers rank highest, and training on such false negatives hurts. So `ranks` skips the first documents, and
margins require negatives to score clearly below the known answers.

Candidates for a query are the documents at `ranks` in an exact search, except its own id and texts equal to it, to a
document relevant to a query of its text, to a negative it keeps or to an earlier candidate, but for case and spaces.
With p the lowest score of its relevant documents, a candidate's score s must satisfy, where set,

    s <= p - absolute_margin,   s <= p - relative_margin * |p|,   min_score <= s <= max_score

Memory: the vectors of the queries and of one slice of documents, and 12 bytes for each of Q x K results.
Source: Moreira et al. 2024 (NV-Retriever), positive-aware mining: TopK-MarginPos and TopK-PercPos.
Shapes: Q queries, W windows (one of each document without passages), D dimensions, K = last rank.
"""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from ..data.dataset import RetrievalDataset
from .encoding import Slice, SupportsEncode, encode, encode_documents, sorted_corpus, truncate
from .index import Found
from .passages import WindowIndex
from .rerank import SupportsScore, score_listed
from .search import Setting, check_settings, search_slices

Pick = Literal["random", "top"]


def mine(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    ranks: Sequence[int] = (10, 100),
    num_negatives: int = 4,
    seed: int = 0,
    sampling: Pick = "random",
    relative_margin: float | None = None,
    absolute_margin: float | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    replace: bool = False,
    dim: int | None = None,
    passages: Sequence[int] | None = None,
    slice_documents: int | None = None,
    scorer: SupportsScore | None = None,
) -> RetrievalDataset:
    """The dataset with `negatives`, hardest first, for every query that has a relevant document; the rest is unchanged.

    Args:
        ranks: first and last rank of candidates, from 1, both included. Relevant documents are ranked too.
        num_negatives: maximum per query; a query with fewer candidates gets all of them.
        seed: the draw depends on the seed, the query's id and its candidates alone, not on other queries.
        sampling: "random": drawn uniformly from the candidates; "top": the first ones.
        relative_margin: 0.05 keeps documents that score at most 95% of p, for p above 0.
        replace: drop the dataset's own negatives. False: they stay, before the mined ones and not counted.
        dim, passages, slice_documents: as for `Searcher`.
        scorer: a cross-encoder whose scores, of candidates and relevant documents, replace the embedder's in margins
            and limits. It scores every candidate: Q times the number of ranks.

    Raises `ValueError` for an option out of range, or if no query has a relevant document."""
    first, last = _checked_ranks(ranks, num_negatives, len(dataset.corpus))
    low, high = -math.inf if min_score is None else min_score, math.inf if max_score is None else max_score
    for name, value, valid, expected in (
        ("sampling", sampling, sampling in get_args(Pick), f"one of {', '.join(get_args(Pick))}"),
        ("absolute_margin", absolute_margin, 0 <= (absolute_margin or 0) < math.inf, "at least 0"),
        ("relative_margin", relative_margin, 0 <= (relative_margin or 0) < math.inf, "at least 0"),
        ("max_score", max_score, low <= high, f"at least min_score, which is {min_score}"),
    ):
        if not valid:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    relevant, ids, found, lowest_Q = _search(embedder, dataset, last, Setting(dim, passages=passages), slice_documents)
    scores_QK = found.scores.astype(np.float64)
    if scorer is not None:
        lowest_Q = _rescore(scorer, dataset, relevant, ids, found.rows[:, first - 1 :], scores_QK[:, first - 1 :])
    limit_Q = highest_negative(lowest_Q, high, absolute_margin, relative_margin)
    fits_QK = (low <= scores_QK) & (scores_QK <= limit_Q[:, None]) & (np.arange(scores_QK.shape[1]) >= first - 1)
    answers, negatives = dataset.answers(), {} if replace else dict(dataset.negatives)
    for query_id, rows_K, fits_K in zip(relevant, found.rows, fits_QK, strict=True):
        kept = negatives.get(query_id, [])
        candidates = unjudged(dataset, answers, query_id, [ids[row] for row in rows_K[fits_K].tolist()], kept)
        if chosen := _chosen(candidates, num_negatives, sampling, seed, query_id):
            negatives[query_id] = [*kept, *chosen]
    return dataclasses.replace(dataset, negatives={i: negatives[i] for i in dataset.queries if i in negatives})


def unjudged(
    dataset: RetrievalDataset,
    answers: Mapping[str, Sequence[str]],
    query_id: str,
    document_ids: Iterable[str],
    kept: Sequence[str] = (),
) -> list[str]:
    """Those of `document_ids` that nothing says about a query, see above. `answers` are `dataset.answers()`."""
    question = dataset.queries[query_id]
    texts = (question, *answers.get(question, ()), *(dataset.texts[document_id] for document_id in kept))
    barred, found = {*map(_plain, texts)}, {}
    for document_id in document_ids:
        text = _plain(dataset.texts[document_id])
        if document_id != query_id and barred.isdisjoint((text, _plain(dataset.corpus[document_id]))):
            found.setdefault(text, document_id)
    return list(found.values())


def highest_negative(lowest_Q: np.ndarray, high: float, absolute: float | None, relative: float | None) -> np.ndarray:
    """The highest score that a negative of each query may have, [Q]."""
    limits = [np.full(len(lowest_Q), high)]
    limits += [] if absolute is None else [lowest_Q - absolute]
    limits += [] if relative is None else [lowest_Q - relative * np.abs(lowest_Q)]
    return np.min(limits, axis=0)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _search(
    embedder: SupportsEncode, dataset: RetrievalDataset, depth: int, setting: Setting, slice_documents: int | None
) -> tuple[dict[str, list[str]], list[str], Found, np.ndarray]:
    """The relevant documents of each query that has any, all document ids, the top documents of each query as rows into
    these ids, and the lowest score among its relevant documents, [Q]."""
    if not (relevant := {i: answers for i in dataset.queries if (answers := dataset.relevant(i))}):
        raise ValueError(f"none of the {len(dataset.queries)} queries of the dataset has a relevant document")
    check_settings(embedder, [setting])
    queries_QW = encode(embedder, {i: dataset.queries[i] for i in relevant}, "query")
    (setting,) = check_settings(embedder, [setting], width=queries_QW.shape[1])
    queries_QD, documents = truncate(embedder, queries_QW, setting.dim), sorted_corpus(dataset)
    ids = list(documents)
    asking: dict[str, list[int]] = defaultdict(list)
    for query, document_ids in enumerate(relevant.values()):
        for document_id in document_ids:
            asking[document_id].append(query)
    lowest_Q = np.full(len(relevant), np.inf)

    def score_relevant(part: Slice) -> Slice:
        vectors_WD = truncate(embedder, part.vectors, setting.dim)
        source_W = np.arange(len(vectors_WD)) if part.source is None else part.source
        index = WindowIndex(vectors_WD, source_W, num_sizes=part.num_sizes)
        for row in range(len(index)):
            if queries := asking.get(ids[part.first + row]):
                scores_Q1 = index.scores_of(queries_QD[queries], [row])
                lowest_Q[queries] = np.minimum(lowest_Q[queries], scores_Q1[:, 0])
        return part

    parts = encode_documents(embedder, documents, setting.passages, slice_documents, {})
    found, *_ = search_slices(embedder, map(score_relevant, parts), {setting.dim: queries_QD}, depth)
    return relevant, ids, found[setting.dim], lowest_Q


def _rescore(
    scorer: SupportsScore,
    dataset: RetrievalDataset,
    relevant: dict[str, list[str]],
    ids: list[str],
    rows_QK: np.ndarray,
    scores_QK: np.ndarray,
) -> np.ndarray:
    """Puts the scorer's scores of the candidates into `scores_QK`; returns the lowest of the relevant ones, [Q]."""
    listed = {i: [ids[row] for row in rows_K if row >= 0] for i, rows_K in zip(relevant, rows_QK.tolist(), strict=True)}
    scores = score_listed(scorer, dataset, {i: list(dict.fromkeys([*listed[i], *relevant[i]])) for i in relevant})
    for scores_K, query_id in zip(scores_QK, relevant, strict=True):
        scores_K[: len(listed[query_id])] = [scores[query_id][document_id] for document_id in listed[query_id]]
    return np.array([min(scores[query_id][document_id] for document_id in relevant[query_id]) for query_id in relevant])


def _chosen(candidates: list[str], number: int, sampling: str, seed: int, query_id: str) -> list[str]:
    if sampling == "top":
        return candidates[:number]
    digest = hashlib.sha256(repr((seed, query_id)).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    places = generator.choice(len(candidates), min(number, len(candidates)), replace=False)
    return [candidates[place] for place in sorted(places.tolist())]


def _checked_ranks(ranks: Sequence[int], num_negatives: int, num_documents: int) -> tuple[int, int]:
    first, last = ranks if isinstance(ranks, Sequence) and len(ranks) == 2 else (0, 0)
    if not all(type(rank) is int for rank in (first, last)) or not 1 <= first <= last:
        raise ValueError(f"ranks is {ranks!r}, expected the first and last rank, whole numbers from 1")
    if first > num_documents:
        raise ValueError(f"ranks start at {first:,}, but the corpus has {num_documents:,} documents")
    if not 1 <= num_negatives <= last - first + 1:
        raise ValueError(f"num_negatives is {num_negatives}, expected 1 to {last - first + 1}, ranks {first} to {last}")
    return first, last
