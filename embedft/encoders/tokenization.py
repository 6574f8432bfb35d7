"""Texts to token ids, with the tokenizer that belongs to the weights.

The `tokenizers` library does the splitting. Here: where its file is, what may not be wrong with it, and truncation.
A text is taken as it is: not stripped, not normalised beyond what the tokenizer does.

    tokenizer = Tokenizer.load(folder, max_length=256)
    tokenizer.encode(["a question"])      # [[101, 1037, 3160, 102]]
"""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import normalizers
from tokenizers.normalizers import Lowercase

from ..files import atomic_write, read_object, write_json

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """tokenizer.json with a maximum length.

    Args:
        backend: the tokenizer; its padding and truncation settings are replaced.
        config: tokenizer_config.json, kept for writing back.
        max_length: tokens a text is cut to, special tokens included.
        lower_case: lower-case texts first (`do_lower_case` of sentence_bert_config.json).
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, *, max_length: int, lower_case: bool = False):
        self.backend, self.config, self.lower_case = backend, config, lower_case
        self.backend.no_padding()
        # In the tokenizer, not by str.lower: special tokens written in a text keep their case and so their meaning.
        if lower_case and not _lower_cases(backend.normalizer):
            steps = [Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
            self.backend.normalizer = normalizers.Sequence(steps)
        self.max_length = max_length

    @classmethod
    def load(cls, folder: Path, *, max_length: int, lower_case: bool = False) -> "Tokenizer":
        """Reads tokenizer.json and, when it is there, tokenizer_config.json."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ValueError(f"{folder}: no {TOKENIZER_FILE} (the tokenizer in the format of Hugging Face tokenizers)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        config_path = folder / TOKENIZER_CONFIG_FILE
        config = read_object(config_path) if config_path.is_file() else {}
        return cls(backend, config, max_length=max_length, lower_case=lower_case)

    @property
    def max_length(self) -> int:
        return self._max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        num_special = self.backend.num_special_tokens_to_add(False)
        if value <= num_special:
            raise ValueError(f"max_length is {value}, expected more than the {num_special} special tokens of a text")
        self._max_length = value
        self._truncate()

    def _truncate(self) -> None:
        self.backend.enable_truncation(self._max_length, direction=self.config.get("truncation_side", "right"))

    @property
    def largest_id(self) -> int:
        """The largest token id it can give."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def _prepare(self, texts: Sequence[str]) -> list[str]:
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

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its special tokens, cut to `max_length`."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(self._prepare(texts))]

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text whole: no special tokens, no truncation."""
        self.backend.no_truncation()
        try:
            encodings = self.backend.encode_batch_fast(self._prepare(texts), add_special_tokens=False)
        finally:
            self._truncate()
        return [encoding.ids for encoding in encodings]

    def prompt_length(self, prompt: str) -> int:
        """Tokens of `prompt` alone with its special tokens, less the one behind it: what it puts before a text."""
        special_T = self.backend.encode(prompt).special_tokens_mask
        return len(special_T) - (special_T[-1] if special_T else 0)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        with atomic_write(folder / TOKENIZER_FILE) as file:
            file.write(self.backend.to_str(pretty=True))
        write_json(folder / TOKENIZER_CONFIG_FILE, {**self.config, "model_max_length": self.max_length})


def _lower_cases(normalizer: normalizers.Normalizer | None) -> bool:
    """Whether a `Lowercase` step is there already, as in a tokenizer.json that `Tokenizer.save` wrote."""
    steps = normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer]
    return any(isinstance(step, Lowercase) for step in steps)
