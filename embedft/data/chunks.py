"""Chunks: pieces of documents that a retriever finds, with where they come from.

    save_chunks("chunks.jsonl", chunks)
    chunks = load_chunks("chunks.jsonl")   # or any JSONL with `id` and `text`
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import atomic_write, read_jsonl
from .formats import check_text


@dataclass(frozen=True)
class Place:
    """Where a chunk stands: a file as it was named, and its first and last page (numbered from 1)."""

    file: str
    first_page: int
    last_page: int


@dataclass(frozen=True)
class Chunk:
    """A piece of text. `places` has more than one entry where the very same text was found again.

    `id` is the beginning of the text's SHA-256 for chunks that were cut here; `num_tokens` counts the text alone, as the
    tokenizer that cut it does; None and () for chunks from elsewhere.
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
