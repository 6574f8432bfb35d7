"""Every command reads a .gz as it does the file inside, and what it saves as .gz is compressed."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import names
from tiny import make_dataset, make_embedder

from embedft import Report, RetrievalDataset
from embedft.cli import main
from embedft.commands.options import Data, load_texts
from embedft.corpus.chunks import Chunk, save_chunks
from embedft.files import read_json, write_jsonl


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a model, and data in every format, each as it is and compressed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    dataset = make_dataset(9, 9)
    for name in ("set.json", "set.jsonl", "set.jsonl.gz"):
        dataset.save(name)
    rows = (f"{dataset.queries[q]},{dataset.corpus[d]}\n" for q in dataset.queries for d in dataset.relevant(q))
    Path("set.csv").write_text("".join(["query,context\n", *rows]))
    Path("set.tsv").write_text(Path("set.csv").read_text().replace(",", "\t"))
    for name in ("set.json", "set.csv", "set.tsv"):
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    return tmp_path


def run(*words: str) -> None:
    assert main(list(words)) == 0


@pytest.mark.parametrize("name", ["set.json", "set.jsonl", "set.csv", "set.tsv"])
def test_evaluate(name):
    for file in (name, f"{name}.gz"):
        run("evaluate", "model", file, "--out", f"eval/{file}")
    plain, packed = (Report.load(f"eval/{file}") for file in (name, f"{name}.gz"))
    assert packed.setting == plain.setting
    assert packed.metrics == plain.metrics


def test_training(capsys):
    """Also with the name that --validation and DATA get from their files."""
    options = ["--epochs", "1", "--batch-size", "4", "--validation"]
    for end in ("", ".gz"):
        run("finetune", "model", f"set.jsonl{end}", "--out", f"run{end}", *options, f"set.json{end}")
        run("adapter", "model", f"set.csv{end}", "--out", f"adapter{end}", "--epochs", "1")
    plain, packed = (read_json(f"run{end}/environment.json")["sha256"] for end in ("", ".gz"))
    assert packed == plain
    assert Path("adapter.gz/adapter.json").read_bytes() == Path("adapter/adapter.json").read_bytes()
    assert main(["finetune", "model", "set.jsonl.gz", "set.csv.gz", "--out", "both"]) == 2
    assert names(capsys.readouterr().err, "set.jsonl.gz", "set.csv.gz", "'set'")


def test_mine(capsys):
    words = ["mine", "model", "set.tsv.gz", "--ranks", "1", "5", "--out"]
    for out in ("mined.jsonl", "mined.jsonl.gz"):
        run(*words, out)
    assert gzip.decompress(Path("mined.jsonl.gz").read_bytes()) == Path("mined.jsonl").read_bytes()
    assert RetrievalDataset.load("mined.jsonl.gz").negatives
    assert main([*words, "mined.json.gz"]) == 2
    assert names(capsys.readouterr().err, "--out", "mined.json.gz", ".jsonl.gz")


def test_encode():
    texts = list(make_dataset().corpus.values())
    for file in ("texts.jsonl", "texts.jsonl.gz"):
        write_jsonl(file, ({"text": text} for text in texts))
    Path("texts.txt.gz").write_bytes(gzip.compress("".join(f"{text}\n" for text in texts).encode()))
    for file in ("texts.jsonl", "texts.jsonl.gz", "texts.txt.gz"):
        run("encode", "model", file, "--out", f"{file}.npy")
    expected = np.load("texts.jsonl.npy")
    assert len(expected) == len(texts)
    for file in ("texts.jsonl.gz", "texts.txt.gz"):
        np.testing.assert_array_equal(np.load(f"{file}.npy"), expected)
        assert load_texts(file, Data()) == load_texts("texts.jsonl", Data())  # of `finetune --examples texts`


def test_chunks(capsys):
    sentence = "The annual meeting of number {} takes place in the town of number {} on day {} of the month."
    chunks = [Chunk(f"c{i}", " ".join(sentence.format(i, j, i + j) for j in range(4))) for i in range(6)]
    save_chunks("plain/train.jsonl", chunks)
    save_chunks("packed/train.jsonl.gz", chunks)
    found = {}
    for data in ("plain", "packed", "packed/train.jsonl.gz"):
        run("search", "model", data, "a b c")
        run("questions", data, "--method", "ict", "--out", f"questions/{data}")
        found[data] = capsys.readouterr().out.replace(data, "DATA"), read_json(f"questions/{data}/train.json")
    assert found["packed"] == found["packed/train.jsonl.gz"] == found["plain"]
    assert main(["finetune", "model", "packed", "--out", "run"]) == 2
    assert names(capsys.readouterr().err, "packed", "chunks", "`embedft questions`")
