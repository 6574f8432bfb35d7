"""One request of the OpenAI protocol, and what comes back classified. The only file that imports openai.

Not here: what is asked and what a good reply is (corpus/questions.py, endpoint.py); when to send (sending.py).

    client = Client(Server.find("http://localhost:8000/v1"), timeout_seconds=60)
    async with client.openai:
        reply = await client.post("/embeddings", {"model": "m", "input": ["a"]})   # a dict, or a failed Response
"""

import asyncio
import json
import math
import time
from collections.abc import Collection, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .ledger import USAGE, is_count
from .sending import Response, retry_after_seconds
from .server import Server

# With these statuses a server did no work that it charges for. A gateway's 502 or 504 and a 408 do not say.
FREE_SERVER_ERRORS = (500, 503, 529)
FREE = (0, 0)
# Connection errors before a byte of the request was sent: by name, because openai chooses the HTTP library.
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# Redirects, and what is wrong with every request: key, money, permission, address. Other 4xx are about this request.
STOP = (*range(300, 400), 401, 402, 403, 404, 405, 407)
RETRY = (408, 409, 425, 429)
OVERLOADED = (502, 503, 504, 529)  # another 5xx may be a refusal: llama.cpp, Ollama and LiteLLM refuse with 500
HINTS = {
    401: " (is OPENAI_API_KEY right?)",
    404: " (is the model's name right, and does the base URL end in /v1?)",
}
MAX_REASON_CHARACTERS = 300
POSITIVE = ("concurrency", "requests_per_minute", "tokens_per_minute", "max_cost", "max_attempts", "timeout_seconds")


class Client:
    """`openai` is an AsyncOpenAI that neither retries nor follows redirects. `timeout_seconds`: for a whole reply."""

    def __init__(self, server: Server, *, timeout_seconds: float):
        import openai

        self.server, self.timeout_seconds = server, timeout_seconds
        self.openai = openai.AsyncOpenAI(
            api_key=server.key,
            base_url=server.url,
            default_query=server.query,
            # Azure's deployments, which are addressed with a version, look for the key here.
            default_headers={"api-key": server.key} if "api-version" in server.query else None,
            max_retries=0,
            timeout=timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | Response:
        """The JSON object that the server replies to `body`, or the failed `Response`."""
        import openai

        # The generic `post` sends the body as it is; `create` of a resource adds fields that some servers refuse.
        request = self.openai.post(path, body=body, cast_to=openai.HttpxBinaryResponseContent)
        try:
            # The client's own timeout starts anew with each piece of a reply.
            response = await asyncio.wait_for(request, self.timeout_seconds)
        except openai.APIStatusError as error:
            return self._failed(error.status_code, error.response.text, error.response.headers)
        except (asyncio.TimeoutError, openai.APITimeoutError) as error:
            usage = FREE if type(error.__cause__).__name__ in NEVER_SENT else None
            return Response("failed", "retry", f"no reply within {self.timeout_seconds:g} s", usage=usage)
        except openai.APIConnectionError as error:
            was_sent = type(error.__cause__).__name__ not in NEVER_SENT
            reason = self.line(f"no connection ({error.__cause__ or error})")
            return Response("failed", "retry", reason, usage=None if was_sent else FREE, suspect=not was_sent)
        return self.parse(response.text)

    def parse(self, text: str) -> dict[str, Any] | Response:
        """The JSON object in the body of a 200, or the failed `Response` when it is none, or reports an error."""
        reply = _parse(text)
        if not isinstance(reply, dict):
            return self.unexpected("JSON object", text)
        if reply.get("error") and not (reply.get("data") or reply.get("choices")):
            code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
            return self._failed(code if type(code) is int and 400 <= code < 600 else 200, text, {})
        return reply

    def unexpected(self, expected: str, text: str) -> Response:
        """A reply that is not the `expected` kind of thing. What it cost is not known."""
        return Response("failed", "retry", self.line(f"the reply is not a {expected}: {text}"), reply=self.clean(text))

    def _failed(self, status: int, text: str, headers: Mapping[str, str]) -> Response:
        """A response with an HTTP status other than 200, or an error inside a 200."""
        message, codes = _read_error(text)
        if 300 <= status < 400:
            target = headers.get("location", "").partition("?")[0] or "nowhere"
            message = f"redirects to {target}, which is not followed (set base_url to it)"
        reason, action, pause = self.line(f"{status}: {message}"), "drop", None
        if status in STOP or (status == 429 and "insufficient_quota" in codes):
            action, reason = "stop", reason + HINTS.get(status, "")
        elif status in RETRY or status >= 500:
            action, pause = "retry", retry_after_seconds(headers, time.time())
        return Response(
            "failed",
            action,
            reason,
            usage=FREE if (300 <= status < 500 and status != 408) or status in FREE_SERVER_ERRORS else None,
            retry_after_seconds=pause,
            may_be_refusal=status >= 500 and status not in OVERLOADED and pause is None,
            suspect=action == "drop",
        )

    def clean(self, text: str) -> str:
        """Text that may be stored: without secrets, and without unpaired surrogates, which JSON can spell."""
        return self.server.redact(text).encode("utf-8", "replace").decode()

    def line(self, text: str) -> str:
        """Text that may be shown: clean, one printable line, at most its first 300 characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self.clean(text)).split())
        return line if len(line) <= MAX_REASON_CHARACTERS else f"{line[:MAX_REASON_CHARACTERS]} ..."


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also a number with too many digits
        return None


def _read_error(text: str) -> tuple[str, tuple[Any, Any]]:
    """The message in the body of an error, or else the body itself, and its code and type."""
    body = _parse(text)
    error = body.get("error", body) if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {"message": error}
    message = error.get("message")
    return message if isinstance(message, str) and message else text, (error.get("code"), error.get("type"))


def reported_usage(reply: Mapping[str, Any], *, writes: bool) -> tuple[int, int] | None:
    """Tokens of prompt and reply that a reply reports (embeddings: `writes` false, no reply); None for no report."""
    usage = reply.get("usage")
    counts = [usage.get(name) for name in USAGE[: 1 + writes]] if isinstance(usage, dict) else [None]
    return (*counts, 0)[:2] if all(map(is_count, counts)) else None


def message_text(content: Any) -> str:
    """The text of a chat message; of a list of parts those of type "text", without thinking, images and the like."""
    if isinstance(content, str):
        return content
    parts = [part for part in content or () if isinstance(part, dict) and part.get("type", "text") == "text"]
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def check_settings(settings: Any, *, positive: Collection[str], own_parameters: Collection[str]) -> None:
    """Raises `ValueError` for a setting of requests that is out of range, or a parameter that cannot be sent.

    Args:
        settings: has the attributes `positive`, `model`, `parameters`, and prices.
    """
    if not settings.model.strip():
        raise ValueError("model is empty, expected a name that the server knows")
    for name in ("price", "price_in", "price_out", *positive, *POSITIVE):
        value, is_price = getattr(settings, name, None), name.startswith("price")
        if value is not None and not (0 < value < math.inf or (is_price and value == 0)):
            raise ValueError(f"{name} is {value}, expected {'at least 0' if is_price else 'more than 0'}")
    for name in settings.parameters:
        if name in own_parameters:
            raise ValueError(f"parameters: {name!r} is set by embedft itself and cannot be sent as a parameter")
    try:
        json.dumps(settings.parameters, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameters cannot be sent as JSON: {error}") from None


def run_to_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns: `asyncio.run`, also inside a running loop, as in a notebook; an interrupt ends it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    if loop is None:  # outside of `except`, so that errors do not have that one as their context
        return asyncio.run(coroutine)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task | None]] = Future()

    async def main() -> Any:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(asyncio.run, main())
        try:
            return result.result()
        except KeyboardInterrupt:
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
            raise
