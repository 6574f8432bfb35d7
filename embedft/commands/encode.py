"""`embedft encode`: encodes a file of texts into a file or a store of vectors.

embedft encode sentence-transformers/all-MiniLM-L6-v2 texts.txt --out vectors.npy
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np

from ..config import REQUIRED, option
from ..files import atomic_write, read_jsonl, read_lines
from .options import Encoder, check_output, load_encoder, print_costs

SLICE_TEXTS = 16_384  # per call, when vectors go only to the store


@dataclass(frozen=True, kw_only=True)
class Options(Encoder):
    texts: str = option(REQUIRED, "one text per line, or .jsonl of strings or `text`", metavar="FILE", positional=True)
    out: str | None = option(None, "file for the vectors, [texts, dimensions] float32", metavar="FILE.npy")
    role: Literal["query", "document"] = option("document", "whose prompt precedes each text")
    overwrite: bool = option(False, "replace FILE.npy")

    def __post_init__(self):
        if not (self.out or self.store):
            raise ValueError("nowhere to write the vectors: pass --out FILE.npy, --store DIR, or both")
        if self.out and not self.out.endswith(".npy"):
            raise ValueError(f"--out is {self.out}, expected a name ending in .npy")


def run(options: Options) -> None:
    """Encodes the texts and writes the vectors."""
    if options.out:
        check_output(options.out, overwrite=options.overwrite)
    if options.texts.endswith(".jsonl"):
        found = [(n, x.get("text") if isinstance(x, dict) else x) for n, x in read_jsonl(options.texts)]
        if wrong := [number for number, text in found if not isinstance(text, str)]:
            raise ValueError(f"{options.texts} line {wrong[0]}: expected a string, or an object with a string `text`")
        texts = [text for _, text in found]
    else:
        texts = [line.rstrip("\r\n") for line in read_lines(options.texts)]
    embedder = load_encoder(options)
    if options.out:
        embeddings_ND = embedder.encode(texts, role=options.role, dim=options.dim)
        with atomic_write(options.out, "wb") as file:
            # Writing to a file itself, NumPy does not notice when the disk takes all but the end.
            np.save(SimpleNamespace(write=file.write), embeddings_ND)
        print(f"{options.out}: {len(texts):,} texts x {embeddings_ND.shape[1]} dimensions, float32")
    else:
        for start in range(0, len(texts), SLICE_TEXTS):
            embedder.encode(texts[start : start + SLICE_TEXTS], role=options.role, dim=options.dim)
    print_costs(embedder)
