"""The reader: sample indices in, uint8 tiles out. One actor holds one; it is as well called in-process.

While blocks are decoded, the next ones are on their way: all requests of a batch go out at once, and an actor works on
several batches (`batch_reading.batches_at_once`).
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

from streaming.catalog import Catalog
from streaming.counters import Counters
from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.reading.batch import Batch, pack_counters
from streaming.reading.batch_reading import BatchReading
from streaming.reading.filters import Filters, TileRules
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.isolated import IsolatedPool
from streaming.reading.slide_pool import SlidePool
from streaming.secrets import hidden
from streaming.slide import Slide
from streaming.storage.connections import CONNECTIONS
from streaming.storage.staging import Staging


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How tiles are read and which are taken."""

    hsv_rule: HsvRule = field(default_factory=HsvRule)
    """which tiles are taken; the others are replaced"""
    filters: Filters = field(default_factory=Filters)
    """further rules for that"""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """options for the slides' storage"""
    staging: Staging = field(default_factory=Staging)
    """where copies of remote slides lie"""
    requests_in_flight: int = 32
    """requests to the storage that a reader keeps under way; 32 of 20 ms are 1,600 a second"""

    def __post_init__(self) -> None:
        # Ray may write down what it hands to an actor.
        object.__setattr__(self, "storage_options", hidden(self.storage_options))
        if self.requests_in_flight < 1:
            raise ConfigError(f"requests_in_flight is {self.requests_in_flight}; it must be at least 1")


class TileReader:
    """Turns sample indices into tiles; a plain callable, which Ray Data runs in an actor, from several threads.

    A tile that can't be read, or that a filter turns down, is replaced by the plan's next attempt for the same
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
        self._rules = TileRules(self._plan, options.hsv_rule, options.filters)
        CONNECTIONS.keep_in_flight(options.requests_in_flight)
        self._pool: SlidePool[int] = SlidePool(self._open)
        self._totals, self._lock = Counters(), threading.Lock()

    def counters(self) -> dict[str, float]:
        """What all batches so far took, over all threads: `streaming.counters.Counters` by name."""
        with self._lock:
            return self._totals.as_dict()

    def _open(self, row: int, count: Counters) -> Slide:
        options = self._options
        return self._catalog.open_slide(row, options.storage_options, options.staging, count)

    def __call__(self, batch: Batch, *, isolated: bool = False) -> Batch:
        """Reads the tiles of `batch["index"]`, int64 (n,).

        Returns columns of n rows: `tile` uint8 (n, size, size, 3), `index`, `slide` (row of the catalog), `x`, `y`
        (level-0 pixels), `mpp` (of the pixels that were read), `filtered` (tiles of this index turned down by
        filters), `ended_at` (when the batch was read, seconds since the epoch), `failures`, `turned_down` (the filters'
        names) and `counters`; of views further columns, see `streaming.reading.batch`.

        With `isolated`, tiles are read in a process apart, and one that crashes it has
        failed.

        Raises:
            StreamError: hardly any tile passes, or none can be read.
        """
        index = np.asarray(batch["index"], dtype=np.int64)
        counted = Counters()
        with self._slides(isolated) as pool:
            started = perf_counter()
            columns = BatchReading(self._plan, self._rules, pool, index, counted).read()
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
