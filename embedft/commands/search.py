"""`embedft search`: the passages that answer a question, with the file and pages they are from.

embedft search sentence-transformers/all-MiniLM-L6-v2 chunks "who audits the books?" --passages 128 64 --hybrid
"""

import argparse
import copy
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..corpus.chunks import Chunk
from ..data.dataset import RetrievalDataset
from ..encoders.embedder import Embedder
from ..encoders.openai_api import ApiEmbedder
from ..files import read_jsonl
from ..retrieval.bm25 import Bm25Index, split_words
from ..retrieval.encoding import sorted_corpus
from ..retrieval.fusion import fuse
from ..retrieval.run import Run
from ..retrieval.search import Searcher
from .models import _add_encoding, _add_loading, _add_model, _add_store, _load_data, _load_encoding, _print_store
from .retrieval import _add_passages
from .texts import TRAIN, VALIDATION, WHOLE, _load_sides

# Documents of either run that are fused: what z-scores are taken over.
FUSED_DEPTH = 100
# Lines shown of a document, unless it is the window that answers best; and how wide they get.
SHOWN_LINES, WIDEST = 4, 100


def _add_search(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "data", metavar="DATA", help="what to search: what `embedft chunk` wrote, or the documents of a data set"
    )
    parser.add_argument(
        "question", nargs="?", metavar="QUESTION", help="without one they are read, a line each, until an empty one"
    )
    parser.add_argument("--depth", type=int, default=5, metavar="K", help="documents shown [5]")
    _add_passages(parser)
    parser.add_argument("--hybrid", action="store_true", help="fused with BM25 by z-scores, one half each")
    _add_encoding(parser)
    _add_store(parser)
    parser.add_argument("--adapter", metavar="DIR", help="have vectors go through the adapter in DIR")
    parser.add_argument("--split", metavar="NAME", help="of a BEIR folder [test, or the only one]")
    _add_loading(parser)


def _search(options: argparse.Namespace) -> None:
    if options.depth < 1:
        raise ValueError(f"--depth is {options.depth}, expected at least 1")
    if options.question is not None and not options.question.strip():
        raise ValueError("the question is empty")
    dataset, places = _load_documents(options)
    embedder = _load_encoding(options, adapter=options.adapter)
    depth = max(options.depth, FUSED_DEPTH) if options.hybrid else options.depth
    searcher = Searcher(embedder, dataset, depth=depth, dim=options.dim, passages=options.passages)
    bm25 = _Bm25.of(embedder, dataset) if options.hybrid else None
    texts = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))
    windows = _Windows(embedder, tuple(options.passages)) if options.passages else None
    width = min(shutil.get_terminal_size().columns, WIDEST)
    for number, question in enumerate(_questions(options)):
        run = searcher.search([question])
        if bm25 is not None:
            run = fuse([run, bm25.search(question, depth)], method="zscore", depth=options.depth)
        if options.question is None and not sys.stdin.isatty():
            print("\n" * (number > 0) + question)
        if windows is not None:
            (query_D,) = embedder.encode([question], role="query", dim=options.dim, progress=False)
        (found,) = run.to_dict().values()
        for rank, (document_id, score) in enumerate(found.items(), start=1):
            text = texts[document_id]
            passage = None if windows is None else windows.best(text, query_D)
            place = places.get(document_id)
            print(f"{rank:>3}  {score:.4f}  {f'{place}  ' if place else ''}{document_id}")
            print(_wrapped(text if passage is None else passage, width, whole=passage is not None))
        sys.stdout.flush()  # whoever asks through a pipe may wait for the answer
    _print_store(embedder)


def _load_documents(options: argparse.Namespace) -> tuple[RetrievalDataset, dict[str, str]]:
    """What is searched, and {id: file and pages} of chunks. Of a dataset of chunks the one query plays no part."""
    if options.format or options.split or not _holds_chunks(Path(options.data)):
        return _load_data(options.data, options, merge=True, split=options.split), {}
    chunks = {chunk.id: chunk for side in _load_sides([options.data]).values() for chunk in side}
    corpus = {chunk.id: chunk.text for chunk in chunks.values()}
    places = {chunk.id: _places(chunk) for chunk in chunks.values() if chunk.places}
    return RetrievalDataset({"question": "?"}, corpus, {}), places


def _holds_chunks(path: Path) -> bool:
    """Whether a folder or file is of `embedft chunk`, or of objects with `id` and `text`, which no dataset has."""
    if path.is_dir():
        return any((path / f"{name}.jsonl").is_file() for name in (WHOLE, TRAIN, VALIDATION))
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    _, first = next(read_jsonl(path), (0, None))
    return isinstance(first, dict) and {"id", "text"} <= first.keys()


def _places(chunk: Chunk) -> str:
    """The first place of a chunk, and how many more there are."""
    first, *others = chunk.places
    pages = f"page {first.first_page}" if first.first_page == first.last_page else ""
    pages = pages or f"pages {first.first_page}-{first.last_page}"
    return f"{first.file}, {pages}" + (f" (and {len(others)} more)" if others else "")


def _questions(options: argparse.Namespace) -> Iterator[str]:
    """The one question, or those that are typed, until an empty line; from a pipe, one a line."""
    if options.question is not None:
        yield options.question
        return
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("question: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (typed and not line.strip()):
            return
        if line.strip():
            yield line.strip()


@dataclass(frozen=True)
class _Bm25:
    """An index over the documents of a dataset, for questions one by one."""

    index: Bm25Index
    tokenize: Callable[[list[str]], Sequence[Sequence[int | str]]]

    @classmethod
    def of(cls, embedder: Embedder | ApiEmbedder, dataset: RetrievalDataset) -> "_Bm25":
        document_ids, texts = sorted_corpus(dataset)
        tokenize = getattr(embedder, "tokenize", split_words)
        return cls(Bm25Index.build(tokenize(texts), document_ids=document_ids), tokenize)

    def search(self, question: str, depth: int) -> Run:
        scores_QK, rows_QK = self.index.search(self.tokenize([question]), depth)
        return Run(["0"], self.index.document_ids, rows_QK, scores_QK)


class _Windows:
    """Finds the window of a document that answers a question best, and what stands in it.

    Shapes: W windows, D dimensions.
    """

    def __init__(self, embedder: Embedder, passages: tuple[int, int]):
        self.embedder, self.passages = embedder, passages
        # Its own, for that of the embedder cuts texts off.
        self.backend = copy.deepcopy(embedder.tokenizer.backend)
        self.backend.no_truncation()
        prompt = embedder.prompt("document")
        around = self.backend.num_special_tokens_to_add(False) + len(embedder.tokenize([prompt])[0])
        self.room = passages[0] - around

    def best(self, text: str, query_D: np.ndarray) -> str:
        """What stands in the window whose vector has the largest inner product with a query's."""
        vectors_WD, _ = self.embedder.encode_passages([text], self.passages, dim=len(query_D), progress=False)
        return self.text_of(text, int((vectors_WD @ query_D).argmax()))

    def text_of(self, text: str, window: int) -> str:
        """The part of a text that its window with this number holds, with dots where the text goes on."""
        spans = self.backend.encode(text, add_special_tokens=False).offsets
        first = window * min(self.passages[1], self.room)
        inside = spans[first : first + self.room]
        if not inside:
            return text
        return f"{'... ' * (first > 0)}{text[inside[0][0] : inside[-1][1]]}{' ...' * (first + self.room < len(spans))}"


def _wrapped(text: str, width: int, *, whole: bool) -> str:
    """A text in lines under its heading; the beginning of it, or the whole."""
    indent, lines = " " * 5, None if whole else SHOWN_LINES
    return textwrap.fill(
        " ".join(text.split()),
        max(width, len(indent) + 20),
        initial_indent=indent,
        subsequent_indent=indent,
        max_lines=lines,
        placeholder=" ...",
    )


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {"search": (_add_search, _search, "find the passages that answer a question")}
