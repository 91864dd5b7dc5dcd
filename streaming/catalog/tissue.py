"""Where the tissue lies on a slide: a grid of cells, and the share of a window that is tissue.

The tissue grid answers before a tile is read (on a thumbnail at 8 µm/px: Otsu on saturation, without pens and black);
the HSV rule (`streaming.reading.hsv_rule`) looks at the pixels of a tile that was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from streaming.catalog.pen import pen_pixels
from streaming.errors import SlideError
from streaming.slide import Slide, geometry, resample
from streaming.slide.resample import Pixels
from streaming.vision import cv2

THUMBNAIL_MPP = 8.0
CELL_THUMBNAIL_PX = 8
CELL_UM = THUMBNAIL_MPP * CELL_THUMBNAIL_PX

# Otsu splits whatever it is given: glass alone into noise, tissue alone into pale and dark. Below 8 (of 255) OpenCV's
# saturation is glass by the published HSV rule; above 50 everything stained is tissue (seen on both test slides).
_OTSU_BOUNDS = (8.0, 50.0)

# A pixel of less value is black: a label's, an edge's, or not scanned. Its saturation is noise.
_BLACK = 40
# A pen's mark is looked for on every other pixel, so of 256 µm²; tissue (a cell of the grid) and holes on all.
_SMALLEST_PEN_PX, _SMALLEST_TISSUE_PX, _LARGEST_HOLE_PX = 8, CELL_THUMBNAIL_PX**2, 780
_FADING_PX = 2
_SQUARE = np.ones((3, 3), np.uint8)
_MEDIAN_PX = 5
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)

# Red, green and blue of real slides' brightest twentieth lie within 7 of one another, also of windows in the midst of
# tissue; where YCbCr was converted twice, or not at all, 87 apart and more.
_BRIGHTEST, _MAX_GLASS_SPREAD = 0.95, 40

# Level pixels read at once while a thumbnail is made: bounds memory for slides that have only their full resolution.
_STRIP_PX = 2**25


Colour = tuple[int, int, int]


@dataclass(frozen=True)
class TissueGrid:
    """Tissue fraction of square cells; row 0, column 0 at the slide's top-left corner.

    fraction: uint8 (rows, columns), 255 where a cell is all tissue. A cell's side is cell_um.
    """

    fraction: NDArray[np.uint8]
    threshold: float
    cell_um: float = CELL_UM

    @property
    def area_mm2(self) -> float:
        """Tissue area in mm²."""
        return float(self.fraction.sum(dtype=np.int64)) / 255 * (self.cell_um / 1000) ** 2


def thumbnail(slide: Slide, mpp: float = THUMBNAIL_MPP) -> Pixels:
    """The whole slide at a coarse resolution, uint8 (h, w, 3), read in strips so that no level is in memory whole.

    What lies outside its bounds is black, as what was not scanned is.

    Raises:
        SlideError: the slide has no mpp or can't be decoded.
    """
    if slide.mpp is None:
        raise SlideError(f"{slide.uri}: {slide.no_mpp}; give it by --slide-mpp, or a column `mpp` of a table")
    source = geometry.tile_source(slide.mpp, slide.level_downsamples, mpp, geometry.MPP_TOLERANCE)
    level_width, level_height = slide.level_dimensions[source.level]
    scale = mpp / source.level_mpp
    width, height = max(1, round(level_width / scale)), max(1, round(level_height / scale))
    reduction = min(source.reduction or geometry.safe_reduction(scale), level_width, level_height)
    columns, rows = level_width // reduction, level_height // reduction
    image = np.empty((height, width, 3), dtype=np.uint8)
    strip = max(1, int(_STRIP_PX / (level_width * scale)))
    for top in range(0, height, strip):
        bottom = min(top + strip, height)
        first, last = round(top * rows / height), round(bottom * rows / height)
        size = columns * reduction, max(1, last - first) * reduction
        pixels = slide.read_region((0, round(first * reduction * source.downsample)), source.level, size, reduction)
        if source.reduction:  # they are of nearly that size
            how = cv2.INTER_LINEAR_EXACT
            cv2.resize(pixels, (width, bottom - top), dst=image[top:bottom], interpolation=how)
        else:
            resample.resize(pixels, image[top:bottom])
    blacken_outside(image, slide)
    return image


def blacken_outside(image: Pixels, slide: Slide) -> None:
    """Sets what lies outside a slide's bounds to 0 in a picture of all of it, (h, w, …)."""
    height, width = image.shape[:2]
    left, top, wide, high = (
        side * length / whole
        for side, length, whole in zip(slide.bounds, (width, height) * 2, slide.level_dimensions[0] * 2, strict=True)
    )
    image[: round(top)] = image[round(top + high) :] = 0
    image[:, : round(left)] = image[:, round(left + wide) :] = 0


def tissue_of_thumbnail(image: Pixels, mask: Pixels | None = None, *, within: bool = False) -> TissueGrid:
    """The tissue fraction of each cell of a slide, from its thumbnail at 8 µm/px, uint8 (h, w, 3).

    mask, uint8 (h, w), tells how far each pixel is tissue, 255 whole, instead of the thumbnail, or `within` it beside.
    What lies past the slide's edge is background.
    """
    own, threshold = tissue_pixels(image)
    height, width = own.shape
    rows, columns = -(-height // CELL_THUMBNAIL_PX), -(-width // CELL_THUMBNAIL_PX)
    share = np.zeros((rows * CELL_THUMBNAIL_PX, columns * CELL_THUMBNAIL_PX), dtype=np.uint8)
    share[:height, :width] = own if mask is None else np.minimum(own, mask) if within else mask
    fraction = cv2.resize(share, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return TissueGrid(fraction=fraction, threshold=threshold)


def tissue_pixels(image: Pixels) -> tuple[Pixels, float]:
    """Which pixels of a thumbnail at 8 µm/px, uint8 (h, w, 3), are tissue, 255 or 0, uint8 (h, w); and the threshold.

    Saturated above Otsu's threshold, which is that of what is neither pen nor black: what was not scanned, the slide's
    label and edge. The median of its neighbourhood is looked at, so that pale tissue is not speckled, and threads as
    thin as a coverslip's edge go; so do specks, and holes as small as a vessel are filled. All is in whole numbers.
    """
    hsv = cast(Pixels, cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    # As a plane of its own: what follows takes twice as long on every third byte.
    saturation = cast(Pixels, cv2.medianBlur(cv2.extractChannel(hsv, 1), _MEDIAN_PX))
    counts, odd = _histogram(saturation), _odd(_halved(hsv))
    is_odd = np.zeros(0, np.bool_)
    if cv2.countNonZero(odd):
        is_odd = _doubled(odd, saturation.shape) > 0
        counts -= _histogram(saturation[is_odd].reshape(-1, 1))
    threshold = float(np.clip(otsu(counts), *_OTSU_BOUNDS))
    found = cast(Pixels, cv2.threshold(saturation, threshold, 255, cv2.THRESH_BINARY)[1])
    if len(is_odd):
        found[is_odd] = 0
    _clean(found, _SMALLEST_TISSUE_PX, _LARGEST_HOLE_PX)
    if len(is_odd):
        found[is_odd] = 0
    return found, threshold


def _odd(hsv: Pixels) -> Pixels:
    """What is a pen's or black, and what fades out beside it, 255 or 0, of every other pixel of a thumbnail."""
    odd = pen_pixels(hsv)
    odd[cv2.extractChannel(hsv, 2) < _BLACK] = 255
    # Dark nuclei and pigment are as black here and there; pens and edges are wide.
    _clean(odd, _SMALLEST_PEN_PX)
    if cv2.countNonZero(odd):
        odd = cast(Pixels, cv2.dilate(odd, _SQUARE, iterations=_FADING_PX))
    return odd


def _halved(image: Pixels) -> Pixels:
    """Every other pixel, the first of them, of both sides."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    halved = np.empty((-(-image.shape[0] // 2), -(-image.shape[1] // 2), *image.shape[2:]), np.uint8)
    if height and width:
        # Of an even size OpenCV's nearest pixels are these, in a fifth of NumPy's time.
        cv2.resize(image[: 2 * height, : 2 * width], (width, height), halved[:height, :width], 0, 0, cv2.INTER_NEAREST)
    halved[height:], halved[:, width:] = image[2 * height :: 2, ::2], image[::2, 2 * width :: 2]
    return halved


def _doubled(mask: Pixels, shape: tuple[int, ...]) -> Pixels:
    """A mask of every other pixel as one of all, uint8 (h, w)."""
    height, width = mask.shape
    doubled = cv2.resize(mask, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
    return cast(Pixels, np.ascontiguousarray(doubled[: shape[0], : shape[1]]))


def _clean(mask: Pixels, least: int, largest_hole: int = 0) -> None:
    """Takes pieces of fewer than `least` pixels out of a mask, 255 or 0, uint8 (h, w), and fills holes up to a size.

    Pixels of a piece touch at a side or corner, and are counted with its holes; those of a hole touch at sides.
    """
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    specks, holes = list[Any](), list[Any]()
    is_speck = [False] * len(outlines)
    for number, outline in enumerate(outlines):
        parent, length = int(tree[0, number, 3]), len(outline)
        # Pick's theorem: of a polygon of whole coordinates, area - length / 2 + 1 lie within, and `length` on it. Long
        # outlines are large, and not measured.
        if parent < 0 and length < 2 * least and cv2.contourArea(outline) + length / 2 + 1 < least:
            is_speck[number] = True
            specks.append(outline)
        is_short_hole = parent >= 0 and length <= 2 * largest_hole + 2 and not is_speck[parent]
        if is_short_hole and cv2.contourArea(outline) - length / 2 + 1 <= largest_hole:
            holes.append(outline)
    cv2.drawContours(mask, specks, -1, 0, cv2.FILLED)
    cv2.drawContours(mask, holes, -1, 255, cv2.FILLED)


def _histogram(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each value is there, int64 (256,). OpenCV counts ten times as fast as NumPy, in float32: by parts."""
    rows = max(1, 2**24 // values.shape[1])
    parts = (values[at : at + rows] for at in range(0, len(values), rows))
    return sum(
        (cv2.calcHist([part], [0], None, [256], [0, 256]).ravel().astype(np.int64) for part in parts),
        np.zeros(256, np.int64),
    )


def odd_glass(image: Pixels, tissue: TissueGrid) -> Colour | None:
    """Mean red, green and blue of a slide's glass, if it is far from grey; image is its thumbnail, uint8 (h, w, 3).

    Glass is the brightest twentieth of the slide. Where a third and more is background, and so grey, it may be dark.
    """
    image = _halved(image)
    saturation = cv2.extractChannel(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), 1)
    _, saturated = cv2.threshold(saturation, tissue.threshold, 1, cv2.THRESH_BINARY)
    if cv2.countNonZero(saturated) < saturation.size * 2 / 3:
        return None
    brightness = image.sum(axis=2, dtype=np.uint16)
    darker = np.cumsum(np.bincount(brightness.ravel()))
    glass = image[brightness >= np.searchsorted(darker, _BRIGHTEST * brightness.size)]
    red, green, blue = (round(float(value)) for value in glass.mean(axis=0))
    return (red, green, blue) if max(red, green, blue) - min(red, green, blue) > _MAX_GLASS_SPREAD else None


def otsu(histogram: NDArray[np.int64]) -> int:
    """The level that parts a histogram, int64 (levels,), best: what is not above it, and what is.

    The variance between both classes is the largest (Otsu 1979; of several levels, the lowest). In whole numbers, for
    OpenCV's floats leave the choice to the compiler where two levels are nearly as good.
    """
    counts = cast("list[int]", histogram.tolist())
    total, mass = sum(counts), sum(level * count for level, count in enumerate(counts))
    below = mass_below = best = 0
    best_numerator, best_denominator = 0, 1
    for level, count in enumerate(counts):
        below += count
        mass_below += level * count
        # total⁴ times the variance between classes, as a fraction
        numerator, denominator = (total * mass_below - below * mass) ** 2, below * (total - below)
        if denominator and numerator * best_denominator > best_numerator * denominator:
            best, best_numerator, best_denominator = level, numerator, denominator
    return best


def window_fraction(
    fraction: NDArray[np.uint8],
    start: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    top: NDArray[np.float64],
    left: NDArray[np.float64],
    extent: NDArray[np.float64] | float,
) -> NDArray[np.float64]:
    """Share of each square window's area that is tissue, float64 (n,), for windows on many slides at once.

    fraction holds the tissue grids of all slides flat, row after row; window i lies on the one of rows[i] × columns[i]
    cells that begins at start[i]. top, left and extent (n,) are in cells and may be fractional; what lies off the grid
    counts as background. A window has the same share to the bit, alone or among others, on every machine.
    """
    span = np.arange(int(np.ceil(np.max(extent, initial=0))) + 1)[:, None]
    row, column = np.floor(top).astype(np.int64) + span, np.floor(left).astype(np.int64) + span
    row_cover = np.minimum(row + 1, top + extent) - np.maximum(row, top)
    row_cover = np.where((row >= 0) & (row < rows), np.maximum(row_cover, 0), 0)
    column_cover = np.minimum(column + 1, left + extent) - np.maximum(column, left)
    column_cover = np.where((column >= 0) & (column < columns), np.maximum(column_cover, 0), 0)
    row_start = start + np.clip(row, 0, rows - 1) * columns
    column = np.clip(column, 0, columns - 1)
    total = np.zeros(len(start), dtype=np.float64)
    for cover, begin in zip(row_cover, row_start, strict=True):
        # Added up one after the other. `sum` would add the only column of a window alone in pairs, so that the last bit
        # of its share might be another than among others.
        total += cover * np.add.accumulate(column_cover * fraction[begin + column], axis=0)[-1]
    return total / (255 * extent * extent)
