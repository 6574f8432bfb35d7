"""endpoint.py: vectors by index, from numbers and base64, by hand; malformed vectors and replies."""

import base64
import struct

import pytest
from naming import names, naming

from embedft.api.endpoint import decode, embeddings_in_order


def packed(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def read(*pairs) -> list:
    """The vectors of a reply with these (index, embedding), as lists; "absent" leaves the index out."""
    data = [
        {"embedding": vector} if index == "absent" else {"index": index, "embedding": vector} for index, vector in pairs
    ]
    return [decoded(value) for value in embeddings_in_order({"data": data}, len(pairs))]


def decoded(value) -> list[float] | str:
    try:
        return decode(value).tolist()
    except ValueError as error:
        return str(error)


def test_a_reply_by_hand():
    """Two texts, the second first: numbers for one, base64 for the other."""
    assert read((1, [3.0, 4]), (0, packed(0.5, -2.0))) == [[0.5, -2.0], [3.0, 4.0]]
    assert decode([1]).dtype == "float64"


@pytest.mark.parametrize("absent", ["absent", None])
def test_an_index_that_is_left_out(absent):
    """Everywhere: the order of the texts. Where it is 0: the one that is left, wherever it stands."""
    assert read((absent, [1.0]), (absent, [2.0])) == [[1.0], [2.0]]
    assert read((absent, [1.0]), (1, [2.0]), (2, [3.0])) == [[1.0], [2.0], [3.0]]
    assert read((2, [3.0]), (1, [2.0]), (absent, [1.0])) == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [
        ((0, 0), 0),
        ((1, 2), 2),
        ((0, -1), -1),
        ((0, "1"), 1),
        ((0, 1.0), 1.0),
        ((False, True), False),
        ((0, [1]), [1]),
        ((1, None, None), 0),
    ],
)
def test_indices_that_are_not_one_per_text(indices, wrong):
    with pytest.raises(ValueError, match=naming("index", f"'{wrong}'", 0, len(indices) - 1)):
        read(*((index, [1.0]) for index in indices))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_number_of_vectors(number):
    with pytest.raises(ValueError, match=naming("vectors", number, 2)):
        embeddings_in_order({"data": [{"index": i, "embedding": [1.0]} for i in range(number)]}, 2)


@pytest.mark.parametrize("reply", [{}, {"data": None}, {"data": 3}, {"data": [3]}, {"data": [{}]}, {"data": {"0": {}}}])
def test_what_is_no_list_of_embeddings(reply):
    with pytest.raises((TypeError, LookupError, AttributeError)):
        embeddings_in_order(reply, 1)


NEITHER, INFINITE, ZERO = ("numbers", "base64", "float32"), ("finite",), ("zeros",)


@pytest.mark.parametrize(
    ("value", "facts"),
    [
        *((value, NEITHER) for value in ([], "", [[1.0]], 1.0, ["a"], "AAA!AAAA", "AAAA", {"a": 1}, [10**400])),
        *((value, NEITHER) for value in ([True, 1.0], [False], ["1.0", 2.0], [1.0, "nan"], {}, [1.0, [2.0]])),
        (None, NEITHER),
        *((value, INFINITE) for value in ([None, 1.0], [float("nan")], [1.0, float("inf")], packed(float("nan")))),
        *((value, ZERO) for value in ([0.0, 0.0], [-0.0], packed(0.0, 0.0))),
    ],
)
def test_a_bad_vector_spoils_no_other(value, facts):
    first, fault, last = read((0, [1.0]), (1, value), (2, [3.0]))
    assert (first, last) == ([1.0], [3.0])
    assert names(fault, *facts)
