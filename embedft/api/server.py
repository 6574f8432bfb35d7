"""The address and key of an OpenAI-compatible server, and text without its secrets. Sends nothing.

server = Server.find("http://localhost:8000/v1")   # None: OPENAI_BASE_URL, else OpenAI itself
raise ValueError(f"{server.name}: {server.redact(message)}")
"""

import os
import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlsplit

OPENAI_HOST = "api.openai.com"
OPENAI_URL = f"https://{OPENAI_HOST}/v1"
BREAK = r"(?:\\[nrt]|\\u[0-9a-fA-F]{4}|[^\x21-\x7e])"  # line breaks and whatever else may split a quoted secret


@dataclass(frozen=True)
class Server:
    """Where requests go. Only `name` may be shown: the address without user, password and query."""

    name: str
    is_openai: bool
    url: str = field(repr=False)  # without its query
    key: str = field(repr=False)  # OPENAI_API_KEY, or "none"
    query: dict[str, str] = field(repr=False, default_factory=dict)

    @classmethod
    def find(cls, base_url: str | None = None) -> "Server":
        """The server at `base_url`, else at OPENAI_BASE_URL, else OpenAI. `ValueError`: a bad address or key."""
        url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).strip()
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
        except ValueError:  # the port is not a number, or an IPv6 address lacks a bracket
            is_address = False
        if not is_address:
            shown = url.rpartition("@")[2].partition("?")[0]  # without what may be a password or key
            raise ValueError(f"base_url is {shown!r}, expected the address of a server, like {OPENAI_URL}")
        name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        is_openai = f".{parts.hostname}".endswith(f".{OPENAI_HOST}")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if is_openai and not key:
            raise ValueError(f"OPENAI_API_KEY is not set, and {name} needs a key (for another server, set base_url)")
        if not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY contains a character that is not printable ASCII")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return cls(name, is_openai, parts._replace(query="", fragment="").geturl(), key or "none", query)

    def redact(self, text: str) -> str:
        """Hides the key, the password and the query's values, in either case, encoded, or split across lines."""
        # Most texts hold no secret, and a plain search is a hundred times as fast as the pattern.
        unbroken = re.sub(f"{BREAK}+", "", text).lower()
        for form in self._forms():
            if form.lower() in unbroken:
                text = re.sub(f"{BREAK}*".join(map(re.escape, form)), "[secret]", text, flags=re.IGNORECASE)
        return text

    def _forms(self) -> Iterator[str]:
        """Each secret as it is, percent-encoded, hexadecimal and in base64 (also of a longer text around it)."""
        # Anything shorter may be an ordinary word: a placeholder key such as "ollama", a query such as ?version=beta.
        secrets = [(self.key, 12), (urlsplit(self.url).password or "", 4)]
        secrets += [(value, 8) for name, value in self.query.items() if name != "api-version"]
        for secret in (secret for secret, min_characters in secrets if len(secret) >= min_characters):
            data = secret.encode()
            yield from {secret, quote(secret, safe=""), quote(secret), data.hex()}
            for before in range(3):  # bytes in front of it in the first group of three; only whole characters count
                start, end = -(-8 * before // 6), 8 * (before + len(data)) // 6
                code = b64encode(b"\0" * before + data).decode()[start:end]
                yield from {code, code.replace("+", "-").replace("/", "_")}
