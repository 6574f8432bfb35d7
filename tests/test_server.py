"""server.py: whose address it is, and what of it may be said."""

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
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY is not set, and https://api.openai.com/v1 asks for a key"):
        Server.find()
    assert Server.find("http://localhost:1/v1").key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(ValueError, match="a character that no key has"):
        Server.find("http://localhost:1/v1")


def test_secrets_are_not_said():
    server = Server.find(f"http://user:hunter2hunter2@host:8/v1?token={KEY}")
    assert server.name == "http://host:8/v1"
    assert repr(server) == "Server(name='http://host:8/v1', is_openai=False)"
    assert server.redact(f"{KEY} and hunter2hunter2") == "[OPENAI_API_KEY] and [password]"


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
    ],
)
def test_what_is_no_address(url, shown):
    with pytest.raises(ValueError, match="is no address of a server") as caught:
        Server.find(url)
    assert f"the base URL '{shown}' is no address" in str(caught.value)
