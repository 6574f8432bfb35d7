"""batches.py: every pair once an epoch, in the reference's order; a document once a batch, nobody's own a negative."""

import random
from itertools import islice

import pytest
import torch

from embedft import RetrievalDataset
from embedft.data.batches import Batches


def keep_texts(texts, *, role):
    """Stands for `Embedder.pack`: what would be packed."""
    return role, list(texts)


def make_batches(dataset: RetrievalDataset, batch_size: int = 4, seed: int = 0, **options) -> Batches:
    return Batches(dataset, keep_texts, batch_size=batch_size, seed=seed, **options)


def many_to_many(seed: int, num_queries: int = 13, num_documents: int = 10) -> RetrievalDataset:
    """1 to 4 relevant documents a query, graded, some judged 0; two hard negatives each."""
    generator = random.Random(seed)
    corpus = {f"d{j}": f"document {j}" for j in range(num_documents)}
    qrels, negatives = {}, {}
    for i in range(num_queries):
        documents = generator.sample(list(corpus), k=8)
        num_relevant = generator.randint(1, 4)
        grades = {d: generator.randint(1, 3) for d in documents[:num_relevant]} | {documents[5]: 0}
        qrels[f"q{i}"] = dict(sorted(grades.items()))
        negatives[f"q{i}"] = documents[6:]
    return RetrievalDataset({q: f"query {q}" for q in qrels}, corpus, qrels, negatives)


def pairs_of(batch) -> list[tuple[str, str]]:
    """(query, its positive) of every row, read from the targets."""
    return [
        (query_id, batch.document_ids[place])
        for query_id, place in zip(batch.query_ids, batch.targets.group[:, 0].tolist(), strict=True)
    ]


def relevant_pairs(dataset: RetrievalDataset) -> list[tuple[str, str]]:
    return [(q, d) for q, grades in dataset.qrels.items() for d, grade in grades.items() if grade > 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_negatives", [0, 2])
def test_no_relevant_document_is_ever_a_negative(seed, num_negatives):
    """The promise to the loss, over everything a batch can be: `negative` is what the qrels do not call relevant."""
    dataset = many_to_many(seed)
    for batch in make_batches(dataset, 6, seed, num_negatives=num_negatives).epoch(0):
        assert len(set(batch.document_ids)) == len(batch.document_ids)
        positive, negative = batch.targets.masks(num_documents=len(batch.document_ids))
        for row, query_id in enumerate(batch.query_ids):
            relevant = [dataset.qrels[query_id].get(document_id, 0) > 0 for document_id in batch.document_ids]
            assert positive[row].tolist() == relevant
            assert negative[row].tolist() == [not x for x in relevant]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 1000])
def test_an_epoch_is_every_pair_once(batch_size):
    dataset = many_to_many(seed=0)
    batches = make_batches(dataset, batch_size)
    epoch = list(batches.epoch(0))
    pairs = [pair for batch in epoch for pair in pairs_of(batch)]
    assert sorted(pairs) == sorted(relevant_pairs(dataset))
    assert len(epoch) == len(batches) == -(-len(pairs) // batch_size)
    assert [len(batch.query_ids) for batch in epoch[:-1]] == [batch_size] * (len(epoch) - 1)
    assert 0 < len(epoch[-1].query_ids) <= batch_size  # the last batch may be smaller, and is kept


def test_the_order_is_that_of_the_reference():
    dataset = many_to_many(seed=0)
    pairs = relevant_pairs(dataset)
    for epoch in (0, 3):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(17 + epoch))
        found = [pair for batch in make_batches(dataset, seed=17).epoch(epoch) for pair in pairs_of(batch)]
        assert found == [pairs[i] for i in order]


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_start_goes_on_where_an_epoch_was_left(start):
    batches = make_batches(many_to_many(seed=1), num_negatives=1)
    assert len(batches) == 9
    for whole, resumed in zip(islice(batches.epoch(2), start, None), batches.epoch(2, start=start), strict=True):
        assert whole.query_ids == resumed.query_ids
        assert (whole.queries, whole.documents) == (resumed.queries, resumed.documents)
        assert torch.equal(whole.targets.group, resumed.targets.group)
        assert torch.equal(whole.targets.known, resumed.targets.known)


def test_does_not_draw_from_the_global_generator():
    before = torch.get_rng_state()
    list(make_batches(many_to_many(seed=0)).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_columns_by_hand():
    """All positives, then all first hard negatives, then all second ones; what is there already is not repeated."""
    dataset = RetrievalDataset(
        queries={"q0": "zero", "q1": "one", "q2": "two"},
        corpus={d: f"text of {d}" for d in "abcdefg"},
        qrels={"q0": {"a": 1, "g": 1}, "q1": {"b": 2, "e": 0}, "q2": {"a": 1}},
        negatives={"q0": ["c", "d", "e"], "q1": ["a", "c"], "q2": ["f", "g"]},
        titles={"b": "Title"},
    )
    batch = make_batches(dataset, num_negatives=2).collate([("q0", "a"), ("q1", "b"), ("q2", "a")])
    assert batch.document_ids == ["a", "b", "c", "f", "d", "g"]
    texts = ["text of a", "Title text of b", "text of c", "text of f", "text of d", "text of g"]
    assert batch.documents == ("document", texts)
    assert batch.queries == ("query", ["zero", "one", "two"])
    assert batch.targets.group.tolist() == [[0, 2, 4], [1, 0, 2], [0, 3, 5]]
    # g, a hard negative of q2, is known to answer q0.
    assert sorted(batch.targets.known.tolist()) == [[0, 0], [0, 5], [1, 1], [2, 0]]
    assert batch.targets.group.dtype is batch.targets.known.dtype is torch.int64


def test_a_document_is_there_once_however_many_questions_share_it():
    queries = {f"q{i}": f"question {i}" for i in range(6)}
    dataset = RetrievalDataset(queries, {"d": "the document"}, {query_id: {"d": 1} for query_id in queries})
    (batch,) = make_batches(dataset, 6).epoch(0)
    assert batch.documents == ("document", ["the document"])
    assert batch.targets.group.tolist() == [[0]] * 6
    assert not batch.targets.masks()[1].any()


def test_refuses_what_cannot_be_trained_on():
    dataset = RetrievalDataset({"q": "a", "r": "b"}, {"d": "c", "e": "f"}, {"q": {"d": 1}, "r": {"d": 1}}, {"q": ["e"]})
    with pytest.raises(ValueError, match="no pair of a query and a document relevant to it"):
        make_batches(RetrievalDataset({"q": "a"}, {"d": "b"}, {"q": {"d": 0}}))
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        make_batches(dataset, 0)
    with pytest.raises(ValueError, match="query 'r' has 0 hard negatives, num_negatives is 1"):
        make_batches(dataset, num_negatives=1)
    with pytest.raises(ValueError, match="query 'q' has 1 hard negatives, num_negatives is 2"):
        make_batches(dataset, num_negatives=2)
    assert len(make_batches(dataset)) == 1
