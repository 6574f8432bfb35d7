"""`embedft finetune`: trains a model on one device, or on several when started by torchrun.

embedft finetune sentence-transformers/all-MiniLM-L6-v2 train.csv --validation held_out.csv --out runs/first
torchrun --nproc-per-node 2 -m embedft finetune sentence-transformers/all-MiniLM-L6-v2 train.csv --out runs/first
"""

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import embedft

from ..config import REQUIRED, check_at_most_one, option, part
from ..device import allow_deterministic
from ..encoders.loading import API_PREFIX
from ..files import read_jsonl
from ..losses.registry import describe_losses
from ..recipe.job import VALIDATION, VALIDATION_BASE
from ..retrieval.suite import check_names, load_reports
from ..training import distributed, run_folder
from ..training.configs import FinetuneConfig
from .options import (
    DATASETS,
    Data,
    Model,
    load_data,
    load_model,
    load_texts,
    load_training_data,
    named_sources,
    summary,
)


@dataclass(frozen=True, kw_only=True)
class Options(FinetuneConfig, Model, Data):
    """Training run."""

    model: str = option(REQUIRED, "folder, hub id or package", metavar="MODEL", positional=True)
    data: list[str] = option(REQUIRED, f"{DATASETS}; several [NAME=]DATA are mixed", metavar="DATA", positional=True)
    out: str = option(REQUIRED, "run folder; the model goes to DIR/model", metavar="DIR")
    validation: list[str] | str | None = option(
        None, "held-out questions that choose the best weights; of several, their mean does", metavar="[NAME=]DATA ..."
    )
    validation_split: str | None = option(None, "split of a BEIR folder [test, or the only one]")
    store: str | None = option(
        None, "keep vectors of MODEL itself, references and teachers here, and teachers' lists", metavar="DIR"
    )
    merge: bool = option(True, "treat validation documents of equal text as one")
    overwrite: bool = option(False, "replace the run in DIR; until it is done, the old one is in DIR/.replaced")
    resume: bool = option(False, "continue from the last checkpoint in DIR, if there is one")

    def __post_init__(self):
        if isinstance(self.validation, list) and len(self.validation) == 1:
            object.__setattr__(self, "validation", self.validation[0])  # as in settings and grids of one dataset
        check_at_most_one(self, "overwrite", "resume")
        if self.model.startswith(API_PREFIX):
            raise ValueError(f"{self.model} is behind an API: its weights cannot be trained; fit an adapter instead")


CHOICES = """--examples: a row of a batch is
  pairs: a question and one of its answers, for each answer
  queries: a question and all its answers
  lists: the same, also for questions without an answer, with hard negatives alone
  scored: a question and one of the documents that the data scores for it, for each
  texts: a question and a document with nothing said about the two, until all texts had
    their turn, for losses that compare with references; data may be .txt, or .jsonl with "text"
--sampling: how many batches each of several datasets gives
  proportional: as many as it can fill; an epoch is every example once
  round_robin: equally many, until the smallest dataset is used up
  temperature: in between, see --sampling-temperature"""


def epilog() -> str:
    """What the choices of some options mean, and the list of losses, for --help."""
    options = "options (--loss.OPTION; lists as JSON: '[384, 128]')"
    return f"{CHOICES}\n\nlosses (--loss.name) and their {options}:\n{describe_losses()}"


def run(options: Options) -> None:
    """Trains; with validation data, compares before and after."""
    if options.deterministic:
        allow_deterministic()  # before validation uses the GPU
    with distributed.process_group():
        first = distributed.rank_and_size()[0] == 0
        if not first:
            os.environ["EMBEDFT_PROGRESS"] = "0"
        existing = "overwrite" if options.overwrite else "resume" if options.resume else "refuse"
        out, config = Path(options.out), part(options, FinetuneConfig)
        distributed.from_first(lambda: run_folder.check_run(out, existing))
        embedder, dataset, validation = distributed.together(lambda: _load(options))
        if first and existing == "resume" and not (out / run_folder.CONFIG).is_file():
            print(f"{options.out}: no run to resume, starting a new one", file=sys.stderr)
        embedft.finetune(embedder, dataset, config, validation=validation, out=out, existing=existing)
        if first:
            _print_summary(out, config.select, has_validation=validation is not None)


def _load(options: Options) -> tuple:
    """Model (on the rank's own device), training data and validation data."""
    dataset, validation = load_datasets(options)
    device = distributed.rank_device(options.device)
    return load_model(options, device=device, store=options.store), dataset, validation


def load_datasets(options: Options) -> tuple:
    """Training data and validation data ({name: dataset} for several), or None."""
    load = load_texts if options.examples == "texts" else load_training_data
    datasets = {name: load(path, options) for name, path in named_sources(options.data).items()}
    dataset = datasets if len(datasets) > 1 else next(iter(datasets.values()))
    validation = None
    if options.validation:
        how = {"split": options.validation_split, "merge": options.merge}
        sources = named_sources(options.validation)
        check_names(sources if len(sources) > 1 else ())
        loaded = {name: load_data(path, options, **how) for name, path in sources.items()}
        validation = loaded if len(loaded) > 1 else next(iter(loaded.values()))
    return dataset, validation


def _print_summary(out: Path, select: str, *, has_validation: bool) -> None:
    records = [record for _, record in read_jsonl(out / run_folder.LOG)]
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    if losses:
        print(f"{losses[-1][0]:,} steps, loss {losses[0][1]:.4f} -> {losses[-1][1]:.4f}")
    if has_validation:
        print(summary(records, select, start="the base weights"))
        saved = [load_reports(out / run_folder.EVAL / name) for name in (VALIDATION_BASE, VALIDATION)]
        before, after = ({"": x} if isinstance(x, embedft.Report) else x for x in saved)
        with warnings.catch_warnings():
            # Intended: the base is evaluated at its own max_length, the result at that of training.
            warnings.filterwarnings("ignore", "the reports may not be comparable: max_length")
            for name in after:
                change = embedft.compare(before[name], after[name], metric=select.rpartition("/")[2])
                print(f"{name}: {change}" if name else change)
        own, trained = (next(iter(reports.values())).setting["max_length"] for reports in (before, after))
        if own != trained:
            print(f"before: the base, at max_length {own}; after: the new model, at max_length {trained}")
        print("these questions chose the weights; to report a result, run embedft evaluate on others")
    print(f"model: {out / run_folder.MODEL}")
