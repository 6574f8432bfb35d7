"""Static embeddings: a table of token vectors without layers, whose mean is the text's vector.

    encoder, config = read_table(folder, torch.float32)
    encoder(packed)            # [T, D]

Two formats: sentence-transformers' StaticEmbedding ("embedding.weight"), and model2vec's ("embeddings", and, if its
vocabulary is quantized, the row and the weight of each token). The second is unfolded into a row for each token, so
that every token can be trained, and saved without row numbers and weights, which model2vec reads too.

Source: Tulkens and van Dongen 2024 (Model2Vec); sentence-transformers 6.2, sentence_transformer/modules.

Shapes: T tokens, V tokens of the vocabulary, D features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_object
from .layers import without_memory
from .packing import Packed
from .schema import CONFIG_FILE, Size
from .weights import opened

CARRIED = ()
MODEL_TYPE, TABLE, MODEL2VEC_TABLE = "model2vec", "embedding.weight", "embeddings"
INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
NUMBERS = INTEGERS | {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Config:
    """The sizes of the table, and its name in the checkpoint."""

    vocab_size: Size
    hidden_size: Size
    table: str = TABLE
    max_length = 1_000_000  # not a field: any length would do


class Encoder(nn.Module):
    """Token ids -> [T, D]."""

    reads_empty = True  # texts without a token, since no special tokens are added

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, packed: Packed) -> Tensor:
        """The vectors of all tokens."""
        return self.embedding(packed.input_ids)


def key_map(config: Config) -> dict[str, str | dict[str, int]]:
    """Our modules -> the checkpoint's."""
    return {"embedding.weight": config.table}


def is_model2vec(folder: Path) -> bool:
    """Whether a folder without modules.json is model2vec's: by its config.json or, if that names no type, its table."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return False
    if (kind := read_object(path).get("model_type")) is not None:
        return kind == MODEL_TYPE
    with opened(folder) as (_, files):
        return MODEL2VEC_TABLE in files


def read_table(
    folder: Path, dtype: torch.dtype, *, num_tokens: int, allow_pickle: bool = False
) -> tuple[Encoder, dict[str, Any]]:
    """The encoder, and config.json as it is, if there is one. `num_tokens`: of the tokenizer, so that a small file
    cannot unfold to a huge table. Raises `ValueError` for tensors that do not fit."""
    path = folder / CONFIG_FILE
    values = read_object(path) if path.is_file() else {}
    with opened(folder, allow_pickle=allow_pickle) as (listed, files):
        name = TABLE if TABLE in files else MODEL2VEC_TABLE
        if name not in files:
            raise ValueError(f"{listed}: has neither {TABLE} nor {MODEL2VEC_TABLE}")
        tensors = {key: files[key].get_tensor(key) for key in (name, "mapping", "weights") if key in files}
    if wrong := [f"{key} has type {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in NUMBERS]:
        raise ValueError(f"{listed}: {wrong[0]}, expected whole or floating-point numbers")
    table_VD = tensors[name]
    if table_VD.ndim != 2 or 0 in table_VD.shape:
        raise ValueError(f"{listed}: {name} has shape {tuple(table_VD.shape)}, expected tokens by features")
    if name == MODEL2VEC_TABLE:
        table_VD = _unfold(listed, table_VD, tensors.get("mapping"), tensors.get("weights"), num_tokens)
    config = Config(*table_VD.shape, table=name)
    with without_memory():
        encoder = Encoder(config)
    encoder.load_state_dict({"embedding.weight": table_VD.to(dtype)}, assign=True)
    return encoder, {"model_type": MODEL_TYPE if name == MODEL2VEC_TABLE else "static", **values}


def _unfold(path: Path, rows_RD: Tensor, mapping_V: Tensor | None, weight_V: Tensor | None, num_tokens: int) -> Tensor:
    """Row `mapping[v]` times `weights[v]` for each token v, [V, D]."""
    if mapping_V is not None:
        if mapping_V.ndim != 1 or not len(mapping_V) or mapping_V.dtype not in INTEGERS:
            found = f"{mapping_V.dtype} of shape {tuple(mapping_V.shape)}"
            raise ValueError(f"{path}: mapping is {found}, expected a row number for each token")
        if len(mapping_V) > 2 * num_tokens:  # ids may have gaps
            raise ValueError(f"{path}: mapping has {len(mapping_V)} entries, but the tokenizer {num_tokens} tokens")
        mapping_V = mapping_V.long()
        if not 0 <= mapping_V.min() <= mapping_V.max() < len(rows_RD):
            found = f"{mapping_V.min()} to {mapping_V.max()}"
            raise ValueError(f"{path}: mapping is {found}, expected rows of the {len(rows_RD)} in {MODEL2VEC_TABLE}")
        rows_RD = rows_RD[mapping_V]
    if weight_V is None:
        return rows_RD
    if weight_V.shape != rows_RD.shape[:1]:
        raise ValueError(f"{path}: weights has shape {tuple(weight_V.shape)}, expected {(len(rows_RD),)}")
    return rows_RD.to(torch.promote_types(rows_RD.dtype, torch.float32)) * weight_V[:, None]
