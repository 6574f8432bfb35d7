"""run.py: what a run refuses, how it sorts, and round trips."""

import numpy as np
import pytest
from naming import naming

from embedft.retrieval.run import Run


def make(indices, scores, query_ids=("q1", "q2"), document_ids=("a", "b", "c")):
    return Run(list(query_ids), list(document_ids), np.array(indices, dtype=np.int64), np.array(scores))


INF = np.inf


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (([[0, 1]], [[2.0, 1.0]]), ("[2, K]", "int64", "int64", (1, 2), ..., "float64", ..., (1, 2))),
        (([[0, 1], [1, 0]], [[2.0], [2.0]]), ("[2, K]", "int64", "int64", (2, 2), ..., "float64", ..., (2, 1))),
        (([0, 1], [2.0, 1.0]), ("[2, K]", "int64", "int64", (2,), ..., "float64", ..., (2,))),
        (([[0, 1], [1, 0]], np.array([[2, 1], [2, 1]], np.int32)), ("float", "int64", "int64", ..., "int32")),
        (([[0, 1], [1, 3]], [[2.0, 1.0]] * 2), ("'q2'", "index", 3)),
        (([[0, 1], [1, -2]], [[2.0, 1.0]] * 2), ("'q2'", "index", 3)),
        (([[0, 1], [-1, 1]], [[2.0, 1.0], [-INF, -INF]]), ("'q2'", "document", "empty")),
        (([[0, 1], [1, 0]], [[2.0, 1.0], [2.0, np.nan]]), ("'q2'", "score", "finite")),
        (([[0, 1], [1, 0]], [[INF, 1.0], [2.0, 1.0]]), ("'q1'", "score", "finite")),
        (([[0, 1], [1, -1]], [[2.0, 1.0], [2.0, 1.0]]), ("'q2'", "empty", "score", -INF)),
        (([[0, 1], [1, 0]], [[2.0, 1.0], [1.0, 2.0]]), ("'q2'", "score", "rank")),
        (([[0, 1], [1, 1]], [[2.0, 1.0]] * 2), ("'q2'", "document", "twice")),
        (([[0, 1], [1, 0]], [[2.0, 1.0]] * 2, ("q1", "q1")), ("query", "'q1'", "twice")),
        (([[0, 1], [1, 0]], [[2.0, 1.0]] * 2, ("q1", "q2"), ("a", "b", "a")), ("document", "'a'", "twice")),
    ],
)
def test_refuses(arguments, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        make(*arguments)


def test_several_empty_places_are_no_duplicates():
    run = make([[0, -1, -1], [-1, -1, -1]], [[1.0, -INF, -INF], [-INF] * 3])
    assert run.to_dict() == {"q1": {"a": 1.0}, "q2": {}}


def test_from_dict_orders_by_score_then_id():
    run = Run.from_dict({"q": {"b": 0.5, "c": 0.7, "a": 0.5}, "empty": {}})
    assert run.document_ids == ["a", "b", "c"]
    np.testing.assert_array_equal(run.indices, [[2, 0, 1], [-1, -1, -1]])
    np.testing.assert_array_equal(run.scores, [[0.7, 0.5, 0.5], [-INF, -INF, -INF]])
    assert list(run.to_dict()["q"]) == ["c", "a", "b"]


def test_from_dict_of_nothing():
    run = Run.from_dict({})
    assert run.indices.shape == (0, 0)
    assert run.to_dict() == {}
    assert Run.from_dict({"q": {}}).indices.shape == (1, 0)


def test_from_dict_refuses_scores_that_are_not_finite():
    with pytest.raises(ValueError, match=naming("'q'", "score", "finite")):
        Run.from_dict({"q": {"a": 1.0, "b": float("nan")}})


def test_select_reorders_and_adds_empty_rows():
    run = make([[0, 1], [2, -1]], np.array([[2.0, 1.0], [3.0, -INF]], dtype=np.float32))
    selected = run.select(["q2", "new", "q1"])
    assert selected.to_dict() == {"q2": {"c": 3.0}, "new": {}, "q1": {"a": 2.0, "b": 1.0}}
    assert selected.scores.dtype == np.float32
    assert run.query_ids == ["q1", "q2"]
    assert run.select([]).indices.shape == (0, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_trec_round_trip_is_exact(tmp_path, dtype):
    rng = np.random.default_rng(0)
    scores = -np.sort(-np.concatenate([rng.standard_normal((5, 9)), np.full((5, 2), 1e-30)], axis=1)).astype(dtype)
    indices = np.stack([rng.permutation(20)[:11] for _ in range(5)])
    run = Run([f"q{i}" for i in range(5)], [f"dok-ü{i}" for i in range(20)], indices, scores)
    run.save(tmp_path / "run.trec")
    loaded = Run.load(tmp_path / "run.trec")
    assert loaded.query_ids == run.query_ids
    for row, other in zip(loaded.to_dict().values(), run.to_dict().values(), strict=True):
        assert list(row.items()) == list(other.items())  # ties too, whose order is not by id here


def test_trec_lines(tmp_path):
    path = tmp_path / "run.trec"
    Run.from_dict({"q1": {"d2": 0.5, "d1": 1.0}, "none": {}}).save(path, tag="mine")
    assert path.read_text() == "q1 Q0 d1 1 1.0 mine\nq1 Q0 d2 2 0.5 mine\n"
    assert Run.load(path).to_dict() == {"q1": {"d1": 1.0, "d2": 0.5}}


def test_load_orders_by_score_and_skips_blank_lines(tmp_path):
    path = tmp_path / "run.trec"
    path.write_bytes(b"\xef\xbb\xbfq1\tQ0 d1 7 -1e-3 x\r\n\nq1 Q0 d2 8 2 x\nq2 Q0 d2 1 0 x\n")
    assert Run.load(path).to_dict() == {"q1": {"d2": 2.0, "d1": -0.001}, "q2": {"d2": 0.0}}


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("q1 Q0 d2 2 0.5", (5, "qid", "tag")),
        ("q1 Q0 d 2 2 0.5 x", (7, "qid", "tag")),
        ("q1 Q0 d2 2 high x", ("score", "'high'", "finite")),
        ("q1 Q0 d2 2 nan x", ("score", "'nan'", "finite")),
        ("q1 Q0 d1 2 0.5 x", ("'q1'", "'d1'", "twice")),
    ],
)
def test_load_names_the_line(tmp_path, line, facts):
    path = tmp_path / "run.trec"
    path.write_text(f"q1 Q0 d1 1 1.0 x\n{line}\n")
    with pytest.raises(ValueError, match=naming(path, 2, *facts)):
        Run.load(path)


def test_ids_with_whitespace_are_percent_encoded(tmp_path):
    path = tmp_path / "run.trec"
    results = {"my file.txt": {"100%": 2.0, "a\tb": 1.0, "": 0.5, "%": 0.25}, "ü\u2028%20": {"d\u3000": 1.0}}
    Run.from_dict(results).save(path, tag="my model")
    assert path.read_text().splitlines()[:3] == [
        "my%20file.txt Q0 100%25 1 2.0 my-model+percent-encoded",
        "my%20file.txt Q0 a%09b 2 1.0 my-model+percent-encoded",
        "my%20file.txt Q0 % 3 0.5 my-model+percent-encoded",
    ]
    assert Run.load(path).to_dict() == results


def test_ids_without_whitespace_are_written_as_they_are(tmp_path):
    path = tmp_path / "run.trec"
    results = {"q%20": {"100%25": 2.0, "%": 1.0}}
    Run.from_dict(results).save(path)
    assert path.read_text().splitlines()[0] == "q%20 Q0 100%25 1 2.0 embedft"
    assert Run.load(path).to_dict() == results


def test_identical_ids_are_left_out():
    results = {
        "a": {"a": 9.0, "b": 8.0, "c": 7.0},
        "b": {"c": 3.0, "b": 2.0},
        "c": {"a": 1.0},
        "q": {"a": 1.0},
        "d": {},
    }
    run = Run.from_dict(results)
    assert run.without_identical_ids({}).to_dict() == {
        "a": {"b": 8.0, "c": 7.0}, "b": {"c": 3.0}, "c": {"a": 1.0}, "q": {"a": 1.0}, "d": {},
    }  # fmt: skip
    assert run.to_dict() == results
    # A document that is judged relevant to the query with its id stays: the ids are equal by coincidence.
    kept = run.without_identical_ids({"a": {"a": 1}, "b": {"b": 0}}, depth=2)
    assert kept.to_dict() == {
        "a": {"a": 9.0, "b": 8.0}, "b": {"c": 3.0}, "c": {"a": 1.0}, "q": {"a": 1.0}, "d": {},
    }  # fmt: skip
    assert kept.indices.shape == (5, 2)
    single = Run(["a"], ["a", "b"], np.array([[0, 1]]), np.array([[1, 0.5]], dtype=np.float32))
    single = single.without_identical_ids({})
    assert (single.scores.dtype, single.indices.tolist()) == (np.float32, [[1, -1]])
