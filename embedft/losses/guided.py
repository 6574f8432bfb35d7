"""In-batch negatives without those that a guide, another embedding model, takes for positives.

    targets = Targets(group=group_BG, references={"guide": (guide_Q, guide_D)})
    loss = guided_in_batch_negatives(Q, D, targets, margin=0.05, margin_strategy="relative")

Not here: running the guide; its vectors are data.

Shapes: B queries, M documents, C document vectors, G listed documents a query, D features, E features of the guide.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .rows import (
    between_documents,
    by_rows,
    check_above_zero,
    check_finite,
    check_one_of,
    comparable,
    mean_over_positives,
    mean_over_queries,
)
from .targets import Targets, scores

MARGIN_STRATEGIES = ("absolute", "relative")


def guided_in_batch_negatives(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_queries: bool = True,
    contrast_positives: bool = True,
    windows: str = "max",
    rows: int | None = None,
) -> Tensor:
    """-log( exp(s(q, p)) / (exp(s(q, p)) + sums of exp(s) over negatives) ), mean over queries, s = cos / temperature.

    The sums are over
    - s(q, n), n the other documents, hard negatives among them
    - s(q, r), r the other queries, with `contrast_queries`
    - s(p, n), n the positives of other queries, with `contrast_positives`
    in each case negatives by `Targets.masks`, and without those whose cosine by the guide is above
    - absolute: g - margin
    - relative: g - |g| * margin
    with g = the guide's cosine of q and p. A query with several listed positives has the mean over them.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: `references["guide"]` are the guide's vectors of both, ([B, E], [C, E]).
        temperature: above 0.
        margin_strategy: "absolute" or "relative".
        margin: 0 leaves out what the guide finds nearer than the positive; more leaves out more.
        contrast_queries: whether queries are pushed from queries.
        contrast_positives: whether positives are pushed from each other. With either of the two the loss is coupled:
            the batch is evaluated whole.
        windows: "max" or "softmax" over the windows of a document, as in `scores`, of the guide's too.
        rows: queries at a time, when neither of the two is set; None: as many as make half a million scores.

    Returns:
        A scalar, at least 0; 0 when no query has a positive.

    Source: Solatorio 2024 (GISTEmbed), section 3; margins: Moreira et al. 2024 (NV-Retriever), section 3. With one
    positive a query and no document listed twice it equals sentence-transformers' GISTEmbedLoss, which leaves out a
    text's similarity with itself by the guide's 1 alone.
    """
    check_above_zero("temperature", temperature)
    check_one_of("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
    check_finite("margin", margin)
    if "guide" not in targets.references:
        found = ", ".join(targets.references) or "none"
        raise ValueError(f"guided_in_batch_negatives needs references['guide']; there are: {found}")
    targets.check_queries(Q)
    if [len(x) for x in targets.references["guide"]] != [len(Q), len(D)]:
        guide_Q, guide_D = targets.references["guide"]
        raise ValueError(
            f"references['guide'] has {len(guide_Q)} queries and {len(guide_D)} documents, "
            f"the batch {len(Q)} and {len(D)}"
        )
    coupled = contrast_queries or contrast_positives
    if coupled and rows is not None:
        raise ValueError(f"rows is {rows}, but contrast_queries and contrast_positives evaluate the batch whole")

    # Only these columns can hold a positive, and each takes a row of scores a query.
    width = targets.group.shape[1] if targets.relevance is not None else 1

    def losses(Q: Tensor, D: Tensor, targets: Targets, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        guide_Q, guide_D = targets.references["guide"]
        logits_BM = scores(Q, D, targets, similarity="dot", windows=windows) / temperature
        guide_BM = scores(guide_Q, guide_D, targets, similarity="dot", windows=windows)
        num_documents = logits_BM.shape[1]
        group_BG = targets.group[:, :width].clamp(min=0)
        positives_BG, guide_BG = logits_BM.gather(1, group_BG), guide_BM.gather(1, group_BG)
        limits_BG = guide_BG - (margin if margin_strategy == "absolute" else guide_BG.abs() * margin)

        # (logits, what the guide says, negatives), with a row for each query; documents' rows are picked below.
        of_queries = [(logits_BM, guide_BM, targets.masks(num_documents=num_documents)[1])]
        if contrast_queries:
            of_queries.append((Q @ Q.T / temperature, guide_Q @ guide_Q.T, targets.masks("query_query")[1]))
        of_documents = []
        if contrast_positives:
            _, negative_MM = targets.masks("document_document", num_documents=num_documents)
            is_positive_M = torch.zeros(num_documents, dtype=torch.bool, device=negative_MM.device)
            is_positive_M[targets.group[targets.listed_positive]] = True
            logits_MM, guide_MM = (between_documents(x, targets, windows) for x in (D, guide_D))
            of_documents.append((logits_MM / temperature, guide_MM, negative_MM & is_positive_M))

        partition_G = []
        for column_B, limit_B, positive_B in zip(
            group_BG.unbind(dim=1), limits_BG.unbind(dim=1), positives_BG.unbind(dim=1), strict=True
        ):
            picked = [tuple(x[column_B] for x in documents) for documents in of_documents]
            kept = [
                logits.masked_fill(~negative | (guide > limit_B[:, None]), float("-inf"))
                for logits, guide, negative in of_queries + picked
            ]
            partition_G.append(torch.cat([positive_B[:, None], *kept], dim=1).logsumexp(dim=1))
        losses_BG = torch.stack(partition_G, dim=1) - positives_BG
        return mean_over_positives(losses_BG, targets.listed_positive[:, :width])

    Q, D = comparable(Q, D, "cosine", as_pairs=True)
    guide = comparable(*targets.references["guide"], "cosine", as_pairs=True)
    targets = replace(targets, references={"guide": guide})
    if coupled:
        return mean_over_queries(*losses(Q, D, targets, temperature))
    return mean_over_queries(*by_rows(losses, Q, D, targets, rows, temperature, width=width))
