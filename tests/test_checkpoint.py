"""checkpoint.py: what goes in comes out bit for bit; only the newest whole one counts; nothing is pickled.

That a resumed run ends with the bits of an uninterrupted one is in test_train.py.
"""

import os
import pickle

import pytest
import torch
from torch import nn

from embedft.training import checkpoint
from embedft.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from embedft.training.optim import build_optimizer

CPU = torch.device("cpu")


def make_model(seed: int, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model with a frozen matrix, stepped a few times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        model[0].weight.requires_grad_(False)
        optimizer = build_optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(steps):
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_round_trip(tmp_path):
    model, optimizer = make_model(seed=0)
    state = TrainState(step=3, evaluations=[(0, {"ndcg@10": 0.1}), (3, {"ndcg@10": 1 / 3})], best_step=3)
    best = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    save_checkpoint(tmp_path, model, optimizer, state, best, CPU)
    drawn = torch.rand(5)

    other, other_optimizer = make_model(seed=1, steps=0)
    found, found_best = load_checkpoint(tmp_path, other, other_optimizer, CPU)
    assert found == state
    assert_same(found_best, best)
    assert_same(other.state_dict(), model.state_dict())
    assert torch.equal(torch.rand(5), drawn)  # the generators are where they were
    for theirs, ours in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(optimizer.state[theirs], other_optimizer.state[ours])
    # The next step is the same one, so moments and step counter reached the optimizer.
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        one(torch.ones(1, 4)).sum().backward()
        its_optimizer.step()
    assert_same(other.state_dict(), model.state_dict())


def make_loss(value: float) -> nn.Module:
    """A parameter and a count."""
    loss = nn.Module()
    loss.weight = nn.Parameter(torch.tensor([value]))  # the same name as a parameter of a layer
    loss.register_buffer("num_calls", torch.tensor(7))
    return loss


def test_round_trip_with_a_loss(tmp_path):
    model, optimizer = make_model(seed=0)
    loss = make_loss(1.0)
    optimizer.add_param_group({"params": loss.parameters(), "weight_decay": 0.0})
    loss.weight.square().sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=3), None, CPU, loss=loss)

    other, other_optimizer = make_model(seed=1, steps=0)
    other_loss = make_loss(5.0)
    other_loss.num_calls += 1
    other_optimizer.add_param_group({"params": other_loss.parameters(), "weight_decay": 0.0})
    load_checkpoint(tmp_path, other, other_optimizer, CPU, loss=other_loss)
    assert_same(other_loss.state_dict(), loss.state_dict())
    assert_same(other.state_dict(), model.state_dict())
    assert_same(other_optimizer.state[other_loss.weight], optimizer.state[loss.weight])
    for theirs, ours in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(optimizer.state[theirs], other_optimizer.state[ours])


def test_a_loss_whose_name_is_a_layers_keeps_its_own_moments(tmp_path):
    """The model has a parameter "weight" and the loss too."""
    model, loss = nn.LayerNorm(4, bias=False), make_loss(1.0)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": loss.parameters()}], lr=0.1)
    (model(torch.arange(4.0)).square().sum() + 3 * loss.weight.sum()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), None, CPU, loss=loss)
    before = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in (model.weight, loss.weight)]
    optimizer.state.clear()
    load_checkpoint(tmp_path, model, optimizer, CPU, loss=loss)
    for parameter, state in zip((model.weight, loss.weight), before, strict=True):
        assert_same(optimizer.state[parameter], state)


@pytest.mark.parametrize(("had", "has", "what"), [(True, False, "has"), (False, True, "lacks")])
def test_a_loss_with_state_and_one_without_are_not_exchanged(tmp_path, had, has, what):
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(1), None, CPU, loss=make_loss(1.0) if had else None)
    with pytest.raises(ValueError, match=f"step-000001: {what} the state of a loss"):
        load_checkpoint(tmp_path, model, optimizer, CPU, loss=make_loss(1.0) if has else None)


def test_another_model_or_loss_is_refused_with_nothing_restored(tmp_path):
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(1), None, CPU, loss=make_loss(1.0))
    other, loss = nn.Linear(2, 9), make_loss(5.0)
    before = [parameter.detach().clone() for parameter in (*other.parameters(), *loss.parameters())]
    with pytest.raises(ValueError, match=r"step-000001/model.safetensors: \S+ is .*, expected .*: it is of another"):
        load_checkpoint(tmp_path, other, optimizer, CPU, loss=loss)
    with pytest.raises(ValueError, match=r"step-000001/loss.safetensors: \S+ is .*, expected .*: it is of another"):
        load_checkpoint(tmp_path, make_model(seed=1)[0], optimizer, CPU, loss=nn.Linear(1, 2))
    assert all(map(torch.equal, before, (*other.parameters(), *loss.parameters())))


def test_a_loss_without_state(tmp_path):
    """A module may have none, like a sum of functions."""
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), None, CPU, loss=nn.Module())
    assert load_checkpoint(tmp_path, model, optimizer, CPU, loss=nn.Module()) == (TrainState(step=1), None)


def test_without_validation_there_are_no_best_weights(tmp_path):
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), None, CPU)
    assert load_checkpoint(tmp_path, model, optimizer, CPU) == (TrainState(step=1), None)


def test_none_when_there_is_none(tmp_path):
    model, optimizer = make_model(seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_checkpoint(tmp_path / "missing", model, optimizer, CPU) is None
    assert load_checkpoint(tmp_path, model, optimizer, CPU) is None
    assert_same(model.state_dict(), before)


def test_only_the_newest_is_kept(tmp_path):
    model, optimizer = make_model(seed=0)
    for step in (9, 10, 999_999, 1_000_000):  # names of six digits do not sort as text for ever
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=step), None, CPU)
        assert [path.name for path in tmp_path.iterdir()] == [f"step-{step:06d}"]
    assert load_checkpoint(tmp_path, model, optimizer, CPU)[0].step == 1_000_000


@pytest.mark.parametrize("place", ["in the middle", "before the rename"])
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, monkeypatch, place):
    """The folder is still hidden: the checkpoint before it counts, and the next save clears it away."""
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), None, CPU)
    with monkeypatch.context() as patch:
        if place == "in the middle":
            patch.setattr(checkpoint, "write_json", stop)
        else:
            rename = os.replace
            patch.setattr(os, "replace", lambda a, b: stop() if os.path.isdir(a) else rename(a, b))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizer, TrainState(step=2), None, CPU)
    assert (tmp_path / ".step-000002.tmp").is_dir()
    assert load_checkpoint(tmp_path, model, optimizer, CPU)[0].step == 1
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=2), None, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def stop(*arguments, **options):
    raise KeyboardInterrupt


def test_the_one_before_goes_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), None, CPU)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: None)  # as if killed before the removal
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=2), None, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert load_checkpoint(tmp_path, model, optimizer, CPU)[0].step == 2


def test_nothing_is_pickled(tmp_path, monkeypatch):
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, stop)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, stop)
    model, optimizer = make_model(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), model.state_dict(), CPU)
    load_checkpoint(tmp_path, model, optimizer, CPU)
    assert sorted(path.name for path in (tmp_path / "step-000001").iterdir()) == [
        "best.safetensors", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
    ]  # fmt: skip
