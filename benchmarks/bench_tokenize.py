"""Turning texts into packed token ids, against sentence-transformers, which pads them in batches of similar length.

The ids of every text must be equal.

    python -m benchmarks.bench_tokenize --rounds 5
"""

import argparse

import numpy as np

from embedft import load_embedder

from . import peers, suite
from .bench_encode import add_texts, load_base, load_texts, start_workers
from .suite import Row, make_parser, measure

PEER_BATCH = 32  # texts, as in its `encode`


class Ours:
    def __init__(self, name: str, model: str, texts: dict[str, list[str]], options: argparse.Namespace):
        self.texts, self.embedder = texts, load_embedder(model, max_length=options.max_length, device="cpu")

    def tokenize(self, case: str) -> None:
        self.packed = self.embedder.pack(self.texts[case], role="document")

    def result(self) -> list[np.ndarray]:
        return np.split(self.packed.input_ids.numpy(), self.packed.cu_seqlens[1:-1].numpy())


class SentenceTransformers:
    def __init__(self, name: str, model: str, texts: dict[str, list[str]], options: argparse.Namespace):
        self.texts, self.model = texts, peers.load_peer(name, model, device="cpu", max_length=options.max_length)

    def tokenize(self, case: str) -> None:
        texts = self.texts[case]
        self.order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        batches = (self.order[i : i + PEER_BATCH] for i in range(0, len(texts), PEER_BATCH))
        self.features = [self.model.preprocess([texts[row] for row in rows]) for rows in batches]

    def result(self) -> list[np.ndarray]:
        ids = []
        for batch in self.features:
            masks = batch["attention_mask"].bool()
            ids += [row[mask].numpy() for row, mask in zip(batch["input_ids"], masks, strict=True)]
        return [ids[place] for place in np.argsort(self.order)]


def main(options: argparse.Namespace) -> list[Row]:
    options.device = "cpu"
    texts, base = load_texts(options), load_base(options)
    workers = start_workers(options, str(base.source.folder), texts, ours=Ours, theirs=SentenceTransformers)
    rows: list[Row] = []
    for case, some in texts.items():
        found = []
        for worker in workers.values():
            worker.call("tokenize", case)  # also warms up
            found.append(worker.call("result"))
        for ids in zip(some, *found, strict=True):
            if any(not np.array_equal(ids[1], theirs) for theirs in ids[2:]):
                raise ValueError(f"{case}: the token ids of {ids[0][:60]!r} differ")
        facts = {"texts": len(some), "tokens": sum(map(len, found[0]))}
        rows += measure(case, workers, "tokenize", case, rounds=options.rounds, warmup=0, **facts)
    for worker in workers.values():
        worker.close()
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser(
        "tokenize", __doc__, rounds=5, data=suite.PUBLISHED, devices=False, peers=["sentence-transformers"]
    )
    return add_texts(found)


if __name__ == "__main__":
    suite.run(main, parser())
