"""Queries in, ranked documents out: one setting, or a grid of settings over one encoding of the corpus.

    run = search(embedder, dataset, ["what is a limit order?"], depth=10)
    searcher = Searcher(embedder, dataset, depth=5, passages=(128, 64), index="hnsw")     # encodes and indexes once
    run = searcher.search({"q1": "what is a limit order?"})                               # as often as you like

A setting has four parts:

- dim: how many leading dimensions to keep; None: as many as the embedder returns.
- precision: how vectors are stored: float32, int8 or binary (quantization.py).
- index: "flat" (every document); hnsw, ivf, ivfpq or a FAISS factory string, with parameters as in
  "hnsw,efSearch=128" (approximate.py); or "adaptive-64": 64 dimensions find 4 x `depth` documents, all rank them.
- passages: (size, stride) in tokens: documents are cut into windows and scored by the best one; several such pairs end
  to end, as (128, 64, 64, 32): the mean over sizes of the best window's score; None: whole documents.

int8 and binary work with flat, hnsw and ivf, which search the decoded vectors. With passages, an index other than flat
only finds candidate windows; then all windows of their documents are scored. Adaptive search has no passages.

Shapes: Q queries, N documents or windows, W dimensions of the model, D of them kept.
"""

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.dataset import RetrievalDataset
from ..encoders.token_ids import window_sizes
from .approximate import FaissIndex, check_index, split_name
from .encoding import (
    Slice,
    SupportsEncode,
    encode,
    encode_documents,
    join_slices,
    num_sizes,
    sorted_corpus,
    timed,
    truncate,
)
from .index import FlatIndex, Found, Index, first_of, recall_against, require_depth, search_exact
from .passages import WindowIndex
from .quantization import PRECISIONS, AdaptiveIndex, QuantizedIndex, bytes_per_vector
from .run import Run

HOLD_VECTORS = ("hnsw", "ivf")  # FAISS indices that keep vectors unchanged, so they can search decoded codes


class Setting(NamedTuple):
    """How to search a corpus, see above."""

    dim: int | None = None
    precision: str = "float32"
    index: str = "flat"
    passages: Sequence[int] | None = None

    @property
    def is_exact(self) -> bool:
        return self.precision == "float32" and self.index == "flat"

    @property
    def short_dim(self) -> int:
        """The 64 of "adaptive-64"; 0 for other indices."""
        found = re.fullmatch(r"adaptive-([1-9]\d*)", self.index)
        return int(found[1]) if found else 0


def search(
    embedder: SupportsEncode, dataset: RetrievalDataset, queries: Mapping[str, str] | Sequence[str], **options: Any
) -> Run:
    """The first `depth` documents of the dataset for any queries; equal scores are ordered by ascending id.
    `queries` are {query id: text}, or texts with the ids "0", "1", ...; `options` are those of `Searcher`. Exact search
    (float32, flat) holds one slice of the corpus at a time; other settings hold all vectors."""
    setting = Setting(**{name: options.pop(name) for name in Setting._fields if name in options})
    queries = _named(queries)
    if not setting.is_exact:
        return Searcher(embedder, dataset, **setting._asdict(), **options).search(queries)
    return next(search_grid(embedder, dataset, queries, [setting], **options))[0]


class Searcher:
    """A corpus encoded and indexed once, to be searched as often as needed.

    Args:
        exclude_identical_ids: a query of the dataset that is also a document, under the same id, does not find itself
            (ArguAna, Quora) unless it is judged relevant; a warning says so.
        slice_documents: documents encoded at a time; None: 65,536, or 4,096 with passages.
        setting: dim, precision, index and passages, see above.

    Raises `ValueError` for a setting that cannot work, or embeddings that are not finite, naming the text."""

    def __init__(
        self,
        embedder: SupportsEncode,
        dataset: RetrievalDataset,
        *,
        depth: int = 100,
        exclude_identical_ids: bool = True,
        slice_documents: int | None = None,
        **setting: Any,
    ):
        require_depth(depth)
        settings = check_settings(embedder, [Setting(**setting)], num_documents=len(dataset.corpus))
        self.embedder, self.dataset, documents = embedder, dataset, sorted_corpus(dataset)
        self.depth, self.exclude_identical_ids, self.document_ids = depth, exclude_identical_ids, list(documents)
        parts = encode_documents(embedder, documents, settings[0].passages, slice_documents, {})
        vectors_NW, source_N = join_slices(list(parts))
        (self.setting,) = check_settings(embedder, settings, width=vectors_NW.shape[1])
        self.index, *_ = build(truncate(embedder, vectors_NW, self.setting.dim), source_N, self.setting)

    def search(self, queries: Mapping[str, str] | Sequence[str]) -> Run:
        queries = _named(queries)
        queries_QW = encode(self.embedder, queries, "query")
        exclude = self.exclude_identical_ids and shares_ids(self.dataset, queries)
        found = self.index.search(truncate(self.embedder, queries_QW, self.setting.dim), self.depth + exclude)
        run = Run(list(queries), self.document_ids, found.rows, found.scores)
        return run.without_identical_ids(self.dataset.qrels, depth=self.depth) if exclude else run


def shares_ids(dataset: RetrievalDataset, queries: Mapping[str, str]) -> bool:
    """Whether any of the dataset's own queries is a document of it too, under the same id; warns if so."""
    shared = [i for i, text in queries.items() if i in dataset.corpus and dataset.queries.get(i) == text]
    if shared:
        found = f"{len(shared):,} queries have the id of a document ({shared[0]!r}, ...), not ranked for them unless"
        warnings.warn(f"{found} relevant; exclude_identical_ids=False (--keep-identical-ids) keeps it", stacklevel=3)
    return bool(shared)


def search_grid(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    queries: Mapping[str, str],
    settings: Sequence[Setting],
    *,
    depth: int = 100,
    exclude_identical_ids: bool = True,
    slice_documents: int | None = None,
) -> Iterator[tuple[Run, dict, dict[str, float]]]:
    """The run of each setting in order, what a report says about the setting, and its costs.
    Consecutive settings with the same passages share one encoding; vectors are kept only if a search is not exact."""
    require_depth(depth)
    check_settings(embedder, settings, num_documents=len(dataset.corpus))
    encoding: dict[str, float] = {}
    with timed(encoding, "query_encoding_seconds"):
        queries_QW = encode(embedder, queries, "query")
    settings = check_settings(embedder, settings, width=queries_QW.shape[1])
    documents = sorted_corpus(dataset)
    exclude = exclude_identical_ids and shares_ids(dataset, queries)

    def rank(found: Found) -> Run:
        run = Run(list(queries), list(documents), found.rows, found.scores)
        return run.without_identical_ids(dataset.qrels, depth=depth) if exclude else run

    for passages, same in itertools.groupby(settings, key=lambda setting: setting.passages):
        group, shared, documents_at, vectors_NW = list(same), dict(encoding), {}, None
        queries_of = {setting.dim: truncate(embedder, queries_QW, setting.dim) for setting in group}
        parts = encode_documents(embedder, documents, passages, slice_documents, shared)
        kept = [] if all(setting.is_exact for setting in group) else list(parts)
        found, seconds, num_vectors = search_slices(embedder, kept or parts, queries_of, depth + exclude)
        exact = {dim: rank(found_at_dim) for dim, found_at_dim in found.items()}
        vectors_NW, source_N = join_slices(kept) if kept else (None, None)
        if passages is not None:
            shared["windows_per_document"] = num_vectors / len(documents)
        for setting in group:
            dim, facts, costs = setting.dim, {}, {**shared, "build_seconds": 0.0, "recall@10_of_exact": 1.0}
            if setting.is_exact:
                run, num_bytes, costs["search_seconds"] = exact[dim], bytes_per_vector(dim, "float32"), seconds[dim]
            else:
                if dim not in documents_at:
                    documents_at.clear()  # one dim at a time
                    documents_at[dim] = truncate(embedder, vectors_NW, dim)
                with timed(costs, "build_seconds"):
                    index, num_bytes, facts = build(documents_at[dim], source_N, setting)
                with timed(costs, "search_seconds"):
                    found = index.search(queries_of[dim], depth + exclude)
                run = rank(found)
                recall_Q = recall_against(run.indices[:, :10], exact[dim].indices[:, :10])
                costs["recall@10_of_exact"] = float(recall_Q.mean())
                del index
            costs["queries_per_second"] = len(queries_QW) / costs["search_seconds"]
            costs["bytes_per_document"] = num_bytes * (num_vectors / len(documents))
            yield run, {**setting._asdict(), "passages": passages and list(passages), **facts}, costs


def search_slices(
    embedder: SupportsEncode, parts: Iterable[Slice], queries: Mapping[int, np.ndarray], depth: int
) -> tuple[dict[int, Found], dict[int, float], int]:
    """Exact search with queries {dim: [Q, dim]} on the embedder's device: results and search seconds by dim, and the
    number of vectors. Each slice is searched and dropped; slicing changes no result."""
    found: dict[int, Found] = {}
    seconds, num_vectors = {}, 0
    for part in parts:
        for dim, queries_QD in queries.items():
            vectors_ND = truncate(embedder, part.vectors, dim)
            with timed(seconds, dim):
                if part.source is None:
                    scores, rows = search_exact(queries_QD, vectors_ND, depth, device=getattr(embedder, "device", None))
                else:
                    index = WindowIndex(vectors_ND, part.source, num_sizes=part.num_sizes)
                    scores, rows = index.search(queries_QD, depth)
                    del index
                rows += part.first
                if dim in found:
                    scores, rows = np.hstack([found[dim].scores, scores]), np.hstack([found[dim].rows, rows])
                found[dim] = first_of(scores, rows, depth)
        num_vectors += len(part.vectors)
        del part, vectors_ND  # before the next slice is encoded
    return found, seconds, num_vectors


def _named(queries: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(queries, str):
        raise ValueError(f"queries is the text {queries!r}, expected a list of texts or {{query id: text}}")
    if not len(queries):
        raise ValueError("no queries to search for")
    return dict(queries) if isinstance(queries, Mapping) else {str(place): text for place, text in enumerate(queries)}


def check_settings(
    embedder: SupportsEncode, settings: Sequence[Setting], *, width: int | None = None, num_documents: int | None = None
) -> list[Setting]:
    """The settings with `dim` filled in, if the model's `width` is given or the embedder has a `full_dim`.
    Raises `ValueError` for settings that cannot work and, given `num_documents`, for too few to train an index on."""
    width, found, unsupported = width or getattr(embedder, "full_dim", None), [], []
    for setting in settings:
        dim, precision, index, passages = setting
        if passages is not None and not hasattr(embedder, "encode_passages"):
            raise ValueError(f"passages is {tuple(passages)}: {type(embedder).__name__} cannot cut texts into windows")
        if passages is not None:
            pairs = window_sizes(passages)
            for pair in pairs if hasattr(embedder, "pack") else ():
                embedder.pack([""], role="document", passages=pair)  # raises for windows that cannot be cut
            passages = tuple(itertools.chain(*pairs))  # JSON has no NumPy numbers
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        if index.startswith("adaptive") and not setting.short_dim:
            raise ValueError(f"index is {index!r}, expected adaptive-DIM, e.g. adaptive-64")
        if precision != "float32" and split_name(index)[0] not in ("flat", *HOLD_VECTORS):
            unsupported.append(f"{precision} with {index} (it works with flat, {', '.join(HOLD_VECTORS)})")
        if setting.short_dim and passages is not None:
            unsupported.append(f"{index} with passages")
        if width is not None:
            dim = (getattr(embedder, "truncate_dim", None) or width) if dim is None else dim
            if not 1 <= dim <= width:
                raise ValueError(f"dim is {dim}, expected 1 to {width}")
            if setting.short_dim >= dim:
                unsupported.append(f"{index} at {dim} dimensions")
        found.append(setting._replace(dim=dim, passages=passages))
    if unsupported:
        raise ValueError(f"unsupported search: {'; '.join(dict.fromkeys(unsupported))}")
    for setting in found:
        if width is not None and setting.index != "flat" and not setting.short_dim:
            check_index(setting.index, setting.dim, num_documents=None if setting.passages else num_documents)
    return found


def build(vectors_ND: np.ndarray, source_N: np.ndarray | None, setting: Setting) -> tuple[Index, float, dict]:
    """An index over vectors (of documents, or of windows with `source_N`), bytes per vector, and facts for a report."""
    index, facts, is_flat, windows = None, {}, setting.index == "flat", source_N is not None
    num_bytes = bytes_per_vector(setting.dim, setting.precision)
    if setting.precision != "float32":
        codes = QuantizedIndex(vectors_ND, setting.precision)
        if is_flat and not (windows and setting.precision == "int8"):  # int8 windows are all scored: no candidates
            index = codes
        if not is_flat or windows:
            vectors_ND = codes.decode()
    if setting.short_dim:
        index = AdaptiveIndex(vectors_ND, setting.short_dim)
        num_bytes += bytes_per_vector(setting.short_dim, "float32")  # short and full vectors together
    elif not is_flat:
        index = FaissIndex(vectors_ND, setting.index)
        facts = {"factory": index.factory, "parameters": index.parameters}
        if split_name(setting.index)[0] in HOLD_VECTORS:  # counts codes instead of float32 vectors
            num_bytes += index.bytes_per_vector - bytes_per_vector(setting.dim, "float32")
        else:  # all windows of the documents found are scored by their vectors
            num_bytes = index.bytes_per_vector + (num_bytes if windows else 0)
    if windows:
        index = WindowIndex(vectors_ND, source_N, num_sizes=num_sizes(setting.passages), candidates=index)
    return FlatIndex(vectors_ND) if index is None else index, num_bytes, facts
