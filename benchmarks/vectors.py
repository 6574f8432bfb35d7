"""Any number of vectors with the structure of real text: perturbations of C encoded texts.

Gaussian vectors have no near neighbours, so an approximate index gains nothing on them. Here row i is
normalise(vector i mod C + noise * a random unit vector).

    encoded_CD = encode_texts(options, "document")
    documents = write_perturbed("documents.npy", encoded_CD, 1_000_000, noise=0.5)    # a memory map
    queries = perturbed(documents[rows], range(len(rows)), noise=2.0, seed=1)

Shapes: C encoded texts, N rows, D dimensions.
"""

import argparse
from pathlib import Path

import numpy as np

from embedft import load_embedder
from embedft.vectors import unit_rows
from experiments.repro_matryoshka_finance import read_rows

from . import suite

SLICE = 50_000


def encode_texts(options: argparse.Namespace, role: str) -> np.ndarray:
    """Vectors of the first --texts documents or queries: the finance questions' rows, or the user's data."""
    dataset = suite.own_data(options.data)
    if dataset is None:
        dataset, _ = read_rows(suite.published("finance_qa", options.data) / "Financial-QA-10k.csv")
    texts = list((dataset.queries if role == "query" else dataset.texts).values())[: options.texts]
    embedder = load_embedder(options.base, device=options.device, dtype=options.dtype)
    embedder.autocast = False  # so that --dtype is what computes, on CUDA too
    return embedder.encode(texts, role=role, dim=options.dim)


def perturbed(vectors_CD: np.ndarray, rows: range, noise: float, seed: int) -> np.ndarray:
    """normalise(vector row mod C + noise * a random unit vector) for a slice of rows; the first row seeds them."""
    rng = np.random.default_rng([seed, rows.start])
    directions = unit_rows(rng.standard_normal((len(rows), vectors_CD.shape[1]), dtype=np.float32))
    return unit_rows(vectors_CD[np.arange(rows.start, rows.stop) % len(vectors_CD)] + noise * directions)


def write_perturbed(
    path: str | Path, vectors_CD: np.ndarray, number: int, *, noise: float, steps: int | None = None
) -> np.ndarray:
    """Writes the first `number` perturbations, `rounded` if `steps` is given; returns a read-only memory map [N, D]."""
    path = Path(path)
    documents_ND = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(number, vectors_CD.shape[1]))
    for start in range(0, number, SLICE):
        rows = range(start, min(start + SLICE, number))
        part_ND = perturbed(vectors_CD, rows, noise, 0)
        documents_ND[rows.start : rows.stop] = part_ND if steps is None else rounded(part_ND, steps)
    documents_ND.flush()
    return np.load(path, mmap_mode="r")


def rounded(vectors_ND: np.ndarray, steps: int) -> np.ndarray:
    """Rounds every value to a multiple of 1 / `steps`, a power of two.

    Inner products of such unit vectors are multiples of 1 / steps^2, and float32 holds them and all their partial sums
    exactly for up to 2,048 steps. So every matrix product gives the same scores whatever its order of addition.
    """
    return np.round(vectors_ND * steps) / np.float32(steps)


def add_vectors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of a benchmark that searches such vectors."""
    parser.add_argument("--queries", type=int, default=10_000, metavar="N", help="queries [%(default)s]")
    parser.add_argument("--depth", type=int, default=100, metavar="N", help="documents per query [%(default)s]")
    parser.add_argument("--dim", type=int, metavar="N", help="leading dimensions to keep [all]")
    parser.add_argument("--noise", type=float, default=0.5, metavar="X", help="length of the noise [%(default)s]")
    parser.add_argument("--texts", type=int, metavar="N", help="how many of the data set's texts to encode [all]")
    parser.add_argument("--folder", metavar="DIR", help="folder for temporary files [the system's]")
    return parser
