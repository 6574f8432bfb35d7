"""device.py: seeds and random states; a device that is not there is a user's error. Kernels are tested where used."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from naming import naming

from embedft import device as devices
from embedft import load_embedder
from embedft.device import (
    default_device,
    describe,
    deterministic,
    find_device,
    has_float64,
    has_packed_attention,
    peak_memory_bytes,
    random_state,
    release_between_batches,
    release_memory,
    seeded,
    set_random_state,
    use_tf32,
)
from embedft.encoders.fingerprint import precision

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_seeded_draws_the_same_and_gives_the_callers_state_back():
    torch.manual_seed(5)
    expected = torch.rand(4)
    before = torch.get_rng_state()
    with seeded(5, CPU):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), seeded(5, CPU):
        torch.rand(1 // 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_state_is_a_place_to_come_back_to():
    state = random_state(CPU)
    drawn = torch.rand(4)
    torch.rand(3)
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_the_random_state_is_of_the_device_itself_not_of_the_current_one(name, monkeypatch):
    device, states = torch.device(name), {"cuda:0": 0, "cuda:1": 1, "mps": 2}
    module = SimpleNamespace(
        get_rng_state=lambda of: torch.tensor(states[str(of)]),
        set_rng_state=lambda state, of: states.update({str(of): state.item()}),
    )
    monkeypatch.setattr(torch, "get_device_module", {device: module}.__getitem__)
    state, before = random_state(device), dict(states)
    assert state.keys() == {"cpu", device.type}
    states[name] = 7
    set_random_state(state, device)
    assert states == before
    set_random_state({"cpu": state["cpu"]}, device)  # saved on a machine without the device
    assert states == before


def test_find_device():
    assert find_device("cpu") == CPU
    for name in ("toaster", "", "cpu:x", "cuda:99"):
        with pytest.raises(ValueError, match=naming("device", f"'{name}'", "cpu")) as caught:
            find_device(name)
        assert "\n" not in str(caught.value)


def test_the_default_is_a_device_that_is_there():
    assert find_device(default_device().type).type == default_device().type


def test_the_packed_kernel_is_for_half_precision_on_cuda():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not has_packed_attention(CPU, dtype)
    assert not has_packed_attention(torch.device("cuda"), torch.float32)


def test_what_a_report_says_of_the_machine():
    assert describe(CPU).endswith(f"{torch.get_num_threads()} threads")
    before = peak_memory_bytes(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert 32 << 20 < peak_memory_bytes(CPU) < 1 << 40
    assert peak_memory_bytes(CPU) >= before
    assert len(block) == 64 << 20


@pytest.mark.parametrize("status", ["Name:\tpython\nVmRSS:\t 7 kB\n", None])
def test_peak_memory_without_that_of_linux(monkeypatch, status):
    """Some sandboxes lack the figure, or the file; training, which records it, goes on."""

    def read(path):
        if status is None:
            raise FileNotFoundError(path)
        return status

    monkeypatch.setattr(Path, "read_text", read)
    assert 32 << 20 < peak_memory_bytes(CPU) < 1 << 40


def test_peak_memory_of_mps_is_what_its_driver_holds(monkeypatch):
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    assert peak_memory_bytes("mps") == 7


def test_peak_memory_is_of_this_process_alone():
    """A process started by one that holds 1.5 GiB does not count these."""
    held = torch.ones(3 << 29, dtype=torch.uint8)
    code = "import torch; from embedft.device import *; print(peak_memory_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 100 << 20 < int(done.stdout) < len(held), done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [torch.ones(1 << 18, dtype=torch.uint8) for _ in range(400)]  # 100 MiB below glibc's mmap threshold
    keep = blocks[-1]
    del blocks
    before = resident_bytes()
    release_memory(CPU)
    assert resident_bytes() < before or before < 100 << 20
    assert keep.sum() == 1 << 18


def test_memory_of_mps_is_released_between_batches_too(monkeypatch, tiny_bert):
    released = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append(1))
    for name, expected in (("mps", 2), ("cuda", 2), ("cpu", 2)):
        release_memory(torch.device(name))
        release_between_batches(torch.device(name))
        assert len(released) == expected
    embedder = load_embedder(tiny_bert, device="cpu")
    monkeypatch.setattr(devices, "release_between_batches", lambda device: released.append(device))
    embedder.encode(["a", "b c", "d"], batch_tokens=4)
    assert released[2:] == [CPU] * 3


def test_what_falls_back_to_the_cpu_on_mps_is_an_error():
    """PyTorch moves what MPS lacks to the CPU, and says so once, only if this variable is set; nothing here sets it."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "embedft").rglob("*.py")]
    assert len(sources) > 50
    assert not any("PYTORCH_ENABLE_MPS_FALLBACK" in source for source in sources)


def test_tf32_is_for_cuda():
    """A setting of torch's, and part of the fingerprints of what is computed with it."""
    before, products = precision(torch.device("cuda")), torch.backends.cuda.matmul.fp32_precision
    for device in (CPU, torch.device("mps")):
        with pytest.raises(ValueError, match=naming("tf32", device.type, "CUDA")):
            use_tf32(device)
    assert precision(torch.device("cuda")) == before
    try:
        use_tf32(torch.device("cuda"))
        assert "tf32" in precision(torch.device("cuda"))
        assert precision(torch.device("cuda")) != before
    finally:
        torch.backends.cuda.matmul.fp32_precision = products


def determinism() -> tuple:
    settings = torch.utils.deterministic.fill_uninitialized_memory, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return torch.are_deterministic_algorithms_enabled(), *settings


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_determinism_is_a_setting_for_a_while(monkeypatch, workspace):
    """torch knows which kernels are deterministic, so its settings are what can be tested without a GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace or "")
    if workspace is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = determinism()
    with deterministic(torch.device("cuda")):
        assert determinism() == (True, False, workspace or ":4096:8")
    assert determinism() == before == (False, True, workspace)
    with pytest.raises(ZeroDivisionError), deterministic(torch.device("cuda")):
        torch.rand(1 // 0)
    assert determinism() == before
    for device, enabled in ((CPU, True), (torch.device("cuda"), False)):
        with deterministic(device, enabled):
            assert determinism() == before


def test_determinism_names_the_operation_that_prevents_it():
    """Two values for one place: torch has no order for them, on any device."""
    x, places = torch.zeros(3), torch.tensor([1, 1])
    with pytest.raises(ValueError, match=naming("deterministic", "put_")), deterministic(torch.device("cuda")):
        x.put_(places, torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match=naming("size")), deterministic(torch.device("cuda")):
        x @ torch.zeros(2)


def test_cublas_that_was_used_before_is_named(monkeypatch):
    """torch reads the variable once, so setting it then is too late; the words are torch's."""
    variable = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    text = f"... this operation is not deterministic because it uses CuBLAS. You must set {variable}=:4096:8 or ..."
    expected = pytest.raises(ValueError, match=naming("deterministic", f"{variable}=:4096:8", "Python"))
    with expected, deterministic(torch.device("cuda")):
        raise RuntimeError(text)
    assert variable not in os.environ


def test_float64_is_everywhere_but_on_mps():
    assert has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cuda"))
    assert not has_float64(torch.device("mps"))


# Moving tensors. What CUDA would do is tried on the CPU, where a copy is the same without being asynchronous.


def mixed_tensors() -> list[torch.Tensor]:
    return [
        torch.arange(7),
        torch.arange(5, dtype=torch.int32),
        torch.tensor([True, False, True]),
        torch.empty(0, 3),
        torch.tensor(2.5),
        torch.arange(12.0).reshape(3, 4).T,
        torch.rand(3, 2, dtype=torch.float64),
    ]


def test_tensors_that_travel_as_one_arrive_as_they_were():
    tensors = mixed_tensors()
    found = devices._transfer_as_one(tensors, CPU, pin_memory=False)
    for ours, theirs in zip(found, tensors, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr() or not theirs.numel()
    assert devices._transfer_as_one([], CPU, pin_memory=False) == []


def test_only_what_goes_from_the_cpu_to_cuda_travels_as_one(monkeypatch):
    tensors, calls = mixed_tensors(), []
    monkeypatch.setattr(devices, "_transfer_as_one", lambda *a, **options: calls.append((a, options)) or "moved")
    assert devices.transfer(tensors, "cuda:0") == "moved"
    assert calls == [((tensors, torch.device("cuda:0")), {"pin_memory": True})]
    assert all(a is b for a, b in zip(devices.transfer(tensors, "cpu"), tensors, strict=True))
    assert [x.device.type for x in devices.transfer(tensors, "meta")] == ["meta"] * len(tensors)
    assert len(calls) == 1


@pytest.mark.parametrize("count", [0, 1, 4])
def test_fetched_is_one_late(count):
    made = []

    def make(i):
        made.append(i)
        return torch.full((2,), i)

    found = []
    for array in devices.fetched(make, range(count)):
        found.append(array.tolist())
        assert len(made) == min(count, len(found) + 1)
    assert found == [[i, i] for i in range(count)]


def test_the_cpu_has_no_thread_beside_its_work():
    assert devices.batches_ahead(CPU) == 0
    assert devices.batches_ahead(torch.device("cuda:1")) == devices.batches_ahead(torch.device("mps")) == 2


@pytest.mark.cuda
def test_tensors_travel_to_cuda_and_back():
    tensors = mixed_tensors()
    moved = devices.transfer(tensors, "cuda")
    for ours, theirs in zip(moved, tensors, strict=True):
        assert ours.device.type == "cuda"
        assert torch.equal(ours.cpu(), theirs)
    for ours, theirs in zip(devices.fetched(torch.clone, moved), tensors, strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("capability", "dtype", "found"),
    [
        ((9, 0), torch.float32, torch.bfloat16),
        ((7, 5), torch.float32, None),
        ((9, 0), torch.bfloat16, None),
        ((9, 0), torch.float64, None),
    ],
)
def test_what_inference_lowers_float32_to(monkeypatch, capability, dtype, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.inference_dtype(torch.device("cuda"), dtype) is found
    assert devices.inference_dtype(CPU, dtype) is None
