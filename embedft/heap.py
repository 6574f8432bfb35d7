"""The memory of this process, where tensors on the CPU are. What is done to the heap needs glibc, else nothing happens.

with kept():     # memory that is freed serves the next tensors
    train()
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

# Of mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 32 * 2**20  # bytes of a block on the heap, the most that glibc allows; larger ones have pages of their own
MOST_KEPT = 2**31 - 1  # bytes, of which an int holds no more


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """In this block, glibc keeps freed memory for the next tensors instead of returning the end of its heap to the
    system, which fills every new page with zeros (experiments/LOG.md, 2026-12-01, has what that costs). Afterwards,
    glibc keeps twice `LARGEST`, as it does by itself once a block of that size was freed."""
    _glibc("mallopt", MMAP_THRESHOLD, LARGEST)
    _glibc("mallopt", TRIM_THRESHOLD, MOST_KEPT)
    try:
        yield
    finally:
        _glibc("mallopt", TRIM_THRESHOLD, 2 * LARGEST)
        trim()


def trim() -> None:
    """Returns free memory to the system, also from between blocks in use."""
    _glibc("malloc_trim", 0)


def peak_resident_bytes() -> int:
    """Peak of the memory that the system gave this process, or since `reset_peak`."""
    if sys.platform == "linux":  # getrusage would also count the parent process's peak
        with contextlib.suppress(OSError, KeyError):  # not there in some sandboxes
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return int(status["VmHWM"].split()[0]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Forgets the peak so far, on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not allowed in some containers
            Path("/proc/self/clear_refs").write_text("5")


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            getattr(ctypes.CDLL(None), function)(*arguments)
