"""Reports as figures: quality over dimensions, two reports question by question, recall against speed.

Needs matplotlib, the extra `plots`. Each function returns the Figure, to be changed or shown; nothing of matplotlib's
own state is touched, so no window opens.

    reports = evaluate_grid(embedder, dataset, dims=[384, 128, 32], precisions=["float32", "int8"])
    save_figure(plot_dims(reports, metric="ndcg@10"), "dims.pdf")
    save_figure(plot_questions(base, tuned, metric="mrr@10"), "questions.png")

Not here: tables (tables.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write
from .report import Report
from .tables import setting_name

# matplotlib's, which is imported only where a figure is made.
Figure = Axes = Any
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 6.0, 4.5, 150
# Areas of points in square points: of one that stands for one question, and the least and the largest.
QUESTION_AREA, LEAST_AREA, LARGEST_AREA = 12, 4, 600


def _new_figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format of the file's suffix, such as .png, .pdf or .svg, atomically.

    Raises `ValueError` for another suffix, listing those that there are.
    """
    kinds = figure.canvas.get_supported_filetypes()
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in kinds:
        raise ValueError(f"{path}: no format of a figure by its suffix, expected one of {', '.join(sorted(kinds))}")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=kind)


def plot_dims(reports: Sequence[Report], *, metric: str = "ndcg@10") -> Figure:
    """The mean of a metric over the number of dimensions, a line for each precision.

    Where reports differ in index or passages too, there is a line for each of these combinations. A report without
    dimensions, as of BM25, is a dashed line across.

    Args:
        reports: of `evaluate_grid`, in any order.

    Raises:
        ValueError: no reports, one that lacks the metric, two of the same setting, or matplotlib is missing.
    """
    lines: dict[str, dict[int | None, float]] = {}
    for report, label in zip(reports, _labels(reports, leave_out=("dim",)), strict=True):
        dim, values = report.setting.get("dim"), lines.setdefault(label, {})
        if dim in values:
            raise ValueError(f"two reports are of {label or 'the same setting'} at {dim} dimensions")
        values[dim] = _mean_of(report, metric)
    figure, axes = _new_figure()
    for label, values in lines.items():
        if None in values:
            axes.axhline(values.pop(None), color="0.4", linestyle="--", label=label)
        dims = sorted(values)
        if dims:
            axes.plot(dims, [values[dim] for dim in dims], marker="o", label=label)
    ticks = sorted({dim for values in lines.values() for dim in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(dim) for dim in ticks])
    axes.minorticks_off()
    axes.set_xlabel("dimensions")
    axes.set_ylabel(metric)
    if len(lines) > 1:
        axes.legend()
    return figure


def plot_questions(
    base: Report, other: Report, *, metric: str = "ndcg@10", names: tuple[str, str] = ("base", "other")
) -> Figure:
    """Each question's value under two reports: a point at (base, other), above the diagonal where the other is better.

    Most questions share few values, so a point's area says how many questions it stands for.

    Raises:
        ValueError: reports over different questions, one that lacks the metric, or matplotlib is missing.
    """
    for report in (base, other):
        _mean_of(report, metric)
    row_of = {query_id: row for row, query_id in enumerate(other.query_ids)}
    if row_of.keys() != set(base.query_ids):
        num_different = len(row_of.keys() ^ set(base.query_ids))
        raise ValueError(f"the reports are over different questions: {num_different} are in one of them only")
    values_Q2 = np.stack(
        [base.per_query[metric], other.per_query[metric][[row_of[query_id] for query_id in base.query_ids]]], axis=1
    )
    # Rounded, so that values that differ in their last bits are one point.
    points_P2, counts_P = np.unique(values_Q2.round(6), axis=0, return_counts=True)
    difference_P = points_P2[:, 1] - points_P2[:, 0]
    area_P = np.maximum(counts_P * min(QUESTION_AREA, LARGEST_AREA / counts_P.max()), LEAST_AREA)
    figure, axes = _new_figure()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1)
    for label, chosen_P in (("better", difference_P > 0), ("equal", difference_P == 0), ("worse", difference_P < 0)):
        number = int(counts_P[chosen_P].sum())
        x_P, y_P = points_P2[chosen_P].T
        axes.scatter(x_P, y_P, s=area_P[chosen_P], alpha=0.6, label=f"{label}: {number:,}", zorder=2)
    axes.set_xlabel(f"{names[0]}, {metric}")
    axes.set_ylabel(f"{names[1]}, {metric}")
    axes.set_aspect("equal")
    legend = axes.legend(title=f"{len(values_Q2):,} questions", loc="upper left", bbox_to_anchor=(1.02, 1))
    for handle in legend.legend_handles:
        handle.set_sizes([QUESTION_AREA])
    return figure


def plot_recall(reports: Sequence[Report]) -> Figure:
    """Recall against speed: the share of exact search's first 10 over queries a second, a point for each setting.

    Raises:
        ValueError: no reports, one that says neither of the two (as those of `evaluate_run` do not), or matplotlib is
            missing.
    """
    labels = _labels(reports, leave_out=())
    figure, axes = _new_figure()
    for report, label in zip(reports, labels, strict=True):
        missing = [name for name in ("queries_per_second", "recall@10_of_exact") if name not in report.costs]
        if missing:
            name = setting_name(report.setting) or "an unnamed setting"
            raise ValueError(f"the report of {name} has no {missing[0]}")
        axes.scatter(report.costs["queries_per_second"], report.costs["recall@10_of_exact"], label=label)
    axes.set_xscale("log")
    axes.tick_params(axis="x", which="both", labelrotation=30, labelsize="small")
    axes.set_xlabel("queries a second, search alone")
    axes.set_ylabel("share of exact search's first 10")
    if len(reports) > 1:
        axes.legend()
    return figure


def _mean_of(report: Report, metric: str) -> float:
    if metric not in report.metrics:
        raise ValueError(f"a report has no metric {metric!r}; it has: {', '.join(report.metrics)}")
    return report.metrics[metric]


def _labels(reports: Sequence[Report], *, leave_out: Sequence[str]) -> list[str]:
    """A name for each report's setting, of what differs among them."""
    if not reports:
        raise ValueError("no reports for a figure")
    windows = {"passages", "aggregate"}
    keys = [key for key in ("passages", "aggregate", "dim", "precision", "index") if key not in leave_out]
    # Those of the model: what stands beside them, as BM25, has a name of its own.
    settings = [report.setting for report in reports if report.setting.get("dim")]
    differing = {key for key in keys if len({str(setting.get(key)) for setting in settings}) > 1}
    if differing & windows:
        differing |= windows
    labels = []
    for report in reports:
        if not report.setting.get("dim"):
            labels.append(setting_name(report.setting))
            continue
        named = {key: report.setting.get(key) for key in keys if key in differing}
        if "passages" in named and not named["passages"]:
            named["passages"] = ["whole"]  # beside windows, what has none wants a name too
        labels.append(setting_name(named))
    return labels
