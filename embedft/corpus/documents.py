"""Reads PDF, text and Markdown files into pages of clean text, and says why for everything that cannot be read.

    pages, skipped = read_documents(["report.pdf", "notes/"])
    pages, dropped = drop_repeated_lines(pages)

Not here: how PDF is read (pdf.py) and its lines joined (layout.py), Markdown (markdown.py), chunks (chunks.py), OCR.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import read_text
from .layout import CLEANING, clean_layout, repeated_lines
from .markdown import split_sections
from .pdf import PdfText, read_pdfs

MARKDOWN = (".md", ".markdown")
SUFFIXES = (".pdf", ".txt", ".text", *MARKDOWN)


class Page(NamedTuple):
    """A page with text, or a section of a Markdown page.

    `file`: as the user named it, bytes that are not UTF-8 escaped; `number`: from 1; `headings`: the path of headings
    that a Markdown section stands under, outermost first, None in other files.
    """

    file: str
    number: int
    text: str
    headings: tuple[str, ...] | None = None


class Skipped(NamedTuple):
    """What is wrong with a page or, if `page` is None, with a whole file; it was left out unless `reason` says so."""

    file: str
    page: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.page is None else f' page {self.page}'}: {self.reason}"


class Contents(NamedTuple):
    """The pages with text of some documents, and what was left out and why."""

    pages: list[Page]
    skipped: list[Skipped]


def read_documents(paths: Sequence[str | Path], *, processes: int | None = None) -> Contents:
    """Reads files and folders in the order given; the files of a folder are sorted.

    .pdf: lines become paragraphs, see `clean_layout`. .txt, .text, .md, .markdown: UTF-8, lines stay, a form feed
    separates pages; Markdown pages are split at headings. A file that is named twice is read once. In folders, hidden
    files are ignored and those of other kinds counted.

    Args:
        paths: files and folders; the files of a folder are named "folder/relative".
        processes: see `read_pdfs`.

    Raises:
        ValueError: a path does not exist or is a file of another kind (before any work), or no page has text.
    """
    files, skipped = _find_files(paths)
    pdf_files = [name for name in files if _suffix(name) == ".pdf"]
    pdf_texts = dict(zip(pdf_files, read_pdfs(pdf_files, processes=processes), strict=True))
    pages: list[Page] = []
    for name in files:
        found, failures = _read_pdf(pdf_texts[name]) if name in pdf_texts else _read_text_file(name)
        pages += [Page(printable(name), *page) for page in found]
        skipped += [Skipped(printable(name), number, reason) for number, reason in failures.items()]
    if not pages:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ValueError(f"no page with text in {', '.join(map(printable, paths)) or 'no files'}{reasons}")
    return Contents(pages, skipped)


def printable(path: str | Path) -> str:
    r"""A file name as text that can be printed and saved: bytes that are not UTF-8 as \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _find_files(paths: Sequence[str | Path]) -> tuple[list[str], list[Skipped]]:
    """The files to read, each once, and what was left out."""
    names: dict[str, str] = {}  # by the file itself, whatever it was called
    skipped = []
    for path in map(os.fspath, paths):
        if os.path.isdir(path):
            others: Counter[str] = Counter()
            for name in _files_in(path):
                if _suffix(name) not in SUFFIXES:
                    others[printable(_suffix(name)) or "no suffix"] += 1
                elif os.path.exists(name) and not os.path.isfile(name):
                    skipped.append(Skipped(printable(name), None, "is not a regular file"))
                else:
                    names.setdefault(os.path.realpath(name), name)
            if others:
                kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items()))
                reason = f"{others.total()} files of other kinds ignored: {kinds}"
                skipped.append(Skipped(printable(path), None, reason))
        elif not os.path.exists(path):
            raise ValueError(f"{printable(path)}: no such file or folder")
        elif not os.path.isfile(path) or _suffix(path) not in SUFFIXES:
            raise ValueError(f"{printable(path)}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")
        else:
            names.setdefault(os.path.realpath(path), path)
    return list(names.values()), skipped


def _files_in(folder: str) -> list[str]:
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda name: Path(name).parts)


_Found = tuple[list[tuple], Mapping[int | None, str]]  # the fields of each page but its file; {page or None: reason}


def _read_pdf(pdf: PdfText) -> _Found:
    if pdf.reason is not None:
        return [], {None: pdf.reason}
    texts = clean_layout(pdf.pages, plain=pdf.plain)
    if not any(texts) and not pdf.failures:
        return [], {None: f"none of its {len(texts)} pages has text (scanned pages need OCR)"}
    return _pages_with_text([[(text, None)] for text in texts], pdf.failures)


def _read_text_file(name: str) -> _Found:
    try:
        text = read_text(name)
    except ValueError as error:
        return [], {None: str(error).removeprefix(f"{name} ")}
    except OSError as error:
        return [], {None: f"cannot be read ({error.strerror})"}
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CLEANING | {ord("\t"): "\t", ord("\f"): "\f"})
    texts = ["\n".join(map(str.rstrip, page.split("\n"))) for page in text.split("\f")]
    if not text.strip():
        return [], {None: "has no text"}
    if _suffix(name) in MARKDOWN:
        return _pages_with_text(split_sections(texts), {})
    return _pages_with_text([[(text, None)] for text in texts], {})


def _pages_with_text(pages: Sequence[Sequence[tuple]], failures: Mapping[int, str]) -> _Found:
    """`pages`: the (text, headings) of the sections of each page."""
    found = [(i, *section) for i, page in enumerate(pages, start=1) for section in page if section[0].strip()]
    empty = {*range(1, len(pages) + 1)} - {number for number, *_ in found}
    reasons = dict.fromkeys(empty, "has no text") | dict(failures)
    return found, dict(sorted(reasons.items()))


def drop_repeated_lines(pages: Sequence[Page]) -> tuple[list[Page], dict[str, int]]:
    """Drops the headers and footers that repeat in a file, all but the first, and its page numbers.

    Such a line is among the first or last three of its page and, digits aside, stands at the same end of at least
    three pages and a fifth of the file's. Its numbers must be the same on three pages or rise with the page, which a
    table's do not. The first of its kind stays, as a title or the name of a form that is nowhere else; two lines whose
    numbers differ otherwise than by the page are of two kinds. A line that is a page number alone needs three pages of
    its count and always goes. A page that had nothing else is left out. Markdown stays as it is.

    Returns:
        (pages, {line with "#" for each number: how many were dropped}), the most frequent first.
    """
    by_file: dict[str, list[int]] = {}
    for row, page in enumerate(pages):
        if page.headings is None:
            by_file.setdefault(page.file, []).append(row)
    kept = dict(enumerate(pages))
    dropped: Counter[str] = Counter()
    for rows in by_file.values():
        lines = [pages[row].text.split("\n") for row in rows]
        seen: set = set()
        for row, own, repeated in zip(rows, lines, repeated_lines(lines, [pages[i].number for i in rows]), strict=True):
            gone = {i for i, kind in repeated.items() if kind is None or kind in seen}
            seen.update(repeated.values())
            dropped.update(re.sub(r"\d+", "#", own[i].strip()) for i in gone)
            text = "\n".join(line for i, line in enumerate(own) if i not in gone)
            kept[row] = pages[row]._replace(text=text)
            if not text.strip():
                del kept[row]
    return list(kept.values()), dict(dropped.most_common())
