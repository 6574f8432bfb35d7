"""Fits an adapter on frozen embeddings. No text is embedded, so it takes seconds.

    adapter = fit_adapter(query_embeddings_ND, document_embeddings_MD, dataset.qrels_by_row(), AdapterConfig(seed=1))
    adapter.save("adapter")

Shapes: N queries, M documents or windows; of a step, B queries or pairs, C document vectors, G listed; D features.
"""

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import device as devices
from ..data.dataset import connected_components
from ..encoders.adapter import ROLES, Adapter, Base
from ..encoders.maps import build_map
from ..files import check_writable, replace_files, write_json, write_jsonl
from ..losses.registry import Loss
from ..losses.targets import Targets
from .configs import AdapterConfig, configured_loss
from .corpus_softmax import Documents, Pairs, checked_lengths, first_ranks, full_corpus_softmax
from .optim import build_optimizer, lr_factor
from .run_folder import CONFIG, LOG

Qrels = Mapping[int, Mapping[int, int]]
Answers = Mapping[int, Sequence[int]]  # {query row: the documents that answer it}
Judge = Callable[[Adapter], dict[str, float]]
Compute = Callable[[list[Any]], Tensor]  # examples of a step -> their loss


def fit_adapter(
    query_embeddings_ND: np.ndarray,
    document_embeddings_MD: np.ndarray,
    qrels: Qrels,
    config: AdapterConfig | None = None,
    *,
    source: np.ndarray | None = None,
    start: Adapter | None = None,
    base: Base | None = None,
    normalize: bool = True,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
) -> Adapter:
    """Fits an adapter that moves queries toward their relevant documents, by cosine.

    Each step minimizes the loss of some queries (`config.objective`) + `toward_identity` * `Adapter.departure()`, with
    AdamW. `full_corpus` is the softmax over all training documents, `in_batch` any loss of `LOSSES`, with the unmapped
    vectors as references and grades as `target_scores`. Computes in float64 if the queries are (except on MPS), else
    float32. With `held_out`, questions about held-out documents choose the best step; the start competes too. The
    adapter's `.history` has a record per step and validation, its `.costs` seconds, counts and the best step.

    Args:
        qrels: {query row: {document row: grade}}; above 0 is relevant, 0 a hard negative for `in_batch`.
        source: [M] int64, the document row of each window, as `Embedder.encode_passages` returns it; a document then
            scores as its best window (MaxP). None: each row is a document.
        start: an adapter to continue from, of the same kind, side and sizes; it is not changed.
        base: the model that made the embeddings, recorded in the adapter; `start` must be for the same one.
        normalize: whether the adapter's `transform` returns unit vectors.
        out: folder for the adapter, config.json and train.jsonl; None: nothing is written.

    Raises `ValueError` when an input is invalid, before training, or a loss is not finite."""
    began, config, device = time.perf_counter(), config or AdapterConfig(), devices.find_device(device)
    if out is not None:
        check_writable(out)
    arrays = query_embeddings_ND, document_embeddings_MD, qrels, source
    queries_ND, documents, relevant = _checked(*arrays, at_once=config.documents_at_once, device=device)
    adapter = _start(start, config, queries_ND.shape[1], base=base, normalize=normalize).to(queries_ND)
    held_out = _held_out(relevant, config.held_out, config.seed) if config.held_out else {}
    judge = partial(_metrics, queries_ND, documents, held_out, config.select) if held_out else None
    # Held-out documents are not trained on, nor are their questions, which are ranked against all documents.
    gone = set(chain.from_iterable(held_out.values()))
    trained = {q: {d: grade for d, grade in qrels[q].items() if d not in gone} for q in relevant if q not in held_out}
    kept = np.setdiff1d(documents.source, list(gone))
    with devices.seeded(config.seed, device):
        best_step = _fit(adapter, queries_ND, documents.subset(kept) if gone else documents, trained, judge, config)
    counts = {"queries": len(trained), "documents": len(kept), "held_out_queries": len(held_out)}
    adapter.costs = {"seconds": time.perf_counter() - began, **counts, "best_step": best_step}
    if out is not None:
        with replace_files(out) as new:
            write_jsonl(new / LOG, adapter.history)
            write_json(new / CONFIG, asdict(config))
            adapter.save(new)
    return adapter


def _fit(
    adapter: Adapter, queries_ND: Tensor, documents: Documents, qrels: Qrels, judge: Judge | None, config: AdapterConfig
) -> int:
    """Trains in place and keeps the best weights. Returns the step they are from."""
    if config.objective == "in_batch":
        loss = configured_loss(config)
        if isinstance(loss, nn.Module):
            loss.to(queries_ND).train()
        examples, compute = _in_batch(adapter, queries_ND, documents, qrels, loss, merge=config.merge_documents)
    else:
        loss, (examples, compute) = None, _full_corpus(adapter, queries_ND, documents, qrels, config.temperature)
    size = min(config.batch_size or len(examples), len(examples))
    num_steps = config.epochs * math.ceil(len(examples) / size)
    batches = _batches(examples, size, shuffle=config.shuffle and size < len(examples), seed=config.seed)
    best_value, best_step, best_weights, waited = -math.inf, None, None, 0
    schedule = {"num_steps": num_steps, "warmup": config.warmup}
    optimizer = build_optimizer(adapter, loss, lr=config.lr, weight_decay=config.weight_decay)
    for step in range(num_steps + 1):
        if step > 0:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(config.schedule, step - 1, **schedule)
            value = compute(next(batches))
            if config.toward_identity:
                value = value + config.toward_identity * adapter.departure()
            adapter.history.append({"step": step, **_step(value, optimizer, config.max_grad_norm, step)})
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


def _batches(examples: list[Any], size: int, *, shuffle: bool, seed: int) -> Iterator[list[Any]]:
    """`size` examples at a time, endlessly."""
    generator, order = torch.Generator().manual_seed(seed), range(len(examples))
    while True:
        if shuffle:
            order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(examples), size):
            yield [examples[i] for i in order[first : first + size]]


def _step(value: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float, step: int) -> dict[str, float]:
    optimizer.zero_grad()
    value.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    found = {"loss": value.item(), "grad_norm": grad_norm.item()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"step {step}: the loss is {found['loss']}, gradient norm is {found['grad_norm']}")
    optimizer.step()
    return {"lr": optimizer.param_groups[0]["lr"], **found}


def _full_corpus(
    adapter: Adapter, queries_ND: Tensor, documents: Documents, qrels: Qrels, temperature: float
) -> tuple[list[int], Compute]:
    """The queries, and a function that computes the softmax over all documents for some of them."""
    relevant = _answers(qrels)
    if {*map(len, relevant.values())} == {len(np.unique(documents.source))}:
        warnings.warn("every document answers every question, so there is no training signal", stacklevel=4)

    def compute(rows: list[int]) -> Tensor:
        pairs, mapped_BD = Pairs.of(relevant, rows, documents), adapter(queries_ND[rows], "query")
        return full_corpus_softmax(mapped_BD, documents, pairs, temperature=temperature, document_map=adapter.document)

    return list(relevant), compute


def _in_batch(
    adapter: Adapter, queries_ND: Tensor, documents: Documents, qrels: Qrels, loss: Loss, *, merge: bool
) -> tuple[list[tuple[int, list[int]]], Compute]:
    """Examples (a query; a document that answers it, then hard negatives), and a function that computes their loss."""
    relevant = _answers(qrels)
    negatives = {q: sorted(grades.keys() - relevant[q]) for q, grades in qrels.items()}
    examples = [(q, [document, *negatives[q]]) for q in relevant for document in relevant[q]]
    num_listed = max(len(listed) for _, listed in examples)

    def compute(batch: list[tuple[int, list[int]]]) -> Tensor:
        columns: dict[tuple[int, int], int] = {}  # of (0, document) or, if not merged, of (row, document)
        group_BG = torch.full((len(batch), num_listed), -1)
        scores_BG = torch.zeros(len(batch), num_listed, dtype=queries_ND.dtype)
        for b, (q, listed) in enumerate(batch):
            keys = [(0 if merge else b, document) for document in listed]
            group_BG[b, : len(keys)] = torch.tensor([columns.setdefault(key, len(columns)) for key in keys])
            scores_BG[b, : len(keys)] = torch.tensor([qrels[q][document] for document in listed])
        known = [(b, columns[0, d]) for b, (q, _) in enumerate(batch) for d in relevant[q] if (0, d) in columns]
        places = [(column, place) for (_, d), column in columns.items() for place in documents.windows(d)]
        document_C, place_C = torch.tensor(places).T.contiguous()
        Q_BD, D_CD = queries_ND[[q for q, _ in batch]], documents.vectors(place_C, unit=False)
        targets = Targets(
            group=group_BG,
            known=torch.tensor(known) if merge else None,
            document=document_C if len(places) > len(columns) else None,
            target_scores=scores_BG,
            references=dict.fromkeys(("base", "guide", "teacher"), (Q_BD, D_CD)),
        )
        return loss(adapter(Q_BD, "query"), adapter(D_CD, "document"), targets.to(queries_ND.device))

    return examples, compute


@torch.no_grad()
def _metrics(
    queries_ND: Tensor, documents: Documents, relevant: Answers, select: str, adapter: Adapter, *, at_once: int = 4_096
) -> dict[str, float]:
    """Metrics of an adapter on queries ranked against all documents, `at_once` queries at a time."""
    queries, ranks = list(relevant), []
    for rows in (queries[first : first + at_once] for first in range(0, len(queries), at_once)):
        pairs, mapped_BD = Pairs.of(relevant, rows, documents), adapter(queries_ND[rows], "query")
        ranks.append(first_ranks(mapped_BD, documents, pairs, document_map=adapter.document))
    ranks_N, cutoffs = torch.cat(ranks).cpu().double(), sorted({5, 10, int(select.partition("@")[2])})
    hits = {f"hit_rate@{k}": (ranks_N <= k).double().mean().item() for k in cutoffs}
    return hits | {f"mrr@{k}": (1 / ranks_N).where(ranks_N <= k, 0).mean().item() for k in cutoffs}


def _checked(
    queries_ND: np.ndarray, documents_MD: np.ndarray, qrels: Qrels, source: np.ndarray | None, **options: Any
) -> tuple[Tensor, Documents, dict[int, list[int]]]:
    """Queries, documents, and what answers each query; `options` are those of `Documents`."""
    for what, array in (("query", queries_ND), ("document", documents_MD)):
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{what} embeddings are {list(array.shape)} {array.dtype}, not [rows, features] of floats")
    if (q := queries_ND.shape[1]) != (d := documents_MD.shape[1]):
        raise ValueError(f"queries have {q} features, documents {d}: expected the same number")
    checked_lengths(queries_ND, "query", options["at_once"])
    is_double = queries_ND.dtype == np.float64 and devices.has_float64(options["device"])
    documents = Documents(documents_MD, source, dtype=torch.float64 if is_double else torch.float32, **options)
    asked = ("query", len(queries_ND), qrels), ("document", documents.source[-1] + 1, chain(*qrels.values()))
    for what, number, rows in asked:
        for row in rows:
            if not isinstance(row, (int, np.integer)) or not 0 <= row < number:
                raise ValueError(f"qrels: {what} row is {row!r}, expected 0 to {number - 1:,}")
    if not (relevant := _answers(qrels)):
        raise ValueError(f"no query has a relevant document: none of {len(qrels):,} in the qrels has a grade above 0")
    return documents.like.new_tensor(np.asarray(queries_ND)), documents, relevant


def _answers(qrels: Qrels) -> dict[int, list[int]]:
    """The documents that answer each query; queries without any are left out."""
    relevant = {query: sorted(d for d, grade in grades.items() if grade > 0) for query, grades in qrels.items()}
    return {query: documents for query, documents in relevant.items() if documents}


def _start(start: Adapter | None, config: AdapterConfig, dim: int, *, base: Base | None, normalize: bool) -> Adapter:
    """The configured adapter, starting as the identity or as a copy of `start`."""
    own = {"low_rank": {"rank": config.rank}, "two_layer": {"hidden": config.hidden}}.get(config.kind, {})
    with devices.seeded(config.seed, torch.device("cpu")):
        maps = {side: build_map(config.kind, dim, config.out_dim, bias=config.bias, **own) for side in ROLES}
    if config.side == "shared":
        maps["document"] = maps["query"]
    elif config.side != "both":
        maps = {config.side: maps[config.side]}
    adapter = Adapter(**maps, base=base, normalize=normalize)
    if start is None:
        return adapter
    if base is not None:
        start.check_base(base)
    found, expected = ((x.side, *(part.settings for part in x.children())) for x in (start, adapter))
    if found != expected:
        raise ValueError(f"start is {found}, the configuration asks for {expected}")
    adapter.load_state_dict(start.state_dict())
    return adapter


def _held_out(relevant: Answers, fraction: float, seed: int) -> dict[int, list[int]]:
    """Holds out about `fraction` of the documents that answer queries; returns their queries, with the answers.
    Documents that share queries form a group; groups are drawn in random order, each kept if the total gets closer."""
    component = connected_components((places[0], place) for places in relevant.values() for place in places)
    answering = list(dict.fromkeys(chain.from_iterable(relevant.values())))
    groups, taken, wanted = defaultdict(set), set(), max(1, round(fraction * len(answering)))
    for place in np.random.default_rng(seed).permutation(answering).tolist():
        groups[component[place]].add(place)
    for group in groups.values():
        if 2 * len(taken) + len(group) <= 2 * wanted:
            taken |= group
    taken = taken or min(groups.values(), key=len)
    held_out = {query: list(places) for query, places in relevant.items() if taken.issuperset(places)}
    if len(held_out) == len(relevant):
        raise ValueError(f"held_out is {fraction}, which leaves none of the {len(relevant):,} queries to train on")
    return held_out
