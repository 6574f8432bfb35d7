"""Published dataset formats: LlamaIndex's JSON, BEIR folders, TREC topics and qrels. Any file may be .gz.

llamaindex  `*.json`: {"queries": {id: text}, "corpus": {id: text}, "relevant_docs": {query id: [document id]}, "mode":
            "text"}; `mode` may be absent. {"kinds": {query id: kind}} is read and written where queries have kinds.
beir        a folder: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`), qrels/<split>.tsv with the
            header `query-id corpus-id score`; only queries in the split's qrels are read, as in
            beir/datasets/data_loader.py. TREC files may replace them: topics.* (<top> or <topic>) for the queries,
            qrels.* or qrels/<split>.* with the columns query, 0, document, grade. `_id` may be an integer.
            Those of the benchmark are on the hub: "beir:scifact", see beir.py.
jsonl, csv  pairs or triplets, one per row: see pairs.py.

Judgements of unknown queries are dropped, those of unknown documents kept apart; both with a warning (strict: error).
"""

import bisect
import html
import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import atomic_write, check_object, read_jsonl, read_lines, read_object, read_text, write_json, write_jsonl
from .beir import find_beir, is_beir_name
from .checks import SKIP_EMPTY, check_id, check_text, id_text, is_blank
from .pairs import parse_grade, write_pairs

FORMATS = ("llamaindex", "beir", "jsonl", "csv")
SUFFIXES = {".json": "llamaindex", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv"}
WRITABLE = {"llamaindex": ("missing", "kinds"), "beir": ("titles", "missing"), "jsonl": ("negatives", "kinds")}
# TREC's topics: number and title (or query; some XML topics are the query itself), or number, tab and query.
TOP = re.compile(r"(?is)<top>.*?<num>\s*(?:Number:)?\s*([^\s<]+).*?<title>\s*(?:Topic:)?([^<]*)")
TOPIC = re.compile(r"(?is)<topic\s+number=\"([^\"]+)\"[^<>]*>(?:(?:(?!</topic>).)*?<(?:query|title)>)?([^<]*)")
ROW = re.compile(r"(?m)^(\S+)\t([^\t\n]+)$")
Texts = dict[str, str]
Qrels = dict[str, dict[str, int]]
Entry = tuple[str, Any, Any, Any]  # where in the file, id, text, title
Judgement = tuple[str, str, str, int]  # where in the file, query id, document id, grade


def choose_format(path: Path, format: str | None, formats: Iterable[str], *, folder: bool) -> str:
    """Returns `format`, or the one implied by `path`, which need not exist, but must match the format if it does."""
    format = format or ("beir" if folder else SUFFIXES.get(Path(path.name.lower().removesuffix(".gz")).suffix))
    if format is None:
        raise ValueError(f"{path}: suffix is not one of {', '.join(SUFFIXES)}; pass the format: {', '.join(formats)}")
    if format not in formats:
        raise ValueError(f"{path}: format {format!r} is not one of {', '.join(formats)}")
    kinds = ("file", "folder") if format == "beir" else ("folder", "file")
    if path.exists() and path.is_dir() != (format == "beir"):
        raise ValueError(f"{path}: is a {kinds[0]}, but the format {format!r} is a {kinds[1]}")
    return format


def read_published(path: Path, split: str | None, *, skip_empty: bool, strict: bool) -> dict[str, Any]:
    """The arguments of RetrievalDataset for a "llamaindex" file or a "beir" folder."""
    titles, kinds = {}, {}
    if path.is_dir() or is_beir_name(path):
        queries, corpus, titles, judgements = _read_beir(path, split, skip_empty)
        qrels, missing = _sort(judgements, queries, corpus, strict)
        judged = {query_id: text for query_id, text in queries.items() if query_id in qrels or query_id in missing}
        if not judged:
            raise ValueError(f"{path}: the qrels judge none of the {len(queries):,} queries")
        queries = judged
    else:
        queries, corpus, relevant_docs, kinds = _read_llamaindex(path, skip_empty)
        judgements = ((f"{path}: relevant_docs", q, d, 1) for q, ids in relevant_docs.items() for d in ids)
        qrels, missing = _sort(judgements, queries, corpus, strict)
        qrels = {query_id: qrels.get(query_id, {}) for query_id in relevant_docs if query_id in queries}
    num_read = len(queries) + len(corpus)
    if skip_empty:
        queries = {i: text for i, text in queries.items() if text}
        corpus = {i: text for i, text in corpus.items() if text or i in titles}
        qrels = {q: {d: x for d, x in grades.items() if d in corpus} for q, grades in qrels.items() if q in queries}
        missing, kinds = ({q: x for q, x in by_query.items() if q in queries} for by_query in (missing, kinds))
    fields = {"queries": queries, "corpus": corpus, "qrels": qrels, "missing": missing, "titles": titles}
    return {**fields, "kinds": kinds, "num_skipped": num_read - len(queries) - len(corpus)}


def _sort(judgements: Iterable[Judgement], queries: Texts, corpus: Texts, strict: bool) -> tuple[Qrels, Qrels]:
    """Judgements of known and of unknown documents; warns of the latter and of unknown queries, or refuses them."""
    qrels, missing, ignored, counted = {}, {}, [], []
    for where, query_id, document_id, grade in judgements:
        query_id, document_id = _known(query_id, queries), _known(document_id, corpus)
        by_query = qrels
        try:
            check_id("query", query_id, queries, f"{where}: ")
            check_id("document", document_id, corpus, f"{where}: ")
        except ValueError as error:
            if strict:
                raise
            if query_id not in queries:
                ignored.append(error)
                continue
            counted.append(error)
            by_query = missing
        grades = by_query.setdefault(query_id, {})
        is_repeated = document_id in grades
        if grades.setdefault(document_id, grade) != grade or (strict and is_repeated):
            raise ValueError(f"{where}: query id {query_id!r} with document id {document_id!r} appears twice")
    for errors, what in ((ignored, "is ignored"), (counted, "counts, but the document cannot be found")):
        if errors:
            warnings.warn(f"{errors[0]}: the judgement {what} ({len(errors):,} in all)", stacklevel=4)
    return qrels, missing


def _known(i: str, texts: Texts) -> str:
    """An id as spelled in `texts`: judgement files may have whitespace around it."""
    return i.strip() if i not in texts and i.strip() in texts else i


def _read_llamaindex(path: Path, skip_empty: bool) -> tuple[Texts, Texts, dict[str, list[str]], Texts]:
    """Queries, corpus, relevant_docs and kinds."""
    content = read_object(path)
    names = ("queries", "corpus", "relevant_docs")
    if not all(isinstance(content.get(name), dict) for name in names):
        raise ValueError(f"{path}: expected the objects {', '.join(names)}; found {', '.join(content)}")
    if content.get("mode", "text") != "text":
        raise ValueError(f"{path}: mode must be 'text', found {reprlib.repr(content['mode'])}")
    relevant = {q: [*map(id_text, ids)] if isinstance(ids, list) else ids for q, ids in content[names[2]].items()}
    for query_id, ids in relevant.items():
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise ValueError(f"{path}: relevant_docs of query {query_id!r} must list ids, found {reprlib.repr(ids)}")
    if not isinstance(kinds := content.get("kinds", {}), dict):
        raise ValueError(f"{path}: kinds must be an object, {{query id: kind}}, found {reprlib.repr(kinds)}")
    entries = (((f"{path}: {name}", i, text, None) for i, text in content[name].items()) for name in names[:2])
    (queries, _), (corpus, _) = (_collect(of_name, allow_empty=skip_empty) for of_name in entries)
    return queries, corpus, relevant, kinds


def _read_beir(path: Path, split: str | None, skip_empty: bool) -> tuple[Texts, Texts, Texts, Iterator[Judgement]]:
    """Queries, corpus, titles and the judgements of one split; None: "test", or the only one."""
    folder, splits = find_beir(path)
    corpus_file, queries_file = _find(folder, "corpus.jsonl"), _find(folder, "queries.jsonl", "topics.*")
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "test"
    if split not in splits:
        raise ValueError(f"{path}: no qrels/{split}.tsv; splits found: {', '.join(splits) or 'none'}")
    corpus, titles = _collect(_read_rows(corpus_file), allow_empty=True)
    read_queries = _read_rows if ".jsonl" in queries_file.suffixes else _read_topics
    queries, _ = _collect(read_queries(queries_file), allow_empty=skip_empty)
    return queries, corpus, titles, _read_qrels(splits[split])


def _find(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for found in sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")]):
            return found
    raise ValueError(f"{folder}: no {' or '.join(patterns)}; a dataset has corpus.jsonl, queries.jsonl and qrels/")


def _collect(entries: Iterable[Entry], *, allow_empty: bool) -> tuple[Texts, Texts]:
    """{id: text} and {id: title}; blank texts become "" if allowed, and blank titles are omitted."""
    texts, titles = {}, {}
    for where, i, text, title in entries:
        check_text(i, f"{where}: _id")
        if i in texts:
            raise ValueError(f"{where}: _id {i!r} appears twice")
        if not is_blank(title):
            check_text(title, f"{where}: the title of {i!r}")
            titles[i] = title
        if not is_blank(text) or not allow_empty:
            check_text(text, f"{where}: the text of {i!r}", SKIP_EMPTY)
        texts[i] = "" if is_blank(text) else text
    return texts, titles


def _read_rows(path: Path) -> Iterator[Entry]:
    """Yields the lines of corpus.jsonl or queries.jsonl."""
    for line, row in read_jsonl(path):
        where = f"{path} line {line}"
        check_object(row, where)
        if "text" not in row:  # under another name, all texts would pass for empty ones
            raise ValueError(f"{where}: no text; found {', '.join(row)}")
        yield where, id_text(row.get("_id")), row["text"], row.get("title")


def _read_topics(path: Path) -> Iterator[Entry]:
    """Yields the titles, or queries, of a TREC topics file."""
    text = read_text(path)
    topics = [*TOP.finditer(text), *TOPIC.finditer(text)] or [*ROW.finditer(text)]
    if not topics:
        raise ValueError(f"{path}: no topic found, expected <top>, <topic number=...>, or lines of number, tab, query")
    seen, line_ends = set(), [match.start() for match in re.finditer("\n", text)]
    for topic in topics:
        number, title = topic[1], html.unescape(topic[2]) if topic.re is TOPIC else topic[2]
        if (entry := (number, " ".join(title.split()))) not in seen:  # some appear twice
            seen.add(entry)
            yield f"{path} line {bisect.bisect(line_ends, topic.start(1)) + 1}", *entry, None


def _read_qrels(path: Path) -> Iterator[Judgement]:
    """Yields the judgements of a file with BEIR's header, or with TREC's four columns and no header."""
    names: list[str] = []
    for number, line in enumerate(read_lines(path), start=1):
        line, where = line.rstrip(), f"{path} line {number}"
        cells = line.split("\t") if "\t" in line else line.split()
        if not line:
            continue
        stripped = [cell.strip() for cell in cells]
        if not names and {"query-id", "corpus-id", "score"} <= set(stripped):
            names = stripped
            continue
        if not names and len(cells) != 4:
            raise ValueError(f"{where}: expected the columns query-id, corpus-id, score; found {', '.join(cells)}")
        names = names or ["query-id", "", "corpus-id", "score"]
        if len(cells) != len(names):
            raise ValueError(f"{where}: {len(cells)} columns, expected {len(names)}")
        row = dict(zip(names, cells, strict=True))
        yield where, row["query-id"], row["corpus-id"], parse_grade(row["score"], f"{where}: ")


def write_llamaindex(dataset: Any, path: Path, refusal: str) -> None:
    """Writes the format "llamaindex", in which all grades are 1."""
    qrels = dataset.all_qrels()
    if others := [(q, d, grade) for q, d, grade in _flat(qrels) if grade != 1]:
        raise ValueError(f"{refusal} grade {others[0][2]} (query {others[0][0]!r}, document {others[0][1]!r}), only 1")
    relevant = {query_id: list(grades) for query_id, grades in qrels.items()}
    content = {"queries": dataset.queries, "corpus": dataset.corpus, "relevant_docs": relevant, "mode": "text"}
    write_json(path, content | ({"kinds": dataset.kinds} if dataset.kinds else {}))


def write_beir(dataset: Any, folder: Path, refusal: str) -> None:
    """Writes the format "beir" to a new or empty folder; ids must fit into tab-separated lines."""
    qrels = dataset.all_qrels()
    for i in (*dataset.queries, *dataset.corpus, *(document_id for _, document_id, _ in _flat(qrels))):
        if re.search(r'[\0\t\r\n"]', i):
            raise ValueError(f"{refusal} id {i!r} (tab, quote, line break or NUL)")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty, expected a new or empty folder")
    documents = ({"_id": i, "title": dataset.titles.get(i, ""), "text": text} for i, text in dataset.corpus.items())
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", ({"_id": i, "text": text} for i, text in dataset.queries.items()))
    with atomic_write(folder / "qrels" / "test.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"{query_id}\t{document_id}\t{grade}\n" for query_id, document_id, grade in _flat(qrels))


def _flat(qrels: Qrels) -> Iterator[tuple[str, str, int]]:
    return ((q, d, grade) for q, grades in qrels.items() for d, grade in grades.items())


WRITERS = {"llamaindex": write_llamaindex, "beir": write_beir, "jsonl": write_pairs}
