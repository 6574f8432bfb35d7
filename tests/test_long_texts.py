"""long_texts.py: tokens counted and cut by hand, refusals in the words of servers, cuts of a tenth at whitespace."""

import pytest
import tokenizers
from api_server import LENGTH_REFUSALS
from tokenizers import models, pre_tokenizers, processors

from embedft.api.long_texts import TokenCounter, is_about_length, shorten


def save_words(folder, *, truncation: int | None = None) -> str:
    """Lower-case words are tokens, each text has one in front and one behind."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "<s>", "</s>", "a", "b", "c"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    if truncation is not None:
        backend.enable_truncation(truncation)
    backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def save_bytes(folder) -> None:
    """A byte is a token: no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(folder / "tokenizer.json"))


def test_words_by_hand(tmp_path):
    """<s> a bb c </s> are five; the file's own limit of three is not ours."""
    counter = TokenCounter(save_words(tmp_path, truncation=3))
    assert counter.count(["a", "a bb c", "", "a " * 5000]) == [3, 5, 2, 5002]
    assert counter.cut("a  bb c c", 5) == ("a  bb c", 5)
    assert counter.cut("a  bb c c", 4) == ("a  bb", 4)
    assert counter.cut("a  bb c c", 6) == ("a  bb c c", 6)
    assert counter.cut("a", 2) == ("", 0)  # the special tokens alone fill it


def test_a_cut_is_counted_again(tmp_path):
    """A face has four bytes, so four tokens that all end where it does: six tokens hold one face, not two."""
    save_bytes(tmp_path)
    counter = TokenCounter(tmp_path)
    assert counter.count(["🙂🙂", "ab"]) == [8, 2]
    assert counter.cut("🙂🙂", 6) == ("🙂", 4)
    assert counter.cut("a🙂", 4) == ("a", 1)
    assert counter.cut("🙂", 3) == ("", 0)


def test_more_texts_than_are_counted_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("embedft.api.long_texts.TOKENIZED_AT_A_TIME", 2)
    counter = TokenCounter(save_words(tmp_path))
    assert counter.count(["a", "a b", "a b c", "a b c a", ""]) == [3, 4, 5, 6, 2]
    assert counter.count([]) == []


def test_the_hash_is_of_the_file(tmp_path):
    (tmp_path / "words").mkdir(), (tmp_path / "bytes").mkdir()
    words = TokenCounter(save_words(tmp_path / "words"))
    save_bytes(tmp_path / "bytes")
    assert words.sha256 == TokenCounter(tmp_path / "words").sha256 != TokenCounter(tmp_path / "bytes").sha256


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        TokenCounter(tmp_path)


@pytest.mark.parametrize("wording", LENGTH_REFUSALS)
def test_refusals_of_servers(wording):
    status, message = LENGTH_REFUSALS[wording]
    assert is_about_length(status, message.format(limit=512, found=600, row=0))


@pytest.mark.parametrize(
    "message",
    [
        "Requested 350000 tokens, max 300000 tokens per request",
        "The prompt (length 600) is longer than the maximum model length of 512.",
        "batch size 64 > maximum allowed batch size 32",
        "Too many inputs in request, split into more batches.",
        "the request exceeds the available context size. try increasing the context size",
        "input is too large to process. increase the physical batch size",
        '{"error": {"message": "...", "code": "context_length_exceeded"}}',
    ],
)
def test_other_wordings(message):
    assert is_about_length(400, message)


@pytest.mark.parametrize(
    "message",
    [
        "fault 400",
        "This model does not support specifying dimensions.",
        "Invalid value for 'dimensions' = 5000. Must be less than or equal to 1536.",
        "The model `ada` does not exist",
        "encoding_format 'base64' is not supported",
    ],
)
def test_other_refusals(message):
    assert not is_about_length(400, message)
    assert is_about_length(413, message)  # payload too large, whatever it says


@pytest.mark.parametrize(
    ("text", "max_tokens", "expected"),
    [
        # 20 characters, 18 are kept at most: "ab cd ef gh ij kl m".
        ("ab cd ef gh ij kl mn", None, "ab cd ef gh ij kl"),
        ("a" * 20, None, "a" * 18),
        ("aa" + " " + "a" * 17, None, "aa " + "a" * 15),  # whitespace, but further back than a tenth
        ("a" * 18 + " b", None, "a" * 18),  # the cut is at whitespace already
        ("a" * 17 + "  b", None, "a" * 17),
        ("a" * 100, 2, "a" * 16),  # 8 characters a token
        ("a" * 100, 50, "a" * 90),
        ("a", None, ""),
        (" a", None, ""),
        ("日本語" * 10, None, ("日本語" * 10)[:27]),
    ],
)
def test_shorter_by_hand(text, max_tokens, expected):
    assert shorten(text, max_tokens) == expected


def test_it_always_gets_shorter():
    text, lengths = "word " * 40 + "x" * 60 + " \n\t" * 20, []
    while text:
        lengths.append(len(text))
        text = shorten(text, None)
    assert lengths == sorted(set(lengths), reverse=True)
    assert len(lengths) < 60
