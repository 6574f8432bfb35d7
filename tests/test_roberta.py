"""roberta.py against transformers, on tiny random weights."""

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
    tiny_encoder,
)
from naming import naming

from embedft.encoders.packing import pack
from embedft.encoders.roberta import Roberta, RobertaConfig

SIZES = {**families.SIZES, "layer_norm_eps": 1e-5, "type_vocab_size": 1}


def reference(kind: str = "Roberta", **changes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES | changes))


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_hidden_states_gradients_and_tensors(tmp_path, kind):
    encoder, model = load_both(tmp_path, reference(kind))
    assert_equal_to_reference(encoder, model)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference(kind))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.1},
        {"pad_token_id": 3},
        {"type_vocab_size": 2},
        {"num_hidden_layers": 3},
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change):
    encoder, model = load_both(tmp_path, reference(**change))
    padding = encoder.config.pad_token_id
    sequences = [[token for token in ids if token != padding] for ids in SEQUENCES]
    torch.testing.assert_close(
        encoder(pack(sequences)), their_hidden(model, sequences, padding=padding), rtol=0, atol=1e-9
    )


def test_padding_tokens_in_a_text_do_not_count(tmp_path):
    """As in transformers, when a text spells "<pad>": token 1 here."""
    encoder, model = load_both(tmp_path, reference())
    for ids in ([2, 1, 5, 1, 1, 6, 3], [1, 2, 3]):
        found, expected = encoder(pack([[2, 3], ids]))[2:], model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_positions_start_behind_padding():
    config = tiny_encoder("roberta").config
    assert (config.max_position_embeddings, config.max_length) == (64, 62)
    with pytest.raises(ValueError, match=naming("hidden_act", "'mish'")):
        Roberta(RobertaConfig(**SIZES | {"hidden_act": "mish"}))
