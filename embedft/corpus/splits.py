"""Splits chunks into training and validation so that no validation text, not even a near-copy, is in training.

train, validation = split_chunks(chunks, train_pages=parse_pages("1-90"))  # paraphrases are not detected
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .chunks import Chunk, Place, sentence_spans
from .documents import printable

COPIED_SHARE = 0.5  # near-copies: more than this share of one text's shingles is in the other


def parse_pages(text: str) -> list[tuple[int, int]]:
    """Parses page ranges such as "1-90" or "1-90,120-130,200", ends included. Raises `ValueError` for anything else."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"train_pages is {text!r}: found {part.strip()!r}, expected e.g. '1-90,120'")
        ranges.append((first, last))
    return ranges


def split_chunks(
    chunks: Sequence[Chunk],
    *,
    train_files: Sequence[str] | None = None,
    train_pages: Sequence[tuple[int, int]] | None = None,
    train_share: float | None = None,
    seed: int = 0,
) -> tuple[list[Chunk], list[Chunk]]:
    """Returns (training, validation) without leaks, in the order given; some chunks may be in neither.

    By file or page (ranges apply to every file, ends included), a chunk is for training if all its places are on that
    side, and for validation if any is wholly on the other; one that only crosses the boundary is in neither.
    `train_share` draws training at random. Training then loses near-copies of validation chunks, and chunks that
    overlap one on the same page: one begins with the sentences the other ends with. Raises `ValueError` for two ways
    to split or none, a chunk without a place, and an empty side."""
    ways = {"train_files": train_files, "train_pages": train_pages, "train_share": train_share}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of train_files, train_pages, train_share; found {', '.join(given) or 'none'}")
    if train_share is None:
        trains = _by_place(chunks, train_files and list(map(printable, train_files)), train_pages or ())
    elif 0 < train_share < 1:
        drawn = {*np.random.default_rng(seed).permutation(len(chunks))[: round(train_share * len(chunks))].tolist()}
        trains = [row in drawn for row in range(len(chunks))]
    else:
        raise ValueError(f"train_share is {train_share}, expected more than 0 and less than 1")
    rows, other_rows = ([row for row, train in enumerate(trains) if train is side] for side in (True, False))
    if not rows or not other_rows:
        counts = f"{len(rows):,} of {len(chunks):,} chunks into training and {len(other_rows):,} into validation"
        raise ValueError(f"no chunk is left for {'validation' if rows else 'training'}: {given[0]} puts {counts}")
    copies = near_copies([chunks[row].text for row in rows], [chunks[row].text for row in other_rows])
    leaking = {row for row, copy in zip(rows, copies, strict=True) if copy} | _overlapping(chunks, trains)
    if leaking.issuperset(rows):
        raise ValueError(f"no chunk is left for training: all {len(rows):,} share text with the validation chunks")
    return [chunks[row] for row in rows if row not in leaking], [chunks[row] for row in other_rows]


def _by_place(
    chunks: Sequence[Chunk], train_files: Sequence[str] | None, train_pages: Sequence[tuple[int, int]]
) -> list[bool | None]:
    """Whether each chunk is for training (True) or validation (False); None: neither."""
    files = dict.fromkeys(place.file for chunk in chunks for place in chunk.places)
    for name in train_files or ():
        if name not in files:
            raise ValueError(f"train_files: {name!r} is not among the files of the chunks: {', '.join(files)}")

    def is_inside(place: Place) -> bool | None:
        if train_files is not None:
            return place.file in train_files
        pages = range(place.first_page, place.last_page + 1)
        inside = {any(first <= page <= last for first, last in train_pages) for page in pages}
        return None if len(inside) > 1 else inside.pop()

    trains = []
    for chunk in chunks:
        if not chunk.places:
            raise ValueError(f"chunk {chunk.id!r} has no places, so it cannot be split by file or page")
        found = set(map(is_inside, chunk.places))
        trains.append(next(side for side in (False, None, True) if side in found))
    return trains


def _overlapping(chunks: Sequence[Chunk], trains: Sequence[bool | None]) -> set[int]:
    """The rows of training chunks that overlap a validation chunk on the same page: one begins as the other ends."""
    sentences = [[(start, chunk.text[start:stop]) for start, stop in sentence_spans(chunk.text)] for chunk in chunks]
    # By page as well, so that a title that begins every page is compared only within each page.
    beginnings: dict[tuple, list[int]] = {}
    for row, chunk in enumerate(chunks):
        for page in [(place.file, place.first_page) for place in chunk.places] or [None]:
            beginnings.setdefault((page, sentences[row][0][1]), []).append(row)
    found = set()
    for before, chunk in enumerate(chunks):
        pages = [(place.file, page) for place in chunk.places for page in range(place.first_page, place.last_page + 1)]
        for start, sentence in sentences[before]:
            for after in {row for page in pages or [None] for row in beginnings.get((page, sentence), ())}:
                is_across = {trains[before], trains[after]} == {True, False}
                if is_across and chunks[after].text.startswith(chunk.text[start:]):
                    found.add(before if trains[before] else after)
    return found


def words(text: str) -> list[str]:
    """The words of a text, lower-cased: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def shingles(text: str, *, num_words: int = 8) -> set[int]:
    """Hashes of a text's runs of eight words, equal in every process; a shorter text is hashed as a whole."""
    codes = [zlib.crc32(word.encode()) for word in words(text)] or [zlib.crc32("".join(text.split()).encode())]
    runs = zip(*(codes[start:] for start in range(num_words)), strict=False)
    return {hash(run) for run in runs} or {hash((len(codes), *codes))}


def near_copies(texts: Sequence[str], others: Sequence[str], *, max_holders: int = 100) -> list[bool]:
    """Whether each text is a near-copy: over half of its shingles are in `others`, or over half of one other's in it.
    The second test skips shingles that more than `max_holders` others have (a footer's), so it takes linear time."""
    sizes, holders = [], {}
    for row, own in enumerate(map(shingles, others)):
        sizes.append(len(own))
        for shingle in own:
            holders.setdefault(shingle, []).append(row)
    copies = []
    for own in map(shingles, texts):
        shared = [holders[shingle] for shingle in own if shingle in holders]
        covered = Counter(row for rows in shared if len(rows) <= max_holders for row in rows)
        is_copied = any(count > COPIED_SHARE * sizes[row] for row, count in covered.items())
        copies.append(is_copied or len(shared) > COPIED_SHARE * len(own))
    return copies
