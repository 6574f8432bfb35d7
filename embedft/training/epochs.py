"""Which batches each step of a run gets, epoch by epoch; they may be rebuilt between epochs."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from .. import device as devices
from ..data.collate import Batch
from ..encoders.embedder import Embedder
from ..prefetch import Prefetch
from .checkpoint import TrainState, copy_weights
from .configs import TrainConfig


class BatchSource(Protocol):
    """What `train` needs of batches: how many an epoch has, and the batches of an epoch, starting from any.
    With `TrainConfig.prefetch`, a thread calls `epoch` and makes batches ahead: they must not depend on torch's own
    generators or on the weights, and must not communicate between ranks."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]: ...


Refresh = Callable[[Embedder], BatchSource]


class Epochs:
    """The batches of every step; `refresh` rebuilds them at the start of every `every`-th epoch but the first."""

    def __init__(self, batches: BatchSource, config: TrainConfig, refresh: Refresh | None, every: int):
        self.batches, self.config, self.refresh, self.every, self.size = batches, config, refresh, every, len(batches)
        self.steps_per_epoch = -(-self.size // config.accumulate)
        self.num_steps = config.epochs * self.steps_per_epoch
        self.wait_seconds = self.step_seconds = 0.0  # waiting for batches, and working on them
        self._source: Prefetch[Batch] | None = None

    def close(self) -> None:
        """Ends the thread that makes batches."""
        if self._source is not None:
            self._source.close()

    def waiting(self, step_seconds: float) -> dict[str, float]:
        """After a step, for its record: which share of the time so far, steps and waiting together, was waiting."""
        self.step_seconds += step_seconds
        return {"wait_share": self.wait_seconds / max(self.wait_seconds + self.step_seconds, 1e-9)}

    def steps(self, state: TrainState) -> Iterator[tuple[int, list[Batch], dict[str, float]]]:
        """(epoch, the batches of a step, extra fields for its record), from the state's step to the end."""
        accumulate, is_current = self.config.accumulate, False
        while state.step < self.num_steps and not state.stopped:
            epoch, first = divmod(state.step, self.steps_per_epoch)
            extra, due = {}, first == 0 and epoch % self.every == 0
            if self.refresh is not None and epoch >= self.every and (due or not is_current):
                start, is_current = time.perf_counter(), True
                self._refresh(state, seed=self.config.seed + epoch // self.every, due=due)
                extra = {"refresh_seconds": time.perf_counter() - start} if due else {}
            self.close()
            self._source = Prefetch(self.batches.epoch(epoch, start=first * accumulate), ahead=self._ahead(state))
            while not state.stopped and (parts := list(itertools.islice(self._source, accumulate))):
                waited, self._source.wait_seconds = self._source.wait_seconds, 0.0
                self.wait_seconds += waited
                yield epoch, parts, {"wait_seconds": waited, **extra}
                extra = {}

    def _ahead(self, state: TrainState) -> int:
        asked = self.config.prefetch
        return devices.batches_ahead(state.embedder.device) if asked is None else asked

    def _refresh(self, state: TrainState, *, seed: int, due: bool) -> None:
        """Refreshes with the current weights or, unless `due`, repeats the latest refresh with the weights it used."""
        embedder, weights = state.embedder, copy_weights(state.embedder)
        if due:
            state.refresh_weights = weights
        embedder.eval()
        embedder.load_state_dict(state.refresh_weights)
        devices.release_memory(embedder.device)
        with devices.seeded(seed, embedder.device):
            self.batches = self.refresh(embedder)
        devices.release_memory(embedder.device)
        embedder.load_state_dict(weights)
        if (found := len(self.batches)) != self.size:
            raise ValueError(f"the refresh made {found} batches per epoch, expected {self.size} as before")
