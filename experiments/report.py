"""Tables of experiments: before and after with interval and p-value, and Markdown.

print(format_table(["metric", "before"], [["ndcg@10", "0.662"]]))
"""

from collections.abc import Sequence

from embedft import Comparison, Report, compare

METRICS = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr@10", "ndcg@10", "map@100")


def compare_metrics(before: Report, after: Report, metrics: Sequence[str] = METRICS) -> list[Comparison]:
    """One comparison a metric. The p-values are each of one test: read the metric you chose beforehand."""
    return [compare(before, after, metric=metric) for metric in metrics]


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells for `format_table`: metric, before, after, difference, interval, p-value."""
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


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
