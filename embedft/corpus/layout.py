"""Turns the lines of PDF pages back into paragraphs, and finds the headers and footers that repeat."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

EDGE_LINES, MIN_REPEATED_PAGES, REPEATED_SHARE = 3, 3, 0.2  # see `repeated_lines`
# A line is full when the next word would have gone beyond this share of a full line: the characters of a line of given
# width vary by a tenth. A full line is the median of a page's that are not shorter than LONG_SHARE of the document's.
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
# Chinese and Japanese: no blanks between words.
UNSPACED = "\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff"
UNSPACED_JOIN = re.compile(f"[{UNSPACED}]\n[{UNSPACED}]")
FIRST_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+|\s")


def is_unspaced(before: str, after: str) -> bool:
    """Whether two lines join without a blank: Chinese or Japanese on both sides."""
    return UNSPACED_JOIN.fullmatch(f"{before[-1:]}\n{after[:1]}") is not None


def _join(left: str, right: str, words: Counter[str]) -> str:
    """Joins two lines of a paragraph of a document with these words."""
    if left.endswith("\u00ad"):
        return left[:-1] + right
    beginning = LAST_PART.search(left[:-1]) if left.endswith(("-", "\u2010")) else None
    end = FIRST_PART.match(right)
    if beginning is None or end is None:
        is_tight = re.search(r"[^ ][—/]$", left) is not None  # a dash or a slash that is set tight stays so
        return left + right if is_tight or is_unspaced(left, right) else f"{left} {right}"
    # A hyphen stays when the document has the word with a hyphen at least as often as without. When it has neither, it
    # stays if the halves are words of their own, not mere letters, or hold a hyphen or a capital.
    first, second = beginning[0].lower(), end[0].lower()
    kept, joined = words[f"{first}-{second}"], words[first + second]
    if kept == joined == 0:
        if end[0] in ("and", "or", "to"):  # the hyphen stands for a word to come: "pre- and post-closing"
            return f"{left} {right}"
        of_letters = f"{first}{second}".isalpha() and not end[0][:1].isupper()
        joined = of_letters and not (words[first] and words[second])
    return left + right if kept >= joined else left[:-1] + right


@dataclass
class _Line:
    """One line of a page."""

    text: str
    indent: int  # where it begins
    column: int  # where its text does, behind a bullet or number
    width: int  # where it ends, blanks between words counted once
    is_row: bool  # of a table: has gaps between columns
    after_gap: bool  # more space than between lines comes before it
    apart: bool = False  # a header, a footer or a page number


def clean_layout(texts: Sequence[str], *, plain: Collection[int] = ()) -> list[str]:
    """Turns the pages of one PDF file into running text: a line for each paragraph, heading, bullet and row of a table.
    Ligatures are spelt out; hyphens at line ends, blanks and control characters go; other characters stay, in order.
    `plain`: numbers (from 1) of pages without layout, such as columns, whose lines are narrower than the others'."""
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
    # On a page in double spacing an empty line says nothing.
    spaced = sum(not line.strip() for line in raw_lines) > 0.4 * len(raw_lines)
    for raw in raw_lines:
        if body := raw.strip():
            indent, marker = len(raw) - len(raw.lstrip()), MARKER.match(body)
            content = body[marker.end() if marker else 0 :]
            gaps = sorted(map(len, re.findall(r"\s+", content))) or [0]
            # Justified text has wide blanks too, but about as wide as each other.
            is_row = gaps[-1] > 3 or (gaps[-1] == 3 and median(gaps) == 1)
            column = indent + len(body) - len(content)
            width = column + len(" ".join(content.split()))
            lines.append(_Line(" ".join(body.split()), indent, column, width, is_row, gap))
        gap = not body and not spaced
    return lines


def _paragraphs(lines: list[_Line], repeated: Collection[int], words: Counter[str], usual: int) -> str:
    """Joins the lines of a page where one continues the other; `usual`: the width of the document's full lines."""
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
    """Whether `line` belongs to the paragraph whose lines so far are `members`; `edge`: the page's right edge."""
    first, last = members[0], members[-1]
    if line.after_gap or line.column > line.indent or last.is_row or line.apart or last.apart:
        return False
    is_full = last.width + 1 + len(FIRST_WORD.match(line.text)[0]) >= FULL_SHARE * edge
    if line.is_row:  # or a line of prose with a hole in it
        return is_full and line.text[0].islower() and abs(line.indent - last.indent) <= 1
    has_ended = SENTENCE_STOP.search(last.text) is not None
    aligned = abs(line.indent - last.indent) <= 1
    if len(members) == 1:  # the first line may be indented, or stand out to the left by its bullet
        hangs = first.column > first.indent and abs(line.indent - first.column) <= 2
        aligned = hangs or line.indent <= first.indent + 1
        # Two first lines of paragraphs, the earlier one of a single line.
        if has_ended and following is not None and following.indent + 1 < min(line.indent, first.indent + 1):
            return False
    if not aligned or line.text[0].islower():
        return aligned
    is_short = line.width < HEADING_SHARE * edge and not line.text.endswith((".", ",", ";", ":", "!", "?", ")"))
    return is_full and not (has_ended and is_short)


def repeated_lines(pages: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[dict[int, tuple | None]]:
    """For each page of a file, {row: kind} of its lines that are headers or footers; None: a page number alone.

    Such a line is among the first or last three of its page and, digits aside, stands at the same end of at least
    three pages and a fifth of the file's. Its numbers must be the same on three pages or rise with the page, which a
    table's do not; lines whose numbers differ otherwise are of two kinds. A page number alone needs three pages.
    """
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
        # For each number of the line: how many pages have the very same, and how many have one that rises with them.
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
