"""The post-norm transformer that BERT, RoBERTa, DistilBERT, ELECTRA and MPNet share: embeddings, positions and layers.
NomicBERT and GTE share its embeddings, and a layer with rotary positions.

Dropout of attention weights is off by default: it rules out the fused kernels of CPU and CUDA.

Shapes: T tokens, D hidden features, F feed-forward features, H heads, K = D / H, L tokens of the longest sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Sequences, attention
from .layers import Dropout, Linear, check_activation
from .packing import Packed
from .rotary import angles, check_heads, rope_settings, rotate
from .schema import Layers, Rows, Size, check_fractions
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
        self.activation = activation
        self.dropout = Dropout(dropout)

    def forward(self, x_TD: Tensor, sequences: Sequences, attention_dropout: float) -> Tensor:
        q_THK, k_THK, v_THK = self.qkv(x_TD).view(len(x_TD), 3, self.num_heads, -1).unbind(1)
        return self.after_attention(x_TD, attention(q_THK, k_THK, v_THK, sequences, dropout=attention_dropout))

    def after_attention(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The rest of the layer (compiled.py)."""
        attended_TD = self.attention_out(attended_TD)
        x_TD = self.attention_norm(x_TD + (self.dropout(attended_TD) if self.drops_attended else attended_TD))
        activated_TF = self.feed_forward_in.activated(x_TD, self.activation)
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
        return self.after_attention(x_TD, attention(q_THK, k_THK, v_THK, sequences, dropout=attention_dropout))

    def after_attention(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The rest of the layer (compiled.py)."""
        x_TD = self.attention_norm(x_TD + self.dropout(self.attention_out(attended_TD)))
        return self.feed_forward_norm(x_TD + self.dropout(self.feed_forward(x_TD)))


@dataclass(frozen=True)
class PostNormConfig:
    """The fields of config.json that all of these families have, DistilBERT under other names."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: int
    intermediate_size: Size
    max_position_embeddings: Size
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1

    def __post_init__(self):
        check_settings(self)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings


@dataclass(frozen=True)
class RotaryConfig(PostNormConfig):
    """The fields of config.json that NomicBERT and GTE have in common."""

    max_position_embeddings: int  # no table has as many rows
    type_vocab_size: Rows = 2
    rope_theta: float = 10_000.0
    rope_parameters: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        check_heads(self)
        rope_settings(self)


class RotaryEncoder(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training.
    `make_feed_forward`: (D, inner features, activation=name) -> a layer's second part; `bias`: of the first."""

    def __init__(self, config: RotaryConfig, make_feed_forward: Callable[..., nn.Module], *, bias: bool):
        super().__init__()
        self.config, self.attention_dropout, self.rope = config, 0.0, rope_settings(config)
        D, options = config.hidden_size, {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        self.embeddings = Embeddings(config.vocab_size, 0, config.type_vocab_size, D, **options)
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            feed_forward = make_feed_forward(D, config.intermediate_size, activation=config.hidden_act)
            self.layers.append(RotaryLayer(D, config.num_attention_heads, feed_forward, bias=bias, **options))

    def forward(self, packed: Packed) -> Tensor:
        sequences, x_TD = Sequences(packed), self.embeddings(packed)
        width = self.config.hidden_size // self.config.num_attention_heads
        turns = angles(packed.positions, width=width, settings=self.rope, dtype=x_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD, sequences, turns, self.attention_dropout if self.training else 0.0)
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


@dataclass(frozen=True)
class BertLikeConfig(PostNormConfig):
    """The fields of config.json that BERT, RoBERTa and ELECTRA have in common."""

    type_vocab_size: Size = 2
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.position_embedding_type != "absolute":
            raise ValueError(f"position_embedding_type is {self.position_embedding_type[:60]!r}, expected 'absolute'")
        if self.is_decoder:
            raise ValueError("is_decoder is true, but attention here is bidirectional")


class BertLike(nn.Module):
    """The parts of BERT, RoBERTa and ELECTRA, which each of them joins. Set `attention_dropout` to the probability to
    use in training. `embedding_size`: the width of token vectors; None: that of the layers."""

    def __init__(self, config: BertLikeConfig, *, embedding_size: int | None = None):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        D, options = config.hidden_size, {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        self.embeddings = Embeddings(*rows, embedding_size or D, **options)
        sizes = config.num_hidden_layers, D, config.intermediate_size, config.num_attention_heads
        self.layers = make_layers(*sizes, activation=config.hidden_act, **options)


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
