"""Training state on disk, complete enough that a resumed run ends with the same bits as an uninterrupted one.

A checkpoint is a folder of safetensors and JSON, written beside its place and renamed into it; the one before goes
only when the new one is whole. Nothing is pickled.

    save_checkpoint(out / "checkpoints", embedder, optimizer, state, best_weights, device, loss=module)
    load_checkpoint(out / "checkpoints", embedder, optimizer, device, loss=module)
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import device as devices
from ..files import read_json, write_json

MODEL, LOSS = "model.safetensors", "loss.safetensors"


@dataclasses.dataclass
class TrainState:
    """Where training stands.

    Attributes:
        step: steps done; epoch and batch follow from it.
        evaluations: (step, {metric: value}) of every validation so far.
        best_step: the step whose weights did best on the selected metric, 0 = the base; None without validation.
        refreshed: what the batches of the epoch follow from, as JSON can hold it; None before the first refresh.
    """

    step: int = 0
    evaluations: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    best_step: int | None = None
    refreshed: Any = dataclasses.field(default=None, repr=False)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    best_weights: dict[str, Tensor] | None,
    device: torch.device,
    *,
    loss: nn.Module | None = None,
) -> None:
    """Writes folder/step-000400 and then removes older ones.

    Args:
        loss: a loss with parameters, which the optimizer steps too, or with other state; None: it has none.
    """
    path = folder / f"step-{state.step:06d}"
    temporary = folder / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(model.state_dict(), temporary / MODEL)
    if loss is not None:
        save_file(loss.state_dict(), temporary / LOSS)
    save_file(_optimizer_tensors(model, loss, optimizer), temporary / "optimizer.safetensors")
    save_file(devices.random_state(device), temporary / "random.safetensors")
    if best_weights is not None:
        save_file(best_weights, temporary / "best.safetensors")
    write_json(temporary / "state.json", dataclasses.asdict(state))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    loss: nn.Module | None = None,
) -> tuple[TrainState, dict[str, Tensor] | None] | None:
    """Restores the newest checkpoint into model, loss, optimizer and torch's generators. None when there is none.

    Returns the state, and the best weights so far (None without validation). Raises `ValueError`, with nothing
    restored, when the checkpoint is of another model, or of a loss with other state than this one's.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    if (path / LOSS).is_file() != (loss is not None):
        had = "has" if loss is None else "lacks"
        raise ValueError(f"{path}: {had} the state of a loss, so it is not of a training with this loss")
    parts = {MODEL: model} if loss is None else {MODEL: model, LOSS: loss}
    tensors = {name: _checked(load_file(path / name), module, path / name) for name, module in parts.items()}
    for name, module in parts.items():
        module.load_state_dict(tensors[name])
    stored = load_file(path / "optimizer.safetensors")
    for name, parameter in _parameters(model, loss):
        keys = [key for key in stored if key.partition("/")[2] == name]
        if keys:
            # The fused kernel wants its step counter on the parameter's device.
            optimizer.state[parameter] = {key.partition("/")[0]: stored[key].to(parameter.device) for key in keys}
    devices.set_random_state(load_file(path / "random.safetensors"), device)
    state = TrainState(**read_json(path / "state.json"))
    state.evaluations = [(step, metrics) for step, metrics in state.evaluations]
    best = path / "best.safetensors"
    return state, load_file(best) if best.is_file() else None


def _checked(tensors: dict[str, Tensor], module: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors, when they are those that the module has. Raises `ValueError` with the first that differs."""
    found, expected = ({name: list(x.shape) for name, x in given.items()} for given in (tensors, module.state_dict()))
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'not there')}, expected {expected.get(name, 'none')}: "
                "it is of another training"
            )
    return tensors


def _parameters(model: nn.Module, loss: nn.Module | None) -> Iterator[tuple[str, nn.Parameter]]:
    """All that the optimizer may step, by name; the names of the loss's begin with "loss/"."""
    yield from model.named_parameters()
    if loss is not None:
        yield from ((f"loss/{name}", parameter) for name, parameter in loss.named_parameters())


def _optimizer_tensors(model: nn.Module, loss: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"exp_avg/<parameter>": tensor, ...}."""
    return {
        f"{key}/{name}": value
        for name, parameter in _parameters(model, loss)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
