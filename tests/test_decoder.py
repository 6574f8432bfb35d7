"""decoder.py, and Llama, Mistral and Qwen3 against transformers, on tiny random weights."""

import json

import families
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

from embedft.encoders.attention import Sequences
from embedft.encoders.decoder import Heads, SelfAttention
from embedft.encoders.folder import FAMILIES, read_config
from embedft.encoders.packing import pack
from embedft.encoders.rotary import angles, rotate
from embedft.encoders.schema import GLOBAL, LOCAL
from embedft.encoders.weights import read_encoder

SIZES = {**families.SIZES, "num_key_value_heads": 2, "head_dim": 16}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}
DEFAULTS = {"llama": {}, "mistral": {"sliding_window": None}, "qwen3": {}}


def reference(kind: str, **changes):
    """A transformers model; `options` are read by its config class, as old config.json files have them."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**SIZES | DEFAULTS[kind] | changes)
    return getattr(transformers, f"{CLASSES[kind]}Model")(config)


@pytest.mark.parametrize("kind", CLASSES)
def test_hidden_states_gradients_and_tensors(tmp_path, kind):
    encoder, model = load_both(tmp_path, reference(kind))
    assert_equal_to_reference(encoder, exact_norms(model))
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(kind))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
CHANGES = [
    *(
        (kind, change)
        for kind in CLASSES
        for change in (
            {"hidden_act": "gelu"},
            {"rms_norm_eps": 0.1},
            {"num_hidden_layers": 3},
            {"is_causal": False},
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 1},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}},
            {"rope_parameters": YARN},
        )
    ),
    *((kind, {"head_dim": None}) for kind in ("llama", "mistral")),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    *(("mistral", {"sliding_window": window}) for window in (1, 2, 5, 100)),
    ("mistral", {"sliding_window": 3, "is_causal": False}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "layer_types": [LOCAL, GLOBAL]}),
]


@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=str)
def test_the_configuration_counts(tmp_path, kind, change):
    encoder, model = load_both(tmp_path, reference(kind, **change))
    assert_equal_to_reference(encoder, exact_norms(model))


def test_windows_of_qwen3_before_transformers_5():
    """Without `layer_types`, which it writes: layers from number 1 on see 5 tokens."""
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    config = FAMILIES["qwen3"].Config(**SIZES | {"num_hidden_layers": 3}, **windows)
    assert config.sliding_windows() == [None, 5, 5]


@pytest.mark.parametrize(("kind", "change"), [("mistral", {"sliding_window": 30}), ("qwen3", {})])
def test_texts_longer_than_a_block(tmp_path, kind, change):
    """Windows are computed in blocks of at least 64 tokens."""
    encoder, model = load_both(tmp_path, reference(kind, max_position_embeddings=256, **change))
    sequences = [[2 + i % 59 for i in range(n)] for n in (200, 130, 129, 64, 3)]
    found, expected = encoder(pack(sequences)), their_hidden(exact_norms(model), sequences)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_theta": 77.0, "rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"}},
    ],
    ids=str,
)
def test_config_json_before_transformers_5(tmp_path, kind, old):
    """`rope_theta` and `rope_scaling`, with nulls for what a model lacks, as the hub has them."""
    load_both(tmp_path, reference(kind))
    path = tmp_path / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "rope_parameters"}
    path.write_text(json.dumps({"rope_scaling": None, "sliding_window": None} | values | old))
    family, config, _ = read_config(tmp_path)
    encoder, _ = read_encoder(tmp_path, family, config, torch.float64)
    model = type(reference(kind)).from_pretrained(tmp_path, dtype=torch.float64).eval()
    found, expected = encoder(pack(SEQUENCES)), their_hidden(exact_norms(model), SEQUENCES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", CLASSES)
def test_heads_are_carried(tmp_path, kind):
    """A language model's tensors have the prefix "model.", and its head none; in bfloat16, as published."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(reference(kind).config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    family, config, _ = read_config(tmp_path)
    encoder, carried = read_encoder(tmp_path, family, config, torch.float32)
    assert carried.keys() == {"lm_head.weight"}
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    model = type(reference(kind)).from_pretrained(tmp_path, dtype=torch.float32).eval()
    found, expected = encoder.eval()(pack(SEQUENCES)), their_hidden(model, SEQUENCES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_window_counts_the_token_itself():
    """By hand: with a window of 3, token 4 sees tokens 2, 3 and 4."""
    window = tiny_encoder("llama").config.window(3)
    assert window == (2, 0)
    attention = SelfAttention(8, Heads(1, 1, 8), window=window).double()
    x_TD = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)
    turns = angles(positions, width=8, settings={"rope_theta": 100.0, "rope_type": "default"}, dtype=torch.float64)
    q, k, v = attention.qkv(x_TD).chunk(3, dim=1)
    q, k = (rotate(x[:, None], turns)[:, 0] for x in (q, k))
    weight = (q[4] @ k[2:5].T / 8**0.5).softmax(0)
    found = attention(x_TD, Sequences(pack([[0] * 6])), turns, 0.0)[4]
    torch.testing.assert_close(found, attention.out(weight @ v[2:5]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*CLASSES, "gemma3_text"])
def test_autocast_is_close(kind):
    """Norms and turns are float32 under autocast, values bfloat16; attention takes one dtype."""
    encoder, packed = tiny_encoder(kind), pack(SEQUENCES)
    exact = encoder(packed)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(packed)
    assert found.shape == exact.shape
    assert (found - exact).abs().mean() < 0.05
    half = encoder.to(torch.bfloat16)(packed)
    assert half.dtype is torch.bfloat16
    assert (half - exact).abs().mean() < 0.05


@pytest.mark.parametrize("kind", [*CLASSES, "gemma3_text"])
@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_key_value_heads": 3}, ("num_attention_heads", 4, "num_key_value_heads", 3)),
        ({"head_dim": 7}, ("head_dim", 7)),
        ({"rms_norm_eps": -1.0}, ("rms_norm_eps", -1.0)),
        ({"rope_parameters": {"rope_type": "spiral"}}, ("rope_type", "'spiral'")),
    ],
)
def test_wrong_settings_are_named(kind, changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        tiny_encoder(kind, **changes)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_unknown_activation_is_named(kind):
    with pytest.raises(ValueError, match=naming("hidden_act", "'swoosh'", "silu")):
        tiny_encoder(kind, hidden_act="swoosh")


def test_a_width_that_is_no_whole_number_is_named():
    with pytest.raises(ValueError, match=naming("hidden_size", 34, "num_attention_heads", 4)):
        tiny_encoder("llama", hidden_size=34)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"layer_types": [GLOBAL]}, ("layer_types", 1, "num_hidden_layers", 2)),
        ({"layer_types": [GLOBAL, 3]}, ("layer_types", 3, GLOBAL, LOCAL)),
        ({"layer_types": [GLOBAL, LOCAL]}, ("layer_types", LOCAL, "sliding_window")),
        ({"layer_types": [GLOBAL, LOCAL], "sliding_window": 4}, ("layer_types", LOCAL, "use_sliding_window")),
    ],
)
def test_wrong_layer_types_are_named(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        tiny_encoder("qwen3", **changes)


@pytest.mark.parametrize("field", ["head_dim", "num_attention_heads"])
def test_a_size_beyond_the_checkpoint_is_named(tmp_path, field):
    """Before a module is built."""
    load_both(tmp_path, reference("llama"))
    values = json.loads((tmp_path / "config.json").read_text()) | {field: 10**9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    _, config, _ = read_config(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path / "config.json", field, 10**9, 64)):
        read_encoder(tmp_path, FAMILIES["llama"], config, torch.float32)
