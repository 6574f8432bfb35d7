"""embedft: fine-tune text embedding models for retrieval, and measure what it brought.

from embedft import RetrievalDataset, compare, evaluate, finetune, load_embedder

train_set, held_out = RetrievalDataset.load("pairs.csv").split(0.9, seed=0)
embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
before = evaluate(embedder, held_out)
finetune(embedder, train_set, out="runs/first")
print(compare(before, evaluate(embedder, held_out)))
"""

from .data.dataset import RetrievalDataset
from .encoders.adapter import Adapter
from .encoders.embedder import Embedder
from .encoders.loading import load_embedder
from .losses.registry import LOSSES, build_loss
from .losses.targets import Targets
from .recipe import FinetuneConfig, finetune
from .retrieval.bm25 import bm25_run
from .retrieval.evaluate import evaluate, evaluate_grid, evaluate_run
from .retrieval.fusion import fuse
from .retrieval.mining import mine
from .retrieval.report import Comparison, Report, compare
from .retrieval.run import Run
from .retrieval.search import Searcher, search
from .training.fit_adapter import AdapterConfig, fit_adapter

__all__ = [
    "LOSSES",
    "Adapter",
    "AdapterConfig",
    "Comparison",
    "Embedder",
    "FinetuneConfig",
    "Report",
    "RetrievalDataset",
    "Run",
    "Searcher",
    "Targets",
    "bm25_run",
    "build_loss",
    "compare",
    "evaluate",
    "evaluate_grid",
    "evaluate_run",
    "finetune",
    "fit_adapter",
    "fuse",
    "load_embedder",
    "mine",
    "search",
]
