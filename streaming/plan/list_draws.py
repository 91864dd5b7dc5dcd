"""Tiles drawn from a list: an index draws a group, which is a slide at one mpp, then one of its rows, by weight.

Nothing of the list is in memory but its groups, and a draw reads one or two rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.errors import ConfigError, PlanError
from streaming.plan.counter_random import Indices, hashed, hashed_further, permuted, text_keys, uniform, unit
from streaming.plan.decisions import Decision
from streaming.plan.footprints import Footprint, SlideGeometry
from streaming.plan.magnifications import bands
from streaming.plan.specs import Pairs, TileSpecs
from streaming.plan.tile_list import TileList
from streaming.plan.universe import HeldOut, Universe, drawn_slides, patient_ids

# So many replacements of a tile are of its slide and mpp, so that what is dropped does not shift the mix.
_OWN_ATTEMPTS = 4
# So many rows are looked up at once: bounds what is mapped of a large list, some 100 KB a tile.
_MAX_DRAW = 2048
_ONCE = np.zeros(1, np.int64)


class ListDraws:
    """The tiles of a list, within a universe; what `streaming.plan.plan.Draws` describes.

    A tile comes in proportion to its weight; of a list without weights all are alike. A universe of `tiles_per_slide`
    takes that many of a slide's tiles, in a random order of its own: with weights, that many draws by weight, among
    which one may be several times.

    Raises:
        ConfigError: the universe has windows, or goes without replacement through a list with weights.
        PlanError: none of the list's tiles is in the universe.
    """

    def __init__(
        self,
        catalog: Catalog,
        tiles: TileList,
        seed: int,
        size: int,
        mpp_tolerance: float,
        universe: Universe,
        held_out: HeldOut | None,
    ) -> None:
        if universe.window is not None:
            raise ConfigError(f"{tiles.uri}: a list is not drawn by windows; leave out universe.window (--window)")
        if tiles.is_weighted and not universe.replacement:
            raise ConfigError(
                f"{tiles.uri}: has weights or clusters, so its tiles come with replacement; set universe.replacement "
                "true (leave out --no-replacement), or take a list without them"
            )
        self._tiles, self._seed, self._size, self._universe = tiles, seed, size, universe
        slides = catalog.slides()
        patients = catalog.metadata_or_none("patient")
        self.patients, self._num_slides = patient_ids(slides, patients), len(slides)
        groups = tiles.groups
        kept = np.flatnonzero(drawn_slides(slides, patients, universe, held_out)[groups.slide])
        if not len(kept):
            raise PlanError(
                f"{tiles.uri}: none of its {len(np.unique(groups.slide)):,} slides is among those of the run; "
                "raise universe.slides (--slides) or watch.validation_slides"
            )
        self._first_row = (np.cumsum(groups.num_rows) - groups.num_rows)[kept]
        self._slide, self._mpp, self._weight = groups.slide[kept], groups.mpp[kept], groups.weight[kept]
        self._num_rows = groups.num_rows[kept]
        self._geometry = SlideGeometry.of_catalog(catalog, size)
        self._find_levels(mpp_tolerance)
        self._share_out(slides)

    def _find_levels(self, mpp_tolerance: float) -> None:
        """Of which level each group is read, and the number of its mpp."""
        self.magnifications, self._mpp_row = np.unique(self._mpp, return_inverse=True)
        self._level, self._reduction = (np.zeros(len(self._mpp), np.int8) for _ in range(2))
        order = np.argsort(self._mpp_row, kind="stable")
        for row, at in enumerate(np.split(order, np.cumsum(np.bincount(self._mpp_row))[:-1])):
            wanted, slides = float(self.magnifications[row]), self._slide[at]
            self._level[at], self._reduction[at] = self._geometry.levels_for(wanted, mpp_tolerance, slides)
        self._own_mpp = self._footprints(np.arange(len(self._mpp))).mpp

    def _share_out(self, slides: list[str]) -> None:
        """What slides and groups have of all draws; of each slide its groups, rows and tiles."""
        self._of_slide, begin = np.unique(self._slide, return_index=True)
        self._key = text_keys([slides[row] for row in self._of_slide.tolist()])
        self._begin, self._end = begin, np.append(begin[1:], len(self._slide))
        self._rows_of_slide = np.add.reduceat(self._num_rows, begin)
        self._tiles_of_slide = np.minimum(self._rows_of_slide, self._universe.tiles_per_slide or 2**62)
        self._tiles_until = np.cumsum(self._tiles_of_slide)
        if not self._tiles.is_weighted:
            groups_of_slide = self._end - self._begin
            self._weight = self._num_rows * np.repeat(self._tiles_of_slide / self._rows_of_slide, groups_of_slide)
        self._until = np.cumsum(self._weight)
        # Tiles of a bounded universe are the same in all runs on it; their order is not.
        is_bounded = self._universe.tiles_per_slide is not None
        self._place_seed = self._universe.seed if is_bounded else self._seed

    @property
    def digest(self) -> str:
        """What tells the list's content."""
        return self._tiles.digest

    @property
    def num_tiles(self) -> int:
        return int(self._tiles_until[-1])

    @property
    def shares(self) -> NDArray[np.float64]:
        return np.bincount(self._slide, self._weight, minlength=self._num_slides) / self._until[-1]

    def mix(self) -> list[tuple[str, float, int, int]]:
        names, ends = bands(self.magnifications)
        band, found = np.searchsorted(ends, self._mpp), list[tuple[str, float, int, int]]()
        for number, name in enumerate(names):
            slides, share = np.unique(self._slide[band == number]), self._weight[band == number].sum()
            patients = len(np.unique(self.patients[slides]))
            found.append((name, float(share / self._until[-1]), len(slides), patients))
        return found

    def told(self) -> Iterator[str]:
        for line in self._tiles.left_out.lines():
            yield f"{self._tiles.uri}: {line}"

    def footprint(self, specs: TileSpecs) -> Footprint:
        row = np.searchsorted(self.magnifications, specs.mpp)
        # Groups are sorted by slide and mpp.
        known = self._slide * len(self.magnifications) + self._mpp_row
        return self._footprints(np.searchsorted(known, specs.slide.astype(np.int64) * len(self.magnifications) + row))

    def around(self, specs: TileSpecs) -> list[tuple[TileSpecs, Footprint]]:
        del specs
        return []

    def _footprints(self, group: Indices) -> Footprint:
        slide, mpp = self._slide[group], self._mpp[group]
        return self._geometry.footprint(mpp, slide, self._level[group], self._reduction[group])

    def pairs(self) -> Pairs:
        side = self._footprints(np.arange(len(self._slide))).side
        return Pairs(self._slide, self._mpp, (side / self._size) ** 2)

    def specs(self, index: Indices, attempt: NDArray[np.int32]) -> TileSpecs:
        group, x, y = np.zeros(len(index), np.int64), np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
        for first in range(0, len(index), _MAX_DRAW):
            part = slice(first, first + _MAX_DRAW)
            group[part], row = self._choose(index[part], attempt[part].astype(np.int64))
            found = self._tiles.rows(row)
            x[part], y[part] = found["x"], found["y"]
            self._tiles.release()
        slide = self._slide[group].astype(np.int32)
        return TileSpecs(index, attempt, slide, x, y, self._mpp[group], self._own_mpp[group], self._size)

    def _choose(self, index: Indices, attempt: Indices) -> tuple[Indices, Indices]:
        """The group and the row of the list that each index draws."""
        universe = self._universe
        if universe.tiles_per_slide is None and universe.replacement:
            key, row = index, None
            group = self._by_weight(uniform(self._seed, index, _ONCE, Decision.GROUP))
        else:
            key, group, row = self._choose_tiles(index)
        # What can't be read at its slide's any place, or at none of its mpp, is replaced by any.
        other = np.flatnonzero(attempt >= _OWN_ATTEMPTS)
        drawn = uniform(self._place_seed, key[other], attempt[other], Decision.GROUP)
        group[other] = self._by_weight(drawn)
        within = self._within(group, hashed(self._place_seed, key, attempt, Decision.ROW))
        return group, within if row is None else np.where(attempt == 0, row, within)

    def _choose_tiles(self, index: Indices) -> tuple[Indices, Indices, Indices | None]:
        """Which of its slide's tiles an index is: what its place is hashed from, its group, and its row if settled."""
        total = self.num_tiles
        if not self._universe.replacement:
            epoch, number = index // total, index % total
            number = permuted(number, np.int64(total), hashed(self._seed, Decision.EPOCH_ORDER, epoch))  # pyright: ignore[reportArgumentType]
        elif not self._tiles.is_weighted:
            number = (uniform(self._seed, index, _ONCE, Decision.TILE) * total).astype(np.int64)
        else:
            at = self._by_weight(uniform(self._seed, index, _ONCE, Decision.GROUP))
            slide = np.searchsorted(self._of_slide, self._slide[at])
            assert self._universe.tiles_per_slide is not None, "without, a list with weights is drawn row by row"
            tile = uniform(self._seed, index, _ONCE, Decision.TILE) * self._universe.tiles_per_slide
            key = hashed(self._universe.seed, self._key[slide], tile.astype(np.int64)).astype(np.int64)
            begin = self._until[self._begin[slide]] - self._weight[self._begin[slide]]
            share = uniform(self._universe.seed, key, _ONCE, Decision.GROUP)
            wanted = begin + share * (self._until[self._end[slide] - 1] - begin)
            group = np.searchsorted(self._until, wanted, side="right")
            return key, np.clip(group, self._begin[slide], self._end[slide] - 1), None
        slide = np.searchsorted(self._tiles_until, number, side="right")
        tile = number - (self._tiles_until[slide] - self._tiles_of_slide[slide])
        order = hashed(self._universe.seed, Decision.TILE, self._key[slide])
        row = self._first_row[self._begin[slide]] + permuted(tile, self._rows_of_slide[slide], order)
        group = np.searchsorted(self._first_row, row, side="right") - 1
        return hashed(self._universe.seed, self._key[slide], tile).astype(np.int64), group, row

    def _by_weight(self, number: NDArray[np.float64]) -> Indices:
        """The groups that numbers from 0 to 1 fall on."""
        return np.minimum(np.searchsorted(self._until, number * self._until[-1], side="right"), len(self._until) - 1)

    def _within(self, group: Indices, drawn: NDArray[np.uint64]) -> Indices:
        """A row of each group by weight, as a row of the list."""
        place = (unit(drawn) * self._num_rows[group]).astype(np.int64)
        row = self._first_row[group] + place
        if not self._tiles.is_weighted:
            return row
        found, coin = self._tiles.rows(row), hashed_further(drawn, Decision.ROW_OR_OTHER) >> np.uint64(32)
        return np.where(coin < found["keep"], row, self._first_row[group] + found["other"])
