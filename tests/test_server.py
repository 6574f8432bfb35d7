"""server.py: whose address it is, and what of it may be said."""

import base64
import time
from urllib.parse import quote

import pytest

from embedft.api.server import Server

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_openai_unless_named_otherwise(monkeypatch):
    assert Server.find() == Server("https://api.openai.com/v1", True, "https://api.openai.com/v1", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert Server.find().name == "http://localhost:8000/v1"
    assert Server.find("https://eu.api.openai.com/v1").is_openai
    assert not Server.find("https://api.openai.com.example/v1").is_openai


def test_only_openai_needs_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY is not set.*https://api.openai.com/v1"):
        Server.find()
    assert Server.find("http://localhost:1/v1").key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(ValueError, match="OPENAI_API_KEY contains a character"):
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
    with pytest.raises(ValueError, match="base_url is") as caught:
        Server.find(url)
    assert f"base_url is {shown!r}" in str(caught.value)


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
    for before in ("", "B", "Be", "Bearer ", "x-api-key: "):
        for form in encoded(before + key):
            redacted = server.redact(form)
            assert "[secret]" in redacted
            # Of a group of base64 across its ends some bits may remain, never a whole character of the key.
            assert len(redacted.replace("[secret]", "")) <= len(before) * 3 + 6
    assert server.redact("\n".join(key[:8] + "Bearer sk-proj")) == "\n".join(key[:8] + "Bearer sk-proj")


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
