"""repro_matryoshka_finance.py: the split, cut vectors, and a tiny run from end to end."""

import argparse
import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import naming
from tiny import make_embedder

from embedft import evaluate
from embedft.data.batches import make_batches
from experiments import repro_matryoshka_finance as experiment
from experiments.repro_matryoshka_finance import format_dims, main, matryoshka_dims, measure, pick_dim

WORDS = ["order", "limit", "fee", "revenue", "query", "document", "hello", "world", "the", "of", "what"]


def write_file(folder: Path, num_rows: int = 40) -> Path:
    """Questions and contexts of random words; row 3 has no question, rows 5 and 6 have one context."""
    generator = random.Random(0)
    rows = []
    for i in range(num_rows):
        context = generator.choices(WORDS, k=8)
        question = "" if i == 3 else " ".join([*generator.sample(context, 3), str(i)])
        rows.append([question, "no", " ".join(context), "X", "2023"])
    rows[6][2] = rows[5][2]
    folder.mkdir(exist_ok=True)
    with open(folder / "Financial-QA-10k.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer", "context", "ticker", "filing"), *rows])
    return folder / "Financial-QA-10k.csv"


def make_options(folder: Path, **changed) -> argparse.Namespace:
    make_embedder(folder / "base")
    values = {
        "base": str(folder / "base"),
        "data": str(folder),
        "out": str(folder / "runs"),
        "base_only": False,
        "batch": ["accumulated", "true"],
        "pick": ["test", "held-out"],
        "seeds": [0, 1],
        "epochs": 2,
        "batch_size": 4,
        "accumulate": 3,
        "mini_batch_tokens": 64,
    }
    return argparse.Namespace(**{**values, **changed})


def test_the_split_of_the_published_data(shared_data):
    """The first 700 of the permutation test; 5,669 or 6,298 of the others train: two rows have no question."""
    file = shared_data / "finance_qa" / "Financial-QA-10k.csv"
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    order = torch.randperm(7000, generator=torch.Generator().manual_seed(42)).tolist()
    dataset, num_rows = experiment.read_rows(file)
    assert (num_rows, len(dataset.queries), len(dataset.corpus)) == (7000, 6998, 6998)
    split = experiment.split_rows(dataset, num_rows, keep_back=False)
    assert list(split.test.queries.values()) == [rows[i]["question"] for i in order[:700]]
    assert [split.test.corpus[f"d{place:04d}"] for place in range(700)] == [rows[i]["context"] for i in order[:700]]
    assert split.held_out is split.test
    assert len(split.train.queries) == len(split.train.corpus) == 6298
    kept_back = experiment.split_rows(dataset, num_rows, keep_back=True)
    assert list(kept_back.test.queries) == list(split.test.queries)
    assert len(kept_back.held_out.queries) + len(kept_back.train.queries) == 6298
    assert len(kept_back.held_out.queries) in (628, 629, 630)
    parts = [set(part.queries) for part in kept_back]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert len(kept_back.test.corpus) == len(kept_back.held_out.corpus) == 6998
    contexts = {rows[i]["context"] for i in order[:700]}
    assert sum(rows[i]["context"] in contexts for i in order[700:]) == 77


def test_the_steps_of_the_published_data(shared_data):
    """13 an epoch either way, of 512 pairs but for the last; nine rows are there twice."""
    dataset, num_rows = experiment.read_rows(shared_data / "finance_qa" / "Financial-QA-10k.csv")
    for keep_back, last_one, last_of_many in ((False, 145, 154), (True, 30, 36)):
        split = experiment.split_rows(dataset, num_rows, keep_back=keep_back)
        merged = experiment.merge_equal_texts(split.train)
        (one, many) = (
            make_batches(data, None, batch_size=size, seed=0, no_duplicates=size == 32).sampler.plan(0)
            for data, size in ((merged, 512), (split.train, 32))
        )
        assert [*map(len, one)] == [512] * (len(one) - 1) + [last_one]
        steps = [sum(map(len, many[first : first + 16])) for first in range(0, len(many), 16)]
        assert steps == [512] * (len(one) - 1) + [last_of_many]


def test_equal_texts_are_one_by_hand():
    rows = experiment.RetrievalDataset(
        {"q0": "a", "q1": "b", "q2": "a", "q3": "b"},
        {"d0": "x", "d1": "y", "d2": "z", "d3": "y"},
        {f"q{i}": {f"d{i}": 1} for i in range(4)},
    )
    assert experiment.merge_equal_texts(rows) == experiment.RetrievalDataset(
        {"q0": "a", "q1": "b"}, {"d0": "x", "d1": "y", "d2": "z"}, {"q0": {"d0": 1, "d2": 1}, "q1": {"d1": 1}}
    )


def test_dims_from_the_full_size_to_a_twelfth():
    assert matryoshka_dims(768) == [768, 512, 256, 128, 64]
    assert matryoshka_dims(384) == [384, 256, 128, 64, 32]
    assert [pick_dim(matryoshka_dims(size)) for size in (384, 768, 1024)] == [128, 128, 170]


def test_cut_vectors_are_those_of_the_embedder(tmp_path, monkeypatch):
    """One encoding, and the figures of one for each dimension."""
    embedder = make_embedder(tmp_path / "base")
    dataset, num_rows = experiment.read_rows(write_file(tmp_path))
    test = experiment.split_rows(dataset, num_rows, keep_back=False).test
    dims = matryoshka_dims(32)
    expected = {dim: evaluate(embedder, test, dim=dim).metrics["ndcg@10"] for dim in dims}
    texts, encode = [], embedder.encode
    monkeypatch.setattr(embedder, "encode", lambda given, **options: texts.append(given) or encode(given, **options))
    found = measure(embedder, test, dims, {})
    assert list(found) == dims
    assert found == pytest.approx(expected, abs=1e-9)
    # Equal texts are encoded once, so that they tie.
    assert [len(given) for given in texts] == [4, 38]  # of 4 questions and 39 contexts
    texts.clear()
    encoded = experiment.DistinctTexts(embedder)
    same = encoded.encode(["a b", "hello world the of what", "a b"], role="document", dim=32)
    assert texts == [["a b", "hello world the of what"]]
    assert np.array_equal(same[0], same[2])
    np.testing.assert_allclose(same, encode(["a b", "hello world the of what", "a b"]), atol=1e-6)


def test_the_same_weights_are_measured_once(tmp_path, monkeypatch):
    """Base for the table and for the run, epoch and result: two encodings of queries and documents, not four."""
    write_file(tmp_path)
    encoded = []
    encode = experiment.Embedder.encode
    monkeypatch.setattr(
        experiment.Embedder, "encode", lambda *given, **options: encoded.append(0) or encode(*given, **options)
    )
    main(make_options(tmp_path, batch=["true"], pick=["test"], seeds=[0], epochs=1))
    assert len(encoded) == 4


def test_format_dims_by_hand():
    dims = [768, 512, 256, 128, 64]
    base = dict(zip(dims, (0.5, 0.5, 0.5, 0.0, 0.4), strict=True))
    first, second = {**base, 768: 0.6}, {**base, 768: 0.7, 64: 0.5}
    lines = format_dims({"base": [base], "tuned": [first, second]}, dims).splitlines()
    assert [*lines[:3], *lines[5:]] == [
        "| dimension | published base | published tuned |   base |           tuned |   lift |",
        "|-----------|---------------:|----------------:|-------:|----------------:|-------:|",
        "| 768       |         0.7684 |          0.8254 | 0.5000 | 0.6500 ± 0.0707 | +30.0% |",
        "| 128       |         0.7234 |          0.8184 | 0.0000 | 0.0000 ± 0.0000 |        |",
        "| 64        |         0.6440 |          0.7892 | 0.4000 | 0.4500 ± 0.0707 | +12.5% |",
    ]


def test_a_run_from_end_to_end(tmp_path, capsys):
    """Both batches, both picks, two seeds; what is done is not trained again."""
    write_file(tmp_path)
    options = make_options(tmp_path)
    main(options)
    printed = capsys.readouterr().out
    for batch in ("accumulated", "true"):
        for pick in ("test", "held-out"):
            assert f"{batch}, picked on {pick}" in printed
    assert "over seeds 0, 1" in printed
    (runs,) = (tmp_path / "runs").iterdir()
    folders = {path.name: path for path in runs.iterdir()}
    assert len(folders) == 8
    steps = {}
    for name, folder in folders.items():
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        steps[name] = [line for line in lines if "loss" in line]
        # 35 pairs train, or 32 with some kept back, 12 a step: three steps per epoch; validated at the start and after
        # each.
        assert len(steps[name]) == 6, name
        assert len(lines) == 6 + 3
        picked = {line["step"]: line["metrics"]["ndcg@10 at 32"] for line in lines if "metrics" in line}
        assert set(picked) == {0, 3, 6}
        config = json.loads((folder / "config.json").read_text())
        assert (config["lr"], config["schedule"], config["warmup"]) == (2e-5, "cosine", 0.1)
        found = json.loads((folder / "eval" / "by_dim.json").read_text())
        assert list(found) == ["32", "21", "10", "5", "2"]
        if "held-out" not in name:
            assert found["32"] == pytest.approx(max(picked.values()), abs=1e-12)
    # As many pairs a step, other negatives.
    for a, b in zip(steps["accumulated-test-s0"], steps["true-test-s0"], strict=True):
        assert a["queries"] == b["queries"]
    assert steps["accumulated-test-s0"][0]["loss"] < steps["true-test-s0"][0]["loss"]
    assert sum(line["queries"] for line in steps["true-test-s0"]) == 2 * 35

    written = {name: (folder / "train.jsonl").stat().st_mtime_ns for name, folder in folders.items()}
    main(options)
    # All but the line of seconds and memory.
    assert capsys.readouterr().out.splitlines()[:-1] == printed.splitlines()[:-1]
    assert {name: (folder / "train.jsonl").stat().st_mtime_ns for name, folder in folders.items()} == written

    (tmp_path / "Financial-QA-10k.csv").unlink()
    write_file(tmp_path, 50)
    with pytest.raises(ValueError, match=naming(folders["accumulated-test-s0"], "another", "train", "SHA-256")):
        main(options)
    options.epochs = 1
    with pytest.raises(ValueError, match=naming(folders["accumulated-test-s0"], "another", "epochs", 2, ..., 1)):
        main(options)


def test_a_killed_run_is_resumed(tmp_path, monkeypatch):
    write_file(tmp_path)
    options = make_options(tmp_path, batch=["true"], pick=["test"], seeds=[0])
    main(options)
    (whole,) = (tmp_path / "runs").glob("*/true-test-s0/model/model.safetensors")
    options.out = str(tmp_path / "again")
    count = 0

    def killed(*arguments):
        nonlocal count
        count += 1
        if count == 4:  # base for the table, base and first epoch of the run, then the second epoch
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(experiment, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        main(options)
    monkeypatch.setattr(experiment, "measure", measure)
    (environment,) = (tmp_path / "again").glob("*/true-test-s0/environment.json")
    begun = environment.stat().st_mtime_ns
    main(options)
    assert environment.stat().st_mtime_ns == begun  # the same run
    (again,) = (tmp_path / "again").glob("*/true-test-s0/model/model.safetensors")
    assert again.read_bytes() == whole.read_bytes()


def test_base_only_trains_nothing(tmp_path, capsys):
    write_file(tmp_path)
    main(make_options(tmp_path, base_only=True))
    assert "| 32        |" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
