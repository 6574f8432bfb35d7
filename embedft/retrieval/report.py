"""What an evaluation found, question by question, and whether two of them differ.

Deliberately not here: how a report comes about (evaluate.py) and the tests themselves (significance.py).

    report.save("runs/lyft/eval/uber")
    print(compare(Report.load("runs/lyft/eval/uber"), other, metric="ndcg@10"))

Shapes: Q questions, the queries that have a relevant document.
"""

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..files import atomic_write, read_json, read_jsonl, read_lines, write_json
from .run import Run, check_trec_ids
from .significance import (
    IntervalMethod,
    effect_size,
    holm,
    paired_bootstrap_interval,
    sign_flip_p_value,
    wins_ties_losses,
)

# What a saved report consists of; the last is written last, so its presence says that all is there.
REPORT_FILES = ("run.trec", "per_query.jsonl", "metrics.json")


@dataclass(frozen=True, eq=False)
class Report:
    """The result of an evaluation, per question.

    Args:
        query_ids: the Q queries that have a relevant document.
        per_query: {"ndcg@10": [Q] float64, ...}; `per_query_metrics` lists the keys.
        clusters: for each query the id of its cluster (`question_clusters`), for the statistics.
        num_without_relevant: queries left out because they have no relevant document.
        setting: what was evaluated: dim, depth, ks, gain, similarity, num_documents, ... as far as known.
        costs: seconds of each part and bytes_per_document, as far as known.
        run: the ranking of each of query_ids, in that order.
    """

    query_ids: list[str]
    per_query: dict[str, np.ndarray]
    clusters: list[str]
    num_without_relevant: int
    setting: dict
    costs: dict[str, float]
    run: Run

    def __post_init__(self):
        lengths = {name: len(values) for name, values in self.per_query.items()}
        lengths["clusters"] = len(self.clusters)
        wrong = {name: length for name, length in lengths.items() if length != len(self.query_ids)}
        if wrong or not self.query_ids or self.run.query_ids != self.query_ids:
            found = ", ".join(f"{length} {name}" for name, length in wrong.items()) or "a run over others"
            raise ValueError(f"report: {len(self.query_ids)} query ids, but {found}")

    @property
    def num_queries(self) -> int:
        return len(self.query_ids)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The mean of every metric over the queries."""
        return {name: float(values.mean()) for name, values in self.per_query.items()}

    def __str__(self) -> str:
        """A table, one row a metric and one column a cutoff ("all": the whole ranking).

        accuracy@k, which equals hit_rate@k, is left out.
        """
        cells: dict[str, dict[float, float]] = {}
        for name, mean in self.metrics.items():
            metric, _, k = name.partition("@")
            if metric != "accuracy":
                cells.setdefault(metric, {})[int(k) if k else math.inf] = mean
        cutoffs = sorted({k for row in cells.values() for k in row})
        headings = ["all" if k == math.inf else f"@{k}" for k in cutoffs]
        lines = [f"{'':<10}" + "".join(f"{heading:>9}" for heading in headings)]
        for metric, row in cells.items():
            lines.append(f"{metric:<10}" + "".join(f"{row[k]:9.4f}" if k in row else " " * 9 for k in cutoffs))
        title = f"{self.num_queries} queries"
        if self.num_without_relevant:
            title += f" ({self.num_without_relevant} without relevant documents left out)"
        return "\n".join([title, *(line.rstrip() for line in lines)])

    def save(self, folder: str | Path) -> None:
        """Writes run.trec, per_query.jsonl and, last, metrics.json into `folder`; floats read back exactly.

        Raises:
            ValueError: when an id cannot stand in a TREC file (`Run.save`), before anything is written.
        """
        folder = Path(folder)
        check_trec_ids([*self.run.query_ids, *self.run.document_ids])
        (folder / "metrics.json").unlink(missing_ok=True)
        self.run.save(folder / "run.trec")
        columns = {name: values.tolist() for name, values in self.per_query.items()}
        with atomic_write(folder / "per_query.jsonl") as file:
            for row, (query_id, cluster) in enumerate(zip(self.query_ids, self.clusters, strict=True)):
                values = {name: column[row] for name, column in columns.items()}
                line = {"query_id": query_id, "cluster": cluster, "metrics": values}
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        summary = {
            "metrics": self.metrics,
            "num_queries": self.num_queries,
            "num_without_relevant": self.num_without_relevant,
            "setting": self.setting,
            "costs": self.costs,
        }
        write_json(folder / "metrics.json", summary)

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Reads what `save` wrote. The run's document_ids are the retrieved documents only.

        Raises:
            ValueError: when a file is missing or damaged, or the files are not of one report.
        """
        folder = Path(folder)
        for name in reversed(REPORT_FILES):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no report: {name} is missing")
        summary = read_json(folder / "metrics.json")
        lines = [line for _, line in read_jsonl(folder / "per_query.jsonl")]
        try:
            num_queries, means = summary["num_queries"], {**summary["metrics"]}
            query_ids = [_checked(line["query_id"], str) for line in lines]
            report = cls(
                query_ids=query_ids,
                per_query={
                    name: np.array([_checked(line["metrics"][name], int | float) for line in lines]) for name in means
                },
                clusters=[_checked(line["cluster"], str) for line in lines],
                num_without_relevant=summary["num_without_relevant"],
                setting={**summary["setting"]},
                costs={**summary["costs"]},
                run=Run.load(folder / "run.trec", query_ids=query_ids),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds a damaged report: {type(error).__name__} {error}") from None
        if num_queries != report.num_queries:
            raise ValueError(f"{folder}: metrics.json is of {num_queries} queries, per_query.jsonl of {len(lines)}")
        for name, mean in means.items():
            found = report.metrics[name]
            if not (isinstance(mean, int | float) and abs(found - mean) <= 1e-12):
                raise ValueError(f"{folder}: {name} is {mean} in metrics.json, {found} over per_query.jsonl")
        return report


def _checked(value: object, kind: type | types.UnionType) -> object:
    if not isinstance(value, kind):
        raise TypeError(f"for the value {value!r}")
    return value


def save_sentence_transformers_csv(
    folder: str | Path, report: Report, *, name: str = "", epoch: int = -1, steps: int = -1
) -> Path:
    """Appends a report to the CSV of sentence-transformers' `InformationRetrievalEvaluator`; returns its path.

    The file is `folder`/Information-Retrieval_evaluation_{name}_results.csv. A new one gets the evaluator's columns in
    its order (epoch, steps, Accuracy, Precision and Recall at each cutoff, MRR and NDCG at the largest, MAP at the
    depth, each behind the similarity as in cosine-MRR@10); one that is there keeps the columns it has.

    Args:
        epoch, steps: as the evaluator writes them: -1 when not during training.

    Raises:
        ValueError: when the report says no similarity or has graded gains, which the evaluator does not know, or when
            the file has a column that the report cannot fill.

    Source: sentence-transformers 6.2, `InformationRetrievalEvaluator.__call__`.
    """
    path = Path(folder) / f"Information-Retrieval_evaluation{f'_{name}' if name else ''}_results.csv"
    similarity = report.setting.get("similarity")
    if similarity is None:
        raise ValueError(f"{path}: the report names no similarity, which stands in every column's name")
    if report.setting.get("gain", "binary") != "binary":
        raise ValueError(
            f"{path}: the report's nDCG has {report.setting['gain']} gains, the evaluator's has binary ones"
        )
    means = report.metrics
    cutoffs = sorted({int(key.partition("@")[2]) for key in means if key.startswith("accuracy@")})
    depths = sorted({int(key.partition("@")[2]) for key in means if key.startswith("map@")})
    columns = [f"Accuracy@{k}" for k in cutoffs] + [f"{part}@{k}" for k in cutoffs for part in ("Precision", "Recall")]
    columns += [f"{part}@{k}" for part in ("MRR", "NDCG") for k in cutoffs[-1:]] + [f"MAP@{k}" for k in depths]
    values = {f"{similarity}-{column}": means[column.lower()] for column in columns}
    lines = [",".join(["epoch", "steps", *values])]
    if path.exists():
        lines = [line.rstrip("\r\n") for line in read_lines(path) if line.strip()] or lines
        values |= {
            f"{similarity}-{part}@{k}": means[f"{part.lower()}@{k}"] for part in ("MRR", "NDCG") for k in cutoffs
        }
    known = {"epoch": epoch, "steps": steps} | values
    header = lines[0].split(",")
    missing = [column for column in header if column not in known]
    if missing:
        raise ValueError(f"{path} line 1: the report has nothing for column {missing[0]!r}; it has: {', '.join(known)}")
    with atomic_write(path) as file:
        file.write("\n".join([*lines, ",".join(str(known[column]) for column in header)]) + "\n")
    return path


@dataclass(frozen=True)
class Comparison:
    """The difference between two reports over the same questions: `difference` = `other` - `base`.

    Args:
        base, other: mean of `metric` in either report.
        interval: bootstrap interval of the difference at `confidence`, made by `method`.
        p_value: of the sign-flip test; Holm-adjusted when `num_comparisons` is above 1.
        effect_size: Cohen's d_z of the differences; None where they do not vary (`significance.effect_size`).
        wins, ties, losses: questions on which `other` is better than, equal to and worse than `base`.
        num_clusters: independent groups among the questions: what the evidence rests on.
    """

    metric: str
    base: float
    other: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    confidence: float
    method: IntervalMethod
    effect_size: float | None
    wins: int
    ties: int
    losses: int
    num_queries: int
    num_clusters: int
    num_comparisons: int = 1

    def __str__(self) -> str:
        low, high = self.interval
        adjusted = f" (Holm over {self.num_comparisons})" if self.num_comparisons > 1 else ""
        return (
            f"{self.metric}: {self.base:.4f} -> {self.other:.4f}, difference {self.difference:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] at {self.confidence:.0%}, p = {self.p_value:.4f}{adjusted}, "
            f"{self.wins} better, {self.ties} equal, {self.losses} worse of {self.num_queries} questions "
            f"in {self.num_clusters} clusters"
        )


def compare(
    base: Report,
    *others: Report,
    metric: str = "ndcg@10",
    num_samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    method: IntervalMethod = "percentile",
) -> Comparison | list[Comparison]:
    """Compares each of `others` with `base`, question by question: a Comparison for one, a list for several.

    The clusters are those of `base`. Where nearly all questions hang together (many relevant documents a question, as
    in NFCorpus), one or few clusters remain and no difference can be shown; `dataclasses.replace(base,
    clusters=base.query_ids)` treats the questions as independent, knowingly. With a single cluster the interval of a
    difference is all that a metric in [0, 1] allows, (-1, 1).

    Args:
        method: of the interval, "percentile" or "bca" (`significance.paired_bootstrap_interval`).

    Raises:
        ValueError: on reports over different questions (counting and naming them) or a metric that one of them lacks.
    """
    if not others:
        raise ValueError("compare needs a base and at least one other report")
    comparisons = [_compare_two(base, other, metric, num_samples, seed, confidence, method) for other in others]
    if len(others) == 1:
        return comparisons[0]
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [
        dataclasses.replace(comparison, p_value=p_value, num_comparisons=len(others))
        for comparison, p_value in zip(comparisons, adjusted, strict=True)
    ]


def _compare_two(
    base: Report,
    other: Report,
    metric: str,
    num_samples: int,
    seed: int,
    confidence: float,
    method: IntervalMethod,
) -> Comparison:
    for name, report in (("base", base), ("other", other)):
        if metric not in report.per_query:
            raise ValueError(f"unknown metric {metric!r} in the {name} report; it has: {', '.join(report.per_query)}")
    for key in ("num_documents", "gain"):
        found = [report.setting.get(key) for report in (base, other)]
        if None not in found and found[0] != found[1]:
            raise ValueError(f"the reports do not compare: {key} is {found[0]} in base and {found[1]} in other")
    row_of = {query_id: row for row, query_id in enumerate(other.query_ids)}
    only_base = [query_id for query_id in base.query_ids if query_id not in row_of]
    only_other = sorted(row_of.keys() - set(base.query_ids))
    if only_base or only_other:
        raise ValueError(
            f"the reports are over different questions: {len(only_base)} only in base {only_base[:3]}, "
            f"{len(only_other)} only in other {only_other[:3]}"
        )
    base_Q = base.per_query[metric]
    other_Q = other.per_query[metric][[row_of[query_id] for query_id in base.query_ids]]
    differences_Q = other_Q - base_Q
    generator = np.random.default_rng(seed)
    interval = paired_bootstrap_interval(
        differences_Q,
        base.clusters,
        generator=generator,
        num_samples=num_samples,
        confidence=confidence,
        method=method,
    )
    p_value = sign_flip_p_value(differences_Q, base.clusters, generator=generator, num_samples=num_samples)
    num_clusters = len(set(base.clusters))
    if num_clusters == 1 and differences_Q.any():
        interval = (-1.0, 1.0)
    wins, ties, losses = wins_ties_losses(differences_Q)
    return Comparison(
        metric=metric,
        base=float(base_Q.mean()),
        other=float(other_Q.mean()),
        difference=float(differences_Q.mean()),
        interval=interval,
        p_value=p_value,
        confidence=confidence,
        method=method,
        effect_size=effect_size(differences_Q),
        wins=wins,
        ties=ties,
        losses=losses,
        num_queries=len(differences_Q),
        num_clusters=num_clusters,
    )
