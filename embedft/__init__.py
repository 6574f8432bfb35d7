"""embedft: fine-tune text embedding models for retrieval, and measure the difference.

from embedft import RetrievalDataset, compare, evaluate, finetune, load_embedder

train_set, held_out = RetrievalDataset.load("pairs.csv").split(0.9, seed=0)
embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
before = evaluate(embedder, held_out)
finetune(embedder, train_set, out="runs/first")
print(compare(before, evaluate(embedder, held_out)))

Each name is imported when it is first used, so `import embedft` and `embedft --help` load neither torch nor NumPy.
"""

import importlib

_MODULES = {
    "LOSSES": "losses.registry",
    "Adapter": "encoders.adapter",
    "AdapterConfig": "training.fit_adapter",
    "Comparison": "retrieval.report",
    "Embedder": "encoders.embedder",
    "FinetuneConfig": "recipe",
    "Report": "retrieval.report",
    "RetrievalDataset": "data.dataset",
    "Run": "retrieval.run",
    "Searcher": "retrieval.search",
    "Targets": "losses.targets",
    "bm25_run": "retrieval.bm25",
    "build_loss": "losses.registry",
    "compare": "retrieval.report",
    "evaluate": "retrieval.evaluate",
    "evaluate_grid": "retrieval.evaluate",
    "evaluate_run": "retrieval.evaluate",
    "finetune": "recipe",
    "fit_adapter": "training.fit_adapter",
    "fuse": "retrieval.fusion",
    "load_embedder": "encoders.loading",
    "mine": "retrieval.mining",
    "search": "retrieval.search",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
