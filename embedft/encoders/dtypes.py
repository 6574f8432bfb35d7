"""`dtype`, the type of a model's weights: by name, measured ("auto"), or int8, which no type of torch's stands for.

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2", dtype="auto")
    dtype_of(embedder)        # "bfloat16" where its matrix products are clearly faster, else "float32"

"auto" never chooses int8: all-MiniLM-L6-v2's vectors in bfloat16 have cosines above 0.9999 to those in float32, in int8
above 0.997 (int8.py), which moves nDCG@10 in its third digit. That is for the user to accept.

On one busy core of an EPYC of family 25 (AVX512-BF16 and VNNI, no AMX; torch 2.13.0, 2026-11-30), reordered products of
[4096, 384] x [384, 1536] make 112 GFLOP/s in float32, 221 in bfloat16 and 394 in int8.
"""

import time
import warnings

import torch
from torch import nn

from ..device import has_reordered_linear, inference_dtype
from .int8 import NO_TRAINING, to_int8
from .layers import MIN_REORDER, Linear, inference

DTYPES = ("float32", "bfloat16", "float16", "int8", "auto")
CLEARLY = 1.3  # times as fast: less is not worth the rounding
MIN_WEIGHTS = 2**15  # of a layer; the time of smaller ones says nothing about products
MAX_WEIGHTS = 2**19  # of the part of a layer that is measured, so that it takes tens of milliseconds


def find_dtype(dtype: torch.dtype | str) -> str:
    """The name of a dtype. Raises `ValueError` for one that weights cannot have."""
    name = str(dtype).removeprefix("torch.")
    if name not in (*DTYPES, "float64"):
        raise ValueError(f"dtype is {name[:60]!r}, expected one of {', '.join(DTYPES)}")
    return name


def stored_dtype(name: str) -> torch.dtype:
    """The type in which to read a folder's weights."""
    return torch.float32 if name in ("int8", "auto") else getattr(torch, name)


def convert(embedder: nn.Module, name: str) -> nn.Module:
    """The Embedder with its weights, read in `stored_dtype(name)`, turned into the dtype of that name, in place.
    Warns if bfloat16, asked for, is slower than float32. Raises `ValueError` like `to_int8`."""
    if name == "int8":
        to_int8(embedder)
    elif name == "auto" and bfloat16_speed(embedder) >= CLEARLY:
        embedder.to(torch.bfloat16)
    elif name == "bfloat16" and (speed := bfloat16_speed(embedder)) < 1:
        warnings.warn(
            f"dtype is bfloat16, whose matrix products run at {speed:.2g} of float32's speed here", stacklevel=3
        )
    return embedder


def check_trains(model: nn.Module) -> None:
    """Raises `ValueError` for a model whose weights cannot be trained, nor saved."""
    if dtype_of(model) == "int8":
        raise ValueError(NO_TRAINING)


def dtype_of(model: nn.Module) -> str:
    """The name of the type of a model's weights."""
    found = [x.dtype for x in model.parameters()]
    return str(torch.int8 if torch.int8 in found else found[0]).removeprefix("torch.")


def described_dtype(model: nn.Module) -> str:
    """`dtype_of`, and the type that inference lowers it to: "float32, inference in bfloat16"."""
    found = dtype_of(model)
    lowers = inference_dtype(model.device, getattr(torch, found)) if getattr(model, "autocast", False) else None
    return found if lowers is None else f"{found}, inference in {str(lowers).removeprefix('torch.')}"


def bfloat16_speed(embedder: nn.Module) -> float:
    """Products per second in bfloat16 relative to float32, in the largest Linear layer of the encoder for documents; 1
    where they are not measured: on other devices than x86 CPUs, and in tiny encoders."""
    layers = [part for part in embedder.encoder.modules() if isinstance(part, Linear)]
    largest = max(layers, key=lambda layer: layer.weight.numel(), default=None)
    is_measured = largest is not None and largest.weight.numel() >= MIN_WEIGHTS
    if not is_measured or not has_reordered_linear(embedder.device, torch.bfloat16):
        return 1.0
    rows = max(1, MAX_WEIGHTS // largest.in_features)
    tokens_TD = torch.full((MIN_REORDER, largest.in_features), 0.5)
    cases, seconds = [], ([], [])
    for dtype in (torch.float32, torch.bfloat16):
        weight_ED = largest.weight.detach()[:rows].to(dtype)
        layer = Linear(*reversed(weight_ED.shape), bias=False, dtype=dtype, device="meta")
        layer.weight = nn.Parameter(weight_ED)
        cases.append((layer, tokens_TD.to(dtype)))
    with inference(nn.ModuleList(layer for layer, _ in cases)):
        for _ in range(4):  # the first warms up
            for found, (layer, x_TD) in zip(seconds, cases, strict=True):
                start = time.perf_counter()
                layer(x_TD)
                found.append(time.perf_counter() - start)
    exact, lower = (min(found[1:]) for found in seconds)
    return exact / lower
