"""Training steps against sentence-transformers': plain, with gradient caching, Matryoshka, and LoRA.

Ours are steps of `finetune`, with everything that it does between them: tokenizing, packing and logging, whose share of
the time is shown. The peer's are steps of its model and loss (LoRA: through PEFT) with the same batches, optimizer
and clipping, without the overhead of its trainer. Both have float32 weights; lower precisions are those of autocast.
Before timing, the losses of the first batch must agree (dropout off); then both train with their own default dropout
(the peer also drops attention weights, embedft only hidden activations). The peer `embedft-float32` shows what --dtype
gains.

    python -m benchmarks.bench_train --rounds 5
    python -m benchmarks.bench_train --mode plain --dtype bfloat16 --peer sentence-transformers-bf16 embedft-float32
    python -m benchmarks.bench_train --mode plain --device cuda --dtype bfloat16 --config '{"batch_size": 512}'
"""

import argparse
import dataclasses
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from embedft import FinetuneConfig, RetrievalDataset, build_loss, finetune, load_embedder
from embedft.config import from_dict
from embedft.data.batches import make_batches
from embedft.data.collate import Batch
from embedft.device import release_memory
from embedft.training.optim import build_optimizer
from embedft.training.precision import autocast, make_scaler
from embedft.training.train import RELEASE_EVERY
from experiments.repro_matryoshka_finance import matryoshka_dims, read_rows, split_rows

from . import peers, suite
from .bench_encode import load_base, start_workers
from .suite import Row, load_data, make_parser, matrix_rate, measure, published, require_close

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.05}
LORA, MINI_BATCH_TOKENS = {"rank": 8, "alpha": 16}, 2_048


class Mode(NamedTuple):
    data: str  # which published data
    steps: int  # in a timed round
    # Operations of a step, in forward passes: a backward pass takes two, without gradients of weights one.
    passes: float
    config: dict[str, Any]  # of `FinetuneConfig`


MODES = {
    "plain": Mode("lyft_uber", 4, 3, {"batch_size": 10, "weight_decay": 0.01}),
    "cached": Mode("finance_qa", 1, 4, {"batch_size": 128, "mini_batch_tokens": MINI_BATCH_TOKENS}),
    "matryoshka": Mode("finance_qa", 4, 3, {"batch_size": 32, "loss": {"name": "matryoshka"}}),
    "lora": Mode("lyft_uber", 4, 2, {"batch_size": 10, "lora": LORA}),
}


class Ours:
    """`finetune`, in a thread that waits after each step until it may take another."""

    def __init__(self, name: str, mode: str, model: str, out: str, options: argparse.Namespace):
        self.embedder = load_embedder(model, max_length=options.max_length, device=options.device)
        self.dataset, self.config = load_dataset(mode, options), make_config(mode, model, options)
        if name == "embedft-float32":
            self.config = dataclasses.replace(self.config, precision="float32")
        self.out = f"{out}-{name}"
        self.may, self.did, self.error = threading.Semaphore(0), threading.Semaphore(0), None
        self.records: list[dict[str, Any]] = []
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        self.may.acquire()
        try:
            finetune(self.embedder, self.dataset, self.config, out=self.out, on_step=self._stepped)
        except Exception as error:  # raised by `steps`, in the thread that waits
            self.error = error
            self.did.release()

    def _stepped(self, state: Any, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.did.release()
        self.may.acquire()

    def first_loss(self) -> float:
        batch, loss = next(batches(self.dataset, self.embedder.pack, self.config)), build_loss(self.config.loss)
        with torch.no_grad():
            return loss(*self.embedder.embed_pair(batch.queries, batch.documents), batch.targets).item()

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.may.release()
            self.did.acquire()
            if self.error is not None:
                raise self.error

    def last_records(self, number: int) -> list[dict[str, Any]]:
        return self.records[-number:]

    def flops_per_token(self) -> float:
        """Of a forward pass, over the texts of the first batch."""
        batch = next(batches(self.dataset, self.embedder.pack, self.config))
        lengths = torch.cat([batch.queries.lengths(), batch.documents.lengths()]).numpy()
        return suite.flops_of(self.embedder.encoder, lengths) / lengths.sum()


class SentenceTransformers:
    """The same steps with the peer's model and loss on the same texts; memory is released for it, too."""

    def __init__(self, name: str, mode: str, model: str, out: str, options: argparse.Namespace):
        from sentence_transformers.sentence_transformer import losses

        given = {"device": options.device, "max_length": options.max_length, "training": True}
        self.model, self.device = peers.load_peer(name, model, **given), torch.device(options.device)
        self.config, self.num_steps = make_config(mode, model, options), 0
        self.dtype = peers.dtype_of(name, options.dtype)
        if mode == "lora":
            from peft import LoraConfig

            self.model.add_adapter(LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear"))
        if mode == "cached":
            tokens = self.config.mini_batch_tokens
            self.loss = losses.CachedMultipleNegativesRankingLoss(self.model, mini_batch_num_tokens=tokens)
        else:
            self.loss = losses.MultipleNegativesRankingLoss(self.model)
        if mode == "matryoshka":
            self.loss = losses.MatryoshkaLoss(self.model, self.loss, self.config.loss["dims"])
        dataset = load_dataset(mode, options)
        self.batches = batches(dataset, lambda texts, *, role: texts, self.config)
        self.first = next(batches(dataset, lambda texts, *, role: texts, self.config))
        settings = {"lr": self.config.lr, "weight_decay": self.config.weight_decay}
        self.optimizer = build_optimizer(self.model, **settings)
        self.scaler = make_scaler(self.dtype, self.device)

    def loss_of(self, batch: Batch) -> torch.Tensor:
        features = [self.model.preprocess(texts) for texts in (batch.queries, batch.documents)]
        features = [{k: v.to(self.device) if torch.is_tensor(v) else v for k, v in f.items()} for f in features]
        with autocast(self.dtype, self.device)():
            return self.loss(features, None)

    def first_loss(self) -> float:
        self.model.eval()
        with torch.no_grad():
            return self.loss_of(self.first).item()

    def steps(self, number: int) -> None:
        self.model.train()
        for _ in range(number):
            self.scaler.scale(self.loss_of(next(self.batches))).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.num_steps += 1
            if self.num_steps % RELEASE_EVERY == 0:
                release_memory(self.device)


def load_dataset(mode: str, options: argparse.Namespace) -> RetrievalDataset:
    """The training set: Lyft's, the finance questions', or the user's."""
    if MODES[mode].data == "lyft_uber":
        return load_data("lyft_uber", "train_dataset.json", options.data)
    if own := suite.own_data(options.data):
        return own
    file = published("finance_qa", options.data) / "Financial-QA-10k.csv"
    return split_rows(*read_rows(file), keep_back=False).train


def make_config(mode: str, model: str, options: argparse.Namespace) -> FinetuneConfig:
    settings = {"epochs": 1_000, "checkpoint_every": 10**9, "lr": 2e-5, "no_duplicates": True, "seed": 0}
    settings |= MODES[mode].config | {"precision": options.dtype} | json.loads(options.config)
    if settings.get("loss", {}).get("name") == "matryoshka":
        dims = matryoshka_dims(load_embedder(model, device="cpu").full_dim)
        settings["loss"] = {"name": "matryoshka", "dims": dims, "inner": {"name": "in_batch_negatives"}}
    return from_dict(FinetuneConfig, settings)


def batches(dataset: RetrievalDataset, pack: Any, config: FinetuneConfig) -> Iterator[Batch]:
    given = {"batch_size": config.batch_size, "seed": config.seed, "no_duplicates": True}
    found = make_batches(dataset, pack, **given)
    return (batch for epoch in range(config.epochs) for batch in found.epoch(epoch))


def rows_of(mode: str, folder: str, out: str, options: argparse.Namespace) -> list[Row]:
    workers = start_workers(options, mode, folder, out, ours=Ours, theirs=SentenceTransformers)
    losses = {name: worker.call("first_loss") for name, worker in workers.items()}
    differences = {}
    for name in list(losses)[1:]:
        peer = name.partition(" ")[0]
        theirs = "float32" if peer == "embedft-float32" else peers.dtype_of(peer, options.dtype)
        tolerance = max(TOLERANCE[options.dtype], TOLERANCE[theirs])
        differences[name] = require_close(mode, losses["embedft"], losses[name], tolerance, "losses")
    steps, case = MODES[mode].steps, f"{mode}, {MODES[mode].steps} steps"
    rate = workers["embedft"].call(matrix_rate, options.device, options.dtype)
    rows = measure(mode, workers, "steps", steps, rounds=options.rounds, differences=differences)
    records = workers["embedft"].call("last_records", steps * options.rounds)
    tokens = sum(record["tokens"] for record in records) / options.rounds
    flops = tokens * MODES[mode].passes * workers["embedft"].call("flops_per_token")
    inside = sum(record["seconds"] for record in records)
    for row in rows:
        row.case, row.tokens, row.flops, row.matrix_flops_per_second = case, int(tokens), int(flops), rate
        row.more["outside_steps"] = 1 - inside / sum(row.seconds)  # tokenizing, packing and logging
    for worker in workers.values():
        worker.close()
    return rows


def main(options: argparse.Namespace) -> list[Row]:
    folder = str(load_base(options).source.folder)
    with tempfile.TemporaryDirectory() as place:
        return [row for mode in options.mode for row in rows_of(mode, folder, str(Path(place, mode)), options)]


def parser() -> argparse.ArgumentParser:
    choices = {"dtypes": [*TOLERANCE], "peers": [*peers.TRAINING, "embedft-float32"]}
    found = make_parser("train", __doc__, rounds=5, data=suite.PUBLISHED, **choices)
    found.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES, help="what to train [all]")
    found.add_argument("--config", default="{}", metavar="JSON", help="other settings, as of `embedft finetune`")
    found.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a text [%(default)s]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
