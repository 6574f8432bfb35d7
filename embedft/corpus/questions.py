"""Questions by an LLM: every reply is saved when it arrives, and nothing is paid for twice.

Not here: the prompt and the parsing (prompts.py), the client, when requests are sent and what they cost (api/),
dropping bad questions (cleaning.py), questions without an LLM (pseudo.py, docstrings.py).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..api.client import Client, check_settings, message_text, reported_usage, run_to_end
from ..api.ledger import USAGE, Ledger, Totals, check_outcome, now_text, price_of
from ..api.sending import Forms, Job, RateLimit, Response, Sender
from ..api.server import Server
from ..config import check_types, setting
from ..data.checks import check_distinct, check_text
from ..data.dataset import RetrievalDataset
from ..files import append_jsonl, locked, resume_jsonl
from ..progress import progress_bar
from .chunks import Chunk
from .prompts import RESPONSE_FORMAT, TEMPLATE, fill_template, parse_reply

REPLIES, LEDGER, LOCK = "replies.jsonl", "ledger.jsonl", "lock"
RECORD = {"request", "key", "status", "questions", "usage", "cost"}  # of a line of REPLIES: what is read back
# OpenAI refuses the old name for its newer models; other servers know only that one.
LIMIT_NAMES = ("max_completion_tokens", "max_tokens")
# Set by embedft: another value would change what is parsed, counted or paid for.
OWN_PARAMETERS = ("model", "messages", "n", "stream", "stream_options", "response_format", *LIMIT_NAMES)
REPLY_TOKENS_A_QUESTION = 128
BYTES_A_TOKEN, TOKENS_A_QUESTION = 4, 32  # only for estimates: English text, and a question on a filing
TEMPLATE_TOKENS = 128  # that a server's chat template adds; no byte of a prompt is more than one token

Jobs = dict[str, tuple[Job, list[str]]]  # {key: (job, ids of the chunks with this text)}


@dataclass(frozen=True)
class QuestionConfig:
    """Which model is asked, how fast, and for how much. Raises `ValueError` for a value out of range."""

    model: str = setting("gpt-4o-mini", "the LLM, by the name its server knows")
    num_questions: int = setting(2, "questions per chunk")
    max_reply_tokens: int | None = setting(None, "longest reply; a reasoning model needs more [128 per question]")
    parameters: dict = setting({}, "sent unchanged: temperature, seed, reasoning_effort, ...")
    structured: Literal["auto", "schema", "lines"] = setting("auto", "JSON by a schema, plain lines, or what works")
    concurrency: int = setting(16, "requests in flight at once")
    requests_per_minute: int | None = setting(None, "most requests in 60 seconds")
    tokens_per_minute: int | None = setting(None, "most tokens in 60 seconds (4 bytes each, longest reply)")
    timeout_seconds: float = setting(60.0, "limit for each reply")
    max_attempts: int = setting(6, "requests per chunk and run")
    max_requests: int | None = setting(None, "most requests, over all runs of the folder")
    max_cost: float | None = setting(None, "most money, over all runs of the folder")
    price_in: float | None = setting(None, "price per million prompt tokens")
    price_out: float | None = setting(None, "price per million reply tokens")

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self, own_parameters=OWN_PARAMETERS)
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("one of price_in and price_out is missing, expected both or neither")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost needs price_in and price_out, the prices per million tokens")

    @property
    def reply_tokens(self) -> int:
        """The longest reply, in tokens."""
        return self.max_reply_tokens or REPLY_TOKENS_A_QUESTION * self.num_questions

    @property
    def prices(self) -> tuple[float, float] | None:
        """Prices per million prompt and reply tokens; None if unknown."""
        return None if self.price_in is None or self.price_out is None else (self.price_in, self.price_out)


@dataclass(frozen=True)
class Outcome:
    """Questions by chunk id, why other chunks have none, totals of all runs, and the limit that ended this one."""

    questions: dict[str, list[str]]
    missing: dict[str, str]
    totals: Totals
    stopped: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What the remaining requests would take if each succeeds at once."""

    num_chunks: int
    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None  # at four bytes per token and 32 tokens per question; None without prices
    most_cost: float | None  # at one byte per token and the longest replies


def write_questions(
    chunks: Sequence[Chunk],
    config: QuestionConfig,
    *,
    folder: str | Path,
    template: str = TEMPLATE,
    base_url: str | None = None,
) -> Outcome:
    """Requests questions for every chunk without a valid reply in `folder`, and returns all questions there are.

    Every request and reply is saved at once (`ledger.jsonl`, `replies.jsonl`), so a killed run loses at most the
    requests in flight. The limits count all runs of the folder and are never exceeded, unless a server reports more
    tokens than it was allowed or charges for a 4xx, 500 or 503. The key comes from OPENAI_API_KEY and is never saved.
    Chunks with the same text share one request; `base_url` None is OPENAI_BASE_URL or OpenAI.

    Raises:
        ValueError: the input is at fault, or the server refuses all requests (key, model, quota, five at the start).
    """
    folder, jobs = Path(folder), _jobs(chunks, config, template)
    asker = _Asker(config, template, base_url)
    with locked(folder / LOCK):
        records = _read_replies(folder, repair=True)
        limits = {"max_requests": config.max_requests, "max_cost": config.max_cost}
        ledger = Ledger(folder / LEDGER, records, prices=config.prices, **limits)
        questions, reasons = _valid_questions(records), {}
        stopped = run_to_end(asker.run(jobs, folder / REPLIES, ledger, questions, reasons))
    keys = {id: key for key, (_, ids) in jobs.items() for id in ids}
    found = {chunk.id: questions[keys[chunk.id]] for chunk in chunks if keys[chunk.id] in questions}
    so_far = f"{len(found):,} of {len(chunks):,} chunks have questions"
    if isinstance(stopped, Response):
        raise ValueError(f"{asker.server.name}: {stopped.reason}; stopped: {so_far}")
    left = {chunk.id: keys[chunk.id] for chunk in chunks if chunk.id not in found}
    missing = {id: reasons.get(key, f"not asked: stopped at {stopped}") for id, key in left.items()}
    return Outcome(found, missing, ledger.totals(), stopped and f"stopped at {stopped}: {so_far}")


def estimate(
    chunks: Sequence[Chunk], config: QuestionConfig, *, folder: str | Path, template: str = TEMPLATE
) -> Estimate:
    """Estimates what `write_questions` would still request. Sends nothing and needs no key."""
    jobs, questions = _jobs(chunks, config, template), _valid_questions(_read_replies(Path(folder), repair=False))
    left = [job for key, (job, _) in jobs.items() if key not in questions]
    reply_tokens = min(TOKENS_A_QUESTION * config.num_questions, config.reply_tokens)
    tokens = (sum(job.expected_tokens - job.reply_tokens for job in left), reply_tokens * len(left))
    most = (sum(job.prompt_tokens for job in left), sum(job.reply_tokens for job in left))
    costs = (None if config.prices is None else float(price_of(config.prices, *counts)) for counts in (tokens, most))
    return Estimate(len(chunks), len(left), *tokens, *costs)


def question_dataset(chunks: Sequence[Chunk], questions: Mapping[str, Sequence[str]]) -> RetrievalDataset:
    """Makes each question a query ("CHUNK/q1", ...) whose chunk is relevant; the corpus is of all chunks."""
    corpus = {chunk.id: chunk.text for chunk in chunks}
    for id in questions:
        if id not in corpus:
            raise ValueError(f"questions: chunk id {id!r} is not among the {len(corpus):,} chunks")
    asked = {f"{id}/q{i}": (id, text) for id in corpus for i, text in enumerate(questions.get(id, ()), start=1)}
    qrels = {query_id: {id: 1} for query_id, (id, _) in asked.items()}
    return RetrievalDataset({query_id: text for query_id, (_, text) in asked.items()}, corpus, qrels)


def _jobs(chunks: Sequence[Chunk], config: QuestionConfig, template: str) -> Jobs:
    if not chunks:
        raise ValueError("there are no chunks to write questions for")
    check_distinct([chunk.id for chunk in chunks], "chunk id")
    asked = [template, config.model, config.parameters, config.num_questions, config.reply_tokens]
    jobs: Jobs = {}
    for chunk in chunks:
        check_text(chunk.text, f"the text of chunk {chunk.id!r}")
        key = hashlib.sha256(json.dumps([*asked, chunk.text], sort_keys=True).encode()).hexdigest()
        if key not in jobs:
            prompt = fill_template(template, text=chunk.text, num_questions=config.num_questions)
            body = _body(config, prompt, LIMIT_NAMES[0], config.structured != "lines")
            num_bytes = len(json.dumps(body, ensure_ascii=False).encode())
            expected = math.ceil(num_bytes / BYTES_A_TOKEN) + config.reply_tokens
            jobs[key] = (Job(key, chunk.text, num_bytes + TEMPLATE_TOKENS, config.reply_tokens, expected), [])
        jobs[key][1].append(chunk.id)
    return jobs


def _body(config: QuestionConfig, prompt: str, limit_name: str, is_structured: bool) -> dict[str, Any]:
    body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], limit_name: config.reply_tokens}
    return body | ({"response_format": RESPONSE_FORMAT} if is_structured else {}) | config.parameters


def _read_replies(folder: Path, *, repair: bool) -> list[dict[str, Any]]:
    """The fields needed of every saved reply. `repair`: cut off a half-written line (only while the lock is held)."""
    records = []
    for number, record in enumerate(resume_jsonl(folder / REPLIES, repair=repair), start=1):
        if not record.keys() >= RECORD:
            lacks = ", ".join(sorted(RECORD - record.keys()))
            raise ValueError(f"{folder / REPLIES} line {number}: has no {lacks}, is it a file of replies?")
        check_outcome(record, f"{folder / REPLIES} line {number}")
        records.append({name: record[name] for name in RECORD})  # not the reply itself
    return records


def _valid_questions(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {record["key"]: record["questions"] for record in records if record["status"] == "ok"}


class _Asker:
    """What one request sends, and what its reply means."""

    def __init__(self, config: QuestionConfig, template: str, base_url: str | None):
        self.config, self.template = config, template
        self.server = Server.find(base_url)
        self.client = Client(self.server, timeout_seconds=config.timeout_seconds)
        names = LIMIT_NAMES if self.server.is_openai else LIMIT_NAMES[::-1]
        kinds = {"auto": (True, False), "schema": (True,), "lines": (False,)}[config.structured]
        self.forms = Forms([(name, is_structured) for is_structured in kinds for name in names])

    async def run(
        self, jobs: Jobs, replies: Path, ledger: Ledger, questions: dict[str, list[str]], reasons: dict[str, str]
    ) -> Response | str | None:
        """Sends the jobs that `questions` lacks; fills it, and `reasons` of failures. Returns what stopped it."""
        config = self.config

        def record(job: Job, number: int, answer: Response, seconds: float) -> None:
            cost, ids = ledger.settle(number, answer.usage), jobs[job.key][1]
            usage = None if answer.usage is None else dict(zip(USAGE, answer.usage, strict=True))
            line = {"request": number, "key": job.key, "chunk": ids[0], "status": answer.status}
            line |= {"reason": answer.reason, "questions": answer.result, "reply": answer.reply, "usage": usage}
            append_jsonl(replies, line | {"cost": cost, "time": now_text(), "seconds": round(seconds, 3)})
            if answer.status == "ok":
                questions[job.key] = answer.result
                bar.update(len(ids))
            else:
                reasons[job.key] = answer.reason
            if config.prices is not None:
                bar.set_postfix_str(f"cost {ledger.cost + ledger.open_cost:.2f}", refresh=False)

        rate = RateLimit(requests_per_minute=config.requests_per_minute, tokens_per_minute=config.tokens_per_minute)
        limits = {"rate": rate, "concurrency": config.concurrency, "max_attempts": config.max_attempts}
        sender = Sender(self.ask, record, ledger=ledger, forms=self.forms, **limits)
        counts = {key: len(ids) for key, (_, ids) in jobs.items()}
        num_done = sum(count for key, count in counts.items() if key in questions)
        with progress_bar(sum(counts.values()), "questions", unit="chunk", initial=num_done) as bar:
            async with self.client.openai:
                return await sender.run([job for key, (job, _) in jobs.items() if key not in questions])

    async def ask(self, job: Job, form: tuple[str, bool]) -> Response:
        """Sends one request and returns its outcome."""
        prompt = fill_template(self.template, text=job.content, num_questions=self.config.num_questions)
        reply = await self.client.post("/chat/completions", _body(self.config, prompt, *form))
        return reply if isinstance(reply, Response) else self._from_reply(reply)

    def _from_reply(self, completion: dict[str, Any]) -> Response:
        """The outcome of a completion, which may hold no questions."""
        try:
            choice = completion["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, refusal = message_text(message.get("content")), message.get("refusal")
        except (LookupError, TypeError, AttributeError):
            return self.client.unexpected("chat completion", json.dumps(completion))
        reply, usage = self.client.clean(content), reported_usage(completion, writes=True)
        invalid = partial(Response, "invalid", "retry", reply=reply, usage=usage)
        if refusal:
            return invalid(self.client.line(f"refusal: {refusal}"))
        if finish == "length":
            return invalid(f"cut off at {self.config.reply_tokens:,} tokens (max_reply_tokens)", suspect=True)
        if not reply.strip():
            return invalid(self.client.line(f"empty reply (finish_reason {finish})"))
        try:
            questions = parse_reply(reply, self.config.num_questions)
        except ValueError as error:
            return invalid(self.client.line(str(error)))
        return Response("ok", "done", result=questions, reply=reply, usage=usage)
