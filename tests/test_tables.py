"""tables.py: hand-worked tables in every style, and cells that a spreadsheet could misread."""

import csv
import dataclasses
import io
import math
import re

import numpy as np
import pytest
from naming import naming

from embedft.retrieval.evaluate import evaluate_run
from embedft.retrieval.report import Comparison, Report, compare
from embedft.retrieval.run import Run
from embedft.retrieval.tables import (
    compare_all,
    format_comparisons,
    format_grid,
    format_reports,
    format_table,
    grid_base,
    main_metrics,
    setting_name,
)

NASTY = r"a|b_50% & {x} \ ~ ^ <y> #1 $2 ±3"


def make_report(ranks, *, ks=(1, 5, 10), setting=None, costs=None) -> Report:
    """Question i has its one relevant document at ranks[i], from 1; 0: it is not found."""
    results, qrels = {}, {}
    for i, rank in enumerate(ranks):
        documents = [f"d{j}" for j in range(9)]
        if rank:
            documents.insert(rank - 1, f"r{i}")
        results[f"q{i}"] = {document: -float(place) for place, document in enumerate(documents)}
        qrels[f"q{i}"] = {f"r{i}": 1}
    report = evaluate_run(Run.from_dict(results), qrels, ks=ks)
    return dataclasses.replace(report, setting=setting or {}, costs=costs or {})


def make_comparison(**changes) -> Comparison:
    fields = {
        "metric": "mrr@10",
        "base": 0.4375,
        "other": 0.625,
        "difference": 0.1875,
        "interval": (-0.0125, 0.375),
        "p_value": 0.24997,
        "wins": 2,
        "ties": 1,
        "losses": 1,
        "num_queries": 4,
        "num_clusters": 3,
    }
    return Comparison(**(fields | changes))


def read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


# Cells that are text.


def test_text():
    assert format_table(["metric", "a"], [["mrr@10", "0.5"], ["x", ""]], style="text").splitlines() == [
        "metric    a",
        "mrr@10  0.5",
        "x",
    ]


def test_markdown():
    assert format_table(["metric", "a"], [["mrr@10", "0.5"], ["x", "0.25"]]).splitlines() == [
        "| metric |    a |",
        "|--------|-----:|",
        "| mrr@10 |  0.5 |",
        "| x      | 0.25 |",
    ]
    assert format_table(["a", "b", "c"], [["1", "22", "3"]], num_left=2).splitlines() == [
        "| a | b  | c |",
        "|---|----|--:|",
        "| 1 | 22 | 3 |",
    ]


def test_latex():
    rows = [["hit_rate@5", "-0.5", "[-.1, +.2]"], ["[0, 1]", "<0.0001", "a|b~^\\{c}\n3-5 ±1"]]
    assert format_table(["metric", "a", "b"], rows, style="latex").splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"{}metric & a & b \\",
        r"\midrule",
        r"{}hit\_rate@5 & $-$0.5 & [$-$.1, +.2] \\",
        r"{}[0, 1] & \textless{}0.0001 & "
        r"a\textbar{}b\textasciitilde{}\textasciicircum{}\textbackslash{}\{c\} 3-5 $\pm$1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv():
    text = format_table(["metric", "a"], [['he said "x", then', "1\n2"], ["", "0.5"]], style="csv")
    assert text == 'metric,a\n"he said ""x"", then","1\n2"\n,0.5'
    assert read_csv(text) == [["metric", "a"], ['he said "x", then', "1\n2"], ["", "0.5"]]


def test_markdown_and_line_ends():
    table = format_table(["name", "a"], [["one|two\nthree", "1"]])
    assert table.splitlines()[2] == r"| one\|two three | 1 |"
    assert len({len(line) for line in table.splitlines()}) == 1
    assert format_table(["name"], [["one\ntwo"]], style="text") == "name\none two"


# Reports.


def test_reports_by_hand():
    """Ranks 1, 2, 4 and none: mrr (1 + 1/2 + 1/4 + 0) / 4, ndcg (1 + 1/log2(3) + 1/log2(5)) / 4, three hits of four."""
    report, perfect = make_report([1, 2, 4, 0]), make_report([1, 1, 1, 1])
    ndcg = (1 + 1 / math.log2(3) + 1 / math.log2(5)) / 4
    assert f"{ndcg:.4f}" == "0.5154"
    assert format_reports({"model": report, "bm25": perfect}, style="text").splitlines() == [
        "report  hit_rate@5  mrr@10  ndcg@10  map@100",
        "model       0.7500  0.4375   0.5154   0.4375",
        "bm25        1.0000  1.0000   1.0000   1.0000",
    ]
    one = dataclasses.replace(report, per_query={"mrr@5": report.per_query["mrr@5"]})
    assert format_reports({"model": one}).splitlines() == [
        "| report |  mrr@5 |",
        "|--------|-------:|",
        "| model  | 0.4375 |",
    ]
    header, row = read_csv(format_reports({"model": report}, style="csv"))
    assert header == ["report", "hit_rate@5", "mrr@10", "ndcg@10", "map@100"]
    assert row[0] == "model"
    assert [float(cell) for cell in row[1:]] == [report.metrics[name] for name in header[1:]]  # every digit


def test_main_metrics_are_the_available_ones():
    assert main_metrics(make_report([1, 3], ks=(2, 30, 7))) == ["hit_rate@30", "mrr@30", "ndcg@30", "map@100"]
    assert main_metrics(make_report([1, 3], ks=(5,))) == ["hit_rate@5", "mrr@5", "ndcg@5", "map@100"]
    chosen = {
        ("mrr", "ndcg@20", "accuracy@1"): ["mrr", "ndcg@20"],
        ("judged@10", "map", "rprec", "precision@5"): ["map", "judged@10", "rprec"],
        ("precision@5", "recall@3"): ["precision@5", "recall@3"],
    }
    for names, expected in chosen.items():
        assert (
            main_metrics(dataclasses.replace(make_report([1]), per_query=dict.fromkeys(names, np.ones(1)))) == expected
        )


def test_errors_of_reports():
    report = make_report([1, 2])
    with pytest.raises(ValueError, match=naming("no", "reports")):
        format_reports({})
    with pytest.raises(ValueError, match=naming("'b'", "metric", "hit_rate@5", "hit_rate@3")):
        format_reports({"a": report, "b": make_report([1], ks=(3,))})
    with pytest.raises(ValueError, match=naming("style", "html", "text", "markdown", "csv")):
        format_reports({"a": report}, style="html")


# Grids.


def grid() -> list[Report]:
    """Four ways to search, of which the third is exact and widest; then BM25."""
    costs = {"recall@10_of_exact": 0.98765, "queries_per_second": 12345.6, "bytes_per_document": 384.0}
    settings = [
        {"dim": 64, "precision": "float32", "index": "flat"},
        {"dim": 128, "precision": "float32", "index": "hnsw"},
        {"dim": 128, "precision": "float32", "index": "flat"},
        {"dim": 128, "precision": "int8", "index": "flat"},
    ]
    ranks = [[1, 2, 4, 0], [2, 2, 4, 0], [1, 1, 2, 3], [1, 1, 2, 4]]
    reports = [
        make_report(ranks_of, setting={"passages": None, **setting}, costs={**costs, "build_seconds": i + 0.25})
        for i, (ranks_of, setting) in enumerate(zip(ranks, settings, strict=True))
    ]
    return [*reports, make_report([1, 0, 0, 0], setting={"index": "bm25"})]


def test_grid_by_hand():
    """Reciprocal ranks of the base 1, 1, 1/2, 1/3: 0.7083; of the first 1, 1/2, 1/4, 0: 0.4375, 0.2708 less."""
    reports = grid()
    base, others = reports[2], [*reports[:2], *reports[3:]]
    assert grid_base(reports) is base
    first, second, fourth, bm25 = compare(base, *others, metric="mrr@10")
    assert (first.difference, second.num_comparisons) == (pytest.approx(0.4375 - (2 + 1 / 2 + 1 / 3) / 4), 4)

    def statistics(c: Comparison) -> list[str]:
        return [
            f"{c.difference:+.4f}",
            f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]",
            f"{c.p_value:.4f}",
        ]

    cells = [re.split("  +", line) for line in format_grid(reports, metric="mrr@10", style="text").splitlines()]
    costs = ["0.988", "12,346", "384"]
    assert cells == [
        ["dim", "precision", "index", "mrr@10", "difference", "95% interval", "p-value (Holm, 4)", "of exact",
         "queries/s", "bytes/doc", "build, s"],
        ["64", "float32", "flat", "0.4375", *statistics(first), *costs, "0.25"],
        ["128", "float32", "hnsw", "0.3125", *statistics(second), *costs, "1.25"],
        ["128", "float32", "flat", "0.7083", "base", *costs, "2.25"],
        ["128", "int8", "flat", "0.6875", *statistics(fourth), *costs, "3.25"],
        ["", "bm25", "0.2500", *statistics(bm25)],
    ]  # fmt: skip


def test_grid_in_a_spreadsheet():
    reports = grid()
    header, *rows = read_csv(format_grid(reports, metric="mrr@10", style="csv"))
    assert header == [
        "dim", "precision", "index", "mrr@10", "difference", "interval_low", "interval_high", "p_value",
        "recall@10_of_exact", "queries_per_second", "bytes_per_document", "build_seconds",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(header)}
    comparison = compare(reports[2], *reports[:2], *reports[3:], metric="mrr@10")[0]
    assert [float(cell) for cell in rows[0][4:8]] == [
        comparison.difference, *comparison.interval, comparison.p_value]  # fmt: skip
    assert rows[2] == [
        "128", "float32", "flat", str(reports[2].metrics["mrr@10"]), "", "", "", "", "0.98765", "12345.6", "384.0",
        "2.25",
    ]  # fmt: skip
    assert rows[4][:3] == ["", "", "bm25"]


def test_grid_over_passages():
    reports = grid()[2:4]
    reports[1] = dataclasses.replace(reports[1], setting={**reports[1].setting, "passages": [128, 64]})
    table = format_grid(reports, metric="mrr@10")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["whole", "128/64"]
    reports[0] = dataclasses.replace(reports[0], setting={**reports[0].setting, "passages": [128, 64, 64, 32]})
    assert format_grid(reports, metric="mrr@10").splitlines()[2].startswith("| 128/64+64/32 |")
    reports[0] = grid()[2]
    assert format_grid([*reports, grid()[-1]]).splitlines()[-1].startswith("|          |     |  ")  # BM25 has none
    assert read_csv(format_grid(reports, metric="mrr@10", style="csv"))[2][0] == "128/64"
    dashes = "".join(
        "r" if rule.endswith(":") else "l" for rule in format_grid(reports).splitlines()[1].split("|")[1:-1]
    )
    assert dashes == "llllrrrrrrrr"


def test_the_base_of_a_grid():
    reports = grid()
    without = [report for report in reports if report.setting.get("index") != "flat"]
    assert grid_base(without) is without[0]
    assert grid_base(reports[3:]) is reports[3]
    twice = [reports[2], dataclasses.replace(reports[2], setting={**reports[2].setting, "passages": [128, 64]})]
    assert grid_base(twice) is twice[0]
    assert grid_base(twice[::-1]) is twice[1]


def test_a_grid_of_one_and_of_two():
    reports = grid()
    one = format_grid(reports[:1], style="text").splitlines()
    assert re.split("  +", one[0])[4:7] == ["difference", "95% interval", "p-value"]
    assert re.split("  +", one[1])[:5] == ["64", "float32", "flat", "0.5154", "base"]
    two = format_grid(reports[2:4], style="text").splitlines()
    assert re.split("  +", two[0])[4:7] == ["difference", "95% interval", "p-value"]
    assert compare_all(reports[0], [], metric="ndcg@10") == []
    assert compare_all(reports[0], reports[1:2], metric="mrr@10") == [compare(reports[0], reports[1], metric="mrr@10")]


def test_errors_of_a_grid():
    reports = grid()
    with pytest.raises(ValueError, match=naming("no", "reports")):
        format_grid([])
    with pytest.raises(ValueError, match=naming("dim64-float32-flat", "metric", "mrr@7", "hit_rate@1")):
        format_grid(reports, metric="mrr@7")
    with pytest.raises(ValueError, match=naming("unnamed", "setting", "metric", "mrr@7")):
        format_grid([make_report([1])], metric="mrr@7")
    with pytest.raises(ValueError, match=naming("questions", 0, ..., "base", ..., 1, ..., "other", ..., ["q4"])):
        format_grid([*reports, make_report([1, 2, 3, 4, 5])])
    with pytest.raises(ValueError, match=naming("style", "tsv", "text", "csv")):
        format_grid(reports, style="tsv")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"dim": 384, "precision": "int8", "index": "hnsw", "passages": [128, 64]}, "128-64-dim384-int8-hnsw"),
        ({"dim": 384, "index": "flat", "passages": [128, 64, 64, 32]}, "128-64+64-32-dim384-flat"),
        ({"dim": 32, "precision": "float32", "index": "flat", "passages": None}, "dim32-float32-flat"),
        ({"index": "OPQ16_64,IVF256(RaBitQ),PQ16x4fs/x"}, "OPQ16_64,IVF256-RaBitQ-,PQ16x4fs-x"),
        ({"passages": (8, 4), "aggregate": "max"}, "8-4"),  # as earlier versions say
        ({"depth": 100}, ""),
    ],
)
def test_names_of_settings(setting, name):
    assert setting_name(setting) == name


# Comparisons.


def test_comparisons_by_hand():
    assert format_comparisons({"tuned": [make_comparison()]}, base="before", style="text").splitlines() == [
        "metric  report    mean  difference        95% interval  p-value  better  equal  worse",
        "mrr@10  before  0.4375",
        "mrr@10  tuned   0.6250     +0.1875  [-0.0125, +0.3750]   0.2500       2      1      1",
    ]


def test_comparisons_of_several_reports_by_several_metrics():
    found = {
        name: [
            make_comparison(metric=metric, base=base, other=other, num_comparisons=2)
            for metric, base in (("mrr@10", 0.25), ("ndcg@10", 0.375))
        ]
        for name, other in (("b", 0.5), ("c", 0.75))
    }
    header, _, *lines = format_comparisons(found).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert rows[0][3:6] == ["difference", "95% interval", "p-value (Holm, 2)"]
    assert [row[:3] for row in rows[1:]] == [
        ["mrr@10", "base", "0.2500"],
        ["mrr@10", "b", "0.5000"],
        ["mrr@10", "c", "0.7500"],
        ["ndcg@10", "base", "0.3750"],
        ["ndcg@10", "b", "0.5000"],
        ["ndcg@10", "c", "0.7500"],
    ]
    assert rows[1][3:] == [""] * 6


def test_comparisons_in_a_spreadsheet():
    header, base, other = read_csv(format_comparisons({"tuned": [make_comparison()]}, style="csv"))
    assert dict(zip(header, other, strict=True)) == {
        "metric": "mrr@10", "report": "tuned", "mean": "0.625", "difference": "0.1875", "interval_low": "-0.0125",
        "interval_high": "0.375", "p_value": "0.24997", "better": "2", "equal": "1", "worse": "1",
        "num_queries": "4", "num_clusters": "3", "num_seeds": "1",
    }  # fmt: skip
    assert base == ["mrr@10", "base", "0.4375", *[""] * 10]


def test_a_p_value_is_never_shown_as_zero():
    table = format_comparisons({"tuned": [make_comparison(p_value=4.9e-5)]}, style="text")
    assert table.splitlines()[2].split()[6] == "<0.0001"
    assert (
        format_comparisons({"tuned": [make_comparison(p_value=5e-5)]}, style="text").splitlines()[2].split()[6]
        == "0.0001"
    )
    assert "4.9e-05" in format_comparisons({"tuned": [make_comparison(p_value=4.9e-5)]}, style="csv")


def test_a_report_compared_with_itself():
    report = make_report([1, 2, 4, 0])
    found = compare_all(report, [report], metric="ndcg@10")
    assert format_comparisons({"again": found}, style="text").splitlines()[2].split() == [
        "ndcg@10", "again", "0.5154", "+0.0000", "[+0.0000,", "+0.0000]", "1.0000", "0", "4", "0"]  # fmt: skip


def test_errors_of_comparisons():
    one = make_comparison()
    for wrong in ({}, {"a": []}, {"a": [one], "b": [make_comparison(metric="ndcg@10")]}, {"a": [one], "b": []}):
        metrics = {name: [found.metric for found in of_name] for name, of_name in wrong.items()}
        with pytest.raises(ValueError, match=naming("metrics", metrics)):
            format_comparisons(wrong)
    with pytest.raises(ValueError, match=naming("style", "'x'", "text", "csv")):
        format_comparisons({"a": [one]}, style="x")


# All styles say the same.


@pytest.mark.parametrize("make", [
    lambda style: format_reports({NASTY: grid()[0]}, style=style),
    lambda style: format_grid(grid(), style=style),
    lambda style: format_comparisons({NASTY: [make_comparison()]}, style=style),
])  # fmt: skip
def test_every_style_has_every_row(make):
    num_rows = len(read_csv(make("csv")))
    assert len(make("text").splitlines()) == num_rows
    markdown = make("markdown").splitlines()
    assert len(markdown) == num_rows + 1
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown}) == 1
