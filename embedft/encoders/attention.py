"""Attention over packed tokens, for every family: grouped heads, causal masks, sliding windows, additive biases.

    attended_TD = attention(q_THK, k_TGK, v_TGK, Sequences(packed), window=CAUSAL)

Each sequence attends to itself alone. Without the packed kernel of CUDA, sequences are padded inside attention only,
in groups of like length. Memory grows with T, except under a bias or dropout: there it grows with the square of L.

Shapes: T tokens of the batch, B sequences, H heads of queries, G of keys and values (each serves H / G heads), K width
of a head; N sequences of a group, L their length; C tokens of a block, S tokens that it sees.
"""

import functools
import inspect
import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from .packing import Packed

# (left, right): how many tokens before and after it a token attends to, besides itself; None: all.
Window = tuple[int | None, int | None]
FULL: Window = (None, None)
CAUSAL: Window = (None, 0)
# Where the kernel is slow (`device.has_slow_attention`), sequences of at most so many tokens have the matrix of their
# attention weights computed; without a gradient, of at most so many times a head's width, too. 12 heads of 32: 9.0 ms
# instead of the kernel's 11.0 for texts of 48 tokens, 11.8 instead of 15.0 for 96, but 25.7 instead of 18.4 for 128;
# 12 heads of 64: 29.8 instead of 44.9 for 200 (4,096 tokens, CPU time on a busy core of an EPYC of family 25, torch
# 2.13.0, 2026-11-30).
MAX_MATRIX, MAX_MATRIX_WIDTHS = 512, 3
PACKED_WIDTHS = range(8, 257, 8)  # of a head; TinyBERT's is 26
MIN_BLOCK = 64  # tokens; smaller blocks spend more on their borders than they save


class Group(NamedTuple):
    """N neighbouring sequences that share one attention call, each attending to itself."""

    num_tokens: int
    num_sequences: int
    length: int  # L: tokens of the longest
    rows: Tensor | None  # [N * L] int64, the group's token at each padded place; None: all have length L
    mask: Tensor | None  # [N, 1, 1, L] bool, True at tokens
    places: tuple[Tensor, Tensor] | None  # the sequence and the place in it of each token, both [num_tokens] int64


class Sequences:
    """Where the sequences of a packed batch start and end; made once per forward pass and passed to every layer.

    Args:
        bias_HLL: what every layer adds to the scores of query i and key j of a sequence, at [:, i, j]; L at least the
            longest's length.
        slack: a group's shortest has at least (1 - slack) times the longest's tokens; None: depends on the device."""

    def __init__(self, packed: Packed, *, bias_HLL: Tensor | None = None, slack: float | None = None):
        self.cu_seqlens, self.max_seqlen, self.bias_HLL = packed.cu_seqlens, packed.max_seqlen, bias_HLL
        self.lengths_B = packed.host_lengths  # where a loop over them does not wait for the device
        self.slack = devices.length_slack(self.cu_seqlens.device) if slack is None else slack
        self._masks: dict[tuple[int, Window, int], Tensor] = {}
        self._biases: dict[tuple[int, Window, torch.dtype], Tensor] = {}

    @functools.cached_property
    def groups(self) -> list[Group]:
        """As few groups of neighbours as `slack` allows."""
        lengths, edges, shortest, longest = self.lengths_B.tolist(), [0], math.inf, 0
        for row, length in enumerate(lengths):
            shortest, longest = min(shortest, length), max(longest, length)
            if shortest < (1 - self.slack) * longest:
                edges.append(row)
                shortest = longest = length
        return [self._group(torch.tensor(lengths[i:j])) for i, j in pairwise([*edges, len(lengths)])]

    def _group(self, lengths_N: Tensor) -> Group:
        num_tokens, length, rows, mask, places = int(lengths_N.sum()), int(lengths_N.max()), None, None, None
        if num_tokens < len(lengths_N) * length:
            mask_NL = torch.arange(length) < lengths_N[:, None]
            # Padded places read the group's first token, which the mask hides.
            rows = torch.zeros(mask_NL.shape, dtype=torch.int64)
            rows[mask_NL] = torch.arange(num_tokens)
            # Found here, because on a GPU whoever indexes with a mask waits to learn how many tokens there are.
            found = [rows.flatten(), mask_NL[:, None, None], *mask_NL.nonzero(as_tuple=True)]
            rows, mask, *places = devices.transfer(found, self.cu_seqlens.device)
        return Group(num_tokens, len(lengths_N), length, rows, mask, places and tuple(places))

    def mask(self, i: int, window: Window, block: int) -> Tensor:
        """Whether a token of group `i` attends to another, bool, [N, blocks, 1, C, S]; N is 1 without padding. The
        queries of a block are C = `block` tokens, its keys the S = C + left + right tokens around them; in a sequence
        of one block, C = S = L. Padded places attend to themselves, since a softmax over nothing is NaN."""
        if (i, window, block) not in self._masks:
            group, device = self.groups[i], self.cu_seqlens.device
            left, right = (group.length if n is None else n for n in window)
            before = left if block < group.length else 0
            after = right if block < group.length else 0
            starts_M1 = torch.arange(0, group.length, block, device=device)[:, None]
            query_MC1 = (starts_M1 + torch.arange(block, device=device))[..., None]
            key_M1S = (starts_M1 + torch.arange(-before, block + after, device=device))[:, None]
            seen_MCS = (key_M1S >= query_MC1 - left) & (key_M1S <= query_MC1 + right)
            lengths_N111 = self._lengths(i)[:, None, None, None]
            mask_NMCS = seen_MCS & (key_M1S >= 0) & (key_M1S < lengths_N111) | (key_M1S == query_MC1)
            self._masks[i, window, block] = mask_NMCS[:, :, None]
        return self._masks[i, window, block]

    def bias(self, i: int, window: Window, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of group `i`, -inf where a token sees no other, [N or 1, H, L, L]."""
        if (i, window, dtype) not in self._biases:
            group, L = self.groups[i], self.groups[i].length
            bias_NHLL = self.bias_HLL[None, :, :L, :L].to(dtype)
            if window != FULL or group.mask is not None:
                hidden_NHLL = ~self.mask(i, window, L)[:, 0]
                # Added, because a sum keeps nothing for the backward pass: the layer that makes it may run again there.
                bias_NHLL = bias_NHLL + torch.zeros_like(hidden_NHLL, dtype=dtype).masked_fill(hidden_NHLL, -math.inf)
            self._biases[i, window, dtype] = bias_NHLL
        return self._biases[i, window, dtype]

    def _lengths(self, i: int) -> Tensor:
        """The lengths of group `i`, [N]; [1] if they are all equal."""
        group = self.groups[i]
        if group.mask is None:
            return torch.full((1,), group.length, device=self.cu_seqlens.device)
        return group.mask.flatten(1).sum(1)


def attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    sequences: Sequences,
    *,
    window: Window = FULL,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale Q K^T + bias) V within each sequence and window -> [T, H * K]; `scale` None: 1 / sqrt(K).
    CUDA in half precision uses the packed kernel unless there is a bias, dropout or a width of heads that it does not
    take; everything else uses `scaled_dot_product_attention`, once per group. With `dropout` of the attention weights,
    the CPU builds the whole [N, H, L, L] matrix."""
    is_taken = dropout == 0 and sequences.bias_HLL is None and q_THK.shape[-1] in PACKED_WIDTHS
    if is_taken and devices.has_packed_attention(q_THK.device, q_THK.dtype):
        return _packed_kernel(q_THK, k_TGK, v_TGK, sequences, window, scale).flatten(1)
    if (num_queries := q_THK.shape[1] // k_TGK.shape[1]) > 1 and not devices.has_grouped_attention(q_THK.device):
        k_TGK, v_TGK = (x.repeat_interleave(num_queries, dim=1) for x in (k_TGK, v_TGK))
    outputs, options = [], {"scale": scale, "dropout_p": dropout, "enable_gqa": k_TGK.shape[1] < q_THK.shape[1]}
    # One split rather than a slice per group: the backward of each slice would allocate a gradient for all T tokens.
    sizes = [group.num_tokens for group in sequences.groups]
    for i, (group, *tokens) in enumerate(
        zip(sequences.groups, *(x.split(sizes) for x in (q_THK, k_TGK, v_TGK)), strict=True)
    ):
        if group.rows is not None:
            tokens = [x[group.rows] for x in tokens]
        q, k, v = (x.view(group.num_sequences, group.length, *x.shape[1:]).transpose(1, 2) for x in tokens)
        out_NLHK = _grouped(q, k, v, sequences, i, window, options).transpose(1, 2)
        kept = out_NLHK if group.places is None else out_NLHK[group.places]
        outputs.append(kept.reshape(group.num_tokens, -1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _packed_kernel(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, sequences: Sequences, window: Window, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Only what differs from the defaults, which older versions of torch know too.
    options = {} if window == FULL else {"window_size": tuple(-1 if n is None else n for n in window)}
    options |= {} if scale is None else {"scale": scale}
    if (num_queries := q_THK.shape[1] // k_TGK.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            k_TGK, v_TGK = (x.repeat_interleave(num_queries, dim=1) for x in (k_TGK, v_TGK))
    cu_seqlens, longest = sequences.cu_seqlens, sequences.max_seqlen
    return varlen_attn(q_THK, k_TGK, v_TGK, cu_seqlens, cu_seqlens, longest, longest, **options)


def _grouped(
    q_NHLK: Tensor,
    k_NGLK: Tensor,
    v_NGLK: Tensor,
    sequences: Sequences,
    i: int,
    window: Window,
    options: dict,
) -> Tensor:
    """Attention within group `i` -> [N, H, L, K]."""
    group, attend = sequences.groups[i], functools.partial(F.scaled_dot_product_attention, **options)
    L = group.length
    most = MAX_MATRIX if torch.is_grad_enabled() else min(MAX_MATRIX, MAX_MATRIX_WIDTHS * q_NHLK.shape[-1])
    if most >= L and not options["dropout_p"] and devices.has_slow_attention(q_NHLK.device, q_NHLK.dtype):
        attend = functools.partial(_by_products, scale=options["scale"])
    window = tuple(None if n is None or n >= L - 1 else n for n in window)  # limits that no token reaches are none
    if sequences.bias_HLL is not None:
        return attend(q_NHLK, k_NGLK, v_NGLK, attn_mask=sequences.bias(i, window, q_NHLK.dtype))
    if window == FULL:
        return attend(q_NHLK, k_NGLK, v_NGLK, attn_mask=group.mask)
    if window == CAUSAL:  # padding follows a sequence, so that no token before it attends to it
        return attend(q_NHLK, k_NGLK, v_NGLK, is_causal=True)
    left, right = (L if n is None else n for n in window)
    block = max(MIN_BLOCK, left + right)
    if block >= L:
        return attend(q_NHLK, k_NGLK, v_NGLK, attn_mask=sequences.mask(i, window, L)[:, 0])
    mask_NMCS = sequences.mask(i, window, block).expand(len(q_NHLK), -1, -1, -1, -1)
    blocks = mask_NMCS.shape[1]
    behind = blocks * block - L
    q_NHMCK = F.pad(q_NHLK, (0, 0, 0, behind)).unflatten(2, (blocks, block))
    k_NGMSK, v_NGMSK = (
        F.pad(x, (0, 0, left, behind + right)).unfold(2, block + left + right, block).transpose(3, 4)
        for x in (k_NGLK, v_NGLK)
    )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_NHMCK, k_NGMSK, v_NGMSK))
    out = attend(q, k, v, attn_mask=mask_NMCS.flatten(0, 1))
    return out.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :L]


def _by_products(
    q_NHLK: Tensor,
    k_NGLK: Tensor,
    v_NGLK: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None,
) -> Tensor:
    """`scaled_dot_product_attention` as two matrix products, which keep the weights [N, H, L, L] for the backward pass;
    fewer heads of keys than of queries are repeated."""
    if (num_queries := q_NHLK.shape[1] // k_NGLK.shape[1]) > 1:
        k_NGLK, v_NGLK = (x.repeat_interleave(num_queries, dim=1) for x in (k_NGLK, v_NGLK))
    scale = q_NHLK.shape[-1] ** -0.5 if scale is None else scale
    scores_NHLL = (q_NHLK * scale) @ k_NGLK.transpose(-2, -1)
    if is_causal:
        attn_mask = scores_NHLL.new_ones(scores_NHLL.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores_NHLL = scores_NHLL.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores_NHLL = scores_NHLL + attn_mask
    return scores_NHLL.softmax(-1) @ v_NGLK
