"""linked.py: components by hand, in any order of links, and of a long chain."""

import itertools

from embedft.data.linked import connected_components


def test_components_by_hand():
    links = [("b", "a"), ("c", "c"), ("d", "b"), ("f", "e"), ("e", "g")]
    expected = {"a": "a", "b": "a", "d": "a", "c": "c", "e": "e", "f": "e", "g": "e"}
    for order in itertools.permutations(links):
        assert connected_components(order) == expected
    assert connected_components([]) == {}


def test_a_long_chain_needs_no_recursion():
    links = [(i, i + 1) for i in reversed(range(50_000))]
    assert set(connected_components(links).values()) == {0}
