"""DistilBERT (Sanh et al. 2019): multi-qa-distilbert, msmarco-distilbert, distiluse.

BERT without token types, and without dropout between attention and the residual.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Sequences
from .packing import Packed
from .post_norm import UNUSED, Embeddings, check_settings, make_layers, run_layers
from .schema import Layers, Size
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "pre_classifier.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")


@dataclass(frozen=True)
class DistilBertConfig:
    """The fields of config.json that the encoder uses."""

    vocab_size: Size
    dim: Size
    n_layers: Layers
    n_heads: int
    hidden_dim: Size
    max_position_embeddings: Size
    activation: str = "gelu"
    dropout: float = 0.1
    layer_norm_eps = 1e-12  # not a field

    def __post_init__(self):
        names = {"hidden_size": "dim", "num_attention_heads": "n_heads"}
        check_settings(self, **names, hidden_act="activation", hidden_dropout_prob="dropout")

    @property
    def hidden_size(self) -> int:
        return self.dim

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings


class DistilBert(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        options = {"eps": config.layer_norm_eps, "dropout": config.dropout}
        self.embeddings = Embeddings(config.vocab_size, config.max_position_embeddings, 0, config.dim, **options)
        sizes = config.n_layers, config.dim, config.hidden_dim, config.n_heads
        self.layers = make_layers(*sizes, activation=config.activation, drops_attended=False, **options)

    def forward(self, packed: Packed) -> Tensor:
        return run_layers(self.layers, self.embeddings(packed), Sequences(packed), self.attention_dropout)


def key_map(config: DistilBertConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    embeddings = {
        "embeddings.token": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    }
    D = config.dim
    layer = {
        "qkv": {"attention.q_lin": D, "attention.k_lin": D, "attention.v_lin": D},
        "attention_out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "feed_forward_in": "ffn.lin1",
        "feed_forward_out": "ffn.lin2",
        "feed_forward_norm": "output_layer_norm",
    }
    return embeddings | layer_keys(config.n_layers, "layers.{}.", "transformer.layer.{}.", layer)


Config, Encoder = DistilBertConfig, DistilBert  # the names every family exports
