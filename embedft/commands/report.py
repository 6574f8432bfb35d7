"""`embedft report`: what an ablation has found, from its folder alone: tables, and a page to open in a browser.

embedft report runs/temperature --metric ndcg@10 mrr@10 --test uber
"""

from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..ablation.effects import measure_effects
from ..ablation.grid import REPORT
from ..ablation.page import format_page
from ..ablation.results import Results
from ..ablation.tables import format_report
from ..config import REQUIRED, option
from ..files import replace_files
from ..retrieval.tables import Style

FILES = {"report.md": "markdown", "report.csv": "csv", "report.tex": "latex"}


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    folder: str = option(REQUIRED, "what `embedft ablate` wrote", metavar="DIR", positional=True)
    metric: list[str] = option([], "metrics to report [the one that chose the weights]", metavar="NAME ...")
    test: list[str] = option([], "test sets to report [all]", metavar="NAME ...")
    style: Style = option("text", "format of the printed report")


def run(options: Options) -> None:
    """Writes report.md, .csv, .tex and .html into DIR/report, and prints the report."""
    results = Results.load(options.folder, options.test)
    effects = measure_effects(results, list(dict.fromkeys(options.metric)) or [results.grid.metric])
    with replace_files(Path(options.folder) / REPORT) as folder:
        for name, style in FILES.items():
            (folder / name).write_text(format_report(results, effects, style=style), encoding="utf-8")
        (folder / "report.html").write_text(format_page(results, effects), encoding="utf-8")
    print(format_report(results, effects, style=options.style))
