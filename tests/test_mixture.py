"""mixture.py: shares of the sources by hand, every example once in a source's own epoch, resumed = uninterrupted."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import get_args

import pytest
from naming import naming
from test_batches import keep_texts, pack_letters

from embedft import RetrievalDataset
from embedft.data.batches import Batches, make_batches
from embedft.data.mixture import Sampling, apportion, join_datasets, make_mixture

pytestmark = pytest.mark.filterwarnings("ignore:no_duplicates:UserWarning")


def pairs(name: str, number: int) -> RetrievalDataset:
    queries = {f"q{i}": f"{name} question {i}" for i in range(number)}
    corpus = {f"d{i}": f"{name} text {i}" for i in range(number)}
    return RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(number)})


SOURCES = {"large": pairs("large", 16), "small": pairs("small", 4)}


def mixture_of(batch_size: int = 2, seed: int = 0, datasets=SOURCES, **options) -> Batches:
    return make_mixture(datasets, keep_texts, batch_size=batch_size, seed=seed, **options)


def sources_of(mixture: Batches, epoch: int = 0) -> list[Counter]:
    return [Counter(batch.sources) for batch in mixture.epoch(epoch)]


def test_join_by_hand():
    a = RetrievalDataset(
        {"q": "one"}, {"d": "x", "e": "y"}, {"q": {"d": 2}}, {"q": ["e"]}, {"q": {"d": 0.5}}, {"e": "title"}
    )
    joined = join_datasets({"a": a, "b": pairs("b", 1)})
    assert joined == RetrievalDataset(
        {"a/q": "one", "b/q0": "b question 0"},
        {"a/d": "x", "a/e": "y", "b/d0": "b text 0"},
        {"a/q": {"a/d": 2}, "b/q0": {"b/d0": 1}},
        {"a/q": ["a/e"]},
        {"a/q": {"a/d": 0.5}},
        {"a/e": "title"},
    )


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, {"a": 1, "b": 1}, {"a": 5, "b": 5}),
        (10, {"a": 4, "b": 1}, {"a": 8, "b": 2}),
        (10, {"a": 1000, "b": 1}, {"a": 9, "b": 1}),  # at least one
        (3, {"a": 1, "b": 1, "c": 9}, {"a": 1, "b": 1, "c": 1}),
        (7, {"a": 1, "b": 1, "c": 1}, {"a": 3, "b": 2, "c": 2}),
    ],
)
def test_apportion_by_hand(total, weights, expected):
    assert apportion(total, weights) == expected
    assert sum(expected.values()) == total


def test_proportional_is_every_example_once():
    mixture = mixture_of()
    assert len(mixture) == 8 + 2
    for epoch in range(3):
        batches = list(mixture.epoch(epoch))
        assert len(batches) == 10
        assert all(len(set(batch.sources)) == 1 for batch in batches)
        assert sorted(i for batch in batches for i in batch.query_ids) == sorted(mixture.collate.dataset.queries)
    assert sources_of(mixture, 0) != sources_of(mixture, 1)  # the order of the sources is another


def test_round_robin_by_hand():
    """Two batches of each source per epoch, in turn; the large source continues in the next one and ends after four."""
    mixture = mixture_of(sampling="round_robin")
    assert len(mixture) == 4
    assert sources_of(mixture) == [{"large": 2}, {"small": 2}] * 2
    seen = Counter(i for epoch in range(4) for batch in mixture.epoch(epoch) for i in batch.query_ids)
    assert {i: number for i, number in seen.items() if i.startswith("large/")} == {f"large/q{i}": 1 for i in range(16)}
    assert {i: number for i, number in seen.items() if i.startswith("small/")} == {f"small/q{i}": 4 for i in range(4)}


@pytest.mark.parametrize(
    ("temperature", "expected"),
    # Of ten batches: 16 : 4; 16^(1/2) : 4^(1/2) = 4 : 2, so 6.67 : 3.33; 1 : 1.
    [(1, {"large": 8, "small": 2}), (2, {"large": 7, "small": 3}), (float("inf"), {"large": 5, "small": 5})],
)
def test_temperature_by_hand(temperature, expected):
    mixture = mixture_of(sampling="temperature", temperature=temperature)
    assert len(mixture) == 10
    for epoch in range(2):
        found = sources_of(mixture, epoch)
        assert all(len(batch) == 1 for batch in found)
        assert Counter(name for batch in found for name in batch) == expected
    seen = Counter(i for epoch in range(8) for batch in mixture.epoch(epoch) for i in batch.query_ids)
    # Eight epochs: so many batches of two of the large one's sixteen, and none of its examples twice as often.
    large = [number for i, number in seen.items() if i.startswith("large/")]
    assert sum(large) == 8 * expected["large"] * 2
    assert max(large) - min(large) <= 1


def test_mixed_and_proportional_is_the_union():
    """Its examples shuffled together, each once; doubles are found across sources."""
    mixture = mixture_of(4, mixed=True)
    assert len(mixture) == 5
    found = sources_of(mixture)
    assert sum(found, Counter()) == {"large": 16, "small": 4}
    assert any(len(batch) == 2 for batch in found)
    same = {"a": pairs("x", 3), "b": pairs("x", 3)}
    for batch in mixture_of(6, datasets=same, mixed=True, no_duplicates=True).epoch(0):
        assert len(set(batch.queries[1])) == len(batch.queries[1])


@pytest.mark.parametrize(
    ("sampling", "expected"), [("round_robin", {"large": 3, "small": 3}), ("temperature", {"large": 4, "small": 2})]
)
def test_mixed_shares_by_hand(sampling, expected):
    """Of a batch of six: three each, or 4 : 2. Four batches an epoch, of 20 pairs."""
    mixture = mixture_of(6, mixed=True, sampling=sampling)
    assert len(mixture) == 4
    for epoch in range(3):
        for batch, counts in zip(mixture.epoch(epoch), sources_of(mixture, epoch), strict=True):
            assert counts["large"] in (expected["large"], 16 % expected["large"])  # its own last batch
            assert 1 <= counts["small"] <= expected["small"]
            assert len(batch.document_ids) == len(batch.query_ids)
            positive, negative = batch.targets.masks()
            assert (positive.sum(dim=1) == 1).all()
            assert (negative.sum(dim=1) == len(batch.query_ids) - 1).all()  # of both sources


@pytest.mark.parametrize(
    ("batch_size", "sampling", "expected"),
    [
        # 20 and 3 pairs. Equal parts of five are 3 : 2.
        (5, "round_robin", (3, 2)),
        # 20^(1/2) : 3^(1/2) = 2.58 : 1, of six 4.32 : 1.68.
        (6, "temperature", (4, 2)),
        # Of three 2.16 : 0.84.
        (3, "temperature", (2, 1)),
        # Of two 1.44 : 0.56, but at least one of each.
        (2, "temperature", (1, 1)),
    ],
)
def test_mixed_shares_are_those_of_a_batch(batch_size, sampling, expected):
    datasets = {"large": pairs("large", 20), "small": pairs("small", 3)}
    mixture = mixture_of(batch_size, datasets=datasets, mixed=True, sampling=sampling)
    first = sources_of(mixture)[0]
    assert (first["large"], first["small"]) == expected


def test_mixed_shares_on_average():
    """Batches measured in tokens have their shares on average: 16 : 4 becomes 4 : 2, by the roots."""
    tokens = make_mixture(SOURCES, pack_letters, batch_tokens=200, seed=0, mixed=True, sampling="temperature")
    assert [tokens.sampler.samplers[name].batch_tokens for name in SOURCES] == [133, 67]


def test_tokens_are_counted_when_first_needed():
    """So that an embedder's max_length may be set after its batches are made."""

    def refuse(texts, *, role):
        raise AssertionError("too early")

    for mixed in (False, True):
        for sampling in get_args(Sampling):
            make_mixture(SOURCES, refuse, batch_tokens=200, seed=0, mixed=mixed, sampling=sampling)


@pytest.mark.parametrize("sampling", get_args(Sampling))
@pytest.mark.parametrize("mixed", [False, True])
def test_resumes_anywhere(sampling, mixed):
    def make(seed: int = 5) -> Batches:
        return mixture_of(3, seed, sampling=sampling, mixed=mixed, no_duplicates=True)

    def ids(batches) -> list:
        return [(batch.query_ids, batch.document_ids, batch.sources) for batch in batches]

    for epoch in (0, 3):
        whole = ids(make().epoch(epoch))
        assert len(whole) == len(make())
        for start in range(len(whole) + 1):
            mixture = make()
            list(islice(mixture.epoch(1), 2))
            assert ids(mixture.epoch(epoch, start=start)) == whole[start:]
    assert ids(make(6).epoch(0)) != ids(make().epoch(0))


def test_one_source_is_the_data_set_alone():
    mixture = mixture_of(5, datasets={"only": SOURCES["large"]})
    alone = make_batches(join_datasets({"only": SOURCES["large"]}), keep_texts, batch_size=5, seed=0)
    found = list(mixture.epoch(2))
    assert [batch.query_ids for batch in found] == [batch.query_ids for batch in alone.epoch(2)]
    assert [batch.sources for batch in found] == [["only"] * 5] * 3 + [["only"]]


def test_refuses_what_cannot_be_mixed():
    with pytest.raises(ValueError, match=naming("sampling", "random", "proportional", "round_robin", "temperature")):
        mixture_of(sampling="random")
    with pytest.raises(ValueError, match=naming("temperature", 0.5, 1)):
        mixture_of(temperature=0.5)
    with pytest.raises(ValueError, match=naming("batch_size", 1, 2, "source")):
        mixture_of(1, mixed=True, sampling="round_robin")
    unanswered = RetrievalDataset({"q": "a"}, {"d": "b"}, {"q": {"d": 0}})
    with pytest.raises(ValueError, match=naming("source", "'news'", "train")):
        mixture_of(datasets={**SOURCES, "news": unanswered})
    with pytest.raises(ValueError, match=naming("dataset", "none")):
        mixture_of(datasets={})
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match=naming("source", "name", f"'{name}'", "'/'")):
            mixture_of(datasets={name: SOURCES["small"]})
    with pytest.raises(ValueError, match=naming("batch_size", 2, 3, "source")):
        apportion(2, {"a": 1, "b": 1, "c": 1})


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("sampling", get_args(Sampling))
def test_a_source_may_have_no_hard_negatives(sampling, mixed):
    hard = replace(SOURCES["small"], negatives={"q0": ["d1", "d2"], "q1": ["d3"]})
    datasets = {"hard": hard, "plain": SOURCES["large"]}
    options = {"sampling": sampling, "mixed": mixed, "batch_size": 4}
    batches = list(mixture_of(datasets=datasets, num_negatives=2, **options).epoch(0))
    assert [batch.query_ids for batch in batches] == [
        batch.query_ids for batch in mixture_of(datasets=datasets, **options).epoch(0)
    ]
    for batch in batches:
        assert batch.targets.group.shape[1] == 3
        for query_id, listed in zip(batch.query_ids, batch.targets.group.tolist(), strict=True):
            names = [batch.document_ids[place] for place in listed[1:] if place >= 0]
            assert names == {"hard/q0": ["hard/d1", "hard/d2"], "hard/q1": ["hard/d3"]}.get(query_id, [])
    with pytest.raises(ValueError, match=naming("num_negatives", 3, 2)):
        mixture_of(datasets=datasets, num_negatives=3, **options)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("sampling", get_args(Sampling))
def test_texts_are_counted_once_for_all_sources(sampling, mixed):
    packed = []

    def pack(texts, *, role):
        packed.extend(texts)
        return pack_letters(texts, role=role)

    mixture = make_mixture(SOURCES, pack, batch_tokens=200, seed=0, sampling=sampling, mixed=mixed)
    assert len(mixture) >= 2
    mixture.sampler.plan(0)
    assert sorted(packed) == sorted(
        text for source in SOURCES.values() for part in (source.queries, source.corpus) for text in part.values()
    )
