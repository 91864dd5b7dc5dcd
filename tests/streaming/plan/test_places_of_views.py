"""One place at several scales: where the views lie, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog import Catalog
from streaming.errors import ConfigError, PlanError
from streaming.plan import TilePlan
from streaming.plan.specs import TileSpecs
from streaming.plan.universe import Universe
from streaming.plan.views import View
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.conftest import write_catalog

HALF_AND_ONE = (View(mpp=0.5), View(mpp=1.0, same_centre=True))
INDEX = np.arange(2000)


def centres(specs: TileSpecs, slide_mpp: float = 0.25) -> np.ndarray:
    """In level-0 pixels; own pixels of the made slides have the very µm/px."""
    return np.stack([specs.x, specs.y], axis=1) + (specs.size * specs.own_mpp / slide_mpp / 2)[:, None]


def columns(specs: TileSpecs) -> np.ndarray:
    return np.stack([specs.slide, specs.x, specs.y, specs.mpp, specs.own_mpp])


@pytest.mark.parametrize("corners", ["anywhere", "blocks"])
@pytest.mark.parametrize(
    "mpps", [(0.5, 1.0), (1.0, 0.5), (0.25, 2.0), (0.25, 0.5, 1.0, 2.0), (0.4, 0.8)], ids=lambda mpps: str(mpps)
)
def test_views_have_one_centre_on_one_slide(catalog: str, mpps: tuple[float, ...], corners: str) -> None:
    views = [View(mpp=mpp, same_centre=number > 0) for number, mpp in enumerate(mpps)]
    plan = TilePlan(Catalog.load(catalog), size=64, views=views, corners=corners, min_tissue=0.2)
    first, *others = plan.views_of(plan.specs(INDEX))
    assert (first.mpp == mpps[0]).all()
    for mpp, other in zip(mpps[1:], others, strict=True):
        assert np.array_equal(other.slide, first.slide)
        assert (other.mpp == mpp).all()
        # Own pixels are whole numbers of each other; where both are resampled, half a pixel of the coarser one.
        bound = 0.8 / 0.25 / 2 if mpps == (0.4, 0.8) else 0.5
        assert np.abs(centres(other) - centres(first)).max() <= bound


def test_a_view_is_the_same_alone_in_a_batch_and_from_a_part_of_it(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan, again = (TilePlan(loaded, size=64, views=HALF_AND_ONE) for _ in range(2))
    attempt = (INDEX % 3).astype(np.int32)
    whole = plan.views_of(plan.specs(INDEX, attempt))
    order = np.random.default_rng(0).permutation(len(INDEX))
    mixed = again.views_of(again.specs(INDEX[order], attempt[order]))
    alone = again.views_of(again.specs(INDEX[7:8], attempt[7:8]))
    for one, other, single in zip(whole, mixed, alone, strict=True):
        assert np.array_equal(columns(one)[:, order], columns(other))
        assert np.array_equal(columns(one)[:, 7:8], columns(single))
    assert plan[7] == again[7]


def test_all_views_lie_on_enough_tissue_and_only_slides_that_serve_them_all_are_drawn(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("fine.svs", "coarse.svs", "small.svs")]
    write_slide(SyntheticSlide(width=2048, height=1536, downsamples=(1, 4)), paths[0])
    write_slide(SyntheticSlide(width=2048, height=1536, mpp=1.0, patient=1, downsamples=(1,)), paths[1])
    write_slide(SyntheticSlide(width=512, height=512, patient=2, downsamples=(1,)), paths[2])
    loaded = Catalog.load(write_catalog(tmp_path / "catalog", paths))
    served = TilePlan(loaded, size=256, mpp={0.5: 1}, min_tissue=0.2)
    assert loaded.slides() == [str(path) for path in sorted(paths)]
    coarse, fine, small = range(3)
    assert set(served.specs(INDEX).slide.tolist()) == {coarse, fine, small}
    plan = TilePlan(loaded, size=256, views=[View(mpp=0.5), View(mpp=0.25, same_centre=True)], min_tissue=0.2)
    assert set(plan.specs(INDEX).slide.tolist()) == {fine, small}
    assert any("coarse.svs: too coarse, 1 µm/px" in line for line in plan.mix_lines())
    wide = TilePlan(loaded, size=256, views=HALF_AND_ONE, min_tissue=0.2)
    assert set(wide.specs(INDEX).slide.tolist()) == {coarse, fine}, "at 1.0 µm/px it is smaller than a tile"
    with pytest.raises(PlanError, match=r"can give 256 px tiles at all of 0.5, 0.01 µm/px .*data.views, --views"):
        TilePlan(loaded, size=256, views=[View(mpp=0.5), View(mpp=0.01, same_centre=True)])


def test_views_may_lie_outside_the_slide_but_show_enough_tissue(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, size=64, views=(View(mpp=0.25), View(mpp=4.0, same_centre=True)), min_tissue=0.3)
    first, wide = plan.views_of(plan.specs(INDEX))
    assert (first.x >= 0).all()
    outside = (wide.x < 0) | (wide.y < 0) | (wide.x + 1024 > 2048) | (wide.y + 1024 > 1536)
    assert 0.01 < outside.mean() < 0.99
    # All tissue of a view is within it, so that one with enough of it lies on the slide with as much of its area.
    inside = [
        np.clip(np.minimum(at + 1024, end) - np.maximum(at, 0), 0, None) for at, end in ((wide.x, 2048), (wide.y, 1536))
    ]
    assert (inside[0] * inside[1] / 1024**2).min() >= 0.29


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.booleans())
def test_a_bounded_universe_has_views_too_and_small_ones_lie_within_large_ones(
    catalog: str, tiles: int, replacement: bool
) -> None:
    loaded = Catalog.load(catalog)

    def places(bound: int) -> set[tuple[int, ...]]:
        universe = Universe(tiles_per_slide=bound, replacement=replacement)
        plan = TilePlan(loaded, size=64, views=HALF_AND_ONE, universe=universe)
        return {tuple(place) for place in columns(plan.views_of(plan.specs(np.arange(400)))[1]).T.astype(int).tolist()}

    small, large = places(tiles), places(tiles + 5)
    assert len(small) <= 3 * tiles
    if replacement:
        return
    assert small <= large


@pytest.mark.parametrize(
    ("views", "told"),
    [
        ([View(mpp=0.5)], "give at least two, or that µm/px as mpp"),
        (
            [View(mpp=0.5), View(mpp=0.5, same_centre=True)],
            "views have 0.5, 0.5 µm/px; give numbers above 0, each once",
        ),
        ([View(mpp=0.5), View(mpp=-1.0, same_centre=True)], "give numbers above 0"),
        ([View(mpp=0.5), View(mpp=1.0)], r"views\[1\] has no same_centre: true; views are of one place"),
        ([View(mpp=0.5, same_centre=True), View(mpp=1.0, same_centre=True)], r"views\[0\] has same_centre"),
    ],
)
def test_what_are_no_views_is_refused(catalog: str, views: list[View], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TilePlan(Catalog.load(catalog), size=64, views=views)


def test_a_list_has_no_views(catalog: str) -> None:
    with pytest.raises(ConfigError, match=r"list.parquet: .* leave out views \(data.views, --views\)"):
        TilePlan(Catalog.load(catalog), size=64, views=HALF_AND_ONE, tiles="list.parquet")


def test_a_tile_of_views_costs_the_mean_of_what_each_costs(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, size=64, views=(View(mpp=0.25), View(mpp=2.0, same_centre=True)))
    costs, index = plan.block_costs(INDEX), INDEX
    fine, wide = plan.views_of(plan.specs(index))

    def blocks(specs: TileSpecs, level_downsample: int, side: int) -> np.ndarray:
        ends = [
            (np.rint(at / level_downsample), np.rint(at / level_downsample) + side - 1) for at in (specs.x, specs.y)
        ]
        across, down = (last // 256 - start // 256 + 1 for start, last in ends)
        return across * down

    # 2.0 µm/px is the level of 1.0 at half its size.
    wanted = np.concatenate([blocks(fine, 1, 64), blocks(wide, 4, 128)]).mean()
    assert costs is not None
    assert costs.blocks == pytest.approx(wanted)
