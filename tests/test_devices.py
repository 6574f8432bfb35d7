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
    assert (ours.encode(texts) * expected).sum(axis=1).min() > 0.9998  # on CUDA, in bfloat16
    lower = load_embedder(tiny_bert, device=device, dtype=torch.bfloat16)
    assert (lower.encode(texts) * expected).sum(axis=1).min() > 0.9998
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


def trained(base, device: torch.device, *, dropout: float = 0.0, dtype=torch.float32, **options) -> tuple[Tensor, list]:
    """Vectors, on the CPU, after two epochs: a loss with a parameter and a reference, two batches per step; and the
    record of each step."""
    embedder, dataset = make_embedder(base, dropout=dropout, dtype=dtype), make_dataset(11, 9, negatives=2)
    loss, references, records = build_loss(LOSS), {"base": FrozenEmbeddings(embedder, dataset)}, []
    batches = make_batches(dataset, embedder.pack, batch_size=4, seed=0, num_negatives=2)
    embedder.to(device)
    embedder.autocast = False  # CUDA would encode in bfloat16
    config = TrainConfig(epochs=2, lr=1e-3, warmup=0.2, accumulate=2, weight_decay=0.1, **options)
    train(embedder, batches, loss, config, references=references, on_step=lambda _, record: records.append(record))
    assert {x.device.type for x in (*embedder.parameters(), *loss.parameters())} == {device.type}
    return torch.from_numpy(embedder.encode(list(dataset.corpus.values()))), records


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A folder with a model; its vectors and records after training in float64 on the CPU."""
    base = tmp_path_factory.mktemp("exact") / "base"
    vectors, records = trained(base, torch.device("cpu"), dtype=torch.float64)
    untrained = torch.from_numpy(make_embedder(base).encode(list(make_dataset(11, 9).corpus.values())))
    assert (vectors - untrained).abs().max() > 0.05
    return base, vectors, records


def check_training(exact: tuple, device: torch.device, *, atol: float, **options) -> None:
    base, vectors, records = exact
    found, ours = trained(base, device, **options)
    torch.testing.assert_close(found, vectors, rtol=0, atol=atol)
    for record, expected in zip(ours, records, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], abs=atol)
        if not record.get("skipped"):  # float16 looks for its scale
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=max(0.05, atol))


SAVING = {
    "all at once": {},
    "checkpointed": {"checkpoint_activations": True},
    "cached": {"mini_batch_tokens": 30},
    "checkpointed, cached": {"checkpoint_activations": True, "mini_batch_tokens": 30},
}
every_saving = pytest.mark.parametrize("options", SAVING.values(), ids=SAVING)


@every_saving
@pytest.mark.parametrize(("precision", "atol"), [("float32", 5e-3), ("bfloat16", 0.03), ("float16", 0.03)])
def test_training(device, exact, precision, atol, options):
    """Its losses, gradients and vectors, in every precision and with less memory, against float64 on the CPU."""
    check_training(exact, device, precision=precision, atol=atol, **options)


@pytest.mark.cuda
@every_saving
def test_training_in_tf32(exact, options, monkeypatch):
    products = torch.backends.cuda.matmul
    monkeypatch.setattr(products, "fp32_precision", products.fp32_precision)  # given back afterwards
    devices.use_tf32(torch.device("cuda"))
    check_training(exact, torch.device("cuda"), atol=0.03, **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"mini_batch_tokens": 30}], ids=["all at once", "cached"])
def test_deterministic_training_gives_the_same_bits(device, tmp_path, precision, options):
    """Under dropout, and whether a thread makes batches and pins them, or not."""
    options = {"precision": precision, "deterministic": True, "dropout": 0.1} | options
    vectors, records = trained(tmp_path / "base", device, prefetch=2, **options)
    for prefetch in (2, 0):
        again, same = trained(tmp_path / "base", device, prefetch=prefetch, **options)
        assert torch.equal(again, vectors)
        assert [x["grad_norm"] for x in same] == [x["grad_norm"] for x in records]


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_attention_and_pooling_give_the_same_bits(device, name, dtype):
    """Texts so long that several blocks of a kernel, in CUDA the packed one, add to one gradient; and sums of them."""
    packed, pooling = pack([[1] * n for n in (700, 40, 300, 1)]), Pooling((name,), 128).to(device)
    tensors = [random_numbers(len(packed.input_ids), heads, 32).to(dtype) for heads in (4, 2, 2)]

    def compute(q, k, v):
        moved = packed.to(device)
        return pooling(attention(q, k, v, Sequences(moved)), moved)

    with devices.deterministic(device):
        first, second = (with_gradient(compute, *tensors, device=device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
        found, _ = trained(tmp_path / "base", torch.device("cpu"), **options)
    assert found.isfinite().all()


def test_pooling_and_search_need_no_float64(tiny_bert):
    packed = pack([[1] * n for n in LENGTHS], prompt_length=2)
    embedder = load_embedder(tiny_bert, device="cpu")
    pooling = Pooling(tuple(POOLINGS), 6)
    with WithoutFloat64():
        with_gradient(lambda x: pooling(x, packed), random_numbers(sum(LENGTHS), 6), device=torch.device("cpu"))
        evaluate(embedder, make_dataset(), passages=(6, 3))
        evaluate(embedder, make_dataset(), dim=8)
