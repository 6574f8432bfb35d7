"""Embeds many texts with one server and model: batching, cutting long texts, errors and costs.

endpoint = Endpoint(EndpointConfig("text-embedding-3-small", price=0.02, max_cost=1.00))
Fetch(endpoint, {"a text": 0}, prompt="", keep=vectors.update).run()
"""

import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import option
from ..files import append_jsonl, locked
from .client import Client, Server, ServerConfig, reported_usage
from .ledger import Ledger
from .sending import BYTES_A_TOKEN, Forms, Job, RateLimit, Response, Sender

OPENAI_MAX_TOKENS = 8_191
SPECIAL_TOKENS = 4  # a tokenizer may add these to a text; counted in the most a request may cost
ENCODING_FORMATS = ("base64", "float", None)  # base64 is a third of the size; None omits the field


class ApiCosts(Ledger):
    """What an `ApiEmbedder` has used so far, excluding earlier runs in its ledger."""

    num_computed = num_stored = 0  # texts

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.6f}".rstrip("0").rstrip(".")
        unreported = f" ({len(self.open):,} without a report)" if self.open else ""
        texts = f"{self.num_computed:,} texts computed, {self.num_stored:,} from the store"
        return f"{texts}: {self.num_requests:,} requests{unreported}, {self.prompt_tokens:,} tokens{cost}"


@dataclass(frozen=True)
class EndpointConfig(ServerConfig):
    """A model behind an OpenAI-compatible server (openai:MODEL). A `ledger` is for one process at a time; without one,
    `max_cost` covers one `Endpoint`."""

    _: KW_ONLY
    dimensions: int | None = option(None, "dimensions to request [all]", least=1)
    too_long: Literal["refuse", "cut"] = option("refuse", "cut: `shorten` a refused text until the server accepts it")
    batch_texts: int = option(256, "texts per request; lowered if the server refuses that many", least=1, below=2_049)
    batch_bytes: int = option(300_000, "bytes per request; a longer text goes alone", least=1)
    price: float | None = option(None, "per million tokens; until usage is reported, a byte counts as one", least=0)
    ledger: str | Path | None = option(None, "JSONL file with a line before and after each request", metavar="FILE")
    own_parameters = ("model", "input", "dimensions")

    @property
    def prices(self) -> tuple[float, float] | None:
        return None if self.price is None else (self.price, 0.0)


class Endpoint:
    """A server's /embeddings endpoint, for one model. `dim` is 0 until known; `costs` are the totals so far.
    Remembers across fetches which encoding format and batch size the server accepts."""

    def __init__(self, config: EndpointConfig):
        self.config, self.server = config, Server.find(config.base_url)
        self.name = f"{self.server.name}, {config.model}"
        self.dim, self.batch_texts = config.dimensions or 0, config.batch_texts
        self.max_tokens = OPENAI_MAX_TOKENS if self.server.is_openai else None  # of a text; None: unknown
        self.forms = Forms([None] if "encoding_format" in config.parameters else ENCODING_FORMATS)
        # Shared by all fetches, so that none starts a new minute.
        self.rate = RateLimit(config.requests_per_minute or math.inf, config.tokens_per_minute or math.inf)
        self.spent = Ledger(None, prices=config.prices, max_cost=config.max_cost)
        self.costs = ApiCosts(None, prices=config.prices)

    def settings(self, prompt: str) -> dict[str, Any]:
        """Everything that a text's vector depends on with this prompt, as far as the client can tell."""
        config = self.config
        max_tokens = self.max_tokens if config.too_long == "cut" else None  # without cutting, it has no effect
        settings = {"server": self.server.name.rstrip("/"), "model": config.model, "dimensions": config.dimensions}
        settings |= {"prompt": prompt, "too_long": config.too_long, "max_tokens": max_tokens, "tokenizer": None}
        return settings | ({"parameters": config.parameters} if config.parameters else {})


@dataclass
class Fetch:
    """Requests a vector for every text, several batches at a time."""

    endpoint: Endpoint
    rows: Mapping[str, int]  # {text: its index in the caller's list, for errors}
    prompt: str  # prepended to every text
    keep: Callable[[dict[str, np.ndarray]], object]  # called with {text: [D] float64, not normalized} as they arrive

    def __post_init__(self) -> None:
        self.client = Client(self.endpoint.server, timeout_seconds=self.endpoint.config.timeout_seconds)
        self.sent = {text: self.prompt + text for text in self.rows}  # as sent to the server
        self.missing = dict.fromkeys(self.rows, "not requested")  # {text: why it has no vector}

    def run(self) -> None:
        """Raises `ValueError` if a text ends up without a vector, with the reason in one line without secrets."""
        endpoint, config = self.endpoint, self.endpoint.config
        path = config.ledger and Path(config.ledger)
        with locked(path.with_name(f"{path.name}.lock")) if path else nullcontext():
            if path:
                endpoint.spent = Ledger(path, prices=config.prices, max_cost=config.max_cost)
            limits = (endpoint.spent, config.concurrency, config.max_attempts)
            sender = Sender(self._ask, self._record, *limits, endpoint.forms, self._split, endpoint.rate)
            stopped = self.client.run(sender.run(self._jobs()))
        of_all = f"of {len(self.rows):,} requested texts"
        if num_cut := sum(self.sent[text] != self.prompt + text for text in self.rows.keys() - self.missing.keys()):
            print(f"{endpoint.name}: {num_cut:,} {of_all} were too long and cut", file=sys.stderr)
        if self.missing:
            reason, *_ = self.missing.values()
            if stopped:
                reason = stopped.reason if isinstance(stopped, Response) else stopped
            raise ValueError(f"{endpoint.name}: {reason}; {len(self.missing):,} {of_all} have no vector")

    def _jobs(self) -> Iterator[Job]:
        """Yields batches of the texts in order, lazily, so that each has the size known to work when it is sent."""
        batch, num_bytes, max_bytes = [], 0, self.endpoint.config.batch_bytes
        for text, sent in self.sent.items():
            size = len(sent.encode())
            if batch and (len(batch) >= self.endpoint.batch_texts or num_bytes + size > max_bytes):
                yield self._job(batch)
                batch, num_bytes = [], 0
            batch.append(text)
            num_bytes += size
        yield self._job(batch)

    def _job(self, texts: list[str], taken: list[list[str]] | None = None) -> Job:
        """One request. The halves of a refused one share the list `taken`, to which accepted halves are appended."""
        sent = [self.sent[text] for text in texts]
        num_bytes = sum(len(text.encode()) for text in sent)
        key = hashlib.sha256(json.dumps([self.endpoint.config.model, *sent]).encode()).hexdigest()
        return Job(key, (texts, taken), num_bytes + SPECIAL_TOKENS * len(sent), 0, math.ceil(num_bytes / BYTES_A_TOKEN))

    def _split(self, job: Job, response: Response) -> list[Job]:
        """The jobs to send instead of a refused batch: its halves, or its only text shortened."""
        (texts, _), limit = job.content, self.endpoint.max_tokens
        is_refused = response.action == "drop" or response.may_be_refusal
        if response.status == "invalid" and (len(texts) == 1 or response.result is not None):
            return []  # nothing is gained: the fault is in the vectors of single texts
        if len(texts) > 1:
            middle, taken = len(texts) // 2, [] if is_refused else None
            return [self._job(texts[:middle], taken), self._job(texts[middle:], taken)]
        (text,) = texts
        # A token has at least one byte, so a text of up to `limit` bytes is not too long.
        if self.endpoint.config.too_long == "cut" and len(self.sent[text].encode()) > (limit or 0):
            shorter = shorten(self.sent[text], limit)
            if len(shorter) > len(self.prompt):
                self.sent[text] = shorter
                return [self._job(texts)]
        if is_refused or len(self.missing) < len(self.rows):  # else the server may be down
            self.missing[text] = f"texts[{self.rows[text]}] failed ({response.reason})"
        return []

    async def _ask(self, job: Job, form: str | None) -> Response:
        """Sends one batch. `Response.result` is {text: vector [D] float64}, for the valid vectors only."""
        endpoint, config, (texts, _) = self.endpoint, self.endpoint.config, job.content
        body = {"model": config.model, "input": [self.sent[text] for text in texts]}
        body |= {"encoding_format": form} if form else {}
        body |= {"dimensions": config.dimensions} if config.dimensions else {}
        reply = await self.client.post("/embeddings", body | config.parameters)
        if isinstance(reply, Response):
            is_too_large = reply.exceeds_rate and len(texts) > endpoint.batch_texts  # made before that was known
            return replace(reply, action="drop") if is_too_large else reply
        usage = reported_usage(reply, writes=False)
        try:
            values = embeddings_in_order(reply, len(texts))
        except (TypeError, LookupError, AttributeError):
            return self.client.unexpected("list of embeddings", json.dumps(reply))
        except ValueError as error:
            return Response("invalid", "drop", str(error), usage=usage, suspect=True)
        good, fault = {}, None
        for text, value in zip(texts, values, strict=True):
            try:
                good[text] = vector = decode(value, endpoint.dim)
                endpoint.dim = len(vector)
            except ValueError as error:
                fault = fault or f"{error} came back for texts[{self.rows[text]}]"
        if fault:
            return Response("invalid", "drop", fault, result=good, usage=usage, suspect=not good)
        return Response("ok", "done", result=good, usage=usage)

    def _record(self, job: Job, response: Response, line: dict[str, Any]) -> None:
        """Stores valid vectors before writing the ledger, so that a kill in between only overstates the cost."""
        endpoint, good, (texts, taken) = self.endpoint, response.result or {}, job.content
        if good:
            self.keep(good)
        self.missing |= dict.fromkeys(texts, response.reason)
        for text in good:
            del self.missing[text]
        if response.action == "done" and taken is not None:
            taken.append(texts)
            if len(taken) == 2:  # both halves were accepted, so the batch was too large
                endpoint.batch_texts = min(endpoint.batch_texts, len(texts))
        if endpoint.config.ledger:
            append_jsonl(endpoint.config.ledger, line)
        endpoint.costs.settle(line["request"], response.usage)
        endpoint.costs.num_computed += len(good)


def shorten(text: str, max_tokens: int | None) -> str:
    """Cuts a refused text to 9/10, and 8 characters per token (few have more), preferably at whitespace."""
    num_kept = min(len(text) * 9 // 10, 8 * (max_tokens or len(text)))
    earliest = num_kept * 9 // 10
    found = None if text[num_kept].isspace() else re.search(r"\s\S*\Z", text[earliest:num_kept])
    return text[: earliest + found.start() if found else num_kept].rstrip()


def embeddings_in_order(reply: Mapping[str, Any], num_texts: int) -> list[Any]:
    """Each text's embedding as received, by its `index`. Raises `ValueError` unless there is one per text."""
    items = list(reply["data"])
    if len(items) != num_texts:
        raise ValueError(f"{len(items):,} vectors came back for {num_texts:,} texts")
    rows, found = [item.get("index") for item in items], {}
    # Some servers omit every index, others only an index of 0.
    rows = range(num_texts) if rows.count(None) == num_texts else [0 if row is None else row for row in rows]
    for row, item in zip(rows, items, strict=True):
        if type(row) is not int or not 0 <= row < num_texts or row in found:
            raise ValueError(f"index {str(row)[:40]!r} came back, expected each of 0 to {num_texts - 1:,} once")
        found[row] = item["embedding"]
    return [found[row] for row in range(num_texts)]


def decode(value: Any, dim: int = 0) -> np.ndarray:
    """Decodes a list of numbers, or base64 of little-endian float32, to [D] float64. Raises `ValueError` for
    anything else, a zero vector, values that are not finite, or a number of values other than `dim` (0: any)."""
    vector = np.empty(0)
    with suppress(ValueError, TypeError, OverflowError):
        if isinstance(value, str):
            vector = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4").astype(np.float64)
        elif {int, float, type(None)}.issuperset(map(type, value)):  # NumPy would read true and "1.0" as numbers
            vector = np.asarray(value, dtype=np.float64)  # null, which stands for NaN in JSON, becomes NaN
    if not len(vector):
        raise ValueError("a vector that is neither a list of numbers nor base64 of float32")
    if not np.isfinite(vector).all():
        raise ValueError("a vector with values that are not finite")
    if not vector.any():
        raise ValueError("a vector of zeros")
    if len(vector) != (dim or len(vector)):
        raise ValueError(f"a vector of {len(vector)} dimensions, not {dim},")
    return vector
