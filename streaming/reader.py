"""The reader: sample indices in, uint8 tiles out. One actor holds one; it is as well called in-process.

While blocks are decoded, the next ones are on their way: all requests of a batch go out at once, and an actor works on
two batches.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, time
from typing import Any, Generic, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from streaming import counters, ranges, storage
from streaming.careful import CarefulPool
from streaming.catalog import Catalog
from streaming.counters import Counters, counting
from streaming.errors import ConfigError, SlideError, StorageError, StreamError
from streaming.plan import TilePlan, TileSpecs
from streaming.slide import Slide, Staging
from streaming.slide.geometry import Pixels
from streaming.tissue import HsvRule

Batch = dict[str, NDArray[Any]]
Key = TypeVar("Key", bound=Hashable)

# A tile is replaced this often before the run is told that hardly anything passes: at 80 % rejected tiles, once in
# 10^24 samples.
_MAX_ATTEMPTS = 256
# A slide of a remote catalog costs a request or two to open, and at first nearly every tile is of a new one.
_MAX_OPENING = 16


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How tiles are read and which are taken."""

    hsv_rule: HsvRule = field(default_factory=HsvRule)
    """which tiles are taken; the others are replaced"""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """fsspec's options for the slides' storage"""
    staging: Staging = field(default_factory=Staging)
    """where copies of remote slides lie"""
    requests_in_flight: int = 32
    """requests to the storage that a reader keeps under way; 32 of 20 ms are 1,600 a second"""

    def __post_init__(self) -> None:
        if self.requests_in_flight < 1:
            raise ConfigError(f"requests_in_flight is {self.requests_in_flight}; it must be at least 1")


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


class TileReader:
    """Turns sample indices into tiles; a plain callable, which Ray Data runs in an actor, from several threads.

    A tile that can't be read, or that the HSV rule turns down, is replaced by the plan's next attempt for the same
    index, so that the same indices give the same tiles wherever and however often they are read.
    """

    def __init__(
        self,
        plan: TilePlan | ray.ObjectRef[TilePlan],
        catalog: Catalog | ray.ObjectRef[Catalog],
        options: ReaderOptions,
    ) -> None:
        # A reference is one copy a node, in shared memory, for all its readers.
        self._plan: TilePlan = ray.get(plan) if isinstance(plan, ray.ObjectRef) else plan
        self._catalog: Catalog = ray.get(catalog) if isinstance(catalog, ray.ObjectRef) else catalog
        self._options = options
        ranges.keep_in_flight(options.requests_in_flight)
        self._pool: SlidePool[int] = SlidePool(self._open)
        self._totals, self._lock = Counters(), threading.Lock()

    def counters(self) -> dict[str, float]:
        """What all batches so far took, over all threads: `streaming.counters.Counters` by name."""
        with self._lock:
            return self._totals.as_dict()

    def _open(self, row: int) -> Slide:
        options = self._options
        return storage.PATIENT(self._catalog.open_slide, row, options.storage_options, options.staging)

    def __call__(self, batch: Batch, *, careful: bool = False) -> Batch:
        """Reads the tiles of `batch["index"]`, int64 (n,).

        Returns columns of n rows: `tile` uint8 (n, size, size, 3), `index`, `slide` (row of the catalog), `x`, `y`
        (level-0 pixels), `mpp`, `filtered` (tiles of this index turned down by the HSV rule), `failures` (JSON list
        of [slide, reason] of tiles of this index that could not be read; empty where none) and `stages` (in the first
        row what this batch took, JSON of `streaming.counters.Counters`, and when it ended, `ended_at`; else empty).
        With `careful`, tiles are read in a process apart, and one that crashes it has failed.

        Raises:
            StreamError: hardly any tile passes.
        """
        index = np.asarray(batch["index"], dtype=np.int64)
        with counting() as counted, self._slides(careful) as pool:
            started = perf_counter()
            columns = self._read(index, pool)
            counted.total_s = perf_counter() - started
            counted.tiles = len(index)
        with self._lock:
            self._totals.add(counted)
        stages = np.full(len(index), "", dtype=object)
        taken = {name: round(value, 6) for name, value in counted.as_dict().items()}
        stages[:1] = json.dumps({**taken, "ended_at": time()})
        return {**columns, "stages": stages}

    @contextlib.contextmanager
    def _slides(self, careful: bool) -> Generator[SlidePool[int] | CarefulPool]:
        if not careful:
            yield self._pool
            return
        pool = CarefulPool(self._catalog, self._options.storage_options, self._options.staging)
        with contextlib.closing(pool):
            yield pool

    def _read(self, index: NDArray[np.int64], pool: SlidePool[int] | CarefulPool) -> Batch:
        count, n, size = counters.mine(), len(index), self._plan.size
        tiles = np.empty((n, size, size, 3), dtype=np.uint8)
        columns: Batch = {
            "index": index,
            "slide": np.zeros(n, np.int32),
            "x": np.zeros(n, np.int64),
            "y": np.zeros(n, np.int64),
            "mpp": np.zeros(n, np.float64),
            "filtered": np.zeros(n, np.int32),
        }
        failures: list[list[tuple[str, str]]] = [[] for _ in range(n)]
        pending = np.arange(n)
        for attempt in range(_MAX_ATTEMPTS):
            started = perf_counter()
            specs = self._plan.specs(index[pending], np.full(len(pending), attempt, dtype=np.int32))
            count.plan_s += perf_counter() - started
            for name in ("slide", "x", "y", "mpp"):
                columns[name][pending] = getattr(specs, name)
            failed = self._read_specs(specs, pool, tiles, pending)
            for i, error in failed.items():
                if error is None:
                    columns["filtered"][pending[i]] += 1
                else:
                    failures[pending[i]].append((self._plan.slides[int(specs.slide[i])], str(error)))
            pending = pending[list(failed)]
            if not failed:
                reasons = np.array([json.dumps(entry) if entry else "" for entry in failures], dtype=np.str_)
                return {"tile": tiles, **columns, "failures": reasons}
        at = int(pending[0])
        last = f"the last could not be read: {failures[at][-1][1]}" if failures[at] else "the HSV rule turned them down"
        raise StreamError(
            f"index {index[at]}: {_MAX_ATTEMPTS} tiles in a row failed ({last}); "
            "loosen data.hsv_rule or look at the slides"
        )

    def _read_specs(
        self, specs: TileSpecs, pool: SlidePool[int] | CarefulPool, tiles: Pixels, rows: NDArray[np.int64]
    ) -> dict[int, SlideError | StorageError | None]:
        """Reads specs into rows of `tiles`; tells which are to be replaced: why, or None where the HSV rule says so."""
        count = counters.mine()
        # All requests go out before the first block is decoded: storage works while this decodes.
        pool.open_all(np.unique(specs.slide).tolist())
        started = perf_counter()
        begun = [_begin(pool, specs, i) for i in range(len(specs))]
        count.request_s += perf_counter() - started
        failed: dict[int, SlideError | StorageError | None] = {}
        for i, row in enumerate(rows.tolist()):
            try:
                begun[i](tiles[row])
            except (SlideError, StorageError) as error:
                failed[i] = error
                continue
            started = perf_counter()
            if not self._options.hsv_rule.accepts(tiles[row]):
                failed[i] = None
            count.filter_s += perf_counter() - started
        return failed


def _begin(pool: SlidePool[int] | CarefulPool, specs: TileSpecs, i: int) -> Callable[[Pixels], None]:
    """Asks for a tile's bytes; what is wrong is told by the answer."""
    try:
        return pool.begin_tile(int(specs.slide[i]), int(specs.x[i]), int(specs.y[i]), float(specs.mpp[i]), specs.size)
    except (SlideError, StorageError) as error:
        return partial(_fail, error)


def _fail(error: Exception, _: Pixels) -> None:
    raise error
