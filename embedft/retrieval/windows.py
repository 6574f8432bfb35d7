"""Where windows are in their text, and which of them matches a question.

    places = matching_windows(embedder, dataset, (128, 64))     # {"query_id", "document_id", "start", "end"} each

Shapes: W windows of N documents, D dimensions.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.dataset import RetrievalDataset


class Span(NamedTuple):
    """A part of a text, in characters."""

    start: int
    end: int
    continues: bool  # whether tokens follow


def make_window_span(embedder: Any, passages: Sequence[int]) -> Callable[[str, int], Span]:
    """Returns a function (text, window number) -> where the window is; a text without tokens has one, all of it.
    Of windows of several sizes, it knows the first size."""
    backend = copy.deepcopy(embedder.tokenizer.backend)  # a copy, because the embedder's own truncates texts
    backend.no_truncation()
    num_prompt = len(embedder.tokenize([embedder.prompt("document")])[0])
    room = passages[0] - backend.num_special_tokens_to_add(False) - num_prompt

    def span(text: str, window: int) -> Span:
        spans = backend.encode(text, add_special_tokens=False).offsets
        first = window * min(passages[1], room)
        inside = spans[first : first + room] or [(0, len(text))]
        return Span(inside[0][0], inside[-1][1], first + room < len(spans))

    return span


def matching_windows(
    embedder: Any, dataset: RetrievalDataset, passages: Sequence[int], *, dim: int | None = None
) -> list[dict[str, Any]]:
    """For each judged query, its relevant document with the most similar window, and where that window is in the
    document's text (`dataset.texts`), in characters; of several sizes, among those of the first. Encodes the relevant
    documents."""
    relevant = {query_id: dataset.relevant(query_id) for query_id in dataset.qrels}
    relevant = {query_id: documents for query_id, documents in relevant.items() if documents}
    ids = list(dict.fromkeys(document_id for documents in relevant.values() for document_id in documents))
    texts = [dataset.texts[document_id] for document_id in ids]
    windows_WD, source_W = embedder.encode_passages(texts, passages[:2], dim=dim)
    queries_QD = embedder.encode([dataset.queries[query_id] for query_id in relevant], role="query", dim=dim)
    starts_N = np.searchsorted(source_W, np.arange(len(ids) + 1))
    row_of, found = {document_id: row for row, document_id in enumerate(ids)}, []
    window_span = make_window_span(embedder, passages)
    for (query_id, documents), query_D in zip(relevant.items(), queries_QD, strict=True):
        windows = np.concatenate([np.arange(starts_N[row_of[i]], starts_N[row_of[i] + 1]) for i in documents])
        best = int(windows[np.argmax(windows_WD[windows] @ query_D)])
        row = int(source_W[best])
        span = window_span(texts[row], best - int(starts_N[row]))
        found.append({"query_id": query_id, "document_id": ids[row], "start": span.start, "end": span.end})
    return found
