"""Extracts the text of PDF pages with pypdf. pdf.py runs this as a script; it imports only pypdf and the stdlib.

pypdf's layout mode places text as on the page, including spaces and gaps in tables, and keeps words whole that plain
mode breaks. Plain mode keeps the drawing order, which is the reading order for columns, rotated text and
right-to-left scripts. The layout is used unless there are signs that it went wrong.
"""

import contextlib
import json
import logging
import re
import struct
import sys
import unicodedata
import zlib
from collections import defaultdict
from itertools import pairwise
from typing import Any

FAILURES = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError)
FAILURES += (RuntimeError, TypeError, ValueError, struct.error, zlib.error)
LINE_SHARE = 0.7  # baselines closer than this share of the font's height are one line
# (letters, number, share): how many breaks between lines of so many letters a layout may contradict. Columns side by
# side break nearly all, cells of several lines some: on the pages of two 10-K filings, at most 2 or half of them at 20
# letters, 43% at 10, and 20 at 3, the length of lines in an index or an address.
MOST_BROKEN = ((20, 2, 0.1), (20, 1, 0.5), (10, 1, 0.5), (3, 11, 0.5))
# Glyph names and numbers that stand in for characters that the font does not identify.
GLYPH_CODES = re.compile(r"/(?:g|G|C|c|cid|glyph|uni[0-9A-F]|[A-Z])\d+(?![\w.])|\(cid:\d+\)")
UNREADABLE = "its text is unreadable: its fonts do not map glyphs to characters (it needs OCR)"
INCOMPLETE = "part of its text is missing or unreadable: a font does not map glyphs to characters"


def open_pdf(path: str) -> Any:
    """Opens a file as a pypdf reader. Raises `ValueError` with the reason in one line."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer, not the PDF; download it with `git lfs pull`")
    if b"%PDF-" not in head:
        raise ValueError(f"is not a PDF file (it begins with {head[:12]!r})" if head else "is empty (0 bytes)")
    try:
        reader = PdfReader(path)
        for page in reader.pages[:1]:
            page.get_contents()  # fails if the file cannot be decrypted
    except FileNotDecryptedError:
        raise ValueError("is encrypted: it needs a password") from None
    except DependencyError:
        raise ValueError("is encrypted with AES: reading it needs the package `cryptography`") from None
    except (PyPdfError, *FAILURES) as error:
        raise ValueError(f"is damaged ({one_line(error)})") from None
    if not reader.pages:
        raise ValueError("has no pages")
    return reader


def read_page(reader: Any, i: int, log: list[str]) -> dict[str, Any]:
    """The reply for page `i` (from 0): text, whether it is plain, and any problem. `log` gets pypdf's messages."""
    from pypdf.errors import PyPdfError

    log.clear()
    texts, errors = [], []
    for options in ({"extraction_mode": "layout", "layout_mode_strip_rotated": False}, {}):
        try:
            texts.append(reader.pages[i].extract_text(**options))
        except (PyPdfError, *FAILURES) as error:
            texts.append("")
            errors.append(error)
    if len(errors) == 2:
        raise errors[1]
    layout, plain = texts
    keeps_layout = layout.strip() and not (plain.strip() and is_scrambled(layout, plain, log, reader.pages[i]))
    reply = {"text": layout} if keeps_layout else {"text": plain, "plain": True}
    share = unreadable_share(reply["text"])
    if share >= 0.3:
        return {"error": UNREADABLE}
    if share > 0.05 or any("uninterpretable font" in message for message in log):
        reply["error"] = INCOMPLETE
    return reply


def is_scrambled(layout: str, plain: str, log: list[str], page: Any) -> bool:
    """Whether layout mode lost a page's reading order, spaces between words or part of its text."""
    if any(word in message for message in log for word in ("degraded", "incomplete")):  # rotated text, odd fonts
        return True
    # Layout mode skips forms, content streams that the page draws by reference.
    objects = page
    for key in ("/Resources", "/XObject"):
        objects = objects[key] if key in objects else {}  # noqa: SIM401 (pypdf's `get` does not follow references)
    has_forms = any(objects[name].get("/Subtype") == "/Form" for name in objects)
    if has_forms and len("".join(plain.split())) > len("".join(layout.split())):
        return True
    letters = [unicodedata.category(character) for character in plain if character.isalpha()]
    if letters.count("Lo") > 0.3 * len(letters):  # letters without case: Arabic, Hebrew, Indic, Chinese, Japanese
        return True
    for least, most, share in MOST_BROKEN:
        broken, num_breaks = broken_lines(layout, plain, least=least)
        if broken > max(most, share * num_breaks):
            return True
    glued, num_words = glued_words(layout, plain)
    return glued > max(2, 0.01 * num_words)


def broken_lines(layout: str, plain: str, *, least: int) -> tuple[int, int]:
    """Counts the line breaks of `plain` that `layout` contradicts, and all, between lines of at least `least` letters.
    Only letters are compared, since table cells may appear between the lines of a label."""
    whole, *lines = ("".join(filter(str.isalpha, text)) for text in (layout, *plain.split("\n")))
    pairs = pairwise(line for line in lines if line)
    breaks = [first[-20:] + second[:20] for first, second in pairs if min(len(first), len(second)) >= least]
    return sum(both not in whole for both in breaks), len(breaks)


def glued_words(layout: str, plain: str) -> tuple[int, int]:
    """Counts word pairs of `plain` that `layout` writes as one word though it has both elsewhere, and all words."""
    words, plain_words = set(layout.split()), plain.split()
    new = words.difference(plain_words)
    pairs = (pair for line in plain.split("\n") for pair in pairwise(line.split()) if "".join(pair) in new)
    return sum(words.issuperset(pair) for pair in pairs), len(plain_words)


def unreadable_share(text: str) -> float:
    """The share of a text's characters that are glyph codes, control characters or unassigned."""
    characters = "".join(text.split())
    odd = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") or c == "\ufffd" for c in characters)
    return (odd + sum(map(len, GLYPH_CODES.findall(text)))) / max(1, len(characters))


def one_line(error: BaseException) -> str:
    """An error as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def keep_lines_apart() -> None:
    """Patches pypdf, in this process, to merge fewer baselines into one line of the layout.
    It merges baselines closer than the font's height, which joins tightly set lines (pypdf 6.0 to 7.1, page 224 of
    Lyft's 10-K of 2021). 0.7 of the height separates such lines but keeps footnote marks on theirs. Of a text printed
    several times within a tenth of the height, to look bold, keeps one."""
    from pypdf._text_extraction import _layout_mode as layout

    merge_lines = layout.y_coordinate_groups

    def merge_nearer_lines(groups: list[dict], *more: Any) -> dict:
        once, places = [], defaultdict(list)
        for group in groups:
            x, y, near, others = group["tx"], group["ty"], group["font_height"] / 10, places[group["text"]]
            if all(max(abs(x - other_x), abs(y - other_y)) > near for other_x, other_y in others[-10:]):
                once.append(group | {"font_height": LINE_SHARE * group["font_height"], "original": group})
            others.append((x, y))
        return {y: [group["original"] for group in line] for y, line in merge_lines(once, *more).items()}

    layout.y_coordinate_groups = merge_nearer_lines


def parse_once() -> None:
    """Patches pypdf, in this process, to parse a page once for both modes, since parsing dominates their time."""
    from pypdf.generic import ContentStream

    parse, last = ContentStream._parse_content_stream, (None, [])

    def parse_or_reuse(self: Any, stream: Any) -> None:
        nonlocal last
        content = (stream.getvalue(), self.forced_encoding)
        if content != last[0]:
            parse(self, stream)
            last = content, self._operations
        self._operations = list(last[1])

    ContentStream._parse_content_stream = parse_or_reuse


def serve() -> None:
    """Answers each JSON line [path, i] with a JSON line: page `i` (from 0) or, for null, the number of pages."""
    from pypdf.errors import PyPdfError

    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("pypdf").addHandler(handler)
    for change in (keep_lines_apart, parse_once):
        with contextlib.suppress(ImportError, AttributeError):  # private: other versions stay unpatched
            change()
    path, reader = None, None
    for line in sys.stdin:
        wanted, i = json.loads(line)
        try:
            if wanted != path:
                path, reader = None, None  # frees the last file's memory first
                path, reader = wanted, open_pdf(wanted)
            reply = {"num_pages": len(reader.pages)} if i is None else read_page(reader, i, log)
        except (PyPdfError, *FAILURES) as error:
            reply = {"error": str(error) if reader is None else f"cannot be read ({one_line(error)})"}
        print(json.dumps(reply), flush=True)  # in ASCII: a page may contain a lone surrogate


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules could shadow packages that pypdf imports
    serve()
