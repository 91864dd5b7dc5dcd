"""What a tile covers: of which level it is read, how much of that, and on which of its blocks it lies.

Lengths are of that level's pixels unless they say level-0. The reader works out the same from a slide's own levels, by
the same `streaming.slide.geometry.tile_levels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.catalog.catalog import Levels
from streaming.slide import geometry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Corners = Literal["anywhere", "blocks"]


@dataclass(frozen=True)
class Footprint:
    """What tiles cover, as columns (n,)."""

    mpp: Floats
    """µm/px of the pixels that are read; of tiles that are resampled, the wanted one"""
    slide_mpp: Floats
    """µm/px at level 0"""
    downsample: Floats
    """level-0 pixels per pixel of the level"""
    reduction: Ints
    """by how much the slide's own pixels are reduced; 0: the tile is resampled"""
    extent: Floats
    """level-0 pixels of a tile's side"""
    side: Ints
    """what is read of the level, along each axis"""
    length: tuple[Ints, Ints]
    """the level's width and height"""
    block: tuple[Ints, Ints]
    """width and height of its blocks; 0 where unknown"""
    slide_length: tuple[Ints, Ints]
    """the slide's width and height in level-0 pixels"""
    bounds: tuple[Ints, Ints, Ints, Ints]
    """x, y, width and height of what was scanned, in level-0 pixels"""
    multiples: Floats | float = 1.0
    """of how many of its pixels a tile's corner is a multiple, along each axis"""

    @property
    def step(self) -> Floats:
        """Level-0 pixels of which a tile's corner is a multiple: whole pixels of the tile, or `multiples` of these.

        Then blocks can be decoded at 1/2, 1/4 or 1/8, and no pixel of a tile is shifted by a part of one.
        """
        resampled = np.maximum(1, np.rint(self.mpp / self.slide_mpp))
        return np.where(self.reduction > 0, self.downsample * self.reduction, resampled) * self.multiples

    def is_bounded(self, axis: int) -> NDArray[np.bool_]:
        """Whether a part of the slide was scanned only, along an axis (0: x)."""
        return self.bounds[2 + axis] < self.slide_length[axis]

    def first(self, axis: int) -> Floats:
        """The smallest level-0 pixel at which a tile may begin along an axis (0: x)."""
        return np.ceil(np.ceil(self.bounds[axis] / self.step) * self.step)

    def last(self, axis: int) -> Floats:
        """The largest level-0 pixel at which a tile may begin along an axis (0: x)."""
        reduction = np.maximum(1, self.reduction)
        own = (self.length[axis] - self.side) // reduction * (self.downsample * reduction)
        whole = np.floor(np.where(self.reduction > 0, own, self.slide_length[axis] - self.extent))
        scanned = np.floor(self.bounds[axis] + self.bounds[2 + axis] - self.extent)
        return np.where(self.is_bounded(axis), np.minimum(whole, scanned), whole)

    @property
    def unit(self) -> Ints:
        """Pixels of the level of which a tile's corner is a multiple, as `step` has it in level-0 pixels."""
        return np.maximum(1, np.rint(self.step / self.downsample)).astype(np.int64)

    def has_grid(self, axis: int) -> NDArray[np.bool_]:
        """Whether tiles can lie on blocks along an axis: these are known, and whole pixels of the tile.

        Not where a part of the slide was scanned only.
        """
        return (self.block[axis] > 0) & (self.block[axis] % self.unit == 0) & ~self.is_bounded(axis)

    def num_blocks(self, axis: int, corner: Ints) -> Ints:
        """Blocks that tiles touch along an axis which begin at a level-0 pixel, int64 (n,); 0 where unknown."""
        whole = np.maximum(1, self.reduction)
        start = np.rint(corner / (self.downsample * whole)).astype(np.int64) * whole  # as the reader rounds it
        block = np.maximum(1, self.block[axis])
        return np.where(self.block[axis] > 0, (start + self.side - 1) // block - start // block + 1, 0)

    def fits(self) -> NDArray[np.bool_]:
        """Whether a tile fits its slide, and what of it was scanned."""
        whole = np.minimum(*self.length) >= self.side
        fits = np.where(self.reduction > 0, whole, self.extent <= np.minimum(*self.slide_length))
        for axis in (0, 1):
            fits &= ~self.is_bounded(axis) | (self.first(axis) <= self.last(axis))
        return fits


@dataclass(frozen=True)
class SlideGeometry:
    """What a catalog tells of its slides' pixels, by row, and the side of a tile in px."""

    size: int
    mpp: Floats
    """µm/px at level 0"""
    length: tuple[Ints, Ints]
    """width and height in level-0 pixels"""
    bounds: Ints
    """(slides, 4)"""
    levels: Levels

    @classmethod
    def of_catalog(cls, catalog: Catalog, size: int) -> SlideGeometry:
        """That of tiles of `size` px."""
        lengths = catalog.column("width"), catalog.column("height")
        return cls(size, catalog.column("mpp"), lengths, catalog.bounds(), catalog.levels())

    def levels_for(
        self, wanted: float, tolerance: float, slides: NDArray[np.integer] | None = None
    ) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
        """Level and reduction at which some slides, or all, give tiles of a wanted mpp, int8 (n,) each."""
        at = slice(None) if slides is None else slides
        found = geometry.tile_levels(self.mpp[at], self.levels.downsample[at], wanted, tolerance)
        level, reduction = (each.astype(np.int8) for each in found)
        return level, reduction

    def footprint(
        self, wanted: Floats, slide: NDArray[np.integer], level: NDArray[np.int8], reduction: NDArray[np.int8]
    ) -> Footprint:
        """That of tiles of a wanted mpp, each of a level and its reduction; all (n,)."""
        reduced, slide_mpp, downsample = (
            reduction.astype(np.int64),
            self.mpp[slide],
            self.levels.downsample[slide, level],
        )
        level_mpp, is_own = slide_mpp * downsample, reduced > 0
        resampled = np.maximum(1, np.rint(self.size * wanted / level_mpp)).astype(np.int64)
        return Footprint(
            mpp=np.where(is_own, level_mpp * reduced, wanted),
            slide_mpp=slide_mpp,
            downsample=downsample,
            reduction=reduced,
            extent=np.where(is_own, self.size * reduced * downsample, self.size * wanted / slide_mpp),
            side=np.where(is_own, self.size * reduced, resampled),
            length=(self.levels.width[slide, level], self.levels.height[slide, level]),
            block=(self.levels.block_width[slide, level], self.levels.block_height[slide, level]),
            slide_length=(self.length[0][slide], self.length[1][slide]),
            bounds=cast("tuple[Ints, Ints, Ints, Ints]", tuple(self.bounds[slide].T)),
        )


@dataclass(frozen=True)
class Footprints:
    """The footprints of all slides at all magnifications; level and reduction are int8 (magnifications, slides)."""

    geometry: SlideGeometry
    mpp_values: Floats
    level: NDArray[np.int8]
    reduction: NDArray[np.int8]

    @classmethod
    def of_slides(cls, geometry: SlideGeometry, mpp_values: Floats, tolerance: float) -> Footprints:
        """Those of tiles that are of the slides' own pixels within `tolerance` of the wanted mpp."""
        found = [geometry.levels_for(float(wanted), tolerance) for wanted in mpp_values]
        level, reduction = (np.array(each) for each in zip(*found, strict=True))
        return cls(geometry, mpp_values, level, reduction)

    def fit(self) -> NDArray[np.bool_]:
        """Which slides a tile fits at each magnification, bool (magnifications, slides)."""
        slides = np.arange(len(self.geometry.mpp))
        return np.array([self.at(np.full_like(slides, row), slides).fits() for row in range(len(self.mpp_values))])

    def pixels_read(self) -> Floats:
        """Level pixels that one pixel of a tile is made of, float64 (magnifications, slides)."""
        slides = np.arange(len(self.geometry.mpp))
        sides = np.array([self.at(np.full_like(slides, row), slides).side for row in range(len(self.mpp_values))])
        return (sides / self.geometry.size) ** 2

    def at(self, mpp_row: Ints, slide: NDArray[np.integer]) -> Footprint:
        """Those of tiles, int (n,) each."""
        level, reduction = self.level[mpp_row, slide], self.reduction[mpp_row, slide]
        return self.geometry.footprint(self.mpp_values[mpp_row], slide, level, reduction)


def corner_anywhere(footprint: Footprint, axis: int, point: Floats, offset: Floats) -> Ints:
    """Level-0 pixels at which tiles begin along an axis (0: x), int64 (n,).

    A tile lies around a point on tissue, a level-0 pixel: anywhere, by `offset` from 0 to 1, that keeps the point in
    the tile and the tile on the slide. So places are drawn in proportion to their tissue, and none piles up at the
    slide's edges.
    """
    first, last, step = footprint.first(axis), footprint.last(axis), footprint.step
    low, high = np.clip(point - footprint.extent, first, last), np.clip(point, first, last)
    drawn = np.floor(low + offset * (high - low))
    return np.maximum(first, np.rint(np.floor(drawn / step) * step)).astype(np.int64)


def corner_on_blocks(footprint: Footprint, axis: int, point: Floats, first: Floats, inside: Floats) -> Ints:
    """Level-0 pixels at which tiles begin along an axis (0: x) so that each touches the fewest blocks, int64 (n,).

    Of the runs of that many blocks around a point on tissue, a level-0 pixel, one is drawn by `first` from 0 to 1, and
    in it the tile's place by `inside`. So a run comes in proportion to its tissue, and all places in it alike. Only
    where `Footprint.has_grid`.
    """
    side, block, length, unit = footprint.side, footprint.block[axis], footprint.length[axis], footprint.unit
    block = np.maximum(1, block)
    fewest = -(-side // block)
    last = np.maximum(0, length - side) // block
    at = np.floor(point / (footprint.downsample * block)).astype(np.int64)
    low, high = np.clip(at - fewest + 1, 0, last), np.clip(at, 0, last)
    start = (low + np.floor(first * (high - low + 1)).astype(np.int64)) * block
    room = np.maximum(0, np.minimum(fewest * block, length - start) - side) // unit
    start += np.floor(inside * (room + 1)).astype(np.int64) * unit
    return np.rint(start * footprint.downsample).astype(np.int64)
