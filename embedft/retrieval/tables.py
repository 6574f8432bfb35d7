"""Formats reports, grids of settings and comparisons as tables: text, Markdown, CSV or LaTeX.

    print(format_reports({"model": report, "bm25": bm25}))
    print(format_grid(evaluate_grid(embedder, dataset, dims=[384, 128], precisions=["float32", "int8"])))
    print(format_comparisons({"tuned": [compare(base, tuned, metric="mrr@10")]}, style="csv"))

CSV has all digits, two columns per interval, and column names without spaces; LaTeX needs the package booktabs.
"""

import csv
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from .report import Comparison, Report, compare, windows_name

Style = Literal["text", "markdown", "csv", "latex"]
Column = tuple[str, str, str]  # key and name in CSV, title elsewhere ("": left out), format ("": text)
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " "}
)
MAIN_METRICS = ("hit_rate@5", "mrr@10", "ndcg@10", "map@100")


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, style: Style = "markdown", num_left: int = 1
) -> str:
    """A table of cells given as strings; the first `num_left` columns are left-aligned, the others right-aligned."""
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
    for i, width in enumerate(widths):
        columns[i] = [cell.ljust(width) if i < num_left else cell.rjust(width) for cell in columns[i]]
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


def format_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], style: Style) -> str:
    """A table of rows {key: value}; None or a missing key makes an empty cell. CSV writes values unformatted."""
    if style != "csv":
        shown = [column for column in columns if column[1]]
        cells = [[_show(key, row.get(key), spec) for key, _, spec in shown] for row in rows]
        num_left = sum(not spec for _, _, spec in shown)
        return format_table([title for _, title, _ in shown], cells, style=style, num_left=num_left)
    ends = ("interval_low", "interval_high")
    keys = [name for key, _, _ in columns for name in (ends if key == "interval" else [key])]
    rows = [{**row, **dict(zip(ends, row.get("interval") or (), strict=False))} for row in rows]
    return format_table(keys, [["" if row.get(k) is None else str(row[k]) for k in keys] for row in rows], style=style)


def _show(key: str, value: Any, spec: str) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]:{spec}}, {value[1]:{spec}}]"
    if value is None or isinstance(value, str):
        return value or ""
    return "<0.0001" if key == "p_value" and value < 0.00005 else f"{value:{spec}}"


def main_metrics(report: Report) -> list[str]:
    """MAIN_METRICS (or the same at the largest cutoff), and all non-default metrics; if there are none, all metrics."""
    families: dict[str, dict[str, int]] = {}
    for key in report.per_query:
        name, _, k = key.partition("@")
        families.setdefault(name, {})[key] = int(k or 0)
    cutoffs = [(main, families.pop(main.partition("@")[0], None)) for main in MAIN_METRICS]
    chosen = [main if main in keys else max(keys, key=keys.get) for main, keys in cutoffs if keys]
    others = [key for name, keys in families.items() if name not in ("accuracy", "precision", "recall") for key in keys]
    return chosen + others or list(report.per_query)


def _require_metrics(reports: Iterable[tuple[str, Report]], metrics: Sequence[str]) -> None:
    for name, report in reports:
        if missing := [metric for metric in metrics if metric not in report.metrics]:
            raise ValueError(f"{name} has no metric {missing[0]!r}; it has: {', '.join(report.metrics)}")


def format_reports(reports: Mapping[str, Report], *, style: Style = "markdown") -> str:
    """A row per report, possibly over different questions, and a column for each of the first's `main_metrics`."""
    if not reports:
        raise ValueError("no reports for a table")
    metrics = main_metrics(next(iter(reports.values())))
    _require_metrics(((f"report {name!r}", report) for name, report in reports.items()), metrics)
    columns = [("report", "report", ""), *((metric, metric, ".4f") for metric in metrics)]
    return format_rows([{"report": name, **report.metrics} for name, report in reports.items()], columns, style)


def setting_name(setting: Mapping[str, Any]) -> str:
    """What `Report.setting` says of the search, as a file name or label: "128-64+64-32-dim384-int8-hnsw"."""
    dim = setting.get("dim") and f"dim{setting['dim']}"
    parts = [windows_name(setting.get("passages") or ()), dim, setting.get("precision"), setting.get("index")]
    return re.sub(r"[^\w.,+-]", "-", "-".join(str(part) for part in parts if part))


def grid_base(reports: Sequence[Report]) -> Report:
    """The report of a grid to compare the others with: exact float32 search at the largest dim, else the first one."""
    exact = [r for r in reports if (r.setting.get("precision"), r.setting.get("index")) == ("float32", "flat")]
    return max(exact, key=lambda report: report.setting.get("dim") or 0) if exact else reports[0]


def format_grid(reports: Sequence[Report], *, metric: str = "ndcg@10", style: Style = "markdown") -> str:
    """A row per setting: quality, its difference from `grid_base` (see `compare`; Holm over all rows) and costs: the
    share of exact search's first 10 documents that are found, queries per second (only in CSV if search took less than
    0.1 seconds), bytes per document and seconds to build the index."""
    if not reports:
        raise ValueError("no reports for a table")
    names = [f"the report of {setting_name(report.setting) or 'an unnamed setting'}" for report in reports]
    _require_metrics(zip(names, reports, strict=True), [metric])
    base = grid_base(reports)
    comparisons = compare_all(base, [report for report in reports if report is not base], metric=metric)
    found, rows = iter(comparisons), []
    for report in reports:
        row = {**report.setting, **report.costs, metric: report.metrics[metric]}
        if row.get("index") and not row.get("dim"):  # BM25, say
            row["index"] = report.name
        row["passages"] = windows_name(row.get("passages") or ()) or ("whole" if row.get("dim") else None)
        if report is not base:
            row |= vars(next(found))
        elif style != "csv":
            row["difference"] = "base"
        if style != "csv" and row.get("search_seconds", 1) < 0.1:
            row["queries_per_second"] = None
        rows.append(row)
    columns = [(key, key, "") for key in ("passages", "dim", "precision", "index")]
    columns = columns if any(report.setting.get("passages") for report in reports) else columns[1:]
    columns += [(metric, metric, ".4f"), *_statistics(comparisons)]
    columns += [("recall@10_of_exact", "of exact", ".3f"), ("queries_per_second", "queries/s", ",.0f")]
    columns += [("bytes_per_document", "bytes/doc", ",.0f"), ("build_seconds", "build, s", ".2f")]
    return format_rows(rows, columns, style)


def _statistics(comparisons: Sequence[Comparison]) -> list[Column]:
    number = comparisons[0].num_comparisons if comparisons else 1
    p_value = f"p-value (Holm, {number})" if number > 1 else "p-value"
    return [("difference", "difference", "+.4f"), ("interval", "95% interval", "+.4f"), ("p_value", p_value, ".4f")]


def explain_statistics(number: int) -> str:
    """What the intervals and p-values of `number` comparisons with one base are, for below a table."""
    several = "; each interval is at 95% by itself, the p-values are corrected together (Holm)" if number > 1 else ""
    return f"intervals by bootstrap, p-values by sign flips{several}"


def compare_all(base: Report, others: Sequence[Report], *, metric: str) -> list[Comparison]:
    """`compare` as a list, for any number of other reports, including one and none."""
    found = compare(base, *others, metric=metric) if others else []
    return found if isinstance(found, list) else [found]


def format_change(base: Report, tuned: Report, *, select: str) -> str:
    """A fine-tuned model beside its base, in Markdown: those of MAIN_METRICS and `select` that there are."""
    metrics = [name for name in dict.fromkeys((*MAIN_METRICS, select)) if name in tuned.metrics]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other settings, such as the base's own max_length: intended here
        found = [compare(base, tuned, metric=name) for name in metrics]
    return format_comparisons({"fine-tuned": found}, style="markdown")


def format_comparisons(
    comparisons: Mapping[str, Sequence[Comparison]], *, base: str = "base", style: Style = "markdown"
) -> str:
    """For each metric, a row for the base and one for each other report: its mean and how it differs from the base.
    `comparisons` is {name of the other report: its comparisons with one base, one per metric}."""
    metrics = {name: [found.metric for found in of_name] for name, of_name in comparisons.items()}
    if len(set(map(tuple, metrics.values()))) != 1 or not all(metrics.values()):
        raise ValueError(f"expected comparisons by the same metrics for every name, found {metrics}")
    rows: list[dict[str, Any]] = []
    for by_metric in zip(*comparisons.values(), strict=True):
        rows.append({"metric": by_metric[0].metric, "report": base, "mean": by_metric[0].base})
        for name, found in zip(comparisons, by_metric, strict=True):
            counts = {"better": found.wins, "equal": found.ties, "worse": found.losses}
            rows.append({"report": name, "mean": found.other, **vars(found), **counts})
    statistics = _statistics(next(iter(comparisons.values())))
    columns = [("metric", "metric", ""), ("report", "report", ""), ("mean", "mean", ".4f"), *statistics]
    columns += [(name, name, "d") for name in ("better", "equal", "worse")]
    columns += [(name, "", "") for name in ("num_queries", "num_clusters", "num_seeds")]
    return format_rows(rows, columns, style)
