"""GTE's second encoder (Zhang et al. 2024, mGTE): gte-base and gte-large-en-v1.5, gte-multilingual-base,
snowflake-arctic-embed-m-v2.0. Checkpoints call it "new" or "gte".

BERT with rotary positions and GeGLU.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .layers import GatedFeedForward
from .packing import Packed
from .post_norm import UNUSED, Embeddings, RotaryLayer, check_settings, run_rotary_layers
from .rotary import check_heads, rope_settings
from .schema import Layers, Rows, Size
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "lm_head.")


@dataclass(frozen=True)
class GteConfig:
    """The fields of config.json that the encoder uses."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: int
    intermediate_size: Size
    max_position_embeddings: int  # no table has as many rows
    type_vocab_size: Rows = 1
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    rope_theta: float = 160_000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None

    fixed: ClassVar[dict[str, object]] = {
        "layer_norm_type": "layer_norm",
        "logn_attention_scale": False,
        "pack_qkv": True,
        "position_embedding_type": "rope",
    }

    def __post_init__(self):
        check_settings(self)
        check_heads(self)
        rope_settings(self)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings


class Gte(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: GteConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        self.rope = rope_settings(config)
        D, dropout = config.hidden_size, config.hidden_dropout_prob
        options = {"eps": config.layer_norm_eps, "dropout": dropout}
        self.embeddings = Embeddings(config.vocab_size, 0, config.type_vocab_size, D, **options)
        gated = {"activation": config.hidden_act, "out_bias": True, "up_first": True, "dropout": dropout}
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            feed_forward = GatedFeedForward(D, config.intermediate_size, **gated)
            self.layers.append(RotaryLayer(D, config.num_attention_heads, feed_forward, bias=True, **options))

    def forward(self, packed: Packed) -> Tensor:
        return run_rotary_layers(self.layers, packed, self.embeddings(packed), self.rope, self.attention_dropout)


def key_map(config: GteConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    embeddings = {
        "embeddings.token": "embeddings.word_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    }
    layer = {
        "qkv": "attention.qkv_proj",
        "attention_out": "attention.o_proj",
        "attention_norm": "attn_ln",
        "feed_forward.gate_up": "mlp.up_gate_proj",
        "feed_forward.out": "mlp.down_proj",
        "feed_forward_norm": "mlp_ln",
    }
    return embeddings | layer_keys(config.num_hidden_layers, "layers.{}.", "encoder.layer.{}.", layer)


Config, Encoder = GteConfig, Gte  # the names every family exports
