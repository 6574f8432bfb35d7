"""A client of the OpenAI protocol: one request at a time, and what an answer that is no reply means.

The only file that imports openai. Deliberately not here: what is asked and what a good reply is (data/questions.py,
encoders/openai_api.py), when a request is sent and what it may cost (sending.py).

    client = Client("http://localhost:8000/v1", timeout_seconds=60)
    async with client.openai:
        reply = await client.reply(client.openai.embeddings.with_raw_response.create(model="m", input=["a"]))
"""

import asyncio
import time
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from .sending import Answer, retry_after_seconds
from .server import Server

# A server that answers so did no work that it charges for. A gateway's 502 or 504 and a 408 do not say.
FREE_SERVER_ERRORS = (500, 503, 529)
FREE = (0, 0)
# Causes of a connection error after which no byte of the request had left: names, because openai picks the HTTP client.
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# Bad request, too large, unprocessable: about this one request, so asking again is no use.
REFUSALS = (400, 413, 422)
HINTS = {
    401: " (is OPENAI_API_KEY right?)",
    404: " (is the model's name right, and does the base URL end in /v1?)",
}
MAX_REASON_CHARACTERS = 300


class Refusal(NamedTuple):
    """What a server said of a request that it will not serve, whole: the `result` of an `Answer` that is "refused"."""

    status: int
    text: str


class Client:
    """`openai` is the AsyncOpenAI client, which tries nothing again by itself.

    Args:
        base_url: see server.py. timeout_seconds: for a whole reply.

    Raises:
        ValueError: no address of a server, or no key for api.openai.com.
    """

    def __init__(self, base_url: str | None, *, timeout_seconds: float):
        import openai

        self.server, self.timeout_seconds = Server.find(base_url), timeout_seconds
        self.openai = openai.AsyncOpenAI(
            api_key=self.server.key, base_url=self.server.url, max_retries=0, timeout=timeout_seconds
        )

    async def reply(self, request: Awaitable[Any]) -> str | Answer:
        """The text of a reply, or the failed `Answer` that came instead; its result is a `Refusal` for a refusal.

        Args:
            request: what a `with_raw_response.create` of the client returns.
        """
        import openai

        try:
            # The client's own timeout holds for each piece of a reply, this one for all of it.
            response = await asyncio.wait_for(request, self.timeout_seconds)
        except openai.APIStatusError as error:
            return self._from_status(error)
        except (asyncio.TimeoutError, openai.APITimeoutError) as error:
            usage = FREE if type(error.__cause__).__name__ in NEVER_SENT else None
            return Answer("failed", "retry", f"no reply within {self.timeout_seconds:g} s", usage=usage)
        except openai.APIConnectionError as error:
            never_sent = type(error.__cause__).__name__ in NEVER_SENT
            reason = self.line(f"no connection ({error.__cause__ or error})")
            return Answer("failed", "retry", reason, usage=FREE if never_sent else None, suspect=never_sent)
        return response.text

    def _from_status(self, error: Any) -> Answer:
        """An HTTP status that says no; `error` is openai's APIStatusError."""
        status, text = error.status_code, error.response.text
        message = error.body.get("message") if isinstance(error.body, dict) else None
        reason = self.line(f"{status}: {message or text}")
        is_free = (status < 500 and status != 408) or status in FREE_SERVER_ERRORS
        usage = FREE if is_free else None
        if status in REFUSALS:
            return Answer("failed", "refused", reason, result=Refusal(status, text), usage=usage, suspect=True)
        is_spent = status == 429 and "insufficient_quota" in (error.code, error.type)
        if (status < 500 and status not in (408, 409, 429)) or is_spent:
            return Answer("failed", "stop", reason + HINTS.get(status, ""), usage=usage)
        pause = retry_after_seconds(error.response.headers, time.time())
        return Answer("failed", "retry", reason, usage=usage, retry_after_seconds=pause)

    def clean(self, text: str) -> str:
        """What may be stored: without the key, and as UTF-8 can hold it (JSON can spell half a surrogate pair)."""
        return self.server.redact(text).encode("utf-8", "replace").decode()

    def line(self, text: str) -> str:
        """What may be shown: clean, one line, its first 300 characters."""
        line = " ".join(self.clean(text).split())
        return line if len(line) <= MAX_REASON_CHARACTERS else f"{line[:MAX_REASON_CHARACTERS]} ..."


def run_to_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns: `asyncio.run`, also where a loop is running already, as in a notebook."""
    try:
        run = _run_beside if asyncio.get_running_loop() else asyncio.run
    except RuntimeError:  # there is none
        run = asyncio.run
    return run(coroutine)


def _run_beside(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """In a thread with a loop of its own; an interrupt ends it there."""
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
