"""Views: one place at several scales, of which a sample has a tile each.

The first view is drawn as any tile. Where the others lie follows from it: they have its centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streaming.errors import ConfigError
from streaming.plan.footprints import Footprint, Footprints, Ints
from streaming.plan.specs import TileSpecs

# By how much the ratio of two steps may be off a whole number and be taken for it: downsamples are rounded.
_WHOLE = 0.01


@dataclass(frozen=True, kw_only=True)
class View:
    """One scale at which a place is looked at."""

    mpp: float
    """µm/px"""
    same_centre: bool = False
    """whether it lies around the centre of the first view; all but the first one do"""


def check_views(views: Sequence[View]) -> None:
    """Refuses what are no views; none at all are fine.

    Raises:
        ConfigError: a µm/px that is none or comes twice, one view alone, or a view that is to lie somewhere else.
    """
    if not views:
        return
    mpps = [view.mpp for view in views]
    if len(views) == 1:
        raise ConfigError("views has one view: give at least two, or that µm/px as mpp (data.mpp)")
    if not all(0 < mpp < math.inf for mpp in mpps) or len(set(mpps)) < len(mpps):
        raise ConfigError(f"views have {', '.join(f'{mpp:g}' for mpp in mpps)} µm/px; give numbers above 0, each once")
    if views[0].same_centre:
        raise ConfigError("views[0] has same_centre: it is the first one, around whose centre the others lie")
    if apart := [number for number, view in enumerate(views) if number and not view.same_centre]:
        raise ConfigError(
            f"views[{apart[0]}] has no same_centre: true; views are of one place, another place is another sample"
        )


def aligned(footprint: Footprint, views: Sequence[Footprint]) -> Footprint:
    """That of first views whose corners leave those of the others at whole pixels of theirs.

    Corners become multiples of the pixels of all views, where these are whole numbers of each other.
    """
    common = np.ones(len(footprint.mpp), np.int64)
    for view in views:
        ratio = view.step / footprint.step
        whole = np.maximum(1, np.rint(ratio)).astype(np.int64)
        common = np.where(np.abs(ratio - whole) <= _WHOLE * whole, np.lcm(common, whole), common)
    return replace(footprint, multiples=common.astype(np.float64))


def centred(footprint: Footprint, view: Footprint, corner: Ints) -> Ints:
    """Level-0 pixels at which views begin along an axis that have the centre of first ones, int64 (n,).

    A corner is a whole pixel of its own tile, so centres are at most half a pixel of the coarser one apart; none where
    these are whole numbers of each other, and the tile's side a multiple of twice that. It may lie outside the slide.
    """
    wanted = corner + (footprint.extent - view.extent) / 2
    return np.rint(np.rint(wanted / view.step) * view.step).astype(np.int64)


def of_slides(views: Footprints | None, slide: NDArray[np.integer]) -> list[Footprint]:
    """What each of the further views covers on some slides; none without such views."""
    if views is None:
        return []
    return [views.at(np.full(len(slide), row), slide) for row in range(len(views.mpp_values))]


def around(specs: TileSpecs, footprint: Footprint, view: Footprint, mpp: float) -> TileSpecs:
    """A further view of tiles, the first views, which `specs` and `footprint` are of: a pure function of these."""
    x, y = centred(footprint, view, specs.x), centred(footprint, view, specs.y)
    wanted = np.full(len(specs), mpp)
    return TileSpecs(specs.index, specs.attempt, specs.slide, x, y, wanted, view.mpp, specs.size)
