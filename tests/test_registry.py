"""registry.py: losses by name; what a configuration may get wrong is refused before anything runs."""

import inspect

import pytest
import torch

from embedft import LOSSES, Targets, build_loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_the_contract(name):
    parameters = list(inspect.signature(LOSSES[name]).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == ["Q", "D", "targets"]
    for option in parameters[3:]:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
    assert LOSSES[name].__name__ == name
    assert "Source:" in LOSSES[name].__doc__
    assert callable(build_loss({"name": name}))


def test_options_reach_the_loss():
    spec = {"name": "in_batch_negatives", "temperature": 1, "similarity": "dot"}
    Q, D, targets = torch.eye(2), 3 * torch.eye(2), Targets(torch.tensor([[0], [1]]))
    built = build_loss(spec)
    assert built(Q, D, targets) == LOSSES["in_batch_negatives"](Q, D, targets, temperature=1.0, similarity="dot")
    assert built(Q, D, targets) != build_loss({"name": "in_batch_negatives"})(Q, D, targets)
    assert spec == {"name": "in_batch_negatives", "temperature": 1, "similarity": "dot"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "triplet"}, "loss name is 'triplet', expected one of in_batch_negatives"),
        ({"name": None}, "loss name is None, expected one of in_batch_negatives"),
        (
            {"name": ["in_batch_negatives"]},
            r"loss name is \['in_batch_negatives'\], expected one of in_batch_negatives",
        ),
        ({"temprature": 1.0}, "in_batch_negatives has no option 'temprature', expected one of temperature, similarity"),
        ({"temperature": "warm"}, "in_batch_negatives: temperature is 'warm', expected a number"),
        ({"temperature": True}, "in_batch_negatives: temperature is True, expected a number"),
        ({"temperature": None}, "in_batch_negatives: temperature is None, expected a number"),
        ({"temperature": 0}, "temperature is 0, expected above 0"),
        ({"similarity": "euclid"}, "similarity is 'euclid', expected one of cosine, dot"),
    ],
)
def test_says_what_is_wrong_and_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        build_loss({"name": "in_batch_negatives"} | options)


def test_a_loss_without_a_name_is_refused():
    with pytest.raises(ValueError, match="loss name is None"):
        build_loss({"temperature": 0.1})
