"""Runs contestants alternately, each in its own process, and measures their time and peak memory.

A fresh process per contestant keeps peak memory separate and prevents one from warming up the other. Only the work
itself is timed, inside the worker.

    ours, peer = Worker(Ours, folder), Worker(Peer, folder)
    seconds = alternate({"ours": ours, "peer": peer}, "step", rounds=20, warmup=2)
"""

import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from embedft.device import describe, peak_memory_bytes
from embedft.progress import progress_bar


class Worker:
    """An object made by `make(*arguments)` in its own process; `call` runs its methods there.
    `device`: where it computes; work is only done when this device is, and the peak memory is that of this device."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, device: str = "cpu"):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.name = " ".join([make.__qualname__, *(str(x) for x in arguments[:1] if isinstance(x, str))])
        self.device, self.seconds, self.peak_bytes = device, 0.0, 0

    def call(self, method: str | Callable[..., Any], *arguments: Any) -> Any:
        """Runs a method, or a function of a module, and returns its result; updates `seconds` and `peak_bytes`.
        Raises what it raised, or `ChildProcessError` if the process ended."""
        try:
            self.connection.send((method, arguments))
            result, self.seconds, self.peak_bytes = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            what, code = getattr(method, "__name__", method), self.process.exitcode
            raise ChildProcessError(f"the process of {self.name} ended in {what}, exit code {code}") from None
        if isinstance(result, Exception):
            raise result
        return result

    def ready(self) -> None:
        """Waits until the object is made. Raises what making it raised."""
        self.call(bool)

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def _serve(connection, device: str, make: Callable[..., Any], arguments: tuple) -> None:
    os.environ["EMBEDFT_PROGRESS"] = "0"  # bars of what is measured say nothing of the rounds
    contestant = failure = None
    try:
        contestant = make(*arguments)
    except Exception as error:  # answers the first call
        failure = error
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        try:
            if failure is not None:
                raise failure
            result = method(*arguments) if callable(method) else getattr(contestant, method)(*arguments)
            synchronize(device)
        except Exception as error:  # handed to the parent, which raises it
            result = error
        seconds = time.perf_counter() - start
        connection.send((result, seconds, peak_memory_bytes(device)))


def synchronize(device: str) -> None:
    """Waits until the device has finished."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def most_anonymous(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """Returns (result of `work()`, anonymous bytes before it, peak anonymous bytes), sampled every 20 ms."""
    before, most, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, before, max(most[0], before)


def anonymous_bytes() -> int:
    """Resident memory not backed by a file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no RssAnon")


def alternate(
    workers: Mapping[str, Worker], method: str, *arguments: Any, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Times calls in the order A B A B ..., after `warmup` untimed rounds; returns the seconds of each contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    with progress_bar(warmup + rounds, method, unit="round") as bar:
        for i in range(warmup + rounds):
            for name, worker in workers.items():
                worker.call(method, *arguments)
                if i >= warmup:
                    seconds[name].append(worker.seconds)
            bar.update(1)
    return seconds


def machine(device: str = "cpu") -> str:
    """One line that describes the machine."""
    return f"{describe(torch.device(device))}, torch {torch.__version__}, Python {platform.python_version()}"


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range, e.g. "2.10 [2.05, 2.31]"."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def ratios(slower: list[float], faster: list[float]) -> list[float]:
    """Ratios of two lists of times, pair by pair."""
    return [a / b for a, b in zip(slower, faster, strict=True)]
