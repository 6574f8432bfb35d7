"""Training examples: the (query, document) rows that a dataset offers.

    examples = list_examples(dataset, "pairs")      # [("q1", "d1"), ("q1", "d4"), ("q2", "d2"), ...]
    count = TokenCounter(embedder.pack)
    count(["a text"], role="document")              # [4]

Any list of (query id, document id) or (query id, None) can take their place; see batches.py.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from ..encoders.packing import Packed
from .dataset import RetrievalDataset

ExampleKind = Literal["pairs", "queries", "scored"]
EXAMPLES = get_args(ExampleKind)
# A row of a batch: a query and one document, or None for all documents relevant to the query.
Example = tuple[str, str | None]


def list_examples(dataset: RetrievalDataset, kind: ExampleKind = "pairs") -> list[Example]:
    """The examples of a dataset, in its order.

    Args:
        kind: "pairs": every query with every relevant document. "queries": every query once, with all its relevant
            documents. "scored": every query with every document that `dataset.scores` has for it, relevant or not.

    Raises:
        ValueError: an unknown kind, or nothing to train on.
    """
    if kind not in EXAMPLES:
        raise ValueError(f"examples is {kind!r}, expected one of {', '.join(EXAMPLES)}")
    if kind == "scored":
        examples = [(q, d) for q, scores in dataset.scores.items() for d in scores]
        if not examples:
            raise ValueError("the training set has no scored pair of a query and a document")
        return examples
    pairs = [(q, d) for q in dataset.qrels for d in relevant(dataset, q)]
    if not pairs:
        raise ValueError("the training set has no pair of a query and a document relevant to it")
    return [(q, None) for q in dict.fromkeys(q for q, _ in pairs)] if kind == "queries" else pairs


def relevant(dataset: RetrievalDataset, query_id: str) -> list[str]:
    """The documents with a grade above 0 for a query, in the order of its qrels."""
    return [document_id for document_id, grade in dataset.qrels[query_id].items() if grade > 0]


class TokenCounter:
    """Counts the tokens of texts as training will pack them; remembers every count.

    Args:
        pack: (texts, role="query" | "document") -> Packed, as `Embedder.pack`.
        passages: (size, stride) in tokens; a document then counts as its `windows_per_document` longest windows.
        texts_at_a_time: texts tokenized per call of `pack`.
    """

    def __init__(
        self,
        pack: Callable[..., Packed],
        *,
        passages: Sequence[int] | None = None,
        windows_per_document: int = 4,
        texts_at_a_time: int = 1_024,
    ):
        self.pack, self.passages, self.windows_per_document = pack, passages, windows_per_document
        self.texts_at_a_time = texts_at_a_time
        self._counts: dict[tuple[str, str], int] = {}

    def __call__(self, texts: Sequence[str], *, role: str) -> list[int]:
        """Tokens of each text."""
        missing = [text for text in dict.fromkeys(texts) if (role, text) not in self._counts]
        for first in range(0, len(missing), self.texts_at_a_time):
            part = missing[first : first + self.texts_at_a_time]
            self._counts.update(zip(((role, text) for text in part), self._count(part, role), strict=True))
        return [self._counts[role, text] for text in texts]

    def _count(self, texts: list[str], role: str) -> list[int]:
        if role == "query" or self.passages is None:
            return self.pack(texts, role=role).lengths().tolist()
        packed = self.pack(texts, role=role, passages=self.passages)
        windows = packed.lengths().split(packed.source.bincount().tolist())
        return [int(of_one.sort(descending=True)[0][: self.windows_per_document].sum()) for of_one in windows]
