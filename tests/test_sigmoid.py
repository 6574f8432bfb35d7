"""Sigmoid losses: by hand, against a loop over pairs, and the gradients of what is learned."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_checks import assert_equal, loss_and_gradients, random_vectors
from naming import naming
from test_contrastive import EDGES, identities, random_targets

from embedft import Targets
from embedft.losses.contrastive import LearnableSigmoid, sigmoid


def test_by_hand():
    """Cosines 1 and 0, temperature 0.5, bias -1: logits 1 for the positives, -1 for the negatives."""
    Q = D = torch.eye(2)
    loss = sigmoid(Q, D, Targets(torch.tensor([[0], [1]])), temperature=0.5, bias=-1.0)
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-6)
    # Documents the wrong way round: -log sigmoid(-1) for each of the two pairs of a query.
    loss = sigmoid(Q, D, Targets(torch.tensor([[1], [0]])), temperature=0.5, bias=-1.0)
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(1)), rel=1e-6)
    assert sigmoid(
        Q * 2, D, Targets(torch.tensor([[0], [1]])), temperature=0.5, bias=-1.0, similarity="dot"
    ).item() == (pytest.approx(math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-1)), rel=1e-6))


def naive_sigmoid(Q, D, targets, temperature, bias):
    _, _, relevant = identities(targets)
    losses = []
    for i, q in enumerate(Q):
        for j, d in enumerate(D):
            logit = F.cosine_similarity(q, d, dim=0) / temperature + bias
            losses.append((1 + (-logit if (i, j) in relevant else logit).exp()).log())
    return sum(losses) / len(Q)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(seed):
    Q, D, targets = random_vectors(7, 5, seed=seed), random_vectors(9, 5, seed=seed + 100), random_targets(7, 9, seed)
    options = {"temperature": 0.3, "bias": -2.0}
    ours = loss_and_gradients(sigmoid, Q, D, targets, **options)
    assert_equal(ours, loss_and_gradients(naive_sigmoid, Q, D, targets, **options), 1e-9)
    assert torch.autograd.gradcheck(lambda q, d: sigmoid(q, d, targets, **options), (Q, D))


@pytest.mark.parametrize("rows", [None, 3])
def test_learnable_sigmoid(rows):
    """The function at its parameters, and central differences for their gradients."""
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), random_targets(7, 9, 0)
    loss = LearnableSigmoid(temperature=0.3, bias=-2.0, rows=rows).double()
    value = loss(Q, D, targets)
    log_temperature, step = loss.log_temperature.item(), 1e-5
    assert log_temperature == pytest.approx(math.log(0.3), rel=1e-6)

    def at(more_log_temperature: float, more_bias: float) -> float:
        temperature = math.exp(log_temperature + more_log_temperature)
        return sigmoid(Q, D, targets, temperature=temperature, bias=-2.0 + more_bias).item()

    assert value.item() == pytest.approx(at(0, 0), rel=1e-12)
    value.backward()
    by_temperature = (at(step, 0) - at(-step, 0)) / (2 * step)
    assert loss.log_temperature.grad.item() == pytest.approx(by_temperature, rel=1e-7)
    assert loss.bias.grad.item() == pytest.approx((at(0, step) - at(0, -step)) / (2 * step), rel=1e-7)
    assert {name for name, _ in loss.named_parameters()} == {"log_temperature", "bias"}


@pytest.mark.parametrize("fill", ["random", "equal", "zero", "tiny", "huge"])
@pytest.mark.parametrize("edge", EDGES)
def test_value_and_gradients_are_finite(edge, fill):
    num_queries, num_documents, targets = EDGES[edge]
    Q, D = (random_vectors(n, 4, seed=n, dtype=torch.float32).detach() for n in (num_queries, num_documents))
    if fill in ("equal", "zero"):
        Q, D = (torch.full_like(x, float(fill == "equal")) for x in (Q, D))
    elif fill != "random":
        Q, D = (x * {"tiny": 1e-15, "huge": 1e15}[fill] for x in (Q, D))
    for loss in (sigmoid, LearnableSigmoid()):
        results = loss_and_gradients(loss, Q.requires_grad_(), D.requires_grad_(), targets)
        assert all(torch.isfinite(result).all() for result in results)


def test_no_query_is_zero():
    assert sigmoid(torch.ones(0, 2), torch.eye(2), Targets(torch.zeros(0, 1, dtype=torch.int64))).item() == 0.0


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf])
def test_refuses_a_bias_that_is_not_finite(bias):
    Q = torch.ones(1, 2)
    with pytest.raises(ValueError, match=naming("bias", bias, "finite")):
        sigmoid(Q, Q, Targets(torch.tensor([[0]])), bias=bias)
    with pytest.raises(ValueError, match=naming("bias", bias, "finite")):
        LearnableSigmoid(bias=bias)


def test_refuses_a_temperature_that_is_not_above_zero():
    Q = torch.ones(1, 2)
    with pytest.raises(ValueError, match=naming("temperature", 0.0, 0)):
        sigmoid(Q, Q, Targets(torch.tensor([[0]])), temperature=0.0)
    with pytest.raises(ValueError, match=naming("temperature", -1.0, 0)):
        LearnableSigmoid(temperature=-1.0)
