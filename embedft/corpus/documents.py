"""Reads PDF, text and Markdown files into pages of clean text, and reports why anything could not be read.

    pages, skipped = read_documents(["report.pdf", "notes"])

Not here: reading PDF (pdf.py), joining its lines (layout.py), chunking (chunks.py), OCR.
"""

import html
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import read_text
from .layout import CLEANING, clean_layout, repeated_lines
from .pdf import PdfText, read_pdfs

MARKDOWN = (".md", ".markdown")
SUFFIXES = (".pdf", ".txt", ".text", *MARKDOWN)
FENCED_BLOCK = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*(?:\n.*?^[ \t]*(?P=fence)[`~]*[ \t]*$|.*\Z)"
BLOCK = re.compile(rf"{FENCED_BLOCK}|^[^\n]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{FENCED_BLOCK}|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
INDENTED, LIST_ITEM = re.compile(r"(?: {4}|\t)\s*\S"), re.compile(r" {0,3}(?:[-*+]|\d{1,9}[.)])\s")
HEADING = re.compile(r" {0,3}(#{1,6})(?:\s|$)")
UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*")
# What an underline does not turn into a heading: a list item, a quotation, a table row, code or a rule.
NO_TITLE = re.compile(r"\s*$| {4}|\s*(?:[-*+]\s|[>|]|\d+[.)]\s|[-*_ ]+$)")
HTML_HEADING = re.compile(r"(?is)<h([1-6])\b[^<>]*>((?:(?!<h[1-6]\b).){0,500}?)</h\1\s*>")
HTML = re.compile(r"""(?isx) <!--.*?(?:-->|\Z) | <(?P<raw>script|style)\b.*?(?:</(?P=raw)\s*>|\Z)
      | </?(?: a|abbr|b|bdi|bdo|big|button|cite|code|data|del|dfn|em|font|i|iframe|img|input|ins|kbd|label|mark|nobr
          |picture|q|s|samp|small|source|span|strike|strong|sub|sup|svg|path|time|tt|u|var|video|wbr
        | (?P<block>address|article|aside|blockquote|br|center|dd|details|div|dl|dt|figcaption|figure|footer|form|h[1-6]
          |header|hr|li|main|nav|ol|p|pre|section|summary|table|tbody|td|tfoot|th|thead|tr|ul) )(?:\s[^<>]*)?/?>""")


class Page(NamedTuple):
    """A page with text, or a section of a Markdown page."""

    file: str  # as the user named it
    number: int  # from 1
    text: str
    headings: tuple[str, ...] | None = None  # above a section of Markdown, outermost first


class Skipped(NamedTuple):
    """A problem with a page or, if `page` is None, a whole file. It was skipped, unless only part of it is missing."""

    file: str
    page: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.page is None else f' page {self.page}'}: {self.reason}"


def read_documents(paths: Sequence[str | Path], *, processes: int | None = None) -> tuple[list[Page], list[Skipped]]:
    """Reads files and folders in the order given; returns the pages with text, and what was left out and why.

    Lines of PDF are joined into paragraphs (`clean_layout`). Text and Markdown must be UTF-8 and keep their lines; form
    feeds separate pages, and Markdown pages are split at headings. A file named twice is read once. Files in folders
    are sorted; hidden ones are ignored, other types counted. Any other path raises `ValueError` before reading."""
    files, skipped = _find_files(paths)
    pdf_files = [name for name in files if _suffix(name) == ".pdf"]
    pdf_texts = dict(zip(pdf_files, read_pdfs(pdf_files, processes=processes), strict=True))
    pages: list[Page] = []
    for name in files:
        file = printable(name)
        try:
            found, reasons = _read_pdf(pdf_texts[name]) if name in pdf_texts else (_read_text_file(name), {})
        except ValueError as error:
            skipped.append(Skipped(file, None, str(error).removeprefix(name).lstrip(": ")))
            continue
        for number, sections in enumerate(found, start=1):
            filled = [Page(file, number, *section) for section in sections if section[0].strip()]
            pages += filled
            if not filled or number in reasons:
                skipped.append(Skipped(file, number, reasons.get(number, "has no text")))
    if not pages:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ValueError(f"no page with text in {', '.join(map(printable, paths)) or 'an empty list'}{reasons}")
    return pages, skipped


def printable(path: str | Path) -> str:
    r"""A file name as text that can be printed and saved, with bytes that are not UTF-8 as \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _find_files(paths: Sequence[str | Path]) -> tuple[list[str], list[Skipped]]:
    """The files to read, without duplicates, and what was left out."""
    names: dict[str, str] = {}  # by real path, since links give a file several names
    skipped = []
    for path in map(os.fspath, paths):
        others, inside = Counter(), [] if os.path.isdir(path) else [path]
        if not os.path.exists(path):
            raise ValueError(f"{printable(path)}: no such file or folder")
        if inside and (not os.path.isfile(path) or _suffix(path) not in SUFFIXES):
            raise ValueError(f"{printable(path)}: expected a folder or a file ending in {', '.join(SUFFIXES)}")
        for place, subfolders, files in os.walk(path):  # nothing for a file
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            inside += [os.path.join(place, name) for name in files if not name.startswith(".")]
        for name in sorted(inside, key=lambda name: Path(name).parts):
            if _suffix(name) not in SUFFIXES:
                others[printable(_suffix(name)) or "no suffix"] += 1
            elif os.path.exists(name) and not os.path.isfile(name):
                skipped.append(Skipped(printable(name), None, "is not a regular file"))
            else:
                names.setdefault(os.path.realpath(name), name)
        if others:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items()))
            skipped.append(Skipped(printable(path), None, f"{others.total()} files of other types ignored: {kinds}"))
    return list(names.values()), skipped


def _read_pdf(pdf: PdfText) -> tuple[list[list[tuple]], dict[int, str]]:
    """The sections of each page (in PDF, a single text) and {page: what is wrong with it}."""
    if pdf.reason is not None:
        raise ValueError(pdf.reason)
    texts = clean_layout(pdf.pages, plain=pdf.plain)
    if not any(texts) and not pdf.failures:
        raise ValueError(f"none of its {len(texts)} pages has text (scanned pages need OCR)")
    return [[(text,)] for text in texts], pdf.failures


def _read_text_file(name: str) -> list[list[tuple]]:
    """The sections of each page: (text, headings) in Markdown, else one (text,)."""
    try:
        text = read_text(name)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CLEANING | {ord("\t"): "\t", ord("\f"): "\f"})
    if not text.strip():
        raise ValueError("has no text")
    texts = ["\n".join(map(str.rstrip, page.split("\n"))) for page in text.split("\f")]
    return split_sections(texts) if _suffix(name) in MARKDOWN else [[(text,)] for text in texts]


def split_sections(pages: Sequence[str]) -> list[list[tuple[str, tuple[str, ...]]]]:
    """Returns the sections of each page as (text, headings); headings carry over from page to page.
    A section begins with its heading line. A heading directly followed by another is part of that one's section."""
    path: list[tuple[int, str]] = []
    result = []
    for page in pages:
        sections, lines, has_body = [], [], False
        for block, level, title in [*_blocks(strip_html(page)), ("", 1, None)]:
            if level and (has_body or title is None):
                sections.append(("\n".join(lines).strip("\n"), tuple(heading for _, heading in path)))
                lines, has_body = [], False
            if title:
                path = [heading for heading in path if heading[0] < level] + [(level, title)]
            has_body = has_body or (not level and bool(block.strip()))
            lines.append(block)
        result.append(sections)
    return result


def strip_html(text: str) -> str:
    """Removes tags and comments, decodes entities, and writes <h2> as "## ", except in code. `<size>` stays."""
    parts, end = [], 0
    indented = ((start, stop) for start, stop, is_code in find_blocks(text) if is_code)
    for start, stop in [*sorted([*(code.span() for code in CODE.finditer(text)), *indented]), (len(text), len(text))]:
        outside = HTML_HEADING.sub(lambda tag: f"\n{'#' * int(tag[1])} {' '.join(tag[2].split())}\n", text[end:start])
        outside = HTML.sub(lambda tag: " " if tag["block"] else "", outside)
        parts += [html.unescape(outside), text[max(start, end) : stop]]
        end = max(end, stop)
    return "".join(parts)


def find_blocks(text: str, *, indented: bool = True) -> list[tuple[int, int, bool]]:
    """(start, stop, is code) of each code block and each other line. Code is fenced or, if `indented`, starts with four
    spaces or a tab below an empty line; not in lists, whose items go on like that."""
    blocks: list[tuple[int, int, bool]] = []
    code, is_apart, in_list = None, True, False  # code: the block that an indented line continues
    for match in BLOCK.finditer(text):
        (start, stop), line = match.span(), match[0]
        is_indented = indented and not match["fence"] and INDENTED.match(line)
        if is_indented and code is not None:
            blocks[code:] = [(blocks[code][0], stop, True)]
        elif is_indented and is_apart and not in_list:
            code = len(blocks)
            blocks.append((start, stop, True))
        else:
            blocks.append((start, stop, bool(match["fence"])))
            if line.strip():
                code = None
                in_list = bool(LIST_ITEM.match(line)) or (in_list and (line[0].isspace() or not is_apart))
        is_apart = not line.strip()
    return blocks


def _blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Yields (text, level, title) for each heading, code block and other line; level 0: not a heading."""
    blocks = [(text[start:stop], is_code) for start, stop, is_code in find_blocks(text)]
    before, i = "", 0
    while i < len(blocks):
        block, is_code = blocks[i]
        below = blocks[i + 1][0] if i + 1 < len(blocks) else ""
        heading = None if is_code else HEADING.match(block)
        underline = None if is_code or before.strip() or NO_TITLE.match(block) else UNDERLINE.fullmatch(below)
        if heading:
            yield block, len(heading[1]), " ".join(re.sub(r"(?:^|\s)#+\s*$", "", block[heading.end() :]).split())
        elif underline:
            yield f"{block}\n{below}", 1 if "=" in underline[1] else 2, " ".join(block.split())
            i += 1
        else:
            yield block, 0, ""
        before = "" if is_code or heading or underline else block
        i += 1


def drop_repeated_lines(pages: Sequence[Page]) -> tuple[list[Page], dict[str, int]]:
    """Drops page numbers, and all but the first of each repeated header or footer in a file (`repeated_lines`).
    Returns (pages, {line with "#" for each number: times dropped}), most frequent first."""
    texts = [page.text for page in pages]
    by_file: dict[str, list[int]] = {}
    for row, page in enumerate(pages):
        if page.headings is None:
            by_file.setdefault(page.file, []).append(row)
    dropped: Counter[str] = Counter()
    for rows in by_file.values():
        lines, seen = [texts[row].split("\n") for row in rows], set()
        for row, own, repeated in zip(rows, lines, repeated_lines(lines, [pages[i].number for i in rows]), strict=True):
            gone = {i for i, kind in repeated.items() if kind is None or kind in seen}
            seen.update(repeated.values())
            dropped.update(re.sub(r"\d+", "#", own[i].strip()) for i in gone)
            texts[row] = "\n".join(line for i, line in enumerate(own) if i not in gone)
    kept = [page._replace(text=text) for page, text in zip(pages, texts, strict=True) if text.strip()]
    return kept, dict(dropped.most_common())
