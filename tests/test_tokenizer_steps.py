"""tokenizer_steps.py: where tokenizer_config.json and tokenizer.json disagree, against transformers' AutoTokenizer."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from embedft.encoders.schema import read_fields
from embedft.encoders.tokenization import Tokenizer

CORPUS = [
    "the fee of the order",
    "what is a limit order?",
    "hello World, isn't 12,345",
    "日本語 and Ünïcode cafe\u0301",
]
TEXTS = ["", "the fee", " the fee", "Hello World!", "isn't 12,345", "日本語 x", "cafe\u0301 CAFÉ", "a<mask>b <s> x</s>",
         "a  b\n\nc \t", "x" * 50, "the [MASK] of", "ﬁ １２ ™", "<|endoftext|> hey"]  # fmt: skip
SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>",
            "pad_token": "<pad>", "mask_token": "<mask>"}  # fmt: skip
QWEN = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
NAMES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[UNK]"]
LOWERCASE = normalizers.Lowercase()


def framed(backend: tokenizers.Tokenizer, before: str, after: str) -> tokenizers.Tokenizer:
    """With the special tokens `before` and `after` a text."""
    single, ids = f"{before} $A {after}".strip(), [(x, backend.token_to_id(x)) for x in (before, after) if x]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return backend


def byte_level(prefix: bool = False, normalizer=None, *, qwen: bool = False) -> tokenizers.Tokenizer:
    """BPE over bytes, as RoBERTa and Qwen have it; for Qwen, with other words than its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>"] if qwen else NAMES
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, **options))
    return framed(backend, "", "<|endoftext|>") if qwen else framed(backend, "<s>", "</s>")


def unigram(scheme: str = "always", normalizer=None) -> tokenizers.Tokenizer:
    """SentencePiece's, as XLM-RoBERTa has it."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Metaspace(prepend_scheme=scheme)
    options = {"special_tokens": ["<s>", "<pad>", "</s>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, **options))
    backend.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    return framed(backend, "<s>", "</s>")


def word_pieces(lower: bool, *special: str) -> tokenizers.Tokenizer:
    """As BERT and, with other special tokens, MPNet have them."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if special[0] == "[CLS]" else NAMES
    options = {"special_tokens": names, "show_progress": False}
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, **options))
    return framed(backend, *special)


CASES = {
    "roberta": (lambda: byte_level(), SENTENCE, "roberta"),
    "roberta, a space in tokenizer.json": (lambda: byte_level(True), SENTENCE, "roberta"),
    "roberta, a space in the config": (lambda: byte_level(), SENTENCE | {"add_prefix_space": True}, "roberta"),
    "roberta, a normalizer": (lambda: byte_level(False, LOWERCASE), SENTENCE, "roberta"),
    "roberta, left": (lambda: byte_level(), SENTENCE | {"truncation_side": "left", "padding_side": "left"}, "roberta"),
    "xlm-roberta": (lambda: unigram(), SENTENCE, "xlm-roberta"),
    "xlm-roberta, no space in tokenizer.json": (lambda: unigram("never"), SENTENCE, "xlm-roberta"),
    "xlm-roberta, no space": (lambda: unigram(), SENTENCE | {"add_prefix_space": False}, "xlm-roberta"),
    "xlm-roberta, a normalizer": (lambda: unigram("always", LOWERCASE), SENTENCE, "xlm-roberta"),
    "xlm-roberta, left": (lambda: unigram(), SENTENCE | {"truncation_side": "left"}, "xlm-roberta"),
    "qwen": (lambda: byte_level(qwen=True), QWEN, "qwen3"),
    "qwen, a space in tokenizer.json": (lambda: byte_level(True, qwen=True), QWEN, "qwen3"),
    "qwen, a space in the config": (lambda: byte_level(qwen=True), QWEN | {"add_prefix_space": True}, "qwen3"),
    "mpnet": (lambda: word_pieces(False, "<s>", "</s>"), SENTENCE | {"unk_token": "[UNK]"}, "mpnet"),
    "mpnet, cased": (
        lambda: word_pieces(True, "<s>", "</s>"), SENTENCE | {"unk_token": "[UNK]", "do_lower_case": False}, "mpnet"
    ),
    "bert": (lambda: word_pieces(False, "[CLS]", "[SEP]"), {}, "bert"),
    "bert, accents": (lambda: word_pieces(True, "[CLS]", "[SEP]"), {"strip_accents": False}, "bert"),
    "bert, ideographs": (lambda: word_pieces(True, "[CLS]", "[SEP]"), {"tokenize_chinese_chars": False}, "bert"),
    "bert, special tokens in texts": (
        lambda: word_pieces(True, "[CLS]", "[SEP]"), {"split_special_tokens": True}, "bert"
    ),
    "modernbert": (lambda: word_pieces(False, "[CLS]", "[SEP]"), {"do_lower_case": True}, "modernbert"),
}  # fmt: skip
OWN = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "qwen3": "Qwen2", "mpnet": "MPNet", "bert": "Bert",
       "modernbert": "Bert"}  # fmt: skip


def write(folder: Path, name: str, kind: str) -> str:
    """Writes a case's folder; returns its model_type."""
    make, config, model_type = CASES[name]
    make().save(str(folder / "tokenizer.json"))
    named = {"own": f"{OWN[model_type]}Tokenizer", "fast": f"{OWN[model_type]}TokenizerFast"}
    named |= {"any": "PreTrainedTokenizerFast"}
    config = config | ({"tokenizer_class": named[kind]} if kind in named else {})
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12, **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return model_type


@pytest.mark.parametrize("kind", ["own", "fast", "any", "none"])
@pytest.mark.parametrize("name", CASES)
def test_what_transformers_does_where_the_files_disagree(tmp_path, name, kind):
    """And what is saved does the same, here and there."""
    transformers = pytest.importorskip("transformers")
    model_type = write(tmp_path, name, kind)

    def theirs(folder: Path) -> list[list[int]]:
        return transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, truncation=True, max_length=12)["input_ids"]

    config = read_fields(tmp_path / "tokenizer_config.json")
    tokenizer, expected = Tokenizer.load(tmp_path, config, max_length=12, model_type=model_type), theirs(tmp_path)
    assert tokenizer.encode(TEXTS) == expected
    tokenizer.save(tmp_path)
    assert theirs(tmp_path) == expected
    again = Tokenizer.load(tmp_path, config, max_length=12, model_type=model_type)
    assert again.encode(TEXTS) == expected
    assert again.sha256() == tokenizer.sha256()
