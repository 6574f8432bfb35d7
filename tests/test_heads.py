"""Checkpoints of models with heads: the encoder loads from them as transformers loads it, and the heads are carried."""

import pytest
import torch
from families import SEQUENCES, SIZES, randomize, their_hidden
from naming import naming
from safetensors.torch import load_file, save_file

from embedft.encoders.folder import read_config
from embedft.encoders.packing import pack
from embedft.encoders.weights import WEIGHTS_FILE, read_encoder

SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "vocab_size": 61, "max_position_embeddings": 64}
PREFIXES = {"Bert": "bert", "Roberta": "roberta", "DistilBert": "distilbert", "Electra": "electra", "MPNet": "mpnet"}
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
WITH_HEADS = [(kind, head) for kind in PREFIXES for head in HEADS]
WITH_HEADS += [("Bert", "ForPreTraining"), ("Bert", "ForNextSentencePrediction"), ("Electra", "ForPreTraining")]


def make(kind: str, head: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**(SMALL if kind == "DistilBert" else SIZES))
    return randomize(getattr(transformers, kind + head)(config)).eval()


def read(folder):
    """(the encoder, what is carried along)."""
    family, config, _ = read_config(folder)
    encoder, carried = read_encoder(folder, family, config, torch.float64)
    return encoder.eval(), carried


@pytest.mark.parametrize(("kind", "head"), WITH_HEADS, ids="".join)
def test_a_model_with_a_head(tmp_path, kind, head):
    model, prefix = make(kind, head), PREFIXES[kind]
    model.save_pretrained(tmp_path)
    encoder, carried = read(tmp_path)
    expected = their_hidden(getattr(model.double(), prefix), SEQUENCES)
    torch.testing.assert_close(encoder(pack(SEQUENCES)), expected, rtol=0, atol=1e-9)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    heads = {name: x for name, x in stored.items() if not name.startswith(f"{prefix}.")}
    assert heads
    assert heads.keys() <= carried.keys()
    assert all(torch.equal(carried[name], x) for name, x in heads.items())


@pytest.mark.parametrize("outer", ["module.", "model."])
def test_a_prefix_of_encoder_and_head(tmp_path, outer):
    make("Bert", "ForMaskedLM").save_pretrained(tmp_path)
    expected, heads = read(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({outer + name: x for name, x in tensors.items()}, tmp_path / WEIGHTS_FILE)
    found, carried = read(tmp_path)
    assert torch.equal(found(pack(SEQUENCES)), expected(pack(SEQUENCES)))
    assert carried.keys() == heads.keys()


def test_bert_needs_a_token_type(tmp_path):
    """As in transformers, which has no vector to add without one."""
    model = make("Bert", "Model")
    model.config.type_vocab_size = 0
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=naming("type_vocab_size", 0, ..., 1)):
        read(tmp_path)
