"""progress.py: on stderr, for people; silent elsewhere."""

import io
import sys

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
