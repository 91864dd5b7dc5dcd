"""The plan: sample index → tile, a pure function of (catalog, seed, mix, index).

No state, no I/O, no pass over the data: that is what makes a stream shuffled, resumable and elastic
(`streaming/README.md`). Every random number is a hash of (seed, index, attempt, what it decides).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.errors import ConfigError
from streaming.plan.counter_random import Indices
from streaming.plan.footprints import Corners, Footprint
from streaming.plan.list_draws import ListDraws
from streaming.plan.list_packing import packed_list
from streaming.plan.magnifications import DEFAULT_MPP, Mpp
from streaming.plan.on_tissue import TissueDraws
from streaming.plan.slide_choice import SlideChooser
from streaming.plan.specs import Pairs, TileSpec, TileSpecs
from streaming.plan.strata import Strata, of_cohorts
from streaming.plan.universe import HeldOut, ShuffleQuality, Universe, shuffle_quality
from streaming.plan.views import View, check_views
from streaming.slide.geometry import MANY_PIXELS, MAX_UPSAMPLING, MPP_TOLERANCE

# Past this, two of the reductions 1, 2, 4 and 8 would serve one magnification.
_MAX_TOLERANCE = 0.3

# Share of a tile's area that is tissue, at least (arXiv 2404.15217).
MIN_TISSUE = 0.4


class Draws(Protocol):
    """Where a plan's tiles come from: the tissue of slides, or a list."""

    @property
    def magnifications(self) -> NDArray[np.float64]:
        """The µm/px that tiles are asked for, rising."""
        ...

    @property
    def num_tiles(self) -> int | None:
        """Distinct tiles of the universe; None: without bound."""
        ...

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each slide's share of all tiles, float64 (slides,); they sum to 1."""
        ...

    @property
    def patients(self) -> Indices:
        """The number of each slide's patient, int64 (slides,)."""
        ...

    @property
    def digest(self) -> str | None:
        """What tells the content of a list; None: tiles lie on tissue."""
        ...

    def mix(self) -> list[tuple[str, float, int, int]]:
        """Of each band of µm/px its name, its share of the mix, and the slides drawn at it, of how many patients."""
        ...

    def told(self) -> Iterator[str]:
        """What is never drawn, and why: a line each."""
        ...

    def specs(self, index: Indices, attempt: NDArray[np.int32]) -> TileSpecs:
        """As `TilePlan.specs`."""
        ...

    def footprint(self, specs: TileSpecs) -> Footprint:
        """What tiles cover."""
        ...

    def around(self, specs: TileSpecs) -> list[tuple[TileSpecs, Footprint]]:
        """The further views of tiles, and what they cover; none where there are no views."""
        ...

    def pairs(self) -> Pairs:
        """All slides at all magnifications that are drawn of them."""
        ...


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
    index by itself); held_out keeps patients out of it (None: nobody). tiles is a list of tiles that are drawn instead
    of any on tissue: a Parquet file with the columns slide, x, y, mpp, and if wanted weight or cluster
    (`streaming.plan.list_packing`); then mpp and min_tissue say nothing, and there are no strata. views are scales at
    which each place is looked at (none: one, by mpp); then mpp says nothing: `plan[i]` is the first view, `views_of`
    gives all, and each view of a place is on enough tissue, of a slide that serves them all.

    Raises:
        ConfigError: weights, size, shares or views make no sense.
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
        tiles: str | None = None,
        views: Sequence[View] = (),
    ) -> None:
        if size < 1:
            raise ConfigError(f"tile size is {size} px; it must be at least 1")
        if not 0 < min_tissue <= 1:
            raise ConfigError(f"min_tissue is {min_tissue}; it is a share above 0 and up to 1")
        if not 0 <= mpp_tolerance <= _MAX_TOLERANCE:
            raise ConfigError(f"mpp_tolerance is {mpp_tolerance}; it is a share from 0 to {_MAX_TOLERANCE}")
        if not max_upsampling >= 1:
            raise ConfigError(f"max_upsampling is {max_upsampling}; it must be at least 1")
        if corners not in get_args(Corners):
            raise ConfigError(f"corners are {corners!r}; take one of {', '.join(get_args(Corners))}")
        check_views(views)
        self.views = tuple(views)
        self.seed = seed
        self.size = size
        self.mpp_tolerance = mpp_tolerance
        self.corners: Corners = corners
        self.universe = universe or Universe()
        self._slides = catalog.slides()
        names, stain = np.unique([name or "" for name in catalog.metadata_or_none("stain")], return_inverse=True)
        self.stains: list[str] = names.tolist()
        """what the catalog's column `stain` has, "" where it tells none"""
        self.stain = stain.astype(np.int16)
        """that of each slide, int16 (slides,): a number in `stains`"""
        self._draws: Draws
        strata = of_cohorts(cohorts, strata or Strata())
        if tiles is None:
            first, others = {view.mpp: 1.0 for view in views[:1]} or mpp, [view.mpp for view in views[1:]]
            chooser = SlideChooser(
                catalog, seed, first, size, strata, max_upsampling, mpp_tolerance, self.universe, held_out, others
            )
            self._draws = TissueDraws(catalog, chooser, size, min_tissue, corners)
        else:
            _check_alone(tiles, strata, corners, views)
            of_list = packed_list(tiles, catalog, size, mpp_tolerance, max_upsampling)
            self._draws = ListDraws(catalog, of_list, seed, size, mpp_tolerance, self.universe, held_out)

    @property
    def slides(self) -> list[str]:
        """The slides' addresses; `TileSpecs.slide` counts in this list."""
        return self._slides

    @property
    def magnifications(self) -> NDArray[np.float64]:
        """The µm/px that tiles are asked for, rising."""
        return self._draws.magnifications

    @property
    def num_tiles(self) -> int | None:
        """Distinct tiles of the universe; None: without bound."""
        return self._draws.num_tiles

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each slide's share of all tiles, float64 (slides,); they sum to 1."""
        return self._draws.shares

    @property
    def patients(self) -> Indices:
        """The number of each slide's patient, int64 (slides,)."""
        return self._draws.patients

    @property
    def drawn_from(self) -> tuple[int, int]:
        """How many slides the tiles come from, and of how many patients."""
        drawn = self.shares > 0
        return int(drawn.sum()), len(np.unique(self.patients[drawn]))

    def mix_lines(self, most: int = 6) -> list[str]:
        """What each magnification, or band of a range, draws from, and up to `most` lines on what is never drawn."""
        lines = [
            f"{band} µm/px: {share:.0%} of the tiles, from {slides:,} slides of {patients:,} patients"
            for band, share, slides, patients in self._draws.mix()
        ]
        told = list(self._draws.told())
        return [*lines, *told[:most], *([f"serve none: {len(told) - most:,} more slides"] if len(told) > most else [])]

    @property
    def left_out(self) -> list[str]:
        """What of a list is never drawn, and why: a line each; of what lies on tissue, none."""
        return [] if self._draws.digest is None else list(self._draws.told())

    @property
    def digest(self) -> str | None:
        """What tells the content of the list that it draws from; None: it draws on tissue."""
        return self._draws.digest

    @property
    def is_exhaustive(self) -> bool:
        """Whether each of them comes once before any comes again."""
        return not self.universe.replacement

    def shuffle_quality(self, batches: Iterable[NDArray[np.int32]]) -> ShuffleQuality:
        """How well batches are mixed, each the slides of its tiles: int32 (batch,), rows of the catalog."""
        return shuffle_quality(batches, self._draws.shares, self._draws.patients)

    @property
    def num_views(self) -> int:
        """Tiles of a sample."""
        return max(1, len(self.views))

    def views_of(self, specs: TileSpecs) -> list[TileSpecs]:
        """All views of the places that tiles are the first view of, these before the others; without views, these."""
        return [specs, *(view for view, _ in self._draws.around(specs))]

    def slides_of(self, index: Indices) -> NDArray[np.int32]:
        """The slides of sample indices, int32 (n,): rows of the catalog."""
        return self.specs(index).slide

    def block_costs(self, index: Indices) -> BlockCosts | None:
        """What a tile of sample indices, int64 (n,), costs on average; None where OpenSlide reads all of their slides.

        With views, a tile of each.
        """
        specs, found = self.specs(index), list[tuple[Indices, Indices]]()
        for view, footprint in [(specs, self._draws.footprint(specs)), *self._draws.around(specs)]:
            found.append((footprint.num_blocks(0, view.x), footprint.num_blocks(1, view.y)))
        columns, rows = (np.concatenate(of_axis) for of_axis in zip(*found, strict=True))
        known = rows > 0
        if not known.any():
            return None
        return BlockCosts(float((columns * rows)[known].mean()), float(rows[known].mean()), float(known.mean()))

    @property
    def pairs(self) -> Pairs:
        """All slides at all magnifications that are drawn of them."""
        return self._draws.pairs()

    def without_levels(self) -> list[tuple[float, list[str], float]]:
        """Magnifications at which a tile of some drawn slides is made of 32 times its pixels and more.

        Of each its µm/px, those slides, the worst first, and by how many times of the worst.
        """
        pairs, found = self.pairs, list[tuple[float, list[str], float]]()
        for mpp in np.unique(pairs.mpp[pairs.pixels_read >= MANY_PIXELS]).tolist():
            at = (pairs.mpp == mpp) & (pairs.pixels_read >= MANY_PIXELS)
            costs, slides = pairs.pixels_read[at], pairs.slide[at]
            order = np.argsort(-costs, kind="stable")
            found.append((mpp, [self._slides[row] for row in slides[order]], float(costs[order[0]])))
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
        return self._draws.specs(index, attempt)


def _check_alone(tiles: str, strata: Strata, corners: Corners, views: Sequence[View]) -> None:
    """Refuses what a list decides by itself."""
    given = {
        "views (data.views, --views)": bool(views),
        "strata or cohorts (data.strata, --strata, data.cohorts, --cohorts)": bool(strata.columns),
        f"corners {corners} (data.corners, --corners)": corners != "anywhere",
    }
    if named := [what for what, is_given in given.items() if is_given]:
        raise ConfigError(f"{tiles}: a list has its tiles' places and weights; leave out {', '.join(named)}")
