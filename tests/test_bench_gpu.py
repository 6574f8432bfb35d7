"""benchmarks/gpu.py and gpu.sh: everything once on the CPU, on tiny shapes; what fails or is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from naming import names, naming

from benchmarks import gpu, suite
from benchmarks.gpu import STEPS, Measurements, main, parser, slug

ROOT = Path(gpu.__file__).resolve().parents[1]
FEW = ("matrices", "search")


def run(out: Path, *options: str) -> dict:
    main(parser().parse_args(["--dry-run", "--device", "cpu", "--out", str(out), *options]))
    return json.loads(out.read_text())


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(suite, "batch_tokens", lambda device: 64)


def test_everything_once(tmp_path, monkeypatch, capsys):
    commands = []

    def run_script(command: list[str], seconds: float) -> tuple[str, str]:
        commands.append(command)
        if "--json" in command:
            Path(command[-1]).write_text(json.dumps({"rows": [{"case": "mix", "seconds": [2.0], "peer": "theirs"}]}))
        return "3 passed\n", ""

    monkeypatch.setattr(gpu, "run_script", run_script)
    monkeypatch.setattr(gpu, "require", lambda package: None)
    found = run(tmp_path / "results" / "x.json")
    assert [failure["error"] for failure in found["failures"]] == []
    assert list(found["seconds"]) == list(STEPS)
    (result,) = found["results"]
    assert result["benchmark"] == "gpu"
    rows = {row["case"]: row for row in result["rows"]}
    cases = ["10^12 operations of matrix products, float32", "10^12 operations of matrix products, bfloat16", "tests"]
    kinds = ("longest", "chunks", "contexts", "questions")
    for shape in ("tiny", "tiny mpnet"):
        cases += [*(f"encode {kind}, {shape}" for kind in kinds), f"encode contexts, {shape}, float32 weights"]
    cases += [f"step of 6 pairs, {shape}, Matryoshka" for shape in ("tiny", "tiny mpnet")]
    cases += ["finance recipe, 2 epochs of 12 pairs"]
    cases += [f"cached step of {number} pairs, tiny" for number in (8, 12)]
    cases += ["exact search, 20 queries, 500 x 16", "encode contexts, tiny, compiled"]
    cases += ["step of 6 pairs, tiny, Matryoshka, compiled", "encode mix, tiny", "train mix, tiny"]
    assert list(rows) == cases
    assert rows["tests"]["result"] == "3 passed"
    assert len(rows["encode questions, tiny"]["seconds"]) == 2
    assert rows["encode longest, tiny"]["tokens"] == 8 * 512
    # Two batches, the first left out; four epochs of three pairs twice a step, 12 pairs in an epoch.
    assert (rows[cases[13]]["texts"], len(rows[cases[13]]["seconds"])) == (2 * 6, 1)
    assert (rows[cases[15]]["texts"], len(rows[cases[15]]["seconds"])) == (2 * 2 * 12, 1)
    assert rows[cases[17]]["texts"] == 2 * 12
    assert all(row["matrix_flops_per_second"] > 0 for case, row in rows.items() if case in cases[3:13])
    assert [command[2] for command in commands] == ["pytest", "benchmarks.bench_encode", "benchmarks.bench_train"]
    assert commands[0][3:7] == ["-m", "cuda", "-o", "addopts=-q"]
    assert rows["finance recipe, 2 epochs of 12 pairs"]["article_on_an_A10G_seconds"] == 3 * 60 + 26
    assert (rows["train mix, tiny"]["seconds"], rows["train mix, tiny"]["peer"]) == ([2.0], "theirs")
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


def test_what_would_start_too_late_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_START", -1)
    found = run(tmp_path / "x.json", "--steps", *FEW)
    assert [failure["benchmark"] for failure in found["failures"]] == list(FEW)
    assert found["results"][0]["rows"] == []


def test_failing_tests_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_script", lambda command, seconds: ("1 failed, 2 passed\n", "exit code 1"))
    measurements = Measurements("cpu", gpu.DRY, tmp_path, dry=False)
    with pytest.raises(ValueError, match=naming(1)):
        measurements.tests()


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
    environment = {**os.environ, "DRY_RUN": "1", "PYTHONPATH": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    steps = [step for step in STEPS if step not in ("matrices", "tests", "peers")]
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--steps", *steps, "--out"]
    done = subprocess.run([*command, str(tmp_path / "x.json")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (failure,) = json.loads((tmp_path / "x.json").read_text())["failures"]
    assert (failure["benchmark"], failure["error"]) == ("search", "skipped: no faiss")  # on a GPU, torch searches
