"""GTE's second encoder (Zhang et al. 2024, mGTE): gte-base and gte-large-en-v1.5, gte-multilingual-base,
snowflake-arctic-embed-m-v2.0. Checkpoints call it "new" or "gte".

BERT with rotary positions and GeGLU.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from .layers import GatedFeedForward
from .post_norm import UNUSED, RotaryConfig, RotaryEncoder
from .schema import Rows
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "lm_head.")


@dataclass(frozen=True)
class GteConfig(RotaryConfig):
    """The fields of config.json that the encoder uses."""

    type_vocab_size: Rows = 1
    rope_theta: float = 160_000.0
    rope_scaling: dict | None = None

    fixed: ClassVar[dict[str, object]] = {
        "layer_norm_type": "layer_norm",
        "logn_attention_scale": False,
        "pack_qkv": True,
        "position_embedding_type": "rope",
    }


class Gte(RotaryEncoder):
    """Packed tokens -> hidden states [T, D]."""

    def __init__(self, config: GteConfig):
        gated = {"out_bias": True, "up_first": True, "dropout": config.hidden_dropout_prob}
        super().__init__(config, partial(GatedFeedForward, **gated), bias=True)


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
