"""targets.py: what is a positive, what a negative, and similarities, by hand."""

import dataclasses
import math

import pytest
import torch
from naming import naming

from embedft import Targets
from embedft.losses.pairwise import listed_scores, triplet
from embedft.losses.targets import over_windows, scores


def rows(*lines: str) -> torch.Tensor:
    """A bool matrix from lines of 0 and 1."""
    return torch.tensor([[character == "1" for character in line] for line in lines])


def test_masks_by_hand():
    """Query 0 lists document 0 and hard negative 2, and is known to be answered by 3; query 2 lists nothing."""
    targets = Targets(group=torch.tensor([[0, 2], [1, 3], [-1, -1]]), known=torch.tensor([[0, 3]]))
    positive, negative = targets.masks()
    assert torch.equal(positive, rows("1001", "0100", "0000"))
    assert torch.equal(negative, rows("0110", "1011", "1111"))
    assert torch.equal(targets.listed_positive, rows("10", "10", "00"))


def test_relevance_says_which_of_the_listed_are_positives():
    group = torch.tensor([[0, 1, 2], [2, 1, -1]])
    targets = Targets(group, relevance=torch.tensor([[0, 2, 1], [0, 0, 1]]))
    assert torch.equal(targets.listed_positive, rows("011", "000"))  # a document that is not there has no relevance
    assert torch.equal(targets.masks()[0], rows("011", "000"))
    assert torch.equal(
        Targets(group, relevance=torch.tensor([[0.0, 0.5, 0.0]] * 2)).listed_positive, rows("010", "010")
    )


def test_masks_of_every_direction_by_hand():
    """Queries 0 and 1 share document 0, of which 1 has hard negative 2; query 2 has 1 and 3, query 3 nothing."""
    targets = Targets(group=torch.tensor([[0, -1], [0, 2], [1, -1], [-1, -1]]), known=torch.tensor([[2, 3]]))
    positive, negative = targets.masks("document_query")
    assert torch.equal(positive, rows("1100", "0010", "0000", "0010"))
    assert torch.equal(negative, rows("0011", "1101", "1111", "1101"))
    positive, negative = targets.masks("query_query")
    assert torch.equal(positive, rows("0100", "1000", "0000", "0000"))
    assert torch.equal(negative, rows("0011", "0011", "1101", "1110"))
    positive, negative = targets.masks("document_document", num_documents=5)
    assert torch.equal(positive, rows("00000", "00010", "00000", "01000", "00000"))
    # Documents 0 and 2 are listed together, so they are neither.
    assert torch.equal(negative, rows("01011", "10101", "01011", "10101", "11110"))
    with pytest.raises(ValueError, match=naming("direction", "d2d", "query_document", "document_document")):
        targets.masks("d2d")


@pytest.mark.parametrize("seed", range(4))
def test_masks_between_queries_and_between_documents_equal_a_loop(seed):
    """Documents of many queries, queries of many documents, pairs that are listed and known as well."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(-1, 6, (8, 3), generator=generator)
    relevance = torch.randint(0, 2, group.shape, generator=generator)
    known = torch.stack([torch.randint(0, n, (6,), generator=generator) for n in (8, 6)], dim=1)
    targets = Targets(group, relevance, known)
    relevant = {(i, j) for i, j in known.tolist()}
    listed = set(relevant)
    for i in range(8):
        for j, grade in zip(group[i].tolist(), relevance[i].tolist(), strict=True):
            listed |= {(i, j)} if j >= 0 else set()
            relevant |= {(i, j)} if j >= 0 and grade > 0 else set()
    positive, negative = targets.masks("query_query")
    for i in range(8):
        for r in range(8):
            shared = any((i, j) in relevant and (r, j) in relevant for j in range(6))
            assert (positive[i, r], negative[i, r]) == (i != r and shared, i != r and not shared)
    positive, negative = targets.masks("document_document", num_documents=6)
    for p in range(6):
        for n in range(6):
            shared = any((i, p) in relevant and (i, n) in relevant for i in range(8))
            together = any((i, p) in listed and (i, n) in listed for i in range(8))
            assert (positive[p, n], negative[p, n]) == (p != n and shared, p != n and not together)


def test_listed_negatives():
    """Neither what is known to be relevant, nor what is listed as a positive too, nor what is not there."""
    targets = Targets(
        torch.tensor([[0, 1, 2], [2, 3, 2], [3, -1, 0]]),
        known=torch.tensor([[0, 2], [2, 1]]),
    )
    assert torch.equal(targets.listed_negative, rows("010", "010", "001"))
    graded = Targets(torch.tensor([[0, 1, 1]]), relevance=torch.tensor([[0, 1, 0]]))
    assert torch.equal(graded.listed_negative, rows("100"))
    assert Targets(torch.zeros(2, 0, dtype=torch.int64)).listed_negative.shape == (2, 0)


def test_some_of_the_queries():
    """Rows are numbered from 0 again, documents keep their numbers."""
    Q, D = torch.arange(4.0)[:, None], torch.arange(5.0)[:, None]
    targets = Targets(
        torch.tensor([[0], [1], [2], [3]]),
        torch.ones(4, 1),
        torch.tensor([[1, 3], [2, 0], [0, 2]]),
        torch.tensor([0, 1, 2, 3, 3]),
        torch.arange(4.0)[:, None],
        {"guide": (Q, D)},
    )
    some = targets.of_queries(1, 3)
    assert some.group.tolist() == [[1], [2]]
    assert some.relevance.shape == (2, 1)
    assert {(0, 3), (1, 0)} <= set(map(tuple, some.known.tolist()))
    assert some.target_scores.tolist() == [[1.0], [2.0]]
    assert some.references["guide"][0].tolist() == [[1.0], [2.0]]
    assert some.references["guide"][1] is D
    assert torch.equal(some.masks()[0], targets.masks()[0][1:3])
    assert Targets(torch.tensor([[0], [1]])).of_queries(1, 5).group.tolist() == [[1]]


def test_a_known_positive_is_none_of_the_hard_negatives():
    targets = Targets(group=torch.tensor([[0, 1]]), known=torch.tensor([[0, 1]]))
    assert torch.equal(targets.masks()[0], rows("11"))
    assert torch.equal(targets.listed_positive, rows("10"))


def test_masks_reach_to_the_documents_that_nobody_lists():
    targets = Targets(group=torch.tensor([[0], [1]]), known=torch.zeros(0, 2, dtype=torch.int64))
    assert torch.equal(targets.masks()[0], rows("10", "01"))
    assert torch.equal(targets.masks(num_documents=4)[0], rows("1000", "0100"))


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"group": torch.tensor([0, 1])}, ("group", (2,), "queries")),
        ({"relevance": torch.ones(2, 2)}, ("relevance", (2, 2), ..., "group", ..., (2, 1))),
        ({"known": torch.tensor([0, 1])}, ("known", (2,), "[pairs, 2]")),
        ({"known": torch.zeros(1, 3, dtype=torch.int64)}, ("known", (1, 3), "[pairs, 2]")),
        ({"document": torch.zeros(1, 3)}, ("document", (1, 3), "[document vectors]")),
        ({"target_scores": torch.ones(2)}, ("target_scores", (2,), "group", (2, 1))),
        ({"query": torch.tensor([0])}, ("query", (1,), "[queries]", "group")),
    ],
)
def test_refuses_wrong_shapes(fields, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        Targets(**({"group": torch.tensor([[0], [1]])} | fields))


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"group": torch.tensor([[0], [-2]])}, ("group", "document", -2, -1)),
        ({"known": torch.tensor([[0, 1], [-1, 0]])}, ("known", "query", -1, 0, 2)),
        ({"known": torch.tensor([[0, 1], [0, -3]])}, ("known", "document", -3, 0)),
        ({"known": torch.tensor([[3, 0]])}, ("known", "query", 3, 0, 2)),
        ({"document": torch.tensor([0, 1, 4])}, ("document", 3, 0, 4)),
        ({"document": torch.tensor([2, 2])}, ("document", 1, 2, 0)),
        ({"document": torch.tensor([1, 0, -1])}, ("document", 3, -1, 1, 0)),
        ({"document": torch.zeros(0, dtype=torch.int64)}, ("group", "document", 0, -1)),
        ({"document": torch.tensor([0, 0])}, ("group", "document", 1, -1)),
        ({"document": torch.tensor([0, 1]), "known": torch.tensor([[0, 3]])}, ("known", "document", 3, 0, 2)),
    ],
)
def test_refuses_numbers_of_nothing(fields, facts):
    fields = {"group": torch.tensor([[0], [1]])} | fields
    with pytest.raises(ValueError, match=naming(*facts)):
        Targets(**fields)
    # A look at the numbers would make the CPU wait for another device.
    Targets(**{name: x.to("meta") for name, x in fields.items()})


def test_refuses_documents_that_there_are_not():
    """As soon as somebody says how many there are."""
    targets = Targets(torch.tensor([[0, 4], [1, -1]]), known=torch.tensor([[0, 5]]))
    Q, D = torch.ones(2, 3), torch.ones(6, 3)
    for ask in (
        lambda num: targets.num_documents(num),
        lambda num: targets.masks(num_documents=num),
        lambda num: targets.masks("document_document", num_documents=num),
        lambda num: scores(Q, D[:num], targets),
        lambda num: listed_scores(Q, D[:num], targets),
        lambda num: triplet(Q, D[:num], targets),
    ):
        ask(6)
        with pytest.raises(ValueError, match=naming("known", "document", 5, 0)):
            ask(5)
        with pytest.raises(ValueError, match=naming("group", "document", 4, -1)):
            ask(4)


def test_rows_of_one_query_by_hand():
    """Rows 0 and 2 are query 7, with documents 0 and 2; row 1 is query 3, with 1 and hard negative 2; row 3 is known to
    be answered by 2, and lists nothing."""
    group, known = torch.tensor([[0, -1], [1, 2], [2, 3], [-1, -1]]), torch.tensor([[3, 2]])
    targets = Targets(group, known=known, query=torch.tensor([7, 3, 7, 5]))
    positive, negative = targets.masks(num_documents=4)
    assert torch.equal(positive, rows("1010", "0100", "1010", "0010"))
    assert torch.equal(negative, ~positive)
    assert all(torch.equal(x, y.T) for x, y in zip(targets.masks("document_query"), (positive, negative), strict=True))
    # Row 3 shares document 2 with query 7: with row 0, which does not list it, too.
    positive, negative = targets.masks("query_query")
    assert torch.equal(positive, rows("0011", "0000", "1001", "1010"))
    assert torch.equal(negative, rows("0100", "1011", "0100", "0100"))
    # 0, 2 and hard negative 3 are listed for query 7; 1 and 2 for query 3.
    positive, negative = targets.masks("document_document")
    assert torch.equal(positive, rows("0010", "0000", "1000", "0000"))
    assert torch.equal(negative, rows("0100", "1001", "0000", "0100"))
    # Some of the rows know what the others list.
    assert torch.equal(targets.of_queries(0, 2).masks(num_documents=4)[0], rows("1010", "0100"))
    assert targets.of_queries(2, 4).query.tolist() == [7, 5]
    # A document is no hard negative of a query that another row has it as a positive of.
    twice = Targets(torch.tensor([[0, 1], [1, 2]]), query=torch.tensor([0, 0]))
    assert torch.equal(twice.listed_negative, rows("00", "01"))


@pytest.mark.parametrize("seed", range(4))
def test_a_query_of_several_rows_is_a_known_query(seed):
    """The same masks as with every pair that is relevant to one of a query's rows known of all of them."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(-1, 9, (8, 2), generator=generator)
    relevance = torch.randint(0, 2, group.shape, generator=generator)
    query = torch.randint(0, 4, (8,), generator=generator)
    targets = Targets(group, relevance, torch.tensor([[0, 3], [5, 8]]), query=query)
    pairs = dataclasses.replace(targets, query=None).masks(num_documents=9)[0].nonzero().tolist()
    known = [(r, j) for i, j in pairs for r in range(8) if query[i] == query[r]]
    spelt = Targets(group, relevance, torch.tensor(known))
    same = query[:, None] == query
    for direction in ("query_document", "document_query"):
        for ours, theirs in zip(targets.masks(direction), spelt.masks(direction), strict=True):
            assert torch.equal(ours, theirs)
    positive = (spelt.masks("query_query")[0] | same).fill_diagonal_(False)
    assert torch.equal(targets.masks("query_query")[0], positive)
    assert torch.equal(targets.masks("query_query")[1], (~positive).fill_diagonal_(False))
    for start in range(0, 8, 3):
        part = targets.of_queries(start, start + 3).masks(num_documents=9)[0]
        assert torch.equal(part, spelt.masks(num_documents=9)[0][start : start + 3])
    different = Targets(group, relevance, targets.known, query=torch.arange(8).flip(0))
    plain = Targets(group, relevance, targets.known)
    for direction in ("query_document", "query_query", "document_document"):
        assert all(torch.equal(*pair) for pair in zip(different.masks(direction), plain.masks(direction), strict=True))


def test_to_moves_every_tensor():
    one = torch.tensor([[1]])
    zero = torch.zeros_like(one)
    moved = Targets(zero, one, torch.tensor([[0, 0]]), zero[0], one, {"base": (one, one)}, one[0]).to("meta")
    for field in dataclasses.fields(Targets):
        value = getattr(moved, field.name)
        for tensor in value["base"] if field.name == "references" else [value]:
            assert tensor.device.type == "meta"
    moved = Targets(torch.tensor([[0]])).to("meta")
    assert (moved.known, moved.document, moved.query, moved.references) == (None, None, None, {})


def test_cosine_and_dot_by_hand():
    Q, D = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0], [-3.0, -4.0]])
    targets = Targets(torch.tensor([[0], [1]]))
    torch.testing.assert_close(scores(Q, D, targets), torch.tensor([[0.6, 0.8, -1.0], [0.0, 0.0, 0.0]]))
    assert scores(Q, D, targets, similarity="dot").tolist() == [[6.0, 20.0, -25.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=naming("similarity", "euclid", "cosine", "dot")):
        scores(Q, D, targets, similarity="euclid")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_becomes_float32(dtype):
    Q = torch.tensor([[300.0, 400.0]], dtype=dtype)  # its squared length is beyond float16
    result = scores(Q, Q, Targets(torch.tensor([[0]])))
    assert result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(result, torch.ones_like(result))


def test_windows_by_hand():
    """Document 0 has windows of similarity 0.6 and 0.8, document 1 one of 0; then 8 and 6, and 10."""
    Q = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    D = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])
    targets = Targets(torch.tensor([[0], [1]]), document=torch.tensor([0, 1, 0]))
    found = scores(Q, D, targets, similarity="dot")
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.0], [8.0, 10.0]]))
    # Weights of e^0.6 and e^0.8 at temperature 1; one window stays what it is.
    found = over_windows(Q[:1] @ D.T, targets.of_queries(0, 1), windows="softmax", temperature=1.0)
    share = 1 / (1 + math.exp(0.8 - 0.6))
    torch.testing.assert_close(found, torch.tensor([[0.6 * share + 0.8 * (1 - share), 0.0]]))
    # At 0.05 the difference of 2 counts as 40.
    found = scores(Q[1:], D, targets.of_queries(1, 2), similarity="dot", windows="softmax")
    torch.testing.assert_close(found, torch.tensor([[8.0, 10.0]]))
    assert targets.num_documents(3) == 2
    assert Targets(torch.tensor([[0]])).num_documents(3) == 3
    with pytest.raises(ValueError, match=naming("document", 3, "D", 2)):
        scores(Q, D[:2], targets)
    with pytest.raises(ValueError, match=naming("windows", "mean", "max", "softmax")):
        scores(Q, D, targets, windows="mean")


@pytest.mark.parametrize("windows", ["max", "softmax"])
def test_gradients_through_windows(windows):
    Q, D = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 6))
    targets = Targets(torch.tensor([[0]] * 3), document=torch.tensor([2, 0, 1, 0, 0, 2]))
    inputs = Q.requires_grad_(), D.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, d: scores(q, d, targets, windows=windows), inputs)
