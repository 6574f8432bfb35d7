"""The post-norm transformer that BERT, RoBERTa, DistilBERT, ELECTRA and MPNet share: embeddings, positions and layers.
NomicBERT and GTE share its embeddings, and a layer with rotary positions.

Each family has its own configuration and key map. Dropout of attention weights is off by default: it rules
out the fused kernels of CPU and CUDA.

Shapes: T tokens, D hidden features, F feed-forward features, H heads, K = D / H, L tokens of the longest sequence.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .attention import Sequences, attention
from .layers import ACTIVATIONS, Dropout, Linear, check_activation
from .packing import Packed
from .rotary import angles, rotate
from .schema import check_fractions
from .weights import Keys, layer_keys

# Tensors of checkpoints that no encoder uses, in every family: heads, and a table of 0, 1, 2, ... that is no weight.
UNUSED = ("pooler.", "classifier.", "qa_outputs.", "embeddings.position_ids")


class Embeddings(nn.Module):
    """LayerNorm(token + position + segment), then dropout. A table of 0 rows is left out: `num_positions` is 0 where
    layers have rotary positions."""

    def __init__(
        self, vocab_size: int, num_positions: int, num_token_types: int, features: int, *, eps: float, dropout: float
    ):
        super().__init__()
        self.token = nn.Embedding(vocab_size, features)
        self.position = nn.Embedding(num_positions, features) if num_positions else None
        self.token_type = nn.Embedding(num_token_types, features) if num_token_types else None
        self.norm = nn.LayerNorm(features, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(self, packed: Packed, positions_T: Tensor | None = None) -> Tensor:
        """[T, D]; `positions_T`: rows of the position table, None: the tokens' positions in their sequences."""
        x_TD = self.token(packed.input_ids)
        if self.token_type is not None:
            types = packed.token_types
            x_TD = x_TD + (self.token_type.weight[0] if types is None else self.token_type(types))
        if self.position is not None:
            x_TD = x_TD + self.position(packed.positions if positions_T is None else positions_T)
        return self.dropout(self.norm(x_TD))


def positions_behind_padding(packed: Packed, padding: int) -> Tensor:
    """[T]: `padding` plus the number of other tokens up to this one in its sequence; `padding` at padding tokens.
    Source: fairseq, `utils.make_positions`."""
    is_text_T = (packed.input_ids != padding).long()
    count_T = is_text_T.cumsum(0)
    before_B = (count_T - is_text_T)[packed.cu_seqlens[:-1].long()]
    return padding + is_text_T * (count_T - before_B.repeat_interleave(packed.lengths(), output_size=len(count_T)))


class Layer(nn.Module):
    """x = LayerNorm(x + Attention(x)); x = LayerNorm(x + W2 act(W1 x)). Source: Vaswani et al. 2017, section 3.1.
    In training, what is added to x goes through dropout; without `drops_attended`, attention's output does not."""

    def __init__(
        self,
        features: int,
        inner: int,
        num_heads: int,
        *,
        activation: str,
        eps: float,
        dropout: float,
        drops_attended: bool = True,
    ):
        super().__init__()
        self.num_heads, self.drops_attended = num_heads, drops_attended
        self.qkv = Linear(features, 3 * features)
        self.attention_out = Linear(features, features)
        self.attention_norm = nn.LayerNorm(features, eps=eps)
        self.feed_forward_in = Linear(features, inner)
        self.feed_forward_out = Linear(inner, features)
        self.feed_forward_norm = nn.LayerNorm(features, eps=eps)
        self.activation = ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)

    def forward(self, x_TD: Tensor, sequences: Sequences, attention_dropout: float) -> Tensor:
        q_THK, k_THK, v_THK = self.qkv(x_TD).view(len(x_TD), 3, self.num_heads, -1).unbind(1)
        attended_TD = attention(q_THK, k_THK, v_THK, sequences, dropout=attention_dropout)
        attended_TD = self.attention_out(attended_TD)
        x_TD = self.attention_norm(x_TD + (self.dropout(attended_TD) if self.drops_attended else attended_TD))
        activated_TF = self.activation(self.feed_forward_in(x_TD))
        return self.feed_forward_norm(x_TD + self.dropout(self.feed_forward_out(activated_TF)))


def make_layers(num_layers: int, *sizes: int, **options) -> nn.ModuleList:
    """`Layer`s of the same sizes and options."""
    return nn.ModuleList(Layer(*sizes, **options) for _ in range(num_layers))


def run_layers(layers: nn.ModuleList, x_TD: Tensor, sequences: Sequences, attention_dropout: float) -> Tensor:
    """The hidden states after `layers`, one after the other, [T, D]; attention drops weights in training only."""
    for layer in layers:
        x_TD = layer(x_TD, sequences, attention_dropout if layer.training else 0.0)
    return x_TD


class RotaryLayer(nn.Module):
    """x = LayerNorm(x + Attention(x)); x = LayerNorm(x + FeedForward(x)), with queries and keys turned by position."""

    def __init__(
        self, features: int, num_heads: int, feed_forward: nn.Module, *, bias: bool, eps: float, dropout: float
    ):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(features, 3 * features, bias=bias)
        self.attention_out = Linear(features, features, bias=bias)
        self.attention_norm = nn.LayerNorm(features, eps=eps)
        self.feed_forward = feed_forward
        self.feed_forward_norm = nn.LayerNorm(features, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(
        self, x_TD: Tensor, sequences: Sequences, turns: tuple[Tensor, Tensor], attention_dropout: float
    ) -> Tensor:
        q_THK, k_THK, v_THK = self.qkv(x_TD).view(len(x_TD), 3, self.num_heads, -1).unbind(1)
        q_THK, k_THK = rotate(q_THK, turns), rotate(k_THK, turns)
        attended_TD = attention(q_THK, k_THK, v_THK, sequences, dropout=attention_dropout)
        x_TD = self.attention_norm(x_TD + self.dropout(self.attention_out(attended_TD)))
        return self.feed_forward_norm(x_TD + self.dropout(self.feed_forward(x_TD)))


def run_rotary_layers(
    layers: nn.ModuleList, packed: Packed, x_TD: Tensor, rope: Mapping[str, Any], attention_dropout: float
) -> Tensor:
    """What `run_layers` does, for `RotaryLayer`s with the settings `rope` (`rope_settings`)."""
    width = x_TD.shape[1] // layers[0].num_heads
    sequences, turns = Sequences(packed), angles(packed.positions, width=width, settings=rope, dtype=x_TD.dtype)
    for layer in layers:
        x_TD = layer(x_TD, sequences, turns, attention_dropout if layer.training else 0.0)
    return x_TD


def check_settings(config: object, **names: str) -> None:
    """Raises `ValueError` naming an invalid field among those of BERT's configuration.
    `names`: the family's names of fields by BERT's, where they differ."""

    def name(field: str) -> str:
        return names.get(field, field)

    check_fractions(config, name("layer_norm_eps"), name("hidden_dropout_prob"))
    size, heads = name("hidden_size"), name("num_attention_heads")
    if (D := getattr(config, size)) % (H := getattr(config, heads)):
        raise ValueError(f"{size} is {D}, expected a multiple of {heads}, which is {H}")
    check_activation(config, name("hidden_act"))
    if (kind := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"position_embedding_type is {kind[:60]!r}, expected 'absolute'")
    if getattr(config, "is_decoder", False):
        raise ValueError("is_decoder is true, but attention here is bidirectional")


def bert_keys(D: int, num_layers: int) -> Keys:
    """Our modules -> those of the checkpoints of BERT, RoBERTa and ELECTRA."""
    embeddings = {
        "embeddings.token": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    }
    layer = {
        "qkv": {"attention.self.query": D, "attention.self.key": D, "attention.self.value": D},
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feed_forward_in": "intermediate.dense",
        "feed_forward_out": "output.dense",
        "feed_forward_norm": "output.LayerNorm",
    }
    return embeddings | layer_keys(num_layers, "layers.{}.", "encoder.layer.{}.", layer)
