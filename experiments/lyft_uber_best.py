"""Our best recipe for Lyft/Uber: trains on questions about Lyft's 10-K in windows, measures on those about Uber's.

Training: windows of 128 tokens, one every 64, up to four per chunk; batch 32, 3 epochs, lr 3e-5, in-batch negatives at
temperature 0.03; the last weights. Search: the mean of a chunk's best windows of 128 tokens and of 64, one every 32,
alone or in z-score fusion, each with a weight of one half, with BM25 over tokens and pairs of neighbours. "Mean of
weights": one model with the average of all seeds' weights. Sizes of windows and pairs were chosen on Lyft, the weight
of one half before any look at Uber. The recipe of training was known by its score on Uber, and three earlier looks said
what to try (LOG.md).

    python -m experiments.lyft_uber_best --seeds 0 1 2
    python -m experiments.lyft_uber_best --precision bfloat16 --dtype bfloat16      # faster with AMX

The second table has what the models forgot: SciFact and docstrings (`--forgetting`), searched without windows at the
base's own length. Finished seeds are not trained again, and killed ones resume.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from embedft import Report, RetrievalDataset, Run, bm25_run, evaluate, evaluate_run, fuse, load_embedder
from embedft.commands.options import named_sources
from embedft.retrieval.tables import format_table
from embedft.training.merging import soup
from embedft.training.run_folder import MODEL

from .commandline import make_parser, run
from .report import compare_recipes, difference_cells
from .repro_finetune_lyft_uber import MAX_LENGTH, train_seed
from .sources import find_data, forgetting

METRICS = ("hit_rate@5", "mrr@10", "map@100")
COMPARED, KEPT = "mrr@10", "ndcg@10"
RECIPE = {
    "epochs": 3,
    "batch_size": 32,
    "lr": 3e-5,
    "weight_decay": 0.0,
    "warmup": 0.1,
    "passages": [128, 64],
    "loss": {"name": "in_batch_negatives", "temperature": 0.03},
}
SEARCHED = (128, 64, 64, 32)
BM25_WEIGHT = 0.5


def main(options: argparse.Namespace) -> None:
    folder = find_data("lyft_uber", options.data)
    lyft, uber = (RetrievalDataset.load(folder / name) for name in ("train_dataset.json", "val_dataset.json"))
    out = Path(options.out) / options.base.strip("/").replace("/", "--")
    folders, mean = [out / f"s{seed}" for seed in options.seeds], out / "mean"
    trained = [
        train_seed(options.base, lyft, seed, place, **RECIPE, precision=options.precision)
        for seed, place in zip(options.seeds, folders, strict=True)
    ]
    soup(trained).save(mean)
    own_length = load_embedder(options.base).max_length
    models = {
        "untrained": [options.base],
        "fine-tuned": [place / MODEL for place in folders],
        "mean of weights": [mean],
    }
    others = {name: RetrievalDataset.load(path) for name, path in other_tests(options, out).items()}
    reports, forgotten, bm25 = {}, {}, None
    for name, found in models.items():
        loaded = [load_embedder(x, max_length=MAX_LENGTH, dtype=getattr(torch, options.dtype)) for x in found]
        bm25 = bm25 or bm25_run(uber, tokenize=loaded[0].tokenize, ngram=2)
        reports[name] = [evaluate(model, uber, passages=SEARCHED) for model in loaded]
        for model in loaded:
            model.max_length = own_length
        forgotten[name] = [np.mean([evaluate(model, x).metrics[KEPT] for model in loaded]) for x in others.values()]
    fused = {f"{name}, fused": [fused_with(bm25, x, uber) for x in found] for name, found in reports.items()}
    header = ["Uber", *METRICS, f"difference, {COMPARED}", "95% interval", "p-value"]
    print(format_table(header, [*recipe_rows(reports), *recipe_rows(fused)]))
    print("\n" + format_table([KEPT, *others], forgotten_rows(forgotten)))
    print(
        f"\n{len(uber.queries)} questions against {len(uber.corpus)} chunks; base: {options.base}; fine-tuned: mean ± "
        f"standard deviation over seeds {', '.join(map(str, options.seeds))},\ntrained in {options.precision}, "
        f"measured in {options.dtype}. Differences from the untrained model, alone or fused; intervals\nand p-values "
        f"are for new questions and, of fine-tuned, new seeds; questions are clustered by document."
    )


def other_tests(options: argparse.Namespace, out: Path) -> dict[str, str]:
    """{name: test set} of other domains."""
    return named_sources(options.forgetting) if options.forgetting else forgetting(out)


def fused_with(bm25: Run, report: Report, dataset: RetrievalDataset) -> Report:
    """The report of the fusion of BM25's run with the report's."""
    weights = (BM25_WEIGHT, 1 - BM25_WEIGHT)
    return evaluate_run(fuse([bm25, report.run], method="zscore", weights=weights), dataset)


def recipe_rows(reports: Mapping[str, Sequence[Report]]) -> list[list[str]]:
    """A row of each recipe's metrics, and of its difference from the first."""
    base, *others = reports.values()
    differences = [["", "", ""], *(difference_cells(compare_recipes(base, x, metric=COMPARED)) for x in others)]
    rows = []
    for (name, found), difference in zip(reports.items(), differences, strict=True):
        values = [[report.metrics[metric] for report in found] for metric in METRICS]
        spread = [f" ± {np.std(x, ddof=1):.4f}" if len(x) > 1 else "" for x in values]
        rows.append([name, *(f"{np.mean(x):.4f}{more}" for x, more in zip(values, spread, strict=True)), *difference])
    return rows


def forgotten_rows(means: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """A row of each recipe's means on other test sets, and their change from the first recipe's."""
    (first, base), *others = means.items()
    rows = [[first, *(f"{mean:.4f}" for mean in base)]]
    for name, found in others:
        rows.append([name, *(f"{x:.4f} ({x / before - 1:+.1%})" for x, before in zip(found, base, strict=True))])
    return rows


if __name__ == "__main__":
    parser = make_parser("experiments.lyft_uber_best", __doc__)
    parser.add_argument("--data", metavar="DIR", help="has train_dataset.json, val_dataset.json [beside the checkout]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    precisions = ("float32", "bfloat16")
    parser.add_argument("--precision", default="float32", choices=precisions, help="of training [%(default)s]")
    parser.add_argument("--dtype", default="float32", choices=precisions, help="of weights measured [%(default)s]")
    others = "test sets of other domains [SciFact and docstrings of installed packages]"
    parser.add_argument("--forgetting", nargs="+", metavar="[NAME=]DATA", help=others)
    parser.add_argument("--out", default="runs/lyft_uber_best", metavar="DIR", help="[%(default)s]")
    run(main, parser)
