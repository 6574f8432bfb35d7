"""ELECTRA (Clark et al. 2020): its discriminators, and the embedding models and rerankers trained from them.

BERT whose token vectors may be narrower than its layers; a linear map then widens them.

Shapes: T tokens, D hidden features, E features of the token vectors.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Sequences
from .layers import Linear
from .packing import Packed
from .post_norm import UNUSED, BertLike, BertLikeConfig, bert_keys, run_layers
from .schema import Size
from .weights import Keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "discriminator_predictions.", "generator_predictions.", "generator_lm_head.")


@dataclass(frozen=True)
class ElectraConfig(BertLikeConfig):
    """The fields of config.json that the encoder uses."""

    embedding_size: Size = 128


class Electra(BertLike):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: ElectraConfig):
        super().__init__(config, embedding_size=config.embedding_size)
        D, E = config.hidden_size, config.embedding_size
        self.widen = Linear(E, D) if E != D else nn.Identity()

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.widen(self.embeddings(packed))
        return run_layers(self.layers, x_TD, Sequences(packed), self.attention_dropout)


def key_map(config: ElectraConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    return {"widen": "embeddings_project"} | bert_keys(config.hidden_size, config.num_hidden_layers)


Config, Encoder = ElectraConfig, Electra  # the names every family exports
