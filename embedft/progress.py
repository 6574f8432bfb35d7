"""One progress bar for all long work: what is done, rate, time left, on stderr.

Shown when stderr is a terminal. EMBEDFT_PROGRESS=0 silences it and EMBEDFT_PROGRESS=1 forces it, so does `show`.

    with progress_bar(len(texts), "encoding", unit="text") as bar:
        bar.update(32)
"""

import os
import sys

from tqdm import tqdm


def progress_bar(total: int | None, description: str, *, unit: str, show: bool | None = None, initial: int = 0) -> tqdm:
    """A tqdm bar on stderr. `show` None: as EMBEDFT_PROGRESS says, else whether stderr is a terminal."""
    if show is None:
        asked = os.environ.get("EMBEDFT_PROGRESS")
        show = sys.stderr.isatty() if asked is None else asked != "0"
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.2,
        leave=False,
    )
