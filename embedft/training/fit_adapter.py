"""Fitting an adapter on frozen embeddings, one function: seconds, because no text is embedded.

    adapter = fit_adapter(query_embeddings_ND, document_embeddings_MD, dataset.qrels_by_row(), AdapterConfig(seed=1))
    adapter.save("adapter")

Not here: the softmax over the corpus (corpus_softmax.py), adapters without training (closed_forms.py), and where the
embeddings come from.

Shapes: N queries, M documents (or windows of them), B queries or pairs of a step, C document vectors of a step, D
features.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import device as devices
from ..config import check_types, setting, to_dict
from ..encoders.adapter import SIDES, Adapter, Base
from ..encoders.maps import KINDS, build_map
from ..files import atomic_write, check_writable, write_json
from ..losses.registry import Loss, build_loss
from ..losses.targets import Targets
from .corpus_softmax import Documents, Pairs, checked_lengths, checked_source, first_ranks, full_corpus_softmax
from .optim import SCHEDULES, Schedule, build_optimizer, lr_factor
from .runs import CONFIG, LOG

OBJECTIVES = ("full_corpus", "in_batch")
Qrels = Mapping[int, Mapping[int, int]]


@dataclass(frozen=True)
class AdapterConfig:
    """How to fit an adapter. The defaults are what held-out questions about one annual report chose (Lyft's:
    experiments/repro_adapter_lyft_uber.py).
    """

    kind: Literal["linear", "low_rank", "two_layer"] = setting("linear", f"of map: {', '.join(KINDS)}")
    side: Literal["query", "document", "both", "shared"] = setting("query", f"what is mapped: {', '.join(SIDES)}")
    bias: bool = setting(True, "whether maps have biases")
    rank: int = setting(16, "of a low-rank map")
    hidden: int = setting(256, "features of the middle of a two-layer map")
    out_dim: int | None = setting(None, "features that maps give, for both or shared; null: as many as they take")
    objective: Literal["full_corpus", "in_batch"] = setting("full_corpus", f"one of {', '.join(OBJECTIVES)}")
    temperature: float = setting(0.03, "of the full-corpus softmax")
    loss: dict[str, Any] = setting({"name": "in_batch_negatives"}, "name and options of the loss, for in_batch")
    merge_documents: bool = setting(True, "in_batch: a document once in a batch; false: a column a pair, each other's"
                                    " negatives though they be the same document")  # fmt: skip
    shuffle: bool = setting(True, "a new order every epoch; false: that of the qrels")
    toward_identity: float = setting(10.0, "weight of the maps' squared distance from the identity, a feature")
    lr: float = setting(1e-3, "learning rate at its highest")
    weight_decay: float = setting(0.0, "of matrices; 0: AdamW is Adam")
    schedule: Schedule = setting("constant", f"of the learning rate after warmup: {', '.join(SCHEDULES)}")
    warmup: float = setting(0.0, "steps until the learning rate is at its highest; below 1: share of all steps")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this length")
    epochs: int = setting(16, "passes over the training questions")
    batch_size: int | None = setting(64, "questions of a step (in_batch: pairs); null: all of them")
    held_out: float = setting(0.0, "share of the answering documents that chooses the best step; 0: the last step")
    eval_every: int = setting(10, "steps between validations")
    patience: int | None = setting(None, "validations without a better value, then training stops; null: never")
    select: str = setting("mrr@10", "validation metric, mrr@K or hit_rate@K, by which the best step is kept")
    documents_at_once: int = setting(16_384, "documents, or windows of them, scored at a time")
    seed: int = setting(42, "of the held-out documents, the order of the questions and random weights")

    def __post_init__(self):
        check_types(self)
        for name in (
            "rank",
            "hidden",
            "out_dim",
            "epochs",
            "batch_size",
            "eval_every",
            "patience",
            "documents_at_once",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        for name in ("temperature", "lr", "max_grad_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected above 0")
        for name in ("warmup", "weight_decay", "toward_identity"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected at least 0")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}, expected 0 or more and less than 2**62")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, expected at least 0 and below 1")
        if not re.fullmatch(r"(mrr|hit_rate)@[1-9]\d*", self.select):
            raise ValueError(f"select is {self.select!r}, expected mrr@K or hit_rate@K")
        build_loss(self.loss)


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
    """An adapter that brings queries nearer to the documents that answer them, by cosine; with its best weights.

    A step: the loss of some queries (`config.objective`) + `toward_identity` * `Adapter.departure()`, clip, AdamW.
    `full_corpus` is the softmax over all training documents, `in_batch` any loss of `LOSSES` over the batch's own; it
    finds the untouched vectors as its references, and grades as `target_scores`. Computed in float32, in float64 when
    the queries are. Same seed, same machine, same bits on the CPU; the caller's random state is left as it was.

    With `config.held_out`, that share of the documents that answer a query leaves training with all their questions
    (and what hangs together with them; where that is far more than the share, others are taken), and comes back to
    choose the best step: these questions are ranked against all documents. The start competes too, so nothing worse on
    them is kept.

    With `source` a document of several windows scores as its best one (MaxP), under the adapter as it is at each step.
    Of `full_corpus` the denominator is over windows: all those of documents that answer the query are left out, every
    other one is a negative of its own. `in_batch` gives losses the windows of a document as such
    (`Targets.document`). Ranks, held-out documents and `costs` count documents.

    Args:
        qrels: {query row: {document row: grade}}, above 0 = relevant; 0 = for `in_batch` a hard negative of the query.
        source: [M] int64, the document row of the qrels that each row of the matrix is a window of, from 0 and rising,
            none left out, as `Embedder.encode_passages` gives it; None: each row is a document.
        validation: (queries, documents, qrels) to choose the best step by, in place of held-out documents; of windows
            (queries, windows, qrels, source).
        start: a fitted adapter to go on from, of the kind, side and sizes configured; it is not changed.
        base: the model that the embeddings are of, noted in the adapter; `start` must be of the same.
        normalize: whether the adapter's `transform` gives unit vectors.
        out: folder for the adapter, config.json and train.jsonl; None: nothing is written.

    Returns:
        The adapter; `.history` has a record a step and a validation, `.costs` seconds, steps and the best step.

    Raises:
        ValueError: on any of the inputs, before training; or a loss that is not finite.
    """
    began = time.perf_counter()
    config = config or AdapterConfig()
    if out is not None:
        check_writable(out)
    dtype = torch.float64 if query_embeddings_ND.dtype == np.float64 else torch.float32
    options = {"at_once": config.documents_at_once, "dtype": dtype, "device": device}
    queries_ND, documents, relevant = _checked(query_embeddings_ND, document_embeddings_MD, qrels, source, **options)
    adapter = _start(start, config, queries_ND.shape[1], base=base, normalize=normalize).to(device, dtype)
    held_out, judge, rows = {}, None, np.arange(documents.num_documents)
    if validation is not None:
        theirs = _checked(*validation, **options)
        if theirs[0].shape[1] != adapter.in_features:
            raise ValueError(f"validation has {theirs[0].shape[1]} features, expected {adapter.in_features}")
        judge = _Judge(*theirs, config.select)
    elif config.held_out:
        held_out = _held_out(relevant, config.held_out, config.seed)
        judge = _Judge(queries_ND, documents, held_out, config.select)
        gone = {place for places in held_out.values() for place in places}
        rows = np.setdiff1d(rows, np.fromiter(gone, dtype=np.int64))
        relevant = {q: np.searchsorted(rows, places).tolist() for q, places in relevant.items() if q not in held_out}
        documents = documents.subset(rows)
    generator = torch.Generator().manual_seed(config.seed)
    if config.objective == "full_corpus":
        steps, module = _full_corpus(adapter, queries_ND, documents, relevant, config, generator), None
    else:
        with devices.seeded(config.seed, torch.device(device)):
            loss = build_loss(config.loss)
        module = loss.to(device, dtype).train() if isinstance(loss, nn.Module) else None
        place_of = {row: place for place, row in enumerate(rows.tolist())}
        graded = {q: {place_of[d]: grade for d, grade in qrels[q].items() if d in place_of} for q in relevant}
        steps = _in_batch(adapter, queries_ND, documents, graded, loss, config, generator)
    with devices.seeded(config.seed, torch.device(device)):
        best_step = _fit(adapter, steps, module, judge, config)
    costs = {"queries": len(relevant), "documents": documents.num_documents, "held_out_queries": len(held_out)}
    adapter.costs = {"seconds": time.perf_counter() - began, **costs, "best_step": best_step}
    if out is not None:
        out = Path(out)
        with atomic_write(out / LOG) as file:
            file.writelines(json.dumps(record) + "\n" for record in adapter.history)
        write_json(out / CONFIG, to_dict(config))
        adapter.save(out)
    return adapter


class _Steps:
    """The batches of an epoch, as functions that compute their loss."""

    def __init__(self, num_examples: int, config: AdapterConfig, generator: torch.Generator, make: Callable):
        self.size = min(config.batch_size or num_examples, num_examples)
        self.num_examples, self.make, self.generator = num_examples, make, generator
        self.shuffle = config.shuffle and self.size < num_examples
        self._all = None

    def __len__(self) -> int:
        return -(-self.num_examples // self.size)

    def epoch(self) -> Iterator[Callable[[], Tensor]]:
        if self.size == self.num_examples:
            # Always the same batch: prepared once.
            self._all = self._all or self.make(list(range(self.num_examples)))
            yield self._all
            return
        order = range(self.num_examples)
        if self.shuffle:
            order = torch.randperm(self.num_examples, generator=self.generator).tolist()
        for first in range(0, self.num_examples, self.size):
            yield self.make(list(order[first : first + self.size]))


def _full_corpus(
    adapter: Adapter,
    queries_ND: Tensor,
    documents: Documents,
    relevant: Mapping[int, list[int]],
    config: AdapterConfig,
    generator: torch.Generator,
) -> _Steps:
    query_rows = list(relevant)

    def make(chosen: list[int]) -> Callable[[], Tensor]:
        rows = [query_rows[i] for i in chosen]
        pairs, batch_BD = Pairs.of(relevant, rows, documents), queries_ND[rows]
        options = {"temperature": config.temperature, "document_map": adapter.document}
        return lambda: full_corpus_softmax(adapter(batch_BD, "query"), documents, pairs, **options)

    return _Steps(len(query_rows), config, generator, make)


def _in_batch(
    adapter: Adapter,
    queries_ND: Tensor,
    documents: Documents,
    graded: Qrels,
    loss: Loss,
    config: AdapterConfig,
    generator: torch.Generator,
) -> _Steps:
    """A row a pair of a query and a document that answers it, which lists the query's hard negatives behind it."""
    relevant = {q: sorted(place for place, grade in grades.items() if grade > 0) for q, grades in graded.items()}
    negatives = {q: sorted(grades.keys() - relevant[q]) for q, grades in graded.items()}
    examples = [(q, [place, *negatives[q]]) for q in relevant for place in relevant[q]]
    num_listed, device = max(len(places) for _, places in examples), queries_ND.device

    def make(chosen: list[int]) -> Callable[[], Tensor]:
        rows, lists = zip(*(examples[i] for i in chosen), strict=True)
        columns: dict[tuple[int, int], int] = {}  # of a document (place), or of a row's own (row, place)
        group_BG = torch.full((len(rows), num_listed), -1)
        scores_BG = torch.zeros(len(rows), num_listed, dtype=queries_ND.dtype)
        for b, (q, places) in enumerate(zip(rows, lists, strict=True)):
            keys = [(0 if config.merge_documents else b, place) for place in places]
            group_BG[b, : len(keys)] = torch.tensor([columns.setdefault(key, len(columns)) for key in keys])
            scores_BG[b, : len(keys)] = torch.tensor([graded[q][place] for place in places])
        known = None
        if config.merge_documents:
            known = [(b, columns[0, p]) for b, q in enumerate(rows) for p in relevant[q] if (0, p) in columns]
            known = torch.tensor(known, device=device)
        Q_BD = queries_ND[list(rows)]
        windows = [documents.windows(place) for _, place in columns]
        document_C = torch.tensor([column for column, places in enumerate(windows) for _ in places], device=device)
        D_CD = documents.take(torch.tensor([w for places in windows for w in places], device=device), unit=False)
        targets = Targets(
            document=None if documents.source is None else document_C,
            group=group_BG.to(device),
            known=known,
            target_scores=scores_BG.to(device),
            references=dict.fromkeys(("base", "guide", "teacher"), (Q_BD, D_CD)),
        )
        return lambda: loss(adapter(Q_BD, "query"), adapter(D_CD, "document"), targets)

    return _Steps(len(examples), config, generator, make)


def _fit(
    adapter: Adapter, steps: _Steps, loss: nn.Module | None, judge: "_Judge | None", config: AdapterConfig
) -> int | None:
    """Trains in place, leaves the best weights, gives the step they are of."""
    num_steps = config.epochs * len(steps)
    factor = lr_factor(config.schedule, num_steps=num_steps, warmup=config.warmup)
    optimizer = build_optimizer(adapter.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    if loss is not None and any(True for _ in loss.parameters()):
        optimizer.add_param_group({"params": list(loss.parameters()), "weight_decay": 0.0})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    best_value, best_step, best_weights, waited, step = -math.inf, None, None, 0, 0

    def validate() -> None:
        nonlocal best_value, best_step, best_weights, waited
        metrics = judge(adapter)
        adapter.history.append({"step": step, "metrics": metrics})
        waited += 1
        if metrics[config.select] > best_value:
            best_value, best_step, waited = metrics[config.select], step, 0
            best_weights = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}

    if judge is not None:
        validate()
    while step < num_steps:
        for compute in steps.epoch():
            share = factor(step)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * share
            value = compute()
            if config.toward_identity:
                value = value + config.toward_identity * adapter.departure()
            optimizer.zero_grad()
            value.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            found = {"loss": value.item(), "grad_norm": grad_norm.item()}
            step += 1
            if not all(map(math.isfinite, found.values())):
                raise ValueError(f"step {step}: loss is {found['loss']}, gradient norm is {found['grad_norm']}")
            optimizer.step()
            adapter.history.append({"step": step, "lr": config.lr * share, **found})
            if judge is not None and (step % config.eval_every == 0 or step == num_steps):
                validate()
                if config.patience is not None and waited >= config.patience:
                    num_steps = step
                    break
    if best_weights is None:
        if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
            raise ValueError(f"step {step}: the weights are not finite, at a learning rate of {config.lr:g}")
        return step
    adapter.load_state_dict(best_weights)
    return best_step


class _Judge:
    """Metrics of an adapter on questions ranked against all of their documents."""

    def __init__(self, queries_ND: Tensor, documents: Documents, relevant: Mapping[int, list[int]], select: str):
        self.queries_ND, self.documents = queries_ND[list(relevant)], documents
        self.pairs = Pairs.of(relevant, list(relevant), documents)
        self.cutoffs = sorted({5, 10, int(select.partition("@")[2])})

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        with torch.no_grad():
            Q = adapter(self.queries_ND, "query")
            ranks_B = first_ranks(Q, self.documents, self.pairs, document_map=adapter.document).double()
        hits = {f"hit_rate@{k}": (ranks_B <= k).double().mean().item() for k in self.cutoffs}
        return hits | {f"mrr@{k}": (1 / ranks_B).where(ranks_B <= k, 0).mean().item() for k in self.cutoffs}


def _checked(
    query_embeddings_ND: np.ndarray,
    document_embeddings_MD: np.ndarray,
    qrels: Qrels,
    source: np.ndarray | None = None,
    *,
    at_once: int,
    **options: Any,
) -> tuple[Tensor, Documents, dict[int, list[int]]]:
    """Queries, documents, and {query row: rows of the documents that answer it}. Raises `ValueError` on any of them."""
    for what, array in (("query", query_embeddings_ND), ("document", document_embeddings_MD)):
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"{what} embeddings are {list(array.shape)} {array.dtype}, expected [rows, features] of floats"
            )
    widths = query_embeddings_ND.shape[1], document_embeddings_MD.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"queries have {widths[0]} features, documents {widths[1]}: expected as many")
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
    return queries_ND, Documents(document_embeddings_MD, at_once=at_once, source=source, **options), relevant


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


def _held_out(relevant: Mapping[int, Sequence[int]], share: float, seed: int) -> dict[int, list[int]]:
    """The queries, with what answers them, of about `share` of the answering documents.

    Documents that answer one query stay together, and so on through their other queries. In the order drawn they are
    taken where that brings their number nearer to the share; the fewest where none does.
    """
    asking: dict[int, list[int]] = {}
    for query, places in relevant.items():
        for place in places:
            asking.setdefault(place, []).append(query)
    wanted, seen, taken, fewest = max(1, round(share * len(asking))), set(), set(), set(asking)
    for first in np.random.default_rng(seed).permutation(list(asking)).tolist():
        left, together = [first], set()
        while left:
            place = left.pop()
            if place not in seen:
                seen.add(place)
                together.add(place)
                left += [other for query in asking[place] for other in relevant[query]]
        if 2 * len(taken) + len(together) <= 2 * wanted:
            taken |= together
        if together and len(together) < len(fewest):
            fewest = together
    taken = taken or fewest
    held_out = {query: list(places) for query, places in relevant.items() if taken.issuperset(places)}
    if len(held_out) == len(relevant):
        raise ValueError(
            f"held_out is {share}, which leaves no query to train on: {len(relevant):,} queries that hang together"
        )
    return held_out
