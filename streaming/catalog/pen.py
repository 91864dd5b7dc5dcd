"""Marker pens: colours that neither H&E nor DAB has, in OpenCV's 8-bit HSV (hue to 179).

Bounds of hue, saturation and value: greens; blues that are purer than any haematoxylin, whose hue begins where they
end; reds that are purer than eosin or blood; and what is darker than nuclei and nearly grey.
"""

from __future__ import annotations

from typing import Any, cast

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


def pen_pixels(hsv: Pixels) -> Pixels:
    """Which pixels have the colour of a pen, 255 or 0, uint8 (h, w); hsv is OpenCV's of RGB, uint8 (h, w, 3)."""
    low, high = (np.array(bound, np.uint8) for bound in _PENS[0])
    found = cast(Any, cv2).inRange(hsv, low, high)
    for bounds in _PENS[1:]:
        low, high = (np.array(bound, np.uint8) for bound in bounds)
        cv2.bitwise_or(found, cast(Any, cv2).inRange(hsv, low, high), found)
    return found
