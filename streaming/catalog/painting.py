"""Shapes as pixels: which of a canvas they cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely

from streaming.catalog.geojson import Points, Shape
from streaming.slide.resample import Pixels
from streaming.vision import cv2

FINER = 4
"""times as fine as wanted are shapes painted before they are averaged down, as cv2 paints half a pixel too far"""
_SHIFT = 4  # bits of sub-pixels of cv2's polygons
_FAR = 1 << 24  # px of a canvas beyond which cv2, which counts sub-pixels in 32 bits, would wrap around
_BAND = 128  # rows that are painted at once: a whole slide would take gigabytes


def fill(canvas: Pixels, shape: Shape, x: float, y: float, scale: float, value: int = 1) -> None:
    """Paints a shape on a canvas whose corner is at (x, y) and of which `scale` px show one level-0 px."""
    for rings in shape.rings:
        places = [(ring - (x, y)) * scale for ring in rings]
        if max(np.abs(ring).max() for ring in places) > _FAR:
            places = _near(places, canvas.shape)
        if places:
            corners = [((ring - 0.5) * (1 << _SHIFT)).round().astype(np.int32) for ring in places]
            cv2.fillPoly(canvas, corners, [value], shift=_SHIFT)


def _near(rings: Sequence[Points], shape: tuple[int, ...]) -> list[Points]:
    """What of a polygon lies on a canvas, and a little beyond."""
    height, width = shape
    found: Any = shapely.clip_by_rect(shapely.Polygon(rings[0], rings[1:]), -width, -height, 2 * width, 2 * height)
    parts: Any = [part for part in shapely.get_parts(found) if part.geom_type == "Polygon"]
    return [shapely.get_coordinates(ring) for part in parts for ring in (part.exterior, *part.interiors)]


def coverage(shapes: Sequence[tuple[Shape, bool]], height: int, width: int, scale: float) -> Pixels:
    """How far each pixel of a picture is covered, uint8 (height, width), 255 whole; `scale` px show one level-0 px.

    Shapes count in their order: one that is True covers, one that is False takes away.
    """
    covered = np.zeros((height, width), dtype=np.uint8)
    for top in range(0, height, _BAND):
        band = covered[top : top + _BAND]
        fine = np.zeros((len(band) * FINER, width * FINER), dtype=np.uint8)
        for shape, counts in shapes:
            fill(fine, shape, 0.0, top / scale, scale * FINER, 255 * counts)
        band[:] = np.rint(fine.reshape(len(band), FINER, width, FINER).mean(axis=(1, 3), dtype=np.float32))
    return covered
