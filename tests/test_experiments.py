"""experiments/ and benchmarks/, run as a user runs them, on a few real sentences with the packaged MiniLM."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from api_server import ApiServer
from naming import names, naming

from benchmarks.workers import Worker, alternate, ratios, spread
from embedft import RetrievalDataset, bm25_run, evaluate, evaluate_run, fuse, load_embedder
from embedft.progress import progress_bar
from experiments.commandline import BASE
from experiments.repro_10k_pages import first_and_rest
from experiments.sources import find_data

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [
    ("Who may vote at the annual meeting?", "Holders of Class A shares on the record date are entitled to vote."),
    ("How long is the lease of the depot?", "The depot is let until 2031, with an option for five more years."),
    ("What did the company pay its drivers?", "Driver incentives amounted to 41 million dollars in the quarter."),
    (
        "Why did insurance costs rise?",
        "Claims from earlier periods were settled above the reserves set aside.",
    ),
    ("Which cities saw the most rides?", "Demand was highest in San Francisco, New York and Chicago."),
    ("Is the auditor independent?", "The audit committee confirmed that the firm meets the rules on independence."),
    ("When does the credit line end?", "The revolving facility matures on November 3, 2024."),
    ("Who owns the patents?", "All patents are held by a wholly owned subsidiary in Delaware."),
    ("What happens to unpaid dividends?", "Dividends not claimed within six years go back to the treasury."),
    ("How many people work there?", "At the end of the year 4,453 employees worked in eleven countries."),
]


WORDS = ("salary", "lease", "tax", "bonus", "fee", "toll", "rent", "fine", "loan", "grant", "dividend", "refund")


def run(module: str, *options: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDFT_PROGRESS": "0"}
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_quickstart_on_ones_own_data(tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "context"), *PAIRS])
    done = run("experiments.quickstart", "--data", "pairs.csv", "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["num_train"], report["num_held_out"]) == (8, 2)
    (ndcg,) = (row for row in report["metrics"] if row["metric"] == "ndcg@10")
    assert f"| ndcg@10     | {ndcg['before']:.4f} | {ndcg['after']:.4f} |" in done.stdout
    assert ndcg["difference"] == pytest.approx(ndcg["after"] - ndcg["before"], abs=1e-12)
    assert (tmp_path / "out" / "DONE").is_file()
    assert load_embedder(tmp_path / "out" / "model").max_length == 128
    again = run("experiments.quickstart", "--data", "pairs.csv", "--out", "out", folder=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")  # before any work
    assert names(again.stderr, "experiments.quickstart", "out", "done", "--out", "--overwrite")
    assert again.stderr.count("\n") == 1
    # Killed before its report was written: the model is measured again, and nothing is trained.
    (tmp_path / "out" / "report.json").unlink()
    written = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
    assert run("experiments.quickstart", "--data", "pairs.csv", "--out", "out", folder=tmp_path).returncode == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == report["metrics"]
    assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == written
    # Killed while it trained: resumed. The last checkpoint went with the end of the run, so this one starts over.
    for name in ("DONE", "report.json"):
        (tmp_path / "out" / name).unlink()
    assert run("experiments.quickstart", "--data", "pairs.csv", "--out", "out", folder=tmp_path).returncode == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == report["metrics"]


def write_lyft_uber(folder: Path, train: list, held_out: list) -> None:
    """Pairs of question and context in place of Lyft's and Uber's."""
    for name, pairs in (("train_dataset.json", train), ("val_dataset.json", held_out)):
        queries = {f"q{i}": question for i, (question, _) in enumerate(pairs)}
        corpus = {f"d{i}": context for i, (_, context) in enumerate(pairs)}
        RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(len(pairs))}).save(folder / name)


@pytest.mark.slow
def test_the_lyft_uber_reproduction(tmp_path):
    write_lyft_uber(tmp_path, PAIRS[:6], PAIRS[6:])
    options = ("--data", str(tmp_path), "--seeds", "3", "4", "--out", "runs")
    done = run("experiments.repro_finetune_lyft_uber", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| hit_rate@5 " in done.stdout
    assert "over seeds 3, 4" in done.stdout
    log = tmp_path / "runs" / "sentence-transformers--all-MiniLM-L6-v2" / "s3" / "train.jsonl"
    written = log.stat().st_mtime_ns
    assert run("experiments.repro_finetune_lyft_uber", *options, folder=tmp_path).stdout == done.stdout
    assert log.stat().st_mtime_ns == written  # nothing was trained again


@pytest.mark.slow
def test_the_best_recipe_for_lyft_and_uber(tmp_path):
    write_lyft_uber(tmp_path, PAIRS[:6], PAIRS)
    options = ("--data", str(tmp_path), "--seeds", "3", "4", "--out", "runs", "--forgetting", "lyft=train_dataset.json")
    done = run("experiments.lyft_uber_best", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found, forgotten = done.stdout.split("\n\n")[:2]
    rows = {cells[1].strip(): cells[2:] for line in found.splitlines() if len(cells := line.split("|")) > 2}
    place = tmp_path / "runs" / "sentence-transformers--all-MiniLM-L6-v2"
    uber = RetrievalDataset.load(tmp_path / "val_dataset.json")
    models = [load_embedder(place / name) for name in ("s3/model", "s4/model", "mean")]
    for name, weight in models[2].state_dict().items():
        torch.testing.assert_close(weight, (models[0].state_dict()[name] + models[1].state_dict()[name]) / 2)
    report = evaluate(models[2], uber, passages=(128, 64, 64, 32))
    assert rows["mean of weights"][1].strip() == f"{report.metrics['mrr@10']:.4f}"
    bm25 = bm25_run(uber, tokenize=models[2].tokenize, ngram=2)
    fused = evaluate_run(fuse([bm25, report.run], method="zscore", weights=(0.5, 0.5)), uber)
    assert rows["mean of weights, fused"][1].strip() == f"{fused.metrics['mrr@10']:.4f}"
    lyft = RetrievalDataset.load(tmp_path / "train_dataset.json")
    models[2].max_length = 256
    means = [evaluate(model, lyft).metrics["ndcg@10"] for model in (load_embedder(BASE), models[2])]
    assert f"{means[1]:.4f} ({means[1] / means[0] - 1:+.1%})" in forgotten
    written = (place / "s3" / "train.jsonl").stat().st_mtime_ns
    assert run("experiments.lyft_uber_best", *options, folder=tmp_path).stdout == done.stdout
    assert (place / "s3" / "train.jsonl").stat().st_mtime_ns == written  # nothing was trained again


@pytest.mark.slow
def test_lora_beside_full_fine_tuning(tmp_path):
    write_lyft_uber(tmp_path, PAIRS, PAIRS)
    options = ("--data", str(tmp_path), "--seeds", "0", "--out", "runs")
    done = run("experiments.lora_lyft_uber", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("|")) > 2}
    assert {"base", "full", "LoRA", "LoRA, queries"} <= rows.keys()
    assert [rows[name][8].strip() for name in ("full", "LoRA", "LoRA, queries")] == ["22,565,376", "331,776", "331,776"]


def write_filing(folder: Path) -> None:
    """Twelve pages of five sentences each, which share no words but the commonest."""
    pages = []
    for page in range(12):
        names = [f"{WORDS[(5 * page + i) % len(WORDS)]}{page}" for i in range(5)]
        pages.append(" ".join(f"The {name} of the firm was paid to its {name} partners in cash." for name in names))
    (folder / "filing.txt").write_text("\f".join(pages))


@pytest.mark.slow
def test_quickstart_on_documents(tmp_path):
    write_filing(tmp_path)
    done = run("experiments.quickstart", "--pdf", "filing.txt", "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"] == ["filing.txt"]
    assert report["num_train"] > report["num_held_out"] > 0
    done = run("experiments.quickstart", "--pdf", "filing.txt", "--data", "x.csv", folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_one_filing_without_a_key(tmp_path):
    write_lyft_uber(tmp_path, PAIRS, PAIRS)
    options = ("--data", str(tmp_path), "--seeds", "0", "--train-chunks", "6")
    done = run("experiments.repro_10k_pages", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training  RetrievalDataset(6 queries, 6 documents" in done.stdout
    assert "held out  RetrievalDataset(4 queries, 4 documents" in done.stdout
    assert "| hit_rate@5 " in done.stdout
    first, rest = first_and_rest(RetrievalDataset.load(tmp_path / "train_dataset.json"), 6)
    assert (list(first.corpus), list(rest.queries)) == ([f"d{i}" for i in range(6)], [f"q{i}" for i in range(6, 10)])


@pytest.mark.slow
def test_one_filing_and_a_server(tmp_path, monkeypatch):
    write_filing(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    fault = "refusal"
    with ApiServer(faults=lambda prompt, attempt: fault if "cash" in prompt and attempt <= 6 else None) as server:
        options = ("--pdf", "filing.txt", "--train-pages", "1-8", "--url", server.base_url, "--seeds", "0")
        options += ("--embedding-model", "vectors", "--embedding-url", server.base_url)
        refused = run("experiments.repro_10k_pages", *options, folder=tmp_path)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert names(refused.stderr, 8, "chunks", "no", "questions")
        fault = None
        done = run("experiments.repro_10k_pages", *options, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        again = run("experiments.repro_10k_pages", *options, folder=tmp_path)
        assert again.stdout == done.stdout
        assert server.counts["ok"] == 12 + 2  # a request per chunk; the embeddings of queries and of documents, once
    assert "training  RetrievalDataset(16 queries, 8 documents" in done.stdout
    assert "held out  RetrievalDataset(8 queries, 4 documents" in done.stdout
    assert "| filing " in done.stdout
    assert "| vectors |" in done.stdout


def test_data_that_is_not_there(tmp_path):
    (tmp_path / "train_dataset.json").touch()
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "val_dataset.json", "https://github.com", "--data")):
        find_data("lyft_uber", str(tmp_path))


class Sleeper:
    """A contestant whose work takes a known time."""

    def __init__(self, seconds: float):
        self.seconds, self.calls = seconds, 0

    def work(self) -> None:
        time.sleep(self.seconds)
        self.calls += 1

    def count(self) -> int:
        return self.calls

    def fail(self) -> None:
        raise ValueError("refused")

    def shows_bars(self) -> bool:
        return not progress_bar(1, "inside", unit="step").disable


def test_workers_take_turns(monkeypatch, capsys):
    monkeypatch.setenv("EMBEDFT_PROGRESS", "1")
    workers = {"slow": Worker(Sleeper, 0.2), "fast": Worker(Sleeper, 0.0)}
    seconds = alternate(workers, "work", rounds=3, warmup=1)
    assert [worker.call("count") for worker in workers.values()] == [4, 4]
    assert len(seconds["slow"]) == len(seconds["fast"]) == 3
    assert min(seconds["slow"]) >= 0.2
    assert names(capsys.readouterr().err, "work", "4/4", "round")
    assert not workers["slow"].call("shows_bars")
    with pytest.raises(ValueError, match=naming("refused")):
        workers["slow"].call("fail")
    assert workers["fast"].peak_bytes > 1 << 20
    for worker in workers.values():
        worker.close()
        assert worker.process.exitcode == 0


def test_ratios_and_spread():
    assert ratios([6.0, 9.0], [2.0, 3.0]) == [3.0, 3.0]
    assert spread([3.0, 1.0, 2.0]) == "2.00 [1.00, 3.00]"
