"""experiments/grids: every grid file is planned as written, on tiny data in place of the published; nothing trains."""

import ast
import csv
import runpy
import sys
from pathlib import Path

import pytest

from embedft import RetrievalDataset, load_embedder
from embedft.ablation.plan import plan
from experiments import ablate, sources

GRIDS = sorted(Path(ablate.__file__).parent.glob("grids/*.py"))
WORDS = ["depot", "driver", "fleet", "lease", "margin", "rider", "surge", "tariff"]
FORGETTING = {"scifact", "docstrings"}


def tiny(name: str, num_documents: int = 50) -> RetrievalDataset:
    """Two questions about each document, whose sentences, heading and words can be asked with, too."""
    corpus = {}
    for i in range(num_documents):
        own = " ".join(f"{name}{word}{'abcdefghij'[i % 10]}{'klmno'[i // 10]}" for word in WORDS)
        sentence = f"The report of {name} number {i} says a little."
        corpus[f"{name}{i}"] = f"The {name} {WORDS[i % 8]} {own}\n{sentence}\n\nWords {own}\n{own} {own}"
    queries = {f"{i}/{n}": f"What is {n} of {text.split()[3]}?" for i, text in corpus.items() for n in "ab"}
    return RetrievalDataset(queries, corpus, {q: {q[:-2]: 1} for q in queries})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The published data and what is made of it, in miniature."""
    folder = tmp_path_factory.mktemp("grids")
    for name, path in (("lyft", "lyft_uber/train_dataset"), ("uber", "lyft_uber/val_dataset")):
        tiny(name).save(folder / "shared" / f"{path}.json")
    tiny("scifact", 12).save(folder / "shared" / "beir" / "scifact")
    tiny("docstrings", 12).save(folder / ablate.OUT / "data" / "docstrings.json")
    (folder / "shared" / "finance_qa").mkdir()
    with open(folder / "shared" / "finance_qa" / "Financial-QA-10k.csv", "w", newline="", encoding="utf-8") as file:
        pairs = tiny("finance", 50)
        rows = [[q, "an answer", pairs.corpus[i[:-2]], "X", "2023"] for i, q in pairs.queries.items()]
        csv.writer(file).writerows([("question", "answer", "context", "ticker", "filing"), *rows])
    return folder


@pytest.fixture
def read(data, monkeypatch):
    """A function that runs a grid file and returns its settings."""
    monkeypatch.chdir(data)
    monkeypatch.setattr(sources, "SHARED", data / "shared")
    monkeypatch.delitem(sys.modules, "experiments.grid_data", raising=False)  # reads the data when imported
    return lambda path: runpy.run_path(str(path))


def test_every_grid_asks_a_question():
    assert len(GRIDS) >= 12
    for path in GRIDS:
        question = ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
        assert question.endswith("?"), path


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_can_be_planned(read, path):
    """Every cell passes the checks of a run; seeds, validation and forgetting are as every claim needs them."""
    found = read(path)
    how = {"axes": found.get("AXES"), "points": found.get("POINTS"), "seeds": found["SEEDS"]}
    grid = plan({"model": ablate.BASE, **found["BASE"]}, Path("out"), tests=found["TESTS"], **how)
    assert not Path("out").exists()
    assert len(grid.seeds) >= 3
    assert 3 <= len(grid.points) <= 9
    assert grid.tests.keys() >= FORGETTING | {"finance" if path.stem == "finance" else "uber"}
    trained = [cell for cell in grid.cells if cell.seed is not None]
    assert len({cell.key for cell in trained}) == len(grid.points) * len(grid.seeds)
    validation = RetrievalDataset.load(found["BASE"]["validation"])
    for name, test in ((name, RetrievalDataset.load(path)) for name, path in grid.tests.items()):
        if name != "finance":  # all of its questions search all contexts
            assert set(validation.corpus.values()).isdisjoint(test.corpus.values())
        assert set(validation.queries.values()).isdisjoint(test.queries.values())


def test_what_is_made_of_the_published_questions(read):
    """The grids "identity_masking" and "questions" rest on these."""
    found = read(GRIDS[0])
    lyft, published = found["LYFT"], RetrievalDataset.load(found["LYFT"]["data"][0])
    make = sys.modules["experiments.grid_data"].lyft
    apart, ict, mix = (RetrievalDataset.load(make(name)[0]) for name in ("apart", "ict", "mix"))
    assert [make(name)[1] for name in ("apart", "ict", "mix")] == [lyft["validation"]] * 3
    assert apart.queries == published.queries
    assert len(set(apart.corpus.values())) == len(apart.qrels) == 2 * len(published.corpus)
    tokenize = load_embedder(ablate.BASE, device="cpu").tokenize
    for query_id in list(apart.queries)[:6]:
        one, other = (dataset.corpus[dataset.relevant(query_id)[0]] for dataset in (apart, published))
        assert one.rstrip() == other
        assert tokenize([one]) == tokenize([other])
    assert set(ict.kinds.values()) == set()
    assert set(mix.kinds.values()) == {"question", "title", "claim", "keywords"}
    assert mix.of_kinds(["question"]).queries == published.queries
    assert ict.corpus.keys() == mix.corpus.keys() == published.corpus.keys()
