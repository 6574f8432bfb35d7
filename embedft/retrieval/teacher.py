"""Teachers: models, alone or together, that score the documents listed for each query.

    teacher = load_teacher({"bm25": 0.4, "sentence-transformers/all-mpnet-base-v2": 0.6}, passages=(128, 64))
    scores = dict(teacher.score_lists(dataset, {"q1": ["d3", "d7"]}))      # {"q1": {"d3": 0.9, "d7": -0.9}}

A part of a teacher is a bi-encoder (`Vectors`, also behind an API), a cross-encoder (`Pairs`) or BM25 (`Words`), or any
object with their three methods. taught.py makes the lists, keeps the scores, and puts both into a dataset.

Shapes: Q queries, G documents listed for one, W windows (one of each document without passages), D dimensions, N rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ..config import from_dict, option
from ..data.dataset import RetrievalDataset
from ..encoders.adapter import ROLES
from ..encoders.classifier import is_classifier
from ..encoders.dtypes import described_dtype
from ..encoders.fingerprint import fingerprint, precision
from ..encoders.loading import API_PREFIX, find_folder, load_embedder
from ..encoders.openai_api import ApiEmbedder
from ..encoders.schema import CONFIG_FILE, read_fields
from ..encoders.scoring import Scorer, load_scorer
from ..encoders.store import Store
from .bm25 import K1, B, Bm25Index, bm25_run, split_words
from .encoding import Passages, SupportsEncode, encode, encode_documents, join_slices, num_sizes, truncate
from .fusion import fuse, zscores
from .passages import WindowIndex
from .rerank import SupportsScore
from .run import Run
from .search import Setting, check_settings, search

BM25, AT_A_TIME = "bm25", 64  # queries
Scale = Literal["zscore", "raw"]
Listed = Mapping[str, Sequence[str]]  # {query id: document ids}
Scores = dict[str, dict[str, float]]  # {query id: {document id: score}}


class Part(Protocol):
    """One model of a teacher."""

    def scoring(self, dataset: RetrievalDataset, listed: Listed) -> Callable[[Listed], Scores]:
        """A function that scores some of the queries in `listed`, called a few queries at a time."""

    def search(self, dataset: RetrievalDataset, depth: int) -> Run:
        """The first `depth` documents of every query. Raises `ValueError` if the model can only score."""

    def sha256(self) -> str:
        """A hash of everything that its scores depend on besides the texts."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """A bi-encoder: the inner product of a query and a document or, with `passages`, the score of its windows, as in a
    search (search.py). The vectors of all listed documents are in memory."""

    embedder: SupportsEncode
    passages: Passages = None

    def scoring(self, dataset: RetrievalDataset, listed: Listed) -> Callable[[Listed], Scores]:
        """See `Part`."""
        check_settings(self.embedder, [Setting(passages=self.passages)])
        texts = {i: dataset.texts[i] for i in dict.fromkeys(i for ids in listed.values() for i in ids)}
        queries_QD = encode(self.embedder, {i: dataset.queries[i] for i in listed}, "query")
        (setting,) = check_settings(self.embedder, [Setting()], width=queries_QD.shape[1])
        queries_QD = truncate(self.embedder, queries_QD, setting.dim)
        vectors_WD, source_W = join_slices(list(encode_documents(self.embedder, texts, self.passages, None, {})))
        vectors_WD = truncate(self.embedder, vectors_WD, setting.dim)
        source_W = np.arange(len(vectors_WD)) if source_W is None else source_W
        index = WindowIndex(vectors_WD, source_W, num_sizes=num_sizes(self.passages))
        row, query_row = {i: row for row, i in enumerate(texts)}, {i: row for row, i in enumerate(listed)}

        def score(query_id: str, document_ids: Sequence[str]) -> dict[str, float]:
            query_1D = queries_QD[[query_row[query_id]]]
            (scores_G,) = index.scores_of(query_1D, [row[i] for i in document_ids])
            return dict(zip(document_ids, scores_G.tolist(), strict=True))

        return lambda some: {query_id: score(query_id, ids) for query_id, ids in some.items()}

    def search(self, dataset: RetrievalDataset, depth: int) -> Run:
        """See `Part`."""
        return search(self.embedder, dataset, dataset.queries, depth=depth, passages=self.passages)

    def sha256(self) -> str:
        """See `Part`."""
        own = [] if isinstance(self.embedder, ApiEmbedder) else [self.embedder.sha256()]
        if hasattr(self.embedder, "space"):  # of which precision is a part, as it is not of sha256()
            own += [self.embedder.space(role).fingerprint for role in ROLES]
        return fingerprint([], {"model": own, "passages": self.passages and list(self.passages)})


@dataclass(frozen=True, eq=False)
class Pairs:
    """A cross-encoder: its logits."""

    scorer: SupportsScore

    def scoring(self, dataset: RetrievalDataset, listed: Listed) -> Callable[[Listed], Scores]:
        """See `Part`."""

        def score(some: Listed) -> Scores:
            pairs = [(dataset.queries[query_id], dataset.texts[i]) for query_id, ids in some.items() for i in ids]
            found = iter(self.scorer.score(pairs, sigmoid=False, progress=False).tolist())
            return {query_id: {i: next(found) for i in ids} for query_id, ids in some.items()}

        return score

    def search(self, dataset: RetrievalDataset, depth: int) -> Run:
        """Raises `ValueError`."""
        raise ValueError("a cross-encoder cannot rank a corpus: let the student, or another teacher, rank it")

    def sha256(self) -> str:
        """See `Part`."""
        own = [self.scorer.sha256()]
        if isinstance(self.scorer, Scorer):  # precision is no part of sha256
            own += [described_dtype(self.scorer), *precision(self.scorer.device)]
        return fingerprint([], {"model": own})


@dataclass(frozen=True)
class Words:
    """BM25 over words, with the options of `Bm25Index`; 0 for a document without any of the query's terms."""

    ngram: int = option(1, "terms are runs of 1 to N words", least=1)
    k1: float = option(K1, "how much repetition of a term counts", least=0)
    b: float = option(B, "how much length is penalized", least=0, most=1)

    def scoring(self, dataset: RetrievalDataset, listed: Listed) -> Callable[[Listed], Scores]:
        """See `Part`."""
        index = Bm25Index(split_words(list(dataset.texts.values())), **asdict(self))
        row = {i: n for n, i in enumerate(dataset.texts)}

        def score(query_id: str, document_ids: Sequence[str]) -> dict[str, float]:
            scores_N = index.score(split_words([dataset.queries[query_id]])[0])
            return dict(zip(document_ids, scores_N[[row[i] for i in document_ids]].tolist(), strict=True))

        return lambda some: {query_id: score(query_id, ids) for query_id, ids in some.items()}

    def search(self, dataset: RetrievalDataset, depth: int) -> Run:
        """See `Part`."""
        return bm25_run(dataset, depth=depth, **asdict(self))

    def sha256(self) -> str:
        """See `Part`."""
        return fingerprint([], asdict(self), functions=[Bm25Index, split_words])


@dataclass(frozen=True, eq=False)
class Teacher:
    """Scores a query's documents by the weighted mean of its parts' scores.

    `scale`: "zscore" turns each part's scores into z-scores over the query's list first, (score - mean) / standard
    deviation, 0 if all are equal (Montague & Aslam 2001, as in fusion.py); "raw" takes them as they are, which
    `margin_mse` needs: it compares them with the student's."""

    parts: Mapping[str, Part]  # by name
    weights: Mapping[str, float]  # by name, each above 0
    scale: Scale = "zscore"

    def __post_init__(self) -> None:
        if not self.parts or self.parts.keys() != self.weights.keys():
            raise ValueError(f"teacher: weights are for {[*self.weights]}, expected one for each of {[*self.parts]}")
        for name, weight in self.weights.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not 0 < weight < math.inf:
                raise ValueError(f"teacher: the weight of {name} is {weight!r}, expected a number above 0")
        if math.isinf(sum(self.weights.values())):  # each share would be 0, and so would all scores
            raise ValueError(f"teacher: the weights {[*self.weights.values()]} have no finite sum")

    def score_lists(
        self, dataset: RetrievalDataset, listed: Listed, *, first: int = 0
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """Yields each query of `listed` in order, from number `first` on, with {document id: score}; `first` is a
        multiple of AT_A_TIME, so that the same queries are scored together as without it."""
        some = {query_id: list(ids) for query_id, ids in listed.items() if len(ids)}
        scoring = {name: part.scoring(dataset, some) for name, part in self.parts.items() if some}
        for start in range(first, len(listed), AT_A_TIME):
            query_ids = list(listed)[start : start + AT_A_TIME]
            block = {i: some[i] for i in query_ids if i in some}
            found = {name: score(block) for name, score in scoring.items()} if block else {}
            for query_id in query_ids:
                ids = block.get(query_id, [])
                scores = {name: [found[name][query_id][i] for i in ids] for name in self.parts if ids}
                scores_G = sum((self._weighted(name, query_id, scores[name]) for name in scores), np.zeros(len(ids)))
                yield query_id, dict(zip(ids, scores_G.tolist(), strict=True))

    def _weighted(self, name: str, query_id: str, scores: list[float]) -> np.ndarray:
        """What a part adds to the scores of a query's documents, [G]."""
        scores_G = np.array(scores, dtype=np.float64)
        if not np.isfinite(scores_G).all():
            raise ValueError(f"teacher: {name} gives query {query_id!r} a score that is not finite")
        if self.scale == "zscore":
            scores_G = zscores(scores_G[None], np.ones((1, len(scores_G)), dtype=bool))[0]
        return self.weights[name] / sum(self.weights.values()) * scores_G

    def search(self, dataset: RetrievalDataset, depth: int) -> Run:
        """The first `depth` documents of every query: the part's ranking or, of several that can rank, the fusion of
        their first 100, or `depth`, by weighted z-scores."""
        able = [name for name, part in self.parts.items() if not isinstance(part, Pairs)] or list(self.parts)
        if len(able) == 1:
            return self.parts[able[0]].search(dataset, depth)
        runs = [self.parts[name].search(dataset, max(depth, 100)) for name in able]
        return fuse(runs, method="zscore", weights=[self.weights[name] for name in able], depth=depth)

    def sha256(self) -> dict[str, str]:
        """{name: the hash of everything that the part's scores depend on besides the texts}."""
        return {name: part.sha256() for name, part in self.parts.items()}


def load_teacher(
    models: Mapping[str, float] | str,
    *,
    passages: Passages = None,
    scale: Scale = "zscore",
    device: torch.device | str | None = None,
    store: Store | str | Path | None = None,
    api: Mapping[str, Any] | None = None,
    bm25: Mapping[str, Any] | None = None,
) -> Teacher:
    """A Teacher from {model: weight}, or from one model.

    A model is "bm25", a cross-encoder's folder or hub id, or what `load_embedder` takes: folder, hub id, package,
    "openai:MODEL".

    Args:
        passages: windows by which bi-encoders score documents; models behind an API and others take whole documents.
        scale: see `Teacher`.
        device, store: as for `load_embedder`; the store keeps vectors, so that none is computed or paid for twice.
        api: options of `EndpointConfig` for models behind an API, such as price and max_cost.
        bm25: options of `Words`: ngram, k1, b.

    Raises `ValueError` for a model that does not load, a weight that is not above 0, or an option that nothing uses."""
    weights = {models: 1.0} if isinstance(models, str) else dict(models)
    api, words = dict(api or {}), from_dict(Words, dict(bm25 or {}), "teacher: bm25: ")
    if bm25 and BM25 not in weights:
        raise ValueError(f"teacher: bm25 is {dict(bm25)}, but the models are {', '.join(weights)}")
    if api and not any(name.startswith(API_PREFIX) for name in weights):
        raise ValueError(f"teacher: api is {api}, but no model begins with {API_PREFIX}")

    def load(name: str) -> Part:
        if name == BM25:
            return words
        if name.startswith(API_PREFIX):
            return Vectors(load_embedder(name, store=store, **api))
        values = read_fields(find_folder(name) / CONFIG_FILE)
        if is_classifier(values) or "activation_fn" in values.get("sentence_transformers", {}):
            return Pairs(load_scorer(name, device=device))
        return Vectors(load_embedder(name, device=device, store=store), passages)

    parts = {name: load(name) for name in weights}
    if passages is not None and not any(isinstance(part, Vectors) and part.passages for part in parts.values()):
        raise ValueError(f"teacher: passages is {passages}, but none of {', '.join(parts)} scores windows")
    return Teacher(parts, weights, scale)
