"""`embedft store`: what a store of embeddings holds, whether it is whole, and how it gets rid of what is not wanted.

The command is a pair of functions: one adds its arguments to a parser, one runs it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from ..encoders.store import Store

DAY_SECONDS = 86_400
# Damaged rows that `--verify` shows of a space.
SHOWN_ROWS = 5


def format_bytes(number: int) -> str:
    """A number of bytes with three digits, in powers of 1024: "1.46 GiB"."""
    value, unit = float(number), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{number} bytes" if unit == "bytes" else f"{value:.3g} {unit}"


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="DIR", help="folder that --store of another command made")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--verify", action="store_true", help="read everything; exit code 1 when a row is damaged")
    actions.add_argument("--repair", action="store_true", help="drop the damaged rows; their texts are computed again")
    actions.add_argument("--prune", metavar="SPACE", nargs="+", help="remove spaces, by the names that are listed")
    actions.add_argument("--prune-unused", type=float, metavar="DAYS", help="remove spaces not used for so many days")


def _store(options: argparse.Namespace) -> int:
    if not Path(options.store).is_dir():
        raise ValueError(f"{options.store}: no such folder")
    store = Store(options.store)
    if options.prune:
        _prune(store, list(dict.fromkeys(options.prune)))
        return 0
    if options.prune_unused is not None:
        if not options.prune_unused >= 0:
            raise ValueError(f"--prune-unused is {options.prune_unused:g}, expected 0 days or more")
        latest = time.time() - options.prune_unused * DAY_SECONDS
        _prune(store, [name for name, found in store.spaces().items() if found.last_used < latest])
        return 0
    if options.verify or options.repair:
        return max([_verify(store, name, repair=options.repair) for name in store.spaces()], default=0)
    return _list(store)


def _prune(store: Store, names: list[str]) -> None:
    before = store.num_bytes()
    store.prune(*names)
    print(f"{store.folder}: {len(names)} spaces removed, {format_bytes(before - store.num_bytes())}")


def _verify(store: Store, name: str, *, repair: bool) -> int:
    """Prints how a space is, and gives the exit code that it asks for."""
    try:
        num_rows, damaged = store.verify(name, repair=repair)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if not len(damaged):
        print(f"{name}: {num_rows:,} rows, all whole")
        return 0
    shown = ", ".join(map(str, damaged[:SHOWN_ROWS])) + (", ..." if len(damaged) > SHOWN_ROWS else "")
    state = "damaged and dropped" if repair else "damaged"
    print(f"{name}: {len(damaged):,} of {num_rows:,} rows {state}: {shown}")
    return 0 if repair else 1


def _list(store: Store) -> int:
    rows = [("space", "texts", "dim", "size", "last use", "role", "max_length", "model")]
    for name, found in store.spaces().items():
        words = found.space.description
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.last_used))
        told = (str(words.get(key, "")) for key in ("role", "max_length", "model"))
        rows.append((name, f"{found.num_texts:,}", str(found.space.dim), format_bytes(found.num_bytes), used, *told))
    widths = np.array([[len(cell) for cell in row] for row in rows]).max(axis=0)
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{store.folder}: {len(rows) - 1} spaces, {format_bytes(store.num_bytes())}")
    return 0


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {"store": (_add_store, _store, "list, verify or prune stored embeddings")}
