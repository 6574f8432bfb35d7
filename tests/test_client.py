"""client.py: what an answer that is no reply means; the rest is tested where it is used (questions, embeddings)."""

import asyncio

import pytest
from api_server import ApiServer

from embedft.api.client import FREE, Client, Refusal, run_to_end
from embedft.api.sending import Answer

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def ask(server: ApiServer, timeout_seconds: float = 30.0) -> str | Answer:
    client = Client(server.base_url, timeout_seconds=timeout_seconds)

    async def once() -> str | Answer:
        async with client.openai:
            return await client.reply(client.openai.embeddings.with_raw_response.create(model="m", input=["a"]))

    return run_to_end(once())


def test_a_reply_is_its_text():
    with ApiServer(faults=["not-json"]) as server:
        assert ask(server) == "<html>busy"
        assert '"object": "list"' in ask(server)


def test_a_refusal_is_kept_whole():
    """The reason is one line; the result has all that the server said, for whoever knows what to make of it."""
    with ApiServer(faults=["413"]) as server:
        answer = ask(server)
    assert (answer.status, answer.then, answer.reason) == ("failed", "refused", "413: fault 413")
    assert (answer.usage, answer.suspect) == (FREE, True)
    assert isinstance(answer.result, Refusal)
    assert answer.result.status == 413
    assert answer.result.text.startswith('{"error": {"message": "fault 413"')


@pytest.mark.parametrize(
    ("fault", "then", "usage"),
    [
        ("401", "stop", FREE),
        ("quota", "stop", FREE),
        ("429", "retry", FREE),
        ("503", "retry", FREE),
        ("502", "retry", None),
    ],
)
def test_no_reply(fault, then, usage):
    with ApiServer(faults=[fault]) as server:
        answer = ask(server)
    assert (answer.status, answer.then, answer.usage, answer.result) == ("failed", then, usage, None)
    assert KEY not in answer.reason


def test_a_reply_that_takes_too_long():
    with ApiServer(faults=["late"], late_seconds=5) as server:
        assert ask(server, 0.05) == Answer("failed", "retry", "no reply within 0.05 s")


def test_a_line_is_clean_and_short():
    client = Client("http://localhost:1/v1", timeout_seconds=1)
    assert client.line(f"key\n {KEY}\tand \ud800") == "key [OPENAI_API_KEY] and ?"
    assert client.line("x" * 301) == "x" * 300 + " ..."


def test_to_the_end_with_and_without_a_loop():
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    async def notebook() -> int:
        return run_to_end(answer())

    assert run_to_end(answer()) == asyncio.run(notebook()) == 42
