"""Losses made of other losses: at several dimensions (Matryoshka), and a weighted sum.

    loss = Matryoshka(dims=[384, 128, 64], inner=in_batch_negatives)
    loss = WeightedSum(losses=[in_batch_negatives, toward_base], weights=[1.0, 0.1])
    value = loss(Q, D, targets)

The parts are any losses, modules and other compositions among them. `build_loss` makes these from names and options.

Shapes: B queries, C document vectors, D features.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .components import loss_name, record, scope
from .rows import check_one_of
from .scored import float32_or_64
from .targets import Targets

Loss = Callable[[Tensor, Tensor, Targets], Tensor]

REDUCTIONS = ("sum", "mean")


class Matryoshka(nn.Module):
    """Sum over dimensions d of weight_d * inner(the first d features of Q and D, made unit length).

    loss = Matryoshka(dims=[384, 128], inner=in_batch_negatives)

    Trains vectors whose beginnings are embeddings too. `targets` go to `inner` as they are: a guide or a teacher is
    not cut. A loss that compares vectors with a reference feature by feature has an option `truncate` for it.

    With `dims_per_step` each call draws that many of the dimensions, without replacement, from a generator seeded
    with `seed` and the number of calls so far. That number is the module's only state, `num_calls` in its
    state_dict: every rank draws alike, and a run that resumes with the state draws on where it stopped, whatever
    else uses random numbers. In evaluation mode nothing is drawn and nothing counted: all dimensions are used.

    Args:
        dims: each at least 1 and at most D, none twice, in any order; the largest is computed first.
        inner: the loss at each dimension.
        weights: one for each of `dims`, in the same order; None: 1 each.
        dims_per_step: how many to draw a call; -1: all of them, every time.
        reduction: "sum" of the weighted losses, or their "mean" over the dimensions of the call.
        seed: of the draws.

    Source: Kusupati et al. 2022, section 3, equation 1; sentence-transformers' MatryoshkaLoss, which draws with
    Python's global generator and cuts a teacher's vectors of width D.
    """

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
        check_one_of("reduction", reduction, REDUCTIONS)
        ordered = sorted(zip(dims, weights, strict=True), reverse=True)
        self.dims, self.weights = (tuple(column) for column in zip(*ordered, strict=True))
        self.inner, self.dims_per_step, self.reduction, self.seed = inner, dims_per_step, reduction, seed
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self._warned = False

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        """A scalar; the gradient is that of the sum (or mean) over the dimensions."""
        width = Q.shape[1]
        if self.dims[0] > width:
            raise ValueError(f"dims has {self.dims[0]}, but the vectors have {width} features")
        if self.training and not self._warned and self.dims[0] < width:
            self._warned = True
            warnings.warn(f"dims lacks {width}, the full width: it is not trained", stacklevel=2)
        Q, D = float32_or_64(Q), float32_or_64(D)
        total, places = 0.0, self._draw()
        for i in places:
            # Each from the one before, as the reference does it; that way rounding is the same too.
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
        # The generator takes 32 bits; the factor keeps neighbouring seeds from drawing the same, a call apart.
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + int(self.num_calls)) % 2**32)
        self.num_calls += 1
        drawn = torch.randperm(len(self.dims), generator=generator, device="cpu")
        return drawn[: self.dims_per_step].sort().values.tolist()


class WeightedSum(nn.Module):
    """weight_1 * loss_1(Q, D, targets) + weight_2 * loss_2(Q, D, targets) + ...

    loss = WeightedSum(losses=[in_batch_negatives, toward_base], weights=[1.0, 0.1])

    Args:
        losses: at least one; the parameters and the state of those that are modules are the sum's own.
        weights: one for each of `losses`, at least 0; None: 1 each.

    Source: Caruana 1997 (Multitask Learning): several losses on one representation.
    """

    def __init__(self, *, losses: Sequence[Loss], weights: Sequence[float] | None = None):
        super().__init__()
        if not losses:
            raise ValueError("losses is empty, expected at least one loss")
        self.weights = _checked_weights(weights, len(losses), "losses")
        self.losses = tuple(losses)
        names = [loss_name(loss) for loss in losses]
        self.names = [
            name if (number := names[:i].count(name)) == 0 else f"{name}_{number + 1}" for i, name in enumerate(names)
        ]
        # What makes the parameters of the parts known to the sum; a module that is several parts is saved once.
        modules = {
            id(loss): (str(i), loss) for i, loss in reversed([*enumerate(losses)]) if isinstance(loss, nn.Module)
        }
        self.parts = nn.ModuleDict(dict(sorted(modules.values())))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        """A scalar."""
        total = 0.0
        for name, weight, loss in zip(self.names, self.weights, self.losses, strict=True):
            with scope(name):
                value = loss(Q, D, targets)
            record(name, value)
            total = total + weight * value
        return total


def _unit(X: Tensor) -> Tensor:
    """The vectors made unit length; those of (nearly) no length stay as they are."""
    length = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    # Not F.normalize: a zero vector's gradient grows by 1e12 there, and beyond float32 after a few dimensions.
    return X / length.where(length > 1e-12, 1)


def _checked_weights(weights: Sequence[float] | None, count: int, of: str) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} entries, expected {count}, one for each of {of}")
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"weights is {list(weights)}, expected numbers of at least 0 and finite, not all of them 0")
    return tuple(weights)
