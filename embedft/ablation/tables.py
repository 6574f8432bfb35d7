"""An ablation's report as text, Markdown, CSV or LaTeX.

print(format_report(results, measure_effects(results, ["ndcg@10"]), style="markdown"))
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..retrieval.tables import Column, Style, format_rows
from .effects import Change, Effect, choose
from .grid import AVERAGE, VALIDATION, counted, describe
from .results import Results

MISSING = "Missing: "  # begins a line of the introduction, here and in page.html


def format_report(results: Results, effects: Sequence[Effect], *, style: Style = "markdown") -> str:
    """What is missing, which point validation chose, a table for each metric and test, and how every test changed.
    CSV is one table of all of it, with all digits; LaTeX has the tables alone, and the rest as comments."""
    rows = table_rows(results, effects)
    axes: list[Column] = [(key, key, "") for key in results.grid.axes]
    if style == "csv":
        return format_rows(
            rows, [*((key, "", "") for key in ("metric", "test", "point", "choice")), *axes, *_EVERY], style
        )
    parts = [] if style == "latex" else [_heading("Ablation", 1, style)]
    first, *said = introduction(results, effects)
    parts.append(_said(first, style))
    if lacking := [_said(line, style) for line in said if line.startswith(MISSING)]:
        parts.append("\n".join(f"- {line}" if style == "markdown" else line for line in lacking))
    parts += [_said(line, style) for line in said if not line.startswith(MISSING)]
    for metric, test in dict.fromkeys((one.metric, one.test) for one in effects):
        parts.append(_heading(f"{test}: {metric}", 2, style))
        own = [row for row in rows if (row["metric"], row["test"]) == (metric, test)]
        parts.append(format_rows(own, [("name", "point", ""), *axes, *_columns(metric, own, style)], style))
    tests = list(dict.fromkeys(one.test for one in effects))
    for metric in dict.fromkeys(one.metric for one in effects):
        parts.append(_heading(f"Change on every test set: {metric}", 2, style))
        parts.append(_changes(rows, metric, tests, axes, style))
    return "\n\n".join([*parts, *(_said(note, style) for note in NOTES)]) + "\n"


NOTES = (
    "Each mean is over the finished seeds. Differences are from BASE, paired by question and seed. With several seeds, "
    "intervals (95%) and p-values are from a t distribution, for new seeds and new questions; with one, from a "
    "bootstrap and sign flips (the average of several tests: from a t distribution too), for new questions alone. "
    "Questions that share a document form a cluster; a single cluster has no interval. p-values are corrected over the "
    "points of a table (Holm); intervals are not.",
    "Standard errors: for new questions with these seeds, for new seeds on these questions, and for both. The number "
    "of questions needed is what would detect the observed difference with 80% power (two-sided 5%, before Holm) and "
    "as many seeds; inf: no number of questions would, because the difference is 0 or seeds vary too much. The average "
    "is that of the tests' means.",
    "Changes from the untrained model are in percent of its mean, so that -1.0% on a test set of another domain is "
    "what training made the model forget.",
    "Seconds are of training, means over seeds (of an adapter: without its vectors, which cells share); memory is the "
    "largest peak of a process.",
)


def introduction(results: Results, effects: Sequence[Effect]) -> list[str]:
    """What was run, what is missing, and what validation chose."""
    grid = results.grid
    tests = [one.test for one in effects if one.point == effects[0].point and one.metric == effects[0].metric]
    sizes = {"point": len(grid.points), "seed": len(grid.seeds), "test set": len(set(tests) - {AVERAGE})}
    size = ", ".join(counted(number, noun) for noun, number in sizes.items())
    lines = [f"{size}; BASE is {grid.base.get('model', 'a model')} with {describe(grid.points[0]) or 'no axes'}."]
    lines += [f"{MISSING}{line}." for line in results.missing]
    if not results.of_point(grid.points[0]):
        lines.append(f"{MISSING}BASE has no finished seed, so nothing is compared with it.")
    lines += _kept_base(results)
    chosen = choose(results)
    if chosen is None:
        needed = "validation questions, the same for all points, and a point whose seeds are all finished"
        return [*lines, f"No point is chosen: that takes {needed}."]
    place, value = chosen
    name = describe(grid.points[place]) or "BASE"
    told = [_told(one) for one in effects if one.point == place and one.metric == effects[0].metric]
    reports = [cell.reports[VALIDATION].metrics for cell in results.of_point(grid.points[place]).values()]
    each = [key for key in reports[0] if key.endswith(f"/{grid.metric}")]  # of several datasets
    values = [f"; {key} {np.mean([metrics[key] for metrics in reports]):.4f}" for key in each]
    by_validation = f"Chosen on validation ({grid.select} {value:.4f}, mean over seeds{''.join(values)}): {name}"
    return [*lines, f"{by_validation}. On the test sets, which did not choose it: {'; '.join(told)}."]


def _kept_base(results: Results) -> list[str]:
    """One line that names the runs whose training kept the base weights, if there are any."""
    found = []
    for i, point in enumerate(results.grid.points):
        if seeds := [str(seed) for seed, cell in results.of_point(point).items() if cell.best_step == 0]:
            found.append(f"point {i} (seed {', '.join(seeds)})")
    return [f"No step improved on the base weights in validation, so they were kept: {', '.join(found)}."] * bool(found)


def _told(effect: Effect) -> str:
    change, parts = effect.from_base, []
    if change is not None:
        parts.append(f"{change.difference:+.4f} from BASE")
        if change.interval:
            parts[0] += f" [{change.interval[0]:+.4f}, {change.interval[1]:+.4f}], p {_small(change.p_value)}"
    if effect.relative is not None:
        parts.append(f"{effect.relative:+.1%} from untrained")
    return f"{effect.test} {effect.metric} {effect.mean:.4f}" + (f" ({', '.join(parts)})" if parts else "")


def _small(p_value: float) -> str:
    return f"= {p_value:.4f}" if p_value >= 0.00005 else "< 0.0001"


def table_rows(results: Results, effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """A row for each effect: the point's values, the statistics, seconds and bytes."""
    chosen, rows = choose(results), []
    for one in effects:
        point = results.grid.points[one.point]
        cells = results.of_point(point).values()
        is_chosen = chosen is not None and chosen[0] == one.point
        choice = ["base"] * (one.point == 0) + ["chosen on validation"] * is_chosen
        row = {"metric": one.metric, "test": one.test, "point": one.point, "choice": ", ".join(choice)}
        row |= {"name": ", ".join([str(one.point), *(part.split()[0] for part in choice)])}
        row |= {key: shown(value) for key, value in point.items()}
        row |= {"mean": one.mean, "num_seeds": len(one.by_seed), "num_queries": one.num_queries}
        row |= {
            "num_clusters": one.num_clusters,
            **_flat("base", one.from_base),
            **_flat("untrained", one.from_untrained),
            "untrained": one.untrained,
            "relative_untrained": one.relative,
            "percent_untrained": None if one.relative is None else 100 * one.relative,
        }
        row["train_seconds"] = float(np.mean([cell.train_seconds for cell in cells]))
        row["peak_gib"] = max(cell.peak_bytes for cell in cells) / 2**30
        rows.append(row)
    return rows


def shown(value: Any) -> str:
    """A setting's value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(name: str, change: Change | None) -> dict[str, Any]:
    if change is None:
        return {}
    found = {f"{key}_{name}" if name != "base" else key: value for key, value in vars(change).items()}
    interval = found.pop("interval" if name == "base" else f"interval_{name}")
    ends = ("interval_low", "interval_high") if name == "base" else (f"interval_low_{name}", f"interval_high_{name}")
    return found | dict(zip(ends, interval or (None, None), strict=True)) | {f"interval_{name}": interval}


_FROM_BASE = ("difference", "interval_low", "interval_high", "p_value", "question_error", "seed_error", "error")
_EVERY: list[Column] = [
    (key, "", "")
    for key in (
        *("mean", "num_seeds", "num_queries", "num_clusters", *_FROM_BASE, "questions_needed"),
        *("untrained", "difference_untrained", "percent_untrained"),
        *("interval_low_untrained", "interval_high_untrained", "p_value_untrained"),
        *("train_seconds", "peak_gib"),
    )
]


def _columns(metric: str, rows: list[dict[str, Any]], style: Style) -> list[Column]:
    tested = sum(row.get("p_value") is not None for row in rows)
    p_value = f"p (Holm, {tested})" if tested > 1 else "p"
    columns = [("mean", metric, ".4f"), ("num_seeds", "seeds", "d"), ("difference", "difference", "+.4f")]
    columns += [("interval_base", "95% interval", "+.4f"), ("p_value", p_value, ".4f")]
    columns += [("question_error", "s.e. questions", ".4f"), ("seed_error", "s.e. seeds", ".4f")]
    columns += [("error", "s.e. both", ".4f"), ("questions_needed", "questions needed", ",.0f")]
    columns += [("untrained", "untrained", ".4f"), ("relative_untrained", "from untrained", "+.1%")]
    return [*columns, ("train_seconds", "training, s", ",.0f"), ("peak_gib", "peak, GiB", ".2f")]


def _changes(rows: list[dict], metric: str, tests: list[str], axes: list[Column], style: Style) -> str:
    """A row for each point, and for each test how it changed from BASE and, in percent, from the untrained model."""
    merged: dict[int, dict[str, Any]] = {}
    for row in (row for row in rows if row["metric"] == metric):
        target = merged.setdefault(row["point"], {key: row.get(key) for key in ("name", *(key for key, _, _ in axes))})
        target |= {f"{kind} {row['test']}": row.get(kind) for kind in ("difference", "relative_untrained")}
    columns = [(f"difference {test}", f"{test} - BASE", "+.4f") for test in tests]
    columns += [(f"relative_untrained {test}", f"{test}, from untrained", "+.1%") for test in tests]
    return format_rows(list(merged.values()), [("name", "point", ""), *axes, *columns], style)


def _heading(text: str, level: int, style: Style) -> str:
    if style == "latex":
        return f"% {text}"
    return f"{'#' * level} {text}" if style == "markdown" else f"{text}\n{'=' * len(text)}"


def _said(text: str, style: Style) -> str:
    text = " ".join(text.splitlines())
    if style == "latex":
        return f"% {text}"
    return text.replace("<", "&lt;") if style == "markdown" else text
