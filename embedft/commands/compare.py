"""`embedft compare`: whether saved reports differ, question by question.

embedft compare eval/base eval/windows --metric mrr@10 hit_rate@5
embedft compare eval/base runs/mine-s?/eval/uber --seeds
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import config
from ..config import REQUIRED, setting
from ..files import check_writable
from ..retrieval.report import Report, compare_seeds
from ..retrieval.tables import Style, compare_all, format_comparisons
from .options import short_names


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    """Options of `embedft compare`."""

    reports: list[Path] = setting(
        REQUIRED, "folders that evaluate --out or finetune wrote, over the same questions; the first is the base",
        metavar="REPORT", positional=True,
    )  # fmt: skip
    metric: list[str] = setting(["ndcg@10"], "metrics, any that all reports have", metavar="NAME ...")
    method: Literal["percentile", "bca"] = setting("percentile", "of the bootstrap interval")
    seeds: bool = setting(
        False, "the other reports are one recipe with several seeds: one row, for new seeds and new questions"
    )
    style: Style = setting("text", "of the table")
    save_plot: Path | None = setting(
        None, "draw two reports question by question, by the first metric (.png, .pdf, .svg; needs matplotlib)",
        metavar="FILE",
    )  # fmt: skip

    def __post_init__(self):
        if len(self.reports) < 2:
            raise ValueError(f"one report, {self.reports[0]}: expected a base and at least one other")
        if self.save_plot and len(self.reports) > 2:
            raise ValueError(f"--save-plot is for two reports, these are {len(self.reports)}")
        if self.seeds and (len(self.reports) < 3 or self.method != "percentile"):
            raise ValueError("--seeds needs a base and the reports of at least two seeds, and has no --method")


def run(options: Options) -> None:
    """Compares each report with the base."""
    if options.save_plot:
        check_writable(options.save_plot, file=True)
    base, *others = map(_load, options.reports)
    for folder, other in zip(options.reports[1:], others, strict=True):
        _check_same_questions(base, other, options.reports[0], folder)
    base_name, *names = short_names(options.reports)
    if options.seeds:
        names = [f"{len(others)} seeds"]
    comparisons: dict[str, list] = {name: [] for name in names}
    for metric in dict.fromkeys(options.metric):
        if options.seeds:
            found = [compare_seeds([base], others, metric=metric)]
        else:
            found = compare_all(base, others, metric=metric, method=options.method)
        for name, comparison in zip(names, found, strict=True):
            comparisons[name].append(comparison)
    if options.save_plot:
        from ..retrieval.plots import plot_questions, save_figure

        figure = plot_questions(base, others[0], metric=options.metric[0], names=(base_name, names[0]))
        save_figure(figure, options.save_plot)
    print(format_comparisons(comparisons, base=base_name, style=options.style))
    if options.style == "text":
        one = comparisons[names[0]][0]
        how = f"intervals by bootstrap ({one.method}), p-values by sign flips"
        if options.seeds:
            how = "intervals and p-values by a t distribution, for new seeds and new questions"
        print(
            f"\n{one.num_queries:,} questions in {one.num_clusters:,} clusters (questions that share a document);"
            f" differences to {base_name};\n{how}"
        )


def _load(folder: Path) -> Report:
    if not (folder / "metrics.json").is_file():
        found = sorted(str(path.parent) for part in ("*", "eval/*") for path in folder.glob(f"{part}/metrics.json"))
        if found:
            raise ValueError(f"{folder}: is no report, but holds {', '.join(found)}")
    return Report.load(folder)


def _check_same_questions(base: Report, other: Report, base_folder: Path, folder: Path) -> None:
    only = [sorted(set(a.query_ids) - set(b.query_ids)) for a, b in ((base, other), (other, base))]
    told = [
        f"{len(ids):,} only in {where} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
        for ids, where in zip(only, (base_folder, folder), strict=True)
        if ids
    ]
    if told:
        raise ValueError(f"the reports are over different questions: {'; '.join(told)}")
