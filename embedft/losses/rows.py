"""What losses over rows of scores share: rows at a time, means over positives and queries, checks of options.

    Q, D = comparable(Q, D, "cosine")
    losses_B, counts_B = by_rows(losses, Q, D, targets, rows=None)
    value = mean_over_queries(losses_B, counts_B)

Not here: similarities (targets.py), and any loss.

Shapes: B queries, R rows of scores, N columns, M documents, C document vectors, G listed documents a query.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .targets import SIMILARITIES, Targets, over_windows

# Scores computed at a time when `rows` is None: 2 MB in float32, of which the backward pass holds a few. With 8 MB a
# batch of 8,192 took 300 MB more: blocks of that size stay in the C library's hands, in pieces.
SCORES_AT_A_TIME = 2**19


def comparable(Q: Tensor, D: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Vectors in float32 or float64 whose inner products are the similarities: once, not for every few rows."""
    check_one_of("similarity", similarity, SIMILARITIES)
    Q, D = (x if x.dtype is torch.float64 else x.float() for x in (Q, D))
    return (F.normalize(Q, dim=1), F.normalize(D, dim=1)) if similarity == "cosine" else (Q, D)


def between_documents(D: Tensor, targets: Targets, windows: str) -> Tensor:
    """Inner products of documents, [M, M], over the windows of both."""
    return over_windows(over_windows(D @ D.T, targets, windows=windows).T, targets, windows=windows)


def log_sum(logits_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """Log of the sum of exp(logits) over each row where `mask_RN`; minus infinity where that is nowhere. [R]."""
    return logits_RN.masked_fill(~mask_RN, float("-inf")).logsumexp(dim=1)


def by_rows(
    losses: Callable[[Tensor, Tensor, Targets], tuple[Tensor, ...]],
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    rows: int | None,
) -> tuple[Tensor, ...]:
    """losses(Q, D, targets), tensors of [B], computed for `rows` queries at a time and again in the backward pass."""
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    rows = rows or max(1, SCORES_AT_A_TIME // max(1, len(D)))
    if len(Q) <= rows:
        return losses(Q, D, targets)
    parts = []
    for start in range(0, len(Q), rows):
        some = targets.of_queries(start, start + rows)
        parts.append(
            checkpoint(losses, Q[start : start + rows], D, some, use_reentrant=False, preserve_rng_state=False)
        )
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def mean_over_positives(losses_BG: Tensor, counts_BG: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over the listed documents that count, whether there are any), each [B]."""
    num_B = counts_BG.sum(dim=1)
    return losses_BG.where(counts_BG, 0).sum(dim=1) / num_B.clamp(min=1), num_B > 0


def mean_over_queries(losses_B: Tensor, counts_B: Tensor) -> Tensor:
    """Mean over the queries that count; 0 when none does."""
    return losses_B.where(counts_B, 0).sum() / counts_B.sum().clamp(min=1)


def check_above_zero(name: str, value: float) -> None:
    """Raises `ValueError`."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected above 0 and finite")


def check_one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises `ValueError`."""
    if value not in valid:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(valid)}")
