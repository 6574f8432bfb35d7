"""store.py and space_files.py: bytes by hand, nothing stale, nothing lost by a kill, damage named; and its commands."""

import copy
import hashlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tiny import make_dataset, make_embedder

from embedft import evaluate
from embedft.cli import main
from embedft.commands.stores import format_bytes
from embedft.encoders import embedder as embedder_module
from embedft.encoders import space_files, store
from embedft.encoders.fingerprint import weights_sha256
from embedft.encoders.space_files import RECORD, Rows, text_keys
from embedft.encoders.store import Space, Store
from embedft.files import locked, read_json

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
SPACE = Space("ab" * 32, 4, {"model": "counting"})
NAME = "ab" * 8


def vectors_of(texts, dim=4):
    """A vector that says which text it is of: t7 -> [7, 8, 9, 10]."""
    return np.array([np.arange(dim) + int(text[1:]) for text in texts], dtype=np.float32).reshape(-1, dim)


class Compute:
    """`vectors_of`, and what was asked of it."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return vectors_of(texts)


def numbered(*numbers):
    return [f"t{number}" for number in numbers]


def never(texts):
    raise AssertionError(f"computed {texts}")


@pytest.fixture
def filled(tmp_path):
    """A store with t0 to t9 in `SPACE`."""
    Store(tmp_path / "store").encode(SPACE, numbered(*range(10)), vectors_of)
    return tmp_path / "store"


# The files.


def test_two_rows_byte_by_byte(tmp_path):
    space = Space("0123456789abcdef" + "0" * 48, 2, {"model": "m"})
    Store(tmp_path / "s").encode(space, ["a", "é"], lambda texts: np.array([[1.0, -2.0], [0.5, 0.0]]))
    folder = tmp_path / "s" / "0123456789abcdef"
    assert sorted(os.listdir(folder)) == ["keys.bin", "space.json", "vectors.f32"]
    assert sorted(os.listdir(tmp_path / "s")) == ["0123456789abcdef", "lock"]
    expected = {"version": 1, "fingerprint": space.fingerprint, "dim": 2, "description": {"model": "m"}}
    assert read_json(folder / "space.json") == expected
    # 1 = 0x3f800000, -2 = 0xc0000000, 0.5 = 0x3f000000, lowest byte first.
    first, second = bytes.fromhex("0000803f000000c0"), bytes.fromhex("0000003f00000000")
    assert (folder / "vectors.f32").read_bytes() == first + second
    keys = [hashlib.blake2b(text, digest_size=24).digest() for text in (b"a", b"\xc3\xa9")]
    sums = [zlib.crc32(key + row).to_bytes(4, "little") for key, row in zip(keys, (first, second), strict=True)]
    assert (folder / "keys.bin").read_bytes() == keys[0] + sums[0] + keys[1] + sums[1]


def test_what_is_there_is_read_and_the_rest_computed_once(tmp_path):
    store_, compute = Store(tmp_path), Compute()
    texts = numbered(*range(90))
    found = store_.encode(SPACE, texts, compute, slice_texts=40)
    assert [len(call) for call in compute.calls] == [40, 40, 10]
    assert (store_.hits, store_.misses) == (0, 90)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors_of(texts))

    # 90 of 100 are there; of the ten new ones one stands three times.
    mixed = numbered(*range(100), 95, 95, 3)
    random.Random(0).shuffle(mixed)
    again, compute = Store(tmp_path), Compute()
    np.testing.assert_array_equal(again.encode(SPACE, mixed, compute), vectors_of(mixed))
    assert len(compute.calls) == 1
    assert sorted(compute.calls[0]) == numbered(*range(90, 100))
    assert compute.calls[0] == [text for text in dict.fromkeys(mixed) if int(text[1:]) >= 90]  # in the order given
    assert (again.hits, again.misses) == (93, 10)
    assert again.encode(SPACE, mixed, never).shape == (103, 4)
    assert (again.hits, again.misses) == (196, 10)
    # Rows are not counted, and are those of the files.
    rows = again.rows(SPACE, numbered(5, 1000, 99))
    assert (rows.dtype, rows[0], rows[1]) == (np.int64, 5, -1)
    np.testing.assert_array_equal(again.open(SPACE)[rows[[0, 2]]], vectors_of(numbered(5, 99)))
    assert (again.hits, again.misses) == (196, 10)


def test_no_texts_and_no_rows(tmp_path):
    store_ = Store(tmp_path / "new" / "store")
    assert store_.encode(SPACE, [], never).shape == (0, 4)
    assert store_.rows(SPACE, ["t1"]).tolist() == [-1]
    assert store_.rows(SPACE, []).shape == (0,)
    assert store_.open(SPACE).shape == (0, 4)
    assert store_.names() == []
    assert os.listdir(tmp_path / "new" / "store") == []
    store_.encode(SPACE, ["t1"], vectors_of)
    assert store_.open(SPACE).shape == (1, 4)
    assert store_.encode(SPACE, [], never).shape == (0, 4)


def test_a_space_is_there_only_with_its_description(tmp_path, monkeypatch):
    """Others look without a lock, so between the folder and its space.json there must be nothing to see."""
    seen, write = [], store.write_json

    def watched(*arguments):
        write(*arguments)
        seen.append(Store(tmp_path).names())

    monkeypatch.setattr(store, "write_json", watched)
    Store(tmp_path).encode(SPACE, ["t1"], vectors_of)
    assert seen == [[]]
    assert Store(tmp_path).names() == [SPACE.name]


def test_spaces_do_not_share_rows(tmp_path):
    store_, other = Store(tmp_path), Space("cd" * 32, 4, {})
    store_.encode(SPACE, ["t1"], vectors_of)
    assert store_.rows(other, ["t1"]).tolist() == [-1]
    found = store_.encode(other, ["t1", "t2"], lambda texts: -vectors_of(texts))
    np.testing.assert_array_equal(found, -vectors_of(["t1", "t2"]))
    np.testing.assert_array_equal(store_.encode(SPACE, ["t1"], never), vectors_of(["t1"]))
    assert store_.names() == [NAME, "cd" * 8]


def test_texts_are_told_apart_by_their_bytes(tmp_path):
    texts = ["", " ", "a", "a ", "A", "é", "e\u0301", "\x00", "a\x00"]
    values = np.eye(len(texts), dtype=np.float32)
    space = Space("ef" * 32, len(texts), {})
    Store(tmp_path).encode(space, texts, lambda asked: values)
    np.testing.assert_array_equal(Store(tmp_path).encode(space, texts[::-1], never), values[::-1])


def test_open_is_read_only_and_sees_what_was_last_looked_at(filled):
    reader, writer = Store(filled), Store(filled)
    rows = reader.rows(SPACE, numbered(3, 4))
    writer.encode(SPACE, numbered(10), vectors_of)
    mapped = reader.open(SPACE)
    assert isinstance(mapped, np.memmap)
    assert mapped.shape == (10, 4)
    np.testing.assert_array_equal(mapped[rows], vectors_of(numbered(3, 4)))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 0
    # Appended by another, and seen at the next look.
    assert reader.rows(SPACE, numbered(10, 0)).tolist() == [10, 0]
    assert reader.open(SPACE).shape == (11, 4)
    assert writer.open(SPACE).shape == (11, 4)


def test_copies_open_the_folder_for_themselves(filled):
    store_ = Store(filled)
    store_.encode(SPACE, numbered(1), never)
    for other in (copy.deepcopy(store_), pickle.loads(pickle.dumps(store_))):
        assert (other.folder, other.hits, other._opened) == (filled, 0, {})


# Finding rows.


@pytest.mark.parametrize("distinct", [1, 3, 1 << 62])
def test_keys_that_begin_alike_are_told_apart(tmp_path, monkeypatch, distinct):
    """With the first word of every key cut to one of a few values; merged in pieces and sorted at once."""

    def cut_keys(texts):
        keys_N3 = text_keys(texts).copy()
        keys_N3[:, 0] %= distinct
        return keys_N3

    monkeypatch.setattr(store, "text_keys", cut_keys)
    texts, generator = numbered(*range(60)), random.Random(distinct)
    store_ = Store(tmp_path)
    for start in range(0, 60, 7):
        part = generator.sample(texts[: start + 7], min(start + 7, 60))
        np.testing.assert_array_equal(store_.encode(SPACE, part, vectors_of), vectors_of(part))
    assert store_.misses == 60
    for reader in (store_, Store(tmp_path)):
        asked = generator.sample([*texts, *numbered(*range(100, 160))], 120)
        rows = reader.rows(SPACE, asked)
        assert ((rows >= 0) == [int(text[1:]) < 60 for text in asked]).all()
        np.testing.assert_array_equal(reader.open(SPACE)[rows[rows >= 0]], vectors_of([t for t in asked if t in texts]))


def test_find_against_a_dict():
    """Random keys of few values, so that equal ones and equal beginnings abound: the first row of equals."""
    generator = np.random.default_rng(0)
    for num_rows in (0, 1, 2, 50, 400):
        rows = Rows(Path("missing"), 4)
        rows.records = np.zeros(num_rows, RECORD)
        rows.records["key"] = generator.integers(0, 4, (num_rows, 3))
        first = {}
        for row, key in enumerate(rows.records["key"].tolist()):
            first.setdefault(tuple(key), row)
        asked = generator.integers(0, 5, (300, 3)).astype("<u8")
        assert rows.find(asked).tolist() == [first.get(tuple(key), -1) for key in asked.tolist()]


def test_a_million_rows_are_opened_within_a_second(tmp_path):
    num_rows, dim, generator = 1_000_000, 8, np.random.default_rng(0)
    space = Space("12" * 32, dim, {})
    texts, places = numbered(*range(1000)), generator.permutation(num_rows)[:1000]
    records = np.empty(num_rows, RECORD)
    records["key"] = generator.integers(0, 1 << 63, (num_rows, 3), dtype=np.uint64)
    records["key"][places] = text_keys(texts)
    vectors = np.zeros((num_rows, dim), dtype=np.float32)
    vectors[places] = vectors_of(texts, dim)
    records["checksum"][places] = space_files.checksums(records["key"][places], vectors[places])
    Store(tmp_path).encode(space, ["t0"], lambda asked: vectors_of(asked, dim))
    records.tofile(tmp_path / space.name / "keys.bin")
    vectors.tofile(tmp_path / space.name / "vectors.f32")
    del records, vectors

    start = time.perf_counter()
    store_ = Store(tmp_path)
    rows = store_.rows(space, [*texts, "another"])
    found = store_.read(space, rows[:-1])
    seconds = time.perf_counter() - start
    assert rows.tolist() == [*places.tolist(), -1]
    np.testing.assert_array_equal(found, vectors_of(texts, dim))
    assert seconds < 1
    # And one more row does not sort them all again.
    store_.encode(space, ["t5000"], lambda asked: vectors_of(asked, dim))
    start = time.perf_counter()
    assert store_.rows(space, ["t5000", "t0"]).tolist() == [num_rows, places[0]]
    assert time.perf_counter() - start < 0.1


# What compute may not give, and what may not be asked.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((1, 4)), r"2 texts were computed as an array of shape \(1, 4\), expected \[N, 4\]"),
        (np.ones((2, 3)), r"2 texts were computed as an array of shape \(2, 3\), expected \[N, 4\]"),
        (np.ones(4), r"2 texts were computed as an array of shape \(4,\)"),
        (np.array([[0, 1, 2, 3], [0, np.nan, 0, 0]]), r"the vector of texts\[5\] has values that are not finite"),
        (np.array([[0, 1, np.inf, 3], [0, 1, 0, 0]]), r"the vector of texts\[4\] has values that are not finite"),
        (np.array([[0, 1, 1e39, 3], [0, 1, 0, 0]]), r"the vector of texts\[4\] has values that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_vectors_are_refused_and_what_is_there_stays(tmp_path, values, message):
    store_, texts = Store(tmp_path), numbered(0, 1, 0, 2, 3, 4)
    store_.encode(SPACE, texts[:4], vectors_of)
    with pytest.raises(ValueError, match=message):
        store_.encode(SPACE, texts, lambda asked: values)
    assert store_.rows(SPACE, numbered(0, 1, 2, 3, 4)).tolist() == [0, 1, 2, -1, -1]
    assert (store_.hits, store_.misses) == (1 + 4, 3)
    np.testing.assert_array_equal(Store(tmp_path).encode(SPACE, texts, vectors_of), vectors_of(texts))


def test_what_was_computed_before_an_error_is_kept(tmp_path):
    def compute(texts):
        if "t4" in texts:
            raise ValueError("the server is gone")
        return vectors_of(texts)

    with pytest.raises(ValueError, match="the server is gone"):
        Store(tmp_path).encode(SPACE, numbered(*range(6)), compute, slice_texts=2)
    assert Store(tmp_path).rows(SPACE, numbered(*range(6))).tolist() == [0, 1, 2, 3, -1, -1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.encode(SPACE, "text", never), "texts is a str, expected a list of str"),
        (lambda s: s.encode(SPACE, ["a", None], never), r"texts\[1\] is a NoneType, expected a str"),
        (lambda s: s.rows(SPACE, ["a", "b\ud800"]), r"texts\[1\] has a lone surrogate at character 1"),
        (lambda s: s.read(SPACE, np.array([3, -1])), f"{NAME}: rows -1 to 3 were asked for, there are 10"),
        (lambda s: s.read(SPACE, np.array([3, 10])), f"{NAME}: rows 3 to 10 were asked for, there are 10"),
        (lambda s: s.rows(Space("../" * 30, 4, {}), ["a"]), "is no space: expected a SHA-256 in hexadecimal"),
        (lambda s: s.rows(Space("AB" * 32, 4, {}), ["a"]), "is no space: expected a SHA-256 in hexadecimal"),
        (lambda s: s.rows(Space("ab" * 32, 0, {}), ["a"]), "is no space: .* and a dim of at least 1"),
        (lambda s: s.rows(SPACE._replace(dim=2), ["a"]), "space.json: is of fingerprint abab.* and dim 4, expected"),
        (
            lambda s: s.encode(SPACE._replace(fingerprint=NAME + "0" * 48), ["a"], never),
            f"space.json: is of fingerprint {'ab' * 32} and dim 4, expected {NAME}0",
        ),
        (lambda s: s.describe("cd" * 8), f"no space '{'cd' * 8}', expected one of {NAME}"),
        (lambda s: s.verify(".."), f"no space '..', expected one of {NAME}"),
        (lambda s: s.prune(NAME, "lock"), f"no space 'lock', expected one of {NAME}"),
        (lambda s: Store(s.folder / "lock"), "lock: is a file, expected the folder of a store"),
    ],
)
def test_calls_that_are_refused(filled, call, message):
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        call(Store(filled))
    assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before


# What a kill leaves.


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 17, 1000])
def test_vectors_beyond_the_keys_are_ignored_then_cut_off(filled, num_bytes):
    with open(filled / NAME / "vectors.f32", "ab") as file:
        file.write(b"\xff" * num_bytes)
    store_ = Store(filled)
    assert store_.open(SPACE).shape == (10, 4)
    assert store_.verify(NAME).damaged.tolist() == []
    np.testing.assert_array_equal(store_.encode(SPACE, numbered(3), never), vectors_of(numbered(3)))
    asked = numbered(11, 2, 10)
    np.testing.assert_array_equal(store_.encode(SPACE, asked, vectors_of), vectors_of(asked))
    assert (filled / NAME / "vectors.f32").stat().st_size == 12 * 16
    np.testing.assert_array_equal(Store(filled).encode(SPACE, asked, never), vectors_of(asked))


@pytest.mark.parametrize("num_bytes", [1, 24, 27])
def test_half_a_record_is_ignored_then_cut_off(filled, num_bytes):
    with open(filled / NAME / "vectors.f32", "ab") as file:
        file.write(vectors_of(numbered(10)).tobytes())
    with open(filled / NAME / "keys.bin", "ab") as file:
        file.write((text_keys(numbered(10)).tobytes() + b"\xff" * 3)[:num_bytes])
    store_ = Store(filled)
    assert store_.rows(SPACE, numbered(9, 10)).tolist() == [9, -1]
    assert store_.verify(NAME).num_rows == 10
    np.testing.assert_array_equal(store_.encode(SPACE, numbered(12, 10), vectors_of), vectors_of(numbered(12, 10)))
    assert (filled / NAME / "keys.bin").stat().st_size == 12 * 28
    np.testing.assert_array_equal(Store(filled).encode(SPACE, numbered(12, 10), never), vectors_of(numbered(12, 10)))


def test_vectors_are_on_disk_before_their_keys(filled, monkeypatch):
    """Sizes of what is brought to the disk, and of keys.bin then: 12 vectors of 16 bytes, 12 records of 28."""
    sizes, fsync = [], os.fsync

    def spy(descriptor):
        sizes.append((os.fstat(descriptor).st_size, (filled / NAME / "keys.bin").stat().st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    Store(filled).encode(SPACE, numbered(10, 11), vectors_of)
    assert sizes == [(192, 280), (336, 336)]


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_full_disk_leaves_what_was_there(filled, monkeypatch, place):
    """The disk is full as the vectors are flushed, or as the keys are."""
    store_, flush, calls = Store(filled), space_files._flush, []

    def full(file):
        calls.append(file.name)
        if len(calls) == {"first": 1, "second": 2}[place]:
            file.truncate(file.tell() - 1)
            raise OSError("no space left on device")
        flush(file)

    with monkeypatch.context() as patch:
        patch.setattr(space_files, "_flush", full)
        with pytest.raises(OSError, match="no space left"):
            store_.encode(SPACE, numbered(20, 21), vectors_of)
    assert [Path(name).name for name in calls] == ["vectors.f32", "keys.bin"][: len(calls)]
    # Of two records one is whole, and its vector is there: it counts.
    expected = [-1, -1] if place == "first" else [10, -1]
    for other in (store_, Store(filled)):
        assert other.rows(SPACE, numbered(20, 21)).tolist() == expected
    asked = numbered(21, 20, 0)
    np.testing.assert_array_equal(store_.encode(SPACE, asked, vectors_of), vectors_of(asked))
    assert store_.verify(NAME).damaged.tolist() == []


# A process of its own, which imports the store and not all of embedft (and torch); it forks one to write for each line
# it is told: the texts first to last, `step` a call, and at which flush to kill itself (0: never).
NURSERY = f"""
import os, signal, sys, traceback, types
package = types.ModuleType("embedft")
package.__path__ = [{str(ROOT / "embedft")!r}]
sys.modules["embedft"] = package
import numpy as np
from embedft.encoders import space_files
from embedft.encoders.store import Space, Store

def vectors_of(texts, dim=512):
    return np.array([np.arange(dim) + int(text[1:]) for text in texts], dtype=np.float32)

def write(first, last, step, slice_texts, kill_at):
    flush, calls = space_files._flush, []
    def counted(file):
        calls.append(file)
        if len(calls) == kill_at:
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)
    space_files._flush = counted
    space, store = Space("ab" * 32, 512, {{}}), Store(sys.argv[1])
    for start in range(first, last, step):
        texts = [f"t{{number}}" for number in range(start, min(start + step, last))]
        found = store.encode(space, texts, vectors_of, slice_texts=slice_texts)
        assert (found == vectors_of(texts)).all()
        os.write(1, f"{{start + len(texts)}}\\n".encode())

os.write(1, b"ready\\n")
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            write(*map(int, line.split()))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.write(1, f"pid {{pid}}\\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(1, f"end {{code}}\\n".encode())
"""
WIDE = Space("ab" * 32, 512, {})


class Nursery:
    """The process of `NURSERY`, over one store."""

    def __init__(self, folder):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY, str(folder)], **pipes, text=True)
        self.told, self.pid = [], None  # of the texts that were acknowledged, how many there were
        assert self.read() == ["ready"], self.process.stderr.read()

    def write(self, *, first, last, step, slice_texts, kill_at=0):
        self.process.stdin.write(f"{first} {last} {step} {slice_texts} {kill_at}\n")
        self.process.stdin.flush()

    def read(self):
        """The words of the next line; acknowledgements and the number of the writing process are kept."""
        words = self.process.stdout.readline().split()
        if words[:1] == ["pid"]:
            self.pid = int(words[1])
        elif words and words[0].isdecimal():
            self.told.append(int(words[0]))
        return words

    def end(self):
        """The exit code of the writing process, once it has ended."""
        while (words := self.read())[0] != "end":
            pass
        return int(words[1])

    def close(self):
        errors = self.process.communicate()[1]
        assert self.process.returncode == 0
        return errors


def check_wide(store_, numbers):
    texts = numbered(*numbers)
    rows = store_.rows(WIDE, texts)
    assert (rows >= 0).all()
    np.testing.assert_array_equal(store_.read(WIDE, rows), vectors_of(texts, 512))


def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path):
    """Ten at any time, ten between the steps of an append; each of the twenty goes on with what the last one left."""
    generator, nursery, first, tails = random.Random(0), Nursery(tmp_path), 0, 0
    for attempt in range(20):
        kill_at = attempt // 2 + 1 if attempt % 2 else 0
        nursery.write(first=first, last=100_000, step=200, slice_texts=80, kill_at=kill_at)
        if not kill_at:
            num_lines = generator.randint(1, 4)
            while nursery.pid is None or num_lines > 0:
                nursery.read()
                num_lines -= 1
            time.sleep(generator.uniform(0, 0.02))
            os.kill(nursery.pid, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL
        nursery.pid = None
        reader = Store(tmp_path)
        check_wide(reader, range(max(nursery.told, default=0)))
        # What was not acknowledged is right or not there.
        num_rows = len(reader.open(WIDE))
        np.testing.assert_array_equal(reader.open(WIDE), vectors_of(numbered(*range(num_rows)), 512))
        size = (tmp_path / NAME / "vectors.f32").stat().st_size if (tmp_path / NAME).is_dir() else 0
        tails += size > num_rows * 2048
        first = generator.randrange(num_rows + 1)
    assert nursery.close() == ""
    assert max(nursery.told) >= 200
    assert tails >= 5  # killed between vectors and keys
    assert Store(tmp_path).verify(NAME).damaged.tolist() == []
    assert Store(tmp_path).verify(NAME).num_rows == num_rows


def test_a_second_writer_waits_and_says_so_once(tmp_path):
    nursery = Nursery(tmp_path)
    with locked(tmp_path / "lock", wait=never):
        nursery.write(first=0, last=90, step=90, slice_texts=30)
        line = nursery.process.stderr.readline()
        assert line == f"{tmp_path}: waiting for process {os.getpid()}, which is writing\n"
        assert Store(tmp_path).rows(WIDE, ["t0"]).tolist() == [-1]  # readers do not
    assert (nursery.end(), nursery.told, nursery.close()) == (0, [90], "")
    check_wide(Store(tmp_path), range(90))


@pytest.mark.parametrize("action", ["repair", "prune"])
def test_who_repairs_or_removes_waits_for_a_writer(filled, capfd, action):
    done = threading.Event()

    def act():
        getattr(Store(filled), action)(NAME)
        done.set()

    with locked(filled / "lock", wait=never):
        thread = threading.Thread(target=act)
        thread.start()
        assert not done.wait(0.2)
        assert Store(filled).names() == [NAME]
    thread.join()
    assert done.is_set()
    assert capfd.readouterr().err == f"{filled}: waiting for process {os.getpid()}, which is writing\n"


def test_it_is_said_once_a_store(tmp_path, capsys):
    store_ = Store(tmp_path)
    for _ in range(3):
        store_._say_waiting("process 5")
    assert capsys.readouterr().err == f"{tmp_path}: waiting for process 5, which is writing\n"


def test_two_writers_and_a_reader_at_once(tmp_path):
    """The writers want mostly the same texts: each is stored once; the reader sees more and more, all of it right."""
    nurseries = [Nursery(tmp_path) for _ in range(2)]
    reader, seen = Store(tmp_path), [0]
    for nursery, first in zip(nurseries, (0, 250), strict=True):
        nursery.write(first=first, last=3000, step=100, slice_texts=50)
    deadline = time.monotonic() + 60
    while seen[-1] < 3000:
        assert time.monotonic() < deadline
        rows = reader.rows(WIDE, numbered(*range(3000)))
        there = np.flatnonzero(rows >= 0)
        np.testing.assert_array_equal(reader.read(WIDE, rows[there]), vectors_of(numbered(*there), 512))
        seen.append(len(there))
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    for nursery in nurseries:
        assert (nursery.end(), nursery.told[-1]) == (0, 3000)
        assert re.fullmatch(r"(.*: waiting for (process \d+|another process), which is writing\n)?", nursery.close())
    check_wide(Store(tmp_path), range(3000))
    found = Store(tmp_path).verify(NAME)
    assert (found.num_rows, found.damaged.tolist()) == (3000, [])


def test_what_another_process_computed_meanwhile_is_not_added_again(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)

    def compute(texts):
        second.encode(SPACE, numbered(1, 2), vectors_of)
        return vectors_of(texts)

    np.testing.assert_array_equal(first.encode(SPACE, numbered(0, 1, 2), compute), vectors_of(numbered(0, 1, 2)))
    assert first.rows(SPACE, numbered(0, 1, 2)).tolist() == [2, 0, 1]
    assert first.open(SPACE).shape == (3, 4)

    def compute_all(texts):
        second.encode(SPACE, texts, vectors_of)
        return vectors_of(texts)

    first.encode(SPACE, numbered(7), compute_all)
    assert first.open(SPACE).shape == (4, 4)


# Damage.


def damage_vector(folder, row, column=0):
    with open(folder / NAME / "vectors.f32", "r+b") as file:
        file.seek(row * 16 + column * 4)
        file.write(b"\x01\x02\x03\x04")


def test_a_damaged_row_is_never_returned(filled, capsys):
    store_ = Store(filled)
    assert store_.encode(SPACE, numbered(4), never).shape == (1, 4)
    damage_vector(filled, 4, column=3)
    damage_vector(filled, 6)
    for reader in (store_, Store(filled)):
        message = rf"vectors\.f32: row 6 is damaged \(2 of 3 rows read\); see `embedft store {filled} --verify`"
        with pytest.raises(ValueError, match=message):
            reader.encode(SPACE, numbered(6, 5, 4), never)
        np.testing.assert_array_equal(reader.encode(SPACE, numbered(5, 7), never), vectors_of(numbered(5, 7)))
    assert store_.verify(NAME).num_rows == 10
    assert store_.verify(NAME).damaged.tolist() == [4, 6]

    assert main(["store", str(filled), "--verify"]) == 1
    assert main(["store", str(filled), "--repair"]) == 0
    assert main(["store", str(filled), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{NAME}: 2 of 10 rows damaged: 4, 6",
        f"{NAME}: 2 of 10 rows damaged and dropped: 4, 6",
        f"{NAME}: 8 rows, all whole",
    ]
    # Computed again, behind the others, whose rows are what they were; in a reader that had it open as well.
    for reader in (store_, Store(filled)):
        assert reader.rows(SPACE, numbered(3, 4, 5)).tolist() == [3, -1, 5]
    compute = Compute()
    texts = numbered(*range(10))
    np.testing.assert_array_equal(store_.encode(SPACE, texts, compute), vectors_of(texts))
    assert compute.calls == [numbered(4, 6)]
    assert store_.rows(SPACE, numbered(4, 6, 9)).tolist() == [10, 11, 9]
    assert store_.describe(NAME).num_rows == 10
    assert store_.verify(NAME).damaged.tolist() == []
    # A row that was forgotten is not to be read by its number either.
    with pytest.raises(ValueError, match="row 4 is damaged"):
        store_.read(SPACE, np.array([4]))


def test_a_damaged_key_or_checksum_is_found(filled, monkeypatch):
    monkeypatch.setattr(space_files, "BLOCK_ROWS", 3)
    content = bytearray((filled / NAME / "keys.bin").read_bytes())
    content[2 * 28 + 5] ^= 1  # of the key of row 2
    content[8 * 28 + 24] ^= 1  # of the checksum of row 8
    (filled / NAME / "keys.bin").write_bytes(content)
    store_ = Store(filled)
    assert store_.rows(SPACE, numbered(1, 2, 8)).tolist() == [1, -1, 8]
    with pytest.raises(ValueError, match="row 8 is damaged"):
        store_.encode(SPACE, numbered(8), never)
    assert store_.verify(NAME).damaged.tolist() == [2, 8]
    assert store_.repair(NAME).damaged.tolist() == [2, 8]
    assert store_.verify(NAME).num_rows == 8
    assert (filled / NAME / "keys.bin").stat().st_size == 280


@pytest.mark.parametrize("size", [0, 16, 159, None])
def test_keys_beyond_the_vectors_are_an_error(filled, capsys, size):
    path = filled / NAME / "vectors.f32"
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    size = size or 0
    message = (
        rf"{path}: {size} bytes, expected at least 160 for the 10 rows of keys\.bin; see `embedft store {filled}"
        " --verify`, drop such rows with --repair"
    )
    store_, before = Store(filled), (filled / NAME / "keys.bin").read_bytes()
    for call in (
        lambda: store_.rows(SPACE, ["t0"]),
        lambda: store_.encode(SPACE, ["t50"], never),
        lambda: store_.open(SPACE),
        lambda: store_.describe(NAME),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert main(["store", str(filled)]) == 1
    assert f"{NAME}: {path}: {size} bytes, expected" in capsys.readouterr().err
    whole = size // 16
    assert store_.verify(NAME).damaged.tolist() == list(range(whole, 10))
    assert (filled / NAME / "keys.bin").read_bytes() == before
    assert store_.repair(NAME).num_rows == 10
    assert store_.verify(NAME).num_rows == whole
    texts = numbered(*range(10))
    compute = Compute()
    np.testing.assert_array_equal(store_.encode(SPACE, texts, compute), vectors_of(texts))
    assert sum(map(len, compute.calls)) == 10 - whole


def test_a_file_cut_while_it_is_open_is_an_error(filled):
    """Not a signal that ends the process, which reading a map beyond its file is."""
    store_ = Store(filled)
    store_.encode(SPACE, numbered(1), never)
    os.truncate(filled / NAME / "vectors.f32", 0)
    with pytest.raises(ValueError, match="0 bytes, expected at least 160"):
        store_.encode(SPACE, numbered(1), never)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("garbage", "space.json line 1 column 1: invalid JSON"),
        ("[]", "space.json: holds a list, expected an object"),
        ({"version": 2}, "space.json: version is 2, expected 1"),
        ({}, "space.json: version is None, expected 1"),
        ({"version": 1}, "space.json: says fingerprint None, dim None"),
        ({"version": 1, "fingerprint": "cd" * 32, "dim": 4, "description": {}}, "says fingerprint 'cdcd"),
        ({"version": 1, "fingerprint": "ab" * 32, "dim": "4", "description": {}}, "dim '4': not what was written"),
        ({"version": 1, "fingerprint": "ab" * 32, "dim": 0, "description": {}}, "dim 0: not what was written"),
        ({"version": 1, "fingerprint": "ab" * 32, "dim": 4}, "not what was written"),
        ({"version": 1, "fingerprint": "ab" * 32, "dim": 5, "description": {}}, "dim 5, expected|bytes, expected at"),
        (None, f"{NAME}: no space.json, which says what its vectors are of; remove it with --prune"),
    ],
)
@pytest.mark.parametrize("with_rows", [True, False])
def test_a_space_json_that_is_not_what_was_written(filled, capsys, content, message, with_rows):
    path = filled / NAME / "space.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    if not with_rows:
        (filled / NAME / "keys.bin").unlink()
    store_ = Store(filled)
    if with_rows or content is not None:
        for call in (lambda: store_.encode(SPACE, numbered(1), never), lambda: store_.encode(SPACE, ["t1"], never)):
            with pytest.raises(ValueError, match=message):
                call()
    if with_rows and "dim 5" not in message:
        for call in (store_.describe, store_.verify, store_.repair):
            with pytest.raises(ValueError, match=message):
                call(NAME)
        assert main(["store", str(filled), "--verify"]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert main(["store", str(filled), "--prune", NAME]) == 0
    np.testing.assert_array_equal(store_.encode(SPACE, numbered(1), vectors_of), vectors_of(numbered(1)))


# Removing.


def test_prune_under_readers_and_writers(filled):
    reader, writer = Store(filled), Store(filled)
    rows = reader.rows(SPACE, numbered(2, 5))
    writer.rows(SPACE, ["t0"])
    (filled / ".0.1.tmp").mkdir()  # what a kill left of an earlier one
    Store(filled).prune(NAME)
    assert sorted(os.listdir(filled)) == ["lock"]
    np.testing.assert_array_equal(reader.read(SPACE, rows), vectors_of(numbered(2, 5)))
    assert reader.rows(SPACE, numbered(2)).tolist() == [-1]
    # Begun anew, with other rows: what was known of the old ones is gone.
    writer.encode(SPACE, numbered(5, 2, 7), vectors_of)
    assert reader.rows(SPACE, numbered(2, 5, 0)).tolist() == [1, 0, -1]
    np.testing.assert_array_equal(reader.encode(SPACE, numbered(7, 5), never), vectors_of(numbered(7, 5)))


def test_what_a_killed_prune_left_is_no_hindrance(filled):
    """Of the same space, by a process of the same number, as in a container that is started again."""
    left = filled / f".{NAME}.{os.getpid()}.tmp"
    left.mkdir()
    (left / "vectors.f32").write_bytes(b"half of it")
    Store(filled).prune(NAME)
    assert sorted(os.listdir(filled)) == ["lock"]


def test_a_space_begun_anew_is_never_mixed_with_the_old_one(filled):
    """As many rows as before, of other texts: told by the file, not by its length."""
    reader = Store(filled)
    rows = reader.rows(SPACE, numbered(3))
    other = Store(filled)
    other.prune(NAME)
    other.encode(SPACE, numbered(*range(100, 110)), vectors_of)
    assert rows.tolist() == [3]
    assert reader.rows(SPACE, numbered(3, 103)).tolist() == [-1, 3]
    np.testing.assert_array_equal(reader.encode(SPACE, numbered(103), never), vectors_of(numbered(103)))


def test_removed_while_others_are_computed(filled):
    store_ = Store(filled)

    def compute(texts):
        Store(filled).prune(NAME)
        return vectors_of(texts)

    with pytest.raises(ValueError, match=f"{NAME}: texts were removed by another process while others were added"):
        store_.encode(SPACE, numbered(3, 30), compute)
    assert store_.rows(SPACE, numbered(3, 30)).tolist() == [-1, 0]


def test_last_use_is_noted_once_a_minute(filled):
    path, store_ = filled / NAME / "space.json", Store(filled)
    for age, noted in ((30, False), (90, True)):
        used = time.time() - age
        os.utime(path, (used, used))
        store_.rows(SPACE, ["t1"])
        assert store_.describe(NAME).last_used == pytest.approx(used)
        store_.encode(SPACE, ["t1"], never)
        assert (store_.describe(NAME).last_used > time.time() - 10) == noted


def test_a_space_that_is_being_filled_is_in_use(filled):
    """However long ago its filling began: noted with every slice, so that nobody takes it for abandoned."""
    path, store_, unused = filled / NAME / "space.json", Store(filled), []

    def compute(texts):
        unused.append(store_.unused(3600))
        used = time.time() - 86_400
        os.utime(path, (used, used))  # this slice takes a day
        return vectors_of(texts)

    store_.fill(SPACE, numbered(*range(10, 14)), compute, slice_texts=1)
    assert unused == [[]] * 4


def test_unused_spaces(filled, capsys):
    other = Space("cd" * 32, 4, {})
    store_ = Store(filled)
    store_.encode(other, ["t1"], vectors_of)
    used = time.time() - 3 * 86_400
    os.utime(filled / NAME / "space.json", (used, used))
    (filled / ("0" * 16)).mkdir()  # begun and never written
    assert store_.unused(4 * 86_400) == ["0" * 16]
    assert store_.unused(2 * 86_400) == ["0" * 16, NAME]
    assert main(["store", str(filled), "--prune-unused", "4"]) == 0
    assert main(["store", str(filled), "--prune-unused", "2.5"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{filled}: 1 spaces removed, 0 bytes"
    assert store_.names() == [other.name]
    assert main(["store", str(filled), "--prune-unused", "-1"]) == 2
    assert "--prune-unused is -1, expected 0 days or more" in capsys.readouterr().err


# The commands.


def test_the_command_lists(filled, capsys):
    words = {"model": "m", "role": "query", "max_length": 7, "prompt": "q: "}
    Store(filled).encode(Space("cd" * 32, 2, words), ["a"], lambda texts: np.ones((1, 2)))
    stamp = time.mktime((2026, 11, 21, 8, 5, 0, 0, 0, -1))
    for path in filled.glob("*/space.json"):
        os.utime(path, (stamp, stamp))
    sizes = [sum(p.stat().st_size for p in (filled / name).iterdir()) for name in (NAME, "cd" * 8)]
    assert main(["store", str(filled)]) == 0
    header, first, second, empty, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["space", "rows", "dim", "size", "last", "use", "role", "max_length", "model"]
    assert first.split() == [NAME, "10", "4", *format_bytes(sizes[0]).split(), "2026-11-21", "08:05", "counting"]
    expected = ["cd" * 8, "1", "2", *format_bytes(sizes[1]).split(), "2026-11-21", "08:05", "query", "7", "m"]
    assert second.split() == expected
    assert (empty, total) == ("", f"{filled}: 2 spaces, {format_bytes(sum(sizes))}")


def test_the_command_verifies_and_prunes(filled, capsys):
    other = "cd" * 8
    Store(filled).encode(Space("cd" * 32, 4, {}), numbered(*range(8)), vectors_of)
    for row in range(7):
        damage_vector(filled, row)
    assert main(["store", str(filled), "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{NAME}: 7 of 10 rows damaged: 0, 1, 2, 3, 4, ...", f"{other}: 8 rows, all whole"]
    assert main(["store", str(filled), "--prune", NAME, "nothing"]) == 2
    assert f"no space 'nothing', expected one of {NAME}, {other}" in capsys.readouterr().err
    before = Store(filled).num_bytes()
    assert main(["store", str(filled), "--prune", NAME, NAME]) == 0
    freed = format_bytes(before - Store(filled).num_bytes())
    assert capsys.readouterr().out == f"{filled}: 1 spaces removed, {freed}\n"
    assert main(["store", str(filled), "--prune", other]) == 0
    assert main(["store", str(filled), "--verify"]) == 0
    assert Store(filled).names() == []
    assert main(["store", str(filled / "missing")]) == 2
    assert not (filled / "missing").exists()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (1_600_000_000, "1.49 GiB")],
)
def test_format_bytes(number, text):
    assert format_bytes(number) == text
    assert format_bytes(5000 << 40) == "5e+03 TiB"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, texts and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset().save("pairs.json")
    (tmp_path / "texts.txt").write_text("a b\nc\na b\nd e f\n")
    return tmp_path


def test_encode_and_evaluate_through_a_store(place, capsys):
    texts = ["a b", "c", "a b", "d e f"]
    assert main(["encode", "model", "texts.txt", "--store", "store"]) == 0
    output = capsys.readouterr()
    size = format_bytes(Store("store").num_bytes())
    assert (output.out, output.err) == ("", f"store: 1 texts were there, 3 computed; {size} on disk\n")
    assert main(["encode", "model", "texts.txt", "--store", "store", "--out", "v.npy", "--dim", "8"]) == 0
    output = capsys.readouterr()
    assert output.out == "v.npy: 4 texts x 8 dimensions, float32\n"
    assert output.err.startswith("store: 4 texts were there, 0 computed; ")
    expected = make_embedder(place / "model").encode(texts, dim=8)
    np.testing.assert_allclose(np.load("v.npy"), expected, rtol=0, atol=1e-6)

    report = evaluate(make_embedder(place / "model"), make_dataset())
    for computed in (21, 0):  # 12 questions and 9 documents
        assert main(["evaluate", "model", "pairs.json", "--store", "store", "--json", "--no-bm25"]) == 0
        output = capsys.readouterr()
        assert f"{21 - computed} texts were there, {computed} computed" in output.err
        assert json.loads(output.out) == report.metrics
    (place / "file").write_text("")
    assert main(["encode", "model", "texts.txt", "--store", "file"]) == 2
    assert capsys.readouterr().err == "embedft encode: error: file: is a file, expected the folder of a store\n"


# Embedders.

TEXTS = ["a b c", "", "the revenue", "what order of the world", "a b c", "x" * 30, "7 8 9 hello hello world"]


def test_the_same_vectors_with_and_without(write_tiny, tmp_path, monkeypatch):
    """Bit for bit when whole; cut, to 1e-6. Over windows of two texts."""
    folder = write_tiny(tmp_path / "model", modules=True, settings={"truncate_dim": 8})
    plain, kept = make_embedder(folder), make_embedder(folder, store=tmp_path / "store")
    whole = plain.encode(TEXTS, dim=32)
    np.testing.assert_array_equal(kept.encode(TEXTS, dim=32), whole)
    assert (kept.store.hits, kept.store.misses) == (1, 6)
    monkeypatch.setattr(embedder_module, "WINDOW_TEXTS", 2)
    for dim in (1, 8, 31, 32, None):
        found = kept.encode(TEXTS, dim=dim)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_allclose(found, plain.encode(TEXTS, dim=dim), rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(kept.encode(TEXTS, dim=32), whole)
    assert kept.store.misses == 6
    # A store object may be handed over, and shared.
    shared = make_embedder(folder, store=kept.store)
    assert shared.store is kept.store
    assert shared.encode([]).shape == (0, 8)


def test_without_normalising(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, normalize=False, settings={"similarity_fn_name": "dot"})
    plain, kept = make_embedder(folder), make_embedder(folder, store=tmp_path / "store")
    np.testing.assert_array_equal(kept.encode(TEXTS), plain.encode(TEXTS))
    np.testing.assert_array_equal(kept.encode(TEXTS, dim=5), plain.encode(TEXTS, dim=5))


def test_ninety_of_a_hundred_are_there(tiny_bert, tmp_path, monkeypatch):
    texts = [f"the fee of {number}" for number in range(100)]
    embedder = make_embedder(tiny_bert, store=tmp_path)
    embedder.encode(texts[:90])
    encoded, encode = [], embedder.tokenizer.encode
    monkeypatch.setattr(embedder.tokenizer, "encode", lambda asked: encoded.extend(asked) or encode(asked))
    found = embedder.encode(texts)
    assert encoded == texts[90:]
    np.testing.assert_allclose(found, make_embedder(tiny_bert).encode(texts), rtol=0, atol=1e-6)


def change_weight(embedder):
    with torch.no_grad():
        embedder.encoder.layers[1].feed_forward_out.bias[3] += 1


def change_weight_unseen(embedder):
    """Past autograd's count of changes."""
    embedder.encoder.embeddings.token.weight.data[7, 3] += 1


def step(embedder):
    embedder.train()
    embedder.embed(embedder.pack(TEXTS, role="document"), role="document")[:, 0].sum().backward()
    torch.optim.SGD(embedder.parameters(), lr=1.0).step()
    embedder.zero_grad()


def change_tokenizer(embedder):
    embedder.tokenizer.backend.normalizer = tokenizers.normalizers.Replace("a", "b")


CHANGES = {
    "weight": change_weight,
    "weight unseen": change_weight_unseen,
    "training step": step,
    "prompt": lambda e: e.prompts.update(document="the "),
    "prompt left out": lambda e: (e.prompts.update(document="the "), setattr(e, "include_prompt", False)),
    "max_length": lambda e: setattr(e, "max_length", 5),
    "pooling": lambda e: setattr(e, "pooling", ("cls",)),
    "normalize": lambda e: setattr(e, "normalize", False),
    "dtype": lambda e: e.to(torch.bfloat16),
    "tokenizer": change_tokenizer,
    "truncation side": lambda e: (e.tokenizer.config.update(truncation_side="left"), setattr(e, "max_length", 5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_stale_comes_back(tiny_bert, tmp_path, name):
    embedder = make_embedder(tiny_bert, store=tmp_path)
    before, old = embedder.encode(TEXTS), embedder.space("document")
    CHANGES[name](embedder)
    new = embedder.space("document")
    assert new.fingerprint != old.fingerprint
    found = embedder.encode(TEXTS)
    assert embedder.store.misses == 12
    embedder.store = None
    np.testing.assert_array_equal(found, embedder.encode(TEXTS))
    assert np.abs(found - before).max() > 1e-4
    assert len(Store(tmp_path).names()) == 2


def test_all_that_vectors_depend_on_is_in_the_fingerprint(write_tiny, tmp_path):
    """Settings that change no weight: of the configuration, of pooling, of how torch multiplies."""
    variants = {
        "as it is": {},
        "activation": {"hidden_act": "relu"},
        "eps": {"layer_norm_eps": 1e-3},
        "heads": {"num_attention_heads": 8},
        "lower case": {"lower_case": True},
        "pooling": {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}},
        "query prompt": {"settings": {"prompts": {"query": "query: "}}},
        "length": {"max_seq_length": 6},
        "dot": {"settings": {"similarity_fn_name": "dot"}, "normalize": False},
    }
    spaces = {}
    for name, options in variants.items():
        embedder = make_embedder(write_tiny(tmp_path / name, modules=True, **options))
        spaces[name] = embedder.space("query")
    assert len({space.fingerprint for space in spaces.values()}) == len(variants)
    assert spaces["pooling"].dim == 64

    embedder = make_embedder(tmp_path / "as it is")
    assert embedder.space("query").fingerprint == spaces["as it is"].fingerprint
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embedder.space("query").fingerprint != spaces["as it is"].fingerprint
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert embedder.space("query").fingerprint != spaces["as it is"].fingerprint
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
    # What they do not depend on.
    embedder.truncate_dim, embedder.prompts = 8, {"document": "other", "name": "of no role"}
    embedder.train()
    assert embedder.space("query").fingerprint == spaces["as it is"].fingerprint
    assert embedder.space("query").dim == 32
    with pytest.raises(ValueError, match="role is 'passage', expected one of query, document"):
        embedder.space("passage")


def test_weights_are_told_apart_by_name_shape_and_type():
    """24 bytes of zeros each."""
    hashes = []
    for name, shape, dtype in (
        ("a", (2, 3), torch.float32),
        ("b", (2, 3), torch.float32),
        ("a", (3, 2), torch.float32),
        ("a", (2, 3), torch.int32),
    ):
        module = torch.nn.Module()
        module.register_buffer(name, torch.zeros(shape, dtype=dtype))
        hashes.append(weights_sha256(module))
    assert len(set(hashes)) == 4


def test_a_space_says_what_it_is(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, settings={"prompts": {"query": "q: "}}, max_seq_length=9)
    embedder = make_embedder(folder)
    description = embedder.space("query").description
    weights = description.pop("weights")
    assert re.fullmatch("[0-9a-f]{64}", weights)
    assert description == {
        "model": str(folder),
        "dtype": "float32",
        "role": "query",
        "prompt": "q: ",
        "max_length": 9,
        "pooling": ["mean"],
        "normalize": True,
    }
    assert embedder.space("document").description["role"] == "document"
    embedder.prompts.clear()
    # Without prompts a role makes no difference, and one space serves both.
    assert embedder.space("query") == embedder.space("document")
    assert embedder.space("query").description["role"] == "query and document"
    embedder.source = None
    assert embedder.space("query").description["model"] == ""


def test_an_embedder_through_a_store_is_left_as_it_was(tiny_bert, tmp_path):
    embedder = make_embedder(tiny_bert, store=tmp_path)
    embedder.train()
    embedder.encode(TEXTS)
    assert all(module.training for module in embedder.modules())
    with pytest.raises(ValueError, match=r"texts\[1\] is a int, expected a str"):
        embedder.encode(["a", 1])
    with pytest.raises(ValueError, match="dim is 33, expected 1 to 32"):
        embedder.encode(["a"], dim=33)
    assert all(module.training for module in embedder.modules())
    assert make_embedder(tiny_bert).store is None


def test_the_bar_counts_every_text_once(tiny_bert, tmp_path, monkeypatch):
    bars, make_bar = [], embedder_module.progress_bar

    def spy(*arguments, **options):
        bars.append(make_bar(*arguments, **options))
        return bars[-1]

    monkeypatch.setattr(embedder_module, "progress_bar", spy)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "1")
    embedder = make_embedder(tiny_bert, store=tmp_path)
    for texts in (TEXTS[:3], TEXTS, []):
        embedder.encode(texts)
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3), (7, 7), (0, 0)]
