"""`embedft adapter`: fits an adapter on a model's embeddings; the model itself does not change.

embedft adapter sentence-transformers/all-MiniLM-L6-v2 pairs.csv --out adapter --validation held_out.csv
embedft evaluate sentence-transformers/all-MiniLM-L6-v2 held_out.csv --adapter adapter
"""

import contextlib
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import embedft

from ..config import REQUIRED, option, part
from ..data.dataset import RetrievalDataset
from ..encoders.adapter import CONFIG_FILE
from ..encoders.store import Store
from ..files import REPLACING
from ..retrieval.search import Setting, check_settings
from ..training.fit_adapter import AdapterConfig
from .options import (
    DATASETS,
    Data,
    Encoder,
    Windows,
    check_output,
    load_data,
    load_encoder,
    load_training_data,
    print_costs,
    summary,
)


@dataclass(frozen=True, kw_only=True)
class Options(AdapterConfig, Encoder, Windows, Data):
    data: str = option(REQUIRED, f"training data: {DATASETS}", metavar="DATA", positional=True)
    out: str = option(REQUIRED, "folder for the adapter, its settings and its log", metavar="DIR")
    validation: str | None = option(None, "questions to evaluate on, before and after fitting", metavar="DATA")
    validation_split: str | None = option(None, "split of a BEIR folder [test, or the only one]")
    start: str | None = option(None, "adapter to continue from", metavar="DIR")
    overwrite: bool = option(False, "replace the adapter in DIR")


def run(options: Options) -> None:
    """Fits an adapter; with validation data, compares before and after."""
    out, config = Path(options.out), part(options, AdapterConfig)
    there = sorted(out.glob("[!.]*"))  # a killed command leaves hidden files
    check_output(options.out, there, overwrite=options.overwrite)
    if there and not (out / CONFIG_FILE).is_file() and not (out / REPLACING).is_file():
        raise ValueError(f"{out}: contains files but no adapter ({CONFIG_FILE} is missing), so it is left alone")
    dataset, validation = load_training_data(options.data, options), None
    if options.validation:
        validation = load_data(options.validation, options, split=options.validation_split)
        if shared := validation.shares_with(dataset):
            warnings.warn(shared, stacklevel=1)
    embedder = load_encoder(options)
    if embedder.adapter is not None:
        raise ValueError(f"{options.model}: already has an adapter; use its base model with --start")
    check_settings(embedder, [Setting(passages=options.passages)])  # before encoding: can it cut windows?
    with contextlib.ExitStack() as stack:
        if embedder.store is None and validation is not None:
            embedder.store = Store(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        start = embedft.Adapter.load(options.start) if options.start else None
        adapter = fit(embedder, dataset, config, passages=options.passages, start=start, out=options.out)
        costs, kept = adapter.costs, f"kept the weights of the last step, {adapter.costs['best_step']:,}"
        if num_held_out := costs["held_out_queries"]:
            kept = summary(adapter.history, config.select, start="the start")
            kept += f" on {num_held_out:,} held-out questions"
        print(f"{costs['queries']:,} questions, {costs['documents']:,} documents, {costs['seconds']:.1f} s; {kept}")
        if validation is not None:
            settings = {"dim": options.dim, "passages": options.passages}
            before = embedft.evaluate(embedder, validation, **settings)
            embedder.attach(adapter)
            print(embedft.compare(before, embedft.evaluate(embedder, validation, **settings), metric="mrr@10"))
        if options.store:
            print_costs(embedder)
    print(f"adapter: {out}")


def check_adapter(embedder, dataset: RetrievalDataset, config: AdapterConfig) -> None:
    """Raises the `ValueError` that `fit` would raise, from one step on equal vectors in place of the data's."""
    if embedder.adapter is not None:
        raise ValueError("the model has an adapter already")
    rows = dataset.qrels_by_row()
    few = {row: rows[row] for row in list(rows)[: config.batch_size or 64]}
    vectors = [np.ones((len(part), embedder.full_dim), np.float32) for part in (dataset.queries, dataset.corpus)]
    embedft.fit_adapter(*vectors, few, replace(config, epochs=1, held_out=0.0))


def fit(
    embedder, dataset: RetrievalDataset, config: AdapterConfig, *, passages: list[int] | None = None, **more: Any
) -> "embedft.Adapter":
    """Embeds the data at full width (the adapter runs before --dim truncates vectors) and fits; more: start, out."""
    dim = embedder.space("query").dim or None  # 0: not yet known, for a server
    texts = list(dataset.texts.values())
    if passages is None:
        documents_MD = embedder.encode(texts, role="document", dim=dim)
    else:
        documents_MD, more["source"] = embedder.encode_passages(texts, passages, role="document", dim=dim)
    queries_ND = embedder.encode(list(dataset.queries.values()), role="query", dim=dim)
    graded = {q: dict.fromkeys(dataset.negatives.get(q, ()), 0) | grades for q, grades in dataset.qrels.items()}
    qrels = replace(dataset, qrels=graded).qrels_by_row()
    more["normalize"] = getattr(embedder, "normalize", True)  # vectors from an API are always normalized
    return embedft.fit_adapter(queries_ND, documents_MD, qrels, config, base=embedder.base(), **more)
