"""Checkpoints: everything a run needs to resume and end with the same bits as an uninterrupted one.

    save_checkpoint(out / "checkpoints", state)
    resumed = load_checkpoint(out / "checkpoints", state)      # False when there is none

A checkpoint is a folder of safetensors and JSON files, with the SHA-256 of each in files.json. It is written under a
temporary name and then renamed; the two newest are kept. Nothing is pickled.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import device as devices
from ..files import named_errors, read_object, sha256_file, write_json

MODEL, LOSS, OPTIMIZER, RANDOM = "model.safetensors", "loss.safetensors", "optimizer.safetensors", "random.safetensors"
BEST, REFRESH, STATE, FILES = "best.safetensors", "refresh.safetensors", "state.json", "files.json"
KEPT = 2
Weights = dict[str, Tensor]


@dataclass
class TrainState:
    """Everything that changes during training; a checkpoint holds all of it, and torch's random state.

    Attributes:
        embedder: the model in training.
        loss: a function, or a module whose parameters are trained and whose state is saved.
        optimizer: steps the parameters of both.
        step: steps done; epoch and batch follow from it.
        stopped: `on_step` ended the training.
        evaluations: (step, {metric: value}) of every validation so far.
        best_step: the step with the best value of the selected metric, 0 = the base; None without validation.
        best_weights: of that step, on the CPU.
        refresh_weights: the weights that the latest refresh saw, on the CPU; None before the first.
    """

    embedder: nn.Module = field(repr=False, compare=False)
    loss: Any = field(repr=False, compare=False)
    optimizer: torch.optim.Optimizer = field(repr=False, compare=False)
    step: int = 0
    stopped: bool = False
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    best_step: int | None = None
    best_weights: Weights | None = field(default=None, repr=False, compare=False)
    refresh_weights: Weights | None = field(default=None, repr=False, compare=False)

    def modules(self) -> dict[str, nn.Module]:
        """{file name: module} of what has weights or other state."""
        return {MODEL: self.embedder} | ({LOSS: self.loss} if isinstance(self.loss, nn.Module) else {})

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter the optimizer may step, by name; those of the loss as "loss/<name>"."""
        for file, module in self.modules().items():
            for name, parameter in module.named_parameters():
                yield (name if file == MODEL else f"loss/{name}"), parameter


def copy_weights(module: nn.Module) -> Weights:
    """A copy of the module's state on the CPU."""
    return {name: tensor.detach().clone().cpu() for name, tensor in module.state_dict().items()}


def save_checkpoint(folder: Path, state: TrainState) -> None:
    """Writes folder/step-000400, then removes all but the two newest checkpoints."""
    path = folder / f"step-{state.step:06d}"
    for unfinished in folder.glob(".step-*.tmp"):
        shutil.rmtree(unfinished)
    temporary = folder / f".{path.name}.tmp"
    temporary.mkdir(parents=True)
    tensors, values = _optimizer_state(state)
    weights = {file: module.state_dict() for file, module in state.modules().items()}
    weights |= {OPTIMIZER: tensors, RANDOM: devices.random_state(state.embedder.device)}
    weights |= {BEST: state.best_weights, REFRESH: state.refresh_weights}
    plain = {name: getattr(state, name) for name in ("step", "stopped", "evaluations", "best_step")}
    try:
        for name, found in weights.items():
            if found is not None:
                with named_errors(path / name):
                    save_file(_separate(found), temporary / name)
        write_json(temporary / STATE, {**plain, "optimizer": values})
        write_json(temporary / FILES, {file.name: sha256_file(file) for file in sorted(temporary.iterdir())})
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for older in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path, state: TrainState) -> bool:
    """Restores the newest checkpoint into `state` and torch's generators; False when there is none.

    Raises:
        ValueError: a file is damaged or missing, or the checkpoint is of another model, loss or optimizer. Nothing has
            been restored then.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return False
    path = checkpoints[-1]
    _check_files(path, checkpoints[-2] if len(checkpoints) > 1 else None)
    modules = state.modules()
    if (path / LOSS).is_file() != (LOSS in modules):
        had = "lacks" if LOSS in modules else "has"
        raise ValueError(f"{path}: {had} the state of a loss, so it belongs to a run with another loss")
    weights = {file: _checked(load_file(path / file), module, path / file) for file, module in modules.items()}
    tensors, stored = load_file(path / OPTIMIZER), read_object(path / STATE)
    parameters, values = dict(state.parameters()), stored.pop("optimizer")
    groups = state.optimizer.param_groups
    unknown = {key.partition("/")[2] for key in (*tensors, *values["state"])} - parameters.keys()
    if unknown or len(values["groups"]) != len(groups):
        what = f"steps {min(unknown)!r}" if unknown else f"has {len(values['groups'])} parameter groups"
        raise ValueError(f"{path / OPTIMIZER}: {what}, so it belongs to a run with another optimizer")
    for file, module in modules.items():
        module.load_state_dict(weights[file])
    for key, value in {**tensors, **values["state"]}.items():
        name, _, parameter = key.partition("/")
        # The fused AdamW kernel wants its step counter on the parameter's device.
        value = value.to(parameters[parameter].device) if isinstance(value, Tensor) else value
        state.optimizer.state[parameters[parameter]][name] = value
    for group, saved in zip(groups, values["groups"], strict=True):
        group.update(saved)  # all but the learning rate, which follows from the schedule
    devices.set_random_state(load_file(path / RANDOM), state.embedder.device)
    stored["evaluations"] = [(step, metrics) for step, metrics in stored["evaluations"]]
    for name, value in stored.items():
        setattr(state, name, value)
    state.best_weights, state.refresh_weights = (
        load_file(path / file) if (path / file).is_file() else None for file in (BEST, REFRESH)
    )
    return True


def _check_files(path: Path, before: Path | None) -> None:
    """Raises `ValueError` for the first file of a checkpoint that is not as it was written."""
    try:
        expected = read_object(path / FILES)
        expected = expected if {MODEL, OPTIMIZER, RANDOM, STATE} <= expected.keys() else {FILES: None}
    except (OSError, ValueError):
        expected = {FILES: None}  # also a checkpoint of an earlier version, which has none
    for name, digest in expected.items():
        if digest is None or not (path / name).is_file() or sha256_file(path / name) != digest:
            then = f"to resume from {before.name}" if before else "and overwrite the run: no earlier one is left"
            raise ValueError(f"{path}: {name} is damaged or missing; delete this checkpoint {then}")


def _checked(tensors: Weights, module: nn.Module, path: Path) -> Weights:
    """The tensors, if the module has the same ones. Raises `ValueError` naming the first that differs."""
    found, expected = ({name: list(x.shape) for name, x in given.items()} for given in (tensors, module.state_dict()))
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}: it belongs to"
                " another run"
            )
    return tensors


def _optimizer_state(state: TrainState) -> tuple[Weights, dict[str, Any]]:
    """The optimizer's tensors as {"exp_avg/<parameter>": tensor}, and its numbers as JSON."""
    tensors, numbers = {}, {}
    for name, parameter in state.parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                numbers[f"{key}/{name}"] = value
            else:
                raise ValueError(f"the optimizer's {key} is a {type(value).__name__}, expected a tensor or a number")
    kept = [
        {k: v for k, v in group.items() if isinstance(v, bool | int | float) and k not in ("lr", "initial_lr")}
        for group in state.optimizer.param_groups
    ]
    return tensors, {"state": numbers, "groups": kept}


def _separate(tensors: Weights) -> Weights:
    """The tensors without shared memory, which safetensors refuses: a module used twice has its weights twice."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return separate


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
