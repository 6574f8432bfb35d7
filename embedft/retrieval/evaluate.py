"""From an embedder and a dataset, or from a run, to a report; over a grid of settings in one encoding.

    before = evaluate(embedder, dataset)
    ...                                     # train
    print(compare(before, evaluate(embedder, dataset), metric="ndcg@10"))     # compare: report.py
    evaluate(embedder, dataset, passages=(128, 64))       # documents by their best window of 128 tokens
    evaluate_grid(embedder, dataset, dims=(384, 128), precisions=("float32", "int8"), indices=("flat", "hnsw"))

What is exact here: search is exhaustive unless a setting says otherwise; documents of equal score are ordered by
ascending id, at the cut-off too, as sentence-transformers orders them; queries without a relevant document are left out
of the means and counted. Not here: how documents are encoded and searched (search.py), and tables of reports
(tables.py).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from ..data.dataset import RetrievalDataset
from ..data.linked import connected_components
from .metrics import Gain, Metric, Qrels, has_relevant, judge, measure, select_metrics
from .report import Report
from .run import Run
from .search import SupportsEncode, answers, encode, in_order_of_ids, timed
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
) -> Report:
    """Encodes queries and documents, searches and measures: `evaluate_grid` of one setting.

    Exact search (float32, flat) holds a slice of the corpus at a time: memory does not grow with the vectors.

    Args:
        dim: leading dimensions to keep (Matryoshka); None: as many as the embedder gives.
        passages: (size, stride) in tokens: documents are cut into windows as `Embedder.encode_passages` does, the title
            part of the text, and score by them. None: a document is one vector, of as much as the model reads.
        aggregate: how a document scores by its windows: max, mean, first or sum_top_M, see `aggregate_windows`.
        precision: what vectors are stored as: float32, int8 or binary.
        index: flat, hnsw, ivf, ivfpq, a string for FAISS's `index_factory`, or adaptive-DIM. Which go with which
            precision, and what each does: settings.py.
        ks: cutoffs of the default metrics.
        depth: documents retrieved a query, and the cutoff of MAP. May be larger than the corpus.
        metrics: replace the default ones: names such as "ndcg@20", "rprec" or "judged@10", or functions (judgments,
            k=None) -> [Q], see `metrics.measure`. Those without a cutoff are over the `depth` documents retrieved.
        gain: of nDCG, see `metrics.ndcg`.

    Raises:
        ValueError: as `evaluate_grid`.
    """
    grid = {"dims": (dim,), "precisions": (precision,), "indices": (index,), "passages": (passages,)}
    return evaluate_grid(
        embedder, dataset, **grid, aggregate=aggregate, ks=ks, depth=depth, metrics=metrics, gain=gain
    )[0]


def evaluate_grid(
    embedder: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    dims: Sequence[int | None] = (None,),
    precisions: Sequence[str] = ("float32",),
    indices: Sequence[str] = ("flat",),
    passages: Sequence[Sequence[int] | None] = (None,),
    aggregate: str = "max",
    ks: Sequence[int] = (1, 3, 5, 10),
    depth: int = 100,
    metrics: Sequence[Metric] | None = None,
    gain: Gain = "binary",
) -> list[Report]:
    """A report for every combination, in one encoding of the queries and one of the documents for each of `passages`.

    Passages are outermost, then dims, precisions, indices. Each report is what `evaluate` gives for its setting; the
    seconds of encoding are those of the encoding that they share.

    Beside metrics a report has `setting` ("dim", "precision", "index", "passages", "similarity", "num_documents",
    "aggregate" over passages, and the facts of `settings.build`) and `costs` (seconds of each part,
    "queries_per_second", "bytes_per_document", "recall@10_of_exact", see `search.answers`).

    Memory: with float32 and flat alone a slice of the corpus at a time, whatever the dims. Other settings need the
    vectors: 4 bytes a dimension of the model a document or window, and one setting's own beside them: the vectors cut
    to its dim, its codes and its index.

    Args:
        dims, precisions, indices, passages: lists of what `evaluate` takes. passages=(128, 64) is one setting too.
        aggregate, ks, depth, metrics, gain: of all, see `evaluate`.

    Raises:
        ValueError: on an empty list, a cutoff above `depth`, a dataset in which no query has a relevant document,
            combinations that do not exist (listing them; none is left out), a dim that the model does not have, an
            index for which there are too few documents, passages of an embedder that cannot cut any: before documents
            are encoded; and on embeddings that are not finite (naming the query or document).

    Source: Kusupati et al. 2022, section 4 (dims, adaptive retrieval); Shakir et al. 2024 (precisions).
    """
    select_metrics(metrics, ks=ks, depth=depth)  # raises before anything is encoded
    if passages is None or all(isinstance(number, int) for number in passages):
        passages = [passages]
    lists = {"dims": dims, "precisions": precisions, "indices": indices}
    for name, values in lists.items():
        if isinstance(values, str | int) or not values:
            raise ValueError(f"{name} is {values!r}, expected a list of at least one")
    settings = [Setting(*values) for values in itertools.product(*lists.values())]
    check_settings(embedder, settings, passages, aggregate, num_documents=len(dataset.corpus))
    query_ids = [query_id for query_id in dataset.queries if has_relevant(dataset.qrels.get(query_id, {}))]
    if not query_ids:
        raise ValueError(f"none of the {len(dataset.queries)} queries of the dataset has a relevant document")
    encoding: dict[str, float] = {}
    with timed(encoding, "query_encoding_seconds"):
        texts = [dataset.queries[query_id] for query_id in query_ids]
        queries_QW = encode(embedder, texts, query_ids, role="query")
    documents = in_order_of_ids(dataset)

    reports = []
    for windows in passages:
        options = {"passages": windows, "aggregate": aggregate, "depth": depth}
        for answer in answers(embedder, documents, queries_QW, settings, **options):
            run = Run(query_ids, documents.ids, answer.found.rows, answer.found.scores)
            report = evaluate_run(run, dataset, ks=ks, depth=depth, metrics=metrics, gain=gain)
            cut = None if windows is None else list(windows)
            setting = {**answer.setting._asdict(), **answer.facts, "passages": cut, "similarity": embedder.similarity}
            if windows is not None:
                setting["aggregate"] = aggregate
            costs = {**encoding, **answer.costs, **report.costs}
            reports.append(dataclasses.replace(report, setting=setting | report.setting, costs=costs))
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
        qrels, query_ids = dataset_or_qrels.qrels, list(dataset_or_qrels.queries)
        _check_known(run.query_ids, dataset_or_qrels.queries, "query", "the dataset")
        _check_known(run.document_ids, dataset_or_qrels.corpus, "document", "the corpus")
        setting["num_documents"] = len(dataset_or_qrels.corpus)
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
