"""Time and memory for corpora and numbers of GPUs that no one machine here has, predicted by arithmetic.

    python -m benchmarks.scaling                                        # 10^8 and 10^9 documents, 1, 8 and 64 GPUs
    python -m benchmarks.scaling --documents 3e8 --gpus 16 --tokens 200 --matrix-flops 8e14 --small 0

First, the same arithmetic predicts a small case on this machine, from rates measured on an even smaller one with other
texts: encoding, a training step, writing the store, building and searching an IVF-PQ index. The table has the measured
time beside it, and the measured bytes of the store and of the index; how far the two are apart says how far to trust
the rest. What the arithmetic (arithmetic.py) knows:

- encoding: FLOPs of the matrix products and of attention, at a share of the GPUs' rate; documents are independent, so
  the GPUs split them, each with a store of its own;
- the store: a float32 vector and a 20-byte record per document; opening it takes 32 bytes of memory per document;
- a training step: three times a forward pass, four with gradient caching; every rank receives the vectors of the
  others and sums gradients with them (counted as not overlapped), and holds the scores of the whole batch;
- IVF-PQ as the preset `ivfpq` of embedft/retrieval/approximate.py sets it, in as many shards as memory requires.

Rates are options. Their defaults are round figures for an H200 and a server with 32 cores, taken from data sheets and
from this project's goals, not measured: no such machine was there.
"""

import argparse
import math
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from embedft import load_embedder
from embedft.encoders.store import VECTOR_TYPE, Space, Store
from embedft.retrieval.approximate import FaissIndex
from embedft.retrieval.tables import format_table
from experiments import commandline

from . import suite
from .arithmetic import (
    MOST_ROWS,
    NPROBE,
    PASSES,
    RESULTS,
    ROW_BYTES,
    Rates,
    encode_seconds,
    ivfpq,
    shape_of,
    step,
    store_bytes,
    store_seconds,
)
from .bench_stages import make_step, timed
from .shapes import SHAPES, draw_lengths, make_texts, write_model
from .vectors import perturbed

# The small case.


def measured(options: argparse.Namespace, folder: Path) -> list[suite.Row]:
    """Encoding, training, storing and searching on this machine, each after a smaller run that measures the rates."""
    base = write_model(folder / "base", options.base) if options.base in SHAPES else options.base
    vectors_ND, rows = _encoding(base, options, max(options.small // 50, 8))
    rows += _training(base, options, min(max(options.small // 500, 8), 96))
    rows += _storing(folder, vectors_ND, options.small)
    return rows + _searching(vectors_ND, options.small)


def _row(case: str, seconds: float, predicted: float, sizes: tuple[float, float] | None = None, **more) -> suite.Row:
    """`sizes`: measured and predicted bytes."""
    more = {"predicted_seconds": predicted, "measured_to_predicted": seconds / predicted, **more}
    if sizes is not None:
        more |= {"bytes": sizes[0], "predicted_bytes": sizes[1]}
    return suite.Row(case, [seconds], more={name: float(value) for name, value in more.items()})


def _timed(work, *arguments) -> tuple[object, float]:
    start = time.perf_counter()
    return work(*arguments), time.perf_counter() - start


def _encoding(base: str | Path, options: argparse.Namespace, number: int) -> tuple[np.ndarray, list[suite.Row]]:
    embedder = load_embedder(base, device=options.device, dtype=getattr(torch, options.dtype))
    embedder.autocast = False  # so that --dtype is what computes, on CUDA too

    def encode(texts: str, number: int) -> tuple[np.ndarray, float, int]:
        found = make_texts(draw_lengths(texts, number, most=embedder.max_length))
        lengths = np.array([len(ids) for ids in embedder.tokenizer.encode(found)])
        vectors_ND, seconds = _timed(lambda: embedder.encode(found, progress=False))
        return vectors_ND, seconds, suite.flops_of(embedder.encoder, lengths)

    encode("questions", 8)  # warms up
    _, seconds, work = encode("questions", 2 * number)
    rate = work / seconds
    vectors_ND, seconds, work = encode("contexts", number)
    return vectors_ND, [_row(f"encode {number:,} contexts", seconds, work / rate, FLOPs=work, FLOPs_per_second=rate)]


def _training(base: str | Path, options: argparse.Namespace, number: int) -> list[suite.Row]:
    """A step on `number` texts in float32."""
    embedder = load_embedder(base, device=options.device).train()

    def train(texts: str, number: int) -> tuple[float, int]:
        packed = embedder.pack(make_texts(draw_lengths(texts, number, most=embedder.max_length)), role="document")
        work = make_step(embedder, packed)
        work()  # warms up
        return timed(work, options.device), PASSES * suite.flops_of(embedder.encoder, packed.lengths().numpy())

    seconds, work = train("questions", number)
    rate = work / seconds
    seconds, work = train("contexts", number)
    return [_row(f"train on {number:,} contexts", seconds, work / rate, FLOPs=work, FLOPs_per_second=rate)]


def _storing(folder: Path, vectors_CD: np.ndarray, number: int) -> list[suite.Row]:
    dim = vectors_CD.shape[1]
    store, space = Store(folder / "store"), Space("0" * 64, dim, {"model": "scaling"})
    done = 0

    def fill(texts: int) -> float:
        nonlocal done
        names, done = [f"text {row}" for row in range(done, done + texts)], done + texts
        return _timed(store.fill, space, names, lambda new: vectors_CD[np.arange(len(new)) % len(vectors_CD)])[1]

    def held() -> int:
        return sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())

    fill(16)
    rate = store_bytes(number // 4, dim) / fill(number // 4)
    work, before = store_bytes(number, dim), held()
    seconds = fill(number)
    return [_row(f"store {number:,} vectors", seconds, work / rate, (held() - before, work), bytes_per_second=rate)]


def _searching(vectors_CD: np.ndarray, number: int) -> list[suite.Row]:
    import faiss

    dim = vectors_CD.shape[1]
    documents_ND = perturbed(vectors_CD, range(number), 0.5, 0)
    queries_QD = perturbed(vectors_CD, range(max(number // 50, 100)), 0.5, 1)
    # FAISS 1.x takes three times as long to train codes on 10,000 vectors as on 20,000: below that, rates mislead.
    few = min(max(number // 4, 20_000), number // 2)
    arithmetic = {size: ivfpq(size, dim, Rates()) for size in (few, number)}
    FaissIndex(documents_ND[:1_000], "ivf")  # warms up
    small, seconds = _timed(FaissIndex, documents_ND[:few], "ivfpq")
    build_rate = arithmetic[few].build_flops / seconds
    # Of a search's time, the comparison with centroids is measured alone; the rest is for scanning codes.
    centroids = faiss.IndexFlatIP(dim)
    centroids.add(documents_ND[: arithmetic[few].lists])
    centroids.search(queries_QD, NPROBE)
    comparing = _timed(centroids.search, queries_QD, NPROBE)[1] / len(queries_QD)
    small.search(queries_QD, RESULTS)
    searching = _timed(small.search, queries_QD, RESULTS)[1] / len(queries_QD)
    core_flops = arithmetic[few].query_flops / comparing
    core_codes = arithmetic[few].query_bytes / max(searching - comparing, 1e-9)
    rates = Rates(core_flops=core_flops, core_codes=core_codes)
    large, seconds = _timed(FaissIndex, documents_ND, "ivfpq")
    predicted, sizes = (
        arithmetic[number].build_flops / build_rate,
        (large.bytes_per_vector * number, arithmetic[number].shard_bytes),
    )
    rows = [_row(f"build IVF-PQ of {number:,}", seconds, predicted, sizes)]
    large.search(queries_QD[:100], RESULTS)
    seconds = _timed(large.search, queries_QD, RESULTS)[1]
    predicted = arithmetic[number].query_seconds(rates) * len(queries_QD)
    return [*rows, _row(f"search it, {len(queries_QD):,} queries", seconds, predicted)]


# The prediction.


def tables(options: argparse.Namespace) -> str:
    """The predicted figures, for every corpus and number of GPUs."""
    rates, shape = _rates(options), shape_of(options.shape)
    rows = []
    for documents in options.documents:
        held = store_bytes(documents, shape.dim)
        for gpus in options.gpus:
            seconds = encode_seconds(shape, documents, options.tokens, gpus, rates)
            written = store_seconds(documents, shape.dim, gpus, rates)
            stores = max(gpus, math.ceil(documents / MOST_ROWS))
            opened = documents / stores * ROW_BYTES
            cells = [duration(seconds), duration(written), size(held), f"{stores}", size(opened)]
            rows.append([f"{documents:.0e}", f"{gpus}", f"{shape.forward(documents, options.tokens):.1e}", *cells])
    header = ["documents", "GPUs", "FLOPs", "encoding", "writing", "store", "parts", "memory to open a part"]
    parts = [format_table(header, rows)]
    rows = []
    for gpus in options.gpus:
        found = step(shape, options.pairs, options.pair_tokens, gpus, rates, cached=True)
        cells = [f"{found.flops:.1e}", size(found.gathered_bytes), size(found.summed_bytes), size(found.memory_bytes)]
        rows.append([f"{gpus}", *cells, duration(found.seconds), f"{options.pairs / found.seconds:,.0f}"])
    header = ["GPUs", "FLOPs each", "vectors gathered", "gradients summed", "memory each, beside activations"]
    parts.append(
        f"training with gradient caching, {options.pairs:,} pairs of two texts of {options.pair_tokens} tokens:\n"
    )
    parts[-1] += format_table([*header, "step", "pairs/s"], rows)
    rows, found = [], []
    for documents in options.documents:
        found.append(index := ivfpq(documents, shape.dim, rates))
        of_core = index.query_seconds(rates)
        cells = [f"{index.shards}", f"{index.lists:,}", f"{index.parts}", size(index.shard_bytes)]
        cells += [duration(index.build_seconds(rates)), duration(of_core), f"{rates.cores / of_core:,.0f}"]
        reranked = RESULTS * shape.dim * VECTOR_TYPE.itemsize
        rows.append([f"{documents:.0e}", *cells, size(reranked)])
    header = ["documents", "shards", "lists a shard", "bytes a code", "memory a shard", "build", "query, one core"]
    parts.append(format_table([*header, "queries/s", f"exact vectors of {RESULTS} results"], rows))
    return "\n\n".join([*parts, advice(max(index.shards for index in found))])


def advice(shards: int) -> str:
    """Which engine should serve such an index, and how the vectors get there."""
    where = "one machine with FAISS" if shards == 1 else f"FAISS on {shards} machines, one shard each"
    return f"""What should serve it: embedft searches what fits into one process. The largest of these indices needs
{where}: IVF-PQ for the first {RESULTS} of each shard, merged by score, then exact products
with the stored vectors. Copies of the shards multiply the rate. If documents change hourly, or queries filter by
fields, use a vector database that shards a compressed index itself, such as Milvus, Qdrant or Vespa.

How the vectors get there: a store has one file NAME.ID.f32 per space, float32 rows, little-endian, without a header, in
the order in which texts were stored:
    vectors_ND = np.memmap(file, "<f4", "r").reshape(-1, dim)
`Store.find(space, texts)` gives each text's row, and `Store.read` also checks checksums. These are the encoder's
vectors: an adapter or `dim` is applied by `embedder.encode`, which reads the store. Fill FAISS with
`index.add_with_ids(vectors_ND[rows], ids)`, a slice at a time; train it on a sample of all shards, so that all have the
same centroids. For a database, write the slices as .npy or Parquet with your ids for its bulk import."""


def duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= 2 * length or unit == "ms":
            return f"{seconds / length:,.1f} {unit}"
    raise AssertionError


def size(number: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= length or unit == "kB":
            return f"{number / length:,.1f} {unit}"
    raise AssertionError


def _rates(options: argparse.Namespace) -> Rates:
    return Rates(**{field.name: getattr(options, field.name) for field in fields(Rates)})


def main(options: argparse.Namespace) -> None:
    if options.small:
        with tempfile.TemporaryDirectory() as folder:
            suite.report("scaling", options, measured(options, Path(folder)))
        print()
    print(f"predicted for {options.shape}, {options.tokens} tokens per document:\n\n{tables(options)}")
    print("\nrates: " + ", ".join(f"{name} {value:g}" for name, value in vars(_rates(options)).items()))


def parser() -> argparse.ArgumentParser:
    found = suite.make_parser("scaling", __doc__, rounds=1, base=False, dtypes=suite.DTYPES)
    found.prog = "benchmarks.scaling"
    shapes = f"model of the small case; {', '.join(SHAPES)}: random weights [%(default)s]"
    found.add_argument("--base", default="MiniLM", metavar="MODEL", help=shapes)
    found.add_argument("--small", type=int, default=100_000, metavar="N", help="vectors of the small case [100000]")
    found.add_argument("--shape", choices=SHAPES, default="bge-base", help="encoder to predict for [%(default)s]")
    found.add_argument("--documents", type=float, nargs="+", default=[1e8, 1e9], metavar="N", help="[1e8 1e9]")
    found.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="[1 8 64]")
    found.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens of a document [128]")
    found.add_argument("--pairs", type=int, default=32_768, metavar="N", help="pairs of a training step [32768]")
    found.add_argument("--pair-tokens", type=int, default=64, metavar="N", help="tokens of a trained text [64]")
    for field in fields(Rates):
        name = f"--{field.name.replace('_', '-')}"
        found.add_argument(name, type=field.type, default=field.default, metavar="X", help="[%(default)g]")
    return found


if __name__ == "__main__":
    commandline.run(main, parser())
