"""Which slide and magnification each sample index draws; where on the slide comes after (`streaming.plan.plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.errors import PlanError
from streaming.plan.counter_random import Indices, evenly, hashed, text_keys, uniform
from streaming.plan.decisions import Decision
from streaming.plan.footprints import Footprints, SlideGeometry
from streaming.plan.magnifications import Mpp, bands, mpp_weights
from streaming.plan.strata import Strata, known_names, members
from streaming.plan.universe import (
    HeldOut,
    Universe,
    block_quotas,
    dealt,
    drawn_slides,
    exhaustive,
    patient_ids,
    window_shares,
)
from streaming.slide.geometry import is_fine_enough

# A draw that lands on too little tissue is drawn again: on the same slide first, so that slides with ragged tissue are
# not drawn less, then on others.
TRIES_PER_SLIDE = 8
MAX_TRIES = 128

# A tile that belongs to a slide (one of its K, or its window's) stays with it for so many draws and replacements.
_OWN_TRIES, _OWN_ATTEMPTS = 32, 4
# Then it is one of its window's slides; if these can't be read either, of any.
_WINDOW_ATTEMPTS = 16

# The counter of decisions that an index takes once, however often its place is drawn again.
_ONCE = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Choice:
    """What some indices draw, as columns (n,)."""

    key: Indices
    """what the random numbers of the place are hashed from"""
    mpp_row: Indices
    stratum: Indices
    own: NDArray[np.int32] | None
    """the slide that it belongs to; None: each draw takes one of those that serve the magnification"""
    window: Indices | None

    def __getitem__(self, at: Indices) -> Choice:
        """Some of them."""
        own = None if self.own is None else self.own[at]
        window = None if self.window is None else self.window[at]
        return Choice(self.key[at], self.mpp_row[at], self.stratum[at], own, window)


class SlideChooser:
    """Chooses among a catalog's slides by the weights of magnifications and strata, within a universe.

    As it is, an index draws its magnification, then a slide that serves it. Within windows, or of a bounded number of
    tiles, it draws a slide, then one of its tiles, which has a magnification that the slide serves. A slide must serve
    `views`, further µm/px, as well.

    Raises:
        ConfigError: weights make no sense.
        PlanError: no slide can serve a magnification or stratum.
    """

    def __init__(
        self,
        catalog: Catalog,
        seed: int,
        mpp: Mpp,
        size: int,
        strata: Strata,
        max_upsampling: float,
        mpp_tolerance: float,
        universe: Universe,
        held_out: HeldOut | None,
        views: Sequence[float] = (),
    ) -> None:
        universe.check_ends()
        self._seed, self._universe, self._uri = seed, universe, catalog.uri
        weights = mpp_weights(mpp)
        self.mpp_values, self._mpp_cumulative = np.array(list(weights)), _cumulative(np.array(list(weights.values())))
        slides = catalog.slides()
        patients = catalog.metadata_or_none("patient")
        self.patients = patient_ids(slides, patients)
        self._chosen = drawn_slides(slides, patients, universe, held_out)
        geometry = SlideGeometry.of_catalog(catalog, size)
        self.footprints = Footprints.of_slides(geometry, self.mpp_values, mpp_tolerance)
        is_fine = is_fine_enough(geometry.mpp, self.mpp_values[:, None], max_upsampling, mpp_tolerance)
        has_tissue = catalog.column("tissue_total") > 0
        fits = self.footprints.fit()
        self.views = Footprints.of_slides(geometry, np.array(views), mpp_tolerance) if views else None
        """what further views cover"""
        if self.views:
            fits &= self.views.fit().all(axis=0)
            for mpp_of_view in views:
                is_fine &= is_fine_enough(geometry.mpp, np.array(mpp_of_view), max_upsampling, mpp_tolerance)
        self._serves = fits & has_tissue & is_fine & self._chosen
        self._is_fine: NDArray[np.bool_] = cast(Any, is_fine.any(axis=0))
        self._has_tissue = has_tissue
        self._check_magnifications(size, max_upsampling)
        self._serves_any: NDArray[np.bool_] = cast(Any, self._serves.any(axis=0))
        self._members = members(catalog, strata, self._serves_any)
        self._weights = self._members.weights
        self._pool_slides(catalog, strata)
        if universe.draws_tiles:
            self._pool_strata(slides)
        # Tiles of a bounded universe are the same in all runs on it; their order is not.
        self.place_seed = seed if universe.tiles_per_slide is None else universe.seed

    @property
    def _or_more_slides(self) -> str:
        share = self._universe.slides
        return f", or raise universe.slides (--slides) {share}" if share < 1 else ""

    def _check_magnifications(self, size: int, max_upsampling: float) -> None:
        for row, mpp in enumerate(self.mpp_values):
            if not self._serves[row].any():
                finest = self.footprints.geometry.mpp[self._chosen].min()
                if self.views:
                    mpps = ", ".join(f"{view:.4g}" for view in (mpp, *self.views.mpp_values))
                    raise PlanError(
                        f"{self._uri}: none of its {int(self._chosen.sum())} slides can give {size} px tiles at all of "
                        f"{mpps} µm/px (too small, too coarse, or no tissue; the finest has {finest:g} µm/px, and is "
                        f"enlarged {max_upsampling:g} times at most: data.max_upsampling, --max-upsampling); take "
                        f"other views (data.views, --views){self._or_more_slides}"
                    )
                raise PlanError(
                    f"{self._uri}: none of its {int(self._chosen.sum())} slides can give a {size} px tile at {mpp:.4g} "
                    f"µm/px (too small, too coarse, or no tissue; the finest has {finest:g} µm/px, and is enlarged "
                    f"{max_upsampling:g} times at most: data.max_upsampling, --max-upsampling); take {mpp:.4g} out of "
                    f"the mpp (data.mpp, --mpp){self._or_more_slides}"
                )

    def _pool_slides(self, catalog: Catalog, strata: Strata) -> None:
        """The slides that serve each magnification and stratum, and the strata's shares at each magnification."""
        names = self._members.names
        _, served = self._by_stratum(self._serves_any)
        if not served.all():
            known = ", ".join(known_names(catalog, strata)[:12])
            raise PlanError(
                f"{self._uri}: no slide of {'/'.join(strata.columns)} {names[int(served.argmin())]!r} among the "
                f"{int(self._chosen.sum())} of the run can give tiles; there are: {known}; take it out of the weights "
                f"(data.strata.weights, data.cohorts, --cohorts){self._or_more_slides}"
            )
        pools, sizes = zip(*map(self._by_stratum, self._serves), strict=True)
        self._pool, self._pool_size = np.concatenate(pools), np.concatenate(sizes)
        self._pool_start = np.concatenate([[0], np.cumsum(self._pool_size)[:-1]]).astype(np.int64)
        shares = self._weights * (self._pool_size.reshape(-1, len(names)) > 0)
        if not shares.any(axis=1).all():
            mpp = self.mpp_values[int(shares.any(axis=1).argmin())]
            raise PlanError(
                f"{self._uri}: no slide of the run's strata serves {mpp:.4g} µm/px; take it out of the mpp "
                "(data.mpp, --mpp)"
            )
        self._stratum_by_mpp = np.array([_cumulative(row) for row in shares])

    def _by_stratum(self, serve: NDArray[np.bool_]) -> tuple[NDArray[np.int32], Indices]:
        """Of the slides that serve, those of strata, one stratum after the other; and how many each stratum has."""
        of_slide = self._members.stratum
        slides = np.flatnonzero(serve & (of_slide >= 0))
        sizes = np.bincount(of_slide[slides], minlength=len(self._weights)).astype(np.int64)
        return slides[np.argsort(of_slide[slides], kind="stable")].astype(np.int32), sizes

    def _pool_strata(self, slides: list[str]) -> None:
        """The slides of each stratum, whatever magnifications they serve, and what each slide serves."""
        self._stratum, self._stratum_size = self._by_stratum(self._serves_any)
        self._stratum_start = np.concatenate([[0], np.cumsum(self._stratum_size)[:-1]]).astype(np.int64)
        self._stratum_cumulative = _cumulative(self._weights)
        self._slide_key = text_keys(slides)
        weights = np.diff(self._mpp_cumulative, prepend=0.0)[:, None] * self._serves
        total = np.cumsum(weights, axis=0)
        # Exactly 1 at the end; of slides that serve nothing, never asked for.
        self._slide_mpp = (total / np.where(total[-1] > 0, total[-1], 1)).T
        if not self._universe.replacement:
            self._quotas = block_quotas(self._weights.tolist())
        if self._universe.window is not None:
            self._shares = window_shares(self._universe.window_slides, self._weights, self._stratum_size)

    def choose(self, index: Indices) -> Choice:
        """What indices, int64 (n,), draw."""
        if self._universe.draws_tiles:
            return self._choose_tiles(index)
        number = uniform(self._seed, index, _ONCE, Decision.MAGNIFICATION)
        mpp_row = np.searchsorted(self._mpp_cumulative, number, side="right")
        number = uniform(self._seed, index, _ONCE, Decision.STRATUM)
        stratum = np.zeros(len(index), np.int64)
        for row in np.unique(mpp_row):
            at = mpp_row == row
            stratum[at] = np.searchsorted(self._stratum_by_mpp[row], number[at], side="right")
        return Choice(index, mpp_row, stratum, None, None)

    def _choose_tiles(self, index: Indices) -> Choice:
        num_tiles, window = self._universe.tiles_per_slide, None
        if num_tiles is not None and not self._universe.replacement:
            stratum, at = exhaustive(index, self._quotas, self._stratum_size * num_tiles, self._seed)
            position, tile = at // num_tiles, at % num_tiles
        else:
            number = uniform(self._seed, index, _ONCE, Decision.STRATUM)
            stratum = np.searchsorted(self._stratum_cumulative, number, side="right")
            number = uniform(self._seed, index, _ONCE, Decision.SLIDE)
            if self._universe.window is None:
                position = (number * self._stratum_size[stratum]).astype(np.int64)
            else:
                window = index // self._universe.window
                position = self._dealt(window, number, stratum)
            tile = (uniform(self._seed, index, _ONCE, Decision.TILE) * (num_tiles or 1)).astype(np.int64)
        own = self._stratum[self._stratum_start[stratum] + position]
        if num_tiles is None:
            key, number = index, uniform(self._seed, index, _ONCE, Decision.MAGNIFICATION)
        else:
            of_slide = self._slide_key[own]
            key = hashed(self._universe.seed, of_slide, tile).astype(np.int64)
            number = evenly(hashed(self._universe.seed, Decision.MAGNIFICATION_OF_TILE, of_slide), tile)
        mpp_row = (number[:, None] >= self._slide_mpp[own]).sum(axis=1)
        return Choice(key, mpp_row, stratum, own, window)

    def _dealt(self, window: Indices, number: NDArray[np.float64], stratum: Indices) -> Indices:
        slot = (number * self._shares[stratum]).astype(np.int64)
        return dealt(window, slot, stratum, self._shares, self._stratum_size, self._seed)

    def slides(self, choice: Choice, attempt: NDArray[np.int32], trial: int) -> NDArray[np.int32]:
        """The slides of one draw, rows of the catalog, int32 (n,)."""
        counter = attempt.astype(np.int64) * MAX_TRIES + trial // TRIES_PER_SLIDE
        number = uniform(self.place_seed, choice.key, counter, Decision.SLIDE)
        pool = choice.mpp_row * len(self._weights) + choice.stratum
        slide = self._pool[self._pool_start[pool] + (number * self._pool_size[pool]).astype(np.int64)]
        if choice.own is None:
            return slide
        if choice.window is not None:
            position = self._dealt(choice.window, number, choice.stratum)
            near = self._stratum[self._stratum_start[choice.stratum] + position]
            near = np.where(self._serves[choice.mpp_row, near], near, choice.own)
            slide = np.where(attempt < _WINDOW_ATTEMPTS, near, slide)
        return np.where((attempt < _OWN_ATTEMPTS) & (trial < _OWN_TRIES), choice.own, slide)

    def drawn_from(self) -> list[tuple[str, float, int, int]]:
        """Of each band of µm/px its name, its share of the mix, and the slides drawn at it, of how many patients."""
        names, ends = bands(self.mpp_values)
        band, shares = np.searchsorted(ends, self.mpp_values), np.diff(self._mpp_cumulative, prepend=0.0)
        drawn = self._serves & (self._members.stratum >= 0)
        found: list[tuple[str, float, int, int]] = []
        for number, name in enumerate(names):
            slides = drawn[band == number].any(axis=0)
            patients = len(np.unique(self.patients[slides]))
            found.append((name, float(shares[band == number].sum()), int(slides.sum()), patients))
        return found

    def serve_none(self) -> list[tuple[int, str]]:
        """The slides of universe and strata, rows of the catalog, that serve no magnification, each with the reason."""
        coarse, mpp = ~self._is_fine, self.footprints.geometry.mpp
        found = list[tuple[int, str]]()
        for row in np.flatnonzero(self._chosen & ~self._serves_any & ~self._members.left_out).tolist():
            if not self._has_tissue[row]:
                found.append((row, "no tissue"))
            else:
                found.append((row, f"too coarse, {mpp[row]:g} µm/px" if coarse[row] else "too small for a tile"))
        return found

    def pixels_read(self) -> NDArray[np.float64]:
        """Level pixels that one of a tile is made of, float64 (magnifications, slides); 0 where none is drawn."""
        return np.where(self._serves, self.footprints.pixels_read(), 0.0)

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each slide's share of all draws, float64 (slides of the catalog,); sums to 1."""
        shares = np.zeros(self._serves.shape[1])
        if self._universe.draws_tiles:
            weights = self._weights / self._weights.sum()
            np.add.at(shares, self._stratum, np.repeat(weights / self._stratum_size, self._stratum_size))
            return shares
        weights = np.diff(self._mpp_cumulative, prepend=0.0)[:, None] * np.diff(self._stratum_by_mpp, prepend=0.0)
        each = weights.ravel() / np.maximum(1, self._pool_size)
        np.add.at(shares, self._pool, np.repeat(each, self._pool_size))
        return shares

    @property
    def num_tiles(self) -> int | None:
        """Distinct tiles of the universe; None: without bound."""
        per_slide = self._universe.tiles_per_slide
        return None if per_slide is None else int(self._stratum_size.sum()) * per_slide


def _cumulative(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.cumsum(shares)
    return total / total[-1]  # exactly 1 at the end, which shares.sum() need not give
