"""Stands in for the workers of benchmarks, so that their tests start no processes.

monkeypatch.setattr(bench_encode, "Worker", InProcess)
"""

import time


class InProcess:
    """A `benchmarks.workers.Worker` without a process; `took`: what it says that calls take, instead of measuring."""

    took: float | None = None

    def __init__(self, make, *arguments, device="cpu"):
        self.make, self.arguments, self.device = make, arguments, device
        self.contestant, self.seconds, self.peak_bytes = None, 0.0, 2**30

    def ready(self):
        self.contestant = self.contestant or self.make(*self.arguments)

    def call(self, method, *arguments):
        self.ready()
        start = time.perf_counter()
        result = method(*arguments) if callable(method) else getattr(self.contestant, method)(*arguments)
        self.seconds = time.perf_counter() - start if self.took is None else self.took
        return result

    def close(self):
        self.contestant = None
