"""What the plan's random numbers decide."""

from __future__ import annotations

from enum import IntEnum


class Decision(IntEnum):
    """What a random number is for: a word of the hash that it is, so that no two decisions share one.

    A plan is these numbers: with another one every run would draw other tiles. None changes or is given a new meaning;
    a new decision gets a new number.
    """

    MAGNIFICATION = 0
    STRATUM = 1
    SLIDE = 2

    # A place on a slide: a cell of the tissue grid, a point in the cell, and where around the point the tile lies.
    CELL = 3
    CELL_X = 4
    CELL_Y = 5
    OFFSET_X = 6
    OFFSET_Y = 7

    # Places on the grid of blocks: of those around the point the tile's first one, and where in it the tile begins.
    BLOCK_X = 8
    BLOCK_Y = 9
    IN_BLOCK_X = 10
    IN_BLOCK_Y = 11

    # Universes that draw a slide's tile first: which of its tiles, and where its sequence of magnifications starts.
    TILE = 50
    MAGNIFICATION_OF_TILE = 51

    # Tiles of a list: which of its groups, which row of the group, and whether it is that row or its other.
    GROUP = 60
    ROW = 61
    ROW_OR_OTHER = 62

    # Which patients belong to a universe, and the orders of what is drawn from it.
    PATIENT = 100
    BLOCK_ORDER = 101
    EPOCH_ORDER = 102
    WINDOW_DEAL = 103
