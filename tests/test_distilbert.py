"""distilbert.py against transformers, on tiny random weights."""

import pytest
import torch
from families import (
    SEQUENCES,
    Halved,
    assert_equal_in_float32,
    assert_equal_to_reference,
    assert_saved_as_theirs,
    load_both,
    their_hidden,
)
from naming import naming

from embedft.encoders.distilbert import DistilBertConfig
from embedft.encoders.packing import pack

SIZES = {
    "vocab_size": 61,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 40,
    "max_position_embeddings": 64,
}


def reference(**changes):
    transformers = pytest.importorskip("transformers")
    return transformers.DistilBertModel(transformers.DistilBertConfig(**SIZES | changes))


def test_hidden_states_gradients_and_tensors(tmp_path):
    encoder, model = load_both(tmp_path, reference())
    assert_equal_to_reference(encoder, model)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference())


@pytest.mark.parametrize(
    "change",
    [{"activation": "relu"}, {"n_heads": 2}, {"n_layers": 3}, {"sinusoidal_pos_embds": True}, {"pad_token_id": 1}],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change):
    encoder, model = load_both(tmp_path, reference(**change))
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-9)


def test_dropout_is_where_distilberts_is(tmp_path):
    """After the embeddings and the feed-forward layer, but not after attention as in BERT."""
    encoder, model = load_both(tmp_path, reference())
    encoder.embeddings.dropout = model.embeddings.dropout = Halved()
    for ours, theirs in zip(encoder.layers, model.transformer.layer, strict=True):
        ours.dropout = theirs.ffn.dropout = Halved()
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"n_heads": 3}, ("dim", 32, "n_heads", 3)),
        ({"activation": "mish"}, ("activation", "'mish'", "gelu")),
        ({"dropout": 1.5}, ("dropout", 1.5, 0, 1)),
    ],
)
def test_a_wrong_field_is_named_as_distilbert_names_it(change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        DistilBertConfig(**SIZES | change)
