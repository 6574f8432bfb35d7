"""A training step against sentence-transformers': Lyft's questions, in-batch negatives, 512 tokens, batch 10.

The peer is its model with MultipleNegativesRankingLoss under the same optimizer, clipping and precision, without the
overhead of its trainer. Before timing, the losses of the first batch must agree (dropout off); then both train with
their own default dropout (the peer also drops attention weights, embedft only hidden activations).

    python -m benchmarks.bench_train --rounds 20
"""

import argparse

import torch

from embedft import RetrievalDataset, build_loss, load_embedder
from embedft.data.batches import make_batches
from embedft.device import release_memory
from embedft.retrieval.tables import format_table
from embedft.training.optim import build_optimizer
from embedft.training.train import RELEASE_EVERY
from experiments.commandline import make_parser, run
from experiments.sources import find_data

from .workers import Worker, alternate, machine, ratios, spread

MAX_LENGTH, BATCH_SIZE, LR, WEIGHT_DECAY, SEED, TOLERANCE = 512, 10, 2e-5, 0.01, 0, 1e-5


class Ours:
    """One step as in training/train.py, releasing memory as often."""

    def __init__(self, model: str, train_file: str):
        self.embedder = load_embedder(model, max_length=MAX_LENGTH, device="cpu")
        self.model, self.loss = self.embedder, build_loss({"name": "in_batch_negatives"})
        batches = make_batches(RetrievalDataset.load(train_file), self.embedder.pack, batch_size=BATCH_SIZE, seed=SEED)
        self.batches = (batch for epoch in range(100) for batch in batches.epoch(epoch) if _distinct(batch))
        self.optimizer = build_optimizer(self.embedder, lr=LR, weight_decay=WEIGHT_DECAY)
        self.batch, self.num_steps = next(self.batches), 0

    def loss_of_batch(self) -> torch.Tensor:
        Q, D = self.embedder.embed_pair(self.batch.queries, self.batch.documents)
        return self.loss(Q, D, self.batch.targets)

    def first_loss(self) -> float:
        self.model.eval()
        with torch.no_grad():
            value = self.loss_of_batch().item()
        self.model.train()
        return value

    def step(self) -> None:
        self.loss_of_batch().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        if self.num_steps % RELEASE_EVERY == 0:
            release_memory(torch.device("cpu"))
        self.batch = next(self.batches)


class SentenceTransformers(Ours):
    """The same step with the peer's model and loss on the same texts; memory is released for it too."""

    def __init__(self, model: str, train_file: str):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        self.dataset = RetrievalDataset.load(train_file)
        self.model = SentenceTransformer(model, device="cpu")
        self.model.max_seq_length = MAX_LENGTH
        self.peer_loss = MultipleNegativesRankingLoss(self.model)
        batches = make_batches(self.dataset, lambda texts, *, role: texts, batch_size=BATCH_SIZE, seed=SEED)
        self.batches = (batch for epoch in range(100) for batch in batches.epoch(epoch) if _distinct(batch))
        self.optimizer = build_optimizer(self.model, lr=LR, weight_decay=WEIGHT_DECAY)
        self.batch, self.num_steps = next(self.batches), 0

    def loss_of_batch(self) -> torch.Tensor:
        features = [self.model.preprocess(texts) for texts in (self.batch.queries, self.batch.documents)]
        return self.peer_loss(features, None)


def _distinct(batch) -> bool:
    """Whether no document is in the batch twice; the peer would make it a negative of its own question."""
    return len(batch.document_ids) == BATCH_SIZE


def main(options: argparse.Namespace) -> None:
    train_file = str(find_data("lyft_uber", options.data) / "train_dataset.json")
    folder = str(load_embedder(options.base, device="cpu").source.folder)
    workers = {"embedft": Worker(Ours, folder, train_file), "peer": Worker(SentenceTransformers, folder, train_file)}
    losses = {name: worker.call("first_loss") for name, worker in workers.items()}
    difference = abs(losses["embedft"] - losses["peer"])
    if not difference <= TOLERANCE:
        raise ValueError(f"the first losses are {losses}, expected a difference of at most {TOLERANCE:.0e}")
    seconds = alternate(workers, "step", rounds=options.rounds, warmup=2)
    memory = {name: worker.peak_bytes / 2**30 for name, worker in workers.items()}
    rows = [
        [
            "seconds per step",
            spread(seconds["embedft"]),
            spread(seconds["peer"]),
            spread(ratios(seconds["peer"], seconds["embedft"])),
        ],
        [
            "peak memory, GiB",
            f"{memory['embedft']:.2f}",
            f"{memory['peer']:.2f}",
            f"{memory['peer'] / memory['embedft']:.2f}",
        ],
    ]
    print(format_table(["", "embedft", "sentence-transformers", "peer / embedft"], rows))
    print(f"\nmedian [min, max] of {options.rounds} alternating steps; first losses differ by {difference:.1e};")
    print(f"{options.base}, batch {BATCH_SIZE}, {MAX_LENGTH} tokens, float32;")
    print(machine())


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_train", __doc__)
    parser.add_argument("--data", metavar="DIR", help="folder with train_dataset.json [beside the checkout]")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each [20]")
    run(main, parser)
