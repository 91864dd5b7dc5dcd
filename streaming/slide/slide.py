"""What a slide is to the rest, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.slide.geometry import MPP_TOLERANCE, LevelBox, Rectangle, checked_tile_box
from streaming.slide.resample import Pixels
from streaming.slide.resolution import NO_MPP
from streaming.storage.ranges import Span

if TYPE_CHECKING:
    from streaming.storage.sparse_copy import SparseCopy


CONVERT = "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --Q 90"
"""The command that makes a TIFF of any kind one that is read by its blocks."""


class PendingTile(Protocol):
    """A tile whose bytes were asked for."""

    def when_ready(self, call: Callable[[], object]) -> None:
        """Calls, from any thread, as soon as `fill` would wait for no answer of the storage; at once if it is so."""
        ...

    def fill(self, out: Pixels) -> None:
        """Waits for them and makes them the tile's pixels, uint8 (size, size, 3).

        Raises:
            SlideError: the slide is broken there, or has changed.
            StorageError: the storage can't be reached.
        """
        ...


class Slide(Protocol):
    """An open whole-slide image. Safe to read from several threads."""

    uri: str
    backend: str
    vendor: str
    mpp: float | None
    no_mpp: str = NO_MPP
    """why there is none, if so: the metadata tell none, or one that can't be a microscope's"""
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    bounds: Rectangle
    """what of it was scanned, as `openslide.bounds-…` tell it; QuPath shows that alone, and counts pixels from there"""
    packed_index: bytes | None
    """Its block index as a file's content, if it was opened by its tags; None where OpenSlide serves"""
    left_out: str
    """what of it is never read, such as further focal planes; mostly empty"""

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name, None where unknown."""
        ...

    def level_blocks(self) -> list[tuple[int, int] | None]:
        """Width and height of each level's blocks in its pixels, None where unknown."""
        ...

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int], reduction: int = 1) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels, size in the level's.

        With a reduction, which divides the size, h and w are so many times smaller, and pixels averages; JPEG and JPEG
        2000 are decoded smaller then where that fits.
        """
        ...

    def begin_tile(
        self,
        x: int,
        y: int,
        mpp: float,
        size: int,
        *,
        exact: bool = False,
        tolerance: float = MPP_TOLERANCE,
        count: Counters = UNCOUNTED,
    ) -> PendingTile:
        """Asks for the bytes of a tile as `read_tile` describes it; what it takes is added to `count`."""
        ...

    def copied(self, x: int, y: int, mpp: float, size: int, tolerance: float) -> tuple[SparseCopy, list[Span]] | None:
        """What `begin_tile` reads of a copy that is fetched part by part, so that many tiles' parts come at once."""
        del x, y, mpp, size, tolerance
        return None

    def tile_box(self, x: int, y: int, mpp: float, size: int, *, exact: bool, tolerance: float) -> LevelBox:
        """The part of a level that a tile shows which `read_tile` describes.

        Raises:
            SlideError: it is no tile, or the slide has no mpp.
        """
        tolerance = 0.0 if exact else tolerance
        if self.mpp is None:
            raise SlideError(f"{self.uri}: {self.no_mpp}; pass it: open_slide(uri, mpp=...)")
        return checked_tile_box(self.mpp, self.level_downsamples, x, y, mpp, size, tolerance)

    def read_tile(
        self, x: int, y: int, mpp: float, size: int, *, exact: bool = False, tolerance: float = MPP_TOLERANCE
    ) -> Pixels:
        """A tile of uint8 (size, size, 3); x, y the level-0 pixel of its top-left corner, mpp its µm/px.

        Where a level, or its reduction by 2, 4 or 8, has that µm/px up to a share of `tolerance`, its own pixels are
        the tile, with their µm/px (`geometry.tile_source` tells it); 0 resamples to the very mpp. JPEG and JPEG 2000
        are decoded at 1/2, 1/4 or 1/8 where that fits. `exact` decodes in full and is of the very mpp. White outside
        the slide.
        """
        tile = np.empty((size, size, 3), dtype=np.uint8)
        self.begin_tile(x, y, mpp, size, exact=exact, tolerance=tolerance).fill(tile)
        return tile

    def close(self) -> None:
        """Lets go of the file."""
        ...
