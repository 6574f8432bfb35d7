"""prefetch.py: the same items, never too many at a time, errors in their turn, and no thread left behind."""

import contextlib
import gc
import threading
import time
import traceback
import weakref

import pytest
from naming import naming

from embedft.prefetch import Prefetch


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def fail_after(count: int, error: type[BaseException]):
    yield from range(count)
    raise error("made up")


@pytest.mark.parametrize("ahead", [0, 1, 2, 10])
def test_the_same_items_in_order(ahead):
    with Prefetch((i * i for i in range(7)), ahead=ahead) as items:
        assert list(items) == [0, 1, 4, 9, 16, 25, 36]
        assert list(items) == []
    with Prefetch([], ahead=ahead) as items:
        assert list(items) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_ahead_are_made(ahead):
    made = []
    with Prefetch((made.append(i) or i for i in range(100)), ahead=ahead) as items:
        for i in range(20):
            assert next(items) == i
            deadline = time.monotonic() + 5
            while len(made) < i + 1 + ahead and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.002)
            assert len(made) == i + 1 + ahead
    assert len(made) <= 20 + ahead


@pytest.mark.parametrize("ahead", [0, 1, 5])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_comes_in_its_turn_with_its_traceback(ahead, error):
    with Prefetch(fail_after(3, error), ahead=ahead) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(error, match=naming("made")) as found:
            next(items)
        assert "fail_after" in [frame.name for frame in traceback.extract_tb(found.value.__traceback__)]
        assert list(items) == []


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaving_early_closes_the_source(ahead, error):
    closed = []

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    with contextlib.suppress(error or ()), Prefetch(endless(), ahead=ahead) as items:
        next(items)
        if error is not None:
            raise error
    assert closed == [True]
    assert list(items) == []


def test_an_interrupt_while_waiting():
    go = threading.Event()

    def slow():
        go.wait()
        yield 1

    def interrupt():
        time.sleep(0.05)
        go.set()

    class Interrupted(Prefetch):
        def _take(self):
            with self._changed:
                self._changed.wait(0.01)
            raise KeyboardInterrupt

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), Interrupted(slow(), ahead=1) as items:
        next(items)
    thread.join()


@pytest.mark.parametrize("ahead", [0, 2])
def test_waiting_is_measured(ahead):
    """Five items take 50 ms each to make; ahead of time, only the first one is waited for."""
    made = []

    def slow():
        for i in range(5):
            time.sleep(0.05)
            made.append(i)
            yield i

    with Prefetch(slow(), ahead=ahead) as items:
        for i in items:
            while ahead and len(made) < min(5, i + 2):
                time.sleep(0.001)
    assert items.wait_seconds >= 0.25 if ahead == 0 else 0.04 < items.wait_seconds < 0.25


def test_items_are_not_kept():
    class Item:
        pass

    made = []

    def items():
        for _ in range(5):
            item = Item()
            made.append(weakref.ref(item))
            yield item
            del item

    with Prefetch(items(), ahead=2) as found:
        for _ in range(3):
            next(found)
    gc.collect()
    assert len(made) >= 3
    assert [ref() for ref in made] == [None] * len(made)


def test_an_item_is_not_kept_while_the_next_one_is_made():
    class Item:
        pass

    made, has_begun, go = [], threading.Event(), threading.Event()

    def items():
        item = Item()
        made.append(weakref.ref(item))
        yield item
        del item
        has_begun.set()
        go.wait(5)

    with Prefetch(items(), ahead=1) as found:
        next(found)
        assert has_begun.wait(5)
        assert made[0]() is None
        go.set()
