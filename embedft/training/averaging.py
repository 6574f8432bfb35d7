"""The weights that a run validates and keeps: those it trains, their moving average, or a point on the way to either.

    kept = KeptWeights(state, config)       # config.ema, config.tuned_share; before a checkpoint is loaded
    kept.update()                           # after each step
    with kept.in_place(): evaluate(...)     # training itself goes on from its own weights
    kept.finish()

Only trained parameters of the model are averaged; others are constant, and those of the loss are not kept.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .checkpoint import TrainState, Weights
from .configs import TrainConfig
from .merging import weighted_average


class KeptWeights:
    """Without `ema` and `tuned_share`, the weights of training.

    - ema, a decay d: after step t, average = d_t * average + (1 - d_t) * weights, d_t = min(d, (1 + t) / (10 + t)). It
      starts at the base's weights, of which the small first d_t leave little, so that it needs no other correction of
      its beginning. With LoRA, the factors are averaged.
    - tuned_share, s: (1 - s) * the base's weights + s * these. With LoRA, the updates B A are multiplied by s, which is
      the same once they are merged.

    Source: Polyak and Juditsky 1992; d_t is that of TensorFlow's ExponentialMovingAverage with num_updates. Wortsman
    et al. 2022 (WiSE-FT), section 3."""

    def __init__(self, state: TrainState, config: TrainConfig):
        self.state, self.decay, self.share = state, config.ema, config.tuned_share
        state.average = None
        if config.ema is not None:
            # At least in float32: in bfloat16, a step of 1 - decay would be lost in rounding.
            precise = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in self._copy().items()}
            state.average = precise
        self.base = None if config.tuned_share is None else self._copy()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.state.embedder.named_parameters() if p.requires_grad}

    def _copy(self) -> Weights:
        return {name: parameter.detach().clone() for name, parameter in self._trained().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights after a step to the average."""
        if self.state.average is not None:
            decay = min(self.decay, (1 + self.state.step) / (10 + self.state.step))
            for name, parameter in self._trained().items():
                average = self.state.average[name]
                average.lerp_(parameter.to(average.dtype), 1 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Gives the embedder the weights to keep."""
        trained, average = self._trained(), self.state.average
        for name, parameter in trained.items():
            weight = parameter if average is None else average[name]
            if self.base is not None and not (name.startswith("lora.") and name.endswith(".A")):
                weight = weighted_average([self.base[name], weight], [1 - self.share, self.share])
            parameter.copy_(weight)

    def finish(self) -> None:
        """Gives the embedder the best weights of the validations or, without any, the last ones to keep."""
        if self.state.best_weights is not None:
            self.state.embedder.load_state_dict(self.state.best_weights)
        else:
            self.put()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The embedder has the weights to keep, until the context ends."""
        if self.state.average is None and self.base is None:
            yield
            return
        before = self._copy()
        try:
            self.put()
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._trained().items():
                    parameter.copy_(before[name])
