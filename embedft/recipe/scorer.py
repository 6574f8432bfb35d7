"""Fine-tuning a cross-encoder end to end, with the loop, the run folders and the losses of embedders.

mined = mine(embedder, train_set, num_negatives=8)
finetune_scorer(new_scorer(embedder), mined, FinetuneConfig(epochs=1, lr=2e-5), out="runs/scorer")
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..data.batches import make_batches
from ..data.collate import PairCollate
from ..data.dataset import RetrievalDataset
from ..encoders.card import add_results
from ..encoders.scoring import Scorer
from ..losses.registry import Loss, build_loss
from ..retrieval.evaluate import evaluate_run
from ..retrieval.report import Report
from ..retrieval.rerank import rerank
from ..retrieval.run import Run
from ..retrieval.tables import format_change
from ..training import distributed, run_folder
from ..training.configs import FinetuneConfig
from .finetune import finetune
from .job import VALIDATION, VALIDATION_BASE

LISTED = ("listwise_cross_entropy", "binary_cross_entropy", "margin_mse", "listwise_kl")
LISTED += ("approx_ndcg", "ranknet", "pearson")
DEFAULT_LOSS = MappingProxyType({"name": LISTED[0]})


def finetune_scorer(
    scorer: Scorer,
    dataset: RetrievalDataset,
    config: FinetuneConfig | None = None,
    *,
    batch_size: int = 16,
    num_negatives: int = 4,
    loss: Mapping[str, Any] | Loss = DEFAULT_LOSS,
    validation: tuple[RetrievalDataset, Run] | None = None,
    **options: Any,
) -> Scorer:
    """Fine-tunes a cross-encoder on the relevant documents and hard negatives of each query, and returns it.

    Args:
        dataset: with hard negatives, from `mine` for example. If it has `scores`, losses get them as a teacher's.
        batch_size, num_negatives: queries per batch, and the most hard negatives of each; not those of `config`.
        loss: one of `LISTED`, with the dot product, or your own over listed documents.
        validation: held-out queries, and the run whose documents are rescored; `config.select` picks the best weights.
        options: `out`, `existing` and others, as for `finetune`.

    Raises like `finetune`, and `ValueError` for a dataset without hard negatives."""
    if not any(dataset.negatives.get(query_id) for query_id in dataset.queries):
        raise ValueError("no query of the dataset has a hard negative, which a cross-encoder learns from: use mine()")
    config = config or FinetuneConfig()
    config.check_unused(("batch_size", "num_negatives"), "finetune_scorer has an argument for it")
    unused = ("lora", "passages", "validation_passages", "references")
    config.check_unused(unused, "a cross-encoder is trained whole, and on pairs")
    if isinstance(loss, Mapping):  # others would compare scores of different queries
        for name, valid in (("name", LISTED), ("similarity", ("dot",))):
            if (value := loss.get(name, "dot")) not in valid:
                raise ValueError(f"loss {name} is {value!r}, expected one of {', '.join(valid)}")
    listed = {"num_negatives": num_negatives, "seed": config.seed, "target_scores": bool(dataset.scores)}
    batches = make_batches(dataset, scorer.pack, batch_size=batch_size, **listed)
    collate = PairCollate(dataset, scorer.pack, pack_pairs=scorer.pack_pairs, **listed)
    options |= {"batches": replace(batches, collate=collate), "loss": build_loss(loss)}
    if validation is None:
        return finetune(scorer, dataset, config, **options)
    held_out, run = validation
    _reports = Path(options["out"]) / run_folder.EVAL if options.get("out") else None  # "_": not a setting to record

    def evaluate(scorer: Scorer) -> Mapping[str, float]:
        report = evaluate_run(rerank(scorer, held_out, run), held_out)
        if _reports is not None and not (_reports / VALIDATION_BASE / "metrics.json").exists():
            report.save(_reports / VALIDATION_BASE)
        return report.metrics

    finetune(scorer, dataset, config, evaluate=evaluate, **options)
    if _reports is not None:
        distributed.from_first(lambda: _compare_with_base(scorer, validation, _reports, config.select))
    return scorer


def _compare_with_base(scorer: Scorer, validation: tuple[RetrievalDataset, Run], reports: Path, select: str) -> None:
    """Saves a report on the held-out queries, and adds what training changed to the model card."""
    held_out, run = validation
    tuned = evaluate_run(rerank(scorer, held_out, run), held_out)
    tuned.save(reports / VALIDATION)
    table = format_change(Report.load(reports / VALIDATION_BASE), tuned, select=select)
    questions = f"{len(tuned.query_ids):,} held-out questions"
    results = f"On the {questions} that chose the weights; both reorder the same run:\n\n{table}"
    add_results(reports.parent / run_folder.MODEL, results)
