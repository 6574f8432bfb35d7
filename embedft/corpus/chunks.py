"""Cuts pages into chunks of whole sentences by token count, and saves them with where they come from.

    chunks = chunk_pages(read_documents(["report.pdf"])[0], count_tokens=count_tokens, size=254)
    save_chunks("chunks.jsonl", chunks)

Sentences are found by punctuation, line ends, English abbreviations and German ordinals. Not here: scripts without
marks at sentence ends (Thai, Lao).
"""

import hashlib
import re
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..data.checks import check_text
from ..files import read_jsonl, write_jsonl
from .documents import BLOCK, Page
from .layout import is_unspaced

# A mark before a blank and what can begin a sentence. Marks of other scripts end one wherever they stand, unless a
# Japanese particle behind a bracket goes on with what was said: 「…。」と.
OTHER_MARK = "[。！？｡．।॥۔؟።፧။។։།\u037e]"
SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]+[\"'”’)\]]*\s+(?=(?:«\s)?[\"'“„‘«¿¡(\[$€£•]*(?P<first>[^\W_]))"
    rf"|(?<!{OTHER_MARK}){OTHER_MARK}+(?!{OTHER_MARK}|[」』）]+[とっをがはにのでもや、])"
    r"[\"'”’)\]」』）】》〉］]*\s*"
)
LAST_WORD = re.compile(r"[^\s\"'“‘(\[]*$")
# Words whose period ends no sentence, besides single letters with periods ("U.S.", "J.", "e.g.").
ABBREVIATION = re.compile(r"""(?ix)
    approx|art|co|corp|cf|dept|dr|est|etc|figs?|inc|jr|ltd|messrs|mr|mrs|ms|mt|nos?|prof|pp|sec|sr|st|vol|vs
    |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec | (?:[^\W\d_]\.)*[^\W\d_]""")
# "Item 1A.", "Note 3.", and at the beginning of a line "1." and "iv.".
NUMBERED = re.compile(r"(?:^|\b(?:item|note|section|article|exhibit|part)\s+)(?:\d{1,3}[a-z]?|[ivx]+)$", re.I)
# German dates and other ordinals: "3. März", "31. Dez. 2021", "3. 5. 2021", "im 19. Jahrhundert".
MONTH = r"""(?:Jan(?:uar)?|Jänner|Feb(?:ruar)?|März?|Apr(?:il)?|Mai|Juni?|Juli?|Aug(?:ust)?|Sept?(?:ember)?|Okt(?:ober)?
    |Nov(?:ember)?|Dez(?:ember)?)"""
ORDINAL = re.compile(rf"""(?x) \b\d{{1,2}}\.\s+ (?: {MONTH}\b\.? | \d{{1,2}}\.(?=\s+\d{{4}}) )
    | \b(?:im|vom|zum|zur|beim|der|das|dem|des)\s+\d{{1,2}}\.""")
# The end of a page whose last sentence the next page continues.
RUNS_ON = re.compile(r"(?:[^\W\d_]|[,;’”)，、；])$")
CountTokens = Callable[[Sequence[str]], list[int]]  # tokens of each text, without special tokens


@dataclass(frozen=True)
class Place:
    """Where a chunk comes from: a file as it was named, and its first and last page (numbered from 1)."""

    file: str
    first_page: int
    last_page: int


@dataclass(frozen=True)
class Chunk:
    """A piece of text and where it was found; `num_tokens`: of the text alone; `headings`: those above it."""

    id: str
    text: str
    num_tokens: int | None = None
    places: tuple[Place, ...] = ()
    headings: tuple[str, ...] = ()


def save_chunks(path: str | Path, chunks: Sequence[Chunk]) -> None:
    """Writes one JSON object per line, atomically; fields that are None or empty are left out."""
    rows = map(asdict, chunks)
    write_jsonl(path, ({key: value for key, value in row.items() if value not in (None, ())} for row in rows))


def load_chunks(path: str | Path) -> list[Chunk]:
    """Loads a JSONL file of objects with `id` (a string, or an integer that becomes one) and `text`."""
    chunks: dict[str, Chunk] = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        if not isinstance(row, dict) or not {"id", "text"} <= row.keys():
            raise ValueError(f"{where}: expected an object with `id` and `text`")
        id = str(row["id"]) if type(row["id"]) is int else row["id"]
        check_text(id, f"{where}: `id`")
        check_text(row["text"], f"{where}: `text`")
        if id in chunks:
            raise ValueError(f"{where}: id {id!r} is already in an earlier line")
        try:
            places = tuple(Place(**place) for place in row.get("places", ()))
        except TypeError:
            raise ValueError(f"{where}: `places` is not a list of file, first_page, last_page") from None
        chunks[id] = Chunk(id, row["text"], row.get("num_tokens"), places, tuple(row.get("headings", ())))
    if not chunks:
        raise ValueError(f"{path}: has no chunks")
    return list(chunks.values())


def chunk_pages(
    pages: Sequence[Page], *, count_tokens: CountTokens, size: int, overlap=0, by_page=False, headings_in_text=False
) -> list[Chunk]:
    """Cuts pages into chunks of at most `size` tokens, each with as many whole sentences as fit.

    The pages of a file are joined first, in the order given, since a sentence may run over the end of a page; not with
    `by_page`, nor sections of Markdown. A sentence longer than `size` is broken between lines (code), words or, last,
    characters. The limit holds without exception, at one token per 100 characters or more. Consecutive chunks share
    whole sentences of at most `overlap` tokens, never all of the earlier chunk. Equal texts become one chunk. With
    `headings_in_text`, chunks of Markdown begin with a line "Outer > Inner".
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"size is {size} and overlap {overlap}, expected size >= 1 and 0 <= overlap < size")
    groups: dict[tuple[str, int, int], list[Page]] = {}
    for row, page in enumerate(pages):
        if page.text.strip():
            section = -1 if page.headings is None else row
            groups.setdefault((page.file, page.number if by_page else 0, section), []).append(page)
    chunks: dict[str, Chunk] = {}
    for (file, *_), members in groups.items():
        text, starts = "", []
        for page in members:
            text += _glue(text, page.text.strip()) if text else ""
            starts.append(len(text))
            text += page.text.strip()
        headings = members[0].headings or ()
        prefix = " > ".join(headings) + "\n" if headings and headings_in_text else ""
        for start, stop, num_tokens in _Cutter(text, count_tokens, size, prefix).cut(overlap):
            first, last = (members[bisect_right(starts, place) - 1].number for place in (start, stop - 1))
            piece, place = prefix + text[start:stop], Place(file, first, last)
            id = hashlib.sha256(piece.encode()).hexdigest()[:16]
            found = chunks.setdefault(id, Chunk(id, piece, num_tokens, (place,), headings))
            if place not in found.places:
                chunks[id] = replace(found, places=(*found.places, place))
    return list(chunks.values())


def _glue(before: str, after: str, *, min_words: int = 8, min_characters: int = 20) -> str:
    """What joins two pages: nothing within a word, a blank within a sentence (none in Chinese), else a line end."""
    line, opening = before[before.rfind("\n") + 1 :], after[0]
    if re.search(r"[^\W\d_]-$", line) and opening.isalpha():
        return ""
    if is_unspaced(line, opening):
        return "" if RUNS_ON.search(line) and len(line) >= min_characters else "\n"
    # A line of prose always ends with a mark; headings and rows of tables, which do not, are shorter.
    is_prose = len(re.findall(r"[^\W\d_]{2,}", line)) >= min_words
    return " " if RUNS_ON.search(line) and (opening.islower() or (is_prose and opening.isalpha())) else "\n"


# What chunks are made of: a sentence, or a part of one that is too long; a chunk, too.
_Unit = namedtuple("_Unit", "start stop num_tokens")


class _Cutter:
    """Cuts one text. The sum of the units' tokens guides; the count of a chunk's own text decides."""

    def __init__(self, text: str, count_tokens: CountTokens, size: int, prefix: str):
        self.text, self.count_tokens, self.size, self.prefix = text, count_tokens, size, prefix
        self.prefix_tokens = self._counts([prefix])[0] if prefix else 0
        if self.prefix_tokens >= size:
            raise ValueError(f"size is {size}, but the headings {prefix.strip()!r} have {self.prefix_tokens} tokens")

    def cut(self, overlap: int) -> list[_Unit]:
        units = self._units(sentence_spans(self.text), [r"[^\n]+", r"\S+", r"\S"])
        chunks, first, end = [], 0, 0
        while end < len(units):
            end, num_tokens = self._fill(units, first)
            chunks.append(_Unit(units[first].start, units[end - 1].stop, num_tokens))
            first = self._next_first(units, first, end, overlap)
        return chunks

    def _counts(self, texts: list[str]) -> list[int]:
        # WordPiece makes one unknown token of a word however long, such as a blob of data.
        return [max(n, len(text) // 100) for n, text in zip(self.count_tokens(texts), texts, strict=True)]

    def _count(self, start: int, stop: int) -> int:
        return self._counts([self.prefix + self.text[start:stop]])[0]

    def _fill(self, units: Sequence[_Unit], first: int, *, max_saved: int = 2) -> tuple[int, int]:
        """(end, tokens) of the chunk from unit `first` on; `max_saved`: units may have fewer tokens together."""
        end, total = first + 1, self.prefix_tokens + units[first].num_tokens
        while end < len(units) and total + units[end].num_tokens <= self.size:
            total += units[end].num_tokens
            end += 1

        def count(end: int) -> int:
            return self._count(units[first].start, units[end - 1].stop)

        num_tokens = count(end)
        if num_tokens > self.size:  # units may have more tokens together, too
            end = first + max(1, bisect_right(range(first + 1, end), self.size, key=count))
            num_tokens = count(end)
        while end < len(units) and max_saved and num_tokens + units[end].num_tokens <= self.size + max_saved:
            more = count(end + 1)
            if more > self.size:
                break
            end, num_tokens = end + 1, more
        return end, num_tokens

    def _next_first(self, units: Sequence[_Unit], first: int, end: int, overlap: int) -> int:
        """Where the chunk begins that follows units `first` to `end`: as early as the overlap allows."""
        # Parts of sentences are never shared: they end where the next part would not have fitted.
        if not overlap or end == len(units):
            return end
        start, shared = end, 0
        while start > first + 1 and shared + units[start - 1].num_tokens <= overlap:
            start -= 1
            shared += units[start].num_tokens
        while start < end and (
            self._count(units[start].start, units[end - 1].stop) > overlap + self.prefix_tokens
            or self._count(units[start].start, units[end].stop) > self.size
        ):
            start += 1
        return start

    def _units(self, spans: Sequence[tuple[int, int]], smaller: Sequence[str]) -> list[_Unit]:
        """The spans with their tokens; one that is too long is replaced by parts, cut by the first of `smaller`."""
        units = []
        counts = self._counts([self.text[start:stop] for start, stop in spans])
        for (start, stop), num_tokens in zip(spans, counts, strict=True):
            if num_tokens <= self.size - self.prefix_tokens:
                units.append(_Unit(start, stop, num_tokens))
                continue
            if not smaller:
                raise ValueError(f"size is {self.size}, but one character has {num_tokens} tokens")
            pieces = [(start + m.start(), start + m.end()) for m in re.finditer(smaller[0], self.text[start:stop])]
            parts, first = self._units(pieces, smaller[1:]), 0
            while first < len(parts):
                # One character more at a time would take forever over a blob.
                end, num_tokens = self._fill(parts, first, max_saved=2 if len(smaller) > 1 else 0)
                units.append(_Unit(parts[first].start, parts[end - 1].stop, num_tokens - self.prefix_tokens))
                first = end
        return units


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each sentence, without surrounding blanks; every other character is in exactly one.
    A sentence ends at a line end, and at a mark before a blank and anything but a lower-case letter, unless it belongs
    to an abbreviation, an item number ("Item 1A.") or an ordinal ("3. März"). A fenced code block is one sentence."""
    spans = []
    for line in BLOCK.finditer(text):
        start, stop = line.span()
        for end in () if line["fence"] else SENTENCE_END.finditer(text, start, stop):
            # Letters of scripts without capitals, Georgian among them, are their own capitals.
            is_lower = end["first"] is not None and end["first"] != end["first"].title()
            if not is_lower and not _is_abbreviation(text, start, end.start()):
                spans.append((start, end.end()))
                start = end.end()
        spans.append((start, stop))
    stripped = [(stop - len(text[start:stop].lstrip()), text[start:stop].strip()) for start, stop in spans]
    return [(start, start + len(piece)) for start, piece in stripped if piece]


def _is_abbreviation(text: str, start: int, period: int) -> bool:
    """Whether the mark at `period` belongs to the word before it, in a sentence that begins at `start`."""
    if text[period] != "." or not text[period + 1].isspace():
        return False
    before = text[max(start, period - 24) : period]
    numbered = NUMBERED.search(before.lstrip() if period - 24 <= start else f" {before}")
    if numbered or ABBREVIATION.fullmatch(LAST_WORD.search(before)[0]):
        return True
    around = ORDINAL.finditer(text, max(start, period - 16), period + 24)
    return any(match.start() < period < match.end() for match in around)
