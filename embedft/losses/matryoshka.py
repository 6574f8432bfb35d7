"""Losses built from other losses: at several dimensions (Matryoshka), and a weighted sum.

    loss = Matryoshka(dims=[384, 128, 64], inner=in_batch_negatives)
    loss = WeightedSum(losses=[in_batch_negatives, my_loss], weights=[1.0, 0.1])
    value = loss(Q, D, targets)

Shapes: B queries, C document vectors, D features.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .components import loss_name, record, scope
from .targets import Targets, check_one_of, float32_or_64

Loss = Callable[[Tensor, Tensor, Targets], Tensor]


class Matryoshka(nn.Module):
    """Sum over dimensions d of weight_d * inner(the first d features of Q and D, scaled to unit length).

    Trains vectors whose prefixes are embeddings too. References are not truncated; losses that compare with them
    feature by feature have an option `truncate` for that. Records each value as "matryoshka/384".

    Args:
        dims: each from 1 to D, without repetition; the largest is computed first.
        inner: the loss at each dimension.
        weights: one for each of `dims`, in the same order; None: 1 each.
        dims_per_step: dimensions drawn per call, without replacement; -1, and always in evaluation mode: all of them.
        reduction: "sum" of the weighted losses, or their "mean" over the dimensions of the call.
        seed: seeds the draws, with the number of calls so far (`num_calls`, the module's only state), so that all ranks
            draw the same and a resumed run continues the sequence.

    Source: Kusupati et al. 2022, section 3, equation 1; sentence-transformers' MatryoshkaLoss, which draws with
    Python's global generator and truncates a teacher's vectors of width D."""

    def __init__(
        self,
        *,
        dims: Sequence[int],
        inner: Loss,
        weights: Sequence[float] | None = None,
        dims_per_step: int = -1,
        reduction: str = "sum",
        seed: int = 0,
    ):
        super().__init__()
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise ValueError(f"dims is {list(dims)}, expected dimensions of at least 1, none twice")
        weights = _checked_weights(weights, len(dims), "dims")
        if dims_per_step != -1 and not 1 <= dims_per_step <= len(dims):
            raise ValueError(f"dims_per_step is {dims_per_step}, expected -1 (all) or 1 to {len(dims)}")
        check_one_of("reduction", reduction, ("sum", "mean"))
        ordered = sorted(zip(dims, weights, strict=True), reverse=True)
        self.dims, self.weights = (tuple(column) for column in zip(*ordered, strict=True))
        self.inner, self.dims_per_step, self.reduction, self.seed = inner, dims_per_step, reduction, seed
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self._warned = False

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        width = Q.shape[1]
        if self.dims[0] > width:
            raise ValueError(f"dims has {self.dims[0]}, but the vectors have {width} features")
        if self.training and not self._warned and self.dims[0] < width:
            self._warned = True
            warnings.warn(f"dims lacks {width}, the full width, which is not trained", stacklevel=2)
        Q, D, total, places = float32_or_64(Q), float32_or_64(D), 0.0, self._draw()
        for i in places:
            # Each truncates the one before, as the reference does, so that rounding is the same too.
            Q, D = (_unit(X[:, : self.dims[i]]) for X in (Q, D))
            with scope("matryoshka"):
                with scope(str(self.dims[i])):
                    value = self.inner(Q, D, targets)
                record(str(self.dims[i]), value)
            total = total + self.weights[i] * value
        return total if self.reduction == "sum" else total / len(places)

    def _draw(self) -> list[int]:
        """Which of `dims` this call uses, largest first."""
        if not self.training or self.dims_per_step in (-1, len(self.dims)):
            return list(range(len(self.dims)))
        # The generator takes 32 bits; the factor keeps neighbouring seeds from drawing the same, one call apart.
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + int(self.num_calls)) % 2**32)
        self.num_calls += 1
        drawn = torch.randperm(len(self.dims), generator=generator, device="cpu")
        return drawn[: self.dims_per_step].sort().values.tolist()


class WeightedSum(nn.Module):
    """weight_1 * loss_1(Q, D, targets) + weight_2 * loss_2(Q, D, targets) + ..., weights of at least 0 (None: 1 each).
    Records the unweighted value of each part under its name. Modules become submodules; a repeated one is saved once.
    Source: Caruana 1997 (Multitask Learning): several losses on one representation."""

    def __init__(self, *, losses: Sequence[Loss], weights: Sequence[float] | None = None):
        super().__init__()
        if not losses:
            raise ValueError("losses is empty, expected at least one loss")
        self.weights = _checked_weights(weights, len(losses), "losses")
        self.losses, self.parts = tuple(losses), nn.ModuleDict()  # which registers the parameters of the parts
        for i, loss in enumerate(losses):
            if isinstance(loss, nn.Module) and not any(loss is part for part in self.parts.values()):
                self.parts[str(i)] = loss

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        total = 0.0
        for weight, loss in zip(self.weights, self.losses, strict=True):
            with scope(loss_name(loss)):
                value = loss(Q, D, targets)
            record(loss_name(loss), value)
            total = total + weight * value
        return total


def _unit(X: Tensor) -> Tensor:
    """The vectors scaled to unit length; those of (nearly) zero length stay as they are."""
    length = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    # Not F.normalize, which multiplies a zero vector's gradient by 1e12: it exceeds float32 after a few dimensions.
    return X / length.where(length > 1e-12, 1)


def _checked_weights(weights: Sequence[float] | None, count: int, of: str) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} entries, expected {count}, one for each of {of}")
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"weights is {list(weights)}, expected finite numbers of at least 0, not all of them 0")
    return tuple(weights)
