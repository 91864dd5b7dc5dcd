import tracemalloc
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.synthetic import svs
from streaming.synthetic.artefacts import ARTEFACTS, Artefact, covers
from streaming.synthetic.drawing import pixels
from streaming.synthetic.layout import Codec, SyntheticSlide, TissueClass, tissue_classes
from streaming.synthetic.svs import write_slide
from streaming.vision import cv2

SMALL = SyntheticSlide(width=1100, height=780)
PATIENTS = range(4)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def read_level(slide: openslide.OpenSlide, level: int) -> np.ndarray:
    return np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def passes_hsv_rule(tile: np.ndarray) -> bool:
    hue, saturation, value = cv2.split(cv2.cvtColor(tile, cv2.COLOR_RGB2HSV))
    return ((hue >= 90) & (hue <= 180) & (saturation >= 8) & (value >= 103)).mean() >= 0.6


def uniform_tiles(slide: SyntheticSlide, most: int) -> dict[int, list[np.ndarray]]:
    """Up to `most` 256 px tiles per class that lie in one class alone."""
    points = tissue_classes(slide, 0, 0, slide.width, slide.height, 32)
    rows, columns = slide.height // 256, slide.width // 256
    points = points[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8)
    found: dict[int, list[np.ndarray]] = {}
    for row, column in np.ndindex(rows, columns):
        kinds = np.unique(points[row, :, column])
        tiles = found.setdefault(int(kinds[0]), [])
        if len(kinds) == 1 and len(tiles) < most:
            tiles.append(pixels(slide, column * 256, row * 256, 256, 256))
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "small.svs"
    write_slide(SMALL, path)
    return path


def test_openslide_sees_an_aperio_slide_with_its_geometry(small: Path) -> None:
    with openslide.OpenSlide(small) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.level_dimensions == ((1100, 780), (275, 195), (68, 48))
        assert slide.level_downsamples == pytest.approx((1, 4, 16), rel=0.02)
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        assert slide.properties["openslide.objective-power"] == "40"
        assert slide.associated_images["thumbnail"].size == (550, 390)


@pytest.mark.parametrize(("mpp", "power"), [(0.5, "20"), (1.0, "10")])
def test_magnification_follows_from_mpp_and_mpp_can_be_kept_back(tmp_path: Path, mpp: float, power: str) -> None:
    write_slide(SyntheticSlide(width=512, height=512, mpp=mpp, write_mpp=False, downsamples=(1,)), tmp_path / "a.svs")
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.level_count == 1
        assert slide.properties["openslide.objective-power"] == power
        assert "openslide.mpp-x" not in slide.properties


def test_pixels_are_what_openslide_reads_at_level_0(small: Path) -> None:
    with openslide.OpenSlide(small) as slide:
        assert psnr(read_level(slide, 0), pixels(SMALL, 0, 0, 1100, 780)) > 32


def test_each_level_is_the_area_mean_of_the_level_above(small: Path) -> None:
    level0 = pixels(SMALL, 0, 0, 1100, 780)
    level1 = cv2.resize(level0, (275, 195), interpolation=cv2.INTER_AREA)
    level2 = cv2.resize(level1[:192, :272], (68, 48), interpolation=cv2.INTER_AREA)
    thumbnail = cv2.resize(level0, (550, 390), interpolation=cv2.INTER_AREA)
    with openslide.OpenSlide(small) as slide:
        assert psnr(read_level(slide, 1), level1) > 28
        assert psnr(read_level(slide, 2), level2) > 28
        assert psnr(np.array(slide.associated_images["thumbnail"].convert("RGB")), thumbnail) > 28


def test_blocks_of_other_sizes_and_sampling_hold_the_same_pixels(tmp_path: Path) -> None:
    slide = SyntheticSlide(width=1000, height=700, block_px=240, subsampling=(1, 1), quality=95, downsamples=(1, 2, 6))
    write_slide(slide, tmp_path / "a.svs")
    with openslide.OpenSlide(tmp_path / "a.svs") as opened:
        assert opened.level_dimensions == ((1000, 700), (500, 350), (166, 116))
        assert opened.properties["openslide.level[0].tile-width"] == "240"
        assert psnr(read_level(opened, 0), pixels(slide, 0, 0, 1000, 700)) > 38


def test_file_is_laid_out_like_a_scanners(small: Path) -> None:
    with tifffile.TiffFile(small) as tiff:
        assert [page.is_tiled for page in tiff.pages] == [True, False, True, True]
        assert all(page.compression.name == "JPEG" for page in tiff.pages)
        assert tiff.pages[0].description.startswith("Aperio Image Library v12.0.0 \r\n1100x780 ")


def test_same_slide_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    write_slide(SMALL, tmp_path / "again.svs")
    assert (tmp_path / "again.svs").read_bytes() == small.read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.integers(-300, 1000), st.integers(-300, 700), st.integers(1, 400), st.integers(1, 400))
def test_a_region_does_not_depend_on_its_frame(x: int, y: int, width: int, height: int) -> None:
    whole = pixels(SMALL, -300, -300, 1700, 1400)
    region = pixels(SMALL, x, y, width, height)
    assert region.shape == (height, width, 3)
    np.testing.assert_array_equal(region, whole[y + 300 : y + 300 + height, x + 300 : x + 300 + width])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 600), st.integers(1, 600))
def test_classes_of_a_region_are_those_of_the_slide(column: int, row: int, width: int, height: int) -> None:
    whole = tissue_classes(SMALL, 0, 0, 1600, 1600, 32)
    part = tissue_classes(SMALL, column * 32, row * 32, width, height, 32)
    assert part.shape == (-(-height // 32), -(-width // 32))
    np.testing.assert_array_equal(part, whole[row : row + part.shape[0], column : column + part.shape[1]])


@pytest.mark.parametrize("size", [(1024, 768), (768, 1024), (8192, 6144), (20000, 4000)])
def test_tissue_covers_about_half_of_a_slide_of_any_size(size: tuple[int, int]) -> None:
    for patient in range(8):
        slide = SyntheticSlide(width=size[0], height=size[1], patient=patient)
        classes = tissue_classes(slide, 0, 0, *size, max(size) // 128)
        assert 0.35 < (classes != TissueClass.BACKGROUND).mean() < 0.65
        assert len(np.unique(classes)) >= 4


@pytest.mark.parametrize("patient", PATIENTS)
def test_tissue_tiles_pass_the_hsv_rule_and_glass_and_fat_fail_it(patient: int) -> None:
    tiles = uniform_tiles(SyntheticSlide(patient=patient), most=12)
    passed = {kind: float(np.mean([passes_hsv_rule(tile) for tile in found])) for kind, found in tiles.items() if found}
    assert passed[TissueClass.BACKGROUND] == 0
    assert passed.get(TissueClass.FAT, 0) == 0
    for kind in (TissueClass.STROMA, TissueClass.TUMOUR, TissueClass.LYMPHOCYTES):
        assert passed.get(kind, 1) >= 0.85


def test_saturation_of_a_thumbnail_separates_tissue_from_glass(small: Path) -> None:
    classes = tissue_classes(SMALL, 0, 0, 1100, 780, 20)
    with openslide.OpenSlide(small) as slide:
        rgb = np.array(slide.associated_images["thumbnail"].convert("RGB").resize(classes.shape[::-1]))
    saturation = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1]
    _, mask = cv2.threshold(saturation, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    firm = ~np.isin(classes, (TissueClass.FAT, TissueClass.GLAND))
    assert (mask[firm] == (classes[firm] > 0)).mean() > 0.9


@pytest.mark.parametrize("codec", ["jpeg", "jp2k-rgb", "jp2k-ycbcr"])
def test_each_codec_and_block_size_shows_the_drawn_pixels(codec: Codec, tmp_path: Path) -> None:
    quality = 90 if codec == "jpeg" else 40
    made = SyntheticSlide(width=700, height=500, block_px=240, codec=codec, quality=quality, mpp=0.2527)
    write_slide(made, tmp_path / "a.svs")
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.properties["openslide.level[0].tile-width"] == "240"
        assert slide.properties["openslide.mpp-x"] == "0.25269999999999998"
        assert psnr(read_level(slide, 0), pixels(made, 0, 0, 700, 500)) > 30


def test_patients_differ_in_colour() -> None:
    slides = [SyntheticSlide(width=2048, height=1536, patient=patient) for patient in PATIENTS]
    regions = [pixels(slide, 0, 0, 2048, 1536) for slide in slides]
    means = [region[region.min(axis=2) < 210].mean(axis=0) for region in regions]
    for index, mean in enumerate(means):
        assert all(np.linalg.norm(mean - other) > 4 for other in means[:index])


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(slide: SyntheticSlide, x: int, y: int, width: int, height: int) -> np.ndarray:
        if y >= 512:
            raise OSError("disk full")
        return pixels(slide, x, y, width, height)

    monkeypatch.setattr(svs, "pixels", failing)
    with pytest.raises(OSError, match="disk full"):
        write_slide(SMALL, tmp_path / "a.svs")
    assert list(tmp_path.iterdir()) == []


def test_writing_holds_a_few_rows_of_blocks_only(tmp_path: Path) -> None:
    slide = SyntheticSlide(width=4096, height=4096)
    pixels(slide, 0, 0, 1, 1)  # the patient's textures do not grow with the slide
    tracemalloc.start()
    try:
        write_slide(slide, tmp_path / "a.svs")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4096 * 4096 * 3 / 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"downsamples": (2, 4)}, "start at 1"),
        ({"downsamples": (1, 4, 6)}, "multiple of the one before"),
        ({"width": 15}, "too small"),
        ({"block_px": 250}, "multiple of 16"),
        ({"mpp": 0.1}, "mpp 0.1"),
    ],
)
def test_impossible_slides_are_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticSlide(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_an_artefact_is_where_it_is_said_to_be_whatever_region_is_asked_for(artefact: Artefact) -> None:
    plain, spoilt = (SyntheticSlide(width=1024, height=768, mpp=2.0, patient=2, artefacts=a) for a in ((), (artefact,)))
    before, after = (pixels(slide, 0, 0, 1024, 768) for slide in (plain, spoilt))
    where = covers(artefact, 2, 1024, 768, np.arange(1024) + 0.5, np.arange(768) + 0.5)
    assert 0.002 < where.mean() < 0.4
    assert np.array_equal(after[~where], before[~where])
    assert np.mean((after != before).any(axis=2)[where]) > 0.9
    assert np.array_equal(pixels(spoilt, 300, 200, 311, 257), after[200:457, 300:611])
