"""Checkpoints: everything a run needs to resume and end with the same bits as an uninterrupted one.

    save_checkpoint(out / "checkpoints", state)
    resumed = load_checkpoint(out / "checkpoints", state)      # False when there is none

Each is a folder of safetensors and JSON files, with their SHA-256 in files.json, renamed into place once complete.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import device as devices
from ..encoders.weights import write_tensors
from ..files import named_errors, read_object, sha256_file, temporary_path, write_json
from .precision import make_scaler
from .sharding import Sharding, gathered, sharded_like

MODEL, LOSS, OPTIMIZER, RANDOM = "model.safetensors", "loss.safetensors", "optimizer.safetensors", "random.safetensors"
BEST, REFRESH, AVERAGE = "best.safetensors", "refresh.safetensors", "average.safetensors"
STATE, FILES = "state.json", "files.json"
PLAIN = ("step", "stopped", "mini_batch_tokens", "evaluations", "best_step")  # what STATE has of a `TrainState`
Weights = dict[str, Tensor]


@dataclass
class TrainState:
    """Everything that changes during training; a checkpoint holds all of it, and torch's random state."""

    embedder: nn.Module = field(repr=False, compare=False)
    loss: Any = field(repr=False, compare=False)  # a module is trained too
    optimizer: torch.optim.Optimizer = field(repr=False, compare=False)
    scaler: Any = field(default_factory=lambda: make_scaler("float32", torch.device("cpu")), repr=False, compare=False)
    step: int = 0  # steps done; epoch and batch follow from it
    stopped: bool = False  # by `on_step`
    mini_batch_tokens: int | None = None  # found by "auto"
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # step, {metric: value}
    best_step: int | None = None  # 0: the base; None without validation
    best_weights: Weights | None = field(default=None, repr=False, compare=False)  # a copy on the CPU, like the next
    refresh_weights: Weights | None = field(default=None, repr=False, compare=False)  # used by the latest refresh
    average: Weights | None = field(default=None, repr=False, compare=False)  # a moving one, of the trained parameters
    sharding: Sharding | None = field(default=None, repr=False, compare=False)  # of `embedder`, which is its `trained`

    def modules(self) -> dict[str, nn.Module]:
        """{file name: module} of everything with weights or other state."""
        return {MODEL: self.embedder} | ({LOSS: self.loss} if isinstance(self.loss, nn.Module) else {})

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The embedder with all its weights; on every rank at the same time."""
        return contextlib.nullcontext(self.embedder) if self.sharding is None else self.sharding.whole()

    def unshard(self) -> None:
        """Ends sharding: the embedder has all its weights from now on; on every rank."""
        if self.sharding is not None:
            self.embedder, self.sharding = self.sharding.finish(), None

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter the optimizer may update, by name; those of the loss as "loss/<name>"."""
        for file, module in self.modules().items():
            for name, parameter in module.named_parameters():
                yield (name if file == MODEL else f"loss/{name}"), parameter


def copy_weights(module: nn.Module) -> Weights:
    """A copy of the module's state on the CPU."""
    return {name: tensor.detach().clone().cpu() for name, tensor in module.state_dict().items()}


def contents(state: TrainState) -> tuple[dict[str, Weights | None], dict[str, Any]]:
    """{file: tensors} of a checkpoint, and the optimizer's numbers; on every rank, since sharded tensors are gathered,
    on rank 0."""
    moments, optimizer = _optimizer_state(state)
    weights = {file: module.state_dict() for file, module in state.modules().items()} | {OPTIMIZER: moments}
    weights = {file: {name: gathered(x) for name, x in tensors.items()} for file, tensors in weights.items()}
    weights |= {RANDOM: devices.random_state(state.embedder.device)}
    return weights | {BEST: state.best_weights, REFRESH: state.refresh_weights, AVERAGE: state.average}, optimizer


def save_checkpoint(folder: Path, state: TrainState, found: tuple | None = None) -> None:
    """Writes `found`, the `contents`, to folder/step-000400, then removes all but the two newest checkpoints."""
    path = folder / f"step-{state.step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    weights, optimizer = contents(state) if found is None else found
    with named_errors(path), temporary_path(folder, ".step.", Path.mkdir) as new:
        for name, tensors in weights.items():
            if tensors is not None:
                write_tensors(new / name, tensors)
        plain = {name: getattr(state, name) for name in PLAIN}
        write_json(new / STATE, plain | {"optimizer": optimizer, "scaler": state.scaler.state_dict()})
        write_json(new / FILES, {file.name: sha256_file(file) for file in sorted(new.iterdir())})
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)
    for older in _checkpoints(folder)[:-2]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path, state: TrainState) -> bool:
    """Restores the newest checkpoint into `state` and torch's generators; False when there is none.
    Raises `ValueError`, before restoring anything, for a damaged or missing file, another model, loss or optimizer."""
    *before, path = _checkpoints(folder) or [None]
    if path is None:
        return False
    _check_files(path, before)
    modules, parameters, groups = state.modules(), dict(state.parameters()), state.optimizer.param_groups
    if (path / LOSS).is_file() != (LOSS in modules):
        had = "lacks" if LOSS in modules else "has"
        raise ValueError(f"{path}: {had} the state of a loss, so it belongs to a run with another loss")
    if (path / AVERAGE).is_file() != (state.average is not None):
        had, run = ("lacks", "without") if state.average is not None else ("has", "with")
        raise ValueError(f"{path}: {had} an average of the weights, so it belongs to a run {run} ema")
    weights = {file: load_file(path / file) for file in modules}
    for file, module in modules.items():
        found, expected = ({k: list(x.shape) for k, x in w.items()} for w in (weights[file], module.state_dict()))
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                shapes = f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
                raise ValueError(f"{path / file}: {name} is {shapes}: it belongs to another run")
    stored = read_object(path / STATE)
    values, scaler = stored.pop("optimizer"), stored.pop("scaler", {})  # earlier versions had no scaler
    moments = load_file(path / OPTIMIZER) | values["state"]
    unknown = {key.partition("/")[2] for key in moments} - parameters.keys()
    if unknown or len(values["groups"]) != len(groups):
        what = f"updates {min(unknown)!r}" if unknown else f"has {len(values['groups'])} parameter groups"
        raise ValueError(f"{path / OPTIMIZER}: {what}, so it belongs to a run with another optimizer")
    if scaler.keys() != state.scaler.state_dict().keys():
        raise ValueError(f"{path / STATE}: scaler is {scaler}, so it belongs to a run of another precision")
    state.scaler.load_state_dict(scaler)
    for file, module in modules.items():
        own = module.state_dict()
        module.load_state_dict({name: sharded_like(own[name], x) for name, x in weights[file].items()})
    for key, value in moments.items():
        name, _, parameter = key.partition("/")
        # The fused AdamW kernel wants its step counter on the parameter's device.
        if isinstance(value, Tensor):
            value = sharded_like(parameters[parameter], value).to(parameters[parameter].device)
        state.optimizer.state[parameters[parameter]][name] = value
    for group, saved in zip(groups, values["groups"], strict=True):
        group.update(saved)  # all but the learning rate, which follows from the schedule
    devices.set_random_state(load_file(path / RANDOM), state.embedder.device)
    stored["evaluations"] = [(step, metrics) for step, metrics in stored["evaluations"]]
    for name, file in (("best_weights", BEST), ("refresh_weights", REFRESH), ("average", AVERAGE)):
        stored[name] = load_file(path / file) if (path / file).is_file() else None
    if state.average is not None:
        stored["average"] = {name: x.to(state.embedder.device) for name, x in stored["average"].items()}
    for name, value in stored.items():
        setattr(state, name, value)
    return True


def _check_files(path: Path, before: list[Path]) -> None:
    """Raises `ValueError` for the first file of a checkpoint that is missing or has changed."""
    try:
        expected = read_object(path / FILES)
    except (OSError, ValueError):
        expected = {}  # checkpoints of earlier versions have none either
    if {file.name for file in path.iterdir()} - expected.keys() != {FILES}:
        expected = {FILES: None}
    for name, digest in expected.items():
        if digest is None or not (path / name).is_file() or sha256_file(path / name) != digest:
            then = f"to resume from {before[-1].name}" if before else "and overwrite the run: no earlier one is left"
            raise ValueError(f"{path}: {name} is damaged or missing; delete this checkpoint {then}")


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
    groups = [
        {k: v for k, v in group.items() if isinstance(v, bool | int | float) and k not in ("lr", "initial_lr")}
        for group in state.optimizer.param_groups
    ]
    return tensors, {"state": numbers, "groups": groups}


def _checkpoints(folder: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))
