"""The settings of `train`, `finetune` and `fit_adapter`, checked when they are made."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import changed, check_types, from_dict, option
from ..data.batches import ExampleKind
from ..data.mixture import Sampling
from ..encoders.lora import LoraConfig
from ..encoders.token_ids import window_sizes
from ..losses.registry import Loss, build_loss
from .optim import Schedule
from .parts import flattened

MARGINS = ("mine_relative_margin", "mine_absolute_margin")
MINING = ("mine_ranks", "mine_sampling", *MARGINS)
LARGEST_SEED = 2**62


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults follow sentence-transformers' trainer where it has them (lr 5e-5, no warmup, ...)."""

    epochs: int = option(3, "passes over the training pairs", least=1)
    lr: float = option(5e-5, "peak learning rate", above=0)
    loss_lr: float | None = option(None, "peak learning rate of the loss's own parameters [lr]", above=0)
    lr_parts: dict[str, Any] = option({}, "peak learning rates by name: embeddings, pooling, layers.0")
    lr_decay: float = option(1.0, "each layer's learning rate is this times the next one's", above=0, most=1)
    schedule: Schedule = option("linear", "learning rate after warmup")
    warmup: float = option(0.0, "warmup steps; below 1: fraction of all steps", least=0)
    weight_decay: float = option(0.0, "weight decay of matrices; biases and norms have none", least=0)
    max_grad_norm: float = option(1.0, "clip gradients to this norm", above=0)
    ema: float | None = option(None, "0.999: keep a moving average of the weights, with this decay", above=0, below=1)
    tuned_share: float | None = option(
        None, "keep this share of the tuned weights and 1 - X of MODEL's", above=0, most=1
    )
    depths: list[int] | None = option(None, "embed each batch with one of these numbers of layers, drawn [all layers]")
    seed: int = option(42, "random seed for batch order and dropout", above=-LARGEST_SEED, below=LARGEST_SEED)
    precision: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the forward pass (autocast)")
    accumulate: int = option(1, "batches per step; their gradients are averaged", least=1)
    prefetch: int | None = option(None, "batches that a thread makes ahead [2 on a GPU; CPU: none]", least=0)
    mini_batch_tokens: int | Literal["auto"] | None = option(
        None, "gradient caching: tokens per mini-batch; auto: once memory runs out [no caching]", metavar="N", least=1
    )
    deterministic: bool = option(False, "the same bits every time on a GPU too, or an error")
    checkpoint_activations: bool = option(False, "compute layers again in the backward pass, for less memory")
    shard_weights: bool = option(
        False, "on several ranks, each keeps its part of weights, gradients and moments (FSDP2)"
    )
    eval_every: int | None = option(None, "steps between validations [one per epoch]", least=1)
    checkpoint_every: int | None = option(None, "steps between checkpoints [one per epoch]", least=1)
    select: str = option("ndcg@10", "validation metric that chooses the best weights; of one set: NAME/ndcg@10")
    log: Literal["tensorboard", "wandb"] | None = option(None, "also log to TensorBoard or W&B, installed separately")

    def __post_init__(self):
        check_types(type(self), vars(self))
        flattened(self.lr_parts)
        if self.shard_weights:
            self.check_unused(("ema", "tuned_share", "depths"), "shard_weights is true")
            if self.precision == "float16":
                raise ValueError("precision is 'float16', but shard_weights is true: expected float32 or bfloat16")

    def check_unused(self, names: tuple[str, ...], why: str) -> None:
        """Raises `ValueError` for the first of these settings that is not at its default: it has no effect."""
        for name in names:
            if changed(self, [name]):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but {why}")


@dataclass(frozen=True)
class TeacherConfig:
    """What scores lists of documents for each query before training, and which documents; see retrieval/taught.py."""

    models: dict[str, float] | str = option("", "a bi-encoder, cross-encoder, bm25 or openai:MODEL, or {model: weight}")
    depth: int = option(20, "ranks from which documents are listed, besides those of the data", least=0)
    ranking: Literal["student", "teacher"] = option("student", "whose ranks")
    passages: list[int] | None = option(None, "windows by which bi-encoders score documents [whole]")
    scale: Literal["zscore", "raw"] = option("zscore", "of scores: z-scores over each list, or as the models give them")
    relabel: float | None = option(None, "make what scores this much below a positive, or more, a positive [nothing]")
    api: dict[str, Any] = option({}, "options for models behind an API: price, max_cost, ...")
    bm25: dict[str, Any] = option({}, "options of bm25: ngram (2: words and pairs), k1, b")

    def __post_init__(self):
        check_types(type(self), vars(self))
        if not self.models:
            raise ValueError(f"models is {self.models!r}, expected a model, or {{model: weight}}")
        for key in self.api.keys() & {"model", "base_url"}:  # settings are recorded, and a URL may contain a key
            raise ValueError(f"api has {key}, expected other options: models and OPENAI_BASE_URL say what is asked")
        if self.passages is not None:
            window_sizes(self.passages)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """How to fine-tune: the settings of `TrainConfig`, and those of batches, loss and mining."""

    batch_size: int = option(32, "training pairs per batch", least=1)
    batch_tokens: int | None = option(None, "tokens per batch, instead of batch_size", least=1)
    num_negatives: int = option(0, "maximum hard negatives per query; fewer if the dataset has fewer", least=0)
    examples: ExampleKind = option("pairs", "what each row of a batch is")
    kinds: list[str] | None = option(None, "train on questions of these kinds only [all]", metavar="KIND ...")
    target_scores: bool = option(False, "pass the dataset's scores to the loss")
    no_duplicates: bool = option(False, "no text twice in a batch")
    sampling: Sampling = option("proportional", "share of each of several datasets")
    sampling_temperature: float = option(2.0, "with temperature: 1 is proportional, higher is more even", least=1)
    mixed: bool = option(False, "mix all datasets in each batch, instead of one dataset per batch")
    token_memory: int = option(1_024, "MiB for token ids of all texts; more go to a temporary file", least=0)
    max_length: int | None = option(None, "truncate texts to this many tokens [the model's own]", least=1)
    passages: list[int] | None = option(None, "train on windows of documents, in tokens [whole]", metavar="SIZE STRIDE")
    validation_passages: list[int] | Literal["training"] | None = option(
        "training", "windows by which validation scores documents [those of training]", metavar="SIZE STRIDE ..."
    )
    windows_per_document: int = option(4, "windows of a document per batch: the best ones, then random ones", least=1)
    refresh_windows: bool = option(False, "update the best windows before each epoch, with the current model")
    mine_every: int | None = option(None, "mine hard negatives before training, then every N epochs", least=1)
    mine_ranks: list[int] = option([10, 100], "ranks of mined negatives", metavar="FIRST LAST")
    mine_sampling: Literal["random", "top"] = option("random", "which of these ranks are mined")
    mine_relative_margin: float | None = option(None, "0.05: negatives score at most 95% of the lowest positive")
    mine_absolute_margin: float | None = option(None, "negatives score at least this much below the lowest positive")
    attention_dropout: float = option(0.0, "dropout of attention weights; above 0 is slower", least=0, below=1)
    lora: dict[str, Any] = option({}, "train low-rank updates only: rank, alpha, dropout, targets (JSON), side, save")
    freeze: list[str] = option([], "names of what is not trained: embeddings, layers.0, ...", metavar="NAME ...")
    freeze_below: int | None = option(None, "train neither the embeddings nor the layers before this one", least=0)
    loss: dict[str, Any] = option({"name": "in_batch_negatives"}, "name and options of the loss")
    references: dict[str, Any] = option({}, "frozen models: guide, teacher or base; null: MODEL before training")
    teacher: dict[str, Any] = option({}, "scores lists: models, depth, ranking, passages, scale, relabel, api, bm25")

    def __post_init__(self):
        super().__post_init__()
        configured_loss(self)
        lora = self.lora_config()
        if lora is not None and lora.side != "both" and self.passages is not None:
            raise ValueError(f"lora: side is {lora.side!r}, which cannot be combined with passages")
        for name, model in self.references.items():
            if not isinstance(model, str | None):
                raise ValueError(f"references: {name} is {model!r}, expected a model's folder or name, or null")
        if self.passages is not None:
            if len(window_sizes(self.passages)) > 1:
                raise ValueError(f"passages is {self.passages}, expected [size, stride]: training has one size")
            if self.references:
                raise ValueError("references cannot be combined with passages")
        if not isinstance(self.validation_passages, str | None):
            window_sizes(self.validation_passages)
        if self.kinds is not None and not self.kinds:
            raise ValueError("kinds is [], expected at least one kind, or null for all questions")
        if self.mine_every and not self.num_negatives:
            raise ValueError(f"num_negatives is 0, but mine_every is {self.mine_every}: expected at least 1")
        if self.batch_tokens:
            self.check_unused(("batch_size",), f"batch_tokens is {self.batch_tokens}: expected one of the two")
        if self.sampling != "temperature":
            self.check_unused(("sampling_temperature",), f"sampling is {self.sampling!r}")
        if not self.passages:
            self.check_unused(("windows_per_document", "refresh_windows"), "there are no passages")
        if self.shard_weights:
            self.check_unused(("lora", "mine_every", "refresh_windows"), "shard_weights is true")
        self._check_teacher()
        if not self.mine_every:
            relabels = self.teacher.get("relabel") is not None
            self.check_unused(MINING[: -len(MARGINS)] if relabels else MINING, "mine_every is null")
        else:
            self.check_unused(("batch_tokens", "no_duplicates"), "mining would change the number of batches")
            if self.mine_every > 1:
                self.check_unused(("refresh_windows",), f"mine_every is {self.mine_every}: windows follow it")

    def _check_teacher(self) -> None:
        if (teacher := self.teacher_config()) is None:
            return
        if teacher.relabel is None and not self.num_negatives and self.examples != "scored":
            raise ValueError("num_negatives is 0, but there is a teacher: expected at least 1, of the lists it scores")
        uses_scores = self.target_scores or self.examples == "scored"
        if self.mine_every and uses_scores:
            raise ValueError(f"mine_every is {self.mine_every}, but the teacher scores its lists once, before training")
        if teacher.relabel is None and self.mine_every:
            raise ValueError(f"mine_every is {self.mine_every}: mining replaces the teacher's lists, expected relabel")
        if teacher.relabel is None and not uses_scores and teacher.ranking == "student":
            uses = "target_scores, examples 'scored', teacher.relabel or teacher.ranking 'teacher'"
            raise ValueError(f"teacher: nothing uses what {teacher.models!r} says: expected {uses}")

    def teacher_config(self) -> TeacherConfig | None:
        """The settings of the teacher; None without one."""
        return from_dict(TeacherConfig, self.teacher, "teacher: ") if self.teacher else None

    def lora_config(self) -> LoraConfig | None:
        """The settings of LoRA; None without any."""
        return from_dict(LoraConfig, self.lora, "lora: ") if self.lora else None


@dataclass(frozen=True)
class AdapterConfig:
    """How to fit an adapter. Defaults were chosen on held-out questions, in experiments/repro_adapter_lyft_uber.py."""

    kind: Literal["linear", "low_rank", "two_layer"] = option("linear", "kind of map")
    side: Literal["query", "document", "both", "shared"] = option("query", "whose vectors are mapped")
    bias: bool = option(True, "maps have a bias")
    rank: int = option(16, "rank of a low-rank map", least=1)
    hidden: int = option(256, "hidden features of a two-layer map", least=1)
    out_dim: int | None = option(None, "output features, for side both or shared [as many as the input]", least=1)
    objective: Literal["full_corpus", "in_batch"] = option("full_corpus", "negatives: the whole corpus, or the batch")
    temperature: float = option(0.03, "temperature of the full-corpus softmax", above=0)
    loss: dict[str, Any] = option({"name": "in_batch_negatives"}, "name and options of the loss, for in_batch")
    merge_documents: bool = option(True, "in_batch: each document once per batch; false: once per pair")
    shuffle: bool = option(True, "a new order every epoch; false: the order of the qrels")
    toward_identity: float = option(10.0, "weight of the maps' squared distance from the identity", least=0)
    lr: float = option(1e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.0, "weight decay of matrices; biases have none", least=0)
    schedule: Schedule = option("constant", "learning rate after warmup")
    warmup: float = option(0.0, "warmup steps; below 1: fraction of all steps", least=0)
    max_grad_norm: float = option(1.0, "clip gradients to this norm", above=0)
    epochs: int = option(16, "passes over the training questions", least=1)
    batch_size: int | None = option(64, "questions (in_batch: pairs) per step; null: all of them", least=1)
    held_out: float = option(0.0, "fraction of documents held out to pick the best step; 0: the last", least=0, below=1)
    eval_every: int = option(10, "steps between validations", least=1)
    patience: int | None = option(None, "stop after this many validations without improvement [never]", least=1)
    select: str = option("mrr@10", "validation metric that chooses the best step, mrr@K or hit_rate@K")
    documents_at_once: int = option(16_384, "documents, or windows of them, scored at a time", least=1)
    seed: int = option(42, "random seed for held-out documents, order and weights", least=0, below=LARGEST_SEED)

    def __post_init__(self):
        check_types(type(self), vars(self))
        if not re.fullmatch(r"(mrr|hit_rate)@[1-9]\d*", self.select):
            raise ValueError(f"select is {self.select!r}, expected mrr@K or hit_rate@K")
        build_loss(self.loss)


def configured_loss(config: FinetuneConfig | AdapterConfig) -> Loss:
    """The configured loss, initialised from the seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_loss(config.loss)
