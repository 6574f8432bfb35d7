"""distillation.py: by hand, against sentence-transformers, against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_checks import PRECISIONS, assert_equal, loss_and_gradients, random_pair, random_vectors, reference_gradients
from naming import naming

from embedft import Targets
from embedft.losses import rows
from embedft.losses.distillation import (
    DISTANCES,
    ProjectedDistillation,
    embedding_distillation,
    listwise_kl,
    margin_mse,
    toward_base,
)

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
DOCUMENTS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.5, 0.5]])


def test_margin_mse_by_hand():
    """Inner products of the first query 2 and 0.5, of the second 3 and 0; margins 1.5 and 3 where the teacher has
    1 - 0 = 1 and 5 - 1 = 4: (0.5^2 + (-1)^2) / 2 = 0.625."""
    targets = Targets(torch.tensor([[0, 2], [1, 0]]), target_scores=torch.tensor([[1.0, 0.0], [5.0, 1.0]]))
    assert margin_mse(QUERIES, DOCUMENTS, targets).item() == pytest.approx(0.625)
    # Cosines 1 and sqrt(1/2), 1 and 0.
    expected = ((1 - math.sqrt(0.5) - 1) ** 2 + (1 - 4) ** 2) / 2
    assert margin_mse(QUERIES, DOCUMENTS, targets, similarity="cosine").item() == pytest.approx(expected)


def test_listwise_kl_by_hand():
    """Scores (2, 0.5) at T = 2 are (1, 0.25), the teacher's (2 ln 3, 0) are (ln 3, 0): probabilities 3/4 and 1/4.
    KL = 3/4 (ln 3/4 - ln p) + 1/4 (ln 1/4 - ln(1 - p)) with p = 1 / (1 + e^-0.75); times T^2 = 4. The second query
    lists one document and is skipped."""
    targets = Targets(torch.tensor([[0, 2], [1, -1]]), target_scores=torch.tensor([[2 * math.log(3), 0.0], [1, 9]]))
    p = 1 / (1 + math.exp(-0.75))
    divergence = 0.75 * math.log(0.75 / p) + 0.25 * math.log(0.25 / (1 - p))
    assert listwise_kl(QUERIES, DOCUMENTS, targets, temperature=2.0).item() == pytest.approx(4 * divergence, rel=1e-5)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        # Vectors (3, 4) and (1, 0), the teacher's (3, 0) and (0, 2): differences (0, 4) and (1, -2).
        ("mse", (16 / 2 + 5 / 2) / 2),
        ("squared", (16 + 5) / 2),
        ("l2", (4 + math.sqrt(5)) / 2),
        # Cosines 9/15 and 0.
        ("cosine", (0.4 + 1) / 2),
        # One query, one document: 3/5 where the teacher has 0.
        ("similarities", 0.36),
    ],
)
@pytest.mark.parametrize(("loss", "name"), [(embedding_distillation, "teacher"), (toward_base, "base")])
def test_distances_by_hand(loss, name, distance, expected):
    reference = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    targets = Targets(torch.tensor([[0]]), references={name: reference})
    found = loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), targets, distance=distance)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def reference_losses():
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


def similarity_functions(name: str):
    util = pytest.importorskip("sentence_transformers.util")
    return {"dot": util.pairwise_dot_score, "cosine": util.pairwise_cos_sim}[name]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("num_negatives", [1, 2, 3])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_margin_mse_equals_sentence_transformers(similarity, num_negatives, duplicates, dtype, tolerance):
    reference = reference_losses().MarginMSELoss(model=None, similarity_fct=similarity_functions(similarity))
    Q, D, group = random_pair(9, 1 + num_negatives, duplicates=duplicates, dtype=dtype)
    teacher = random_vectors(9, 1 + num_negatives, seed=7, dtype=dtype).detach()
    targets = Targets(group, target_scores=teacher)
    ours = loss_and_gradients(margin_mse, Q, D, targets, similarity=similarity)
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives, teacher), tolerance)
    margins = teacher[:, :1] - teacher[:, 1:]
    as_margins = torch.cat([torch.zeros(9, 1, dtype=dtype), -margins], dim=1)
    ours = loss_and_gradients(margin_mse, Q, D, Targets(group, target_scores=as_margins), similarity=similarity)
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives, margins), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("num_negatives", [1, 3])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0}, {"student_temperature": 0.5}, {"temperature": 3.0, "teacher_temperature": 0.7}],
    ids=str,
)
def test_listwise_kl_equals_sentence_transformers(options, similarity, num_negatives, duplicates, dtype, tolerance):
    similarity_fct = similarity_functions(similarity)
    reference = reference_losses().DistillKLDivLoss(model=None, similarity_fct=similarity_fct, **options)
    Q, D, group = random_pair(9, 1 + num_negatives, duplicates=duplicates, dtype=dtype)
    teacher = random_vectors(9, 1 + num_negatives, seed=7, dtype=dtype).detach()
    ours = loss_and_gradients(
        listwise_kl, Q, D, Targets(group, target_scores=teacher), similarity=similarity, **options
    )
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives, teacher), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
def test_embedding_distillation_equals_sentence_transformers(distance, num_negatives, duplicates, dtype, tolerance):
    losses = reference_losses()
    reference = losses.EmbedDistillLoss(model=None, distance_metric=distance)
    Q, D, group = random_pair(9, 1 + num_negatives, duplicates=duplicates, dtype=dtype)
    teacher = (
        random_vectors(9, 12, seed=7, dtype=dtype).detach(),
        random_vectors(len(D), 12, seed=8, dtype=dtype).detach(),
    )
    columns = [teacher[0], *teacher[1].chunk(1 + num_negatives)]
    ours = loss_and_gradients(
        embedding_distillation, Q, D, Targets(group, references={"teacher": teacher}), distance=distance
    )
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives, columns), tolerance)

    class Model:
        device = "cpu"

        def get_embedding_dimension(self):
            return 12

    reference = losses.EmbedDistillLoss(Model(), distance_metric=distance, projection_dim=12).to(dtype)
    ours = ProjectedDistillation(student_dim=12, teacher_dim=12, distance=distance).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(reference.projection.weight)
        ours.bias.copy_(reference.projection.bias)
    targets = Targets(group, references={"teacher": teacher})
    # Of a projection too.
    value, their = (
        ours(Q, D, targets),
        reference.compute_loss_from_embeddings([Q, *D.chunk(1 + num_negatives)], columns),
    )
    found = torch.autograd.grad(value, (Q, D, ours.weight, ours.bias))
    expected = torch.autograd.grad(their, (Q, D, reference.projection.weight, reference.projection.bias))
    assert_equal((value.detach(), *found), (their.detach(), *expected), tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_margin_mse_and_listwise_kl_equal_a_loop(seed):
    """Several positives or none, and absent documents (for which the teacher gives NaN)."""
    generator = torch.Generator().manual_seed(seed)
    Q, D = random_vectors(7, 5, seed=seed), random_vectors(6, 5, seed=seed + 100)
    group = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(7)])
    group[torch.rand(group.shape, generator=generator) < 0.3] = -1
    relevance = torch.randint(0, 2, group.shape, generator=generator)
    teacher = random_vectors(7, 4, seed=seed + 200).detach()
    teacher[group < 0] = float("nan")
    targets = Targets(group, relevance, target_scores=teacher)

    def margins(Q, D, targets):
        squares = []
        for i in range(7):
            listed = [
                (Q[i] @ D[j] - t, r) for j, t, r in zip(group[i], teacher[i], relevance[i], strict=True) if j >= 0
            ]
            squares += [(p - n) ** 2 for p, grade in listed if grade for n, other in listed if not other]
        return sum(squares) / len(squares)

    def divergence(Q, D, targets):
        found = []
        for i in range(7):
            listed = group[i] >= 0
            if listed.sum() > 1:
                student, target = (D[group[i][listed]] @ Q[i] / 2).softmax(0), (teacher[i][listed] / 2).softmax(0)
                found.append((target * (target / student).log()).sum())
        return 4 * sum(found) / len(found)

    assert_equal(loss_and_gradients(margin_mse, Q, D, targets), loss_and_gradients(margins, Q, D, targets), 1e-9)
    assert_equal(
        loss_and_gradients(listwise_kl, Q, D, targets, temperature=2.0),
        loss_and_gradients(divergence, Q, D, targets),
        1e-9,
    )


def test_nothing_listed_is_zero():
    targets = Targets(torch.full((2, 2), -1), target_scores=torch.full((2, 2), float("nan"), dtype=torch.float64))
    for loss in (margin_mse, listwise_kl):
        Q, D = random_vectors(2, 4), random_vectors(2, 4, seed=1)
        value, *gradients = loss_and_gradients(loss, Q, D, targets)
        assert value.item() == 0.0
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss", [margin_mse, listwise_kl])
def test_one_document_a_query_is_refused(loss):
    targets = Targets(torch.tensor([[0], [1]]), target_scores=torch.ones(2, 1))
    with pytest.raises(ValueError, match=naming(loss.__name__, 1, "negatives")):
        loss(QUERIES, DOCUMENTS, targets)
    with pytest.raises(ValueError, match=naming(loss.__name__, "target_scores")):
        loss(QUERIES, DOCUMENTS, Targets(torch.tensor([[0, 1], [1, 0]])))


@pytest.mark.parametrize("name", ["temperature", "student_temperature", "teacher_temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_temperature_that_is_not_above_zero(name, value):
    targets = Targets(torch.tensor([[0, 1], [1, 0]]), target_scores=torch.ones(2, 2))
    with pytest.raises(ValueError, match=naming(name, value, 0, "finite")):
        listwise_kl(QUERIES, DOCUMENTS, targets, **{name: value})


def teacher_of(num_queries: int, num_documents: int, dim: int) -> Targets:
    group = torch.arange(num_queries)[:, None] % num_documents
    reference = random_vectors(num_queries, dim, seed=3).detach(), random_vectors(num_documents, dim, seed=4).detach()
    return Targets(group, references={"teacher": reference, "base": reference})


def test_similarities_equal_a_loop_at_any_width(monkeypatch):
    Q, D, targets = random_vectors(3, 5), random_vectors(4, 5, seed=1), teacher_of(3, 4, 9)
    teacher_Q, teacher_D = targets.references["teacher"]

    def loop(Q, D, targets):
        differences = [
            F.cosine_similarity(Q[i], D[j], dim=0) - F.cosine_similarity(teacher_Q[i], teacher_D[j], dim=0)
            for i in range(3)
            for j in range(4)
        ]
        return sum(difference**2 for difference in differences) / 12

    ours = loss_and_gradients(embedding_distillation, Q, D, targets, distance="similarities")
    assert_equal(ours, loss_and_gradients(loop, Q, D, targets), 1e-9)
    base = loss_and_gradients(toward_base, Q, D, targets, distance="similarities")
    assert_equal(base, ours, 0.0)
    # Two queries at a time, then one.
    monkeypatch.setitem(rows.by_rows.__kwdefaults__, "scores_at_a_time", 8)
    chunked = loss_and_gradients(embedding_distillation, Q, D, targets, distance="similarities")
    assert_equal(chunked, ours, 1e-12)


@pytest.mark.parametrize("distance", [distance for distance in DISTANCES if distance != "similarities"])
def test_a_wider_teacher_is_cut_when_asked(distance):
    Q, D, targets = random_vectors(3, 5), random_vectors(4, 5, seed=1), teacher_of(3, 4, 9)
    cut = Targets(targets.group, references={"teacher": tuple(x[:, :5] for x in targets.references["teacher"])})
    ours = embedding_distillation(Q, D, targets, distance=distance, truncate=True)
    assert ours == embedding_distillation(Q, D, cut, distance=distance)
    with pytest.raises(ValueError, match=naming("references['teacher']", 9, ..., 5)):
        embedding_distillation(Q, D, targets, distance=distance)
    narrow = teacher_of(3, 4, 4)
    with pytest.raises(ValueError, match=naming("references['teacher']", 4, ..., 5)):
        embedding_distillation(Q, D, narrow, distance=distance, truncate=True)


def test_says_what_is_missing():
    Q = torch.ones(1, 2)
    base = Targets(torch.tensor([[0]]), references={"base": (Q, Q)})
    with pytest.raises(ValueError, match=naming("references['teacher']", "base")):
        embedding_distillation(Q, Q, base)
    with pytest.raises(ValueError, match=naming("references['base']", "none")):
        toward_base(Q, Q, Targets(torch.tensor([[0]])))
    with pytest.raises(ValueError, match=naming("distance", "euclid", "cosine", "mse", "similarities")):
        toward_base(Q, Q, base, distance="euclid")
    with pytest.raises(ValueError, match=naming("references['base']", (1, 1), ..., (2, 1))):
        toward_base(torch.ones(2, 2), Q, Targets(torch.tensor([[0], [0]]), references={"base": (Q, Q)}))


def test_references_have_no_gradient():
    Q, D, targets = random_vectors(3, 5), random_vectors(4, 5, seed=1), teacher_of(3, 4, 5)
    leaves = [x.requires_grad_() for x in targets.references["teacher"]]
    for distance in DISTANCES:
        embedding_distillation(Q, D, targets, distance=distance).backward()
    assert [leaf.grad for leaf in leaves] == [None, None]
    scored = Targets(torch.tensor([[0, 1], [1, 0], [2, 3]]), target_scores=random_vectors(3, 2))
    for loss in (margin_mse, listwise_kl):
        loss(Q, D, scored).backward()
    assert scored.target_scores.grad is None


def test_a_projection_is_seeded_and_learns():
    def make(**options):
        return ProjectedDistillation(student_dim=5, teacher_dim=9, distance="mse", **options)

    before = torch.get_rng_state()
    assert torch.equal(make().weight, make().weight)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(make().weight, make(seed=1).weight)
    assert make().weight.shape == (9, 5)
    assert make().weight.abs().max() <= 5**-0.5
    Q, D, targets, loss = random_vectors(3, 5), random_vectors(4, 5, seed=1), teacher_of(3, 4, 9), make().double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    first = loss(Q, D, targets).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(Q, D, targets).backward()
        optimizer.step()
    assert loss(Q, D, targets).item() < 0.7 * first


def test_a_projection_of_narrower_vectors_is_that_of_vectors_filled_up_with_zeros():
    loss, targets = ProjectedDistillation(student_dim=5, teacher_dim=9).double(), teacher_of(3, 4, 9)
    Q, D = random_vectors(3, 2), random_vectors(4, 2, seed=1)
    torch.testing.assert_close(loss(Q, D, targets), loss(F.pad(Q, (0, 3)), F.pad(D, (0, 3)), targets))
    with pytest.raises(ValueError, match=naming("student_dim", 5, 6)):
        loss(torch.ones(3, 6), torch.ones(4, 6), targets)
    with pytest.raises(ValueError, match=naming("teacher_dim", 0, 1)):
        ProjectedDistillation(student_dim=5, teacher_dim=0)
