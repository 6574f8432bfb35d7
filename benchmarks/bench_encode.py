"""`Embedder.encode` against `SentenceTransformer.encode`.

Both use the same weights, float32, the same maximum length and their default batches. Before timing, the vectors must
agree to 1e-5.

    python -m benchmarks.bench_encode --rounds 5
    python -m benchmarks.bench_encode --base all-mpnet-base-v2 --texts "Uber questions" --number 200
"""

import argparse

import numpy as np

from embedft import RetrievalDataset, load_embedder
from embedft.retrieval.tables import format_table
from experiments.commandline import make_parser, run
from experiments.sources import find_data

from .workers import Worker, alternate, machine, ratios, spread

MAX_LENGTH, TOLERANCE = 512, 1e-5
TEXTS = ("Uber chunks", "Uber questions", "finance contexts")


class Ours:
    def __init__(self, model: str, texts: dict[str, list[str]]):
        self.embedder, self.texts = load_embedder(model, max_length=MAX_LENGTH, device="cpu"), texts

    def encode(self, name: str) -> None:
        self.embeddings = self.embedder.encode(self.texts[name], progress=False)

    def result(self) -> np.ndarray:
        return self.embeddings


class SentenceTransformers:
    def __init__(self, model: str, texts: dict[str, list[str]]):
        from sentence_transformers import SentenceTransformer

        self.model, self.texts = SentenceTransformer(model, device="cpu"), texts
        self.model.max_seq_length = MAX_LENGTH

    def encode(self, name: str) -> None:
        self.embeddings = self.model.encode(self.texts[name], show_progress_bar=False)

    def result(self) -> np.ndarray:
        return self.embeddings


def main(options: argparse.Namespace) -> None:
    uber = RetrievalDataset.load(find_data("lyft_uber", options.lyft_uber, "--lyft-uber") / "val_dataset.json")
    finance_file = find_data("finance_qa", options.finance_qa, "--finance-qa") / "Financial-QA-10k.csv"
    finance = RetrievalDataset.load(finance_file, skip_empty=True)
    sets = (uber.texts, uber.queries, finance.texts)
    texts = {name: list(found.values())[: options.number] for name, found in zip(TEXTS, sets, strict=True)}
    texts = {name: texts[name] for name in options.texts}
    folder = str(load_embedder(options.base, device="cpu").source.folder)
    workers = {"ours": Worker(Ours, folder, texts), "peer": Worker(SentenceTransformers, folder, texts)}
    rows = []
    for name in texts:
        embeddings = {}
        for who, worker in workers.items():
            worker.call("encode", name)  # also warms up
            embeddings[who] = worker.call("result")
        difference = float(np.abs(embeddings["ours"] - embeddings["peer"]).max())
        if not difference <= TOLERANCE:
            raise ValueError(f"{name}: the embeddings differ by {difference:.1e}, expected at most {TOLERANCE:.0e}")
        seconds = alternate(workers, "encode", name, rounds=options.rounds, warmup=0)
        rows.append(
            [
                name,
                f"{len(texts[name]):,}",
                f"{difference:.1e}",
                spread(seconds["ours"]),
                spread(seconds["peer"]),
                spread(ratios(seconds["peer"], seconds["ours"])),
            ]
        )
    header = ["texts", "number", "largest difference", "embedft, s", "sentence-transformers, s", "times as fast"]
    print(format_table(header, rows))
    print(f"\nmedian [min, max] of {options.rounds} alternations; {options.base}, {MAX_LENGTH} tokens, float32;")
    memory = ", ".join(f"{who} {worker.peak_bytes / 2**30:.2f} GiB" for who, worker in workers.items())
    print(f"{machine()}; peak memory {memory}")


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_encode", __doc__)
    parser.add_argument("--lyft-uber", metavar="DIR", help="folder with val_dataset.json [beside the checkout]")
    parser.add_argument("--finance-qa", metavar="DIR", help="folder with Financial-QA-10k.csv [beside the checkout]")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="which texts to encode [all]")
    parser.add_argument("--number", type=int, help="how many of each, the first ones [all]")
    parser.add_argument("--rounds", type=int, default=5, help="timed alternations [5]")
    run(main, parser)
