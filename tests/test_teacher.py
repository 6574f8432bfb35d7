"""teacher.py: scores by hand, of each kind of model and of several together; what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset, load_teacher, new_scorer
from embedft.retrieval import teacher as module
from embedft.retrieval.bm25 import Bm25Index, bm25_run, split_words
from embedft.retrieval.teacher import Pairs, Teacher, Vectors, Words

LISTED = {"q0": ["d0", "d3", "d1"], "q2": ["d2"], "q1": []}


class Table:
    """Vectors from a table, {text: vector}, of any length."""

    similarity = "dot"

    def __init__(self, table: dict[str, list[float]]):
        self.table = table

    def encode(self, texts, *, role, dim):
        return np.array([self.table[text] for text in texts], dtype=np.float32)

    def encode_passages(self, texts, passages, *, role, dim):
        """Each word is a window."""
        words = [(row, word) for row, text in enumerate(texts) for word in text.split()]
        return self.encode([w for _, w in words], role=role, dim=dim), np.array([row for row, _ in words])

    def sha256(self):
        return str(self.table)


@pytest.fixture
def corpus() -> RetrievalDataset:
    """Two questions, three documents of one or two words."""
    return RetrievalDataset({"q0": "up", "q1": "right"}, {"a": "x", "b": "x y", "c": "y"}, {"q0": {"a": 1}})


@pytest.fixture
def table() -> Table:
    return Table({"up": [0, 2], "right": [1, 0], "x": [3, 1], "y": [0, 5], "x y": [-1, -1]})


def score(part, dataset, listed, scale="raw") -> dict:
    return dict(Teacher({"part": part}, {"part": 1.0}, scale).score_lists(dataset, listed))


def test_vectors_by_hand(corpus, table):
    """Inner products, not cosines: up is (0, 2), right (1, 0)."""
    listed = {"q0": ["a", "b", "c"], "q1": ["c", "a"]}
    found = score(Vectors(table), corpus, listed)
    assert found == {"q0": {"a": 2.0, "b": -2.0, "c": 10.0}, "q1": {"c": 0.0, "a": 3.0}}
    # The best window: of b, x and y, it is y for up and x for right.
    found = score(Vectors(table, (1, 1)), corpus, {"q0": ["b", "a"], "q1": ["b"]})
    assert found == {"q0": {"b": 10.0, "a": 2.0}, "q1": {"b": 3.0}}


def test_z_scores_by_hand(corpus, table):
    """2, -2 and 5 - 5 + 0: mean 0, squares 4, 4 and 0, so the deviation is sqrt(8 / 3)."""
    table.table["y"] = [0, 0]
    deviation = math.sqrt(8 / 3)
    found = score(Vectors(table), corpus, {"q0": ["a", "b", "c"], "q1": ["a"]}, "zscore")
    assert found["q0"] == pytest.approx({"a": 2 / deviation, "b": -2 / deviation, "c": 0.0})
    assert found["q1"] == {"a": 0.0}


def test_the_mean_of_two_is_weighted(corpus, table):
    """Weights of 1 and 3 are a quarter and three quarters. Two documents' z-scores are 1 and -1 always."""
    other = Table({"up": [1, 0], "right": [1, 0], "x": [1, 0], "y": [9, 0], "x y": [5, 0]})
    listed = {"q0": ["a", "b"]}
    parts, weights = {"first": Vectors(table), "second": Vectors(other)}, {"first": 1, "second": 3}
    raw = dict(Teacher(parts, weights, "raw").score_lists(corpus, listed))
    assert raw["q0"] == {"a": 0.25 * 2 + 0.75 * 1, "b": 0.25 * -2 + 0.75 * 5}
    together = dict(Teacher(parts, weights).score_lists(corpus, listed))
    assert together["q0"] == pytest.approx({"a": 0.25 - 0.75, "b": 0.75 - 0.25})
    # The weight of a single part changes nothing.
    alone = dict(Teacher({"first": parts["first"]}, {"first": 7}).score_lists(corpus, listed))
    assert alone["q0"] == pytest.approx({"a": 1.0, "b": -1.0})


def test_an_embedder_scores_as_its_vectors(tmp_path):
    embedder, dataset = make_embedder(tmp_path / "base"), make_dataset()
    found = score(Vectors(embedder), dataset, LISTED)
    assert list(found) == ["q0", "q2", "q1"]
    assert found["q1"] == {}
    for query_id, scores in found.items():
        for document_id, value in scores.items():
            q = embedder.encode([dataset.queries[query_id]], role="query")[0]
            assert value == pytest.approx(q @ embedder.encode([dataset.texts[document_id]])[0], abs=1e-6)
    windows = score(Vectors(embedder, (4, 2)), dataset, LISTED)
    vectors_WD, _ = embedder.encode_passages([dataset.texts["d3"]], (4, 2))
    q = embedder.encode([dataset.queries["q0"]], role="query")[0]
    assert len(vectors_WD) > 1
    assert windows["q0"]["d3"] == pytest.approx((vectors_WD @ q).max(), abs=1e-6)
    smaller_WD, _ = embedder.encode_passages([dataset.texts["d3"]], (3, 1))
    both = score(Vectors(embedder, (4, 2, 3, 1)), dataset, LISTED)["q0"]["d3"]
    assert both == pytest.approx(((vectors_WD @ q).max() + (smaller_WD @ q).max()) / 2, abs=1e-6)
    # Truncated as the model is.
    embedder.truncate_dim = 8
    q, d = embedder.encode([dataset.queries["q0"]], role="query")[0], embedder.encode([dataset.texts["d3"]])[0]
    assert score(Vectors(embedder), dataset, LISTED)["q0"]["d3"] == pytest.approx(q @ d, abs=1e-6)


def test_bm25_scores_as_its_run(tmp_path):
    dataset = make_dataset()
    listed = {query_id: list(dataset.corpus) for query_id in dataset.queries}
    for how in ({}, {"ngram": 2, "k1": 0.5, "b": 1.0}):
        (words,) = load_teacher("bm25", bm25=how).parts.values()
        found, run = score(words, dataset, listed), bm25_run(dataset, **how).to_dict()
        assert words.search(dataset, 4).to_dict() == bm25_run(dataset, depth=4, **how).to_dict()
        for query_id, scores in found.items():
            assert {i: value for i, value in scores.items() if value} == pytest.approx(run[query_id])
            assert len(scores) == 9
        assert any(0.0 in scores.values() for scores in found.values())
    assert run != bm25_run(dataset).to_dict()
    index = Bm25Index(split_words(["a b", "c", "a"]))
    found, rows = (x[0] for x in index.search([["a"]], 3))
    np.testing.assert_array_equal(rows, [2, 0, -1])  # the shorter document first
    np.testing.assert_array_equal(index.score(["a", "z"]), [found[1], 0, found[0]])


def test_a_cross_encoder_gives_logits(tmp_path):
    dataset, scorer = make_dataset(), new_scorer(make_embedder(tmp_path / "base"))
    assert scorer.sigmoid
    found = score(Pairs(scorer), dataset, LISTED)
    pairs = [(dataset.queries["q0"], dataset.texts[i]) for i in LISTED["q0"]]
    expected = scorer.score(pairs, sigmoid=False)
    np.testing.assert_allclose(list(found["q0"].values()), expected, atol=1e-6)
    with pytest.raises(ValueError, match=naming("cross-encoder", "rank")):
        Pairs(scorer).search(dataset, 5)


def test_from_the_middle_is_as_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_A_TIME", 2)
    dataset, scorer = make_dataset(), new_scorer(make_embedder(tmp_path / "base"))
    teacher = Teacher({"pairs": Pairs(scorer), "bm25": Words()}, {"pairs": 1, "bm25": 2})
    listed = {query_id: ["d0", "d1", "d2"] for query_id in dataset.queries}
    whole = list(teacher.score_lists(dataset, listed))
    assert [query_id for query_id, _ in whole] == list(dataset.queries)
    assert list(teacher.score_lists(dataset, listed, first=4)) == whole[4:]


def test_search(tmp_path):
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    scorer = new_scorer(make_embedder(tmp_path / "base"))
    one = Teacher({"bm25": Words(), "pairs": Pairs(scorer)}, {"bm25": 1, "pairs": 1}).search(dataset, 3)
    assert one.to_dict() == bm25_run(dataset, depth=3).to_dict()
    both = Teacher({"bm25": Words(), "vectors": Vectors(embedder)}, {"bm25": 1e6, "vectors": 1e-6}).search(dataset, 2)
    first = {query_id: next(iter(row)) for query_id, row in bm25_run(dataset, depth=2).to_dict().items()}
    assert {query_id: next(iter(row)) for query_id, row in both.to_dict().items()} == first
    assert both.indices.shape == (12, 2)


def test_models_are_told_apart(tmp_path):
    make_embedder(tmp_path / "base")
    new_scorer(make_embedder(tmp_path / "base")).save(tmp_path / "scorer")
    names = {str(tmp_path / "base"): 1.0, str(tmp_path / "scorer"): 2.0, "bm25": 0.5}
    teacher = load_teacher(names, passages=(4, 2), device="cpu", store=tmp_path / "store")
    assert [type(part) for part in teacher.parts.values()] == [Vectors, Pairs, Words]
    assert teacher.weights == names
    first = teacher.parts[str(tmp_path / "base")]
    assert first.passages == (4, 2)
    assert first.embedder.store.folder == tmp_path / "store"
    assert list(load_teacher("bm25").parts) == ["bm25"]


def test_hashes_tell_models_and_windows_apart(tmp_path, table):
    embedder = make_embedder(tmp_path / "base")
    found = [Vectors(embedder), Vectors(embedder, (4, 2)), Vectors(embedder, (4, 3)), Vectors(table), Words()]
    found += [Vectors(embedder, (4, 2, 3, 1)), Vectors(embedder, (3, 1, 4, 2))]
    found += [Words(ngram=2), Words(k1=1.0), Words(b=1.0), Pairs(new_scorer(make_embedder(tmp_path / "base")))]
    assert len({part.sha256() for part in found}) == 11
    assert Words(1, 1.5, 0.75).sha256() == Words().sha256()
    before = Vectors(embedder).sha256()
    assert Vectors(make_embedder(tmp_path / "base"), None).sha256() == before
    with torch.no_grad():
        next(embedder.parameters())[0] += 1
    assert Vectors(embedder).sha256() != before


def test_hashes_tell_precisions_apart(tmp_path):
    """So that lists scored on a GPU, in bfloat16, are not those of a CPU."""
    embedder = make_embedder(tmp_path / "base")
    before, plain = Vectors(embedder).sha256(), embedder.sha256()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embedder.sha256() == plain
        assert Vectors(embedder).sha256() != before
    assert Vectors(embedder).sha256() == before
    embedder.truncate_dim = 4
    assert Vectors(embedder).sha256() != before


@pytest.mark.parametrize(
    ("weights", "facts"),
    [
        ({}, ("weights",)),
        ({"bm25": 0.0}, ("bm25", 0.0, 0)),
        ({"bm25": -1}, ("bm25", -1, 0)),
        ({"bm25": math.inf}, ("bm25", math.inf)),
        ({"bm25": True}, ("bm25", True)),
        ({"bm25": "1"}, ("bm25", "'1'")),
    ],
)
def test_weights_that_are_none(weights, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        load_teacher(weights)


def test_weights_without_a_finite_sum():
    """Each is above 0 and finite, but its share of the sum would be 0, and so would every score."""
    with pytest.raises(ValueError, match=naming("teacher", "weights", 1e308, 9e307, "sum")):
        Teacher({"a": Words(), "b": Words()}, {"a": 1e308, "b": 9e307})


def test_models_that_cannot_be_used(tmp_path, corpus, table):
    with pytest.raises(ValueError, match=naming(tmp_path / "none")):
        load_teacher({"bm25": 1, str(tmp_path / "none"): 1})
    with pytest.raises(ValueError, match=naming("api", "openai:")):
        load_teacher("bm25", api={"price": 1})
    with pytest.raises(ValueError, match=naming("passages", 4, "bm25")):
        load_teacher("bm25", passages=(4, 2))
    for wrong, facts in (
        ({"ngram": 0}, ("ngram", 0, 1)),
        ({"b": 1.5}, ("b", 1.5, 0, 1)),
        ({"k1": "high"}, ("k1", "'high'", "float")),
        ({"n": 2}, ("'n'", "ngram", "k1", "b")),
    ):
        with pytest.raises(ValueError, match=naming("teacher", "bm25", *facts)):
            load_teacher("bm25", bm25=wrong)
    make_embedder(tmp_path / "base")
    with pytest.raises(ValueError, match=naming("bm25", "'ngram'", 2, tmp_path / "base")):
        load_teacher(str(tmp_path / "base"), bm25={"ngram": 2})
    without_windows = type("Alone", (), {"similarity": "dot", "encode": table.encode})()
    with pytest.raises(ValueError, match=naming("passages", "windows")):
        score(Vectors(without_windows, (4, 2)), corpus, {"q0": ["a"]})
    table.table["x"] = [math.nan, 0]
    with pytest.raises(ValueError, match=naming("a", "finite")):
        score(Vectors(table), corpus, {"q0": ["a"]})


def test_a_score_that_is_no_number_is_named(corpus):
    class Broken(Words):
        def scoring(self, dataset, listed):
            return lambda some: {i: dict.fromkeys(ids, math.inf) for i, ids in some.items()}

    with pytest.raises(ValueError, match=naming("part", "q0", "finite")):
        score(Broken(), corpus, {"q0": ["a"]})


def test_nothing_listed_asks_nobody(corpus):
    class Silent(Words):
        def scoring(self, dataset, listed):
            raise AssertionError("asked")

    assert score(Silent(), corpus, {"q0": [], "q1": []}) == {"q0": {}, "q1": {}}
    assert score(Silent(), replace(corpus), {}) == {}
