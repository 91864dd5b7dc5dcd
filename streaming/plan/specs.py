"""What a plan gives: tiles to be read, one or many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming.plan.counter_random import Indices


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
class Pairs:
    """Slides, rows of the catalog, and the µm/px that they are read at, as columns (n,)."""

    slide: Indices
    mpp: NDArray[np.float64]
    pixels_read: NDArray[np.float64]
    """level pixels that one of a tile is made of"""
