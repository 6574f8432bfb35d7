"""The files of one space of a store: their format, finding rows by text, appending, checking. Store: store.py.

    space.json     version, fingerprint, dim and description; its time of change is the space's last use
    vectors.f32    rows of dim float32, little-endian, appended
    keys.bin       a record a row: 24 bytes of BLAKE2b of the text, and the CRC-32 of these and the row's bytes

Vectors reach the disk before their records do, and a row is there when both are whole. What a killed process leaves
beyond that is ignored by readers and cut off by the next writer; records without vectors can only be damage. A record
of zeros is of a row that was damaged and forgotten. Here nothing is locked.

    rows = Rows(folder, dim=384)
    rows.refresh()
    rows.vectors[rows.find(text_keys(["a text"]))]

Shapes: N keys looked for, M rows added, R rows of the space, D features.
"""

import os
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..files import read_object

VERSION = 1
SPACE_FILE, VECTORS_FILE, KEYS_FILE = "space.json", "vectors.f32", "keys.bin"
NAME_DIGITS = 16
VECTOR_TYPE = np.dtype("<f4")
RECORD = np.dtype([("key", "<u8", 3), ("checksum", "<u4")])
KEY_BYTES = RECORD["key"].itemsize
# Rows that `verify` reads at a time.
BLOCK_ROWS = 65_536


class Space(NamedTuple):
    """What vectors are of, their texts aside.

    `fingerprint`: SHA-256, as 64 hexadecimal digits, of everything that a vector depends on besides its text. `dim`: D.
    `description`: the same in words (model, role, prompt, max_length, ...), as JSON can hold it; for people alone.
    """

    fingerprint: str
    dim: int
    description: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder in a store."""
        return self.fingerprint[:NAME_DIGITS]


class Verified(NamedTuple):
    """What `verify` found: the number of rows of a space, and those whose bytes are not what was stored, ascending."""

    num_rows: int
    damaged: np.ndarray


class Rows:
    """The rows of a space, as of the last `refresh`: maps of its two files, and where each key is.

    The maps keep their files alive when a space is removed, so a file of the same number on disk is the same file.
    """

    def __init__(self, folder: Path, dim: int):
        self.folder, self.dim = folder, dim
        self._empty()

    def _empty(self) -> None:
        self._file_number = -1
        self.records = np.empty(0, RECORD)
        self.vectors = np.empty((0, self.dim), VECTOR_TYPE)
        # First words of the keys, ascending, and their rows; made when first needed.
        self._words_R = self._order_R = None

    def __len__(self) -> int:
        return len(self.records)

    def refresh(self) -> bool:
        """Maps what has been added. True when the files are not those of the last time."""
        try:
            with open(self.folder / KEYS_FILE, "rb") as file:
                status = os.fstat(file.fileno())
                num_rows = status.st_size // RECORD.itemsize
                records = np.memmap(file, RECORD, "r", shape=(num_rows,)) if num_rows else np.empty(0, RECORD)
        except FileNotFoundError:
            self._empty()
            return True
        # After the keys: a row whose record is there has its vector there.
        vectors = _map_vectors(self.folder, num_rows, self.dim)
        is_new = len(self) == 0 or status.st_ino != self._file_number or num_rows < len(self)
        if is_new:
            self._empty()
        elif num_rows > len(self) and self._words_R is not None:
            self._merge(records["key"][len(self) :, 0])
        self._file_number, self.records, self.vectors = status.st_ino, records, vectors
        return is_new

    def _merge(self, words_M: np.ndarray) -> None:
        order_M = np.argsort(words_M, kind="stable")
        places_M = np.searchsorted(self._words_R, words_M[order_M], side="right")
        self._order_R = np.insert(self._order_R, places_M, order_M + len(self))
        self._words_R = np.insert(self._words_R, places_M, words_M[order_M])

    def append(self, keys_M3: np.ndarray, vectors_MD: np.ndarray) -> None:
        """Adds rows behind those of the last `refresh`, in place of what else is there; both are on disk at the end."""
        records_M = np.empty(len(keys_M3), RECORD)
        records_M["key"], records_M["checksum"] = keys_M3, checksums(keys_M3, vectors_MD)
        _write_behind(self.folder / VECTORS_FILE, len(self) * self.dim * VECTOR_TYPE.itemsize, vectors_MD)
        _write_behind(self.folder / KEYS_FILE, len(self) * RECORD.itemsize, records_M)
        self.refresh()

    def find(self, keys_N3: np.ndarray) -> np.ndarray:
        """The row of each key, [N] int64, the first of equals; -1 where there is none."""
        if self._words_R is None:
            words_R = np.array(self.records["key"][:, 0])
            self._order_R = np.argsort(words_R, kind="stable")
            self._words_R = words_R[self._order_R]
        found_N = np.full(len(keys_N3), -1, dtype=np.int64)
        # Keys in order search in places that are near each other.
        pending_M = np.argsort(keys_N3[:, 0])
        words_M = keys_N3[pending_M, 0]
        place_M = np.searchsorted(self._words_R, words_M, side="left")
        end_M = np.searchsorted(self._words_R, words_M, side="right")
        while True:
            left_M = place_M < end_M
            pending_M, place_M, end_M = pending_M[left_M], place_M[left_M], end_M[left_M]
            if not len(pending_M):
                return found_N
            row_M = self._order_R[place_M]
            same_M = (np.asarray(self.records)["key"][row_M] == keys_N3[pending_M]).all(axis=1)
            found_N[pending_M[same_M]] = row_M[same_M]
            # Others that begin alike.
            pending_M, place_M, end_M = pending_M[~same_M], place_M[~same_M] + 1, end_M[~same_M]


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """24 bytes of BLAKE2b of each text's UTF-8, as [N, 3] little-endian 64-bit words.

    Raises `ValueError` for a str in place of a list, and for a text that is no str or has no UTF-8, naming it.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a str, expected a list of str")
    digests = []
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{row}] is a {type(text).__name__}, expected a str")
        try:
            digests.append(blake2b(text.encode(), digest_size=KEY_BYTES).digest())
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{row}] has a lone surrogate at character {error.start}") from None
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 3)


def checksums(keys_M3: np.ndarray, vectors_MD: np.ndarray) -> np.ndarray:
    """The CRC-32 of each key's 24 bytes followed by its vector's, [M] uint32."""
    keys, vectors = keys_M3.tobytes(), memoryview(np.ascontiguousarray(vectors_MD).reshape(-1).view(np.uint8))
    step = vectors_MD.shape[1] * VECTOR_TYPE.itemsize
    values = (
        zlib.crc32(vectors[row * step : (row + 1) * step], zlib.crc32(keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]))
        for row in range(len(keys_M3))
    )
    return np.fromiter(values, dtype=np.uint32, count=len(keys_M3))


def read_space(folder: Path) -> Space:
    """What space.json says. Raises `ValueError` when it is missing, of another version, or not what was written."""
    path = folder / SPACE_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {SPACE_FILE}, which says what its vectors are of; remove it with --prune")
    values = read_object(path)
    if values.get("version") != VERSION:
        raise ValueError(f"{path}: version is {values.get('version')!r}, expected {VERSION}")
    space = Space(*(values.get(field) for field in Space._fields))
    types = (str, int, dict)
    if not all(map(isinstance, space, types)) or space.name != folder.name or space.dim < 1:
        raise ValueError(f"{path}: says fingerprint {space.fingerprint!r}, dim {space.dim!r}: not what was written")
    return space


def _map_vectors(folder: Path, num_rows: int, dim: int) -> np.ndarray:
    needed, found = num_rows * dim * VECTOR_TYPE.itemsize, _size(folder / VECTORS_FILE)
    if found < needed:
        raise ValueError(
            f"{folder / VECTORS_FILE}: {found:,} bytes, expected at least {needed:,} for the {num_rows:,} rows of"
            f" {KEYS_FILE}; {advice(folder.parent)}"
        )
    if not num_rows:
        return np.empty((0, dim), VECTOR_TYPE)
    return np.memmap(folder / VECTORS_FILE, VECTOR_TYPE, "r", shape=(num_rows, dim))


def verify(folder: Path, dim: int) -> Verified:
    """Reads every row of a space and compares its checksum; a record without its vector is damaged as well."""
    num_records = _size(folder / KEYS_FILE) // RECORD.itemsize
    num_whole = min(num_records, _size(folder / VECTORS_FILE) // (dim * VECTOR_TYPE.itemsize))
    damaged, num_forgotten = [np.arange(num_whole, num_records)], 0
    if num_whole:
        records = np.memmap(folder / KEYS_FILE, RECORD, "r", shape=(num_whole,))
        vectors = _map_vectors(folder, num_whole, dim)
        for start in range(0, num_whole, BLOCK_ROWS):
            block = np.array(records[start : start + BLOCK_ROWS])
            wrong_M = checksums(block["key"], vectors[start : start + BLOCK_ROWS]) != block["checksum"]
            forgotten_M = ~block["key"].any(axis=1) & (block["checksum"] == 0)
            num_forgotten += int(forgotten_M.sum())
            damaged.append(start + np.flatnonzero(wrong_M & ~forgotten_M))
    return Verified(num_records - num_forgotten, np.sort(np.concatenate(damaged)))


def forget(folder: Path, dim: int, rows: np.ndarray) -> None:
    """Makes zeros of the records of rows, which are no text's; those that lack their vectors are cut off."""
    num_whole = _size(folder / VECTORS_FILE) // (dim * VECTOR_TYPE.itemsize)
    if len(rows):
        with open(folder / KEYS_FILE, "r+b") as file:
            for row in rows[rows < num_whole].tolist():
                file.seek(row * RECORD.itemsize)
                file.write(bytes(RECORD.itemsize))
            file.truncate(min(_size(folder / KEYS_FILE), num_whole * RECORD.itemsize))
            _flush(file)


def advice(store: Path) -> str:
    """What to do about damage."""
    return f"see `embedft store {store} --verify`, drop such rows with --repair"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _write_behind(path: Path, place: int, values: np.ndarray) -> None:
    """Makes `values` all that a file holds from `place` on, on disk when this returns."""
    with open(path, "r+b" if path.is_file() else "xb") as file:
        file.truncate(place)
        file.seek(place)
        file.write(values.tobytes())
        _flush(file)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
