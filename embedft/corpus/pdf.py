"""PDF files to the text of every page, with pypdf, in processes of their own.

pypdf's layout mode is used: it keeps words whole where the plain mode breaks them, keeps line ends, and shows
indentation and the gaps between columns as blanks. What becomes of that text is for documents.py. Not here: OCR.

    for text in read_pdfs(["report.pdf"]):
        print(text.reason or text.pages[0])

The reading is done by this same file run as a script: a damaged file that eats the memory or brings the interpreter
down ends one such process and costs one page. So the top of this file imports the standard library alone; torch, which
comes with the rest of embedft, is not loaded in them.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

# Pages that one process reads at a time: about half a second's work, twice what it takes to start a process.
BLOCK_PAGES = 16
# Baselines that are nearer than this share of the font's height are one line.
LINE_SHARE = 0.7
# What pypdf raises on damaged files beside its own errors: whatever its code runs into.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
SCRIPT = [sys.executable, os.path.abspath(__file__)]


class PdfText(NamedTuple):
    """The text of a file: `pages` in order, "" where there is none; `failures` says why, by page number from 1.

    `reason` says why the whole file cannot be read; it then has no pages.
    """

    pages: list[str]
    failures: dict[int, str]
    reason: str | None


class _Block(NamedTuple):
    """What came back of the pages `start` to `stop`. `reason`: why there is no more of what was asked for."""

    file: int
    start: int
    stop: int  # may lie beyond the last page
    num_pages: int | None  # of the file; None when it could not be opened
    replies: list[dict[str, str]]  # {"text": ...} or {"error": ...}, a page each
    reason: str | None


def read_pdfs(paths: Sequence[str | Path], *, processes: int | None = None) -> list[PdfText]:
    """Reads PDF files, several pages at a time; never raises for what is wrong with a file.

    Encrypted files that open with an empty password are read.

    Args:
        paths: existing files.
        processes: at most so many at a time; None: one for each CPU core. Fewer are started for few pages.

    Returns:
        One `PdfText` a path, in order.

    Raises:
        ValueError: `processes` is less than 1.
    """
    # Not at the top: the processes that read run this file without its package.
    from ..progress import progress_bar

    processes = (os.cpu_count() or 1) if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes is {processes}, expected at least 1")
    texts = [PdfText([], {}, None) for _ in paths]
    pending: set[Future[_Block]] = set()
    with contextlib.closing(_Readers()) as readers, ThreadPoolExecutor(processes) as pool:
        bar = progress_bar(None, "reading PDF files", unit="page")
        try:
            pending |= {pool.submit(readers.read, i, str(path), 0, BLOCK_PAGES) for i, path in enumerate(paths)}
            bar.total = 0
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for block in (future.result() for future in done):
                    starts, num_read = _take(block, texts)
                    bar.total += block.num_pages if block.num_pages and block.start == 0 else 0
                    bar.update(num_read)
                    path = str(paths[block.file])
                    pending |= {pool.submit(readers.read, block.file, path, *span) for span in starts}
        finally:
            # After an interrupt threads still wait for their processes, and others for their turn.
            pool.shutdown(wait=False, cancel_futures=True)
            readers.kill()
            bar.close()
    return texts


def _take(block: _Block, texts: list[PdfText]) -> tuple[list[tuple[int, int]], int]:
    """Puts a block where it belongs; what is to be read next, as (start, stop), and how many pages are done."""
    text, number = texts[block.file], block.start
    if block.num_pages is None and block.start == 0:
        texts[block.file] = text._replace(reason=block.reason)
        return [], 0
    if block.start == 0:
        text.pages.extend([""] * block.num_pages)
    for reply in block.replies:
        number += 1
        text.pages[number - 1] = reply.get("text", "")
        if "error" in reply:
            text.failures[number] = reply["error"]
    stop = min(len(text.pages), block.stop)
    if block.reason is not None:
        number += 1
        text.failures[number] = block.reason
    again = [(number, stop)] if number < stop else []
    if block.start == 0:
        again += [(start, start + BLOCK_PAGES) for start in range(BLOCK_PAGES, len(text.pages), BLOCK_PAGES)]
    return again, number - block.start


class _Readers:
    """The processes that read. One is started when a block finds none idle, and again after one has died."""

    def __init__(self) -> None:
        self.idle: list[subprocess.Popen] = []
        self.all: list[subprocess.Popen] = []
        self.closed = False

    def read(self, file: int, path: str, start: int, stop: int) -> _Block:
        """Pages `start` to `stop` of a file. Called in threads; appending to and popping from a list are atomic."""
        reader = self.idle.pop() if self.idle else self._start()
        replies: list[dict[str, str]] = []
        with contextlib.suppress(BrokenPipeError):
            reader.stdin.write(json.dumps([path, start, stop]) + "\n")
            reader.stdin.flush()
        head = self._reply(reader)
        if head is None or "error" in head:
            reason = self._end(reader) if head is None else head["error"]
            if head is not None:
                self.idle.append(reader)
            return _Block(file, start, stop, None, replies, reason)
        for _ in range(start, min(stop, head["num_pages"])):
            reply = self._reply(reader)
            if reply is None:
                return _Block(file, start, stop, head["num_pages"], replies, self._end(reader))
            replies.append(reply)
        self.idle.append(reader)
        return _Block(file, start, stop, head["num_pages"], replies, None)

    def _start(self) -> subprocess.Popen:
        # What pypdf says on the way goes nowhere: a page that failed is reported by its reply.
        reader = subprocess.Popen(
            SCRIPT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii"
        )
        self.all.append(reader)
        if self.closed:  # started while the others were killed
            reader.kill()
        return reader

    def _reply(self, reader: subprocess.Popen) -> dict[str, Any] | None:
        """One line of a process; None when it has died."""
        line = reader.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def _end(self, reader: subprocess.Popen) -> str:
        status = reader.wait()
        return f"the process that read it died ({f'signal {-status}' if status < 0 else f'exit status {status}'})"

    def kill(self) -> None:
        """Ends them all, at work or not."""
        self.closed = True
        for reader in self.all:
            reader.kill()
            reader.wait()
            with contextlib.suppress(BrokenPipeError):
                reader.stdin.close()

    def close(self) -> None:
        """Closes what their threads read from, when those are done."""
        for reader in self.all:
            reader.stdout.close()


def _open(path: str) -> Any:
    """The file as a pypdf reader. Raises `ValueError` with the reason in one line."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if not head:
        raise ValueError("is empty (0 bytes)")
    if b"%PDF-" not in head:
        raise ValueError(f"is not a PDF file (it begins with {head[:12]!r})")
    try:
        reader = PdfReader(path)
        num_pages = len(reader.pages)
        if num_pages:
            reader.pages[0].get_contents()  # where an encryption that cannot be undone shows
    except FileNotDecryptedError:
        raise ValueError("is encrypted: it opens with a password only") from None
    except DependencyError:
        raise ValueError("is encrypted with AES: reading it needs the package `cryptography`") from None
    except (PyPdfError, *FAILURES) as error:
        raise ValueError(f"is damaged ({_one_line(error)})") from None
    if num_pages == 0:
        raise ValueError("has no pages")
    return reader


def _page_text(page: Any) -> str:
    """The text of a page as it is laid out; in pypdf's plain mode where the layout mode loses some or fails."""
    from pypdf.errors import PyPdfError

    try:
        text = page.extract_text(
            extraction_mode="layout", layout_mode_space_vertically=True, layout_mode_strip_rotated=False
        )
        # The layout mode passes over forms, which are drawn by reference.
        if text.strip() and not _has_forms(page):
            return text
    except (PyPdfError, *FAILURES):
        return page.extract_text()
    plain = page.extract_text()
    return plain if len("".join(plain.split())) > len("".join(text.split())) else text


def _has_forms(page: Any) -> bool:
    objects = page
    for key in ("/Resources", "/XObject"):
        if key not in objects:
            return False
        objects = objects[key]
    return any(objects[name].get("/Subtype") == "/Form" for name in objects)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _keep_lines_apart() -> None:
    """Makes pypdf, in this process, put less on one line of the layout.

    It takes two baselines for one line when they are nearer than the height of the font, as those of text set solid
    are: "9.5 Consultant agrees that, if" and the line below it came out as one, in the wrong order (pypdf 6.0 to 7.1,
    page 224 of Lyft's 10-K of 2021). 0.7 of the height parts such lines and leaves footnote marks in theirs.
    """
    from pypdf._text_extraction import _layout_mode as layout

    merge_lines = layout.y_coordinate_groups

    def merge_nearer_lines(groups: list[dict], *more: Any) -> dict:
        heights = [group["font_height"] for group in groups]
        for group in groups:
            group["font_height"] *= LINE_SHARE
        try:
            return merge_lines(groups, *more)
        finally:
            for group, height in zip(groups, heights, strict=True):
                group["font_height"] = height

    layout.y_coordinate_groups = merge_nearer_lines


def _serve() -> None:
    """Reads requests, [path, start, stop] a line, until there are no more; replies a line for file and page."""
    from pypdf.errors import PyPdfError

    # Not a public place of pypdf's; a version without it reads as it does.
    with contextlib.suppress(ImportError, AttributeError):
        _keep_lines_apart()
    path, reader = None, None
    for line in sys.stdin:
        wanted, start, stop = json.loads(line)
        if wanted != path:
            path, reader = None, None  # frees the last file's memory first
            try:
                reader = _open(wanted)
            except ValueError as error:
                _say({"error": str(error)})
                continue
            path = wanted
        _say({"num_pages": len(reader.pages)})
        for i in range(start, min(stop, len(reader.pages))):
            try:
                _say({"text": _page_text(reader.pages[i])})
            except (PyPdfError, *FAILURES) as error:
                _say({"error": f"cannot be read ({_one_line(error)})"})


def _say(reply: dict[str, Any]) -> None:
    """One line of JSON, ASCII alone: a page may hold half of a surrogate pair."""
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # This file's folder, which Python puts first: its modules must not pass for packages that pypdf imports.
    del sys.path[0]
    _serve()
