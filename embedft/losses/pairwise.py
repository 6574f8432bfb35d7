"""Losses over listed documents only, without the rest of the batch; 0 when there is nothing to compare.

    loss = triplet(Q, D, targets, margin=0.5, distance="cosine")
    loss = cosent(Q, D, Targets(group=torch.tensor([[0], [1]]), target_scores=torch.tensor([[0.9], [0.2]])))

`triplet` and the two contrastive losses pull a query toward a listed positive and away from a hard negative that is not
known to be relevant. Distances: "cosine" (1 - cos), "euclidean" or "manhattan"; the last two do not normalize vectors.
Of several windows, the nearest counts. `margin` is at least 0, in the unit of the distance.

`cosine_mse`, `cosent` and `angle` take scored pairs: a query and the first document listed for it, with the first of
its `target_scores` as gold score; pairs="all" takes every listed document with its own. Empty places (-1) are skipped.

Shapes: B queries, M documents, C document vectors, G listed documents per query, P pairs, D features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import by_rows
from .targets import WINDOWS, Targets, check_number, check_one_of, comparable, float32_or_64, over_windows

Scores = Callable[[Tensor, Tensor], Tensor]


def triplet(Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 5.0, distance: str = "euclidean") -> Tensor:
    """Mean of max(0, d(q, p) - d(q, n) + margin) over every listed positive p and hard negative n of a query.
    Source: Schroff et al. 2015 (FaceNet), section 3.1, with distances not squared, as in Hermans et al. 2017; equals
    sentence-transformers' TripletLoss."""
    check_number("margin", margin, least=0)
    targets.check_several("triplet")
    distances_BG = _listed_distances(Q, D, targets, distance)
    is_triplet_BGG = targets.listed_positive[:, :, None] & targets.listed_negative[:, None, :]
    losses_BGG = F.relu(distances_BG[:, :, None] - distances_BG[:, None, :] + margin)
    return losses_BGG.where(is_triplet_BGG, 0).sum() / is_triplet_BGG.sum().clamp(min=1)


def listwise_cross_entropy(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 1.0, similarity: str = "dot", windows: str = "max"
) -> Tensor:
    """Mean over queries of -log softmax(s / temperature) at a positive, over it and the query's hard negatives; for
    several positives the mean of theirs. Queries without a positive or without a negative count as 0.

    s is the similarity: for a cross-encoder (encoders/scoring.py) its logit.

    Source: Gao et al. 2021 (Rethink training of BERT rerankers), equation 3, localized contrastive estimation."""
    check_number("temperature", temperature, above=0)
    targets.check_several("listwise_cross_entropy")
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows) / temperature
    positive_BG, lowest = targets.listed_positive, torch.finfo(scores_BG.dtype).min / 2
    negatives_B1 = scores_BG.masked_fill(~targets.listed_negative, lowest).logsumexp(dim=1, keepdim=True)
    losses_BG = torch.logaddexp(scores_BG, negatives_B1) - scores_BG
    losses_B = losses_BG.where(positive_BG, 0).sum(dim=1) / positive_BG.sum(dim=1).clamp(min=1)
    return losses_B.where(targets.listed_negative.any(dim=1), 0).mean()


def binary_cross_entropy(
    Q: Tensor, D: Tensor, targets: Targets, *, scale: float = 1.0, similarity: str = "dot", windows: str = "max"
) -> Tensor:
    """Mean over listed pairs of -log sigmoid(scale * s) for positives and -log sigmoid(-scale * s) for negatives.
    s is as in `listwise_cross_entropy`.
    Source: Nogueira and Cho 2019 (Passage re-ranking with BERT), section 2, without its sums; equals
    sentence-transformers' BinaryCrossEntropyLoss for cross-encoders."""
    check_number("scale", scale, above=0)
    scores_BG = scale * listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    positive_BG, negative_BG = targets.listed_positive, targets.listed_negative
    total = F.softplus(-scores_BG).where(positive_BG, 0).sum() + F.softplus(scores_BG).where(negative_BG, 0).sum()
    return total / (positive_BG.sum() + negative_BG.sum()).clamp(min=1)


def contrastive(
    Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 0.5, distance: str = "cosine", reduction: str = "mean"
) -> Tensor:
    """Mean over pairs of d^2 / 2 if the pair is positive, max(0, margin - d)^2 / 2 if it is negative.
    Without `relevance`, a query lists a positive first and then hard negatives; with it, grades decide.
    Source: Hadsell et al. 2006, equation 4; equals sentence-transformers' ContrastiveLoss."""
    check_number("margin", margin, least=0)
    check_one_of("reduction", reduction, ("mean", "sum"))
    positive_P, negative_P = _pair_distances(Q, D, targets, distance, "contrastive")
    total = positive_P.square().sum() + F.relu(margin - negative_P).square().sum()
    return total / 2 / (max(len(positive_P) + len(negative_P), 1) if reduction == "mean" else 1)


def online_contrastive(
    Q: Tensor, D: Tensor, targets: Targets, *, margin: float = 0.5, distance: str = "cosine"
) -> Tensor:
    """Sum over hard pairs of d^2 if the pair is positive, max(0, margin - d)^2 if it is negative. Coupled.

    A positive pair is hard when it is farther apart than the closest negative pair of the batch, a negative pair when
    it is closer than the farthest positive pair. Without pairs of the other kind, those worse than the mean are hard.

    Source: sentence-transformers' OnlineContrastiveLoss: Hadsell et al. 2006, equation 4, over the hard pairs."""
    check_number("margin", margin, least=0)
    positive_P, negative_P = _pair_distances(Q, D, targets, distance, "online_contrastive")
    furthest_positive = positive_P.max() if len(positive_P) else negative_P.mean()
    nearest_negative = negative_P.min() if len(negative_P) else positive_P.mean()
    hard_positive_P = positive_P[positive_P > nearest_negative]
    hard_negative_P = negative_P[negative_P < furthest_positive]
    return hard_positive_P.square().sum() + F.relu(margin - hard_negative_P).square().sum()


def cosine_mse(Q: Tensor, D: Tensor, targets: Targets, *, pairs: str = "first", windows: str = "max") -> Tensor:
    """Mean over pairs of (cos(q, d) - gold)^2, gold from -1 to 1.
    Source: Reimers and Gurevych 2019 (Sentence-BERT), section 3, regression objective; the same as
    sentence-transformers' CosineSimilarityLoss."""
    scores_BG = listed_scores(Q, D, targets, windows=windows, as_pairs=True)
    scores_P, gold_P = _scored_pairs(scores_BG, targets, "cosine_mse", pairs)
    return (scores_P - gold_P).square().sum() / max(len(gold_P), 1)


def cosent(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    scale: float = 20.0,
    similarity: str = "cosine",
    pairs: str = "first",
    windows: str = "max",
) -> Tensor:
    """log(1 + sum over pairs a, b with gold_a < gold_b of exp(scale * (s_a - s_b))): of gold, only the order counts.
    Coupled: each pair is compared with every pair of a different gold score, in the time and memory of a sort.
    Source: Huang et al. 2024 (CoSENT), its ranking loss; equals sentence-transformers' CoSENTLoss."""
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    return _cosent(*_scored_pairs(scores_BG, targets, "cosent", pairs), scale)


def angle(
    Q: Tensor, D: Tensor, targets: Targets, *, scale: float = 20.0, pairs: str = "first", windows: str = "max"
) -> Tensor:
    """`cosent` with s = |q1.d1 + q2.d2 + q2.d1 - q1.d2|, the halves of unit vectors taken as complex numbers.

    The gradient of a cosine vanishes near 1 and -1; that of the angle does not. An odd number of features is padded
    with a zero. For a positive of score y, sentence-transformers takes all pairs and scores negatives 1 - y.

    Source: Li and Li 2023 (AnglE), angle objective; equals sentence-transformers' AnglELoss, which follows the
    authors' code in the sign of the imaginary part and the absolute value."""
    Q, D = (F.normalize(F.pad(float32_or_64(x), (0, x.shape[1] % 2)), dim=1) for x in (Q, D))
    first, second = D.chunk(2, dim=1)
    turned = torch.cat([first - second, first + second], dim=1)
    of_pairs, of_all = (lambda q, d: (q * d).sum(dim=2).abs()), (lambda q, d: (q @ d.T).abs())
    scores_BG = _listed(of_pairs, of_all, Q, turned, targets, windows)
    return _cosent(*_scored_pairs(scores_BG, targets, "angle", pairs), scale)


def listed_scores(
    Q: Tensor, D: Tensor, targets: Targets, *, similarity: str = "cosine", windows: str = "max", as_pairs: bool = False
) -> Tensor:
    """Similarity of every query with the documents listed for it, [B, G]; `as_pairs` as in `comparable`."""
    Q, D = comparable(Q, D, similarity, as_pairs=as_pairs)
    return _listed(lambda q, d: (q * d).sum(dim=2), lambda q, d: q @ d.T, Q, D, targets, windows)


def _listed(of_pairs: Scores, of_all: Scores, Q: Tensor, D: Tensor, targets: Targets, windows: str = "max") -> Tensor:
    """Scores of every query with the documents listed for it, [B, G]; arbitrary where none is listed.
    Calls of_pairs(Q [B, 1, D], D [B, G, D]) or, if documents have windows, of_all(Q [R, D], D [C, D])."""
    check_one_of("windows", windows, WINDOWS)
    targets.check_queries(Q)
    if targets.document is None:
        targets.num_documents(len(D))
        return of_pairs(Q[:, None], D[targets.group.clamp(min=0)])

    def best(Q_R: Tensor, D: Tensor, targets: Targets) -> tuple[Tensor]:
        return (over_windows(of_all(Q_R, D), targets, windows=windows).gather(1, targets.group.clamp(min=0)),)

    return by_rows(best, Q, D, targets, None)[0]


def listed_targets(targets: Targets, loss: str, like: Tensor) -> Tensor:
    """`target_scores`, [B, G], detached, in dtype and device of `like`. Raises `ValueError` if there are none."""
    if targets.target_scores is None:
        raise ValueError(f"{loss} needs target_scores: the data has no scores for the listed documents")
    return targets.target_scores.detach().to(like)


def _pair_distances(Q: Tensor, D: Tensor, targets: Targets, distance: str, loss: str) -> tuple[Tensor, Tensor]:
    """Distances of the positive and of the negative pairs, each [P]."""
    if targets.relevance is None:
        targets.check_several(loss)
    distances_BG = _listed_distances(Q, D, targets, distance, as_pairs=True)
    return distances_BG[targets.listed_positive], distances_BG[targets.listed_negative]


def _listed_distances(Q: Tensor, D: Tensor, targets: Targets, distance: str, *, as_pairs: bool = False) -> Tensor:
    """Distance of every query from the documents listed for it, [B, G]; arbitrary where none is listed."""
    check_one_of("distance", distance, ("cosine", "euclidean", "manhattan"))
    if distance == "cosine":
        return 1 - listed_scores(Q, D, targets, as_pairs=as_pairs)
    order = 2 if distance == "euclidean" else 1
    nearness = (
        (lambda q, d: -torch.linalg.vector_norm(q - d, ord=order, dim=2)),
        (lambda q, d: -torch.cdist(q, d, p=order, compute_mode="donot_use_mm_for_euclid_dist")),
    )
    # Like the reference, for pairs but not for triplets: torch.pairwise_distance adds 1e-6 to every difference.
    return -_listed(*nearness, float32_or_64(Q) + (1e-6 if as_pairs else 0.0), float32_or_64(D), targets)


def _scored_pairs(scores_BG: Tensor, targets: Targets, loss: str, pairs: str) -> tuple[Tensor, Tensor]:
    """Score and gold score of every pair, each [P]."""
    check_one_of("pairs", pairs, ("first", "all"))
    gold_BG, is_listed_BG = listed_targets(targets, loss, scores_BG), targets.group >= 0
    if pairs == "first":
        scores_BG, gold_BG, is_listed_BG = scores_BG[:, :1], gold_BG[:, :1], is_listed_BG[:, :1]
    return scores_BG[is_listed_BG], gold_BG[is_listed_BG]


def _cosent(scores_P: Tensor, gold_P: Tensor, scale: float) -> Tensor:
    check_number("scale", scale, above=0)
    gold_P, order_P = gold_P.sort()
    scores_P = scores_P[order_P] * scale
    # For each a, the sum over all b with a higher gold score: once sorted, these are the last pairs.
    higher_P = torch.searchsorted(gold_P, gold_P, right=True)
    sums_P = (-scores_P).flip(0).logcumsumexp(dim=0).flip(0)
    terms_P = scores_P + F.pad(sums_P, (0, 1), value=float("-inf"))[higher_P]
    return F.pad(terms_P, (1, 0)).logsumexp(dim=0)
