"""experiments/clean_lyft_uber.py on a few sentences and the tiny BERT; its tables against hand-worked numbers."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from embedft import Report, RetrievalDataset, evaluate_run
from embedft.corpus import cleaning
from embedft.corpus.cleaning import clean
from embedft.retrieval.run import Run
from experiments.clean_lyft_uber import (
    format_groups,
    format_reasons,
    format_training,
    main,
    select_queries,
)

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = {
    "good": "Who may vote at the meeting?",
    "other": "How long is the lease?",
    "source": "According to the document, who pays the drivers?",
    "quiz": "Which quiz is on leases?",
}
CORPUS = {"d1": "Holders of shares vote.", "d2": "The lease ends in 2031.", "d3": "Drivers are paid a fee of $5."}
QRELS = {"good": {"d1": 1}, "other": {"d2": 1}, "source": {"d3": 1}, "quiz": {"d2": 1}}
DATASET = RetrievalDataset(QUESTIONS, CORPUS, QRELS)
# The ranks of the relevant documents: 1, 2, none, 3.
RUN = Run.from_dict(
    {
        "good": {"d1": 3.0, "d2": 2.0},
        "other": {"d1": 3.0, "d2": 2.0},
        "source": {"d1": 3.0},
        "quiz": {"d1": 3.0, "d3": 2.0, "d2": 1.0},
    }
)


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: values for name, *values in rows}


def test_reasons():
    long = RetrievalDataset(
        {"long": f"{'Why ' * 60}does the document say {'so ' * 60}?", "good": "- Who pays?"}, CORPUS, {}
    )
    text = format_reasons(
        {"Lyft": cleaning.report(DATASET, *clean(DATASET)), "Uber": cleaning.report(long, *clean(long))}
    )
    assert cells(text) == {
        "questions": ["Lyft", "Uber"],
        "-" * 22: ["-" * 5 + ":", "-" * 5 + ":"],
        "all": ["4", "2"],
        "points at its source": ["1", "1"],
        "shows the prompt": ["1", "0"],
        "kept": ["2", "1"],
        "of them changed": ["0", "1"],
    }
    *_, first, second, third = text.splitlines()
    assert first == "- Lyft, points at its source: According to the document, who pays the drivers?"
    assert second == "- Lyft, shows the prompt: Which quiz is on leases?"
    assert third.startswith("- Uber, points at its source: ... ")
    assert third.endswith(" ...")
    assert "does the document say so" in third
    assert len(third) < 160


def test_groups():
    table = cells(format_groups(evaluate_run(RUN, DATASET), DATASET, *clean(DATASET)))
    # Reciprocal ranks 1, 1/2, 0, 1/3; ndcg 1, 1/log2(3), 0, 1/log2(4).
    assert table["all"] == ["4", "0.7500", f"{(1 + 1 / 2 + 1 / 3) / 4:.4f}", f"{(1 + 1 / np.log2(3) + 0.5) / 4:.4f}"]
    assert table["kept"] == ["2", "1.0000", "0.7500", f"{(1 + 1 / np.log2(3)) / 2:.4f}"]
    assert table["points at its source"] == ["1", "0.0000", "0.0000", "0.0000"]
    assert table["shows the prompt"] == ["1", "1.0000", "0.3333", "0.5000"]
    assert len(table) == 6


def report(**ranks: int) -> Report:
    """A report in which the relevant document of each query has the rank given."""
    results = {}
    for query_id, rank in ranks.items():
        (relevant,) = QRELS[query_id]
        ranking = sorted(CORPUS.keys() - {relevant})
        ranking.insert(rank - 1, relevant)
        results[query_id] = {document_id: -float(place) for place, document_id in enumerate(ranking)}
    return evaluate_run(Run.from_dict(results), DATASET)


def test_training():
    first, second = report(good=1, other=2, source=3, quiz=1), report(good=1, other=1, source=3, quiz=2)
    kept, _ = clean(DATASET)
    part = select_queries(second, kept)
    assert (part.query_ids, part.clusters) == (["good", "other"], ["d1", "d2"])
    assert part.metrics["mrr@10"] == pytest.approx(1)
    base = report(good=2, other=2, source=1, quiz=2)
    table = cells(format_training(base, [first, first], [first, second], kept))
    assert table["all, mrr@10"][:4] == ["0.6250", "0.7083", "0.7083", "+0.0000"]
    assert table["kept, mrr@10"][:4] == ["0.5000", "0.7500", "0.8750", "+0.1250"]
    assert len(table) == 8


def test_the_command(tmp_path, write_tiny, capsys, monkeypatch):
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    model = write_tiny(tmp_path / "model", max_position_embeddings=512)
    others = {"train_dataset.json": "train", "val_dataset.json": "val"}
    for name, prefix in others.items():
        RetrievalDataset(
            {f"{prefix}-{i}": text for i, text in QUESTIONS.items()},
            CORPUS,
            {f"{prefix}-{i}": d for i, d in QRELS.items()},
        ).save(tmp_path / name)
    options = Namespace(data=str(tmp_path), base=str(model), train=False, seeds=[3, 4], out=str(tmp_path / "runs"))

    def output(**changes) -> str:
        main(Namespace(**{**vars(options), **changes}))
        return capsys.readouterr().out

    plain = output()
    assert "| points at its source |" in plain
    assert "difference" not in plain
    assert {path.name for path in tmp_path.iterdir()} == {*others, "model"}
    trained = output(train=True)
    assert trained.startswith(plain)
    assert "all 4 or the 2 kept questions about Lyft" in " ".join(trained.split())
    assert "over seeds 3, 4" in trained
    (base,) = (tmp_path / "runs").iterdir()
    logs = sorted(base.glob("*/*/train.jsonl"))
    assert [log.parent.relative_to(base).as_posix() for log in logs] == ["all/s3", "all/s4", "cleaned/s3", "cleaned/s4"]
    table = cells(trained.partition("kept Lyft")[2])
    means = [
        np.mean([Report.load(base / name / seed / "eval" / "uber").metrics["ndcg@10"] for seed in ("s3", "s4")])
        for name in ("all", "cleaned")
    ]
    assert table["all, ndcg@10"][1:3] == [f"{mean:.4f}" for mean in means]
    written = [log.stat().st_mtime_ns for log in logs]
    assert output(train=True) == trained
    assert [log.stat().st_mtime_ns for log in logs] == written  # nothing was trained again

    command = [sys.executable, "-m", "experiments.clean_lyft_uber", "--data", str(tmp_path), "--base", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDFT_PROGRESS": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, plain), done.stderr
