"""commands/chunk.py, questions.py: from files to data sets by `main`, with a server on loopback and without."""

import json
from pathlib import Path

import pydantic
import pytest
from api_server import ApiServer, written_questions
from naming import names
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tiny import make_embedder

from embedft import RetrievalDataset, evaluate
from embedft.cli import main
from embedft.corpus.chunks import load_chunks
from embedft.corpus.prompts import TEMPLATE, fill_template
from embedft.encoders.loading import load_embedder
from embedft.files import read_json, read_jsonl

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
KEY = "sk-secret-0123456789"
SENTENCE = "The annual meeting of number {i} takes place in the town of number {i} on day {i} of the month. "
NOTES = "".join(SENTENCE.format(i=i) for i in range(40))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    make_embedder(tmp_path / "model")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.txt").write_text(NOTES)
    (tmp_path / "docs" / "more.md").write_text(
        "# Rules of the house\n\nNobody sleeps here at night. " + NOTES[:200] + "\f"
    )
    (tmp_path / "docs" / "empty.txt").touch()
    return tmp_path


def chunk(*options: str) -> int:
    """With the packaged MiniLM's tokenizer: that of the tiny model has a token per letter or two."""
    return main(["chunk", "docs", "--out", "chunks", *options])


def test_chunk(place, capsys):
    assert chunk("--size", "40", "--overlap", "25") == 0
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert names(first, "docs/empty.txt", "no", "text")
    assert names(second, "docs/more.md", 2, "no", "text")
    chunks, report = load_chunks("chunks/chunks.jsonl"), read_json("chunks/chunk-report.json")
    lengths = [len(ids) for ids in load_embedder(MODEL).tokenize([c.text for c in chunks])]
    assert [c.num_tokens for c in chunks] == lengths
    assert max(lengths) <= 38  # two special tokens come on top
    assert (report["files"], report["chunks"], report["size"]) == (2, len(chunks), 40)
    assert (report["special_tokens"], report["tokens"]) == (2, sum(lengths))
    assert [(row["file"], row["page"]) for row in report["skipped"]] == [("docs/empty.txt", None), ("docs/more.md", 2)]
    assert all(names(row["reason"], "no", "text") for row in report["skipped"])
    assert names(out, f"{len(chunks):,} chunks", 40, f"{sum(lengths):,}")  # as --size counts
    assert not names(out, 38)
    assert "skipped 2 files or pages; see chunks/chunk-report.json" in out
    # All that the model reads, when no size is given.
    assert chunk("--overwrite") == 0
    assert read_json("chunks/chunk-report.json")["size"] == 256


def test_chunk_splits_and_leaves_no_file_of_an_earlier_split(place, capsys):
    assert chunk() == 0
    capsys.readouterr()
    assert chunk("--train-files", "docs/notes.txt", "--overwrite") == 0
    assert names(capsys.readouterr().err.splitlines()[-1], "chunks/chunks.jsonl", "split")
    assert sorted(path.name for path in (place / "chunks").iterdir()) == [
        "chunk-report.json",
        "train.jsonl",
        "validation.jsonl",
    ]
    train, validation = (load_chunks(f"chunks/{name}.jsonl") for name in ("train", "validation"))
    assert {p.file for c in train for p in c.places} == {"docs/notes.txt"}
    assert {p.file for c in validation for p in c.places} == {"docs/more.md"}
    report = read_json("chunks/chunk-report.json")
    assert (report["train"], report["validation"]) == (len(train), len(validation))
    assert chunk("--train-share", "0.5", "--seed", "1", "--overwrite") == 0
    assert chunk("--train-pages", "2-3", "--overwrite") == 2
    assert names(
        capsys.readouterr().err.splitlines()[-1],
        "embedft chunk",
        "--train-pages",
        "0 of 5",
        ...,
        "training",
        ...,
        5,
        ...,
        "validation",
    )
    assert chunk("--train-pages", "two", "--overwrite") == 2
    assert chunk("--size", "2", "--overwrite") == 2
    assert names(capsys.readouterr().err.splitlines()[-1], "--size", 2, 2, "special")


def test_repeated_lines_go_on_request(place, capsys):
    pages = "\f".join(f"RUNNING TITLE\n{'abcdef'[i] * 9} is what this page says.\n{i + 1}" for i in range(6))
    (place / "docs" / "pages.txt").write_text(pages)
    assert chunk("--drop-repeated") == 0
    assert "dropped 11 repeated headers and footers" in capsys.readouterr().out
    assert sum(c.text.count("RUNNING") for c in load_chunks("chunks/chunks.jsonl")) == 1  # the first stays
    assert chunk("--overwrite") == 0
    assert sum(c.text.count("RUNNING") for c in load_chunks("chunks/chunks.jsonl")) == 6


def test_inverse_cloze_removes_every_sentence_in_validation(place, capsys):
    assert chunk("--train-share", "0.5", "--size", "80") == 0
    assert main(["questions", "chunks", "--out", "out", "--method", "ict", "--seed", "3"]) == 0
    for name in ("train", "validation"):
        dataset = RetrievalDataset.load(f"out/{name}.json")
        kept = [
            dataset.queries[q] in " ".join(dataset.corpus[d].split()) for q, by in dataset.qrels.items() for d in by
        ]
        assert len(dataset.corpus) == len(load_chunks(f"chunks/{name}.jsonl"))
        if name == "validation":
            assert not any(kept)
    report = read_json("out/question-report.json")
    assert report["settings"] == {"method": "ict", "seed": 3, "held_out": False}
    chunks = [c for name in ("train", "validation") for c in load_chunks(f"chunks/{name}.jsonl")]
    asked = [q for name in ("train", "validation") for q in RetrievalDataset.load(f"out/{name}.json").queries]
    assert report["missing"].keys() == {c.id for c in chunks} - {q.removesuffix("/q") for q in asked}
    out = capsys.readouterr().out
    assert report["missing"]
    assert all(reason in out for reason in report["missing"].values())
    arguments = ["questions", "chunks/train.jsonl", "--out", "again", "--method", "ict", "--seed", "3", "--held-out"]
    assert main(arguments) == 0
    dataset = RetrievalDataset.load("again/train.json")
    assert not any(dataset.queries[q] in dataset.corpus[d] for q, by in dataset.qrels.items() for d in by)


def test_titles(place, capsys):
    assert main(["chunk", "docs/more.md", "--out", "chunks"]) == 0
    assert main(["questions", "chunks", "--out", "out", "--method", "title"]) == 0
    assert list(RetrievalDataset.load("out/chunks.json").queries.values()) == ["Rules of the house"]
    assert read_json("out/question-report.json")["settings"]["method"] == "title"


def test_docstrings(place, capsys):
    assert main(["questions", "numpy", "--out", "out", "--method", "docstring", "--num-docstrings", "20", "10"]) == 0
    assert [len(RetrievalDataset.load(f"out/{name}.json").queries) for name in ("train", "validation")] == [20, 10]


def ask(server: ApiServer, *options: str) -> int:
    return main(["questions", "chunks", "--out", "out", "--base-url", server.base_url, *options])


def test_an_llm_is_asked_once(place, capsys):
    assert chunk("--train-files", "docs/notes.txt") == 0
    num_chunks = sum(1 for name in ("train", "validation") for _ in read_jsonl(f"chunks/{name}.jsonl"))
    prices = ["--price-in", "1", "--price-out", "2"]
    with ApiServer() as server:
        assert ask(server, "--dry-run", *prices) == 0
        assert server.counts["chat"] == 0
        assert not (place / "out").exists()
        assert names(capsys.readouterr().out, f"{num_chunks} requests", f"{num_chunks} chunks", "cost", "at most")
        assert ask(server, "--parameters.temperature", "0.5", *prices) == 0
        assert server.counts["chat"] == num_chunks
        assert {body["temperature"] for _, _, body in server.log} == {0.5}
        out = capsys.readouterr().out
        assert f"{num_chunks} of {num_chunks} chunks have questions; in all runs: {num_chunks} requests" in out
        assert ask(server, "--parameters.temperature", "0.5") == 0
        assert server.counts["chat"] == num_chunks
    for name in ("train", "validation"):
        dataset = RetrievalDataset.load(f"out/{name}.json")
        for c in load_chunks(f"chunks/{name}.jsonl"):
            questions = written_questions(fill_template(TEMPLATE, text=c.text, num_questions=2))
            assert [dataset.queries[f"{c.id}/q{n}"] for n in (1, 2)] == questions
            assert dataset.corpus[c.id] == c.text
    assert read_json("out/question-report.json")["missing"] == {}
    assert not any(KEY in path.read_text() for path in (place / "out").iterdir())


def test_what_is_missing_is_said_and_asked_for_again(place, capsys):
    assert chunk() == 0
    num_chunks = len(load_chunks("chunks/chunks.jsonl"))
    with ApiServer(
        faults=lambda prompt, attempt: "refusal" if "day 3 of" in prompt and attempt < 2 else None
    ) as server:
        assert ask(server, "--max-attempts", "1") == 1
        err = capsys.readouterr().err
        assert names(err, 1, "chunks", "refusal")
        assert names(err.splitlines()[-1], 1, num_chunks, "out/question-report.json")
        assert len(read_json("out/question-report.json")["missing"]) == 1
        assert len(RetrievalDataset.load("out/chunks.json").corpus) == num_chunks
        assert ask(server) == 0
        assert server.counts["chat"] == num_chunks + 1


def test_replies_without_a_report_are_not_said_to_be_missing(place, capsys):
    assert chunk() == 0
    num_chunks = len(load_chunks("chunks/chunks.jsonl"))
    with ApiServer(faults=lambda prompt, attempt: "no-usage") as server:
        assert ask(server) == 0
    assert f"; {num_chunks} requests reported no token usage\n" in capsys.readouterr().out


def test_an_unknown_size_is_said(place, capsys):
    assert chunk("--size", "300") == 0
    assert names(capsys.readouterr().err, "--size", 300, MODEL, 256)


def test_a_limit_leaves_each_side_its_part_and_nothing_of_another_run(place, capsys):
    assert chunk("--train-share", "0.7", "--size", "60") == 0
    sides = {name: len(load_chunks(f"chunks/{name}.jsonl")) for name in ("train", "validation")}
    with ApiServer() as server:
        assert ask(server, "--max-requests", "1") == 1
        assert not (place / "out" / "validation.json").exists()
        assert names(capsys.readouterr().err, "validation", "no", "questions")
        num_asked = sum(sides.values()) // 2
        assert ask(server, "--max-requests", str(num_asked)) == 1
        for name, size in sides.items():
            num_questions = len(RetrievalDataset.load(f"out/{name}.json").queries)
            assert abs(num_questions / 2 - num_asked * size / sum(sides.values())) <= 1
        assert ask(server) == 0


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (["--method", "ict"], ["--method", "ict", "--seed", "1"]),
        (["--method", "ict"], ["--method", "ict", "--held-out"]),
        (["--method", "ict"], ["--method", "title"]),
        (["--method", "ict"], []),
        ([], ["--method", "ict"]),
        ([], ["--model", "another"]),
        ([], ["--parameters.seed", "1"]),
        ([], ["--num-questions", "3"]),
        ([], ["--template", "template.txt"]),
    ],
)
def test_questions_never_replace_those_of_other_settings(place, capsys, monkeypatch, first, other):
    """Refused before anything is sent, unless on request; the same settings go on, and find what is there."""
    (place / "docs" / "notes.txt").write_text(f"Rules of the town\n{NOTES}")
    (place / "template.txt").write_text("Ask {num_questions} things about: {text}")
    assert chunk("--size", "60") == 0
    command = ["questions", "chunks", "--out", "out"]
    with ApiServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert main([*command, *first]) == 0
        before, sent = snapshot(place / "out"), server.counts["chat"]
        capsys.readouterr()
        assert main([*command, *other]) == 2
        assert names(capsys.readouterr().err.splitlines()[-1], "embedft questions", "out/chunks.json", "--overwrite")
        assert (snapshot(place / "out"), server.counts["chat"]) == (before, sent)
        assert main([*command, *first, *(["--overwrite"] if first else [])]) == 0
        assert (snapshot(place / "out"), server.counts["chat"]) == (before, sent)
        assert main([*command, *other, "--overwrite"]) == 0
        method = other[1] if "--method" in other else None
        assert read_json("out/question-report.json")["settings"].get("method") == method
        assert main([*command, *first]) == 2  # the questions of others are there now
        sent = server.counts["chat"]
        assert main([*command, *first, "--overwrite"]) == 0
        assert snapshot(place / "out")["chunks.json"] == before["chunks.json"]
        assert server.counts["chat"] == sent  # replies are kept


def test_only_the_settings_that_differ_are_named(place, capsys):
    assert chunk("--size", "60") == 0
    with ApiServer() as server:
        assert ask(server) == 0
        assert ask(server, "--parameters.seed", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert names(error, "out/chunks.json", {"parameters": {"seed": 1}})


def test_questions_of_an_older_report_go_on(place, capsys):
    """Reports had no settings; a report that is none is named."""
    assert chunk("--size", "60") == 0
    with ApiServer() as server:
        assert ask(server) == 0
        report = read_json("out/question-report.json")
        del report["settings"]
        (place / "out" / "question-report.json").write_text(json.dumps(report))
        assert ask(server) == 0
        (place / "out" / "question-report.json").write_text("[]")
        assert ask(server) == 2
    assert names(capsys.readouterr().err.splitlines()[-1], "question-report.json", "object")


def test_equal_texts_need_one_request(place, capsys):
    rows = [{"id": id, "text": text} for id, text in (("a", "The mill."), ("b", "The mill."), ("c", "The oven."))]
    (place / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prices = ["--price-in", "1", "--price-out", "2"]
    assert main(["questions", "same.jsonl", "--out", "out", "--dry-run", *prices]) == 0
    assert names(capsys.readouterr().out, "2 requests", "3 chunks", "cost", "at most")


def test_a_server_that_is_not_there(place, capsys):
    assert chunk("--size", "40") == 0
    arguments = ["questions", "chunks", "--out", "out", "--base-url", "http://127.0.0.1:9/v1"]
    assert main(arguments) == 2
    assert names(capsys.readouterr().err.splitlines()[-1], "embedft questions", "http://127.0.0.1:9/v1", "connection")


def test_limits_stop_with_a_line(place, capsys):
    assert chunk() == 0
    with ApiServer() as server:
        assert ask(server, "--max-requests", "3", "--concurrency", "2") == 1
        assert server.counts["chat"] == 3
    out, err = capsys.readouterr()
    assert "stopped at --max-requests 3: 3 of" in out
    assert names(err, "--max-requests 3")


def test_cleaning_and_round_trip(place, capsys):
    (place / "some.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "text": f"text number {i} about thing {i}"}) for i in range(6))
    )
    (place / "template.txt").write_text("Ask {num_questions}: {text} {not a field}")
    arguments = ["questions", "some.jsonl", "--out", "out", "--template", "template.txt"]
    with ApiServer(num_questions=2) as server:
        url = ["--base-url", server.base_url]
        assert main([*arguments, *url, "--round-trip", "6", "--base", "model"]) == 0
        assert len(RetrievalDataset.load("out/some.json").queries) == 12  # all are in the top 6 of 6
        assert main([*arguments, *url, "--round-trip", "1", "--base", "model"]) == 0
        filtered = RetrievalDataset.load("out/some.json")
        assert main([*arguments, *url, "--no-clean"]) == 0
        assert {body["messages"][0]["content"][-13:] for _, _, body in server.log} == {"{not a field}"}
    report = capsys.readouterr().out
    assert "some, round trip: dropped" in report
    assert len(filtered.queries) < 12
    assert len(RetrievalDataset.load("out/some.json").queries) == 12


def test_an_id_with_two_texts_is_refused(place, capsys):
    (place / "sides").mkdir()
    for name in ("train", "validation"):
        rows = [{"id": i, "text": f"{name} text {i}"} for i in range(3)]
        (place / "sides" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with ApiServer() as server:
        assert main(["questions", "sides", "--out", "out", "--base-url", server.base_url]) == 2
        assert server.counts["chat"] == 0
    assert names(capsys.readouterr().err, "sides", "chunk", "'0'", "training", "validation")


def test_training_asks_nothing_that_validation_asks(place, capsys):
    """The reply for one training chunk is made that of the validation chunk; nothing is asked again."""
    (place / "sides").mkdir()
    for name, texts in (("train", ["a b c", "d e f"]), ("validation", ["g h i"])):
        rows = [{"id": text[0], "text": text} for text in texts]
        (place / "sides" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["questions", "sides", "--out", "out", "--num-questions", "1"]
    with ApiServer(num_questions=1) as server:
        assert main([*arguments, "--base-url", server.base_url]) == 0
    replies = [json.loads(line) for line in (place / "out" / "replies.jsonl").read_text().splitlines()]
    held_out = next(reply["questions"] for reply in replies if reply["chunk"] == "g")
    replies = [{**reply, "questions": held_out if reply["chunk"] == "a" else reply["questions"]} for reply in replies]
    (place / "out" / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    with ApiServer() as server:
        assert main([*arguments, "--base-url", server.base_url]) == 0
    assert "train, held out: dropped 1 of 2 questions; 1: is a validation query too" in capsys.readouterr().out
    assert list(RetrievalDataset.load("out/train.json").queries) == ["d/q1"]
    assert list(RetrievalDataset.load("out/validation.json").queries) == ["g/q1"]


def test_headings_that_validation_has_too_are_dropped_and_counted(place, capsys):
    (place / "sides").mkdir()
    for name, headings in (("train", ["Rules of the house", "Duties"]), ("validation", ["Rules of the house"])):
        rows = [{"id": f"{name}{i}", "text": f"{heading}\n{NOTES[:300]}"} for i, heading in enumerate(headings)]
        (place / "sides" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["questions", "sides", "--out", "out", "--method", "title"]) == 0
    assert "train: dropped 1 questions that are also in validation" in capsys.readouterr().out
    assert list(RetrievalDataset.load("out/train.json").queries.values()) == ["Duties"]


def test_a_side_that_cleaning_empties_does_not_cost_the_other(place, capsys):
    (place / "sides").mkdir()
    for name in ("train", "validation"):
        (place / "sides" / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": f"The text of {name}."}))
    arguments = ["questions", "sides", "--out", "out", "--num-questions", "1"]
    with ApiServer(num_questions=1) as server:
        assert main([*arguments, "--base-url", server.base_url]) == 0
        replies = (place / "out" / "replies.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in replies]
        rows = [
            {**row, "questions": ["What does the passage above say?"]} if row["chunk"] == "train" else row
            for row in rows
        ]
        (place / "out" / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main([*arguments, "--base-url", server.base_url]) == 1
    assert names(capsys.readouterr().err, "train", "1 points at its source")
    assert not (place / "out" / "train.json").exists()
    assert len(RetrievalDataset.load("out/validation.json").queries) == 1
    assert "points at its source" in read_json("out/question-report.json")["train"]


def test_a_document_prompt_takes_its_tokens(place, capsys):
    (place / "model" / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"document": "d: "}}))
    assert main(["chunk", "docs/notes.txt", "--out", "chunks", "--model", "model"]) == 0
    embedder = load_embedder("model", device="cpu", prompts={"document": "d: "})
    around = len(embedder.tokenizer.encode(["d: "])[0])
    assert around > 2
    report = read_json("chunks/chunk-report.json")
    assert (report["size"], report["special_tokens"]) == (embedder.max_length, around)
    lengths = embedder.pack([c.text for c in load_chunks("chunks/chunks.jsonl")], role="document").cu_seqlens.diff()
    assert int(lengths.max()) == embedder.max_length


class EmbeddingQA(pydantic.BaseModel):
    """The fields of LlamaIndex's EmbeddingQAFinetuneDataset, which reads its file as `cls(**json.load(file))`."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant_docs: dict[str, list[str]]
    mode: str = "text"


def test_data_sets_load_in_llamaindex_and_in_sentence_transformers(place, capsys):
    assert chunk("--train-share", "0.5", "--size", "80") == 0
    assert main(["questions", "chunks", "--out", "out", "--method", "ict"]) == 0
    found = EmbeddingQA(**json.loads((place / "out" / "train.json").read_text()))
    dataset = RetrievalDataset.load("out/train.json")
    assert (found.queries, found.corpus) == (dataset.queries, dataset.corpus)
    assert found.relevant_docs == {query: list(grades) for query, grades in dataset.qrels.items()}
    # And what LlamaIndex writes loads here.
    (place / "theirs.json").write_text(json.dumps(found.model_dump(), indent=4))
    assert RetrievalDataset.load("theirs.json") == dataset

    relevant = {query: set(ids) for query, ids in found.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(found.queries, found.corpus, relevant, name="x", write_csv=False)
    theirs = evaluator(SentenceTransformer("model", device="cpu"))
    ours = evaluate(load_embedder("model", device="cpu"), dataset).metrics
    assert theirs["x_cosine_ndcg@10"] == pytest.approx(ours["ndcg@10"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("questions chunks --out out", ("chunks", "no", "file", "folder")),
        ("questions docs --out out", ("docs", "documents", "chunks", "`embedft chunk`")),
        ("questions a b --out out", (2, "sources", "file", "folder")),
        (
            "questions docs/notes.txt --out out --method ict",
            ("docs/notes.txt", "documents", "chunks", "`embedft chunk`"),
        ),
        ("chunk nowhere --out out", ("nowhere", "no", "file", "folder")),
        ("chunk docs --out out --overlap 999", ("--overlap", 999, 0, 254)),
        ("questions a --out out --method docstring", ("'a'", "package")),
        ("questions docs/more.md --out out --method ict --dry-run", ("--dry-run", "--method llm", "--method ict")),
        (
            "questions docs/more.md --out out --method title --max-cost 3",
            ("--max-cost", "--method llm", "--method title"),
        ),
        ("questions docs/more.md --out out --method ict --parameters.seed 3", ("--parameters", "--method llm")),
        ("questions docs/more.md --out out --method title --held-out", ("--held-out", "ict", "llm", "title")),
        ("questions docs/more.md --out out --round-trip 0", ("--round-trip", 0, 1)),
        ("chunk docs --out out --train-pages=", ("--train-pages", "''", "''")),
        ("chunk docs --out out --size 0", ("--size", 0, 2, "special")),
        ("chunk docs --out out --no.such 1", ("option", "--no.such")),
    ],
)
def test_errors_are_one_line(place, capsys, arguments, facts):
    try:
        code = main(arguments.split())
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert names(err.splitlines()[-1], *facts)
    assert not (place / "out").exists()
