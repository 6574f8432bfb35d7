"""electra.py against transformers, on tiny random weights."""

import families
import pytest
import torch
from families import (
    SEQUENCES,
    assert_equal_in_float32,
    assert_equal_to_reference,
    assert_saved_as_theirs,
    load_both,
    their_hidden,
)

from embedft.encoders.packing import pack

SIZES = {**families.SIZES, "embedding_size": 16}


def reference(**changes):
    transformers = pytest.importorskip("transformers")
    return transformers.ElectraModel(transformers.ElectraConfig(**SIZES | changes))


@pytest.mark.parametrize("embedding_size", [16, 32])
def test_hidden_states_gradients_and_tensors(tmp_path, embedding_size):
    """Narrow token vectors, as in electra-small, and token vectors of the layers' width, as in electra-base."""
    encoder, model = load_both(tmp_path, reference(embedding_size=embedding_size))
    assert_equal_to_reference(encoder, model)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(embedding_size=embedding_size))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.1},
        {"num_attention_heads": 1},
        {"num_hidden_layers": 3},
        {"type_vocab_size": 1},
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change):
    encoder, model = load_both(tmp_path, reference(**change))
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-9)


def test_token_types_count(tmp_path):
    """A question and a text, as rerankers read them."""
    encoder, model = load_both(tmp_path, reference())
    ids, types = torch.tensor([[2, 7, 9, 3, 11, 12, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    found = encoder(pack(ids.tolist())._replace(token_types=types[0]))
    expected = model(input_ids=ids, token_type_ids=types).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
