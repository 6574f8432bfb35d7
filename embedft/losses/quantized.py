"""Any loss on document vectors rounded as a quantized index stores them, so that training sees what search will.

    loss = Quantized(precision="binary", inner=in_batch_negatives)
    loss = Matryoshka(dims=[384, 64], inner=loss)      # each dimension rounded by itself, as search does

Shapes: B queries, C document vectors, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .components import scope
from .matryoshka import Loss
from .targets import Targets, check_one_of, float32_or_64


class Quantized(nn.Module):
    """inner(Q, the rounded D), whose gradient passes through the rounding as if it were not there.

    `precision` is as in retrieval/quantization.py, which also leaves queries as they are:
    - int8: 256 steps for each feature, between its smallest and its largest value; here, of the documents of the batch.
    - binary: +1 for features above 0, otherwise -1; here, over the root of their number, so that vectors have unit
      length.
    Train the vectors themselves too with "sum": [inner, this]. Rounded vectors are no function of the weights that is
    smooth, so a check of the gradient by differences fails.

    Source: Bengio et al. 2013 (Estimating or propagating gradients through stochastic neurons), section 4, the
    straight-through estimator; Shakir et al. 2024 for the precisions."""

    def __init__(self, *, precision: str, inner: Loss):
        super().__init__()
        check_one_of("precision", precision, tuple(ROUNDED))
        self.precision, self.inner = precision, inner

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        D = float32_or_64(D)
        # The value is exactly the rounded one; D - D.detach() is 0, and has the gradient.
        rounded_CD = ROUNDED[self.precision](D.detach()) + (D - D.detach())
        with scope("quantized"):
            return self.inner(Q, rounded_CD, targets)


def _int8(D: Tensor) -> Tensor:
    """`from_int8(to_int8(D))` of retrieval/quantization.py, with ranges from D itself."""
    if not len(D):
        return D
    smallest_D, largest_D = D.aminmax(dim=0)
    step_D = (largest_D - smallest_D) / 255
    step_D = step_D.where(step_D > 0, 1)
    half_D = (step_D / 2).where(smallest_D < largest_D, 0)
    return smallest_D + ((D - smallest_D) / step_D).floor().clamp(0, 255) * step_D + half_D


def _binary(D: Tensor) -> Tensor:
    """`from_binary(to_binary(D))` of retrieval/quantization.py, scaled to unit length."""
    return torch.where(D > 0, 1.0, -1.0).to(D) / D.shape[1] ** 0.5


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {"int8": _int8, "binary": _binary}
