"""gte.py against transformers, on tiny random weights, and under the fields that were published."""

from dataclasses import replace

import pytest
import torch
from families import (
    SEQUENCES,
    SIZES,
    assert_equal_in_float32,
    assert_equal_to_reference,
    assert_saved_as_theirs,
    load_both,
    publish,
    their_hidden,
)
from naming import naming
from safetensors.torch import load_file, save_file

from embedft.encoders.folder import FAMILIES, read_config
from embedft.encoders.packing import pack
from embedft.encoders.weights import read_encoder

# Of gte-multilingual-base, with smaller sizes: what says how it computes.
PUBLISHED = {
    **SIZES,
    "model_type": "new",
    "type_vocab_size": 1,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
    "rope_theta": 20000,
    "rope_scaling": {"type": "ntk", "factor": 8.0},
}


def reference(head: str = "Model", **changes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"Gte{head}")(transformers.GteConfig(**SIZES | changes))


@pytest.mark.parametrize("num_types", [0, 1, 2])
def test_hidden_states_gradients_and_tensors(tmp_path, num_types):
    """Without token types, as gte-base-en-v1.5; with one, as the others."""
    encoder, model = load_both(tmp_path, reference(type_vocab_size=num_types))
    assert_equal_to_reference(encoder, model)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(type_vocab_size=num_types))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.1},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}},
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change):
    encoder, model = load_both(tmp_path, reference(**change))
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_heads_are_left_out(tmp_path, head):
    encoder, model = load_both(tmp_path, reference(head))
    expected = their_hidden(model.gte, SEQUENCES)
    torch.testing.assert_close(encoder(pack(SEQUENCES)), expected, rtol=0, atol=1e-9)


def test_the_period_that_transformers_assumes():
    theirs = pytest.importorskip("transformers").GteConfig(**SIZES)
    assert FAMILIES["gte"].Config(**SIZES).rope_theta == theirs.rope_parameters["rope_theta"] == 160_000


@pytest.mark.parametrize("model_type", ["new", "gte"])
def test_published_fields_mean_the_same(tmp_path, model_type):
    """ "gte" is also what snowflake-arctic-embed-m-v2.0 says."""
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    expected, _ = load_both(tmp_path, reference(**changes))
    publish(tmp_path, PUBLISHED | {"model_type": model_type, "rope_theta": 500, "rope_scaling": None})
    family, config, _ = read_config(tmp_path)
    assert config == replace(expected.config, rope_theta=500, rope_parameters=None)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"new.{name}": x for name, x in weights.items()}, tmp_path / "model.safetensors")
    found, _ = read_encoder(tmp_path, family, config, torch.float64)
    assert torch.equal(found.eval()(pack(SEQUENCES)), expected(pack(SEQUENCES)))


def test_scaling_is_another_base_and_factor(tmp_path):
    """Of transformers' types, linear with base 20000 * 8 and factor 8^(2 / K) has the same frequencies; here K = 8."""
    linear = {"rope_type": "linear", "rope_theta": 160_000.0, "factor": 8**0.25}
    _, model = load_both(tmp_path, reference(rope_parameters=linear))
    publish(tmp_path, PUBLISHED)
    family, config, _ = read_config(tmp_path)
    encoder, _ = read_encoder(tmp_path, family, config, torch.float64)
    torch.testing.assert_close(encoder.eval()(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "facts"),
    [
        ("logn_attention_scale", True, ("true", "false")),
        ("position_embedding_type", "absolute", ("absolute", "rope")),
        ("layer_norm_type", "rms_norm", ("rms_norm", "layer_norm")),
        ("pack_qkv", False, ("false", "true")),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, ("'dynamic'", "ntk")),
        ("rope_scaling", {"type": "ntk"}, ("factor", None)),
        ("rope_scaling", {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}, ("mixed_b", 0.6, "null")),
        ("type_vocab_size", -1, (-1, 0)),
        ("hidden_size", 36, (36, "num_attention_heads", 4)),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(tmp_path, field, value, facts):
    publish(tmp_path, PUBLISHED | {field: value})
    named = () if field == "rope_scaling" else (field,)
    with pytest.raises(ValueError, match=naming("config.json", *named, *facts)):
        read_config(tmp_path)


def test_rows_that_no_tensor_has_are_named(tmp_path):
    reference().save_pretrained(tmp_path)
    publish(tmp_path, PUBLISHED | {"type_vocab_size": 10**9})
    family, config, _ = read_config(tmp_path)
    with pytest.raises(ValueError, match=naming("config.json", "type_vocab_size", 10**9, 96)):
        read_encoder(tmp_path, family, config, torch.float32)
