"""grid.py: points, folders and keys of an ablation's cells."""

import json
from dataclasses import replace

import pytest
from naming import naming

from embedft.ablation import grid as grids
from embedft.ablation.grid import Cell, Grid, apply, axes_of, product, sample

AXES = {"lr": [1e-5, 2e-5], "loss.temperature": [0.02, 0.05, 0.1]}
BASE_POINT = {"lr": 5e-5, "loss.temperature": 0.05}


def make_grid(out, **changes) -> Grid:
    points = [BASE_POINT, *product(AXES)]
    cells = [Cell(f"{i:015x}{seed}", point, seed, {}, {}, None) for i, point in enumerate(points) for seed in (0, 1)]
    whole = Grid({"lr": 5e-5, "epochs": 1}, AXES, points, [0, 1], {"uber": "uber.json"}, "ndcg@10", cells, out)
    return replace(whole, **changes)


def test_a_product_varies_the_last_axis_fastest():
    assert [tuple(point.values()) for point in product(AXES)][:4] == [
        (1e-5, 0.02),
        (1e-5, 0.05),
        (1e-5, 0.1),
        (2e-5, 0.02),
    ]
    assert next(product(AXES)) == {"lr": 1e-5, "loss.temperature": 0.02}


def test_more_of_a_sample_begins_with_the_same_points():
    few, many, whole = (sample(AXES, number) for number in (2, 4, 6))
    assert few == many[:2]
    assert many == whole[:4]
    by_text = sorted(map(grids.as_text, whole))
    assert by_text == sorted(map(grids.as_text, product(AXES)))
    assert sample(AXES, 6, seed=1) != whole


@pytest.mark.parametrize("number", [0, 7])
def test_a_sample_has_between_one_and_all_points(number):
    with pytest.raises(ValueError, match=naming("sample", number, 1, 6)):
        sample(AXES, number)


def test_the_axes_of_a_list_of_points_are_the_values_in_it():
    """True and 1 are different values, though they are equal in Python."""
    assert axes_of([{"lr": 1, "mixed": True}, {"lr": 2}, {"lr": 1, "mixed": 1}]) == {"lr": [1, 2], "mixed": [True, 1]}


def test_a_point_changes_a_copy_of_the_configuration():
    config = {"lr": 1.0, "loss": {"name": "x"}}
    inner = {"loss.inner.name": "y", "lr": 2.0, "evaluate.dim": 4}
    expected = {"lr": 2.0, "loss": {"name": "x", "inner": {"name": "y"}}, "evaluate": {"dim": 4}}
    assert apply(config, inner) == expected
    assert config == {"lr": 1.0, "loss": {"name": "x"}}
    with pytest.raises(ValueError, match=naming("lr.x", "lr", 1.0)):
        apply(config, {"lr.x": 3})


def test_a_saved_grid_reads_back(tmp_path):
    grid = make_grid(tmp_path / "out")
    grid.save()
    assert Grid.load(tmp_path / "out") == grid
    assert grid.folder(grid.cells[3]) == tmp_path / "out" / "cells" / "0000000000000011"


def test_saving_the_same_again_touches_nothing(tmp_path):
    grid = make_grid(tmp_path)
    grid.save()
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.json")}
    assert len(before) == 1 + 14
    grid.save()
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*.json")} == before


def test_a_grid_may_gain_values_seeds_axes_and_tests(tmp_path):
    grid = make_grid(tmp_path)
    grid.check_extends()
    grid.save()
    grid.check_extends()
    more = [{**point, "epochs": epochs} for point in grid.points for epochs in (1, 2)]
    wider = replace(grid, points=more, seeds=[0, 1, 2], tests={**grid.tests, "scifact": "scifact"})
    wider.check_extends()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"base": {"lr": 1e-4}}, ("base", "lr", 5e-5, 1e-4)),
        ({"tests": {"uber": "other.json"}}, ("tests", "uber", "uber.json", "other.json")),
        ({"tests": {"lyft": "lyft.json"}}, ("tests", "uber")),
        ({"seeds": [1, 2]}, ("seeds", 0)),
        ({"points": [BASE_POINT]}, ("points", 'lr=1e-05 loss.temperature=0.02')),
    ],
)  # fmt: skip
def test_another_grid_is_refused(tmp_path, changes, facts):
    make_grid(tmp_path).save()
    with pytest.raises(ValueError, match=naming(tmp_path, *facts)):
        make_grid(tmp_path, **changes).check_extends()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=naming(tmp_path, "thesis.tex")):
        make_grid(tmp_path).check_extends()
    with pytest.raises(ValueError, match=naming(tmp_path, "grid.json")):
        Grid.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"version": 0}, ("version", 0, 1)),
        ({"version": None}, ("version", None, 1)),
        ({"seeds": None}, ("seeds",)),
        ({"color": "red"}, ("color",)),
    ],
)
def test_a_grid_of_another_version_or_damaged_is_refused(tmp_path, change, facts):
    grid = make_grid(tmp_path)
    grid.save()
    path = tmp_path / "grid.json"
    found = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    for call in (lambda: Grid.load(tmp_path), grid.check_extends):
        with pytest.raises(ValueError, match=naming(path, *facts)):
            call()


def test_a_damaged_cell_is_named_and_written_anew(tmp_path):
    grid = make_grid(tmp_path)
    grid.save()
    path = tmp_path / "cells" / "0000000000000011" / "cell.json"
    for text in ('{"key": "x"}', "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=naming(path)):
            Grid.load(tmp_path)
        grid.check_extends()
        grid.save()
        assert Grid.load(tmp_path) == grid


def test_the_hash_of_the_code_is_that_of_every_source_file(monkeypatch, tmp_path):
    """By hand: the names and contents of two files."""
    import hashlib

    for name, content in (("a.py", "x"), ("ablation/grid.py", "yz"), ("ablation/page.html", "no code")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(grids, "__file__", str(tmp_path / "ablation" / "grid.py"))
    assert grids.code_sha256() == hashlib.sha256(b"a.py 1;xablation/grid.py 2;yz").hexdigest()
