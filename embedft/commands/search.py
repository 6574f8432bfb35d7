"""`embedft search`: finds the passages that answer a question, with their file and pages.

embedft search sentence-transformers/all-MiniLM-L6-v2 chunks "who audits the books?" --passages 128 64 --hybrid
"""

import contextlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import embedft

from ..config import REQUIRED, changed, check_at_most_one, option
from ..data.dataset import RetrievalDataset
from ..retrieval.bm25 import Bm25Index, split_words
from ..retrieval.run import Run
from ..retrieval.windows import make_window_span
from .options import Adapted, Bm25, Data, Windows, load_chunk_files, load_data, load_encoder, print_costs, source_kind

FUSED_DEPTH = 100  # documents per run that are standardized and fused
SHOWN_LINES, WIDEST = 4, 100  # of the start of a document; windows and --full are shown whole


@dataclass(frozen=True, kw_only=True)
class Options(Adapted, Windows, Bm25, Data):
    data: str = option(REQUIRED, "what `embedft chunk` wrote, or a dataset", metavar="DATA", positional=True)
    question: str | None = option(None, "else read from stdin, one per line", metavar="[QUESTION]", positional=True)
    depth: int = option(5, "documents to show", least=1)
    hybrid: bool = option(False, "fuse with BM25 by z-scores, equally weighted")
    full: bool = option(False, "show texts in full")
    json: bool = option(False, "print one object per question, with full texts")

    def __post_init__(self):
        check_at_most_one(self, "full", "json")
        if not self.hybrid and (given := changed(self, self.bm25_setting())):
            raise ValueError(f"{given[0]} needs --hybrid")
        if self.question is not None and not self.question.strip():
            raise ValueError("the question is empty")


def run(options: Options) -> None:
    """Answers QUESTION, or each question read from stdin."""
    dataset, places = _load_documents(options)
    embedder, passages = load_encoder(options), options.passages
    depth = max(options.depth, FUSED_DEPTH) if options.hybrid else options.depth
    searcher = embedft.Searcher(embedder, dataset, depth=depth, dim=options.dim, passages=passages)
    texts, tokenize = dict(sorted(dataset.texts.items())), getattr(embedder, "tokenize", split_words)
    bm25 = Bm25Index(tokenize(list(texts.values())), **options.bm25_given()) if options.hybrid else None
    window_text = make_window_text(embedder, passages) if passages else None
    for number, question in enumerate(_questions(options)):
        found = searcher.search([question])
        if bm25 is not None:
            scores_QK, rows_QK = bm25.search(tokenize([question]), depth)
            lexical = Run(["0"], list(texts), rows_QK, scores_QK)
            found = embedft.fuse([found, lexical], method="zscore", depth=options.depth)
        (ranked,) = found.to_dict().values()
        hits = [{"id": i, "score": score, "place": places.get(i), "text": texts[i]} for i, score in ranked.items()]
        if window_text is not None:
            (query_D,) = embedder.encode([question], role="query", dim=options.dim, progress=False)
            for hit in hits:
                # Of several sizes, the first: its best window is shown.
                vectors_WD, _ = embedder.encode_passages([hit["text"]], passages[:2], dim=len(query_D), progress=False)
                hit["passage"] = window_text(hit["text"], int((vectors_WD @ query_D).argmax()))
        if options.json:
            print(json.dumps({"question": question, "documents": hits}))
        else:
            if options.question is None and not sys.stdin.isatty():
                print("\n" * (number > 0) + question)
            _print_hits(hits, full=options.full)
        sys.stdout.flush()  # a program at the other end of a pipe may wait for the answer
    print_costs(embedder)


def _load_documents(options: Options) -> tuple[RetrievalDataset, dict[str, str]]:
    """The dataset to search, and {id: file and pages} of chunks."""
    path, places = Path(options.data), {}
    if options.format or options.split or source_kind(path) is None:
        return load_data(options.data, options), places
    chunks = {chunk.id: chunk for side in load_chunk_files(path).values() for chunk in side}
    for chunk in chunks.values():
        if chunk.places:
            place, *others = chunk.places
            first, last = place.first_page, place.last_page
            pages = f"page {first}" if first == last else f"pages {first}-{last}"
            places[chunk.id] = f"{place.file}, {pages}" + (f" (and {len(others)} more)" if others else "")
    return RetrievalDataset({"question": "?"}, {i: chunk.text for i, chunk in chunks.items()}, {}), places


def _questions(options: Options) -> Iterator[str]:
    """Yields QUESTION, or the questions typed until an empty line, or those piped in, one per line."""
    if options.question is not None:
        yield options.question
        return
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401, gives `input` line editing and history
    while question := _ask():
        yield question


def _ask() -> str:
    """What is typed, "" at the end. The prompt goes to stderr if stdout is redirected."""
    shown = sys.stdout if sys.stdout.isatty() else sys.stderr
    with contextlib.suppress(EOFError), contextlib.redirect_stdout(shown):
        return input("question: ").strip()
    return ""


def make_window_text(embedder, passages: Sequence[int]) -> Callable[[str, int], str]:
    """Returns a function (text, window number of the first size) -> text in that window, with dots where the full text
    continues."""
    window_span = make_window_span(embedder, passages)

    def window_text(text: str, window: int) -> str:
        start, end, continues = window_span(text, window)
        return f"{'... ' * (window > 0)}{text[start:end]}{' ...' * continues}"

    return window_text


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
