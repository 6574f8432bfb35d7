"""Runs a function on several local ranks: one process each, in one gloo process group.

results = run_ranks(2, function, 3, folder=tmp_path)      # [function(3) on rank 0, function(3) on rank 1]
"""

import multiprocessing
import os
import signal
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Ranks are forked from a process that has imported only this, so starting is cheap and no thread is copied.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["embedft", "pytest", "tokenizers"])
TIMEOUT_SECONDS = 120


def run_ranks(size: int, function: Callable, *arguments: Any, folder: Path, grouped: bool = True) -> list[Any]:
    """What `function(*arguments)` returns on each rank, with one thread per rank; None for a process that was killed.

    Args:
        function: importable from a module, with picklable arguments and results.
        folder: for the rendezvous and result files.
        grouped: whether to set up the process group before calling `function`.

    Raises:
        AssertionError: a rank raised; includes its traceback.
    """
    place = folder / uuid.uuid4().hex
    place.mkdir()
    ranks = [
        CONTEXT.Process(target=_run, args=(rank, size, function, arguments, place, grouped)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(TIMEOUT_SECONDS)
    waiting = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for i in waiting:
        ranks[i].kill()
    assert not waiting, f"ranks {waiting} did not end"
    found = [place / f"{i}.pt" for i in range(size)]
    results = [torch.load(path, weights_only=False) if path.exists() else (True, None) for path in found]
    for good, result in results:
        assert good, result
    for rank, path in zip(ranks, found, strict=True):
        assert path.exists() or rank.exitcode == -signal.SIGKILL, rank.exitcode
    return [result for _, result in results]


def _run(rank: int, size: int, function: Callable, arguments: tuple, place: Path, grouped: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if grouped:
        dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=size)
    try:
        outcome = True, function(*arguments)
    except BaseException:
        outcome = False, f"rank {rank}:\n{traceback.format_exc()}"
        raise
    finally:
        torch.save(outcome, place / f"{rank}.pt")
        if grouped:
            dist.destroy_process_group()
