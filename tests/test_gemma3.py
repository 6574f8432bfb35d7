"""gemma3.py against transformers, on tiny random weights."""

import json

import pytest
import torch
from families import (
    SEQUENCES,
    assert_equal_in_float32,
    assert_equal_to_reference,
    assert_saved_as_theirs,
    exact_norms,
    load_both,
    their_hidden,
    tiny_encoder,
)
from naming import naming

from embedft.encoders.folder import read_config
from embedft.encoders.packing import pack
from embedft.encoders.weights import read_encoder

SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,  # a square: transformers rounds its root to float32, also in float64
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}


def reference(**changes):
    transformers = pytest.importorskip("transformers")
    return transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**SIZES | changes))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_hidden_states_gradients_and_tensors(tmp_path, bidirectional):
    encoder, model = load_both(tmp_path, reference(use_bidirectional_attention=bidirectional))
    assert_equal_to_reference(encoder, exact_norms(model))
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(use_bidirectional_attention=bidirectional))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        *({"sliding_window": window} for window in (2, 3, 4, 6, 200)),
        {"layer_types": None, "num_hidden_layers": 7},
        {"layer_types": None, "sliding_window_pattern": 2},
        {"query_pre_attn_scalar": 100},
        {"num_key_value_heads": 2},
        {"hidden_activation": "silu"},
        {"attention_bias": True},
        {"rms_norm_eps": 0.1},
        {"rope_parameters": ROPE},
        {"final_logit_softcapping": 30.0},
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change, bidirectional):
    """A window of odd width has a token less on either side than half of it."""
    encoder, model = load_both(tmp_path, reference(use_bidirectional_attention=bidirectional, **change))
    found, expected = encoder(pack(SEQUENCES)), their_hidden(exact_norms(model), SEQUENCES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_texts_longer_than_a_block(tmp_path, bidirectional):
    """Windows are computed in blocks of at least 64 tokens."""
    changes = {"max_position_embeddings": 256, "sliding_window": 30, "use_bidirectional_attention": bidirectional}
    encoder, model = load_both(tmp_path, reference(**changes))
    sequences = [[2 + i % 59 for i in range(n)] for n in (200, 130, 129, 64, 3)]
    found, expected = encoder(pack(sequences)), their_hidden(exact_norms(model), sequences)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 300.0, "rope_local_base_freq": 30.0, "rope_scaling": None},
        {"rope_theta": 300.0, "rope_local_base_freq": 30.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": 300.0},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", ["layer_types", "sliding_window_pattern"])
def test_config_json_before_transformers_5(tmp_path, old, layers):
    """Two bases of rotary positions, of which `rope_scaling` concerns the global layers'."""
    load_both(tmp_path, reference(use_bidirectional_attention=True))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values = {key: values[key] for key in values.keys() - {"rope_parameters", "layer_types", "sliding_window_pattern"}}
    kinds = {"layer_types": SIZES["layer_types"], "sliding_window_pattern": 3}
    path.write_text(json.dumps(values | {layers: kinds[layers], "attn_logit_softcapping": None} | old))
    family, config, _ = read_config(tmp_path)
    encoder, _ = read_encoder(tmp_path, family, config, torch.float64)
    model = type(reference()).from_pretrained(tmp_path, dtype=torch.float64).eval()
    found, expected = encoder(pack(SEQUENCES)), their_hidden(exact_norms(model), SEQUENCES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_tokens_are_scaled_before_they_are_rounded(tmp_path):
    """In bfloat16, the square root of 768 is 27.75. One layer, whose norms' outputs are multiplied by 0."""
    encoder = tiny_encoder("gemma3_text", hidden_size=768, num_hidden_layers=1).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("out_norm.weight"):
                parameter.fill_(-1)
        encoder.norm = torch.nn.Identity()
        token_D = encoder.token.weight[7]
        assert torch.equal(encoder(pack([[7]]))[0], token_D * 27.75)
        assert not torch.equal(token_D * 27.75, token_D * 768**0.5)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"layer_types": ["full_attention"]}, ("layer_types", 1, "num_hidden_layers", 2)),
        ({"layer_types": ["full_attention", "x"]}, ("layer_types", "'x'", "full_attention", "sliding_attention")),
        ({"hidden_activation": "swoosh"}, ("hidden_activation", "'swoosh'", "silu")),
        ({"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar", 0)),
        ({"rope_local_base_freq": -1.0}, ("rope_theta", -1.0)),
        ({"rope_parameters": {**ROPE, "sliding_attention": {"rope_type": "spiral"}}}, ("rope_type", "'spiral'")),
    ],
)
def test_wrong_settings_are_named(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        tiny_encoder("gemma3_text", **changes)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", 50.0, "null")),
        ({"is_causal": False}, ("is_causal", "false", "true")),
        ({"query_pre_attn_scalar": 10**400}, ("query_pre_attn_scalar", "finite")),
    ],
)
def test_what_no_checkpoint_has_is_refused(tmp_path, changes, facts):
    load_both(tmp_path, reference())
    values = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=naming(tmp_path / "config.json", *facts)):
        read_config(tmp_path)
