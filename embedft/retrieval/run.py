"""A run: the top documents of every query, as arrays inside and as dicts or TREC files at its edges; TREC qrels.

No metric lives here (metrics.py), no search (index.py), and no BEIR folder (RetrievalDataset reads it, qrels and all).

    run = Run.from_dict({"q1": {"d3": 0.9, "d7": 0.4}})
    run.save("run.trec")
    assert Run.load("run.trec").to_dict() == run.to_dict()

Shapes: Q queries, K ranks, N documents that indices point into.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..files import atomic_write, read_lines

# How documents of equal score are ordered: by ascending or descending id. Ids compare by code point, as bytes of UTF-8.
Ties = Literal["ascending", "descending"]


@dataclass(frozen=True, eq=False)
class Run:
    """The ranking of every query: row i lists the documents of query_ids[i], best first.

    A row's scores never rise; the order among equal scores is part of the run and is what metrics use. Rows shorter
    than K end in index -1 with score -inf.

    Args:
        query_ids: Q distinct ids.
        document_ids: N distinct ids; they may include documents that no row retrieves.
        indices: [Q, K] int64 into document_ids, -1 = none.
        scores: [Q, K] float, finite where there is a document.

    Raises:
        ValueError: naming the first query whose row breaks one of these rules.
    """

    query_ids: list[str]
    document_ids: list[str]
    indices: np.ndarray
    scores: np.ndarray

    def __post_init__(self):
        for name, ids in (("query", self.query_ids), ("document", self.document_ids)):
            if len(set(ids)) < len(ids):
                seen = set()
                twice = next(i for i in ids if i in seen or seen.add(i))
                raise ValueError(f"run: {name} id {twice!r} appears twice")
        indices_QK, scores_QK = self.indices, self.scores
        if indices_QK.ndim != 2 or indices_QK.shape != scores_QK.shape or len(indices_QK) != len(self.query_ids):
            raise ValueError(
                f"run: indices {indices_QK.shape} and scores {scores_QK.shape} must both be "
                f"[{len(self.query_ids)} queries, K]"
            )
        if indices_QK.dtype != np.int64 or scores_QK.dtype.kind != "f":
            raise ValueError(
                f"run: indices must be int64 and scores float, not {indices_QK.dtype} and {scores_QK.dtype}"
            )
        empty_QK = indices_QK == -1
        num_documents = len(self.document_ids)
        self._refuse((indices_QK < -1) | (indices_QK >= num_documents), f"an index outside {num_documents} documents")
        self._refuse(empty_QK[:, :-1] & ~empty_QK[:, 1:], "a document behind an empty place")
        self._refuse(~empty_QK & ~np.isfinite(scores_QK), "a score that is not finite")
        self._refuse(empty_QK & (scores_QK != -np.inf), "an empty place whose score is not -inf")
        self._refuse(scores_QK[:, :-1] < scores_QK[:, 1:], "scores that rise with the rank")
        sorted_QK = np.sort(indices_QK, axis=1)
        self._refuse((sorted_QK[:, :-1] == sorted_QK[:, 1:]) & (sorted_QK[:, 1:] >= 0), "a document twice")

    def _refuse(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            row = int(wrong.any(axis=1).argmax())
            raise ValueError(f"run: query {self.query_ids[row]!r} has {what}")

    @classmethod
    def from_dict(
        cls,
        results: Mapping[str, Mapping[str, float]],
        *,
        document_ids: Sequence[str] | None = None,
        ties: Ties = "ascending",
    ) -> "Run":
        """A run from {query id: {document id: score}}; equal scores are ordered by document id.

        Args:
            results: a query with an empty mapping keeps its (empty) row.
            document_ids: what indices point into; None: the retrieved documents, sorted.
            ties: the order of ids, "ascending" (sentence-transformers) or "descending" (trec_eval, which rounds scores
                to float32 before: see `reordered`).

        Raises:
            ValueError: on a NaN or infinite score, or a document that is not in `document_ids`.
        """
        descending = _is_descending(ties)
        ranked = {}
        for query_id, row in results.items():
            for document_id, score in row.items():
                if not np.isfinite(score):  # before sorting: NaN has no place in an order
                    raise ValueError(f"run: query {query_id!r}, document {document_id!r}: score {score} is not finite")
            # Two stable sorts: the second one keeps the order of ids among equal scores.
            by_id = sorted(row.items(), key=lambda item: item[0], reverse=descending)
            ranked[query_id] = sorted(by_id, key=lambda item: -item[1])
        return cls._from_ranked(ranked, document_ids)

    @classmethod
    def _from_ranked(cls, ranked: Mapping[str, list[tuple[str, float]]], document_ids: Sequence[str] | None) -> "Run":
        if document_ids is None:
            document_ids = sorted({document_id for row in ranked.values() for document_id, _ in row})
        index_of = {document_id: index for index, document_id in enumerate(document_ids)}
        depth = max((len(row) for row in ranked.values()), default=0)
        indices_QK = np.full((len(ranked), depth), -1, dtype=np.int64)
        scores_QK = np.full((len(ranked), depth), -np.inf)
        for i, (query_id, row) in enumerate(ranked.items()):
            for rank, (document_id, score) in enumerate(row):
                if document_id not in index_of:
                    raise ValueError(
                        f"run: query {query_id!r}: document id {document_id!r} is not among the {len(index_of)} given"
                    )
                indices_QK[i, rank] = index_of[document_id]
                scores_QK[i, rank] = score
        return cls(list(ranked), list(document_ids), indices_QK, scores_QK)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """{query id: {document id: score}}, documents in rank order, scores as Python floats."""
        return {
            query_id: {self.document_ids[j]: s for j, s in zip(row, scores, strict=True) if j >= 0}
            for query_id, row, scores in zip(self.query_ids, self.indices.tolist(), self.scores.tolist(), strict=True)
        }

    def select(self, query_ids: Sequence[str]) -> "Run":
        """The rows of these queries, in this order; a query that the run lacks gets an empty row."""
        row_of = {query_id: row for row, query_id in enumerate(self.query_ids)}
        rows_Q = np.array([row_of.get(query_id, -1) for query_id in query_ids], dtype=np.int64)
        found_Q = rows_Q >= 0
        shape = (len(rows_Q), self.indices.shape[1])
        indices_QK = np.full(shape, -1, dtype=np.int64)
        scores_QK = np.full(shape, -np.inf, dtype=self.scores.dtype)
        indices_QK[found_Q] = self.indices[rows_Q[found_Q]]
        scores_QK[found_Q] = self.scores[rows_Q[found_Q]]
        return Run(list(query_ids), self.document_ids, indices_QK, scores_QK)

    def reordered(self, *, ties: Ties, float32: bool = False) -> "Run":
        """The run with the documents of equal score in the order of their ids.

        `run.reordered(ties="descending", float32=True)` is the order in which trec_eval sees a run. A document that was
        cut off behind the last rank does not come back, whatever its score.

        Args:
            ties: "ascending" or "descending" ids.
            float32: round the scores to float32 first, so that more of them tie; the new run has the rounded ones.

        Raises:
            ValueError: on a score beyond the range of float32.
        """
        sign = -1 if _is_descending(ties) else 1
        scores_QK = self.scores
        if float32:
            with np.errstate(over="ignore"):  # what becomes infinite is refused by name below
                scores_QK = scores_QK.astype(np.float32)
        retrieved = np.unique(self.indices[self.indices >= 0]).tolist()  # to sort these alone: N may be millions
        rank_N1 = np.zeros(len(self.document_ids) + 1, dtype=np.int64)  # index -1, an empty place, has the last one
        rank_N1[sorted(retrieved, key=self.document_ids.__getitem__)] = np.arange(len(retrieved))
        # Empty places stay last: no score is as low as theirs.
        order_QK = np.lexsort((sign * rank_N1[self.indices], -scores_QK), axis=1)
        indices_QK = np.take_along_axis(self.indices, order_QK, axis=1)
        return Run(self.query_ids, self.document_ids, indices_QK, np.take_along_axis(scores_QK, order_QK, axis=1))

    def save(self, path: str | Path, *, tag: str = "embedft") -> None:
        """Writes a TREC run file, `query Q0 document rank score tag`, ranks from 1, atomically.

        Scores are written as the shortest decimal of their float64 value, so they read back exactly, float32 too. The
        format has no line for a query without results.

        Raises:
            ValueError: on an id that is empty or contains whitespace, before anything is written.
        """
        results = self.to_dict()
        retrieved = {document_id for row in results.values() for document_id in row}
        check_trec_ids((tag, *results, *sorted(retrieved)))
        with atomic_write(path) as file:
            for query_id, row in results.items():
                file.writelines(
                    f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n"
                    for rank, (document_id, score) in enumerate(row.items(), start=1)
                )

    @classmethod
    def load(
        cls, path: str | Path, *, query_ids: Sequence[str] | None = None, document_ids: Sequence[str] | None = None
    ) -> "Run":
        """Reads a TREC run file. Rows are ordered by score; equal scores keep the file's order.

        Args:
            query_ids: rows to return, as `select` does; None: the queries of the file in its order.
            document_ids: what indices point into; None: the retrieved documents, sorted.

        Raises:
            ValueError: naming file and line of a wrong number of columns, a score that is not a finite number, or a
                document that a query lists twice.
        """
        results: dict[str, dict[str, float]] = {}
        for number, line in enumerate(read_lines(path), start=1):
            columns = line.split()
            if not columns:
                continue
            if len(columns) != 6:
                raise ValueError(f"{path} line {number}: {len(columns)} columns, expected qid Q0 did rank score tag")
            query_id, _, document_id, _, score_text, _ = columns
            try:
                score = float(score_text)
            except ValueError:
                score = np.nan
            if not np.isfinite(score):
                raise ValueError(f"{path} line {number}: score {score_text!r} is not a finite number")
            row = results.setdefault(query_id, {})
            if document_id in row:
                raise ValueError(f"{path} line {number}: query {query_id!r} lists document {document_id!r} twice")
            row[document_id] = score
        ranked = {query_id: sorted(row.items(), key=lambda item: -item[1]) for query_id, row in results.items()}
        run = cls._from_ranked(ranked, document_ids)
        return run if query_ids is None else run.select(query_ids)


def save_qrels(path: str | Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Writes a TREC qrels file, `query 0 document grade`, atomically. The format has no line for a query without any.

    Raises:
        ValueError: on an id that is empty or contains whitespace, or a grade that is no whole number (trec_eval reads
            no other), before anything is written.
    """
    for query_id, grades in qrels.items():
        check_trec_ids((query_id, *grades))
        for document_id, grade in grades.items():
            if grade % 1 != 0:  # NaN and infinity too
                where = f"qrels: query {query_id!r}, document {document_id!r}"
                raise ValueError(f"{where}: grade {grade} is not a whole number, as a TREC file needs it")
    with atomic_write(path) as file:
        for query_id, grades in qrels.items():
            file.writelines(f"{query_id} 0 {document_id} {int(grade)}\n" for document_id, grade in grades.items())


def load_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Reads a TREC qrels file as {query id: {document id: grade}}, in its order; the second column has no meaning.

    Raises:
        ValueError: naming file and line of a wrong number of columns, a grade that is no whole number, or a document
            that a query grades twice.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 4:
            raise ValueError(f"{path} line {number}: {len(columns)} columns, expected qid 0 did grade")
        query_id, _, document_id, grade = columns
        if not re.fullmatch("[+-]?[0-9]+", grade):
            raise ValueError(f"{path} line {number}: grade {grade!r} is not a whole number")
        grades = qrels.setdefault(query_id, {})
        if document_id in grades:
            raise ValueError(f"{path} line {number}: query {query_id!r} grades document {document_id!r} twice")
        grades[document_id] = int(grade)
    return qrels


def check_trec_ids(ids: Iterable[str]) -> None:
    """Raises `ValueError` for the first id that a TREC file cannot hold: an empty one, or one with whitespace."""
    for i in ids:
        if i.split() != [i]:
            raise ValueError(f"a TREC file holds no empty id and no whitespace in ids: {i!r}")


def _is_descending(ties: str) -> bool:
    if ties not in ("ascending", "descending"):
        raise ValueError(f"unknown order of ties {ties!r}; valid: ascending, descending")
    return ties == "descending"
