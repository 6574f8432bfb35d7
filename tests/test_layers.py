"""layers.py: linear layers against torch's, and dropout.

oneDNN's path, its derivative, and where it does not apply; the CPU's cheap mask drops as often as asked, keeps the
mean, and its gradient is the same mask.
"""

import platform

import pytest
import torch
import torch.nn.functional as F
from naming import naming

from embedft import device as devices
from embedft.encoders import layers
from embedft.encoders.layers import LEVELS, Dropout, GatedFeedForward, Linear, without_memory

T, D, E = 23, 12, 20
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's operator is for x86 here")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_layer(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    layer = Linear(D, E, bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters(), start=1):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return layer


@pytest.fixture(autouse=True)
def onednn(monkeypatch) -> None:
    """oneDNN on, also where the suite runs without it (`--no-onednn`) and where another BLAS is as fast."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.setattr(devices, "_HAS_FAST_BLAS", False)


@pytest.fixture
def products(monkeypatch) -> list:
    """The shapes of the products that went to oneDNN."""
    shapes, product = [], layers._product

    def counted(x, weight, *rest):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return product(x, weight, *rest)

    monkeypatch.setattr(layers, "_product", counted)
    return shapes


def gradients(forward, tensors, weight_of_output) -> list[torch.Tensor]:
    return torch.autograd.grad(forward(), [t for t in tensors if t.requires_grad], weight_of_output)


@on_x86
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(products, bias):
    layer, x = make_layer(bias=bias), random(T, D).requires_grad_()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-5)
    assert products == [((T, D), (E, D))]
    tensors = [x, *layer.parameters()]
    grad = random(T, E, seed=9)
    found = gradients(lambda: layer(x), tensors, grad)
    expected = gradients(lambda: F.linear(x, layer.weight, layer.bias), tensors, grad)
    assert len(found) == 2 + bias
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    assert products[2:] == [((T, E), (D, E)), ((E, T), (D, T))]  # x's gradient, the weight's


# Gradients as autograd hands them back: broadcast (strides 0), transposed, every other column of something wider.
GRADS = {
    "broadcast": lambda: torch.tensor(0.5).expand(T, E),
    "rows repeated": lambda: random(1, E).expand(T, E),
    "transposed": lambda: random(E, T).T,
    "strided": lambda: random(T, 2 * E)[:, ::2],
    "inner slice": lambda: random(T, 3 * E)[:, E : 2 * E],
}
INPUTS = {
    "plain": lambda: random(T, D),
    "transposed": lambda: random(D, T).T,
    "strided": lambda: random(T, 2 * D)[:, ::2],
    "inner slice": lambda: random(T, 3 * D)[:, D : 2 * D],
    "one row": lambda: random(1, D).expand(T, D),
}


@on_x86
@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_uneven_strides(products, x, grad):
    layer, x = make_layer(), x().requires_grad_()
    tensors = [x, *layer.parameters()]
    found = gradients(lambda: layer(x), tensors, grad())
    expected = gradients(lambda: F.linear(x, layer.weight, layer.bias), tensors, grad())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    assert len(products) == 3


@on_x86
@pytest.mark.parametrize("num_tokens", [1, 2, 513])
def test_any_number_of_tokens(products, num_tokens):
    layer, x = make_layer(), random(num_tokens, D).requires_grad_()
    (layer(x) ** 2).sum().backward()
    x_ref = x.detach().clone().requires_grad_()
    (F.linear(x_ref, layer.weight, layer.bias) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-5, atol=1e-4)
    assert len(products) == 3


@on_x86
def test_what_is_frozen_gets_no_gradient_and_costs_none(products):
    layer, x = make_layer(), random(T, D).requires_grad_()
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((E,), float(T)))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(T, D), rtol=1e-6, atol=1e-5)
    assert len(products) == 2  # forward, x
    products.clear()
    layer, x = make_layer(), random(T, D)
    layer(x).sum().backward()
    assert x.grad is None
    assert len(products) == 2  # forward, weight


@on_x86
def test_inference_mode(products):
    layer, x = make_layer().requires_grad_(False), random(T, D)
    with torch.inference_mode():
        found = layer(x)
    torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-5)
    assert len(products) == 1


@on_x86
def test_a_second_derivative_is_refused(products):
    layer, x = make_layer(), random(T, D).requires_grad_()
    (first,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=naming("once_differentiable")):
        first.sum().backward()


# Where it falls back.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_take_torchs_own(products, dtype):
    layer, x = make_layer(dtype=dtype), random(T, D).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert products == []


def test_float64_is_twice_differentiable():
    layer, x = make_layer(dtype=torch.float64), random(T, D, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)  # 2 W^T W, times ones
    torch.testing.assert_close(second, (2 * layer.weight.T @ layer.weight).sum(0).expand(T, D))


def test_autocast_takes_torchs_own(products):
    layer, x = make_layer(), random(T, D).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert products == []


def test_without_onednn_it_is_torchs_own(products, monkeypatch):
    monkeypatch.setattr(devices, "_ONEDNN_LINEAR", False)
    layer, x = make_layer(), random(T, D)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert products == []


@on_x86
def test_where_the_blas_is_fast_training_uses_it_and_inference_onednn(products, monkeypatch):
    monkeypatch.setattr(devices, "_HAS_FAST_BLAS", True)
    layer, x = make_layer(), random(T, D)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert products == []
    with layers.inference(layer):
        layer(x)
    assert products == [((T, D), (E, D))]


def test_onednn_switched_off_in_torch(products, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layer, x = make_layer(), random(T, D)
    layer(x)
    assert products == []


def test_parameters_are_those_of_torch():
    ours, theirs = make_layer(), torch.nn.Linear(D, E)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, ours.weight)


# `inference`: reordered weights, and activations in the same kernel.

LONG = layers.MIN_REORDER


@on_x86
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
@pytest.mark.parametrize("num_tokens", [1, LONG, 2 * LONG + 1])
def test_activated_is_the_activation_of_the_layer(products, activation, num_tokens, bias):
    layer, x = make_layer(bias=bias), random(num_tokens, D)
    expected = layers.ACTIVATIONS[activation](F.linear(x, layer.weight, layer.bias))
    outside = layer.activated(x, activation)
    with layers.inference(layer):
        inside = layer.activated(x, activation)
    for found in (outside, inside):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 2
    (gradient,) = torch.autograd.grad(outside.sum(), layer.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), layer.weight)[0], rtol=1e-4, atol=1e-4)


@on_x86
def test_weights_are_reordered_for_large_batches_and_until_inference_ends():
    layer, small, large = make_layer(), random(LONG - 1, D), random(LONG, D, seed=3)
    model = torch.nn.ModuleDict({"inner": torch.nn.Sequential(layer)})
    with layers.inference(model):
        assert not layer(small).requires_grad
        assert layer.reordered is None
        torch.testing.assert_close(layer(large), F.linear(large, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        assert layer.reordered is not None
        torch.testing.assert_close(layer(small), F.linear(small, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert (layer.reorders, layer.reordered) == (False, None)
    with pytest.raises(ZeroDivisionError), layers.inference(model):
        raise ZeroDivisionError(layer(large))
    assert (layer.reorders, layer.reordered) == (False, None)
    with torch.no_grad():
        layer.weight.data.mul_(2)  # no version counter tells of this
    with layers.inference(model):
        torch.testing.assert_close(layer(large), F.linear(large, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@on_x86
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("num_tokens", [1, LONG])
def test_bfloat16_in_inference(products, activation, num_tokens):
    """Only there: outside, and with gradients, it is torch's own layer."""
    layer, x = make_layer(dtype=torch.bfloat16), random(num_tokens, D, dtype=torch.bfloat16)
    run = layer if activation is None else lambda x: layer.activated(x, activation)
    expected = F.linear(*(y.float() for y in (x, layer.weight, layer.bias)))
    expected = expected if activation is None else layers.ACTIVATIONS[activation](expected)
    outside = run(x)
    assert outside.requires_grad
    assert products == []
    with layers.inference(layer):
        inside = run(x)
    assert len(products) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for found in (outside, inside):
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.04)


@on_x86
def test_hooks_see_what_the_layer_gives_before_its_activation():
    layer, x, seen = make_layer(), random(LONG, D), []
    layer.register_forward_hook(lambda _, inputs, y: seen.append(y.clone()) or y + 1)
    with layers.inference(layer):
        found = layer.activated(x, "gelu")
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, F.gelu(expected + 1), rtol=1e-5, atol=1e-5)


@on_x86
def test_hooks_may_change_what_the_layer_gets():
    layer, x = make_layer(), random(LONG, D)
    layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    with layers.inference(layer):
        found = layer.activated(x, "gelu")
    torch.testing.assert_close(found, F.gelu(F.linear(2 * x, layer.weight, layer.bias)), rtol=1e-5, atol=1e-5)


# Dropout.

SHAPES = [(1, 1), (3, 5), (7, 384), (501, 33)]  # most of them no multiple of the four elements of a word


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(1000, 384))
    kept = y != 0
    # 384,000 draws: the standard deviation of the rate is below 0.0009.
    assert abs(1 - kept.float().mean().item() - p) < 0.004
    scale = LEVELS / (LEVELS - round(p * LEVELS))
    assert torch.equal(y[kept], torch.full_like(y[kept], scale))
    assert scale == pytest.approx(1 / (1 - p), rel=2e-4)


def test_elements_are_dropped_independently_of_their_neighbours():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(4000, 64)) != 0).double().flatten()
    for distance in (1, 2, 3, 4, 64):
        a, b = kept[:-distance] - 0.5, kept[distance:] - 0.5
        assert abs((a * b).mean().item() / 0.25) < 0.01  # standard deviation 0.002


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_the_same_mask(shape, dtype):
    torch.manual_seed(1)
    x = torch.randn(shape).sign().to(dtype).requires_grad_()  # products with 1 and -1 are exact in any type
    y = Dropout(0.3)(x)
    assert (y.dtype, y.shape) == (dtype, shape)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient * x, y)


def test_gradient_check():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(2)
        return Dropout(0.4)(x)

    assert torch.autograd.gradcheck(seeded, x)


def test_same_seed_same_mask_other_seed_another():
    x, masks = torch.ones(50, 50), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(Dropout(0.1)(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("p", [0.0, 1e-7])
def test_nothing_is_dropped_below_the_resolution(p):
    x = torch.randn(100, 100)
    assert torch.equal(Dropout(p)(x), x)


def test_everything_is_dropped_at_one():
    assert Dropout(1.0)(torch.ones(10, 10)).eq(0).all()


def test_inference_drops_nothing():
    x = torch.randn(10, 10)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_gated_feed_forward_by_hand():
    """One feature, F = 1: gate 2 and up 3 of x = 1 give relu(2) * 3 = 6, times 10, plus the bias 5 if there is one."""
    for up_first, rows in ((False, [2.0, 3.0]), (True, [3.0, 2.0])):
        for out_bias in (None, True):
            layer = GatedFeedForward(1, 1, activation="relu", up_first=up_first, out_bias=out_bias)
            assert layer.gate_up.bias is None
            with torch.no_grad():
                layer.gate_up.weight[:, 0] = torch.tensor(rows)
                layer.out.weight.fill_(10)
                if out_bias:
                    layer.out.bias.fill_(5)
            assert layer(torch.ones(1, 1)).item() == (65 if out_bias else 60)
            # relu closes a negative gate.
            assert layer(-torch.ones(1, 1)).item() == (5 if out_bias else 0)


def test_modules_without_memory_draw_nothing():
    state = torch.get_rng_state()
    with without_memory():
        layers = [
            torch.nn.Embedding(3, 2, padding_idx=0),
            torch.nn.Linear(2, 5),
            torch.nn.LayerNorm(5),
            torch.nn.GRU(2, 4),
        ]
        torch.nn.init.normal_(layers[1].weight, std=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for layer in layers for parameter in layer.parameters()} == {"meta"}
    assert [tuple(layer.weight.shape) for layer in layers[:3]] == [(3, 2), (5, 2), (5,)]
    assert torch.nn.init.ones_(torch.empty(1)).item() == 1
