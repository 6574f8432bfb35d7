"""train.py: against a plain loop; same seed, same bits; resumed = uninterrupted; best weights; divergence."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from naming import names, naming
from tiny import MEASURED, make_dataset, make_embedder
from torch import nn

from embedft import build_loss
from embedft.data.batches import Batches
from embedft.data.batches import make_batches as batches_of
from embedft.losses import components
from embedft.losses.contrastive import in_batch_negatives
from embedft.training import train as train_module
from embedft.training.train import NonFiniteError, TrainConfig, train

CONFIG = TrainConfig(epochs=2, lr=1e-3, warmup=0.2, weight_decay=0.1, checkpoint_every=2, eval_every=3)
METRIC = "ndcg@10"


def make_batches(embedder, seed: int = 0, num_negatives: int = 0) -> Batches:
    """4 batches per epoch, of 3, 3, 3 and 2 pairs."""
    dataset = make_dataset(11, 9, negatives=num_negatives)
    return batches_of(dataset, embedder.pack, batch_size=3, seed=seed, num_negatives=num_negatives)


def weights_of(embedder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in embedder.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def differ(first: dict, second: dict) -> bool:
    return any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def scripted(values):
    """An `evaluate` that gives the values one after the other and keeps the weights it saw."""
    left, seen = iter(values), []

    def evaluate(embedder):
        assert not embedder.training
        seen.append(weights_of(embedder))
        return {METRIC: next(left), "mrr@10": 0.5}

    evaluate.seen = seen
    return evaluate


def interrupted_at(step: int, function=in_batch_negatives):
    """A loss, or whatever else is called once a step, that is interrupted in its `step`-th call."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments):
        if next(calls) == step:
            raise KeyboardInterrupt
        return function(*arguments)

    return wrapped


# Against a plain loop.


@pytest.mark.parametrize(("accumulate", "num_steps", "num_warmup"), [(1, 8, 2), (2, 4, 1), (3, 4, 1), (9, 2, 1)])
def test_equals_a_plain_loop(tmp_path, accumulate, num_steps, num_warmup):
    """In float64, no dropout: a text at a time, the loss by its formula, AdamW unfused, the schedule written out.

    Of 4 batches per epoch, three at a time leave one alone; warmup is 20% of the steps, rounded up.
    """
    embedder = make_embedder(tmp_path / "base", dropout=0.0, dtype=torch.float64)
    batches = make_batches(embedder, num_negatives=1)
    train(embedder, batches, in_batch_negatives, dataclasses.replace(CONFIG, accumulate=accumulate), out=tmp_path)
    ours = read_log(tmp_path)

    plain = make_embedder(tmp_path / "base", dtype=torch.float64)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    kept = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}])
    step = 0
    for epoch in range(2):
        order = list(batches.epoch(epoch))
        for parts in (order[i : i + accumulate] for i in range(0, 4, accumulate)):
            lr = 1e-3 * (step / num_warmup if step < num_warmup else (num_steps - step) / (num_steps - num_warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            means = []
            for batch in parts:
                queries = [batches.collate.dataset.queries[query_id] for query_id in batch.query_ids]
                documents = [batches.collate.dataset.corpus[document_id] for document_id in batch.document_ids]
                Q, D = (
                    torch.cat([plain.embed(plain.pack([text], role=role), role=role) for text in texts])
                    for role, texts in (("query", queries), ("document", documents))
                )
                losses = []
                for i, (query_id, (positive, _)) in enumerate(
                    zip(batch.query_ids, batch.targets.group.tolist(), strict=True)
                ):
                    relevant = batches.collate.dataset.qrels[query_id]
                    columns = [j for j, d in enumerate(batch.document_ids) if j == positive or d not in relevant]
                    losses.append(F.cross_entropy(Q[i] @ D[columns].T / 0.05, torch.tensor(columns.index(positive))))
                means.append(torch.stack(losses).mean())
            loss = torch.stack(means).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.square().sum() for p in plain.parameters()]).sum().sqrt()
            for parameter in plain.parameters():
                parameter.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
            optimizer.step()
            record = ours[step]
            step += 1
            assert (record["step"], record["epoch"]) == (step, epoch)
            assert record["lr"] == pytest.approx(lr, rel=1e-12)
            assert record["loss"] == pytest.approx(loss.item(), rel=1e-9)
            assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
            assert record["queries"] == sum(len(batch.query_ids) for batch in parts)
            assert record["tokens"] == sum(
                len(t.input_ids) for batch in parts for t in (batch.queries, batch.documents)
            )
    assert step == len(ours) == num_steps
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(embedder.get_parameter(name), parameter, rtol=0, atol=1e-9)


def test_the_log_says_what_every_step_did(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    batches = make_batches(embedder)
    state = train(embedder, batches, in_batch_negatives, CONFIG, out=tmp_path, evaluate=scripted([0.1, 0.3, 0.2, 0.4]))
    log = read_log(tmp_path)
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in log] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    assert [record["epoch"] for record in steps] == [0] * 4 + [1] * 4
    assert [record["queries"] for record in steps] == [3, 3, 3, 2] * 2
    for record, batch in zip(steps, [*batches.epoch(0), *batches.epoch(1)], strict=True):
        assert record["tokens"] == len(batch.queries.input_ids) + len(batch.documents.input_ids)
        of_the_step = {"step", "epoch", "loss", "lr", "grad_norm", "queries", "tokens"}
        assert record.keys() == of_the_step | set(MEASURED) - {"refresh_seconds"}
        assert 32 << 20 < record["peak_bytes"] < 1 << 40
    evaluations = [(record["step"], record["metrics"]) for record in log if "metrics" in record]
    assert evaluations == state.evaluations
    assert [(step, metrics[METRIC]) for step, metrics in evaluations] == [(0, 0.1), (3, 0.3), (6, 0.2), (8, 0.4)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns(tmp_path, precision):
    """A few pairs, again and again: the loss falls to a tenth."""
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    batches = batches_of(make_dataset(6, 6), embedder.pack, batch_size=6, seed=0)
    train(embedder, batches, in_batch_negatives, TrainConfig(epochs=30, lr=3e-3, precision=precision), out=tmp_path)
    losses = [record["loss"] for record in read_log(tmp_path)]
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.dtype is torch.float32 for parameter in embedder.parameters())


def test_bfloat16_is_of_the_encoder_alone(tmp_path):
    """It changes the vectors slightly; the loss gets them in float32, outside autocast."""
    seen = []

    def loss(Q, D, targets):
        assert not torch.is_autocast_enabled("cpu")
        seen.append((Q.detach(), D.detach()))
        return in_batch_negatives(Q, D, targets)

    for precision in ("float32", "bfloat16"):
        embedder = make_embedder(tmp_path / "base", dropout=0.0)
        config = TrainConfig(epochs=1, precision=precision)
        train(embedder, batches_of(make_dataset(), embedder.pack, batch_size=12, seed=0), loss, config)
    for exact, rounded in zip(*seen, strict=True):
        assert exact.dtype is rounded.dtype is torch.float32
        assert 1e-5 < (exact - rounded).abs().max() < 0.05


def test_frozen_parameters_stay(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    embedder.encoder.embeddings.requires_grad_(False)
    before = weights_of(embedder)
    train(embedder, make_batches(embedder), in_batch_negatives, CONFIG)
    for name, parameter in embedder.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder.embeddings."), name


def test_leaves_the_embedder_ready_for_inference(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    train(embedder, make_batches(embedder), in_batch_negatives, CONFIG)
    assert not embedder.training
    assert all(parameter.grad is None for parameter in embedder.parameters())


# Same seed, same bits.


@pytest.mark.parametrize("num_threads", [1, 2])
def test_same_seed_same_bits(tmp_path, num_threads, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(num_threads)

    def run(seed: int, name: str) -> tuple[dict, list]:
        embedder = make_embedder(tmp_path / "base")  # dropout 0.1
        (tmp_path / name).mkdir()
        config = dataclasses.replace(CONFIG, seed=seed, epochs=1)
        train(embedder, make_batches(embedder), in_batch_negatives, config, out=tmp_path / name)
        return weights_of(embedder), [(record["loss"], record["grad_norm"]) for record in read_log(tmp_path / name)]

    first, first_log = run(0, "first")
    torch.rand(3)  # what the caller draws in between is no matter
    second, second_log = run(0, "second")
    assert_same(first, second)
    assert first_log == second_log
    assert differ(first, run(1, "other")[0])  # the seed is dropout's too: the order is that of make_batches


def test_the_callers_random_state_is_left_as_it_was(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    before = torch.get_rng_state()
    train(embedder, make_batches(embedder), in_batch_negatives, CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyboardInterrupt):
        train(embedder, make_batches(embedder), interrupted_at(3), CONFIG)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_a_training_that_was_stopped_are_forgotten(tmp_path):
    """Stopped between its gradients and its step, and begun again in the same process."""
    results = []
    for stale in (None, math.nan):
        embedder = make_embedder(tmp_path / "base")
        for parameter in embedder.parameters():
            parameter.grad = None if stale is None else torch.full_like(parameter, stale)
        train(embedder, make_batches(embedder), in_batch_negatives, CONFIG)
        results.append(weights_of(embedder))
    assert_same(*results)


# Resumed = uninterrupted, bit for bit, with dropout and the log too.


TABLE = "encoder.embeddings.token.weight"


@functools.cache
def table_after_six_steps() -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        embedder, evaluate = make_embedder(Path(folder) / "base"), scripted([0.1] * 4)
        train(embedder, make_batches(embedder), in_batch_negatives, CONFIG, evaluate=evaluate)
    return evaluate.seen[2][TABLE]


def nearness(embedder) -> dict[str, float]:
    """A metric of the weights alone, at its best after six steps."""
    return {METRIC: -(embedder.get_parameter(TABLE) - table_after_six_steps()).norm().item()}


def run(tmp_path, name: str, *, loss=in_batch_negatives, evaluate=nearness):
    """Trains in tmp_path/name, resuming what is there. Returns weights, state, and the log without its seconds."""
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    embedder = make_embedder(tmp_path / "base")
    state = train(embedder, make_batches(embedder), loss, CONFIG, out=out, evaluate=evaluate)
    return weights_of(embedder), state, [{**record, **dict.fromkeys(MEASURED)} for record in read_log(out)]


def assert_resumes_to(tmp_path, uninterrupted) -> None:
    """Resumes tmp_path/run, at first with half a line in its log, cut in the middle of a character."""
    with open(tmp_path / "run" / "train.jsonl", "ab") as file:
        file.write('{"step": 9, "error": "é'.encode()[:-1])
    torch.rand(5)
    weights, state, log = run(tmp_path, "run")
    assert state == uninterrupted[1]
    assert log == uninterrupted[2]
    assert_same(weights, uninterrupted[0])


@pytest.fixture
def uninterrupted(tmp_path):
    weights, state, log = run(tmp_path, "uninterrupted")
    assert [step for step, _ in state.evaluations] == [0, 3, 6, 8]
    assert state.best_step == 6  # so the best weights must outlive the interruption
    assert [record["step"] for record in log] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    return weights, state, log


@pytest.mark.parametrize("step", range(1, 9))
def test_resumed_after_an_interruption_in_the_loss(tmp_path, uninterrupted, step):
    """Checkpoints are after steps 2, 4, 6 and 8: before the first there is nothing to go on from but the beginning."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "run", loss=interrupted_at(step))
    assert_resumes_to(tmp_path, uninterrupted)


@pytest.mark.parametrize("evaluation", range(1, 5))
def test_resumed_after_an_interruption_in_an_evaluation(tmp_path, uninterrupted, evaluation):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "run", evaluate=interrupted_at(evaluation, nearness))
    (tmp_path / "run" / "train.jsonl").touch()  # interrupted in the first, it has none yet
    assert_resumes_to(tmp_path, uninterrupted)


def test_resumed_twice_and_when_all_is_done(tmp_path, uninterrupted):
    for step in (5, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "run", loss=interrupted_at(step))
    assert_resumes_to(tmp_path, uninterrupted)
    assert_resumes_to(tmp_path, uninterrupted)


def test_resumed_after_sigkill(tmp_path, uninterrupted):
    """Another process, killed in its sixth step without a chance to tidy up."""
    script = """
        import os, signal, sys, test_train
        from pathlib import Path
        calls = []
        def loss(*arguments):
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return test_train.in_batch_negatives(*arguments)
        test_train.run(Path(sys.argv[1]), "run", loss=loss)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step-000004"
    assert_resumes_to(tmp_path, uninterrupted)


def test_the_bar_of_a_resumed_run_begins_where_the_run_was(tmp_path, monkeypatch):
    table_after_six_steps()  # which trains too, once
    bars = []
    show = train_module.progress_bar
    monkeypatch.setattr(
        train_module, "progress_bar", lambda *a, **k: bars.append(show(*a, **{**k, "show": True})) or bars[-1]
    )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "run", loss=interrupted_at(6))
    run(tmp_path, "run")
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 5, 8), (4, 8, 8)]
    assert "loss=" in bars[1].postfix


# Batches rebuilt by a refresh.


REFRESHED = dataclasses.replace(CONFIG, epochs=3)


def by_weights(seen: list | None = None):
    """Batches in an order that follows from the weights, to their last bit, and from torch's random numbers."""

    def refresh(model):
        assert not model.training
        if seen is not None:
            seen.append(weights_of(model))
        norm = model.get_parameter(TABLE).double().norm().item()
        return make_batches(model, seed=int(norm * 1e12 + 1e6 * torch.rand(()).item()) % 2**31)

    return refresh


def run_refreshed(tmp_path, name: str, *, loss=in_batch_negatives, config=REFRESHED, refresh=None, **options):
    """As `run`, with a refresh."""
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    embedder = make_embedder(tmp_path / "base")
    options |= {"evaluate": nearness, "refresh": refresh or by_weights()}
    state = train(embedder, make_batches(embedder), loss, config, out=out, **options)
    seconds = dict.fromkeys(MEASURED)
    log = [{k: seconds.get(k, v) for k, v in record.items()} for record in read_log(out)]
    return weights_of(embedder), state, log


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2]), (2, [2])])
def test_a_refresh_sees_the_model_at_the_beginning_of_an_epoch(tmp_path, every, epochs):
    """Of every epoch but the first, or every second one."""
    seen, at_epochs = [], []

    def keep(embedder):
        at_epochs.append(weights_of(embedder))
        return {METRIC: 0.0}

    embedder = make_embedder(tmp_path / "base")
    options = {"refresh": by_weights(seen), "refresh_every": every, "evaluate": keep}
    train(embedder, make_batches(embedder), in_batch_negatives, dataclasses.replace(REFRESHED, eval_every=4), **options)
    assert len(seen) == len(epochs)
    for epoch, weights in zip(epochs, seen, strict=True):
        assert_same(weights, at_epochs[epoch])


@pytest.mark.parametrize("every", [1, 2])
def test_the_batches_of_a_refresh_are_trained_on(tmp_path, every):
    embedder, calls = make_embedder(tmp_path / "base"), []

    def refresh(model):
        calls.append(1)
        return batches_of(make_dataset(11, 9, seed=7), model.pack, batch_size=3, seed=len(calls))

    config = dataclasses.replace(REFRESHED, epochs=4)
    options = {"refresh": refresh, "refresh_every": every}
    train(embedder, make_batches(embedder), in_batch_negatives, config, out=tmp_path, **options)
    expected = []
    for epoch, seed in enumerate([0, 1, 2, 3] if every == 1 else [0, 0, 1, 1]):
        other = batches_of(make_dataset(11, 9, seed=7), embedder.pack, batch_size=3, seed=seed)
        expected += (other if seed else make_batches(embedder)).epoch(epoch)
    log = read_log(tmp_path)
    assert [x["tokens"] for x in log] == [len(b.queries.input_ids) + len(b.documents.input_ids) for b in expected]
    assert [x["step"] for x in log if "refresh_seconds" in x] == ([5, 9, 13] if every == 1 else [9])


@pytest.mark.parametrize(("accumulate", "checkpoint_every", "every"), [(1, 3, 1), (3, 1, 1), (1, 3, 2)])
def test_resumed_with_a_refresh(tmp_path, accumulate, checkpoint_every, every):
    """Interrupted in the first epoch, at the beginning of a later one, and within it."""
    config = dataclasses.replace(REFRESHED, epochs=4, accumulate=accumulate, checkpoint_every=checkpoint_every)
    options = {"config": config, "refresh_every": every}
    whole = run_refreshed(tmp_path, "whole", **options)
    assert len({x["tokens"] for x in whole[2] if "tokens" in x}) > 2
    for batch in (2, 5, 7, 9, 12, 15):
        with pytest.raises(KeyboardInterrupt):
            run_refreshed(tmp_path, f"cut{batch}", loss=interrupted_at(batch), **options)
        resumed = run_refreshed(tmp_path, f"cut{batch}", **options)
        assert resumed[1:] == whole[1:]
        assert_same(resumed[0], whole[0])


def test_within_an_epoch_a_refresh_sees_its_beginning_again(tmp_path):
    """Interrupted in the seventh batch, with a checkpoint after the sixth."""
    before, after = [], []
    with pytest.raises(KeyboardInterrupt):
        run_refreshed(tmp_path, "run", loss=interrupted_at(7), refresh=by_weights(before))
    _, state, _ = run_refreshed(tmp_path, "run", refresh=by_weights(after))
    assert (len(before), len(after)) == (1, 2)  # at step 4; at step 4 again, and at step 8
    assert_same(after[0], before[0])
    assert state.step == 12


def test_resumed_after_an_interruption_in_a_refresh(tmp_path):
    whole = run_refreshed(tmp_path, "whole")
    for call in (1, 2):
        name = f"cut{call}"
        with pytest.raises(KeyboardInterrupt):
            run_refreshed(tmp_path, name, refresh=interrupted_at(call, by_weights()))
        resumed = run_refreshed(tmp_path, name)
        assert resumed[1:] == whole[1:]
        assert_same(resumed[0], whole[0])


def test_a_refresh_needs_a_checkpoint_of_a_run_with_one(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(KeyboardInterrupt):
        train(embedder, make_batches(embedder), interrupted_at(7), REFRESHED, out=tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "step", 6, "refresh", "with")):
        train(embedder, make_batches(embedder), in_batch_negatives, REFRESHED, out=tmp_path, refresh=by_weights())


def test_a_refreshed_run_does_not_resume_without_a_refresh(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(KeyboardInterrupt):
        train(embedder, make_batches(embedder), interrupted_at(7), REFRESHED, out=tmp_path, refresh=by_weights())
    with pytest.raises(ValueError, match=naming(tmp_path, "step", 6, "refresh", "without")):
        train(embedder, make_batches(embedder), in_batch_negatives, REFRESHED, out=tmp_path)


def test_a_refresh_with_another_number_of_batches(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    more = batches_of(make_dataset(13, 9), embedder.pack, batch_size=3, seed=0)
    with pytest.raises(ValueError, match=naming("refresh", "batches", 5, 4)):
        train(embedder, make_batches(embedder), in_batch_negatives, REFRESHED, refresh=lambda model: more)


# Objects in place of settings: an optimizer, what happens after a step, components of the loss.


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1)


def test_an_optimizer_of_ones_own(tmp_path):
    """SGD with momentum by hand: v = 0.9 v + g + 0.1 w, w -= lr v; the schedule scales its learning rate."""
    embedder, plain = (make_embedder(tmp_path / "base", dropout=0.0, dtype=torch.float64) for _ in range(2))
    config = TrainConfig(epochs=1, warmup=2, max_grad_norm=1e6)
    batches = make_batches(embedder)
    train(embedder, batches, in_batch_negatives, config, out=tmp_path, optimizer=sgd)
    assert [record["lr"] for record in read_log(tmp_path)] == pytest.approx([0.0, 0.25, 0.5, 0.25])
    velocity = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for batch, lr in zip(batches.epoch(0), [0.0, 0.25, 0.5, 0.25], strict=True):
        plain.zero_grad()
        in_batch_negatives(*plain.embed_pair(batch.queries, batch.documents), batch.targets).backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                if p.grad is not None:
                    velocity[name] = 0.9 * velocity[name] + gradient + (0.1 * p if p.ndim > 1 else 0)
                    p -= lr * velocity[name]
    for name, p in plain.named_parameters():
        torch.testing.assert_close(embedder.get_parameter(name), p, rtol=0, atol=1e-9)


class Counting(torch.optim.SGD):
    """An optimizer with a number in its state and in its groups that every step depends on."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["factor"] = group.get("factor", 1.0) * 0.9
            for p in group["params"]:
                if p.grad is not None:
                    count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    p.data -= group["lr"] * group["factor"] * p.grad / count


@pytest.mark.parametrize("optimizer", [sgd, lambda groups: Counting(groups, lr=0.5)])
def test_resumed_with_an_optimizer_of_ones_own(tmp_path, optimizer):
    def run(name, loss=in_batch_negatives):
        embedder = make_embedder(tmp_path / "base")
        (tmp_path / name).mkdir(exist_ok=True)
        module = Affine()
        module.forward = lambda Q, D, targets: loss(Q, D, targets) + 0.1 * module.offset.sum()
        config = dataclasses.replace(CONFIG, lr=5e-5, weight_decay=0.0)
        train(embedder, make_batches(embedder), module, config, out=tmp_path / name, optimizer=optimizer)
        return {**weights_of(embedder), "loss": module.offset.detach()}

    with pytest.raises(KeyboardInterrupt):
        run("cut", interrupted_at(6))
    assert_same(run("cut"), run("whole"))


def test_settings_that_an_optimizer_replaces(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    for field in ("lr", "loss_lr", "weight_decay"):
        config = TrainConfig(**{field: 0.125})
        with pytest.raises(ValueError, match=naming(field, 0.125, "optimizer")):
            train(embedder, make_batches(embedder), in_batch_negatives, config, optimizer=sgd)
    with pytest.raises(ValueError, match=naming("optimizer", "list", "torch.optim.Optimizer")):
        train(embedder, make_batches(embedder), in_batch_negatives, TrainConfig(), optimizer=list)


def test_on_step_sees_every_step_and_may_stop(tmp_path):
    """Stopped after step 6, which is validated and saved as the last; a resumed run stays stopped."""
    embedder, seen = make_embedder(tmp_path / "base"), []

    def on_step(state, record):
        seen.append(record)
        assert state.step == record["step"]
        assert state.embedder is embedder
        return "stop" if state.step == 6 else None

    options = {"out": tmp_path, "evaluate": lambda _: {METRIC: 0.5}, "on_step": on_step}
    state = train(embedder, make_batches(embedder), in_batch_negatives, TrainConfig(epochs=2), **options)
    assert (state.step, state.stopped) == (6, True)
    assert [step for step, _ in state.evaluations] == [0, 4, 6]
    assert seen == [record for record in read_log(tmp_path) if "loss" in record]
    again = train(embedder, make_batches(embedder), in_batch_negatives, TrainConfig(epochs=2), **options)
    assert again == state
    assert len(seen) == 6


@pytest.mark.parametrize(("accumulate", "mini_batch_tokens"), [(1, None), (3, None), (1, 20)])
def test_components_of_the_loss_are_logged(tmp_path, accumulate, mini_batch_tokens):
    """The mean over the batches of a step."""

    def loss(Q, D, targets):
        value = in_batch_negatives(Q, D, targets)
        with components.scope("part"):
            components.record("value", value)
        components.record("queries", float(len(Q)))
        return 2 * value

    embedder = make_embedder(tmp_path / "base")
    config = TrainConfig(epochs=1, accumulate=accumulate, mini_batch_tokens=mini_batch_tokens)
    train(embedder, make_batches(embedder), loss, config, out=tmp_path)
    log = read_log(tmp_path)
    for line in log:
        assert line["components"]["part/value"] == pytest.approx(line["loss"] / 2, rel=1e-6)
    means = [3, 3, 3, 2] if accumulate == 1 else [3, 2]
    assert [line["components"]["queries"] for line in log] == pytest.approx(means)


# A loss that is a module.


class Affine(nn.Module):
    """In-batch negatives + slope * offset, where `offset` is learned: its gradient is `slope`."""

    def __init__(self, slope: float = 0.5):
        super().__init__()
        self.slope = slope
        self.offset = nn.Parameter(torch.tensor([[2.0]]))  # as many dimensions as a matrix, which would be decayed
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, Q, D, targets):
        self.num_calls += 1
        return in_batch_negatives(Q, D, targets) + self.slope * self.offset.squeeze()


class LearnedTemperature(nn.Module):
    """In-batch negatives with a factor on the scores that is learned, and noise that is drawn."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, Q, D, targets):
        noise = 1 + 0.1 * torch.rand(())
        return in_batch_negatives(Q * self.log_scale.exp() * noise, D, targets, temperature=1.0, similarity="dot")


@pytest.mark.parametrize("loss_lr", [None, 0.25])
def test_the_parameters_of_a_loss_are_trained(tmp_path, loss_lr):
    """AdamW's first step is lr * g / (|g| + eps), so nearly lr, here at its highest; without weight decay."""
    embedder, loss = make_embedder(tmp_path / "base", dropout=0.0), Affine().eval()
    config = TrainConfig(epochs=1, lr=1e-3, loss_lr=loss_lr, schedule="constant", weight_decay=0.5)
    train(embedder, batches_of(make_dataset(), embedder.pack, batch_size=12, seed=0), loss, config)
    assert loss.offset.item() == pytest.approx(2.0 - (loss_lr or 1e-3), rel=1e-6)
    assert loss.num_calls.item() == 1
    assert loss.training


def test_both_learning_rates_follow_the_schedule(tmp_path):
    """Equal gradients make every AdamW step lr long: over 8 steps 0, 1/2, then 6/6 ... 1/6 of the highest."""
    embedder, loss = make_embedder(tmp_path / "base"), Affine(slope=1e-3)
    config = dataclasses.replace(CONFIG, loss_lr=0.1, max_grad_norm=1e6)
    train(embedder, make_batches(embedder), loss, config, out=tmp_path)
    total = 0.5 + (6 + 5 + 4 + 3 + 2 + 1) / 6
    assert loss.offset.item() == pytest.approx(2.0 - 0.1 * total, rel=1e-4)
    assert [record["lr"] for record in read_log(tmp_path)][:3] == pytest.approx([0, 5e-4, 1e-3])


def test_clipping_is_over_all_parameters(tmp_path):
    """Only the loss's own parameter has a gradient, of 30."""
    embedder, loss = make_embedder(tmp_path / "base"), Affine(slope=30.0)
    loss.forward = lambda Q, D, targets: loss.slope * loss.offset.squeeze() + 0 * Q.sum()
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, most):
        norm = clip(parameters, most)
        norms.append((norm.item(), loss.offset.grad.item()))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        train(embedder, make_batches(embedder), loss, dataclasses.replace(CONFIG, max_grad_norm=3.0), out=tmp_path)
    assert norms == [(pytest.approx(30.0), pytest.approx(3.0, rel=1e-4))] * 8
    assert [record["grad_norm"] for record in read_log(tmp_path)] == pytest.approx([30.0] * 8)


def test_frozen_parameters_of_a_loss_stay(tmp_path):
    embedder, loss = make_embedder(tmp_path / "base"), Affine()
    loss.offset.requires_grad_(False)
    train(embedder, make_batches(embedder), loss, CONFIG)
    assert loss.offset.item() == 2.0


def test_a_gradient_of_the_loss_that_is_not_finite_stops(tmp_path):
    embedder, loss = make_embedder(tmp_path / "base"), Affine(slope=math.inf)
    loss.forward = lambda Q, D, targets: 0 * Q.sum() + (loss.offset - loss.offset.detach()).abs().sqrt().sum()
    with pytest.raises(NonFiniteError, match=naming("step", 1, "gradient", "nan")):
        train(embedder, make_batches(embedder), loss, CONFIG)
    assert loss.offset.item() == 2.0


SAMPLED = {"name": "matryoshka", "dims": [32, 8, 4], "inner": {"name": "in_batch_negatives"}, "dims_per_step": 1}


@pytest.mark.parametrize(("mini_batch_tokens", "accumulate"), [(None, 1), (20, 1), (20, 3), (None, 3)])
@pytest.mark.parametrize("make_loss", [LearnedTemperature, Affine, functools.partial(build_loss, SAMPLED)])
def test_a_module_is_resumed_bit_for_bit(tmp_path, make_loss, mini_batch_tokens, accumulate):
    """Its parameters, its buffers and its moments, dropout's draws and its own, interrupted in a batch."""

    def run(name: str, step: int = 0) -> tuple[dict, dict, list]:
        embedder, loss = make_embedder(tmp_path / "base"), make_loss()
        config = dataclasses.replace(
            CONFIG,
            loss_lr=0.1,
            mini_batch_tokens=mini_batch_tokens,
            accumulate=accumulate,
            checkpoint_every=1 if accumulate == 3 else 2,
        )
        (tmp_path / name).mkdir(exist_ok=True)
        loss.register_forward_pre_hook(interrupted_at(step, lambda module, arguments: None))
        train(embedder, make_batches(embedder), loss, config, out=tmp_path / name)
        log = [{**record, **dict.fromkeys(MEASURED)} for record in read_log(tmp_path / name)]
        return weights_of(embedder), dict(loss.state_dict()), log

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", 6 if accumulate == 1 else 4)
    # After the first epoch, or inside of it: the fourth batch is a step alone.
    kept = "step-000004" if accumulate == 1 else "step-000001"
    assert max(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()) == kept
    resumed = run("cut")
    assert_same(resumed[0], whole[0])
    assert_same(resumed[1], whole[1])
    assert resumed[2] == whole[2]
    if make_loss is LearnedTemperature:
        assert whole[1]["log_scale"] != 3.0


# In mini-batches: gradient caching.


@pytest.mark.parametrize("tokens", [1, 30, 60])
def test_mini_batches_change_nothing_but_the_memory(tmp_path, tokens):
    """In float64 without dropout: the log and the weights of the step that takes the whole batch."""
    results = []
    for name, mini_batch_tokens in (("whole", None), ("parts", tokens)):
        embedder = make_embedder(tmp_path / "base", dropout=0.0, dtype=torch.float64)
        (tmp_path / name).mkdir()
        config = dataclasses.replace(CONFIG, mini_batch_tokens=mini_batch_tokens)
        batches = make_batches(embedder, num_negatives=1)
        train(embedder, batches, in_batch_negatives, config, out=tmp_path / name)
        results.append((weights_of(embedder), read_log(tmp_path / name)))
    (weights, log), (parts_weights, parts_log) = results
    for name, tensor in weights.items():
        torch.testing.assert_close(parts_weights[name], tensor, rtol=0, atol=1e-9)
    for record, parts_record in zip(log, parts_log, strict=True):
        assert record.keys() == parts_record.keys()
        for key in record.keys() - set(MEASURED):
            assert parts_record[key] == pytest.approx(record[key], rel=1e-9), key


def test_a_batch_that_fits_is_taken_at_once(tmp_path, monkeypatch):
    """To the bit as without the setting; only larger ones pay for a second forward pass."""
    cut = []
    backward = train_module.cached_backward
    monkeypatch.setattr(train_module, "cached_backward", lambda *a, **k: cut.append(a[1:3]) or backward(*a, **k))
    embedder, other = make_embedder(tmp_path / "base"), make_embedder(tmp_path / "base")
    batches = make_batches(embedder)
    sizes = sorted(len(b.queries.input_ids) + len(b.documents.input_ids) for e in (0, 1) for b in batches.epoch(e))
    config = dataclasses.replace(CONFIG, mini_batch_tokens=sizes[-1])
    train(embedder, batches, in_batch_negatives, config)
    assert not cut
    train(other, batches, in_batch_negatives, CONFIG)
    assert_same(weights_of(embedder), weights_of(other))
    train(embedder, batches, in_batch_negatives, dataclasses.replace(config, mini_batch_tokens=sizes[-1] - 1))
    assert len(cut) == sizes.count(sizes[-1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_mini_batches_are_embedded_in_the_precision_asked_for(tmp_path, monkeypatch, precision):
    embedder, seen = make_embedder(tmp_path / "base"), set()
    embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda *a, **k: seen.add(torch.is_autocast_enabled("cpu")) or embed(*a, **k))
    config = dataclasses.replace(CONFIG, precision=precision, mini_batch_tokens=20)
    train(embedder, make_batches(embedder), in_batch_negatives, config)
    assert seen == {precision == "bfloat16"}


def test_a_frozen_embedder_under_a_loss_that_learns(tmp_path):
    """In mini-batches as at once: the temperature moves, the weights do not."""
    values = []
    for mini_batch_tokens in (None, 20):
        embedder, loss = make_embedder(tmp_path / "base").requires_grad_(False), LearnedTemperature()
        before = weights_of(embedder)
        train(embedder, make_batches(embedder), loss, dataclasses.replace(CONFIG, mini_batch_tokens=mini_batch_tokens))
        assert_same(weights_of(embedder), before)
        values.append(loss.log_scale.item())
    assert values[0] != 3.0
    assert values[1] == pytest.approx(values[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns_in_mini_batches(tmp_path, precision):
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    batches = batches_of(make_dataset(6, 6), embedder.pack, batch_size=6, seed=0)
    config = TrainConfig(epochs=30, lr=3e-3, precision=precision, mini_batch_tokens=20)
    train(embedder, batches, in_batch_negatives, config, out=tmp_path)
    losses = [record["loss"] for record in read_log(tmp_path)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_memory_is_given_back_every_few_batches(tmp_path, monkeypatch, accumulate):
    """Not every few steps: a step of many batches frees as often."""
    embedder = make_embedder(tmp_path / "base")
    batches = make_batches(embedder)
    released = []
    monkeypatch.setattr(train_module.devices, "release_memory", released.append)
    monkeypatch.setattr(train_module, "RELEASE_EVERY", 4)
    train(embedder, batches, in_batch_negatives, dataclasses.replace(CONFIG, epochs=4, accumulate=accumulate))
    assert len(released) == 4 * len(batches) // 4
    assert len(batches) > 2


# References.


def test_references_reach_the_loss(tmp_path):
    """Computed once per step, without gradients, in addition to those that the batch already has."""
    embedder, asked, seen = make_embedder(tmp_path / "base"), [], []
    weight = torch.ones((), requires_grad=True)

    def guide(batch):
        asked.append((batch.query_ids, torch.is_grad_enabled()))
        return weight * torch.ones(len(batch.query_ids), 3), weight * torch.ones(len(batch.document_ids), 3)

    class WithTeacher:
        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def epoch(self, number, *, start=0):
            for batch in self.batches.epoch(number, start=start):
                references = {
                    "teacher": (torch.zeros(len(batch.query_ids), 2), torch.zeros(len(batch.document_ids), 2))
                }
                yield batch._replace(targets=dataclasses.replace(batch.targets, references=references))

    def loss(Q, D, targets):
        seen.append({name: (q.shape, d.shape, q.requires_grad) for name, (q, d) in targets.references.items()})
        assert targets.references["guide"][0].tolist() == [[1.0] * 3] * len(Q)
        return in_batch_negatives(Q, D, targets)

    batches = make_batches(embedder)
    config = dataclasses.replace(CONFIG, epochs=1)
    train(embedder, WithTeacher(batches), loss, config, references={"guide": guide})
    expected = list(batches.epoch(0))
    assert asked == [(batch.query_ids, False) for batch in expected]
    assert seen == [
        {
            "teacher": ((len(batch.query_ids), 2), (len(batch.document_ids), 2), False),
            "guide": ((len(batch.query_ids), 3), (len(batch.document_ids), 3), False),
        }
        for batch in expected
    ]


# Validation, best weights, checkpoints.


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.1, 0.3, 0.5, 0.2], 2),
        ([0.1, 0.3, 0.5, 0.6], 3),
        ([0.5, 0.3, 0.4, 0.5], 0),  # never better than the base
        ([0.1, 0.3, 0.3, 0.2], 1),  # a tie goes to the earlier
    ],
)
def test_the_best_weights_are_kept(tmp_path, values, best):
    embedder = make_embedder(tmp_path / "base")
    evaluate = scripted(values)
    state = train(embedder, make_batches(embedder), in_batch_negatives, CONFIG, evaluate=evaluate)
    assert state.best_step == [0, 3, 6, 8][best]
    assert state.step == 8
    assert_same(weights_of(embedder), evaluate.seen[best])
    assert all(differ(evaluate.seen[i], evaluate.seen[j]) for i, j in ((0, 1), (1, 2), (2, 3)))


def test_select_names_the_metric_that_counts(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    values = iter([0.1, 0.9, 0.2])
    state = train(
        embedder,
        make_batches(embedder),
        in_batch_negatives,
        TrainConfig(epochs=2, select="mrr@10"),
        evaluate=lambda _: {"mrr@10": next(values), METRIC: 0.5},
    )
    assert state.best_step == 4


def test_without_validation_the_last_weights_stay(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    state = train(embedder, make_batches(embedder), in_batch_negatives, CONFIG)
    assert (state.step, state.best_step, state.evaluations) == (8, None, [])
    watched = make_embedder(tmp_path / "base")
    evaluate = scripted([0.1, 0.2, 0.3, 0.4])
    train(watched, make_batches(watched), in_batch_negatives, CONFIG, evaluate=evaluate)
    assert_same(weights_of(embedder), evaluate.seen[-1])  # and validating changes nothing


def test_a_metric_without_a_value_stops_the_training(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(ValueError, match=naming("step", 3, METRIC, "nan")):
        train(embedder, make_batches(embedder), in_batch_negatives, CONFIG, evaluate=scripted([0.1, math.nan, 0.2]))


def test_an_unknown_metric_is_refused_before_the_first_step(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    before = weights_of(embedder)
    config = dataclasses.replace(CONFIG, select="ndcg@11")
    with pytest.raises(ValueError, match=naming("select", "ndcg@11", METRIC, "mrr@10")):
        train(embedder, make_batches(embedder), in_batch_negatives, config, evaluate=scripted([0.1]))
    assert_same(weights_of(embedder), before)


@pytest.mark.parametrize(("every", "steps"), [(None, [4, 8]), (3, [3, 6, 8]), (4, [4, 8]), (100, [8])])
def test_how_often_to_validate_and_to_keep_a_checkpoint(tmp_path, monkeypatch, every, steps):
    saved = []
    monkeypatch.setattr(train_module, "save_checkpoint", lambda folder, state, found: saved.append(state.step))
    embedder = make_embedder(tmp_path / "base")
    config = dataclasses.replace(CONFIG, eval_every=every, checkpoint_every=every)
    evaluate = scripted([0.1] * 4)
    state = train(embedder, make_batches(embedder), in_batch_negatives, config, out=tmp_path, evaluate=evaluate)
    assert [step for step, _ in state.evaluations] == [0, *steps]
    assert saved == steps


def test_makes_the_folder(tmp_path):
    embedder = make_embedder(tmp_path / "model")
    train(embedder, make_batches(embedder), in_batch_negatives, TrainConfig(epochs=1), out=tmp_path / "runs" / "first")
    assert (tmp_path / "runs" / "first" / "train.jsonl").is_file()


def test_writes_nothing_without_a_folder(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    train(embedder, make_batches(embedder), in_batch_negatives, CONFIG, evaluate=scripted([0.1] * 4))
    assert list(empty.iterdir()) == []


# Divergence.


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_with_step_and_ids(tmp_path, what):
    """In step 3; the weights are those of step 2 bit for bit."""
    embedder = make_embedder(tmp_path / "base")
    calls = iter(range(1, 9))

    def loss(Q, D, targets):
        value = in_batch_negatives(Q, D, targets)
        if next(calls) < 3:
            return value
        # The square root's slope at 0 is infinite: a finite loss with gradients that are not.
        return value * math.nan if what == "loss" else value + (0 * Q.sum()).abs().sqrt()

    evaluate = scripted([0.1, 0.2, 0.3])
    batches = make_batches(embedder)
    batch = next(batches.epoch(0, start=2))
    facts = "step", 3, what, "nan", "queries", *batch.query_ids, "documents", *batch.document_ids
    with pytest.raises(NonFiniteError, match=naming(*facts)) as caught:
        train(embedder, batches, loss, dataclasses.replace(CONFIG, eval_every=1), out=tmp_path, evaluate=evaluate)
    assert (caught.value.step, caught.value.query_ids, caught.value.document_ids) == (
        3,
        batch.query_ids,
        batch.document_ids,
    )
    assert_same(weights_of(embedder), evaluate.seen[-1])
    last = read_log(tmp_path)[-1]
    ids = {"query_ids": batch.query_ids, "document_ids": batch.document_ids}
    assert names(last.pop("error"), what, "nan")
    assert last == {"step": 3, **ids}
    assert isinstance(caught.value, ValueError)  # from the command line, one line


def test_many_ids_are_counted_in_the_message(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    (batch,) = batches_of(make_dataset(20, 5), embedder.pack, batch_size=20, seed=0).epoch(0)
    error = NonFiniteError("loss is inf", 7, batch.query_ids, batch.document_ids)
    assert names(str(error), 7, "loss", "inf", *batch.query_ids[:16], "...", *batch.document_ids)
    assert not any(names(str(error), query_id) for query_id in batch.query_ids[16:])
    assert error.query_ids == batch.query_ids


@pytest.mark.parametrize(
    ("field", "value", "facts"),
    [
        ("epochs", 0, (1,)),
        ("epochs", 1.5, ("int",)),
        ("epochs", True, ("int",)),
        ("lr", 0.0, (0,)),
        ("lr", math.inf, (0,)),
        ("loss_lr", 0.0, (0,)),
        ("loss_lr", "fast", ("float", "null")),
        ("accumulate", 0, (1,)),
        ("mini_batch_tokens", 0, (1,)),
        ("mini_batch_tokens", 1.5, ("int", "null")),
        ("lr", "fast", ("float",)),
        ("max_grad_norm", math.nan, (0,)),
        ("warmup", -0.1, (0,)),
        ("weight_decay", math.inf, (0,)),
        ("schedule", "step", ("linear", "cosine", "constant")),
        ("precision", "int8", ("float32", "bfloat16", "float16")),
        ("eval_every", 0, (1,)),
        ("checkpoint_every", -1, (1,)),
        ("eval_every", "often", ("int", "null")),
        ("select", 10, ("str",)),
    ],
)
def test_settings_are_checked_when_made(field, value, facts):
    with pytest.raises(ValueError, match=naming(field, value, *facts)):
        TrainConfig(**{field: value})
