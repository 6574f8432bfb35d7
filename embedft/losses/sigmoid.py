"""Every pair of a query and a document judged on its own: a sigmoid loss instead of a softmax.

    loss = sigmoid(Q, D, targets, temperature=0.1, bias=-10.0)
    loss = LearnableSigmoid(temperature=0.1, bias=-10.0)

Shapes: B queries, R of them at a time, M documents, C document vectors, D features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_above_zero, check_finite
from .components import record
from .rows import by_rows, comparable
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

    z is 1 where d is listed as a positive of q or known to be one, and -1 elsewhere. Without a softmax, batches may
    have any size and queries several positives; a query without a positive counts by its negatives.

    The bias compensates for negatives being far more frequent. `similarity` and `windows` are as in `scores`, `rows` as
    in `by_rows`.

    Source: Zhai et al. 2023 (SigLIP), section 3.2, with its initial temperature and bias.
    """
    check_above_zero("temperature", temperature)
    check_finite("bias", bias)
    Q, D = comparable(Q, D, similarity)

    def losses(Q_R: Tensor, D: Tensor, targets: Targets, temperature: float, bias: float) -> tuple[Tensor]:
        logits_RM = scores(Q_R, D, targets, similarity="dot", windows=windows) / temperature + bias
        positive_RM, _ = targets.masks(num_documents=logits_RM.shape[1])
        return (-F.logsigmoid(logits_RM.where(positive_RM, -logits_RM)).sum(dim=1),)

    return by_rows(losses, Q, D, targets, rows, temperature, bias)[0].sum() / max(len(Q), 1)


class LearnableSigmoid(nn.Module):
    """`sigmoid` with a temperature and a bias that are learned together with the vectors.

    The parameters are `log_temperature` and `bias`. Records `temperature` and `bias`. `options` are those of `sigmoid`.

    Source: Zhai et al. 2023 (SigLIP), section 3.2 and algorithm 1.
    """

    options_of = sigmoid

    def __init__(self, *, temperature: float = 0.1, bias: float = -10.0, **options: Any):
        super().__init__()
        check_above_zero("temperature", temperature)
        check_finite("bias", bias)
        self.options = options
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        temperature = self.log_temperature.exp()
        record("temperature", temperature)
        record("bias", self.bias)
        return sigmoid(Q, D, targets, temperature=temperature, bias=self.bias, **self.options)
