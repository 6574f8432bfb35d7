"""Extracts the text of every page of PDF files, in subprocesses that run pdf_page.py.

A damaged page that hangs, exhausts the memory or crashes the interpreter loses only that page.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..progress import progress_bar

BLOCK_PAGES = 16  # a process reads these before taking the next block; starting it takes as long
SCRIPT = [sys.executable, str(Path(__file__).with_name("pdf_page.py"))]


@dataclass
class PdfText:
    """The text of one file."""

    pages: list[str] = field(default_factory=list)  # in order, "" for a page without text
    failures: dict[int, str] = field(default_factory=dict)  # {page number from 1: what is wrong with it}
    reason: str | None = None  # why the whole file cannot be read
    plain: set[int] = field(default_factory=set)  # pages read without layout (see pdf_page.py)


def read_pdfs(paths: Sequence[str | Path], *, processes: int | None = None, page_seconds=30.0) -> list[PdfText]:
    """Reads PDF files, several pages in parallel, into one `PdfText` each, which records errors instead of raising."""
    processes = (os.cpu_count() or 1) if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes is {processes}, expected at least 1")
    texts = [PdfText() for _ in paths]
    readers = [_Reader(page_seconds) for _ in range(processes)]
    idle, pool = list(readers), ThreadPoolExecutor(processes)
    bar = progress_bar(None, "reading PDF files", unit="page")

    def read(row: int, start: int) -> None:
        reader, text, path = idle.pop(), texts[row], os.fspath(paths[row])
        if start == 0:
            reply = reader.ask(path, None)
            text.pages, text.reason = [""] * reply.get("num_pages", 0), reply.get("error")
        for i in range(start, min(start + BLOCK_PAGES, len(text.pages))):
            reply = reader.ask(path, i)
            text.pages[i] = reply.get("text", "")
            if "error" in reply:
                text.failures[i + 1] = reply["error"]
            if "plain" in reply:
                text.plain.add(i + 1)
            bar.update()
        idle.append(reader)

    try:
        list(pool.map(read, range(len(paths)), [0] * len(paths)))
        bar.total = sum(len(text.pages) for text in texts)  # known once the first block of each file is read
        rest = [(row, i) for row, text in enumerate(texts) for i in range(BLOCK_PAGES, len(text.pages), BLOCK_PAGES)]
        list(pool.map(lambda block: read(*block), rest))
    finally:  # after an interrupt, threads are still waiting for their processes
        for reader in readers:
            reader.kill()
        pool.shutdown(cancel_futures=True)
        for reader in readers:
            reader.close()
        bar.close()
    return texts


class _Reader:
    """A process that reads pages, started on first use and restarted after it dies."""

    def __init__(self, page_seconds: float) -> None:
        self.page_seconds, self.process, self.is_killed = page_seconds, None, False

    def ask(self, path: str, i: int | None) -> dict[str, Any]:
        """The reply for page `i` (from 0) or, for None, the page count; an error if the process dies or times out."""
        if self.process is None:  # discards pypdf's log; replies report problems
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(SCRIPT, **pipes, encoding="ascii")
        if self.is_killed:
            self.process.kill()
            raise RuntimeError("reading was interrupted")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([path, i]) + "\n")
            self.process.stdin.flush()
        timer, begin = threading.Timer(self.page_seconds, self.process.kill), time.monotonic()
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        status = self.close()
        if time.monotonic() - begin >= self.page_seconds:
            return {"error": f"took longer than {self.page_seconds:g} seconds"}
        died = f"signal {-status}" if status < 0 else f"exit status {status}"
        return {"error": f"the process reading it died ({died})"}

    def kill(self) -> None:
        """Ends the process for good, even while it is reading."""
        self.is_killed = True
        if process := self.process:
            process.kill()

    def close(self) -> int | None:
        """Closes the pipes, waits for the process to exit and returns its exit status."""
        process, self.process = self.process, None
        if process:
            process.communicate()
        return process and process.returncode
