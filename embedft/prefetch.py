"""Makes the next items in a thread while the caller works on the current one.

with Prefetch(batches.epoch(0), ahead=2) as source:
    for batch in source:
        ...                     # the next two are being made
source.wait_seconds             # how long the caller waited for items
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """The items of `source`, in order. A thread makes up to `ahead` of them before they are asked for; with 0 there is
    no thread. An error of the source is raised in its turn, with its traceback. `close` ends the thread, once the item
    that it is making is done, and closes the source; so do the end of a `with` block, an error, and the last item."""

    def __init__(self, source: Iterable[T], *, ahead: int):
        self.wait_seconds = 0.0
        self._source, self._ahead = iter(source), ahead
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._is_over = self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True) if ahead > 0 else None
        if self._thread is not None:
            self._thread.start()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            if self._is_closed:
                raise StopIteration
            return next(self._source) if self._thread is None else self._take()
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Ends the thread and closes the source; nothing more comes. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if hasattr(self._source, "close"):
            self._source.close()

    def _take(self) -> T:
        with self._changed:
            while not self._ready and not self._is_over:
                self._changed.wait()
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def _make(self) -> None:
        try:
            while True:
                with self._changed:
                    while len(self._ready) >= self._ahead and not self._is_closed:
                        self._changed.wait()
                    if self._is_closed:
                        return
                item = next(self._source)
                with self._changed:
                    if not self._is_closed:
                        self._ready.append(item)
                    self._changed.notify_all()
                del item
        except StopIteration:
            pass
        except BaseException as error:  # raised again by whoever asks for the next item
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
