"""How OpenMP's threads should wait for each other (Linux): torch's default, passively, or spinning for a short time.

Times a training step, encoding and a single query, for `--base` and for a small BERT with the same tokenizer, on the
machine as it is and with --busy processes that compute all the time. The vectors of all variants must be equal.

    python -m benchmarks.bench_threads --rounds 5
"""

import argparse
import multiprocessing
import os
from unittest import mock

import numpy as np
import torch

from embedft import Embedder, build_loss, load_embedder
from embedft.data.batches import make_batches
from embedft.encoders.bert import Bert, BertConfig
from embedft.training.optim import build_optimizer
from embedft.training.precision import autocast

from . import suite
from .suite import Row, load_data, make_parser, measure
from .workers import Worker

VARIANTS = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "1,000 spins": {"GOMP_SPINCOUNT": "1000"}}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
MAX_LENGTH, BATCH_SIZE, NUM_QUERIES, STEPS = 256, 10, 400, 4


def load(model: str, small: bool, dtype: str) -> Embedder:
    """The model or, if `small`, a BERT of `SMALL`'s sizes, drawn at random."""
    embedder = load_embedder(model, max_length=MAX_LENGTH, device="cpu", dtype=dtype)
    if not small:
        return embedder
    sizes = SMALL | {"vocab_size": embedder.encoder.config.vocab_size, "max_position_embeddings": MAX_LENGTH}
    torch.manual_seed(0)
    return Embedder(Bert(BertConfig(**sizes)), embedder.tokenizer).to(getattr(torch, dtype))


class Contestant:
    """Trains and encodes on Lyft's and Uber's questions, or the user's. `dtype`: of the weights that encode; training
    multiplies in it."""

    def __init__(self, model: str, data: str | None, small: bool, dtype: str):
        self.embedder, self.encoding = load(model, small, "float32"), load(model, small, dtype)
        self.autocast = autocast(dtype, torch.device("cpu"))
        train, val = (load_data("lyft_uber", f"{name}_dataset.json", data) for name in ("train", "val"))
        self.queries, self.loss = list(val.queries.values())[:NUM_QUERIES], build_loss({"name": "in_batch_negatives"})
        batches = make_batches(train, self.embedder.pack, batch_size=BATCH_SIZE, seed=0)
        self.batches = (batch for epoch in range(1_000) for batch in batches.epoch(epoch))
        self.optimizer = build_optimizer(self.embedder, lr=0.0, weight_decay=0.0)

    def vector(self) -> np.ndarray:
        return self.encoding.encode(self.queries[:1], role="query", progress=False)

    def step(self) -> None:
        for _ in range(STEPS):
            batch = next(self.batches)
            with self.autocast():
                Q, D = self.embedder.embed_pair(batch.queries, batch.documents)
            self.loss(Q, D, batch.targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def encode(self) -> None:
        self.encoding.encode(self.queries, role="query", progress=False)

    def query(self) -> None:
        for _ in range(10):
            self.vector()


def start(variables: dict[str, str], *arguments) -> Worker:
    """A worker in an environment with these variables, which OpenMP reads when a process starts."""
    with mock.patch.dict(os.environ):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            os.environ.pop(name, None)
        os.environ.update(variables)
        return Worker(Contestant, *arguments)


def spin() -> None:
    while True:
        pass


def main(options: argparse.Namespace) -> list[Row]:
    if options.busy < 1:
        raise ValueError(f"--busy is {options.busy}, expected at least 1")
    load_data("lyft_uber", "train_dataset.json", options.data)  # an error now, not in a worker
    base = str(load_embedder(options.base, device="cpu").source.folder)
    rows = []
    for model in options.models:
        given = base, options.data, model == "small", options.dtype
        workers = {name: start(variables, *given) for name, variables in VARIANTS.items()}
        vectors = [worker.call("vector") for worker in workers.values()]
        if any(not np.array_equal(vectors[0], other) for other in vectors):
            raise ValueError("the vectors of the variants differ, expected equal ones")
        for busy in (0, options.busy):
            others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(busy)]
            for other in others:
                other.start()
            for method in ("step", "encode", "query"):
                case = f"{model}, {'busy' if busy else 'idle'} machine: {method}"
                rows += measure(case, workers, method, rounds=options.rounds)
            for other in others:
                other.kill()
        for worker in workers.values():
            worker.close()
    print(
        f"ours: torch's default; peers: other ways to wait. {MAX_LENGTH} tokens, {STEPS} steps of {BATCH_SIZE} pairs,"
    )
    print(f"{NUM_QUERIES} questions, ten single queries; busy: {options.busy} more processes, {os.cpu_count()} cores\n")
    return rows


def parser() -> argparse.ArgumentParser:
    given = {"data": suite.PUBLISHED, "devices": False, "dtypes": ("float32", "bfloat16")}
    found = make_parser("threads", __doc__, rounds=5, **given)
    found.add_argument("--busy", type=int, default=1, metavar="N", help="processes of the busy machine [%(default)s]")
    models = {"nargs": "+", "choices": ["base", "small"], "default": ["base", "small"]}
    found.add_argument("--models", **models, help="--base, the small BERT [both]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
