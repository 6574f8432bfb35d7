"""results.py, effects.py and tables.py of an ablation, and `embedft report`, on folders written by tiny_grid.py."""

import csv
import io
import json
import math
import shutil
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
from naming import names, naming
from tiny_grid import POINTS, make_questions, run_of, write_grid

from embedft import Report, compare, evaluate_run
from embedft.ablation.effects import choose, measure_effects
from embedft.ablation.grid import EVAL, FAILED, RESULT, VALIDATION, WINDOWS, Grid
from embedft.ablation.results import Results
from embedft.ablation.tables import format_report, introduction
from embedft.cli import main
from embedft.files import read_json, write_json
from embedft.retrieval.power import questions_needed
from embedft.retrieval.significance import holm, recipe_interval, t_interval, variance_of
from embedft.retrieval.suite import Suite

# Reciprocal ranks by seed: BASE 1/2 1/2 1/4 1/4 and 1/2 1/2 1/4 1/5; the point 1 1 1/2 1/4 and 1/2 1 1/2 1/5.
UBER = {(0, 0): [2, 2, 4, 4], (0, 1): [2, 2, 4, 5], (1, 0): [1, 1, 2, 4], (1, 1): [2, 1, 2, 5]}
UBER |= {(0, None): [4, 4, 4, 4], (2, 0): [2, 2, 4, 4], (2, 1): [2, 2, 4, 0]}
FACTS = {(0, 0): [1, 1, 2], (0, 1): [1, 2, 2], (1, 0): [2, 1, 2], (1, 1): [2, 2, 2], (0, None): [1, 1, 1]}
FACTS |= {(2, 0): [1, 1, 2], (2, 1): [1, 2, 1]}


@pytest.fixture
def out(tmp_path):
    write_grid(tmp_path / "out", {"uber": UBER, "facts": FACTS, "validation": UBER})
    return tmp_path / "out"


def by_point(effects, test, metric="mrr@10"):
    return {one.point: one for one in effects if (one.test, one.metric) == (test, metric)}


def test_means_and_differences_by_hand(out):
    effects = measure_effects(Results.load(out), ["mrr@10"])
    base, first, second = by_point(effects, "uber").values()
    assert base.by_seed == {0: 0.375, 1: pytest.approx(1.45 / 4)}
    assert (base.mean, base.from_base) == (pytest.approx((1.5 + 1.45) / 8), None)
    # Seed 0: 1/2 1/2 1/4 0; seed 1: 0 1/2 1/4 0; so 2/8 of 8.
    assert first.from_base.difference == pytest.approx(0.25)
    # Less the untrained 1/4: 3/4 3/4 1/4 0 and 1/4 3/4 1/4 -1/20.
    assert first.from_untrained.difference == pytest.approx(2.95 / 8)
    assert second.from_base.difference == pytest.approx(-0.2 / 8)
    assert base.from_untrained.difference == pytest.approx(0.95 / 8)
    assert (first.num_queries, first.num_clusters) == (4, 4)


def test_what_was_forgotten_is_a_percentage_in_every_style(out):
    results = Results.load(out)
    effects = measure_effects(results, ["mrr@10"])
    # facts, untrained: 1; BASE 1 1 1/2 and 1 1/2 1/2, so 4.5/6; the point 1: 1/2 1 1/2 and 1/2 1/2 1/2, so 3.5/6.
    base, first, _ = by_point(effects, "facts").values()
    assert (base.untrained, base.relative) == (1.0, pytest.approx(-0.25))
    assert first.relative == pytest.approx(-2.5 / 6)
    # The average: untrained (1/4 + 1) / 2, BASE (2.95/8 + 4.5/6) / 2.
    average = by_point(effects, "average")[0]
    assert (average.untrained, average.relative) == (0.625, pytest.approx((2.95 / 8 + 0.75) / 1.25 - 1))
    for style, cell in (("text", " -25.0%"), ("markdown", " -25.0% |"), ("latex", r"& $-$25.0\%")):
        for table in format_report(results, effects, style=style).split("facts: mrr@10")[1:]:
            assert names(table, "untrained", "from untrained"), style
            assert cell in table, style
        changes = format_report(results, effects, style=style).split("Change on every test set")[1]
        assert "facts, from untrained" in changes
        assert cell in changes, style
    rows = csv.DictReader(io.StringIO(format_report(results, effects, style="csv")))
    (row,) = (row for row in rows if (row["test"], row["point"]) == ("facts", "1"))
    assert (row["untrained"], float(row["percent_untrained"])) == ("1.0", pytest.approx(-250 / 6))
    assert "facts mrr@10 0.5833 (-0.1667 from BASE" in format_report(results, effects)
    assert "-41.7% from untrained)" in format_report(results, effects)


def test_nothing_is_relative_to_an_untrained_model_that_finds_nothing(tmp_path):
    write_grid(tmp_path / "out", {"uber": UBER | {(0, None): [0, 0, 0, 0]}})
    results = Results.load(tmp_path / "out")
    effects = measure_effects(results, ["mrr@10"])
    assert {(one.untrained, one.relative) for one in effects} == {(0.0, None)}
    assert "%" not in format_report(results, effects, style="text").split("Standard errors")[0].replace("95%", "")


def test_statistics_of_several_seeds(out):
    effects = by_point(measure_effects(Results.load(out), ["mrr@10"]), "uber")
    differences = np.array([[0.5, 0.5, 0.25, 0], [0, 0.5, 0.25, 0]])
    expected, variance = recipe_interval(differences), variance_of((differences, None))
    change = effects[1].from_base
    assert change.interval == pytest.approx(expected["interval"])
    assert (change.question_error, change.seed_error) == pytest.approx(
        (expected["question_error"], expected["seed_error"])
    )
    # By hand: seeds' means 5/16 and 3/16 are 1/16 from theirs, V_S = 2 (1/16)^2 / 2.
    assert change.seed_error == pytest.approx(1 / 16)
    assert change.error == pytest.approx(math.sqrt(variance.total))
    assert change.questions_needed == questions_needed(variance)
    # Holm over the two points.
    other = np.array([[0, 0, 0, 0], [0, 0, 0, -0.2]])
    p_values = [expected["p_value"], recipe_interval(other)["p_value"]]
    assert [effects[i].from_base.p_value for i in (1, 2)] == pytest.approx(holm(p_values))
    assert holm(p_values) != p_values


def test_a_single_seed_is_compared_by_bootstrap_and_sign_flips(tmp_path):
    ranks = {place: found for place, found in UBER.items() if place[1] in (0, None)}
    write_grid(tmp_path / "out", {"uber": ranks})
    change = by_point(measure_effects(Results.load(tmp_path / "out"), ["mrr@10"]), "uber")[1].from_base
    questions = make_questions(4)
    reports = [evaluate_run(run_of(questions, ranks[place, 0]), questions, metrics=["mrr@10"]) for place in (0, 1, 2)]
    expected = compare(*reports, metric="mrr@10")[0]
    assert (change.interval, change.p_value) == (expected.interval, expected.p_value)
    assert change.seed_error is None
    assert change.error == change.question_error > 0


def test_the_average_of_tests_counts_each_test_once(out):
    effects = measure_effects(Results.load(out), ["mrr@10"])
    uber, facts, average = (by_point(effects, name)[1] for name in ("uber", "facts", "average"))
    assert average.mean == pytest.approx((uber.mean + facts.mean) / 2)
    assert (average.num_queries, average.num_clusters) == (4 + 3, 4 + 3)
    difference = (uber.from_base.difference + facts.from_base.difference) / 2
    assert average.from_base.difference == pytest.approx(difference)
    errors = [one.from_base.question_error for one in (uber, facts)]
    assert average.from_base.question_error == pytest.approx(math.hypot(*errors) / 2)


def test_seeds_that_are_missing_leave_the_pairs_that_are_there(tmp_path):
    ranks = {place: found for place, found in UBER.items() if place != (0, 1)}
    write_grid(tmp_path / "out", {"uber": ranks})
    results = Results.load(tmp_path / "out")
    assert [names(line, "seed", 1, "not finished") for line in results.missing] == [True]
    effects = by_point(measure_effects(results, ["mrr@10"]), "uber")
    assert list(effects[1].by_seed) == [0, 1]
    assert effects[1].from_base.difference == pytest.approx(1.25 / 4)  # seed 0 alone
    assert effects[1].from_base.seed_error is None
    assert effects[1].from_untrained.seed_error is not None


def test_one_of_each_is_said_in_the_singular(tmp_path):
    write_grid(tmp_path / "out", {"uber": {(0, 0): [2, 1]}})
    results = Results.load(tmp_path / "out")
    first, *_ = introduction(results, measure_effects(results, ["mrr@10"]))
    assert names(first, "1 point", ..., "1 seed", ..., "1 test set")


def test_without_base_means_remain(tmp_path):
    ranks = {place: found for place, found in UBER.items() if place[0] == 1}
    write_grid(tmp_path / "out", {"uber": ranks | {(0, None): UBER[0, None]}})
    results = Results.load(tmp_path / "out")
    grid = Grid.load(tmp_path / "out")
    assert len(grid.points) == 2
    effects = measure_effects(results, ["mrr@10"])
    assert [(one.point, one.from_base) for one in effects] == [(1, None)]
    assert names(format_report(results, effects), "BASE", "no finished seed")


def test_one_cluster_has_a_difference_alone(tmp_path):
    write_grid(tmp_path / "out", {"uber": {(0, 0): [2], (0, 1): [2], (1, 0): [1], (1, 1): [1]}})
    results = Results.load(tmp_path / "out")
    effects = measure_effects(results, ["mrr@10"])
    assert (effects[1].from_base.difference, effects[1].from_base.interval) == (0.5, None)
    for style in ("text", "markdown", "latex", "csv"):
        assert "0.5" in format_report(results, effects, style=style)


def test_an_average_over_a_test_of_one_cluster_has_no_interval(tmp_path):
    single = {place: [rank] for place, rank in {(0, 0): 2, (0, 1): 2, (1, 0): 1, (1, 1): 1}.items()}
    write_grid(tmp_path / "out", {"uber": {place: UBER[place] for place in single}, "single": single})
    effects = measure_effects(Results.load(tmp_path / "out"), ["mrr@10"])
    changes = {test: by_point(effects, test)[1].from_base for test in ("uber", "single", "average")}
    assert changes["average"].difference == pytest.approx((0.25 + 0.5) / 2)
    assert [name for name, change in changes.items() if change.interval] == ["uber"]


def test_questions_that_share_a_document_are_one_cluster(tmp_path):
    questions = make_questions(4)
    questions = replace(questions, qrels=questions.qrels | {"q1": {"d0": 1}})
    write_grid(tmp_path / "out", {"uber": UBER}, datasets={"uber": questions})
    effects = by_point(measure_effects(Results.load(tmp_path / "out"), ["mrr@10"]), "uber")
    assert (effects[1].num_queries, effects[1].num_clusters) == (4, 3)
    differences = np.array([[0.5, 0.5, 0.25, 0], [0, 0.5, 0.25, 0]])
    assert effects[1].from_base.interval == pytest.approx(recipe_interval(differences, [0, 0, 1, 2])["interval"])


@pytest.mark.parametrize("other", [{"hashes": {"model": "other"}}, {"config": {"evaluate": {"dim": 8}}}])
def test_only_the_same_model_evaluated_in_the_same_way_is_the_untrained_one(out, other):
    (cell,) = (cell for cell in Grid.load(out).cells if cell.seed is None)
    changes = {name: getattr(cell, name) | value for name, value in other.items()}
    write_json(out / "cells" / cell.key / "cell.json", asdict(replace(cell, **changes)))
    effects = measure_effects(Results.load(out), ["mrr@10"])
    assert {one.from_untrained for one in effects} == {None}


def test_components_of_other_training_data_are_not_those_of_the_untrained_one(out):
    for cell in Grid.load(out).cells:
        hashes = cell.hashes | {"train": "b" if cell.point == POINTS[1] else "a"}
        path = out / "cells" / cell.key / "cell.json"
        write_json(path, asdict(replace(cell, hashes=hashes, config={"evaluate": {"pca": 2}})))
    effects = by_point(measure_effects(Results.load(out), ["mrr@10"]), "uber")
    assert [one.from_untrained is None for one in effects.values()] == [False, True, False]


def test_what_is_missing_is_named_with_its_reason(out):
    grid = Grid.load(out)
    folders = {(POINTS.index(cell.point), cell.seed): grid.folder(cell) for cell in grid.cells}
    (folders[1, 0] / RESULT).unlink()
    (folders[1, 1] / RESULT).unlink()
    write_json(folders[1, 1] / FAILED, {"error": "loss is nan at step 3", "log": "log.txt", "when": "now"})
    (folders[2, 0] / EVAL / "uber" / "run.trec").write_text("broken\n")
    (folders[2, 1] / RESULT).write_text("{}")
    results = Results.load(out)
    reasons = [("not finished",), ("failed", "loss is nan at step 3", folders[1, 1] / "log.txt")]
    reasons += [("run.trec",), ("damaged", folders[2, 1] / RESULT)]
    assert len(results.missing) == 4
    for line, facts in zip(results.missing, reasons, strict=True):
        assert names(line, "seed", *facts), line
    text = format_report(results, measure_effects(results, ["mrr@10"]))
    assert all(line.replace("<", "&lt;") in text for line in results.missing)
    assert len(by_point(measure_effects(results, ["mrr@10"]), "uber")) == 1


@pytest.mark.parametrize("content", ["{", "[]\n", '{"query_id": "q0", "document_id": "d0", "start": "0", "end": 4}\n'])
def test_a_cell_whose_windows_are_damaged_is_missing(out, content):
    cell = next(cell for cell in Grid.load(out).cells if cell.point == POINTS[1] and cell.seed == 0)
    folder = out / "cells" / cell.key
    (folder / EVAL / "uber" / WINDOWS).write_text(content)
    (line,) = Results.load(out).missing
    assert names(line, "seed", 0, folder / EVAL / "uber" / WINDOWS, "remove", folder / RESULT)
    assert main(["report", str(out)]) == 0


def test_a_cell_whose_description_is_damaged_is_left_out(out):
    cell = next(cell for cell in Grid.load(out).cells if cell.point == POINTS[1] and cell.seed == 0)
    path = out / "cells" / cell.key / "cell.json"
    for text in ('{"key": 3}', "{"):
        path.write_text(text)
        results = Results.load(out)
        assert [names(line, path, "damaged") for line in results.missing] == [True]
        assert list(results.of_point(POINTS[1])) == [1]
        assert len(by_point(measure_effects(results, ["mrr@10"]), "uber")) == 3
        with pytest.raises(ValueError, match=naming("damaged", "ablate")):
            Grid.load(out)


def test_cells_of_other_settings_are_left_out_and_counted(out):
    grid = Grid.load(out)
    left = [cell.key for cell in grid.cells if cell.point != POINTS[2]]
    grid_json = json.loads((out / "grid.json").read_text())
    write_json(out / "grid.json", grid_json | {"cells": left, "points": grid_json["points"][:2]})
    results = Results.load(out)
    assert [names(line, 2, "other settings") for line in results.missing] == [True]
    assert len(by_point(measure_effects(results, ["mrr@10"]), "uber")) == 2


def test_the_point_is_chosen_on_validation_and_not_on_the_test(tmp_path):
    better_there = {place: [1, 1, 1, 1] if place[0] == 2 else found for place, found in UBER.items()}
    write_grid(tmp_path / "out", {"uber": UBER, "validation": better_there})
    results = Results.load(tmp_path / "out")
    assert choose(results) == (2, 1.0)
    text = format_report(results, measure_effects(results, ["mrr@10"]))
    assert "Chosen on validation (mrr@10 1.0000, mean over seeds): lr=5e-05 loss.temperature=0.02." in text
    # A point that lacks a seed cannot win.
    (results.grid.folder(next(c for c in results.grid.cells if c.point == POINTS[2] and c.seed == 1)) / RESULT).unlink()
    assert choose(Results.load(tmp_path / "out"))[0] == 1


def test_the_first_of_equal_points_is_chosen(tmp_path):
    same = {place: [2, 1, 1, 1] if place[0] else found for place, found in UBER.items()}
    write_grid(tmp_path / "out", {"uber": UBER, "validation": same})
    assert choose(Results.load(tmp_path / "out")) == (1, 0.875)


def test_runs_that_kept_the_base_weights_are_named(out):
    """Otherwise their differences of 0 would look like what training brings."""

    def said() -> list[str]:
        results = Results.load(out)
        return [line for line in introduction(results, measure_effects(results, ["mrr@10"])) if "base weights" in line]

    assert said() == []
    grid = Grid.load(out)
    for cell in grid.cells:
        place, path = (POINTS.index(cell.point), cell.seed), grid.folder(cell) / RESULT
        write_json(path, read_json(path) | {"best_step": 0 if place in ((1, 1), (2, 0), (2, 1)) else 3})
    (line,) = said()
    assert names(line, "point 1", ..., "seed 1", ..., "point 2", ..., "seed 0, 1")
    assert not names(line, "point 0")


def test_without_validation_nothing_is_chosen(tmp_path):
    write_grid(tmp_path / "out", {"uber": UBER})
    results = Results.load(tmp_path / "out")
    assert choose(results) is None
    assert "No point is chosen" in format_report(results, measure_effects(results, ["mrr@10"]))


@pytest.mark.parametrize(("select", "chosen"), [("mrr@10", (1, 0.6010)), ("b/mrr@10", (2, 0.8333))])
def test_several_validation_sets_choose_by_their_mean_or_one_of_them(out, select, chosen):
    """By hand: uber's questions as "a" and those of facts as "b"."""
    write_json(out / "grid.json", read_json(out / "grid.json") | {"select": select})
    for cell in (grid := Grid.load(out)).cells:
        place = grid.folder(cell) / EVAL
        if (place / VALIDATION).exists():
            shutil.rmtree(place / VALIDATION)
            Suite({"a": Report.load(place / "uber"), "b": Report.load(place / "facts")}).save(place / VALIDATION)
    results = Results.load(out)
    # BASE: (2.95/8 + 4.5/6) / 2; the point 1: (4.95/8 + 3.5/6) / 2; the point 2: (2.75/8 + 5/6) / 2.
    assert choose(results) == (chosen[0], pytest.approx(chosen[1], abs=1e-4))
    text = format_report(results, measure_effects(results, [grid.metric]))
    each = {1: "a/mrr@10 0.6188; b/mrr@10 0.5833", 2: "a/mrr@10 0.3438; b/mrr@10 0.8333"}[chosen[0]]
    assert f"Chosen on validation ({select} {chosen[1]:.4f}, mean over seeds; {each}): " in text
    assert main(["report", str(out)]) == 0


def test_points_validated_on_different_questions_are_not_compared(out):
    """Scores on different questions say nothing about which point is better."""
    for cell in Grid.load(out).cells:
        hashes = cell.hashes | {VALIDATION: "other" if cell.point == POINTS[1] else "same"}
        write_json(out / "cells" / cell.key / "cell.json", asdict(replace(cell, hashes=hashes)))
    results = Results.load(out)
    assert choose(results) is None
    assert "No point is chosen" in format_report(results, measure_effects(results, ["mrr@10"]))


def test_the_average_has_a_t_interval_even_for_a_single_seed(tmp_path):
    ranks = [{place: found for place, found in test.items() if place[1] in (0, None)} for test in (UBER, FACTS)]
    write_grid(tmp_path / "out", {"uber": ranks[0], "facts": ranks[1]})
    results = Results.load(tmp_path / "out")
    effects = measure_effects(results, ["mrr@10"])
    change = by_point(effects, "average")[1].from_base
    differences = [(np.array([[0.5, 0.5, 0.25, 0]]), None), (np.array([[-0.5, 0, 0]]), None)]
    expected = t_interval(variance_of(*differences))
    assert change.interval == pytest.approx(expected["interval"])
    assert "the average of several tests: from a t distribution" in format_report(results, effects)


def test_a_difference_in_what_the_grid_varies_is_no_warning(out):
    """Such as max_length: paired on purpose, so nothing is to be told."""
    for cell in Grid.load(out).cells:
        path = out / "cells" / cell.key / EVAL / "uber" / "metrics.json"
        if path.exists():
            found = read_json(path)
            found["setting"]["max_length"] = 8 if cell.point == POINTS[1] else 48
            write_json(path, found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["report", str(out)]) == 0


def test_csv_has_every_digit_and_reads_back(out):
    results = Results.load(out)
    effects = measure_effects(results, ["mrr@10", "hit_rate@1"])
    rows = list(csv.DictReader(io.StringIO(format_report(results, effects, style="csv"))))
    assert len(rows) == len(effects) == 2 * 3 * 3
    for row, one in zip(rows, effects, strict=True):
        assert (row["metric"], row["test"], int(row["point"])) == (one.metric, one.test, one.point)
        assert float(row["mean"]) == one.mean
        change = one.from_base
        assert (row["difference"], row["interval_low"]) == (
            ("", "") if change is None else (str(change.difference), str(change.interval[0]))
        )
        assert (float(row["train_seconds"]), float(row["peak_gib"])) == (25.0, 2.0)
    assert rows[0]["choice"] == "base"
    assert rows[1]["choice"] == "chosen on validation"
    assert rows[0]["loss.temperature"] == "0.05"


HAZARDS = {  # and what they are in LaTeX
    "</script><b>": r"\textless{}/script\textgreater{}\textless{}b\textgreater{}",
    "a\"b'c": "a\"b'c",
    "50% & $x_1 {~}\\": r"50\% \& \$x\_1 \{\textasciitilde{}\}\textbackslash{}",
    "naïve 日本語": "naïve 日本語",
    "a|b": r"a\textbar{}b",
    "line\nbreak": "line break",
}


@pytest.mark.parametrize(("hazard", "in_latex"), HAZARDS.items())
def test_values_are_escaped_in_every_style(tmp_path, hazard, in_latex):
    points = [{"data": "plain"}, {"data": hazard}]
    write_grid(tmp_path / "out", {"uber": {(i, s): UBER[i, s] for i in (0, 1) for s in (0, 1)}}, points=points)
    results = Results.load(tmp_path / "out")
    effects = measure_effects(results, ["mrr@10"])
    rows = list(csv.DictReader(io.StringIO(format_report(results, effects, style="csv"))))
    assert [row["data"] for row in rows] == ["plain", hazard]
    latex = format_report(results, effects, style="latex")
    assert sum(f"1 & {in_latex} & " in line for line in latex.splitlines()) == 2
    assert all(line.startswith(("%", "{}", "\\")) or not line for line in latex.splitlines())
    markdown = format_report(results, effects, style="markdown")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in table[:4]}) == 1


def test_the_command_writes_every_format_and_prints_text(out, capsys):
    assert main(["report", str(out), "--metric", "mrr@10", "hit_rate@1", "--test", "uber"]) == 0
    printed = capsys.readouterr().out
    assert "uber: hit_rate@1" in printed
    assert "facts" not in printed
    results = Results.load(out, ["uber"])
    effects = measure_effects(results, ["mrr@10", "hit_rate@1"])
    assert printed.strip() == format_report(results, effects, style="text").strip()
    for suffix, style in (("md", "markdown"), ("csv", "csv"), ("tex", "latex")):
        written = (out / "report" / f"report.{suffix}").read_text()
        assert written.strip() == format_report(results, effects, style=style).strip()
    assert main(["report", str(out), "--style", "markdown"]) == 0
    assert "| 1, chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--test", "lyft"], ("lyft", "uber", "facts")),
        (["--metric", "ndcg@3"], ("ndcg@3", "mrr@10", "hit_rate@1")),
    ],
)
def test_the_command_refuses_what_is_not_there(out, capsys, arguments, facts):
    assert main(["report", str(out), *arguments]) == 2
    assert names(capsys.readouterr().err, *facts)


def test_the_command_refuses_a_folder_without_results(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert names(capsys.readouterr().err, tmp_path, "grid.json")
    grid = write_grid(tmp_path / "out", {"uber": UBER})
    for kind in ("trained", "untrained"):
        for cell in grid.cells:
            if (cell.seed is None) == (kind == "untrained"):
                (grid.folder(cell) / RESULT).unlink()
        with pytest.raises(ValueError, match=naming(tmp_path / "out", "trained", "finished")):
            Results.load(tmp_path / "out")
