"""components.py: what losses report, by name and value; nothing twice, and nothing unless collected."""

import functools
import gc

import pytest
import torch
from loss_checks import random_vectors
from torch import nn

from embedft import Targets, build_loss
from embedft.losses import rows
from embedft.losses.components import collect, loss_name, record, scope
from embedft.losses.contrastive import global_orthogonal, in_batch_negatives
from embedft.losses.guided import guided_in_batch_negatives
from embedft.losses.matryoshka import Matryoshka, WeightedSum

TARGETS = Targets(torch.tensor([[0, 3], [1, 4], [2, 5]]))


def vectors(seed: int = 0):
    return random_vectors(3, 8, seed=seed), random_vectors(6, 8, seed=seed + 1)


def found_by(loss, targets=TARGETS, seed: int = 0):
    with collect() as found:
        loss(*vectors(seed), targets)
    return found


def test_nothing_is_recorded_unless_someone_collects():
    record("a", torch.tensor(1.0))
    with collect() as found:
        record("a", 2.0)
        with scope("b"):
            record("a", torch.tensor(3.0, requires_grad=True))
        record("a", 4.0)
    record("a", 5.0)
    assert {name: value.item() for name, value in found.items()} == {"a": 2, "b/a": 3, "a_2": 4}
    assert not any(value.requires_grad for value in found.values())


def test_a_sum_records_its_parts_without_their_weights():
    Q, D = vectors()
    parts = [in_batch_negatives, functools.partial(in_batch_negatives, temperature=1.0), global_orthogonal]
    found = found_by(WeightedSum(losses=parts, weights=[1.0, 0.5, 0.1]))
    expected = [part(Q, D, TARGETS) for part in parts]
    assert list(found) == ["in_batch_negatives", "in_batch_negatives_2", "global_orthogonal"]
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_matryoshka_records_every_dimension():
    Q, D = vectors()
    found = found_by(Matryoshka(dims=[8, 4], inner=in_batch_negatives, weights=[1.0, 3.0]))
    assert list(found) == ["matryoshka/8", "matryoshka/4"]
    assert found["matryoshka/4"].item() == pytest.approx(in_batch_negatives(Q[:, :4], D[:, :4], TARGETS).item())


def test_names_tell_where_a_value_comes_from():
    inner = {"name": "sum", "losses": [{"name": "learnable_sigmoid"}, {"name": "learnable_temperature"}]}
    matryoshka = {"name": "matryoshka", "dims": [8, 4], "inner": inner}
    found = found_by(build_loss({"name": "sum", "losses": [matryoshka, {"name": "global_orthogonal"}]}))
    for dim in ("8", "4"):
        for part, values in {
            "learnable_sigmoid": ["temperature", "bias"],
            "learnable_temperature": ["temperature"],
        }.items():
            names = [f"matryoshka/{dim}/{part}", *(f"matryoshka/{dim}/{part}/{value}" for value in values)]
            assert set(names) <= set(found)
    assert len(found) == 2 + 2 * (1 + 2 + 1 + 2)
    assert found["matryoshka/4/learnable_sigmoid/bias"].item() == -10
    assert found["matryoshka/8/learnable_sigmoid/temperature"].item() == pytest.approx(0.1)
    assert found["matryoshka/8/learnable_temperature/temperature"].item() == pytest.approx(0.05)


@pytest.mark.parametrize("few", [False, True])
def test_the_share_of_masked_negatives_by_hand(few):
    """Cosines of the guide: query 0 with documents 1 and 2 0.9 and 0.1, its own 0.5, and so on in a circle.

    Each query has two negatives, of which the guide finds one closer than the positive: half are masked.
    """
    guide_Q = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    targets = Targets(torch.tensor([[0], [1], [2]]), references={"guide": (guide_Q, torch.eye(3))})
    with collect() as found:
        guided_in_batch_negatives(
            *(random_vectors(3, 8, seed=i) for i in (0, 1)),
            targets,
            contrast_queries=False,
            contrast_positives=False,
            rows=1 if few else None,
        )
    assert {name: value.item() for name, value in found.items()} == {"masked_negatives": 0.5}


def test_losses_computed_a_few_rows_at_a_time_record_once():
    """Neither in the pieces of the forward pass nor in the backward pass, which computes them again."""

    def losses(Q, D, targets):
        record("a piece", Q.sum())
        return ((Q @ D.T).sum(dim=1),)

    Q, D = vectors()
    with collect() as found:
        rows.by_rows(losses, Q, D, TARGETS, 1)[0].sum().backward()
        value = build_loss({"name": "sum", "losses": [{"name": "in_batch_negatives", "rows": 1}]})(Q, D, TARGETS)
        value.backward()
    assert list(found) == ["in_batch_negatives"]


def test_what_was_recorded_keeps_no_graph():
    found = found_by(WeightedSum(losses=[in_batch_negatives]))
    gc.collect()
    assert all(value.grad_fn is None for value in found.values())


def test_collecting_changes_no_value_and_no_gradient():
    loss = build_loss({"name": "matryoshka", "dims": [8, 4], "inner": {"name": "learnable_temperature"}})
    Q, D = vectors()
    expected = torch.autograd.grad(loss(Q, D, TARGETS), (Q, D))
    with collect():
        found = torch.autograd.grad(loss(Q, D, TARGETS), (Q, D))
        assert torch.autograd.gradcheck(lambda Q, D: loss.double()(Q, D, TARGETS), (Q.double(), D.double()))
    assert all(map(torch.equal, found, expected))


def test_names_of_losses():
    def mine(Q, D, targets):
        return Q.sum()

    class MyOwnLoss(nn.Module):
        pass

    assert [loss_name(x) for x in (mine, functools.partial(mine), MyOwnLoss(), lambda Q, D, targets: 0)] == [
        "mine",
        "mine",
        "my_own_loss",
        "lambda",
    ]


def test_a_module_that_is_two_parts_is_saved_once():
    """Its parameters appear once in the state, which loads again."""
    part = build_loss({"name": "learnable_temperature"})
    loss = WeightedSum(losses=[part, in_batch_negatives, part, build_loss({"name": "learnable_sigmoid"})])
    assert list(loss.state_dict()) == ["parts.0.log_temperature", "parts.3.log_temperature", "parts.3.bias"]
    assert len(list(loss.parameters())) == 3
    other = WeightedSum(losses=[part, in_batch_negatives, part, build_loss({"name": "learnable_sigmoid"})])
    other.load_state_dict(loss.state_dict())
    assert list(found_by(loss)) == [
        "learnable_temperature/temperature",
        "learnable_temperature",
        "in_batch_negatives",
        "learnable_temperature/temperature_2",
        "learnable_temperature_2",
        "learnable_sigmoid/temperature",
        "learnable_sigmoid/bias",
        "learnable_sigmoid",
    ]
