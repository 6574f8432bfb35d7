"""Fine-tuning from start to end: training and retrieval put together.

`training` knows nothing of retrieval and retrieval nothing of training; here one is handed to the other.

    finetune(embedder, train_set, FinetuneConfig(epochs=2, batch_size=64), validation=held_out, out="runs/first")
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import setting, to_dict
from .data.batches import Batches
from .data.dataset import RetrievalDataset
from .encoders.embedder import Embedder
from .losses.registry import build_loss
from .retrieval.evaluate import evaluate, evaluate_run
from .retrieval.report import Report
from .retrieval.run import Run, check_trec_ids
from .training import runs
from .training.train import TrainConfig, train

VALIDATION, VALIDATION_BASE = "validation", "validation-base"


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """How to fine-tune: the settings of `TrainConfig`, and what a batch and a loss are."""

    batch_size: int = setting(32, "training pairs of a step")
    num_negatives: int = setting(0, "hard negatives of each query, taken from the dataset")
    max_length: int | None = setting(None, "tokens a text is cut to; null: the model's own")
    attention_dropout: float = setting(0.0, "on attention weights; above 0 it costs the fast kernels")
    loss: dict[str, Any] = setting({"name": "in_batch_negatives"}, "name and options of the loss")

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives is {self.num_negatives}, expected at least 0")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}, expected at least 0 and below 1")
        build_loss(self.loss)


def finetune(
    embedder: Embedder,
    dataset: RetrievalDataset,
    config: FinetuneConfig | None = None,
    *,
    validation: RetrievalDataset | None = None,
    out: str | Path | None = None,
    existing: str = "refuse",
) -> Embedder:
    """Fine-tunes `embedder` on the pairs of `dataset`; gives the same object back, with its best weights.

    Everything that can be found wrong without training is found before it. The loss does not follow the embedder: one
    whose similarity is "dot" needs a loss that names its own, {"name": "in_batch_negatives", "similarity": "dot"}.

    Args:
        validation: held-out questions by which the best weights are chosen (`config.select`); None: the last weights.
        out: run folder, see training/runs.py; `out/model` gets the model, `out/eval` the reports on `validation`
            before and after. None: nothing is written.
        existing: what to do about a run in `out`: "refuse", "overwrite", or "resume" from its last checkpoint.

    Raises:
        ValueError: on any of the inputs; `NonFiniteError` when training diverges.
    """
    config = config or FinetuneConfig()
    out = None if out is None else Path(out)
    batches = Batches(
        dataset, embedder.pack, batch_size=config.batch_size, seed=config.seed, num_negatives=config.num_negatives
    )
    cutoff = int(config.select.rpartition("@")[2]) if config.select.rpartition("@")[2].isdigit() else 10
    cutoffs = {"ks": sorted({1, 3, 5, 10, cutoff}), "depth": max(100, cutoff)}
    if validation is not None:
        # A run that found nothing: tells, without encoding, whether there is something to find and what is measured.
        metrics = evaluate_run(Run.from_dict({}), validation, **cutoffs).metrics
        if config.select not in metrics:
            raise ValueError(f"select is {config.select!r}, expected one of {', '.join(metrics)}")
    if embedder.similarity == "dot" and not embedder.normalize and "similarity" not in config.loss:
        raise ValueError("the model's similarity is the dot product: loss.similarity has to say 'dot' or 'cosine'")
    if config.max_length is not None:
        embedder.max_length = config.max_length
    embedder.encoder.attention_dropout = config.attention_dropout
    config = replace(config, max_length=embedder.max_length)  # so that the run's configuration says what it was
    if out is not None:
        hashes = {"model": embedder.sha256(), "train": dataset.sha256()}
        if validation is not None:
            hashes["validation"] = validation.sha256()
            check_trec_ids([*validation.queries, *validation.corpus])
        runs.open_run(out, to_dict(config), hashes=hashes, device=embedder.device, existing=existing)

    def measure(embedder: Embedder) -> Report:
        return evaluate(embedder, validation, **cutoffs)

    def validate(embedder: Embedder) -> dict[str, float]:
        report = measure(embedder)
        # The first validation of a run is of the base. A report is whole when it has its metrics.json.
        if out is not None and not (out / runs.EVAL / VALIDATION_BASE / "metrics.json").exists():
            report.save(out / runs.EVAL / VALIDATION_BASE)
        return report.metrics

    evaluation = None if validation is None else validate
    train(embedder, batches, build_loss(config.loss), config, out=out, evaluate=evaluation)
    if out is not None:
        embedder.save(out / runs.MODEL)
        if validation is not None:
            measure(embedder).save(out / runs.EVAL / VALIDATION)
        runs.close_run(out)
    return embedder
