"""Fine-tuning a cross-encoder end to end, with the loop, the run folders and the losses of embedders.

mined = mine(embedder, train_set, num_negatives=8)
finetune_scorer(new_scorer(embedder), mined, FinetuneConfig(epochs=1, lr=2e-5), out="runs/scorer")
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .data.batches import make_batches
from .data.collate import PairCollate
from .data.dataset import RetrievalDataset
from .encoders.scoring import Scorer
from .losses.registry import Loss, build_loss
from .recipe import finetune
from .retrieval.evaluate import evaluate_run
from .retrieval.rerank import rerank
from .retrieval.run import Run
from .training.configs import FinetuneConfig

LISTED = ("listwise_cross_entropy", "binary_cross_entropy", "margin_mse", "listwise_kl")
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
    config.check_unused(("lora", "passages", "references"), "a cross-encoder is trained whole, and on pairs")
    if isinstance(loss, Mapping):  # others would compare scores of different queries
        for name, valid in (("name", LISTED), ("similarity", ("dot",))):
            if (value := loss.get(name, "dot")) not in valid:
                raise ValueError(f"loss {name} is {value!r}, expected one of {', '.join(valid)}")
    listed = {"num_negatives": num_negatives, "seed": config.seed, "target_scores": bool(dataset.scores)}
    batches = make_batches(dataset, scorer.pack, batch_size=batch_size, **listed)
    collate = PairCollate(dataset, scorer.pack, pack_pairs=scorer.pack_pairs, **listed)
    options |= {"batches": replace(batches, collate=collate), "loss": build_loss(loss)}
    if validation is not None:
        held_out, run = validation
        options["evaluate"] = lambda scorer: evaluate_run(rerank(scorer, held_out, run), held_out).metrics
    return finetune(scorer, dataset, config, **options)
