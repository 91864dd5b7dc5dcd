"""The tissue tiles of whole slides on a grid: where they lie, and their pixels; plain callables for Ray Data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.inspection import Inspected, Rejected, inspect
from streaming.catalog.tissue import CELL_UM, window_fraction
from streaming.counters import Counters
from streaming.errors import SlideError, StorageError
from streaming.reading.batch import Batch
from streaming.reading.slide_pool import SlidePool
from streaming.slide import PendingTile, Slide, open_slide
from streaming.storage.staging import Staging
from trainer.embed.options import Grid


def tissue_tiles(slide: Inspected, mpp: float, size: int, min_tissue: float) -> NDArray[np.int64]:
    """Level-0 corners (n, 2) of the tiles on a regular grid from the top-left that lie on the slide and on tissue."""
    row = slide.row
    extent = size * mpp / row.mpp
    xs = np.floor(np.arange(max(0, math.floor(row.width / extent))) * extent).astype(np.int64)
    ys = np.floor(np.arange(max(0, math.floor(row.height / extent))) * extent).astype(np.int64)
    corners = np.stack([a.ravel() for a in np.meshgrid(xs, ys)], axis=1)
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


@dataclass(frozen=True)
class Geometry:
    """What the first row of a slide's tiles tells of it; travels as JSON."""

    width: int
    """level-0 px"""
    height: int
    """level-0 px"""
    mpp: float
    """µm/px at level 0"""
    num_tiles: int


class GridPlan:
    """Slides to the places of their tiles."""

    def __init__(self, slides: Sequence[storage.ObjectInfo], grid: Grid, storage_options: dict[str, Any]) -> None:
        self._slides, self._grid, self._storage_options = slides, grid, storage_options

    def __call__(self, batch: Batch) -> Batch:
        """One row a tile of the slide numbered `batch["id"]` (1,); one row with the reason for a slide without any.

        Columns: `slide` (its number), `x`, `y` (level-0 px), `note` (in the first row `Geometry`), `reason`.
        """
        number, grid = int(batch["id"][0]), self._grid
        slide = inspect(self._slides[number], grid.slide_mpp, self._storage_options, Staging())
        corners, note, reason = np.zeros((1, 2), np.int64), "", ""
        if isinstance(slide, Rejected):
            reason = slide.reason
        elif len(found := tissue_tiles(slide, grid.mpp, grid.size, grid.min_tissue)):
            row = slide.row
            corners, note = found, json.dumps(vars(Geometry(row.width, row.height, row.mpp, len(found))))
        else:
            reason = f"no {grid.size} px tile at {grid.mpp} µm/px has {grid.min_tissue:.0%} tissue"
        rest = [""] * (len(corners) - 1)
        return {
            "slide": np.full(len(corners), number, np.int32),
            "x": corners[:, 0],
            "y": corners[:, 1],
            "note": np.array([note, *rest], dtype=object),
            "reason": np.array([reason, *rest], dtype=object),
        }


class GridReader:
    """Places to pixels; safe to call from several threads."""

    def __init__(self, slides: Sequence[storage.ObjectInfo], grid: Grid, storage_options: dict[str, Any]) -> None:
        self._slides, self._grid, self._storage_options = slides, grid, storage_options
        self._pool: SlidePool[int] = SlidePool(self._open)

    def _open(self, number: int, count: Counters) -> Slide:
        info = self._slides[number]
        mpp = self._grid.slide_mpp
        return storage.PATIENT(open_slide, info.uri, self._storage_options, mpp=mpp, expected=info, count=count)

    def __call__(self, batch: Batch) -> Batch:
        """The rows of a plan with `tile` uint8 (n, size, size, 3), black where there is a reason."""
        size = self._grid.size
        tiles = np.zeros((len(batch["slide"]), size, size, 3), dtype=np.uint8)
        reasons = batch["reason"].astype(object)
        wanted = np.flatnonzero(reasons == "")
        self._pool.open_all(np.unique(batch["slide"][wanted]).tolist())
        begun: list[tuple[int, PendingTile]] = []
        # All requests go out before the first block is decoded.
        for i in wanted.tolist():
            try:
                place = int(batch["slide"][i]), int(batch["x"][i]), int(batch["y"][i])
                begun.append((i, self._pool.begin_tile(*place, self._grid.mpp, size)))
            except (SlideError, StorageError) as error:
                reasons[i] = str(error)
        for i, tile in begun:
            try:
                tile.fill(tiles[i])
            except (SlideError, StorageError) as error:
                reasons[i] = str(error)
        return {**batch, "tile": tiles, "reason": reasons}
