"""What one `finetune` call is about: its arguments, and what is made of them before training."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.dataset import RetrievalDataset
from ..encoders.embedder import Embedder
from ..losses.registry import Loss
from ..retrieval.evaluate import evaluate
from ..retrieval.metrics import select_metrics
from ..retrieval.report import Report
from ..retrieval.suite import Suite, report_files
from ..training import run_folder
from ..training.configs import FinetuneConfig
from ..training.references import Reference
from ..training.train import BatchSource, Constant

VALIDATION, VALIDATION_BASE = "validation", "validation-base"


@dataclass
class Job:
    """The arguments of a `finetune` call, and what is derived from them before it trains."""

    embedder: Embedder
    datasets: Mapping[str, RetrievalDataset]  # {"": dataset} for a single one
    config: FinetuneConfig
    given: dict[str, Any]  # the objects passed in, by argument
    validation: RetrievalDataset | Mapping[str, RetrievalDataset] | None
    references: Mapping[str, Embedder | Reference]
    out: Path | None
    loss: Loss | None = None
    batches: BatchSource | None = None
    frozen: set[str] = field(default_factory=set)  # names of parameters that are not trained
    constant: dict[str, Constant] = field(default_factory=dict)  # by role: vectors that do not change
    taught: dict[str, int] | None = None  # what the teacher did, counted
    hashes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # for config.json

    def held_out(self) -> Mapping[str, RetrievalDataset]:
        """The validation datasets: {"": dataset} for a single one."""
        return {"": self.validation} if isinstance(self.validation, RetrievalDataset) else self.validation or {}

    def lacks_base(self) -> bool:
        """Whether the base model's report has yet to be saved."""
        is_wanted = self.out is not None and self.validation is not None
        return is_wanted and not report_files(self.out / run_folder.EVAL / VALIDATION_BASE)

    def report(self, save_as: str | None = None) -> Report | Suite:
        """Evaluates on the validation data, and saves the result, if it has a name to be saved as."""
        found = evaluate(self.embedder, self.validation, passages=self.windows(), **self.measured())
        if save_as == VALIDATION:
            found = Suite({name: _tuned(x) for name, x in found.items()}) if isinstance(found, Suite) else _tuned(found)
        if save_as is not None:
            found.save(self.out / run_folder.EVAL / save_as)
        return found

    def windows(self) -> list[int] | None:
        """Those by which validation scores documents."""
        said = self.config.validation_passages
        return self.config.passages if said == "training" else said

    def measured(self) -> dict[str, Any]:
        """Arguments for `evaluate`."""
        if "evaluate" in self.given:
            return {}
        name, slash, _ = self.config.select.rpartition("/")
        if slash and name not in filter(None, self.held_out()):
            known = ", ".join(filter(None, self.held_out())) or "none, as there is one dataset"
            expected = f"{name!r} is no validation dataset; their names: {known}"
            raise ValueError(f"select is {self.config.select!r}: {expected}")
        return measures(self.config.select)


def measures(select: str) -> dict[str, Any]:
    """Arguments for `evaluate`: the default metrics plus that of `select`, and a depth that covers both."""
    metric = select.rpartition("/")[2]
    k = metric.partition("@")[2]
    ks = sorted({1, 3, 5, 10, int(k) if k.isdigit() else 10})
    options = {"ks": ks, "depth": max(100, ks[-1])}
    try:
        chosen = select_metrics([metric], **options)
    except ValueError as error:
        raise ValueError(f"select is {select!r}: {error}") from None
    return {"metrics": list(dict.fromkeys(select_metrics(**options) + chosen)), "depth": options["depth"]}


def _tuned(report: Report) -> Report:
    return replace(report, setting=report.setting | {"model": f"{report.setting.get('model', 'model')} + fine-tuned"})
