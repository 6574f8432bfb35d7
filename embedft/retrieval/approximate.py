"""Indices that find most of the nearest neighbours sooner than exact search: FAISS's HNSW, IVF, IVF with PQ, any other.

    index = build_index(np.load("documents.npy", mmap_mode="r"), "hnsw", queries=sample_of_query_embeddings)
    scores, rows = index.search(query_embeddings, depth=10)
    index.save("index"); index = load_index("index", dim=384, metric="dot")

What of the documents is searched is set on a sample, so that a wanted recall is reached; the recall seen is kept with
the index. Not here: exact search (index.py), adding to an index that is built, and what a row of it is called: rows are
numbers, `ids` a list that is stored beside them.

Shapes: Q queries, N documents, D dimensions, K = min(depth, N) results.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import read_json
from ..progress import progress_bar
from .index import (
    QUERY_BLOCK,
    Found,
    checked_embeddings,
    first_keys,
    from_keys,
    recall_against,
    require_depth,
    search_exact,
    slices_of,
    to_keys,
)
from .index_files import finish, opened, write_hashed

Metric = Literal["dot", "cosine"]
METRICS = ("dot", "cosine")
PRESETS = ("flat", "hnsw", "ivf", "ivfpq")
KIND = "faiss"

# Links of a node in HNSW, and candidates kept while a node is linked.
HNSW_LINKS, HNSW_CONSTRUCTION = 32, 200
# Documents a list of IVF is trained on: FAISS warns below 39 and uses no more than 256.
TRAINED_PER_LIST, LEAST_PER_LIST = 64, 39
# Documents that anything with product quantisation is trained on at most, and at least (as many as it has centroids).
TRAINED_PQ, LEAST_PQ = 65_536, 256
TUNING_QUERIES, TUNING_DEPTH = 1000, 10
LEAST_RISE = 0.002


class Index:
    """A FAISS index with what is needed to use it. From `build_index` and `load_index`.

    Attributes:
        preset: as asked for; `factory`: FAISS's description of it.
        metric: "dot" or "cosine"; with "cosine" documents and queries are brought to unit length here.
        dim: D.
        ids: the names of the N rows, or None.
        recall: seen at `effort`, see `build_index`; None when nothing was measured.
    """

    def __init__(
        self,
        faiss_index: Any,
        *,
        preset: str,
        factory: str,
        metric: Metric,
        ids: list[str] | None,
        recall: float | None,
    ):
        self.preset, self.factory, self.metric, self.ids, self.recall = preset, factory, metric, ids, recall
        self.dim: int = faiss_index.d
        self._index = faiss_index

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def effort(self) -> int | None:
        """How much is searched: the lists probed (nprobe, IVF) or candidates kept (efSearch, HNSW); None: has no such.

        May be set, to at least 1.
        """
        owner, name = _knob(self._index)
        return None if owner is None else getattr(owner, name)

    @effort.setter
    def effort(self, value: int) -> None:
        owner, name = _knob(self._index)
        if owner is None:
            raise ValueError(f"an index {self.factory!r} has no effort to be set")
        if value < 1:
            raise ValueError(f"effort ({name}) must be at least 1, not {value}")
        setattr(owner, name, value)

    @property
    def bytes_per_document(self) -> float:
        """The size of the index, as FAISS writes it, over N."""
        return _write(self._index, lambda block: None) / len(self)

    def search(self, queries_QD: np.ndarray, depth: int) -> Found:
        """The first `depth` documents found for each query, ordered by (score descending, row ascending).

        With preset "flat" these are those of `FlatIndex`. Otherwise some may be missed; and where fewer than K are
        found, as when the lists probed hold fewer, the last are -inf and -1.

        Returns:
            scores [Q, K] float32 and rows [Q, K] int64.

        Raises:
            ValueError: on a depth below 1, a wrong width, NaN or inf.
        """
        require_depth(depth)
        queries_QD = _prepared(checked_embeddings(queries_QD, self.dim), self.metric)
        keys_QK = np.empty((len(queries_QD), min(depth, len(self))), dtype=np.uint64)
        with progress_bar(len(queries_QD), "searching", unit="query") as bar:
            for start in range(0, len(queries_QD), QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                keys_QK[block] = self._keys(queries_QD[block], keys_QK.shape[1])
                bar.update(len(queries_QD[block]))
        return from_keys(keys_QK)

    def _keys(self, queries_QD: np.ndarray, depth: int) -> np.ndarray:
        if self.factory == "Flat":
            return first_keys(self._index.search, queries_QD, depth, len(self))
        scores_QK, rows_QK = self._index.search(queries_QD, depth)
        keys_QK = to_keys(np.where(rows_QK < 0, np.float32(-np.inf), scores_QK), rows_QK)
        keys_QK.sort(axis=1)
        return keys_QK

    def save(self, folder: str | Path) -> None:
        """Writes the index into a folder, atomically: see index_files.py."""
        import faiss

        folder = Path(folder)
        files = {"faiss": write_hashed(folder, "index", ".faiss", lambda file: _write(self._index, file.write))}
        if self.ids is not None:
            ids = json.dumps(self.ids).encode()
            files["ids"] = write_hashed(folder, "ids", ".json", lambda file: file.write(ids))
        description = {
            "kind": KIND,
            "preset": self.preset,
            "factory": self.factory,
            "metric": self.metric,
            "dim": self.dim,
            "num_documents": len(self),
            "effort": self.effort,
            "recall": self.recall,
            "faiss_version": faiss.__version__,
            "files": files,
        }
        finish(folder, description)


def build_index(
    embeddings_ND: np.ndarray,
    preset: str = "flat",
    *,
    metric: Metric = "dot",
    ids: Sequence[str] | None = None,
    queries: np.ndarray | None = None,
    target_recall: float = 0.95,
    effort: int | None = None,
    seed: int = 0,
) -> Index:
    """Trains an index on a sample, adds the documents in slices, and sets how much of it is searched.

    Memory beside the index: the sample, or a slice of 65,536 documents.

    | preset | FAISS's index | bytes a document, about |
    |--------|---------------|-------------------------|
    | flat   | exact | 4 D |
    | hnsw   | HNSW32, efConstruction 200 | 4 D + 270 |
    | ivf    | IVF, vectors as they are | 4 D + 8, and 4 D for each list |
    | ivfpq  | IVF, residuals in at least 8 features a byte | D / 8 + 8, and the same |

    IVF has 4 sqrt(N) lists, fewer when that leaves less than 39 documents to train each on (64 are taken); FAISS's
    guidelines say 4 to 16 sqrt(N) below a million. IVF and HNSW search as many lists (nprobe) or candidates (efSearch)
    as recall@10 on the tuning queries needs: doubled until its mean, less two standard errors, reaches
    `target_recall`, so that other queries of the kind reach it too, then halved in until no fewer will do. What cannot
    reach it (PQ loses too much) stops at the effort whose doubling adds less than 0.002.

    Given the seed the result is the same on the same machine, FAISS version and number of threads, save that HNSW links
    documents in several threads at once: with more than one thread no two graphs are quite alike.

    Args:
        embeddings_ND: an array or a memory map, of any float type.
        preset: one of the table, or any string for FAISS's `index_factory`.
        metric: "dot": inner product; "cosine": the same, of vectors brought to unit length. HNSW and IVF under "dot"
            do well when lengths are alike.
        ids: N names of the rows, kept and saved with the index.
        queries: [Q, D] to tune on, of the kind that will be asked. At most 1,000 of them are used. None: documents,
            without themselves among the results; questions lie further from documents than documents do, so the recall
            of questions may be lower.
        effort: nprobe or efSearch, without tuning.
        seed: draws the samples and starts k-means.

    Raises:
        ValueError: on no documents, a wrong shape, NaN or inf, an unknown preset (listing them), a string of which
            FAISS makes no index or one that does not search by inner product, ids of another number, or fewer documents
            than the index can be trained on.

    Source: HNSW: Malkov and Yashunin 2018; IVF and PQ: Jegou et al. 2011; the numbers: FAISS's wiki, "Guidelines to
    choose an index".
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if not 0 < target_recall <= 1:
        raise ValueError(f"target recall is {target_recall}, expected above 0 and at most 1")
    if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
        raise ValueError(f"embeddings of shape {embeddings_ND.shape}, expected [N, D] with documents to index")
    num_documents, dim = embeddings_ND.shape
    if ids is not None and len(ids) != num_documents:
        raise ValueError(f"{len(ids):,} ids for {num_documents:,} documents")
    factory, index = _empty(preset, num_documents, dim)
    rng = np.random.default_rng(seed)
    with _refusals(preset, dim):
        _train(index, embeddings_ND, preset, metric, rng, seed)
        with progress_bar(num_documents, "indexing", unit="document") as bar:
            for _, slice_ND in slices_of(embeddings_ND, dim):
                index.add(_prepared(slice_ND, metric))
                bar.update(len(slice_ND))
        built = Index(
            index, preset=preset, factory=factory, metric=metric, ids=None if ids is None else list(ids), recall=None
        )
        if effort is not None:
            built.effort = effort
        elif built.effort is not None:
            built.recall = _tune(built, embeddings_ND, queries, target_recall, rng)
    return built


def check_index(preset: str, dim: int, *, num_documents: int | None = None) -> None:
    """Raises the `ValueError` that `build_index` would, for a preset that is unknown or not for vectors of `dim`.

    With `num_documents` also where these are too few to train on.
    """
    index = _empty(preset, num_documents or 1, dim)[1]
    if num_documents is not None and not index.is_trained:
        _trained_on(index, preset, num_documents)


def load_index(folder: str | Path, *, dim: int | None = None, metric: Metric | None = None) -> Index:
    """An index that was saved.

    Args:
        dim, metric: what is expected of it; None: anything.

    Raises:
        ValueError: there is none, it has another dim or metric, or its files are missing, cut short or damaged.
    """
    import faiss

    description, paths = opened(folder, kind=KIND)
    for name, expected in (("dim", dim), ("metric", metric)):
        if expected is not None and description[name] != expected:
            raise ValueError(f"{folder}: an index of {name} {description[name]!r}, expected {expected!r}")
    try:
        index = faiss.read_index(str(paths["faiss"]))
    except RuntimeError as error:
        version = description["faiss_version"]
        raise ValueError(
            f"{paths['faiss']}: FAISS {faiss.__version__} cannot read it ({error}); written by {version}"
        ) from None
    ids = read_json(paths["ids"]) if "ids" in paths else None
    names = ("preset", "factory", "metric", "recall")
    return Index(index, ids=ids, **{name: description[name] for name in names})


def unit_rows(embeddings_ND: np.ndarray) -> np.ndarray:
    """x / ||x|| of each row; a row of zeros stays."""
    lengths_N1 = np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    return embeddings_ND / np.where(lengths_N1 == 0, 1, lengths_N1)


def _empty(preset: str, num_documents: int, dim: int) -> tuple[str, Any]:
    """FAISS's description of a preset, and the index, nothing in it."""
    import faiss

    factory = _factory(preset, num_documents, dim)
    with _refusals(preset, dim):
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:  # some do not heed it, and their smallest score is the best
            raise RuntimeError("it does not search by inner product")
    return factory, index


@contextlib.contextmanager
def _refusals(preset: str, dim: int) -> Iterator[None]:
    """What FAISS raises about an index that it cannot make, train or fill, as a `ValueError`."""
    try:
        yield
    except RuntimeError as error:
        # Without the C++ function and line that it is from.
        reason = re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])
        known = ", ".join(PRESETS)
        raise ValueError(
            f"index {preset!r} at {dim} dimensions: expected one of {known}, or a string that FAISS's index_factory"
            f" takes ({reason})"
        ) from None


def _factory(preset: str, num_documents: int, dim: int) -> str:
    num_lists = max(1, min(round(4 * math.sqrt(num_documents)), num_documents // LEAST_PER_LIST))
    # Product quantisation cuts a vector into equal parts.
    num_parts = max(parts for parts in range(1, max(dim // 8, 1) + 1) if dim % parts == 0)
    presets = {
        "flat": "Flat",
        "hnsw": f"HNSW{HNSW_LINKS},Flat",
        "ivf": f"IVF{num_lists},Flat",
        # np: without polysemous training, which takes most of the time and serves a search that is not done here.
        "ivfpq": f"IVF{num_lists},PQ{num_parts}x8np",
    }
    return presets.get(preset, preset)


def _train(
    index: Any, embeddings_ND: np.ndarray, preset: str, metric: Metric, rng: np.random.Generator, seed: int
) -> None:
    """Trains on a sample where the index needs it, and sets what FAISS's factory leaves open."""
    owner, name = _knob(index)
    if name == "efSearch":
        owner.efConstruction = HNSW_CONSTRUCTION
    if index.is_trained:
        return
    if name == "nprobe":
        owner.cp.seed = seed
    num_documents, most = len(embeddings_ND), _trained_on(index, preset, len(embeddings_ND))
    rows = np.sort(rng.choice(num_documents, size=min(most, num_documents), replace=False))
    sample = checked_embeddings(embeddings_ND[rows], None)
    index.train(_prepared(sample, metric))


def _trained_on(index: Any, preset: str, num_documents: int) -> int:
    """How many documents at most an index is trained on. Raises `ValueError` where there are too few."""
    import faiss

    owner, name = _knob(index)
    least, most = LEAST_PQ, TRAINED_PQ
    if name == "nprobe":
        quantised = not isinstance(faiss.downcast_index(owner), faiss.IndexIVFFlat)
        least = max(owner.nlist, LEAST_PQ if quantised else 1)
        most = max(TRAINED_PER_LIST * owner.nlist, TRAINED_PQ if quantised else 1)
    if num_documents < least:
        raise ValueError(f"index {preset!r} is trained on at least {least:,} documents, found {num_documents:,}")
    return most


def _tune(
    index: Index, embeddings_ND: np.ndarray, queries: np.ndarray | None, target: float, rng: np.random.Generator
) -> float:
    """Sets the least effort that reaches the target; gives the recall@10 seen with it."""
    pool = embeddings_ND if queries is None else queries
    if len(pool) == 0:
        raise ValueError("no queries to tune on")
    chosen_Q = np.sort(rng.choice(len(pool), size=min(TUNING_QUERIES, len(pool)), replace=False))
    queries_QD = _prepared(checked_embeddings(pool[chosen_Q], index.dim), index.metric)
    depth = min(TUNING_DEPTH + (queries is None), len(index))
    documents = (_prepared(slice_ND, index.metric) for _, slice_ND in slices_of(embeddings_ND, index.dim))
    exact_rows_QK = search_exact(queries_QD, documents, depth).rows
    if queries is None and len(index) > 1:
        exact_rows_QK = np.where(exact_rows_QK == chosen_Q[:, None], -1, exact_rows_QK)

    def measured(effort: int) -> tuple[float, bool]:
        index.effort = effort
        recall_Q = recall_against(index.search(queries_QD, depth).rows, exact_rows_QK)
        return float(recall_Q.mean()), recall_Q.mean() - 2 * recall_Q.std() / math.sqrt(len(recall_Q)) >= target

    owner, name = _knob(index._index)
    # HNSW keeps at least as many candidates as results are asked for.
    effort, largest = (1, owner.nlist) if name == "nprobe" else (depth, len(index))
    failed = effort - 1
    recall, reached = measured(effort)
    while not reached and effort < largest:
        twice = min(2 * effort, largest)
        more, reached = measured(twice)
        if not reached and more - recall < LEAST_RISE:
            break
        failed, effort, recall = effort, twice, more
    while reached and effort - failed > max(1, effort // 8):
        middle = (failed + effort) // 2
        less, enough = measured(middle)
        if enough:
            effort, recall = middle, less
        else:
            failed = middle
    index.effort = effort
    return recall


def _knob(index: Any) -> tuple[Any, str | None]:
    """The part of a FAISS index that says how much is searched, and the name of the number there; (None, None)."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVF):
        return index, "nprobe"
    if isinstance(index, faiss.IndexHNSW):
        return index.hnsw, "efSearch"
    if isinstance(index, faiss.IndexRefine):
        return _knob(index.base_index)
    if isinstance(index, faiss.IndexPreTransform):
        return _knob(index.index)
    return None, None


def _prepared(embeddings_ND: np.ndarray, metric: Metric) -> np.ndarray:
    return unit_rows(embeddings_ND) if metric == "cosine" else embeddings_ND


def _write(index: Any, write: Callable[[bytes], object]) -> int:
    """Hands what FAISS makes of an index to `write` in blocks; gives its size in bytes."""
    import faiss

    num_bytes = 0

    def counted(block: bytes) -> None:
        nonlocal num_bytes
        num_bytes += len(block)
        write(block)

    faiss.write_index(index, faiss.PyCallbackIOWriter(counted))
    return num_bytes
