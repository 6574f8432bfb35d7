"""Regularisers: terms added to a loss by `sum` that say where vectors should not go.

    loss = build_loss({"name": "sum", "losses": [{"name": "in_batch_negatives"}, {"name": "toward_base"}],
                       "weights": [1.0, 0.1]})

Shapes: B queries, C document vectors of M documents, G listed documents per query, N vectors, D features.
"""

import torch
from torch import Tensor

from .checks import check_finite, check_one_of
from .distillation import distance_to_reference
from .targets import Targets, comparable

AGGREGATIONS = ("mean", "sum")


def toward_base(Q: Tensor, D: Tensor, targets: Targets, *, distance: str = "cosine", truncate: bool = False) -> Tensor:
    """Mean distance of the vectors from those of the model before training, which preserves what the base knew.

    The base model's vectors are `references["base"]`, ([B, E], [C, E]); options are those of `embedding_distillation`.
    Before the first step, without dropout, it is 0; under Matryoshka, which scales vectors to unit length after
    truncation but not references, only for "cosine".

    Source: Li and Hoiem 2016 (Learning without Forgetting), section 3, with vectors as the outputs.
    """
    return distance_to_reference(Q, D, targets, reference="base", distance=distance, truncate=truncate)


def global_orthogonal(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    similarity: str = "cosine",
    mean_weight: float | None = 1.0,
    second_moment_weight: float | None = 1.0,
    aggregation: str = "mean",
) -> Tensor:
    """Spreads unrelated vectors: mean_weight * m1^2 + second_moment_weight * max(0, m2 - 1/D).

    m1 and m2 are the means of sim(x, y) and of its square over the unrelated pairs of a set, those that `Targets.masks`
    calls negatives. The sets are the queries, the first listed documents, the second listed ones, and so on, each
    document once; `aggregation` is over the sets. A weight of None is 0. Coupled.

    Source: Zhang et al. 2017 (Learning Spread-out Local Feature Descriptors); Vera et al. 2025 (EmbeddingGemma). If all
    texts of a batch differ it equals the terms of sentence-transformers' GlobalOrthogonalRegularizationLoss.
    """
    check_one_of("aggregation", aggregation, AGGREGATIONS)
    weights = mean_weight or 0.0, second_moment_weight or 0.0
    for name, weight in zip(("mean_weight", "second_moment_weight"), weights, strict=True):
        check_finite(name, weight, least=0)
    if not any(weights):
        raise ValueError("mean_weight and second_moment_weight are both 0, expected one of them above 0")
    Q, D = comparable(Q, D, similarity)
    targets.check_queries(Q)
    num_documents = targets.num_documents(len(D))
    document_C = torch.arange(len(D), device=D.device) if targets.document is None else targets.document
    _, unrelated_MM = targets.masks("document_document", num_documents=num_documents)
    sets = [(Q, targets.masks("query_query")[1])]
    for group_B in targets.group.unbind(dim=1):
        is_listed_C = torch.isin(document_C, group_B)
        if is_listed_C.any():
            documents = document_C[is_listed_C]
            sets.append((D[is_listed_C], unrelated_MM[documents][:, documents]))
    terms = []
    for X, unrelated_NN in sets:
        similarity_NN = (X @ X.T).masked_fill(~unrelated_NN, 0)
        num_pairs = unrelated_NN.sum().clamp(min=1)
        first, second = similarity_NN.sum() / num_pairs, similarity_NN.square().sum() / num_pairs
        terms.append(weights[0] * first.square() + weights[1] * (second - 1 / X.shape[1]).relu())
    return torch.stack(terms).sum() if aggregation == "sum" else torch.stack(terms).mean()
