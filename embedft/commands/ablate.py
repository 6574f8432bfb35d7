"""`embedft ablate`: fine-tunes and evaluates every cell of a grid of settings and seeds, each in its own process.

embedft ablate sentence-transformers/all-MiniLM-L6-v2 train.csv --validation val.csv \\
    --test uber=uber.json scifact=beir/scifact --axis loss.temperature 0.02 0.05 0.1 --axis lr 1e-5 2e-5 \\
    --seeds 0 1 2 --out runs/temperature
"""

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

from ..ablation import runner
from ..ablation.grid import FAILED, Cell, Grid, counted, sample
from ..ablation.plan import plan
from ..ablation.settings import OF_THE_RUNNER
from ..config import changed, check_at_most_one, option, part
from ..device import find_device
from ..files import check_writable, locked, read_json
from . import finetune
from .options import named_sources


@dataclass(frozen=True, kw_only=True)
class Run:
    """Cells at a time."""

    dry_run: bool = option(False, "list the cells and, once one has been measured, the expected time; run nothing")
    workers: int = option(1, "cells at a time, on each device", least=1)
    devices: list[str] | None = option(None, "devices to share the cells: cuda:0 cuda:1 [--device]")
    shard: str | None = option(None, "run one of N shares of the cells, K from 1 to N", metavar="K/N")

    @property
    def share(self) -> tuple[int, int]:
        """(K, N), or (1, 1) for all cells."""
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", self.shard or "1/1")
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard is {self.shard!r}, expected K/N, such as 1/4, with K from 1 to N")
        return int(found[1]), int(found[2])


@dataclass(frozen=True, kw_only=True)
class Options(Run, finetune.Options):
    out: str = option(finetune.REQUIRED, "folder of the grid, which may gain values and seeds later", metavar="DIR")
    test: list[str] = option(finetune.REQUIRED, "test sets that each cell is measured on", metavar="[NAME=]DATA ...")
    axis: list[list[Any]] = option(
        [], "an option of finetune, or evaluate.KEY, and its values", metavar="KEY VALUE ..."
    )
    seeds: list[int] = option([0, 1, 2], "seeds that each point of the grid is trained with")
    evaluate: dict[str, Any] = option(
        {}, "how to search: passages, dim, pca, precision, dtype, fuse_weight, bm25_ngram, bm25_k1, bm25_b"
    )
    adapter: dict[str, Any] = option(
        {}, "fit an adapter on the frozen model instead: kind, side, lr, ... of its command"
    )
    sample: int | None = option(None, "only N random points of the product of the axes", least=1)
    points: str | None = option(None, "JSON list of points, {KEY: VALUE, ...}, in place of --axis", metavar="FILE")

    def __post_init__(self):
        super().__post_init__()
        if wrong := [axis for axis in self.axis if not axis or not isinstance(axis[0], str)]:
            raise ValueError(f"axis is {wrong[0]}, expected a key and its values")
        check_at_most_one(self, "axis", "points")
        check_at_most_one(self, "sample", "points")
        check_at_most_one(self, "device", "devices")
        if given := changed(self, ["seed", "overwrite", "resume", "store", "log"]):
            instead = {"--seed": "use --seeds", "--resume": "the same command continues"}
            raise ValueError(f"{given[0]} does not work here; {instead.get(given[0], 'cells share DIR/store')}")
        _ = self.share


epilog = finetune.epilog


def run(options: Options) -> int:
    """Runs the cells; 1 if some failed."""
    axes, points = {}, None
    for key, *values in options.axis:
        if key in axes:
            raise ValueError(f"--axis {key} is given twice")
        axes[key] = values
    if options.points:
        points = read_json(options.points)
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            raise ValueError(f'{options.points}: expected a list of objects, such as [{{"lr": 1e-5}}]')
    if options.sample:
        points = sample(axes, options.sample)
    left_out = (*OF_THE_RUNNER, "seed")
    base = {name: x for name, x in asdict(part(options, finetune.Options)).items() if name not in left_out}
    how = {"axes": axes, "points": points, "tests": named_sources(options.test), "seeds": options.seeds}
    base |= {"evaluate": options.evaluate, "adapter": options.adapter}
    return run_plan(base, options.out, how, options, options.device)


def _summary(grid: Grid, cells: list[Cell], num_slots: int) -> str:
    """How many cells there are, and how long those left may take."""
    left = [cell for cell in cells if not grid.is_done(cell)]
    untrained = sum(cell.seed is None for cell in grid.cells)
    found = f"{counted(len(grid.points), 'point')} by {counted(len(grid.seeds), 'seed')} and {untrained} untrained: "
    found += counted(len(grid.cells), "cell")
    found += f", {len(cells)} of them in this shard" if len(cells) < len(grid.cells) else ""
    found += f", {len(left)} to do"
    seconds = runner.expected_seconds(grid, left)
    minutes = "" if seconds is None or not left else f", about {seconds / 60 / min(num_slots, len(left)):.1f} minutes"
    return f"{grid.out}: {found}{minutes}"


def run_plan(base: dict[str, Any], out: str, how: dict[str, Any], options: Run, device: str | None = None) -> int:
    """Plans a grid (`how`: arguments of `plan`), and lists or runs its cells; 1 if some failed."""
    check_writable(out)
    devices = options.devices or [device]
    for name in filter(None, devices):
        find_device(name)  # raises for one that is not here
    grid = plan(base, out, **how)
    grid.check_extends()
    cells = runner.shard_of(grid.cells, *options.share)
    for cell in cells:
        if damage := grid.damage(cell):
            print(f"{damage}; its cell is to do: what is damaged is replaced, what is not stays", file=sys.stderr)
    print(_summary(grid, cells, len(devices) * options.workers), file=sys.stderr)
    if options.dry_run:
        for cell in cells:
            state = "finished" if grid.is_done(cell) else "failed" if (grid.folder(cell) / FAILED).exists() else "to do"
            print(f"{state:<8}  {cell.key}  {cell}")
        return 0
    with locked(grid.out / ".lock", wait=lambda holder: None):
        grid.check_extends()
        grid.save()
    try:
        failed = runner.run_grid(grid, devices=devices, workers=options.workers, shard=options.share)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{out}: the same command continues") from None
    for folder, error in failed.items():
        print(f"{folder}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0
