"""Two reports question by question, as a figure. Needs matplotlib, the extra `plots`.

save_figure(plot_questions(base, tuned, metric="mrr@10"), "questions.png")     # without pyplot: no window opens
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write
from .report import Report, paired_values

Figure = Any  # matplotlib's, which is imported only where a figure is made


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure atomically, in the format of the suffix, such as .png, .pdf or .svg."""
    formats, suffix = figure.canvas.get_supported_filetypes(), Path(path).suffix.lower().removeprefix(".")
    if suffix not in formats:
        raise ValueError(f"{path}: suffix is {suffix!r}, expected one of {', '.join(sorted(formats))}")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=suffix)


def plot_questions(
    base: Report, other: Report, *, metric: str = "ndcg@10", names: tuple[str, str] = ("base", "other")
) -> Figure:
    """A point at each question's values in two reports; its area shows how many questions it stands for."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    values_Q2 = paired_values(base, [base, other], metric).T
    # Rounded, so that values that differ only in their last bits are one point.
    points_P2, counts_P = np.unique(values_Q2.round(6), axis=0, return_counts=True)
    difference_P = points_P2[:, 1] - points_P2[:, 0]
    area_P = np.maximum(counts_P * min(12, 600 / counts_P.max()), 4)  # square points: 12 per question, 4 to 600 in all
    figure = Figure(figsize=(6.0, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
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
        handle.set_sizes([12])
    return figure
