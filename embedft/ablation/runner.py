"""Runs the cells of a grid, each in a process of its own; several runners may share a folder.

    failed = run_grid(grid, devices=["cuda:0", "cuda:1"])

A cell's process inherits the lock on its folder, so the lock lasts as long as the work, even if the runner is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..commands.options import named_sources
from ..files import locked, read_object, write_json
from ..progress import progress_bar
from ..training.run_folder import DONE
from .grid import EVAL, FAILED, LOG, MEANS, RUNS, SUITE, VALIDATION, Cell, Grid, counted, read_means, read_result

POLL_SECONDS = 0.1


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen
    slot: int
    lock: contextlib.ExitStack


def start(folder: Path, device: str | None, lock: int, threads: int | None) -> subprocess.Popen:
    """Starts a cell's process, which inherits the descriptor `lock` and writes to the cell's log."""
    command = [sys.executable, "-m", "embedft.ablation.cell", str(folder), *(["--device", device] if device else [])]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment |= os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with open(folder / LOG, "ab") as log:
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": environment, "pass_fds": [lock]}
        return subprocess.Popen(command, **how)


def shard_of(cells: Sequence[Cell], number: int, num_shards: int) -> list[Cell]:
    """Share `number`, from 1, of the cells; those that share their training are in the same one."""
    places: dict[str, int] = {}
    for cell in cells:
        places.setdefault(cell.run or cell.key, len(places))
    return [cell for cell in cells if places[cell.run or cell.key] % num_shards == number - 1]


def expected_seconds(grid: Grid, cells: Sequence[Cell]) -> float | None:
    """How long cells take in one process, from the means of what was measured; None if nothing like it was.
    Training counts once for the cells that share it, and not if it is done."""
    training: dict[str, float] = {}
    evaluating: dict[bool, list[float]] = {True: [], False: []}
    for cell in filter(grid.is_done, grid.cells):
        seconds = read_result(grid.folder(cell))["seconds"]
        evaluating[cell.run is None].append(seconds["evaluate"])
        if cell.run:
            training[cell.run] = seconds["train"]
    to_train = {cell.run for cell in cells if cell.run and not (grid.out / RUNS / cell.run / DONE).exists()}
    if any(not evaluating[cell.run is None] for cell in cells) or (to_train and not training):
        return None
    found = sum(sum(evaluating[cell.run is None]) / len(evaluating[cell.run is None]) for cell in cells)
    return found + (len(to_train) * sum(training.values()) / len(training) if to_train else 0.0)


def run_grid(
    grid: Grid,
    *,
    devices: Sequence[str | None] = (None,),
    workers: int = 1,
    shard: tuple[int, int] = (1, 1),
    on_row: Callable[[str], object] = print,
) -> dict[str, str]:
    """Runs what is not finished, and returns {folder of a failed cell: why}.

    Args:
        devices: each gets `workers` cells at a time.
        shard: (number, of how many): only that share of the cells.
        on_row: gets the lines of the table, one as each cell finishes.

    A cell that fails costs only itself; it is tried again on the next call. Cells that another runner works on are left
    to it, and taken over if it is killed. `KeyboardInterrupt` ends the running cells; the next call resumes them."""
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    return _Runner(grid, list(devices) * workers, shard_of(grid.cells, *shard), on_row).run()


class _Runner:
    def __init__(self, grid: Grid, slots: list[str | None], cells: list[Cell], on_row: Callable[[str], object]):
        self.grid, self.slots, self.cells, self.on_row = grid, slots, cells, on_row
        self.threads = max(1, (os.cpu_count() or 1) // len(slots)) if len(slots) > 1 else None
        self.failed_before = {cell.key: self._failure(cell) for cell in cells}
        self.failed: dict[str, str] = {}
        self.running: list[_Running] = []

    def run(self) -> dict[str, str]:
        """Runs until every cell has finished or failed."""
        waiting, told = list(self.cells), False
        finished = [cell for cell in waiting if self.grid.is_done(cell)]
        self._print_table(finished)
        bar = progress_bar(len(waiting), "cells", unit="cell", initial=len(finished))
        waiting = [cell for cell in waiting if cell not in finished]
        try:
            while waiting or self.running:
                ended = self._ended()
                for cell in list(waiting):
                    if len(self.running) == len(self.slots):
                        break
                    if self.grid.is_done(cell) or self._failed_elsewhere(cell):
                        ended.append(cell)  # another runner's
                        waiting.remove(cell)
                    elif self._begin(cell):
                        waiting.remove(cell)
                for cell in ended:
                    bar.clear()
                    self._print_row(cell)
                    bar.update()
                if waiting and not self.running and not told:
                    told = True
                    held = counted(len(waiting), "cell")
                    print(f"{self.grid.out}: waiting for {held} that another runner has", file=sys.stderr)
                time.sleep(POLL_SECONDS)
        finally:
            self._stop()
            bar.close()
        return self.failed

    def _failure(self, cell: Cell) -> dict | None:
        path = self.grid.folder(cell) / FAILED
        with contextlib.suppress(OSError, ValueError):  # another runner may remove it
            return read_object(path) if path.exists() else None

    def _failed_elsewhere(self, cell: Cell) -> bool:
        found = self._failure(cell)
        if found is None or found == self.failed_before[cell.key]:
            return False
        self.failed[str(self.grid.folder(cell))] = found["error"]
        return True

    def _begin(self, cell: Cell) -> bool:
        """Starts a cell, unless its training is running already, or another process has it."""
        if cell.run and cell.run in {each.cell.run for each in self.running}:
            return False
        folder, lock = self.grid.folder(cell), contextlib.ExitStack()
        try:
            descriptor = lock.enter_context(locked(folder / ".lock"))
        except ValueError:
            return False
        if self.grid.is_done(cell) or self._failed_elsewhere(cell):  # since it was looked at
            lock.close()
            return False
        (folder / FAILED).unlink(missing_ok=True)
        slot = min(set(range(len(self.slots))) - {each.slot for each in self.running})
        process = start(folder, self.slots[slot], descriptor, self.threads)
        self.running.append(_Running(cell, process, slot, lock))
        return True

    def _ended(self) -> list[Cell]:
        """The cells whose processes have ended; records those that failed."""
        ended = [each for each in self.running if each.process.poll() is not None]
        for each in ended:
            code = each.process.returncode
            if code == -signal.SIGINT:  # Ctrl-C reached it first
                raise KeyboardInterrupt
            if code or not self.grid.is_done(each.cell):
                self._fail(each.cell, code)
            self.running.remove(each)
            each.lock.close()
        return [each.cell for each in ended]

    def _fail(self, cell: Cell, code: int) -> None:
        folder = self.grid.folder(cell)
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        error = f"killed by {signal.Signals(-code).name}" if code < 0 else last.strip() or f"exit code {code}"
        self.failed[str(folder)] = error
        when = datetime.now(timezone.utc).isoformat()
        with contextlib.suppress(OSError):  # a full disk may be why it failed
            write_json(folder / FAILED, {"error": error, "log": LOG, "when": when})

    def _stop(self) -> None:
        """Ends the running cells' processes, and only then gives up their locks."""
        for each in self.running:
            each.process.terminate()
        for each in self.running:
            each.process.wait()
            each.lock.close()

    def _print_table(self, finished: list[Cell]) -> None:
        names, validation = list(self.grid.tests), self.grid.base.get(VALIDATION)
        if validation:
            several = named_sources(validation) if isinstance(validation, list) else ()
            names += [VALIDATION, *(f"{VALIDATION}/{name}" for name in several)]
        self.names, self.widths = names, [max(len(name), 8) for name in names]
        self.width = max((len(str(cell)) for cell in self.cells), default=0)
        columns = "  ".join(name.rjust(width) for name, width in zip(self.names, self.widths, strict=True))
        self.on_row(f"{self.grid.select.ljust(self.width)}  {columns}  {'seconds':>8}")
        for cell in finished:
            self._print_row(cell)

    def _print_row(self, cell: Cell) -> None:
        folder, label = self.grid.folder(cell), str(cell).ljust(self.width)
        if not self.grid.is_done(cell):
            return self.on_row(f"{label}  failed: {self.failed[str(folder)]}")
        columns = "  ".join(map(self._mean, [folder / EVAL / name for name in self.names], self.widths))
        seconds = sum(read_result(folder)["seconds"].values())
        return self.on_row(f"{label}  {columns}  {seconds:>8.1f}")

    def _mean(self, report: Path, width: int) -> str:
        files = [report / name for name in (SUITE, MEANS) if (report / name).exists()]  # a point may have no validation
        metrics = read_means(files[0]) if files else {}
        value = metrics.get(self.grid.select, metrics.get(self.grid.metric))
        return ("" if value is None else f"{value:.4f}").rjust(width)
