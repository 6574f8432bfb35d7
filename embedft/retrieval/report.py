"""The result of an evaluation, question by question; comparisons between results, and their figure.

    report.save("runs/lyft/eval/uber")
    print(compare(Report.load("runs/lyft/eval/uber"), other, metric="mrr@10"))
    save_figure(plot_questions(report, other, metric="mrr@10"), "questions.png")     # needs matplotlib

Shapes: Q questions, the queries that have a relevant document; S training seeds.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, read_json, read_jsonl, write_json
from .run import Run
from .significance import ROUNDING, holm, paired_bootstrap_interval, recipe_interval, sign_flip_p_value

REPORT_FILES = ("run.trec", "per_query.jsonl", "metrics.json")  # in the order in which they are written
Figure = Any  # matplotlib's, which is imported only where a figure is made


@dataclass(frozen=True, eq=False)
class Report:
    """The result of an evaluation, per question."""

    query_ids: list[str]  # the Q queries that have a relevant document
    per_query: dict[str, np.ndarray]  # {"ndcg@10": [Q] float64, ...}, see metrics.py
    clusters: list[str]  # the cluster id of each query (`question_clusters`), for the statistics
    num_without_relevant: int  # queries left out because they have no relevant document
    setting: dict  # what was evaluated and how, as far as known: model, data_sha256, dim, precision, index, ...
    costs: dict[str, float]  # seconds of each part, bytes_per_document and the like, as far as known
    run: Run  # the ranking of each query, in the order of query_ids

    def __post_init__(self):
        number, columns = len(self.query_ids), {**self.per_query, "clusters": self.clusters}
        wrong = [f"{len(values)} {name}" for name, values in columns.items() if len(values) != number]
        if wrong or not number or self.run.query_ids != self.query_ids:
            raise ValueError(f"report: {number} query ids, but {', '.join(wrong) or 'a run over other queries'}")

    @property
    def num_queries(self) -> int:
        return len(self.query_ids)

    @property
    def name(self) -> str:
        """What was evaluated, for tables and TREC files: the model's name, "model" if unknown, or "bm25"."""
        return self.setting.get("model") or ("model" if "dim" in self.setting else self.setting.get("index", "model"))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric over the questions."""
        return {name: float(values.mean()) for name, values in self.per_query.items()}

    def __str__(self) -> str:
        """A row per metric, a column per cutoff ("all": none). accuracy@k is left out beside hit_rate@k, its equal."""
        cells: dict[str, dict[str, str]] = {}
        for name, mean in self.metrics.items():
            metric, _, k = name.partition("@")
            if metric != "accuracy" or f"hit_rate@{k}" not in self.metrics:
                cells.setdefault(metric, {})[f"@{k}" if k else "all"] = f"{mean:.4f}"
        found = {k for row in cells.values() for k in row}
        cutoffs = sorted(found, key=lambda k: math.inf if k == "all" else int(k[1:]))
        width = max([10, *(len(metric) + 1 for metric in cells)])
        title = f"{self.num_queries} queries"
        if self.num_without_relevant:
            title += f" ({self.num_without_relevant} without relevant documents left out)"
        rows = {"": dict(zip(cutoffs, cutoffs, strict=True)), **cells}.items()
        lines = [f"{metric:<{width}}" + "".join(f"{row.get(k, ''):>9}" for k in cutoffs) for metric, row in rows]
        return "\n".join([title, *map(str.rstrip, lines)])

    def save(self, folder: str | Path) -> None:
        """Writes run.trec, per_query.jsonl and, last, metrics.json into `folder`; floats read back exactly."""
        folder = Path(folder)
        (folder / "metrics.json").unlink(missing_ok=True)
        self.run.save(folder / "run.trec", tag=self.name)
        values = zip(*(column.tolist() for column in self.per_query.values()), strict=True)
        with atomic_write(folder / "per_query.jsonl") as file:
            for query_id, cluster, row in zip(self.query_ids, self.clusters, values, strict=True):
                metrics = dict(zip(self.per_query, row, strict=True))
                line = {"query_id": query_id, "cluster": cluster, "metrics": metrics}
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        summary = ("metrics", "num_queries", "num_without_relevant", "setting", "costs")
        write_json(folder / "metrics.json", {name: getattr(self, name) for name in summary})

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Reads what `save` wrote; raises `ValueError` if files are missing, damaged or do not belong together."""
        folder = Path(folder)
        if missing := [name for name in reversed(REPORT_FILES) if not (folder / name).is_file()]:
            raise ValueError(f"{folder} holds no report: {missing[0]} is missing")
        summary = read_json(folder / "metrics.json")
        lines = [line for _, line in read_jsonl(folder / "per_query.jsonl")]
        try:
            query_ids, means = [line["query_id"] for line in lines], {**summary["metrics"]}
            per_query = {name: np.array([line["metrics"][name] for line in lines], np.float64) for name in means}
            report = cls(
                query_ids=query_ids,
                per_query=per_query,
                clusters=[line["cluster"] for line in lines],
                num_without_relevant=summary["num_without_relevant"],
                setting={**summary["setting"]},
                costs={**summary["costs"]},
                run=Run.load(folder / "run.trec").select(query_ids),
            )
            wrong = [name for name, mean in means.items() if not abs(report.metrics[name] - mean) <= 1e-12]
            if summary["num_queries"] != report.num_queries or wrong:
                raise ValueError(f"metrics.json and per_query.jsonl differ in {', '.join(wrong) or 'num_queries'}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds a damaged report: {type(error).__name__} {error}") from None
        return report


def model_setting(embedder: Any) -> dict[str, Any]:
    """What a report's setting records of its model, as far as it has it."""
    found = {
        "model": getattr(getattr(embedder, "source", None), "name", None) or getattr(embedder, "model", None),
        "model_sha256": embedder.sha256() if hasattr(embedder, "sha256") else None,
        "max_length": getattr(embedder, "max_length", None),
        "prompts": dict(getattr(embedder, "prompts", None) or {}) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """The difference between two reports, or two sets of them, over the same questions: `other` - `base`."""

    metric: str
    base: float  # mean of the metric, as `other`
    other: float
    difference: float
    interval: tuple[float, float]  # of the difference, at 95%
    p_value: float  # two-sided; Holm-adjusted if `num_comparisons` is above 1
    wins: int  # questions on which `other` is better than `base`; `ties`: equal; `losses`: worse
    ties: int
    losses: int
    num_queries: int
    num_clusters: int  # independent groups of questions
    num_comparisons: int = 1
    num_seeds: int = 1  # reports on the other side; above 1, interval and p-value are for new seeds too
    question_error: float | None = None  # standard error for new questions, with several seeds
    seed_error: float | None = None  # standard error for new seeds

    def __str__(self) -> str:
        low, high = self.interval
        adjusted = f" (Holm over {self.num_comparisons})" if self.num_comparisons > 1 else ""
        seeds = f", {self.num_seeds} seeds" if self.num_seeds > 1 else ""
        return (
            f"{self.metric}: {self.base:.4f} -> {self.other:.4f}, difference {self.difference:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] at 95%, p = {self.p_value:.4f}{adjusted}, "
            f"{self.wins} better, {self.ties} equal, {self.losses} worse of {self.num_queries} questions "
            f"in {self.num_clusters} clusters{seeds}"
        )


def compare(base: Report, *others: Report, metric: str = "ndcg@10") -> Comparison | list[Comparison]:
    """Compares each of `others` with `base`, question by question: one Comparison, or a list of them for several.

    The interval is by bootstrap [(-1, 1) with one cluster], the p-value by sign flips, over the clusters of `base`. If
    few remain, as in NFCorpus, `dataclasses.replace(base, clusters=base.query_ids)` makes the questions independent.
    Raises `ValueError` for different questions, corpora or gains; warns if data, maximum length or prompts differ.
    """
    if not others:
        raise ValueError("compare needs a base and at least one other report")
    comparisons = []
    for other in others:
        base_Q, other_Q = paired_values(base, [base, other], metric)
        differences = other_Q - base_Q, base.clusters
        generator = np.random.default_rng(0)
        interval = paired_bootstrap_interval(*differences, generator=generator)
        p_value = sign_flip_p_value(*differences, generator=generator)
        if len(set(base.clusters)) == 1 and (other_Q != base_Q).any():
            interval = (-1.0, 1.0)
        found = {"interval": interval, "p_value": p_value, "num_comparisons": len(others)}
        comparisons.append(_comparison(base, metric, base_Q, other_Q, **found))
    adjusted = holm([comparison.p_value for comparison in comparisons])
    comparisons = [dataclasses.replace(c, p_value=p_value) for c, p_value in zip(comparisons, adjusted, strict=True)]
    return comparisons[0] if len(others) == 1 else comparisons


def compare_seeds(bases: Sequence[Report], others: Sequence[Report], *, metric: str = "ndcg@10") -> Comparison:
    """Compares a recipe, a report for each of 2 or more seeds, with a base, for new seeds as well as new questions.

    `bases` is one report, or as many as `others`: the base trained with the same seeds, in the same order.
    """
    if len(bases) not in (1, len(others)):
        raise ValueError(f"found {len(bases)} base reports for {len(others)} seeds, expected 1 or {len(others)}")
    base_SQ, other_SQ = (paired_values(bases[0], reports, metric) for reports in (bases, others))
    found = {**recipe_interval(other_SQ - base_SQ, bases[0].clusters)._asdict(), "num_seeds": len(others)}
    return _comparison(bases[0], metric, base_SQ.mean(axis=0), other_SQ.mean(axis=0), **found)


def _comparison(base: Report, metric: str, base_Q: np.ndarray, other_Q: np.ndarray, **found: Any) -> Comparison:
    difference_Q = other_Q - base_Q
    means = {"base": base_Q, "other": other_Q, "difference": difference_Q}
    found |= {name: float(values_Q.mean()) for name, values_Q in means.items()}
    wins, losses = (int((sign * difference_Q > ROUNDING).sum()) for sign in (1, -1))
    found |= {"wins": wins, "ties": len(difference_Q) - wins - losses, "losses": losses}
    return Comparison(metric, num_queries=len(base_Q), num_clusters=len(set(base.clusters)), **found)


def paired_values(base: Report, reports: Sequence[Report], metric: str) -> np.ndarray:
    """A metric's values in each of `reports`, [S, Q], with questions in the order of `base`, if they compare."""
    shared = [name for name in base.per_query if all(name in report.per_query for report in reports)]
    if metric not in shared:
        raise ValueError(f"unknown metric {metric!r}; the reports share: {', '.join(shared) or 'none'}")
    rows = []
    for report in reports:
        _check_comparable(base, report)
        row_of = {query_id: row for row, query_id in enumerate(report.query_ids)}
        rows.append(report.per_query[metric][[row_of[query_id] for query_id in base.query_ids]])
    return np.stack(rows)


def _check_comparable(base: Report, other: Report) -> None:
    only = [sorted(set(a.query_ids) - set(b.query_ids)) for a, b in ((base, other), (other, base))]
    if only[0] or only[1]:
        told = [f"{len(ids):,} only in {name} {ids[:3]}" for ids, name in zip(only, ("base", "other"), strict=True)]
        raise ValueError(f"the reports are over different questions: {', '.join(told)}")
    prompts = ["prompts"] if base.setting.get("model") == other.setting.get("model") else []
    for key in ("num_documents", "gain", "data_sha256", "max_length", *prompts):
        found = [report.setting.get(key) for report in (base, other)]
        if found[0] == found[1] or (None in found and key != "prompts"):
            continue
        message = f"{key} is {found[0]} in base and {found[1]} in other"
        if key in ("num_documents", "gain"):
            raise ValueError(f"the reports do not compare: {message}")
        warnings.warn(f"the reports may not compare: {message}", stacklevel=2)


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
