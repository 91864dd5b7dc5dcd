"""What many draws contain: how many slides and patients, which magnifications, which values of the metadata."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.plan.magnifications import bands
from streaming.plan.plan import TilePlan

_AT_ONCE = 100_000
_MOST_VALUES = 12
_MISSING = "none"


@dataclass(frozen=True)
class Drawn:
    """A value, and what is drawn of it."""

    value: str
    share: float
    """of the draws"""
    num_slides: int
    """that were drawn"""
    share_of_slides: float
    """of those drawn"""


@dataclass(frozen=True)
class Census:
    """What some draws contain."""

    num_tiles: int
    num_slides: int
    num_patients: int
    most_of_a_slide: float
    """share of the draws that the slide has which is drawn most"""
    half_from: int
    """slides that half of the draws come from, the most drawn ones"""
    columns: dict[str, list[Drawn]]
    """by what: `µm/px`, and each column of metadata, with its most drawn values; the rest together as `others`"""

    def lines(self) -> Iterator[str]:
        """The numbers, for a terminal."""
        yield (
            f"{self.num_tiles:,} tiles of {self.num_slides:,} slides and {self.num_patients:,} patients: half of them "
            f"from {self.half_from:,} slides, {self.most_of_a_slide:.3%} from the one that is drawn most"
        )
        for name, values in self.columns.items():
            yield f"{name}:"
            width = max(len(drawn.value) for drawn in values)
            for drawn in values:
                yield (
                    f"  {drawn.value:<{width}}  {drawn.share:>6.1%} of the tiles, {drawn.num_slides:>7,} slides "
                    f"({drawn.share_of_slides:.1%})"
                )


def census(plan: TilePlan, catalog: Catalog, num_tiles: int) -> Census:
    """What the first draws of a plan contain; nothing is read but the catalog."""
    names, ends = bands(plan.magnifications)
    of_band = np.zeros((len(names), len(catalog)), np.int64)
    for first in range(0, num_tiles, _AT_ONCE):
        specs = plan.specs(np.arange(first, min(first + _AT_ONCE, num_tiles)))
        np.add.at(of_band, (np.searchsorted(ends, specs.mpp), specs.slide), 1)
    counts = of_band.sum(axis=0)
    drawn = np.flatnonzero(counts)
    falling = np.sort(counts)[::-1]
    columns = {"µm/px": [_drawn(name, of[of > 0], counts[drawn]) for name, of in zip(names, of_band, strict=True)]}
    for name in catalog.metadata_columns:
        if name != "patient":  # told by their number
            values = np.array([value or _MISSING for value in catalog.metadata(name)])
            columns[name] = _by_value(values[drawn], counts[drawn])
    return Census(
        num_tiles=num_tiles,
        num_slides=len(drawn),
        num_patients=len(np.unique(plan.patients[drawn])),
        most_of_a_slide=float(falling[0] / num_tiles),
        half_from=int(np.searchsorted(np.cumsum(falling), num_tiles / 2)) + 1,
        columns=columns,
    )


def _drawn(value: str, tiles: NDArray[np.int64], all_tiles: NDArray[np.int64]) -> Drawn:
    """What slides have of the draws, of which all drawn slides have so many each."""
    return Drawn(value, float(tiles.sum() / all_tiles.sum()), len(tiles), len(tiles) / len(all_tiles))


def _by_value(values: NDArray[np.str_], tiles: NDArray[np.int64]) -> list[Drawn]:
    """The most drawn values of drawn slides, and all others together."""
    names, of_slide = np.unique(values, return_inverse=True)
    order = np.argsort(-np.bincount(of_slide, weights=tiles), kind="stable")
    shown = order[: len(order) if len(order) <= _MOST_VALUES + 1 else _MOST_VALUES]
    found = [_drawn(str(names[row]), tiles[of_slide == row], tiles) for row in shown.tolist()]
    if rest := len(order) - len(shown):
        found.append(_drawn(f"{rest:,} others", tiles[~np.isin(of_slide, shown)], tiles))
    return found
