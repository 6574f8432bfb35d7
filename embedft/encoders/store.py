"""Embeddings on disk, keyed by what they were computed from: a space (model, prompt, length, ...) and a text.

    store = Store("embeddings")
    rows_N = store.fill(space, texts, compute)      # compute(new texts) -> [M, D]
    vectors_ND = store.read(space, rows_N)

store.sqlite: the spaces and, for each batch of rows, the keys of its texts and the CRC-32 of each vector; NAME.ID.f32:
the vectors, rows of dim float32, little-endian. Vectors reach the disk before the transaction that adds their keys,
so a row exists only when it is complete; what a killed process left is overwritten. Not thread-safe. lists/: what
teachers scored, see retrieval/taught.py.

Shapes: N texts, M of them, R rows of a space, D features.
"""

import contextlib
import json
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import locked, named_errors
from .database import DATABASE, DamagedDatabase, transaction
from .tokenization import check_texts

NAME_DIGITS, LISTS = 16, "lists"
VECTOR_TYPE = np.dtype("<f4")
RECORD = np.dtype([("key", "<u8", 2), ("checksum", "<u4")])  # one row; all zeros: dropped as damaged
ROW_BITS = np.uint64(2**32 - 1)
ADD_SPACE = """INSERT INTO spaces (fingerprint, dim, description, last_used) VALUES (?, ?, ?, ?)
    ON CONFLICT (fingerprint) DO UPDATE SET last_used = excluded.last_used"""
WRITE_BATCH = "INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)"
LIST_SPACES = """SELECT id, fingerprint, dim, description, last_used, coalesce(sum(num_texts), 0),
    coalesce(sum(length(records)), 0) FROM spaces LEFT JOIN batches ON space = id GROUP BY id"""


class Space(NamedTuple):
    """Everything a vector depends on besides its text."""

    fingerprint: str  # SHA-256 over all of it, 64 hexadecimal digits
    dim: int
    description: dict[str, Any]  # the same, human-readable and JSON-compatible: model, role, prompt, ...

    @property
    def name(self) -> str:
        return self.fingerprint[:NAME_DIGITS]


class StoredSpace(NamedTuple):
    """A space on disk: how many texts and bytes, and when it was last used, in seconds since 1970."""

    space: Space
    num_texts: int
    num_bytes: int
    last_used: float


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """The key of each text, [N, 2] little-endian 64-bit words: 16 bytes of its BLAKE2b. Raises like `check_texts`."""
    # `Rows` compares 12 of them: two of 10^9 texts share those with a probability of 10^-11.
    digests = (blake2b(text.encode(), digest_size=24).digest()[:16] for text in check_texts(texts))
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def checksums(vectors_MD: np.ndarray) -> np.ndarray:
    """The CRC-32 of each vector's bytes, [M] uint32."""
    content = memoryview(np.ascontiguousarray(vectors_MD).reshape(-1).view(np.uint8))
    step, num_rows = vectors_MD.shape[1] * VECTOR_TYPE.itemsize, len(vectors_MD)
    rows = (content[place : place + step] for place in range(0, num_rows * step, step))
    return np.fromiter(map(zlib.crc32, rows), dtype=np.uint32, count=num_rows)


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


class Rows:
    """The rows of a space as last read from the database: where each key is, and the memory-mapped vectors."""

    def __init__(self, path: Path, dim: int, version: tuple[int, int] | None):
        self.path, self.dim, self.version = path, dim, version  # version: (id, num_repairs); None: not on disk
        self.last_used, self.vectors, self.records_R = 0.0, np.empty((0, dim), VECTOR_TYPE), np.empty(0, RECORD)
        self.sorted_R = np.empty(0, "<u8")  # the first 32 bits of each key, then its row, ascending
        self.seen_R = np.empty(0, np.int32)  # -1: neither computed nor read by this process yet

    def __len__(self) -> int:
        return len(self.records_R)

    def add(self, records_M: np.ndarray) -> None:
        """Adds rows and memory-maps the vectors. Raises `ValueError` if the file has fewer vectors than rows."""
        if len(records_M):
            rows_M = np.arange(len(self), len(self) + len(records_M), dtype="<u8")
            self.sorted_R = np.concatenate([self.sorted_R, records_M["key"][:, 0] & ~ROW_BITS | rows_M])
            self.sorted_R.sort()  # 6 times faster than argsort
            self.records_R = np.concatenate([self.records_R, records_M])
            self.seen_R = np.concatenate([self.seen_R, np.full(len(records_M), -1, np.int32)])
        needed, found = len(self) * self.dim * VECTOR_TYPE.itemsize, size_of(self.path)
        if found < needed:
            raise self.damage(f"{found:,} bytes, expected at least {needed:,} for {len(self):,} rows")
        if len(self.vectors) < len(self):
            self.vectors = np.memmap(self.path, VECTOR_TYPE, "r", shape=(len(self), self.dim))

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """The row of each key, [N] int64; -1: none."""
        found_N = np.full(len(keys_N2), -1, dtype=np.int64)
        pending_M = np.argsort(keys_N2[:, 0])  # searching for sorted keys is faster
        place_M = np.searchsorted(self.sorted_R, keys_N2[pending_M, 0] & ~ROW_BITS, side="left")
        end_M = np.searchsorted(self.sorted_R, keys_N2[pending_M, 0] | ROW_BITS, side="right")
        while len(pending_M):
            left_M = place_M < end_M
            pending_M, place_M, end_M = pending_M[left_M], place_M[left_M], end_M[left_M]
            row_M = (self.sorted_R[place_M] & ROW_BITS).astype(np.int64)
            same_M = self.records_R["key"][row_M, 1] == keys_N2[pending_M, 1]
            found_N[pending_M[same_M]] = row_M[same_M]
            # The others share 32 bits with another key: look at the next.
            pending_M, place_M, end_M = pending_M[~same_M], place_M[~same_M] + 1, end_M[~same_M]
        return found_N

    def damage(self, what: str) -> ValueError:
        command = f"embedft store {self.path.parent} --verify"
        return ValueError(f"{self.path}: {what}; see `{command}`; --repair drops damaged rows")


class Store:
    """A folder of embeddings, created if missing.
    `misses` counts the texts that this object computed, `hits` the others that it read, each once.
    `timeout_seconds`: how long to wait while another process writes to the database. `takes_turns` can be set to False
    where processes fill a space with texts of their own: they then compute at the same time."""

    def __init__(self, folder: str | Path, *, timeout_seconds: float = 600.0):
        self.folder, self.timeout_seconds = Path(folder), timeout_seconds
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder}: is a file, expected a store's folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._transaction = partial(transaction, self.folder / DATABASE, timeout_seconds=timeout_seconds)
        self.hits, self.misses, self.takes_turns, self._said_waiting = 0, 0, True, False
        self._opened: dict[str, Rows] = {}
        self._turns: set[str] = set()
        if any(self.folder.glob("*/space.json")):
            again = "where its vectors are computed again (an API charges again)"
            raise ValueError(f"{folder}: is a version 1 store; choose another folder, {again}, or use an older embedft")

    def __reduce__(self):
        # Copies and other processes open the folder themselves: copying the memory map would copy all vectors.
        return partial(Store, timeout_seconds=self.timeout_seconds), (self.folder,)

    def fill(
        self, space: Space, texts: Sequence[str], compute: Callable[..., np.ndarray], *, slice_texts: int = 16_384
    ) -> np.ndarray:
        """Computes and stores missing vectors; returns the row of each text, [N] int64.

        Processes that fill the same space take turns, `slice_texts` at a time, so `compute` (M texts -> [M, D]) sees
        each missing text once; without turns, the first to compute a text stores it. A kill loses one slice. Raises
        `ValueError` for a text that is not valid UTF-8, vectors of the wrong shape or not finite (naming the row of
        `texts`), or damaged files."""
        keys_N2 = text_keys(texts)
        opened = self._rows(space)
        found_N = opened.find(keys_N2)
        missing = {texts[row]: row for row in np.flatnonzero(found_N < 0)[::-1].tolist()}  # each text's first row
        first_rows = np.array(sorted(missing.values()), dtype=np.int64)
        for start in range(0, len(missing), slice_texts):
            with self.turn(space) if self.takes_turns else contextlib.nullcontext():
                rows = first_rows[start : start + slice_texts]
                rows = rows[self._rows(space).find(keys_N2[rows]) < 0]  # another process may have added some
                if len(rows):
                    vectors_MD = np.ascontiguousarray(compute([texts[row] for row in rows.tolist()]), VECTOR_TYPE)
                    if vectors_MD.shape != (len(rows), space.dim):
                        raise ValueError(f"compute returned {vectors_MD.shape}, expected {(len(rows), space.dim)}")
                    wrong = rows[~np.isfinite(vectors_MD).all(axis=1)]
                    if len(wrong):
                        raise ValueError(f"the vector of texts[{wrong[0]}] has values that are not finite")
                    self._append(space, keys_N2[rows], vectors_MD)
                    opened = self._rows(space)
                    opened.seen_R[opened.find(keys_N2[rows])] = 0
            self.misses += len(rows)
        if missing:
            found_N = self._rows(space).find(keys_N2)
            if (found_N < 0).any():
                raise ValueError(f"{self.folder}: another process removed texts of {space.name} while it was filled")
        elif opened.version and time.time() - opened.last_used > 60:
            with contextlib.suppress(ValueError), self._transaction(write=True) as database:  # it may be read-only
                database.execute("UPDATE spaces SET last_used = ? WHERE id = ?", (time.time(), opened.version[0]))
        return found_N

    def read(self, space: Space, rows: np.ndarray) -> np.ndarray:
        """Vectors of the rows that `find` or `fill` returned, [len(rows), D] float32. Raises `ValueError` on damage."""
        opened, rows_N = self._opened.get(space.fingerprint) or self._rows(space), np.asarray(rows, dtype=np.int64)
        if rows_N.size and not 0 <= rows_N.min() <= rows_N.max() < len(opened):
            raise ValueError(f"{self.folder}: rows are {min(rows_N)} to {max(rows_N)}, expected 0 to {len(opened) - 1}")
        vectors_ND = np.asarray(opened.vectors)[rows_N]
        damaged = rows_N[checksums(vectors_ND) != opened.records_R["checksum"][rows_N]]
        if len(damaged):
            raise opened.damage(f"row {damaged[0]} is damaged ({len(damaged):,} of {len(rows_N):,} rows read)")
        new_M = rows_N[opened.seen_R[rows_N] < 0]
        opened.seen_R[new_M] = number_M = np.arange(len(new_M))
        self.hits += np.count_nonzero(opened.seen_R[new_M] == number_M)  # of a row that occurs twice, one number stays
        return vectors_ND.astype(np.float32, copy=False)

    def find(self, space: Space, texts: Sequence[str]) -> np.ndarray:
        """The row of each text, [N] int64, -1 where it is not stored. Sees what other processes have added."""
        return self._rows(space).find(text_keys(texts))

    @contextlib.contextmanager
    def turn(self, space: Space) -> Iterator[None]:
        """Held while computing, or paying for, vectors of a space; other processes wait, then look again. Reentrant."""
        if space.name in self._turns:
            yield
            return
        with locked(self.folder / f"{space.name}.lock", wait=self._say_waiting):
            self._turns.add(space.name)
            try:
                yield
            finally:
                self._turns.discard(space.name)

    def _say_waiting(self, holder: str) -> None:
        if not self._said_waiting:
            print(f"{self.folder}: waiting for {holder}, which is computing vectors of the same model", file=sys.stderr)
        self._said_waiting = True

    def _rows(self, space: Space, database: sqlite3.Connection | None = None) -> Rows:
        if database is None:
            with self._transaction() as database:
                return self._rows(space, database)
        sql = "SELECT id, num_repairs, dim, last_used FROM spaces WHERE fingerprint = ?"
        *version, dim, last_used = database.execute(sql, (space.fingerprint,)).fetchone() or (space.dim, 0.0)
        version = tuple(version) or None
        if dim != space.dim:
            raise ValueError(f"{self.folder}: {space.name} has dim {dim}, expected {space.dim}")
        opened = self._opened.get(space.fingerprint)
        if opened is None or opened.version != version:
            opened = Rows(self._path(space.fingerprint, version[0] if version else 0), space.dim, version)
        if version:
            sql = "SELECT records FROM batches WHERE space = ? AND first_row >= ? ORDER BY first_row"
            records = (row[0] for row in database.execute(sql, (version[0], len(opened))))
            opened.add(np.frombuffer(b"".join(records), RECORD))
        opened.last_used = last_used
        self._opened[space.fingerprint] = opened
        return opened

    def _append(self, space: Space, keys_M2: np.ndarray, vectors_MD: np.ndarray) -> None:
        row_bytes, path = space.dim * VECTOR_TYPE.itemsize, None
        try:
            with self._transaction(write=True) as database:
                database.execute(ADD_SPACE, (space.fingerprint, space.dim, json.dumps(space.description), time.time()))
                opened = self._rows(space, database)
                path, is_new_M = opened.path, opened.find(keys_M2) < 0
                keys_M2, vectors_MD = keys_M2[is_new_M], vectors_MD[is_new_M]
                records_M = np.empty(len(keys_M2), RECORD)
                records_M["key"], records_M["checksum"] = keys_M2, checksums(vectors_MD)
                with named_errors(path), open(path, "ab") as file:
                    file.truncate(len(opened) * row_bytes)
                    file.write(vectors_MD)
                    file.flush()
                    os.fsync(file.fileno())
                database.execute(WRITE_BATCH, (opened.version[0], len(opened), len(records_M), records_M.tobytes()))
        except (OSError, ValueError):  # a full disk, mostly: give back the room of vectors without keys
            with contextlib.suppress(OSError, ValueError), self._transaction(write=True) as database:
                kept = self._rows(space, database)
                os.truncate(path or "", len(kept) * row_bytes if path == kept.path else 0)
            raise

    def spaces(self) -> dict[str, StoredSpace]:
        """The spaces by name, in order of their names."""
        with self._transaction() as database:
            rows = database.execute(LIST_SPACES).fetchall()
        found = {}
        for identity, fingerprint, dim, description, last_used, num_texts, num_bytes in rows:
            num_bytes += size_of(self._path(fingerprint, identity))
            space = Space(fingerprint, dim, json.loads(description))
            found[space.name] = StoredSpace(space, num_texts, num_bytes, last_used)
        return dict(sorted(found.items()))

    def num_bytes(self) -> int:
        return sum(map(size_of, self.folder.rglob("*")))

    def check_database(self) -> None:
        """Raises `DamagedDatabase` if SQLite finds a fault in the database."""
        with self._transaction() as database:
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise DamagedDatabase(self.folder / DATABASE, state)

    def verify(self, name: str, *, repair: bool = False) -> tuple[int, np.ndarray]:
        """Reads a whole space; returns its number of texts and the rows whose vectors are damaged, ascending.
        `repair` also drops these rows, so that their texts are computed again; the other rows keep their numbers."""
        with self._transaction(write=repair) as database:
            identity, fingerprint, dim = self._named(database, name)
            path, damaged, num_texts, end = self._path(fingerprint, identity), [], 0, 0
            sql = "SELECT first_row, records FROM batches WHERE space = ? ORDER BY first_row"
            for first_row, content in database.execute(sql, (identity,)).fetchall():
                records = np.frombuffer(content, RECORD).copy()
                offset, num_values = first_row * dim * VECTOR_TYPE.itemsize, len(records) * dim
                values = np.fromfile(path, VECTOR_TYPE, num_values, offset=offset) if path.is_file() else np.empty(0)
                found = checksums(values[: len(values) // dim * dim].reshape(-1, dim))  # fewer if the file is too short
                is_text_M = records["key"].any(axis=1)
                wrong_M = is_text_M.copy()
                wrong_M[: len(found)] &= found != records["checksum"][: len(found)]
                damaged += (first_row + np.flatnonzero(wrong_M)).tolist()
                num_texts, end = num_texts + int(is_text_M.sum()), first_row + len(records)
                if repair and wrong_M.any():
                    records[wrong_M] = 0
                    num_left = int(is_text_M.sum() - wrong_M.sum())
                    database.execute(WRITE_BATCH, (identity, first_row, num_left, records.tobytes()))
            if repair and damaged:
                database.execute("UPDATE spaces SET num_repairs = num_repairs + 1 WHERE id = ?", (identity,))
                path.touch()
                os.truncate(path, max(size_of(path), end * dim * VECTOR_TYPE.itemsize))
        return num_texts, np.array(damaged, dtype=np.int64)

    def prune(self, *names: str) -> None:
        """Removes the named spaces, or none if a name is unknown. A process that is filling one starts it over."""
        with self._transaction(write=True) as database:
            for identity, *_ in [self._named(database, name) for name in dict.fromkeys(names)]:
                database.execute("DELETE FROM batches WHERE space = ?", (identity,))
                database.execute("DELETE FROM spaces WHERE id = ?", (identity,))
        with self._transaction(write=True) as database:  # files of no space, as a killed process leaves them
            known = {self._path(*row) for row in database.execute("SELECT fingerprint, id FROM spaces")}
            for path in set(self.folder.glob("*.f32")) - known:
                path.unlink()

    def _named(self, database: sqlite3.Connection, name: str) -> tuple[int, str, int]:
        rows = {row[1][:NAME_DIGITS]: row for row in database.execute("SELECT id, fingerprint, dim FROM spaces")}
        if name not in rows:
            raise ValueError(f"{self.folder}: no space {name!r}, expected one of {', '.join(sorted(rows)) or '(none)'}")
        return rows[name]

    def _path(self, fingerprint: str, identity: int) -> Path:
        return self.folder / f"{fingerprint[:NAME_DIGITS]}.{identity}.f32"
