"""What requests cost: a line on disk before each is sent, so that a killed process cannot exceed the budget either.

    ledger = Ledger("out/ledger.jsonl", prices=(0.15, 0.60), max_cost=5.0)
    number = ledger.reserve(job)          # unless ledger.full(job)
    ledger.settle(number, (812, 64))      # tokens of prompt and reply

Amounts are decimal, so 0.1 + 0.2 is 0.3 and a limit is met to the last digit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import append_jsonl, resume_jsonl

if TYPE_CHECKING:
    from .sending import Job

USAGE = ("prompt_tokens", "completion_tokens")
MAX_TOKENS = 10**9  # no request has as many: a server that reports more is not believed


@dataclass(frozen=True)
class Totals:
    """What all requests of a ledger came to, over all runs.

    `cost` is that of the reported tokens; `unreported_cost` is the most that the `num_unreported` requests without a
    report may have cost. `max_cost` limits their sum. Both are None without prices.
    """

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    num_unreported: int
    cost: float | None
    unreported_cost: float | None


class Ledger:
    """Counts requests and money. A reservation counts in full until `settle` replaces it by what was used.

    What an earlier run reserved and never settled counts for good.

    Args:
        path: a JSONL file that is read back and appended to. Lines with `usage` are outcomes. None: nothing on disk.
        outcomes: of earlier runs, when they are kept elsewhere; checked by `check_outcome`.
        prices: money per million tokens of prompts and of replies; what is settled keeps the price it had.
        max_requests, max_cost: over all runs.

    Raises:
        ValueError: a malformed line of the file.
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
        outcomes = list(outcomes)
        for line, record in enumerate(() if self.path is None else resume_jsonl(self.path), start=1):
            if "usage" in record:
                check_outcome(record, f"{self.path} line {line}")
                self._settle_again(record)
                continue
            fields = {"request": _is_count, "most_prompt_tokens": _is_count, "most_reply_tokens": _is_count}
            _check(record, fields | {"most_cost": _is_cost}, f"{self.path} line {line}")
            cost = record["most_cost"]
            tokens = record["most_prompt_tokens"], record["most_reply_tokens"]
            self._open(record["request"], self._price(*tokens) if cost is None else _decimal(cost))
        for record in outcomes:
            self._settle_again(record)

    def full(self, job: "Job") -> str | None:
        """The limit that leaves no room for a request of `job`, as in "--max-cost 5.00"; None when there is room."""
        if self.max_requests is not None and self.num_requests >= self.max_requests:
            return f"--max-requests {self.max_requests:,}"
        cost = self._price(job.prompt_tokens, job.reply_tokens)
        if self.max_cost is not None and self.cost + self.open_cost + cost > self.max_cost:
            text = f"{self.max_cost:.2f}"
            return f"--max-cost {text if Decimal(text) == self.max_cost else format(self.max_cost, 'f')}"
        return None

    def reserve(self, job: "Job") -> int:
        """The number of a request that may now be sent; its line is on disk."""
        cost, number = self._price(job.prompt_tokens, job.reply_tokens), self.last + 1
        if self.path is not None:
            record = {"request": number, "key": job.key, "most_prompt_tokens": job.prompt_tokens}
            record |= {"most_reply_tokens": job.reply_tokens, "most_cost": None if self.prices is None else float(cost)}
            append_jsonl(self.path, record | {"time": now_text()})
        self._open(number, cost)
        return number

    def settle(self, number: int, usage: tuple[int, int] | None, *, cost: float | None = None) -> float | None:
        """Replaces a reservation by the reported tokens, or keeps it for `usage` None. Returns the cost, if known.

        Args:
            cost: None: by the prices of this run.
        """
        if number not in self.open:  # the ledger was deleted, the outcomes were not
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

    def _settle_again(self, record: Mapping[str, Any]) -> None:
        usage = record["usage"]
        tokens = None if usage is None else (usage["prompt_tokens"], usage["completion_tokens"])
        self.settle(record["request"], tokens, cost=record["cost"])

    def _open(self, number: int, cost: Decimal) -> None:
        self.open[number] = cost
        self.open_cost += cost
        self.num_requests += 1
        self.last = max(self.last, number)

    def _price(self, prompt_tokens: int, reply_tokens: int) -> Decimal:
        return Decimal(0) if self.prices is None else price_of(self.prices, prompt_tokens, reply_tokens)


def check_outcome(record: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` naming `where` ("ledger.jsonl line 3") and the field of an outcome that is malformed."""
    _check(
        record,
        {"request": _is_count, "usage": lambda value: value is None or _is_usage(value), "cost": _is_cost},
        where,
    )


def _check(record: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    for name, is_valid in fields.items():
        if name not in record:
            raise ValueError(f"{where}: has no {name!r}, is it a ledger?")
        if not is_valid(record[name]):
            raise ValueError(f"{where}: {name} is {str(record[name])[:40]!r}, is it a ledger?")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKENS


def _is_cost(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300 and value >= 0)


def _is_usage(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(name)) for name in USAGE)


def price_of(prices: tuple[float, float], prompt_tokens: int, reply_tokens: int) -> Decimal:
    """What tokens cost at `prices` per million of prompts and of replies: exact."""
    return (prompt_tokens * _decimal(prices[0]) + reply_tokens * _decimal(prices[1])) / 1_000_000


def _decimal(value: float) -> Decimal:
    """The shortest decimal that reads back as `value`: what a user wrote, not its nearest binary fraction."""
    return Decimal(repr(float(value)))


def now_text() -> str:
    """The time now, UTC, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
