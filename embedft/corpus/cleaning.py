"""Drops questions that ask nothing, depend on a hidden text or repeat others, and reports which and why.

The corpus stays whole, since unasked documents still have to be ranked. The words of questions are in asking.py.

Shapes: Q queries, C distinct document texts, D dimensions.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..data.dataset import RetrievalDataset
from .asking import asks, points_at_source, shows_prompt
from .prompts import strip_numbering

ASKS_NOTHING = "asks nothing"
SHOWS_PROMPT = "shows the prompt"
POINTS_AT_SOURCE = "points at its source"
COPIES_DOCUMENT = "copies its document"
REPEATS = "repeats another query"
NO_RELEVANT_DOCUMENT = "has no relevant document"
OUT_OF_REACH = "document is not in the top k"
HELD_OUT = "is a validation query too"

# A question copies if this share of its words is in one run of the document, with so many plain words. Of the 1,458
# questions of Lyft and Uber, one copy has 0.94; the next, which ask, have 0.79 and 0.71.
COPIED_SHARE, MIN_COPIED_WORDS = 0.8, 5

PREAMBLE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely)\b[^:?]{0,40}?[!,.:]\s*)?"
    r"(?:here (?:are|is)|below (?:are|is)|the following (?:are|is))\b[^:?]{0,120}\bquestions?\b[^:?]{0,120}:\s*",
    re.IGNORECASE,
)

# The marks in a question that carry meaning: separators in numbers, a sign before one, percent, C#, R&D.
MARK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\S)-(?=[\d$€£])|[%#&@]|([^\w\s])")
# Not a capital A, which names things (Class A stock), unless it comes first.
ARTICLE = re.compile(r"^A\b|\b(?:a|an|An|the|The)\b")


@dataclass(frozen=True)
class Dropped:
    """A dropped query with a reason above and the phrase, id of a document or query, or rank that shows it."""

    query_id: str
    text: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Changed:
    """A query that lost numbering, quotes, line breaks or a preamble."""

    query_id: str
    before: str
    after: str


@dataclass(frozen=True)
class Cleaned:
    """The dataset that is left, and every query that was dropped or changed, in order."""

    dataset: RetrievalDataset
    dropped: tuple[Dropped, ...] = ()
    changed: tuple[Changed, ...] = ()

    def counts(self) -> dict[str, int]:
        """{reason: dropped queries}, the most frequent first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())

    def report(self, *, num_examples: int = 5) -> dict:
        """Counts with a few examples of each kind, for `write_json`."""
        dropped: dict[str, dict] = {}
        for reason, count in self.counts().items():
            shown = [drop for drop in self.dropped if drop.reason == reason][:num_examples]
            examples = [{"id": drop.query_id, "text": drop.text, "detail": drop.detail} for drop in shown]
            dropped[reason] = {"count": count, "examples": examples}
        changed = [{"id": c.query_id, "before": c.before, "after": c.after} for c in self.changed[:num_examples]]
        num_kept = len(self.dataset.queries)
        counts = {"num_queries": num_kept + len(self.dropped), "num_kept": num_kept}
        return {**counts, "dropped": dropped, "changed": {"count": len(self.changed), "examples": changed}}


def clean(dataset: RetrievalDataset) -> Cleaned:
    """Drops the queries that no searcher would write; raises `ValueError` if none is left.

    A query is tidied (`tidy`), then dropped if it asks nothing (`asks`), shows the prompt (`shows_prompt`), points at
    its source (`points_at_source`) or copies a relevant document (`copies`); the first reason counts. Of the rest,
    queries with equal `question_key` become one: the first keeps its id and wording and takes over the others' qrels
    (the higher grade), negatives and scores (its own first); a negative that becomes relevant goes.
    """
    documents = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))
    tidied = {query_id: tidy(text) for query_id, text in dataset.queries.items()}
    first_of: dict[str, str] = {}  # question key: the query that stays
    merged: dict[str, list[str]] = {}

    def fault(query_id: str) -> tuple[str, str] | None:
        question = tidied[query_id]
        if not asks(question):
            return ASKS_NOTHING, ""
        for reason, find in ((SHOWS_PROMPT, shows_prompt), (POINTS_AT_SOURCE, points_at_source)):
            if phrase := find(question):
                return reason, phrase
        for document_id in _relevant(dataset, query_id):
            if copies(question, documents[document_id]):
                return COPIES_DOCUMENT, document_id
        kept = first_of.setdefault(question_key(question), query_id)
        merged.setdefault(kept, []).append(query_id)
        return None if kept == query_id else (REPEATS, kept)

    cleaned = _drop(dataset, fault, merged, tidied)
    changed = [Changed(i, dataset.queries[i], text) for i, text in cleaned.dataset.queries.items()]
    return replace(cleaned, changed=tuple(change for change in changed if change.before != change.after))


def round_trip(dataset: RetrievalDataset, *, encode: Callable[..., np.ndarray], k: int, block: int = 1024) -> Cleaned:
    """Drops the queries whose relevant documents an encoder ranks below the top k of the whole corpus.

    Rank = 1 + number of documents with a strictly higher cosine; the best relevant document (grade > 0) counts. For
    training questions only: a validation set filtered by a model flatters that model.

    Source: Alberti et al. 2019, "Synthetic QA Corpora Generation with Roundtrip Consistency", section 2; Dai et al.
    2022, "Promptagator: Few-shot Dense Retrieval From 8 Examples", section 3.2 (there k = 1).

    Args:
        encode: (texts, role="query" | "document") -> [N, D], as `Embedder.encode`. Equal documents are encoded once.
        block: queries scored at a time; memory is `block` rows of scores.
    """
    if min(k, block) < 1:
        raise ValueError(f"k is {k} and block {block}, expected at least 1")
    columns: dict[str, int] = {}
    texts = zip(dataset.corpus, dataset.document_texts(), strict=True)
    column_of = {id: columns.setdefault(text, len(columns)) for id, text in texts}
    copies_C = np.bincount(list(column_of.values()))
    relevant = {i: [column_of[document_id] for document_id in _relevant(dataset, i)] for i in dataset.queries}
    judged = [query_id for query_id, columns_of_query in relevant.items() if columns_of_query]
    ranks: dict[str, int] = {}
    if judged:
        documents_CD = _unit_rows(encode(list(columns), role="document"))
        queries_QD = _unit_rows(encode([dataset.queries[i] for i in judged], role="query"))
        for start in range(0, len(judged), block):
            scores_QC = queries_QD[start : start + block] @ documents_CD.T
            for scores_C, query_id in zip(scores_QC, judged[start : start + block], strict=True):
                ranks[query_id] = 1 + int(copies_C[scores_C > scores_C[relevant[query_id]].max()].sum())

    def fault(query_id: str) -> tuple[str, str] | None:
        if query_id not in ranks:
            return NO_RELEVANT_DOCUMENT, ""
        return (OUT_OF_REACH, f"rank {ranks[query_id]}") if ranks[query_id] > k else None

    return _drop(dataset, fault)


def drop_held_out(dataset: RetrievalDataset, validation: RetrievalDataset) -> Cleaned:
    """Drops the training queries that `validation` asks too, by `question_key`. Raises `ValueError` if none is left."""
    keys = {question_key(text) for text in validation.queries.values()}
    return _drop(dataset, lambda query_id: (HELD_OUT, "") if question_key(dataset.queries[query_id]) in keys else None)


def tidy(text: str) -> str:
    """The question on one line, without a preamble ("Here is a question: ...") and what `strip_numbering` strips."""
    question = strip_numbering(text)
    preamble = PREAMBLE.match(question)
    rest = strip_numbering(question[preamble.end() :]) if preamble else ""
    return rest or question


def copies(question: str, document: str) -> bool:
    """Whether a question mostly copies one run of words of its document; case and punctuation do not count.

    The run must hold at least 80% of its words, and 80% (at least five) of its plain ones: those without a capital or
    a digit, since long names are repeated for good reasons.
    """
    words = re.findall(r"\w+", question)
    plain = [place for place, word in enumerate(words) if word.isalpha() and (word.islower() or place == 0)]
    length = _at_least(COPIED_SHARE, len(words))
    num_plain = max(_at_least(COPIED_SHARE, len(plain)), MIN_COPIED_WORDS)
    document = _run(re.findall(r"\w+", document))
    # The shortest runs that suffice.
    ends = (
        (first, max(plain[i + num_plain - 1] + 1, first + length))
        for i in range(len(plain) - num_plain + 1)
        for first in range(plain[i - 1] + 1 if i else 0, plain[i] + 1)
    )
    return any(end <= len(words) and _run(words[first:end]) in document for first, end in ends)


def question_key(text: str) -> str:
    """A text's words in order, without case, punctuation and articles; "Class A", "2.5" and "5%" keep their marks."""

    def keep(mark: re.Match) -> str:
        other = mark[1]  # None: it carries meaning; vowel signs and the like are no punctuation
        return " " if other and unicodedata.category(other).startswith("P") else mark[0]

    without_articles = unicodedata.normalize("NFKC", ARTICLE.sub(" ", text.strip()))
    return " ".join(MARK.sub(keep, without_articles).casefold().split())


def _relevant(dataset: RetrievalDataset, query_id: str) -> list[str]:
    return [document_id for document_id, grade in dataset.qrels.get(query_id, {}).items() if grade > 0]


def _at_least(share: float, number: int) -> int:
    return math.ceil(share * number - 1e-9)


def _run(words: list[str]) -> str:
    return f" {' '.join(words).lower()} "


def _drop(
    dataset: RetrievalDataset,
    fault: Callable[[str], tuple[str, str] | None],
    merged: dict[str, list[str]] | None = None,
    texts: dict[str, str] | None = None,
) -> Cleaned:
    """Drops the queries whose id `fault` gives a (reason, detail) for; joins the judgments of those in `merged`."""
    faults = {query_id: fault(query_id) for query_id in dataset.queries}
    dropped = [Dropped(i, dataset.queries[i], *found) for i, found in faults.items() if found]
    queries = {i: (texts or dataset.queries)[i] for i, found in faults.items() if not found}
    if not queries:
        counts = Cleaned(dataset, tuple(dropped)).counts()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        raise ValueError(f"cleaning leaves none of the {len(dropped):,} queries: {reasons}")
    qrels: dict[str, dict[str, int]] = {}
    negatives: dict[str, list[str]] = {}
    scores: dict[str, dict[str, float]] = {}
    for query_id in queries:
        for source in merged[query_id] if merged else [query_id]:
            if source in dataset.qrels:
                grades = qrels.setdefault(query_id, {})
                for document_id, grade in dataset.qrels[source].items():
                    grades[document_id] = max(grade, grades.get(document_id, grade))
            if source in dataset.negatives:
                negatives.setdefault(query_id, []).extend(dataset.negatives[source])
            if source in dataset.scores:
                scores[query_id] = {**dataset.scores[source], **scores.get(query_id, {})}
        if query_id in negatives:
            grades = qrels.get(query_id, {})
            negatives[query_id] = [d for d in dict.fromkeys(negatives[query_id]) if grades.get(d, 0) <= 0]
    kept = replace(dataset, queries=queries, qrels=qrels, negatives=negatives, scores=scores)
    return Cleaned(kept, tuple(dropped))


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    """[N, D] float32 rows of length 1; a row of zeros stays."""
    vectors = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError("encode gave values that are not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
