"""Every device of this machine agrees with the CPU, from tokens to metrics; and where MPS works, nothing is float64.

`python -m pytest -m cuda` runs those of CUDA. Losses: test_every_loss.py.
"""

import pytest
import torch
from naming import naming
from test_every_loss import SPECS, loss_and_gradients, make_batch, make_loss
from tiny import make_dataset, make_embedder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedft import build_loss, evaluate, load_embedder
from embedft import device as devices
from embedft.data.batches import make_batches
from embedft.encoders.attention import CAUSAL, FULL, Sequences, attention
from embedft.encoders.packing import pack
from embedft.encoders.pooling import POOLINGS, Pooling
from embedft.losses.registry import LOSSES
from embedft.retrieval.index import search_exact
from embedft.training.references import FrozenEmbeddings
from embedft.training.train import TrainConfig, train

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
LENGTHS = (40, 38, 37, 9, 3, 3, 1)
LOSS = {"name": "sum", "losses": [{"name": "learnable_temperature"}, {"name": "toward_base"}], "weights": [1.0, 0.5]}


def random_numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_gradient(compute, *tensors: Tensor, device: torch.device) -> list[Tensor]:
    """compute(tensors on the device), and the gradient of a sum of its squares, on the CPU."""
    moved = [x.detach().to(device).requires_grad_() for x in tensors]
    result = compute(*moved)
    assert result.device.type == device.type
    (result * result).sum().backward()
    return [result.detach().cpu(), *(x.grad.cpu() for x in moved)]


@pytest.mark.parametrize("window", [FULL, CAUSAL, (4, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_attention(device, window, has_bias):
    packed, bias = pack([[1] * n for n in LENGTHS]), random_numbers(4, 40, 40)

    def attend(q, k, v):
        sequences = Sequences(packed.to(q.device), bias_HLL=bias.to(q.device) if has_bias else None)
        return attention(q, k, v, sequences, window=window)

    tensors = [random_numbers(sum(LENGTHS), heads, 8) for heads in (4, 2, 2)]
    expected = with_gradient(attend, *tensors, device=torch.device("cpu"))
    torch.testing.assert_close(with_gradient(attend, *tensors, device=device), expected, **CLOSE)


@pytest.mark.parametrize("prompt_length", [None, 2])
def test_pooling(device, prompt_length):
    packed = pack([[1] * n for n in LENGTHS], prompt_length=prompt_length)
    pooling, hidden = Pooling(tuple(POOLINGS), 6), random_numbers(sum(LENGTHS), 6)
    expected = with_gradient(lambda x: pooling(x, packed), hidden, device=torch.device("cpu"))
    pooling.to(device)
    found = with_gradient(lambda x: pooling(x, packed.to(device)), hidden, device=device)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_encoding_search_and_metrics(device, tiny_bert):
    """Whole texts, windows, other orders of batches; exact search on the device; metrics."""
    dataset = make_dataset(12, 30)
    texts = list(dataset.corpus.values())
    ours, theirs = (load_embedder(tiny_bert, device=name) for name in (device, "cpu"))
    expected = theirs.encode(texts)
    assert (ours.encode(texts) * expected).sum(axis=1).min() > 0.999  # on CUDA, in bfloat16
    ours.autocast = False
    for options in ({}, {"batch_tokens": 40}, {"role": "query"}):
        torch.testing.assert_close(ours.encode(texts, **options), expected, **CLOSE)
    found, places = ours.encode_passages(texts, (6, 3))
    windows, sources = theirs.encode_passages(texts, (6, 3))
    torch.testing.assert_close(found, windows, **CLOSE)
    assert (places == sources).all()
    # Rounding decides between neighbours that are as close as this.
    scores, rows = search_exact(expected[:5], expected, 6, device=device)
    exact, order = search_exact(expected[:5], expected, 6)
    torch.testing.assert_close(scores, exact, **CLOSE)
    assert (rows[:, 0] == order[:, 0]).all()
    for options in ({}, {"passages": (6, 3)}):
        reports = [evaluate(embedder, dataset, **options) for embedder in (ours, theirs)]
        assert reports[0].metrics == pytest.approx(reports[1].metrics, abs=0.05)


def trained(base, device: torch.device, **options) -> Tensor:
    """Vectors, on the CPU, after two epochs."""
    embedder, dataset, loss = make_embedder(base, dropout=0.0), make_dataset(11, 9, negatives=2), build_loss(LOSS)
    references = {"base": FrozenEmbeddings(embedder, dataset)}
    batches = make_batches(dataset, embedder.pack, batch_size=4, seed=0, num_negatives=2)
    embedder.to(device)
    embedder.autocast = False  # CUDA would encode in bfloat16
    config = TrainConfig(epochs=2, lr=1e-3, warmup=0.2, accumulate=2, weight_decay=0.1, **options)
    train(embedder, batches, loss, config, references=references)
    assert {x.device.type for x in (*embedder.parameters(), *loss.parameters())} == {device.type}
    return torch.from_numpy(embedder.encode(list(dataset.corpus.values())))


@pytest.mark.parametrize("options", [{}, {"mini_batch_tokens": 30}, {"checkpoint_activations": True}], ids=str)
def test_training(device, tmp_path, options):
    """A loss with a parameter and a reference, two batches per step, with and without gradient caching."""
    expected = trained(tmp_path / "base", torch.device("cpu"))
    found = trained(tmp_path / "base", device, **options)
    base = torch.from_numpy(make_embedder(tmp_path / "base").encode(list(make_dataset(11, 9).corpus.values())))
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("options", [{}, {"mini_batch_tokens": 30}, {"checkpoint_activations": True}], ids=str)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_training_in_half_precision(device, tmp_path, precision, options):
    """Through the packed kernel on CUDA: vectors move as they do in float32."""
    if precision == "float16" and device.type != "cuda":
        pytest.skip("float16 is trained on CUDA")
    texts = list(make_dataset(11, 9).corpus.values())
    base = torch.from_numpy(make_embedder(tmp_path / "base", dropout=0.0).encode(texts))
    moves = [trained(tmp_path / "base", torch.device("cpu")) - base]
    moves.append(trained(tmp_path / "base", device, precision=precision, **options) - base)
    assert torch.cosine_similarity(*(x.flatten() for x in moves), dim=0) > 0.99


@pytest.mark.parametrize("options", [{}, {"mini_batch_tokens": 30}, {"precision": "bfloat16"}], ids=str)
def test_the_same_bits_twice(device, tmp_path, options):
    first, second = (trained(tmp_path / "base", device, deterministic=True, **options) for _ in range(2))
    assert torch.equal(first, second)


def test_random_numbers_are_those_of_the_seed(device):
    state = devices.random_state(device)
    with devices.seeded(5, device):
        first = torch.rand(4, device=device)
    devices.set_random_state(state, device)
    with devices.seeded(5, device):
        assert torch.equal(torch.rand(4, device=device), first)
    devices.release_memory(device)
    assert devices.describe(device)
    assert devices.find_device(str(device)).type == device.type


# MPS has no float64. Where it is missing, the CPU stands in: no tensor that the operators make may be float64.


class WithoutFloat64(TorchDispatchMode):
    """Raises where an operator, also of the backward pass, returns a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.dtype is torch.float64:
                raise TypeError(f"{func} made float64, which MPS lacks")
        return results


def test_the_stand_in_finds_float64():
    x = torch.ones(3, requires_grad=True)
    with WithoutFloat64():
        (x * 2.5).sum().backward()
        for compute in (
            lambda: x.double(),
            lambda: torch.tensor([1.5], dtype=torch.float64),
            lambda: x.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match=naming("float64")):
                compute()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", ["plain", "matryoshka"])
@pytest.mark.filterwarnings("ignore:dims:UserWarning")
def test_losses_need_no_float64(name, wrapper):
    assert set(SPECS) <= set(LOSSES)
    Q, D, targets = make_batch(dtype=torch.float32)
    loss = make_loss(name, wrapper, torch.float32)
    with WithoutFloat64():
        value, *_ = loss_and_gradients(loss, Q, D, targets)
    assert value.dtype is torch.float32


@pytest.mark.parametrize("options", [{}, {"mini_batch_tokens": 30}, {"precision": "bfloat16"}], ids=str)
def test_training_and_encoding_need_no_float64(tmp_path, options):
    with WithoutFloat64():
        found = trained(tmp_path / "base", torch.device("cpu"), **options)
    assert found.isfinite().all()


def test_pooling_and_search_need_no_float64(tiny_bert):
    packed = pack([[1] * n for n in LENGTHS], prompt_length=2)
    embedder = load_embedder(tiny_bert, device="cpu")
    pooling = Pooling(tuple(POOLINGS), 6)
    with WithoutFloat64():
        with_gradient(lambda x: pooling(x, packed), random_numbers(sum(LENGTHS), 6), device=torch.device("cpu"))
        evaluate(embedder, make_dataset(), passages=(6, 3))
        evaluate(embedder, make_dataset(), dim=8)
