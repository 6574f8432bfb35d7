"""The window of a long document that answers a query best: what training on passages takes of the document.

    batches = with_best_windows(batches, best_windows(embedder, batches))       # data/collate.py uses them

Shapes: W windows of some documents, D features.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..data.batches import Batches
from ..encoders.embedder import Embedder


def best_windows(embedder: Embedder, batches: Batches, *, at_a_time: int = 4_096) -> dict[str, dict[str, int]]:
    """{query id: {document id: its window with the largest similarity, the first of equals}}, of several windows."""
    collate = batches.collate
    queries_of: dict[str, dict[str, None]] = defaultdict(dict)
    for example in batches.examples:
        for document_id in collate.listed(example):
            queries_of[document_id][example[0]] = None
    query_ids = list(dict.fromkeys(query_id for query_id, _ in batches.examples))
    queries = embedder.encode([collate.dataset.queries[i] for i in query_ids], role="query", dim=embedder.full_dim)
    row = {query_id: i for i, query_id in enumerate(query_ids)}
    document_ids, best = list(queries_of), defaultdict(dict)
    for start in range(0, len(document_ids), at_a_time):
        part = document_ids[start : start + at_a_time]
        texts = [collate.texts[i] for i in part]
        vectors_WD, source_W = embedder.encode_passages(texts, collate.passages, dim=embedder.full_dim)
        edges = np.searchsorted(source_W, np.arange(len(part) + 1)).tolist()
        for document_id, first, last in zip(part, edges, edges[1:], strict=False):
            if last - first > 1:
                asking = list(queries_of[document_id])
                scores = queries[[row[i] for i in asking]] @ vectors_WD[first:last].T
                for query_id, window in zip(asking, scores.argmax(axis=1).tolist(), strict=True):
                    best[query_id][document_id] = window
    return dict(best)


def with_best_windows(batches: Batches, found: Mapping[str, Mapping[str, int]]) -> Batches:
    """The same batches, whose documents contribute the windows in `found`."""
    return Batches(batches.examples, batches.sampler, replace(batches.collate, best_windows=found))
