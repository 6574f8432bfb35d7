"""Results on several datasets: the report of each, and means over the datasets.

    suite = evaluate(embedder, {"uber": uber, "scifact": scifact})
    suite["uber"].metrics["ndcg@10"], suite.metrics["uber/ndcg@10"]     # the same
    suite.metrics["ndcg@10"]                                            # the mean of both
    suite.save("eval/base")                                             # eval/base/uber, eval/base/scifact, suite.json

A mean counts every dataset the same, however many questions it has (macro average), as BEIR and MTEB do.
Source: Thakur et al. 2021 (BEIR), table 2; Muennighoff et al. 2023 (MTEB), table 1.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ..files import check_whole, read_object, write_json
from .report import REPORT_FILES, Report
from .tables import Style, format_change, format_table, main_metrics

SUITE_FILE = "suite.json"  # "datasets", their names in order, and "metrics"; written last


class Suite(dict[str, Report]):
    """{name of a dataset: its report}, at least one."""

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The mean over the datasets of each metric that all have, and "NAME/METRIC" for each dataset."""
        values = {name: report.metrics for name, report in self.items()}
        first, *others = values.values()
        shared = [metric for metric in first if all(metric in of_name for of_name in others)]
        means = {metric: float(np.mean([of_name[metric] for of_name in values.values()])) for metric in shared}
        return means | {f"{name}/{metric}": x for name, of_name in values.items() for metric, x in of_name.items()}

    def __str__(self) -> str:
        return format_suites({next(iter(self.values())).name: self}, style="text")

    def save(self, folder: str | Path) -> None:
        """Writes each report into its own folder and, last, suite.json."""
        folder = Path(folder)
        check_names(self)
        (folder / SUITE_FILE).unlink(missing_ok=True)
        for name, report in self.items():
            report.save(folder / name)
        write_json(folder / SUITE_FILE, {"datasets": list(self), "metrics": self.metrics})

    @classmethod
    def load(cls, folder: str | Path) -> "Suite":
        """Reads what `save` wrote; raises `ValueError` for files that are missing or damaged."""
        check_whole(Path(folder), Path(folder).parent)
        return cls({name: Report.load(Path(folder) / name) for name in suite_names(folder)})


def suite_names(folder: str | Path) -> list[str]:
    """The names of the datasets that a suite was saved with in a folder."""
    path = Path(folder) / SUITE_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no reports on several datasets ({SUITE_FILE} is missing)")
    names = read_object(path).get("datasets")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: datasets is {names!r}, expected a list of names")
    with about(str(path)):
        check_names(names)
    return names


def report_files(folder: Path) -> list[Path]:
    """The files of the report and of the suite that were saved in a folder, those in inner folders first."""
    found = []
    if (folder / SUITE_FILE).is_file():
        found += [file for name in suite_names(folder) for file in report_files(folder / name)]
        found.append(folder / SUITE_FILE)
    return found + [folder / name for name in REPORT_FILES if (folder / REPORT_FILES[-1]).is_file()]


def load_reports(folder: str | Path) -> Report | Suite:
    """The suite, or else the report, that was saved in a folder."""
    return Suite.load(folder) if (Path(folder) / SUITE_FILE).is_file() else Report.load(folder)


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Makes an error about one of several datasets, or points of a grid, begin with its name; a single one's is ""."""
    try:
        yield
    except ValueError as error:
        if not name or type(error) is not ValueError:  # such as that of another rank, which is not about a dataset
            raise
        raise ValueError(f"{name}: {error}") from None


def check_names(names: Iterable[str], reserved: Iterable[str] = ()) -> None:
    """Raises `ValueError` for a dataset's name that cannot name a folder, or is reserved for something else."""
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"a dataset is named {name!r}, expected letters, digits, '_', '-' and '.' (NAME=DATA)")
        if name in ("mean", SUITE_FILE, *REPORT_FILES, *reserved):
            raise ValueError(f"a dataset is named {name!r}, as other results are: choose another name (NAME=DATA)")


def format_suites(suites: Mapping[str, Suite], *, style: Style = "markdown") -> str:
    """For each of `main_metrics` and each suite, a row with a column per dataset and the mean. CSV has all digits."""
    first = next(iter(suites.values()))
    metrics = [metric for metric in main_metrics(next(iter(first.values()))) if metric in first.metrics]
    rows = []
    for metric in metrics:
        for name, suite in suites.items():
            values = [*(suite.metrics[f"{dataset}/{metric}"] for dataset in first), suite.metrics[metric]]
            rows.append([metric, name, *(str(x) if style == "csv" else f"{x:.4f}" for x in values)])
    return format_table(["metric", "report", *first, "mean"], rows, style=style, num_left=2)


def describe_change(base: Report | Suite, tuned: Report | Suite, *, select: str) -> str:
    """What training changed on the questions that chose the weights by the metric `select`, in Markdown."""
    if isinstance(tuned, Report):
        found, length = f"{len(tuned.query_ids):,} held-out questions", base.setting["max_length"]
        change = format_change(base, tuned, select=select)
        return f"On the {found} that chose the weights; the base at max_length {length:,}:\n\n{change}"
    counts = [f"{len(report.query_ids):,} of {name}" for name, report in tuned.items()]
    length = next(iter(base.values())).setting["max_length"]
    found = f"held-out questions that chose the weights by {select} ({', '.join(counts)})"
    parts = [f"On the {found}; the base at max_length {length:,}; the mean counts each dataset the same:"]
    parts.append(format_suites({"base": base, "fine-tuned": tuned}))
    for name, report in tuned.items():
        parts += [f"{name}:", format_change(base[name], report, select=select.rpartition("/")[2])]
    return "\n\n".join(parts)
