"""Shapes with classes on a slide, cut into tiles with a label, a mask or points each.

A shape of class `Region*` bounds where everything was annotated: inside, what no shape covers is background; without
any, it is unknown. `Ignore*` covers what shall not count. Coordinates are level-0 pixels (an image's own pixels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.geojson import Annotation, Layer, Points, Shape
from streaming.catalog.painting import FINER, fill
from streaming.catalog.tiling import Tiling, tile_extent
from streaming.errors import ConfigError
from streaming.slide.resample import Pixels
from trainer.embed.table_slides import TableSlides
from trainer.evaluate.image_files import read_image

Target = Literal["class", "mask", "points"]
Mask = Callable[[int, int], Pixels]

BACKGROUND = "background"
_IGNORED = 255
_MIN_INSIDE = 0.75  # share of a tile that shapes of its class must cover
_CELLS = 64  # into which a tile's side is divided to measure such shares; fine, as cv2 paints half a cell too far


@dataclass(frozen=True, kw_only=True)
class AnnotatedTiles:
    """Which tiles of annotated slides become samples."""

    mpp: float = 0.5
    """µm/px of the tiles"""
    size: int = 256
    """side of a tile in px"""
    target: Target | None = None
    """what of the annotation is wanted; none: points where there are any, else classes"""

    def __post_init__(self) -> None:
        if not 0 < self.mpp < math.inf or self.size < 1:
            raise ConfigError(f"mpp {self.mpp}, size {self.size}: both must be above 0")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tile with what the annotation says of it."""

    x: int
    y: int
    label: int
    mask: Mask
    points: Points


def class_names(found: Sequence[Annotation], target: Target) -> tuple[str, ...]:
    """The classes of some annotations in order; of masks, `background` first where it is known."""
    wanted = "points" if target == "points" else "area"
    names = {shape.name for one in found for shape in one.shapes.shapes if getattr(shape, wanted) is not None}
    known = target == "mask" and any(one.regions.shapes for one in found)
    return (*([BACKGROUND] if known else []), *sorted(names - {BACKGROUND} if known else names))


def cut_tiles(
    place: str,
    annotation: Annotation,
    classes: Sequence[str],
    wanted: AnnotatedTiles,
    target: Target,
    *,
    slides: TableSlides | None,
    options: storage.StorageOptions | None = None,
) -> list[Cut]:
    """The tiles of one slide, as `Tiling` lays them out, that the annotation tells the target of.

    For classes: those that shapes of one class cover by three quarters. For masks: those that touch a shape, or lie in
    a `Region*`. For points: those that lie in a `Region*`; where there is none, in the box around all points. An image
    is one tile. slides opens slides; None: the place is an image.

    Raises:
        ConfigError: the slide is not found.
        SlideError: it has no mpp, or too coarse a one for what is asked for.
        StorageError: it can't be read.
    """
    if slides is None:
        height, width = read_image(place, options).shape[:2]
        side = max(width, height)
        return [_cut(annotation, _Marks.of(annotation, classes, target), classes, 0, 0, 1.0, side, 0)]
    tiling, corner = _tiling(place, wanted, slides)
    if not tiling.columns or not tiling.rows:
        return []
    annotation = annotation.moved(*corner)
    marks = _Marks.of(annotation, classes, target)
    shares = _shares(annotation.shapes, classes, tiling)
    chosen = _chosen(annotation, shares, marks, tiling, target)
    corners, labels = tiling.corners()[chosen], shares.argmax(axis=0)[chosen]
    scale = wanted.size / tiling.extent
    return [
        _cut(annotation, marks, classes, x, y, scale, wanted.size, label)
        for (x, y), label in zip(corners.tolist(), labels.tolist(), strict=True)
    ]


def _tiling(place: str, wanted: AnnotatedTiles, slides: TableSlides) -> tuple[Tiling, tuple[int, int]]:
    """How a slide is cut, and where what was scanned of it begins."""
    slide = slides.open(place, wanted.mpp)
    try:
        (width, height), mpp, bounds = slide.level_dimensions[0], slide.mpp, slide.bounds
    finally:
        slide.close()
    assert mpp is not None, "it is opened with one"
    extent = tile_extent(wanted.size, wanted.mpp, mpp)
    return Tiling.of(width, height, extent), bounds[:2]


def _chosen(
    annotation: Annotation, shares: NDArray[np.float64], marks: _Marks, tiling: Tiling, target: Target
) -> NDArray[np.bool_]:
    """Which tiles (rows, columns) the target is known of, from the shares (K, rows, columns) that classes cover."""
    if target == "class":
        return shares.max(axis=0) >= _MIN_INSIDE
    regions = annotation.regions
    inside = _shares(regions, sorted({shape.name for shape in regions.shapes}), tiling).sum(axis=0) > 1 - 1e-9
    if target == "mask":
        return inside | (shares.max(axis=0) > 0)
    if regions.shapes:
        return inside
    chosen = np.zeros((tiling.rows, tiling.columns), dtype=bool)
    if len(marks.places):
        # The points' own bounds, in tiles.
        ends = marks.places.min(axis=0), marks.places.max(axis=0)
        (left, top), (right, bottom) = ((end // tiling.extent).astype(int).clip(min=0) for end in ends)
        chosen[top : bottom + 1, left : right + 1] = True
    return chosen


def _shares(layer: Layer, classes: Sequence[str], tiling: Tiling) -> NDArray[np.float64]:
    """Share of each tile's area that shapes of each class cover; (K, rows, columns)."""
    rows, columns, extent = tiling.rows, tiling.columns, tiling.extent
    shares = np.zeros((len(classes), rows, columns))
    for row in range(rows):  # a band of tiles at a time: the whole slide would take too much memory
        within = layer.within(0.0, row * extent, columns * extent, (row + 1) * extent)
        canvases: dict[str, Pixels] = {}
        for shape in within:
            if shape.name not in canvases:
                canvases[shape.name] = np.zeros((_CELLS, columns * _CELLS), dtype=np.uint8)
            fill(canvases[shape.name], shape, 0, row * extent, _CELLS / extent)
        for name, canvas in canvases.items():
            if name in classes:
                cells = canvas.reshape(_CELLS, columns, _CELLS)
                shares[classes.index(name), row] = cells.mean(axis=(0, 2), dtype=np.float64)
    return shares


def _cut(
    annotation: Annotation,
    marks: _Marks,
    classes: Sequence[str],
    x: int,
    y: int,
    scale: float,
    size: int,
    label: int,
) -> Cut:
    """A tile at (x, y) of which `scale` px show one level-0 px."""

    def mask(height: int, width: int) -> Pixels:
        to = scale * max(height, width) / size
        box = (x, y, x + width / to, y + height / to)
        canvas = np.full((height, width), _IGNORED, dtype=np.uint8)
        painted = [(shape, BACKGROUND) for shape in annotation.regions.within(*box)]
        painted += [(shape, shape.name) for shape in annotation.shapes.within(*box)]
        for shape, name in [*painted, *((shape, None) for shape in annotation.ignored.within(*box))]:
            _paint(canvas, shape, x, y, to, _IGNORED if name is None else classes.index(name))
        return canvas

    return Cut(x=x, y=y, label=label, mask=mask, points=marks.within(x, y, scale, size))


def _paint(canvas: Pixels, shape: Shape, x: float, y: float, scale: float, value: int) -> None:
    """Gives the pixels that a shape covers by half that value; as `fill`, but to a sub-pixel."""
    bounds = (np.array(shapely.bounds(shape.area)).reshape(2, 2) - (x, y)) * scale
    (left, top), (right, bottom) = np.clip([np.floor(bounds[0]), np.ceil(bounds[1])], 0, canvas.shape[::-1]).astype(int)
    fine = np.zeros(((bottom - top) * FINER, (right - left) * FINER), dtype=np.uint8)
    if not fine.size:
        return
    fill(fine, shape, x + left / scale, y + top / scale, scale * FINER)
    covered = fine.reshape(bottom - top, FINER, right - left, FINER).mean(axis=(1, 3)) >= 0.5
    canvas[top:bottom, left:right][covered] = value


@dataclass(frozen=True)
class _Marks:
    """The points of a slide, from the top to the bottom."""

    places: Points
    """(n, 2), level-0 px"""
    codes: NDArray[np.int64]
    """index of each one's class"""

    @classmethod
    def of(cls, annotation: Annotation, classes: Sequence[str], target: Target) -> _Marks:
        """Those of an annotation; none where they are not the target."""
        shapes = annotation.shapes.shapes if target == "points" else ()
        pointed = [(shape.points, classes.index(shape.name)) for shape in shapes if shape.points is not None]
        if not pointed:
            return cls(np.zeros((0, 2)), np.zeros(0, np.int64))
        places = np.concatenate([points for points, _ in pointed])
        codes = np.repeat([code for _, code in pointed], [len(points) for points, _ in pointed])
        order = np.argsort(places[:, 1], kind="stable")
        return cls(places[order], codes[order])

    def within(self, x: int, y: int, scale: float, size: int) -> Points:
        """Points (n, 3) of a tile: x, y in its pixels, index of the class."""
        first, last = np.searchsorted(self.places[:, 1], (y, y + size / scale))
        places = (self.places[first:last] - (x, y)) * scale
        found = np.column_stack([places, self.codes[first:last]]).astype(np.float64)
        return found[((places >= 0) & (places < size)).all(axis=1)]
