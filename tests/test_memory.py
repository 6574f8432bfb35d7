"""memory.py: activations computed again give the same bits with less memory."""

import dataclasses

import pytest
import torch
from families import SEQUENCES, tiny_encoder
from naming import naming
from test_train import assert_same, make_batches, weights_of
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, finetune
from embedft import device as devices
from embedft.encoders.folder import FAMILIES
from embedft.encoders.lora import LoraConfig, add_lora
from embedft.encoders.packing import pack
from embedft.losses.contrastive import in_batch_negatives
from embedft.training.memory import recomputing
from embedft.training.train import TrainConfig, train


class Sides:
    """What `recomputing` needs of an Embedder."""

    query_side = None

    def __init__(self, encoder):
        self.encoder = encoder


def gradients(encoder, packed, *, recomputed: bool) -> tuple[dict, torch.Tensor, int]:
    """Gradients of the weights, the generator's final state, and the bytes that were kept for the backward pass."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    encoder.zero_grad()
    torch.manual_seed(0)
    with recomputing(Sides(encoder), recomputed):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden_TD = encoder(packed)
        (hidden_TD * torch.randn(hidden_TD.shape)).sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    size = sum(number for place, number in kept.items() if place not in weights)
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}, torch.get_rng_state(), size


@pytest.mark.parametrize("slack", [0.0, 1.0])
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if hasattr(tiny_encoder(name), "layers")])
def test_every_family_gets_the_same_gradients(monkeypatch, model_type, slack):
    """Bit for bit under dropout, of hidden states and of attention weights, padded or not, with less memory."""
    monkeypatch.setattr(devices, "length_slack", lambda device: slack)
    encoder = tiny_encoder(model_type).train()
    encoder.attention_dropout = 0.1
    plain, state, size = gradients(encoder, pack(SEQUENCES), recomputed=False)
    found, after, less = gradients(encoder, pack(SEQUENCES), recomputed=True)
    assert_same(found, plain)
    assert torch.equal(after, state)
    assert less < 0.5 * size
    assert not any("forward" in vars(layer) for layer in encoder.layers)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mini_batch_tokens": 20}, {"precision": "bfloat16", "mini_batch_tokens": 20}, {"depths": [1, 2]}],
    ids=str,
)
@pytest.mark.parametrize("with_lora", [False, True])
def test_training_ends_with_the_same_weights(tmp_path, changes, with_lora):
    """With gradient caching, autocast, drawn depths and LoRA, whose updates have no hooks in the backward pass."""
    found = []
    for recomputed in (False, True):
        embedder = make_embedder(tmp_path / "base")
        if with_lora:
            torch.manual_seed(0)
            add_lora(embedder, LoraConfig(rank=2, dropout=0.2))
            embedder.lora.get_submodule("layers.0.qkv").B.data.fill_(0.1)
        config = TrainConfig(epochs=1, lr=1e-3, **changes)
        config = dataclasses.replace(config, checkpoint_activations=recomputed)
        train(embedder, make_batches(embedder), in_batch_negatives, config)
        found.append(weights_of(embedder))
    assert_same(*found)
    assert not torch.equal(
        found[0]["encoder.layers.0.qkv.weight"], make_embedder(tmp_path / "base").encoder.layers[0].qkv.weight
    )


def test_an_encoder_without_layers_is_refused(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    embedder.encoder = torch.nn.Module()
    embedder.encoder.config = None
    with pytest.raises(ValueError, match=naming("checkpoint_activations", "Module", "layers")), recomputing(embedder):
        pass


def test_finetune_refuses_before_it_starts(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    monkeypatch.setattr(embedder.encoder, "layers", torch.nn.Sequential(*embedder.encoder.layers))
    config = FinetuneConfig(checkpoint_activations=True)
    with pytest.raises(ValueError, match=naming("checkpoint_activations", "layers")):
        finetune(embedder, make_dataset(), config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
