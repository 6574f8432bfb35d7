"""mpnet.py against transformers, on tiny random weights; the buckets of distances."""

import pytest
import torch
from families import (
    SEQUENCES,
    assert_equal_in_float32,
    assert_equal_to_reference,
    assert_saved_as_theirs,
    load_both,
    their_hidden,
    tiny_encoder,
)
from naming import naming

from embedft.encoders.mpnet import MPNetConfig, buckets
from embedft.encoders.packing import pack

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 202,
    "layer_norm_eps": 1e-5,
}
# Beyond the largest distance with a bucket of its own.
LONG = [*SEQUENCES, [2 + i % 59 for i in range(200)]]


def reference(**changes):
    transformers = pytest.importorskip("transformers")
    return transformers.MPNetModel(transformers.MPNetConfig(**SIZES | changes))


def test_hidden_states_gradients_and_tensors(tmp_path):
    encoder, model = load_both(tmp_path, reference())
    assert_equal_to_reference(encoder, model, LONG)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(), LONG)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.1},
        {"num_attention_heads": 1},
        {"num_hidden_layers": 3},
        {"pad_token_id": 0},
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change):
    encoder, model = load_both(tmp_path, reference(**change))
    torch.testing.assert_close(encoder(pack(LONG)), their_hidden(model, LONG), rtol=0, atol=1e-9)


def test_padding_tokens_in_a_text_do_not_count(tmp_path):
    """Token 1 has position 1, whatever config.json says of padding."""
    encoder, model = load_both(tmp_path, reference(pad_token_id=0))
    ids = [2, 1, 5, 1, 1, 6, 3]
    found, expected = encoder(pack([[2, 3], ids]))[2:], model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_buckets():
    """0 to 7 are exact. From 8 on, a bucket holds distances up to sqrt(2) times its first: 8 to 11, 12 to 15, 16 to 22,
    23 to 31, 32 to 45, 46 to 63, 64 to 90, and all others. Keys behind the query have the second 16."""
    backwards = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12, 45: 12, 46: 13}
    backwards |= {63: 13, 64: 14, 90: 14, 91: 15, 127: 15, 128: 15, 511: 15}
    distances = torch.tensor(list(backwards))
    assert buckets(-distances).tolist() == list(backwards.values())
    assert buckets(distances[1:]).tolist() == [16 + bucket for bucket in list(backwards.values())[1:]]


def test_buckets_are_transformers():
    modeling = pytest.importorskip("transformers.models.mpnet.modeling_mpnet")
    distances = torch.arange(-600, 601)
    assert torch.equal(buckets(distances), modeling.MPNetEncoder.relative_position_bucket(distances))


def test_the_bias_is_computed_once_for_all_layers(monkeypatch):
    encoder = tiny_encoder("mpnet", num_hidden_layers=3)
    lengths, bias = [], type(encoder).bias
    monkeypatch.setattr(type(encoder), "bias", lambda self, length: lengths.append(length) or bias(self, length))
    encoder(pack(SEQUENCES))
    assert lengths == [48]  # the longest


def test_half_precision_is_near():
    """Under autocast the bias, which is in float32, joins scores in bfloat16."""
    encoder, packed = tiny_encoder("mpnet"), pack(SEQUENCES)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(packed)
    assert (found - encoder(packed)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"relative_attention_num_buckets": 16}, ("relative_attention_num_buckets", 16, 32)),
        ({"num_attention_heads": 3}, ("hidden_size", 32, "num_attention_heads", 3)),
    ],
)
def test_a_wrong_field_is_named(change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        MPNetConfig(**SIZES | change)


def test_positions_start_behind_padding():
    assert tiny_encoder("mpnet").config.max_length == 62
