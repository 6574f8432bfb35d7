"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): bge-m3, multilingual-e5, arctic-embed-l-v2.0.

BERT with other positions: they start behind the padding token's row of the position table, and padding tokens in a text
have that row and do not count.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Sequences
from .packing import Packed
from .post_norm import UNUSED, Embeddings, bert_keys, check_settings, make_layers, positions_behind_padding, run_layers
from .schema import Index, Layers, Size
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "lm_head.")


@dataclass(frozen=True)
class RobertaConfig:
    """The fields of config.json that the encoder uses."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: int
    intermediate_size: Size
    max_position_embeddings: Size
    type_vocab_size: Size = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    pad_token_id: Index = 1
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    def __post_init__(self):
        check_settings(self)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


class Roberta(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        D, options = config.hidden_size, {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        self.embeddings = Embeddings(*rows, D, **options)
        sizes = config.num_hidden_layers, D, config.intermediate_size, config.num_attention_heads
        self.layers = make_layers(*sizes, activation=config.hidden_act, **options)

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.embeddings(packed, positions_behind_padding(packed, self.config.pad_token_id))
        return run_layers(self.layers, x_TD, Sequences(packed), self.attention_dropout)


def key_map(config: RobertaConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return bert_keys(config.hidden_size, config.num_hidden_layers)


Config, Encoder = RobertaConfig, Roberta  # the names every family exports
