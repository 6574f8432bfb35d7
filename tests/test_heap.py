"""heap.py: what is freed serves the next tensors, and goes back to the system afterwards."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
BLOCKS, BLOCK = 8, 24 << 20  # bytes: on the heap, and more than glibc keeps of itself when three are free
# In a process of its own, whose heap is not in pieces yet. Prints how many bytes of new pages 16 rounds took after the
# first, and the resident memory inside and after the context.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from embedft.device import reusing_memory

page, blocks, block = resource.getpagesize(), int(sys.argv[2]), int(sys.argv[3])

def use_blocks():
    assert all(x[-1] == 1 for x in [torch.ones(block, dtype=torch.uint8) for _ in range(blocks)])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * page

with reusing_memory(torch.device(sys.argv[1])):
    use_blocks()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        use_blocks()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * page, resident())
print(resident())
"""


def used(device: str) -> list[int]:
    command = [sys.executable, "-c", SCRIPT, device, str(BLOCKS), str(BLOCK)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_freed_memory_serves_the_next_tensors_and_goes_back_afterwards():
    new_pages, inside, afterwards = used("cpu")
    assert new_pages < BLOCKS * BLOCK  # one round's, of 16
    assert afterwards < inside - 6 * BLOCK


def test_other_devices_keep_their_own():
    new_pages, *_ = used("cuda")
    assert new_pages > 1.5 * BLOCKS * BLOCK
