"""Encoders of published shapes with random weights, and texts of published lengths: no downloads, no data.

write_model("models/base", "bge-base")      # a folder for load_embedder
texts = make_texts(draw_lengths("contexts", 1_000))
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import nn

from embedft.encoders.folder import FAMILIES
from embedft.encoders.weights import checkpoint_tensors, write_tensors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT = {"model_type": "bert", "vocab_size": 30_522, "max_position_embeddings": 512, "type_vocab_size": 2}
MPNET = {"model_type": "mpnet", "vocab_size": 30_527, "max_position_embeddings": 514}
SHAPES: dict[str, dict[str, Any]] = {
    "MiniLM": BERT | SMALL,
    "bge-base": BERT | BASE,
    "mpnet": MPNET | BASE,
    "tiny": BERT | TINY | {"vocab_size": 100},
    "tiny mpnet": MPNET | TINY | {"vocab_size": 100},
}
# Numbers of tokens at most 512: smallest, nine deciles and largest of Uber's chunks and questions and of the finance
# questions' contexts and questions, by all-MiniLM-L6-v2's tokenizer.
DECILES = {
    "longest": (512,) * 11,
    "chunks": (20, 208, 362, 491, 512, 512, 512, 512, 512, 512, 512),
    "long questions": (15, 25, 29, 31, 34, 36, 39, 43, 46, 52, 79),
    "contexts": (4, 22, 26, 30, 34, 38, 43, 50, 60, 77, 512),
    "questions": (7, 14, 16, 17, 19, 20, 21, 23, 25, 28, 51),
}


def make_encoder(shape: str) -> nn.Module:
    """An encoder of one of `SHAPES`, its matrices drawn as BERT's were."""
    family = FAMILIES[SHAPES[shape]["model_type"]]
    encoder = family.Encoder(
        family.Config(**{name: SHAPES[shape][name] for name in SHAPES[shape].keys() - {"model_type"}})
    )
    for weight in encoder.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
    return encoder


def write_model(folder: str | Path, shape: str, *, seed: int = 0) -> Path:
    """Writes a model folder with random weights and a tokenizer for `make_texts`."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = make_encoder(shape)
    keys = FAMILIES[SHAPES[shape]["model_type"]].key_map(encoder.config)
    write_tensors(folder / "model.safetensors", checkpoint_tensors(encoder.state_dict(), keys))
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    words = [*SPECIAL, *(f"w{i}" for i in range(SHAPES[shape]["vocab_size"] - len(SPECIAL)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    marks = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def draw_lengths(texts: str, number: int, *, seed: int = 0, most: int = 512) -> np.ndarray:
    """Numbers of tokens as of one kind of texts in `DECILES`, at most `most`, [number] int64."""
    shares = np.random.default_rng(seed).uniform(size=number)
    return np.minimum(np.interp(shares, np.linspace(0, 1, 11), DECILES[texts]).round(), most).astype(np.int64)


def make_texts(lengths: Sequence[int], *, vocabulary: int = BERT["vocab_size"], seed: int = 0) -> list[str]:
    """Texts of so many tokens, at least two of them special, for the tokenizer that `write_model` writes."""
    generator = random.Random(seed)
    words = [f"w{i}" for i in range(vocabulary - len(SPECIAL))]
    return [" ".join(generator.choices(words, k=length - 2)) for length in lengths]
