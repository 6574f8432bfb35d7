"""In-batch negatives, except those that a guide (another embedding model) considers positives.

    targets = Targets(group=group_BG, references={"guide": (guide_Q, guide_D)})
    loss = guided_in_batch_negatives(Q, D, targets, margin=0.05, margin_strategy="relative")

Shapes: B queries, R of them at a time, M documents, C document vectors, G listed documents per query that can be
positives, D features, E features of the guide, N negatives of any kind.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .components import record
from .rows import between_documents, by_rows, mean_over_positives, mean_over_queries
from .targets import Targets, check_number, check_one_of, comparable, scores


def guided_in_batch_negatives(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.01, **options: Any
) -> Tensor:
    """-log( exp(s(q, p)) / (exp(s(q, p)) + sums of exp(s) over negatives) ), mean over queries, s = cos / temperature.

    The sums run over
    - s(q, n), n the other documents, including hard negatives
    - s(q, r), r the other queries, with `contrast_queries`
    - s(p, n), n the positives of other queries, with `contrast_positives`
    in each case the negatives of `Targets.masks`, without those whose cosine according to the guide exceeds
    g - margin (absolute) or g - |g| * margin (relative), with g = the guide's cosine of q and p. With several listed
    positives, it is the mean over them. Records `masked_negatives`, the share of negatives that the guide removes.

    The guide's vectors are `references["guide"]`, ([B, E], [C, E]); `options` are those of `_Guided`.

    Source: Solatorio 2024 (GISTEmbed), section 3; margins: Moreira et al. 2024 (NV-Retriever), section 3. With one
    positive per query and no document listed twice, it equals sentence-transformers' GISTEmbedLoss, which excludes the
    similarity of a text with itself only because the guide gives it 1."""
    check_number("temperature", temperature, above=0)
    guided = _Guided(**options)
    if len(Q) == 1 or not guided.contrast_queries:
        targets.warn_without_negatives(D)
    guide = comparable(*targets.reference("guide", Q, D), "cosine", as_pairs=True)
    Q, D = comparable(Q, D, "cosine", as_pairs=True)
    targets, rows = replace(targets, references={"guide": guide}), guided.rows
    if guided.contrast_queries or guided.contrast_positives:
        rows = max(1, len(Q))
    # How many columns of `group` can hold a positive; each takes a row of scores per query.
    width = targets.group.shape[1] if targets.relevance is not None else 1
    losses_B, counts_B, masked_B, num_B = by_rows(guided.losses, Q, D, targets, rows, temperature, width, width=width)
    record("masked_negatives", masked_B.sum() / num_B.sum().clamp(min=1))
    return mean_over_queries(losses_B, counts_B)


@dataclass(frozen=True, kw_only=True)
class _Guided:
    """The options of `guided_in_batch_negatives`; either contrast couples it: the batch is evaluated as a whole."""

    margin_strategy: str = "absolute"
    margin: float = 0.0  # 0 removes negatives that the guide scores above the positive; larger removes more
    contrast_queries: bool = True
    contrast_positives: bool = True
    windows: str = "max"  # as in `scores`, for the guide too
    rows: int | None = None  # as in `by_rows`

    def __post_init__(self) -> None:
        check_one_of("margin_strategy", self.margin_strategy, ("absolute", "relative"))
        check_number("margin", self.margin)
        if self.rows is not None and (self.contrast_queries or self.contrast_positives):
            raise ValueError(f"rows is {self.rows}, but contrast_queries and contrast_positives need the whole batch")

    def losses(self, Q: Tensor, D: Tensor, targets: Targets, temperature: float, width: int) -> tuple[Tensor, ...]:
        """(loss of each query, whether it counts, number of masked negatives, number of negatives), each [R]."""
        guide_Q, guide_D = targets.references["guide"]
        logits_RM = scores(Q, D, targets, similarity="dot", windows=self.windows) / temperature
        guide_RM = scores(guide_Q, guide_D, targets, similarity="dot", windows=self.windows)
        num_documents = logits_RM.shape[1]
        group_RG, is_positive_RG = targets.group[:, :width].clamp(min=0), targets.listed_positive[:, :width]
        positives_RG, guide_RG = logits_RM.gather(1, group_RG), guide_RM.gather(1, group_RG)
        limits_RG = guide_RG - (self.margin if self.margin_strategy == "absolute" else guide_RG.abs() * self.margin)
        # (logits, the guide's scores, negatives), with a row for each query; rows for documents are picked below.
        of_queries = [(logits_RM, guide_RM, targets.masks(num_documents=num_documents)[1])]
        if self.contrast_queries:
            of_queries.append((Q @ Q.T / temperature, guide_Q @ guide_Q.T, targets.masks("query_query")[1]))
        of_documents = []
        if self.contrast_positives:
            _, negative_MM = targets.masks("document_document", num_documents=num_documents)
            is_positive_M = torch.zeros(num_documents, dtype=torch.bool, device=negative_MM.device)
            is_positive_M[targets.group[targets.listed_positive]] = True
            logits_MM, guide_MM = (between_documents(x, targets, self.windows) for x in (D, guide_D))
            of_documents.append((logits_MM / temperature, guide_MM, negative_MM & is_positive_M))
        partition_G, num_masked_R, num_R = [], 0, 0
        columns = (x_RG.unbind(dim=1) for x_RG in (group_RG, limits_RG, positives_RG, is_positive_RG))
        for column_R, limit_R, positive_R, is_positive_R in zip(*columns, strict=True):
            kinds = of_queries + [tuple(x[column_R] for x in documents) for documents in of_documents]
            logits_RN, guide_RN, negative_RN = (torch.cat(x, dim=1) for x in zip(*kinds, strict=True))
            masked_RN = negative_RN & (guide_RN > limit_R[:, None])
            kept_RN = logits_RN.masked_fill(~negative_RN | masked_RN, float("-inf"))
            partition_G.append(torch.cat([positive_R[:, None], kept_RN], dim=1).logsumexp(dim=1))
            num_masked_R = num_masked_R + masked_RN.sum(dim=1) * is_positive_R
            num_R = num_R + negative_RN.sum(dim=1) * is_positive_R
        return *mean_over_positives(torch.stack(partition_G, dim=1) - positives_RG, is_positive_RG), num_masked_R, num_R


guided_in_batch_negatives.options_of = _Guided
