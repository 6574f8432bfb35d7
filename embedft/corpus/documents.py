"""Documents: PDF, text and Markdown files to pages of clean text, with the line why for all that cannot be read.

A PDF page becomes lines again: the wrapped lines of a paragraph are one line, a heading, a bullet and a row of a table
are a line each. Not here: the reading of PDF (pdf.py), chunks (chunks.py), OCR.

    pages, skipped = read_documents(["report.pdf", "notes/"])
    pages, dropped = drop_repeated_lines(pages)
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ..files import read_text
from .pdf import PdfText, read_pdfs

SUFFIXES = (".pdf", ".txt", ".text", ".md", ".markdown")
MARKDOWN = (".md", ".markdown")

# A header or footer is among this many lines at the top or the bottom of a page ...
EDGE_LINES = 3
# ... of at least three pages and this share of the file's; a page number needs the three pages alone.
MIN_REPEATED_PAGES, REPEATED_SHARE = 3, 0.2

# A line is full, so that the next one may continue it, when the next word would have gone beyond this share of a full
# line: the characters of a line of given width vary by a tenth in proportional type. A full line of a page is the
# median of its lines that are not shorter than LONG_SHARE of the document's.
FULL_SHARE, LONG_SHARE = 0.85, 0.6
HEADING_SHARE = 0.6

CONTROLS = {i: None for i in range(0x110000) if unicodedata.category(chr(i)) in ("Cc", "Cs")}
LAYOUT_CLEANING = {
    **CONTROLS,
    **{ord(blank): " " for blank in "\t\v\f\x1c\x1d\x1e\x1f\x85"},
    **{i: unicodedata.normalize("NFKC", chr(i)) for i in range(0xFB00, 0xFB07)},
    ord("\n"): "\n",
}
TEXT_CLEANING = {**CONTROLS, ord("\n"): "\n", ord("\t"): "\t"}

BULLET = r"[•●◦○▪■□‣⁃∙·–—*-]"
NUMBERING = (
    r"(?:(?:Section|Article|Item|Note|Part|Exhibit) )?\(?(?:\d{1,3}(?:\.\d{1,3})*[A-Z]?|[A-Za-z]|[ivxlcIVXLC]+)[.)]*"
)
MARKER = re.compile(rf"(?:(?:{BULLET} +|{NUMBERING} {{2,}})(?=\S))+")
PAGE_NUMBER = re.compile(r"\W*(?:page\s+)?(?:[a-z]-)?(?:\d{1,4}|[ivxlc]{1,7})(?:\s*(?:of|/)\s*\d{1,4})?\W*", re.I)
SENTENCE_STOP = re.compile(r"[.:;!?][\"'”’)\]]*$")

LETTERS = r"[^\W\d_]"
WORD = re.compile(rf"{LETTERS}+(?:-{LETTERS}+)*")
# "-\n" inside a word: the word's beginning and its end on the next line.
BROKEN_WORD = re.compile(
    rf"(?<![^\W\d_])(?<![^\W\d_]-)({LETTERS}+(?:-{LETTERS}+)*)-\n[ \t]*({LETTERS}+(?:-{LETTERS}+)*)"
)
LAST_PART = re.compile(r"[^\W_]+(?:-[^\W_]+)*$")
FIRST_PART = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
# What follows a hyphen that stands for a word to come: "pre- and post-closing".
SUSPENDED = ("and", "or", "to")


class Page(NamedTuple):
    """A page with text. `file`: as the user named it; `number`: from 1."""

    file: str
    number: int
    text: str


class Skipped(NamedTuple):
    """A page that is not there, or with `page` None a whole file, and why."""

    file: str
    page: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.page is None else f' page {self.page}'}: {self.reason}"


class Documents(NamedTuple):
    """What was read, and what was not."""

    pages: list[Page]
    skipped: list[Skipped]


def read_documents(paths: Sequence[str | Path], *, processes: int | None = None) -> Documents:
    """The pages with text of files and folders, in the order given; the files of a folder are sorted.

    .pdf: cleaned as `clean_layout` says. .txt, .text, .md, .markdown: UTF-8, a form feed separates pages, cleaned as
    `clean_text` says. A file that is named twice is read once. In folders, hidden files are passed over in silence and
    those of other kinds with one line a folder.

    Args:
        paths: files and folders; the files of a folder are named "folder/relative".
        processes: of `read_pdfs`.

    Raises:
        ValueError: a path is not there, or a named file of another kind: before work starts. No page has text: lists
            why.
    """
    files, skipped = _find_files(paths)
    pdf_files = [name for name in files if _suffix(name) == ".pdf"]
    pdf_texts = dict(zip(pdf_files, read_pdfs(pdf_files, processes=processes), strict=True))
    pages: list[Page] = []
    for name in files:
        found = _pdf_pages(name, pdf_texts[name]) if name in pdf_texts else _text_pages(name)
        pages += found.pages
        skipped += found.skipped
    if not pages:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ValueError(f"no page with text in {', '.join(map(str, paths)) or 'no files'}{reasons}")
    return Documents(pages, skipped)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _find_files(paths: Sequence[str | Path]) -> tuple[list[str], list[Skipped]]:
    """The files to read, each once, and what was passed over."""
    names: dict[str, str] = {}  # by the file itself, whatever it was called
    skipped = []
    for path in map(str, paths):
        if os.path.isdir(path):
            others: Counter[str] = Counter()
            for name in _files_in(path):
                if _suffix(name) in SUFFIXES:
                    names.setdefault(os.path.realpath(name), name)
                else:
                    others[_suffix(name) or "no suffix"] += 1
            if others:
                kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items()))
                skipped.append(Skipped(path, None, f"{others.total()} files of other kinds passed over: {kinds}"))
        elif not os.path.exists(path):
            raise ValueError(f"{path}: no such file or folder")
        elif _suffix(path) not in SUFFIXES:
            raise ValueError(f"{path}: expected a folder or one of {', '.join(SUFFIXES)}")
        else:
            names.setdefault(os.path.realpath(path), path)
    return list(names.values()), skipped


def _files_in(folder: str) -> list[str]:
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda name: Path(name).parts)


def _pdf_pages(name: str, pdf: PdfText) -> Documents:
    if pdf.reason is not None:
        return Documents([], [Skipped(name, None, pdf.reason)])
    texts = clean_layout(pdf.pages)
    if not any(texts) and not pdf.failures:
        return Documents([], [Skipped(name, None, f"none of its {len(texts)} pages has text (a scan needs OCR first)")])
    return _with_text(name, texts, pdf.failures)


def _text_pages(name: str) -> Documents:
    try:
        text = read_text(name)
    except ValueError as error:
        return Documents([], [Skipped(name, None, str(error).removeprefix(f"{name} "))])
    except OSError as error:
        return Documents([], [Skipped(name, None, f"cannot be read ({error.strerror})")])
    texts = clean_text(text, markdown=_suffix(name) in MARKDOWN).split("\f")
    if not any(text.strip() for text in texts):
        return Documents([], [Skipped(name, None, "has no text")])
    return _with_text(name, texts, {})


def _with_text(name: str, texts: Sequence[str], failures: dict[int, str]) -> Documents:
    numbered = list(enumerate(texts, start=1))
    return Documents(
        [Page(name, number, text) for number, text in numbered if text.strip()],
        [Skipped(name, number, failures.get(number, "has no text")) for number, text in numbered if not text.strip()],
    )


# Hyphens at line ends.


class _Words:
    """How often each word stands in a document; the halves of words broken at line ends do not count."""

    def __init__(self, text: str):
        self.counts = Counter(WORD.findall(BROKEN_WORD.sub(" ", text).lower()))

    def hyphen_stays(self, left: str, right: str) -> bool | None:
        """Whether `left`-`right` is a word with a hyphen, by what else the document has; None: it has neither."""
        left, right = left.lower(), right.lower()
        kept, joined = self.counts[f"{left}-{right}"], self.counts[left + right]
        return None if kept == joined == 0 else kept >= joined

    def join(self, left: str, right: str) -> str:
        """Two lines of one paragraph as one.

        Where the document tells nothing of the word, the hyphen stays when the halves are words of their own, or
        no mere letters, or hold a hyphen or a capital already.
        """
        if left.endswith("\u00ad"):
            return left[:-1] + right
        beginning = LAST_PART.search(left[:-1]) if left.endswith(("-", "\u2010")) else None
        end = FIRST_PART.match(right)
        if beginning is None or end is None:
            # A dash or a slash that is set tight stays so.
            tight = left.endswith(("—", "/")) and not left[:-1].endswith(" ") and len(left) > 1
            return left + right if tight else f"{left} {right}"
        first, second = beginning[0], end[0]
        stays = self.hyphen_stays(first, second)
        if stays is None and second in SUSPENDED:
            return f"{left} {right}"
        if stays is None:
            of_letters = f"{first}{second}".isalpha() and not second[:1].isupper()
            stays = not of_letters or bool(self.counts[first.lower()] and self.counts[second.lower()])
        return left + right if stays else left[:-1] + right


def clean_text(text: str, *, markdown: bool = False) -> str:
    """The text of a file that has its lines already: they stay, less trailing blanks and control characters.

    A word broken at a line end becomes whole, on the first of its lines, where the same word stands elsewhere in the
    text, with or without the hyphen; fenced blocks of Markdown stay as they are. Form feeds stay.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    pages = [
        "\n".join(line.rstrip() for line in page.translate(TEXT_CLEANING).split("\n")) for page in text.split("\f")
    ]
    words = _Words("\n".join(pages))

    def mend(match: re.Match) -> str:
        stays = words.hyphen_stays(match[1], match[2])
        return match[0] if stays is None else f"{match[1]}{'-' if stays else ''}{match[2]}{match[3]}\n"

    # After the word's end whatever is glued to it goes along, and the blanks behind that go.
    broken = re.compile(BROKEN_WORD.pattern + r"(?!-)(\S*)(?:[ \t]+|\n|$)")

    def mend_all(part: str) -> str:
        part = re.sub(r"\u00ad\n[ \t]*(\S+)(?:[ \t]+|\n|$)", r"\1\n", part)
        return broken.sub(mend, part)

    fence = re.compile(r"(^[ \t]*(?:```|~~~).*?(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z))", re.M | re.S)
    done = []
    for page in pages:
        parts = fence.split(page) if markdown else [page]
        done.append("".join(part if i % 2 else mend_all(part) for i, part in enumerate(parts)))
    return "\f".join(done)


# The lines of a page as it is laid out.


@dataclass(frozen=True)
class _Line:
    """`column`: where the text begins, behind a bullet or number; `indent`: where the line does."""

    text: str
    indent: int
    column: int
    num_characters: int  # behind the column, blanks between words counted once
    is_row: bool  # of a table: has gaps between columns
    after_gap: bool  # more space than between lines comes before it
    apart: bool = False  # a header, a footer or a page number

    @property
    def is_marked(self) -> bool:
        return self.column > self.indent

    @property
    def width(self) -> int:
        return self.column + self.num_characters


def clean_layout(texts: Sequence[str]) -> list[str]:
    """Pages of one PDF file as they are laid out, blanks for distances, to running text.

    Blanks are collapsed; wrapped lines of a paragraph are joined by one; paragraphs, headings, bullets and rows of
    tables are a line each. A hyphen at a line end goes, unless the document has the word with it elsewhere. Ligatures
    are spelt out, control characters and soft hyphens at line ends removed. All other characters stay, in order.
    """
    cleaned = [text.translate(LAYOUT_CLEANING) for text in texts]
    pages = [_lines(text) for text in cleaned]
    repeated = _repeated([[line.text for line in lines] for lines in pages], range(1, len(pages) + 1))
    words = _Words("\n".join("\n".join(line.text for line in lines) for lines in pages))
    widths = sorted(line.width for lines in pages for line in lines if not line.is_row)
    usual = widths[len(widths) * 3 // 4] if widths else 0
    return [_paragraphs(lines, apart, words, usual) for lines, apart in zip(pages, repeated, strict=True)]


def _lines(text: str) -> list[_Line]:
    lines, gap = [], False
    raw_lines = text.split("\n")
    # On a page in double spacing an empty line says nothing.
    spaced = 2 * sum(not line.strip() for line in raw_lines) > len(raw_lines) * 0.8
    for raw in raw_lines:
        body = raw.strip()
        if not body:
            gap = not spaced
            continue
        indent = len(raw) - len(raw.lstrip())
        marker = MARKER.match(body)
        start = marker.end() if marker else 0
        gaps = [len(blanks) for blanks in re.findall(r"\s+", body[start:])]
        widest = max(gaps, default=0)
        # Justified text has wide blanks too, but about as wide as each other.
        is_row = widest > 3 or (widest == 3 and median(gaps) == 1)
        num_characters = len(" ".join(body[start:].split()))
        lines.append(_Line(" ".join(body.split()), indent, indent + start, num_characters, is_row, gap))
        gap = False
    return lines


def _paragraphs(lines: list[_Line], repeated: set[int], words: _Words, usual: int) -> str:
    """The lines of a page, joined where one continues the other; `usual`: the width of the document's full lines."""
    edges = {*range(EDGE_LINES), *range(len(lines) - EDGE_LINES, len(lines))}
    lines = [
        replace(line, apart=i in repeated or (i in edges and PAGE_NUMBER.fullmatch(line.text) is not None))
        for i, line in enumerate(lines)
    ]
    long = [line.width for line in lines if not line.is_row and line.width >= LONG_SHARE * usual]
    edge = median(long) if long else usual
    paragraphs: list[str] = []
    members: list[_Line] = []
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else None
        if members and _goes_on(members, line, following, edge):
            paragraphs[-1] = words.join(paragraphs[-1], line.text)
            members.append(line)
        else:
            paragraphs.append(line.text)
            members = [line]
    return "\n".join(paragraph.removesuffix("\u00ad") for paragraph in paragraphs)


def _goes_on(members: list[_Line], line: _Line, following: _Line | None, edge: float) -> bool:
    """Whether `line` belongs to the paragraph whose lines so far are `members`; `edge`: the page's right one."""
    first, last = members[0], members[-1]
    if line.after_gap or line.is_marked or last.is_row or line.apart or last.apart:
        return False
    is_full = last.width + 1 + len(line.text.split(" ", 1)[0]) >= FULL_SHARE * edge
    if line.is_row:  # or a line of prose with a hole in it
        return is_full and line.text[0].islower() and abs(line.indent - last.indent) <= 1
    has_ended = SENTENCE_STOP.search(last.text) is not None
    if len(members) > 1:
        aligned = abs(line.indent - last.indent) <= 1
    else:  # the first line may be indented, or stand out to the left by its bullet
        aligned = line.indent <= first.indent + 1 or (first.is_marked and abs(line.indent - first.column) <= 2)
        # Two first lines of paragraphs, the earlier one of a single line.
        if has_ended and following is not None and following.indent + 1 < min(line.indent, first.indent + 1):
            return False
    if not aligned:
        return False
    if line.text[0].islower():
        return True
    is_heading = (
        has_ended and line.width < HEADING_SHARE * edge and not line.text.endswith((".", ",", ";", ":", "!", "?", ")"))
    )
    return is_full and not is_heading


# Headers and footers.


def drop_repeated_lines(pages: Sequence[Page]) -> tuple[list[Page], dict[str, int]]:
    """Pages without the headers and footers that repeat in their file, and how often each was dropped.

    Such a line is among the first or last three of its page, and the same but for digits stands at the same end of at
    least three pages and a fifth of the file's. Its numbers must be the same on three pages or rise with the page,
    which a table's do not. A line that is a page number alone needs three pages of its count. A page that had nothing
    else is left out.

    Returns:
        (pages, {line with "#" for each number: how many were dropped}), the most frequent first.
    """
    by_file: dict[str, list[Page]] = {}
    for page in pages:
        by_file.setdefault(page.file, []).append(page)
    kept: dict[tuple[str, int], Page] = {}
    dropped: Counter[str] = Counter()
    for file, members in by_file.items():
        lines = [page.text.split("\n") for page in members]
        repeated = _repeated(lines, [page.number for page in members])
        for page, own, gone in zip(members, lines, repeated, strict=True):
            dropped.update(re.sub(r"\d+", "#", own[i].strip()) for i in gone)
            text = "\n".join(line for i, line in enumerate(own) if i not in gone)
            if text.strip():
                kept[file, page.number] = page._replace(text=text)
    return [kept[page[:2]] for page in pages if page[:2] in kept], dict(dropped.most_common())


def _repeated(pages: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[set[int]]:
    """For each page of a file, its lines that are headers or footers; `numbers`: of the pages."""
    stands: dict[tuple[bool, str], list[tuple[int, int, list[int]]]] = {}  # (at the top, line) -> (page, line, digits)
    for p, lines in enumerate(pages):
        filled = [i for i, line in enumerate(lines) if line.strip()]
        edges = [(True, i) for i in filled[:EDGE_LINES]] + [(False, i) for i in filled[-EDGE_LINES:]]
        for at_top, i in edges:
            line = " ".join(lines[i].split()).casefold()
            found = [int(number) for number in re.findall(r"[0-9]{1,9}", line)]
            stands.setdefault((at_top, re.sub(r"[0-9]{1,9}", "#", line)), []).append((p, i, found))
    repeated: list[set[int]] = [set() for _ in pages]
    for (_, line), places in stands.items():
        is_number = "#" in line and PAGE_NUMBER.fullmatch(line.replace("#", "1")) is not None
        share = 0 if is_number else REPEATED_SHARE * len(pages)
        # For each number of the line: how many pages have the very same, and how many have one that rises with them.
        same = Counter((slot, value) for *_, found in places for slot, value in enumerate(found))
        rising = Counter((slot, value - numbers[p]) for p, _, found in places for slot, value in enumerate(found))
        accepted = []
        for p, i, found in places:
            counted = (
                max(0 if is_number and slot == 0 else same[slot, value], rising[slot, value - numbers[p]])
                for slot, value in enumerate(found)
            )
            if all(count >= MIN_REPEATED_PAGES for count in counted):
                accepted.append((p, i))
        if len({p for p, _ in accepted}) >= max(MIN_REPEATED_PAGES, share):
            for p, i in accepted:
                repeated[p].add(i)
    return repeated
