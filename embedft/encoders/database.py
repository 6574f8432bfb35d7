"""The SQLite database of a store: its tables, its transactions, and what to do about damage.

with transaction(Path("embeddings/store.sqlite"), write=True) as database:
    database.execute("DELETE FROM spaces")
"""

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

DATABASE, VERSION = "store.sqlite", 2
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS spaces (id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL UNIQUE,
    dim INTEGER NOT NULL, description TEXT NOT NULL, last_used REAL NOT NULL, num_repairs INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS batches (space INTEGER NOT NULL, first_row INTEGER NOT NULL, num_texts INTEGER NOT NULL,
    records BLOB NOT NULL, PRIMARY KEY (space, first_row));
PRAGMA user_version = {VERSION};
COMMIT;
"""


class DamagedDatabase(ValueError):
    """A database that SQLite cannot read; the message says how to repair the store."""

    def __init__(self, path: Path, what: object):
        repair = f"`embedft store {path.parent} --repair` sets it aside, so that all its texts are computed again"
        super().__init__(f"{path}: is damaged ({' '.join(str(what).split())}); {repair}")


@contextlib.contextmanager
def transaction(path: Path, *, write: bool = False, timeout_seconds: float = 600.0) -> Iterator[sqlite3.Connection]:
    """A transaction on its own connection: everything is written or, after an error or a kill, nothing.
    Raises SQLite's errors as `ValueError`, and damage as `DamagedDatabase`."""
    try:
        connection = sqlite3.connect(path, timeout=timeout_seconds, isolation_level=None)
        with contextlib.closing(connection) as database, database:  # commits, or rolls back after an error
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if not version:
                database.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks when a space is removed
                database.executescript(SCHEMA)
            elif version != VERSION:
                raise ValueError(f"{path}: version is {version}, expected {VERSION}: a newer embedft wrote it")
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield database
    except sqlite3.Error as error:
        if type(error) is sqlite3.DatabaseError:  # subclasses are for locks, permissions and full disks
            raise DamagedDatabase(path, error) from None
        raise ValueError(f"{path}: {error}") from None


def set_aside(path: Path) -> Path:
    """Renames a damaged database, and its journal if there is one; returns the new name."""
    aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    for suffix in ("-journal", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside
