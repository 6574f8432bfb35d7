"""Every pair of a query and a document judged alone: a sigmoid loss instead of a softmax.

    loss = sigmoid(Q, D, targets, temperature=0.1, bias=-10.0)
    loss = LearnableSigmoid(temperature=0.1, bias=-10.0)

Sums over queries: they compute `rows` queries at a time, each again in the backward pass. Not here: softmax losses
(contrastive.py).

Shapes: B queries, R of them at a time, M documents, C document vectors, D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .components import record
from .rows import by_rows, check_above_zero, check_finite, comparable
from .targets import Targets, scores


def sigmoid(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 0.1,
    bias: float = -10.0,
    similarity: str = "cosine",
    windows: str = "max",
    rows: int | None = None,
) -> Tensor:
    """-1/B times the sum over queries q and documents d of log sigmoid( z (sim(q, d) / temperature + bias) ).

    z is 1 where d is listed as a positive of q, or known to be one, and -1 elsewhere. Every pair is judged alone: no
    softmax, so the batch may be of any size, and several positives are no trouble. A query without a positive counts
    by its negatives.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: what is relevant to whom.
        temperature: above 0.
        bias: finite; makes up for there being far more negatives than positives.
        similarity: "cosine" or "dot".
        windows: "max" or "softmax" over the windows of a document, as in `scores`.
        rows: queries at a time; None: as many as make half a million scores.

    Returns:
        A scalar, at least 0.

    Source: Zhai et al. 2023 (SigLIP), section 3.2, with its initial temperature and bias; `LearnableSigmoid` learns
    them.
    """
    check_above_zero("temperature", temperature)
    check_finite("bias", bias)
    return _sigmoid(Q, D, targets, temperature, bias, similarity=similarity, windows=windows, rows=rows)


class LearnableSigmoid(nn.Module):
    """`sigmoid` with temperature and bias that are learned with the vectors.

    loss = LearnableSigmoid(temperature=0.1, bias=-10.0)

    The parameters are `log_temperature` and `bias`.

    Args:
        temperature: to begin with, above 0.
        bias: to begin with, finite.
        similarity, windows, rows: as of `sigmoid`.

    Source: Zhai et al. 2023 (SigLIP), section 3.2 and algorithm 1.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        bias: float = -10.0,
        similarity: str = "cosine",
        windows: str = "max",
        rows: int | None = None,
    ):
        super().__init__()
        check_above_zero("temperature", temperature)
        check_finite("bias", bias)
        self.options = {"similarity": similarity, "windows": windows, "rows": rows}
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        """A scalar, at least 0."""
        temperature = self.log_temperature.exp()
        record("temperature", temperature)
        record("bias", self.bias)
        return _sigmoid(Q, D, targets, temperature, self.bias, **self.options)


def _sigmoid(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    temperature: float | Tensor,
    bias: float | Tensor,
    *,
    similarity: str,
    windows: str,
    rows: int | None,
) -> Tensor:
    Q, D = comparable(Q, D, similarity)

    def losses(
        Q_R: Tensor, D: Tensor, targets: Targets, temperature: float | Tensor, bias: float | Tensor
    ) -> tuple[Tensor]:
        logits_RM = scores(Q_R, D, targets, similarity="dot", windows=windows) / temperature + bias
        positive_RM, _ = targets.masks(num_documents=logits_RM.shape[1])
        return (-F.logsigmoid(logits_RM.where(positive_RM, -logits_RM)).sum(dim=1),)

    return by_rows(losses, Q, D, targets, rows, temperature, bias)[0].sum() / max(len(Q), 1)
