"""Questions in, ranked documents out: a corpus is encoded once, and searched under any number of settings.

    run = search(embedder, dataset, ["what is a limit order?"], depth=10)
    searcher = Searcher(embedder, dataset, depth=5, passages=(128, 64), index="hnsw")     # encodes and indexes
    run = searcher.search({"q1": "what is a limit order?"})                               # as often as you like

Not here: which settings there are (settings.py), and how good what is found is (evaluate.py).

Shapes: Q queries, N documents or windows, W dimensions of the model, D of them kept, K = min(depth, N) results.
"""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..data.dataset import RetrievalDataset
from .index import Found, from_keys, merge_keys, recall_against, require_depth, require_finite
from .quantization import bytes_per_document
from .run import Run
from .settings import Setting, build, check_settings, resolved, search_of

RECALL_DEPTH = 10
# Documents encoded at a time, and where they become windows: a document may have many.
DOCUMENT_SLICE = 65_536
PASSAGES_SLICE = 4_096


class SupportsEncode(Protocol):
    """What search and evaluation ask of an embedder. Rows are of unit length where similarity is "cosine".

    `full_dim`, `truncate_dim` and `normalize` are heeded where there are such, as an `Embedder` has them.
    """

    similarity: Literal["cosine", "dot"]

    def encode(self, texts: list[str], *, role: str, dim: int | None) -> np.ndarray: ...


class Documents(NamedTuple):
    """A corpus in ascending order of its ids: every search here orders ties by row, so by ascending id."""

    ids: list[str]
    texts: list[str]


class Slice(NamedTuple):
    """Vectors [N, W] of some documents, or of their windows; source_N: which document of the slice a window is of."""

    vectors: np.ndarray
    source: np.ndarray | None


class Answer(NamedTuple):
    """What one setting found, what there is to know of the index, and what it cost."""

    setting: Setting
    found: Found
    facts: dict
    costs: dict[str, float]


def search(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    queries: Mapping[str, str] | Sequence[str],
    *,
    depth: int = 100,
    dim: int | None = None,
    passages: Sequence[int] | None = None,
    aggregate: str = "max",
    precision: str = "float32",
    index: str = "flat",
) -> Run:
    """The first `depth` documents of the dataset for any questions; its own queries and qrels play no part.

    Exact search (float32, flat) holds a slice of the corpus at a time and keeps the best, whatever its size; the others
    hold all its vectors. For questions that come one after another see `Searcher`, which encodes the corpus once.

    Args:
        queries: {query id: text}, or texts, whose ids are then "0", "1", ...
        depth: documents a query; all of them when there are fewer.
        dim: leading dimensions to keep (Matryoshka); None: as many as the embedder gives.
        passages: (size, stride) in tokens: documents are cut into windows as `Embedder.encode_passages` does.
        aggregate: how a document scores by its windows, see `aggregate_windows`.
        precision, index: see settings.py.

    Returns:
        A run whose rows are in the order of `queries`; documents of equal score by ascending id.

    Raises:
        ValueError: no queries, a depth below 1, an unknown precision, index or aggregate (listing them), a setting
            that does not exist, a dim that the model does not have, embeddings that are not finite (naming the text's
            id), or passages of an embedder that cannot cut any.
    """
    query_ids, texts = _named(queries)
    setting = Setting(dim, precision, index)
    options = {"passages": passages, "aggregate": aggregate}
    if not setting.is_exact:
        return Searcher(embedder, dataset, depth=depth, **setting._asdict(), **options).search(queries)
    require_depth(depth)
    check_settings(embedder, [setting], [passages], aggregate)
    queries_QW = encode(embedder, texts, query_ids, role="query")
    documents = in_order_of_ids(dataset)
    (answer,) = answers(embedder, documents, queries_QW, [setting], depth=depth, **options)
    return Run(query_ids, documents.ids, answer.found.rows, answer.found.scores)


class Searcher:
    """A corpus that is encoded and indexed once, for questions that come one after another.

    Memory: all vectors in the dimensions kept, and the index; while it is made, all vectors whole.

    `document_ids`: of the corpus, ascending; `setting`: dim, precision and index.

    Args:
        depth, dim, passages, aggregate, precision, index: see `search`. What an approximate index searches is set on
            documents, for there are no questions yet.

    Raises:
        ValueError: as `search`.
    """

    def __init__(
        self,
        embedder: SupportsEncode,
        dataset: RetrievalDataset,
        *,
        depth: int = 100,
        dim: int | None = None,
        passages: Sequence[int] | None = None,
        aggregate: str = "max",
        precision: str = "float32",
        index: str = "flat",
    ):
        require_depth(depth)
        settings = [Setting(dim, precision, index)]
        check_settings(embedder, settings, [passages], aggregate, num_documents=len(dataset.corpus))
        self.embedder, self.depth = embedder, depth
        documents = in_order_of_ids(dataset)
        self.document_ids = documents.ids
        vectors_NW, source_N = _joined(list(encode_documents(embedder, documents, passages, {})))
        (self.setting,) = resolved(embedder, settings, vectors_NW.shape[1])
        vectors_ND = cut(embedder, vectors_NW, self.setting.dim)
        self._built = build(vectors_ND, source_N, self.setting, aggregate=aggregate, depth=depth)

    def search(self, queries: Mapping[str, str] | Sequence[str]) -> Run:
        """The first `depth` documents for each question: {query id: text}, or texts with the ids "0", "1", ..."""
        query_ids, texts = _named(queries)
        queries_QW = encode(self.embedder, texts, query_ids, role="query")
        found = self._built.search(cut(self.embedder, queries_QW, self.setting.dim), self.depth)
        return Run(query_ids, self.document_ids, found.rows, found.scores)


# Vectors.


def in_order_of_ids(dataset: RetrievalDataset) -> Documents:
    """The documents of a dataset, titles in front of their texts."""
    texts = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))
    ids = sorted(texts)
    return Documents(ids, [texts[document_id] for document_id in ids])


def encode(embedder: SupportsEncode, texts: list[str], ids: Sequence[str], *, role: str) -> np.ndarray:
    """Vectors of texts in all dimensions of the model, [N, W] float32, not copied when they are that already.

    Raises `ValueError` for another number of vectors than texts, and naming the id of one that is not finite.
    """
    embeddings = embedder.encode(texts, role=role, dim=getattr(embedder, "full_dim", None))
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ValueError(f"{len(texts)} texts were encoded as an array of shape {embeddings.shape}")
    require_finite(embeddings, role, ids)
    return np.asarray(embeddings, dtype=np.float32)


def encode_documents(
    embedder: SupportsEncode, documents: Documents, passages: Sequence[int] | None, costs: dict[str, float]
) -> Iterator[Slice]:
    """The vectors of documents slice by slice, in all dimensions; none is held here while the next one is made."""
    at_once = DOCUMENT_SLICE if passages is None else PASSAGES_SLICE
    for start in range(0, len(documents.ids), at_once):
        ids, texts = (values[start : start + at_once] for values in documents)
        with timed(costs, "document_encoding_seconds"):
            if passages is None:
                part = Slice(encode(embedder, texts, ids, role="document"), None)
            else:
                part = _encode_windows(embedder, texts, ids, passages)
        yield part
        del part


def _encode_windows(embedder: SupportsEncode, texts: list[str], ids: Sequence[str], passages: Sequence[int]) -> Slice:
    width = getattr(embedder, "full_dim", None)
    vectors, source = embedder.encode_passages(texts, passages, role="document", dim=width)
    if len(source) != len(vectors) or len(np.unique(source)) != len(texts):
        raise ValueError(f"{len(texts)} documents were cut into {len(vectors)} windows of {len(np.unique(source))}")
    require_finite(vectors, "a window of document", [ids[row] for row in source])
    return Slice(np.asarray(vectors, dtype=np.float32), np.asarray(source))


def cut(embedder: SupportsEncode, vectors_NW: np.ndarray, dim: int) -> np.ndarray:
    """The leading dimensions of vectors, of length one again where the model's vectors are; all of them: as they are.

    To the bit what `Embedder.encode(dim=)` gives on the CPU.
    """
    if dim == vectors_NW.shape[1]:
        return vectors_NW
    vectors_ND = np.ascontiguousarray(vectors_NW[:, :dim])
    if not getattr(embedder, "normalize", embedder.similarity == "cosine"):
        return vectors_ND
    return F.normalize(torch.from_numpy(vectors_ND), dim=1).numpy()


def _joined(kept: list[Slice]) -> tuple[np.ndarray, np.ndarray | None]:
    """The vectors of slices in one array, and the documents of windows, numbered on. Empties the list.

    A slice is dropped once it is copied, so that there is never a second copy of everything.
    """
    if kept[0].source is not None:
        counts = [int(part.source[-1]) + 1 for part in kept]
        starts = np.cumsum([0, *counts[:-1]])
        source_N = np.concatenate([part.source + start for part, start in zip(kept, starts, strict=True)])
    else:
        source_N = None
    if len(kept) == 1:
        return kept.pop().vectors, source_N
    vectors_NW = np.empty((sum(len(part.vectors) for part in kept), kept[0].vectors.shape[1]), dtype=np.float32)
    row = 0
    while kept:
        part = kept.pop(0)
        vectors_NW[row : row + len(part.vectors)] = part.vectors
        row += len(part.vectors)
    return vectors_NW, source_N


# Search.


def answers(
    embedder: SupportsEncode,
    documents: Documents,
    queries_QW: np.ndarray,
    settings: Sequence[Setting],
    *,
    passages: Sequence[int] | None,
    aggregate: str,
    depth: int,
) -> Iterator[Answer]:
    """What each setting finds, in the order of `settings`, in one encoding of the corpus.

    Exact search takes place slice by slice, as documents are encoded, at every dim that is asked for; the others
    are measured against it. The vectors are kept only where there are others.

    Costs: document_encoding_seconds (of the one encoding), build_seconds (codes and index; 0 where there is none),
    search_seconds, queries_per_second (of search alone), bytes_per_document, recall@10_of_exact (the mean share of
    the first 10 documents of exact search that are among the first 10 found; of `depth` when that is less), and over
    passages windows_per_document. Facts: see `build`.
    """
    settings = resolved(embedder, settings, queries_QW.shape[1])
    queries = {setting.dim: cut(embedder, queries_QW, setting.dim) for setting in settings}
    encoding: dict[str, float] = {}
    parts = encode_documents(embedder, documents, passages, encoding)
    kept: list[Slice] | None = None if all(setting.is_exact for setting in settings) else []
    exact, seconds, num_vectors = _exact_slices(embedder, parts, queries, kept, aggregate=aggregate, depth=depth)
    vectors_NW, source_N = (None, None) if kept is None else _joined(kept)
    per_document = num_vectors / len(documents.ids)
    for dim, group in itertools.groupby(settings, key=lambda setting: setting.dim):
        vectors_ND = None if vectors_NW is None else cut(embedder, vectors_NW, dim)
        for setting in group:
            costs = {**encoding, "build_seconds": 0.0}
            if setting.is_exact:
                found, facts, num_bytes = exact[dim], {}, bytes_per_document(dim, "float32")
                costs["search_seconds"] = seconds[dim]
            else:
                with timed(costs, "build_seconds"):
                    built = build(vectors_ND, source_N, setting, aggregate=aggregate, depth=depth, queries=queries[dim])
                with timed(costs, "search_seconds"):
                    found = built.search(queries[dim], depth)
                facts, num_bytes = built.facts, built.bytes_per_vector
                del built
            costs["queries_per_second"] = len(queries_QW) / costs["search_seconds"]
            costs["bytes_per_document"] = num_bytes * per_document
            costs["recall@10_of_exact"] = 1.0 if setting.is_exact else _recall(found, exact[dim])
            if passages is not None:
                costs["windows_per_document"] = per_document
            yield Answer(setting, found, facts, costs)


def _recall(found: Found, exact: Found) -> float:
    return float(recall_against(found.rows[:, :RECALL_DEPTH], exact.rows[:, :RECALL_DEPTH]).mean())


def _exact_slices(
    embedder: SupportsEncode,
    parts: Iterable[Slice],
    queries: Mapping[int, np.ndarray],
    kept: list[Slice] | None,
    *,
    aggregate: str,
    depth: int,
) -> tuple[dict[int, Found], dict[int, float], int]:
    """Exact results at every dim of `queries`, on the embedder's device, the seconds of its search, and the number of
    vectors.

    Each slice is searched and dropped, or put into `kept`; of the results the best are kept: the order of keys is
    total, so the slices change nothing.
    """
    device = getattr(embedder, "device", None)
    keys = {dim: np.empty((len(queries_QD), 0), dtype=np.uint64) for dim, queries_QD in queries.items()}
    seconds: dict[int, float] = {}
    num_documents = num_vectors = 0
    for part in parts:
        for dim, queries_QD in queries.items():
            vectors_ND = cut(embedder, part.vectors, dim)
            with timed(seconds, dim):
                found = search_of(vectors_ND, part.source, aggregate, device=device)(queries_QD, depth)
                keys[dim] = merge_keys(keys[dim], found, num_documents, depth)
        num_vectors += len(part.vectors)
        num_documents += len(part.vectors) if part.source is None else int(part.source[-1]) + 1
        if kept is not None:
            kept.append(part)
        del part, vectors_ND
    return {dim: from_keys(keys_QK) for dim, keys_QK in keys.items()}, seconds, num_vectors


def _named(queries: Mapping[str, str] | Sequence[str]) -> tuple[list[str], list[str]]:
    """Ids and texts."""
    if isinstance(queries, str):
        raise ValueError(f"queries is the text {queries!r}, expected a list of texts or {{query id: text}}")
    if not len(queries):
        raise ValueError("no queries to search for")
    if isinstance(queries, Mapping):
        return list(queries), list(queries.values())
    return [str(place) for place in range(len(queries))], list(queries)


@contextlib.contextmanager
def timed(costs: dict, name: object) -> Iterator[None]:
    """Adds the seconds of a block to costs[name]."""
    start = time.perf_counter()
    yield
    costs[name] = costs.get(name, 0.0) + time.perf_counter() - start
