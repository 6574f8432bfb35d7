"""Losses over the order of the documents listed for a query, each with its grade or a teacher's score.

    loss = approx_ndcg(Q, D, Targets(group=torch.tensor([[0, 2], [1, 3]])), temperature=0.1)
    loss = pearson(Q, D, Targets(group=torch.tensor([[0, 2, 3]]), target_scores=torch.tensor([[4.0, 1.0, 0.5]])))

A document's grade is that of `relevance`; without it, a positive has 1 and a hard negative 0. Documents known to be
relevant, but listed as hard negatives, are left out. With grades="target_scores" it is its target score, and none is
left out. `similarity` and `windows` are as in `scores`.

Shapes: B queries, C document vectors, G listed documents per query, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairwise import listed_scores, listed_targets
from .rows import mean_over_queries
from .targets import Targets, check_number, check_one_of


def approx_ndcg(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 0.1,
    gain: str = "graded",
    grades: str = "relevance",
    similarity: str = "dot",
    windows: str = "max",
) -> Tensor:
    """Mean over queries of 1 - (sum over documents i of g_i / log2(1 + r_i)) / (the same in the best order).

    The rank r_i = 1 + sum over other documents j of sigmoid((s_j - s_i) / temperature) tends to the true one as the
    temperature tends to 0. The gain g is the grade, at least 0 ("graded"), or 1 if it is above 0 ("binary"), as in
    retrieval/metrics.py, but over the listed documents alone. Queries whose gains are all equal are skipped.

    Source: Qin et al. 2010 (A general approximation framework for direct optimization of IR measures), section 4;
    Bruch et al. 2019 (Revisiting approximate metric optimization), who use the gain 2^grade - 1."""
    check_number("temperature", temperature, above=0)
    check_one_of("gain", gain, ("binary", "graded"))
    targets.check_several("approx_ndcg")
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    grades_BG, counts_BG = _listed_grades(targets, "approx_ndcg", grades, scores_BG)
    gains_BG = (grades_BG > 0).to(scores_BG) if gain == "binary" else grades_BG.clamp(min=0)
    above_BGG = ((scores_BG[:, None, :] - scores_BG[:, :, None]) / temperature).sigmoid()  # [., i, j]: j above i
    ranks_BG = _ranks(above_BGG, counts_BG)
    dcg_B, best_B = (gains_BG / (1 + ranks_BG).log2()).sum(dim=1), _best_dcg(gains_BG)
    differs_B = ((gains_BG < gains_BG.amax(dim=1, keepdim=True)) & counts_BG).any(dim=1)
    return mean_over_queries(1 - dcg_B / best_B.where(differs_B, 1), differs_B)


def ranknet(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 1.0,
    weights: str = "none",
    grades: str = "relevance",
    similarity: str = "dot",
    windows: str = "max",
) -> Tensor:
    """Mean over a query's documents i, j with grade_i > grade_j of w * log(1 + exp((s_j - s_i) / temperature)).

    w is 1 or, with weights="ndcg", how much nDCG changes if i and j change places: |g_i - g_j| times
    |1 / log2(1 + r_i) - 1 / log2(1 + r_j)| over the DCG of the best order. The gain g is the grade, at least 0, and the
    rank r that of the current scores among the listed documents (a tie counts half), without gradient.

    Source: Burges et al. 2005 (Learning to rank using gradient descent), equation 3 for a certain order; the weights:
    Burges 2010 (From RankNet to LambdaRank to LambdaMART), section 4."""
    check_number("temperature", temperature, above=0)
    check_one_of("weights", weights, ("none", "ndcg"))
    targets.check_several("ranknet")
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    grades_BG, counts_BG = _listed_grades(targets, "ranknet", grades, scores_BG)
    is_pair_BGG = (grades_BG[:, :, None] > grades_BG[:, None, :]) & counts_BG[:, :, None] & counts_BG[:, None, :]
    losses_BGG = F.softplus((scores_BG[:, None, :] - scores_BG[:, :, None]) / temperature)
    if weights == "ndcg":
        losses_BGG = losses_BGG * _ndcg_changes(scores_BG.detach(), grades_BG.clamp(min=0), counts_BG)
    return losses_BGG.where(is_pair_BGG, 0).sum() / is_pair_BGG.sum().clamp(min=1)


def pearson(Q: Tensor, D: Tensor, targets: Targets, *, similarity: str = "dot", windows: str = "max") -> Tensor:
    """Mean over queries of 1 - r, the correlation of the similarities of the listed documents with `target_scores`.
    Neither scale nor offset of the target scores matters. r is 0 if all similarities are equal; queries whose target
    scores are all equal are skipped, and of two documents only the order is learned from, without a gradient.
    Source: Huang et al. 2022 (Knowledge distillation from a stronger teacher), section 3.2."""
    targets.check_several("pearson")
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    wanted_BG, counts_BG = _listed_grades(targets, "pearson", "target_scores", scores_BG)
    scores_BG, wanted_BG = (_standardized(x, counts_BG) for x in (scores_BG, wanted_BG))
    return mean_over_queries(1 - (scores_BG * wanted_BG).sum(dim=1), wanted_BG.any(dim=1))


def _listed_grades(targets: Targets, loss: str, grades: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """(grades of the listed documents, 0 where there is none; which of them count), each [B, G]."""
    check_one_of("grades", grades, ("relevance", "target_scores"))
    counts_BG = targets.group >= 0
    if grades == "target_scores":
        found_BG = listed_targets(targets, loss, like)
    else:
        positive_BG = targets.listed_positive
        counts_BG = counts_BG & (positive_BG | targets.listed_negative)
        found_BG = (positive_BG if targets.relevance is None else targets.relevance).to(like)
    # Where nothing is listed the teacher's score may be anything, even NaN.
    return found_BG.where(counts_BG, 0), counts_BG


def _ranks(above_BGG: Tensor, counts_BG: Tensor) -> Tensor:
    """1 + how many of the other documents are above each, [B, G], from `above` [., i, j]: how far j is above i."""
    is_same_GG = torch.eye(counts_BG.shape[1], dtype=torch.bool, device=counts_BG.device)
    return 1 + above_BGG.where(counts_BG[:, None, :] & ~is_same_GG, 0).sum(dim=2)


def _best_dcg(gains_BG: Tensor) -> Tensor:
    """The DCG of the best order, [B]."""
    places_G = torch.arange(gains_BG.shape[1], device=gains_BG.device)
    return (gains_BG.sort(dim=1, descending=True)[0] / (places_G + 2).to(gains_BG).log2()).sum(dim=1)


def _ndcg_changes(scores_BG: Tensor, gains_BG: Tensor, counts_BG: Tensor) -> Tensor:
    """How much nDCG changes if two documents change places, [B, G, G]."""
    above_BGG = ((scores_BG[:, None, :] - scores_BG[:, :, None]).sign() + 1) / 2
    discounts_BG = 1 / (1 + _ranks(above_BGG, counts_BG)).log2()
    gain_BGG, discount_BGG = ((x[:, :, None] - x[:, None, :]).abs() for x in (gains_BG, discounts_BG))
    best_B = _best_dcg(gains_BG)
    return gain_BGG * discount_BGG / best_B.where(best_B > 0, 1)[:, None, None]


def _standardized(x_BG: Tensor, counts_BG: Tensor) -> Tensor:
    """The numbers of each row that count, less their mean and scaled to unit length (as they are if nearly equal)."""
    # Less the smallest first, so that equal numbers become 0 rather than rounding errors.
    smallest_B1 = x_BG.detach().masked_fill(~counts_BG, float("inf")).amin(dim=1, keepdim=True)
    x_BG = (x_BG - smallest_B1).where(counts_BG, 0)
    mean_B1 = x_BG.sum(dim=1, keepdim=True) / counts_BG.sum(dim=1, keepdim=True).clamp(min=1)
    centred_BG = (x_BG - mean_B1).where(counts_BG, 0)
    length_B1 = torch.linalg.vector_norm(centred_BG, dim=1, keepdim=True)
    return centred_BG / length_B1.where(length_B1 > 1e-12, 1)
