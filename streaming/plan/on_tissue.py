"""Tiles drawn on the tissue of a catalog's slides: an index draws slide and magnification, then a place on tissue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.catalog.tissue import CELL_UM, window_fraction
from streaming.catalog.tissue_map import CHUNK, Cells, padded
from streaming.errors import PlanError
from streaming.plan.counter_random import Indices, hashed, hashed_further, unit
from streaming.plan.decisions import Decision
from streaming.plan.footprints import Corners, Footprint, corner_anywhere, corner_on_blocks
from streaming.plan.slide_choice import MAX_TRIES, Choice, SlideChooser
from streaming.plan.specs import Pairs, TileSpecs
from streaming.plan.views import aligned, around, centred, of_slides

# So many tiles are drawn at once: bounds what is mapped of a large catalog's tissue, some 50 KB a tile.
_MAX_DRAW = 2048


@dataclass(frozen=True)
class _Places:
    """Drawn places as columns (n,): slides, level-0 corners, and whether enough tissue lies there."""

    slide: NDArray[np.int32]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    on_tissue: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[_Places]) -> _Places:
        """Places one after another; at least one part."""
        return cls(*(np.concatenate([getattr(part, entry.name) for part in parts]) for entry in fields(cls)))


class TissueDraws:
    """The tiles of a catalog that lie on enough tissue; what `streaming.plan.plan.Draws` describes."""

    def __init__(self, catalog: Catalog, chooser: SlideChooser, size: int, min_tissue: float, corners: Corners) -> None:
        self._slides, self._tissue, self._chooser = catalog.slides(), catalog.tissue, chooser
        self._size, self._min_tissue, self._corners = size, min_tissue, corners
        self._slide_mpp = catalog.column("mpp")
        self._rows = catalog.column("tissue_rows").astype(np.int64)
        self._columns = catalog.column("tissue_columns").astype(np.int64)
        self._start, self._total = catalog.column("tissue_offset"), catalog.column("tissue_total")
        self._padded = padded(self._rows * self._columns)
        self._bisections = int(self._padded.max() // CHUNK).bit_length()

    @property
    def magnifications(self) -> NDArray[np.float64]:
        return self._chooser.mpp_values

    @property
    def num_tiles(self) -> int | None:
        return self._chooser.num_tiles

    @property
    def shares(self) -> NDArray[np.float64]:
        return self._chooser.shares

    @property
    def patients(self) -> Indices:
        return self._chooser.patients

    @property
    def digest(self) -> str | None:
        return None

    def mix(self) -> list[tuple[str, float, int, int]]:
        return self._chooser.drawn_from()

    def told(self) -> Iterator[str]:
        for row, reason in self._chooser.serve_none():
            yield f"serves none: {self._slides[row]}: {reason}"

    def footprint(self, specs: TileSpecs) -> Footprint:
        row = np.searchsorted(self._chooser.mpp_values, specs.mpp)
        return self._chooser.footprints.at(row, specs.slide)

    def around(self, specs: TileSpecs) -> list[tuple[TileSpecs, Footprint]]:
        if (views := self._chooser.views) is None:
            return []
        first, of_views = self.footprint(specs), of_slides(views, specs.slide)
        mpps: list[float] = views.mpp_values.tolist()
        return [(around(specs, first, view, mpp), view) for view, mpp in zip(of_views, mpps, strict=True)]

    def pairs(self) -> Pairs:
        mpp_values, costs = self._chooser.mpp_values, self._chooser.pixels_read()
        if (views := self._chooser.views) is not None:
            mpp_values = np.concatenate([mpp_values, views.mpp_values])
            costs = np.concatenate([costs, views.pixels_read() * (costs > 0)])
        row, slide = np.nonzero(costs)
        return Pairs(slide, mpp_values[row], costs[row, slide])

    def specs(self, index: Indices, attempt: NDArray[np.int32]) -> TileSpecs:
        choice = self._chooser.choose(index)
        slide, x, y = np.zeros(len(index), np.int32), np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
        pending = np.arange(len(index))
        for trial in range(MAX_TRIES):
            found = self._draw(choice[pending], attempt[pending], trial)
            slide[pending], x[pending], y[pending] = found.slide, found.x, found.y
            pending = pending[~found.on_tissue]
            if not len(pending):
                mpp = self.magnifications[choice.mpp_row]
                own = self._chooser.footprints.at(choice.mpp_row, slide).mpp
                return TileSpecs(index, attempt, slide, x, y, mpp, own, self._size)
        mpp, views = f"{self.magnifications[choice.mpp_row[pending[0]]]:.4g}", self._chooser.views
        remedy = "take other views (data.views, --views)" if views else f"take {mpp} out of the mpp (data.mpp, --mpp)"
        what = f"no tile of {self._min_tissue:.0%} tissue at {mpp} µm/px{' and in all views' if views else ''}"
        raise PlanError(
            f"index {index[pending[0]]}: {what} in {MAX_TRIES} draws; {remedy}, or lower data.min_tissue of a training"
        )

    def _draw(self, choice: Choice, attempt: NDArray[np.int32], trial: int) -> _Places:
        """One draw of places, in parts that bound what is mapped of the catalog's tissue."""
        found: list[_Places] = []
        for first in range(0, max(1, len(attempt)), _MAX_DRAW):
            part = np.arange(first, min(first + _MAX_DRAW, len(attempt)))
            found.append(self._draw_part(choice[part], attempt[part], trial))
            self._tissue.release()
        return found[0] if len(found) == 1 else _Places.joined(found)

    def _draw_part(self, choice: Choice, attempt: NDArray[np.int32], trial: int) -> _Places:
        drawn = hashed(self._chooser.place_seed, choice.key, attempt.astype(np.int64) * MAX_TRIES + trial)

        def number(decision: Decision) -> NDArray[np.float64]:
            return unit(hashed_further(drawn, decision))

        slide = self._chooser.slides(choice, attempt, trial)
        footprint, views = self._chooser.footprints.at(choice.mpp_row, slide), of_slides(self._chooser.views, slide)
        if views:
            footprint = aligned(footprint, views)
        cells, sums = self._tissue.grids(*self._grids(slide))
        cell = self._drawn_cell(slide, number(Decision.CELL), cells, sums)
        column, row = cell % self._columns[slide], cell // self._columns[slide]
        cell_px = CELL_UM / self._slide_mpp[slide]
        x_point, y_point = (column + number(Decision.CELL_X)) * cell_px, (row + number(Decision.CELL_Y)) * cell_px
        x = corner_anywhere(footprint, 0, x_point, number(Decision.OFFSET_X))
        y = corner_anywhere(footprint, 1, y_point, number(Decision.OFFSET_Y))
        if self._corners == "blocks":
            at_x = corner_on_blocks(footprint, 0, x_point, number(Decision.BLOCK_X), number(Decision.IN_BLOCK_X))
            at_y = corner_on_blocks(footprint, 1, y_point, number(Decision.BLOCK_Y), number(Decision.IN_BLOCK_Y))
            x, y = np.where(footprint.has_grid(0), at_x, x), np.where(footprint.has_grid(1), at_y, y)
        on_tissue = self._tissue_share(slide, x, y, footprint, cells) >= self._min_tissue
        for view in views:
            corner = centred(footprint, view, x), centred(footprint, view, y)
            on_tissue &= self._tissue_share(slide, *corner, view, cells) >= self._min_tissue
        return _Places(slide, x, y, on_tissue)

    def _grids(self, slide: NDArray[np.int32]) -> tuple[Indices, Indices]:
        """Where the tissue of some slides lies, each once: the first cells, and how many."""
        slides = np.unique(slide)
        return self._start[slides], self._padded[slides]

    def _drawn_cell(
        self, slide: NDArray[np.int32], number: NDArray[np.float64], cells: Cells, sums: Indices
    ) -> Indices:
        """A cell of each slide's tissue grid, as likely as it has tissue."""
        start = self._start[slide]
        wanted = sums[start // CHUNK] + (number * self._total[slide]).astype(np.int64)
        # By bisection among the slide's own chunks, the last one whose sum is not above `wanted`. `searchsorted` would
        # look all over the file of all slides, and bring in a page or more with each look.
        chunk, behind = start // CHUNK, (start + self._padded[slide]) // CHUNK
        for _ in range(self._bisections):
            middle = (chunk + behind) // 2
            before = sums[middle] <= wanted
            chunk, behind = np.where(before, middle, chunk), np.where(before, behind, middle)
        passed = (
            cells[chunk[:, None] * CHUNK + np.arange(CHUNK)].cumsum(axis=1, dtype=np.int32)
            <= (wanted - sums[chunk])[:, None]
        )
        return chunk * CHUNK + passed.sum(axis=1) - start

    def _tissue_share(
        self, slide: NDArray[np.int32], x: Indices, y: Indices, footprint: Footprint, cells: Cells
    ) -> NDArray[np.float64]:
        share, extent = np.zeros(len(slide)), self._size * footprint.mpp / CELL_UM
        # Windows of as many cells at once.
        for cells_wide in np.unique(np.ceil(extent)):
            at = np.flatnonzero(np.ceil(extent) == cells_wide)
            on, cell_px = slide[at], CELL_UM / self._slide_mpp[slide[at]]
            share[at] = window_fraction(
                cells,
                self._start[on],
                self._rows[on],
                self._columns[on],
                y[at] / cell_px,
                x[at] / cell_px,
                extent[at],
            )
        return share
