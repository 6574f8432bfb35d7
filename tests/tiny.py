"""A tiny training setup: the tiny BERT of conftest.py as an Embedder, and questions for it to learn.

embedder = make_embedder(tmp_path / "base")
finetune(embedder, make_dataset(), ...)
"""

import random
from pathlib import Path

from conftest import LETTERS, write_tiny_folder

from embedft import Embedder, RetrievalDataset, load_embedder

# Fields of train.jsonl that differ from run to run.
MEASURED = ("seconds", "wait_seconds", "wait_share", "refresh_seconds", "peak_bytes")


def make_embedder(folder: Path, *, dropout: float = 0.1, **options) -> Embedder:
    """Loads the tiny BERT from `folder`, writing it if needed; `options` are those of `load_embedder`."""
    if not folder.is_dir():
        write_tiny_folder(folder, hidden_dropout_prob=dropout)
    return load_embedder(folder, device="cpu", **options)


def make_dataset(
    num_queries: int = 12, num_documents: int = 9, *, seed: int = 0, negatives: int = 0
) -> RetrievalDataset:
    """Query i quotes document i mod `num_documents`, its only relevant one; the next documents are hard negatives."""
    generator = random.Random(seed)
    corpus = {f"d{j}": " ".join(generator.choices(LETTERS, k=generator.randint(4, 12))) for j in range(num_documents)}
    queries, qrels, hard = {}, {}, {}
    for i in range(num_queries):
        j = i % num_documents
        queries[f"q{i}"] = " ".join([*generator.sample(corpus[f"d{j}"].split(), 3), generator.choice(LETTERS)])
        qrels[f"q{i}"] = {f"d{j}": 1}
        hard[f"q{i}"] = [f"d{(j + 1 + n) % num_documents}" for n in range(negatives)]
    return RetrievalDataset(queries, corpus, qrels, hard if negatives else {})
