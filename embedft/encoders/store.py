"""Embeddings on disk, found by what they are of: a space (model, prompt, length, ...) and a text.

A folder holds any number of spaces, each in a folder named by the first 16 digits of its fingerprint; what is in there:
space_files.py. Any number of processes may read while one writes; a second writer waits.

    store = Store("embeddings")
    vectors_ND = store.encode(embedder.space("document"), texts, compute)     # compute(texts) -> [M, D], of what is new

Not here: what a fingerprint is made of (`Embedder.space`). A `Store` is for one thread.

Shapes: N texts, M of them, R rows of a space, D features.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import locked, write_json
from .space_files import (
    NAME_DIGITS,
    SPACE_FILE,
    VECTOR_TYPE,
    VECTORS_FILE,
    VERSION,
    Rows,
    Space,
    Verified,
    advice,
    checksums,
    forget,
    read_space,
    text_keys,
    verify,
)

LOCK_FILE = "lock"
# Texts computed between two appends: what a kill can lose, and what `encode` holds beside its result.
SLICE_TEXTS = 16_384
# The last use is noted no more often.
USE_SECONDS = 60


class StoredSpace(NamedTuple):
    """A space as it is on disk. `num_rows` counts texts; `last_used` is in seconds since 1970."""

    space: Space
    num_rows: int
    num_bytes: int
    last_used: float


class Store:
    """A folder of embeddings; it is made when missing, and nothing in it is read before it is asked for.

    `hits` and `misses` count texts asked of this object: those that were there (or stood twice), those computed.

    Raises:
        ValueError: `folder` is a file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder}: is a file, expected the folder of a store")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._opened: dict[str, Rows] = {}
        self._said_waiting = False

    def __reduce__(self):
        # Copies and other processes open the folder for themselves; a copy of a map would be the vectors themselves.
        return Store, (self.folder,)

    def encode(
        self,
        space: Space,
        texts: Sequence[str],
        compute: Callable[[list[str]], np.ndarray],
        *,
        slice_texts: int = SLICE_TEXTS,
    ) -> np.ndarray:
        """Vectors of N texts, [N, D] float32, in the order given: `fill`, then `read`."""
        return self.read(space, self.fill(space, texts, compute, slice_texts=slice_texts))

    def fill(
        self,
        space: Space,
        texts: Sequence[str],
        compute: Callable[[list[str]], np.ndarray],
        *,
        slice_texts: int = SLICE_TEXTS,
    ) -> np.ndarray:
        """Computes and stores what is missing, and gives the rows of N texts, [N] int64. Memory: one slice.

        Args:
            compute: M texts -> [M, D], finite; called with each missing text once, in slices of `slice_texts`. A slice
                is on disk before the next one is computed, and the lock is held for that alone.

        Raises:
            ValueError: a text that is no str or cannot be UTF-8, vectors of another shape or not finite (naming the
                row of `texts`), files that are damaged. What was stored before stays.
        """
        keys_N3 = text_keys(texts)
        found_N = self._look(space).find(keys_N3)
        first_rows: dict[str, int] = {}
        for row in np.flatnonzero(found_N < 0).tolist():
            first_rows.setdefault(texts[row], row)
        missing = list(first_rows.values())
        self.hits += len(texts) - len(missing)
        for start in range(0, len(missing), slice_texts):
            rows = missing[start : start + slice_texts]
            self._append(space, keys_N3[rows], _checked(compute([texts[row] for row in rows]), space.dim, rows))
            self.misses += len(rows)
            self._note_use(space)
        if missing:
            found_N = self._look(space).find(keys_N3)
            if (found_N < 0).any():
                raise ValueError(f"{self._path(space)}: texts were removed by another process while others were added")
        self._note_use(space)
        return found_N

    def read(self, space: Space, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows that `rows` or `fill` gave, [len(rows), D] float32, each checked against its CRC-32.

        Raises:
            ValueError: a row that is not there, or whose bytes are not those that were stored.
        """
        opened, rows = self._open(space), np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(opened):
            raise ValueError(
                f"{self._path(space)}: rows {rows.min()} to {rows.max()} were asked for, there are {len(opened):,}"
            )
        vectors_ND, records_N = np.asarray(opened.vectors)[rows], np.asarray(opened.records)[rows]
        damaged_N = checksums(records_N["key"], vectors_ND) != records_N["checksum"]
        if damaged_N.any():
            raise ValueError(
                f"{self._path(space) / VECTORS_FILE}: row {rows[damaged_N.argmax()]} is damaged"
                f" ({damaged_N.sum():,} of {len(rows):,} rows read); {advice(self.folder)}"
            )
        return vectors_ND.astype(np.float32, copy=False)

    def rows(self, space: Space, texts: Sequence[str]) -> np.ndarray:
        """The row of each text, [N] int64, -1 where it is not stored. Sees what other processes have added."""
        return self._look(space).find(text_keys(texts))

    def open(self, space: Space) -> np.ndarray:
        """All rows of a space, [R, D] float32, as a read-only memory map; no checksum is looked at.

        With `rows`, or `fill`, a way to work through a corpus that does not fit in memory: the rows that these gave
        last are all there. Rows that were repaired away are there as well, and no text's.
        """
        return self._open(space).vectors

    # What is in it.

    def asking(self, space: Space) -> AbstractContextManager[None]:
        """Held by whoever pays for vectors of a space, so that no two processes pay for the same; a second one waits.

        It looks again then. Not needed to read, nor for `fill`.
        """
        return locked(
            self.folder / f"{space.name}.asking",
            wait=lambda holder: self._say_waiting(holder, "asking for vectors of the same model"),
        )

    def names(self) -> list[str]:
        """The names of its spaces, in order."""
        pattern = re.compile(rf"[0-9a-f]{{{NAME_DIGITS}}}")
        return sorted(path.name for path in self.folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir())

    def describe(self, name: str) -> StoredSpace:
        """The space of a name. Raises `ValueError` for a name that is not there, or files that are damaged."""
        folder = self._named(name)
        space, last_used = read_space(folder), (folder / SPACE_FILE).stat().st_mtime
        rows = Rows(folder, space.dim)
        rows.refresh()
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        return StoredSpace(space, int(rows.records["key"].any(axis=1).sum()), num_bytes, last_used)

    def unused(self, seconds: float) -> list[str]:
        """The names of the spaces whose last use is longer ago, those that lack their space.json among them."""
        latest = time.time() - seconds
        files = {name: self.folder / name / SPACE_FILE for name in self.names()}
        return [name for name, file in files.items() if not file.is_file() or file.stat().st_mtime < latest]

    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def verify(self, name: str) -> Verified:
        """Reads all of a space. Raises `ValueError` for a name that is not there, or a damaged space.json."""
        folder = self._named(name)
        return verify(folder, read_space(folder).dim)

    def repair(self, name: str) -> Verified:
        """Forgets the rows that `verify` finds; their texts are computed again when asked for.

        Other rows keep their numbers: the record of a forgotten one becomes zeros, which is no text's.
        """
        folder = self._named(name)
        with self._locked():
            dim = read_space(folder).dim
            found = verify(folder, dim)
            forget(folder, dim, found.damaged)
        return found

    def prune(self, *names: str) -> None:
        """Removes spaces, all or, when a name is not there, none.

        A process that has one open reads on; one that writes to it begins it anew.
        """
        folders = [self._named(name) for name in names]
        with self._locked():
            self._sweep()  # what a killed process left: it may have the name that is wanted
            for folder in folders:
                # Out of the way, so that a kill leaves no half of it under its name.
                folder.rename(self.folder / f".{folder.name}.{os.getpid()}.tmp")
            self._sweep()

    def _sweep(self) -> None:
        for gone in self.folder.glob(".*.tmp"):
            shutil.rmtree(gone)

    def _named(self, name: str) -> Path:
        if name not in self.names():
            raise ValueError(f"{self.folder}: no space {name!r}, expected one of {', '.join(self.names()) or '(none)'}")
        return self.folder / name

    # Reading and writing.

    def _path(self, space: Space) -> Path:
        return self.folder / space.name

    def _open(self, space: Space) -> "Rows":
        """The rows as they were last looked at."""
        return self._opened[space.fingerprint] if space.fingerprint in self._opened else self._look(space)

    def _look(self, space: Space) -> "Rows":
        """The rows as they are now."""
        opened = self._opened.get(space.fingerprint)
        if opened is None:
            if not re.fullmatch("[0-9a-f]{64}", space.fingerprint) or space.dim < 1:
                raise ValueError(f"{space!r} is no space: expected a SHA-256 in hexadecimal and a dim of at least 1")
            opened = Rows(self._path(space), space.dim)
        if opened.refresh() and (len(opened) or (self._path(space) / SPACE_FILE).exists()):
            found = read_space(self._path(space))
            if (found.fingerprint, found.dim) != (space.fingerprint, space.dim):
                raise ValueError(
                    f"{self._path(space) / SPACE_FILE}: is of fingerprint {found.fingerprint} and dim {found.dim},"
                    f" expected {space.fingerprint} and {space.dim}"
                )
        self._opened[space.fingerprint] = opened
        return opened

    def _append(self, space: Space, keys_M3: np.ndarray, vectors_MD: np.ndarray) -> None:
        path = self._path(space) / SPACE_FILE
        with self._locked():
            opened = self._look(space)
            # Another process may have added them since.
            new_M = opened.find(keys_M3) < 0
            if new_M.any():
                if not path.is_file():
                    self._begin(space)
                opened.append(keys_M3[new_M], vectors_MD[new_M])

    def _begin(self, space: Space) -> None:
        """Writes space.json. A new folder is there only with it: others look without a lock."""
        folder = self._path(space)
        new = folder if folder.exists() else self.folder / f".{folder.name}.{os.getpid()}.tmp"
        write_json(new / SPACE_FILE, {"version": VERSION, **space._asdict()})
        new.rename(folder)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.folder / LOCK_FILE, wait=self._say_waiting)

    def _say_waiting(self, holder: str, doing: str = "writing") -> None:
        if not self._said_waiting:
            print(f"{self.folder}: waiting for {holder}, which is {doing}", file=sys.stderr)
        self._said_waiting = True

    def _note_use(self, space: Space) -> None:
        # What may only be read, or was just removed, is no error.
        with suppress(OSError):
            path = self._path(space) / SPACE_FILE
            if time.time() - path.stat().st_mtime > USE_SECONDS:
                os.utime(path)


def _checked(vectors: np.ndarray, dim: int, rows: Sequence[int]) -> np.ndarray:
    """What `compute` gave for `rows` of the texts, ready to be written."""
    vectors = np.asarray(vectors)
    if vectors.shape != (len(rows), dim):
        raise ValueError(f"{len(rows)} texts were computed as an array of shape {vectors.shape}, expected [N, {dim}]")
    vectors_MD = np.ascontiguousarray(vectors, dtype=VECTOR_TYPE)
    finite_M = np.isfinite(vectors_MD).all(axis=1)
    if not finite_M.all():
        raise ValueError(f"the vector of texts[{rows[finite_M.argmin()]}] has values that are not finite: not stored")
    return vectors_MD
