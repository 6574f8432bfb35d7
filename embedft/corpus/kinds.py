"""Several kinds of question per chunk: joins what was written kind by kind, or takes every kind from the chunks.

dataset = join_kinds({"question": questions, "keywords": keyword_searches})
dataset, left_out = pseudo_kinds(chunks, ["title", "claim", "keywords"], seed=0)
dataset.of_kinds(["keywords"])
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from ..data.dataset import RetrievalDataset
from .chunks import Chunk
from .prompts import QUESTION
from .pseudo import MIN_DOCUMENT_WORDS, inverse_cloze, pair_dataset, titles, without_sentence, without_title
from .splits import words

NUM_KEYWORDS = 5
PSEUDO_KINDS = ("title", "claim", "keywords")  # in this order: each is taken from what the one before it left


def join_kinds(datasets: Mapping[str, RetrievalDataset]) -> RetrievalDataset:
    """One dataset of {kind: queries of this kind}, all about the same chunks; the corpus is that of the last.
    The query "ID/q2" of another kind than question becomes "ID/claim2" or the like."""
    queries, qrels, kinds = {}, {}, {}
    for kind, dataset in datasets.items():
        for query_id, text in dataset.queries.items():
            chunk_id, _, number = query_id.rpartition("/q")
            own_id = query_id if kind == QUESTION.name else f"{chunk_id}/{kind}{number}"
            queries[own_id], qrels[own_id], kinds[own_id] = text, dataset.qrels[query_id], kind
    return RetrievalDataset(queries, dataset.corpus, qrels, kinds=kinds)


def pseudo_kinds(
    chunks: Sequence[Chunk], kinds: Collection[str] = PSEUDO_KINDS, *, seed: int, keep_share: float = 0.1
) -> tuple[RetrievalDataset, dict[str, dict[str, str]]]:
    """Queries of several kinds without a model, and {kind: {chunk id: why it has none}}.

    A title is the chunk's heading (`titles`), a claim one of its sentences (`inverse_cloze`, which explains `seed` and
    `keep_share`), both of which leave the document; keywords are its rarest frequent words (`keywords`), which stay.
    Raises `ValueError` for a kind that is not one of PSEUDO_KINDS, or if no chunk has any query."""
    if unknown := [kind for kind in kinds if kind not in PSEUDO_KINDS]:
        raise ValueError(f"the kind {unknown[0]!r} needs a language model; without one: {', '.join(PSEUDO_KINDS)}")
    makers: dict[str, tuple[Callable, Callable]] = {
        "title": (without_title, titles),
        "claim": (without_sentence, lambda left: inverse_cloze(left, seed=seed, keep_share=keep_share)),
        "keywords": (without_keywords, keywords),
    }
    datasets, left_out = {}, {}
    for kind in (kind for kind in PSEUDO_KINDS if kind in kinds):
        find_left_out, make = makers[kind]
        left_out[kind] = find_left_out(chunks)
        if len(left_out[kind]) < len(chunks):
            datasets[kind] = make(chunks)
            chunks = [replace(chunk, text=datasets[kind].corpus[chunk.id]) for chunk in chunks]
    if not datasets:
        reasons = "; ".join(f"{kind}: {Counter(ids.values()).most_common(1)[0][0]}" for kind, ids in left_out.items())
        raise ValueError(f"none of {len(chunks):,} chunks has a query, most often because of this: {reasons}")
    return join_kinds(datasets), left_out


def keywords(chunks: Sequence[Chunk]) -> RetrievalDataset:
    """Makes the five words of each chunk with the highest weights its query ("ID/q"), the heaviest first.

    weight(word, chunk) = count in the chunk * ln(number of chunks / number of chunks with the word): tf-idf within
    these chunks. A word has three letters or more, and no digits. Equal weights go by the alphabet. A chunk needs 20
    words, five of them with a weight above 0, and a query that is no other chunk's.
    Source: Salton and Buckley 1988, "Term-weighting approaches in automatic text retrieval", weights t and f."""
    found = {id: query for id, query in _keywords(chunks).items() if isinstance(query, tuple)}
    return pair_dataset({chunk.id: (" ".join(found.get(chunk.id, ())) or None, chunk.text) for chunk in chunks})


def without_keywords(chunks: Sequence[Chunk]) -> dict[str, str]:
    """{id: why} of the chunks for which `keywords` makes no query."""
    return {id: reason for id, reason in _keywords(chunks).items() if isinstance(reason, str)}


def _keywords(chunks: Sequence[Chunk]) -> dict[str, tuple[str, ...] | str]:
    """{id: the keywords, or why there are none}."""
    counts = {chunk.id: Counter(w for w in words(chunk.text) if len(w) > 2 and w.isalpha()) for chunk in chunks}
    holders = Counter(word for of_chunk in counts.values() for word in of_chunk)
    found: dict[str, tuple[str, ...] | str] = {}
    for chunk in chunks:
        weights = {word: n * math.log(len(chunks) / holders[word]) for word, n in counts[chunk.id].items()}
        ranked = sorted((word for word in weights if weights[word] > 0), key=lambda word: (-weights[word], word))
        if len(words(chunk.text)) < MIN_DOCUMENT_WORDS:
            found[chunk.id] = f"it has fewer than {MIN_DOCUMENT_WORDS} words"
        elif len(ranked) < NUM_KEYWORDS:
            found[chunk.id] = f"fewer than {NUM_KEYWORDS} of its words are not in every chunk"
        else:
            found[chunk.id] = tuple(ranked[:NUM_KEYWORDS])
    holders = Counter(frozenset(query) for query in found.values() if isinstance(query, tuple))
    is_shared = {id for id, query in found.items() if isinstance(query, tuple) and holders[frozenset(query)] > 1}
    return found | dict.fromkeys(is_shared, "its keywords are another's too")
