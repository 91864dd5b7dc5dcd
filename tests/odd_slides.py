"""Slides that answer late or kill the process that reads them, for tests of what the stream makes of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming import storage
from streaming.catalog import Catalog
from streaming.slide import Slide, Staging
from streaming.slide.geometry import Pixels


class OddSlide:
    """A slide as far away as a slow store, some of whose tiles kill the process that reads them."""

    def __init__(self, slide: Slide, delay_s: float, deadly: frozenset[tuple[int, int]], sign: int) -> None:
        self._slide, self._delay_s, self._deadly, self._sign = slide, delay_s, deadly, sign

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slide, name)

    def begin_tile(self, x: int, y: int, mpp: float, size: int) -> Callable[[Pixels], None]:
        begun = self._slide.begin_tile(x, y, mpp, size)

        def finish(out: Pixels) -> None:
            time.sleep(self._delay_s)
            if (x, y) in self._deadly:
                os.kill(os.getpid(), self._sign)
            begun(out)

        return finish

    def read_tile(self, x: int, y: int, mpp: float, size: int) -> Pixels:
        tile = np.empty((size, size, 3), np.uint8)
        self.begin_tile(x, y, mpp, size)(tile)
        return tile


@dataclass(frozen=True)
class OddCatalog(Catalog):
    delay_s: float = 0.0
    deadly: frozenset[tuple[int, int]] = frozenset()
    sign: int = signal.SIGSEGV

    def open_slide(self, row: int, storage_options: storage.StorageOptions | None, staging: Staging) -> Any:
        return OddSlide(super().open_slide(row, storage_options, staging), self.delay_s, self.deadly, self.sign)
