"""listwise.py: by hand, against loops, against the metric that it approximates."""

import dataclasses
import itertools
import math

import pytest
import torch
from loss_checks import assert_equal, loss_and_gradients, random_vectors
from naming import naming

from embedft import Run, Targets, build_loss
from embedft.losses.listwise import approx_ndcg, pearson, ranknet
from embedft.retrieval.metrics import judge, measure

QUERY = torch.tensor([[1.0]], dtype=torch.float64)


def documents(*scores: float) -> torch.Tensor:
    """Document vectors whose inner products with QUERY are the scores."""
    return torch.tensor(scores, dtype=torch.float64)[:, None]


def graded(*grades: float) -> Targets:
    """QUERY lists every document, with these grades."""
    places = torch.arange(len(grades))[None]
    return Targets(places, relevance=torch.tensor([grades]), target_scores=torch.tensor([grades]))


def test_approx_ndcg_by_hand():
    """Scores 0 and ln 3: sigmoid(ln 3) = 3/4 of a rank above the first, so ranks 1.75 and 1.25."""
    D = documents(0.0, math.log(3))
    loss = approx_ndcg(QUERY, D, Targets(torch.tensor([[0, 1]])), temperature=1.0)
    assert loss.item() == pytest.approx(1 - 1 / math.log2(2.75), rel=1e-12)
    # At half the temperature sigmoid(2 ln 3) = 9/10.
    loss = approx_ndcg(QUERY, D, Targets(torch.tensor([[0, 1]])), temperature=0.5)
    assert loss.item() == pytest.approx(1 - 1 / math.log2(2.9), rel=1e-12)
    best = 3 + 1 / math.log2(3)
    expected = 1 - (1 / math.log2(2.75) + 3 / math.log2(2.25)) / best
    assert approx_ndcg(QUERY, D, graded(1, 3), temperature=1.0).item() == pytest.approx(expected, rel=1e-12)
    # With "binary", both are relevant, and any order is the best.
    assert approx_ndcg(QUERY, D, graded(1, 3), temperature=1.0, gain="binary").item() == 0
    binary = approx_ndcg(QUERY, D, graded(3, 0), temperature=1.0, gain="binary")
    assert binary.item() == pytest.approx(1 - 1 / math.log2(2.75), rel=1e-12)


def test_ranknet_by_hand():
    """Scores 0, ln 3 and 0, grades 1, 3 and 0: the pairs (2nd, 1st), (2nd, 3rd) and (1st, 3rd)."""
    D = documents(0.0, math.log(3), 0.0)
    losses = [math.log(1 + 1 / 3), math.log(1 + 1 / 3), math.log(2)]
    assert ranknet(QUERY, D, graded(1, 3, 0)).item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    # Ranks 2.5, 1 and 2.5: discounts 1 / log2 of 3.5, 2 and 3.5; the third pair changes nothing.
    apart, best = 1 - 1 / math.log2(3.5), 3 + 1 / math.log2(3)
    expected = (2 * apart * losses[0] + 3 * apart * losses[1]) / best / 3
    assert ranknet(QUERY, D, graded(1, 3, 0), weights="ndcg").item() == pytest.approx(expected, rel=1e-12)
    # exp(ln 3 / (1/2)) = 9.
    halved = ranknet(QUERY, D[:2], graded(1, 3), temperature=0.5)
    assert halved.item() == pytest.approx(math.log(1 + 1 / 9), rel=1e-12)


def test_pearson_by_hand():
    """(1, 2, 3) with (1, 3, 2): covariance 1, variances 2 and 2."""
    D = documents(1.0, 2.0, 3.0)
    assert pearson(QUERY, D, graded(1, 3, 2)).item() == pytest.approx(0.5, rel=1e-12)
    assert pearson(QUERY, D, graded(-7, -1, -4)).item() == pytest.approx(0.5, rel=1e-12)
    assert pearson(QUERY, D * 0.01 + 5, graded(1, 2, 3)).item() == pytest.approx(0, abs=1e-9)
    assert pearson(QUERY, D, graded(2, 1, 0)).item() == pytest.approx(2, rel=1e-12)
    assert pearson(QUERY, documents(0.1, 0.1, 0.1), graded(1, 2, 3)).item() == 1


NAMES = ("approx_ndcg", "ranknet", "pearson")


def make_lists(seed: int = 0, *, num_queries: int = 7, width: int = 6):
    """Queries of two to six listed documents with grades 0 to 3 and other target scores."""
    generator = torch.Generator().manual_seed(seed)
    Q, D = random_vectors(num_queries, 4, seed=seed), random_vectors(15, 4, seed=seed + 1)
    group = torch.stack([torch.randperm(15, generator=generator)[:width] for _ in range(num_queries)])
    for row in range(num_queries):
        group[row, 2 + row % (width - 1) :] = -1
    relevance = torch.randint(0, 4, group.shape, generator=generator).double()
    relevance[:, 0], relevance[:, 1] = 2, 0
    scores = torch.randn(group.shape, generator=generator, dtype=torch.float64)
    return Q, D, Targets(group, relevance, target_scores=scores.where(group >= 0, float("nan")))


def rows_of(Q, D, targets: Targets, by: str = "relevance"):
    """(scores, grades) of the documents that each query lists, as lists of tensors."""
    for row, group in enumerate(targets.group):
        listed = group >= 0
        yield list(D[group[listed]] @ Q[row]), getattr(targets, by)[row][listed].tolist()


def naive_ndcg(scores, gains, temperature):
    """As allRank writes it, but for the gain: a loop over ranks."""
    dcg = 0
    for i, gain in enumerate(gains):
        rank = 1 + sum(1 / (1 + torch.exp(-(scores[j] - scores[i]) / temperature)) for j in range(len(gains)) if j != i)
        dcg = dcg + gain / torch.log2(1 + rank)
    return dcg / sum(gain / math.log2(1 + place) for place, gain in enumerate(sorted(gains, reverse=True), 1))


def naive(name: str, Q, D, targets: Targets) -> torch.Tensor:
    lists, losses = list(rows_of(Q, D, targets, "target_scores" if name == "pearson" else "relevance")), []
    for scores, grades in lists:
        if name == "approx_ndcg":
            losses.append(1 - naive_ndcg(scores, grades, 0.7))
        elif name == "ranknet":
            pairs = itertools.permutations(zip(scores, grades, strict=True), 2)
            losses += [torch.log(1 + torch.exp(-(s - t) / 0.7)) for (s, y), (t, z) in pairs if y > z]
        else:
            losses.append(
                1 - torch.corrcoef(torch.stack([torch.stack(scores), torch.tensor(grades, dtype=torch.float64)]))[0, 1]
            )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_equals_a_loop(name, seed):
    Q, D, targets = make_lists(seed)
    loss = build_loss({"name": name, **({} if name == "pearson" else {"temperature": 0.7})})
    expected = loss_and_gradients(lambda *given: naive(name, *given), Q, D, targets)
    assert_equal(loss_and_gradients(loss, Q, D, targets), expected, 1e-9)


@pytest.mark.parametrize("gain", ["binary", "graded"])
def test_approx_ndcg_tends_to_the_metric(gain):
    """Over the listed documents, as the temperature tends to 0; at 1 it is not there yet."""
    Q, D, targets = make_lists(3)
    run, qrels = {}, {}
    for row, (scores, grades) in enumerate(rows_of(Q, D, targets)):
        run[f"q{row}"] = {f"d{i}": score.item() for i, score in enumerate(scores)}
        qrels[f"q{row}"] = {f"d{i}": grade for i, grade in enumerate(grades)}
    exact = 1 - measure(judge(Run.from_dict(run), qrels), ["ndcg"], gain=gain)["ndcg"].mean()
    found = [approx_ndcg(Q, D, targets, temperature=t, gain=gain).item() for t in (1.0, 1e-2, 1e-4)]
    assert found[2] == pytest.approx(exact, abs=1e-12)
    assert abs(found[0] - exact) > 1e-2
    assert abs(found[1] - exact) < abs(found[0] - exact)


@pytest.mark.parametrize("name", ["approx_ndcg", "ranknet"])
def test_grades_may_be_target_scores(name):
    Q, D, targets = make_lists()
    scores = targets.relevance.flip(1)
    given = Targets(targets.group, targets.relevance, target_scores=scores.where(targets.group >= 0, float("nan")))
    expected = loss_and_gradients(build_loss({"name": name}), Q, D, Targets(targets.group, scores))
    found = loss_and_gradients(build_loss({"name": name, "grades": "target_scores"}), Q, D, given)
    assert_equal(found, expected, 1e-12)
    with pytest.raises(ValueError, match=naming(name, "target_scores")):
        build_loss({"name": name, "grades": "target_scores"})(Q, D, dataclasses.replace(given, target_scores=None))


@pytest.mark.parametrize("name", ["approx_ndcg", "ranknet"])
def test_what_is_known_to_be_relevant_is_left_out(name):
    """The query's second document is listed as a hard negative, although it is known to be relevant."""
    Q, D, loss = random_vectors(1, 4), random_vectors(3, 4, seed=1), build_loss({"name": name})
    known = Targets(torch.tensor([[0, 1, 2]]), known=torch.tensor([[0, 1]]))
    expected = loss_and_gradients(loss, Q, D, Targets(torch.tensor([[0, 2]])))
    assert_equal(loss_and_gradients(loss, Q, D, known), expected, 1e-12)
    assert loss_and_gradients(loss, Q, D, known)[2][1].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_query_with_nothing_to_order_is_skipped(name):
    """All its documents have the same grade, so there is neither a better order nor a gradient."""
    Q, D = random_vectors(2, 4), random_vectors(6, 4, seed=1)
    group, grades = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[2.0, 1.0, 0.0], [0.1, 0.1, 0.1]])
    value, grad_Q, _ = loss_and_gradients(
        build_loss({"name": name}), Q, D, Targets(group, grades, target_scores=grades)
    )
    alone = Targets(group[:1], grades[:1], target_scores=grades[:1])
    expected, first, _ = loss_and_gradients(build_loss({"name": name}), Q[:1].detach().requires_grad_(), D, alone)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad_Q, torch.cat([first, torch.zeros(1, 4)]))


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ({"name": "approx_ndcg", "temperature": 0}, ("temperature", 0)),
        ({"name": "approx_ndcg", "gain": "exponential"}, ("gain", "exponential", "binary", "graded")),
        ({"name": "approx_ndcg", "grades": "scores"}, ("grades", "scores", "relevance", "target_scores")),
        ({"name": "ranknet", "temperature": -1.0}, ("temperature", -1.0)),
        ({"name": "ranknet", "weights": "lambda"}, ("weights", "lambda", "none", "ndcg")),
        ({"name": "pearson", "temperature": 1.0}, ("pearson", "temperature", "similarity")),
    ],
)
def test_refuses(spec, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        build_loss(spec)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_lists_of_one(name):
    Q, D, targets = make_lists()
    with pytest.raises(ValueError, match=naming(name, 1, "negatives")):
        build_loss({"name": name})(Q, D, Targets(targets.group[:, :1], target_scores=targets.target_scores[:, :1]))
