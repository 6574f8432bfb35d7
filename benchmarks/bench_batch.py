"""Large batches by gradient caching, against sentence-transformers' CachedMultipleNegativesRankingLoss.

Measures time per pair at several batch sizes, with mini-batches of constant size. Texts have 32 tokens, drawn from the
model's vocabulary. The peer uses mini-batches of as many texts, the same optimizer and clipping, and no trainer. Before
timing, the first losses and gradient norms must agree (dropout off). Then measures the peak memory of one step in fresh
processes.

    python -m benchmarks.bench_batch --rounds 5 --memory 512 8192
"""

import argparse
import random

import torch

from embedft import Embedder, Targets, build_loss, load_embedder
from embedft.device import release_memory
from embedft.retrieval.tables import format_table
from embedft.training.cached import cached_backward
from embedft.training.optim import build_optimizer
from experiments.commandline import make_parser, run

from .workers import Worker, alternate, machine, ratios, spread

TEXT_TOKENS, MINI_BATCH_TOKENS, LR, WEIGHT_DECAY, TOLERANCE = 32, 2_048, 2e-5, 0.01, 1e-5


def make_texts(embedder: Embedder, count: int, seed: int) -> list[str]:
    """Texts of 32 tokens, special tokens included: 30 words of one token each."""
    vocabulary = embedder.tokenizer.backend.get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=TEXT_TOKENS - 2)) for _ in range(count)]


class Ours:
    """Steps of training/train.py with `mini_batch_tokens`."""

    def __init__(self, model: str):
        self.embedder = self.model = load_embedder(model, device="cpu")
        self.loss = build_loss({"name": "in_batch_negatives"})
        self.optimizer = build_optimizer(self.model, lr=LR, weight_decay=WEIGHT_DECAY)

    def prepare(self, size: int) -> None:
        """Makes the batch for the calls that follow; query i's document is document i."""
        texts = make_texts(self.embedder, 2 * size, seed=size)
        packed = [self.embedder.pack(part, role="document") for part in (texts[:size], texts[size:])]
        if any((part.lengths() != TEXT_TOKENS).any() for part in packed):
            raise ValueError(f"not every text has {TEXT_TOKENS} tokens")
        self.batch = *packed, Targets(torch.arange(size)[:, None])

    def backward(self) -> torch.Tensor:
        return cached_backward(self.embedder, *self.batch, self.loss, mini_batch_tokens=MINI_BATCH_TOKENS)

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
        release_memory(torch.device("cpu"))


class SentenceTransformers(Ours):
    """The same step with the peer's model and loss on the same texts; memory is released for it too."""

    def __init__(self, model: str):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        self.embedder = load_embedder(model, device="cpu")
        self.model = SentenceTransformer(model, device="cpu")
        rows = MINI_BATCH_TOKENS // TEXT_TOKENS
        self.loss = CachedMultipleNegativesRankingLoss(self.model, mini_batch_size=rows)
        self.optimizer = build_optimizer(self.model, lr=LR, weight_decay=WEIGHT_DECAY)

    def prepare(self, size: int) -> None:
        texts = make_texts(self.embedder, 2 * size, seed=size)
        self.batch = tuple(self.model.preprocess(part) for part in (texts[:size], texts[size:]))

    def backward(self) -> torch.Tensor:
        # The loss adds keys to the features it gets.
        value = self.loss([dict(features) for features in self.batch], None)
        value.backward()
        return value.detach()


CONTESTANTS = {"embedft": Ours, "sentence-transformers": SentenceTransformers}


def time_rows(folder: str, sizes: list[int], rounds: int, names: list[str]) -> list[list[str]]:
    """One row per batch size: our milliseconds per pair, relative to the first row's; the peer's, relative to ours."""
    workers = {name: Worker(CONTESTANTS[name], folder) for name in names}
    for worker in workers.values():
        worker.call("prepare", sizes[0])
    outcomes = {name: worker.call("outcome") for name, worker in workers.items()}
    for what, (ours, *peer) in zip(("losses", "gradient norms"), zip(*outcomes.values(), strict=True), strict=True):
        for theirs in peer:
            if not abs(ours - theirs) <= TOLERANCE * max(1, abs(theirs)):
                raise ValueError(f"the first {what}, {ours} and {theirs}, differ by more than {TOLERANCE:.0e}")
    rows, first = [], None
    for size in sizes:
        for worker in workers.values():
            worker.call("prepare", size)
        seconds = alternate(workers, "step", rounds=rounds)
        ours, *peer = ([1_000 * s / size for s in seconds[name]] for name in names)
        first = first or sorted(ours)[len(ours) // 2]
        against = [cell for theirs in peer for cell in (spread(theirs), spread(ratios(theirs, ours)))]
        rows.append([f"{size:,}", spread(ours), spread([x / first for x in ours]), *against])
    for worker in workers.values():
        worker.close()
    return rows


def memory_rows(folder: str, sizes: list[int], names: list[str]) -> list[list[str]]:
    """One row per batch size: peak memory of a step in a fresh process, minus Q and D; its ratio to the first row's."""
    rows, first, width = [], {}, load_embedder(folder, device="cpu").full_dim
    for size in sizes:
        vectors, found = 2 * size * width * 4, {}
        for name in names:
            worker = Worker(CONTESTANTS[name], folder)
            worker.call("prepare", size)
            worker.call("step")
            found[name] = worker.peak_bytes - vectors
            worker.close()
        first = first or found
        cells = [f"{found[name] / 2**20:,.0f} ({found[name] / first[name]:.2f})" for name in names]
        rows.append([f"{size:,}", f"{vectors / 2**20:,.0f}", *cells])
    return rows


def main(options: argparse.Namespace) -> None:
    folder = str(load_embedder(options.base, device="cpu").source.folder)
    names = ["embedft"] if options.alone else list(CONTESTANTS)
    if options.sizes:
        header = ["batch", "embedft, ms per pair", f"relative to {min(options.sizes):,}"]
        header += [] if options.alone else ["sentence-transformers", "peer / embedft"]
        print(format_table(header, time_rows(folder, sorted(options.sizes), options.rounds, names)))
        print(f"\nmedian [min, max] of {options.rounds} alternating steps\n")
    if options.memory:
        header = ["batch", "Q and D, MiB", "embedft, rest in MiB", "sentence-transformers"]
        print(format_table(header[: 2 + len(names)], memory_rows(folder, sorted(options.memory), names)))
        print("\npeak memory of one step minus Q and D (and its ratio to that of the smallest batch)\n")
    print(f"{options.base}, texts of {TEXT_TOKENS} tokens, mini-batches of {MINI_BATCH_TOKENS:,}, float32;")
    print(machine())


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_batch", __doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[64, 512, 2048], metavar="N", help="batch sizes to time"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each [5]")
    parser.add_argument("--memory", type=int, nargs="*", default=[512], metavar="N", help="sizes for memory [512]")
    parser.add_argument("--alone", action="store_true", help="run embedft without the peer")
    run(main, parser)
