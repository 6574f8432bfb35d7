"""From a vector a token to a vector a sequence.

All modes of sentence-transformers, over packed tokens. Sums accumulate in float32 (float64 stays float64), one
sequence after the other, so a text's vector does not depend on its neighbours in the batch.

    embedding_BD = pool(hidden_TD, packed, ("mean",))

Shapes: T tokens, B sequences, D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import Packed

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def pool(hidden_TD: Tensor, packed: Packed, modes: Sequence[str]) -> Tensor:
    """The pooled vectors, [B, D * number of modes], side by side as `modes` lists them; float32, or float64 as given.

    - cls: the first token; lasttoken: the last
    - mean: sum / n; mean_sqrt_len_tokens: sum / sqrt(n); max: element by element
    - weightedmean: sum of p * x_p / sum of p, positions p from 1 (SGPT, Muennighoff 2022, section 4.1)

    With `packed.prompt_lengths` the prompt's tokens are left out: of sums, counts and maxima, and "the first token" is
    the first behind the prompt. Positions keep counting from the sequence's start.

    Source: sentence-transformers 6.2, `sentence_transformer/modules/pooling.py`.
    """
    if hidden_TD.dtype is not torch.float64:
        hidden_TD = hidden_TD.float()
    starts_B, ends_B = packed.cu_seqlens[:-1].long(), packed.cu_seqlens[1:].long()
    sequence_T = torch.repeat_interleave(torch.arange(len(starts_B), device=starts_B.device), packed.lengths())
    position_T, pooled_TD = packed.positions, hidden_TD
    if packed.prompt_lengths is not None:
        prompt_B = packed.prompt_lengths.to(starts_B)
        starts_B = torch.where(starts_B + prompt_B < ends_B, starts_B + prompt_B, starts_B)
        kept_T = position_T >= prompt_B[sequence_T]
        pooled_TD, sequence_T, position_T = hidden_TD[kept_T], sequence_T[kept_T], position_T[kept_T]

    def segment_sum(values_TX: Tensor) -> Tensor:
        return values_TX.new_zeros(len(starts_B), values_TX.shape[1]).index_add(0, sequence_T, values_TX)

    def one(mode: str) -> Tensor:
        if mode == "cls":
            return hidden_TD[starts_B]
        if mode == "lasttoken":
            return hidden_TD[ends_B - 1]
        if mode == "max":
            lowest_BD = pooled_TD.new_full((len(starts_B), pooled_TD.shape[1]), float("-inf"))
            return lowest_BD.scatter_reduce(0, sequence_T[:, None].expand_as(pooled_TD), pooled_TD, "amax")
        weight_T1 = torch.ones_like(pooled_TD[:, :1])
        if mode == "weightedmean":
            weight_T1 = weight_T1 * (position_T[:, None] + 1)
            return segment_sum(pooled_TD * weight_T1) / segment_sum(weight_T1).clamp(min=1e-9)
        count_B1 = segment_sum(weight_T1).clamp(min=1e-9)
        return segment_sum(pooled_TD) / (count_B1 if mode == "mean" else count_B1.sqrt())

    return torch.cat([one(mode) for mode in modes], dim=1)
