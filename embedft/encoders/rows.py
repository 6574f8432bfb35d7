"""The rows of one space of a store: keys of texts, checksums, and the file of vectors. Store: store.py.

Shapes: N keys looked for, M rows added, R rows of the space, D features.
"""

import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .tokenization import check_texts

VECTOR_TYPE = np.dtype("<f4")
RECORD = np.dtype([("key", "<u8", 2), ("checksum", "<u4")])  # of one row; all zeros: it was dropped as damaged
ROW_BITS = np.uint64(2**32 - 1)


class Rows:
    """The rows of a space as last read from the database: where each key is, and the mapped vectors."""

    def __init__(self, path: Path, dim: int, version: tuple[int, int] | None):
        self.path, self.dim, self.version = path, dim, version  # version: (id, num_repairs); None: not on disk
        self.last_used, self.vectors = 0.0, np.empty((0, dim), VECTOR_TYPE)
        self.second_R, self.checksums_R = np.empty(0, "<u8"), np.empty(0, "<u4")  # second halves of the keys
        self.sorted_R = np.empty(0, "<u8")  # the first 32 bits of each key, then its row, ascending

    def __len__(self) -> int:
        return len(self.checksums_R)

    def add(self, records_M: np.ndarray) -> None:
        """Adds rows, and maps the vectors. Raises `ValueError` when the file has fewer vectors than there are rows."""
        if len(records_M):
            rows_M = np.arange(len(self), len(self) + len(records_M), dtype="<u8")
            self.sorted_R = np.concatenate([self.sorted_R, records_M["key"][:, 0] & ~ROW_BITS | rows_M])
            self.sorted_R.sort()  # 6 times faster than argsort
            self.second_R = np.concatenate([self.second_R, records_M["key"][:, 1]])
            self.checksums_R = np.concatenate([self.checksums_R, records_M["checksum"]])
        needed, found = len(self) * self.dim * VECTOR_TYPE.itemsize, size_of(self.path)
        if found < needed:
            raise self.damage(f"{found:,} bytes, expected at least {needed:,} for {len(self):,} rows")
        if len(self.vectors) < len(self):
            self.vectors = np.memmap(self.path, VECTOR_TYPE, "r", shape=(len(self), self.dim))

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """The row of each key, [N] int64; -1: none."""
        found_N = np.full(len(keys_N2), -1, dtype=np.int64)
        pending_M = np.argsort(keys_N2[:, 0])  # sorted keys search neighbouring places
        place_M = np.searchsorted(self.sorted_R, keys_N2[pending_M, 0] & ~ROW_BITS, side="left")
        end_M = np.searchsorted(self.sorted_R, keys_N2[pending_M, 0] | ROW_BITS, side="right")
        while len(pending_M):
            left_M = place_M < end_M
            pending_M, place_M, end_M = pending_M[left_M], place_M[left_M], end_M[left_M]
            row_M = (self.sorted_R[place_M] & ROW_BITS).astype(np.int64)
            same_M = self.second_R[row_M] == keys_N2[pending_M, 1]
            found_N[pending_M[same_M]] = row_M[same_M]
            # The others share 32 bits with another key.
            pending_M, place_M, end_M = pending_M[~same_M], place_M[~same_M] + 1, end_M[~same_M]
        return found_N

    def read(self, rows_N: np.ndarray) -> np.ndarray:
        """The vectors of rows, [N, D] float32. Raises `ValueError` for bytes that are not those that were stored."""
        vectors_ND = np.asarray(self.vectors)[rows_N]
        damaged_N = checksums(vectors_ND) != self.checksums_R[rows_N]
        if damaged_N.any():
            number = f"{damaged_N.sum():,} of {len(rows_N):,} rows read"
            raise self.damage(f"row {rows_N[damaged_N.argmax()]} is damaged ({number})")
        return vectors_ND.astype(np.float32, copy=False)

    def damage(self, what: str) -> ValueError:
        advice = f"see `embedft store {self.path.parent} --verify`, drop such rows with --repair"
        return ValueError(f"{self.path}: {what}; {advice}")


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """The key of each text, [N, 2] little-endian 64-bit words: 16 bytes of its BLAKE2b. Raises as `check_texts`."""
    # 16 of the 24 that version 1 stored; `Rows` compares 12: two of 10^9 texts share them with a probability of 10^-11.
    digests = (blake2b(text.encode(), digest_size=24).digest()[:16] for text in check_texts(texts))
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def checksums(vectors_MD: np.ndarray) -> np.ndarray:
    """The CRC-32 of each vector's bytes, [M] uint32."""
    content = memoryview(np.ascontiguousarray(vectors_MD).reshape(-1).view(np.uint8))
    step, num_rows = vectors_MD.shape[1] * VECTOR_TYPE.itemsize, len(vectors_MD)
    rows = (content[place : place + step] for place in range(0, num_rows * step, step))
    return np.fromiter(map(zlib.crc32, rows), dtype=np.uint32, count=num_rows)


def read_rows(path: Path, first_row: int, num_rows: int, dim: int) -> np.ndarray:
    """The rows of a file from `first_row` on, [M, D]; fewer than `num_rows` where the file ends."""
    offset = first_row * dim * VECTOR_TYPE.itemsize
    values = np.fromfile(path, VECTOR_TYPE, num_rows * dim, offset=offset) if path.is_file() else np.empty(0)
    return values[: len(values) // dim * dim].reshape(-1, dim)


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0
