"""Tiles of a slide's own pixels where these are near enough to the wanted resolution: OpenSlide is the oracle."""

from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import storage
from streaming.catalog import Catalog
from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.slide import Staging, geometry, open_slide
from streaming.slide.openslide_slide import open_staged
from streaming.vision import cv2
from tests.conftest import write_catalog
from tests.tiff_files import TiffSlide, write_tiff

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
REDUCTIONS = (1, 2, 4, 8)
SIZE = 64

slide_mpp = st.floats(0.2, 0.6)
wanted_mpp = st.floats(0.1, 5.0)
tolerances = st.sampled_from([0.0, 0.02, 0.05, 0.2])


@st.composite
def pyramids(draw) -> tuple[float, ...]:
    """Downsamples near 1, 4 and 16 as scanners round them, or some other pyramid."""
    factors = draw(st.sampled_from([(1,), (1, 4), (1, 4, 16), (1, 2, 8, 32), (1, 3)]))
    width, height = draw(st.integers(20_000, 90_000)), draw(st.integers(20_000, 90_000))
    return geometry.downsamples([(width // factor, height // factor) for factor in factors])


@PROPERTY
@given(slide_mpp, pyramids(), wanted_mpp, tolerances)
def test_own_pixels_are_taken_wherever_some_are_near_enough_and_the_cheapest_of_them(
    mpp: float, downsamples: tuple[float, ...], wanted: float, tolerance: float
) -> None:
    source = geometry.tile_source(mpp, downsamples, wanted, tolerance)
    near = [
        (k, -downsample)
        for downsample in downsamples
        for k in REDUCTIONS
        if tolerance and abs(mpp * downsample * k / wanted - 1) <= tolerance + 1e-9
    ]
    if not near:
        assert source.reduction is None
        assert source.mpp == wanted
        fine = [d for d in downsamples if mpp * d <= wanted * 1.01]
        assert source.downsample == max(fine, default=1.0)
        return
    assert (source.reduction, -source.downsample) == min(near)
    assert source.mpp == pytest.approx(mpp * source.downsample * source.reduction)
    assert abs(source.mpp / wanted - 1) <= tolerance + 1e-9


@pytest.mark.parametrize("tolerance", [0.05, 0.1, 0.02])
@pytest.mark.parametrize("wanted", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_what_lies_on_the_very_edge_lies_within_the_tolerance(wanted: float, tolerance: float, side: int) -> None:
    own = float(Decimal(str(wanted)) * (1 + side * Decimal(str(tolerance))))
    assert geometry.tile_source(own, (1.0,), wanted, tolerance).mpp == own
    beyond = own + side * 1e-5
    assert geometry.tile_source(beyond, (1.0,), wanted, tolerance).mpp == wanted


@PROPERTY
@given(slide_mpp, pyramids(), wanted_mpp, st.integers(0, 80_000), st.integers(0, 80_000), st.integers(1, 300))
def test_exactly_size_times_the_reduction_is_read_at_most_half_a_pixel_beside(
    mpp: float, downsamples: tuple[float, ...], wanted: float, x: int, y: int, size: int
) -> None:
    source = geometry.tile_source(mpp, downsamples, wanted, 0.05)
    if source.reduction is None:
        return
    box = geometry.tile_box(source, x, y, size)
    assert (box.width, box.height) == (size * source.reduction,) * 2
    assert (box.x % source.reduction, box.y % source.reduction) == (0, 0)
    pixel = source.downsample * source.reduction
    assert abs(box.x * source.downsample - x) <= pixel / 2 * (1 + 1e-9)
    assert abs(box.y * source.downsample - y) <= pixel / 2 * (1 + 1e-9)


@PROPERTY
@given(st.lists(st.tuples(slide_mpp, pyramids()), min_size=2, max_size=9), wanted_mpp, tolerances)
def test_what_is_read_of_a_slide_does_not_depend_on_those_beside_it(
    slides: list[tuple[float, tuple[float, ...]]], wanted: float, tolerance: float
) -> None:
    most = max(len(downsamples) for _, downsamples in slides)
    padded = np.array([[*downsamples, *[0.0] * (most - len(downsamples))] for _, downsamples in slides])
    levels, reductions = geometry.tile_levels(np.array([mpp for mpp, _ in slides]), padded, wanted, tolerance)
    for (mpp, downsamples), level, reduction in zip(slides, levels.tolist(), reductions.tolist(), strict=True):
        source = geometry.tile_source(mpp, downsamples, wanted, tolerance)
        assert (source.level, source.reduction or 0) == (level, reduction)


@pytest.mark.parametrize("wanted", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_no_cliff_stands_at_one_per_cent(wanted: float) -> None:
    sources = [geometry.tile_source(mpp, (1.0, 4.0, 16.0), wanted, 0.05) for mpp in np.linspace(0.2382, 0.2624, 500)]
    found = {(source.level, source.reduction) for source in sources}
    assert len(found) == 1


@lru_cache(maxsize=8)
def whole_level(path: Path, level: int) -> np.ndarray:
    """A level by OpenSlide, which blends no pixels where it is asked for from its corner on."""
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[:, :, :3]


# 1,803 × 1,402 px: no downsample of it is a whole number.
ODD = {"width": 1803, "height": 1402, "downsamples": (1, 4), "block": (240, 240)}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odd")
    kinds = ("jpeg", "jpeg-rgb", "deflate")
    return {kind: write_tiff(TiffSlide(**ODD, compression=kind, tissue=True), folder / f"{kind}.svs") for kind in kinds}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["jpeg", "jpeg-rgb", "deflate"]),
    near=st.floats(0.96, 1.04),
    factor=st.sampled_from([1, 2, 4, 8]),
    x=st.integers(0, 1200),
    y=st.integers(0, 850),
)
def test_a_tile_is_openslide_s_pixels_and_a_reduced_one_their_average(
    odd: dict[str, Path], kind: str, near: float, factor: int, x: int, y: int
) -> None:
    path, mpp = odd[kind], 0.25
    blocks = open_slide(str(path), mpp=mpp)
    through_openslide = open_staged([storage.stat(str(path))], None, mpp, Staging())
    assert (blocks.backend, through_openslide.backend) == ("blocks", "openslide")
    wanted = blocks.mpp * factor * near
    source = geometry.tile_source(blocks.mpp, blocks.level_downsamples, wanted, 0.05)
    assert source.reduction == {1: 1, 2: 2, 4: 1, 8: 2}[factor]
    box, k = geometry.tile_box(source, x, y, SIZE), source.reduction
    level = whole_level(path, box.level)[box.y : box.y + box.height, box.x : box.x + box.width].astype(float)
    average = level.reshape(SIZE, k, SIZE, k, 3).mean(axis=(1, 3))
    tile = blocks.read_tile(x, y, wanted, SIZE)
    if k == 1:
        np.testing.assert_array_equal(tile, average)
    elif kind == "deflate":
        assert np.abs(tile - average).max() <= 0.5 + 1e-9
    else:
        assert 10 * np.log10(255**2 / np.mean((tile - average) ** 2)) > 40
    if box.level == 0:  # at others OpenSlide is asked between pixels, and blends
        assert np.abs(through_openslide.read_tile(x, y, wanted, SIZE) - average).max() <= 0.5 + 1e-9


def test_exact_and_a_tolerance_of_zero_resample_to_the_very_resolution(odd: dict[str, Path]) -> None:
    slide, wanted = open_slide(str(odd["deflate"])), 0.52
    extent = round(SIZE * wanted / slide.mpp)
    assert extent != 2 * SIZE
    box = whole_level(odd["deflate"], 0)[300 : 300 + extent, 200 : 200 + extent]
    resampled = cv2.resize(np.ascontiguousarray(box), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    for options in ({"exact": True}, {"tolerance": 0.0}):
        assert np.abs(slide.read_tile(200, 300, wanted, SIZE, **options).astype(int) - resampled).max() <= 1
    assert not np.array_equal(slide.read_tile(200, 300, wanted, SIZE), resampled)


def test_a_batch_tells_the_resolution_of_its_pixels_and_is_what_read_tile_gives(tmp_path: Path) -> None:
    made = [TiffSlide(**ODD, compression="jpeg", tissue=True, seed=seed) for seed in range(2)]
    paths = [write_tiff(slide, tmp_path / f"{i}.svs") for i, slide in enumerate(made)]
    catalog = Catalog.load(write_catalog(tmp_path / "catalog", paths))
    own = catalog.column("mpp")[0]
    mix = {own * 1.01: 1.0, own * 2.04: 1.0, own * 4.1: 1.0, own * 2.7: 1.0}
    options = ReaderOptions(hsv_rule=HsvRule(min_share=0.0))
    plan = TilePlan(catalog, mpp=mix, size=SIZE, min_tissue=0.05)
    batch = TileReader(plan, catalog, options)({"index": np.arange(64)})
    slide = [open_slide(str(path)) for path in paths]
    seen = set()
    for i in range(64):
        spec = plan[i]
        source = geometry.tile_source(own, slide[0].level_downsamples, spec.mpp, 0.05)
        assert batch["mpp"][i] == source.mpp
        seen.add(source.reduction)
        tile = slide[batch["slide"][i]].read_tile(spec.x, spec.y, spec.mpp, SIZE)
        np.testing.assert_array_equal(batch["tile"][i], tile)
    assert seen == {1, 2, None}
    exact = TileReader(TilePlan(catalog, mpp=mix, size=SIZE, min_tissue=0.05, mpp_tolerance=0.0), catalog, options)
    assert set(exact({"index": np.arange(64)})["mpp"].tolist()) == set(mix)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**40), st.sampled_from([48, 64, 100]))
def test_a_tile_of_the_plan_lies_wholly_on_the_level_it_is_read_of(odd_catalog: Catalog, start: int, size: int) -> None:
    own = float(odd_catalog.column("mpp")[0])
    plan = TilePlan(
        odd_catalog, mpp={own * 1.03: 1, own * 2.02: 1, own * 3.9: 1, own * 8.1: 1}, size=size, min_tissue=0.01
    )
    specs, row = plan.specs(np.arange(start, start + 64)), odd_catalog[0]
    downsamples = tuple(level["downsample"] for level in row.levels)
    for i in range(64):
        source = geometry.tile_source(own, downsamples, float(specs.mpp[i]), 0.05)
        box, level = geometry.tile_box(source, int(specs.x[i]), int(specs.y[i]), size), row.levels[source.level]
        assert min(box.x, box.y) >= 0
        assert box.x + box.width <= level["width"]
        assert box.y + box.height <= level["height"]


@pytest.fixture(scope="module")
def odd_catalog(odd: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog.load(write_catalog(tmp_path_factory.mktemp("catalog"), [odd["jpeg"]]))


@pytest.mark.parametrize("senseless", [-0.01, 0.4, float("nan")])
def test_a_tolerance_without_sense_is_refused(odd_catalog: Catalog, senseless: float) -> None:
    with pytest.raises(ConfigError, match="mpp_tolerance"):
        TilePlan(odd_catalog, mpp_tolerance=senseless)
