"""Token ids of many texts in one array: a ninth of the memory of lists of ints, and packed without a loop over tokens.

    tokens = TokenIds.of([[101, 7592, 102], [101, 102]])
    tokens[1]                       # array([101, 102])
    tokens.take([1, 0]).tolist()    # [[101, 102], [101, 7592, 102]]

Shapes: N texts, T tokens, W windows.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Token ids of N texts: those of text i are ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # [T] int32
    offsets: np.ndarray  # [N + 1] int64, from 0

    @classmethod
    def join(cls, parts: Sequence["TokenIds"]) -> "TokenIds":
        """The texts of each part in turn."""
        offsets = np.concatenate([[0], *(part.lengths() for part in parts)]).cumsum()
        return cls(np.concatenate([np.empty(0, dtype=np.int32), *(part.ids for part in parts)]), offsets)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "TokenIds":
        """From a list of ids, or an array, for each text. Raises `ValueError` for an id that int32 cannot hold."""
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in sequences], out=offsets[1:])
        try:
            return cls(np.fromiter(chain.from_iterable(sequences), np.int32, int(offsets[-1])), offsets)
        except OverflowError:
            largest = max(chain.from_iterable(sequences))
            raise ValueError(f"a token id is {largest}, expected at most {np.iinfo(np.int32).max}") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        """Tokens of each text, [N] int64."""
        return np.diff(self.offsets)

    def take(self, rows: Sequence[int]) -> "TokenIds":
        """The texts at `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        starts, lengths = self.offsets[rows], self.lengths()[rows]
        return TokenIds(gather(self.ids, starts, lengths), np.concatenate([[0], lengths.cumsum()]))

    def keyed(self, stored: bool) -> tuple[Sequence, Callable[[Sequence], "TokenIds"]]:
        """Keys of the texts by their ids, strings if `stored`, and a function from some keys to ids."""
        if not stored:
            return self, lambda same: same
        keys = [" ".join(map(str, ids)) for ids in self.tolist()]
        return keys, lambda some: TokenIds.of([list(map(int, key.split())) for key in some])

    def tolist(self) -> list[list[int]]:
        ids = self.ids.tolist()
        return [ids[start:end] for start, end in pairwise(self.offsets.tolist())]


def window_sizes(passages: Sequence[int]) -> list[tuple[int, int]]:
    """The (size, stride) pairs of `passages`, which has them end to end: (128, 64), or (128, 64, 64, 32) for two.
    Raises `ValueError` for anything else, and for a size twice; `Tokenizer.check_passages` checks the numbers."""
    expected = "[size, stride] or several such pairs end to end, in whole tokens"
    try:
        numbers = list(map(operator.index, passages))
    except TypeError:
        raise ValueError(f"passages is {passages!r}, expected {expected}") from None
    if not numbers or len(numbers) % 2:
        raise ValueError(f"passages is {passages!r}, {len(numbers)} numbers, expected {expected}")
    sizes = numbers[::2]
    if twice := [size for i, size in enumerate(sizes) if size in sizes[:i]]:
        raise ValueError(f"passages is {passages!r}, with windows of {twice[0]} tokens twice, expected different sizes")
    return list(zip(sizes, numbers[1::2], strict=True))


def gather(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """ids[start:start + length] for each start and length, end to end."""
    before = lengths.cumsum() - lengths
    return ids[np.arange(lengths.sum()) + (starts - before).repeat(lengths)]


def cut(whole: TokenIds, size: int, stride: int) -> tuple[TokenIds, np.ndarray]:
    """Windows of texts, of at most `size` tokens and `stride` apart, and the text of each, [W] int64 ascending.
    `whole` has for each text two numbers, how many of its ids begin and how many end every window, then all of its ids.
    Windows are at most as far apart as there is room between those; a text that fits is one window."""
    first_N, length_N = whole.offsets[:-1] + 2, whole.lengths() - 2
    fits_N = length_N <= size
    front_N, behind_N = (np.where(fits_N, 0, whole.ids[first_N - i].astype(np.int64)) for i in (2, 1))
    inner_N = length_N - front_N - behind_N
    room_N = np.where(fits_N, inner_N, size - front_N - behind_N)
    step_N = np.where(fits_N, 1, np.minimum(stride, room_N))
    count_N = 1 + -(-(inner_N - room_N) // step_N)
    source_W = np.arange(len(whole)).repeat(count_N)
    number_W = np.arange(len(source_W)) - (count_N.cumsum() - count_N)[source_W]  # from 0 in each text
    inside_W, front_W = number_W * step_N[source_W], front_N[source_W]
    # A window is three ranges of the text's ids: front, middle, behind.
    starts_W3 = np.stack([np.zeros_like(front_W), front_W + inside_W, (length_N - behind_N)[source_W]], axis=1)
    middle_W = np.minimum(room_N[source_W], inner_N[source_W] - inside_W)
    lengths_W3 = np.stack([front_W, middle_W, behind_N[source_W]], axis=1)
    ids = gather(whole.ids, (first_N[source_W, None] + starts_W3).ravel(), lengths_W3.ravel())
    return TokenIds(ids, np.concatenate([[0], lengths_W3.sum(axis=1).cumsum()])), source_W
