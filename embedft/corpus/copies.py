"""Near-copies: texts that mostly say the same words in the same order. Not here: copies in other words."""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

# Two texts are near-copies when more than this share of the shingles of one is in the other.
COPIED_SHARE = 0.5


def words(text: str) -> list[str]:
    """The words of a text, lower-cased: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def shingles(text: str, *, num_words: int = 8) -> set[int]:
    """Hashes of a text's runs of eight words, the same in every process; of all its words or characters if shorter."""
    codes = [zlib.crc32(word.encode()) for word in words(text)] or [zlib.crc32("".join(text.split()).encode())]
    runs = zip(*(codes[start:] for start in range(num_words)), strict=False)
    return {hash(run) for run in runs} or {hash((len(codes), *codes))}


def is_copied(own: set[int], seen: set[int]) -> bool:
    """Whether more than half of the shingles `own` are among `seen`."""
    return len(own & seen) > COPIED_SHARE * len(own)


def near_copies(texts: Sequence[str], others: Sequence[str], *, max_holders: int = 100) -> list[bool]:
    """For each of `texts`, whether it is a near-copy of `others`.

    It is if more than half of its shingles are in all of `others`, or more than half of those of one of them in it;
    there, shingles of more than `max_holders` texts (a footer's) do not count, which keeps the time linear.
    """
    other_shingles = [shingles(other) for other in others]
    holders: dict[int, list[int]] = {}
    for row, own in enumerate(other_shingles):
        for shingle in own:
            holders.setdefault(shingle, []).append(row)
    copies = []
    for text in texts:
        own = shingles(text)
        shared = [holders[shingle] for shingle in own if shingle in holders]
        covered = Counter(row for rows in shared if len(rows) <= max_holders for row in rows)
        copies.append(
            len(shared) > COPIED_SHARE * len(own)
            or any(count > COPIED_SHARE * len(other_shingles[row]) for row, count in covered.items())
        )
    return copies
