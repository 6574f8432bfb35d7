"""Fitting an adapter with every text embedded once, against embedding inside the loop as LlamaIndex does.

The published configuration on Lyft's 668 questions (experiments/repro_adapter_lyft_uber.py), with the same encoder:
- loop: embeds every question and chunk again in every batch of every epoch, one call per text, as LlamaIndex does
- cold: embedft from scratch, including embedding
- from_store: embedft with the vectors in a store
Each runs once, and the weights must be equal. Then come the full-corpus fit from stored vectors, and its memory with a
large corpus: steps of 64 queries against documents in a memory map.

    python -m benchmarks.bench_adapter --corpus 1000000
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from embedft import AdapterConfig, RetrievalDataset, fit_adapter, load_embedder
from experiments.repro_adapter_lyft_uber import AS_PUBLISHED, MAX_LENGTH, embed, fit

from . import suite
from .suite import Row, load_data, make_parser, require_close
from .workers import Worker, most_anonymous

TOLERANCES, STEPS, QUERIES, DIM = {"float32": 1e-5, "bfloat16": 1e-2}, 20, 64, 384
# Methods of `Fitting`: what they do; the last is the peer's way.
CASES = {"from_store": "fit, vectors in a store", "cold": "fit, from scratch", "loop": "embedding in the loop"}


def first(dataset: RetrievalDataset, number: int | None) -> RetrievalDataset:
    """The first questions, and the documents that are relevant to them; None: all, with the whole corpus."""
    if number is None:
        return dataset
    qrels = {query_id: dataset.qrels[query_id] for query_id in list(dataset.qrels)[:number]}
    corpus = {i: dataset.corpus[i] for grades in qrels.values() for i in grades}
    return RetrievalDataset({query_id: dataset.queries[query_id] for query_id in qrels}, corpus, qrels)


class Fitting:
    """Three ways to fit the published adapter; each returns its weights."""

    def __init__(self, model: str, store: str, options: argparse.Namespace):
        given = {"device": options.device, "dtype": options.dtype, "max_length": MAX_LENGTH}
        self.embedder, self.stored = load_embedder(model, **given), load_embedder(model, **given, store=store)
        # In bfloat16, as on CUDA, vectors would depend on their batch too much for the comparison.
        self.embedder.autocast = self.stored.autocast = False
        self.dataset = first(load_data("lyft_uber", "train_dataset.json", options.data), options.number)
        self.pairs = [(q, d) for q, grades in self.dataset.qrels.items() for d in grades]

    def loop(self) -> np.ndarray:
        """The algorithm of LlamaIndex's adapter trainer, written plainly: one encoder call per text."""
        weight = torch.eye(self.embedder.dim).requires_grad_()
        size, epochs = AS_PUBLISHED.batch_size, AS_PUBLISHED.epochs
        batches = [self.pairs[i : i + size] for i in range(0, len(self.pairs), size)]
        num_steps, warmup = epochs * len(batches), int(AS_PUBLISHED.warmup)
        optimizer = torch.optim.AdamW([weight], lr=AS_PUBLISHED.lr, weight_decay=AS_PUBLISHED.weight_decay)
        for step in range(num_steps):
            batch = batches[step % len(batches)]
            Q = [self.embedder.encode([self.dataset.queries[q]], role="query")[0] for q, _ in batch]
            D = [self.embedder.encode([self.dataset.corpus[d]])[0] for _, d in batch]
            Q_BD, D_BD = (torch.from_numpy(np.stack(part)) for part in (Q, D))
            scores_BB = F.normalize(Q_BD @ weight.T, dim=1) @ F.normalize(D_BD, dim=1).T / 0.05
            loss = F.cross_entropy(scores_BB, torch.arange(len(batch)))
            share = step / warmup if step < warmup else (num_steps - step) / (num_steps - warmup)
            optimizer.param_groups[0]["lr"] = AS_PUBLISHED.lr * share
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
        return weight.detach().numpy()

    def cold(self) -> np.ndarray:
        return fit(embed(self.embedder, self.dataset), AS_PUBLISHED).query.weight.detach().numpy()

    def fill(self) -> None:
        embed(self.stored, self.dataset)

    def from_store(self) -> np.ndarray:
        return fit(embed(self.stored, self.dataset), AS_PUBLISHED).query.weight.detach().numpy()

    def full_corpus(self) -> float:
        """Seconds of the fit alone, from vectors in memory."""
        vectors = embed(self.stored, self.dataset)
        start = time.perf_counter()
        fit(vectors, AdapterConfig())
        return time.perf_counter() - start


class LargeCorpus:
    """A full-corpus fit against a memory map, and its peak anonymous memory."""

    def __init__(self, path: str, num_documents: int):
        self.documents_ND = np.memmap(path, dtype=np.float32, mode="r", shape=(num_documents, DIM))
        generator = np.random.default_rng(0)
        rows = generator.choice(num_documents, QUERIES, replace=False)
        noise_QD = 0.5 / DIM**0.5 * generator.standard_normal((QUERIES, DIM), dtype=np.float32)
        self.queries_QD = self.documents_ND[rows] + noise_QD
        self.qrels = {i: {int(row): 1} for i, row in enumerate(rows)}

    def steps(self) -> tuple[float, int, int]:
        """Returns (seconds of all steps, anonymous bytes before, peak anonymous bytes)."""
        config = dataclasses.replace(AdapterConfig(), epochs=STEPS, batch_size=QUERIES)
        start = time.perf_counter()
        _, before, most = most_anonymous(lambda: fit_adapter(self.queries_QD, self.documents_ND, self.qrels, config))
        return time.perf_counter() - start, before, most


def write_corpus(path: Path, num_documents: int) -> None:
    """Writes unit vectors around a thousand centres, one slice at a time."""
    generator = np.random.default_rng(1)
    centres = generator.standard_normal((1_000, DIM), dtype=np.float32)
    documents_ND = np.memmap(path, dtype=np.float32, mode="w+", shape=(num_documents, DIM))
    for first in range(0, num_documents, 16_384):
        count = min(16_384, num_documents - first)
        part = centres[generator.integers(0, 1_000, count)] + generator.standard_normal((count, DIM), dtype=np.float32)
        documents_ND[first : first + count] = part / np.linalg.norm(part, axis=1, keepdims=True)
    documents_ND.flush()


def main(options: argparse.Namespace) -> list[Row]:
    folder = str(load_embedder(options.base, device="cpu").source.folder)
    with tempfile.TemporaryDirectory() as place:
        worker = Worker(Fitting, folder, f"{place}/store", options, device=options.device)
        worker.call("fill")
        seconds, weights = {}, {}
        for name in CASES:
            weights[name] = worker.call(name)
            seconds[name] = [worker.seconds]
        *ours, loop = CASES
        rows = []
        for name in ours:
            difference = require_close(name, weights[name], weights[loop], TOLERANCES[options.dtype], "weights")
            found = {"peer": CASES[loop], "peer_seconds": seconds[loop], "largest_difference": difference}
            rows.append(Row(CASES[name], seconds[name], **found))
        fits = [worker.call("full_corpus") for _ in range(options.rounds)]
        rows.append(Row(f"full-corpus fit, {AdapterConfig().epochs} epochs", fits))
        worker.close()
        if options.corpus:
            path = Path(place) / "corpus.f32"
            write_corpus(path, options.corpus)
            large = Worker(LargeCorpus, str(path), options.corpus)
            took, before, most = large.call("steps")
            large.close()
            case = f"{STEPS} steps of {QUERIES} queries, {options.corpus:,} x {DIM} in a memory map"
            rows.append(Row(case, [took], peak_bytes=most, more={"bytes_before": before}))
    print(f"fits of the published configuration: once each; texts of at most {MAX_LENGTH} tokens\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("adapter", __doc__, rounds=5, data=suite.PUBLISHED, dtypes=[*TOLERANCES])
    found.add_argument("--number", type=int, metavar="N", help="the first N questions and their documents only [all]")
    found.add_argument("--corpus", type=int, default=0, metavar="N", help="documents in the large corpus [0: skip it]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
