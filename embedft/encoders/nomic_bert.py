"""NomicBERT (Nussbaum et al. 2024): nomic-embed-text-v1 and v1.5, snowflake-arctic-embed-m-long, CodeRankEmbed.

BERT with rotary positions, SwiGLU and no biases. Its checkpoints were published with GPT-2's names of fields (n_embd);
transformers 5 writes BERT's. Both load, and are saved as they were.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass
from typing import ClassVar

from .layers import GatedFeedForward
from .post_norm import UNUSED, RotaryConfig, RotaryEncoder
from .schema import Size
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "cls.")


@dataclass(frozen=True)
class NomicBertConfig(RotaryConfig):
    """The fields of config.json that the encoder uses."""

    type_vocab_size: Size = 2
    hidden_act: str = "silu"
    hidden_dropout_prob: float = 0.0
    rope_theta: float = 1000.0

    aliases: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
        "resid_pdrop": "hidden_dropout_prob",
        "rotary_emb_base": "rope_theta",
    }
    fixed: ClassVar[dict[str, object]] = {
        "activation_function": "swiglu",
        "causal": False,
        "embd_pdrop": 0.0,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "parallel_block": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        # With a factor, angles would depend on the longest text of a batch.
        "rotary_scaling_factor": None,
        "use_rms_norm": False,
    }


class NomicBert(RotaryEncoder):
    """Packed tokens -> hidden states [T, D]."""

    def __init__(self, config: NomicBertConfig):
        super().__init__(config, GatedFeedForward, bias=False)


def key_map(config: NomicBertConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    embeddings = {
        "embeddings.token": "embeddings.word_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "emb_ln",
    }
    layer = {
        "qkv": "attn.Wqkv",
        "attention_out": "attn.out_proj",
        "attention_norm": "norm1",
        "feed_forward.gate_up": {"mlp.fc12": config.intermediate_size, "mlp.fc11": config.intermediate_size},
        "feed_forward.out": "mlp.fc2",
        "feed_forward_norm": "norm2",
    }
    return embeddings | layer_keys(config.num_hidden_layers, "layers.{}.", "encoder.layers.{}.", layer)


Config, Encoder = NomicBertConfig, NomicBert  # the names every family exports
