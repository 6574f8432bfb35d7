"""commands/search.py: `embedft search` by `main`, over chunks and data sets, by one question, a pipe and a terminal."""

import copy
import io
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS
from naming import names
from tiny import make_dataset, make_embedder

import embedft
from embedft import RetrievalDataset, bm25_run, fuse, load_embedder
from embedft.cli import main
from embedft.commands.search import make_window_text
from embedft.corpus.chunks import Chunk, Place, save_chunks
from embedft.retrieval.bm25 import split_words
from embedft.retrieval.search import search

QUESTION = "a b c"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, a data set, and chunks with their places."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset().save("pairs.json")
    texts = make_dataset().corpus
    chunks = [
        Chunk(i, text, places=(Place(f"{i}.pdf", 3, 3 + row % 2), *[Place("more.pdf", 1, 1)] * (row % 3)))
        for row, (i, text) in enumerate(texts.items())
    ]
    save_chunks("chunks/chunks.jsonl", chunks)
    return tmp_path


def run(capsys, *arguments: str) -> str:
    assert main(["search", "model", *arguments]) == 0
    return capsys.readouterr().out


def rows_of(out: str) -> list[tuple[int, float, str]]:
    """Rank, score and the rest of each heading."""
    found = [re.fullmatch(r" *(\d+)  (-?\d+\.\d{4})  (.*)", line) for line in out.splitlines()]
    return [(int(match[1]), float(match[2]), match[3]) for match in found if match]


def expected_rows(dataset, *, depth=5, question=QUESTION, **options) -> list[tuple[int, float, str]]:
    embedder = load_embedder("model", device="cpu")
    (row,) = search(embedder, dataset, [question], depth=depth, **options).to_dict().values()
    return [(rank, pytest.approx(score, abs=6e-5), i) for rank, (i, score) in enumerate(row.items(), start=1)]


# What is found.


def test_the_documents_of_a_dataset(place, capsys):
    dataset = make_dataset()
    out = run(capsys, "pairs.json", QUESTION)
    assert rows_of(out) == expected_rows(dataset)
    assert len(rows_of(out)) == 5
    lines = out.splitlines()
    assert lines[1] == f"     {dataset.corpus[rows_of(out)[0][2]]}"
    assert len(lines) == 10
    assert rows_of(run(capsys, "pairs.json", QUESTION, "--depth", "100")) == expected_rows(dataset, depth=100)
    assert rows_of(run(capsys, "pairs.json", QUESTION, "--dim", "8")) == expected_rows(dataset, dim=8)


@pytest.mark.parametrize("data", ["chunks", "chunks/chunks.jsonl"])
def test_chunks_with_file_and_pages(place, capsys, data):
    out = run(capsys, data, QUESTION, "--depth", "9")
    told = {
        f"d{row}": f"d{row}.pdf, {'pages 3-4' if row % 2 else 'page 3'}"
        + ("", " (and 1 more)", " (and 2 more)")[row % 3]
        + f"  d{row}"
        for row in range(9)
    }
    assert rows_of(out) == [(rank, score, told[i]) for rank, score, i in expected_rows(make_dataset(), depth=9)]


def test_chunks_of_both_sides_and_without_places(place, capsys):
    os.rename("chunks/chunks.jsonl", "chunks/train.jsonl")
    (place / "chunks" / "validation.jsonl").write_text('{"id": 7, "text": "a b c"}\n')
    first, *others = rows_of(run(capsys, "chunks", QUESTION, "--depth", "100"))
    assert first == (1, 1.0, "7")
    assert len(others) == 9
    # The first line of a file says whether it is of chunks.
    make_dataset(negatives=1).save("pairs.jsonl")
    assert len(rows_of(run(capsys, "pairs.jsonl", QUESTION))) == 5
    (place / "numbered.jsonl").write_text('{"id": 1, "question": "a", "context": "a b c"}\n')
    assert rows_of(run(capsys, "numbered.jsonl", QUESTION)) == [(1, 1.0, "d0")]


def test_titles_are_searched_and_shown(place, capsys):
    dataset = RetrievalDataset({"q": "x"}, {"d": "b c", "e": "z"}, {"q": {"d": 1}}, titles={"d": "a"})
    dataset.save("beir")
    out = run(capsys, "beir", QUESTION, "--depth", "1")
    assert out == "  1  1.0000  d\n     a b c\n"
    assert run(capsys, "beir", QUESTION, "--depth", "1", "--split", "test", "--format", "beir") == out


def test_hybrid(place, capsys):
    """One half each, of the first hundred of either."""
    dataset, embedder = make_dataset(), make_embedder(place / "model")
    dense = search(embedder, dataset, {"q": QUESTION})
    asked = RetrievalDataset({"q": QUESTION}, dataset.corpus, {})
    fused = fuse([dense, bm25_run(asked, tokenize=embedder.tokenize)], method="zscore", depth=3)
    (row,) = fused.to_dict().values()
    out = rows_of(run(capsys, "chunks", QUESTION, "--depth", "3", "--hybrid"))
    assert [(score, place.split()[-1]) for _, score, place in out] == [
        (pytest.approx(score, abs=6e-5), i) for i, score in row.items()
    ]
    assert [i for i, _ in row.items()] != list(search(embedder, dataset, {"q": QUESTION}, depth=3).to_dict()["q"])


def test_hybrid_with_pairs_of_tokens(place, capsys):
    dataset, embedder = make_dataset(), make_embedder(place / "model")
    dense, asked = search(embedder, dataset, {"q": QUESTION}), RetrievalDataset({"q": QUESTION}, dataset.corpus, {})
    found = []
    for how in ({}, {"ngram": 2, "b": 1.0}):
        lexical = bm25_run(asked, tokenize=embedder.tokenize, **how)
        (row,) = fuse([dense, lexical], method="zscore", depth=3).to_dict().values()
        words = [word for name, value in how.items() for word in (f"--bm25-{name}", str(value))]
        out = rows_of(run(capsys, "chunks", QUESTION, "--depth", "3", "--hybrid", *words))
        found.append([(score, place.split()[-1]) for _, score, place in out])
        assert found[-1] == [(pytest.approx(score, abs=6e-5), i) for i, score in row.items()]
    assert found[0] != found[1]
    assert main(["search", "model", "chunks", QUESTION, "--bm25-ngram", "2"]) == 2
    assert names(capsys.readouterr().err, "--bm25-ngram", "--hybrid")


def test_hybrid_of_a_model_that_shows_no_tokens(place, capsys, monkeypatch):
    """As one behind an API: words."""

    class Silent:
        """The model, its tokens kept to itself."""

        similarity, store = "cosine", None
        encode = staticmethod(make_embedder(place / "model").encode)

    monkeypatch.setattr("embedft.commands.search.load_encoder", lambda options: Silent())
    (place / "two.jsonl").write_text('{"id": "x", "text": "abc a"}\n{"id": "y", "text": "ab c a"}\n')
    (_, _, first), (_, _, second) = rows_of(run(capsys, "two.jsonl", "abc", "--hybrid"))
    assert (first, second) == ("x", "y")
    assert split_words(["abc a"]) == [["abc", "a"]]
    assert main(["search", "model", "two.jsonl", "abc", "--passages", "6", "2"]) == 2
    assert names(capsys.readouterr().err, "passages", (6, 2), "Silent")


def test_through_a_store(place, capsys):
    arguments = ["search", "model", "chunks", QUESTION, "--store", "vectors"]
    assert main(arguments) == 0
    assert "0 texts found, 10 computed" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "10 texts found, 0 computed" in capsys.readouterr().err


# The window that answers best.


def test_the_best_window_is_shown(place, capsys):
    """Windows of two letters, every one: the question is one of them."""
    (place / "long.jsonl").write_text('{"id": "long", "text": "x y z k\\nm n o"}\n{"id": "short", "text": "q"}\n')
    out = run(capsys, "long.jsonl", "k m", "--passages", "4", "1")
    assert out.splitlines()[:2] == ["  1  1.0000  long", "     ... k m ..."]
    assert "     q" in out.splitlines()
    assert run(capsys, "long.jsonl", "x y", "--passages", "4", "2").splitlines()[1] == "     x y ..."
    assert run(capsys, "long.jsonl", "n o", "--passages", "4", "1", "--dim", "32").splitlines()[1] == "     ... n o"
    # Of two sizes, a window of the first, whose score of 1 is half of the document's.
    several = run(capsys, "long.jsonl", "k m", "--passages", "4", "1", "5", "2")
    assert several.splitlines()[1] == "     ... k m ..."
    assert 0.5 < float(several.split()[1]) < 1


@pytest.mark.parametrize("prompt", ["", "d "])
@pytest.mark.parametrize("passages", [(8, 3), (8, 8), (6, 5), (5, 1)])
def test_text_of_a_window_has_its_tokens(place, prompt, passages):
    embedder = load_embedder("model", device="cpu")
    embedder.prompts = {"document": prompt}
    generator = random.Random(0)
    window_text = make_window_text(embedder, passages)
    assert len(embedder.tokenizer.encode(["a " * 99])[0]) == 48  # it still cuts texts off
    around = 2 + len(embedder.tokenize([prompt])[0])
    whole = copy.deepcopy(embedder.tokenizer.backend)
    whole.no_truncation()
    for _ in range(20):
        text = "".join(generator.choices(f"{LETTERS}ABC ,.  \n语", k=generator.randint(1, 90)))
        spans = whole.encode(text, add_special_tokens=False).offsets
        cut, _ = embedder.tokenizer.windows([text], passages, prompt=prompt)
        first = 0
        for number, ids in enumerate(cut):
            inside = spans[first : first + len(ids) - around]
            expected = text[inside[0][0] : inside[-1][1]] if inside else text
            dots = "... " * (number > 0), " ..." * (number < len(cut) - 1)
            assert window_text(text, number) == expected.join(dots)
            assert ids[around - 1 : -1] == embedder.tokenize([text])[0][first : first + len(inside)]
            first += min(passages[1], passages[0] - around)


def test_the_beginning_is_shown_of_long_documents(place, capsys):
    text = " ".join(f"word{i}" for i in range(200))
    (place / "long.jsonl").write_text(json.dumps({"id": "d", "text": text}) + "\n")
    _, *lines = run(capsys, "long.jsonl", QUESTION).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("     word") and len(line) <= 80 for line in lines)
    assert lines[-1].endswith(" ...")
    assert text.startswith(" ".join(" ".join(lines).split()).removesuffix(" ..."))


# Questions one after another.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_questions_are_read_from_a_pipe(place, capsys, monkeypatch):
    encoded = []
    encode = load_embedder("model", device="cpu").__class__.encode
    monkeypatch.setattr(
        "embedft.encoders.embedder.Embedder.encode",
        lambda self, texts, **options: encoded.extend(texts) or encode(self, texts, **options),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c\n\n  7 8 \nx"))
    out = run(capsys, "chunks", "--depth", "2")
    assert sorted(encoded) == sorted([*make_dataset().corpus.values(), "a b c", "7 8", "x"])  # each once
    headings = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert headings == ["a b c", "7 8", "x"]
    assert out.count("\n\n") == 2
    parts = out.split("\n\n")
    for question, part in zip(headings, parts, strict=True):
        found = [(rank, score, told.split()[-1]) for rank, score, told in rows_of(part)]
        assert found == expected_rows(make_dataset(), depth=2, question=question)


def test_an_answer_is_there_before_the_next_question_is_read(place, monkeypatch):
    flushed = []

    class Out(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr("sys.stdin", io.StringIO("a b c\nx\n"))
    monkeypatch.setattr("sys.stdout", Out())
    assert main(["search", "model", "chunks", "--depth", "2"]) == 0
    assert [len(rows_of(text)) for text in flushed[:2]] == [2, 4]


def test_questions_are_typed_until_an_empty_line(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("a b c\n \nnever asked\n"))
    assert main(["search", "model", "chunks", "--depth", "1"]) == 0
    output = capsys.readouterr()
    assert output.err == "question: question: "
    assert len(rows_of(output.out)) == 1
    assert output.out.startswith("  1  ")  # what was typed stands there already
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert main(["search", "model", "chunks"]) == 0
    assert capsys.readouterr().out == ""


def test_questions_typed_at_a_terminal_can_be_edited(place, tmp_path):
    """With both ends at a terminal, `input` reads them, with readline: a cursor key moves instead of being typed."""
    script = """
        import os, pty, sys
        pid, fd = pty.fork()
        if not pid:
            os.execv(sys.executable, [sys.executable, "-m", "embedft", "search", "model", "chunks", "--json"])
        out = b""
        while b"question: " not in out:
            out += os.read(fd, 1000)
        os.write(fd, b"b c\\x1b[D\\x1b[D\\x1b[Da \\n")
        while out.count(b"question: ") < 2:
            out += os.read(fd, 1000)
        os.write(fd, b"\\n")
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out)
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(embedft.__file__).parents[1]),
        "TERM": "xterm",
        "EMBEDFT_PROGRESS": "0",
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("0 "), done.stderr
    assert '{"question": "a b c"' in done.stdout


# Users' errors.


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["missing", QUESTION], ("missing", "file", "folder")),
        (["missing.jsonl", QUESTION], ("missing.jsonl", "file", "folder")),
        (["empty", QUESTION], ("empty", "corpus.jsonl")),
        (["empty.jsonl", QUESTION], ("empty.jsonl", "queries")),
        (["bad.jsonl", QUESTION], ("bad.jsonl", 2, "`id`", "`text`")),
        (["chunks", QUESTION, "--split", "test"], ("chunks", "corpus.jsonl")),
        (["chunks", QUESTION, "--format", "csv"], ("chunks", "folder", "'csv'", "file")),
        (["chunks", " "], ("question", "empty")),
        (["chunks", QUESTION, "--depth", "0"], ("depth", 0, 1)),
        (["chunks", QUESTION, "--dim", "33"], ("dim", 33, 1, 32)),
        (["chunks", QUESTION, "--passages", "6", "8"], ("passages", 8, 1, 6)),
        (["chunks", QUESTION, "--passages", "6", "2", "9"], ("--passages", [6, 2, 9], 3)),
        (["chunks", QUESTION, "--adapter", "none"], ("none", "adapter.json")),
    ],
)
def test_errors(place, capsys, arguments, facts):
    (place / "empty").mkdir()
    (place / "empty.jsonl").touch()
    (place / "bad.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": "c"}\n')
    assert main(["search", "model", *arguments]) == 2
    output = capsys.readouterr()
    assert names(output.err, *facts)
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_scores_are_those_of_the_vectors(place, capsys):
    embedder, text = make_embedder(place / "model"), "a b x"
    (place / "one.jsonl").write_text(json.dumps({"id": "d", "text": text}) + "\n")
    ((_, score, _),) = rows_of(run(capsys, "one.jsonl", QUESTION))
    (query_D,), (document_D,) = embedder.encode([QUESTION], role="query"), embedder.encode([text])
    assert score == pytest.approx(float(np.dot(query_D, document_D)), abs=6e-5)
