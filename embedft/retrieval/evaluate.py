"""An embedder and a dataset, or a run, to a report; a grid of settings over one encoding.

    before = evaluate(embedder, dataset)
    ...                                     # train
    print(compare(before, evaluate(embedder, dataset), metric="ndcg@10"))     # compare: report.py
    evaluate(embedder, dataset, passages=(128, 64))       # documents by their best window of 128 tokens
    evaluate_grid(embedder, dataset, dims=(384, 128), precisions=("float32", "int8"), indices=("flat", "hnsw"))

Search is exhaustive unless a setting says otherwise. Documents with equal scores are ordered by ascending id, at the
cutoff too, as in sentence-transformers. Queries without a relevant document are left out of the means and counted. How
documents are encoded and searched is in search.py, tables of reports are in tables.py.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from ..data.dataset import RetrievalDataset
from ..data.linked import connected_components
from .encoding import SupportsEncode, timed
from .metrics import Gain, Metric, Qrels, has_relevant, judge, measure, select_metrics
from .report import Report, model_setting
from .run import Run
from .search import search_grid
from .settings import Setting, check_settings


def evaluate(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    dim: int | None = None,
    passages: Sequence[int] | None = None,
    aggregate: str = "max",
    precision: str = "float32",
    index: str = "flat",
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    metrics: Sequence[Metric] | None = None,
    gain: Gain = "binary",
    slice_documents: int | None = None,
) -> Report:
    """Encodes queries and documents, searches and measures: `evaluate_grid` with one setting.

    Exact search (float32, flat) holds one slice of the corpus at a time: memory does not grow with its size.

    Args:
        dim: leading dimensions to keep (Matryoshka); None: as many as the embedder gives.
        passages: (size, stride) in tokens: documents, title included, are cut into windows as
            `Embedder.encode_passages` does, and scored by them. None: one vector per document, of as much as the model
            reads.
        aggregate: how windows make a document's score: max, mean, first or sum_top_M, see `aggregate_windows`.
        precision: as what vectors are stored: float32, int8 or binary.
        index: flat, hnsw, ivf, ivfpq, a string for FAISS's `index_factory`, or adaptive-DIM. settings.py says what each
            does and which go with which precision.
        ks: cutoffs of the default metrics.
        depth: documents retrieved per query, and the cutoff of MAP. May be larger than the corpus.
        metrics: replace the default ones: names such as "ndcg@20", "rprec" or "judged@10", or functions (judgments,
            k=None) -> [Q], see `metrics.measure`. Those without a cutoff cover the `depth` documents retrieved.
        gain: of nDCG, see `metrics.ndcg`.
        slice_documents: documents encoded at a time; None: 65,536, or 4,096 with passages.

    Raises:
        ValueError: as `evaluate_grid`.
    """
    grid = {"dims": (dim,), "precisions": (precision,), "indices": (index,), "passages": (passages,)}
    measured = {"aggregate": aggregate, "ks": ks, "depth": depth, "metrics": metrics, "gain": gain}
    options = {"slice_documents": slice_documents}
    return evaluate_grid(embedder, dataset, **grid, **measured, **options)[0]


def evaluate_grid(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    dims: Sequence[int | None] = (None,),
    precisions: Sequence[str] = ("float32",),
    indices: Sequence[str] = ("flat",),
    passages: Sequence[Sequence[int] | None] | Sequence[int] | None = (None,),
    aggregate: str = "max",
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    metrics: Sequence[Metric] | None = None,
    gain: Gain = "binary",
    slice_documents: int | None = None,
) -> list[Report]:
    """A report for every combination; queries are encoded once, documents once for each of `passages`.

    Passages vary slowest, then dims, precisions and indices. Each report is what `evaluate` gives for its setting; its
    seconds of encoding are those of the shared encoding.

    Besides metrics, a report has `setting` ("dim", "precision", "index", "passages", "similarity", "num_documents",
    "aggregate" with passages, and the facts of `settings.build`) and `costs` (see `search.search_grid`).

    Memory: with float32 and flat alone one slice of the corpus at a time, whatever the dims. Other settings need all
    vectors, 4 bytes per dimension of the model and document or window, and, one setting at a time, the vectors cut to
    its dim, its codes and its index.

    Args:
        dims, precisions, indices, passages: lists of what `evaluate` takes. passages=(128, 64) is one setting too.
        aggregate, ks, depth, metrics, gain, slice_documents: for all of them, see `evaluate`.

    Raises:
        ValueError: before documents are encoded: for an empty list, a cutoff above `depth`, a dataset in which no query
            has a relevant document, unsupported combinations (all of them are listed, none is skipped), a dim beyond
            the model's, too few documents for an index, passages with an embedder that cannot cut any. Later: for
            embeddings that are not finite (naming the query or document).

    Source: Kusupati et al. 2022, section 4 (dims, adaptive retrieval); Shakir et al. 2024 (precisions).
    """
    select_metrics(metrics, ks=ks, depth=depth)  # raises before anything is encoded
    if passages is None or all(isinstance(number, int) for number in passages):
        passages = [passages]
    lists = {"dims": dims, "precisions": precisions, "indices": indices}
    for name, values in lists.items():
        if isinstance(values, str | int) or not values:
            raise ValueError(f"{name} is {values!r}, expected a list of at least one")
    settings = [Setting(*rest, windows, aggregate) for windows, *rest in itertools.product(passages, *lists.values())]
    check_settings(embedder, settings, num_documents=len(dataset.corpus))
    qrels = dataset.all_qrels()
    relevant = [query_id for query_id in dataset.queries if has_relevant(qrels.get(query_id, {}))]
    if not relevant:
        raise ValueError(f"none of the {len(dataset.queries)} queries of the dataset has a relevant document")
    queries = {query_id: dataset.queries[query_id] for query_id in relevant}
    options = {"slice_documents": slice_documents}
    model, reports = model_setting(embedder), []
    for searched in search_grid(embedder, dataset, queries, settings, depth=depth, **options):
        report = evaluate_run(searched.run, dataset, ks=ks, depth=depth, metrics=metrics, gain=gain)
        setting = {**searched.setting._asdict(), **searched.facts, "similarity": embedder.similarity}
        if searched.setting.passages is None:
            del setting["aggregate"]
        else:
            setting["passages"] = list(searched.setting.passages)
        costs = {**searched.costs, **report.costs}
        reports.append(dataclasses.replace(report, setting=model | setting | report.setting, costs=costs))
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
    """Measures a run from anywhere. A query with relevant documents that the run lacks counts as found nothing.

    Args:
        dataset_or_qrels: qrels as {query id: {document id: grade}}, or a dataset, whose ids are then checked too.
        depth: the cutoff of MAP, and the largest cutoff allowed.
        ks, metrics, gain: see `evaluate`.

    Raises:
        ValueError: on a query or document that the dataset does not have, a cutoff above `depth`, or when no query has
            a relevant document.
    """
    chosen = select_metrics(metrics, ks=ks, depth=depth)
    setting = {"depth": depth, "gain": gain}
    if metrics is None:
        setting["ks"] = list(ks)
    if isinstance(dataset_or_qrels, Mapping):
        qrels = dataset_or_qrels
        query_ids = list(dict.fromkeys([*qrels, *run.query_ids]))
    else:
        qrels, query_ids = dataset_or_qrels.all_qrels(), list(dataset_or_qrels.queries)
        _check_known(run.query_ids, dataset_or_qrels.queries, "query", "the dataset")
        _check_known(run.document_ids, dataset_or_qrels.corpus, "document", "the corpus")
        setting["num_documents"] = len(dataset_or_qrels.corpus)
        setting["data_sha256"] = dataset_or_qrels.sha256()
    costs: dict[str, float] = {}
    with timed(costs, "metrics_seconds"):
        judgments = judge(run.select(query_ids), qrels)
        per_query = measure(judgments, chosen, gain=gain)
    return Report(
        query_ids=judgments.query_ids,
        per_query=per_query,
        clusters=question_clusters(judgments.query_ids, qrels),
        num_without_relevant=judgments.num_without_relevant,
        setting={**setting, "num_queries": len(judgments.query_ids)},
        costs=costs,
        run=run.select(judgments.query_ids),
    )


def question_clusters(query_ids: Sequence[str], qrels: Qrels) -> list[str]:
    """The cluster of each query: queries that share a relevant document, directly or through others, have one cluster.

    Its id is the smallest id among the relevant documents of the cluster's queries.
    """
    relevant = [[document_id for document_id, grade in qrels[query_id].items() if grade > 0] for query_id in query_ids]
    smallest = connected_components((first, other) for first, *others in relevant for other in (first, *others))
    return [smallest[document_ids[0]] for document_ids in relevant]


def _check_known(ids: Sequence[str], known: Mapping[str, str], kind: str, where: str) -> None:
    unknown = [id_ for id_ in ids if id_ not in known]
    if unknown:
        raise ValueError(f"run: {kind} id {unknown[0]!r} is not in {where} ({len(unknown):,} such ids)")
