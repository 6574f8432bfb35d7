"""Patterns for the facts of an error: found in any wording, and not inside something else."""

import ast
import re
from pathlib import Path

import pytest
from naming import names, naming

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (("depth", 0, 1), "depth is 0, expected at least 1"),
        (("depth", 0, 1), "expected a depth of 1 or more, got 0."),
        (("depth", -1), "depth: -1"),
        (("--size", 2), "expected more (--size=2)"),
        (("x.tsv", 3), "x.tsv line 3:\n4 columns"),
        (("'a b'", "(2, 3)"), "got 'a b' of shape (2, 3)"),
        (("lr", 1e-05), "lr is 1e-05"),
        (("1,000",), "1,000 texts"),
        (("x.tsv", 3, 3), "x.tsv line 3: 3 columns"),
        (("größe.*", "(語", "$^", "\n"), "größe.*\n(語$^"),
        (("lr", 0.1, ..., 0.2), "lr was 0.1 and is 0.2"),
    ],
)
def test_facts_are_found(facts, message):
    assert names(message, *facts)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ((1,), "is 10"),
        ((1,), "is 21"),
        ((1,), "is 1.5"),
        ((1,), "is 0.1"),
        ((1,), "is -1"),
        ((1,), "is 1,000"),
        ((0,), "is 1,0"),
        ((1,), "row1"),
        ((0.5,), "is 10.5"),
        ((0.5,), "is 0.55"),
        ((-1,), "is 2-1"),
        (("dim",), "dims"),
        (("dim",), "student_dim"),
        (("über",), "größeüber"),
        (("--max",), "--max_length"),
        ((".json",), "x.json"),
        (("x.tsv",), "y.tsv"),
        (("x.tsv",), "x_tsv"),
        (("[N, D]",), "[N, 2]"),
        (("depth", 0, 1), "depth is 0"),
        (("x.tsv", 3, 3), "x.tsv line 3: 4 columns"),
        (("a/x.tsv", "x.tsv"), "a/x.tsv: damaged"),
        (("lr", 0.1, ..., 0.2), "lr was 0.2 and is 0.1"),
    ],
)
def test_facts_are_not_found_in_something_else_too_seldom_or_in_another_order(facts, message):
    assert not names(message, *facts)


def test_an_empty_fact_is_no_fact():
    with pytest.raises(AssertionError, match=naming("('depth', '')")):
        naming("depth", "")


def test_no_test_asserts_the_sentence_of_an_error():
    """Every `match` is `naming(...)`, whose facts are single words, numbers, quoted texts and variables."""
    found = []
    for path in sorted(TESTS.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for pattern in (keyword.value for keyword in getattr(call, "keywords", []) if keyword.arg == "match"):
                where = f"{path.name} line {pattern.lineno}"
                if not (isinstance(pattern, ast.Call) and ast.unparse(pattern.func) == "naming"):
                    found.append(f"{where}: not naming(...)")
                found += [
                    f"{where}: {fact.value!r} is more than one fact"
                    for fact in ast.walk(pattern)
                    if isinstance(fact, ast.Constant) and re.match(r"\w\S* +\S", str(fact.value).strip())
                ]
    assert found == []
