"""Atomic writes, JSON and JSONL with errors that name the line, locks and hashes.

Readers never see a partial file: each is written to a temporary file and renamed. Only logs are appended to, one JSON
object per line; `resume_jsonl` removes the partial line that a killed process may have left. If a write fails, the
`OSError` names the file, existing files stay unchanged, and no partial files remain. Temporary files of a killed
process are removed by the next write to the same place.
"""

import contextlib
import fcntl
import glob
import gzip
import hashlib
import io
import json
import os
import re
import reprlib
import secrets
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
JSONL = (".jsonl", ".jsonl.gz")
REPLACING = ".replacing"  # in a folder while several of its files are replaced


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Makes the `OSError` of a failed read or write name `path`; Python and safetensors omit it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from None  # a library's own, not the system's
        if error.filename is not None and not re.search(r"\.[0-9a-f]{8}\.tmp", str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends; an error changes nothing.
    `mode` is "w" (UTF-8 text, newlines as given) or "wb". A .gz is compressed. A missing folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with named_errors(path), temporary_path(path.parent, f".{path.name}.", Path.touch) as temporary:
        is_gz = path.suffix == ".gz"
        with open(temporary, "wb" if is_gz else mode, **({} if is_gz else text)) as file:
            with _gzipped(file, text) if is_gz else contextlib.nullcontext(file) as writable:
                yield writable
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def _gzipped(file: IO[bytes], text: dict[str, str]) -> Iterator[IO]:
    """A file whose contents are compressed into `file`: as text with these options, if any."""
    # Without a name and a time, so that equal contents give equal bytes.
    with contextlib.ExitStack() as stack:
        packed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(packed, **text)) if text else packed


@contextlib.contextmanager
def replace_files(folder: str | Path, *, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yields an empty folder whose files move into `folder` when the block ends; until then, or if the block raises,
    nothing in `folder` changes. Finally removes the `stale` paths in it that were not written, and emptied folders.
    If the process is killed between two moves, `check_whole` refuses the folder until the next call."""
    new = folder = Path(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_path(folder, ".", Path.mkdir) as new:
            yield new
            written = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
            if len(written) + len(stale) > 1:
                (folder / REPLACING).touch()
            for path in written:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / path, folder / path)
        for path in (Path(name) for name in stale if Path(name) not in written):
            (folder / path).unlink(missing_ok=True)
            if path.parent != Path() and (folder / path.parent).is_dir() and not any((folder / path.parent).iterdir()):
                (folder / path.parent).rmdir()
        (folder / REPLACING).unlink(missing_ok=True)
    except OSError as error:
        if error.filename and Path(error.filename).is_relative_to(new):
            error.filename = str(folder / Path(error.filename).relative_to(new))
        raise
    finally:
        if created and not any(folder.iterdir()):
            folder.rmdir()


def check_whole(*folders: Path) -> None:
    """Raises `ValueError` for a folder of which `replace_files` replaced some files, but not yet all."""
    for folder in folders:
        if (folder / REPLACING).exists():
            why = "the command that replaces them was killed, or is still running"
            raise ValueError(f"{folder}: has some new files and some old ones: {why}; run it again")


@contextlib.contextmanager
def temporary_path(folder: Path, prefix: str, make: Callable[[Path], object]) -> Iterator[Path]:
    """Makes a file or folder PREFIX12345678.tmp, locked while the block runs and then removed if it still exists.
    First removes those that killed processes left, recognizable because nobody locks them."""
    for left in folder.glob(f"{glob.escape(prefix)}{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor := os.open(left, os.O_RDONLY))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(left)
    with contextlib.ExitStack() as stack:
        while True:
            new = folder / f"{prefix}{secrets.token_hex(4)}.tmp"
            make(new)
            with contextlib.suppress(FileNotFoundError):  # another process may remove it before it is locked
                stack.callback(os.close, descriptor := os.open(new, os.O_RDONLY))
                with contextlib.suppress(OSError):  # some file systems have no locks: nothing is removed there
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if new.exists():
                    break
        stack.callback(remove, new)
        yield new


def remove(*paths: Path) -> None:
    """Removes files, and folders with their contents; ignores paths that do not exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_writable(path: str | Path, *, file: bool = False) -> None:
    """Raises `ValueError` unless files can be created in a folder `path` or, if `file`, at `path`. Changes nothing."""
    path = Path(path)
    if file and path.is_dir():
        raise ValueError(f"{path}: is a folder, expected the name of a file")
    places = path.absolute().parents if file else (path, *path.absolute().parents)
    parent = next(place for place in places if place.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written to ({error.strerror}: {parent})") from None


def _json(path: str | Path, value: Any, **layout: Any) -> str:
    """`value` as JSON for the file `path`. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **layout) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: cannot be written as JSON ({error})") from None


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically. Raises `ValueError` for NaN and infinity."""
    text = _json(path, value, indent=2)
    with atomic_write(path, "wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # file names may have bytes that are not UTF-8


def read_lines(path: str | Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, or a .gz of one, with their newlines; only a line feed ends a line.
    Drops a byte order mark. Raises `ValueError` for an invalid byte, with its line, a bad .gz, or an LFS pointer."""
    with named_errors(path), open(path, "rb") as raw:
        is_gz = str(path).endswith(".gz") and not raw.peek(len(LFS_POINTER)).startswith(LFS_POINTER)
        with gzip.open(raw) if is_gz else contextlib.nullcontext(raw) as file:
            yield from _decoded(file, path)


def _decoded(lines: Iterable[bytes], path: str | Path) -> Iterator[str]:
    try:
        for number, raw in enumerate(lines, start=1):
            if number == 1 and raw.startswith(LFS_POINTER):
                raise ValueError(f"{path}: is a Git LFS pointer, not the data; download it with `git lfs pull`")
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]  # of the codec's input: `raw` without the byte order mark
        raise ValueError(f"{path} line {number}: invalid UTF-8 (byte {byte:#04x})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises `ValueError` naming the line of an invalid byte."""
    return "".join(read_lines(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Rejects repeated keys, of which `json` would silently keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return value


def _parse_json(text: str, path: str | Path, line: int | None = None) -> Any:
    """The value of a JSON text: a whole file, or its line `line`."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # besides bad syntax: a repeated key, too many digits, too deep
        where, what = f"{path}" if line is None else f"{path} line {line}", error
        if isinstance(error, json.JSONDecodeError):
            where, what = f"{path} line {line or error.lineno} column {error.colno}", error.msg
        raise ValueError(f"{where}: invalid JSON ({what})") from None


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises `ValueError` naming the file and, when known, line and column."""
    return _parse_json(read_text(path), path)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` as `read_json` does, and for any other value."""
    return check_object(read_json(path), str(path))


def check_object(value: Any, where: str) -> dict[str, Any]:
    """The value, if it is a JSON object; else raises `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {reprlib.repr(value)}")
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) of a JSON Lines file, without blank lines; errors name file and line."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, _parse_json(line.rstrip("\r\n"), path, number)


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """Writes one JSON object per line, atomically. NaN and infinity are refused (`ValueError`)."""
    with atomic_write(path) as file:
        file.writelines(_json(path, record) for record in records)


def append_jsonl(path: str | Path, record: dict) -> None:
    """Appends one JSON object as a line. A killed process leaves at most a partial last line, an error nothing."""
    line = _json(path, record).encode("utf-8")
    with named_errors(path), open(path, "ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)
            while written < len(line):  # a nearly full disk takes part of it, then nothing
                written += file.write(line[written:])
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


def resume_jsonl(path: str | Path, *, repair: bool = True) -> Iterator[dict]:
    """Yields the objects of an append-only log, without the partial last line that a killed process may have left.
    A last line that lacks only its line feed counts. A missing file is an empty log. `repair` first makes the file
    ready for appending: drops the partial line or adds the line feed. Raises `ValueError` for other invalid lines."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    if tail.strip() and not tail.startswith(b"{"):
        raise ValueError(f"{path}: the last line is not the beginning of a JSON object, so it is left alone")
    try:
        json.loads(tail)
        end, tail = len(data), b"\n"
    except (ValueError, RecursionError):
        tail = b""
    if repair and data[end:] != tail:
        with named_errors(path), open(path, "rb+") as file:
            file.truncate(end)
            file.seek(end)
            file.write(tail)
    for number, line in enumerate(_decoded(io.BytesIO(data[:end]), path), start=1):
        if line.strip():
            yield check_object(_parse_json(line.rstrip("\r\n"), path, number), f"{path} line {number}")


@contextlib.contextmanager
def locked(path: str | Path, *, wait: Callable[[str], object] | None = None) -> Iterator[int]:
    """Holds the lock file `path` while the block runs, so that one process writes at a time; yields its descriptor.
    The system releases the lock however the process ends, and any process that inherited the descriptor; the empty file
    stays. If another process, or another block of this one, holds it: raises `ValueError`, or calls
    `wait("process 17")` once and waits for the lock."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if wait is None:
                raise ValueError(f"{path.parent}: another process is writing there (it holds {path.name})") from None
            file.seek(0)
            holder = file.read().decode(errors="replace")
            wait(f"process {holder}" if holder else "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        with named_errors(path):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        try:
            yield file.fileno()
        finally:
            file.truncate(0)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with named_errors(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
