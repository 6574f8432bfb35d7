"""`embedft store`: lists, verifies, repairs or prunes a store of embeddings.

embedft store vectors --verify
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..config import REQUIRED, check_at_most_one, option
from ..files import locked
from ..retrieval.tables import format_table
from .options import format_bytes

SHOWN_ROWS = 5  # damaged rows that --verify shows per space


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    store: str = option(REQUIRED, "folder created by another command's --store", metavar="DIR", positional=True)
    verify: bool = option(False, "check every row; exit code 1 if any is damaged")
    repair: bool = option(False, "drop damaged rows or a damaged database; texts are encoded again when needed")
    prune: list[str] | None = option(None, "remove these spaces, named as in the list", metavar="SPACE ...")
    prune_unused: float | None = option(None, "remove spaces and lists unused for DAYS days", metavar="DAYS", least=0)

    def __post_init__(self):
        check_at_most_one(self, "verify", "repair", "prune", "prune_unused")


def run(options: Options) -> int:
    """Verifies, repairs or prunes; without such an option, lists the spaces, and counts teachers' lists."""
    from ..encoders.database import DATABASE, DamagedDatabase, set_aside
    from ..encoders.store import LISTS, Store

    if not Path(options.store).is_dir():
        raise ValueError(f"{options.store}: no such folder")
    store = Store(options.store)
    if options.verify or options.repair:
        try:
            store.check_database()
        except DamagedDatabase:
            if not options.repair:
                raise
            path = store.folder / DATABASE
            print(f"{path}: damaged; set aside as {set_aside(path)}; all texts are computed again", file=sys.stderr)
    spaces, lists = store.spaces(), sorted((store.folder / LISTS).glob("*.jsonl"))
    if options.prune or options.prune_unused is not None:
        latest = time.time() - (options.prune_unused or 0) * 86_400
        unused = (name for name, found in spaces.items() if found.last_used < latest)
        names, before = list(dict.fromkeys(options.prune or unused)), store.num_bytes()
        store.prune(*names)
        removed = [] if options.prune else [path for path in lists if path.stat().st_mtime < latest]
        for path in removed:
            with locked(path.with_suffix(".lock")):
                path.unlink()
        freed = format_bytes(before - store.num_bytes())
        print(f"{store.folder}: removed {_counted(len(names), len(removed))}, {freed}")
        return 0
    if options.verify or options.repair:
        return max([_verify(store, name, repair=options.repair) for name in spaces], default=0)
    header, rows = ("space", "texts", "dim", "size", "last use", "role", "max_length", "model"), []
    for name, found in spaces.items():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.last_used))
        more = (str(found.space.description.get(key, "")) for key in ("role", "max_length", "model"))
        rows.append((name, f"{found.num_texts:,}", str(found.space.dim), format_bytes(found.num_bytes), used, *more))
    print(format_table(header, rows, style="text", num_left=len(header)))
    print(f"\n{store.folder}: {_counted(len(spaces), len(lists))}, {format_bytes(store.num_bytes())}")
    return 0


def _counted(num_spaces: int, num_lists: int) -> str:
    spaces = f"{num_spaces} space{'s' * (num_spaces != 1)}"
    return f"{spaces}, {num_lists} file{'s' * (num_lists != 1)} of a teacher's lists" if num_lists else spaces


def _verify(store, name: str, *, repair: bool) -> int:
    """Prints the state of a space and returns the exit code."""
    try:
        num_rows, damaged = store.verify(name, repair=repair)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if not len(damaged):
        print(f"{name}: {num_rows:,} rows, all intact")
        return 0
    shown = ", ".join(map(str, damaged[:SHOWN_ROWS])) + (", ..." if len(damaged) > SHOWN_ROWS else "")
    print(f"{name}: {len(damaged):,} of {num_rows:,} rows damaged{' and dropped' * repair}: {shown}")
    return 0 if repair else 1
