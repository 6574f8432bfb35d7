"""benchmarks/run.py: one file for all, whatever fails; the options that it hands on."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from naming import names, naming

from benchmarks import run
from benchmarks.run import HANDED_ON, SCRIPTS, command_of, main, module_of, parser

WRITE = "import json, sys; json.dump({'benchmark': 'load', 'rows': []}, open(sys.argv[-1], 'w')); print('a table')"
FAIL = "import sys; print('a line', file=sys.stderr); sys.exit('no such model')"
STARTS_ANOTHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to ask for its exit code."""
    status = Path(f"/proc/{pid}/stat")
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    code = {"load": WRITE, "store": FAIL, "encode": "import time; time.sleep(60)", "batch": WRITE}
    monkeypatch.setattr(run, "command_of", lambda name, _, file: [sys.executable, "-c", code[name], "--json", file])
    out = tmp_path / "all.json"
    options = ["--only", *code, "--out", str(out), "--timeout", "5", "--quick"]
    assert main(parser().parse_args(options)) == 1
    found = json.loads(out.read_text())
    assert [result["benchmark"] for result in found["results"]] == ["load", "load"]
    store, encode = found["failures"]
    assert (store["benchmark"], store["error"]) == ("store", "no such model")
    assert encode["benchmark"] == "encode"
    assert names(encode["error"], 5)
    assert list(found["seconds"]) == list(code)
    assert found["quick"]
    shown = capfd.readouterr()
    assert shown.out.count("a table") == 2
    assert names(shown.err, "store", "no such model", "[2/4]", str(out))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_a_late_script_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    inner = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    run.run_script([sys.executable, "-c", STARTS_ANOTHER.format(inner)], timeout=5)
    pid, until = int(file.read_text()), time.monotonic() + 5
    while not ended(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(pid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_script_ends_with_a_run_that_is_terminated(tmp_path):
    file = tmp_path / "pid"
    inner = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(60)"
    code = "import sys; from benchmarks import run; run.command_of = lambda *_: [sys.executable, '-c', {!r}, '', ''];"
    code += "run.main(run.parser().parse_args(['--only', 'load', '--out', {!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code.format(inner, str(tmp_path / "x.json"))])
    until = time.monotonic() + 30
    while not (file.is_file() and file.read_text().endswith(".")) and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert ended(int(file.read_text()[:-1]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_what_it_is_given(name):
    given = {"base": "tiny", "data": "here", "device": "cpu", "dtype": "float32", "peer": "none", "rounds": "7"}
    assert given.keys() == set(HANDED_ON)
    command = command_of(
        name, options_of("--quick", *(part for key in given for part in (f"--{key}", given[key]))), "x"
    )
    assert command[:3] == [sys.executable, "-m", module_of(name)]
    taken = vars(importlib.import_module(module_of(name)).parser().parse_args(command[3:]))
    assert taken["json"] == "x"
    expected = {**given, "peer": ["none"], "rounds": 7}
    assert {key: taken[key] for key in expected.keys() & taken} == {k: expected[k] for k in expected.keys() & taken}
    assert ("--base" in command) == ("base" in taken)


def options_of(*options: str):
    return parser().parse_args(options)


@pytest.mark.parametrize(
    ("name", "handed"),
    [
        ("encode", "--dtype int8 --peer sentence-transformers-flash sentence-transformers-onnx-int8 --rounds 2"),
        ("train", "--peer sentence-transformers-flash --rounds 2"),  # has neither int8 nor an int8 backend
        ("load", "--dtype int8 --rounds 2"),
        ("tokenize", "--rounds 2"),
        ("questions", "--rounds 2"),
    ],
)
def test_values_that_a_script_does_not_accept_are_kept_back(name, handed):
    peers = ("sentence-transformers-flash", "sentence-transformers-onnx-int8")
    options = options_of("--dtype", "int8", "--rounds", "2", "--peer", *peers)
    assert command_of(name, options, "x")[3:] == [*handed.split(), "--json", "x"]


def test_a_script_whose_imports_are_missing_is_a_failure(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("no faiss")

    monkeypatch.setattr(run, "command_of", missing)
    out = tmp_path / "all.json"
    assert main(options_of("--only", "search", "--out", str(out))) == 1
    (failure,) = json.loads(out.read_text())["failures"]
    assert (failure["benchmark"], failure["error"]) == ("search", "no faiss")


def test_every_script_is_run():
    found = {path.stem for path in Path(run.__file__).parent.glob("bench_*.py")} | {"scaling"}
    assert found == {module_of(name).partition(".")[2] for name in SCRIPTS}


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_script", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "all.json"
    with pytest.raises(ValueError, match=naming(out)):
        main(parser().parse_args(["--only", "load", "--out", str(out)]))


def test_help_needs_nothing_heavy():
    code = "import sys, benchmarks.run; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
