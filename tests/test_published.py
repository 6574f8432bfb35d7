"""The published configurations of real models, on the meta device: their parameter counts.

The figures are those of each model's config.json; only fields that the encoder reads are here.
"""

from pathlib import Path

import pytest
import torch

from embedft.encoders.folder import FAMILIES
from embedft.encoders.schema import read_dataclass

BERT = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def post_norm(rows: int, D: int, F: int, layers: int, width: int | None = None) -> int:
    """Parameters of a BERT-like encoder: a table of `rows` vectors (tokens, positions and token types) and a norm, of
    `width` features; layers of four D x D maps and two D x F maps with biases, and two norms of a weight and a bias."""
    width = width or D
    layer = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * 2 * D
    return rows * width + 2 * width + layers * layer


def gated(rows: int, D: int, F: int, layers: int, others: int) -> int:
    """Parameters of an encoder with rotary positions and gated layers: `rows` vectors (tokens, token types, norms), and
    layers of four D x D and three D x F maps without biases, and `others`: biases and norms."""
    return rows * D + layers * (4 * D * D + 3 * D * F + others)


def pooler(D: int) -> int:
    """What BERT's pooler, which the encoder leaves out, adds to the published count."""
    return D * D + D


def decoder(
    vocab: int, D: int, F: int, layers: int, H: int, G: int, K: int, *, norms: int = 2, head_norms: int = 0
) -> int:
    """Parameters of a decoder: a table of `vocab` vectors; layers of maps to and from H heads of K features and to G
    heads of keys and as many of values, three D x F maps, and the weights of `norms` norms of D features and
    `head_norms` of K; a last norm."""
    layer = 2 * D * H * K + 2 * D * G * K + 3 * D * F + norms * D + head_norms * K
    return vocab * D + layers * layer + D


# name: (model_type, fields, the encoder's parameters, those of the checkpoint that it leaves out, published millions).
MODELS = {
    "BAAI/bge-small-en-v1.5": (
        "bert",
        BERT | SMALL,
        post_norm(30522 + 512 + 2, 384, 1536, 12),
        pooler(384),
        "33.4",
    ),
    "BAAI/bge-base-en-v1.5": (
        "bert",
        BERT | BASE,
        post_norm(30522 + 512 + 2, 768, 3072, 12),
        pooler(768),
        "109",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        "bert",
        BERT | SMALL | {"num_hidden_layers": 6},
        post_norm(30522 + 512 + 2, 384, 1536, 6),
        pooler(384),
        "22.7",
    ),
    # No token types, but 32 distances with a bias in each of 12 heads.
    "sentence-transformers/all-mpnet-base-v2": (
        "mpnet",
        BASE | {"vocab_size": 30527, "max_position_embeddings": 514},
        post_norm(30527 + 514, 768, 3072, 12) + 32 * 12,
        pooler(768),
        "109",
    ),
    "BAAI/bge-m3": (
        "xlm-roberta",
        LARGE | {"vocab_size": 250002, "max_position_embeddings": 8194, "type_vocab_size": 1},
        post_norm(250002 + 8194 + 1, 1024, 4096, 24),
        pooler(1024),
        "568",
    ),
    # No token types and no pooler.
    "sentence-transformers/multi-qa-distilbert-cos-v1": (
        "distilbert",
        {"vocab_size": 30522, "max_position_embeddings": 512, "dim": 768, "hidden_dim": 3072, "n_layers": 6}
        | {"n_heads": 12},
        post_norm(30522 + 512, 768, 3072, 6),
        0,
        "66.4",
    ),
    # Token vectors of 128 features, and a map with a bias to 256.
    "google/electra-small-discriminator": (
        "electra",
        BERT
        | {"embedding_size": 128, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
        | {"num_attention_heads": 4},
        post_norm(30522 + 512 + 2, 256, 1024, 12, width=128) + 128 * 256 + 256,
        0,
        "13.5",
    ),
    "Qwen/Qwen3-Embedding-0.6B": (
        "qwen3",
        {"vocab_size": 151_669, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32_768}
        | {"rope_theta": 1e6},
        decoder(151_669, 1024, 3072, 28, 16, 8, 128, head_norms=2),
        0,
        "596",
    ),
    # 303M without its two Dense modules, 768 x 3,072 and back, which are not part of the encoder.
    "google/embeddinggemma-300m": (
        "gemma3_text",
        {"vocab_size": 262_144, "hidden_size": 768, "num_hidden_layers": 24, "intermediate_size": 1152}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 2048}
        | {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 4, "sliding_window": 512}
        | {"use_bidirectional_attention": True, "query_pre_attn_scalar": 256}
        | {"rope_theta": 1e6, "rope_local_base_freq": 10_000.0},
        decoder(262_144, 768, 1152, 24, 3, 1, 256, norms=4, head_norms=2),
        2 * 768 * 3072,
        "308",
    ),
    "intfloat/e5-mistral-7b-instruct": (
        "mistral",
        {"vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768}
        | {"sliding_window": 4096, "rms_norm_eps": 1e-5},
        decoder(32_000, 4096, 14_336, 32, 32, 8, 128),
        0,
        "7111",
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama",
        {"vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072}
        | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
        decoder(128_256, 2048, 8192, 16, 32, 8, 64),
        0,
        "1236",
    ),
    # Two token types; norms of a weight and a bias: one of the embeddings, two a layer. No biases.
    "nomic-ai/nomic-embed-text-v1.5": (
        "nomic_bert",
        {"vocab_size": 30528, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072, "n_positions": 8192}
        | {"activation_function": "swiglu", "rotary_emb_base": 1000, "type_vocab_size": 2, "qkv_proj_bias": False},
        gated(30528 + 2 + 2, 768, 3072, 12, 2 * 2 * 768),
        0,
        "137",
    ),
    # As before, without token types; biases of the four D x D maps, and of the last one.
    "Alibaba-NLP/gte-base-en-v1.5": (
        "new",
        BASE
        | {"vocab_size": 30528, "max_position_embeddings": 8192, "type_vocab_size": 0, "rope_theta": 500000}
        | {"rope_scaling": {"type": "ntk", "factor": 2.0}, "pack_qkv": True},
        gated(30528 + 2, 768, 3072, 12, 2 * 2 * 768 + 5 * 768),
        0,
        "137",
    ),
    # As before, with one token type.
    "Snowflake/snowflake-arctic-embed-m-v2.0": (
        "gte",
        BASE | {"vocab_size": 250048, "max_position_embeddings": 8192, "type_vocab_size": 1, "rope_theta": 160000},
        gated(250048 + 1 + 2, 768, 3072, 12, 2 * 2 * 768 + 5 * 768),
        0,
        "305",
    ),
    # Norms of a weight: of the embeddings, two a layer less that of the first layer's attention, and the last.
    "Alibaba-NLP/gte-modernbert-base": (
        "modernbert",
        {"vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12}
        | {"intermediate_size": 1152, "max_position_embeddings": 8192, "global_attn_every_n_layers": 3}
        | {"local_attention": 128, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
        gated(50368 + 1 - 1 + 1, 768, 1152, 22, 2 * 768),
        0,
        "149",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    model_type, fields, expected, left_out, published = MODELS[name]
    family = FAMILIES[model_type]
    with torch.device("meta"):
        encoder = family.Encoder(read_dataclass(Path("config.json"), fields, family.Config))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected
    decimals = len(published.partition(".")[2])
    assert f"{(expected + left_out) / 1e6:.{decimals}f}" == published
