"""Where tissue lies: thresholds and shares, in arithmetic that gives the same bits everywhere."""

import functools
from fractions import Fraction
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from streaming import storage
from streaming.catalog import Catalog, tissue
from streaming.catalog.pen import pen_pixels
from streaming.catalog.tissue import (
    Colour,
    odd_glass,
    otsu,
    thumbnail,
    tissue_of_thumbnail,
    tissue_pixels,
    window_fraction,
)
from streaming.slide import open_slide
from streaming.slide.openslide_slide import open_staged
from streaming.storage.staging import Staging
from streaming.synthetic.artefacts import ARTEFACTS, Artefact, covers
from streaming.synthetic.drawing import pixels
from streaming.synthetic.layout import SyntheticSlide, tissue_classes
from streaming.vision import cv2
from trainer.cli import main


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_windows=st.integers(2, 40),
    extent=st.one_of(st.sampled_from([1.0, 2.0, 4.0, 8.0]), st.floats(0.05, 12)),
)
def test_a_window_has_the_same_share_alone_and_among_others_to_the_bit(
    seed: int, num_windows: int, extent: float
) -> None:
    random = np.random.default_rng(seed)
    rows, columns = random.integers(1, 30, (2, num_windows))
    start = np.cumsum(rows * columns) - rows * columns
    cells = random.integers(0, 256, int((rows * columns).sum()), dtype=np.uint8)
    top, left = random.uniform(-3, 30, (2, num_windows))
    together = window_fraction(cells, start, rows, columns, top, left, extent)
    alone = [
        window_fraction(cells, *(column[i : i + 1] for column in (start, rows, columns, top, left)), extent)
        for i in range(num_windows)
    ]
    assert together.tobytes() == np.concatenate(alone).tobytes()


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    modes=st.integers(1, 12),
    spread=st.floats(0.1, 40),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_otsu_parts_pixels_as_well_as_opencv_s_does(
    seed: int, modes: int, spread: float, shape: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    levels = random.uniform(0, 255, modes)[random.integers(0, modes, shape)]
    image = np.clip(random.normal(levels, spread), 0, 255).astype(np.uint8)
    opencv_s, _ = cv2.threshold(image, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    found, wanted = otsu(np.bincount(image.ravel(), minlength=256)), int(opencv_s)
    # Of two levels that part pixels equally well, OpenCV takes one by its rounding.
    assert np.array_equal(image > found, image > wanted) or variance_between(image, found) == variance_between(
        image, wanted
    )
    assert all(variance_between(image, found) >= variance_between(image, level) for level in range(256))


def variance_between(image: np.ndarray, level: int) -> Fraction:
    """Of both classes, times the square of the number of pixels."""
    below, above = image[image <= level].astype(int).tolist(), image[image > level].astype(int).tolist()
    if not below or not above:
        return Fraction(0)
    return len(below) * len(above) * (Fraction(sum(below), len(below)) - Fraction(sum(above), len(above))) ** 2


def difference_db(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2))))


@pytest.mark.parametrize("mpp", [0.25, 0.2527, 0.33, 1.0, 7.9])
def test_a_thumbnail_is_openslides_level_made_smaller_however_its_blocks_are_decoded(
    mpp: float, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_blocks, by_openslide = (
        open_slide(str(slides[0])),
        open_staged([storage.stat(str(slides[0]))], None, None, Staging()),
    )
    with openslide.OpenSlide(slides[0]) as oracle:
        # Of the finest level, so that it does not matter which one is taken.
        whole = oracle.read_region((0, 0), 0, oracle.dimensions).convert("RGB")
    wanted = whole.resize((round(2048 * mpp / 8), round(1536 * mpp / 8)), Image.Resampling.BOX)
    found = list[np.ndarray]()
    for strip_px in (2**25, 2**15):
        monkeypatch.setattr(tissue, "_STRIP_PX", strip_px)
        for slide in (by_blocks, by_openslide):
            slide.mpp = mpp
            found.append(thumbnail(slide))
            assert found[-1].shape == np.asarray(wanted).shape
            assert difference_db(found[-1], np.asarray(wanted)) > 26
    assert difference_db(found[0], found[1]) > 36
    # Tissue is where it was, whoever reads it and in how many strips.
    shares = [tissue_of_thumbnail(image).fraction.astype(float) / 255 for image in (*found, np.asarray(wanted))]
    for share in shares:
        assert np.abs(share - shares[-1]).mean() < 0.02


def cleaned(mask: np.ndarray, least: int, largest_hole: int) -> np.ndarray:
    """A mask without pieces that have fewer pixels, holes counted, and with its small holes filled; by SciPy."""
    large = np.zeros_like(mask)
    labels, num = ndimage.label(mask, np.ones((3, 3)))
    for number in range(1, num + 1):
        whole = ndimage.binary_fill_holes(labels == number)
        assert whole is not None
        if whole.sum() >= least:
            holes, num_holes = ndimage.label(whole & (labels != number))
            filled = [one for one in range(1, num_holes + 1) if (holes == one).sum() <= largest_hole]
            large |= (labels == number) | np.isin(holes, filled)
    return large


def doubled(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    return mask.repeat(2, 0).repeat(2, 1)[: image.shape[0], : image.shape[1]]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 6, 12]))
def test_cells_are_the_share_of_their_pixels_that_the_rule_takes_for_tissue(
    seed: int, height: int, width: int, grain: int
) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // grain + 1, width // grain + 1, 3), dtype=np.uint8)
    image = np.ascontiguousarray(coarse.repeat(grain, 0).repeat(grain, 1)[:height, :width])
    found = tissue_of_thumbnail(image)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    odd = ((pen_pixels(hsv) > 0) | (image.max(axis=2) < 40))[::2, ::2]
    odd = doubled(ndimage.binary_dilation(cleaned(odd, 8, 0), np.ones((3, 3)), iterations=2), image)
    above = (ndimage.median_filter(hsv[..., 1], 5, mode="nearest") > found.threshold) & ~odd
    above = cleaned(above, 64, 780) & ~odd
    for row, column in np.ndindex(found.fraction.shape):
        share = int(above[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].sum())
        assert found.fraction[row, column] == round(Fraction(share * 255, 64))


SIDES = 4096, 3072


@functools.cache
def made(patient: int, *artefacts: Artefact) -> tuple[np.ndarray, np.ndarray]:
    """A made slide's thumbnail, and where its tissue is that no artefact hides."""
    slide = SyntheticSlide(width=SIDES[0], height=SIDES[1], mpp=1.0, patient=patient, artefacts=artefacts)
    image = cv2.resize(pixels(slide, 0, 0, *SIDES), (SIDES[0] // 8, SIDES[1] // 8), interpolation=cv2.INTER_AREA)
    truth = tissue_classes(slide, 0, 0, *SIDES, 8) > 0
    xs, ys = (np.arange(0, side, 8) + 4.0 for side in SIDES)
    for artefact in artefacts:
        if artefact != "out of focus":  # that is tissue, too: `data.filters.blur` looks for it
            truth &= ~covers(artefact, patient, *SIDES, xs, ys)
    return image, truth


def quality(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The share of what is found that is tissue, and of tissue that is found."""
    return float((found & truth).sum() / found.sum()), float((found & truth).sum() / truth.sum())


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_pens_borders_edges_and_blur_are_not_taken_for_tissue_nor_cost_any(artefact: Artefact) -> None:
    image, truth = made(1, artefact)
    found, _ = tissue_pixels(image)
    precision, recall = quality(found > 0, truth)
    assert precision > 0.98
    plain, _ = made(1)
    # Beside a mark some 32 µm are left out.
    assert recall > quality(tissue_pixels(plain)[0] > 0, made(1)[1])[1] - 0.08
    saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1]
    by_otsu = quality(saturation > cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0], truth)
    assert precision + recall > sum(by_otsu)
    if artefact.endswith("pen"):
        assert precision > by_otsu[0] + 0.1


def test_holes_as_small_as_a_vessel_are_tissue_and_specks_and_larger_holes_are_not() -> None:
    image = np.full((200, 300, 3), 240, np.uint8)
    image[50:150, 50:250] = (200, 120, 180)
    image[60:80, 60:80] = 240  # 400 px
    image[90:130, 100:140] = 240  # 1,600 px
    image[10:16, 10:16] = (200, 120, 180)
    found, _ = tissue_pixels(image)
    wanted = np.zeros((200, 300), bool)
    wanted[50:150, 50:250] = True
    wanted[90:130, 100:140] = False
    assert ((found > 0) != wanted).sum() < 40  # the median rounds corners


REAL = Path(__file__).parents[3].parent / "shared/data"


def twice(image: np.ndarray) -> np.ndarray:
    """Colours as they are where YCbCr is converted to RGB, and that again."""
    return np.asarray(Image.frombytes("YCbCr", image.shape[1::-1], image.tobytes()).convert("RGB"))


def never(image: np.ndarray) -> np.ndarray:
    """Colours as they are where YCbCr is taken for RGB."""
    return np.asarray(Image.fromarray(image).convert("YCbCr"))


def told(image: np.ndarray) -> Colour | None:
    return odd_glass(image, tissue_of_thumbnail(image))


@pytest.mark.parametrize("name", ["made", "CMU-1-crop.svs", "TCGA-CR-7395-TS1.svs", "luna_1065626.svs"])
def test_glass_is_told_where_colours_were_converted_wrongly_and_only_there(name: str, slides: list[Path]) -> None:
    path = slides[0] if name == "made" else REAL / name
    if not path.exists():
        pytest.skip("the real slide is not here")
    image = thumbnail(open_slide(str(path), mpp=0.5))
    assert told(image) is None
    red, green, blue = told(twice(image)) or (0, 0, 0)
    assert min(red, blue) > green + 70  # magenta
    assert told(never(image)) is not None


def test_dark_glass_is_not_told() -> None:
    image = np.full((100, 100, 3), 12, np.uint8)
    image[20:60, 20:60] = (250, 60, 120)
    assert told(image) is None
    assert told(image[20:60, 20:60]) == (250, 60, 120)


def test_the_catalog_command_tells_of_five_slides_with_odd_glass_and_counts_the_others(
    tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.full((512, 512, 3), 240, np.uint8)
    grey[100:400, 100:400] = (200, 120, 180)
    for number in range(8):
        pixels = twice(grey) if number != 3 else grey
        tifffile.imwrite(tmp_path / f"{number}.tif", pixels, tile=(256, 256), photometric="rgb")

    out = tmp_path / "catalog"
    assert main(["catalog", str(tmp_path), "--slide-mpp", "0.5", "--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "glass" in line]
    assert [line.split(": ")[0] for line in lines[:5]] == [
        str(tmp_path / f"{number}.tif") for number in (0, 1, 2, 4, 5)
    ]
    assert all("(255, 12" in line for line in lines[:5])
    assert lines[5:] == ["… and 2 more slides whose glass is not grey"]
    assert len(Catalog.load(str(out))) == 8
