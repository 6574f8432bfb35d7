"""Gemma 3, text only (Gemma Team 2025): EmbeddingGemma.

A norm before and after each part of a layer, and layers of two kinds, which turn at different rates: most see a window
of neighbouring tokens, every sixth one all tokens. EmbeddingGemma sees tokens on both sides.

Shapes: as in decoder.py.
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import CAUSAL, FULL, Sequences, Window
from .decoder import RotaryConfig, SelfAttention, decoder_keys
from .layers import GatedFeedForward, RMSNorm, check_activation
from .packing import Packed
from .rotary import angles, rope_settings
from .schema import GLOBAL, LOCAL, Size, check_layer_types
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = ("lm_head.", "score.")


@dataclass(frozen=True)
class Gemma3Config(RotaryConfig):
    """The fields of config.json that the encoder uses."""

    head_dim: Size = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256.0  # queries are divided by its square root
    sliding_window: int = 4096  # tokens that one of a local layer sees, itself included; if bidirectional, half a side
    sliding_window_pattern: int = 6  # one layer in this many sees all tokens, unless `layer_types` lists them
    layer_types: list | None = None
    use_bidirectional_attention: bool = False
    rope_local_base_freq: float | None = None  # the local layers' `rope_theta`
    fixed: ClassVar[dict[str, object]] = {"attn_logit_softcapping": None, "is_causal": True}

    def __post_init__(self):
        super().__post_init__()
        check_layer_types(self)
        check_activation(self, "hidden_activation")
        if self.query_pre_attn_scalar <= 0:
            raise ValueError(f"query_pre_attn_scalar is {str(self.query_pre_attn_scalar)[:60]}, expected more than 0")
        self.ropes()

    def kinds(self) -> list[str]:
        """GLOBAL or LOCAL, for each layer."""
        if self.layer_types is not None:
            return self.layer_types
        return [LOCAL if i % self.sliding_window_pattern else GLOBAL for i in range(1, self.num_hidden_layers + 1)]

    def windows(self) -> dict[str, Window]:
        """The window of each kind of layer."""
        if not self.use_bidirectional_attention:
            return {GLOBAL: CAUSAL, LOCAL: (self.sliding_window - 1, 0)}
        return {GLOBAL: FULL, LOCAL: (self.sliding_window // 2, self.sliding_window // 2)}

    def ropes(self) -> dict[str, dict[str, Any]]:
        """The rotary settings of each kind of layer; `rope_scaling` is for the global ones alone."""
        local = SimpleNamespace(rope_parameters=self.rope_parameters, rope_theta=self.rope_local_base_freq)
        return {
            GLOBAL: rope_settings(self, theta=1_000_000.0, layer_type=GLOBAL),
            LOCAL: rope_settings(local, theta=10_000.0, layer_type=LOCAL),
        }


class Layer(nn.Module):
    """x = x + RMSNorm(Attention(RMSNorm(x))); x = x + RMSNorm(FeedForward(RMSNorm(x)))."""

    def __init__(self, config: Gemma3Config, kind: str):
        super().__init__()
        D, self.kind, norm = config.hidden_size, kind, partial(RMSNorm, eps=config.rms_norm_eps, offset=1.0)
        self.attention = SelfAttention(
            D,
            config.heads,
            window=config.windows()[kind],
            bias=config.attention_bias,
            norm=norm,
            scale=config.query_pre_attn_scalar**-0.5,
        )
        self.feed_forward = GatedFeedForward(D, config.intermediate_size, activation=config.hidden_activation)
        self.attention_norm, self.attention_out_norm = norm(D), norm(D)
        self.feed_forward_norm, self.feed_forward_out_norm = norm(D), norm(D)

    def forward(self, x_TD: Tensor, sequences: Sequences, turns: tuple[Tensor, Tensor], dropout: float) -> Tensor:
        return self.after_attention(x_TD, self.attention(self.attention_norm(x_TD), sequences, turns, dropout))

    def after_attention(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The rest of the layer (compiled.py)."""
        x_TD = x_TD + self.attention_out_norm(attended_TD)
        return x_TD + self.feed_forward_out_norm(self.feed_forward(self.feed_forward_norm(x_TD)))


class Gemma3(nn.Module):
    """Packed tokens -> hidden states [T, D], after the last norm. Set `attention_dropout` to the probability to use in
    training."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config, self.ropes, self.attention_dropout = config, config.ropes(), 0.0
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.kinds())
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, offset=1.0)

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.token(packed.input_ids)
        # The factor is rounded before it multiplies, as in training: 27.75 instead of 27.71 in bfloat16.
        x_TD = x_TD * torch.tensor(self.config.hidden_size**0.5, dtype=x_TD.dtype).item()
        options = {"width": self.config.heads.width, "dtype": x_TD.dtype}
        turns = {kind: angles(packed.positions, settings=rope, **options) for kind, rope in self.ropes.items()}
        sequences, dropout = Sequences(packed), self.attention_dropout if self.training else 0.0
        for layer in self.layers:
            x_TD = layer(x_TD, sequences, turns[layer.kind], dropout)
        return self.norm(x_TD)


def key_map(config: Gemma3Config) -> Keys:
    """Our modules -> the checkpoint's."""
    norms = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_out_norm": "post_feedforward_layernorm",
    }
    return decoder_keys(config, norms)


Config, Encoder = Gemma3Config, Gemma3  # the names every family exports
