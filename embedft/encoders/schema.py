"""What the JSON files of a model folder may hold: the type of every field that is read, declared in one place.

    read_fields(folder / "config_sentence_transformers.json")     # {"prompts": {"query": "..."}, ...}
    read_dataclass(path, values, BertConfig)                      # the fields of a family, by their annotations

Fields that nothing reads are not checked; null counts as an absent field.

A Config may have `aliases`, {name of a field in published checkpoints: its own}, and `fixed`, {field of config.json:
the only value that the family supports}.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from posixpath import normpath
from typing import Any, NewType

from ..files import read_object

CONFIG_FILE, MODULES_FILE = "config.json", "modules.json"
TRANSFORMER_CONFIG_FILE, MODEL_CONFIG_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
TOKENIZER_CONFIG_FILE, POOLING_FOLDER = "tokenizer_config.json", "1_Pooling"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
LORA_CONFIG_FILE, LORA_SIDE_FILE, LORA_WEIGHTS_FILE = "adapter_config.json", "lora.json", "adapter_model.safetensors"
LORA_FILES = (LORA_CONFIG_FILE, LORA_SIDE_FILE, LORA_WEIGHTS_FILE)

# Pooling mode -> its key in 1_Pooling/config.json of sentence-transformers before 6.
LEGACY_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}

# Annotations of whole numbers in a family's Config. A size is a dimension of some tensor, and no model has more layers
# than tensors: both are compared with the checkpoint before a module is built. Rows are a size, or 0 where there is no
# such tensor. An index may be 0.
Size, Layers = NewType("Size", int), NewType("Layers", int)
Rows, Index = NewType("Rows", int), NewType("Index", int)

GLOBAL, LOCAL = "full_attention", "sliding_attention"  # kinds of layer, as in `layer_types`


def is_place(text: str) -> bool:
    """Whether a file or folder could have this path below another folder."""
    return text.isprintable() and len(text) < 256 and not normpath(text).startswith(("..", "/"))


# {field: (what is expected, whether a value is valid)}
Schema = Mapping[str, tuple[str, Callable[[Any], bool]]]
BOOL = ("true or false", lambda x: isinstance(x, bool))
# Without lone surrogates, which JSON can spell but no tokenizer accepts.
TEXT = ("a string", lambda x: x is None or (isinstance(x, str) and x == x.encode(errors="ignore").decode()))
TOKEN = ("a token", lambda x: isinstance(x.get("content") if isinstance(x, dict) else x, str))
LENGTH = ("a number of tokens", lambda x: type(x) in (int, float) and x >= 1)
NUMBER = ("a finite number", lambda x: type(x) in (int, float) and abs(x) <= sys.float_info.max)
COUNT = ("a whole number from 1 to 2^31 - 1", lambda x: type(x) is int and 1 <= x < 2**31)  # as kernels take it
PLACE = ("one in this folder", lambda x: type(x) is str and is_place(x))
SPECIAL_TOKENS = {
    **dict.fromkeys(("cls_token", "sep_token", "unk_token"), TOKEN),
    "additional_special_tokens": ("a list", lambda x: isinstance(x, list)),
    "extra_special_tokens": ("a list or an object", lambda x: isinstance(x, list | dict)),
}
SCHEMAS: dict[str, Schema] = {
    CONFIG_FILE: dict.fromkeys(("model_type", "dtype", "torch_dtype"), TEXT),
    MODULES_FILE: {"type": TEXT, "path": PLACE},
    POOLING_FOLDER: {
        "pooling_mode": ("a name or a list", lambda x: all(map(TEXT[1], x if isinstance(x, list) else [x]))),
        "include_prompt": BOOL,
        **dict.fromkeys(LEGACY_POOLING_KEYS.values(), BOOL),
    },
    TRANSFORMER_CONFIG_FILE: {"max_seq_length": LENGTH, "do_lower_case": BOOL},
    MODEL_CONFIG_FILE: {
        "prompts": ("an object of strings", lambda x: isinstance(x, dict) and all(map(TEXT[1], x.values()))),
        **dict.fromkeys(("default_prompt_name", "similarity_fn_name"), TEXT),
        "truncate_dim": ("a whole number", lambda x: type(x) is int),
    },
    TOKENIZER_CONFIG_FILE: {
        "model_max_length": LENGTH,
        "truncation_side": ("left or right", lambda x: x in ("left", "right")),
        "tokenizer_class": TEXT,
        **SPECIAL_TOKENS,
        **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), BOOL),
        **dict.fromkeys(("add_prefix_space", "legacy", "split_special_tokens"), BOOL),
        "added_tokens_decoder": ("an object", lambda x: isinstance(x, dict)),
        "model_input_names": ("a list", lambda x: isinstance(x, list)),
    },
    SPECIAL_TOKENS_FILE: SPECIAL_TOKENS,
}
SCHEMAS[LORA_CONFIG_FILE] = {
    **dict.fromkeys(("peft_type", "base_model_name_or_path"), TEXT),
    "r": COUNT,
    **dict.fromkeys(("lora_alpha", "lora_dropout"), NUMBER),
}
SCHEMAS[LORA_SIDE_FILE] = dict.fromkeys(("side", "base_sha256"), TEXT)
# By the annotation of a Config's field.
TYPES = {bool: BOOL, str: TEXT, **dict.fromkeys((int, Size, Layers), COUNT)}
TYPES[Rows] = TYPES[Index] = "a whole number from 0 to 2^31 - 1", lambda x: type(x) is int and 0 <= x < 2**31
TYPES[float] = NUMBER
TYPES[list] = "a list", lambda x: isinstance(x, list)
TYPES[dict] = "an object", lambda x: isinstance(x, dict)
TYPES |= {kind | None: expected for kind, expected in TYPES.items()}


def check(path: Path, values: Mapping[str, Any], schema: Schema) -> None:
    """Raises `ValueError` naming a field whose value is invalid."""
    for field, (expected, is_right) in schema.items():
        if field in values and not is_right(values[field]):
            raise ValueError(f"{path}: {field} is {repr(values[field])[:60]}, expected {expected}")


def read_fields(path: Path, schema: str | None = None) -> dict[str, Any]:
    """The object in a JSON file, without nulls; {} if there is no file. Raises `ValueError` naming an invalid field."""
    values = {key: value for key, value in read_object(path).items() if value is not None} if path.is_file() else {}
    check(path, values, SCHEMAS[schema or path.name])
    return values


def read_dataclass(path: Path, values: Mapping[str, Any], kind: type) -> Any:
    """A `kind` made of its fields among `values`, the content of `path`. Raises `ValueError` naming an invalid one."""
    names, known = stored_names(kind, values), {field.name: field for field in fields(kind)}
    check(path, values, {names[name]: TYPES[field.type] for name, field in known.items()})
    for name, expected in getattr(kind, "fixed", {}).items():
        if (found := values.get(name, expected)) != expected:
            raise ValueError(f"{path}: {name} is {json.dumps(found)[:60]}, expected {json.dumps(expected)}")
    found = {name: values[stored] for name, stored in names.items() if stored in values}
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in found]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    try:
        return kind(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {in_stored_names(str(error), names)}") from None


def stored_names(kind: type, values: Mapping[str, Any]) -> dict[str, str]:
    """{field of a `kind`: its name in `values`}: its own, or a published one if only that is there."""
    aliases = {ours: published for published, ours in getattr(kind, "aliases", {}).items() if published in values}
    return {
        field.name: field.name if field.name in values else aliases.get(field.name, field.name)
        for field in fields(kind)
    }


def in_stored_names(message: str, names: Mapping[str, str]) -> str:
    """The message with the names that its fields have in the file."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), message)


def check_fractions(config: Any, *names: str) -> None:
    """Raises `ValueError` naming a field of a configuration that is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {str(getattr(config, name))[:60]}, expected 0 to 1")


def check_layer_types(config: Any) -> None:
    """Raises `ValueError` unless `layer_types`, if given, has one known kind for each layer."""
    given, expected = config.layer_types, config.num_hidden_layers
    if given is not None and len(given) != expected:
        raise ValueError(f"layer_types has {len(given)} entries, expected num_hidden_layers, which is {expected}")
    if wrong := [kind for kind in given or () if kind not in (GLOBAL, LOCAL)]:
        raise ValueError(f"layer_types has {repr(wrong[0])[:60]}, expected {GLOBAL} or {LOCAL}")
