"""Embeddings on disk, found by what they were computed from: a space (model, prompt, length, ...) and a text.

    store = Store("embeddings")
    rows_N = store.fill(space, texts, compute)      # compute(new texts) -> [M, D]
    vectors_ND = store.read(space, rows_N)

store.sqlite: the spaces and, for each batch of rows, the keys of its texts and the CRC-32 of each vector; NAME.ID.f32:
the vectors, rows of dim float32, little-endian. Vectors reach the disk before the transaction that adds their keys,
so a row exists only when it is complete; what a killed process left is overwritten. For one thread at a time.

Shapes: N texts, M of them, R rows of a space, D features.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import locked, read_object
from .rows import RECORD, VECTOR_TYPE, Rows, checksums, read_rows, size_of, text_keys

DATABASE, VERSION, NAME_DIGITS = "store.sqlite", 2, 16
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS spaces (id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL UNIQUE,
    dim INTEGER NOT NULL, description TEXT NOT NULL, last_used REAL NOT NULL, num_repairs INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS batches (space INTEGER NOT NULL, first_row INTEGER NOT NULL, num_texts INTEGER NOT NULL,
    records BLOB NOT NULL, PRIMARY KEY (space, first_row));
PRAGMA user_version = {VERSION};
COMMIT;
"""
ADD_SPACE = """INSERT INTO spaces (fingerprint, dim, description, last_used) VALUES (?, ?, ?, ?)
    ON CONFLICT (fingerprint) DO UPDATE SET last_used = excluded.last_used"""
LIST_SPACES = """SELECT id, fingerprint, dim, description, last_used, coalesce(sum(num_texts), 0),
    coalesce(sum(length(records)), 0) FROM spaces LEFT JOIN batches ON space = id GROUP BY id"""
# A row of keys.bin of version 1: the checksum covers the key and the vector.
OLD_RECORD = np.dtype([("key", "<u8", 3), ("checksum", "<u4")])


class Space(NamedTuple):
    """Everything a vector depends on besides its text."""

    fingerprint: str  # SHA-256 over all of it, 64 hexadecimal digits
    dim: int
    description: dict[str, Any]  # the same for people to read, as JSON-compatible values: model, role, prompt, ...

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
    """A folder of embeddings, created if missing; one of version 1 is converted.

    `hits` and `misses` count the texts this object was asked for: those found (or asked for twice), those computed.
    `timeout_seconds`: how long to wait while another process writes to the database.
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
        if any(self.folder.glob("*/space.json")):
            with locked(self.folder / "lock", wait=self._say_waiting):
                for path in self.folder.glob("*/space.json"):
                    self._convert(path)

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

        Processes that fill the same space take turns, a slice of `slice_texts` each, so `compute` (M texts -> [M, D])
        is called once with each missing text. A kill loses one slice. Raises `ValueError` for a text that is not valid
        UTF-8, vectors of the wrong shape or not finite (naming the row of `texts`), damaged files.
        """
        keys_N2, misses = text_keys(texts), self.misses
        opened = self._look(space)
        found_N, missing = opened.find(keys_N2), {}
        for row in np.flatnonzero(found_N < 0).tolist():
            missing.setdefault(texts[row], row)
        first_rows = np.array(list(missing.values()), dtype=np.int64)
        for start in range(0, len(missing), slice_texts):
            with self.turn(space):
                rows = first_rows[start : start + slice_texts]
                rows = rows[self._look(space).find(keys_N2[rows]) < 0]  # another process may have added some
                if len(rows):
                    vectors_MD = _checked(compute([texts[row] for row in rows.tolist()]), space.dim, rows)
                    self._append(space, keys_N2[rows], vectors_MD)
            self.misses += len(rows)
        self.hits += len(texts) - (self.misses - misses)
        if missing:
            found_N = self._look(space).find(keys_N2)
            if (found_N < 0).any():
                raise ValueError(f"{self.folder}: another process removed texts of {space.name} while it was filled")
        elif opened.version and time.time() - opened.last_used > 60:
            with contextlib.suppress(ValueError), self._transaction(write=True) as database:  # unless it is read-only
                database.execute("UPDATE spaces SET last_used = ? WHERE id = ?", (time.time(), opened.version[0]))
        return found_N

    def read(self, space: Space, rows: np.ndarray) -> np.ndarray:
        """Vectors of the rows that `find` or `fill` returned, [len(rows), D] float32. Raises for damage."""
        opened, rows = self._opened.get(space.fingerprint) or self._look(space), np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(opened):
            raise ValueError(f"{self.folder}: rows are {rows.min()} to {rows.max()}, expected 0 to {len(opened) - 1}")
        return opened.read(rows)

    def find(self, space: Space, texts: Sequence[str]) -> np.ndarray:
        """The row of each text, [N] int64, -1 where it is not stored. Sees what other processes have added."""
        return self._look(space).find(text_keys(texts))

    @contextlib.contextmanager
    def turn(self, space: Space) -> Iterator[None]:
        """Held while vectors of a space are computed or paid for: others wait, then look again. Re-entrant."""
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

    def _look(self, space: Space) -> Rows:
        """The rows of a space as they are now."""
        with self._transaction() as database:
            return self._rows(space, database)

    def _rows(self, space: Space, database: sqlite3.Connection) -> Rows:
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
        with self._transaction(write=True) as database:
            database.execute(ADD_SPACE, (space.fingerprint, space.dim, json.dumps(space.description), time.time()))
            opened = self._rows(space, database)
            records_M = np.empty(len(keys_M2), RECORD)
            records_M["key"], records_M["checksum"] = keys_M2, checksums(vectors_MD)
            with open(opened.path, "r+b" if opened.path.is_file() else "xb") as file:
                file.truncate(len(opened) * space.dim * VECTOR_TYPE.itemsize)
                file.seek(0, os.SEEK_END)
                file.write(vectors_MD)
                file.flush()
                os.fsync(file.fileno())
            _write_records(database, opened.version[0], len(opened), records_M)

    # Spaces.

    def spaces(self) -> dict[str, StoredSpace]:
        """The spaces by name, in order of their names."""
        with self._transaction() as database:
            rows = database.execute(LIST_SPACES).fetchall()
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

        `repair` also drops these rows, so that their texts are computed again; the others keep their numbers.
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
                is_text_M, vectors_MD = records["key"].any(axis=1), read_rows(path, first_row, len(records), dim)
                wrong_M = is_text_M.copy()
                wrong_M[: len(vectors_MD)] &= checksums(vectors_MD) != records["checksum"][: len(vectors_MD)]
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
        """Removes spaces: all of them or, when a name is unknown, none. A process that fills one starts it again."""
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
                    connection.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks when a space is removed
                    connection.executescript(SCHEMA)
                elif version != VERSION:
                    raise ValueError(f"{path}: version is {version}, expected {VERSION}: a newer embedft wrote it")
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                with connection:  # commits, or rolls back after an error
                    yield connection
        except sqlite3.Error as error:
            raise ValueError(f"{path}: {error}") from None

    def _convert(self, path: Path) -> None:
        """Takes over what is whole of a space of version 1, a folder with space.json, vectors.f32 and keys.bin."""
        values = read_object(path)
        if values.get("version") != 1 or not {"fingerprint", "dim", "description"} <= values.keys():
            raise ValueError(f"{path}: not what embedft writes; delete {path.parent}")
        space = Space(values["fingerprint"], values["dim"], values["description"])
        old = np.fromfile(path.with_name("keys.bin"), OLD_RECORD)
        vectors_RD = read_rows(path.with_name("vectors.f32"), 0, len(old), space.dim)
        rows = zip(old, vectors_RD, strict=False)  # a killed process may have left vectors without keys
        found = [zlib.crc32(record["key"].tobytes() + row.tobytes()) == record["checksum"] for record, row in rows]
        whole = np.flatnonzero(found)
        if not len(self._look(space)):  # otherwise a process was killed before it removed the folder
            self._append(space, old["key"][whole, :2], vectors_RD[whole])
        shutil.rmtree(path.parent)


def _checked(vectors: np.ndarray, dim: int, rows: np.ndarray) -> np.ndarray:
    """What `compute` returned for these rows of the texts, ready to be written."""
    vectors = np.asarray(vectors)
    if vectors.shape != (len(rows), dim):
        raise ValueError(f"compute returned shape {vectors.shape} for {len(rows)} texts, expected [N, {dim}]")
    vectors_MD = np.ascontiguousarray(vectors, dtype=VECTOR_TYPE)
    finite_M = np.isfinite(vectors_MD).all(axis=1)
    if not finite_M.all():
        raise ValueError(f"the vector of texts[{rows[finite_M.argmin()]}] has values that are not finite")
    return vectors_MD


def _write_records(database: sqlite3.Connection, space: int, first_row: int, records_M: np.ndarray) -> None:
    num_texts = int(records_M["key"].any(axis=1).sum())
    values = (space, first_row, num_texts, records_M.tobytes())
    database.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", values)
