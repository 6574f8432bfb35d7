"""A run: the ranked documents of every query, held as arrays and exchanged as dicts or TREC files.

    run = Run.from_dict({"q1": {"d3": 0.9, "d7": 0.4}})
    run.save("run.trec")
    assert Run.load("run.trec").to_dict() == run.to_dict()

Shapes: Q queries, K ranks, N documents that indices point into.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from ..data.checks import check_distinct
from ..files import atomic_write, read_lines

ENCODED = "+percent-encoded"  # ends the tag of a TREC file if its ids are, because one contains whitespace


@dataclass(frozen=True, eq=False)
class Run:
    """The ranking of each query: row i lists the documents of query_ids[i], best first. Scores in a row never increase;
    metrics use the order even among equal scores. Rows shorter than K are padded with index -1 and score -inf."""

    query_ids: list[str]  # distinct
    document_ids: list[str]  # distinct; some may be in no row
    indices: np.ndarray  # [Q, K] int64 into document_ids, -1 = none
    scores: np.ndarray  # [Q, K] float, finite where there is a document

    def __post_init__(self):
        for name, ids in (("query", self.query_ids), ("document", self.document_ids)):
            check_distinct(ids, f"run: {name} id")
        indices_QK, scores_QK, shape = self.indices, self.scores, self.indices.shape
        is_shaped = len(shape) == 2 and scores_QK.shape == shape and shape[0] == len(self.query_ids)
        if not is_shaped or indices_QK.dtype != np.int64 or scores_QK.dtype.kind != "f":
            found = f"found {indices_QK.dtype} {indices_QK.shape} and {scores_QK.dtype} {scores_QK.shape}"
            raise ValueError(f"run: expected int64 indices and float scores [{len(self.query_ids)}, K], {found}")
        empty_QK, number = indices_QK == -1, len(self.document_ids)
        sorted_QK = np.sort(indices_QK, axis=1)
        for what, wrong in (
            (f"an index outside {number} documents", (indices_QK < -1) | (indices_QK >= number)),
            ("a document after an empty place", empty_QK[:, :-1] & ~empty_QK[:, 1:]),
            ("a score that is not finite", ~empty_QK & ~np.isfinite(scores_QK)),
            ("an empty place whose score is not -inf", empty_QK & (scores_QK != -np.inf)),
            ("a score above that of an earlier rank", scores_QK[:, :-1] < scores_QK[:, 1:]),
            ("a document twice", (sorted_QK[:, :-1] == sorted_QK[:, 1:]) & (sorted_QK[:, 1:] >= 0)),
        ):
            if wrong.any():
                raise ValueError(f"run: query {self.query_ids[wrong.any(axis=1).argmax()]!r} has {what}")

    @classmethod
    def from_dict(cls, results: Mapping[str, Mapping[str, float]], *, sort_ids: bool = True) -> "Run":
        """A run from {query id: {document id: score}}; equal scores are ordered by ascending id, or as given."""
        rows = {query_id: sorted(row.items()) if sort_ids else row.items() for query_id, row in results.items()}
        ranked = {query_id: sorted(row, key=lambda item: -item[1]) for query_id, row in rows.items()}
        document_ids = sorted({document_id for row in ranked.values() for document_id, _ in row})
        index_of = {document_id: index for index, document_id in enumerate(document_ids)}
        shape = len(ranked), max(map(len, ranked.values()), default=0)
        indices_QK, scores_QK = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf)
        for i, row in enumerate(ranked.values()):
            indices_QK[i, : len(row)] = [index_of[document_id] for document_id, _ in row]
            scores_QK[i, : len(row)] = [score for _, score in row]
        return cls(list(ranked), document_ids, indices_QK, scores_QK)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """{query id: {document id: score}}, documents in rank order."""
        rows = zip(self.query_ids, self.indices.tolist(), self.scores.tolist(), strict=True)
        ids = self.document_ids
        return {i: {ids[j]: s for j, s in zip(row, scores, strict=True) if j >= 0} for i, row, scores in rows}

    def select(self, query_ids: Sequence[str]) -> "Run":
        """The rows of these queries, in this order; a query missing from the run gets an empty row."""
        row_of = {query_id: row for row, query_id in enumerate(self.query_ids)}
        rows_Q = np.array([row_of.get(query_id, -1) for query_id in query_ids], dtype=np.int64)
        # Row -1 (no such query) is the empty one at the end.
        indices_QK = np.pad(self.indices, ((0, 1), (0, 0)), constant_values=-1)[rows_Q]
        scores_QK = np.pad(self.scores, ((0, 1), (0, 0)), constant_values=-np.inf)[rows_Q]
        return Run(list(query_ids), self.document_ids, indices_QK, scores_QK)

    def without_identical_ids(self, qrels: Mapping[str, Mapping[str, float]], *, depth: int | None = None) -> "Run":
        """The first `depth` ranks without documents that have their query's id, unless `qrels` grade them above 0.
        Source: BEIR, `EvaluateRetrieval.evaluate`, ignore_identical_ids."""
        index_of = {document_id: index for index, document_id in enumerate(self.document_ids)}
        kept = {query_id for query_id, grades in qrels.items() if grades.get(query_id, 0) > 0}
        own_Q = np.array([-2 if i in kept else index_of.get(i, -2) for i in self.query_ids], dtype=np.int64)
        own_QK = self.indices == own_Q[:, None]
        order_QK = np.argsort(own_QK, axis=1, kind="stable")[:, :depth]
        indices_QK = np.take_along_axis(np.where(own_QK, -1, self.indices), order_QK, axis=1)
        scores_QK = np.take_along_axis(np.where(own_QK, -np.inf, self.scores), order_QK, axis=1)
        return Run(self.query_ids, self.document_ids, indices_QK, scores_QK.astype(self.scores.dtype))

    def save(self, path: str | Path, *, tag: str = "embedft") -> None:
        """Writes a TREC run file, `query Q0 document rank score tag`, atomically; scores read back exactly.
        If an id contains whitespace or is empty, all are percent-encoded (an empty one as %), and the tag says so."""
        results = self.to_dict()
        ids = {*results, *(document_id for row in results.values() for document_id in row)}
        encoded, tag = {i: i for i in ids}, re.sub(r"\s+", "-", tag)
        if any(i.split() != [i] for i in ids):
            encoded = {i: re.sub(r"[\s%]", lambda found: quote(found[0]), i) or "%" for i in ids}
            tag += ENCODED
        with atomic_write(path) as file:
            for query_id, row in results.items():
                for rank, (document_id, score) in enumerate(row.items(), start=1):
                    file.write(f"{encoded[query_id]} Q0 {encoded[document_id]} {rank} {score!r} {tag}\n")

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """Reads a TREC run file. Equal scores keep the file's order. Raises `ValueError` naming file and line."""
        results: dict[str, dict[str, float]] = {}
        for number, line in enumerate(read_lines(path), start=1):
            if not (columns := line.split()):
                continue
            if len(columns) != 6:
                raise ValueError(f"{path} line {number}: {len(columns)} columns, expected qid Q0 did rank score tag")
            query_id, _, document_id, _, score_text, tag = columns
            if tag.endswith(ENCODED):
                query_id, document_id = ("" if i == "%" else unquote(i) for i in (query_id, document_id))
            try:
                score = float(score_text)
            except ValueError:
                score = np.nan
            if not np.isfinite(score):
                raise ValueError(f"{path} line {number}: score is {score_text!r}, expected a finite number")
            row = results.setdefault(query_id, {})
            if document_id in row:
                raise ValueError(f"{path} line {number}: query {query_id!r} lists document {document_id!r} twice")
            row[document_id] = score
        return cls.from_dict(results, sort_ids=False)
