"""Packed tokens: the sequences of a batch laid end to end, without padding.

Linear layers, norms and embeddings work on one [T, D] matrix; only attention (attention.py) needs to know where a
sequence ends.

    packed = pack([[101, 7592, 102], [101, 102]])
    packed.cu_seqlens       # tensor([0, 3, 5])

Shapes: T tokens of the batch, B sequences; N of them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, starmap
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device as devices
from .token_ids import TokenIds


class Packed(NamedTuple):
    """T tokens of B sequences."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1] int32: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]
    max_seqlen: int
    token_types: Tensor | None = None  # [T] int64, pairs only; None: all 0
    prompt_lengths: Tensor | None = None  # [B] int64, if pooling leaves the prompt out
    source: Tensor | None = None  # [B] int64, if texts were cut into windows: the text each sequence comes from
    known_lengths: np.ndarray | None = None  # [B] int64, as `lengths()`, on the CPU wherever the tensors are

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def lengths(self) -> Tensor:
        """Tokens of each sequence, [B] int64."""
        return self.cu_seqlens.diff().long()

    @property
    def host_lengths(self) -> np.ndarray:
        """The same on the CPU, without waiting for the device if `known_lengths` is set."""
        return self.lengths().cpu().numpy() if self.known_lengths is None else self.known_lengths

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        moved = iter(devices.transfer([x for x in self if isinstance(x, Tensor)], device))
        return Packed(*(next(moved) if isinstance(x, Tensor) else x for x in self))


def pack(
    sequences: TokenIds | Sequence[Sequence[int]],
    *,
    prompt_length: int | None = None,
    source: Sequence[int] | None = None,
    allow_empty: bool = False,
) -> Packed:
    """Lays token ids end to end; pooling leaves out the first `prompt_length` tokens of each sequence, if given.
    Raises `ValueError` for no sequence, and for one without tokens unless `allow_empty`."""
    tokens = sequences if isinstance(sequences, TokenIds) else TokenIds.of(sequences)
    lengths, starts = tokens.lengths(), tokens.offsets[:-1]
    if not len(lengths):
        raise ValueError("there are no sequences to pack")
    if not lengths.all() and not allow_empty:
        raise ValueError(f"sequence {lengths.argmin()} of {len(lengths)} has no token")
    return Packed(
        input_ids=torch.from_numpy(tokens.ids.astype(np.int64)),
        positions=torch.from_numpy(np.arange(len(tokens.ids)) - starts.repeat(lengths)),
        cu_seqlens=torch.from_numpy(tokens.offsets.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        known_lengths=lengths,
        prompt_lengths=None if prompt_length is None else torch.full((len(lengths),), prompt_length),
        source=None if source is None else torch.as_tensor(source, dtype=torch.int64),
    )


def concatenate(first: Packed, second: Packed) -> Packed:
    """The sequences of `first`, then those of `second`, as one batch without `source`."""

    def both(name: str, zeros: Callable[[Packed], Tensor]) -> Tensor | None:
        parts = [(packed, getattr(packed, name)) for packed in (first, second)]
        if all(tensor is None for _, tensor in parts):
            return None
        return torch.cat([zeros(packed) if tensor is None else tensor for packed, tensor in parts])

    return Packed(
        input_ids=torch.cat([first.input_ids, second.input_ids]),
        positions=torch.cat([first.positions, second.positions]),
        cu_seqlens=torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1]]),
        max_seqlen=max(first.max_seqlen, second.max_seqlen),
        known_lengths=np.concatenate([first.host_lengths, second.host_lengths]),
        token_types=both("token_types", lambda packed: torch.zeros_like(packed.input_ids)),
        prompt_lengths=both("prompt_lengths", lambda packed: torch.zeros_like(packed.lengths())),
    )


def take(packed: Packed, sequences_N: Tensor) -> Packed:
    """The sequences at `sequences_N`, [N] int64, in that order."""
    host_lengths, sequences_N = packed.host_lengths[sequences_N.cpu().numpy()], sequences_N.to(packed.cu_seqlens.device)
    lengths = torch.from_numpy(host_lengths).to(sequences_N.device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    # Token t of the new batch: its sequence's old start, plus its distance from the new start.
    tokens = torch.arange(int(host_lengths.sum()), device=sequences_N.device)
    tokens += (packed.cu_seqlens[:-1].long()[sequences_N] - cu_seqlens[:-1]).repeat_interleave(
        lengths, output_size=len(tokens)
    )
    by_token = [x if x is None else x[tokens] for x in (packed.input_ids, packed.positions, packed.token_types)]
    by_sequence = [x if x is None else x[sequences_N] for x in (packed.prompt_lengths, packed.source)]
    longest = int(host_lengths.max(initial=0))
    return Packed(*by_token[:2], cu_seqlens.to(torch.int32), longest, by_token[2], *by_sequence, host_lengths)


def encoded(encoder: nn.Module, packed: Packed) -> Tensor:
    """Hidden states of the tokens, [T, D]; see `device.token_multiple`."""
    num_tokens, multiple = len(packed.input_ids), devices.token_multiple(next(encoder.parameters()))
    rest = -num_tokens % multiple
    if not rest or num_tokens < 4 * multiple:
        return encoder(packed)
    lengths = [packed.max_seqlen] * (rest // packed.max_seqlen) + [rest % packed.max_seqlen]
    filler = pack([[0] * length for length in lengths if length]).to(packed.input_ids.device)
    return encoder(concatenate(packed, filler))[:num_tokens]


def sort_by_length(packed: Packed) -> tuple[Packed, Tensor]:
    """The sequences by length, longest first, and the place of each in that order, [B] int64."""
    order = torch.from_numpy(packed.host_lengths).argsort(descending=True, stable=True)
    return take(packed, order), order.argsort()


def rows_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows of sequences with these lengths, longest first, as many at a time as `cut_by_tokens` allows."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    for places in cut_by_tokens(lengths[order].tolist(), max_tokens):
        yield order[places.start : places.stop].tolist()


def cut_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Ranges of neighbouring sequences, as long as `max_tokens` allows; a longer sequence gets a range of its own."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    edges, num_tokens = [0], 0
    for row, length in enumerate(lengths):
        if row > edges[-1] and num_tokens + length > max_tokens:
            edges.append(row)
            num_tokens = 0
        num_tokens += length
    return list(starmap(range, pairwise([*edges, len(lengths)]))) if lengths else []
