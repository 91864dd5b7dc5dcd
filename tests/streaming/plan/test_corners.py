"""Corners on the grid of blocks: the fewest blocks, still where the tissue is."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog import Catalog
from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.plan.universe import Universe
from streaming.slide import geometry
from tests.streaming.plan.test_plan import CATALOG, CELL_UM, catalog, level, row

MPP = {0.25: 1, 0.5: 1, 1.0: 1, 2.0: 1}


def made(block: int, mpp: float, rows: int = 40, columns: int = 50) -> Catalog:
    width, height = columns * CELL_UM / mpp, rows * CELL_UM / mpp
    levels = [level(width // factor, height // factor, float(factor), block) for factor in (1, 4, 16)]
    return catalog([row("a", mpp, 1, rows=rows, columns=columns, levels=levels)])


CATALOGS = {(block, mpp): made(block, mpp) for block in (240, 256, 512) for mpp in (0.25, 0.2527, 0.5022)}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(CATALOGS)), st.integers(0, 2**40), st.sampled_from([100, 224, 256]))
def test_a_tile_touches_as_few_blocks_as_one_of_its_side_can(kind: tuple[int, float], start: int, size: int) -> None:
    block, mpp = kind
    plan = TilePlan(CATALOGS[kind], mpp=MPP, size=size, corners="blocks", min_tissue=0.1)
    specs = plan.specs(np.arange(start, start + 64))
    touched = []
    levels = CATALOGS[kind][0].levels
    for i in range(64):
        source = geometry.tile_source(mpp, (1.0, 4.0, 16.0), float(specs.mpp[i]), plan.mpp_tolerance)
        box = geometry.tile_box(source, int(specs.x[i]), int(specs.y[i]), size)
        for first, side, whole in ((box.x, box.width, "width"), (box.y, box.height, "height")):
            assert 0 <= first <= levels[source.level][whole] - side
            num = (first + side - 1) // block - first // block + 1
            assert num == -(-side // block)
            touched.append(num)
    columns, rows = np.array(touched).reshape(-1, 2).T
    costs = plan.block_costs(np.arange(start, start + 64))
    assert costs is not None
    assert (costs.blocks, costs.requests, costs.share) == (np.mean(columns * rows), np.mean(rows), 1.0)


@pytest.mark.parametrize("corners", ["anywhere", "blocks"])
@pytest.mark.parametrize("mpp", [0.25, 0.2527])
def test_tiles_lie_within_what_was_scanned(mpp: float, corners) -> None:
    width, height = int(50 * CELL_UM / mpp), int(40 * CELL_UM / mpp)
    bounds = (3001, 2003, 5000, 4321)
    levels = [level(width // factor, height // factor, float(factor), 256) for factor in (1, 4, 16)]
    several = [
        row("bounded", mpp, 1, levels=levels, bounds=bounds),
        row("across", mpp, 2, levels=levels, bounds=(3001, 0, 5000, height)),
        row("small", mpp, 3, levels=levels, bounds=(6001, 5003, 600, 540)),
    ]
    plan = TilePlan(catalog(several), mpp=MPP, corners=corners, min_tissue=0.1)
    specs = plan.specs(np.arange(4000))
    extent = 256 * specs.own_mpp / mpp
    for number, slide in enumerate(several):
        at = specs.slide == [Path(uri).stem for uri in plan.slides].index(Path(slide.row.slide).stem)
        left, top, wide, high = slide.row.bounds
        for corner, start, side in ((specs.x[at], left, wide), (specs.y[at], top, high)):
            assert (corner >= start).all()
            assert (corner + extent[at] <= start + side + 1).all()
        assert set(specs.mpp[at]) == ({0.25, 0.5} if number == 2 else set(MPP))


def test_blocks_come_as_often_as_they_have_tissue() -> None:
    # At 0.25 µm/px a block of 256 px is one cell of the tissue grid.
    plan = TilePlan(CATALOGS[256, 0.25], seed=5, mpp={0.25: 1}, corners="blocks", min_tissue=0.4)
    specs = plan.specs(np.arange(60_000))
    assert not (specs.x % 256).any()
    assert not (specs.y % 256).any()
    drawn = np.zeros((40, 50))
    np.add.at(drawn, (specs.y // 256, specs.x // 256), 1)
    cells = CATALOGS[256, 0.25].tissue_grid(0).fraction.astype(float)
    wanted = cells / cells.sum() * 60_000
    on = wanted > 0
    assert not drawn[~on].any()
    chi_square = ((drawn - wanted)[on] ** 2 / wanted[on]).sum()
    freedom = on.sum() - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_places_within_a_block_come_alike() -> None:
    plan = TilePlan(CATALOGS[512, 0.25], mpp={0.25: 1}, corners="blocks", min_tissue=0.05)
    counts = np.bincount(plan.specs(np.arange(40_000)).x % 512)
    assert len(counts) == 512 - 256 + 1
    quarters = np.add.reduceat(counts[:256], np.arange(0, 256, 64))
    assert quarters == pytest.approx([10_000] * 4, rel=0.06)


def test_fewer_tiles_of_a_slide_lie_within_more() -> None:
    def tiles(number: int) -> set[tuple[int, int, float]]:
        universe = Universe(tiles_per_slide=number, replacement=False)
        plan = TilePlan(CATALOGS[256, 0.2527], seed=number, mpp=MPP, corners="blocks", universe=universe)
        specs = plan.specs(np.arange(number))
        return set(zip(specs.x.tolist(), specs.y.tolist(), specs.mpp.tolist(), strict=True))

    assert tiles(40) < tiles(160)


def test_where_blocks_are_unknown_tiles_begin_anywhere() -> None:
    one, two = (TilePlan(CATALOG, corners=corners).specs(np.arange(500)) for corners in ("anywhere", "blocks"))
    assert np.array_equal(one.x, two.x)
    assert np.array_equal(one.y, two.y)
    assert TilePlan(CATALOG).block_costs(np.arange(500)) is None


def test_anywhere_costs_more() -> None:
    anywhere = TilePlan(CATALOGS[256, 0.25], mpp={0.25: 1}).block_costs(np.arange(4000))
    assert anywhere is not None
    assert (anywhere.blocks, anywhere.requests) == pytest.approx((4, 2), rel=0.02)


def test_corners_of_no_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="corners"):
        TilePlan(CATALOG, corners="edges")
