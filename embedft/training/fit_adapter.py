"""Fits an adapter on frozen embeddings. No text is embedded, so it takes seconds.

    adapter = fit_adapter(query_embeddings_ND, document_embeddings_MD, dataset.qrels_by_row(), AdapterConfig(seed=1))
    adapter.save("adapter")

Shapes: N queries, M documents (or windows of them), B queries of a slice, D features.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import device as devices
from ..data.linked import connected_components
from ..encoders.adapter import Adapter, Base
from ..encoders.maps import build_map
from ..files import atomic_write, check_writable, replace_files, write_json
from ..losses.registry import Loss, build_loss
from .adapter_losses import Make, every_loss, full_corpus_losses, in_batch_losses
from .corpus_softmax import Documents, Pairs, checked_lengths, checked_source, first_ranks
from .optim import build_optimizer, lr_factor
from .runs import CONFIG, LOG
from .settings import AdapterConfig

Qrels = Mapping[int, Mapping[int, int]]


class _Data(NamedTuple):
    queries_ND: Tensor
    documents: Documents
    relevant: dict[int, list[int]]  # {query row: rows of the documents that answer it}


def fit_adapter(
    query_embeddings_ND: np.ndarray,
    document_embeddings_MD: np.ndarray,
    qrels: Qrels,
    config: AdapterConfig | None = None,
    *,
    source: np.ndarray | None = None,
    validation: tuple[np.ndarray, np.ndarray, Qrels] | tuple[np.ndarray, np.ndarray, Qrels, np.ndarray] | None = None,
    start: Adapter | None = None,
    base: Base | None = None,
    normalize: bool = True,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
) -> Adapter:
    """Fits an adapter that moves queries toward their relevant documents, by cosine; returns the best weights.

    Each step minimises the loss of some queries (`config.objective`) + `toward_identity` * `Adapter.departure()`, with
    AdamW. `full_corpus` is the softmax over all training documents, `in_batch` any loss of `LOSSES`, with the unmapped
    vectors as references and grades as `target_scores`. Float64 if the queries are (not on MPS), else float32. The
    adapter's `.history` has a record per step and validation, its `.costs` seconds, counts and the best step.

    Args:
        qrels: {query row: {document row: grade}}; above 0 is relevant, 0 a hard negative for `in_batch`.
        source: [M] int64, the document row of each window, as `Embedder.encode_passages` returns it; a document then
            scores as its best window (MaxP). None: each row is a document.
        validation: (queries, documents, qrels) or (queries, windows, qrels, source) that choose the best step, in place
            of `config.held_out`. The start competes too, so weights worse than it are never kept.
        start: an adapter to continue from, of the same kind, side and sizes; it is not changed.
        base: the model of the embeddings, noted in the adapter; `start` must be of the same.
        normalize: whether the adapter's `transform` returns unit vectors.
        out: folder for the adapter, config.json and train.jsonl; None: nothing is written.

    Raises:
        ValueError: an input is invalid, before training; or a loss is not finite.
    """
    began, config, device = time.perf_counter(), config or AdapterConfig(), torch.device(device)
    if out is not None:
        check_writable(out)
    is_double = query_embeddings_ND.dtype == np.float64 and devices.has_float64(device)
    dtype = torch.float64 if is_double else torch.float32
    options = {"at_once": config.documents_at_once, "dtype": dtype, "device": device}
    data = _checked(query_embeddings_ND, document_embeddings_MD, qrels, source, **options)
    adapter = _start(start, config, data.queries_ND.shape[1], base=base, normalize=normalize).to(device, dtype)
    validation = None if validation is None else _checked(*validation, **options)
    train, rows, judge = _split(data, validation, config)
    with devices.seeded(config.seed, device):
        make, num_examples, loss = _losses(adapter, train, rows, qrels, config)
    with devices.seeded(config.seed, device):
        best_step = _fit(adapter, make, num_examples, loss, judge, config)
    costs = {"queries": len(train.relevant), "documents": train.documents.num_documents}
    costs["held_out_queries"] = len(data.relevant) - len(train.relevant)
    adapter.costs = {"seconds": time.perf_counter() - began, **costs, "best_step": best_step}
    if out is not None:
        with replace_files(out) as new:
            with atomic_write(new / LOG) as file:
                file.writelines(json.dumps(record) + "\n" for record in adapter.history)
            write_json(new / CONFIG, asdict(config))
            adapter.save(new)
    return adapter


def _split(data: _Data, validation: _Data | None, config: AdapterConfig) -> tuple[_Data, np.ndarray, "_Judge | None"]:
    """What to train on, which rows its documents are, and what chooses the best step.

    Held-out documents leave training with all their questions, which are ranked against all documents.
    """
    rows = np.arange(data.documents.num_documents)
    if validation is not None:
        found, expected = validation.queries_ND.shape[1], data.queries_ND.shape[1]
        if found != expected:
            raise ValueError(f"validation has {found} features, expected {expected}")
        return data, rows, _Judge(*validation, config.select)
    if not config.held_out:
        return data, rows, None
    held_out = _held_out(data.relevant, config.held_out, config.seed)
    rows = np.setdiff1d(rows, [place for places in held_out.values() for place in places])
    kept = {query: places for query, places in data.relevant.items() if query not in held_out}
    kept = {query: np.searchsorted(rows, places).tolist() for query, places in kept.items()}
    judge = _Judge(data.queries_ND, data.documents, held_out, config.select)
    return _Data(data.queries_ND, data.documents.subset(rows), kept), rows, judge


def _losses(
    adapter: Adapter, train: _Data, rows: np.ndarray, qrels: Qrels, config: AdapterConfig
) -> tuple[Make, int, Loss | None]:
    """What makes the loss of some examples, the number of examples, and the configured loss, if it is used."""
    if config.objective == "full_corpus":
        return *full_corpus_losses(adapter, *train, temperature=config.temperature), None
    loss = build_loss(config.loss)
    if isinstance(loss, nn.Module):
        loss.to(train.queries_ND).train()
    place_of = {row: place for place, row in enumerate(rows.tolist())}
    graded = {q: {place_of[d]: grade for d, grade in qrels[q].items() if d in place_of} for q in train.relevant}
    return *in_batch_losses(adapter, *train[:2], graded, loss, merge_documents=config.merge_documents), loss


def _fit(
    adapter: Adapter, make: Make, num_examples: int, loss: Loss | None, judge: "_Judge | None", config: AdapterConfig
) -> int:
    """Trains in place and leaves the best weights. Returns the step they are from."""
    size = min(config.batch_size or num_examples, num_examples)
    num_steps = config.epochs * math.ceil(num_examples / size)
    losses = every_loss(make, num_examples, size, shuffle=config.shuffle, seed=config.seed)
    best_value, best_step, best_weights, waited = -math.inf, None, None, 0
    factor = lr_factor(config.schedule, num_steps=num_steps, warmup=config.warmup)
    optimizer = build_optimizer(adapter, loss, lr=config.lr, weight_decay=config.weight_decay)
    for step in range(num_steps + 1):
        if step > 0:
            lr = config.lr * factor(step - 1)
            adapter.history.append({"step": step, **_step(adapter, next(losses), optimizer, config, lr, step)})
        if judge is None or (step % config.eval_every and step < num_steps):
            continue
        metrics = judge(adapter)
        adapter.history.append({"step": step, "metrics": metrics})
        waited += 1
        if metrics[config.select] > best_value:
            best_value, best_step, waited = metrics[config.select], step, 0
            best_weights = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        if config.patience is not None and waited >= config.patience:
            break
    if best_weights is not None:
        adapter.load_state_dict(best_weights)
        return best_step
    if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
        raise ValueError(f"step {num_steps}: the weights are not finite, at a learning rate of {config.lr:g}")
    return num_steps


def _step(
    adapter: Adapter, compute: Callable[[], Tensor], optimizer: Optimizer, config: AdapterConfig, lr: float, step: int
) -> dict[str, float]:
    """One step at the learning rate `lr`. Returns its record."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    value = compute()
    if config.toward_identity:
        value = value + config.toward_identity * adapter.departure()
    optimizer.zero_grad()
    value.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    found = {"loss": value.item(), "grad_norm": grad_norm.item()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"step {step}: loss is {found['loss']}, gradient norm is {found['grad_norm']}")
    optimizer.step()
    return {"lr": lr, **found}


class _Judge:
    """Metrics of an adapter on queries ranked against all of their documents, `at_once` queries at a time."""

    def __init__(self, queries_ND: Tensor, documents: Documents, relevant: dict, select: str, *, at_once: int = 4_096):
        self.documents, self.cutoffs = documents, sorted({5, 10, int(select.partition("@")[2])})
        slices = [list(relevant)[first : first + at_once] for first in range(0, len(relevant), at_once)]
        self.slices = [(queries_ND[rows], Pairs.of(relevant, rows, documents)) for rows in slices]

    @torch.no_grad()
    def __call__(self, adapter: Adapter) -> dict[str, float]:
        mapped = ((adapter(queries_BD, "query"), pairs) for queries_BD, pairs in self.slices)
        options = {"document_map": adapter.document}
        ranks = [first_ranks(queries_BD, self.documents, pairs, **options) for queries_BD, pairs in mapped]
        ranks_N = torch.cat(ranks).cpu().double()
        hits = {f"hit_rate@{k}": (ranks_N <= k).double().mean().item() for k in self.cutoffs}
        return hits | {f"mrr@{k}": (1 / ranks_N).where(ranks_N <= k, 0).mean().item() for k in self.cutoffs}


def _checked(
    queries_ND: np.ndarray, documents_MD: np.ndarray, qrels: Qrels, source: np.ndarray | None = None, **options: Any
) -> _Data:
    """The arguments as tensors; `options` are those of `Documents`. Raises `ValueError` for any that is invalid."""
    for what, array in (("query", queries_ND), ("document", documents_MD)):
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.floating):
            found = f"{list(array.shape)} {array.dtype}"
            raise ValueError(f"{what} embeddings are {found}, expected [rows, features] of floats")
    widths = queries_ND.shape[1], documents_MD.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"queries have {widths[0]} features, documents {widths[1]}: expected the same number")
    source = None if source is None else checked_source(source, len(documents_MD))
    checked_lengths(queries_ND, "query", options["at_once"])
    documents = Documents(documents_MD, source=source, **options)
    relevant = {}
    for query, grades in qrels.items():
        _check_row("query", query, len(queries_ND))
        for document in grades:
            _check_row("document", document, documents.num_documents)
        if answers := sorted(document for document, grade in grades.items() if grade > 0):
            relevant[query] = answers
    if not relevant:
        raise ValueError(f"no query has a relevant document: none of {len(qrels):,} in the qrels has a grade above 0")
    queries_ND = torch.tensor(np.asarray(queries_ND), dtype=options["dtype"], device=options["device"])
    return _Data(queries_ND, documents, relevant)


def _check_row(what: str, row: Any, number: int) -> None:
    if not isinstance(row, (int, np.integer)) or not 0 <= row < number:
        raise ValueError(f"qrels: {what} row is {row!r}, expected 0 to {number - 1:,}")


def _start(start: Adapter | None, config: AdapterConfig, dim: int, *, base: Base | None, normalize: bool) -> Adapter:
    """An adapter at the identity, as configured, or a copy of `start`."""
    options, own = {"bias": config.bias}, {"low_rank": "rank", "two_layer": "hidden"}.get(config.kind)
    if own is not None:
        options |= {own: getattr(config, own), "generator": torch.Generator().manual_seed(config.seed)}
    maps = {side: build_map(config.kind, dim, config.out_dim, **options) for side in ("query", "document")}
    if config.side == "shared":
        maps["document"] = maps["query"]
    elif config.side != "both":
        maps = {config.side: maps[config.side]}
    adapter = Adapter(**maps, base=base, normalize=normalize)
    if start is None:
        return adapter
    if base is not None:
        start.check_base(base)
    found, expected = ((x.side, *((m.kind, *m.settings().items()) for m in x.maps())) for x in (start, adapter))
    if found != expected:
        raise ValueError(f"start is {found}, the configuration asks for {expected}")
    adapter.load_state_dict(start.state_dict())
    return adapter


def _held_out(relevant: Mapping[int, Sequence[int]], fraction: float, seed: int) -> dict[int, list[int]]:
    """The queries, with what answers them, of about `fraction` of the answering documents.

    Documents linked by queries stay together, in random order; a group is taken if that brings the number nearer.
    """
    answering = list(dict.fromkeys(place for places in relevant.values() for place in places))
    component = connected_components((places[0], place) for places in relevant.values() for place in places)
    groups, taken, wanted = defaultdict(set), set(), max(1, round(fraction * len(answering)))
    for place in np.random.default_rng(seed).permutation(answering).tolist():
        groups[component[place]].add(place)
    for group in groups.values():
        if 2 * len(taken) + len(group) <= 2 * wanted:
            taken |= group
    taken = taken or min(groups.values(), key=len)
    held_out = {query: list(places) for query, places in relevant.items() if taken.issuperset(places)}
    if len(held_out) == len(relevant):
        found = f"{len(relevant):,} queries that all share documents"
        raise ValueError(f"held_out is {fraction}, which leaves no query to train on: {found}")
    return held_out
