"""Texts longer than a server takes: counted with a tokenizer, recognised by the server's refusal, and cut.

Not here: what is sent, and when (openai_api.py).

    counter = TokenCounter("tokenizer.json")
    counter.count(["a text"]), counter.cut("a text", 1)
    is_about_length(400, "This model's maximum context length is 8192 tokens"), shorten("a text", 8_191)
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..encoders.tokenization import TOKENIZER_FILE, Tokenizer
from ..files import sha256_file

TOO_LONG = ("refuse", "cut")
# How servers say that a text, or all of a batch, is too long: OpenAI, vLLM, text-embeddings-inference, Ollama, Mistral.
LENGTH_REFUSAL = re.compile(
    r"context[ _]?(length|size|window)|max(imum)? ((input|model|sequence|allowed batch) )?(length|size|tokens?)"
    r"|max [\d,]+ tokens|too (long|large|many)|must have less than|reduce (the|your) (length|prompt)",
    re.IGNORECASE,
)
# Where the first cut of a text that was refused for its length is: few tokens are longer on average.
CHARACTERS_A_TOKEN = 8
KEPT_TENTHS = 9
TOKENIZED_AT_A_TIME = 1_024
ANY_LENGTH = 1_000_000  # the tokenizer's own limit, which is taken off


class TokenCounter:
    """tokenizer.json, for counting the tokens of whole texts, special tokens included, and for cutting them."""

    def __init__(self, path: str | Path):
        folder = Path(path).parent if Path(path).name == TOKENIZER_FILE else Path(path)
        self.backend = Tokenizer.load(folder, max_length=ANY_LENGTH).backend
        self.backend.no_truncation()
        self.sha256 = sha256_file(folder / TOKENIZER_FILE)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        starts = range(0, len(texts), TOKENIZED_AT_A_TIME)
        parts = (self.backend.encode_batch_fast(texts[start : start + TOKENIZED_AT_A_TIME]) for start in starts)
        return [len(encoding.ids) for part in parts for encoding in part]

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        """The longest beginning of a text that ends with a token and has at most so many, and how many it has."""
        ends = [end for start, end in self.backend.encode(text).offsets if end > start]
        # The last tokens of a shorter text may be others, and more: so it is counted, not computed.
        for end in sorted({*ends[:max_tokens]}, reverse=True):
            (num_tokens,) = self.count([text[:end]])
            if num_tokens <= max_tokens:
                return text[:end], num_tokens
        return "", 0


def is_about_length(status: int, text: str) -> bool:
    """Whether a refusal with this HTTP status and body means that a text, or all of a batch, is too long."""
    return status == 413 or LENGTH_REFUSAL.search(text) is not None


def shorten(text: str, max_tokens: int | None) -> str:
    """A text that was refused, a tenth shorter and at most 8 characters a token, cut at whitespace.

    Where the last tenth before the cut has no whitespace, the cut is in a word.
    """
    num_kept = len(text) * KEPT_TENTHS // 10
    if max_tokens is not None:
        num_kept = min(num_kept, CHARACTERS_A_TOKEN * max_tokens)
    if not text[num_kept].isspace():
        earliest = num_kept * KEPT_TENTHS // 10
        found = re.search(r"\s\S*\Z", text[earliest:num_kept])
        num_kept = num_kept if found is None else earliest + found.start()
    return text[:num_kept].rstrip()
