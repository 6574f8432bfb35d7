"""The rows of one space of a store: keys of texts, checksums, and the file of vectors. Store: store.py.

    rows = Rows(path, dim=384, version=None)
    rows.add(records)
    rows.find(text_keys(["a text"]))      # [1] int64, -1: none

Shapes: N keys looked for, M rows added, R rows of the space, D features.
"""

import zlib
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .tokenization import check_texts

VECTOR_TYPE = np.dtype("<f4")
RECORD = np.dtype([("key", "<u8", 2), ("checksum", "<u4")])  # of one row; all zeros: it was dropped as damaged
OLD_RECORD = np.dtype([("key", "<u8", 3), ("checksum", "<u4")])  # of version 1; the checksum covers key and vector
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
        rows_M = np.arange(len(self), len(self) + len(records_M), dtype="<u8")
        self.sorted_R = np.concatenate([self.sorted_R, records_M["key"][:, 0] & ~ROW_BITS | rows_M])
        self.sorted_R.sort()  # 6 times faster than argsort
        self.second_R = np.concatenate([self.second_R, records_M["key"][:, 1]])
        self.checksums_R = np.concatenate([self.checksums_R, records_M["checksum"]])

    def map(self) -> None:
        """Maps the vectors. Raises `ValueError` when the file has fewer of them than there are rows."""
        needed, found = len(self) * self.dim * VECTOR_TYPE.itemsize, size_of(self.path)
        if found < needed:
            rows = f"{found:,} bytes, expected at least {needed:,} for {len(self):,} rows"
            raise ValueError(f"{self.path}: {rows}; {advice(self.path.parent)}")
        if len(self.vectors) < len(self):
            self.vectors = np.memmap(self.path, VECTOR_TYPE, "r", shape=(len(self), self.dim))

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """The row of each key, [N] int64; -1: none."""
        found_N = np.full(len(keys_N2), -1, dtype=np.int64)
        pending_M = np.argsort(keys_N2[:, 0])  # sorted keys search neighbouring places
        place_M = np.searchsorted(self.sorted_R, keys_N2[pending_M, 0] & ~ROW_BITS, side="left")
        end_M = np.searchsorted(self.sorted_R, keys_N2[pending_M, 0] | ROW_BITS, side="right")
        while True:
            left_M = place_M < end_M
            pending_M, place_M, end_M = pending_M[left_M], place_M[left_M], end_M[left_M]
            if not len(pending_M):
                return found_N
            row_M = (self.sorted_R[place_M] & ROW_BITS).astype(np.int64)
            same_M = self.second_R[row_M] == keys_N2[pending_M, 1]
            found_N[pending_M[same_M]] = row_M[same_M]
            # The others share 32 bits with another key.
            pending_M, place_M, end_M = pending_M[~same_M], place_M[~same_M] + 1, end_M[~same_M]


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """The key of each text, [N, 2] little-endian 64-bit words: 16 bytes of its BLAKE2b. Raises as `check_texts`."""
    # 16 of the 24 that version 1 stored; `Rows` compares 12: two of 10^9 texts share them with a probability of 10^-11.
    digests = (blake2b(text.encode(), digest_size=24).digest()[:16] for text in check_texts(texts))
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def checksums(vectors_MD: np.ndarray, *starts: Iterator[int]) -> np.ndarray:
    """The CRC-32 of each vector's bytes, [M] uint32; of version 1, continued from `starts`."""
    content = memoryview(np.ascontiguousarray(vectors_MD).reshape(-1).view(np.uint8))
    step, num_rows = vectors_MD.shape[1] * VECTOR_TYPE.itemsize, len(vectors_MD)
    rows = (content[place : place + step] for place in range(0, num_rows * step, step))
    return np.fromiter(map(zlib.crc32, rows, *starts), dtype=np.uint32, count=num_rows)


def wrong_rows(path: Path, first_row: int, checksums_M: np.ndarray, dim: int) -> np.ndarray:
    """Which vectors, from a row of the file on, are missing or do not have these checksums, [M] bool."""
    wrong_M, step = np.ones(len(checksums_M), dtype=bool), dim * VECTOR_TYPE.itemsize
    num_whole = min(len(checksums_M), max(0, size_of(path) // step - first_row))
    if num_whole:
        vectors = np.memmap(path, VECTOR_TYPE, "r", offset=first_row * step, shape=(num_whole, dim))
        wrong_M[:num_whole] = checksums(vectors) != checksums_M[:num_whole]
    return wrong_M


def checked(vectors: np.ndarray, dim: int, rows: np.ndarray) -> np.ndarray:
    """What `compute` returned for these rows of the texts, ready to be written."""
    vectors = np.asarray(vectors)
    if vectors.shape != (len(rows), dim):
        raise ValueError(f"compute returned shape {vectors.shape} for {len(rows)} texts, expected [N, {dim}]")
    vectors_MD = np.ascontiguousarray(vectors, dtype=VECTOR_TYPE)
    finite_M = np.isfinite(vectors_MD).all(axis=1)
    if not finite_M.all():
        raise ValueError(f"the vector of texts[{rows[finite_M.argmin()]}] has values that are not finite")
    return vectors_MD


def convert_records(keys: Path, vectors: Path, dim: int) -> np.ndarray:
    """The records of a space that version 1 wrote, [R]; zeros for its damaged rows."""
    num_rows = min(size_of(keys) // OLD_RECORD.itemsize, size_of(vectors) // (dim * VECTOR_TYPE.itemsize))
    records = np.zeros(num_rows, RECORD)
    if num_rows:
        old, vectors_RD = (
            np.fromfile(keys, OLD_RECORD, num_rows),
            np.memmap(vectors, VECTOR_TYPE, "r", shape=(num_rows, dim)),
        )
        records["key"], records["checksum"] = old["key"][:, :2], checksums(vectors_RD)
        starts = (zlib.crc32(key.tobytes()) for key in old["key"])
        records[checksums(vectors_RD, starts) != old["checksum"]] = 0
    return records


def advice(folder: Path) -> str:
    """What to do about damage, for the end of an error."""
    return f"see `embedft store {folder} --verify`, drop such rows with --repair"


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0
