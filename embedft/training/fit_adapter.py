"""Fits an adapter on frozen embeddings. No text is embedded, so it takes seconds.

    adapter = fit_adapter(query_embeddings_ND, document_embeddings_MD, dataset.qrels_by_row(), AdapterConfig(seed=1))
    adapter.save("adapter")

The losses of a step are in adapter_losses.py, the softmax over the corpus in corpus_softmax.py, adapters without
training in closed_forms.py.

Shapes: N queries, M documents (or windows of them), B queries of a slice, D features.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import device as devices
from ..data.linked import connected_components
from ..encoders.adapter import Adapter, Base
from ..encoders.maps import build_map
from ..files import atomic_write, check_writable, replace_files, write_json
from ..losses.registry import build_loss
from .adapter_losses import Epochs, full_corpus_losses, in_batch_losses
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
    """An adapter that moves queries toward the documents that answer them, by cosine; with its best weights.

    Each step minimises the loss of some queries (`config.objective`) + `toward_identity` * `Adapter.departure()`, with
    AdamW. `full_corpus` is the softmax over all training documents, `in_batch` any loss of `LOSSES`, with the unmapped
    vectors as references and grades as `target_scores`. Float64 if the queries are (not on MPS), else float32. The same
    seed on the same machine gives the same bits on the CPU; the caller's random state is left as it was.

    Args:
        qrels: {query row: {document row: grade}}; above 0 is relevant, 0 a hard negative for `in_batch`.
        source: [M] int64, the document row of each window, from 0 and rising, as `Embedder.encode_passages` returns
            it; a document then scores as its best window (MaxP). None: each row is a document.
        validation: (queries, documents, qrels) or (queries, windows, qrels, source) that choose the best step, in place
            of `config.held_out`. The start competes too, so weights worse than it are never kept.
        start: an adapter to continue from, of the same kind, side and sizes; it is not changed.
        base: the model of the embeddings, noted in the adapter; `start` must be of the same.
        normalize: whether the adapter's `transform` returns unit vectors.
        out: folder for the adapter, config.json and train.jsonl; None: nothing is written.

    Returns:
        The adapter; `.history` has a record per step and validation, `.costs` seconds, counts and the best step.

    Raises:
        ValueError: an input is invalid, before training; or a loss is not finite.
    """
    began, config, device = time.perf_counter(), config or AdapterConfig(), torch.device(device)
    if out is not None:
        check_writable(out)
    is_double = query_embeddings_ND.dtype == np.float64 and devices.has_float64(device)
    options = {"at_once": config.documents_at_once, "dtype": torch.float64 if is_double else torch.float32}
    options["device"] = device
    data = _checked(query_embeddings_ND, document_embeddings_MD, qrels, source, **options)
    adapter = _start(start, config, data.queries_ND.shape[1], base=base, normalize=normalize)
    adapter = adapter.to(device, options["dtype"])
    validation = None if validation is None else _checked(*validation, **options)
    train, rows, judge = _split(data, validation, config)
    with devices.seeded(config.seed, device):
        epochs, module = _losses(adapter, train, rows, qrels, config)
    with devices.seeded(config.seed, device):
        best_step = _fit(adapter, epochs, module, judge, config)
    costs = {"queries": len(train.relevant), "documents": train.documents.num_documents}
    costs["held_out_queries"] = len(data.relevant) - len(train.relevant)
    adapter.costs = {"seconds": time.perf_counter() - began, **costs, "best_step": best_step}
    if out is not None:
        _save(adapter, config, Path(out))
    return adapter


def _save(adapter: Adapter, config: AdapterConfig, out: Path) -> None:
    with replace_files(out) as new:
        with atomic_write(new / LOG) as file:
            file.writelines(json.dumps(record) + "\n" for record in adapter.history)
        write_json(new / CONFIG, asdict(config))
        adapter.save(new)


def _split(data: _Data, validation: _Data | None, config: AdapterConfig) -> tuple[_Data, np.ndarray, "_Judge | None"]:
    """What to train on, which rows its documents are, and what chooses the best step.

    Held-out documents leave training with all their questions, and come back for validation: these questions are
    ranked against all documents.
    """
    rows, features = np.arange(data.documents.num_documents), data.queries_ND.shape[1]
    if validation is not None:
        if validation.queries_ND.shape[1] != features:
            raise ValueError(f"validation has {validation.queries_ND.shape[1]} features, expected {features}")
        return data, rows, _Judge(*validation, config.select)
    if not config.held_out:
        return data, rows, None
    held_out = _held_out(data.relevant, config.held_out, config.seed)
    gone = {place for places in held_out.values() for place in places}
    rows = np.setdiff1d(rows, np.fromiter(gone, dtype=np.int64))
    kept = {query: places for query, places in data.relevant.items() if query not in held_out}
    kept = {query: np.searchsorted(rows, places).tolist() for query, places in kept.items()}
    judge = _Judge(data.queries_ND, data.documents, held_out, config.select)
    return _Data(data.queries_ND, data.documents.subset(rows), kept), rows, judge


def _losses(
    adapter: Adapter, train: _Data, rows: np.ndarray, qrels: Qrels, config: AdapterConfig
) -> tuple[Epochs, nn.Module | None]:
    """The losses of every epoch, and the loss with parameters among them."""
    order = {"batch_size": config.batch_size, "shuffle": config.shuffle, "seed": config.seed}
    if config.objective == "full_corpus":
        return full_corpus_losses(adapter, *train, temperature=config.temperature, **order), None
    loss = build_loss(config.loss)
    module = loss.to(train.queries_ND).train() if isinstance(loss, nn.Module) else None
    place_of = {row: place for place, row in enumerate(rows.tolist())}
    graded = {q: {place_of[d]: grade for d, grade in qrels[q].items() if d in place_of} for q in train.relevant}
    merge = config.merge_documents
    return in_batch_losses(adapter, *train[:2], graded, loss, merge_documents=merge, **order), module


def _fit(
    adapter: Adapter, epochs: Epochs, loss: nn.Module | None, judge: "_Judge | None", config: AdapterConfig
) -> int | None:
    """Trains in place and leaves the best weights. Returns the step they are from."""
    num_steps, select = config.epochs * len(epochs), config.select
    factor = lr_factor(config.schedule, num_steps=num_steps, warmup=config.warmup)
    optimizer = build_optimizer(adapter.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    if loss is not None and any(True for _ in loss.parameters()):
        optimizer.add_param_group({"params": list(loss.parameters()), "weight_decay": 0.0})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    validations, best_weights = [], None  # (value, step)
    every_loss = (compute for _ in range(config.epochs) for compute in epochs.epoch())
    for step in range(num_steps + 1):
        if step > 0:
            adapter.history.append({"step": step, **_step(adapter, next(every_loss), optimizer, parameters, config,
                                                          lr=config.lr * factor(step - 1), step=step)})  # fmt: skip
        if judge is not None and (step % config.eval_every == 0 or step == num_steps):
            metrics = judge(adapter)
            adapter.history.append({"step": step, "metrics": metrics})
            if not validations or metrics[select] > max(validations)[0]:
                best_weights = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
            validations.append((metrics[select], -step))
            since_best = len(validations) - 1 - validations.index(max(validations))
            if config.patience is not None and since_best >= config.patience:
                break
    if best_weights is None:
        if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
            raise ValueError(f"step {num_steps}: the weights are not finite, at a learning rate of {config.lr:g}")
        return num_steps
    adapter.load_state_dict(best_weights)
    return -max(validations)[1]


def _step(
    adapter: Adapter,
    compute: Any,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    config: AdapterConfig,
    *,
    lr: float,
    step: int,
) -> dict[str, float]:
    """One step at the learning rate `lr`. Returns its record."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    value = compute()
    if config.toward_identity:
        value = value + config.toward_identity * adapter.departure()
    optimizer.zero_grad()
    value.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    found = {"loss": value.item(), "grad_norm": grad_norm.item()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"step {step}: loss is {found['loss']}, gradient norm is {found['grad_norm']}")
    optimizer.step()
    return {"lr": lr, **found}


class _Judge:
    """Metrics of an adapter on queries ranked against all of their documents, `at_once` queries at a time."""

    def __init__(
        self,
        queries_ND: Tensor,
        documents: Documents,
        relevant: Mapping[int, list[int]],
        select: str,
        *,
        at_once: int = 4_096,
    ):
        self.documents, self.cutoffs = documents, sorted({5, 10, int(select.partition("@")[2])})
        slices = [list(relevant)[first : first + at_once] for first in range(0, len(relevant), at_once)]
        self.slices = [(queries_ND[rows], Pairs.of(relevant, rows, documents)) for rows in slices]

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        with torch.no_grad():
            ranks = [
                first_ranks(adapter(queries_BD, "query"), self.documents, pairs, document_map=adapter.document)
                for queries_BD, pairs in self.slices
            ]
        ranks_N = torch.cat(ranks).cpu().double()
        hits = {f"hit_rate@{k}": (ranks_N <= k).double().mean().item() for k in self.cutoffs}
        return hits | {f"mrr@{k}": (1 / ranks_N).where(ranks_N <= k, 0).mean().item() for k in self.cutoffs}


def _checked(
    query_embeddings_ND: np.ndarray,
    document_embeddings_MD: np.ndarray,
    qrels: Qrels,
    source: np.ndarray | None = None,
    *,
    at_once: int,
    **options: Any,
) -> _Data:
    """The arguments as tensors. Raises `ValueError` for any that is invalid."""
    for what, array in (("query", query_embeddings_ND), ("document", document_embeddings_MD)):
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"{what} embeddings are {list(array.shape)} {array.dtype}, expected [rows, features] of floats"
            )
    widths = query_embeddings_ND.shape[1], document_embeddings_MD.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"queries have {widths[0]} features, documents {widths[1]}: expected the same number")
    source = None if source is None else checked_source(source, len(document_embeddings_MD))
    num_documents = len(document_embeddings_MD) if source is None else int(source[-1]) + 1
    relevant = {}
    for query, grades in qrels.items():
        for row, what, number in (
            (query, "query", len(query_embeddings_ND)),
            *((document, "document", num_documents) for document in grades),
        ):
            if not isinstance(row, (int, np.integer)) or not 0 <= row < number:
                raise ValueError(f"qrels: {what} row is {row!r}, expected 0 to {number - 1:,}")
        answers = sorted(document for document, grade in grades.items() if grade > 0)
        if answers:
            relevant[query] = answers
    if not relevant:
        raise ValueError(f"no query has a relevant document: none of {len(qrels):,} in the qrels has a grade above 0")
    checked_lengths(query_embeddings_ND, "query", at_once)
    queries_ND = torch.tensor(np.asarray(query_embeddings_ND), dtype=options["dtype"], device=options["device"])
    documents = Documents(document_embeddings_MD, at_once=at_once, source=source, **options)
    return _Data(queries_ND, documents, relevant)


def _start(start: Adapter | None, config: AdapterConfig, dim: int, *, base: Base | None, normalize: bool) -> Adapter:
    """An adapter at the identity, as configured, or a copy of `start`."""
    generator = torch.Generator().manual_seed(config.seed)
    own = {"rank": config.rank} if config.kind == "low_rank" else {}
    own = {"hidden": config.hidden} if config.kind == "two_layer" else own
    own |= {"generator": generator} if own else {}
    makes = {
        side: build_map(config.kind, dim, config.out_dim, bias=config.bias, **own) for side in ("query", "document")
    }
    if config.side == "shared":
        makes["document"] = makes["query"]
    elif config.side != "both":
        makes = {config.side: makes[config.side]}
    adapter = Adapter(**makes, base=base, normalize=normalize)
    if start is None:
        return adapter
    if base is not None:
        start.check_base(base)
    described = [
        (one.side, *((part.kind, *part.settings().items()) for part in one.maps())) for one in (start, adapter)
    ]
    if described[0] != described[1]:
        raise ValueError(f"start is {described[0]}, the configuration asks for {described[1]}")
    adapter.load_state_dict(start.state_dict())
    return adapter


def _held_out(relevant: Mapping[int, Sequence[int]], fraction: float, seed: int) -> dict[int, list[int]]:
    """The queries, with what answers them, of about `fraction` of the answering documents.

    Documents linked by queries stay together. They are taken in random order while that brings their number nearer to
    the fraction; if none does, the smallest group is.
    """
    answering = list(dict.fromkeys(place for places in relevant.values() for place in places))
    component = connected_components((places[0], place) for places in relevant.values() for place in places)
    members: dict[int, set[int]] = defaultdict(set)
    for place in answering:
        members[component[place]].add(place)
    wanted, taken, fewest = max(1, round(fraction * len(answering))), set(), set(answering)
    for place in np.random.default_rng(seed).permutation(answering).tolist():
        together = members.pop(component[place], set())
        if 2 * len(taken) + len(together) <= 2 * wanted:
            taken |= together
        if together and len(together) < len(fewest):
            fewest = together
    taken = taken or fewest
    held_out = {query: list(places) for query, places in relevant.items() if taken.issuperset(places)}
    if len(held_out) == len(relevant):
        raise ValueError(
            f"held_out is {fraction}, which leaves no query to train on: {len(relevant):,} queries that all share"
            " documents"
        )
    return held_out
