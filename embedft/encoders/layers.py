"""Fast linear layers and dropout on the CPU; on other devices they are PyTorch's own.

`Linear` uses oneDNN's kernel in float32 (`device.has_onednn_linear` has the speedup), with a hand-written backward that
cannot be differentiated again. In `inference` it also reorders its weight for the kernel, which then takes 0.94 of the
time, and `activated` applies an activation before the product leaves the cache: together 0.87 of the time of `encode`
for all-MiniLM-L6-v2 and all-mpnet-base-v2 (two cores of an EPYC of family 25, torch 2.13.0, 2026-11-30). Weights in
bfloat16 do the same, in `inference` only.

`Dropout` draws 16 random bits per element, 1.5 ms for [5400, 384]; torch draws one number at a time, 10.5 ms (two cores
of an EPYC of family 26, torch 2.13.0, 2026-11-21), for a mask four times as large.

Shapes: T tokens, D features in, E features out.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..device import has_onednn_linear, has_reordered_linear, has_slow_dropout

LEVELS = 2**16
# By the name in config.json.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def check_activation(config: Any, name: str) -> None:
    """Raises `ValueError` if a field of a configuration names no known activation."""
    if (found := getattr(config, name)) not in ACTIVATIONS:
        raise ValueError(f"{name} is {found[:60]!r}, expected one of {', '.join(ACTIVATIONS)}")


# As oneDNN knows them: its name and its variant.
FUSED = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "gelu_pytorch_tanh": ("gelu", "tanh")}
FUSED |= {"relu": ("relu", ""), "tanh": ("tanh", "")}
MIN_REORDER = 1_024  # tokens of a batch; with fewer, reordering a weight takes longer than it saves


class Linear(nn.Linear):
    """y = x W^T + b over x [T, D]; parameters as in torch.nn.Linear."""

    reorders = False  # set by `inference`
    reordered: Tensor | None = None  # the weight in the order in which oneDNN reads it; gone when `inference` ends

    def forward(self, x_TD: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which knows no operator of oneDNN's that is called by name
            return F.linear(x_TD, self.weight, self.bias)
        if self.reorders and has_reordered_linear(x_TD.device, x_TD.dtype):
            return _product(x_TD, self._weight_for(x_TD), self.bias)
        if has_onednn_linear(x_TD.device, x_TD.dtype):
            return _OneDNNLinear.apply(x_TD, self.weight, self.bias)
        return F.linear(x_TD, self.weight, self.bias)

    def activated(self, x_TD: Tensor, activation: str) -> Tensor:
        """The activation of that name, of y; in one kernel where nothing but the activation reads y."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        fused = self.reorders and not hooked and activation in FUSED and not torch.compiler.is_compiling()
        if fused and has_reordered_linear(x_TD.device, x_TD.dtype):
            return _product(x_TD, self._weight_for(x_TD), self.bias, FUSED[activation])
        return ACTIVATIONS[activation](self(x_TD))

    def _weight_for(self, x_TD: Tensor) -> Tensor:
        weight_ED = self.reordered
        if weight_ED is None and len(x_TD) < MIN_REORDER:
            return self.weight
        if weight_ED is None:
            weight_ED = self.reordered = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
        return weight_ED


def _product(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, activation: tuple[str, str] = ("none", "")
) -> Tensor:
    name, variant = activation
    return torch.ops.mkldnn._linear_pointwise(x_TD, weight_ED, bias_E, name, [], variant)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        # A frozen weight needs no input.
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[1] else None, weight_ED)
        return _product(x_TD, weight_ED, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x_TD = _product(grad_TE, weight_ED.t().contiguous()) if needs_x else None
        grad_weight_ED = _product(grad_TE.t(), x_TD.t()) if needs_weight else None
        return grad_x_TD, grad_weight_ED, grad_TE.sum(0) if needs_bias else None


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient and no change of weights, until the context ends; each part is then in the mode that it
    was in before. Memory: another copy of the weights of all `Linear` layers while batches are large (CPU only)."""
    modes = {part: part.training for part in model.modules()}
    linear = [part for part in modes if isinstance(part, Linear)]
    model.eval()
    try:
        for part in linear:
            part.reorders = True
        with torch.inference_mode():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for part in linear:
            part.reorders, part.reordered = False, None


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where torch.nn.init would draw them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", None) == nn.init.__name__ else func(*args, **kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """In this block, modules are made on the meta device: their tensors have shapes but no values.
    Drawing such values makes torch import its compiler, which takes as long as importing torch: 1.0 s (an EPYC, torch
    2.13.0, 2026-11-30)."""
    with torch.device("meta"), _Undrawn():
        yield


class Dropout(nn.Dropout):
    """Zeroes elements with probability p and divides the rest by 1 - p, in training only.
    The CPU rounds p to a multiple of 2^-16 and divides by one minus the rounded p, so the mean is exact."""

    def forward(self, x_TD: Tensor) -> Tensor:
        is_slow = has_slow_dropout(x_TD.device) and not torch.compiler.is_compiling()
        if self.training and 0 < self.p <= 1 - 1 / LEVELS and is_slow:
            return _Dropout.apply(x_TD, self.p)
        return F.dropout(x_TD, self.p, self.training)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, p: float) -> Tensor:
        dropped = round(p * LEVELS)
        words = torch.empty(-(-x_TD.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: x_TD.numel()].view(x_TD.shape)
        # Uniform over the 2^16 values of an int16; the lowest `dropped` of them drop the element.
        kept = (levels >= dropped - LEVELS // 2).view(torch.uint8)
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / (LEVELS - dropped)
        # Converted first: multiplying float by uint8 converts element by element, ten times slower.
        return kept.to(x_TD.dtype).mul_(x_TD).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(grad_TD.dtype).mul_(grad_TD).mul_(ctx.scale), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, or in float64 if x is; with
    `offset` 1, the weight is added to 1. Source: Zhang and Sennrich 2019, section 3."""

    def __init__(self, features: int, *, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.full((features,), 1 - offset)), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        exact = x if x.dtype is torch.float64 else x.float()
        scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:  # Gemma multiplies before it rounds
            return (scaled * (self.offset + self.weight.to(scaled.dtype))).to(x.dtype)
        return self.weight * scaled.to(x.dtype)


class GatedFeedForward(nn.Module):
    """W_out (act(W_gate x) * W_up x), with [gate, up] in one matrix, or [up, gate] if `up_first`; `out_bias` None: as
    `bias`. Source: Shazeer 2020 (GLU variants), section 2."""

    def __init__(
        self,
        features: int,
        inner: int,
        *,
        activation: str,
        bias: bool = False,
        out_bias: bool | None = None,
        up_first: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.gate_up = Linear(features, 2 * inner, bias=bias)
        self.out = Linear(inner, features, bias=bias if out_bias is None else out_bias)
        self.activation, self.up_first, self.dropout = ACTIVATIONS[activation], up_first, Dropout(dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, dim=-1)
        if self.up_first:
            gate_TF, up_TF = up_TF, gate_TF
        return self.out(self.dropout(self.activation(gate_TF) * up_TF))
