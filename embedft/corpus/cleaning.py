"""Drops questions that ask nothing, refer to a text the reader cannot see or repeat others, and reports why.

    cleaned, dropped = clean(dataset)
    write_json("report.json", report(dataset, cleaned, dropped))

The corpus stays complete: documents without questions still have to be ranked. All patterns are English.

Shapes: Q queries, C distinct document texts, D dimensions.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..data.dataset import RetrievalDataset
from ..vectors import unit_rows
from .prompts import QUESTION, asks, strip_numbering

Dropped = dict[str, tuple[str, str]]  # {query id: (reason, evidence: a phrase, a rank or an id)}
REPEATS, MIN_COPIED_WORDS = "repeats another query", 5
PREAMBLE = re.compile(r"""(?ix) \A (?:(?:sure|certainly|of\ course|okay|absolutely)\b[^:?]{0,40}?[!,.:]\s*)?
    (?:here|below|the\ following)\ (?:are|is)\b[^:?]{0,120}\bquestions?\b[^:?]{0,120}:\s*""")
PROMPT = re.compile(r"""(?ix)\b(?: as\ an?\ (?:teacher|professor|instructor|educator|lecturer)\b
      | (?:teacher|professor)s?\ ?(?:/|or)\ ?(?:teacher|professor) | your\ students?\b | quiz(?:zes)?\b
      | (?:diverse|exam|examination|test)\ questions?\b | questions?\ in\ an?\ exam
      | (?:upcoming|next)\ exam(?:ination)?\b
      | (?:would\ you\ like|do\ you\ want|let\ me\ know)\b.*\bquestions?\b )""")
TEXT = r"(?:text|passage|document|excerpt|article|paragraph|snippet|chunk|context)"
SHOWN = r"(?:information|data|details|tables?|schedules?|statements?|figures?|definitions?|list|examples?|content)"
# Continuations that change the meaning: the text of the law, the text messages, the document retention policy,
# paragraph (d); the context of revenue recognition; information provided to investors.
OTHER_THING = r"""(?! \ of\b | \ \(?(?:\d|[a-z]\)|[ivx]+\b) | -\w
    | \ (?:messages?|fields?|editor|box|format|retention|management|review|requests?|production|holder|types?|titles?)\b
    )"""
OTHER_CONTEXT = rf"""(?! \ (?:of|for|in\ which|within\ which|surrounding|behind|around|where|when)\b
    (?!\ (?:the|this|an?)\ (?:given\ |provided\ )?{TEXT}\b) )"""
NOT_TO_SOMEBODY = rf"""(?! \ (?:to|by|in|under|on|with|for|at|through|during|pursuant|within|that|as)\b
    (?!\ (?:the|this)\ {TEXT}\b) )"""
SOURCE = re.compile(rf"""(?ix)\b(?: context\ information\b
      | (?:the|this)\ (?!context\b){TEXT}\b {OTHER_THING}
      | (?:the|from|per)\ context(?:\ information)?\b {OTHER_CONTEXT}
      | (?:the|this|these|from|in|on|under|to|per|using)\ (?:given|provided|above)
        \ (?:[\w-]+\ ){{0,3}}? (?:{TEXT}|{SHOWN}|information)s?\b
      | the\ following\ (?:text|passage|excerpt|paragraph|table|snippet)s?\b | {TEXT}\ (?:provided|given|above|below)\b
      | (?:{SHOWN}|information)\ (?:provided|given|presented|mentioned)\b {NOT_TO_SOMEBODY}
      | the\ above\b | (?:information|table|statement|section|figure|list)s?\ (?:above|below)\b
      | (?:as\ )?(?:mentioned|described|discussed|stated|listed|shown|outlined|presented|noted)
        \ (?:above|earlier|below|previously|here)\b
      | (?<!be\ )(?:mentioned|described|discussed)(?=[.,;?!]|$)
      | (?:in|from|on|according\ to|per)\ the\ (?:table|chart|figure|graph)s?\b (?!\ of\ (?!contents))
      | (?:the|this)\ authors?\b (?=['’,]|\ (?:say|state|argue|mention|suggest|mean|of\ (?:the|this)\ {TEXT}))
      | according\ to\ the\ author\b | (?:the|a)\ previous\ question\b )""")
# Punctuation that carries meaning: separators in numbers, a sign before one, percent, C#, R&D.
MARK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\S)-(?=[\d$€£])|[%#&@]|([^\w\s])")
# A capital A is an article only at the start; elsewhere it is a name (Class A stock).
ARTICLE = re.compile(r"^A\b|\b(?:a|an|An|the|The)\b")


def report(before: RetrievalDataset, after: RetrievalDataset, dropped: Dropped, *, num_examples: int = 5) -> dict:
    """Counts of dropped and changed queries, with examples of each kind, for `write_json`."""
    texts, kinds = before.queries, {reason: {"count": count, "examples": []} for reason, count in _count(dropped)}
    for query_id, (reason, detail) in dropped.items():
        if len(examples := kinds[reason]["examples"]) < num_examples:
            examples.append({"id": query_id, "text": texts[query_id], "detail": detail})
    edits = [{"id": i, "before": texts[i], "after": text} for i, text in after.queries.items() if text != texts[i]]
    changed = {"count": len(edits), "examples": edits[:num_examples]}
    return {"num_queries": len(texts), "num_kept": len(after.queries), "dropped": kinds, "changed": changed}


def clean(dataset: RetrievalDataset) -> tuple[RetrievalDataset, Dropped]:
    """Drops queries that no searcher would write; raises `ValueError` if none is left.

    Each query is tidied (`tidy`), then dropped for the first reason that applies: it asks nothing (unless its kind is
    another than question), shows the prompt, points at its source or copies a relevant document (`copies`). Queries
    with equal `question_key` are then merged: the first keeps its id and wording and takes over the others' qrels (the
    highest grade), negatives and scores (its own take precedence); a negative that becomes relevant is removed."""
    tidied = {query_id: tidy(text) for query_id, text in dataset.queries.items()}
    dropped, first_of = {}, {}  # first_of: {question key: id of the query that stays}
    for query_id, question in tidied.items():
        kind = dataset.kinds.get(query_id, QUESTION.name)
        fault = _fault(question, {i: dataset.texts[i] for i in dataset.relevant(query_id)}, kind)
        if not fault and (first := first_of.setdefault(question_key(question), query_id)) != query_id:
            fault = REPEATS, first
        if fault:
            dropped[query_id] = fault
    return _without(dataset, dropped, tidied), dropped


def _fault(question: str, documents: Mapping[str, str], kind: str) -> tuple[str, str] | None:
    if kind == QUESTION.name and not asks(question):
        return "asks nothing", ""
    for reason, pattern in (("shows the prompt", PROMPT), ("points at its source", SOURCE)):
        if found := pattern.search(question):
            return reason, found[0]
    return next((("copies its document", i) for i, text in documents.items() if copies(question, text)), None)


def round_trip(
    dataset: RetrievalDataset, *, encode: Callable[..., np.ndarray], k: int, block: int = 1024
) -> tuple[RetrievalDataset, Dropped]:
    """Drops queries for which an encoder ranks no relevant document in the top k of the whole corpus.

    Rank = 1 + number of documents with a strictly higher cosine; the best relevant document counts. `encode(texts,
    role="query" | "document")` returns [N, D]; equal documents are encoded once, and queries scored `block` at a time.
    For training questions only: a validation set filtered by a model flatters that model.

    Source: Alberti et al. 2019, "Synthetic QA Corpora Generation with Roundtrip Consistency", section 2; Dai et al.
    2022, "Promptagator: Few-shot Dense Retrieval From 8 Examples", section 3.2 (there k = 1)."""
    if min(k, block) < 1:
        raise ValueError(f"k is {k} and block {block}, expected at least 1")
    columns, ranks = {}, {}
    column_of = {id: columns.setdefault(text, len(columns)) for id, text in dataset.texts.items()}
    copies_C = np.bincount(list(column_of.values()))
    wanted = {i: [column_of[d] for d in found] for i in dataset.queries if (found := dataset.relevant(i))}
    if wanted:
        documents_CD = np.asarray(encode(list(columns), role="document"), np.float32)
        queries_QD = np.asarray(encode([dataset.queries[i] for i in wanted], role="query"), np.float32)
        if not (np.isfinite(documents_CD).all() and np.isfinite(queries_QD).all()):
            raise ValueError("encode returned values that are not finite")
        documents_CD, queries_QD = unit_rows(documents_CD), unit_rows(queries_QD)
        for start in range(0, len(wanted), block):
            scores_QC = queries_QD[start : start + block] @ documents_CD.T
            for scores_C, query_id in zip(scores_QC, list(wanted)[start : start + block], strict=True):
                ranks[query_id] = 1 + int(copies_C[scores_C > scores_C[wanted[query_id]].max()].sum())
    dropped = {i: ("has no relevant document", "") for i in dataset.queries if i not in ranks}
    dropped |= {i: ("document is not in the top k", f"rank {rank}") for i, rank in ranks.items() if rank > k}
    return _without(dataset, dropped), dropped


def drop_held_out(dataset: RetrievalDataset, validation: RetrievalDataset) -> tuple[RetrievalDataset, Dropped]:
    """Drops training queries that `validation` also has (equal `question_key`). Raises `ValueError` if none is left."""
    keys = {question_key(text) for text in validation.queries.values()}
    asked_there = (i for i, text in dataset.queries.items() if question_key(text) in keys)
    dropped = dict.fromkeys(asked_there, ("is a validation query too", ""))
    return _without(dataset, dropped), dropped


def tidy(text: str) -> str:
    """The question on one line, without a preamble ("Here is a question: ...") and numbering (`strip_numbering`)."""
    question = strip_numbering(text)
    return strip_numbering(PREAMBLE.sub("", question)) or question


def copies(question: str, document: str) -> bool:
    """Whether a question mostly copies a run of words from its document: at least 80% of its words, and 80% (at least
    five) of those without capitals or digits, since repeating long names is legitimate. Case and punctuation do not
    count. Of 1,458 Lyft and Uber questions, the only copy has 94%; the next two, genuine ones, have 79% and 71%."""
    words = re.findall(r"\w+", question)
    plain = [place for place, word in enumerate(words) if word.isalpha() and (word.islower() or place == 0)]
    length, num_plain = (-(-4 * number // 5) for number in (len(words), len(plain)))
    num_plain = max(num_plain, MIN_COPIED_WORDS)
    document = _run(re.findall(r"\w+", document))
    ends = (
        (first, max(plain[i + num_plain - 1] + 1, first + length))
        for i in range(len(plain) - num_plain + 1)
        for first in range(plain[i - 1] + 1 if i else 0, plain[i] + 1)
    )
    return any(end <= len(words) and _run(words[first:end]) in document for first, end in ends)


def _run(words: list[str]) -> str:
    return f" {' '.join(words).lower()} "


def question_key(text: str) -> str:
    """A text's words in order, without case, punctuation and articles; "Class A", "2.5" and "5%" stay intact."""

    def keep(mark: re.Match) -> str:
        other = mark[1]  # None: it carries meaning. Vowel signs and the like are not punctuation
        return " " if other and unicodedata.category(other).startswith("P") else mark[0]

    without_articles = unicodedata.normalize("NFKC", ARTICLE.sub(" ", text.strip()))
    return " ".join(MARK.sub(keep, without_articles).casefold().split())


def _count(dropped: Dropped) -> list[tuple[str, int]]:
    """(reason, number of queries), most frequent first."""
    return Counter(reason for reason, _ in dropped.values()).most_common()


def _without(dataset: RetrievalDataset, dropped: Dropped, texts: Mapping[str, str] | None = None) -> RetrievalDataset:
    """The dataset without the dropped queries, with new `texts` if passed; a query gets its repeats' judgements."""
    if len(dropped) == len(dataset.queries):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in _count(dropped))
        raise ValueError(f"cleaning leaves none of the {len(dropped):,} queries: {reasons}")
    qrels, negatives, scores = {}, {}, {}
    repeated = {i: first for i, (reason, first) in dropped.items() if reason == REPEATS}
    queries = {i: text for i, text in (texts or dataset.queries).items() if i not in dropped}
    for source in [i for i in dataset.queries if i in queries or i in repeated]:
        query_id = repeated.get(source, source)
        if source in dataset.qrels:
            grades = qrels.setdefault(query_id, {})
            for document_id, grade in dataset.qrels[source].items():
                grades[document_id] = max(grade, grades.get(document_id, grade))
        if source in dataset.negatives:
            negatives.setdefault(query_id, []).extend(dataset.negatives[source])
        if source in dataset.scores:
            scores[query_id] = {**dataset.scores[source], **scores.get(query_id, {})}
    for query_id, listed in negatives.items():
        negatives[query_id] = [d for d in dict.fromkeys(listed) if qrels.get(query_id, {}).get(d, 0) <= 0]
    kept = {"missing": dataset.missing, "kinds": dataset.kinds}
    kept = {name: {i: x for i, x in by_query.items() if i in queries} for name, by_query in kept.items()}
    return replace(dataset, queries=queries, qrels=qrels, negatives=negatives, scores=scores, **kept)
