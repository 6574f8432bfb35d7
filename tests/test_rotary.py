"""rotary.py against a rotation matrix per pair, and its frequencies against transformers'."""

import math
from types import SimpleNamespace

import pytest
import torch
from naming import naming

from embedft.encoders.rotary import angles, frequencies, rope_settings, rotate

KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def config(**changes):
    return SimpleNamespace(**{"rope_parameters": None, "rope_theta": None, "rope_scaling": None} | changes)


def test_pairs_turn_by_hand():
    """Width 4, theta 100: pair 0 = (x0, x2) turns by p radians, pair 1 = (x1, x3) by p / 10."""
    settings = rope_settings(config(rope_theta=100.0))
    turns = angles(torch.tensor([0, 3]), width=4, settings=settings, dtype=torch.float64)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]] * 2, dtype=torch.float64)
    found = rotate(x, turns)
    assert torch.equal(found[0], x[0])
    a, b = 3.0, 0.3
    expected = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    assert found[1, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings = rope_settings(config())

    def product(i, j):
        one, other = (
            rotate(x, angles(torch.tensor([p]), width=8, settings=settings, dtype=torch.float64))
            for x, p in ((q, i), (k, j))
        )
        return (one * other).sum().item()

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(8, 3), abs=1e-3)


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5}, {"truncate": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_transformers(kind, more):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": 5000.0, **KINDS[kind], **(more if kind == "yarn" else {})}
    theirs = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(parameters)
    )
    if kind == "default":
        expected, scale = 1.0 / 5000.0 ** (torch.arange(0, 16, 2) / 16), 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    found, found_scale = frequencies(16, rope_settings(config(rope_parameters=parameters)), torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found_scale == pytest.approx(scale)


def test_ntk_by_hand():
    """Width 4, theta 100, factor 4: pair 0 turns by 1 / 4^(1/2), the last by 1 / (10 * 4), as positions 4 times as
    far apart would."""
    settings = rope_settings(config(rope_theta=100.0, rope_scaling={"type": "ntk", "factor": 4.0}))
    found, scale = frequencies(4, settings, torch.device("cpu"))
    assert found.tolist() == pytest.approx([1 / 2, 1 / 40])
    assert scale == 1.0


def test_half_precision_is_kept():
    """Under autocast, queries are in bfloat16 and the turns in float32."""
    turns = angles(torch.tensor([0, 3]), width=4, settings=rope_settings(config()), dtype=torch.float32)
    x = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = rotate(x, turns)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), turns).bfloat16())


def test_old_and_new_fields_mean_the_same():
    old = config(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = config(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    one, other = (frequencies(8, rope_settings(each), torch.device("cpu"))[0] for each in (old, new))
    assert torch.equal(one, other)
    layers = config(rope_parameters={"a": {"rope_theta": 7.0}, "b": {"rope_theta": 9.0}})
    assert [rope_settings(layers, layer_type=name)["rope_theta"] for name in "ab"] == [7.0, 9.0]
    both = config(rope_scaling={"type": "linear", "rope_type": "ntk", "factor": 2.0})
    assert rope_settings(both)["rope_type"] == "ntk"  # as transformers 5 reads them


@pytest.mark.parametrize(
    ("parameters", "facts"),
    [
        ({"rope_type": "spiral"}, ("rope_type", "'spiral'", "default", "linear")),
        ({"rope_type": "linear"}, ("factor", "linear", None)),
        ({"rope_theta": -1}, ("rope_theta", -1)),
        ({"rope_theta": 1}, ("rope_theta", "default", 1, 1)),
        ({"rope_theta": 10**30}, ("rope_theta", 10**30)),
        ({"rope_theta": "big"}, ("rope_theta", "'big'")),
        ({"rope_type": "yarn", "factor": 2.0}, ("original_max_position_embeddings", "yarn")),
        ({"rope_type": ["linear"]}, ("rope_type", "['linear']", "linear")),
        ({"rope_type": "ntk", "factor": 2.0, "mixed_b": 0.5}, ("mixed_b", 0.5, "null")),
        ({**KINDS["yarn"], "rope_type": "yarn", "attention_factor": "x"}, ("attention_factor", "yarn", "'x'")),
        ({**KINDS["yarn"], "rope_type": "yarn", "beta_fast": 0}, ("beta_fast", "yarn", 0)),
        ({**KINDS["yarn"], "rope_type": "yarn", "beta_fast": 1e-320}, ("beta_fast", "yarn", 1e-320)),
        ({**KINDS["llama3"], "rope_type": "llama3", "low_freq_factor": 4.0}, ("low_freq_factor", 4.0, 4.0)),
    ],
)
def test_wrong_settings_are_named(parameters, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        rope_settings(config(rope_parameters=parameters))


@pytest.mark.parametrize("value", [None, 5, ["linear"]])
def test_settings_by_layer_type_are_objects(value):
    with pytest.raises(ValueError, match=naming("rope_parameters", "local", value)):
        rope_settings(config(rope_parameters={"local": value}), layer_type="local")


def test_settings_by_layer_type_are_there_for_each():
    with pytest.raises(ValueError, match=naming("rope_parameters", "local", None)):
        rope_settings(config(rope_parameters={"global": {"rope_theta": 7.0}}), layer_type="local")
