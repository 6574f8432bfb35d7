"""How much inference computes at once: a whole batch, or less of it once memory has run out.

at_once = AtOnce()
vectors_ND = at_once(compute, device, token_ids)      # compute(token_ids of some texts) gives their vectors
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import device as devices
from .packing import cut_by_tokens
from .token_ids import TokenIds


class AtOnce:
    """Computes batches in parts of at most `max_tokens`, which halves whenever memory runs out; None: whole."""

    def __init__(self) -> None:
        self.max_tokens: int | None = None

    def __call__(self, compute: Callable[..., Tensor], device: torch.device, ids: TokenIds, *more: TokenIds) -> Tensor:
        """compute(ids, *more) [N, ...], for N texts; a text with more tokens is a part of its own.
        Warns when it computes less at once from now on. Raises `ValueError` where a single text takes too much."""
        lengths = ids.lengths().tolist()
        while True:
            most = max(1, min(sum(lengths), self.max_tokens or sum(lengths)))
            try:
                rows_of = cut_by_tokens(lengths, most)
                if len(rows_of) == 1:
                    return compute(ids, *more)
                return torch.cat([compute(*(x.take(list(rows)) for x in (ids, *more))) for rows in rows_of])
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error):
                    raise
                if most <= (longest := max(lengths)):
                    raise ValueError(f"{device}: memory ran out at a single text of {longest:,} tokens") from error
            # Not in the handler: there, the error would keep the tensors of the failed attempt.
            self.max_tokens = max(longest, most // 2)
            devices.release_memory(device)
            found = f"{device}: memory ran out at {most:,} tokens at once"
            warnings.warn(f"{found}; from now on {self.max_tokens:,}", stacklevel=4)
