"""The plan: sample index → tile, a pure function of (catalog, seed, mix, index).

No state, no I/O, no pass over the data: that is what makes a stream shuffled, resumable and elastic (README,
architecture). Every random number is a hash of (seed, index, attempt, what it decides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.errors import ConfigError, PlanError
from streaming.tissue import CELL_UM, window_fraction
from streaming.tissue_map import CHUNK, padded

Indices = NDArray[np.int64]

# The four magnifications of arXiv 2404.15217; their weights are not published, so equal.
DEFAULT_MPP: Mapping[float, float] = {0.25: 1, 0.5: 1, 1.0: 1, 2.0: 1}

# A draw that lands on too little tissue is drawn again: on the same slide first, so that slides with ragged tissue are
# not drawn less, then on others.
_TRIES_PER_SLIDE = 8
_MAX_TRIES = 128

# So many tiles are drawn at once: bounds what is mapped of a large catalog's tissue, some 50 KB a tile.
_MAX_DRAW = 2048

# What a random number decides; new decisions get new numbers, so that old plans stay what they were.
_MPP, _COHORT, _SLIDE, _CELL, _CELL_X, _CELL_Y, _OFFSET_X, _OFFSET_Y = range(8)


@dataclass(frozen=True)
class TileSpec:
    """One tile to read: x, y are the level-0 pixel of its top-left corner, mpp its µm/px, size its side in px."""

    index: int
    slide: str
    x: int
    y: int
    mpp: float
    size: int


@dataclass(frozen=True)
class TileSpecs:
    """Many tiles as columns, each (n,); slide is the row of the catalog, attempt how often the index was redrawn."""

    index: Indices
    attempt: NDArray[np.int32]
    slide: NDArray[np.int32]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    mpp: NDArray[np.float64]
    size: int

    def __len__(self) -> int:
        return len(self.index)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters its input."""
    z = values ^ (values >> np.uint64(30))
    z = z * np.uint64(0xBF58476D1CE4E5B9)
    z = z ^ (z >> np.uint64(27))
    z = z * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, index: Indices, counter: NDArray[np.int64], decision: int) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), float64 (n,), by hashing (seed, index, counter, decision)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = mix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + golden)
    for word in (index, counter, np.array([decision], dtype=np.int64)):
        state = mix64((state ^ mix64(word.astype(np.uint64) + golden)) + golden)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


class TilePlan:
    """The stream of tiles that a catalog, a seed and a mix define; `plan[i]` is tile i, for any i ≥ 0.

    mpp maps each magnification (µm/px) to its weight, cohorts each value of the catalog's `cohort` column to its
    weight (None: every slide alike). A tile has at least `min_tissue` of its area on tissue (0.4: arXiv 2404.15217). A
    slide serves a magnification only if the tile fits it and its pixels would not be enlarged over `max_upsampling`
    times.

    Raises:
        ConfigError: weights, size or shares make no sense.
        PlanError: no slide of the catalog can serve a magnification or cohort.
    """

    def __init__(
        self,
        catalog: Catalog,
        seed: int = 0,
        mpp: Mapping[float, float] = DEFAULT_MPP,
        size: int = 256,
        *,
        cohorts: Mapping[str, float] | None = None,
        min_tissue: float = 0.4,
        max_upsampling: float = 2.0,
    ) -> None:
        if size < 1:
            raise ConfigError(f"tile size is {size} px; it must be at least 1")
        if not 0 < min_tissue <= 1:
            raise ConfigError(f"min_tissue is {min_tissue}; it is a share above 0 and up to 1")
        self.seed = seed
        self.size = size
        self.min_tissue = min_tissue
        self._mpp_values, self._mpp_cumulative = _weights("mpp", mpp)
        self._slides, self._tissue = catalog.slides(), catalog.tissue
        self._slide_mpp = catalog.column("mpp")
        self._extent_limit = np.stack([catalog.column("width"), catalog.column("height")])
        self._rows = catalog.column("tissue_rows").astype(np.int64)
        self._columns = catalog.column("tissue_columns").astype(np.int64)
        self._start, self._total = catalog.column("tissue_offset"), catalog.column("tissue_total")
        self._padded = padded(self._rows * self._columns)
        self._bisections = int(self._padded.max() // CHUNK).bit_length()
        self._pool_slides(catalog, cohorts, max_upsampling)

    def _pool_slides(self, catalog: Catalog, cohorts: Mapping[str, float] | None, max_upsampling: float) -> None:
        names: list[str | None] = [None] * len(self._slides) if cohorts is None else catalog.metadata("cohort")
        cohort_values, _ = _weights("cohorts", cohorts) if cohorts is not None else ([None], None)
        pools: list[NDArray[np.int64]] = []
        self._cohort_cumulative = np.zeros((len(self._mpp_values), len(cohort_values)))
        for row, mpp in enumerate(self._mpp_values):
            extent = self.size * mpp / self._slide_mpp
            usable = (self._slide_mpp <= max_upsampling * mpp * 1.01) & (self._total > 0)
            usable &= (extent <= self._extent_limit).all(axis=0)
            weights: list[float] = []
            for cohort in cohort_values:
                members = usable & np.array([name == cohort for name in names])
                pools.append(np.flatnonzero(members))
                weights.append((cohorts[cohort] if cohorts and cohort is not None else 1.0) * bool(members.any()))
            if sum(weights) == 0:
                raise PlanError(
                    f"{catalog.uri}: none of its {len(self._slides)} slides can give a {self.size} px tile at {mpp} "
                    f"µm/px (too small, too coarse, or no tissue); take {mpp} out of data.mpp"
                )
            self._cohort_cumulative[row] = _cumulative(np.array(weights, dtype=np.float64))
        self._pool = np.concatenate(pools).astype(np.int32)
        self._pool_size = np.array([len(pool) for pool in pools], dtype=np.int64)
        self._pool_start = np.concatenate([[0], np.cumsum(self._pool_size)[:-1]]).astype(np.int64)

    @property
    def slides(self) -> list[str]:
        """The slides' addresses; `TileSpecs.slide` counts in this list."""
        return self._slides

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
        and cohort of the tile it stands for, so what is dropped does not shift the mix.

        Raises:
            ConfigError: a negative index.
            PlanError: a magnification at which hardly any place shows enough tissue.
            CatalogError, StorageError: the catalog's tissue can't be read.
        """
        index = np.asarray(index, dtype=np.int64)
        if index.size and int(index.min()) < 0:
            raise ConfigError(f"sample index {int(index.min())}; indices start at 0")
        attempt = np.zeros(len(index), dtype=np.int32) if attempt is None else attempt
        none = np.zeros(1, dtype=np.int64)
        mpp_row = np.searchsorted(self._mpp_cumulative, uniform(self.seed, index, none, _MPP), side="right")
        cohort = (uniform(self.seed, index, none, _COHORT)[:, None] >= self._cohort_cumulative[mpp_row]).sum(axis=1)
        pool = mpp_row * self._cohort_cumulative.shape[1] + cohort
        slide, x, y = np.zeros(len(index), np.int32), np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
        pending = np.arange(len(index))
        for trial in range(_MAX_TRIES):
            enough = np.zeros(len(pending), dtype=np.bool_)
            for first in range(0, len(pending), _MAX_DRAW):
                part = slice(first, first + _MAX_DRAW)
                at = pending[part]
                drawn = self._draw(index[at], attempt[at], trial, mpp_row[at], pool[at])
                slide[at], x[at], y[at], enough[part] = drawn
                self._tissue.release()
            pending = pending[~enough]
            if not len(pending):
                return TileSpecs(index, attempt, slide, x, y, self._mpp_values[mpp_row], self.size)
        mpp = self._mpp_values[mpp_row[pending[0]]]
        raise PlanError(
            f"index {index[pending[0]]}: no tile of {self.min_tissue:.0%} tissue at {mpp} µm/px in {_MAX_TRIES} draws; "
            f"lower data.min_tissue or take {mpp} out of data.mpp"
        )

    def _draw(
        self, index: Indices, attempt: NDArray[np.int32], trial: int, mpp_row: Indices, pool: Indices
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Slides and corners of one draw, and which of them lie on enough tissue."""

        def number(decision: int, counter: int) -> NDArray[np.float64]:
            return uniform(self.seed, index, attempt.astype(np.int64) * _MAX_TRIES + counter, decision)

        in_pool = (number(_SLIDE, trial // _TRIES_PER_SLIDE) * self._pool_size[pool]).astype(np.int64)
        slide = self._pool[self._pool_start[pool] + in_pool]
        cell = self._drawn_cell(slide, number(_CELL, trial))
        cell_px = CELL_UM / self._slide_mpp[slide]
        extent = self.size * self._mpp_values[mpp_row] / self._slide_mpp[slide]
        # Corners are whole pixels of the tile: then a JPEG block can be decoded at 1/2, 1/4 or 1/8.
        whole = np.maximum(1, np.rint(self._mpp_values[mpp_row] / self._slide_mpp[slide])).astype(np.int64)
        # A point on tissue, then a tile around it, anywhere that keeps the point in the tile and the tile on the slide:
        # places are drawn in proportion to their tissue, and none piles up at the slide's edges.
        corner: list[NDArray[np.int64]] = []
        for axis, (position, inside, offset) in enumerate(
            [
                (cell % self._columns[slide], _CELL_X, _OFFSET_X),
                (cell // self._columns[slide], _CELL_Y, _OFFSET_Y),
            ]
        ):
            last = np.floor(self._extent_limit[axis, slide] - extent)
            point = (position + number(inside, trial)) * cell_px
            low, high = np.clip(point - extent, 0, last), np.clip(point, 0, last)
            drawn = np.floor(low + number(offset, trial) * (high - low)).astype(np.int64)
            corner.append(drawn - drawn % whole)
        x, y = corner
        return slide, x, y, self._tissue_share(slide, x, y, mpp_row) >= self.min_tissue

    def _drawn_cell(self, slide: NDArray[np.int32], number: NDArray[np.float64]) -> Indices:
        """A cell of each slide's grid, as likely as it has tissue."""
        sums, start = self._tissue.sums, self._start[slide]
        wanted = sums[start // CHUNK] + (number * self._total[slide]).astype(np.int64)
        # The last chunk that begins at or before it. `searchsorted` would look all over the file, each look some pages.
        chunk, behind = start // CHUNK, (start + self._padded[slide]) // CHUNK
        for _ in range(self._bisections):
            middle = (chunk + behind) // 2
            before = sums[middle] <= wanted
            chunk, behind = np.where(before, middle, chunk), np.where(before, behind, middle)
        cells = self._tissue.cells[chunk[:, None] * CHUNK + np.arange(CHUNK)]
        passed = cells.cumsum(axis=1, dtype=np.int32) <= (wanted - sums[chunk])[:, None]
        return chunk * CHUNK + passed.sum(axis=1) - start

    def _tissue_share(self, slide: NDArray[np.int32], x: Indices, y: Indices, mpp_row: Indices) -> NDArray[np.float64]:
        share = np.zeros(len(slide))
        for row in np.unique(mpp_row):
            at = np.flatnonzero(mpp_row == row)
            on, cell_px = slide[at], CELL_UM / self._slide_mpp[slide[at]]
            share[at] = window_fraction(
                self._tissue.cells,
                self._start[on],
                self._rows[on],
                self._columns[on],
                y[at] / cell_px,
                x[at] / cell_px,
                float(self.size * self._mpp_values[row] / CELL_UM),
            )
        return share


def _weights(name: str, weights: Mapping[Any, float]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Choices in a fixed order, and their cumulative shares."""
    if not weights or any(not weight > 0 for weight in weights.values()):
        raise ConfigError(f"{name} weights are {dict(weights)}; give at least one, all above 0")
    # The order in which somebody wrote the mix must not change the tiles.
    choices = sorted(weights)
    if name == "mpp" and not all(float(choice) > 0 for choice in choices):
        raise ConfigError(f"mpp values are {choices}; they are µm/px, above 0")
    shares = np.array([weights[choice] for choice in choices], dtype=np.float64)
    return np.array(choices), _cumulative(shares)


def _cumulative(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.cumsum(shares)
    return total / total[-1]  # exactly 1 at the end, which shares.sum() need not give
