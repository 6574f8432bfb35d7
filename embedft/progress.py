"""Progress of long work, on stderr: a bar on a terminal, elsewhere a line every half minute; rate and time left.

EMBEDFT_PROGRESS=0 silences it, EMBEDFT_PROGRESS=1 forces the bar, and so does `show`.

    with progress_bar(len(texts), "encoding", unit="text") as bar:
        bar.update(32)
"""

import os
import sys

from tqdm import tqdm


class _Lines(tqdm):
    """A bar that writes a new line each time, for logs."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # tqdm's "" would clear the bar
            print(self, file=self.fp, flush=True)


def progress_bar(
    total: int | None, description: str, *, unit: str, show: bool | None = None, initial: int = 0, line_seconds=30.0
) -> tqdm:
    """A tqdm bar on stderr that starts at `initial`; or lines, the first after `line_seconds`."""
    asked = os.environ.get("EMBEDFT_PROGRESS")
    common = {"total": total, "desc": description, "unit": unit, "initial": initial, "file": sys.stderr}
    if show is None and asked is None and not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt} ({unit}), {rate_fmt}, {remaining} left{postfix}"
        every = {"delay": line_seconds, "mininterval": line_seconds, "maxinterval": 2 * line_seconds, "miniters": 1}
        return _Lines(**common, **every, bar_format=form, leave=False)
    disable = asked == "0" if show is None else not show
    return tqdm(**common, disable=disable, dynamic_ncols=True, mininterval=0.2, leave=False)
