"""The settings of `train`, `finetune` and `fit_adapter`, checked when they are made."""

import math
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import torch

from ..config import check_types, setting
from ..encoders.adapter import SIDES
from ..encoders.maps import KINDS
from ..losses.registry import Loss, build_loss
from .loggers import LOGGERS, Logger
from .optim import SCHEDULES, Schedule

OBJECTIVES = ("full_corpus", "in_batch")
MINING = ("mine_ranks", "mine_sampling", "mine_relative_margin", "mine_absolute_margin")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults follow sentence-transformers' trainer where it has them (lr 5e-5, no warmup, ...)."""

    epochs: int = setting(3, "passes over the training pairs")
    lr: float = setting(5e-5, "peak learning rate")
    loss_lr: float | None = setting(None, "peak learning rate of the loss's own parameters; null: lr")
    schedule: Schedule = setting("linear", f"learning rate after warmup: {', '.join(SCHEDULES)}")
    warmup: float = setting(0.0, "warmup steps; below 1: fraction of all steps")
    weight_decay: float = setting(0.0, "weight decay of matrices; biases and norms have none")
    max_grad_norm: float = setting(1.0, "clip gradients to this norm")
    seed: int = setting(42, "random seed of the batch order and dropout")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "precision of the forward pass: float32, or bfloat16 (autocast)"
    )
    accumulate: int = setting(1, "batches per step; their gradients are averaged")
    mini_batch_tokens: int | None = setting(
        None, "tokens embedded with gradient at a time (gradient caching); null: the whole batch at once"
    )
    eval_every: int | None = setting(None, "steps between validations; null: one per epoch")
    checkpoint_every: int | None = setting(None, "steps between checkpoints; null: one per epoch")
    select: str = setting("ndcg@10", "validation metric that chooses the best weights")
    log: Logger | None = setting(None, f"also log to {' or '.join(LOGGERS)}, which must be installed")

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

    def check_unused(self, names: tuple[str, ...], why: str) -> None:
        """Raises `ValueError` for the first of these settings that is not at its default: it has no effect."""
        for field in fields(self):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if field.name in names and getattr(self, field.name) != default:
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}, but {why}")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """How to fine-tune: the settings of `TrainConfig`, and those of batches, loss and mining."""

    batch_size: int = setting(32, "training pairs per batch")
    batch_tokens: int | None = setting(None, "tokens per batch, instead of batch_size")
    num_negatives: int = setting(0, "hard negatives per query, at most; fewer if the dataset has fewer")
    examples: Literal["pairs", "queries", "scored"] = setting("pairs", "what a batch consists of, see embedft/data")
    target_scores: bool = setting(False, "give the dataset's scores to the loss")
    no_duplicates: bool = setting(False, "no text twice in a batch")
    length_window: int = setting(0, "sort examples by length within this many batches; 0: random order")
    sampling: Literal["proportional", "round_robin", "temperature"] = setting(
        "proportional", "how to sample several datasets, see embedft/data/mixture.py"
    )
    sampling_temperature: float = setting(2.0, "for sampling by temperature: 1 is proportional, higher is more even")
    mixed: bool = setting(False, "mix all datasets in each batch, instead of one dataset per batch")
    max_length: int | None = setting(None, "truncate texts to this many tokens; null: the model's own")
    passages: list[int] | None = setting(
        None, "[size, stride] in tokens: split documents into windows, the best one counts; null: one vector each"
    )
    windows_per_document: int = setting(4, "windows of a document per batch: its queries' best ones, then random ones")
    refresh_windows: bool = setting(False, "find the best windows anew before each epoch, with the current model")
    mine_every: int | None = setting(None, "mine num_negatives hard negatives before training and every so many epochs")
    mine_ranks: list[int] = setting([10, 100], "[first, last] rank of mined negatives")
    mine_sampling: Literal["random", "top"] = setting(
        "random", "mined negatives: a random draw from these ranks, or the top ones"
    )
    mine_relative_margin: float | None = setting(
        None, "0.05: mined negatives score at most 95% of the query's lowest positive"
    )
    mine_absolute_margin: float | None = setting(
        None, "mined negatives score at least this much below the query's lowest positive"
    )
    attention_dropout: float = setting(0.0, "dropout on attention weights; above 0, the fast kernels cannot be used")
    loss: dict[str, Any] = setting({"name": "in_batch_negatives"}, "name and options of the loss")
    references: dict[str, Any] = setting(
        {}, "frozen models by the name the loss uses: guide, teacher or base; null: MODEL before training"
    )

    def __post_init__(self):
        super().__post_init__()
        configured_loss(self)
        if not self.sampling_temperature >= 1:
            raise ValueError(f"sampling_temperature is {self.sampling_temperature}, expected at least 1")
        for name, least in (
            ("batch_size", 1), ("batch_tokens", 1), ("windows_per_document", 1), ("mine_every", 1),
            ("length_window", 0), ("num_negatives", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}, expected at least 0 and below 1")
        for name, model in self.references.items():
            if not isinstance(model, str | None):
                raise ValueError(f"references: {name} is {model!r}, expected a model's folder or name, or null")
        # Settings that would have no effect are errors.
        if self.batch_tokens:
            self.check_unused(("batch_size",), f"batch_tokens is {self.batch_tokens}: expected one of the two")
        if self.sampling != "temperature":
            self.check_unused(("sampling_temperature",), f"sampling is {self.sampling!r}")
        if self.passages is None:
            self.check_unused(("windows_per_document", "refresh_windows"), "there are no passages")
        elif len(self.passages) != 2 or not all(type(number) is int for number in self.passages):
            raise ValueError(f"passages is {self.passages}, expected [size, stride], two whole numbers of tokens")
        elif self.references:
            raise ValueError("references cannot be combined with passages")
        if self.mine_every is None:
            self.check_unused(MINING, "mine_every is null")
            return
        if self.num_negatives == 0:
            raise ValueError(f"num_negatives is 0, but mine_every is {self.mine_every}: expected at least 1")
        self.check_unused(("batch_tokens", "no_duplicates"), "mining would change the number of batches")
        if self.mine_every > 1:
            self.check_unused(("refresh_windows",), f"with mine_every {self.mine_every} windows follow the mining")


@dataclass(frozen=True)
class AdapterConfig:
    """How to fit an adapter. Held-out questions about one annual report (Lyft's) chose the defaults, in
    experiments/repro_adapter_lyft_uber.py.
    """

    kind: Literal["linear", "low_rank", "two_layer"] = setting("linear", f"kind of map: {', '.join(KINDS)}")
    side: Literal["query", "document", "both", "shared"] = setting("query", f"what is mapped: {', '.join(SIDES)}")
    bias: bool = setting(True, "give maps a bias")
    rank: int = setting(16, "rank of a low-rank map")
    hidden: int = setting(256, "hidden features of a two-layer map")
    out_dim: int | None = setting(None, "output features, for both or shared; null: as many as the input")
    objective: Literal["full_corpus", "in_batch"] = setting("full_corpus", f"one of {', '.join(OBJECTIVES)}")
    temperature: float = setting(0.03, "temperature of the full-corpus softmax")
    loss: dict[str, Any] = setting({"name": "in_batch_negatives"}, "name and options of the loss, for in_batch")
    merge_documents: bool = setting(
        True, "in_batch: a document once per batch; false: once per pair, as a negative of its other pairs too"
    )
    shuffle: bool = setting(True, "a new order every epoch; false: the order of the qrels")
    toward_identity: float = setting(10.0, "weight of the maps' squared distance from the identity, per feature")
    lr: float = setting(1e-3, "peak learning rate")
    weight_decay: float = setting(0.0, "weight decay of matrices; 0: AdamW is Adam")
    schedule: Schedule = setting("constant", f"learning rate after warmup: {', '.join(SCHEDULES)}")
    warmup: float = setting(0.0, "warmup steps; below 1: fraction of all steps")
    max_grad_norm: float = setting(1.0, "clip gradients to this norm")
    epochs: int = setting(16, "passes over the training questions")
    batch_size: int | None = setting(64, "questions (in_batch: pairs) per step; null: all of them")
    held_out: float = setting(0.0, "fraction of the answering documents that chooses the best step; 0: the last step")
    eval_every: int = setting(10, "steps between validations")
    patience: int | None = setting(None, "stop after this many validations without improvement; null: never")
    select: str = setting("mrr@10", "validation metric that chooses the best step, mrr@K or hit_rate@K")
    documents_at_once: int = setting(16_384, "documents, or windows of them, scored at a time")
    seed: int = setting(42, "random seed of the held-out documents, the order of questions and the weights")

    def __post_init__(self):
        check_types(self)
        positive = ("rank", "hidden", "out_dim", "epochs", "batch_size", "eval_every", "patience", "documents_at_once")
        for name in positive:
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


def configured_loss(config: FinetuneConfig) -> Loss:
    """The configured loss, initialised from the seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_loss(config.loss)
