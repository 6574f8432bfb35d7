"""An ablation's report as one HTML page that needs nothing else: tables, curves, and the questions that changed.

    Path("report.html").write_text(format_page(results, effects))

The template is page.html; its script reads the data of `page_data` from the page itself.
"""

import itertools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import RetrievalDataset
from ..retrieval.report import Report, paired_values
from ..retrieval.significance import ROUNDING
from .effects import Effect, choose
from .grid import AVERAGE, Grid
from .results import Results
from .tables import NOTES, introduction, shown, table_rows

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = '"data of page.py"'  # in the template
MOST_QUESTIONS, MOST_IN_ALL, MOST_CHARACTERS = 200, 20_000, 700


def format_page(results: Results, effects: Sequence[Effect]) -> str:
    """The page. Its data is ASCII without "<", so that no text in it can end its script."""
    text = json.dumps(page_data(results, effects), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text, 1)


def page_data(results: Results, effects: Sequence[Effect]) -> dict[str, Any]:
    """What the page shows, as JSON values."""
    grid, chosen = results.grid, choose(results)
    metrics, tests = (list(dict.fromkeys(getattr(one, name) for one in effects)) for name in ("metric", "test"))
    points = [
        {"values": {key: shown(value) for key, value in point.items()}, "is_chosen": bool(chosen and chosen[0] == i)}
        for i, point in enumerate(grid.points)
    ]
    rows = [{key: _plain(value) for key, value in row.items()} for row in table_rows(results, effects)]
    limit = max(1, min(MOST_QUESTIONS, MOST_IN_ALL // (len(points) * len(tests) * len(metrics))))
    changed, unreadable = {}, []
    for test in tests:
        if test != AVERAGE:
            try:
                dataset = _questions(results, test)
            except (ValueError, OSError) as error:
                dataset = None
                unreadable.append(f"Questions of {test} are shown by id alone: {error}")
            changed[test] = changed_questions(results, test, metrics, dataset, limit)
    bound = f"Of each point, test set and metric, those that changed most are here, at most {limit}"
    return {
        "title": f"Ablation of {grid.base.get('model', 'a model')}",
        "introduction": introduction(results, effects),
        "metrics": metrics,
        "tests": tests,
        "axes": {key: _axis_values(grid, key) for key in grid.axes},
        "points": points,
        "rows": rows,
        "changed": changed,
        "bound": f"{bound}; of each passage at most {MOST_CHARACTERS} characters.",
        "notes": [*NOTES, *unreadable],
    }


def _axis_values(grid: Grid, key: str) -> list[str]:
    """An axis's values and that of BASE, numbers ascending."""
    found = {shown(value): value for value in [*grid.axes[key], *(point[key] for point in grid.points)]}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in found.values()):
        return sorted(found, key=found.__getitem__)
    return list(found)


def _plain(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _questions(results: Results, test: str) -> RetrievalDataset:
    """The test's data. Raises `ValueError` if it is not there any more or not the same."""
    base = results.grid.base
    how = {name: base[name] for name in ("merge", "skip_empty", "strict") if name in base}
    dataset = RetrievalDataset.load(results.grid.tests[test], **how)
    expected = results.finished[0].cell.hashes.get(f"test {test}")
    if dataset.sha256() != expected:
        raise ValueError(f"{results.grid.tests[test]} has changed since")
    return dataset


def changed_questions(
    results: Results, test: str, metrics: Sequence[str], dataset: RetrievalDataset | None, limit: int
) -> dict[str, Any]:
    """For each metric and point, questions answered better or worse than by BASE, those that changed most
    first; texts are stored once: {"questions": [[id, text]], "passages": [[id, text, is a window]],
    "points": {metric: {point: {...}}}}."""
    base, found = results.of_point(results.grid.points[0]), {metric: {} for metric in metrics}
    questions: dict[tuple[str, str], int] = {}
    passages: dict[tuple[str, str, bool], int] = {}
    relevant = {} if dataset is None else {q: set(dataset.relevant(q)) for q in dataset.qrels}
    for (i, point), metric in itertools.product(enumerate(results.grid.points[1:], start=1), metrics):
        own = results.of_point(point)
        seeds = [seed for seed in own if seed in base]
        if not seeds:
            continue
        before, after = ([cells[seed].reports[test] for seed in seeds] for cells in (base, own))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about lengths, prompts and the like: they are what the grid varies
            before_Q, after_Q = (paired_values(before[0], side, metric).mean(axis=0) for side in (before, after))
        change_Q = np.abs(after_Q - before_Q)
        order = [int(q) for q in np.argsort(-change_Q, kind="stable")[:limit] if change_Q[q] > ROUNDING]
        windows, entries = own[seeds[0]].windows[test], []
        rows = [{query_id: row for row, query_id in enumerate(report.query_ids)} for report in (*before, *after)]
        for q in order:
            query_id = before[0].query_ids[q]
            ranks = [
                _rank(report, row_of[query_id], relevant.get(query_id, set()))
                for report, row_of in zip((*before, *after), rows, strict=True)
            ]
            question = query_id, "" if dataset is None else dataset.queries[query_id]
            passage = _passage(dataset, query_id, windows.get(query_id))
            entry = {"question": questions.setdefault(question, len(questions))}
            entry |= {"before": float(before_Q[q]), "after": float(after_Q[q])}
            if dataset is not None:
                entry |= {"passage": passages.setdefault(passage, len(passages))}
                entry |= {"ranks_before": ranks[: len(before)], "ranks_after": ranks[len(before) :]}
            entries.append(entry)
        found[metric][i] = {"seeds": seeds, "num_changed": int((change_Q > ROUNDING).sum()), "questions": entries}
    return {"questions": list(questions), "passages": list(passages), "points": found}


def _rank(report: Report, row: int, relevant: set[str]) -> int | None:
    """The rank of the first relevant document, from 1; None if none was found."""
    ids = report.run.document_ids
    found = [i >= 0 and ids[i] in relevant for i in report.run.indices[row]]
    return found.index(True) + 1 if True in found else None


def _passage(dataset: RetrievalDataset | None, query_id: str, window: dict[str, Any] | None) -> tuple[str, str, bool]:
    """The id and text of a question's relevant document, cut to its matching window, or else to its beginning."""
    if dataset is None:
        return "", "", False
    document_id = window["document_id"] if window else dataset.relevant(query_id)[0]
    text = dataset.texts[document_id]
    start, end = (window["start"], window["end"]) if window else (0, len(text))
    cut = min(end, start + MOST_CHARACTERS)
    inside = f"{'... ' * (start > 0)}{text[start:cut]}{' ...' * (cut < len(text))}"
    return document_id, inside, window is not None
