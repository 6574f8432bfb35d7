"""`embedft chunk`: cuts documents into chunks, in one file or split into training and validation.

embedft chunk report.pdf --out chunks --drop-repeated --train-pages 1-90
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..config import REQUIRED, changed, check_at_most_one, option
from ..corpus.chunks import chunk_pages, save_chunks
from ..corpus.documents import drop_repeated_lines, read_documents
from ..corpus.splits import parse_pages, split_chunks
from ..files import replace_files, write_json
from .options import CHUNK_FILES, DEFAULT_MODEL, TRAIN, VALIDATION, WHOLE, check_output

REPORT = "chunk-report.json"
WAYS = ("train_pages", "train_files", "train_share")


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    paths: list[str] = option(REQUIRED, "PDF, text or Markdown files, or folders", metavar="PATH", positional=True)
    out: str = option(REQUIRED, "folder for chunks.jsonl, or for the two files of a split", metavar="DIR")
    model: str = option(DEFAULT_MODEL, "model whose tokenizer counts tokens")
    revision: str | None = option(None, "commit, tag or branch on the hub [the default branch]")
    size: int | None = option(None, "maximum tokens per chunk, special ones included [the model's]")
    overlap: int = option(0, "tokens that consecutive chunks may share")
    by_page: bool = option(False, "end chunks at page ends")
    drop_repeated: bool = option(False, "drop page numbers, and repeats of headers and footers")
    headings_in_text: bool = option(False, "begin Markdown chunks with the headings above them")
    train_pages: str | None = option(None, "pages for training, such as 1-90 or 1-40,80-100", metavar="RANGES")
    train_files: list[str] | None = option(None, "files for training, as named in the chunks", metavar="PATH ...")
    train_share: float | None = option(None, "share of the chunks for training, drawn at random")
    seed: int = option(0, "random seed for --train-share")
    overwrite: bool = option(False, "replace the chunks in DIR")

    def __post_init__(self):
        check_at_most_one(self, *WAYS)


def run(options: Options) -> None:
    """Reads, chunks and splits; the folder changes only once everything is written."""
    out = Path(options.out)
    check_output(options.out, [out / f"{name}.jsonl" for name in CHUNK_FILES], overwrite=options.overwrite)
    ways = {name: getattr(options, name) for name in WAYS}
    ways["train_pages"] = None if options.train_pages is None else parse_pages(options.train_pages)
    limit, num_added, count_tokens = _limit(options)
    whole, skipped = read_documents(options.paths)
    for line in skipped:
        print(line, file=sys.stderr)
    pages, repeated = drop_repeated_lines(whole) if options.drop_repeated else (whole, {})
    how = {name: getattr(options, name) for name in ("overlap", "by_page", "headings_in_text")}
    chunks = chunk_pages(pages, count_tokens=count_tokens, size=limit - num_added, **how)
    report = {"files": len({page.file for page in whole}), "pages": len({page[:2] for page in whole})}
    report |= {"skipped": [line._asdict() for line in skipped], "repeated_lines": dict(repeated)}
    report |= {"chunks": len(chunks), "tokens": sum(chunk.num_tokens for chunk in chunks)}
    report |= {"size": limit, "special_tokens": num_added, "overlap": options.overlap, "tokenizer": options.model}
    read = f"{report['pages']:,} pages with text in {report['files']:,} file(s)"
    made = f"{len(chunks):,} chunks of at most {limit} tokens, {num_added} of them special ({options.model})"
    print(f"{read} -> {made}; {report['tokens']:,} tokens of text")
    if options.drop_repeated:
        print(f"dropped {sum(repeated.values()):,} repeated headers and footers")
    sides = {WHOLE: chunks}
    if changed(options, WAYS):
        sides = dict(zip((TRAIN, VALIDATION), split_chunks(chunks, **ways, seed=options.seed), strict=True))
        num_dropped = len(chunks) - sum(map(len, sides.values()))
        report |= {name: len(side) for name, side in sides.items()} | {"dropped": num_dropped}
        if num_dropped:
            print(f"dropped {num_dropped:,} chunks that cross the boundary or share text with validation")
    stale = [name for name in (f"{name}.jsonl" for name in CHUNK_FILES if name not in sides) if (out / name).is_file()]
    with replace_files(out, stale=stale) as new:
        for name, side in sides.items():
            save_chunks(new / f"{name}.jsonl", side)
        write_json(new / REPORT, report)
    for name in stale:
        print(f"{out / name}: removed; it belonged to another split", file=sys.stderr)
    for name, side in sides.items():
        print(f"{out / name}.jsonl: {len(side):,} chunks")
    if skipped:
        print(f"skipped {len(skipped):,} files or pages; see {out / REPORT}")


def _limit(options: Options) -> tuple[int, int, Callable]:
    """The maximum tokens per chunk, how many of them the model adds, and a function that counts the others."""
    from ..encoders.loading import load_tokenizer

    tokenizer, num_added = load_tokenizer(options.model, revision=options.revision)
    limit = tokenizer.max_length if options.size is None else options.size
    size, special = limit - num_added, f"{num_added} special tokens that the model adds to a text"
    if size < 1:
        raise ValueError(f"--size is {options.size}, expected more than the {special}")
    if not 0 <= options.overlap < size:
        room = f"the {size} tokens of text in a chunk of {limit}"
        raise ValueError(f"--overlap is {options.overlap}, expected 0 or more and less than {room}")
    if limit > tokenizer.max_length:
        most = f"{options.model} reads only {tokenizer.max_length} unless max_length is raised"
        print(f"--size is {options.size} tokens, but {most}: it would ignore the ends of chunks", file=sys.stderr)
    return limit, num_added, tokenizer.count
