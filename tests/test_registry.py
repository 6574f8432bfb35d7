"""registry.py: losses by name; invalid configurations are refused before anything runs."""

import inspect
import json
import math
import re
import warnings

import pytest
import torch
from naming import naming
from torch import nn

from embedft import LOSSES, Targets, build_loss
from embedft.losses import registry
from embedft.losses.components import collect
from embedft.losses.matryoshka import Matryoshka, WeightedSum
from embedft.losses.registry import describe_losses, loss_options

IN_BATCH = {"name": "in_batch_negatives"}
MATRYOSHKA = {"name": "matryoshka", "dims": [4], "inner": IN_BATCH}
# What has no default.
REQUIRED = {
    "matryoshka": {"dims": [8, 4], "inner": IN_BATCH},
    "sum": {"losses": [IN_BATCH]},
    "projected_distillation": {"student_dim": 8, "teacher_dim": 16},
    "quantized": {"precision": "binary", "inner": IN_BATCH},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_the_contract(name):
    """Functions: (Q, D, targets), then options with defaults. Modules: options, then (Q, D, targets) forward."""
    is_module = isinstance(LOSSES[name], type)
    called = LOSSES[name].forward if is_module else LOSSES[name]
    parameters = list(inspect.signature(called).parameters.values())[1 if is_module else 0 :]
    assert [parameter.name for parameter in parameters[:3]] == ["Q", "D", "targets"]
    options = list(loss_options(LOSSES[name]).values())
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.annotation is not inspect.Parameter.empty
    required = {option.name for option in options if option.default is inspect.Parameter.empty}
    assert required == REQUIRED.get(name, {}).keys()
    assert is_module or LOSSES[name].__name__ == name
    assert "Source:" in LOSSES[name].__doc__
    built = build_loss({"name": name} | REQUIRED.get(name, {}))
    assert callable(built)
    assert isinstance(built, nn.Module) == is_module


def test_options_reach_the_loss():
    spec = {"name": "in_batch_negatives", "temperature": 1, "similarity": "dot"}
    Q, D, targets = torch.eye(2), 3 * torch.eye(2), Targets(torch.tensor([[0], [1]]))
    built = build_loss(spec)
    assert built(Q, D, targets) == LOSSES["in_batch_negatives"](Q, D, targets, temperature=1.0, similarity="dot")
    assert built(Q, D, targets) != build_loss(IN_BATCH)(Q, D, targets)
    assert spec == {"name": "in_batch_negatives", "temperature": 1, "similarity": "dot"}


def test_losses_are_built_inside_losses():
    spec = {
        "name": "matryoshka",
        "dims": [4, 2],
        "weights": [1, 0.5],
        "inner": {
            "name": "sum",
            "losses": [IN_BATCH | {"temperature": 0.5}, {"name": "toward_base", "truncate": True}],
            "weights": [2.0, 0.1],
        },
    }
    before = json.dumps(spec)
    loss = build_loss(spec)
    assert json.dumps(spec) == before
    assert isinstance(loss, Matryoshka)
    assert isinstance(loss.inner, WeightedSum)
    assert loss.inner.losses[0].keywords == {"temperature": 0.5}
    assert (loss.dims, loss.weights, loss.inner.weights) == ((4, 2), (1, 0.5), (2.0, 0.1))
    # A loss of one's own in the place of a spec.
    assert build_loss({"name": "matryoshka", "dims": [2], "inner": LOSSES["cosent"]}).inner is LOSSES["cosent"]


def test_the_trial_leaves_nothing_behind():
    """No call counted, no warning, no random number drawn, ready to train; whatever the dimensions are."""
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = {"name": "matryoshka", "dims": [8192, 64, 3], "inner": IN_BATCH, "dims_per_step": 1}
        projected = {"name": "projected_distillation", "student_dim": 16384, "teacher_dim": 5}
        loss = build_loss({"name": "sum", "losses": [spec, projected]})
    assert torch.equal(before, torch.get_rng_state())
    assert loss.training
    assert loss.losses[0].training
    assert loss.losses[0].num_calls == 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loss.parameters())


NAMES = "loss", "name", "in_batch_negatives", "sum"


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ({"name": "tripled"}, (*NAMES, "tripled")),
        ({"name": None}, (*NAMES, None)),
        ({"temperature": 0.1}, (*NAMES, None)),
        ({"name": ["in_batch_negatives"]}, (*NAMES, ["in_batch_negatives"])),
        ("cosent", ("loss", "cosent", "name", "options")),
        (IN_BATCH | {"temprature": 1.0}, ("in_batch_negatives", "temprature", "temperature", "rows")),
        (IN_BATCH | {"temperature": "warm"}, ("in_batch_negatives", "temperature", "warm", "float")),
        (IN_BATCH | {"temperature": True}, ("in_batch_negatives", "temperature", True, "float")),
        (IN_BATCH | {"temperature": None}, ("in_batch_negatives", "temperature", None, "float")),
        (IN_BATCH | {"temperature": 0}, ("temperature", 0, 0, "finite")),
        (IN_BATCH | {"similarity": "euclid"}, ("similarity", "euclid", "cosine", "dot")),
        (IN_BATCH | {"similarity": 5}, ("in_batch_negatives", "similarity", 5, "str")),
        (
            {"name": "listwise_kl", "student_temperature": "x"},
            ("listwise_kl", "student_temperature", "'x'", "float", "null"),
        ),
        ({"name": "toward_base", "truncate": 1}, ("toward_base", "truncate", 1, "bool")),
        ({"name": "matryoshka", "dims": [4]}, ("matryoshka", "inner", "loss")),
        ({"name": "matryoshka", "inner": IN_BATCH}, ("matryoshka", "dims", "[int")),
        (MATRYOSHKA | {"dims": [4, 2.5]}, ("matryoshka", "dims", [4, 2.5], "[int")),
        (MATRYOSHKA | {"dims": 4}, ("matryoshka", "dims", 4, "[int")),
        (MATRYOSHKA | {"weights": ["one"]}, ("matryoshka", "weights", ["one"], "[float", "null")),
        (MATRYOSHKA | {"inner": "in_batch_negatives"}, ("matryoshka", "inner", "'in_batch_negatives'", "loss")),
        (MATRYOSHKA | {"inner": {"name": "tripled"}}, (*NAMES, "tripled")),
        (MATRYOSHKA | {"dims": [4, 4]}, ("dims", [4, 4], 1, "twice")),
        ({"name": "sum", "losses": [IN_BATCH | {"temperature": -1}]}, ("temperature", -1, 0)),
        ({"name": "sum", "losses": IN_BATCH}, ("sum", "losses", IN_BATCH, "[{", "loss")),
        ({"name": "sum", "losses": [IN_BATCH], "weights": [math.inf]}, ("weights", [math.inf], "finite", 0, 0)),
        (MATRYOSHKA | {"weights": [math.inf]}, ("weights", [math.inf], "finite", 0, 0)),
        ({"name": "sigmoid", "bias": math.nan}, ("bias", math.nan, "finite")),
        ({"name": "sum", "losses": [IN_BATCH], "weights": [1, 2]}, ("weights", 2, 1, "losses")),
        ({"name": "projected_distillation"}, ("projected_distillation", "student_dim", "int")),
    ],
)
def test_says_what_is_wrong_and_what_would_be_right(spec, facts):
    with pytest.raises(ValueError, match=naming(*facts)) as error:
        build_loss(spec)
    assert "\n" not in str(error.value)


def test_every_loss_has_a_line():
    lines, meanings = describe_losses().splitlines()[::2], describe_losses().splitlines()[1::2]
    assert [line.partition(":")[0] for line in lines] == list(LOSSES)
    assert all(re.fullmatch(r"  \S.*\.", meaning) for meaning in meanings)  # the first sentence of its docstring
    assert meanings[list(LOSSES).index("margin_mse")].endswith("even one known to be relevant.")
    assert lines[0].startswith("in_batch_negatives: temperature=0.05")
    assert 'cosent: scale=20.0 similarity="cosine" pairs="first" windows="max"' in lines
    assert 'matryoshka: dims inner weights=null dims_per_step=-1 reduction="sum" seed=0' in lines
    assert "sum: losses weights=null" in lines


def test_a_loss_of_ones_own_is_a_function_and_a_line(monkeypatch):
    """Annotations are not asked of it; what it does with a value is found by trying."""

    def pull(Q, D, targets, *, power=2, name_of_it=None):
        """Mean |q - d|^power over listed pairs."""
        if power < 1:
            raise ValueError(f"power is {power}, expected at least 1")
        return (Q - D[targets.group[:, 0]]).norm(dim=1).pow(power).mean()

    monkeypatch.setitem(registry.LOSSES, "pull", pull)
    loss = build_loss({"name": "matryoshka", "dims": [2], "inner": {"name": "pull", "power": 3}})
    # Unit vectors at a right angle are sqrt 2 apart.
    value = loss(torch.eye(2), torch.eye(2).flip(0), Targets(torch.tensor([[0], [1]])))
    assert value.item() == pytest.approx(2**1.5)
    assert "pull: power=2 name_of_it=null" in describe_losses()
    with pytest.raises(ValueError, match=naming("power", 0, 1)):
        build_loss({"name": "pull", "power": 0})


# Objects in place of names.


def mine(Q, D, targets):
    return (Q[:, None] - D[targets.group[:, :1]]).square().mean()


class NeedsWidth(nn.Module):
    """A loss that a trial on two features would break."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 8, bias=False)

    def forward(self, Q, D, targets):
        return mine(self.map(Q), self.map(D), targets)


@pytest.mark.parametrize("loss", [mine, NeedsWidth()])
def test_a_loss_of_ones_own_needs_no_name(loss):
    """As it is, inside Matryoshka (at its full width) and in a sum."""
    Q, D, targets = torch.randn(2, 8), torch.randn(2, 8), Targets(torch.tensor([[0], [1]]))
    assert build_loss(loss) is loss
    summed = build_loss({"name": "sum", "losses": [loss, IN_BATCH], "weights": [2.0, 1.0]})
    expected = 2 * loss(Q, D, targets) + build_loss(IN_BATCH)(Q, D, targets)
    torch.testing.assert_close(summed(Q, D, targets), expected)
    nested = build_loss({"name": "matryoshka", "dims": [8], "inner": loss})
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (Q, D)]
    torch.testing.assert_close(nested(Q, D, targets), loss(*unit, targets))
    with collect() as found:
        summed(Q, D, targets)
    assert list(found) == ["mine" if loss is mine else "needs_width", "in_batch_negatives"]
    if loss is not mine:
        assert list(summed.state_dict()) == ["parts.0.map.weight"]
