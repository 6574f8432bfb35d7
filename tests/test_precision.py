"""precision.py: float16 with scaled gradients, skipped steps, and what checkpoints keep of them; bfloat16 autocast."""

import dataclasses
import math

import pytest
import torch
from naming import naming
from ranks import run_ranks
from test_train import assert_same, interrupted_at, make_batches, read_log, weights_of
from tiny import MEASURED, make_embedder

from embedft.losses.contrastive import in_batch_negatives
from embedft.training.precision import autocast
from embedft.training.train import NonFiniteError, TrainConfig, train

CONFIG = TrainConfig(epochs=2, lr=1e-3, checkpoint_every=2, precision="float16")


def run(base, out, config=CONFIG, loss=in_batch_negatives):
    """Trains in `out`, resuming what is there: weights, the state of the scaler, and the log without its seconds."""
    out.mkdir(exist_ok=True)
    embedder = make_embedder(base)
    state = train(embedder, make_batches(embedder), loss, config, out=out)
    log = [{key: value for key, value in record.items() if key not in MEASURED} for record in read_log(out)]
    return weights_of(embedder), state.scaler.state_dict(), log


@pytest.mark.parametrize(("precision", "mini_batch_tokens"), [("bfloat16", 20), ("float16", 20), ("float16", None)])
def test_lower_precision_learns_as_float32_does(tmp_path, precision, mini_batch_tokens):
    """Vectors are float32 where the loss gets them, weights stay float32, and losses are near those of float32."""
    dtypes = []

    def loss(Q, D, targets):
        dtypes.extend([Q.dtype, D.dtype, torch.is_autocast_enabled("cpu")])
        return in_batch_negatives(Q, D, targets)

    config = dataclasses.replace(CONFIG, epochs=1, precision=precision, mini_batch_tokens=mini_batch_tokens, lr=1e-4)
    make_embedder(tmp_path / "base", dropout=0.0)
    weights, _, log = run(tmp_path / "base", tmp_path / "lower", config, loss)
    assert set(dtypes) == {torch.float32, False}
    assert {x.dtype for x in weights.values()} == {torch.float32}
    _, _, exact = run(tmp_path / "base", tmp_path / "exact", dataclasses.replace(config, precision="float32"))
    assert [x["loss"] for x in log] == pytest.approx([x["loss"] for x in exact], abs=0.05)
    taken = [(x["grad_norm"], y["grad_norm"]) for x, y in zip(log, exact, strict=True) if not x.get("skipped")]
    assert len(taken) >= 2
    for norm, expected in taken:
        assert norm == pytest.approx(expected, rel=0.1)  # gradients are divided by the scale before they are clipped


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_products_are_in_that_precision(precision):
    with autocast(precision, torch.device("cpu"))():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is getattr(torch, precision)


def overflowing(calls: dict[int, float]):
    """A loss whose gradient is multiplied by calls[n] in the n-th call, its value staying as it is."""
    number = iter(range(1, 1000))

    def loss(Q, D, targets):
        value, factor = in_batch_negatives(Q, D, targets), calls.get(next(number), 1.0)
        value.register_hook(lambda gradient: gradient * factor)
        return value

    return loss


def test_a_step_whose_gradients_overflow_is_skipped(tmp_path):
    """By hand: the second and third of four steps; the scale is halved after each, and the record says so."""
    seen, embedder = [], make_embedder(tmp_path / "base")
    config = dataclasses.replace(CONFIG, epochs=1)
    (tmp_path / "out").mkdir()
    train(
        embedder,
        make_batches(embedder),
        overflowing({2: math.inf, 3: math.nan}),
        config,
        out=tmp_path / "out",
        on_step=lambda state, record: seen.append(weights_of(state.embedder)),
    )
    log = read_log(tmp_path / "out")
    skipped = [record["skipped"] for record in log]
    assert skipped[1:3] == [True, True]
    for i, record in enumerate(log):
        assert (record["grad_norm"] is None) == skipped[i]
        assert math.isfinite(record["loss"])
        assert record["scale"] == 65_536 / 2 ** sum(skipped[:i])
        if i:
            changed = any(not torch.equal(seen[i][name], x) for name, x in seen[i - 1].items())
            assert changed != skipped[i]


def test_gradients_that_no_scale_makes_finite_are_an_error(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    calls = dict.fromkeys(range(1, 100), math.nan)
    config = dataclasses.replace(CONFIG, epochs=9)
    with pytest.raises(NonFiniteError, match=naming("step", 17, "gradient", "nan")):  # at scales 2^16 to 2^0
        train(embedder, make_batches(embedder), overflowing(calls), config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_a_scale_no_step_is_skipped(tmp_path, precision):
    embedder = make_embedder(tmp_path / "base")
    config = dataclasses.replace(CONFIG, precision=precision)
    with pytest.raises(NonFiniteError, match=naming("step", 2, "gradient")):
        train(embedder, make_batches(embedder), overflowing({2: math.inf}), config)


def test_a_loss_that_is_not_finite_is_an_error_at_any_scale(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(NonFiniteError, match=naming("step", 1, "loss", "nan")):
        train(embedder, make_batches(embedder), lambda *x: in_batch_negatives(*x) * math.nan, CONFIG)


def test_the_scale_resumes_bit_for_bit(tmp_path):
    """Interrupted in the sixth step, behind a checkpoint that skipped a step of the first epoch."""
    uninterrupted = run(tmp_path / "base", tmp_path / "one", loss=overflowing({2: math.inf}))
    assert uninterrupted[1]["scale"] < 65_536
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "base", tmp_path / "two", loss=interrupted_at(6, overflowing({2: math.inf})))
    resumed = run(tmp_path / "base", tmp_path / "two", loss=overflowing({}))
    assert resumed[1:] == uninterrupted[1:]
    assert_same(resumed[0], uninterrupted[0])


def test_a_checkpoint_of_another_precision_is_refused(tmp_path):
    run(tmp_path / "base", tmp_path / "run")
    with pytest.raises(ValueError, match=naming(tmp_path / "run" / "checkpoints", "scaler", "precision")):
        run(tmp_path / "base", tmp_path / "run", dataclasses.replace(CONFIG, precision="float32"))


def test_on_the_cpu_determinism_changes_nothing(tmp_path):
    """There, the same seed gives the same bits anyway."""
    weights, logs = [], []
    for deterministic in (False, True):
        config = dataclasses.replace(CONFIG, precision="float32", deterministic=deterministic)
        found = run(tmp_path / "base", tmp_path / str(deterministic), config)
        weights.append(found[0])
        logs.append(found[2])
    assert_same(*weights)
    assert logs[0] == logs[1]


def test_two_ranks_skip_the_same_steps(tmp_path):
    """Without dropout, as it differs between ranks; each has half of the gradient that overflows."""
    make_embedder(tmp_path / "base", dropout=0.0)
    one = run(tmp_path / "base", tmp_path / "one", loss=overflowing({2: math.inf}))
    first, second = run_ranks(2, on_a_rank, tmp_path / "base", tmp_path / "two", folder=tmp_path)
    assert_same(first[0], second[0])
    assert first[1] == second[1] == one[1]
    assert [x["skipped"] for x in first[2]] == [x["skipped"] for x in one[2]]
    assert [x["loss"] for x in first[2]] == pytest.approx([x["loss"] for x in one[2]], abs=0.02)


def on_a_rank(base, out):
    return run(base, out, loss=overflowing({2: math.inf}))
