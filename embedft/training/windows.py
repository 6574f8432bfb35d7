"""Which window of a long document answers a question: what training on passages takes of it.

A document may have hundreds of windows, and a step has room for a few. Here the one that scores best for each query of
the document is found, by the model as it then is: before training, and with `refresh_windows` (recipe.py) before every
epoch, so no step waits for a corpus to be encoded. Not here: how a batch takes them (data/batches.py).

    batches = Batches(dataset, embedder.pack, batch_size=32, seed=0, passages=(128, 64), windows_per_document=4)
    batches.best_windows = best_windows(embedder, batches)

Shapes: W windows of some documents, D features.
"""

from collections import defaultdict

import numpy as np

from ..data.batches import Batches
from ..encoders.embedder import Embedder

# Documents encoded at a time.
DOCUMENT_SLICE = 4_096


def best_windows(embedder: Embedder, batches: Batches) -> dict[str, dict[str, int]]:
    """{query id: {document id: number of its window with the largest similarity}}, of all documents listed for a query.

    Of equal windows the first. A document of one window is left out: there is nothing to choose. Memory: the queries'
    vectors and those of one slice of documents.
    """
    queries_of: dict[str, dict[str, None]] = defaultdict(dict)
    for example in batches.examples:
        for document_id in batches.listed(example):
            queries_of[document_id][example[0]] = None
    query_ids = list(dict.fromkeys(query_id for query_id, _ in batches.examples))
    queries = embedder.encode([batches.dataset.queries[i] for i in query_ids], role="query", dim=embedder.full_dim)
    row = {query_id: i for i, query_id in enumerate(query_ids)}
    document_ids, best = list(queries_of), defaultdict(dict)
    for start in range(0, len(document_ids), DOCUMENT_SLICE):
        part = document_ids[start : start + DOCUMENT_SLICE]
        vectors_WD, source_W = embedder.encode_passages(
            [batches.texts[i] for i in part], batches.passages, dim=embedder.full_dim
        )
        edges = np.searchsorted(source_W, np.arange(len(part) + 1)).tolist()
        for document_id, first, last in zip(part, edges, edges[1:], strict=False):
            if last - first > 1:
                asking = list(queries_of[document_id])
                scores = queries[[row[i] for i in asking]] @ vectors_WD[first:last].T
                for query_id, window in zip(asking, scores.argmax(axis=1).tolist(), strict=True):
                    best[query_id][document_id] = window
    return dict(best)
