"""MPNet (Song et al. 2020): all-mpnet-base-v2, multi-qa-mpnet-base, paraphrase-mpnet-base-v2.

RoBERTa without token types, and with a learned bias by relative distance, which all layers add to their scores.

Shapes: T tokens, D hidden features, H heads, L tokens of the longest sequence, R = 2L - 1 distances.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Sequences
from .packing import Packed
from .post_norm import UNUSED, Embeddings, PostNormConfig, make_layers, positions_behind_padding, run_layers
from .weights import Keys, layer_keys

# Tensors of checkpoints that the encoder does not use; they are kept and saved again.
CARRIED = (*UNUSED, "lm_head.")
PADDING = 1  # the row of the position table that padding has, whatever the tokenizer's padding token is
# The distances at which buckets 1 to 15 start: 1 to 8, then 8 * 2^(k / 2) below 128, rounded up.
BUCKET_STARTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
NUM_BUCKETS = 2 * (len(BUCKET_STARTS) + 1)


@dataclass(frozen=True)
class MPNetConfig(PostNormConfig):
    """The fields of config.json that the encoder uses."""

    relative_attention_num_buckets: int = NUM_BUCKETS

    def __post_init__(self):
        super().__post_init__()
        if (found := self.relative_attention_num_buckets) != NUM_BUCKETS:
            raise ValueError(f"relative_attention_num_buckets is {str(found)[:60]}, expected {NUM_BUCKETS}")

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings - PADDING - 1


class MPNet(nn.Module):
    """Packed tokens -> hidden states [T, D]. Set `attention_dropout` to the probability to use in training."""

    def __init__(self, config: MPNetConfig):
        super().__init__()
        self.config, self.attention_dropout = config, 0.0
        D, options = config.hidden_size, {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        self.embeddings = Embeddings(config.vocab_size, config.max_position_embeddings, 0, D, **options)
        self.distance_bias = nn.Embedding(NUM_BUCKETS, config.num_attention_heads)
        sizes = config.num_hidden_layers, D, config.intermediate_size, config.num_attention_heads
        self.layers = make_layers(*sizes, activation=config.hidden_act, **options)

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.embeddings(packed, positions_behind_padding(packed, PADDING))
        sequences = Sequences(packed, bias_HLL=self.bias(packed.max_seqlen))
        return run_layers(self.layers, x_TD, sequences, self.attention_dropout)

    def bias(self, length: int) -> Tensor:
        """What query i and key j of a sequence add to their score in each head, by j - i, at [:, i, j]. [H, L, L]."""
        distances_R = torch.arange(1 - length, length, device=self.distance_bias.weight.device)
        bias_HR = self.distance_bias(buckets(distances_R)).t()
        # Row i is the L distances from -i on; windows start with the last row's.
        return bias_HR.unfold(1, length, 1).flip(1)


def buckets(distances: Tensor) -> Tensor:
    """The bucket of each distance j - i of a key from its query, int64: 0 to 15 backwards, 16 to 31 forwards.
    Source: Raffel et al. 2020 (T5), section 2.1: 8 exact distances a side, then logarithmic up to 128."""
    starts = torch.tensor(BUCKET_STARTS, device=distances.device)
    return torch.bucketize(distances.abs(), starts, right=True) + (distances > 0) * (NUM_BUCKETS // 2)


def key_map(config: MPNetConfig) -> Keys:
    """Our modules -> the checkpoint's."""
    shared = {
        "embeddings.token": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "distance_bias": "encoder.relative_attention_bias",
    }
    D = config.hidden_size
    layer = {
        "qkv": {"attention.attn.q": D, "attention.attn.k": D, "attention.attn.v": D},
        "attention_out": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
        "feed_forward_in": "intermediate.dense",
        "feed_forward_out": "output.dense",
        "feed_forward_norm": "output.LayerNorm",
    }
    return shared | layer_keys(config.num_hidden_layers, "layers.{}.", "encoder.layer.{}.", layer)


Config, Encoder = MPNetConfig, MPNet  # the names every family exports
