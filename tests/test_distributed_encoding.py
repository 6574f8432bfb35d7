"""Two ranks encode, evaluate and validate as one process does, bit for bit; shares of a store; README's script."""

import io
import itertools
import json
import os
import re
import runpy
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from naming import names
from ranks import run_ranks
from test_distributed import call_commands, fits, free_ports, rank
from tiny import make_dataset, make_embedder

from embedft import Embedder, FinetuneConfig, finetune, load_embedder
from embedft import device as devices
from embedft.cli import main
from embedft.commands import encode
from embedft.encoders.store import Store
from embedft.files import read_json
from embedft.training import distributed
from embedft.training.distributed import OtherRankError, encoding_together

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
TEXTS = list(make_dataset(2, 40).corpus.values())


def counted(embedder: Embedder) -> list[int]:
    """Grows by the number of texts of each batch that this process encodes."""
    found, vectors_of = [], embedder.vectors_of

    def counting(batch):
        found.append(len(batch[0]))
        return vectors_of(batch)

    embedder.vectors_of = counting
    return found


def test_an_interrupt_is_told_too(monkeypatch):
    """The other ranks, which wait for the vectors, go on and leave their loop."""
    told = []
    monkeypatch.setattr(distributed, "rank_and_size", lambda: (1, 2))
    monkeypatch.setattr(distributed.dist, "gather_object", lambda value, found, dst: told.append(value))

    def interrupted(item):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distributed._gathered(interrupted, [1])
    assert told == ["interrupted"]


def encode_everything(embedder: Embedder, store: Path) -> list[np.ndarray]:
    """Whole texts in many batches and in one, no text, windows, and a store that has some of the texts."""
    found = [embedder.encode(TEXTS, batch_tokens=30), embedder.encode(TEXTS[:3], role="query"), embedder.encode([])]
    found += embedder.encode_passages(TEXTS[:9], (6, 3), batch_tokens=20)
    embedder.store = Store(store)
    found += [embedder.encode(texts, batch_tokens=30) for texts in (TEXTS[:7], TEXTS)]
    embedder.store = None
    return found


def encode_on_each(base: Path, store: Path):
    embedder = make_embedder(base)
    batches = counted(embedder)
    found = encoding_together(embedder, lambda: encode_everything(embedder, store) if rank() == 0 else 1 / 0)
    assert embedder.map_batches is devices.fetched
    assert not any(part.training for part in embedder.modules())
    return found, batches


def test_two_ranks_encode_what_one_does(tmp_path):
    """Both get rank 0's results; each encodes about half of the batches; only rank 0 opens the store."""
    one = make_embedder(tmp_path / "base")
    batches = counted(one)
    expected = encode_everything(one, tmp_path / "store-of-one")
    (first, of_first), (second, of_second) = run_ranks(
        2, encode_on_each, tmp_path / "base", tmp_path / "store", folder=tmp_path
    )
    for found in (first, second):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sorted(of_first + of_second) == sorted(batches)
    assert abs(len(of_first) - len(of_second)) <= 5  # calls of `encode` with an odd number of batches


def fail_on_each(base: Path):
    """What each rank gets where rank 1, rank 0 or the consumer fails, and that all can go on afterwards."""
    embedder, found = make_embedder(base), {}
    vectors_of = embedder.vectors_of

    def attempt(name, compute, batch_fails_on=None):
        def failing(batch):
            if rank() == batch_fails_on:
                raise RuntimeError("out of memory")
            return vectors_of(batch)

        embedder.vectors_of = failing
        try:
            found[name] = encoding_together(embedder, compute)
        except (RuntimeError, ValueError) as error:
            found[name] = type(error), str(error)
        embedder.vectors_of = vectors_of

    def encode():
        return embedder.encode(TEXTS, batch_tokens=20).shape

    attempt("rank 1", encode, 1)
    attempt("rank 0", encode, 0)
    attempt("compute", lambda: (encode(), int("x")))
    weight = next(embedder.encoder.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += float("nan")
    attempt("not finite", encode)
    with torch.no_grad():
        weight.copy_(kept)
    attempt("afterwards", encode)
    found["no embedder"] = encoding_together(torch.nn.Identity(), lambda: rank() + 5)
    return found


def test_errors_reach_both_ranks(tmp_path):
    make_embedder(tmp_path / "base")
    first, second = run_ranks(2, fail_on_each, tmp_path / "base", folder=tmp_path)
    assert fits(first["rank 1"], OtherRankError, "rank", 1, "memory")
    assert first["rank 0"] == (RuntimeError, "out of memory")
    assert fits(first["compute"], ValueError, "int()", "'x'")
    assert first["not finite"][0] is ValueError
    assert "finite" in first["not finite"][1]
    for name in ("rank 1", "rank 0", "compute", "not finite"):
        assert fits(second[name], OtherRankError, "rank", 0)
    for found in (first, second):
        assert found["afterwards"] == (len(TEXTS), 32)
        assert found["no embedder"] == 5


def validate_on_each(base: Path, out: Path):
    """Reports before and after training, validations, mining: everything of `finetune` that rank 0 encodes."""
    embedder, dataset = make_embedder(base, dropout=0.0), make_dataset(12, 12)
    batches = counted(embedder)
    config = FinetuneConfig(epochs=1, batch_size=5, num_negatives=1, mine_every=1, mine_ranks=[2, 6], max_length=30)
    with mock.patch.object(devices, "batch_tokens", return_value=40):
        finetune(embedder, dataset, config, validation=make_dataset(seed=1), out=out)
    return sum(batches)


@pytest.mark.slow
def test_validation_is_shared(tmp_path):
    """As many texts as one process encodes, and both ranks have a part; the base's report is the same."""
    make_embedder(tmp_path / "base", dropout=0.0)
    one = validate_on_each(tmp_path / "base", tmp_path / "one")
    first, second = run_ranks(2, validate_on_each, tmp_path / "base", tmp_path / "two", folder=tmp_path)
    assert first + second == one
    assert min(first, second) > 0
    reports = [read_json(tmp_path / out / "eval" / "validation-base" / "metrics.json") for out in ("one", "two")]
    assert reports[0]["metrics"] == reports[1]["metrics"]


def test_the_command_evaluates_on_two_ranks(tmp_path, monkeypatch, capsys):
    """Reports, output and errors of one process; the other rank is silent and does not read the data."""
    make_embedder(tmp_path / "model", dropout=0.0)
    make_dataset().save(tmp_path / "pairs.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    evaluate = ["evaluate", "model", "pairs.json", "--device", "cpu", "--json", "--passages", "6", "3"]
    wrong = ["evaluate", "model", "pairs.json", "--metrics", "ndcg@0"]
    commands = [[*evaluate, "--out", "two"], [*evaluate, "--out", "two"], wrong]
    first, second = run_ranks(2, call_commands, tmp_path, free_ports(3), commands, folder=tmp_path, grouped=False)
    assert main([*evaluate, "--out", "one"]) == 0
    assert first[0][:2] == (0, capsys.readouterr().out)
    assert second == [(0, "", ""), (2, "", ""), (2, "", "")]
    assert first[1][0] == first[2][0] == 2
    assert names(first[1][2], "two", "overwrite")
    assert names(first[2][2], "ndcg@0")
    for name in ("run.trec", "per_query.jsonl", "bm25/run.trec"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def run_script(folder: Path, script: str, port: int) -> None:
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), EMBEDFT_PROGRESS="0")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        runpy.run_path(script)


@pytest.mark.slow
def test_the_script_of_the_readme(tmp_path):
    """README.md's script for several devices, as torchrun starts it."""
    (script,) = re.findall(r"```python\n(# devices\.py\n.*?)```", README, flags=re.DOTALL)
    model = "sentence-transformers/all-MiniLM-L6-v2"
    assert model in script
    base = make_embedder(tmp_path / "model", dropout=0.0)
    dataset = make_dataset(4, 4)
    rows = [f"{dataset.queries[q]},{dataset.corpus[d]}" for q, grades in dataset.qrels.items() for d in grades]
    (tmp_path / "train.csv").write_text("\n".join(["question,context", *rows]) + "\n")
    (tmp_path / "devices.py").write_text(script.replace(model, "model"))
    (port,) = free_ports(1)
    run_ranks(2, run_script, tmp_path, "devices.py", port, folder=tmp_path, grouped=False)
    tuned = load_embedder(tmp_path / "runs" / "devices" / "model", device="cpu")
    assert np.abs(tuned.encode(TEXTS) - base.encode(TEXTS)).max() > 1e-5
    assert json.loads((tmp_path / "runs" / "devices" / "config.json").read_text())["epochs"] == 2


# Shares of one store.

ENCODE = ["encode", "model", "texts.txt", "--device", "cpu"]


def write_texts(folder: Path) -> list[str]:
    """60 lines, 40 distinct."""
    make_embedder(folder / "model")
    texts = [*TEXTS, *TEXTS[:20]]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    assert len(set(texts)) == 40
    return texts


def die_in_the_third_slice(folder: Path) -> None:
    """Both ranks at once, so that neither sees the other leave."""
    calls, vectors_of = itertools.count(), Embedder.vectors_of

    def dying(self, batch):
        if next(calls) == 2:
            (folder / f"reached-{rank()}").touch()
            while len(list(folder.glob("reached-*"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return vectors_of(self, batch)

    Embedder.vectors_of = dying


def encode_shares(folder: Path, ports: list[int], commands: list[list[str]], dies: bool):
    encode.SLICE_TEXTS = 5
    if dies:
        die_in_the_third_slice(folder)
    return call_commands(folder, ports, commands)


@pytest.mark.slow
def test_a_killed_encoding_computes_only_the_rest(tmp_path, monkeypatch):
    """Both ranks die in their third slice of 5 texts: 20 are stored, and the second run computes the other 20."""
    texts, store, place = write_texts(tmp_path), ["--store", "store"], {"folder": tmp_path, "grouped": False}
    commands = [[*ENCODE, *store]]
    assert run_ranks(2, encode_shares, tmp_path, free_ports(1), commands, True, **place) == [None, None]
    (stored,) = Store(tmp_path / "store").spaces().values()
    assert stored.num_texts == 20
    commands += [
        [*ENCODE, *store, "--out", "two.npy"],
        [*ENCODE, "--out", "alone.npy"],
        [*ENCODE, *store, "--shard", "1/2"],
    ]
    first, second = run_ranks(2, encode_shares, tmp_path, free_ports(4), commands, False, **place)
    assert second == [(0, "", "")] * 3 + [(2, "", "")]
    assert [code for code, _, _ in first] == [0, 0, 0, 2]
    assert names(first[0][2], "store", 20, "found", 20, "computed")
    assert names(first[1][2], "store", 40, "found", 0, "computed")
    assert names(first[1][1], "two.npy", 60)
    assert names(first[3][2], "shard", "1/2", "torchrun")
    expected = load_embedder(tmp_path / "model", device="cpu").encode(texts)
    for name in ("two.npy", "alone.npy"):
        assert np.array_equal(np.load(tmp_path / name), expected)
    monkeypatch.chdir(tmp_path)
    (stored,) = Store("store").spaces().values()
    assert stored.num_texts == 40
    assert main(["store", "store", "--verify"]) == 0


def test_shards_without_torchrun(tmp_path, monkeypatch, capsys):
    """Three shares together have every text once; what each computes does not depend on the others."""
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    computed = []
    for number in (3, 1, 2):
        assert main([*ENCODE, "--store", "store", "--shard", f"{number}/3"]) == 0
        computed.append(int(re.search(r"(\d+) computed", capsys.readouterr().err)[1]))
    assert sum(computed) == 40
    assert min(computed) > 5
    assert main([*ENCODE, "--store", "store"]) == 0
    assert names(capsys.readouterr().err, "store", 40, "found", 0, "computed")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--store", "s", "--shard", "0/2"], ("shard", "0/2")),
        (["--store", "s", "--shard", "3/2"], ("shard", "3/2")),
        (["--store", "s", "--shard", "half"], ("shard", "half")),
        (["--out", "v.npy", "--shard", "1/2"], ("shard", "out")),
        (["--out", "v.npy", "--store", "s", "--shard", "1/2"], ("shard", "out")),
    ],
)
def test_what_is_no_shard(options, facts, capsys):
    assert main([*ENCODE, *options]) == 2
    assert names(capsys.readouterr().err, *facts)
