"""A grid of an ablation and its folder: points, seeds, and the cells that they make. Needs no torch.

    grid = Grid.load("runs/temperature")
    for cell in grid.cells: print(cell.point, cell.seed, grid.folder(cell))

A *point* gives every axis a value; `points[0]` is BASE, the configuration without any axis applied. A *cell* is a point
and a seed, or, with seed None, an untrained model: once for each model and way of evaluating.

grid.json          base, axes, points, seeds, tests, select, version, and the keys of the cells in order
cells/<key>/       cell.json, eval/<test>/, eval/validation/, result.json (last), failed.json, log.txt
                   eval/validation/<name>/ where validation has several datasets
                   eval/<test>/windows.jsonl where documents are searched in windows
runs/<run key>/    finetune's run folder, shared by the cells that differ in evaluation only
store/             vectors that several cells need: of frozen models, and of tuned ones that they search differently
report/            what `embedft report` wrote
"""

import contextlib
import copy
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import check_object, read_object, write_json

VERSION = 1
GRID, CELLS, RUNS, STORE = "grid.json", "cells", "runs", "store"
REPORT = "report"  # the folder of `embedft report`
WINDOWS = "windows.jsonl"  # in a report's folder: where in its document each question's best window is
CELL, EVAL, RESULT, FAILED, LOG, VALIDATION = "cell.json", "eval", "result.json", "failed.json", "log.txt", "validation"
MEANS, SUITE = "metrics.json", "suite.json"  # in the folder of a report, or of reports on several datasets
AVERAGE = "average"  # over the tests, in place of a test's name
Point = dict[str, Any]  # {dotted key: value}


@dataclass(frozen=True)
class Cell:
    """One model to train or not to train, and to evaluate."""

    key: str  # 16 hexadecimal digits of `digest`
    point: Point
    seed: int | None  # None: untrained
    config: dict[str, Any]  # every option of `embedft finetune` that says how to train, the seed and `evaluate`
    hashes: dict[str, str]  # SHA-256 of "code", "model", "train", "validation" and each test
    run: str | None  # the run folder's key; None: untrained

    def __str__(self) -> str:
        """The point and the seed as they are typed."""
        return f"{describe(self.point)} {'untrained' if self.seed is None else f'seed={self.seed}'}".strip()


@dataclass(frozen=True)
class Grid:
    """What was asked, and the cells that answer it."""

    base: dict[str, Any]  # complete, defaults included
    axes: dict[str, list[Any]]
    points: list[Point]
    seeds: list[int]
    tests: dict[str, str]  # {name: path}
    select: str  # the metric that chooses a point on validation; of one of several datasets: NAME/METRIC
    cells: list[Cell] = field(default_factory=list)
    out: Path = Path()

    @property
    def metric(self) -> str:
        """The metric of `select`, by which tests are measured, too."""
        return self.select.rpartition("/")[2]

    def folder(self, cell: Cell) -> Path:
        """Where a cell is."""
        return self.out / CELLS / cell.key

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell is finished, and what its table needs can be read."""
        return (self.folder(cell) / RESULT).exists() and self.damage(cell) is None

    def damage(self, cell: Cell) -> str | None:
        """What is wrong with the result of a finished cell, or with the means of its reports; None for others."""
        folder = self.folder(cell)
        try:
            if (folder / RESULT).exists():
                read_result(folder)
                for path in [folder / EVAL / name / MEANS for name in self.tests]:
                    read_means(path)
                for path in (folder / EVAL / VALIDATION).glob("**/*.json"):  # a suite's, too
                    read_means(path)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    @classmethod
    def load(cls, out: str | Path, *, damaged: dict[str, str] | None = None) -> "Grid":
        """Reads what `save` wrote. Raises `ValueError` for a folder without a grid, or one of another version, and for
        a damaged cell, unless `damaged` is there to take {key: what is wrong}."""
        found, cells = _read(Path(out)), []
        for key in found["cells"]:
            path = Path(out) / CELLS / key / CELL
            try:
                cells.append(Cell(**read_object(path)))
            except (OSError, TypeError, ValueError) as error:
                message = f"{path}: damaged cell ({error}); run `embedft ablate` again"
                if damaged is None:
                    raise ValueError(message) from None
                damaged[key] = message
        return cls(**found | {"cells": cells, "out": Path(out)})

    def save(self) -> None:
        """Writes every cell's cell.json, then grid.json; what is the same already stays untouched."""
        for cell in self.cells:
            _write_changed(self.folder(cell) / CELL, asdict(cell))
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("out", "cells")}
        _write_changed(self.out / GRID, {**found, "version": VERSION, "cells": [cell.key for cell in self.cells]})

    def check_extends(self) -> None:
        """Raises `ValueError` unless the folder is empty, or has a grid that this one has all points and seeds of."""
        if not (self.out / GRID).is_file():
            # Cells without a grid: a process was killed while it saved the first one, or a damaged one was removed.
            there = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
            if others := there - ({CELLS, RUNS, STORE, REPORT, ".lock"} if CELLS in there else {".lock"}):
                raise ValueError(f"{self.out}: has files but no grid ({min(others)}); choose another folder")
            return
        before = _read(self.out)
        other = f"{self.out}: holds another grid, whose"
        for name in ("base", "tests"):
            for key in before[name].keys() & getattr(self, name).keys():
                was, now = before[name][key], getattr(self, name)[key]
                if was != now:
                    raise ValueError(f"{other} {name} has {key} {was!r}, not {now!r}; choose another folder")
        if missing := [name for name in before["tests"] if name not in self.tests]:
            raise ValueError(f"{other} tests have {missing[0]!r}; choose another folder, or add it")
        if missing := [seed for seed in before["seeds"] if seed not in self.seeds]:
            raise ValueError(f"{other} seeds have {missing[0]}; choose another folder, or add it")
        there = {as_text(point) for point in self.points}
        if missing := [point for point in before["points"] if as_text(self.points[0] | point) not in there]:
            raise ValueError(f"{other} points have {describe(missing[0])}; choose another folder, or add it")


def _read(out: Path) -> dict[str, Any]:
    """The fields of a saved grid, with keys for cells."""
    path = out / GRID
    if not path.is_file():
        raise ValueError(f"{out}: has no {GRID}; expected the folder of an ablation")
    again = f"remove {path}, and the same `embedft ablate` writes it again"
    try:
        found = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from None
    version = found.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path}: version is {version!r}, expected {VERSION}; choose another folder for a new grid")
    wanted = {each.name for each in fields(Grid)} - {"out"}
    if wrong := sorted(wanted ^ found.keys()):
        kind = "missing" if wrong[0] in wanted else "unknown"
        raise ValueError(f"{path}: damaged grid: {wrong[0]} is {kind}; {again}")
    return found


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json in a cell's folder says. Raises `ValueError` if it is damaged."""
    found = read_object(path := folder / RESULT)
    seconds = check_object(found.get("seconds"), f"{path}: damaged: seconds")
    numbers = {name: seconds.get(name) for name in ("train", "evaluate")} | {"peak_bytes": found.get("peak_bytes")}
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise ValueError(f"{path}: damaged: {name} is {number!r}, expected a number")
    return found


def read_means(path: Path) -> dict[str, float]:
    """The means in a report's metrics.json or a suite's suite.json. Raises `ValueError` if it is damaged."""
    means = check_object(read_object(path).get("metrics"), f"{path}: damaged: metrics")
    if wrong := [name for name, mean in means.items() if not isinstance(mean, int | float)]:
        raise ValueError(f"{path}: damaged: {wrong[0]} is {means[wrong[0]]!r}, expected a number")
    return means


def _write_changed(path: Path, value: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        if read_object(path) == json.loads(json.dumps(value)):
            return
    write_json(path, value)


def as_text(value: Any) -> str:
    """One text for equal JSON values."""
    return json.dumps(value, sort_keys=True)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of JSON values."""
    return hashlib.sha256(as_text(parts).encode()).hexdigest()[:16]


def describe(point: Point) -> str:
    """A point as it is typed: "lr=2e-05 loss.temperature=0.05"."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in point.items())


def counted(number: int, noun: str) -> str:
    """A number of things: "1 point", "2 points"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def code_sha256() -> str:
    """The SHA-256 over the names and contents of all source files of embedft."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(content)};".encode() + content)
    return found.hexdigest()


def product(axes: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Every combination, the last axis varying fastest."""
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def sample(axes: Mapping[str, Sequence[Any]], number: int, *, seed: int = 0) -> list[Point]:
    """Different random points of the product, in the order drawn, so that more of them begin with the same ones.
    Raises `ValueError` for more points than there are."""
    sizes = [len(values) for values in axes.values()]
    if not 1 <= number <= math.prod(sizes):
        raise ValueError(f"sample is {number}, expected 1 to {math.prod(sizes)}, the points of the product")
    generator, drawn = random.Random(seed), {}
    while len(drawn) < number:
        drawn[tuple(map(generator.randrange, sizes))] = None
    return [{key: values[i] for (key, values), i in zip(axes.items(), place, strict=True)} for place in drawn]


def axes_of(points: Sequence[Point]) -> dict[str, list[Any]]:
    """The axes of a list of points: each key's different values, in order."""
    axes: dict[str, dict[str, Any]] = {}
    for point in points:
        for key, value in point.items():
            axes.setdefault(key, {}).setdefault(as_text(value), value)
    return {key: list(values.values()) for key, values in axes.items()}


def apply(config: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """A copy of the configuration with a point's values. Raises `ValueError` where a key leads into a plain value."""
    found = copy.deepcopy(dict(config))
    for key, value in point.items():
        *path, last = key.split(".")
        target = found
        for name in path:
            target = target.setdefault(name, {}) if isinstance(target, dict) else target
        if not isinstance(target, dict):
            raise ValueError(f"{key}: {'.'.join(path)} is {target!r}, which has no keys")
        target[last] = copy.deepcopy(value)
    return found


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config
