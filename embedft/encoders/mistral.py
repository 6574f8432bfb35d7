"""Mistral (Jiang et al. 2023): e5-mistral, SFR-Embedding-Mistral, Linq-Embed-Mistral.

Llama, whose tokens may see only a window of those before them.

Shapes: as in decoder.py.
"""

from dataclasses import dataclass

from .decoder import PRE_NORMS, Decoder, DecoderConfig, decoder_keys
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = ("lm_head.", "score.")


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """The fields of config.json that the encoder uses."""

    sliding_window: int | None = None  # how many tokens each token sees, itself included; None: no limit


class Mistral(Decoder):
    """Packed tokens -> hidden states [T, D]."""

    def __init__(self, config: MistralConfig):
        super().__init__(config, [config.window(config.sliding_window)] * config.num_hidden_layers)


def key_map(config: MistralConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return decoder_keys(config, PRE_NORMS)


Config, Encoder = MistralConfig, Mistral  # the names every family exports
