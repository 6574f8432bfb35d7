"""Where do pairs of tokens help BM25? Four settings on questions of four kinds; no encoder, but its tokenizer.

Lyft and Uber: an LLM's questions about long chunks of a 10-K (choose on Lyft). Finance: questions about a sentence or a
few of many 10-Ks, the 700 test rows of repro_matryoshka_finance. SciFact: claims, about abstracts of papers.

    python -m experiments.bm25_pairs

Every row is compared with BM25 over tokens, b 0.75; p-values are Holm-adjusted over the rows of a set.
"""

import argparse

from embedft import RetrievalDataset, bm25_run, compare, evaluate_run, load_embedder
from embedft.retrieval.tables import format_table

from .commandline import make_parser, run
from .report import difference_cells
from .repro_matryoshka_finance import read_rows, split_rows
from .sources import SHARED, find_data

SETTINGS = ({}, {"b": 1.0}, {"ngram": 2}, {"ngram": 2, "b": 1.0})
METRIC, SHOWN = "mrr@10", ("hit_rate@5", "mrr@10", "ndcg@10")


def main(options: argparse.Namespace) -> None:
    tokenize, rows = load_embedder(options.base).tokenize, []
    for name, dataset in load_sets(options.scifact).items():
        runs = [bm25_run(dataset, tokenize=tokenize, **how) for how in SETTINGS]
        base, *others = reports = [evaluate_run(found, dataset) for found in runs]
        cells = [["", "", ""], *map(difference_cells, compare(base, *others, metric=METRIC))]
        for how, report, difference in zip(SETTINGS, reports, cells, strict=True):
            setting = [name, str(how.get("ngram", 1)), f"{how.get('b', 0.75):g}"]
            rows.append([*setting, *(f"{report.metrics[metric]:.4f}" for metric in SHOWN), *difference])
    print(format_table(["questions", "ngram", "b", *SHOWN, f"difference, {METRIC}", "95% interval", "p"], rows))


def load_sets(scifact: str) -> dict[str, RetrievalDataset]:
    """{name: questions and the documents they are about}."""
    lyft_uber, finance = find_data("lyft_uber", None), find_data("finance_qa", None)
    rows, num_rows = read_rows(finance / "Financial-QA-10k.csv")
    return {
        "Lyft": RetrievalDataset.load(lyft_uber / "train_dataset.json"),
        "Uber": RetrievalDataset.load(lyft_uber / "val_dataset.json"),
        "finance": split_rows(rows, num_rows, keep_back=False).test,
        "SciFact": RetrievalDataset.load(scifact, split="test"),
    }


if __name__ == "__main__":
    parser = make_parser("experiments.bm25_pairs", __doc__)
    scifact = str(SHARED / "beir" / "scifact")
    parser.add_argument("--scifact", default=scifact, metavar="DATA", help="BEIR folder, or beir:scifact [%(default)s]")
    run(main, parser)
