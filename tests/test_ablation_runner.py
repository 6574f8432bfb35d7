"""runner.py, cell.py and `embedft ablate`: cells finish once, whatever is killed, full, broken or started twice.

Cells run in forks of the test's process, so that no start costs the imports, but for one test of the real process.
"""

import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from naming import names, naming
from tiny import make_dataset
from tiny_grid import write_inputs

from embedft import (
    AdapterConfig,
    Report,
    RetrievalDataset,
    bm25_run,
    evaluate,
    evaluate_run,
    fit_adapter,
    fuse,
    load_embedder,
)
from embedft.ablation import runner
from embedft.ablation.cell import run_cell
from embedft.ablation.grid import Grid
from embedft.ablation.plan import plan
from embedft.ablation.runner import expected_seconds, run_grid, shard_of
from embedft.cli import main
from embedft.encoders.store import Store
from embedft.files import read_json, read_jsonl, read_object, write_json
from embedft.retrieval.pca import fit_pca
from embedft.retrieval.suite import Suite
from embedft.retrieval.windows import matching_windows

BASE = {"model": "model", "data": ["train.jsonl"], "validation": "val.jsonl", "epochs": 1, "batch_size": 4, "lr": 1e-3}
TESTS = {"uber": "uber.jsonl", "scifact": "scifact.jsonl"}
START = runner.start
COMMAND = (
    "ablate model train.jsonl --validation val.jsonl --test uber.jsonl scifact=scifact.jsonl --epochs 1 --batch-size 4 "
    "--lr 1e-3 --axis loss.temperature 0.02 0.1 --axis evaluate.dim null 16 --seeds 0 1 --out out"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:  # what forks would otherwise all compute: sources of fingerprints
        patch.chdir(folder)
        patch.setattr("embedft.training.run_folder._git_state", lambda: (None, b""))
        grid = make_grid("first")
        run_cell(grid.folder(grid.cells[1]))
    return folder


class Fork:
    """A cell in a fork, with the part of `subprocess.Popen` that the runner uses."""

    def __init__(self, folder: Path, device: str | None, lock: int, threads: int | None):
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
                self.prepare(folder)
                run_cell(folder, device=device)
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)

    def prepare(self, folder: Path) -> None:
        with open("starts.txt", "a") as file:
            file.write(f"{folder.name}\n")

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def terminate(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


@pytest.fixture(autouse=True)
def place(inputs, tmp_path, monkeypatch) -> Path:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("first"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "start", Fork)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.training.run_folder._git_state", lambda: (None, b""))
    return tmp_path


def make_grid(out: str = "out", axes: dict | None = None, seeds: tuple = (0,), **changes) -> Grid:
    grid = plan(BASE | changes, out, axes=axes or {}, tests=TESTS, seeds=seeds)
    grid.save()
    return grid


def starts() -> list[str]:
    return Path("starts.txt").read_text().split() if Path("starts.txt").exists() else []


def results(grid: Grid) -> dict[str, dict[str, bytes]]:
    """{cell: {report: its questions' metrics}}, to the digit."""
    found = {}
    for cell in grid.cells:
        assert grid.is_done(cell), cell
        reports = sorted((grid.folder(cell) / "eval").iterdir())
        expected = {*grid.tests, *(["validation"] if grid.base["validation"] else [])}
        assert {report.name for report in reports} == expected
        found[cell.key] = {report.name: (report / "per_query.jsonl").read_bytes() for report in reports}
    return found


def test_a_cell_reports_what_evaluate_and_fuse_do():
    """Untrained and trained, alone and fused: the same as by the library's own calls."""
    how = {"passages": [8, 4], "dim": 16, "bm25_ngram": 2, "bm25_b": 1.0}
    grid = make_grid(axes={"evaluate.fuse_weight": [0.4]}, evaluate=how)
    rows = []
    assert run_grid(grid, on_row=rows.append) == {}
    dataset = RetrievalDataset.load("uber.jsonl")
    for cell in grid.cells:
        model = "model" if cell.run is None else grid.out / "runs" / cell.run / "model"
        embedder = load_embedder(model, device="cpu")
        expected = evaluate(embedder, dataset, passages=(8, 4), dim=16)
        if cell.config["evaluate"]["fuse_weight"]:
            bm25 = bm25_run(dataset, tokenize=embedder.tokenize, ngram=2, b=1.0)
            run = fuse([bm25, expected.run], method="zscore", weights=(0.4, 0.6), depth=100)
            expected = evaluate_run(run, dataset)
        found = Report.load(grid.folder(cell) / "eval" / "uber")
        assert found.metrics == expected.metrics
        assert found.setting["passages"] == [8, 4]
        fused = [0.4, 2, 1.0] if cell.config["evaluate"]["fuse_weight"] else [None] * 3
        assert [found.setting.get(f"bm25_{name}") for name in ("weight", "ngram", "b")] == fused
        windows = [line for _, line in read_jsonl(grid.folder(cell) / "eval" / "uber" / "windows.jsonl")]
        assert windows == matching_windows(embedder, dataset, (8, 4), dim=16)
        assert not (grid.folder(cell) / "eval" / "validation" / "windows.jsonl").exists()
        (row,) = (row for row in rows if row.startswith(f"{cell} "))
        assert f"{expected.metrics['ndcg@10']:.4f}" in row
    assert (grid.out / "store" / "store.sqlite").exists()


def test_principal_components_are_those_of_the_cells_own_model():
    grid = make_grid(evaluate={"pca": 4, "passages": [8, 4]})
    assert run_grid(grid, on_row=list) == {}
    for cell, model in zip(grid.cells, ("model", grid.out / "runs" / grid.cells[1].run / "model"), strict=True):
        embedder = load_embedder(model, device="cpu")
        embedder.attach(fit_pca(embedder, RetrievalDataset.load("train.jsonl"), 4, passages=(8, 4)))
        for name, path in (TESTS | {"validation": "val.jsonl"}).items():
            expected = evaluate(embedder, RetrievalDataset.load(path), passages=(8, 4))
            found = Report.load(grid.folder(cell) / "eval" / name)
            assert found.metrics == expected.metrics
            assert found.setting["adapter"] == "pca-4"


@pytest.mark.parametrize("adapter", [{}, {"side": "both", "lr": 1e-2}])
def test_a_cell_is_trained_in_float32_and_searched_in_the_type_asked_for(adapter):
    grid = make_grid(adapter=adapter, max_length=24, axes={"evaluate.dtype": ["bfloat16"]})
    assert run_grid(grid, on_row=list) == {}
    assert len({cell.run for cell in grid.cells if cell.run}) == 1
    for cell in grid.cells:
        dtype, run = cell.config["evaluate"]["dtype"], cell.run and grid.out / "runs" / cell.run
        how = {"device": "cpu", "max_length": 24, "dtype": dtype}
        model = load_embedder("model" if adapter or not run else run / "model", **how)
        if adapter and run:
            model = load_embedder("model", adapter=run, **how)
        expected = evaluate(model, RetrievalDataset.load("uber.jsonl"))
        found = Report.load(grid.folder(cell) / "eval" / "uber")
        assert (found.run.scores == expected.run.scores).all()
        assert found.setting.get("dtype", "float32") == dtype


def test_vectors_that_another_cell_needs_are_kept(monkeypatch):
    """Those of a model that is searched in two ways; not those of a model that one cell alone searches."""
    counts = []
    for axes in ({"lr": [2e-3]}, {"evaluate.dim": [16]}):
        grid = make_grid(f"out{len(counts)}", axes=axes, validation=None)
        assert run_grid(grid, on_row=list) == {}
        counts.append(len(Store(grid.out / "store").spaces()))
    assert counts == [1, 2]


@pytest.mark.parametrize("passages", [None, [8, 4]])
def test_an_adapter_is_fitted_on_the_frozen_model(passages):
    grid = make_grid(
        adapter={"side": "both", "lr": 1e-2}, passages=passages, max_length=24, axes={"evaluate.dim": [16]}
    )
    assert run_grid(grid, on_row=list) == {}
    cells = [cell for cell in grid.cells if cell.run]
    assert len({cell.run for cell in cells}) == 1
    run, train = grid.out / "runs" / cells[0].run, RetrievalDataset.load("train.jsonl")
    embedder = load_embedder("model", device="cpu", max_length=24)
    queries_QD = embedder.encode(list(train.queries.values()), role="query")
    documents = list(train.texts.values())
    documents_ND, source = (
        embedder.encode_passages(documents, passages) if passages else (embedder.encode(documents), None)
    )
    config = AdapterConfig(side="both", lr=1e-2, seed=0)
    adapter = fit_adapter(queries_QD, documents_ND, train.qrels_by_row(), config, source=source, base=embedder.base())
    embedder.attach(adapter)
    for cell in cells:
        dim = cell.config["evaluate"]["dim"]
        expected = evaluate(embedder, RetrievalDataset.load("uber.jsonl"), passages=passages, dim=dim)
        assert Report.load(grid.folder(cell) / "eval" / "uber").metrics == expected.metrics
        result = read_object(grid.folder(cell) / "result.json")
        assert result["num_weights_trained"] == 2 * (32 * 32 + 32)
        assert result["seconds"]["train"] == list(read_jsonl(run / "train.jsonl"))[-1][1]["seconds"] > 0
        assert result["best_step"] is None
    (untrained, *_) = (Report.load(grid.folder(cell) / "eval" / "uber") for cell in grid.cells if not cell.run)
    trained = Report.load(grid.folder(cells[0]) / "eval" / "uber")
    assert (untrained.run.scores != trained.run.scores).any()


def test_a_result_says_what_the_cell_cost():
    grid = make_grid()
    run_grid(grid, on_row=list)
    untrained, trained = (read_object(grid.folder(cell) / "result.json") for cell in grid.cells)
    weights = sum(x.numel() for x in load_embedder("model", device="cpu").parameters())
    assert (untrained["num_weights_trained"], trained["num_weights_trained"]) == (0, weights)
    assert untrained["seconds"]["train"] == 0 < trained["seconds"]["train"]
    assert min(untrained["peak_bytes"], trained["peak_bytes"]) > 10_000_000


def test_training_costs_what_the_log_of_its_run_says():
    """Also for a cell that finds the training done."""
    grid = make_grid()
    run_grid(grid, on_row=list)
    trained = grid.cells[1]
    log, result = grid.out / "runs" / trained.run / "train.jsonl", grid.folder(trained) / "result.json"
    before = read_object(result)
    with open(log, "a") as file:
        file.write('{"step": 3, "seconds": 1000.0, "peak_bytes": 1125899906842624}\n')
    result.unlink()
    assert run_grid(grid, on_row=list) == {}
    assert read_object(result)["seconds"]["train"] == pytest.approx(before["seconds"]["train"] + 1000)
    assert read_object(result)["peak_bytes"] == 2**50


@pytest.mark.parametrize(("validation", "best"), [("train.jsonl", 2), ("val.jsonl", 0), (None, None)])
def test_a_result_says_which_step_was_kept(validation, best):
    """Training improves on what it trains on, and not on the random pairs of val.jsonl."""
    grid = make_grid(validation=validation)
    run_grid(grid, on_row=list)
    assert [read_object(grid.folder(cell) / "result.json")["best_step"] for cell in grid.cells] == [None, best]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", ""),
        ("result.json", '{"seconds": {"train": 1}, "peak_bytes": 2}'),
        ("eval/uber/metrics.json", None),
        ("eval/validation/metrics.json", '{"metrics": {"ndcg@10": "high"}}'),
    ],
)
def test_a_damaged_file_of_a_finished_cell_is_named_and_replaced(name, content, capsys):
    """What is not damaged stays: training, the other reports, and the other cells."""
    words = COMMAND.split()
    at = words.index("--axis")
    command = [*words[:at], "--seeds", "0", "--out", "out"]
    assert main(command) == 0
    grid = Grid.load("out")
    (untrained, trained), before = grid.cells, results(grid)
    path = grid.folder(trained) / name
    path.unlink() if content is None else path.write_text(content)
    kept = [*grid.out.glob("runs/**/*.*"), *(grid.folder(trained) / "eval" / "scifact").iterdir()]
    kept = {each: each.stat().st_ino for each in kept if each.suffix != ".lock"}
    assert len(kept) > 10
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()] == ["finished", "to"]
    assert names(output.err.splitlines()[0], path)
    assert main(command) == 0
    assert sum(str(path) in line for line in capsys.readouterr().err.splitlines()) == 1
    assert results(Grid.load("out")) == before
    assert [starts().count(cell.key) for cell in (untrained, trained)] == [1, 2]
    assert {each: each.stat().st_ino for each in kept} == kept


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1, "base": {}}'])
def test_a_damaged_grid_is_named_and_written_again_once_it_is_removed(content, capsys):
    words = COMMAND.split()
    command = [*words[: words.index("--axis")], "--seeds", "0", "--out", "out"]
    assert main(command) == 0
    begun, path = starts(), Path("out/grid.json")
    path.write_text(content)
    capsys.readouterr()
    for words in (command, ["report", "out"]):
        assert main(words) == 2
        assert names(capsys.readouterr().err, path)
    path.unlink()
    assert main(["report", "out"]) == 2
    assert main(command) == 0
    assert main(["report", "out"]) == 0
    assert starts() == begun


def test_lora_trains_few_weights():
    grid = make_grid(lora={"rank": 2})
    assert run_grid(grid, on_row=list) == {}
    whole = sum(x.numel() for x in load_embedder("model", device="cpu").parameters())
    assert 0 < read_object(grid.folder(grid.cells[1]) / "result.json")["num_weights_trained"] < whole / 10


@pytest.mark.slow
def test_finished_cells_are_skipped_and_a_grid_may_grow():
    run_grid(make_grid(axes={"lr": [2e-3]}), on_row=list)
    first = starts()
    assert len(first) == 3
    run_grid(make_grid(axes={"lr": [2e-3]}), on_row=list)
    assert starts() == first
    run_grid(more := make_grid(axes={"lr": [2e-3, 3e-3]}, seeds=(0, 1)), on_row=list)
    assert len(starts()) == len(set(starts())) == 3 * 2 + 1
    assert set(starts()) == {cell.key for cell in more.cells}


def test_a_cell_that_crashes_costs_only_itself_and_is_tried_again(monkeypatch, capsys):
    def break_one(self, folder):
        Fork.prepare(self, folder)
        if read_object(folder / "cell.json")["config"]["lr"] == 2e-3:
            raise RuntimeError("broken")

    grid = make_grid(axes={"lr": [2e-3]})
    monkeypatch.setattr(runner, "start", type("Broken", (Fork,), {"prepare": break_one}))
    rows = []
    (broken,) = (grid.folder(cell) for cell in grid.cells if cell.config["lr"] == 2e-3 and cell.run)
    assert run_grid(grid, on_row=rows.append) == {str(broken): "RuntimeError: broken"}
    assert [row for row in rows if "RuntimeError: broken" in row]
    found = read_object(broken / "failed.json")
    assert (found["error"], found["log"]) == ("RuntimeError: broken", "log.txt")
    assert "Traceback" in (broken / "log.txt").read_text()
    assert sum(map(grid.is_done, grid.cells)) == 2
    monkeypatch.setattr(runner, "start", Fork)
    assert run_grid(grid, on_row=list) == {}
    assert not (broken / "failed.json").exists()
    assert len(starts()) == 4


def test_a_killed_cell_is_reported_by_its_signal(monkeypatch):
    kill = type("Killed", (Fork,), {"prepare": lambda self, folder: os.kill(os.getpid(), signal.SIGKILL)})
    monkeypatch.setattr(runner, "start", kill)
    assert set(run_grid(make_grid(), on_row=list).values()) == {"killed by SIGKILL"}


def test_a_cell_that_ends_without_a_result_has_failed(monkeypatch):
    quiet = type("Quiet", (Fork,), {"prepare": lambda self, folder: os._exit(0)})
    monkeypatch.setattr(runner, "start", quiet)
    assert set(run_grid(make_grid(), on_row=list).values()) == {"exit code 0"}


def test_every_device_gets_a_cell_and_they_share_the_threads(monkeypatch):
    started = []

    class Seen(Fork):
        def __init__(self, folder, device, lock, threads):
            started.append((device, threads))
            super().__init__(folder, None, lock, threads)

        def prepare(self, folder):
            os._exit(1)

    monkeypatch.setattr(runner, "start", Seen)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    grid = make_grid()
    run_grid(grid, devices=["cuda:0", "cuda:1"], on_row=list)
    assert started == [("cuda:0", 4), ("cuda:1", 4)]
    run_grid(grid, on_row=list)
    assert started[2:] == [(None, None)] * 2


def test_an_interrupt_ends_the_cells_and_the_next_call_goes_on(monkeypatch):
    running = []

    class Seen(Fork):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            running.append(self)

    def interrupt(seconds):
        if len(running) == 2:
            raise KeyboardInterrupt

    grid = make_grid(axes={"lr": [2e-3]})
    with monkeypatch.context() as patch:
        patch.setattr(runner, "start", Seen)
        patch.setattr(runner.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_grid(grid, workers=2, on_row=list)
    assert [each.returncode for each in running] == [-signal.SIGTERM] * 2
    assert not list(grid.out.glob("cells/*/failed.json"))
    assert run_grid(grid, on_row=list) == {}
    results(grid)


@pytest.mark.slow
def test_cells_with_the_same_training_train_once():
    grid = make_grid(axes={"evaluate.dim": [None, 16, 8]}, seeds=(0, 1))
    assert run_grid(grid, workers=3, on_row=list) == {}
    assert len(list((grid.out / "runs").glob("*/DONE"))) == 2
    logs = [log.read_text().splitlines() for log in (grid.out / "runs").glob("*/train.jsonl")]
    steps = [[json.loads(line)["step"] for line in log if "loss" in json.loads(line)] for log in logs]
    assert steps == [[1, 2], [1, 2]]


@pytest.mark.parametrize("what", ["code", "train", "uber"])
def test_a_cell_does_not_run_with_other_code_or_data_than_it_is_named_after(monkeypatch, what):
    grid = make_grid()
    if what == "code":
        monkeypatch.setattr("embedft.ablation.cell.code_sha256", lambda: "changed")
    else:
        make_dataset(9, 9).save(f"{what}.jsonl")
    failed = run_grid(grid, on_row=list)
    assert failed
    assert all(names(error, what) or names(error, f"test {what}") for error in failed.values())


def test_shards_are_apart_complete_and_keep_training_together():
    grid = make_grid(axes={"evaluate.dim": [None, 16], "lr": [2e-3, 3e-3]}, seeds=(0, 1))
    shards = [shard_of(grid.cells, number, 3) for number in (1, 2, 3)]
    assert sorted(cell.key for shard in shards for cell in shard) == sorted(cell.key for cell in grid.cells)
    runs = [{cell.run for cell in shard} - {None} for shard in shards]
    assert all(runs)
    assert sum(map(len, runs)) == len(set().union(*runs)) == 6


def test_the_expected_time_is_the_mean_of_what_was_measured():
    """By hand: evaluation takes 2 s untrained, and (1 + 3) / 2 s trained; training takes (10 + 30) / 2 s."""
    grid = make_grid(axes={"lr": [2e-3], "evaluate.dim": [None, 16]}, seeds=(0, 1))
    untrained, trained = ([cell for cell in grid.cells if (cell.run is None) == is_so] for is_so in (True, False))
    assert (len(untrained), len(trained), len({cell.run for cell in trained})) == (2, 6, 4)
    assert expected_seconds(grid, grid.cells) is None
    measured = ((untrained[0], 0, 5), (trained[0], 10, 1), (trained[1], 30, 3))
    for cell, train_seconds, evaluate_seconds in measured:
        result = {"seconds": {"train": train_seconds, "evaluate": evaluate_seconds}, "peak_bytes": 0}
        (grid.folder(cell) / "result.json").write_text(json.dumps(result))
        for test in grid.tests:
            write_json(grid.folder(cell) / "eval" / test / "metrics.json", {"metrics": {}})
        if cell.run:
            (grid.out / "runs" / cell.run).mkdir(parents=True)
            (grid.out / "runs" / cell.run / "DONE").touch()
    assert expected_seconds(grid, grid.cells) == 2 * 5 + 6 * 2 + 2 * 20
    assert expected_seconds(grid, untrained[1:]) == 5
    assert expected_seconds(grid, []) == 0


def test_tests_are_measured_by_the_metric_of_the_grid():
    """Though an axis changes the metric that selects weights, and one point has no validation."""
    grid = plan(
        BASE | {"select": "ndcg@7"},
        "out",
        points=[{"select": "mrr@4"}, {"validation": None}],
        tests=TESTS,
        seeds=[0],
    )
    grid.save()
    rows = []
    assert run_grid(grid, on_row=rows.append) == {}
    for cell in grid.cells:
        assert "ndcg@7" in Report.load(grid.folder(cell) / "eval" / "uber").metrics
    assert len(rows) == 1 + len(grid.cells)


def test_several_validation_sets_make_a_suite():
    """Both sets choose the weights; where the one that training improves on does so alone, another step is kept."""
    make_dataset(8, 8, seed=4).save("other.jsonl")
    how = {"validation": ["seen=train.jsonl", "other.jsonl"]}
    mean, one = make_grid("mean", **how), make_grid("one", **how, select="seen/ndcg@10")
    for grid in (mean, one):
        rows = []
        assert run_grid(grid, on_row=rows.append) == {}
        assert rows[0].split()[:-1] == [grid.select, *TESTS, "validation", "validation/seen", "validation/other"]
        trained = grid.folder(grid.cells[1])
        embedder = load_embedder(grid.out / "runs" / grid.cells[1].run / "model", device="cpu")
        sets = {name: RetrievalDataset.load(f"{path}.jsonl") for name, path in (("seen", "train"), ("other", "other"))}
        expected = evaluate(embedder, sets)
        found = Suite.load(trained / "eval" / "validation")
        assert found.metrics == expected.metrics
        values = [found.metrics[grid.select], found["seen"].metrics["ndcg@10"], found["other"].metrics["ndcg@10"]]
        (row,) = (row for row in rows if row.startswith("seed=0"))
        assert row.split()[3:-1] == [f"{value:.4f}" for value in values]
        log = [
            line["metrics"]
            for _, line in read_jsonl(trained.parents[1] / "runs" / grid.cells[1].run / "train.jsonl")
            if "metrics" in line
        ]
        chosen = [metrics[grid.select] for metrics in log]
        assert read_object(trained / "result.json")["best_step"] == 2 * chosen.index(max(chosen))
    assert mean.cells[1].run != one.cells[1].run


def fork(work) -> int:
    """The process of a fork that leads a group of its own and ends with what `work` returns."""
    if pid := os.fork():
        return pid
    code = 9
    try:
        os.setsid()
        code = work()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


@pytest.mark.slow
def test_two_runners_share_the_work_and_repeat_no_cell():
    grid = make_grid(axes={"lr": [2e-3, 3e-3], "evaluate.dim": [None, 16]}, seeds=(0, 1))
    pids = [fork(lambda: len(run_grid(grid, workers=2, on_row=list))) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert sorted(starts()) == sorted(cell.key for cell in grid.cells)
    assert all(map(grid.is_done, grid.cells))


@pytest.mark.slow
def test_cells_killed_twenty_times_give_the_same_table():
    """24 cells; runners die with their cells, or alone, so that a cell goes on without its runner.
    Without validation, so that no cell keeps the weights that it began with."""
    axes = {"loss.temperature": [0.02, 0.1, 0.2, 0.3, 0.4], "evaluate.dim": [None, 16]}
    how = {"axes": axes, "seeds": (0, 1), "checkpoint_every": 1, "epochs": 2, "lr": 1e-2, "validation": None}
    whole, grid = make_grid("whole", **how), make_grid("killed", **how)
    assert len(grid.cells) == 2 * (2 * 5 + 1) + 2 == 24
    assert run_grid(whole, workers=2, on_row=list) == {}
    generator, killed = random.Random(0), 0
    while killed < 20 and not all(map(grid.is_done, grid.cells)):
        before = len(starts())
        pid = fork(lambda: len(run_grid(grid, workers=2, on_row=list)))
        while len(starts()) == before and not all(map(grid.is_done, grid.cells)):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        kill = generator.choice((os.kill, os.killpg))
        kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert run_grid(grid, workers=2, on_row=list) == {}
    assert killed == 20
    assert results(grid) == results(whole)
    assert len({reports["uber"] for reports in results(grid).values()}) > 12  # which differ


@pytest.mark.slow
def test_a_full_disk_loses_no_finished_cell(monkeypatch):
    """Models and checkpoints do not fit, reports do."""

    def fill(self, folder):
        Fork.prepare(self, folder)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    grid = make_grid(axes={"lr": [2e-3]})
    with monkeypatch.context() as patch:
        patch.setattr(runner, "start", type("Full", (Fork,), {"prepare": fill}))
        patch.setattr(runner, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run_grid(first := make_grid(axes={"lr": [2e-3]}), on_row=list)
        failed = run_grid(grid, on_row=list)
    trained = [cell for cell in grid.cells if cell.run]
    assert failed.keys() == {str(grid.folder(cell)) for cell in trained}
    assert all("File too large" in error for error in failed.values()), failed
    assert [cell for cell in first.cells if grid.is_done(cell)] == [cell for cell in grid.cells if not cell.run]
    assert run_grid(grid, on_row=list) == {}
    assert starts().count(grid.cells[0].key) == 1
    results(grid)


@pytest.mark.slow
def test_the_command_lists_runs_and_reports(capsys, monkeypatch):
    assert main([*COMMAND.split(), "--dry-run"]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2 + 5 * 2
    assert all(line.startswith("to do ") for line in output.out.splitlines())
    assert names(output.err, "out", "5 points", "2 seeds", "2 untrained", "12 cells", "12 to do")
    assert not Path("out").exists()
    assert main(COMMAND.split()) == 0
    output = capsys.readouterr()
    rows = output.out.splitlines()
    assert rows[0].split() == ["ndcg@10", "uber", "scifact", "validation", "seconds"]
    grid = Grid.load("out")
    assert len(rows) == 1 + len(grid.cells)
    means = {test: read_json(grid.folder(grid.cells[-1]) / "eval" / test / "metrics.json") for test in grid.tests}
    (row,) = (row for row in rows if row.startswith(f"{grid.cells[-1]} "))
    assert all(f"{mean['metrics']['ndcg@10']:.4f}" in row for mean in means.values())
    shutil.rmtree(grid.folder(grid.cells[-1]))
    assert main([*COMMAND.split(), "--dry-run"]) == 0
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()] == ["finished"] * 11 + ["to"]
    assert names(output.err, "1 to do", "minutes")
    monkeypatch.setattr(runner, "start", type("Broken", (Fork,), {"prepare": lambda self, folder: 1 / 0}))
    assert main(COMMAND.split()) == 1
    assert names(
        capsys.readouterr().err, str(grid.folder(grid.cells[-1])), "ZeroDivisionError: division by zero", "1 of 12"
    )
    assert main([*COMMAND.split(), "--dry-run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["finished"] * 11 + ["failed"]


def test_points_come_from_a_file_or_at_random(capsys):
    words = COMMAND.split()
    at = words.index("--axis")
    Path("points.json").write_text('[{"lr": 0.01}, {"lr": 0.02, "batch-size": 2}]')
    assert main([*words[:at], *words[at + 8 :], "--points", "points.json", "--dry-run"]) == 0
    assert names(capsys.readouterr().err, "3 points", "2 seeds", "7 cells")
    assert main([*words[:at], "--seeds", "0", "--out", "out", "--dry-run"]) == 0
    assert names(capsys.readouterr().err, "1 point", "1 seed", "2 cells")
    assert main([*words, "--sample", "2", "--dry-run"]) == 0
    assert names(capsys.readouterr().err, "3 points")


@pytest.mark.slow
def test_a_grid_file_makes_the_same_cells_as_the_command(capsys, monkeypatch):
    how = {"AXES": {"lr": [2e-3]}, "TESTS": {name: Path(path) for name, path in TESTS.items()}, "SEEDS": [0, 1]}
    Path("lr.py").write_text(f"from pathlib import Path, PosixPath\nBASE = {BASE}\n")
    with open("lr.py", "a") as file:
        file.writelines(f"{name} = {value}\n" for name, value in how.items())
    options = ["experiments.ablate", "lr.py", "--out", "from-file", "--set", "evaluate.dim=16", "lora={}"]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(SystemExit, match=naming(0)):
        runpy.run_module("experiments.ablate", run_name="__main__")
    words = "--epochs 1 --batch-size 4 --lr 1e-3 --axis lr 2e-3 --seeds 0 1 --out out --dry-run --evaluate dim=16"
    tests = [f"{name}={path}" for name, path in TESTS.items()]
    capsys.readouterr()
    assert main(["ablate", "model", "train.jsonl", "--validation", "val.jsonl", "--test", *tests, *words.split()]) == 0
    keys = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert keys == [cell.key for cell in Grid.load("from-file").cells]
    results(Grid.load("from-file"))


@pytest.mark.parametrize(
    ("text", "more", "facts"),
    [
        ("BASE = {}\nSEEDS = [0]", [], ("grid.py", "TESTS")),
        (None, [], ("grid.py", "no such file")),
        ("BASE = {}\nSEEDS = [0]\nTESTS = {}", ["--set", "lr"], ("lr", "KEY=VALUE")),
    ],
)
def test_a_bad_grid_file_is_refused(text, more, facts, monkeypatch, capsys):
    if text:
        Path("grid.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["experiments.ablate", "grid.py", *more])
    with pytest.raises(SystemExit, match=naming(2)):
        runpy.run_module("experiments.ablate", run_name="__main__")
    assert names(capsys.readouterr().err, *facts)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("--axis lr", ("lr", "[]")),
        ("--axis lr 1e-4 --axis lr 2e-4", ("lr", "twice")),
        ("--axis lrr 1e-4", ("lrr", "lr")),
        ("--seed 1", ("--seed", "--seeds")),
        ("--resume", ("--resume",)),
        ("--store vectors", ("--store",)),
        ("--shard 3/2", ("--shard", "3/2")),
        ("--device cpu --devices cpu", ("--device", "--devices")),
        ("--points points.json", ("--axis", "--points")),
        ("--sample 5", ("sample", 5, 4)),
        ("--test train=train.jsonl", ("train", 8, "training")),
        ("--test uber=val.jsonl", ("uber", "val.jsonl", "uber.jsonl")),
        ("--out train.jsonl", ("train.jsonl",)),
        ("--out model", ("model", "config.json")),
        ("--devices cpu nothing:0", ("nothing:0",)),
        ("--test =uber.jsonl", ("''",)),
        ("--workers 0", ("--workers", 0, 1)),
        ("--evaluate.dims 16", ("evaluate", "dims", "dim")),
    ],
)
def test_a_command_that_cannot_work_is_refused_in_one_line(words, facts, capsys):
    assert main([*COMMAND.split(), *words.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert names(line, *facts), line
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_cell_runs_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(runner, "start", START)
    grid = plan(BASE | {"model": "model"}, "out", axes={}, tests=TESTS, seeds=(0,))
    grid.save()
    assert run_grid(grid, devices=["cpu"], workers=2, on_row=list) == {}
    results(grid)


@pytest.mark.slow
def test_an_interrupt_stops_the_processes_and_says_how_to_go_on():
    """As a terminal sends it: to the command and its cells at once."""
    command = [sys.executable, "-m", "embedft", *COMMAND.split(), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    while not list(Path("out").glob("cells/*/log.txt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert names(error.splitlines()[-1], "interrupted", "out", "the same command continues")
    assert not list(Path("out").glob("cells/*/failed.json"))
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        os.killpg(process.pid, 0)
