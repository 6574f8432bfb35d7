"""Large batches by gradient caching, against sentence-transformers' CachedMultipleNegativesRankingLoss.

Measures time per pair at several batch sizes, with mini-batches of constant size. Texts have 32 tokens, drawn from the
model's vocabulary, or are the first pairs of --data. The peer uses mini-batches of as many tokens, the same optimizer
and clipping, and no trainer. Before timing, the first losses and gradient norms must agree (dropout off). Then measures
the peak memory of one step in fresh processes, without that of the vectors Q and D.

    python -m benchmarks.bench_batch --rounds 5 --memory 512 8192
    python -m benchmarks.bench_batch --device cuda --dtype bfloat16 --sizes 8192 32768
"""

import argparse
import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence

import torch

from embedft import Embedder, Targets, build_loss, load_embedder
from embedft.device import release_memory
from embedft.training.cached import cached_backward
from embedft.training.optim import build_optimizer
from embedft.training.precision import autocast

from . import peers, suite
from .bench_encode import start_workers
from .suite import Row, make_parser, measure, require_close
from .workers import Worker

TEXT_TOKENS, MINI_BATCH_TOKENS, LR, WEIGHT_DECAY = 32, 2_048, 2e-5, 0.01
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}  # of losses and gradient norms
PASSES = 4  # forward twice, and a backward pass of twice a forward pass's operations
PEERS = ["sentence-transformers", "sentence-transformers-bf16"]


def make_texts(embedder: Embedder, count: int, seed: int) -> list[str]:
    """Texts of 32 tokens, special tokens included: 30 words of one token each."""
    vocabulary = embedder.tokenizer.backend.get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalnum() and len(word) > 2)
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=TEXT_TOKENS - 2)) for _ in range(count)]


def make_pairs(embedder: Embedder, data: str | None, size: int) -> list[Sequence[str]]:
    """Queries and documents: drawn, or the first of the data set --data."""
    own = suite.own_data(data)
    if own is None:
        texts = make_texts(embedder, 2 * size, seed=size)
        return [texts[:size], texts[size:]]
    found = [
        (own.queries[q], own.texts[d]) for q, grades in own.qrels.items() for d, grade in grades.items() if grade > 0
    ]
    if len(found) < size:
        raise ValueError(f"{data} has {len(found):,} pairs, expected at least {size:,}")
    return [*zip(*found[:size], strict=True)]


class Ours:
    """Steps of training/train.py with `mini_batch_tokens`."""

    def __init__(self, name: str, model: str, options: argparse.Namespace):
        self.embedder = self.model = load_embedder(model, device=options.device)
        self.loss = build_loss({"name": "in_batch_negatives"})
        self.start(options, options.dtype)

    def start(self, options: argparse.Namespace, dtype: str) -> None:
        self.data, self.device = options.data, torch.device(options.device)
        self.autocast = autocast(dtype, self.device)
        self.optimizer = build_optimizer(self.model, lr=LR, weight_decay=WEIGHT_DECAY)

    def prepare(self, size: int) -> None:
        """Makes the batch for the calls that follow; query i's document is document i."""
        pairs = make_pairs(self.embedder, self.data, size)
        packed = (self.embedder.pack(part, role="document") for part in pairs)
        self.batch = *packed, Targets(torch.arange(size, device=self.device)[:, None])

    def backward(self) -> torch.Tensor:
        settings = {"mini_batch_tokens": MINI_BATCH_TOKENS, "autocast": self.autocast}
        return cached_backward(self.embedder, *self.batch, self.loss, **settings)

    def outcome(self) -> tuple[float, float]:
        """Loss and gradient norm, without dropout."""
        self.model.eval()
        value = self.backward().item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        self.optimizer.zero_grad()
        return value, norm

    def step(self) -> None:
        self.model.train()
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        release_memory(self.device)


class SentenceTransformers(Ours):
    """The same step with the peer's model and loss on the same texts; memory is released for it too."""

    def __init__(self, name: str, model: str, options: argparse.Namespace):
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.util import batch_to_device

        self.embedder = load_embedder(model, device="cpu")
        self.model = peers.load_peer(name, model, device=options.device, training=True)
        self.loss = CachedMultipleNegativesRankingLoss(self.model, mini_batch_num_tokens=MINI_BATCH_TOKENS)
        self.to_device = batch_to_device
        self.start(options, peers.dtype_of(name, options.dtype))

    def prepare(self, size: int) -> None:
        parts = (self.model.preprocess(list(part)) for part in make_pairs(self.embedder, self.data, size))
        self.batch = tuple(self.to_device(part, self.device) for part in parts)

    def backward(self) -> torch.Tensor:
        with self.autocast():
            # The loss adds keys to the features it gets.
            value = self.loss([dict(features) for features in self.batch], None)
        value.backward()
        return value.detach()


def time_rows(options: argparse.Namespace, embedder: Embedder) -> list[Row]:
    """Rows per batch size, with our milliseconds per pair and their ratio to those of the smallest size."""
    workers = start_workers(options, str(embedder.source.folder), ours=Ours, theirs=SentenceTransformers)
    rows: list[Row] = []
    sizes = sorted(options.sizes)
    for worker in workers.values():
        worker.call("prepare", sizes[0])
    ours, *others = (worker.call("outcome") for worker in workers.values())
    for name, theirs in zip(list(workers)[1:], others, strict=True):
        dtypes = options.dtype, peers.dtype_of(name.partition(" ")[0], options.dtype)
        for what, *values in zip(("first losses", "gradient norms"), ours, theirs, strict=True):
            require_close("cached step", *values, max(TOLERANCES[dtype] for dtype in dtypes), what)
    facts = {"matrix_flops_per_second": workers["embedft"].call(suite.matrix_rate, options.device, options.dtype)}
    for size in sizes:
        for worker in workers.values():
            worker.call("prepare", size)
        parts = [embedder.pack(part, role="document") for part in make_pairs(embedder, options.data, size)]
        lengths = torch.cat([part.lengths() for part in parts]).numpy()
        facts |= {"texts": 2 * size, "tokens": int(lengths.sum())}
        facts["flops"] = PASSES * suite.flops_of(embedder.encoder, lengths)
        for row in measure(f"{size:,} pairs", workers, "step", rounds=options.rounds, **facts):
            rows.append(row)
            row.more["ms_per_pair"] = 1_000 * statistics.median(row.seconds) / size
            row.more["of_smallest"] = row.more["ms_per_pair"] / rows[0].more["ms_per_pair"]
    close(workers)
    return rows


def memory_rows(options: argparse.Namespace, embedder: Embedder) -> list[Row]:
    """A row per batch size and peer: the peak memory of a step in a fresh process, minus Q and D."""
    rows: list[Row] = []
    for size in sorted(options.memory):
        workers = start_workers(options, str(embedder.source.folder), ours=Ours, theirs=SentenceTransformers)
        vectors = 2 * size * embedder.full_dim * 4
        for worker in workers.values():
            worker.call("prepare", size)
            worker.call("step")
        (_, ours), *others = workers.items()
        row = Row(f"memory, {size:,} pairs", [ours.seconds], peak_bytes=ours.peak_bytes - vectors)
        row.more["of_smallest"] = row.peak_bytes / rows[0].peak_bytes if rows else 1.0
        rows += [
            dataclasses.replace(row, peer=name, peer_seconds=[it.seconds], peer_peak_bytes=it.peak_bytes - vectors)
            for name, it in others
        ] or [row]
        close(workers)
    return rows


def close(workers: Mapping[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()


def main(options: argparse.Namespace) -> list[Row]:
    embedder = load_embedder(options.base, device="cpu")
    rows = time_rows(options, embedder) if options.sizes else []
    rows += memory_rows(options, embedder) if options.memory else []
    print(f"mini-batches of {MINI_BATCH_TOKENS:,} tokens\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("batch", __doc__, rounds=5, data=suite.OWN, dtypes=[*TOLERANCES], peers=PEERS)
    sizes = {"type": int, "nargs": "*", "metavar": "N"}
    found.add_argument("--sizes", **sizes, default=[64, 512, 2048], help="batch sizes to time [64 512 2048]")
    found.add_argument("--memory", **sizes, default=[512], help="sizes for memory [512]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
