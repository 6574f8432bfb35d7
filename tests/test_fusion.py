"""fusion.py: by hand, against plain dicts; ties, rows that are missing, what is refused."""

import math

import numpy as np
import pytest
from naming import naming

from embedft import Run, fuse


def random_run(rng, *, queries=8, documents=15, depth=6, levels=4):
    """Rows of any length up to `depth` with many ties, over some of the queries and documents."""
    names = [f"d{j}" for j in rng.permutation(documents)]
    results = {}
    for i in rng.permutation(queries)[: queries - 2]:
        chosen = rng.choice(names, size=rng.integers(0, depth + 1), replace=False)
        results[f"q{i}"] = {str(name): float(rng.integers(levels)) - 1.5 for name in chosen}
    run = Run.from_dict(results)
    place = np.array([*map(names.index, run.document_ids), -1])  # documents in any order, some never retrieved
    return Run(run.query_ids, names, place[run.indices], run.scores)


def plain_fusion(runs, method, weights, k=60):
    """{query: {document: score}} from dicts, one document at a time."""
    fused = {}
    for query in dict.fromkeys(query for run in runs for query in run.query_ids):
        rows = [run.to_dict().get(query, {}) for run in runs]
        fused[query] = {document: 0.0 for row in rows for document in row}
        for row, weight in zip(rows, weights, strict=True):
            if method == "rrf":
                values = {document: 1 / (k + rank) for rank, document in enumerate(row, start=1)}
                missing = 0.0
            else:
                mean, deviation = np.mean([*row.values(), 0][: len(row) or 1]), np.std([*row.values()] or [0])
                equal = len(set(row.values())) < 2
                values = {document: 0.0 if equal else (score - mean) / deviation for document, score in row.items()}
                missing = min(values.values(), default=0.0)
            for document in fused[query]:
                fused[query][document] += weight * values.get(document, missing)
    return fused


FIRST = Run.from_dict({"q": {"a": 9.0, "b": 5.0, "c": 1.0}})
SECOND = Run.from_dict({"q": {"c": 0.5, "d": 0.25}})


# By hand.


def test_reciprocal_ranks_by_hand():
    # a: 1/61; b: 1/62; c: 1/63 + 1/61; d: 1/62, behind b by its id.
    fused = fuse([FIRST, SECOND])
    assert fused.to_dict() == {"q": pytest.approx({"c": 1 / 63 + 1 / 61, "a": 1 / 61, "b": 1 / 62, "d": 1 / 62})}
    assert list(fused.to_dict()["q"]) == ["c", "a", "b", "d"]
    # With weights 1 and 3 and k 0: a 1; b 1/2; c 1/3 + 3; d 3/2.
    fused = fuse([FIRST, SECOND], method="rrf", weights=(1, 3), k=0)
    assert fused.to_dict() == {"q": pytest.approx({"c": 10 / 3, "d": 1.5, "a": 1.0, "b": 0.5})}
    assert list(fused.to_dict()["q"]) == ["c", "d", "a", "b"]


def test_z_scores_by_hand():
    # First: mean 5, deviations 4, 0, -4, standard deviation sqrt(32 / 3): z = sqrt(3/2), 0, -sqrt(3/2). Second: mean
    # 0.375, deviations of 0.125: z = 1, -1. d takes the lowest of the first, a and b the lowest of the second.
    z = math.sqrt(1.5)
    fused = fuse([FIRST, SECOND], method="zscore")
    assert fused.to_dict()["q"] == pytest.approx({"a": z - 1, "c": -z + 1, "b": -1, "d": -z - 1})
    assert list(fused.to_dict()["q"]) == ["a", "c", "b", "d"]
    fused = fuse([FIRST, SECOND], method="zscore", weights=[0.5, 2])
    assert fused.to_dict()["q"] == pytest.approx({"c": -z / 2 + 2, "a": z / 2 - 2, "b": -2, "d": -z / 2 - 2})


def test_equal_scores_say_nothing():
    # Three times 0.1: the floating-point mean is not 0.1, but z is still 0.
    equal = Run.from_dict({"q": {"a": 0.1, "b": 0.1, "c": 0.1}, "alone": {"c": 7.0}, "none": {}})
    other = Run.from_dict({"q": {"c": 2.0, "z": 1.0}, "alone": {"a": 3.0, "c": 1.0}, "none": {}})
    assert fuse([equal], method="zscore").to_dict() == {
        "q": {"a": 0.0, "b": 0.0, "c": 0.0},
        "alone": {"c": 0.0},
        "none": {},
    }
    fused = fuse([equal, other], method="zscore").to_dict()
    assert fused["q"] == pytest.approx({"c": 1.0, "a": -1.0, "b": -1.0, "z": -1.0})
    assert list(fused["q"]) == ["c", "a", "b", "z"]
    assert fused["alone"] == pytest.approx({"a": 1.0, "c": -1.0})
    # So close that the square of their distance is 0.
    close = Run.from_dict({"q": {"a": 2e-200, "b": 1e-200}})
    assert fuse([close], method="zscore").to_dict() == {"q": {"a": 0.0, "b": 0.0}}


def test_queries_and_documents_of_all_runs_are_kept():
    first = Run(["q2", "q1"], ["b", "unused", "a"], np.array([[0], [2]]), np.ones((2, 1)))
    second = Run.from_dict({"q3": {"c": 1.0}, "q1": {"c": 1.0}, "empty": {}})
    fused = fuse([first, second])
    assert fused.query_ids == ["q2", "q1", "q3", "empty"]
    assert fused.document_ids == ["a", "b", "c", "unused"]
    assert fused.to_dict() == {"q2": {"b": 1 / 61}, "q1": {"a": 1 / 61, "c": 1 / 61}, "q3": {"c": 1 / 61}, "empty": {}}


@pytest.mark.parametrize("method", ["rrf", "zscore"])
def test_nothing_to_fuse(method):
    nothing = Run.from_dict({})
    assert fuse([nothing, nothing], method=method).to_dict() == {}
    assert fuse([Run.from_dict({"q": {}}), nothing], method=method).to_dict() == {"q": {}}
    assert fuse([nothing, SECOND], method=method).to_dict()["q"].keys() == {"c", "d"}


def test_depth_cuts_after_fusion():
    assert list(fuse([FIRST, SECOND], depth=2).to_dict()["q"]) == ["c", "a"]
    assert fuse([FIRST, SECOND], depth=2).indices.shape == (1, 2)
    assert fuse([FIRST, SECOND], depth=99).indices.shape == (1, 4)  # no wider than the longest row
    assert fuse([FIRST, SECOND]).indices.shape == (1, 4)


# Against dicts, and properties.


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["rrf", "zscore"])
def test_equals_plain_dicts(method, seed):
    rng = np.random.default_rng(seed)
    runs = [random_run(rng) for _ in range(1 + seed % 4)]
    weights = [1 + seed % 2, *rng.integers(0, 4, size=len(runs) - 1)]
    k = [60, 0, 7.5][seed % 3]
    fused = fuse(runs, method=method, weights=weights, k=k, block_queries=3)
    results = plain_fusion(runs, method, weights, k)
    assert fused.query_ids == list(results)
    for query, row in fused.to_dict().items():
        assert row == pytest.approx(results[query], rel=1e-12, abs=1e-12)
        assert list(row) == [document for document, _ in sorted(row.items(), key=lambda item: (-item[1], item[0]))]
    cut = fuse(runs, method=method, weights=weights, k=k, depth=3).to_dict()
    assert cut == {query: dict(list(row.items())[:3]) for query, row in fused.to_dict().items()}


@pytest.mark.parametrize("method", ["rrf", "zscore"])
def test_the_order_of_runs_and_the_scale_of_weights_change_no_ranking(method):
    rng = np.random.default_rng(1)
    runs = [random_run(rng) for _ in range(4)]
    fused = fuse(runs, method=method).to_dict()
    turned = fuse(runs[::-1], method=method).to_dict()
    assert {query: list(row.items()) for query, row in turned.items()} == {q: list(r.items()) for q, r in fused.items()}
    scaled = fuse(runs, method=method, weights=[8] * 4).to_dict()  # a power of two: exact
    assert {query: list(row) for query, row in scaled.items()} == {query: list(row) for query, row in fused.items()}


def test_documents_that_swap_places_tie():
    # Ranks 1, 2, 3 and 3, 1, 2 in three runs: the same three numbers, whatever the order they are added in.
    runs = [Run.from_dict({"q": dict(zip(order, (3.0, 2.0, 1.0), strict=True))}) for order in ("zya", "ayz", "yza")]
    (row,) = fuse(runs, k=2).to_dict().values()
    assert row["a"] == pytest.approx(1 / 5 + 1 / 3 + 1 / 5)
    orders = ["xyz", "yzx", "zxy"]
    runs = [Run.from_dict({"q": dict(zip(order, (3.0, 2.0, 1.0), strict=True))}) for order in orders]
    for k in range(40):
        (row,) = fuse(runs, k=k).to_dict().values()
        assert list(row) == ["x", "y", "z"]
        assert len(set(row.values())) == 1


def test_z_scores_ignore_scale_and_shift():
    rng = np.random.default_rng(2)
    first, second = random_run(rng), random_run(rng)
    moved = Run(second.query_ids, second.document_ids, second.indices, second.scores * 1024 - 4096)
    (plain, other) = (fuse([first, run], method="zscore").to_dict() for run in (second, moved))
    for query, row in plain.items():
        assert other[query] == pytest.approx(row, abs=1e-9)


def test_runs_are_not_changed_and_may_be_float32():
    scores = np.array([[0.75, 0.5]], dtype=np.float32)
    run = Run(["q"], ["a", "b"], np.array([[1, 0]]), scores.copy())
    fused = fuse([run, run], method="zscore")
    assert fused.scores.dtype == np.float64
    assert fused.to_dict() == {"q": {"b": 2.0, "a": -2.0}}
    np.testing.assert_array_equal(run.scores, scores)


# What is refused.


@pytest.mark.parametrize(
    ("runs", "options", "facts"),
    [
        ([], {}, ("fusion", "no", "runs")),
        ([FIRST], {"method": "mean"}, ("fusion", "method", "'mean'", "rrf", "zscore")),
        ([FIRST, SECOND], {"weights": [1.0]}, ("fusion", "weights", [1.0], 2, "runs")),
        ([FIRST], {"weights": [[1.0]]}, ("fusion", "weights", [[1.0]], 1, "runs")),
        ([FIRST, SECOND], {"weights": [1, -0.5]}, ("fusion", "weights", [1.0, -0.5], "number", 0, 2, "runs")),
        ([FIRST, SECOND], {"weights": [0, 0]}, ("fusion", "weights", [0.0, 0.0], "all", 0, 0)),
        ([FIRST, SECOND], {"weights": [1, math.nan]}, ("fusion", "weights", "[1.0, nan]")),
        ([FIRST, SECOND], {"weights": [1, math.inf]}, ("fusion", "weights", "[1.0, inf]")),
        ([FIRST], {"k": -1}, ("fusion", "k", -1, 0)),
        ([FIRST], {"k": math.nan}, ("fusion", "k", "nan", 0)),
        ([FIRST], {"depth": 0}, ("fusion", "depth", 0, 1)),
    ],
)
def test_refuses(runs, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        fuse(runs, **options)
