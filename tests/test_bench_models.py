"""benchmarks/bench_encode.py, bench_tokenize.py, bench_train.py and bench_load.py with a tiny BERT, in one process."""

import csv
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS
from in_process import InProcess
from naming import names, naming

from benchmarks import bench_encode, bench_load, bench_tokenize, bench_train, peers, suite
from benchmarks.bench_encode import agreement, load_texts
from embedft import RetrievalDataset


@pytest.fixture
def own_data(tmp_path, monkeypatch) -> Path:
    """A data set of 40 pairs; workers that are none, and a machine whose products are quickly measured."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(bench_encode, "Worker", InProcess)
    monkeypatch.setattr(suite, "batch_tokens", lambda device: 16)
    generator = random.Random(0)
    with open(tmp_path / "own.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[f"what is {i}", " ".join(generator.choices(LETTERS, k=5 + i))] for i in range(40)]
        csv.writer(file).writerows([("question", "context"), *rows])
    return tmp_path / "own.csv"


@pytest.fixture(scope="module")
def base(tmp_path_factory, write_tiny) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("base") / "tiny", modules=True))


def options_of(benchmark, *options: str):
    found = benchmark.parser().parse_args(options)
    found.peer = [name for name in found.peer if name != "none"]
    return found


def test_encode(own_data, base, capsys):
    names = ("sentence-transformers", "sentence-transformers-bf16", "sentence-transformers-onnx-int8")
    given = ("--base", base, "--data", str(own_data), "--rounds", "2", "--number", "8", "--peer", *names)
    rows = bench_encode.main(options_of(bench_encode, *given))
    left_out = "sentence-transformers-onnx-int8 is left out" in capsys.readouterr().out
    versions = [f"{name} {peers.version()}" for name in names[: 2 if left_out else 3]]
    assert [(row.case, row.peer) for row in rows] == [
        (case, peer) for case in ("queries", "documents", "mix") for peer in versions
    ]
    for row in rows:
        assert len(row.seconds) == len(row.peer_seconds) == 2
        assert row.texts == 8
        assert row.more["smallest_cosine"] > 0.9
    assert rows[0].tokens == 8 * 6  # [CLS] what i ##s 0 [SEP]
    assert rows[0].flops == 48 * 2 * 2 * (4 * 32 * 32 + 2 * 32 * 40) + 8 * 36 * 2 * 2 * 2 * 32
    assert rows[0].matrix_flops_per_second > 0
    assert rows[0].largest_difference < 1e-5 < rows[1].largest_difference
    assert rows[0].more["smallest_cosine"] > 1 - 1e-6 > rows[1].more["smallest_cosine"]


def test_encode_in_another_precision(own_data, base):
    given = ("--base", base, "--data", str(own_data), "--rounds", "1", "--texts", "documents", "--dtype", "bfloat16")
    (row,) = bench_encode.main(options_of(bench_encode, *given, "--peer", "embedft-float32"))
    assert row.peer.startswith("embedft-float32 ")
    assert 1e-5 < row.largest_difference < 0.1


def test_float32_is_computed_in_float32(base):
    """Where inference would lower it, on CUDA."""
    assert not bench_encode.Ours("embedft", base, {}, options_of(bench_encode, "--max-length", "48")).embedder.autocast


def test_encode_at_several_sizes(own_data, base, monkeypatch):
    monkeypatch.setattr(bench_encode, "SCALES", (50, 100))
    given = ("--base", base, "--data", str(own_data), "--rounds", "1", "--scaling", "--peer", "none")
    rows = bench_encode.main(options_of(bench_encode, *given))
    assert [(row.case, row.texts) for row in rows] == [("queries, 50", 50), ("queries, 100", 100)]
    assert all(row.more["microseconds_per_token"] > 0 for row in rows)


def test_texts(own_data, tmp_path):
    options = options_of(bench_encode, "--data", str(own_data), "--texts", "mix", "--number", "20")
    (mix,) = load_texts(options).values()
    assert len(mix) == 20
    assert 0 < sum(text.startswith("what") for text in mix) < 20
    options.texts = ["chunks"]
    with pytest.raises(ValueError, match=naming("--texts", "chunks", "queries", "documents", "mix")):
        load_texts(options)


def test_published_texts_and_training_sets(tmp_path):
    folders = [tmp_path / name for name in ("lyft_uber", "finance_qa")]
    for folder in folders:
        folder.mkdir()
    dataset = RetrievalDataset({"q": "who"}, {"d": "a long chunk"}, {"q": {"d": 1}})
    for name in ("train", "val"):
        dataset.save(folders[0] / f"{name}_dataset.json")
    with open(folders[1] / "Financial-QA-10k.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(f"question {i}", "no", f"context {i}", "X", "2023") for i in range(20)]
        csv.writer(file).writerows([("question", "answer", "context", "ticker", "filing"), *rows])
    options = options_of(bench_encode, "--data", str(tmp_path))
    sizes = {case: len(texts) for case, texts in load_texts(options).items()}
    assert sizes == {"Uber questions": 1, "finance contexts": 20, "Uber chunks": 1, "mix": 22}
    assert [len(bench_train.load_dataset(mode, options).queries) for mode in ("plain", "cached")] == [1, 18]


def test_vectors_that_differ():
    ours = np.eye(2, 3, dtype=np.float32)
    theirs = np.array([[1, 0, 0], [0, 0.995, 0.1]], dtype=np.float32)
    difference, cosine = agreement("c", ours, theirs, "int8", "sentence-transformers-onnx-int8")
    assert (difference, cosine) == (pytest.approx(0.1), pytest.approx(0.995, abs=1e-4))
    for precisions in (("float32", "sentence-transformers"), ("bfloat16", "sentence-transformers-bf16")):
        with pytest.raises(ValueError, match=naming("c", "cosine", *precisions)):
            agreement("c", ours, theirs, *precisions)
    with pytest.raises(ValueError, match=naming("c", "vectors", "1e-05")):  # the same directions
        agreement("c", ours, 2 * ours, "float32", "sentence-transformers")


def test_tokenize(own_data, base, monkeypatch):
    options = options_of(bench_tokenize, "--base", base, "--data", str(own_data), "--rounds", "1", "--texts", "mix")
    (row,) = bench_tokenize.main(options)
    assert (row.case, row.texts, row.peer) == ("mix", 80, f"sentence-transformers {peers.version()}")
    assert row.tokens > 80 * 7
    monkeypatch.setattr(bench_tokenize.Ours, "result", lambda self: [np.arange(3)] * 80)
    with pytest.raises(ValueError, match=naming("mix", "token", "ids")):
        bench_tokenize.main(options)


@pytest.mark.parametrize("mode", ["plain", "cached", "matryoshka"])
def test_train(own_data, base, mode):
    config = '{"batch_size": 16, "mini_batch_tokens": 64}' if mode == "cached" else '{"batch_size": 4}'
    given = ("--base", base, "--data", str(own_data), "--rounds", "2", "--mode", mode, "--config", config)
    (row,) = bench_train.main(options_of(bench_train, *given))
    steps = bench_train.MODES[mode].steps
    assert (row.case, len(row.seconds), len(row.peer_seconds)) == (f"{mode}, {steps} steps", 2, 2)
    assert row.tokens > steps * (16 if mode == "cached" else 4) * 10
    of_token = 2 * 2 * (4 * 32 * 32 + 2 * 32 * 40)
    assert row.flops > bench_train.MODES[mode].passes * row.tokens * of_token
    assert 0 < row.more["outside_steps"] < 1
    assert row.largest_difference < 1e-5


def test_train_lora_without_a_peer(own_data, base):
    given = ("--base", base, "--data", str(own_data), "--rounds", "1", "--mode", "lora", "--peer", "none")
    (row,) = bench_train.main(options_of(bench_train, *given))
    assert (row.case, row.peer) == ("lora, 4 steps", None)


def test_train_in_another_precision(own_data, base):
    given = ("--base", base, "--data", str(own_data), "--rounds", "1", "--mode", "plain", "--dtype", "bfloat16")
    options = options_of(bench_train, *given, "--peer", "embedft-float32")
    (row,) = bench_train.main(options)
    assert row.peer.startswith("embedft-float32 ")
    assert row.largest_difference == 0  # first losses, in float32
    made = [bench_train.Ours(name, "plain", base, "x", options) for name in ("embedft", "embedft-float32")]
    assert [it.config.precision for it in made] == ["bfloat16", "float32"]
    assert len({it.out for it in made}) == 2


def test_train_against_peers_at_their_best(own_data, base, capsys):
    names = ("sentence-transformers-bf16", "sentence-transformers-flash", "sentence-transformers")
    given = (
        "--base",
        base,
        "--data",
        str(own_data),
        "--rounds",
        "1",
        "--mode",
        "plain",
        "--config",
        '{"batch_size": 4}',
    )
    rows = bench_train.main(options_of(bench_train, *given, "--peer", *names))
    left_out = "sentence-transformers-flash is left out" in capsys.readouterr().out
    assert [row.peer.split()[0] for row in rows] == [name for name in names if not (left_out and "flash" in name)]
    assert rows[0].largest_difference > rows[-1].largest_difference  # autocast to bfloat16; float32


@pytest.mark.parametrize(("peer", "lowered"), [("sentence-transformers", False), ("sentence-transformers-bf16", True)])
def test_peers_train_under_autocast_of_their_own(own_data, base, peer, lowered, monkeypatch):
    found = []
    options = options_of(
        bench_train, "--base", base, "--data", str(own_data), "--dtype", "float16", "--max-length", "48"
    )
    monkeypatch.setattr(bench_train.SentenceTransformers, "loss_of", lambda self, batch: found.append(batch))
    contestant = bench_train.SentenceTransformers(peer, "plain", base, "x", options)
    assert contestant.dtype == ("bfloat16" if lowered else "float32")
    assert {weight.dtype for weight in contestant.model.parameters()} == {torch.float32}


def test_all_peers_but_int8_train():
    half = [f"sentence-transformers{variant}" for variant in ("", "-bf16", "-compile", "-flash")]
    assert half == peers.TRAINING
    assert [peers.dtype_of(name, "float16") for name in half] == ["float32", "bfloat16", "float16", "bfloat16"]
    assert peers.dtype_of("sentence-transformers-compile", "int8") == "float32"
    for benchmark in (bench_encode, bench_train):
        options = options_of(benchmark, "--peer", *half)
        assert options.peer == half


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[torch.nn.Module, dict]]:
    """What was compiled, with its options; there need be no compiler."""
    pytest.importorskip("sentence_transformers")
    found = []
    monkeypatch.setattr(torch, "compile", lambda work: work)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: found.append((self, options)))
    return found


@pytest.mark.parametrize("training", [False, True])
def test_what_is_compiled(base, compiled, training):
    given = {"device": "cpu", "dtype": "bfloat16", "max_length": 48, "training": training}
    model = peers.load_peer("sentence-transformers-compile", base, **given)
    ((module, options),) = compiled
    assert module is (model.transformers_model if training else model)
    assert options == {"dynamic": True}
    assert next(model.parameters()).dtype == (torch.float32 if training else torch.bfloat16)


@pytest.mark.parametrize("training", [False, True])
def test_flash_attention_is_asked_for(base, training, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    given = []
    plain = sentence_transformers.SentenceTransformer

    def without_attention(folder, *, model_kwargs, **options):
        given.append(dict(model_kwargs))
        model_kwargs.pop("attn_implementation")
        return plain(folder, model_kwargs=model_kwargs, **options)

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", without_attention)
    model = peers.load_peer("sentence-transformers-flash", base, device="cpu", max_length=48, training=training)
    dtype = torch.float32 if training else torch.bfloat16
    assert given == [{"dtype": dtype, "attn_implementation": "flash_attention_2"}]
    assert model.max_seq_length == 48


def test_without_a_compiler(base, monkeypatch):
    pytest.importorskip("sentence_transformers")

    def broken(work):
        raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: no g++\nand a trace")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ImportError, match=naming("InvalidCxxCompiler")) as raised:
        peers.load_peer("sentence-transformers-compile", base, device="cpu")
    assert not names(str(raised.value), "trace")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiled_peer(own_data, base):
    given = ("--base", base, "--data", str(own_data), "--rounds", "1", "--mode", "matryoshka")
    (row,) = bench_train.main(options_of(bench_train, *given, "--peer", "sentence-transformers-compile"))
    assert row.largest_difference < 1e-5


def test_train_reports_what_failed(own_data, base):
    given = ("--base", base, "--data", str(own_data), "--mode", "plain", "--config", '{"lr_parts": {"layers.9": 1.0}}')
    with pytest.raises(ValueError, match=naming("layers.9")):
        bench_train.main(options_of(bench_train, *given))


def test_losses_that_differ(own_data, base, monkeypatch):
    monkeypatch.setattr(bench_train.SentenceTransformers, "loss_of", lambda self, batch: torch.tensor(0.5))
    given = ("--base", base, "--data", str(own_data), "--mode", "plain")
    with pytest.raises(ValueError, match=naming("plain", "losses")):
        bench_train.main(options_of(bench_train, *given))


def test_load(base, monkeypatch):
    vectors = {name: np.eye(1, 32, dtype=np.float32)[0] for name in bench_load.PROGRAMS}
    runs = []

    def first_vector(name, *given, num_bytes):
        runs.append((name, given[-1], num_bytes))
        return vectors[name], 0.5, 2**30 if name == "embedft" else 2**31

    monkeypatch.setattr(bench_load, "first_vector", first_vector)
    options = options_of(
        bench_load, "--base", base, "--rounds", "2", "--dtype", "bfloat16", "--peer", *bench_load.PEERS
    )
    row, half = bench_load.main(options)
    assert (row.seconds, row.peer_seconds, row.largest_difference) == ([0.5, 0.5], [0.5, 0.5], 0.0)
    assert (row.peak_bytes, row.peer_peak_bytes) == (2**30, 2**31)
    assert [it.peer.split()[0] for it in (row, half)] == bench_load.PEERS
    dtypes = [("embedft", "bfloat16"), ("sentence-transformers", "float32"), ("sentence-transformers", "bfloat16")]
    assert runs == [(*it, 32 * 4) for it in dtypes] * 3  # once to warm up
    vectors["embedft"] = np.eye(1, 32, k=1, dtype=np.float32)[0]
    with pytest.raises(ValueError, match=naming("first", "cosine", "0.00000", "bfloat16")):
        bench_load.main(options)
    options.peer = []
    (row,) = bench_load.main(options)
    assert row.peer is None


@pytest.mark.slow
def test_first_vectors_of_processes(base, monkeypatch):
    (row,) = bench_load.main(options_of(bench_load, "--base", base, "--rounds", "1"))
    assert 0 < row.seconds[0] < row.peer_seconds[0]
    assert 2**27 < row.peak_bytes < row.peer_peak_bytes
    monkeypatch.setitem(bench_load.PROGRAMS, "embedft", "raise KeyError")
    with pytest.raises(ValueError, match=naming("KeyError")):
        bench_load.first_vector("embedft", base, "cpu", "float32", num_bytes=128)
