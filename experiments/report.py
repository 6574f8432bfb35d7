"""Before and after over several metrics, with interval and p-value, as the cells of a table.

print(format_table(COMPARISON_HEADER, comparison_rows(compare_metrics(before, after))))
"""

from collections.abc import Sequence

from embedft import Comparison, Report, compare

METRICS = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr@10", "ndcg@10", "map@100")


def compare_metrics(before: Report, after: Report, metrics: Sequence[str] = METRICS) -> list[Comparison]:
    """One comparison a metric. The p-values are each of one test: read the metric you chose beforehand."""
    return [compare(before, after, metric=metric) for metric in metrics]


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells for `format_table`, below COMPARISON_HEADER: metric, before, after, difference, interval, p-value."""
    return [
        [
            c.metric,
            f"{c.base:.4f}",
            f"{c.other:.4f}",
            f"{c.difference:+.4f}",
            f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]",
            f"{c.p_value:.4f}",
        ]
        for c in comparisons
    ]


COMPARISON_HEADER = ["metric", "before", "after", "difference", "95% interval", "p-value"]
