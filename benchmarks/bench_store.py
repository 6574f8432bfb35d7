"""The cost of the store: encoding texts through it, a tenth of them new, against that tenth; opening a large store.

The texts are random sentences of about ten tokens: the shorter the text, the larger the store's share of the time.
Before timing, vectors with and without the store must agree to 1e-5.

    python -m benchmarks.bench_store --rounds 5
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedft import load_embedder
from embedft.encoders.store import Space, Store
from embedft.retrieval.tables import format_table
from experiments.commandline import make_parser, run

from .workers import Worker, anonymous_bytes, machine, ratios, spread

TOLERANCE, LIMIT = 1e-5, 1.15
NEW_SHARE = 0.1
WORDS = (
    "the of a limit order fee revenue rider driver year market price growth question answer city trip cost share "
    "report risk stock cash loss plan platform service quarter result period agreement"
)
DIM, NUM_LOOKED_UP = 384, 1000
LARGE = Space("0" * 64, DIM, {"model": "random numbers"})


class ThroughStore:
    """Encodes all texts through a store that lacks only the new ones."""

    def __init__(self, model: str, texts: Sequence[str], num_new: int, folder: str):
        self.embedder, self.texts = load_embedder(model, device="cpu"), texts
        self.full, self.used = Path(folder, "full"), Path(folder, "used")
        self.embedder.store = Store(self.full)
        self.embedder.encode(texts[num_new:], progress=False)

    def reset(self) -> None:
        shutil.rmtree(self.used, ignore_errors=True)
        shutil.copytree(self.full, self.used)

    def encode(self) -> None:
        self.embedder.store = Store(self.used)
        self.embeddings = self.embedder.encode(self.texts, progress=False)

    def result(self) -> tuple[np.ndarray, int]:
        return self.embeddings, self.embedder.store.misses


class Alone:
    """Encodes the new texts without a store."""

    def __init__(self, model: str, texts: Sequence[str], num_new: int):
        self.embedder, self.texts, self.num_new = load_embedder(model, device="cpu"), texts, num_new

    def encode(self) -> None:
        self.embedder.encode(self.texts[: self.num_new], progress=False)

    def all(self) -> np.ndarray:
        return self.embedder.encode(self.texts, progress=False)


class Opened:
    """Opens a large store and looks texts up in it."""

    def __init__(self, folder: str, num_rows: int):
        self.folder = folder
        self.texts = [f"text {row}" for row in random.Random(0).sample(range(num_rows), min(NUM_LOOKED_UP, num_rows))]

    def open(self) -> None:
        self.store = Store(self.folder)
        self.store.spaces()

    def look_up(self) -> None:
        rows_N = self.store.find(LARGE, self.texts)
        self.vectors_ND = self.store.read(LARGE, rows_N)

    def result(self) -> tuple[np.ndarray, list[str]]:
        return self.vectors_ND, self.texts

    def anonymous_bytes(self) -> int:
        return anonymous_bytes()


def make_texts(number: int) -> list[str]:
    generator, words = random.Random(0), WORDS.split()
    texts: dict[str, None] = {}
    while len(texts) < number:
        texts[" ".join(generator.choices(words, k=generator.randint(6, 10)))] = None
    return list(texts)


def large_vectors(texts: Sequence[str]) -> np.ndarray:
    """Row 17 of a sawtooth for "text 17", so that any row can be checked."""
    numbers_N1 = np.array([[int(text.split()[1])] for text in texts])
    return ((numbers_N1 * 31 + np.arange(DIM)) % 1009).astype(np.float32)


def a_tenth_is_new(options: argparse.Namespace, folder: str) -> float:
    """Prints a table and returns the median ratio."""
    texts, num_new = make_texts(options.texts), max(1, round(options.texts * NEW_SHARE))
    random.Random(1).shuffle(texts)
    store = Worker(ThroughStore, options.base, texts, num_new, folder)
    alone = Worker(Alone, options.base, texts, num_new)
    store.call("reset")
    store.call("encode")  # also warms up
    embeddings_ND, num_computed = store.call("result")
    difference = float(np.abs(embeddings_ND - alone.call("all")).max())
    if num_computed != num_new or not difference <= TOLERANCE:
        raise ValueError(
            f"{num_computed} texts were computed, expected {num_new}; the embeddings differ by {difference:.1e},"
            f" expected at most {TOLERANCE:.0e}"
        )
    seconds: dict[str, list[float]] = {"store": [], "alone": []}
    for _ in range(options.rounds):
        store.call("reset")
        for name, worker in (("store", store), ("alone", alone)):
            worker.call("encode")
            seconds[name].append(worker.seconds)
    times = ratios(seconds["store"], seconds["alone"])
    header = ["texts", "new", "largest difference", "all through the store, s", "new ones alone, s", "store / alone"]
    row = [f"{len(texts):,}", f"{num_new:,}", f"{difference:.1e}", *map(spread, seconds.values()), spread(times, 3)]
    print(format_table(header, [row]))
    store.close()
    alone.close()
    return float(np.median(times))


def a_large_store(options: argparse.Namespace, folder: str) -> None:
    start = time.perf_counter()
    Store(folder).fill(LARGE, [f"text {row}" for row in range(options.rows)], large_vectors)
    written = time.perf_counter() - start
    opened, looked_up, again, memory = [], [], [], []
    for _ in range(options.rounds):
        worker = Worker(Opened, folder, options.rows)  # a fresh process each time
        before = worker.call("anonymous_bytes")
        for method, seconds in (("open", opened), ("look_up", looked_up), ("look_up", again)):
            worker.call(method)
            seconds.append(worker.seconds)
        memory.append((worker.call("anonymous_bytes") - before) / 2**20)
        vectors_ND, texts = worker.call("result")
        if not np.array_equal(vectors_ND, large_vectors(texts)):
            raise ValueError("the vectors looked up differ from those stored")
        worker.close()
    header = ["rows", "written, s", "opened, s", f"first {len(texts):,} texts, s", "again, s", "anonymous memory, MiB"]
    times = (spread(seconds, 4) for seconds in (opened, looked_up, again))
    print(format_table(header, [[f"{options.rows:,} x {DIM}", f"{written:.1f}", *times, spread(memory, 1)]]))


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        a_large_store(options, str(Path(folder, "large")))
        print()
        ratio = a_tenth_is_new(options, folder)
    print(f"\nmedian [min, max] of {options.rounds} alternations, or processes; {options.base}; {machine()};")
    print(f"files in the page cache; store / alone is {ratio:.3f} (limit: {LIMIT})")


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_store", __doc__)
    parser.add_argument("--texts", type=int, default=100_000, help="texts, a tenth of them new [100000]")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large store [1000000]")
    parser.add_argument("--rounds", type=int, default=5, help="timed alternations [5]")
    parser.add_argument("--folder", metavar="DIR", help="folder for temporary files [the system's]")
    run(main, parser)
