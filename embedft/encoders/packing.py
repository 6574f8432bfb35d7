"""Packed tokens and attention over them: the sequences of a batch laid end to end, without padding.

Linear layers, norms and embeddings work on one [T, D] matrix; only attention needs to know where a sequence ends.

    packed = pack([[101, 7592, 102], [101, 102]])
    packed.cu_seqlens       # tensor([0, 3, 5])

Shapes: T tokens of the batch, B sequences, H heads, K width of a head; N sequences of a group, L their length.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise, starmap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices


class Packed(NamedTuple):
    """T tokens of B sequences."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1] int32: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]
    max_seqlen: int
    token_types: Tensor | None = None  # [T] int64, pairs only; None: all 0
    prompt_lengths: Tensor | None = None  # [B] int64, if pooling leaves the prompt out
    source: Tensor | None = None  # [B] int64, if texts were cut into windows: the text each sequence comes from

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def lengths(self) -> Tensor:
        """Tokens of each sequence, [B] int64."""
        return self.cu_seqlens.diff().long()

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        return Packed(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


def pack(
    sequences: Sequence[Sequence[int]], *, prompt_length: int | None = None, source: Sequence[int] | None = None
) -> Packed:
    """Lays token ids end to end; pooling leaves out the first `prompt_length` tokens of each sequence, if given."""
    lengths = [len(sequence) for sequence in sequences]
    if not lengths:
        raise ValueError("there are no sequences to pack")
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} of {len(lengths)} has no token")
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)
    starts_T = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return Packed(
        input_ids=torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64),
        positions=torch.arange(len(starts_T)) - starts_T,
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(lengths),
        prompt_lengths=None if prompt_length is None else torch.full((len(lengths),), prompt_length),
        source=None if source is None else torch.tensor(source, dtype=torch.int64),
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
        token_types=both("token_types", lambda packed: torch.zeros_like(packed.input_ids)),
        prompt_lengths=both("prompt_lengths", lambda packed: torch.zeros_like(packed.lengths())),
    )


def take(packed: Packed, sequences_N: Tensor) -> Packed:
    """The sequences at `sequences_N`, [N] int64, in that order."""
    lengths = packed.lengths()[sequences_N]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    # Token t of the new batch: its sequence's old start, plus its distance from the new start.
    tokens = torch.arange(int(cu_seqlens[-1]), device=sequences_N.device)
    tokens += (packed.cu_seqlens[:-1].long()[sequences_N] - cu_seqlens[:-1]).repeat_interleave(lengths)
    by_token = [x if x is None else x[tokens] for x in (packed.input_ids, packed.positions, packed.token_types)]
    by_sequence = [x if x is None else x[sequences_N] for x in (packed.prompt_lengths, packed.source)]
    longest = int(lengths.max()) if len(lengths) else 0
    return Packed(*by_token[:2], cu_seqlens.to(torch.int32), longest, by_token[2], *by_sequence)


def sort_by_length(packed: Packed) -> tuple[Packed, Tensor]:
    """The sequences by length, longest first, and the place of each in that order, [B] int64."""
    order = packed.lengths().argsort(descending=True, stable=True)
    return take(packed, order), order.argsort()


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


class Group(NamedTuple):
    """N neighbouring sequences that share one attention call, each attending to itself."""

    num_tokens: int
    num_sequences: int
    length: int  # L: tokens of the longest
    rows: Tensor | None  # [N * L] int64, the group's token at each padded place; None: all have length L
    mask: Tensor | None  # [N, 1, 1, L] bool, True at tokens


class Sequences:
    """Where the sequences of a packed batch start and end; made once per forward pass and passed to every layer.
    `slack`: a group's shortest has at least (1 - slack) times the longest's tokens; None: depends on the device."""

    def __init__(self, packed: Packed, *, slack: float | None = None):
        self.cu_seqlens, self.max_seqlen = packed.cu_seqlens, packed.max_seqlen
        self.slack = devices.length_slack(self.cu_seqlens.device) if slack is None else slack

    @functools.cached_property
    def groups(self) -> list[Group]:
        """As few groups of neighbours as `slack` allows."""
        lengths, edges, shortest, longest = self.cu_seqlens.diff().tolist(), [0], math.inf, 0
        for row, length in enumerate(lengths):
            shortest, longest = min(shortest, length), max(longest, length)
            if shortest < (1 - self.slack) * longest:
                edges.append(row)
                shortest = longest = length
        return [self._group(torch.tensor(lengths[i:j])) for i, j in pairwise([*edges, len(lengths)])]

    def _group(self, lengths_N: Tensor) -> Group:
        num_tokens, length, rows, mask = int(lengths_N.sum()), int(lengths_N.max()), None, None
        if num_tokens < len(lengths_N) * length:
            mask_NL = torch.arange(length) < lengths_N[:, None]
            # Padded places read the group's first token, which the mask hides.
            rows = torch.zeros(mask_NL.shape, dtype=torch.int64)
            rows[mask_NL] = torch.arange(num_tokens)
            rows, mask = rows.flatten().to(self.cu_seqlens.device), mask_NL[:, None, None].to(self.cu_seqlens.device)
        return Group(num_tokens, len(lengths_N), length, rows, mask)


def attention(qkv_T3HK: Tensor, sequences: Sequences, *, dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V within each sequence -> [T, H * K].
    CUDA in half precision without dropout uses the packed kernel; everything else `scaled_dot_product_attention`, once
    per group. With `dropout` of the attention weights, the CPU builds the whole [N, H, L, L] matrix."""
    T, _, H, K = qkv_T3HK.shape
    if dropout == 0 and devices.has_packed_attention(qkv_T3HK.device, qkv_T3HK.dtype):
        from torch.nn.attention.varlen import varlen_attn

        q_THK, k_THK, v_THK = qkv_T3HK.unbind(1)
        cu_seqlens, longest = sequences.cu_seqlens, sequences.max_seqlen
        return varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, longest, longest).reshape(T, H * K)
    outputs = []
    # One split rather than a slice per group: the backward of each slice would allocate a gradient for all T tokens.
    sizes = [group.num_tokens for group in sequences.groups]
    for group, tokens in zip(sequences.groups, qkv_T3HK.split(sizes), strict=True):
        if group.rows is not None:
            tokens = tokens[group.rows]
        q, k, v = tokens.view(group.num_sequences, group.length, 3, H, K).permute(2, 0, 3, 1, 4)  # each [N, H, L, K]
        out_NLHK = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, dropout_p=dropout).transpose(1, 2)
        outputs.append(out_NLHK.reshape(-1, H * K) if group.mask is None else out_NLHK[group.mask[:, 0, 0]].flatten(1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
