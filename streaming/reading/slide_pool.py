"""Slides that a reader keeps open."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Generic, TypeVar

from streaming import counters
from streaming.counters import Counters, counting
from streaming.errors import SlideError, StorageError
from streaming.slide import Slide
from streaming.slide.resample import Pixels

Key = TypeVar("Key", bound=Hashable)
# A slide of a remote catalog costs a request or two to open, and at first nearly every tile is of a new one.
_MAX_OPENING = 16


class SlidePool(Generic[Key]):
    """Slides kept open; what is no slide is not tried again. Safe to use from several threads.

    Of slides that OpenSlide serves, the least recently used one is let go of for the next; others hold nothing open.
    """

    def __init__(self, opener: Callable[[Key], Slide], max_open: int = 64) -> None:
        self._opener, self._max_open = opener, max_open
        self._slides: dict[Key, Future[Slide]] = {}
        self._recent: OrderedDict[Key, None] = OrderedDict()
        self._lock = threading.Lock()
        self._openers = ThreadPoolExecutor(_MAX_OPENING, thread_name_prefix="open")

    def open_all(self, keys: Iterable[Key]) -> None:
        """Opens slides side by side, those that are not open yet; what can't be opened is told by `begin_tile`."""
        started = perf_counter()
        new = [key for key in keys if key not in self._slides]
        if new:
            for counted in self._openers.map(self._counted, new):
                counters.mine().add(counted)
        counters.mine().open_s += perf_counter() - started

    def begin_tile(self, key: Key, x: int, y: int, mpp: float, size: int) -> Callable[[Pixels], None]:
        """Asks for a tile of the slide that the opener opens for that key; the answer fills uint8 (size, size, 3).

        Raises (both):
            SlideError, StorageError: the slide can't be opened, or this tile can't be read.
        """
        slide = self._slide(key)
        begun = slide.begin_tile(x, y, mpp, size)

        def finish(out: Pixels) -> None:
            try:
                begun(out)
            except SlideError:
                # OpenSlide answers every later read with the first error: a new handle may still read the rest.
                self._forget(key)
                raise

        return finish

    def _slide(self, key: Key) -> Slide:
        opened = self._opened(key)
        error = opened.exception()
        if error is not None:
            if isinstance(error, StorageError):
                self._forget(key)  # it may be reached later
            # Another one each time: raised again and again, the same would gather tracebacks without end.
            raise type(error)(*error.args)
        slide = opened.result()
        if slide.backend == "openslide":
            with self._lock:
                self._recent[key] = None
                self._recent.move_to_end(key)
                if len(self._recent) > self._max_open:
                    # Another thread may still read it: it closes when nobody holds it any more.
                    self._slides.pop(self._recent.popitem(last=False)[0], None)
        return slide

    def _counted(self, key: Key) -> Counters:
        """Opens a slide, and tells what that took."""
        with counting() as counted:
            self._opened(key)
        return counted

    def _opened(self, key: Key) -> Future[Slide]:
        """The slide, or why it can't be opened; whoever asks first opens it, others wait for the result."""
        with self._lock:
            first = key not in self._slides
            opened = self._slides.setdefault(key, Future())
        if first:
            try:
                opened.set_result(self._opener(key))
            except BaseException as error:
                opened.set_exception(error)
        return opened

    def _forget(self, key: Key) -> None:
        with self._lock:
            self._slides.pop(key, None)
            self._recent.pop(key, None)
