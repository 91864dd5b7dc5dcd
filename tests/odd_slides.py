"""Slides that answer late or kill the process that reads them, for tests of what the stream makes of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.catalog import OfSlide
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.slide import PendingTile, Slide
from streaming.slide.resample import Pixels
from streaming.storage.staging import Staging


class OddSlide:
    """A slide as far away as a slow store, some of whose tiles kill the process that reads them; signal 0: or fail."""

    def __init__(self, slide: Slide, delay_s: float, deadly: frozenset[tuple[int, int]], sign: int) -> None:
        self._slide, self._delay_s, self._deadly, self._sign = slide, delay_s, deadly, sign

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slide, name)

    def begin_tile(
        self, x: int, y: int, mpp: float, size: int, *, tolerance: float, count: Counters = UNCOUNTED
    ) -> OddTile:
        return OddTile(self, x, y, self._slide.begin_tile(x, y, mpp, size, tolerance=tolerance, count=count))

    def read_tile(self, x: int, y: int, mpp: float, size: int, *, tolerance: float) -> Pixels:
        tile = np.empty((size, size, 3), np.uint8)
        self.begin_tile(x, y, mpp, size, tolerance=tolerance).fill(tile)
        return tile

    def befall(self, x: int, y: int) -> None:
        time.sleep(self._delay_s)
        if (x, y) in self._deadly:
            if not self._sign:
                raise SlideError(f"{self._slide}: tile at {x}, {y} is refused")
            # To this thread, as a fault of its own would: another one's handler would let it go on reading.
            signal.pthread_kill(threading.get_ident(), self._sign)


@dataclass(frozen=True)
class OddTile:
    slide: OddSlide
    x: int
    y: int
    tile: PendingTile

    def when_ready(self, call: Callable[[], object]) -> None:
        self.tile.when_ready(call)

    def fill(self, out: Pixels) -> None:
        self.slide.befall(self.x, self.y)
        self.tile.fill(out)


@dataclass(frozen=True)
class OddCatalog(Catalog):
    delay_s: float = 0.0
    deadly: frozenset[tuple[int, int]] = frozenset()
    sign: int = signal.SIGSEGV

    @classmethod
    def of(cls, catalog: Catalog, **oddities: Any) -> OddCatalog:
        return cls(**{part.name: getattr(catalog, part.name) for part in fields(Catalog)}, **oddities)

    def open_slide(
        self,
        slide: int | str | OfSlide,
        storage_options: storage.StorageOptions | None = None,
        staging: Staging | None = None,
        count: Counters = UNCOUNTED,
    ) -> Any:
        return OddSlide(
            super().open_slide(slide, storage_options, staging, count), self.delay_s, self.deadly, self.sign
        )
