"""Qwen3 (Yang et al. 2025): Qwen3-Embedding.

Llama with normalized queries and keys. Its embeddings are pooled from the last token, and its queries have prompts that
state the task.

Shapes: as in decoder.py.
"""

from dataclasses import dataclass

from .decoder import PRE_NORMS, Decoder, DecoderConfig, decoder_keys
from .schema import LOCAL, Index, Size, check_layer_types
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = ("lm_head.", "score.")


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """The fields of config.json that the encoder uses."""

    head_dim: Size = 128
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = None  # how many tokens each token of a local layer sees, itself included
    max_window_layers: Index = 28  # the first layer with a window, unless `layer_types` lists them
    layer_types: list | None = None

    def __post_init__(self):
        super().__post_init__()
        check_layer_types(self)
        if LOCAL in (self.layer_types or ()) and not (self.use_sliding_window and self.sliding_window):
            raise ValueError(f"layer_types has {LOCAL}, expected use_sliding_window and a sliding_window with it")

    def sliding_windows(self) -> list[int | None]:
        """How many tokens a token of each layer sees, itself included; None: no limit."""
        if self.layer_types is not None:
            return [self.sliding_window if kind == LOCAL else None for kind in self.layer_types]
        window = self.sliding_window if self.use_sliding_window else None
        return [window if i >= self.max_window_layers else None for i in range(self.num_hidden_layers)]


class Qwen3(Decoder):
    """Packed tokens -> hidden states [T, D]."""

    def __init__(self, config: Qwen3Config):
        windows = list(map(config.window, config.sliding_windows()))
        super().__init__(config, windows, attention_bias=config.attention_bias, norm_heads=True)


def key_map(config: Qwen3Config) -> Keys:
    """Our modules -> the checkpoint's."""
    return decoder_keys(config, PRE_NORMS)


Config, Encoder = Qwen3Config, Qwen3  # the names every family exports
