"""The published configurations of real models, on the meta device: their parameter counts.

The figures are those of each model's config.json; only fields that the encoder reads are here.
"""

import pytest
import torch

from embedft.encoders.folder import FAMILIES

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


def pooler(D: int) -> int:
    """What BERT's pooler, which the encoder leaves out, adds to the published count."""
    return D * D + D


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
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    model_type, fields, expected, left_out, published = MODELS[name]
    family = FAMILIES[model_type]
    with torch.device("meta"):
        encoder = family.Encoder(family.Config(**fields))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected
    decimals = len(published.partition(".")[2])
    assert f"{(expected + left_out) / 1e6:.{decimals}f}" == published
