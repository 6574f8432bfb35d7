"""Runs every benchmark, each in its own process, and collects their figures in one file.

    python -m benchmarks.run --quick                                # under ten minutes on two idle cores
    python -m benchmarks.run --device cuda --only encode train --out cuda.json
    python -m benchmarks.compare before.json results.json

--base, --data, --device, --dtype, --peer and --rounds are handed on to the scripts that have them and accept the value;
the others keep their defaults. Tables go to stdout, progress to stderr. The file is written after each benchmark:
{"results": [what --json of each writes, ...], "failures": [{"benchmark", "command", "error"}, ...], "seconds":
{benchmark: of the whole process}}. One that fails, or takes longer than `--timeout`, does not stop the others; the exit
code is then 1.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from embedft.files import check_writable, read_json, write_json
from experiments import commandline

ROOT = Path(__file__).resolve().parents[1]
HANDED_ON = ("base", "data", "device", "dtype", "peer", "rounds")


# The options of each with --quick.
SCRIPTS = {
    "load": "--rounds 3",
    "tokenize": "--number 300 --rounds 3",
    "encode": "--number 24 --rounds 3",
    "train": "--mode matryoshka --rounds 3 --config '{\"batch_size\": 16}'",
    "stages": "--number 48 --rounds 3",
    "batch": "--sizes 32 64 --memory 32 --rounds 3",
    "adapter": "--number 20 --rounds 3",
    "search": "--documents 20000 --ivf 20000 --hnsw 20000 --queries 1000 --texts 500",
    "evaluate": "--documents 20000 --queries 500 --peer-documents 10000 --peer-queries 200 --texts 500",
    "store": "--texts 5000 --rows 100000 --rounds 3",
    "chunk": "--pages 15 --rounds 3",
    "questions": "--chunks 200 --rounds 3",
    "threads": "--models small --rounds 2",
    "scaling": "--small 40000",
}


def module_of(name: str) -> str:
    return f"benchmarks.{name}" if (ROOT / "benchmarks" / f"{name}.py").is_file() else f"benchmarks.bench_{name}"


def handed_on(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    """Those of our options that a script has, with the values that it accepts."""
    found = []
    for action in parser._actions:
        value = getattr(given, action.dest) if action.dest in HANDED_ON else None
        values = value if isinstance(value, list) else [value]
        if accepted := [str(x) for x in values if x is not None and x in (action.choices or values)]:
            found += [f"--{action.dest}", *accepted]
    return found


def command_of(name: str, options: argparse.Namespace, file: str) -> list[str]:
    """Raises `ImportError` if what the script imports is not installed."""
    parser = importlib.import_module(module_of(name)).parser()
    quick = shlex.split(SCRIPTS[name]) if options.quick else []
    return [sys.executable, "-m", module_of(name), *quick, *handed_on(parser, options), "--json", file]


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
            command, start = [sys.executable, "-m", module_of(name), "", ""], time.perf_counter()
            try:
                command = command_of(name, options, str(Path(folder, f"{name}.json")))
                say(f"[{number}/{len(names)}] {name}: {shlex.join(command[2:-2])}")
                out, error = run_script(command, options.timeout)
            except ImportError as missing:
                error = str(missing)
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
        more = {"peer": {"nargs": "+"}, "rounds": {"type": int}}.get(name, {})
        found.add_argument(f"--{name}", metavar="X", **more, help="handed on to every benchmark that accepts it")
    return found


if __name__ == "__main__":
    commandline.run(lambda options: sys.exit(main(options)), parser())
