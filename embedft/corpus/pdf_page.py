"""Reads the text of PDF pages with pypdf. Run as a script by pdf.py; imports the standard library and pypdf alone.

pypdf reads a page in two ways. Its layout mode puts text where the page shows it, with blanks for indentation and the
gaps of tables; it keeps words whole that the plain mode breaks. Its plain mode gives the text in the order in which
the file draws it, which for columns, rotated text and right-to-left scripts is the reading order. `page_text` reads
both and takes the layout unless the page shows that it went wrong.
"""

import contextlib
import json
import logging
import re
import struct
import sys
import unicodedata
import zlib
from itertools import pairwise
from typing import Any

# What pypdf raises on damaged files besides its own errors: whatever its code runs into.
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, zlib.error),
)
# Baselines closer than this share of the font's height are one line.
LINE_SHARE = 0.7
# Names and numbers of glyphs, which stand for characters that a font does not tell.
GLYPH_CODES = re.compile(r"/(?:g|G|C|c|cid|glyph|uni[0-9A-F]|[A-Z])\d+(?![\w.])|\(cid:\d+\)")
UNREADABLE_SHARE = 0.3

UNREADABLE = "its text is unreadable: its fonts do not say which characters they draw (it needs OCR)"
INCOMPLETE = "part of its text is missing or unreadable: a font does not say which characters it draws"


def open_pdf(path: str) -> Any:
    """Opens a file as a pypdf reader. Raises `ValueError` with the reason in one line."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if not head:
        raise ValueError("is empty (0 bytes)")
    if b"%PDF-" not in head:
        raise ValueError(f"is not a PDF file (it begins with {head[:12]!r})")
    try:
        reader = PdfReader(path)
        num_pages = len(reader.pages)
        if num_pages:
            reader.pages[0].get_contents()  # fails when the encryption cannot be undone
    except FileNotDecryptedError:
        raise ValueError("is encrypted: it needs a password") from None
    except DependencyError:
        raise ValueError("is encrypted with AES: reading it needs the package `cryptography`") from None
    except (PyPdfError, *FAILURES) as error:
        raise ValueError(f"is damaged ({one_line(error)})") from None
    if num_pages == 0:
        raise ValueError("has no pages")
    return reader


def page_text(page: Any, log: list[str]) -> dict[str, Any]:
    """The reply for one page: its text, whether it is plain, and what is wrong with it, if anything.

    Args:
        page: of pypdf.
        log: gets pypdf's messages while they are logged.
    """
    from pypdf.errors import PyPdfError

    log.clear()
    layout_options = {"layout_mode_space_vertically": True, "layout_mode_strip_rotated": False}
    texts, errors = [], []
    for options in ({}, {"extraction_mode": "layout", **layout_options}):
        try:
            texts.append(page.extract_text(**options))
        except (PyPdfError, *FAILURES) as error:
            texts.append("")
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]
    plain, layout = texts
    keeps_layout = layout.strip() and not (plain.strip() and is_scrambled(layout, plain, log, page))
    reply = {"text": layout} if keeps_layout else {"text": plain, "plain": True}
    share = unreadable_share(reply["text"])
    if share >= UNREADABLE_SHARE:
        return {"error": UNREADABLE}
    if share > 0.05 or any("uninterpretable font" in message for message in log):
        reply["error"] = INCOMPLETE
    return reply


def is_scrambled(layout: str, plain: str, log: list[str], page: Any) -> bool:
    """Whether the layout of a page lost the reading order, the blanks between words or some of the text."""
    if any(word in message for message in log for word in ("degraded", "incomplete")):  # rotated text, odd fonts
        return True
    if has_forms(page) and len("".join(plain.split())) > len("".join(layout.split())):
        return True  # the layout mode passes over forms, which are drawn by reference
    letters = [unicodedata.category(character) for character in plain if character.isalpha()]
    if letters.count("Lo") > 0.3 * len(letters):  # letters without case: Arabic, Hebrew, Indic, Chinese, Japanese
        return True
    broken, num_breaks = broken_lines(layout, plain)
    glued, num_words = glued_words(layout, plain)
    return (broken > 2 and broken > 0.1 * num_breaks) or (glued > 2 and glued > 0.01 * num_words)


def broken_lines(layout: str, plain: str, *, min_letters: int = 20, num_letters: int = 20) -> tuple[int, int]:
    """Counts line breaks of `plain` across which `layout` reads on differently, and all that were looked at.

    Looked at are breaks between two long lines. Two columns of prose that the layout has side by side break nearly all
    of them. Only letters are compared: numbers of a table may stand between the lines of a label. On 544 pages of 10-K
    filings at most 2 lines of a page break so.
    """

    def letters(text: str) -> str:
        return "".join(filter(str.isalpha, text))

    whole = letters(layout)
    lines = [line for line in map(letters, plain.split("\n")) if line]
    breaks = [
        before[-num_letters:] + after[:num_letters]
        for before, after in pairwise(lines)
        if min(len(before), len(after)) >= min_letters
    ]
    return sum(both not in whole for both in breaks), len(breaks)


def glued_words(layout: str, plain: str) -> tuple[int, int]:
    """Counts pairs of words of `plain` that `layout` writes as one, though it has both elsewhere, and all words.

    A word that the plain mode breaks ("tha t") does not count: its parts are no words of the layout.
    """
    words, plain_words, glued = set(layout.split()), set(plain.split()), 0
    for line in plain.split("\n"):
        parts = line.split()
        for first, second in pairwise(parts):
            glued += first + second in words - plain_words and {first, second} <= words
    return glued, len(plain.split())


def has_forms(page: Any) -> bool:
    """Whether the page draws forms, which are content streams of their own."""
    objects = page
    for key in ("/Resources", "/XObject"):
        if key not in objects:
            return False
        objects = objects[key]
    return any(objects[name].get("/Subtype") == "/Form" for name in objects)


def unreadable_share(text: str) -> float:
    """The share of a text's characters that are glyph codes, control characters or nobody's."""
    characters = [character for character in text if not character.isspace()]
    odd = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") or c == "\ufffd" for c in characters)
    codes = sum(map(len, GLYPH_CODES.findall(text)))
    return (odd + codes) / max(1, len(characters))


def one_line(error: BaseException) -> str:
    """An error as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def keep_lines_apart() -> None:
    """Makes pypdf, in this process, put less on one line of the layout.

    It takes two baselines for one line when they are closer than the height of the font, as those of text set solid
    are: "9.5 Consultant agrees that, if" and the line below it came out as one, in the wrong order (pypdf 6.0 to 7.1,
    page 224 of Lyft's 10-K of 2021). 0.7 of the height separates such lines and leaves footnote marks in theirs.
    """
    from pypdf._text_extraction import _layout_mode as layout

    merge_lines = layout.y_coordinate_groups

    def merge_nearer_lines(groups: list[dict], *more: Any) -> dict:
        heights = [group["font_height"] for group in groups]
        for group in groups:
            group["font_height"] *= LINE_SHARE
        try:
            return merge_lines(groups, *more)
        finally:
            for group, height in zip(groups, heights, strict=True):
                group["font_height"] = height

    layout.y_coordinate_groups = merge_nearer_lines


def serve() -> None:
    """Reads requests, [path, start, stop] per line; replies with one line for the file and one for each page."""
    from pypdf.errors import PyPdfError

    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("pypdf").addHandler(handler)
    with contextlib.suppress(ImportError, AttributeError):  # not a public place: another version reads as it does
        keep_lines_apart()
    path, reader = None, None
    for line in sys.stdin:
        wanted, start, stop = json.loads(line)
        if wanted != path:
            path, reader = None, None  # frees the last file's memory first
            try:
                reader = open_pdf(wanted)
            except ValueError as error:
                say({"error": str(error)})
                continue
            path = wanted
        say({"num_pages": len(reader.pages)})
        for i in range(start, min(stop, len(reader.pages))):
            try:
                say(page_text(reader.pages[i], log))
            except (PyPdfError, *FAILURES) as error:
                say({"error": f"cannot be read ({one_line(error)})"})


def say(reply: dict[str, Any]) -> None:
    """Writes one line of JSON, in ASCII: a page may hold half of a surrogate pair."""
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Python puts this file's folder first; its modules must not pass for packages that pypdf imports.
    del sys.path[0]
    serve()
