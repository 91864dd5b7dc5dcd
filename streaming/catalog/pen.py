"""Marker pens: colours that neither H&E nor DAB has, in OpenCV's 8-bit HSV (hue to 179).

Bounds of hue, saturation and value: greens; blues that are purer than any haematoxylin, whose hue begins where they
end; reds that are purer than eosin or blood; and what is darker than nuclei and nearly grey.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from streaming.slide.resample import Pixels
from streaming.vision import cv2

_PENS = (
    ((33, 50, 40), (92, 255, 255)),
    ((93, 110, 60), (119, 255, 255)),
    ((0, 190, 110), (7, 255, 255)),
    ((174, 190, 110), (179, 255, 255)),
    ((0, 0, 0), (179, 90, 55)),
)


def _within() -> Pixels:
    """Of each value of hue, saturation and value the bounds that it lies within, a bit each: uint8 (1, 256, 3)."""
    found = np.zeros((1, 256, 3), np.uint8)
    for bit, (low, high) in enumerate(_PENS):
        for channel in range(3):
            found[0, low[channel] : high[channel] + 1, channel] |= 1 << bit
    return found


_WITHIN = _within()


def pen_pixels(hsv: Pixels) -> Pixels:
    """Which pixels have the colour of a pen, 255 or 0, uint8 (h, w); hsv is OpenCV's of RGB, uint8 (h, w, 3)."""
    hue, saturation, value = cv2.split(cv2.LUT(hsv, _WITHIN))
    found = cv2.bitwise_and(cv2.bitwise_and(hue, saturation), value)
    return cast(Pixels, cv2.threshold(found, 0, 255, cv2.THRESH_BINARY)[1])
