"""What a run trains on and compares with: batches, mined negatives, best windows, references, validation."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..api.endpoint import EndpointConfig
from ..config import check_types
from ..data.batches import Batches, make_batches
from ..data.dataset import RetrievalDataset
from ..data.mixture import join_datasets, make_mixture
from ..encoders.embedder import Embedder
from ..encoders.loading import API_PREFIX, load_embedder
from ..encoders.store import LISTS
from ..losses.registry import LOSSES, loss_options
from ..retrieval.evaluate import evaluate_run
from ..retrieval.mining import mine
from ..retrieval.run import Run
from ..retrieval.suite import about, check_names
from ..retrieval.taught import teach
from ..retrieval.teacher import load_teacher
from ..training import distributed
from ..training.configs import MARGINS, MINING, FinetuneConfig
from ..training.references import FrozenEmbeddings, Reference, best_windows, targets_with
from ..training.train import BatchSource
from .job import Job

BATCHING = ("batch_size", "batch_tokens", "num_negatives", "examples", "target_scores", "no_duplicates")


def joined(datasets: Mapping[str, RetrievalDataset]) -> RetrievalDataset:
    """All of `Job.datasets` as one."""
    return datasets[""] if "" in datasets else join_datasets(datasets)


def renewed(job: Job, batches: BatchSource | None) -> BatchSource:
    """The batches, with negatives and windows found by the current model; rank 0 searches, all ranks encode."""
    embedder, config = job.embedder, job.config
    if config.mine_every is not None:
        batches = batches_of(embedder, _mined(job), config)
    if config.passages is not None and "batches" not in job.given:
        found = distributed.encoding_together(embedder, lambda: best_windows(embedder, batches))
        batches = replace(batches, collate=replace(batches.collate, best_windows=found))
    return batches


def _mined(job: Job) -> dict[str, RetrievalDataset]:
    names = (*MINING, "num_negatives", "seed", "passages")
    options = {"replace": True} | {name.removeprefix("mine_"): getattr(job.config, name) for name in names}

    def find() -> dict[str, dict[str, list[str]]]:
        found = {name: mine(job.embedder, part, **options).negatives for name, part in job.datasets.items()}
        if not any(found.values()):
            raise ValueError("mining found no hard negatives: mine_ranks or the margins rule out every document")
        return found

    found = distributed.encoding_together(job.embedder, find)
    return {name: replace(part, negatives=found[name]) for name, part in job.datasets.items()}


def taught(job: Job) -> dict[str, RetrievalDataset]:
    """The datasets with what the teacher says of them; adds to `job.taught`. Rank 0 asks the teacher."""
    config, student, settings = job.config, job.embedder, job.config.teacher_config()
    check_types(EndpointConfig, settings.api, "teacher: api: ")
    store, models = student.store, settings.models
    place = job.out if store is None else store.folder
    lists = None if place is None else Path(place) / LISTS
    is_asking = any(name.startswith(API_PREFIX) for name in ([models] if isinstance(models, str) else models))
    if store is None and lists is not None and is_asking:
        store = lists / "vectors"  # so that none is paid for twice

    def find() -> tuple[dict[str, tuple[dict, dict, dict]], dict[str, int]]:
        options = {name: getattr(settings, name) for name in ("passages", "scale", "api", "bm25")}
        teacher = load_teacher(models, device=student.device, store=store, **options)
        how = {name: getattr(settings, name) for name in ("depth", "ranking", "relabel")}
        how |= {name.removeprefix("mine_"): getattr(config, name) for name in MARGINS}
        how |= {"passages": config.passages, "folder": lists}
        found = {}
        for name, part in job.datasets.items():
            with about(name):
                found[name] = teach(teacher, student, part, **how)
        counts = {name: sum(own[name] for _, own in found.values()) for name in ("scored", "relabelled", "dropped")}
        return {name: (part.qrels, part.negatives, part.scores) for name, (part, _) in found.items()}, counts

    found, job.taught = distributed.encoding_together(student, find)
    fields = ("qrels", "negatives", "scores")
    return {name: replace(part, **dict(zip(fields, found[name], strict=True))) for name, part in job.datasets.items()}


def batches_of(embedder: Embedder, datasets: Mapping[str, RetrievalDataset], config: FinetuneConfig) -> Batches:
    """Batches of one dataset, or of several as `config.sampling` says."""
    options = {name: getattr(config, name) for name in (*BATCHING, "windows_per_document", "passages", "seed")}
    options["batch_size"] = None if config.batch_tokens else config.batch_size
    if config.mine_every is not None or config.teacher:  # there may be fewer
        most = max((len(ids) for part in datasets.values() for ids in part.negatives.values()), default=0)
        options["num_negatives"] = min(config.num_negatives, most)
    if "" in datasets:
        config.check_unused(("sampling", "mixed"), "there is only one dataset")
        return make_batches(datasets[""], embedder.pack, **options)
    sampling = {"sampling": config.sampling, "temperature": config.sampling_temperature, "mixed": config.mixed}
    return make_mixture(datasets, embedder.pack, **sampling, **options)


def chosen_kinds(name: str, dataset: RetrievalDataset, kinds: list[str]) -> RetrievalDataset:
    """The dataset with the questions of these kinds alone; errors begin with its name, if it has one."""
    with about(f"kinds: {name}" if name else "kinds"):
        return dataset.of_kinds(kinds)


def check_validation(job: Job) -> None:
    """Raises `ValueError` for validation data that cannot be evaluated on; warns of what is also in training."""
    if job.validation is None:
        return
    if not isinstance(job.validation, RetrievalDataset):
        check_names(job.validation)
        if not job.validation:
            raise ValueError("validation is empty, expected a dataset, or {name: dataset}")
    measured, train_set = job.measured(), joined(job.datasets)
    for name, held_out in job.held_out().items():
        with about(name):
            evaluate_run(Run.from_dict({}), held_out, **measured)  # raises if no query has a relevant document
        if (shared := held_out.shares_with(train_set)) and distributed.rank_and_size()[0] == 0:
            warnings.warn(f"{name}: {shared}" if name else shared, stacklevel=5)


def lacks_similarity(spec: Any) -> bool:
    """Whether a loss, or one inside it, has an option `similarity` that is not set."""
    if isinstance(spec, list):
        return any(map(lacks_similarity, spec))
    if not isinstance(spec, dict):
        return False
    takes = "name" in spec and "similarity" in loss_options(LOSSES[spec["name"]])
    return (takes and "similarity" not in spec) or any(map(lacks_similarity, spec.values()))


def frozen_references(job: Job, dataset: RetrievalDataset) -> dict[str, Reference]:
    """Every reference as a function of the batch; adds the hashes of models to `job.hashes`."""
    if twice := job.config.references.keys() & job.references.keys():
        raise ValueError(f"reference {min(twice)!r} is given twice: in config.references and in references")
    found = dict(job.references)
    for name, model in job.config.references.items():
        how = {"device": job.embedder.device, "store": job.embedder.store}
        found[name] = job.embedder if model is None else load_embedder(model, **how)
    for name, reference in found.items():
        if isinstance(reference, Embedder):
            job.hashes[f"reference {name}"] = reference.sha256()
            # Training changes all dimensions of the embedder, even if `encode` truncates them.
            dim = job.embedder.full_dim if reference is job.embedder else None
            found[name] = FrozenEmbeddings(reference, dataset, dim=dim)
    return found


def try_loss(job: Job) -> None:
    """Runs the loss of the first batch on zeros, to catch a missing reference or score, or a wrong width, early."""
    batch = next(iter(job.batches.epoch(0)))
    Q, D = (torch.zeros(part.num_sequences, job.embedder.full_dim) for part in (batch.queries, batch.documents))
    # A copy in evaluation mode draws no random numbers and counts no calls. Training warns, once.
    loss = copy.deepcopy(job.loss).cpu().eval() if isinstance(job.loss, nn.Module) else job.loss
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(Q.requires_grad_(), D.requires_grad_(), targets_with(job.references, batch))
