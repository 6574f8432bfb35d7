"""Exact search against FAISS's flat index, and the recall, speed and size of approximate indices.

Documents are perturbed encodings of the contexts of the finance questions: document i is normalise(context vector i
mod C + noise of a given length in a random direction). Queries are the questions, perturbed in the same way. Exact
search also reads the documents from a file, in slices. The ivf and hnsw indices use their presets' parameters, or those
in --indices: "ivf,nprobe=4". With --device, exact search computes there.

Before timing, results must be equal: scores at each rank to 1e-5, and documents wherever scores differ by more.

    python -m benchmarks.bench_search
    python -m benchmarks.bench_search --documents 20000 --ivf 20000 --hnsw 20000 --queries 1000 --texts 1000
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from embedft.retrieval.approximate import FaissIndex
from embedft.retrieval.index import Found, recall_against, search_exact

from . import suite
from .suite import DTYPES, Row, make_parser, measure
from .vectors import add_vectors, encode_texts, perturbed, write_perturbed
from .workers import Worker

TOLERANCE, LIMIT = 1e-5, 1.3
RECALL_DEPTH, TARGET, LEAST_TIMES = 10, 0.95, 10


def make_data(options: argparse.Namespace, folder: str) -> tuple[str, np.ndarray]:
    """The file of the documents, and the queries."""
    path, number = Path(folder, "documents.npy"), max(options.documents, options.ivf, options.hnsw)
    write_perturbed(path, encode_texts(options, "document"), number, noise=options.noise)
    return str(path), perturbed(encode_texts(options, "query"), range(options.queries), options.noise, 1)


class Searcher:
    """Finds the first `depth` of the first `number` documents of a file."""

    def __init__(self, path: str, number: int, queries_QD: np.ndarray, depth: int, *options: Any):
        self.documents_ND = np.load(path, mmap_mode="r")[:number]
        self.queries_QD, self.depth = queries_QD, depth
        self.prepare(*options)

    def search(self) -> None:
        self.found = self.find()

    def result(self) -> Found:
        return self.found


class Exact(Searcher):
    """`search_exact` on a device, over documents in memory or in slices of the file."""

    def prepare(self, device: str, held: bool) -> None:
        self.device, self.documents_ND = device, np.array(self.documents_ND) if held else self.documents_ND

    def find(self) -> Found:
        return search_exact(self.queries_QD, self.documents_ND, self.depth, device=self.device)


class FaissFlat(Searcher):
    def prepare(self) -> None:
        self.index = faiss.IndexFlatIP(self.documents_ND.shape[1])
        self.index.add(self.documents_ND)

    def find(self) -> Found:
        return Found(*self.index.search(self.queries_QD, self.depth))


class Approximate(Searcher):
    """One of the indices of embedft/retrieval/approximate.py."""

    def prepare(self, name: str) -> None:
        held_ND, start = np.array(self.documents_ND), time.perf_counter()
        self.index = FaissIndex(held_ND, name)
        self.build_seconds = time.perf_counter() - start

    def find(self) -> Found:
        return self.index.search(self.queries_QD, self.depth)

    def facts(self) -> tuple[str, dict[str, float]]:
        """What the index is, and the figures that it has."""
        figures = {"build_seconds": self.build_seconds, "bytes_per_document": self.index.bytes_per_vector}
        return f"({self.index.factory}), {self.index.parameters}", figures


def require_equal(found: Found, expected: Found, name: str) -> None:
    difference = np.abs(found.scores - expected.scores).max()
    gaps = np.abs(np.diff(expected.scores, axis=1)) > 2 * TOLERANCE
    ends = np.ones((len(gaps), 1), dtype=bool)
    # The last rank may tie with the next one, which was cut off, so it is left out.
    clear = np.hstack([ends, gaps]) & np.hstack([gaps, ~ends])
    num_other = int((found.rows != expected.rows)[clear].sum())
    if not difference <= TOLERANCE or num_other:
        raise ValueError(
            f"{name}: scores differ by {difference:.1e}, {num_other} documents differ at ranks without ties"
        )


def exact(options: argparse.Namespace, path: str, queries: np.ndarray) -> list[Row]:
    given, peer = (path, options.documents, queries, options.depth), f"FAISS IndexFlatIP {faiss.__version__}"
    theirs, rows = Worker(FaissFlat, *given), []
    theirs.call("search")  # also warms up
    sizes = {"documents": options.documents, "queries": len(queries), "depth": options.depth}
    for case, held in (("search_exact", True), ("search_exact, from a file", False)):
        ours = Worker(Exact, *given, options.device, held, device=options.device)
        ours.call("search")
        require_equal(ours.call("result"), theirs.call("result"), case)
        rows += measure(case, {"embedft": ours, peer: theirs}, "search", rounds=options.rounds, warmup=0, more=sizes)
        ours.close()
    theirs.close()
    return rows


def approximate(options: argparse.Namespace, path: str, queries: np.ndarray) -> list[Row]:
    rows: list[Row] = []
    for name, number in zip(options.indices, (options.ivf, options.hnsw), strict=True):
        given = path, number, queries, RECALL_DEPTH
        workers = {"embedft": Worker(Approximate, *given, name), "flat": Worker(Exact, *given, "cpu", True)}
        found_rows_QK, exact_rows_QK = (
            worker.call("search") or worker.call("result").rows for worker in workers.values()
        )
        what, figures = workers["embedft"].call("facts")
        rows += measure(f"{name} {what}", workers, "search", rounds=options.rounds, warmup=0)
        rows[-1].more = {"documents": number, "queries": len(queries), **figures}
        rows[-1].more[f"recall@{RECALL_DEPTH}"] = float(recall_against(found_rows_QK, exact_rows_QK).mean())
        rows[-1].more["queries_per_second"] = len(queries) / statistics.median(rows[-1].seconds)
        for worker in workers.values():
            worker.close()
    return rows


def main(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, queries = make_data(options, folder)
        rows = exact(options, path, queries) + approximate(options, path, queries)
    print(
        f"{options.documents:,} documents (ivf: {options.ivf:,}, hnsw: {options.hnsw:,}), {len(queries):,} queries in"
    )
    print(f"one call, top {options.depth}, {queries.shape[1]} dimensions, noise of length {options.noise}; goals: at")
    print(f"most {LIMIT} of FAISS's time; recall of {TARGET} at {LEAST_TIMES} times flat's rate\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("search", __doc__, rounds=3, data=suite.PUBLISHED, dtypes=DTYPES)
    found.add_argument("--documents", type=int, default=1_000_000, help="documents for exact search [1000000]")
    found.add_argument("--ivf", type=int, default=1_000_000, help="documents in the first index [1000000]")
    found.add_argument("--hnsw", type=int, default=200_000, help="documents in the second index [200000]")
    found.add_argument("--indices", nargs=2, default=["ivf", "hnsw"], metavar="NAME", help="two indices [ivf hnsw]")
    return add_vectors(found)


if __name__ == "__main__":
    suite.run(main, parser())
