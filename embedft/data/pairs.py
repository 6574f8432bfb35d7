"""Pairs and triplets, one per row of a JSONL, CSV or TSV file: the formats "jsonl" and "csv".

Columns are found by name (COLUMN_ROLES, any case); others are ignored. Negatives are `negative`, `negative_1`, ...
(null, absent or an empty cell: none) or, in JSONL, a list `negatives`. Row 7 (counted from 0, dropped rows included)
has query "q7", document "d7" and negatives "d7n0", "d7n1", ... Equal texts that are merged keep the first id.

`query_id`, `document_id` and `negative_ids` (a list next to `negatives`) set ids instead; then equal ids, not equal
texts, identify queries and documents. `grade` is the relevance, 1 if absent; `query_kind` the query's kind, if any.
`write_pairs` writes all of these.
"""

import csv
import functools
import io
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import check_object, read_jsonl, read_lines, write_jsonl
from .checks import SKIP_EMPTY, check_distinct, check_grade, check_text, id_text, is_blank

COLUMN_ROLES = {
    **dict.fromkeys(("anchor", "query", "question"), "query"),
    **dict.fromkeys(("positive", "context", "document"), "document"),
    **{role: role for role in ("query_id", "document_id", "grade", "query_kind", "negatives", "negative_ids")},
}


def read_pairs(path: Path, format: str, *, merge: bool, skip_empty: bool) -> dict[str, Any]:
    """The arguments of RetrievalDataset for a "jsonl" or "csv" file."""
    queries, documents, num_skipped = _Texts("query", merge), _Texts("document", merge), 0
    qrels: dict[str, dict[str, int]] = {}
    negatives: dict[str, dict[str, None]] = {}  # the inner dict is an ordered set
    kinds: dict[str, str] = {}
    for index, (line, row) in enumerate(read_jsonl(path) if format == "jsonl" else read_csv(path)):
        check_object(row, f"{path} line {line}")
        try:
            values = {role: row[column] for role, column in _find_columns(tuple(row)).items()}
            of_row = _find_negatives(values)
            if skip_empty and any(map(is_blank, (values["query"], values["document"], *(text for text, _ in of_row)))):
                num_skipped += 1
                continue
            for role in values.keys() & {"query_id", "document_id"}:
                values[role] = id_text(values[role])
                check_text(values[role], role)
            query_id = queries.add(values["query"], values.get("query_id"), f"q{index}")
            document_id = documents.add(values["document"], values.get("document_id"), f"d{index}")
            grade, grades = parse_grade(values.get("grade", 1)), qrels.setdefault(query_id, {})
            if grades.setdefault(document_id, grade) != grade:
                found = f"document {document_id!r} of query {query_id!r} has the grade {grade}"
                raise ValueError(f"{found}, but {grades[document_id]} on an earlier line")
            if not is_blank(kind := values.get("query_kind")):
                check_text(kind, f"the kind of query {query_id!r}")
                if kinds.setdefault(query_id, kind) != kind:
                    found = f"query {query_id!r} is of the kind {reprlib.repr(kind)}"
                    raise ValueError(f"{found}, but {kinds[query_id]!r} on an earlier line")
            if of_row or values.get("negatives") is not None:
                negatives.setdefault(query_id, {})
            named = [document_id]
            for place, (text, own_id) in enumerate(of_row):
                check_text(text, "a negative", SKIP_EMPTY)
                is_own = own_id is None and text == values["document"]
                named.append(document_id if is_own else documents.add(text, own_id, f"d{index}n{place}"))
                negatives[query_id][named[-1]] = None
            for i in named:
                if grades.get(i, 0) > 0 and i in negatives.get(query_id, ()):
                    raise ValueError(f"document {i!r} of query {query_id!r} is both a positive and a negative")
        except ValueError as error:
            raise ValueError(f"{path} line {line}: {error}") from None
    found = {"queries": queries.texts, "corpus": documents.texts, "qrels": qrels, "kinds": kinds}
    found["num_skipped"] = num_skipped
    return {**found, "negatives": {query_id: list(ids) for query_id, ids in negatives.items()}}


class _Texts:
    """Collects {id: text}; when merging, a text without its own id takes that of an equal earlier text."""

    def __init__(self, kind: str, merge: bool) -> None:
        self.kind, self.merge = kind, merge
        self.texts, self.ids = {}, {}  # {id: text} and {text: its first id}

    def add(self, text: Any, own_id: str | None, row_id: str) -> str:
        check_text(text, f"the {self.kind}", SKIP_EMPTY)
        i = own_id or (self.ids.get(text, row_id) if self.merge else row_id)
        if self.texts.setdefault(i, text) != text:
            raise ValueError(f"{self.kind} id {i!r} has a different text on an earlier line")
        self.ids.setdefault(text, i)
        return i


def parse_grade(grade: Any, where: str = "") -> int:
    """Parses a grade: a whole number, possibly as text or written as 2.0."""
    if isinstance(grade, str) and re.fullmatch(r"[+-]?[0-9]{1,20}(\.0*)?", grade.strip()):
        grade = int(grade.partition(".")[0])
    elif isinstance(grade, float) and grade.is_integer():
        grade = int(grade)
    check_grade(grade, f"{where}the grade")
    return grade


@functools.lru_cache
def _find_columns(columns: tuple[str, ...]) -> dict[str, str]:
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


def _find_negatives(values: dict[str, Any]) -> list[tuple[Any, str | None]]:
    """(text, its own id or None) of each negative of a row."""
    texts, ids = values.get("negatives"), values.get("negative_ids")
    texts = [] if texts is None else texts
    if not isinstance(texts, list):
        raise ValueError(f"negatives must be a list, found {reprlib.repr(texts)}")
    ids = [*map(id_text, ids)] if isinstance(ids, list) else ids
    if ids is None:
        ids = [None] * len(texts)
    elif not isinstance(ids, list) or len(ids) != len(texts) or not all(isinstance(i, str) and i for i in ids):
        raise ValueError(f"negative_ids must be a list of {len(texts)} strings, found {reprlib.repr(ids)}")
    numbered = [text for role, text in values.items() if role.startswith("negative ") and text is not None]
    return [*zip(texts, ids, strict=True), *((text, None) for text in numbered)]


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yields (the line on which a row begins, {column: cell}); an empty cell is None, blank lines are skipped."""
    header: list[str] = []
    for line, cells in _cells(path):
        if cells and not header:
            header = cells
            check_distinct([column for column in header if column], f"{path} line {line}: column")
            try:
                _find_columns(tuple(header))
            except ValueError as error:
                raise ValueError(f"{path} line {line}: {error}") from None
        elif cells:
            if len(cells) != len(header):
                raise ValueError(f"{path} line {line}: {len(cells)} columns, the header has {len(header)}")
            yield line, {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row; TSV has no quoting, unless `_is_quoted` says so."""
    is_tsv = ".tsv" in path.suffixes
    if is_tsv and not _is_quoted(path):
        for number, line in enumerate(read_lines(path), start=1):
            yield number, line.rstrip("\r\n").split("\t") if line.strip("\r\n") else []
        return
    reader, cells = csv.reader(read_lines(path), strict=True, delimiter="\t" if is_tsv else ","), []
    while cells is not None:
        line = reader.line_num + 1
        # The cell size limit (131,072 characters) is process-wide, so it is lifted for one row at a time.
        limit = csv.field_size_limit(2**31 - 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path} line {line}: invalid CSV ({error})") from None
        finally:
            csv.field_size_limit(limit)
        yield line, cells or []


def _is_quoted(path: Path) -> bool:
    """Whether a TSV file is exactly what a CSV writer such as pandas would write for its rows.
    Not if its lines already form a table that would have fewer rows when read with quoting: then one cell merely begins
    with a quote and a later one ends with one."""
    lines = list(read_lines(path))
    if not any('"' in line for line in lines):
        return False
    limit = csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error:
        return False
    finally:
        csv.field_size_limit(limit)
    written, end = io.StringIO(newline=""), "\r\n" if lines[0].endswith("\r\n") else "\n"
    csv.writer(written, delimiter="\t", lineterminator=end).writerows(rows)
    if written.getvalue().rstrip("\r\n") != "".join(lines).rstrip("\r\n"):
        return False
    return len(rows) == len(lines) or len({line.count("\t") for line in lines if line.strip("\r\n")}) > 1


def write_pairs(dataset: Any, path: Path, refusal: str) -> None:
    """Writes the format "jsonl", one row per judgement; a query must name every document."""
    named = {i for ids in (*dataset.qrels.values(), *dataset.negatives.values()) for i in ids}
    if unnamed := [document_id for document_id in dataset.corpus if document_id not in named]:
        raise ValueError(f"{refusal} document {unnamed[0]!r}, which no query names")
    rows, negatives = [], dict(dataset.negatives)
    for query_id, query in dataset.queries.items():
        for document_id, grade in dataset.qrels[query_id].items():
            document = dataset.corpus[document_id]
            row = {"query_id": query_id, "query": query, "document_id": document_id, "document": document}
            row |= {} if grade == 1 else {"grade": grade}
            row |= {"query_kind": dataset.kinds[query_id]} if query_id in dataset.kinds else {}
            if query_id in negatives:  # only once
                row["negatives"] = [dataset.corpus[i] for i in negatives[query_id]]
                row["negative_ids"] = negatives.pop(query_id)
            rows.append(row)
    write_jsonl(path, rows)
