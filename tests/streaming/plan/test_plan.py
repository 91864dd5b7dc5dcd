import pickle
import tempfile
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog import Catalog
from streaming.catalog.inspection import Inspected
from streaming.catalog.schema import SlideRow
from streaming.catalog.tissue import TissueGrid
from streaming.catalog.writing import merge, part_of, write
from streaming.errors import ConfigError, PlanError
from streaming.plan import TilePlan

CELL_UM = 64


def level(width: float, height: float, downsample: float = 1.0, block: int | None = None) -> dict:
    """An entry of a slide's levels in the catalog."""
    blocks = {"block_width": block, "block_height": block}
    return {"width": int(width), "height": int(height), "downsample": downsample, "compression": "JPEG", **blocks}


def row(
    name: str,
    mpp: float,
    seed: int,
    metadata: str = "{}",
    rows: int = 40,
    columns: int = 50,
    levels: list[dict] | None = None,
    bounds: tuple[int, int, int, int] | None = None,
) -> Inspected:
    """A slide whose tissue is a noisy disc; nothing of it is ever read."""
    y, x = np.mgrid[:rows, :columns]
    disc = ((y - rows / 2) ** 2 + (x - columns / 2) ** 2) < (0.4 * rows) ** 2
    noise = np.random.default_rng(seed).integers(150, 256, (rows, columns))
    fraction = np.where(disc, noise, 0).astype(np.uint8)
    slide = SlideRow(
        slide=f"s3://bucket/{name}.svs",
        size=1,
        version="v",
        vendor="aperio",
        mpp=mpp,
        width=int(columns * CELL_UM / mpp),
        height=int(rows * CELL_UM / mpp),
        bounds=bounds or (0, 0, int(columns * CELL_UM / mpp), int(rows * CELL_UM / mpp)),
        levels=levels or [level(columns * CELL_UM / mpp, rows * CELL_UM / mpp)],
        backend="openslide",
        index=None,
        index_nbytes=0,
        tissue_rows=rows,
        tissue_columns=columns,
        tissue_threshold=20.0,
        tissue_mm2=1.0,
        metadata=metadata,
    )
    return Inspected(slide, TissueGrid(fraction, 20.0))


ROWS = [
    row("a", 0.25, 1, '{"cohort": "tcga"}'),
    row("b", 0.2527, 2, '{"cohort": "tcga"}'),
    row("c", 0.5, 3, '{"cohort": "own"}'),
]


FOLDER = tempfile.TemporaryDirectory()


def catalog(rows: Sequence[Inspected] = ROWS) -> Catalog:
    folder = tempfile.mkdtemp(dir=FOLDER.name)
    write(folder, *merge([part_of(rows)], None), None)
    return Catalog.load(folder)


CATALOG = catalog()


def brute_share(found: Inspected, x: int, y: int, mpp: float, size: int) -> float:
    """Tissue share of a tile on a lattice of points, without the plan's geometry."""
    slide, cells = found.row, found.tissue.fraction
    extent = size * mpp / slide.mpp
    at = (np.arange(400) + 0.5) / 400 * extent
    cell = CELL_UM / slide.mpp
    rows = ((y + at) / cell).astype(int)
    columns = ((x + at) / cell).astype(int)
    padded = np.zeros((200, 200))
    padded[: cells.shape[0], : cells.shape[1]] = cells
    return float(padded[np.ix_(rows, columns)].mean() / 255)


def test_known_indices_give_known_tiles_on_every_machine() -> None:
    plan = TilePlan(CATALOG, seed=7, mpp_tolerance=0.0)
    got = [
        (s.slide.removeprefix("s3://bucket/"), s.x, s.y, s.mpp) for s in (plan[0], plan[1], plan[10**6], plan[10**15])
    ]
    assert got == [
        ("c.svs", 2248, 2186, 0.5),
        ("b.svs", 7048, 6060, 0.5),
        ("b.svs", 7196, 6698, 0.5),
        ("c.svs", 2986, 701, 0.5),
    ]


def test_a_tile_is_the_same_alone_in_a_batch_and_after_pickling() -> None:
    plan = TilePlan(CATALOG, seed=3)
    index = np.array([5, 10**12, 0, 77, 5])
    specs = plan.specs(index)
    for copy in (plan, pickle.loads(pickle.dumps(plan))):
        for i, number in enumerate(index.tolist()):
            spec = copy[number]
            assert (spec.x, spec.y, spec.mpp) == (specs.x[i], specs.y[i], specs.mpp[i])
            assert spec.slide == plan.slides[specs.slide[i]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**31), st.sampled_from([128, 256, 512]))
def test_a_tile_lies_on_its_slide_and_on_enough_tissue(index: int, seed: int, size: int) -> None:
    spec = TilePlan(CATALOG, seed=seed, size=size)[index]
    found = next(r for r in ROWS if r.row.slide == spec.slide)
    slide = found.row
    extent = size * spec.mpp / slide.mpp
    assert 0 <= spec.x <= slide.width - extent
    assert 0 <= spec.y <= slide.height - extent
    assert brute_share(found, spec.x, spec.y, spec.mpp, size) >= 0.4 - 0.01


def test_magnifications_and_slides_come_as_often_as_their_weights_say() -> None:
    specs = TilePlan(CATALOG, mpp={0.5: 3, 1.0: 1}).specs(np.arange(40_000))
    assert np.mean(specs.mpp == 0.5) == pytest.approx(0.75, abs=0.01)
    assert np.bincount(specs.slide) / 40_000 == pytest.approx([1 / 3] * 3, abs=0.01)


def test_cohorts_come_as_often_as_their_weights_say() -> None:
    specs = TilePlan(CATALOG, cohorts={"own": 1, "tcga": 1}).specs(np.arange(40_000))
    assert np.bincount(specs.slide) / 40_000 == pytest.approx([0.25, 0.25, 0.5], abs=0.01)


def test_neither_the_order_of_the_mix_nor_that_of_the_slides_matters() -> None:
    one = TilePlan(CATALOG, mpp={0.5: 2, 1.0: 1}).specs(np.arange(500))
    two = TilePlan(catalog(ROWS[::-1]), mpp={1.0: 1, 0.5: 2}).specs(np.arange(500))
    assert np.array_equal(one.x, two.x)
    assert np.array_equal(one.slide, two.slide)


def test_a_replacement_is_another_tile_of_the_same_magnification() -> None:
    plan = TilePlan(CATALOG)
    index = np.arange(2_000)
    first, second = plan.specs(index), plan.specs(index, np.ones(2_000, np.int32))
    assert np.array_equal(first.mpp, second.mpp)
    assert np.mean((first.x == second.x) & (first.slide == second.slide)) < 0.01


def test_a_slide_too_coarse_for_a_magnification_does_not_serve_it() -> None:
    specs = TilePlan(CATALOG, mpp={0.125: 1}, mpp_tolerance=0.0).specs(np.arange(500))
    assert set(specs.slide.tolist()) == {0}
    # A scanner's 0.2527 is meant as 0.25 where its own pixels may be taken for that.
    specs = TilePlan(CATALOG, mpp={0.125: 1}).specs(np.arange(500))
    assert set(specs.slide.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"mpp": {0.05: 1}}, PlanError, "0.05"),
        ({"mpp": {}}, ConfigError, "mpp"),
        ({"mpp": {0.5: 0}}, ConfigError, "mpp"),
        ({"size": 0}, ConfigError, "size"),
        ({"min_tissue": 2.0}, ConfigError, "min_tissue"),
        ({"cohorts": {"nobody": 1}}, PlanError, "cohort 'nobody' among the 3"),
        ({"size": 10**6}, PlanError, "10+ px tile"),
    ],
)
def test_what_the_catalog_cannot_give_is_told(arguments: dict, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        TilePlan(CATALOG, **arguments)


def test_a_negative_index_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        TilePlan(CATALOG)[-1]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.25, 0.2527, 0.4986]))
def test_corners_are_whole_pixels_of_the_tile_so_that_blocks_can_be_decoded_smaller(start: int, mpp: float) -> None:
    plan = TilePlan(catalog([row("a", mpp, 0)]))
    specs = plan.specs(np.arange(start, start + 64))
    whole = np.maximum(1, np.rint(specs.mpp / mpp)).astype(int)
    assert not (specs.x % whole).any()
    assert not (specs.y % whole).any()
    assert len(np.unique(specs.x % 8)) > 1  # of native tiles, any
