"""Tokenizes each text once: token ids in memory, and beyond a budget in a temporary file.

    cache = TokenCache(memory_bytes=2**30)
    cache.find("documents", texts, tokenizer.token_ids)     # tokenizes
    cache.find("documents", texts, tokenizer.token_ids)     # looks up
    cache.close()

Ids take 4 bytes per token, up to half of that more while they grow, and never more than `memory_bytes`; then a file in
`tempfile.gettempdir()`, which disappears with the process, takes 4 bytes per token. Each text takes some 100 bytes of
memory in either case, besides the text itself, which is kept.

Shapes: N texts, T tokens.
"""

import contextlib
import tempfile
import threading
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import device as devices
from ..files import named_errors
from ..prefetch import Prefetch
from .token_ids import TokenIds, cut, gather
from .tokenization import check_texts


class TokenCache:
    """{key: {text: ids}}. Threads may share it. A copy starts empty."""

    def __init__(self, memory_bytes: int = 2**30):
        self.memory_bytes, self._lock = memory_bytes, threading.Lock()
        self.close()

    def close(self) -> None:
        """Forgets everything, and frees the memory and the file."""
        if getattr(self, "_file", None) is not None:
            self._file.close()
        self._rows: dict[Hashable, dict[str, int]] = {}
        self._starts, self._lengths = array("q"), array("q")
        # Starts count tokens: below `_limit` in memory, from there on in the file.
        self._memory, self._limit, self._num_kept = np.empty(0, dtype=np.int32), self.memory_bytes // 4, 0
        self._file, self._num_spilled = None, 0

    def __reduce__(self) -> tuple:
        return type(self), (self.memory_bytes,)

    def find(self, key: Hashable, texts: Sequence[str], compute: Callable[[list[str]], TokenIds]) -> TokenIds:
        """The ids of texts; `compute` is called with those that are not known under this key, each once."""
        with self._lock:
            rows = self._rows.setdefault(key, {})
            if new := [text for text in dict.fromkeys(texts) if text not in rows]:
                first, tokens = len(self._starts), compute(new)
                self._keep(tokens)
                rows.update(zip(new, range(first, first + len(new)), strict=True))
            return self._read([rows[text] for text in texts])

    def _keep(self, tokens: TokenIds) -> None:
        size = len(tokens.ids)
        if (needed := self._num_kept + size) <= self._limit:
            if needed > len(self._memory):
                # In place where the allocator can, and nobody else holds it: what is read are copies.
                self._memory.resize(min(self._limit, needed + needed // 2), refcheck=False)
            start = self._num_kept
            self._memory[start:needed], self._num_kept = tokens.ids, needed
        else:
            with named_errors(tempfile.gettempdir()):
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="embedft-tokens-")  # noqa: SIM115
                self._file.seek(4 * self._num_spilled)  # over what a write that failed, as on a full disk, has left
                self._file.write(tokens.ids.tobytes())
                self._file.flush()
            start = self._limit + self._num_spilled
            self._num_spilled += size
        self._starts.extend((start + tokens.offsets[:-1]).tolist())
        self._lengths.extend(tokens.lengths().tolist())

    def _read(self, rows: list[int]) -> TokenIds:
        if not rows:
            return TokenIds.of([])
        starts, lengths = (np.frombuffer(x, dtype=np.int64)[rows] for x in (self._starts, self._lengths))
        offsets = np.concatenate([[0], lengths.cumsum()])
        if (is_spilled := starts >= self._limit).any():
            # A new map each time, as the file grows; it costs as much as reading a few pages.
            ids, spilled = np.empty(offsets[-1], dtype=np.int32), is_spilled.repeat(lengths)
            if self._num_spilled:  # an empty file cannot be mapped
                mapped = np.memmap(self._file, dtype=np.int32, mode="r", shape=(self._num_spilled,))
                ids[spilled] = gather(mapped, starts[is_spilled] - self._limit, lengths[is_spilled])
            ids[~spilled] = gather(self._memory, starts[~is_spilled], lengths[~is_spilled])
            return TokenIds(ids, offsets)
        return TokenIds(gather(self._memory, starts, lengths), offsets)


@contextlib.contextmanager
def token_cache(embedder: Any, memory_bytes: int) -> Iterator[None]:
    """Gives an embedder a cache for the block, unless it has one."""
    if embedder.token_cache is not None:
        yield
        return
    embedder.token_cache = TokenCache(memory_bytes)
    try:
        yield
    finally:
        embedder.token_cache.close()
        embedder.token_cache = None


def find_ids(embedder: Any, texts: Sequence[str], role: str, *, whole: bool = False) -> TokenIds:
    """The ids of texts with their prompt, truncated or, with `whole`, as `Tokenizer.whole` has them. The embedder's
    `token_cache`, if it has one, keeps them."""
    prompt, tokenizer = embedder.prompt(role), embedder.side(role).tokenizer

    def compute(texts: Sequence[str]) -> TokenIds:
        if whole:
            return tokenizer.whole(texts, prompt=prompt)
        return tokenizer.token_ids([prompt + text for text in texts] if prompt else texts)

    if embedder.token_cache is None:
        return compute(texts)
    return embedder.token_cache.find((tokenizer.sha256(), prompt, whole), check_texts(texts), compute)


def find_windows(
    embedder: Any, texts: Sequence[str], role: str, passages: Sequence[int]
) -> tuple[TokenIds, np.ndarray]:
    """The ids of the windows of texts, and the row of `texts` each comes from, as `Tokenizer.windows`."""
    how = embedder.side(role).tokenizer.check_passages(passages, embedder.prompt(role))
    return cut(find_ids(embedder, texts, role, whole=True), *how)


@contextlib.contextmanager
def ids_ahead(
    embedder: Any, texts: Sequence[str], role: str, slice_texts: int
) -> Iterator[Callable[[Sequence[str]], TokenIds]]:
    """Yields a function from a slice of `texts` to ids, to be called for each in turn. On a GPU, a thread tokenizes the
    next slice meanwhile, unless there is a store: which texts it lacks is not known so early."""
    ahead = devices.batches_ahead(embedder.device) // 2
    if embedder.store is not None or ahead == 0:
        yield lambda part: find_ids(embedder, part, role)
        return
    starts = range(0, len(texts), slice_texts)
    slices = (find_ids(embedder, texts[start : start + slice_texts], role) for start in starts)
    with Prefetch(slices, ahead=ahead) as found:
        yield lambda part: next(found) if len(part) else find_ids(embedder, part, role)
