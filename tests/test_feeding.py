"""Batches made ahead in a thread: the same run bit for bit, whatever ends it, and how long it waited."""

import random
import threading
import time
import traceback
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from naming import naming
from tiny import MEASURED, make_dataset, make_embedder

from embedft import FinetuneConfig, finetune
from embedft import device as devices
from embedft.data.batches import make_batches
from embedft.data.mixture import make_mixture
from embedft.files import read_jsonl
from embedft.losses.contrastive import in_batch_negatives
from embedft.training.configs import TrainConfig
from embedft.training.train import NonFiniteError, train


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def run(base, out, prefetch: int, how: Mapping[str, Any] = MappingProxyType({}), **settings):
    """(weights, log) of a run with dropout."""
    embedder = make_embedder(base)
    data = make_dataset(negatives=0 if "mine_every" in settings else 1)
    data = {"a": data, "b": make_dataset(seed=2, negatives=1)} if "sampling" in settings else data
    config = FinetuneConfig(**{"epochs": 3, "prefetch": prefetch, "lr": 1e-3} | settings)
    finetune(embedder, data, config, validation=make_dataset(5, 5, seed=1), out=out, **how)
    weights = {name: x.numpy() for name, x in embedder.state_dict().items()}
    return weights, [{**x, **dict.fromkeys(MEASURED)} for _, x in read_jsonl(out / "train.jsonl")]


def assert_equal(found, expected) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, weight in expected[0].items():
        np.testing.assert_array_equal(found[0][name], weight, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4, "num_negatives": 1, "eval_every": 1, "accumulate": 2},
        {"batch_tokens": 60, "num_negatives": 1, "eval_every": 2},
        {"batch_size": 4, "passages": [6, 2], "windows_per_document": 2, "refresh_windows": True},
        {"batch_size": 4, "num_negatives": 1, "mine_every": 1, "mine_ranks": [2, 6]},
        {"batch_size": 4, "sampling": "temperature", "mixed": True},
    ],
    ids=["accumulated", "by tokens", "windows", "mined", "mixed"],
)
def test_the_same_run(tmp_path, settings):
    base = tmp_path / "base"
    assert_equal(run(base, tmp_path / "ahead", 2, **settings), run(base, tmp_path / "plain", 0, **settings))


def test_a_resumed_run_is_the_same(tmp_path):
    """Stopped in the middle of an epoch, when the thread had made batches of steps that no checkpoint knows; resumed
    with fewer batches ahead, and no memory for token ids."""
    settings = {"batch_size": 3, "num_negatives": 1, "checkpoint_every": 2}

    def interrupt(state, record):
        if state.step == 7:
            raise KeyboardInterrupt

    base, out, how = tmp_path / "base", tmp_path / "out", {"existing": "resume", "allow_changed_code": True}
    with pytest.raises(KeyboardInterrupt):
        run(base, out, 3, {"on_step": interrupt}, **settings)
    assert_equal(run(base, out, 1, how, **settings, token_memory=0), run(base, tmp_path / "whole", 0, **settings))


class Source:
    """Batches of a dataset; making number `fails` raises, and each takes `seconds`."""

    def __init__(self, embedder, *, fails: int = -1, seconds: float = 0.0):
        self.batches = make_batches(make_dataset(), embedder.pack, batch_size=3, seed=0)
        self.fails, self.seconds, self.made = fails, seconds, 0

    def __len__(self):
        return len(self.batches)

    def epoch(self, number, *, start=0):
        for place, batch in enumerate(self.batches.epoch(number, start=start), start):
            if place == self.fails:
                raise OSError("the disk is gone")
            time.sleep(self.seconds)
            self.made += 1
            yield batch


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_comes_at_its_step(tmp_path, prefetch):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(OSError, match=naming("gone")) as found:
        train(
            embedder,
            Source(embedder, fails=2),
            in_batch_negatives,
            TrainConfig(epochs=1, prefetch=prefetch),
            out=tmp_path,
        )
    assert [x["step"] for _, x in read_jsonl(tmp_path / "train.jsonl")] == [1, 2]
    assert "epoch" in [frame.name for frame in traceback.extract_tb(found.value.__traceback__)]


@pytest.mark.parametrize("what", ["stop", "interrupt", "not finite"])
def test_whatever_ends_a_run_ends_its_thread(tmp_path, what):
    embedder = make_embedder(tmp_path / "base")
    source = Source(embedder)
    loss = in_batch_negatives

    def on_step(state, record):
        if what == "interrupt":
            raise KeyboardInterrupt
        return what

    if what == "not finite":
        loss = lambda Q, D, targets: Q.sum() * float("nan")  # noqa: E731
    config = TrainConfig(epochs=2, prefetch=1)
    if what == "stop":
        assert train(embedder, source, loss, config, on_step=on_step).step == 1
    else:
        with pytest.raises(KeyboardInterrupt if what == "interrupt" else NonFiniteError):
            train(embedder, source, loss, config, on_step=on_step)
    assert source.made <= 3


@pytest.mark.parametrize("prefetch", [0, 2])
def test_waiting_is_recorded(tmp_path, prefetch):
    embedder = make_embedder(tmp_path / "base")
    source = Source(embedder, seconds=0.05)
    config = TrainConfig(epochs=1, prefetch=prefetch)
    train(embedder, source, in_batch_negatives, config, out=tmp_path, on_step=lambda *_: time.sleep(0.2))
    log = [x for _, x in read_jsonl(tmp_path / "train.jsonl")]
    waited = [x["wait_seconds"] for x in log]
    assert len(log) == 4
    assert waited[0] > 0.04
    assert min(waited) > 0.04 if prefetch == 0 else min(waited) < 0.04
    whole = sum(waited) + sum(x["seconds"] for x in log)
    assert log[-1]["wait_share"] == pytest.approx(sum(waited) / whole)


@pytest.mark.parametrize(("prefetch", "has_thread"), [(None, True), (0, False)])
def test_by_default_the_device_decides(tmp_path, monkeypatch, prefetch, has_thread):
    monkeypatch.setattr(devices, "batches_ahead", lambda device: 1)
    embedder, seen = make_embedder(tmp_path / "base"), []

    def on_step(*_):
        seen.append("prefetch" in [thread.name for thread in threading.enumerate()])

    train(embedder, Source(embedder), in_batch_negatives, TrainConfig(epochs=1, prefetch=prefetch), on_step=on_step)
    assert seen[0] == has_thread


def test_prefetch_is_a_number_of_batches():
    with pytest.raises(ValueError, match=naming("prefetch", -1, 0)):
        TrainConfig(prefetch=-1)


def test_making_batches_draws_from_no_global_generator(tmp_path):
    """So it does not matter what another thread, such as that of a training step with dropout, draws meanwhile."""
    embedder, data = make_embedder(tmp_path / "base"), make_dataset(negatives=2)
    sources = [
        make_batches(data, embedder.pack, batch_size=4, seed=0, passages=(6, 2), windows_per_document=1),
        make_batches(data, embedder.pack, batch_tokens=50, seed=0, no_duplicates=True),
        make_mixture({"a": data, "b": data}, embedder.pack, batch_size=4, seed=0, sampling="temperature", mixed=True),
    ]

    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    for batches in sources:
        for epoch in range(2):
            assert len(list(batches.epoch(epoch))) == len(batches)
    assert states() == before
