"""What decoder families share: configuration, rotary self-attention over grouped heads, pre-norm layers.

Each family has its own options, windows and key map. Embeddings pool the hidden states of all tokens, so there is no
cache and no language model's head.

Shapes: T tokens, D hidden features, H heads of queries, G of keys and values (each serves H / G heads), K width of a
head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from .attention import CAUSAL, FULL, Sequences, Window, attention
from .layers import GatedFeedForward, Linear, RMSNorm, check_activation
from .packing import Packed
from .rotary import angles, rope_settings, rotate
from .schema import Layers, Size, check_fractions
from .weights import Keys, layer_keys


class Heads(NamedTuple):
    """How many heads attention has, and how wide each is."""

    queries: int  # H
    keys: int  # G
    width: int  # K


@dataclass(frozen=True)
class RotaryConfig:
    """The fields of config.json that all of these families have."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size  # its product with the width of a head is a dimension of a tensor
    intermediate_size: Size
    max_position_embeddings: int  # no table has as many rows
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: Size | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None  # what transformers 5 writes in place of the two before

    def __post_init__(self):
        check_fractions(self, "rms_norm_eps")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            D, H = self.hidden_size, self.num_attention_heads
            raise ValueError(f"hidden_size is {D}, expected a multiple of num_attention_heads, which is {H}")
        if self.heads.queries % self.heads.keys:
            H, G = self.heads[:2]
            raise ValueError(f"num_attention_heads is {H}, expected a multiple of num_key_value_heads, which is {G}")
        if self.heads.width % 2:
            raise ValueError(f"head_dim is {self.heads.width}, expected an even number")

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def heads(self) -> Heads:
        H = self.num_attention_heads
        return Heads(H, self.num_key_value_heads or H, self.head_dim or self.hidden_size // H)


@dataclass(frozen=True)
class DecoderConfig(RotaryConfig):
    """The fields that `Decoder` needs as well."""

    hidden_act: str = "silu"
    is_causal: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_activation(self, "hidden_act")
        rope_settings(self)

    def window(self, sliding: int | None = None) -> Window:
        """The window of a layer: without `sliding`, the whole text or, if causal, what precedes a token; else a causal
        token sees `sliding` tokens, itself included, and another that many on either side."""
        if sliding is None:
            return CAUSAL if self.is_causal else FULL
        return (sliding - 1, 0) if self.is_causal else (sliding, sliding)


class SelfAttention(nn.Module):
    """W_out softmax(scale q k^T) v, where queries and keys turn with their positions, after a norm of each head if
    `norm` makes one from its width. Source: Su et al. 2021 (RoFormer); Ainslie et al. 2023 (grouped heads); Dehghani
    et al. 2023, section 2 (norm)."""

    def __init__(
        self,
        features: int,
        heads: Heads,
        *,
        window: Window,
        bias: bool = False,
        norm: Callable[[int], nn.Module] = lambda width: nn.Identity(),
        scale: float | None = None,
    ):
        super().__init__()
        H, G, K = heads
        self.sizes, self.width, self.window, self.scale = [H * K, G * K, G * K], K, window, scale
        self.qkv = Linear(features, sum(self.sizes), bias=bias)
        self.out = Linear(H * K, features, bias=bias)
        self.query_norm, self.key_norm = norm(K), norm(K)

    def forward(self, x_TD: Tensor, sequences: Sequences, turns: tuple[Tensor, Tensor], dropout: float) -> Tensor:
        q_THK, k_TGK, v_TGK = (x.unflatten(1, (-1, self.width)) for x in self.qkv(x_TD).split(self.sizes, dim=1))
        # Under autocast, norms and turns give float32; the kernels take one dtype.
        q_THK = rotate(self.query_norm(q_THK), turns).to(v_TGK.dtype)
        k_TGK = rotate(self.key_norm(k_TGK), turns).to(v_TGK.dtype)
        options = {"window": self.window, "scale": self.scale, "dropout": dropout}
        return self.out(attention(q_THK, k_TGK, v_TGK, sequences, **options))


class Layer(nn.Module):
    """x = x + Attention(RMSNorm(x)); x = x + FeedForward(RMSNorm(x)).
    Source: Touvron et al. 2023 (LLaMA), section 2.2."""

    def __init__(self, features: int, self_attention: nn.Module, feed_forward: nn.Module, *, eps: float):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(features, eps=eps), self_attention
        self.feed_forward_norm, self.feed_forward = RMSNorm(features, eps=eps), feed_forward

    def forward(self, x_TD: Tensor, sequences: Sequences, turns: tuple[Tensor, Tensor], dropout: float) -> Tensor:
        return self.after_attention(x_TD, self.attention(self.attention_norm(x_TD), sequences, turns, dropout))

    def after_attention(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The rest of the layer (compiled.py)."""
        x_TD = x_TD + attended_TD
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class Decoder(nn.Module):
    """Packed tokens -> hidden states [T, D], after the last norm. Set `attention_dropout` to the probability to use in
    training.

    Args:
        windows: what the tokens of each layer see.
        attention_bias, feed_forward_bias: whether those linear layers add a bias.
        norm_heads: normalize each head's queries and keys."""

    def __init__(
        self,
        config: DecoderConfig,
        windows: Sequence[Window],
        *,
        attention_bias: bool = False,
        feed_forward_bias: bool = False,
        norm_heads: bool = False,
    ):
        super().__init__()
        self.config, self.rope, self.attention_dropout = config, rope_settings(config), 0.0
        D, eps, options = config.hidden_size, config.rms_norm_eps, {"bias": attention_bias}
        if norm_heads:
            options["norm"] = partial(RMSNorm, eps=eps)
        self.token = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList()
        for window in windows:
            feed_forward = GatedFeedForward(
                D, config.intermediate_size, activation=config.hidden_act, bias=feed_forward_bias
            )
            layer = Layer(D, SelfAttention(D, config.heads, window=window, **options), feed_forward, eps=eps)
            self.layers.append(layer)
        self.norm = RMSNorm(D, eps=eps)

    def forward(self, packed: Packed) -> Tensor:
        sequences, x_TD = Sequences(packed), self.token(packed.input_ids)
        turns = angles(packed.positions, width=self.config.heads.width, settings=self.rope, dtype=x_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD, sequences, turns, self.attention_dropout if self.training else 0.0)
        return self.norm(x_TD)


def decoder_keys(config: RotaryConfig, norms: dict[str, str]) -> Keys:
    """Our modules -> the checkpoint's; `norms`: those of the layers."""
    H, G, K = config.heads
    layer = norms | {
        "attention.qkv": {"self_attn.q_proj": H * K, "self_attn.k_proj": G * K, "self_attn.v_proj": G * K},
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "feed_forward.gate_up": dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size),
        "feed_forward.out": "mlp.down_proj",
    }
    whole = {"token": "embed_tokens", "norm": "norm"}
    return whole | layer_keys(config.num_hidden_layers, "layers.{}.", "layers.{}.", layer)


PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}  # of `Layer`
