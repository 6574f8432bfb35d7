"""Training examples: the (query, document) rows that a dataset offers.

    list_examples(dataset, "pairs")             # [("q1", "d1"), ("q1", "d4"), ("q2", "d2"), ...]

Any list of (query id, document id) or (query id, None) can take their place; see batches.py.
"""

from typing import Literal, get_args

from .dataset import RetrievalDataset

ExampleKind = Literal["pairs", "queries", "scored"]
EXAMPLES = get_args(ExampleKind)
# A row of a batch: a query and one document, or None for all documents relevant to the query.
Example = tuple[str, str | None]


def list_examples(dataset: RetrievalDataset, kind: ExampleKind = "pairs") -> list[Example]:
    """The examples of a dataset, in its order. Raises `ValueError` when there is nothing to train on.

    `kind` is "pairs": every query with every relevant document; "queries": every query once, with all its relevant
    documents; or "scored": every query with every document that `dataset.scores` has for it, relevant or not.
    """
    if kind not in EXAMPLES:
        raise ValueError(f"examples is {kind!r}, expected one of {', '.join(EXAMPLES)}")
    if kind == "scored":
        examples = [(q, d) for q, scores in dataset.scores.items() for d in scores]
    elif kind == "queries":
        examples = [(q, None) for q in dataset.qrels if relevant(dataset, q)]
    else:
        examples = [(q, d) for q in dataset.qrels for d in relevant(dataset, q)]
    if not examples:
        scored, relevant_to_it = ("scored ", "") if kind == "scored" else ("", " relevant to it")
        raise ValueError(f"the training set has no {scored}pair of a query and a document{relevant_to_it}")
    return examples


def relevant(dataset: RetrievalDataset, query_id: str) -> list[str]:
    """The documents with a grade above 0 for a query, in the order of its qrels."""
    return [document_id for document_id, grade in dataset.qrels[query_id].items() if grade > 0]
