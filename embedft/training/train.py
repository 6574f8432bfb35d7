"""The training loop.

    state = train(embedder, batches, in_batch_negatives, TrainConfig(epochs=2, lr=2e-5), out=Path("runs/first"))

`train` is the loop, `training_step` one step, `backward` the forward and backward pass of one batch; nothing else
changes the weights. Whatever they need is passed in; recipe/ builds it from settings.

Shapes: B queries, M documents, D dimensions.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import device as devices
from ..data.collate import Batch
from ..encoders.depth import at_depth, drawn_depth
from ..encoders.embedder import Embedder
from ..encoders.packing import Packed, take
from ..losses.components import collect
from ..losses.registry import Loss
from ..losses.targets import Targets
from ..progress import progress_bar
from . import distributed
from .averaging import KeptWeights
from .cached import cached_backward, no_vectors
from .checkpoint import TrainState, contents, copy_weights, load_checkpoint, save_checkpoint
from .configs import TrainConfig
from .distributed import LocalBatch
from .epochs import BatchSource, Epochs, Refresh
from .memory import backing_off, check_memory, recomputing
from .optim import MakeOptimizer, lr_factor, make_optimizer
from .precision import NonFiniteError, autocast, make_scaler
from .references import Reference, targets_with
from .run_folder import CHECKPOINTS, Log, open_log
from .sharding import FILLER, Sharding, clip_gradients, is_sharded

# Batches between calls of `device.release_memory`. For 60 steps of Lyft's recipe in bfloat16: every 4, 3.03 GiB and
# 143 s of CPU time; every 16, 3.31 and 116; never, 3.52 and 106 (a Xeon with AMX, torch 2.13.0, 2026-12-01).
RELEASE_EVERY = 16

Constant = Callable[[Batch], Tensor]
Evaluate = Callable[[Embedder], Mapping[str, float]]
OnStep = Callable[[TrainState, dict[str, Any]], Any]


def train(
    embedder: Embedder,
    batches: BatchSource,
    loss: Loss,
    config: TrainConfig,
    *,
    out: Path | None = None,
    optimizer: MakeOptimizer | None = None,
    references: Mapping[str, Reference] | None = None,
    constant: Mapping[str, Constant] | None = None,
    evaluate: Evaluate | None = None,
    refresh: Refresh | None = None,
    refresh_every: int = 1,
    on_step: OnStep | None = None,
) -> TrainState:
    """Trains `embedder` in place and leaves it with its best weights (without `evaluate`: the last ones; averaging.py).

    The base weights compete too. The same seed gives the same bits, on a GPU with `config.deterministic`. The caller's
    random state is unchanged afterwards. With several ranks, each calls this with the same arguments (distributed.py).

    Args:
        loss: (Q [B, D], D [M, D], targets) -> scalar. A module is trained too, without weight decay.
        out: run folder for train.jsonl and checkpoints; training resumes from a checkpoint in it. None: no files.
        optimizer: builds the optimizer from `optim.parameter_groups`; config.schedule scales its learning rates.
        references: {name: batch -> (Q [B, E], D [M, E])}, frozen vectors for `targets.references`.
        constant: {"query" | "document": batch -> its vectors}: texts of this side are not embedded (LoRA of one side).
        evaluate: validation, {metric: value, higher is better}; called on rank 0, the others help it to encode.
        refresh: rebuilds the batches, as many as before, at the start of every `refresh_every`-th epoch but the first.
            Called on every rank; a resumed run calls it again with the weights that the last call used.
        on_step: called on every rank after each step with the state and its record for train.jsonl; if it returns
            "stop" on rank 0, training ends. Its own state is not saved in checkpoints.

    Raises:
        NonFiniteError: a loss or gradient is not finite, in float16 at any scale; no step was taken with it.
        ValueError: `config.select` is not a metric; a reference or refresh returns the wrong number of vectors or
            batches; ranks differ; a checkpoint is damaged or belongs to another run."""
    state = _initial_state(embedder, loss, config, optimizer, refresh)
    epochs = Epochs(batches, config, refresh, refresh_every)
    eval_every, save_every = (n or epochs.steps_per_epoch for n in (config.eval_every, config.checkpoint_every))
    with _session(state, epochs, config, out) as (log, resumed, bar, kept):
        if evaluate is not None and not resumed:
            validate(state, kept, evaluate, config, log)
        for epoch, parts, extra in epochs.steps(state):
            record = training_step(state, parts, config, epochs.num_steps, references or {}, constant or {})
            kept.update()
            record = {"step": state.step, "epoch": epoch, **record, **extra, **epochs.waiting(record["seconds"])}
            log(record)
            if on_step is not None:
                answer = on_step(state, record)
                state.stopped = distributed.from_first(lambda answer=answer: answer == "stop")
            last = state.stopped or state.step == epochs.num_steps
            if evaluate is not None and (last or state.step % eval_every == 0):
                validate(state, kept, evaluate, config, log)
            if out is not None and (last or state.step % save_every == 0):
                _save(out / CHECKPOINTS, state)
            bar.set_postfix(loss=f"{record['loss']:.4f}", waiting=f"{record['wait_share']:.1%}", refresh=False)
            bar.update()
    state.unshard()
    kept.finish()
    return state


def training_step(
    state: TrainState,
    parts: list[Batch],
    config: TrainConfig,
    num_steps: int,
    references: Mapping[str, Reference],
    constant: Mapping[str, Constant],
) -> dict[str, Any]:
    """One of `num_steps` steps, on the mean loss of the batches `parts`. Returns its record for train.jsonl."""
    start, embedder, optimizer = time.perf_counter(), state.embedder, state.optimizer
    factor = lr_factor(config.schedule, state.step, num_steps=num_steps, warmup=config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    embedder.train()
    scale = state.scaler.get_scale()

    def gradients(at_once: int | None) -> tuple[Tensor, Counter, list]:
        return _gradients(state, parts, config, scale, at_once, references, constant)

    is_auto = config.mini_batch_tokens == "auto"
    found = backing_off(gradients, state, parts) if is_auto else gradients(config.mini_batch_tokens)
    loss, components, depths = found
    grad_norm, is_skipped = _clip_and_step(state, parts, loss, config, scale)
    state.step += 1
    record = {
        "loss": loss.item(),
        "lr": float(optimizer.param_groups[0]["lr"]),
        "grad_norm": None if is_skipped else grad_norm.item(),
        "queries": sum(len(batch.query_ids) for batch in parts),
        "tokens": sum(map(_num_tokens, parts)),
        "seconds": time.perf_counter() - start,
        "peak_bytes": devices.peak_memory_bytes(embedder.device),
    }
    if is_auto:
        record["mini_batch_tokens"] = state.mini_batch_tokens
    if state.scaler.is_enabled():
        record |= {"scale": scale, "skipped": is_skipped}
    if config.depths is not None:
        record["depths"] = depths
    if components:
        record["components"] = {name: float(value) for name, value in components.items()}
    if parts[0].sources is not None:
        record["sources"] = dict(Counter(source for batch in parts for source in batch.sources))
    return record


def _gradients(
    state: TrainState,
    parts: list[Batch],
    config: TrainConfig,
    scale: float,
    at_once: int | None,
    references: Mapping[str, Reference],
    constant: Mapping[str, Constant],
) -> tuple[Tensor, Counter, list]:
    """The gradients of `scale` times the mean loss of `parts`, over all ranks, in mini-batches of `at_once` tokens.
    Returns the loss, its components, and the depth of each batch."""
    embedder, loss, components, depths = state.embedder, 0.0, Counter(), []
    of_loss = [p for p in state.loss.parameters() if p.requires_grad] if isinstance(state.loss, nn.Module) else []
    whole = [p for p in embedder.parameters() if not is_sharded(p)]  # the others' gradients are summed as they come
    with distributed.summing_gradients(whole, of_first=of_loss) as begin_sums:
        for place, batch in enumerate(parts):
            targets = targets_with(references, batch).to(embedder.device, devices.transfer)
            given = [vectors(batch) for vectors in constant.values()]
            given = dict(zip(constant, devices.transfer(given, embedder.device), strict=True))
            local, seeds = LocalBatch.of(*_texts(batch, given)), (config.seed, state.step, place)
            depths.append(drawn_depth(config.depths, config.seed, state.step * config.accumulate + place))
            options = {"at_once": at_once} | ({"before_last": begin_sums} if place == len(parts) - 1 else {})
            with at_depth(embedder.encoder, depths[-1]), recomputing(embedder, config.checkpoint_activations):
                weight = scale / len(parts)
                value, found = backward(embedder, local, targets, state.loss, config, weight, seeds, given, **options)
            loss = loss + value / scale  # exact: a power of two, 1 unless gradients are scaled
            for name, component in found.items():
                components[name] = components[name] + component / len(parts)
            if (state.step * config.accumulate + place + 1) % RELEASE_EVERY == 0:
                devices.release_memory(embedder.device)
    return loss, components, depths


def _clip_and_step(
    state: TrainState, parts: list[Batch], loss: Tensor, config: TrainConfig, scale: float
) -> tuple[Tensor, bool]:
    """Clips the gradients, which are `scale` times too large, and steps. Returns their norm, and whether the step was
    skipped because they are not finite at this scale."""
    state.scaler.unscale_(state.optimizer)
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    grad_norm = clip_gradients(parameters, config.max_grad_norm)
    is_skipped = scale > 1 and not grad_norm.isfinite()  # next time with a smaller scale
    for what, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not value.isfinite() and not (is_skipped and value is grad_norm):
            ids = ([i for part in parts for i in getattr(part, name)] for name in ("query_ids", "document_ids"))
            raise NonFiniteError(f"{what} is {value.item()}", state.step + 1, *ids)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return grad_norm, is_skipped


def backward(
    embedder: Embedder,
    local: LocalBatch,
    targets: Targets,
    loss: Loss,
    config: TrainConfig,
    weight: float,
    seeds: Any,
    given: Mapping[str, Tensor] = MappingProxyType({}),
    at_once: int | None = None,
    before_last: Callable[[], None] = lambda: None,
) -> tuple[Tensor, dict[str, Any]]:
    """Accumulates the gradients of `weight` times the loss of a batch, through this rank's texts; `given`, {role:
    vectors of the whole batch}, are used as they are. `at_once`: tokens per mini-batch, for gradient caching;
    `before_last` is called before the last backward pass.
    Returns the value, detached, and the components that the loss recorded."""
    lower, components = autocast(config.precision, embedder.device), {}

    def weighted_loss(Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        Q, D = local.gather(Q, D)
        Q, D = given.get("query", Q), given.get("document", D)
        distributed.reseed(*seeds, apart=False)
        with collect() as found:
            value = loss(Q, D, targets)
        components.update(found)
        return value * weight

    distributed.reseed(*seeds, apart=True)
    packed = local.queries, local.documents
    if at_once is not None and (config.shard_weights or _num_tokens(local) > at_once):
        options = {"mini_batch_tokens": at_once, "autocast": lower, "before_last": before_last}
        options |= {"num_passes": distributed.most} if config.shard_weights else {}
        return cached_backward(embedder, *packed, targets, weighted_loss, **options), components
    Q, D, idle = *[no_vectors(embedder)] * 2, 0.0
    with lower():
        if _num_tokens(local):
            Q, D = embedder.embed_pair(*packed)
        elif config.shard_weights:
            idle = 0.0 * embedder.embed(FILLER, role="document").sum()
    value = weighted_loss(Q, D, targets) + idle
    before_last()
    value.backward()
    return value.detach(), components


def validate(state: TrainState, kept: KeptWeights, evaluate: Evaluate, config: TrainConfig, log: Log) -> None:
    """Evaluates the weights to keep on rank 0, where the other ranks help to encode, and keeps the best so far."""
    start, embedder = time.perf_counter(), state.embedder.eval()
    devices.release_memory(embedder.device)  # before and after: encoding fragments memory as much as training does
    with kept.in_place(), state.whole() as embedder:
        metrics = distributed.encoding_together(embedder, lambda: dict(evaluate(embedder)))
        devices.release_memory(embedder.device)
        if config.select not in metrics:
            raise ValueError(f"select is {config.select!r}, expected one of {', '.join(metrics)}")
        if wrong := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
            raise ValueError(f"validation at step {state.step}: {wrong[0]}, expected a finite number")
        log({"step": state.step, "metrics": metrics, "seconds": time.perf_counter() - start})
        best = dict(state.evaluations).get(state.best_step)
        if best is None or metrics[config.select] > best[config.select]:
            state.best_step, state.best_weights = state.step, copy_weights(embedder)
    state.evaluations.append((state.step, metrics))


def _initial_state(
    embedder: Embedder, loss: Loss, config: TrainConfig, optimizer: MakeOptimizer | None, refresh: Refresh | None
) -> TrainState:
    check_memory(embedder, config)
    sharding = Sharding(embedder, refresh) if config.shard_weights else None
    trained = embedder if sharding is None else sharding.trained
    scaler = make_scaler(config.precision, embedder.device)
    return TrainState(trained, loss, make_optimizer(trained, loss, config, optimizer), scaler, sharding=sharding)


def _save(folder: Path, state: TrainState) -> None:
    found = contents(state)  # on every rank
    distributed.from_first(lambda: save_checkpoint(folder, state, found))


@contextlib.contextmanager
def _session(state: TrainState, epochs: Epochs, config: TrainConfig, out: Path | None) -> Iterator[tuple]:
    """Seeds, loads a checkpoint; yields (log, whether one was loaded, bar, weights to keep); leaves the embedder in
    inference mode."""
    device, is_first = state.embedder.device, distributed.rank_and_size()[0] == 0
    state.optimizer.zero_grad()  # an earlier run may have been interrupted between backward and step
    try:
        with (
            devices.deterministic(device, config.deterministic),
            devices.seeded(config.seed, device),
            devices.reusing_memory(device),
        ):
            is_sharded_already = state.sharding is not None  # and was sent to every rank before
            distributed.broadcast_weights(*list(state.modules().values())[is_sharded_already:])
            kept = KeptWeights(state, config)  # before a checkpoint replaces the base's weights
            resumed = out is not None and load_checkpoint(out / CHECKPOINTS, state)
            was_refreshed = epochs.refresh is not None and state.step > epochs.steps_per_epoch * epochs.every
            if resumed and (state.refresh_weights is not None) != was_refreshed:
                had, now = ("lacks", "with") if state.refresh_weights is None else ("has", "without")
                where = f"{out / CHECKPOINTS}: the checkpoint of step {state.step}"
                raise ValueError(f"{where} {had} the weights of a refresh, so it belongs to a run {now} one")
            distributed.check_same({"number of batches": epochs.size, "step of the checkpoint": state.step})
            log = open_log(out if is_first else None, state.step if resumed else -1, config.log)
            shown = {"unit": "step", "initial": state.step, "show": None if is_first else False}
            with progress_bar(epochs.num_steps, "train", **shown) as bar:
                try:
                    yield log, resumed, bar, kept
                except NonFiniteError as error:
                    ids = {name: getattr(error, name) for name in ("query_ids", "document_ids")}
                    log({"step": error.step, "error": error.what, **ids})
                    raise
    finally:
        epochs.close()
        state.embedder.eval()


def _texts(batch: Batch, given: Mapping[str, Tensor]) -> list[Packed]:
    """The queries and documents to embed: none of a side whose vectors are given."""
    sides = {"query": batch.queries, "document": batch.documents}
    return [take(x, torch.arange(0)) if role in given else x for role, x in sides.items()]


def _num_tokens(batch: Batch | LocalBatch) -> int:
    return len(batch.queries.input_ids) + len(batch.documents.input_ids)
