"""Progress on stderr, with rate and time left: a bar on a terminal, elsewhere a line every 30 seconds.

EMBEDFT_PROGRESS=0 silences it and EMBEDFT_PROGRESS=1 forces the bar; `show` overrides both.

    with progress_bar(len(texts), "encoding", unit="text") as bar:
        bar.update(32)
"""

import os
import sys

from tqdm import tqdm


class _Lines(tqdm):
    """A bar that prints each update on a new line, for logs."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # tqdm's "" would clear the bar
            print(self, file=self.fp, flush=True)


def progress_bar(
    total: int | None, description: str, *, unit: str, show: bool | None = None, initial: int = 0, line_seconds=30.0
) -> tqdm:
    """A tqdm bar on stderr that starts at `initial`; off a terminal, a line every `line_seconds` instead."""
    asked = os.environ.get("EMBEDFT_PROGRESS")
    common = {"total": total, "desc": description, "unit": unit, "initial": initial, "file": sys.stderr}
    if show is None and asked is None and not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt} ({unit}), {rate_fmt}, {remaining} left{postfix}"
        every = {"delay": line_seconds, "mininterval": line_seconds, "maxinterval": 2 * line_seconds, "miniters": 1}
        return _Lines(**common, **every, bar_format=form, leave=False)
    disable = asked == "0" if show is None else not show
    return tqdm(**common, disable=disable, dynamic_ncols=True, mininterval=0.2, leave=False)
