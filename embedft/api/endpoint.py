"""An endpoint that embeds texts, asked for many: what is sent in which batches, what comes of it, and what it cost.

Not here: which texts need to be asked for, and what becomes of vectors (openai_api.py); what a reply may be
(embedding_reply.py), how texts that are too long are told and cut (long_texts.py), the client (client.py), rates,
retries and money (sending.py).

    endpoint = Endpoint("text-embedding-3-small", price=0.02, max_cost=1.00)
    endpoint.fetch({"a text": 0}, prompt="", keep=vectors.update)
    print(endpoint.costs)

Shapes: M texts of one request, D features.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import append_jsonl, locked
from .client import Client, Refusal, run_to_end
from .embedding_reply import in_order, read_reply, unit_rows
from .long_texts import TOO_LONG, TokenCounter, is_about_length, shorten
from .sending import Answer, Job, Ledger, RateLimit, now_text, send_all
from .sending import price as price_of
from .server import Server

# A request to api.openai.com may hold 2,048 texts and 300,000 tokens; a token is at least a byte.
MAX_BATCH_TEXTS, MAX_BATCH_TOKENS = 2_048, 300_000
OPENAI_MAX_TOKENS = 8_191
# What a tokenizer may put around a text, for what a request may cost at most.
SPECIAL_TOKENS = 4
BYTES_A_TOKEN = 4  # for the limit of tokens a minute alone


@dataclass(frozen=True)
class ApiCosts:
    """What an `ApiEmbedder` did so far, without earlier runs of its ledger.

    `cost` is that of the `num_tokens` that the server reported (None without a price); `num_unreported` requests came
    without a report. `num_computed` texts were paid for and `num_stored` came from the store; both count texts asked
    for, a text that stands twice in one call is computed once.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_unreported: int = 0
    cost: float | None = None
    num_computed: int = 0
    num_stored: int = 0

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.6f}".rstrip("0").rstrip(".")
        unreported = f" ({self.num_unreported:,} without a report)" if self.num_unreported else ""
        return (
            f"{self.num_computed:,} texts computed, {self.num_stored:,} from the store: {self.num_requests:,} requests"
            f"{unreported}, {self.num_tokens:,} tokens{cost}"
        )


class Endpoint:
    """POST /embeddings of a server, for one model.

    Args:
        model: the name that the server knows.
        base_url: such as http://localhost:8000/v1; None: OPENAI_BASE_URL, else api.openai.com.
        dimensions: features asked of the server, for models that can; None: all.
        too_long: what becomes of a text with more than `max_tokens`. "refuse": an error that names it. "cut": it is
            cut, and stderr told how many were. Without a `tokenizer` the server is the judge: a text that it refuses
            for its length is cut at 8 characters a token, then by a tenth at a time, at whitespace, until it is taken.
        max_tokens: prompt included; None: 8,191 at api.openai.com, elsewhere no limit but the server's.
        tokenizer: tokenizer.json or its folder: texts are counted before anything is sent, and cut at tokens.
        batch_texts: texts of one request, at most 2,048. A batch that is refused for its size is sent in parts.
        concurrency: requests in flight at once.
        requests_per_minute, tokens_per_minute: never more in 60 seconds.
        price: money per million tokens. max_cost: never spend more, over all runs of the ledger, or without one of this
            object. A token is taken for a byte until the server reports, so it stops early rather than late.
        ledger: a JSONL file that gets a line before each request and one after it; one process at a time.
        max_attempts: requests for a batch. timeout_seconds: of one request.

    `dim`: features of its vectors, 0 while neither `dimensions` nor an answer says. `costs`: so far.

    Raises:
        ValueError: no address of a server, no key for api.openai.com, or a setting out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        dimensions: int | None = None,
        too_long: str = "refuse",
        max_tokens: int | None = None,
        tokenizer: str | Path | None = None,
        batch_texts: int = 256,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        price: float | None = None,
        max_cost: float | None = None,
        ledger: str | Path | None = None,
        max_attempts: int = 6,
        timeout_seconds: float = 60.0,
    ):
        if not model.strip():
            raise ValueError("model is empty, expected a name that the server knows")
        positive = {"dimensions": dimensions, "max_tokens": max_tokens, "concurrency": concurrency}
        positive |= {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        positive |= {"max_cost": max_cost, "max_attempts": max_attempts, "timeout_seconds": timeout_seconds}
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected more than 0")
        if not 1 <= batch_texts <= MAX_BATCH_TEXTS:
            raise ValueError(f"batch_texts is {batch_texts}, expected 1 to {MAX_BATCH_TEXTS:,}")
        if price is not None and not 0 <= price < math.inf:
            raise ValueError(f"price is {price}, expected at least 0")
        if max_cost is not None and price is None:
            raise ValueError("max_cost needs price, the money per million tokens")
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long is {too_long!r}, expected one of {', '.join(TOO_LONG)}")
        self.model, self.server = model, Server.find(base_url)
        self.name = f"{self.server.name}, {model}"
        self.dimensions, self.dim = dimensions, dimensions or 0
        self.too_long, self.batch_texts = too_long, batch_texts
        self.max_tokens = OPENAI_MAX_TOKENS if max_tokens is None and self.server.is_openai else max_tokens
        self.tokenizer = None if tokenizer is None else TokenCounter(tokenizer)
        self.concurrency, self.max_attempts, self.timeout_seconds = concurrency, max_attempts, timeout_seconds
        # One for all calls: a minute does not begin anew with each.
        self.rate = RateLimit(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
        self.prices, self.max_cost = None if price is None else (price, 0.0), max_cost
        self.ledger_path = None if ledger is None else Path(ledger)
        self.ledger = Ledger(None, prices=self.prices, max_cost=max_cost)
        self.costs = ApiCosts(cost=None if price is None else 0.0)
        # Base64 has a third of the bytes; a server that refuses it is asked for numbers from then on.
        self.encoding_format = "base64"

    def settings(self, prompt: str) -> dict[str, Any]:
        """All that the vector of a text behind this prompt depends on, as far as anyone here can know."""
        is_cut = self.too_long == "cut"
        return {
            "server": self.server.name.rstrip("/"),
            "model": self.model,
            "dimensions": self.dimensions,
            "prompt": prompt,
            "too_long": self.too_long,
            # A text that is not cut has the same vector whatever the limit.
            "max_tokens": self.max_tokens if is_cut else None,
            "tokenizer": self.tokenizer.sha256 if is_cut and self.tokenizer else None,
        }

    def fetch(
        self,
        rows: Mapping[str, int],
        *,
        prompt: str,
        keep: Callable[[dict[str, np.ndarray]], object],
        done: Callable[[int, str], object] = lambda num_texts, cost: None,
        least_dim: int = 1,
    ) -> None:
        """Asks for the vector of every text, in batches, several at once. Where a loop is running, it works beside it.

        Args:
            rows: {text: its place in what the caller was given, for errors}.
            prompt: goes in front of every text.
            keep: gets {text: [D] float32 of length one} of each answer the moment it is there.
            done: is told how many texts came, and what all requests cost ("" without a price).
            least_dim: vectors of fewer features are of no use: after the first nothing more is asked for.

        Raises:
            ValueError: a text that is too long, a limit reached, or what the server answered, in one line without the
                key; what came by then was given to `keep`.
        """
        if rows:
            run_to_end(_Fetch(self, rows, prompt, keep, done, least_dim).run())


class _Fetch:
    """One `fetch`. `sent`: each text as it goes to the server; `faults`: why one has no vector."""

    def __init__(
        self,
        endpoint: Endpoint,
        rows: Mapping[str, int],
        prompt: str,
        keep: Callable[[dict[str, np.ndarray]], object],
        done: Callable[[int, str], object],
        least_dim: int,
    ):
        self.endpoint, self.rows, self.prompt, self.least_dim = endpoint, rows, prompt, least_dim
        self.keep, self.tell = keep, done
        self.sent = {text: prompt + text for text in rows}
        self.faults: dict[str, str] = {}
        self.cut: set[str] = set()
        self.refused: list[list[str]] = []  # batches that were refused for their length
        self.done: set[str] = set()
        # Of each text as it is sent: tokens, or bytes, which are at least as many.
        self.sizes: dict[str, int] = {}
        self._measure()

    def _measure(self) -> None:
        """Counts what is to be sent; with a tokenizer, cuts or refuses what is too long."""
        tokenizer, limit = self.endpoint.tokenizer, self.endpoint.max_tokens
        if tokenizer is None:
            self.sizes = {text: len(full.encode()) for text, full in self.sent.items()}
            return
        self.sizes = dict(zip(self.sent, tokenizer.count(list(self.sent.values())), strict=True))
        for text, size in self.sizes.items():
            if limit is not None and size > limit:
                what = f"texts[{self.rows[text]}] has {size:,} tokens, max_tokens is {limit:,}"
                if self.endpoint.too_long == "refuse":
                    raise ValueError(f"{self.endpoint.model}: {what} (too_long: cut)")
                shorter, self.sizes[text] = tokenizer.cut(self.sent[text], limit)
                if len(shorter) <= len(self.prompt):
                    raise ValueError(f"{self.endpoint.model}: {what}, and nothing is left of it behind the prompt")
                self.sent[text] = shorter
                self.cut.add(text)

    async def run(self) -> None:
        """Asks for all; what is refused for its length is asked for again, in parts or cut, until nothing is."""
        endpoint, path = self.endpoint, self.endpoint.ledger_path
        with nullcontext() if path is None else locked(path.with_name(f"{path.name}.lock")):
            if path is not None:
                endpoint.ledger = Ledger(path, prices=endpoint.prices, max_cost=endpoint.max_cost)
            stopped, jobs = None, [self._job(batch) for batch in self._batches()]
            client = Client(endpoint.server.url, timeout_seconds=endpoint.timeout_seconds)

            async def ask(job: Job) -> Answer:
                return await self._ask(client, job)

            async with client.openai:
                while jobs and stopped is None:
                    stopped = await send_all(
                        jobs,
                        ask,
                        ledger=endpoint.ledger,
                        record=self._record,
                        concurrency=endpoint.concurrency,
                        max_attempts=endpoint.max_attempts,
                        rate=endpoint.rate,
                    )
                    refused, self.refused = self.refused, []
                    jobs = [self._job(batch) for group in refused for batch in self._smaller(group)]
        if self.cut:
            print(f"{endpoint.name}: {len(self.cut):,} of {len(self.rows):,} texts asked for were cut", file=sys.stderr)
        self._check(stopped)

    def _check(self, stopped: Answer | str | None) -> None:
        """Raises `ValueError` when a text has no vector: why, and what became of the others."""
        missing = [text for text in self.sent if text not in self.done]
        if not missing:
            return
        reason = next((self.faults[text] for text in missing if text in self.faults), None)
        if stopped is not None:
            reason = stopped.reason if isinstance(stopped, Answer) else f"stopped at {stopped}"
        count = f"{len(missing):,} of {len(self.rows):,} texts asked for"
        raise ValueError(f"{self.endpoint.name}: {reason}; {count} have no vector")

    def _batches(self) -> Iterator[list[str]]:
        """The texts in order, cut where there would be too many or too many tokens; a longer one goes alone."""
        batch, num_tokens = [], 0
        for text, size in self.sizes.items():
            if batch and (len(batch) == self.endpoint.batch_texts or num_tokens + size > MAX_BATCH_TOKENS):
                yield batch
                batch, num_tokens = [], 0
            batch.append(text)
            num_tokens += size
        if batch:
            yield batch

    def _job(self, batch: list[str]) -> Job:
        full = [self.sent[text] for text in batch]
        num_bytes = sum(len(text.encode()) for text in full)
        is_counted = self.endpoint.tokenizer is not None
        expected = sum(self.sizes[text] for text in batch) if is_counted else math.ceil(num_bytes / BYTES_A_TOKEN)
        key = hashlib.sha256(json.dumps([self.endpoint.model, *full]).encode()).hexdigest()
        return Job(key, batch, num_bytes + SPECIAL_TOKENS * len(batch), 0, expected)

    def _smaller(self, batch: list[str]) -> Iterator[list[str]]:
        """What to send in place of a batch that was refused for its length: parts, or its one text shorter."""
        if len(batch) > 1:
            # A token is at least a byte, so these are none that is too long.
            short = [text for text in batch if len(self.sent[text].encode()) <= (self.endpoint.max_tokens or 0)]
            others = [text for text in batch if text not in set(short)]
            parts = (short, others) if short and others else (batch[: len(batch) // 2], batch[len(batch) // 2 :])
            yield from parts
            return
        (text,) = batch
        is_cut = self.endpoint.too_long == "cut"
        shorter = shorten(self.sent[text], self.endpoint.max_tokens) if is_cut else ""
        if len(shorter) <= len(self.prompt):
            self.faults[text] = f"texts[{self.rows[text]}] is refused for its length ({self.faults[text]})"
            return
        self.sent[text], self.sizes[text] = shorter, len(shorter.encode())
        self.cut.add(text)
        yield batch

    async def _ask(self, client: Client, job: Job) -> Answer:
        """Sends one batch and says what came of it."""
        body = {"model": self.endpoint.model, "input": [self.sent[text] for text in job.content]}
        body["encoding_format"] = self.endpoint.encoding_format
        if self.endpoint.dimensions is not None:
            body["dimensions"] = self.endpoint.dimensions
        reply = await client.reply(client.openai.embeddings.with_raw_response.create(**body))
        if isinstance(reply, str):
            return self._from_reply(job.content, reply)
        if not isinstance(reply.result, Refusal):
            return reply
        status, text = reply.result
        if re.search("encoding_format|base64", text) and body["encoding_format"] == "base64":
            self.endpoint.encoding_format = "float"
            return Answer("failed", "again", reply.reason, usage=reply.usage)
        if is_about_length(status, text):
            self.refused.append(job.content)
            return replace(reply, result=None, suspect=False)
        return replace(reply, result=None)

    def _from_reply(self, batch: Sequence[str], text: str) -> Answer:
        """An HTTP status that says yes; `Answer.result` is {text: its vector [D] float32}, of those that are good."""
        try:
            pairs, usage = read_reply(text)
        except ValueError as error:
            return Answer("failed", "retry", str(error))
        try:
            vectors_MD = in_order(pairs, len(batch))
            self._check_dim(vectors_MD.shape[1])
        except ValueError as error:
            return Answer("invalid", "refused", str(error), usage=usage, suspect=True)
        self.endpoint.dim = vectors_MD.shape[1]
        unit_MD, is_good_M = unit_rows(vectors_MD)
        good = {text: unit_MD[i] for i, text in enumerate(batch) if is_good_M[i]}
        if len(good) < len(batch):
            bad = int(is_good_M.argmin())
            fault = "of length zero" if np.isfinite(vectors_MD[bad]).all() else "with values that are not finite"
            reason = f"a vector {fault} came back for texts[{self.rows[batch[bad]]}]"
            return Answer("invalid", "refused", reason, result=good, usage=usage, suspect=not good)
        if vectors_MD.shape[1] < self.least_dim:
            reason = f"vectors of {vectors_MD.shape[1]} dimensions came back, dim is {self.least_dim}"
            return Answer("ok", "stop", reason, result=good, usage=usage)
        return Answer("ok", "done", result=good, usage=usage)

    def _check_dim(self, dim: int) -> None:
        asked, known = self.endpoint.dimensions, self.endpoint.dim
        if dim != (known or dim):
            expected = f"those before had {known}" if asked is None else f"asked for {asked}"
            raise ValueError(f"vectors of {dim} dimensions came back, {expected}")

    def _record(self, job: Job, number: int, answer: Answer, seconds: float) -> None:
        """Stores what is good, then settles: a kill between the two counts a request as dearer, never as free."""
        endpoint = self.endpoint
        good = answer.result or {}
        if good:
            self.keep(good)
        self.done |= good.keys()
        for text in job.content:
            if text not in good and answer.reason is not None:
                self.faults[text] = answer.reason
        paid = endpoint.ledger.settle(number, answer.usage)
        if endpoint.ledger_path is not None:
            usage = answer.usage and {"prompt_tokens": answer.usage[0], "completion_tokens": answer.usage[1]}
            line = {"request": number, "status": answer.status, "reason": answer.reason, "usage": usage, "cost": paid}
            append_jsonl(endpoint.ledger_path, line | {"time": now_text(), "seconds": round(seconds, 3)})
        costs = endpoint.costs
        num_tokens = costs.num_tokens + (answer.usage or (0, 0))[0]
        endpoint.costs = replace(
            costs,
            num_requests=costs.num_requests + 1,
            num_tokens=num_tokens,
            num_unreported=costs.num_unreported + (answer.usage is None),
            cost=None if endpoint.prices is None else float(price_of(endpoint.prices, num_tokens, 0)),
            num_computed=costs.num_computed + len(good),
        )
        cost = "" if endpoint.prices is None else f"{endpoint.ledger.cost + endpoint.ledger.open_cost:.4f}"
        self.tell(len(good), cost)
