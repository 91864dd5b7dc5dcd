"""Slides that a reader keeps open."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any, Generic, TypeVar

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import DeniedError, MissingError, SlideError, StorageError, StreamError
from streaming.slide import PendingTile, Slide
from streaming.slide.resample import Pixels
from streaming.storage.ranges import Span
from streaming.storage.sparse_copy import SparseCopy

Key = TypeVar("Key", bound=Hashable)
# A slide of a remote catalog costs a request or two to open, and at first nearly every tile is of a new one.
_MAX_OPENING = 16
# Each takes some 4 KB.
_MAX_SLIDES = 2**14
# A slide that is denied or gone is not asked for again for so long: each of a batch's tiles would ask anew.
_REFUSED_S = 60.0
# So many of these, and more than were read: it is not the slides.
_MANY_REFUSED = 8


class SlidePool(Generic[Key]):
    """Slides kept open; what is no slide is not tried again. Safe to use from several threads.

    Of slides that OpenSlide serves, the least recently used one is let go of for the next; others hold nothing open but
    take memory, so there is a bound to their number, too.
    """

    def __init__(self, opener: Callable[[Key, Counters], Slide], max_open: int = 64) -> None:
        self._opener, self._max_open = opener, max_open
        self._slides: dict[Key, Future[Slide]] = {}
        self._recent: OrderedDict[Key, None] = OrderedDict()
        self._refused: dict[Key, tuple[StorageError, float]] = {}
        """slides that are denied or gone: why, and since when as time.monotonic"""
        self._read = set[Key]()
        self._lock = threading.Lock()
        self._openers = ThreadPoolExecutor(_MAX_OPENING, thread_name_prefix="open")

    def open_all(self, keys: Iterable[Key], count: Counters = UNCOUNTED) -> None:
        """Opens slides side by side, those that are not open yet; what can't be opened is told by `begin_tile`."""
        started = perf_counter()
        new = [key for key in keys if key not in self._slides]
        if new:
            for taken in self._openers.map(self._counted, new):
                count.add(taken)
        count.open_s += perf_counter() - started

    def prepare(
        self, tiles: Sequence[tuple[Key, int, int, float]], size: int, tolerance: float, count: Counters = UNCOUNTED
    ) -> None:
        """Has what tiles (slide, x, y, mpp) need but their bytes: opens slides, and fetches parts of their indexes.

        All come side by side; what can't be had is told by `begin_tile`.
        """
        self.open_all(dict.fromkeys(tile[0] for tile in tiles), count)
        started = perf_counter()
        wanted: dict[SparseCopy, list[Span]] = {}
        for key, x, y, mpp in tiles:
            opened = self._slides.get(key)
            if opened is not None and opened.done() and opened.exception() is None:
                found = opened.result().copied(x, y, mpp, size, tolerance)
                if found is not None:
                    wanted.setdefault(found[0], []).extend(found[1])
        for copy, spans in wanted.items():
            with contextlib.suppress(StorageError):
                copy.fetch(spans, count)
        count.open_s += perf_counter() - started

    def begin_tile(
        self, key: Key, x: int, y: int, mpp: float, size: int, tolerance: float, count: Counters = UNCOUNTED
    ) -> PendingTile:
        """Asks for a tile of the slide that the opener opens for that key, as `Slide.begin_tile`.

        Raises:
            SlideError, StorageError: the slide can't be opened, or it is no tile.
            StreamError: most of the slides that were asked for are denied or gone.
        """
        if known := self._refused.get(key):
            error, since = known
            if monotonic() - since < _REFUSED_S:
                raise type(error)(*error.args)
        try:
            tile = self._slide(key, count).begin_tile(x, y, mpp, size, tolerance=tolerance, count=count)
        except (DeniedError, MissingError) as error:
            self.refused(key, error)
            raise
        return _PooledTile(self, key, tile)

    def _slide(self, key: Key, count: Counters) -> Slide:
        opened = self._opened(key, count)
        error = opened.exception()
        if error is not None:
            if isinstance(error, StorageError):
                self.forget(key)  # it may be reached later
            # A copy: one error raised again and again would gather tracebacks without end.
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
        taken = Counters()
        self._opened(key, taken)
        return taken

    def _opened(self, key: Key, count: Counters) -> Future[Slide]:
        """The slide, or why it can't be opened; whoever asks first opens it, others wait for the result."""
        with self._lock:
            first = key not in self._slides
            if first and len(self._slides) >= _MAX_SLIDES:
                # The one that was opened first: of slides drawn at random it is as good as any.
                self._slides.pop(next(iter(self._slides)))
            opened = self._slides.setdefault(key, Future())
        if first:
            try:
                opened.set_result(self._opener(key, count))
            except BaseException as error:
                opened.set_exception(error)
        return opened

    def refused(self, key: Key, error: StorageError) -> None:
        """Notes that a slide is denied or gone.

        Raises:
            StreamError: so are most of the slides that were asked for.
        """
        with self._lock:
            self._refused[key] = error, monotonic()
            self._read.discard(key)
            num_refused, num_read = len(self._refused), len(self._read)
        if num_refused >= _MANY_REFUSED and num_refused > num_read:
            raise StreamError(
                f"{num_refused} of the {num_refused + num_read} slides that this reader asked for can't be read, the "
                f"last: {error}"
            )

    def was_read(self, key: Key) -> None:
        """Notes that a tile of a slide came."""
        if key not in self._read:
            with self._lock:
                self._read.add(key)
                self._refused.pop(key, None)

    def forget(self, key: Key) -> None:
        """Lets go of a slide; whoever asks for it again opens it anew."""
        with self._lock:
            self._slides.pop(key, None)
            self._recent.pop(key, None)


@dataclass(frozen=True, slots=True)
class _PooledTile:
    """A tile of one of a pool's slides; what `streaming.slide.PendingTile` describes."""

    pool: SlidePool[Any]
    key: Hashable
    tile: PendingTile

    def when_ready(self, call: Callable[[], object]) -> None:
        self.tile.when_ready(call)

    def fill(self, out: Pixels) -> None:
        try:
            self.tile.fill(out)
            self.pool.was_read(self.key)
        except (DeniedError, MissingError) as error:
            self.pool.refused(self.key, error)
            raise
        except SlideError:
            # OpenSlide answers every later read with the first error: a new handle may still read the rest.
            self.pool.forget(self.key)
            raise
