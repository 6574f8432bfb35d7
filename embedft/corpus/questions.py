"""Questions by a language model: asked for once, written down the moment they arrive, never paid for twice.

Here: the settings, what a reply means, and the folder of replies that a later run takes up. Deliberately not here: the
prompt and the parsing (prompts.py), the client (client.py), when a request is sent and what it costs (sending.py),
dropping bad questions (cleaning.py), questions without a language model (pseudo.py).

    chunks, config = load_chunks("chunks.jsonl"), QuestionConfig(model="gpt-4o-mini", max_requests=1_000)
    outcome = write_questions(chunks, config, folder="questions")
    dataset = question_dataset(chunks, outcome.questions)
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
# The request's own: another value would change what is parsed, counted or paid for.
OWN_PARAMETERS = (
    *("model", "messages", "n", "stream", "stream_options", "response_format"),
    *("max_tokens", "max_completion_tokens"),
)
REPLY_TOKENS_A_QUESTION = 128
# For the estimates alone, which say so: English text, and a question of a filing.
BYTES_A_TOKEN, TOKENS_A_QUESTION = 4, 32
# A byte-level tokenizer makes at most one token of a byte; a server's chat template adds some of its own.
TEMPLATE_TOKENS = 128


@dataclass(frozen=True)
class QuestionConfig:
    """What is asked of whom, how fast, and for how much. Raises `ValueError` for a value out of range."""

    model: str = setting("gpt-4o-mini", "the language model, as its server calls it")
    num_questions: int = setting(2, "questions a chunk")
    max_reply_tokens: int | None = setting(None, "longest reply; null: 128 a question; a reasoning model needs more")
    parameters: dict = setting({}, "sent as they are: temperature, seed, reasoning_effort and the like")
    structured: Literal["auto", "schema", "lines"] = setting("auto", "JSON by a schema, plain lines, or what works")
    concurrency: int = setting(16, "requests in flight at once")
    requests_per_minute: int | None = setting(None, "never more requests in 60 seconds")
    tokens_per_minute: int | None = setting(None, "never more tokens in 60 seconds (4 bytes each, longest reply)")
    timeout_seconds: float = setting(60.0, "a reply that takes longer is given up")
    max_attempts: int = setting(6, "requests for a chunk in one run")
    max_requests: int | None = setting(None, "never more requests, over all runs of the folder")
    max_cost: float | None = setting(None, "never spend more, over all runs of the folder")
    price_in: float | None = setting(None, "money per million tokens of prompts")
    price_out: float | None = setting(None, "money per million tokens of replies")

    def __post_init__(self) -> None:
        check_types(self)
        positive = ("num_questions", "max_reply_tokens", "max_requests")
        check_settings(self, positive=positive, own_parameters=OWN_PARAMETERS)
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("one of price_in and price_out is missing, expected both or neither")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost needs price_in and price_out, the money per million tokens")

    @property
    def reply_tokens(self) -> int:
        """The longest reply, in tokens."""
        return self.max_reply_tokens or REPLY_TOKENS_A_QUESTION * self.num_questions

    @property
    def prices(self) -> tuple[float, float] | None:
        """Money per million tokens of prompts and of replies; None when they are not known."""
        return None if self.price_in is None or self.price_out is None else (self.price_in, self.price_out)


@dataclass(frozen=True)
class Outcome:
    """Questions by chunk id in the order of the chunks, and why the others have none.

    `totals` counts all runs of the folder; `stopped` says which limit ended the job, None when none did.
    """

    questions: dict[str, list[str]]
    missing: dict[str, str]
    totals: Totals
    stopped: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What a job would take: the requests that remain when each is answered at once.

    Tokens are estimated (a token for four bytes of a prompt, 32 for a question), and `cost` follows from them. With
    as many tokens as there are bytes, and the longest replies, it would be `most_cost`; requests that have to be
    repeated come on top. Both are None without prices.
    """

    num_chunks: int
    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most_cost: float | None


def write_questions(
    chunks: Sequence[Chunk],
    config: QuestionConfig,
    *,
    folder: str | Path,
    template: str = TEMPLATE,
    base_url: str | None = None,
) -> Outcome:
    """Asks for the questions of every chunk that has no valid reply in `folder`, and returns all there are.

    Every request and every reply is on disk at once (`ledger.jsonl`, `replies.jsonl`), so a run that is interrupted or
    killed loses at most the requests in flight. The limits count all runs of the folder and are never passed, unless a
    server reports more tokens than it was allowed, or charges for an answer of 4xx, 500 or 503. The key comes from
    OPENAI_API_KEY and is written nowhere.

    Args:
        chunks: with distinct ids; chunks with the same text are asked for once.
        folder: made when missing; one process at a time.
        template: the prompt; {text} and {num_questions} are filled in, other braces stand as they are.
        base_url: of a server that speaks the protocol, usually ending in /v1; None: OPENAI_BASE_URL, or OpenAI itself.

    Raises:
        ValueError: something that has to be mended first: the chunks, the template, the key, or what the server says
            of all requests (the key, the model, the quota, five refusals at the start).
    """
    coroutine = write_questions_async(chunks, config, folder=folder, template=template, base_url=base_url)
    return run_to_end(coroutine)


async def write_questions_async(
    chunks: Sequence[Chunk],
    config: QuestionConfig,
    *,
    folder: str | Path,
    template: str = TEMPLATE,
    base_url: str | None = None,
) -> Outcome:
    """`write_questions`, to be awaited where an event loop is running."""
    folder, jobs = Path(folder), _jobs(chunks, config, template)
    asker = _Asker(config, template, base_url)
    with locked(folder / LOCK):
        records = _read_replies(folder, repair=True)
        limits = {"max_requests": config.max_requests, "max_cost": config.max_cost}
        ledger = Ledger(folder / LEDGER, records, prices=config.prices, **limits)
        questions = _valid_questions(records)
        reasons: dict[str, str] = {}
        first_ids = {key: ids[0] for key, (_, ids) in jobs.items()}
        num_done = sum(len(ids) for key, (_, ids) in jobs.items() if key in questions)

        def record(job: Job, number: int, answer: Response, seconds: float) -> None:
            cost = ledger.settle(number, answer.usage)
            usage = None if answer.usage is None else dict(zip(USAGE, answer.usage, strict=True))
            line = {"request": number, "key": job.key, "chunk": first_ids[job.key], "status": answer.status}
            line |= {"reason": answer.reason, "questions": answer.result, "reply": answer.reply, "usage": usage}
            append_jsonl(folder / REPLIES, line | {"cost": cost, "time": now_text(), "seconds": round(seconds, 3)})
            if answer.status == "ok":
                questions[job.key] = answer.result
                bar.update(len(jobs[job.key][1]))
            else:
                reasons[job.key] = answer.reason
            if config.prices is not None:
                bar.set_postfix_str(f"cost {ledger.cost + ledger.open_cost:.2f}", refresh=False)

        with progress_bar(len(chunks), "questions", unit="chunk", initial=num_done) as bar:
            async with asker.client.openai:
                sender = Sender(
                    asker.ask,
                    record,
                    ledger=ledger,
                    concurrency=config.concurrency,
                    max_attempts=config.max_attempts,
                    forms=asker.forms,
                    rate=RateLimit(
                        requests_per_minute=config.requests_per_minute, tokens_per_minute=config.tokens_per_minute
                    ),
                )
                stopped = await sender.run([job for key, (job, _) in jobs.items() if key not in questions])
    keys = {id: key for key, (_, ids) in jobs.items() for id in ids}
    found = {chunk.id: questions[keys[chunk.id]] for chunk in chunks if keys[chunk.id] in questions}
    so_far = f"{len(found):,} of {len(chunks):,} chunks have questions"
    if isinstance(stopped, Response):
        raise ValueError(f"{asker.server.name}: {stopped.reason}; stopped: {so_far}")
    missing = {
        chunk.id: reasons.get(keys[chunk.id], f"not asked: stopped at {stopped}")
        for chunk in chunks
        if chunk.id not in found
    }
    return Outcome(found, missing, ledger.totals(), stopped and f"stopped at {stopped}: {so_far}")


def estimate(
    chunks: Sequence[Chunk], config: QuestionConfig, *, folder: str | Path, template: str = TEMPLATE
) -> Estimate:
    """What `write_questions` would still have to ask for. Sends nothing and needs no key.

    Raises:
        ValueError: the chunks or the template are at fault, or the folder's file of replies.
    """
    jobs, questions = _jobs(chunks, config, template), _valid_questions(_read_replies(Path(folder), repair=False))
    left = [job for key, (job, _) in jobs.items() if key not in questions]
    tokens = (sum(job.expected_tokens - job.reply_tokens for job in left), _likely_reply_tokens(config) * len(left))
    most = (sum(job.prompt_tokens for job in left), sum(job.reply_tokens for job in left))
    costs = (None if config.prices is None else float(price_of(config.prices, *counts)) for counts in (tokens, most))
    return Estimate(len(chunks), len(left), *tokens, *costs)


def _likely_reply_tokens(config: QuestionConfig) -> int:
    return min(TOKENS_A_QUESTION * config.num_questions, config.reply_tokens)


def question_dataset(chunks: Sequence[Chunk], questions: Mapping[str, Sequence[str]]) -> RetrievalDataset:
    """Every question with the chunk it was written for; query ids are `CHUNK/q1`, `CHUNK/q2`, ...

    All chunks are in the corpus, those without questions too: a search would meet them as well.

    Raises:
        ValueError: no question at all, or questions of a chunk that is not there.
    """
    corpus = {chunk.id: chunk.text for chunk in chunks}
    for id in questions:
        if id not in corpus:
            raise ValueError(f"questions: chunk id {id!r} is not among the {len(corpus):,} chunks")
    ids = {id: [f"{id}/q{i}" for i in range(1, len(questions[id]) + 1)] for id in corpus if id in questions}
    queries = {query_id: text for id in ids for query_id, text in zip(ids[id], questions[id], strict=True)}
    return RetrievalDataset(queries, corpus, {query_id: {id: 1} for id in ids for query_id in ids[id]})


def _jobs(chunks: Sequence[Chunk], config: QuestionConfig, template: str) -> dict[str, tuple[Job, list[str]]]:
    """{key: (what to ask for, the ids of the chunks with that very text)}."""
    if not chunks:
        raise ValueError("there is no chunk to write questions for")
    check_distinct([chunk.id for chunk in chunks], "chunk id")
    asked = [template, config.model, config.parameters, config.num_questions, config.reply_tokens]
    jobs: dict[str, tuple[Job, list[str]]] = {}
    for chunk in chunks:
        check_text(chunk.text, f"the text of chunk {chunk.id!r}")
        key = hashlib.sha256(json.dumps([*asked, chunk.text], sort_keys=True).encode()).hexdigest()
        if key not in jobs:
            prompt = fill_template(template, text=chunk.text, num_questions=config.num_questions)
            body = _body(config, prompt, LIMIT_NAMES[0], config.structured != "lines")
            num_bytes = len(json.dumps(body, ensure_ascii=False).encode())
            expected = math.ceil(num_bytes / BYTES_A_TOKEN) + config.reply_tokens
            job = Job(key, chunk.text, num_bytes + TEMPLATE_TOKENS, config.reply_tokens, expected)
            jobs[key] = (job, [])
        jobs[key][1].append(chunk.id)
    return jobs


def _body(config: QuestionConfig, prompt: str, limit_name: str, is_structured: bool) -> dict[str, Any]:
    body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], limit_name: config.reply_tokens}
    return body | ({"response_format": RESPONSE_FORMAT} if is_structured else {}) | config.parameters


def _read_replies(folder: Path, *, repair: bool) -> list[dict[str, Any]]:
    """What is needed of every reply and failure on disk. `repair`: the file is about to grow; the lock is held."""
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
    """The client, one request at a time: what is sent, and what a reply means."""

    def __init__(self, config: QuestionConfig, template: str, base_url: str | None):
        self.config, self.template = config, template
        self.server = Server.find(base_url)
        self.client = Client(self.server, timeout_seconds=config.timeout_seconds)
        names = LIMIT_NAMES if self.server.is_openai else LIMIT_NAMES[::-1]
        kinds = {"auto": (True, False), "schema": (True,), "lines": (False,)}[config.structured]
        self.forms = Forms([(name, is_structured) for is_structured in kinds for name in names])

    async def ask(self, job: Job) -> Response:
        """Sends one request and says what came of it."""
        prompt = fill_template(self.template, text=job.content, num_questions=self.config.num_questions)
        body = _body(self.config, prompt, *self.forms.take(job))
        reply = await self.client.post("/chat/completions", body)
        if isinstance(reply, Response):
            return reply
        self.forms.accept(job)
        return self._from_reply(reply)

    def _from_reply(self, completion: dict[str, Any]) -> Response:
        """A reply to a request, which does not mean that there are questions in it."""
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
