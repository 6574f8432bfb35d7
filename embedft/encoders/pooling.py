"""Pools token vectors into one vector per sequence.

Sums accumulate in float32 (float64 stays float64). The CPU adds token by token, so what is pooled does not depend on a
text's neighbours in the batch; CUDA adds in any order, so its last bits may differ, except in `device.deterministic`.
A pooling with weights is a module; they are trained, saved and part of every fingerprint.

    embedding_BD = Pooling(("mean",), hidden_size=384)(hidden_TD, packed)

Shapes: T tokens, B sequences, D features.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .packing import Packed


class Tokens:
    """The token vectors of a batch, in float32 or float64, and which sequence each belongs to.
    `vectors_TD`, `sequence_T` and `position_T` (from 0 at the sequence's start) leave out a prompt that pooling does
    not count. `all_TD` has all vectors; `first_B` (after that prompt, unless nothing follows) and `last_B` index it."""

    def __init__(self, hidden_TD: Tensor, packed: Packed):
        self.all_TD = hidden_TD if hidden_TD.dtype is torch.float64 else hidden_TD.float()
        self.first_B, end_B = packed.cu_seqlens[:-1].long(), packed.cu_seqlens[1:].long()
        self.last_B, self.num_sequences = end_B - 1, len(end_B)
        # Without the size, the CPU would wait for the device to add up the lengths.
        self.sequence_T = torch.repeat_interleave(packed.lengths(), output_size=len(hidden_TD))
        self.vectors_TD, self.position_T = self.all_TD, packed.positions
        if packed.prompt_lengths is not None:
            prompt_B = packed.prompt_lengths.to(self.first_B)
            kept_T = self.position_T >= prompt_B[self.sequence_T]
            self.first_B = torch.where(self.first_B + prompt_B < end_B, self.first_B + prompt_B, self.first_B)
            self.vectors_TD, self.sequence_T = self.all_TD[kept_T], self.sequence_T[kept_T]
            self.position_T = self.position_T[kept_T]

    def sum(self, values_TX: Tensor) -> Tensor:
        """The sum over each sequence, [B, X]."""
        return values_TX.new_zeros(self.num_sequences, values_TX.shape[1]).index_add(0, self.sequence_T, values_TX)

    def max(self, values_TX: Tensor) -> Tensor:
        """The elementwise maximum over each sequence, [B, X]."""
        lowest_BX = values_TX.new_full((self.num_sequences, values_TX.shape[1]), float("-inf"))
        return lowest_BX.scatter_reduce(0, self.sequence_T[:, None].expand_as(values_TX), values_TX, "amax")

    def mean(self, weight_T1: Tensor) -> Tensor:
        """The weighted mean of each sequence's vectors, [B, D]."""
        return self.sum(self.vectors_TD * weight_T1) / self.sum(weight_T1).clamp(min=1e-9)


def first(tokens: Tokens) -> Tensor:
    """The first token."""
    return tokens.all_TD[tokens.first_B]


def last(tokens: Tokens) -> Tensor:
    """The last token."""
    return tokens.all_TD[tokens.last_B]


def largest(tokens: Tokens) -> Tensor:
    """The elementwise maximum."""
    return tokens.max(tokens.vectors_TD)


def mean(tokens: Tokens, exponent: float = 1.0) -> Tensor:
    """The sum divided by the number of tokens to the power of `exponent`."""
    count_B1 = tokens.sum(torch.ones_like(tokens.vectors_TD[:, :1])).clamp(min=1e-9)
    return tokens.sum(tokens.vectors_TD) / count_B1**exponent


def weighted_mean(tokens: Tokens) -> Tensor:
    """The sum of p x_p over the sum of p, positions p from 1. Source: SGPT (Muennighoff 2022), section 4.1."""
    return tokens.mean(torch.ones_like(tokens.vectors_TD[:, :1]) * (tokens.position_T[:, None] + 1))


class Attention(nn.Module):
    """The mean weighted by softmax(x q), with a learned q [D]; q starts at 0, which gives the plain mean.
    Source: Yang et al. 2016 (Hierarchical attention networks), section 2.2, without the hidden layer."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, tokens: Tokens) -> Tensor:
        score_T1 = tokens.vectors_TD @ self.query.to(tokens.vectors_TD.dtype)[:, None]
        # Any shift leaves the softmax as it is; this one keeps exp within range.
        shift_T1 = tokens.max(score_T1.detach())[tokens.sequence_T]
        return tokens.mean((score_T1 - shift_T1).exp())


# {name: a function, or a module class that takes the hidden size}. The first six, and their numerics, are
# sentence-transformers' (6.2, sentence_transformer/modules/pooling.py).
POOLINGS: dict[str, Callable[[Tokens], Tensor] | type[nn.Module]] = {
    "cls": first,
    "max": largest,
    "mean": mean,
    "mean_sqrt_len_tokens": partial(mean, exponent=0.5),
    "weightedmean": weighted_mean,
    "lasttoken": last,
    "attention": Attention,
}


class Pooling(nn.Module):
    """Concatenates the named poolings: hidden states [T, D] -> [B, D * number of names].
    `include_prompt`: whether pooling counts the prompt's tokens. Raises `ValueError` for an unknown name."""

    def __init__(self, names: Sequence[str], hidden_size: int, *, include_prompt: bool = True):
        super().__init__()
        if unknown := [name for name in names if name not in POOLINGS]:
            raise ValueError(f"pooling mode is {unknown[0]!r}, expected one of {', '.join(POOLINGS)}")
        self.names, self.include_prompt = tuple(names), include_prompt
        self.out_features = hidden_size * len(self.names)
        classes = {name: POOLINGS[name] for name in self.names if isinstance(POOLINGS[name], type)}
        self.functions = [POOLINGS[name] for name in self.names if name not in classes]
        self.trained = nn.ModuleDict({name: make(hidden_size) for name, make in classes.items()})

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        tokens, functions = Tokens(hidden_TD, packed), iter(self.functions)
        parts = [(self.trained[name] if name in self.trained else next(functions))(tokens) for name in self.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
