"""Runs every benchmark, each in its own process, and collects their figures in one file.

    python -m benchmarks.run --quick                                # under ten minutes on two idle cores
    python -m benchmarks.run --device cuda --only encode train --out cuda.json
    python -m benchmarks.compare before.json results.json

Tables go to stdout, progress to stderr. The file is written after each benchmark: {"results": [what --json of each
writes, ...], "failures": [{"benchmark", "command", "error"}, ...], "seconds": {benchmark: of the whole process}}. One
that fails, or takes longer than `--timeout`, does not stop the others; the exit code is then 1.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from embedft.files import check_writable, read_json, write_json
from experiments import commandline

ROOT = Path(__file__).resolve().parents[1]
HANDED_ON = ("base", "data", "device", "dtype", "peer")


class Script(NamedTuple):
    """A benchmark: which options of ours it takes, and its options with --quick."""

    takes: str
    quick: str

    def options(self, given: argparse.Namespace) -> list[str]:
        handed = {name: getattr(given, name) for name in HANDED_ON if name in self.takes.split()}
        found = [part for name, value in handed.items() if value is not None for part in (f"--{name}", value)]
        return [*found, *(shlex.split(self.quick) if given.quick else ())]


SCRIPTS = {
    "load": Script("base device peer", "--rounds 3"),
    "tokenize": Script("base data peer", "--number 300 --rounds 3"),
    "encode": Script("base data device dtype peer", "--number 40 --rounds 3"),
    "train": Script("base data device peer", "--mode matryoshka --rounds 3"),
    "stages": Script("base dtype", "--rounds 3"),
    "batch": Script("base device peer", "--sizes 32 64 --memory 32 --rounds 3"),
    "adapter": Script("base data device", "--number 20 --rounds 3"),
    "search": Script("base data device", "--documents 20000 --ivf 20000 --hnsw 20000 --queries 1000 --texts 500"),
    "evaluate": Script(
        "base data device",
        "--documents 20000 --queries 500 --peer-documents 10000 --peer-queries 200 --texts 500",
    ),
    "store": Script("base device dtype", "--texts 5000 --rows 100000 --rounds 3"),
    "chunk": Script("base", "--pages 30 --rounds 3"),
    "questions": Script("", "--chunks 200 --rounds 3"),
    "threads": Script("base data", "--models small --rounds 2"),
    "scaling": Script("base device dtype", "--small 40000"),
}


def module_of(name: str) -> str:
    return f"benchmarks.{name}" if (ROOT / "benchmarks" / f"{name}.py").is_file() else f"benchmarks.bench_{name}"


def command_of(name: str, options: argparse.Namespace, file: str) -> list[str]:
    return [sys.executable, "-m", module_of(name), *SCRIPTS[name].options(options), "--json", file]


def run_script(command: list[str], timeout: float) -> tuple[str, str]:
    """Runs a command from the root of the checkout; returns its output and "", or what went wrong."""
    environment = {**os.environ, "EMBEDFT_PROGRESS": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A session of its own, so that the processes that it started can be ended with it.
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return "", f"took longer than {timeout:g} s"
    finally:
        end(process)
    lines = [line for line in err.splitlines() if line.strip()]
    return out, "" if process.returncode == 0 else (lines or [f"exit code {process.returncode}"])[-1]


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started, if any of them are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(options: argparse.Namespace) -> int:
    check_writable(options.out, file=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `end` is called then, too
    names = options.only or list(SCRIPTS)
    found: dict[str, Any] = {"quick": options.quick, "results": [], "failures": [], "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names, start=1):
            command, start = command_of(name, options, str(Path(folder, f"{name}.json"))), time.perf_counter()
            say(f"[{number}/{len(names)}] {name}: {shlex.join(command[2:-2])}")
            out, error = run_script(command, options.timeout)
            seconds = found["seconds"][name] = round(time.perf_counter() - start, 1)
            if error:
                found["failures"].append({"benchmark": name, "command": shlex.join(command[1:-2]), "error": error})
                say(f"{name} failed after {seconds} s: {error}")
            else:
                found["results"].append(read_json(command[-1]))
                say(f"{name}: {seconds} s")
                print(f"\n{name}\n\n{out}", flush=True)
            write_json(options.out, found)
    total = sum(found["seconds"].values())
    say(f"{len(found['results'])} benchmarks and {len(found['failures'])} failures in {total:.0f} s: {options.out}")
    return 1 if found["failures"] else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    found = commandline.Parser(prog="benchmarks.run", description=__doc__.partition("\n")[0])
    found.add_argument("--quick", action="store_true", help="few texts and rounds: ten minutes on two idle cores")
    found.add_argument("--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=f"some of {', '.join(SCRIPTS)} [all]")
    found.add_argument("--out", default="results.json", metavar="FILE", help="where to write [%(default)s]")
    found.add_argument("--timeout", type=float, default=3_600, metavar="SECONDS", help="of each [%(default)s]")
    for name in HANDED_ON:
        found.add_argument(f"--{name}", metavar="X", help="handed on to every benchmark that takes it")
    return found


if __name__ == "__main__":
    commandline.run(lambda options: sys.exit(main(options)), parser())
