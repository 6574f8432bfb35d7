"""BERT (Devlin et al. 2019): bge, e5, gte, MiniLM, mxbai, snowflake-arctic-embed.

No pooler, no heads.

    config = BertConfig(vocab_size=30522, hidden_size=384, ...)     # the fields of config.json
    hidden_TD = Bert(config)(packed)

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass

from torch import Tensor

from .attention import Sequences
from .packing import Packed
from .post_norm import UNUSED, BertLike, BertLikeConfig, bert_keys, run_layers
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "cls.")


@dataclass(frozen=True)
class BertConfig(BertLikeConfig):
    """The fields of config.json that the encoder uses."""


class Bert(BertLike):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def forward(self, packed: Packed) -> Tensor:
        return run_layers(self.layers, self.embeddings(packed), Sequences(packed), self.attention_dropout)


def key_map(config: BertConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return bert_keys(config.hidden_size, config.num_hidden_layers)


Config, Encoder = BertConfig, Bert  # the names every family exports
