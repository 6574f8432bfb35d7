"""tokenization.py for decoders, against transformers' AutoTokenizer: byte-level BPE, and sentence pieces.

The tokenizers are trained here on a few sentences, and stored as the models' folders store theirs.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from families import randomize
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedft import load_embedder
from embedft.encoders.folder import read_tokenizer
from embedft.encoders.llama import LlamaConfig
from embedft.encoders.tokenization import Tokenizer

transformers = pytest.importorskip("transformers", minversion="5")

CORPUS = ["the order of the world is a limit order", "what is a stop order? naïve café, 日本語", "a fee of 10% (2021)"]
TEXTS = [
    "",
    " ",
    "the order of the world",
    "  two leading spaces, and trailing  ",
    "▁piece ▁▁ pieces",
    "<s>the</s> order<s> <eos> <bos>a <|endoftext|>the <|im_end|> <unk> <pad>",
    "e\u0301 naïve café ﬁne ½ İ",
    "日本語 中文 👩‍👩‍👧‍👦 \x00 \u200b",
    "tabs\tand\r\n\nlines\n",
    "IT'S 1,234.56 it's",
    "Instruct: find what answers the question\nQuery:what is a limit order?",
    "the " * 100,
]
SIZES = {"vocab_size": 2000, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
CONFIG = LlamaConfig(**SIZES, intermediate_size=8, max_position_embeddings=64)


def surround(before: str, after: str, backend: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    """Puts special tokens before and after a text; "" for none."""
    special = [(token, backend.token_to_id(token)) for token in (before, after) if token]
    return processors.TemplateProcessing(
        single=" ".join(filter(None, [before, "$A", after])), pair="$A $B", special_tokens=special
    )


def special(*contents: str) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(content, special=True, normalized=False) for content in contents]


def byte_level() -> tokenizers.Tokenizer:
    """As Qwen3-Embedding's, whose texts end with <|endoftext|>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.pre_tokenizer = transformers.Qwen2Tokenizer()._tokenizer.pre_tokenizer
    backend.add_tokens(special("<|endoftext|>", "<|im_end|>"))
    backend.post_processor = surround("", "<|endoftext|>", backend)
    return backend


def pieces(model: str, *, spaces: str) -> tokenizers.Tokenizer:
    """Sentence pieces with a fallback to bytes, as Llama's and Gemma's. `spaces`: how they become "▁"; "prepend" is
    the normalizer of files converted before transformers 5."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    named = ["<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", *bytes_]
    if model == "BPE":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=named, show_progress=False)
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=420, special_tokens=named, unk_token="<unk>", show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainer)
    stored = json.loads(backend.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in named[:6]]
    stored["model"]["byte_fallback"] = True
    backend = tokenizers.Tokenizer.from_str(json.dumps(stored))
    if spaces == "prepend":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif spaces == "replace":
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.normalizer = normalizers.Replace(" ", "▁")
    return backend


def save(folder: Path, backend: tokenizers.Tokenizer, model_type: str, **settings) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def assert_same_ids(folder: Path) -> Tokenizer:
    """Ids with and without special tokens, truncated too, before and after saving."""
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder, CONFIG, None)
    whole = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    cut = [theirs(text, truncation=True, max_length=64)["input_ids"] for text in TEXTS]
    assert tokenizer.tokenize(TEXTS) == whole
    assert tokenizer.encode(TEXTS) == cut
    tokenizer.save(folder)
    assert read_tokenizer(folder, CONFIG, None).encode(TEXTS) == cut
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert [again(text, truncation=True, max_length=64)["input_ids"] for text in TEXTS] == cut
    return tokenizer


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": False}], ids=str)
def test_byte_level_with_a_last_token(tmp_path, tokenizer_class, flags):
    """Whatever `add_eos_token` says; a text that is cut keeps the last token, from which it is pooled."""
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left", **flags}
    settings |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    backend = byte_level()
    tokenizer = assert_same_ids(save(tmp_path, backend, "qwen3", **settings))
    last = backend.token_to_id("<|endoftext|>")
    assert [ids[-1] for ids in tokenizer.encode(TEXTS)] == [last] * len(TEXTS)
    assert len(tokenizer.encode(["the " * 100])[0]) == 64
    assert tokenizer.encode([""]) == [[last]]
    assert tokenizer.prompt_length("the order") == len(tokenizer.tokenize(["the order"])[0])


def test_byte_level_of_llama_3(tmp_path):
    """A first token, and a class for sentence pieces that transformers 5 does not believe."""
    backend = byte_level()
    backend.post_processor = surround("<|im_end|>", "", backend)
    assert_same_ids(save(tmp_path, backend, "llama", tokenizer_class="LlamaTokenizer", bos_token="<|im_end|>"))


@pytest.mark.parametrize("spaces", ["prepend", "metaspace"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"legacy": True},
        {"legacy": False},
        {"add_prefix_space": False},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_sentence_pieces(tmp_path, model_type, settings, spaces):
    """transformers 5 rebuilds Llama's steps, not Mistral's; e5-mistral adds both special tokens."""
    backend = pieces("BPE", spaces=spaces)
    backend.post_processor = surround("<s>", "</s>", backend)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_eos_token": False}
    assert_same_ids(save(tmp_path, backend, model_type, **{"tokenizer_class": "LlamaTokenizer"} | named | settings))


@pytest.mark.parametrize("tokenizer_class", ["GemmaTokenizer", "GemmaTokenizerFast"])
def test_sentence_pieces_of_gemma(tmp_path, tokenizer_class):
    backend = pieces("BPE", spaces="replace")
    backend.post_processor = surround("<bos>", "<eos>", backend)
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder = save(tmp_path, backend, "gemma3_text", tokenizer_class=tokenizer_class, **named)
    assert_same_ids(folder)


def test_unigram(tmp_path):
    backend = pieces("Unigram", spaces="metaspace")
    backend.post_processor = surround("<s>", "</s>", backend)
    assert_same_ids(save(tmp_path, backend, "llama", tokenizer_class="PreTrainedTokenizerFast", unk_token="<unk>"))


def save_sentence_transformer(folder: Path, pooling: str, prompts: dict[str, str], modules: dict[str, dict]) -> None:
    """The files around a transformer; `modules`: {name: config} of those behind the pooling."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    kinds |= {f"{i}_{name}": name.rstrip("12") for i, name in enumerate(modules, start=2)}
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    configs = {"1_Pooling": {"word_embedding_dimension": 8, f"pooling_mode_{pooling}": True, "include_prompt": True}}
    configs |= {f"{i}_{name}": config for i, (name, config) in enumerate(modules.items(), start=2) if config}
    for path, config in configs.items():
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(entries))
    settings = {"prompts": prompts, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


def assert_same_vectors(folder: Path, reference) -> None:
    ours, theirs = load_embedder(folder, device="cpu"), reference(folder, model_kwargs={"dtype": torch.float32})
    for role in ("query", "document"):
        expected = theirs.encode(TEXTS, prompt_name=role)
        np.testing.assert_allclose(ours.encode(TEXTS, role=role), expected, rtol=0, atol=1e-5)
    assert np.abs(ours.encode(TEXTS, role="query") - ours.encode(TEXTS, role="document")).max() > 0.1


TWO_LAYERS = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TWO_LAYERS |= {"intermediate_size": 8, "max_position_embeddings": 64}


def test_the_whole_of_a_qwen3_embedding_model(tmp_path, reference):
    """As published: bfloat16, an instruction before queries, the vector of the last token, padding on the left."""
    randomize(transformers.Qwen3Model(transformers.Qwen3Config(**TWO_LAYERS))).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    stored = (tmp_path / "config.json").read_bytes()
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    save(tmp_path, byte_level(), "qwen3", **settings, padding_side="left", add_bos_token=False)
    (tmp_path / "config.json").write_bytes(stored)
    prompts = {"query": "Instruct: find what answers the question\nQuery:", "document": ""}
    save_sentence_transformer(tmp_path, "lasttoken", prompts, {"Normalize": {}})
    assert_same_vectors(tmp_path, reference)


def test_the_whole_of_an_embedding_gemma_model(tmp_path, reference):
    """As published: attention to both sides, the mean, two Dense modules, and a prompt for each role."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True}
    config = transformers.Gemma3TextConfig(**TWO_LAYERS | kinds, sliding_window=6)
    randomize(transformers.Gemma3TextModel(config)).save_pretrained(tmp_path)
    stored, backend = (tmp_path / "config.json").read_bytes(), pieces("BPE", spaces="replace")
    backend.post_processor = surround("<bos>", "<eos>", backend)
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    save(tmp_path, backend, "gemma3_text", tokenizer_class="GemmaTokenizer", **named)
    (tmp_path / "config.json").write_bytes(stored)
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    sizes = {"Dense1": (8, 12), "Dense2": (12, 8)}
    dense = {
        name: {"in_features": rows, "out_features": columns, "bias": False}
        | {"activation_function": "torch.nn.modules.linear.Identity"}
        for name, (rows, columns) in sizes.items()
    }
    save_sentence_transformer(tmp_path, "mean_tokens", prompts, dense | {"Normalize": {}})
    for i, (name, (rows, columns)) in enumerate(sizes.items(), start=2):
        weight = torch.randn(columns, rows, generator=torch.Generator().manual_seed(i))
        save_file({"linear.weight": weight}, tmp_path / f"{i}_{name}" / "model.safetensors")
    assert_same_vectors(tmp_path, reference)


def test_thousands_of_added_tokens(tmp_path):
    """As many as Gemma lists, in a second; one at a time they took 30."""
    backend, names = byte_level(), [f"<unused{i}>" for i in range(6000)]
    backend.add_tokens(special(*names))
    token = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    listed = {backend.token_to_id(name): {"content": name, **token} for name in names}
    start = time.perf_counter()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": listed}
    tokenizer = Tokenizer(backend, config, max_length=64)
    assert time.perf_counter() - start < 3
    assert tokenizer.encode(["<unused7>"])[0][0] == backend.token_to_id("<unused7>")


def test_a_length_beyond_any_text():
    """Positions that no table bounds may be as many as config.json says."""
    tokenizer = Tokenizer(byte_level(), {}, max_length=10**30)
    assert len(tokenizer.encode(["the " * 5000])[0]) > 5000
