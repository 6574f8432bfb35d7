"""`embedft evaluate`: measures how well a model finds the right document, next to BM25, in one or many settings.

embedft evaluate sentence-transformers/all-MiniLM-L6-v2 held_out.csv --passages 128 64 --fuse --out eval/windows
embedft evaluate sentence-transformers/all-MiniLM-L6-v2 held_out.csv beir:scifact --out eval/several
torchrun --nproc-per-node 2 -m embedft evaluate sentence-transformers/all-MiniLM-L6-v2 held_out.csv
"""

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import embedft

from ..config import REQUIRED, changed, check_at_most_one, option
from ..data.dataset import RetrievalDataset
from ..files import read_object, replace_files
from ..retrieval import tables
from ..retrieval.bm25 import split_words
from ..retrieval.report import Report
from ..retrieval.run import Run
from ..retrieval.suite import Suite, about, check_names, format_suites, report_files
from .options import DATASETS, Adapted, Bm25, Data, check_output, load_data, load_encoder, named_sources, print_costs

BM25, FUSED = "bm25", "fused"  # names of reports, and of their folders


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Settings: every combination is evaluated; texts are encoded once."""

    passages: list[list[int]] = option(
        [], "score by windows of SIZE tokens, STRIDE apart, of one or more sizes [whole]", metavar="SIZE STRIDE ..."
    )
    whole: bool = option(False, "also evaluate whole documents, besides --passages")
    dims: list[int] | None = option(None, "leading dimensions to keep [all]")
    precisions: list[Literal["float32", "int8", "binary"]] = option(["float32"], "types of document vectors")
    indices: list[str] = option(["flat"], "flat, hnsw, ivf, ivfpq, adaptive-DIM, or any FAISS factory string")
    metric: str | None = option(None, "metric in the table of several settings [ndcg@10]")


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """BM25, on the model's tokens (on words for a model behind an API)."""

    bm25: bool = option(True, "also evaluate BM25")
    fuse: bool = option(False, "also evaluate the z-score fusion of both")
    fuse_weight: float = option(0.5, "X for BM25, 1 - X for the model; tune it on other questions", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Options(Adapted, Grid, Hybrid, Bm25, Data):
    data: list[str] | str = option(REQUIRED, f"{DATASETS}; several [NAME=]DATA", metavar="DATA", positional=True)
    metrics: list[str] | None = option(None, "e.g. ndcg@20 rprec my_module.function [all, at --ks]", metavar="NAME ...")
    ks: list[int] = option([1, 3, 5, 10], "cutoffs")
    depth: int = option(100, "documents to retrieve per question")
    gain: Literal["binary", "graded"] = option("binary", "nDCG gain")
    merge: bool = option(True, "treat documents of equal text as one")
    keep_identical_ids: bool = option(False, "also rank the document whose id is the query's")
    out: str | None = option(None, "save reports; of BM25, settings and datasets in folders inside", metavar="DIR")
    overwrite: bool = option(False, "replace the reports in DIR")
    style: tables.Style = option("text", "table format")
    json: bool = option(False, "print all metrics as JSON")

    def __post_init__(self):
        check_at_most_one(self, "dim", "dims")
        check_at_most_one(self, "bm25", "fuse")
        check_at_most_one(self, "style", "json")
        of_bm25 = [(name, "bm25") for name in self.bm25_setting()]
        for name, needed in (("whole", "passages"), ("overwrite", "out"), ("fuse_weight", "fuse"), *of_bm25):
            if not getattr(self, needed) and (given := changed(self, [name])):
                raise ValueError(f"{given[0]} needs --{needed}")
        num_settings = math.prod(map(len, self.grid.values()))
        if self.fuse and num_settings > 1:
            raise ValueError(f"--fuse needs a single setting, found {num_settings}")
        num_datasets = len(named_sources(self.data))
        if num_datasets > 1 and num_settings > 1:
            raise ValueError(f"{num_datasets} datasets need a single setting, found {num_settings}")
        if self.metric and num_settings == 1:
            raise ValueError("--metric needs several settings, found one; --metrics chooses what to measure")

    @property
    def grid(self) -> dict[str, tuple]:
        """Arguments for `evaluate_grid`, without duplicate values."""
        passages = list(map(tuple, self.passages))
        passages = [None, *passages] if self.whole or not passages else passages
        lists = {"dims": self.dims or [self.dim], "precisions": self.precisions, "indices": self.indices}
        return {name: tuple(dict.fromkeys(values)) for name, values in {**lists, "passages": passages}.items()}

    @property
    def measures(self) -> dict[str, Any]:
        return {"ks": self.ks, "depth": self.depth, "metrics": self.metrics, "gain": self.gain}


def run(options: Options) -> None:
    """Evaluates; saves and prints reports. Under torchrun, all ranks encode, and the first does everything else."""
    from ..training import distributed

    with distributed.process_group():
        is_first = distributed.rank_and_size()[0] == 0
        datasets, metric = distributed.together(lambda: _load(options) if is_first else ({}, ""))
        device = distributed.rank_device(options.device)
        embedder = distributed.together(lambda: load_encoder(options, device=device))
        distributed.encoding_together(embedder, lambda: _evaluate(options, embedder, datasets, metric))


def _load(options: Options) -> tuple[dict[str, RetrievalDataset], str]:
    """The datasets, a single one named "", and the metric of the table of several settings, once the arguments are
    known to work."""
    sources = named_sources(options.data)
    check_names(sources if len(sources) > 1 else (), reserved=(BM25, FUSED))
    if options.out:
        there = [file.parent for file in _report_files(Path(options.out))]
        check_output(options.out, there, overwrite=options.overwrite)
    datasets = {}
    for name, path in sources.items():
        name = name if len(sources) > 1 else ""
        datasets[name] = load_data(path, options, merge=options.merge)
        # An empty run has the same metrics as any other, so this checks their names before anything is encoded.
        with about(name):
            report = embedft.evaluate_run(Run.from_dict({}), datasets[name], **options.measures)
    main = tables.main_metrics(report)
    metric = options.metric or next((name for name in main if name.startswith("ndcg")), main[0])
    if metric not in report.per_query:
        raise ValueError(f"--metric is {metric!r}, expected one of {', '.join(report.per_query)}")
    return datasets, metric


def _evaluate(options: Options, embedder: Any, datasets: dict[str, RetrievalDataset], metric: str) -> None:
    exclude = {"exclude_identical_ids": not options.keep_identical_ids}
    found = {}
    for name, dataset in datasets.items():
        with about(name):
            reports = embedft.evaluate_grid(embedder, dataset, **options.grid, **options.measures, **exclude)
            beside = _baselines(options, embedder, dataset, reports[0]) if options.bm25 else {}
            found[name] = reports, beside
    if len(found) > 1:  # in one setting
        beside = {kind: Suite({name: of_name[kind] for name, (_, of_name) in found.items()}) for kind in beside}
        reports = [Suite({name: report for name, ([report], _) in found.items()})]
    if options.out:  # replaces the reports of an earlier evaluation all at once; other files stay
        out = Path(options.out)
        with replace_files(out, stale=[str(file.relative_to(out)) for file in _report_files(out)]) as new:
            for report in reports:
                report.save(new if len(reports) == 1 else new / tables.setting_name(report.setting))
            for name, report in beside.items():
                report.save(new / name)
    print_costs(embedder)
    if options.json:
        shown = reports[0].metrics
        if len(reports) > 1:
            shown = {"settings": [{"setting": r.setting, "metrics": r.metrics, "costs": r.costs} for r in reports]}
        print(json.dumps({**shown, **{name: report.metrics for name, report in beside.items()}}, indent=2))
    elif len(reports) > 1:
        _print_grid(options, reports, beside, metric)
    elif len(found) > 1:
        _print_suite(options, reports[0], beside)
    else:
        if options.style == "text":
            print(f"{reports[0].name}: {reports[0]}", end="\n\n" if beside else "\n")
        if beside or options.style != "text":
            named = {report.name: report for report in (reports[0], *beside.values())}
            print(tables.format_reports(named, style=options.style))


def _print_grid(options: Options, reports: list[Report], beside: dict[str, Report], metric: str) -> None:
    if options.style == "text":
        line, _, _ = str(reports[0]).partition("\n")
        base = tables.setting_name(tables.grid_base(reports).setting)
        print(f"{reports[0].model_name}: {line}, {metric}; differences from {base}\n")
    print(tables.format_grid([*reports, *beside.values()], metric=metric, style=options.style))
    if options.style == "text":
        print(f"\n{tables.explain_statistics(len(reports) + len(beside) - 1)};")
        print("of exact: share of exact search's first 10 documents; queries/s: for searches of 0.1 s or more")


def _print_suite(options: Options, suite: Suite, beside: dict[str, Suite]) -> None:
    named = {next(iter(each.values())).name: each for each in (suite, *beside.values())}
    if options.style == "text":
        counts = (f"{dataset} ({str(report).splitlines()[0]})" for dataset, report in suite.items())
        print(f"{next(iter(named))}: {', '.join(counts)}\n")
    print(format_suites(named, style=options.style))
    if options.style == "text":
        print("\nmean: of the datasets, each counting the same, however many queries it has")


def _baselines(options: Options, embedder, dataset: RetrievalDataset, report: Report) -> dict[str, Report]:
    tokenize, exclude = getattr(embedder, "tokenize", split_words), not options.keep_identical_ids
    if tokenize is split_words:
        print("bm25 uses words, since the model's tokens are not known", file=sys.stderr)
    how = {"tokenize": tokenize, "depth": options.depth, **options.bm25_given()}
    run = embedft.bm25_run(dataset, exclude_identical_ids=exclude, **how)
    tokens = "words" if tokenize is split_words else "the encoder's"
    found = {BM25: (run, {"index": "bm25", "tokens": tokens, **options.bm25_setting()})}
    if options.fuse:
        weight = options.fuse_weight
        fused = embedft.fuse([run, report.run], method="zscore", weights=(weight, 1 - weight), depth=options.depth)
        said = {"index": "fused", "method": "zscore", "bm25_weight": weight, **options.bm25_setting()}
        found[FUSED] = fused, said
    reports = {name: embedft.evaluate_run(run, dataset, **options.measures) for name, (run, _) in found.items()}
    return {name: dataclasses.replace(r, setting={**found[name][1], **r.setting}) for name, r in reports.items()}


def _report_files(out: Path) -> list[Path]:
    """The files that an evaluation wrote: in `out`, or in folders named bm25, fused, or after their report's setting;
    of several datasets, in a folder for each inside."""
    found = [*report_files(out), *report_files(out / BM25), *report_files(out / FUSED)]
    for path in sorted(out.glob("*/metrics.json")):
        try:
            is_own = path.parent.name == tables.setting_name(read_object(path)["setting"])
        except (KeyError, TypeError, ValueError):  # unreadable, so only its folder's name can tell
            is_own = re.fullmatch(r"(\d+-\d+[+-])*dim\d+-(float32|int8|binary)-.+", path.parent.name)
        found += report_files(path.parent) if is_own else []
    return list(dict.fromkeys(found))
