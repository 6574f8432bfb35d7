"""Differences between reports, with interval and p-value, as the cells of a table.

print(format_table(COMPARISON_HEADER, comparison_rows(compare_metrics(before, after))))
compare_recipes([base], [report_of_seed_0, report_of_seed_1], metric="ndcg@10")
"""

from collections.abc import Sequence

from embedft import Comparison, Report, compare
from embedft.retrieval.report import compare_seeds

METRICS = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr@10", "ndcg@10", "map@100")
COMPARISON_HEADER = ["metric", "before", "after", "difference", "95% interval", "p-value"]


def compare_metrics(before: Report, after: Report, metrics: Sequence[str] = METRICS) -> list[Comparison]:
    """One comparison per metric. P-values are not adjusted for several tests: read the metric you chose beforehand."""
    return [compare(before, after, metric=metric) for metric in metrics]


def compare_recipes(bases: Sequence[Report], others: Sequence[Report], *, metric: str) -> Comparison:
    """Compares a recipe's reports, one per seed, with a single base or with one base per seed.

    With several seeds (`compare_seeds`), interval and p-value are for new seeds and new questions; with one, for new
    questions (`compare`).
    """
    if len(others) > 1:
        return compare_seeds(bases, others, metric=metric)
    return compare(bases[0], others[0], metric=metric)


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells for `format_table`, below COMPARISON_HEADER."""
    return [[c.metric, f"{c.base:.4f}", f"{c.other:.4f}", *difference_cells(c)] for c in comparisons]


def difference_cells(comparison: Comparison) -> list[str]:
    """Difference, interval and p-value."""
    low, high = comparison.interval
    p_value = f"{comparison.p_value:.4f}" if comparison.p_value >= 0.00005 else "<0.0001"
    return [f"{comparison.difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]", p_value]
