"""BERT (Devlin et al. 2019): bge, e5, gte, MiniLM, mxbai, snowflake-arctic-embed.

No pooler, no heads.

    config = BertConfig(vocab_size=30522, hidden_size=384, ...)     # the fields of config.json
    hidden_TD = Bert(config)(packed)

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Sequences
from .packing import Packed
from .post_norm import UNUSED, Embeddings, bert_keys, check_settings, make_layers, run_layers
from .schema import Layers, Size
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "cls.")


@dataclass(frozen=True)
class BertConfig:
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
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    def __post_init__(self):
        check_settings(self)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings


class Bert(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        D, options = config.hidden_size, {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        self.embeddings = Embeddings(*rows, D, **options)
        sizes = config.num_hidden_layers, D, config.intermediate_size, config.num_attention_heads
        self.layers = make_layers(*sizes, activation=config.hidden_act, **options)

    def forward(self, packed: Packed) -> Tensor:
        return run_layers(self.layers, self.embeddings(packed), Sequences(packed), self.attention_dropout)


def key_map(config: BertConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return bert_keys(config.hidden_size, config.num_hidden_layers)


Config, Encoder = BertConfig, Bert  # the names every family exports
