"""rows.py: scoring a few rows at a time gives the same numbers in less memory."""

import dataclasses
from functools import partial

import pytest
import torch
from loss_checks import assert_equal, loss_and_gradients, random_vectors
from naming import naming
from test_contrastive import random_targets
from torch.utils._python_dispatch import TorchDispatchMode

from embedft import Targets
from embedft.losses.contrastive import (
    LearnableSigmoid,
    LearnableTemperature,
    in_batch_negatives,
    multi_positive,
    sigmoid,
)
from embedft.losses.distillation import embedding_distillation, listwise_kl, margin_mse
from embedft.losses.guided import guided_in_batch_negatives
from embedft.losses.pairwise import angle, contrastive, cosine_mse, triplet
from embedft.losses.rows import by_rows

SUMS = {
    "in_batch_negatives": in_batch_negatives,
    "inner products": partial(in_batch_negatives, similarity="dot", temperature=2.0),
    "hardness": partial(in_batch_negatives, hardness="hard_negatives", hardness_strength=5.0),
    "decoupled": partial(in_batch_negatives, decoupled=True),
    "listed": partial(in_batch_negatives, in_batch=False),
    "soft windows": partial(in_batch_negatives, windows="softmax"),
    "multi_positive": multi_positive,
    "sigmoid": sigmoid,
    "guided": partial(guided_in_batch_negatives, contrast_queries=False, contrast_positives=False),
}
every_sum = pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)


class LargestTensor(TorchDispatchMode):
    """The most entries of any tensor that an operation makes, forward or backward."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def with_everything(seed: int, document: torch.Tensor | None = None) -> Targets:
    targets = random_targets(7, 5, seed)
    guide = random_vectors(7, 3, seed=9).detach(), random_vectors(9, 3, seed=10).detach()
    return dataclasses.replace(targets, document=document, references={"guide": guide})


@every_sum
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("document", [None, torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 0])], ids=["", "windows"])
def test_any_number_of_rows_is_the_same(loss, document, rows):
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), with_everything(0, document)
    whole = loss_and_gradients(loss, Q, D, targets, rows=7)
    assert_equal(loss_and_gradients(loss, Q, D, targets, rows=rows), whole, 1e-12)


# The share of hardness in the logits is held constant, so its differences are not its gradient.
@pytest.mark.parametrize("name", [name for name in SUMS if name != "hardness"])
def test_gradient_check(name):
    loss = SUMS[name]
    Q, D, targets = (
        random_vectors(4, 3),
        random_vectors(6, 3, seed=1),
        Targets(torch.tensor([[0, 4], [1, 5], [2, 0], [3, 3]])),
    )
    guide = random_vectors(4, 3, seed=2).detach(), random_vectors(6, 3, seed=3).detach()
    targets = dataclasses.replace(targets, references={"guide": guide})
    assert torch.autograd.gradcheck(lambda q, d: loss(q, d, targets, rows=3), (Q, D))


@every_sum
def test_scores_are_never_whole(loss):
    """64 queries and 128 documents, 4 rows at a time: nothing of more than 4 x 128 entries but Q and D themselves."""
    Q, D = random_vectors(64, 8), random_vectors(128, 8, seed=1)
    group = torch.arange(128).view(2, 64).T
    targets = Targets(group, references={"guide": (Q.detach(), D.detach())})
    with LargestTensor() as chunked:
        loss(Q, D, targets, rows=4).backward()
    assert chunked.largest <= 128 * 8
    with LargestTensor() as whole:
        loss(Q, D, targets, rows=64).backward()
    assert whole.largest >= 64 * 128


@every_sum
def test_scores_of_a_large_batch_are_never_whole(loss):
    """A million scores, without being asked: half a million at a time."""
    Q, D = random_vectors(1024, 2, dtype=torch.float32), random_vectors(1024, 2, seed=1, dtype=torch.float32)
    targets = Targets(torch.arange(2048).view(2, 1024).T % 1024, references={"guide": (Q.detach(), D.detach())})
    with LargestTensor() as largest:
        loss(Q, D, targets).backward()
    # With one more column where the positive is beside the negatives.
    assert 2**19 <= largest.largest <= 2**19 + 512


WITHOUT_ROWS = {
    "similarities": partial(embedding_distillation, distance="similarities"),
    "margin_mse": margin_mse,
    "soft windows": partial(margin_mse, windows="softmax", similarity="cosine"),
    "listwise_kl": listwise_kl,
    "cosine_mse": cosine_mse,
    "angle": partial(angle, pairs="all"),
    "triplet": triplet,
    "manhattan": partial(triplet, distance="manhattan"),
    "contrastive": contrastive,
}


@pytest.mark.parametrize("loss", WITHOUT_ROWS.values(), ids=WITHOUT_ROWS)
def test_losses_of_listed_documents_take_windows_by_rows(loss, monkeypatch):
    """64 queries and 128 windows of 64 documents, 4 rows at a time: the same, in less."""
    Q, D = random_vectors(64, 8), random_vectors(128, 8, seed=1)
    group = torch.arange(128).view(2, 64).T % 61
    teacher = random_vectors(64, 2, seed=2).detach(), random_vectors(128, 2, seed=3).detach()
    targets = Targets(
        *(group, None, None, torch.arange(128) % 64), target_scores=teacher[0], references={"teacher": teacher}
    )
    with LargestTensor() as whole:
        expected = loss_and_gradients(loss, Q, D, targets)
    assert whole.largest >= 64 * 128
    monkeypatch.setitem(by_rows.__kwdefaults__, "scores_at_a_time", 4 * 128)
    with LargestTensor() as chunked:
        found = loss_and_gradients(loss, Q, D, targets)
    assert chunked.largest <= 128 * 8
    assert_equal(found, expected, 1e-12)


def test_every_positive_of_a_guide_takes_a_row(monkeypatch):
    """Four positives a query, 2 queries at a time, hold what one and 8 do; hard negatives cost nothing."""
    monkeypatch.setitem(by_rows.__kwdefaults__, "scores_at_a_time", 8 * 128)
    Q, D = random_vectors(64, 8), random_vectors(128, 8, seed=1)
    references = {"guide": (Q.detach(), D.detach())}
    group = (torch.arange(64)[:, None] + torch.tensor([0, 31, 62, 93])) % 128

    def most_kept(group: torch.Tensor, relevance: torch.Tensor | None) -> int:
        """Entries that autograd keeps at its most."""
        kept, most = 0, 0

        class Kept:
            def __init__(self, x):
                nonlocal kept, most
                self.x, kept = x, kept + x.numel()
                most = max(most, kept)

            def __del__(self):
                nonlocal kept
                kept -= self.x.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda handle: handle.x):
            loss = SUMS["guided"](Q, D, Targets(group, relevance, references=references))
            loss.backward()
        return most

    one = most_kept(group[:, :1], None)
    assert one > 8 * 128
    assert most_kept(group, torch.ones(64, 4)) <= 1.1 * one
    assert most_kept(group, None) <= 1.1 * one


def test_second_derivatives_are_refused():
    """They would come out as if the first ones were constant."""
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), with_everything(0)
    (gradient,) = torch.autograd.grad(in_batch_negatives(Q, D, targets, rows=7), Q, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), Q)[0].any()
    with pytest.raises(RuntimeError, match=naming("differentiable", "create_graph=True", "rows=B")):
        torch.autograd.grad(in_batch_negatives(Q, D, targets, rows=2), Q, create_graph=True)


def test_a_loss_of_constants_has_no_gradient():
    """Nor a part that is one: the first two queries here."""
    Q, D = random_vectors(5, 2), random_vectors(5, 2, seed=1)
    targets = Targets(torch.zeros(5, 1, dtype=torch.int64))

    def losses(Q, D, targets, factor):
        return ((Q.detach() if Q[0, 0] == first else Q).sum(dim=1) * factor,)

    first = Q[0, 0].item()
    value = by_rows(losses, Q, D, targets, 2, 3.0)[0].sum()
    grad_Q, grad_D = torch.autograd.grad(value, (Q, D), allow_unused=True)
    assert grad_Q.tolist() == [[0.0] * 2] * 2 + [[3.0] * 2] * 3
    assert grad_D is None


@pytest.mark.parametrize("temperature", [0.05, torch.tensor(0.3, requires_grad=True)], ids=["number", "tensor"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("rows", [7, 2])
def test_autocast_of_the_caller_changes_nothing(similarity, temperature, rows):
    """Scores are in float32, forward and backward, and nothing that is cast without gradient is kept for the caller."""
    Q, D = random_vectors(7, 5, dtype=torch.float32), random_vectors(9, 5, seed=1, dtype=torch.float32)
    options = {"rows": rows, "similarity": similarity, "temperature": temperature}
    inputs, results = [Q, D, *([temperature] if isinstance(temperature, torch.Tensor) else [])], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = in_batch_negatives(Q, D, with_everything(0), **options)
            of_caller = (Q @ D.T).sum()
        results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        assert torch.autograd.grad(of_caller, D)[0].any()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["in_batch_negatives", "multi_positive", "sigmoid", "guided"])
def test_a_temperature_may_be_a_tensor_that_learns(name):
    """The gradient is that of the batch as a whole, and central differences."""
    Q, D, targets, loss = random_vectors(7, 5), random_vectors(9, 5, seed=1), with_everything(0), SUMS[name]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for rows in (7, 2):
        value = loss(Q, D, targets, temperature=temperature, rows=rows)
        gradients.append(torch.autograd.grad(value, (temperature, Q, D)))
    assert_equal(gradients[1], gradients[0], 1e-12)
    above, below = (loss(Q, D, targets, temperature=0.3 + step).item() for step in (1e-5, -1e-5))
    assert gradients[0][0].item() == pytest.approx((above - below) / 2e-5, rel=1e-6)
    assert abs(gradients[0][0]) > 0.01


@pytest.mark.parametrize("make", [LearnableTemperature, LearnableSigmoid])
def test_parameters_get_the_same_gradient(make):
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), with_everything(0)
    gradients = []
    for rows in (7, 2):
        loss = make(temperature=0.2, rows=rows).double()
        gradients.append(torch.autograd.grad(loss(Q, D, targets), list(loss.parameters())))
    assert_equal(gradients[1], gradients[0], 1e-12)


def test_rows_are_chosen_by_the_number_of_scores():
    """12 scores at a time and 5 documents: two queries, then two, then one; with 13 documents one at a time. With 2, of
    which a query takes three rows of scores, two at a time again."""
    sizes = []

    def losses(Q, D, targets):
        sizes.append((len(Q), len(targets.group)))
        return (Q.sum(dim=1),)

    with torch.no_grad():
        for num_documents, width in ((5, 1), (13, 1), (2, 3)):
            Q, D = torch.ones(5, 2), torch.ones(num_documents, 2)
            targets, sizes_of = Targets(torch.zeros(5, 1, dtype=torch.int64)), {"width": width, "scores_at_a_time": 12}
            (sums,) = by_rows(losses, Q, D, targets, None, **sizes_of)
            assert sums.tolist() == [2.0] * 5
    assert sizes == [(2, 2), (2, 2), (1, 1)] + [(1, 1)] * 5 + [(2, 2), (2, 2), (1, 1)]


def test_each_row_is_computed_again_in_the_backward_pass():
    calls = []

    def losses(Q, D, targets):
        calls.append(len(Q))
        return (Q.exp().sum(dim=1),)

    Q = torch.ones(5, 2, requires_grad=True)
    (sums,) = by_rows(losses, Q, Q.detach(), Targets(torch.zeros(5, 1, dtype=torch.int64)), 2)
    assert calls == [2, 2, 1]
    sums.sum().backward()
    assert sorted(calls[3:]) == [1, 2, 2]
    torch.testing.assert_close(Q.grad, Q.detach().exp())
