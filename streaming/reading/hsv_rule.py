"""The published filter of tiles by their pixels' colours."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from streaming.slide.resample import Pixels


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
        """Whether a tile, uint8 (size, size, 3), shows enough tissue."""
        if self.min_share == 0:
            return True
        hsv = cv2.cvtColor(tile, cv2.COLOR_RGB2HSV)
        low, high = np.array([self.hue, self.saturation, self.value], dtype=np.uint8).T
        inside = cv2.countNonZero(cv2.inRange(hsv, low, high))
        return inside >= self.min_share * tile.shape[0] * tile.shape[1]
