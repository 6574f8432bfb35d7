"""The cost of the store: encoding texts through it, a tenth of them new, against that tenth; opening a large store.

The texts are random sentences of about ten tokens, or the documents of --data: the shorter the text, the larger the
store's share of the time.
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
import torch

from embedft import Embedder, load_embedder
from embedft.encoders.store import Space, Store

from . import suite
from .suite import Row, make_parser, require_close
from .workers import Worker, anonymous_bytes

TOLERANCES, LIMIT = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3}, 1.15  # the limit: store / alone
NEW_SHARE = 0.1
WORDS = (
    "the of a limit order fee revenue rider driver year market price growth question answer city trip cost share "
    "report risk stock cash loss plan platform service quarter result period agreement"
)
DIM, NUM_LOOKED_UP = 384, 1000
LARGE = Space("0" * 64, DIM, {"model": "random numbers"})


def load(options: argparse.Namespace) -> Embedder:
    embedder = load_embedder(options.base, device=options.device, dtype=getattr(torch, options.dtype))
    embedder.autocast = False  # in bfloat16, as on CUDA, vectors would depend on their batch too much to compare
    return embedder


class ThroughStore:
    """Encodes all texts through a store that lacks only the new ones."""

    def __init__(self, options: argparse.Namespace, texts: Sequence[str], num_new: int, folder: str):
        self.embedder, self.texts = load(options), texts
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

    def __init__(self, options: argparse.Namespace, texts: Sequence[str], num_new: int):
        self.embedder, self.texts, self.num_new = load(options), texts, num_new

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


def a_tenth_is_new(options: argparse.Namespace, folder: str) -> Row:
    texts = suite.own_texts(options.data, options.texts) or make_texts(options.texts)
    num_new = max(1, round(len(texts) * NEW_SHARE))
    random.Random(1).shuffle(texts)
    store = Worker(ThroughStore, options, texts, num_new, folder, device=options.device)
    alone = Worker(Alone, options, texts, num_new, device=options.device)
    store.call("reset")
    store.call("encode")  # also warms up
    embeddings_ND, num_computed = store.call("result")
    case = f"{len(texts):,} texts through the store, {num_new:,} of them new"
    if num_computed != num_new:
        raise ValueError(f"{case}: {num_computed} texts were computed, expected {num_new}")
    difference = require_close(case, embeddings_ND, alone.call("all"), TOLERANCES[options.dtype])
    seconds: dict[str, list[float]] = {"store": [], "alone": []}
    for _ in range(options.rounds):
        store.call("reset")
        for name, worker in (("store", store), ("alone", alone)):
            worker.call("encode")
            seconds[name].append(worker.seconds)
    store.close()
    alone.close()
    return Row(case, seconds["store"], "the new ones alone", seconds["alone"], largest_difference=difference)


def a_large_store(options: argparse.Namespace, folder: str) -> list[Row]:
    start = time.perf_counter()
    Store(folder).fill(LARGE, [f"text {row}" for row in range(options.rows)], large_vectors)
    size, written = f"{options.rows:,} x {DIM}", time.perf_counter() - start
    found: dict[str, list[float]] = {"open": [], "look up": [], "look up again": []}
    memory = []
    for _ in range(options.rounds):
        worker = Worker(Opened, folder, options.rows)  # a fresh process each time
        before = worker.call("anonymous_bytes")
        for case, seconds in found.items():
            worker.call("open" if case == "open" else "look_up")
            seconds.append(worker.seconds)
        memory.append(worker.call("anonymous_bytes") - before)
        vectors_ND, texts = worker.call("result")
        if not np.array_equal(vectors_ND, large_vectors(texts)):
            raise ValueError("the vectors looked up differ from those stored")
        worker.close()
    more = {"rows": options.rows, "texts_looked_up": len(texts)}
    rows = [Row(f"{case}, {size}", seconds, more=dict(more)) for case, seconds in found.items()]
    return [Row(f"write, {size}", [written], peak_bytes=max(memory), more=dict(more)), *rows]


def main(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [*a_large_store(options, str(Path(folder, "large"))), a_tenth_is_new(options, folder)]
    print("files in the page cache; peak: anonymous memory of a process that opens the store and looks up")
    print(f"{NUM_LOOKED_UP:,} texts; limit for texts through the store: {LIMIT} of the time of the new ones alone\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("store", __doc__, rounds=5, data=suite.OWN, dtypes=[*TOLERANCES])
    found.add_argument("--texts", type=int, default=100_000, help="texts, a tenth of them new [100000]")
    found.add_argument("--rows", type=int, default=1_000_000, help="rows of the large store [1000000]")
    found.add_argument("--folder", metavar="DIR", help="folder for temporary files [the system's]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
