"""commands/mine.py: `embedft mine` by `main`, what it writes and says, and that it trains."""

import json
from dataclasses import replace

import pytest
import torch
from naming import names
from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset, mine
from embedft.cli import main
from embedft.encoders.scoring import load_scorer, new_scorer

RANKS = ["--ranks", "2", "9"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model and data, of which a document is in no question's way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset(12, 9).save("pairs.json")
    return tmp_path


def test_mines_and_trains(place, capsys):
    assert main(["mine", "model", "pairs.json", "--out", "new/mined.jsonl", *RANKS, "--num-negatives", "2"]) == 0
    out, err = capsys.readouterr()
    expected = mine(make_embedder(place / "model"), make_dataset(12, 9), ranks=(2, 9), num_negatives=2)
    found = RetrievalDataset.load("new/mined.jsonl")
    assert found.negatives == expected.negatives
    assert (found.queries, found.qrels) == (expected.queries, expected.qrels)
    assert out == f"new/mined.jsonl: 12 questions, {len(found.corpus)} documents, 24 negatives\n"
    assert err == ""
    options = ["--num-negatives", "2", "--epochs", "1", "--batch-size", "4", "--out", "run"]
    assert main(["finetune", "model", "new/mined.jsonl", *options]) == 0


def test_a_cross_encoder_decides_what_is_too_close(place, capsys):
    """All scores are between 0 and 1, so a margin of 2 leaves nothing."""
    new_scorer(make_embedder(place / "model")).save("scorer")
    command = ["mine", "model", "pairs.json", "--out", "mined.jsonl", *RANKS, "--scorer", "scorer"]
    assert main([*command, "--absolute-margin", "2"]) == 2
    assert names(capsys.readouterr().err, "negatives", "margins")
    assert main([*command, "--absolute-margin", "0"]) == 0
    found, scorer = RetrievalDataset.load("mined.jsonl"), load_scorer("scorer", device="cpu")
    options = {"ranks": (2, 9), "absolute_margin": 0.0}
    assert (
        found.negatives == mine(make_embedder(place / "model"), make_dataset(12, 9), scorer=scorer, **options).negatives
    )
    assert found.negatives != mine(make_embedder(place / "model"), make_dataset(12, 9), **options).negatives


@pytest.mark.parametrize(("last", "more"), [(5, True), (9, False), (100, False)])
def test_a_higher_rank_is_advised_where_there_is_one(place, capsys, last, more):
    count = min(last, 9) - 1
    options = ["--ranks", "2", str(last), "--num-negatives", str(count)]
    assert main(["mine", "model", "pairs.json", "--out", "mined.jsonl", *options]) == 0
    error = capsys.readouterr().err
    assert names(error, count, "negatives")
    assert names(error, "rank") == more


def test_options_reach_the_search(place, capsys):
    dataset = make_dataset(12, 9)
    dataset = replace(
        dataset, negatives={q: [next(d for d in dataset.corpus if d not in by)] for q, by in dataset.qrels.items()}
    )
    dataset.save("with.jsonl")
    given = {
        "ranks": (1, 8),
        "num_negatives": 3,
        "seed": 5,
        "sampling": "top",
        "relative_margin": 0.01,
        "absolute_margin": 0.02,
        "min_score": -0.9,
        "max_score": 0.99,
        "dim": 16,
        "passages": (6, 4),
    }
    loaded = RetrievalDataset.load("with.jsonl")
    options = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    for replaced in ([], ["--replace"]):
        assert main(["mine", "model", "with.jsonl", "--out", "mined.jsonl", *options, *replaced, "--overwrite"]) == 0
        expected = mine(make_embedder(place / "model"), loaded, replace=bool(replaced), **given)
        assert {
            q: ids for q, ids in RetrievalDataset.load("mined.jsonl").negatives.items() if ids
        } == expected.negatives
    capsys.readouterr()
    # Each on its own changes what is found.
    base = ["mine", "model", "pairs.json", "--out", "m.jsonl", "--overwrite"]
    found = set()
    for more in (
        [*RANKS], [*RANKS, "--seed", "1"], [*RANKS, "--sampling", "top"], [*RANKS, "--dim", "4"],
        [*RANKS, "--passages", "5", "2"], [*RANKS, "--passages", "5", "2", "6", "1"],
        ["--ranks", "1", "5"], [*RANKS, "--max-score", "0.9"],
    ):  # fmt: skip
        assert main([*base, *more]) == 0
        found.add((place / "m.jsonl").read_text())
    assert len(found) == 8


def test_what_jsonl_cannot_hold(place, capsys):
    """Titles go into the texts; questions without an answer and documents that no question names stay out."""
    dataset = make_dataset(4, 9)
    queries = dataset.queries | {"unjudged": "a b", "answerless": "c"}
    dataset = replace(dataset, queries=queries, qrels=dataset.qrels | {"answerless": {"d0": 0}}, titles={"d0": "x y"})
    dataset = replace(dataset, qrels={q: by for q, by in dataset.qrels.items() if q != "unjudged"})
    (place / "beir").mkdir()
    (place / "beir" / "qrels").mkdir()
    rows = [{"_id": i, "title": dataset.titles.get(i, ""), "text": text} for i, text in dataset.corpus.items()]
    (place / "beir" / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": i, "text": text} for i, text in dataset.queries.items()]
    (place / "beir" / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, judged in (("test", ["q0"]), ("train", ["q0", "q1", "q2", "q3", "answerless"])):
        lines = [f"{q}\t{d}\t{grade}" for q in judged for d, grade in dataset.qrels[q].items()]
        (place / "beir" / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    options = ["--out", "mined.jsonl", "--ranks", "1", "3", "--num-negatives", "1", "--sampling", "top"]
    assert main(["mine", "model", "beir", *options]) == 0
    found = RetrievalDataset.load("mined.jsonl")
    assert found.qrels == {f"q{i}": {f"d{i}": 1} for i in range(4)}  # of the split that trains
    assert found.corpus["d0"] == "x y " + dataset.corpus["d0"]
    assert found.corpus.keys() == {*(f"d{i}" for i in range(4)), *(i for (i,) in found.negatives.values())}
    assert len(found.corpus) < 9
    assert "4 questions" in capsys.readouterr().out
    assert main(["mine", "model", "beir", *options, "--split", "test", "--overwrite"]) == 0
    assert capsys.readouterr().out.startswith("mined.jsonl: 1 questions, 2 documents, 1 negatives")


def test_questions_with_too_few_are_told_of(place, capsys):
    options = ["--ranks", "1", "9", "--num-negatives", "3", "--absolute-margin", "0.02"]
    found = mine(
        make_embedder(place / "model"), make_dataset(12, 9), ranks=(1, 9), num_negatives=3, absolute_margin=0.02
    ).negatives
    counts = [len(found.get(f"q{i}", ())) for i in range(12)]
    short = sum(count < 3 for count in counts)
    assert 0 < short < 12
    assert main(["mine", "model", "pairs.json", "--out", "m.jsonl", *options]) == 0
    assert names(capsys.readouterr().err, short, 12, 3, counts.count(0))
    pairs = RetrievalDataset.load("m.jsonl")
    assert {query_id: len(pairs.negatives.get(query_id, ())) for query_id in pairs.queries} == dict(
        zip(pairs.queries, counts, strict=True)
    )
    # And they train.
    train = ["finetune", "model", "m.jsonl", "--out", "run", "--num-negatives", "3", "--epochs", "1", "--lr", "1e-4"]
    assert main([*train, "--batch-size", "4", "--loss.name", "triplet"]) == 0


def test_a_store_and_an_adapter(place, capsys):
    options = ["--out", "m.jsonl", *RANKS, "--store", "vectors"]
    assert main(["mine", "model", "pairs.json", *options]) == 0
    assert "0 texts found, 21 computed" in capsys.readouterr().err
    plain = (place / "m.jsonl").read_text()
    fit = ["adapter", "model", "pairs.json", "--out", "adapter", "--epochs", "30", "--lr", "0.1", "--store", "vectors"]
    assert main(fit) == 0
    capsys.readouterr()
    assert main(["mine", "model", "pairs.json", *options, "--adapter", "adapter", "--overwrite"]) == 0
    assert "21 texts found, 0 computed" in capsys.readouterr().err
    assert (place / "m.jsonl").read_text() != plain


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--out", "mined.csv"], ("--out", "mined.csv", ".jsonl")),
        (["--out", "pairs.json/m.jsonl"], ("pairs.json/m.jsonl", "written")),
        (["--out", "m.jsonl"], ("ranks", 10, 9)),
        (["--out", "m.jsonl", "--ranks", "3", "2"], ("ranks", [3, 2], "first", "last", 1)),
        (["--out", "m.jsonl", *RANKS, "--relative-margin", "-1"], ("--relative-margin", -1.0, 0)),
        (["--out", "m.jsonl", *RANKS, "--max-score", "-1"], ("negatives", "margins", "ranks")),
    ],
)
def test_errors_are_one_line(place, capsys, options, facts):
    assert main(["mine", "model", "pairs.json", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("embedft mine: error: ")
    assert names(error, *facts)
    assert not (place / "m.jsonl").exists()


def test_nothing_is_computed_before_the_settings_are_checked(place, capsys, monkeypatch):
    monkeypatch.setattr("embedft.commands.mine.load_encoder", lambda *_, **__: pytest.fail("work has begun"))
    assert main(["mine", "model", "pairs.json", "--out", "mined"]) == 2
