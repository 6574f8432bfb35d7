"""`beir:NAME` with a local hub: what is whole loads, now and later without the hub; what is not is one line."""

import gzip
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_tiny_folder
from hub_server import Answer, Hub, Shell, assert_refused
from naming import naming
from tiny import make_dataset

from embedft import RetrievalDataset, Suite
from embedft.data.beir import find_beir
from embedft.files import read_json

FIRST, SECOND = "1f" * 20, "2e" * 20
Files = dict[str, bytes]


def served(dataset: RetrievalDataset, folder: Path, part: str = "", **splits: RetrievalDataset) -> tuple[Files, Files]:
    """A dataset as BEIR has it on the hub: the files of its repository, and of that of its judgements."""
    dataset.save(folder)
    texts = {
        f"{part}{name}.gz": gzip.compress((folder / name).read_bytes()) for name in ("corpus.jsonl", "queries.jsonl")
    }
    texts |= {"README.md": b"not for us", "scifact.py": b"raise SystemExit('run')"}
    judgements = {f"{part}test.tsv": (folder / "qrels" / "test.tsv").read_bytes()}
    for split, other in splits.items():
        lines = (f"{q}\t{d}\t{grade}" for q, grades in other.qrels.items() for d, grade in grades.items())
        judgements[f"{part}{split}.tsv"] = "\n".join(["query-id\tcorpus-id\tscore", *lines]).encode()
    return texts, judgements | {"README.md": b"not for us"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and the datasets that the hub serves: two versions of one, and a split of its own."""
    place = tmp_path_factory.mktemp("beir")
    write_tiny_folder(place / "model", modules=True)
    return place


@pytest.fixture(scope="module")
def datasets() -> dict[str, RetrievalDataset]:
    whole = make_dataset(12, 9)
    titled = replace(whole, titles={"d0": "first"})
    parts = {"dev": ("q1", "q5", "q7"), "train": ("q0", "q2", "q3", "q8")}
    kept = {name: replace(titled, qrels={i: titled.qrels[i] for i in ids}) for name, ids in parts.items()}
    return {"titled": titled, "older": make_dataset(10, 8, seed=1), **kept}


@pytest.fixture(scope="module")
def hub(place, datasets):
    new = served(datasets["titled"], place / "titled", dev=datasets["dev"], train=datasets["train"])
    old = served(datasets["older"], place / "older")
    forum = served(datasets["older"], place / "forum", part="android/")
    parts = {"datasets/BeIR/cqadupstack": forum[0], "datasets/BeIR/cqadupstack-qrels": forum[1]}
    repositories = {name: {"main": FIRST, FIRST: files} for name, files in parts.items()}
    for name, newest, first in zip(("scifact", "scifact-qrels"), new, old, strict=True):
        repositories[f"datasets/BeIR/{name}"] = {"main": SECOND, "refs/pr/1": FIRST, FIRST: first, SECOND: newest}
    with Hub(repositories) as hub:
        yield hub


@pytest.fixture(scope="module")
def shell(hub, place):
    with Shell(hub, place) as shell:
        yield shell


@pytest.fixture(scope="module")
def offline(hub, place):
    """With the cache of `shell`, and without the hub."""
    with Shell(hub, place, HF_HUB_OFFLINE="1") as shell:
        yield shell


def evaluate(shell: Shell, name: str, *options: str) -> Answer:
    out = str(shell.folder / "eval")
    words = ["evaluate", str(shell.folder / "model"), name, "--device", "cpu", "--no-bm25", "--out", out, "--overwrite"]
    return shell.run(*words, *options)


def evaluated(shell: Shell, name: str, *options: str) -> str:
    """The hash of the data that `embedft evaluate` loaded."""
    answer = evaluate(shell, name, *options)
    assert (answer.code, answer.err) == (0, ""), answer.err
    return read_json(shell.folder / "eval" / "metrics.json")["setting"]["data_sha256"]


def judged(dataset: RetrievalDataset) -> RetrievalDataset:
    """A dataset without the queries that have no judgement, as BEIR folders are read."""
    return replace(dataset, queries={i: text for i, text in dataset.queries.items() if i in dataset.qrels})


def serve(hub: Hub, name: str, *, without: str = "") -> str:
    """Serves the newest files under another name, without one of them."""
    for end in ("", "-qrels"):
        files = hub.repositories[f"datasets/BeIR/scifact{end}"][SECOND]
        left = {path: content for path, content in files.items() if path != without}
        hub.repositories[f"datasets/BeIR/{name}{end}"] = {"main": FIRST, FIRST: left}
    return f"beir:{name}"


def test_a_dataset_is_downloaded_once_and_serves_without_the_hub(hub, shell, offline, datasets):
    expected = datasets["titled"].sha256()
    shutil.rmtree(shell.cache, ignore_errors=True)  # other tests may come first
    hub.log.clear()
    assert evaluated(shell, "beir:scifact") == expected
    assert hub.downloaded == ["corpus.jsonl.gz", "dev.tsv", "queries.jsonl.gz", "test.tsv", "train.tsv"]
    hub.log.clear()
    assert evaluated(shell, "beir:scifact") == expected
    assert hub.downloaded == []
    hub.log.clear()
    assert evaluated(offline, "beir:scifact") == expected
    assert hub.log == []


def test_a_split(shell, datasets):
    assert evaluated(shell, "beir:scifact", "--split", "dev") == judged(datasets["dev"]).sha256()
    assert_refused(evaluate(shell, "beir:scifact", "--split", "valid"), "beir:scifact", "valid", "dev", "test", "train")


def test_training_data_are_the_split_for_training(shell, datasets):
    out = str(shell.folder / "mined.jsonl")
    words = ["mine", str(shell.folder / "model"), "beir:scifact", "--device", "cpu", "--ranks", "1", "5", "--out", out]
    assert shell.run(*words).code == 0
    assert RetrievalDataset.load(out).queries.keys() == datasets["train"].qrels.keys()


def test_pinned_revisions(hub, shell, offline, datasets):
    older = datasets["older"].sha256()
    assert evaluated(shell, f"beir:scifact@{FIRST},refs/pr/1") == older
    assert evaluated(shell, "beir:scifact@refs/pr/1,refs/pr/1") == older
    assert evaluated(offline, f"beir:scifact@{FIRST},{FIRST}") == older
    # The newest judgements have two queries and a document that the older texts lack.
    answer = evaluate(shell, f"beir:scifact@{FIRST}")
    assert answer.code == 0
    assert "q10" in answer.err
    assert_refused(evaluate(shell, "beir:scifact@v7"), "beir:scifact@v7", "BeIR/scifact", "'v7'")
    assert_refused(evaluate(shell, "beir:scifact@main,v8"), "BeIR/scifact-qrels", "'v8'")


def test_a_part(shell, datasets):
    assert evaluated(shell, "beir:cqadupstack/android") == datasets["older"].sha256()
    assert_refused(evaluate(shell, "beir:cqadupstack"), "BeIR/cqadupstack-qrels", "android", "beir:cqadupstack/android")
    assert_refused(evaluate(shell, "beir:cqadupstack/andriod"), "BeIR/cqadupstack-qrels", "andriod/*.tsv")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("beir:scifatc", ("BeIR/scifatc-qrels", "no", "dataset", "hub", "scifact")),
        ("beir:Fever", ("BeIR/Fever-qrels", "fever")),
        ("beir:", ("beir:NAME", "beir:scifact")),
        ("beir:../x", ("beir:../x", "beir:NAME")),
        ("beir:scifact/..", ("beir:scifact/..", "beir:NAME")),
        ("beir:scifact@", ("beir:scifact@", "beir:NAME@REVISION")),
        ("beir:BeIR/scifact", ("BeIR/BeIR-qrels", "no", "dataset", "hub")),
    ],
)
def test_a_wrong_name(shell, name, facts):
    assert_refused(evaluate(shell, name), *facts)


@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("corpus.jsonl.gz", ("BeIR/without-corpus.jsonl.gz", "corpus.jsonl", "'main'")),
        ("queries.jsonl.gz", ("BeIR/without-queries.jsonl.gz", "queries.jsonl", "'main'")),
    ],
)
def test_missing_texts_are_named(hub, shell, file, facts):
    """As in revisions of Parquet alone."""
    assert_refused(evaluate(shell, serve(hub, f"without-{file}", without=file)), *facts, "beir:NAME@REVISION")


def test_missing_judgements_are_named(hub, shell):
    hub.repositories["datasets/BeIR/alone"] = hub.repositories["datasets/BeIR/scifact"]
    assert_refused(evaluate(shell, "beir:alone"), "BeIR/alone-qrels", "no", "dataset", "hub")
    hub.repositories["datasets/BeIR/alone-qrels"] = {"main": FIRST, FIRST: {"README.md": b"none"}}
    assert_refused(evaluate(shell, "beir:alone"), "BeIR/alone-qrels", "*.tsv", "'main'")
    without_test = serve(hub, "trained", without="test.tsv")
    assert_refused(evaluate(shell, without_test), "beir:trained", "test.tsv", "dev", "train")


def test_a_broken_connection(hub, shell, offline, datasets):
    """Half a file is never taken for a whole one; the next call starts again."""
    name, file = serve(hub, "broken"), ("datasets/BeIR/broken", "corpus.jsonl.gz")
    hub.cut[file] = [100] * 100
    assert_refused(evaluate(shell, name), name, "BeIR/broken", "connection", "hub")
    assert_refused(evaluate(offline, name), name, "BeIR/broken", "cache")
    hub.cut[file] = [100, 200]
    assert evaluated(shell, name) == evaluated(offline, name) == datasets["titled"].sha256()


def test_without_hub_and_cache(offline):
    assert_refused(evaluate(offline, "beir:quora"), "beir:quora", "BeIR/quora-qrels", "cache", "hub")


def test_a_damaged_file(hub, shell):
    name = serve(hub, "damaged")
    hub.repositories["datasets/BeIR/damaged"][FIRST]["corpus.jsonl.gz"] = b"<html>too many requests</html>"
    assert_refused(evaluate(shell, name), "corpus.jsonl.gz", "gzip")


def test_the_section_of_the_readme(shell, datasets):
    """Its commands as written, on tiny data."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^## Several datasets\n\n```sh\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    for name, dataset in (("train", make_dataset(seed=3)), ("held_out", datasets["older"])):
        rows = (f"{text},{dataset.corpus[dataset.relevant(i)[0]]}\n" for i, text in dataset.queries.items())
        (shell.folder / f"{name}.csv").write_text("".join(["question,context\n", *rows]))
    lines = block.replace("\\\n", " ").replace("sentence-transformers/all-MiniLM-L6-v2", "model").splitlines()
    for line in lines:
        program, command, *words = line.split()
        device = [] if command == "compare" else ["--device", "cpu"]
        answer = shell.run(command, *words, *device)
        assert (program, answer.code) == ("embedft", 0), answer.err
    found = Suite.load(shell.folder / "eval" / "several")
    assert [report.setting["data_sha256"] for report in found.values()][1] == datasets["titled"].sha256()
    assert (
        list(found)
        == list(Suite.load(shell.folder / "runs" / "several" / "eval" / "validation"))
        == ["mine", "scifact"]
    )
    assert "12 questions" in answer.out


def test_the_format_of_the_hub_is_beir():
    with pytest.raises(ValueError, match=naming("beir:scifact", "'beir'", "'csv'")):
        RetrievalDataset.load("beir:scifact", format="csv")


def test_files_of_a_folder(tmp_path):
    """As in folders that BEIR publishes, besides others that TREC does."""
    make_dataset().save(tmp_path / "set")
    for name in ("dev.tsv.gz", "test.trec", ".hidden.tsv"):
        (tmp_path / "set" / "qrels" / name).write_bytes(b"")
    (tmp_path / "set" / "qrels.robust.txt").write_text("")
    folder, splits = find_beir(tmp_path / "set")
    assert folder == tmp_path / "set"
    assert {split: file.name for split, file in splits.items()} == {
        "test": "test.tsv",
        "dev": "dev.tsv.gz",
        "qrels.robust": "qrels.robust.txt",
    }
    assert find_beir(tmp_path / "pairs.csv")[1] == {}
