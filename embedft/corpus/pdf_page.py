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
from functools import partial
from itertools import chain, count, groupby, pairwise
from operator import itemgetter
from typing import Any

FAILURES = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError)
FAILURES += (RuntimeError, TypeError, ValueError, struct.error, zlib.error)
LINE_SHARE = 0.7  # baselines closer than this share of the font's height are one line
RUN_SHARE = 0.8  # baselines closer than this share of it may be one run: the braces and fractions of formulas are not
BLANK_SHARE = 0.24  # of the font's size: the blank of fonts that have none, such as TeX's, for which pypdf guesses 0.5
# Rows with cells of up to MAX_LINES lines are joined if they hold WRAPPED_SHARE of a page's words: on the pages of two
# 10-K filings, headings that wrap hold at most 0.1.
MAX_LINES, WRAPPED_SHARE = 4, 0.125
NUM_WORDS, KEPT_SHARE = 8, 0.95  # see `is_reordered`
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


def read_page(reader: Any, i: int, log: list[str], runs: list[dict]) -> dict[str, Any]:
    """The reply for page `i` (from 0): text, whether it is plain, and any problem. `log` gets pypdf's messages, `runs`
    the pieces of text that the page draws."""
    from pypdf.errors import PyPdfError

    log.clear()
    runs.clear()
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
    keeps_layout = layout.strip() and not (plain.strip() and is_scrambled(layout, plain, log, reader.pages[i], runs))
    reply = {"text": layout} if keeps_layout else {"text": plain, "plain": True}
    share = unreadable_share(reply["text"])
    if share >= 0.3:
        return {"error": UNREADABLE}
    if share > 0.05 or any("uninterpretable font" in message for message in log):
        reply["error"] = INCOMPLETE
    return reply


def is_scrambled(layout: str, plain: str, log: list[str], page: Any, runs: list[dict]) -> bool:
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
    return is_reordered(layout, plain, drawn_text(runs))


def is_reordered(layout: str, plain: str, drawn: str) -> bool:
    """Whether `plain` has more of the word sequences in the order drawn, unless it takes tables apart."""
    in_order, of_layout, of_plain = map(word_sequences, (drawn, layout, plain))
    is_worse = len(in_order & of_layout) < KEPT_SHARE * len(in_order & of_plain)
    return is_worse and not takes_tables_apart(layout, plain)


def takes_tables_apart(layout: str, plain: str) -> bool:
    """Whether at least four, and three quarters of the lines of `layout` with gaps, are rows, labels with amounts, that
    no line of `plain` has: drawn column by column, a table becomes a list of labels and one of numbers."""

    def is_amount(cell: str) -> bool:
        return any(map(str.isdigit, cell)) and not any(map(str.isalpha, cell))

    whole = [letters_and_digits(line) for line in plain.split("\n")]
    with_gaps = [cells for line in layout.split("\n") if len(cells := re.split(" {3,}", line.strip())) > 1]
    rows = (letters_and_digits("".join(cells)) for cells in with_gaps if all(map(is_amount, cells[1:])))
    num_lost = sum(not any(row in line for line in whole) for row in rows)
    return num_lost >= max(4, 0.75 * len(with_gaps))


def letters_and_digits(text: str) -> str:
    """A text without spaces, punctuation and signs."""
    return "".join(filter(str.isalnum, text))


def word_sequences(text: str) -> set[tuple[str, ...]]:
    """The sequences of NUM_WORDS words, whose hyphens do not count."""
    words = re.findall(r"\w+", re.sub(r"(?<=\w)[-\u00ad\u2010]\s*(?=\w)", "", text.lower()))
    return set(zip(*(words[i:] for i in range(NUM_WORDS)), strict=False))


def drawn_text(runs: list[dict]) -> str:
    """The text in the order drawn, with the pieces of one baseline from left to right."""
    text = ""
    for _, line in groupby(sorted(runs, key=itemgetter("order")), lambda run: round(run["ty"])):
        end = float("-inf")
        for run in sorted(line, key=itemgetter("tx")):
            text += " " * (run["tx"] > end + run["font_height"] / 10) + run["text"]
            end = run["displaced_tx"]
    return text


def join_wrapped_cells(lines: dict[int, list[dict]]) -> dict[int, list[dict]]:
    """Makes one line of each table row whose cells have several, drawn one after the other; takes and returns
    {baseline: runs}. Changes nothing if few words of the page are in such rows."""
    runs = [run | {"line": i} for i, line in enumerate(lines.values()) for run in line if run["text"].strip()]
    cells: list[list[dict]] = []
    for place, run in sorted(enumerate(runs), key=lambda item: item[1]["order"]):
        run["place"] = place
        if not (cells and is_below(cells[-1][-1], run)):
            cells.append([])
        cells[-1].append(run)
    wrapped = {i for cell in cells for i in range(cell[0]["line"], cell[-1]["line"])}
    baselines, joined, num_words, first = list(lines), dict(lines), 0, 0
    for last in (i for i in range(len(lines)) if i not in wrapped):
        row = [cell for cell in cells if last > first and first <= cell[0]["line"] <= last]
        space = [baselines[i] - baselines[i + 1] for i in (first - 1, last) if 0 <= i < len(lines) - 1]
        if is_row(row, min(space, default=0)):
            texts = [" ".join(run["text"].strip() for run in cell) for cell in row]
            num_words += sum(len(text.split()) for text in texts)
            for i in range(first, last + 1):
                joined[baselines[i]] = []
            joined[baselines[first]] = [
                cell[0] | {"text": f"{text}    "} for cell, text in zip(row, texts, strict=True)
            ]
        first = last + 1
    is_table = num_words >= WRAPPED_SHARE * sum(len(run["text"].split()) for run in runs)
    return {baseline: line for baseline, line in joined.items() if line} if is_table else lines


def is_below(above: dict, run: dict) -> bool:
    """Whether `run` is the next line of a cell that ends with `above`."""
    small, large = sorted((above["font_height"], run["font_height"]))
    overlap = run["tx"] < above["displaced_tx"] and above["tx"] < run["displaced_tx"]
    return overlap and large < 1.1 * small and LINE_SHARE < (above["ty"] - run["ty"]) * run["flip_sort"] / small <= 1.4


def is_row(cells: list[list[dict]], space: float) -> bool:
    """Whether these are the cells of a row: at least three, one of one line, another with lines that the layout
    separates, and more `space` around the row than between lines."""
    pairs = [pair for cell in cells for pair in pairwise(cell)]
    return (
        len(cells) >= 3
        and min(map(len, cells)) == 1 < max(map(len, cells)) <= MAX_LINES
        and space >= 1.15 * max(abs(above["ty"] - run["ty"]) for above, run in pairs)
        and any(run["place"] > above["place"] + 1 for above, run in pairs)
    )


def unreadable_share(text: str) -> float:
    """The share of a text's characters that are glyph codes, control characters or unassigned."""
    characters = "".join(text.split())
    odd = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") or c == "\ufffd" for c in characters)
    return (odd + sum(map(len, GLYPH_CODES.findall(text)))) / max(1, len(characters))


def one_line(error: BaseException) -> str:
    """An error as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def keep_lines_apart(runs: list[dict]) -> None:
    """Patches pypdf, in this process, to merge fewer baselines into one line of the layout.
    It merges baselines closer than the font's height, which joins tightly set lines (pypdf 6.0 to 7.1, page 224 of
    Lyft's 10-K of 2021). 0.7 of the height separates such lines but keeps footnote marks on theirs. Of a text printed
    several times within a tenth of the height, to look bold, keeps one. Collects what is left in `runs`, numbered in
    the order drawn."""
    from pypdf._text_extraction import _layout_mode as layout

    merge_lines, make_group, order = layout.y_coordinate_groups, layout._fixed_width_page.bt_group, count()

    def merge_nearer_lines(groups: list[dict], *more: Any) -> dict:
        once, places = [], defaultdict(list)
        for group in groups:
            x, y, near, others = group["tx"], group["ty"], group["font_height"] / 10, places[group["text"]]
            if all(max(abs(x - other_x), abs(y - other_y)) > near for other_x, other_y in others[-10:]):
                once.append(group | {"font_height": LINE_SHARE * group["font_height"], "original": group})
            others.append((x, y))
        runs[:] = (group["original"] for group in once)
        lines = {y: set_apart([group["original"] for group in line]) for y, line in merge_lines(once, *more).items()}
        return join_wrapped_cells(lines)

    layout._fixed_width_page.bt_group = lambda *parts: make_group(*parts) | {"order": next(order)}
    layout.y_coordinate_groups = merge_nearer_lines
    layout._fixed_width_page.LAYOUT_NEW_BT_GROUP_SPACE_WIDTHS = 1  # text that goes back by a blank begins a run; was 5


def set_apart(line: list[dict]) -> list[dict]:
    """Puts a blank between runs of a line, unless one begins where the one before ends: the layout puts none where its
    columns have run out, nor between the parts of a fraction, which overlap ("1" above "2" is not "12")."""

    def is_apart(run: dict, following: dict) -> bool:
        nearest = BLANK_SHARE * max(run["font_height"], following["font_height"])
        has_blank = run["text"].endswith(" ") or following["text"].startswith(" ")
        return abs(following["tx"] - run["displaced_tx"]) > nearest and not has_blank

    return [run | {"text": run["text"] + " " * is_apart(run, after)} for run, after in pairwise(line)] + line[-1:]


def advance() -> None:
    """Patches pypdf, in this process, to begin each string where the one before ends, which it does only after a number
    between them (pypdf 6.0 to 7.1: "p lan"), to know gaps from BLANK_SHARE / 2 on for blanks, and to begin a run at
    baselines RUN_SHARE of the font's height apart."""
    from pypdf._text_extraction._layout_mode import _fixed_width_page as layout
    from pypdf._text_extraction._layout_mode._text_state_manager import TextStateManager as Manager

    def show(self: Any, value: Any = "") -> Any:
        if self.shown is not None:
            self.add_trm(self.shown.displacement_matrix())
        self.shown = capture(self, value)
        size = self.font_size * self.Tz / 100
        if self.shown.space_tx > 0.3 * size:
            self.shown.space_tx = BLANK_SHARE * size
        self.shown.height = self.shown.font_height
        self.shown.font_height *= RUN_SHARE
        return self.shown

    def forget(move: Any) -> Any:
        def moved(self: Any, *matrix: Any) -> Any:
            self.shown = None
            return move(self, *matrix)

        return moved

    make_group = layout.bt_group
    layout.bt_group = lambda shown, *more: make_group(shown, *more) | {"font_height": shown.height}
    capture, Manager.shown, Manager.text_state_params = Manager.text_state_params, None, show
    for name in ("add_trm", "reset_tm", "reset_trm"):
        setattr(Manager, name, forget(getattr(Manager, name)))


def follow_matrices() -> None:
    """Patches pypdf, in this process, to follow matrices outside of q and Q, which it passes over (pypdf 6.0 to 7.1:
    the labels of TeX's drawings stand at the foot of the page)."""
    from pypdf._text_extraction import _layout_mode as layout

    show = layout.text_show_operations
    begin, end = ([], b"q"), ([], b"Q")
    layout.text_show_operations = lambda operations, *more: show(chain([begin], operations, [end]), *more)


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
    runs: list[dict] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("pypdf").addHandler(handler)
    for change in (partial(keep_lines_apart, runs), advance, follow_matrices, parse_once):
        with contextlib.suppress(ImportError, AttributeError):  # private: other versions stay unpatched
            change()
    path, reader = None, None
    for line in sys.stdin:
        wanted, i = json.loads(line)
        try:
            if wanted != path:
                path, reader = None, None  # frees the last file's memory first
                path, reader = wanted, open_pdf(wanted)
            reply = {"num_pages": len(reader.pages)} if i is None else read_page(reader, i, log, runs)
        except (PyPdfError, *FAILURES) as error:
            reply = {"error": str(error) if reader is None else f"cannot be read ({one_line(error)})"}
        print(json.dumps(reply), flush=True)  # in ASCII: a page may contain a lone surrogate


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules could shadow packages that pypdf imports
    serve()
