"""A client for one OpenAI-compatible server: sends requests, classifies replies and hides secrets.

client = Client(Server.find("http://localhost:8000/v1"), timeout_seconds=60)    # None: OPENAI_BASE_URL, else OpenAI
async with client.openai:
    reply = await client.post("/embeddings", {"model": "m", "input": ["a"]})    # a dict, or a failed Response
raise ValueError(f"{client.server.name}: {client.server.redact(message)}")
"""

import asyncio
import contextlib
import html
import json
import os
import re
from base64 import b64encode
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from ..config import REQUIRED, check_types, option
from .ledger import USAGE, is_count
from .sending import Response, retry_after_seconds

OPENAI_HOST = "api.openai.com"
OPENAI_URL = f"https://{OPENAI_HOST}/v1"
# What may split a quoted secret, and characters as URLs, strings and HTML write them, also several times over (%2573).
BREAK = r"""(?<!\\)\\+(?:[nrt]|(?=[/"'])|u[\da-f]{4})"""
ESCAPED = r"""(?: %(?:25)* | (?<!\\)\\+(?:u00|x) ) (?P<hexadecimal>[\da-f]{2})
    | &(?:amp;)* (?P<entity>\#\d{1,9};? | \#x[\da-f]{1,9};? | [a-z]{2,16};)"""
# A text is read in both ways, since after "%25" a key may begin with two hexadecimal digits.
READINGS = [
    [re.compile(f"{way}{other}", re.I | re.S | re.X) for other in ("", "|(?P<other>.)")]
    for way in (BREAK, f"{ESCAPED}|{BREAK}")
]
UNPRINTED = re.compile(r"[^\x21-\x7e]+")
FREE = (0, 0)
FREE_SERVER_ERRORS = (500, 503, 529)  # nothing was done that could be charged; after 408, 502 or 504 it may have been
# Connection errors raised before any byte was sent; by name, because openai chooses the HTTP library.
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# Redirects, and errors that affect every request (key, money, address). Other 4xx may concern one request: OpenRouter
# also answers 403 for a text that its moderation flags.
STOP = (*range(300, 400), 401, 402, 404, 405, 407)
RETRY = (408, 409, 425, 429)
OVERLOADED = (502, 503, 504, 529)  # other 5xx may be refusals: llama.cpp, Ollama and LiteLLM reject requests with 500
HINTS = {401: " (is OPENAI_API_KEY right?)", 404: " (is the model's name right, and does the base URL end in /v1?)"}


@dataclass(frozen=True)
class ServerConfig:
    """Requests to an OpenAI-compatible server. Raises `ValueError` for a value out of range or that cannot be sent."""

    model: str = option(REQUIRED, "name of the model on its server")
    _: KW_ONLY
    base_url: str | None = option(None, "server address [OPENAI_BASE_URL, else api.openai.com]", metavar="URL")
    parameters: dict[str, Any] = option({}, "sent unchanged in each request: temperature, seed, input_type, ...")
    concurrency: int = option(8, "requests in flight at once", least=1)
    requests_per_minute: int | None = option(None, "most in any 60 seconds [no limit]", least=1)
    tokens_per_minute: int | None = option(None, "most in any 60 seconds: bytes / 4 + reply limit [no limit]", least=1)
    timeout_seconds: float = option(60.0, "timeout of each reply", above=0)
    max_attempts: int = option(6, "maximum tries of a request in one run", least=1)
    max_cost: float | None = option(None, "budget over all runs with the same ledger or --out [no limit]", above=0)
    own_parameters = ()  # not a field: what embedft itself sets in a request
    prices = None  # not a field: per million tokens of prompts and of replies

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not self.model.strip():
            raise ValueError("model is empty, expected a name that the server knows")
        if taken := self.parameters.keys() & set(self.own_parameters):
            raise ValueError(f"parameters: {min(taken)!r} is set by embedft itself and cannot be sent as a parameter")
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters cannot be sent as JSON: {error}") from None
        if self.max_cost is not None and self.prices is None:
            names = " and ".join(name for name in vars(self) if name.startswith("price"))
            raise ValueError(f"max_cost needs {names}, per million tokens")


@dataclass(frozen=True)
class Server:
    """A server's address and key. Only `name` may be shown: it lacks the user, password and query."""

    name: str
    is_openai: bool
    url: str = field(repr=False)  # without its query
    key: str = field(repr=False)  # OPENAI_API_KEY, or "none"
    query: dict[str, str] = field(repr=False, default_factory=dict)

    @classmethod
    def find(cls, base_url: str | None = None) -> "Server":
        """The server at `base_url`, else OPENAI_BASE_URL, else OpenAI. Raises `ValueError` for a bad address or key."""
        url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).strip()
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
        except ValueError:  # the port is not a number, or an IPv6 address lacks a bracket
            is_address = False
        if not is_address:
            shown = url.rpartition("@")[2].partition("?")[0]  # without a possible password or key
            raise ValueError(f"base_url is {shown!r}, expected the address of a server, such as {OPENAI_URL}")
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
        """Hides lone surrogates and the key, password and query values, in any case, encoded, escaped or split."""
        for escaped, each in READINGS:
            forms = sorted({_printed(form, escaped) for form in self._forms()} - {""}, key=len, reverse=True)
            printed = _printed(text, escaped)
            if not any(form in printed for form in forms):
                continue
            # Most texts contain no secret, so only now each character is traced to its place.
            places = [match.span() for match in each.finditer(text) for _ in UNPRINTED.sub("", _unescape(match))]
            parts, end = [], 0
            for found in re.finditer("|".join(map(re.escape, forms)), printed):
                parts += [text[end : places[found.start()][0]], "[secret]"]
                end = places[found.end() - 1][1]
            text = "".join([*parts, text[end:]])
        return text.encode("utf-8", "replace").decode()

    def _forms(self) -> Iterator[str]:
        """Yields each secret verbatim, percent-encoded, in hexadecimal and in base64 (also inside a longer text)."""
        # Shorter values may be ordinary words: a placeholder key such as "ollama", a query such as ?version=beta.
        secrets = [(self.key, 12), (urlsplit(self.url).password or "", 4)]
        secrets += [(value, 8) for name, value in self.query.items() if name != "api-version"]
        for secret in (secret for secret, min_characters in secrets if len(secret) >= min_characters):
            data = secret.encode()
            yield from {secret, quote(secret, safe=""), quote(secret), quote(quote(secret, safe="")), data.hex()}
            for before in range(3):  # bytes before it in its first group of three; only characters it fills count
                start, end = -(-8 * before // 6), 8 * (before + len(data)) // 6
                code = b64encode(b"\0" * before + data).decode()[start:end]
                yield from {code, code.replace("+", "-").replace("/", "_")}


class Client:
    """Sends requests through `openai`, without its retries and redirects. `timeout_seconds` covers a whole reply."""

    def __init__(self, server: Server, *, timeout_seconds: float):
        import openai

        self.server, self.timeout_seconds = server, timeout_seconds
        # Azure deployments, recognizable by their `api-version`, expect the key in a separate header.
        headers = {"api-key": server.key} if "api-version" in server.query else None
        options = {"default_query": server.query, "default_headers": headers, "timeout": timeout_seconds}
        options |= {"max_retries": 0, "http_client": openai.DefaultAsyncHttpxClient(follow_redirects=False)}
        self.openai = openai.AsyncOpenAI(api_key=server.key, base_url=server.url, **options)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine that sends requests, in a new thread: a notebook's thread already runs an event loop."""

        async def closing() -> Any:
            async with self.openai:
                return await coroutine

        loop = asyncio.new_event_loop()
        task = loop.create_task(closing())
        with contextlib.closing(loop), ThreadPoolExecutor(1) as pool:
            try:
                return pool.submit(loop.run_until_complete, task).result()
            except KeyboardInterrupt:
                loop.call_soon_threadsafe(task.cancel)
                raise

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | Response:
        """Posts `body` and returns the server's JSON object, or a failed `Response`."""
        import openai

        # The generic `post` sends the body unchanged; a resource's `create` adds fields that some servers reject.
        request = self.openai.post(path, body=body, cast_to=openai.HttpxBinaryResponseContent)
        try:
            # The client's own timeout restarts with each piece of a reply.
            response = await asyncio.wait_for(request, self.timeout_seconds)
        except openai.APIStatusError as error:
            return self._failed(error.status_code, error.response.text, error.response.headers)
        except (asyncio.TimeoutError, openai.APIConnectionError) as error:
            is_late = isinstance(error, (asyncio.TimeoutError, openai.APITimeoutError))
            cause = error.__cause__ or error
            reason = f"no reply within {self.timeout_seconds:g} s" if is_late else f"no connection ({cause})"
            usage = FREE if type(cause).__name__ in NEVER_SENT else None
            return Response("failed", "retry", self.line(reason), usage=usage, suspect=usage == FREE)
        return self.parse(response.text)

    def parse(self, text: str) -> dict[str, Any] | Response:
        """The JSON object in the body of a 200, or a failed `Response` if it is not one or reports an error."""
        reply = _parse(text)
        if not isinstance(reply, dict):
            return self.unexpected("JSON object", text)
        if reply.get("error") and not (reply.get("data") or reply.get("choices")):
            code = (reply["error"] if isinstance(reply["error"], dict) else reply).get("code")
            return self._failed(int(code) if re.fullmatch(r"[45]\d\d", str(code)) else 200, text, {})
        return reply

    def unexpected(self, expected: str, text: str) -> Response:
        """The failed `Response` for a reply that is not an `expected`. JSON suggests another API: it is suspect."""
        reason, is_json = self.line(f"the reply is not a {expected}: {text}"), _parse(text) is not None
        return Response("failed", "retry", reason, reply=self.server.redact(text), suspect=is_json)

    def _failed(self, status: int, text: str, headers: Mapping[str, str]) -> Response:
        """The failed `Response` for an HTTP status other than 200, or for an error inside a 200."""
        body = _parse(text)
        error = body.get("error", body) if isinstance(body, dict) else None
        error = error if isinstance(error, dict) else {"message": error}
        message = error["message"] if error.get("message") and isinstance(error["message"], str) else text
        if 300 <= status < 400:
            target = headers.get("location", "").partition("?")[0] or "nowhere"
            message = f"redirects to {target}, but redirects are not followed (set base_url to the target)"
        reason = self.line(f"{status}: {message}") + HINTS.get(status, "")
        usage = FREE if (300 <= status < 500 and status != 408) or status in FREE_SERVER_ERRORS else None
        if status in STOP or (status == 429 and "insufficient_quota" in (error.get("code"), error.get("type"))):
            return Response("failed", "stop", reason, usage=usage)
        if status not in RETRY and status < 500:
            return Response("failed", "drop", reason, usage=usage, suspect=True)
        pause = retry_after_seconds(headers)
        is_doubtful = status >= 500 and status not in OVERLOADED and pause is None
        flags = {"may_be_refusal": is_doubtful, "exceeds_rate": status == 429}
        return Response("failed", "retry", reason, usage=usage, retry_after_seconds=pause, **flags)

    def line(self, text: str) -> str:
        """Text that is safe to show: redacted, on one printable line, cut off after 300 characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self.server.redact(text)).split())
        return line if len(line) <= 300 else f"{line[:300]} ..."


def _unescape(match: re.Match) -> str:
    """The characters that a match of READINGS stands for; none for a break."""
    if match.lastgroup == "hexadecimal":
        return chr(int(match["hexadecimal"], 16))
    if match.lastgroup == "entity":
        return html.unescape(f"&{match['entity']}")
    return match[0] if match.lastgroup else ""


def _printed(text: str, escaped: re.Pattern) -> str:
    """The printable ASCII of a text in lower case, unescaped."""
    return UNPRINTED.sub("", escaped.sub(_unescape, text)).lower()


def _parse(text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):  # also a number with too many digits
        return None


def reported_usage(reply: Mapping[str, Any], *, writes: bool) -> tuple[int, int] | None:
    """The (prompt, reply) tokens that a reply reports, or None. Embeddings (`writes` false) may report only a total."""
    usage = reply["usage"] if isinstance(reply.get("usage"), dict) else {}
    prompt, written = map(usage.get, USAGE)
    counts = (prompt, written) if writes else (usage.get("total_tokens") if prompt is None else prompt, 0)
    return counts if all(map(is_count, counts)) else None
