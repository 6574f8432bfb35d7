"""ModernBERT (Warner et al. 2024): gte-modernbert, granite-embedding r2, modernbert-embed, mmBERT.

Pre-norm layers with rotary positions and GeGLU. Most see a window of neighbouring tokens, every third one all tokens;
the two kinds turn at different rates.

Shapes: T tokens, D hidden features.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import FULL, Sequences, Window, attention
from .layers import Dropout, GatedFeedForward, Linear, check_activation
from .packing import Packed
from .rotary import angles, check_heads, rope_settings, rotate
from .schema import GLOBAL, LOCAL, Layers, Size, check_fractions, check_layer_types
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = ("head.", "decoder.", "classifier.")


@dataclass(frozen=True)
class ModernBertConfig:
    """The fields of config.json that the encoder uses. Checkpoints were published with `global_attn_every_n_layers` and
    two `rope_theta`s; transformers 5 writes `layer_types` and `rope_parameters`, which prevail."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: int
    intermediate_size: Size
    max_position_embeddings: int  # no table has as many rows
    hidden_activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0  # of what attention gives; `ModernBert.attention_dropout` is that of its weights
    embedding_dropout: float = 0.0
    mlp_dropout: float = 0.0
    local_attention: int = 128  # tokens of a window, half of them on either side
    layer_types: list | None = None
    global_attn_every_n_layers: int = 3
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0

    def __post_init__(self):
        check_fractions(self, "norm_eps", "attention_dropout", "embedding_dropout", "mlp_dropout")
        check_heads(self)
        check_activation(self, "hidden_activation")
        check_layer_types(self)
        self.ropes()

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    def kinds(self) -> list[str]:
        """GLOBAL or LOCAL, for each layer."""
        if self.layer_types is not None:
            return self.layer_types
        return [LOCAL if i % self.global_attn_every_n_layers else GLOBAL for i in range(self.num_hidden_layers)]

    def ropes(self) -> dict[str, dict]:
        """The rotary settings of each kind of layer."""
        thetas = {GLOBAL: self.global_rope_theta, LOCAL: self.local_rope_theta}
        return {kind: rope_settings(self, theta=theta, layer_type=kind) for kind, theta in thetas.items()}


class Layer(nn.Module):
    """x = x + Attention(LayerNorm(x)); x = x + FeedForward(LayerNorm(x)). The first layer has the norm of the
    embeddings instead of its own."""

    def __init__(self, config: ModernBertConfig, kind: str, *, first: bool):
        super().__init__()
        D, norm = config.hidden_size, {"eps": config.norm_eps, "bias": config.norm_bias}
        self.num_heads, self.kind, side = config.num_attention_heads, kind, config.local_attention // 2
        self.window: Window = FULL if kind == GLOBAL else (side, side)
        self.attention_norm = nn.Identity() if first else nn.LayerNorm(D, **norm)
        self.qkv = Linear(D, 3 * D, bias=config.attention_bias)
        self.attention_out = Linear(D, D, bias=config.attention_bias)
        self.dropout = Dropout(config.attention_dropout)
        self.feed_forward_norm = nn.LayerNorm(D, **norm)
        gated = {"activation": config.hidden_activation, "bias": config.mlp_bias, "dropout": config.mlp_dropout}
        self.feed_forward = GatedFeedForward(D, config.intermediate_size, **gated)

    def forward(
        self, x_TD: Tensor, sequences: Sequences, turns: tuple[Tensor, Tensor], attention_dropout: float
    ) -> Tensor:
        qkv_T3HK = self.qkv(self.attention_norm(x_TD)).view(len(x_TD), 3, self.num_heads, -1)
        q_THK, k_THK, v_THK = qkv_T3HK.unbind(1)
        q_THK, k_THK = rotate(q_THK, turns), rotate(k_THK, turns)
        options = {"window": self.window, "dropout": attention_dropout}
        return self.after_attention(x_TD, attention(q_THK, k_THK, v_THK, sequences, **options))

    def after_attention(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The rest of the layer (compiled.py)."""
        x_TD = x_TD + self.dropout(self.attention_out(attended_TD))
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class ModernBert(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config, self.ropes, self.attention_dropout = config, config.ropes(), 0.0
        D, norm = config.hidden_size, {"eps": config.norm_eps, "bias": config.norm_bias}
        self.token = nn.Embedding(config.vocab_size, D)
        self.embedding_norm = nn.LayerNorm(D, **norm)
        self.dropout = Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(Layer(config, kind, first=i == 0) for i, kind in enumerate(config.kinds()))
        self.final_norm = nn.LayerNorm(D, **norm)

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.dropout(self.embedding_norm(self.token(packed.input_ids)))
        options = {"width": self.config.hidden_size // self.config.num_attention_heads, "dtype": x_TD.dtype}
        turns = {kind: angles(packed.positions, settings=rope, **options) for kind, rope in self.ropes.items()}
        sequences, dropout = Sequences(packed), self.attention_dropout if self.training else 0.0
        for layer in self.layers:
            x_TD = layer(x_TD, sequences, turns[layer.kind], dropout)
        return self.final_norm(x_TD)


def key_map(config: ModernBertConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    rest = {"token": "embeddings.tok_embeddings", "embedding_norm": "embeddings.norm", "final_norm": "final_norm"}
    layer = {
        "attention_norm": "attn_norm",
        "qkv": "attn.Wqkv",
        "attention_out": "attn.Wo",
        "feed_forward_norm": "mlp_norm",
        "feed_forward.gate_up": "mlp.Wi",
        "feed_forward.out": "mlp.Wo",
    }
    return rest | layer_keys(config.num_hidden_layers, "layers.{}.", "layers.{}.", layer)


Config, Encoder = ModernBertConfig, ModernBert  # the names every family exports
