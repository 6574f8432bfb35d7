"""Retrieval on Lyft/Uber without training: one vector, windows, BM25 and their fusion.

Measured on 790 questions about Uber's 10-K, which has 395 chunks of about 660 tokens. Rows of the tables:
- published: two models with one vector per chunk, untrained (LlamaIndex, "Fine-Tuning Embeddings for RAG with Synthetic
  Data", August 2023)
- one vector: the base at 512 tokens, fewer than most chunks have; every other row is compared with it
- windows: 128 tokens, one every 64; a chunk's score is that of its best window
- BM25 over the base's tokens, over words, and over tokens and pairs: each two neighbours are one more term
- BM25 (over tokens) or pairs + vectors: z-score fusion with the weight that has the best MRR@10 on the 668 questions
  about Lyft's 10-K
- with --tuned: the mean over fine-tuned models, one per seed

    python -m experiments.baselines_lyft_uber
    python -m experiments.baselines_lyft_uber --tuned runs/repro_finetune_lyft_uber/*/s?/model

Each text is embedded once; a second run reads all vectors from the store.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from embedft import Report, RetrievalDataset, Run, bm25_run, evaluate, evaluate_run, fuse, load_embedder
from embedft.retrieval.metrics import Qrels, judge, measure
from embedft.retrieval.significance import holm
from embedft.retrieval.tables import format_table

from .commandline import make_parser, run
from .report import compare_recipes, difference_cells
from .repro_finetune_lyft_uber import ADA_HIT_RATE, MAX_LENGTH
from .repro_finetune_lyft_uber import PUBLISHED as PUBLISHED_BGE
from .sources import find_data

PUBLISHED = {
    "text-embedding-ada-002": {"hit_rate@5": ADA_HIT_RATE},
    "bge-small-en": {metric: base for metric, (base, _) in PUBLISHED_BGE.items()},
}
METRICS = ("hit_rate@5", "accuracy@1", "mrr@10", "ndcg@10", "map@100")
COMPARED = ("hit_rate@5", "mrr@10")
PASSAGES = (128, 64)
CHOOSE = "mrr@10"


def main(options: argparse.Namespace) -> None:
    folder = find_data("lyft_uber", options.data)
    lyft, uber = (RetrievalDataset.load(folder / name) for name in ("train_dataset.json", "val_dataset.json"))
    embedder, *tuned = (
        load_embedder(name, max_length=MAX_LENGTH, store=options.store) for name in (options.base, *options.tuned)
    )
    # Runs on Lyft, to choose the fusion weights, and on Uber.
    bm25 = [bm25_run(dataset, tokenize=embedder.tokenize) for dataset in (lyft, uber)]
    pairs = [bm25_run(dataset, tokenize=embedder.tokenize, ngram=2) for dataset in (lyft, uber)]
    one_vector = [evaluate(embedder, dataset).run for dataset in (lyft, uber)]
    windows = [evaluate(embedder, dataset, passages=PASSAGES).run for dataset in (lyft, uber)]
    runs = {
        "one vector": one_vector[1],
        "windows": windows[1],
        "BM25, tokens": bm25[1],
        "BM25, words": bm25_run(uber),
        "BM25, tokens and pairs": pairs[1],
    }
    for words, (on_lyft, on_uber) in (("BM25", bm25), ("pairs", pairs)):
        for name, dense in (("one vector", one_vector), ("windows", windows)):
            weights = choose_weight([on_lyft, dense[0]], lyft.all_qrels())
            fused = fuse([on_uber, dense[1]], method="zscore", weights=weights)
            runs[f"{weights[0]:g} {words} + {weights[1]:g} {name}"] = fused
    reports = {name: [evaluate_run(run, uber)] for name, run in runs.items()}
    if tuned:
        reports["fine-tuned, one vector"] = [evaluate(model, uber) for model in tuned]
        reports["fine-tuned, windows"] = [evaluate(model, uber, passages=PASSAGES) for model in tuned]

    print(format_values(reports))
    print(f"\n{format_differences(reports)}")
    size, stride = PASSAGES
    print(
        f"\n{len(uber.queries)} questions against {len(uber.corpus)} chunks; base: {options.base}, with one vector per "
        f"chunk (up to {MAX_LENGTH} tokens)\nor windows of {size} tokens, one every {stride}; BM25 over the base's "
        f"tokens unless the row says otherwise; z-score fusion, weights chosen on Lyft."
    )
    if tuned:
        print(f"Fine-tuned: mean over {len(tuned)} seeds, intervals and p-values for new seeds and new questions.")
    print(
        "Published: untrained, LlamaIndex, August 2023. Intervals cluster questions by document; p-values are "
        "Holm-adjusted over the rows.\nThe LLM that wrote these questions reused the chunks' words, which favours word "
        "matching:\nBM25 is stronger here than on users' questions."
    )


def choose_weight(runs: Sequence[Run], qrels: Qrels, *, metric: str = CHOOSE) -> tuple[float, float]:
    """Weights (w, 1 - w), w in 0, 0.1, ..., 1, that give the z-score fusion of two runs the best mean metric.

    Ties go to the w nearest to one half. Choose on training questions; choosing on test questions flatters the result.
    """
    _, _, cutoff = metric.partition("@")
    depth = int(cutoff) if cutoff.isdecimal() else None
    found = {}
    for weight in (i / 10 for i in range(11)):
        fused = fuse(runs, method="zscore", weights=(weight, 1 - weight), depth=depth)
        (values_Q,) = measure(judge(fused, qrels), [metric]).values()
        found[weight] = round(float(values_Q.mean()), 12)  # equal means may differ in their last bits
    best = min(found, key=lambda weight: (-found[weight], abs(weight - 0.5)))
    return best, round(1 - best, 12)


def format_values(reports: Mapping[str, Sequence[Report]]) -> str:
    """A table of each name's metrics, averaged over its reports, below the published figures."""
    values = {f"{name}, published": row for name, row in PUBLISHED.items()}
    for name, found in reports.items():
        values[name] = {metric: np.mean([report.metrics[metric] for report in found]) for metric in METRICS}
    rows = [
        [name, *(f"{row[metric]:.4f}" if metric in row else "" for metric in METRICS)] for name, row in values.items()
    ]
    return format_table(["Uber", *METRICS], rows)


def format_differences(reports: Mapping[str, Sequence[Report]]) -> str:
    """A table of each name's differences from the first, with intervals and Holm-adjusted p-values."""
    base, *names = reports
    rows = {name: [name] for name in names}
    for metric in COMPARED:
        comparisons = [compare_recipes(reports[base], reports[name], metric=metric) for name in names]
        adjusted = holm([comparison.p_value for comparison in comparisons])
        for row, comparison, p_value in zip(rows.values(), comparisons, adjusted, strict=True):
            row += difference_cells(dataclasses.replace(comparison, p_value=p_value))
    header = [f"difference from {base}", *(cell for metric in COMPARED for cell in (metric, "95% interval", "p"))]
    return format_table(header, list(rows.values()))


if __name__ == "__main__":
    parser = make_parser("experiments.baselines_lyft_uber", __doc__)
    parser.add_argument("--data", metavar="DIR", help="has train_dataset.json, val_dataset.json [beside the checkout]")
    parser.add_argument("--tuned", nargs="+", default=[], metavar="MODEL", help="fine-tuned models, to show their mean")
    parser.add_argument("--store", default="runs/vectors", metavar="DIR", help="keep vectors here [%(default)s]")
    run(main, parser)
