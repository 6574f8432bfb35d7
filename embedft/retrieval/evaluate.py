"""Evaluates an embedder on a dataset, or a run; or a grid of settings over one encoding.

before = evaluate(embedder, dataset)      # then train
print(compare(before, evaluate(embedder, dataset), metric="ndcg@10"))     # compare: report.py
print(evaluate(embedder, {"uber": uber, "scifact": scifact}))             # several datasets and their means: suite.py
evaluate_grid(embedder, dataset, dims=(384, 128), precisions=("float32", "int8"), indices=("flat", "hnsw"))
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from ..data.dataset import RetrievalDataset, connected_components
from .encoding import SupportsEncode, timed
from .metrics import Gain, Metric, Qrels, has_relevant, judge, measure, select_metrics
from .report import Report, model_setting
from .run import Run
from .search import Setting, search_grid
from .suite import Suite, about, check_names


def evaluate(
    embedder: SupportsEncode,
    dataset: RetrievalDataset | Mapping[str, RetrievalDataset],
    *,
    dim: int | None = None,
    passages: Sequence[int] | None = None,
    precision: str = "float32",
    index: str = "flat",
    **options: Any,
) -> Report | Suite:
    """Encodes queries and documents (titles included), searches (settings: see search.py), and measures. Equal scores
    are ordered by ascending document id. options: those of `evaluate_grid`.

    {name: dataset} gives a `Suite`, {name: report} with means over the datasets; all are checked before the first one
    is encoded, and errors begin with the name."""
    grid = {"dims": (dim,), "precisions": (precision,), "indices": (index,), "passages": (passages,)}
    if isinstance(dataset, RetrievalDataset):
        return evaluate_grid(embedder, dataset, **grid, **options)[0]
    if not dataset:
        raise ValueError("there is no dataset to evaluate on")
    check_names(dataset)
    for name, one in dataset.items():
        with about(name):
            _judged(one)
    reports = {}
    for name, one in dataset.items():
        with about(name):
            reports[name] = evaluate_grid(embedder, one, **grid, **options)[0]
    return Suite(reports)


def evaluate_grid(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    dims: Sequence[int | None] = (None,),
    precisions: Sequence[str] = ("float32",),
    indices: Sequence[str] = ("flat",),
    passages: Sequence[Sequence[int] | None] | Sequence[int] | None = (None,),
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    metrics: Sequence[Metric] | None = None,
    gain: Gain = "binary",
    **options: Any,
) -> list[Report]:
    """A report for every combination; queries are encoded once, documents once for each of `passages`.

    Passages vary slowest, then dims, precisions and indices, each a list of what `evaluate` takes (passages=(128, 64)
    works too). Exact search holds one slice of the corpus; others, all vectors, a copy cut to one dim, and one index.

    ks, depth, metrics, gain: see `evaluate_run`. options: exclude_identical_ids and slice_documents, see `Searcher`.
    Raises `ValueError` before the corpus is encoded for arguments that cannot work, listing all unsupported settings.
    Source: Kusupati et al. 2022, section 4 (dims, adaptive retrieval); Shakir et al. 2024 (precisions)."""
    select_metrics(metrics, ks=ks, depth=depth)
    if passages is None or all(isinstance(number, Integral) for number in passages):
        passages = [passages]
    for name, values in (("dims", dims), ("precisions", precisions), ("indices", indices)):
        if isinstance(values, str | int) or not values:
            raise ValueError(f"{name} is {values!r}, expected a list of at least one")
    grid = itertools.product(passages, dims, precisions, indices)
    settings = [Setting(dim, precision, index, windows) for windows, dim, precision, index in grid]
    qrels, queries = _judged(dataset)
    common = model_setting(embedder) | _data_setting(dataset, queries) | {"similarity": embedder.similarity}
    reports = []
    for run, setting, costs in search_grid(embedder, dataset, queries, settings, depth=depth, **options):
        report = evaluate_run(run, qrels, ks=ks, depth=depth, metrics=metrics, gain=gain)
        setting = {**common, **setting, **report.setting}
        reports.append(dataclasses.replace(report, setting=setting, costs={**costs, **report.costs}))
    return reports


def evaluate_run(
    run: Run,
    dataset_or_qrels: RetrievalDataset | Qrels,
    *,
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    metrics: Sequence[Metric] | None = None,
    gain: Gain = "binary",
) -> Report:
    """Measures a run from any source. Queries with relevant documents that the run omits count as finding nothing.

    Args:
        dataset_or_qrels: qrels as {query id: {document id: grade}}, or a dataset, whose ids are then checked too.
        ks: cutoffs of the default metrics.
        depth: documents retrieved per query, the highest cutoff and that of MAP.
        metrics: replace the default ones, see `metrics.measure`; gain: of nDCG, see `metrics.ndcg`."""
    chosen = select_metrics(metrics, ks=ks, depth=depth)
    setting = {"depth": depth, "gain": gain, **({} if metrics is not None else {"ks": list(ks)})}
    if isinstance(dataset_or_qrels, Mapping):
        qrels, query_ids = dataset_or_qrels, list(dict.fromkeys([*dataset_or_qrels, *run.query_ids]))
    else:
        data = dataset_or_qrels
        for kind, ids, known in (("query", run.query_ids, data.queries), ("document", run.document_ids, data.corpus)):
            if unknown := [i for i in ids if i not in known]:
                raise ValueError(f"run: {kind} id {unknown[0]!r} is not in the dataset ({len(unknown):,} such ids)")
        qrels, query_ids = data.all_qrels(), list(data.queries)
        setting |= _data_setting(data, {i: data.queries[i] for i in query_ids if has_relevant(qrels.get(i, {}))})
    costs: dict[str, float] = {}
    with timed(costs, "metrics_seconds"):
        judgments = judge(run.select(query_ids), qrels)
        per_query = measure(judgments, chosen, gain=gain)
    query_ids, left_out = judgments.query_ids, judgments.num_without_relevant
    clusters, setting = question_clusters(query_ids, qrels), {**setting, "num_queries": len(query_ids)}
    return Report(query_ids, per_query, clusters, left_out, setting, costs, run.select(query_ids))


def _judged(dataset: RetrievalDataset) -> tuple[Qrels, dict[str, str]]:
    """The qrels of every query, and the text of each query with a relevant document."""
    all_qrels = dataset.all_qrels()
    qrels = {query_id: all_qrels.get(query_id, {}) for query_id in dataset.queries}
    queries = {query_id: text for query_id, text in dataset.queries.items() if has_relevant(qrels[query_id])}
    if not queries:
        raise ValueError(f"none of the {len(dataset.queries)} queries of the dataset has a relevant document")
    return qrels, queries


def _data_setting(dataset: RetrievalDataset, questions: Mapping[str, str]) -> dict[str, Any]:
    found = {"num_documents": len(dataset.corpus), "data_sha256": dataset.sha256()}
    return found | {"questions_sha256": hashlib.sha256(json.dumps(sorted(questions.items())).encode()).hexdigest()}


def question_clusters(query_ids: Sequence[str], qrels: Qrels) -> list[str]:
    """The cluster of each query, named after its smallest relevant document: queries that share a relevant document,
    directly or through others, are in the same one."""
    relevant = [[document_id for document_id, grade in qrels[query_id].items() if grade > 0] for query_id in query_ids]
    smallest = connected_components((first, other) for first, *others in relevant for other in (first, *others))
    return [smallest[document_ids[0]] for document_ids in relevant]
