"""Figures of report.py: what is drawn, point by point; files by their suffix; matplotlib missing."""

import dataclasses
import sys

import numpy as np
import pytest
from naming import naming
from test_tables import make_report

from embedft.retrieval.report import plot_questions, save_figure


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


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
    with pytest.raises(ValueError, match=naming("questions", 0, ..., "base", [], 2, ..., "other", ..., ["q1", "q2"])):
        plot_questions(make_report([1]), make_report([1, 2, 3]))
    for pair in ((make_report([1], ks=(3,)), make_report([1])), (make_report([1]), make_report([1], ks=(3,)))):
        with pytest.raises(ValueError, match=naming("metric", "'ndcg@10'", "map@100")):
            plot_questions(*pair)


# Files.


@pytest.mark.parametrize(("name", "beginning"), [("a.png", b"\x89PNG"), ("b.PDF", b"%PDF"), ("new/c.svg", b"<?xml")])
def test_saves_by_the_suffix(tmp_path, name, beginning):
    save_figure(plot_questions(make_report([1, 2]), make_report([1, 1])), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(beginning)


@pytest.mark.parametrize("name", ["a.docx", "a"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=naming(repr(name[2:]), "pdf", "png")):
        save_figure(plot_questions(make_report([1]), make_report([1])), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    figure = plot_questions(make_report([1]), make_report([1]))
    (tmp_path / "a.png").write_text("old")

    def fails(file, **options):
        file.write(b"half")
        raise OSError("full")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(OSError, match=naming(tmp_path / "a.png", "full")):
        save_figure(figure, tmp_path / "a.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = make_report([1])
    with pytest.raises(ValueError, match=naming("plots", "pip", "matplotlib")):
        plot_questions(report, report)
