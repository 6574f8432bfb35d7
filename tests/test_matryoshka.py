"""matryoshka.py: by hand, against sentence-transformers, and what is drawn."""

import collections
import copy
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from loss_checks import PRECISIONS, assert_equal, loss_and_gradients, random_pair, random_vectors
from naming import naming
from torch import nn

from embedft import Targets
from embedft.losses.contrastive import global_orthogonal, in_batch_negatives
from embedft.losses.distillation import ProjectedDistillation, embedding_distillation, margin_mse
from embedft.losses.matryoshka import Matryoshka, WeightedSum
from embedft.losses.pairwise import angle, cosent, cosine_mse


def first_cosine(Q, D, targets):
    """The cosine of the first pair, which is easy to follow by hand."""
    return F.cosine_similarity(Q[0], D[0], dim=0)


def test_by_hand():
    """q = (3, 4, 0), d = (1, 0, 1): cosines 1 in one dimension, 3/5 in two, 3 / (5 sqrt 2) in three."""
    Q, D, targets = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]]), Targets(torch.tensor([[0]]))
    loss = Matryoshka(dims=[1, 3, 2], inner=first_cosine)
    assert loss(Q, D, targets).item() == pytest.approx(1 + 0.6 + 0.6 / math.sqrt(2), rel=1e-6)
    # The weights belong to the dimensions as they were given.
    weighted = Matryoshka(dims=[1, 3, 2], inner=first_cosine, weights=[10.0, 0.0, 1.0])
    assert weighted(Q, D, targets).item() == pytest.approx(10 * 1 + 0.6, rel=1e-6)
    mean = Matryoshka(dims=[1, 3, 2], inner=first_cosine, weights=[10.0, 0.0, 1.0], reduction="mean")
    assert mean(Q, D, targets).item() == pytest.approx(10.6 / 3, rel=1e-6)
    # "dot" of the truncations is of unit vectors too.
    dot = Matryoshka(dims=[3, 2], inner=lambda Q, D, targets: Q[0] @ D[0])
    assert dot(Q, D, targets).item() == pytest.approx(0.6 / math.sqrt(2) + 0.6, rel=1e-6)


def test_sum_by_hand():
    Q, D, targets = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), Targets(torch.tensor([[0]]))
    parts = [first_cosine, lambda Q, D, targets: Q.sum()]
    assert WeightedSum(losses=parts)(Q, D, targets).item() == pytest.approx(0.6 + 7)
    assert WeightedSum(losses=parts, weights=[10, 0.5])(Q, D, targets).item() == pytest.approx(6 + 3.5)


class StoredEmbeddings(nn.Module):
    """What a loss of sentence-transformers takes for a model: its "texts" are embeddings already."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.device = dim, "cpu"

    def forward(self, features):
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self):
        return self.dim


SCORED = ("cosine_mse", "cosent", "angle")
INNER = {
    "in_batch_negatives": (in_batch_negatives, "MultipleNegativesRankingLoss", {}),
    "cosine_mse": (cosine_mse, "CosineSimilarityLoss", {}),
    "cosent": (cosent, "CoSENTLoss", {}),
    "angle": (angle, "AnglELoss", {}),
    "margin_mse": (margin_mse, "MarginMSELoss", {}),
    "embedding_distillation": (
        lambda Q, D, targets: embedding_distillation(Q, D, targets, distance="mse", truncate=True),
        "EmbedDistillLoss",
        {"distance_metric": "mse"},
    ),
    "global_orthogonal": (global_orthogonal, "GlobalOrthogonalRegularizationLoss", {}),
}


class OneValue(nn.Module):
    """The sum of the terms of a loss of sentence-transformers that returns several."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, features, labels):
        value = self.loss(features, labels)
        return sum(value.values()) if isinstance(value, dict) else value


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 2.0]])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize("name", INNER)
def test_equals_sentence_transformers(name, num_negatives, weights, duplicates, dtype, tolerance):
    """In float32 each result is the reference's, or nearer to what the reference gives in float64 on the same numbers.

    Rounding alone takes the reference's gradients 6e-7 from the exact ones, so two that round differently may be 1.2e-6
    apart.
    """
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    if name == "margin_mse":
        num_negatives = max(num_negatives, 1)
    if name in SCORED:
        num_negatives = 0
    ours, theirs, options = INNER[name]
    model = StoredEmbeddings(12)
    inner = OneValue(getattr(losses, theirs)(model, **options))
    reference = losses.MatryoshkaLoss(model, inner, [5, 12, 8], matryoshka_weights=weights)
    Q, D, group = random_pair(7, 1 + num_negatives, duplicates=duplicates, dtype=dtype)
    scores = random_vectors(7, 1 + num_negatives, seed=5, dtype=torch.float32).detach().to(dtype)
    teacher = (
        random_vectors(7, 12, seed=7, dtype=dtype).detach(),
        random_vectors(len(D), 12, seed=8, dtype=dtype).detach(),
    )
    labels = scores[:, 0] if name in SCORED else scores
    if name == "embedding_distillation":
        labels = torch.stack([teacher[0], *teacher[1].chunk(1 + num_negatives)], dim=1)
    expected = []
    for precision in (dtype, torch.float64):
        q, d = (x.detach().to(precision).requires_grad_() for x in (Q, D))
        columns = [{"vectors": column} for column in (q, *d.chunk(1 + num_negatives))]
        unlabelled = name in ("in_batch_negatives", "global_orthogonal")
        value = reference(columns, None if unlabelled else labels.to(precision))
        expected.append([x.to(dtype) for x in (value.detach(), *torch.autograd.grad(value, (q, d)))])
    targets = Targets(group, target_scores=scores, references={"teacher": teacher})
    found = loss_and_gradients(Matryoshka(dims=[5, 12, 8], inner=ours, weights=weights), Q, D, targets)
    expected = [min(pair, key=lambda x: (x - our).abs().max()) for our, *pair in zip(found, *expected, strict=True)]
    assert_equal(found, expected, tolerance)
    mean = Matryoshka(dims=[5, 12, 8], inner=ours, weights=weights, reduction="mean")
    assert_equal(loss_and_gradients(mean, Q, D, targets), tuple(x / 3 for x in expected), tolerance)


def test_zero_vectors_and_equal_ones_stay_finite():
    targets = Targets(torch.tensor([[0], [1]]))
    for fill in (0.0, 1.0):
        Q, D = (torch.full((2, 8), fill, requires_grad=True) for _ in range(2))
        loss = Matryoshka(dims=[8, 2], inner=in_batch_negatives)
        for result in loss_and_gradients(loss, Q, D, targets):
            assert torch.isfinite(result).all()


def test_half_precision_is_computed_in_float32():
    Q, D = random_vectors(3, 8).detach().half(), random_vectors(3, 8, seed=1).detach().half()
    targets, loss = Targets(torch.tensor([[0], [1], [2]])), Matryoshka(dims=[8, 3], inner=in_batch_negatives)
    value = loss(Q, D, targets)
    assert value.dtype is torch.float32
    assert value == loss(Q.float(), D.float(), targets)


class Recorder(nn.Module):
    """A loss with a parameter, that remembers which dimensions it was asked for and with what."""

    def __init__(self):
        super().__init__()
        self.scale, self.dims, self.targets = nn.Parameter(torch.ones(())), [], []

    def forward(self, Q, D, targets):
        self.dims.append(Q.shape[1])
        self.targets.append(targets)
        return self.scale * Q.sum()


def drawn(loss: Matryoshka, calls: int = 1) -> list[tuple[int, ...]]:
    Q, D, targets = torch.ones(1, 16), torch.ones(1, 16), Targets(torch.tensor([[0]]))
    found = []
    for _ in range(calls):
        loss.inner.dims.clear()
        loss(Q, D, targets)
        found.append(tuple(loss.inner.dims))
    return found


def test_dimensions_come_largest_first_and_targets_uncut():
    loss, reference = Matryoshka(dims=[2, 16, 4], inner=Recorder()), torch.ones(1, 16)
    assert drawn(loss) == [(16, 4, 2)]
    targets = Targets(torch.tensor([[0]]), references={"guide": (reference, reference)})
    loss(reference, reference, targets)
    assert all(seen is targets for seen in loss.inner.targets[-3:])


def test_draws_some_dimensions_a_call():
    loss = Matryoshka(dims=[16, 8, 4, 2], inner=Recorder(), dims_per_step=2)
    draws = drawn(loss, 600)
    assert all(a > b for a, b in draws)
    counts = collections.Counter(draws)
    # Six pairs, each a sixth of 600 with a standard deviation of 9.1.
    assert len(counts) == 6
    assert all(60 < count < 140 for count in counts.values())
    assert loss.num_calls == 600


def test_draws_alike_everywhere_and_after_resuming():
    """Whatever else draws: the same from the same seed, other ones from another, onward from a stored state."""

    def make(**options):
        return Matryoshka(dims=[16, 8, 4, 2], inner=Recorder(), dims_per_step=2, **options)

    states = torch.get_rng_state(), random.getstate()
    expected = drawn(make(), 20)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    torch.manual_seed(7)
    assert drawn(make(), 20) == expected
    assert drawn(make(seed=1), 20) != expected
    assert drawn(make(seed=1), 20)[:-1] != expected[1:]
    first, second = make(), make()
    assert drawn(first, 7) == expected[:7]
    state = copy.deepcopy(first.state_dict())
    assert state.keys() == {"num_calls", "inner.scale"}
    second.load_state_dict(state)
    assert drawn(second, 13) == expected[7:]


def test_evaluation_draws_and_counts_nothing():
    loss = Matryoshka(dims=[16, 8, 4, 2], inner=Recorder(), dims_per_step=1).eval()
    assert drawn(loss, 3) == [(16, 8, 4, 2)] * 3
    assert loss.num_calls == 0
    assert len(drawn(loss.train())[0]) == 1
    assert loss.num_calls == 1


def test_the_mean_is_over_the_dimensions_of_the_call():
    targets, ones = Targets(torch.tensor([[0]])), torch.ones(1, 16)
    loss = Matryoshka(dims=[16, 8, 4, 2], inner=first_cosine, dims_per_step=2, reduction="mean")
    assert loss(ones, ones, targets).item() == pytest.approx(1.0)


def test_says_once_that_the_full_width_is_not_trained():
    Q, targets = torch.ones(1, 16), Targets(torch.tensor([[0]]))
    loss = Matryoshka(dims=[8, 4], inner=first_cosine)
    with pytest.warns(UserWarning, match=naming("dims", 16)):
        loss(Q, Q, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(Q, Q, targets)
        Matryoshka(dims=[16, 4], inner=first_cosine)(Q, Q, targets)
        Matryoshka(dims=[8, 4], inner=first_cosine).eval()(Q, Q, targets)


def test_a_dimension_above_the_width_is_refused():
    Q, targets = torch.ones(1, 7), Targets(torch.tensor([[0]]))
    with pytest.raises(ValueError, match=naming("dims", 8, ..., 7)):
        Matryoshka(dims=[4, 8], inner=first_cosine)(Q, Q, targets)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"dims": []}, ("dims", "[]", 1)),
        ({"dims": [4, 0]}, ("dims", [4, 0], 1)),
        ({"dims": [4, 2, 4]}, ("dims", [4, 2, 4], "twice")),
        ({"weights": [1.0]}, ("weights", 1, 2, "dims")),
        ({"weights": [1.0, -1.0]}, ("weights", [1.0, -1.0], "finite", 0)),
        ({"weights": [1.0, math.nan]}, ("weights", [1.0, math.nan], "finite", 0)),
        ({"weights": [0.0, 0.0]}, ("weights", [0.0, 0.0], "all", 0, 0)),
        ({"dims_per_step": 0}, ("dims_per_step", 0, -1, 1, 2)),
        ({"dims_per_step": 3}, ("dims_per_step", 3, -1, 1, 2)),
        ({"reduction": "max"}, ("reduction", "max", "sum", "mean")),
    ],
)
def test_refuses(options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        Matryoshka(**{"dims": [4, 2], "inner": first_cosine} | options)


def test_a_sum_refuses():
    with pytest.raises(ValueError, match=naming("losses", "empty")):
        WeightedSum(losses=[])
    with pytest.raises(ValueError, match=naming("weights", 1, 2, "losses")):
        WeightedSum(losses=[first_cosine] * 2, weights=[1.0])


def test_parameters_and_state_of_the_parts_are_the_wholes():
    """Through a Matryoshka of a sum of a function, a projection and a Matryoshka; with gradients."""
    projected = ProjectedDistillation(student_dim=8, teacher_dim=3)
    loss = Matryoshka(dims=[8, 4], inner=WeightedSum(losses=[in_batch_negatives, projected], weights=[1.0, 0.5]))
    loss = WeightedSum(losses=[loss, first_cosine])
    assert {id(parameter) for parameter in loss.parameters()} == {id(projected.weight), id(projected.bias)}
    assert "parts.0.num_calls" in loss.state_dict()
    Q, D = random_vectors(2, 8, dtype=torch.float32), random_vectors(2, 8, seed=1, dtype=torch.float32)
    teacher = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    targets = Targets(torch.tensor([[0], [1]]), references={"teacher": (teacher, teacher)})
    loss(Q, D, targets).backward()
    assert projected.weight.grad[:, :4].abs().min() > 0
    copied = copy.deepcopy(loss)
    with torch.no_grad():
        projected.weight.zero_()
    copied.load_state_dict(loss.state_dict())
    assert copied(Q, D, targets) == loss(Q, D, targets)
