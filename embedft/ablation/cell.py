"""One cell of a grid in a process of its own: trains, or finds its training done, and evaluates.

    python -m embedft.ablation.cell runs/temperature/cells/0f3c92a1b4d5e6f7 --device cuda:1

Killed at any point, it goes on from there. result.json, written last, means that the cell is finished.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from .. import device as devices
from ..commands.adapter import fit
from ..commands.finetune import Options, load_datasets
from ..commands.options import best_step, load_data, load_model, validated
from ..config import part
from ..data.dataset import RetrievalDataset
from ..data.mixture import join_datasets
from ..device import allow_deterministic
from ..encoders.embedder import Embedder
from ..files import append_jsonl, locked, read_json, read_jsonl, read_object, write_json, write_jsonl
from ..recipe.finetune import finetune
from ..recipe.job import measures
from ..retrieval.bm25 import bm25_run
from ..retrieval.evaluate import evaluate, evaluate_run
from ..retrieval.fusion import fuse
from ..retrieval.pca import fit_pca
from ..retrieval.report import Report
from ..retrieval.suite import Suite, load_reports
from ..retrieval.windows import matching_windows
from ..training.configs import AdapterConfig, FinetuneConfig
from ..training.parts import choose_parts
from ..training.run_folder import DONE, MODEL
from ..training.run_folder import LOG as TRAIN_LOG
from .grid import CELL, EVAL, RESULT, RUNS, STORE, VALIDATION, WINDOWS, Cell, Grid, code_sha256
from .results import read_windows
from .settings import Evaluation, settings_of

Datasets = RetrievalDataset | Mapping[str, RetrievalDataset]  # or {name: dataset} for several


def run_cell(folder: Path, *, device: str | None = None) -> None:
    """Trains and evaluates the cell in a grid's folder, and writes its result.
    Raises `ValueError` if code, model or data are no longer those that the cell is named after."""
    cell, out = Cell(**read_object(folder / CELL)), folder.parents[1]
    config = cell.config if cell.seed is not None else {k: v for k, v in cell.config.items() if k != "seed"}
    options, how, adapter = settings_of(config)
    options = replace(options, device=device)
    _check_same(cell, "code", code_sha256())
    dataset, validation = load_datasets(options)
    grid, plain = Grid.load(out, damaged={}), replace(options, format=None, split=None)
    sets = {f"test {name}": load_data(path, plain) for name, path in grid.tests.items()}
    sets |= {VALIDATION: validation} if validation is not None else {}
    for name, found in {**sets, **({"train": dataset} if "train" in cell.hashes else {})}.items():
        _check_same(cell, name, join_datasets(found).sha256())
    seconds, peak_bytes, num_weights, best = 0.0, 0, 0, None
    is_frozen = adapter is not None or cell.run is None
    is_shared = is_frozen or sum(each.run == cell.run for each in grid.cells) > 1
    searching = {"dtype": how.dtype, "store": out / STORE if is_shared else None}
    if cell.run is None:
        _check_same(cell, "model", load_model(options).sha256())
        embedder = load_model(options, **searching)
    else:
        run = out / RUNS / cell.run
        _ensure_trained(run, cell, options, adapter, dataset, validation)
        num_weights = read_json(run.with_suffix(".json"))
        records = [record for _, record in read_jsonl(run / TRAIN_LOG)]
        seconds = sum(record.get("seconds", 0.0) for record in records)
        peak_bytes = max(record.get("peak_bytes", 0) for record in records)
        best = best_step(validated(records, (adapter or options).select))
        if adapter is None:
            tuned = {"model": str(run / MODEL), "revision": None, "num_layers": None}
            embedder = load_model(replace(options, **tuned, query_prompt=None, document_prompt=None), **searching)
        else:
            adapted = {"max_length": options.max_length, "adapter": run}
            embedder = load_model(options, **adapted, **searching)
    start = time.perf_counter()
    if how.pca is not None:
        embedder.attach(fit_pca(embedder, join_datasets(dataset), how.pca, passages=how.passages))
    for name, questions in sets.items():
        place = folder / EVAL / name.removeprefix("test ")
        if not _is_saved(place):
            if how.passages is not None and name != VALIDATION:
                write_jsonl(place / WINDOWS, matching_windows(embedder, questions, how.passages, dim=how.dim))
            _evaluate(embedder, questions, how, grid.select).save(place)
    result = {
        "seconds": {"train": seconds, "evaluate": time.perf_counter() - start},
        "peak_bytes": max(peak_bytes, devices.peak_memory_bytes(embedder.device)),
        "num_weights_trained": num_weights,
        "best_step": best,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(folder / RESULT, result)


def _ensure_trained(
    run: Path,
    cell: Cell,
    options: Options,
    adapter: AdapterConfig | None,
    dataset: Datasets,
    validation: Datasets | None,
) -> None:
    """Trains into the run folder, unless another cell did or does."""
    waits = {"wait": lambda holder: print(f"{run}: waiting for {holder}, which trains it")}
    with locked(run.with_suffix(".lock"), **waits):
        if not (run / DONE).exists():
            embedder = load_model(options, store=run.parents[1] / STORE)
            _check_same(cell, "model", embedder.sha256())
            if adapter is None:
                _train(embedder, options, dataset, validation, run)
            else:
                _fit(embedder, adapter, options, dataset, run)


def _train(embedder: Embedder, options: Options, dataset: Datasets, validation: Datasets | None, run: Path) -> None:
    """Fine-tunes into the run folder, and records beside it how many weights were trained."""
    config = part(options, FinetuneConfig)
    if config.deterministic:
        allow_deterministic()
    frozen = choose_parts(embedder, config)
    trained = [x.numel() for name, x in embedder.named_parameters() if name not in frozen]
    embedder.lora = None
    write_json(run.with_suffix(".json"), sum(trained))
    finetune(embedder, dataset, config, validation=validation, out=run, existing="resume")


def _fit(embedder: Embedder, config: AdapterConfig, options: Options, dataset: Datasets, run: Path) -> None:
    """Fits an adapter into the run folder, and records beside it how many weights were trained.
    Its seconds are those of fitting: vectors of the frozen model are in the store, whichever cell computed them."""
    embedder.max_length = options.max_length or embedder.max_length
    adapter = fit(embedder, join_datasets(dataset), config, passages=options.passages, out=run)
    write_json(run.with_suffix(".json"), sum(x.numel() for x in adapter.parameters()))
    append_jsonl(run / TRAIN_LOG, {"seconds": adapter.costs["seconds"]})
    (run / DONE).touch()


def _is_saved(folder: Path) -> bool:
    """Whether the reports in a folder are whole; what a killed process left, or a damaged file, is not."""
    try:
        load_reports(folder)
        read_windows(folder)
    except (OSError, ValueError):
        return False
    return True


def _evaluate(embedder: Embedder, dataset: Datasets, how: Evaluation, select: str) -> Report | Suite:
    """The report of a search with the model, or of its fusion with BM25 over the model's tokens; of several, each."""
    if not isinstance(dataset, RetrievalDataset):
        return Suite({name: _evaluate(embedder, one, how, select) for name, one in dataset.items()})
    measured = measures(select)
    report = evaluate(embedder, dataset, passages=how.passages, dim=how.dim, precision=how.precision, **measured)
    if how.fuse_weight is None:
        return report
    weights, depth = (how.fuse_weight, 1 - how.fuse_weight), measured["depth"]
    bm25 = bm25_run(dataset, tokenize=embedder.tokenize, depth=depth, **how.bm25_given())
    fused = evaluate_run(fuse([bm25, report.run], method="zscore", weights=weights, depth=depth), dataset, **measured)
    said = {"fused_with": "bm25", "method": "zscore", "bm25_weight": how.fuse_weight, **how.bm25_setting()}
    return replace(fused, setting=report.setting | fused.setting | said, costs=report.costs)


def _check_same(cell: Cell, name: str, sha256: str) -> None:
    if cell.hashes[name] != sha256:
        raise ValueError(f"{name} changed since the grid was planned; run `embedft ablate` again")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="embedft.ablation.cell", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device")
    given = parser.parse_args()
    run_cell(given.folder, device=given.device)
