"""Splits pages into chunks of whole sentences, measured in tokens, and saves each chunk with its source pages.

    chunks = chunk_pages(read_documents(["report.pdf"])[0], count_tokens=count_tokens, size=254)
    save_chunks("chunks.jsonl", chunks)

Sentences end at punctuation and newlines, not in English abbreviations and German ordinals. Not here: Thai, Lao.
"""

import hashlib
import re
import reprlib
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from ..config import check_types, from_dict
from ..data.checks import check_text
from ..files import read_jsonl, write_jsonl
from .documents import Page, find_blocks
from .layout import UNSPACED, is_unspaced

# Punctuation before whitespace and a possible sentence start. Marks of other scripts always end a sentence, unless a
# bracket and a Japanese particle follow, which continue a quotation: 「…。」と.
OTHER_MARK = "[。！？｡．।॥۔؟።፧။។៕։།܀-܂߹᠃᠉᱾᱿᭚᭛᭞᭟꧈꧉꩝-꩟꫰꫱꯫‼‽⁇-⁉\u037e]"
SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]+[\"'”’)\]]*(?:[^\S\n]?»|«)?\s+(?=(?:«\s)?[\"'“„‘«»¿¡(\[$€£•]*(?P<first>[^\W_]))"
    rf"|(?<!{OTHER_MARK}){OTHER_MARK}+(?!{OTHER_MARK}|[」』）]+[とっをがはにのでもや、])"
    rf"[\"'”’)\]」』）】》〉］]*\s*|(?<=[{UNSPACED}])[.!?]+(?=[{UNSPACED}])(?![、。」』）】》〉])"  # か?パン
    r"|(?<=[Ͱ-Ͽἀ-῿]);\s+"  # Greek asks with a semicolon
)
LAST_WORD = re.compile(r"[^\s\"'“‘(\[]*$")
# Words whose period does not end a sentence, including single letters with periods ("U.S.", "J.", "e.g.").
ABBREVIATION = re.compile(r"""(?ix)
    approx|art|co|corp|cf|dept|dr|est|etc|figs?|inc|jr|ltd|messrs|mr|mrs|ms|mt|nos?|prof|pp|sec|sr|st|vol|vs
    |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec | (?:[^\W\d_]\.)*[^\W\d_]""")
# "Item 1A.", "Note 3.", and "1." or "iv." at the start of a line.
NUMBERED = re.compile(r"(?:^|\b(?:item|note|section|article|exhibit|part)\s+)(?:\d{1,3}[a-z]?|[ivx]+)$", re.I)
# German dates and other ordinals: "3. März", "31. Dez. 2021", "3. 5. 2021", "im 19. Jahrhundert".
MONTH = r"""(?:Jan(?:uar)?|Jänner|Feb(?:ruar)?|März?|Apr(?:il)?|Mai|Juni?|Juli?|Aug(?:ust)?|Sept?(?:ember)?|Okt(?:ober)?
    |Nov(?:ember)?|Dez(?:ember)?)"""
ORDINAL = re.compile(rf"""(?x) \b\d{{1,2}}\.\s+ (?: {MONTH}\b\.? | \d{{1,2}}\.(?=\s+\d{{4}}) )
    | \b(?:im|vom|zum|zur|beim|der|das|dem|des)\s+\d{{1,2}}\.""")
RUNS_ON = re.compile(r"(?:[^\W\d_]|[,;’”)，、；])$")  # the last sentence of a page continues on the next one
CountTokens = Callable[[Sequence[str]], list[int]]  # tokens of each text, without special tokens


@dataclass(frozen=True)
class Place:
    """The source of a chunk: the file as the user named it, and the first and last page (numbered from 1)."""

    file: str
    first_page: int
    last_page: int

    def __post_init__(self) -> None:
        if not 1 <= self.first_page <= self.last_page:
            raise ValueError(f"pages {self.first_page} to {self.last_page}, expected a range that begins at 1 or later")


@dataclass(frozen=True)
class Chunk:
    """A piece of text and its sources. `num_tokens` excludes special tokens; `headings` are those above the text."""

    id: str
    text: str
    num_tokens: int | None = None
    places: tuple[Place, ...] = ()
    headings: tuple[str, ...] = ()


def save_chunks(path: str | Path, chunks: Sequence[Chunk]) -> None:
    """Writes one JSON object per line, atomically, omitting fields that are None or empty."""
    write_jsonl(path, ({k: value for k, value in asdict(chunk).items() if value not in (None, ())} for chunk in chunks))


def load_chunks(path: str | Path) -> list[Chunk]:
    """Loads a JSONL file of objects with `text` and `id` (a string; integers are converted)."""
    chunks: dict[str, Chunk] = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        if not isinstance(row, dict) or not {"id", "text"} <= row.keys():
            raise ValueError(f"{where}: expected an object with `id` and `text`, found {reprlib.repr(row)}")
        id = str(row["id"]) if type(row["id"]) is int else row["id"]
        check_text(id, f"{where}: `id`")
        check_text(row["text"], f"{where}: `text`")
        if id in chunks:
            raise ValueError(f"{where}: id {id!r} already appears on an earlier line")
        headings = row.get("headings") or []
        if type(headings) is not list or not all(type(heading) is str for heading in headings):
            raise ValueError(f"{where}: `headings` must be a list of strings, found {reprlib.repr(headings)}")
        num_tokens, places = row.get("num_tokens"), row.get("places") or []
        check_types(Chunk, {"num_tokens": num_tokens}, f"{where}: ")
        try:
            places = tuple(from_dict(Place, place) for place in places)
        except (AttributeError, TypeError, ValueError):  # no list, no object, no such field
            found = f"`places` is {reprlib.repr(places)}"
            raise ValueError(f"{where}: {found}, expected a list of objects with file, first_page, last_page") from None
        chunks[id] = Chunk(id, row["text"], num_tokens, places, tuple(headings))
    if not chunks:
        raise ValueError(f"{path}: has no chunks")
    return list(chunks.values())


def chunk_pages(
    pages: Sequence[Page], *, count_tokens: CountTokens, size: int, overlap=0, by_page=False, headings_in_text=False
) -> list[Chunk]:
    """Splits pages into chunks of at most `size` tokens, each with as many whole sentences as fit.

    The pages of a file are first joined in the order given, since a sentence may continue on the next page; `by_page`
    prevents this, and sections of Markdown stay separate. A sentence longer than `size` is split between lines (code),
    else words, else characters. No chunk exceeds `size`, where 100 characters count as at least one token. Consecutive
    chunks share whole sentences of at most `overlap` tokens, but never a whole chunk. Equal texts become one chunk.
    With `headings_in_text`, chunks of Markdown begin with a line "Outer > Inner"."""
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
        sentences = sentence_spans(text, markdown=members[0].headings is not None)
        for start, stop, num_tokens in _Cutter(text, count_tokens, size, prefix).cut(sentences, overlap):
            first, last = (members[bisect_right(starts, place) - 1].number for place in (start, stop - 1))
            piece, place = prefix + text[start:stop], Place(file, first, last)
            id = hashlib.sha256(piece.encode()).hexdigest()[:16]
            found = chunks.setdefault(id, Chunk(id, piece, num_tokens, (place,), headings))
            if place not in found.places:
                chunks[id] = replace(found, places=(*found.places, place))
    return list(chunks.values())


def _glue(before: str, after: str, *, min_words: int = 8, min_characters: int = 20) -> str:
    """The separator of two pages: none within a word, a space within a sentence (not in Chinese), else a newline."""
    line, opening = before[before.rfind("\n") + 1 :], after[0]
    if re.search(r"[^\W\d_]-$", line) and opening.isalpha():
        return ""
    if is_unspaced(line, opening):
        return "" if RUNS_ON.search(line) and len(line) >= min_characters else "\n"
    # A long line without end punctuation is unfinished prose; headings and table rows lack it too, but are shorter.
    is_prose = len(re.findall(r"[^\W\d_]{2,}", line)) >= min_words
    return " " if RUNS_ON.search(line) and (opening.islower() or (is_prose and opening.isalpha())) else "\n"


# A sentence, a part of one that is too long, or a whole chunk.
_Unit = namedtuple("_Unit", "start stop num_tokens")


class _Cutter:
    """Splits one text. Summed unit counts are only a first guess; the token count of a chunk's own text decides."""

    def __init__(self, text: str, count_tokens: CountTokens, size: int, prefix: str):
        self.text, self.count_tokens, self.size, self.prefix = text, count_tokens, size, prefix
        self.prefix_tokens = self._counts([prefix])[0] if prefix else 0
        if self.prefix_tokens >= size:
            raise ValueError(f"size is {size}, but the headings {prefix.strip()!r} have {self.prefix_tokens} tokens")

    def cut(self, sentences: Sequence[tuple[int, int]], overlap: int) -> list[_Unit]:
        units = self._units(sentences, [r"[^\n]+", r"\S+", r"\S"])
        chunks, first, end = [], 0, 0
        while end < len(units):
            end, num_tokens = self._fill(units, first)
            chunks.append(_Unit(units[first].start, units[end - 1].stop, num_tokens))
            first = self._next_first(units, first, end, overlap)
        return chunks

    def _counts(self, texts: list[str]) -> list[int]:
        # WordPiece turns a word of any length, such as a blob of data, into a single unknown token.
        return [max(n, len(text) // 100) for n, text in zip(self.count_tokens(texts), texts, strict=True)]

    def _count(self, units: Sequence[_Unit], first: int, end: int) -> int:
        """The tokens of the chunk of units `first` to `end`."""
        return self._counts([self.prefix + self.text[units[first].start : units[end - 1].stop]])[0]

    def _fill(self, units: Sequence[_Unit], first: int, *, max_saved: int = 2) -> tuple[int, int]:
        """(end, num_tokens) of the chunk starting at unit `first`; joining units may save up to `max_saved` tokens."""
        end, total = first + 1, self.prefix_tokens + units[first].num_tokens
        while end < len(units) and total + units[end].num_tokens <= self.size:
            total += units[end].num_tokens
            end += 1
        num_tokens = self._count(units, first, end)
        if num_tokens > self.size:  # joining units may also add tokens
            end = first + max(1, bisect_right(range(first + 1, end), self.size, key=partial(self._count, units, first)))
            num_tokens = self._count(units, first, end)
        while end < len(units) and max_saved and num_tokens + units[end].num_tokens <= self.size + max_saved:
            more = self._count(units, first, end + 1)
            if more > self.size:
                break
            end, num_tokens = end + 1, more
        return end, num_tokens

    def _next_first(self, units: Sequence[_Unit], first: int, end: int, overlap: int) -> int:
        """The first unit of the chunk that follows units `first` to `end`: as early as the overlap allows."""
        # Parts of a long sentence are never shared: each is so long that the next one does not fit after it.
        if not overlap or end == len(units):
            return end
        start, shared, most = end, 0, overlap + self.prefix_tokens
        while start > first + 1 and shared + units[start - 1].num_tokens <= overlap:
            start -= 1
            shared += units[start].num_tokens
        while start < end and (self._count(units, start, end) > most or self._count(units, start, end + 1) > self.size):
            start += 1
        return start

    def _units(self, spans: Sequence[tuple[int, int]], smaller: Sequence[str]) -> list[_Unit]:
        """The spans with their token counts; those that are too long are split with the first pattern of `smaller`."""
        units, counts = [], self._counts([self.text[start:stop] for start, stop in spans])
        for (start, stop), num_tokens in zip(spans, counts, strict=True):
            if num_tokens <= self.size - self.prefix_tokens:
                units.append(_Unit(start, stop, num_tokens))
                continue
            if not smaller:
                raise ValueError(f"size is {self.size}, but one character has {num_tokens} tokens")
            pieces = [(start + m.start(), start + m.end()) for m in re.finditer(smaller[0], self.text[start:stop])]
            parts, first = self._units(pieces, smaller[1:]), 0
            while first < len(parts):
                # Trying one more character at a time would take forever on a blob.
                end, num_tokens = self._fill(parts, first, max_saved=2 if len(smaller) > 1 else 0)
                units.append(_Unit(parts[first].start, parts[end - 1].stop, num_tokens - self.prefix_tokens))
                first = end
        return units


def sentence_spans(text: str, *, markdown: bool = False) -> list[tuple[int, int]]:
    """(start, stop) of each sentence, without surrounding whitespace; every other character is in exactly one.
    A sentence ends at a newline, or at punctuation before whitespace and anything but a lower-case letter, except in an
    abbreviation, an item number ("Item 1A.") or an ordinal ("3. März"). A fenced code block is one sentence; so is an
    indented one of Markdown, which keeps its indentation."""
    spans = []
    for start, stop, is_code in find_blocks(text, indented=markdown):
        for end in () if is_code else SENTENCE_END.finditer(text, start, stop):
            # In scripts without capitals, such as Georgian, `title` returns the letter itself.
            is_lower = end["first"] is not None and end["first"] != end["first"].title()
            if not is_lower and not _is_abbreviation(text, start, end.start()):
                spans.append((start, end.end(), False))
                start = end.end()
        spans.append((start, stop, is_code))
    sentences = []
    for start, stop, is_code in spans:
        stop = start + len(text[start:stop].rstrip())
        start = start if is_code else stop - len(text[start:stop].lstrip())
        if start < stop:
            sentences.append((start, stop))
    return sentences


def _is_abbreviation(text: str, start: int, period: int) -> bool:
    """Whether the mark at `period` is part of the word before it; the sentence begins at `start`."""
    if text[period] != "." or not text[period + 1].isspace():
        return False
    before = text[max(start, period - 24) : period]
    numbered = NUMBERED.search(before.lstrip() if period - 24 <= start else f" {before}")
    if numbered or ABBREVIATION.fullmatch(LAST_WORD.search(before)[0]):
        return True
    return any(m.start() < period < m.end() for m in ORDINAL.finditer(text, max(start, period - 16), period + 24))
