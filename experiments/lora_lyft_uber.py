"""LoRA beside full fine-tuning, Lyft to Uber: quality, memory and time per step.

The data and settings of `repro_finetune_lyft_uber`, three ways: LoRA on every Linear layer; LoRA for queries alone,
against documents embedded once by the base; all weights. LoRA's learning rate, 5e-4, was set beforehand and not tuned.
The final weights are measured; nothing is chosen on Uber.

    python -m experiments.lora_lyft_uber --seeds 0 1 2

Each run has a process of its own, for its peak of memory. Time is the processor's, so that other work does not count.
Finished runs are not trained again, and killed ones resume (then memory and time are of the rest).
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from embedft import Report, RetrievalDataset, evaluate, load_embedder
from embedft.device import peak_memory_bytes
from embedft.files import read_json, write_json
from embedft.retrieval.tables import format_table

from .commandline import make_parser, run
from .report import compare_recipes, difference_cells
from .repro_finetune_lyft_uber import MAX_LENGTH, finetune_seed
from .sources import find_data

LORA = {"rank": 8, "alpha": 16.0}
RECIPES: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": LORA, "lr": 5e-4},
    "LoRA, queries": {"lora": {**LORA, "side": "query"}, "lr": 5e-4},
    "full": {},
}
METRICS = ("hit_rate@5", "mrr@10")


def main(options: argparse.Namespace) -> None:
    folder = find_data("lyft_uber", options.data)
    out = Path(options.out) / options.base.strip("/").replace("/", "--")
    uber = RetrievalDataset.load(folder / "val_dataset.json")
    base = evaluate(load_embedder(options.base, max_length=MAX_LENGTH), uber)
    for recipe in RECIPES:
        for seed in options.seeds:
            if not (place_of(out, recipe, seed) / "costs.json").exists():
                arguments = (options.base, folder, recipe, seed, out)
                process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    raise ValueError(f"{recipe}, seed {seed}: the run failed; its own message says why")
    places = {recipe: [place_of(out, recipe, seed) for seed in options.seeds] for recipe in RECIPES}
    print(format_results(base, places))
    seeds = ", ".join(map(str, options.seeds))
    print(f"\n{options.base}, means over seeds {seeds}; {base.num_queries} questions of Uber, clustered by document.")


def place_of(out: Path, recipe: str, seed: int) -> Path:
    """The run folder of a recipe and seed."""
    return out / f"{recipe.replace(', ', '-')}-s{seed}"


def train(base: str, folder: Path, recipe: str, seed: int, out: Path) -> None:
    """One run, with its time per step and its peak of memory before the evaluation."""
    lyft, uber = (RetrievalDataset.load(folder / f"{name}_dataset.json") for name in ("train", "val"))
    place, found = place_of(out, recipe, seed), {}

    def measure(state, record) -> None:
        now = time.process_time()
        if found:
            found["seconds"].append(now - found["at"])
        else:
            found["trained"] = sum(p.numel() for p in state.embedder.parameters() if p.requires_grad)
            found["seconds"] = []
        found["at"], found["bytes"] = now, peak_memory_bytes(state.embedder.device)

    finetune_seed(base, lyft, uber, seed, place, name="uber", on_step=measure, **RECIPES[recipe])
    write_json(place / "costs.json", found)


def format_results(base: Report, places: dict[str, list[Path]]) -> str:
    """A row per recipe: metrics and their differences from full fine-tuning, parameters, memory, time per step."""
    reports = {name: [Report.load(place / "eval" / "uber") for place in found] for name, found in places.items()}
    rows = [["base", *(f"{base.metrics[metric]:.4f}" for metric in METRICS), *[""] * 7]]
    for name, found in places.items():
        costs = [read_json(place / "costs.json") for place in found]
        steps = [seconds for cost in costs for seconds in cost["seconds"]]
        differences = []
        for metric in METRICS:
            differences += difference_cells(compare_recipes(reports["full"], reports[name], metric=metric))[:2]
        rows.append(
            [
                name,
                *(f"{np.mean([report.metrics[metric] for report in reports[name]]):.4f}" for metric in METRICS),
                *(differences if name != "full" else [""] * 4),
                f"{costs[0]['trained']:,}",
                f"{max(cost['bytes'] for cost in costs) / 2**30:.2f}",
                f"{np.median(steps):.2f}",
            ]
        )
    header = ["Uber", *METRICS]
    header += [column for metric in METRICS for column in (f"{metric} - full", "95% interval")]
    return format_table([*header, "trained", "GiB", "s/step"], rows)


if __name__ == "__main__":
    parser = make_parser("experiments.lora_lyft_uber", __doc__)
    parser.add_argument("--data", metavar="DIR", help="has train_dataset.json, val_dataset.json [beside the checkout]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    parser.add_argument("--out", default="runs/lora_lyft_uber", metavar="DIR", help="[%(default)s]")
    os.environ.setdefault("EMBEDFT_PROGRESS", "0")
    run(main, parser)
