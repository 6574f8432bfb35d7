"""nomic_bert.py against transformers, on tiny random weights, and under the names of fields that were published."""

import json
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
from safetensors.torch import load_file

from embedft import load_embedder
from embedft.encoders.folder import read_config
from embedft.encoders.nomic_bert import NomicBertConfig
from embedft.encoders.packing import pack
from embedft.encoders.weights import read_encoder

# Of nomic-embed-text-v1.5, with smaller sizes: what says how it computes.
PUBLISHED = {
    "model_type": "nomic_bert",
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 40,
    "n_positions": 64,
    "type_vocab_size": 2,
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-12,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "causal": False,
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "max_trained_positions": 2048,
}


def reference(head: str = "Model", **changes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"NomicBert{head}")(transformers.NomicBertConfig(**SIZES | changes))


def test_hidden_states_gradients_and_tensors(tmp_path):
    encoder, model = load_both(tmp_path, reference())
    assert_equal_to_reference(encoder, model)
    assert_saved_as_theirs(tmp_path, encoder)
    assert_equal_in_float32(tmp_path, reference())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"layer_norm_eps": 0.1},
        {"type_vocab_size": 1},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}},
    ],
    ids=str,
)
def test_the_configuration_counts(tmp_path, change):
    encoder, model = load_both(tmp_path, reference(**change))
    torch.testing.assert_close(encoder(pack(SEQUENCES)), their_hidden(model, SEQUENCES), rtol=0, atol=1e-9)


def test_segments_of_a_pair(tmp_path):
    encoder, model = load_both(tmp_path, reference())
    ids, types = torch.tensor([[2, 7, 9, 3]]), torch.tensor([[0, 0, 1, 1]])
    found = encoder(pack(ids.tolist())._replace(token_types=types[0]))
    expected = model(input_ids=ids, token_type_ids=types).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_heads_are_left_out(tmp_path, head):
    encoder, model = load_both(tmp_path, reference(head))
    expected = their_hidden(model.nomic_bert, SEQUENCES)
    torch.testing.assert_close(encoder(pack(SEQUENCES)), expected, rtol=0, atol=1e-9)


def test_published_fields_mean_the_same(tmp_path):
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "layer_norm_eps": 0.1}
    expected, _ = load_both(tmp_path, reference(**changes))
    publish(tmp_path, PUBLISHED | {"rotary_emb_base": 77, "layer_norm_epsilon": 0.1, "resid_pdrop": 0.3})
    family, config, _ = read_config(tmp_path)
    assert config == replace(expected.config, rope_theta=77, rope_parameters=None, hidden_dropout_prob=0.3)
    found, _ = read_encoder(tmp_path, family, config, torch.float64)
    assert torch.equal(found.eval()(pack(SEQUENCES)), expected(pack(SEQUENCES)))


def test_a_published_folder_is_saved_as_it_was(tmp_path, tiny_bert):
    """Its fields and tensors, or what became of them: here with a layer less."""
    size = json.loads((tiny_bert / "config.json").read_text())["vocab_size"]
    load_both(tmp_path / "base", reference("ForMaskedLM", vocab_size=size))
    publish(tmp_path / "base", {**PUBLISHED, "vocab_size": size}, tokenizer=tiny_bert)
    embedder = load_embedder(tmp_path / "base", device="cpu")
    embedder.save(tmp_path / "saved")
    read, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "saved"))
    added = {name: read[published] for published, name in NomicBertConfig.aliases.items() if published in read}
    assert {name: x for name, x in {**read, **added}.items() if x is not None} == {
        name: x for name, x in written.items() if "dtype" not in name
    }
    read, written = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "saved"))
    assert {name.removeprefix("nomic_bert.") for name in read} == written.keys()

    encoder = embedder.encoder
    encoder.config, encoder.layers = replace(encoder.config, num_hidden_layers=1), encoder.layers[:1]
    embedder.save(tmp_path / "cut")
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert written["n_layer"] == written["num_hidden_layers"] == 1
    again = load_embedder(tmp_path / "cut", device="cpu")
    assert (again.encode(["a b"]) == embedder.encode(["a b"])).all()


def test_a_published_folder_goes_to_sentence_transformers_and_back(tmp_path, tiny_bert, request):
    """Whose transformers 5 knows none of the published names."""
    size = json.loads((tiny_bert / "config.json").read_text())["vocab_size"]
    load_both(tmp_path / "base", reference("ForMaskedLM", vocab_size=size))
    publish(tmp_path / "base", {**PUBLISHED, "vocab_size": size, "rotary_emb_base": 50}, tokenizer=tiny_bert)
    embedder, texts = load_embedder(tmp_path / "base", device="cpu"), ["a b", "the fee of the order"]
    embedder.save(tmp_path / "saved")
    theirs = request.getfixturevalue("reference")(tmp_path / "saved")
    assert abs(theirs.encode(texts) - embedder.encode(texts)).max() <= 1e-5
    theirs.save(str(tmp_path / "back"))
    assert (load_embedder(tmp_path / "back", device="cpu").encode(texts) == embedder.encode(texts)).all()


def test_names_of_transformers_prevail(tmp_path):
    """It reads and writes its own, and keeps those that were published as they are."""
    publish(tmp_path, {**PUBLISHED, **SIZES, "n_layer": 9, "n_embd": 9})
    assert read_config(tmp_path)[1] == NomicBertConfig(**SIZES)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("activation_function", "gelu", "swiglu"),  # nomic-embed-text-v2-moe
        ("qkv_proj_bias", True, "false"),
        ("prenorm", True, "false"),
        ("causal", True, "false"),
        ("rotary_emb_fraction", 0.5, 1.0),
        ("rotary_scaling_factor", 2, "null"),
        ("n_embd", 36, "n_head"),
        ("n_layer", 0, 1),
        ("layer_norm_epsilon", 2.0, 1),
        ("rotary_emb_base", -1, 1),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, field, value, expected):
    publish(tmp_path, PUBLISHED | {field: value})
    found = "true" if value is True else value
    with pytest.raises(ValueError, match=naming("config.json", field, found, expected)):
        read_config(tmp_path)


def test_a_size_that_no_tensor_has_is_named_as_in_the_file(tmp_path):
    reference().save_pretrained(tmp_path)
    publish(tmp_path, PUBLISHED | {"n_inner": 10**9})
    family, config, _ = read_config(tmp_path)
    with pytest.raises(ValueError, match=naming("config.json", "n_inner", 10**9, 96)):
        read_encoder(tmp_path, family, config, torch.float32)
