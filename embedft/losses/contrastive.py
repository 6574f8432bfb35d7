"""Contrastive losses: a query nearer to its own document than to the others of the batch.

    loss = in_batch_negatives(Q, D, targets, temperature=0.05)
    loss = in_batch_negatives(Q, D, targets, directions=("query_document", "document_query"))
    loss = LearnableTemperature(temperature=0.07)

A loss with the option `rows` is a sum over queries: it computes that many queries at a time, each again in the
backward pass, so that [B, M] is never whole in memory. Not here: losses of listed documents alone (pairwise.py), and
negatives that a guide leaves out (guided.py).

Shapes: B queries, R of them at a time, M documents, C document vectors, G listed documents a query, D features.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .components import record
from .rows import (
    between_documents,
    by_rows,
    check_above_zero,
    check_one_of,
    check_several,
    comparable,
    log_sum,
    mean_over_positives,
    mean_over_queries,
    warn_without_negatives,
)
from .targets import DIRECTIONS, Targets, scores

PARTITIONS = ("joint", "per_direction")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")
FORMS = ("out", "in")


def in_batch_negatives(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 0.05,
    similarity: str = "cosine",
    directions: Sequence[str] = ("query_document",),
    partition: str = "joint",
    in_batch: bool = True,
    hardness: str | None = None,
    hardness_strength: float = 0.0,
    decoupled: bool = False,
    windows: str = "max",
    rows: int | None = None,
) -> Tensor:
    """Mean over queries of -log( exp(s_p) / (exp(s_p) + sum over negatives n of exp(s_n)) ), s = sim / temperature.

    Negatives are all documents of the batch that are not known to be relevant to the query: other queries' documents
    and everybody's hard negatives. A query with several listed positives has the mean over them, none of them a
    negative of another. A query without a listed positive counts nowhere.

    Each of the `directions` brings a sum to the partition of query q and positive p, over what `Targets.masks` calls
    negatives of that direction:
    - query_document (always): exp(s(q, p)) and documents n, exp(s(q, n))
    - document_query: exp(s(q, p)) and queries r that p is not relevant to, exp(s(r, p))
    - query_query: other queries r, exp(s(q, r)); none that has a positive in common with q
    - document_document: other documents n, exp(s(p, n)); none that a query lists together with p
    `partition` "joint" adds them up in one partition (the positive is there twice with the first two); "per_direction"
    has a partition each and the mean of the losses (of those that are not empty), for the first two directions only.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: what is relevant to whom.
        temperature: above 0; 0.05 is the scale of 20 of sentence-transformers. A tensor of one number gets its
            gradient, here and in the other losses.
        similarity: "cosine" or "dot".
        directions: as above; any but query_document alone is coupled: the batch is evaluated whole.
        partition: "joint" or "per_direction".
        in_batch: False: the only negatives of a query are those listed for it; a batch that lists one document a
            query is an error then.
        hardness: which negatives of query_document get hardness_strength * sim, held constant and not divided by the
            temperature, added to s_n: "in_batch_negatives" (not listed for the query), "hard_negatives" (listed for
            it) or "all_negatives".
        hardness_strength: above 0 with `hardness`.
        decoupled: leaves the positive out of the partition. The loss may be below 0 then, and a positive without
            negatives counts nowhere.
        windows: "max" or "softmax" over the windows of a document, as in `scores`.
        rows: queries at a time; None: as many as make half a million scores.

    Returns:
        A scalar, at least 0 unless `decoupled`; 0 when no query has a positive.

    Source: van den Oord et al. 2018 (InfoNCE), equation 4; Henderson et al. 2017, section 4.4. Directions: Li et al.
    2023 (GTE), section 3.3. Hardness: Lan et al. 2025 (LLaVE), equation 5; of hard negatives, Vera et al. 2025
    (EmbeddingGemma). Decoupled: Yeh et al. 2022 (DCL), equation 6. With one positive a query and no document listed
    twice it equals sentence-transformers' MultipleNegativesRankingLoss.
    """
    options = {
        "similarity": similarity,
        "directions": directions,
        "partition": partition,
        "in_batch": in_batch,
        "hardness": hardness,
        "hardness_strength": hardness_strength,
        "decoupled": decoupled,
        "windows": windows,
        "rows": rows,
    }
    check_above_zero("temperature", temperature)
    _check_in_batch_options(**options)
    return _in_batch_negatives(Q, D, targets, temperature=temperature, **options)


def symmetric_in_batch_negatives(
    Q: Tensor, D: Tensor, targets: Targets, *, temperature: float = 0.05, similarity: str = "cosine"
) -> Tensor:
    """`in_batch_negatives` from queries to documents and from documents to queries: the mean of the two losses.

    Coupled: the batch is evaluated whole.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: what is relevant to whom.
        temperature: above 0.
        similarity: "cosine" or "dot".

    Returns:
        A scalar, at least 0.

    Source: Günther et al. 2023 (Jina Embeddings 2), section 4; the same as sentence-transformers'
    MultipleNegativesSymmetricRankingLoss, and as `in_batch_negatives` with these directions, "per_direction".
    """
    directions = ("query_document", "document_query")
    return in_batch_negatives(
        Q,
        D,
        targets,
        temperature=temperature,
        similarity=similarity,
        directions=directions,
        partition="per_direction",
    )


class LearnableTemperature(nn.Module):
    """`in_batch_negatives` at a temperature that is learned with the vectors.

    loss = LearnableTemperature(temperature=0.07, minimum=0.01)

    The parameter is `log_temperature`. It starts every call at `minimum` or above: what the optimiser took below is
    put back, so that its gradient goes on counting.

    Args:
        temperature: to begin with, at least `minimum`.
        minimum: above 0.
        similarity, directions, partition, in_batch, hardness, hardness_strength, decoupled, windows, rows: as of
            `in_batch_negatives`.

    Source: Radford et al. 2021 (CLIP), section 2.5: it begins at 0.07 and is kept at 0.01 or above.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        minimum: float = 0.01,
        similarity: str = "cosine",
        directions: Sequence[str] = ("query_document",),
        partition: str = "joint",
        in_batch: bool = True,
        hardness: str | None = None,
        hardness_strength: float = 0.0,
        decoupled: bool = False,
        windows: str = "max",
        rows: int | None = None,
    ):
        super().__init__()
        check_above_zero("minimum", minimum)
        if not minimum <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, expected at least the minimum of {minimum}, and finite")
        self.options = {
            "similarity": similarity,
            "directions": directions,
            "partition": partition,
            "in_batch": in_batch,
            "hardness": hardness,
            "hardness_strength": hardness_strength,
            "decoupled": decoupled,
            "windows": windows,
            "rows": rows,
        }
        _check_in_batch_options(**self.options)
        self.log_minimum = math.log(minimum)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        """A scalar."""
        with torch.no_grad():
            self.log_temperature.clamp_(min=self.log_minimum)
        temperature = self.log_temperature.exp()
        record("temperature", temperature)
        return _in_batch_negatives(Q, D, targets, temperature=temperature, **self.options)


def multi_positive(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 0.05,
    similarity: str = "cosine",
    form: str = "out",
    windows: str = "max",
    rows: int | None = None,
) -> Tensor:
    """One softmax over all documents of the batch, for all positives of a query alike, P of them, listed or known.

    With Z = sum over all documents d of exp(s_d), the other positives among them, the loss of a query is
    - out: mean over positives p of -log( exp(s_p) / Z ), which wants all of them near
    - in: -log( mean over positives p of exp(s_p) / Z ), which is content with one

    No positive is a first one, `relevance` counts as above 0 or not, and the loss of P positives is at least log P. A
    query without a positive counts nowhere. With one positive a query both are `in_batch_negatives`.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: what is relevant to whom.
        temperature: above 0.
        similarity: "cosine" or "dot".
        form: "out" or "in".
        windows: "max" or "softmax" over the windows of a document, as in `scores`.
        rows: queries at a time; None: as many as make half a million scores.

    Returns:
        A scalar, at least 0: the mean over queries.

    Source: Khosla et al. 2020 (Supervised Contrastive Learning), equation 2 (out) and 3 (in), between queries and
    documents.
    """
    check_above_zero("temperature", temperature)
    check_one_of("form", form, FORMS)
    warn_without_negatives(D, targets)
    Q, D = comparable(Q, D, similarity)

    def losses(Q_R: Tensor, D: Tensor, targets: Targets, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        scores_RM = scores(Q_R, D, targets, similarity="dot", windows=windows) / temperature
        positive_RM, _ = targets.masks(num_documents=scores_RM.shape[1])
        num_positives_R = positive_RM.sum(dim=1)
        if form == "out":
            gain_R = scores_RM.where(positive_RM, 0).sum(dim=1) / num_positives_R.clamp(min=1)
        else:
            gain_R = log_sum(scores_RM, positive_RM) - num_positives_R.clamp(min=1).to(scores_RM).log()
        has_R = num_positives_R > 0
        return (scores_RM.logsumexp(dim=1) - gain_R).where(has_R, 0), has_R

    return mean_over_queries(*by_rows(losses, Q, D, targets, rows, temperature))


def _check_in_batch_options(
    *,
    similarity: str,
    directions: Sequence[str],
    partition: str,
    in_batch: bool,
    hardness: str | None,
    hardness_strength: float,
    decoupled: bool,
    windows: str,
    rows: int | None,
) -> None:
    """What does not go together is an error, not ignored."""
    for direction in directions:
        check_one_of("direction", direction, DIRECTIONS)
    if "query_document" not in directions or len(set(directions)) < len(directions):
        raise ValueError(f"directions is {list(directions)}, expected query_document and others, each once")
    check_one_of("partition", partition, PARTITIONS)
    without_positive = [direction for direction in directions if direction in ("query_query", "document_document")]
    if partition == "per_direction" and without_positive:
        raise ValueError(f"{without_positive[0]} has no positive for a partition of its own, expected partition joint")
    coupled = list(directions) != ["query_document"]
    if coupled and not in_batch:
        raise ValueError("in_batch is False, but only query_document has negatives that are listed")
    if coupled and rows is not None:
        raise ValueError(f"rows is {rows}, but directions beyond query_document are evaluated whole")
    if hardness is not None:
        check_one_of("hardness", hardness, HARDNESS)
        check_above_zero("hardness_strength", hardness_strength)
    elif hardness_strength != 0:
        raise ValueError(f"hardness_strength is {hardness_strength} without hardness, one of {', '.join(HARDNESS)}")


def _in_batch_negatives(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float | Tensor,
    similarity: str,
    directions: Sequence[str],
    rows: int | None,
    **options: str | bool | float | None,
) -> Tensor:
    if not options["in_batch"]:
        check_several(targets, "in_batch False")
    if len(Q) == 1 or len(directions) == 1:
        warn_without_negatives(D, targets)
    Q, D = comparable(Q, D, similarity)
    losses = partial(_in_batch_losses, directions=directions, **options)
    if len(directions) > 1:
        return mean_over_queries(*losses(Q, D, targets, temperature))
    return mean_over_queries(*by_rows(losses, Q, D, targets, rows, temperature))


def _in_batch_losses(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    temperature: float | Tensor,
    *,
    directions: Sequence[str],
    partition: str,
    in_batch: bool,
    hardness: str | None,
    hardness_strength: float,
    decoupled: bool,
    windows: str,
) -> tuple[Tensor, Tensor]:
    """(loss of every query, whether it counts), each [B]."""
    similarity_BM = scores(Q, D, targets, similarity="dot", windows=windows)
    logits_BM = similarity_BM / temperature
    _, negative_BM = targets.masks(num_documents=logits_BM.shape[1])
    group_BG = targets.group.clamp(min=0)
    positives_BG = logits_BM.gather(1, group_BG)

    weighed_BM = logits_BM
    if hardness or not in_batch:
        hard_BM = torch.zeros_like(negative_BM)
        queries, places = targets.listed_negative.nonzero(as_tuple=True)
        hard_BM[queries, targets.group[queries, places]] = True
        negative_BM = negative_BM if in_batch else hard_BM
        if hardness:
            chosen_BM = {"hard_negatives": hard_BM, "in_batch_negatives": negative_BM & ~hard_BM}
            penalty_BM = hardness_strength * similarity_BM.detach()
            weighed_BM = logits_BM + penalty_BM.where(chosen_BM.get(hardness, negative_BM), 0)

    # Log of each direction's sum, for every query and listed document.
    sums_BG = {"query_document": log_sum(weighed_BM, negative_BM)[:, None].expand_as(positives_BG)}
    if "document_query" in directions:
        sums_BG["document_query"] = log_sum(logits_BM.T, negative_BM.T)[group_BG]
    if not decoupled:
        sums_BG = {direction: torch.logaddexp(positives_BG, sum_BG) for direction, sum_BG in sums_BG.items()}
    if "query_query" in directions:
        _, negative_BB = targets.masks("query_query")
        sums_BG["query_query"] = log_sum(Q @ Q.T / temperature, negative_BB)[:, None].expand_as(positives_BG)
    if "document_document" in directions:
        _, negative_MM = targets.masks("document_document", num_documents=logits_BM.shape[1])
        logits_MM = between_documents(D, targets, windows) / temperature
        sums_BG["document_document"] = log_sum(logits_MM, negative_MM)[group_BG]
    sums_SBG = torch.stack(list(sums_BG.values()))
    if partition == "joint":
        partition_BG = sums_SBG.logsumexp(dim=0)
    else:
        # Decoupled, a direction without negatives has minus infinity, and no say in the mean.
        empty_SBG = sums_SBG.isneginf()
        num_BG = (~empty_SBG).sum(dim=0)
        partition_BG = sums_SBG.masked_fill(empty_SBG, 0).sum(dim=0) / num_BG.clamp(min=1)
        partition_BG = partition_BG.masked_fill(num_BG == 0, float("-inf"))
    return mean_over_positives(partition_BG - positives_BG, targets.listed_positive & ~partition_BG.isneginf())
