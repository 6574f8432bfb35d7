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
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from embedft import load_embedder
from embedft.retrieval.approximate import FaissIndex
from embedft.retrieval.index import Found, recall_against, search_exact
from experiments.repro_matryoshka_finance import read_rows

from . import suite
from .suite import Row, make_parser, published
from .vectors import add_vectors, perturbed, write_perturbed
from .workers import synchronize

TOLERANCE, LIMIT = 1e-5, 1.3
RECALL_DEPTH, TARGET, LEAST_TIMES = 10, 0.95, 10


def make_data(options: argparse.Namespace, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents (a memory map) and queries."""
    dataset, _ = read_rows(published("finance_qa", options.data) / "Financial-QA-10k.csv")
    embedder = load_embedder(options.base, device=options.device)
    contexts = embedder.encode(list(dataset.texts.values())[: options.texts], role="document", dim=options.dim)
    questions = embedder.encode(list(dataset.queries.values())[: options.texts], role="query", dim=options.dim)
    number = max(options.documents, options.ivf, options.hnsw)
    documents = write_perturbed(Path(folder, "documents.npy"), contexts, number, noise=options.noise)
    return documents, perturbed(questions, range(options.queries), options.noise, 1)


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


def seconds_of(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, run in the order A B A B ...; expects them to be warm."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def exact(options: argparse.Namespace, documents: np.ndarray, queries: np.ndarray) -> list[Row]:
    documents = documents[: options.documents]
    peer, held = faiss.IndexFlatIP(documents.shape[1]), np.array(documents)
    peer.add(documents)

    def search(documents: np.ndarray) -> Found:
        found = search_exact(queries, documents, options.depth, device=options.device)
        synchronize(options.device)
        return found

    name = f"FAISS IndexFlatIP {faiss.__version__}"
    contestants = {
        name: lambda: Found(*peer.search(queries, options.depth)),
        "search_exact": lambda: search(held),
        "search_exact, from a file": lambda: search(documents),
    }
    expected, *found = (work() for work in contestants.values())
    for case, results in zip(list(contestants)[1:], found, strict=True):
        require_equal(results, expected, case)
    seconds = seconds_of(contestants, options.rounds)
    sizes = {"documents": len(documents), "queries": len(queries), "depth": options.depth}
    return [Row(case, times, name, seconds[name], more=dict(sizes)) for case, times in seconds.items() if case != name]


def approximate(options: argparse.Namespace, documents: np.ndarray, queries: np.ndarray) -> list[Row]:
    rows = []
    for name, number in zip(options.indices, (options.ivf, options.hnsw), strict=True):
        part = np.array(documents[:number])
        start = time.perf_counter()
        index = FaissIndex(part, name)
        more = {"documents": number, "queries": len(queries), "build_seconds": time.perf_counter() - start}
        exact_rows_QK = search_exact(queries, part, RECALL_DEPTH).rows
        found_rows_QK = index.search(queries, RECALL_DEPTH).rows
        more[f"recall@{RECALL_DEPTH}"] = float(recall_against(found_rows_QK, exact_rows_QK).mean())
        contestants = {
            "flat": lambda part=part: search_exact(queries, part, RECALL_DEPTH),
            "index": lambda index=index: index.search(queries, RECALL_DEPTH),
        }
        seconds = seconds_of(contestants, options.rounds)
        more["queries_per_second"] = len(queries) / statistics.median(seconds["index"])
        more["bytes_per_document"] = index.bytes_per_vector
        case = f"{name} ({index.factory}), {index.parameters}"
        rows.append(Row(case, seconds["index"], "flat", seconds["flat"], more=more))
    return rows


def main(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        documents, queries = make_data(options, folder)
        rows = exact(options, documents, queries) + approximate(options, documents, queries)
    print(
        f"{options.documents:,} documents (ivf: {options.ivf:,}, hnsw: {options.hnsw:,}), {len(queries):,} queries in"
    )
    print(f"one call, top {options.depth}, {documents.shape[1]} dimensions, noise of length {options.noise}; goals: at")
    print(f"most {LIMIT} of FAISS's time; recall of {TARGET} at {LEAST_TIMES} times flat's rate\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("search", __doc__, rounds=3, data="folder of finance_qa")
    found.add_argument("--documents", type=int, default=1_000_000, help="documents for exact search [1000000]")
    found.add_argument("--ivf", type=int, default=1_000_000, help="documents in the first index [1000000]")
    found.add_argument("--hnsw", type=int, default=200_000, help="documents in the second index [200000]")
    found.add_argument("--indices", nargs=2, default=["ivf", "hnsw"], metavar="NAME", help="two indices [ivf hnsw]")
    return add_vectors(found)


if __name__ == "__main__":
    suite.run(main, parser())
