"""modernbert.py against transformers, on tiny random weights, and under the fields that were published."""

from dataclasses import asdict

import pytest
import torch
from families import (
    SEQUENCES,
    assert_equal_in_float32,
    assert_equal_to_reference,
    assert_saved_as_theirs,
    load_both,
    publish,
    their_hidden,
)
from naming import naming

from embedft.encoders.folder import read_config
from embedft.encoders.packing import pack
from embedft.encoders.weights import read_encoder

# Windows of 4 tokens on either side; the first and fourth layer see all tokens.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "local_attention": 8,
}
# The longest has more tokens than a block of queries (attention.py).
LONG = [*SEQUENCES, [2 + i % 50 for i in range(150)]]
# Of gte-modernbert-base, with smaller sizes: what says how it computes.
PUBLISHED = {
    **SIZES,
    "model_type": "modernbert",
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "position_embedding_type": "absolute",
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}


def reference(head: str = "Model", **changes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"ModernBert{head}")(transformers.ModernBertConfig(**SIZES | TOKENS | changes))


@pytest.fixture
def exact(monkeypatch):
    """transformers turns queries and keys in float32 even in float64; this uses the dtype of the model."""
    pytest.importorskip("transformers")
    from transformers.models.gte.modeling_gte import apply_rotary_pos_emb
    from transformers.models.modernbert import modeling_modernbert

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", apply_rotary_pos_emb)


@pytest.mark.parametrize("biases", [False, True])
def test_hidden_states_gradients_and_tensors(tmp_path, exact, biases):
    options = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias"), biases)
    encoder, model = load_both(tmp_path, reference(**options))
    assert_equal_to_reference(encoder, model, LONG)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(**options), LONG)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_activation": "silu"},
        {"norm_eps": 0.1},
        {"num_hidden_layers": 2},
        {"num_attention_heads": 2},
        {"local_attention": 9},
        {"local_attention": 128},
        {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"] * 4},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            }
        },
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, exact, change):
    encoder, model = load_both(tmp_path, reference(**change))
    torch.testing.assert_close(encoder(pack(LONG)), their_hidden(model, LONG), rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_heads_are_left_out(tmp_path, exact, head):
    encoder, model = load_both(tmp_path, reference(head))
    torch.testing.assert_close(encoder(pack(LONG)), their_hidden(model.model, LONG), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"global_attn_every_n_layers": 2, "global_rope_theta": 80000.0},
        {"global_attn_every_n_layers": 1},
        {"local_rope_theta": 160000},  # mmBERT
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_published_fields_mean_what_transformers_makes_of_them(tmp_path, exact, change):
    """It reads them too, and writes its own."""
    published = PUBLISHED | TOKENS | change
    encoder, model = load_both(tmp_path, reference(**published))
    expected = their_hidden(model, LONG)
    torch.testing.assert_close(encoder(pack(LONG)), expected, rtol=0, atol=1e-9)
    publish(tmp_path, published)
    family, config, _ = read_config(tmp_path)
    found, _ = read_encoder(tmp_path, family, config, torch.float64)
    assert config.layer_types is None
    assert encoder.config.layer_types == config.kinds()
    torch.testing.assert_close(found.eval()(pack(LONG)), expected, rtol=0, atol=1e-9)


def test_dropout_is_where_the_reference_has_it(tmp_path):
    changes = {"attention_dropout": 0.1, "embedding_dropout": 0.2, "mlp_dropout": 0.3}
    encoder, model = load_both(tmp_path, reference(**changes))
    ours, theirs = (
        sorted(module.p for module in each.modules() if isinstance(module, torch.nn.Dropout))
        for each in (encoder, model)
    )
    assert ours == theirs == [0.1] * 4 + [0.2] + [0.3] * 4


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"hidden_activation": "mish"}, ("hidden_activation", "'mish'", "gelu")),
        ({"norm_eps": 2.0}, ("norm_eps", 2.0, 0, 1)),
        ({"mlp_dropout": -0.1}, ("mlp_dropout", -0.1, 0, 1)),
        ({"hidden_size": 36}, ("hidden_size", 36, "num_attention_heads", 4)),
        ({"layer_types": ["full_attention"]}, ("layer_types", 1, "num_hidden_layers", 4)),
        ({"layer_types": [["full_attention"]] * 4}, ("layer_types", "['full_attention']", "sliding_attention")),
        ({"local_attention": 0}, ("local_attention", 0, 1)),
        ({"rope_parameters": {"full_attention": None}}, ("rope_parameters", "full_attention", None)),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 0}}}, ("rope_theta", 0)),
        ({"rope_scaling": {"type": ["linear"]}}, ("rope_type", "['linear']", "linear")),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(tmp_path, change, facts):
    publish(tmp_path, PUBLISHED | change)
    with pytest.raises(ValueError, match=naming("config.json", *facts)):
        read_config(tmp_path)


def test_more_layers_than_tensors_are_named_before_they_are_listed(tmp_path):
    reference().save_pretrained(tmp_path)
    publish(tmp_path, PUBLISHED | {"num_hidden_layers": 10**9})
    family, config, _ = read_config(tmp_path)
    assert asdict(config)["num_hidden_layers"] == 10**9
    with pytest.raises(ValueError, match=naming("config.json", "num_hidden_layers", 10**9)):
        read_encoder(tmp_path, family, config, torch.float32)
