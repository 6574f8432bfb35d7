"""client.py: what a response means; tables of statuses and of malformed replies."""

import asyncio
import base64
import html
import json
import time
from urllib.parse import quote

import pytest
from api_server import ApiServer
from naming import names, naming

from embedft.api.client import FREE, Client, Server, reported_usage
from embedft.api.sending import Response

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def make_client(url: str = "http://localhost:1/v1", timeout_seconds: float = 30.0) -> Client:
    return Client(Server.find(url), timeout_seconds=timeout_seconds)


def ask(server: ApiServer, timeout_seconds: float = 30.0, query: str = "") -> dict | Response:
    client = make_client(server.base_url + query, timeout_seconds)
    return client.run(client.post("/embeddings", {"model": "m", "input": ["a"]}))


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
    (403, "", "drop", True, False),
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
    assert names(response.reason, status, "no", "[secret]")


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
    ("body", "action", "usage", "facts"),
    [
        ({"error": {"message": "no", "code": 400}}, "drop", FREE, (400, "no")),
        ({"error": {"message": "no", "code": 429}}, "retry", FREE, (429, "no")),
        ({"error": {"message": "no", "code": 401}}, "stop", FREE, (401, "no", "OPENAI_API_KEY")),
        ({"error": {"message": "no", "code": "401"}}, "stop", FREE, (401, "no", "OPENAI_API_KEY")),
        ({"error": "no", "code": "402"}, "stop", FREE, (402, "no")),
        ({"error": {"message": "no", "code": "4010"}}, "drop", None, (200, "no")),
        ({"error": {"message": "no", "code": True}}, "drop", None, (200, "no")),
        ({"error": {"message": "no", "code": "bad"}, "choices": None}, "drop", None, (200, "no")),
        ({"error": "no", "data": []}, "drop", None, (200, "no")),
        ([1], "retry", None, ("JSON", "[1]")),
        (None, "retry", None, ("JSON", "null")),
    ],
)
def test_errors_inside_a_200(body, action, usage, facts):
    response = make_client().parse(json.dumps(body))
    assert (response.status, response.action, response.usage) == ("failed", action, usage)
    assert names(response.reason, *facts)


@pytest.mark.parametrize("text", ["<html>", "", "[" * 200_000, '{"a": ' + "9" * 5000 + "}", "data: {}"])
def test_a_reply_that_is_not_json(text):
    response = make_client().parse(text)
    assert (response.status, response.action, response.usage) == ("failed", "retry", None)
    assert names(response.reason, "JSON")


def test_a_byte_order_mark_is_none_of_the_reply():
    assert make_client().parse('\ufeff{"data": [1]}') == {"data": [1]}
    assert make_client()._failed(400, '\ufeff{"error": {"message": "no"}}', {}).reason == "400: no"


@pytest.mark.parametrize(("text", "suspect"), [("[[0.1, 0.2]]", True), ("3", True), ("<html>busy", False), ("", False)])
def test_json_of_another_api_is_suspect(text, suspect):
    assert make_client().parse(text).suspect == suspect


def test_null_in_place_of_an_error_is_none():
    assert make_client().parse('{"error": null, "data": [1]}') == {"error": None, "data": [1]}


def test_a_redirect_is_not_followed():
    """Not to another origin, which would be sent the key or the texts, and neither to the same one."""
    with ApiServer() as other, ApiServer(redirect=other.base_url + "/embeddings?key=abc") as server:
        response = ask(server)
        assert other.counts == {}
    assert (response.action, response.usage) == ("stop", FREE)
    assert names(response.reason, 307, f"{other.base_url}/embeddings", "base_url")
    assert "abc" not in response.reason


def test_a_query_in_the_base_url_goes_behind_the_path():
    with ApiServer() as server:
        assert "data" in ask(server, query="/?api-version=2024-10-21&key=a%2Bb")
        assert server.paths == ["/v1/embeddings?api-version=2024-10-21&key=a%2Bb"]
        assert server.log[0][1]["api-key"] == KEY
        ask(server)
        assert "api-key" not in server.log[1][1]


def test_a_reply_that_takes_too_long():
    with ApiServer(faults=["late"], late_seconds=5) as server:
        response = ask(server, 0.05)
    assert response == Response("failed", "retry", response.reason)
    assert names(response.reason, 0.05)


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
    assert reported_usage({"usage": {"total_tokens": 7}}, writes=False) == (7, 0)
    assert reported_usage({"usage": {"prompt_tokens": None, "total_tokens": 7}}, writes=False) == (7, 0)
    assert reported_usage({"usage": {"prompt_tokens": 3, "total_tokens": 7}}, writes=False) == (3, 0)
    assert reported_usage({"usage": {"total_tokens": -7}}, writes=False) is None
    assert reported_usage({"usage": {"total_tokens": 7}}, writes=True) is None


def test_to_the_end_with_and_without_a_loop():
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    async def notebook() -> int:
        return make_client().run(answer())

    assert make_client().run(answer()) == asyncio.run(notebook()) == 42


# The server: whose address it is, and what of it may be said.


def test_openai_unless_named_otherwise(monkeypatch):
    assert Server.find() == Server("https://api.openai.com/v1", True, "https://api.openai.com/v1", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert Server.find().name == "http://localhost:8000/v1"
    assert Server.find("https://eu.api.openai.com/v1").is_openai
    assert not Server.find("https://api.openai.com.example/v1").is_openai


def test_only_openai_needs_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(ValueError, match=naming("OPENAI_API_KEY", "https://api.openai.com/v1")):
        Server.find()
    assert Server.find("http://localhost:1/v1").key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(ValueError, match=naming("OPENAI_API_KEY", "ASCII")):
        Server.find("http://localhost:1/v1")


def test_secrets_are_not_said():
    server = Server.find(f"http://user:hunter2hunter2@host:8/v1?token={KEY}")
    assert server.name == "http://host:8/v1"
    assert repr(server) == "Server(name='http://host:8/v1', is_openai=False)"
    assert server.redact(f"{KEY} and hunter2hunter2") == "[secret] and [secret]"


def test_a_short_key_is_a_word(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "fleet")
    assert Server.find("http://localhost:1/v1").redact("the fleet") == "the fleet"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:8000/v1", "localhost:8000/v1"),
        ("ftp://user:hunter2@host/v1", "host/v1"),
        ("user:hunter2@host/v1?key=secret", "host/v1"),
        ("http://host:port/v1", "http://host:port/v1"),
        ("http:///v1", "http:///v1"),
        ("http://[::1/v1", "http://[::1/v1"),
        ("http://host/\x00v1", "http://host/\x00v1"),
    ],
)
def test_what_is_no_address(url, shown):
    with pytest.raises(ValueError, match=naming("base_url", repr(shown))):
        Server.find(url)


def test_space_around_an_address_is_none_of_it(monkeypatch):
    """A .env file with Windows line ends."""
    monkeypatch.setenv("OPENAI_BASE_URL", " http://localhost:1/v1\r")
    assert Server.find().url == "http://localhost:1/v1"


def test_the_query_is_kept_apart():
    server = Server.find("http://host/v1?api-version=2024-10-21&empty=&a=%2B")
    assert (server.name, server.url) == ("http://host/v1", "http://host/v1")
    assert server.query == {"api-version": "2024-10-21", "empty": "", "a": "+"}


def encoded(text: str) -> list[str]:
    data = text.encode()
    return [base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode(), data.hex(), quote(text, safe="")]


@pytest.mark.parametrize("key", ["sk-proj-abc_DEF/123+456=", "sk-secret-0123456789"])
def test_the_key_is_hidden_in_every_form(monkeypatch, key):
    """As it is, in capitals, split anywhere, escaped, and encoded, alone or behind other words."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = Server.find("http://localhost:1/v1")
    for place in range(1, len(key)):
        for gap in ("\n", " ", "\\n", "\r\n\t", "\u200b", "\\u200b"):
            assert server.redact(f"<{key[:place]}{gap}{key[place:]}>") == "<[secret]>"
    assert server.redact(f"{key} {key.upper()} x{key.lower()}y") == "[secret] [secret] x[secret]y"
    for form in (key.replace("/", r"\/"), quote(quote(key, safe="")), quote(quote(key, safe="")).lower()):
        assert server.redact(f"<{form}>") == "<[secret]>"
    for before in ("", "B", "Be", "Bearer ", "x-api-key: "):
        for form in encoded(before + key):
            redacted = server.redact(form)
            assert "[secret]" in redacted
            # Of a group of base64 across its ends some bits may remain, never a whole character of the key.
            assert len(redacted.replace("[secret]", "")) <= len(before) * 3 + 6
    assert server.redact("\n".join(key[:8] + "Bearer sk-proj")) == "\n".join(key[:8] + "Bearer sk-proj")


SPELT = ["&#{0};", "&#x{0:x};", "&#X{0:06X};", "&amp;#{0};", "%{0:02x}", "%2525{0:02X}", r"\u{0:04x}", r"\\x{0:02x}"]


@pytest.mark.parametrize("spelt", SPELT)
def test_the_key_is_hidden_if_its_characters_are_escaped(monkeypatch, spelt):
    """All of them or one in three, as in an error page in HTML."""
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-proj-abc_DEF/123+456=")
    server = Server.find("http://localhost:1/v1")
    for step in (1, 3):
        form = "".join(c if i % step else spelt.format(ord(c)) for i, c in enumerate(key))
        assert server.redact(f"&lt;b&gt;{form}&nbsp;{key}") == "&lt;b&gt;[secret]&nbsp;[secret]"
    named = key.translate({ord("/"): "&sol;", ord("+"): "&plus;", ord("="): "&equals;", ord("_"): "&lowbar;"})
    assert server.redact(f"&quot;{named}&quot;") == "&quot;[secret]&quot;"


@pytest.mark.parametrize("key", ["abcdef0123456789", "sk-a&b<c>'d\"e-%41&amp;f"])
@pytest.mark.parametrize("before", ["%25", "%", "&", "&amp;", "&#3", "\\"])
def test_a_key_that_reads_like_an_escape_is_hidden(monkeypatch, before, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = Server.find("http://localhost:1/v1")
    for form in (key, quote(key, safe=""), html.escape(key), html.escape(html.escape(key)), json.dumps(key)[1:-1]):
        assert server.redact(f"{before} {form}!") == f"{before} [secret]!"
    if key.isalnum():
        assert server.redact(f"{before}{key}!") == f"{before}[secret]!"


def test_the_query_and_the_password_are_hidden():
    server = Server.find("http://user:pass%21word@host/v1?sig=QUERYSECRET98&api-version=2024-10-21&v=beta")
    text = "no route /v1?sig=querysecret98&api-version=2024-10-21&v=beta for pass%21word"
    assert server.redact(text) == "no route /v1?sig=[secret]&api-version=2024-10-21&v=beta for [secret]"


def test_a_large_text_takes_no_time():
    server = Server.find("http://localhost:1/v1?token=abcdefgh12345678")
    text = "sk-secret \n" * 400_000
    start = time.perf_counter()
    assert server.redact(text) == text
    assert time.perf_counter() - start < 5
