"""taught.py: which documents are listed, relabelling by hand, and lists that are kept, continued, shared or refused."""

import json
import math
from dataclasses import replace

import pytest
from naming import naming
from test_teacher import Table
from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset, Teacher, teach
from embedft.retrieval import taught as module
from embedft.retrieval import teacher as teachers
from embedft.retrieval.teacher import Vectors, Words


@pytest.fixture
def dataset() -> RetrievalDataset:
    """One question with an answer, one without, and five documents named by their only word."""
    return RetrievalDataset({"q": "up", "u": "right"}, {i: i for i in "abcde"}, {"q": {"a": 1}})


# For q, the student's scores of a to e are 5, 6, 4, 7, 1, the teacher's 8, 9, 7, 2, 1. For u, all are minus those of q.
STUDENT = Table({"up": [1], "right": [-1], "a": [5], "b": [6], "c": [4], "d": [7], "e": [1]})
TEACHER = Table({"up": [1], "right": [-1], "a": [8], "b": [9], "c": [7], "d": [2], "e": [1]})


def teacher_of(table: Table = TEACHER, scale: str = "raw") -> Teacher:
    return Teacher({"table": Vectors(table)}, {"table": 1.0}, scale)


def test_lists_by_hand(dataset):
    """The student ranks d b a for q and e c a for u; the teacher scores them, relevant ones first."""
    taught, counts = teach(teacher_of(), STUDENT, dataset, depth=3)
    assert taught.scores == {"q": {"a": 8.0, "d": 2.0, "b": 9.0}, "u": {"e": -1.0, "c": -7.0, "a": -8.0}}
    assert list(taught.scores["q"]) == ["a", "d", "b"]
    assert taught.negatives == {"q": ["d", "b"], "u": ["e", "c", "a"]}
    assert (taught.qrels, taught.queries, taught.corpus) == (dataset.qrels, dataset.queries, dataset.corpus)
    assert counts == {"scored": 6, "relabelled": 0, "dropped": 0}
    # By the teacher's ranks, b a c and e d c.
    taught, _ = teach(teacher_of(), STUDENT, dataset, depth=3, ranking="teacher")
    assert taught.negatives == {"q": ["b", "c"], "u": ["e", "d", "c"]}


def test_more_ranks_than_documents(dataset):
    taught, counts = teach(teacher_of(), STUDENT, dataset, depth=1_000)
    assert taught.negatives == {"q": ["d", "b", "c", "e"], "u": ["e", "c", "a", "b", "d"]}
    assert counts["scored"] == 10


def test_the_datasets_own_negatives_come_first_and_alone_without_depth(dataset):
    mined = replace(dataset, negatives={"q": ["e", "c"]})
    taught, _ = teach(teacher_of(), STUDENT, mined, depth=2)
    assert taught.negatives == {"q": ["e", "c", "d", "b"], "u": ["e", "c"]}
    taught, counts = teach(teacher_of(), STUDENT, mined, depth=0)
    assert taught.scores == {"q": {"a": 8.0, "e": 1.0, "c": 7.0}, "u": {}}
    assert taught.negatives == {"q": ["e", "c"]}
    assert counts["scored"] == 3


def test_copies_of_answers_are_not_listed(dataset):
    """f is a in other letters, and q the question itself."""
    corpus = dataset.corpus | {"f": "A", "q": "Up"}
    tables = [Table({**table.table, "A": table.table["a"], "Up": [9]}) for table in (STUDENT, TEACHER)]
    taught, _ = teach(teacher_of(tables[1]), tables[0], replace(dataset, corpus=corpus), depth=9)
    assert taught.negatives["q"] == ["d", "b", "c", "e"]


@pytest.mark.parametrize(
    ("options", "new", "left"),
    [
        # Teacher: 9 is at least 8. Student: d and b are above 5. So b is an answer; d is one's candidate alone.
        ({"relabel": 0.0}, ["b"], ["c", "e"]),
        # Teacher: b and c. Student: as before. c is dropped, too.
        ({"relabel": 1.0}, ["b"], ["e"]),
        # Student: above 5 - 2: b, c, d.
        ({"relabel": 1.0, "absolute_margin": 2.0}, ["b", "c"], ["e"]),
        # Student: above 80% of 5: c, at 4, is not.
        ({"relabel": 1.0, "relative_margin": 0.2}, ["b"], ["e"]),
        # Of two margins the lower limit counts: 5 - 4.5 is below 4 and 1.
        ({"relabel": 7.0, "relative_margin": 0.2, "absolute_margin": 4.5}, ["d", "b", "c", "e"], []),
        # Teacher: 9 is not above 8 by 2. b and d are the student's candidates alone.
        ({"relabel": -2.0}, [], ["c", "e"]),
    ],
)
def test_relabelling_by_hand(dataset, options, new, left):
    taught, counts = teach(teacher_of(), STUDENT, dataset, depth=5, **options)
    assert taught.qrels == {"q": {"a": 1, **dict.fromkeys(new, 1)}}
    assert taught.negatives.get("q", []) == left
    assert set(taught.scores["q"]) == {"a", *new, *left}
    assert counts == {"scored": 10, "relabelled": len(new), "dropped": 4 - len(new) - len(left)}
    # Nothing is known of u, so nothing can be told.
    assert taught.negatives["u"] == ["e", "c", "a", "b", "d"]


def test_the_lowest_of_several_answers_counts(dataset):
    """With c relevant, teacher and student are compared with 7 and 4: b and d are above 4, b alone above 7."""
    taught, _ = teach(teacher_of(), STUDENT, replace(dataset, qrels={"q": {"a": 2, "c": 1}}), depth=5, relabel=0.0)
    assert taught.qrels == {"q": {"a": 2, "c": 1, "b": 1}}
    assert taught.negatives["q"] == ["e"]


def test_what_was_judged_stays(dataset):
    """b is known not to be relevant."""
    judged = replace(dataset, qrels={"q": {"a": 1, "b": 0}})
    taught, _ = teach(teacher_of(), STUDENT, judged, depth=5, relabel=0.0)
    assert taught.qrels == judged.qrels
    assert taught.negatives["q"] == ["b", "c", "e"]


def test_a_mined_negative_can_become_a_positive(dataset):
    mined = replace(dataset, negatives={"q": ["b", "e"]})
    taught, counts = teach(teacher_of(), STUDENT, mined, depth=0, relabel=0.0)
    assert taught.qrels == {"q": {"a": 1, "b": 1}}
    assert taught.negatives == {"q": ["e"]}
    assert counts == {"scored": 3, "relabelled": 1, "dropped": 0}


def test_the_student_ranks_by_windows(tmp_path):
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    teacher = Teacher({"bm25": Words()}, {"bm25": 1})
    whole, windows = (teach(teacher, embedder, dataset, depth=3, passages=passages)[0] for passages in (None, (4, 2)))
    assert whole.negatives != windows.negatives
    run = Vectors(embedder, (4, 2)).search(dataset, 3).to_dict()
    assert windows.negatives["q0"] == [i for i in run["q0"] if i != "d0"]


# Lists that are kept.


class Counting(Words):
    """Counts the queries that it scores, and stops at one of them."""

    def __init__(self, stop: str = ""):
        self.asked, self.stop = [], stop

    def scoring(self, dataset, listed):
        score = super().scoring(dataset, listed)

        def counted(some):
            if self.stop in some:
                raise KeyboardInterrupt
            self.asked += list(some)
            return score(some)

        return counted


def counting(**options) -> tuple[Counting, Teacher]:
    part = Counting(**options)
    return part, Teacher({"bm25": part}, {"bm25": 1})


def test_lists_are_made_once(tmp_path):
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    part, teacher = counting()
    first = teach(teacher, embedder, dataset, depth=4, folder=tmp_path / "lists")
    assert len(part.asked) == 12
    assert teach(teacher, embedder, dataset, depth=4, folder=tmp_path / "lists") == first
    assert teach(teacher, embedder, dataset, depth=4) == first
    assert len(part.asked) == 24
    (path,) = (tmp_path / "lists").glob("*.jsonl")
    header, *records = map(json.loads, path.read_text().splitlines())
    assert header["made_from"]["data"] == dataset.sha256()
    assert header["made_from"]["teacher"] == {"bm25": {"weight": 1, "sha256": part.sha256()}}
    assert header["made_from"]["student"] == Vectors(embedder).sha256()
    assert {record["query"]: record["teacher"] for record in records} == first[0].scores
    # How far a positive may be is decided later: these share a file, with the student's scores.
    for relabel in (0.0, 0.5):
        teach(teacher, embedder, dataset, depth=4, relabel=relabel, folder=tmp_path / "lists")
    assert len(part.asked) == 36
    assert len(list((tmp_path / "lists").glob("*.jsonl"))) == 2


def test_whatever_differs_makes_other_lists(tmp_path):
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    part, teacher = counting()
    shorter = make_embedder(tmp_path / "base", max_length=5)
    heavier = Teacher({"bm25": part, "table": Words()}, {"bm25": 1, "table": 2})
    for number, (asked, student, data, options) in enumerate(
        [
            (teacher, embedder, dataset, {}),
            (teacher, embedder, dataset, {"depth": 5}),
            (teacher, embedder, dataset, {"ranking": "teacher"}),
            (teacher, embedder, dataset, {"passages": (4, 2)}),
            (teacher, shorter, dataset, {}),
            (teacher, embedder, make_dataset(seed=1), {}),
            (heavier, embedder, dataset, {}),
            (replace(heavier, weights={"bm25": 2, "table": 2}), embedder, dataset, {}),
            (replace(teacher, scale="raw"), embedder, dataset, {}),
        ],
        start=1,
    ):
        teach(asked, student, data, **{"depth": 4} | options, folder=tmp_path / "lists")
        assert len(list((tmp_path / "lists").glob("*.jsonl"))) == number
    # The student has no say in what the teacher ranks.
    teach(teacher, shorter, dataset, depth=4, ranking="teacher", folder=tmp_path / "lists")
    assert len(list((tmp_path / "lists").glob("*.jsonl"))) == number


@pytest.mark.parametrize("tail", ["", '{"query": "q', "\n"])
def test_interrupted_lists_go_on(tmp_path, monkeypatch, tail):
    """Three queries at a time: with those of two blocks written, and perhaps a part of a line."""
    for place in (module, teachers):
        monkeypatch.setattr(place, "AT_A_TIME", 3)
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    whole = teach(counting()[1], embedder, dataset, depth=4, relabel=0.1, folder=tmp_path / "whole")
    part, teacher = counting(stop="q7")
    with pytest.raises(KeyboardInterrupt):
        teach(teacher, embedder, dataset, depth=4, relabel=0.1, folder=tmp_path / "lists")
    assert part.asked == [f"q{i}" for i in range(6)]
    (path,), (other,) = ((tmp_path / name).glob("*.jsonl") for name in ("lists", "whole"))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    path.write_text("".join(lines[:6]) + tail)  # one line less: its block is scored again
    part, teacher = counting()
    assert teach(teacher, embedder, dataset, depth=4, relabel=0.1, folder=tmp_path / "lists") == whole
    assert part.asked == [f"q{i}" for i in range(3, 12)]
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("line", "found", "replaced", "facts"),
    [
        (0, '"depth": 4', '"depth": 5', ("depth", 4, 5)),
        (0, "made_from", "made_of", ("version",)),
        (1, '"q0"', '"q1"', ("line 2", "q0")),
        (2, '"d1"', '"d99"', ("line 3", "q1")),
        (2, '"teacher": {', '"teacher": {"d8": true, ', ("line 3", "q1")),
        (2, '"teacher"', '"pupil"', ("line 3", "q1")),
        (12, "\n", '\n{"query": "q12", "teacher": {}}\n', (13, 12)),
    ],
)
def test_damaged_lists_are_named(tmp_path, line, found, replaced, facts):
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    teach(counting()[1], embedder, dataset, depth=4, folder=tmp_path / "lists")
    (path,) = (tmp_path / "lists").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    assert found in lines[line]
    lines[line] = lines[line].replace(found, replaced)
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match=naming(path.name, *facts)):
        teach(counting()[1], embedder, dataset, depth=4, folder=tmp_path / "lists")


def test_an_empty_file_is_not_lists(tmp_path):
    dataset, embedder = make_dataset(), make_embedder(tmp_path / "base")
    teach(counting()[1], embedder, dataset, depth=4, folder=tmp_path / "lists")
    (path,) = (tmp_path / "lists").glob("*.jsonl")
    path.write_text("")
    with pytest.raises(ValueError, match=naming(path.name)):
        teach(counting()[1], embedder, dataset, depth=4, folder=tmp_path / "lists")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"depth": -1}, ("depth", -1, 0)),
        ({"depth": 0}, ("depth", 0)),
        ({"ranking": "both"}, ("ranking", "both", "student", "teacher")),
        ({"relabel": math.nan}, ("relabel", math.nan)),
        ({"relabel": 0.0, "absolute_margin": -1.0}, ("absolute_margin", -1.0, 0)),
        ({"relabel": 0.0, "relative_margin": math.inf}, ("relative_margin", math.inf, 0)),
    ],
)
def test_refuses(dataset, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        teach(teacher_of(), STUDENT, replace(dataset, qrels={}), **options)
