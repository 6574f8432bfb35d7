"""plots.py: what is drawn, point by point; files by their suffix; matplotlib missing."""

import dataclasses
import sys

import numpy as np
import pytest
from test_tables import make_report

from embedft.retrieval.plots import plot_dims, plot_questions, plot_recall, save_figure


def of_setting(ranks, **setting):
    return make_report(ranks, setting=setting)


def grid():
    """Mean reciprocal ranks at 32 and 128 dimensions: 0.5 and 1 in float32, 0.25 and 0.75 in int8."""
    common = {"index": "flat", "passages": None}
    return [
        of_setting([1, 1], dim=128, precision="float32", **common),
        of_setting([1, 2], dim=128, precision="int8", **common),
        of_setting([2, 2], dim=32, precision="float32", **common),
        of_setting([4, 4], dim=32, precision="int8", **common),
    ]


def lines_of(figure) -> dict[str, list]:
    (axes,) = figure.axes
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


# Dimensions.


def test_a_line_a_precision():
    figure = plot_dims(grid(), metric="mrr@10")
    assert lines_of(figure) == {"float32": [[32, 0.5], [128, 1.0]], "int8": [[32, 0.25], [128, 0.75]]}
    assert legend_of(figure) == ["float32", "int8"]
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("dimensions", "mrr@10", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["32", "128"]
    assert legend_of(plot_dims([*grid(), of_setting([3], index="bm25")])) == ["float32", "int8", "bm25"]


def test_lines_are_named_by_what_differs():
    reports = [
        of_setting([1], dim=32, precision="float32", index="flat", passages=None),
        of_setting([2], dim=32, precision="float32", index="hnsw", passages=None),
        of_setting([4], dim=32, precision="float32", index="flat", passages=[128, 64], aggregate="max"),
        of_setting([8], dim=32, precision="float32", index="flat", passages=[128, 64], aggregate="mean"),
        of_setting([3], index="bm25"),
    ]
    figure = plot_dims(reports, metric="mrr@10")
    names = ["whole-flat", "whole-hnsw", "128-64-flat", "128-64-mean-flat", "bm25"]
    assert legend_of(figure) == names
    assert lines_of(figure)["bm25"] == [[0, 1 / 3], [1, 1 / 3]]  # across the axes
    assert lines_of(figure)["128-64-mean-flat"] == [[32, 1 / 8]]

    figure = plot_dims(reports[2:4], metric="mrr@10")
    assert lines_of(figure) == {"128-64": [[32, 1 / 4]], "128-64-mean": [[32, 1 / 8]]}


def test_one_line_needs_no_legend():
    figure = plot_dims([report for report in grid() if report.setting["precision"] == "int8"], metric="mrr@10")
    assert figure.axes[0].get_legend() is None


def test_errors_of_dims():
    with pytest.raises(ValueError, match="no reports"):
        plot_dims([])
    with pytest.raises(ValueError, match=r"a report has no metric 'mrr@7'; it has: hit_rate@1"):
        plot_dims(grid(), metric="mrr@7")
    with pytest.raises(ValueError, match="two reports are of int8 at 32 dimensions"):
        plot_dims([*grid(), grid()[-1]])
    with pytest.raises(ValueError, match="two reports are of the same setting at 32 dimensions"):
        plot_dims(grid()[2:3] * 2)


# Questions.


def test_a_point_is_as_large_as_its_questions_are_many():
    """Reciprocal ranks of the base 1, 1, 1/2, 1/4, 0 and of the other 1, 1, 1, 0, 1/2, questions in another order."""
    base, other = make_report([1, 1, 2, 4, 0]), make_report([1, 1, 1, 0, 2])
    order = [4, 2, 0, 1, 3]
    shuffled = dataclasses.replace(
        other,
        query_ids=[other.query_ids[i] for i in order],
        clusters=[other.clusters[i] for i in order],
        per_query={name: values[order] for name, values in other.per_query.items()},
        run=other.run.select([other.query_ids[i] for i in order]),
    )
    for report in (other, shuffled):
        figure = plot_questions(base, report, metric="mrr@10", names=("BERT", "mine"))
        (axes,) = figure.axes
        better, equal, worse = axes.collections
        assert sorted(better.get_offsets().tolist()) == [[0.0, 0.5], [0.5, 1.0]]
        assert equal.get_offsets().tolist() == [[1.0, 1.0]]
        assert worse.get_offsets().tolist() == [[0.25, 0.0]]
        assert equal.get_sizes().tolist() == [2 * better.get_sizes()[0]]
        assert legend_of(figure) == ["better: 2", "equal: 2", "worse: 1"]
        assert axes.get_legend().get_title().get_text() == "5 questions"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("BERT, mrr@10", "mine, mrr@10")


def test_values_that_differ_in_the_last_bits_are_one_point():
    base = make_report([1, 1, 1])
    nearly = {name: values - np.array([0, 1e-16, 2e-16]) for name, values in base.per_query.items()}
    figure = plot_questions(base, dataclasses.replace(base, per_query=nearly))
    assert legend_of(figure) == ["better: 0", "equal: 3", "worse: 0"]
    assert len(figure.axes[0].collections[1].get_offsets()) == 1


def test_many_questions_stay_within_the_figure():
    figure = plot_questions(make_report([1] * 5000 + [2]), make_report([1] * 5001))
    better, equal, _ = figure.axes[0].collections
    assert equal.get_sizes().max() == pytest.approx(600)
    assert better.get_sizes().tolist() == [4]


def test_errors_of_questions():
    with pytest.raises(ValueError, match="over different questions: 2 are in one of them only"):
        plot_questions(make_report([1]), make_report([1, 2, 3]))
    for pair in ((make_report([1], ks=(3,)), make_report([1])), (make_report([1]), make_report([1], ks=(3,)))):
        with pytest.raises(ValueError, match=r"a report has no metric 'ndcg@10'; it has: hit_rate@3"):
            plot_questions(*pair)


# Recall.


def test_recall_against_speed():
    costs = [
        {"queries_per_second": 100.0, "recall@10_of_exact": 1.0},
        {"queries_per_second": 9e3, "recall@10_of_exact": 0.9},
    ]
    reports = [
        make_report([1], setting={"dim": 8, "precision": "float32", "index": index}, costs=cost)
        for index, cost in zip(("flat", "hnsw"), costs, strict=True)
    ]
    figure = plot_recall(reports)
    (axes,) = figure.axes
    assert [points.get_offsets().tolist() for points in axes.collections] == [[[100.0, 1.0]], [[9e3, 0.9]]]
    assert (legend_of(figure), axes.get_xscale()) == (["flat", "hnsw"], "log")
    assert plot_recall(reports[:1]).axes[0].get_legend() is None
    with pytest.raises(ValueError, match="no reports"):
        plot_recall([])
    with pytest.raises(ValueError, match="the report of bm25 has no queries_per_second"):
        plot_recall([*reports, make_report([1], setting={"index": "bm25"})])
    with pytest.raises(ValueError, match=r"the report of an unnamed setting has no recall@10_of_exact"):
        plot_recall([make_report([1], costs={"queries_per_second": 1.0})])


# Files.


@pytest.mark.parametrize(("name", "beginning"), [("a.png", b"\x89PNG"), ("b.PDF", b"%PDF"), ("new/c.svg", b"<?xml")])
def test_saves_by_the_suffix(tmp_path, name, beginning):
    save_figure(plot_questions(make_report([1, 2]), make_report([1, 1])), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(beginning)


@pytest.mark.parametrize("name", ["a.docx", "a"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: no format of a figure by its suffix, expected one of .*pdf.*png"):
        save_figure(plot_questions(make_report([1]), make_report([1])), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    figure = plot_questions(make_report([1]), make_report([1]))
    (tmp_path / "a.png").write_text("old")

    def fails(file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "a.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = make_report([1])
    message = "plots need matplotlib: pip install matplotlib"
    for draw in (
        lambda: plot_dims(grid()),
        lambda: plot_questions(report, report),
        lambda: plot_recall([report]),
    ):
        with pytest.raises(ValueError, match=message):
            draw()
