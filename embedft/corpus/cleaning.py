"""Cleaning the questions of a dataset: what asks nothing, leans on a hidden text or repeats goes, and is reported.

Written questions, an LLM's above all, hold preambles, words of the prompt, questions that only make sense beside
their chunk ("according to the passage above"), copied sentences and the same question twice. Each rule is a small
function of texts; the word lists are English. The corpus is kept whole: what no question asks for still has to be
ranked. Deliberately not here: writing questions (questions.py), parsing replies.

    cleaned = clean(RetrievalDataset.load("questions.json"))
    cleaned.dataset.save("cleaned.json")
    write_json("cleaning.json", cleaned.report())

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
from .asking import asks
from .prompts import strip_numbering

ASKS_NOTHING = "asks nothing"
SHOWS_PROMPT = "shows the prompt"
POINTS_AT_SOURCE = "points at its source"
COPIES_DOCUMENT = "copies its document"
REPEATS = "repeats another query"
NO_RELEVANT_DOCUMENT = "has no relevant document"
OUT_OF_REACH = "document is not in the top k"
HELD_OUT = "is a validation query too"

NUM_EXAMPLES = 5
# A question copies when this share of its words stands in one run of the document, so many plain ones among them. The
# highest shares among the 1,458 questions of Lyft and Uber are 0.94, a line of the form with "Has" before it, then 0.79
# and 0.71, which ask.
COPIED_SHARE, MIN_COPIED_WORDS = 0.8, 5

PREAMBLE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely)\b[^:?]{0,40}?[!,.:]\s*)?"
    r"(?:here (?:are|is)|below (?:are|is)|the following (?:are|is))\b[^:?]{0,120}\bquestions?\b[^:?]{0,120}:\s*",
    re.IGNORECASE,
)

PROMPT = re.compile(
    r"""\b(?: as\ an?\ (?:teacher|professor|instructor|educator|lecturer)\b
      | (?:teacher|professor)s?\ ?(?:/|or)\ ?(?:teacher|professor)
      | your\ students?\b | quiz(?:zes)?\b | diverse\ questions?\b
      | (?:exam|examination|test)\ questions?\b | questions?\ in\ an?\ exam | (?:upcoming|next)\ exam(?:ination)?\b
      | (?:would\ you\ like|do\ you\ want|let\ me\ know)\b.*\bquestions?\b )""",
    re.IGNORECASE | re.VERBOSE,
)

TEXT = r"(?:text|passage|document|excerpt|article|paragraph|snippet|chunk|context)"
SHOWN = r"(?:information|data|details|tables?|schedules?|statements?|figures?|definitions?|list|examples?|content)"
# What follows makes another thing of it: the text of the law, the text messages, the document retention policy,
# paragraph (d); the context of revenue recognition; information provided to investors.
OTHER_THING = r"""(?! \ of\b | \ \(?(?:\d|[a-z]\)|[ivx]+\b) | -\w
    | \ (?:messages?|fields?|editor|box|format|retention|management|review|requests?|production|holder|types?|titles?)\b
    )"""
OTHER_CONTEXT = rf"""(?! \ (?:of|for|in\ which|within\ which|surrounding|behind|around|where|when)\b
    (?!\ (?:the|this|an?)\ (?:given\ |provided\ )?{TEXT}\b) )"""
NOT_TO_SOMEBODY = (
    r"(?!\ (?:to|by|in|under|on|with|for|at|through|during|pursuant|within|that|as)\b"
    rf"(?!\ (?:the|this)\ {TEXT}\b))"
)
SOURCE = re.compile(
    rf"""\b(?: context\ information\b
      | (?:the|this)\ (?!context\b){TEXT}\b {OTHER_THING}
      | (?:the|from|per)\ context(?:\ information)?\b {OTHER_CONTEXT}
      | (?:the|this|these|from|in|on|under|to|per|using)\ (?:given|provided|above)
        \ (?:[\w-]+\ ){{0,3}}? (?:{TEXT}|{SHOWN}|information)s?\b
      | the\ following\ (?:text|passage|excerpt|paragraph|table|snippet)s?\b
      | {TEXT}\ (?:provided|given|above|below)\b
      | (?:{SHOWN}|information)\ (?:provided|given|presented|mentioned)\b {NOT_TO_SOMEBODY}
      | the\ above\b
      | (?:information|table|statement|section|figure|list)s?\ (?:above|below)\b
      | (?:as\ )?(?:mentioned|described|discussed|stated|listed|shown|outlined|presented|noted)\ (?:above|earlier|below|
          previously|here)\b
      | (?<!be\ )(?:mentioned|described|discussed)(?=[.,;?!]|$)
      | (?:in|from|on|according\ to|per)\ the\ (?:table|chart|figure|graph)s?\b (?!\ of\ (?!contents))
      | (?:the|this)\ authors?\b (?=['’,]|\ (?:say|state|argue|mention|suggest|mean|of\ (?:the|this)\ {TEXT}))
      | according\ to\ the\ author\b
      | (?:the|a)\ previous\ question\b )""",
    re.IGNORECASE | re.VERBOSE,
)

# Of the marks in a question, these carry meaning: separators in numbers, a sign before one, percent, C#, R&D.
MARK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\S)-(?=[\d$€£])|[%#&@]|([^\w\s])")
# Not a capital A, which names things (Class A stock), unless it comes first.
ARTICLE = re.compile(r"^A\b|\b(?:a|an|An|the|The)\b")


@dataclass(frozen=True)
class Dropped:
    """A query that went: its text as it came, one of the reasons above, and what shows it.

    `detail` is the phrase that was found, the id of the document that is copied, of the query that is repeated, or the
    document's rank; "" where there is nothing to add.
    """

    query_id: str
    text: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Changed:
    """A query that stayed with other words: numbering, quotes, line breaks or a preamble were taken off."""

    query_id: str
    before: str
    after: str


@dataclass(frozen=True)
class Cleaned:
    """What is left, and everything that went or was changed, in the order of the queries."""

    dataset: RetrievalDataset
    dropped: tuple[Dropped, ...] = ()
    changed: tuple[Changed, ...] = ()

    def counts(self) -> dict[str, int]:
        """{reason: dropped queries}, the most frequent first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())

    def report(self) -> dict:
        """Counts with up to five examples of each kind, for `write_json`; `dropped` and `changed` hold all of them."""
        examples: dict[str, list[dict[str, str]]] = {reason: [] for reason in self.counts()}
        for drop in self.dropped:
            if len(examples[drop.reason]) < NUM_EXAMPLES:
                examples[drop.reason].append({"id": drop.query_id, "text": drop.text, "detail": drop.detail})
        return {
            "num_queries": len(self.dataset.queries) + len(self.dropped),
            "num_kept": len(self.dataset.queries),
            "dropped": {
                reason: {"count": count, "examples": examples[reason]} for reason, count in self.counts().items()
            },
            "changed": {
                "count": len(self.changed),
                "examples": [
                    {"id": change.query_id, "before": change.before, "after": change.after}
                    for change in self.changed[:NUM_EXAMPLES]
                ],
            },
        }


def clean(dataset: RetrievalDataset) -> Cleaned:
    """The dataset without the queries that no searcher would write.

    A query is tidied first (`tidy`), then the first reason that holds drops it: it asks nothing (`asks`), shows the
    prompt (`shows_prompt`), points at its source (`points_at_source`), copies a document relevant to it (`copies`).
    Of those left, queries with equal `question_key` become one: the first keeps its id and wording and gets the qrels
    (the higher grade where both have one), negatives and scores (its own first) of the others; a negative that is now
    relevant goes. Documents, titles and order stay. Each query is looked at once: time grows with the texts' length.

    Raises:
        ValueError: no query is left; counts the reasons.
    """
    documents = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))
    queries: dict[str, str] = {}
    first_of: dict[str, str] = {}  # question key: the query that stays
    merged: dict[str, list[str]] = {}
    dropped, changed = [], []
    for query_id, text in dataset.queries.items():
        question = tidy(text)
        relevant = [d for d, grade in dataset.qrels.get(query_id, {}).items() if grade > 0]
        reason, detail = _fault(question, {document_id: documents[document_id] for document_id in relevant})
        if not reason:
            kept = first_of.setdefault(question_key(question), query_id)
            merged.setdefault(kept, []).append(query_id)
            reason, detail = ("", "") if kept == query_id else (REPEATS, kept)
        if reason:
            dropped.append(Dropped(query_id, text, reason, detail))
            continue
        queries[query_id] = question
        if question != text:
            changed.append(Changed(query_id, text, question))
    return Cleaned(_take(dataset, queries, merged, dropped), tuple(dropped), tuple(changed))


def round_trip(dataset: RetrievalDataset, *, encode: Callable[..., np.ndarray], k: int, block: int = 1024) -> Cleaned:
    """The queries one of whose relevant documents an encoder ranks among the top k of the whole corpus.

    Rank = 1 + number of documents with a strictly higher cosine; the best relevant document (grade > 0) counts. A
    query that another document answers better than its own chunk is a wrong label more often than a hard question.
    For training questions only: a validation set filtered by a model flatters that model, and hides from every other
    what the filter found too hard.

    Source: Alberti et al. 2019, "Synthetic QA Corpora Generation with Roundtrip Consistency", section 2; Dai et al.
    2022, "Promptagator: Few-shot Dense Retrieval From 8 Examples", section 3.2 (there k = 1).

    Args:
        encode: (texts, role="query" | "document") -> [N, D], as `Embedder.encode`. Equal documents are encoded once.
        k: at least 1.
        block: queries scored at a time; bounds the memory to `block` rows of scores.

    Raises:
        ValueError: `k` or `block` below 1, vectors of a wrong shape or not finite, or no query is left.
    """
    for name, value in (("k", k), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    columns: dict[str, int] = {}
    column_of = {
        d: columns.setdefault(t, len(columns)) for d, t in zip(dataset.corpus, dataset.document_texts(), strict=True)
    }
    copies_C = np.bincount(list(column_of.values()))
    asked = {
        query_id: [column_of[d] for d, grade in dataset.qrels.get(query_id, {}).items() if grade > 0]
        for query_id in dataset.queries
    }
    judged = [query_id for query_id, relevant in asked.items() if relevant]
    ranks: dict[str, int] = {}
    if judged:
        documents_CD = _unit_rows(encode(list(columns), role="document"), len(columns), "documents")
        queries_QD = _unit_rows(encode([dataset.queries[i] for i in judged], role="query"), len(judged), "queries")
        if queries_QD.shape[1] != documents_CD.shape[1]:
            raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, documents {documents_CD.shape[1]}")
        for start in range(0, len(judged), block):
            scores_QC = queries_QD[start : start + block] @ documents_CD.T
            for scores_C, query_id in zip(scores_QC, judged[start : start + block], strict=True):
                ranks[query_id] = 1 + int(copies_C[scores_C > scores_C[asked[query_id]].max()].sum())
    queries, dropped = {}, []
    for query_id, text in dataset.queries.items():
        if query_id not in ranks:
            dropped.append(Dropped(query_id, text, NO_RELEVANT_DOCUMENT))
        elif ranks[query_id] > k:
            dropped.append(Dropped(query_id, text, OUT_OF_REACH, f"rank {ranks[query_id]}"))
        else:
            queries[query_id] = text
    return Cleaned(_take(dataset, queries, {i: [i] for i in queries}, dropped), tuple(dropped))


def drop_held_out(dataset: RetrievalDataset, validation: RetrievalDataset) -> Cleaned:
    """The training queries that `validation` does not ask as well, by `question_key`.

    Raises:
        ValueError: no query is left.
    """
    keys = {question_key(text) for text in validation.queries.values()}
    queries, dropped = {}, []
    for query_id, text in dataset.queries.items():
        if question_key(text) in keys:
            dropped.append(Dropped(query_id, text, HELD_OUT))
        else:
            queries[query_id] = text
    return Cleaned(_take(dataset, queries, {i: [i] for i in queries}, dropped), tuple(dropped))


def tidy(text: str) -> str:
    """The question on one line, without a preamble ("Here is a question: ...") and what `strip_numbering` takes off."""
    question = strip_numbering(text)
    preamble = PREAMBLE.match(question)
    rest = strip_numbering(question[preamble.end() :]) if preamble else ""
    return rest or question


def shows_prompt(text: str) -> str | None:
    """The words with which the prompt's role or task shows ("as a teacher", "diverse questions"); None: it does not."""
    found = PROMPT.search(text)
    return found and found[0]


def points_at_source(text: str) -> str | None:
    """The words that point at a text which whoever asks would not have before them; None: there are none.

    "According to the document", "the given information", "the table above" point; what has a name or an address of its
    own does not: "the agreement", "Section 409A", "mentioned in the offer letter", "in the context of leases".
    """
    found = SOURCE.search(text)
    return found and found[0]


def copies(question: str, document: str) -> bool:
    """Whether most of a question is one run of its document: a statement with a question mark behind it.

    At least 80% of its words, and as much of its plain ones, at least five, must stand in one run of words that the
    document has too; case and punctuation aside. Plain are words without a capital or a digit: long names are repeated
    for good reasons.
    """
    words = re.findall(r"\w+", question)
    plain = [place for place, word in enumerate(words) if word.isalpha() and (word.islower() or place == 0)]
    length = _at_least(COPIED_SHARE, len(words))
    num_plain = max(_at_least(COPIED_SHARE, len(plain)), MIN_COPIED_WORDS)
    document = _run(re.findall(r"\w+", document))
    # The shortest runs that are long enough: between two plain words, or longer.
    ends = (
        (first, max(plain[i + num_plain - 1] + 1, first + length))
        for i in range(len(plain) - num_plain + 1)
        for first in range(plain[i - 1] + 1 if i else 0, plain[i] + 1)
    )
    return any(end <= len(words) and _run(words[first:end]) in document for first, end in ends)


def question_key(text: str) -> str:
    """What equal questions have in common: their words in order; case, punctuation, articles and spacing aside.

    Every other word counts, so "2020" and "2021", "is" and "is not", "Class A" and "Class B" are kept apart; so are
    "2.5" and "25", "5%" and "5".
    """

    def keep(mark: re.Match) -> str:
        other = mark[1]  # None: one that counts; vowel signs and the like are no punctuation
        return " " if other and unicodedata.category(other).startswith("P") else mark[0]

    without_articles = unicodedata.normalize("NFKC", ARTICLE.sub(" ", text.strip()))
    return " ".join(MARK.sub(keep, without_articles).casefold().split())


def _fault(question: str, documents: dict[str, str]) -> tuple[str, str]:
    """(reason, detail) of the first rule that a question breaks on its own; ("", "") for a good one."""
    if not asks(question):
        return ASKS_NOTHING, ""
    if phrase := shows_prompt(question):
        return SHOWS_PROMPT, phrase
    if phrase := points_at_source(question):
        return POINTS_AT_SOURCE, phrase
    copied = [document_id for document_id, text in documents.items() if copies(question, text)]
    return (COPIES_DOCUMENT, copied[0]) if copied else ("", "")


def _at_least(share: float, number: int) -> int:
    return math.ceil(share * number - 1e-9)


def _run(words: list[str]) -> str:
    return f" {' '.join(words).lower()} "


def _take(
    dataset: RetrievalDataset, queries: dict[str, str], merged: dict[str, list[str]], dropped: list[Dropped]
) -> RetrievalDataset:
    """The dataset with `queries` in place of its own; `merged` lists whose qrels, negatives and scores a query gets."""
    if not queries:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(d.reason for d in dropped).most_common())
        raise ValueError(f"cleaning leaves none of the {len(dropped):,} queries: {reasons}")
    qrels: dict[str, dict[str, int]] = {}
    negatives: dict[str, list[str]] = {}
    scores: dict[str, dict[str, float]] = {}
    for query_id in queries:
        for source in merged[query_id]:
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
    return replace(dataset, queries=queries, qrels=qrels, negatives=negatives, scores=scores)


def _unit_rows(vectors: np.ndarray, num_texts: int, what: str) -> np.ndarray:
    """[N, D] float32 rows of length 1; a row of zeros stays."""
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != num_texts:
        raise ValueError(f"encode gave {what} of shape {vectors.shape}, expected {num_texts} rows")
    if not np.isfinite(vectors).all():
        raise ValueError(f"encode gave {what} with values that are not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
