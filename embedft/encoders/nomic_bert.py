"""NomicBERT (Nussbaum et al. 2024): nomic-embed-text-v1 and v1.5, snowflake-arctic-embed-m-long, CodeRankEmbed.

BERT with rotary positions, SwiGLU and no biases. Its checkpoints were published with GPT-2's names of fields (n_embd);
transformers 5 writes BERT's. Both load, and are saved as they were.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .layers import GatedFeedForward
from .packing import Packed
from .post_norm import UNUSED, Embeddings, RotaryLayer, check_settings, run_rotary_layers
from .rotary import check_heads, rope_settings
from .schema import Layers, Size
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "cls.")


@dataclass(frozen=True)
class NomicBertConfig:
    """The fields of config.json that the encoder uses."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: int
    intermediate_size: Size
    max_position_embeddings: int  # no table has as many rows
    type_vocab_size: Size = 2
    hidden_act: str = "silu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    rope_theta: float = 1000.0
    rope_parameters: dict | None = None

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

    def __post_init__(self):
        check_settings(self)
        check_heads(self)
        rope_settings(self)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings


class NomicBert(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: NomicBertConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        self.rope = rope_settings(config)
        D, options = config.hidden_size, {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        self.embeddings = Embeddings(config.vocab_size, 0, config.type_vocab_size, D, **options)
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            feed_forward = GatedFeedForward(D, config.intermediate_size, activation=config.hidden_act)
            self.layers.append(RotaryLayer(D, config.num_attention_heads, feed_forward, bias=False, **options))

    def forward(self, packed: Packed) -> Tensor:
        return run_rotary_layers(self.layers, packed, self.embeddings(packed), self.rope, self.attention_dropout)


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
