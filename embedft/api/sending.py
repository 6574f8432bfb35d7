"""Sends many paid requests over any protocol: rate limits, retries, fallbacks for refused requests, when to stop.

stopped = await Sender(ask, record, ledger, concurrency=16, max_attempts=6).run(jobs)
"""

import asyncio
import contextlib
import heapq
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate, parsedate_to_datetime
from itertools import islice
from typing import Any, Literal

from .ledger import USAGE, Job, Ledger, now_text

BYTES_A_TOKEN = 4  # of English text; for estimates and rate limits, never for budgets
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
MAX_RETRY_AFTER_SECONDS = 300.0  # a longer requested pause means an hourly or daily limit: stop
MAX_FAILURES_IN_A_ROW = 10  # then one request at a time checks whether the server has recovered
MAX_SUSPECTS_AT_FIRST = 5  # after so many, all suggesting that the request itself is wrong, the rest would fail too
MAX_REFUSED_ALONE = 3  # times for exceeding a rate with nothing else in flight: then the request is too large


@dataclass(frozen=True)
class Response:
    """The outcome of one request."""

    status: Literal["ok", "invalid", "failed"]  # "invalid": a useless reply; "failed": none
    action: Literal["done", "retry", "drop", "stop"]  # "drop": unless another form or a split helps
    reason: str | None = None
    result: Any = None
    reply: str | None = None
    usage: tuple[int, int] | None = None  # tokens of prompt and reply; (0, 0): certainly free; None: unknown
    retry_after_seconds: float | None = None
    may_be_refusal: bool = False  # treat as "retry", but the second time as "drop"
    exceeds_rate: bool = False  # too many requests or tokens per time, or too large a request
    suspect: bool = False  # every request, rather than this text, may be wrong


@dataclass
class Forms:
    """Alternative forms of the same request, best first. Keeps the first one accepted; refusals are not parsed."""

    forms: Sequence[Any] = (None,)
    index: int = 0  # of the form to send now
    is_accepted: bool = False

    def has_other(self, job: Job) -> bool:
        """Whether to send a refused `job` in another form."""
        if self.is_accepted:
            return job.forms[-1] != self.index
        left = [index for index in range(len(self.forms)) if index not in job.forms]
        self.index = min(left, default=0)
        return bool(left)


@dataclass
class RateLimit:
    """Spaces requests evenly so that no 60 seconds exceed a limit; a request above the token limit goes alone."""

    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    sent: deque[tuple[float, int]] = field(default_factory=deque)  # when, tokens
    next: float = 0.0  # when the next may go

    def wait_seconds(self, now: float, tokens: int) -> float:
        """How many seconds after `now` a request of `tokens` tokens may be sent."""
        while self.sent and self.sent[0][0] + 60 <= now:
            self.sent.popleft()
        ready = max(self.next, now)
        requests, room = self.requests_per_minute - 1, max(self.tokens_per_minute - tokens, 0)
        for sent_at, size in reversed(self.sent):
            requests, room = requests - 1, room - size
            if min(requests, room) < 0:  # this one has to leave the window first
                return max(ready, sent_at + 60) - now
        return ready - now

    def count(self, now: float, tokens: int) -> None:
        share = min(max(1 / self.requests_per_minute, tokens / self.tokens_per_minute), 1.0)
        if share > 0:
            self.sent.append((now, tokens))
            self.next = now + 60 * share


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The pause that `retry-after-ms` or `Retry-After` (seconds or a date) requests; None if missing or invalid."""
    for name, seconds_a_unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) * seconds_a_unit
            if 0 <= seconds < math.inf:
                return seconds
    with contextlib.suppress(TypeError, ValueError):
        dates = headers.get("retry-after"), headers.get("date") or formatdate(usegmt=True)
        until, now = map(parsedate_to_datetime, dates)
        return max((until - now).total_seconds(), 0.0)
    return None


def backoff_seconds(attempt: int, retry_after: float | None = None) -> float:
    """The pause after failed attempt `attempt` (from 1); jitter spreads out jobs that failed together."""
    if retry_after is not None:
        return retry_after + random.uniform(0.0, BACKOFF_SECONDS)
    return random.uniform(0.0, min(BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 60), MAX_BACKOFF_SECONDS))


@dataclass(eq=False)
class Sender:
    """Sends jobs until each is done, dropped or out of attempts.

    A refused job is sent in another of `forms`, then in the parts that `split` returns; a job is also split when its
    reply is invalid, when it is known to be too large or is out of attempts, or when it alone exceeded a rate
    MAX_REFUSED_ALONE times in a row.
    Nothing is sent while the server asks for a pause. After MAX_FAILURES_IN_A_ROW, requests go one at a time with
    growing pauses; after `concurrency + max_attempts` more failures it stops, since each may cost money."""

    ask: Callable[[Job, Any], Awaitable[Response]]  # sends a job in one of the forms; an exception ends the run
    record: Callable[[Job, Response, dict[str, Any]], None]  # also gets the outcome as a JSON line
    ledger: Ledger
    concurrency: int
    max_attempts: int
    forms: Forms = field(default_factory=Forms)
    split: Callable[[Job, Response], Sequence[Job]] = lambda job, response: ()  # jobs in place of a refused one
    rate: RateLimit = field(default_factory=RateLimit)

    def __post_init__(self) -> None:
        self.queue: deque[Job] = deque()
        self.later: list[tuple[float, int, Job]] = []  # a heap: when to retry, request number, job
        self.failures, self.hold_until = 0, 0.0  # failures in a row
        self.doubts = self.refused_alone = 0  # in a row: possible refusals; rate refusals with nothing else in flight
        self.suspects, self.is_proven = 0, False  # is_proven: some reply was not suspect
        self.stopped: Response | str | None = None

    async def run(self, jobs: Iterable[Job]) -> Response | str | None:
        """Sends all jobs, taking each when there is room. Returns what stopped it, a response or "stopped at LIMIT"."""
        fresh, running, done = iter(jobs), set(), set()
        try:
            while True:
                pause = self._start(fresh, running)
                if running:
                    done, running = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()  # raises what `ask` or `record` raised
                elif pause is None:
                    return self.stopped
                else:
                    await asyncio.sleep(pause)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *done, return_exceptions=True)  # several may have failed at once

    def _start(self, fresh: Iterator[Job], running: set[asyncio.Task]) -> float | None:
        """Sends what may go now. Returns the seconds until the next may go; None: not before another one ends."""
        one_by_one = max(self.failures, self.doubts) >= MAX_FAILURES_IN_A_ROW
        while not self.stopped and len(running) < (1 if one_by_one else self.concurrency):
            now = asyncio.get_running_loop().time()
            if self.later and self.later[0][0] <= now:
                self.queue.appendleft(heapq.heappop(self.later)[2])
            elif not self.queue:
                self.queue.extend(islice(fresh, 1))
            if not self.queue:
                return self.later[0][0] - now if self.later else None
            job = self.queue[0]
            if limit := self.ledger.full(job):  # requests in flight may turn out cheaper than reserved
                self.stopped = None if running else f"stopped at {limit}"
                break
            pause = max(self.hold_until - now, self.rate.wait_seconds(now, job.expected_tokens))
            if pause > 0:
                return pause
            self.queue.popleft()
            self.rate.count(now, job.expected_tokens)
            number, is_alone = self.ledger.reserve(job), not running
            running.add(asyncio.create_task(self._send(job, number, is_alone=is_alone)))
        return None

    async def _send(self, job: Job, number: int, *, is_alone: bool) -> None:
        start = time.monotonic()
        job.forms.append(self.forms.index)
        response = await self.ask(job, self.forms.forms[self.forms.index])
        usage = response.usage and dict(zip(USAGE, response.usage, strict=True))
        line = {"request": number, "status": response.status, "reason": response.reason, "usage": usage}
        line |= {"cost": self.ledger.settle(number, response.usage), "time": now_text()}
        self.record(job, response, line | {"seconds": round(time.monotonic() - start, 3)})
        job.attempts += 1
        if response.status != "failed" and not response.may_be_refusal:
            self.forms.index, self.forms.is_accepted = job.forms[-1], True
            self.failures = self.doubts = self.refused_alone = 0
            self.is_proven = self.is_proven or not response.suspect
            if response.action == "drop" and self._queue_first(self.split(job, response)):
                return
        else:
            self.doubts += response.may_be_refusal
            self.refused_alone += response.exceeds_rate and is_alone and self.ledger.last == number
            if response.action != "stop" and self._send_otherwise(job, response):
                return
            if response.may_be_refusal and job.attempts > 1:  # in every form and size
                response = replace(response, suspect=True)
        if response.action == "retry":
            pause = self._pause(job, response) if response.status == "failed" else 0.0  # else it is not overloaded
            if job.attempts < self.max_attempts:
                heapq.heappush(self.later, (asyncio.get_running_loop().time() + pause, number, job))
        self.suspects += response.suspect and not self.is_proven
        if response.action == "stop" or self.suspects >= MAX_SUSPECTS_AT_FIRST:
            self.stopped = self.stopped or response

    def _send_otherwise(self, job: Job, response: Response) -> bool:
        """Queues a refused job in another form or in parts; returns whether there were any."""
        is_last = job.attempts >= self.max_attempts
        is_refused = response.action == "drop" or (response.may_be_refusal and (is_last or job.attempts > 1))
        is_known = response.action == "drop"  # to be too large: a smaller request was accepted
        parts: Sequence[Job] = ()
        if response.exceeds_rate and (is_known or is_last or self.refused_alone >= MAX_REFUSED_ALONE):
            if parts := self.split(job, replace(response, may_be_refusal=True)):
                self.failures, self.refused_alone = min(self.failures, MAX_FAILURES_IN_A_ROW), 0
                self._pause(job, response)
        elif is_refused and self.forms.has_other(job):
            job.attempts -= 1
            parts = [job]
        elif is_refused or (is_last and self.failures < MAX_FAILURES_IN_A_ROW):  # else the server is down
            parts = self.split(job, response)
            for part in parts:
                part.attempts = int(response.may_be_refusal)
        return self._queue_first(parts)

    def _queue_first(self, jobs: Sequence[Job]) -> bool:
        self.queue.extendleft(reversed(jobs))
        return bool(jobs)

    def _pause(self, job: Job, response: Response) -> float:
        """Counts a failure, and pauses or stops all jobs if needed. Returns the pause before this one is retried."""
        self.failures += 1
        probes, hold = self.failures - MAX_FAILURES_IN_A_ROW, response.retry_after_seconds
        pause = backoff_seconds(job.attempts, hold)
        if hold is None:
            hold = backoff_seconds(probes + 1) if probes >= 0 else 0.0
        self.hold_until = max(self.hold_until, asyncio.get_running_loop().time() + hold)
        is_away = probes >= self.concurrency + self.max_attempts
        if is_away:
            response = replace(response, reason=f"{self.failures} failures in a row, the last: {response.reason}")
        if hold > MAX_RETRY_AFTER_SECONDS or is_away:
            self.stopped = self.stopped or response
        return pause
