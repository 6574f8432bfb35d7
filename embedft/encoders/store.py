"""Embeddings on disk, found by what they were computed from: a space (model, prompt, length, ...) and a text.

    store = Store("embeddings")
    rows_N = store.fill(space, texts, compute)      # compute(new texts) -> [M, D]
    vectors_ND = store.read(space, rows_N)

A store is a folder with a SQLite database and one file of vectors per space:

    store.sqlite       the spaces; for each batch of rows, the keys of its texts and the CRC-32 of each vector
    NAME.ID.f32        rows of dim float32, little-endian

Vectors reach the disk before the transaction that adds their keys, so a row exists only when it is complete; whatever
a killed process left behind the last row is overwritten. Not here: what a fingerprint covers (fingerprint.py). A
`Store` is for one thread at a time.

Shapes: N texts, M of them, R rows of a space, D features.
"""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import locked, read_object
from .rows import RECORD, VECTOR_TYPE, Rows, advice, checked, checksums, convert_records, size_of, text_keys, wrong_rows

DATABASE, VERSION, NAME_DIGITS = "store.sqlite", 2, 16
SCHEMA = """
CREATE TABLE spaces (id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL,
    description TEXT NOT NULL, last_used REAL NOT NULL, num_repairs INTEGER NOT NULL DEFAULT 0);
CREATE TABLE batches (space INTEGER NOT NULL, first_row INTEGER NOT NULL, num_texts INTEGER NOT NULL,
    records BLOB NOT NULL, PRIMARY KEY (space, first_row));
"""
ADD_SPACE = """INSERT INTO spaces (fingerprint, dim, description, last_used) VALUES (?, ?, ?, ?)
    ON CONFLICT (fingerprint) DO UPDATE SET last_used = excluded.last_used RETURNING id, dim"""


class Space(NamedTuple):
    """Everything a vector depends on besides its text.

    `fingerprint`: a SHA-256 over all of it, 64 hexadecimal digits. `dim`: D. `description`: the same for people to
    read (model, role, prompt, max_length, ...), as JSON can hold it.
    """

    fingerprint: str
    dim: int
    description: dict[str, Any]

    @property
    def name(self) -> str:
        return self.fingerprint[:NAME_DIGITS]


class StoredSpace(NamedTuple):
    """A space on disk: how many texts and bytes, and when it was last used, in seconds since 1970."""

    space: Space
    num_texts: int
    num_bytes: int
    last_used: float


class Store:
    """A folder of embeddings, created if missing; one of an earlier version is converted when it is first used.

    `hits` and `misses` count the texts this object was asked for: those found (or asked for twice), those computed.
    `timeout_seconds`: how long to wait while another process writes to the database. Raises `ValueError` when the
    folder is a file.
    """

    def __init__(self, folder: str | Path, *, timeout_seconds: float = 600.0):
        self.folder, self.timeout_seconds = Path(folder), timeout_seconds
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder}: is a file, expected the folder of a store")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._opened: dict[str, Rows] = {}
        self._turns: set[str] = set()
        self._said_waiting = False

    def __reduce__(self):
        # Copies and other processes open the folder themselves: a copied map would be all the vectors.
        return Store, (self.folder,)

    def fill(
        self,
        space: Space,
        texts: Sequence[str],
        compute: Callable[[list[str]], np.ndarray],
        *,
        slice_texts: int = 16_384,
    ) -> np.ndarray:
        """Computes and stores what is missing; returns the row of each text, [N] int64.

        Processes that fill the same space take turns, a slice each, so no text is computed twice.

        Args:
            compute: M texts -> [M, D], finite; called once with each missing text.
            slice_texts: texts computed at once: what a kill can lose, and the memory used.

        Raises:
            ValueError: a text that is not a str or not valid UTF-8, vectors of the wrong shape or not finite (naming
                the row of `texts`), damaged files. What was stored before stays.
        """
        keys_N2 = text_keys(texts)
        opened = self._look(space)
        found_N, missing = opened.find(keys_N2), {}
        for row in np.flatnonzero(found_N < 0).tolist():
            missing.setdefault(texts[row], row)
        first_rows, computed = np.array(list(missing.values()), dtype=np.int64), 0
        for start in range(0, len(missing), slice_texts):
            with self.turn(space):
                rows = first_rows[start : start + slice_texts]
                rows = rows[self._look(space).find(keys_N2[rows]) < 0]  # another process may have added some
                if len(rows):
                    vectors_MD = checked(compute([texts[row] for row in rows.tolist()]), space.dim, rows)
                    self._append(space, keys_N2[rows], vectors_MD)
            computed += len(rows)
            self.misses += len(rows)
        self.hits += len(texts) - computed
        if missing:
            found_N = self._look(space).find(keys_N2)
            if (found_N < 0).any():
                raise ValueError(f"{self.folder}: another process removed texts of {space.name} while it was filled")
        elif opened.version and time.time() - opened.last_used > 60:
            with contextlib.suppress(ValueError), self._transaction(write=True) as database:  # unless it is read-only
                database.execute("UPDATE spaces SET last_used = ? WHERE id = ?", (time.time(), opened.version[0]))
        return found_N

    def read(self, space: Space, rows: np.ndarray) -> np.ndarray:
        """Vectors of the rows that `find` or `fill` returned, [len(rows), D] float32, each checked against its CRC-32.

        Raises `ValueError` for a row that does not exist, or whose bytes are not those that were stored.
        """
        opened, rows = self._opened.get(space.fingerprint) or self._look(space), np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(opened):
            raise ValueError(f"{self.folder}: rows are {rows.min()} to {rows.max()}, expected 0 to {len(opened) - 1}")
        vectors_ND = np.asarray(opened.vectors)[rows]
        damaged_N = checksums(vectors_ND) != opened.checksums_R[rows]
        if damaged_N.any():
            which = f"row {rows[damaged_N.argmax()]} is damaged ({damaged_N.sum():,} of {len(rows):,} rows read)"
            raise ValueError(f"{opened.path}: {which}; {advice(self.folder)}")
        return vectors_ND.astype(np.float32, copy=False)

    def find(self, space: Space, texts: Sequence[str]) -> np.ndarray:
        """The row of each text, [N] int64, -1 where it is not stored. Sees what other processes have added."""
        return self._look(space).find(text_keys(texts))

    @contextlib.contextmanager
    def turn(self, space: Space) -> Iterator[None]:
        """Held while vectors of a space are computed (or paid for), so that no two processes do the same work.

        Others wait, then look again; reading needs no turn. Whoever has the turn may take it again.
        """
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
            print(f"{self.folder}: waiting for {holder}, which computes vectors of the same model", file=sys.stderr)
        self._said_waiting = True

    def _look(self, space: Space, database: sqlite3.Connection | None = None) -> Rows:
        """The rows of a space as they are now."""
        if database is None:
            if not re.fullmatch("[0-9a-f]{64}", space.fingerprint) or space.dim < 1:
                raise ValueError(f"{space!r}: expected a SHA-256 in hexadecimal and a dim of at least 1")
            with self._transaction() as database:
                return self._look(space, database)
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
            content = b"".join(row[0] for row in database.execute(sql, (version[0], len(opened))))
            if content:
                opened.add(np.frombuffer(content, RECORD))
            opened.map()
        opened.last_used = last_used
        self._opened[space.fingerprint] = opened
        return opened

    def _append(self, space: Space, keys_M2: np.ndarray, vectors_MD: np.ndarray) -> None:
        with self._transaction(write=True) as database:
            row = (space.fingerprint, space.dim, json.dumps(space.description), time.time())
            database.execute(ADD_SPACE, row).fetchall()
            opened = self._look(space, database)
            records_M = np.empty(len(keys_M2), RECORD)
            records_M["key"], records_M["checksum"] = keys_M2, checksums(vectors_MD)
            with open(opened.path, "r+b" if opened.path.is_file() else "xb") as file:
                place = len(opened) * space.dim * VECTOR_TYPE.itemsize
                file.truncate(place)
                file.seek(place)
                file.write(memoryview(vectors_MD).cast("B"))
                file.flush()
                os.fsync(file.fileno())
            _write_records(database, opened.version[0], len(opened), records_M)

    # Spaces.

    def spaces(self) -> dict[str, StoredSpace]:
        """The spaces by name, in order of their names."""
        sql = """SELECT id, fingerprint, dim, description, last_used, coalesce(sum(num_texts), 0),
            coalesce(sum(length(records)), 0) FROM spaces LEFT JOIN batches ON space = id GROUP BY id"""
        with self._transaction() as database:
            rows = database.execute(sql).fetchall()
        found = {}
        for identity, fingerprint, dim, description, last_used, num_texts, num_bytes in rows:
            space = Space(fingerprint, dim, json.loads(description))
            num_bytes += size_of(self._path(fingerprint, identity))
            found[space.name] = StoredSpace(space, num_texts, num_bytes, last_used)
        return dict(sorted(found.items()))

    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def verify(self, name: str, *, repair: bool = False) -> tuple[int, np.ndarray]:
        """Reads all of a space; returns its number of texts and the rows whose vectors are damaged, ascending.

        `repair` also drops these rows, so that their texts are computed again; the others keep their numbers. Raises
        `ValueError` for an unknown name or a damaged database.
        """
        with self._transaction(write=repair) as database:
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise ValueError(f"{self.folder / DATABASE}: {' '.join(state.split())}")
            identity, fingerprint, dim = self._named(database, name)
            path, damaged, num_texts, end = self._path(fingerprint, identity), [np.empty(0, np.int64)], 0, 0
            sql = "SELECT first_row, records FROM batches WHERE space = ? ORDER BY first_row"
            for first_row, content in database.execute(sql, (identity,)).fetchall():
                records = np.frombuffer(content, RECORD).copy()
                is_text_M = records["key"].any(axis=1)
                wrong_M = is_text_M & wrong_rows(path, first_row, records["checksum"], dim)
                damaged.append(first_row + np.flatnonzero(wrong_M))
                num_texts, end = num_texts + int(is_text_M.sum()), first_row + len(records)
                if repair and wrong_M.any():
                    records[wrong_M] = 0
                    _write_records(database, identity, first_row, records)
            damaged = np.concatenate(damaged)
            if repair and len(damaged):
                database.execute("UPDATE spaces SET num_repairs = num_repairs + 1 WHERE id = ?", (identity,))
                path.touch()
                os.truncate(path, max(size_of(path), end * dim * VECTOR_TYPE.itemsize))
        return num_texts, damaged

    def prune(self, *names: str) -> None:
        """Removes spaces: all of them or, when a name is unknown, none.

        A process that reads one continues; one that fills it starts it again.
        """
        with self._transaction(write=True) as database:
            for identity, *_ in [self._named(database, name) for name in dict.fromkeys(names)]:
                database.execute("DELETE FROM batches WHERE space = ?", (identity,))
                database.execute("DELETE FROM spaces WHERE id = ?", (identity,))
        with self._transaction(write=True) as database:  # files that no space has, of a killed process too
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

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction on a connection of its own: all of it happens or, after an error or a kill, nothing."""
        path = self.folder / DATABASE
        try:
            connection = sqlite3.connect(path, timeout=self.timeout_seconds, isolation_level=None)
            with contextlib.closing(connection):
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if not version:
                    self._create(connection)
                elif version != VERSION:
                    raise ValueError(f"{path}: version is {version}, expected {VERSION}: a newer embedft wrote it")
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                with connection:  # commits, or rolls back after an error
                    yield connection
        except sqlite3.Error as error:
            raise ValueError(f"{path}: {error}") from None

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks when a space is removed
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            if connection.execute("PRAGMA user_version").fetchone()[0]:
                return  # another process was faster
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            old = sorted(path.parent for path in self.folder.glob("[0-9a-f]" * NAME_DIGITS + "/space.json"))
            for folder in old:
                self._convert(connection, folder)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        for folder in old:
            shutil.rmtree(folder)

    def _convert(self, connection: sqlite3.Connection, folder: Path) -> None:
        """Takes over a space of version 1, a folder with space.json, vectors.f32 and keys.bin, after a kill again."""
        values = read_object(folder / "space.json")
        if values.get("version") != 1 or str(values.get("fingerprint"))[:NAME_DIGITS] != folder.name:
            raise ValueError(f"{folder / 'space.json'}: not what embedft writes; delete {folder}")
        used = (folder / "space.json").stat().st_mtime
        row = (values["fingerprint"], values["dim"], json.dumps(values["description"]), used)
        ((identity, dim),) = connection.execute(ADD_SPACE, row).fetchall()
        path = self._path(values["fingerprint"], identity)
        if (folder / "vectors.f32").is_file():
            os.replace(folder / "vectors.f32", path)
        _write_records(connection, identity, 0, convert_records(folder / "keys.bin", path, dim))


def _write_records(database: sqlite3.Connection, space: int, first_row: int, records_M: np.ndarray) -> None:
    num_texts = int(records_M["key"].any(axis=1).sum())
    values = (space, first_row, num_texts, records_M.tobytes())
    database.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", values)
