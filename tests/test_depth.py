"""depth.py: the first layers of every family as an encoder, and training at drawn depths."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from families import SEQUENCES, tiny_encoder
from naming import naming
from ranks import run_ranks
from tiny import make_dataset, make_embedder
from torch import nn

from embedft import FinetuneConfig, finetune, load_embedder
from embedft.encoders.depth import at_depth, drawn_depth, truncated
from embedft.encoders.folder import FAMILIES
from embedft.encoders.packing import pack
from embedft.encoders.schema import Layers
from embedft.files import read_json, read_jsonl
from embedft.training import train as train_module

TEXTS = ["a b c", "d e f g h", "a"]
DEEP = [name for name, family in FAMILIES.items() if any(f.type is Layers for f in fields(family.Config))]
CONFIG = FinetuneConfig(epochs=3, batch_size=4, lr=1e-2, checkpoint_every=2, depths=[2, 1])


@pytest.mark.parametrize("model_type", DEEP)
def test_fewer_layers(model_type):
    """For good and for one batch, with equal vectors; then the encoder is as it was."""
    encoder, packed = tiny_encoder(model_type), pack(SEQUENCES)
    shorter, names = truncated(encoder, 1), list(encoder.state_dict())
    assert len(shorter.layers) == 1
    assert type(encoder)(shorter.config).state_dict().keys() == shorter.state_dict().keys()
    assert all(shorter.get_parameter(name) is encoder.get_parameter(name) for name in shorter.state_dict())
    with torch.inference_mode():
        whole = encoder(packed)
        with at_depth(encoder, 1):
            found = encoder(packed)
        assert torch.equal(found, shorter(packed))
        assert not torch.allclose(found, whole, atol=1e-3)
        assert torch.equal(encoder(packed), whole)
        with at_depth(encoder, None):
            assert torch.equal(encoder(packed), whole)
    assert list(encoder.state_dict()) == names
    for num_layers in (0, len(encoder.layers) + 1):
        with pytest.raises(ValueError, match=naming("num_layers", num_layers, 1, len(encoder.layers))):
            truncated(encoder, num_layers)


def test_fewer_layers_keep_what_no_checkpoint_has():
    """The mode, the dropout of attention weights, and buffers that are not saved, as rotary tables often are."""
    encoder = tiny_encoder("bert")
    encoder.attention_dropout = 0.2
    encoder.register_buffer("table", torch.ones(3), persistent=False)
    shorter = truncated(encoder, 1)
    assert not any(module.training for module in shorter.modules())
    assert shorter.attention_dropout == 0.2
    assert shorter.table is encoder.table
    assert (len(encoder.layers), encoder.config.num_hidden_layers) == (2, 2)
    encoder.layers = nn.Sequential(*encoder.layers)
    with pytest.raises(ValueError, match=naming("num_layers", 1, "Bert")):
        truncated(encoder, 1)


def test_a_model_loaded_with_fewer_layers_is_saved_with_them(tmp_path):
    whole = make_embedder(tmp_path / "base")
    shorter = load_embedder(tmp_path / "base", device="cpu", num_layers=1)
    assert shorter.sha256() != whole.sha256()
    with at_depth(whole.encoder, 1):
        np.testing.assert_array_equal(shorter.encode(TEXTS), whole.encode(TEXTS))
    shorter.save(tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "config.json")["num_hidden_layers"] == 1
    loaded = load_embedder(tmp_path / "saved", device="cpu")
    assert len(loaded.encoder.layers) == 1
    np.testing.assert_array_equal(loaded.encode(TEXTS), shorter.encode(TEXTS))
    with pytest.raises(ValueError, match=naming(tmp_path / "base", "num_layers", 3, 2)):
        load_embedder(tmp_path / "base", num_layers=3)


def test_depths_are_drawn_evenly_and_by_the_seed():
    drawn = [drawn_depth([6, 3, 1], 7, batch) for batch in range(600)]
    assert [drawn_depth([6, 3, 1], 7, batch) for batch in range(600)] == drawn
    assert [drawn_depth([6, 3, 1], 8, batch) for batch in range(600)] != drawn
    assert all(150 < drawn.count(depth) < 250 for depth in (6, 3, 1))
    assert drawn_depth(None, 7, 0) is None


def test_a_step_trains_the_layers_it_runs(tmp_path, monkeypatch):
    """Each batch at its depth: the second layer gets a gradient at depth 2 alone, and the log says which it was."""
    seen, backward = [], train_module.backward

    def watched(embedder, *arguments, **options):
        found = backward(embedder, *arguments, **options)
        seen.append([name for name, p in embedder.named_parameters() if "layers.1." in name and p.grad is not None])
        return found

    monkeypatch.setattr(train_module, "backward", watched)
    finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / "run")
    depths = [record["depths"] for _, record in read_jsonl(tmp_path / "run" / "train.jsonl")]
    assert {depth for (depth,) in depths} == {1, 2}
    assert [bool(names) for names in seen] == [depth == 2 for (depth,) in depths]


def test_each_batch_of_a_step_has_a_draw_of_its_own(tmp_path):
    config = replace(CONFIG, epochs=1, accumulate=2, batch_size=2)
    finetune(make_embedder(tmp_path / "base"), make_dataset(), config, out=tmp_path / "run")
    steps = [record["depths"] for _, record in read_jsonl(tmp_path / "run" / "train.jsonl")]
    drawn = [depth for depths in steps for depth in depths]
    assert max(map(len, steps)) == 2
    assert drawn == [drawn_depth(config.depths, config.seed, batch) for batch in range(len(drawn))]


def test_layers_and_dimensions(tmp_path):
    """2D Matryoshka: with the loss at two dimensions, every cut of the model answers better than before."""
    loss = {"name": "matryoshka", "dims": [32, 8], "inner": {"name": "in_batch_negatives"}}
    data = make_dataset()
    finetune(make_embedder(tmp_path / "base"), data, replace(CONFIG, epochs=8, loss=loss), out=tmp_path / "run")

    def error(folder, num_layers: int, dim: int) -> float:
        embedder = load_embedder(folder, device="cpu", num_layers=num_layers)
        Q = embedder.encode([data.queries[f"q{i}"] for i in range(9)], role="query", dim=dim)
        scores = torch.from_numpy(Q @ embedder.encode(list(data.texts.values()), dim=dim).T) / 0.05
        return torch.nn.functional.cross_entropy(scores, torch.arange(9)).item()

    for cut in ((2, 32), (2, 8), (1, 32), (1, 8)):
        assert error(tmp_path / "run" / "model", *cut) < error(tmp_path / "base", *cut) - 0.3


def test_resumed_is_uninterrupted(tmp_path, monkeypatch):
    def run(name: str, **options) -> str:
        return finetune(
            make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / name, **options
        ).sha256()

    whole, calls, backward = run("whole"), [], train_module.backward

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return backward(*arguments, **options)

    monkeypatch.setattr(train_module, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    assert run("cut", existing="resume") == whole


def tuned(folder, **changes) -> np.ndarray:
    return finetune(make_embedder(folder / "base"), make_dataset(), replace(CONFIG, **changes)).encode(TEXTS)


def test_mini_batches_and_ranks_change_nothing(tmp_path):
    make_embedder(tmp_path / "base", dropout=0.0)
    whole = tuned(tmp_path)
    np.testing.assert_allclose(tuned(tmp_path, mini_batch_tokens=12), whole, rtol=0, atol=1e-4)
    for found in run_ranks(2, tuned, tmp_path, folder=tmp_path):
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("depths", [[0], [3, 1], []])
def test_depths_that_the_encoder_lacks(tmp_path, depths):
    with pytest.raises(ValueError, match=naming("depths", depths)):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), replace(CONFIG, depths=depths))
