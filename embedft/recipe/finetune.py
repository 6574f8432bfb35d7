"""Fine-tuning end to end: joins training and retrieval, which do not depend on each other.

finetune(embedder, train_set, FinetuneConfig(epochs=2, batch_size=64), validation=held_out, out="runs/first")
finetune(embedder, train_set, config, loss=my_loss, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
"""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data.batches import Batches
from ..data.dataset import RetrievalDataset
from ..encoders.card import write_card
from ..encoders.embedder import Embedder
from ..encoders.loading import check_lora_base
from ..encoders.lora import merge_lora
from ..encoders.openai_api import ApiEmbedder
from ..encoders.scoring import Scorer
from ..encoders.token_cache import token_cache
from ..files import append_jsonl, named_errors, temporary_path
from ..losses.registry import Loss
from ..objects import describe_object
from ..retrieval.search import Setting, check_settings
from ..retrieval.suite import describe_change, load_reports
from ..training import distributed, run_folder
from ..training.configs import FinetuneConfig, configured_loss
from ..training.optim import MakeOptimizer
from ..training.parts import choose_parts, constant_vectors, without_gradient
from ..training.references import Reference
from ..training.train import BatchSource, Evaluate, OnStep, Refresh, train
from .inputs import (
    BATCHING,
    batches_of,
    check_validation,
    chosen_kinds,
    frozen_references,
    joined,
    lacks_similarity,
    renewed,
    taught,
    try_loss,
)
from .job import VALIDATION, VALIDATION_BASE, Job

REFRESHING = ("refresh_windows", "mine_every")
REPLACED = {
    "loss": ("loss",),
    "batches": (
        *BATCHING,
        "teacher",
        "kinds",
        "windows_per_document",
        "sampling",
        "sampling_temperature",
        "mixed",
        *REFRESHING,
    ),
    "optimizer": ("lr", "loss_lr", "lr_parts", "lr_decay", "weight_decay"),
    "refresh": REFRESHING,
}


def finetune(
    embedder: Embedder,
    dataset: RetrievalDataset | Mapping[str, RetrievalDataset],
    config: FinetuneConfig | None = None,
    *,
    validation: RetrievalDataset | Mapping[str, RetrievalDataset] | None = None,
    references: Mapping[str, Embedder | Reference] | None = None,
    out: str | Path | None = None,
    existing: str = "refuse",
    allow_changed_code: bool = False,
    loss: Loss | None = None,
    batches: BatchSource | None = None,
    optimizer: MakeOptimizer | None = None,
    evaluate: Evaluate | None = None,
    refresh: Refresh | None = None,
    on_step: OnStep | None = None,
) -> Embedder:
    """Fine-tunes `embedder` on `dataset` and returns the same object with its best weights.

    Whatever can be checked without training is checked first; such errors leave the embedder and `out` unchanged.
    With several ranks (training/distributed.py), each calls this with the same arguments; rank 0 writes to `out`.

    Args:
        dataset: one, or {name: dataset}, sampled as `config.sampling` says; their ids are prefixed with the name.
        validation: on which `config.select` picks the best weights, or {name: dataset} (suite.py); None: keep the last.
        references: {"guide" | "teacher" | "base": what the loss compares with}: an Embedder, which encodes `dataset`
            once (for the base, pass `embedder` itself), or a function of the batch. Added to `config.references`.
        out: run folder, see training/run_folder.py; reports on `validation` before and after go to `out/eval`.
        existing: what to do with a run already in `out`: "refuse", "overwrite", or "resume" from its last checkpoint.
        allow_changed_code: resume even if the code of the objects below has changed since the run began.
        loss, batches, optimizer, evaluate, refresh, on_step: see `training.train.train`. Each replaces settings, which
            must then keep their defaults; config.json records its name, source hash and values.

    Raises `ValueError` when an input is invalid or differs between ranks, `NonFiniteError` when training diverges."""
    if isinstance(embedder, ApiEmbedder):
        raise ValueError(f"{embedder.model} is behind an API, so its weights cannot be trained; fit an adapter")
    if embedder.lora is not None:
        raise ValueError("the embedder has LoRA already: merge it, or load the base again")
    given = {"loss": loss, "batches": batches, "optimizer": optimizer}
    given |= {"evaluate": evaluate, "refresh": refresh, "on_step": on_step}
    given = {name: value for name, value in given.items() if value is not None}
    datasets = {"": dataset} if isinstance(dataset, RetrievalDataset) else dataset
    if datasets is dataset and "" in datasets:
        raise ValueError("a dataset is named '', expected a non-empty name")
    out = None if out is None else Path(out)
    job = Job(embedder, datasets, config or FinetuneConfig(), given, validation, references or {}, out)
    own_length, take_back = embedder.max_length, _taking_back(embedder)
    with token_cache(embedder, job.config.token_memory * 2**20), contextlib.ExitStack() as stack:
        try:
            _prepare(job, existing)
            if out is not None:
                how = {"existing": existing, "allow_changed_code": allow_changed_code}
                distributed.encoding_together(embedder, lambda: _open(job, own_length, stack, **how))
        except BaseException:
            take_back()
            raise
        _train(job)
        if out is not None:
            distributed.encoding_together(embedder, lambda: _close(job))
    return embedder


def check_finetune(
    embedder: Embedder,
    dataset: RetrievalDataset | Mapping[str, RetrievalDataset],
    config: FinetuneConfig,
    *,
    validation: RetrievalDataset | Mapping[str, RetrievalDataset] | None = None,
) -> None:
    """Raises the `ValueError` that `finetune` would raise before it encodes anything. Changes nothing.
    Only `finetune` itself can check whether a reference model fits the loss."""
    datasets = {"": dataset} if isinstance(dataset, RetrievalDataset) else dataset
    job = Job(embedder, datasets, config, {}, validation, {}, None)
    take_back = _taking_back(embedder)
    try:
        job.batches = _check(job, "refuse")
        embedder.lora = None
        if job.batches is not None and not config.references:
            try_loss(job)
    finally:
        take_back()


def _taking_back(embedder: Embedder) -> Callable[[], None]:
    """Returns a function that takes back what `_check` changes in the embedder."""
    encoders = [embedder.side(role).encoder for role in ("query", "document")]
    length, dropouts = embedder.max_length, [getattr(encoder, "attention_dropout", 0.0) for encoder in encoders]

    def take_back() -> None:
        embedder.max_length, embedder.lora = length, None
        for encoder, dropout in zip(encoders, dropouts, strict=True):
            encoder.attention_dropout = dropout

    return take_back


def _check(job: Job, existing: str) -> BatchSource | None:
    """Checks what needs no encoding, applies the settings, and makes loss and batches (None: they wait)."""
    embedder, config, batches = job.embedder, job.config, job.given.get("batches")
    if job.out is not None:
        distributed.from_first(lambda: run_folder.check_run(job.out, existing))
    run_folder.check_logger(config.log, job.out)
    for name in job.given.keys() & REPLACED.keys():
        config.check_unused(REPLACED[name], f"the argument {name} replaces it")
    job.loss = job.given.get("loss") or configured_loss(config)
    if not (isinstance(job.loss, nn.Module) and list(job.loss.parameters())):
        config.check_unused(("loss_lr",), "the loss has no parameters")
    is_unsaid = "loss" not in job.given and lacks_similarity(config.loss)
    if embedder.similarity == "dot" and not embedder.normalize and is_unsaid:
        raise ValueError("the model's similarity is the dot product: set loss.similarity to 'dot' or 'cosine'")
    job.frozen = choose_parts(embedder, config)
    if job.out is not None:
        check_lora_base(embedder)
    if config.kinds is not None:
        job.datasets = {name: chosen_kinds(name, part, config.kinds) for name, part in job.datasets.items()}
    if batches is None and config.mine_every is None and not config.teacher:
        batches = batches_of(embedder, job.datasets, config)
    check_validation(job)
    embedder.max_length = config.max_length or embedder.max_length
    for role in ("query", "document"):
        embedder.side(role).encoder.attention_dropout = config.attention_dropout
    job.config = replace(config, max_length=embedder.max_length)  # config.json records it
    if config.passages is not None:
        if job.references:
            raise ValueError("references cannot be combined with passages")
        embedder.pack([""], role="document", passages=config.passages)  # raises for invalid passages
    if job.validation is None:
        config.check_unused(("validation_passages",), "there is no validation data")
    else:
        check_settings(embedder, [Setting(passages=job.windows())])
    return batches


def _prepare(job: Job, existing: str) -> None:
    """Checks everything, applies the embedder's settings, and makes batches, loss and references."""
    batches = _check(job, existing)
    embedder, config = job.embedder, job.config
    lora, embedder.lora = embedder.lora, None  # what is encoded before training is the base's, as in its store
    data = joined(job.datasets)
    if config.teacher:
        job.datasets = taught(job)
        batches = batches_of(embedder, job.datasets, config) if config.mine_every is None else None
    job.batches = renewed(job, batches)
    job.hashes = {"model": embedder.sha256(), "train": data.sha256()}
    if config.teacher:
        job.hashes["taught"] = joined(job.datasets).sha256()
    job.hashes |= {f"validation {name}".strip(): held_out.sha256() for name, held_out in job.held_out().items()}
    job.references = frozen_references(job, data)
    job.constant = constant_vectors(embedder, data, config.lora_config())
    embedder.lora = lora
    job.settings = asdict(job.config)
    given = job.given | {f"reference {name}": reference for name, reference in job.references.items()}
    if objects := {name: describe_object(value) for name, value in given.items() if name not in job.hashes}:
        job.settings["objects"] = objects
    distributed.check_same({**job.hashes, **job.settings})
    try_loss(job)


def _open(job: Job, own_length: int, stack: contextlib.ExitStack, **how: Any) -> None:
    """Locks the run folder, checks that the model can be saved, and opens the run."""
    stack.enter_context(run_folder.lock(job.out))
    with (
        named_errors(job.out / run_folder.MODEL),
        temporary_path(job.out, ".trial.", Path.mkdir) as trial,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about the folder: saving the result warns
        job.embedder.save(trial)
    run_folder.open_run(job.out, job.settings, hashes=job.hashes, device=job.embedder.device, **how)
    if job.taught is not None and not (job.out / run_folder.LOG).exists():
        # Before step 0, the validation of the base, so that the log of a run without checkpoints keeps it.
        append_jsonl(job.out / run_folder.LOG, {"step": -1, "teacher": job.taught})
    # Evaluates the base at its own length. Otherwise, the first validation evaluates the base.
    if job.lacks_base() and ("evaluate" in job.given or own_length != job.config.max_length):
        job.embedder.max_length = own_length
        job.report(VALIDATION_BASE)
        job.embedder.max_length = job.config.max_length


def _train(job: Job) -> None:
    options = {"refresh_every": job.config.mine_every or 1, "constant": job.constant}
    if job.validation is not None:
        options["evaluate"] = lambda embedder: job.report(VALIDATION_BASE if job.lacks_base() else None).metrics
    if job.config.refresh_windows or job.config.mine_every is not None:
        options["refresh"] = lambda embedder: renewed(job, job.batches)
    options |= {name: value for name, value in job.given.items() if name not in ("loss", "batches")}
    # Vectors from weights that are about to change do not belong in the store.
    store, job.embedder.store = job.embedder.store, None
    try:
        with without_gradient(job.embedder, job.frozen):
            train(job.embedder, job.batches, job.loss, job.config, out=job.out, references=job.references, **options)
    finally:
        job.embedder.store = store
    if job.embedder.lora is not None and job.embedder.lora.config.merges:
        merge_lora(job.embedder)


def _close(job: Job) -> None:
    job.embedder.save(job.out / run_folder.MODEL)
    results = ""
    if job.validation is not None:
        base, tuned = load_reports(job.out / run_folder.EVAL / VALIDATION_BASE), job.report(VALIDATION)
        results = describe_change(base, tuned, select=job.config.select)
    if isinstance(job.embedder, Embedder | Scorer):
        write_card(job.out / run_folder.MODEL, job.embedder, training=_training_facts(job), results=results)
    run_folder.close_run(job.out)


def _training_facts(job: Job) -> dict[str, str]:
    """For the model card: base, data and the settings that are not the defaults."""
    source, plain = job.embedder.source, FinetuneConfig()
    changed = {f.name: getattr(job.config, f.name) for f in fields(plain)}
    changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
    if isinstance(own := job.given.get("batches"), Batches):
        parts = {"batch_size": own.sampler, "num_negatives": own.collate}
        changed |= {name: getattr(part, name, None) for name, part in parts.items()}
    objects = job.settings.get("objects", {})
    changed |= {name: objects[name]["name"] for name in ("loss", "optimizer") if name in objects}
    data = {n or "data": f"{len(d.queries):,} questions, {len(d.corpus):,} documents" for n, d in job.datasets.items()}
    found = {"base": source.name if source else "", "base, SHA-256": job.hashes["model"], **data}
    found |= {"data, SHA-256": job.hashes["train"], "loss": str(job.settings.get("loss", ""))}
    return {name: str(value) for name, value in (found | changed).items() if value not in ("", None)}
