"""Reports as tables: several by name, a grid of settings, comparisons; as text, Markdown, CSV or LaTeX.

    print(format_reports({"model": report, "bm25": bm25}))
    print(format_grid(evaluate_grid(embedder, dataset, dims=[384, 128], precisions=["float32", "int8"])))
    print(format_comparisons({"tuned": [compare(base, tuned, metric="mrr@10")]}, style="csv"))

CSV has every digit, an interval as two columns, and column names without blanks; LaTeX needs the package booktabs.
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from .report import Comparison, Report, compare

Style = Literal["text", "markdown", "csv", "latex"]
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
MAIN_METRICS = ("hit_rate@5", "mrr@10", "ndcg@10", "map@100")


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, style: Style = "markdown", num_left: int = 1
) -> str:
    """A table of cells that are strings already; the first `num_left` columns are left-aligned, the others right."""
    if style not in get_args(Style):
        raise ValueError(f"style is {style!r}, expected one of {', '.join(get_args(Style))}")
    if style == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue().rstrip("\n")
    if style == "latex":
        return _latex([header, *rows], num_left)
    bar = r"\|" if style == "markdown" else "|"
    columns = [[c.replace("\n", " ").replace("|", bar) for c in column] for column in zip(header, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        column[:] = [cell.ljust(width) if i < num_left else cell.rjust(width) for cell in column]
    lines = list(zip(*columns, strict=True))
    if style == "text":
        return "\n".join("  ".join(line).rstrip() for line in lines)
    first, *others = [f"| {' | '.join(line)} |" for line in lines]
    rules = ["-" * (width + 1) + ("-" if i < num_left else ":") for i, width in enumerate(widths)]
    return "\n".join([first, f"|{'|'.join(rules)}|", *others])


def _latex(rows: Sequence[Sequence[str]], num_left: int) -> str:
    # A minus is not a hyphen; {} keeps a cell like "[0, 1]" from being read as an argument of the line break before it.
    cells = [[re.sub(r"(?<![\w.)])-(?=\.?\d)", "$-$", cell.translate(LATEX)) for cell in row] for row in rows]
    first, *others = [rf"{{}}{' & '.join(row)} \\" for row in cells]
    columns = "l" * num_left + "r" * (len(rows[0]) - num_left)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


class _Column(NamedTuple):
    """A column of values, None where there is none. CSV writes values as they are, other styles by `spec`."""

    title: str  # "": in CSV only
    values: Sequence[Any]
    spec: str = ""
    keys: tuple[str, ...] = ()  # names in CSV, by default the title; two for intervals
    missing: str = ""  # what is shown for None, except in CSV

    def show(self, value: Any) -> str:
        if value is None:
            return self.missing
        if isinstance(value, tuple):
            return f"[{value[0]:{self.spec}}, {value[1]:{self.spec}}]"
        return "<0.0001" if self.keys == ("p_value",) and value < 0.00005 else f"{value:{self.spec}}"


def _format(columns: Sequence[_Column], *, style: Style, num_left: int) -> str:
    cells: dict[str, list[str]] = {}
    for column in columns:
        if style != "csv" and column.title:
            cells[column.title] = list(map(column.show, column.values))
        for i, key in enumerate(column.keys or [column.title] if style == "csv" else []):
            values = [value[i] if isinstance(value, tuple) else value for value in column.values]
            cells[key] = ["" if value is None else str(value) for value in values]
    return format_table(list(cells), list(zip(*cells.values(), strict=True)), style=style, num_left=num_left)


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


def _means(name: str, report: Report, metrics: Sequence[str]) -> list[float]:
    if missing := [metric for metric in metrics if metric not in report.metrics]:
        raise ValueError(f"{name} has no metric {missing[0]!r}; it has: {', '.join(report.metrics)}")
    return [report.metrics[metric] for metric in metrics]


def format_reports(
    reports: Mapping[str, Report], *, metrics: Sequence[str] | None = None, style: Style = "markdown"
) -> str:
    """A row per report, possibly over different questions, and a column per metric [`main_metrics` of the first]."""
    if not reports:
        raise ValueError("no reports for a table")
    metrics = main_metrics(next(iter(reports.values()))) if metrics is None else metrics
    rows = [_means(f"report {name!r}", report, metrics) for name, report in reports.items()]
    measured = [_Column(metric, column, ".4f") for metric, column in zip(metrics, zip(*rows, strict=True), strict=True)]
    return _format([_Column("report", list(reports)), *measured], style=style, num_left=1)


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
    seconds to build the index. Cells that a report says nothing about stay empty, as for BM25. Searches that took less
    than `timed_seconds` say little about speed: their queries/s are shown in CSV only.
    """
    if not reports:
        raise ValueError("no reports for a table")
    settings, costs = [report.setting for report in reports], [dict(report.costs) for report in reports]
    names = [f"the report of {setting_name(setting) or 'an unnamed setting'}" for setting in settings]
    means = [_means(name, report, [metric])[0] for name, report in zip(names, reports, strict=True)]
    base = grid_base(reports)
    found = iter(compare_all(base, [report for report in reports if report is not base], metric=metric))
    comparisons = [None if report is base else next(found) for report in reports]
    for cost in costs:
        if style != "csv" and cost.get("search_seconds", math.inf) < timed_seconds:
            cost["queries_per_second"] = None
    passages = [_passages(setting, "/") or (setting.get("dim") and "whole") for setting in settings]
    columns = [_Column("passages", passages)] if any(setting.get("passages") for setting in settings) else []
    columns += [_Column(key, [setting.get(key) for setting in settings]) for key in ("dim", "precision", "index")]
    num_left = len(columns)
    columns += [_Column(metric, means, ".4f"), *_statistics(comparisons, missing="base")]
    for title, key, spec in (
        ("of exact", "recall@10_of_exact", ".3f"),
        ("queries/s", "queries_per_second", ",.0f"),
        ("bytes/doc", "bytes_per_document", ",.0f"),
        ("build, s", "build_seconds", ".2f"),
    ):
        columns.append(_Column(title, [cost.get(key) for cost in costs], spec, (key,)))
    return _format(columns, style=style, num_left=num_left)


def _statistics(comparisons: Sequence[Comparison | None], *, missing: str = "") -> list[_Column]:
    """Columns for difference, interval and p-value; in a row without a comparison the difference is `missing`."""
    one = next(filter(None, comparisons), None)
    interval = f"{100 * one.confidence:g}% interval" if one else "interval"
    holm = f" (Holm, {one.num_comparisons})" if one and one.num_comparisons > 1 else ""

    def values(name: str) -> list[Any]:
        return [getattr(found, name, None) for found in comparisons]

    return [
        _Column("difference", values("difference"), "+.4f", missing=missing),
        _Column(interval, values("interval"), "+.4f", ("interval_low", "interval_high")),
        _Column(f"p-value{holm}", values("p_value"), ".4f", ("p_value",)),
    ]


def compare_all(base: Report, others: Sequence[Report], *, metric: str) -> list[Comparison]:
    """`compare` as a list, for any number of other reports, including one and none."""
    found = compare(base, *others, metric=metric) if others else []
    return found if isinstance(found, list) else [found]


def format_comparisons(
    comparisons: Mapping[str, Sequence[Comparison]], *, base: str = "base", style: Style = "markdown"
) -> str:
    """For each metric, a row for the base and one for each other report: its mean and how it differs from the base.

    Columns: metric, report, mean; difference, interval and p-value (Holm over the other reports, if several); number of
    questions on which the report is better than the base, equal, and worse. CSV adds questions, clusters and seeds.
    `comparisons` is {name of the other report: its comparisons with one base, one per metric}.
    """
    metrics = {name: [found.metric for found in of_name] for name, of_name in comparisons.items()}
    if len(set(map(tuple, metrics.values()))) != 1 or not all(metrics.values()):
        raise ValueError(f"expected comparisons by the same metrics for every name, found {metrics}")
    rows: list[tuple[str, str, float, Comparison | None]] = []
    for by_metric in zip(*comparisons.values(), strict=True):
        rows.append((by_metric[0].metric, base, by_metric[0].base, None))
        rows += [(found.metric, name, found.other, found) for name, found in zip(comparisons, by_metric, strict=True)]
    by, names, means, found = zip(*rows, strict=True)
    columns = [_Column("metric", by), _Column("report", names), _Column("mean", means, ".4f"), *_statistics(found)]
    shown = {
        "wins": "better",
        "ties": "equal",
        "losses": "worse",
        "num_queries": "",
        "num_clusters": "",
        "num_seeds": "",
    }
    columns += [
        _Column(title, [getattr(one, key, None) for one in found], keys=(title or key,)) for key, title in shown.items()
    ]
    return _format(columns, style=style, num_left=2)
