"""`embedft compare`: tests whether saved reports differ, question by question.

embedft compare eval/base eval/windows --metric mrr@10 hit_rate@5
embedft compare eval/base eval/seed0 eval/seed1 eval/seed2 --seeds
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..config import REQUIRED, option
from ..retrieval.report import Report, compare_seeds, paired_values, plot_questions, save_figure
from ..retrieval.tables import Style, compare_all, explain_statistics, format_comparisons
from .options import check_output


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    reports: list[str] = option(REQUIRED, "reports of evaluate or finetune, base first", metavar="DIR", positional=True)
    metric: list[str] = option(["ndcg@10"], "metrics to compare; all reports must have them", metavar="NAME ...")
    seeds: bool = option(False, "treat the others as one recipe trained with several seeds")
    bases: int = option(1, "with --seeds: number of base reports, trained with the same seeds", least=1)
    style: Style = option("text", "table format")
    save_plot: str | None = option(None, "plot two reports question by question (.png, .pdf, .svg)", metavar="FILE")
    overwrite: bool = option(False, "replace the plot in FILE")

    def __post_init__(self):
        if len(self.reports) < 2:
            raise ValueError(f"one report, {self.reports[0]}: expected a base and at least one other")
        if self.save_plot and len(self.reports) > 2:
            raise ValueError(f"--save-plot needs two reports, found {len(self.reports)}")
        if self.seeds and len(self.reports) - self.bases < 2:
            raise ValueError("--seeds needs a base and the reports of at least two seeds")
        if self.bases >= len(self.reports) or (self.bases > 1 and not self.seeds):
            raise ValueError(f"--bases is {self.bases}, expected 1, or with --seeds fewer than the reports")


def run(options: Options) -> None:
    """Compares each report, or all of them as one recipe, with the base."""
    if options.save_plot:
        check_output(options.save_plot, overwrite=options.overwrite)
    for folder in map(Path, options.reports):
        found = sorted(
            str(path.parent) for part in ("*", "eval/*", "eval/*/*") for path in folder.glob(f"{part}/metrics.json")
        )
        if found and not (folder / "metrics.json").is_file():
            raise ValueError(f"{folder}: not a report, but contains {', '.join(found)}")
    reports = [Report.load(folder) for folder in options.reports]
    named = zip(short_names(options.reports), reports, strict=True)
    base_name, *names = [f"{name} ({x.name})" if "model" in x.setting and name != x.name else name for name, x in named]
    for folder, report in zip(options.reports[1:], reports[1:], strict=True):
        try:
            paired_values(reports[0], [report], options.metric[0])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    bases, others = reports[: options.bases], reports[options.bases :]
    by_metric = [
        [compare_seeds(bases, others, metric=metric)] if options.seeds else compare_all(bases[0], others, metric=metric)
        for metric in dict.fromkeys(options.metric)
    ]
    names = [f"{len(others)} seeds"] if options.seeds else names
    comparisons = dict(zip(names, map(list, zip(*by_metric, strict=True)), strict=True))
    if options.save_plot:
        save_figure(plot_questions(*reports, metric=options.metric[0], names=(base_name, names[0])), options.save_plot)
    print(format_comparisons(comparisons, base=base_name, style=options.style))
    if options.style == "text":
        one, how = by_metric[0][0], explain_statistics(len(others))
        if options.seeds:
            how = "intervals and p-values from a t distribution, for new seeds and new questions;\n"
            how += f"{one.metric}: standard error {one.question_error:.4f} (questions), {one.seed_error:.4f} (seeds)"
        size = f"{one.num_queries:,} questions in {one.num_clusters:,} clusters (questions that share a document)"
        print(f"\n{size}; differences from {base_name};\n{how}")


def short_names(folders: Sequence[str]) -> list[str]:
    """The paths without their common beginning and end; repeated ones are numbered."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for step in (0, -1):  # from the front, then from the back
        while min(map(len, parts)) > 1 and len({path[step] for path in parts}) == 1:
            parts = [path[1:] if step == 0 else path[:-1] for path in parts]
    names: list[str] = []
    for name in map("/".join, parts):
        numbered = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        names.append(next(other for other in numbered if other not in names))
    return names
