"""What is worth measuring on a borrowed GPU, in eight minutes from a fresh checkout, without network or data.

    benchmarks/gpu.sh                                       # 480 s at most; python -m benchmarks.gpu
    python -m benchmarks.gpu --dry-run --device cpu         # everything once, on tiny shapes

Encoders have published shapes and random weights, texts have published lengths and random words (shapes.py). In turn,
by importance: rates of matrix products; the tests marked `cuda`; encoding in bfloat16, from float32 weights, as by
default, and from bfloat16 weights; training steps, batch 512, Matryoshka, under bfloat16 autocast; if
sentence-transformers is installed, both against it; the finance recipe (four epochs of 6,300 pairs, without its
evaluations), beside its article's time; cached batches of 8,192 and 32,768 pairs; exact search of a million vectors;
encoding and a step with compiled layers.

What fails or is not installed is reported, and the rest goes on. Each row is at once in
benchmarks/results/DEVICE-DATE.json, a file as of benchmarks.run; when the time is over, the rows so far make the table.
`device_waits` is the share of the time in which the device neither computes nor copies, because the host has given it
nothing to do: 1 minus the profiler's time of its kernels by the time without the profiler. `products_when_busy` is the
share of the rate of matrix products in the rest of the time.
"""

import argparse
import contextlib
import csv
import importlib.util
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from embedft import Embedder, RetrievalDataset, build_loss, load_embedder
from embedft.data.batches import make_batches
from embedft.device import default_device, describe, find_device, peak_memory_bytes, reset_peak_memory
from embedft.encoders.compiled import compile_layers
from embedft.files import read_json, write_json
from embedft.losses.registry import Loss
from embedft.retrieval.index import search_exact
from embedft.training.configs import TrainConfig
from embedft.training.train import train
from experiments import commandline
from experiments.repro_matryoshka_finance import matryoshka_dims

from . import suite
from .run import ROOT, run_script, say
from .shapes import SHAPES, draw_lengths, make_texts, write_model
from .suite import Row, matrix_rate
from .workers import synchronize

# Of the 480 s of gpu.sh: when to stop, so that imports before and the table after have the rest.
LIMIT_SECONDS, TEST_SECONDS, PEER_SECONDS = 445, 100, 80
TOLERANCE = 1e-4  # of scores on the device and on the CPU
ARTICLE = {"article_on_an_A10G_seconds": 206.0}  # the finance recipe's, with evaluations: 3 min 26 s
TRAIN_PASSES, CACHED_PASSES = 3, 4  # operations of a step, in forward passes
PROFILED = slice(1, 3)  # steps that are profiled, after a first one
KINDS = {"longest": 0.45, "contexts": 0.35, "questions": 0.35}  # texts to encode: the share of products aimed at
PEER_AIMS = {"encode": 3.0, "train": 2.5}  # times as fast as sentence-transformers without flash-attn
SEEN = {"cuda": (ProfilerActivity.CUDA, DeviceType.CUDA), "cpu": (ProfilerActivity.CPU, DeviceType.CPU)}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    shapes: tuple[str, ...] = ("MiniLM", "bge-base", "mpnet")
    base: str = "bge-base"  # the recipe's shape and that of cached batches
    encoded: int = 500_000  # tokens encoded per case
    compared: int = 64  # texts whose vectors are compared with those in float32
    rounds: int = 3
    batch: int = 512
    steps: int = 10
    recipe: tuple[int, int, int, int] = (6_300, 4, 32, 16)  # pairs, epochs, batch, accumulated batches
    cached: tuple[int, ...] = (8_192, 32_768)
    mini_batch_tokens: int = 65_536
    search: tuple[int, int, int] = (1_000_000, 10_000, 768)  # documents, queries, dimensions
    backend: str = "inductor"  # of torch.compile


DRY = Sizes(("tiny", "tiny mpnet"), "tiny", 600, 8, 2, 6, 3, (12, 2, 3, 2), (8, 12), 512, (500, 20, 16), "aot_eager")


class Measurements:
    """Each method is a step; it yields rows, and raises `ImportError` for what is not installed."""

    def __init__(self, device: str, sizes: Sizes, folder: Path):
        self.device, self.sizes, self.folder = device, sizes, folder
        self.models = {shape: write_model(folder / shape.replace(" ", "-"), shape) for shape in sizes.shapes}
        self.rate: float | None = None  # of plain matrix products in bfloat16

    def load(self, shape: str, dtype: torch.dtype) -> Embedder:
        return load_embedder(self.models[shape], device=self.device, dtype=dtype)

    def texts(self, kind: str, number: int, shape: str, *, seed: int = 0) -> list[str]:
        return make_texts(draw_lengths(kind, number, seed=seed), vocabulary=SHAPES[shape]["vocab_size"], seed=seed)

    def matrices(self) -> Iterator[Row]:
        """Plain matrix products in float32 and bfloat16, to relate the rest to."""
        for dtype in ("float32", "bfloat16"):
            self.rate = matrix_rate(self.device, dtype)  # in the end, that of bfloat16
            if self.rate:
                yield Row(f"10^12 operations of matrix products, {dtype}", [1e12 / self.rate], flops=10**12)

    def tests(self) -> Iterator[Row]:
        """The tests marked `cuda`, without the plugins that setup.cfg's addopts need."""
        require("pytest")
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
        start = time.perf_counter()
        out, error = run_script([*command, "--continue-on-collection-errors", *cuda_tests()], TEST_SECONDS)
        lines = [line for line in out.splitlines() if line.strip()] or [error]
        yield Row("tests", [time.perf_counter() - start], more={"result": lines[-1]})
        if error:
            reasons = [x for x in lines if x.startswith(("FAILED", "ERROR", "E   ModuleNotFoundError"))]
            raise ValueError("; ".join([lines[-1], error, *reasons]))

    def encode(self) -> Iterator[Row]:
        for shape in self.sizes.shapes:
            for kind, aim in KINDS.items():
                number = max(8, round(self.sizes.encoded / draw_lengths(kind, 1_000).mean()))
                texts = self.texts(kind, number, shape)
                for dtype in ("float32", "bfloat16"):
                    case, embedder = f"encode {kind}, {shape}, {dtype} weights", self.load(shape, getattr(torch, dtype))
                    row = self._encode(embedder, texts, case)
                    row.more["aim"] = aim  # of matrix products
                    yield row

    def _encode(self, embedder: Embedder, texts: list[str], case: str) -> Row:
        def encode() -> None:
            embedder.encode(texts, progress=False)

        lengths = np.array([len(ids) for ids in embedder.tokenizer.encode(texts)])
        flops, (seconds, peak) = suite.flops_of(embedder.encoder, lengths), self.timed(encode)
        with self.profiled() as found:
            encode()
        median, start = statistics.median(seconds), time.perf_counter()
        embedder.pack(texts, role="document")
        more = {"of_it_tokenizing": (time.perf_counter() - start) / median, **self.waits(found, median, flops)}
        some = texts[: self.sizes.compared]
        vectors = embedder.encode(some, progress=False)
        embedder.float().autocast = False
        more["smallest_cosine"] = float((vectors * embedder.encode(some, progress=False)).sum(axis=1).min())
        return self.row(case, seconds, flops, peak, texts=len(texts), tokens=int(lengths.sum()), more=more)

    def step(self) -> Iterator[Row]:
        """Training steps on a batch at once."""
        for shape in self.sizes.shapes:
            yield self._step(self.load(shape, torch.float32), f"{shape}, Matryoshka")

    def _step(self, embedder: Embedder, case: str) -> Row:
        sizes, config = (self.sizes.batch, self.sizes.steps), TrainConfig(precision="bfloat16", epochs=1)
        case, loss = f"step of {sizes[0]:,} pairs, {case}", matryoshka(embedder)
        return self.trained(case, embedder, loss, config, sizes, TRAIN_PASSES)

    def peers(self) -> Iterator[Row]:
        """benchmarks.bench_encode and bench_train on random pairs, against sentence-transformers in bfloat16."""
        require("sentence_transformers")
        file, shape, errors = self.folder / "pairs.csv", self.sizes.base, []
        texts = (self.texts(kind, 16 * self.sizes.batch, shape) for kind in ("questions", "contexts"))
        with open(file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([("question", "context"), *zip(*texts, strict=True)])
        common = ["--base", str(self.models[shape]), "--data", str(file), "--device", self.device, "--rounds", "3"]
        common += ["--dtype", "bfloat16", "--peer", "sentence-transformers-bf16"]
        config = f'{{"batch_size": {self.sizes.batch}}}'
        options = {"encode": ["--peer-batch", "256"], "train": ["--mode", "matryoshka", "--config", config]}
        for name, more in options.items():
            result = self.folder / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.bench_{name}", *common, *more, "--json", str(result)]
            _, error = run_script(command, PEER_SECONDS)
            errors += [f"{name}: {error}"] if error else []
            known = {field for field in vars(Row("", [])) if field not in ("case", "more")}
            for row in [] if error else read_json(result)["rows"]:
                case = f"{name} {row.pop('case')}, {shape}"
                facts = {key: value for key, value in row.items() if key in known}
                yield Row(case, **facts, more={"aim_of_peer_by_embedft": PEER_AIMS[name]})
        if errors:
            raise ValueError("; ".join(errors))

    def recipe(self) -> Iterator[Row]:
        """The finance recipe: all its steps in one time."""
        pairs, epochs, batch, accumulate = self.sizes.recipe
        embedder = self.load(self.sizes.base, torch.float32)
        settings = {"lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "accumulate": accumulate, "epochs": epochs}
        config, steps = TrainConfig(precision="bfloat16", **settings), pairs // batch
        case, loss = f"finance recipe, {epochs} epochs of {steps * batch:,} pairs", matryoshka(embedder)
        row = self.trained(case, embedder, loss, config, (batch, steps), TRAIN_PASSES, whole=True)
        row.more |= ARTICLE
        yield row

    def cached(self) -> Iterator[Row]:
        loss = build_loss({"name": "in_batch_negatives"})
        for number in self.sizes.cached:
            embedder = self.load(self.sizes.base, torch.float32)
            config = TrainConfig(precision="bfloat16", epochs=1, mini_batch_tokens=self.sizes.mini_batch_tokens)
            case = f"cached step of {number:,} pairs, {self.sizes.base}"
            yield self.trained(case, embedder, loss, config, (number, 2), CACHED_PASSES)

    def search(self) -> Iterator[Row]:
        """Exact search with torch; a few queries are checked on the CPU."""
        documents, queries, dim = self.sizes.search
        generator = torch.Generator(self.device).manual_seed(0)
        documents_ND, queries_QD = (
            F.normalize(torch.randn(rows, dim, generator=generator, device=self.device)).cpu()
            for rows in (documents, queries)
        )
        exact_QK = torch.topk(queries_QD[:8] @ documents_ND.T, 10).values
        documents_ND, queries_QD = documents_ND.numpy(), queries_QD.numpy()
        found = search_exact(queries_QD[:8], documents_ND, 10, device=self.device)
        suite.require_close("search", found.scores, exact_QK, TOLERANCE, "scores")
        seconds, peak = self.timed(lambda: search_exact(queries_QD, documents_ND, 100, device=self.device))
        case = f"exact search, {queries:,} queries, {documents:,} x {dim}"
        yield Row(case, seconds, flops=2 * documents * queries * dim, peak_bytes=peak)

    def compiled(self) -> Iterator[Row]:
        """A step, and contexts from float32 weights, again with compiled layers."""
        shape, kind = self.sizes.base, "contexts"
        embedder = self.load(shape, torch.float32)
        compile_layers(embedder, backend=self.sizes.backend)
        yield self._step(embedder, f"{shape}, Matryoshka, compiled")
        texts = self.texts(kind, max(8, round(self.sizes.encoded / draw_lengths(kind, 1_000).mean())), shape)
        yield self._encode(embedder, texts, f"encode {kind}, {shape}, float32 weights, compiled")

    def timed(self, work: Callable[[], Any]) -> tuple[list[float], int]:
        """Seconds of each round after one more, and the peak memory."""
        reset_peak_memory(self.device)
        seconds = []
        for _ in range(1 + self.sizes.rounds):
            synchronize(self.device)
            start = time.perf_counter()
            work()
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return seconds[1:], peak_memory_bytes(self.device)

    def trained(
        self,
        case: str,
        embedder: Embedder,
        loss: Loss,
        config: TrainConfig,
        sizes: tuple[int, int],
        passes: int,
        *,
        whole: bool = False,
    ) -> Row:
        """Trains on (pairs of a batch, batches) of random pairs. Times of its steps but the first, each with all that
        comes between two of them; `whole`: one time of all its steps."""
        batch_size, number = sizes[0], sizes[0] * sizes[1]
        vocabulary = embedder.encoder.config.vocab_size
        parts = (draw_lengths(kind, number) for kind in ("questions", "contexts"))
        texts = [make_texts(lengths, vocabulary=vocabulary, seed=seed) for seed, lengths in enumerate(parts)]
        queries, corpus = (
            {f"{side}{i}": text for i, text in enumerate(part)} for side, part in zip("qd", texts, strict=True)
        )
        dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(number)})
        lengths = np.array([len(ids) for part in texts for ids in embedder.tokenizer.encode(part)])
        batches = make_batches(dataset, embedder.pack, batch_size=batch_size, seed=0)
        times, inside = [time.perf_counter()], []

        def note(_: Any, record: dict[str, Any]) -> None:
            times.append(time.perf_counter())  # the record has the loss as a number, so the device has finished
            inside.append(record["seconds"])

        reset_peak_memory(self.device)
        train(embedder, batches, loss, config, on_step=note)
        peak, seconds = peak_memory_bytes(self.device), np.diff(times).tolist()
        share = config.epochs / (1 if whole else len(seconds))
        flops = round(passes * suite.flops_of(embedder.encoder, lengths) * share)
        more = {"outside_steps": 1 - sum(inside[1:]) / sum(seconds[1:])}
        if config.mini_batch_tokens is None:  # the events of cached batches would take the profiler long
            of_them = flops * len(seconds[PROFILED]) / (len(seconds) if whole else 1)
            found = self.profiled_steps(embedder, batches, loss, config, min(PROFILED.stop, len(seconds)))
            more |= self.waits(found, sum(seconds[PROFILED]), of_them)
        facts = {"texts": round(2 * number * share), "tokens": round(int(lengths.sum()) * share), "more": more}
        return self.row(case, [sum(seconds)] if whole else seconds[1:], flops, peak, **facts)

    def profiled_steps(self, embedder: Embedder, batches: Any, loss: Loss, config: TrainConfig, last: int) -> list:
        """Trains again up to step `last`, with the profiler from `PROFILED.start` on; the device's intervals."""
        with contextlib.ExitStack() as stack:

            def note(state: Any, _: Any) -> str | None:
                if state.step == PROFILED.start:
                    found.append(stack.enter_context(self.profiled()))
                return "stop" if state.step == last else None

            found: list = []
            train(embedder, batches, loss, config, on_step=note)
        return found[0]

    @contextlib.contextmanager
    def profiled(self) -> Iterator[list[tuple[float, float]]]:
        """A list that has, after the block, the device's intervals of work in microseconds; empty for MPS."""
        found, (activity, kind) = [], SEEN.get(torch.device(self.device).type, (None, None))
        if activity is None:
            yield found
            return
        synchronize(self.device)
        with profile(activities=[activity]) as profiler:
            yield found
            synchronize(self.device)
        events = (event for event in profiler.events() if event.device_type == kind and not event.is_user_annotation)
        found += [(event.time_range.start, event.time_range.end) for event in events]

    def waits(self, intervals: list[tuple[float, float]], seconds: float, flops: float) -> dict[str, float]:
        """What work that took `seconds` without the profiler left unused; nothing where it saw no device."""
        if not (busy := covered(intervals) / 1e6):
            return {}
        found = {"device_waits": 1 - min(busy / seconds, 1.0)}
        return found | ({"products_when_busy": flops / busy / self.rate} if self.rate else {})

    def row(self, case: str, seconds: list[float], flops: int, peak: int, **facts: Any) -> Row:
        return Row(case, seconds, flops=flops, peak_bytes=peak, matrix_flops_per_second=self.rate, **facts)


STEPS = ("matrices", "tests", "encode", "step", "peers", "recipe", "cached", "search", "compiled")


def cuda_tests() -> list[str]:
    """The files with tests that are marked `cuda`, or run on every device."""
    named = re.compile(r"mark\.cuda|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    return [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if named.search(path.read_text("utf-8"))]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def matryoshka(embedder: Embedder) -> Loss:
    dims = matryoshka_dims(embedder.full_dim)
    return build_loss({"name": "matryoshka", "dims": dims, "inner": {"name": "in_batch_negatives"}})


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")


class OutOfTime(BaseException):
    """Raised wherever the work is when time is over; no `except Exception` there stops it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block after `seconds`, or when `timeout` ends the process."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def main(options: argparse.Namespace) -> None:
    start, device = time.perf_counter(), find_device(options.device)
    out = Path(options.out or ROOT / "benchmarks" / "results" / f"{slug(describe(device))}-{date.today()}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, failures, left = [], [], list(options.steps)
    result = suite.as_json("gpu", options, rows, device)
    found: dict[str, Any] = {"results": [result], "failures": failures, "seconds": {}}

    def fail(name: str, error: str) -> None:
        say(f"{name}: {error}")
        failures.append({"benchmark": name, "command": "benchmarks.gpu", "error": error})

    def measure(name: str, step: Callable[[], Iterator[Row]]) -> None:
        try:
            for row in step():
                rows.append(row)
                result["rows"].append(row.as_json())
                write_json(out, found)
        except ImportError as missing:
            fail(name, f"skipped: {missing}")
        except Exception as failure:  # the other steps may still work
            fail(name, f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}")

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OutOfTime), time_limit(options.seconds):
        measurements = Measurements(options.device, DRY if options.dry_run else Sizes(), Path(folder))
        while left:
            began = time.perf_counter() - start
            say(f"{began:.0f} s: {left[0]}")
            measure(left[0], getattr(measurements, left[0]))
            found["seconds"][left.pop(0)] = round(time.perf_counter() - start - began, 1)
    for name in left:
        fail(name, f"not finished after {options.seconds:g} s")
    write_json(out, found)
    if rows:
        suite.report("gpu", options, rows)
    for failure in failures:
        print(f"{failure['benchmark']}: {failure['error']}")
    print(f"{time.perf_counter() - start:.0f} s; {out}")


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.partition(",")[0].lower()).strip("-")


def parser() -> argparse.ArgumentParser:
    found = commandline.Parser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    found.add_argument("--device", default=str(default_device()), metavar="DEVICE", help="[%(default)s]")
    found.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help="[all]")
    found.add_argument("--out", metavar="FILE", help="[benchmarks/results/DEVICE-DATE.json]")
    found.add_argument("--seconds", type=float, default=LIMIT_SECONDS, metavar="N", help="to stop after [%(default)s]")
    found.add_argument("--dry-run", action="store_true", help="everything once, on tiny shapes")
    found.set_defaults(rounds=Sizes.rounds, json=None)
    return found


if __name__ == "__main__":
    commandline.run(main, parser())
