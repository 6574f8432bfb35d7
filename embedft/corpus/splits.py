"""Splits chunks into training and validation so that no validation text is in training."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .chunks import Chunk, Place
from .copies import near_copies
from .documents import printable
from .sentences import sentence_spans

TRAIN, VALIDATION, NEITHER = "training", "validation", "neither"


class Split(NamedTuple):
    """The two sides; `num_dropped` chunks are in neither."""

    train: list[Chunk]
    validation: list[Chunk]
    num_dropped: int


def parse_pages(text: str) -> list[tuple[int, int]]:
    """Parses page ranges such as "1-90" or "1-90,120-130,200", ends included. Raises `ValueError` for anything else."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"{text!r} is not a list of pages: found {part.strip()!r}, expected e.g. '1-90,120'")
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
    """Assigns chunks to training and validation and drops leaks from training; order is kept.

    By file or page (ranges of every file, ends included), a chunk with all its places on the training side is for
    training, one with a place wholly on the other side for validation; one that only crosses the boundary is in
    neither. By share, training is drawn at random. Training then loses every chunk that is a near-copy of validation
    (`near_copies`), or shares the sentences of an overlap, however few, with a validation chunk of the same page: one
    ends with them and the other begins with them.

    Raises:
        ValueError: not exactly one way to split, a value out of range, a chunk without a place, or an empty side.
    """
    ways = {"train_files": train_files, "train_pages": train_pages, "train_share": train_share}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of train_files, train_pages, train_share; found {', '.join(given) or 'none'}")
    if train_share is not None:
        if not 0 < train_share < 1:
            raise ValueError(f"train_share is {train_share}, expected more than 0 and less than 1")
        drawn = {*np.random.default_rng(seed).permutation(len(chunks))[: round(train_share * len(chunks))].tolist()}
        sides = [TRAIN if row in drawn else VALIDATION for row in range(len(chunks))]
    else:
        sides = _sides_by_place(chunks, train_files and list(map(printable, train_files)), train_pages or ())
    validation = [chunk for chunk, side in zip(chunks, sides, strict=True) if side == VALIDATION]
    rows = [row for row, side in enumerate(sides) if side == TRAIN]
    if not rows or not validation:
        counts = f"{len(rows):,} into training and {len(validation):,} into validation of {len(chunks):,} chunks"
        raise ValueError(f"no chunk is left for {VALIDATION if rows else TRAIN}: {given[0]} puts {counts}")
    copies = near_copies([chunks[row].text for row in rows], [chunk.text for chunk in validation])
    leaking = {row for row, copy in zip(rows, copies, strict=True) if copy} | _overlapping(chunks, sides)
    train = [chunks[row] for row in rows if row not in leaking]
    if not train:
        raise ValueError(f"no chunk is left for training: all {len(rows):,} share text with the validation chunks")
    return Split(train, validation, len(chunks) - len(train) - len(validation))


def _sides_by_place(
    chunks: Sequence[Chunk], train_files: Sequence[str] | None, train_pages: Sequence[tuple[int, int]]
) -> list[str]:
    files = dict.fromkeys(place.file for chunk in chunks for place in chunk.places)
    for name in train_files or ():
        if name not in files:
            raise ValueError(f"train_files: {name!r} is not among the files of the chunks: {', '.join(files)}")

    def side(place: Place) -> str:
        if train_files is not None:
            return TRAIN if place.file in train_files else VALIDATION
        pages = range(place.first_page, place.last_page + 1)
        inside = {any(first <= page <= last for first, last in train_pages) for page in pages}
        if len(inside) > 1:
            return NEITHER
        return TRAIN if True in inside else VALIDATION

    sides = []
    for chunk in chunks:
        if not chunk.places:
            raise ValueError(f"chunk {chunk.id!r} has no places, so it cannot be split by file or page")
        found = set(map(side, chunk.places))
        sides.append(next(name for name in (VALIDATION, NEITHER, TRAIN) if name in found))
    return sides


def _overlapping(chunks: Sequence[Chunk], sides: Sequence[str]) -> set[int]:
    """The rows of training chunks that end as a validation chunk of a page of theirs begins, or begin as one ends."""
    sentences = [[(start, chunk.text[start:stop]) for start, stop in sentence_spans(chunk.text)] for chunk in chunks]
    # By page as well: a title that begins every page is compared with others on its own pages only.
    beginnings: dict[tuple, list[int]] = {}
    for row, chunk in enumerate(chunks):
        for page in [(place.file, place.first_page) for place in chunk.places] or [None]:
            beginnings.setdefault((page, sentences[row][0][1]), []).append(row)
    found = set()
    for before, chunk in enumerate(chunks):
        pages = [(place.file, page) for place in chunk.places for page in range(place.first_page, place.last_page + 1)]
        for start, sentence in sentences[before]:
            for after in {row for page in pages or [None] for row in beginnings.get((page, sentence), ())}:
                across = {sides[before], sides[after]} == {TRAIN, VALIDATION}
                if across and chunks[after].text.startswith(chunk.text[start:]):
                    found.add(before if sides[before] == TRAIN else after)
    return found
