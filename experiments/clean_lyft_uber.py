"""What is wrong with LlamaIndex's published questions, and how much it matters for retrieval and training.

Cleans the questions that gpt-3.5-turbo wrote about Lyft's and Uber's 10-K (see repro_finetune_lyft_uber.py), and
measures the base model on each group of dropped questions, against all documents. With --train, also fine-tunes on all
of Lyft and on the cleaned Lyft, with the published settings.

    python -m experiments.clean_lyft_uber
    python -m experiments.clean_lyft_uber --train --seeds 0 1 2

Finished seeds are not trained again, and killed ones resume.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedft import Report, RetrievalDataset, evaluate, evaluate_run, load_embedder
from embedft.corpus.cleaning import Dropped, clean, report
from embedft.retrieval.tables import format_table

from .commandline import make_parser, run
from .report import compare_recipes, difference_cells
from .repro_finetune_lyft_uber import MAX_LENGTH, finetune_seed
from .sources import find_data

METRICS = ("hit_rate@5", "mrr@10", "ndcg@10")
EXAMPLE_CHARACTERS = 110


def main(options: argparse.Namespace) -> None:
    folder = find_data("lyft_uber", options.data)
    lyft = RetrievalDataset.load(folder / "train_dataset.json")
    uber = RetrievalDataset.load(folder / "val_dataset.json")
    (kept_lyft, dropped_lyft), (kept_uber, dropped_uber) = clean(lyft), clean(uber)
    reports = {"Lyft": report(lyft, kept_lyft, dropped_lyft), "Uber": report(uber, kept_uber, dropped_uber)}
    print(f"{format_reasons(reports)}\n")

    base = evaluate(load_embedder(options.base, max_length=MAX_LENGTH), uber)
    groups = format_groups(base, uber, kept_uber, dropped_uber)
    print(f"{groups}\n\nbase: {options.base}; every row searches all of Uber's documents")
    if not options.train:
        return
    out = Path(options.out) / options.base.strip("/").replace("/", "--")
    tuned = {
        name: [
            finetune_seed(options.base, train_set, uber, seed, out / name / f"s{seed}", name="uber")
            for seed in options.seeds
        ]
        for name, train_set in (("all", lyft), ("cleaned", kept_lyft))
    }
    print(f"\n{format_training(base, tuned['all'], tuned['cleaned'], kept_uber)}")
    seeds = ", ".join(map(str, options.seeds))
    print(
        f"\ntrained on all {len(lyft.queries)} or the {len(kept_lyft.queries)} kept questions about Lyft, "
        f"mean over seeds {seeds}.\nThe difference is kept minus all; interval and p-value are for new seeds and new "
        "questions, clustered by document."
    )


def format_reasons(reports: Mapping[str, dict]) -> str:
    """A table of counts by reason, followed by an example of each."""
    reasons = dict.fromkeys(reason for report in reports.values() for reason in report["dropped"])
    counts = {
        "all": [report["num_queries"] for report in reports.values()],
        **{reason: [r["dropped"].get(reason, {"count": 0})["count"] for r in reports.values()] for reason in reasons},
        "kept": [report["num_kept"] for report in reports.values()],
        "of them changed": [report["changed"]["count"] for report in reports.values()],
    }
    table = format_table(["questions", *reports], [[row, *map(str, numbers)] for row, numbers in counts.items()])
    examples = [
        f"- {name}, {reason}: {_shorten(found['examples'][0])}"
        for name, report in reports.items()
        for reason, found in report["dropped"].items()
    ]
    return "\n".join([table, "", *examples])


def _shorten(example: dict[str, str]) -> str:
    """The part of a question around the match."""
    text, found = example["text"], example["detail"]
    start = max(0, min(text.find(found) - EXAMPLE_CHARACTERS // 2, len(text) - EXAMPLE_CHARACTERS))
    part = text[start : start + EXAMPLE_CHARACTERS]
    return "... " * (start > 0) + part + " ..." * (start + len(part) < len(text))


def format_groups(report: Report, dataset: RetrievalDataset, kept: RetrievalDataset, dropped: Dropped) -> str:
    """A table of metrics over all queries, the kept ones, and those dropped for each reason."""
    groups = {"all": dataset.qrels, "kept": kept.qrels}
    for query_id, (reason, _) in dropped.items():
        groups.setdefault(reason, {})[query_id] = dataset.qrels[query_id]
    rows = []
    for group, qrels in groups.items():
        part = evaluate_run(report.run.select(list(qrels)), qrels)
        rows.append([group, str(part.num_queries), *(f"{part.metrics[metric]:.4f}" for metric in METRICS)])
    return format_table(["Uber", "questions", *METRICS], rows)


def select_queries(report: Report, kept: RetrievalDataset) -> Report:
    """Restricts a report to the queries in `kept`."""
    places = [place for place, query_id in enumerate(report.query_ids) if query_id in kept.queries]
    query_ids = [report.query_ids[place] for place in places]
    return dataclasses.replace(
        report,
        query_ids=query_ids,
        per_query={metric: values[places] for metric, values in report.per_query.items()},
        clusters=[report.clusters[place] for place in places],
        run=report.run.select(query_ids),
    )


def format_training(
    base: Report, on_all: Sequence[Report], on_cleaned: Sequence[Report], kept: RetrievalDataset
) -> str:
    """A table of the base and both trained models (one report per seed) on all queries and on the kept ones."""
    rows = []
    reports = ([base], on_all, on_cleaned)
    selected = [[select_queries(report, kept) for report in of_seeds] for of_seeds in reports]
    for name, (before, first, second) in (("all", reports), ("kept", selected)):
        for metric in METRICS:
            comparison = compare_recipes(first, second, metric=metric)
            values = (before[0].metrics[metric], comparison.base, comparison.other)
            rows.append([f"{name}, {metric}", *(f"{value:.4f}" for value in values), *difference_cells(comparison)])
    header = ["Uber", "base", "on all of Lyft", "on kept Lyft", "difference", "95% interval", "p-value"]
    return format_table(header, rows)


if __name__ == "__main__":
    parser = make_parser("experiments.clean_lyft_uber", __doc__)
    parser.add_argument("--data", metavar="DIR", help="has train_dataset.json, val_dataset.json [beside the checkout]")
    parser.add_argument("--train", action="store_true", help="also fine-tune, on all of Lyft and on its kept part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    parser.add_argument("--out", default="runs/clean_lyft_uber", metavar="DIR", help="runs of --train [%(default)s]")
    run(main, parser)
