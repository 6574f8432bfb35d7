"""references.py: vectors for a batch's ids in any order; what it refuses; what it adds to the targets."""

import dataclasses

import numpy as np
import pytest
import torch
from naming import naming
from tiny import make_dataset, make_embedder

from embedft.data.batches import make_batches
from embedft.training.references import FrozenEmbeddings, targets_with


@pytest.fixture
def embedder(tmp_path):
    return make_embedder(tmp_path / "base")


def make_batch(embedder):
    dataset = make_dataset(11, 9, negatives=2)
    return next(make_batches(dataset, embedder.pack, batch_size=4, seed=0, num_negatives=2).epoch(0))


def test_rows_are_those_of_the_ids(embedder):
    """In the batch's order, repeated where the batch repeats an id."""
    dataset = make_dataset(11, 9, negatives=2)
    batch = make_batch(embedder)._replace(query_ids=["q2", "q0", "q2"], document_ids=["d8"])
    Q, D = FrozenEmbeddings(embedder, dataset)(batch)
    queries = embedder.encode(list(dataset.queries.values()), role="query")
    np.testing.assert_array_equal(Q, queries[[2, 0, 2]])
    np.testing.assert_array_equal(D, embedder.encode(list(dataset.texts.values()), role="document")[[8]])


def test_encode_gives_the_vectors_of_the_batch(embedder):
    """What the embedder gives to the same packed texts, without dropout."""
    batch, dataset = make_batch(embedder), make_dataset(11, 9, negatives=2)
    frozen = FrozenEmbeddings(embedder, dataset)
    with torch.no_grad():
        expected = embedder.embed_pair(batch.queries, batch.documents)
    for found, vectors in zip(frozen(batch), expected, strict=True):
        torch.testing.assert_close(found, vectors, rtol=0, atol=1e-6)


def test_encode_uses_titles_prompts_and_dimensions(embedder):
    embedder.prompts = {"query": "q: ", "document": "d: "}
    dataset = make_dataset(3, 3)
    titled = dataclasses.replace(dataset, titles={"d0": "order"})
    frozen = FrozenEmbeddings(embedder, titled, dim=8)
    np.testing.assert_array_equal(
        frozen.embeddings["query"], embedder.encode([*dataset.queries.values()], role="query", dim=8)
    )
    documents = embedder.encode(list(titled.texts.values()), role="document", dim=8)
    np.testing.assert_array_equal(frozen.embeddings["document"], documents)
    assert frozen.embeddings["document"].shape == (3, 8)


def test_an_unknown_id_is_named(embedder):
    frozen = FrozenEmbeddings(embedder, make_dataset(2, 2))
    batch = make_batch(embedder)
    unknown = next(query_id for query_id in batch.query_ids if query_id not in ("q0", "q1"))
    with pytest.raises(ValueError, match=naming("query", unknown, 2)):
        frozen(batch)


def test_targets_keep_what_they_had(embedder):
    batch = make_batch(embedder)
    base = torch.zeros(4, 2), torch.zeros(len(batch.document_ids), 2)
    batch = batch._replace(targets=dataclasses.replace(batch.targets, references={"base": base}))
    frozen = FrozenEmbeddings(embedder, make_dataset(11, 9))
    targets = targets_with({"guide": frozen}, batch)
    assert targets.references.keys() == {"base", "guide"}
    assert targets.references["base"] is base
    assert torch.equal(targets.references["guide"][0], frozen(batch)[0])
    assert targets.group is batch.targets.group
    assert batch.targets.references.keys() == {"base"}  # the batch's own are as they were
    assert targets_with({}, batch) is batch.targets
