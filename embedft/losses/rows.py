"""Building blocks of losses over rows of scores: a few rows at a time, means over positives and queries.

    value = mean_over_queries(*by_rows(losses, *comparable(Q, D, "cosine"), targets, None))

Shapes: B queries, R rows of scores, N columns, M documents, C document vectors, G listed documents per query.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .components import unrecorded
from .targets import Targets, over_windows


def between_documents(D: Tensor, targets: Targets, windows: str) -> Tensor:
    """Inner products of documents, [M, M], combined over the windows of both."""
    return over_windows(over_windows(D @ D.T, targets, windows=windows).T, targets, windows=windows)


def log_sum(logits_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """Log of the sum of exp(logits) over each row where `mask_RN`; minus infinity for an empty mask. [R]."""
    return logits_RN.masked_fill(~mask_RN, float("-inf")).logsumexp(dim=1)


def by_rows(
    losses: Callable[..., tuple[Tensor, ...]],
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    rows: int | None,
    *parameters: Tensor | float,
    width: int = 1,
    scores_at_a_time: int = 2**19,
) -> tuple[Tensor, ...]:
    """losses(Q, D, targets, *parameters), tensors of [B, ...], computed `rows` queries at a time.

    The backward pass recomputes them, so that all of [B, M] is never in memory; whatever needs a gradient must be an
    argument. Second derivatives (create_graph=True) raise `RuntimeError` unless `rows` is at least B. Components are
    not recorded inside, and autocast is off. `rows` None: as many as `scores_at_a_time` allows with `width` rows of
    scores per query; the default is 2 MB in float32, and the backward pass holds a few such blocks."""
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    rows = rows or max(1, scores_at_a_time // max(1, len(D) * width))
    targets.check_queries(Q)
    with torch.autocast(Q.device.type, enabled=False):
        if len(Q) <= rows:
            return losses(Q, D, targets, *parameters)
        return _ByRows.apply(losses, targets, rows, Q, D, *parameters)


class _ByRows(torch.autograd.Function):
    """`by_rows` with the parts recomputed in the backward pass.
    Not torch.utils.checkpoint, which keeps small tensors where scores were freed, so that the space cannot be reused:
    8,192 x 8,192 scores took 590 MB with it, and 120 MB with this."""

    @staticmethod
    def forward(ctx, losses, targets, rows, Q, D, *parameters):
        ctx.losses, ctx.targets, ctx.rows = losses, targets, rows
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in parameters]
        ctx.save_for_backward(Q, D, *(x if isinstance(x, Tensor) else None for x in parameters))
        outputs: list[Tensor] = []
        for first in range(0, len(Q), rows):
            with unrecorded():
                part = losses(Q[first : first + rows], D, targets.of_queries(first, first + rows), *parameters)
            outputs = outputs or [x_R.new_empty(len(Q), *x_R.shape[1:]) for x_R in part]
            for x_B, x_R in zip(outputs, part, strict=True):
                x_B[first : first + rows] = x_R
        ctx.mark_non_differentiable(*(x_B for x_B in outputs if not x_B.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        # Enabled only by create_graph. What follows has no graph, so it would count as a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("a loss by rows is differentiable only once: for create_graph=True, use rows=B or more")
        Q, D, *saved = ctx.saved_tensors
        needs_Q, *needs = ctx.needs_input_grad[3:]
        parameters = [number if x is None else x for x, number in zip(saved, ctx.numbers, strict=True)]
        wanted = zip([D, *parameters], needs, strict=True)
        others = [x.detach().requires_grad_(need) if isinstance(x, Tensor) else x for x, need in wanted]
        gradient_Q = torch.zeros_like(Q) if needs_Q else None
        for first in range(0, len(Q), ctx.rows):
            rows = slice(first, first + ctx.rows)
            Q_R = Q[rows].detach().requires_grad_(needs_Q)
            with torch.enable_grad(), torch.autocast(Q.device.type, enabled=False), unrecorded():
                part = ctx.losses(Q_R, others[0], ctx.targets.of_queries(rows.start, rows.stop), *others[1:])
            differentiable = [(x_R, g_B[rows]) for x_R, g_B in zip(part, gradients, strict=True) if x_R.requires_grad]
            if differentiable:
                torch.autograd.backward(*zip(*differentiable, strict=True))
            if Q_R.grad is not None:
                gradient_Q[rows] = Q_R.grad
        return None, None, None, gradient_Q, *(x.grad if isinstance(x, Tensor) else None for x in others)


def mean_over_positives(losses_BG: Tensor, counts_BG: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over the listed documents that count, whether there are any), each [B]."""
    num_B = counts_BG.sum(dim=1)
    return losses_BG.where(counts_BG, 0).sum(dim=1) / num_B.clamp(min=1), num_B > 0


def mean_over_queries(losses_B: Tensor, counts_B: Tensor) -> Tensor:
    """Mean over the queries that count; 0 when none does."""
    return losses_B.where(counts_B, 0).sum() / counts_B.sum().clamp(min=1)
