"""progress.py: a bar on a terminal, lines elsewhere, always on stderr."""

import io
import re
import sys
import time

import pytest

from embedft.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(**options) -> str:
    with progress_bar(3, "encode", unit="text", **options) as bar:
        for _ in range(3):
            bar.update()
    return sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("terminal", "asked", "show", "visible"),
    [
        (True, None, None, True),
        (False, None, None, False),
        (True, "0", None, False),
        (False, "1", None, True),
        (True, "1", False, False),
        (False, "0", True, True),
    ],
)
def test_is_shown_on_a_terminal_unless_told_otherwise(monkeypatch, terminal, asked, show, visible):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delenv("EMBEDFT_PROGRESS", raising=False)
    if asked is not None:
        monkeypatch.setenv("EMBEDFT_PROGRESS", asked)
    written = shown(show=show)
    assert ("encode" in written) == ("text/s" in written) == visible
    assert written == "" or visible
    assert sys.stdout.getvalue() == ""


def test_begins_where_the_work_was_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(10, "train", unit="step", initial=4, show=True) as bar:
        bar.update(6)
    assert (bar.n, bar.initial) == (10, 4)
    assert "4/10" in sys.stderr.getvalue()


def test_without_a_terminal_a_line_shows_now_and_then(monkeypatch):
    monkeypatch.delenv("EMBEDFT_PROGRESS", raising=False)
    for line_seconds, num_lines in ((30, 0), (1e-9, 3)):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        with progress_bar(3, "encode", unit="text", line_seconds=line_seconds) as bar:
            for _ in range(3):
                time.sleep(0.001)
                bar.set_postfix(loss="0.1", refresh=False)
                bar.update()
        lines = sys.stderr.getvalue().splitlines()
        assert len(lines) == num_lines
    assert re.fullmatch(r"encode: 2 of 3 \(text\), .*text/s, 00:00 left, loss=0.1", lines[1])
