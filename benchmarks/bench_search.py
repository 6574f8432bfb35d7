"""Exact search against FAISS's flat index, and the recall, speed and size of approximate indices.

Documents are perturbed encodings of the contexts of the finance questions: document i is normalise(context vector i
mod C + noise of a given length in a random direction). Queries are the questions, perturbed in the same way. Exact
search also reads the documents from a file, in slices. The ivf and hnsw indices use their presets' parameters, or those
in --indices: "ivf,nprobe=4".

Before timing, results must be equal: scores at each rank to 1e-5, and documents wherever scores differ by more.

    python -m benchmarks.bench_search
    python -m benchmarks.bench_search --documents 20000 --ivf 20000 --hnsw 20000 --queries 1000 --texts 1000
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from embedft import load_embedder
from embedft.retrieval.approximate import FaissIndex
from embedft.retrieval.index import Found, recall_against, search_exact
from embedft.retrieval.tables import format_table
from experiments.commandline import make_parser, run
from experiments.repro_matryoshka_finance import read_rows
from experiments.sources import find_data

from .vectors import perturbed, write_perturbed
from .workers import machine, ratios, spread

TOLERANCE, LIMIT = 1e-5, 1.3
RECALL_DEPTH, TARGET, LEAST_TIMES = 10, 0.95, 10


def make_data(options: argparse.Namespace, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents (a memory map) and queries."""
    dataset, _ = read_rows(find_data("finance_qa", options.data) / "Financial-QA-10k.csv")
    embedder = load_embedder(options.base)
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


def exact(options: argparse.Namespace, documents: np.ndarray, queries: np.ndarray) -> None:
    documents = documents[: options.documents]
    peer, held = faiss.IndexFlatIP(documents.shape[1]), np.array(documents)
    peer.add(documents)
    contestants = {
        "FAISS IndexFlatIP": lambda: Found(*peer.search(queries, options.depth)),
        "search_exact": lambda: search_exact(queries, held, options.depth),
        "search_exact, from a file": lambda: search_exact(queries, documents, options.depth),
    }
    expected, *found = (work() for work in contestants.values())
    for name, results in zip(list(contestants)[1:], found, strict=True):
        require_equal(results, expected, name)
    seconds = seconds_of(contestants, options.rounds)
    rows = [
        [name, spread(times), spread(ratios(times, seconds["FAISS IndexFlatIP"]), 3)] for name, times in seconds.items()
    ]
    print(f"{len(documents):,} documents, {len(queries):,} queries, top {options.depth}\n")
    print(format_table(["exact search", "seconds", f"relative to FAISS (limit: {LIMIT})"], rows))


def approximate(options: argparse.Namespace, documents: np.ndarray, queries: np.ndarray) -> None:
    rows = []
    for name, number in zip(options.indices, (options.ivf, options.hnsw), strict=True):
        part = np.array(documents[:number])
        start = time.perf_counter()
        index = FaissIndex(part, name)
        build_seconds = time.perf_counter() - start
        exact_rows_QK = search_exact(queries, part, RECALL_DEPTH).rows
        recall = recall_against(index.search(queries, RECALL_DEPTH).rows, exact_rows_QK).mean()
        contestants = {
            "flat": lambda part=part: search_exact(queries, part, RECALL_DEPTH),
            "index": lambda index=index: index.search(queries, RECALL_DEPTH),
        }
        seconds = seconds_of(contestants, options.rounds)
        rates = [len(queries) / value for value in seconds["index"]]
        rows.append(
            [
                f"{name} ({index.factory}), {index.parameters}",
                f"{number:,}",
                f"{build_seconds:.1f}",
                f"{recall:.4f}",
                spread(rates, 0),
                spread(ratios(seconds["flat"], seconds["index"]), 1),
                f"{index.bytes_per_vector:,.0f}",
            ]
        )
    header = ["index", "documents", "build, s", f"recall@{RECALL_DEPTH}", "queries per second", "relative to flat"]
    print(format_table([*header, "bytes / document"], rows))
    print(f"\ngoal: recall of at least {TARGET} at {LEAST_TIMES} times flat's rate; the build trains and fills;")
    print(f"all {len(queries):,} queries in one call")


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        documents, queries = make_data(options, folder)
        exact(options, documents, queries)
        print()
        approximate(options, documents, queries)
        print(f"median [min, max] of {options.rounds} alternating rounds; {options.base},")
        print(
            f"{documents.shape[1]} dimensions, noise of length {options.noise}; FAISS {faiss.__version__}; {machine()}"
        )


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_search", __doc__)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents for exact search [1000000]")
    parser.add_argument("--ivf", type=int, default=1_000_000, help="documents in the first index [1000000]")
    parser.add_argument("--hnsw", type=int, default=200_000, help="documents in the second index [200000]")
    parser.add_argument("--indices", nargs=2, default=["ivf", "hnsw"], metavar="NAME", help="two indices [ivf hnsw]")
    parser.add_argument("--queries", type=int, default=10_000, help="queries [10000]")
    parser.add_argument("--depth", type=int, default=100, help="results of exact search [100]")
    parser.add_argument("--dim", type=int, help="leading dimensions to keep [all]")
    parser.add_argument("--noise", type=float, default=0.5, help="length of the noise on a unit vector [0.5]")
    parser.add_argument("--texts", type=int, help="contexts and questions to encode [all]")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds [3]")
    parser.add_argument("--data", metavar="DIR", help="folder with Financial-QA-10k.csv [beside the checkout]")
    parser.add_argument("--folder", metavar="DIR", help="folder for temporary files [the system's]")
    run(main, parser)
