"""benchmarks/arithmetic.py, worked by hand; the small case of scaling.py on a tiny encoder. benchmarks/shapes.py."""

import json

import numpy as np
import pytest

from benchmarks.arithmetic import (
    Rates,
    Shape,
    encode_seconds,
    ivfpq,
    shape_of,
    step,
    store_bytes,
    store_seconds,
)
from benchmarks.scaling import duration, main, parser, size
from benchmarks.shapes import DECILES, draw_lengths, make_texts, write_model
from embedft import load_embedder

SHAPE = Shape(dim=8, parameters=100, token_flops=10, pair_flops=3)


def test_encoding():
    # 5 texts of 4 tokens: 5 * (4 * 10 + 16 * 3) = 440 FLOPs; two GPUs at half of 22 FLOP/s: 20 s.
    assert SHAPE.forward(5, 4) == 440
    assert encode_seconds(SHAPE, 5, 4, 2, Rates(matrix_flops=22, share=0.5)) == 20


def test_a_shape():
    found = shape_of("tiny")
    # Per layer: 4 matrices of 32 x 32 and 2 of 32 x 64, or 8,192 weights; two layers, 2 FLOPs per weight.
    assert found.token_flops == 2 * 2 * 8_192
    assert found.pair_flops == 2 * 4 * 32  # two layers: 2 * 32 for a score, as many for its product with V
    assert found.dim == 32
    # Tables of 100 + 512 + 2 rows and a norm; per layer, biases 4 * 32 + 64 + 32 and two norms of 64.
    assert found.parameters == 614 * 32 + 64 + 2 * (8_192 + 224 + 128)


def test_the_store():
    assert store_bytes(10, 8) == 10 * (32 + 20)
    # 9 GPUs are two machines of 8, which write 13 bytes/s each: 520 / 26 s.
    assert store_seconds(10, 8, 9, Rates(disk=13)) == 20


def test_a_step():
    rates = Rates(matrix_flops=880, share=0.5, network=3)
    found = step(SHAPE, 5, 4, 4, rates, cached=True)
    assert found.flops == 4 * 880 / 4  # ten texts: 880 a pass; four passes, a quarter of the texts
    assert found.gathered_bytes == 10 * 8 * 4 * 3 / 4  # three quarters of ten vectors
    assert found.summed_bytes == 2 * 400 * 3 / 4
    assert found.memory_bytes == 16 * 100 + 2 * 10 * 32 + 2 * 25 * 4  # weights; vectors and scores, with gradients
    assert found.seconds == pytest.approx(880 / 440 + (240 + 600) / 3)
    alone = step(SHAPE, 5, 4, 1, rates, cached=False)
    assert (alone.flops, alone.gathered_bytes, alone.summed_bytes) == (3 * 880, 0, 0)


def test_an_index():
    found = ivfpq(10_000, 16, Rates(index_memory=1e6))
    # 4 * 100 lists, but 10,000 / 39 = 256; 16 dimensions in 2 bytes, and 8 for the id.
    assert (found.shards, found.lists, found.parts) == (1, 256, 2)
    assert found.shard_bytes == 10_000 * 10 + (256 + 256) * 64
    # k-means of all 10,000 (64 * 256 would be more): 10 passes over the lists' centroids and 25 over the codes'.
    assert found.build_flops == 32 * (10 * 10_000 * 256 + 25 * 10_000 * 256 + 10_000 * 512)
    assert found.query_flops == 32 * 512
    assert found.query_bytes == 10_000 * 16 / 256 * 2
    rates = Rates(core_flops=16_384, core_codes=125, cores=2)
    assert found.query_seconds(rates) == pytest.approx(1 + 10)
    assert found.build_seconds(rates) == pytest.approx(found.build_flops / 32_768)


def test_as_many_shards_as_memory_requires():
    # Halves take 5,000 * 10 + (128 + 256) * 64 = 74,576 bytes; the whole, 132,768.
    found = ivfpq(10_000, 16, Rates(index_memory=80_000))
    assert (found.shards, found.lists, found.shard_bytes) == (2, 128, 74_576)
    # A billion vectors of 768 dimensions: 4 * sqrt(10^9) lists, 104 bytes each.
    found = ivfpq(1e9, 768, Rates())
    assert (found.shards, found.lists, found.parts) == (1, 126_491, 96)
    assert found.shard_bytes == pytest.approx(104e9 + 126_747 * 3_072)
    assert ivfpq(1e9, 768, Rates(index_memory=30e9)).shards == 4


def test_units():
    assert [duration(x) for x in (200_000, 7_200, 300, 60, 0.25)] == ["2.3 d", "2.0 h", "5.0 min", "60.0 s", "250.0 ms"]
    assert [size(x) for x in (3.1e12, 2e9, 5e6, 300)] == ["3.1 TB", "2.0 GB", "5.0 MB", "0.3 kB"]


def test_the_small_case(tmp_path, capfd):
    options = ["--base", "tiny", "--small", "1200", "--shape", "tiny", "--json", str(tmp_path / "x.json")]
    main(parser().parse_args(options))
    text = capfd.readouterr().out
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["benchmark"] == "scaling"
    assert [row["case"].split()[0] for row in result["rows"]] == ["encode", "train", "store", "build", "search"]
    assert all(row["measured_to_predicted"] > 0 for row in result["rows"])
    encode, train, store, build, _ = result["rows"]
    assert train["case"] == "train on 8 contexts"
    # 24 contexts, and the first 8 of them: three passes.
    assert encode["FLOPs"] > train["FLOPs"] / 3 > 0
    # Vectors of 32 numbers and a record of 20 bytes each; the index has headers.
    assert store["predicted_bytes"] == 1_200 * (128 + 20)
    assert store["bytes"] == pytest.approx(store["predicted_bytes"], rel=0.05)
    assert build["bytes"] == pytest.approx(build["predicted_bytes"], rel=0.1)
    assert "1e+09" in text
    assert "add_with_ids" in text


# Shapes.


@pytest.mark.parametrize("shape", ["tiny", "tiny mpnet"])
def test_random_models_read_their_texts(tmp_path, shape):
    embedder = load_embedder(write_model(tmp_path / "base", shape), device="cpu")
    lengths = [2, 3, 57, 512]
    texts = make_texts(lengths, vocabulary=100)
    assert [len(ids) for ids in embedder.tokenizer.encode(texts)] == lengths
    vectors_ND = embedder.encode(texts)
    assert vectors_ND.shape == (4, 32)
    assert abs(vectors_ND @ vectors_ND.T - np.eye(4)).max() < 0.999
    again = load_embedder(write_model(tmp_path / "again", shape), device="cpu")
    assert embedder.sha256() == again.sha256()


def test_lengths_follow_the_deciles():
    lengths = draw_lengths("questions", 10_001)
    found = np.quantile(lengths, np.linspace(0, 1, 11))
    assert abs(found - np.array(DECILES["questions"])).max() <= 1
    assert draw_lengths("chunks", 100, most=64).max() == 64
