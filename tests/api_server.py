"""A local server that speaks the OpenAI protocol (chat completions, embeddings, models), with faults on demand.

with ApiServer(faults=["429", None], delay=0.02) as server:
    client = openai.OpenAI(base_url=server.base_url, api_key="any")

It implements HTTP/1.1 on asyncio streams in its own thread. Run as a process, it prints its port:
python tests/api_server.py --delay 0.2 --faults 0.2 --seed 0
"""

import argparse
import asyncio
import base64
import email.utils
import hashlib
import json
import math
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

# A client must retry after these. A share of faults draws from RANDOM.
STATUSES = {
    "408": 408,
    "409": 409,
    "429": 429,
    "429-seconds": 429,
    "429-date": 429,
    "429-ms": 429,
    "429-tomorrow": 429,
    "500": 500,
    "502": 502,
    "503": 503,
    "quota": 429,
    "400": 400,
    "400-context": 400,
    "400-format": 400,
    "401": 401,
    "402": 402,
    "403": 403,
    "404": 404,
    "413": 413,
    "422": 422,
}
CONNECTION = ("drop", "drop-middle", "late")
CONTENT = ("truncated", "invalid-json", "refusal", "length", "empty", "none")
RANDOM = ("429", "429-seconds", "429-date", "429-ms", "500", "502", "503", "drop", "drop-middle", "not-json", *CONTENT)
# Retrying after these is pointless.
HARMLESS = ("preamble", "fenced", "more", "no-usage")
# Faults in embedding replies; those of one vector are in the last. "reversed" is no fault: clients use the index.
VECTORS = (
    *("fewer-vectors", "more-vectors", "same-index", "index-from-1", "index-text", "no-index"),
    *("nan", "null", "zero", "sizes", "no-values", "half", "words", "nested", "reversed"),
)
# How servers refuse a text that is too long: status, message.
LENGTH_REFUSALS = {
    "openai": (
        400,
        "This model's maximum context length is {limit} tokens, however you requested {found} tokens ({found} in your"
        " prompt; 0 for the completion). Please reduce your prompt; or completion length.",
    ),
    "openai-input": (400, "Invalid 'input[{row}]': maximum input length is {limit} tokens."),
    "vllm": (
        400,
        "This model's maximum context length is {limit} tokens. However, you requested {found} tokens in the input for"
        " embedding generation. Please reduce the length of the input.",
    ),
    "tei": (413, "Input validation error: `inputs` must have less than {limit} tokens. Given: {found}"),
    "ollama": (400, "the input length exceeds the context length"),
}
WORDS = ("revenue", "margin", "driver", "rider", "fleet", "lease", "insurance", "airport", "bonus", "warrant")

Faults = float | Sequence[str | None] | Callable[[str, int], str | None]


def written_questions(prompt: str, num_questions: int = 2) -> list[str]:
    """The server's answer to a prompt, always the same."""
    digest = hashlib.sha256(prompt.encode()).digest()
    words = [WORDS[byte % len(WORDS)] for byte in digest]
    return [
        f"What did {words[2 * i]} {digest.hex()[8 * i : 8 * i + 8]} say about the {words[2 * i + 1]} of 20{10 + i}?"
        for i in range(num_questions)
    ]


def unit_vector(text: str, dimensions: int) -> list[float]:
    """A vector of length 1 that depends on the text alone."""
    generator = random.Random(text)
    values = [generator.gauss(0.0, 1.0) for _ in range(dimensions)]
    norm = math.sqrt(sum(value * value for value in values))
    return [value / norm for value in values]


class ApiServer:
    """Listens inside its `with` block.

    Args:
        faults: for chat and embeddings, one of: a share of requests, drawn by `seed`, the prompt and how often it was
            asked; a list with the fault of each request in turn, then none; a function of (prompt, attempt from 1).
        delay: seconds before each reply. `late_seconds`: before a late one.
        num_questions: per reply.
        write: what to reply to (prompt, num_questions), as a list; in JSON, under the key that the schema asks for.
        schema: accept response_format; otherwise, answer with a 400 that names it.
        retry_after: sent with "429-seconds", "429-ms" (this many milliseconds) and "429-date".

    For embeddings: `dimensions` unless a request asks for others; at most `max_tokens` per text, counted by
    `count_tokens` and refused in the words of `wording`; at most `max_texts` per request; `base64`: "given", "ignored"
    or "refused". `refuses`: a function of a request that returns None, or the status and JSON to refuse it with.
    `redirect`: answer everything with a 307 to this address.

    `counts`: requests by path ("chat", "embeddings", "models") and by outcome ("ok" or the fault), and
    "max_concurrent". `log`: (kind, headers, body) of each request, unless `keep_log` is false. `asked`: how often each
    prompt (or list of texts) came in. `paths`: of all requests.
    """

    def __init__(
        self,
        *,
        faults: Faults = (),
        delay: float = 0.0,
        seed: int = 0,
        late_seconds: float = 2.0,
        num_questions: int = 2,
        write: Callable[[str, int], list[str]] = written_questions,
        schema: bool = True,
        retry_after: float = 0,
        dimensions: int = 16,
        max_tokens: int | None = None,
        wording: str = "openai",
        max_texts: int | None = None,
        count_tokens: Callable[[str], int] = lambda text: len(text.encode()) // 4,
        base64: str = "given",
        redirect: str | None = None,
        refuses: Callable[[dict], tuple[int, object] | None] = lambda request: None,
        keep_log: bool = True,
        port: int = 0,
    ):
        self.faults, self.delay, self.seed, self.late_seconds = faults, delay, seed, late_seconds
        self.num_questions, self.schema, self.retry_after, self.dimensions = (
            num_questions,
            schema,
            retry_after,
            dimensions,
        )
        self.max_tokens, self.wording, self.max_texts = max_tokens, wording, max_texts
        self.count_tokens, self.base64, self.redirect = count_tokens, base64, redirect
        self.refuses, self.write = refuses, write
        self.paths: list[str] = []
        self.keep_log, self.port = keep_log, port
        self.counts: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.log: list[tuple[str, dict[str, str], dict]] = []
        self.concurrent = self.num_requests = 0
        self.connections: set[asyncio.Task] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ApiServer":
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), self.loop).result()
        return self

    def __exit__(self, *error) -> None:
        asyncio.run_coroutine_threadsafe(self.stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def start(self) -> None:
        self.listener = await asyncio.start_server(self.serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self.listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.listener.close()
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive until the client or a fault ends it."""
        task = asyncio.current_task()
        self.connections.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = head.rstrip("\r\n").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                answer = await self.answer(request.split()[1], headers, body)
                if answer is None:
                    return
                status, more, content, cut = answer
                more = {"Content-Type": "application/json", "Content-Length": len(content), **more}
                lines = [f"HTTP/1.1 {status} .", *(f"{name}: {value}" for name, value in more.items())]
                writer.write(
                    "\r\n".join([*lines, "", ""]).encode() + (content[: len(content) // 2] if cut else content)
                )
                await writer.drain()
                if cut:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections.discard(task)
            writer.close()

    async def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes, bool] | None:
        """Returns (status, headers, content, whether it breaks off); None: the connection drops."""
        kind = path.partition("?")[0].rstrip("/").rpartition("/")[2]
        if kind == "counts":
            return 200, {}, json.dumps(self.counts).encode(), False
        if kind == "models":
            self.counts["models"] += 1
            return 200, {}, json.dumps({"object": "list", "data": [{"id": "test", "object": "model"}]}).encode(), False
        kind = {"completions": "chat"}.get(kind, kind)
        if kind not in ("chat", "embeddings"):
            self.counts["unknown"] += 1
            return 404, {}, error_body("no such path", "not_found"), False
        request = json.loads(body)
        self.counts[kind] += 1
        self.paths.append(path)
        if self.redirect is not None:
            return 307, {"Location": self.redirect}, b"", False
        if self.keep_log:
            self.log.append((kind, headers, request))
        prompt = request["messages"][-1]["content"] if kind == "chat" else json.dumps(request["input"])
        self.asked[prompt] += 1
        fault = self.fault(prompt)
        if fault is None and "response_format" in request and not self.schema:
            fault = "400-format"
        refused = self.refuses(request)
        if refused is not None:
            self.counts["refused"] += 1
            return refused[0], {}, json.dumps(refused[1]).encode(), False
        refusal = self.refusal(request) if kind == "embeddings" and fault is None else None
        self.counts[fault or ("refused" if refusal else "ok")] += 1
        self.concurrent += 1
        self.counts["max_concurrent"] = max(self.counts["max_concurrent"], self.concurrent)
        try:
            await asyncio.sleep(self.late_seconds if fault == "late" else self.delay)
        finally:
            self.concurrent -= 1
        if fault == "drop":
            return None
        if refusal is not None:
            status, message = refusal
            return status, {}, error_body(message, "invalid_request_error"), False
        if fault in STATUSES:
            return self.refuse(fault, headers)
        content = b"<html>busy" if fault == "not-json" else self.reply(kind, request, prompt, fault)
        return 200, {}, content, fault == "drop-middle"

    def fault(self, prompt: str) -> str | None:
        self.num_requests += 1
        if callable(self.faults):
            return self.faults(prompt, self.asked[prompt])
        if isinstance(self.faults, (int, float)):
            generator = random.Random(f"{self.seed}/{self.asked[prompt]}/{prompt}")
            return generator.choice(RANDOM) if generator.random() < self.faults else None
        return self.faults[self.num_requests - 1] if self.num_requests <= len(self.faults) else None

    def refuse(self, fault: str, headers: dict[str, str]) -> tuple[int, dict, bytes, bool]:
        more = {
            "429-seconds": {"Retry-After": f"{self.retry_after:g}"},
            "429-ms": {"retry-after-ms": f"{self.retry_after:g}", "Retry-After": "100"},
            "429-date": {"Retry-After": email.utils.formatdate(time.time() + self.retry_after, usegmt=True)},
            "429-tomorrow": {"Retry-After": "86400"},
        }.get(fault, {})
        message, code = {
            "quota": ("You have no credit left", "insufficient_quota"),
            "401": (f"Incorrect key in {headers.get('authorization')}", "invalid_api_key"),
            "400-format": ("'response_format' of type 'json_schema' is not supported", "invalid"),
            "400-context": ("The maximum context length is 100 tokens", "context_length_exceeded"),
        }.get(fault, (f"fault {fault}", "fault"))
        return STATUSES[fault], more, error_body(message, code), False

    def reply(self, kind: str, request: dict, prompt: str, fault: str | None) -> bytes:
        if kind == "embeddings":
            return json.dumps(self.embed(request, fault)).encode()
        num_questions = self.num_questions + {"none": -self.num_questions, "fewer": -1, "more": 1}.get(fault, 0)
        questions = self.write(prompt, num_questions)
        is_json = "response_format" in request
        wanted = request["response_format"]["json_schema"]["schema"]["required"] if is_json else []
        content = json.dumps(dict.fromkeys(wanted, questions)) if is_json else "\n".join(questions)
        finish, refusal = "stop", None
        if fault == "preamble":
            content = "Sure! Here are your questions:\n\n" + "\n".join(f"{i}. {q}" for i, q in enumerate(questions, 1))
        elif fault == "fenced":
            content = f"```json\n{json.dumps({'questions': questions})}\n```"
        elif fault == "truncated":
            content = json.dumps({"questions": questions})[:30]
        elif fault == "invalid-json":
            content = json.dumps({"questions": 3})
        elif fault == "length":
            content, finish = content[: len(content) // 2], "length"
        elif fault == "empty":
            content = ""
        elif fault == "refusal":
            content, refusal = None, "I cannot help with that."
        usage = {"prompt_tokens": len(prompt.encode()) // 4, "completion_tokens": len(content or "") // 4}
        reply = {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content, "refusal": refusal},
                    "finish_reason": finish,
                }
            ],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
        if fault == "no-usage":
            del reply["usage"]
        return json.dumps(reply).encode()

    def refusal(self, request: dict) -> tuple[int, str] | None:
        """Status and message if this server does not accept the request."""
        texts = input_of(request)
        if self.base64 == "refused" and request.get("encoding_format") == "base64":
            return 400, "encoding_format 'base64' is not supported"
        if self.max_texts is not None and len(texts) > self.max_texts:
            return 413, f"batch size {len(texts)} > maximum allowed batch size {self.max_texts}"
        for row, text in enumerate(texts):
            found = self.count_tokens(text)
            if self.max_tokens is not None and found > self.max_tokens:
                status, message = LENGTH_REFUSALS[self.wording]
                return status, message.format(limit=self.max_tokens, found=found, row=row)
        return None

    def embed(self, request: dict, fault: str | None = None) -> dict:
        texts = input_of(request)
        dimensions = request.get("dimensions", self.dimensions) // (2 if fault == "half" else 1)
        vectors = [unit_vector(str(text), dimensions) for text in texts]
        if fault in ("nan", "zero"):
            vectors[-1] = [{"nan": math.nan, "zero": 0.0}[fault]] * dimensions
        elif fault == "sizes":
            vectors[-1] = vectors[-1][:-1]
        elif fault == "no-values":
            vectors = [[] for _ in texts]
        if request.get("encoding_format") == "base64" and self.base64 == "given":
            vectors = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
        if fault in ("words", "null", "nested"):
            vectors[-1] = {"words": "not base64!", "null": [None] * dimensions, "nested": [[1.0] * dimensions]}[fault]
        first = 1 if fault == "index-from-1" else 0
        data = [{"object": "embedding", "index": first + i, "embedding": v} for i, v in enumerate(vectors)]
        if fault == "fewer-vectors":
            data.pop()
        elif fault == "more-vectors":
            data.append({**data[-1], "index": len(data)})
        elif fault in ("same-index", "index-text"):
            data[-1]["index"] = 0 if fault == "same-index" else str(len(data) - 1)
        elif fault == "no-index":
            del data[-1]["index"]
        elif fault == "reversed":
            data.reverse()
        num_tokens = sum(self.count_tokens(text) for text in texts)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        reply = {"object": "list", "data": data, "model": request["model"], "usage": usage}
        if fault == "no-usage":
            del reply["usage"]
        return reply


def input_of(request: dict) -> list[str]:
    """The texts of an embeddings request, which may hold one or many."""
    return [request["input"]] if isinstance(request["input"], str) else request["input"]


def mutated(value: object, generator: random.Random) -> object:
    """A copy of a JSON value with one part replaced by junk, dropped or doubled."""
    if isinstance(value, (dict, list)) and value and generator.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        place = generator.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if generator.random() < 0.15:
            del copy[place]
        elif isinstance(copy, list) and generator.random() < 0.15:
            copy.append(copy[place])
        else:
            copy[place] = mutated(copy[place], generator)
        return copy
    junk = [
        None,
        True,
        -1,
        0,
        0.5,
        10**30,
        10**400,
        float("nan"),
        float("inf"),
        1e-320,
        1e308,
        "",
        "a",
        "\ud83d",
        "\x00",
    ]
    junk += ["AAAA", "AACAPw==", [], {}, [[]], [1], {"a": 1}, [None], "\x1b[31m\n", "x" * 2000]
    return generator.choice(junk)


def error_body(message: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": code, "param": None, "code": code}}).encode()


async def main(options: argparse.Namespace) -> None:
    server = ApiServer(faults=options.faults, delay=options.delay, seed=options.seed, port=options.port, keep_log=False)
    await server.start()
    print(server.port, flush=True)
    await server.listener.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server with faults.")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds until each reply [0]")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail [0]")
    parser.add_argument("--seed", type=int, default=0, help="of the faults [0]")
    parser.add_argument("--port", type=int, default=0, help="0: any [0]")
    asyncio.run(main(parser.parse_args()))
