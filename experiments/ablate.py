"""Runs a grid file: the cells of `embedft ablate`, with settings that a script can compute.

    python -m experiments.ablate experiments/grids/temperature.py

A grid file sets BASE (settings of `embedft finetune` and, under "evaluate", of evaluation), TESTS, SEEDS, and AXES or
POINTS. The cells go to runs/ablations/<name of the file>; the same command continues, and `embedft report` reports.
--set changes BASE: `--set precision=bfloat16 evaluate.dtype=bfloat16` is faster on CPUs with AMX.
"""

import argparse
import runpy
import sys
from pathlib import Path

from embedft.commands.ablate import Run, run_plan
from embedft.config import insert
from embedft.data.dataset import RetrievalDataset

from .commandline import BASE, make_parser, run

NAMES = ("BASE", "TESTS", "SEEDS", "AXES", "POINTS")
OUT = Path("runs/ablations")


def main(options: argparse.Namespace) -> None:
    path = Path(options.grid)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a grid file such as experiments/grids/temperature.py")
    found = {name: value for name, value in runpy.run_path(str(path)).items() if name in NAMES}
    if missing := [name for name in NAMES[:3] if name not in found]:
        raise ValueError(f"{path}: sets no {missing[0]}")
    base = {"model": BASE, **found["BASE"]} | ({"model": options.base} if options.base != BASE else {})
    for given in options.set:
        if "=" not in given:
            raise ValueError(f"--set {given}: expected KEY=VALUE")
        base = insert(base, given, "--set")
    how = {"tests": found["TESTS"], "seeds": found["SEEDS"], "axes": found.get("AXES"), "points": found.get("POINTS")}
    names = ("dry_run", "workers", "devices", "shard")
    sys.exit(run_plan(base, options.out or str(OUT / path.stem), how, Run(**{n: getattr(options, n) for n in names})))


def halves(path: str | Path, share: float = 0.8, *, seed: int = 0) -> tuple[str, str]:
    """Files with the two parts of a dataset, without common documents, in runs/ablations/data; made once."""
    parts = [OUT / "data" / f"{Path(path).stem}-{share}-{seed}-{name}.json" for name in ("train", "validation")]
    if not all(part.exists() for part in parts):
        for part, dataset in zip(parts, RetrievalDataset.load(path).split(share, seed=seed), strict=True):
            dataset.save(part)
    return str(parts[0]), str(parts[1])


if __name__ == "__main__":
    parser = make_parser("experiments.ablate", __doc__)
    parser.add_argument("grid", metavar="FILE", help="experiments/grids/NAME.py")
    parser.add_argument("--out", metavar="DIR", help=f"folder of the grid [{OUT}/NAME]")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings in BASE")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and, if known, the expected time")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time, on each device [1]")
    parser.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="devices to share the cells [the best available]"
    )
    parser.add_argument("--shard", metavar="K/N", help="run one of N shares of the cells, K from 1 to N")
    run(main, parser)
