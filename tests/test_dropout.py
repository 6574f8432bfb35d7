"""dropout.py: the CPU's cheap mask drops as often as asked, keeps the mean, and its gradient is the same mask."""

import pytest
import torch

from embedft.encoders.dropout import LEVELS, Dropout

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
