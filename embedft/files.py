"""Files that are whole or not there: atomic writes, JSON and JSONL with errors that name the line, hashes.

A reader never sees half a file: everything is written beside its place and renamed into it. Appending is for logs
only, one JSON object a line; `resume_jsonl` takes off the half line that a killed process may have left, and `locked`
keeps a second process from writing to the same place.

    with atomic_write("metrics.json") as file:
        file.write("{}")
"""

import contextlib
import gzip
import hashlib
import json
import os
import secrets
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends; on an error nothing changes.

    Args:
        path: the file to make or replace; its folder is made when missing.
        mode: "w" (UTF-8 text, newlines as given) or "wb".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises `ValueError` unless `path`, which need not be there, can be a folder with new files. Changes nothing."""
    path = Path(path)
    parent = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written to ({error.strerror}: {parent})") from None


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically. NaN and infinity are refused (`ValueError`)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_lines(path: str | Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their ends; only a line feed ends a line, a byte order mark is dropped.

    A file that ends in .gz is decompressed. Memory does not grow with the file.

    Raises:
        ValueError: naming the line of a bad byte; a damaged .gz file, or a Git LFS pointer instead of a file.
    """
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        for number, raw in enumerate(_lines_of(file, path), start=1):
            if number == 1 and raw.startswith(b"version https://git-lfs.github.com/spec/"):
                raise ValueError(f"{path}: is a Git LFS pointer, not the data; download it with `git lfs pull`")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                # error.object: what the codec saw, which is `raw` without the byte order mark.
                byte = error.object[error.start]
                raise ValueError(f"{path} line {number}: invalid UTF-8 (byte {byte:#04x})") from None
            yield line


def _lines_of(file: IO[bytes], path: str | Path) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (a byte order mark is dropped). Raises `ValueError` naming the line of a bad byte."""
    return "".join(read_lines(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; a key that stands twice is refused, where `json` would silently keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {counts.most_common(1)[0][0]!r} stands twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse_json(text: str, path: str | Path, line: int | None = None) -> Any:
    """The value of a JSON text: a whole file, or its line `line`."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno if line is None else line} column {error.colno}"
        raise ValueError(f"{where}: invalid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a doubled key, a number beyond Python's limit, too deep a nesting
        where = f"{path}" if line is None else f"{path} line {line}"
        raise ValueError(f"{where}: invalid JSON ({error})") from None


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises `ValueError` that names the file and, as far as known, line and column."""
    return _parse_json(read_text(path), path)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` as `read_json` does, and when it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) of a JSON-lines file; blank lines are passed over.

    Reads line by line, so memory does not grow with the file. Raises `ValueError` that names file and line.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, _parse_json(line.rstrip("\r\n"), path, number)


def append_jsonl(path: str | Path, record: dict) -> None:
    """Appends one JSON object as a line. One write call, so a killed process leaves at most its last line short."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode("utf-8"))


def resume_jsonl(path: str | Path, *, repair: bool = True) -> Iterator[dict]:
    """Yields the objects of an append-only log; what a killed process left of its last line is passed over.

    A last line that lacks only its line feed counts. A missing file is an empty log.

    Args:
        repair: make the file ready for more, before anything is yielded: the half line is cut off, the line feed added.

    Raises:
        ValueError: a line is whole and no JSON object, naming it, or the last one is not the beginning of one.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb+" if repair else "rb") as file:
        end = _end_of_last_line(file)
        file.seek(end)
        tail = file.read()
        if tail.strip() and not tail.startswith(b"{"):
            raise ValueError(f"{path}: its last line does not begin as a JSON object, so it is left alone")
        if _is_json(tail):
            end += len(tail)
            if repair:
                file.write(b"\n")
        elif repair:
            file.truncate(end)
    place = 0
    for number, line in enumerate(read_lines(path) if end else (), start=1):
        if line.strip():
            record = _parse_json(line.rstrip("\r\n"), path, number)
            if not isinstance(record, dict):
                raise ValueError(f"{path} line {number}: holds a {type(record).__name__}, expected an object")
            yield record
        place += len(line.encode())
        if place >= end:  # before the half line is read
            return


def _is_json(tail: bytes) -> bool:
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        return False
    return True


def _end_of_last_line(file: IO[bytes]) -> int:
    """The place behind the last line feed of a file, read from its end; 0 when there is none."""
    place = file.seek(0, os.SEEK_END)
    while place:
        start = max(place - BLOCK_BYTES, 0)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0


@contextlib.contextmanager
def locked(path: str | Path, *, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Holds the lock file `path` while the block runs, so that one process writes at a time.

    The system frees the lock when the process ends, however it ends; the empty file stays.

    Args:
        wait: None: do not. Else, when the lock is held, it is told by whom ("process 17"), once, before the waiting.

    Raises:
        ValueError: another process, or another block of this one, holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        try:
            _lock(file.fileno())
        except OSError:
            if wait is None:
                raise ValueError(f"{path.parent}: another process is writing there (it holds {path.name})") from None
            file.seek(0)
            holder = file.read().decode(errors="replace")
            wait(f"process {holder}" if holder else "another process")
            _lock(file.fileno(), wait=True)
        if wait is None:
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(descriptor: int, *, wait: bool = False) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
