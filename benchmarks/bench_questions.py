"""Writing questions for 1,000 chunks with 64 requests in flight, against a bare AsyncOpenAI loop.

The server, in its own process, takes 200 ms per reply; it runs once without faults and once with 20%. The peer is what
one would write by hand: a semaphore, `gather`, simple retries, the same prompts and parsing, nothing on disk. Before
timing, both must return equal questions.

    python -m benchmarks.bench_questions --rounds 5
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from embedft.corpus.chunks import Chunk
from embedft.corpus.prompts import QUESTION, TEMPLATE, fill_template, parse_reply
from embedft.corpus.questions import QuestionConfig, write_questions

from . import suite
from .suite import Row, make_parser, measure
from .workers import Worker

SERVER = Path(__file__).resolve().parents[1] / "tests" / "api_server.py"
CONCURRENCY, DELAY_SECONDS, NUM_QUESTIONS, MAX_ATTEMPTS = 64, 0.2, 2, 12
MODEL = "gpt-4o-mini"


class Ours:
    def __init__(self, chunks: list[Chunk]):
        os.environ.setdefault("OPENAI_API_KEY", "none")
        self.chunks = chunks

    def write(self, base_url: str) -> None:
        config = QuestionConfig(MODEL, base_url=base_url, concurrency=CONCURRENCY, max_attempts=MAX_ATTEMPTS)
        with tempfile.TemporaryDirectory() as folder:
            self.questions = write_questions(self.chunks, config, folder=folder).questions

    def result(self) -> dict[str, list[str]]:
        return self.questions


class Bare:
    def __init__(self, chunks: list[Chunk]):
        import openai

        self.openai = openai
        self.chunks = chunks

    def write(self, base_url: str) -> None:
        self.questions = asyncio.run(self.gather(base_url))

    async def gather(self, base_url: str) -> dict[str, list[str]]:
        semaphore = asyncio.Semaphore(CONCURRENCY)

        async def ask(chunk: Chunk) -> list[str]:
            prompt = fill_template(TEMPLATE, text=chunk.text, num_questions=NUM_QUESTIONS)
            async with semaphore:
                for _ in range(MAX_ATTEMPTS):
                    try:
                        completion = await client.chat.completions.create(
                            model=MODEL,
                            messages=[{"role": "user", "content": prompt}],
                            max_tokens=256,
                            response_format=QUESTION.response_format,
                        )
                        return parse_reply(completion.choices[0].message.content or "", NUM_QUESTIONS)
                    except (ValueError, AttributeError, self.openai.APIError):
                        continue
            raise ValueError(f"no questions for chunk {chunk.id}")

        async with self.openai.AsyncOpenAI(api_key="none", base_url=base_url, timeout=60.0) as client:
            found = await asyncio.gather(*map(ask, self.chunks))
        return {chunk.id: questions for chunk, questions in zip(self.chunks, found, strict=True)}

    def result(self) -> dict[str, list[str]]:
        return self.questions


def make_texts(number: int) -> list[str]:
    """Texts of the size of a page of a filing, about 3,000 bytes."""
    return [f"Passage {i}. " + "The revenue of the year rose. " * 100 for i in range(number)]


def main(options: argparse.Namespace) -> list[Row]:
    peer = f"bare loop, openai {suite.version('openai')}"
    texts = suite.own_texts(options.data, options.chunks) or make_texts(options.chunks)
    chunks = [Chunk(f"c{i}", text) for i, text in enumerate(texts)]
    workers = {"embedft": Worker(Ours, chunks), peer: Worker(Bare, chunks)}
    rows = []
    for share in (0.0, 0.2):
        command = [sys.executable, str(SERVER), "--delay", str(DELAY_SECONDS), "--faults", str(share)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            base_url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            found = []
            for worker in workers.values():
                worker.call("write", base_url)  # also warms up
                found.append(json.dumps(worker.call("result")))
            if found[0] != found[1]:
                raise ValueError(f"the questions differ with {share:.0%} faults")
            rows += measure(f"{share:.0%} faults", workers, "write", base_url, rounds=options.rounds, warmup=0)
        finally:
            server.kill()
            server.wait()
    for worker in workers.values():
        worker.close()
    print(f"{len(chunks):,} chunks, {CONCURRENCY} requests in flight, {DELAY_SECONDS * 1000:.0f} ms per reply\n")
    return rows


def parser() -> argparse.ArgumentParser:
    found = make_parser("questions", __doc__, rounds=5, base=False, data=suite.OWN, devices=False)
    found.add_argument("--chunks", type=int, default=1000, help="chunks to write questions for [1000]")
    return found


if __name__ == "__main__":
    suite.run(main, parser())
