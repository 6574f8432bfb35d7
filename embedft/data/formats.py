"""Files <-> the fields of a RetrievalDataset: a reader and a writer a format, and the checks that name what is wrong.

Deliberately not here: the dataset itself (dataset.py), whose `load` and `save` are the way in.

    fields = read_llamaindex(Path("train_dataset.json"), skip_empty=False)

The formats:

llamaindex  `*.json`: {"queries": {id: text}, "corpus": {id: text}, "relevant_docs": {query id: [document id]}, "mode":
            "text"}; `mode` may be absent.
beir        a folder: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`), qrels/<split>.tsv with the
            header `query-id corpus-id score`. queries.jsonl holds the queries of all splits; those of one split are
            the ones that its qrels name. Source: beir/datasets/data_loader.py, `GenericDataLoader.load`.
jsonl, csv  `*.jsonl`, `*.csv`, `*.tsv`: a pair or triplet a row. Columns by name (COLUMN_ROLES, any case); others are
            ignored. Negatives are `negative`, `negative_1`, `negative_2`, ... (null, absent, or in CSV an empty cell:
            none) or, in JSONL, a list `negatives`. Rows are counted from 0, dropped ones too, blank lines not: row 7
            brings query "q7", document "d7" and negatives "d7n0", "d7n1", ... Where equal texts are merged, the id is
            that of the row that brought the text first.
            `query_id`, `document_id` and `negative_ids` (a list beside `negatives`) give ids instead; then equal ids,
            not equal texts, say what is the same. `grade` is the relevance, 1 when absent. `save` writes all these.
"""

import csv
import functools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..files import atomic_write, read_json, read_jsonl, read_lines, write_json

FORMATS = ("llamaindex", "beir", "jsonl", "csv")
SUFFIXES = {".json": "llamaindex", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv"}
# The formats that can be written, with the optional fields that each can hold.
WRITABLE = {"llamaindex": (), "beir": ("titles",), "jsonl": ("negatives",)}
COLUMN_ROLES = {
    "anchor": "query",
    "query": "query",
    "question": "query",
    "positive": "document",
    "context": "document",
    "document": "document",
    "query_id": "query_id",
    "document_id": "document_id",
    "grade": "grade",
    "negatives": "negatives",
    "negative_ids": "negative_ids",
}


class Fields(Protocol):
    """What the writers need of a RetrievalDataset, which imports them."""

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    negatives: dict[str, list[str]]
    titles: dict[str, str]


# Checks: each raises ValueError, `where` begins its message.


def _is_blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def check_text(text: Any, where: str) -> None:
    """A text, or an id, is a string, not blank, and can be written in UTF-8."""
    if _is_blank(text):
        raise ValueError(f"{where} is empty")
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string, found {reprlib.repr(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell it ("\ud83d" alone), but neither a UTF-8 file nor a tokenizer takes it.
        raise ValueError(f"{where} has a lone surrogate at character {error.start}") from None


def check_id(kind: str, i: Any, texts: dict[str, str], where: str) -> None:
    """An id is one of `texts`; `kind` is "query" or "document"."""
    if not isinstance(i, str) or i not in texts:
        place, unit = {"query": ("queries", "queries"), "document": ("corpus", "documents")}[kind]
        raise ValueError(f"{where}{kind} id {i!r} is not in the {place} ({len(texts):,} {unit})")


def check_distinct(values: list[str], where: str) -> None:
    """No value stands twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{where} {Counter(values).most_common(1)[0][0]!r} stands twice")


def check_grade(grade: Any, where: str) -> None:
    """A grade is an integer of 0 or more."""
    if type(grade) is not int or grade < 0:
        raise ValueError(f"{where} must be an integer of 0 or more, found {reprlib.repr(grade)}")


def _parse_grade(grade: Any) -> int:
    """The grade in a file, where it may be written as text."""
    if isinstance(grade, str) and re.fullmatch("[0-9]+", grade):
        grade = int(grade)
    check_grade(grade, "the grade")
    return grade


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {reprlib.repr(row)}")


def choose_format(path: Path, format: str | None, formats: tuple[str, ...], *, folder: bool) -> str:
    """The format named, or else the one that the path stands for."""
    if format is None:
        format = "beir" if folder else SUFFIXES.get(path.suffix.lower())
        if format is None:
            suffixes = ", ".join(SUFFIXES)
            raise ValueError(f"{path}: the suffix is none of {suffixes}; name the format: {', '.join(formats)}")
    if format not in formats:
        raise ValueError(f"{path}: format {format!r} is not one of {', '.join(formats)}")
    return format


# Readers give the arguments of RetrievalDataset; writers say with `refusal` what their format cannot hold.


def read_llamaindex(path: Path, skip_empty: bool) -> dict[str, Any]:
    """The format "llamaindex"."""
    content = read_json(path)
    names = ("queries", "corpus", "relevant_docs")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in names):
        found = ", ".join(content) if isinstance(content, dict) else reprlib.repr(content)
        raise ValueError(f"{path}: expected an object that holds the objects {', '.join(names)}; found {found}")
    if content.get("mode", "text") != "text":
        raise ValueError(f"{path}: mode must be 'text', found {reprlib.repr(content['mode'])}")
    queries, corpus, relevant_docs = (content[name] for name in names)
    for query_id, document_ids in relevant_docs.items():
        check_id("query", query_id, queries, f"{path}: relevant_docs: ")
        where = f"{path}: relevant_docs of query {query_id!r}"
        if not isinstance(document_ids, list):
            raise ValueError(f"{where} must be a list, found {reprlib.repr(document_ids)}")
        for document_id in document_ids:
            check_id("document", document_id, corpus, f"{where}: ")
        check_distinct(document_ids, f"{where}: document id")
    qrels = {query_id: dict.fromkeys(document_ids, 1) for query_id, document_ids in relevant_docs.items()}
    return _make_fields(queries, corpus, qrels, {}, skip_empty)


def _make_fields(queries: dict, corpus: dict, qrels: dict, titles: dict, skip_empty: bool) -> dict[str, Any]:
    """The arguments of RetrievalDataset; with `skip_empty` less blank queries and documents and the qrels of those."""
    num_read = len(queries) + len(corpus)
    if skip_empty:
        queries = {i: text for i, text in queries.items() if not _is_blank(text)}
        corpus = {i: text for i, text in corpus.items() if not _is_blank(text) or i in titles}
        qrels = {q: {d: x for d, x in grades.items() if d in corpus} for q, grades in qrels.items() if q in queries}
    num_skipped = num_read - len(queries) - len(corpus)
    return {"queries": queries, "corpus": corpus, "qrels": qrels, "titles": titles, "num_skipped": num_skipped}


def write_llamaindex(dataset: Fields, path: Path, refusal: str) -> None:
    """The format "llamaindex", whose grades are all 1."""
    for query_id, grades in dataset.qrels.items():
        for document_id, grade in grades.items():
            if grade != 1:
                raise ValueError(f"{refusal} grade {grade} (query {query_id!r}, document {document_id!r}), only 1")
    relevant = {query_id: list(grades) for query_id, grades in dataset.qrels.items()}
    content = {"queries": dataset.queries, "corpus": dataset.corpus, "relevant_docs": relevant, "mode": "text"}
    write_json(path, content)


def read_beir(folder: Path, split: str | None, skip_empty: bool) -> dict[str, Any]:
    """One split of the format "beir"; None: "test", or the only one."""
    for name in ("corpus.jsonl", "queries.jsonl", "qrels"):
        if not (folder / name).exists():
            raise ValueError(f"{folder}: no {name}; expected corpus.jsonl, queries.jsonl and qrels/<split>.tsv")
    splits = sorted(file.stem for file in (folder / "qrels").glob("[!.]*.tsv"))
    if split is None:
        split = splits[0] if len(splits) == 1 else "test"
    if split not in splits:
        raise ValueError(f"{folder}: no qrels/{split}.tsv; splits found: {', '.join(splits) or 'none'}")
    corpus, titles = _read_beir_texts(folder / "corpus.jsonl", skip_empty)
    queries, _ = _read_beir_texts(folder / "queries.jsonl", skip_empty)
    qrels: dict[str, dict[str, int]] = {}
    path = folder / "qrels" / f"{split}.tsv"
    for line, row in read_csv(path):
        try:
            if not row.keys() >= {"query-id", "corpus-id", "score"}:
                raise ValueError(f"expected the columns query-id, corpus-id, score; found {', '.join(row)}")
            query_id, document_id = row["query-id"], row["corpus-id"]
            check_id("query", query_id, queries, "")
            check_id("document", document_id, corpus, "")
            if document_id in qrels.setdefault(query_id, {}):
                raise ValueError(f"query id {query_id!r} with document id {document_id!r} stands twice")
            qrels[query_id][document_id] = _parse_grade(row["score"])
        except ValueError as error:
            raise ValueError(f"{path} line {line}: {error}") from None
    queries = {query_id: text for query_id, text in queries.items() if query_id in qrels}
    return _make_fields(queries, corpus, qrels, titles, skip_empty)


def _read_beir_texts(path: Path, allow_empty: bool) -> tuple[dict[str, str], dict[str, str]]:
    """{id: text} and {id: title} of corpus.jsonl or queries.jsonl; a blank title is none."""
    texts: dict[str, str] = {}
    titles: dict[str, str] = {}
    for line, row in read_jsonl(path):
        try:
            _check_object(row)
            i, text, title = row.get("_id"), row.get("text"), row.get("title")
            check_text(i, "_id")
            if i in texts:
                raise ValueError(f"_id {i!r} stands twice")
            if not _is_blank(title):
                check_text(title, f"the title of {i!r}")
                titles[i] = title
            if not _is_blank(text) or not (allow_empty or i in titles):
                check_text(text, f"the text of {i!r}")
            texts[i] = "" if _is_blank(text) else text
        except ValueError as error:
            raise ValueError(f"{path} line {line}: {error}") from None
    return texts, titles


def write_beir(dataset: Fields, folder: Path, refusal: str) -> None:
    """The format "beir" in a new or empty folder; ids must fit into lines of tab-separated values."""
    for i in (*dataset.queries, *dataset.corpus):
        if re.search(r'[\0\t\r\n"]', i):
            raise ValueError(f"{refusal} id {i!r} (tab, quote, line break or NUL)")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")
    titles = dataset.titles
    documents = ({"_id": i, "title": titles.get(i, ""), "text": text} for i, text in dataset.corpus.items())
    _write_jsonl_rows(folder / "corpus.jsonl", documents)
    _write_jsonl_rows(folder / "queries.jsonl", ({"_id": i, "text": text} for i, text in dataset.queries.items()))
    with atomic_write(folder / "qrels" / "test.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query_id, grades in dataset.qrels.items():
            file.writelines(f"{query_id}\t{document_id}\t{grade}\n" for document_id, grade in grades.items())


def read_csv(
    path: Path, check_header: Callable[[tuple[str, ...]], Any] | None = None
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yields (the line on which a row begins, {column: cell}); an empty cell is None, a blank line is no row.

    `check_header` raises `ValueError` for a header that will not do.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        # The limit on a cell (131,072 characters) is one for the whole process: lifted for the time of a row.
        limit = csv.field_size_limit(2**31 - 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path} line {line}: invalid CSV ({error})") from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if cells and not header:
            header = cells
            check_distinct([column for column in header if column], f"{path} line {line}: column")
            try:
                if check_header:
                    check_header(tuple(header))
            except ValueError as error:
                raise ValueError(f"{path} line {line}: {error}") from None
        elif cells:
            if len(cells) != len(header):
                raise ValueError(f"{path} line {line}: {len(cells)} columns, the header has {len(header)}")
            yield line, {column: cell or None for column, cell in zip(header, cells, strict=True)}


@functools.lru_cache
def find_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """{role: column}: the roles of COLUMN_ROLES, and "negative 0", "negative 1", ... for numbered ones."""
    found: dict[str, str] = {}
    for column in columns:
        name = column.strip().lower()
        numbered = re.fullmatch(r"negative(?:_([0-9]+))?", name)
        role = f"negative {int(numbered[1] or 0)}" if numbered else COLUMN_ROLES.get(name)
        if role in found:
            raise ValueError(f"columns {found[role]!r} and {column!r} are both the {role}; rename or remove one")
        if role:
            found[role] = column
    for role in ("query", "document"):
        if role not in found:
            expected = ", ".join(name for name, other in COLUMN_ROLES.items() if other == role)
            raise ValueError(f"no column for the {role}; found {', '.join(columns)}; expected one of {expected}")
    return found


def read_pairs(path: Path, rows: Iterable[tuple[int, Any]], merge: bool, skip_empty: bool) -> dict[str, Any]:
    """The formats "jsonl" and "csv", from rows with the lines that they are on."""
    queries, documents = _Texts("query", merge), _Texts("document", merge)
    qrels: dict[str, dict[str, int]] = {}
    negatives: dict[str, dict[str, None]] = {}  # the inner dict is a set that keeps its order
    num_skipped = 0
    for index, (line, row) in enumerate(rows):
        try:
            _check_object(row)
            values = {role: row[column] for role, column in find_columns(tuple(row)).items()}
            row_negatives = _find_negatives(values)
            query, document = values["query"], values["document"]
            if skip_empty and any(map(_is_blank, (query, document, *(text for text, _ in row_negatives)))):
                num_skipped += 1
                continue
            for role in values.keys() & {"query_id", "document_id"}:
                check_text(values[role], role)
            query_id = queries.add(query, values.get("query_id"), f"q{index}")
            document_id = documents.add(document, values.get("document_id"), f"d{index}")
            grade = _parse_grade(values.get("grade", 1))
            grades = qrels.setdefault(query_id, {})
            pair = f"document {document_id!r} of query {query_id!r}"
            if grades.setdefault(document_id, grade) != grade:
                raise ValueError(f"{pair} has the grade {grade}, on a line before {grades[document_id]}")
            if grade > 0 and document_id in negatives.get(query_id, ()):
                raise ValueError(f"{pair} is a negative on a line before")
            if row_negatives or values.get("negatives") is not None:
                negatives.setdefault(query_id, {})
            for place, (text, own_id) in enumerate(row_negatives):
                check_text(text, "a negative")
                negative_id = documents.add(text, own_id, f"d{index}n{place}")
                if grades.get(negative_id, 0) > 0 or (grade > 0 and own_id is None and text == document):
                    raise ValueError(f"negative {negative_id!r} of query {query_id!r} is a positive of the query too")
                negatives[query_id][negative_id] = None
        except ValueError as error:
            raise ValueError(f"{path} line {line}: {error}") from None
    return {
        "queries": queries.texts,
        "corpus": documents.texts,
        "qrels": qrels,
        "negatives": {query_id: list(ids) for query_id, ids in negatives.items()},
        "num_skipped": num_skipped,
    }


class _Texts:
    """{id: text} as rows bring them; merged, a text without an id of its own has that of the equal text before it."""

    def __init__(self, kind: str, merge: bool) -> None:
        self.kind, self.merge = kind, merge
        self.texts: dict[str, str] = {}
        self.ids: dict[str, str] = {}

    def add(self, text: Any, own_id: str | None, row_id: str) -> str:
        """Adds a text and returns its id."""
        check_text(text, f"the {self.kind}")
        i = own_id or (self.ids.get(text, row_id) if self.merge else row_id)
        if self.texts.setdefault(i, text) != text:
            raise ValueError(f"{self.kind} id {i!r} has another text on a line before")
        self.ids.setdefault(text, i)
        return i


def _find_negatives(values: dict[str, Any]) -> list[tuple[Any, str | None]]:
    """(text, its own id or None) of each negative of a row."""
    texts = [] if values.get("negatives") is None else values["negatives"]
    if not isinstance(texts, list):
        raise ValueError(f"negatives must be a list, found {reprlib.repr(texts)}")
    ids = values.get("negative_ids")
    if ids is None:
        ids = [None] * len(texts)
    elif not isinstance(ids, list) or len(ids) != len(texts) or not all(isinstance(i, str) and i for i in ids):
        raise ValueError(f"negative_ids must be a list of {len(texts)} strings, found {reprlib.repr(ids)}")
    numbered = [text for role, text in values.items() if role.startswith("negative ") and text is not None]
    return [*zip(texts, ids, strict=True), *((text, None) for text in numbered)]


def write_jsonl(dataset: Fields, path: Path, refusal: str) -> None:
    """The format "jsonl", in which every document must be named by a query."""
    named = {i for ids in (*dataset.qrels.values(), *dataset.negatives.values()) for i in ids}
    for document_id in dataset.corpus:
        if document_id not in named:
            raise ValueError(f"{refusal} document {document_id!r}, which no query names")
    _write_jsonl_rows(path, _pair_rows(dataset))


def _pair_rows(dataset: Fields) -> Iterator[dict[str, Any]]:
    """A row a judgement; the first row of a query carries its negatives."""
    for query_id, query in dataset.queries.items():
        negative_ids = dataset.negatives.get(query_id)
        for document_id, grade in dataset.qrels[query_id].items():
            document = dataset.corpus[document_id]
            row = {"query_id": query_id, "query": query, "document_id": document_id, "document": document}
            if grade != 1:
                row["grade"] = grade
            if negative_ids is not None:
                row["negatives"] = [dataset.corpus[i] for i in negative_ids]
                row["negative_ids"] = negative_ids
                negative_ids = None
            yield row


def _write_jsonl_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS = {"llamaindex": write_llamaindex, "beir": write_beir, "jsonl": write_jsonl}
