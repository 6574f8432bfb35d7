"""store.py: nothing stale, nothing lost when killed, each text computed once, damage named; and its command."""

import contextlib
import copy
import errno
import hashlib
import json
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import names, naming
from tiny import make_dataset, make_embedder

from embedft import evaluate
from embedft.cli import main
from embedft.commands.options import format_bytes
from embedft.encoders import embedder as embedder_module
from embedft.encoders import store
from embedft.encoders.store import Rows, Space, Store, text_keys
from embedft.files import locked

ROOT = Path(__file__).resolve().parents[1]
SPACE = Space("ab" * 32, 4, {"model": "counting"})
OTHER = Space("cd" * 32, 4, {})
NAME = "ab" * 8


def vectors_of(texts, dim=4):
    """A vector that says which text it belongs to: t7 -> [7, 8, 9, 10]."""
    return np.array([np.arange(dim) + int(text[1:]) for text in texts], dtype=np.float32).reshape(-1, dim)


class Compute:
    """`vectors_of`, and what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return vectors_of(texts)


def numbered(*numbers):
    return [f"t{number}" for number in numbers]


def never(texts):
    raise AssertionError(f"computed {texts}")


def encode(store_, space, texts, compute=never, **options):
    return store_.read(space, store_.fill(space, texts, compute, **options))


@pytest.fixture
def filled(tmp_path):
    """A store with t0 to t9 in `SPACE`."""
    Store(tmp_path / "store").fill(SPACE, numbered(*range(10)), vectors_of)
    return tmp_path / "store"


def vectors_file(folder, name=NAME):
    (path,) = folder.glob(f"{name}.*.f32")
    return path


def execute(folder, sql, *values):
    """A statement on the store's database, as another program could make it."""
    with contextlib.closing(sqlite3.connect(folder / "store.sqlite")) as database, database:
        return database.execute(sql, values).fetchall()


# The files.


def test_two_rows_byte_by_byte(tmp_path):
    space = Space("0123456789abcdef" + "0" * 48, 2, {"model": "m"})
    Store(tmp_path / "s").fill(space, ["a", "é"], lambda texts: np.array([[1.0, -2.0], [0.5, 0.0]]))
    assert sorted(os.listdir(tmp_path / "s")) == ["0123456789abcdef.1.f32", "0123456789abcdef.lock", "store.sqlite"]
    # 1 = 0x3f800000, -2 = 0xc0000000, 0.5 = 0x3f000000, lowest byte first.
    first, second = bytes.fromhex("0000803f000000c0"), bytes.fromhex("0000003f00000000")
    assert (tmp_path / "s" / "0123456789abcdef.1.f32").read_bytes() == first + second
    keys = [hashlib.blake2b(text, digest_size=24).digest()[:16] for text in (b"a", b"\xc3\xa9")]
    sums = [zlib.crc32(row).to_bytes(4, "little") for row in (first, second)]
    ((row, num_texts, records),) = execute(tmp_path / "s", "SELECT first_row, num_texts, records FROM batches")
    assert (row, num_texts, records) == (0, 2, keys[0] + sums[0] + keys[1] + sums[1])
    ((*found, used),) = execute(tmp_path / "s", "SELECT fingerprint, dim, description, last_used FROM spaces")
    assert found == [space.fingerprint, 2, '{"model": "m"}']
    assert used == pytest.approx(time.time(), abs=60)


def test_what_is_there_is_read_and_the_rest_computed_once(tmp_path):
    store_, compute = Store(tmp_path), Compute()
    texts = numbered(*range(90))
    found = encode(store_, SPACE, texts, compute, slice_texts=40)
    assert [len(call) for call in compute.calls] == [40, 40, 10]
    assert (store_.hits, store_.misses) == (0, 90)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors_of(texts))

    # 90 of 100 are there; one of the ten new ones occurs three times.
    mixed = numbered(*range(100), 95, 95, 3)
    random.Random(0).shuffle(mixed)
    again, compute = Store(tmp_path), Compute()
    np.testing.assert_array_equal(encode(again, SPACE, mixed, compute), vectors_of(mixed))
    assert compute.calls == [[text for text in dict.fromkeys(mixed) if int(text[1:]) >= 90]]  # in the order given
    assert (again.hits, again.misses) == (90, 10)
    assert encode(again, SPACE, mixed).shape == (103, 4)
    assert (again.hits, again.misses) == (90, 10)  # what was read or computed before is not found again
    rows = again.find(SPACE, numbered(5, 1000, 99))
    assert (rows.dtype, rows[0], rows[1]) == (np.int64, 5, -1)
    np.testing.assert_array_equal(again.read(SPACE, rows[[0, 2]]), vectors_of(numbered(5, 99)))
    assert (again.hits, again.misses) == (90, 10)


def test_what_another_process_computes_meanwhile_is_found(tmp_path, monkeypatch):
    mine, other, turn = Store(tmp_path), Store(tmp_path), Store.turn

    def late(self, space):
        if self is mine:
            encode(other, space, numbered(1), Compute())
        return turn(self, space)

    monkeypatch.setattr(Store, "turn", late)
    encode(mine, SPACE, numbered(0, 1, 1), Compute())
    assert (mine.hits, mine.misses) == (1, 1)


def test_no_texts_and_no_rows(tmp_path):
    store_ = Store(tmp_path / "new" / "store")
    assert encode(store_, SPACE, []).shape == (0, 4)
    assert store_.find(SPACE, ["t1"]).tolist() == [-1]
    assert store_.find(SPACE, []).shape == (0,)
    assert store_.spaces() == {}
    store_.fill(SPACE, ["t1"], vectors_of)
    assert encode(store_, SPACE, []).shape == (0, 4)
    assert list(store_.spaces()) == [NAME]


def test_spaces_do_not_share_rows(tmp_path):
    store_ = Store(tmp_path)
    store_.fill(SPACE, ["t1"], vectors_of)
    assert store_.find(OTHER, ["t1"]).tolist() == [-1]
    found = encode(store_, OTHER, ["t1", "t2"], lambda texts: -vectors_of(texts))
    np.testing.assert_array_equal(found, -vectors_of(["t1", "t2"]))
    np.testing.assert_array_equal(encode(store_, SPACE, ["t1"]), vectors_of(["t1"]))
    assert list(store_.spaces()) == [NAME, OTHER.name]


def test_texts_are_told_apart_by_their_bytes(tmp_path):
    texts = ["", " ", "a", "a ", "A", "é", "e\u0301", "\x00", "a\x00"]
    values = np.eye(len(texts), dtype=np.float32)
    space = Space("ef" * 32, len(texts), {})
    Store(tmp_path).fill(space, texts, lambda asked: values)
    np.testing.assert_array_equal(encode(Store(tmp_path), space, texts[::-1]), values[::-1])


def test_rows_added_by_another_are_seen_at_the_next_look(filled):
    reader, writer = Store(filled), Store(filled)
    rows = reader.find(SPACE, numbered(3, 4))
    writer.fill(SPACE, numbered(10), vectors_of)
    np.testing.assert_array_equal(reader.read(SPACE, rows), vectors_of(numbered(3, 4)))
    assert reader.find(SPACE, numbered(10, 0)).tolist() == [10, 0]
    np.testing.assert_array_equal(reader.read(SPACE, np.array([10])), vectors_of(numbered(10)))


def test_copies_open_the_folder_for_themselves(filled):
    store_ = Store(filled)
    store_.fill(SPACE, numbered(1), never)
    for other in (copy.deepcopy(store_), pickle.loads(pickle.dumps(store_))):
        assert (other.folder, other.hits, other._opened) == (filled, 0, {})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_can_be_read(filled):
    execute(filled, "UPDATE spaces SET last_used = 0")
    for path in (*filled.iterdir(), filled):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        np.testing.assert_array_equal(encode(Store(filled), SPACE, numbered(3)), vectors_of(numbered(3)))
    finally:
        for path in (filled, *filled.iterdir()):
            path.chmod(path.stat().st_mode | 0o200)


# Finding rows.


@pytest.mark.parametrize("distinct", [1, 3, 1 << 62])
def test_keys_that_begin_alike_are_told_apart(tmp_path, monkeypatch, distinct):
    """With the first half of every key cut to one of a few values; added in pieces and at once."""

    def cut_keys(texts):
        keys_N2 = text_keys(texts).copy()
        keys_N2[:, 0] %= distinct
        return keys_N2

    monkeypatch.setattr(store, "text_keys", cut_keys)
    texts, generator = numbered(*range(60)), random.Random(distinct)
    store_ = Store(tmp_path)
    for start in range(0, 60, 7):
        part = generator.sample(texts[: start + 7], min(start + 7, 60))
        np.testing.assert_array_equal(encode(store_, SPACE, part, vectors_of), vectors_of(part))
    assert store_.misses == 60
    for reader in (store_, Store(tmp_path)):
        asked = generator.sample([*texts, *numbered(*range(100, 160))], 120)
        rows = reader.find(SPACE, asked)
        assert ((rows >= 0) == [int(text[1:]) < 60 for text in asked]).all()
        np.testing.assert_array_equal(reader.read(SPACE, rows[rows >= 0]), vectors_of([t for t in asked if t in texts]))


def test_find_against_a_dict(tmp_path):
    """Random keys whose first 32 bits and second halves have few values."""
    generator = np.random.default_rng(0)
    np.zeros((400, 4), np.float32).tofile(tmp_path / "vectors")
    for num_rows in (0, 1, 2, 50, 400):
        rows, keys = Rows(tmp_path / "vectors", 4, None), generator.integers(0, 4, (num_rows, 2)).astype("<u8")
        keys[:, 0] <<= np.uint64(32)
        keys = np.unique(keys, axis=0)
        generator.shuffle(keys)
        records = np.zeros(len(keys), store.RECORD)
        records["key"] = keys
        for part in np.array_split(records, 3):
            rows.add(part)
        first = {tuple(key): row for row, key in enumerate(keys.tolist())}
        asked = generator.integers(0, 5, (300, 2)).astype("<u8")
        asked[:, 0] <<= np.uint64(32)
        assert rows.find(asked).tolist() == [first.get(tuple(key), -1) for key in asked.tolist()]


def test_a_million_rows_are_found_without_sorting_them_again(tmp_path):
    num_rows, dim, generator = 1_000_000, 8, np.random.default_rng(0)
    space = Space("12" * 32, dim, {})
    texts, places = numbered(*range(1000)), generator.permutation(num_rows)[:1000]
    records = np.zeros(num_rows, store.RECORD)
    records["key"] = generator.integers(0, 1 << 63, (num_rows, 2), dtype=np.uint64)
    records["key"][places] = text_keys(texts)
    vectors = np.zeros((num_rows, dim), dtype=np.float32)
    vectors[places] = vectors_of(texts, dim)
    records["checksum"][places] = [zlib.crc32(row.tobytes()) for row in vectors[places]]
    Store(tmp_path).fill(space, ["t0"], lambda asked: vectors_of(asked, dim))
    execute(tmp_path, "UPDATE batches SET records = ?", records.tobytes())
    vectors.tofile(vectors_file(tmp_path, space.name))
    store_ = Store(tmp_path)
    rows = store_.find(space, [*texts, "another"])
    assert rows.tolist() == [*places.tolist(), -1]
    np.testing.assert_array_equal(store_.read(space, rows[:-1]), vectors_of(texts, dim))
    store_.fill(space, ["t5000"], lambda asked: vectors_of(asked, dim))
    assert store_.find(space, ["t5000", "t0"]).tolist() == [num_rows, places[0]]


# What compute may not return, and what may not be asked.


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        (np.ones((1, 4)), ((1, 4), ..., (2, 4))),
        (np.ones((2, 3)), ((2, 3), ..., (2, 4))),
        (np.ones(4), ((4,), ..., (2, 4))),
        (np.array([[0, 1, 2, 3], [0, np.nan, 0, 0]]), ("texts[5]", "finite")),
        (np.array([[0, 1, np.inf, 3], [0, 1, 0, 0]]), ("texts[4]", "finite")),
        (np.array([[0, 1, 1e39, 3], [0, 1, 0, 0]]), ("texts[4]", "finite")),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_vectors_are_refused_and_what_is_there_stays(tmp_path, values, facts):
    store_, texts = Store(tmp_path), numbered(0, 1, 0, 2, 3, 4)
    store_.fill(SPACE, texts[:4], vectors_of)
    with pytest.raises(ValueError, match=naming(*facts)):
        store_.fill(SPACE, texts, lambda asked: values)
    assert store_.find(SPACE, numbered(0, 1, 2, 3, 4)).tolist() == [0, 1, 2, -1, -1]
    assert (store_.hits, store_.misses) == (0, 3)
    np.testing.assert_array_equal(encode(Store(tmp_path), SPACE, texts, vectors_of), vectors_of(texts))


def test_what_was_computed_before_an_error_is_kept(tmp_path):
    def compute(texts):
        if "t4" in texts:
            raise ValueError("gone")
        return vectors_of(texts)

    with pytest.raises(ValueError, match=naming("gone")):
        Store(tmp_path).fill(SPACE, numbered(*range(6)), compute, slice_texts=2)
    assert Store(tmp_path).find(SPACE, numbered(*range(6))).tolist() == [0, 1, 2, 3, -1, -1]


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (lambda s: s.fill(SPACE, "text", never), ("texts", "str", "list")),
        (lambda s: s.fill(SPACE, ["a", None], never), ("texts[1]", "NoneType", "str")),
        (lambda s: s.find(SPACE, ["a", "bcd\ud800"]), ("texts[1]", "surrogate", 3)),
        (lambda s: s.read(SPACE, np.array([3, -1])), ("rows", -1, 3, 0, 9)),
        (lambda s: s.read(SPACE, np.array([3, 10])), ("rows", 3, 10, 0, 9)),
        (lambda s: s.find(SPACE._replace(dim=2), ["a"]), (NAME, "dim", 4, ..., 2)),
        (lambda s: s.verify(".."), ("'..'", NAME)),
        (lambda s: s.prune(NAME, "lock"), ("'lock'", NAME)),
        (lambda s: Store(s.folder / "store.sqlite"), ("store.sqlite", "file", "folder")),
    ],
)
def test_calls_that_are_refused(filled, call, facts):
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=naming(*facts)):
        call(Store(filled))
    assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before


# Kills.


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 17, 1000])
def test_vectors_without_keys_are_ignored_then_overwritten(filled, num_bytes):
    with open(vectors_file(filled), "ab") as file:
        file.write(b"\xff" * num_bytes)
    store_ = Store(filled)
    assert store_.verify(NAME)[1].tolist() == []
    np.testing.assert_array_equal(encode(store_, SPACE, numbered(3)), vectors_of(numbered(3)))
    asked = numbered(11, 2, 10)
    np.testing.assert_array_equal(encode(store_, SPACE, asked, vectors_of), vectors_of(asked))
    assert vectors_file(filled).stat().st_size == 12 * 16
    np.testing.assert_array_equal(encode(Store(filled), SPACE, asked), vectors_of(asked))


def test_vectors_are_on_disk_before_their_keys(filled, monkeypatch):
    sizes, fsync = [], os.fsync

    def spy(descriptor):
        fsync(descriptor)
        sizes.append((os.fstat(descriptor).st_size, execute(filled, "SELECT count(*) FROM batches")))

    monkeypatch.setattr(os, "fsync", spy)
    Store(filled).fill(SPACE, numbered(10, 11), vectors_of)
    assert sizes == [(12 * 16, [(1,)])]
    assert execute(filled, "SELECT count(*) FROM batches") == [(2,)]


@pytest.mark.parametrize("where", ["vectors", "keys"])
def test_a_full_disk_leaves_what_was_there(filled, monkeypatch, where):
    """And takes no room for what was not finished."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left on device")

    store_, size = Store(filled), vectors_file(filled).stat().st_size
    with monkeypatch.context() as patch:
        if where == "vectors":
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=naming(errno.ENOSPC, vectors_file(filled))) as caught:
                store_.fill(SPACE, numbered(20, 21), vectors_of)
            assert caught.value.filename == str(vectors_file(filled))
        else:
            patch.setattr(store, "WRITE_BATCH", "INSERT INTO nothing VALUES (?, ?, ?, ?)")
            with pytest.raises(ValueError, match=naming(filled / "store.sqlite")):
                store_.fill(SPACE, numbered(20, 21), vectors_of)
            with pytest.raises(ValueError, match=naming(filled / "store.sqlite")):
                Store(filled).fill(Space("cd" * 32, 4, {}), numbered(20, 21), vectors_of)
            assert sum(path.stat().st_size for path in filled.glob("*.f32")) == size
    assert vectors_file(filled).stat().st_size == size
    for other in (store_, Store(filled)):
        assert other.find(SPACE, numbered(20, 21, 3)).tolist() == [-1, -1, 3]
    asked = numbered(21, 20, 0)
    np.testing.assert_array_equal(encode(store_, SPACE, asked, vectors_of), vectors_of(asked))
    assert store_.verify(NAME)[1].tolist() == []


# A process of its own that imports the store and not all of embedft (and torch). For each line it reads it forks a
# writer: of the texts first to last, `step` a call, killed at its n-th flush or SQL statement (0: never).
NURSERY = f"""
import os, signal, sqlite3, sys, traceback, types
package = types.ModuleType("embedft")
package.__path__ = [{str(ROOT / "embedft")!r}]
sys.modules["embedft"] = package
import numpy as np
from embedft.encoders.store import Space, Store

def vectors_of(texts, dim=512):
    return np.array([np.arange(dim) + int(text[1:]) for text in texts], dtype=np.float32)

def write(first, last, step, slice_texts, kill_at):
    calls, fsync, connect = [], os.fsync, sqlite3.connect
    def counted(*_):
        calls.append(1)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def traced(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_trace_callback(counted)
        return connection
    sqlite3.connect = traced
    os.fsync = lambda descriptor: (counted(), fsync(descriptor))
    space, store, computed = Space("ab" * 32, 512, {{}}), Store(sys.argv[1]), []
    for start in range(first, last, step):
        texts = [f"t{{number}}" for number in range(start, min(start + step, last))]
        rows = store.fill(space, texts, lambda new: computed.extend(new) or vectors_of(new), slice_texts=slice_texts)
        assert (store.read(space, rows) == vectors_of(texts)).all()
        os.write(1, f"{{start + len(texts)}}\\n".encode())
    os.write(1, f"computed {{len(computed)}}\\n".encode())

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
        self.told, self.pid, self.computed = [], None, 0  # told: how many texts there were at each acknowledgement
        assert self.read() == ["ready"], self.process.stderr.read()

    def write(self, *, first, last, step, slice_texts, kill_at=0):
        self.process.stdin.write(f"{first} {last} {step} {slice_texts} {kill_at}\n")
        self.process.stdin.flush()

    def read(self):
        """The words of the next line; acknowledgements and numbers are kept."""
        words = self.process.stdout.readline().split()
        if words[:1] == ["pid"]:
            self.pid = int(words[1])
        elif words[:1] == ["computed"]:
            self.computed += int(words[1])
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
    rows = store_.find(WIDE, texts)
    assert (rows >= 0).all()
    np.testing.assert_array_equal(store_.read(WIDE, rows), vectors_of(texts, 512))


def test_kills_lose_nothing_that_was_acknowledged(tmp_path):
    """Ten at any time, thirty before each statement and flush; each writer goes on with what the last one left."""
    generator, nursery, first = random.Random(0), Nursery(tmp_path), 0
    for attempt in range(40):
        kill_at = 0 if attempt % 4 == 0 else attempt - attempt // 4
        nursery.write(first=first, last=100_000, step=200, slice_texts=80, kill_at=kill_at)
        if not kill_at:
            num_lines = generator.randint(1, 4)
            while nursery.pid is None or num_lines > 0:
                nursery.read()
                num_lines -= 1
            time.sleep(generator.uniform(0, 0.01))
            os.kill(nursery.pid, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL
        nursery.pid = None
        reader = Store(tmp_path)
        check_wide(reader, range(max(nursery.told, default=0)))
        # What was not acknowledged is right or absent.
        num_rows = reader.spaces()[NAME].num_texts if reader.spaces() else 0
        np.testing.assert_array_equal(
            reader.read(WIDE, np.arange(num_rows)), vectors_of(numbered(*range(num_rows)), 512)
        )
        first = generator.randrange(max(0, num_rows - 300), num_rows + 1)
    assert nursery.close() == ""
    assert max(nursery.told) >= 200
    num_texts, damaged = Store(tmp_path).verify(NAME)
    assert (num_texts, damaged.tolist()) == (num_rows, [])


def test_two_writers_and_a_reader_at_once(tmp_path):
    """The writers want mostly the same texts: each is computed once; the reader sees more and more, all of it right."""
    nurseries = [Nursery(tmp_path) for _ in range(2)]
    reader, seen = Store(tmp_path), [0]
    for nursery, first in zip(nurseries, (0, 250), strict=True):
        nursery.write(first=first, last=3000, step=100, slice_texts=50)
    deadline = time.monotonic() + 60
    while seen[-1] < 3000:
        assert time.monotonic() < deadline
        rows = reader.find(WIDE, numbered(*range(3000)))
        there = np.flatnonzero(rows >= 0)
        np.testing.assert_array_equal(reader.read(WIDE, rows[there]), vectors_of(numbered(*there), 512))
        seen.append(len(there))
    assert seen == sorted(seen)
    for nursery in nurseries:
        assert (nursery.end(), nursery.told[-1]) == (0, 3000)
        notices = nursery.close().splitlines()
        assert len(notices) <= 1
        assert all(names(notice, tmp_path, "process") for notice in notices)
    assert sum(nursery.computed for nursery in nurseries) == 3000
    check_wide(Store(tmp_path), range(3000))
    num_texts, damaged = Store(tmp_path).verify(NAME)
    assert (num_texts, damaged.tolist()) == (3000, [])


def test_a_second_process_waits_for_its_turn_and_says_so_once(tmp_path):
    nursery = Nursery(tmp_path)
    with locked(tmp_path / f"{NAME}.lock", wait=never):
        nursery.write(first=0, last=90, step=90, slice_texts=30)
        line = nursery.process.stderr.readline()
        assert names(line, tmp_path, os.getpid())
        assert Store(tmp_path).find(WIDE, ["t0"]).tolist() == [-1]  # readers do not wait
    assert (nursery.end(), nursery.told, nursery.close()) == (0, [90], "")
    check_wide(Store(tmp_path), range(90))


@pytest.mark.parametrize("action", [lambda s: s.verify(NAME, repair=True), lambda s: s.prune(NAME)])
def test_repair_and_prune_wait_for_a_writer(filled, action):
    done = threading.Event()
    with contextlib.closing(sqlite3.connect(filled / "store.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        thread = threading.Thread(target=lambda: (action(Store(filled)), done.set()))
        thread.start()
        assert not done.wait(0.1)
        assert list(Store(filled).spaces()) == [NAME]
        database.execute("COMMIT")
    thread.join()
    assert done.is_set()


def test_a_database_that_stays_busy(filled):
    with contextlib.closing(sqlite3.connect(filled / "store.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        with pytest.raises(ValueError, match=naming(filled / "store.sqlite", "locked")):
            Store(filled, timeout_seconds=0.01).fill(SPACE, numbered(50), vectors_of)


def test_a_turn_can_be_taken_again(filled):
    store_ = Store(filled)
    with store_.turn(SPACE), store_.turn(SPACE):
        store_.fill(SPACE, numbered(50), vectors_of)
    with locked(filled / f"{NAME}.lock"):  # it was given back
        pass


def test_without_turns_the_first_to_compute_a_text_stores_it(filled):
    """While one computes t20 to t22, another that waits for no turn stores t21, t22 and t23: each text has one row."""
    mine, other = Store(filled), Store(filled)
    mine.takes_turns = other.takes_turns = False
    texts = numbered(20, 21, 22)

    def compute(missing):
        other.fill(SPACE, numbered(21, 22, 23), vectors_of)
        return vectors_of(missing)

    for _ in range(2):  # what another stored meanwhile, and then nothing, is new
        np.testing.assert_array_equal(encode(mine, SPACE, texts, compute), vectors_of(texts))
    assert mine.spaces()[NAME].num_texts == 10 + 4
    everything = numbered(*range(10), *range(20, 24))
    assert sorted(mine.find(SPACE, everything).tolist()) == list(range(14))
    np.testing.assert_array_equal(encode(Store(filled), SPACE, everything), vectors_of(everything))
    texts = numbered(30, 31)

    def all_taken(missing):
        other.fill(SPACE, missing, vectors_of)
        return vectors_of(missing)

    np.testing.assert_array_equal(encode(mine, SPACE, texts, all_taken), vectors_of(texts))
    other.fill(SPACE, numbered(32), vectors_of)
    assert mine.verify(NAME)[0] == 17
    np.testing.assert_array_equal(encode(mine, SPACE, numbered(30, 32)), vectors_of(numbered(30, 32)))


# Damage.


def damage_vector(folder, row, column=0):
    with open(vectors_file(folder), "r+b") as file:
        file.seek(row * 16 + column * 4)
        file.write(b"\x01\x02\x03\x04")


def test_a_damaged_row_is_never_returned(filled, capsys):
    store_ = Store(filled)
    assert encode(store_, SPACE, numbered(4)).shape == (1, 4)
    damage_vector(filled, 4, column=3)
    damage_vector(filled, 6)
    for reader in (store_, Store(filled)):
        with pytest.raises(ValueError, match=naming(vectors_file(filled), 6, "damaged", 2, 3, f"{filled} --verify")):
            encode(reader, SPACE, numbered(6, 5, 4))
        np.testing.assert_array_equal(encode(reader, SPACE, numbered(5, 7)), vectors_of(numbered(5, 7)))
    num_texts, damaged = store_.verify(NAME)
    assert (num_texts, damaged.tolist()) == (10, [4, 6])

    assert main(["store", str(filled), "--verify"]) == 1
    assert main(["store", str(filled), "--repair"]) == 0
    assert main(["store", str(filled), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"\d+", line.partition(": ")[2]) for line in lines] == [
        ["2", "10", "4", "6"],
        ["2", "10", "4", "6"],
        ["8"],
    ]
    # Computed again, behind the others, whose rows stay the same; in a reader that had it open as well.
    for reader in (store_, Store(filled)):
        assert reader.find(SPACE, numbered(3, 4, 5)).tolist() == [3, -1, 5]
    compute, texts = Compute(), numbered(*range(10))
    np.testing.assert_array_equal(encode(store_, SPACE, texts, compute), vectors_of(texts))
    assert compute.calls == [numbered(4, 6)]
    assert store_.find(SPACE, numbered(4, 6, 9)).tolist() == [10, 11, 9]
    assert store_.spaces()[NAME].num_texts == 10
    assert store_.verify(NAME)[1].tolist() == []
    # A dropped row cannot be read by its number either.
    with pytest.raises(ValueError, match=naming(vectors_file(filled), 4, "damaged", 1)):
        store_.read(SPACE, np.array([4]))


@pytest.mark.parametrize("size", [0, 16, 159, None])
def test_keys_without_vectors_are_an_error(filled, size):
    path = vectors_file(filled)
    opened = Store(filled)
    opened.fill(SPACE, numbered(1), never)
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    size = size or 0
    facts = (path, size, 160, 10, f"{filled} --verify")
    for store_ in (opened, Store(filled)):  # one that had the file mapped must not die of reading beyond its end
        for call in (lambda s=store_: s.find(SPACE, ["t0"]), lambda s=store_: s.fill(SPACE, ["t50"], never)):
            with pytest.raises(ValueError, match=naming(*facts)):
                call()
    whole = size // 16
    assert store_.verify(NAME)[1].tolist() == list(range(whole, 10))
    assert store_.verify(NAME, repair=True)[0] == 10
    assert store_.verify(NAME)[0] == whole
    texts, compute = numbered(*range(10)), Compute()
    np.testing.assert_array_equal(encode(store_, SPACE, texts, compute), vectors_of(texts))
    assert sum(map(len, compute.calls)) == 10 - whole


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_database_is_one_line(filled, capsys, content):
    (filled / "store.sqlite").write_bytes(content)
    with pytest.raises(ValueError, match=naming(filled / "store.sqlite", "damaged", f"{filled} --repair")) as caught:
        Store(filled).fill(SPACE, numbered(1), never)
    assert "\n" not in str(caught.value)
    for option in ([], ["--verify"], ["--prune", NAME]):
        assert main(["store", str(filled), *option]) == 2
        assert str(caught.value) in capsys.readouterr().err
    assert main(["store", str(filled), "--repair"]) == 0
    (aside,) = filled.glob("store.sqlite.damaged-*")
    (line,) = capsys.readouterr().err.splitlines()
    assert names(line, filled / "store.sqlite", "damaged", aside)
    assert aside.read_bytes() == content
    texts, compute = numbered(1, 2), Compute()
    np.testing.assert_array_equal(encode(Store(filled), SPACE, texts, compute), vectors_of(texts))
    assert compute.calls == [texts]


def test_a_fault_in_a_database_that_can_be_read(filled, capsys):
    path = filled / "store.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'batches' AND type = 'index'"
        ).fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = bytes(size)
    path.write_bytes(content)
    assert main(["store", str(filled), "--verify"]) == 2
    assert names(capsys.readouterr().err, path, "damaged", f"{filled} --repair")
    assert main(["store", str(filled), "--repair"]) == 0
    assert Store(filled).spaces() == {}


def test_a_locked_database_is_not_damaged(filled):
    store_ = Store(filled, timeout_seconds=0.01)
    actions = [store_.spaces, store_.check_database, lambda: store_.verify(NAME), copy.copy(store_).spaces]
    with contextlib.closing(sqlite3.connect(filled / "store.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        for action in actions:
            with pytest.raises(ValueError, match=naming(filled / "store.sqlite", "locked")) as caught:
                action()
            assert not names(str(caught.value), "damaged")


def test_the_command_checks_the_database_once(filled, monkeypatch):
    Store(filled).fill(OTHER, numbered(1), vectors_of)
    statements, connect = [], sqlite3.connect

    def traced(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    assert main(["store", str(filled), "--verify"]) == 0
    assert sum("quick_check" in statement for statement in statements) == 1


def test_a_store_of_another_version_is_refused(filled):
    (filled / NAME).mkdir()
    (filled / NAME / "space.json").write_text('{"version": 1}')  # before SQLite: a folder per space
    with pytest.raises(ValueError, match=naming(filled, "version", 1, "API")):
        Store(filled)
    (filled / NAME / "space.json").unlink()
    execute(filled, "PRAGMA user_version = 3")
    with pytest.raises(ValueError, match=naming("store.sqlite", "version", 3, ..., 2)):
        Store(filled).spaces()


# Removing.


def test_prune_under_readers_and_writers(filled):
    reader, writer = Store(filled), Store(filled)
    rows = reader.find(SPACE, numbered(2, 5))
    writer.find(SPACE, ["t0"])
    (filled / f"{'0' * 16}.7.f32").touch()  # what a killed process left
    Store(filled).prune(NAME)
    assert sorted(os.listdir(filled)) == [f"{NAME}.lock", "store.sqlite"]
    np.testing.assert_array_equal(reader.read(SPACE, rows), vectors_of(numbered(2, 5)))
    assert reader.find(SPACE, numbered(2)).tolist() == [-1]
    # Started again, with other rows: what was known of the old ones is gone.
    writer.fill(SPACE, numbered(5, 2, 7), vectors_of)
    assert reader.find(SPACE, numbered(2, 5, 0)).tolist() == [1, 0, -1]
    np.testing.assert_array_equal(encode(reader, SPACE, numbered(7, 5)), vectors_of(numbered(7, 5)))


def test_a_space_started_again_is_never_mixed_with_the_old_one(filled):
    """As many rows as before, of other texts."""
    reader = Store(filled)
    assert reader.find(SPACE, numbered(3)).tolist() == [3]
    other = Store(filled)
    other.prune(NAME)
    other.fill(SPACE, numbered(*range(100, 110)), vectors_of)
    assert reader.find(SPACE, numbered(3, 103)).tolist() == [-1, 3]
    np.testing.assert_array_equal(encode(reader, SPACE, numbered(103)), vectors_of(numbered(103)))


def test_removed_while_others_are_computed(filled):
    store_ = Store(filled)

    def compute(texts):
        Store(filled).prune(NAME)
        return vectors_of(texts)

    with pytest.raises(ValueError, match=naming(filled, NAME, "removed")):
        store_.fill(SPACE, numbered(3, 30), compute)
    assert store_.find(SPACE, numbered(3, 30)).tolist() == [-1, 0]


def test_last_use_is_noted_once_a_minute(filled):
    store_ = Store(filled)
    for age, noted in ((30, False), (90, True)):
        used = time.time() - age
        execute(filled, "UPDATE spaces SET last_used = ?", used)
        store_.find(SPACE, ["t1"])
        assert store_.spaces()[NAME].last_used == pytest.approx(used)
        store_.fill(SPACE, ["t1"], never)
        assert (store_.spaces()[NAME].last_used > time.time() - 10) == noted


def test_a_space_that_is_being_filled_is_in_use(filled):
    """However long ago filling began: each slice updates the time, so that nobody takes the space for abandoned."""
    store_, ages = Store(filled), []

    def compute(texts):
        ages.append(time.time() - store_.spaces()[NAME].last_used)
        execute(filled, "UPDATE spaces SET last_used = 0")  # this slice takes long
        return vectors_of(texts)

    store_.fill(SPACE, numbered(*range(10, 14)), compute, slice_texts=1)
    assert len(ages) == 4
    assert max(ages) < 60


def test_unused_spaces(filled, capsys):
    store_ = Store(filled)
    store_.fill(OTHER, ["t1"], vectors_of)
    execute(filled, "UPDATE spaces SET last_used = ? WHERE dim = 4 AND fingerprint = ?", time.time() - 3 * 86_400,
            SPACE.fingerprint)  # fmt: skip
    assert main(["store", str(filled), "--prune-unused", "4"]) == 0
    assert list(store_.spaces()) == [NAME, OTHER.name]
    assert main(["store", str(filled), "--prune-unused", "2.5"]) == 0
    assert list(store_.spaces()) == [OTHER.name]
    assert main(["store", str(filled), "--prune-unused", "-1"]) == 2
    assert names(capsys.readouterr().err, "--prune-unused", -1.0, 0)


# The commands.


def test_the_command_lists(filled, capsys):
    words = {"model": "m", "role": "query", "max_length": 7, "prompt": "q: "}
    Store(filled).fill(Space("cd" * 32, 2, words), ["a"], lambda texts: np.ones((1, 2)))
    execute(filled, "UPDATE spaces SET last_used = ?", time.mktime((2026, 11, 21, 8, 5, 0, 0, 0, -1)))
    sizes = [found.num_bytes for found in Store(filled).spaces().values()]
    assert sizes == [10 * (16 + 20), 8 + 20]
    assert main(["store", str(filled)]) == 0
    header, first, second, empty, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["space", "texts", "dim", "size", "last", "use", "role", "max_length", "model"]
    assert first.split() == [NAME, "10", "4", *format_bytes(sizes[0]).split(), "2026-11-21", "08:05", "counting"]
    expected = ["cd" * 8, "1", "2", *format_bytes(sizes[1]).split(), "2026-11-21", "08:05", "query", "7", "m"]
    assert second.split() == expected
    assert (empty, total) == ("", f"{filled}: 2 spaces, {format_bytes(Store(filled).num_bytes())}")


def test_the_command_verifies_and_prunes(filled, capsys):
    Store(filled).fill(OTHER, numbered(*range(8)), vectors_of)
    for row in range(7):
        damage_vector(filled, row)
    assert main(["store", str(filled), "--verify"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{NAME}: 7 of 10 ")
    assert first.endswith(": 0, 1, 2, 3, 4, ...")
    assert second.startswith(f"{OTHER.name}: 8 ")
    assert main(["store", str(filled), "--prune", NAME, "nothing"]) == 2
    assert names(capsys.readouterr().err, filled, "'nothing'", NAME, OTHER.name)
    before = Store(filled).num_bytes()
    assert main(["store", str(filled), "--prune", NAME, NAME]) == 0
    assert format_bytes(before - Store(filled).num_bytes()) in capsys.readouterr().out
    assert before > Store(filled).num_bytes()
    assert main(["store", str(filled), "--prune", OTHER.name]) == 0
    assert main(["store", str(filled), "--verify"]) == 0
    assert Store(filled).spaces() == {}
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
    assert (output.out, output.err) == ("", f"store: 0 texts found, 3 computed; {size} on disk\n")  # one twice
    assert main(["encode", "model", "texts.txt", "--store", "store", "--out", "v.npy", "--dim", "8"]) == 0
    output = capsys.readouterr()
    assert output.out == "v.npy: 4 texts x 8 dimensions, float32\n"
    assert output.err.startswith("store: 3 texts found, 0 computed; ")
    expected = make_embedder(place / "model").encode(texts, dim=8)
    np.testing.assert_allclose(np.load("v.npy"), expected, rtol=0, atol=1e-6)

    report = evaluate(make_embedder(place / "model"), make_dataset())
    for computed in (21, 0):  # 12 questions and 9 documents
        assert main(["evaluate", "model", "pairs.json", "--store", "store", "--json", "--no-bm25"]) == 0
        output = capsys.readouterr()
        assert f"{21 - computed} texts found, {computed} computed" in output.err
        assert json.loads(output.out) == report.metrics
    (place / "file").write_text("")
    assert main(["encode", "model", "texts.txt", "--store", "file"]) == 2
    assert names(capsys.readouterr().err, "encode", "file", "folder")


# Embedders.

TEXTS = ["a b c", "", "the revenue", "what order of the world", "a b c", "x" * 30, "7 8 9 hello hello world"]


def test_the_same_vectors_with_and_without(write_tiny, tmp_path):
    """To 1e-6, since other batches round differently; what is read again is the same to the bit."""
    folder = write_tiny(tmp_path / "model", modules=True, settings={"truncate_dim": 8})
    plain, kept = make_embedder(folder), make_embedder(folder, store=tmp_path / "store")
    whole = kept.encode(TEXTS, dim=32)
    np.testing.assert_allclose(whole, plain.encode(TEXTS, dim=32), rtol=0, atol=1e-6)
    assert (kept.store.hits, kept.store.misses) == (0, 6)
    for dim in (1, 8, 31, 32, None):
        found = kept.encode(TEXTS, dim=dim, slice_texts=2)
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
    whole = kept.encode(TEXTS)
    np.testing.assert_allclose(whole, plain.encode(TEXTS), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(kept.encode(TEXTS, dim=5), whole[:, :5])


def test_ninety_of_a_hundred_are_there(tiny_bert, tmp_path, monkeypatch):
    texts = [f"the fee of {number}" for number in range(100)]
    embedder = make_embedder(tiny_bert, store=tmp_path)
    embedder.encode(texts[:90])
    encoded, encode = [], embedder.tokenizer.token_ids
    monkeypatch.setattr(embedder.tokenizer, "token_ids", lambda asked: encoded.extend(asked) or encode(asked))
    found = embedder.encode(texts)
    assert encoded == texts[90:]
    np.testing.assert_allclose(found, make_embedder(tiny_bert).encode(texts), rtol=0, atol=1e-6)


def test_an_embedder_through_a_store_is_left_as_it_was(tiny_bert, tmp_path):
    embedder = make_embedder(tiny_bert, store=tmp_path)
    embedder.train()
    embedder.encode(TEXTS)
    assert all(module.training for module in embedder.modules())
    with pytest.raises(ValueError, match=naming("texts[1]", "int", "str")):
        embedder.encode(["a", 1])
    with pytest.raises(ValueError, match=naming("dim", 33, 1, 32)):
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
