"""embedding_reply.py: what a server sent, by hand: order, base64, length one; every reply that is none."""

import base64
import json
import struct

import numpy as np
import pytest

from embedft.api.embedding_reply import in_order, read_reply, unit_rows


def packed(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def test_a_reply_by_hand():
    """Two texts, the second first: numbers for one, base64 for the other."""
    data = [{"index": 1, "embedding": [3.0, 4]}, {"index": 0, "embedding": packed(0.5, -2.0)}]
    pairs, usage = read_reply(json.dumps({"data": data, "usage": {"prompt_tokens": 7, "total_tokens": 7}}))
    assert usage == (7, 0)
    vectors_MD = in_order(pairs, 2)
    assert vectors_MD.dtype == np.float64
    assert vectors_MD.tolist() == [[0.5, -2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    "reported", [None, {}, [], {"prompt_tokens": -1}, {"prompt_tokens": True}, {"prompt_tokens": 1.5}]
)
def test_usage_that_is_no_report(reported):
    assert read_reply(json.dumps({"data": [], "usage": reported}))[1] is None
    assert read_reply('{"data": []}')[1] is None


@pytest.mark.parametrize(
    "text",
    ["<html>", "[]", "3", "{}", '{"data": null}', '{"data": 3}', '{"data": [3]}', '{"data": [{"index": 0}]}'
     , '{"data": [{"embedding": [1]}]}', '{"error": {"message": "busy"}}', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_list_of_embeddings(text):
    with pytest.raises(ValueError, match=r"^the answer is no list of embeddings$"):
        read_reply(text)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, [1.0])], "1 vectors came back for 2 texts"),
        ([(0, [1.0]), (1, [1.0]), (2, [1.0])], "3 vectors came back for 2 texts"),
        ([], "0 vectors came back for 2 texts"),
        ([(0, [1.0]), (0, [1.0])], "vectors came back with index 0, expected each of 0 to 1 once"),
        ([(1, [1.0]), (2, [1.0])], "vectors came back with index 2, expected each of 0 to 1 once"),
        ([(0, [1.0]), (-1, [1.0])], "vectors came back with index -1, expected each of 0 to 1 once"),
        ([(0, [1.0]), ("1", [1.0])], "vectors came back with index '1', expected each of 0 to 1 once"),
        ([(False, [1.0]), (True, [1.0])], "vectors came back with index False, expected each of 0 to 1 once"),
        ([(0, [1.0]), (1, [1.0, 2.0])], "vectors of 1 and of 2 dimensions came back, expected one size"),
        ([(0, []), (1, [])], "vectors without a value came back"),
        ([(0, ""), (1, "")], "vectors without a value came back"),
        ([(0, [1.0]), (1, [[1.0]])], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, 1.0)], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, None)], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, ["a"])], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, "AAA!AAAA")], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, "AAAA")], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, {"a": 1})], "a vector came back that is neither a list of numbers nor base64 of float32"),
        ([(0, [1.0]), (1, [10**400])], "a vector came back that is neither a list of numbers nor base64 of float32"),
    ],
)
def test_vectors_that_are_not_one_for_each_text(pairs, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(") + "$"):
        in_order(pairs, 2)


def test_length_one_by_hand():
    """(3, 4) has length 5. Squares of 1e200 and of 1e-200 are beyond a float64, their directions are not."""
    unit_MD, is_good_M = unit_rows(np.array([[3.0, 4.0], [3e200, -4e200], [3e-200, 4e-200], [0.0, -2.0]]))
    assert unit_MD.dtype == np.float32
    np.testing.assert_array_equal(unit_MD, np.array([[0.6, 0.8], [0.6, -0.8], [0.6, 0.8], [0.0, -1.0]], np.float32))
    assert is_good_M.all()


def test_rows_that_have_no_direction():
    nan, inf = float("nan"), float("inf")
    rows = np.array([[0.0, 0.0], [nan, 1.0], [1.0, 0.0], [inf, 1.0], [1.0, -inf], [-0.0, 0.0]])
    unit_MD, is_good_M = unit_rows(rows)
    assert is_good_M.tolist() == [False, False, True, False, False, False]
    assert unit_MD[2].tolist() == [1.0, 0.0]


def test_null_is_not_finite():
    """JSON has no NaN; servers write null instead."""
    assert unit_rows(in_order([(0, [None, 1.0])], 1))[1].tolist() == [False]
