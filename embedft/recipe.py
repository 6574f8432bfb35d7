"""Fine-tuning from start to end: training and retrieval put together.

`training` knows nothing of retrieval and retrieval nothing of training; here one is handed to the other.

    finetune(embedder, train_set, FinetuneConfig(epochs=2, batch_size=64), validation=held_out, out="runs/first")
"""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .config import setting, to_dict
from .data.batches import Batches, make_batches
from .data.dataset import RetrievalDataset
from .data.mixture import join_datasets, make_mixture
from .encoders.embedder import Embedder
from .encoders.loading import load_embedder
from .encoders.openai_api import ApiEmbedder
from .losses.registry import LOSSES, Loss, build_loss
from .retrieval.evaluate import evaluate, evaluate_run
from .retrieval.metrics import select_metrics
from .retrieval.report import Report
from .retrieval.run import Run
from .training import distributed, runs
from .training.references import FrozenEmbeddings, Reference, targets_with
from .training.train import Refresh, TrainConfig, train
from .training.windows import best_windows, with_best_windows

VALIDATION, VALIDATION_BASE = "validation", "validation-base"


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """How to fine-tune: the settings of `TrainConfig`, and what a batch and a loss are."""

    batch_size: int = setting(32, "training pairs of a step")
    batch_tokens: int | None = setting(None, "tokens of a step, instead of batch_size")
    num_negatives: int = setting(0, "hard negatives of each query, at most: those that the dataset has for it")
    examples: Literal["pairs", "queries", "scored"] = setting("pairs", "what a batch is made of, see data/batches.py")
    target_scores: bool = setting(False, "hand the scores of the dataset to the loss")
    no_duplicates: bool = setting(False, "no text twice in a batch")
    length_window: int = setting(0, "batches among which examples are sorted by length; 0: at random")
    sampling: Literal["proportional", "round_robin", "temperature"] = setting(
        "proportional", "of several data sets, see data/mixture.py"
    )
    sampling_temperature: float = setting(
        2.0, "of sampling by temperature: 1 is proportional, the higher the more equal"
    )
    mixed: bool = setting(False, "batches with a share of every data set, not of one each")
    max_length: int | None = setting(None, "tokens a text is cut to; null: the model's own")
    passages: list[int] | None = setting(
        None, "[size, stride] in tokens: documents are windows, scored by the best one; null: one vector a document"
    )
    windows_per_document: int = setting(
        4, "windows of a document in a step: its queries' best, found before training, others at random"
    )
    refresh_windows: bool = setting(False, "find the best windows anew before every epoch, by the model as it then is")
    attention_dropout: float = setting(0.0, "on attention weights; above 0 it costs the fast kernels")
    loss: dict[str, Any] = setting({"name": "in_batch_negatives"}, "name and options of the loss")
    references: dict[str, Any] = setting(
        {}, "frozen models by what the loss calls them: guide, teacher or base; null: MODEL before training"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.sampling_temperature >= 1:
            raise ValueError(f"sampling_temperature is {self.sampling_temperature}, expected at least 1")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}, expected at least 1")
        if self.length_window < 0:
            raise ValueError(f"length_window is {self.length_window}, expected at least 0")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives is {self.num_negatives}, expected at least 0")
        if self.windows_per_document < 1:
            raise ValueError(f"windows_per_document is {self.windows_per_document}, expected at least 1")
        # What would do nothing is an error, not ignored.
        loss = _build_loss(self)
        own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
        idle = {
            "loss_lr": not own and "the loss has no parameters",
            "batch_size": self.batch_tokens and f"batch_tokens is {self.batch_tokens}: expected one of the two",
            "sampling_temperature": self.sampling != "temperature" and f"sampling is {self.sampling!r}",
            "windows_per_document": self.passages is None and "there are no passages",
        }
        for field in fields(self):
            value, why = getattr(self, field.name), idle.get(field.name)
            if why and value != field.default:
                raise ValueError(f"{field.name} is {value}, but {why}")
        if self.refresh_windows and self.passages is None:
            raise ValueError("refresh_windows is True, but there are no passages")
        if self.passages is not None:
            if len(self.passages) != 2 or not all(type(number) is int for number in self.passages):
                raise ValueError(f"passages is {self.passages}, expected [size, stride], two whole numbers of tokens")
            if self.references:
                raise ValueError("references have one vector a document, passages several: they do not go together")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}, expected at least 0 and below 1")
        for name, model in self.references.items():
            if not isinstance(model, str | None):
                raise ValueError(f"references: {name} is {model!r}, expected a model's folder or name, or null")


def finetune(
    embedder: Embedder,
    dataset: RetrievalDataset | Mapping[str, RetrievalDataset],
    config: FinetuneConfig | None = None,
    *,
    validation: RetrievalDataset | None = None,
    references: Mapping[str, Embedder | Reference] | None = None,
    out: str | Path | None = None,
    existing: str = "refuse",
) -> Embedder:
    """Fine-tunes `embedder` on the pairs of `dataset`; gives the same object back, with its best weights.

    Everything that can be found wrong without training is found before it. The loss does not follow the embedder: one
    whose similarity is "dot" needs a loss that names its own, {"name": "in_batch_negatives", "similarity": "dot"}.

    Several ranks (training/distributed.py) each call this with the same arguments; `config.batch_size` counts all of
    them, rank 0 alone writes to `out`, and all have the same weights in the end.

    Args:
        dataset: to train on; several by name are sampled as `config.sampling` says, their ids get the name in front.
        validation: held-out questions by which the best weights are chosen (`config.select`); None: the last weights.
        references: what the loss compares with, by the name it asks for ("guide", "teacher", "base"): an Embedder,
            which encodes `dataset` once before training (`embedder` itself: the base), or a function of the batch.
            Added to those of `config.references`.
        out: run folder, see training/runs.py; `out/model` gets the model, `out/eval` the reports on `validation`
            before and after. None: nothing is written.
        existing: what to do about a run in `out`: "refuse", "overwrite", or "resume" from its last checkpoint.

    Raises:
        ValueError: on any of the inputs, or where those of ranks differ; `NonFiniteError` when training diverges.
    """
    config = config or FinetuneConfig()
    if isinstance(embedder, ApiEmbedder):
        raise ValueError(f"{embedder.model} is behind an API, so its weights cannot be trained; an adapter on it can")
    out = None if out is None else Path(out)
    if out is not None:
        distributed.from_first(lambda: runs.check_run(out, existing))
    batches = _make_batches(embedder, dataset, config)
    dataset = dataset if isinstance(dataset, RetrievalDataset) else join_datasets(dataset)
    if validation is not None:
        measured = _metrics_with(config.select)
        # A run that found nothing: tells, without encoding, whether there is something to find.
        evaluate_run(Run.from_dict({}), validation, **measured)
        if (shared := validation.shares_with(dataset)) and distributed.rank_and_size()[0] == 0:
            warnings.warn(shared, stacklevel=2)
    if embedder.similarity == "dot" and not embedder.normalize and _lacks_similarity(config.loss):
        raise ValueError("the model's similarity is the dot product: loss.similarity has to say 'dot' or 'cosine'")
    if config.max_length is not None:
        embedder.max_length = config.max_length
    embedder.encoder.attention_dropout = config.attention_dropout
    config = replace(config, max_length=embedder.max_length)  # so that the run's configuration says what it was
    if config.passages is not None:
        if references:
            raise ValueError("references have one vector a document, passages several: they do not go together")
        embedder.pack([""], role="document", passages=config.passages)  # tells whether they can be cut
        # Of rank 0 for all: devices that round differently may differ in the best of nearly equal windows.
        batches = with_best_windows(batches, distributed.from_first(lambda: best_windows(embedder, batches)))
    references, reference_hashes = _frozen(embedder, dataset, config, references or {})
    _try_loss(embedder, batches, config, references)
    if out is not None:
        hashes = {"model": embedder.sha256(), "train": dataset.sha256(), **reference_hashes}
        if validation is not None:
            hashes["validation"] = validation.sha256()
        settings = to_dict(config)
        distributed.check_same({**hashes, **settings})
        opening = {"hashes": hashes, "device": embedder.device, "existing": existing}
        distributed.from_first(lambda: runs.open_run(out, settings, **opening))

    def measure(embedder: Embedder) -> Report:
        return evaluate(embedder, validation, passages=config.passages, **measured)

    def validate(embedder: Embedder) -> dict[str, float]:
        report = measure(embedder)
        # The first validation of a run is of the base. A report is whole when it has its metrics.json.
        if out is not None and not (out / runs.EVAL / VALIDATION_BASE / "metrics.json").exists():
            report.save(out / runs.EVAL / VALIDATION_BASE)
        return report.metrics

    refresh = None
    if config.refresh_windows:
        refresh = Refresh(
            lambda embedder: best_windows(embedder, batches), lambda found: with_best_windows(batches, found)
        )
    evaluation = None if validation is None else validate
    loss = _build_loss(config)
    # The vectors of weights on their way are asked for once: they are not kept.
    store, embedder.store = embedder.store, None
    try:
        train(embedder, batches, loss, config, out=out, references=references, evaluate=evaluation, refresh=refresh)
    finally:
        embedder.store = store

    def close() -> None:
        embedder.save(out / runs.MODEL)
        if validation is not None:
            measure(embedder).save(out / runs.EVAL / VALIDATION)
        runs.close_run(out)

    if out is not None:
        distributed.from_first(close)
    return embedder


def _metrics_with(select: str) -> dict[str, Any]:
    """Arguments for `evaluate`: the default metrics and `select`, and a depth that is enough for both."""
    _, _, k = select.partition("@")
    cutoff = int(k) if k.isdigit() else 10
    options = {"ks": sorted({1, 3, 5, 10, cutoff}), "depth": max(100, cutoff)}
    try:
        metrics = select_metrics([select], **options)
    except ValueError as error:
        raise ValueError(f"select is {select!r}: {error}") from None
    return {"metrics": list(dict.fromkeys(select_metrics(**options) + metrics)), "depth": options["depth"]}


def _make_batches(
    embedder: Embedder, dataset: RetrievalDataset | Mapping[str, RetrievalDataset], config: FinetuneConfig
) -> Batches:
    options = {
        "batch_size": None if config.batch_tokens else config.batch_size,
        "batch_tokens": config.batch_tokens,
        "seed": config.seed,
        "num_negatives": config.num_negatives,
        "examples": config.examples,
        "target_scores": config.target_scores,
        "no_duplicates": config.no_duplicates,
        "length_window": config.length_window,
        "passages": config.passages,
        "windows_per_document": config.windows_per_document,
    }
    if isinstance(dataset, RetrievalDataset):
        if config.sampling != "proportional" or config.mixed:
            raise ValueError(f"sampling is {config.sampling!r}, mixed is {config.mixed}, but there is one data set")
        return make_batches(dataset, embedder.pack, **options)
    sampling = {"sampling": config.sampling, "temperature": config.sampling_temperature, "mixed": config.mixed}
    return make_mixture(dataset, embedder.pack, **sampling, **options)


def _build_loss(config: FinetuneConfig) -> Loss:
    """The loss of a configuration; what it draws at random follows from the seed, the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_loss(config.loss)


def _lacks_similarity(spec: Any) -> bool:
    """Whether a loss that has an option `similarity`, or one inside it, leaves that to its default."""
    if isinstance(spec, list):
        return any(map(_lacks_similarity, spec))
    if not isinstance(spec, dict):
        return False
    takes = "name" in spec and "similarity" in inspect.signature(LOSSES[spec["name"]]).parameters
    return (takes and "similarity" not in spec) or any(map(_lacks_similarity, spec.values()))


def _frozen(
    embedder: Embedder, dataset: RetrievalDataset, config: FinetuneConfig, given: Mapping[str, Embedder | Reference]
) -> tuple[dict[str, Reference], dict[str, str]]:
    """Every reference as a function of the batch, and the hashes of the models among them."""
    twice = config.references.keys() & given.keys()
    if twice:
        raise ValueError(f"reference {min(twice)!r} is given twice, in the configuration and beside it")
    found, hashes = dict(given), {}
    for name, model in config.references.items():
        found[name] = embedder if model is None else load_embedder(model, device=embedder.device)
    for name, reference in found.items():
        if isinstance(reference, Embedder):
            hashes[f"reference {name}"] = reference.sha256()
            # Training moves all dimensions of the embedder, also where `encode` gives fewer.
            dim = embedder.full_dim if reference is embedder else None
            found[name] = FrozenEmbeddings.encode(reference, dataset, dim=dim)
    return found, hashes


def _try_loss(
    embedder: Embedder, batches: Batches, config: FinetuneConfig, references: Mapping[str, Reference]
) -> None:
    """Computes the loss of the first batch with vectors of zeros: tells what it lacks before a run is begun.

    A missing reference or teacher's score, a dimension beyond the model's, a teacher of another width.
    """
    batch = next(batches.epoch(0))
    targets = targets_with(references, batch)
    Q, D = (torch.zeros(part.num_sequences, embedder.full_dim) for part in (batch.queries, batch.documents))
    loss = _build_loss(config)
    if isinstance(loss, nn.Module):
        loss.eval()  # draws nothing, and warns of nothing: that is for the training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        loss(Q, D, targets)
