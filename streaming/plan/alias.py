"""Draws by weight in one step, whatever the number of weights: an alias table.

Of n rows each has a share `keep` and another row, `other`. Whoever draws takes a row at random, and stays with it by
that share, else goes to its other (Walker 1977). The table is made by going through light and heavy rows side by side:
each light one is filled up from the current heavy one, and a heavy one that has become light from the next. With
running sums that is a search in sorted numbers, and by additions and products alone, so the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def alias_table(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The share that each row keeps, float64 (n,), and its other row, int64 (n,); weights (n,) are all above 0.

    A row that keeps all is its own other.
    """
    scaled = weights * (len(weights) / np.cumsum(weights)[-1])
    keep, other = np.ones(len(weights)), np.arange(len(weights))
    lights, heavies = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
    if not len(lights) or not len(heavies):
        return keep, other
    lacks = np.concatenate([[0.0], np.cumsum(1 - scaled[lights])])
    spare = np.cumsum(scaled[heavies] - 1)
    # The heavy row that still has something to spare when a light one's turn comes.
    filled_by = np.minimum(np.searchsorted(spare, lacks[:-1], side="right"), len(heavies) - 1)
    keep[lights], other[lights] = scaled[lights], heavies[filled_by]
    # What a heavy row keeps when it has filled the last one before it ran out; the last one keeps the rest.
    filled = np.searchsorted(lacks[:-1], spare[:-1], side="left")
    keep[heavies[:-1]] = np.clip(1 + spare[:-1] - lacks[filled], 0.0, 1.0)
    other[heavies[:-1]] = heavies[1:]
    return keep, np.where(keep < 1, other, np.arange(len(weights)))
