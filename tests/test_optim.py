"""optim.py: one AdamW step by its formula, and the schedules of transformers."""

import math
from typing import get_args

import pytest
import torch
from naming import naming
from torch import nn

from embedft.training.optim import Schedule, build_optimizer, lr_factor


def test_one_step_by_its_formula():
    """First step of AdamW: the moments are unbiased, so a parameter moves by lr * g / (|g| + eps), after the decay."""
    weight, bias = nn.Parameter(torch.tensor([[1.0, -2.0]])), nn.Parameter(torch.tensor([3.0]))
    optimizer = build_optimizer(nn.ParameterList([weight, bias]), lr=0.1, weight_decay=0.5)
    weight.grad, bias.grad = torch.tensor([[4.0, -1e-8]]), torch.tensor([-2.0])
    optimizer.step()
    # Decay: 1 - 0.1 * 0.5 = 0.95, for the matrix alone. The gradient of 1e-8 is as large as eps: half a step.
    torch.testing.assert_close(weight.data, torch.tensor([[0.95 - 0.1, -1.9 + 0.05]]))
    torch.testing.assert_close(bias.data, torch.tensor([3.1]))
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


def test_matrices_are_decayed_biases_and_norms_are_not():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    decayed, kept = build_optimizer(model, lr=1e-3, weight_decay=0.01).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in kept["params"]] == [id(p) for p in (model[1].bias, model[2].weight, model[2].bias)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)


def factors(schedule, steps, **options):
    return [lr_factor(schedule, step, **options) for step in steps]


def test_schedules_by_hand():
    options = {"num_steps": 10, "warmup": 2}
    assert factors("linear", (0, 1, 2, 6, 9, 10), **options) == [0.0, 0.5, 1.0, 0.5, 0.125, 0.0]
    expected = pytest.approx([0.0, 0.5, 1.0, (1 + 0.5**0.5) / 2, 0.5, 0.0], abs=1e-15)
    assert factors("cosine", (0, 1, 2, 4, 6, 10), **options) == expected
    assert factors("constant", (0, 1, 4, 9), num_steps=10, warmup=4) == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("num_steps", "warmup"), [(20, 0), (20, 0.1), (21, 0.1), (20, 5), (3, 1), (1, 0), (7, 7), (5, 20)]
)
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_equals_transformers(schedule, num_steps, warmup):
    transformers = pytest.importorskip("transformers")
    num_warmup = math.ceil(warmup * num_steps) if warmup < 1 else warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    kwargs = {} if schedule == "constant" else {"num_training_steps": num_steps}
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    reference = make(optimizer, num_warmup_steps=num_warmup, **kwargs)
    for step, factor in enumerate(factors(schedule, range(num_steps), num_steps=num_steps, warmup=warmup)):
        assert factor == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-15), step
        optimizer.step()
        reference.step()


def test_warmup_is_a_fraction_or_whole_steps():
    assert lr_factor("linear", 1, num_steps=10, warmup=2.0) == 0.5
    with pytest.raises(ValueError, match=naming("warmup", 1.9, 1)):
        lr_factor("linear", 0, num_steps=10, warmup=1.9)


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match=naming("schedule", "cosin", "linear", "cosine", "constant")):
        lr_factor("cosin", 5, num_steps=10, warmup=0)
