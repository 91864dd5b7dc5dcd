"""Which level serves a wanted resolution, and how its pixels become a tile.

Level-0 pixels are `x, y`; pixels of another level say so. mpp is µm per pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from streaming.errors import SlideError

Pixels = NDArray[np.uint8]

# Downsamples are ratios of rounded dimensions (4443/2221 = 2.0005) and scanners' mpp vary in the third digit: a level
# this little coarser than asked still counts as fine enough.
LEVEL_TOLERANCE = 0.01


@dataclass(frozen=True)
class LevelBox:
    """A rectangle of one level, in that level's pixels."""

    level: int
    x: int
    y: int
    width: int
    height: int


def level_for_mpp(mpp: float, level_downsamples: Sequence[float], wanted_mpp: float) -> int:
    """The level whose mpp is the nearest not above the wanted one; level 0 where all are coarser."""
    fine_enough = [
        level
        for level, downsample in enumerate(level_downsamples)
        if mpp * downsample <= wanted_mpp * (1 + LEVEL_TOLERANCE)
    ]
    return max(fine_enough, key=lambda level: level_downsamples[level], default=0)


def tile_box(mpp: float, level_downsamples: Sequence[float], x: int, y: int, wanted_mpp: float, size: int) -> LevelBox:
    """The part of a level that a tile shows; x, y are the level-0 pixel of its top-left corner.

    Corner and extent are rounded to whole pixels of the level: at most half a pixel of what is read.
    """
    level = level_for_mpp(mpp, level_downsamples, wanted_mpp)
    downsample = level_downsamples[level]
    extent = max(1, round(size * wanted_mpp / (mpp * downsample)))
    return LevelBox(level, round(x / downsample), round(y / downsample), extent, extent)


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resamples uint8 (h, w, 3): exact area average when it shrinks, bicubic when it grows."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return np.asarray(resized, dtype=np.uint8)


def read_tile(
    read_box: Callable[[LevelBox], Pixels],
    mpp: float | None,
    level_downsamples: Sequence[float],
    x: int,
    y: int,
    wanted_mpp: float,
    size: int,
) -> Pixels:
    """A tile of uint8 (size, size, 3) through any backend's reader of level boxes.

    Raises:
        SlideError: the slide has no mpp, or what is asked is no tile.
    """
    if mpp is None:
        raise SlideError("the slide has no mpp in its metadata; pass it: open_slide(uri, mpp=...)")
    if size < 1 or not wanted_mpp > 0:
        raise SlideError(f"no tile of {size} px at {wanted_mpp} µm/px; both must be above 0")
    box = tile_box(mpp, level_downsamples, x, y, wanted_mpp, size)
    return resize(read_box(box), size, size)
