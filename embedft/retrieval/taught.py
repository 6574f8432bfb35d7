"""What a student learns from a teacher: lists of documents for each query, the teacher's scores, and new positives.

    taught, counts = teach(load_teacher("sentence-transformers/all-mpnet-base-v2"), embedder, dataset, depth=20)
    config = FinetuneConfig(loss={"name": "listwise_kl"}, examples="lists", num_negatives=20, target_scores=True)
    finetune(embedder, taught, config)

A query's list has its relevant documents, the negatives that the dataset has for it and, of the first `depth` documents
that the student or the teacher ranks for it, those that nothing is known about (mining.py says which). Queries without
a relevant document have a list, too.

With a folder, lists and scores are kept in lists-KEY.jsonl: first what they depend on, hashes of data and models
included, of which KEY is the hash; then a line for each query as it is scored. Whoever asks for the same again reads
it; a killed process continues it.

Sources: Tamber et al. 2025 (CADET), listwise distillation; Moreira et al. 2024 (NV-Retriever), margins.
"""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..data.dataset import RetrievalDataset
from ..files import append_jsonl, locked, resume_jsonl, write_jsonl
from ..progress import progress_bar
from .encoding import Passages, SupportsEncode
from .mining import highest_negative, unjudged
from .teacher import AT_A_TIME, Listed, Teacher, Vectors

Ranking = Literal["student", "teacher"]
VERSION = 1


class List(NamedTuple):
    """{document id: score} of the documents listed for a query; the student's only if they are needed."""

    teacher: dict[str, float]
    student: dict[str, float] | None


def teach(
    teacher: Teacher,
    student: SupportsEncode,
    dataset: RetrievalDataset,
    *,
    depth: int = 20,
    ranking: Ranking = "student",
    passages: Passages = None,
    relabel: float | None = None,
    relative_margin: float | None = None,
    absolute_margin: float | None = None,
    folder: str | Path | None = None,
) -> tuple[RetrievalDataset, dict[str, int]]:
    """The dataset with the teacher's `scores`, with the other documents of the lists as `negatives` in order of rank,
    and with relabelled ones in `qrels`; and {"scored": pairs, "relabelled": pairs, "dropped": pairs}.

    Args:
        depth: ranks from which documents are listed; 0: none but the dataset's own.
        ranking: whose ranks; a cross-encoder has none.
        passages: windows by which the student ranks and scores documents.
        relabel: an unjudged document becomes a positive if the teacher's score is at least that of the query's lowest
            positive minus `relabel`, and the student's is above what the margins, of `mine`, allow a negative (without
            any: above its lowest positive). If only one of them holds, it is dropped from the list.
        folder: where lists are kept; None: nowhere.

    Raises `ValueError` for an option out of range, a dataset for which nothing is listed, or a damaged file."""
    for name, value, valid, expected in (
        ("depth", depth, depth >= 0, "at least 0"),
        ("ranking", ranking, ranking in get_args(Ranking), f"one of {', '.join(get_args(Ranking))}"),
        ("relabel", relabel, math.isfinite(relabel or 0), "a finite number"),
        ("absolute_margin", absolute_margin, 0 <= (absolute_margin or 0) < math.inf, "at least 0"),
        ("relative_margin", relative_margin, 0 <= (relative_margin or 0) < math.inf, "at least 0"),
    ):
        if not valid:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    pupil = None if ranking == "teacher" and relabel is None else Vectors(student, passages)
    made = lists_of(
        teacher, pupil, dataset, depth=depth, ranking=ranking, with_student=relabel is not None, folder=folder
    )
    qrels, negatives, scores = dict(dataset.qrels), {}, {}
    num_dropped = 0
    for query_id, found in made.items():
        relevant, judged = dataset.relevant(query_id), dataset.qrels.get(query_id, {})
        others = [i for i in found.teacher if i not in relevant]
        new, dropped = [], []
        if relabel is not None and relevant:
            candidates = [i for i in others if i not in judged]
            new, dropped = _relabelled(found, relevant, candidates, relabel, (absolute_margin, relative_margin))
            qrels[query_id] = judged | dict.fromkeys(new, 1) if new else judged
        num_dropped += len(dropped)
        scores[query_id] = {i: score for i, score in found.teacher.items() if i not in dropped}
        if left := [i for i in others if i not in {*new, *dropped}]:
            negatives[query_id] = left
    num_new = sum(map(len, qrels.values())) - sum(map(len, dataset.qrels.values()))
    counts = {"scored": sum(len(found.teacher) for found in made.values()), "relabelled": num_new}
    return replace(dataset, qrels=qrels, negatives=negatives, scores=scores), counts | {"dropped": num_dropped}


def _relabelled(
    found: List, relevant: list[str], candidates: list[str], relabel: float, margins: tuple[float | None, float | None]
) -> tuple[list[str], list[str]]:
    """Which candidates teacher and student both take for answers, and which only one of them does."""
    margins = (0.0, None) if margins == (None, None) else margins
    least = min(found.teacher[i] for i in relevant) - relabel
    lowest = np.array([min(found.student[i] for i in relevant)])
    limit = float(highest_negative(lowest, math.inf, *margins)[0])
    votes = {i: (found.teacher[i] >= least) + (found.student[i] > limit) for i in candidates}
    return [i for i in candidates if votes[i] == 2], [i for i in candidates if votes[i] == 1]


def lists_of(
    teacher: Teacher,
    student: Vectors | None,
    dataset: RetrievalDataset,
    *,
    depth: int,
    ranking: Ranking,
    with_student: bool,
    folder: str | Path | None = None,
) -> dict[str, List]:
    """{query id: its list with scores}, from `folder` as far as they are there. `student`: None if nothing needs it."""
    hashes = teacher.sha256()
    parts = {name: {"weight": teacher.weights[name], "sha256": hashes[name]} for name in teacher.parts}
    origin = {"version": VERSION, "data": dataset.sha256(), "teacher": parts, "scale": teacher.scale}
    origin |= {"student": None if student is None else student.sha256(), "with_student": with_student}
    origin |= {"depth": depth, "ranking": ranking}
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]
    path = None if folder is None else Path(folder) / f"lists-{key}.jsonl"
    holding = contextlib.nullcontext() if path is None else locked(path.with_suffix(".lock"), wait=_say_waiting(path))
    with holding:
        records = [] if path is None else _read(path, origin, dataset)
        if len(records) < len(dataset.queries):
            # Scored together as without the interruption, so that the numbers are the same to the last bit.
            records = records[: len(records) // AT_A_TIME * AT_A_TIME]
            if path is not None:
                write_jsonl(path, [{"made_from": origin}, *records])
            listed = _listed(teacher, student, dataset, depth, ranking)
            for record in _score(teacher, student if with_student else None, dataset, listed, len(records)):
                records.append(record)
                if path is not None:
                    append_jsonl(path, record)
        elif path is not None:
            path.touch()  # it was used, which `embedft store --prune-unused` asks about
    return {record["query"]: List(record["teacher"], record.get("student")) for record in records}


def _say_waiting(path: Path) -> Any:
    return lambda holder: print(f"{path}: waiting for {holder}, which is scoring the same lists", file=sys.stderr)


def _listed(
    teacher: Teacher, student: Vectors | None, dataset: RetrievalDataset, depth: int, ranking: Ranking
) -> Listed:
    """{query id: the ids of its list}: relevant documents, negatives of the dataset, then by rank."""
    ranked = (teacher if ranking == "teacher" else student).search(dataset, depth).to_dict() if depth else {}
    answers, listed = dataset.answers(), {}
    for query_id in dataset.queries:
        known = [*dataset.relevant(query_id), *dataset.negatives.get(query_id, ())]
        new = unjudged(dataset, answers, query_id, ranked.get(query_id, ()), dataset.negatives.get(query_id, ()))
        listed[query_id] = [*dict.fromkeys([*known, *new])]
    if not any(listed.values()):
        raise ValueError("teacher: no query has a document to score; a depth above 0 lists some")
    return listed


def _score(
    teacher: Teacher, student: Vectors | None, dataset: RetrievalDataset, listed: Listed, first: int
) -> Iterator[dict[str, Any]]:
    """Yields the record of each query from number `first` on."""
    scored = teacher.score_lists(dataset, listed, first=first)
    own = None
    if student is not None:
        some = {query_id: ids for query_id, ids in listed.items() if ids}
        own = student.scoring(dataset, some)(some)
    with progress_bar(len(listed), "teacher", unit="query", initial=first) as bar:
        for query_id, scores in scored:
            record = {"query": query_id, "teacher": scores}
            yield record if own is None else record | {"student": own.get(query_id, {})}
            bar.update()


def _read(path: Path, origin: Mapping[str, Any], dataset: RetrievalDataset) -> list[dict[str, Any]]:
    """The records of a file of lists, none if it does not exist. Raises `ValueError` for one that does not fit."""
    again = "remove it, and it is made again"
    header, *records = [*resume_jsonl(path, repair=False)] or [None]
    if header is None:
        if path.exists():
            raise ValueError(f"{path}: does not say what its lists were made from; {again}")
        return []
    made_from = header.get("made_from")
    if made_from != origin:
        made_from = made_from if isinstance(made_from, dict) else {}
        name = next((name for name in origin if made_from.get(name) != origin[name]), "version")
        raise ValueError(f"{path}: {name} was {made_from.get(name)!r} and is {origin[name]!r}; {again}")
    if len(records) > len(dataset.queries):
        raise ValueError(f"{path}: {len(records):,} lists, but the data has {len(dataset.queries):,} queries; {again}")
    for number, (query_id, record) in enumerate(zip(dataset.queries, records, strict=False), start=2):
        columns = [record.get("teacher"), *([record.get("student")] if origin["with_student"] else [])]
        are_scores = all(
            isinstance(column, dict)
            and column.keys() <= dataset.corpus.keys()
            and column.keys() == columns[0].keys()
            and all(isinstance(score, float) and math.isfinite(score) for score in column.values())
            for column in columns
        )
        if record.get("query") != query_id or not are_scores:
            raise ValueError(f"{path} line {number}: expected scores of documents for query {query_id!r}; {again}")
    return records
