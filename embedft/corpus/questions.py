"""Questions written by an LLM; every reply is saved when it arrives, and nothing is paid for twice.

outcome = write_questions(chunks, QuestionConfig("gpt-4o-mini"), folder="questions")
dataset = question_dataset(chunks, outcome.questions)
"""

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..api.client import Client, Server, ServerConfig, reported_usage
from ..api.ledger import Ledger, check_outcome, price_of
from ..api.sending import BYTES_A_TOKEN, Forms, Job, RateLimit, Response, Sender
from ..config import option
from ..data.checks import check_distinct, check_text
from ..data.dataset import RetrievalDataset
from ..files import append_jsonl, locked, resume_jsonl
from ..progress import progress_bar
from .chunks import Chunk
from .prompts import QUESTION, Kind, fill_template, message_text, parse_reply

REPLIES, LEDGER, LOCK = "replies.jsonl", "ledger.jsonl", "lock"
RECORD = {"request", "key", "status", "questions", "usage", "cost"}  # what is read back from a REPLIES line
# OpenAI rejects "max_tokens" for newer models; other servers know no other name.
LIMIT_NAMES = ("max_completion_tokens", "max_tokens")
TOKENS_A_QUESTION = 32  # measured on a filing; only for estimates
TEMPLATE_TOKENS = 128  # added by a server's chat template; elsewhere a byte is at most one token


@dataclass(frozen=True)
class QuestionConfig(ServerConfig):
    """Model, replies and prices of questions. Raises `ValueError` for a value out of range."""

    model: str = option("gpt-4o-mini", "name of the LLM on its server")
    _: KW_ONLY
    num_questions: int = option(2, "questions per chunk", least=1)
    max_reply_tokens: int | None = option(None, "token limit; reasoning models need more [128 per question]", least=1)
    structured: Literal["auto", "schema", "lines"] = option("auto", "ask for JSON, plain lines, or what works")
    concurrency: int = option(16, "requests in flight at once", least=1)
    max_requests: int | None = option(None, "maximum over all runs of the folder", least=1)
    price_in: float | None = option(None, "price per million prompt tokens", least=0)
    price_out: float | None = option(None, "price per million reply tokens", least=0)
    # Other values would change what is parsed, counted or paid for.
    own_parameters = ("model", "messages", "n", "stream", "stream_options", "response_format", *LIMIT_NAMES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("one of price_in and price_out is missing, expected both or neither")

    @property
    def reply_tokens(self) -> int:
        return self.max_reply_tokens or 128 * self.num_questions

    @property
    def prices(self) -> tuple[float, float] | None:
        return None if self.price_in is None else (self.price_in, self.price_out)


@dataclass(frozen=True)
class Outcome:
    """Questions by chunk id, why other chunks have none, totals of all runs, and the limit that stopped this one."""

    questions: dict[str, list[str]]
    missing: dict[str, str]
    ledger: Ledger
    stopped: str | None = None


class Estimate(NamedTuple):
    """Tokens and costs of the remaining requests if each succeeds the first time; costs are None without prices."""

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None  # at four bytes per token and 32 tokens per question
    most_cost: float | None  # at one byte per token and replies of maximum length


def write_questions(
    chunks: Sequence[Chunk],
    config: QuestionConfig,
    *,
    folder: str | Path,
    template: str | None = None,
    kind: Kind = QUESTION,
) -> Outcome:
    """Requests questions for every chunk without a valid reply in `folder`, and returns all questions saved there.
    So for claims and other kinds; `template` is the prompt, by default the kind's.

    Every request and reply is saved at once (`ledger.jsonl`, `replies.jsonl`), so a killed run loses at most the
    requests in flight. Limits apply to all runs of the folder together and are never exceeded, unless a server reports
    more tokens than allowed or charges for a 4xx, 500 or 503. Chunks of equal text share a request. OPENAI_API_KEY is
    never saved. Raises `ValueError` for invalid input, or if the server refuses every request (key, model, quota)."""
    template = kind.template if template is None else template
    folder, jobs, asker = Path(folder), _jobs(chunks, config, template, kind), _Asker(config, template, kind)
    reasons: dict[str, str] = {}  # {key: why the last request failed}

    def record(job: Job, answer: Response, line: dict[str, Any]) -> None:
        line |= {"key": job.key, "chunk": job.content[0].id, "questions": answer.result, "reply": answer.reply}
        line |= {} if kind is QUESTION else {"kind": kind.name}
        append_jsonl(folder / REPLIES, line)
        if answer.status == "ok":
            questions[job.key] = answer.result
            bar.update(len(job.content))
        else:
            reasons[job.key] = answer.reason
        if config.prices is not None:
            bar.set_postfix_str(f"cost {ledger.cost + ledger.open_cost:.2f}", refresh=False)

    with locked(folder / LOCK):
        records, questions = _read_replies(folder, repair=True)
        limits = {"max_requests": config.max_requests, "max_cost": config.max_cost}
        ledger = Ledger(folder / LEDGER, records, prices=config.prices, **limits)
        rate = RateLimit(config.requests_per_minute or math.inf, config.tokens_per_minute or math.inf)
        sender = Sender(asker.ask, record, ledger, config.concurrency, config.max_attempts, asker.forms, rate=rate)
        left = [job for key, job in jobs.items() if key not in questions]
        num_done = len(chunks) - sum(len(job.content) for job in left)
        with progress_bar(len(chunks), "questions", unit="chunk", initial=num_done) as bar:
            stopped = asker.client.run(sender.run(left))
    keys = {chunk.id: key for key, job in jobs.items() for chunk in job.content}
    found = {chunk.id: questions[keys[chunk.id]] for chunk in chunks if keys[chunk.id] in questions}
    so_far = f"{len(found):,} of {len(chunks):,} chunks have questions"
    if isinstance(stopped, Response):
        raise ValueError(f"{asker.client.server.name}: {stopped.reason}; stopped: {so_far}")
    missing = {id: reasons.get(key, f"not requested: {stopped}") for id, key in keys.items() if id not in found}
    return Outcome(found, missing, ledger, stopped and f"{stopped}: {so_far}")


def estimate(
    chunks: Sequence[Chunk],
    config: QuestionConfig,
    *,
    folder: str | Path,
    template: str | None = None,
    kind: Kind = QUESTION,
) -> Estimate:
    """Estimates what `write_questions` would still request. Sends nothing and needs no key."""
    _, done = _read_replies(Path(folder), repair=False)
    jobs = _jobs(chunks, config, kind.template if template is None else template, kind)
    left = [job for key, job in jobs.items() if key not in done]
    reply_tokens = min(TOKENS_A_QUESTION * config.num_questions, config.reply_tokens)
    tokens = (sum(job.expected_tokens - job.reply_tokens for job in left), reply_tokens * len(left))
    most = (sum(job.prompt_tokens for job in left), sum(job.reply_tokens for job in left))
    costs = (None if config.prices is None else float(price_of(config.prices, *counts)) for counts in (tokens, most))
    return Estimate(len(left), *tokens, *costs)


def total(estimates: Sequence[Estimate]) -> Estimate:
    """The sum of several estimates, one for each kind."""
    sums = (None if None in values else sum(values) for values in zip(*estimates, strict=True))
    return Estimate(*sums)


def question_dataset(chunks: Sequence[Chunk], questions: Mapping[str, Sequence[str]]) -> RetrievalDataset:
    """Makes each question a query ("CHUNK/q1", ...) with its chunk relevant; the corpus is all chunks."""
    asked = {f"{id}/q{i}": (id, text) for id, listed in questions.items() for i, text in enumerate(listed, start=1)}
    texts, qrels = {i: text for i, (_, text) in asked.items()}, {i: {id: 1} for i, (id, _) in asked.items()}
    return RetrievalDataset(texts, {chunk.id: chunk.text for chunk in chunks}, qrels)


def _jobs(chunks: Sequence[Chunk], config: QuestionConfig, template: str, kind: Kind) -> dict[str, Job]:
    """{key: one job for all chunks with the same text}."""
    if not chunks:
        raise ValueError("there are no chunks to write questions for")
    check_distinct([chunk.id for chunk in chunks], "chunk id")
    asked = [template, config.model, config.parameters, config.num_questions, config.reply_tokens]
    asked += [] if kind is QUESTION else [kind.name]
    jobs: dict[str, Job] = {}
    for chunk in chunks:
        check_text(chunk.text, f"the text of chunk {chunk.id!r}")
        key = hashlib.sha256(json.dumps([*asked, chunk.text], sort_keys=True).encode()).hexdigest()
        if key not in jobs:
            body = _body(config, template, chunk.text, LIMIT_NAMES[0], config.structured != "lines", kind)
            num_bytes = len(json.dumps(body, ensure_ascii=False).encode())
            expected = math.ceil(num_bytes / BYTES_A_TOKEN) + config.reply_tokens
            jobs[key] = Job(key, [], num_bytes + TEMPLATE_TOKENS, config.reply_tokens, expected)
        jobs[key].content.append(chunk)
    return jobs


def _body(
    config: QuestionConfig, template: str, text: str, limit_name: str, is_structured: bool, kind: Kind
) -> dict[str, Any]:
    prompt = fill_template(template, text=text, num_questions=config.num_questions)
    body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], limit_name: config.reply_tokens}
    return body | ({"response_format": kind.response_format} if is_structured else {}) | config.parameters


def _read_replies(folder: Path, *, repair: bool) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The RECORD fields of saved replies, and {key: questions}. `repair` drops a partial last line; needs the lock."""
    records = []
    for number, record in enumerate(resume_jsonl(folder / REPLIES, repair=repair), start=1):
        if lacks := ", ".join(sorted(RECORD - record.keys())):
            raise ValueError(f"{folder / REPLIES} line {number}: has no {lacks}; is this a file of replies?")
        check_outcome(record, where := f"{folder / REPLIES} line {number}")
        status, questions = record["status"], record["questions"]
        if not (isinstance(questions, list) and questions if status == "ok" else status in ("invalid", "failed")):
            found = f"status is {reprlib.repr(status)} and questions {reprlib.repr(questions)}"
            raise ValueError(f"{where}: {found}; is this a file of replies?")
        for text in (record["key"], *(questions if status == "ok" else ())):
            check_text(text, f"{where}: the key or a question")
        records.append({name: record[name] for name in RECORD})  # not the reply itself
    return records, {record["key"]: record["questions"] for record in records if record["status"] == "ok"}


class _Asker:
    """Sends one request, and interprets its reply."""

    def __init__(self, config: QuestionConfig, template: str, kind: Kind):
        self.config, self.template, self.kind = config, template, kind
        self.client = Client(Server.find(config.base_url), timeout_seconds=config.timeout_seconds)
        names = LIMIT_NAMES if self.client.server.is_openai else LIMIT_NAMES[::-1]
        kinds = {"auto": (True, False), "schema": (True,), "lines": (False,)}[config.structured]
        self.forms = Forms([(name, is_structured) for is_structured in kinds for name in names])

    async def ask(self, job: Job, form: tuple[str, bool]) -> Response:
        body = _body(self.config, self.template, job.content[0].text, *form, self.kind)
        reply = await self.client.post("/chat/completions", body)
        is_proven = self.forms.is_accepted and self.forms.forms[self.forms.index] == form
        is_doubtful = self.config.structured == "auto" and form[1] and not is_proven
        return reply if isinstance(reply, Response) else self._from_reply(reply, is_doubtful)

    def _from_reply(self, completion: dict[str, Any], is_doubtful: bool = False) -> Response:
        """`is_doubtful`: a useless reply may be all that the server makes of a schema, {} or blanks without end."""
        try:
            choice = completion["choices"][0]
            if error := choice.get("error"):
                failed = self.client.parse(json.dumps({"error": error}))
                return replace(failed, usage=reported_usage(completion, writes=True) or failed.usage)
            message, finish = choice["message"], choice.get("finish_reason")
            content, refusal = message_text(message.get("content")), message.get("refusal")
        except (LookupError, TypeError, AttributeError):
            return self.client.unexpected("chat completion", json.dumps(completion))
        reply, usage = self.client.server.redact(content), reported_usage(completion, writes=True)
        invalid = partial(Response, "invalid", "retry", reply=reply, usage=usage)
        if refusal:
            return invalid(self.client.line(f"refusal: {refusal}"))
        if finish == "length":
            is_blank, limit = is_doubtful and reply[-20:].isspace(), f"{self.config.reply_tokens:,} tokens"
            return invalid(f"cut off at {limit} (max_reply_tokens)", suspect=not is_blank, may_be_refusal=is_blank)
        try:
            questions = parse_reply(reply, self.config.num_questions, self.kind)
        except ValueError as error:
            reason = str(error) if reply.strip() else f"empty reply (finish_reason {finish})"
            return invalid(self.client.line(reason), may_be_refusal=is_doubtful)
        return Response("ok", "done", result=questions, reply=reply, usage=usage)
