"""Distillation: a query's documents, or the vectors themselves, as a teacher sees them.

    targets = Targets(group=torch.tensor([[0, 2], [1, 3]]), target_scores=teacher_scores_BG)
    loss = margin_mse(Q, D, targets)
    loss = embedding_distillation(Q, D, Targets(group, references={"teacher": (teacher_Q, teacher_D)}))

A teacher whose vectors have another width: `ProjectedDistillation` learns a map to it, `fit_pca` brings the teacher
to the width of Q before training, and distance="similarities" compares what has no width. Not here: running a
teacher; its scores and vectors are data.

Shapes: B queries, C document vectors, G listed documents a query, N vectors, D features, E features of the reference.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rows import by_rows, check_above_zero, check_one_of, check_several, comparable
from .scored import float32_or_64, listed_scores, listed_targets
from .targets import Targets

DISTANCES = ("cosine", "mse", "l2", "squared", "similarities")


def margin_mse(Q: Tensor, D: Tensor, targets: Targets, *, similarity: str = "dot", windows: str = "max") -> Tensor:
    """Mean of ((s_p - s_n) - (t_p - t_n))^2 over every listed positive p and hard negative n of a query.

    s is the similarity, t the teacher's score (`target_scores`). A teacher's margins known without its scores go in
    as t_p = 0 and t_n = -margin. A margin is compared as it is, so the teacher's scores have to be in the unit of
    the similarity. A hard negative that is known to be relevant stays: its score says how much.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: lists a positive and at least one hard negative a query, with `target_scores`.
        similarity: "dot" or "cosine".
        windows: "max" or "softmax" over the windows of a document, as in `scores`.

    Returns:
        A scalar, at least 0; 0 when no query has both a positive and a hard negative.

    Source: Hofstätter et al. 2020, section 3 (Margin-MSE); the same as sentence-transformers' MarginMSELoss.
    """
    check_several(targets, "margin_mse")
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    positive_BG = targets.listed_positive
    negative_BG = (targets.group >= 0) & ~positive_BG
    # Where nothing is listed the teacher's score may be anything, NaN too.
    teacher_BG = listed_targets(targets, "margin_mse", scores_BG).where(targets.group >= 0, 0)
    error_BG = scores_BG - teacher_BG
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

    s is the similarity, t the teacher's score (`target_scores`). A query that lists fewer than two documents counts
    nowhere.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: lists at least two documents a query, with `target_scores`.
        temperature: of both, above 0.
        student_temperature: T_s; None: `temperature`.
        teacher_temperature: T_t; None: `temperature`.
        similarity: "dot" or "cosine".
        windows: "max" or "softmax" over the windows of a document, as in `scores`.

    Returns:
        A scalar, at least 0.

    Source: Hinton et al. 2015, section 2 (softmax at a temperature, and the factor T^2); Lin et al. 2020 (TCT-ColBERT)
    for ranking; the same as sentence-transformers' DistillKLDivLoss.
    """
    check_several(targets, "listwise_kl")
    student = temperature if student_temperature is None else student_temperature
    teacher = temperature if teacher_temperature is None else teacher_temperature
    named = {"temperature": temperature, "student_temperature": student, "teacher_temperature": teacher}
    for name, value in named.items():
        check_above_zero(name, value)
    scores_BG = listed_scores(Q, D, targets, similarity=similarity, windows=windows)
    is_listed_BG = targets.group >= 0
    # Not minus infinity: a row that lists nothing would be NaN.
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
    - similarities: (cos(q, d) - cos(r_q, r_d))^2, mean over every query and document vector; r of any width. A sum
      over queries: it computes a few of them at a time, each again in the backward pass.

    Args:
        Q: query vectors, [B, D].
        D: document vectors, [C, D].
        targets: `references["teacher"]` are the teacher's vectors of both, ([B, E], [C, E]).
        distance: one of the above.
        truncate: whether the vectors are compared with the first D features of wider ones; under Matryoshka they
            have to be, unless the distance is "similarities". Other widths are an error.

    Returns:
        A scalar, at least 0.

    Source: Kim et al. 2023 (EmbedDistill), embedding matching; with one document a query and column the same as
    sentence-transformers' EmbedDistillLoss. "similarities": Tung and Mori 2019, section 3, between queries and
    documents.
    """
    return distance_to_reference(Q, D, targets, reference="teacher", distance=distance, truncate=truncate)


class ProjectedDistillation(nn.Module):
    """`embedding_distillation` of W x + b, a learned map of the vectors x to the teacher's width.

    loss = ProjectedDistillation(student_dim=384, teacher_dim=1024)

    The map serves training alone; it is dropped with the loss. Vectors narrower than `student_dim`, as under
    Matryoshka, use the first columns of W.

    Args:
        student_dim: features of Q and D.
        teacher_dim: features of `references["teacher"]`.
        distance: as of `embedding_distillation`.
        seed: of W, uniform in +-1/sqrt(student_dim); b begins at 0.

    Source: Kim et al. 2023 (EmbedDistill), embedding matching with a projection; sentence-transformers'
    EmbedDistillLoss with `projection_dim`.
    """

    def __init__(self, *, student_dim: int, teacher_dim: int, distance: str = "cosine", seed: int = 0):
        super().__init__()
        for name, dim in (("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            if dim < 1:
                raise ValueError(f"{name} is {dim}, expected at least 1")
        self.student_dim, self.teacher_dim, self.distance = student_dim, teacher_dim, distance
        generator = torch.Generator("cpu").manual_seed(seed)
        uniform_ED = torch.rand(teacher_dim, student_dim, generator=generator, device="cpu") * 2 - 1
        self.weight = nn.Parameter(uniform_ED / math.sqrt(student_dim))
        self.bias = nn.Parameter(torch.zeros(teacher_dim))

    def forward(self, Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        """A scalar, at least 0."""
        if Q.shape[1] > self.student_dim:
            raise ValueError(f"student_dim is {self.student_dim}, but the vectors have {Q.shape[1]} features")
        Q, D = (self._project(x) for x in (Q, D))
        return distance_to_reference(Q, D, targets, reference="teacher", distance=self.distance)

    def _project(self, X: Tensor) -> Tensor:
        X = float32_or_64(X)
        return F.linear(X, self.weight[:, : X.shape[1]].to(X.dtype), self.bias.to(X.dtype))


@dataclass(frozen=True)
class PCA:
    """A fixed linear map to fewer features: (x - mean) components. `fit_pca` makes it."""

    mean: Tensor  # [E]
    components: Tensor  # [E, D], orthonormal columns, the direction of most variance first

    def __call__(self, X: Tensor) -> Tensor:
        """[N, E] -> [N, D]."""
        return (X - self.mean.to(X)) @ self.components.to(X)


def fit_pca(embeddings: Tensor, *, dim: int, center: bool = True) -> PCA:
    """The `dim` directions in which `embeddings`, [N, E], vary most.

    A teacher's vectors brought to the width of the student once, before training:

        pca = fit_pca(teacher_D, dim=384)
        references = {"teacher": (pca(teacher_Q), pca(teacher_D))}

    `center` False leaves the mean in, which keeps inner products (and so cosines) as well as `dim` features can. Of
    the two signs of a direction the one is taken whose largest entry is positive.

    Source: Pearson 1901; Eckart and Young 1936.
    """
    if not 1 <= dim <= min(embeddings.shape):
        raise ValueError(
            f"dim is {dim}, expected 1 to {min(embeddings.shape)} for embeddings of {tuple(embeddings.shape)}"
        )
    # On the CPU, because not every device has float64.
    X = embeddings.detach().cpu().double()
    mean = X.mean(dim=0) if center else torch.zeros_like(X[0])
    _, vectors = torch.linalg.eigh((X - mean).T @ (X - mean))
    components = vectors.flip(1)[:, :dim]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    dtype = float32_or_64(embeddings).dtype
    mean, components = (x.to(dtype).to(embeddings.device) for x in (mean, components * largest.sign()))
    return PCA(mean, components)


def distance_to_reference(
    Q: Tensor, D: Tensor, targets: Targets, *, reference: str, distance: str, truncate: bool = False
) -> Tensor:
    """Mean distance of the vectors from `targets.references[reference]`, as `embedding_distillation` says it."""
    check_one_of("distance", distance, DISTANCES)
    if reference not in targets.references:
        found = ", ".join(targets.references) or "none"
        raise ValueError(f"the loss needs references[{reference!r}], vectors of the same texts; there are: {found}")
    targets.check_queries(Q)
    Q, D = float32_or_64(Q), float32_or_64(D)
    reference_Q, reference_D = (x.detach().to(Q) for x in targets.references[reference])
    if (len(reference_Q), len(reference_D)) != (len(Q), len(D)):
        raise ValueError(
            f"references[{reference!r}] has {len(reference_Q)} queries and {len(reference_D)} documents, "
            f"the batch {len(Q)} and {len(D)}"
        )
    if distance == "similarities":
        references = {reference: comparable(reference_Q, reference_D, "cosine")}

        def distances(Q_R: Tensor, D: Tensor, targets: Targets) -> tuple[Tensor]:
            reference_Q_R, reference_D = targets.references[reference]
            return ((Q_R @ D.T - reference_Q_R @ reference_D.T).square().mean(dim=1),)

        return by_rows(distances, *comparable(Q, D, "cosine"), replace(targets, references=references), None)[0].mean()
    width, reference_width = Q.shape[1], reference_Q.shape[1]
    if reference_width < width or (reference_width > width and not truncate):
        raise ValueError(
            f"references[{reference!r}] has {reference_width} features, the vectors have {width}: "
            "project the one or the other, set truncate (Matryoshka), or distance 'similarities'"
        )
    X = torch.cat([Q, D])
    reference_X = torch.cat([reference_Q, reference_D])[:, :width]
    if distance == "cosine":
        distance_N = 1 - F.cosine_similarity(X, reference_X, dim=1)
    elif distance == "l2":
        distance_N = torch.linalg.vector_norm(X - reference_X, dim=1)
    else:
        distance_N = (X - reference_X).square().sum(dim=1) / (width if distance == "mse" else 1)
    return distance_N.mean()
