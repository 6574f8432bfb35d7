"""pairwise.py, its losses of scored pairs: by hand, against sentence-transformers, against loops over pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_checks import PRECISIONS, assert_equal, loss_and_gradients, random_pair, random_vectors, reference_gradients
from naming import naming

from embedft import Targets
from embedft.losses.distillation import listwise_kl, margin_mse
from embedft.losses.pairwise import angle, cosent, cosine_mse, listed_scores
from embedft.losses.targets import scores

LOSSES = {"cosine_mse": cosine_mse, "cosent": cosent, "angle": angle}
EYE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def pairs_of(gold: list[float]) -> Targets:
    return Targets(torch.arange(len(gold))[:, None], target_scores=torch.tensor(gold)[:, None])


def test_cosine_mse_by_hand():
    """Cosines 1 and 0.6 where gold says 0.5 and 0: ((1 - 0.5)^2 + (0.6 - 0)^2) / 2 = (0.25 + 0.36) / 2."""
    Q, D = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    assert cosine_mse(Q, D, pairs_of([0.5, 0.0])).item() == pytest.approx(0.305, rel=1e-6)


def test_cosent_by_hand():
    """Cosines 1, 0.6, 0 with gold 0, 1, 1: the first is above both, by 0.4 and 1: log(1 + e^(2*0.4) + e^(2*1))."""
    Q, D = torch.tensor([[2.0, 0.0], [3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    expected = math.log(1 + math.exp(0.8) + math.exp(2.0))
    assert cosent(Q, D, pairs_of([0.0, 1.0, 1.0]), scale=2.0).item() == pytest.approx(expected, rel=1e-6)
    # Inner products 2, 15, 0: 2 * (2 - 15) and 2 * (2 - 0).
    expected = math.log(1 + math.exp(-26.0) + math.exp(4.0))
    found = cosent(Q, D, pairs_of([0.0, 1.0, 1.0]), scale=2.0, similarity="dot")
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert cosent(Q, D, pairs_of([0.5, 0.5, 0.5])).item() == 0.0


def test_angle_by_hand():
    """As complex numbers (real half, imaginary half). (1, 0) with (1, 0): |1 + 0| = 1. (1, 0) with (0, 1): the
    cosine is 0, the other term q2 d1 - q1 d2 = 0 - 1, so |0 - 1| = 1. (1, 0) with (0.6, 0.8): |0.6 - 0.8| = 0.2."""
    Q, D = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    found = angle(Q, D, pairs_of([0.0, 0.5, 1.0]), scale=1.0)
    # The pairs (first, second), (first, third) and (second, third): differences 0, 0.8 and 0.8.
    assert found.item() == pytest.approx(math.log(1 + 1 + 2 * math.exp(0.8)), rel=1e-6)


def reference_of(name: str):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    return {"cosine_mse": losses.CosineSimilarityLoss, "cosent": losses.CoSENTLoss, "angle": losses.AnglELoss}[name]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("dim", [12, 7])
@pytest.mark.parametrize(
    ("name", "options", "reference_options"),
    [
        ("cosine_mse", {}, {}),
        ("cosent", {}, {}),
        ("cosent", {"scale": 3.0}, {"scale": 3.0}),
        ("cosent", {"similarity": "dot", "scale": 1.0}, {"scale": 1.0, "similarity_fct": "dot"}),
        ("angle", {}, {}),
        ("angle", {"scale": 5.0}, {"scale": 5.0}),
    ],
)
def test_equals_sentence_transformers(name, options, reference_options, dim, duplicates, dtype, tolerance):
    """Gold scores in steps of a fifth, so that some are equal."""
    if "similarity_fct" in reference_options:
        util = pytest.importorskip("sentence_transformers.util")
        reference_options = reference_options | {"similarity_fct": util.pairwise_dot_score}
    reference = reference_of(name)(model=None, **reference_options)
    Q, D, group = random_pair(11, 1, dim=dim, duplicates=duplicates, dtype=dtype)
    # Divided in float32, to which the reference rounds the gold scores of cosine_mse.
    gold = (torch.arange(11) * 7 % 6 / 5).to(dtype)
    ours = loss_and_gradients(LOSSES[name], Q, D, Targets(group, target_scores=gold[:, None]), **options)
    assert_equal(ours, reference_gradients(reference, Q, D, 1, gold), tolerance)


@pytest.mark.parametrize("name", ["cosine_mse", "cosent"])
@pytest.mark.parametrize("num_negatives", [1, 3])
def test_hard_negatives_of_a_pair_count_nowhere(name, num_negatives):
    Q, D, group = random_pair(6, 1 + num_negatives)
    gold = random_vectors(6, 1 + num_negatives, seed=5).detach()
    ours = loss_and_gradients(LOSSES[name], Q, D, Targets(group, target_scores=gold))
    first = loss_and_gradients(LOSSES[name], Q, D, Targets(group[:, :1], target_scores=gold[:, :1]))
    assert_equal(ours, first, 1e-12)


@pytest.mark.parametrize("num_negatives", [1, 2, 3])
def test_angle_of_rows_with_negatives_equals_sentence_transformers(num_negatives):
    """Which gives the negatives of a positive scored y the score 1 - y."""
    Q, D, group = random_pair(6, 1 + num_negatives)
    gold = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.stack([gold, *[1 - gold] * num_negatives], dim=1)
    ours = loss_and_gradients(angle, Q, D, Targets(group, target_scores=scores), pairs="all")
    assert_equal(ours, reference_gradients(reference_of("angle")(model=None), Q, D, 1 + num_negatives, gold), 1e-9)


def loop(name, Q, D, targets, scale=20.0):
    """The docstrings' formulas over all listed pairs, one at a time."""
    pairs = []
    for i, listed in enumerate(targets.group.tolist()):
        for g, j in enumerate(listed):
            if j >= 0:
                q, d = F.normalize(Q[i], dim=0), F.normalize(D[j], dim=0)
                if name == "angle":
                    q, d = (torch.complex(*x.chunk(2)) for x in (q, d))
                    product = (q * d.conj()).sum()
                    pairs.append(((product.real + product.imag).abs(), targets.target_scores[i, g]))
                else:
                    pairs.append((q @ d, targets.target_scores[i, g]))
    if name == "cosine_mse":
        return sum((s - gold) ** 2 for s, gold in pairs) / len(pairs)
    terms = [(scale * (s - t)).exp() for s, gold in pairs for t, other in pairs if gold < other]
    return (1 + sum(terms)).log()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(name, seed):
    """Shared documents, pairs that are not there, equal gold scores."""
    generator = torch.Generator().manual_seed(seed)
    Q, D = random_vectors(7, 6, seed=seed), random_vectors(5, 6, seed=seed + 100)
    group = torch.randint(-1, 5, (7, 2), generator=generator)
    gold = torch.randint(0, 4, (7, 2), generator=generator).double() / 3
    gold[group < 0] = float("nan")
    targets = Targets(group, target_scores=gold)
    ours = loss_and_gradients(LOSSES[name], Q, D, targets, pairs="all")
    assert_equal(ours, loss_and_gradients(lambda q, d, t: loop(name, q, d, t), Q, D, targets), 1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_the_best_window_of_a_document_stands_for_it(name):
    """Ten columns, three of document 0 and so on: the same as with the best column of each listed document alone."""
    Q, D = random_vectors(4, 6), random_vectors(10, 6, seed=1)
    document = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    gold = torch.tensor([[0.0], [0.7], [0.2], [1.0]], dtype=torch.float64)
    targets = Targets(torch.arange(4)[:, None], target_scores=gold, document=document)

    def similarity(i, c):
        # From a loss of one pair with gold 0: the square of a cosine; for the angle |.| from a pair of pairs.
        q, d = F.normalize(Q[i], dim=0), F.normalize(D[c], dim=0)
        if name == "angle":
            q, d = (torch.complex(*x.chunk(2)) for x in (q, d))
            product = (q * d.conj()).sum()
            return (product.real + product.imag).abs().item()
        return (q @ d).item()

    best = [max((c for c in range(10) if document[c] == i), key=lambda c, i=i: similarity(i, c)) for i in range(4)]
    ours = loss_and_gradients(LOSSES[name], Q, D, targets)
    alone = loss_and_gradients(LOSSES[name], Q, D, Targets(torch.tensor(best)[:, None], target_scores=gold))
    assert_equal(ours, alone, 1e-9)


def test_soft_windows_are_those_of_scores():
    Q, D = random_vectors(3, 6), random_vectors(7, 6, seed=1)
    targets = Targets(torch.tensor([[0, 1], [2, 0], [1, 2]]), document=torch.tensor([0, 2, 1, 1, 2, 0, 1]))
    for windows in ("max", "softmax"):
        expected = scores(Q, D, targets, windows=windows).gather(1, targets.group)
        torch.testing.assert_close(listed_scores(Q, D, targets, windows=windows), expected)
    scored = Targets(targets.group, document=targets.document, target_scores=random_vectors(3, 2, seed=2).detach())
    for loss in (*LOSSES.values(), margin_mse, listwise_kl):
        assert loss(Q, D, scored, windows="softmax") != loss(Q, D, scored, windows="max")


def test_pairs_without_a_document_count_nowhere():
    nothing = Targets(torch.tensor([[-1], [-1]]), target_scores=torch.full((2, 1), float("nan")))
    for loss in LOSSES.values():
        Q, D = random_vectors(2, 4), random_vectors(2, 4, seed=1)
        value, *gradients = loss_and_gradients(loss, Q, D, nothing)
        assert value.item() == 0.0
        assert not any(gradient.any() for gradient in gradients)


def test_equal_gold_scores_and_huge_differences_stay_finite():
    Q, D = random_vectors(3, 4, dtype=torch.float32), random_vectors(3, 4, seed=1, dtype=torch.float32)
    value, *gradients = loss_and_gradients(cosent, Q, D, pairs_of([1.0, 1.0, 1.0]))
    assert value.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)
    for scale in (1e4, 1e-4):
        for result in loss_and_gradients(cosent, Q, D, pairs_of([0.0, 1.0, 0.0]), scale=scale, similarity="dot"):
            assert torch.isfinite(result).all()


def test_listed_scores():
    """What is listed is a gather of what `scores` says of all."""
    D = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    targets = Targets(torch.tensor([[2, 1], [0, 0]]))
    torch.testing.assert_close(listed_scores(EYE, D, targets), torch.tensor([[1.0, 0.0], [0.8, 0.8]]))
    torch.testing.assert_close(listed_scores(EYE, D, targets, similarity="dot"), torch.tensor([[1.0, 0.0], [4.0, 4.0]]))


@pytest.mark.parametrize(
    ("loss", "options", "facts"),
    [
        (cosent, {"scale": 0.0}, ("scale", 0.0, 0)),
        (angle, {"scale": math.nan}, ("scale", math.nan, 0)),
        (cosent, {"similarity": "l2"}, ("similarity", "l2", "cosine", "dot")),
        (angle, {"windows": "mean"}, ("windows", "mean", "max", "softmax")),
        (cosine_mse, {"pairs": "last"}, ("pairs", "last", "first", "all")),
    ],
)
def test_refuses(loss, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        loss(EYE, EYE, pairs_of([0.0, 1.0]), **options)


@pytest.mark.parametrize("name", LOSSES)
def test_says_that_scores_are_missing(name):
    with pytest.raises(ValueError, match=naming(name, "target_scores")):
        LOSSES[name](EYE, EYE, Targets(torch.tensor([[0], [1]])))


@pytest.mark.parametrize("length", [0.0, 1e-10, 1.0])
def test_cosine_mse_of_vectors_of_no_length_equals_sentence_transformers(length):
    """Which clamps lengths at 1e-8, where the length has a gradient still: a hundred million times the error."""
    Q, D, group = random_pair(4, 1)
    Q = (Q.detach() * torch.tensor([length, 1, 1, 1])[:, None]).requires_grad_()
    gold = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    ours = loss_and_gradients(cosine_mse, Q, D, Targets(group, target_scores=gold[:, None]))
    assert_equal(ours, reference_gradients(reference_of("cosine_mse")(model=None), Q, D, 1, gold), 1e-9)
