"""Contrastive losses: a query nearer to its own document than to the others.

    loss = in_batch_negatives(Q, D, targets, temperature=0.05)

Shapes: B queries, M documents, G listed documents a query.
"""

import torch
from torch import Tensor

from .targets import Targets, scores


def in_batch_negatives(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.05, similarity: str = "cosine"
) -> Tensor:
    """Mean over queries of -log( exp(s_p) / (exp(s_p) + sum over negatives n of exp(s_n)) ), s = sim / temperature.

    Negatives are all documents of the batch that are not known to be relevant to the query: other queries' documents
    and everybody's hard negatives. A query with several listed positives has the mean over them, none of them a
    negative of another. A query without a listed positive counts nowhere.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [M, D].
        targets: what is relevant to whom.
        temperature: above 0; 0.05 is the scale of 20 of sentence-transformers.
        similarity: "cosine" or "dot".

    Returns:
        A scalar, at least 0; 0 when no query has a positive.

    Source: van den Oord et al. 2018 (InfoNCE), equation 4; Henderson et al. 2017, section 4.4. With one positive a
    query and no document listed twice it equals sentence-transformers' MultipleNegativesRankingLoss.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected above 0")
    scores_BM = scores(Q, D, similarity=similarity) / temperature
    _, negative_BM = targets.masks(num_documents=len(D))
    negatives_B = scores_BM.masked_fill(~negative_BM, float("-inf")).logsumexp(dim=1)
    positives_BG = scores_BM.gather(1, targets.group.clamp(min=0))
    losses_BG = torch.logaddexp(positives_BG, negatives_B[:, None]) - positives_BG
    is_positive_BG = targets.listed_positive
    num_positives_B = is_positive_BG.sum(dim=1)
    losses_B = losses_BG.where(is_positive_BG, 0).sum(dim=1) / num_positives_B.clamp(min=1)
    return losses_B.sum() / (num_positives_B > 0).sum().clamp(min=1)
