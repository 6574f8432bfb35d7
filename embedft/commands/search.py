"""`embedft search`: the passages that answer a question, with the file and pages they are from.

embedft search sentence-transformers/all-MiniLM-L6-v2 chunks "who audits the books?" --passages 128 64 --hybrid
"""

import contextlib
import copy
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import embedft

from ..config import REQUIRED, check_at_most_one, setting
from ..corpus.chunks import Chunk
from ..data.dataset import RetrievalDataset
from ..files import read_jsonl
from ..retrieval.bm25 import Bm25Index, split_words
from ..retrieval.run import Run
from .options import CHUNK_FILES, Adapted, Data, Windows, load_chunk_files, load_data, load_encoder, print_costs

FUSED_DEPTH = 100  # documents of either run that are fused, whose scores make the z-scores
SHOWN_LINES, WIDEST = 4, 100  # of a document's beginning; windows and --full are shown whole


@dataclass(frozen=True, kw_only=True)
class Options(Adapted, Windows, Data):
    """Options of `embedft search`."""

    data: str = setting(REQUIRED, "what `embedft chunk` wrote, or a dataset", metavar="DATA", positional=True)
    question: str | None = setting(None, "else questions are read, one a line", metavar="[QUESTION]", positional=True)
    depth: int = setting(5, "documents to show")
    hybrid: bool = setting(False, "fuse with BM25 by z-scores, half each")
    full: bool = setting(False, "show texts in full")
    json: bool = setting(False, "print an object per question, with the full texts")

    def __post_init__(self):
        check_at_most_one(self, "full", "json")
        if self.depth < 1:
            raise ValueError(f"--depth is {self.depth}, expected at least 1")
        if self.question is not None and not self.question.strip():
            raise ValueError("the question is empty")


def run(options: Options) -> None:
    """Answers the question, or each one that is read."""
    dataset, places = _load_documents(options)
    embedder = load_encoder(options)
    depth = max(options.depth, FUSED_DEPTH) if options.hybrid else options.depth
    searcher = embedft.Searcher(embedder, dataset, depth=depth, dim=options.dim, passages=options.passages)
    bm25 = _bm25(embedder, dataset) if options.hybrid else None
    texts = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))
    windows = _Windows(embedder, options.passages) if options.passages else None
    for number, question in enumerate(_questions(options)):
        found = searcher.search([question])
        if bm25 is not None:
            found = embedft.fuse([found, bm25(question, depth)], method="zscore", depth=options.depth)
        (ranked,) = found.to_dict().values()
        hits = [{"id": i, "score": score, "place": places.get(i), "text": texts[i]} for i, score in ranked.items()]
        if windows is not None:
            (query_D,) = embedder.encode([question], role="query", dim=options.dim, progress=False)
            hits = [{**hit, "passage": windows.best(hit["text"], query_D)} for hit in hits]
        if options.json:
            print(json.dumps({"question": question, "documents": hits}))
        else:
            if options.question is None and not sys.stdin.isatty():
                print("\n" * (number > 0) + question)
            _print_hits(hits, full=options.full)
        sys.stdout.flush()  # whoever asks through a pipe may wait for the answer
    print_costs(embedder)


def _load_documents(options: Options) -> tuple[RetrievalDataset, dict[str, str]]:
    """What is searched, and {id: file and pages} of chunks."""
    if options.format or options.split or not _holds_chunks(Path(options.data)):
        return load_data(options.data, options), {}
    chunks = {chunk.id: chunk for side in load_chunk_files(Path(options.data)).values() for chunk in side}
    corpus = {chunk.id: chunk.text for chunk in chunks.values()}
    places = {chunk.id: _place(chunk) for chunk in chunks.values() if chunk.places}
    return RetrievalDataset({"question": "?"}, corpus, {}), places  # a dataset has a query; this one is not used


def _holds_chunks(path: Path) -> bool:
    """Whether `embedft chunk` wrote it, or it has objects with `id` and `text`, which no dataset has."""
    if path.is_dir():
        return any((path / f"{name}.jsonl").is_file() for name in CHUNK_FILES)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    _, first = next(read_jsonl(path), (0, None))
    return isinstance(first, dict) and {"id", "text"} <= first.keys()


def _place(chunk: Chunk) -> str:
    """The first place of a chunk, and how many more there are."""
    place, *others = chunk.places
    first, last = place.first_page, place.last_page
    pages = f"page {first}" if first == last else f"pages {first}-{last}"
    return f"{place.file}, {pages}" + (f" (and {len(others)} more)" if others else "")


def _questions(options: Options) -> Iterator[str]:
    """The one question, or those that are typed until an empty line, or those in a pipe, one per line."""
    if options.question is not None:
        yield options.question
    elif not sys.stdin.isatty():
        yield from (line.strip() for line in iter(sys.stdin.readline, "") if line.strip())
    else:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401, gives `input` line editing and history

        with contextlib.suppress(EOFError):
            while question := _ask():
                yield question


def _ask() -> str:
    if sys.stdout.isatty():
        return input("question: ").strip()
    print("question: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _bm25(embedder, dataset: RetrievalDataset):
    """A function (question, depth) -> Run over the documents of a dataset."""
    from ..retrieval.encoding import sorted_corpus

    document_ids, texts = sorted_corpus(dataset)
    tokenize = getattr(embedder, "tokenize", split_words)
    index = Bm25Index(tokenize(texts))

    def search(question: str, depth: int) -> Run:
        scores_QK, rows_QK = index.search(tokenize([question]), depth)
        return Run(["0"], document_ids, rows_QK, scores_QK)

    return search


class _Windows:
    """Finds the window of a document that answers a question best, and its text. W windows, D dimensions."""

    def __init__(self, embedder, passages: tuple[int, int]):
        self.embedder, self.passages = embedder, passages
        self.backend = copy.deepcopy(embedder.tokenizer.backend)  # a copy, for the embedder's own cuts texts off
        self.backend.no_truncation()
        num_prompt = len(embedder.tokenize([embedder.prompt("document")])[0])
        self.room = passages[0] - self.backend.num_special_tokens_to_add(False) - num_prompt

    def best(self, text: str, query_D: np.ndarray) -> str:
        """The text of the window whose vector has the largest inner product with a query's."""
        vectors_WD, _ = self.embedder.encode_passages([text], self.passages, dim=len(query_D), progress=False)
        return self.text_of(text, int((vectors_WD @ query_D).argmax()))

    def text_of(self, text: str, window: int) -> str:
        """The part of a text in its window of this number, with dots where the text goes on."""
        spans = self.backend.encode(text, add_special_tokens=False).offsets
        first = window * min(self.passages[1], self.room)
        inside = spans[first : first + self.room]
        if not inside:
            return text
        return f"{'... ' * (first > 0)}{text[inside[0][0] : inside[-1][1]]}{' ...' * (first + self.room < len(spans))}"


def _print_hits(hits: list[dict], *, full: bool) -> None:
    indent, width = " " * 5, max(min(shutil.get_terminal_size().columns, WIDEST), 25)
    for rank, hit in enumerate(hits, start=1):
        place = f"{hit['place']}  " if hit["place"] else ""
        print(f"{rank:>3}  {hit['score']:.4f}  {place}{hit['id']}")
        if full:
            print(textwrap.indent(hit["text"], indent))
            continue
        lines = {} if "passage" in hit else {"max_lines": SHOWN_LINES, "placeholder": " ..."}
        text = " ".join(hit.get("passage", hit["text"]).split())
        print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, **lines))
