"""What each device can do: the only module that checks a device's type."""

import contextlib
import itertools
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from . import heap

T = TypeVar("T")
# What lets cuBLAS be deterministic.
WORKSPACE, WORKSPACE_SIZES = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def default_device() -> torch.device:
    """CUDA if available, else MPS, else the CPU."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device("cuda" if torch.cuda.is_available() else mps)


def find_device(name: str) -> torch.device:
    """Parses a name such as "cuda:1". Raises `ValueError` if this machine, or this build of torch, lacks the device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
        raise ValueError(f"device is {name!r}, expected one of {', '.join(there)} ({reason})") from None


def has_packed_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.nn.attention.varlen` runs here: CUDA (Ampere or newer), half precision, no dropout."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def inference_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """What encoders with weights of a type infer in, if not in that type: float32's in bfloat16, where CUDA has the
    packed kernel. Never run on a GPU so far; on CPUs, bfloat16 leaves cosines to float32 above 0.9999."""
    return torch.bfloat16 if dtype is torch.float32 and has_packed_attention(device, torch.bfloat16) else None


def inference_autocast(
    device: torch.device, dtype: torch.dtype, enabled: bool = True
) -> contextlib.AbstractContextManager:
    """The context of an encoder's forward pass in inference, see `inference_dtype`."""
    lower = inference_dtype(device, dtype) if enabled else None
    return contextlib.nullcontext() if lower is None else torch.autocast(device.type, lower)


def has_grouped_attention(device: torch.device) -> bool:
    """Whether the fused kernels of `scaled_dot_product_attention` take fewer heads of keys than of queries. On the CPU
    they do, in 0.5 to 1.03 of the time that they take for repeated keys (12 cases, forward alone or with backward: 3 to
    32 heads over 1 to 8, texts of 32 to 1,024 tokens; a busy core of an EPYC, torch 2.13.0, 2026-11-30). On CUDA, those
    for float32 and for masks do not, according to torch's documentation: whole matrices of weights would be built."""
    return device.type == "cpu"


def has_slow_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the matrix products of attention are faster than the kernel of `scaled_dot_product_attention`: in
    bfloat16 on CPUs that multiply it. Forward and backward then take 0.53 of the kernel's time for one text of 512
    tokens (12 heads of width 32), 0.25 for 4 of 128 and 0.19 for 10 of 20; for short texts, the kernel takes several
    times as long as in float32 (CPU time on a busy core of an EPYC of family 25, torch 2.13.0, 2026-11-30)."""
    return device.type == "cpu" and dtype is torch.bfloat16 and _MULTIPLIES_BFLOAT16


# Private, so its absence must be harmless.
_MULTIPLIES_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def has_onednn_linear(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster for float32 matrix products in training than the BLAS that torch was built with: not on
    Intel's CPUs. MKL, the BLAS of torch's x86 wheels, does not use AVX-512 on AMD: 186 GFLOP/s, while oneDNN has 370
    for [5400, 384] x [384, 1536] (two cores of an EPYC of family 26, torch 2.13.0, 2026-11-21). On a Xeon with AMX
    they are equally fast forward, but for gradients of weights oneDNN has 115 to 119 GFLOP/s, MKL 180 to 215 (medians
    of four shapes with 6,640 tokens, two runs, two cores, 2026-12-01)."""
    return _multiplies_in_onednn(device, dtype) and not _HAS_FAST_BLAS


def _multiplies_in_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    plain = device.type == "cpu" and dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and torch.backends.mkldnn.enabled and _ONEDNN_LINEAR


def has_reordered_linear(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether inference can reorder a weight once for oneDNN: in float32, and in bfloat16 from AVX-512 on."""
    if dtype is torch.bfloat16:
        plain = device.type == "cpu" and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
        return plain and _ONEDNN_LINEAR and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _multiplies_in_onednn(device, dtype)


def has_int8_linear(device: torch.device) -> bool:
    """Whether oneDNN multiplies uint8 by int8 with VNNI; without it, its sums of pairs overflow."""
    return device.type == "cpu" and torch.backends.mkldnn.enabled and _INT8_LINEAR


def _processor() -> dict[str, str]:
    """What Linux says of the first core: vendor_id, model name, ..."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = itertools.takewhile(str.strip, file)  # a blank line ends a core
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


_HAS_FAST_BLAS = torch.backends.mkl.is_available() and _processor().get("vendor_id") == "GenuineIntel"
# The operator behind torch.compile's CPU linear layers. It is private, so its absence must be harmless.
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_ONEDNN_LINEAR = _IS_X86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Behind its quantized ones; as private.
_INT8_LINEAR = _ONEDNN_LINEAR and all(hasattr(torch.ops.onednn, f"qlinear_{name}") for name in ("prepack", "pointwise"))
_INT8_LINEAR = _INT8_LINEAR and getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


def has_float64(device: torch.device) -> bool:
    """Whether the device supports float64: all but MPS do."""
    return device.type != "mps"


def has_slow_dropout(device: torch.device) -> bool:
    """Whether torch draws its dropout mask one number at a time: on the CPU."""
    return device.type == "cpu"


def batch_tokens(device: torch.device, dtype: str = "float32") -> int:
    """Tokens per forward pass in inference; on the CPU, few enough that a layer's activations fit in the cache, and on
    MPS, which shares the computer's memory, enough for some tenths of a second. In int8, 2,048 take 0.83 of the time of
    4,096 for texts of 256 tokens, and 0.99 for those of 60 (a busy core of an EPYC, torch 2.13.0, 2026-11-30)."""
    if dtype == "int8":
        return 2_048
    return {"cpu": 4_096, "mps": 16_384}.get(device.type, 65_536)


def token_multiple(weight: torch.Tensor) -> int:
    """What the tokens of a large batch are filled up to a multiple of: for weights or autocast in bfloat16 on CPUs that
    multiply it, where oneDNN compiles a product for every new number of rows, 5 ms each. With batches of 4,096 tokens
    that are all different, encode took 0.77 to 0.93 of the time (a Xeon with AMX, torch 2.13.0, 2026-12-01)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return 256 if has_slow_attention(weight.device, dtype) else 1


def length_slack(device: torch.device) -> float:
    """The largest fraction of a padded sequence that may be padding; on GPUs, padding saves kernel launches."""
    return 0.0 if device.type == "cpu" else 0.125


def batches_ahead(device: torch.device) -> int:
    """How many batches a thread makes while the device works. On the CPU none: the thread would take the cores that the
    work needs, and has next to nothing to do there. Making a batch of Lyft's recipe takes 0.3% of the CPU time of its
    step, 4.8 s, and a tenth of that once the tokens are known (MiniLM, one thread on a busy EPYC, 2026-11-30)."""
    return 0 if device.type == "cpu" else 2


def transfer(tensors: Sequence[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """The tensors on another device. From the CPU to CUDA they travel as one, from pinned memory, and the CPU does not
    wait: a copy from other memory first waits for all that the device has to do."""
    device = torch.device(device)
    if device.type == "cuda" and all(x.device.type == "cpu" for x in tensors):
        return _transfer_as_one(tensors, device, pin_memory=True)
    return [x.to(device) for x in tensors]


def _transfer_as_one(tensors: Sequence[torch.Tensor], device: torch.device, *, pin_memory: bool) -> list[torch.Tensor]:
    sizes = [-(-x.nbytes // 16) * 16 for x in tensors]  # so that every tensor starts where any type may
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin_memory)

    def parts(buffer: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(buffer.split(sizes), tensors, strict=True)
        return [part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in pairs]

    for part, x in zip(parts(host), tensors, strict=True):
        part.copy_(x)
    return parts(host.to(device, non_blocking=True))


def fetched(compute: Callable[[T], torch.Tensor], items: Iterable[T]) -> Iterator[np.ndarray]:
    """compute(item) as an array, for each item, after the next one has been computed, or started on a GPU: so the CPU
    prepares that while the GPU works, and never waits for more than the tensor itself."""
    before = None
    for item in items:
        after = _start_fetching(compute(item))
        if before is not None:
            yield before().numpy()
        before = after
    if before is not None:
        yield before().numpy()


def _start_fetching(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        event.synchronize()
        return host

    return wait


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators (CPU and `device`) for the block, and restores the caller's state afterwards."""
    state = random_state(device)
    try:
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)  # torch's also seeds GPUs
        yield
    finally:
        set_random_state(state, device)


def use_tf32(device: torch.device) -> None:
    """From now on, CUDA multiplies float32 matrices in TF32: the range of float32, and the 10 bits of float16.
    Raises `ValueError` for another device."""
    if device.type != "cuda":
        raise ValueError(f"tf32 is true, but device is {str(device)!r}: only CUDA has TF32")
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def allow_deterministic() -> None:
    """Lets cuBLAS be `deterministic` here: torch reads the environment once, at its first product on CUDA."""
    os.environ.setdefault(WORKSPACE, WORKSPACE_SIZES)


@contextlib.contextmanager
def deterministic(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """In this block, a GPU gives the same bits every time, as the CPU does anyway: sums in a fixed order, attention
    kernels without atomic additions. torch's settings are the caller's again afterwards.
    Raises `ValueError` that names the operation, where torch has no such implementation of one, and for cuBLAS where it
    was used before without `allow_deterministic`."""
    if device.type == "cpu" or not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, workspace = torch.utils.deterministic.fill_uninitialized_memory, os.environ.get(WORKSPACE)
    try:
        allow_deterministic()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        if WORKSPACE in str(error):
            reason = f"cuBLAS was used before: {WORKSPACE}={WORKSPACE_SIZES} must be set when Python starts"
        raise ValueError(f"deterministic is true, but {reason}") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the generators that dropout draws from: the CPU's and `device`'s."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the allocator of CPU tensors, has no memory left."""
    texts = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "MPS backend out of",
        "CUBLAS_STATUS_ALLOC_FAILED",  # of its workspace, outside of torch's allocator
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def release_memory(device: torch.device) -> None:
    """Returns freed memory of the CPU (glibc only) and of MPS to the operating system; elsewhere a no-op.
    glibc keeps freed memory in fragments that tensors of other sizes cannot reuse: without this, a process training on
    batches of 7,000 tokens grew from 2.2 to 3.2 GB in 18 steps, and kept growing. A call takes a tenth of a second."""
    if device.type == "cpu":
        heap.trim()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reusing_memory(device: torch.device) -> contextlib.AbstractContextManager:
    """In this block, what tensors of the CPU leave free serves the next ones; other devices do so anyway."""
    return heap.kept() if device.type == "cpu" else contextlib.nullcontext()


def release_between_batches(device: torch.device) -> None:
    """`release_memory` where that is needed between batches of inference too: on MPS, whose allocator keeps what was
    freed for tensors of about that size, so that batches of varying lengths use up the memory (users' reports)."""
    if device.type == "mps":
        release_memory(device)


def peak_memory_bytes(device: torch.device | str) -> int:
    """Peak memory so far, or since `reset_peak_memory`: allocated on a CUDA device, otherwise resident in this process.
    On MPS, which keeps no peak: what the driver holds now, which falls only when memory is released."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return heap.peak_resident_bytes()


def reset_peak_memory(device: torch.device | str) -> None:
    """Forgets the peak so far, where the system can: CUDA devices, and processes on Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif torch.device(device).type == "cpu":
        heap.reset_peak()


def describe(device: torch.device) -> str:
    """The device's name and, unless it is CUDA, the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _processor().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" + (", MPS" if device.type == "mps" else "")
