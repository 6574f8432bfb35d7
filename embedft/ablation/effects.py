"""What each point of a grid changes: means over seeds, differences from BASE and from the untrained model, and their
uncertainty.

    effects = measure_effects(Results.load("runs/temperature"), metrics=["ndcg@10"])

Shapes: S seeds, Q questions.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..retrieval.power import questions_needed
from ..retrieval.report import Report, compare, compare_seeds, paired_values
from ..retrieval.significance import holm, t_interval, variance_of
from .grid import AVERAGE, VALIDATION
from .results import FinishedCell, Results


@dataclass(frozen=True)
class Change:
    """A point's mean less that of BASE, or of the untrained model; without an interval for a single cluster."""

    difference: float
    interval: tuple[float, float] | None = None  # at 95%: for new questions and, with several seeds, new seeds
    p_value: float | None = None  # two-sided; against BASE Holm-adjusted over the grid's points
    question_error: float | None = None  # standard errors: for new questions with these seeds,
    seed_error: float | None = None  # for new seeds on these questions (None: a single seed),
    error: float | None = None  # and for both
    questions_needed: float | None = None  # to detect this difference with 80% power


@dataclass(frozen=True)
class Effect:
    """One point on one test set by one metric."""

    point: int  # its place in the grid's points; 0 is BASE
    test: str  # or AVERAGE
    metric: str
    mean: float  # over questions and finished seeds
    by_seed: dict[int, float]
    num_queries: int
    num_clusters: int
    from_base: Change | None = None  # None: BASE itself, or no seed of it that the point has too
    from_untrained: Change | None = None
    untrained: float | None = None  # the untrained model's mean

    @property
    def relative(self) -> float | None:
        """The change from the untrained model as a share of its mean: -0.01 for a loss of 1%; None if that is 0."""
        return self.mean / self.untrained - 1 if self.untrained else None


def measure_effects(results: Results, metrics: Sequence[str]) -> list[Effect]:
    """The effects of all points with a finished seed, by metric, then test (then their average), then point."""
    tests = [name for name in results.finished[0].reports if name != VALIDATION]
    groups = [[name] for name in tests] + ([tests] if len(tests) > 1 else [])
    points = {i: results.of_point(point) for i, point in enumerate(results.grid.points)}
    starts = {i: results.untrained(point) for i, point in enumerate(results.grid.points)}
    for metric in metrics:
        for report in (report for cell in results.finished for report in cell.reports.values()):
            if metric not in report.metrics:
                raise ValueError(f"no metric {metric!r}; the reports have: {', '.join(report.metrics)}")
    found: list[Effect] = []
    for metric in metrics:
        for group in groups:
            effects = [_effect(i, group, metric, points, starts[i]) for i in points if points[i]]
            tested = [i for i, one in enumerate(effects) if one.from_base and one.from_base.p_value is not None]
            for i, p_value in zip(tested, holm([effects[i].from_base.p_value for i in tested]), strict=True):
                change = dataclasses.replace(effects[i].from_base, p_value=p_value)
                effects[i] = dataclasses.replace(effects[i], from_base=change)
            found += effects
    return found


def _effect(
    place: int,
    tests: list[str],
    metric: str,
    points: dict[int, dict[int, FinishedCell]],
    untrained: FinishedCell | None,
) -> Effect:
    own, base = points[place], points[0]
    by_seed = {
        seed: float(np.mean([cell.reports[test].metrics[metric] for test in tests])) for seed, cell in own.items()
    }
    first = [next(iter(own.values())).reports[test] for test in tests]
    shared = [seed for seed in own if seed in base] if place else []
    changes: dict[str, Any] = {}
    if shared:
        pairs = [([base[s].reports[test] for s in shared], [own[s].reports[test] for s in shared]) for test in tests]
        changes["from_base"] = change_between(pairs, metric)
    if untrained is not None:
        pairs = [([untrained.reports[test]], [cell.reports[test] for cell in own.values()]) for test in tests]
        changes["from_untrained"] = change_between(pairs, metric)
        changes["untrained"] = float(np.mean([untrained.reports[test].metrics[metric] for test in tests]))
    return Effect(
        place,
        tests[0] if len(tests) == 1 else AVERAGE,
        metric,
        float(np.mean(list(by_seed.values()))),
        by_seed,
        sum(report.num_queries for report in first),
        sum(len(set(report.clusters)) for report in first),
        **changes,
    )


def change_between(pairs: Sequence[tuple[Sequence[Report], Sequence[Report]]], metric: str) -> Change:
    """The change from base reports to others, both given for each test set: one base, or as many as others, by seed.
    On one test set the test is `compare_seeds`, or `compare` for a single seed; the average has `t_interval`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about lengths, prompts and the like: they are what the grid varies
        differences = []
        for bases, others in pairs:
            base_SQ, other_SQ = (paired_values(bases[0], reports, metric) for reports in (bases, others))
            differences.append((other_SQ - base_SQ, bases[0].clusters))
        mean = float(np.mean([values_SQ.mean() for values_SQ, _ in differences]))
        if any(len(set(clusters)) < 2 for _, clusters in differences):
            return Change(mean)
        variance, several = variance_of(*differences), len(pairs[0][1]) > 1
        if len(pairs) > 1:
            found = t_interval(variance)
        else:
            (bases, others) = pairs[0]
            one = compare_seeds(bases, others, metric=metric) if several else compare(*bases, *others, metric=metric)
            found = {"interval": one.interval, "p_value": one.p_value}
    found |= {"question_error": math.sqrt(variance.questions), "error": math.sqrt(variance.total)}
    found |= {"seed_error": math.sqrt(variance.seeds) if several else None}
    return Change(mean, **found, questions_needed=questions_needed(variance))


def choose(results: Results) -> tuple[int, float] | None:
    """The point that is best on the validation questions, and its `select` there (of several datasets, their mean, or
    that of the one it names), mean over seeds; the first of equals. Only points whose seeds are all finished take part,
    so that none wins by a lucky seed. None if there are none, or if they were validated on different questions."""
    select, found, questions = results.grid.select, {}, set()
    for i, point in enumerate(results.grid.points):
        cells = results.of_point(point)
        reports = [cell.reports[VALIDATION] for cell in cells.values() if VALIDATION in cell.reports]
        if len(reports) == len(results.grid.seeds) and all(select in report.metrics for report in reports):
            found[i] = float(np.mean([report.metrics[select] for report in reports]))
            questions |= {cell.cell.hashes.get(VALIDATION) for cell in cells.values()}
    return max(found.items(), key=lambda item: item[1]) if len(questions) == 1 else None
