"""Filters of a tile's pixels, and other rules for other stains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming.catalog import Catalog
from streaming.delivery.failures import FailureBudget
from streaming.errors import ConfigError, StreamError
from streaming.plan import TilePlan
from streaming.reading.filters import Filters, TileRules, focus
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.slide.resample import Pixels
from streaming.synthetic.drawing import pixels
from streaming.synthetic.layout import SyntheticSlide, TissueClass, tissue_classes
from streaming.vision import cv2
from tests.streaming.plan.test_plan import catalog as made_catalog
from tests.streaming.plan.test_plan import row
from trainer.run.config import read_config

NO_HSV = HsvRule(min_share=0)
STAINED = TilePlan(
    made_catalog([row(f"s{i}", 0.25, i, json.dumps({"stain": name})) for i, name in enumerate(["H&E", "IHC", ""])]),
    mpp={0.5: 1},
)
ROW = {STAINED.stains[number]: i for i, number in enumerate(STAINED.stain.tolist())}
# PNGs of pens as scanners show them would be others' pictures: these are the colours of a felt pen's ink in HSV.
PENS = {"green": (40, 130, 70), "blue": (40, 70, 190), "black": (30, 30, 34), "red": (200, 25, 30)}
DAB, BLUE_NUCLEI = (139, 95, 58), (150, 160, 195)


def tissue(patient: int, kind: TissueClass = TissueClass.TUMOUR) -> Pixels:
    """A made tile of 256 px in the middle of tissue of one class."""
    slide = SyntheticSlide(width=4096, height=3072, patient=patient)
    classes = tissue_classes(slide, 0, 0, slide.width, slide.height, 256)
    y, x = np.argwhere(classes == kind)[0]
    return pixels(slide, int(x) * 256, int(y) * 256, 256, 256)


def verdict(tile: Pixels, rule: HsvRule = NO_HSV, stain: str = "", **filters: Any) -> str | None:
    return TileRules(STAINED, rule, Filters(**filters)).turns_down(tile, ROW[stain])


def even(colour: tuple[int, int, int]) -> Pixels:
    return np.full((64, 64, 3), colour, np.uint8)


def keep_dark(tile: Pixels) -> bool:
    return bool(tile.mean() < 200)


def fail(tile: Pixels) -> bool:
    raise KeyError("no such stain")


def answer_a_number(tile: Pixels) -> float:
    return 0.5


def write_into(tile: Pixels) -> bool:
    tile[:] = 0
    return True


@pytest.mark.parametrize("patient", range(3))
@pytest.mark.parametrize("kind", [TissueClass.TUMOUR, TissueClass.STROMA])
def test_tissue_passes_all_filters_and_its_blurred_picture_not_that_of_blur(patient: int, kind: TissueClass) -> None:
    tile = tissue(patient, kind)
    filters = {"blur": 40.0, "pen": 0.02, "white": 0.5}
    assert verdict(tile, **filters) is None
    blurred = cv2.GaussianBlur(tile, (0, 0), 6)
    assert verdict(blurred, **filters) == "blur (data.filters.blur)"


def test_focus_is_the_variance_of_the_laplacian_as_its_formula_has_it() -> None:
    tile = tissue(0)[:64, :64]
    grey = np.rint(tile @ np.array([0.299, 0.587, 0.114]))
    padded = np.pad(grey, 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * grey
    assert focus(tile) == pytest.approx(laplacian.var(), rel=0.01)  # OpenCV's weights of grey have 14 bits


@pytest.mark.parametrize("pen", PENS)
def test_a_pen_over_tissue_is_turned_down_by_its_share(pen: str) -> None:
    tile = tissue(1)
    tile[:40] = PENS[pen]
    assert verdict(tile, pen=0.1) == "pen (data.filters.pen)"
    assert verdict(tile, pen=0.2) is None


@pytest.mark.parametrize("colour", [DAB, BLUE_NUCLEI, (200, 120, 180), (110, 70, 150)])
def test_stains_are_no_pens(colour: tuple[int, int, int]) -> None:
    assert verdict(even(colour), pen=0.0) is None


def test_the_share_of_white_is_bounded() -> None:
    tile = tissue(0)
    tile[:128] = 240
    assert verdict(tile, white=0.4) == "white (data.filters.white)"
    assert verdict(tile, white=0.6) is None


def test_brown_stays_on_slides_of_its_stain_and_only_there() -> None:
    filters = {"by_stain": {"IHC": {"hsv_rule": {"hue": [0, 179], "value": [40, 255]}, "white": 0.9}}}
    brown = even(DAB)
    assert verdict(brown, HsvRule(), "IHC", **filters) is None
    for stain in ("H&E", ""):
        assert verdict(brown, HsvRule(), stain, **filters) == "the HSV rule (data.hsv_rule)"
    assert verdict(even((245, 245, 245)), NO_HSV, "IHC", **filters) == "white (data.filters.white)"
    assert verdict(even((245, 245, 245)), NO_HSV, "H&E", **filters) is None


def test_a_user_s_function_decides_and_is_named() -> None:
    path = f"{__name__}:keep_dark"
    assert verdict(even((250, 250, 250)), functions=(path,)) == path
    assert verdict(even((100, 0, 100)), functions=(path,)) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fail", "failed: KeyError: 'no such stain'"),
        ("answer_a_number", "answered 0.5"),
        ("write_into", "failed: ValueError"),
    ],
)
def test_a_user_s_function_that_fails_ends_the_run_with_its_name(name: str, said: str) -> None:
    with pytest.raises(StreamError, match=f"the filter {__name__}:{name} {said}"):
        verdict(tissue(0), functions=(f"{__name__}:{name}",))


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"pen": 2.0}, "filters.pen is 2.0"),
        ({"white": -0.1}, "filters.white is -0.1"),
        ({"blur": -1.0}, "filters.blur is -1.0"),
        ({"functions": ("here",)}, "MODULE:NAME"),
        ({"functions": ("nowhere.at_all:x",)}, "can't be imported"),
        ({"functions": ("math:pi",)}, "is no function"),
        ({"by_stain": {"IHC": {"bluur": 3}}}, "by_stain.IHC has 'bluur'; it takes blur, functions, hsv_rule"),
        ({"by_stain": {"IHC": {"hsv_rule": {"hue": [200, 10]}}}}, "by_stain.IHC: hue is two numbers"),
        ({"by_stain": {"IHC": {"hsv_rule": 3}}}, "by_stain.IHC: "),
        (
            {"by_stain": {"PAS": {"blur": 3}}},
            "no slide of the catalog has that in its column `stain`; it has: H&E",
        ),
    ],
)
def test_what_is_no_filter_is_told_in_one_line(filters: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        verdict(tissue(0), **filters)
    assert "\n" not in str(told.value)


def test_a_reader_replaces_and_counts_by_name(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, seed=0, mpp={0.5: 1}, size=64)

    def read(filters: Filters) -> dict[str, Any]:
        return TileReader(plan, loaded, ReaderOptions(hsv_rule=NO_HSV, filters=filters))({"index": np.arange(32)})

    plain = read(Filters())
    sharpness = np.array([focus(tile) for tile in plain["tile"]])
    least = float(np.median(sharpness))
    strict = read(Filters(blur=least))
    assert all(focus(tile) >= least for tile in strict["tile"])
    assert np.array_equal(strict["filtered"] == 0, sharpness >= least)
    budget = FailureBudget(0.01)
    budget.add(strict)
    num = int(strict["filtered"].sum())
    assert budget.by_rule == {"blur (data.filters.blur)": num}
    assert budget.summary() == [
        f"{num} of {32 + num} tiles ({num / (32 + num):.0%}) turned down by blur (data.filters.blur) and replaced"
    ]


def test_a_configuration_has_filters_and_notes_the_stain_of_slides_where_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {filters: {blur: 20, by_stain: {IHC: {hsv_rule: {hue: [0, 179]}}}}}")
    config = read_config(str(path), ["--data.filters.pen", "0.1"])
    assert config.data.filters == Filters(blur=20.0, pen=0.1, by_stain={"IHC": {"hsv_rule": {"hue": [0, 179]}}})
    one, other = (made_catalog([row("a", 0.25, 1, json.dumps({"stain": stain}))]) for stain in ("IHC", "PAS"))
    assert config.identity(one) != config.identity(other)
    plain = read_config("debug", [])
    assert plain.identity(one) == plain.identity(other)
