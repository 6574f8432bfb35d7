"""compile_layers gives what plain layers give, from one graph for all layers and lengths; what cannot be compiled."""

import copy

import numpy as np
import pytest
import torch
from families import write_family
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import load_embedder
from embedft.encoders.compiled import compile_layers
from embedft.encoders.packing import pack


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(embedder, lengths) -> list[torch.Tensor]:
    packed = pack([[5 + i % 40 for i in range(n)] for n in lengths])
    embedder.zero_grad()
    value = embedder.embed(packed, role="document").square().mul(torch.arange(32.0)).sum()
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in embedder.parameters() if p.grad is not None)]


def test_vectors_and_gradients_are_the_same(tmp_path, capfd):
    """Thirteen sizes of batches; a graph for inference, one for training."""
    plain, compiled = (make_embedder(tmp_path / "base", dropout=0.0) for _ in range(2))
    compile_layers(compiled, backend="aot_eager")
    texts = list(make_dataset(12, 30).corpus.values())
    for batch_tokens in (400, 120, 50):
        found, expected = (x.encode(texts, batch_tokens=batch_tokens) for x in (compiled, plain))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    for lengths in ((3, 7), (20, 5, 5), (4,), (9, 9, 9, 9)):
        for found, expected in zip(gradients(compiled, lengths), gradients(plain, lengths), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("torch.compile: graph")]
    assert [line.split()[2] for line in lines] == ["1,", "2,"]


@pytest.mark.parametrize("family", ["nomic_bert", "modernbert", "qwen3", "gemma3_text", "mpnet"])
def test_every_kind_of_layer(tmp_path, family):
    folder = write_family(tmp_path / family, family)
    plain, compiled = (load_embedder(folder, device="cpu") for _ in range(2))
    compile_layers(compiled, backend="aot_eager")
    for lengths in ((3, 7), (12, 5)):
        packed = pack([[5 + i % 20 for i in range(n)] for n in lengths])
        torch.testing.assert_close(compiled.encoder(packed), plain.encoder(packed), rtol=1e-4, atol=1e-5)


def test_a_copy_has_layers_of_its_own(tmp_path):
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    compile_layers(embedder, backend="aot_eager")
    other, packed = copy.deepcopy(embedder.encoder), pack([[5, 6, 7]])
    before = embedder.encoder(packed)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.testing.assert_close(embedder.encoder(packed), before, rtol=0, atol=1e-6)
    assert not other(packed).any()


def test_hooks_that_come_later_count(tmp_path):
    """As LoRA's, in a model that was compiled, and encoded, before."""
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    compile_layers(embedder, backend="aot_eager")
    before = embedder.encode(["hello world"])
    hook = embedder.encoder.layers[1].feed_forward_out.register_forward_hook(lambda layer, inputs, y: y + 1.0 * y)
    assert abs(embedder.encode(["hello world"]) - before).max() > 1e-2
    hook.remove()
    np.testing.assert_array_equal(embedder.encode(["hello world"]), before)


def test_what_cannot_be_compiled(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    embedder.encoder.layers = None
    with pytest.raises(ValueError, match=naming("compile", "Bert", "layers")):
        compile_layers(embedder)

    def broken(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: no g++")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=naming("compile", "InvalidCxxCompiler")):
        compile_layers(make_embedder(tmp_path / "base"))
