"""files.py: a file is complete or absent, and errors name the file and line that cannot be read."""

import errno
import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from naming import naming

from embedft import files
from embedft.files import (
    append_jsonl,
    atomic_write,
    check_whole,
    check_writable,
    locked,
    named_errors,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    replace_files,
    resume_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
)


def test_atomic_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("first\r\n", "ä\n"):
        with atomic_write(path) as file:
            file.write(text)
        assert path.read_bytes() == text.encode()  # UTF-8, line ends as given
    with atomic_write(path, "wb") as file:
        file.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def lines():
        yield "half of it\n"
        raise error

    path = tmp_path / "file.txt"
    path.write_text("old")
    for target in (path, tmp_path / "new.txt", tmp_path / "new.txt.gz"):
        with pytest.raises(error), atomic_write(target) as file:
            file.writelines(lines())
    assert os.listdir(tmp_path) == ["file.txt"]
    assert path.read_text() == "old"


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_an_error_of_the_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("full")

    write_json(tmp_path / "file.json", {"old": 1})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, full)
            with pytest.raises(OSError, match=naming(tmp_path / "file.json", "full")):
                write_json(tmp_path / "file.json", {"new": 1})
        assert os.listdir(tmp_path) == ["file.json"]
        assert read_json(tmp_path / "file.json") == {"old": 1}


def test_json_round_trip(tmp_path):
    value = {"a": [1, 0.1, None, True], "ü": {"nested": "line\nbreak"}, "file": os.fsdecode(b"r\xe9sum\xe9.jsonl")}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert "ü" in (tmp_path / "file.json").read_text(encoding="utf-8")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=naming(tmp_path / "file.json", "JSON")):
            write_json(tmp_path / "file.json", {"a": bad})
    assert read_json(tmp_path / "file.json") == value


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "file.jsonl"
    records = [{"text": "two\u2028lines\r\n"}, {"ü": 1}, {}]
    for record in records:
        append_jsonl(path, record)
    assert list(read_jsonl(path)) == list(enumerate(records, start=1))
    for write, value in ((append_jsonl, {"loss": float("nan")}), (write_jsonl, [{}, {"loss": float("nan")}])):
        with pytest.raises(ValueError, match=naming(path, "JSON")):
            write(path, value)
    assert len(path.read_bytes().splitlines()) == 3


def test_jsonl_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.jsonl"
    write_jsonl(path, ({"text": text} for text in ("ä\n", "b")))
    assert path.read_text(encoding="utf-8") == '{"text": "ä\\n"}\n{"text": "b"}\n'
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 1}, {"b": {1}}])
    assert [record for _, record in read_jsonl(path)] == [{"text": "ä\n"}, {"text": "b"}]


def test_jsonl_counts_the_lines_it_passes_over(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'\xef\xbb\xbf1\r\n\n  \n{"a": "b"}')
    assert list(read_jsonl(path)) == [(1, 1), (4, {"a": "b"})]


def test_lines_end_with_a_line_feed_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes("\ufeffa\u2028b\x0b\r\n\n\ufeffc\rd".encode())
    assert list(read_lines(path)) == ["a\u2028b\x0b\r\n", "\n", "\ufeffc\rd"]  # a mark is one at the start only
    assert read_text(path) == "a\u2028b\x0b\r\n\n\ufeffc\rd"


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b'{"a": 1,\n "b": }', (2, 7, "JSON")),
        (b"", (1, 1, "JSON")),
        (b'{"a": 1', (1, 8, "JSON")),
        (b'"\n\xff"', (2, "UTF-8", "0xff")),
        (b'\xef\xbb\xbf"\xe9"', (1, "UTF-8", "0xe9")),
        (b'{"a": 1, "b": 2, "a": 3}', ("JSON", "'a'", "twice")),
        (b"[" * 100_000, ("JSON",)),
        (b"9" * 10_000, ("JSON",)),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, facts):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        read_json(path)


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "file.jsonl"
    for bad, *facts in (
        (b"{", 2, "JSON"),
        (b'{"a": 1, "a": 1}', "JSON", "'a'", "twice"),
        (b"\x80", "UTF-8", "0x80"),
    ):
        path.write_bytes(b"{}\n\n" + bad + b"\n{}\n")
        lines = read_jsonl(path)
        assert next(lines) == (1, {})  # nothing is read before it is asked for
        with pytest.raises(ValueError, match=naming(path, 3, *facts)):
            next(lines)


def test_sha256(tmp_path):
    path = tmp_path / "file.bin"
    for content in (b"", b"abc", bytes(range(256)) * 5_000):
        path.write_bytes(content)
        assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    # FIPS 180-2, appendix B.1.
    path.write_bytes(b"abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")


def test_check_writable(tmp_path):
    """Works as root too, for whom no permission is missing."""
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below" / "it", "/proc/embedft"):
        with pytest.raises(ValueError, match=naming(path, "written")):
            check_writable(path)
    check_writable(file, file=True)
    check_writable(tmp_path / "new" / "file.npy", file=True)
    for path, fault in ((tmp_path, "folder"), (file / "below.npy", "written")):
        with pytest.raises(ValueError, match=naming(path, fault)):
            check_writable(path, file=True)
    assert json.dumps(os.listdir(tmp_path)) == '["file"]'


# Full disks: /dev/full takes no byte.


def full_disk(monkeypatch):
    """Every flush of a temporary file fails as on a full disk."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_names_the_file_and_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=naming(errno.ENOSPC)) as caught:
        write_json(tmp_path / "a.json", {})
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(OSError, match=naming(errno.ENOSPC)) as caught, replace_files(tmp_path, stale=["a.json"]) as new:
        write_json(new / "b" / "c.json", {})
    assert caught.value.filename == str(tmp_path / "b" / "c.json")
    with pytest.raises(OSError, match=naming(errno.ENOSPC)), replace_files(tmp_path / "made") as new:
        write_json(new / "a.json", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize("read", [files.read_text, files.sha256_file])
def test_a_disk_that_cannot_be_read_names_the_file(read):
    """An error without a name is taken for one of standard output."""
    with pytest.raises(OSError, match=naming(errno.EIO)) as caught:
        read("/proc/self/mem")  # nothing is mapped at 0
    assert caught.value.filename == "/proc/self/mem"


def test_a_log_on_a_full_disk_keeps_no_half_line(tmp_path):
    with pytest.raises(OSError, match=naming(errno.ENOSPC)) as caught:
        append_jsonl("/dev/full", {})
    assert caught.value.filename == "/dev/full"
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"a": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        with pytest.raises(OSError, match=naming(errno.EFBIG, path)):
            append_jsonl(path, {"b": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == '{"a": 1}\n'


def test_an_error_without_a_name_gets_one():
    """safetensors raises an exception of its own, with the number of the system's error in its text."""
    with pytest.raises(OSError, match=naming(errno.ENOSPC)) as caught, named_errors("model.safetensors"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.filename == "model.safetensors"
    with pytest.raises(RuntimeError, match=naming("another")), named_errors("model.safetensors"):
        raise RuntimeError("another")
    with pytest.raises(FileNotFoundError) as caught, named_errors("model.safetensors"):
        read_json("missing")
    assert caught.value.filename == "missing"
    with pytest.raises(OSError, match=naming("x.npy", "lost")), named_errors("x.npy"):
        raise OSError("a connection was lost")
    for temporary in (".step.0123abcd.tmp/model.safetensors", ".a.json.0123abcd.tmp"):
        with pytest.raises(OSError, match=naming(errno.ENOSPC)) as caught, named_errors("step-000001"):
            raise OSError(errno.ENOSPC, "full", temporary)
        assert caught.value.filename == "step-000001"


def test_files_are_replaced_together(tmp_path):
    for name in ("a", "b/old", "c/old", "c/kept"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with replace_files(tmp_path, stale=["a", "b/old", "c/old", "d/missing"]) as new:
        (new / "a").write_text("new")
        (new / "e").mkdir()
        (new / "e" / "f").write_text("new")
        assert (tmp_path / "a").read_text() == "a"
        assert (tmp_path / "b" / "old").exists()
    found = {str(path.relative_to(tmp_path)): path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    assert found == {"a": "new", "c": False, "c/kept": "c/kept", "e": False, "e/f": "new"}


def test_a_folder_of_which_some_files_are_replaced_is_refused(tmp_path, monkeypatch):
    def replace_both(text: str):
        with replace_files(tmp_path) as new:
            for name in "ab":
                (new / name).write_text(text)

    replace_both("old")
    check_whole(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing(os.replace, at=2))
        with pytest.raises(KeyboardInterrupt):
            replace_both("new")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new", "old"]
    with pytest.raises(ValueError, match=naming(tmp_path, "new", "old")):
        check_whole(tmp_path)
    replace_both("newer")
    check_whole(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def killing(function, *, at: int):
    """The function, interrupted at one of its calls."""
    calls = itertools.count(1)

    def call(*arguments):
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def test_what_killed_processes_left_goes_with_the_next_write_to_the_place(tmp_path):
    program = """if True:
        import os, sys
        from pathlib import Path
        from embedft.files import atomic_write, replace_files
        with atomic_write(Path(sys.argv[1]) / "a[1].txt"), replace_files(sys.argv[1]) as new:
            (new / "b").write_text("b")
            if len(sys.argv) == 2:
                os.kill(os.getpid(), 9)
            print("begun", flush=True)
            sys.stdin.read()
    """
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    dead = set(tmp_path.iterdir())
    assert sorted(len(path.name) for path in dead) == [len(".12345678.tmp"), len(".a[1].txt.12345678.tmp")]
    others = {tmp_path / ".b.txt.12345678.tmp", tmp_path / ".a[1].txt.tmp", tmp_path / ".mine.tmp"}
    for path in others:
        path.touch()
    command = [sys.executable, "-c", program, str(tmp_path), "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        living.stdout.readline()
        assert not dead & set(tmp_path.iterdir())  # its own are there instead
        with atomic_write(tmp_path / "a[1].txt"), replace_files(tmp_path) as new:
            (new / "c").touch()
        living.stdin.close()
        assert living.wait() == 0
    assert set(tmp_path.iterdir()) == others | {tmp_path / name for name in ("a[1].txt", "b", "c")}


@pytest.mark.parametrize("when", ["before it is open", "before it is locked"])
def test_a_temporary_file_that_another_process_removes_is_made_again(tmp_path, monkeypatch, when):
    made, flock = [], files.fcntl.flock

    def make(path):
        path.touch()
        made.append(path)
        if len(made) < 3 and when == "before it is open":
            path.unlink()

    def lock(descriptor, operation):
        flock(descriptor, operation)
        if len(made) < 3 and when == "before it is locked":
            made[-1].unlink()

    monkeypatch.setattr(files.fcntl, "flock", lock)
    with files.temporary_path(tmp_path, ".a.", make) as path:
        assert len(made) == 3
        assert list(tmp_path.iterdir()) == [path] == made[2:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (b'{"a": 1}\n{"b": 2}\n', b'{"a": 1}\n{"b": 2}\n'),
        (b'{"a": 1}\n{"b": 2', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n'),  # whole: only the line feed was lost
        (b'{"b": 2}', b'{"b": 2}\n'),
        (b'{"a": 1}\n{"b": "\xc3', b'{"a": 1}\n'),
        (b'{"a', b""),
        (b"", b""),
    ],
)
def test_a_log_is_resumed_after_its_last_whole_line(tmp_path, found, kept):
    path = tmp_path / "log.jsonl"
    path.write_bytes(found)
    assert list(resume_jsonl(path, repair=False)) == [json.loads(line) for line in kept.splitlines()]
    assert path.read_bytes() == found
    assert list(resume_jsonl(path)) == [json.loads(line) for line in kept.splitlines()]
    assert path.read_bytes() == kept
    append_jsonl(path, {"c": 3})
    assert path.read_bytes() == kept + b'{"c": 3}\n'


def test_a_missing_log_is_empty_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    assert list(resume_jsonl(path)) == []
    assert not path.exists()
    path.write_bytes(b'{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(ValueError, match=naming(path, 2, 5, "JSON")):
        list(resume_jsonl(path))
    for foreign in (b"one line", b'{}\n"half', b"\xff\xfe"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match=naming(path, "last", "JSON")):
            list(resume_jsonl(path))
        assert path.read_bytes() == foreign
    path.write_bytes(b"{}\n[1]\n")
    with pytest.raises(ValueError, match=naming(path, 2, "object", "[1]")):
        list(resume_jsonl(path))


def test_a_lock_is_held_by_one_at_a_time_and_dies_with_its_process(tmp_path):
    path = tmp_path / "folder" / "lock"
    with locked(path), pytest.raises(ValueError, match=naming(path.parent, "process", "lock")), locked(path):
        raise AssertionError("never reached")
    with locked(path):
        pass
    script = "import os, sys; from embedft.files import locked\nwith locked(sys.argv[1]): os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True)
    assert done.returncode == -9, done.stderr
    with locked(path):
        pass


def test_a_lock_is_waited_for_and_its_holder_named(tmp_path):
    path, told = tmp_path / "lock", []
    script = (
        "import sys; sys.path[0] = sys.argv[2]; from files import locked\n"  # the module alone is quick to import
        "with locked(sys.argv[1], wait=print): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path), os.path.dirname(files.__file__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert path.read_text() == str(process.pid)

        def wait(holder):
            told.append(holder)
            process.stdin.close()  # which lets it go

        with locked(path, wait=wait):
            assert told == [f"process {process.pid}"]
            assert path.read_text() == str(os.getpid())
    assert path.read_text() == ""
    with locked(path), pytest.raises(ValueError, match=naming("stop")), locked(path, wait=_stop):
        raise AssertionError("never reached")


def test_a_lock_that_a_full_disk_cannot_take_is_named(tmp_path):
    path, limit = tmp_path / "lock", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(OSError, match=naming(errno.EFBIG)) as caught, locked(path):
            raise AssertionError("never reached")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
    with locked(path):
        pass


def _stop(holder):
    assert holder == f"process {os.getpid()}"
    raise ValueError("stop")
