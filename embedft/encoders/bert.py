"""BERT (Devlin et al. 2019): token, position and segment embeddings, then post-norm transformer layers.

No pooler, no heads. Dropout of attention weights is off by default: it rules out the fused kernels of CPU and CUDA.

    config = BertConfig(vocab_size=30522, hidden_size=384, ...)     # the fields of config.json
    hidden_TD = Bert(config)(packed)

Shapes: T tokens, D hidden features, F feed-forward features, H heads, K = D / H.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Dropout, Linear
from .packing import Packed, Sequences, attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

# Our names -> the checkpoint's; several tensors are stacked into one matrix, in this order.
KEYS = {
    "token.weight": "word_embeddings.weight",
    "position.weight": "position_embeddings.weight",
    "token_type.weight": "token_type_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}
LAYER_KEYS = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward_in": ("intermediate.dense",),
    "feed_forward_out": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}
# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = ("pooler.", "embeddings.position_ids", "cls.")
# Names in older checkpoints, and in those saved from a model with a head.
PREFIX = "bert."
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class BertConfig:
    """The fields of config.json that the encoder uses."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    def __post_init__(self):
        for name in ("layer_norm_eps", "hidden_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {str(getattr(self, name))[:60]}, expected 0 to 1")
        if (D := self.hidden_size) % (H := self.num_attention_heads):
            raise ValueError(f"hidden_size is {D}, expected a multiple of num_attention_heads, which is {H}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act[:60]!r}, expected one of {', '.join(ACTIVATIONS)}")
        if self.position_embedding_type != "absolute":
            raise ValueError(f"position_embedding_type is {self.position_embedding_type[:60]!r}, expected 'absolute'")
        if self.is_decoder:
            raise ValueError("is_decoder is true, but attention here is bidirectional")

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings


class Embeddings(nn.Module):
    """LayerNorm(token + position + segment), then dropout."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, packed: Packed) -> Tensor:
        token_types = self.token_type.weight[0] if packed.token_types is None else self.token_type(packed.token_types)
        return self.dropout(self.norm(self.token(packed.input_ids) + token_types + self.position(packed.positions)))


class Layer(nn.Module):
    """x = LayerNorm(x + Attention(x)); x = LayerNorm(x + W2 act(W1 x))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(D, 3 * D)
        self.attention_out = Linear(D, D)
        self.attention_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.feed_forward_in = Linear(D, F_)
        self.feed_forward_out = Linear(F_, D)
        self.feed_forward_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x_TD: Tensor, sequences: Sequences, attention_dropout: float) -> Tensor:
        qkv_T3HK = self.qkv(x_TD).view(len(x_TD), 3, self.num_heads, -1)
        attended_TD = attention(qkv_T3HK, sequences, dropout=attention_dropout)
        x_TD = self.attention_norm(x_TD + self.dropout(self.attention_out(attended_TD)))
        activated_TF = self.activation(self.feed_forward_in(x_TD))
        return self.feed_forward_norm(x_TD + self.dropout(self.feed_forward_out(activated_TF)))


class Bert(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, packed: Packed) -> Tensor:
        sequences = Sequences(packed)
        x_TD = self.embeddings(packed)
        for layer in self.layers:
            x_TD = layer(x_TD, sequences, self.attention_dropout if self.training else 0.0)
        return x_TD


def key_map(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Maps every parameter of `Bert` to the checkpoint tensors that are stacked into it along the first dimension."""
    keys = {f"embeddings.{ours}": (f"embeddings.{theirs}",) for ours, theirs in KEYS.items()}
    for i in range(config.num_hidden_layers):
        for ours, theirs in LAYER_KEYS.items():
            for kind in ("weight", "bias"):
                keys[f"layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{name}.{kind}" for name in theirs)
    return keys


Config, Encoder = BertConfig, Bert  # the names every family exports
