"""Checks of dataset contents. Each raises a `ValueError` whose message begins with `where`."""

import reprlib
from collections import Counter
from typing import Any

SKIP_EMPTY = "to drop empty texts, use --skip-empty (in Python: skip_empty=True)"


def is_blank(text: Any) -> bool:
    """Whether a value is None or only whitespace."""
    return text is None or (isinstance(text, str) and not text.strip())


def check_text(text: Any, where: str, advice: str = "") -> None:
    """Checks that a text or id is a non-blank string, valid as UTF-8. `advice` says what to do if it is blank."""
    if is_blank(text):
        raise ValueError(f"{where} is empty" + (f"; {advice}" if advice else ""))
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string, found {reprlib.repr(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can express it ("\ud83d" alone), but neither UTF-8 files nor tokenizers accept it.
        raise ValueError(f"{where} has a lone surrogate at character {error.start}") from None


def id_text(i: Any) -> Any:
    """An id as the text it is known by: exports have integers. Anything else stays as it is, for `check_text`."""
    return str(i) if type(i) is int else i


def check_id(kind: str, i: Any, texts: dict[str, str], where: str) -> None:
    """Checks that an id is among `texts`; `kind` is "query" or "document"."""
    if not isinstance(i, str) or i not in texts:
        place, unit = {"query": ("queries", "queries"), "document": ("corpus", "documents")}[kind]
        raise ValueError(f"{where}{kind} id {i!r} is not in the {place} ({len(texts):,} {unit})")


def check_distinct(values: list[str], where: str) -> None:
    """Checks that no value appears twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{where} {Counter(values).most_common(1)[0][0]!r} appears twice")


def check_grade(grade: Any, where: str) -> None:
    """Checks that a grade is a whole number of at most 32 bits; above 0 means relevant."""
    if type(grade) is not int or abs(grade) >= 2**31:
        raise ValueError(f"{where} must be a whole number, below 2^31, found {reprlib.repr(grade)}")
