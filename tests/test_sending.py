"""sending.py: limits never exceeded, rates in every window, retries, other request forms, splitting, and stopping."""

import asyncio
import email.utils
import gc
import itertools
import json
import random
import time
from dataclasses import replace

import pytest
from naming import names, naming

from embedft.api import sending
from embedft.api.ledger import Ledger
from embedft.api.sending import Forms, Job, RateLimit, Response, Sender, backoff_seconds, retry_after_seconds

OK = Response("ok", "done", usage=(0, 0))
RETRY = Response("failed", "retry", "503", usage=(0, 0))


def job(key: str, prompt_tokens: int = 100, reply_tokens: int = 50, expected_tokens: int = 0) -> Job:
    return Job(key, key, prompt_tokens, reply_tokens, expected_tokens)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        ({"retry-after": email.utils.formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_what_a_server_asks_for(headers, seconds):
    assert retry_after_seconds({"date": email.utils.formatdate(1_000_000, usegmt=True), **headers}) == seconds


def test_pauses_grow_to_a_cap_and_never_undercut_the_server(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    most = [backoff_seconds(attempt) for attempt in (1, 2, 3, 5, 6, 7, 5000)]
    assert most == [0.5, 1.0, 2.0, 8.0, 16.0, 30.0, 30.0]
    assert backoff_seconds(9, 0.5) == 1.0
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    assert backoff_seconds(3) == 0.0
    assert backoff_seconds(1, 7.0) == 7.0


# The loop.


class Sent:
    """`ask` and `record` of a run by a script: {key: answers, the last for ever}; what was sent, when, how many."""

    def __init__(self, ledger: Ledger, script: dict[str, list[Response]], delay: float = 0.001):
        self.ledger, self.script, self.delay = ledger, {key: list(answers) for key, answers in script.items()}, delay
        self.order, self.times, self.recorded = [], [], []
        self.in_flight = self.most_in_flight = 0

    async def ask(self, job: Job, form: None) -> Response:
        self.order.append(job.key)
        self.times.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.delay)
        self.in_flight -= 1
        answers = self.script.get(job.key, [OK])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def record(self, job: Job, answer: Response, line: dict) -> None:
        assert line["seconds"] >= self.delay
        self.recorded.append((line["request"], job.key, line["status"]))

    def run(self, jobs: list[Job], **options) -> Response | str | None:
        options = {"concurrency": 1, "max_attempts": 3, **options}
        return asyncio.run(Sender(self.ask, self.record, ledger=self.ledger, **options).run(jobs))


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture(autouse=True)
def short_pauses(request, monkeypatch):
    if "pauses" not in request.node.name:
        monkeypatch.setattr(sending, "BACKOFF_SECONDS", 0.01)


def test_jobs_are_asked_for_in_order_and_attempts_end(ledger):
    """b fails twice and gets its third, c fails three times and is given up; d is never asked for again."""
    refused = Response("failed", "drop", "400", usage=(0, 0), suspect=True)
    sent = Sent(ledger, {"b": [RETRY, RETRY, OK], "c": [RETRY], "d": [refused]})
    assert sent.run([job(key) for key in "abcd"]) is None
    assert sorted(sent.order) == list("abbbcccd")
    assert [key for number, key, _ in sent.recorded if number <= 2] == ["a", "b"]
    assert [number for number, _, _ in sent.recorded] == list(range(1, 9))
    assert ledger.num_requests == 8


def test_a_pause_until_a_date_without_the_servers_clock():
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 <= retry_after_seconds({"retry-after": in_a_minute}) <= 61


def test_nothing_to_ask_for(ledger):
    assert Sent(ledger, {}).run([]) is None


def test_a_waiting_job_holds_no_place_and_goes_first_when_it_is_due(ledger, monkeypatch):
    monkeypatch.setattr(sending, "backoff_seconds", lambda *_: 0.05)
    sent = Sent(ledger, {"a": [RETRY, OK]}, delay=0.02)
    sent.run([job(str(key)) for key in ["a", *range(8)]])
    again = sent.order.index("a", 1)
    assert 2 <= again <= 6  # on a busy machine the others take longer
    assert sent.times[again] - sent.times[0] >= 0.07


def test_nothing_is_sent_while_the_server_asks_for_a_pause(ledger):
    pause = Response("failed", "retry", "429", usage=(0, 0), retry_after_seconds=0.2)
    sent = Sent(ledger, {"a": [pause, OK]}, delay=0.01)
    assert sent.run([job(str(key)) for key in ["a", *range(8)]], concurrency=2) is None
    # Two were on their way, and one went out while the first was.
    early = [when for when in sent.times if when - sent.times[0] < 0.2]
    assert len(early) <= 3
    assert len(sent.times) == 10


def test_an_outage_is_probed_with_one_request_at_a_time_and_ends_the_job(ledger, monkeypatch):
    """After ten failures one request is sent at a time, with growing pauses; after twelve more the job stops."""
    monkeypatch.setattr(sending, "backoff_seconds", lambda attempt, *_: 0.01 * attempt)
    down = Response("failed", "retry", "503")
    sent = Sent(ledger, {str(i): [down] for i in range(10, 500)}, delay=0.01)
    stopped = sent.run([job(str(i)) for i in range(500)], concurrency=8, max_attempts=4)
    assert stopped.action == "retry"
    assert names(stopped.reason, 22, 503)
    assert ledger.num_requests <= 10 + sending.MAX_FAILURES_IN_A_ROW + 8 + 4
    in_order = sorted(sent.times)
    assert in_order[-1] - in_order[-4] >= 0.03 + 0.02 + 0.03  # three replies and growing pauses


def test_a_server_that_comes_back_is_used_as_before(ledger, monkeypatch):
    monkeypatch.setattr(sending, "backoff_seconds", lambda *_: 0.01)
    down = [RETRY, RETRY, OK]
    sent = Sent(ledger, {str(i): down for i in range(8, 20)}, delay=0.005)
    assert sent.run([job(str(i)) for i in range(60)], concurrency=8, max_attempts=4) is None
    assert sent.most_in_flight == 8
    assert ledger.num_requests == 60 + 24


def test_a_reply_of_no_use_is_asked_for_again_at_once(ledger, monkeypatch):
    monkeypatch.setattr(sending, "BACKOFF_SECONDS", 1000.0)
    sent = Sent(ledger, {"a": [Response("invalid", "retry", "empty", usage=(1, 0)), OK]})
    assert sent.run([job("a"), job("b")]) is None
    assert sent.order == ["a", "a", "b"]


REFUSED = Response("failed", "drop", "400", usage=(0, 0), suspect=True)
DOUBTFUL = Response("failed", "retry", "500", usage=(0, 0), may_be_refusal=True)


class Server:
    """Accepts one of the forms "a" to "c", and jobs of at most `most` letters without an "x"."""

    def __init__(self, ledger: Ledger, form: str = "a", most: int = 99, refusal: Response = REFUSED):
        self.ledger, self.form, self.most, self.refusal = ledger, form, most, refusal
        self.forms, self.sent, self.dropped = Forms("abc"), [], []

    async def ask(self, job: Job, form: str) -> Response:
        self.sent.append((form, job.content))
        await asyncio.sleep(0.001)
        if form != self.form or len(job.content) > self.most or "x" in job.content:
            return self.refusal
        return OK

    def split(self, job: Job, response: Response) -> list[Job]:
        if len(job.content) == 1:
            self.dropped.append(job.content)
            return []
        middle = len(job.content) // 2
        return [Job(half, half, 1, 0) for half in (job.content[:middle], job.content[middle:])]

    def run(self, contents: list[str], **options) -> Response | str | None:
        options = {"concurrency": 1, "max_attempts": 3, "split": self.split, "forms": self.forms, **options}
        sender = Sender(self.ask, lambda *response: None, ledger=self.ledger, **options)
        return asyncio.run(sender.run(Job(content, content, 1, 0) for content in contents))


def test_the_form_that_is_accepted_is_kept(ledger):
    """Refusals do not count as attempts; what was in flight in another form is sent again in the one that works."""
    server = Server(ledger, form="c")
    assert server.run(["1", "2", "3"], max_attempts=1) is None
    assert server.sent == [("a", "1"), ("b", "1"), ("c", "1"), ("c", "2"), ("c", "3")]
    assert server.run(["4", "5"], concurrency=2) is None
    assert server.sent[5:] == [("c", "4"), ("c", "5")]
    server = Server(ledger, form="b")
    assert server.run(["1", "2", "3"], concurrency=3) is None
    assert sorted(server.sent) == [*(("a", i) for i in "123"), *(("b", i) for i in "123")]


def test_a_second_500_is_a_refusal_and_the_first_is_not(ledger):
    server = Server(ledger, form="b", refusal=DOUBTFUL)
    assert server.run(["1"]) is None
    assert server.sent == [("a", "1"), ("a", "1"), ("b", "1")]


def test_a_refused_job_is_sent_in_parts(ledger):
    """Every part goes before the next job, and the one that is refused alone is dropped."""
    server = Server(ledger)
    assert server.run(["abcx", "ef"]) is None
    contents = [content for form, content in server.sent if form == "a"]
    assert contents == ["abcx", "ab", "cx", "c", "x", "ef"]
    assert server.dropped == ["x"]


def test_forms_and_parts_together(ledger):
    """Neither the first form nor the first size is accepted: every size is tried in every form until one works."""
    server = Server(ledger, form="b", most=2)
    assert server.run(["12345678", "90"]) is None
    accepted = [content for form, content in server.sent if form == "b" and len(content) <= 2]
    assert accepted == ["12", "34", "56", "78", "90"]
    assert server.dropped == []


@pytest.mark.parametrize("last", [DOUBTFUL, RETRY])
def test_a_batch_that_fails_to_the_last_attempt_is_sent_in_parts(ledger, last):
    server = Server(ledger, refusal=last)
    server.forms = Forms("a")
    assert server.run(["1234", "x6"], max_attempts=2) is None
    # A part of what was refused with a 500 has no first 500 of its own.
    contents = ["1234", "x6", "x6", "x", "6"] + ["x"] * (last is RETRY)
    assert [content for _, content in server.sent] == contents
    assert server.dropped == ["x"]


def test_a_server_that_is_down_is_left_alone(ledger):
    """Ten failures in a row, and eleven more."""
    server = Server(ledger, form="none", refusal=RETRY)
    server.forms = Forms("a")
    stopped = server.run(["abcdefgh"] * 50, concurrency=8)
    assert names(stopped.reason, 21, RETRY.reason)
    assert len(server.sent) < 50


def test_a_server_that_answers_500_to_everything_is_given_up(ledger):
    """Once ten are refused it is asked one thing at a time, to the fifth that no form and no size makes acceptable."""
    server = Server(ledger, form="none", refusal=DOUBTFUL)
    stopped = server.run(["abcdefgh"] * 50, concurrency=8, max_attempts=6)
    assert stopped.reason == "500"
    assert len(server.sent) < 60
    late = Server(ledger, form="a", refusal=DOUBTFUL)
    assert names(late.run(["abcdefgh", *"xxxxxxxx"]).reason, 14, 500)  # not once it has worked


LIMITED = Response("failed", "retry", "429", usage=(0, 0), exceeds_rate=True)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_what_is_refused_for_its_rate_with_nothing_else_in_flight_is_too_large(ledger, concurrency):
    server = Server(ledger, most=2, refusal=LIMITED)
    assert server.run(["abcdefgh"] * 10, concurrency=concurrency, max_attempts=6) is None
    sizes = [len(content) for _, content in server.sent]
    assert sizes.count(2) == sizes.count(1) + 40 == 40
    if concurrency == 1:
        assert sizes[:3] == [8, 8, 8]
        assert 4 in sizes[3:13]  # by chance, the other nine jobs may go before a half
    assert all(form == "a" for form, _ in server.sent)


def test_what_is_known_to_be_too_large_is_halved_after_the_pause_that_the_server_asks_for(ledger):
    too_large = replace(LIMITED, action="drop", retry_after_seconds=0.3)
    server, start = Server(ledger, most=4, refusal=too_large), time.monotonic()
    times = []
    accept = server.ask

    async def ask(job: Job, form: str) -> Response:
        times.append(time.monotonic() - start)
        return await accept(job, form)

    server.ask = ask
    assert server.run(["abcdefgh"], concurrency=2) is None
    assert [content for _, content in server.sent] == ["abcdefgh", "abcd", "efgh"]
    assert {form for form, _ in server.sent} == {"a"}
    assert times[1] - times[0] >= 0.3


def test_what_is_refused_for_the_others_in_flight_stays_whole(ledger):
    server = Server(ledger)
    accept, num_in_flight = server.ask, 0

    async def ask(job: Job, form: str) -> Response:
        nonlocal num_in_flight
        num_in_flight += 1
        is_alone = num_in_flight == 1
        reply = await accept(job, form)
        num_in_flight -= 1
        return reply if is_alone else LIMITED

    server.ask = ask
    assert server.run(["abcdefgh"] * 30, concurrency=4, max_attempts=20) is None
    assert {content for _, content in server.sent} == {"abcdefgh"}


def test_jobs_are_taken_when_there_is_room(ledger):
    taken, sent = [], Sent(ledger, {})

    def jobs():
        for key in "abcdef":
            taken.append((key, len(sent.recorded)))
            yield job(key)

    sender = Sender(sent.ask, sent.record, ledger=ledger, concurrency=2, max_attempts=1)
    assert asyncio.run(sender.run(jobs())) is None
    assert all(place - number_done <= 2 for place, (_, number_done) in enumerate(taken))


def test_concurrency_is_used_and_not_passed(ledger):
    sent = Sent(ledger, {}, delay=0.01)
    sent.run([job(str(i)) for i in range(40)], concurrency=8)
    assert sent.most_in_flight == 8
    assert sent.times[-1] - sent.times[0] < 0.2  # five rounds, not forty


def test_the_rate_holds_in_the_loop(ledger):
    """By the sender's clock, not by when a busy machine gets to run the request."""
    rate = RateLimit(requests_per_minute=2000)
    Sent(ledger, {}).run([job(str(i)) for i in range(6)], concurrency=6, rate=rate)
    times = [sent_at for sent_at, _ in rate.sent]
    assert len(times) == 6
    assert min(late - early for early, late in itertools.pairwise(times)) >= 0.03 - 1e-9


@pytest.mark.parametrize(
    "stop",
    [
        Response("failed", "stop", "401", usage=(0, 0)),
        Response("failed", "retry", "429", usage=(0, 0), retry_after_seconds=301.0),
    ],
    ids=["stop", "a long pause"],
)
def test_a_stop_lets_the_others_finish(ledger, stop):
    sent = Sent(ledger, {"a": [stop], "b": [RETRY]})
    assert sent.run([job(key) for key in "abcdef"], concurrency=3) is stop
    assert sent.recorded == [(1, "a", "failed"), (2, "b", "failed"), (3, "c", "ok")]


def test_five_suspects_at_the_start_stop_it(ledger):
    refused = Response("failed", "drop", "400", usage=(0, 0), suspect=True)
    cut = Response("invalid", "retry", "cut off", usage=(1, 1), suspect=True)
    bad = {"0": [refused], "1": [RETRY], "2": [cut], **{str(i): [refused] for i in range(3, 20)}}
    sent = Sent(ledger, bad)
    assert sent.run([job(str(i)) for i in range(20)]) is refused
    # 503 is no answer to the question whether the request is at fault; a good reply would be one.
    assert sum(key not in ("1",) for _, key, _ in sent.recorded) == 5


@pytest.mark.parametrize("status", ["ok", "invalid"])
def test_four_suspects_and_a_reply_do_not(ledger, status):
    refused = Response("failed", "drop", "400", usage=(0, 0), suspect=True)
    good = Response(status, "done", usage=(0, 0))
    sent = Sent(ledger, {str(i): [good if i == 4 else refused] for i in range(20)})
    assert sent.run([job(str(i)) for i in range(20)]) is None
    assert len(sent.recorded) == 20


def test_limits_of_requests_stop_it(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", max_requests=1234)
    ledger.num_requests = 1229
    sent = Sent(ledger, {})
    assert names(sent.run([job(str(i)) for i in range(9)], concurrency=3), "--max-requests", "1,234")
    assert len(sent.recorded) == 5


def test_no_room_waits_for_those_in_flight(tmp_path):
    """Room for two reservations of 1.5; each costs 0.3 in the end: 0.3 n + 1.5 <= 3 lets six of seven be asked for."""
    ledger = Ledger(tmp_path / "ledger.jsonl", prices=(10_000.0, 10_000.0), max_cost=3.0)
    used = Response("ok", "done", usage=(20, 10))
    sent = Sent(ledger, {str(i): [used] for i in range(7)})
    assert names(sent.run([job(str(i)) for i in range(7)], concurrency=4), "--max-cost", 3.0)
    assert len(sent.recorded) == 6
    assert sent.most_in_flight == 2
    assert ledger.cost == 1.8


@pytest.mark.parametrize("seed", range(12))
def test_the_limit_is_never_passed(tmp_path, seed):
    """Random sizes, faults and concurrency; what a server would charge for each request, whatever it reports."""
    generator = random.Random(seed)
    limit = generator.uniform(0.001, 0.02)
    charged, outcomes = 0.0, []
    for _ in range(3):
        ledger = Ledger(tmp_path / "ledger.jsonl", outcomes, prices=(3.0, 7.0), max_cost=limit, max_requests=70)

        async def ask(job: Job, form: None) -> Response:
            nonlocal charged
            await asyncio.sleep(generator.uniform(0, 0.003))
            kind = generator.choice(["ok", "ok", "invalid", "free", "unknown"])
            if kind == "free":
                return RETRY
            usage = (generator.randint(0, job.prompt_tokens), generator.randint(0, job.reply_tokens))
            charged += (usage[0] * 3.0 + usage[1] * 7.0) / 1e6
            if kind == "unknown":
                return Response("failed", "retry")
            return Response(kind, "done" if kind == "ok" else "retry", usage=usage)

        def record(job: Job, answer: Response, line: dict, ledger=ledger) -> None:
            assert ledger.cost + ledger.open_cost <= limit + 1e-12
            outcomes.append(line)

        jobs = [job(str(i), generator.randint(1, 300), generator.randint(1, 60)) for i in range(30)]
        options = {"concurrency": generator.randint(1, 9), "max_attempts": 3}
        asyncio.run(Sender(ask, record, ledger=ledger, **options).run(jobs))
        assert charged <= limit
        assert ledger.num_requests == len(lines(tmp_path / "ledger.jsonl")) <= 70
    assert charged > 0


def test_what_ask_raises_ends_it_and_leaves_the_others_reserved(ledger):
    async def ask(job: Job, form: None) -> Response:
        if job.key == "b":
            raise OSError("disk")
        await asyncio.sleep(3)

    start = time.monotonic()
    with pytest.raises(OSError, match=naming("disk")):
        asyncio.run(Sender(ask, None, ledger=ledger, concurrency=3, max_attempts=1).run([job(key) for key in "abc"]))
    assert len(ledger.open) == 3
    assert time.monotonic() - start < 2


def test_a_full_disk_is_told_once(ledger):
    """All sixteen fail in the same moment: the first error is raised, and asyncio has none to complain about."""
    complaints = []

    async def ask(job: Job, form: None) -> Response:
        return OK

    def record(*arguments) -> None:
        raise OSError(28, "No space left on device", "replies.jsonl")

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        sender = Sender(ask, record, ledger=ledger, concurrency=16, max_attempts=1)
        with pytest.raises(OSError, match=naming(28, "replies.jsonl")):
            await sender.run([job(str(i)) for i in range(16)])
        del sender
        gc.collect()

    asyncio.run(run())
    assert complaints == []
