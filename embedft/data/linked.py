"""Connected components: what is linked directly or through others.

connected_components([("a", "b"), ("c", "c"), ("b", "d")])      # {"a": "a", "b": "a", "c": "c", "d": "a"}
"""

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item", str, int)


def connected_components(links: Iterable[tuple[Item, Item]]) -> dict[Item, Item]:
    """{item: the smallest item of its component}, for all items that have a link (an item may link to itself)."""
    parents: dict[Item, Item] = {}

    def root(item: Item) -> Item:
        while parents.setdefault(item, item) != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    for one, other in links:
        smaller, larger = sorted((root(one), root(other)))
        parents[larger] = smaller
    return {item: root(item) for item in parents}
