"""QuPath's GeoJSON: shapes with classes on a slide, cut into tiles with a label, a mask or points each.

A shape of class `Region*` bounds where everything was annotated: inside, what no shape covers is background; without
any, it is unknown. `Ignore*` covers what shall not count. Coordinates are level-0 pixels (an image's own pixels).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import ConfigError, SlideError
from streaming.slide import open_slide
from streaming.slide.resample import Pixels
from streaming.vision import cv2
from trainer.embed.tiling import Tiling, tile_extent
from trainer.evaluate.image_files import read_image

Target = Literal["class", "mask", "points"]
Points = NDArray[np.float64]
Mask = Callable[[int, int], Pixels]

BACKGROUND = "background"
_IGNORED = 255
_REGION, _IGNORE = "Region*", "Ignore*"
_MIN_INSIDE = 0.75  # share of a tile that shapes of its class must cover
_CELLS = 64  # into which a tile's side is divided to measure such shares; fine, as cv2 paints half a cell too far
_FINER = 4  # times as fine as the mask itself, for the same reason, are shapes painted before they are averaged down
_MAX_UPSAMPLING = 1.25  # scanners' mpp vary (0.2527 for 0.25); beyond it, a slide does not have what is asked for
_SHIFT = 4  # bits of sub-pixels of cv2's polygons
_AREAS, _MARKS = ("Polygon", "MultiPolygon"), ("Point", "MultiPoint")


@dataclass(frozen=True, kw_only=True)
class AnnotatedTiles:
    """Which tiles of annotated slides become samples."""

    mpp: float = 0.5
    """µm/px of the tiles"""
    size: int = 256
    """side of a tile in px"""
    slide_mpp: float | None = None
    """µm/px at level 0 of slides whose metadata has none"""
    target: Target | None = None
    """what of the annotation is wanted; none: points where there are any, else classes"""

    def __post_init__(self) -> None:
        if not self.mpp > 0 or self.size < 1:
            raise ConfigError(f"mpp {self.mpp}, size {self.size}: both must be above 0")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Something with a class: an area of rings (n, 2) filled by the even-odd rule, or points (n, 2)."""

    name: str
    rings: tuple[Points, ...] = ()
    points: Points | None = None

    def touches(self, left: float, top: float, right: float, bottom: float) -> bool:
        """Whether the area's bounding box meets a box."""
        if not self.rings:
            return False
        low, high = self._bounds
        return bool(low[0] < right and high[0] > left and low[1] < bottom and high[1] > top)

    def moved(self, by: tuple[int, int]) -> Shape:
        """The same so many pixels right and down."""
        points = None if self.points is None else self.points + by
        return Shape(name=self.name, rings=tuple(ring + by for ring in self.rings), points=points)

    @cached_property
    def _bounds(self) -> tuple[Points, Points]:
        every = np.concatenate(self.rings)
        return every.min(axis=0), every.max(axis=0)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What one file says of one slide."""

    source: str
    shapes: tuple[Shape, ...]
    regions: tuple[Shape, ...]
    ignored: tuple[Shape, ...]

    def moved(self, origin: tuple[int, int]) -> Annotation:
        """The same in level-0 px of the slide, where QuPath counts from another one of them."""
        if origin == (0, 0):
            return self

        def shapes(of: tuple[Shape, ...]) -> tuple[Shape, ...]:
            return tuple(shape.moved(origin) for shape in of)

        return replace(self, shapes=shapes(self.shapes), regions=shapes(self.regions), ignored=shapes(self.ignored))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tile with what the annotation says of it."""

    x: int
    y: int
    label: int
    mask: Mask
    points: Points


def read_annotation(uri: str, options: storage.StorageOptions | None = None) -> Annotation:
    """Reads a GeoJSON file: a FeatureCollection or a list of features, as QuPath exports them.

    Raises:
        ConfigError: it is no such file, or a shape has no class.
        StorageError: it can't be read.
    """
    try:
        content: Any = json.loads(storage.read_bytes(uri, options))
        features = content["features"] if isinstance(content, dict) and "features" in content else content
        features = [features] if isinstance(features, dict) else list(features)
        shapes = [shape for i, feature in enumerate(features) if (shape := _shape(uri, i, feature)) is not None]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{uri}: no GeoJSON as QuPath writes it ({type(error).__name__}: {error})") from error
    return Annotation(
        source=uri,
        shapes=tuple(shape for shape in shapes if shape.name not in (_REGION, _IGNORE)),
        regions=tuple(shape for shape in shapes if shape.name == _REGION),
        ignored=tuple(shape for shape in shapes if shape.name == _IGNORE),
    )


def _shape(uri: str, index: int, feature: dict[str, Any]) -> Shape | None:
    geometry, about = feature["geometry"], feature.get("properties") or {}
    kind, coordinates = geometry["type"], geometry["coordinates"]
    if kind not in (*_AREAS, *_MARKS):
        return None  # lines measure something
    classification = about.get("classification") or {}
    # A derived class ("Tumor: Positive") has the names of its parts instead.
    name = classification.get("name") or ": ".join(classification.get("names") or ())
    if not name:
        raise ConfigError(f"{uri}: shape {index + 1} ({kind}) has no class; give it one in QuPath, or delete it")
    if kind in _MARKS:
        return Shape(name=name, points=np.atleast_2d(np.array(coordinates, dtype=np.float64))[:, :2])
    polygons = [coordinates] if kind == "Polygon" else coordinates
    rings = tuple(np.array(ring, dtype=np.float64)[:, :2] for polygon in polygons for ring in polygon)
    if about.get("objectType") in ("cell", "detection"):
        return Shape(name=name, rings=rings, points=rings[0][:-1].mean(axis=0)[None])
    return Shape(name=name, rings=rings)


def class_names(found: Sequence[Annotation], target: Target) -> tuple[str, ...]:
    """The classes of some annotations in order; of masks, `background` first where it is known."""
    names = {shape.name for one in found for shape in one.shapes if target != "points" or shape.points is not None}
    known = target == "mask" and any(one.regions for one in found)
    return (*([BACKGROUND] if known else []), *sorted(names - {BACKGROUND} if known else names))


def cut_tiles(
    place: str,
    annotation: Annotation,
    classes: Sequence[str],
    wanted: AnnotatedTiles,
    target: Target,
    *,
    is_slide: bool,
    options: storage.StorageOptions | None = None,
) -> list[Cut]:
    """The tiles of one slide, as `Tiling` lays them out, that the annotation tells the target of.

    For classes: those that shapes of one class cover by three quarters. For masks: those that touch a shape, or lie in
    a `Region*`. For points: those that lie in a `Region*`; where there is none, in the box around all points. An image
    is one tile.

    Raises:
        SlideError: the slide has no mpp, or a coarser one than is asked for.
        StorageError: it can't be read.
    """
    if not is_slide:
        height, width = read_image(place, options).shape[:2]
        return [_cut(annotation, classes, 0, 0, 1.0, max(width, height), 0, target)]
    tiling, origin = _tiling(place, wanted, options)
    annotation = annotation.moved(origin)
    if not tiling.columns or not tiling.rows:
        return []
    shares = np.stack([_shares(_of(annotation, name), tiling) for name in classes])
    chosen = _chosen(annotation, shares, tiling, target)
    corners, labels = tiling.corners()[chosen], shares.argmax(axis=0)[chosen]
    scale = wanted.size / tiling.extent
    return [
        _cut(annotation, classes, x, y, scale, wanted.size, label, target)
        for (x, y), label in zip(corners.tolist(), labels.tolist(), strict=True)
    ]


def checked_mpp(place: str, mpp: float | None, wanted: float) -> float:
    """The µm/px of a slide, which must have what is wanted.

    Raises:
        SlideError: it is not known, or coarser.
    """
    if mpp is None:
        raise SlideError(f"{place}: no mpp in its metadata; give it by --slide-mpp")
    if mpp > wanted * _MAX_UPSAMPLING:
        raise SlideError(f"{place}: has {mpp:g} µm/px at best, {wanted:g} is asked for; take a coarser mpp")
    return mpp


def _tiling(
    place: str, wanted: AnnotatedTiles, options: storage.StorageOptions | None
) -> tuple[Tiling, tuple[int, int]]:
    """The tiles of a slide, and the level-0 px from which QuPath counts."""
    slide = open_slide(place, options, mpp=wanted.slide_mpp)
    try:
        (width, height), mpp, (left, top, _, _) = slide.level_dimensions[0], slide.mpp, slide.bounds
    finally:
        slide.close()
    extent = tile_extent(wanted.size, wanted.mpp, checked_mpp(place, mpp, wanted.mpp))
    return Tiling.of(width, height, extent), (left, top)


def _of(annotation: Annotation, name: str) -> list[Shape]:
    return [shape for shape in annotation.shapes if shape.name == name]


def _chosen(annotation: Annotation, shares: NDArray[np.float64], tiling: Tiling, target: Target) -> NDArray[np.bool_]:
    """Which tiles (rows, columns) the target is known of, from the shares (K, rows, columns) that classes cover."""
    inside = _shares(annotation.regions, tiling) > 1 - 1e-9
    if target == "class":
        return shares.max(axis=0) >= _MIN_INSIDE
    if target == "mask":
        return inside | (shares.max(axis=0) > 0)
    if annotation.regions:
        return inside
    points = np.concatenate([s.points for s in annotation.shapes if s.points is not None] or [np.zeros((0, 2))])
    chosen = np.zeros((tiling.rows, tiling.columns), dtype=bool)
    if len(points):
        # The points' own bounds, in tiles.
        ends = points.min(axis=0), points.max(axis=0)
        (left, top), (right, bottom) = ((end // tiling.extent).astype(int) for end in ends)
        chosen[top : bottom + 1, left : right + 1] = True
    return chosen


def _shares(shapes: Sequence[Shape], tiling: Tiling) -> NDArray[np.float64]:
    """Share of each tile's area that shapes cover; (rows, columns)."""
    rows, columns, extent = tiling.rows, tiling.columns, tiling.extent
    shares = np.zeros((rows, columns))
    for row in range(rows):  # a band of tiles at a time: the whole slide would take too much memory
        band = (0.0, row * extent, columns * extent, (row + 1) * extent)
        if within := [shape for shape in shapes if shape.touches(*band)]:
            canvas = np.zeros((_CELLS, columns * _CELLS), dtype=np.uint8)
            for shape in within:
                _fill(canvas, shape, 0, row * extent, _CELLS / extent)
            shares[row] = canvas.reshape(_CELLS, columns, _CELLS).mean(axis=(0, 2), dtype=np.float64)
    return shares


def _fill(canvas: Pixels, shape: Shape, x: float, y: float, scale: float) -> None:
    """Paints a shape in 1 on a canvas whose corner is at (x, y) and of which `scale` px show one level-0 px."""
    rings = [((ring - (x, y)) * scale - 0.5) * (1 << _SHIFT) for ring in shape.rings]
    if rings:
        cv2.fillPoly(canvas, [ring.round().astype(np.int32) for ring in rings], [1], shift=_SHIFT)


def _cut(
    annotation: Annotation,
    classes: Sequence[str],
    x: int,
    y: int,
    scale: float,
    size: int,
    label: int,
    target: Target,
) -> Cut:
    """A tile at (x, y) of which `scale` px show one level-0 px."""

    def mask(height: int, width: int) -> Pixels:
        to = scale * max(height, width) / size
        box = (x, y, x + width / to, y + height / to)
        canvas = np.full((height, width), _IGNORED, dtype=np.uint8)
        nested = sorted(annotation.shapes, key=_area, reverse=True)  # the smaller one lies above
        painted = [(shape, BACKGROUND) for shape in annotation.regions] + [(shape, shape.name) for shape in nested]
        for shape, name in [*painted, *((shape, None) for shape in annotation.ignored)]:
            if shape.touches(*box):
                fine = np.zeros((height * _FINER, width * _FINER), dtype=np.uint8)
                _fill(fine, shape, x, y, to * _FINER)
                covered = fine.reshape(height, _FINER, width, _FINER).mean(axis=(1, 3)) >= 0.5
                canvas[covered] = _IGNORED if name is None else classes.index(name)
        return canvas

    return Cut(x=x, y=y, label=label, mask=mask, points=_points(annotation, classes, x, y, scale, size, target))


def _points(
    annotation: Annotation, classes: Sequence[str], x: int, y: int, scale: float, size: int, target: Target
) -> Points:
    """Points (n, 3) within a tile: x, y in its pixels, index of the class."""
    rows = [np.zeros((0, 3))]
    if target == "points":
        for shape in annotation.shapes:
            if shape.points is not None:
                codes = np.full((len(shape.points), 1), float(classes.index(shape.name)))
                rows.append(np.hstack(((shape.points - (x, y)) * scale, codes)))
    points = np.concatenate(rows)
    return points[((points[:, :2] >= 0) & (points[:, :2] < size)).all(axis=1)]


def _area(shape: Shape) -> float:
    return sum(abs(float(cv2.contourArea(ring.astype(np.float32)))) for ring in shape.rings)
