"""Losses of listed documents alone: pairs near or apart by a distance, without the rest of the batch.

    loss = triplet(Q, D, targets, margin=0.5, distance="cosine")
    loss = contrastive(Q, D, targets, margin=0.5)
    loss = online_contrastive(Q, D, targets, margin=0.5)

A listed document that is a positive of its query makes a positive pair, a hard negative a negative one; a document
listed as a hard negative that is known to be relevant makes none. Not here: softmax over negatives (contrastive.py).

Shapes: B queries, M documents, C document vectors, G listed documents a query, P pairs, D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import by_rows, check_one_of, check_several
from .scored import listed_scores
from .targets import Targets, over_windows

DISTANCES = ("cosine", "euclidean", "manhattan")
REDUCTIONS = ("mean", "sum")


def triplet(Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 5.0, distance: str = "euclidean") -> Tensor:
    """Mean of max(0, d(q, p) - d(q, n) + margin) over every listed positive p and hard negative n of a query.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D]; d to a document of several windows is that to the nearest.
        targets: lists a positive and at least one hard negative a query.
        margin: at least 0, in the unit of the distance; for "cosine" at most 2 makes sense.
        distance: "cosine" (1 - cos), "euclidean" or "manhattan"; the last two are of the vectors as they are.

    Returns:
        A scalar, at least 0; 0 when no query has both a positive and a hard negative.

    Raises:
        ValueError: a batch that lists one document a query.

    Source: Schroff et al. 2015 (FaceNet), section 3.1, of distances that are not squared as in Hermans et al. 2017;
    the same as sentence-transformers' TripletLoss.
    """
    _check(margin, distance)
    check_several(targets, "triplet")
    distances_BG = _listed_distances(Q, D, targets, distance)
    is_triplet_BGG = targets.listed_positive[:, :, None] & targets.listed_negative[:, None, :]
    losses_BGG = F.relu(distances_BG[:, :, None] - distances_BG[:, None, :] + margin)
    return losses_BGG.where(is_triplet_BGG, 0).sum() / is_triplet_BGG.sum().clamp(min=1)


def contrastive(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    margin: float = 0.5,
    distance: str = "cosine",
    reduction: str = "mean",
) -> Tensor:
    """Mean over pairs of d^2 / 2 if the pair is positive, max(0, margin - d)^2 / 2 if it is negative.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D]; d to a document of several windows is that to the nearest.
        targets: each listed document makes a pair with its query; `relevance` says which are positive.
        margin: at least 0; from there on a negative pair is far enough apart.
        distance: "cosine" (1 - cos), "euclidean" or "manhattan".
        reduction: "mean" or "sum" over the pairs.

    Returns:
        A scalar, at least 0; 0 without pairs.

    Raises:
        ValueError: a batch that lists one document a query, without `relevance`: all its pairs are positive.

    Source: Hadsell et al. 2006, equation 4; the same as sentence-transformers' ContrastiveLoss.
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

    A positive pair is hard when it is further apart than the nearest negative pair of the batch, a negative pair when
    it is nearer than the furthest positive pair. Without any pair of the other kind the hard ones are those worse
    than the mean. Coupled: the batch is evaluated whole.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D]; d to a document of several windows is that to the nearest.
        targets: each listed document makes a pair with its query; `relevance` says which are positive.
        margin: at least 0; from there on a negative pair is far enough apart.
        distance: "cosine" (1 - cos), "euclidean" or "manhattan".

    Returns:
        A scalar, at least 0; 0 without hard pairs.

    Raises:
        ValueError: a batch that lists one document a query, without `relevance`: all its pairs are positive.

    Source: sentence-transformers' OnlineContrastiveLoss: Hadsell et al. 2006, equation 4, of the hard pairs.
    """
    _check(margin, distance)
    positive_P, negative_P = _pair_distances(Q, D, targets, distance, "online_contrastive")
    furthest_positive = positive_P.max() if len(positive_P) else negative_P.mean()
    nearest_negative = negative_P.min() if len(negative_P) else positive_P.mean()
    hard_positive_P = positive_P[positive_P > nearest_negative]
    hard_negative_P = negative_P[negative_P < furthest_positive]
    return hard_positive_P.square().sum() + F.relu(margin - hard_negative_P).square().sum()


def _check(margin: float, distance: str) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}, expected at least 0 and finite")
    check_one_of("distance", distance, DISTANCES)


def _pair_distances(Q: Tensor, D: Tensor, targets: Targets, distance: str, loss: str) -> tuple[Tensor, Tensor]:
    """Distances of the positive pairs and of the negative ones, each [P]."""
    if targets.relevance is None:
        check_several(targets, loss)
    # As the reference does it for pairs and not for triplets; torch.pairwise_distance adds 1e-6 to every difference.
    distances_BG = _listed_distances(Q, D, targets, distance, added=1e-6, as_pairs=True)
    return distances_BG[targets.listed_positive], distances_BG[targets.listed_negative]


def _listed_distances(
    Q: Tensor, D: Tensor, targets: Targets, distance: str, *, added: float = 0.0, as_pairs: bool = False
) -> Tensor:
    """Distance of every query from the documents listed for it, [B, G]; where none is listed, from any document."""
    if distance == "cosine":
        return 1 - listed_scores(Q, D, targets, as_pairs=as_pairs)
    targets.check_queries(Q)
    Q, D = (x if x.dtype is torch.float64 else x.float() for x in (Q, D))
    order = 2 if distance == "euclidean" else 1
    Q = Q + added
    if targets.document is None:
        targets.num_documents(len(D))
        return torch.linalg.vector_norm(Q[:, None] - D[targets.group.clamp(min=0)], ord=order, dim=2)

    def nearest(Q_R: Tensor, D: Tensor, targets: Targets) -> tuple[Tensor]:
        distances_RC = torch.cdist(Q_R, D, p=order, compute_mode="donot_use_mm_for_euclid_dist")
        return (-over_windows(-distances_RC, targets).gather(1, targets.group.clamp(min=0)),)

    return by_rows(nearest, Q, D, targets, None)[0]
