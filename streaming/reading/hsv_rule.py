"""The published filter of tiles by their pixels' colours."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from streaming.slide.resample import Pixels
from streaming.vision import cv2

# OpenCV's 8-bit HSV (`color_hsv`) is arithmetic of integers: of a pixel with the largest component v and the smallest
# m, d = v - m, the saturation is (d · SDIV[v] + 2048) >> 12, and the hue (x · HDIV[d] + 2048) >> 12, with 180 added
# below 0, where x is g - b, b - r + 2d or r - g + 4d as the largest component is red, green or blue.
_VALUES = np.arange(256)
_SDIV = np.rint((255 << 12) / np.maximum(_VALUES, 1)).astype(int)
_HDIV = np.rint((180 << 12) / (6 * np.maximum(_VALUES, 1))).astype(int)
# A hue of 90 and more: of red pixels those whose blue is above green by more than what rounds to 0; of green ones those
# whose blue is below green by no more than what rounds up to 90; and all blue ones. For any d:
_MOST_ROUNDS_TO_0 = int((2048 // _HDIV).max())
_MOST_ROUNDS_TO_90 = int(((3 * _VALUES * _HDIV + 2048 - (90 << 12)) // _HDIV).max())
# Pixels that are looked at together: a tile of 256 px in halves. More parts are decided earlier, but cost more
# calls; larger parts do not stay in the processor's cache.
_STRIP = 40_000

_own = threading.local()


@dataclass(frozen=True, kw_only=True)
class HsvRule:
    """The published tile filter: enough pixels with hue, saturation and value in bounds (OpenCV's 8-bit HSV).

    Source: Virchow's rule as taken over by arXiv 2504.05186; hue runs to 179, so [90, 180] is blue to red.
    """

    min_share: float = 0.6
    """share of pixels within the bounds that a tile needs; 0 switches the rule off"""
    hue: tuple[int, int] = (90, 180)
    """lowest and highest hue, of 0 to 179"""
    saturation: tuple[int, int] = (8, 255)
    """lowest and highest saturation, of 0 to 255"""
    value: tuple[int, int] = (103, 255)
    """lowest and highest value, of 0 to 255"""

    def __post_init__(self) -> None:
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share is a share from 0 to 1, not {self.min_share}")
        for name in ("hue", "saturation", "value"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 255:
                raise ValueError(f"{name} is two numbers of 0 to 255, the lower first, not {low}, {high}")

    def accepts(self, tile: Pixels) -> bool:
        """Whether a tile, uint8 (size, size, 3), shows enough tissue.

        With the published hue, most tiles are decided by bounds on the number of pixels, without an image in HSV, and
        some by one half.
        """
        if self.min_share == 0:
            return True
        num_rows, width = tile.shape[:2]
        wanted = self.min_share * num_rows * width
        if not (self.hue[0] == 90 and self.hue[1] >= 179 and self.saturation[1] == self.value[1] == 255):
            return self._inside(tile) >= wanted
        least, most, doubtful = 0, num_rows * width, list[tuple[Pixels, int, int]]()
        rows = math.ceil(num_rows / math.ceil(num_rows * width / _STRIP))
        for top in range(0, num_rows, rows):
            strip = tile[top : top + rows]
            planes = ColourPlanes(strip, self.saturation[0], self.value[0])
            surely = cv2.countNonZero(planes.surely())
            least += surely
            if least >= wanted:
                return True
            possibly = strip.shape[0] * width
            if surely < self.min_share * possibly:  # else it does not speak against the tile
                possibly = cv2.countNonZero(planes.possibly())
                most -= strip.shape[0] * width - possibly
                if most < wanted:
                    return False
            doubtful.append((strip, surely, possibly))
        for strip, surely, possibly in doubtful:
            inside = self._inside(strip)
            least, most = least + inside - surely, most + inside - possibly
            if least >= wanted or most < wanted:
                break
        return least >= wanted

    def _inside(self, tile: Pixels) -> int:
        """How many pixels are within the bounds."""
        hsv = cv2.cvtColor(tile, cv2.COLOR_RGB2HSV)
        low, high = np.array([self.hue, self.saturation, self.value], dtype=np.uint8).T
        return cv2.countNonZero(cv2.inRange(hsv, low, high))


class ColourPlanes:
    """Which pixels of a tile have a hue of at least 90, and saturation and value of at least those given: bounds.

    They are comparisons of red, green and blue; where a colour's rounding decides, both are on the safe side. An answer
    is this thread's memory, good until the next one.
    """

    def __init__(self, tile: Pixels, saturation: int, value: int) -> None:
        self._red, self._green, self._blue, self._excess, self._largest, *self._free = _planes(*tile.shape[:2])
        self._value, self._bounds = value, _difference_bounds(saturation, value)
        cv2.split(tile, [self._red, self._green, self._blue])
        cv2.subtract(self._blue, self._green, self._excess)  # 0 where blue is below green
        cv2.max(self._red, self._blue, self._largest)

    def surely(self) -> Pixels:
        """Not 0 where blue is so far above green that neither hue nor saturation is in doubt, uint8 (h, w)."""
        inside, bright = self._free[:2]
        cv2.threshold(self._excess, self._bounds.far - 1, 255, cv2.THRESH_BINARY, inside)
        # Green is not the largest component of these.
        cv2.threshold(self._largest, self._value - 1, 255, cv2.THRESH_BINARY, bright)
        cv2.bitwise_and(inside, bright, inside)
        return inside

    def possibly(self) -> Pixels:
        """Not 0 where saturation and value are in bounds, and the hue may be, uint8 (h, w)."""
        largest, difference, inside, bluish = self._free
        cv2.max(self._largest, self._green, largest)
        cv2.min(cv2.min(self._red, self._green, difference), self._blue, difference)
        cv2.subtract(largest, difference, difference)
        cv2.convertScaleAbs(difference, inside, self._bounds.factor, self._bounds.more)
        cv2.compare(inside, largest, cv2.CMP_GE, inside)
        cv2.threshold(largest, self._value - 1, 255, cv2.THRESH_BINARY, difference)
        cv2.bitwise_and(inside, difference, inside)
        cv2.subtract(largest, self._blue, bluish)
        cv2.threshold(bluish, _MOST_ROUNDS_TO_90, 255, cv2.THRESH_BINARY_INV, bluish)
        cv2.bitwise_or(bluish, self._excess, bluish)
        cv2.bitwise_and(inside, bluish, inside)
        return inside


def _planes(height: int, width: int) -> list[Pixels]:
    """Nine planes, uint8 (height, width), this thread's; nearly all tiles are of one size, for which they are kept."""
    kept: list[Pixels] | None = getattr(_own, "planes", None)
    if kept is None or kept[0].shape != (height, width):
        # Eight bytes apart: were all planes aligned alike, OpenCV's split would write them past the processor's cache,
        # and the rule would take twice as long.
        apart = height * width + 8
        kept = list(np.empty((9, apart), np.uint8)[:, :-8].reshape(9, height, width))
        _own.planes = kept
    return kept


class _Bounds(NamedTuple):
    """What a pixel's components must differ by, by its value, to have a saturation."""

    far: int
    """surely enough for any value, and blue so far above green has a hue of 90 and more"""
    factor: float
    more: float
    """a difference times the factor, and this, is not below the value where the saturation is reached"""


@lru_cache(maxsize=8)
def _difference_bounds(saturation: int, value: int) -> _Bounds:
    enough = (_VALUES[:, None] * _SDIV + 2048 >> 12) >= saturation
    far = max(_MOST_ROUNDS_TO_0 + 1, int(enough.argmax(axis=0)[value:].max()))
    # It rounds up from a half; one more is for the rounding of SDIV and of the product.
    return _Bounds(far, 255 / (saturation - 0.5), 1) if saturation else _Bounds(far, 0, 255)
