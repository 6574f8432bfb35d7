"""`embedft adapter`: fits an adapter on the embeddings of a model, which stays as it is.

embedft adapter sentence-transformers/all-MiniLM-L6-v2 pairs.csv --out adapter --validation held_out.csv
embedft evaluate sentence-transformers/all-MiniLM-L6-v2 held_out.csv --adapter adapter
"""

import argparse
import contextlib
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

from .. import config as configs
from ..data.dataset import RetrievalDataset
from ..encoders.adapter import CONFIG_FILE, Adapter
from ..encoders.store import Store
from ..retrieval.evaluate import evaluate
from ..retrieval.report import compare
from ..retrieval.settings import Setting, check_settings
from ..training.fit_adapter import AdapterConfig, fit_adapter
from .models import (
    _add_encoding,
    _add_loading,
    _add_model,
    _add_store,
    _load_data,
    _load_encoding,
    _load_training,
    _print_store,
)
from .retrieval import _add_passages


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("data", metavar="DATA", help="to fit on: QA JSON, BEIR folder, JSONL or CSV pairs")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets the adapter, its settings and its log")
    parser.add_argument("--validation", metavar="DATA", help="questions to measure on, before and after; not chosen by")
    parser.add_argument("--start", metavar="DIR", help="an adapter to go on from")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is already in DIR")
    parser.add_argument("--split", metavar="NAME", help="of a BEIR folder DATA [train, or the only one]")
    parser.add_argument("--validation-split", metavar="NAME", help="of a BEIR folder [test, or the only one]")
    _add_passages(parser)
    _add_encoding(parser)
    _add_store(parser)
    _add_loading(parser)
    configs.add_options(parser, AdapterConfig)


def _adapter(options: argparse.Namespace) -> None:
    config, out = configs.config_from_options(AdapterConfig, options), Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise ValueError(f"{out}: not empty; choose another folder, or overwrite the adapter that is there")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ValueError(f"{out}: holds files, but no adapter ({CONFIG_FILE} is missing), so it is left alone")
    dataset = _load_training(options.data, options)
    validation = None
    if options.validation:
        validation = _load_data(options.validation, options, merge=True, split=options.validation_split)
        if shared := validation.shares_with(dataset):
            warnings.warn(shared, stacklevel=1)
    start = None if options.start is None else Adapter.load(options.start)
    embedder = _load_encoding(options)
    if embedder.adapter is not None:
        raise ValueError(f"{options.model}: has an adapter already; fit on the model that it is of, with --start")
    passages = options.passages
    check_settings(embedder, [Setting(passages=passages)])  # whether it cuts passages, before anything is embedded
    with contextlib.ExitStack() as stack:
        if embedder.store is None and validation is not None:
            # Before and after are of the same vectors: each text is embedded once.
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            embedder.store = Store(stack.enter_context(folder))
        # Whole vectors, which an adapter stands behind, also of a model that cuts them (0: an API has yet to say).
        dim = embedder.space("query").dim or None
        if passages is None:
            documents_MD, source = embedder.encode(dataset.document_texts(), role="document", dim=dim), None
        else:
            texts = dataset.document_texts()
            documents_MD, source = embedder.encode_passages(texts, passages, role="document", dim=dim)
        queries_ND = embedder.encode(list(dataset.queries.values()), role="query", dim=dim)
        adapter = fit_adapter(
            queries_ND,
            documents_MD,
            _with_negatives(dataset).qrels_by_row(),
            config,
            source=source,
            start=start,
            base=embedder.base(),
            normalize=getattr(embedder, "normalize", True),  # an API's vectors always have length one
            out=out,
        )
        print(_summary(adapter, config))
        if validation is not None:
            before = evaluate(embedder, validation, dim=options.dim, passages=passages)
            embedder.attach(adapter)
            after = evaluate(embedder, validation, dim=options.dim, passages=passages)
            print(compare(before, after, metric="mrr@10"))
        if options.store:
            _print_store(embedder)
    print(f"adapter: {out}")


def _with_negatives(dataset: RetrievalDataset) -> RetrievalDataset:
    """The data with its hard negatives as documents of grade 0."""
    listed = {query_id: dict.fromkeys(dataset.negatives.get(query_id, ()), 0) for query_id in dataset.qrels}
    return replace(dataset, qrels={query_id: listed[query_id] | grades for query_id, grades in dataset.qrels.items()})


def _summary(adapter: Adapter, config: AdapterConfig) -> str:
    """How long it took and which step's weights it has."""
    costs = adapter.costs
    lines = f"{costs['queries']:,} questions, {costs['documents']:,} documents, {costs['seconds']:.1f} s"
    values = {record["step"]: record["metrics"][config.select] for record in adapter.history if "metrics" in record}
    if not values:
        return f"{lines}; weights of the last step, {costs['best_step']:,}"
    best = costs["best_step"]
    where = f"step {best:,} of {max(values):,}" if best else "no step: nothing that was fitted beat the start"
    on = f"{costs['held_out_queries']:,} questions held out"
    return f"{lines}; weights of {where} ({config.select} {values[0]:.4f} -> {values[best]:.4f} on {on})"


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {"adapter": (_add_adapter, _adapter, "fit a small map on a model's embeddings, which stay as they are")}
