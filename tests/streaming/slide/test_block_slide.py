"""Pixels of slides that are grids of blocks: OpenSlide is the oracle, tifffile where OpenSlide knows no levels."""

from __future__ import annotations

import dataclasses
import struct
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streaming.errors import SlideError
from streaming.slide import Slide, open_slide
from streaming.slide.block_level import BlockLevel
from streaming.slide.codecs import BlockFormat
from streaming.slide.empty_blocks import are_cheap
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from streaming.vision import cv2
from tests.tiff_files import TiffSlide, level_pixels, write_tiff

DATA = Path(__file__).parents[3].parent / "shared/data"
# Grey levels that two JPEG 2000 decoders may differ by; the last one has subsampled chroma ("J2K/YUV16").
REAL = {"CMU-1-crop.svs": 0, "TCGA-CR-7395-TS1.svs": 1, "luna_1065626.svs": 1}
CMU = DATA / "CMU-1-crop.svs"
needs_cmu = pytest.mark.skipif(not CMU.exists(), reason="no real slide here")

BEYOND_OPENSLIDE = (
    TiffSlide(byte_order=">", compression="deflate"),
    TiffSlide(block=(48, 48), compression="none"),
)
EXACT = ("jpeg", "jpeg-rgb", "lzw", "deflate", "none")
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def assert_fast(slide: Slide) -> None:
    assert slide.backend == "blocks"


def oracle(path: Path, location: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region(location, level, size))[:, :, :3]


@st.composite
def regions(draw, width: int, height: int, downsample: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """Location in level-0 px, a multiple of the downsample, and size in the level's; inside, across edges, outside."""
    w, h = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    x, y = draw(st.integers(-w - 40, width + 40)), draw(st.integers(-h - 40, height + 40))
    return (x * downsample, y * downsample), (w, h)


@st.composite
def tiff_slides(draw, compressions: tuple[str, ...], vendors: tuple[str, ...] = ("aperio", "generic")) -> TiffSlide:
    compression = draw(st.sampled_from(compressions))
    bigtiff = draw(st.booleans())
    # OpenSlide's libtiff refuses uncompressed blocks that are no multiple of 1,024 bytes.
    step = 32 if compression == "none" else 16
    return TiffSlide(
        width=draw(st.integers(20, 900)),
        height=draw(st.integers(20, 700)),
        block=(step * draw(st.integers(1, 320 // step)), step * draw(st.integers(1, 320 // step))),
        compression=compression,
        subsampling=draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        shared_tables=draw(st.booleans()),
        predictor=compression in ("lzw", "deflate") and draw(st.booleans()),
        bigtiff=bigtiff,
        byte_order=draw(st.sampled_from("<>")) if bigtiff else "<",
        vendor=draw(st.sampled_from(vendors)),
        gap=draw(st.sampled_from([0, 1, 64])),
        shuffled=draw(st.booleans()),
        tissue=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


def assert_same_regions(path: Path, found: list, level: int = 0, most: int = 0) -> None:
    slide = open_slide(str(path))
    assert_fast(slide)
    for location, size in found:
        got = slide.read_region(location, level, size)
        assert got.shape == (size[1], size[0], 3)
        assert got.dtype == np.uint8
        off = np.abs(got.astype(int) - oracle(path, location, level, size))
        assert off.max() <= most, f"level {level}, {location} {size}: {off.max()} grey levels off"


@PROPERTY
@given(st.data())
def test_regions_of_any_layout_equal_openslide_s_bit_for_bit(data: st.DataObject) -> None:
    made = data.draw(tiff_slides(EXACT))
    found = data.draw(st.lists(regions(made.width, made.height), min_size=1, max_size=5))
    with tempfile.TemporaryDirectory() as folder:
        assert_same_regions(write_tiff(made, Path(folder, "slide.tif")), found)


@PROPERTY
@given(st.data())
def test_regions_of_jpeg_2000_are_within_one_grey_level_of_openslide_s(data: st.DataObject) -> None:
    made = data.draw(tiff_slides(("jp2k-ycbcr", "jp2k-rgb"), ("aperio",)))
    found = data.draw(st.lists(regions(made.width, made.height), min_size=1, max_size=5))
    with tempfile.TemporaryDirectory() as folder:
        assert_same_regions(write_tiff(made, Path(folder, "slide.svs")), found, most=1)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (4, 2)])
def test_jpeg_2000_with_any_subsampling_of_chroma_is_within_one_grey_level_of_openslide_s(
    tmp_path: Path, subsampling
) -> None:
    made = TiffSlide(compression="jp2k-ycbcr", subsampling=subsampling)
    path = write_tiff(made, tmp_path / "slide.svs")
    slide = open_slide(str(path))
    # What no decoder of ours knows is left to OpenSlide, not to the first tile that can't be read.
    assert slide.backend == ("blocks" if subsampling in ((1, 1), (2, 1), (2, 2)) else "openslide")
    whole = slide.read_region((0, 0), 0, (made.width, made.height)).astype(int)
    assert np.abs(whole - oracle(path, (0, 0), 0, (made.width, made.height))).max() <= 1
    assert np.abs(whole - level_pixels(made, 0)).mean() < 3, "it is the picture that was compressed"


@PROPERTY
@given(st.data())
def test_levels_of_an_integral_downsample_equal_openslide_s(data: st.DataObject) -> None:
    made = data.draw(tiff_slides(EXACT, ("aperio", "generic", "philips")))
    # Whole multiples: else OpenSlide's downsample is a fraction and its positions fall between pixels.
    made = dataclasses.replace(made, width=made.width // 8 * 8 + 64, height=made.height // 8 * 8 + 64)
    made = dataclasses.replace(made, downsamples=data.draw(st.sampled_from([(1, 2), (1, 4), (1, 2, 8)])))
    level = data.draw(st.integers(1, len(made.downsamples) - 1))
    downsample = made.downsamples[level]
    found = data.draw(st.lists(regions(*made.level_dimensions[level], downsample), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiff(made, Path(folder, "slide.tif"))
        assert open_slide(str(path)).level_downsamples[level] == downsample
        assert_same_regions(path, found, level)


@pytest.mark.parametrize(("width", "height"), [(4443, 300), (301, 1203), (4443, 1783)])
@pytest.mark.parametrize("vendor", ["aperio", "generic", "philips"])
def test_dimensions_downsamples_and_mpp_are_openslide_s_also_where_they_round(
    tmp_path: Path, width: int, height: int, vendor
) -> None:
    made = TiffSlide(
        width=width, height=height, vendor=vendor, downsamples=(1, 2, 4), compression="lzw", mpp=0.2527, tissue=False
    )
    path = write_tiff(made, tmp_path / "slide.tif")
    slide = open_slide(str(path))
    assert_fast(slide)
    with openslide.OpenSlide(path) as wanted:
        assert tuple(slide.level_dimensions) == wanted.level_dimensions == made.level_dimensions
        assert slide.level_downsamples == pytest.approx(wanted.level_downsamples)
        assert slide.mpp == pytest.approx(float(wanted.properties["openslide.mpp-x"]))
    for level, dimensions in enumerate(made.level_dimensions):
        np.testing.assert_array_equal(
            slide.read_region((0, 0), level, dimensions), oracle(path, (0, 0), level, dimensions)
        )


@PROPERTY
@given(st.data())
def test_empty_and_shared_blocks_read_as_openslide_reads_them(data: st.DataObject) -> None:
    made = data.draw(tiff_slides(EXACT))
    num = made.padded(made.width, made.height)
    num_blocks = num[0] * num[1] // (made.block[0] * made.block[1])
    assume(num_blocks > 2)
    block = st.integers(0, num_blocks - 1)
    empty = data.draw(st.sets(block, max_size=num_blocks // 2))
    shared = data.draw(st.dictionaries(block, block, max_size=3))
    shared = {a: b for a, b in shared.items() if a not in empty and b not in empty and b not in shared}
    made = dataclasses.replace(
        made,
        empty=tuple((0, index) for index in sorted(empty)),
        shared=tuple((0, a, b) for a, b in sorted(shared.items())),
    )
    found = data.draw(st.lists(regions(made.width, made.height), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiff(made, Path(folder, "slide.tif"))
        assert_same_regions(path, [*found, ((0, 0), (made.width, made.height))])


@pytest.mark.parametrize("vendor", ["generic", "philips"])
@pytest.mark.parametrize("empty", [((1, 0),), ((0, 1),), ((0, 0), (0, 1), (0, 4), (0, 5), (1, 0))])
def test_empty_blocks_of_a_pyramid_read_as_openslide_reads_them(tmp_path: Path, vendor, empty) -> None:
    made = TiffSlide(
        width=1024, height=768, vendor=vendor, compression="deflate", block=(256, 256), downsamples=(1, 2), empty=empty
    )
    path = write_tiff(made, tmp_path / "slide.tif")
    slide = open_slide(str(path))
    assert_fast(slide)
    for level, size in enumerate(made.level_dimensions):
        np.testing.assert_array_equal(slide.read_region((0, 0), level, size), oracle(path, (0, 0), level, size))


@PROPERTY
@given(st.data())
def test_empty_blocks_of_an_aperio_pyramid_are_painted_from_finer_levels_as_openslide_does(data: st.DataObject) -> None:
    downsamples = data.draw(st.sampled_from([(1, 2), (1, 4), (1, 2, 4), (1, 4, 8)]))
    made = TiffSlide(
        width=data.draw(st.sampled_from([512, 640, 1040])),
        height=data.draw(st.sampled_from([256, 520])),
        block=(data.draw(st.sampled_from([64, 80])), 64),
        downsamples=downsamples,
        compression=data.draw(st.sampled_from(["deflate", "jpeg"])),
    )
    grids = [-(-w // made.block[0]) * -(-h // made.block[1]) for w, h in made.level_dimensions]
    empty = data.draw(st.sets(st.sampled_from([(level, i) for level, num in enumerate(grids) for i in range(num)])))
    made = dataclasses.replace(made, empty=tuple(sorted(empty)))
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiff(made, Path(folder, "slide.svs"))
        slide = open_slide(str(path))
        assert_fast(slide)
        with openslide.OpenSlide(path) as theirs:
            for level, downsample in enumerate(downsamples):
                location, size = data.draw(regions(*made.level_dimensions[level], downsample))
                region = np.asarray(theirs.read_region(location, level, size))
                # Each level's averages are rounded, by theirs and by ours; half of a pixel may be seen through.
                opaque, clear = region[..., 3] == 255, region[..., 3] == 0
                got = slide.read_region(location, level, size).astype(int)
                assert np.abs(got - region[..., :3])[opaque].max(initial=0) <= level
                assert not got[clear].any()
                tile = slide.read_tile(*location, 0.25 * downsample, 200).astype(int)
                wanted = np.asarray(theirs.read_region(location, level, (200, 200)))
                off = np.abs(tile - np.where(wanted[..., 3:] == 0, 255, wanted[..., :3]))
                assert off[np.isin(wanted[..., 3], (0, 255))].max(initial=0) <= level


@pytest.mark.parametrize("empty", [(0, 2), (0, 14), (0, 9)])
def test_halves_of_a_block_count_as_openslide_rounds_them(tmp_path: Path, empty: tuple[int, int]) -> None:
    # Of 5 × 5 blocks, and of 2 × 2: two and a half each way.
    made = TiffSlide(width=320, height=320, block=(64, 64), downsamples=(1, 4), compression="deflate", empty=(empty,))
    path = write_tiff(made, tmp_path / "slide.svs")
    with openslide.OpenSlide(path) as theirs:
        wanted = np.asarray(theirs.read_region((0, 0), 1, (80, 80)))
    opaque, clear = wanted[..., 3] == 255, wanted[..., 3] == 0
    got = open_slide(str(path)).read_region((0, 0), 1, (80, 80)).astype(int)
    assert np.abs(got - wanted[..., :3])[opaque].max() <= 1
    # Seen where a block that lies over the empty one is painted, not where it is shown as stored.
    assert not got[clear].any()


def test_empty_blocks_below_a_level_of_far_more_blocks_are_refused_where_openslide_divides_by_0(tmp_path: Path) -> None:
    empty = ((0, 3),)
    made = TiffSlide(width=1280, height=1280, block=(64, 64), downsamples=(4, 1), compression="deflate", empty=empty)
    path = write_tiff(made, tmp_path / "slide.svs")
    with pytest.raises(SlideError, match="5 × 5 blocks where level 1 is of 20 × 20"):
        open_slide(str(path))


def test_a_tile_over_an_empty_block_is_the_same_however_it_is_reduced(tmp_path: Path) -> None:
    made = TiffSlide(width=1024, height=1024, downsamples=(1, 2), empty=((1, 1),), compression="jp2k-rgb")
    slide = open_slide(str(write_tiff(made, tmp_path / "slide.svs")))
    got, whole = (slide.read_tile(300, 300, 1.0, 100, exact=exact) for exact in (False, True))
    np.testing.assert_array_equal(got, whole)


def test_empty_blocks_that_cost_too_much_to_paint_are_told() -> None:
    def level(downsample: int, *empty: int) -> BlockLevel:
        side = 2**16 // downsample
        nbytes = np.full((side // 256) ** 2, 5000)
        nbytes[list(empty)] = 0
        return BlockLevel(side, side, BlockFormat("JPEG", 256, 256), np.zeros_like(nbytes), nbytes)

    # Of 16 blocks each; where one of them is empty as well, of 16 more for that one.
    assert are_cheap([level(1), level(4, 0, 7), level(16, 0, 5)])
    assert are_cheap([level(1), level(16, 3)])
    assert are_cheap([level(1), level(4, *range(4096)), level(16, 3)])
    # Of 4,096.
    assert not are_cheap([level(1), level(64, 3)])
    assert not are_cheap([level(1), level(4, *range(4096)), level(16, *range(256)), level(64, 3)])
    # Nothing below it costs less: what is empty at level 0 is looked at, too.
    assert not are_cheap([level(1, *range(65536)), level(64, 3)])


@pytest.mark.parametrize("compression", EXACT)
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_subifds_of_an_ome_tiff_are_its_levels(tmp_path: Path, compression, byte_order) -> None:
    made = TiffSlide(
        vendor="ome",
        compression=compression,
        byte_order=byte_order,
        bigtiff=True,
        downsamples=(1, 2, 4),
        width=704,
        height=512,
    )
    path = write_tiff(made, tmp_path / "slide.ome.tif")
    slide = open_slide(str(path))
    assert_fast(slide)
    assert tuple(slide.level_dimensions) == made.level_dimensions
    with tifffile.TiffFile(path) as tiff:
        for level, wanted in enumerate(tiff.series[0].levels):
            got = slide.read_region((0, 0), level, made.level_dimensions[level])
            # libjpeg upsamples chroma alike in both; a JPEG block is the same block.
            np.testing.assert_array_equal(got, wanted.asarray())


@pytest.mark.parametrize("made", BEYOND_OPENSLIDE, ids=["big-endian classic", "uncompressed 48 px blocks"])
def test_layouts_that_openslide_refuses_are_read_all_the_same(tmp_path: Path, made: TiffSlide) -> None:
    slide = open_slide(str(write_tiff(made, tmp_path / "slide.svs")))
    assert_fast(slide)
    np.testing.assert_array_equal(slide.read_region((0, 0), 0, (700, 500)), level_pixels(made, 0))


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_regions_of_real_slides_are_openslide_s(name: str, data: st.DataObject) -> None:
    if not (DATA / name).exists():
        pytest.skip("no real slide here")
    with openslide.OpenSlide(DATA / name) as slide:
        width, height = slide.level_dimensions[0]
    assert_same_regions(DATA / name, [data.draw(regions(width, height))], most=REAL[name])


def associated_pages(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    return [page for page in tiff.pages if not page.is_tiled and page.subfiletype in (1, 9)]


def overwrite(data: bytearray, page: tifffile.TiffPage) -> None:
    for offset, nbytes in zip(page.dataoffsets, page.databytecounts, strict=True):
        data[offset : offset + nbytes] = np.random.default_rng(0).bytes(nbytes)


def lose(data: bytearray, page: tifffile.TiffPage) -> None:
    tag = page.tags[273]
    struct.pack_into(f"<{tag.count}I", data, tag.valueoffset, *[2**31] * tag.count)


# Junk in uncompressed strips decodes as well as anything; strips past the end of the file would not.
@pytest.mark.parametrize("spoil", [overwrite, lose])
def test_label_and_macro_are_never_read(tmp_path: Path, spoil: Callable[[bytearray, tifffile.TiffPage], None]) -> None:
    made = TiffSlide(associated=True, downsamples=(1, 2))
    path = write_tiff(made, tmp_path / "slide.svs")
    intact = [open_slide(str(path)).read_region((0, 0), level, (300, 200)) for level in range(2)]
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        pages = associated_pages(tiff)
        assert len(pages) == 2
        for page in pages:
            spoil(data, page)
    spoilt = tmp_path / "spoilt.svs"
    spoilt.write_bytes(data)
    slide = open_slide(str(spoilt))
    assert_fast(slide)
    for level, wanted in enumerate(intact):
        np.testing.assert_array_equal(slide.read_region((0, 0), level, (300, 200)), wanted)
    np.testing.assert_array_equal(slide.read_tile(0, 0, 0.25, 200), intact[0][:, :200])


@lru_cache(maxsize=4)
def whole_level(path: Path, level: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[:, :, :3]


def reference(path: Path, mpp: float, x: float, y: float, wanted_mpp: float, size: int) -> np.ndarray:
    """The exact box of the finest level that is fine enough, read in full by OpenSlide and averaged by area."""
    with openslide.OpenSlide(path) as slide:
        usable = [n for n, d in enumerate(slide.level_downsamples) if mpp * d <= wanted_mpp * 1.01]
        level = max(usable, default=0)
        downsample = slide.level_downsamples[level]
        extent = max(1, round(size * wanted_mpp / (mpp * downsample)))
        left, top = round(x / downsample), round(y / downsample)
    box = whole_level(path, level)[top : top + extent, left : left + extent]
    assert box.shape[:2] == (extent, extent)
    if extent == size:
        return box
    shrinks = extent > size
    return cv2.resize(box, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def assert_same_tile(path: Path, slide: Slide, x: int, y: int, wanted_mpp: float, size: int) -> None:
    wanted = reference(path, slide.mpp, x, y, wanted_mpp, size).astype(float)
    got = slide.read_tile(x, y, wanted_mpp, size, tolerance=0.0)
    assert got.shape == (size, size, 3)
    error = np.mean((got - wanted) ** 2)
    where = f"({x}, {y}) at {wanted_mpp}"
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 38, where
    assert np.abs(got.mean(axis=(0, 1)) - wanted.mean(axis=(0, 1))).max() <= 0.5, where


@needs_cmu
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7.9, 8])
def test_tiles_of_real_tissue_are_the_area_average_of_the_finer_level(ratio: float) -> None:
    slide = open_slide(str(CMU))
    assert_fast(slide)
    width, height = slide.level_dimensions[0]
    size = 224
    extent = round(size * ratio)
    rng = np.random.default_rng(round(ratio * 10))
    for _ in range(12):
        x, y = (int(rng.integers(0, side - extent)) for side in (width, height))
        assert_same_tile(CMU, slide, x, y, slide.mpp * ratio, size)


# (slide, wanted / level-0 µm/px): dB against OpenSlide's pixels averaged by area, over all tiles and in the worst one,
# where blocks are decoded at half their size and the rest is averaged. A wavelet's low pass keeps more of the fine
# detail than an average does, of which the TCGA slide is full; luna's chroma is halved a second time. TCGA's level 1
# begins at 2, luna's at 4.
JPEG_2000_FIDELITY = {
    ("TCGA-CR-7395-TS1.svs", 4): (33, 31),
    ("TCGA-CR-7395-TS1.svs", 8): (42, 40),
    ("luna_1065626.svs", 2): (34, 31),
    ("luna_1065626.svs", 8): (36, 31),
    ("luna_1065626.svs", 16): (42, 38),
}


@pytest.mark.parametrize(("name", "ratio"), JPEG_2000_FIDELITY)
def test_reduced_tiles_of_jpeg_2000_are_near_the_area_average_and_exact_ones_are_it(name: str, ratio: int) -> None:
    if not (DATA / name).exists():
        pytest.skip("no real slide here")
    least, least_of_one = JPEG_2000_FIDELITY[name, ratio]
    path, size, rng = DATA / name, 96, np.random.default_rng(ratio)
    slide = open_slide(str(path), mpp=0.25)
    assert_fast(slide)
    errors: list[float] = []
    while len(errors) < 12:
        x, y = (int(rng.integers(0, (side - size * ratio) // 64)) * 64 for side in slide.level_dimensions[0])
        wanted = reference(path, slide.mpp, x, y, slide.mpp * ratio, size).astype(float)
        if wanted.std() < 5 or slide.begin_tile(x, y, slide.mpp * ratio, size).scale == 1:
            continue  # glass, or a corner between the pixels of the reduced level
        got = slide.read_tile(x, y, slide.mpp * ratio, size)
        assert np.abs(slide.read_tile(x, y, slide.mpp * ratio, size, exact=True) - wanted).max() <= 2
        assert np.abs(got.mean(axis=(0, 1)) - wanted.mean(axis=(0, 1))).max() <= 1
        errors.append(float(np.mean((got - wanted) ** 2)))
    psnr = [10 * np.log10(255**2 / error) for error in (np.mean(errors), max(errors))]
    assert psnr[0] >= least
    assert psnr[1] >= least_of_one


@pytest.fixture(scope="module")
def odd_mpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "odd.svs"
    write_slide(SyntheticSlide(width=4096, height=3072, patient=1, mpp=0.2527, downsamples=(1, 4)), path)
    return path


@pytest.mark.parametrize("wanted_mpp", [0.25, 0.5, 1.0, 2.0])
def test_tiles_of_a_slide_with_an_odd_mpp_are_resampled_from_the_exact_box(odd_mpp: Path, wanted_mpp: float) -> None:
    slide = open_slide(str(odd_mpp))
    assert_fast(slide)
    size = 256
    extent = int(size * wanted_mpp / slide.mpp) + 8
    rng = np.random.default_rng(5)
    for _ in range(8):
        x, y = (int(rng.integers(0, side - extent)) for side in slide.level_dimensions[0])
        assert_same_tile(odd_mpp, slide, x, y, wanted_mpp, size)


def test_an_empty_file_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    with pytest.raises(SlideError, match="is empty; compare it with its source"):
        open_slide(str(tmp_path / "a.svs"))
