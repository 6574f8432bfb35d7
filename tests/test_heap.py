"""heap.py: what is freed serves the next tensors, and goes back to the system afterwards."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from embedft.device import reusing_memory
from embedft.heap import kept

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
BLOCK = 24 << 20  # bytes: on the heap, and more than glibc keeps of itself when two are free


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def use_blocks(number: int) -> None:
    blocks = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(number)]
    assert all(block[-1] == 1 for block in blocks)


def test_freed_memory_serves_the_next_tensors():
    with kept():
        use_blocks(9)
        before = faults()
        for _ in range(3):
            use_blocks(8)
        assert faults() - before < BLOCK // resource.getpagesize()  # not the pages of even one of 24 blocks


def test_freed_memory_goes_back_afterwards():
    with reusing_memory(torch.device("cpu")):
        use_blocks(8)
        inside = resident_bytes()
    assert resident_bytes() < inside - 6 * BLOCK


def test_other_devices_keep_their_own():
    with reusing_memory(torch.device("cuda")):
        before = faults()
        use_blocks(8)
    assert faults() - before > 4 * BLOCK // resource.getpagesize()
