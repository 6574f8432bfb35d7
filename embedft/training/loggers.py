"""Training records in TensorBoard or Weights & Biases, beside train.jsonl. Neither is installed with embedft.

log = open_logger("tensorboard", out, resumed_at=0)
log({"step": 1, "loss": 0.7, "components": {"matryoshka/384": 0.3}})       # scalars "loss", "components/..."
"""

import hashlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Logger = Literal["tensorboard", "wandb"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_logger(name: str | None, out: Path | None) -> None:
    """Raises `ValueError` unless the logger can be used: its package is installed and there is a run folder."""
    if name is None:
        return
    if out is None:
        raise ValueError(f"log is {name!r}, but nothing is written without a run folder (out)")
    try:
        importlib.import_module(MODULES[name])
    except ImportError:
        raise ValueError(f"log is {name!r}, but {name} is not installed: pip install {name}") from None


def open_logger(name: str | None, out: Path | None, *, resumed_at: int) -> Callable[[dict[str, Any]], None]:
    """A function that logs the numbers of a record, nested ones as "components/matryoshka/384".

    TensorBoard writes to out/tensorboard and drops what it has of steps after `resumed_at`, the checkpoint's; W&B names
    the run after the run folder `out` and resumes it by id.
    """
    if name is None:
        return lambda record: None
    module = importlib.import_module(MODULES[name])
    if name == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=resumed_at + 1)

        def write(record: dict[str, Any]) -> None:
            for key, value in _scalars(record):
                writer.add_scalar(key, value, record["step"])
            writer.flush()

        return write
    environment = out / "environment.json"  # differs between two runs in one folder
    identity = str(out.resolve()).encode() + (environment.read_bytes() if environment.is_file() else b"")
    run_id = hashlib.sha256(identity).hexdigest()[:16]
    run = module.init(dir=str(out), name=out.name, id=run_id, resume="allow")
    return lambda record: run.log(dict(_scalars(record)), step=record["step"])


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and prefix + key != "step":
            yield prefix + key, value
