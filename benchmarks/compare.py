"""Compares two files of results, and marks what changed by more than noise.

    python -m benchmarks.compare old.json new.json

Each file is what `--json` of a script or `benchmarks.run` wrote. A row's time is its seconds or, if both files have the
same peer for it, the seconds relative to the peer's of the same alternation: that cancels what slows both down, such as
a busy neighbour. A row is marked if the ranges of its rounds do not overlap and the medians differ by more than
`--percent`. Without any change, the ranges of n rounds each are apart with a probability of 2 / C(2n, n): 1 in 10 for
three rounds, 1 in 126 for five. With fewer than three rounds nothing is marked. The rule does not know how much two
runs of the same code differ; to see that, compare two runs of the old code first. Peak memory, one figure per row, is
marked by `--percent` alone.
"""

import argparse
import math
import re
import statistics
from pathlib import Path
from typing import Any

from embedft.files import read_json
from embedft.retrieval.tables import format_table
from experiments.commandline import Parser, run

from .workers import ratios, spread

PERCENT, LEAST_ROUNDS = 5.0, 3
CONDITIONS = ("arguments", "versions", "hardware")
UNIMPORTANT = ("json", "rounds")  # arguments that may differ
VERSION = re.compile(r" v?\d[\w.+]*")

Rows = dict[tuple[str, ...], dict[str, Any]]


def read_results(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results in a file, and the scripts that failed. Raises `ValueError` for another kind of file."""
    content = read_json(path)
    if isinstance(content, dict) and "rows" in content:
        return [content], []
    if not isinstance(content, dict) or not isinstance(content.get("results"), list):
        raise ValueError(f"{path}: has neither rows nor results, expected a file of --json or benchmarks.run")
    return content["results"], content.get("failures", [])


def rows_of(results: list[dict[str, Any]]) -> Rows:
    """The rows by benchmark, case and, if there is one, the peer's name without its version."""
    rows = ((result["benchmark"], row["case"], row.get("peer"), row) for result in results for row in result["rows"])
    return {(benchmark, case, *([VERSION.sub("", peer)] if peer else [])): row for benchmark, case, peer, row in rows}


def differing_conditions(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """What differs between the two apart from the code, one line each, with the benchmarks that it concerns."""
    found: dict[str, list[str]] = {}
    before = {result["benchmark"]: result for result in old}
    for result in new:
        other = before.get(result["benchmark"], result)
        for part in CONDITIONS:
            was, now = (dict(x.get(part, {})) for x in (other, result))
            for key in sorted({*was, *now} - {*UNIMPORTANT}):
                if was.get(key) != now.get(key):
                    line = f"{part}: {key} was {was.get(key)}, is {now.get(key)}"
                    found.setdefault(line, []).append(result["benchmark"])
    return [f"{line} ({', '.join(names)})" for line, names in found.items()]


def times(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[float], list[float], str]:
    """The times of a row in both files, and what they are relative to ("": seconds)."""
    peer = new.get("peer")
    if peer and old.get("peer") == peer and old.get("peer_seconds") and new.get("peer_seconds"):
        return *(ratios(row["seconds"], row["peer_seconds"]) for row in (old, new)), peer
    return old.get("seconds") or [], new.get("seconds") or [], ""


def apart(old: list[float], new: list[float]) -> bool:
    """Whether the ranges do not overlap; False with fewer than three rounds."""
    enough = min(len(old), len(new)) >= LEAST_ROUNDS
    return enough and (min(new) > max(old) or max(new) < min(old))


def mark(old: list[float], new: list[float], percent: float) -> str:
    """ "slower" or "faster" for a change beyond noise, else ""."""
    change = statistics.median(new) / statistics.median(old)
    if not apart(old, new) or abs(change - 1) * 100 <= percent:
        return ""
    return "slower" if change > 1 else "faster"


def compare_row(name: tuple[str, ...], old: dict[str, Any], new: dict[str, Any], percent: float) -> list[str]:
    """A row of the table."""
    before, after, peer = times(old, new)
    cells, marks = ["", "", ""], []
    if before and after:
        middle = statistics.median(after) / statistics.median(before)
        between = f"{middle:.3f} [{min(after) / max(before):.3f}, {max(after) / min(before):.3f}]"
        cells, marks = [spread(before, 3), spread(after, 3), between], [mark(before, after, percent)]
        if min(len(before), len(after)) < LEAST_ROUNDS:
            marks = ["too few rounds"]
    bytes_before, bytes_after = old.get("peak_bytes"), new.get("peak_bytes")
    memory = bytes_after / bytes_before if bytes_before and bytes_after else math.nan
    if abs(memory - 1) * 100 > percent:
        marks.append(f"{'more' if memory > 1 else 'less'} memory")
    shown = "" if math.isnan(memory) else f"{memory:.2f}"
    return [": ".join(name), *cells, peer or "seconds", shown, ", ".join(filter(None, marks))]


def main(options: argparse.Namespace) -> None:
    (old, _), (new, failures) = map(read_results, (options.old, options.new))
    for line in differing_conditions(old, new):
        print(f"warning: {line}")
    for failure in failures:
        print(f"warning: {failure['benchmark']} failed: {failure['error']}")
    before, after = rows_of(old), rows_of(new)
    shared = [name for name in after if name in before]
    table = [compare_row(name, before[name], after[name], options.percent) for name in shared]
    print(format_table(["", "old", "new", "new / old", "time in, or of", "memory, new / old", ""], table))
    for names, which in ((before.keys() - after.keys(), "old"), (after.keys() - before.keys(), "new")):
        if names:
            print(f"only in the {which} file: {', '.join(': '.join(name) for name in sorted(names))}")
    timed = [times(before[name], after[name])[:2] for name in shared]
    rounds = [(len(a), len(b)) for a, b in timed if min(len(a), len(b)) >= LEAST_ROUNDS]
    by_chance = sum(2 / math.comb(a + b, a) for a, b in rounds)
    print(f"\nmedian [min, max]; marked: ranges apart, and medians by more than {options.percent:g}%;")
    print(f"of {len(rounds)} rows, {by_chance:.1f} would have such ranges by chance")


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="benchmarks.compare", description=__doc__.partition("\n")[0])
    found.add_argument("old", metavar="OLD", help="a file of results")
    found.add_argument("new", metavar="NEW", help="another")
    found.add_argument("--percent", type=float, default=PERCENT, help="smallest change that counts [%(default)s]")
    return found


if __name__ == "__main__":
    run(main, parser())
