"""Which normalizer and pre-tokenizer transformers 5 builds for a class, in place of those in tokenizer.json.

    backend.normalizer, backend.pre_tokenizer = built_steps(tokenizer_kind(config, "roberta", backend), config, backend)

Classes that are not here keep what tokenizer.json has. Source: transformers 5.23, `auto/tokenization_auto.py` and the
classes' `tokenization_*.py`, in `models`.
"""

import pickle
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

# Class names without "Tokenizer" and "Fast".
BERT = ("Bert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
MPNET, QWEN = "MPNet", "Qwen2"
# If tokenizer_config.json names no class, by `model_type` of config.json.
CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "mpnet": MPNET, "qwen3": QWEN}
KEPT = ("modernbert",)  # families whose tokenizer.json holds, whatever class is named
SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"}
# By class: the special tokens that tokenizer_config.json has by default. Those of tokenizer.json must be the same.
DEFAULTS = {**dict.fromkeys(BERT, SPECIAL), MPNET: {"cls": "<s>", "sep": "</s>", "unk": "[UNK]"}}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_kind(config: dict[str, Any], model_type: str | None, backend: tokenizers.Tokenizer) -> str:
    """The class of a tokenizer, without "Tokenizer" and "Fast"; "": none in particular."""
    if model_type in KEPT:
        return ""
    default = CLASSES.get(model_type or "", "Bert" if isinstance(backend.model, models.WordPiece) else "")
    kind = config.get("tokenizer_class", default).removesuffix("Fast").removesuffix("Tokenizer")
    return "" if kind == "Llama" and model_type == "mistral" else kind


def has_types(kind: str, config: dict[str, Any]) -> bool:
    """Whether a tokenizer of a class tells the second text of a pair from the first, where the model can."""
    return "token_type_ids" in config["model_input_names"] if "model_input_names" in config else kind in BERT


def built_steps(kind: str, config: dict[str, Any], backend: tokenizers.Tokenizer) -> tuple[Any, Any]:
    """(normalizer, pre-tokenizer) of a tokenizer of a class."""
    normalizer, words, prefix = backend.normalizer, backend.pre_tokenizer, config.get("add_prefix_space")
    if kind in DEFAULTS:
        options = {"handle_chinese_chars": config.get("tokenize_chinese_chars", True)}
        options |= {"strip_accents": config.get("strip_accents"), "lowercase": config.get("do_lower_case", True)}
        return normalizers.BertNormalizer(clean_text=True, **options), words
    if kind == "Roberta":
        return None, pre_tokenizers.ByteLevel(add_prefix_space=prefix is True)
    if kind in ("XLMRoberta", "Camembert"):
        scheme = "never" if prefix is False else "always"
        parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", scheme)]
        return _precompiled(normalizer), pre_tokenizers.Sequence(parts)
    if kind == QWEN:
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix is True, use_regex=False)]
        return normalizers.NFC(), pre_tokenizers.Sequence(parts)
    if kind == "Llama" and b"ByteLevel" not in pickle.dumps(words):
        scheme = "always" if config.get("legacy", False) else "first"
        return None, pre_tokenizers.Metaspace("▁", "never" if prefix is False else scheme, split=False)
    return normalizer, words


def _precompiled(normalizer: Any) -> Any:
    """The first table of characters in a normalizer, from SentencePiece; None: there is none."""
    parts = normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer]
    return next((part for part in parts if isinstance(part, normalizers.Precompiled)), None)
