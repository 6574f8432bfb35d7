"""Fine-tuning end to end: joins training and retrieval, which do not depend on each other.

finetune(embedder, train_set, FinetuneConfig(epochs=2, batch_size=64), validation=held_out, out="runs/first")
finetune(embedder, train_set, config, loss=my_loss, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data.batches import Batches, make_batches
from .data.dataset import RetrievalDataset
from .data.mixture import join_datasets, make_mixture
from .encoders.card import write_card
from .encoders.embedder import Embedder
from .encoders.loading import check_lora_base, load_embedder
from .encoders.lora import merge_lora
from .encoders.openai_api import ApiEmbedder
from .encoders.scoring import Scorer
from .encoders.token_cache import token_cache
from .files import named_errors, temporary_path
from .losses.registry import LOSSES, Loss, loss_options
from .objects import describe_object
from .retrieval.evaluate import evaluate as evaluate_embedder
from .retrieval.evaluate import evaluate_run
from .retrieval.metrics import select_metrics
from .retrieval.mining import mine
from .retrieval.report import Report
from .retrieval.run import Run
from .retrieval.tables import format_change
from .training import distributed, run_folder
from .training.configs import MINING, FinetuneConfig, configured_loss
from .training.optim import MakeOptimizer
from .training.parts import choose_parts, constant_vectors, without_gradient
from .training.references import FrozenEmbeddings, Reference, best_windows, targets_with
from .training.train import BatchSource, Constant, Evaluate, OnStep, Refresh, train

VALIDATION, VALIDATION_BASE = "validation", "validation-base"
BATCHING = ("batch_size", "batch_tokens", "num_negatives", "examples", "target_scores", "no_duplicates")
REFRESHING = ("refresh_windows", "mine_every")
REPLACED = {
    "loss": ("loss",),
    "batches": (*BATCHING, "windows_per_document", "sampling", "sampling_temperature", "mixed", *REFRESHING),
    "optimizer": ("lr", "loss_lr", "lr_parts", "lr_decay", "weight_decay"),
    "refresh": REFRESHING,
}


@dataclass
class _Job:
    """The state of one `finetune` call: its arguments, and what `_prepare` derives from them."""

    embedder: Embedder
    datasets: Mapping[str, RetrievalDataset]  # {"": dataset} for a single one
    config: FinetuneConfig
    given: dict[str, Any]  # the objects passed in, by argument
    validation: RetrievalDataset | None
    references: Mapping[str, Embedder | Reference]
    out: Path | None
    loss: Loss | None = None
    batches: BatchSource | None = None
    frozen: set[str] = field(default_factory=set)  # names of parameters that are not trained
    constant: dict[str, Constant] = field(default_factory=dict)  # by role: vectors that do not change
    hashes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # for config.json

    def lacks_base(self) -> bool:
        """Whether the base model's report has yet to be saved; metrics.json is written last."""
        is_wanted = self.out is not None and self.validation is not None
        return is_wanted and not (self.out / run_folder.EVAL / VALIDATION_BASE / "metrics.json").exists()

    def report(self, save_as: str | None = None) -> Report:
        found = evaluate_embedder(self.embedder, self.validation, passages=self.config.passages, **self.measured())
        if save_as == VALIDATION:
            name = f"{found.setting.get('model', 'model')} + fine-tuned"
            found = replace(found, setting=found.setting | {"model": name})
        if save_as is not None:
            found.save(self.out / run_folder.EVAL / save_as)
        return found

    def measured(self) -> dict[str, Any]:
        """Arguments for `evaluate`: the default metrics plus `select`, and a depth that covers both."""
        if "evaluate" in self.given:
            return {}
        select, k = self.config.select, self.config.select.partition("@")[2]
        ks = sorted({1, 3, 5, 10, int(k) if k.isdigit() else 10})
        options = {"ks": ks, "depth": max(100, ks[-1])}
        try:
            chosen = select_metrics([select], **options)
        except ValueError as error:
            raise ValueError(f"select is {select!r}: {error}") from None
        return {"metrics": list(dict.fromkeys(select_metrics(**options) + chosen)), "depth": options["depth"]}


def finetune(
    embedder: Embedder,
    dataset: RetrievalDataset | Mapping[str, RetrievalDataset],
    config: FinetuneConfig | None = None,
    *,
    validation: RetrievalDataset | None = None,
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
        validation: held-out questions on which `config.select` picks the best weights; None: keep the last weights.
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
    job = _Job(embedder, datasets, config or FinetuneConfig(), given, validation, references or {}, out)
    before = embedder.max_length, getattr(embedder.encoder, "attention_dropout", 0.0)
    with token_cache(embedder, job.config.token_memory * 2**20), contextlib.ExitStack() as stack:
        try:
            _prepare(job, existing)
            if out is not None:
                how = {"existing": existing, "allow_changed_code": allow_changed_code}
                distributed.encoding_together(embedder, lambda: _open(job, before[0], stack, **how))
        except BaseException:
            embedder.max_length, embedder.encoder.attention_dropout, embedder.lora = *before, None
            raise
        _train(job)
        if out is not None:
            distributed.encoding_together(embedder, lambda: _close(job))
    return embedder


def _prepare(job: _Job, existing: str) -> None:
    """Checks everything, applies the embedder's settings, and makes batches, loss and references."""
    embedder, config, batches = job.embedder, job.config, job.given.get("batches")
    if job.out is not None:
        distributed.from_first(lambda: run_folder.check_run(job.out, existing))
    run_folder.check_logger(config.log, job.out)
    for name in job.given.keys() & REPLACED.keys():
        config.check_unused(REPLACED[name], f"the argument {name} replaces it")
    job.loss = job.given.get("loss") or configured_loss(config)
    if not (isinstance(job.loss, nn.Module) and list(job.loss.parameters())):
        config.check_unused(("loss_lr",), "the loss has no parameters")
    is_unsaid = "loss" not in job.given and _lacks_similarity(config.loss)
    if embedder.similarity == "dot" and not embedder.normalize and is_unsaid:
        raise ValueError("the model's similarity is the dot product: set loss.similarity to 'dot' or 'cosine'")
    job.frozen = choose_parts(embedder, config)
    if job.out is not None:
        check_lora_base(embedder)
    lora, embedder.lora = embedder.lora, None  # what is encoded before training is the base's, as in its store
    data = job.datasets[""] if "" in job.datasets else join_datasets(job.datasets)
    if batches is None and config.mine_every is None:
        batches = _make_batches(embedder, job.datasets, config)
    if job.validation is not None:
        evaluate_run(Run.from_dict({}), job.validation, **job.measured())  # raises if no query has a relevant document
        if (shared := job.validation.shares_with(data)) and distributed.rank_and_size()[0] == 0:
            warnings.warn(shared, stacklevel=3)
    embedder.max_length = config.max_length or embedder.max_length
    for role in ("query", "document"):
        embedder.side(role).encoder.attention_dropout = config.attention_dropout
    job.config = replace(config, max_length=embedder.max_length)  # config.json records it
    if config.passages is not None:
        if job.references:
            raise ValueError("references cannot be combined with passages")
        embedder.pack([""], role="document", passages=config.passages)  # raises for invalid passages
    job.batches = _renewed(job, batches)
    job.hashes = {"model": embedder.sha256(), "train": data.sha256()}
    if job.validation is not None:
        job.hashes["validation"] = job.validation.sha256()
    job.references = _frozen(job, data)
    job.constant = constant_vectors(embedder, data, config.lora_config())
    embedder.lora = lora
    job.settings = asdict(job.config)
    given = job.given | {f"reference {name}": reference for name, reference in job.references.items()}
    if objects := {name: describe_object(value) for name, value in given.items() if name not in job.hashes}:
        job.settings["objects"] = objects
    distributed.check_same({**job.hashes, **job.settings})
    _try_loss(job)


def _open(job: _Job, own_length: int, stack: contextlib.ExitStack, **how: Any) -> None:
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
    # Evaluates the base at its own length. Otherwise, the first validation evaluates the base.
    if job.lacks_base() and ("evaluate" in job.given or own_length != job.config.max_length):
        job.embedder.max_length = own_length
        job.report(VALIDATION_BASE)
        job.embedder.max_length = job.config.max_length


def _train(job: _Job) -> None:
    options = {"refresh_every": job.config.mine_every or 1, "constant": job.constant}
    if job.validation is not None:
        options["evaluate"] = lambda embedder: job.report(VALIDATION_BASE if job.lacks_base() else None).metrics
    if job.config.refresh_windows or job.config.mine_every is not None:
        options["refresh"] = lambda embedder: _renewed(job, job.batches)
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


def _close(job: _Job) -> None:
    job.embedder.save(job.out / run_folder.MODEL)
    results = ""
    if job.validation is not None:
        base, tuned = Report.load(job.out / run_folder.EVAL / VALIDATION_BASE), job.report(VALIDATION)
        table = format_change(base, tuned, select=job.config.select)
        questions, length = f"{len(tuned.query_ids):,} held-out questions", base.setting["max_length"]
        results = f"On the {questions} that chose the weights; the base at max_length {length:,}:\n\n{table}"
    if isinstance(job.embedder, Embedder | Scorer):
        write_card(job.out / run_folder.MODEL, job.embedder, training=_training_facts(job), results=results)
    run_folder.close_run(job.out)


def _training_facts(job: _Job) -> dict[str, str]:
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


def _renewed(job: _Job, batches: BatchSource | None) -> BatchSource:
    """The batches, with negatives and windows found by the current model; rank 0 searches, all ranks encode."""
    embedder, config = job.embedder, job.config
    if config.mine_every is not None:
        batches = _make_batches(embedder, _mined(job), config)
    if config.passages is not None and "batches" not in job.given:
        found = distributed.encoding_together(embedder, lambda: best_windows(embedder, batches))
        batches = replace(batches, collate=replace(batches.collate, best_windows=found))
    return batches


def _mined(job: _Job) -> dict[str, RetrievalDataset]:
    names = (*MINING, "num_negatives", "seed", "passages")
    options = {"replace": True} | {name.removeprefix("mine_"): getattr(job.config, name) for name in names}

    def find() -> dict[str, dict[str, list[str]]]:
        found = {name: mine(job.embedder, part, **options).negatives for name, part in job.datasets.items()}
        if not any(found.values()):
            raise ValueError("mining found no hard negatives: mine_ranks or the margins rule out every document")
        return found

    found = distributed.encoding_together(job.embedder, find)
    return {name: replace(part, negatives=found[name]) for name, part in job.datasets.items()}


def _make_batches(embedder: Embedder, datasets: Mapping[str, RetrievalDataset], config: FinetuneConfig) -> Batches:
    options = {name: getattr(config, name) for name in (*BATCHING, "windows_per_document", "passages", "seed")}
    options["batch_size"] = None if config.batch_tokens else config.batch_size
    if config.mine_every is not None:  # mining may find fewer
        most = max(len(ids) for part in datasets.values() for ids in part.negatives.values())
        options["num_negatives"] = min(config.num_negatives, most)
    if "" in datasets:
        config.check_unused(("sampling", "mixed"), "there is only one dataset")
        return make_batches(datasets[""], embedder.pack, **options)
    sampling = {"sampling": config.sampling, "temperature": config.sampling_temperature, "mixed": config.mixed}
    return make_mixture(datasets, embedder.pack, **sampling, **options)


def _lacks_similarity(spec: Any) -> bool:
    """Whether a loss, or one inside it, has an option `similarity` that is not set."""
    if isinstance(spec, list):
        return any(map(_lacks_similarity, spec))
    if not isinstance(spec, dict):
        return False
    takes = "name" in spec and "similarity" in loss_options(LOSSES[spec["name"]])
    return (takes and "similarity" not in spec) or any(map(_lacks_similarity, spec.values()))


def _frozen(job: _Job, dataset: RetrievalDataset) -> dict[str, Reference]:
    """Every reference as a function of the batch; adds the hashes of models to `job.hashes`."""
    if twice := job.config.references.keys() & job.references.keys():
        raise ValueError(f"reference {min(twice)!r} is given twice: in config.references and in references")
    found = dict(job.references)
    for name, model in job.config.references.items():
        found[name] = job.embedder if model is None else load_embedder(model, device=job.embedder.device)
    for name, reference in found.items():
        if isinstance(reference, Embedder):
            job.hashes[f"reference {name}"] = reference.sha256()
            # Training changes all dimensions of the embedder, even if `encode` truncates them.
            dim = job.embedder.full_dim if reference is job.embedder else None
            found[name] = FrozenEmbeddings(reference, dataset, dim=dim)
    return found


def _try_loss(job: _Job) -> None:
    """Runs the loss of the first batch on zeros, to catch a missing reference or score, or a wrong width, early."""
    batch = next(iter(job.batches.epoch(0)))
    Q, D = (torch.zeros(part.num_sequences, job.embedder.full_dim) for part in (batch.queries, batch.documents))
    # A copy in evaluation mode draws no random numbers and counts no calls. Training warns, once.
    loss = copy.deepcopy(job.loss).cpu().eval() if isinstance(job.loss, nn.Module) else job.loss
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(Q.requires_grad_(), D.requires_grad_(), targets_with(job.references, batch))
