"""The plan: sample index → tile, a pure function of (catalog, seed, mix, index).

No state, no I/O, no pass over the data: that is what makes a stream shuffled, resumable and elastic
(`streaming/README.md`). Every random number is a hash of (seed, index, attempt, what it decides).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.catalog.tissue import CELL_UM, window_fraction
from streaming.catalog.tissue_map import CHUNK, Cells, padded
from streaming.errors import ConfigError, PlanError
from streaming.plan.counter_random import Indices, hashed, hashed_further, unit
from streaming.plan.decisions import Decision
from streaming.plan.footprints import Corners, Footprint, corner_anywhere, corner_on_blocks
from streaming.plan.magnifications import DEFAULT_MPP, Mpp
from streaming.plan.slide_choice import MAX_TRIES, Choice, SlideChooser
from streaming.plan.strata import Strata, of_cohorts
from streaming.plan.universe import HeldOut, ShuffleQuality, Universe, shuffle_quality
from streaming.slide.geometry import MANY_PIXELS, MAX_UPSAMPLING, MPP_TOLERANCE

# Past this, two of the reductions 1, 2, 4 and 8 would serve one magnification.
_MAX_TOLERANCE = 0.3

# Share of a tile's area that is tissue, at least (arXiv 2404.15217).
MIN_TISSUE = 0.4

# So many tiles are drawn at once: bounds what is mapped of a large catalog's tissue, some 50 KB a tile.
_MAX_DRAW = 2048


@dataclass(frozen=True)
class TileSpec:
    """One tile to read: x, y are the level-0 pixel of its top-left corner, mpp its µm/px, size its side in px.

    mpp is what the mix asks for; a slide's own pixels may be taken for it (`TilePlan.mpp_tolerance`).
    """

    index: int
    slide: str
    x: int
    y: int
    mpp: float
    size: int


@dataclass(frozen=True)
class TileSpecs:
    """Many tiles as columns, each (n,); slide is the row of the catalog, attempt how often the index was redrawn.

    mpp is what the mix asks for, own_mpp what the pixels have that are read for it.
    """

    index: Indices
    attempt: NDArray[np.int32]
    slide: NDArray[np.int32]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    mpp: NDArray[np.float64]
    own_mpp: NDArray[np.float64]
    size: int

    def __len__(self) -> int:
        return len(self.index)


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


@dataclass(frozen=True)
class BlockCosts:
    """What a tile costs on average where it is read block by block."""

    blocks: float
    """compressed blocks that it touches"""
    requests: float
    """byte ranges: one a row of blocks, which mostly lie one after another"""
    share: float
    """of tiles that are read so; the others are OpenSlide's"""

    def line(self) -> str:
        """The numbers in one line."""
        rest = "" if self.share == 1 else f", of the {self.share:.0%} that OpenSlide does not read"
        return f"a tile costs {self.requests:.2f} requests for {self.blocks:.2f} blocks{rest}"


class TilePlan:
    """The stream of tiles that a catalog, a seed and a mix define; `plan[i]` is tile i, for any i ≥ 0.

    mpp maps each magnification (µm/px) to its weight, or is a range of them (`streaming.plan.magnifications.Mpp`);
    strata weighs groups of slides by columns of the catalog (None: every slide alike); cohorts is short for weights of
    the values of its column `cohort`. A tile has at least `min_tissue` of its area on tissue. A slide serves a
    magnification only if the tile fits it and its pixels would not be enlarged over `max_upsampling` times. Where a
    level, or its reduction by 2, 4 or 8, has the magnification up to a share of `mpp_tolerance`, tiles are of its own
    pixels; 0: all have the very mpp. With corners on `blocks` a tile touches as few compressed blocks of its level as
    it can, where the catalog knows them. universe bounds what is drawn, and how (None: any tile of all slides, each
    index by itself); held_out keeps patients out of it (None: nobody).

    Raises:
        ConfigError: weights, size or shares make no sense.
        PlanError: no slide of the catalog can serve a magnification or stratum.
    """

    def __init__(
        self,
        catalog: Catalog,
        seed: int = 0,
        mpp: Mpp = DEFAULT_MPP,
        size: int = 256,
        *,
        cohorts: Mapping[str, float] | None = None,
        strata: Strata | None = None,
        min_tissue: float = MIN_TISSUE,
        max_upsampling: float = MAX_UPSAMPLING,
        mpp_tolerance: float = MPP_TOLERANCE,
        corners: Corners = "anywhere",
        universe: Universe | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        if size < 1:
            raise ConfigError(f"tile size is {size} px; it must be at least 1")
        if not 0 < min_tissue <= 1:
            raise ConfigError(f"min_tissue is {min_tissue}; it is a share above 0 and up to 1")
        if not 0 <= mpp_tolerance <= _MAX_TOLERANCE:
            raise ConfigError(f"mpp_tolerance is {mpp_tolerance}; it is a share from 0 to {_MAX_TOLERANCE}")
        if corners not in get_args(Corners):
            raise ConfigError(f"corners are {corners!r}; take one of {', '.join(get_args(Corners))}")
        self.seed = seed
        self.size = size
        self.min_tissue = min_tissue
        self.mpp_tolerance = mpp_tolerance
        self.corners: Corners = corners
        self._slides, self._tissue = catalog.slides(), catalog.tissue
        self._slide_mpp = catalog.column("mpp")
        self._rows = catalog.column("tissue_rows").astype(np.int64)
        self._columns = catalog.column("tissue_columns").astype(np.int64)
        self._start, self._total = catalog.column("tissue_offset"), catalog.column("tissue_total")
        self.universe = universe or Universe()
        self._chooser = SlideChooser(
            catalog,
            seed,
            mpp,
            size,
            of_cohorts(cohorts, strata or Strata()),
            max_upsampling,
            mpp_tolerance,
            self.universe,
            held_out,
        )
        self._mpp_values = self._chooser.mpp_values
        self._padded = padded(self._rows * self._columns)
        self._bisections = int(self._padded.max() // CHUNK).bit_length()

    @property
    def slides(self) -> list[str]:
        """The slides' addresses; `TileSpecs.slide` counts in this list."""
        return self._slides

    @property
    def magnifications(self) -> NDArray[np.float64]:
        """The µm/px that tiles are asked for, rising."""
        return self._mpp_values

    @property
    def num_tiles(self) -> int | None:
        """Distinct tiles of the universe; None: without bound."""
        return self._chooser.num_tiles

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each slide's share of all tiles, float64 (slides,); they sum to 1."""
        return self._chooser.shares

    @property
    def patients(self) -> Indices:
        """The number of each slide's patient, int64 (slides,)."""
        return self._chooser.patients

    @property
    def drawn_from(self) -> tuple[int, int]:
        """How many slides the tiles come from, and of how many patients."""
        drawn = self.shares > 0
        return int(drawn.sum()), len(np.unique(self.patients[drawn]))

    def mix_lines(self, most: int = 6) -> list[str]:
        """What each magnification draws from, and the slides that serve none, in so many lines each at most."""
        mix = self._chooser.drawn_from()
        lines = [
            f"{mpp:g} µm/px: {share:.0%} of the tiles, from {slides:,} slides of {patients:,} patients"
            for mpp, share, slides, patients in mix
        ]
        if len(mix) > most:
            (least, *_), (greatest, *_), counts = mix[0], mix[-1], [slides for _, _, slides, _ in mix]
            lines = [f"{least:.4g} to {greatest:.4g} µm/px: each from {min(counts):,} to {max(counts):,} slides"]
        none = self._chooser.serve_none()
        lines += [f"serves none: {self._slides[row]}: {reason}" for row, reason in none[:most]]
        return lines + ([f"serve none: {len(none) - most:,} more slides"] if len(none) > most else [])

    @property
    def is_exhaustive(self) -> bool:
        """Whether each of them comes once before any comes again."""
        return not self.universe.replacement

    def shuffle_quality(self, batches: Iterable[NDArray[np.int32]]) -> ShuffleQuality:
        """How well batches are mixed, each the slides of its tiles: int32 (batch,), rows of the catalog."""
        return shuffle_quality(batches, self._chooser.shares, self._chooser.patients)

    def slides_of(self, index: Indices) -> NDArray[np.int32]:
        """The slides of sample indices, int32 (n,): rows of the catalog."""
        return self.specs(index).slide

    def block_costs(self, index: Indices) -> BlockCosts | None:
        """What sample indices, int64 (n,), cost on average; None where OpenSlide reads all of their slides."""
        specs = self.specs(index)
        footprint = self._chooser.footprints.at(np.searchsorted(self._mpp_values, specs.mpp), specs.slide)
        columns, rows = footprint.num_blocks(0, specs.x), footprint.num_blocks(1, specs.y)
        known = rows > 0
        if not known.any():
            return None
        return BlockCosts(float((columns * rows)[known].mean()), float(rows[known].mean()), float(known.mean()))

    def without_levels(self) -> list[tuple[float, list[str], float]]:
        """Magnifications at which a tile of some drawn slides is made of 32 times its pixels and more.

        Of each its µm/px, those slides, the worst first, and by how many times of the worst.
        """
        found: list[tuple[float, list[str], float]] = []
        for mpp, costs in zip(self._mpp_values.tolist(), self._chooser.pixels_read(), strict=True):
            many = np.flatnonzero(costs >= MANY_PIXELS)
            if len(many):
                order = many[np.argsort(-costs[many], kind="stable")]
                found.append((mpp, [self._slides[row] for row in order], float(costs[order[0]])))
        return found

    def __getitem__(self, index: int) -> TileSpec:
        specs = self.specs(np.array([index], dtype=np.int64))
        return TileSpec(
            index=index,
            slide=self._slides[specs.slide[0]],
            x=int(specs.x[0]),
            y=int(specs.y[0]),
            mpp=float(specs.mpp[0]),
            size=self.size,
        )

    def specs(self, index: Indices, attempt: NDArray[np.int32] | None = None) -> TileSpecs:
        """The tiles of many sample indices, int64 (n,), at once.

        attempt (n,) asks for an index's replacement: 1 for the first, and so on. A replacement has the magnification
        and stratum of the tile it stands for, so what is dropped does not shift the mix.

        Raises:
            ConfigError: a negative index.
            PlanError: a magnification at which hardly any place shows enough tissue.
            CatalogError, StorageError: the catalog's tissue can't be read.
        """
        index = np.asarray(index, dtype=np.int64)
        if index.size and int(index.min()) < 0:
            raise ConfigError(f"sample index {int(index.min())}; indices start at 0")
        attempt = np.zeros(len(index), dtype=np.int32) if attempt is None else attempt
        choice = self._chooser.choose(index)
        slide, x, y = np.zeros(len(index), np.int32), np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
        pending = np.arange(len(index))
        for trial in range(MAX_TRIES):
            found = self._draw(choice[pending], attempt[pending], trial)
            slide[pending], x[pending], y[pending] = found.slide, found.x, found.y
            pending = pending[~found.on_tissue]
            if not len(pending):
                mpp, own = self._mpp_values[choice.mpp_row], self._chooser.footprints.at(choice.mpp_row, slide).mpp
                return TileSpecs(index, attempt, slide, x, y, mpp, own, self.size)
        mpp = f"{self._mpp_values[choice.mpp_row[pending[0]]]:.4g}"
        raise PlanError(
            f"index {index[pending[0]]}: no tile of {self.min_tissue:.0%} tissue at {mpp} µm/px in {MAX_TRIES} draws; "
            f"take {mpp} out of the mpp (data.mpp, --mpp), or lower data.min_tissue of a training"
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
        footprint = self._chooser.footprints.at(choice.mpp_row, slide)
        cells, sums = self._tissue.grids(*self._grids(slide))
        cell = self._drawn_cell(slide, number(Decision.CELL), cells, sums)
        column, row = cell % self._columns[slide], cell // self._columns[slide]
        cell_px = CELL_UM / self._slide_mpp[slide]
        x_point, y_point = (column + number(Decision.CELL_X)) * cell_px, (row + number(Decision.CELL_Y)) * cell_px
        x = corner_anywhere(footprint, 0, x_point, number(Decision.OFFSET_X))
        y = corner_anywhere(footprint, 1, y_point, number(Decision.OFFSET_Y))
        if self.corners == "blocks":
            at_x = corner_on_blocks(footprint, 0, x_point, number(Decision.BLOCK_X), number(Decision.IN_BLOCK_X))
            at_y = corner_on_blocks(footprint, 1, y_point, number(Decision.BLOCK_Y), number(Decision.IN_BLOCK_Y))
            x, y = np.where(footprint.has_grid(0), at_x, x), np.where(footprint.has_grid(1), at_y, y)
        share = self._tissue_share(slide, x, y, footprint, cells)
        return _Places(slide, x, y, share >= self.min_tissue)

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
        share, extent = np.zeros(len(slide)), self.size * footprint.mpp / CELL_UM
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
