"""What an ablation has found so far, read from its folder alone: the finished cells, and why the others are missing.

results = Results.load("runs/temperature")
for seed, cell in results.of_point(results.grid.points[0]).items(): print(seed, cell.reports["uber"].metrics)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_jsonl, read_object
from ..retrieval.report import Report
from ..retrieval.suite import Suite, load_reports
from .grid import (
    CELLS,
    EVAL,
    FAILED,
    LOG,
    RESULT,
    VALIDATION,
    WINDOWS,
    Cell,
    Grid,
    Point,
    as_text,
    counted,
    describe,
    read_result,
    value_at,
)

WINDOW = {"query_id": str, "document_id": str, "start": int, "end": int}  # a line of windows.jsonl


@dataclass(frozen=True, eq=False)
class FinishedCell:
    """A cell with its reports and what it took."""

    cell: Cell
    reports: dict[str, Report | Suite]  # of each test, and of "validation" where there is one: a suite of several
    windows: dict[str, dict[str, dict[str, Any]]]  # of each of these: {question id: its best window}
    train_seconds: float
    peak_bytes: int
    best_step: int | None = None  # whose weights training kept; 0: the base's; None: without validation or training


@dataclass(frozen=True, eq=False)
class Results:
    """A grid and its finished cells."""

    grid: Grid
    finished: list[FinishedCell]
    missing: list[str]  # one line for each cell that is not covered: which one, and why

    @classmethod
    def load(cls, out: str | Path, tests: Sequence[str] = ()) -> "Results":
        """Reads a grid's folder: all its tests, or those named. A cell that is unfinished, failed or damaged is in
        `missing`. Raises `ValueError` for an unknown test, or a folder without a grid or a trained cell."""
        damaged: dict[str, str] = {}
        grid = Grid.load(out, damaged=damaged)
        if unknown := [name for name in tests if name not in grid.tests]:
            raise ValueError(f"{out}: has no test {unknown[0]!r}; its tests are {', '.join(grid.tests)}")
        wanted, finished, missing = list(tests) or list(grid.tests), [], [*damaged.values()]
        for cell in grid.cells:
            try:
                finished.append(_read(cell, grid.folder(cell), wanted))
            except (OSError, ValueError) as error:
                result = grid.folder(cell) / RESULT
                again = f"; remove {result}, and `embedft ablate` replaces what is damaged" if result.exists() else ""
                missing.append(f"{name_of(cell)}: {error}{again}")
        if all(one.cell.seed is None for one in finished):
            raise ValueError(f"{out}: no trained cell is finished; {missing[0] if missing else 'the grid has none'}")
        keys = {cell.key for cell in grid.cells} | damaged.keys()
        others = [path for path in (grid.out / CELLS).iterdir() if path.name not in keys and (path / RESULT).exists()]
        if others:
            missing.append(f"{counted(len(others), 'finished cell')} of other settings, data or code: not in this grid")
        return cls(grid, finished, missing)

    def of_point(self, point: Point) -> dict[int, FinishedCell]:
        """{seed: the point's finished cell}."""
        text = as_text(point)
        return {one.cell.seed: one for one in self.finished if one.cell.seed is not None and _text(one.cell) == text}

    def untrained(self, point: Point) -> FinishedCell | None:
        """The point's model before training, evaluated in the same way."""
        wanted = {_start(cell) for cell in self.grid.cells if cell.seed is not None and _text(cell) == as_text(point)}
        return next((one for one in self.finished if one.cell.seed is None and _start(one.cell) in wanted), None)


def name_of(cell: Cell) -> str:
    """A cell in messages."""
    return f"{describe(cell.point)} {'untrained' if cell.seed is None else f'seed {cell.seed}'}".strip()


def _text(cell: Cell) -> str:
    return as_text(cell.point)


def _start(cell: Cell) -> str:
    """What an untrained cell shares with the trained ones that it is compared with: model and evaluation, and for
    principal components the training data that they are of."""
    how = cell.config.get("evaluate")
    return as_text([cell.hashes.get("model"), how, cell.hashes.get("train") if value_at(how, "pca") else None])


def _read(cell: Cell, folder: Path, tests: Sequence[str]) -> FinishedCell:
    """The cell, if it is finished; else raises `ValueError` with the reason."""
    if not (folder / RESULT).is_file():
        if not (folder / FAILED).is_file():
            raise ValueError("not finished")
        raise ValueError(f"failed: {read_object(folder / FAILED).get('error')} ({folder / LOG})")
    found = read_result(folder)
    names = [*tests, *([VALIDATION] if (folder / EVAL / VALIDATION).is_dir() else [])]
    reports = {name: load_reports(folder / EVAL / name) for name in names}
    windows = {name: read_windows(folder / EVAL / name) for name in names}
    return FinishedCell(cell, reports, windows, found["seconds"]["train"], found["peak_bytes"], found.get("best_step"))


def read_windows(folder: Path) -> dict[str, dict[str, Any]]:
    """{question id: document_id, start and end of its best window}, where a report's folder has them."""
    path, found = folder / WINDOWS, {}
    for number, line in read_jsonl(path) if path.is_file() else ():
        values = [line.get(name) for name in WINDOW] if isinstance(line, dict) else []
        if list(map(type, values)) != list(WINDOW.values()):
            raise ValueError(f"{path} line {number}: damaged: expected {', '.join(WINDOW)}")
        found[line["query_id"]] = line
    return found
