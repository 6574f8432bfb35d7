"""The peak memory of a run.

peak_memory_bytes(embedder.device) / 2**30     # GiB
"""

import contextlib
import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device | str) -> int:
    """Peak memory so far, or since `reset_peak_memory`: allocated on a CUDA device, otherwise resident in this process.
    On MPS, which keeps no peak: what the driver holds now, which falls only when memory is released."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "linux":  # getrusage would also count the parent process's peak
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device | str) -> None:
    """Forgets the peak so far, where the system can: CUDA devices, and processes on Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # not allowed in some containers
            Path("/proc/self/clear_refs").write_text("5")
