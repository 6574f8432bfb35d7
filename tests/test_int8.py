"""int8.py and dtypes.py: linear layers in int8 against float32, and the dtype of a model by name or by measurement."""

import copy
import json
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming import names, naming
from test_layers import random
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, device, finetune, load_embedder
from embedft.cli import main
from embedft.encoders import dtypes, layers
from embedft.encoders.dtypes import dtype_of, find_dtype
from embedft.encoders.int8 import Int8Linear, to_int8
from embedft.encoders.layers import Linear
from embedft.encoders.lora import LoraConfig, add_lora

TEXTS = [
    "what is a limit order?",
    "The fee is charged daily, and revenue rose by 12% in the third quarter of 2021.",
    "a b c",
    "Mutations of the gene were found in 3 of 40 patients, none of whom had been treated before the study began.",
]
on_vnni = pytest.mark.skipif(not device.has_int8_linear(torch.device("cpu")), reason="no int8 products on this CPU")


@pytest.fixture(autouse=True)
def onednn(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


def quantized(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded to 127 steps on either side of 0, as real numbers."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-20) / 127
    return (x / scale).round() * scale


@on_vnni
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_divided", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_a_product_is_that_of_rounded_rows(num_tokens, is_divided, bias):
    layer, x = Linear(24, 20, bias=bias), random(num_tokens, 24, seed=1) * 3
    x[0, 5] = 100
    x[-1] = 0 if num_tokens > 1 else x[-1]
    divisor = random(24, seed=2).abs() + 0.5 if is_divided else torch.ones(24)
    expected = F.linear(quantized(x / divisor), quantized(layer.weight * divisor), layer.bias)
    int8 = Int8Linear(layer, divisor if is_divided else None)
    with torch.inference_mode():
        kept = x.clone()
        torch.testing.assert_close(int8(x), expected, rtol=1e-4, atol=1e-4)
        for name, activation in layers.ACTIVATIONS.items():
            torch.testing.assert_close(int8.activated(x, name), activation(expected), rtol=1e-4, atol=1e-4)
        assert torch.equal(x, kept)
        assert torch.equal(copy.deepcopy(int8)(x), int8(x))


@on_vnni
def test_a_text_leaves_its_neighbours_alone(tiny_bert):
    embedder = make_embedder(tiny_bert, dtype="int8")
    together = embedder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(embedder.encode([text])[0], together[row], rtol=0, atol=1e-6)


@on_vnni
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_vectors_of_a_real_model(minilm_folder, dtype):
    exact = load_embedder(minilm_folder, device="cpu").encode(TEXTS)
    embedder = load_embedder(minilm_folder, device="cpu", dtype=dtype)
    assert dtype_of(embedder) == dtype
    assert cosines(embedder.encode(TEXTS), exact).min() > {"int8": 0.997, "bfloat16": 0.9998}[dtype]
    parts = [part for part in embedder.encoder.modules() if isinstance(part, Int8Linear)]
    divided = [part for part in parts if part.factor is not None]
    assert 0 < len(divided) < len(parts) if dtype == "int8" else parts == []


@on_vnni
def test_int8_is_told_apart_and_reported(tiny_bert, tmp_path, capsys):
    spaces = {}
    for dtype in ("float32", "bfloat16", "int8"):
        embedder = make_embedder(tiny_bert, dtype=dtype, store=tmp_path / "store")
        spaces[embedder.space("document").fingerprint] = embedder.space("document").description["dtype"]
        before = embedder.store.misses
        embedder.encode(TEXTS)
        assert embedder.store.misses == before + len(TEXTS)
    assert list(spaces.values()) == ["float32", "bfloat16", "int8"]
    assert main(["info", str(tiny_bert), "--device", "cpu", "--dtype", "int8"]) == 0
    assert "MiB of weights in int8" in capsys.readouterr().out


@on_vnni
def test_int8_is_for_inference(tiny_bert, tmp_path):
    embedder = make_embedder(tiny_bert, dtype="int8")
    with pytest.raises(ValueError, match=naming("dtype", "int8")):
        finetune(embedder, make_dataset(), FinetuneConfig(epochs=1), out=tmp_path / "run")
    with pytest.raises(ValueError, match=naming("dtype", "int8")):
        embedder.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=naming("dtype", "int8")):
        add_lora(embedder, LoraConfig())
    assert list(tmp_path.iterdir()) == []
    assert not any(parameter.requires_grad for parameter in embedder.encoder.parameters())
    layer = embedder.encoder.layers[0].qkv
    with pytest.raises(ValueError, match=naming("dtype", "int8")):
        layer(random(3, layer.in_features).requires_grad_())


@on_vnni
def test_both_sides_turn_into_int8(tiny_bert):
    embedder = make_embedder(tiny_bert)
    embedder.attach_query_side(make_embedder(tiny_bert))
    to_int8(embedder)
    assert [dtype_of(side) for side in (embedder.encoder, embedder.query_side.encoder)] == ["int8"] * 2


@on_vnni
def test_an_encoder_without_layers_has_no_int8(tiny_bert):
    embedder = make_embedder(tiny_bert)
    embedder.encoder = torch.nn.Embedding(3, 4)
    with pytest.raises(ValueError, match=naming("dtype", "int8", "Linear")):
        to_int8(embedder)


@on_vnni
def test_lora_is_merged_before_int8(tiny_bert, tmp_path):
    embedder = make_embedder(tiny_bert)
    add_lora(embedder, LoraConfig(rank=2, save="adapter"))
    embedder.save(tmp_path / "lora")
    with pytest.raises(ValueError, match=naming("dtype", "int8", ..., "LoRA")):
        load_embedder(tmp_path / "lora", device="cpu", dtype="int8")
    lower = load_embedder(tmp_path / "lora", device="cpu", dtype="bfloat16")
    assert cosines(lower.encode(TEXTS), embedder.encode(TEXTS)).min() > 0.9998


def test_int8_where_it_cannot_run(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "_INT8_LINEAR", False)
    options = ["--dtype", "int8", "--device", "cpu", "--out", str(tmp_path / "vectors.npy")]
    (tmp_path / "texts.txt").write_text("a b\n")
    assert main(["encode", str(tiny_bert), str(tmp_path / "texts.txt"), *options]) == 2
    assert names(capsys.readouterr().err, "dtype", "int8", ..., "cpu")


@pytest.mark.parametrize("dtype", ["int4", "torch.int8x", torch.int32])
def test_unknown_dtypes(tiny_bert, dtype):
    with pytest.raises(ValueError, match=naming("dtype", str(dtype).removeprefix("torch."), *dtypes.DTYPES)):
        load_embedder(tiny_bert, device="cpu", dtype=dtype)


def test_names_of_dtypes():
    assert [find_dtype(dtype) for dtype in (torch.float64, torch.bfloat16, "auto")] == ["float64", "bfloat16", "auto"]


@pytest.mark.parametrize(("speed", "found"), [(1.5, "bfloat16"), (1.2, "float32"), (0.7, "float32")])
def test_auto_takes_what_is_clearly_faster(tiny_bert, monkeypatch, capsys, tmp_path, speed, found):
    monkeypatch.setattr(dtypes, "bfloat16_speed", lambda embedder: speed)
    embedder = make_embedder(tiny_bert, dtype="auto")
    assert dtype_of(embedder) == found
    np.testing.assert_array_equal(embedder.encode(TEXTS), make_embedder(tiny_bert, dtype=found).encode(TEXTS))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    options = ["--dtype", "auto", "--device", "cpu", "--out", str(tmp_path / "vectors.npy")]
    assert main(["encode", str(tiny_bert), str(tmp_path / "texts.json"), *options]) == 0
    assert names(capsys.readouterr().err, "dtype", found)


@pytest.mark.parametrize("speed", [0.7, 1.0])
def test_slow_bfloat16_warns(tiny_bert, monkeypatch, speed):
    monkeypatch.setattr(dtypes, "bfloat16_speed", lambda embedder: speed)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_embedder(tiny_bert, dtype="bfloat16")
    assert [names(str(warning.message), "dtype", "bfloat16", ..., speed) for warning in found] == [True] * (speed < 1)


def test_speed_is_measured_on_the_layers_of_a_model(tiny_bert, monkeypatch):
    """On the largest; those of tiny ones say nothing. Random numbers and the model stay as they are."""
    embedder, shapes, product = make_embedder(tiny_bert), [], layers._product
    largest = max((part.weight for part in embedder.encoder.modules() if type(part) is Linear), key=torch.numel)
    assert dtypes.bfloat16_speed(embedder) == 1
    monkeypatch.setattr(dtypes, "MIN_WEIGHTS", 0)

    def slow_in_float32(x, weight, *rest):
        shapes.append((len(x), *weight.shape, x.dtype))
        time.sleep(0.05 if x.dtype is torch.float32 else 0)
        return product(x, weight, *rest)

    monkeypatch.setattr(layers, "_product", slow_in_float32)
    state, weights = torch.get_rng_state(), embedder.sha256()
    speed = dtypes.bfloat16_speed(embedder)
    if device.has_reordered_linear(torch.device("cpu"), torch.bfloat16):
        assert speed > 1.5
        kinds = torch.float32, torch.bfloat16
        assert set(shapes) == {(layers.MIN_REORDER, *largest.shape, kind) for kind in kinds}
    assert torch.equal(torch.get_rng_state(), state)
    assert embedder.sha256() == weights
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert dtypes.bfloat16_speed(embedder) == 1
