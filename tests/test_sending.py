"""Sending: the ledger's arithmetic by hand, limits that are never passed, rates in every window, retries in order."""

import asyncio
import email.utils
import json
import random
import time

import pytest

from embedft.api import sending
from embedft.api.sending import Answer, Job, Ledger, RateLimit, backoff_seconds, retry_after_seconds, send_all

OK = Answer("ok", "done", usage=(0, 0))
RETRY = Answer("failed", "retry", "503", usage=(0, 0))


def job(key: str, prompt_tokens: int = 100, reply_tokens: int = 50, expected_tokens: int = 0) -> Job:
    return Job(key, key, prompt_tokens, reply_tokens, expected_tokens)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The ledger.


def test_the_arithmetic_by_hand(tmp_path):
    """1,000 of prompt and 500 of reply at 2 and 6 a million: 0.002 + 0.003 = 0.005. Twice that fits into 0.01."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, prices=(2.0, 6.0), max_cost=0.01)
    large = job("a", 1000, 500)
    assert ledger.full(large) is None
    assert ledger.reserve(large) == 1
    assert ledger.reserve(large) == 2
    assert ledger.full(large) == "--max-cost 0.01"
    assert ledger.totals() == sending.Totals(2, 0, 0, 2, 0.0, 0.01)
    # 800 and 100 were used: 0.0016 + 0.0006 = 0.0022 instead of 0.005, so 0.0028 are free.
    assert ledger.settle(1, (800, 100)) == 0.0022
    assert ledger.totals() == sending.Totals(2, 800, 100, 1, 0.0022, 0.005)
    assert ledger.full(job("b", 1400, 0)) is None  # exactly 0.0028
    assert ledger.full(job("b", 1401, 0)) == "--max-cost 0.01"
    assert ledger.settle(2, None) is None
    assert ledger.full(job("b", 1401, 0)) == "--max-cost 0.01"
    assert ledger.settle(2, (0, 0)) == 0.0
    assert ledger.totals() == sending.Totals(2, 800, 100, 0, 0.0022, 0.0)
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
    assert again.totals() == sending.Totals(3, 800, 100, 2, 0.0022, 0.01)
    assert again.reserve(large) == 4
    with path.open("a") as file:
        file.write('{"usage": null, "cost": null}\n')
    with pytest.raises(ValueError, match=r"line 7: has no 'request', is it a ledger\?"):
        Ledger(path)


def test_a_ledger_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, prices=(2.0, 6.0), max_cost=0.01)
    ledger.settle(ledger.reserve(job("a", 1000, 500)), (1000, 500))
    ledger.reserve(job("b", 1000, 500))
    assert ledger.full(job("c", 1, 0)) == "--max-cost 0.01"
    assert ledger.totals() == sending.Totals(2, 1000, 500, 1, 0.005, 0.005)
    assert list(tmp_path.iterdir()) == []


def test_tenths_add_up(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", prices=(100_000.0, 0.0), max_cost=0.3)
    for _ in range(3):
        assert ledger.full(job("a", 1, 50)) is None
        ledger.reserve(job("a", 1, 50))
    assert ledger.full(job("a", 1, 50)) == "--max-cost 0.30"
    assert ledger.totals().unreported_cost == 0.3


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
    assert ledger.totals() == sending.Totals(3, 20_000, 5_000, 2, 0.025, 2.0)
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
    assert ledger.totals() == sending.Totals(2, 10, 20, 1, None, None)
    assert lines(path)[0]["most_cost"] is None
    outcomes = [{"request": 1, "usage": {"prompt_tokens": 10, "completion_tokens": 20}, "cost": None}]
    priced = Ledger(path, outcomes, prices=(2.0, 6.0))
    assert priced.totals() == sending.Totals(2, 10, 20, 1, 0.00014, 0.005)


def test_a_deleted_ledger_does_not_give_numbers_twice(tmp_path):
    outcomes = [{"request": 7, "usage": {"prompt_tokens": 10, "completion_tokens": 20}, "cost": 0.5}]
    ledger = Ledger(tmp_path / "ledger.jsonl", outcomes, prices=(1.0, 1.0))
    assert ledger.totals() == sending.Totals(1, 10, 20, 0, 0.5, 0.0)
    assert ledger.reserve(job("a")) == 8


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reserve(job("a"))
    with open(path, "a") as file:
        file.write('{"request": 2, "most_prompt_tokens": 3, "most_cost": null}\n')
    with pytest.raises(ValueError, match=r"ledger\.jsonl line 2: has no 'most_reply_tokens', is it a ledger\?"):
        Ledger(path)


# Rates.


def sent_times(limit: RateLimit, sizes: list[int], start: float = 0.0) -> list[float]:
    now, times = start, []
    for size in sizes:
        now += limit.wait_seconds(now, size)
        assert limit.wait_seconds(now, size) <= 1e-9
        limit.count(now, size)
        times.append(now)
    return times


def test_requests_are_spread_over_the_minute():
    assert sent_times(RateLimit(requests_per_minute=4), [9] * 6) == [0, 15, 30, 45, 60, 75]
    assert sent_times(RateLimit(tokens_per_minute=100), [25, 50, 25]) == [0, 15, 45]
    assert sent_times(RateLimit(requests_per_minute=60, tokens_per_minute=100), [25, 1, 50]) == [0, 15, 16]
    assert sent_times(RateLimit(), [10**9] * 3) == [0, 0, 0]


def test_sizes_that_differ_wait_for_room():
    """60 of 100 take 36 seconds, but a second 60 fits no window with the first."""
    assert sent_times(RateLimit(tokens_per_minute=100), [60, 60, 40]) == [0, 60, 96]
    # The third has to wait until the first is a minute ago, not the second.
    assert sent_times(RateLimit(tokens_per_minute=100), [50, 10, 50]) == [0, 30, 60]


def test_one_larger_than_a_minute_goes_alone():
    assert sent_times(RateLimit(tokens_per_minute=100), [10, 500, 10]) == [0, 60, 120]


@pytest.mark.parametrize("seed", range(20))
def test_no_window_of_a_minute_holds_more(seed):
    generator = random.Random(seed)
    requests, tokens = generator.randint(1, 30), generator.randint(50, 2000)
    limit = RateLimit(requests_per_minute=requests, tokens_per_minute=tokens)
    now, sent = 1000.0, []
    for _ in range(200):
        size = generator.randint(1, 50)
        now += generator.expovariate(1.0) * generator.choice([0, 0, 0, 5, 100])
        now += limit.wait_seconds(now, size)
        limit.count(now, size)
        sent.append((now, size))
    for start, _ in sent:
        window = [size for time, size in sent if start <= time < start + 60 - 1e-6]
        assert len(window) <= requests
        assert sum(window) <= tokens


# Retries.


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": email.utils.formatdate(1_000_012, usegmt=True)}, 12.0),
        ({"retry-after": "Mon, 12 Jan 1970 13:46:52 -0000"}, 12.0),
        ({"retry-after": email.utils.formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_what_a_server_asks_for(headers, seconds):
    assert retry_after_seconds(headers, 1_000_000.0) == seconds


def test_pauses_grow_to_a_cap_and_never_undercut_the_server():
    most = [backoff_seconds(attempt, None, lambda low, high: high) for attempt in (1, 2, 3, 5, 6, 7, 5000)]
    assert most == [0.5, 1.0, 2.0, 8.0, 16.0, 30.0, 30.0]
    assert backoff_seconds(3, None, lambda low, high: low) == 0.0
    assert backoff_seconds(1, 7.0, lambda low, high: low) == 7.0
    assert backoff_seconds(9, 0.5, lambda low, high: high) == 1.0


# The loop.


class Sent:
    """`ask` and `record` of a run by a script: {key: answers, the last for ever}; what was sent, when, how many."""

    def __init__(self, ledger: Ledger, script: dict[str, list[Answer]], delay: float = 0.001):
        self.ledger, self.script, self.delay = ledger, {key: list(answers) for key, answers in script.items()}, delay
        self.order, self.times, self.recorded = [], [], []
        self.in_flight = self.most_in_flight = 0

    async def ask(self, job: Job) -> Answer:
        self.order.append(job.key)
        self.times.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.delay)
        self.in_flight -= 1
        answers = self.script.get(job.key, [OK])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def record(self, job: Job, number: int, answer: Answer, seconds: float) -> None:
        assert seconds >= self.delay
        self.ledger.settle(number, answer.usage)
        self.recorded.append((number, job.key, answer.status))

    def run(self, jobs: list[Job], **options) -> Answer | str | None:
        options = {"concurrency": 1, "max_attempts": 3, "seed": 0, **options}
        return asyncio.run(send_all(jobs, self.ask, ledger=self.ledger, record=self.record, **options))


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture(autouse=True)
def short_pauses(request, monkeypatch):
    if "pauses" not in request.node.name:
        monkeypatch.setattr(sending, "BACKOFF_SECONDS", 0.01)


def test_jobs_are_asked_for_in_order_and_attempts_end(ledger):
    """b fails twice and gets its third, c fails three times and is given up; d is never asked for again."""
    refused = Answer("failed", "refused", "400", usage=(0, 0), suspect=True)
    sent = Sent(ledger, {"b": [RETRY, RETRY, OK], "c": [RETRY], "d": [refused]})
    assert sent.run([job(key) for key in "abcd"]) is None
    assert sorted(sent.order) == list("abbbcccd")
    assert [key for number, key, _ in sent.recorded if number <= 2] == ["a", "b"]
    assert [number for number, _, _ in sent.recorded] == list(range(1, 9))
    assert ledger.totals().num_requests == 8


def test_a_pause_until_a_date_is_measured_on_the_servers_clock():
    headers = {"retry-after": "Sat, 21 Nov 2026 12:00:12 GMT", "date": "Sat, 21 Nov 2026 12:00:10 GMT"}
    assert retry_after_seconds(headers, now=0.0) == 2.0
    assert retry_after_seconds({**headers, "date": "no date"}, now=1_795_262_400.0) == pytest.approx(12.0)


def test_nothing_to_ask_for(ledger):
    assert Sent(ledger, {}).run([]) is None


def test_a_waiting_job_holds_no_place_and_goes_first_when_it_is_due(ledger, monkeypatch):
    monkeypatch.setattr(sending, "backoff_seconds", lambda *_: 0.05)
    sent = Sent(ledger, {"a": [RETRY, OK]}, delay=0.02)
    sent.run([job(str(key)) for key in ["a", *range(8)]])
    again = sent.order.index("a", 1)
    assert 3 <= again <= 6
    assert sent.times[again] - sent.times[0] >= 0.07


def test_nothing_is_sent_while_the_server_asks_for_a_pause(ledger):
    pause = Answer("failed", "retry", "429", usage=(0, 0), retry_after_seconds=0.2)
    sent = Sent(ledger, {"a": [pause, OK]}, delay=0.01)
    assert sent.run([job(str(key)) for key in ["a", *range(8)]], concurrency=2) is None
    # Two were on their way, and one went out while the first was.
    early = [when for when in sent.times if when - sent.times[0] < 0.2]
    assert len(early) <= 3
    assert len(sent.times) == 10


def test_an_outage_is_probed_with_one_request_at_a_time_and_ends_the_job(ledger, monkeypatch):
    """Eight in flight fail together, two probes later the pauses grow; after four probes the job stops."""
    monkeypatch.setattr(sending, "backoff_seconds", lambda attempt, *_: 0.01 * attempt)
    down = Answer("failed", "retry", "503")
    sent = Sent(ledger, {str(i): [down] for i in range(10, 500)}, delay=0.01)
    stopped = sent.run([job(str(i)) for i in range(500)], concurrency=8, max_attempts=4)
    assert stopped.then == "retry"
    assert stopped.reason.endswith("failures in a row, the last: 503")
    assert ledger.totals().num_requests <= 10 + sending.MAX_FAILURES_IN_A_ROW + 8 + 4
    in_order = sorted(sent.times)
    assert in_order[-1] - in_order[-4] >= 0.03 + 0.02 + 0.03  # three replies and growing pauses


def test_a_server_that_comes_back_is_used_as_before(ledger, monkeypatch):
    monkeypatch.setattr(sending, "backoff_seconds", lambda *_: 0.01)
    down = [RETRY, RETRY, OK]
    sent = Sent(ledger, {str(i): down for i in range(8, 20)}, delay=0.005)
    assert sent.run([job(str(i)) for i in range(60)], concurrency=8, max_attempts=4) is None
    assert sent.most_in_flight == 8
    assert ledger.totals().num_requests == 60 + 24


def test_a_reply_of_no_use_is_asked_for_again_at_once(ledger, monkeypatch):
    monkeypatch.setattr(sending, "BACKOFF_SECONDS", 1000.0)
    sent = Sent(ledger, {"a": [Answer("invalid", "retry", "empty", usage=(1, 0)), OK]})
    assert sent.run([job("a"), job("b")]) is None
    assert sent.order == ["a", "a", "b"]


def test_an_answer_may_not_count_as_an_attempt(ledger):
    sent = Sent(ledger, {"a": [Answer("failed", "again", "400", usage=(0, 0)), OK]})
    assert sent.run([job("a")], max_attempts=1) is None
    assert sent.order == ["a", "a"]


def test_concurrency_is_used_and_not_passed(ledger):
    sent = Sent(ledger, {}, delay=0.01)
    sent.run([job(str(i)) for i in range(40)], concurrency=8)
    assert sent.most_in_flight == 8
    assert sent.times[-1] - sent.times[0] < 0.2  # five rounds, not forty


def test_the_rate_holds_in_the_loop(ledger):
    sent = Sent(ledger, {})
    sent.run([job(str(i)) for i in range(6)], concurrency=6, rate=RateLimit(requests_per_minute=2000))
    gaps = [late - early for early, late in zip(sent.times, sent.times[1:], strict=False)]
    assert min(gaps) >= 0.029  # a tick of the clock less than 60 / 2000
    assert len(gaps) == 5


@pytest.mark.parametrize(
    "stop",
    [
        Answer("failed", "stop", "401", usage=(0, 0)),
        Answer("failed", "retry", "429", usage=(0, 0), retry_after_seconds=301.0),
    ],
    ids=["stop", "a long pause"],
)
def test_a_stop_lets_the_others_finish(ledger, stop):
    sent = Sent(ledger, {"a": [stop], "b": [RETRY]})
    assert sent.run([job(key) for key in "abcdef"], concurrency=3) is stop
    assert sent.recorded == [(1, "a", "failed"), (2, "b", "failed"), (3, "c", "ok")]


def test_five_suspects_at_the_start_stop_it(ledger):
    refused = Answer("failed", "refused", "400", usage=(0, 0), suspect=True)
    cut = Answer("invalid", "retry", "cut off", usage=(1, 1), suspect=True)
    bad = {"0": [refused], "1": [RETRY], "2": [cut], **{str(i): [refused] for i in range(3, 20)}}
    sent = Sent(ledger, bad)
    assert sent.run([job(str(i)) for i in range(20)]) is refused
    # 503 is no answer to the question whether the request is at fault; a good reply would be one.
    assert sum(key not in ("1",) for _, key, _ in sent.recorded) == 5


@pytest.mark.parametrize("status", ["ok", "invalid"])
def test_four_suspects_and_a_reply_do_not(ledger, status):
    refused = Answer("failed", "refused", "400", usage=(0, 0), suspect=True)
    good = Answer(status, "done", usage=(0, 0))
    sent = Sent(ledger, {str(i): [good if i == 4 else refused] for i in range(20)})
    assert sent.run([job(str(i)) for i in range(20)]) is None
    assert len(sent.recorded) == 20


def test_limits_of_requests_stop_it(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", max_requests=1234)
    ledger.num_requests = 1229
    sent = Sent(ledger, {})
    assert sent.run([job(str(i)) for i in range(9)], concurrency=3) == "--max-requests 1,234"
    assert len(sent.recorded) == 5


def test_no_room_waits_for_those_in_flight(tmp_path):
    """Room for two reservations of 1.5; each costs 0.3 in the end: 0.3 n + 1.5 <= 3 lets six of seven be asked for."""
    ledger = Ledger(tmp_path / "ledger.jsonl", prices=(10_000.0, 10_000.0), max_cost=3.0)
    used = Answer("ok", "done", usage=(20, 10))
    sent = Sent(ledger, {str(i): [used] for i in range(7)})
    assert sent.run([job(str(i)) for i in range(7)], concurrency=4) == "--max-cost 3.00"
    assert len(sent.recorded) == 6
    assert sent.most_in_flight == 2
    assert ledger.totals().cost == 1.8


@pytest.mark.parametrize("seed", range(12))
def test_the_limit_is_never_passed(tmp_path, seed):
    """Random sizes, faults and concurrency; what a server would charge for each request, whatever it reports."""
    generator = random.Random(seed)
    limit = generator.uniform(0.001, 0.02)
    charged, outcomes = 0.0, []
    for _ in range(3):
        ledger = Ledger(tmp_path / "ledger.jsonl", outcomes, prices=(3.0, 7.0), max_cost=limit, max_requests=70)

        async def ask(job: Job) -> Answer:
            nonlocal charged
            await asyncio.sleep(generator.uniform(0, 0.003))
            kind = generator.choice(["ok", "ok", "invalid", "free", "unknown"])
            if kind == "free":
                return RETRY
            usage = (generator.randint(0, job.prompt_tokens), generator.randint(0, job.reply_tokens))
            charged += (usage[0] * 3.0 + usage[1] * 7.0) / 1e6
            if kind == "unknown":
                return Answer("failed", "retry")
            return Answer(kind, "done" if kind == "ok" else "retry", usage=usage)

        def record(job: Job, number: int, answer: Answer, seconds: float, ledger=ledger) -> None:
            cost = ledger.settle(number, answer.usage)
            totals = ledger.totals()
            assert totals.cost + totals.unreported_cost <= limit + 1e-12
            usage = answer.usage and dict(zip(("prompt_tokens", "completion_tokens"), answer.usage, strict=True))
            outcomes.append({"request": number, "usage": usage, "cost": cost})

        jobs = [job(str(i), generator.randint(1, 300), generator.randint(1, 60)) for i in range(30)]
        options = {"concurrency": generator.randint(1, 9), "max_attempts": 3, "seed": seed}
        asyncio.run(send_all(jobs, ask, ledger=ledger, record=record, **options))
        assert charged <= limit
        assert ledger.totals().num_requests == len(lines(tmp_path / "ledger.jsonl")) <= 70
    assert charged > 0


def test_what_ask_raises_ends_it_and_leaves_the_others_reserved(ledger):
    async def ask(job: Job) -> Answer:
        if job.key == "b":
            raise OSError("disk full")
        await asyncio.sleep(3)

    start = time.monotonic()
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(
            send_all([job(key) for key in "abc"], ask, ledger=ledger, record=None, concurrency=3, max_attempts=1)
        )
    assert ledger.totals().num_unreported == 3
    assert time.monotonic() - start < 2
