"""Reproduces LlamaIndex, "Fine-Tuning Embeddings for RAG with Synthetic Data" (August 2023): Lyft to Uber.

Trains on 668 questions about Lyft's 10-K of 2021 and measures on 790 about Uber's, two per chunk, all written by
gpt-3.5-turbo. Settings as published: in-batch negatives at scale 20, batch 10, 2 epochs, AdamW at 2e-5 with weight
decay 0.01, linear warmup over 10% of the steps, clipping at 1, 512 tokens. The final weights are measured; nothing is
chosen on Uber.

    python -m experiments.repro_finetune_lyft_uber --seeds 0 1 2

Finished seeds are not trained again, and killed ones resume.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedft import Embedder, FinetuneConfig, Report, RetrievalDataset, evaluate, finetune, load_embedder
from embedft.data.batches import make_batches
from embedft.files import read_json
from embedft.retrieval.tables import format_table
from embedft.training.run_folder import DONE, ENVIRONMENT, MODEL
from embedft.training.train import OnStep

from .commandline import make_parser, run
from .report import compare_recipes, difference_cells
from .sources import find_data

# bge-small-en, from the article's notebook (evaluate.ipynb): hit rate at 5, and sentence-transformers' evaluator.
PUBLISHED = {
    "hit_rate@5": (0.7873, 0.8443),
    "accuracy@1": (0.5089, 0.6076),
    "accuracy@10": (0.8139, 0.8949),
    "map@100": (0.6155, 0.7128),
}
ADA_HIT_RATE = 0.8709
METRICS = ("hit_rate@5", "accuracy@1", "accuracy@10", "mrr@10", "ndcg@10", "map@100")
BATCH_SIZE, EPOCHS, MAX_LENGTH = 10, 2, 512


def main(options: argparse.Namespace) -> None:
    folder = find_data("lyft_uber", options.data)
    lyft = RetrievalDataset.load(folder / "train_dataset.json")
    uber = RetrievalDataset.load(folder / "val_dataset.json")
    out = Path(options.out) / options.base.strip("/").replace("/", "--")

    base = evaluate(load_embedder(options.base, max_length=MAX_LENGTH), uber)
    how = {"name": "uber", "precision": options.precision}
    out = out if options.precision == "float32" else out.with_name(f"{out.name}-{options.precision}")
    tuned = [finetune_seed(options.base, lyft, uber, seed, out / f"s{seed}", **how) for seed in options.seeds]
    print(format_seeds("Uber", base, tuned, PUBLISHED))
    seeds = ", ".join(map(str, options.seeds))
    print(
        f"\nbase: {options.base}; tuned in {options.precision}: mean ± standard deviation over seeds {seeds};\n"
        f"published: bge-small-en (text-embedding-ada-002: hit_rate@5 {ADA_HIT_RATE}). Intervals and p-values are for\n"
        f"new seeds and new questions; the {base.num_queries} questions are clustered by document."
    )


def format_seeds(
    title: str, base: Report, tuned: Sequence[Report], published: Mapping[str, tuple[float, float]]
) -> str:
    """A table of base and fine-tuned (mean and standard deviation over seeds) beside the published figures.

    Intervals and p-values are for new seeds and new questions (`compare_seeds`).
    """
    rows = []
    for metric in METRICS:
        values = [report.metrics[metric] for report in tuned]
        comparison = compare_recipes([base], tuned, metric=metric)
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        rows.append(
            [
                metric,
                *([f"{value:.4f}" for value in published.get(metric, ())] or ["", ""]),
                f"{comparison.base:.4f}",
                f"{comparison.other:.4f}{spread}",
                *difference_cells(comparison),
            ]
        )
    header = [title, "published base", "published tuned", "base", "tuned", "difference", "95% interval", "p-value"]
    return format_table(header, rows)


def finetune_seed(
    base: str,
    train_set: RetrievalDataset,
    held_out: RetrievalDataset,
    seed: int,
    out: Path,
    *,
    name: str,
    on_step: OnStep | None = None,
    **changes: Any,
) -> Report:
    """Trains one seed as `train_seed` does, and returns its report on `held_out`, saved as eval/`name`.
    The final weights are measured; nothing is chosen on `held_out`."""
    report = evaluate(train_seed(base, train_set, seed, out, on_step=on_step, **changes), held_out)
    report.save(out / "eval" / name)
    return report


def train_seed(
    base: str, train_set: RetrievalDataset, seed: int, out: Path, *, on_step: OnStep | None = None, **changes: Any
) -> Embedder:
    """The model of one seed, trained unless its run folder is done, as published in 2023 but for `changes`."""
    if (out / DONE).exists():
        if read_json(out / ENVIRONMENT)["sha256"]["train"] != train_set.sha256():
            raise ValueError(f"{out}: holds a run on different training data; choose another --out")
        return load_embedder(out / MODEL)
    embedder = load_embedder(base, max_length=MAX_LENGTH)
    num_steps = EPOCHS * len(make_batches(train_set, embedder.pack, batch_size=BATCH_SIZE, seed=seed))
    config = FinetuneConfig(
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        lr=2e-5,
        weight_decay=0.01,
        warmup=num_steps // 10,
        max_length=MAX_LENGTH,
        seed=seed,
        checkpoint_every=25,
    )
    config = dataclasses.replace(config, **changes)
    return finetune(embedder, train_set, config, out=out, existing="resume", on_step=on_step)


if __name__ == "__main__":
    parser = make_parser("experiments.repro_finetune_lyft_uber", __doc__)
    parser.add_argument("--data", metavar="DIR", help="has train_dataset.json, val_dataset.json [beside the checkout]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    precisions = ("float32", "bfloat16")
    parser.add_argument("--precision", default="float32", choices=precisions, help="of training [%(default)s]")
    parser.add_argument("--out", default="runs/repro_finetune_lyft_uber", metavar="DIR", help="[%(default)s]")
    run(main, parser)
