"""retrieval/mining.py: by hand; against a naive search, and against sentence-transformers' mining; seeds and slices."""

import itertools
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, RetrievalDataset, finetune, mine, search
from embedft.data.batches import make_batches
from embedft.losses.contrastive import in_batch_negatives
from embedft.retrieval import mining
from embedft.training.train import TrainConfig, train


class Vectors:
    """An embedder that looks vectors up by text, and counts the documents that it is given at once."""

    similarity = "cosine"

    def __init__(self, vectors: dict[str, list[float]]):
        self.vectors, self.at_once = vectors, []

    def encode(self, texts, *, role, dim=None):
        if role == "document":
            self.at_once.append(len(texts))
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)[:, :dim]


# One query along the first axis, so a document scores its first coordinate. In order: b .95, a .90, c .89, d .86,
# e .85, f .50, g .20, h -.10, and a is the answer.
SCORES = {"a": 0.90, "b": 0.95, "c": 0.89, "d": 0.86, "e": 0.85, "f": 0.50, "g": 0.20, "h": -0.10}


def one_query(scores: dict[str, float] = SCORES, relevant: str = "a", **changes) -> tuple[Vectors, RetrievalDataset]:
    """Document x has the text "text x" unless `changes` gives a corpus, and the score that its text has."""
    corpus = {name: f"text {name}" for name in scores}
    dataset = RetrievalDataset({"q": "?"}, corpus, {"q": dict.fromkeys(relevant, 1)})
    return Vectors({"?": [1, 0], **{f"text {n}": [s, 1 - s] for n, s in scores.items()}}), replace(dataset, **changes)


def mined(options: dict, scores: dict[str, float] = SCORES, relevant: str = "a", **changes) -> str:
    options = {"ranks": (1, 8), "num_negatives": 3, "sampling": "top", **options}
    return "".join(mine(*one_query(scores, relevant, **changes), **options).negatives.get("q", "-"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "bcd"),  # the first of all but the answer
        ({"ranks": (3, 5)}, "cde"),
        ({"ranks": [2, 4]}, "cd"),  # rank 2 is the answer's
        ({"ranks": (2, 2), "num_negatives": 1}, "-"),
        ({"ranks": (7, 1000)}, "gh"),
        ({"relative_margin": 0.05}, "efg"),  # at most .95 * .90 = .855
        ({"absolute_margin": 0.02}, "def"),  # at most .88
        ({"absolute_margin": 0.0}, "cde"),  # b scores more than the answer
        ({"relative_margin": 0.05, "absolute_margin": 0.45}, "gh"),  # at most .855 and at most .45
        ({"max_score": 0.875}, "def"),
        ({"min_score": 0.87}, "bc"),
        ({"max_score": 0.3, "absolute_margin": 0.02}, "gh"),
        ({"max_score": 0.3, "relative_margin": 0.05}, "gh"),
        ({"max_score": 0.875, "min_score": 0.3, "num_negatives": 8}, "def"),
        ({"ranks": (4, 7), "relative_margin": 0.05}, "efg"),  # ranks are those of the search, margins come after
        ({"num_negatives": 8}, "bcdefgh"),
    ],
)
def test_by_hand(options, expected):
    assert mined(options) == expected


def test_the_margin_is_below_the_lowest_answer():
    assert mined({"absolute_margin": 0.01}, relevant="ae") == "fgh"  # at most .84
    assert mined({}, relevant="ae") == "bcd"


def test_a_share_of_a_negative_score_is_below_it_too():
    """p = -.2: at most -.2 - .5 * .2 = -.3. A factor on p would say at most -.1."""
    scores = {"a": -0.2, "b": -0.15, "c": -0.25, "d": -0.35, "e": -0.45}
    assert mined({"relative_margin": 0.5, "ranks": (1, 5)}, scores) == "de"


def test_a_document_judged_not_relevant_is_a_candidate():
    assert mined({}, qrels={"q": {"a": 2, "b": 0}}) == "bcd"


def test_a_text_that_answers_is_no_negative_under_another_id():
    """The text of the answer under id c; a title makes another text of it."""
    corpus = {name: f"text {name}" for name in SCORES} | {"b": "text a"}
    assert mined({}, corpus=corpus) == "cde"
    vectors, dataset = one_query(corpus=corpus | {"c": "a"}, titles={"c": "text"})
    assert mine(vectors, dataset, ranks=(1, 8), num_negatives=8, sampling="top").negatives["q"] == list("defgh")


def test_what_answers_an_equal_query_is_no_negative():
    """q and r ask the same, judged a and b; their own answers aside, they have the same candidates."""
    vectors, dataset = one_query()
    dataset = replace(dataset, queries={"q": "?", "r": "?"}, qrels={"q": {"a": 1}, "r": {"b": 1, "c": 0}})
    found = mine(vectors, dataset, ranks=(1, 8), num_negatives=3, sampling="top").negatives
    assert found == {"q": ["c", "d", "e"], "r": ["c", "d", "e"]}


def test_a_query_is_no_negative_of_its_own():
    """Neither under its own id, nor its text under another one: c, or d, which has a title besides."""
    scores = {**SCORES, "q": 0.97}
    assert mined({"ranks": (1, 9)}, scores) == "bcd"
    vectors, dataset = one_query(scores)
    corpus = dataset.corpus | {"c": "?", "d": "?"}
    vectors.vectors |= {"text ?": [0.86, 0.14]}
    dataset = replace(dataset, corpus=corpus, titles={"d": "text"})
    options = {"ranks": (1, 9), "num_negatives": 3, "sampling": "top"}
    assert mine(vectors, dataset, **options).negatives["q"] == ["b", "e", "f"]
    # Ranks count the query's own document, as they count relevant ones: q is the first, c has the query's vector.
    assert mine(vectors, dataset, **(options | {"ranks": (4, 9)})).negatives["q"] == ["e", "f", "g"]


def test_case_and_whitespace_make_no_other_text():
    """In order b to h, a left out: b has the answer's text, d that of c, and e the query's."""
    dataset = RetrievalDataset({"q": "who?"}, {name: f"text {name}" for name in SCORES}, {"q": {"a": 1}})
    texts = dataset.corpus | {"b": "Text  A", "d": "TEXT c ", "e": "Who? "}
    vectors = {"who?": [1, 0], **{texts[name]: [score, 1 - score] for name, score in SCORES.items()}}
    options = {"ranks": (1, 8), "num_negatives": 8, "sampling": "top"}
    assert mine(Vectors(vectors), replace(dataset, corpus=texts), **options).negatives["q"] == list("cfgh")


def test_of_equal_texts_one_is_mined():
    corpus = {name: f"text {name}" for name in SCORES} | {"h": "text b", "d": "text c"}
    # In order b and h, a, c and d, e, f, g.
    assert mined({"num_negatives": 8}, corpus=corpus) == "bcefg"
    assert mined({"num_negatives": 7, "ranks": (2, 8)}, corpus=corpus) == "hcefg"


def test_negatives_that_are_there_stay_in_front_or_go():
    given = {"q": ["g", "c"]}
    assert mined({}, negatives=given) == "gcbde"
    assert mined({"replace": True}, negatives=given) == "bcd"
    assert mined({"max_score": -0.5}, negatives=given) == "gc"
    assert mined({"max_score": -0.5, "replace": True}, negatives=given) == "-"
    corpus = {name: f"text {name}" for name in SCORES} | {"b": "text g"}
    assert mined({}, negatives=given, corpus=corpus) == "gcdef"  # b and g have one text


def test_nothing_else_of_the_dataset_changes():
    vectors, dataset = one_query(scores={**SCORES}, titles={})
    dataset = replace(dataset, scores={"q": {"b": 0.3}}, qrels={"q": {"a": 3, "h": 0}})
    before = dataset.sha256()
    found = mine(vectors, dataset, ranks=(1, 8), num_negatives=2)
    assert dataset.sha256() == before
    assert replace(found, negatives={}) == dataset
    assert found.negatives


def test_a_query_without_a_relevant_document_has_none():
    """Without a known answer, nothing is known to be a negative. Existing negatives stay, or go."""
    vectors, dataset = one_query()
    vectors.vectors |= {"??": [1, 0], "???": [1, 0]}
    queries = {"n": "??", **dataset.queries, "j": "???"}
    dataset = replace(dataset, queries=queries, qrels={**dataset.qrels, "j": {"b": 0}}, negatives={"n": ["c"]})
    options = {"ranks": (1, 8), "num_negatives": 1, "sampling": "top"}
    assert mine(vectors, dataset, **options).negatives == {"n": ["c"], "q": ["b"]}
    assert list(mine(vectors, dataset, **options).negatives) == ["n", "q"]
    assert mine(vectors, dataset, replace=True, **options).negatives == {"q": ["b"]}


def test_leading_dimensions():
    """By its first coordinate alone a is as good as b, by both of them b is better."""
    vectors = Vectors({"?": [1, 1], "A": [0.5, 0], "B": [0.5, 0.5], "C": [0.4, 0.9]})
    dataset = RetrievalDataset({"q": "?"}, {"a": "A", "b": "B", "c": "C"}, {"q": {"c": 1}})
    options = {"ranks": (1, 3), "num_negatives": 2, "sampling": "top"}
    assert mine(vectors, dataset, **options).negatives["q"] == ["b", "a"]
    assert mine(vectors, dataset, dim=1, **options).negatives["q"] == ["a", "b"]


# Properties.


def random_case(seed: int) -> tuple[Vectors, RetrievalDataset]:
    """Few values per coordinate, so many ties; repeated texts; graded, judged 0, several relevant, none."""
    generator = np.random.default_rng(seed)
    num_documents, num_queries = int(generator.integers(1, 30)), int(generator.integers(1, 12))
    vectors = {f"text {i}": generator.integers(-2, 3, 3) / 4 for i in range(20)}
    vectors |= {f"query {i}": generator.integers(-2, 3, 3) / 4 for i in range(num_queries)}
    ids = generator.permutation(100)[:num_documents]
    corpus = {f"d{i}": f"text {generator.integers(20)}" for i in ids}
    queries = {f"q{i}": f"query {i}" for i in range(num_queries)}
    qrels = {
        query_id: {str(d): int(generator.integers(3)) for d in generator.choice(list(corpus), min(3, len(corpus)))}
        for query_id in queries
    }
    qrels["q0"] = {next(iter(corpus)): 1}
    negatives = {"q0": list(corpus)[1:3]}
    return Vectors(vectors), RetrievalDataset(queries, corpus, qrels, negatives)


def naive(vectors: Vectors, dataset: RetrievalDataset, first: int, last: int, number: int, margin: float) -> dict:
    found = dict(dataset.negatives)
    for query_id, text in dataset.queries.items():
        score = {d: float(np.dot(vectors.vectors[text], vectors.vectors[t])) for d, t in dataset.corpus.items()}
        relevant = [d for d, grade in dataset.qrels[query_id].items() if grade > 0]
        if not relevant:
            continue
        ranking = sorted(dataset.corpus, key=lambda d: (-score[d], d))[first - 1 : last]
        kept, limit = found.get(query_id, []), min(score[d] for d in relevant) - margin
        taken = []
        for d in ranking:
            texts = [dataset.corpus[i] for i in (*relevant, *kept, *taken)]
            if score[d] <= limit and dataset.corpus[d] not in texts:
                taken.append(d)
        if taken[:number]:
            found[query_id] = kept + taken[:number]
    return found


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_equals_a_naive_search(at_once):
    """Coordinates are multiples of 1/4, so every product is exact and ties are ties."""
    lengths = Counter()
    for seed in range(150):
        vectors, dataset = random_case(seed)
        first = seed % min(4, len(dataset.corpus)) + 1
        last, number = first + seed % 13, seed % min(5, seed % 13 + 1) + 1
        options = {"ranks": (first, last), "num_negatives": number, "sampling": "top", "slice_documents": at_once}
        found = mine(vectors, dataset, absolute_margin=seed % 3 / 8, **options).negatives
        assert found == naive(vectors, dataset, first, last, number, seed % 3 / 8)
        assert max(vectors.at_once) <= at_once
        lengths.update(map(len, found.values()))
    assert set(lengths) >= {1, 2, 3, 4}


def test_the_order_of_the_corpus_is_no_matter():
    vectors, dataset = random_case(5)
    backwards = replace(dataset, corpus=dict(reversed(dataset.corpus.items())))
    for sampling in get_args(mining.Pick):
        options = {"ranks": (1, 9), "num_negatives": 3, "sampling": sampling}
        assert mine(vectors, dataset, **options).negatives == mine(vectors, backwards, **options).negatives


def draws(seed: int, num_queries: int = 200, ids: str = "q") -> dict[str, list[str]]:
    """Each query has 6 candidates, ranks 2 to 7, of which 2 are drawn."""
    vectors, dataset = one_query()
    vectors.vectors |= {str(i): [1, 0] for i in range(num_queries)}
    queries = {f"{ids}{i}": str(i) for i in range(num_queries)}
    dataset = replace(dataset, queries=queries, qrels={query_id: {"b": 1} for query_id in queries})
    return mine(vectors, dataset, ranks=(2, 7), num_negatives=2, seed=seed).negatives


def test_draws_follow_from_the_seed_and_the_query():
    first = draws(0)
    assert first == draws(0)
    assert first != draws(1) != draws(-1)
    assert draws(0, 50) == dict(itertools.islice(first.items(), 50))
    assert list(draws(0, ids="p").values()) != list(first.values())


def test_draws_are_even_and_in_the_order_of_ranks():
    """400 draws of 2 out of 6 in which each pair of 15 has 400 / 15 = 26.7 on average, sd 5."""
    pairs = Counter(map(tuple, [*draws(0).values(), *draws(1).values()]))
    assert set(pairs) == set(itertools.combinations("acdefg", 2))
    assert all(8 < count < 50 for count in pairs.values())


def test_all_candidates_where_there_are_no_more():
    assert mined({"sampling": "random", "ranks": (3, 5)}) == "cde"
    assert mined({"sampling": "random", "ranks": (6, 8)}) == "fgh"


# With a model.


def test_ranks_are_those_of_search(tmp_path):
    embedder, dataset = make_embedder(tmp_path / "base"), make_dataset(12, 30)
    for options in ({}, {"passages": (6, 4)}, {"passages": (6, 4, 5, 1)}, {"dim": 8}):
        found = mine(embedder, dataset, ranks=(3, 9), num_negatives=7, sampling="top", **options).negatives
        run = search(embedder, dataset, dataset.queries, depth=9, **options).to_dict()
        for query_id, ranking in run.items():
            assert found[query_id] == [d for d in list(ranking)[2:] if d not in dataset.qrels[query_id]]


@pytest.mark.parametrize("at_once", [7, 1000])
@pytest.mark.parametrize("passages", [(5, 2), (5, 2, 6, 4)])
def test_passages_in_margins_too(tmp_path, at_once, passages):
    """The windows of the answer count like those of any document; checked one document at a time."""
    embedder, dataset = make_embedder(tmp_path / "base"), make_dataset(12, 30)
    queries = embedder.encode(list(dataset.queries.values()), role="query")
    score = {}
    for document_id, text in dataset.corpus.items():
        score[document_id] = np.mean(
            [
                (queries @ embedder.encode_passages([text], pair)[0].T).max(axis=1)
                for pair in zip(passages[::2], passages[1::2], strict=True)
            ],
            axis=0,
        )
    options = {"ranks": (1, 30), "num_negatives": 30, "sampling": "top", "absolute_margin": 0.02}
    options["slice_documents"] = at_once
    found = mine(embedder, dataset, passages=passages, **options).negatives
    for row, (query_id, grades) in enumerate(dataset.qrels.items()):
        limit = score[next(iter(grades))][row] - 0.02
        expected = [d for d in score if score[d][row] <= limit]
        assert found.get(query_id, []) == sorted(expected, key=lambda d: -score[d][row])
    assert found != mine(embedder, dataset, **options).negatives


class Table:
    """As much of `datasets.Dataset` as the reference asks for: the package is large, and brings pandas."""

    def __init__(self, columns: dict[str, list]):
        self.columns, self.column_names = columns, list(columns)

    @classmethod
    def from_dict(cls, columns):
        return cls(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name):
        return self.columns[name]

    def to_pandas(self):
        return self

    def groupby(self, name):
        counts = Counter(self.columns[name])
        return SimpleNamespace(count=lambda: SimpleNamespace(to_dict=lambda: dict.fromkeys(self.columns, counts)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative_margin": 0.02},
        {"absolute_margin": 0.05},
        {"relative_margin": 0.03, "max_score": 0.93},
        {"absolute_margin": 0.01, "min_score": 0.8},
    ],
)
def test_equals_sentence_transformers(tmp_path, monkeypatch, reference, options):
    """The first ones of the whole corpus, several relevant documents per query; theirs are texts, ours ids."""
    theirs = pytest.importorskip("sentence_transformers.util.hard_negatives")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Table))
    monkeypatch.setattr(theirs, "is_datasets_available", lambda: True)

    embedder, dataset = make_embedder(tmp_path / "base"), make_dataset(20, 30)
    dataset = replace(dataset, qrels={q: {**by, f"d{i}": 1} for i, (q, by) in enumerate(dataset.qrels.items(), 5)})
    pairs = [(dataset.queries[q], dataset.corpus[d]) for q, by in dataset.qrels.items() for d in by]
    found = theirs.mine_hard_negatives(
        Table({"anchor": [q for q, _ in pairs], "positive": [d for _, d in pairs]}),
        reference(tmp_path / "base"),
        corpus=list(dataset.corpus.values()),
        num_negatives=5,
        range_max=30,
        sampling_strategy="top",
        output_format="labeled-list",
        verbose=False,
        **options,
    )
    expected: dict[str, list[str]] = {}
    for query, texts, labels in zip(found["anchor"], found["positive"], found["labels"], strict=True):
        expected.setdefault(query, [text for text, label in zip(texts, labels, strict=True) if not label])
    found = mine(embedder, dataset, ranks=(1, 30), num_negatives=5, sampling="top", **options).negatives
    assert {dataset.queries[q]: [dataset.corpus[d] for d in ids] for q, ids in found.items()} == expected
    assert 0 < sum(map(len, found.values())) <= 100
    assert (sum(map(len, found.values())) < 100) == bool(options)


def test_trains(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    dataset = mine(embedder, make_dataset(), ranks=(2, 9), num_negatives=2)
    dataset.save(tmp_path / "mined.jsonl")
    loaded = RetrievalDataset.load(tmp_path / "mined.jsonl")
    assert loaded.negatives == dataset.negatives
    before = embedder.sha256()
    finetune(embedder, loaded, FinetuneConfig(epochs=1, batch_size=4, num_negatives=2))
    assert embedder.sha256() != before


def test_mined_anew_in_training(tmp_path):
    """Before the second epoch by the model that the first one made."""
    embedder, dataset, seen = make_embedder(tmp_path / "base"), make_dataset(), []
    options = {"ranks": (1, 9), "num_negatives": 2, "sampling": "top"}

    def make(negatives):
        assert negatives == mine(embedder, dataset, **options).negatives
        seen.append((negatives, embedder.sha256()))
        return make_batches(replace(dataset, negatives=negatives), embedder.pack, batch_size=4, seed=0, num_negatives=2)

    def refresh(model):
        return make(mine(model, dataset, **options).negatives)

    config = TrainConfig(epochs=2, lr=1e-2)
    train(embedder, make(mine(embedder, dataset, **options).negatives), in_batch_negatives, config, refresh=refresh)
    (first, base), (second, after_one) = seen
    assert first != second
    assert len({base, after_one, embedder.sha256()}) == 3


# What is refused, before any text is encoded.


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"ranks": (0, 5)}, ("ranks", (0, 5), "first", "last", 1)),
        ({"ranks": (5, 4)}, ("ranks", (5, 4), "first", "last", 1)),
        ({"ranks": (1, 2, 3)}, ("ranks", (1, 2, 3), "first", "last")),
        ({"ranks": (1, 4.0)}, ("ranks", (1, 4.0), "whole")),
        ({"ranks": 10}, ("ranks", 10, "first", "last", 1)),
        ({"ranks": (9, 100)}, ("ranks", 9, 8, "documents")),
        ({"num_negatives": 0}, ("num_negatives", 0, 1, 8, "ranks", 1, 8)),
        ({"num_negatives": 4, "ranks": (3, 5)}, ("num_negatives", 4, 1, 3, "ranks", 3, 5)),
        ({"sampling": "best"}, ("sampling", "'best'", "random", "top")),
        ({"relative_margin": -0.1}, ("relative_margin", -0.1, 0)),
        ({"absolute_margin": float("nan")}, ("absolute_margin", "nan", 0)),
        ({"relative_margin": float("inf")}, ("relative_margin", "inf", 0)),
        ({"min_score": float("nan")}, ("max_score", None, "min_score", "nan")),
        ({"max_score": float("nan")}, ("max_score", "nan", "min_score", None)),
        ({"min_score": 0.5, "max_score": 0.4}, ("max_score", ..., 0.4, ..., "min_score", ..., 0.5)),
        ({"passages": (6, 4)}, ("passages", (6, 4), "Vectors")),
    ],
)
def test_settings_out_of_range(monkeypatch, options, facts):
    monkeypatch.setattr(Vectors, "encode", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=naming(*facts)):
        mine(*one_query(), **{"ranks": (1, 8), **options})


def test_no_query_with_a_relevant_document():
    with pytest.raises(ValueError, match=naming(1, "queries", "relevant")):
        mine(*one_query(qrels={"q": {"a": 0}}), ranks=(1, 8))


@pytest.mark.parametrize(("text", "facts"), [("?", ("query", "'q'")), ("text f", ("document", "'f'"))])
def test_vectors_that_are_not_finite(text, facts):
    vectors, dataset = one_query()
    vectors.vectors[text] = [float("nan"), 0]
    with pytest.raises(ValueError, match=naming(*facts, "finite")):
        mine(vectors, dataset, ranks=(1, 8), slice_documents=3)


def test_windows_that_are_not_finite(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    encode = embedder.encode_passages

    def broken(texts, *arguments, **options):
        vectors, source = encode(texts, *arguments, **options)
        vectors[source == 2] = np.inf
        return vectors, source

    monkeypatch.setattr(embedder, "encode_passages", broken)
    with pytest.raises(ValueError, match=naming("window", "document", "'d2'", "finite")):
        mine(embedder, make_dataset(), ranks=(1, 9), passages=(6, 4))
