"""Embeddings in one byte, or one bit, a feature: int8 with calibrated ranges, binary signs; search and rescoring.

    index = QuantizedIndex(document_embeddings, "binary", rescore="int8")
    scores, rows = index.search(query_embeddings, depth=100)
    index.bytes_per_document      # 48 + 384 at 384 dimensions, where float32 has 1,536

Queries stay float32 wherever a product is computed: "int8" is asymmetric. Only the Hamming distances of "binary" see
the signs of the queries alone. Not here: product quantisation (approximate.py).

Shapes: Q queries, N documents, D dimensions, B = ceil(D / 8) bytes, S of a shortlist, K = min(depth, N) results.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from ..progress import progress_bar
from .index import (
    DOCUMENT_SLICE,
    QUERY_BLOCK,
    Found,
    checked_embeddings,
    from_keys,
    require_depth,
    search_exact,
    search_shortlist,
    slices_of,
    to_keys,
)
from .index_files import finish, opened, write_hashed

Precision = Literal["int8", "binary"]
Rescore = Literal["binary", "int8", "float32"]
# The precisions that may score the shortlist of each: its own, or a finer one.
RESCORES = {"int8": (None, "float32"), "binary": (None, "binary", "int8", "float32")}
CALIBRATION_DOCUMENTS = 100_000
KIND = "quantized"


def bytes_per_document(dim: int, precision: Literal["float32", "int8", "binary"]) -> int:
    """Bytes of one vector: 4 D, D, ceil(D / 8)."""
    sizes = {"float32": 4 * dim, "int8": dim, "binary": -(-dim // 8)}
    if precision not in sizes:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(sizes)}")
    return sizes[precision]


def calibrate(embeddings_ND: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """The least and the largest value of each dimension, [2, D] float32, over at most 100,000 documents drawn by seed.

    Raises:
        ValueError: on no documents, a wrong shape, NaN or inf.
    """
    if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
        raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, D] with documents to calibrate on")
    if len(embeddings_ND) > CALIBRATION_DOCUMENTS:
        rng = np.random.default_rng(seed)
        embeddings_ND = embeddings_ND[np.sort(rng.choice(len(embeddings_ND), CALIBRATION_DOCUMENTS, replace=False))]
    ends = [(part.min(axis=0), part.max(axis=0)) for _, part in slices_of(embeddings_ND, embeddings_ND.shape[1])]
    least, largest = (np.stack(values) for values in zip(*ends, strict=True))
    return np.stack([least.min(axis=0), largest.max(axis=0)])


def to_int8(embeddings_ND: np.ndarray, ranges_2D: np.ndarray) -> np.ndarray:
    """floor((x - least) / step) - 128, clipped to [-128, 127], with step = (largest - least) / 255; [N, D] int8.

    A dimension whose range is empty gets step 1, so its values within the range become -128.

    Source: sentence-transformers, `quantize_embeddings` with precision "int8": the same codes from the same ranges.
    """
    least_D, step_D = _scale(ranges_2D)
    return (np.clip(np.floor((embeddings_ND - least_D) / step_D), 0, 255) - 128).astype(np.int8)


def from_int8(codes_ND: np.ndarray, ranges_2D: np.ndarray) -> np.ndarray:
    """least + (code + 128 + 1/2) step, [N, D] float32: the middle of what a code stands for.

    So a value within the ranges comes back within half a step. The half moves all scores of a query alike, which
    changes no ranking. A dimension whose range is empty comes back as it was.
    """
    least_D, step_D = _scale(ranges_2D)
    half_D = np.where(ranges_2D[0] == ranges_2D[1], np.float32(0), step_D / 2)
    return codes_ND * step_D + (least_D + 128 * step_D + half_D)


def to_binary(embeddings_ND: np.ndarray) -> np.ndarray:
    """A bit for each feature, 1 where it is above 0, eight to a byte, the first the highest; [N, B] uint8.

    Source: sentence-transformers, `quantize_embeddings` with precision "ubinary": the same bytes.
    """
    return np.packbits(embeddings_ND > 0, axis=-1)


def from_binary(codes_NB: np.ndarray, dim: int) -> np.ndarray:
    """+1 and -1 for the bits, [N, D] float32."""
    return np.unpackbits(codes_NB, axis=-1, count=dim).astype(np.float32) * 2 - 1


class QuantizedIndex:
    """Exhaustive search over quantised documents, exact for what the codes stand for, with rescoring on demand.

    | precision | score without rescoring | order of the shortlist |
    |-----------|-------------------------|------------------------|
    | int8 | query . from_int8(codes) | the same |
    | binary | minus the Hamming distance of the signs | the same |

    With `rescore` the first rescore_factor x depth are scored again by query . vector, in the vectors of that
    precision: "binary" by the signs (+1, -1) of the documents, which takes no more memory; "int8" keeps those codes
    too; "float32" reads the embeddings given, which are not copied: a memory map stays on disk. Order: score
    descending, row ascending.

    Args:
        embeddings_ND: an array or a memory map, of any float type; read in slices.
        rescore: None, or a precision at least as fine; "int8" is finest by itself, so it takes "float32" only.
        rescore_factor: documents of the shortlist for each of the results.
        ranges: [2, D] for int8; None: `calibrate` by `seed`.

    Raises:
        ValueError: on no documents, a wrong shape, NaN or inf, an unknown precision, or ranges that are no ranges.

    Source: Shakir et al. 2024, "Binary and Scalar Embedding Quantization"; the rescoring of binary: Yamada et al. 2021,
    section 3.
    """

    def __init__(
        self,
        embeddings_ND: np.ndarray,
        precision: Precision,
        *,
        rescore: Rescore | None = None,
        rescore_factor: int = 4,
        ranges: np.ndarray | None = None,
        seed: int = 0,
    ):
        _check_settings(precision, rescore, rescore_factor)
        if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
            raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, D] with documents to quantise")
        num_documents, self.dim = embeddings_ND.shape
        self.precision, self.rescore, self.rescore_factor = precision, rescore, rescore_factor
        self.ranges = None
        self._codes: dict[str, np.ndarray] = {}
        if "int8" in (precision, rescore):
            self.ranges = calibrate(embeddings_ND, seed=seed) if ranges is None else _checked_ranges(ranges, self.dim)
            self._codes["int8"] = np.empty((num_documents, self.dim), dtype=np.int8)
        if precision == "binary":
            self._codes["binary"] = np.empty((num_documents, -(-self.dim // 8)), dtype=np.uint8)
        self._embeddings_ND = embeddings_ND if rescore == "float32" else None
        for first_row, slice_ND in slices_of(embeddings_ND, self.dim):
            for name, codes in self._codes.items():
                part = to_binary(slice_ND) if name == "binary" else to_int8(slice_ND, self.ranges)
                codes[first_row : first_row + len(part)] = part

    def __len__(self) -> int:
        return len(self._codes[self.precision])

    @property
    def bytes_per_document(self) -> int:
        """Of all vectors that a search may read, those of rescoring included, in memory or on disk."""
        return sum(bytes_per_document(self.dim, name) for name in {self.precision, self.rescore} - {None})

    def search(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The first `depth` documents for each query, or all of them when there are fewer.

        Returns:
            scores [Q, K] float32 and rows [Q, K] int64.

        Raises:
            ValueError: on a depth below 1, a wrong width, NaN or inf.
        """
        require_depth(depth)
        queries_QD = checked_embeddings(queries_QD, self.dim)
        depth = min(depth, len(self))
        width = depth if self.rescore is None else min(depth * self.rescore_factor, len(self))
        if self.precision == "binary":
            found = self._search_hamming(queries_QD, width)
        else:
            slices = (self._vectors("int8", slice(s, s + DOCUMENT_SLICE)) for s in range(0, len(self), DOCUMENT_SLICE))
            found = search_exact(queries_QD, slices, width)
        if self.rescore is None:
            return found
        return search_shortlist(queries_QD, found.rows, lambda rows_M: self._vectors(self.rescore, rows_M), depth)

    def _search_hamming(self, queries_QD: np.ndarray, width: int) -> Found:
        import faiss

        queries_QB = to_binary(queries_QD)
        keys_QK = np.empty((len(queries_QD), width), dtype=np.uint64)
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, len(queries_QD), QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                # FAISS's heap of distances keeps the lowest rows among ties ("hc"; its counting of them does not).
                distances, rows = faiss.knn_hamming(queries_QB[block], self._codes["binary"], width, variant="hc")
                keys_QK[block] = np.sort(to_keys(-distances.astype(np.float32), rows), axis=1)
                bar.update(len(queries_QB[block]))
        return from_keys(keys_QK)

    def _vectors(self, precision: Rescore, rows: np.ndarray | slice) -> np.ndarray:
        if precision == "float32":
            return self._embeddings_ND[rows]
        if precision == "int8":
            return from_int8(self._codes["int8"][rows], self.ranges)
        return from_binary(self._codes["binary"][rows], self.dim)

    def save(self, folder: str | Path) -> None:
        """Writes codes and ranges, not "float32" embeddings, into a folder, atomically: see index_files.py."""
        folder = Path(folder)
        arrays = {**self._codes, **({} if self.ranges is None else {"ranges": self.ranges})}
        files = {
            name: write_hashed(folder, name, ".npy", lambda file, array=array: np.lib.format.write_array(file, array))
            for name, array in arrays.items()
        }
        description = {
            "kind": KIND,
            "precision": self.precision,
            "rescore": self.rescore,
            "rescore_factor": self.rescore_factor,
            "dim": self.dim,
            "num_documents": len(self),
            "files": files,
        }
        finish(folder, description)


def load_quantized(
    folder: str | Path, *, embeddings_ND: np.ndarray | None = None, dim: int | None = None
) -> QuantizedIndex:
    """An index that was saved.

    Args:
        embeddings_ND: of the same documents, for rescoring in "float32".
        dim: what is expected of it; None: anything.

    Raises:
        ValueError: there is none, it has another dim, its files are missing, cut short or damaged, or embeddings are
            missing or of another shape.
    """
    description, paths = opened(folder, kind=KIND)
    shape = (description["num_documents"], description["dim"])
    if dim is not None and shape[1] != dim:
        raise ValueError(f"{folder}: an index of dim {shape[1]}, expected {dim}")
    if description["rescore"] == "float32" and (embeddings_ND is None or embeddings_ND.shape != shape):
        found = "none" if embeddings_ND is None else f"shape {embeddings_ND.shape}"
        raise ValueError(f"{folder}: rescores in float32 and needs the embeddings, {shape}, found {found}")
    index = QuantizedIndex.__new__(QuantizedIndex)
    for name in ("precision", "rescore", "rescore_factor", "dim"):
        setattr(index, name, description[name])
    arrays = {name: np.load(path, allow_pickle=False) for name, path in paths.items()}
    index.ranges = arrays.pop("ranges", None)
    index._codes = arrays
    index._embeddings_ND = embeddings_ND if index.rescore == "float32" else None
    return index


def _scale(ranges_2D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least [D], step [D]) of ranges; the step of an empty range is 1."""
    least_D, largest_D = ranges_2D.astype(np.float32, copy=False)
    step_D = (largest_D - least_D) / np.float32(255)
    return least_D, np.where(step_D == 0, np.float32(1), step_D)


def _checked_ranges(ranges_2D: np.ndarray, dim: int) -> np.ndarray:
    ranges_2D = np.asarray(ranges_2D, dtype=np.float32)
    if ranges_2D.shape != (2, dim) or not np.isfinite(ranges_2D).all() or (ranges_2D[0] > ranges_2D[1]).any():
        raise ValueError(
            f"ranges of shape {ranges_2D.shape}, expected [2, {dim}]: finite, the least before the largest"
        )
    return ranges_2D


def _check_settings(precision: str, rescore: str | None, rescore_factor: int) -> None:
    if precision not in RESCORES:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(RESCORES)}")
    if rescore not in RESCORES[precision]:
        raise ValueError(f"rescore is {rescore!r}, expected one of {RESCORES[precision]} with {precision!r}")
    if rescore_factor < 1:
        raise ValueError(f"rescore_factor must be at least 1, not {rescore_factor}")
