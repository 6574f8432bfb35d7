"""The training loop, one function.

    state = train(embedder, batches, loss, TrainConfig(epochs=2, lr=2e-5), out=Path("runs/first"))

It knows nothing of files of text, metrics or indices: batches, loss, references, evaluation and what makes batches anew
come in as they are.
Not here: how a batch larger than memory is stepped (cached.py), what ranks tell each other (distributed.py),
hard-negative mining.

Shapes: B queries, M documents, D dimensions.
"""

import functools
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import device as devices
from ..config import check_types, setting
from ..data.collate import Batch
from ..encoders.embedder import Embedder
from ..files import append_jsonl, atomic_write
from ..losses.registry import Loss
from ..losses.targets import Targets
from ..progress import progress_bar
from . import distributed
from .cached import cached_backward, no_vectors
from .checkpoint import TrainState, load_checkpoint, save_checkpoint
from .distributed import Share
from .optim import SCHEDULES, Schedule, build_optimizer, lr_factor
from .references import Reference, targets_with
from .runs import CHECKPOINTS, LOG

# Batches between two calls of `device.release_memory`. The fewer, the less memory stays in pieces: 80 batches of 32
# finance pairs take 1.7 GiB with a call after each, at 6% of the time, and 2.7 GiB with one after every eighth.
RELEASE_EVERY = 4
# Ids that an error about a batch names; all of them stand in train.jsonl.
NAMED_IDS = 16


@dataclass(frozen=True)
class TrainConfig:
    """How to step. Defaults are those of sentence-transformers' trainer where it has them (lr 5e-5, no warmup, ...)."""

    epochs: int = setting(3, "passes over the training pairs")
    lr: float = setting(5e-5, "learning rate at its highest")
    loss_lr: float | None = setting(None, "the same for the loss's own parameters; null: as lr")
    schedule: Schedule = setting("linear", f"of the learning rate after warmup: {', '.join(SCHEDULES)}")
    warmup: float = setting(0.0, "steps until the learning rate is at its highest; below 1: share of all steps")
    weight_decay: float = setting(0.0, "of matrices; biases and norms have none")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this length")
    seed: int = setting(42, "of the order of the pairs and of dropout")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "of the forward pass: float32, or bfloat16 (autocast)"
    )
    accumulate: int = setting(1, "batches of a step, which takes the mean of their gradients")
    mini_batch_tokens: int | None = setting(
        None, "tokens embedded with gradient at a time (gradient caching); null: the whole batch at once"
    )
    eval_every: int | None = setting(None, "steps between validations; null: at the end of every epoch")
    checkpoint_every: int | None = setting(None, "steps between checkpoints; null: at the end of every epoch")
    select: str = setting("ndcg@10", "validation metric by which the best weights are kept")

    def __post_init__(self):
        check_types(self)
        for name in ("epochs", "accumulate", "mini_batch_tokens", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if abs(self.seed) >= 2**62:
            raise ValueError(f"seed is {self.seed}, expected less than 2**62")
        for name in ("lr", "loss_lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected above 0")
        for name in ("warmup", "weight_decay"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")


class NonFiniteError(ValueError):
    """A loss or gradient that is not a number. `.step`, `.query_ids`, `.document_ids` say where."""

    def __init__(self, what: str, step: int, query_ids: list[str], document_ids: list[str]):
        self.step, self.query_ids, self.document_ids = step, query_ids, document_ids

        def some(ids: list[str]) -> str:
            more = f" and {len(ids) - NAMED_IDS:,} more" if len(ids) > NAMED_IDS else ""
            return ", ".join(ids[:NAMED_IDS]) + more

        super().__init__(f"step {step}: {what}; queries {some(query_ids)}; documents {some(document_ids)}")


class BatchSource(Protocol):
    """What `train` asks of batches; data/batches.py has the one to use."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, *, start: int = 0): ...


class Refresh(NamedTuple):
    """How the batches of every epoch but the first follow from the model at its beginning.

    Refresh(find=lambda embedder: mine(embedder, dataset).negatives, make=lambda found: Batches(...))

    Attributes:
        find: embedder -> what it finds, which is not None and which JSON can hold: checkpoints have it, so a run that
            resumes within an epoch takes its batches from the model at its beginning too. Only rank 0 finds.
        make: what was found -> batches, as many an epoch as before. Called on every rank, and when a run resumes.
    """

    find: Callable[[Embedder], Any]
    make: Callable[[Any], BatchSource]


def train(
    embedder: Embedder,
    batches: BatchSource,
    loss: Loss,
    config: TrainConfig,
    *,
    out: Path | None = None,
    references: Mapping[str, Reference] | None = None,
    evaluate: Callable[[Embedder], Mapping[str, float]] | None = None,
    refresh: Refresh | None = None,
) -> TrainState:
    """Trains `embedder` in place and leaves it with its best weights (the last ones when there is no `evaluate`).

    One step: embed queries and documents together, loss, gradients, clip, AdamW. A batch with more tokens than
    `config.mini_batch_tokens` is embedded in parts, with the same gradients (cached.py). With `config.accumulate` the
    gradients of a step are the mean over so many batches (the last step of an epoch: over what is left), each with its
    own negatives. The base is validated first, so weights worse than the base are never kept. Same seed, same machine,
    same bits on the CPU; the caller's random state is left as it was.

    Where torch.distributed runs with several ranks, all of them call this with the same batches, and step together to
    the weights of one rank, but for rounding and for dropout (distributed.py). Every rank returns the same state;
    rank 0 alone validates, logs, shows the bar and writes to `out`, which the others read to resume.

    Args:
        batches: sized (batches of an epoch), and able to begin anywhere.
        loss: (Q [B, D], D [M, D], targets) -> scalar. A module is moved to the embedder's device, and its parameters
            are trained too, without weight decay; they end as the last step left them.
        out: run folder for train.jsonl and checkpoints; a checkpoint that is there is resumed. None: nothing written.
        references: {name: batch -> (Q [B, E], D [M, E])}, frozen vectors that the loss finds in `targets.references`;
            asked once a step.
        evaluate: validation, {metric: value, higher is better}.
        refresh: makes the batches of every epoch but the first, by the model as it is when the epoch begins.

    Raises:
        NonFiniteError: a loss or gradient is not finite; nothing was stepped with it.
        ValueError: `config.select` is not among the metrics; a reference has too few vectors, or too many; ranks
            differ in the number of batches or in the checkpoint that they find; a refresh changes the number of
            batches; a checkpoint of a training with a refresh is resumed without one, or the other way round.
    """
    device, steps_an_epoch = embedder.device, -(-len(batches) // config.accumulate)
    num_steps = config.epochs * steps_an_epoch
    factor = lr_factor(config.schedule, num_steps=num_steps, warmup=config.warmup)
    optimizer = build_optimizer(embedder.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first = distributed.rank_and_size()[0] == 0
    module = loss.to(device).train() if isinstance(loss, nn.Module) else None
    own: list[nn.Parameter] = []
    if module is not None:
        own = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer.add_param_group({"params": own, "lr": config.loss_lr or config.lr, "weight_decay": 0.0})
    highest_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if out is not None and first:
        out.mkdir(parents=True, exist_ok=True)
    optimizer.zero_grad()  # an earlier training may have been stopped between its gradients and its step
    state, best_weights, num_batches = TrainState(), None, 0
    refresh_seconds: float | None = None

    def log(record: dict) -> None:
        if out is not None and first:
            append_jsonl(out / LOG, record)

    def validate() -> None:
        nonlocal best_weights
        start = time.perf_counter()
        embedder.eval()
        devices.release_memory(device)  # before and after: encoding leaves as many pieces as training does
        metrics = distributed.from_first(lambda: dict(evaluate(embedder)))
        devices.release_memory(device)
        if config.select not in metrics:
            raise ValueError(f"select is {config.select!r}, expected one of {', '.join(metrics)}")
        log({"step": state.step, "metrics": metrics, "seconds": time.perf_counter() - start})
        bests = dict(state.evaluations).get(state.best_step)
        if bests is None or metrics[config.select] > bests[config.select]:
            state.best_step = state.step
            best_weights = {name: tensor.detach().clone().cpu() for name, tensor in embedder.state_dict().items()}
        state.evaluations.append((state.step, metrics))

    def made_anew(*, found_before: bool) -> BatchSource:
        nonlocal refresh_seconds
        if not found_before:
            start = time.perf_counter()
            embedder.eval()
            devices.release_memory(device)
            # As JSON from the start: what it does not tell apart, a run that resumes could not either.
            text = distributed.from_first(lambda: json.dumps(refresh.find(embedder), allow_nan=False))
            state.refreshed = json.loads(text)
            devices.release_memory(device)
            refresh_seconds = time.perf_counter() - start
        made = refresh.make(state.refreshed)
        if len(made) != len(batches):
            raise ValueError(f"the refresh made {len(made)} batches an epoch, expected {len(batches)} as before")
        return made

    def step_once(parts: list[Batch], epoch: int) -> None:
        nonlocal num_batches, refresh_seconds
        start = time.perf_counter()
        share = factor(state.step)
        for group, highest_lr in zip(optimizer.param_groups, highest_lrs, strict=True):
            group["lr"] = highest_lr * share
        embedder.train()
        values = []
        for place, batch in enumerate(parts):
            targets = targets_with(references or {}, batch).to(device)
            mine, seeds = Share.of(batch.queries, batch.documents), (config.seed, state.step, place)
            values.append(_backward(embedder, mine, targets, loss, config, share=1 / len(parts), seeds=seeds))
            num_batches += 1
            if num_batches % RELEASE_EVERY == 0:
                devices.release_memory(device)
        loss_value = sum(values)
        distributed.sum_gradients(embedder.parameters(), of_first=own)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for what, value in (("loss", loss_value), ("gradient norm", grad_norm)):
            if not torch.isfinite(value):
                ids = {
                    "query_ids": [i for batch in parts for i in batch.query_ids],
                    "document_ids": [i for batch in parts for i in batch.document_ids],
                }
                log({"step": state.step + 1, "error": f"{what} is {value.item()}", **ids})
                raise NonFiniteError(f"{what} is {value.item()}", state.step + 1, **ids)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        record = {
            "step": state.step,
            "epoch": epoch,
            "loss": loss_value.item(),
            "lr": config.lr * share,
            "grad_norm": grad_norm.item(),
            "queries": sum(len(batch.query_ids) for batch in parts),
            "tokens": sum(map(_num_tokens, parts)),
            "seconds": time.perf_counter() - start,
        }
        if parts[0].sources is not None:
            record["sources"] = dict(Counter(source for batch in parts for source in batch.sources))
        if refresh_seconds is not None:
            record["refresh_seconds"], refresh_seconds = refresh_seconds, None
        log(record)
        bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        bar.update()

    def save() -> None:
        save_checkpoint(out / CHECKPOINTS, embedder, optimizer, state, best_weights, device, loss=module)

    def due(every: int | None) -> bool:
        return state.step % (every or steps_an_epoch) == 0 or state.step == num_steps

    try:
        with devices.seeded(config.seed, device):
            distributed.broadcast_weights(embedder, *([] if module is None else [module]))
            resumed = None
            if out is not None:
                resumed = load_checkpoint(out / CHECKPOINTS, embedder, optimizer, device, loss=module)
            if resumed:
                state, best_weights = resumed
                if (state.refreshed is None) != (refresh is None or state.step <= steps_an_epoch):
                    had, now = ("lacks", "with") if state.refreshed is None else ("has", "without")
                    where = f"{out / CHECKPOINTS}: the checkpoint of step {state.step}"
                    raise ValueError(f"{where} {had} what a refresh found, so it is not of a training {now} one")
            distributed.check_same({"number of batches": len(batches), "step of the checkpoint": state.step})
            if out is not None and first:
                _forget_after(out / LOG, state.step if resumed else -1)
            hidden = {} if first else {"show": False}
            with progress_bar(num_steps, "train", unit="step", initial=state.step, **hidden) as bar:
                if evaluate is not None and not resumed:
                    validate()
                while state.step < num_steps:
                    epoch, step_number = divmod(state.step, steps_an_epoch)
                    source = batches
                    if refresh is not None and epoch > 0:
                        source = made_anew(found_before=step_number > 0)
                    left = source.epoch(epoch, start=step_number * config.accumulate)
                    while parts := list(itertools.islice(left, config.accumulate)):
                        step_once(parts, epoch)
                        if evaluate is not None and due(config.eval_every):
                            validate()
                        if out is not None and due(config.checkpoint_every):
                            distributed.from_first(save)
    finally:
        embedder.eval()
    if best_weights is not None:
        embedder.load_state_dict(best_weights)
    return state


def _backward(
    embedder: Embedder,
    mine: Share,
    targets: Targets,
    loss: Loss,
    config: TrainConfig,
    *,
    share: float,
    seeds: tuple[int, ...],
) -> Tensor:
    """`share` of the loss of a batch, with its gradients added to the parameters': those of this rank's texts."""
    # The only autocast there is: the loss is always computed in float32.
    autocast = functools.partial(
        torch.autocast, embedder.device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"
    )

    def part(Q: Tensor, D: Tensor, targets: Targets) -> Tensor:
        Q, D = mine.gather(Q, D)
        distributed.reseed(*seeds, apart=False)
        return loss(Q, D, targets) * share

    distributed.reseed(*seeds, apart=True)
    at_once, packed = config.mini_batch_tokens, (mine.queries, mine.documents)
    if at_once is not None and _num_tokens(mine) > at_once:
        return cached_backward(embedder, *packed, targets, part, mini_batch_tokens=at_once, autocast=autocast)
    if _num_tokens(mine) == 0:
        Q = D = no_vectors(embedder)
    else:
        with autocast():
            Q, D = embedder.embed_pair(*packed)
    value = part(Q, D, targets)
    value.backward()
    return value.detach()


def _num_tokens(batch: Batch | Share) -> int:
    return len(batch.queries.input_ids) + len(batch.documents.input_ids)


def _forget_after(log: Path, step: int) -> None:
    """Drops what the log says of steps behind the checkpoint, about to be done again, and a half last line."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                continue
        except ValueError:  # cut off: no JSON, or not even UTF-8
            break
        kept.append(line)
    with atomic_write(log, "wb") as file:
        file.writelines(kept)
