"""Reading and chunking PDF files against pypdf's plain text extraction in one process.

Before timing, both must give the same characters for every page, ignoring whitespace and hyphens.

    python -m benchmarks.bench_chunk --rounds 3 report.pdf
"""

import argparse
import logging
import tempfile
from collections import Counter
from pathlib import Path

from embedft import load_embedder
from embedft.corpus.chunks import chunk_pages
from embedft.corpus.documents import read_documents
from experiments.sources import SHARED

from . import suite
from .suite import Row, make_parser
from .workers import Worker, alternate

SIZE, OVERLAP = 254, 32


class Ours:
    def __init__(self, paths: list[str], model: str, processes: int | None):
        self.paths, self.processes = paths, processes
        self.tokenizer = load_embedder(model, device="cpu").tokenizer

    def read(self) -> None:
        self.read_pages, _ = read_documents(self.paths, processes=self.processes)
        count = self.count_tokens
        self.chunks = chunk_pages(self.read_pages, count_tokens=count, size=SIZE, overlap=OVERLAP)

    def count_tokens(self, texts: list[str]) -> list[int]:
        return self.tokenizer.count(texts)

    def pages(self) -> dict[tuple[str, int], str]:
        return {(page.file, page.number): page.text for page in self.read_pages}

    def num_chunks(self) -> int:
        return len(self.chunks)


class Pypdf:
    def __init__(self, paths: list[str]):
        logging.getLogger("pypdf").setLevel(logging.CRITICAL)
        self.paths = paths

    def read(self) -> None:
        from pypdf import PdfReader

        self.texts = {path: [page.extract_text() for page in PdfReader(path).pages] for path in self.paths}

    def pages(self) -> dict[tuple[str, int], str]:
        return {(path, i): text for path, texts in self.texts.items() for i, text in enumerate(texts, start=1)}


def characters(text: str) -> Counter[str]:
    """Counts characters, since pypdf's modes return them in different orders."""
    return Counter("".join(text.split()).replace("-", ""))


def first_pages(paths: list[str], number: int, folder: str) -> list[str]:
    """Copies of PDF files with their first pages only."""
    from pypdf import PdfReader, PdfWriter

    copies = []
    for path in paths:
        writer = PdfWriter()
        for page in PdfReader(path).pages[:number]:
            writer.add_page(page)
        copies.append(str(Path(folder, f"{len(copies)}.pdf")))
        writer.write(copies[-1])
    return copies


def main(options: argparse.Namespace) -> list[Row]:
    paths = options.pdf or sorted(map(str, Path(SHARED, "pdf").glob("*.pdf")))
    if not paths:
        raise ValueError("no PDF file beside the checkout; name at least one")
    with tempfile.TemporaryDirectory() as folder:
        return compare(first_pages(paths, options.pages, folder) if options.pages else paths, options)


def compare(paths: list[str], options: argparse.Namespace) -> list[Row]:
    folder, peer = str(load_embedder(options.base, device="cpu").source.folder), f"pypdf {suite.version('pypdf')}"
    workers = {
        "a process per core": Worker(Ours, paths, folder, None),
        "one process": Worker(Ours, paths, folder, 1),
        peer: Worker(Pypdf, paths),
    }
    for worker in workers.values():
        worker.call("read")  # also warms up
    ours, expected = list(workers)[:-1], workers[peer].call("pages")
    for who in ours:
        found = workers[who].call("pages")
        for (path, number), text in expected.items():
            if characters(found.get((path, number), "")) != characters(text):
                raise ValueError(f"{path} page {number}: the characters differ from pypdf's ({who})")
    seconds = alternate(workers, "read", rounds=options.rounds, warmup=0)
    more = {"pages": len(expected), "chunks": workers[ours[0]].call("num_chunks")}
    rows = [Row(who, seconds[who], peer, seconds[peer], more=dict(more)) for who in ours]
    for worker in workers.values():
        worker.close()
    print(f"{more['pages']:,} pages, {more['chunks']:,} chunks of up to {SIZE} tokens, overlap {OVERLAP}\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("chunk", __doc__, rounds=3, devices=False)
    found.add_argument("pdf", nargs="*", metavar="PDF", help="files to read [the filings beside the checkout]")
    found.add_argument("--pages", type=int, metavar="N", help="how many pages of each file, the first ones [all]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
