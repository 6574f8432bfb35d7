"""Trainable maps of vectors that start as the identity: the parts of an adapter (adapter.py).

    part = build_map("low_rank", 384, rank=16)
    part(x_ND)                # [N, 384], equal to x before training
    part.departure()          # how far it is from the identity

Shapes: N vectors, D features in, E features out, R rank, H hidden features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SIZE = 1_000_000
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid", "leaky_relu", "elu", "selu")


class Map(nn.Module):
    """The base class: `departure` measures the distance from the identity; `settings` holds `build_map`'s arguments."""

    kind: str

    def __init__(self, in_features: int, out_features: int | None, **more: Any):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features or in_features
        self.settings = {"kind": self.kind, "in_features": in_features, "out_features": self.out_features, **more}
        for name in ("in_features", "out_features", "rank", "hidden"):
            if type(size := self.settings.get(name, 1)) is not int or not 1 <= size <= LARGEST_SIZE:
                raise ValueError(f"{name} is {repr(size)[:60]}, expected a number from 1 to {LARGEST_SIZE:,}")

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of a linear map. Raises `ValueError` for a nonlinear one."""
        raise ValueError(f"a {self.kind.replace('_', '-')} adapter is not linear, so it cannot be a Dense module")


class LinearMap(Map):
    """W x + b. W [E, D] starts as the identity (its first rows or columns if E is not D), b as 0."""

    kind = "linear"

    def __init__(self, in_features: int, out_features: int | None = None, *, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.weight = nn.Parameter(torch.eye(self.out_features, self.in_features))
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    def forward(self, x_ND: Tensor) -> Tensor:
        return _linear(x_ND, self.weight, self.bias)

    def departure(self) -> Tensor:
        """(||W - I||^2 + ||b||^2) / E."""
        away = self.weight - torch.eye(*self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
        return (away.square().sum() + _square(self.bias)) / self.out_features

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.detach(), None if self.bias is None else self.bias.detach()


class LowRank(Map):
    """x + U V x + b, with U [E, R] and V [R, D]; the first x is truncated or zero-padded to E features.
    U and b start as 0, V as normal with variance 1 / D. Source: Hu et al. 2022 (LoRA), section 4.1."""

    kind = "low_rank"

    def __init__(self, in_features: int, out_features: int | None = None, *, rank: int, bias: bool = True):
        super().__init__(in_features, out_features, rank=rank, bias=bias)
        self.up = nn.Parameter(torch.zeros(self.out_features, rank))
        self.down = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    def forward(self, x_ND: Tensor) -> Tensor:
        return _resized(x_ND, self.out_features) + _linear(_linear(x_ND, self.down), self.up, self.bias)

    def departure(self) -> Tensor:
        """(||U V||^2 + ||b||^2) / E."""
        product = ((self.up.T @ self.up) * (self.down @ self.down.T)).sum()  # trace(V^T U^T U V), without U V
        return (product + _square(self.bias)) / self.out_features

    def dense(self) -> tuple[Tensor, Tensor | None]:
        weight = torch.eye(self.out_features, self.in_features).to(self.up) + self.up @ self.down
        return weight.detach(), None if self.bias is None else self.bias.detach()


class TwoLayer(Map):
    """x + s (W2 act(W1 x + b1) + b2), with W1 [H, D], W2 [E, H] and a learnable scalar s; x as in `LowRank`.
    W2 and the biases start as 0, s as 1, W1 as normal with variance 1 / D. Without `residual` it is
    W2 act(W1 x + b1) + b2, which does not start as the identity; such maps only come from LlamaIndex's folders."""

    kind = "two_layer"

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        hidden: int,
        bias: bool = True,
        activation: str = "relu",
        residual: bool = True,
    ):
        super().__init__(in_features, out_features, hidden=hidden, bias=bias, activation=activation, residual=residual)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.activation = getattr(F, activation)
        self.weight1 = nn.Parameter(torch.randn(hidden, in_features) / math.sqrt(in_features))
        self.weight2 = nn.Parameter(torch.zeros(self.out_features, hidden))
        self.bias1 = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.bias2 = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.scale = nn.Parameter(torch.ones(1)) if residual else None

    def forward(self, x_ND: Tensor) -> Tensor:
        mapped_NE = _linear(self.activation(_linear(x_ND, self.weight1, self.bias1)), self.weight2, self.bias2)
        if self.scale is None:
            return mapped_NE
        return self.scale.to(x_ND.dtype) * mapped_NE + _resized(x_ND, self.out_features)

    def departure(self) -> Tensor:
        """s^2 (||W2||^2 + ||b2||^2) / E; s is 1 without `residual`."""
        scale = 1.0 if self.scale is None else self.scale.square().sum()
        return scale * (self.weight2.square().sum() + _square(self.bias2)) / self.out_features


KINDS: dict[str, type[Map]] = {kind.kind: kind for kind in (LinearMap, LowRank, TwoLayer)}


def build_map(kind: str, in_features: int, out_features: int | None = None, **options: Any) -> Map:
    """A map that starts as the identity. Raises `ValueError` for an unknown kind or option, or sizes below 1."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](in_features, out_features, **options)
    except TypeError as error:
        raise ValueError(f"{kind}: {str(error).partition('() ')[2] or error}") from None


def _linear(x_ND: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x_ND, weight.to(x_ND.dtype), None if bias is None else bias.to(x_ND.dtype))


def _resized(x_ND: Tensor, features: int) -> Tensor:
    return F.pad(x_ND, (0, features - x_ND.shape[1])) if features != x_ND.shape[1] else x_ND


def _square(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias.square().sum()
