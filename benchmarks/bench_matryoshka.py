"""A Matryoshka step against sentence-transformers': batches of 32 finance pairs at their real lengths.

Matryoshka over in-batch negatives, from the full width to a twelfth of it. The peer is its model with MatryoshkaLoss
over MultipleNegativesRankingLoss, compared as in bench_train.py.

    python -m benchmarks.bench_matryoshka --rounds 20
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from embedft import build_loss, load_embedder
from embedft.data.batches import make_batches
from embedft.data.collate import Batch
from embedft.retrieval.tables import format_table
from embedft.training.optim import build_optimizer
from experiments.commandline import make_parser, run
from experiments.repro_matryoshka_finance import BATCH_SIZE, matryoshka_dims, read_rows, split_rows
from experiments.sources import find_data

from . import bench_train
from .workers import Worker, alternate, machine, ratios, spread

LR, SEED, TOLERANCE = 2e-5, 0, 1e-5


class Ours(bench_train.Ours):
    """One step as in training/train.py."""

    def __init__(self, model: str, file: str):
        self.embedder = load_embedder(model, device="cpu")
        dims = matryoshka_dims(self.embedder.full_dim)
        self.model = self.embedder
        self.loss = build_loss({"name": "matryoshka", "dims": dims, "inner": {"name": "in_batch_negatives"}})
        self.start(_batches(file, self.embedder.pack))

    def start(self, batches: Iterator[Batch]) -> None:
        """Takes the first batch and builds the optimizer."""
        self.optimizer = build_optimizer(self.model, lr=LR, weight_decay=0.0)
        self.batches, self.batch, self.num_steps = batches, next(batches), 0


class SentenceTransformers(Ours):
    """The same step with the peer's model and losses, on the same texts."""

    def __init__(self, model: str, file: str):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

        self.model = SentenceTransformer(model, device="cpu")
        dims = matryoshka_dims(self.model.get_embedding_dimension())
        self.peer_loss = MatryoshkaLoss(self.model, MultipleNegativesRankingLoss(self.model), dims)
        self.start(_batches(file, lambda texts, *, role: texts))

    loss_of_batch = bench_train.SentenceTransformers.loss_of_batch


def _batches(file: str, pack: Callable[..., Any]) -> Iterator[Batch]:
    train_set = split_rows(*read_rows(file), keep_back=False).train
    batches = make_batches(train_set, pack, batch_size=BATCH_SIZE, seed=SEED, no_duplicates=True)
    return (batch for epoch in range(100) for batch in batches.epoch(epoch))


def main(options: argparse.Namespace) -> None:
    file = str(find_data("finance_qa", options.data) / "Financial-QA-10k.csv")
    folder = str(load_embedder(options.base, device="cpu").source.folder)
    workers = {"embedft": Worker(Ours, folder, file), "peer": Worker(SentenceTransformers, folder, file)}
    losses = {name: worker.call("first_loss") for name, worker in workers.items()}
    difference = abs(losses["embedft"] - losses["peer"]) / losses["peer"]
    if not difference <= TOLERANCE:
        raise ValueError(f"the first losses are {losses}, expected a relative difference of at most {TOLERANCE:.0e}")
    seconds = alternate(workers, "step", rounds=options.rounds, warmup=2)
    memory = {name: worker.peak_bytes / 2**30 for name, worker in workers.items()}
    slower = ratios(seconds["peer"], seconds["embedft"])
    ours, peer = memory["embedft"], memory["peer"]
    rows = [
        ["seconds per step", spread(seconds["embedft"]), spread(seconds["peer"]), spread(slower)],
        ["peak memory, GiB", f"{ours:.2f}", f"{peer:.2f}", f"{peer / ours:.2f}"],
    ]
    print(format_table(["", "embedft", "sentence-transformers", "peer / embedft"], rows))
    print(f"\nmedian [min, max] of {options.rounds} alternating steps; relative difference of the first losses")
    print(f"{difference:.1e}; {options.base}, batch {BATCH_SIZE}, float32;")
    print(machine())
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_matryoshka", __doc__)
    parser.add_argument("--data", metavar="DIR", help="has Financial-QA-10k.csv [beside the checkout]")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each [20]")
    run(main, parser)
