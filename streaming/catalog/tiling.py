"""How a slide is cut into tiles: squares edge to edge from its top-left corner, and which of them lie on tissue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming.catalog.inspection import Inspected
from streaming.catalog.tissue import CELL_UM, window_fraction

Ints = NDArray[np.int64]


def tile_extent(size: int, mpp: float, slide_mpp: float) -> float:
    """Side in level-0 px, rarely a whole number, of a tile of `size` px at `mpp` on a slide of `slide_mpp` µm/px."""
    return size * mpp / slide_mpp


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Rows and columns of tiles, edge to edge from the top-left corner; a rest at the right or the bottom is in none.

    A tile's corner is its place rounded down to a whole level-0 pixel, so that tiles of a fractional extent do not
    drift away from their places.
    """

    rows: int
    columns: int
    extent: float
    """side of a tile in level-0 px"""

    @classmethod
    def of(cls, width: int, height: int, extent: float) -> Tiling:
        """The tiles that lie wholly on a slide of so many level-0 px; none where it is smaller than one."""
        return cls(rows=math.floor(height / extent), columns=math.floor(width / extent), extent=extent)

    def corners(self) -> Ints:
        """Level-0 corners (x, y), (rows, columns, 2)."""
        xs, ys = (np.floor(np.arange(n) * self.extent).astype(np.int64) for n in (self.columns, self.rows))
        return np.stack(np.meshgrid(xs, ys), axis=-1)


def rows_and_columns(corners: Ints, extent: float) -> Ints:
    """Which row and column (n, 2) of their slide's tiling the tiles at level-0 corners (n, 2) are."""
    return np.rint(corners[:, ::-1] / extent).astype(np.int64)


def tissue_tiles(slide: Inspected, mpp: float, size: int, min_tissue: float) -> Ints:
    """Level-0 corners (n, 2) of a slide's tiles, row by row, of which tissue covers at least that share.

    They lie within what of the slide was scanned.
    """
    row, extent = slide.row, tile_extent(size, mpp, slide.row.mpp)
    corners = Tiling.of(row.width, row.height, extent).corners().reshape(-1, 2)
    first, length = np.array(row.bounds[:2]), np.array(row.bounds[2:])
    corners = corners[((corners >= first) & (corners + extent <= first + length)).all(axis=1)]
    cell_px, zeros = CELL_UM / row.mpp, np.zeros(len(corners), dtype=np.int64)
    share = window_fraction(
        slide.tissue.fraction.ravel(),
        zeros,
        zeros + row.tissue_rows,
        zeros + row.tissue_columns,
        corners[:, 1] / cell_px,
        corners[:, 0] / cell_px,
        size * mpp / CELL_UM,
    )
    return corners[share >= min_tissue]
