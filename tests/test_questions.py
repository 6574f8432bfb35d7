"""Questions by an LLM, against a real local server: every fault, every limit, kills at random moments.

What must hold: one valid reply per chunk however many requests fail, nothing on disk is requested again, and the key
appears in no file, output or error.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from api_server import RANDOM, ApiServer, mutated, written_questions
from naming import names, naming

from embedft.api import sending
from embedft.api.ledger import Ledger
from embedft.corpus import questions
from embedft.corpus.chunks import Chunk
from embedft.corpus.prompts import TEMPLATE, fill_template
from embedft.corpus.questions import (
    QuestionConfig,
    estimate,
    question_dataset,
    write_questions,
)
from embedft.files import locked

KEY = "sk-test-51ab9c0d2e3f4a5b"
PLAIN = "Ask {num_questions} about: {text}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A key, no base URL from outside, and short pauses."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(sending, "BACKOFF_SECONDS", 0.01)


def some_chunks(number: int) -> list[Chunk]:
    return [Chunk(f"c{i}", f"Passage {i} on the fleet.") for i in range(number)]


def expected(chunks: list[Chunk], template: str = TEMPLATE) -> dict[str, list[str]]:
    """What the server writes for them."""
    prompts = {chunk.id: fill_template(template, text=chunk.text, num_questions=2) for chunk in chunks}
    return {id: written_questions(prompt) for id, prompt in prompts.items()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path: Path, number: int) -> None:
    deadline = time.monotonic() + 10
    while num_lines(path) < number:
        assert time.monotonic() < deadline, f"{num_lines(path)} of {number} lines"
        time.sleep(0.002)


def ask(server: ApiServer, chunks: list[Chunk], folder: Path, template: str = TEMPLATE, **settings):
    config = QuestionConfig(base_url=server.base_url, **settings)
    return write_questions(chunks, config, folder=folder, template=template)


def totals(ledger: Ledger) -> tuple:
    """Requests, tokens of prompts and replies, requests without a report, cost, and the most that these may cost."""
    costs = (ledger.cost, ledger.open_cost)
    return ledger.num_requests, ledger.prompt_tokens, ledger.completion_tokens, len(ledger.open), *costs


def read_reply(body: str, url: str | None = None) -> sending.Response:
    """What comes of a reply with this body."""
    asker = questions._Asker(QuestionConfig(base_url=url), TEMPLATE, questions.QUESTION)
    reply = asker.client.parse(body)
    return asker._from_reply(reply) if isinstance(reply, dict) else reply


# Settings.


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"model": " "}, ("model", "empty")),
        ({"num_questions": 0}, ("num_questions", 0, 1)),
        ({"concurrency": -1}, ("concurrency", -1, 1)),
        ({"requests_per_minute": 0}, ("requests_per_minute", 0, 1)),
        ({"tokens_per_minute": 0}, ("tokens_per_minute", 0, 1)),
        ({"timeout_seconds": float("nan")}, ("timeout_seconds", "nan", 0)),
        ({"timeout_seconds": float("inf")}, ("timeout_seconds", "inf", 0)),
        ({"max_cost": 0.0, "price_in": 1.0, "price_out": 1.0}, ("max_cost", 0.0, 0)),
        ({"price_in": -1.0, "price_out": 1.0}, ("price_in", -1.0, 0)),
        ({"price_in": 1.0, "price_out": float("nan")}, ("price_out", "nan", 0)),
        ({"price_in": 1.0}, ("price_in", "price_out", "missing")),
        ({"max_cost": 1.0}, ("max_cost", "price_in", "price_out")),
        ({"structured": "json"}, ("structured", "json", "auto", "schema", "lines")),
        ({"parameters": {"n": 3}}, ("parameters", "'n'", "embedft")),
        ({"parameters": {"max_tokens": 3}}, ("parameters", "max_tokens", "embedft")),
        ({"parameters": {"seed": float("nan")}}, ("parameters", "JSON", "float")),
        ({"parameters": {"stop": {1, 2}}}, ("parameters", "JSON", "set")),
        ({"num_questions": "2"}, ("num_questions", "'2'", "int")),
    ],
)
def test_settings_out_of_range(settings, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        QuestionConfig(**settings)


def test_only_the_model_may_go_without_its_name():
    assert QuestionConfig("m", base_url="http://localhost/v1").model == "m"
    with pytest.raises(TypeError):
        QuestionConfig("m", "http://localhost/v1")


def test_the_longest_reply_follows_the_number_of_questions():
    assert QuestionConfig().reply_tokens == 256
    assert QuestionConfig(num_questions=3).reply_tokens == 384
    assert QuestionConfig(num_questions=3, max_reply_tokens=50).reply_tokens == 50


@pytest.mark.parametrize(
    ("chunks", "facts"),
    [
        ([], ("no", "chunks")),
        ([Chunk("a", "x"), Chunk("a", "y")], ("chunk", "id", "'a'", "twice")),
        ([Chunk("a", " ")], ("text", "chunk", "'a'", "empty")),
        ([Chunk("a", "\ud83d")], ("text", "chunk", "'a'", "surrogate", 0)),
    ],
)
def test_chunks_that_cannot_be_asked_for(tmp_path, chunks, facts):
    for call in (write_questions, estimate):
        with pytest.raises(ValueError, match=naming(*facts)):
            call(chunks, QuestionConfig(), folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_without_text_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(ValueError, match=naming("template", "{text}")):
        write_questions(some_chunks(1), QuestionConfig(), folder=tmp_path, template="Ask!")


def test_openai_wants_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "  ")
    for url in (None, "https://eu.api.openai.com/v1"):
        with pytest.raises(ValueError, match=naming("OPENAI_API_KEY", url or "https://api.openai.com/v1", "base_url")):
            write_questions(some_chunks(1), QuestionConfig(base_url=url), folder=tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-tëst-secret")
    with pytest.raises(ValueError, match=naming("OPENAI_API_KEY", "ASCII")):
        write_questions(some_chunks(1), QuestionConfig(), folder=tmp_path)
    for url in ("localhost:8000/v1", "ftp://localhost", "http:///v1"):
        with pytest.raises(ValueError, match=naming("base_url", repr(url), "https://api.openai.com/v1")):
            write_questions(some_chunks(1), QuestionConfig(base_url=url), folder=tmp_path)


def test_openai_and_other_servers_know_the_limit_by_other_names(monkeypatch):
    bodies = []
    for url in (None, "http://localhost:1/v1"):
        asker = questions._Asker(QuestionConfig(base_url=url), TEMPLATE, questions.QUESTION)
        bodies.append(questions._body(asker.config, TEMPLATE, "text", *asker.forms.forms[0], asker.kind))
    assert [sorted(body.keys() - {"model", "messages", "response_format"}) for body in bodies] == [
        ["max_completion_tokens"],
        ["max_tokens"],
    ]


# One request.


def test_what_is_sent_and_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    chunk = Chunk("lyft/1", 'Revenue {text} rose "10%" 🙂.')
    with ApiServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        settings = {"parameters": {"temperature": 0.5, "top_k": 3}, "price_in": 2.0, "price_out": 6.0}
        outcome = write_questions([chunk], QuestionConfig(model="m", **settings), folder=tmp_path, template=PLAIN)
    prompt = 'Ask 2 about: Revenue {text} rose "10%" 🙂.'
    assert outcome.questions == {"lyft/1": written_questions(prompt)}
    assert (outcome.missing, outcome.stopped) == ({}, None)
    ((_, headers, body),) = server.log
    assert headers["authorization"] == "Bearer none"
    assert headers["x-stainless-retry-count"] == "0"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 256,
        "response_format": questions.QUESTION.response_format,
        "temperature": 0.5,
        "top_k": 3,
    }
    (reply,) = lines(tmp_path / "replies.jsonl")
    (reserved,) = lines(tmp_path / "ledger.jsonl")
    assert reply["status"] == "ok"
    assert reply["chunk"] == "lyft/1"
    assert reply["questions"] == written_questions(prompt)
    assert json.loads(reply["reply"]) == {"questions": written_questions(prompt)}
    assert reply["key"] == reserved["key"]
    assert reply["request"] == reserved["request"] == 1
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(prompt.encode()) // 4
    cost = (usage["prompt_tokens"] * 2.0 + usage["completion_tokens"] * 6.0) / 1e6
    assert reply["cost"] == pytest.approx(cost)
    # What is reserved: a token for every byte of the body that OpenAI would get, 128 more, and the longest reply.
    sent = json.dumps({**body, "max_completion_tokens": 256}, ensure_ascii=False)
    num_bytes = len(sent.encode()) - len('"max_tokens": 256, ')
    assert (reserved["most_prompt_tokens"], reserved["most_reply_tokens"]) == (num_bytes + 128, 256)
    assert reserved["most_cost"] == pytest.approx(((num_bytes + 128) * 2.0 + 256 * 6.0) / 1e6)
    assert totals(outcome.ledger) == (1, *usage.values(), 0, reply["cost"], 0.0)


RETRIED = {
    "408": ("failed", (408, "fault 408"), False),
    "409": ("failed", (409, "fault 409"), True),
    "429": ("failed", (429, "fault 429"), True),
    "429-seconds": ("failed", (429, "fault 429-seconds"), True),
    "429-date": ("failed", (429, "fault 429-date"), True),
    "429-ms": ("failed", (429, "fault 429-ms"), True),
    "500": ("failed", (500, "fault 500"), True),
    "502": ("failed", (502, "fault 502"), False),
    "503": ("failed", (503, "fault 503"), True),
    "drop": ("failed", ("connection", "Server disconnected without sending a response."), False),
    "drop-middle": ("failed", ("connection",), False),
    "late": ("failed", ("reply", 0.3, "s"), False),
    "not-json": ("failed", ("reply", "JSON", "object"), False),
    "truncated": ("invalid", ("no", "question"), None),
    "invalid-json": ("invalid", ("no", "question"), None),
    "refusal": ("invalid", ("refusal", "I cannot help with that."), None),
    "length": ("invalid", (256, "max_reply_tokens"), None),
    "empty": ("invalid", ("empty", "finish_reason", "stop"), None),
    "none": ("invalid", ("no", "question"), None),
}


def test_one_good_question_of_two_is_kept_and_not_asked_for_again(tmp_path):
    chunks = some_chunks(1)
    with ApiServer(faults=["fewer"]) as server:
        for _ in range(2):
            outcome = ask(server, chunks, tmp_path)
            assert outcome.questions == {id: two[:1] for id, two in expected(chunks).items()}
    assert server.counts["chat"] == 1


def test_every_random_fault_is_among_those_tried_here():
    assert set(RANDOM) <= RETRIED.keys()


@pytest.mark.parametrize("fault", RETRIED)
def test_a_fault_is_recorded_and_asked_again(tmp_path, fault):
    """Is it free (True), of unknown cost (False), or did the server report its usage (None)?"""
    status, facts, is_free = RETRIED[fault]
    chunks = some_chunks(1)
    settings = {"timeout_seconds": 0.3} if fault == "late" else {}
    with ApiServer(faults=[fault], late_seconds=0.6) as server:
        outcome = ask(server, chunks, tmp_path, price_in=1.0, price_out=1.0, **settings)
    assert outcome.questions == expected(chunks)
    assert server.counts["chat"] == 2
    first, second = lines(tmp_path / "replies.jsonl")
    assert (first["status"], second["status"]) == (status, "ok")
    assert names(first["reason"], *facts)
    assert (first["questions"], first["key"], first["request"]) == (None, second["key"], 1)
    reserved = lines(tmp_path / "ledger.jsonl")[0]["most_cost"]
    assert outcome.ledger.open_cost == (reserved if is_free is False else 0)
    if is_free is None:
        assert first["usage"]["prompt_tokens"] > 0
        assert first["cost"] > 0
    elif is_free:
        assert first["usage"] == {"prompt_tokens": 0, "completion_tokens": 0}
        assert first["cost"] == 0
    else:
        assert (first["usage"], first["cost"]) == (None, None)


@pytest.mark.parametrize("fault", ["preamble", "fenced", "more", "no-usage"])
@pytest.mark.parametrize("structured", ["schema", "lines"])
def test_what_is_no_fault_is_taken(tmp_path, fault, structured):
    chunks = some_chunks(1)
    with ApiServer(faults=[fault]) as server:
        outcome = ask(server, chunks, tmp_path, structured=structured)
    assert outcome.questions == expected(chunks)
    assert server.counts["chat"] == 1
    assert ("response_format" in server.log[0][2]) == (structured == "schema")
    assert len(outcome.ledger.open) == (fault == "no-usage")


def test_a_server_that_is_not_there_costs_nothing(tmp_path):
    with ApiServer() as server:
        pass
    outcome = ask(server, some_chunks(1), tmp_path, max_attempts=2, price_in=1.0, price_out=1.0)
    assert outcome.questions == {}
    assert names(outcome.missing["c0"], "connection")
    assert totals(outcome.ledger) == (2, 0, 0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    "body",
    [
        "3",
        "{}",
        '{"choices": []}',
        '{"choices": [{}]}',
        '{"choices": [{"message": null}]}',
        '{"choices": [3]}',
        "[" * 100,
        "",
    ],
)
def test_an_answer_of_another_shape_is_none(body):
    answer = read_reply(body)
    assert (answer.status, answer.action) == ("failed", "retry")
    assert names(answer.reason, "reply", "not")
    assert (answer.reply, answer.usage) == (body, None)


@pytest.mark.parametrize(
    ("message", "finish", "facts"),
    [
        ({"content": None}, "content_filter", ("empty", "finish_reason", "content_filter")),
        ({"content": [{"type": "thinking", "thinking": "What?"}]}, None, ("empty", "finish_reason", None)),
        ({}, "stop", ("empty", "finish_reason", "stop")),
        ({"content": "What?\nWho?", "refusal": "x" * 400}, "stop", ("refusal", f"{'x' * 291} ...")),
        ({"content": "What?\nWho?"}, "length", (256, "max_reply_tokens")),
    ],
)
def test_a_message_of_no_use_is_invalid(message, finish, facts):
    body = json.dumps({"choices": [{"message": message, "finish_reason": finish}]})
    answer = read_reply(body)
    assert (answer.status, answer.action) == ("invalid", "retry")
    assert names(answer.reason, *facts)
    assert answer.suspect == (finish == "length")


def test_absurd_usage_is_no_report(tmp_path):
    body = {"choices": [{"message": {"content": "What?\nWho?"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    answer = read_reply(json.dumps(body))
    assert (answer.status, answer.result, answer.usage) == ("ok", ["What?", "Who?"], (3, 4))
    body["usage"]["completion_tokens"] = 10**400
    answer = read_reply(json.dumps(body))
    assert (answer.status, answer.result, answer.usage) == ("ok", ["What?", "Who?"], None)


def test_content_in_parts():
    parts = [{"type": "thinking", "thinking": "Hm?"}, {"type": "text", "text": "What?\nWho?"}]
    assert read_reply(json.dumps({"choices": [{"message": {"content": parts}}]})).result == ["What?", "Who?"]


def test_the_timeout_holds_for_the_whole_reply(monkeypatch):
    """The client's own timeout restarts with every piece received, so a server that trickles would never reach it."""
    asker = questions._Asker(QuestionConfig(timeout_seconds=0.05), TEMPLATE, questions.QUESTION)

    async def dribble(*request, **more) -> None:
        await asyncio.sleep(2)
        raise AssertionError("nobody stopped waiting")

    monkeypatch.setattr(asker.client.openai, "post", dribble)
    answer = asyncio.run(asker.ask(sending.Job("key", some_chunks(1), 1, 1), ("max_tokens", False)))
    assert (answer.status, answer.action, answer.usage) == ("failed", "retry", None)
    assert names(answer.reason, "reply", 0.05, "s")


def test_half_a_surrogate_pair_is_stored_as_a_question_mark(tmp_path):
    body = r'{"choices": [{"message": {"content": "What \ud83d is it?\nWho?"}}]}'
    answer = read_reply(body)
    assert answer.result == ["What ? is it?", "Who?"]
    assert answer.reply.encode()


# What stops a run.


@pytest.mark.parametrize(
    ("fault", "facts"),
    [
        ("401", (401, "Incorrect key in Bearer [secret]", "OPENAI_API_KEY")),
        ("402", (402, "fault 402")),
        ("404", (404, "fault 404", "model", "/v1")),
        ("quota", (429, "You have no credit left")),
        ("429-tomorrow", (429, "fault 429-tomorrow")),
    ],
)
def test_what_holds_for_all_requests_stops_them(tmp_path, fault, facts):
    """The first is good, the second at fault; the two that are in flight beside it are let finish and recorded."""
    chunks = some_chunks(50)
    with ApiServer(faults=[None, fault], delay=0.02) as server:
        with pytest.raises(ValueError, match=naming(server.base_url, *facts, 50, "chunks")) as caught:
            ask(server, chunks, tmp_path, concurrency=3)
        assert caught.value.__context__ is None
        assert server.counts["chat"] <= 4
        replies = lines(tmp_path / "replies.jsonl")
        assert len(replies) == server.counts["chat"]
        assert names(str(caught.value), sum(reply["status"] == "ok" for reply in replies))
        outcome = ask(server, chunks, tmp_path)
    assert outcome.questions == expected(chunks)
    assert server.counts["ok"] == 50


@pytest.mark.parametrize("fault", ["400", "400-context", "403", "413", "422", "length"])
def test_five_at_the_start_stop_it(tmp_path, fault):
    with ApiServer(faults=lambda *_: fault) as server, pytest.raises(ValueError, match=naming(0, 50, "chunks")):
        ask(server, some_chunks(50), tmp_path, concurrency=1)
    # With a schema and without, each with either name of the longest reply.
    assert server.counts["chat"] == (5 if fault == "length" else 5 * 4)


def test_a_chunk_that_is_refused_is_not_asked_for_again_in_this_run(tmp_path):
    chunks = some_chunks(20)

    def is_long(prompt: str, attempt: int) -> str | None:
        return "400-context" if "Passage 7 " in prompt else None

    with ApiServer(faults=is_long) as server:
        outcome = ask(server, chunks, tmp_path)
        assert outcome.questions == {id: found for id, found in expected(chunks).items() if id != "c7"}
        assert list(outcome.missing) == ["c7"]
        assert names(outcome.missing["c7"], 400, "The maximum context length is 100 tokens")
        assert server.counts["chat"] == 20
        server.faults = ()
        assert ask(server, chunks, tmp_path).questions == expected(chunks)
        assert server.counts["chat"] == 21


def test_a_chunk_out_of_attempts_is_asked_for_next_time(tmp_path):
    chunks = some_chunks(4)
    with ApiServer(
        faults=lambda prompt, attempt: "empty" if "Passage 2 " in prompt and attempt < 6 else None
    ) as server:
        outcome = ask(server, chunks, tmp_path, max_attempts=3)
        assert list(outcome.missing) == ["c2"]
        assert names(outcome.missing["c2"], "empty", "finish_reason", "stop")
        assert list(outcome.questions) == ["c0", "c1", "c3"]
        assert server.counts["chat"] == 6
        assert ask(server, chunks, tmp_path, max_attempts=3).questions == expected(chunks)
        assert server.counts["chat"] == 9


def test_a_server_without_schemas_gets_lines(tmp_path):
    chunks = some_chunks(30)
    with ApiServer(schema=False, delay=0.01) as server:
        outcome = ask(server, chunks, tmp_path, concurrency=4, max_attempts=1)
        assert outcome.questions == expected(chunks)
        # The first four are refused with the schema, and with the other name of the limit; the rest are not asked so.
        assert server.counts["400-format"] <= 8
        num_asked = 30 + server.counts["400-format"]
        assert server.counts["chat"] == outcome.ledger.num_requests == num_asked
        # What has a reply has one, however it was asked for.
        assert ask(server, chunks, tmp_path, structured="schema").questions == outcome.questions
        assert server.counts["chat"] == num_asked
        with pytest.raises(ValueError, match=naming(400, "response_format", 0, 5, "chunks")):
            ask(server, some_chunks(5), tmp_path / "other", structured="schema")


def refuse(field: str, message: str, status: int = 400):
    """Refuses requests with this field, in these words."""
    return lambda request: (status, {"error": {"message": message}}) if field in request else None


OTHER_NAME = refuse("max_tokens", "Unsupported parameter: use 'max_completion_tokens' instead.")
WORDS = {
    "the name of the limit": (OTHER_NAME, {"max_completion_tokens", "response_format"}),
    "the schema, Gemini": (refuse("response_format", "Unknown name at 'generation_config'"), {"max_tokens"}),
    "the schema, in other words": (refuse("response_format", "结构化输出不受支持", 422), {"max_tokens"}),
    "the schema, with 500": (refuse("response_format", "internal error", 500), {"max_tokens"}),
    "the schema, in a 200": (refuse("response_format", "not supported", 200), {"max_tokens"}),
    "both": (
        lambda request: (
            OTHER_NAME(request) or refuse("response_format", "Structured outputs are not supported")(request)
        ),
        {"max_completion_tokens"},
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_a_server_refuses_is_asked_for_otherwise(tmp_path, name):
    """In whatever words it refuses a parameter, another form is tried, and the one that works is kept."""
    refuses, fields = WORDS[name]
    chunks = some_chunks(8)
    with ApiServer(refuses=refuses) as server:
        outcome = ask(server, chunks, tmp_path, concurrency=2)
        assert outcome.questions == expected(chunks)
        num_refused = server.counts["refused"]
        assert server.log[-1][2].keys() - {"model", "messages"} == fields
        assert server.counts["chat"] == 8 + num_refused
        assert num_refused <= 2 * 8  # pauses are random: some chunks go out in the first form meanwhile


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize(
    ("content", "finish"),
    [("{}", "stop"), ('{"questions": []}', "stop"), ("", "stop"), ("{" + "\n" * 500, "length"), (" " * 99, "length")],
)
def test_a_server_that_makes_nothing_of_a_schema_is_asked_for_lines(tmp_path, content, finish, concurrency):
    body = {"choices": [{"message": {"content": content}, "finish_reason": finish}], "usage": None}
    chunks = some_chunks(40)
    with ApiServer(refuses=lambda request: (200, body) if "response_format" in request else None) as server:
        outcome = ask(server, chunks, tmp_path / "auto", concurrency=concurrency)
        assert outcome.questions == expected(chunks)
        # Each that is in flight at first is asked twice, then by the other name of the limit.
        assert server.counts["refused"] <= 3 * concurrency
        assert "response_format" not in server.log[-1][2]
        settings = {"structured": "schema", "max_attempts": 2, "concurrency": 1}
        if finish == "length":
            with pytest.raises(ValueError, match=naming(256, "max_reply_tokens", 0, len(chunks))):
                ask(server, chunks, tmp_path / "schema", **settings)
        else:
            assert ask(server, chunks[:1], tmp_path / "schema", **settings).questions == {}


def test_the_words_of_an_error_in_a_choice():
    """As OpenRouter has it when the server behind it fails on the way; with the tokens that are reported."""
    choice = {"error": {"message": "Upstream is gone", "code": 502}, "finish_reason": "error"}
    body = {"choices": [choice | {"message": {"content": "What"}}]}
    answer = read_reply(json.dumps(body))
    assert (answer.status, answer.action) == ("failed", "retry")
    assert names(answer.reason, 502, "Upstream is gone")
    assert answer.usage is None
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    assert read_reply(json.dumps({"choices": [choice], "usage": usage})).usage == (3, 4)
    assert read_reply(json.dumps({"choices": [{"error": {"message": "no", "code": "401"}}]})).action == "stop"


@pytest.mark.slow
def test_no_reply_is_taken_amiss():
    """Thousands of replies with a random part replaced, dropped or doubled: questions, or a reason in one line."""
    good = {
        "choices": [{"message": {"content": "What?\nWho?", "refusal": None}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    asker = questions._Asker(QuestionConfig(base_url="http://localhost:1/v1"), TEMPLATE, questions.QUESTION)
    for seed in range(4000):
        reply = asker.client.parse(json.dumps(mutated(good, random.Random(seed))))
        answer = reply if isinstance(reply, sending.Response) else asker._from_reply(reply)
        assert answer.status == "ok" or (answer.reason and "\n" not in answer.reason)
        json.dumps([answer.reason, answer.result, answer.reply], ensure_ascii=False).encode()
        if answer.status == "ok":
            assert len(answer.result) == 2


# Limits.


def test_a_limit_of_requests_holds_over_all_runs(tmp_path):
    chunks = some_chunks(1200)
    with ApiServer() as server:
        for limit, number in ((5, 5), (5, 5), (8, 8)):
            outcome = ask(server, chunks, tmp_path, max_requests=limit)
            stop = f"--max-requests {limit}"
            assert names(outcome.stopped, stop, number, "1,200")
            assert (len(outcome.questions), len(outcome.missing)) == (number, 1200 - number)
            (reason,) = set(outcome.missing.values())
            assert names(reason, stop)
            assert server.counts["chat"] == outcome.ledger.num_requests == limit


def test_a_limit_of_cost_holds_over_all_runs(tmp_path):
    chunks = some_chunks(200)
    settings = {"price_in": 1.0, "price_out": 4.0, "concurrency": 8}
    with ApiServer(faults=0.3) as server:
        for limit in (0.02, 0.02, 0.03, 1.0):
            outcome = ask(server, chunks, tmp_path, max_cost=limit, **settings)
            spent = outcome.ledger.cost + outcome.ledger.open_cost
            assert spent <= limit
            # Not one reservation more would have fitted: they are all of about the same size.
            if limit < 1:
                assert names(outcome.stopped, f"--max-cost {limit}", len(outcome.questions), len(chunks))
                assert spent > limit - 1.1 * lines(tmp_path / "ledger.jsonl")[-1]["most_cost"]
        assert outcome.stopped is None
        assert outcome.questions == expected(chunks)
        assert server.counts["chat"] == outcome.ledger.num_requests


def test_rates_are_kept(tmp_path):
    with ApiServer() as server:
        start = time.monotonic()
        ask(server, some_chunks(6), tmp_path / "a", requests_per_minute=1200)
        requests_seconds = time.monotonic() - start
        tokens = estimate(some_chunks(1), QuestionConfig(), folder=tmp_path / "b").prompt_tokens + 256
        start = time.monotonic()
        ask(server, some_chunks(6), tmp_path / "b", tokens_per_minute=tokens * 1200)
        tokens_seconds = time.monotonic() - start
    assert requests_seconds >= 0.25
    assert tokens_seconds >= 0.249


# The folder.


def test_chunks_may_come_go_and_change_places(tmp_path):
    chunks = some_chunks(10)
    with ApiServer() as server:
        ask(server, chunks[:6], tmp_path)
        outcome = ask(server, chunks[:2:-1], tmp_path)
        assert list(outcome.questions) == [f"c{i}" for i in range(9, 2, -1)]
        assert outcome.questions == expected(chunks[3:])
        assert server.counts["chat"] == 10
        renamed = [Chunk(f"new{i}", chunk.text) for i, chunk in enumerate(chunks)]
        assert list(ask(server, renamed, tmp_path).questions.values()) == list(expected(chunks).values())
        assert server.counts["chat"] == 10


def test_chunks_with_the_same_text_are_asked_for_once(tmp_path):
    with ApiServer() as server:
        outcome = ask(server, [Chunk("a", "Same."), Chunk("b", "Same."), Chunk("c", "Other.")], tmp_path)
    assert outcome.questions["a"] == outcome.questions["b"] != outcome.questions["c"]
    assert list(outcome.questions) == ["a", "b", "c"]
    assert server.counts["chat"] == 2


@pytest.mark.parametrize(
    ("changed", "number"),
    [
        ({}, 3),
        ({"concurrency": 1, "max_attempts": 1, "structured": "lines", "max_requests": 99, "timeout_seconds": 9.0}, 3),
        ({"max_reply_tokens": 256}, 3),
        ({"model": "other"}, 6),
        ({"parameters": {"seed": 1}}, 6),
        ({"max_reply_tokens": 255}, 6),
        ({"num_questions": 1}, 6),
        ({"template": TEMPLATE + " "}, 6),
    ],
)
def test_what_changes_the_reply_asks_anew_and_keeps_the_old(tmp_path, changed, number):
    chunks = some_chunks(3)
    with ApiServer() as server:
        before = ask(server, chunks, tmp_path)
        ask(server, chunks, tmp_path, **changed)
        assert server.counts["chat"] == len(lines(tmp_path / "replies.jsonl")) == number
        assert ask(server, chunks, tmp_path).questions == before.questions
        assert server.counts["chat"] == number


def test_half_a_line_is_cut_off_and_asked_for_again(tmp_path):
    chunks = some_chunks(3)
    with ApiServer() as server:
        ask(server, chunks, tmp_path, concurrency=1)
        path = tmp_path / "replies.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
        outcome = ask(server, chunks, tmp_path, price_in=1.0, price_out=1.0)
    assert outcome.questions == expected(chunks)
    assert server.counts["chat"] == 4
    assert [line["request"] for line in lines(path)] == [1, 2, 4]
    assert (outcome.ledger.num_requests, len(outcome.ledger.open)) == (4, 1)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "replies.jsonl").write_text('{"request": 1, "key": "a", "status": "ok", "usage": null, "cost": null}\n')
    with ApiServer() as server, pytest.raises(ValueError, match=naming("replies.jsonl", 1, "no", "questions")):
        ask(server, some_chunks(1), tmp_path)


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        ({"questions": "What?"}, ("ok", "'What?'")),
        ({"questions": None}, ("ok", None)),
        ({"questions": []}, ("ok", [])),
        ({"questions": [17]}, ("question", 17)),
        ({"questions": ["\ud83d?"]}, ("question", "surrogate")),
        ({"status": "good"}, ("status", "'good'")),
        ({"status": ["ok"]}, ("status", ["ok"])),
        ({"key": 17}, ("key", 17)),
        ({"request": -17}, ("request", -17)),
        ({"usage": {"prompt_tokens": 10**400, "completion_tokens": 0}}, ("usage",)),
        ({"cost": float("nan")}, ("cost", "nan")),
    ],
)
def test_a_malformed_reply_on_disk_is_named_by_its_line(tmp_path, changed, facts):
    with ApiServer() as server:
        ask(server, some_chunks(2), tmp_path)
        path = tmp_path / "replies.jsonl"
        good = lines(path)
        path.write_text(f"{json.dumps(good[0])}\n{json.dumps(good[1] | changed)}\n")
        with pytest.raises(ValueError, match=naming(path, 2, *facts)):
            ask(server, some_chunks(2), tmp_path)
        assert server.counts["chat"] == 2


def test_one_process_at_a_time_writes_and_others_may_read(tmp_path):
    with ApiServer() as server, locked(tmp_path / "lock"):
        with pytest.raises(ValueError, match=naming(tmp_path, "process", "lock")):
            ask(server, some_chunks(1), tmp_path)
        assert estimate(some_chunks(1), QuestionConfig(), folder=tmp_path).num_requests == 1


def test_an_estimate_leaves_the_files_as_they_are(tmp_path):
    with ApiServer() as server:
        ask(server, some_chunks(2), tmp_path)
        for cut in (1, 30):  # the line feed alone, then a part of the line
            replies = (tmp_path / "replies.jsonl").read_bytes()
            (tmp_path / "replies.jsonl").write_bytes(replies[:-cut])
            found = estimate(some_chunks(2), QuestionConfig(), folder=tmp_path)
            assert found.num_requests == (0 if cut == 1 else 1)
            assert (tmp_path / "replies.jsonl").read_bytes() == replies[:-cut]
        ask(server, some_chunks(2), tmp_path)
        assert server.counts["chat"] == 3


def test_the_estimate_sends_nothing_and_needs_no_key(tmp_path, monkeypatch):
    chunks = [Chunk("a", "x" * 1000), Chunk("b", "x" * 2000), Chunk("c", "x" * 2000)]
    config = QuestionConfig(price_in=10.0, price_out=20.0)
    with ApiServer() as server:
        ask(server, chunks[:1], tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY")
    found = estimate(chunks, config, folder=tmp_path)
    body = questions._body(config, TEMPLATE, chunks[1].text, "max_completion_tokens", True, questions.QUESTION)
    num_bytes = len(json.dumps(body))
    assert num_bytes > 3000
    assert found.num_requests == 1
    assert found.prompt_tokens == -(-num_bytes // 4)
    assert found.completion_tokens == 64
    assert found.cost == pytest.approx((found.prompt_tokens * 10 + 64 * 20) / 1e6)
    assert found.most_cost == pytest.approx(((num_bytes + 128) * 10 + 256 * 20) / 1e6)
    nowhere = tmp_path / "nowhere"
    found = estimate(chunks, QuestionConfig(max_reply_tokens=40), folder=nowhere)
    assert (found.num_requests, found.completion_tokens, found.cost, found.most_cost) == (2, 80, None, None)
    assert not nowhere.exists()


# The dataset.


def test_the_dataset_has_every_chunk():
    chunks = [Chunk("a", "One."), Chunk("b", "Two."), Chunk("c", "Three.")]
    dataset = question_dataset(chunks, {"a": ["What?"], "c": ["Why?", "Who?"]})
    assert list(dataset.queries.items()) == [("a/q1", "What?"), ("c/q1", "Why?"), ("c/q2", "Who?")]
    assert dataset.corpus == {"a": "One.", "b": "Two.", "c": "Three."}
    assert dataset.qrels == {"a/q1": {"a": 1}, "c/q1": {"c": 1}, "c/q2": {"c": 1}}
    with pytest.raises(ValueError, match=naming("document", "'d'", "corpus", 3)):
        question_dataset(chunks, {"d": ["What?"]})
    with pytest.raises(ValueError, match=naming("queries", "empty")):
        question_dataset(chunks, {})


# Event loops and interrupts.


def test_it_runs_where_a_loop_is_running(tmp_path):
    chunks = some_chunks(3)

    async def notebook(server):
        return ask(server, chunks, tmp_path / "a")

    with ApiServer() as server:
        assert asyncio.run(notebook(server)).questions == expected(chunks)


def test_an_interrupt_in_a_notebook_ends_the_job(tmp_path):
    chunks, replies = some_chunks(200), tmp_path / "replies.jsonl"

    def interrupt() -> None:
        wait_for_lines(replies, 3)
        os.kill(os.getpid(), signal.SIGINT)

    async def notebook(server):
        threading.Thread(target=interrupt).start()
        ask(server, chunks, tmp_path, concurrency=2)

    loop = asyncio.new_event_loop()
    with ApiServer(delay=0.1) as server, contextlib.closing(loop), pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(notebook(server))
    assert 3 <= num_lines(replies) < 40
    with locked(tmp_path / "lock"):
        pass


def test_the_bar_shows_what_it_costs(tmp_path, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setenv("EMBEDFT_PROGRESS", "1")
    monkeypatch.setattr(sys, "stderr", stderr)
    with ApiServer(delay=0.25) as server:
        ask(server, some_chunks(3), tmp_path, concurrency=1, price_in=1000.0, price_out=1000.0)
    assert "questions" in stderr.getvalue()
    assert "cost 0." in stderr.getvalue()


# What must hold.


def test_a_thousand_chunks_with_a_fifth_of_faults(tmp_path):
    """One valid reply a chunk; the server's count of requests is chunks + faults, and the ledger's is the same."""
    chunks = some_chunks(1000)
    with ApiServer(faults=0.2, delay=0.02, keep_log=False) as server:
        outcome = ask(server, chunks, tmp_path, concurrency=64, max_attempts=12)
    assert outcome.questions == expected(chunks)
    assert list(outcome.questions) == [chunk.id for chunk in chunks]
    replies = lines(tmp_path / "replies.jsonl")
    valid = Counter(reply["key"] for reply in replies if reply["status"] == "ok")
    assert (len(valid), set(valid.values())) == (1000, {1})
    faults = sum(server.counts[fault] for fault in RANDOM)
    assert 150 < faults < 400
    assert server.counts["chat"] == 1000 + faults == len(replies) == outcome.ledger.num_requests
    assert [line["request"] for line in lines(tmp_path / "ledger.jsonl")] == list(range(1, 1001 + faults))
    assert 32 < server.counts["max_concurrent"] <= 64


def test_the_key_is_nowhere(tmp_path, monkeypatch, capfd, caplog):
    """Servers that echo it: in an error that stops, in one that is tried again, in the reply itself."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "1")
    echo = [{"choices": [{"message": {"content": f"What is {KEY}?\nWho {KEY}?"}}]}, {"error": {"message": f"<{KEY}>"}}]
    url = f"http://user:{KEY}@localhost:1/v1?key={KEY}"
    asker = questions._Asker(QuestionConfig(base_url=url), TEMPLATE, questions.QUESTION)
    answers = [read_reply(json.dumps(body), url) for body in echo]
    assert answers[0].result == ["What is [secret]?", "Who [secret]?"]
    texts = [repr(answers), repr(asker), repr(asker.client.server), asker.client.server.name]
    with ApiServer(faults=["drop", "401"]) as server:
        with pytest.raises(ValueError, match=naming(401, "[secret]", 0, 1)) as caught:
            ask(server, some_chunks(1), tmp_path)
        texts += [str(caught.value), str(caught.getrepr())]
        library = Path(questions.__file__).parents[1]  # not by its name, which a folder of the tests may have
        frames = [entry.frame for entry in caught.traceback if library in Path(entry.path).parents]
        texts += [repr(frame.f_locals) for frame in frames]
        assert frames
    assert server.log[0][1]["authorization"] == f"Bearer {KEY}"
    texts += [path.read_text() for path in tmp_path.iterdir()]
    texts += [*capfd.readouterr(), caplog.text]
    assert sum(len(text) for text in texts) > 1000
    assert [text for text in texts if KEY in text] == []


def test_a_short_key_is_a_word(tmp_path, monkeypatch):
    """The placeholder key "fleet" occurs in every reply, which must stay as it is."""
    monkeypatch.setenv("OPENAI_API_KEY", " fleet\n")
    chunks = some_chunks(20)
    with ApiServer() as server:
        outcome = ask(server, chunks, tmp_path)
    assert server.log[0][1]["authorization"] == "Bearer fleet"
    assert outcome.questions == expected(chunks)
    assert any("fleet" in question for found in outcome.questions.values() for question in found)


# A process that imports once and runs the job in children, so that a killed run takes no seconds to start again.
HARNESS = """
import json, os, sys
import openai
openai.AsyncOpenAI(api_key="none").chat.completions
from embedft.api import sending
from embedft.corpus.chunks import load_chunks
from embedft.corpus.questions import QuestionConfig, write_questions
sending.BACKOFF_SECONDS = 0.01
folder, base_url, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3])
chunks = load_chunks(folder + "/chunks.jsonl")
for _ in sys.stdin:
    child = os.fork()
    if not child:
        config = QuestionConfig(base_url=base_url, concurrency=concurrency)
        outcome = write_questions(chunks, config, folder=folder + "/out")
        with open(folder + "/outcome.json", "w") as file:
            json.dump(outcome.questions, file)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def harness(tmp_path):
    """A function of (base_url, concurrency) -> the process; it starts a run for each line it reads."""
    processes = []

    def start(base_url: str, concurrency: int) -> subprocess.Popen:
        command = [sys.executable, "-c", HARNESS, str(tmp_path), base_url, str(concurrency)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(command, **pipes, text=True, bufsize=1))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def write_chunks(path: Path, chunks: list[Chunk]) -> None:
    path.write_text("".join(json.dumps({"id": chunk.id, "text": chunk.text}) + "\n" for chunk in chunks))


def test_killed_at_twenty_random_moments(tmp_path, harness):
    """The dataset is that of an uninterrupted run; nothing on disk is asked for again, at most what was in flight."""
    generator, concurrency = random.Random(0), 4
    chunks = some_chunks(240)
    write_chunks(tmp_path / "chunks.jsonl", chunks)
    replies, num_kills, settled, before = tmp_path / "out" / "replies.jsonl", 0, set(), {}
    with ApiServer(delay=0.03, faults=0.1) as server:
        process = harness(server.base_url, concurrency)
        while True:
            process.stdin.write("\n")
            child = int(process.stdout.readline())
            wanted = num_lines(replies) + generator.randint(0, 6)
            if num_kills < 20:
                wait_for_lines(replies, wanted)
                time.sleep(generator.uniform(0, 0.04))
                os.kill(child, signal.SIGKILL)
                num_kills += 1
            status = int(process.stdout.readline())
            time.sleep(0.05)  # the server reads what was on its way
            whole = replies.read_bytes() if replies.exists() else b""
            done = {
                json.loads(line)["chunk"]
                for line in whole.splitlines(keepends=True)
                if line.endswith(b"\n") and b'"ok"' in line
            }
            asked = {
                chunk.id: server.asked[fill_template(TEMPLATE, text=chunk.text, num_questions=2)] for chunk in chunks
            }
            assert all(asked[id] == before[id] for id in settled)
            settled, before = done, asked
            if status == 0:
                break
            assert status == signal.SIGKILL
    assert num_kills == 20
    assert json.loads((tmp_path / "outcome.json").read_text()) == expected(chunks)
    records = lines(replies)
    numbers = {line["request"] for line in lines(tmp_path / "out" / "ledger.jsonl")}
    again = numbers - {record["request"] for record in records}
    assert 0 < len(again) <= 20 * concurrency
    assert len(records) <= server.counts["chat"] <= len(numbers)
    assert Counter(record["status"] for record in records)["ok"] == 240


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_quiet_and_keeps_what_is_on_disk(tmp_path, harness, signal_number):
    chunks = some_chunks(200)
    write_chunks(tmp_path / "chunks.jsonl", chunks)
    replies = tmp_path / "out" / "replies.jsonl"
    with ApiServer(delay=0.05) as server:
        process = harness(server.base_url, 4)
        process.stdin.write("\n")
        child = int(process.stdout.readline())
        wait_for_lines(replies, 8)
        os.kill(child, signal_number)
        process.stdout.readline()
        process.stdin.close()
        errors = process.stderr.read()
    for noise in ("never retrieved", "was destroyed", "Unclosed", "never awaited", "CancelledError()"):
        assert noise not in errors
    records = lines(replies)
    assert 8 <= len(records) < 100
    # Reserved and not recorded: at most what was in flight, and nothing when the signal came between two requests.
    assert 0 <= len(lines(tmp_path / "out" / "ledger.jsonl")) - len(records) <= 4
