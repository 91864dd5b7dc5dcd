"""The reader: sample indices in, uint8 tiles out. One actor holds one; it is as well called in-process.

While blocks are decoded, the next ones are on their way: all requests of a batch go out at once, and an actor works on
two batches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog import Catalog
from streaming.counters import Counters
from streaming.errors import ConfigError, SlideError, StorageError, StreamError
from streaming.plan import TilePlan
from streaming.plan.plan import TileSpecs
from streaming.reading.batch import Batch, pack_counters, pack_failures
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.isolated import IsolatedPool
from streaming.reading.slide_pool import SlidePool
from streaming.slide import PendingTile, Slide
from streaming.slide.resample import Pixels
from streaming.storage.connections import CONNECTIONS
from streaming.storage.staging import Staging

Unreadable = SlideError | StorageError

# A tile is replaced this often before the run is told that hardly anything passes: at 80 % rejected tiles, once in
# 10^24 samples.
_MAX_ATTEMPTS = 256


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
        CONNECTIONS.keep_in_flight(options.requests_in_flight)
        self._pool: SlidePool[int] = SlidePool(self._open)
        self._totals, self._lock = Counters(), threading.Lock()

    def counters(self) -> dict[str, float]:
        """What all batches so far took, over all threads: `streaming.counters.Counters` by name."""
        with self._lock:
            return self._totals.as_dict()

    def _open(self, row: int, count: Counters) -> Slide:
        options = self._options
        return storage.PATIENT(self._catalog.open_slide, row, options.storage_options, options.staging, count)

    def __call__(self, batch: Batch, *, isolated: bool = False) -> Batch:
        """Reads the tiles of `batch["index"]`, int64 (n,).

        Returns columns of n rows: `tile` uint8 (n, size, size, 3), `index`, `slide` (row of the catalog), `x`, `y`
        (level-0 pixels), `mpp`, `filtered` (tiles of this index turned down by the HSV rule), `ended_at` (when the
        batch was read, seconds since the epoch), `failures` and `counters` (see `streaming.reading.batch`). With
        `isolated`, tiles are read in a process apart, and one that crashes it has failed.

        Raises:
            StreamError: hardly any tile passes.
        """
        index = np.asarray(batch["index"], dtype=np.int64)
        counted = Counters()
        with self._slides(isolated) as pool:
            started = perf_counter()
            columns = self._read(index, pool, counted)
            counted.total_s = perf_counter() - started
            counted.tiles = len(index)
        with self._lock:
            self._totals.add(counted)
        ended_at = np.full(len(index), time())
        return {**columns, "ended_at": ended_at, "counters": pack_counters(counted, len(index))}

    @contextlib.contextmanager
    def _slides(self, isolated: bool) -> Generator[SlidePool[int] | IsolatedPool]:
        if not isolated:
            yield self._pool
            return
        pool = IsolatedPool(self._catalog, self._options.storage_options, self._options.staging)
        with contextlib.closing(pool):
            yield pool

    def _read(self, index: NDArray[np.int64], pool: SlidePool[int] | IsolatedPool, count: Counters) -> Batch:
        n, size = len(index), self._plan.size
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
            failed = self._read_specs(specs, pool, tiles, pending, count)
            for i, error in failed.items():
                if error is None:
                    columns["filtered"][pending[i]] += 1
                else:
                    failures[pending[i]].append((self._plan.slides[int(specs.slide[i])], str(error)))
            pending = pending[list(failed)]
            if not failed:
                return {"tile": tiles, **columns, "failures": pack_failures(failures)}
        at = int(pending[0])
        last = f"the last could not be read: {failures[at][-1][1]}" if failures[at] else "the HSV rule turned them down"
        raise StreamError(
            f"index {index[at]}: {_MAX_ATTEMPTS} tiles in a row failed ({last}); "
            "loosen data.hsv_rule or look at the slides"
        )

    def _read_specs(
        self,
        specs: TileSpecs,
        pool: SlidePool[int] | IsolatedPool,
        tiles: Pixels,
        rows: NDArray[np.int64],
        count: Counters,
    ) -> dict[int, Unreadable | None]:
        """Reads specs into rows of `tiles`; tells which are to be replaced: why, or None where the HSV rule says so."""
        # All requests go out before the first block is decoded: storage works while this decodes.
        pool.open_all(np.unique(specs.slide).tolist(), count)
        started = perf_counter()
        begun = [_begin(pool, specs, i, count) for i in range(len(specs))]
        count.request_s += perf_counter() - started
        failed: dict[int, Unreadable | None] = {}
        for i, row in enumerate(rows.tolist()):
            error = _fill(begun[i], tiles[row])
            if error is not None:
                failed[i] = error
                continue
            started = perf_counter()
            if not self._options.hsv_rule.accepts(tiles[row]):
                failed[i] = None
            count.filter_s += perf_counter() - started
        return failed


def _begin(pool: SlidePool[int] | IsolatedPool, specs: TileSpecs, i: int, count: Counters) -> PendingTile | Unreadable:
    """Asks for a tile's bytes, or tells why it can't be asked for."""
    x, y, mpp = int(specs.x[i]), int(specs.y[i]), float(specs.mpp[i])
    try:
        return pool.begin_tile(int(specs.slide[i]), x, y, mpp, specs.size, count)
    except (SlideError, StorageError) as error:
        return error


def _fill(begun: PendingTile | Unreadable, out: Pixels) -> Unreadable | None:
    """Waits for a tile; tells why it can't be read, be it known since it was asked for."""
    if isinstance(begun, Exception):
        return begun
    try:
        begun.fill(out)
    except (SlideError, StorageError) as error:
        return error
    return None
