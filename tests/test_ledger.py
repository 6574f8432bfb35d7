"""ledger.py: arithmetic by hand, limits kept to the last digit, malformed lines."""

import json

import pytest
from naming import naming

from embedft.api.ledger import Ledger, check_outcome
from embedft.api.sending import Job


def job(key: str, prompt_tokens: int = 100, reply_tokens: int = 50) -> Job:
    return Job(key, key, prompt_tokens, reply_tokens)


def totals(ledger: Ledger) -> tuple:
    """Requests, tokens of prompts and replies, requests without a report, cost, and the most that these may cost."""
    costs = (ledger.cost, ledger.open_cost)
    return ledger.num_requests, ledger.prompt_tokens, ledger.completion_tokens, len(ledger.open), *costs


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_arithmetic_by_hand(tmp_path):
    """1,000 of prompt and 500 of reply at 2 and 6 a million: 0.002 + 0.003 = 0.005. Twice that fits into 0.01."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, prices=(2.0, 6.0), max_cost=0.01)
    large = job("a", 1000, 500)
    assert ledger.full(large) is None
    assert ledger.reserve(large) == 1
    assert ledger.reserve(large) == 2
    assert ledger.full(large) == "--max-cost 0.01"
    assert totals(ledger) == (2, 0, 0, 2, 0.0, 0.01)
    # 800 and 100 were used: 0.0016 + 0.0006 = 0.0022 instead of 0.005, so 0.0028 are free.
    assert ledger.settle(1, (800, 100)) == 0.0022
    assert totals(ledger) == (2, 800, 100, 1, 0.0022, 0.005)
    assert ledger.full(job("b", 1400, 0)) is None  # exactly 0.0028
    assert ledger.full(job("b", 1401, 0)) == "--max-cost 0.01"
    assert ledger.settle(2, None) is None
    assert ledger.full(job("b", 1401, 0)) == "--max-cost 0.01"
    assert ledger.settle(2, (0, 0)) == 0.0
    assert totals(ledger) == (2, 800, 100, 0, 0.0022, 0.0)
    first, second = lines(path)
    assert (first["request"], second["request"]) == (1, 2)
    assert {key: first[key] for key in ("key", "most_prompt_tokens", "most_reply_tokens", "most_cost")} == {
        "key": "a",
        "most_prompt_tokens": 1000,
        "most_reply_tokens": 500,
        "most_cost": 0.005,
    }


def test_outcomes_in_the_ledger_itself(tmp_path):
    """A request of 0.005 at most that came to 0.0022, one whose outcome nobody knows, one that was killed."""
    path = tmp_path / "ledger.jsonl"
    ledger, large = Ledger(path, prices=(2.0, 6.0)), job("a", 1000, 500)
    for _ in range(3):
        ledger.reserve(large)
    usage = {"prompt_tokens": 800, "completion_tokens": 100}
    with path.open("a") as file:
        for record in ({"request": 2, "usage": usage, "cost": 0.0022}, {"request": 1, "usage": None, "cost": None}):
            file.write(json.dumps(record) + "\n")
    again = Ledger(path, prices=(2.0, 6.0))
    assert totals(again) == (3, 800, 100, 2, 0.0022, 0.01)
    assert again.reserve(large) == 4
    with path.open("a") as file:
        file.write('{"usage": null, "cost": null}\n')
    with pytest.raises(ValueError, match=naming(path, 7, "request", "'missing'")):
        Ledger(path)


def test_a_ledger_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, prices=(2.0, 6.0), max_cost=0.01)
    ledger.settle(ledger.reserve(job("a", 1000, 500)), (1000, 500))
    ledger.reserve(job("b", 1000, 500))
    assert ledger.full(job("c", 1, 0)) == "--max-cost 0.01"
    assert totals(ledger) == (2, 1000, 500, 1, 0.005, 0.005)
    assert list(tmp_path.iterdir()) == []


def test_tenths_add_up(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", prices=(100_000.0, 0.0), max_cost=0.3)
    for _ in range(3):
        assert ledger.full(job("a", 1, 50)) is None
        ledger.reserve(job("a", 1, 50))
    assert ledger.full(job("a", 1, 50)) == "--max-cost 0.3"
    assert ledger.open_cost == 0.3


def test_costs_are_floats_or_none():
    ledger = Ledger(None, prices=(0.1, 0.2))
    ledger.settle(ledger.reserve(job("a")), (100, 50))
    assert [type(ledger.cost), type(ledger.open_cost)] == [float, float]
    assert (Ledger(None).cost, Ledger(None).open_cost) == (None, None)


def test_what_an_earlier_run_left_counts(tmp_path):
    """Three requests: one was reported, one got no outcome, one has an outcome that says nothing of its cost."""
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, prices=(1.0, 1.0))
    for key in "abc":
        first.reserve(job(key, 600_000, 400_000))
    outcomes = [
        {"request": 3, "usage": None, "cost": None},
        {"request": 1, "usage": {"prompt_tokens": 20_000, "completion_tokens": 5_000}, "cost": 0.025},
    ]
    with open(path, "ab") as file:
        file.write(b'{"request": 4, "key"')  # killed while it was writing: not sent, so it does not count
    ledger = Ledger(path, outcomes, prices=(10.0, 10.0), max_requests=4, max_cost=2.025 + 10.0)
    assert totals(ledger) == (3, 20_000, 5_000, 2, 0.025, 2.0)
    assert ledger.full(job("d", 600_000, 400_000)) is None
    assert ledger.full(job("d", 600_000, 400_001)) == "--max-cost 12.025"
    assert ledger.reserve(job("d", 0, 0)) == 4
    assert ledger.full(job("d", 0, 0)) == "--max-requests 4"
    assert [line["request"] for line in lines(path)] == [1, 2, 3, 4]


def test_without_prices_there_is_no_cost_and_later_ones_price_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.reserve(job("a", 1000, 500))
    ledger.reserve(job("b", 1000, 500))
    assert ledger.settle(1, (10, 20)) is None
    assert totals(ledger) == (2, 10, 20, 1, None, None)
    assert lines(path)[0]["most_cost"] is None
    outcomes = [{"request": 1, "usage": {"prompt_tokens": 10, "completion_tokens": 20}, "cost": None}]
    priced = Ledger(path, outcomes, prices=(2.0, 6.0))
    assert totals(priced) == (2, 10, 20, 1, 0.00014, 0.005)


def test_a_deleted_ledger_does_not_give_numbers_twice(tmp_path):
    outcomes = [{"request": 7, "usage": {"prompt_tokens": 10, "completion_tokens": 20}, "cost": 0.5}]
    ledger = Ledger(tmp_path / "ledger.jsonl", outcomes, prices=(1.0, 1.0))
    assert totals(ledger) == (1, 10, 20, 0, 0.5, 0.0)
    assert ledger.reserve(job("a")) == 8


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reserve(job("a"))
    with open(path, "a") as file:
        file.write('{"request": 2, "most_prompt_tokens": 3, "most_cost": null}\n')
    with pytest.raises(ValueError, match=naming(path, 2, "most_reply_tokens", "'missing'")):
        Ledger(path)


def reservation(**changed) -> dict:
    return {"request": 1, "key": "a", "most_prompt_tokens": 1, "most_reply_tokens": 1, "most_cost": None, **changed}


def outcome(**changed) -> dict:
    return {"request": 1, "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "cost": 0.5, **changed}


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (reservation(request="1"), "request", "'1'"),
        (reservation(request=-1), "request", "'-1'"),
        (reservation(request=True), "request", "'True'"),
        (reservation(most_prompt_tokens=None), "most_prompt_tokens", "'None'"),
        (reservation(most_cost="1"), "most_cost", "'1'"),
        (reservation(most_cost=float("nan")), "most_cost", "'nan'"),
        (outcome(request=None), "request", "'None'"),
        (outcome(usage=3), "usage", "'3'"),
        (outcome(usage={"prompt_tokens": 1}), "usage", "{'prompt_tokens': 1}"),
        (outcome(usage={"prompt_tokens": 1, "completion_tokens": 10**400}), "usage", "{'prompt_tokens': 1"),
        (outcome(cost=float("inf")), "cost", "'inf'"),
        (outcome(cost=-1), "cost", "'-1'"),
        (outcome(cost=10**400), "cost", f"'{10**39}'"),
    ],
)
def test_malformed_lines_are_named(tmp_path, record, field, value):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(reservation()) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=naming(path, 2, field, value)):
        Ledger(path)
    if "usage" in record:
        with pytest.raises(ValueError, match=naming("replies.jsonl", 7, field, value)):
            check_outcome(record, "replies.jsonl line 7")


def test_lines_that_are_as_they_should_be(tmp_path):
    path = tmp_path / "ledger.jsonl"
    records = [reservation(), outcome(), reservation(request=2, most_cost=3), outcome(request=2, usage=None, cost=None)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert totals(Ledger(path, prices=(1.0, 1.0))) == (2, 1, 2, 1, 0.5, 3.0)
