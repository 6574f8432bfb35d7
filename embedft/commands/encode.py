"""`embedft encode`: encodes a file of texts into a file or a store of vectors, with several processes if you like.

embedft encode sentence-transformers/all-MiniLM-L6-v2 texts.txt --out vectors.npy
torchrun --nproc-per-node 2 -m embedft encode sentence-transformers/all-MiniLM-L6-v2 texts.txt --store vectors
"""

import functools
import re
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np

import embedft

from ..config import REQUIRED, option
from ..files import atomic_write
from .options import Encoder, check_output, load_encoder, print_costs, read_texts

SLICE_TEXTS = 16_384  # per call, when vectors go only to the store


@dataclass(frozen=True, kw_only=True)
class Options(Encoder):
    texts: str = option(REQUIRED, "one text per line, or .jsonl of strings or `text`", metavar="FILE", positional=True)
    out: str | None = option(None, "file for the vectors, [texts, dimensions] float32", metavar="FILE.npy")
    role: Literal["query", "document"] = option("document", "whose prompt precedes each text")
    shard: str | None = option(None, "encode one of N shares of the texts, K from 1 to N", metavar="K/N")
    overwrite: bool = option(False, "replace FILE.npy")

    def __post_init__(self):
        if not (self.out or self.store):
            raise ValueError("nowhere to write the vectors: pass --out FILE.npy, --store DIR, or both")
        if self.out and not self.out.endswith(".npy"):
            raise ValueError(f"--out is {self.out}, expected a name ending in .npy")
        if self.shard is not None:
            found = re.fullmatch(r"([0-9]+)/([0-9]+)", self.shard)
            if not found or not 1 <= int(found[1]) <= int(found[2]):
                raise ValueError(f"--shard is {self.shard!r}, expected K/N, such as 1/4, with K from 1 to N")
            if self.out:
                raise ValueError("--shard fills a store; --out takes the vectors from it once all shares are done")


def run(options: Options) -> None:
    """Encodes the texts and writes the vectors. With several processes, each stores those of its share of the texts."""
    from ..training import distributed

    with distributed.process_group(timeout_hours=24 * 365):  # shares may end days apart
        rank, size = distributed.rank_and_size()
        if size > 1 and options.shard:
            raise ValueError(f"--shard is {options.shard}, but torchrun gives each process its share")
        number, num_shares = map(int, options.shard.split("/")) if options.shard else (rank + 1, size)
        splits = bool(options.store) and num_shares > 1
        if options.out:
            distributed.from_first(lambda: check_output(options.out, overwrite=options.overwrite))
        texts = distributed.together(lambda: _read(options.texts, number, num_shares if splits else 1))
        device = distributed.rank_device(options.device)
        embedder = distributed.together(lambda: load_encoder(options, device=device))
        if splits:
            embedder.store.takes_turns = False
        if splits or not options.out:
            distributed.together(lambda: _fill(options, embedder, texts))
        counts = distributed.totals(embedder.store.hits, embedder.store.misses) if splits else None
        if options.out:
            every = functools.partial(_read, options.texts, 1, 1) if splits else lambda: texts
            distributed.encoding_together(embedder, lambda: _write(options, embedder, every()))
        if splits:
            embedder.store.hits, embedder.store.misses = counts
        if rank == 0:
            print_costs(embedder)


def _read(path: str, number: int, num_shares: int) -> list[str]:
    """The texts of a file, or one of `num_shares` shares of them. Equal texts are in one share, so none is encoded
    twice, and a text stays in its share if others are added."""
    return [
        text
        for _, text in read_texts(path)
        if zlib.crc32(text.encode("utf-8", "surrogatepass")) % num_shares == number - 1
    ]


def _fill(options: Options, embedder: "embedft.Embedder", texts: list[str]) -> None:
    for start in range(0, len(texts), SLICE_TEXTS):
        embedder.encode(texts[start : start + SLICE_TEXTS], role=options.role, dim=options.dim)


def _write(options: Options, embedder: "embedft.Embedder", texts: list[str]) -> None:
    embeddings_ND = embedder.encode(texts, role=options.role, dim=options.dim)
    with atomic_write(options.out, "wb") as file:
        # Writing to a file itself, NumPy does not notice when the disk takes all but the end.
        np.save(SimpleNamespace(write=file.write), embeddings_ND)
    print(f"{options.out}: {len(texts):,} texts x {embeddings_ND.shape[1]} dimensions, float32")
