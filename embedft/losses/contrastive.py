"""Contrastive losses: bring a query closer to its own document than to the batch's other documents.

    loss = in_batch_negatives(Q, D, targets, directions=("query_document", "document_query"))
    loss = sigmoid(Q, D, targets)                       # every pair on its own instead of a softmax
    loss = global_orthogonal(Q, D, targets)             # a regulariser: spreads unrelated texts

`similarity` and `windows` are as in `scores`, `rows` as in `by_rows`. Losses with `rows` never hold all of [B, M].

Shapes: B queries, R of them at a time, M documents, C document vectors, G listed documents per query, D features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .components import record
from .rows import between_documents, by_rows, log_sum, mean_over_positives, mean_over_queries
from .targets import DIRECTIONS, Targets, check_number, check_one_of, comparable, scores

HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


@dataclass(frozen=True, kw_only=True)
class InBatch:
    """The options of `in_batch_negatives`.

    Each of the `directions` adds a sum to the partition of query q and positive p, over the negatives in that direction
    (`Targets.masks`):
    - query_document (always): exp(s(q, p)), and exp(s(q, n)) for documents n
    - document_query: exp(s(q, p)), and exp(s(r, p)) for queries r that p is not relevant to
    - query_query: exp(s(q, r)) for other queries r that have no positive in common with q
    - document_document: exp(s(p, n)) for other documents n that no query lists together with p
    Any direction beyond query_document couples the loss: the batch is evaluated as a whole."""

    similarity: str = "cosine"
    directions: Sequence[str] = ("query_document",)
    # "joint": one partition, summed over directions (the positive occurs in each of the first two). "per_direction",
    # for the first two only: a partition for each, and the mean of the losses over non-empty directions.
    partition: str = "joint"
    in_batch: bool = True  # False: the only negatives of a query are those listed for it
    # Which negatives of query_document have hardness_strength * sim (detached, not divided by the temperature) added
    # to s_n: "in_batch_negatives" (not listed for the query), "hard_negatives" (listed) or "all_negatives".
    hardness: str | None = None
    hardness_strength: float = 0.0
    # Leave the positive out of the partition: the loss may be below 0, and positives without negatives are skipped.
    decoupled: bool = False
    windows: str = "max"
    rows: int | None = None

    def __post_init__(self) -> None:
        for direction in self.directions:
            check_one_of("direction", direction, DIRECTIONS)
        if "query_document" not in self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError(f"directions is {list(self.directions)}, expected query_document and others, each once")
        check_one_of("partition", self.partition, ("joint", "per_direction"))
        if self.partition == "per_direction" and not {"query_query", "document_document"}.isdisjoint(self.directions):
            raise ValueError("partition is per_direction, but query_query and document_document have no positives")
        if len(self.directions) > 1 and (not self.in_batch or self.rows is not None):
            found = f"in_batch is {self.in_batch} and rows is {self.rows}"
            raise ValueError(f"{found}, but directions beyond query_document need the whole batch")
        if self.hardness is not None:
            check_one_of("hardness", self.hardness, HARDNESS)
            check_number("hardness_strength", self.hardness_strength, above=0)
        elif self.hardness_strength != 0:
            raise ValueError(f"hardness_strength is {self.hardness_strength} without hardness")

    def loss(self, Q: Tensor, D: Tensor, targets: Targets, temperature: float | Tensor) -> Tensor:
        """`in_batch_negatives` at a temperature."""
        if not self.in_batch:
            targets.check_several("in_batch=False")
        if len(Q) == 1 or len(self.directions) == 1:
            targets.warn_without_negatives(D)
        Q, D = comparable(Q, D, self.similarity)
        rows = self.rows if len(self.directions) == 1 else max(1, len(Q))
        return mean_over_queries(*by_rows(self.losses, Q, D, targets, rows, temperature))

    def losses(self, Q: Tensor, D: Tensor, targets: Targets, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """(loss of each query, whether it counts), each [B]."""
        similarity_BM = scores(Q, D, targets, similarity="dot", windows=self.windows)
        logits_BM, num_documents = similarity_BM / temperature, similarity_BM.shape[1]
        _, negative_BM = targets.masks(num_documents=num_documents)
        group_BG = targets.group.clamp(min=0)
        positives_BG = logits_BM.gather(1, group_BG)
        weighed_BM = logits_BM
        if self.hardness or not self.in_batch:
            hard_BM = torch.zeros_like(negative_BM)
            queries, places = targets.listed_negative.nonzero(as_tuple=True)
            hard_BM[queries, targets.group[queries, places]] = True
            negative_BM = negative_BM if self.in_batch else hard_BM
            chosen_BM = {"hard_negatives": hard_BM, "in_batch_negatives": negative_BM & ~hard_BM}
            penalty_BM = self.hardness_strength * similarity_BM.detach()
            weighed_BM = logits_BM + penalty_BM.where(chosen_BM.get(self.hardness, negative_BM), 0)
        sums_BG = {"query_document": log_sum(weighed_BM, negative_BM)[:, None].expand_as(positives_BG)}
        if "document_query" in self.directions:
            sums_BG["document_query"] = log_sum(logits_BM.T, negative_BM.T)[group_BG]
        if not self.decoupled:
            sums_BG = {direction: torch.logaddexp(positives_BG, sum_BG) for direction, sum_BG in sums_BG.items()}
        if "query_query" in self.directions:
            _, negative_BB = targets.masks("query_query")
            sums_BG["query_query"] = log_sum(Q @ Q.T / temperature, negative_BB)[:, None].expand_as(positives_BG)
        if "document_document" in self.directions:
            _, negative_MM = targets.masks("document_document", num_documents=num_documents)
            logits_MM = between_documents(D, targets, self.windows) / temperature
            sums_BG["document_document"] = log_sum(logits_MM, negative_MM)[group_BG]
        sums_SBG = torch.stack(list(sums_BG.values()))
        if self.partition == "joint":
            partition_BG = sums_SBG.logsumexp(dim=0)
        else:
            # When decoupled, a direction without negatives is minus infinity and left out of the mean.
            empty_SBG = sums_SBG.isneginf()
            num_BG = (~empty_SBG).sum(dim=0)
            partition_BG = sums_SBG.masked_fill(empty_SBG, 0).sum(dim=0) / num_BG.clamp(min=1)
            partition_BG = partition_BG.masked_fill(num_BG == 0, float("-inf"))
        return mean_over_positives(partition_BG - positives_BG, targets.listed_positive & ~partition_BG.isneginf())


def in_batch_negatives(Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.05, **options: Any) -> Tensor:
    """Mean over queries of -log( exp(s_p) / (exp(s_p) + sum over negatives n of exp(s_n)) ), s = sim / temperature.

    Negatives are all documents of the batch not known to be relevant to the query: other queries' documents and
    everyone's hard negatives. With several listed positives, it is the mean over them; none is a negative of another.
    Queries without a listed positive are skipped; if there are no others, the loss is 0. `temperature` is above 0
    (0.05 is the scale of 20 in sentence-transformers) or a scalar tensor; `options` are those of `InBatch`.

    Source: van den Oord et al. 2018 (InfoNCE), equation 4; Henderson et al. 2017, section 4.4. Directions: Li et al.
    2023 (GTE), section 3.3. Hardness: Lan et al. 2025 (LLaVE), equation 5; of hard negatives, Vera et al. 2025
    (EmbeddingGemma). Decoupled: Yeh et al. 2022 (DCL), equation 6. With one positive per query and no document listed
    twice it equals sentence-transformers' MultipleNegativesRankingLoss."""
    check_number("temperature", temperature, above=0)
    return InBatch(**options).loss(Q, D, targets, temperature)


def symmetric_in_batch_negatives(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.05, similarity: str = "cosine"
) -> Tensor:
    """The mean of `in_batch_negatives` from queries to documents and from documents to queries. Coupled. Equals
    sentence-transformers' MultipleNegativesSymmetricRankingLoss. Source: Günther et al. 2023 (Jina 2), section 4."""
    options = {"directions": ("query_document", "document_query"), "partition": "per_direction"}
    return in_batch_negatives(Q, D, targets, temperature=temperature, similarity=similarity, **options)


class LearnableTemperature(nn.Module):
    """`in_batch_negatives` with a learned temperature, which it records; `options` are those of `InBatch`.
    The parameter `log_temperature` itself is clamped to `minimum`, above 0, before every call, so it keeps a gradient.
    Source: Radford et al. 2021 (CLIP), section 2.5, where it starts at 0.07 and stays at 0.01 or above."""

    options_of = in_batch_negatives

    def __init__(self, *, temperature: float = 0.05, minimum: float = 0.01, **options: Any):
        super().__init__()
        check_number("minimum", minimum, above=0)
        check_number("temperature", temperature, least=minimum)
        self.in_batch = InBatch(**options)
        self.log_minimum = math.log(minimum)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        with torch.no_grad():
            self.log_temperature.clamp_(min=self.log_minimum)
        temperature = self.log_temperature.exp()
        record("temperature", temperature)
        return self.in_batch.loss(Q, D, targets, temperature)


def multi_positive(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.05, form: str = "out", **options: Any
) -> Tensor:
    """One softmax over all documents of the batch for all P positives of a query, listed or known.

    With Z = sum over all documents d of exp(s_d), including the other positives, the loss of a query is
    - out: mean over positives p of -log( exp(s_p) / Z ), which pulls all of them close
    - in: -log( mean over positives p of exp(s_p) / Z ), which one close positive satisfies
    Both are at least log P, skip queries without a positive, and with one positive each equal `in_batch_negatives`.

    Source: Khosla et al. 2020 (Supervised Contrastive Learning), equation 2 (out) and 3 (in)."""
    check_number("temperature", temperature, above=0)
    check_one_of("form", form, ("out", "in"))
    targets.warn_without_negatives(D)

    def losses(scores_RM: Tensor, positive_RM: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        logits_RM, num_positives_R = scores_RM / temperature, positive_RM.sum(dim=1)
        if form == "out":
            gain_R = logits_RM.where(positive_RM, 0).sum(dim=1) / num_positives_R.clamp(min=1)
        else:
            gain_R = log_sum(logits_RM, positive_RM) - num_positives_R.clamp(min=1).to(logits_RM).log()
        return (logits_RM.logsumexp(dim=1) - gain_R).where(num_positives_R > 0, 0), num_positives_R > 0

    return mean_over_queries(*_by_scores(losses, Q, D, targets, temperature, **options))


def sigmoid(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.1, bias: float = -10.0, **options: Any
) -> Tensor:
    """-1/B times the sum over queries q and documents d of log sigmoid( z (sim(q, d) / temperature + bias) ).
    z is 1 where d is a positive of q, listed or known, and -1 elsewhere; the bias makes up for the many negatives.
    Source: Zhai et al. 2023 (SigLIP), section 3.2, with its initial temperature and bias."""
    check_number("temperature", temperature, above=0)
    check_number("bias", bias)

    def losses(scores_RM: Tensor, positive_RM: Tensor, temperature: float, bias: float) -> tuple[Tensor]:
        logits_RM = scores_RM / temperature + bias
        return (-F.logsigmoid(logits_RM.where(positive_RM, -logits_RM)).sum(dim=1),)

    return _by_scores(losses, Q, D, targets, temperature, bias, **options)[0].sum() / max(len(Q), 1)


def _by_scores(
    losses: Callable[..., tuple[Tensor, ...]],
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *parameters: Tensor | float,
    similarity: str = "cosine",
    windows: str = "max",
    rows: int | None = None,
) -> tuple[Tensor, ...]:
    """`by_rows` of losses(scores [R, M], which of them are positives [R, M], *parameters)."""

    def of_rows(Q_R: Tensor, D: Tensor, targets: Targets, *parameters: Tensor | float) -> tuple[Tensor, ...]:
        scores_RM = scores(Q_R, D, targets, similarity="dot", windows=windows)
        return losses(scores_RM, targets.masks(num_documents=scores_RM.shape[1])[0], *parameters)

    return by_rows(of_rows, *comparable(Q, D, similarity), targets, rows, *parameters)


in_batch_negatives.options_of = InBatch
multi_positive.options_of = sigmoid.options_of = _by_scores


class LearnableSigmoid(nn.Module):
    """`sigmoid` with a learned temperature (parameter `log_temperature`) and bias; records both.
    Source: Zhai et al. 2023 (SigLIP), section 3.2 and algorithm 1."""

    options_of = sigmoid

    def __init__(self, *, temperature: float = 0.1, bias: float = -10.0, **options: Any):
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_number("bias", bias)
        self.options = options
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        temperature = self.log_temperature.exp()
        record("temperature", temperature)
        record("bias", self.bias)
        return sigmoid(Q, D, targets, temperature=temperature, bias=self.bias, **self.options)


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

    m1 and m2 are the means of sim(x, y) and of its square over the unrelated pairs of a set, the negatives of
    `Targets.masks`. The sets are the queries, the documents listed first, those listed second, and so on, each document
    once per set; `aggregation` is over the sets. A weight of None is 0. Coupled.

    Source: Zhang et al. 2017 (Learning Spread-out Local Feature Descriptors); Vera et al. 2025 (EmbeddingGemma). If all
    texts of a batch differ, it equals the terms of sentence-transformers' GlobalOrthogonalRegularizationLoss."""
    check_one_of("aggregation", aggregation, ("mean", "sum"))
    weights = mean_weight or 0.0, second_moment_weight or 0.0
    for name, weight in zip(("mean_weight", "second_moment_weight"), weights, strict=True):
        check_number(name, weight, least=0)
    if not any(weights):
        raise ValueError("mean_weight and second_moment_weight are both 0, expected one of them above 0")
    Q, D = comparable(Q, D, similarity)
    targets.check_queries(Q)
    document_C = torch.arange(len(D), device=D.device) if targets.document is None else targets.document
    _, unrelated_MM = targets.masks("document_document", num_documents=targets.num_documents(len(D)))
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
