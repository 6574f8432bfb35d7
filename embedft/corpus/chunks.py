"""Chunks: pieces of documents that a retriever finds, with where they come from.

Cutting pages into chunks of whole sentences by token count, and dealing chunks out to training and validation without
the same text on both sides. Not here: reading documents (documents.py), and the tokenizer, which is handed down as
`count_tokens`; sentences and near-copies are found in sentences.py and copies.py.

    chunks = chunk_pages(pages, count_tokens=count_tokens, size=254, overlap=32)
    split = split_chunks(chunks, train_pages=parse_pages("1-90"))
    save_chunks("train.jsonl", split.train)   # load_chunks takes any JSONL with `id` and `text`
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ..data.checks import check_text
from ..files import atomic_write, read_jsonl
from .copies import near_copies
from .sentences import sentence_spans

CountTokens = Callable[[Sequence[str]], list[int]]

ID_DIGITS = 16
# A longer stretch for one token is no text; it counts as a token for each so many characters.
MAX_TOKEN_CHARACTERS = 100
# What two texts may save when they are counted as one.
MAX_JOINT_TOKENS = 2

# How a page ends that the next one continues, and how that one begins.
RUNS_ON = re.compile(r"(?:[^\W\d_]|[,;’”)])$")
BROKEN_AT_HYPHEN = re.compile(r"[^\W\d_]-$")
MIN_PROSE_WORDS = 8


class PageText(Protocol):
    """What a page has to have: documents.Page does."""

    @property
    def file(self) -> str:
        """The file, as it was named."""

    @property
    def number(self) -> int:
        """From 1."""

    @property
    def text(self) -> str:
        """Its lines."""


@dataclass(frozen=True)
class Place:
    """Where a chunk stands: a file as it was named, and its first and last page (numbered from 1)."""

    file: str
    first_page: int
    last_page: int


@dataclass(frozen=True)
class Chunk:
    """A piece of text. `places` has more than one entry where the very same text was found again.

    `id` is the beginning of the text's SHA-256 for chunks that were cut here; `num_tokens` counts the text alone, as
    the tokenizer that cut it does; None and () for chunks from elsewhere.
    """

    id: str
    text: str
    num_tokens: int | None = None
    places: tuple[Place, ...] = ()


def save_chunks(path: str | Path, chunks: Sequence[Chunk]) -> None:
    """Writes one JSON object a line, atomically; fields that are None or empty are left out."""
    with atomic_write(path) as file:
        for chunk in chunks:
            row = {key: value for key, value in asdict(chunk).items() if value not in (None, ())}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_chunks(path: str | Path) -> list[Chunk]:
    """The chunks of a JSONL file of objects with `id` (a string, or an integer that becomes one) and `text`.

    Other keys than those of `Chunk` are passed over; texts are kept as they are.

    Raises:
        ValueError: no chunk, a missing or blank field, an id twice; names file and line.
    """
    chunks: dict[str, Chunk] = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        if not isinstance(row, dict) or not {"id", "text"} <= row.keys():
            raise ValueError(f"{where}: expected an object with `id` and `text`")
        id = str(row["id"]) if type(row["id"]) is int else row["id"]
        check_text(id, f"{where}: `id`")
        check_text(row["text"], f"{where}: `text`")
        if id in chunks:
            raise ValueError(f"{where}: id {id!r} stands in an earlier line too")
        try:
            places = tuple(Place(**place) for place in row.get("places", ()))
        except TypeError:
            raise ValueError(f"{where}: `places` is not a list of file, first_page, last_page") from None
        chunks[id] = Chunk(id, row["text"], row.get("num_tokens"), places)
    if not chunks:
        raise ValueError(f"{path}: has no chunk")
    return list(chunks.values())


class Split(NamedTuple):
    """The two sides; `num_dropped` chunks are on neither."""

    train: list[Chunk]
    validation: list[Chunk]
    num_dropped: int


# Chunks of pages.


def chunk_pages(
    pages: Sequence[PageText], *, count_tokens: CountTokens, size: int, overlap: int = 0, by_page: bool = False
) -> list[Chunk]:
    """Cuts pages into chunks of at most `size` tokens, each as many whole sentences as fit.

    The pages of a file are joined first, so that a sentence may run over the end of a page: by a blank where it does,
    else by a line end. A chunk is a contiguous piece of that text. A sentence longer than `size` is broken between
    words, a word longer than `size` between characters; the limit holds without exception, by what `count_tokens` says
    of the chunk's own text, or one token for 100 characters where that is more. Consecutive chunks share whole
    sentences of at most `overlap` tokens, never all of the earlier one.
    Texts that are found again become one chunk with a place each.

    Args:
        pages: those of a file in order, as `read_documents` gives them; pages without text are passed over.
        count_tokens: tokens of each text, special tokens left out.
        size: of a chunk, in tokens: what the model takes less its special tokens.
        overlap: in tokens, less than `size`.
        by_page: no chunk goes over the end of a page.

    Raises:
        ValueError: `size` or `overlap` out of range, or one character has more than `size` tokens.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"size is {size} and overlap {overlap}, expected a size from 1 and an overlap from 0 below it")
    groups: dict[tuple[str, int], list[PageText]] = {}
    for page in pages:
        if page.text.strip():
            groups.setdefault((page.file, page.number if by_page else 0), []).append(page)
    chunks: dict[str, Chunk] = {}
    for (file, _), members in groups.items():
        text, starts = _join_pages(members)
        for start, stop, num_tokens in _Cutter(text, count_tokens, size).cut(overlap):
            first, last = (members[bisect_right(starts, place) - 1].number for place in (start, stop - 1))
            _add(chunks, text[start:stop], num_tokens, Place(file, first, last))
    return list(chunks.values())


def _add(chunks: dict[str, Chunk], text: str, num_tokens: int, place: Place) -> None:
    digest, digits = hashlib.sha256(text.encode()).hexdigest(), ID_DIGITS
    # Where two texts have the same digits the later one takes more of them.
    while (found := chunks.get(digest[:digits])) is not None and found.text != text:
        digits += 1
    id = digest[:digits]
    if found is None:
        chunks[id] = Chunk(id, text, num_tokens, (place,))
    elif place not in found.places:
        chunks[id] = replace(found, places=(*found.places, place))


def _join_pages(pages: Sequence[PageText]) -> tuple[str, list[int]]:
    """The text of consecutive pages, and where each begins in it."""
    parts, starts, length = [], [], 0
    for page in pages:
        text = page.text.strip()
        glue = _glue(parts[-1], text) if parts else ""
        starts.append(length + len(glue))
        parts += [glue, text]
        length = starts[-1] + len(text)
    return "".join(parts), starts


def _glue(before: str, after: str) -> str:
    """What goes between two pages: nothing within a word, a blank within a sentence, else a line end."""
    line, opening = before[before.rfind("\n") + 1 :], after[0]
    if BROKEN_AT_HYPHEN.search(line) and opening.isalpha():
        return ""
    # A line of prose always ends with a mark; headings and rows of tables, which do not, are shorter.
    is_prose = len(re.findall(r"[^\W\d_]{2,}", line)) >= MIN_PROSE_WORDS
    runs_on = RUNS_ON.search(line) is not None and (opening.islower() or (is_prose and opening.isalpha()))
    return " " if runs_on else "\n"


class _Unit(NamedTuple):
    """What chunks are made of: a sentence, or a part of one that is too long. `num_tokens`: of it alone."""

    start: int
    stop: int
    num_tokens: int


class _Cutter:
    """Cuts one text. The sum of the units' tokens guides, the count of the very text decides."""

    def __init__(self, text: str, count_tokens: CountTokens, size: int):
        self.text, self.size = text, size
        # WordPiece makes one unknown token of a word however long, a blob of data say.
        self.count_tokens = lambda texts: [
            max(count, len(text) // MAX_TOKEN_CHARACTERS)
            for count, text in zip(count_tokens(texts), texts, strict=True)
        ]

    def cut(self, overlap: int) -> list[tuple[int, int, int]]:
        """(start, stop, tokens) of every chunk."""
        units = self._units(sentence_spans(self.text), is_whole=True)
        chunks, first, end = [], 0, 0
        while end < len(units):
            end, num_tokens = self._fill(units, first)
            chunks.append((units[first].start, units[end - 1].stop, num_tokens))
            first = self._next_first(units, first, end, overlap)
        return chunks

    def _count(self, start: int, stop: int) -> int:
        return self.count_tokens([self.text[start:stop]])[0]

    def _fill(self, units: Sequence[_Unit], first: int, *, tightly: bool = True) -> tuple[int, int]:
        """The end of the chunk that begins with unit `first`, which fits, and its tokens; `tightly`: tries for more."""
        end, total = first + 1, units[first].num_tokens
        while end < len(units) and total + units[end].num_tokens <= self.size:
            total += units[end].num_tokens
            end += 1
        num_tokens = total if end == first + 1 else self._count(units[first].start, units[end - 1].stop)
        while num_tokens > self.size:  # ends at the latest with one unit
            end -= 1
            num_tokens = self._count(units[first].start, units[end - 1].stop)
        # Units may have a token or two less together than apart, so that there is room for one more.
        while tightly and end < len(units) and num_tokens + units[end].num_tokens <= self.size + MAX_JOINT_TOKENS:
            more = self._count(units[first].start, units[end].stop)
            if more > self.size:
                break
            end, num_tokens = end + 1, more
        return end, num_tokens

    def _next_first(self, units: Sequence[_Unit], first: int, end: int, overlap: int) -> int:
        """Where the chunk begins that follows units `first` to `end`: so early that it shares what it may."""
        # Parts of sentences are never shared: they end where the next part would not have fitted.
        start, shared = end, 0
        if not overlap or end == len(units):
            return end
        while start > first + 1 and shared + units[start - 1].num_tokens <= overlap:
            start -= 1
            shared += units[start].num_tokens
        while start < end and (
            self._count(units[start].start, units[end - 1].stop) > overlap
            or self._count(units[start].start, units[end].stop) > self.size
        ):
            start += 1
        return start

    def _units(self, spans: Sequence[tuple[int, int]], *, is_whole: bool) -> list[_Unit]:
        """The spans with their tokens, each that is too long replaced by parts that are not."""
        units = []
        counts = self.count_tokens([self.text[start:stop] for start, stop in spans])
        for (start, stop), num_tokens in zip(spans, counts, strict=True):
            if num_tokens <= self.size:
                units.append(_Unit(start, stop, num_tokens))
            elif is_whole:
                words = [
                    (start + word.start(), start + word.end()) for word in re.finditer(r"\S+", self.text[start:stop])
                ]
                units += self._parts(self._units(words, is_whole=False), tightly=True)
            else:
                characters = [(i, i + 1) for i in range(start, stop)]
                counts_each = self.count_tokens([self.text[i] for i in range(start, stop)])
                if max(counts_each) > self.size:
                    raise ValueError(f"size is {self.size}, but one character has {max(counts_each)} tokens")
                single = [_Unit(*span, count) for span, count in zip(characters, counts_each, strict=True)]
                units += self._parts(single, tightly=False)  # a character at a time would take for ever over a blob
        return units

    def _parts(self, units: Sequence[_Unit], *, tightly: bool) -> list[_Unit]:
        """Words or characters put together to parts that fit."""
        parts, first = [], 0
        while first < len(units):
            end, num_tokens = self._fill(units, first, tightly=tightly)
            parts.append(_Unit(units[first].start, units[end - 1].stop, num_tokens))
            first = end
        return parts


# Training and validation.


def parse_pages(text: str) -> list[tuple[int, int]]:
    """Page ranges such as "1-90" or "1-90,120-130,200", ends included. Raises `ValueError` for anything else."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)
        if match is None:
            raise ValueError(f"{text!r} is not a list of pages: found {part.strip()!r}, expected such as '1-90,120'")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last:
            raise ValueError(f"{text!r}: pages {part.strip()} are none, expected from 1 up")
        ranges.append((first, last))
    return ranges


def split_chunks(
    chunks: Sequence[Chunk],
    *,
    train_files: Sequence[str] | None = None,
    train_pages: Sequence[tuple[int, int]] | None = None,
    train_share: float | None = None,
    seed: int = 0,
) -> Split:
    """Deals chunks out to training and validation, so that no validation text is in training; order is kept.

    By file or page, a chunk with all its places on the training side is for training, one with a place wholly on the
    other for validation; one that only lies across the boundary is on neither side. By share, training draws at random.

    Validation is then left whole, and training loses every chunk of which one of these is true:

    - more than half of its runs of eight words stand in validation, in one chunk or several, or more than half of those
      of one validation chunk stand in it (`near_copies`; of texts shorter than eight words, all words in order);
    - it shares with a validation chunk of the same page the sentences of an overlap, however few: one ends with them
      and the other begins with them.

    So a sentence that stands in the documents once is never on both sides. One that they repeat may be: in a training
    chunk that is for the most part something else.

    Args:
        chunks: as `chunk_pages` returns them: those of a file in order.
        train_files: files as they were named; the rest is for validation. One of the three is given.
        train_pages: page ranges, ends included, of every file.
        train_share: of the chunks, more than 0 and less than 1.
        seed: of the draw by share.

    Raises:
        ValueError: not exactly one of the three, one that is out of range, a chunk without a place, an empty side.
    """
    given = [name for name, value in _ways(train_files, train_pages, train_share).items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of train_files, train_pages, train_share; found {', '.join(given) or 'none'}")
    if train_share is not None:
        if not 0 < train_share < 1:
            raise ValueError(f"train_share is {train_share}, expected more than 0 and less than 1")
        drawn = np.random.default_rng(seed).permutation(len(chunks))[: round(train_share * len(chunks))]
        sides = ["validation"] * len(chunks)
        for row in drawn:
            sides[row] = "train"
    else:
        _check_places(chunks, train_files)
        sides = [_side(chunk, train_files, train_pages or ()) for chunk in chunks]
    validation = [chunk for chunk, side in zip(chunks, sides, strict=True) if side == "validation"]
    rows = [row for row, side in enumerate(sides) if side == "train"]
    if not rows or not validation:
        empty = "validation" if rows else "training"
        raise ValueError(f"no chunk is left for {empty}: {given[0]} puts {_counts(sides)} of {len(chunks):,} chunks")
    copies = near_copies([chunks[row].text for row in rows], [chunk.text for chunk in validation])
    leaking = {row for row, copy in zip(rows, copies, strict=True) if copy} | _overlapping(chunks, sides)
    train = [chunks[row] for row in rows if row not in leaking]
    if not train:
        raise ValueError(f"no chunk is left for training: all {len(rows):,} share text with the validation chunks")
    return Split(train, validation, len(chunks) - len(train) - len(validation))


def _ways(train_files, train_pages, train_share) -> dict[str, object]:
    return {"train_files": train_files, "train_pages": train_pages, "train_share": train_share}


def _counts(sides: Sequence[str]) -> str:
    return f"{sides.count('train'):,} into training and {sides.count('validation'):,} into validation"


def _check_places(chunks: Sequence[Chunk], train_files: Sequence[str] | None) -> None:
    files = dict.fromkeys(place.file for chunk in chunks for place in chunk.places)
    for chunk in chunks:
        if not chunk.places:
            raise ValueError(f"chunk {chunk.id!r} has no places, so it cannot be split by file or page")
    for name in train_files or ():
        if name not in files:
            raise ValueError(f"train_files: {name!r} is not among the files of the chunks: {', '.join(files)}")


def _side(chunk: Chunk, train_files: Sequence[str] | None, train_pages: Sequence[tuple[int, int]]) -> str:
    """ "train", "validation" or "neither"."""
    inside = []  # of each place, how much is for training: all True, none False, some None
    for place in chunk.places:
        if train_files is not None:
            inside.append(place.file in train_files)
            continue
        pages = range(place.first_page, place.last_page + 1)
        ours = [any(first <= page <= last for first, last in train_pages) for page in pages]
        inside.append(None if any(ours) and not all(ours) else ours[0])
    return "validation" if False in inside else "neither" if None in inside else "train"


def _overlapping(chunks: Sequence[Chunk], sides: Sequence[str]) -> set[int]:
    """The rows of training chunks that end as a validation chunk of their place begins, or begin as one ends."""
    spans = [sentence_spans(chunk.text) for chunk in chunks]
    # By the page as well: a title that begins every page has others to be compared with on its own pages only.
    beginnings: dict[tuple[str | None, int | None, str], list[int]] = {}
    for row, (chunk, own) in enumerate(zip(chunks, spans, strict=True)):
        for place in chunk.places or (None,):
            page = (place.file, place.first_page) if place else (None, None)
            beginnings.setdefault((*page, chunk.text[slice(*own[0])]), []).append(row)
    found = set()
    for before, (chunk, own) in enumerate(zip(chunks, spans, strict=True)):
        pages = [(place.file, page) for place in chunk.places for page in range(place.first_page, place.last_page + 1)]
        for start, stop in own:
            for page in pages or [(None, None)]:
                for after in beginnings.get((*page, chunk.text[start:stop]), ()):
                    across = {sides[before], sides[after]} == {"train", "validation"}
                    if across and chunks[after].text.startswith(chunk.text[start:]):
                        found.add(before if sides[before] == "train" else after)
    return found
