"""A run's folder on disk: what was asked, where it ran, what happened.

runs/<experiment>/<name>-s<seed>/
  config.json        every setting, defaults included
  environment.json   commit, arguments, versions, device, SHA-256 of model and data
  diff.patch         what the working tree had beyond the commit, when it had
  train.jsonl        one line a step, one a validation
  checkpoints/       the last one; gone when the run is done
  model/             the fine-tuned model, in the sentence-transformers layout
  eval/<dataset>/    metrics.json, per_query.jsonl, run.trec
  DONE               written last

open_run(out, config, hashes={"train": dataset.sha256()}, device=embedder.device)
"""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import device as devices
from ..files import atomic_write, check_writable, read_json, write_json

CONFIG, ENVIRONMENT, DIFF, LOG = "config.json", "environment.json", "diff.patch", "train.jsonl"
CHECKPOINTS, MODEL, EVAL, DONE = "checkpoints", "model", "eval", "DONE"
PACKAGES = ("embedft", "torch", "numpy", "faiss-cpu", "tokenizers", "safetensors")
EXISTING = ("refuse", "overwrite", "resume")


def check_run(out: Path, existing: str = "refuse") -> None:
    """Whether a run may be written to `out`: raises `ValueError` if not. Changes nothing; call it before any work.

    Args:
        existing: what to do about a run that is already there: "refuse" it, "overwrite" it, or "resume" it.
    """
    if existing not in EXISTING:
        raise ValueError(f"existing is {existing!r}, expected one of {', '.join(EXISTING)}")
    check_writable(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if existing == "refuse":
        raise ValueError(f"{out}: not empty; choose another folder, or overwrite or resume the run that is there")
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out}: holds files, but no run ({CONFIG} is missing), so it is left alone")
    if existing == "resume" and (out / DONE).exists():
        raise ValueError(f"{out}: this run is done, there is nothing to resume")


def is_done(out: Path, config: dict[str, Any], *, hashes: dict[str, str]) -> bool:
    """Whether the run in `out` is done. Raises `ValueError` when it is one of other settings, or of other data."""
    if not (out / DONE).exists():
        return False
    _check_same(out, config, hashes, "holds another run, name another folder")
    return True


def open_run(
    out: Path, config: dict[str, Any], *, hashes: dict[str, str], device: torch.device, existing: str = "refuse"
) -> None:
    """Makes the folder with its configuration and environment; under "resume" checks that they are the same.

    Args:
        config: every setting, as JSON can hold it.
        hashes: {name: SHA-256} of what the run starts from: model and data sets.
    """
    check_run(out, existing)
    if existing == "resume" and (out / CONFIG).is_file():
        _check_same(out, config, hashes, "cannot resume")
        return
    for name in (DONE, CONFIG, ENVIRONMENT, DIFF, LOG):
        (out / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, MODEL, EVAL):
        shutil.rmtree(out / name, ignore_errors=True)
    commit, diff = _git_state()
    write_json(out / ENVIRONMENT, environment(device) | {"commit": commit, "dirty": bool(diff), "sha256": hashes})
    if diff:
        with atomic_write(out / DIFF, "wb") as file:
            file.write(diff)
    # Last, because it is what makes the folder a run.
    write_json(out / CONFIG, config)


def close_run(out: Path) -> None:
    """Marks the run as done and drops its checkpoints."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    with atomic_write(out / DONE) as file:
        file.write(datetime.now(timezone.utc).isoformat(timespec="seconds") + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides code and data."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": devices.describe(device),
        "packed_attention_kernel": devices.has_packed_attention(device, torch.bfloat16),
        "onednn_linear": devices.has_onednn_linear(device, torch.float32),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bytes]:
    """(commit, diff against it) of the checkout that this code runs from; (None, b"") when it is not one."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return None, b""
    commit = git("rev-parse", "HEAD")
    diff = git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", str(package.parent))
    return (commit.decode().strip() if commit else None), diff or b""


def _check_same(out: Path, config: dict[str, Any], hashes: dict[str, str], what: str) -> None:
    """Raises `ValueError` with the first setting or hash in which the run in `out` differs."""
    before, found = read_json(out / CONFIG), read_json(out / ENVIRONMENT)["sha256"]
    changed = [key for key in {**before, **config} if before.get(key) != config.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(f"{out}: {what}, {key} was {before.get(key)!r} and is {config.get(key)!r}")
    other = [name for name in {**found, **hashes} if found.get(name) != hashes.get(name)]
    if other:
        raise ValueError(f"{out}: {what}, {other[0]} is not what the run began with (another SHA-256)")
