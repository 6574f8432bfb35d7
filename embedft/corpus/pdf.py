"""Reads the text of every page of PDF files, in processes of its own.

    for text in read_pdfs(["report.pdf"]):
        print(text.reason or text.pages[0])

Each process runs pdf_page.py on one block of pages, so a damaged page that never finishes, eats the memory or crashes
the interpreter costs that page alone. Not here: how a page is read (pdf_page.py), what becomes of its text
(documents.py), OCR.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..progress import progress_bar

SCRIPT = [sys.executable, str(Path(__file__).with_name("pdf_page.py"))]


class PdfText(NamedTuple):
    """The text of one file: `pages` in order, "" for a page without text.

    `failures` says what is wrong with a page, by page number from 1; `reason` why the whole file cannot be read: it
    then has no pages. `plain` holds the numbers of the pages that were read without their layout (see pdf_page.py).
    """

    pages: list[str]
    failures: dict[int, str]
    reason: str | None
    plain: set[int]


def read_pdfs(
    paths: Sequence[str | Path], *, processes: int | None = None, block_pages: int = 16, page_seconds: float = 30.0
) -> list[PdfText]:
    """Reads PDF files, several pages at a time; never raises for what is wrong with a file.

    Encrypted files that open with an empty password are read.

    Args:
        paths: existing files.
        processes: most that run at once; None: one per CPU core.
        block_pages: pages that a process reads before it takes the next block; starting one takes as long as 16 pages.
        page_seconds: limit for each page, and for opening the file. A page that takes longer is a failure.

    Returns:
        One `PdfText` per path, in order.

    Raises:
        ValueError: `processes` is less than 1.
    """
    processes = (os.cpu_count() or 1) if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes is {processes}, expected at least 1")
    texts = [PdfText([], {}, None, set()) for _ in paths]
    readers = [_Reader(page_seconds) for _ in range(processes)]
    idle = list(readers)
    bar = progress_bar(None, "reading PDF files", unit="page")

    def read(row: int, start: int) -> None:
        reader, num_pages = idle.pop(), len(texts[row].pages)
        stop = min(start + block_pages, num_pages or block_pages)
        for number, reply in reader.read(os.fspath(paths[row]), start, stop):
            texts[row] = _add(texts[row], number, reply)
            bar.update(number > 0)
        idle.append(reader)

    pool = ThreadPoolExecutor(processes)
    try:
        list(pool.map(read, range(len(paths)), [0] * len(paths)))
        bar.total = sum(len(text.pages) for text in texts)  # known once the first block of each file is read
        rest = [(row, i) for row, text in enumerate(texts) for i in range(block_pages, len(text.pages), block_pages)]
        list(pool.map(read, *zip(*rest, strict=True)) if rest else ())
    finally:  # after an interrupt, threads still wait for their processes
        for reader in readers:
            reader.kill()
        pool.shutdown(cancel_futures=True)
        for reader in readers:
            reader.close()
        bar.close()
    return texts


def _add(text: PdfText, number: int, reply: dict[str, Any]) -> PdfText:
    """Adds one reply of a process: on page `number`, or on the whole file for 0."""
    if number == 0:
        text.pages.extend([""] * (reply.get("num_pages", 0) - len(text.pages)))
        return text._replace(reason=reply.get("error"))
    text.pages[number - 1] = reply.get("text", "")
    if "error" in reply:
        text.failures[number] = reply["error"]
    if reply.get("plain"):
        text.plain.add(number)
    return text


class _Reader:
    """One process that reads pages, started when it is first needed and again after it has died."""

    def __init__(self, page_seconds: float) -> None:
        self.page_seconds, self.process, self.is_killed = page_seconds, None, False

    def read(self, path: str, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (page number from 1, reply) of pages `start` to `stop`; (0, reply) tells their number, or an error.

        A page that kills the process, or fails to open where the first page did, is a failure of that page.
        """
        number = start
        while number < stop:
            head = self._ask(json.dumps([path, number, stop]) + "\n")
            if "num_pages" in head:
                stop = min(stop, head["num_pages"])
                yield 0, head
                while number < stop and "error" not in head:
                    number += 1
                    reply = self._reply()
                    yield number, reply
                    if self.process is None:
                        break
            elif number == 0:
                yield 0, head
                return
            else:
                number += 1
                yield number, head

    def _ask(self, request: str) -> dict[str, Any]:
        if self.process is None:
            # What pypdf logs goes nowhere; replies say what is wrong.
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(SCRIPT, **pipes, encoding="ascii")
        if self.is_killed:
            self.process.kill()
            raise RuntimeError("reading was interrupted")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request)
            self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        """The next line of the process; an error when it has died or took too long."""
        timer, begin = threading.Timer(self.page_seconds, self.process.kill), time.monotonic()
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        status = self.process.wait()
        self.close()
        if time.monotonic() - begin >= self.page_seconds:
            return {"error": f"took longer than {self.page_seconds:g} seconds"}
        died = f"signal {-status}" if status < 0 else f"exit status {status}"
        return {"error": f"the process that read it died ({died})"}

    def kill(self) -> None:
        """Ends the process, at work or not, for good."""
        self.is_killed = True
        if process := self.process:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Closes the pipes of a process that has ended."""
        if self.process is not None:
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process = None
