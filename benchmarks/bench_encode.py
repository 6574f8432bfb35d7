"""`Embedder.encode` against `SentenceTransformer.encode`: short questions, contexts, long chunks and a mix of them.

Both use the same weights, the same maximum length and their default batches. Before timing, their vectors must agree:
to 1e-5 where both compute in float32, otherwise in their cosines, down to what `LEAST_COSINE` says of the less precise.
The peer `embedft-float32` shows what another --dtype gains.

    python -m benchmarks.bench_encode --rounds 5
    python -m benchmarks.bench_encode --dtype bfloat16 --peer embedft-float32 sentence-transformers-bf16
    python -m benchmarks.bench_encode --base BAAI/bge-base-en-v1.5 --device cuda --data pairs.csv
    python -m benchmarks.bench_encode --scaling --peer none
"""

import argparse
import random
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from embedft import Embedder, load_embedder
from embedft.vectors import unit_rows

from . import peers, suite
from .suite import DTYPES, Row, load_data, make_parser, matrix_rate, measure, require_close
from .workers import Worker

TOLERANCE, SCALES = 1e-5, (1_000, 10_000, 100_000)
LEAST_COSINE = {"float32": 1.0, "bfloat16": 0.9998, "float16": 0.9998, "int8": 0.995, "embedft-float32": 1.0}
LEAST_COSINE |= {name: peer.least_cosine for name, peer in peers.PEERS.items()}


class Ours:
    def __init__(self, name: str, model: str, texts: dict[str, list[str]], options: argparse.Namespace):
        self.texts, dtype = texts, "float32" if name == "embedft-float32" else options.dtype
        given = {"max_length": options.max_length, "device": options.device, "dtype": getattr(torch, dtype)}
        self.embedder = load_embedder(model, **given)
        self.embedder.autocast = False  # otherwise, CUDA would infer with float32 weights in bfloat16

    def encode(self, case: str) -> None:
        self.vectors = self.embedder.encode(self.texts[case], progress=False)

    def result(self) -> np.ndarray:
        return self.vectors


class SentenceTransformers(Ours):
    def __init__(self, name: str, model: str, texts: dict[str, list[str]], options: argparse.Namespace):
        given = {"device": options.device, "dtype": options.dtype, "max_length": options.max_length}
        self.texts, self.batch_size = texts, options.peer_batch
        self.model = peers.load_peer(name, model, texts=next(iter(texts.values())), **given)

    def encode(self, case: str) -> None:
        options = {"batch_size": self.batch_size, "show_progress_bar": False}
        self.vectors = self.model.encode(self.texts[case], **options)


def load_texts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Texts by case, at most --number of each: Uber's and the finance questions', or the user's; and a mix of all."""
    if own := suite.own_data(options.data):
        found = {"queries": own.queries, "documents": own.texts}
    else:
        uber = load_data("lyft_uber", "val_dataset.json", options.data)
        finance = load_data("finance_qa", "Financial-QA-10k.csv", options.data)
        found = {"Uber questions": uber.queries, "finance contexts": finance.texts, "Uber chunks": uber.texts}
    texts = {case: list(by_id.values()) for case, by_id in found.items()}
    mix = [text for part in texts.values() for text in part]
    random.Random(0).shuffle(mix)
    texts["mix"] = mix
    if unknown := [case for case in options.texts or () if case not in texts]:
        raise ValueError(f"--texts: there are no {unknown[0]!r}, expected some of {', '.join(texts)}")
    return {case: texts[case][: options.number] for case in options.texts or texts}


def load_base(options: argparse.Namespace) -> Embedder:
    """The model on the CPU, with its weights in float32; sets `options.max_length`, at most what the model reads."""
    embedder = load_embedder(options.base, device="cpu")
    embedder.max_length = options.max_length = min(options.max_length, embedder.encoder.config.max_length)
    return embedder


def start_workers(options: argparse.Namespace, *arguments: Any, ours: type, theirs: type) -> dict[str, Worker]:
    """A worker of ours and of each peer, by label; without the peers that are not installed, which it says."""
    workers = {"embedft": Worker(ours, "embedft", *arguments, options, device=options.device)}
    for name in options.peer:
        make, version = (ours, suite.version("embedft")) if name.startswith("embedft") else (theirs, peers.version())
        worker = Worker(make, name, *arguments, options, device=options.device)
        try:
            worker.ready()
        except ImportError as error:
            print(f"{name} is left out: {error}\n")
            worker.close()
            continue
        workers[f"{name} {version}"] = worker
    return workers


def agreement(case: str, ours: np.ndarray, theirs: np.ndarray, *precisions: str) -> tuple[float, float]:
    """(largest difference, smallest cosine). Raises `ValueError` if the less precise of the two may not differ so."""
    cosine = float((unit_rows(ours) * unit_rows(theirs)).sum(axis=1).min())
    least = min(LEAST_COSINE[precision] for precision in precisions)
    if not cosine >= least - TOLERANCE:
        raise ValueError(f"{case}: the smallest cosine is {cosine:.5f}, expected at least {least} ({precisions})")
    return require_close(case, ours, theirs, TOLERANCE if least == 1 else 2.0), cosine


def compare(case: str, workers: Mapping[str, Worker], options: argparse.Namespace, **facts: Any) -> list[Row]:
    """A row per peer, after its vectors agreed with ours."""
    vectors, found = {}, {}
    for name, worker in workers.items():
        worker.call("encode", case)  # also warms up
        vectors[name] = worker.call("result")
    (_, ours), *others = vectors.items()
    for name, theirs in others:
        found[name] = agreement(f"{case}, {name}", ours, theirs, options.dtype, name.partition(" ")[0])
    facts["matrix_flops_per_second"] = workers["embedft"].call(matrix_rate, options.device, options.dtype)
    differences = {name: difference for name, (difference, _) in found.items()}
    rows = measure(case, workers, "encode", case, rounds=options.rounds, warmup=0, differences=differences, **facts)
    for row in rows:
        row.more["smallest_cosine"] = found[row.peer][1] if row.peer else None
    return rows


def scaled(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The first case at several sizes, its texts repeated with a number after them."""
    case, some = next(iter(texts.items()))
    return {f"{case}, {n:,}": [f"{some[i % len(some)]} {i // len(some)}" for i in range(n)] for n in SCALES}


def main(options: argparse.Namespace) -> list[Row]:
    texts, base = load_texts(options), load_base(options)
    texts = scaled(texts) if options.scaling else texts
    workers = start_workers(options, str(base.source.folder), texts, ours=Ours, theirs=SentenceTransformers)
    rows: list[Row] = []
    for case, some in texts.items():
        lengths = base.pack(some, role="document").lengths().numpy()
        facts = {
            "texts": len(some),
            "tokens": int(lengths.sum()),
            "flops": suite.flops_of(base.encoder, lengths) or None,
        }
        rows += compare(case, workers, options, **facts)
    for row in rows if options.scaling else ():
        row.more["microseconds_per_token"] = 1e6 * statistics.median(row.seconds) / row.tokens
    for worker in workers.values():
        worker.close()
    return rows


def add_texts(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of `load_texts` and `load_base`."""
    parser.add_argument("--texts", nargs="+", metavar="CASE", help='which texts, such as "Uber questions" or mix [all]')
    parser.add_argument("--number", type=int, metavar="N", help="how many of each, the first ones [all]")
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a text [%(default)s]")
    return parser


def parser() -> argparse.ArgumentParser:
    choices = {"dtypes": DTYPES, "peers": [*peers.PEERS, "embedft-float32"]}
    parser = add_texts(make_parser("encode", __doc__, rounds=5, data=suite.PUBLISHED, **choices))
    parser.add_argument("--peer-batch", type=int, default=32, metavar="N", help="texts of a peer's batch [its default]")
    sizes = ", ".join(f"{n:,}" for n in SCALES)
    parser.add_argument("--scaling", action="store_true", help=f"time per token for {sizes} texts of the first case")
    return parser


if __name__ == "__main__":
    suite.run(main, parser())
