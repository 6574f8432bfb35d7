"""tokenization.py against transformers' AutoTokenizer and sentence-transformers' preprocessing, on nasty texts."""

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
from naming import naming

from embedft import load_embedder
from embedft.encoders import tokenization
from embedft.encoders.tokenization import Tokenizer

NASTY = [
    "",
    " ",
    "a",
    "\n\t \r",
    "   leading and trailing   ",
    "two\nlines\r\nand\ttabs",
    "null \x00 bell \x07 escape \x1b delete \x7f",
    "\u200bzero\u200dwidth\ufeff \u00a0 nbsp \u2028 line separator",
    "naïve café, Ångström, ﬁne ½",
    "İstanbul ΑΣ ΣΊΣΥΦΟΣ Straße ẞ",
    "日本語のテキスト 中文 한국어 ภาษาไทย",
    "ع السلام עברית हिन्दी",
    "👩‍👩‍👧‍👦 🇩🇪 🙂🙂 👍🏽",
    "e\u0301 combining, a\u0300\u0301\u0302\u0303 many",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [sep] [SEP]glued[SEP]",
    "<s> </s> ##ing # #",
    "$1,234.56 -- 10% (2021–2022) https://example.com/a?b=c&d#e",
    "x" * 150,
    "supercalifragilistic" * 30,
    "\ud7ff \ue000 \uffff \U0010ffff private and last",
    "a " * 2000,
    "word" + "!" * 1000,
]


@pytest.fixture(scope="module")
def auto_tokenizer(minilm_folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(minilm_folder)


def random_texts(seed: int, count: int) -> list[str]:
    """Characters from everywhere that Unicode has some, surrogates aside."""
    rng = random.Random(seed)
    pools = [(0, 0x80), (0x80, 0x250), (0x370, 0x600), (0x2000, 0x2100), (0x4E00, 0x4F00), (0xE000, 0x110000)]

    def character():
        return " " if rng.random() < 0.15 else chr(rng.randrange(*rng.choice(pools)))

    return ["".join(character() for _ in range(rng.randint(0, 80))) for _ in range(count)]


# Ids.


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:20]))
def test_nasty_texts(minilm, auto_tokenizer, text):
    expected = auto_tokenizer(text, truncation=True, max_length=minilm.max_length)["input_ids"]
    assert minilm.tokenizer.encode([text]) == [expected]
    assert minilm.tokenize([text]) == [auto_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


@pytest.mark.parametrize("max_length", [3, 5, 64, 512])
def test_random_texts_at_several_lengths(minilm, auto_tokenizer, monkeypatch, max_length):
    texts = [*NASTY, *random_texts(max_length, 200)]
    monkeypatch.setattr(minilm, "max_length", max_length)
    assert minilm.tokenizer.encode(texts) == auto_tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


def test_whole_words_leave_truncation_as_it_was(minilm):
    long = "a " * 1000
    before = minilm.tokenizer.encode([long])
    assert len(minilm.tokenize([long])[0]) == 1000
    assert minilm.tokenizer.encode([long]) == before
    assert len(before[0]) == minilm.max_length
    with pytest.raises(ValueError, match=naming("texts[0]", "NoneType", "str")):
        minilm.tokenize([None])
    assert minilm.tokenizer.encode([long]) == before


def test_no_texts(minilm):
    assert minilm.tokenizer.encode([]) == []
    assert minilm.tokenize([]) == []


def same_ids(embedder, model, texts) -> bool:
    """Whether `embedder` tokenises as sentence-transformers' `model` does: text by text, so nothing is padded."""
    theirs = [model.preprocess([text])["input_ids"][0].tolist() for text in texts]
    return embedder.tokenizer.encode(texts) == theirs


def test_lower_case_first(write_tiny, reference, tmp_path):
    """`do_lower_case` works inside the tokenizer: a special token in a text stays one, a final sigma stays σ."""
    folder = write_tiny(tmp_path / "model", modules=True, lower_case=True)
    embedder, model = load_embedder(folder, device="cpu"), reference(folder)
    assert same_ids(embedder, model, NASTY)
    (ids,) = embedder.tokenizer.encode(["WORLD [SEP] ΑΣ"])
    assert ids == embedder.tokenizer.encode(["world [SEP] ασ"])[0]
    assert ids.count(embedder.tokenizer.backend.token_to_id("[SEP]")) == 2
    # Not so without.
    sentence_bert_config = folder / "sentence_bert_config.json"
    sentence_bert_config.write_text(json.dumps({"do_lower_case": False}))
    assert load_embedder(folder, device="cpu").tokenizer.encode(["WORLD"]) != embedder.tokenizer.encode(["WORLD"])


def test_lower_case_survives_saving_and_does_not_pile_up(write_tiny, reference, tmp_path):
    embedder = load_embedder(write_tiny(tmp_path / "model", modules=True, lower_case=True), device="cpu")
    embedder.save(tmp_path / "once")
    assert same_ids(embedder, reference(tmp_path / "once"), NASTY)
    again = load_embedder(tmp_path / "once", device="cpu")
    assert again.tokenizer.encode(NASTY) == embedder.tokenizer.encode(NASTY)
    again.save(tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"):
        assert (tmp_path / "once" / name).read_text() == (tmp_path / "twice" / name).read_text()


CONFIGS = {
    "as published": {},
    "cased": {"do_lower_case": False},
    "accents kept": {"strip_accents": False},
    "accents stripped": {"do_lower_case": False, "strip_accents": True},
    "CJK kept together": {"tokenize_chinese_chars": False},
    "another class": {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
    **{
        f"{name}, cased": {"tokenizer_class": f"{name}Tokenizer", "do_lower_case": False}
        for name in ("DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
    },
    "a fast class": {"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False},
    "special tokens": {"additional_special_tokens": ["[ENT]", "hello"]},
    "special tokens, named": {"extra_special_tokens": {"entity_token": "[ENT]"}},
    "special tokens, listed twice": {
        "added_tokens_decoder": {"30522": {"content": "[ENT]", "special": True, "normalized": False, "rstrip": True}},
        "additional_special_tokens": ["[ENT]"],
    },
    "special tokens as objects": {"cls_token": {"content": "[CLS]", "__type": "AddedToken"}},
    "added tokens": {
        "added_tokens_decoder": {
            "30523": {"content": "limitorder", "special": False, "normalized": True, "single_word": False,
                      "lstrip": False, "rstrip": False},
            "30522": {"content": "[NEW]", "special": True, "normalized": False, "single_word": False,
                      "lstrip": False, "rstrip": True},
        }
    },
}  # fmt: skip


# {file: its content}, older than added_tokens_decoder, which makes them void.
OLDER_FILES = {
    "special": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["[NEW]"]}}),
    "added": ({}, {"added_tokens.json": {"limitorder": 30523, "[NEW]": 30522, "the": 1996}}),
    "listed as special": ({"additional_special_tokens": ["[NEW]"]}, {"added_tokens.json": {"[NEW]": 30522}}),
    "both": (
        {},
        {
            "special_tokens_map.json": {"additional_special_tokens": ["[NEW]"], "cls_token": "[CLS]"},
            "added_tokens.json": {"limitorder": 30522},
        },
    ),
    "void": (
        {"added_tokens_decoder": {"101": {"content": "[CLS]", "special": True, "normalized": False}}},
        {"special_tokens_map.json": {"cls_token": "[X]"}, "added_tokens.json": {"limitorder": 30522}},
    ),
}


@pytest.mark.parametrize(("config", "files"), OLDER_FILES.values(), ids=OLDER_FILES)
def test_older_files_of_added_tokens_are_read_as_transformers_does(minilm_folder, tmp_path, config, files):
    transformers = pytest.importorskip("transformers", minversion="5")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(minilm_folder) / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    for name, content in {**files, "tokenizer_config.json": settings | config}.items():
        (tmp_path / name).write_text(json.dumps(content))
    texts = [*NASTY, "a LimitOrder [NEW] limitorder [new]", "the[NEW]"]
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True, max_length=64)["input_ids"]
    tokenizer = Tokenizer.load(tmp_path, settings | config, max_length=64)
    assert tokenizer.encode(texts) == expected
    tokenizer.save(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path / "saved", saved, max_length=64).encode(texts) == expected
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(texts, truncation=True, max_length=64)["input_ids"] == expected


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("added_tokens.json", {"[NEW]": "7"}, ("'[NEW]'", "'7'")),
        ("special_tokens_map.json", {"additional_special_tokens": 3}, ("additional_special_tokens", 3)),
        ("special_tokens_map.json", {"sep_token": 3}, ("sep_token", 3)),
    ],
)
def test_malformed_older_files(minilm_folder, tmp_path, name, content, facts):
    shutil.copy(Path(minilm_folder) / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=naming(tmp_path / name, *facts)):
        Tokenizer.load(tmp_path, {}, max_length=64)


@pytest.mark.parametrize("json_lowercase", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokenizer_config_is_applied_as_transformers_does(minilm_folder, tmp_path, config, json_lowercase):
    transformers = pytest.importorskip("transformers", minversion="5")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(minilm_folder) / name, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["normalizer"]["lowercase"] = json_lowercase
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    settings = {**json.loads((tmp_path / "tokenizer_config.json").read_text()), **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = [*NASTY, "What IS the café called?", "東京 is large", "[ENT] opens", "a LimitOrder [NEW] limitorder [new]"]
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, settings, max_length=64)
    assert tokenizer.encode(texts) == expected(texts, truncation=True, max_length=64)["input_ids"]
    # And after saving.
    tokenizer.save(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path / "saved", saved, max_length=64).encode(texts) == tokenizer.encode(texts)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(texts, truncation=True, max_length=64)["input_ids"] == tokenizer.encode(texts)


@pytest.mark.parametrize("name", ["cls_token", "sep_token", "unk_token"])
def test_other_special_tokens_than_those_of_tokenizer_json_are_refused(minilm_folder, tmp_path, name):
    """transformers would put them around every text, or in place of every unknown word: other vectors."""
    shutil.copy(Path(minilm_folder) / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "tokenizer_config.json", name, "[MASK]", "tokenizer.json")):
        Tokenizer.load(tmp_path, {name: "[MASK]"}, max_length=64)
    Tokenizer.load(tmp_path, {name: "[MASK]", "tokenizer_class": "PreTrainedTokenizerFast"}, max_length=64)


@pytest.mark.parametrize("tokens", [{"x": {"content": "a"}}, {"5": 3}, {"5": {"content": 3}}, {"5": {"colour": "red"}}])
def test_malformed_added_tokens(minilm_folder, tokens):
    with pytest.raises(ValueError, match=naming(minilm_folder, "tokenizer_config.json", "added", *tokens.values())):
        Tokenizer.load(Path(minilm_folder), {"added_tokens_decoder": tokens}, max_length=64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_side(write_tiny, reference, tmp_path, side):
    folder = write_tiny(tmp_path / "model", modules=True, tokenizer_config={"truncation_side": side})
    embedder = load_embedder(folder, device="cpu", max_length=6)
    model = reference(folder)
    model.max_seq_length = 6
    assert same_ids(embedder, model, ["a b c d e f g", "the fee", ""])
    tokens = [embedder.tokenizer.backend.id_to_token(i) for i in embedder.tokenizer.encode(["a b c d e f g"])[0]]
    assert tokens == ["[CLS]", *("defg" if side == "left" else "abcd"), "[SEP]"]
    embedder.tokenize(["a b c d e f g"])
    assert [
        embedder.tokenizer.backend.id_to_token(i) for i in embedder.tokenizer.encode(["a b c d e f g"])[0]
    ] == tokens


# Prompts.


@pytest.mark.parametrize(
    "prompt", ["query: ", "q", " ", "", "[MASK] ", "task [SEP] ", "[SEP]", "日本: ", "x" * 300, "a " * 600]
)
def test_prompt_length(minilm, minilm_reference, prompt):
    assert minilm.tokenizer.prompt_length(prompt) == minilm_reference[0]._get_prompt_length(prompt)


def test_prompt_length_by_hand(minilm):
    assert minilm.tokenizer.prompt_length("query: ") == 3  # [CLS] query :
    assert minilm.tokenizer.prompt_length("") == 1  # [CLS]


# Maximum length.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"modules": True, "max_seq_length": 20, "tokenizer_config": {"model_max_length": 30}}, 20),
        ({"modules": True, "max_seq_length": None, "tokenizer_config": {"model_max_length": 30}}, 30),
        ({"modules": False, "tokenizer_config": {"model_max_length": 30}}, 30),
        ({"modules": True, "max_seq_length": 20}, 20),
        ({"modules": False}, 48),
        ({"modules": True, "max_seq_length": 100}, 48),
        ({"modules": False, "tokenizer_config": {"model_max_length": 512}}, 48),
        ({"modules": False, "tokenizer_config": {"model_max_length": int(1e30)}}, 48),
        ({"modules": False, "tokenizer_config": {"model_max_length": 1e30}}, 48),
        ({"modules": False, "max_position_embeddings": 40}, 40),
    ],
    ids=str,
)
def test_the_folders_maximum_length(write_tiny, reference, tmp_path, settings, expected):
    folder = write_tiny(tmp_path / "model", **settings)
    embedder = load_embedder(folder, device="cpu")
    assert embedder.max_length == expected
    assert len(embedder.tokenizer.encode(["a " * 200])[0]) == expected
    # sentence-transformers does not cap max_seq_length at the positions, and then fails on long texts.
    if settings.get("max_seq_length") != 100:
        assert reference(folder).max_seq_length == expected


def test_the_maximum_length_asked_for(tiny_bert):
    assert load_embedder(tiny_bert, device="cpu", max_length=5).max_length == 5
    embedder = load_embedder(tiny_bert, device="cpu")
    embedder.max_length = 7
    assert [len(ids) for ids in embedder.tokenizer.encode(["a " * 50, "a"])] == [7, 3]
    embedder.tokenizer.max_length = 4
    assert [len(ids) for ids in embedder.tokenizer.encode(["a " * 50, "a"])] == [4, 3]
    with pytest.raises(ValueError, match=naming("max_length", 2, "special")):
        embedder.tokenizer.max_length = 2


@pytest.mark.parametrize("max_length", [-1, 0, 2])
def test_a_maximum_too_small_is_refused(tiny_bert, max_length):
    with pytest.raises(ValueError, match=naming("max_length", max_length, 2, "special")):
        load_embedder(tiny_bert, device="cpu", max_length=max_length)


def test_a_maximum_beyond_the_positions_is_refused(tiny_bert):
    with pytest.raises(ValueError, match=naming("max_length", 49, 48, "positions")):
        load_embedder(tiny_bert, device="cpu", max_length=49)
    embedder = load_embedder(tiny_bert, device="cpu")
    with pytest.raises(ValueError, match=naming("max_length", 49, 48, "positions")):
        embedder.max_length = 49
    with pytest.raises(ValueError, match=naming("max_length", 2, "special")):
        embedder.max_length = 2
    assert embedder.max_length == 48
    assert len(embedder.tokenizer.encode(["a " * 100])[0]) == 48


def test_a_maximum_that_is_no_number(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, max_seq_length="256")
    with pytest.raises(ValueError, match=naming("sentence_bert_config.json", "max_seq_length", "'256'", "number")):
        load_embedder(folder, device="cpu")


# What is not a text; files.


@pytest.mark.parametrize("call", ["encode", "tokenize"])
@pytest.mark.parametrize(
    ("texts", "facts"),
    [
        ("one text", ("texts", "str", "list")),
        (["ok", None], ("texts[1]", "NoneType", "str")),
        (["ok", b"bytes"], ("texts[1]", "bytes", "str")),
        ([["a", "pair"]], ("texts[0]", "list", "str")),
        (["ok", "a \ud800"], ("texts[1]", "surrogate", 2)),
    ],
)
def test_what_is_not_a_text(minilm, call, texts, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        getattr(minilm.tokenizer, call)(texts)


def test_save_and_load(minilm, tmp_path):
    minilm.tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    loaded = Tokenizer.load(tmp_path, config, max_length=minilm.max_length)
    assert loaded.encode(NASTY) == minilm.tokenizer.encode(NASTY)
    assert loaded.config == {**minilm.tokenizer.config, "model_max_length": 256}
    assert loaded.backend.get_vocab() == minilm.tokenizer.backend.get_vocab()


# The hash.


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", tokenizers.normalizers.Replace("a" * 99 + "b", "c")),
        lambda backend: setattr(backend, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace()),
        lambda backend: setattr(backend, "post_processor", None),
        lambda backend: setattr(backend, "decoder", tokenizers.decoders.WordPiece("#")),
        lambda backend: setattr(backend.model, "unk_token", "[PAD]"),
        lambda backend: setattr(backend, "model", tokenizers.models.WordPiece({"[UNK]": 0})),
        lambda backend: backend.add_tokens(["unheardof"]),
        lambda backend: backend.add_special_tokens([tokenizers.AddedToken("[SEP]", lstrip=True)]),
        lambda backend: backend.enable_truncation(7),
        lambda backend: backend.enable_padding(length=7),
    ],
)
def test_every_change_is_in_the_hash(minilm, change):
    tokenizer = copy.deepcopy(minilm.tokenizer)
    tokenizer.backend.normalizer = tokenizers.normalizers.Replace("a" * 99, "c")
    before = tokenizer.sha256()
    change(tokenizer.backend)
    assert tokenizer.sha256() == hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest() != before


def test_what_a_backend_does_not_save_is_in_the_hash(minilm):
    tokenizer = copy.deepcopy(minilm.tokenizer)
    before, ids = tokenizer.sha256(), tokenizer.encode(["a [SEP] b"])
    tokenizer.backend.encode_special_tokens = True
    assert tokenizer.encode(["a [SEP] b"]) != ids
    assert tokenizer.sha256() != before
    tokenizer.backend.encode_special_tokens = False
    assert tokenizer.sha256() == before


def test_another_backend_is_in_the_hash(minilm):
    """Even one with as many tokens, in another order."""
    tokenizer = copy.deepcopy(minilm.tokenizer)
    before, content = tokenizer.sha256(), json.loads(tokenizer.backend.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["order"], vocabulary["world"] = vocabulary["world"], vocabulary["order"]
    tokenizer.backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert tokenizer.sha256() != before


def test_an_unchanged_tokenizer_is_not_hashed_again(minilm, monkeypatch):
    before = minilm.tokenizer.sha256()
    minilm.tokenize(["whole"])  # for which truncation is off
    monkeypatch.setattr(tokenization.hashlib, "sha256", None)
    assert minilm.tokenizer.sha256() == before
