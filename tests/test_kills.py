"""SIGKILL at every disk change and at random moments: running the command again ends as if it had not been killed.

About 350 kills of training, opening, closing, chunking and questions. Kills of the store are in test_store.py, those of
two ranks in test_distributed.py.
"""

import contextlib
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from api_server import ApiServer
from tiny import MEASURED, make_dataset, make_embedder

from embedft.commands.options import load_chunk_files

pytestmark = pytest.mark.slow

# Runs a command line in a fork of itself for each line of JSON that it reads, so that no start costs the imports. The
# fork is killed before its n-th change of the disk (0: never); at its end it writes how many there were. A change is a
# file opened for writing, renamed, cut or removed, or a folder made or removed, as Python tells its audit hooks.
NURSERY = """
    import json, os, pathlib, signal, sys, tempfile, traceback
    os.environ.update(EMBEDFT_PROGRESS="0", OPENAI_API_KEY="x")
    import conftest, embedft.cli, embedft.recipe.finetune, faiss, openai, safetensors.torch, tokenizers, torch._dynamo
    import tiny
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_embedder(pathlib.Path(folder, "model")).sha256()  # reads the code that each fork would read again
    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

    def is_change(event, arguments):
        if event == "open":
            return arguments[0] != os.devnull and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        is_missing = event == "os.remove" and arguments[1] == -1 and not os.path.lexists(arguments[0])
        return event in CHANGES and not is_missing

    def run(arguments, kill_at, log):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(2, 1)
        changes = [0]
        def count(*event):
            if is_change(*event):
                changes[0] += 1
                if changes[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        os.fsync = lambda file: None  # what a process has written outlives it
        code = embedft.cli.main(arguments)
        print(f"changes {changes[0]}", flush=True)
        return code

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 99
            try:
                code = run(*json.loads(line))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Runs commands in forks of one process."""

    def __init__(self, folder: Path):
        self.log, self.pid = folder / "log.txt", 0
        command = [sys.executable, "-c", textwrap.dedent(NURSERY)]
        options = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    def run(self, arguments: list, *, kill_at: int = 0, kill_after: float | None = None) -> int:
        """Its exit code, negative for a signal. Killed before a change of the disk, or after some seconds."""
        self.process.stdin.write(json.dumps([[str(x) for x in arguments], kill_at, str(self.log)]) + "\n")
        self.pid = int(self.process.stdout.readline())
        if kill_after is not None:
            select.select([self.process.stdout], [], [], kill_after)  # no longer than it runs
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(self.pid, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def finish(self, arguments: list) -> int:
        """Runs to the end; how often it changed the disk."""
        assert self.run(arguments) == 0, self.log.read_text()
        return int(self.log.read_text().split()[-1])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def nursery(tmp_path):
    nursery = Nursery(tmp_path)
    yield nursery
    nursery.close()


def content(folder: Path, *, killed: bool = False) -> dict[str, object]:
    """A folder's content except times, costs and the environment; `killed`: and except what a killed process leaves."""
    found: dict[str, object] = {}
    is_done = (folder / "DONE").is_file()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        leftover = any(part.startswith(".") and part.endswith(".tmp") for part in path.relative_to(folder).parts)
        # A run that was killed while it was closed is done; its checkpoints, or the run it replaced, may be there yet.
        leftover = leftover or (path.parent != folder and name.startswith((".replaced", "checkpoints")) and is_done)
        if path.is_dir() or (leftover and killed) or name in ("environment.json", "diff.patch", ".lock", "DONE"):
            continue
        if name == "train.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in record.items() if key not in MEASURED} for record in records]
        elif path.name == "metrics.json":
            found[name] = json.loads(path.read_text())["metrics"]
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def training(tmp_path) -> list:
    """The command of a tiny training with validation and checkpoints, without --out."""
    make_embedder(tmp_path / "model")
    make_dataset(8, 8).save(tmp_path / "train.jsonl")
    make_dataset(4, 4, seed=1).save(tmp_path / "held_out.jsonl")
    options = {"epochs": 1, "batch-size": 4, "lr": 1e-2, "checkpoint-every": 1, "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [
        "finetune",
        tmp_path / "model",
        tmp_path / "train.jsonl",
        "--validation",
        tmp_path / "held_out.jsonl",
        *words,
    ]


def test_training_killed_at_every_seventh_change_of_the_disk(tmp_path, nursery, training):
    num_changes = nursery.finish([*training, "--out", tmp_path / "reference"])
    expected = content(tmp_path / "reference")
    assert num_changes > 100
    for place in range(1, num_changes + 1, 7):
        command = [*training, "--out", tmp_path / f"run-{place}", "--resume"]
        assert nursery.run(command, kill_at=place) == -signal.SIGKILL
        code = nursery.run(command)
        assert code == 0 or "is done" in nursery.log.read_text(), (place, nursery.log.read_text())
        assert content(tmp_path / f"run-{place}") == expected, place


def test_training_killed_at_random_moments(tmp_path, nursery, training):
    start = time.monotonic()
    nursery.finish([*training, "--out", tmp_path / "reference"])
    seconds, expected, num_kills = time.monotonic() - start, content(tmp_path / "reference"), 0
    for series in itertools.count():
        generator, command = random.Random(series), [*training, "--out", tmp_path / f"run-{series}", "--resume"]
        for attempt in range(3):
            start = time.monotonic()
            code = nursery.run(command, kill_after=generator.uniform(0, seconds))
            num_kills += code == -signal.SIGKILL
            if not attempt and not code:  # a whole run, quicker than its kill: the machine is less busy than it was
                seconds = time.monotonic() - start
        code = nursery.run(command)
        assert code == 0 or "is done" in nursery.log.read_text(), (series, nursery.log.read_text())
        assert content(tmp_path / f"run-{series}") == expected, series
        if num_kills > 20:
            break


def test_overwriting_killed_at_every_seventh_change_of_the_disk(tmp_path, nursery, training):
    """The finished run is whole, in its place or kept aside, until the new one is done. Changes come in pairs, a file
    and its renaming, so that every seventh meets each kind; all of them would take five minutes more."""
    nursery.finish([*training, "--out", tmp_path / "old", "--seed", 1])
    nursery.finish([*training, "--out", tmp_path / "new"])
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    assert old != new
    for place in itertools.count(1, 7):
        out = tmp_path / f"run-{place}"
        subprocess.run(["cp", "-r", tmp_path / "old", out], check=True)
        command = [*training, "--out", out, "--overwrite"]
        if nursery.run(command, kill_at=place) == 0:
            break
        aside = content(out / ".replaced", killed=True) if (out / ".replaced").is_dir() else {}
        there = content(out, killed=True)
        assert there == old or aside == old or there.items() >= new.items() or both(there, aside) >= old.items(), place
        assert nursery.run(command) == 0, (place, nursery.log.read_text())
        assert content(out) == new, place
    assert place > 100


def both(there: dict, aside: dict):
    """What two folders hold together, while files are moved from one to the other."""
    return {**there, **aside}.items()


TEXT = "What the {name} fund did in {year}. It lent {year} dollars to {name}, who paid them back. " * 8


def write_texts(folder: Path, name: str) -> Path:
    folder.mkdir()
    for year in range(2001, 2009):
        (folder / f"{year}.txt").write_text(TEXT.format(name=name, year=year))
    return folder


def test_chunking_killed_at_every_change_of_the_disk(tmp_path, nursery):
    """The files of one split are there together, or those of the other."""
    make_embedder(tmp_path / "model")
    first, second = (write_texts(tmp_path / name, name) for name in ("first", "second"))
    command = ["chunk", second, "--model", tmp_path / "model", "--size", 30, "--train-share", 0.5]
    for name, source in (("old", first), ("new", second)):
        split = ["--train-share", 0.5] if name == "new" else []
        nursery.finish(["chunk", source, *command[2:6], *split, "--out", tmp_path / name])
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    assert old.keys() != new.keys()
    place = num_refused = 0
    while True:
        place += 1
        out = tmp_path / f"out-{place}"
        subprocess.run(["cp", "-r", tmp_path / "old", out], check=True)
        if nursery.run([*command, "--out", out, "--overwrite"], kill_at=place) == 0:
            break
        try:
            load_chunk_files(out)
        except ValueError:  # it is a mix, which nobody reads, and which needs no --overwrite again
            nursery.finish([*command, "--out", out])
            num_refused += 1
        else:
            assert content(out, killed=True) in (old, new), place
            nursery.finish([*command, "--out", out, "--overwrite"])
        assert content(out) == new, place
    assert place > 5
    assert num_refused > 2


def test_questions_killed_at_every_third_change_of_the_disk(tmp_path, nursery):
    """No question is lost, and only requests in flight are repeated."""
    make_embedder(tmp_path / "model")
    source = write_texts(tmp_path / "texts", "first")
    chunk = ["chunk", source, "--model", tmp_path / "model", "--size", 30, "--train-share", 0.5]
    nursery.finish([*chunk, "--out", tmp_path / "chunks"])
    num_chunks = sum(len(path.read_text().splitlines()) for path in (tmp_path / "chunks").glob("*.jsonl"))
    options = ["--model", "m", "--concurrency", 2, "--no-clean"]

    def questions(out: Path, server: ApiServer) -> list:
        return ["questions", tmp_path / "chunks", "--out", out, "--base-url", server.base_url, *options]

    def datasets(out: Path) -> list[dict]:
        return [json.loads((out / f"{name}.json").read_text()) for name in ("train", "validation")]

    with ApiServer() as server:
        num_changes = nursery.finish(questions(tmp_path / "reference", server))
        assert server.counts["chat"] == num_chunks
    expected = datasets(tmp_path / "reference")
    assert num_changes > 50
    for place in range(1, num_changes + 1, 3):
        out = tmp_path / f"out-{place}"
        with ApiServer() as server:
            assert nursery.run(questions(out, server), kill_at=place) == -signal.SIGKILL
            nursery.finish(questions(out, server))
            assert num_chunks <= server.counts["chat"] <= num_chunks + 2, place  # two were on their way
        assert datasets(out) == expected, place
    for number in range(1, num_chunks + 1, 2):
        out = tmp_path / f"asked-{number}"
        with ApiServer(refuses=killer(nursery, number)) as server:
            assert nursery.run(questions(out, server)) == -signal.SIGKILL
            nursery.finish(questions(out, server))
            assert num_chunks < server.counts["chat"] <= num_chunks + 2, number
        assert datasets(out) == expected, number


def killer(nursery: Nursery, number: int):
    """What kills the command when the server gets its `number`-th request."""
    numbers = itertools.count(1)

    def refuses(request: dict) -> None:
        if next(numbers) == number:
            os.kill(nursery.pid, signal.SIGKILL)

    return refuses
