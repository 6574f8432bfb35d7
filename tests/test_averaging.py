"""averaging.py: the moving average and the share of the base by hand; what is validated and kept; resuming."""

from dataclasses import replace

import pytest
import torch
from naming import naming
from ranks import run_ranks
from test_train import METRIC, assert_same, differ, interrupted_at, make_batches, weights_of
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, finetune, load_embedder
from embedft.losses.contrastive import in_batch_negatives
from embedft.training.averaging import KeptWeights
from embedft.training.checkpoint import TrainState
from embedft.training.merging import interpolate
from embedft.training.parts import without_gradient
from embedft.training.train import TrainConfig, train

CONFIG = TrainConfig(epochs=2, lr=1e-2, checkpoint_every=2, eval_every=3)  # 8 steps
AVERAGED = replace(CONFIG, ema=0.4, tuned_share=0.6)


def steps_of(config: TrainConfig, folder, *, embedder=None, **options):
    """(embedder, state, its weights before training and after each step)."""
    embedder = embedder or make_embedder(folder / "base", dtype=torch.float64)
    seen = [weights_of(embedder)]

    def keep(state, record):
        seen.append(weights_of(state.embedder))

    state = train(embedder, make_batches(embedder), in_batch_negatives, config, on_step=keep, **options)
    return embedder, state, seen


def averages(seen: list[dict], decay: float) -> list[dict]:
    """The moving average after each step; the first is that of the base."""
    found = [seen[0]]
    for step, weights in enumerate(seen[1:], start=1):
        now = min(decay, (1 + step) / (10 + step))
        found.append({name: now * found[-1][name] + (1 - now) * x for name, x in weights.items()})
    return found


def assert_close(first: dict, second: dict) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_the_average_by_hand(tmp_path, decay):
    """Decays 2/11, 3/12, ... up to the one asked for, which 0.2 reaches in the second step, and 0.999 never."""
    embedder, state, seen = steps_of(replace(CONFIG, ema=decay), tmp_path)
    assert len(seen) == 9
    expected = averages(seen, decay)[-1]
    assert_close(weights_of(embedder), expected)
    assert_close(state.average, {name: expected[name] for name in state.average})
    assert differ(seen[-1], expected)


def test_without_averages_nothing_is_copied(tmp_path, monkeypatch):
    """Which would be a second model in memory."""
    copies = []
    copy = KeptWeights._copy
    monkeypatch.setattr(KeptWeights, "_copy", lambda kept: copies.append(kept) or copy(kept))
    steps_of(CONFIG, tmp_path)
    assert not copies
    steps_of(replace(CONFIG, ema=0.4), tmp_path)
    assert copies


def test_one_step_by_hand(tmp_path):
    embedder, _, seen = steps_of(replace(CONFIG, epochs=1, accumulate=4, ema=0.999), tmp_path)
    base, tuned = seen
    assert_close(weights_of(embedder), {name: 2 / 11 * base[name] + 9 / 11 * tuned[name] for name in base})


def test_weights_in_bfloat16_have_an_average_in_float32(tmp_path):
    """A decay of 0.999 moves it by less than bfloat16 can hold."""
    embedder = make_embedder(tmp_path / "base", dtype=torch.bfloat16)
    state = TrainState(embedder, in_batch_negatives, torch.optim.SGD(embedder.parameters()))
    kept = KeptWeights(state, replace(CONFIG, ema=0.999))
    with torch.no_grad():
        for weight in embedder.parameters():
            weight.fill_(1.0)
    for average in state.average.values():
        average.fill_(0.5)
    state.step = 100_000
    for _ in range(100):
        kept.update()
    for name, average in state.average.items():
        torch.testing.assert_close(average, torch.full_like(average, 1 - 0.5 * 0.999**100), msg=name)
    kept.put()
    assert {weight.dtype for weight in embedder.parameters()} == {torch.bfloat16}


def test_the_share_by_hand(tmp_path):
    embedder, _, seen = steps_of(replace(CONFIG, tuned_share=0.7), tmp_path)
    assert_close(weights_of(embedder), {name: 0.3 * seen[0][name] + 0.7 * seen[-1][name] for name in seen[0]})
    whole, _, seen = steps_of(replace(CONFIG, tuned_share=1.0), tmp_path)
    assert_same(weights_of(whole), seen[-1])


def test_what_is_validated_is_kept_and_training_goes_on_without_it(tmp_path):
    validated = []

    def evaluate(embedder):
        validated.append(weights_of(embedder))
        return {METRIC: [0.1, 0.2, 0.9, 0.3][len(validated) - 1]}

    embedder, state, seen = steps_of(AVERAGED, tmp_path, evaluate=evaluate)
    _, _, plain = steps_of(CONFIG, tmp_path, evaluate=lambda embedder: {METRIC: 0.1})
    for ours, theirs in zip(seen, plain, strict=True):
        assert_same(ours, theirs)
    base, moving = seen[0], averages(seen, 0.4)
    for weights, step in zip(validated, (0, 3, 6, 8), strict=True):
        assert_close(weights, {name: 0.4 * base[name] + 0.6 * x for name, x in moving[step].items()})
    assert state.best_step == 6
    assert_same(weights_of(embedder), validated[2])


def test_an_error_in_the_validation_leaves_the_weights_of_training(tmp_path):
    embedder, seen = make_embedder(tmp_path / "base"), []
    options = {"evaluate": interrupted_at(2, lambda embedder: {METRIC: 0.1})}
    options["on_step"] = lambda state, record: seen.append(weights_of(state.embedder))
    with pytest.raises(KeyboardInterrupt):
        train(embedder, make_batches(embedder), in_batch_negatives, AVERAGED, **options)
    assert len(seen) == 3
    assert_same(weights_of(embedder), seen[-1])


@pytest.mark.parametrize("mini_batch_tokens", [None, 20])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_resumed_bit_for_bit(tmp_path, step, mini_batch_tokens):
    config = replace(AVERAGED, mini_batch_tokens=mini_batch_tokens)

    def run(name: str, loss=in_batch_negatives):
        embedder, out = make_embedder(tmp_path / "base"), tmp_path / name
        out.mkdir(exist_ok=True)
        values = {METRIC: 0.5}
        state = train(embedder, make_batches(embedder), loss, config, out=out, evaluate=lambda embedder: values)
        return weights_of(embedder), state

    weights, state = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", interrupted_at(step))
    resumed, again = run("cut")
    assert_same(resumed, weights)
    assert_same(again.average, state.average)


def test_the_best_weights_of_a_resumed_run(tmp_path):
    """Without validation, the last weights: the base of the share is the model's, not the checkpoint's."""

    def run(name: str, loss=in_batch_negatives):
        embedder = make_embedder(tmp_path / "base")
        (tmp_path / name).mkdir(exist_ok=True)
        train(embedder, make_batches(embedder), loss, AVERAGED, out=tmp_path / name)
        return weights_of(embedder)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", interrupted_at(6))
    assert_same(run("cut"), whole)


def test_frozen_parts_stay_and_are_not_averaged(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    frozen = {name for name, _ in embedder.named_parameters() if ".embeddings." in name}
    before = weights_of(embedder)
    with without_gradient(embedder, frozen):
        _, state, seen = steps_of(AVERAGED, tmp_path, embedder=embedder)
    assert frozen
    assert state.average.keys() == dict(embedder.named_parameters()).keys() - frozen
    assert_same({name: weights_of(embedder)[name] for name in frozen}, {name: before[name] for name in frozen})
    assert differ(before, seen[-1])


@pytest.mark.parametrize(("before", "now"), [(0.5, None), (None, 0.5)])
def test_a_checkpoint_with_an_average_and_one_without_are_not_exchanged(tmp_path, before, now):
    embedder = make_embedder(tmp_path / "base")
    train(embedder, make_batches(embedder), in_batch_negatives, replace(CONFIG, ema=before), out=tmp_path)
    has = "has" if before else "lacks"
    with pytest.raises(ValueError, match=naming(tmp_path / "checkpoints" / "step-000008", has, "ema")):
        train(embedder, make_batches(embedder), in_batch_negatives, replace(CONFIG, ema=now), out=tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "facts"),
    [("ema", 1.0, (1,)), ("ema", 0, (0,)), ("tuned_share", 0.0, (0,)), ("tuned_share", 1.5, (1,)), ("ema", "a", ())],
)
def test_settings(field, value, facts):
    with pytest.raises(ValueError, match=naming(field, value, *facts)):
        TrainConfig(**{field: value})


# In finetune.

SETTINGS = FinetuneConfig(epochs=2, batch_size=4, lr=1e-2)


def test_lora_is_interpolated_as_if_merged(tmp_path):
    config = replace(SETTINGS, lora={"rank": 2})
    found = {}
    for share in (None, 0.3):
        found[share] = make_embedder(tmp_path / "base", dtype=torch.float64)
        finetune(found[share], make_dataset(), replace(config, tuned_share=share))
    expected = interpolate(make_embedder(tmp_path / "base", dtype=torch.float64), found[None], 0.3)
    assert_close(weights_of(found[0.3]), weights_of(expected))
    assert differ(weights_of(found[0.3]), weights_of(found[None]))


def test_the_saved_model_has_the_weights_that_were_kept(tmp_path):
    config = replace(SETTINGS, ema=0.5, tuned_share=0.5)
    embedder = make_embedder(tmp_path / "base")
    finetune(embedder, make_dataset(), config, validation=make_dataset(seed=1), out=tmp_path / "run")
    assert_same(weights_of(load_embedder(tmp_path / "run" / "model", device="cpu")), weights_of(embedder))


def trained_on_ranks(folder) -> dict:
    embedder = make_embedder(folder, dropout=0.0, dtype=torch.float64)
    config = replace(SETTINGS, ema=0.5, tuned_share=0.5)
    finetune(embedder, make_dataset(), config, validation=make_dataset(seed=1))
    return weights_of(embedder)


def test_two_ranks_are_one(tmp_path):
    one = trained_on_ranks(tmp_path / "base")
    for rank in run_ranks(2, trained_on_ranks, tmp_path / "base", folder=tmp_path):
        torch.testing.assert_close(rank, one, rtol=0, atol=1e-9)
