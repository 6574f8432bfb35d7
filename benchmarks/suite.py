"""The frame of every benchmark: its options, its rows of figures, the table it prints and the JSON that it writes.

def main(options) -> list[Row]:
    workers = {"embedft": Worker(Ours, ...), "some peer 1.0": Worker(Peer, ...)}    # ours first
    ... worker.call(...); require_close("case", ours, theirs, 1e-5)                 # equal outputs, then time
    return measure("case", workers, "step", rounds=options.rounds)

run(main, make_parser("encode", __doc__, rounds=5, peers=["sentence-transformers"]))
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from embedft import RetrievalDataset
from embedft.device import batch_tokens, describe, find_device, reset_peak_memory
from embedft.encoders.card import flops
from embedft.encoders.layers import Linear
from embedft.files import check_writable, write_json
from embedft.retrieval.tables import format_table
from experiments import commandline, sources

from .workers import Worker, alternate, machine, ratios, spread, synchronize

ROOT = Path(__file__).resolve().parents[1]
# What --data names: by default the published sets, or none.
PUBLISHED = "folder of lyft_uber and finance_qa, or a data set of your own [beside the checkout]"
OWN = "a data set of your own [random texts]"
DTYPES = ("float32", "bfloat16", "float16", "int8")
PACKAGES = ("torch", "embedft", "numpy", "tokenizers", "sentence-transformers", "transformers", "onnxruntime")
PACKAGES += ("openvino", "faiss-cpu", "faiss-gpu", "openai", "pypdf")
FLAGS = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512_vnni": "avx512_vnni"}  # in /proc/cpuinfo: in the JSON


@dataclasses.dataclass
class Row:
    """What one case took; in JSON, fields that are None are left out and those of `more` stand among the others."""

    case: str
    seconds: list[float]  # of each timed round
    peer: str | None = None  # name and version
    peer_seconds: list[float] | None = None  # of the same rounds
    texts: int | None = None
    tokens: int | None = None
    flops: int | None = None  # that the texts need
    matrix_flops_per_second: float | None = None  # of plain matrix products in the same process
    peak_bytes: int | None = None
    peer_peak_bytes: int | None = None
    largest_difference: float | None = None  # between our output and the peer's
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}
        return {name: value for name, value in {**known, **self.more}.items() if value is not None}


# Columns of the table: title, and the cell or "". A column without cells is left out.
def _rate(row: Row, value: int | None, scale: float = 1) -> str:
    return f"{value / statistics.median(row.seconds) / scale:,.0f}" if value and row.seconds else ""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row.case,
    "embedft, s": lambda row: spread(row.seconds, 3),
    "peer": lambda row: row.peer or "",
    "peer, s": lambda row: spread(row.peer_seconds, 3) if row.peer_seconds else "",
    "peer / embedft": lambda row: spread(ratios(row.peer_seconds, row.seconds)) if row.peer_seconds else "",
    "tokens/s": lambda row: _rate(row, row.tokens),
    "GFLOP/s": lambda row: _rate(row, row.flops, 1e9),
    "of matrix products": lambda row: (
        f"{row.flops / statistics.median(row.seconds) / row.matrix_flops_per_second:.0%}"
        if row.flops and row.matrix_flops_per_second
        else ""
    ),
    "peak, GiB": lambda row: f"{row.peak_bytes / 2**30:.2f}" if row.peak_bytes else "",
    "peer's": lambda row: f"{row.peer_peak_bytes / 2**30:.2f}" if row.peer_peak_bytes else "",
    "largest difference": lambda row: "" if row.largest_difference is None else f"{row.largest_difference:.1e}",
}


def make_parser(
    name: str,
    doc: str,
    *,
    rounds: int,
    base: bool = True,
    data: str | None = None,
    devices: bool = True,
    dtypes: Collection[str] = (),
    peers: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """A parser with the options that mean something for benchmark `name`; it may get more.

    Args:
        rounds: default of --rounds.
        data: `PUBLISHED` or `OWN`: what --data may name; None: no --data.
        dtypes: choices of --dtype, the first is the default; peers: choices of --peer, the first is the default.
    """
    parser = commandline.Parser(prog=f"benchmarks.bench_{name}", description=doc.partition("\n")[0])
    if base:
        parser.add_argument("--base", default=commandline.BASE, metavar="MODEL", help="model [%(default)s]")
    if data:
        parser.add_argument("--data", metavar="DATA", help=data)
    if devices:
        parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps [cpu]")
    if dtypes:
        parser.add_argument("--dtype", default=dtypes[0], choices=dtypes, help="what we compute in [%(default)s]")
    if peers:
        choices = ["none", *peers]
        parser.add_argument("--peer", nargs="+", default=[peers[0]], choices=choices, help=f"[{peers[0]}]")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="timed rounds [%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures as JSON")
    return parser


def run(main: Callable[[argparse.Namespace], list[Row]], parser: argparse.ArgumentParser) -> None:
    """Runs `main(options)`, prints its rows and writes them to --json; users' errors as in experiments/commandline."""
    name = parser.prog.rpartition("bench_")[2]
    commandline.run(lambda options: report(name, options, _checked(main, options)), parser)


def _checked(main: Callable, options: argparse.Namespace) -> list[Row]:
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}, expected at least 1")
    if options.json:
        check_writable(options.json, file=True)  # now, not when all is measured
    if "device" in options:
        options.device = str(find_device(options.device))
    if "peer" in options and "none" in options.peer:
        options.peer = []
    return main(options)


def report(name: str, options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Prints the rows as a table and writes them to --json."""
    device = torch.device(getattr(options, "device", "cpu"))
    titles = [title for title in COLUMNS if any(COLUMNS[title](row) for row in rows)]
    more = list(dict.fromkeys(key for row in rows for key, value in row.more.items() if isinstance(value, float | str)))
    cells = [[COLUMNS[title](row) for title in titles] + [_cell(row.more.get(key)) for key in more] for row in rows]
    print(format_table([*titles, *(key.replace("_", " ") for key in more)], cells))
    settings = "".join(f"{getattr(options, name)}, " for name in ("base", "dtype") if name in options)
    print(f"\nmedian [min, max] of {options.rounds} rounds; {settings}{machine(str(device))}")
    if options.json:
        write_json(options.json, as_json(name, options, rows, device))


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value or "")


def as_json(name: str, options: argparse.Namespace, rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """A benchmark's figures and all that they depend on."""
    return {
        "benchmark": name,
        "arguments": {key: value for key, value in vars(options).items() if key != "json"},
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := version(p))}},
        "hardware": hardware(device),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": [row.as_json() for row in rows],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine: its CPU, its memory and, if `device` is one, its GPU."""
    cpu, _, _ = describe(torch.device("cpu")).rpartition(", ")
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    found = {"cpu": cpu, "flags": [name for flag, name in FLAGS.items() if flag in flags]}
    found |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"gpu": describe(device)} if device.type != "cpu" else {}
    return found | {"memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # not a checkout, or no git
        return ""
    return done.stdout.strip()


def measure(
    case: str,
    workers: Mapping[str, Worker],
    method: str,
    *arguments: Any,
    rounds: int,
    warmup: int = 1,
    differences: Mapping[str, float] | None = None,
    **facts: Any,
) -> list[Row]:
    """Times a method of all workers in turn. Returns one row per peer, all with our seconds; without peers, one row.

    Args:
        workers: ours first; the others by name and version.
        differences: {peer: largest difference of its output from ours}.
        facts: other fields of `Row`.
    """
    for worker in workers.values():
        worker.call(reset_peak_memory, worker.device)
    seconds = alternate(workers, method, *arguments, rounds=rounds, warmup=warmup)
    (ours, worker), *peers = workers.items()
    row = Row(case, seconds[ours], peak_bytes=worker.peak_bytes, **facts)
    of_peers = [
        {"peer": name, "peer_seconds": seconds[name], "peer_peak_bytes": peer.peak_bytes}
        | {"largest_difference": (differences or {}).get(name)}
        for name, peer in peers
    ]
    return [dataclasses.replace(row, more=dict(row.more), **found) for found in of_peers] or [row]


def require_close(case: str, ours: Any, theirs: Any, tolerance: float, what: str = "vectors") -> float:
    """The largest difference of two arrays or numbers, relative where theirs is above 1.
    Raises `ValueError` if it is above `tolerance`."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{case}: the {what} have the shapes {ours.shape} and {theirs.shape}")
    difference = float((np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))).max(initial=0))
    if not difference <= tolerance:
        raise ValueError(f"{case}: the {what} differ by {difference:.1e}, expected at most {tolerance:.0e}")
    return difference


def published(name: str, given: str | None) -> Path:
    """The folder of a published data set (experiments/sources.py): NAME in the folder --data, or that folder itself."""
    inside = given and Path(given, name)
    return sources.find_data(name, str(inside) if inside and inside.is_dir() else given)


def own_data(given: str | None) -> RetrievalDataset | None:
    """The data set --data; None if it is not given or a folder of published ones."""
    files = [(name, file) for name, source in sources.SOURCES.items() for file in source.files]
    if given is None or any(Path(given, *place).is_file() for name, file in files for place in ((file,), (name, file))):
        return None
    return RetrievalDataset.load(given, skip_empty=True)


def own_texts(given: str | None, number: int) -> list[str]:
    """The first `number` documents of `own_data`, each once; [] without any."""
    own = own_data(given)
    return list(dict.fromkeys(own.texts.values()))[:number] if own else []


def load_data(name: str, file: str, given: str | None) -> RetrievalDataset:
    """`own_data`, or else a file of the published data set `name`."""
    return own_data(given) or RetrievalDataset.load(published(name, given) / file, skip_empty=True)


def flops_of(encoder: torch.nn.Module, lengths: np.ndarray) -> int:
    """Floating-point operations of a forward pass over texts of these numbers of tokens, as `embedft info` counts."""
    of_token, of_pair = flops(encoder)
    lengths = np.asarray(lengths, dtype=np.int64)
    return int(lengths.sum()) * of_token + int((lengths**2).sum()) * of_pair


def matrix_rate(device: str, dtype: str) -> float | None:
    """FLOP/s of plain matrix products, the best of a few: what the machine can do. For a worker: `worker.call` it.
    None where torch has no product of this type."""
    place, kind = torch.device(device), getattr(torch, dtype)
    rows, columns, inner = batch_tokens(place), 4_096, 1_024
    x, weight = (torch.randn(size, inner, device=place).mul(20).to(kind) for size in (rows, columns))
    if kind is torch.int8:
        products = [functools.partial(torch._int_mm, x, weight.T)]
    else:
        linear = Linear(inner, columns, bias=False, device=place)
        linear.weight = torch.nn.Parameter(weight)
        products = [functools.partial(F.linear, x, weight), functools.partial(linear, x)]
    found = 0.0
    try:
        with torch.inference_mode():
            for product in products * 4:
                synchronize(device)
                start = time.perf_counter()
                product()
                synchronize(device)
                found = max(found, 2 * rows * columns * inner / (time.perf_counter() - start))
    except (RuntimeError, NotImplementedError):
        return None
    return found
