"""Evaluating given embeddings against sentence-transformers' evaluator; metrics against trec_eval and ranx; statistics.

Documents are perturbed encodings of the contexts of the finance questions (vectors.py) in a memory-mapped file; queries
are perturbed documents. A query's own document is relevant to it, and for every fourth query, so are up to three others
with the same context. Values are multiples of 1/256, so every inner product is exact in float32: scores are equal to
the last bit, ties included, and rounding decides nothing.

Before timing, results must agree: all metrics of the evaluation with sentence-transformers' to 1e-9; metrics per query
with trec_eval's to 1e-9, in its order of ties, and, if ranx is installed, with its to 1e-6 (on ranks instead of scores,
because it leaves ties open); and the interval with SciPy's within Monte Carlo error.

sentence-transformers evaluates in Python, so it gets fewer documents and queries. Its time for all of them is
extrapolated linearly in documents x queries, and marked as such; it works in chunks of 50,000 documents.

    python -m benchmarks.bench_evaluate
    python -m benchmarks.bench_evaluate --documents 20000 --queries 500 --texts 1000
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytrec_eval
import scipy.stats
import torch

from embedft import RetrievalDataset, Run, evaluate, evaluate_run
from embedft.retrieval.metrics import Qrels, average_precision, judge, measure
from embedft.retrieval.significance import paired_bootstrap_interval, sign_flip_p_value

from . import suite
from .suite import DTYPES, Row, make_parser
from .vectors import add_vectors, encode_texts, perturbed, rounded, write_perturbed
from .workers import Worker, alternate, most_anonymous

TOLERANCE, RANX_TOLERANCE = 1e-9, 1e-6
MEMORY_LIMIT, METRICS_LIMIT, BOOTSTRAP_LIMIT = 1.5, 2, 3
STEPS, QUERY_NOISE = 256, 2.0
KS = (1, 3, 5, 10)
NUM_SAMPLES, NUM_QUESTIONS = 10_000, 10_000
# How far interval ends may differ, in standard errors of the mean: 5 standard errors of an end from 10,000 samples.
INTERVAL_TOLERANCE = 0.2


class Task(NamedTuple):
    """What both evaluate: the first documents of a file, queries, and the rows of each query's relevant documents."""

    path: str
    num_documents: int
    queries_QD: np.ndarray
    relevant: list[list[int]]

    def size(self) -> str:
        return f"{self.num_documents:,} x {len(self.relevant):,}"

    def dataset(self) -> RetrievalDataset:
        """The text of a document or query is its row number."""
        queries = {f"q{row:06d}": str(row) for row in range(len(self.relevant))}
        corpus = {f"d{row:08d}": str(row) for row in range(self.num_documents)}
        qrels = zip(queries, self.relevant, strict=True)
        return RetrievalDataset(
            queries, corpus, {query_id: {f"d{row:08d}": 1 for row in rows} for query_id, rows in qrels}
        )


class Watched:
    """A contestant with a method `evaluate` that returns metrics."""

    def watched(self) -> tuple[dict[str, float], int, int]:
        """Returns (metrics, anonymous bytes before, peak anonymous bytes)."""
        return most_anonymous(self.evaluate)


class Ours(Watched):
    """embedft's evaluation of an embedder that returns given rows."""

    similarity = "dot"

    def __init__(self, task: Task, depth: int):
        self.task, self.depth, self.dataset = task, depth, task.dataset()
        self.documents_ND = np.load(task.path, mmap_mode="r")[: task.num_documents]

    def encode(self, texts: list[str], *, role: str, dim: int | None) -> np.ndarray:
        rows = np.fromiter(map(int, texts), dtype=np.int64, count=len(texts))
        vectors = self.task.queries_QD if role == "query" else self.documents_ND
        in_order = len(rows) > 0 and (np.diff(rows) == 1).all()
        return vectors[rows[0] : rows[-1] + 1] if in_order else vectors[rows]

    def evaluate(self) -> dict[str, float]:
        self.report = evaluate(self, self.dataset, ks=KS, depth=self.depth)
        return self.report.metrics

    def found(self) -> tuple[Run, dict[str, float]]:
        """The ranking, and the costs in the report."""
        return self.report.run, self.report.costs


class Peer(Watched):
    """sentence-transformers' evaluator, and its model, which returns given rows."""

    similarity_fn_name = "dot"

    def __init__(self, task: Task, depth: int):
        from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
        from sentence_transformers.util import dot_score

        self.similarity, self.model_card_data = dot_score, self
        self.queries_QD = torch.from_numpy(task.queries_QD)
        # Copy-on-write, because torch warns about read-only arrays.
        self.documents_ND = torch.from_numpy(np.load(task.path, mmap_mode="c"))
        dataset = task.dataset()
        relevant = {query_id: set(grades) for query_id, grades in dataset.qrels.items()}
        self.evaluator = InformationRetrievalEvaluator(
            dataset.queries, dataset.corpus, relevant, map_at_k=[depth], write_csv=False
        )

    def encode_query(self, texts: list[str], **options) -> torch.Tensor:
        return self.queries_QD

    def encode_document(self, texts: list[str], **options) -> torch.Tensor:
        return self.documents_ND[int(texts[0]) : int(texts[-1]) + 1]

    def set_evaluation_metrics(self, *arguments) -> None:
        """Ignores the results, meant for a model card."""

    def evaluate(self) -> dict[str, float]:
        return {name.removeprefix("dot_"): float(value) for name, value in self.evaluator(self).items()}


def make_tasks(options: argparse.Namespace, folder: str) -> tuple[Task, Task]:
    """A task with all documents and queries, and a smaller one that sentence-transformers gets too."""
    encoded_CD = encode_texts(options, "document")
    path = Path(folder, "documents.npy")
    documents_ND = write_perturbed(path, encoded_CD, options.documents, noise=options.noise, steps=STEPS)

    def task(num_documents: int, num_queries: int) -> Task:
        rows = np.random.default_rng(1).choice(num_documents, num_queries, replace=num_queries > num_documents)
        queries_QD = perturbed(documents_ND[rows], range(num_queries), QUERY_NOISE, 1)
        # Every C-th document has the same context.
        relevant = [
            [row, *range(row + len(encoded_CD), num_documents, len(encoded_CD))][: 1 if i % 4 else 4]
            for i, row in enumerate(rows.tolist())
        ]
        return Task(str(path), num_documents, rounded(queries_QD, STEPS), relevant)

    few = min(options.documents, options.peer_documents), min(options.queries, options.peer_queries)
    return task(options.documents, options.queries), task(*few)


def require_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], who: str, most: float) -> float:
    """The largest difference over the names in `expected`; a `ValueError` if it exceeds `most`."""
    return max(suite.require_close(who, found[name], value, most, name) for name, value in expected.items())


def whole(options: argparse.Namespace, folder: str) -> tuple[list[Row], Run, RetrievalDataset]:
    """Compares whole evaluations; also returns the run and the dataset with all documents and queries."""
    large, small = make_tasks(options, folder)
    peer_name = f"sentence-transformers {suite.version('sentence-transformers')}"
    ours, peer = Worker(Ours, small, options.depth), Worker(Peer, small, options.depth)
    expected, *peer_memory = peer.call("watched")  # also warms up
    metrics, *memory = ours.call("watched")
    difference = require_close(metrics, expected, "sentence-transformers", TOLERANCE)
    seconds = alternate({"ours": ours, "peer": peer}, "evaluate", rounds=options.rounds, warmup=0)
    ours.close()
    peer.close()
    row = row_of(small, seconds["ours"], *memory)
    row.peer, row.peer_seconds, row.largest_difference = peer_name, seconds["peer"], difference
    row.peer_peak_bytes = peer_memory[1] - peer_memory[0]

    alone = Worker(Ours, large, options.depth)
    metrics, *memory = alone.call("watched")
    (all_seconds,) = alternate({"ours": alone}, "evaluate", rounds=options.rounds, warmup=0).values()
    found, costs = alone.call("found")
    alone.close()
    rows, (few, many) = [row], (task.num_documents * len(task.relevant) for task in (small, large))
    if many > few:
        rows.append(row_of(large, all_seconds, *memory))
        rows[1].peer = f"{peer_name}, linear, x {many / few:g}"
        rows[1].peer_seconds = [value * many / few for value in seconds["peer"]]
    parts = ", ".join(f"{name.removesuffix('_seconds')} {s:.2f}" for name, s in costs.items() if "_seconds" in name)
    means = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("hit_rate@1", "ndcg@10"))
    print(f"top {options.depth}; seconds of the last evaluation: {parts}; found: {means}; linear: extrapolated from")
    print(
        "the peer's time for the smaller size, by documents x queries; goal: twice as fast. Peaks: growth of anonymous"
    )
    print(
        f"memory; memory ratio: to the embeddings (limit: {MEMORY_LIMIT}), in a memory map that the system can drop\n"
    )
    return rows, found, large.dataset()


def row_of(task: Task, seconds: list[float], before: int, most: int) -> Row:
    """A row of evaluations of a task, with its growth of memory."""
    embeddings, beside = task.num_documents * task.queries_QD.itemsize * task.queries_QD.shape[1], most - before
    more = {"embeddings_bytes": embeddings, "memory_ratio": beside / embeddings}
    return Row(f"evaluate {task.size()}", seconds, peak_bytes=beside, more=more)


def seconds_of(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, run in the order A B A B ...; expects them to be warm."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def metrics_alone(options: argparse.Namespace, found: Run, dataset: RetrievalDataset) -> list[Row]:
    """The metrics of a run: ours from arrays and from dicts, trec_eval's from dicts, ranx's from its own types."""
    qrels, results = dataset.qrels, found.to_dict()
    depth = options.depth
    cuts = ",".join(map(str, KS))
    theirs = {"success": "hit_rate", "P": "precision", "recall": "recall", "ndcg_cut": "ndcg"}
    measures = {f"{name}.{cuts}" for name in theirs} | {f"map_cut.{depth}", "recip_rank"}

    def trec_eval() -> dict[str, dict[str, float]]:
        return pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(results)

    contestants = {
        "from arrays": lambda: evaluate_run(found, dataset, ks=KS, depth=depth),
        "from dicts": lambda: evaluate_run(Run.from_dict(results), qrels, ks=KS, depth=depth),
        "trec_eval (pytrec_eval), from dicts": trec_eval,
    }
    names = {f"{name}_{k}": f"{ours}@{k}" for name, ours in theirs.items() for k in KS}
    names |= {f"map_cut_{depth}": "map", "recip_rank": "mrr"}  # the run is no deeper
    by_query = trec_eval()
    expected = {
        ours: np.array([by_query[query_id][name] for query_id in found.query_ids]) for name, ours in names.items()
    }
    its_order = {  # by score as float32, then by descending id
        query_id: sorted(row, key=lambda i, row=row: (np.float32(row[i]), i), reverse=True)
        for query_id, row in results.items()
    }
    by_rank = {query_id: {i: -float(rank) for rank, i in enumerate(order)} for query_id, order in its_order.items()}
    ours = measure(judge(Run.from_dict(by_rank).select(found.query_ids), qrels), list(expected))
    differences = {"trec_eval (pytrec_eval), from dicts": require_close(ours, expected, "trec_eval", TOLERANCE)}
    if importlib.util.find_spec("ranx"):
        more, differences["ranx, from its own types"] = ranx_contestants(found, qrels, depth)
        contestants |= more
    seconds = seconds_of(contestants, options.rounds)
    size = f"{len(results):,} x {depth}"
    rows = [
        Row(f"metrics of {size}, {ours}", seconds[ours], peer, seconds[peer], largest_difference=differences.get(peer))
        for peer in list(contestants)[2:]
        for ours in list(contestants)[:2]
    ]
    missing = "" if "ranx, from dicts" in seconds else "; ranx is not installed (pip install ranx), so it is skipped"
    print(f"metrics: the limit is {METRICS_LIMIT} s at 10,000 x 100{missing}")
    return rows


def ranx_contestants(found: Run, qrels: Qrels, depth: int) -> tuple[dict[str, Callable[[], object]], float]:
    """ranx's two ways to compute the metrics, already compiled, and how much its results differ from ours."""
    import ranx

    names = [f"{name}@{k}" for name in ("hit_rate", "precision", "recall", "mrr", "ndcg") for k in KS]
    names.append(f"map@{depth}")
    ranks = {query_id: {d: -float(i) for i, d in enumerate(row)} for query_id, row in found.to_dict().items()}
    its_qrels, its_run = ranx.Qrels(qrels), ranx.Run(ranks)

    def evaluate_with(its_qrels: object, its_run: object) -> dict[str, np.ndarray]:
        return ranx.evaluate(its_qrels, its_run, names, return_mean=False, save_results_in_run=False)

    judgments = judge(found.select(its_run.get_query_ids()), qrels)
    ours = measure(judgments, names) | {names[-1]: average_precision(judgments)}  # its map divides by all relevant
    difference = require_close(ours, evaluate_with(its_qrels, its_run), "ranx", RANX_TOLERANCE)
    return {
        "ranx, from its own types": lambda: evaluate_with(its_qrels, its_run),
        "ranx, from dicts": lambda: evaluate_with(ranx.Qrels(qrels), ranx.Run(ranks)),
    }, difference


class Resampling:
    """Intervals and a p-value of made-up differences between two systems."""

    def __init__(self, num_samples: int, num_questions: int):
        values, shares = [-1.0, -0.5, 0.0, 0.5, 1.0], [0.05, 0.1, 0.6, 0.15, 0.1]
        self.differences_Q = np.random.default_rng(0).choice(values, num_questions, p=shares)
        self.pairs, self.num_samples = [str(i // 2) for i in range(num_questions)], num_samples

    def interval(self, *clusters: list[str]) -> tuple[float, float]:
        given = {"generator": np.random.default_rng(1), "num_samples": self.num_samples}
        return paired_bootstrap_interval(self.differences_Q, *clusters, **given)

    def clustered(self) -> tuple[float, float]:
        return self.interval(self.pairs)

    def p_value(self) -> float:
        given = {"generator": np.random.default_rng(1), "num_samples": self.num_samples}
        return sign_flip_p_value(self.differences_Q, **given)

    def error(self) -> float:
        """The standard error of the mean."""
        return self.differences_Q.std() / len(self.differences_Q) ** 0.5


class SciPy(Resampling):
    def interval(self) -> tuple[float, float]:
        given = {"n_resamples": self.num_samples, "method": "percentile", "batch": 100}
        return tuple(scipy.stats.bootstrap((self.differences_Q,), np.mean, **given).confidence_interval)


def resampling(options: argparse.Namespace) -> list[Row]:
    """Times intervals and a p-value."""
    peer = f"scipy.stats.bootstrap {scipy.__version__}"
    workers = {
        name: Worker(make, NUM_SAMPLES, NUM_QUESTIONS) for name, make in (("embedft", Resampling), (peer, SciPy))
    }
    ours, theirs = (worker.call("interval") for worker in workers.values())  # also warms up
    most = INTERVAL_TOLERANCE * workers["embedft"].call("error")
    require_close({"interval": ours}, {"interval": theirs}, "SciPy", most)
    rows = suite.measure("bootstrap interval", workers, "interval", rounds=options.rounds, warmup=0)
    alone = {"embedft": workers["embedft"]}
    rows += suite.measure("bootstrap interval, two questions / document", alone, "clustered", rounds=options.rounds)
    rows += suite.measure("sign-flip p-value", alone, "p_value", rounds=options.rounds)
    for worker in workers.values():
        worker.close()
    print(f"resampling: {NUM_SAMPLES:,} samples over {NUM_QUESTIONS:,} questions; the limit is {BOOTSTRAP_LIMIT} s\n")
    return rows


def main(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows, found, dataset = whole(options, folder)
    return [*rows, *metrics_alone(options, found, dataset), *resampling(options)]


def parser() -> argparse.ArgumentParser:
    found = make_parser("evaluate", __doc__, rounds=3, data=suite.PUBLISHED, dtypes=DTYPES)
    found.add_argument("--documents", type=int, default=1_000_000, help="documents [1000000]")
    found.add_argument("--peer-documents", type=int, default=100_000, help="most documents for the peer [100000]")
    found.add_argument("--peer-queries", type=int, default=1_000, help="most queries for the peer [1000]")
    return add_vectors(found)


if __name__ == "__main__":
    suite.run(main, parser())
