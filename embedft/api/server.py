"""An OpenAI-compatible server: its address, its key, and what may be said of them. Knows no client and sends nothing.

server = Server.find("http://localhost:8000/v1")   # None: OPENAI_BASE_URL, else OpenAI itself
raise ValueError(f"{server.name}: {server.redact(message)}")
"""

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

OPENAI_HOST = "api.openai.com"
OPENAI_URL = f"https://{OPENAI_HOST}/v1"
# A shorter key is a placeholder such as "ollama", and may well be a word of the texts.
MIN_SECRET_CHARACTERS = 12


@dataclass(frozen=True)
class Server:
    """Where requests go. `name` may be shown: the address without user, password and query, which may be secrets.

    `url` and `key` are for the client alone; the key comes from OPENAI_API_KEY, "none" where there is none.
    """

    name: str
    is_openai: bool
    url: str = field(repr=False)
    key: str = field(repr=False)

    @classmethod
    def find(cls, base_url: str | None = None) -> "Server":
        """The server at `base_url`, else at OPENAI_BASE_URL, else OpenAI itself.

        Raises:
            ValueError: no address of a server, a key with characters that none has, or no key for OpenAI itself.
        """
        url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        parts = urlsplit(url)
        try:
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # a port that is no number
            is_address = False
        if not is_address:
            # Not the address itself, in which a password may stand.
            shown = url.rpartition("@")[2].partition("?")[0]
            raise ValueError(f"the base URL {shown!r} is no address of a server, expected one like {OPENAI_URL}")
        name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        is_openai = parts.hostname == OPENAI_HOST or parts.hostname.endswith(f".{OPENAI_HOST}")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if is_openai and not key:
            raise ValueError(f"OPENAI_API_KEY is not set, and {name} asks for a key (another server: base_url)")
        if not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds a character that no key has")
        return cls(name, is_openai, url, key or "none")

    def redact(self, text: str) -> str:
        """A text without the key, which some servers quote, and without the password of the address."""
        secrets = (self.key if len(self.key) >= MIN_SECRET_CHARACTERS else None, urlsplit(self.url).password)
        for secret in filter(None, secrets):
            text = text.replace(secret, "[OPENAI_API_KEY]" if secret == self.key else "[password]")
        return text
