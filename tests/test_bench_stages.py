"""benchmarks/bench_stages.py: its arithmetic, worked by hand; all of it on a tiny encoder."""

import json
import sys

import numpy as np
import pytest
import torch
from naming import names

from benchmarks import bench_stages, suite
from benchmarks.bench_stages import (
    ATTENTION,
    COPIES,
    ENDS,
    LINEAR,
    NORMS,
    OPTIMIZER,
    Sizes,
    Stage,
    memory_rate,
    stage_of,
    stages,
)
from benchmarks.shapes import make_encoder, write_model
from benchmarks.suite import flops_of

SIZES = Sizes(layers=2, features=4, inner=8, vocabulary=10, parameters=500)
LENGTHS = np.array([3, 2])  # 5 tokens, 13 pairs of them; 20 numbers in [T, D], 40 in [T, F]
WEIGHTS = 4 * 16 + 2 * 32  # of a layer


def test_a_forward_pass_by_hand():
    found = stages(SIZES, LENGTHS, training=False)
    # Read and written in a layer: 20 to 60 and 20 to 20 numbers in attention, 20 to 40 and back behind it.
    assert found[LINEAR] == Stage(2 * 5 * WEIGHTS * 2, 4 * 2 * (WEIGHTS + 80 + 40 + 60 + 60))
    assert found[ATTENTION] == Stage(4 * 4 * 13 * 2, 4 * 2 * (60 + 20))  # Q K^T and its product with V
    assert found[NORMS] == Stage(0, 4 * (2 * 2 * (60 + 40) + 40))  # two sums and two norms a layer, one norm before
    assert found[ENDS] == Stage(0, 4 * 10 * 20)
    assert found[COPIES] == Stage(0, 4 * 2 * (6 * 20 + 2 * 20))
    assert OPTIMIZER not in found
    assert stages(SIZES, LENGTHS, training=False, num_bytes=2)[LINEAR].bytes == found[LINEAR].bytes / 2


def test_a_step_by_hand():
    forward, found = (stages(SIZES, LENGTHS, training=training) for training in (False, True))
    for name in (LINEAR, ATTENTION):
        assert found[name].flops == 3 * forward[name].flops
    more = {name: (found[name].bytes - stage.bytes) / 4 for name, stage in forward.items()}
    # Inputs' gradients read what weights' gradients read, but for the weights; then gradients of 12 + 4 + 8 + 4 biases.
    assert more[LINEAR] == 2 * (2 * (WEIGHTS + 240) + 5 * (12 + 4 + 8 + 4))
    assert more[ATTENTION] == 2 * (80 + 60)  # q, k, v and a gradient in, three out
    # Dropout there and back, norms' (x, gradient, result) and sums' gradients, twice; GELU there (2) and back (3).
    assert more[NORMS] == 2 * (2 * (2 + 2 + 3 + 3) * 20 + 5 * 40) + (2 + 2 + 3) * 20
    assert more[ENDS] == 8 * 20 + 10 * 4
    assert more[COPIES] == 2 * (8 * 20 + 2 * WEIGHTS)
    assert found[OPTIMIZER] == Stage(0, 4 * 10 * 500)


def test_flops_are_those_of_the_suite():
    encoder = make_encoder("tiny")
    found = stages(Sizes.of(encoder), LENGTHS, training=False)
    assert sum(stage.flops for stage in found.values()) == flops_of(encoder, LENGTHS)
    assert Sizes.of(encoder) == (2, 32, 64, 100, sum(weight.numel() for weight in encoder.parameters()))


def test_a_floor_is_the_slower_of_products_and_memory():
    assert Stage(600, 40).floor(300, 10) == 4
    assert Stage(600, 40).floor(100, 10) == 6


def test_operations_by_their_names():
    operations = {
        "mkldnn::_linear_pointwise": LINEAR,
        "_OneDNNLinearBackward": LINEAR,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": ATTENTION,
        "aten::bmm": ATTENTION,
        "autograd::engine::evaluate_function: GeluBackward0": NORMS,
        "aten::native_layer_norm": NORMS,
        "aten::embedding_dense_backward": ENDS,
        "aten::_fused_adamw_": OPTIMIZER,
        "aten::copy_": COPIES,
    }
    assert {operation: stage_of(operation) for operation in operations} == operations


def test_the_rate_of_memory(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench_stages.time, "perf_counter", lambda: next(clock))
    assert memory_rate(2, 3, torch.bfloat16, "cpu") == 3 * 6 * 2  # a second for each sum


@pytest.mark.parametrize(("dtype", "cases"), [("float32", 5 + 1 + 6 + 1), ("bfloat16", 5 + 1)])
def test_a_tiny_encoder(dtype, cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_stages, "matrix_rate", lambda *_: 1e9)
    base, out = write_model(tmp_path / "base", "tiny"), tmp_path / "x.json"
    options = ["--base", str(base), "--dtype", dtype, "--rounds", "1", "--number", "4", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_stages", *options])
    suite.run(bench_stages.main, bench_stages.parser())
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == cases
    whole, *parts = rows[:6]
    assert whole["case"] == "forward: all"
    for of_whole, of_parts in (("seconds", lambda row: row["seconds"][0]), ("floor", lambda row: row["floor_seconds"])):
        assert of_parts(whole) == pytest.approx(sum(map(of_parts, parts))), of_whole
    assert whole["flops"] == sum(row.get("flops", 0) for row in parts)


def test_texts_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_stages, "matrix_rate", lambda *_: 1e9)
    (tmp_path / "own.csv").write_text("question,context\nw1,w2 w3 w4\nw5,w6\nw7,w8 w9\nw1,w1 w1\nw2,w2 w2\n")
    base = str(write_model(tmp_path / "base", "tiny"))
    options = ["--base", base, "--data", str(tmp_path / "own.csv"), "--number", "4", "--rounds", "1"]
    whole, *_ = bench_stages.main(bench_stages.parser().parse_args(options))
    assert whole.flops == flops_of(
        make_encoder("tiny"), [5, 3, 4, 4]
    )  # of the first four documents, with [CLS] and [SEP]


def test_a_step_needs_a_query_and_a_document(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_stages", "--number", "1"])
    with pytest.raises(SystemExit):
        suite.run(bench_stages.main, bench_stages.parser())
    assert names(capsys.readouterr().err, "--number", 1, 2)


def test_other_families_are_refused(tmp_path, monkeypatch, capsys):
    base = write_model(tmp_path / "base", "tiny mpnet")
    monkeypatch.setattr(sys, "argv", ["bench_stages", "--base", str(base)])
    with pytest.raises(SystemExit):
        suite.run(bench_stages.main, bench_stages.parser())
    assert names(capsys.readouterr().err, base, "model_type", "mpnet", "bert", "roberta")
