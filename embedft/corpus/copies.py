"""Near-copies: texts that for the most part say the same words in the same order.

    is_copied(shingles("The fee is due ..."), seen=shingles("As agreed, the fee is due ..."))
    near_copies(training_texts, validation_texts)   # a flag for each training text

Compared are runs of eight words, "shingles", as hashes. Not here: copies in other words.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

# Two texts are near-copies when more than this share of the runs of eight words of one stands in the other.
SHINGLE_WORDS = 8
COPIED_SHARE = 0.5
# A run that more texts share, a footer's say, tells nothing of any two; so time stays linear.
MAX_HOLDERS = 100


def words(text: str) -> list[str]:
    """The words of a text, lower-cased: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def shingles(text: str) -> set[int]:
    """Hashes of the runs of eight words of a text, the same in every process; of a shorter text, of all its words.

    A text without a word has the hash of its characters.
    """
    codes = [zlib.crc32(word.encode()) for word in words(text)] or [zlib.crc32("".join(text.split()).encode())]
    runs = zip(*(codes[start:] for start in range(SHINGLE_WORDS)), strict=False)
    return {hash(run) for run in runs} or {hash((len(codes), *codes))}


def is_copied(own: set[int], seen: set[int]) -> bool:
    """Whether more than half of the shingles `own` are among `seen`."""
    return len(own & seen) > COPIED_SHARE * len(own)


def near_copies(texts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """For each of `texts`, whether it is a near-copy of `others`.

    It is when more than half of its shingles stand in `others` taken together, or more than half of those of one of
    `others` stand in it. A text in which one word in eight is another, last year's report with this year's figures, is
    none.
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
        covered = Counter(row for rows in shared if len(rows) <= MAX_HOLDERS for row in rows)
        copies.append(
            len(shared) > COPIED_SHARE * len(own)
            or any(count > COPIED_SHARE * len(other_shingles[row]) for row, count in covered.items())
        )
    return copies
