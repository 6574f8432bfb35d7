"""bert.py against transformers' BertModel on tiny random weights, in float64; dropout; the configuration's errors."""

import itertools

import pytest
import torch
from families import Halved
from naming import naming

from embedft import device as devices
from embedft import load_embedder
from embedft.encoders import bert, layers, post_norm
from embedft.encoders.bert import Bert, BertConfig
from embedft.encoders.packing import pack
from embedft.encoders.weights import checkpoint_tensors, tensor_keys

# Different and equal lengths, a single token, and the longest that positions allow. No padding token (0), because
# transformers gives its embedding no gradient.
SEQUENCES = [[2, 7, 9, 3], [2, 3], [2, 11, 12, 13, 14, 3], [2, 30, 31, 3], [40], list(range(1, 49))]


def load_both(folder, **options):
    """(ours, transformers') in float64 and eval mode."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    return load_embedder(folder, device="cpu", dtype=torch.float64, **options).encoder, theirs


@pytest.fixture(scope="module")
def both(tiny_bert):
    return load_both(tiny_bert)


def pair_types(sequences):
    """0 for the first half of a sequence, 1 for the second."""
    return [[int(2 * i >= len(ids)) for i in range(len(ids))] for ids in sequences]


def their_hidden(model, sequences, token_types=None):
    """transformers' hidden states of each sequence end to end: one padded batch, as users run it."""
    longest = max(map(len, sequences))

    def padded(rows):
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    mask = padded([[1] * len(ids) for ids in sequences])
    types = None if token_types is None else padded(token_types)
    hidden = model(input_ids=padded(sequences), attention_mask=mask, token_type_ids=types).last_hidden_state
    return hidden[mask.bool()]


def packed_batch(sequences, token_types=None):
    packed = pack(sequences)
    if token_types is None:
        return packed
    return packed._replace(token_types=torch.tensor(list(itertools.chain.from_iterable(token_types))))


def gradients_by_their_names(encoder) -> dict[str, torch.Tensor]:
    """Our gradients cut up as the checkpoint is."""
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return checkpoint_tensors(gradients, bert.key_map(encoder.config))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1], [[2, 3]] * 3], ids=["mixed", "one", "equal"])
def test_hidden_states_and_gradients(both, sequences, pairs):
    encoder, model = both
    token_types = pair_types(sequences) if pairs else None
    found, expected = encoder(packed_batch(sequences, token_types)), their_hidden(model, sequences, token_types)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for module, hidden in ((encoder, found), (model, expected)):
        module.zero_grad()
        (hidden * weight).sum().backward()
    ours = gradients_by_their_names(encoder)
    theirs = {name: p.grad for name, p in model.named_parameters() if not name.startswith("pooler.")}
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert theirs[name].abs().max() > 1e-3 or name.endswith("key.bias"), name  # a key's bias cancels in the softmax


def test_token_types_of_zero_are_the_default(both):
    encoder, _ = both
    zeros = [[0] * len(ids) for ids in SEQUENCES]
    torch.testing.assert_close(
        encoder(packed_batch(SEQUENCES, zeros)), encoder(packed_batch(SEQUENCES)), rtol=0, atol=1e-12
    )
    assert (
        encoder(packed_batch(SEQUENCES, pair_types(SEQUENCES))) - encoder(packed_batch(SEQUENCES))
    ).abs().max() > 0.1


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations(name, write_tiny, tmp_path):
    encoder, model = load_both(write_tiny(tmp_path / "model", hidden_act=name))
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [{"layer_norm_eps": 0.1}, {"num_attention_heads": 1}, {"num_hidden_layers": 1}, {"type_vocab_size": 1}],
    ids=lambda change: next(iter(change)),
)
def test_the_configuration_counts(change, write_tiny, tmp_path):
    encoder, model = load_both(write_tiny(tmp_path / "model", **change))
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-10)


def test_every_linear_layer_takes_the_fast_path_in_float32(tiny_bert, monkeypatch):
    """Without padding: each product has as many rows as the batch has tokens."""
    monkeypatch.setattr(devices, "_HAS_FAST_BLAS", False)
    if not layers.has_onednn_linear(torch.device("cpu"), torch.float32):
        pytest.skip("no oneDNN linear layer here")
    rows, product = [], layers._product
    monkeypatch.setattr(layers, "_product", lambda x, *rest: rows.append(len(x)) or product(x, *rest))
    encoder = load_embedder(tiny_bert, device="cpu").encoder
    encoder(pack(SEQUENCES))
    assert rows == [sum(map(len, SEQUENCES))] * 4 * 2  # four a layer, two layers


# Dropout.


@pytest.fixture
def attention_dropouts(monkeypatch) -> list[float]:
    """The dropout that each call of `attention` got."""
    seen, attention = [], post_norm.attention

    def seeing(*qkv_and_sequences, dropout, **more):
        seen.append(dropout)
        return attention(*qkv_and_sequences, dropout=dropout, **more)

    monkeypatch.setattr(post_norm, "attention", seeing)
    return seen


def test_hidden_dropout_is_active_in_training_only(tiny_bert, attention_dropouts):
    encoder = load_embedder(tiny_bert, device="cpu").encoder
    packed = pack(SEQUENCES)
    assert torch.equal(encoder(packed), encoder(packed))
    encoder.train()
    assert not torch.equal(encoder(packed), encoder(packed))
    assert set(attention_dropouts) == {0.0}
    encoder.eval()
    assert torch.equal(encoder(packed), encoder(packed))


def test_attention_dropout_is_there_when_asked_for_and_in_training_only(write_tiny, tmp_path, attention_dropouts):
    folder = write_tiny(tmp_path / "model", hidden_dropout_prob=0.0)
    packed = pack(SEQUENCES)
    encoder = load_embedder(folder, device="cpu").encoder.train()
    assert torch.equal(encoder(packed), encoder(packed))  # the folder's attention_probs_dropout_prob is 0.1
    encoder.attention_dropout = 0.2
    attention_dropouts.clear()
    assert not torch.equal(encoder(packed), encoder(packed))
    assert set(attention_dropouts) == {0.2}
    encoder.eval()
    attention_dropouts.clear()
    assert torch.equal(encoder(packed), encoder(packed))
    assert set(attention_dropouts) == {0.0}


def test_dropout_is_where_berts_is(tiny_bert):
    encoder, model = load_both(tiny_bert)
    encoder.embeddings.dropout = model.embeddings.dropout = Halved()
    for ours, theirs in zip(encoder.layers, model.encoder.layer, strict=True):
        ours.dropout = theirs.attention.output.dropout = theirs.output.dropout = Halved()
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-10)


# Configuration and key map.


@pytest.mark.parametrize("layers", [1, 3])
def test_the_key_map_names_every_parameter_once(layers):
    with torch.device("meta"):
        encoder = Bert(BertConfig(10, 8, layers, 2, 12, 6))
    keys = tensor_keys(encoder.state_dict(), bert.key_map(encoder.config))
    names = list(itertools.chain.from_iterable(keys.values()))
    assert len(names) == len(set(names)) == 5 + 16 * layers


COMPLETE = {
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
}


def test_defaults_are_berts():
    config = BertConfig(**COMPLETE)
    assert (config.type_vocab_size, config.hidden_act, config.layer_norm_eps) == (2, "gelu", 1e-12)
    assert config.hidden_dropout_prob == 0.1
    assert config.max_length == 6


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"num_attention_heads": 3}, ("hidden_size", 8, "num_attention_heads", 3)),
        ({"hidden_act": "swish"}, ("hidden_act", "'swish'", *layers.ACTIVATIONS)),
        ({"hidden_dropout_prob": 1.5}, ("hidden_dropout_prob", 1.5, 0, 1)),
        ({"layer_norm_eps": -1e-12}, ("layer_norm_eps", -1e-12, 0, 1)),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type", "'relative_key'", "'absolute'")),
        ({"is_decoder": True}, ("is_decoder", "true", "bidirectional")),
    ],
)
def test_a_wrong_field_is_named(change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        BertConfig(**COMPLETE | change)
