"""Sends many paid requests: rate limits, retries, other forms of what a server refuses, and when to stop.

Knows no protocol: client.py sends one request and classifies the response, ledger.py counts the money.

    stopped = await Sender(ask, record, ledger, concurrency=16, max_attempts=6).run(jobs)
"""

import asyncio
import contextlib
import email.utils
import heapq
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timezone
from itertools import islice
from typing import Any, Literal

from .ledger import Ledger

BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
# A server that asks for a longer pause has closed for the hour or the day.
MAX_RETRY_AFTER_SECONDS = 300.0
# After so many failures in a row, one request at a time finds out whether the server is back.
MAX_FAILURES_IN_A_ROW = 10
# When the first responses of a run all suggest that the request itself is wrong, the rest would too.
MAX_SUSPECTS_AT_FIRST = 5


@dataclass(eq=False)
class Job:
    """One thing to ask for. `key` names it on disk; `content` is for whoever asks.

    `prompt_tokens` and `reply_tokens` are upper bounds, which are reserved; `expected_tokens`, the likely sum, counts
    toward the limit of tokens a minute. `attempts` and `forms` are the sender's: failures, and how it was put.
    """

    key: str
    content: Any
    prompt_tokens: int
    reply_tokens: int
    expected_tokens: int = 0
    attempts: int = 0
    forms: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Response:
    """What came of one request.

    `status`: "ok", "invalid" (a useless reply) or "failed" (no reply). `action`: "done"; "retry" while attempts are
    left; "drop" this job, unless it can be put otherwise or split; "stop" everything. `usage`: tokens of prompt and
    reply as reported, (0, 0) if certainly free, None if unknown. `may_be_refusal`: "retry", and the second time "drop".
    `suspect`: the request rather than its text may be wrong; a run that begins with five of these stops.
    """

    status: Literal["ok", "invalid", "failed"]
    action: Literal["done", "retry", "drop", "stop"]
    reason: str | None = None
    result: Any = None
    reply: str | None = None
    usage: tuple[int, int] | None = None
    retry_after_seconds: float | None = None
    may_be_refusal: bool = False
    suspect: bool = False


class Forms:
    """Ways to put the same request, best first. Refusals are not parsed; the first form that is accepted is kept."""

    def __init__(self, forms: Sequence[Any]):
        self.forms, self.index, self.is_accepted = list(forms), 0, False

    def take(self, job: Job) -> Any:
        """The form in which to send `job` now."""
        job.forms.append(self.index)
        return self.forms[self.index]

    def accept(self, job: Job) -> None:
        """The server took `job` as it was last sent."""
        self.index, self.is_accepted = job.forms[-1], True

    def has_other(self, job: Job) -> bool:
        """Whether to send a refused `job` in another form."""
        if self.is_accepted:
            return job.forms[-1] != self.index
        left = [index for index in range(len(self.forms)) if index not in job.forms]
        self.index = left[0] if left else 0
        return bool(left)


@dataclass
class RateLimit:
    """Spaces requests evenly, and so that no `window_seconds` hold more requests or tokens than a minute may.

    A request larger than a whole minute's tokens goes alone.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    window_seconds: float = 60.0

    def __post_init__(self) -> None:
        self.limits = (self.requests_per_minute or math.inf, self.tokens_per_minute or math.inf)
        self.sent: deque[tuple[float, int]] = deque()  # when, tokens
        self.next = 0.0

    def wait_seconds(self, now: float, tokens: int) -> float:
        """How long a request of so many tokens has to wait from `now`; 0 when it may go."""
        while self.sent and self.sent[0][0] + self.window_seconds <= now:
            self.sent.popleft()
        ready, requests, room = self.next, self.limits[0] - 1, max(self.limits[1] - tokens, 0)
        for sent_at, size in reversed(self.sent):
            requests, room = requests - 1, room - size
            if min(requests, room) < 0:  # this one has to leave the window first
                ready = max(ready, sent_at + self.window_seconds)
                break
        return max(ready - now, 0.0)

    def count(self, now: float, tokens: int) -> None:
        """A request of so many tokens is sent at `now`."""
        share = min(max(1 / self.limits[0], tokens / self.limits[1]), 1.0)
        if share > 0:
            self.sent.append((now, tokens))
            self.next = now + self.window_seconds * share


def retry_after_seconds(headers: Mapping[str, str], now: float) -> float | None:
    """What `retry-after-ms` or `Retry-After` (seconds, or a date) ask for; None without either, or for nonsense.

    `now`: Unix time, which a date is compared with unless the server sends its own.
    """
    for name, seconds_a_unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) * seconds_a_unit
            if 0 <= seconds < math.inf:
                return seconds
    until, date = _unix_time(headers.get("retry-after")), _unix_time(headers.get("date"))
    return None if until is None else max(until - (now if date is None else date), 0.0)


def _unix_time(date: str | None) -> float | None:
    try:
        parsed = email.utils.parsedate_to_datetime(date or "")
        return parsed.replace(tzinfo=parsed.tzinfo or timezone.utc).timestamp()
    except (TypeError, ValueError):
        return None


def backoff_seconds(attempt: int, retry_after: float | None, uniform: Callable[[float, float], float]) -> float:
    """The pause after attempt number `attempt` (from 1) failed: the server's own figure and up to BACKOFF_SECONDS more.

    Without one, up to BACKOFF_SECONDS * 2^(attempt - 1), at most MAX_BACKOFF_SECONDS. The jitter keeps jobs that failed
    together from coming back together.
    """
    if retry_after is not None:
        return retry_after + uniform(0.0, BACKOFF_SECONDS)
    return uniform(0.0, min(BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 60), MAX_BACKOFF_SECONDS))


@dataclass(eq=False)
class Sender:
    """Sends jobs until each is done, dropped or out of attempts.

    What the server refuses is sent in another of `forms`, then in the parts that `split` gives, as is what failed to
    the last attempt. While a server asks for a pause nothing is sent. After MAX_FAILURES_IN_A_ROW one request at a
    time is, with growing pauses; when `max_attempts` of those fail, it stops, as each may have to be paid for.

    Args:
        ask: sends one request. An exception is a bug and ends the run.
        record: gets job, request number, response and seconds as soon as one arrives, and settles the ledger.
        split: (a refused job, its response) -> jobs to send instead; none: it is dropped.
        seed: of the jitter.
    """

    ask: Callable[[Job], Awaitable[Response]]
    record: Callable[[Job, int, Response, float], None]
    ledger: Ledger
    concurrency: int
    max_attempts: int
    forms: Forms | None = None
    split: Callable[[Job, Response], Sequence[Job]] = lambda job, response: ()
    rate: RateLimit = field(default_factory=RateLimit)
    seed: int | None = None

    def __post_init__(self) -> None:
        self.uniform = random.Random(self.seed).uniform
        self.queue: deque[Job] = deque()
        self.later: list[tuple[float, int, Job]] = []  # a heap: when to retry, request number, job
        self.failures = self.failed_probes = 0  # in a row
        self.num_failures = self.suspects = 0  # in all
        self.is_proven, self.hold_until = False, 0.0  # is_proven: some reply was not suspect
        self.stopped: Response | str | None = None

    async def run(self, jobs: Iterable[Job]) -> Response | str | None:
        """Sends all jobs, each taken from the iterable when there is room for it.

        Returns what stopped it: nothing (None), the name of a limit of the ledger, or a response.
        """
        fresh, running = iter(jobs), set()
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
            await asyncio.gather(*running, return_exceptions=True)

    def _start(self, fresh: Iterable[Job], running: set[asyncio.Task]) -> float | None:
        """Starts what may be sent now. Returns seconds until the next may be; None: not before another one ends."""
        while self.stopped is None:
            if len(running) >= (self.concurrency if self.failures < MAX_FAILURES_IN_A_ROW else 1):
                break
            now = asyncio.get_running_loop().time()
            if self.later and self.later[0][0] <= now:
                self.queue.appendleft(heapq.heappop(self.later)[2])
            elif not self.queue:
                self.queue.extend(islice(fresh, 1))
            if not self.queue:
                return self.later[0][0] - now if self.later else None
            job = self.queue[0]
            limit = self.ledger.full(job)
            if limit is not None:  # requests in flight may turn out cheaper than reserved
                self.stopped = None if running else limit
                break
            pause = max(self.hold_until - now, self.rate.wait_seconds(now, job.expected_tokens))
            if pause > 0:
                return pause
            self.queue.popleft()
            self.rate.count(now, job.expected_tokens)
            running.add(asyncio.create_task(self._send(job, self.ledger.reserve(job))))
        return None

    async def _send(self, job: Job, number: int) -> None:
        start, is_probe = time.monotonic(), self.failures >= MAX_FAILURES_IN_A_ROW
        response = await self.ask(job)
        self.record(job, number, response, time.monotonic() - start)
        if response.status != "failed":
            self.failures = self.failed_probes = 0
            self.is_proven = self.is_proven or not response.suspect
        if response.action == "done" or (response.action != "stop" and self._send_otherwise(job, response)):
            return
        if response.action == "retry":
            self._send_later(job, number, response, is_probe)
        self.suspects += response.suspect and not self.is_proven
        if response.action == "stop" or self.suspects >= MAX_SUSPECTS_AT_FIRST:
            self.stopped = self.stopped or response

    def _send_otherwise(self, job: Job, response: Response) -> bool:
        """Queues a refused job in another form or in parts, if there are any."""
        job.attempts += 1
        if response.status != "failed":
            return False
        is_last = job.attempts >= self.max_attempts
        is_refused = response.action == "drop" or (response.may_be_refusal and (is_last or job.attempts > 1))
        if is_refused and self.forms is not None and self.forms.has_other(job):
            job.attempts -= 1
            self.queue.appendleft(job)
            return True
        # While the server is away, the size of a batch is not what is wrong.
        is_to_split = is_refused or (is_last and self.failures < MAX_FAILURES_IN_A_ROW)
        parts = self.split(job, response) if is_to_split else ()
        for part in reversed(parts):
            part.attempts = int(response.may_be_refusal)
            self.queue.appendleft(part)
        return bool(parts)

    def _send_later(self, job: Job, number: int, response: Response, is_probe: bool) -> None:
        """Retries a job after a pause, if attempts are left; after a failure, holds or stops all others if need be."""
        now, pause = asyncio.get_running_loop().time(), 0.0  # a server that sends a useless reply is not overloaded
        if response.status == "failed":
            pause, hold = backoff_seconds(job.attempts, response.retry_after_seconds, self.uniform), 0.0
            self.failures, self.num_failures = self.failures + 1, self.num_failures + 1
            self.failed_probes += is_probe
            if response.retry_after_seconds is not None:
                hold = response.retry_after_seconds
            elif self.failures >= MAX_FAILURES_IN_A_ROW:
                hold = backoff_seconds(self.failed_probes + 1, None, self.uniform)
            self.hold_until = max(self.hold_until, now + hold)
            if self.failed_probes >= self.max_attempts:
                reason = f"{self.failures} failures in a row, the last: {response.reason}"
                self.stopped = self.stopped or replace(response, reason=reason)
            elif hold > MAX_RETRY_AFTER_SECONDS:
                self.stopped = self.stopped or response
        if job.attempts < self.max_attempts:
            heapq.heappush(self.later, (now + pause, number, job))
