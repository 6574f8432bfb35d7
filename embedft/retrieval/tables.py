"""Reports as tables: several by name, a grid of settings, comparisons; as text, Markdown, CSV or LaTeX.

    print(format_reports({"model": report, "bm25": bm25}))
    print(format_grid(evaluate_grid(embedder, dataset, dims=[384, 128], precisions=["float32", "int8"])))
    print(format_comparisons({"tuned": [compare(base, tuned, metric="mrr@10")]}, style="latex"))

"text" and "markdown" line up in a terminal. "csv" has every digit, an interval as two columns, and names without blanks
for its columns. "latex" is a tabular with the rules of the package booktabs.

Not here: how reports come about (evaluate.py), the statistics (report.py, significance.py), and figures (plots.py).
"""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .report import Comparison, Report, compare

Style = Literal["text", "markdown", "csv", "latex"]
STYLES = ("text", "markdown", "csv", "latex")
MAIN_METRICS = ("hit_rate@5", "mrr@10", "ndcg@10", "map@100")
# A search that took less says nothing of its rate: "queries/s" is left empty.
TIMED_SECONDS = 0.1
# What LaTeX would read as a command; < > | come out as other signs in its default font encoding.
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, style: Style = "markdown", num_left: int = 1
) -> str:
    """A table of cells that are text already.

    Args:
        num_left: columns aligned to the left; those behind them to the right.

    Raises:
        ValueError: an unknown style, or a row with another number of cells than the header.
    """
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
        return "\n".join([_markdown_line(first), f"|{'|'.join(rules)}|", *map(_markdown_line, others)])
    columns = "l" * num_left + "r" * (len(header) - num_left)
    body = [r"\toprule", _latex_line(first), r"\midrule", *map(_latex_line, others), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _escape(cell: str, style: Style) -> str:
    if style == "markdown":
        return cell.replace("|", r"\|")
    if style == "latex":
        # A hyphen is shorter than a minus sign; one within a name stays.
        return re.sub(r"(?<![\w.)])-(?=\.?\d)", "$-$", cell.translate(LATEX))
    return cell


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex_line(cells: Sequence[str]) -> str:
    line = rf"{' & '.join(cells)} \\"
    # Behind the \\ of the line before, these would be its argument.
    return f"{{}}{line}" if line.startswith(("[", "*")) else line


class _Column(NamedTuple):
    """A column of values, or None where there is none."""

    keys: tuple[str, ...]  # what CSV calls it; several: a value is a tuple of as many, in columns of their own
    title: str | None  # what the other styles call it; None: it is not in them
    show: Callable[[Any], str] = str


def _format(columns: Sequence[_Column], rows: Sequence[Sequence[Any]], *, style: Style, num_left: int) -> str:
    if style == "csv":
        spread = [
            [part for column, value in zip(columns, row, strict=True) for part in _parts(value, len(column.keys))]
            for row in rows
        ]
        return format_table([key for column in columns for key in column.keys], spread, style="csv")
    shown = [i for i, column in enumerate(columns) if column.title is not None]
    cells = [["" if row[i] is None else columns[i].show(row[i]) for i in shown] for row in rows]
    return format_table([columns[i].title for i in shown], cells, style=style, num_left=num_left)


def _parts(value: Any, number: int) -> list[str]:
    if value is None:
        return [""] * number
    return [str(part) for part in (value if number > 1 else (value,))]


def _mean(value: float) -> str:
    return f"{value:.4f}"


def _difference(value: float) -> str:
    return f"{value:+.4f}"


def _interval(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


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
    """A row a report, a column a metric: its mean over the questions.

    Args:
        reports: {name: report}; they may be over different questions.
        metrics: None: `main_metrics` of the first report.

    Raises:
        ValueError: no reports, a metric that one of them lacks, or an unknown style.
    """
    if not reports:
        raise ValueError("no reports for a table")
    metrics = main_metrics(next(iter(reports.values()))) if metrics is None else metrics
    for name, report in reports.items():
        for metric in metrics:
            _require_metric(f"report {name!r}", report, metric)
    columns = [_Column(("report",), "report"), *(_Column((metric,), metric, _mean) for metric in metrics)]
    rows = [[name, *(report.metrics[metric] for metric in metrics)] for name, report in reports.items()]
    return _format(columns, rows, style=style, num_left=1)


def setting_name(setting: Mapping[str, Any]) -> str:
    """What `Report.setting` says of the search, for a file's name or a label: "128-64-dim384-int8-hnsw"."""
    parts = [_passages(setting, "-"), setting.get("dim") and f"dim{setting['dim']}"]
    parts += [setting.get("precision"), setting.get("index")]
    return re.sub(r"[^\w.,-]", "-", "-".join(part for part in parts if part))


def _passages(setting: Mapping[str, Any], between: str) -> str | None:
    """Size and stride of the windows, and how a document scores by them unless it is by the best; None: no windows."""
    if not setting.get("passages"):
        return None
    aggregate = setting.get("aggregate") or "max"
    return between.join([*map(str, setting["passages"]), *([aggregate] if aggregate != "max" else [])])


def grid_base(reports: Sequence[Report]) -> Report:
    """The report of a grid that the others are compared with.

    The first of the largest dim among those of exact search in float32; where there is none, the first of all.
    """
    exact = [r for r in reports if (r.setting.get("precision"), r.setting.get("index")) == ("float32", "flat")]
    return max(exact, key=lambda report: report.setting.get("dim") or 0) if exact else reports[0]


def format_grid(reports: Sequence[Report], *, metric: str = "ndcg@10", style: Style = "markdown") -> str:
    """A row a setting: quality, its difference to `grid_base`, and what it costs.

    Columns: passages (size/stride in tokens, where some row has any), dim, precision, index; the mean of `metric`;
    difference, interval and p-value of `compare`, Holm over all rows but the base; the share of the first 10 documents
    of exact search over the same vectors that this search has among its first 10 ("of exact"); queries a second of
    search alone, empty where that took less than a tenth of a second (CSV has them all); bytes a document; seconds to
    build the index. What a report does not say stays empty, as for one of BM25.

    Raises:
        ValueError: no reports, reports over different questions, a metric that one of them lacks, an unknown style.
    """
    if not reports:
        raise ValueError("no reports for a table")
    for report in reports:
        _require_metric(f"the report of {setting_name(report.setting) or 'an unnamed setting'}", report, metric)
    base = grid_base(reports)
    others = [report for report in reports if report is not base]
    comparisons = dict(zip(map(id, others), compare_all(base, others, metric=metric), strict=True))
    heading = f"{100 * next(iter(comparisons.values())).confidence:g}% interval" if comparisons else "interval"
    holm = f" (Holm, {len(others)})" if len(others) > 1 else ""
    columns = [
        _Column(("dim",), "dim"),
        _Column(("precision",), "precision"),
        _Column(("index",), "index"),
        _Column((metric,), metric, _mean),
        _Column(("difference",), "difference", lambda value: value if isinstance(value, str) else _difference(value)),
        _Column(("interval_low", "interval_high"), heading, _interval),
        _Column(("p_value",), f"p-value{holm}", _mean),
        _Column(("recall@10_of_exact",), "of exact", lambda value: f"{value:.3f}"),
        _Column(("queries_per_second",), "queries/s", lambda value: f"{value:,.0f}"),
        _Column(("bytes_per_document",), "bytes/doc", lambda value: f"{value:,.0f}"),
        _Column(("build_seconds",), "build, s", lambda value: f"{value:.2f}"),
    ]
    rows = []
    for report in reports:
        found = comparisons.get(id(report))
        of_base = [None if style == "csv" else "base", None, None]
        statistics = [found.difference, found.interval, found.p_value] if found else of_base
        settings = [report.setting.get(column.keys[0]) for column in columns[:3]]
        costs = [report.costs.get(column.keys[0]) for column in columns[-4:]]
        if style != "csv" and report.costs.get("search_seconds", math.inf) < TIMED_SECONDS:
            costs[1] = None
        rows.append([*settings, report.metrics[metric], *statistics, *costs])
    with_passages = any(report.setting.get("passages") for report in reports)
    if with_passages:
        columns = [_Column(("passages",), "passages"), *columns]
        rows = [
            [_passages(report.setting, "/") or (report.setting.get("dim") and "whole"), *row]
            for report, row in zip(reports, rows, strict=True)
        ]
    return _format(columns, rows, style=style, num_left=3 + with_passages)


def compare_all(base: Report, others: Sequence[Report], *, metric: str, **options: Any) -> list[Comparison]:
    """`compare`, as a list for one other report too, and an empty one for none."""
    if not others:
        return []
    found = compare(base, *others, metric=metric, **options)
    return found if isinstance(found, list) else [found]


def format_comparisons(
    comparisons: Mapping[str, Sequence[Comparison]], *, base: str = "base", style: Style = "markdown"
) -> str:
    """For each metric a row of the base and one of each other report: its mean, and how it differs from the base.

    Columns: metric, report, mean; difference, interval and p-value (Holm over the other reports, where there are
    several); questions on which the report is better than the base, equal, and worse. CSV has more: effect size,
    questions, clusters.

    Args:
        comparisons: {name of the other report: its comparisons with one base, a metric each}.
        base: the name of the base.

    Raises:
        ValueError: nothing to show, comparisons of different metrics or of another number, an unknown style.
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
    holm = f" (Holm, {one.num_comparisons})" if one.num_comparisons > 1 else ""
    columns = [
        _Column(("metric",), "metric"),
        _Column(("report",), "report"),
        _Column(("mean",), "mean", _mean),
        _Column(("difference",), "difference", _difference),
        _Column(("interval_low", "interval_high"), f"{100 * one.confidence:g}% interval", _interval),
        _Column(("p_value",), f"p-value{holm}", _mean),
        _Column(("better",), "better"),
        _Column(("equal",), "equal"),
        _Column(("worse",), "worse"),
        _Column(("effect_size",), None),
        _Column(("num_queries",), None),
        _Column(("num_clusters",), None),
    ]
    rows: list[list[Any]] = []
    for metric in metrics:
        rows.append([metric, base, next(iter(by_metric.values()))[metric].base, *[None] * (len(columns) - 3)])
        for name, found in by_metric.items():
            c = found[metric]
            counts = [c.wins, c.ties, c.losses, c.effect_size, c.num_queries, c.num_clusters]
            rows.append([metric, name, c.other, c.difference, c.interval, c.p_value, *counts])
    return _format(columns, rows, style=style, num_left=2)
