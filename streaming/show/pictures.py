"""Small pictures of slides, of their tissue, and of tiles."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from streaming import storage
from streaming.catalog.schema import SlideRow
from streaming.catalog.tissue import CELL_UM, TissueGrid, thumbnail
from streaming.errors import ConfigError
from streaming.slide import Slide, open_slide
from streaming.slide.resample import Pixels
from streaming.vision import cv2

_TINT = np.array([20, 150, 110], dtype=np.float64)  # of tissue cells on a picture
_LEAST_GRID_PX = 6  # side of cells that are parted by lines
_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def slide_thumbnail(uri: str, slide_mpp: float, width: int, options: storage.StorageOptions | None = None) -> Pixels:
    """The whole slide, uint8 (h, width, 3); slide_mpp is its µm/px at level 0.

    Raises:
        SlideError, StorageError: it can't be read.
    """
    with contextlib.closing(open_slide(uri, options)) as slide:
        slide.mpp = slide_mpp
        return picture_of(slide, width)


def picture_of(slide: Slide, width: int) -> Pixels:
    """An open slide of known mpp as a whole, uint8 (h, width, 3).

    Raises:
        SlideError, StorageError: it can't be read.
    """
    assert slide.mpp is not None, "whoever opened it knows its mpp, or gave it any"
    width_px, height_px = slide.level_dimensions[0]
    image = thumbnail(slide, max(slide.mpp, width_px * slide.mpp / width))
    return shrunk(image, width, round(width * height_px / width_px))


def with_tissue(image: Pixels, row: SlideRow, tissue: TissueGrid, min_tissue: float) -> Pixels:
    """A picture of a whole slide, uint8 (h, w, 3), on which cells with at least that share of tissue are tinted."""
    cell = image.shape[1] * CELL_UM / (row.width * row.mpp)  # a cell's side in pixels of the picture
    enough = tissue.fraction >= 255 * min_tissue
    ys, xs = ((np.arange(n) / cell).astype(int) for n in image.shape[:2])
    inside = enough[np.ix_(ys.clip(max=enough.shape[0] - 1), xs.clip(max=enough.shape[1] - 1))]
    shown = image.astype(np.float64)
    shown[inside] = 0.88 * shown[inside] + 0.12 * _TINT
    if cell < _LEAST_GRID_PX:  # of a whole slide: lines would hide it
        return shown.astype(np.uint8)
    lines = inside & ((np.diff(ys, prepend=-1) > 0)[:, None] | (np.diff(xs, prepend=-1) > 0)[None, :])
    shown[lines] = 0.7 * shown[lines] + 0.3 * _TINT
    return shown.astype(np.uint8)


def shrunk(pixels: Pixels, width: int, height: int) -> Pixels:
    """A picture at that size, at least one px high."""
    return np.asarray(cv2.resize(pixels, (width, max(1, height)), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def mosaic(tiles: Sequence[Pixels], columns: int, side: int, gap: int = 3) -> Pixels:
    """Tiles in rows of so many, each uint8 (side, side, 3) on grey, the first one at the top left."""
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 128, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (side + gap), i % columns * (side + gap)
        canvas[top : top + side, left : left + side] = shrunk(tile, side, side)
    return canvas


def kind_of(uri: str) -> str:
    """The kind of picture that a file is to be, by its suffix.

    Raises:
        ConfigError: it is none that we write.
    """
    kind = next((kind for suffix, kind in _KINDS.items() if uri.lower().endswith(suffix)), None)
    if kind is None:
        raise ConfigError(f"{uri}: a picture is a {', '.join(_KINDS)} file; end its name so")
    return kind


def write_picture(uri: str, pixels: Pixels, options: storage.StorageOptions | None = None) -> None:
    """Writes a picture, uint8 (h, w, 3), to a local file or URI.

    Raises:
        ConfigError: its suffix is of no picture that we write.
        StorageError: it can't be written.
    """
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind_of(uri), quality=90)
    storage.write_bytes(uri, content.getvalue(), options)
