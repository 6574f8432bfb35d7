"""rows.py: rows of scores at a time are the same numbers in less memory."""

import dataclasses
from functools import partial

import pytest
import torch
from loss_checks import assert_equal, loss_and_gradients, random_vectors
from test_contrastive import random_targets
from torch.utils._python_dispatch import TorchDispatchMode

from embedft import Targets
from embedft.losses import rows as rows_module
from embedft.losses.contrastive import LearnableTemperature, in_batch_negatives, multi_positive
from embedft.losses.guided import guided_in_batch_negatives
from embedft.losses.rows import by_rows
from embedft.losses.sigmoid import LearnableSigmoid, sigmoid

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


@pytest.mark.parametrize("make", [LearnableTemperature, LearnableSigmoid])
def test_parameters_get_the_same_gradient(make):
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), with_everything(0)
    gradients = []
    for rows in (7, 2):
        loss = make(temperature=0.2, rows=rows).double()
        gradients.append(torch.autograd.grad(loss(Q, D, targets), list(loss.parameters())))
    assert_equal(gradients[1], gradients[0], 1e-12)


def test_rows_are_chosen_by_the_number_of_scores(monkeypatch):
    """12 scores at a time and 5 documents: two queries, then two, then one; with 13 documents one at a time."""
    monkeypatch.setattr(rows_module, "SCORES_AT_A_TIME", 12)
    sizes = []

    def losses(Q, D, targets):
        sizes.append((len(Q), len(targets.group)))
        return (Q.sum(dim=1),)

    with torch.no_grad():
        for num_documents in (5, 13):
            Q, D = torch.ones(5, 2), torch.ones(num_documents, 2)
            (sums,) = by_rows(losses, Q, D, Targets(torch.zeros(5, 1, dtype=torch.int64)), None)
            assert sums.tolist() == [2.0] * 5
    assert sizes == [(2, 2), (2, 2), (1, 1)] + [(1, 1)] * 5


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
