"""Tracks what requests cost. Each is recorded before it is sent, so even a killed process stays within the budget.

ledger = Ledger("out/ledger.jsonl", prices=(0.15, 0.60), max_cost=5.0)
number = ledger.reserve(job)          # unless ledger.full(job)
ledger.settle(number, (812, 64))      # tokens of prompt and reply
"""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..files import append_jsonl, resume_jsonl

USAGE = ("prompt_tokens", "completion_tokens")
OUTCOME, RESERVATION = ("request", "usage", "cost"), ("request", "most_prompt_tokens", "most_reply_tokens", "most_cost")
MAX_TOKENS = 10**9  # no request has more: a server that reports more is not believed


@dataclass(eq=False)
class Job:
    """One thing to request. The ledger reserves the most it may use; rate limits count `expected_tokens`."""

    key: str  # its name on disk
    content: Any  # for the caller's `ask`
    prompt_tokens: int
    reply_tokens: int
    expected_tokens: int = 0
    attempts: int = 0  # failures so far
    forms: list[int] = field(default_factory=list)  # indices of the forms it was sent in


@dataclass
class Ledger:
    """Requests, tokens and money of all runs. A reservation counts in full until `settle` replaces it, if ever.
    `num_requests`, `prompt_tokens` and `completion_tokens` are counts; `cost` covers reported usage, and `open_cost` is
    the most that the unreported requests in `open` may have cost. `paid` and `reserved` are the exact amounts."""

    path: str | Path | None  # a JSONL file to read back and append to; lines with `usage` are outcomes
    outcomes: InitVar[Iterable[Mapping[str, Any]]] = ()  # of earlier runs, if kept elsewhere
    _: KW_ONLY
    prices: tuple[float, float] | None = None  # per million tokens of prompts and replies; None: costs are None
    max_requests: int | None = None  # like max_cost, over all runs
    max_cost: float | None = None

    def __post_init__(self, outcomes: Iterable[Mapping[str, Any]]) -> None:
        self.num_requests = self.last = self.prompt_tokens = self.completion_tokens = 0
        self.paid = self.reserved = Decimal(0)
        self.open: dict[int, Decimal] = {}
        outcomes = list(outcomes)
        for line, record in enumerate(resume_jsonl(self.path) if self.path else (), start=1):
            names = OUTCOME if "usage" in record else RESERVATION
            check_outcome(record, f"{self.path} line {line}", names)
            if names is OUTCOME:
                outcomes.append(record)
            else:
                number, *tokens, cost = (record[name] for name in names)
                self._open(number, price_of(self.prices, *tokens) if cost is None else _decimal(cost))
        for record in outcomes:
            usage = record["usage"] and tuple(record["usage"][name] for name in USAGE)
            self.settle(record["request"], usage, cost=record["cost"])

    @property
    def cost(self) -> float | None:
        return None if self.prices is None else float(self.paid)

    @property
    def open_cost(self) -> float | None:
        return None if self.prices is None else float(self.reserved)

    def full(self, job: Job) -> str | None:
        """The limit that leaves no room for `job`, such as "--max-cost 5.0"; None if there is room."""
        if self.max_requests is not None and self.num_requests >= self.max_requests:
            return f"--max-requests {self.max_requests:,}"
        cost = self.paid + self.reserved + price_of(self.prices, job.prompt_tokens, job.reply_tokens)
        if self.max_cost is not None and cost > (limit := _decimal(self.max_cost)):
            return f"--max-cost {limit:f}"
        return None

    def reserve(self, job: Job) -> int:
        """Records a request on disk and returns its number; it may then be sent."""
        cost, number = price_of(self.prices, job.prompt_tokens, job.reply_tokens), self.last + 1
        if self.path:
            record = {"request": number, "key": job.key, "most_prompt_tokens": job.prompt_tokens}
            record |= {"most_reply_tokens": job.reply_tokens, "most_cost": None if self.prices is None else float(cost)}
            append_jsonl(self.path, record | {"time": now_text()})
        self._open(number, cost)
        return number

    def settle(self, number: int, usage: tuple[int, int] | None, *, cost: float | None = None) -> float | None:
        """Replaces a reservation with the reported tokens, if any. Returns the cost, by price unless passed."""
        if number not in self.open:  # the ledger was deleted, the outcomes were not
            self._open(number, Decimal(0))
        if usage is None:
            return None
        self.reserved -= self.open.pop(number)
        exact = price_of(self.prices, *usage) if cost is None else _decimal(cost)
        self.prompt_tokens += usage[0]
        self.completion_tokens += usage[1]
        self.paid += exact
        return None if self.prices is None and cost is None else float(exact)

    def _open(self, number: int, cost: Decimal) -> None:
        self.open[number] = cost
        self.reserved += cost
        self.num_requests += 1
        self.last = max(self.last, number)


def is_count(value: Any) -> bool:
    """Whether a value is a credible number of tokens."""
    return type(value) is int and 0 <= value <= MAX_TOKENS


def check_outcome(record: Mapping[str, Any], where: str, names: Iterable[str] = OUTCOME) -> None:
    """Raises `ValueError` naming `where` ("replies.jsonl line 3") and the malformed field of a record."""
    for name in names:
        value = record.get(name, "missing")
        if name == "usage":
            is_valid = value is None or (isinstance(value, dict) and all(is_count(value.get(part)) for part in USAGE))
        elif name.endswith("cost"):
            is_valid = value is None or (type(value) in (int, float) and 0 <= value < 1e18)
        else:
            is_valid = is_count(value)
        if not is_valid:
            raise ValueError(f"{where}: {name} is {str(value)[:40]!r}; is this a ledger?")


def price_of(prices: tuple[float, float] | None, prompt_tokens: int, reply_tokens: int) -> Decimal:
    """The exact cost of tokens at `prices` per million prompt and reply tokens; 0 without prices."""
    price_in, price_out = map(_decimal, prices or (0.0, 0.0))
    return (prompt_tokens * price_in + reply_tokens * price_out) / 1_000_000


def _decimal(value: float) -> Decimal:
    """The shortest decimal that reads back as `value`: what a user wrote, not its nearest binary fraction."""
    return Decimal(repr(float(value)))


def now_text() -> str:
    """The current UTC time, as written to records."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
