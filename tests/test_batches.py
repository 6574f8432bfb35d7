"""batches.py: each pair once per epoch, in the reference's order; each document once per batch, no false negatives."""

import random
import time
import warnings
from dataclasses import replace
from itertools import islice

import pytest
import torch
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset
from embedft.data.batches import Batches
from embedft.data.batches import make_batches as batches_of
from embedft.data.sampler import Sampler
from embedft.encoders.packing import pack

pytestmark = pytest.mark.filterwarnings("ignore:no_duplicates:UserWarning")


def keep_texts(texts, *, role):
    """Stands for `Embedder.pack`: what would be packed."""
    return role, list(texts)


def make_batches(dataset: RetrievalDataset, batch_size: int = 4, seed: int = 0, **options) -> Batches:
    return batches_of(dataset, keep_texts, batch_size=batch_size, seed=seed, **options)


def many_to_many(seed: int, num_queries: int = 13, num_documents: int = 10) -> RetrievalDataset:
    """1 to 4 relevant documents per query, graded, some judged 0; two hard negatives each."""
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


def test_a_document_that_is_the_query_is_not_its_negative():
    """ArguAna, where arguments are queries and documents: the query of one pair is the answer in another."""
    queries, corpus = {"a": "first argument", "b": "second argument"}, {"c": "second argument", "d": "third argument"}
    dataset = RetrievalDataset(queries, corpus, {"a": {"c": 1}, "b": {"d": 1}}, {"a": ["d"]})
    (batch,) = make_batches(dataset, 2, num_negatives=1).epoch(0)
    _, negative = batch.targets.masks(num_documents=2)
    shown = zip(batch.query_ids, negative.tolist(), strict=True)
    found = {(q, d) for q, row in shown for d, is_negative in zip(batch.document_ids, row, strict=True) if is_negative}
    assert found == {("a", "d")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_negatives", [0, 2])
def test_no_relevant_document_is_ever_a_negative(seed, num_negatives):
    """The promise to the loss, for every kind of batch: `negative` holds only what the qrels do not call relevant."""
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


@pytest.mark.parametrize("start", [-1, 10])
def test_a_start_outside_of_the_epoch_is_refused(start):
    with pytest.raises(ValueError, match=naming("start", start, 0, 9)):
        next(make_batches(many_to_many(seed=1)).epoch(2, start=start))


def test_does_not_draw_from_the_global_generator():
    before = torch.get_rng_state()
    list(make_batches(many_to_many(seed=0)).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_warns_when_one_text_makes_all_batches_smaller():
    """A context of 5 rows out of 12: in batches of 4 the five need five batches."""
    queries = {f"q{i}": f"question {i}" for i in range(12)}
    corpus = {f"d{i}": "the same" if i < 5 else f"text {i}" for i in range(12)}
    dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(12)})
    with pytest.warns(UserWarning, match=naming("no_duplicates", 5, ..., 2, ..., 3, ..., 4)):
        assert len(make_batches(dataset, 4, no_duplicates=True)) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(make_batches(dataset, 2, no_duplicates=True)) == 6
        assert len(make_batches(dataset, 4)) == 3


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
    with pytest.raises(ValueError, match=naming("training", "pair", "relevant")):
        make_batches(RetrievalDataset({"q": "a"}, {"d": "b"}, {"q": {"d": 0}}))
    with pytest.raises(ValueError, match=naming("batch_size", 0, 1)):
        make_batches(dataset, 0)
    with pytest.raises(ValueError, match=naming("num_negatives", 2, 1)):
        make_batches(dataset, num_negatives=2)
    with pytest.raises(ValueError, match=naming("num_negatives", 1, 0)):
        make_batches(replace(dataset, negatives={}), num_negatives=1)
    assert len(make_batches(dataset)) == 1


def test_a_query_may_have_fewer_hard_negatives():
    """Three, one and none: every batch's list has the same width, padded where nothing is listed."""
    dataset = RetrievalDataset(
        queries={"q": "a", "r": "b", "s": "c"},
        corpus={d: f"text of {d}" for d in "defgh"},
        qrels={"q": {"d": 1}, "r": {"e": 1}, "s": {"f": 1}},
        negatives={"q": ["g", "e", "h"], "s": ["g"]},
    )
    batches = make_batches(dataset, num_negatives=2)
    batch = batches.collate([("q", "d"), ("r", "e"), ("s", "f")])
    assert batch.document_ids == ["d", "e", "f", "g"]
    assert batch.targets.group.tolist() == [[0, 3, 1], [1, -1, -1], [2, 3, -1]]
    assert batch.targets.listed_negative.tolist() == [[False, True, True], [False] * 3, [False, True, False]]
    assert batches.collate([("r", "e")]).targets.group.tolist() == [[0, -1, -1]]
    of_two = make_batches(dataset, 2, num_negatives=2, no_duplicates=True)
    assert sorted(pair for batch in of_two.epoch(0) for pair in pairs_of(batch)) == sorted(relevant_pairs(dataset))


def pack_letters(texts, *, role):
    """Stands in for `Embedder.pack` where lengths matter: one token per letter, plus two."""
    return pack([[1, *map(ord, text), 2] for text in texts])


def letters(lengths: list[int]) -> RetrievalDataset:
    """Query i has 1 letter and its document lengths[i] of them: lengths[i] + 5 tokens per pair."""
    queries = {f"q{i}": chr(ord("A") + i % 25) for i in range(len(lengths))}
    corpus = {f"d{i}": "x" * length for i, length in enumerate(lengths)}
    return RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(len(lengths))})


def plan_ids(batches: Batches, epoch: int = 0) -> list[list[str]]:
    return [[batches.examples[row][0] for row in rows] for rows in batches.sampler.plan(epoch)]


def texts_of(batches: Batches, rows: list[int]) -> list[set[str]]:
    """The content of each row of a batch."""
    dataset, found = batches.collate.dataset, []
    for query_id, document_id in (batches.examples[row] for row in rows):
        documents = [document_id, *dataset.negatives.get(query_id, [])[: batches.collate.num_negatives]]
        found.append({dataset.queries[query_id], *(batches.collate.dataset.texts[i] for i in documents)})
    return found


def with_doubles(seed: int, num_pairs: int, num_queries: int, num_documents: int, negatives: int = 0):
    """Pairs whose query and document texts repeat, under ids of their own."""
    generator = random.Random(seed)
    queries = {f"q{i}": f"question {generator.randrange(num_queries)}" for i in range(num_pairs)}
    corpus = {f"d{i}": f"text {generator.randrange(num_documents)}" for i in range(num_pairs)}
    hard = (
        {
            f"q{i}": [f"d{j}" for j in generator.sample([j for j in range(num_pairs) if j != i], negatives)]
            for i in range(num_pairs)
        }
        if negatives
        else {}
    )
    return RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(num_pairs)}, hard)


# No duplicates.


def test_no_duplicates_by_hand():
    """Eight pairs, two sharing a context, in batches of four: those two are separated, and no other pair moves."""
    corpus = {f"d{i}": f"context {min(i, 6)}" for i in range(8)}
    dataset = RetrievalDataset(
        {f"q{i}": f"question {i}" for i in range(8)}, corpus, {f"q{i}": {f"d{i}": 1} for i in range(8)}
    )
    for epoch in range(20):
        first, second = plan_ids(make_batches(dataset, 4, no_duplicates=True), epoch)
        assert len(first) == len(second) == 4
        assert ("q6" in first) != ("q7" in first)
        order = [f"q{i}" for i in torch.randperm(8, generator=torch.Generator().manual_seed(epoch)).tolist()]
        others = [q for q in order if q not in ("q6", "q7")]
        assert [q for q in first + second if q in others] == others


@pytest.mark.parametrize(
    "shape", [(60, 50, 50), (60, 30, 60), (60, 60, 6), (40, 5, 8), (30, 1, 30), (7, 1, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("batch_size", [1, 4, 16, 100])
@pytest.mark.parametrize("negatives", [0, 2])
def test_no_text_stands_twice_in_a_batch(shape, batch_size, negatives):
    negatives = negatives if shape[0] > 2 else 0
    dataset = with_doubles(1, *shape, negatives=negatives)
    batches = make_batches(dataset, batch_size, no_duplicates=True, num_negatives=negatives)
    for epoch in range(3):
        plan = batches.sampler.plan(epoch)
        assert sorted(row for rows in plan for row in rows) == list(range(shape[0]))
        assert len(plan) == len(batches)
        assert min(map(len, plan)) >= 1
        for rows in plan:
            texts = texts_of(batches, rows)
            assert sum(map(len, texts)) == len(set().union(*texts))
        if not negatives:
            assert max(map(len, plan)) <= batch_size + 1


@pytest.mark.parametrize("size", [1, 3, 20])
def test_an_example_waits_for_the_first_batch_that_can_take_it(size):
    """Placed as by trying every batch in turn, from the natural one; if none has room, in the least full."""
    items = [{f"a{(row * row) % 23}", f"b{row // 4}"} for row in range(120)]
    sampler = Sampler(
        120, seed=0, batch_tokens=3 * size, tokens=lambda: [1 + row % size for row in range(120)], apart=items
    )
    rows, natural = list(range(120)), [row * len(sampler) // 120 for row in range(120)]
    held, loads, placed = [set() for _ in range(len(sampler))], [0] * len(sampler), []
    for row, first in zip(rows, natural, strict=True):
        turns = [k % len(sampler) for k in range(first, first + len(sampler))]
        free = [k for k in turns if held[k].isdisjoint(items[row])]
        with_room = [k for k in free if loads[k] < 3 * size]
        batch = with_room[0] if with_room else min(sorted(free), key=loads.__getitem__)
        held[batch] |= items[row]
        loads[batch] += 1 + row % size
        placed.append(batch)
    assert sampler._place_apart(rows, natural) == (placed, loads)


def test_rows_that_share_texts_are_spread_over_the_epoch():
    """Ten texts of two rows each among 100 rows: by chance about two of these 20 rows in each of ten batches."""
    corpus = {f"d{i}": f"text {i // 2 if i < 20 else i}" for i in range(100)}
    queries = {f"q{i}": f"question {i}" for i in range(100)}
    batches = make_batches(
        RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(100)}), 10, no_duplicates=True
    )
    for epoch in range(5):
        counts = [sum(row < 20 for row in rows) for rows in batches.sampler.plan(epoch)]
        assert (sum(counts), len(counts)) == (20, 10)
        assert max(counts) <= 6


def test_a_query_and_another_querys_document_of_the_same_text_are_apart():
    queries, corpus = {"a": "how to", "b": "where to"}, {"c": "where to", "d": "there"}
    dataset = RetrievalDataset(queries, corpus, {"a": {"c": 1}, "b": {"d": 1}})
    assert len(make_batches(dataset, 2, no_duplicates=True)) == 2


def test_without_doubles_no_duplicates_changes_nothing():
    dataset = letters(list(range(1, 24)))
    for epoch in range(3):
        assert plan_ids(make_batches(dataset, 4), epoch) == plan_ids(
            make_batches(dataset, 4, no_duplicates=True), epoch
        )


def test_a_few_doubles_leave_full_batches():
    """130 pairs in 32s, of which 20 share their context with another: still five batches, the last of what is left."""
    corpus = {f"d{i}": f"context {i - 10 if 10 <= i < 20 else i}" for i in range(130)}
    queries, qrels = {f"q{i}": f"question {i}" for i in range(130)}, {f"q{i}": {f"d{i}": 1} for i in range(130)}
    plan = make_batches(RetrievalDataset(queries, corpus, qrels), 32, no_duplicates=True).sampler.plan(0)
    sizes = sorted(map(len, plan))
    assert sizes[0] <= 4
    assert 30 <= sizes[1] <= sizes[-1] == 32


@pytest.mark.parametrize("batch_size", [32, 8192])
def test_no_duplicates_takes_linear_time(batch_size):
    """Ten questions per context, 8,000 and 32,000 questions: four times the pairs take 4 times as long, not 16."""
    seconds = []
    for num_pairs in (8_000, 32_000):
        corpus = {f"d{i}": f"context {i}" for i in range(num_pairs // 10)}
        queries = {f"q{i}": f"question {i}" for i in range(num_pairs)}
        dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i // 10}": 1} for i in range(num_pairs)})
        batches = make_batches(dataset, batch_size, no_duplicates=True)
        start = time.process_time()
        plan = batches.sampler.plan(0)
        seconds.append(time.process_time() - start)
        # 8,000 in 8,192s would be one batch, but ten questions of a context need ten.
        assert len(plan) == max(-(-num_pairs // batch_size), 10)
        assert max(map(len, plan)) <= batch_size
    assert seconds[1] < 8 * seconds[0] + 0.5


# By tokens.


def test_tokens_by_hand():
    """Eight pairs of 10 tokens, 30 a batch: 80 tokens are three batches, cut behind tokens 26, 53 and 80.

    The pairs end at 10, 20 | 30, 40, 50 | 60, 70, 80.
    """
    batches = batches_of(letters([5] * 8), pack_letters, batch_tokens=30, seed=0)
    assert [len(rows) for rows in batches.sampler.plan(0)] == [2, 3, 3]
    assert len(batches) == 3


@pytest.mark.parametrize("batch_tokens", [1, 40, 200, 10_000])
@pytest.mark.parametrize("options", [{}, {"no_duplicates": True}])
def test_batches_by_tokens(batch_tokens, options):
    generator = random.Random(3)
    lengths = [generator.randint(1, 40) for _ in range(50)]
    batches = batches_of(letters(lengths), pack_letters, batch_tokens=batch_tokens, seed=1, **options)
    total, longest = sum(lengths) + 5 * 50, max(lengths) + 5
    if options.get("no_duplicates") and batch_tokens == 10_000:
        assert 2 <= len(batches) <= 6  # a text stands in up to four pairs, and some share two
    else:
        assert len(batches) == min(50, -(-total // batch_tokens))
    for epoch in range(3):
        plan = batches.sampler.plan(epoch)
        assert sorted(row for rows in plan for row in rows) == list(range(50))
        assert len(plan) == len(batches)
        assert min(map(len, plan)) >= 1
        if not options.get("no_duplicates") and batch_tokens > 1:
            assert max(sum(lengths[row] + 5 for row in rows) for rows in plan) < total / len(plan) + longest


def test_hard_negatives_count_as_tokens():
    dataset = letters([5] * 8)
    negatives = {f"q{i}": [f"d{(i + 1) % 8}"] for i in range(8)}  # 7 more tokens per pair: 136
    dataset = RetrievalDataset(dataset.queries, dataset.corpus, dataset.qrels, negatives)
    assert len(batches_of(dataset, pack_letters, batch_tokens=30, seed=0, num_negatives=1)) == 5


def test_the_real_tokenizer_counts(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    dataset = make_dataset(12, 9)
    batches = batches_of(dataset, embedder.pack, batch_tokens=60, seed=0)
    embedder.max_length = 8  # as late as this: the texts are counted with the first batch
    tokens = [
        len(b.queries.input_ids)
        + sum(
            len(embedder.pack([batches.collate.dataset.texts[b.document_ids[c]]], role="document").input_ids)
            for c in b.targets.group[:, 0].tolist()
        )
        for b in batches.epoch(0)
    ]
    assert sum(tokens) == int(batches.sampler._sizes_P.sum())
    assert len(tokens) == -(-sum(tokens) // 60)


# Resuming, with any option.


@pytest.mark.parametrize(
    "options",
    [
        {"no_duplicates": True},
        {"batch_size": None, "batch_tokens": 50},
        {"no_duplicates": True, "batch_size": None, "batch_tokens": 50, "num_negatives": 2},
        {"examples": "queries"},
    ],
)
def test_resumes_with_every_option(options):
    options = {"batch_size": 4, **options}

    def make(seed: int = 3) -> Batches:
        return batches_of(many_to_many(seed=2), pack_letters, seed=seed, **options)

    whole = list(make().epoch(1))
    assert len(whole) == len(make())
    for start in range(len(whole) + 1):
        batches = make()
        list(islice(batches.epoch(0), 2))  # what was asked before does not matter
        resumed = list(batches.epoch(1, start=start))
        assert [batch.query_ids for batch in resumed] == [batch.query_ids for batch in whole[start:]]
        for a, b in zip(resumed, whole[start:], strict=True):
            assert torch.equal(a.documents.input_ids, b.documents.input_ids)
            assert torch.equal(a.targets.group, b.targets.group)
    assert [b.query_ids for b in make(4).epoch(1)] != [b.query_ids for b in whole]
    assert [b.query_ids for b in make().epoch(2)] != [b.query_ids for b in whole]


# What is listed.

JUDGED = RetrievalDataset(
    queries={"q": "one", "r": "two", "s": "three"},
    corpus={i: f"text {i}" for i in "abcde"},
    qrels={"q": {"a": 1, "b": 3, "c": 0}, "r": {"c": 2}},
    negatives={"q": ["d"], "r": ["a"]},
    scores={"q": {"a": 0.9, "b": 0.5, "d": -1}, "r": {"c": 0.25, "a": 0.125}, "s": {"e": 0.0, "a": 4.5}},
)


def test_all_documents_of_a_query_by_hand():
    batches = make_batches(JUDGED, 2, examples="queries", num_negatives=1, target_scores=True)
    assert batches.examples == [("q", None), ("r", None)]
    batch = batches.collate(batches.examples)
    assert batch.document_ids == ["a", "c", "b", "d"]
    assert batch.targets.group.tolist() == [[0, 2, 3], [1, 0, -1]]
    assert batch.targets.relevance.tolist() == [[1, 3, 0], [2, 0, 0]]
    torch.testing.assert_close(batch.targets.target_scores, torch.tensor([[0.9, 0.5, -1], [0.25, 0.125, 0]]))
    assert sorted(batch.targets.known.tolist()) == [[0, 0], [0, 2], [1, 1]]
    positive, negative = batch.targets.masks(num_documents=4)
    assert positive.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert negative.tolist() == [[False, True, False, True], [True, False, True, True]]


def test_scored_pairs_by_hand():
    """Relevant or not, and for queries without qrels."""
    batches = make_batches(JUDGED, 7, examples="scored")
    assert batches.examples == [("q", "a"), ("q", "b"), ("q", "d"), ("r", "c"), ("r", "a"), ("s", "e"), ("s", "a")]
    batch = batches.collate(batches.examples)
    assert batch.document_ids == ["a", "b", "d", "c", "e"]
    assert batch.targets.group.tolist() == [[0], [1], [2], [3], [0], [4], [0]]
    assert batch.targets.relevance.tolist() == [[1], [3], [0], [2], [0], [0], [0]]
    expected = torch.tensor([[0.9], [0.5], [-1], [0.25], [0.125], [0], [4.5]])
    torch.testing.assert_close(batch.targets.target_scores, expected)
    assert batch.targets.target_scores.dtype is torch.float32
    # Nothing is known of s: a batch of it alone has no known pair.
    assert batches.collate([("s", "e")]).targets.known.shape == (0, 2)
    negatives = make_batches(replace(JUDGED, qrels={}), 5, examples="scored")
    assert len(negatives.examples) == 7


def test_rows_of_one_query_say_so():
    """Pairs and scored pairs; where every query has one row nothing is said."""
    dataset = replace(JUDGED, negatives={})
    batches = make_batches(dataset, 7, examples="scored")
    batch = batches.collate(batches.examples)
    query = batch.targets.query
    assert [(query == number).tolist() for number in query] == [
        [other == query_id for other in batch.query_ids] for query_id in batch.query_ids
    ]
    assert query.dtype is torch.int64
    assert batches.collate([("q", "a"), ("r", "c")]).targets.query is None
    pairs = make_batches(dataset).collate([("q", "a"), ("r", "c"), ("q", "b")])
    assert pairs.targets.query.tolist() == [0, 1, 0]
    assert not pairs.targets.masks("query_query")[1][0, 2]


def test_a_scored_hard_negative_is_listed_once():
    batches = make_batches(replace(JUDGED, scores={"q": JUDGED.scores["q"]}), examples="scored", num_negatives=1)
    batch = batches.collate([("q", "a"), ("q", "d")])
    assert batch.document_ids == ["a", "d"]
    assert batch.targets.group.tolist() == [[0, 1], [1, -1]]


def test_pairs_have_neither_relevance_nor_scores_unless_asked_for():
    batch = make_batches(JUDGED, num_negatives=1).collate([("q", "b"), ("r", "c")])
    assert (batch.targets.relevance, batch.targets.target_scores, batch.sources) == (None, None, None)
    batch = make_batches(JUDGED, num_negatives=1, target_scores=True).collate([("q", "b"), ("r", "c")])
    assert batch.targets.relevance is None
    assert batch.targets.target_scores.tolist() == [[0.5, -1], [0.25, 0.125]]


def test_refuses_options_that_cannot_be():
    with pytest.raises(ValueError, match=naming("batch_size", 4, "batch_tokens", 9)):
        make_batches(JUDGED, 4, batch_tokens=9)
    with pytest.raises(ValueError, match=naming("batch_size", "batch_tokens", None)):
        make_batches(JUDGED, None)
    with pytest.raises(ValueError, match=naming("batch_tokens", 0, 1)):
        make_batches(JUDGED, None, batch_tokens=0)
    with pytest.raises(ValueError, match=naming("num_negatives", -1, 0)):
        make_batches(JUDGED, num_negatives=-1)
    with pytest.raises(ValueError, match=naming("examples", "rows", "pairs", "queries", "scored")):
        make_batches(JUDGED, examples="rows")
    unscored = replace(JUDGED, scores={"q": {"a": 1.0}})
    with pytest.raises(ValueError, match=naming("query", "'q'", "score", "document", "'b'")):
        make_batches(unscored, target_scores=True)
    with pytest.raises(ValueError, match=naming("training", "pair", "scored")):
        make_batches(replace(JUDGED, scores={}), examples="scored")


# Parts that can be replaced.


class Backwards:
    """A sampler of one's own: the examples from last to first."""

    def __init__(self, num_examples: int, batch_size: int):
        self.order, self.batch_size = list(range(num_examples))[::-1], batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def plan(self, epoch: int) -> list[list[int]]:
        return [self.order[first : first + self.batch_size] for first in range(0, len(self.order), self.batch_size)]


def test_a_sampler_by_tokens_needs_them():
    with pytest.raises(ValueError, match=naming("batch_tokens", 64, "tokens")):
        Sampler(8, seed=0, batch_tokens=64)


def test_the_sampler_alone_can_be_replaced():
    batches = make_batches(many_to_many(seed=0))
    other = Batches(batches.examples, Backwards(len(batches.examples), 5), batches.collate)
    pairs = [pair for batch in other.epoch(3) for pair in pairs_of(batch)]
    assert pairs == relevant_pairs(many_to_many(seed=0))[::-1]
    assert len(other) == len(list(other.epoch(0))) == -(-len(pairs) // 5)
    assert [b.query_ids for b in other.epoch(0, start=2)] == [b.query_ids for b in other.epoch(0)][2:]


def test_collate_alone_can_be_replaced():
    batches = make_batches(many_to_many(seed=0))
    drawn = []
    other = Batches(batches.examples, batches.sampler, lambda examples, *, draw: drawn.append(draw) or examples)
    rows = [rows for epoch in (0, 2) for rows in batches.sampler.plan(epoch)]
    found = [examples for epoch in (0, 2) for examples in other.epoch(epoch)]
    assert found == [[batches.examples[row] for row in batch] for batch in rows]
    assert drawn == [(epoch, place) for epoch in (0, 2) for place in range(len(batches))]


def test_the_examples_alone_can_be_replaced():
    batches = make_batches(many_to_many(seed=0))
    examples = batches.examples[::3]
    other = Batches(examples, Sampler(len(examples), batch_size=4, seed=0), batches.collate)
    assert sorted(pair for batch in other.epoch(1) for pair in pairs_of(batch)) == sorted(examples)


# Documents of equal text.


def test_documents_of_equal_text_are_one_document():
    dataset = RetrievalDataset(
        queries={"q1": "when?", "q2": "who?", "q3": "where?"},
        corpus={"d1": "the mill", "d2": "the mill", "d3": "elsewhere", "d4": "mill", "d5": "the mill"},
        qrels={"q1": {"d1": 1}, "q2": {"d2": 1, "d4": 1}, "q3": {"d3": 1, "d5": 1}},
        negatives={"q2": ["d3", "d5"]},
        titles={"d4": "the"},
    )
    examples = [("q1", "d1"), ("q2", "d2"), ("q3", "d3")]
    batch = make_batches(dataset, 3, num_negatives=2).collate(examples)
    assert batch.document_ids == ["d1", "d3"]
    assert batch.documents == ("document", ["the mill", "elsewhere"])
    assert batch.targets.group.tolist() == [[0, -1, -1], [0, 1, -1], [1, -1, -1]]
    positive, negative = batch.targets.masks(num_documents=2)
    assert positive.tolist() == [[True, False], [True, False], [True, True]]
    assert negative.tolist() == [[False, True], [False, True], [False, False]]
    # A title belongs to the text: "the" and "mill" are the same document, too.
    assert make_batches(dataset).collate([("q1", "d1"), ("q2", "d4")]).document_ids == ["d1"]


def test_listed_documents_of_equal_text_are_listed_once():
    dataset = RetrievalDataset(
        queries={"q": "who?"},
        corpus={"d1": "a", "d2": "a", "d3": "b"},
        qrels={"q": {"d1": 3, "d2": 1, "d3": 2}},
        scores={"q": {"d1": 0.5, "d2": 0.25, "d3": 0.125}},
    )
    (batch,) = make_batches(dataset, 1, examples="queries", target_scores=True).epoch(0)
    assert batch.document_ids == ["d1", "d3"]
    assert batch.targets.group.tolist() == [[0, 1]]
    assert batch.targets.relevance.tolist() == [[3, 2]]
    assert batch.targets.target_scores.tolist() == [[0.5, 0.125]]
