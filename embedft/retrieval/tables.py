"""Reports as tables: several by name, a grid of settings, comparisons; as text, Markdown, CSV or LaTeX.

    print(format_reports({"model": report, "bm25": bm25}))
    print(format_grid(evaluate_grid(embedder, dataset, dims=[384, 128], precisions=["float32", "int8"])))
    print(format_comparisons({"tuned": [compare(base, tuned, metric="mrr@10")]}, style="latex"))

"text" and "markdown" line up in a terminal. "csv" has every digit, an interval as two columns, and column names without
blanks. "latex" is a tabular that needs the package booktabs.
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .report import Comparison, Report, compare

Style = Literal["text", "markdown", "csv", "latex"]
STYLES = ("text", "markdown", "csv", "latex")
MAIN_METRICS = ("hit_rate@5", "mrr@10", "ndcg@10", "map@100")
# Characters that are commands in LaTeX, and < > |, which its default font encoding replaces.
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
    }
)


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, style: Style = "markdown", num_left: int = 1
) -> str:
    """A table of cells that are strings already; the first `num_left` columns are left-aligned, the others right."""
    if style not in STYLES:
        raise ValueError(f"style is {style!r}, expected one of {', '.join(STYLES)}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"table: row {number} has {len(row)} cells, the header {len(header)}")
    if style == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue().rstrip("\n")
    lines = [[_escape(" ".join(cell.split("\n")), style) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = [
        [cell.ljust(widths[i]) if i < num_left else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        for line in lines
    ]
    if style == "text":
        return "\n".join("  ".join(line).rstrip() for line in (first, *others))
    if style == "markdown":
        rules = ["-" * (w + 2) if i < num_left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
        body = [f"| {' | '.join(line)} |" for line in (first, *others)]
        return "\n".join([body[0], f"|{'|'.join(rules)}|", *body[1:]])
    columns = "l" * num_left + "r" * (len(header) - num_left)
    body = [r"\toprule", _latex_line(first), r"\midrule", *map(_latex_line, others), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _escape(cell: str, style: Style) -> str:
    if style == "markdown":
        return cell.replace("|", r"\|")
    if style == "latex":
        # A minus sign is longer than a hyphen; hyphens within names stay.
        return re.sub(r"(?<![\w.)])-(?=\.?\d)", "$-$", cell.translate(LATEX))
    return cell


def _latex_line(cells: Sequence[str]) -> str:
    line = rf"{' & '.join(cells)} \\"
    # After the \\ of the previous line, [ or * would be read as its argument.
    return f"{{}}{line}" if line.startswith(("[", "*")) else line


class _Column(NamedTuple):
    """A column of values, None where there is none. CSV writes values as they are, other styles by `spec`."""

    keys: tuple[str, ...]  # names in CSV; with two, a value is an interval and takes two columns there
    title: str | None = None  # name in the other styles; None: in CSV only
    spec: str = ""

    def show(self, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if len(self.keys) == 2:
            return f"[{value[0]:{self.spec}}, {value[1]:{self.spec}}]"
        return "<0.0001" if self.keys == ("p_value",) and value < 0.00005 else f"{value:{self.spec}}"

    def csv(self, value: Any) -> list[str]:
        values = value if isinstance(value, tuple) else [value] * len(self.keys)
        return ["" if value is None else str(value) for value in values]


def _format(columns: Sequence[_Column], rows: Sequence[Sequence[Any]], *, style: Style, num_left: int) -> str:
    if style == "csv":
        header = [key for column in columns for key in column.keys]
        spread = [
            [cell for column, value in zip(columns, row, strict=True) for cell in column.csv(value)] for row in rows
        ]
        return format_table(header, spread, style=style)
    shown = [i for i, column in enumerate(columns) if column.title is not None]
    cells = [[columns[i].show(row[i]) for i in shown] for row in rows]
    return format_table([columns[i].title for i in shown], cells, style=style, num_left=num_left)


def main_metrics(report: Report) -> list[str]:
    """hit_rate@5, mrr@10, ndcg@10 and map@100, or each at its largest cutoff, and all metrics beyond the default ones.

    If the report has none of these, all of its metrics.
    """
    families: dict[str, dict[str, int]] = {}
    for key in report.per_query:
        name, _, k = key.partition("@")
        families.setdefault(name, {})[key] = int(k or 0)
    cutoffs = [(main, families.pop(main.partition("@")[0], None)) for main in MAIN_METRICS]
    chosen = [main if main in keys else max(keys, key=keys.get) for main, keys in cutoffs if keys]
    others = [key for name, keys in families.items() if name not in ("accuracy", "precision", "recall") for key in keys]
    return chosen + others or list(report.per_query)


def _require_metric(name: str, report: Report, metric: str) -> None:
    if metric not in report.per_query:
        raise ValueError(f"{name} has no metric {metric!r}; it has: {', '.join(report.per_query)}")


def format_reports(
    reports: Mapping[str, Report], *, metrics: Sequence[str] | None = None, style: Style = "markdown"
) -> str:
    """A row per report and a column per metric, with its mean over the questions.

    Args:
        reports: {name: report}, possibly over different questions.
        metrics: None: `main_metrics` of the first report.
    """
    if not reports:
        raise ValueError("no reports for a table")
    metrics = main_metrics(next(iter(reports.values()))) if metrics is None else metrics
    for name, report in reports.items():
        for metric in metrics:
            _require_metric(f"report {name!r}", report, metric)
    columns = [_Column(("report",), "report"), *(_Column((metric,), metric, ".4f") for metric in metrics)]
    rows = [[name, *(report.metrics[metric] for metric in metrics)] for name, report in reports.items()]
    return _format(columns, rows, style=style, num_left=1)


def setting_name(setting: Mapping[str, Any]) -> str:
    """What `Report.setting` says of the search, as a file name or label: "128-64-dim384-int8-hnsw"."""
    parts = [_passages(setting, "-"), setting.get("dim") and f"dim{setting['dim']}"]
    parts += [setting.get("precision"), setting.get("index")]
    return re.sub(r"[^\w.,-]", "-", "-".join(part for part in parts if part))


def _passages(setting: Mapping[str, Any], between: str) -> str | None:
    """Size and stride of the windows, and their aggregate unless it is "max"; None without windows."""
    if not setting.get("passages"):
        return None
    aggregate = setting.get("aggregate") or "max"
    return between.join([*map(str, setting["passages"]), *([aggregate] if aggregate != "max" else [])])


def grid_base(reports: Sequence[Report]) -> Report:
    """The report of a grid to compare the others with: exact float32 search at the largest dim, else the first one."""
    exact = [r for r in reports if (r.setting.get("precision"), r.setting.get("index")) == ("float32", "flat")]
    return max(exact, key=lambda report: report.setting.get("dim") or 0) if exact else reports[0]


def format_grid(
    reports: Sequence[Report], *, metric: str = "ndcg@10", style: Style = "markdown", timed_seconds: float = 0.1
) -> str:
    """A row per setting: quality, its difference from `grid_base`, and cost.

    Columns: passages (size/stride in tokens, if any row has them), dim, precision, index; the mean of `metric`;
    difference, interval and p-value of `compare` (Holm over all rows but the base); the share of the first 10 documents
    of exact search that this search finds too ("of exact"); queries per second of search alone; bytes per document;
    seconds to build the index. Cells that a report says nothing about stay empty, as for BM25.

    Args:
        timed_seconds: searches that took less say little about speed, so their queries/s are shown in CSV only.
    """
    if not reports:
        raise ValueError("no reports for a table")
    for report in reports:
        _require_metric(f"the report of {setting_name(report.setting) or 'an unnamed setting'}", report, metric)
    base = grid_base(reports)
    others = [report for report in reports if report is not base]
    comparisons = dict(zip(map(id, others), compare_all(base, others, metric=metric), strict=True))
    settings = [_Column((key,), key) for key in ("dim", "precision", "index")]
    costs = [
        _Column(("recall@10_of_exact",), "of exact", ".3f"),
        _Column(("queries_per_second",), "queries/s", ",.0f"),
        _Column(("bytes_per_document",), "bytes/doc", ",.0f"),
        _Column(("build_seconds",), "build, s", ".2f"),
    ]
    rows = []
    for report in reports:
        found = comparisons.get(id(report))
        statistics = [found.difference, found.interval, found.p_value] if found else ["base", None, None]
        if style == "csv" and not found:
            statistics[0] = None
        cost = [report.costs.get(column.keys[0]) for column in costs]
        if style != "csv" and report.costs.get("search_seconds", math.inf) < timed_seconds:
            cost[1] = None
        setting = [report.setting.get(column.keys[0]) for column in settings]
        passages = _passages(report.setting, "/") or (report.setting.get("dim") and "whole")
        rows.append([passages, *setting, report.metrics[metric], *statistics, *cost])
    statistics = _statistics(next(iter(comparisons.values()), None), len(others))
    columns = [_Column(("passages",), "passages"), *settings, _Column((metric,), metric, ".4f"), *statistics, *costs]
    start = 0 if any(report.setting.get("passages") for report in reports) else 1
    return _format(columns[start:], [row[start:] for row in rows], style=style, num_left=4 - start)


def _statistics(one: Comparison | None, num_comparisons: int) -> list[_Column]:
    """Columns for difference, interval and p-value."""
    heading = "interval" if one is None else f"{100 * one.confidence:g}% interval"
    holm = f" (Holm, {num_comparisons})" if num_comparisons > 1 else ""
    return [
        _Column(("difference",), "difference", "+.4f"),
        _Column(("interval_low", "interval_high"), heading, "+.4f"),
        _Column(("p_value",), f"p-value{holm}", ".4f"),
    ]


def compare_all(base: Report, others: Sequence[Report], *, metric: str, **options: Any) -> list[Comparison]:
    """`compare` as a list, for any number of other reports, including one and none."""
    found = compare(base, *others, metric=metric, **options) if others else []
    return found if isinstance(found, list) else [found]


def format_comparisons(
    comparisons: Mapping[str, Sequence[Comparison]], *, base: str = "base", style: Style = "markdown"
) -> str:
    """For each metric, a row for the base and one for each other report: its mean and how it differs from the base.

    Columns: metric, report, mean; difference, interval and p-value (Holm over the other reports, if several); number of
    questions on which the report is better than the base, equal, and worse. CSV adds questions, clusters and seeds.

    Args:
        comparisons: {name of the other report: its comparisons with one base, one per metric}.
        base: the name of the base.
    """
    by_metric = {name: {c.metric: c for c in found} for name, found in comparisons.items()}
    metrics = list(next(iter(by_metric.values()), {}))
    if not metrics:
        raise ValueError("no comparisons for a table")
    for name, found in by_metric.items():
        if list(found) != metrics or len(comparisons[name]) != len(metrics):
            have = ", ".join(c.metric for c in comparisons[name])
            raise ValueError(f"{name!r} is compared by {have or 'nothing'}, expected {', '.join(metrics)}")
    one = next(iter(comparisons.values()))[0]
    columns = [_Column((key,), key) for key in ("metric", "report")]
    columns += [_Column(("mean",), "mean", ".4f"), *_statistics(one, one.num_comparisons)]
    columns += [_Column((key,), key) for key in ("better", "equal", "worse")]
    columns += [_Column((key,)) for key in ("num_queries", "num_clusters", "num_seeds")]
    rows: list[list[Any]] = []
    for metric in metrics:
        rows.append([metric, base, next(iter(by_metric.values()))[metric].base, *[None] * (len(columns) - 3)])
        for name, found in by_metric.items():
            c = found[metric]
            counts = [c.wins, c.ties, c.losses, c.num_queries, c.num_clusters, c.num_seeds]
            rows.append([metric, name, c.other, c.difference, c.interval, c.p_value, *counts])
    return _format(columns, rows, style=style, num_left=2)
