"""What is worth measuring on a borrowed GPU, in eight minutes from a fresh checkout, without network or data.

    benchmarks/gpu.sh                                       # 480 s at most; python -m benchmarks.gpu
    python -m benchmarks.gpu --dry-run --device cpu         # everything once, on tiny shapes

Encoders have published shapes and random weights, texts have published lengths and random words (shapes.py). In turn:
the tests marked `cuda`; encoding in bfloat16; training steps, batch 512, Matryoshka, under bfloat16 autocast; the
finance recipe (four epochs of 6,300 pairs, without its evaluations), beside its article's time; cached batches of 8,192
and 32,768 pairs; exact search of a million vectors; encoding and a step with compiled layers; if sentence-transformers
is installed, encoding and training against it. What fails or is not installed is reported, and the rest goes on; what
would start too late is left out. The figures of each step are added to benchmarks/results/DEVICE-DATE.json, a file as
of benchmarks.run, and make a table at the end.
"""

import argparse
import csv
import importlib
import importlib.util
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedft import Embedder, RetrievalDataset, build_loss, load_embedder
from embedft.data.batches import make_batches
from embedft.device import default_device, describe, find_device, peak_memory_bytes, reset_peak_memory
from embedft.encoders.compiled import compile_layers
from embedft.files import read_json, write_json
from embedft.losses.registry import Loss
from embedft.retrieval.index import search_exact
from embedft.training.configs import TrainConfig
from embedft.training.train import train
from embedft.vectors import unit_rows
from experiments import commandline
from experiments.repro_matryoshka_finance import matryoshka_dims

from . import suite
from .run import ROOT, run_script, say
from .shapes import SHAPES, draw_lengths, make_texts, write_model
from .suite import Row, matrix_rate
from .workers import synchronize

LAST_START, TEST_SECONDS, PEER_SECONDS = 300, 100, 80  # of 480 s in gpu.sh; the last step runs two peers
TOLERANCE = 1e-4  # of scores on the device and in float64
ARTICLE = {"article_on_an_A10G_seconds": 206.0}  # the finance recipe's, with evaluations: 3 min 26 s
TRAIN_PASSES, CACHED_PASSES = 3, 4  # operations of a step, in forward passes


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    shapes: tuple[str, ...] = ("MiniLM", "bge-base", "mpnet")
    base: str = "bge-base"  # the recipe's shape and that of cached batches
    encoded: int = 1_000_000  # tokens encoded per case
    rounds: int = 3
    batch: int = 512
    steps: int = 10
    recipe: tuple[int, int, int, int] = (6_300, 4, 32, 16)  # pairs, epochs, batch, accumulated batches
    cached: tuple[int, ...] = (8_192, 32_768)
    mini_batch_tokens: int = 65_536
    search: tuple[int, int, int] = (1_000_000, 10_000, 768)  # documents, queries, dimensions


DRY = Sizes(("tiny", "tiny mpnet"), "tiny", 600, 2, 6, 2, (12, 2, 3, 2), (8, 12), 512, (500, 20, 16))


class Measurements:
    """Each method is a step; it returns rows, and raises `ImportError` for what is not installed."""

    def __init__(self, device: str, sizes: Sizes, folder: Path, *, dry: bool):
        self.device, self.sizes, self.folder, self.dry = device, sizes, folder, dry
        self.models = {shape: write_model(folder / shape.replace(" ", "-"), shape) for shape in sizes.shapes}
        self.rate: float | None = None  # of plain matrix products in bfloat16

    def load(self, shape: str, dtype: torch.dtype) -> Embedder:
        return load_embedder(self.models[shape], device=self.device, dtype=dtype)

    def texts(self, kind: str, number: int, shape: str, *, seed: int = 0) -> list[str]:
        return make_texts(draw_lengths(kind, number, seed=seed), vocabulary=SHAPES[shape]["vocab_size"], seed=seed)

    def tests(self) -> list[Row]:
        """The tests marked `cuda`, in the files that have any."""
        require("pytest")
        named = re.compile(r"mark\.cuda|^def test_.*\bdevice\b", re.MULTILINE)
        files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if named.search(path.read_text("utf-8"))]
        # The options in setup.cfg are those of a plugin that may not be there.
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-o", "addopts=-q", "-p", "no:cacheprovider", *files]
        command += ["--continue-on-collection-errors", *(["--collect-only"] if self.dry else [])]
        start = time.perf_counter()
        out, error = run_script(command, TEST_SECONDS)
        result = next((line for line in reversed(out.splitlines()) if line.strip()), error)
        if error and not self.dry:
            raise ValueError(f"{result} ({error})")
        return [Row("tests", [time.perf_counter() - start], more={"result": result})]

    def matrices(self) -> list[Row]:
        """Plain matrix products in float32 and bfloat16, to relate the rest to."""
        rates = {dtype: matrix_rate(self.device, dtype) for dtype in ("float32", "bfloat16")}
        self.rate = rates["bfloat16"]
        case = "10^12 operations of matrix products"
        return [Row(f"{case}, {dtype}", [1e12 / rate], flops=10**12) for dtype, rate in rates.items() if rate]

    def encode(self) -> list[Row]:
        """With weights in bfloat16; contexts with float32 weights too, which infer in bfloat16 by default."""
        rows, kinds = [], ("longest", "chunks", "contexts", "questions")
        for shape in self.sizes.shapes:
            embedder = self.load(shape, torch.bfloat16)
            rows += [self.encoded(f"encode {kind}, {shape}", embedder, kind, shape) for kind in kinds]
            embedder = self.load(shape, torch.float32)
            rows.append(self.encoded(f"encode contexts, {shape}, float32 weights", embedder, "contexts", shape))
        return rows

    def encoded(self, case: str, embedder: Embedder, kind: str, shape: str) -> Row:
        mean = draw_lengths(kind, 1_000).mean()
        texts = self.texts(kind, max(8, round(self.sizes.encoded / mean)), shape)
        lengths = np.array([len(ids) for ids in embedder.tokenizer.encode(texts)])
        seconds, peak = self.timed(lambda: embedder.encode(texts, progress=False))
        start = time.perf_counter()
        embedder.pack(texts, role="document")
        more = {"of_it_tokenizing": (time.perf_counter() - start) / statistics.median(seconds)}
        facts = {"texts": len(texts), "tokens": int(lengths.sum()), "more": more}
        return self.row(case, seconds, suite.flops_of(embedder.encoder, lengths), peak, **facts)

    def step(self) -> list[Row]:
        """Training steps on a batch at once."""
        return [
            self.stepped(f"step of {{}} pairs, {shape}, Matryoshka", self.load(shape, torch.float32))
            for shape in self.sizes.shapes
        ]

    def stepped(self, case: str, embedder: Embedder) -> Row:
        sizes, config = (self.sizes.batch, self.sizes.steps), TrainConfig(precision="bfloat16", epochs=1)
        return self.trained(case.format(f"{sizes[0]:,}"), embedder, matryoshka(embedder), config, sizes, TRAIN_PASSES)

    def compiled(self) -> list[Row]:
        """Contexts and a step again, with compiled layers."""
        embedder, shape = self.load(self.sizes.base, torch.float32), self.sizes.base
        compile_layers(embedder, backend="aot_eager" if self.dry else "inductor")
        rows = [self.encoded(f"encode contexts, {shape}, compiled", embedder, "contexts", shape)]
        return [*rows, self.stepped(f"step of {{}} pairs, {shape}, Matryoshka, compiled", embedder)]

    def recipe(self) -> list[Row]:
        """The finance recipe: all its steps in one time."""
        pairs, epochs, batch, accumulate = self.sizes.recipe
        embedder = self.load(self.sizes.base, torch.float32)
        settings = {"lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "accumulate": accumulate, "epochs": epochs}
        config, steps = TrainConfig(precision="bfloat16", **settings), pairs // batch
        case, loss = f"finance recipe, {epochs} epochs of {steps * batch:,} pairs", matryoshka(embedder)
        row = self.trained(case, embedder, loss, config, (batch, steps), TRAIN_PASSES, whole=True)
        row.more |= ARTICLE
        return [row]

    def cached(self) -> list[Row]:
        rows, loss = [], build_loss({"name": "in_batch_negatives"})
        for number in self.sizes.cached:
            embedder = self.load(self.sizes.base, torch.float32)
            config = TrainConfig(precision="bfloat16", epochs=1, mini_batch_tokens=self.sizes.mini_batch_tokens)
            case = f"cached step of {number:,} pairs, {self.sizes.base}"
            rows.append(self.trained(case, embedder, loss, config, (number, 3), CACHED_PASSES))
        return rows

    def search(self) -> list[Row]:
        """Exact search with torch; a few queries are checked in float64."""
        documents, queries, dim = self.sizes.search
        generator = np.random.default_rng(0)
        documents_ND, queries_QD = (
            unit_rows(generator.standard_normal((rows, dim), dtype=np.float32)) for rows in (documents, queries)
        )
        found = search_exact(queries_QD[:8], documents_ND, 10, device=self.device)
        exact_QN = queries_QD[:8].astype(np.float64) @ documents_ND.T
        suite.require_close("search", found.scores, -np.sort(-exact_QN, axis=1)[:, :10], TOLERANCE, "scores")
        seconds, peak = self.timed(lambda: search_exact(queries_QD, documents_ND, 100, device=self.device))
        flops = 2 * documents * queries * dim
        case = f"exact search, {queries:,} queries, {documents:,} x {dim}"
        return [Row(case, seconds, flops=flops, peak_bytes=peak)]

    def peers(self) -> list[Row]:
        """benchmarks.bench_encode and bench_train on random pairs, against sentence-transformers in bfloat16."""
        require("sentence_transformers")
        file, shape = self.folder / "pairs.csv", self.sizes.base
        texts = (self.texts(kind, 16 * self.sizes.batch, shape) for kind in ("questions", "contexts"))
        with open(file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([("question", "context"), *zip(*texts, strict=True)])
        common = ["--base", str(self.models[shape]), "--data", str(file), "--device", self.device, "--rounds", "3"]
        common += ["--dtype", "bfloat16", "--peer", "sentence-transformers-bf16"]
        config = f'{{"batch_size": {self.sizes.batch}}}'
        options = {"encode": ["--peer-batch", "256"], "train": ["--mode", "matryoshka", "--config", config]}
        rows = []
        for name, more in options.items():
            result = self.folder / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.bench_{name}", *common, *more, "--json", str(result)]
            _, error = run_script(command, PEER_SECONDS)
            if error:
                raise ValueError(f"{name}: {error}")
            known = {field for field in vars(Row("", [])) if field not in ("case", "more")}
            for row in read_json(result)["rows"]:
                case = f"{name} {row.pop('case')}, {shape}"
                rows.append(Row(case, **{key: value for key, value in row.items() if key in known}))
        return rows

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
        seconds = np.diff(times).tolist()
        flops, share = (
            passes * suite.flops_of(embedder.encoder, lengths),
            config.epochs / (1 if whole else len(seconds)),
        )
        more = {"outside_steps": 1 - sum(inside[1:]) / sum(seconds[1:])}
        facts = {"texts": round(2 * number * share), "tokens": round(int(lengths.sum()) * share), "more": more}
        seconds = [sum(seconds)] if whole else seconds[1:]
        return self.row(case, seconds, round(flops * share), peak_memory_bytes(self.device), **facts)

    def row(self, case: str, seconds: list[float], flops: int, peak: int, **facts: Any) -> Row:
        return Row(case, seconds, flops=flops, peak_bytes=peak, matrix_flops_per_second=self.rate, **facts)


STEPS = ("matrices", "tests", "encode", "step", "recipe", "cached", "search", "compiled", "peers")


def matryoshka(embedder: Embedder) -> Loss:
    dims = matryoshka_dims(embedder.full_dim)
    return build_loss({"name": "matryoshka", "dims": dims, "inner": {"name": "in_batch_negatives"}})


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")


def main(options: argparse.Namespace) -> None:
    start, device = time.perf_counter(), find_device(options.device)
    out = Path(options.out or ROOT / "benchmarks" / "results" / f"{slug(describe(device))}-{date.today()}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"results": [], "failures": [], "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        sizes = DRY if options.dry_run else Sizes()
        measurements, rows = Measurements(options.device, sizes, Path(folder), dry=options.dry_run), []
        for name in options.steps:
            began = time.perf_counter() - start
            error = f"would have started after {began:.0f} s" if began > LAST_START else ""
            say(f"{began:.0f} s: {name}")
            try:
                rows += [] if error else getattr(measurements, name)()
            except ImportError as missing:
                error = f"skipped: {missing}"
            except Exception as failure:  # the other steps may still work
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"
            if error:
                say(f"{name}: {error}")
                found["failures"].append({"benchmark": name, "command": "benchmarks.gpu", "error": error})
            found["seconds"][name] = round(time.perf_counter() - start - began, 1)
            found["results"] = [suite.as_json("gpu", options, rows, device)]
            write_json(out, found)
    if rows:
        suite.report("gpu", options, rows)
    for failure in found["failures"]:
        print(f"{failure['benchmark']}: {failure['error']}")
    print(f"{time.perf_counter() - start:.0f} s; {out}")


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.partition(",")[0].lower()).strip("-")


def parser() -> argparse.ArgumentParser:
    found = commandline.Parser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    found.add_argument("--device", default=str(default_device()), metavar="DEVICE", help="[%(default)s]")
    found.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help="[all]")
    found.add_argument("--out", metavar="FILE", help="[benchmarks/results/DEVICE-DATE.json]")
    found.add_argument("--dry-run", action="store_true", help="everything once, on tiny shapes")
    found.set_defaults(rounds=Sizes.rounds, json=None)
    return found


if __name__ == "__main__":
    commandline.run(main, parser())
