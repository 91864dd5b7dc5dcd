"""One batch on its way from sample indices to tiles, those replaced that can't be read or are turned down.

Tiles are decoded as their bytes come, and a replacement is asked for while others are still on their way: which tile an
index gets depends on neither. With views, a sample is decoded when the bytes of all have come, and replaced as a whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from streaming.counters import Counters
from streaming.errors import SlideError, StorageError, StreamError
from streaming.plan import TilePlan
from streaming.reading.batch import Batch, of_view, pack_replaced
from streaming.reading.filters import TileRules
from streaming.reading.isolated import IsolatedPool
from streaming.reading.slide_pool import SlidePool
from streaming.slide import PendingTile
from streaming.storage.connections import CONNECTIONS

# A tile is replaced this often before the run is told that hardly anything passes: at 80 % rejected tiles, once in
# 10^24 samples.
_MAX_ATTEMPTS = 256
# So many of these may be tiles that can't be read, or else a bucket that refuses all is asked without end. Eight more
# than those that the plan takes from a tile's own window (16, `slide_choice`).
_MAX_FAILURES = 24
# The plan of one tile takes a third of the time of the plan of so many.
_PLANNED_TOGETHER = 8
# The last tiles of a batch come by rounds: decoded, turned down, asked for anew. With 64 tiles, 7 % of them
# turned down, that took as long as three requests (64 and 128 in flight at 100 ms); hardly any is under way meanwhile.
_LAST_ROUNDS = 3
# Each costs its tiles' memory, and a task that Ray hands out ahead.
_MOST_AT_ONCE = 8


def batches_at_once(requests_in_flight: int, num_tiles: int, requests_per_tile: float) -> int:
    """On how many batches of so many tiles a reader works at once, so that its requests don't run dry.

    As many as have all their requests under way while one waits for its last tiles, and that one.
    """
    filling = math.ceil(_LAST_ROUNDS * requests_in_flight / (num_tiles * requests_per_tile))
    return min(1 + filling, _MOST_AT_ONCE)


class BatchReading:
    """The tiles of some sample indices, int64 (n,), being read; `read` gives them, once."""

    def __init__(
        self,
        plan: TilePlan,
        rules: TileRules,
        pool: SlidePool[int] | IsolatedPool,
        index: NDArray[np.int64],
        count: Counters,
    ) -> None:
        n, size = len(index), plan.size
        self._plan, self._rules, self._pool, self._count = plan, rules, pool, count
        self._index, self._attempt = index, np.zeros(n, np.int32)
        self._views = range(plan.num_views)
        self._tiles = [np.empty((n, size, size, 3), dtype=np.uint8) for _ in self._views]
        self._columns: Batch = {"index": index, "slide": np.zeros(n, np.int32)}
        for view in self._views:
            self._columns[of_view("x", view)] = np.zeros(n, np.int64)
            self._columns[of_view("y", view)] = np.zeros(n, np.int64)
            self._columns[of_view("mpp", view)] = np.zeros(n, np.float64)
        self._columns["filtered"] = np.zeros(n, np.int32)
        self._failures: list[list[tuple[str, str]]] = [[] for _ in range(n)]
        self._turned_down: list[list[str]] = [[] for _ in range(n)]
        self._begun: list[list[PendingTile | SlideError | StorageError]] = [[] for _ in range(n)]
        self._to_come = [0] * n
        # Rows alone: what requests call back must not hold on to what they bring, which would keep it for ever.
        self._ready: SimpleQueue[int] = SimpleQueue()

    def read(self) -> Batch:
        """The columns of `TileReader` but for `ended_at` and `counters`.

        Raises:
            StreamError: hardly any tile passes, or none can be read.
        """
        left, replace = len(self._index), list[int]()
        self._ask(range(left))
        while left:
            # Rather than wait, and some together where there is enough to do.
            if replace and (len(replace) >= _PLANNED_TOGETHER or self._ready.empty()):
                # The batch waits for these alone: behind those of the next batch they would come last.
                with CONNECTIONS.urgently():
                    self._ask(replace)
                replace = []
            row = self._next()
            if self._take(row):
                left -= 1
            else:
                replace.append(row)
        tiles = {of_view("tile", view): tiles for view, tiles in enumerate(self._tiles)}
        return {**tiles, **self._columns, **pack_replaced(self._failures, self._turned_down)}

    def _ask(self, rows: Sequence[int]) -> None:
        """Asks for the bytes of the next tile of some rows; all requests go out before any answer is looked at."""
        at, started = np.array(rows, dtype=np.int64), perf_counter()
        views = self._plan.views_of(self._plan.specs(self._index[at], self._attempt[at]))
        self._count.plan_s += perf_counter() - started
        self._columns["slide"][at] = views[0].slide
        for view, specs in enumerate(views):
            for name, values in (("x", specs.x), ("y", specs.y), ("mpp", specs.own_mpp)):
                self._columns[of_view(name, view)][at] = values
        columns = [(specs.slide, specs.x, specs.y, specs.mpp) for specs in views]
        tiles = [list(zip(*(a.tolist() for a in of_one), strict=True)) for of_one in columns]
        size, tolerance = self._plan.size, self._plan.mpp_tolerance
        self._pool.prepare([tile for of_one in tiles for tile in of_one], size, tolerance, self._count)
        started = perf_counter()
        for i, row in enumerate(rows):
            self._begun[row], self._to_come[row] = [], len(views)
            for of_one in tiles:
                self._begin(row, *of_one[i])
        self._count.request_s += perf_counter() - started

    def _begin(self, row: int, slide: int, x: int, y: int, mpp: float) -> None:
        """Asks for the bytes of a row's next view, or notes why it can't be asked for."""
        try:
            size, tolerance = self._plan.size, self._plan.mpp_tolerance
            begun = self._pool.begin_tile(slide, x, y, mpp, size, tolerance, self._count)
        except (SlideError, StorageError) as error:
            self._begun[row].append(error)
            self._ready.put(row)
        else:
            self._begun[row].append(begun)
            begun.when_ready(partial(self._ready.put, row))

    def _next(self) -> int:
        """A row all of whose bytes have come."""
        started = perf_counter()
        while True:
            row = self._ready.get()
            self._to_come[row] -= 1
            if not self._to_come[row]:
                break
        self._count.fetch_s += perf_counter() - started
        return row

    def _take(self, row: int) -> bool:
        """Makes the bytes of a row its tiles; whether they may stay, or are to be replaced."""
        begun, self._begun[row] = self._begun[row], []
        slide = int(self._columns["slide"][row])
        for view, pending in enumerate(begun):
            tile = self._tiles[view][row]
            try:
                if isinstance(pending, Exception):
                    raise pending
                pending.fill(tile)
            except (SlideError, StorageError) as error:
                self._failures[row].append((self._plan.slides[slide], str(error)))
                break
            started = perf_counter()
            rule = self._rules.turns_down(tile, slide)
            self._count.filter_s += perf_counter() - started
            if rule is not None:
                self._columns["filtered"][row] += 1
                self._turned_down[row].append(rule)
                break
        else:
            return True
        self._attempt[row] += 1
        self._check_budget(row)
        return False

    def _check_budget(self, row: int) -> None:
        index, failures = self._index[row], self._failures[row]
        if len(failures) >= _MAX_FAILURES:
            raise StreamError(
                f"index {index}: {len(failures)} tiles could not be read, the last: {failures[-1][1]}; "
                "look at the storage and its credentials, or at the slides"
            )
        if self._attempt[row] >= _MAX_ATTEMPTS:
            by_rule = [f"{num} of them by {rule}" for rule, num in Counter(self._turned_down[row]).most_common()]
            raise StreamError(
                f"index {index}: {_MAX_ATTEMPTS} tiles failed, {', '.join(by_rule) or 'none'} turned down; loosen "
                "that, or look at the slides"
            )
