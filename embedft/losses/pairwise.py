"""Losses over listed documents only: pairs pulled together or pushed apart, without the rest of the batch.

    loss = triplet(Q, D, targets, margin=0.5, distance="cosine")
    loss = contrastive(Q, D, targets, margin=0.5)
    loss = online_contrastive(Q, D, targets, margin=0.5)

A positive listed for a query is a positive pair, a hard negative a negative one; a document listed as a hard negative
that is known to be relevant is neither. Distances: "cosine" (1 - cos), "euclidean" or "manhattan", the last two of the
vectors as they are; of several windows the nearest counts. `margin` is at least 0, in the unit of the distance. Losses
are 0 when there is nothing to compare; a batch that lists one document per query raises `ValueError`.

Shapes: B queries, M documents, C document vectors, G listed documents per query, P pairs, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_finite, check_one_of
from .rows import by_rows
from .scored import listed_scores
from .targets import Targets, float32_or_64, over_windows

DISTANCES = ("cosine", "euclidean", "manhattan")
REDUCTIONS = ("mean", "sum")


def triplet(Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 5.0, distance: str = "euclidean") -> Tensor:
    """Mean of max(0, d(q, p) - d(q, n) + margin) over every listed positive p and hard negative n of a query.

    Source: Schroff et al. 2015 (FaceNet), section 3.1, with distances not squared, as in Hermans et al. 2017; equals
    sentence-transformers' TripletLoss.
    """
    _check(margin, distance)
    targets.check_several("triplet")
    distances_BG = _listed_distances(Q, D, targets, distance)
    is_triplet_BGG = targets.listed_positive[:, :, None] & targets.listed_negative[:, None, :]
    losses_BGG = F.relu(distances_BG[:, :, None] - distances_BG[:, None, :] + margin)
    return losses_BGG.where(is_triplet_BGG, 0).sum() / is_triplet_BGG.sum().clamp(min=1)


def contrastive(
    Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 0.5, distance: str = "cosine", reduction: str = "mean"
) -> Tensor:
    """Mean over pairs of d^2 / 2 if the pair is positive, max(0, margin - d)^2 / 2 if it is negative.

    Without `relevance`, a query lists a positive first and then hard negatives; with it, grades decide.

    Source: Hadsell et al. 2006, equation 4; equals sentence-transformers' ContrastiveLoss.
    """
    _check(margin, distance)
    check_one_of("reduction", reduction, REDUCTIONS)
    positive_P, negative_P = _pair_distances(Q, D, targets, distance, "contrastive")
    total = positive_P.square().sum() + F.relu(margin - negative_P).square().sum()
    num_pairs = len(positive_P) + len(negative_P)
    return total / 2 / (max(num_pairs, 1) if reduction == "mean" else 1)


def online_contrastive(
    Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 0.5, distance: str = "cosine"
) -> Tensor:
    """Sum over hard pairs of d^2 if the pair is positive, max(0, margin - d)^2 if it is negative.

    A positive pair is hard when it is farther apart than the closest negative pair of the batch, a negative pair when
    it is closer than the farthest positive pair. Without any pair of the other kind, those worse than the mean are
    hard. Coupled: the batch is evaluated as a whole.

    Source: sentence-transformers' OnlineContrastiveLoss: Hadsell et al. 2006, equation 4, over the hard pairs.
    """
    _check(margin, distance)
    positive_P, negative_P = _pair_distances(Q, D, targets, distance, "online_contrastive")
    furthest_positive = positive_P.max() if len(positive_P) else negative_P.mean()
    nearest_negative = negative_P.min() if len(negative_P) else positive_P.mean()
    hard_positive_P = positive_P[positive_P > nearest_negative]
    hard_negative_P = negative_P[negative_P < furthest_positive]
    return hard_positive_P.square().sum() + F.relu(margin - hard_negative_P).square().sum()


def _check(margin: float, distance: str) -> None:
    check_finite("margin", margin, least=0)
    check_one_of("distance", distance, DISTANCES)


def _pair_distances(Q: Tensor, D: Tensor, targets: Targets, distance: str, loss: str) -> tuple[Tensor, Tensor]:
    """Distances of the positive and of the negative pairs, each [P]."""
    if targets.relevance is None:
        targets.check_several(loss)
    # The reference does this for pairs but not for triplets: torch.pairwise_distance adds 1e-6 to every difference.
    distances_BG = _listed_distances(Q, D, targets, distance, added=1e-6, as_pairs=True)
    return distances_BG[targets.listed_positive], distances_BG[targets.listed_negative]


def _listed_distances(
    Q: Tensor, D: Tensor, targets: Targets, distance: str, *, added: float = 0.0, as_pairs: bool = False
) -> Tensor:
    """Distance of every query from the documents listed for it, [B, G]; arbitrary where none is listed."""
    if distance == "cosine":
        return 1 - listed_scores(Q, D, targets, as_pairs=as_pairs)
    targets.check_queries(Q)
    Q, D = float32_or_64(Q), float32_or_64(D)
    order = 2 if distance == "euclidean" else 1
    Q = Q + added
    if targets.document is None:
        targets.num_documents(len(D))
        return torch.linalg.vector_norm(Q[:, None] - D[targets.group.clamp(min=0)], ord=order, dim=2)

    def nearest(Q_R: Tensor, D: Tensor, targets: Targets) -> tuple[Tensor]:
        distances_RC = torch.cdist(Q_R, D, p=order, compute_mode="donot_use_mm_for_euclid_dist")
        return (-over_windows(-distances_RC, targets).gather(1, targets.group.clamp(min=0)),)

    return by_rows(nearest, Q, D, targets, None)[0]
