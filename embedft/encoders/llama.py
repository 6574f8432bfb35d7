"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): the decoder that others start from.

Shapes: as in decoder.py.
"""

from dataclasses import dataclass

from .decoder import PRE_NORMS, Decoder, DecoderConfig, decoder_keys
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = ("lm_head.", "score.")


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """The fields of config.json that the encoder uses."""

    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(Decoder):
    """Packed tokens -> hidden states [T, D]."""

    def __init__(self, config: LlamaConfig):
        windows = [config.window()] * config.num_hidden_layers
        biases = {"attention_bias": config.attention_bias, "feed_forward_bias": config.mlp_bias}
        super().__init__(config, windows, **biases)


def key_map(config: LlamaConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return decoder_keys(config, PRE_NORMS)


Config, Encoder = LlamaConfig, Llama  # the names every family exports
