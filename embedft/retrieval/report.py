"""The result of an evaluation, question by question; comparisons of results, and a plot of them.

    report.save("runs/lyft/eval/uber")
    print(compare(Report.load("runs/lyft/eval/uber"), other, metric="mrr@10"))
    save_figure(plot_questions(report, other, metric="mrr@10"), "questions.png")     # needs matplotlib

Shapes: Q questions, the queries that have a relevant document; S training seeds.
"""

import dataclasses
import math
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, check_object, check_whole, read_json, read_jsonl, write_json, write_jsonl
from .run import Run
from .significance import ROUNDING, holm, paired_bootstrap_interval, recipe_interval, sign_flip_p_value

REPORT_FILES = ("run.trec", "per_query.jsonl", "metrics.json")  # in the order in which they are written
SUMMARY = {"metrics": dict, "num_queries": int, "num_without_relevant": int, "setting": dict, "costs": dict}
LINE = {"query_id": str, "cluster": str, "metrics": dict}
KIND_NAMES = {dict: "an object", int: "a whole number", float: "a number", str: "a string"}
Figure = Any  # matplotlib's, which is imported only where a figure is made


@dataclass(frozen=True, eq=False)
class Report:
    """The result of an evaluation, per question."""

    query_ids: list[str]
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
    def model_name(self) -> str:
        """The model's name ("model" if unknown) and its adapter's; "bm25" and the like where there is no model."""
        unknown = "model" if "dim" in self.setting else self.setting.get("index", "model")
        return " + ".join(filter(None, (self.setting.get("model") or unknown, self.setting.get("adapter"))))

    @property
    def name(self) -> str:
        """What was evaluated: `model_name`, and what is unusual about the search: "m + windows 128/64 + dim 64",
        "bm25 + ngram 2"."""
        passages, dim, precision, index = map(self.setting.get, ("passages", "dim", "precision", "index"))
        parts = [self.model_name, f"windows {windows_name(passages)}" if passages else ""]
        parts.append(f"dim {dim}" if dim != self.setting.get("model_dim", dim) else "")
        parts += [str(x) for x in (precision, index) if x not in (None, "float32", "flat", self.model_name)]
        of_bm25 = [(name, self.setting.get(f"bm25_{name}")) for name in ("ngram", "k1", "b")]
        parts += [f"{name} {value:g}" for name, value in of_bm25 if value is not None]
        return " + ".join(filter(None, parts))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric over the questions."""
        return {name: float(values.mean()) for name, values in self.per_query.items()}

    def __str__(self) -> str:
        """A row per metric, a column per cutoff ("all": none); accuracy@k only without its equal hit_rate@k."""
        cells: dict[str, dict[float, str]] = {}
        for name, mean in self.metrics.items():
            metric, _, k = name.partition("@")
            if metric != "accuracy" or f"hit_rate@{k}" not in self.metrics:
                cells.setdefault(metric, {})[float(k or "inf")] = f"{mean:.4f}"
        cutoffs = sorted({k for row in cells.values() for k in row})
        header = {k: "all" if k == math.inf else f"@{k:.0f}" for k in cutoffs}
        width = max([10, *(len(metric) + 1 for metric in cells)])
        lines = [f"{self.num_queries} queries"]
        if self.num_without_relevant:
            lines[0] += f" ({self.num_without_relevant} without relevant documents left out)"
        for metric, row in {"": header, **cells}.items():
            columns = "".join(f"{row.get(k, ''):>9}" for k in cutoffs)
            lines.append(f"{metric:<{width}}{columns}".rstrip())
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Writes run.trec, per_query.jsonl and, last, metrics.json into `folder`; floats read back exactly."""
        folder = Path(folder)
        (folder / "metrics.json").unlink(missing_ok=True)
        self.run.save(folder / "run.trec", tag=self.name.replace(" + ", "+"))
        lines = []
        for row, (query_id, cluster) in enumerate(zip(self.query_ids, self.clusters, strict=True)):
            metrics = {name: float(values[row]) for name, values in self.per_query.items()}
            lines.append({"query_id": query_id, "cluster": cluster, "metrics": metrics})
        write_jsonl(folder / "per_query.jsonl", lines)
        write_json(folder / "metrics.json", {name: getattr(self, name) for name in SUMMARY})

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Reads what `save` wrote; raises `ValueError` if files are missing, damaged or do not belong together."""
        folder = Path(folder)
        if missing := [name for name in reversed(REPORT_FILES) if not (folder / name).is_file()]:
            raise ValueError(f"{folder}: no report ({missing[0]} is missing)")
        check_whole(folder, folder.parent, folder.parent.parent)
        path = folder / "metrics.json"
        summary = _checked(read_json(path), str(path), SUMMARY)
        means = _checked(summary["metrics"], f"{path}: metrics", dict.fromkeys(summary["metrics"], float))
        lines = []
        for number, line in read_jsonl(path := folder / "per_query.jsonl"):
            lines.append(_checked(line, where := f"{path} line {number}", LINE))
            _checked(line["metrics"], f"{where}: metrics", dict.fromkeys(means, float))
        query_ids, clusters = ([line[name] for line in lines] for name in ("query_id", "cluster"))
        per_query = {name: np.array([line["metrics"][name] for line in lines], np.float64) for name in means}
        try:
            run = Run.load(folder / "run.trec").select(query_ids)
            fields = (summary[name] for name in ("num_without_relevant", "setting", "costs"))
            report = cls(query_ids, per_query, clusters, *fields, run)
            wrong = [name for name, mean in means.items() if not abs(report.metrics[name] - mean) <= 1e-12]
            if summary["num_queries"] != report.num_queries or wrong:
                raise ValueError(f"metrics.json and per_query.jsonl differ in {', '.join(wrong) or 'num_queries'}")
        except ValueError as error:
            raise ValueError(f"{folder}: damaged report ({error})") from None
        return report


def _checked(value: Any, where: str, kinds: dict[str, type]) -> dict[str, Any]:
    """The value, if it is an object with these keys and kinds of values; else raises `ValueError`."""
    check_object(value, where)
    for key, kind in kinds.items():
        if not isinstance(value.get(key), int | float if kind is float else kind):
            found = f"{key} is {reprlib.repr(value[key])}" if key in value else f"has no {key}"
            raise ValueError(f"{where}: damaged report: {found}, expected {KIND_NAMES[kind]}")
    return value


def model_setting(embedder: Any) -> dict[str, Any]:
    """What a report's setting records about its model, as far as the embedder provides it; dtype if not float32."""
    dtype = embedder.space("document").description.get("dtype") if hasattr(embedder, "space") else None
    found = {
        "model": getattr(getattr(embedder, "source", None), "name", None) or getattr(embedder, "model", None),
        "model_sha256": embedder.sha256() if hasattr(embedder, "sha256") else None,
        "adapter": getattr(getattr(embedder, "adapter", None), "name", None) or None,
        "model_dim": getattr(embedder, "full_dim", None),
        "max_length": getattr(embedder, "max_length", None),
        "prompts": dict(getattr(embedder, "prompts", None) or {}) or None,
        "dtype": dtype if dtype != "float32" else None,
    }
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """The difference between two reports, or two sets of them, over the same questions: `other` - `base`."""

    metric: str
    base: float  # mean of the metric
    other: float
    difference: float
    interval: tuple[float, float]  # of the difference, at 95%
    p_value: float  # two-sided, Holm-adjusted
    wins: int  # questions on which `other` is better than `base`; `ties`: equal; `losses`: worse
    ties: int
    losses: int
    num_queries: int
    num_clusters: int  # independent groups of questions
    num_comparisons: int = 1
    num_seeds: int = 1  # reports of `other`; above 1, interval and p-value are for new seeds too
    question_error: float | None = None  # for several seeds, see `recipe_interval`
    seed_error: float | None = None

    def __str__(self) -> str:
        low, high = self.interval
        p_value = f"{self.p_value:.4f}" + f" (Holm over {self.num_comparisons})" * (self.num_comparisons > 1)
        seeds = f", {self.num_seeds} seeds" if self.num_seeds > 1 else ""
        change = f"{self.base:.4f} -> {self.other:.4f}, difference {self.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        counts = f"{self.wins} better, {self.ties} equal, {self.losses} worse of {self.num_queries} questions"
        return f"{self.metric}: {change} at 95%, p = {p_value}, {counts} in {self.num_clusters} clusters{seeds}"


def compare(base: Report, *others: Report, metric: str = "ndcg@10") -> Comparison | list[Comparison]:
    """Compares each of `others` with `base`, question by question: one Comparison, or a list of them for several.

    Bootstrap intervals (-1 to 1 for a single cluster) and sign-flip p-values are over the clusters of `base`. If there
    are too few, as in NFCorpus, `dataclasses.replace(base, clusters=base.query_ids)` treats questions as independent.
    Raises `ValueError` for other questions, under other ids or the same ones, another number of documents or another
    gain; warns if data, maximum length or prompts differ."""
    if not others:
        raise ValueError("compare needs a base and at least one other report")
    comparisons = []
    for other in others:
        base_Q, other_Q = paired_values(base, [base, other], metric)
        differences, generator = (other_Q - base_Q, base.clusters), np.random.default_rng(0)
        interval = paired_bootstrap_interval(*differences, generator=generator)
        if len(set(base.clusters)) == 1 and (other_Q != base_Q).any():
            interval = (-1.0, 1.0)
        found = {"interval": interval, "p_value": sign_flip_p_value(*differences, generator=generator)}
        comparisons.append(_comparison(base, metric, base_Q, other_Q, num_comparisons=len(others), **found))
    adjusted = holm([comparison.p_value for comparison in comparisons])
    comparisons = [dataclasses.replace(c, p_value=p_value) for c, p_value in zip(comparisons, adjusted, strict=True)]
    return comparisons[0] if len(others) == 1 else comparisons


def compare_seeds(bases: Sequence[Report], others: Sequence[Report], *, metric: str = "ndcg@10") -> Comparison:
    """Compares a recipe (a report for each of 2 or more seeds) with a base; accounts for new seeds and new questions.
    `bases` is one report, or as many as `others`: the base trained with the same seeds, in the same order."""
    if len(bases) not in (1, len(others)):
        raise ValueError(f"found {len(bases)} base reports for {len(others)} seeds, expected 1 or {len(others)}")
    base_SQ, other_SQ = (paired_values(bases[0], reports, metric) for reports in (bases, others))
    found = recipe_interval(other_SQ - base_SQ, bases[0].clusters) | {"num_seeds": len(others)}
    return _comparison(bases[0], metric, base_SQ.mean(axis=0), other_SQ.mean(axis=0), **found)


def _comparison(base: Report, metric: str, base_Q: np.ndarray, other_Q: np.ndarray, **found: Any) -> Comparison:
    difference_Q, number = other_Q - base_Q, len(base_Q)
    means = (float(values_Q.mean()) for values_Q in (base_Q, other_Q, difference_Q))
    wins, losses = (int((sign * difference_Q > ROUNDING).sum()) for sign in (1, -1))
    found |= {"wins": wins, "ties": number - wins - losses, "losses": losses, "num_queries": number}
    return Comparison(metric, *means, num_clusters=len(set(base.clusters)), **found)


def paired_values(base: Report, reports: Sequence[Report], metric: str) -> np.ndarray:
    """A metric's values in each of `reports`, [S, Q], in the order of `base`'s questions. Raises like `compare`."""
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
    for key in ("questions_sha256", "num_documents", "gain", "data_sha256", "max_length", *prompts):
        found = [report.setting.get(key) for report in (base, other)]
        if found[0] == found[1] or (None in found and key != "prompts"):
            continue
        message = f"{key} is {found[0]} in base and {found[1]} in other"
        if key in ("questions_sha256", "num_documents", "gain"):
            raise ValueError(f"the reports are not comparable: {message}")
        warnings.warn(f"the reports may not be comparable: {message}", stacklevel=2)


def windows_name(passages: Sequence[int]) -> str:
    """Sizes and strides of windows as a label: "128/64", "128/64+64/32"."""
    return "+".join(f"{size}/{stride}" for size, stride in zip(passages[::2], passages[1::2], strict=True))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure atomically, in the format of the suffix, such as .png, .pdf or .svg."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.removeprefix("."))


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
    area_P = np.maximum(counts_P * min(12, 600 / counts_P.max()), 4)  # square points: 12 per question, 4 to 600
    figure = Figure(figsize=(6.0, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1)
    for label, chosen_P in (("better", difference_P > 0), ("equal", difference_P == 0), ("worse", difference_P < 0)):
        label = f"{label}: {counts_P[chosen_P].sum():,}"
        axes.scatter(*points_P2[chosen_P].T, s=area_P[chosen_P], alpha=0.6, label=label, zorder=2)
    axes.set(xlabel=f"{names[0]}, {metric}", ylabel=f"{names[1]}, {metric}", aspect="equal")
    axes.legend(title=f"{len(values_Q2):,} questions", loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure
