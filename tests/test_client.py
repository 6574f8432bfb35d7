"""client.py: what a response means; a table of statuses, and of replies that are none."""

import asyncio
import json

import pytest
from api_server import ApiServer

from embedft.api.client import FREE, Client, message_text, reported_usage, run_to_end
from embedft.api.sending import Response
from embedft.api.server import Server

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def make_client(url: str = "http://localhost:1/v1", timeout_seconds: float = 30.0) -> Client:
    return Client(Server.find(url), timeout_seconds=timeout_seconds)


def ask(server: ApiServer, timeout_seconds: float = 30.0, query: str = "") -> dict | Response:
    client = make_client(server.base_url + query, timeout_seconds)

    async def once() -> dict | Response:
        async with client.openai:
            return await client.post("/embeddings", {"model": "m", "input": ["a"]})

    return run_to_end(once())


def test_a_reply_is_its_json_and_the_body_is_sent_as_it_is():
    with ApiServer() as server:
        assert ask(server)["object"] == "list"
        assert server.log[0][2] == {"model": "m", "input": ["a"]}


# The status, the body, and what follows: action, whether it was free, whether a second one counts as refused.
STATUSES = [
    (400, "", "drop", True, False),
    (413, "", "drop", True, False),
    (418, "", "drop", True, False),
    (422, "", "drop", True, False),
    (401, "", "stop", True, False),
    (402, "", "stop", True, False),
    (403, "", "stop", True, False),
    (404, "", "stop", True, False),
    (405, "", "stop", True, False),
    (408, "", "retry", False, False),
    (409, "", "retry", True, False),
    (429, "", "retry", True, False),
    (429, "insufficient_quota", "stop", True, False),
    (500, "", "retry", True, True),
    (501, "", "retry", False, True),
    (502, "", "retry", False, False),
    (503, "", "retry", True, False),
    (504, "", "retry", False, False),
    (529, "", "retry", True, False),
]


@pytest.mark.parametrize(("status", "code", "action", "is_free", "may_be_refusal"), STATUSES)
def test_statuses(status, code, action, is_free, may_be_refusal):
    body = json.dumps({"error": {"message": f"no,\n{KEY}", "code": code}})
    response = make_client()._failed(status, body, {})
    assert (response.status, response.action, response.usage) == ("failed", action, FREE if is_free else None)
    assert (response.may_be_refusal, response.suspect) == (may_be_refusal, action == "drop")
    assert response.reason.startswith(f"{status}: no, [secret]")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"error": {"message": "no"}}', "no"),
        ('{"error": "no"}', "no"),
        ('{"message": "no", "code": 400}', "no"),
        ('{"detail": [{"loc": ["body", "x"]}]}', '{"detail": [{"loc": ["body", "x"]}]}'),
        ('{"error": {"message": null}}', '{"error": {"message": null}}'),
        ("<html>no\n\x1b[31mno</html>", "<html>no [31mno</html>"),
        ("[1]", "[1]"),
        ("", ""),
        ("[" * 100_000, "[" * 295 + " ..."),
    ],
)
def test_the_words_of_a_server(body, reason):
    assert make_client()._failed(400, body, {}).reason == f"400: {reason}".strip()


@pytest.mark.parametrize(
    ("body", "action", "usage", "reason"),
    [
        ({"error": {"message": "no such model", "code": 400}}, "drop", FREE, "400: no such model"),
        ({"error": {"message": "slow down", "code": 429}}, "retry", FREE, "429: slow down"),
        ({"error": {"message": "no", "code": 401}}, "stop", FREE, "401: no (is OPENAI_API_KEY right?)"),
        ({"error": {"message": "no", "code": "bad"}, "choices": None}, "drop", None, "200: no"),
        ({"error": "no", "data": []}, "drop", None, "200: no"),
        ([1], "retry", None, "the reply is not a JSON object: [1]"),
        (None, "retry", None, "the reply is not a JSON object: null"),
    ],
)
def test_errors_inside_a_200(body, action, usage, reason):
    response = make_client().parse(json.dumps(body))
    assert (response.status, response.action, response.usage) == ("failed", action, usage)
    assert response.reason == reason


@pytest.mark.parametrize("text", ["<html>", "", "[" * 200_000, '{"a": ' + "9" * 5000 + "}", "data: {}"])
def test_a_reply_that_is_not_json(text):
    response = make_client().parse(text)
    assert (response.status, response.action, response.usage) == ("failed", "retry", None)
    assert response.reason.startswith("the reply is not a JSON object")


def test_null_in_place_of_an_error_is_none():
    assert make_client().parse('{"error": null, "data": [1]}') == {"error": None, "data": [1]}


def test_a_redirect_is_not_followed():
    """Not to another origin, which would be sent the key or the texts, and neither to the same one."""
    with ApiServer() as other, ApiServer(redirect=other.base_url + "/embeddings?key=abc") as server:
        response = ask(server)
        assert other.counts == {}
    assert (response.action, response.usage) == ("stop", FREE)
    assert response.reason.startswith(f"307: redirects to {other.base_url}/embeddings, ")


def test_a_query_in_the_base_url_goes_behind_the_path():
    with ApiServer() as server:
        assert "data" in ask(server, query="/?api-version=2024-10-21&key=a%2Bb")
        assert server.paths == ["/v1/embeddings?api-version=2024-10-21&key=a%2Bb"]
        assert server.log[0][1]["api-key"] == KEY
        ask(server)
        assert "api-key" not in server.log[1][1]


def test_a_reply_that_takes_too_long():
    with ApiServer(faults=["late"], late_seconds=5) as server:
        assert ask(server, 0.05) == Response("failed", "retry", "no reply within 0.05 s")


def test_a_line_is_clean_and_short():
    client = make_client()
    assert client.line(f"key\n {KEY}\tand \ud800") == "key [secret] and ?"
    assert client.line("x" * 301) == "x" * 300 + " ..."


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 9}, (0, 0)),
        ({"prompt_tokens": 3}, None),
        ({"prompt_tokens": 3, "completion_tokens": -4}, None),
        ({"prompt_tokens": 3, "completion_tokens": "4"}, None),
        ({"prompt_tokens": 3.5, "completion_tokens": 4}, None),
        ({"prompt_tokens": True, "completion_tokens": 4}, None),
        ({"prompt_tokens": 3, "completion_tokens": 10**400}, None),
        (None, None),
        ([3, 4], None),
    ],
)
def test_a_report_is_believed_when_it_is_one(usage, found):
    assert reported_usage({"usage": usage}, writes=True) == found
    assert reported_usage({}, writes=True) is None


def test_a_report_of_embeddings_has_no_reply_tokens():
    assert reported_usage({"usage": {"prompt_tokens": 3}}, writes=False) == (3, 0)
    assert reported_usage({"usage": {"prompt_tokens": 10**400}}, writes=False) is None
    assert reported_usage({"usage": {}}, writes=False) is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"text": "b"}], "ab"),
        (
            [
                {"type": "thinking", "thinking": "no"},
                {"type": "reasoning", "text": "no"},
                {"type": "text", "text": "a"},
            ],
            "a",
        ),
        ([{"type": "text"}, 3, None], ""),
    ],
)
def test_the_text_of_a_message(content, text):
    assert message_text(content) == text


def test_to_the_end_with_and_without_a_loop():
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    async def notebook() -> int:
        return run_to_end(answer())

    assert run_to_end(answer()) == asyncio.run(notebook()) == 42
