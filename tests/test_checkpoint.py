"""checkpoint.py: state is restored bit for bit; damage is found and named; nothing is pickled.

That a resumed run ends with the bits of an uninterrupted one is in test_train.py.
"""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
from naming import names, naming
from torch import nn

from embedft.training import checkpoint
from embedft.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from embedft.training.optim import build_optimizer


class Model(nn.Sequential):
    device = torch.device("cpu")


def make_state(seed: int, steps: int = 3, *, loss: nn.Module | None = None, at: int = 0) -> TrainState:
    """A small model with a frozen matrix, and a loss with parameters if one is given, stepped a few times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        model[0].weight.requires_grad_(False)
        optimizer = build_optimizer(model, loss, lr=0.1, weight_decay=0.1)
        own = [] if loss is None else list(loss.parameters())
        for _ in range(steps):
            (model(torch.randn(5, 4)).square().sum() + sum(p.square().sum() for p in own)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return TrainState(model, loss, optimizer, step=at)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(second[name])), name


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights and optimizer state by name."""
    weights = {f"{file}/{k}": v for file, module in state.modules().items() for k, v in module.state_dict().items()}
    moments = {
        f"{name}/{key}": value
        for name, parameter in state.parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
    return {name: torch.as_tensor(value).clone() for name, value in {**weights, **moments}.items()}


def make_loss(value: float) -> nn.Module:
    loss = nn.Linear(1, 1)
    with torch.no_grad():
        loss.weight.fill_(value)
    loss.register_buffer("calls", torch.tensor(int(value)))
    return loss


def test_round_trip(tmp_path):
    state = make_state(0, loss=make_loss(3.0), at=3)
    state.evaluations, state.best_step, state.stopped = [(0, {"ndcg@10": 0.1}), (3, {"ndcg@10": 1 / 3})], 3, True
    state.best_weights = {name: tensor + 1 for name, tensor in state.embedder.state_dict().items()}
    state.refresh_weights = {name: tensor + 2 for name, tensor in state.embedder.state_dict().items()}
    torch.manual_seed(7)
    save_checkpoint(tmp_path, state)
    drawn = torch.rand(5)

    other = make_state(1, steps=0, loss=make_loss(5.0))
    assert load_checkpoint(tmp_path, other)
    assert other == state
    assert_same(other.best_weights, state.best_weights)
    assert_same(other.refresh_weights, state.refresh_weights)
    assert_same(everything(other), everything(state))
    assert torch.equal(torch.rand(5), drawn)  # the generators are where they were
    # The next step is the same one, so moments and step counter reached the optimizer.
    for each in (state, other):
        each.embedder(torch.ones(1, 4)).sum().backward()
        each.optimizer.step()
    assert_same(everything(other), everything(state))


def test_nothing_but_the_model(tmp_path):
    """No validation, no refresh, a loss that is a function."""
    save_checkpoint(tmp_path, make_state(0, at=1))
    other = make_state(1)
    assert load_checkpoint(tmp_path, other)
    assert (other.step, other.best_step, other.best_weights, other.refresh_weights) == (1, None, None, None)


def test_a_loss_without_state(tmp_path):
    """A module may have none, like a sum of functions."""
    save_checkpoint(tmp_path, make_state(0, loss=nn.Module(), at=1))
    assert load_checkpoint(tmp_path, make_state(1, loss=nn.Module()))


def test_one_module_used_twice(tmp_path):
    """Its weights are in the state under two names, in the same memory."""
    part = make_loss(3.0)
    save_checkpoint(tmp_path, make_state(0, loss=nn.ModuleList([part, part]), at=1))
    other = make_loss(5.0)
    assert load_checkpoint(tmp_path, make_state(1, loss=nn.ModuleList([other, other])))
    assert_same(other.state_dict(), part.state_dict())


@pytest.mark.parametrize(("had", "has", "what"), [(True, False, "has"), (False, True, "lacks")])
def test_a_loss_with_state_and_one_without_are_not_exchanged(tmp_path, had, has, what):
    save_checkpoint(tmp_path, make_state(0, loss=make_loss(1.0) if had else None, at=1))
    with pytest.raises(ValueError, match=naming(tmp_path / "step-000001", what, "loss")):
        load_checkpoint(tmp_path, make_state(0, loss=make_loss(1.0) if has else None))


def test_another_model_or_loss_is_refused_with_nothing_restored(tmp_path):
    save_checkpoint(tmp_path, make_state(0, loss=make_loss(1.0), at=1))
    other = make_state(1, loss=nn.Linear(1, 2))
    before, random_state = everything(other), torch.get_rng_state()
    with pytest.raises(
        ValueError, match=naming(tmp_path / "step-000001/loss.safetensors", "weight", [1, 1], ..., [2, 1])
    ):
        load_checkpoint(tmp_path, other)
    assert_same(everything(other), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    other.embedder, other.loss = Model(nn.Linear(2, 9)), make_loss(1.0)
    before = everything(other)
    with pytest.raises(
        ValueError, match=naming(tmp_path / "step-000001/model.safetensors", "0.weight", [4, 4], ..., [9, 2])
    ):
        load_checkpoint(tmp_path, other)
    assert_same(everything(other), before)
    assert other.step == 0


def test_another_optimizer_is_refused(tmp_path):
    save_checkpoint(tmp_path, make_state(0, at=1))
    other = make_state(0)
    other.optimizer = torch.optim.SGD(other.embedder.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=naming("optimizer.safetensors", 2, "groups")):
        load_checkpoint(tmp_path, other)


def test_an_optimizer_whose_state_cannot_be_saved(tmp_path):
    state = make_state(0, at=1)
    state.optimizer.state[state.embedder[2].weight]["history"] = [torch.zeros(2)]
    with pytest.raises(ValueError, match=naming("history", "list", "tensor", "number")):
        save_checkpoint(tmp_path, state)


def test_none_when_there_is_none(tmp_path):
    state = make_state(0)
    before = everything(state)
    assert not load_checkpoint(tmp_path / "missing", state)
    assert not load_checkpoint(tmp_path, state)
    assert_same(everything(state), before)


def test_the_two_newest_are_kept(tmp_path):
    state, steps = make_state(0), (9, 10, 999_999, 1_000_000)
    for i, step in enumerate(steps):  # names of six digits do not sort as text for ever
        state.step = step
        save_checkpoint(tmp_path, state)
        expected = {f"step-{kept:06d}" for kept in steps[max(0, i - 1) : i + 1]}
        assert {path.name for path in tmp_path.iterdir()} == expected
    assert load_checkpoint(tmp_path, other := make_state(0))
    assert other.step == 1_000_000


def test_copies_beside_the_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "step-000009.bak").mkdir(parents=True)
    (tmp_path / "step-x").touch()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(0, at=step))
    state = make_state(1)
    assert load_checkpoint(tmp_path, state)
    assert state.step == 3
    assert sorted(os.listdir(tmp_path)) == ["step-000002", "step-000003", "step-000009.bak", "step-x"]


@pytest.mark.parametrize("place", ["in the middle", "before the rename"])
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, monkeypatch, place):
    """Nothing is left of it, or a hidden folder if the process was killed, which the next save removes."""
    state = make_state(0, at=1)
    save_checkpoint(tmp_path, state)
    state.step = 2
    with monkeypatch.context() as patch:
        if place == "in the middle":
            patch.setattr(checkpoint, "write_json", stop)
        else:
            rename = os.replace
            patch.setattr(os, "replace", lambda a, b: stop() if os.path.isdir(a) else rename(a, b))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state)
    assert os.listdir(tmp_path) == ["step-000001"]
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step.0123abcd.tmp")
    assert load_checkpoint(tmp_path, other := make_state(1))
    assert other.step == 1
    state.step = 3
    save_checkpoint(tmp_path, state)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000003"}


def stop(*arguments, **options):
    raise KeyboardInterrupt


FILES = ("best", "loss", "model", "optimizer", "random", "refresh")


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_found_before_anything_is_restored(tmp_path, seed):
    """A flipped bit, a shorter file, an empty or missing one, or one of another checkpoint: named, and a way out."""
    state = make_state(0, loss=make_loss(1.0), at=1)
    state.best_weights = state.refresh_weights = {"x": torch.zeros(3)}
    save_checkpoint(tmp_path, state)
    state.step = 2
    save_checkpoint(tmp_path, state)
    generator, newest = random.Random(seed), tmp_path / "step-000002"
    files = [*(f"{name}.safetensors" for name in FILES), "state.json", "files.json"]
    path = newest / files[seed % len(files)]
    content = path.read_bytes()
    kind = generator.choice(["flip", "cut", "empty", "missing", "other"])
    if kind == "missing":
        path.unlink()
    else:
        place = generator.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:place], "empty": b"", "other": b"{}"}[kind])
    other = make_state(1, loss=make_loss(5.0))
    before = everything(other)
    with pytest.raises(ValueError, match=naming(newest, "damaged", "resume", "step-000001")) as error:
        load_checkpoint(tmp_path, other)
    assert names(str(error.value), path.name) or path.name == "files.json"
    assert_same(everything(other), before)
    assert other.step == 0
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert load_checkpoint(tmp_path, other)  # as the message says
    assert other.step == 1


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    save_checkpoint(tmp_path, make_state(0, at=1))
    (tmp_path / "step-000001" / "files.json").unlink()
    with pytest.raises(ValueError, match=naming(tmp_path / "step-000001", "files.json", "damaged", "overwrite")):
        load_checkpoint(tmp_path, make_state(0))


def test_nothing_is_pickled(tmp_path, monkeypatch):
    state = make_state(0, at=1)  # first: torch imports more when an optimizer is made
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, stop)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, stop)
    state.best_weights = state.embedder.state_dict()
    save_checkpoint(tmp_path, state)
    load_checkpoint(tmp_path, state)
    files = {"best.safetensors", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
    assert json.loads((tmp_path / "step-000001" / "files.json").read_text()).keys() == files
    assert {path.name for path in (tmp_path / "step-000001").iterdir()} == files | {"files.json"}
