"""Joins the lines of PDF pages into paragraphs, and finds repeated headers and footers."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

EDGE_LINES, MIN_REPEATED_PAGES, REPEATED_SHARE = 3, 3, 0.2  # see `repeated_lines`
# A line is full if the next word would have exceeded FULL_SHARE of the page's full width, since characters per line
# vary by a tenth. That width is the median of the page's lines of at least LONG_SHARE of the document's usual width.
FULL_SHARE, LONG_SHARE, HEADING_SHARE = 0.85, 0.6, 0.6
CLEANING = {
    **{i: None for i in range(0x110000) if unicodedata.category(chr(i)) in ("Cc", "Cs")},
    **{ord(blank): " " for blank in "\t\v\f\x1c\x1d\x1e\x1f\x85"},
    **{i: unicodedata.normalize("NFKC", chr(i)) for i in range(0xFB00, 0xFB07)},
    ord("\n"): "\n",
}
NUMBERED = r"(?:Section|Article|Item|Note|Part|Exhibit)"
NUMBER = r"(?:\d{1,3}(?:\.\d{1,3})*[A-Z]?|[A-Za-z]|[ivxlcIVXLC]+)"
MARKER = re.compile(rf"(?:(?:[•●◦○▪■□‣⁃∙·–—*-] +|(?:{NUMBERED} )?\(?{NUMBER}[.)]* {{2,}})(?=\S))+")
PAGE_NUMBER = re.compile(r"\W*(?:page\s+)?(?:[a-z]-)?(?:\d{1,4}|[ivxlc]{1,7})(?:\s*(?:of|/)\s*\d{1,4})?\W*", re.I)
SENTENCE_STOP = re.compile(r"[.:;!?。！？][\"'”’)\]」』）]*$")
LETTERS = r"[^\W\d_]"
WORD = re.compile(rf"{LETTERS}+(?:-{LETTERS}+)*")
BROKEN_WORD = re.compile(rf"(?<![^\W\d_])(?<![^\W\d_]-){WORD.pattern}-\n[ \t]*{WORD.pattern}")
LAST_PART = re.compile(r"[^\W_]+(?:-[^\W_]+)*$")
FIRST_PART = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
# Chinese and Japanese, written without spaces between words.
UNSPACED = "\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff"
UNSPACED_JOIN = re.compile(f"[{UNSPACED}]\n[{UNSPACED}]")
FIRST_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+|\s")


def is_unspaced(before: str, after: str) -> bool:
    """Whether two lines join without a space: Chinese or Japanese on both sides."""
    return UNSPACED_JOIN.fullmatch(f"{before[-1:]}\n{after[:1]}") is not None


def _join(left: str, right: str, words: Counter[str]) -> str:
    """Joins two lines of a paragraph; the document's `words` decide whether a hyphen stays."""
    if left.endswith("\u00ad"):
        return left[:-1] + right
    beginning = LAST_PART.search(left[:-1]) if left.endswith(("-", "\u2010")) else None
    end = FIRST_PART.match(right)
    if beginning is None or end is None:
        is_tight = re.search(r"[^ ][—/]$", left) is not None  # no space before the dash or slash, so none after it
        return left + right if is_tight or re.search(f"[{UNSPACED}]", left[-1] + right[0]) else f"{left} {right}"
    # Keep the hyphen if the document has the hyphenated word at least as often as the joined one. If it has neither,
    # keep it if both halves are words, one contains anything but letters, or the second is capitalized.
    first, second = beginning[0].lower(), end[0].lower()
    kept, joined = words[f"{first}-{second}"], words[first + second]
    if kept == joined == 0:
        if end[0] in ("and", "or", "to"):  # a suspended hyphen: "pre- and post-closing"
            return f"{left} {right}"
        of_letters = f"{first}{second}".isalpha() and not end[0][:1].isupper()
        joined = of_letters and not (words[first] and words[second])
    return left + right if kept >= joined else left[:-1] + right


@dataclass
class _Line:
    """One line of a page."""

    text: str
    indent: int  # column of its first character
    column: int  # column of its text, after a bullet or number
    width: int  # column of its end, with runs of spaces collapsed
    is_row: bool  # a table row: has gaps between columns
    after_gap: bool  # preceded by more than the usual line spacing
    apart: bool = False  # a header, a footer or a page number


def clean_layout(texts: Sequence[str], *, plain: Collection[int] = ()) -> list[str]:
    """Turns the pages of one PDF file into running text, with one line per paragraph, heading, bullet or table row.
    Expands ligatures; removes line-end hyphens, extra spaces and control characters; keeps everything else, in order.
    `plain`: numbers (from 1) of pages read without layout, such as columns, whose lines are narrower than usual."""
    pages = [_lines(text.translate(CLEANING)) for text in texts]
    repeated = repeated_lines([[line.text for line in lines] for lines in pages], range(1, len(pages) + 1))
    whole_words = BROKEN_WORD.sub(" ", "\n".join(line.text for lines in pages for line in lines))
    words = Counter(WORD.findall(whole_words.lower()))
    usual = _usual_width(line for number, lines in enumerate(pages, start=1) if number not in plain for line in lines)
    return [
        _paragraphs(lines, apart, words, _usual_width(lines) if number in plain else usual)
        for number, (lines, apart) in enumerate(zip(pages, repeated, strict=True), start=1)
    ]


def _usual_width(lines: Iterable[_Line]) -> int:
    widths = sorted(line.width for line in lines if not line.is_row) or [0]
    return widths[len(widths) * 3 // 4]


def _lines(text: str) -> list[_Line]:
    lines, gap = [], False
    raw_lines = text.split("\n")
    # On a double-spaced page, an empty line does not end a paragraph.
    spaced = sum(not line.strip() for line in raw_lines) > 0.4 * len(raw_lines)
    for raw in raw_lines:
        if body := raw.strip():
            indent, marker = len(raw) - len(raw.lstrip()), MARKER.match(body)
            content = body[marker.end() if marker else 0 :]
            gaps = sorted(map(len, re.findall(r"\s+", content))) or [0]
            # Justified text has wide gaps too, but of similar width.
            is_row = gaps[-1] > 3 or (gaps[-1] == 3 and median(gaps) == 1)
            column = indent + len(body) - len(content)
            width = column + len(" ".join(content.split()))
            lines.append(_Line(" ".join(body.split()), indent, column, width, is_row, gap))
        gap = not body and not spaced
    return lines


def _paragraphs(lines: list[_Line], repeated: Collection[int], words: Counter[str], usual: int) -> str:
    """Joins each line of a page to the one it continues; `usual` is the width of the document's full lines."""
    for i, line in enumerate(lines):
        is_number = not EDGE_LINES <= i < len(lines) - EDGE_LINES and PAGE_NUMBER.fullmatch(line.text) is not None
        line.apart = i in repeated or is_number
    long = [line.width for line in lines if not line.is_row and line.width >= LONG_SHARE * usual]
    edge = median(long) if long else usual
    paragraphs, members = [], []
    for line, following in zip(lines, [*lines[1:], None], strict=False):
        if members and _goes_on(members, line, following, edge):
            paragraphs[-1] = _join(paragraphs[-1], line.text, words)
            members.append(line)
        else:
            paragraphs.append(line.text)
            members = [line]
    return "\n".join(paragraph.removesuffix("\u00ad") for paragraph in paragraphs)


def _goes_on(members: list[_Line], line: _Line, following: _Line | None, edge: float) -> bool:
    """Whether `line` continues the paragraph with the lines `members`; `edge` is the page's right edge."""
    first, last = members[0], members[-1]
    if line.after_gap or line.column > line.indent or last.is_row or line.apart or last.apart:
        return False
    is_full = last.width + 1 + len(FIRST_WORD.match(line.text)[0]) >= FULL_SHARE * edge
    if line.is_row:  # or a line of prose with a wide gap
        return is_full and line.text[0].islower() and abs(line.indent - last.indent) <= 1
    has_ended = SENTENCE_STOP.search(last.text) is not None
    aligned = abs(line.indent - last.indent) <= 1
    if len(members) == 1:  # the first line may be indented, or start with a hanging bullet
        hangs = first.column > first.indent and abs(line.indent - first.column) <= 2
        aligned = hangs or line.indent <= first.indent + 1
        # Both lines start a paragraph; the first paragraph has only one line.
        if has_ended and following is not None and following.indent + 1 < min(line.indent, first.indent + 1):
            return False
    if not aligned or line.text[0].islower():
        return aligned
    is_short = line.width < HEADING_SHARE * edge and not line.text.endswith((".", ",", ";", ":", "!", "?", ")"))
    return is_full and not (has_ended and is_short)


def repeated_lines(pages: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[dict[int, tuple | None]]:
    """For each page of a file, {row: kind} of its header and footer lines; kind None is a bare page number.

    Such a line is among the first or last three of its page and, apart from its numbers, appears at the same end of at
    least three pages and a fifth of the file's (a bare page number: three pages). Each number must be the same on three
    pages or rise with the page, unlike a table's; lines that differ in a constant number are different kinds."""
    stands: dict[tuple[bool, str], list[tuple[int, int, list[int]]]] = {}  # (at the top, line) -> (page, row, numbers)
    for p, lines in enumerate(pages):
        filled = [i for i, line in enumerate(lines) if line.strip()]
        edges = [(True, i) for i in filled[:EDGE_LINES]] + [(False, i) for i in filled[-EDGE_LINES:]]
        for at_top, i in edges:
            line = " ".join(lines[i].split()).casefold()
            found = [int(number) for number in re.findall(r"[0-9]{1,9}", line)]
            stands.setdefault((at_top, re.sub(r"[0-9]{1,9}", "#", line)), []).append((p, i, found))
    repeated: list[dict[int, tuple | None]] = [{} for _ in pages]
    for (_, line), places in stands.items():
        is_number = "#" in line and PAGE_NUMBER.fullmatch(line.replace("#", "1")) is not None
        share = 0 if is_number else REPEATED_SHARE * len(pages)
        # For each number: how many pages have the same value, and how many the same offset from the page number.
        same = Counter((slot, value) for *_, found in places for slot, value in enumerate(found))
        rising = Counter((slot, value - numbers[p]) for p, _, found in places for slot, value in enumerate(found))
        accepted = {}
        for p, i, found in places:
            rises = [rising[slot, value - numbers[p]] >= MIN_REPEATED_PAGES for slot, value in enumerate(found)]
            stays = [same[slot, value] >= MIN_REPEATED_PAGES for slot, value in enumerate(found)]
            if is_number:
                stays[0] = False
            if all(map(max, rises, stays)):
                fixed = tuple(None if up else value for up, value in zip(rises, found, strict=True))
                accepted[p, i] = None if is_number else (line, fixed)
        if len({p for p, _ in accepted}) >= max(MIN_REPEATED_PAGES, share):
            for (p, i), kind in accepted.items():
                repeated[p].setdefault(i, kind)
    return repeated
