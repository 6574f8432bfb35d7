"""Which batches each step of a run gets, epoch by epoch; they may be rebuilt between epochs."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from .. import device as devices
from ..data.collate import Batch
from ..encoders.embedder import Embedder
from .checkpoint import TrainState, copy_weights
from .configs import TrainConfig


class BatchSource(Protocol):
    """What `train` needs of batches: how many an epoch has, and the batches of an epoch, starting from any."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]: ...


Refresh = Callable[[Embedder], BatchSource]


class Epochs:
    """The batches of every step; `refresh` rebuilds them at the start of every `every`-th epoch but the first."""

    def __init__(self, batches: BatchSource, config: TrainConfig, refresh: Refresh | None, every: int):
        self.batches, self.config, self.refresh, self.every, self.size = batches, config, refresh, every, len(batches)
        self.steps_per_epoch = -(-self.size // config.accumulate)
        self.num_steps = config.epochs * self.steps_per_epoch

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
            source = self.batches.epoch(epoch, start=first * accumulate)
            while not state.stopped and (parts := list(itertools.islice(source, accumulate))):
                yield epoch, parts, extra
                extra = {}

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
