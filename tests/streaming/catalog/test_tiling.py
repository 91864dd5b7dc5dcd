"""Where the tiles of a slide lie."""

from fractions import Fraction
from math import floor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.catalog.tiling import Tiling, rows_and_columns, tile_extent

SIDES = st.integers(1, 600)
EXTENTS = st.floats(16, 300)


@given(SIDES, SIDES, EXTENTS)
def test_tiles_lie_edge_to_edge_on_the_slide_and_no_further_one_would(width: int, height: int, extent: float) -> None:
    tiling = Tiling.of(width, height, extent)
    corners = tiling.corners()
    assert corners.shape == (tiling.rows, tiling.columns, 2)
    exact = Fraction(extent)
    for count, side in ((tiling.columns, width), (tiling.rows, height)):
        assert count * exact <= side * (1 + Fraction(1, 2**50)) < (count + 1) * exact * (1 + Fraction(1, 2**49))
    for row in range(tiling.rows):
        for column in range(tiling.columns):
            assert corners[row, column].tolist() == [floor(column * extent), floor(row * extent)]


@given(SIDES, SIDES, EXTENTS)
def test_a_corner_tells_its_row_and_column(width: int, height: int, extent: float) -> None:
    tiling = Tiling.of(width, height, extent)
    wanted = np.argwhere(np.ones((tiling.rows, tiling.columns)))
    assert np.array_equal(rows_and_columns(tiling.corners().reshape(-1, 2), extent), wanted)


def test_an_extent_is_in_pixels_of_level_0() -> None:
    assert tile_extent(256, 0.5, 0.25) == 512
    assert 506 < tile_extent(256, 0.5, 0.2527) < 507
    assert Tiling.of(505, 2000, tile_extent(256, 0.5, 0.2527)) == Tiling(
        rows=3, columns=0, extent=tile_extent(256, 0.5, 0.2527)
    )
