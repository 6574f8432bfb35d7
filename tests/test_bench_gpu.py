"""benchmarks/gpu.py and gpu.sh: everything once on the CPU, on tiny shapes; what fails or is missing."""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from naming import names

from benchmarks import gpu, suite
from benchmarks.gpu import KINDS, STEPS, Measurements, covered, cuda_tests, main, parser, slug

ROOT = Path(gpu.__file__).resolve().parents[1]
FEW = ("matrices", "search")


def run(out: Path, *options: str) -> dict:
    main(parser().parse_args(["--dry-run", "--device", "cpu", "--out", str(out), *options]))
    return json.loads(out.read_text())


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(suite, "batch_tokens", lambda device: 64)


def test_everything_once(tmp_path, monkeypatch, capsys):
    """But the profiler, which takes long to read what it saw: see below."""
    commands = []

    @contextlib.contextmanager
    def profiled(self):
        intervals = []
        yield intervals
        intervals.append((0, 1))  # a microsecond

    def run_script(command: list[str], seconds: float) -> tuple[str, str]:
        commands.append(command)
        if "--json" in command:
            Path(command[-1]).write_text(json.dumps({"rows": [{"case": "mix", "seconds": [2.0], "peer": "theirs"}]}))
        return "3 passed\n", ""

    monkeypatch.setattr(Measurements, "profiled", profiled)
    monkeypatch.setattr(gpu, "run_script", run_script)
    monkeypatch.setattr(gpu, "require", lambda package: None)
    found = run(tmp_path / "results" / "x.json")
    assert [failure["error"] for failure in found["failures"]] == []
    assert list(found["seconds"]) == list(STEPS)
    (result,) = found["results"]
    assert result["benchmark"] == "gpu"
    rows = {row["case"]: row for row in result["rows"]}
    cases = ["10^12 operations of matrix products, float32", "10^12 operations of matrix products, bfloat16", "tests"]
    for shape in ("tiny", "tiny mpnet"):
        cases += [f"encode {kind}, {shape}, {dtype} weights" for kind in KINDS for dtype in ("float32", "bfloat16")]
    cases += [f"step of 6 pairs, {shape}, Matryoshka" for shape in ("tiny", "tiny mpnet")]
    cases += ["encode mix, tiny", "train mix, tiny", "finance recipe, 2 epochs of 12 pairs"]
    cases += [f"cached step of {number} pairs, tiny" for number in (8, 12)]
    cases += ["exact search, 20 queries, 500 x 16", "step of 6 pairs, tiny, Matryoshka, compiled"]
    cases += ["encode contexts, tiny, float32 weights, compiled"]
    assert list(rows) == cases
    assert rows["tests"]["result"] == "3 passed"
    encoded = rows["encode longest, tiny, bfloat16 weights"]
    assert (encoded["tokens"], len(encoded["seconds"]), encoded["aim"]) == (8 * 512, 2, 0.45)
    assert 0.9998 < encoded["smallest_cosine"] < 1.00001
    assert rows["encode questions, tiny, float32 weights"]["aim"] == 0.35
    # Three batches, the first left out; four epochs of three pairs twice a step, 12 pairs in an epoch.
    step, recipe, cached = rows[cases[15]], rows["finance recipe, 2 epochs of 12 pairs"], rows[cases[21]]
    assert (step["texts"], len(step["seconds"])) == (2 * 6, 1 + 1)
    assert (recipe["texts"], len(recipe["seconds"])) == (2 * 2 * 12, 1)
    assert (cached["texts"], len(cached["seconds"])) == (2 * 12, 1)
    for row in (encoded, step, recipe):
        assert 0.99 < row["device_waits"] < 1
        assert row["products_when_busy"] > 0
        assert row["matrix_flops_per_second"] > 0
        assert row["peak_bytes"] > 0
    assert [command[2] for command in commands] == ["pytest", "benchmarks.bench_encode", "benchmarks.bench_train"]
    assert recipe["article_on_an_A10G_seconds"] == 3 * 60 + 26
    assert (rows["train mix, tiny"]["seconds"], rows["train mix, tiny"]["peer"]) == ([2.0], "theirs")
    assert [rows[f"{name} mix, tiny"]["aim_of_peer_by_embedft"] for name in ("encode", "train")] == [3, 2.5]
    assert "| finance recipe" in capsys.readouterr().out


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Measurements, "cached", broken)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    found = run(tmp_path / "x.json", "--steps", "cached", "peers", *FEW)
    assert [failure["benchmark"] for failure in found["failures"]] == ["cached", "peers"]
    assert names(found["failures"][0]["error"], "RuntimeError", "out of memory")
    assert names(found["failures"][1]["error"], "skipped", "sentence_transformers")
    assert len(found["results"][0]["rows"]) == 3
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("signal_too", [False, True])
def test_what_there_is_no_time_for_is_left_out(tmp_path, monkeypatch, capsys, signal_too):
    """Even inside a step, whose rows so far are kept; also when `timeout` ends it."""

    def endless(self):
        yield gpu.Row("first", [1.0])
        assert json.loads((tmp_path / "x.json").read_text())["results"][0]["rows"][-1]["case"] == "first"
        if signal_too:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(60)
        except Exception as error:
            raise AssertionError from error

    monkeypatch.setattr(Measurements, "cached", endless)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    seconds = "60" if signal_too else "0.5"
    found = run(tmp_path / "x.json", "--steps", "cached", *FEW, "--seconds", seconds)
    assert [failure["benchmark"] for failure in found["failures"]] == ["cached", *FEW]
    assert all(names(failure["error"], seconds) for failure in found["failures"])
    assert [row["case"] for row in found["results"][0]["rows"]] == ["first"]
    assert "| first" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before


def test_failing_tests_are_a_failure_beside_their_row(tmp_path, monkeypatch, capsys):
    out = "FAILED tests/test_x.py::test_y - assert 1\nERROR tests/test_z.py\n1 failed, 2 passed, 1 error in 3s\n"
    monkeypatch.setattr(gpu, "run_script", lambda command, seconds: (out, "exit code 1"))
    found = run(tmp_path / "x.json", "--steps", "tests")
    assert found["results"][0]["rows"][0]["result"] == "1 failed, 2 passed, 1 error in 3s"
    assert names(found["failures"][0]["error"], "exit code 1", "test_x.py::test_y", "test_z.py")


def test_the_tests_run_without_the_plugins_of_addopts(tmp_path, monkeypatch):
    """Without xdist, pytest refuses setup.cfg's --dist; and a file whose imports are missing is named."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_needs.py").write_text("import not_installed_anywhere")
    few = [str(ROOT / "tests" / "test_device.py"), str(tmp_path / "test_needs.py")]
    monkeypatch.setattr(gpu, "cuda_tests", lambda: few)
    found = run(tmp_path / "x.json", "--steps", "tests")
    (row,) = found["results"][0]["rows"]
    assert re.search(r"1 (skipped|passed), \d+ deselected, 1 error", row["result"])
    assert names(found["failures"][0]["error"], "not_installed_anywhere")


def test_every_test_that_needs_a_gpu_is_found():
    """None is skipped without the marker, and no file with the marker or the fixture is left out."""
    found = {Path(path).name for path in cuda_tests()}
    assert {"test_attention.py", "test_device.py", "test_devices.py", "test_every_loss.py"} <= found
    for path in sorted(ROOT.glob("tests/test_*.py")):
        source = path.read_text("utf-8")
        assert not re.search(r"skipif\([^\n]*(cuda|default_device)", source), f"{path.name}: mark it cuda"
        tests = [
            x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef) and x.name.startswith("test_")
        ]
        needs = [x.name for x in tests if "device" in {argument.arg for argument in x.args.args}]
        needs += [x.name for x in tests if "mark.cuda" in "".join(map(ast.unparse, x.decorator_list))]
        assert not needs or path.name in found, f"{path.name}: {needs}"


def test_intervals_that_overlap_count_once():
    """By hand: 0 to 3, within it 1 to 2, 2 to 4, and 6 to 7."""
    assert covered([(6, 7), (0, 3), (1, 2), (2, 4)]) == 5
    assert covered([]) == 0


def test_the_profiler_sees_the_device(tmp_path, device):
    """Products, then a pause in which the device waits; on the CPU, torch's operations stand in for kernels."""
    if device.type not in gpu.SEEN:
        pytest.skip("torch's profiler does not see it")
    measurements, x = Measurements(device.type, gpu.DRY, tmp_path), torch.ones(512, 512, device=device)
    with measurements.profiled() as intervals:
        start = time.perf_counter()
        (x @ x).sum().item()
        time.sleep(0.2)
        seconds = time.perf_counter() - start
    assert 0 < covered(intervals) / 1e6 <= seconds - 0.2
    assert measurements.waits(intervals, seconds, 1.0)["device_waits"] >= 0.2 / seconds
    assert measurements.waits([], seconds, 1.0) == {}


def test_names_of_files():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD EPYC, 2 threads") == "amd-epyc"


@pytest.mark.slow
def test_peers_on_the_tiny_model(tmp_path):
    pytest.importorskip("sentence_transformers")
    found = run(tmp_path / "x.json", "--steps", "peers")
    assert found["failures"] == []
    rows = {row["case"]: row for row in found["results"][0]["rows"]}
    assert list(rows) == [
        *(f"encode {case}, tiny" for case in ("queries", "documents", "mix")),
        "train matryoshka, 4 steps, tiny",
    ]
    assert {row["peer"].split()[0] for row in rows.values()} == {"sentence-transformers-bf16"}
    assert all(row["peer_peak_bytes"] > 0 for row in rows.values())


@pytest.mark.slow
def test_the_script_without_what_a_gpu_machine_may_lack(tmp_path):
    for name in ("faiss", "openai", "pypdf", "sentence_transformers", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')")
    environment = {**os.environ, "DRY_RUN": "1", "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    steps = [step for step in STEPS if step not in ("matrices", "peers")]
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--steps", *steps, "--out"]
    done = subprocess.run([*command, str(tmp_path / "x.json")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (failure,) = json.loads((tmp_path / "x.json").read_text())["failures"]
    assert (failure["benchmark"], failure["error"]) == ("search", "skipped: no faiss")  # on a GPU, torch searches
