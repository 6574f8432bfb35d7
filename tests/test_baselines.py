"""experiments/baselines_lyft_uber.py: its tables by hand, and all of it with the tiny BERT against its parts."""

import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import LETTERS
from naming import naming

from embedft import Report, RetrievalDataset, bm25_run, compare, evaluate, evaluate_run, fuse, load_embedder
from embedft.retrieval.run import Run
from experiments.baselines_lyft_uber import METRICS, choose_weight, format_differences, format_values, main

ROOT = Path(__file__).resolve().parents[1]
NUM_DOCUMENTS = 8


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: values for name, *values in rows if not name.startswith("-")}


def report(*ranks: int) -> Report:
    """A report in which the document of question i has rank ranks[i]."""
    results = {}
    for i, rank in enumerate(ranks):
        ranking = [f"d{j}" for j in range(NUM_DOCUMENTS) if j != i]
        ranking.insert(rank - 1, f"d{i}")
        results[f"q{i}"] = {document_id: -float(place) for place, document_id in enumerate(ranking)}
    return evaluate_run(Run.from_dict(results), {f"q{i}": {f"d{i}": 1} for i in range(len(ranks))})


# The tables by hand.


def test_values():
    # Ranks 1, 2, 6 and 8: two of four in the first five, one first; 1/1 + 1/2 + 1/6 + 1/8 = 43/24, over four 0.4479;
    # 1/log2 of 2, 3, 7 and 9: 1 + 0.6309 + 0.3562 + 0.3155 = 2.3026, over four 0.5757.
    table = cells(format_values({"mine": [report(1, 2, 6, 8)]}))
    assert table == {
        "Uber": ["hit_rate@5", "accuracy@1", "mrr@10", "ndcg@10", "map@100"],
        "text-embedding-ada-002, published": ["0.8709", "", "", "", ""],
        "bge-small-en, published": ["0.7873", "0.5089", "", "", "0.6155"],
        "mine": ["0.5000", "0.2500", "0.4479", "0.5757", "0.4479"],
    }


def test_differences():
    base = report(*[2] * NUM_DOCUMENTS)
    # All from 1/2 to 1: no other sample is as far from 0 but the one with every sign flipped, 2 of 2^8 = 0.0078. The
    # other row has no difference. Holm: twice the smaller p; the larger as it is.
    first = report(*[1] * NUM_DOCUMENTS)
    table = cells(format_differences({"base": [base], "all first": [first], "the same": [base]}))
    assert table["difference from base"] == ["hit_rate@5", "95% interval", "p", "mrr@10", "95% interval", "p"]
    assert table["the same"] == ["+0.0000", "[+0.0000, +0.0000]", "1.0000"] * 2
    single = compare(base, first, metric="mrr@10")
    assert single.p_value == pytest.approx(2 / 2**8, abs=0.004)
    assert len(table) == 3
    assert table["all first"] == [
        *("+0.0000", "[+0.0000, +0.0000]", "1.0000"),  # all among the first five before
        *("+0.5000", "[+0.5000, +0.5000]", f"{2 * single.p_value:.4f}"),
    ]


# The weight of two runs.


def test_choose_weight_by_hand():
    # q1's answer a leads in the first run, q2's answer d in the second; in the other run each is the last of two.
    # z is 1 and -1, so the answer of q1 has w - (1 - w) = 2w - 1 and the other one 1 - 2w: q1 wants w > 1/2, and at
    # 1/2 the tie goes to the smaller id, a. q2 wants w < 1/2, and at 1/2 its answer d loses to c.
    first = Run.from_dict({"q1": {"a": 2.0, "b": 1.0}, "q2": {"c": 2.0, "d": 1.0}})
    second = Run.from_dict({"q1": {"b": 2.0, "a": 1.0}, "q2": {"d": 2.0, "c": 1.0}})
    # All of 0.5 to 1 are right for q1 alone: the nearest to one half.
    assert choose_weight([first, second], {"q1": {"a": 1}}) == (0.5, 0.5)
    # All below one half for q2 alone.
    assert choose_weight([first, second], {"q2": {"d": 1}}) == (0.4, 0.6)
    # For both all are equally good: one of the two is right.
    assert choose_weight([first, second], {"q1": {"a": 1}, "q2": {"d": 1}}) == (0.5, 0.5)


def test_choose_weight_fuses_as_deep_as_the_metric_looks():
    first = Run.from_dict({"q": {"x": 4.0, "y": 3.0, "z": 2.0, "a": 1.0}})  # 1/4
    second = Run.from_dict({"q": {"x": 5.0, "y": 4.0, "z": 3.0, "v": 2.0, "a": 1.0}})  # 1/5
    for metric in ("mrr@10", "map"):  # v, lowest in the first run as a is, is ahead of a unless the second counts for 0
        assert choose_weight([first, second], {"q": {"a": 1}}, metric=metric) == (1.0, 0.0)
    assert choose_weight([first, second], {"q": {"a": 1}}, metric="mrr@3") == (0.5, 0.5)


@pytest.mark.parametrize("metric", ["mrr@10", "ndcg@3", "map", "hit_rate@1"])
def test_choose_weight_finds_the_best(metric):
    rng = np.random.default_rng(3)
    queries, documents = [f"q{i}" for i in range(60)], [f"d{j}" for j in range(20)]
    qrels = {query: {documents[i % 20]: 1} for i, query in enumerate(queries)}

    def noisy(noise, kept):
        rows = {}
        for i, query in enumerate(queries[:kept]):
            scores = rng.standard_normal(20) * noise + (np.arange(20) == i % 20)
            rows[query] = dict(zip(documents, scores.tolist(), strict=True))
        return Run.from_dict(rows)

    runs = [noisy(0.7, 60), noisy(0.8, 50)]
    w, other = choose_weight(runs, qrels, metric=metric)
    assert other == pytest.approx(1 - w, abs=1e-12)
    name = {"map": "map@20"}.get(metric, metric)
    means = {}
    for i in range(11):
        weights = (i / 10, 1 - i / 10)
        report = evaluate_run(fuse(runs, method="zscore", weights=weights), qrels, ks=(1, 3, 10), depth=20)
        means[i / 10] = report.metrics[name]
    best = max(means.values())
    assert means[w] == pytest.approx(best, abs=1e-12)
    assert abs(w - 0.5) == min(abs(i - 0.5) for i, mean in means.items() if mean > best - 1e-12)
    assert min(means.values()) < best - 1e-6


def test_a_question_that_no_run_has_makes_no_difference():
    run = Run.from_dict({"q1": {"a": 1.0}})
    assert choose_weight([run, run], {"q1": {"a": 1}, "q2": {"a": 1}}) == (0.5, 0.5)
    with pytest.raises(ValueError, match=naming(1, "queries", "relevant")):
        choose_weight([run, run], {"q1": {"a": 0}})


@pytest.mark.parametrize(
    ("number", "options", "facts"),
    [
        (1, {}, ("fusion", "weights", [0.0, 1.0], 1, "runs")),
        (3, {}, ("fusion", "weights", [0.0, 1.0], 3, "runs")),
        (2, {"metric": "f1@3"}, ("metric", "'f1@3'", "hit_rate", "judged")),
    ],
)
def test_choose_weight_refuses(number, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        choose_weight([Run.from_dict({"q": {"a": 1.0}})] * number, {"q": {"a": 1}}, **options)


# All of it.


def write_datasets(folder: Path) -> list[RetrievalDataset]:
    """Long documents and words of theirs as questions; over Uber a question is relevant to another's document."""
    generator, datasets = random.Random(1), []
    for name, shift in (("train_dataset.json", 0), ("val_dataset.json", 3)):
        # Two letters are one word and two tokens.
        corpus = {
            f"d{j}": " ".join("".join(generator.choices(LETTERS[: 6 + j], k=2)) for _ in range(80 + 20 * j))
            for j in range(10)
        }
        queries, qrels = {}, {}
        for i in range(20):
            queries[f"q{i}"] = f"{' '.join(generator.sample(corpus[f'd{i % 10}'].split(), 4))} {LETTERS[5 + i % 10]}"
            qrels[f"q{i}"] = {f"d{(i + shift) % 10}": 1}
        datasets.append(RetrievalDataset(queries, corpus, qrels))
        datasets[-1].save(folder / name)
    return datasets


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_command(tmp_path, write_tiny, capsys, monkeypatch):
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    lyft, uber = write_datasets(tmp_path)
    base, other = (
        str(write_tiny(tmp_path / name, max_position_embeddings=512, seed=seed))
        for name, seed in (("base", 0), ("other", 1))
    )
    options = Namespace(data=str(tmp_path), base=base, tuned=[], store=str(tmp_path / "vectors"))

    def output(**changes) -> str:
        main(Namespace(**{**vars(options), **changes}))
        return capsys.readouterr().out

    text = output()
    embedder = load_embedder(base, max_length=512)
    tokens = [bm25_run(dataset, tokenize=embedder.tokenize) for dataset in (lyft, uber)]
    pairs = [bm25_run(dataset, tokenize=embedder.tokenize, ngram=2) for dataset in (lyft, uber)]
    one_vector = [evaluate(embedder, dataset) for dataset in (lyft, uber)]
    windows = [evaluate(embedder, dataset, passages=(128, 64)) for dataset in (lyft, uber)]
    expected = {
        "one vector": one_vector[1],
        "windows": windows[1],
        "BM25, tokens": evaluate_run(tokens[1], uber),
        "BM25, words": evaluate_run(bm25_run(uber), uber),
        "BM25, tokens and pairs": evaluate_run(pairs[1], uber),
    }
    for kind, sparse in (("BM25", tokens), ("pairs", pairs)):
        for name, dense in (("one vector", one_vector), ("windows", windows)):
            w, rest = choose_weight([sparse[0], dense[0].run], lyft.all_qrels(), metric="mrr@10")
            assert (w, rest) != choose_weight(
                [sparse[1], dense[1].run], uber.all_qrels()
            )  # so that choosing on Uber would show
            fused = fuse([sparse[1], dense[1].run], method="zscore", weights=(w, rest))
            expected[f"{w:g} {kind} + {rest:g} {name}"] = evaluate_run(fused, uber)
    expected = {name: [found] for name, found in expected.items()}
    first, second = text.split("\n\n")[:2]
    assert first == format_values(expected)
    assert second == format_differences(expected)
    values = [found.metrics["mrr@10"] for (found,) in expected.values()]
    assert len(set(values)) == len(values)  # no row stands for another
    assert "20 questions against 10 chunks" in text
    assert "BM25 is stronger here than on users' questions" in text
    assert text.endswith("BM25 is stronger here than on users' questions.\n")
    assert "ine-tuned" not in text

    written = modified(tmp_path / "vectors")
    assert written
    assert output() == text
    assert modified(tmp_path / "vectors") == written

    tuned = output(tuned=[base, other])
    assert "mean over 2 seeds" in tuned
    tables = cells(tuned.split("\n\n")[0])
    model = load_embedder(other, max_length=512)
    for name, passages in (("one vector", None), ("windows", (128, 64))):
        found = [*expected[name], evaluate(model, uber, passages=passages)]
        means = [sum(row.metrics[metric] for row in found) / 2 for metric in METRICS]
        assert [float(cell) for cell in tables[f"fine-tuned, {name}"]] == pytest.approx(means, abs=5.1e-5)
        assert tables[name] == cells(first)[name]
    assert cells(output(tuned=[base]).split("\n\n")[1])["fine-tuned, one vector"][:2] == [
        "+0.0000",
        "[+0.0000, +0.0000]",
    ]

    command = [sys.executable, "-m", "experiments.baselines_lyft_uber", "--data", str(tmp_path), "--base", base]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, text), done.stderr
    assert (tmp_path / "runs" / "vectors").is_dir()


def test_what_is_refused(tmp_path, write_tiny):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "train_dataset.json", "https://github.com")):
        main(Namespace(data=str(tmp_path)))
    write_datasets(tmp_path)
    short = str(write_tiny(tmp_path / "short"))
    options = Namespace(data=str(tmp_path), base=short, tuned=[], store=str(tmp_path / "vectors"))
    with pytest.raises(ValueError, match=naming(short, "max_length", 512, 48)):
        main(options)


def test_bm25_on_the_published_questions(minilm, shared_data):
    """The row that needs no model but its tokenizer."""
    uber = RetrievalDataset.load(shared_data / "lyft_uber" / "val_dataset.json")
    metrics = evaluate_run(bm25_run(uber, tokenize=minilm.tokenize), uber).metrics
    assert metrics["hit_rate@5"] >= 0.90
    assert metrics["mrr@10"] >= 0.77
