"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): bge-m3, multilingual-e5, arctic-embed-l-v2.0.

BERT with other positions: they start behind the padding token's row of the position table, and padding tokens in a text
have that row and do not count.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass

from torch import Tensor

from .attention import Sequences
from .packing import Packed
from .post_norm import UNUSED, BertLike, BertLikeConfig, bert_keys, positions_behind_padding, run_layers
from .schema import Index
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "lm_head.")


@dataclass(frozen=True)
class RobertaConfig(BertLikeConfig):
    """The fields of config.json that the encoder uses."""

    pad_token_id: Index = 1

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


class Roberta(BertLike):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.embeddings(packed, positions_behind_padding(packed, self.config.pad_token_id))
        return run_layers(self.layers, x_TD, Sequences(packed), self.attention_dropout)


def key_map(config: RobertaConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return bert_keys(config.hidden_size, config.num_hidden_layers)


Config, Encoder = RobertaConfig, Roberta  # the names every family exports
