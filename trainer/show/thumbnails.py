"""Small pictures of slides and of their tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streaming import storage
from streaming.catalog.tissue import thumbnail
from streaming.slide import open_slide
from streaming.slide.resample import Pixels
from streaming.vision import cv2
from trainer.embed.files import SlideEmbeddings


def slide_thumbnail(uri: str, slide_mpp: float, width: int, options: storage.StorageOptions | None = None) -> Pixels:
    """The whole slide, uint8 (h, width, 3); slide_mpp is its µm/px at level 0.

    Raises:
        SlideError, StorageError: it can't be read.
    """
    slide = open_slide(uri, options, mpp=slide_mpp)
    try:
        width_px, height_px = slide.level_dimensions[0]
        image = thumbnail(slide, max(slide_mpp, width_px * slide_mpp / width))
    finally:
        slide.close()
    return shrunk(image, width, round(width * height_px / width_px))


def shrunk(pixels: Pixels, width: int, height: int) -> Pixels:
    """A picture at that size, at least one px high."""
    return np.asarray(cv2.resize(pixels, (width, max(1, height)), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def tile_pixels(
    slides: Sequence[SlideEmbeddings],
    chosen: Sequence[tuple[int, int]],
    side: int,
    options: storage.StorageOptions | None = None,
) -> list[Pixels]:
    """Tiles, each by its slide's number and its own within it, uint8 (side, side, 3).

    Raises:
        SlideError, StorageError: one can't be read.
    """
    found: dict[tuple[int, int], Pixels] = {}
    for number in sorted({number for number, _ in chosen}):
        about, corners = slides[number].about, slides[number].corners
        opened = open_slide(about.slide, options, mpp=about.slide_mpp)
        try:
            for key in {key for key in chosen if key[0] == number}:
                x, y = (int(at) for at in corners[key[1]])
                tile = opened.read_tile(x, y, about.mpp, about.size, tolerance=0.0)
                found[key] = shrunk(tile, side, side)
        finally:
            opened.close()
    return [found[key] for key in chosen]
