"""Empty blocks of Aperio slides: OpenSlide paints them from the next finer level (openslide-vendor-aperio.c).

Some encoder has left out blocks, and those of coarser levels that lie over one are "sometimes corrupt": they count as
empty, too. Those of level 0 stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from streaming.slide import geometry
from streaming.slide.block_level import BlockLevel

# One empty block may be painted from so many pixels of finer levels: some 0.3 s, and 100 MB while it is done. One above
# hundreds of other empty ones costs more.
_MAX_PAINTED_PX = 2**25


def with_those_above(levels: Sequence[BlockLevel]) -> list[BlockLevel]:
    """Levels whose blocks count as empty, too, where they lie over an empty one of the level before."""
    found = list(levels[:1])
    for level in levels[1:]:
        finer = found[-1]
        empty = np.flatnonzero(finer.nbytes == 0)
        rows, columns = finer.grid
        next_rows, next_columns = level.grid
        down, across = blocks_for_one((rows, columns), (next_rows, next_columns))
        above = empty // columns // down * next_columns + empty % columns // across
        nbytes = level.nbytes.copy()
        nbytes[above[above < len(nbytes)]] = 0
        found.append(replace(level, nbytes=nbytes))
    return found


def blocks_for_one(grid: tuple[int, int], next_grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a level's blocks that OpenSlide counts for one of the next level, though it need not lie so.

    Rounded, halves up. Where one of them is 0, and a block is empty, OpenSlide 4.0.1 divides by it.
    """
    rows, columns = ((2 * own + other) // (2 * other) for own, other in zip(grid, next_grid, strict=True))
    return rows, columns


def are_cheap(levels: Sequence[BlockLevel]) -> bool:
    """Whether each empty block can be painted from few pixels."""
    if any(level.form.planes > 1 for level in levels):
        return False
    downsamples = geometry.downsamples([(level.width, level.height) for level in levels])
    costs = _stored(levels[0])
    for (finer, level), (fine, coarse) in zip(pairwise(levels), pairwise(downsamples), strict=True):
        # The sum of all costs left of and above each corner of the finer level's blocks.
        sums = np.pad(costs.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        row, column = np.divmod(np.flatnonzero(level.nbytes == 0), level.grid[1])
        top, bottom = _blocks_below(row, level.form.height, finer.form.height, finer.grid[0], coarse / fine)
        left, right = _blocks_below(column, level.form.width, finer.form.width, finer.grid[1], coarse / fine)
        costs = _stored(level)
        costs[row, column] = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        if costs[row, column].max(initial=0) > _MAX_PAINTED_PX:
            return False
    return True


def _stored(level: BlockLevel) -> NDArray[np.int64]:
    """Pixels of each block, int64 (rows, columns)."""
    return np.full(level.grid, level.form.width * level.form.height, np.int64)


def _blocks_below(
    block: NDArray[np.int64], length: int, finer_length: int, finer_count: int, ratio: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Along one axis, the first of the finer level's blocks that lie below each block, and the one after the last."""
    first = np.floor(block * length * ratio / finer_length).astype(np.int64)
    after = np.ceil((block + 1) * length * ratio / finer_length).astype(np.int64)
    return np.clip(first, 0, finer_count), np.clip(after, 0, finer_count)
