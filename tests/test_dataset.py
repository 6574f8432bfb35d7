"""RetrievalDataset: what it refuses, reading and writing each format, and splits without leaks."""

import csv
import gzip
import itertools
import json
import random
import reprlib
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from naming import names, naming

from embedft.data.dataset import RetrievalDataset, connected_components
from embedft.retrieval.evaluate import evaluate_run
from embedft.retrieval.run import Run

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FINANCE = SHARED_DATA / "finance_qa" / "Financial-QA-10k.csv"
LYFT_UBER = SHARED_DATA / "lyft_uber"

QUERIES = {"q1": "who?", "q2": "what?"}
CORPUS = {"d1": "me", "d2": "that", "d3": "nothing"}
QRELS = {"q1": {"d1": 1}, "q2": {"d2": 1}}

# Line ends, quotes and separators of every format, characters that str.splitlines or str.strip would take, and more.
NASTY_TEXTS = [
    "two\nlines",
    "windows\r\nlines\r",
    " kept blanks \t",
    'a "quoted", text; with\ttabs',
    '"""',
    "line\u2028separator\x0b\x0c\x1c\x85\u2029end",
    "\ufeffstarts with a byte order mark",
    "emoji 👩‍👩‍👧 and 日本語",
    "\\n \\u0041 {}[]",
    "nul \x00 inside",
    "0",
]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, rows: list) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_beir(folder: Path, *, corpus: list | None = None, queries: list | None = None, qrels: str = "q1\td1\t1\n"):
    write_rows(folder / "corpus.jsonl", [{"_id": "d1", "text": "me"}] if corpus is None else corpus)
    write_rows(folder / "queries.jsonl", [{"_id": "q1", "text": "who?"}] if queries is None else queries)
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
    return folder


# The container


def test_holds_what_it_is_given():
    dataset = RetrievalDataset(QUERIES, CORPUS, {"q1": {"d1": 2, "d3": 0}}, negatives={"q1": ["d3"]})
    assert dataset.qrels == {"q1": {"d1": 2, "d3": 0}}
    assert (dataset.scores, dataset.titles, dataset.num_skipped) == ({}, {}, 0)
    assert repr(dataset) == "RetrievalDataset(2 queries, 3 documents, 2 judgements, 1 negatives)"


def test_number_skipped_is_no_part_of_equality():
    assert RetrievalDataset(QUERIES, CORPUS, QRELS, num_skipped=3) == RetrievalDataset(QUERIES, CORPUS, QRELS)
    assert RetrievalDataset(QUERIES, CORPUS, QRELS) != RetrievalDataset(QUERIES, CORPUS, {})


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        ({"queries": {}}, ("queries", "empty")),
        ({"corpus": {}}, ("corpus", "empty")),
        ({"queries": ["who?"]}, ("queries", "dict", ["who?"])),
        ({"qrels": None}, ("qrels", "dict", None)),
        ({"queries": {"q1": " \n"}}, ("query", "q1", "empty")),
        ({"corpus": {"d1": " "}}, ("document", "d1", "empty")),
        ({"missing": {"q9": {"x": 1}}}, ("missing", "q9", "queries", 2)),
        ({"missing": {"q1": {"d1": 1}}}, ("missing", "q1", "d1", "corpus")),
        ({"missing": {"q1": {"x": 0.5}}}, ("missing", "q1", "x", "grade", "2^31", 0.5)),
        ({"queries": {"q1": None}}, ("query", "q1", "empty")),
        ({"corpus": {"d1": b"me"}}, ("document", "d1", "string", b"me")),
        ({"corpus": {"d1": "ab\ud83d"}}, ("document", "d1", "surrogate", 2)),
        ({"queries": {7: "who?"}}, ("query", "string", 7)),
        ({"corpus": {"": "me"}}, ("document", "id", "empty")),
        ({"qrels": {"q9": {}}}, ("qrels", "q9", "queries", 2)),
        ({"qrels": {"q1": {"88": 1}}}, ("qrels", "q1", "'88'", "corpus", 3)),
        ({"qrels": {"q1": {1: 1}}}, ("qrels", "q1", 1, "corpus", 3)),
        ({"qrels": {"q1": ["d1"]}}, ("qrels", "q1", "dict", ["d1"])),
        *(
            ({"qrels": {"q1": {"d1": grade}}}, ("qrels", "q1", "d1", "grade", "whole", "2^31", repr(grade)))
            for grade in (True, "1", 1.0, 2**31, None)
        ),
        ({"negatives": {"q9": []}}, ("negatives", "q9", "queries", 2)),
        ({"negatives": {"q1": "d3"}}, ("negatives", "q1", "list", "'d3'")),
        ({"negatives": {"q1": ["x"]}}, ("negatives", "q1", "x", "corpus", 3)),
        ({"negatives": {"q1": [["d3"]]}}, ("negatives", "q1", ["d3"], "corpus", 3)),
        ({"negatives": {"q1": ["d3", "d3"]}}, ("negatives", "q1", "d3", "twice")),
        ({"negatives": {"q1": ["d3", "d1"]}}, ("negatives", "q1", "d1", "positive")),
        ({"scores": {"q9": {}}}, ("scores", "q9", "queries", 2)),
        ({"scores": {"q1": {"x": 0.5}}}, ("scores", "q1", "x", "corpus", 3)),
        *(
            ({"scores": {"q1": {"d1": score}}}, ("scores", "q1", "d1", "score", "finite", repr(score)))
            for score in (float("nan"), float("-inf"), "0.5", True)
        ),
        ({"titles": {"x": "T"}}, ("titles", "x", "corpus", 3)),
        ({"titles": {"d1": ""}}, ("title", "d1", "empty")),
        ({"kinds": {"q9": "claim"}}, ("kinds", "q9", "queries", 2)),
        ({"kinds": {"q1": " "}}, ("kind", "q1", "empty")),
        ({"kinds": {"q1": 3}}, ("kind", "q1", "string", 3)),
        ({"kinds": ["claim"]}, ("kinds", "dict", ["claim"])),
    ],
)
def test_refuses(changed, facts):
    arguments = {"queries": QUERIES, "corpus": CORPUS, "qrels": QRELS} | changed
    if "queries" in changed or "corpus" in changed:
        arguments = {"qrels": {}} | {key: value for key, value in arguments.items() if key != "qrels"}
    with pytest.raises(ValueError, match=naming(*facts)):
        RetrievalDataset(**arguments)


def test_a_negative_may_be_judged_not_relevant():
    RetrievalDataset(QUERIES, CORPUS, {"q1": {"d3": 0}}, negatives={"q1": ["d3"]})


def test_rows():
    dataset = RetrievalDataset(QUERIES, CORPUS, {"q2": {"d3": 2, "d1": 0}})
    assert dataset.qrels_by_row() == {1: {2: 2, 0: 0}}


def test_texts_have_the_title_in_front():
    corpus = {"d1": " me ", "d2": "", "d3": "nothing"}
    dataset = RetrievalDataset(QUERIES, corpus, {}, titles={"d2": "That", "d3": "Title"})
    assert list(dataset.texts.values()) == [" me ", "That", "Title nothing"]


# Recognising a format


def test_format_is_recognised_or_named(tmp_path):
    rows = write_rows(tmp_path / "pairs.txt", [{"query": "who?", "positive": "me"}])
    with pytest.raises(ValueError, match=naming(rows, "suffix", ".json", ".tsv", "format", "llamaindex", "csv")):
        RetrievalDataset.load(rows)
    assert RetrievalDataset.load(rows, format="jsonl").queries == {"q0": "who?"}
    with pytest.raises(ValueError, match=naming(rows, "format", "xml", "llamaindex", "csv")):
        RetrievalDataset.load(rows, format="xml")
    with pytest.raises(ValueError, match=naming(rows, "file", "beir", "folder")):
        RetrievalDataset.load(rows, format="beir")
    with pytest.raises(ValueError, match=naming(tmp_path, "folder", "csv", "file")):
        RetrievalDataset.load(tmp_path, format="csv")
    with pytest.raises(ValueError, match=naming(tmp_path / "none.json", "no", "file")):
        RetrievalDataset.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=naming(rows, "split", "dev", "beir", "jsonl")):
        RetrievalDataset.load(rows, format="jsonl", split="dev")


# LlamaIndex


def test_llamaindex(tmp_path):
    content = {"queries": QUERIES, "corpus": CORPUS, "relevant_docs": {"q1": ["d1", "d3"], "q2": []}}
    path = write(tmp_path / "qa.json", json.dumps(content))
    assert RetrievalDataset.load(path) == RetrievalDataset(QUERIES, CORPUS, {"q1": {"d1": 1, "d3": 1}, "q2": {}})


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ('{"queries": {"q1": "wh', (1, 20, "JSON", "Unterminated")),
        ('{\n"queries": {"a": "b",\n"a": "c"}}', ("JSON", "key", "'a'")),
        ("[" * 100_000, ("JSON", "recursion")),
        ("1" * 5000, ("JSON", "limit")),
        # The byte order mark is cut before decoding; the line and byte still refer to the file.
        (b"\xef\xbb\xbf{\n\xff}", (2, "UTF-8", "0xff")),
        ("", (1, 1, "JSON", "value")),
        ("[1]", ("object", [1])),
        ('{"queries": {}, "corpus": []}', ("relevant_docs", "queries, corpus", "queries, corpus")),
        ('{"queries": {}, "corpus": {}, "relevant_docs": {}}', ("queries", "empty")),
        ('{"queries": {"q1": 5}, "corpus": {"d1": "me"}, "relevant_docs": {}}', ("queries", "q1", "string", 5)),
        (
            '{"queries": {"q1": "x"}, "corpus": {"d1": "me"}, "relevant_docs": {"q1": "d1"}}',
            ("relevant_docs", "q1", "list", "'d1'"),
        ),
        ('{"queries": {}, "corpus": {}, "relevant_docs": {}, "mode": "image"}', ("mode", "text", "image")),
    ],
)
def test_llamaindex_refuses(tmp_path, content, facts):
    path = write(tmp_path / "qa.json", content)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        RetrievalDataset.load(path)


def test_kinds_of_a_file(tmp_path):
    """They stay with their queries, also where others are skipped; other files and hashes know nothing of them."""
    content = {"queries": QUERIES | {"q3": " "}, "corpus": CORPUS, "relevant_docs": {"q1": ["d1"], "q3": ["d2"]}}
    path = write(tmp_path / "x.json", json.dumps(content | {"kinds": {"q1": "claim", "q3": "title"}}))
    dataset = RetrievalDataset.load(path, skip_empty=True)
    assert dataset.kinds == {"q1": "claim"}
    rows = "query,document,query_kind\nwho?,me,claim\nwho?,that,\nwhat?,that,\n"
    assert RetrievalDataset.load(write(tmp_path / "x.csv", rows)).kinds == {"q0": "claim"}
    assert dataset.sha256() != replace(dataset, kinds={}).sha256()
    plain = RetrievalDataset(QUERIES, CORPUS, QRELS)
    assert plain.sha256() == "baecef407d54577dac20a9924f4623189d2b8a5277ff110e7f58e48d1cf4d788"
    plain.save(tmp_path / "plain.json")
    assert json.loads((tmp_path / "plain.json").read_text()).keys() == {"queries", "corpus", "relevant_docs", "mode"}
    with pytest.raises(ValueError, match=naming(path, "kinds", "object", ["claim"])):
        RetrievalDataset.load(write(path, json.dumps(content | {"kinds": ["claim"]})), skip_empty=True)


def test_queries_of_some_kinds():
    queries = {f"q{i}": f"{i}?" for i in range(4)}
    qrels = {"q0": {"d1": 1}, "q1": {"d2": 1}, "q2": {"d3": 1}, "q3": {"d1": 1}}
    dataset = RetrievalDataset(
        queries,
        CORPUS,
        qrels,
        negatives={"q0": ["d2"], "q1": ["d1"]},
        scores={"q1": {"d3": 0.5}, "q2": {"d3": 0.5}},
        titles={"d1": "Me"},
        missing={"q2": {"x": 1}},
        kinds={"q0": "claim", "q1": "title", "q2": "claim"},
    )
    claims = dataset.of_kinds(["claim"])
    assert list(claims.queries) == ["q0", "q2"]
    assert (claims.corpus, claims.titles) == (
        dataset.corpus,
        dataset.titles,
    )  # what has no claim still has to be beaten
    assert (claims.qrels, claims.negatives) == ({"q0": {"d1": 1}, "q2": {"d3": 1}}, {"q0": ["d2"]})
    assert (claims.scores, claims.missing) == ({"q2": {"d3": 0.5}}, {"q2": {"x": 1}})
    assert claims.kinds == {"q0": "claim", "q2": "claim"}
    assert list(dataset.of_kinds(["title", "claim"]).queries) == ["q0", "q1", "q2"]  # q3 is of no kind
    with pytest.raises(ValueError, match=naming("kind", "'keywords'", "claim", 2, "title", 1)):
        dataset.of_kinds(["claim", "keywords"])
    with pytest.raises(ValueError, match=naming("kind", "'claim'", "kinds")):
        replace(dataset, kinds={}).of_kinds(["claim"])


def test_llamaindex_skips_empty_texts(tmp_path):
    content = {
        "queries": {"q1": "who?", "q2": " ", "q3": "what?"},
        "corpus": {"d1": "me", "d2": "", "d3": None},
        "relevant_docs": {"q1": ["d1", "d2"], "q2": ["d1"], "q3": ["d3"]},
    }
    path = write(tmp_path / "qa.json", json.dumps(content))
    with pytest.raises(ValueError, match=naming(path, "queries", "q2", "empty")):
        RetrievalDataset.load(path)
    dataset = RetrievalDataset.load(path, skip_empty=True)
    assert dataset == RetrievalDataset({"q1": "who?", "q3": "what?"}, {"d1": "me"}, {"q1": {"d1": 1}, "q3": {}})
    assert dataset.num_skipped == 3


# BEIR


def test_beir_keeps_the_queries_of_its_split(tmp_path):
    folder = write_beir(
        tmp_path,
        corpus=[{"_id": "d1", "title": "Me", "text": "me"}, {"_id": "d2", "title": "", "text": "b"}],
        queries=[
            {"_id": "q2", "text": "two", "metadata": {}},
            {"_id": "q3", "text": "x"},
            {"_id": "q1", "text": "one"},
        ],
        qrels="q1\td1\t2\nq1\td2\t0\nq2\td2\t1\n",
    )
    write(folder / "qrels" / "dev.tsv", "query-id\tcorpus-id\tscore\r\nq3\td1\t1\r\n")
    dataset = RetrievalDataset.load(folder)
    expected = {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert dataset == RetrievalDataset(
        {"q2": "two", "q1": "one"}, {"d1": "me", "d2": "b"}, expected, titles={"d1": "Me"}
    )
    assert list(dataset.queries) == ["q2", "q1"]
    assert RetrievalDataset.load(folder, split="dev").queries == {"q3": "x"}
    with pytest.raises(ValueError, match=naming(folder, "qrels/train.tsv", "splits", "dev", "test")):
        RetrievalDataset.load(folder, split="train")
    (folder / "qrels" / "test.tsv").unlink()
    write(folder / "qrels" / "._dev.tsv", "left by macOS")
    assert RetrievalDataset.load(folder).queries == {"q3": "x"}
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    with pytest.raises(ValueError, match=naming(folder, "qrels/test.tsv", "splits", "dev", "train")):
        RetrievalDataset.load(folder)


def test_beirs_own_file_of_a_split_wins(tmp_path):
    folder = write_beir(tmp_path, queries=[{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}])
    for name in ("test.qrels", "test.txt", "test.trec.gz"):
        write(folder / "qrels" / name, gzip.compress(b"q2 0 d1 1\n") if name.endswith(".gz") else "q2 0 d1 1\n")
    assert RetrievalDataset.load(folder).queries == {"q1": "one"}
    write(folder / "qrels" / "test.tsv.gz", gzip.compress(b"damaged")[:-5])
    assert RetrievalDataset.load(folder).queries == {"q1": "one"}


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_beir_refuses_a_missing_file(tmp_path, name):
    (write_beir(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=naming(tmp_path, "no", name)):
        RetrievalDataset.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"qrels": "q1\td1\t1\nq1\td1\t2\n"}, ("test.tsv", 3, "q1", "d1", "twice")),
        ({"qrels": "q1\td1\t1.5\n"}, ("test.tsv", 2, "grade", "whole", "2^31", 1.5)),
        ({"qrels": "q1\td1\t99999999999\n"}, ("test.tsv", 2, "grade", "whole", "2^31", 99999999999)),
        ({"qrels": "q1\td1\t1\nq1\td1\n"}, ("test.tsv", 3, "columns", 2, 3)),
        ({"qrels": ""}, ("qrels", "none", "queries")),
        ({"corpus": [{"_id": "d1", "text": "a"}, {"_id": "d1", "text": "b"}]}, ("corpus.jsonl", 2, "_id", "d1")),
        ({"corpus": [{"_id": 7.5, "text": "a"}]}, ("corpus.jsonl", 1, "_id", "string", 7.5)),
        ({"corpus": [{"_id": True, "text": "a"}]}, ("corpus.jsonl", 1, "_id", "string", True)),
        ({"corpus": [{"_id": 7, "text": "a"}, {"_id": "7", "text": "b"}]}, ("corpus.jsonl", 2, "_id", "'7'", "twice")),
        ({"corpus": [{"text": "a"}]}, ("corpus.jsonl", 1, "_id", "empty")),
        ({"corpus": [{"_id": "d1", "text": 3}]}, ("corpus.jsonl", 1, "text", "d1", "string", 3)),
        ({"corpus": [{"_id": "d1", "contents": "a"}]}, ("corpus.jsonl", 1, "text", "_id", "contents")),
        ({"corpus": [{"_id": "d1", "title": "A", "body": "a"}]}, ("corpus.jsonl", 1, "text", "title", "body")),
        ({"queries": [{"_id": "q1", "query": "a"}]}, ("queries.jsonl", 1, "text", "_id", "query")),
        ({"corpus": [{"_id": "d1", "text": "a", "title": 3}]}, ("corpus.jsonl", 1, "title", "d1", "string", 3)),
        ({"corpus": [["d1", "a"]]}, ("corpus.jsonl", 1, "object", ["d1", "a"])),
        ({"queries": [{"_id": "q1", "text": ""}]}, ("queries.jsonl", 1, "text", "q1", "empty")),
    ],
)
def test_beir_refuses(tmp_path, content, facts):
    folder = write_beir(tmp_path, **content)
    with pytest.raises(ValueError, match=naming(folder, *facts)):
        RetrievalDataset.load(folder)


def test_beir_refuses_another_header(tmp_path):
    write(write_beir(tmp_path) / "qrels" / "test.tsv", "query\tdocument\tgrade\nq1\td1\t1\n")
    facts = ("query-id", "corpus-id", "score", "query", "document", "grade")
    with pytest.raises(ValueError, match=naming("test.tsv", 1, *facts)):
        RetrievalDataset.load(tmp_path)


def test_beir_names_the_line_of_broken_json(tmp_path):
    write(write_beir(tmp_path) / "corpus.jsonl", '{"_id": "d1", "text": "me"}\n\n{"_id": "d2", \n')
    with pytest.raises(ValueError, match=naming("corpus.jsonl", 3, 15, "JSON")):
        RetrievalDataset.load(tmp_path)


def test_beir_skips_empty_texts_but_not_bare_titles(tmp_path):
    folder = write_beir(
        tmp_path,
        corpus=[
            {"_id": "d1", "text": "me", "title": None},
            {"_id": "d2", "text": "", "title": "T"},
            {"_id": "d3", "text": "", "title": " "},
        ],
        queries=[{"_id": "q1", "text": "who?"}, {"_id": "q2", "text": ""}],
        qrels="q1\td1\t1\nq1\td3\t1\nq1\td2\t1\nq2\td1\t1\n",
    )
    dataset = RetrievalDataset.load(folder, skip_empty=True)
    expected = RetrievalDataset({"q1": "who?"}, {"d1": "me", "d2": ""}, {"q1": {"d1": 1, "d2": 1}}, titles={"d2": "T"})
    assert dataset == expected
    assert dataset.num_skipped == 2


# Rows


@pytest.mark.parametrize("query", ["anchor", "Query", "QUESTION "])
@pytest.mark.parametrize("document", ["positive", "Context", "document"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_columns_by_name(tmp_path, query, document, suffix):
    row = {"ticker": "LYFT", query: "who?", document: "me, you", "answer": "", "filing": "x"}
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".jsonl":
        write_rows(path, [row])
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",").writerows([row, row.values()])
    assert RetrievalDataset.load(path) == RetrievalDataset({"q0": "who?"}, {"d0": "me, you"}, {"q0": {"d0": 1}})


ROWS = [
    {"query": "a?", "positive": "A"},
    {"query": "b?", "positive": "A"},  # the document of row 0
    {"query": "a?", "positive": "B"},  # the query of row 0
    {"query": "a?", "positive": "A"},  # row 0 again
]


def test_merge_makes_equal_texts_one(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", ROWS)
    expected = {"q0": {"d0": 1, "d2": 1}, "q1": {"d0": 1}}
    assert RetrievalDataset.load(path) == RetrievalDataset({"q0": "a?", "q1": "b?"}, {"d0": "A", "d2": "B"}, expected)


def test_without_merge_ids_are_rows(tmp_path):
    rows = [*ROWS[:2], {"query": "", "positive": "B"}, *ROWS[2:]]
    dataset = RetrievalDataset.load(write_rows(tmp_path / "pairs.jsonl", rows), merge=False, skip_empty=True)
    queries = {"q0": "a?", "q1": "b?", "q3": "a?", "q4": "a?"}
    corpus = {"d0": "A", "d1": "A", "d3": "B", "d4": "A"}
    qrels = {"q0": {"d0": 1}, "q1": {"d1": 1}, "q3": {"d3": 1}, "q4": {"d4": 1}}
    assert dataset == RetrievalDataset(queries, corpus, qrels)
    assert list(dataset.queries) == list(queries)
    assert dataset.num_skipped == 1


def test_negatives_of_jsonl(tmp_path):
    rows = [
        {"query": "a?", "positive": "A", "negatives": ["N", "B"], "negative_2": "M", "negative": None},
        {"query": "b?", "positive": "B", "negatives": []},
        {"query": "c?", "positive": "N"},
        {"query": "a?", "positive": "A", "negative_1": "O"},  # the same pair: its negatives add up
    ]
    dataset = RetrievalDataset.load(write_rows(tmp_path / "triplets.jsonl", rows))
    corpus = {"d0": "A", "d0n0": "N", "d0n1": "B", "d0n2": "M", "d3n0": "O"}
    qrels = {"q0": {"d0": 1}, "q1": {"d0n1": 1}, "q2": {"d0n0": 1}}
    negatives = {"q0": ["d0n0", "d0n1", "d0n2", "d3n0"], "q1": []}
    assert dataset == RetrievalDataset({"q0": "a?", "q1": "b?", "q2": "c?"}, corpus, qrels, negatives)


def test_negatives_of_csv_may_be_fewer_in_some_rows(tmp_path):
    path = write(tmp_path / "triplets.csv", "anchor,positive,negative_1,negative_2\na?,A,N,M\nb?,B,,N\n")
    dataset = RetrievalDataset.load(path, merge=False)
    assert dataset.negatives == {"q0": ["d0n0", "d0n1"], "q1": ["d1n0"]}
    assert dataset.corpus == {"d0": "A", "d0n0": "N", "d0n1": "M", "d1": "B", "d1n0": "N"}


@pytest.mark.parametrize(("merge", "document_id"), [(True, "d0"), (False, "d1")])
def test_a_negative_equal_to_its_positive_is_refused(tmp_path, merge, document_id):
    path = write_rows(tmp_path / "x.jsonl", [ROWS[1], {"query": "a?", "positive": "A", "negative": "A"}])
    with pytest.raises(ValueError, match=naming(path, 2, document_id, "q1", "positive", "negative")):
        RetrievalDataset.load(path, merge=merge)


def test_a_negative_that_another_row_calls_positive_is_refused(tmp_path):
    first, second = {"query": "a?", "positive": "A", "negative": "B"}, {"query": "a?", "positive": "B"}
    path = write_rows(tmp_path / "x.jsonl", [first, second])
    with pytest.raises(ValueError, match=naming(path, 2, "d0n0", "q0", "positive", "negative")):
        RetrievalDataset.load(path)
    path = write_rows(tmp_path / "y.jsonl", [second, first])
    with pytest.raises(ValueError, match=naming(path, 2, "d0", "q0", "positive", "negative")):
        RetrievalDataset.load(path)
    assert RetrievalDataset.load(path, merge=False).negatives == {"q1": ["d1n0"]}


def test_ids_and_grades_of_rows(tmp_path):
    # Equal texts with ids of their own stay apart, equal ids are one.
    path = write(
        tmp_path / "pairs.csv",
        "query_id,query,document_id,document,grade\nx,a?,7,A,2\nx,a?,8,A,0\ny,a?,7,A,1\n",
    )
    dataset = RetrievalDataset.load(path)
    expected = {"x": {"7": 2, "8": 0}, "y": {"7": 1}}
    assert dataset == RetrievalDataset({"x": "a?", "y": "a?"}, {"7": "A", "8": "A"}, expected)
    assert RetrievalDataset.load(path, merge=False) == dataset


PAIR = {"query": "a?", "positive": "A"}


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (["x"], (1, "object", "'x'")),
        ([{"query": "a?"}], (1, "column", "document", "query", "positive", "context", "document")),
        ([{"positive": "A", "id": 1}], (1, "column", "query", "positive", "id", "anchor", "query", "question")),
        ([PAIR | {"Question": "b?"}], (1, "columns", "query", "Question", "both", "query")),
        (
            [PAIR | {"negative": "B", "negative_0": "C"}],
            (1, "columns", "negative", "negative_0", "both", "negative", 0),
        ),
        ([PAIR, PAIR | {"query": " "}], (2, "query", "empty")),
        ([PAIR | {"positive": None}], (1, "document", "empty")),
        ([PAIR | {"positive": ["A"]}], (1, "document", "string", ["A"])),
        ([PAIR | {"negative": ""}], (1, "negative", "empty")),
        ([PAIR | {"negatives": [None]}], (1, "negative", "empty")),
        ([PAIR | {"negatives": "B"}], (1, "negatives", "list", "'B'")),
        ([PAIR, PAIR | {"negatives": ["B"], "negative_ids": []}], (2, "negative_ids", "list", 1, "strings", [])),
        ([PAIR | {"query_id": 3.5}], (1, "query_id", "string", 3.5)),
        ([PAIR | {"document_id": None}], (1, "document_id", "empty")),
        ([PAIR | {"grade": True}], (1, "grade", "whole", "2^31", True)),
        ([PAIR, PAIR | {"grade": 10**400}], (2, "grade", "whole", "2^31", reprlib.repr(10**400))),
        ([PAIR | {"grade": float("inf")}], (1, "grade", "whole", "2^31", "inf")),
        ([PAIR, PAIR | {"grade": 3}], (2, "d0", "q0", "grade", 3, ..., 1)),
        ([PAIR | {"document_id": "7"}, PAIR | {"positive": "B", "document_id": "7"}], (2, "document", "text", 7)),
        ([PAIR | {"query_kind": "claim"}, PAIR | {"query_kind": "title"}], (2, "q0", "kind", "title", "claim")),
        ([PAIR, PAIR | {"query_kind": 3}], ("line 2", "kind", "q0", "string", 3)),
        ([], ("queries", "empty")),
    ],
)
def test_rows_refused(tmp_path, rows, facts):
    path = write_rows(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        RetrievalDataset.load(path)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("query,positive\n\n\na?,A,B\n", (4, "columns", 3, ..., "header", ..., 2)),
        # Rows are named by the line on which they begin, and cells may hold lines.
        ('query,positive\n"a\nb?","A\r\nB"\n\nc?,\n', (6, "document", "empty")),
        ('query,positive\na?,A\nb?,"B\nand no end\n', (3, "CSV", "end")),
        ('query,positive\n"a"?,A\n', (2, "CSV")),
        ("query,query,positive\na?,b?,A\n", (1, "column", "query", "twice")),
        ("query;positive\na?;A\n", (1, "column", "query", "query;positive", "anchor", "query")),
        (b"query,positive\na?,A\nb?,\xe9\n", (3, "UTF-8", "0xe9")),
        ("query,positive\n", ("queries", "empty")),
        ("", ("queries", "empty")),
    ],
)
def test_csv_refused(tmp_path, content, facts):
    path = write(tmp_path / "x.csv", content)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        RetrievalDataset.load(path)


def test_csv_texts_arrive_whole(tmp_path):
    path = tmp_path / "x.csv"
    long_text = "word " * 40_000  # beyond csv's own limit on a cell
    texts = [*NASTY_TEXTS, long_text]
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["query", "positive"], *([text, text] for text in texts)])
    limit = csv.field_size_limit(1000)
    try:
        dataset = RetrievalDataset.load(path)
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(limit)
    assert list(dataset.queries.values()) == texts
    assert list(dataset.corpus.values()) == texts


def test_csv_columns_without_a_name_are_ignored(tmp_path):
    path = write(tmp_path / "x.csv", ",query,positive,\n0,a?,A,\n")
    assert RetrievalDataset.load(path) == RetrievalDataset({"q0": "a?"}, {"d0": "A"}, {"q0": {"d0": 1}})


def test_skip_empty_counts_rows(tmp_path):
    rows = [
        {"query": "", "positive": "A"},
        ROWS[0],
        {"query": "b?", "positive": None},
        {"query": "b?", "positive": "B", "negatives": ["N", ""]},
        {"query": "c?", "positive": "C", "negative": None},
    ]
    dataset = RetrievalDataset.load(write_rows(tmp_path / "x.jsonl", rows), skip_empty=True)
    assert dataset == RetrievalDataset(
        {"q1": "a?", "q4": "c?"}, {"d1": "A", "d4": "C"}, {"q1": {"d1": 1}, "q4": {"d4": 1}}
    )
    assert dataset.num_skipped == 3


# Data as it is published


def load_with_warnings(path: Path, **options) -> tuple[RetrievalDataset, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return RetrievalDataset.load(path, **options), [str(x.message) for x in caught]


def test_whole_grades_of_pairs_may_be_written_as_floats(tmp_path):
    write(tmp_path / "pairs.jsonl", json.dumps(PAIR | {"grade": 2.0}))
    assert RetrievalDataset.load(tmp_path / "pairs.jsonl").qrels == {"q0": {"d0": 2}}


def test_beir_grades_may_be_negative_or_written_as_floats(tmp_path):
    folder = write_beir(
        tmp_path,
        corpus=[{"_id": f"d{i}", "text": f"text {i}"} for i in range(1, 5)],
        qrels="q1\td1\t2\nq1\td2\t-1\nq1\td3\t2.0\nq1\td4\t0.0\n",
    )
    dataset = RetrievalDataset.load(folder)
    assert dataset.qrels == {"q1": {"d1": 2, "d2": -1, "d3": 2, "d4": 0}}
    dataset.save(tmp_path / "copy")
    assert RetrievalDataset.load(tmp_path / "copy") == dataset


def test_beir_judgements_of_what_is_missing_are_counted(tmp_path):
    """Two judgements of documents that are not there, two of queries that are not; strict refuses each."""
    qrels = "q1\td1\t1\nq1\tgone\t2\nq1\tlost\t0\nq9\td1\t1\nq8\td1\t1\n"
    folder = write_beir(tmp_path, qrels=qrels)
    dataset, told = load_with_warnings(folder)
    assert (dataset.qrels, dataset.missing) == ({"q1": {"d1": 1}}, {"q1": {"gone": 2, "lost": 0}})
    assert dataset.all_qrels() == {"q1": {"d1": 1, "gone": 2, "lost": 0}}
    assert names(told[0], "test.tsv", 5, "query", "q9", 1, ..., 2)
    assert names(told[1], "test.tsv", 3, "document", "gone", 1, ..., 2)
    dataset.save(tmp_path / "copy")
    assert load_with_warnings(tmp_path / "copy")[0] == dataset
    with pytest.raises(ValueError, match=naming("test.tsv", 3, "gone", "corpus", 1)):
        RetrievalDataset.load(folder, strict=True)
    write_beir(tmp_path, qrels="q9\td1\t1\n")
    with pytest.raises(ValueError, match=naming("test.tsv", 2, "q9", "queries", 1)):
        RetrievalDataset.load(folder, strict=True)


def test_a_missing_document_counts_as_relevant_and_not_found(tmp_path):
    """One of two relevant documents is found: recall 0.5, as trec_eval has it."""
    folder = write_beir(tmp_path, qrels="q1\td1\t1\nq1\tgone\t1\n")
    dataset, _ = load_with_warnings(folder)
    report = evaluate_run(Run.from_dict({"q1": {"d1": 1.0}}), dataset)
    assert report.metrics["recall@10"] == 0.5
    assert report.metrics["mrr@10"] == 1.0


def test_llamaindex_files_may_refer_to_what_is_missing(tmp_path):
    content = {"queries": QUERIES, "corpus": CORPUS, "relevant_docs": {"q1": ["d1", "gone"], "q2": ["gone"], "q9": []}}
    path = write(tmp_path / "qa.json", json.dumps(content))
    dataset, told = load_with_warnings(path)
    missing = {"q1": {"gone": 1}, "q2": {"gone": 1}}
    assert dataset == RetrievalDataset(QUERIES, CORPUS, {"q1": {"d1": 1}, "q2": {}}, missing=missing)
    assert len(told) == 1
    assert names(told[0], path, "relevant_docs", "gone", "corpus", 3, 2)
    dataset.save(tmp_path / "copy.json")
    assert load_with_warnings(tmp_path / "copy.json")[0] == dataset
    with pytest.raises(ValueError, match=naming(path, "relevant_docs", "gone", 3)):
        RetrievalDataset.load(path, strict=True)
    with pytest.raises(ValueError, match=naming(tmp_path / "copy.jsonl", "'jsonl'", "missing")):
        dataset.save(tmp_path / "copy.jsonl")
    assert dataset.sha256() != replace(dataset, missing={}).sha256()


def test_beir_keeps_empty_documents(tmp_path):
    rows = [{"_id": "d1", "text": "me"}, {"_id": "d2", "title": "", "text": "", "metadata": {}}]
    folder = write_beir(tmp_path, corpus=rows)
    assert RetrievalDataset.load(folder).corpus == {"d1": "me", "d2": ""}
    skipped = RetrievalDataset.load(folder, skip_empty=True)
    assert (skipped.corpus, skipped.num_skipped) == ({"d1": "me"}, 1)
    with pytest.raises(ValueError, match=naming(tmp_path / "copy.json", "llamaindex", "d2", "empty")):
        RetrievalDataset.load(folder).save(tmp_path / "copy.json")


def test_what_refuses_an_empty_text_names_the_option(tmp_path):
    rows = write_rows(tmp_path / "x.jsonl", [PAIR, {"query": "b?", "positive": ""}])
    content = {"queries": QUERIES, "corpus": {"d1": ""}, "relevant_docs": {}}
    folder = write_beir(tmp_path / "beir", queries=[{"_id": "q1", "text": ""}])
    for path, facts in (
        (rows, ("x.jsonl", 2, "document")),
        (write(tmp_path / "qa.json", json.dumps(content)), ("qa.json", "corpus", "d1")),
        (folder, ("queries.jsonl", 1, "q1")),
    ):
        with pytest.raises(ValueError, match=naming(*facts, "empty", "--skip-empty")):
            RetrievalDataset.load(path)


def gzipped(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_compressed_files(tmp_path, name):
    dataset = make_random(0)
    dataset.save(tmp_path / name)
    path = gzipped(tmp_path / name)
    assert RetrievalDataset.load(path) == dataset
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=naming(path, "damaged", "gzip")):
        RetrievalDataset.load(path)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_saving_compresses_what_ends_in_gz(tmp_path, name):
    """Equal datasets give equal bytes, whatever their names and times."""
    dataset = make_random(0)
    for file in (name, f"{name}.gz", f"other-{name}.gz"):
        dataset.save(tmp_path / file)
    packed = (tmp_path / f"{name}.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / name).read_bytes()
    assert packed == (tmp_path / f"other-{name}.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # neither a name nor a time (RFC 1952, section 2.3)
    assert RetrievalDataset.load(tmp_path / f"{name}.gz") == dataset
    with pytest.raises(ValueError, match=naming("x.csv.gz", "'csv'", "jsonl")):
        dataset.save(tmp_path / "x.csv.gz")
    assert len(list(tmp_path.iterdir())) == 3


def test_compressed_beir_and_tables(tmp_path):
    dataset = make_random(0, titles=True, num_loose=2)
    dataset.save(tmp_path / "beir")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        gzipped(tmp_path / "beir" / name)
    assert RetrievalDataset.load(tmp_path / "beir") == dataset
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        path = gzipped(write(tmp_path / name, f"query{delimiter}positive\na?{delimiter}A\n"))
        assert RetrievalDataset.load(path).corpus == {"d0": "A"}


def test_a_git_lfs_pointer_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for path in (write(tmp_path / name, pointer) for name in ("x.json", "x.csv", "x.jsonl.gz", "x.csv.gz")):
        with pytest.raises(ValueError, match=naming(path, "LFS", "`git lfs pull`")):
            RetrievalDataset.load(path)


def test_a_judgement_may_stand_there_twice(tmp_path):
    """As in some published files; another grade for the same pair is refused, and so is both by strict."""
    path = write_beir(tmp_path, qrels="q1\td1\t1\nq1\td1\t1.0\n")
    assert RetrievalDataset.load(path).qrels == {"q1": {"d1": 1}}
    with pytest.raises(ValueError, match=naming("test.tsv", 3, "q1", "d1", "twice")):
        RetrievalDataset.load(path, strict=True)
    write(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t0\n")
    with pytest.raises(ValueError, match=naming("test.tsv", 3, "q1", "d1", "twice")):
        RetrievalDataset.load(path)
    content = {"queries": {"q1": "x"}, "corpus": {"d1": "me"}, "relevant_docs": {"q1": ["d1", "d1"]}}
    qa = write(tmp_path / "qa.json", json.dumps(content))
    assert RetrievalDataset.load(qa).qrels == {"q1": {"d1": 1}}
    with pytest.raises(ValueError, match=naming(qa, "relevant_docs", "q1", "d1", "twice")):
        RetrievalDataset.load(qa, strict=True)


@pytest.mark.parametrize("qrels", ["", "q7\td1\t1\n"])
def test_qrels_of_no_query_are_named(tmp_path, qrels):
    with pytest.raises(ValueError, match=naming(tmp_path, "qrels", "none", 1)):
        load_with_warnings(write_beir(tmp_path, qrels=qrels))


@pytest.mark.parametrize(
    "topics",
    [
        "<TOP>\n<NUM> Number: 301\n<TITLE> who sits\n<DESC> Description: x\n</TOP>\n",
        '<topics task="2021">\n<topic number="301">\n who\nsits\n</topic></topics>',
        '<topic number="301" type="x"><question>no?</question><query>who sits</query></topic>',
        "301\twho sits\r\n302\tand who not\r\n",
    ],
)
def test_topics_of_other_tracks(tmp_path, topics):
    (write_beir(tmp_path) / "queries.jsonl").unlink()
    write(tmp_path / "topics.txt", topics)
    write(tmp_path / "qrels" / "test.tsv", "301 0 d1 1\n")
    assert RetrievalDataset.load(tmp_path).queries == {"301": "who sits"}


def test_tsv_has_no_quoting(tmp_path):
    """A cell that begins with a quote and a later one that ends with one: two rows, not one."""
    content = 'query\tpositive\n"who\tme\nwhat?\tsaid "that"\n"a ""b"""\tc, d\r\n'
    dataset = RetrievalDataset.load(write(tmp_path / "x.tsv", content))
    assert list(dataset.queries.values()) == ['"who', "what?", '"a ""b"""']
    assert list(dataset.corpus.values()) == ["me", 'said "that"', "c, d"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("seed", range(20))
def test_tsv_as_pandas_writes_it(tmp_path, end, seed):
    """With `csv.writer`: cells with tabs, quotes and line ends quoted, others not. Every cell comes back as it was."""
    chance = random.Random(seed)
    pieces = ["mill", " ", '"', '""', "\t", "\n", "\r\n", ",", "a 'b'"]
    cells = [[f"q{i}" + "".join(chance.choices(pieces, k=4)), f"d{i}" + chance.choice(pieces)] for i in range(9)]
    cells += [["q9\tand", "d9"], ['"q10"', "d10\nand\nmore"]]  # their lines alone are no table
    with open(tmp_path / "x.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator=end).writerows([["query", "positive"], *cells])
    dataset = RetrievalDataset.load(tmp_path / "x.tsv")
    assert [[*pair] for pair in zip(dataset.queries.values(), dataset.corpus.values(), strict=True)] == cells


def test_rows_of_a_tsv_never_merge(tmp_path):
    """Lines that are a table as they stand are its rows, though a CSV reader would make one of the two."""
    path = write(tmp_path / "x.tsv", 'query\tpositive\nq1\t"begins\nq2\tends"\n')
    assert list(RetrievalDataset.load(path).corpus.values()) == ['"begins', 'ends"']
    path = write(tmp_path / "x.tsv", 'query\tpositive\nq1\t"begins\nthe\tmiddle "\tq2\tends"\n')
    with pytest.raises(ValueError, match=naming("x.tsv", 3, 4, ..., "header", ..., 2)):
        RetrievalDataset.load(path)
    path = write(tmp_path / "x.tsv", 'query\tpositive\nq1\t"a ""b"" c"\nq2\tplain\n')
    assert list(RetrievalDataset.load(path).corpus.values()) == ['a "b" c', "plain"]


def test_blanks_around_the_ids_of_judgements(tmp_path):
    """They go when that makes the id a known one; an id that has them keeps them."""
    write_rows(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "a"}, {"_id": "d2 ", "text": "b"}])
    write_rows(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "a?"}, {"_id": "q2", "text": "b?"}])
    content = "query-id \tcorpus-id\tscore \nq1 \td1  \t1 \n q2\td2 \t1\t\nq2\t d1\t0\n"
    write(tmp_path / "qrels/test.tsv", content)
    dataset, told = load_with_warnings(tmp_path)
    assert dataset.qrels == {"q1": {"d1": 1}, "q2": {"d2 ": 1, "d1": 0}}
    assert told == []


OLD_TOPICS = """<top>
<num> Number: 301
<title> International Organized Crime

<desc> Description:
Identify organizations.
</top>
<top><num>302<title>Topic: poliomyelitis
 and post-polio</title></top>
"""
NEW_TOPICS = '<topics><topic number="1">\n<query>coronavirus origin</query><question>what?</question></topic></topics>'


def test_trec_topics_and_qrels(tmp_path):
    write_rows(tmp_path / "corpus.jsonl", [{"_id": "FT 1", "text": "a"}, {"_id": "FT2", "text": "b"}])
    write(tmp_path / "topics.301-302.txt", OLD_TOPICS)
    write(tmp_path / "qrels.txt", "301 0 FT2 1\n301 0 FT3 -2\n\n302\t0\tFT 1\t2\n")
    dataset, told = load_with_warnings(tmp_path)
    assert dataset.queries == {"301": "International Organized Crime", "302": "poliomyelitis and post-polio"}
    assert dataset.qrels == {"301": {"FT2": 1}, "302": {"FT 1": 2}}
    assert dataset.missing == {"301": {"FT3": -2}}
    assert names(told[0], "qrels.txt", 2, "document", "FT3", 2, 1)
    write(tmp_path / "topics.301-302.txt", OLD_TOPICS + OLD_TOPICS.replace("poliomyelitis\n", "poliomyelitis"))
    assert load_with_warnings(tmp_path)[0].queries == dataset.queries
    write(tmp_path / "topics.301-302.txt", OLD_TOPICS + OLD_TOPICS.replace("poliomyelitis", "polio"))
    with pytest.raises(ValueError, match=naming("topics.301-302.txt", 17, "_id", "'302'", "twice")):
        RetrievalDataset.load(tmp_path)
    write(tmp_path / "topics.301-302.txt", "301\tcrime\n302\t \n")
    with pytest.raises(ValueError, match=naming("topics.301-302.txt", 2, "text", "'302'", "empty")):
        RetrievalDataset.load(tmp_path)
    (tmp_path / "topics.301-302.txt").unlink()
    write(tmp_path / "topics.xml", NEW_TOPICS)
    write(tmp_path / "qrels.txt", "1 0 FT2 1\n")
    assert RetrievalDataset.load(tmp_path).queries == {"1": "coronavirus origin"}
    write(tmp_path / "topics.xml", NEW_TOPICS.replace("origin", "&lt;-&gt; bats &amp; R&#38;D"))
    assert RetrievalDataset.load(tmp_path).queries == {"1": "coronavirus <-> bats & R&D"}
    write(tmp_path / "topics.xml", "nothing")
    with pytest.raises(ValueError, match=naming("topics.xml", "no", "topic")):
        RetrievalDataset.load(tmp_path)


def test_ids_that_are_integers_are_known_by_their_digits(tmp_path):
    wanted = RetrievalDataset({"1": "who?"}, {"7": "me", "8": "you"}, {"1": {"7": 1}})
    beir = write_beir(
        tmp_path / "beir",
        corpus=[{"_id": 7, "text": "me"}, {"_id": 8, "text": "you"}],
        queries=[{"_id": 1, "text": "who?"}],
        qrels="1\t7\t1\n",
    )
    assert RetrievalDataset.load(beir) == wanted
    content = {"queries": {"1": "who?"}, "corpus": {"7": "me", "8": "you"}, "relevant_docs": {"1": [7]}}
    assert RetrievalDataset.load(write(tmp_path / "x.json", json.dumps(content))) == wanted
    row = {"query_id": 1, "query": "who?", "document_id": 7, "document": "me", "negatives": ["you"]}
    rows = write_rows(tmp_path / "x.jsonl", [row | {"negative_ids": [8]}])
    assert RetrievalDataset.load(rows) == replace(wanted, negatives={"1": ["8"]})


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ""])
def test_ids_may_have_spaces(tmp_path, suffix):
    dataset = RetrievalDataset({"a query.txt": "who?"}, {"my file.pdf 3": "me"}, {"a query.txt": {"my file.pdf 3": 1}})
    dataset.save(tmp_path / f"x{suffix}")
    assert RetrievalDataset.load(tmp_path / f"x{suffix}") == dataset


# Round trips


def make_random(
    seed: int, *, grades=(1,), negatives=False, titles=False, scores=False, kinds=False, num_loose: int = 0
):
    """A dataset with nasty ids and texts, some texts equal under two ids, and `num_loose` documents without a query."""
    chance = random.Random(seed)
    queries = {f"q {i} é\u2028": chance.choice(NASTY_TEXTS) + chance.choice(["", str(i)]) for i in range(20)}
    corpus = {f"d/{i},'x": chance.choice(NASTY_TEXTS) + str(i // 2) for i in range(30 + num_loose)}
    used = list(corpus)[:30]
    # Every document is of some query.
    qrels = {query_id: {used[i]: chance.choice(grades)} for i, query_id in enumerate(queries)}
    for i in range(20, 30):
        qrels[chance.choice(list(qrels))][used[i]] = chance.choice(grades)
    optional: dict = {}
    if negatives:
        others = {q: [d for d in corpus if not qrels[q].get(d)] for q in list(queries)[::2]}
        optional["negatives"] = {q: chance.sample(ids, 3) for q, ids in others.items()} | {list(queries)[1]: []}
    if scores:
        optional["scores"] = {q: {d: chance.random() for d in chance.sample(list(corpus), 4)} for q in queries}
    if kinds:
        optional["kinds"] = {q: chance.choice(["question", "claim"]) for q in list(queries)[::3]}
    if titles:
        optional["titles"] = {d: f"title {d}\n" for d in list(corpus)[::3]}
        corpus[list(corpus)[3]] = ""
    return RetrievalDataset(queries, corpus, qrels, **optional)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.json", {"num_loose": 3}),
        ("x.json", {"kinds": True}),
        ("x.jsonl", {"grades": (0, 1, 3), "negatives": True}),
        ("x.jsonl", {"kinds": True}),
        ("folder", {"grades": (0, 1, 3), "titles": True, "num_loose": 3}),
    ],
)
def test_round_trip(tmp_path, name, options, seed):
    dataset = make_random(seed, **options)
    dataset.save(tmp_path / name)
    loaded = RetrievalDataset.load(tmp_path / name)
    assert loaded == dataset
    assert list(loaded.queries) == list(dataset.queries)
    assert [list(grades) for grades in loaded.qrels.values()] == [list(grades) for grades in dataset.qrels.values()]
    if name != "x.jsonl":
        assert list(loaded.corpus) == list(dataset.corpus)


def test_llamaindex_keeps_queries_without_relevant_documents(tmp_path):
    dataset = RetrievalDataset(QUERIES, CORPUS, {"q1": {}})
    dataset.save(tmp_path / "x.json")
    assert RetrievalDataset.load(tmp_path / "x.json") == dataset
    assert json.loads((tmp_path / "x.json").read_text())["mode"] == "text"


def test_jsonl_rows(tmp_path):
    RetrievalDataset(QUERIES, CORPUS, {"q1": {"d1": 1}, "q2": {"d2": 2}}, {"q2": ["d3"]}).save(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_text() == (
        '{"query_id": "q1", "query": "who?", "document_id": "d1", "document": "me"}\n'
        '{"query_id": "q2", "query": "what?", "document_id": "d2", "document": "that", "grade": 2, '
        '"negatives": ["nothing"], "negative_ids": ["d3"]}\n'
    )


def test_beir_files(tmp_path):
    RetrievalDataset(QUERIES, CORPUS, QRELS, titles={"d2": "That"}).save(tmp_path / "x")
    assert (tmp_path / "x" / "corpus.jsonl").read_text().splitlines()[
        1
    ] == '{"_id": "d2", "title": "That", "text": "that"}'
    assert (tmp_path / "x" / "qrels" / "test.tsv").read_text() == "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n"
    assert sorted(p.name for p in (tmp_path / "x").rglob("*")) == ["corpus.jsonl", "qrels", "queries.jsonl", "test.tsv"]


@pytest.mark.parametrize(
    ("format", "changed", "facts"),
    [
        ("llamaindex", {"negatives": {"q1": ["d3"]}}, ("negatives", "jsonl")),
        ("llamaindex", {"titles": {"d1": "T"}}, ("titles", "beir")),
        ("llamaindex", {"scores": {"q1": {"d1": 0.5}}}, ("scores", "no")),
        ("llamaindex", {"qrels": {"q1": {"d1": 2}}}, ("grade", 2, "q1", "d1", 1)),
        ("llamaindex", {"qrels": {"q1": {"d1": 0}}}, ("grade", 0, "q1", "d1", 1)),
        ("beir", {"negatives": {"q1": ["d3"]}}, ("negatives", "jsonl")),
        ("beir", {"scores": {"q1": {"d1": 0.5}}}, ("scores", "no")),
        ("beir", {"kinds": {"q1": "claim"}}, ("kinds", "llamaindex", "jsonl")),
        ("beir", {"qrels": {"q1": {"d1": 1}}}, ("query", "q2", "qrels")),
        ("beir", {"qrels": QRELS | {"q1": {}}}, ("query", "q1", "qrels")),
        ("beir", {"corpus": CORPUS | {"d\t4": "x"}}, ("id", repr("d\t4"), "tab", "NUL")),
        ("beir", {"corpus": CORPUS | {'"4': "x"}}, ("id", repr('"4'), "quote", "NUL")),
        ("jsonl", {"titles": {"d1": "T"}}, ("titles", "beir")),
        ("jsonl", {"scores": {"q1": {"d1": 0.5}}}, ("scores", "no")),
        ("jsonl", {"qrels": {"q1": {"d1": 1}}}, ("query", "q2", "qrels")),
        ("jsonl", {}, ("document", "d3", "query")),
    ],
)
def test_save_refuses_what_a_format_cannot_hold(tmp_path, format, changed, facts):
    path = tmp_path / "out"
    dataset = RetrievalDataset(**({"queries": QUERIES, "corpus": CORPUS, "qrels": QRELS} | changed))
    with pytest.raises(ValueError, match=naming(path, "format", format, *facts)):
        dataset.save(path, format=format)
    assert not path.exists()


def test_save_chooses_the_format_and_minds_what_is_there(tmp_path):
    dataset = RetrievalDataset(QUERIES, CORPUS, QRELS)
    for path, facts in [
        ("x.csv", ("format", "'csv'", "llamaindex", "jsonl")),
        ("x.txt", ("suffix", ".json", ".tsv", "format", "llamaindex", "jsonl")),
    ]:
        with pytest.raises(ValueError, match=naming(tmp_path / path, *facts)):
            dataset.save(tmp_path / path)
    with pytest.raises(ValueError, match=naming(tmp_path, "folder", "llamaindex", "file")):
        dataset.save(tmp_path, format="llamaindex")
    path = write(tmp_path / "x.json", "old")
    with pytest.raises(ValueError, match=naming(path, "file", "beir", "folder")):
        dataset.save(path, format="beir")
    with pytest.raises(ValueError, match=naming(tmp_path, "empty")):
        dataset.save(tmp_path, format="beir")
    dataset.save(path)
    assert RetrievalDataset.load(path) == dataset
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


# Splits


def group_by_search(dataset: RetrievalDataset) -> list[set]:
    """Connected components by repeated merging of sets: queries and documents as (kind, id)."""
    links = [{("q", q), ("d", d)} for q, grades in dataset.qrels.items() for d, grade in grades.items() if grade > 0]
    for kind, ids, texts in (
        ("q", dataset.queries, dataset.queries.values()),
        ("d", dataset.corpus, list(dataset.texts.values())),
    ):
        pairs = list(zip(ids, texts, strict=True))
        links.extend({(kind, i) for i, other in pairs if other == text} for text in set(texts))
    groups: list[set] = []
    for link in links:
        touched = [group for group in groups if group & link]
        groups = [group for group in groups if not group & link] + [link.union(*touched)]
    return groups


@pytest.mark.parametrize("seed", range(8))
def test_split_leaks_nothing_and_loses_nothing_else(seed):
    optional = dict.fromkeys(("negatives", "scores", "titles", "kinds"), True)
    dataset = make_random(seed, grades=(0, 1, 1), num_loose=10, **optional)
    first, second = dataset.split(0.5, seed=seed)
    assert first.corpus.keys().isdisjoint(second.corpus)
    assert set(first.texts.values()).isdisjoint(second.texts.values())
    assert set(first.queries.values()).isdisjoint(second.queries.values())
    for group in group_by_search(dataset):
        sides = {i in (first.queries if kind == "q" else first.corpus) for kind, i in group}
        assert len(sides) == 1
    assert first.queries | second.queries == dataset.queries
    assert first.kinds | second.kinds == dataset.kinds
    assert first.corpus | second.corpus == dataset.corpus
    for part in (first, second):
        assert list(part.queries) == [i for i in dataset.queries if i in part.queries]
        assert list(part.corpus) == [i for i in dataset.corpus if i in part.corpus]
        for name in ("qrels", "scores"):
            for i in part.queries:
                kept = {d: x for d, x in getattr(dataset, name)[i].items() if d in part.corpus}
                assert getattr(part, name)[i] == kept
        for i in part.queries:
            assert [d for d, x in part.qrels[i].items() if x > 0] == [d for d, x in dataset.qrels[i].items() if x > 0]
            if i in dataset.negatives:
                assert part.negatives[i] == [d for d in dataset.negatives[i] if d in part.corpus]
        assert part.titles == {d: t for d, t in dataset.titles.items() if d in part.corpus}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_split_shares_and_seeds(share):
    # 100 documents of two queries each, and 50 documents of none.
    queries = {f"q{i}": f"question {i}" for i in range(200)}
    corpus = {f"d{i}": f"document {i}" for i in range(150)}
    qrels = {f"q{i}": {f"d{i // 2}": 1} for i in range(200)}
    dataset = RetrievalDataset(queries, corpus, qrels)
    first, second = dataset.split(share, seed=0)
    assert len(first.queries) == 200 * share
    assert len(first.corpus) == 150 * share
    assert sum(int(i[1:]) >= 100 for i in first.corpus) == 50 * share
    assert dataset.split(share, seed=0) == (first, second)
    assert dataset.split(share, seed=1)[0].queries != first.queries
    # Every query is as likely on either side: 200 seeds, so its count is Binomial(200, share), 5 sigma.
    counts = Counter(i for seed in range(200) for i in dataset.split(share, seed=seed)[0].queries)
    deviation = 5 * (200 * share * (1 - share)) ** 0.5
    assert all(abs(counts[i] - 200 * share) < deviation for i in queries)


def test_split_keeps_the_own_negatives_of_a_query():
    # Documents that only negatives name go with their query, whatever its side.
    ids = range(40)
    dataset = RetrievalDataset(
        {f"q{i}": f"question {i}" for i in ids},
        {f"d{i}": f"document {i}" for i in ids} | {f"n{i}": f"negative {i}" for i in ids},
        {f"q{i}": {f"d{i}": 1} for i in ids},
        {f"q{i}": [f"n{i}", f"d{(i + 1) % 40}"] for i in ids},
    )
    first, second = dataset.split(0.5, seed=3)
    negatives = first.negatives | second.negatives
    assert all(negatives[f"q{i}"][0] == f"n{i}" for i in ids)
    assert 0 < sum(len(listed) == 1 for listed in negatives.values()) < 40


def test_split_does_not_join_by_grade_0():
    dataset = RetrievalDataset(QUERIES, CORPUS, {"q1": {"d1": 1, "d3": 0}, "q2": {"d2": 1, "d3": 0}})
    first, second = dataset.split(0.5, seed=0)
    # d3 goes with q1, the first query that names it.
    assert first.qrels | second.qrels == {"q1": {"d1": 1, "d3": 0}, "q2": {"d2": 1}}


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_split_refuses_a_share(share):
    with pytest.raises(ValueError, match=naming("share", 0, 1, share)):
        RetrievalDataset(QUERIES, CORPUS, QRELS).split(share, seed=0)


def test_split_refuses_a_part_without_queries():
    dataset = RetrievalDataset(QUERIES, CORPUS, QRELS)
    with pytest.raises(ValueError, match=naming("share", 0.9, "second", "query", 2, 2)):
        dataset.split(0.9, seed=0)
    connected = RetrievalDataset(QUERIES, CORPUS, {"q1": {"d1": 1}, "q2": {"d1": 1}})
    with pytest.raises(ValueError, match=naming("share", 0.4, "first", "query", 2, 1)):
        connected.split(0.4, seed=0)


# The published data, where it is there


@pytest.mark.skipif(not FINANCE.exists(), reason="no shared/data/finance_qa")
def test_finance_file():
    with pytest.raises(ValueError, match=naming(FINANCE, 1735, "query", "empty")):
        RetrievalDataset.load(FINANCE)
    rows = RetrievalDataset.load(FINANCE, merge=False, skip_empty=True)
    assert rows.num_skipped == 2
    assert set(range(7000)) - {int(i[1:]) for i in rows.queries} == {1733, 2731}
    with open(FINANCE, newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            assert rows.queries.get(f"q{i}", "") == row["question"]
            assert rows.corpus.get(f"d{i}", row["context"]) == row["context"]
    # Dropped: the empty context, and one that is in no other row.
    merged = RetrievalDataset.load(FINANCE, skip_empty=True)
    assert len(merged.corpus) == 6757 - 2
    assert len(merged.queries) == 6932
    train, held_out = rows.split(0.9, seed=0)
    assert set(train.corpus.values()).isdisjoint(held_out.corpus.values())
    assert abs(len(train.queries) - 0.9 * 6998) < 10


@pytest.mark.skipif(not LYFT_UBER.exists(), reason="no shared/data/lyft_uber")
@pytest.mark.parametrize(("name", "num_queries", "num_documents"), [("train", 668, 334), ("val", 790, 395)])
def test_lyft_uber(tmp_path, name, num_queries, num_documents):
    dataset = RetrievalDataset.load(LYFT_UBER / f"{name}_dataset.json")
    assert (len(dataset.queries), len(dataset.corpus)) == (num_queries, num_documents)
    assert all(len(grades) == 1 for grades in dataset.qrels.values())
    for path in ("x.json", "x.jsonl", "beir"):
        dataset.save(tmp_path / path)
        assert RetrievalDataset.load(tmp_path / path) == dataset


def test_what_trains_too_by_hand():
    """By text: question "a" is on both sides, and the text "x", which answers another question there."""
    qrels = {"q": {"d": 1}, "r": {"e": 1}, "t": {"e": 1}}
    held_out = RetrievalDataset({"q": "a", "r": "b", "s": "c", "t": "d"}, {"d": "x", "e": "y"}, qrels)
    training = RetrievalDataset({"1": "a", "2": "c"}, {"7": "z", "8": "x"}, {"1": {"7": 1}, "2": {"8": 1, "7": 0}})
    assert names(held_out.shares_with(training), 1, ..., 3, ..., "questions", ..., 1, ..., 2, ..., "documents")
    # Question "c" is not judged here, "x" there answers nothing.
    other = RetrievalDataset({"2": "c"}, {"7": "z", "8": "x"}, {"2": {"8": 0, "7": 1}})
    assert held_out.shares_with(other) == ""


# Connected components


def test_components_by_hand():
    links = [("b", "a"), ("c", "c"), ("d", "b"), ("f", "e"), ("e", "g")]
    expected = {"a": "a", "b": "a", "d": "a", "c": "c", "e": "e", "f": "e", "g": "e"}
    for order in itertools.permutations(links):
        assert connected_components(order) == expected
    assert connected_components([]) == {}


def test_a_long_chain_needs_no_recursion():
    links = [(i, i + 1) for i in reversed(range(50_000))]
    assert set(connected_components(links).values()) == {0}


def test_a_carriage_return_in_a_tsv_cell_stays(tmp_path):
    (tmp_path / "pairs.tsv").write_text("question\tcontext\nwhat?\ta\rb\n", newline="")
    assert list(RetrievalDataset.load(tmp_path / "pairs.tsv").corpus.values()) == ["a\rb"]


def test_a_wrong_header_is_named_by_its_line_even_without_rows(tmp_path):
    (tmp_path / "pairs.csv").write_text("asked,context\n")
    with pytest.raises(ValueError, match=naming("pairs.csv", 1, "column", "query", "asked", "context", "query")):
        RetrievalDataset.load(tmp_path / "pairs.csv")
