"""embedft: fine-tune text embedding models for retrieval, and measure the difference.

from embedft import RetrievalDataset, compare, evaluate, finetune, load_embedder

train_set, held_out = RetrievalDataset.load("pairs.csv").split(0.9, seed=0)
embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
before = evaluate(embedder, held_out)
finetune(embedder, train_set, out="runs/first")
print(compare(before, evaluate(embedder, held_out)))

Names are imported on first use, so `import embedft` and `embedft --help` load neither torch nor NumPy.
"""

import importlib

_NAMES = {
    "data.dataset": "RetrievalDataset",
    "encoders.adapter": "Adapter",
    "encoders.embedder": "Embedder",
    "encoders.loading": "load_embedder",
    "encoders.scoring": "Scorer load_scorer new_scorer",
    "losses.registry": "LOSSES build_loss",
    "losses.targets": "Targets",
    "recipe.finetune": "finetune",
    "recipe.scorer": "finetune_scorer",
    "retrieval.bm25": "bm25_run",
    "retrieval.evaluate": "evaluate evaluate_grid evaluate_run",
    "retrieval.fusion": "fuse",
    "retrieval.mining": "mine",
    "retrieval.report": "Comparison Report compare",
    "retrieval.rerank": "rerank with_scores",
    "retrieval.run": "Run",
    "retrieval.search": "Searcher search",
    "retrieval.suite": "Suite",
    "retrieval.taught": "teach",
    "retrieval.teacher": "Teacher load_teacher",
    "training.configs": "AdapterConfig FinetuneConfig",
    "training.fit_adapter": "fit_adapter",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
