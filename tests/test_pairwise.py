"""pairwise.py: by hand, against sentence-transformers; unlisted pairs are ignored."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_checks import PRECISIONS, assert_equal, loss_and_gradients, random_pair, random_vectors
from naming import naming

from embedft import Targets
from embedft.losses.pairwise import (
    binary_cross_entropy,
    contrastive,
    listwise_cross_entropy,
    online_contrastive,
    triplet,
)

every_loss = pytest.mark.parametrize("loss", [triplet, contrastive, online_contrastive])
every_distance = pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
# Distances 5, 1, 10 (euclidean) and 7, 1, 14 (manhattan) from the origin.
Q0, D0 = torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [1.0, 0.0], [-6.0, 8.0]])


def test_triplet_by_hand():
    targets = Targets(torch.tensor([[0, 1, 2]]))
    # 5 - 1 + 2 and 5 - 10 + 2 below 0.
    assert triplet(Q0, D0, targets, margin=2.0).item() == pytest.approx((6 + 0) / 2)
    # 7 - 1 + 8 and 7 - 14 + 8.
    assert triplet(Q0, D0, targets, margin=8.0, distance="manhattan").item() == pytest.approx((14 + 1) / 2)
    # Cosines 0.6 with the positive, 1 and -0.6 with the negatives: 0.4 - 0 + 1, 0.4 - 1.6 + 1 below 0.
    Q = torch.tensor([[5.0, 0.0]])
    D = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-6.0, 8.0]])
    assert triplet(Q, D, targets, margin=1.0, distance="cosine").item() == pytest.approx((1.4 + 0) / 2)


def test_contrastive_by_hand():
    """Positive at 5; negatives at 1 and 10 with a margin of 3: 25 / 2, 2^2 / 2 and 0."""
    targets = Targets(torch.tensor([[0, 1, 2]]))
    options = {"margin": 3.0, "distance": "euclidean"}
    assert contrastive(Q0, D0, targets, **options).item() == pytest.approx((12.5 + 2) / 3, rel=1e-5)
    assert contrastive(Q0, D0, targets, reduction="sum", **options).item() == pytest.approx(14.5, rel=1e-5)
    # Hard: the positive (5 > 1) and the negative at 1 (1 < 5), not that at 10.
    assert online_contrastive(Q0, D0, targets, **options).item() == pytest.approx(25 + 4, rel=1e-5)


def test_online_contrastive_with_pairs_of_one_kind():
    """Positives at 5, 1, 10, mean 5.33: only 10 is hard. As negatives with margin 6: 5 and 1 are nearer than that."""
    group = torch.tensor([[0, 1, 2]])
    positives, negatives = Targets(group, torch.ones(1, 3)), Targets(group, torch.zeros(1, 3))
    options = {"margin": 6.0, "distance": "euclidean"}
    assert online_contrastive(Q0, D0, positives, **options).item() == pytest.approx(100, rel=1e-5)
    assert online_contrastive(Q0, D0, negatives, **options).item() == pytest.approx(1 + 25, rel=1e-5)


def test_cross_entropies_by_hand():
    """Logits 3 of the positive, 1 and -2 of its negatives; the second query has a positive alone, of 5. Without a
    positive, a query has a term of `binary_cross_entropy` alone."""
    Q, D = torch.ones(2, 1), torch.tensor([[3.0], [1.0], [-2.0], [5.0]])
    targets = Targets(torch.tensor([[0, 1, 2], [3, -1, -1]]))
    listwise = math.log(math.exp(3 / 2) + math.exp(1 / 2) + math.exp(-2 / 2)) - 3 / 2
    assert listwise_cross_entropy(Q, D, targets, temperature=2.0).item() == pytest.approx((listwise + 0) / 2)
    binary = sum(math.log1p(math.exp(2 * x)) for x in (-3, 1, -2, -5))
    assert binary_cross_entropy(Q, D, targets, scale=2.0).item() == pytest.approx(binary / 4)
    targets = Targets(targets.group, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert listwise_cross_entropy(Q, D, targets, temperature=2.0).item() == pytest.approx((listwise + 0) / 2)
    binary = sum(math.log1p(math.exp(2 * x)) for x in (-3, 1, -2, 5))
    assert binary_cross_entropy(Q, D, targets, scale=2.0).item() == pytest.approx(binary / 4)


def make_pair(num_columns: int, fill: str, dtype: torch.dtype):
    Q, D, group = random_pair(8, num_columns, duplicates=fill == "duplicates", dtype=dtype)
    if fill == "some zero":
        with torch.no_grad():
            Q[3], D[5], D[-2] = 0, 0, 0
    return Q, D, group


every_fill = pytest.mark.parametrize("fill", ["random", "duplicates", "some zero"])


@every_distance
@every_fill
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("margin", [0.5, 5.0])
def test_triplet_equals_sentence_transformers(margin, dtype, tolerance, fill, distance):
    st_losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    metric = getattr(st_losses.TripletDistanceMetric, distance.upper())
    Q, D, group = make_pair(2, fill, dtype)
    reference = st_losses.TripletLoss(model=None, distance_metric=metric, triplet_margin=margin)
    value = reference.compute_loss_from_embeddings([Q, *D.chunk(2)], None)
    theirs = value.detach(), *torch.autograd.grad(value, (Q, D))
    ours = loss_and_gradients(triplet, Q, D, Targets(group), margin=margin, distance=distance)
    assert_equal(ours, theirs, tolerance)


@every_distance
@every_fill
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("labels", ["both", "positive", "negative"])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
def test_contrastive_equals_sentence_transformers(num_negatives, labels, dtype, tolerance, fill, distance):
    """Every listed document is a row of the reference; labels at random, or all of a kind."""
    st_losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    siamese = pytest.importorskip("sentence_transformers.sentence_transformer.losses.contrastive")
    name = "COSINE_DISTANCE" if distance == "cosine" else distance.upper()
    metric = getattr(siamese.SiameseDistanceMetric, name)
    Q, D, group = make_pair(1 + num_negatives, fill, dtype)
    random = torch.randint(0, 2, group.shape, generator=torch.Generator().manual_seed(num_negatives))
    relevance = {"both": random, "positive": torch.ones_like(random), "negative": torch.zeros_like(random)}[labels]
    targets = Targets(group, relevance)
    queries = Q.repeat_interleave(1 + num_negatives, dim=0)
    margin = {"cosine": 0.9, "euclidean": 5.0, "manhattan": 14.0}[distance]
    pairs = [
        (contrastive, st_losses.ContrastiveLoss(None, metric, margin), {}),
        (contrastive, st_losses.ContrastiveLoss(None, metric, margin, size_average=False), {"reduction": "sum"}),
        (online_contrastive, st_losses.OnlineContrastiveLoss(None, metric, margin), {}),
    ]
    for loss, reference, options in pairs:
        value = reference.compute_loss_from_embeddings([queries, D[group.flatten()]], relevance.flatten())
        theirs = value.detach(), *torch.autograd.grad(value, (Q, D))
        ours = loss_and_gradients(loss, Q, D, targets, margin=margin, distance=distance, **options)
        assert_equal(ours, theirs, tolerance)


@every_loss
@every_distance
def test_windows_are_as_near_as_the_nearest(loss, distance):
    """Documents of 2, 1 and 3 windows; the loss of the nearest ones, put in by hand for each query."""
    Q, D = random_vectors(2, 4), random_vectors(6, 4, seed=1)
    document = torch.tensor([0, 2, 1, 2, 0, 2])
    if distance == "cosine":
        far = 1 - F.normalize(Q, dim=1) @ F.normalize(D, dim=1).T
    else:
        far = torch.stack([(q - D).norm(p=2 if distance == "euclidean" else 1, dim=1) for q in Q])
    nearest = [
        min((j for j in range(6) if document[j] == m), key=lambda j: far[i, j]) for i in (0, 1) for m in (0, 1, 2)
    ]
    options = {"margin": 3.0, "distance": distance}
    plain = Targets(torch.tensor([[0, 1, 2], [4, 3, 5]]))
    windows = Targets(torch.tensor([[0, 1, 2], [1, 0, 2]]), document=document)
    expected = loss(Q, D[nearest], plain, **options)
    theirs = expected.detach(), *torch.autograd.grad(expected, (Q, D))
    assert_equal(loss_and_gradients(loss, Q, D, windows, **options), theirs, 1e-9)


@every_loss
def test_what_is_not_listed_or_known_to_be_relevant_makes_no_pair(loss):
    """Document 2 is listed as a hard negative of query 0, and known to answer it."""
    Q, D = random_vectors(3, 4), random_vectors(5, 4, seed=1)
    group = torch.tensor([[0, 2, 3], [1, 4, -1], [-1, -1, -1]])
    without = Targets(torch.tensor([[0, 3], [1, 4]]))
    with_it = Targets(group, known=torch.tensor([[0, 2], [2, 3]]))
    value, grad_Q, grad_D = loss_and_gradients(loss, Q, D, with_it, margin=2.0)
    expected = loss(Q[:2], D, without, margin=2.0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert not grad_Q[2].any()
    assert not grad_D[2].any()


@every_loss
@every_distance
@pytest.mark.parametrize("fill", ["random", "equal", "zero", "tiny", "huge"])
@pytest.mark.parametrize(
    "group", [[[0, -1]], [[0, 1]], [[0, -1], [0, -1]], [[-1, -1]] * 2, [[0, 2], [1, -1]], [[0, 0], [0, 0]]], ids=str
)
def test_value_and_gradients_are_finite(loss, group, fill, distance):
    Q, D = (random_vectors(n, 4, seed=n, dtype=torch.float32).detach() for n in (len(group), 3))
    if fill in ("equal", "zero"):
        Q, D = (torch.full_like(x, float(fill == "equal")) for x in (Q, D))
    elif fill != "random":
        Q, D = (x * {"tiny": 1e-15, "huge": 1e15}[fill] for x in (Q, D))
    targets = Targets(torch.tensor(group))
    results = loss_and_gradients(loss, Q.requires_grad_(), D.requires_grad_(), targets, distance=distance)
    assert all(torch.isfinite(result).all() for result in results)


@every_loss
@every_distance
def test_gradient_check(loss, distance):
    """With negatives on both sides of the margin, none of them near it."""
    Q, D = random_vectors(4, 5), random_vectors(8, 5, seed=1)
    targets = Targets(torch.tensor([[0, 4, 1], [1, 5, 3], [2, 6, 7], [3, 7, -1]]))
    options = {"margin": 1.0, "distance": distance}
    assert torch.autograd.gradcheck(lambda q, d: loss(q, d, targets, **options), (Q, D))


@every_loss
@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"margin": -0.5}, ("margin", -0.5, 0, "finite")),
        ({"margin": float("nan")}, ("margin", "nan", 0, "finite")),
        ({"distance": "dot"}, ("distance", "dot", "cosine", "euclidean", "manhattan")),
    ],
)
def test_refuses(loss, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        loss(Q0, D0, Targets(torch.tensor([[0, 1]])), **options)


@every_loss
@pytest.mark.parametrize("group", [torch.tensor([[0], [1]]), torch.zeros(2, 0, dtype=torch.int64)], ids=["one", "none"])
def test_refuses_a_batch_that_lists_no_negative(loss, group):
    """Unless relevance says of some of the single documents that they are negatives; a triplet has two."""
    Q, D = random_vectors(2, 4), random_vectors(2, 4, seed=1)
    with pytest.raises(ValueError, match=naming(loss.__name__, group.shape[1], "negatives")):
        loss(Q, D, Targets(group))
    graded = Targets(group, torch.tensor([[0], [1]])[:, : group.shape[1]])
    if loss is triplet:
        with pytest.raises(ValueError, match=naming("triplet", group.shape[1], "negatives")):
            loss(Q, D, graded)
    else:
        assert (loss(Q, D, graded, margin=5.0) > 0) == (group.shape[1] > 0)


def test_refuses_another_reduction():
    with pytest.raises(ValueError, match=naming("reduction", "none", "mean", "sum")):
        contrastive(Q0, D0, Targets(torch.tensor([[0, 1]])), reduction="none")
