"""What hardware of given rates takes to encode, store, train and search, by arithmetic. scaling.py prints it and
measures a small case.

seconds = encode_seconds(shape_of("bge-base"), documents=1e9, tokens=128, gpus=8, rates=Rates())
"""

import math
from dataclasses import dataclass

from embedft.encoders.card import flops
from embedft.encoders.layers import without_memory
from embedft.encoders.store import RECORD, VECTOR_TYPE
from embedft.retrieval.approximate import LEAST_PER_LIST, TRAINED_PER_LIST

from .shapes import make_encoder

ROW_BYTES = RECORD.itemsize + 12  # of memory for each row of an open store: record, sorted key, mark
MOST_ROWS = 2**32 - 1  # of a space
NPROBE, RESULTS = 16, 100
# FAISS's k-means: iterations for the lists; centroids of a byte of a code, iterations and most vectors for them.
ITERATIONS, CENTROIDS, CODE_ITERATIONS, CODE_TRAINED = 10, 256, 25, 65_536
PASSES = 3  # operations of a training step, in forward passes; gradient caching takes one more
OPTIMIZER_BYTES = 16  # of a trained weight: float32 weight, gradient and AdamW's two moments


@dataclass(frozen=True)
class Rates:
    """What the hardware does, per second; each field is an option."""

    matrix_flops: float = 6.5e14  # FLOP/s of plain bf16 matrix products on one GPU
    share: float = 0.35  # of these, what encoding and training reach
    network: float = 4e10  # bytes/s that each GPU receives from the others
    disk: float = 2e9  # bytes/s that one machine writes
    gpus_per_machine: int = 8
    core_flops: float = 3e10  # FLOP/s of one core in float32 matrix products
    core_codes: float = 5e8  # bytes/s of PQ codes that one core scans
    cores: int = 32  # of a machine that holds a shard of the index
    index_memory: float = 2e11  # bytes of memory that an index may take there


@dataclass(frozen=True)
class Shape:
    """What arithmetic needs to know of an encoder."""

    dim: int
    parameters: int
    token_flops: int  # a token's, in products with weights
    pair_flops: int  # a token's, for each token it attends to

    def forward(self, texts: float, tokens: float) -> float:
        """FLOPs of `texts` texts of `tokens` tokens each."""
        return texts * (tokens * self.token_flops + tokens**2 * self.pair_flops)


def shape_of(name: str) -> Shape:
    with without_memory():
        encoder = make_encoder(name)
    parameters = sum(weight.numel() for weight in encoder.parameters())
    return Shape(encoder.config.hidden_size, parameters, *flops(encoder))


def encode_seconds(shape: Shape, documents: float, tokens: float, gpus: int, rates: Rates) -> float:
    return shape.forward(documents, tokens) / (gpus * rates.matrix_flops * rates.share)


def store_bytes(documents: float, dim: int) -> float:
    return documents * (dim * VECTOR_TYPE.itemsize + RECORD.itemsize)


def store_seconds(documents: float, dim: int, gpus: int, rates: Rates) -> float:
    return store_bytes(documents, dim) / (math.ceil(gpus / rates.gpus_per_machine) * rates.disk)


@dataclass(frozen=True)
class Step:
    """A training step on several GPUs, each holding all weights."""

    flops: float  # of one GPU
    gathered_bytes: float  # vectors that one GPU receives
    summed_bytes: float  # what one GPU receives while gradients are summed
    memory_bytes: float  # weights, gradients, moments, all vectors and the batch's scores with their gradient, per GPU
    seconds: float


def step(shape: Shape, pairs: int, tokens: float, gpus: int, rates: Rates, *, cached: bool) -> Step:
    """A step on `pairs` pairs of texts of `tokens` tokens; with several GPUs, each embeds its part of the texts."""
    passes, others = PASSES + cached, (gpus - 1) / gpus
    work = passes * shape.forward(2 * pairs, tokens) / gpus
    gathered = 2 * pairs * shape.dim * 4 * others
    summed = 2 * shape.parameters * 4 * others  # a ring: each part is passed around twice
    memory = OPTIMIZER_BYTES * shape.parameters + 2 * 2 * pairs * shape.dim * 4 + 2 * pairs**2 * 4
    seconds = work / (rates.matrix_flops * rates.share) + (gathered + summed) / rates.network
    return Step(work, gathered, summed, memory, seconds)


@dataclass(frozen=True)
class Ivfpq:
    """An IVF-PQ index in equal shards; each is searched with every query."""

    shards: int
    lists: int  # of a shard, as the others
    parts: int  # bytes of a code
    shard_bytes: float
    build_flops: float
    query_flops: float  # comparing a query with the lists' centroids, and its table of products
    query_bytes: float  # of codes scanned for a query

    def build_seconds(self, rates: Rates) -> float:
        """All shards are built at once, each on its machine."""
        return self.build_flops / (rates.cores * rates.core_flops)

    def query_seconds(self, rates: Rates) -> float:
        """A query on one core of each shard's machine."""
        return self.query_flops / rates.core_flops + self.query_bytes / rates.core_codes


def ivfpq(documents: float, dim: int, rates: Rates) -> Ivfpq:
    """The index in the fewest shards that fit into `rates.index_memory` each."""
    parts, shards = max(p for p in range(1, max(dim // 8, 1) + 1) if dim % p == 0), 1
    while (found := _shard(documents / shards, dim, parts))[1] > rates.index_memory:
        shards += 1
    lists, shard_bytes = found
    held = documents / shards
    trained = min(TRAINED_PER_LIST * lists, held)
    codes = CODE_ITERATIONS * min(CODE_TRAINED, trained) * CENTROIDS
    build = 2 * dim * (ITERATIONS * trained * lists + codes + held * (lists + CENTROIDS))
    query_flops = 2 * dim * (lists + CENTROIDS)
    return Ivfpq(shards, lists, parts, shard_bytes, build, query_flops, held * min(NPROBE / lists, 1) * parts)


def _shard(documents: float, dim: int, parts: int) -> tuple[int, float]:
    """A shard's lists, as the preset sets them, and its bytes: codes, ids, centroids."""
    lists = max(1, min(round(4 * math.sqrt(documents)), int(documents) // LEAST_PER_LIST))
    return lists, documents * (parts + 8) + (lists + CENTROIDS) * dim * 4
