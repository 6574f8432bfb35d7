"""Sending many paid requests: rate limits, retries, and a ledger that no killed process can cheat.

Here: when a request may be sent, when it is tried again, what it may cost and what it did. Deliberately not here: what
is asked, of whom, and what a good reply is (client.py and those who use it); no line of this depends on a protocol.

    ledger = Ledger("out/ledger.jsonl", prices=(0.15, 0.60), max_cost=5.0)
    ledger.settle(ledger.reserve(job), (812, 64))
    stopped = await send_all(jobs, ask, ledger=ledger, record=record, concurrency=16, max_attempts=6)
"""

import asyncio
import contextlib
import email.utils
import heapq
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from ..files import append_jsonl, resume_jsonl

MILLION = 1_000_000
WINDOW_SECONDS = 60.0
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
# A server that asks for a longer pause has closed for the hour or the day; the job ends and says so.
MAX_RETRY_AFTER_SECONDS = 300.0
# After so many failures in a row one request at a time finds out whether the server is back.
MAX_FAILURES_IN_A_ROW = 10
# When the first answers of a run all say that the request itself is at fault, the others would say so too.
MAX_SUSPECTS_AT_FIRST = 5


@dataclass(frozen=True)
class Job:
    """One thing to ask for. `key` names it on disk; `content` is for whoever asks.

    `prompt_tokens` and `reply_tokens` are never exceeded and are what is reserved; `expected_tokens`, the likely sum,
    counts for the limit of tokens a minute.
    """

    key: str
    content: Any
    prompt_tokens: int
    reply_tokens: int
    expected_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    `status`: "ok", "invalid" (a reply, of no use) or "failed" (no reply). `then`: "done"; "retry" (as long as there are
    attempts left); "again" (the attempt does not count); "refused" (this job is given up); "stop" (all of them are).
    `usage`: tokens of prompt and reply as reported, (0, 0) when it certainly cost nothing, None when nobody knows.
    `suspect`: the request rather than its text may be at fault; a run that begins with five of them stops.
    """

    status: Literal["ok", "invalid", "failed"]
    then: Literal["done", "retry", "again", "refused", "stop"]
    reason: str | None = None
    result: Any = None
    reply: str | None = None
    usage: tuple[int, int] | None = None
    retry_after_seconds: float | None = None
    suspect: bool = False


@dataclass(frozen=True)
class Totals:
    """What a folder's requests came to, over all its runs.

    `cost` is that of the reported tokens and `unreported_cost` what the `num_unreported` requests without a report may
    have cost at most; the limit holds for their sum. Both are None without prices.
    """

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    num_unreported: int
    cost: float | None
    unreported_cost: float | None


class Ledger:
    """Counts requests and money; a line on disk before each request is sent, so that a killed one counts too.

    A reservation stands until `settle` replaces it by what was used. What an earlier run left open stands for ever.
    Amounts are decimal, so 0.1 + 0.2 is 0.3 and a limit is met to the last digit.

    Args:
        path: ledger.jsonl; its lines are read back and new ones are appended. A line with `usage` is an outcome, where
            these have no file of their own. None: nothing is on disk, and the limits are those of one process.
        outcomes: of earlier runs, records with `request`, `usage` and `cost` as `settle` was told and returned.
        prices: money per million tokens of prompts and of replies; requests of earlier runs keep the price they had.
        max_requests, max_cost: over all runs of the ledger.

    Raises:
        ValueError: a line of the ledger that lacks a field.
    """

    def __init__(
        self,
        path: str | Path | None,
        outcomes: Iterable[Mapping[str, Any]] = (),
        *,
        prices: tuple[float, float] | None = None,
        max_requests: int | None = None,
        max_cost: float | None = None,
    ):
        self.path, self.prices, self.max_requests = None if path is None else Path(path), prices, max_requests
        self.max_cost = None if max_cost is None else _decimal(max_cost)
        self.num_requests = self.last = self.prompt_tokens = self.completion_tokens = 0
        self.cost = self.open_cost = Decimal(0)
        self.open: dict[int, Decimal] = {}
        records = [] if self.path is None else resume_jsonl(self.path)
        for number, record in enumerate(records, start=1):
            try:
                if "usage" in record:
                    self._settle_as_before(record)
                    continue
                tokens, cost = (record["most_prompt_tokens"], record["most_reply_tokens"]), record["most_cost"]
                self._open(record["request"], self._price(*tokens) if cost is None else _decimal(cost))
            except KeyError as error:
                raise ValueError(f"{self.path} line {number}: has no {error}, is it a ledger?") from None
            except (TypeError, ValueError, ArithmeticError):
                raise ValueError(f"{self.path} line {number}: has a field of another kind, is it a ledger?") from None
        for record in outcomes:
            self._settle_as_before(record)

    def full(self, job: Job) -> str | None:
        """The limit that leaves no room for a request of `job`, as in "--max-cost 5.00"; None when there is room."""
        if self.max_requests is not None and self.num_requests >= self.max_requests:
            return f"--max-requests {self.max_requests:,}"
        cost = self._price(job.prompt_tokens, job.reply_tokens)
        if self.max_cost is not None and self.cost + self.open_cost + cost > self.max_cost:
            text = f"{self.max_cost:.2f}"
            return f"--max-cost {text if Decimal(text) == self.max_cost else format(self.max_cost, 'f')}"
        return None

    def reserve(self, job: Job) -> int:
        """The number of a request that may now be sent; its line is on disk."""
        cost = self._price(job.prompt_tokens, job.reply_tokens)
        record = {
            "request": self.last + 1,
            "key": job.key,
            "most_prompt_tokens": job.prompt_tokens,
            "most_reply_tokens": job.reply_tokens,
            "most_cost": None if self.prices is None else float(cost),
            "time": now_text(),
        }
        if self.path is not None:
            append_jsonl(self.path, record)
        self._open(self.last + 1, cost)
        return self.last

    def settle(self, number: int, usage: tuple[int, int] | None, *, cost: float | None = None) -> float | None:
        """Replaces a reservation by the reported tokens; None leaves it as it is. Returns the cost, if known.

        Args:
            cost: what it came to, when that was known earlier; None: by the prices of this run.
        """
        if number not in self.open:  # the ledger was deleted, the replies were not
            self._open(number, Decimal(0))
        if usage is None:
            return None
        self.open_cost -= self.open.pop(number)
        exact = self._price(*usage) if cost is None else _decimal(cost)
        self.prompt_tokens += usage[0]
        self.completion_tokens += usage[1]
        self.cost += exact
        return None if self.prices is None and cost is None else float(exact)

    def totals(self) -> Totals:
        """All runs so far."""
        costs = (None, None) if self.prices is None else (float(self.cost), float(self.open_cost))
        return Totals(self.num_requests, self.prompt_tokens, self.completion_tokens, len(self.open), *costs)

    def _settle_as_before(self, record: Mapping[str, Any]) -> None:
        usage = record["usage"]
        tokens = None if usage is None else (usage["prompt_tokens"], usage["completion_tokens"])
        self.settle(record["request"], tokens, cost=record["cost"])

    def _open(self, number: int, cost: Decimal) -> None:
        self.open[number] = cost
        self.open_cost += cost
        self.num_requests += 1
        self.last = max(self.last, number)

    def _price(self, prompt_tokens: int, reply_tokens: int) -> Decimal:
        return Decimal(0) if self.prices is None else price(self.prices, prompt_tokens, reply_tokens)


def price(prices: tuple[float, float], prompt_tokens: int, reply_tokens: int) -> Decimal:
    """What tokens cost at `prices` per million of prompts and of replies: exact."""
    return (prompt_tokens * _decimal(prices[0]) + reply_tokens * _decimal(prices[1])) / MILLION


def _decimal(value: float) -> Decimal:
    """The shortest decimal that reads back as `value`: what a user wrote, not its nearest binary fraction."""
    return Decimal(repr(float(value)))


def now_text() -> str:
    """The time now, UTC, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class RateLimit:
    """Spaces requests so evenly that no 60 seconds hold more requests, or more tokens, than a minute may.

    Two rules. A request waits until the share of a minute that the one before it took is over; and until what was sent
    in the last 60 seconds leaves room, which the first rule alone misses when sizes differ. A single request larger
    than a whole minute's tokens goes alone.
    """

    def __init__(self, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None):
        self.limits = (requests_per_minute, tokens_per_minute)
        self.sent: deque[tuple[float, tuple[int, int]]] = deque()
        self.sums, self.next = [0, 0], 0.0

    def wait_seconds(self, now: float, tokens: int) -> float:
        """How long a request of so many tokens has to wait, counted from `now`; 0 when it may go."""
        while self.sent and self.sent[0][0] + WINDOW_SECONDS <= now:
            _, sizes = self.sent.popleft()
            self.sums = [total - size for total, size in zip(self.sums, sizes, strict=True)]
        ready, sums = self.next, list(self.sums)
        for sent_at, sizes in self.sent:
            fits = (
                limit is None or total + min(size, limit) <= limit
                for limit, total, size in zip(self.limits, sums, (1, tokens), strict=True)
            )
            if all(fits):
                break
            sums = [total - size for total, size in zip(sums, sizes, strict=True)]
            ready = max(ready, sent_at + WINDOW_SECONDS)
        return max(ready - now, 0.0)

    def count(self, now: float, tokens: int) -> None:
        """A request of so many tokens is sent at `now`."""
        if self.limits == (None, None):
            return
        sizes = (1, tokens)
        self.sent.append((now, sizes))
        self.sums = [total + size for total, size in zip(self.sums, sizes, strict=True)]
        shares = [size / limit for size, limit in zip(sizes, self.limits, strict=True) if limit is not None]
        self.next = now + WINDOW_SECONDS * min(max(shares), 1.0)


def retry_after_seconds(headers: Mapping[str, str], now: float) -> float | None:
    """What `retry-after-ms` or `Retry-After` (seconds, or a date) ask for; None without either, or for nonsense.

    Args:
        headers: with lower-case names, or a mapping that ignores case.
        now: seconds since 1970, which a date is compared with.
    """
    for name, seconds_a_unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * seconds_a_unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    with contextlib.suppress(TypeError, ValueError):
        # The server's own time, when it says it: the clocks may differ.
        now = email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    return max(date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - now, 0.0)


def backoff_seconds(attempt: int, retry_after: float | None, uniform: Callable[[float, float], float]) -> float:
    """The pause after a job's attempt number `attempt` (from 1) failed.

    Anything up to BACKOFF_SECONDS * 2^(attempt - 1), at most MAX_BACKOFF_SECONDS ("full jitter": jobs that failed
    together do not come back together). After a server's own figure, that and up to BACKOFF_SECONDS more.
    """
    if retry_after is not None:
        return retry_after + uniform(0.0, BACKOFF_SECONDS)
    return uniform(0.0, min(BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 60), MAX_BACKOFF_SECONDS))


async def send_all(
    jobs: Sequence[Job],
    ask: Callable[[Job], Awaitable[Answer]],
    *,
    ledger: Ledger,
    record: Callable[[Job, int, Answer, float], None],
    concurrency: int,
    max_attempts: int,
    rate: RateLimit | None = None,
    seed: int | None = None,
) -> Answer | str | None:
    """Asks for every job until it is done or out of attempts; returns when nothing is in flight any more.

    Retries that are due go before jobs that were not asked for yet. A job between two attempts holds no place among
    the `concurrency` in flight. When a limit of the ledger leaves no room, those in flight may still make some.

    While a server asks for a pause, nothing is sent. After MAX_FAILURES_IN_A_ROW one request at a time is, with growing
    pauses between; when `max_attempts` of those have failed too, the job stops, because each might be paid for.

    Args:
        ask: sends one request. An exception is a bug and ends everything.
        record: called with the request's number and seconds the moment an answer is there; it settles the ledger.
        rate: requests and tokens a minute.
        seed: of the jitter.

    Returns:
        None when every job had its attempts, the name of the ledger's limit that stopped it, or the answer that did:
        one that says "stop", the fifth suspect when the first five are, one that asks for too long a pause, or the last
        of many failures in a row.
    """
    loop, wake, rate = asyncio.get_running_loop(), asyncio.Event(), rate or RateLimit()
    uniform = random.Random(seed).uniform
    fresh, again = deque(jobs), []  # again: a heap of (when, request number, job)
    attempts: dict[str, int] = {}
    running: set[asyncio.Task] = set()
    ended: list[asyncio.Task] = []
    suspects, proven = 0, False  # proven: some request got a reply that was not suspect
    hold_until, failures, failed_probes = 0.0, 0, 0  # failures: in a row
    stopped: Answer | str | None = None

    async def attempt(job: Job, number: int) -> None:
        nonlocal suspects, proven, stopped, hold_until, failures, failed_probes
        start, is_probe = time.monotonic(), failures >= MAX_FAILURES_IN_A_ROW
        answer = await ask(job)
        record(job, number, answer, time.monotonic() - start)
        if answer.status != "failed":
            failures = failed_probes = 0
        elif answer.then == "retry":
            failures += 1
            failed_probes += is_probe
            pause = answer.retry_after_seconds
            if pause is None and failures >= MAX_FAILURES_IN_A_ROW:
                pause = backoff_seconds(failed_probes + 1, None, uniform)
            if pause is not None:
                hold_until = max(hold_until, loop.time() + pause)
            if failed_probes >= max_attempts:
                reason = f"{failures} failures in a row, the last: {answer.reason}"
                stopped = stopped or replace(answer, reason=reason)
        if answer.then == "again":
            heapq.heappush(again, (loop.time(), number, job))
        elif answer.then == "retry":
            attempts[job.key] = attempts.get(job.key, 0) + 1
            if answer.retry_after_seconds is not None and answer.retry_after_seconds > MAX_RETRY_AFTER_SECONDS:
                stopped = stopped or answer
            elif attempts[job.key] < max_attempts:
                # A server that sends a reply of no use is not overloaded: no reason to wait.
                is_well = answer.status == "invalid"
                pause = 0.0 if is_well else backoff_seconds(attempts[job.key], answer.retry_after_seconds, uniform)
                heapq.heappush(again, (loop.time() + pause, number, job))
        elif answer.then == "stop":
            stopped = stopped or answer
        if answer.suspect and not proven:
            suspects += 1
            if suspects == MAX_SUSPECTS_AT_FIRST:
                stopped = stopped or answer
        elif answer.status != "failed":
            proven = True

    def end(task: asyncio.Task) -> None:
        ended.append(task)
        wake.set()

    try:
        while True:
            pause = None
            while stopped is None and (fresh or again):
                if len(running) >= (concurrency if failures < MAX_FAILURES_IN_A_ROW else 1):
                    break
                now = loop.time()
                if hold_until > now:
                    pause = hold_until - now
                    break
                is_due = bool(again) and again[0][0] <= now
                if not is_due and not fresh:
                    pause = again[0][0] - now
                    break
                job = again[0][2] if is_due else fresh[0]
                limit = ledger.full(job)
                if limit is not None:
                    if not running:
                        stopped = limit
                    break
                pause = rate.wait_seconds(now, job.expected_tokens)
                if pause > 0:
                    break
                if is_due:
                    heapq.heappop(again)
                else:
                    fresh.popleft()
                rate.count(now, job.expected_tokens)
                task = asyncio.create_task(attempt(job, ledger.reserve(job)))
                task.add_done_callback(end)
                running.add(task)
                pause = None
            if not running and (stopped is not None or not (fresh or again)):
                return stopped
            timer = None if pause is None else loop.call_later(pause, wake.set)
            await wake.wait()
            wake.clear()
            if timer is not None:
                timer.cancel()
            while ended:
                task = ended.pop()
                running.discard(task)
                task.result()  # raises what `ask` or `record` raised
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
