"""Datasets for training and evaluating retrieval: queries, documents, and which documents answer which query.

dataset = RetrievalDataset.load("pairs.csv", skip_empty=True)
train, held_out = dataset.split(0.9, seed=0)
held_out.save("held_out.json")
"""

import functools
import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..files import check_whole
from . import formats, pairs
from .beir import is_beir_name
from .checks import check_distinct, check_grade, check_id, check_text
from .formats import FORMATS, WRITABLE

FIELDS = ("queries", "corpus", "qrels", "negatives", "scores", "titles", "missing", "kinds")
BY_QUERY = ("qrels", "negatives", "scores", "missing", "kinds")
Item = TypeVar("Item", str, int)


@dataclass(frozen=True, repr=False)
class RetrievalDataset:
    """Queries, a corpus and graded judgements. Checked when created (`ValueError`); do not modify it."""

    queries: dict[str, str]  # {query id: text}
    corpus: dict[str, str]  # {document id: text}; a text may be ""
    qrels: dict[str, dict[str, int]]  # {query id: {document id: grade}}, above 0 relevant; a query may have none
    negatives: dict[str, list[str]] = field(default_factory=dict)  # {query id: [document id]}, never a relevant one
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # {query id: {document id: a teacher's score}}
    titles: dict[str, str] = field(default_factory=dict)  # {document id: title}
    # Judgements of documents missing from the corpus; evaluation counts them (`all_qrels`), as never found.
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # {query id: its kind}: question, claim, keywords, title, ...
    num_skipped: int = field(default=0, compare=False)  # rows or texts that `load(skip_empty=True)` dropped

    def __post_init__(self) -> None:
        for name in FIELDS:
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict, found {reprlib.repr(value)}")
        for name, texts, kind in (("queries", self.queries, "query"), ("corpus", self.corpus, "document")):
            if not texts:
                raise ValueError(f"the dataset is empty: no entry in {name}")
            for i, text in texts.items():
                check_text(i, f"a {kind} id")
                if text != "" or kind == "query":
                    check_text(text, f"the text of {kind} {i!r}")
        for document_id, title in self.titles.items():
            check_id("document", document_id, self.corpus, "titles: ")
            check_text(title, f"the title of document {document_id!r}")
        for query_id, kind in self.kinds.items():
            check_id("query", query_id, self.queries, "kinds: ")
            check_text(kind, f"the kind of query {query_id!r}")
        for name, kind in (("qrels", dict), ("negatives", list), ("scores", dict), ("missing", dict)):
            for query_id, listed in getattr(self, name).items():
                check_id("query", query_id, self.queries, f"{name}: ")
                where = f"{name} of query {query_id!r}"
                if not isinstance(listed, kind):
                    raise ValueError(f"{where} must be a {kind.__name__}, found {reprlib.repr(listed)}")
                for document_id in listed:
                    if name != "missing":
                        check_id("document", document_id, self.corpus, f"{where}: ")
                    elif document_id in self.corpus:
                        raise ValueError(f"{where}: document id {document_id!r} is in the corpus")
                    else:
                        check_text(document_id, f"{where}: a document id")
                    if name == "scores":
                        score = listed[document_id]
                        is_number = isinstance(score, int | float) and not isinstance(score, bool)
                        if not is_number or not math.isfinite(score):
                            raise ValueError(f"{where}: the score of {document_id!r} is {score!r}, not a finite number")
                    elif name != "negatives":
                        check_grade(listed[document_id], f"{where}: the grade of document {document_id!r}")
                    elif self.qrels.get(query_id, {}).get(document_id, 0) > 0:
                        raise ValueError(f"{where}: document id {document_id!r} is also a positive of the query")
                if name == "negatives":
                    check_distinct(listed, f"{where}: document id")

    def __repr__(self) -> str:
        judgements, negatives = (sum(map(len, x.values())) for x in (self.qrels, self.negatives))
        texts = f"{len(self.queries):,} queries, {len(self.corpus):,} documents"
        return f"RetrievalDataset({texts}, {judgements:,} judgements, {negatives:,} negatives)"

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        merge: bool = True,
        skip_empty: bool = False,
        strict: bool = False,
        split: str | None = None,
    ) -> "RetrievalDataset":
        """Loads a dataset from a file (.gz allowed) or folder, or "beir:NAME" from the hub (beir.py); formats.py and
        pairs.py describe the formats.

        Args:
            format: one of FORMATS; None: by the suffix (SUFFIXES), a folder is "beir".
            merge: for rows without ids of their own. True: equal query texts are one query, and equal document texts
                one document; a repeated pair counts once. False: each row has its own query and document.
            skip_empty: instead of refusing null or blank texts, drop the rows (jsonl, csv), or the queries and
                documents with their qrels (llamaindex, beir). Otherwise, BEIR's empty documents stay.
            strict: refuse judgements of unknown queries and documents instead of warning about them.
            split: which qrels ("beir" only); None: "test", or the only split.

        Raises `ValueError` for anything wrong with the data, naming file, line and id."""
        path = Path(path)
        on_hub = is_beir_name(path)
        if not (on_hub or path.exists()):
            raise ValueError(f"{path}: no such file or folder")
        check_whole(path, path.parent)
        format = formats.choose_format(path, format, FORMATS, folder=on_hub or path.is_dir())
        if on_hub and format != "beir":
            raise ValueError(f"{path}: is in the format 'beir', found the format {format!r}")
        if split is not None and format != "beir":
            raise ValueError(f"{path}: split is {split!r}, but only the format 'beir' has splits, found {format!r}")
        if format in ("jsonl", "csv"):
            fields = pairs.read_pairs(path, format, merge=merge, skip_empty=skip_empty)
        else:
            fields = formats.read_published(path, split, skip_empty=skip_empty, strict=strict)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path, *, format: str | None = None) -> None:
        """Writes the dataset so that `load` returns an equal one; "jsonl" orders documents as its rows name them.
        `path` is the file to create or replace, or for "beir" a new or empty folder; `format` is one of WRITABLE, by
        default that of the suffix. Raises `ValueError`, before writing, if the format cannot hold this dataset."""
        path = Path(path)
        format = formats.choose_format(path, format, WRITABLE, folder=not path.suffix)
        refusal = f"{path}: the format {format!r} cannot hold"
        for name in ("negatives", "scores", "titles", "missing", "kinds"):
            if getattr(self, name) and name not in WRITABLE[format]:
                able = [other for other, fields in WRITABLE.items() if name in fields]
                raise ValueError(f"{refusal} {name} ({', '.join(able) or 'no format'} can)")
        judged = self.all_qrels()
        if format != "llamaindex" and (unjudged := [query_id for query_id in self.queries if not judged.get(query_id)]):
            raise ValueError(f"{refusal} query {unjudged[0]!r}, which has no qrels")
        if format != "beir" and (empty := [document_id for document_id, text in self.corpus.items() if not text]):
            raise ValueError(f"{refusal} document {empty[0]!r}, which is empty")
        formats.WRITERS[format](self, path, refusal)

    def all_qrels(self) -> dict[str, dict[str, int]]:
        """`qrels` together with `missing`: what evaluation counts."""
        return {q: {**self.qrels.get(q, {}), **self.missing.get(q, {})} for q in {**self.qrels, **self.missing}}

    def relevant(self, query_id: str) -> list[str]:
        """The documents with a grade above 0 for a query, in the order of its qrels."""
        return [document_id for document_id, grade in self.qrels.get(query_id, {}).items() if grade > 0]

    def split(self, share: float, *, seed: int) -> tuple["RetrievalDataset", "RetrievalDataset"]:
        """Splits into two datasets without common queries or documents; the first gets about `share` of the queries.

        A grade above 0 links a query with a document; equal texts (a document's including its title) are linked, too.
        Connected components stay together: in random order, each goes to the first part if that brings the part closer
        to `share`. Documents without a grade above 0 go with the first query that names them (with another grade, as a
        negative, or with a score); the rest are divided by `share`. Other grades, negatives and scores between parts
        are dropped. Each part keeps its order. Raises `ValueError` if a part would have no query or no document."""
        if not 0 < share < 1:
            raise ValueError(f"share must be strictly between 0 and 1, found {share!r}")
        generator = np.random.default_rng(seed)
        nodes: dict[tuple[str, str], int] = {}  # equal texts are one node
        of_query = {i: nodes.setdefault(("query", text), len(nodes)) for i, text in self.queries.items()}
        of_document = {i: nodes.setdefault(("document", text), len(nodes)) for i, text in self.texts.items()}
        component = connected_components((of_document[d], of_query[q]) for q in self.qrels for d in self.relevant(q))
        query_components = {i: component.get(node, node) for i, node in of_query.items()}
        document_components = {i: component.get(node, node) for i, node in of_document.items()}
        sizes = Counter(query_components.values())
        in_first, num_first = {}, 0
        for component in generator.permutation(list(sizes)).tolist():
            in_first[component] = num_first + sizes[component] / 2 <= share * len(self.queries)
            num_first += sizes[component] * in_first[component]
        if num_first in (0, len(self.queries)):
            part = "second" if num_first else "first"
            found = f"{len(self.queries):,} queries in {len(sizes):,} connected components"
            raise ValueError(f"a share of {share} leaves the {part} part without a query: {found}")
        for named in (self.qrels, self.negatives, self.scores):
            for query_id, document_ids in named.items():
                for document_id in document_ids:
                    in_first.setdefault(document_components[document_id], in_first[query_components[query_id]])
        loose = list(dict.fromkeys(c for c in document_components.values() if c not in in_first))
        for place, component in enumerate(generator.permutation(loose).tolist()):
            in_first[component] = place < round(share * len(loose))

        def take(first: bool) -> RetrievalDataset:
            queries = {i: text for i, text in self.queries.items() if in_first[query_components[i]] == first}
            corpus = {i: text for i, text in self.corpus.items() if in_first[document_components[i]] == first}
            qrels, scores = (
                {q: {d: x for d, x in by.items() if d in corpus} for q, by in named.items() if q in queries}
                for named in (self.qrels, self.scores)
            )
            negatives = {q: [d for d in ids if d in corpus] for q, ids in self.negatives.items() if q in queries}
            titles = {d: title for d, title in self.titles.items() if d in corpus}
            missing, kinds = ({q: x for q, x in by.items() if q in queries} for by in (self.missing, self.kinds))
            return RetrievalDataset(queries, corpus, qrels, negatives, scores, titles, missing, kinds)

        return take(True), take(False)

    def of_kinds(self, kinds: Collection[str]) -> "RetrievalDataset":
        """The dataset with only the queries of these kinds; the corpus stays whole. For a mixture by kind, pass
        `finetune` {kind: dataset.of_kinds([kind]) for ...}. Raises `ValueError` for a kind that no query has."""
        found = Counter(self.kinds.values())
        if unknown := [kind for kind in kinds if kind not in found]:
            known = ", ".join(f"{kind} ({count:,})" for kind, count in found.most_common())
            raise ValueError(f"no question is of the kind {unknown[0]!r}; found {known or 'questions without kinds'}")
        queries = {i: text for i, text in self.queries.items() if self.kinds.get(i) in kinds}
        kept = {name: {i: x for i, x in getattr(self, name).items() if i in queries} for name in BY_QUERY}
        return replace(self, queries=queries, **kept)

    def shares_with(self, training: "RetrievalDataset") -> str:
        """A warning about judged queries and documents also in the training set, by text; "" if there are none."""
        answers, answers_there = self.answers(), training.answers()
        questions, asked = set(answers), set(answers_there)
        documents, answering = set().union(*answers.values()), set().union(*answers_there.values())
        if questions.isdisjoint(asked) and documents.isdisjoint(answering):
            return ""
        shared = f"{len(questions & asked):,} of {len(questions):,} validation questions"
        shared += f" and {len(documents & answering):,} of the {len(documents):,} documents that answer them"
        return f"{shared} are also in the training set: results on them partly measure memorisation"

    def answers(self) -> dict[str, list[str]]:
        """{query text: the texts of all documents relevant to a query of that text}, where there are any."""
        answers: dict[str, list[str]] = {}
        for query_id, document_id in ((q, d) for q in self.qrels for d in self.relevant(q)):
            answers.setdefault(self.queries[query_id], []).append(self.texts[document_id])
        return answers

    def sha256(self) -> str:
        """The SHA-256 of everything in the dataset, including its order, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name in FIELDS:
            # Without `missing` or `kinds`, the hash is that from before these fields existed.
            is_new = name in ("missing", "kinds")
            for item in (name, *getattr(self, name).items()) if not is_new or getattr(self, name) else ():
                digest.update(json.dumps(item).encode())
        return digest.hexdigest()

    def qrels_by_row(self) -> dict[int, dict[int, int]]:
        """`qrels` as {query row: {document row: grade}}, with rows of `queries` and `corpus` instead of ids."""
        query_rows, document_rows = ({i: row for row, i in enumerate(texts)} for texts in (self.queries, self.corpus))
        return {query_rows[q]: {document_rows[d]: x for d, x in grades.items()} for q, grades in self.qrels.items()}

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """{document id: the text to embed}, in the order of `corpus`: title, a space and text, or whichever there is.
        Source: beir/retrieval/models/sentence_bert.py, `encode_corpus`, which also strips the result; this does not."""
        return {i: " ".join(filter(None, (self.titles.get(i), text))) for i, text in self.corpus.items()}


def connected_components(links: Iterable[tuple[Item, Item]]) -> dict[Item, Item]:
    """{item: the smallest item of its component}, for all linked items (an item may link to itself).
    connected_components([("a", "b"), ("c", "c"), ("b", "d")]) returns {"a": "a", "b": "a", "c": "c", "d": "a"}."""
    parents: dict[Item, Item] = {}

    def root(item: Item) -> Item:
        while parents.setdefault(item, item) != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    for one, other in links:
        smaller, larger = sorted((root(one), root(other)))
        parents[larger] = smaller
    return {item: root(item) for item in parents}
