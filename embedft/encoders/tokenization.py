"""Turns texts into token ids, with the model's own tokenizer, and long texts into windows of tokens.

tokenizer = Tokenizer.load(folder, config, max_length=256)
tokenizer.encode(["a question"])      # [[101, 1037, 3160, 102]]
windows, source = tokenizer.windows(["a long text ..."], (128, 64))
"""

import hashlib
import json
import operator
import pickle
import reprlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers
from tokenizers.normalizers import Lowercase

from ..files import atomic_write, read_object, read_text, write_json
from .schema import ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE, read_fields
from .token_ids import TokenIds, cut
from .tokenizer_steps import DEFAULTS, built_steps, has_types, tokenizer_kind

TOKENIZER_FILE = "tokenizer.json"
# Whole texts are tokenized with truncation off for a moment, which another thread (prefetch.py) must not see.
_ONE_AT_A_TIME = threading.RLock()


class Tokenizer:
    """tokenizer.json (`backend`) as modified by tokenizer_config.json (`config`); `lower_case`: lower-case texts first.
    `max_length`: texts are truncated to this many tokens, special tokens included; can be set. `model_type`: that of
    config.json."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict,
        *,
        max_length: int,
        lower_case: bool = False,
        model_type: str | None = None,
    ):
        self.backend, self.config, self.lower_case = backend, config, lower_case
        self.backend.no_padding()
        self.backend.encode_special_tokens = config.get("split_special_tokens", False)
        kind = _configure(backend, config, model_type)
        self.has_types = has_types(kind, config)
        # In the tokenizer, not by str.lower: special tokens written in a text keep their case and so their meaning.
        steps = backend.normalizer if isinstance(backend.normalizer, normalizers.Sequence) else [backend.normalizer]
        if lower_case and not any(isinstance(step, Lowercase) for step in steps):  # a saved tokenizer has one
            backend.normalizer = normalizers.Sequence([Lowercase(), *filter(None, [backend.normalizer])])
        self.max_length = max_length
        self._known: tuple[Any, str] = None, ""  # what the tokenizer looked like when last hashed, and the hash

    @classmethod
    def load(cls, folder: Path, config: dict, **options: Any) -> "Tokenizer":
        """Reads tokenizer.json; `config` is the content of tokenizer_config.json; for `options`, see `Tokenizer`."""
        backend = read_backend(folder)
        if "added_tokens_decoder" not in config:  # else transformers ignores the older files, too
            _add_tokens(backend, folder / ADDED_TOKENS_FILE)
            config = config | read_fields(folder / SPECIAL_TOKENS_FILE)
        try:
            return cls(backend, config, **options)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    @classmethod
    def load_bare(cls, folder: Path, *, max_length: int) -> "Tokenizer":
        """Reads tokenizer.json alone, with its truncation, if any, up to `max_length`, and adds no special tokens."""
        backend = read_backend(folder)
        backend.post_processor = None
        cut = backend.truncation or {"max_length": max_length, "direction": "right"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": cut["direction"].lower()}
        return cls(backend, config, max_length=max(1, min(max_length, cut["max_length"])))

    @property
    def max_length(self) -> int:
        return self._max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        num_special = self.backend.num_special_tokens_to_add(False)
        if value <= num_special:
            raise ValueError(f"max_length is {value}, expected more than the {num_special} special tokens")
        self._max_length = value
        self.backend.enable_truncation(min(value, sys.maxsize), direction=self.config.get("truncation_side", "right"))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with special tokens, truncated to `max_length`."""
        return self.token_ids(texts).tolist()

    def token_ids(self, texts: Sequence[str]) -> TokenIds:
        """As `encode`, in one array."""
        with _ONE_AT_A_TIME:
            found = self.backend.encode_batch_fast(check_texts(texts))
        return TokenIds.of([encoding.ids for encoding in found])

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(token ids, token types) of each pair of texts, with special tokens; the longer text is truncated first."""
        wrong = next(
            (i for i, pair in enumerate(pairs) if not (isinstance(pair, tuple | list) and len(pair) == 2)), None
        )
        if wrong is not None:
            raise ValueError(f"pairs[{wrong}] is {reprlib.repr(pairs[wrong])}, expected two texts")
        firsts, seconds = ([pair[side] for pair in pairs] for side in (0, 1))
        pairs = list(zip(check_texts(firsts), check_texts(seconds), strict=True))
        with _ONE_AT_A_TIME:
            found = self.backend.encode_batch(pairs)
        return [(row.ids, row.type_ids if self.has_types else [0] * len(row.ids)) for row in found]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each whole text: no special tokens, no truncation."""
        return [encoding.ids for encoding in self._whole(texts, special=False)]

    def count(self, texts: Sequence[str]) -> list[int]:
        return list(map(len, self._whole(texts, special=False)))

    def windows(
        self, texts: Sequence[str], passages: Sequence[int], *, prompt: str = ""
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids of overlapping windows of texts, in order, and the row of `texts` each window comes from.

        A window looks like what `encode` returns: special tokens, the prompt, then the text. The first window that
        reaches the end of the text is the last. A text that fits is one window; so is an empty one.

        Args:
            passages: (size, stride): the maximum number of tokens in a window, special tokens and prompt included, and
                the number of text tokens between window starts. If a window has room for fewer, the next one starts
                where it ends, so every token is in a window.
            prompt: prepended to each window. If its last token merges with the text's first, the text keeps it."""
        windows, source = cut(self.whole(texts, prompt=prompt), *self.check_passages(passages, prompt))
        return windows.tolist(), source.tolist()

    def whole(self, texts: Sequence[str], *, prompt: str = "") -> TokenIds:
        """What `token_ids.cut` cuts into windows: all ids of each text, without truncation."""
        (prompt_ids,), texts, found = self.tokenize([prompt]), check_texts(texts), []
        for encoding in self._whole([prompt + text for text in texts] if prompt else texts):
            ids, special, rest = encoding.ids, encoding.special_tokens_mask, prompt_ids
            start, behind = (special.index(0), special[::-1].index(0)) if 0 in special else (len(ids), 0)
            while start < len(ids) - behind and rest and ids[start] == rest[0]:
                start, rest = start + 1, rest[1:]
            found.append([start, behind, *ids])
        return TokenIds.of(found)

    def check_passages(self, passages: Sequence[int], prompt: str = "") -> tuple[int, int]:
        """(size, stride). Raises `ValueError` if texts cannot be cut so."""
        try:
            size, stride = map(operator.index, passages)
        except (TypeError, ValueError):
            raise ValueError(f"passages is {passages!r}, expected (size, stride) in whole tokens") from None
        num_special, (prompt_ids,) = self.backend.num_special_tokens_to_add(False), self.tokenize([prompt])
        least = num_special + len(prompt_ids) + 1
        if not least <= size <= self.max_length:
            parts = f"{num_special} special tokens, {len(prompt_ids)} of the prompt, one of text"
            raise ValueError(f"passages of {size} tokens, expected {least} ({parts}) to {self.max_length} (max_length)")
        if not 1 <= stride <= size:
            raise ValueError(f"passages start every {stride} tokens, expected 1 to their size, {size}")
        return size, stride

    def _whole(self, texts: Sequence[str], *, special: bool = True) -> list[tokenizers.Encoding]:
        with _ONE_AT_A_TIME:
            self.backend.no_truncation()
            try:
                return self.backend.encode_batch_fast(check_texts(texts), add_special_tokens=special)
            finally:
                self.max_length = self._max_length  # truncates again

    def prompt_length(self, prompt: str) -> int:
        """The number of tokens before a text: those of `prompt` and the special tokens before it."""
        special_T = self.backend.encode(prompt).special_tokens_mask
        return len(special_T) - (special_T[-1] if special_T else 0)

    def sha256(self) -> str:
        """SHA-256 of everything that token ids depend on, cached until the tokenizer changes."""
        with _ONE_AT_A_TIME:
            return self._sha256()

    def _sha256(self) -> str:
        backend = self.backend
        steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
        # The hash takes 2 to 9 ms for MiniLM, this check 0.3 ms. `str` abbreviates, so steps are pickled. Pickling the
        # vocabulary takes as long as the hash, so replacing it in place by one of the same size goes unnoticed.
        looks = backend, str(backend.model), pickle.dumps((steps, backend.truncation, backend.padding))
        unsaved = "encode_special_tokens" if backend.encode_special_tokens else ""  # `to_str` leaves it out
        looks += backend.get_vocab_size(), str(backend.get_added_tokens_decoder()), unsaved
        if self._known[0] != looks:
            self._known = looks, hashlib.sha256((backend.to_str() + unsaved).encode()).hexdigest()
        return self._known[1]

    def save(self, folder: Path) -> None:
        with atomic_write(folder / TOKENIZER_FILE) as file:
            file.write(self.backend.to_str(pretty=True))
        write_json(folder / TOKENIZER_CONFIG_FILE, {**self.config, "model_max_length": self.max_length})


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """What tokenizer.json holds. Raises `ValueError` if it is missing or damaged."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {TOKENIZER_FILE} (the format of Hugging Face tokenizers)")
    text = read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    if undefined := _undefined_tokens(backend):
        raise ValueError(f"{path}: post_processor uses {undefined[0][:60]!r}, which is not in its special_tokens")
    return backend


def _undefined_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    """The special tokens that templates use without defining them, which the library only finds as it panics."""
    if backend.post_processor is None:
        return []
    state, undefined = json.loads(backend.post_processor.__getstate__()), set()
    for step in state.get("processors", [state]):
        pieces = [*step.get("single", ()), *step.get("pair", ())]
        used = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        undefined |= used - step.get("special_tokens", {}).keys()
    return sorted(undefined)


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. Raises `ValueError` naming one that is not a str or has a lone surrogate."""
    if isinstance(texts, str):
        raise ValueError("texts is a str, expected a list of str")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{row}] is a {type(text).__name__}, expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{row}] has a lone surrogate at character {error.start}") from None
    return list(texts)


def _configure(backend: tokenizers.Tokenizer, config: dict, model_type: str | None) -> str:
    """Applies tokenizer_config.json, without `add_bos_token` and `add_eos_token`: the post-processor of tokenizer.json
    says which special tokens are added. Returns the class. Source: transformers 5.23, `tokenization_utils_base.py`."""
    kind = tokenizer_kind(config, model_type, backend)
    backend.normalizer, backend.pre_tokenizer = built_steps(kind, config, backend)
    if kind in DEFAULTS:
        named = {f"{name}_token": config.get(f"{name}_token", token) for name, token in DEFAULTS[kind].items()}
        named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        used = [*backend.encode("").tokens, getattr(backend.model, "unk_token", None)]
        if used != list(named.values()):
            found = f"special tokens are {reprlib.repr(named)}, but {TOKENIZER_FILE} uses {reprlib.repr(used)}"
            raise ValueError(f"{TOKENIZER_CONFIG_FILE}: {found}")
    _add_listed_tokens(backend, config)
    return kind


def _add_listed_tokens(backend: tokenizers.Tokenizer, config: dict) -> None:
    """Adds the tokens that tokenizer_config.json lists, or changes what they do."""
    token = decoder = config.get("added_tokens_decoder", {})
    extra = config.get("extra_special_tokens", [])
    extra = [*config.get("additional_special_tokens", []), *(extra.values() if isinstance(extra, dict) else extra)]
    tokens = []
    try:
        numbered = [decoder[number] for number in sorted(decoder, key=int)]
        for token in numbered + [token for token in extra if token not in [known["content"] for known in numbered]]:
            token = {"content": token, "special": True} if isinstance(token, str) else dict(token)
            options = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "special") if key in token}
            options["normalized"] = token.get("normalized", not token.get("special", False))
            tokens.append(tokenizers.AddedToken(token["content"], **options))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{TOKENIZER_CONFIG_FILE}: added token {repr(token)[:60]} is malformed ({error})") from None
    backend.add_tokens(tokens)  # once: each call goes through all added tokens, of which Gemma has 6,000


def _add_tokens(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Adds the tokens of added_tokens.json, {token: id}, that the tokenizer lacks, in the order of their ids."""
    ids = read_object(path) if path.is_file() else {}
    if wrong := [token for token, i in ids.items() if type(i) is not int]:
        raise ValueError(f"{path}: the id of {wrong[0]!r} is {reprlib.repr(ids[wrong[0]])}, expected a whole number")
    backend.add_tokens([token for token in sorted(ids, key=ids.__getitem__) if backend.token_to_id(token) is None])
