"""Distillation: match a teacher's scores for a query's documents, its vectors, or the vectors of the base model.

    loss = margin_mse(Q, D, Targets(group=torch.tensor([[0, 2], [1, 3]]), target_scores=teacher_scores_BG))
    loss = embedding_distillation(Q, D, Targets(group, references={"teacher": (teacher_Q, teacher_D)}))

If the teacher's width differs, `ProjectedDistillation` learns a map to it; distance="similarities" needs no map.
`similarity` and `windows` are as in `scores`.

Shapes: B queries, C document vectors, G listed documents per query, N vectors, D features, E features of the reference.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairwise import listed_scores, listed_targets
from .rows import by_rows
from .targets import Targets, check_number, check_one_of, comparable, float32_or_64

DISTANCES = ("cosine", "mse", "l2", "squared", "similarities")


def margin_mse(Q: Tensor, D: Tensor, targets: Targets, *, similarity: str = "dot", windows: str = "max") -> Tensor:
    """Mean of ((s_p - s_n) - (t_p - t_n))^2 over every listed positive p and hard negative n of a query, even one known
    to be relevant. s is the similarity, t the teacher's score (`target_scores`), on the same scale.
    Source: Hofstätter et al. 2020, section 3 (Margin-MSE); equals sentence-transformers' MarginMSELoss."""
    targets.check_several("margin_mse")
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    positive_BG = targets.listed_positive
    negative_BG = (targets.group >= 0) & ~positive_BG
    # Where nothing is listed the teacher's score may be anything, even NaN.
    error_BG = scores_BG - listed_targets(targets, "margin_mse", scores_BG).where(targets.group >= 0, 0)
    is_margin_BGG = positive_BG[:, :, None] & negative_BG[:, None, :]
    squares_BGG = (error_BG[:, :, None] - error_BG[:, None, :]).square()
    return squares_BGG.where(is_margin_BGG, 0).sum() / is_margin_BGG.sum().clamp(min=1)


def listwise_kl(
    Q: Tensor,
    D: Tensor,
    targets: Targets,
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    similarity: str = "dot",
    windows: str = "max",
) -> Tensor:
    """T_s^2 times the mean over queries of KL(softmax(t / T_t), softmax(s / T_s)) over the listed documents.

    s is the similarity, t the teacher's score (`target_scores`), T_s and T_t the temperatures of student and teacher,
    each above 0; None: `temperature`. Queries with fewer than two documents are skipped.

    Source: Hinton et al. 2015, section 2 (the factor T^2); Lin et al. 2020 (TCT-ColBERT) for ranking; equals
    sentence-transformers' DistillKLDivLoss."""
    targets.check_several("listwise_kl")
    student, teacher = (temperature if own is None else own for own in (student_temperature, teacher_temperature))
    check_number("temperature", temperature, above=0)
    check_number("student_temperature", student, above=0)
    check_number("teacher_temperature", teacher, above=0)
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    is_listed_BG = targets.group >= 0
    # Not minus infinity, which would turn a row without documents into NaN.
    lowest = torch.finfo(scores_BG.dtype).min / 2
    teacher_BG = listed_targets(targets, "listwise_kl", scores_BG) / teacher
    teacher_BG = teacher_BG.masked_fill(~is_listed_BG, lowest).log_softmax(dim=1)
    student_BG = (scores_BG / student).masked_fill(~is_listed_BG, lowest).log_softmax(dim=1)
    divergence_B = F.kl_div(student_BG, teacher_BG, reduction="none", log_target=True).sum(dim=1)
    counts_B = is_listed_BG.sum(dim=1) > 1
    return divergence_B.where(counts_B, 0).sum() / counts_B.sum().clamp(min=1) * student**2


def embedding_distillation(
    Q: Tensor, D: Tensor, targets: Targets, *, distance: str = "cosine", truncate: bool = False
) -> Tensor:
    """Mean over the query and document vectors x of their distance from the teacher's vector r of the same text.

    - cosine: 1 - cos(x, r)
    - mse: mean over features of (x - r)^2
    - l2: |x - r|
    - squared: |x - r|^2
    - similarities: (cos(q, d) - cos(r_q, r_d))^2, mean over all pairs of a query and a document vector; r may have any
      width. Computed some queries at a time (`by_rows`).

    The teacher's vectors are `references["teacher"]`, ([B, E], [C, E]). With `truncate`, as under Matryoshka, only the
    first D features of wider ones count; otherwise a different width is an error, except for "similarities".

    Source: Kim et al. 2023 (EmbedDistill), embedding matching; with one document per query and column it equals
    sentence-transformers' EmbedDistillLoss. "similarities": Tung and Mori 2019, section 3."""
    return distance_to_reference(Q, D, targets, reference="teacher", distance=distance, truncate=truncate)


def toward_base(Q: Tensor, D: Tensor, targets: Targets, *, distance: str = "cosine", truncate: bool = False) -> Tensor:
    """Mean distance of the vectors from those of the model before training, to preserve what the base model knew.

    The base model's vectors are `references["base"]`, ([B, E], [C, E]); options are those of `embedding_distillation`.
    Without dropout, it is 0 before the first step; under Matryoshka, only for "cosine", because truncated vectors are
    scaled to unit length again but references are not.

    Source: Li and Hoiem 2016 (Learning without Forgetting), section 3, with vectors as the outputs."""
    return distance_to_reference(Q, D, targets, reference="base", distance=distance, truncate=truncate)


class ProjectedDistillation(nn.Module):
    """`embedding_distillation` of W x + b, a learned map of the vectors x to the teacher's width. Narrower vectors, as
    under Matryoshka, use the first columns of W. `seed` draws W, uniform in +-1/sqrt(student_dim); b starts at 0.
    Source: Kim et al. 2023 (EmbedDistill), with a projection; sentence-transformers' EmbedDistillLoss."""

    def __init__(self, *, student_dim: int, teacher_dim: int, distance: str = "cosine", seed: int = 0):
        super().__init__()
        check_number("student_dim", student_dim, least=1)
        check_number("teacher_dim", teacher_dim, least=1)
        self.student_dim, self.teacher_dim, self.distance = student_dim, teacher_dim, distance
        generator = torch.Generator("cpu").manual_seed(seed)
        uniform_ED = torch.rand(teacher_dim, student_dim, generator=generator, device="cpu") * 2 - 1
        self.weight = nn.Parameter(uniform_ED / math.sqrt(student_dim))
        self.bias = nn.Parameter(torch.zeros(teacher_dim))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        if Q.shape[1] > self.student_dim:
            raise ValueError(f"student_dim is {self.student_dim}, but the vectors have {Q.shape[1]} features")
        vectors, weight_ED = (float32_or_64(Q), float32_or_64(D)), self.weight[:, : Q.shape[1]]
        Q, D = (F.linear(X, weight_ED.to(X.dtype), self.bias.to(X.dtype)) for X in vectors)
        return distance_to_reference(Q, D, targets, reference="teacher", distance=self.distance)


def distance_to_reference(
    Q: Tensor, D: Tensor, targets: Targets, *, reference: str, distance: str, truncate: bool = False
) -> Tensor:
    """Mean distance of the vectors from `targets.references[reference]`, see `embedding_distillation`."""
    check_one_of("distance", distance, DISTANCES)
    Q, D = float32_or_64(Q), float32_or_64(D)
    reference_Q, reference_D = (x.detach().to(Q) for x in targets.reference(reference, Q, D))
    if distance == "similarities":
        references = {reference: comparable(reference_Q, reference_D, "cosine")}

        def distances(Q_R: Tensor, D: Tensor, targets: Targets) -> tuple[Tensor]:
            reference_Q_R, reference_D = targets.references[reference]
            return ((Q_R @ D.T - reference_Q_R @ reference_D.T).square().mean(dim=1),)

        return by_rows(distances, *comparable(Q, D, "cosine"), replace(targets, references=references), None)[0].mean()
    width, reference_width = Q.shape[1], reference_Q.shape[1]
    if reference_width < width or (reference_width > width and not truncate):
        found = f"references[{reference!r}] has {reference_width} features, the vectors have {width}"
        raise ValueError(f"{found}: use projected_distillation, truncate (Matryoshka), or distance 'similarities'")
    X, reference_X = torch.cat([Q, D]), torch.cat([reference_Q, reference_D])[:, :width]
    if distance == "cosine":
        distance_N = 1 - F.cosine_similarity(X, reference_X, dim=1)
    elif distance == "l2":
        distance_N = torch.linalg.vector_norm(X - reference_X, dim=1)
    else:
        distance_N = (X - reference_X).square().sum(dim=1) / (width if distance == "mse" else 1)
    return distance_N.mean()
