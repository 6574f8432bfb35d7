"""A run's folder: what was asked, where it ran, what happened. Killed at any point, it can be resumed or overwritten.

config.json        every setting, defaults included; under "objects" the code that was passed in
environment.json   commit, arguments, versions, device, SHA-256 of model and data
diff.patch         uncommitted changes of the working tree, if any
train.jsonl        one line per step and per validation
lists/             what a teacher scored, see retrieval/taught.py; with a store, they are there
checkpoints/       the two newest; deleted when the run is done
model/             the fine-tuned model, in the sentence-transformers layout
eval/<dataset>/    metrics.json, per_query.jsonl, run.trec; of several validation sets, suite.json and a folder for each
DONE               written when everything else is
.lock              held by the process that writes
.replaced/         a finished run that this one overwrites; deleted once this run finishes
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import device as devices
from ..encoders.fingerprint import precision
from ..encoders.store import LISTS
from ..files import append_jsonl, atomic_write, check_writable, locked, read_object, remove, resume_jsonl, write_json

CONFIG, ENVIRONMENT, DIFF, LOG = "config.json", "environment.json", "diff.patch", "train.jsonl"
CHECKPOINTS, MODEL, EVAL, DONE = "checkpoints", "model", "eval", "DONE"
LOCK, REPLACED = ".lock", ".replaced"
PACKAGES = ("embedft", "torch", "numpy", "faiss-cpu", "tokenizers", "safetensors")
EXISTING = ("refuse", "overwrite", "resume")
FREE = ("prefetch", "token_memory", "checkpoint_every", "log")  # settings that change no result
LOGGERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # neither is installed with embedft
Log = Callable[[dict[str, Any]], None]


def check_run(out: Path, existing: str = "refuse") -> None:
    """Raises `ValueError` if a run may not be written to `out`, or `existing` is not in EXISTING. Changes nothing, but
    finishes closing a run that was killed while closing."""
    if existing not in EXISTING:
        raise ValueError(f"existing is {existing!r}, expected one of {', '.join(EXISTING)}")
    check_writable(out)
    # A process killed while it opened a run, or a teacher scored lists for it, leaves these.
    opening = {LOCK, REPLACED, LISTS, *(() if existing == "refuse" else (ENVIRONMENT, DIFF))}
    begun = out.is_dir() and any(path.name not in opening and not path.match(".*.tmp") for path in out.iterdir())
    if not begun or ((out / CONFIG).is_file() and existing == "overwrite"):
        return
    if all((out / name).exists() for name in (CONFIG, DONE, LOCK)):  # a process killed while closing leaves its lock
        with contextlib.suppress(ValueError), locked(out / LOCK):
            _tidy(out)
    if existing == "refuse":
        raise ValueError(f"{out}: not empty; choose another folder, or pass existing='overwrite' or existing='resume'")
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out}: has files but no run ({CONFIG} is missing), so it is left alone")
    if (out / DONE).exists():
        raise ValueError(f"{out}: this run is done; there is nothing to resume")


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Locks the run folder, and removes it if no run was begun in it. Raises `ValueError` if it is already locked.
    A `KeyboardInterrupt` says how to resume the run."""
    with locked(out / LOCK):
        try:
            yield
        except KeyboardInterrupt:
            if not (out / CONFIG).is_file() or (out / DONE).exists():
                raise
            raise KeyboardInterrupt(f"{out}: existing='resume' continues this run") from None
        finally:
            if os.listdir(out) == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()


def open_run(
    out: Path, config: dict, *, hashes: dict, device: torch.device, existing: str, allow_changed_code: bool = False
) -> None:
    """Writes configuration and environment; to "resume", checks that hashes and all settings but FREE are the same, and
    records the configuration. `config` has every setting and, under "objects", {name: `describe_object`} of the code
    passed in; if that changed, `allow_changed_code` resumes. `hashes` has the SHA-256 of model and datasets."""
    check_run(out, existing)
    config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
    if existing == "resume" and (out / CONFIG).is_file():
        check_unchanged(out, config, hashes, "cannot resume", code=not allow_changed_code)
        if config != read_object(out / CONFIG):
            write_json(out / CONFIG, config)
        return
    _set_aside(out)
    commit, diff = _git_state()
    environment = {
        "started": _now(),
        "arguments": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": devices.describe(device),
        "packed_attention_kernel": devices.has_packed_attention(device, torch.bfloat16),
        "onednn_linear": devices.has_onednn_linear(device, torch.float32),
        "float32_products": list(precision(device)),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit,
        "dirty": bool(diff),
        "sha256": hashes,
    }
    write_json(out / ENVIRONMENT, environment)
    (out / DIFF).unlink(missing_ok=True)
    if diff:
        with atomic_write(out / DIFF, "wb") as file:
            file.write(diff)
    write_json(out / CONFIG, config)  # last: it makes the folder a run


def close_run(out: Path) -> None:
    """Marks the run as done, then deletes its checkpoints, the run it replaces, and what killed processes left."""
    with atomic_write(out / DONE) as file:
        file.write(_now() + "\n")
    _tidy(out)


def _tidy(out: Path) -> None:
    """Deletes what a finished run no longer needs."""
    # A finished run without its log was being set aside when its process was killed.
    if (out / LOG).exists() or (out / REPLACED / DONE).exists():
        remove(out / CHECKPOINTS, out / REPLACED, *out.glob(".*.tmp"))


def _set_aside(out: Path) -> None:
    """Moves a finished run to .replaced until the new one is done, and deletes an unfinished one."""
    # Checkpoints first: without them, resuming starts over. DONE last: it marks the old run as complete.
    paths = *out.glob(".*.tmp"), *(out / name for name in (CHECKPOINTS, LOG, "tensorboard", EVAL, MODEL, DONE))
    if not (out / DONE).exists():
        return remove(*paths)
    _tidy(out)
    aside = out / REPLACED
    aside.mkdir(exist_ok=True)
    for path in filter(Path.is_file, (out / CONFIG, out / ENVIRONMENT, out / DIFF)):
        shutil.copy(path, aside)
    for path in filter(Path.exists, paths):
        os.replace(path, aside / path.name)


def open_log(out: Path | None, step: int, logger: str | None = None) -> Log:
    """A function that appends a record to train.jsonl, and to `logger`; without `out` it does nothing.
    Drops the records of steps after `step`, which will be repeated, and an incomplete last line."""
    if out is None:
        return lambda record: None
    kept = [record for record in resume_jsonl(out / LOG) if record.get("step", 0) <= step]
    with atomic_write(out / LOG) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    also = open_logger(logger, out, resumed_at=step) if logger else lambda record: None

    def append(record: dict[str, Any]) -> None:
        append_jsonl(out / LOG, record)
        also(record)

    return append


def check_logger(name: str | None, out: Path | None) -> None:
    """Raises `ValueError` unless the logger can be used: its package is installed and there is a run folder."""
    if name is None:
        return
    if out is None:
        raise ValueError(f"log is {name!r}, but nothing is written without a run folder (out)")
    try:
        importlib.import_module(LOGGERS[name])
    except ImportError:
        raise ValueError(f"log is {name!r}, but {name} is not installed: pip install {name}") from None


def open_logger(name: str, out: Path, *, resumed_at: int) -> Log:
    """A function that logs the numbers of a record, nested ones as "components/matryoshka/384".
    TensorBoard writes to out/tensorboard and drops events of steps after `resumed_at`, the checkpoint's; W&B names the
    run after the run folder `out` and resumes it by id."""
    module = importlib.import_module(LOGGERS[name])
    if name == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=resumed_at + 1)

        def write(record: dict[str, Any]) -> None:
            for key, value in _scalars(record):
                writer.add_scalar(key, value, record["step"])
            writer.flush()

        return write
    environment = out / ENVIRONMENT  # differs between two runs in one folder
    identity = str(out.resolve()).encode() + (environment.read_bytes() if environment.is_file() else b"")
    run = module.init(dir=str(out), name=out.name, id=hashlib.sha256(identity).hexdigest()[:16], resume="allow")
    return lambda record: run.log(dict(_scalars(record)), step=record["step"])


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and prefix + key != "step":
            yield prefix + key, value


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git_state() -> tuple[str | None, bytes]:
    """(commit, diff against it) of the checkout this code runs from; (None, b"") outside of one."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> bytes:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(package), *arguments]
            return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
        return b""

    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return None, b""
    diff = git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", str(package.parent))
    return git("rev-parse", "HEAD").decode().strip() or None, diff


def check_unchanged(out: Path, config: dict[str, Any], hashes: dict[str, str], what: str, *, code: bool = True) -> None:
    """Raises `ValueError` naming the first setting outside FREE, hash or, if `code`, object in which the run in `out`
    differs."""
    before, config, found = read_object(out / CONFIG), dict(config), read_object(out / ENVIRONMENT).get("sha256", {})
    then, now = (settings.pop("objects", {}) for settings in (before, config))
    for key in _differing(before, config, free=FREE):
        was, now = (repr(settings[key]) if key in settings else "not a setting" for settings in (before, config))
        other = "; finish it with the version that began it, or pass existing='overwrite'"
        other = other if "not a setting" in (was, now) else ""
        raise ValueError(f"{out}: {what}, {key} was {was} and is {now}{other}")
    for name in _differing(found, hashes):
        raise ValueError(f"{out}: {what}, {name} is not what the run began with (its SHA-256 differs)")
    for name in _differing(then, now) if code else ():
        names = [part.get(name, {}).get("name", "not given") for part in (then, now)]
        change = f"the code or settings of {names[0]} changed" if names[0] == names[1] else " became ".join(names)
        raise ValueError(f"{out}: {what}, {name}: {change}; allow_changed_code=True resumes anyway")


def _differing(first: dict[str, Any], second: dict[str, Any], free: Sequence[str] = ()) -> list[str]:
    return [key for key in {**first, **second} if key not in free and first.get(key) != second.get(key)]
