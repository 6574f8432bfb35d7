"""What the stages of a forward pass and of a training step take, beside what arithmetic says that they must.

FLOPs are those of products. Bytes are what the kernels of each stage read and write at least, each tensor once per
kernel; attention's weights, masks and padding are not counted. A stage's floor is the larger of its FLOPs at the rate
of plain matrix products and its bytes at that of adding two tensors, both measured first. Copies are ours; another
implementation may need none. What a stage takes is its share in torch's profiler of the time measured without it; of
MPS, the profiler sees nothing, so that only the whole is shown. For BERT and RoBERTa.

    python -m benchmarks.bench_stages --rounds 5
    python -m benchmarks.bench_stages --dtype bfloat16 --lengths chunks --number 10       # the forward pass alone

Shapes, in formulas: T tokens, D features, F feed-forward features.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType

from embedft import Embedder, build_loss, load_embedder
from embedft.encoders.layers import inference
from embedft.encoders.packing import Packed, pack
from embedft.losses.targets import Targets
from embedft.training.optim import build_optimizer

from . import suite
from .shapes import DECILES, draw_lengths
from .suite import Row, make_parser, matrix_rate
from .workers import synchronize

FAMILIES = ("bert", "roberta")
LINEAR, ATTENTION, NORMS, ENDS = "linear layers", "attention", "norms, activations, dropout", "embeddings, pooling"
COPIES, OPTIMIZER = "copies and the rest", "clipping and AdamW"
# Parts of the names of operations in torch's profiler, in lower case; the first that fits decides.
OPERATIONS = {
    OPTIMIZER: ("optimizer", "adamw", "_foreach", "vector_norm"),
    LINEAR: ("linear", "addmm", "aten::mm", "aten::sum"),
    ATTENTION: ("attention", "scaleddot", "bmm", "softmax"),
    ENDS: ("embedding", "index_select", "index_add", "scatter"),
    NORMS: ("layer_norm", "layernorm", "gelu", "dropout", "random_", "aten::add", "aten::mul", "aten::ge"),
}


class Stage(NamedTuple):
    flops: float
    bytes: float

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


class Sizes(NamedTuple):
    layers: int
    features: int
    inner: int
    vocabulary: int
    parameters: int

    @classmethod
    def of(cls, encoder: nn.Module) -> "Sizes":
        config, parameters = encoder.config, sum(weight.numel() for weight in encoder.parameters())
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size, parameters
        )


def stages(sizes: Sizes, lengths: np.ndarray, *, training: bool, num_bytes: int = 4) -> dict[str, Stage]:
    """Every stage of a forward pass over texts of these numbers of tokens, or of a training step on them.
    `num_bytes`: of a number."""
    layers, D, F, vocabulary, parameters = sizes
    T, pairs = int(np.sum(lengths)), int(np.sum(np.square(lengths)))
    weights, through = 4 * D * D + 2 * D * F, T * (8 * D + 2 * F)  # of a layer; what its products read and write
    linear, attended = 2 * T * weights * layers, 4 * D * pairs * layers
    # Of numbers. In a layer: q, k, v and output; two sums (3) and norms (2); three tensors padded, one joined again.
    counts = {LINEAR: layers * (weights + through), ATTENTION: layers * 4 * T * D}
    counts |= {NORMS: (layers * 10 + 2) * T * D, ENDS: 10 * T * D, COPIES: layers * 8 * T * D}
    products = {LINEAR: linear, ATTENTION: attended}
    if training:  # also a stage after the product for the activation, and dropout (2)
        products = {name: 3 * value for name, value in products.items()}
        # Gradients of inputs (gradient, weights, result), of weights (input, gradient, result) and of biases.
        counts[LINEAR] += layers * (2 * (weights + through) + T * (5 * D + F))
        counts[ATTENTION] += layers * 7 * T * D
        # Again norm (3), sum (3) and dropout (2), twice a layer, and the activation (3).
        counts[NORMS] += layers * (20 * T * D + 5 * T * F) + 7 * T * D
        counts[ENDS] += 8 * T * D + vocabulary * D
        counts[COPIES] += layers * (8 * T * D + 2 * weights)  # weights are transposed
        counts[OPTIMIZER] = 10 * parameters  # norm (1), scaling (2), weights, gradients and moments (7)
    return {name: Stage(products.get(name, 0), count * num_bytes) for name, count in counts.items()}


def stage_of(operation: str) -> str:
    return next((name for name, parts in OPERATIONS.items() if any(x in operation.lower() for x in parts)), COPIES)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def memory_rate(rows: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Bytes/s that a sum of two [rows, columns] tensors reads and writes, the best of a few."""
    x, y, out = (torch.ones(rows, columns, dtype=dtype, device=device) for _ in range(3))
    return 3 * out.nbytes / min(timed(lambda: torch.add(x, y, out=out), device) for _ in range(10))


def shares(work: Callable[[], None], known: Collection[str], device: str) -> dict[str, float]:
    """Share of each known stage in the time that the profiler sees; all others are copies and the rest."""
    on_cuda, activities = torch.device(device).type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, *([activities.CUDA] if on_cuda else [])]) as profiler:
        work()
        synchronize(device)
    found: Counter = Counter()
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # kernels; the operations that started them have their time
            continue
        name = stage_of(event.key)
        found[name if name in known else COPIES] += (
            event.self_device_time_total if on_cuda else event.self_cpu_time_total
        )
    return {name: value / sum(found.values()) for name, value in found.items()}


def make_forward(embedder: Embedder, packed: Packed) -> Callable[[], None]:
    def forward() -> None:
        embedder.embed(packed, role="document")

    return forward


def make_step(embedder: Embedder, packed: Packed) -> Callable[[], None]:
    """A step of in-batch negatives: the first half of the texts are the queries of the second."""
    optimizer, loss = build_optimizer(embedder, lr=2e-5, weight_decay=0.01), build_loss({"name": "in_batch_negatives"})
    half = packed.num_sequences // 2

    def step() -> None:
        vectors_ND = embedder.embed(packed, role="document")
        Q, D = vectors_ND[:half], vectors_ND[half : 2 * half]
        loss(Q, D, Targets(torch.arange(half)[:, None])).backward()
        torch.nn.utils.clip_grad_norm_(embedder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows_of(what: str, work: Callable[[], None], needed: dict[str, Stage], rates: tuple, options: Any) -> list[Row]:
    """A row for the whole and, where the profiler sees them, for each stage."""
    work()  # warms up
    seconds, rows = [timed(work, options.device) for _ in range(options.rounds)], []
    parts = {} if options.device.startswith("mps") else shares(work, needed, options.device)
    floors = {name: stage.floor(*rates) for name, stage in needed.items()}
    whole = Stage(*(sum(values) for values in zip(*needed.values(), strict=True)))
    for name, stage, share, floor in [
        ("all", whole, 1.0, sum(floors.values())),
        *((name, stage, parts.get(name, 0.0), floors[name]) for name, stage in needed.items() if parts),
    ]:
        taken = [share * value for value in seconds]
        reached = floor / max(statistics.median(taken), 1e-9)
        more = {"gigabytes": stage.bytes / 1e9, "floor_seconds": floor, "floor_to_taken": reached}
        given = {"flops": int(stage.flops) or None, "matrix_flops_per_second": rates[0], "more": more}
        rows.append(Row(f"{what}: {name}", taken, **given))
    return rows


def main(options: argparse.Namespace) -> list[Row]:
    if options.number < 2:
        raise ValueError(f"--number is {options.number}, expected at least 2")
    dtype = getattr(torch, options.dtype)
    embedder = load_embedder(options.base, device=options.device, dtype=dtype)
    embedder.autocast = False  # so that --dtype is what computes, on CUDA too
    if (family := embedder.source.config["model_type"]) not in FAMILIES:
        raise ValueError(f"{options.base}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    lengths = draw_lengths(options.lengths, options.number, most=embedder.max_length)
    if texts := suite.own_texts(options.data, options.number):
        lengths = embedder.pack(texts, role="document").lengths().numpy()
    draw = np.random.default_rng(0)
    packed = pack([draw.integers(embedder.encoder.config.vocab_size, size=length).tolist() for length in lengths])
    sizes = Sizes.of(embedder.encoder)
    rates = (
        matrix_rate(options.device, options.dtype),
        memory_rate(int(lengths.sum()), sizes.inner, dtype, options.device),
    )
    print(f"{len(lengths)} texts, {lengths.sum():,} tokens; {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.0f} GB/s\n")
    num_bytes = {"num_bytes": dtype.itemsize}
    with inference(embedder):
        work, needed = make_forward(embedder, packed), stages(sizes, lengths, training=False, **num_bytes)
        rows = rows_of("forward", work, needed, rates, options)
    if options.dtype == "float32":
        embedder.train()
        work, needed = make_step(embedder, packed), stages(sizes, lengths, training=True, **num_bytes)
        rows += rows_of("step", work, needed, rates, options)
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("stages", __doc__, rounds=5, data=suite.OWN, dtypes=("float32", "bfloat16"))
    found.add_argument("--lengths", choices=DECILES, default="contexts", help="of random texts [%(default)s]")
    found.add_argument("--number", type=int, default=96, metavar="N", help="texts of the batch [%(default)s]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
