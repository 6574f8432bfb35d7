"""`embedft evaluate | compare`: how well a model finds the right document, and whether two reports differ.

Each command is a pair of functions: one adds its arguments to a parser, one runs it.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import RetrievalDataset
from ..encoders.embedder import Embedder
from ..encoders.openai_api import ApiEmbedder
from ..files import check_writable
from ..retrieval.bm25 import bm25_run
from ..retrieval.evaluate import evaluate_grid, evaluate_run
from ..retrieval.fusion import fuse
from ..retrieval.plots import plot_questions, save_figure
from ..retrieval.quantization import PRECISIONS
from ..retrieval.report import REPORT_FILES, Report
from ..retrieval.run import Run
from ..retrieval.tables import (
    STYLES,
    compare_all,
    format_comparisons,
    format_grid,
    format_reports,
    grid_base,
    main_metrics,
    setting_name,
)
from .models import _add_encoding, _add_loading, _add_model, _add_store, _load_data, _load_encoding, _print_store

BM25, FUSED = "bm25", "fused"


# embedft evaluate


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("data", metavar="DATA", help="QA JSON, BEIR folder, JSONL or CSV pairs")
    _add_encoding(parser)
    _add_store(parser)
    parser.add_argument("--adapter", metavar="DIR", help="have vectors go through the adapter in DIR")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 3, 5, 10], metavar="K", help="cutoffs [1 3 5 10]")
    parser.add_argument("--depth", type=int, default=100, metavar="K", help="documents retrieved a question [100]")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="measure these instead of --ks, such as ndcg@20 rprec judged@10"
    )
    parser.add_argument("--gain", choices=("binary", "graded"), default="binary", help="of nDCG [binary]")
    parser.add_argument("--split", metavar="NAME", help="of a BEIR folder [test, or the only one]")
    parser.add_argument("--no-merge", action="store_true", help="a document a row, also where texts are equal")
    _add_loading(parser)

    grid = parser.add_argument_group("settings: every combination is evaluated, over one encoding")
    _add_passages(grid, action="append", more=" [whole]; again for another size")
    grid.add_argument("--whole", action="store_true", help="beside --passages, whole documents too")
    grid.add_argument("--dims", type=int, nargs="+", metavar="N", help="leading dimensions to keep [all]")
    grid.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["float32"], help="of document vectors [float32]"
    )
    grid.add_argument(
        "--indices",
        nargs="+",
        default=["flat"],
        metavar="INDEX",
        help="flat, hnsw, ivf, ivfpq, adaptive-DIM, or a factory string of FAISS [flat]",
    )
    grid.add_argument("--metric", metavar="NAME", help="of the table of several settings [ndcg@10]")

    beside = parser.add_argument_group("beside the model: BM25 over the encoder's own tokens (words for an API's)")
    choice = beside.add_mutually_exclusive_group()
    choice.add_argument("--no-bm25", action="store_true", help="without it")
    choice.add_argument("--fuse", action="store_true", help="and the fusion of both by z-scores")
    beside.add_argument(
        "--fuse-weight",
        type=float,
        metavar="W",
        help="of BM25 in the fusion, 1 - W of the model; choose it on training questions, not on these [0.5]",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="DIR",
        help="write metrics.json, per_query.jsonl and run.trec; BM25's to DIR/bm25, those of several settings to"
        " DIR/<setting>",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the reports that are already in DIR")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--style", choices=STYLES, default="text", help="of the tables [text]")
    form.add_argument("--json", action="store_true", help="print all metrics as JSON")


def _add_passages(parser: argparse._ActionsContainer, *, action: str = "store", more: str = " [whole]") -> None:
    parser.add_argument(
        "--passages",
        type=int,
        nargs=2,
        action=action,
        metavar=("SIZE", "STRIDE"),
        help=f"cut documents into windows of SIZE tokens, one every STRIDE; the best one counts{more}",
    )


def _evaluate(options: argparse.Namespace) -> None:
    grid = _grid(options)
    num_settings = int(np.prod([len(values) for values in grid.values()]))
    weight = _fusion_weight(options, num_settings)
    cutoffs = {"ks": options.ks, "depth": options.depth, "metrics": options.metrics, "gain": options.gain}
    if options.out:
        check_writable(options.out)
        if not options.overwrite and (there := _saved_reports(Path(options.out))):
            raise ValueError(f"{there[0]}: holds a report already; choose another --out, or --overwrite")
    elif options.overwrite:
        raise ValueError("--overwrite is for --out, which is not given")
    dataset = _load_data(options.data, options, merge=not options.no_merge, split=options.split)
    metric = _grid_metric(options, num_settings, dataset, cutoffs)
    embedder = _load_encoding(options, adapter=options.adapter)
    reports = evaluate_grid(embedder, dataset, **grid, **cutoffs)
    beside = {} if options.no_bm25 else _baselines(embedder, dataset, reports[0], weight, cutoffs)
    if options.out:
        _save(Path(options.out), reports, beside)
    _print_store(embedder)
    if options.json:
        print(json.dumps(_as_json(reports, beside), indent=2))
    elif num_settings == 1:
        _print_report(reports[0], beside, options.style)
    else:
        if options.style == "text":
            print(f"{_title(reports[0])}, {metric}; differences to {setting_name(grid_base(reports).setting)}\n")
        print(format_grid([*reports, *beside.values()], metric=metric, style=options.style))


def _grid(options: argparse.Namespace) -> dict[str, tuple]:
    """What `evaluate_grid` takes, each value once."""
    if options.dim is not None and options.dims:
        raise ValueError(f"--dim is {options.dim} and --dims {options.dims}, expected one of the two")
    if options.whole and not options.passages:
        raise ValueError("--whole is for --passages, which is not given")
    passages = [tuple(pair) for pair in options.passages or ()]
    if options.whole or not passages:
        passages.insert(0, None)
    grid = {
        "dims": options.dims or [options.dim],
        "precisions": options.precisions,
        "indices": options.indices,
        "passages": passages,
    }
    return {name: tuple(dict.fromkeys(values)) for name, values in grid.items()}


def _fusion_weight(options: argparse.Namespace, num_settings: int) -> float | None:
    """The weight of BM25; None: nothing is fused."""
    if not options.fuse:
        if options.fuse_weight is not None:
            raise ValueError("--fuse-weight is for --fuse, which is not given")
        return None
    if num_settings > 1:
        raise ValueError(f"--fuse is for one setting, these are {num_settings}")
    weight = 0.5 if options.fuse_weight is None else options.fuse_weight
    if not 0 <= weight <= 1:
        raise ValueError(f"--fuse-weight is {weight}, expected 0 to 1")
    return weight


def _grid_metric(options: argparse.Namespace, num_settings: int, dataset: RetrievalDataset, cutoffs: dict) -> str:
    """The metric of the table of several settings, found to be one before anything is encoded."""
    if num_settings == 1:
        if options.metric:
            raise ValueError("--metric is for several settings, this is one")
        return ""
    # A run that finds nothing has the metrics that any other has.
    report = evaluate_run(Run.from_dict({}), dataset, **cutoffs)
    names, main = report.per_query, main_metrics(report)
    metric = options.metric or next((name for name in main if name.startswith("ndcg")), main[0])
    if metric not in names:
        raise ValueError(f"--metric is {metric!r}, expected one of {', '.join(names)}")
    return metric


def _baselines(
    embedder: Embedder | ApiEmbedder,
    dataset: RetrievalDataset,
    report: Report,
    weight: float | None,
    cutoffs: Mapping[str, Any],
) -> dict[str, Report]:
    """BM25's report and, with its weight, that of the fusion."""
    tokenize = getattr(embedder, "tokenize", None)
    if tokenize is None:
        print("bm25 is over words: which tokens the model reads is not known", file=sys.stderr)
    run = bm25_run(dataset, tokenize=tokenize, depth=cutoffs["depth"])
    setting = {"index": BM25, "tokens": "words" if tokenize is None else "the encoder's"}
    reports = {BM25: _with_setting(evaluate_run(run, dataset, **cutoffs), setting)}
    if weight is not None:
        fused = fuse([run, report.run], method="zscore", weights=(weight, 1 - weight), depth=cutoffs["depth"])
        setting = {"index": FUSED, "method": "zscore", "bm25_weight": weight}
        reports[FUSED] = _with_setting(evaluate_run(fused, dataset, **cutoffs), setting)
    return reports


def _with_setting(report: Report, setting: Mapping[str, Any]) -> Report:
    return dataclasses.replace(report, setting={**setting, **report.setting})


def _saved_reports(out: Path) -> list[Path]:
    """Folders of reports that an earlier evaluation may have written to `out`."""
    return [folder for folder in (out, *sorted(out.glob("*/"))) if (folder / "metrics.json").is_file()]


def _save(out: Path, reports: Sequence[Report], beside: Mapping[str, Report]) -> None:
    # None stays of an evaluation of something else.
    for folder in _saved_reports(out):
        for name in REPORT_FILES:
            (folder / name).unlink(missing_ok=True)
        if folder != out and not any(folder.iterdir()):
            folder.rmdir()
    for report in reports:
        report.save(out if len(reports) == 1 else out / setting_name(report.setting))
    for name, report in beside.items():
        report.save(out / name)


def _as_json(reports: Sequence[Report], beside: Mapping[str, Report]) -> dict[str, Any]:
    """One setting's metrics as they are, several under "settings"; beside them those of BM25 and the fusion."""
    settings = [{"setting": r.setting, "metrics": r.metrics, "costs": r.costs} for r in reports]
    found = reports[0].metrics if len(reports) == 1 else {"settings": settings}
    return {**found, **{name: report.metrics for name, report in beside.items()}}


def _print_report(report: Report, beside: Mapping[str, Report], style: str) -> None:
    if style == "text":
        print(report)
        if not beside:
            return
        print()
    print(format_reports({report.name: report, **beside}, style=style))


def _title(report: Report) -> str:
    return str(report).partition("\n")[0]


# embedft compare


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports",
        metavar="REPORT",
        nargs="+",
        help="folders that evaluate --out or a run's eval/ wrote, over the same questions; the first is the base",
    )
    parser.add_argument("--metric", nargs="+", default=["ndcg@10"], metavar="NAME", help="metrics [ndcg@10]")
    parser.add_argument(
        "--method", choices=("percentile", "bca"), default="percentile", help="of the bootstrap interval [percentile]"
    )
    parser.add_argument("--style", choices=STYLES, default="text", help="of the table [text]")
    parser.add_argument(
        "--save-plot",
        metavar="FILE",
        help="draw two reports question by question, by the first metric (.png, .pdf, .svg; needs matplotlib)",
    )


def _compare(options: argparse.Namespace) -> None:
    if len(options.reports) < 2:
        raise ValueError(f"one report, {options.reports[0]}: expected a base and at least one other")
    if options.save_plot and len(options.reports) > 2:
        raise ValueError(f"--save-plot is for two reports, these are {len(options.reports)}")
    base, *others = [_load_report(Path(folder)) for folder in options.reports]
    for folder, other in zip(options.reports[1:], others, strict=True):
        _check_same_questions(base, other, options.reports[0], folder)
    base_name, *names = short_names(options.reports)
    comparisons: dict[str, list] = {name: [] for name in names}
    for metric in dict.fromkeys(options.metric):
        found = compare_all(base, others, metric=metric, method=options.method)
        for name, comparison in zip(names, found, strict=True):
            comparisons[name].append(comparison)
    if options.save_plot:
        figure = plot_questions(base, others[0], metric=options.metric[0], names=(base_name, names[0]))
        save_figure(figure, options.save_plot)
    print(format_comparisons(comparisons, base=base_name, style=options.style))
    if options.style == "text":
        one = comparisons[names[0]][0]
        print(
            f"\n{one.num_queries:,} questions in {one.num_clusters:,} clusters (questions that share a document);"
            f" differences to {base_name};\nintervals by bootstrap ({one.method}), p-values by sign flips"
        )


def _load_report(folder: Path) -> Report:
    if not (folder / "metrics.json").is_file():
        found = sorted(str(path.parent) for part in ("*", "eval/*") for path in folder.glob(f"{part}/metrics.json"))
        if found:
            raise ValueError(f"{folder}: is no report, but holds {', '.join(found)}")
    return Report.load(folder)


def _check_same_questions(base: Report, other: Report, base_folder: str, folder: str) -> None:
    only = [sorted(set(a.query_ids) - set(b.query_ids)) for a, b in ((base, other), (other, base))]
    if only[0] or only[1]:
        told = [
            f"{len(ids):,} only in {where} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
            for ids, where in zip(only, (base_folder, folder), strict=True)
            if ids
        ]
        raise ValueError(f"the reports are over different questions: {'; '.join(told)}")


def short_names(folders: Sequence[str | Path]) -> list[str]:
    """A name for each folder: its path without what all of them begin and end with; one given again gets a number."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for step in (0, -1):  # from the front, then from the back
        while min(map(len, parts)) > 1 and len({path[step] for path in parts}) == 1:
            parts = [path[1:] if step == 0 else path[:-1] for path in parts]
    names: list[str] = []
    for path in parts:
        name = "/".join(path)
        numbered = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        names.append(next(other for other in numbered if other not in names))
    return names


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {
    "evaluate": (_add_evaluate, _evaluate, "measure how well a model finds the right document"),
    "compare": (_add_compare, _compare, "say whether reports differ, question by question"),
}
