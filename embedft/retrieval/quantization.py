"""Exhaustive search over shorter vectors: codes of one byte or one bit per dimension, or leading dimensions.

    scores, rows = QuantizedIndex(document_embeddings, "int8").search(query_embeddings, depth=100)
    scores, rows = AdaptiveIndex(document_embeddings, 64).search(query_embeddings, depth=100)

| precision | bytes per vector | score |
|-----------|------------------|-------|
| float32 | 4 D | query . vector |
| int8 | D | query . decoded vector, the ranges taken from the documents |
| binary | ceil(D / 8) | Hamming distance of signs selects 4 x depth documents, query . signs (+1, -1) orders them |

Queries stay float32, and scores never use more precise vectors than those stored. For product quantization see FAISS.

Source: Shakir et al. 2024, "Binary and Scalar Embedding Quantization"; Yamada et al. 2021, section 3 (rescored binary);
Kusupati et al. 2022, section 4.3.1 (adaptive). Shapes: Q queries, N documents, D dimensions, B = ceil(D / 8) bytes.
"""

from collections.abc import Callable

import numpy as np

from ..vectors import unit_rows
from .index import SLICE_DOCUMENTS, Found, Index, checked_embeddings, first_of, search_exact, slices_of

PRECISIONS = ("float32", "int8", "binary")
SHORTLIST_FACTOR = 4  # shortlisted documents per result


def bytes_per_vector(dim: int, precision: str) -> int:
    """See the table above."""
    return {"float32": 4 * dim, "int8": dim, "binary": -(-dim // 8)}[precision]


def calibrate(embeddings_ND: np.ndarray, *, num_documents: int = 100_000) -> np.ndarray:
    """Smallest and largest value of each dimension, [2, D] float32, over at most `num_documents` drawn at random."""
    if len(embeddings_ND) > num_documents:
        rng = np.random.default_rng(0)
        embeddings_ND = embeddings_ND[np.sort(rng.choice(len(embeddings_ND), num_documents, replace=False))]
    ends = [(part.min(axis=0), part.max(axis=0)) for _, part in slices_of(embeddings_ND, embeddings_ND.shape[1])]
    smallest, largest = (np.stack(values) for values in zip(*ends, strict=True))
    return np.stack([smallest.min(axis=0), largest.max(axis=0)])


def to_int8(embeddings_ND: np.ndarray, ranges_2D: np.ndarray) -> np.ndarray:
    """floor((x - smallest) / step) - 128, clipped to [-128, 127], with step = (largest - smallest) / 255, or 1 if that
    is 0. Source: sentence-transformers, `quantize_embeddings`, "int8"."""
    smallest_D, step_D = _scale(ranges_2D)
    return (np.clip(np.floor((embeddings_ND - smallest_D) / step_D), 0, 255) - 128).astype(np.int8)


def from_int8(codes_ND: np.ndarray, ranges_2D: np.ndarray) -> np.ndarray:
    """smallest + (code + 128 + 1/2) step, [N, D] float32: the middle of the interval, exact if it is empty."""
    smallest_D, step_D = _scale(ranges_2D)
    half_D = np.where(ranges_2D[0] == ranges_2D[1], np.float32(0), step_D / 2)
    return codes_ND * step_D + (smallest_D + 128 * step_D + half_D)


def _scale(ranges_2D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    smallest_D, largest_D = ranges_2D.astype(np.float32, copy=False)
    step_D = (largest_D - smallest_D) / np.float32(255)
    return smallest_D, np.where(step_D == 0, np.float32(1), step_D)


def to_binary(embeddings_ND: np.ndarray) -> np.ndarray:
    """A bit per dimension, 1 if above 0, highest bit first, [N, B] uint8; sentence-transformers' "ubinary"."""
    return np.packbits(embeddings_ND > 0, axis=-1)


def from_binary(codes_NB: np.ndarray, dim: int) -> np.ndarray:
    """+1 and -1 for the bits, [N, D] float32."""
    return np.unpackbits(codes_NB, axis=-1, count=dim).astype(np.float32) * 2 - 1


class QuantizedIndex(Index):
    """Search over the int8 or binary codes of an array or memory map of any float type, see above."""

    def __init__(self, embeddings_ND: np.ndarray, precision: str, *, slice_documents: int = SLICE_DOCUMENTS):
        super().__init__(embeddings_ND)
        self.slice_documents = slice_documents
        self.ranges = calibrate(embeddings_ND) if precision == "int8" else None
        codes_type = np.uint8 if self.ranges is None else np.int8
        self.codes = np.empty((self.num_documents, bytes_per_vector(self.dim, precision)), codes_type)
        for first, part in slices_of(embeddings_ND, self.dim, slice_documents=slice_documents):
            codes = to_binary(part) if self.ranges is None else to_int8(part, self.ranges)
            self.codes[first : first + len(part)] = codes

    def vectors(self, rows: np.ndarray | slice) -> np.ndarray:
        """The decoded vectors of some rows, float32."""
        codes = self.codes[rows]
        return from_binary(codes, self.dim) if self.ranges is None else from_int8(codes, self.ranges)

    def decode(self) -> np.ndarray:
        """All decoded vectors, [N, D] float32."""
        decoded_ND = np.empty((len(self), self.dim), dtype=np.float32)
        for part in self._slices():
            decoded_ND[part] = self.vectors(part)
        return decoded_ND

    def _slices(self) -> list[slice]:
        return [slice(start, start + self.slice_documents) for start in range(0, len(self), self.slice_documents)]

    def _search(self, queries_QD: np.ndarray, depth: int) -> Found:
        if self.ranges is not None:
            return search_exact(queries_QD, map(self.vectors, self._slices()), depth)
        shortlist = self.search_hamming(queries_QD, SHORTLIST_FACTOR * depth)
        return search_shortlist(queries_QD, shortlist.rows, self.vectors, min(depth, len(self)))

    def search_hamming(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The first `depth` documents by the Hamming distance of signs, whose negative is the score."""
        import faiss

        # FAISS's heap ("hc") keeps the lowest rows among equal distances; its counting sort does not.
        distances, rows = faiss.knn_hamming(to_binary(queries_QD), self.codes, min(depth, len(self)), variant="hc")
        return first_of(-distances.astype(np.float32), rows, depth)


class AdaptiveIndex(Index):
    """The first `short_dim` dimensions, renormalized, find shortlist_factor x `depth` documents; inner products of the
    full vectors, an array or a memory map, order them. Meant for Matryoshka embeddings."""

    def __init__(self, embeddings_ND: np.ndarray, short_dim: int, *, shortlist_factor: int = SHORTLIST_FACTOR):
        super().__init__(embeddings_ND)
        self.embeddings_ND, self.short_dim, self.shortlist_factor = embeddings_ND, short_dim, shortlist_factor
        self._short_ND = unit_rows(checked_embeddings(embeddings_ND[:, :short_dim]))

    def _search(self, queries_QD: np.ndarray, depth: int) -> Found:
        short_QD = unit_rows(queries_QD[:, : self.short_dim])
        shortlist = search_exact(short_QD, self._short_ND, self.shortlist_factor * depth)
        return search_shortlist(queries_QD, shortlist.rows, self.embeddings_ND.__getitem__, min(depth, len(self)))


def search_shortlist(
    queries_QD: np.ndarray, rows_QS: np.ndarray, vectors_of: Callable[[np.ndarray], np.ndarray], depth: int
) -> Found:
    """The first `depth` of each query's shortlist of distinct rows (-1: none) by inner product; equal vectors tie.
    `vectors_of` returns the vectors [M, D] of ascending rows [M], at most 16,384 or one query's at a time."""
    shape = len(queries_QD), min(depth, rows_QS.shape[1])
    found = Found(np.empty(shape, np.float32), np.empty(shape, np.int64))
    block_size = max(1, 16_384 // max(rows_QS.shape[1], 1))
    for start in range(0, len(queries_QD), block_size):
        block = slice(start, start + block_size)
        # Reads each row of a memory map only once, in order.
        unique_M, place = np.unique(np.maximum(rows_QS[block], 0), return_inverse=True)
        gathered_QSD = np.asarray(vectors_of(unique_M), dtype=np.float32)[place.reshape(rows_QS[block].shape)]
        # Not by BLAS, whose kernels round differently by position, so equal vectors would not tie.
        scores_QS = np.einsum("qsd,qd->qs", gathered_QSD, queries_QD[block].astype(np.float32, copy=False))
        found.scores[block], found.rows[block] = first_of(scores_QS, rows_QS[block], depth)
    return found
