"""What every command does when its output cannot be written: a full disk, a wrong place, a closed or narrow stdout."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ApiServer
from conftest import write_tiny_folder
from naming import names
from tiny import make_dataset, make_embedder
from tiny_grid import write_grid

from embedft import Adapter, RetrievalDataset, load_embedder, new_scorer
from embedft.cli import COMMANDS, main
from embedft.encoders.maps import build_map

# What each command writes goes to OUT; the words behind | are for an OUT that holds something already.
WRITING = {
    "chunk": "chunk docs --model model --size 300 --out OUT | --train-share 0.5 --overwrite",
    "questions": "questions chunks.jsonl --model m --no-clean --concurrency 1 --out OUT | --clean",
    "questions, ict": "questions chunks.jsonl --method ict --out OUT | --seed 1 --overwrite",
    "questions, docstring": "questions json --method docstring --num-docstrings 4 2 --out OUT | --seed 1 --overwrite",
    "finetune": "finetune model train.jsonl --validation held_out.jsonl --epochs 1 --out OUT | --seed 1 --overwrite",
    "adapter": "adapter model train.jsonl --epochs 2 --out OUT | --epochs 3 --overwrite",
    "merge": "merge model other --out OUT | --weights 0.3 0.7 --overwrite",
    "mine": "mine model train.jsonl --num-negatives 2 --ranks 1 5 --out OUT.jsonl | --seed 1 --overwrite",
    "encode": "encode model texts.txt --out OUT.npy | --dim 16 --overwrite",
    "encode, store": "encode model texts.txt --store OUT | --role query --max-length 20",
    "evaluate": "evaluate model held_out.jsonl --fuse --out OUT | --ks 1 3 --overwrite",
    "compare": "compare reports/whole reports/windows --save-plot OUT.png | --metric mrr@10 --overwrite",
}
GOES_ON = ("questions", "encode, store")  # run again, these add what is missing
READING = {
    "search": "search model chunks.jsonl größe",
    "search, json": "search model chunks.jsonl 語",
    "store": "store vectors",
    "report": "report ablation",
    "info": "info model --query-prompt 検索:",
}
# What may be left, complete lines of a log among it.
LOGS, LOCKS = ("ledger.jsonl", "replies.jsonl"), ("lock", ".lock")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_embedder(folder / "model")
    write_tiny_folder(folder / "other", seed=1)
    for name, seed in (("train", 0), ("held_out", 1)):
        made = make_dataset(8, 8, seed=seed)
        corpus = {i: f"語 größe {text}" for i, text in made.corpus.items()}
        RetrievalDataset(made.queries, corpus, made.qrels).save(folder / f"{name}.jsonl")
    (folder / "texts.txt").write_text("".join(f"größe {i} 語\n" for i in range(600)))
    (folder / "docs").mkdir()
    for year in range(2001, 2009):
        text = " ".join(f"The fünd no {i} lent {year} dollars to a 語 mill, and more." for i in range(8))
        (folder / "docs" / f"{year}.txt").write_text(text)
    sentences = ("The müller ground {} sacks of corn for the town in the year.", "He sold {} of them to a 語 baker.")
    chunks = [{"id": f"c{i}", "text": " ".join(s.format(i + j) for j in range(3) for s in sentences)} for i in range(6)]
    (folder / "chunks.jsonl").write_text("".join(json.dumps(chunk) + "\n" for chunk in chunks))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in (("whole", ()), ("windows", ("--passages", "8", "4"))):
            assert main(["evaluate", "model", "held_out.jsonl", "--no-bm25", "--out", f"reports/{name}", *words]) == 0
        assert main(["encode", "model", "texts.txt", "--store", "vectors"]) == 0
    ranks = {(point, seed): [1, 2, 3 + point + seed] for point in (0, 1) for seed in (0, 1)}
    write_grid(folder / "ablation", {"größe": ranks}, points=[{"data": "語"}, {"data": "größe"}])
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch) -> Path:
    """A folder of its own with all inputs, and a server's address and key in the environment."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    # Uncommitted changes to the checkout would otherwise be part of each run, and may be its largest file.
    monkeypatch.setattr("embedft.training.run_folder._git_state", lambda: (None, b""))
    with ApiServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        yield tmp_path


def words_of(command: str, out: object, *, again: bool = False) -> list[str]:
    first, _, more = command.partition(" | ")
    return [word.replace("OUT", str(out)) for word in f"{first} {more if again else ''}".split()]


@contextlib.contextmanager
def disk_with(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this size: the writes of a full disk fail in the same places."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_is_here():
    """`push` writes to the hub: test_card.py. `ablate` starts processes: test_ablation_runner.py."""
    assert {name.partition(",")[0] for name in {**WRITING, **READING}} == COMMANDS.keys() - {"push", "ablate"}


@pytest.fixture
def refused(place, capsys):
    """A function that runs a command into place/results on a full disk: what was there before, and what is after."""
    folder = place / "results"

    def run(command: str, num_bytes: int, *, again: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if again:
            assert main(words_of(command, folder / "out")) == 0
        before = files_in(folder)
        capsys.readouterr()
        with disk_with(num_bytes):
            assert main(words_of(command, folder / "out", again=again)) == 2
        (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
        assert str(folder / "out") in error
        assert ".tmp" not in error
        return before, files_in(folder)

    return run


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("command", WRITING.values(), ids=WRITING)
def test_a_full_disk(place, refused, command, again):
    """At the first byte, and at the end of the largest file: one line names a file of OUT, and all is as before."""
    if ".png" in command:
        pytest.importorskip("matplotlib")
    (place / "whole").mkdir()
    for words in [words_of(command, place / "whole" / "out", again=more) for more in {False, again}]:
        assert main(words) == 0
    # The second time, requests may take a rounder number of seconds.
    shortest = {
        name: re.sub(rb'"seconds": [\d.]+', b'"seconds": 0.0', x) for name, x in files_in(place / "whole").items()
    }
    files = {name: len(content) for name, content in shortest.items()}
    # Questions that are there already add nothing to their logs.
    largest = max(size for name, size in files.items() if not (again and Path(name).name in LOGS))
    for num_bytes in (0, largest - 1):
        before, after = refused(command, num_bytes, again=again)
        for name in before.keys() | after.keys():
            was, now = before.get(name, b""), after.get(name, b"")
            if Path(name).name in LOGS:  # no half line
                assert now.startswith(was)
                assert not now or now.endswith(b"\n")
            elif Path(name).name not in LOCKS and not name.endswith((".sqlite", ".sqlite-journal")):
                assert now == was, (num_bytes, name)


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_a_disk_that_training_fills(place, refused, again):
    """The checkpoint does not fit: the run resumes from the one before, and the run that it replaces is kept aside."""
    before, after = refused(command := WRITING["finetune"], 160_000, again=again)
    assert not any(".tmp" in name for name in after)
    aside = {name.replace("/.replaced/", "/"): content for name, content in after.items() if "/.replaced/" in name}
    assert aside == {name: content for name, content in before.items() if name != "out/.lock"}
    words = words_of(command, place / "results" / "out", again=again)
    assert main([*(word for word in words if word != "--overwrite"), "--resume"]) == 0
    assert not (place / "results" / "out" / ".replaced").exists()


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("kind", ["embedder", "scorer", "adapter"])
def test_a_disk_that_saving_fills(place, monkeypatch, kind, again):
    """From Python, at each of the files: what was there is as before, without a file of the new model."""
    models = [load_embedder("model", device="cpu", prompts={"query": text}) for text in ("größe: ", "")]
    if kind == "scorer":
        models = [new_scorer(embedder, seed=seed) for seed, embedder in enumerate(models)]
    elif kind == "adapter":
        models = [Adapter(build_map("linear", 32)), Adapter(build_map("low_rank", 32, rank=4))]
    if again:
        models[1].save("results")
    before, sync = files_in(place / "results"), os.fsync
    for number in itertools.count(1):
        left = itertools.count(1 - number)

        def fill(file, left=left):
            if next(left) == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(file)

        monkeypatch.setattr(os, "fsync", fill)
        try:
            models[0].save("results")
            break
        except OSError as error:
            failed = error
        assert (failed.errno, Path(failed.filename).parts[0]) == (errno.ENOSPC, "results")
        assert ".tmp" not in failed.filename
        assert files_in(place / "results") == before
        assert Path("results").exists() == again
    assert number > 2
    assert files_in(place / "results") != before


@pytest.mark.parametrize("name", WRITING)
def test_what_is_there_is_replaced_only_on_request(place, capsys, name):
    """Otherwise, it is refused before anything is read."""
    if ".png" in WRITING[name]:
        pytest.importorskip("matplotlib")
    (place / "results").mkdir()
    assert main(words_of(WRITING[name], "results/out")) == 0
    before = files_in(place / "results")
    if name not in GOES_ON:
        words = words_of(WRITING[name].replace(" --overwrite", ""), "results/out", again=True)
        inputs = (place / word for word in words[1:] if not word.startswith(("results", "chunks")))
        sources = [path for path in inputs if path.exists()]
        for path in sources:
            path.rename(f"{path}-away")
        capsys.readouterr()
        assert main(words) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert names(error, "--overwrite")
        assert "results/out" in error
        assert files_in(place / "results") == before
        for path in sources:
            Path(f"{path}-away").rename(path)
    assert main(words_of(WRITING[name], "results/out", again=True)) == 0
    assert files_in(place / "results") != before


@pytest.mark.parametrize("command", WRITING.values(), ids=WRITING)
def test_what_cannot_be_written_is_found_before_anything_is_read(tmp_path, monkeypatch, capsys, command):
    """There are no inputs, which would be the next thing to say; a store is opened with its model."""
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    if "--store" in command:
        make_embedder(tmp_path / "model")
        (tmp_path / "texts.txt").write_text("a\n")
    assert main(words_of(command, "file/out")) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "file/out" in error
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("model", "texts.txt")] == ["file"]


@pytest.mark.parametrize("command", {**WRITING, **READING}.values(), ids={**WRITING, **READING})
def test_a_closed_output_is_found_before_anything_is_read(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(words_of(command, "out")) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert names(error, "standard output", "closed", "/dev/null")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", {**WRITING, **READING}.values(), ids={**WRITING, **READING})
def test_an_output_that_lacks_characters(place, monkeypatch, command, encoding):
    """Exit code 0, with the others' escapes; what goes to files is UTF-8 whatever the output is."""
    if ".png" in command:
        pytest.importorskip("matplotlib")
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(words_of(command, "größe-語")) == 0
    assert output.buffer.getvalue().decode(encoding) or "--store" in command
