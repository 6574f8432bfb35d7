"""Training records in TensorBoard or Weights & Biases, beside train.jsonl. Neither is installed with embedft.

log = open_logger("tensorboard", out, resumed_at=0)
log({"step": 1, "loss": 0.7, "components": {"matryoshka/384": 0.3}})       # scalars "loss", "components/..."
"""

import hashlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

Logger = Literal["tensorboard", "wandb"]
LOGGERS = get_args(Logger)


def check_logger(name: str | None, out: Path | None) -> None:
    """Raises `ValueError` unless the logger can be used: its package is installed and there is a run folder."""
    if name is None:
        return
    if out is None:
        raise ValueError(f"log is {name!r}, but nothing is written without a run folder (out)")
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise ValueError(f"log is {name!r}, but {name} is not installed: pip install {name}") from None


def open_logger(name: str | None, out: Path | None, *, resumed_at: int) -> Callable[[dict[str, Any]], None]:
    """A function that logs the numbers of a record, nested ones as "components/matryoshka/384".

    Args:
        out: run folder. TensorBoard writes to out/tensorboard; W&B names the run after it and resumes it by id.
        resumed_at: step of the checkpoint; what TensorBoard has of later steps is dropped.
    """
    check_logger(name, out)
    if name is None:
        return lambda record: None
    if name == "tensorboard":
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
            str(out / "tensorboard"), purge_step=resumed_at + 1
        )

        def to_tensorboard(record: dict[str, Any]) -> None:
            for key, value in _scalars(record):
                writer.add_scalar(key, value, record["step"])
            writer.flush()

        return to_tensorboard
    environment = out / "environment.json"  # differs between two runs in one folder
    identity = str(out.resolve()).encode() + (environment.read_bytes() if environment.is_file() else b"")
    run = importlib.import_module("wandb").init(
        dir=str(out), name=out.name, id=hashlib.sha256(identity).hexdigest()[:16], resume="allow"
    )
    return lambda record: run.log(dict(_scalars(record)), step=record["step"])


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and prefix + key != "step":
            yield prefix + key, value
