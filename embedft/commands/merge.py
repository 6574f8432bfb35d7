"""`embedft merge`: averages the weights of models: runs with several seeds, or a model and what was tuned from it.

embedft merge runs/seed-0/model runs/seed-1/model runs/seed-2/model --out soup
embedft merge sentence-transformers/all-MiniLM-L6-v2 runs/first/model --shares 0 0.25 0.5 0.75 1 \
    --test held_out.csv beir:scifact --validation validation.csv --out merged
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import embedft

from .. import config
from ..config import REQUIRED, check_at_most_one, option
from ..data.dataset import RetrievalDataset
from ..retrieval import tables
from ..retrieval.run import Run
from .options import DATASETS, Data, Windows, check_output, load_data, named_sources


@dataclass(frozen=True, kw_only=True)
class Options(Windows, Data, config.Options):
    models: list[str] = option(
        REQUIRED, "folders or hub ids of the same architecture", metavar="MODEL", positional=True
    )
    out: str | None = option(None, "folder for the merged model", metavar="DIR")
    weights: list[float] | None = option(None, "one for each MODEL, with a sum of 1 [equal]")
    shares: list[float] | None = option(None, "of two models, BASE and TUNED: shares of TUNED to measure, 0 to 1")
    test: list[str] = option([], f"measure on these, each [NAME=]DATA: {DATASETS}", metavar="DATA ...")
    validation: str | None = option(None, "questions that choose the best of --shares", metavar="DATA")
    select: str = option("ndcg@10", "the metric to measure, and to choose by")
    device: str | None = option(None, "cuda, cuda:1, mps or cpu [the best available]")
    style: tables.Style = option("text", "table format")
    overwrite: bool = option(False, "replace the model in DIR")

    def __post_init__(self):
        check_at_most_one(self, "weights", "shares")
        if len(self.models) < 2:
            raise ValueError(f"there is {len(self.models)} MODEL, expected at least two")
        if self.shares and len(self.models) != 2:
            raise ValueError(
                f"shares has {self.shares}, which are of two models, BASE and TUNED, but there are {len(self.models)}"
            )
        if outside := [share for share in self.shares or [] if not 0 <= share <= 1]:
            raise ValueError(f"shares has {outside[0]}, expected 0 to 1")
        if behind := [name for name in self.models if name.startswith("openai:")]:
            raise ValueError(f"{behind[0]} is behind an API: its weights cannot be averaged")
        if not (self.out or self.test or self.validation):
            raise ValueError("nothing to do: expected --out, --test or --validation")
        if self.out and len(self.shares or []) > 1 and not self.validation:
            raise ValueError(
                f"shares has {len(self.shares)} values: expected --validation, which chooses one for --out"
            )

    @property
    def mixtures(self) -> dict[str, list[float]]:
        """{name: the weight of each model}."""
        if self.shares:
            return {str(share).removesuffix(".0"): [1 - share, share] for share in self.shares}
        equal = [1 / len(self.models)] * len(self.models)
        return {" + ".join(f"{weight:.3g}" for weight in self.weights or equal): self.weights or equal}


def run(options: Options) -> None:
    """Merges, measures every mixture, and saves the best one."""
    from ..encoders.card import write_card
    from ..training.merging import check_weights, soup

    for weights in options.mixtures.values():
        check_weights(weights, len(options.models))
    if options.out:
        _check_out(Path(options.out), overwrite=options.overwrite)
    datasets = {} if options.validation is None else {"validation": load_data(options.validation, options)}
    for name, path in (named_sources(options.test) if options.test else {}).items():
        if name in datasets:
            raise ValueError(f"{path} is called {name!r}, as --validation is: choose another name (NAME=DATA)")
        datasets[name] = load_data(path, options)
    for dataset in datasets.values():
        embedft.evaluate_run(Run.from_dict({}), dataset, metrics=[options.select])  # raises for an unknown metric
    models = [embedft.load_embedder(name, device=options.device) for name in options.models]
    best, found = None, {}
    for name, weights in options.mixtures.items():
        merged = soup(models, weights, names=options.models)
        found[name] = _measure(merged, datasets, options)
        if best is None or (options.validation and found[name]["validation"] > found[best]["validation"]):
            best, kept = name, (merged, weights)
    if datasets:
        rows = [[name, *(f"{value:.4f}" for value in values.values())] for name, values in found.items()]
        first = "share" if options.shares else "weights"
        print(tables.format_table([first, *datasets], rows, style=options.style))
    notes = sys.stdout if options.style == "text" else sys.stderr
    if len(found) > 1 and options.validation:
        print(f"best on validation: {best} ({options.select} {found[best]['validation']:.4f})", file=notes)
    if options.out:
        merged, weights = kept
        merged.save(options.out)
        parts = {f"weight of {name}": f"{weight:g}" for name, weight in zip(options.models, weights, strict=True)}
        write_card(Path(options.out), merged, training=parts)
        print(f"model: {options.out}", file=notes)


def _measure(model: "embedft.Embedder", datasets: Mapping[str, RetrievalDataset], options: Options) -> dict[str, float]:
    how = {"metrics": [options.select], "passages": options.passages}
    return {name: embedft.evaluate(model, dataset, **how).metrics[options.select] for name, dataset in datasets.items()}


def _check_out(out: Path, *, overwrite: bool) -> None:
    from ..encoders.schema import MODULES_FILE

    there = sorted(out.glob("[!.]*"))  # a killed command leaves hidden files
    check_output(str(out), there, overwrite=overwrite)
    if there and not (out / MODULES_FILE).is_file():
        raise ValueError(f"{out}: contains files but no model ({MODULES_FILE} is missing), so it is left alone")
