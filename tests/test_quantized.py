"""quantized.py: by hand, as search rounds, and the gradient that passes through."""

import functools

import numpy as np
import pytest
import torch
from loss_checks import assert_equal, loss_and_gradients, random_vectors
from naming import naming
from test_cached import assert_cached_is_direct, make_batch
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, Targets, build_loss, finetune
from embedft.files import read_jsonl
from embedft.losses.contrastive import in_batch_negatives
from embedft.losses.matryoshka import Matryoshka
from embedft.losses.quantized import ROUNDED, Quantized
from embedft.retrieval.quantization import QuantizedIndex

TARGETS = Targets(torch.tensor([[0, 2], [1, 3], [4, 5]]))


def dot(Q, D, targets):
    return Q[0] @ D[0]


def test_binary_by_hand():
    """(0.3, -2, 0, 1) becomes (1, -1, -1, 1) / 2; the gradient is that of the inner loss, untouched."""
    Q, D = torch.tensor([[4.0, 3, 2, 1]], requires_grad=True), torch.tensor([[0.3, -2, 0, 1]], requires_grad=True)
    value, grad_Q, grad_D = loss_and_gradients(Quantized(precision="binary", inner=dot), Q, D, None)
    assert value.item() == 0
    assert grad_Q.tolist() == [[0.5, -0.5, -0.5, 0.5]]
    assert grad_D.tolist() == [[4, 3, 2, 1]]


def test_int8_by_hand():
    """A feature from 0 to 255 has steps of 1: 7.2 is in that from 7 to 8, its middle 7.5. The other is constant."""
    D = torch.tensor([[7.2, 3.0], [0.0, 3.0], [255.0, 3.0], [128.0, 3.0]], requires_grad=True)
    Q = torch.tensor([[2.0, 1.0]], requires_grad=True)
    value, grad_Q, grad_D = loss_and_gradients(Quantized(precision="int8", inner=dot), Q, D, None)
    assert value.item() == 2 * 7.5 + 3
    assert grad_Q.tolist() == [[7.5, 3]]
    assert grad_D.tolist() == [[2, 1], [0, 0], [0, 0], [0, 0]]
    assert ROUNDED["int8"](D.detach())[:, 0].tolist() == [7.5, 0.5, 255.5, 128.5]


@pytest.mark.parametrize("dim", [3, 16, 33])
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_rounds_as_search_does(precision, dim):
    """The vectors that an index over the same documents decodes; the scale of signs does not matter to it."""
    D = random_vectors(50, dim, dtype=torch.float32).detach()
    D[:, 0] = 0.25
    found, expected = ROUNDED[precision](D).numpy(), QuantizedIndex(D.numpy(), precision).decode()
    if precision == "binary":
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
        found = found * np.sqrt(dim)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (found != D.numpy()).any()


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_the_gradient_is_that_at_the_rounded_vectors(precision):
    Q, D = random_vectors(3, 8), random_vectors(6, 8, seed=1)
    rounded = ROUNDED[precision](D.detach()).requires_grad_()
    expected = loss_and_gradients(in_batch_negatives, Q, rounded, TARGETS)
    assert_equal(
        loss_and_gradients(Quantized(precision=precision, inner=in_batch_negatives), Q, D, TARGETS), expected, 0
    )


def test_under_matryoshka_each_dimension_is_rounded_by_itself():
    Q, D = random_vectors(3, 8), random_vectors(6, 8, seed=1)
    inner = Quantized(precision="int8", inner=in_batch_negatives)
    value = Matryoshka(dims=[8, 4], inner=inner)(Q, D, TARGETS)
    unit = [torch.nn.functional.normalize(D.detach()[:, :dim], dim=1) for dim in (8, 4)]
    expected = sum(
        in_batch_negatives(Q[:, :dim], ROUNDED["int8"](x), TARGETS) for dim, x in zip((8, 4), unit, strict=True)
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_parameters_of_the_inner_loss_are_its_own():
    loss = build_loss({"name": "quantized", "precision": "int8", "inner": {"name": "learnable_temperature"}})
    assert [name.partition(".")[0] for name, _ in loss.named_parameters()] == ["inner"]


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_cached_is_direct(tmp_path, precision):
    embedder = make_embedder(tmp_path / "base", dtype=torch.float64).train()
    spec = {"name": "quantized", "precision": precision, "inner": {"name": "in_batch_negatives"}}
    assert_cached_is_direct(embedder, make_batch(embedder), functools.partial(build_loss, spec))


def test_in_finetune_on_windows(tmp_path):
    """Beside the loss of the vectors themselves, at several dimensions, in mini-batches."""
    rounded = {"name": "quantized", "precision": "binary", "inner": {"name": "in_batch_negatives"}}
    loss = {"name": "sum", "losses": [{"name": "in_batch_negatives"}, rounded]}
    config = FinetuneConfig(
        epochs=1,
        batch_size=6,
        passages=[8, 4],
        mini_batch_tokens=40,
        loss={"name": "matryoshka", "dims": [32, 8], "inner": loss},
    )
    finetune(make_embedder(tmp_path / "base"), make_dataset(), config, out=tmp_path / "run")
    (first, *_) = (record for _, record in read_jsonl(tmp_path / "run" / "train.jsonl"))
    assert {"matryoshka/32/quantized", "matryoshka/8/quantized"} <= first["components"].keys()


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ({"precision": "int4"}, ("precision", "int4", "int8", "binary")),
        ({"precision": 8}, ("precision", 8)),
        ({}, ("quantized", "precision")),
    ],
)
def test_refuses(spec, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        build_loss({"name": "quantized", "inner": {"name": "in_batch_negatives"}} | spec)
