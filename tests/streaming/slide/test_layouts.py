"""Tiled TIFFs of every codec, sample and pyramid, by tifffile: OpenSlide is the oracle where it opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from streaming.errors import SlideError
from streaming.slide import Slide, open_slide
from streaming.slide.block_index import unpack
from streaming.vision import cv2
from tests.tiff_files import STAGED, TiffSlide, level_pixels, write_tiff

DATA = Path(__file__).parents[3].parent / "shared/data/tiff"
WIDTH, HEIGHT = 700, 500
RGB = level_pixels(TiffSlide(width=WIDTH, height=HEIGHT), 0)
HALF = cv2.resize(RGB, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
QUARTER = cv2.resize(RGB, (WIDTH // 4, HEIGHT // 4), interpolation=cv2.INTER_AREA)
OPTIONS: dict[str, Any] = {
    **{"tile": (256, 256), "photometric": "rgb", "metadata": None},
    **{"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"},
}


def write(path: Path, *pages: np.ndarray, byteorder: str = "<", ome: bool = False, **options: Any) -> Path:
    with tifffile.TiffWriter(path, byteorder=byteorder, ome=ome, bigtiff=True) as tiff:
        for number, page in enumerate(pages):
            tiff.write(page, **{**OPTIONS, "subfiletype": int(number > 0), **options})
    return path


def by_openslide(path: Path, level: int = 0) -> np.ndarray | None:
    """All of a level, None where OpenSlide doesn't read it."""
    try:
        with openslide.OpenSlide(path) as slide:
            return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[:, :, :3]
    except openslide.OpenSlideError:
        return None


def read(path: Path, level: int = 0) -> np.ndarray:
    slide = open_slide(str(path), mpp=0.25)
    assert slide.backend == "blocks"
    return slide.read_region((0, 0), level, slide.level_dimensions[level])


LOSSLESS = {
    **{name: {"compression": name} for name in ("zstd", "lzma", "packbits", "zlib", "lzw", None)},
    **{f"{name} of differences": {"compression": name, "predictor": True} for name in ("zstd", "lzma", "lzw")},
    "jpeg 2000 34712": {"compression": "jpeg2000", "compressionargs": {"level": 0}},
    "jpeg 2000 33004": {"compression": 33004, "compressionargs": {"level": 0}},
    "webp": {"compression": "webp", "compressionargs": {"lossless": True}},
    "jpeg xl 50002": {"compression": 50002, "compressionargs": {"lossless": True}},
    "jpeg xl 52546": {"compression": 52546, "compressionargs": {"lossless": True}},
}


@pytest.mark.parametrize("options", LOSSLESS.values(), ids=map(str, LOSSLESS))
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_codec_gives_the_pixels_that_were_compressed(tmp_path: Path, options: dict, byteorder: str) -> None:
    path = write(tmp_path / "slide.tif", RGB, HALF, byteorder=byteorder, **options)
    for level, wanted in enumerate((RGB, HALF)):
        np.testing.assert_array_equal(read(path, level), wanted)
    theirs = by_openslide(path)
    assert theirs is None or np.array_equal(theirs, RGB)


@pytest.mark.parametrize("compression", ["webp", "jpegxl", "jpeg2000"])
def test_lossy_codecs_give_what_tifffile_makes_of_them(tmp_path: Path, compression: str) -> None:
    lossy = {"lossless": False} if compression == "webp" else {}
    path = write(tmp_path / "slide.tif", RGB, compression=compression, compressionargs={"level": 60, **lossy})
    np.testing.assert_array_equal(read(path), tifffile.imread(path))
    assert 0 < np.abs(read(path).astype(int) - RGB).mean() < 12


WIDE = RGB.astype(np.uint16) * 257
WIDE[:, ::3] += np.random.default_rng(0).integers(0, 129, WIDE[:, ::3].shape, np.uint16) * (WIDE[:, ::3] < 65000)
GREY = np.ascontiguousarray(RGB[..., 1])
SAMPLES = {
    "grey": (GREY, {"photometric": "minisblack"}),
    "grey, 0 is white": (GREY, {"photometric": "miniswhite"}),
    "16-bit RGB": (WIDE, {}),
    "16-bit grey": (np.ascontiguousarray(WIDE[..., 1]), {"photometric": "minisblack"}),
    "planes apart": (np.ascontiguousarray(RGB.transpose(2, 0, 1)), {"planarconfig": "separate"}),
    "16-bit planes apart": (np.ascontiguousarray(WIDE.transpose(2, 0, 1)), {"planarconfig": "separate"}),
    "opaque RGBA": (np.dstack([RGB, np.full_like(GREY, 255)]), {"extrasamples": ["unassalpha"]}),
}


def test_grey_jpeg_2000_gives_the_pixels_that_were_compressed_also_at_a_smaller_size(tmp_path: Path) -> None:
    lossless = {"compression": "jpeg2000", "compressionargs": {"level": 0}}
    path = write(tmp_path / "slide.tif", GREY, photometric="minisblack", **lossless)
    np.testing.assert_array_equal(read(path), np.repeat(GREY[..., None], 3, axis=2))
    tile = open_slide(str(path), mpp=0.25).read_tile(0, 0, 0.5, 200)
    average = cv2.resize(GREY[:400, :400], (200, 200), interpolation=cv2.INTER_AREA)
    assert np.abs(tile.astype(int) - average[..., None]).mean() < 4, "a wavelet is sharper than an average"


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_orientation_is_left_alone(tmp_path: Path, compression: str, orientation: int) -> None:
    tag = (274, 3, 1, orientation, True)
    path = write(tmp_path / "slide.tif", RGB, compression=compression, extratags=[tag])
    got = read(path)
    np.testing.assert_array_equal(got, tifffile.imread(path))
    same = np.array_equal(got, by_openslide(path))
    # OpenSlide mirrors each block in its place where it is no JPEG, and so takes the picture to pieces.
    assert same == (compression == "jpeg" or orientation == 5)


def old_jpeg(path: Path, *, with_headers: bool) -> Path:
    """A TIFF of JPEG blocks under the number of the old style, whole ones or their scans alone."""
    write(path, RGB, compression="jpeg", subsampling=(1, 1), byteorder="<")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        tables = page.jpegtables
        offset = page.tags[259].valueoffset
        for place, nbytes in zip(page.dataoffsets, page.databytecounts, strict=True):
            assert tables is None, "each block has its own"
            if not with_headers:
                scan = content.index(b"\xff\xda", place)
                content[place : place + nbytes] = content[scan + 14 : place + nbytes] + bytes(scan + 14 - place)
    content[offset : offset + 2] = (6).to_bytes(2, "little")
    path.write_bytes(content)
    return path


def test_old_style_jpeg_is_read_where_its_blocks_are_whole_and_refused_where_they_are_not(tmp_path: Path) -> None:
    new = write(tmp_path / "new.tif", RGB, compression="jpeg", subsampling=(1, 1))
    np.testing.assert_array_equal(read(old_jpeg(tmp_path / "old.tif", with_headers=True)), by_openslide(new))
    with pytest.raises(SlideError, match=r"cut\.tif: level 0: old-style JPEG .*vips tiffsave"):
        open_slide(str(old_jpeg(tmp_path / "cut.tif", with_headers=False)))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_samples_of_any_kind_become_openslide_s_rgb(tmp_path: Path, name: str, predictor, byteorder) -> None:
    pages, options = SAMPLES[name]
    path = write(tmp_path / "slide.tif", pages, byteorder=byteorder, compression="zlib", predictor=predictor, **options)
    wanted = by_openslide(path)
    assert wanted is not None
    assert wanted.std() > 10
    if name == "16-bit grey":  # of blocks that reach past the right edge libtiff leaves out every second row
        wanted = np.concatenate([wanted[:, :512], np.repeat(pages[:, 512:, None] >> 8, 3, axis=2)], axis=1)
    np.testing.assert_array_equal(read(path), wanted)


def test_grey_jpeg_is_openslide_s_also_at_a_smaller_size(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", GREY, compression="jpeg", photometric="minisblack")
    wanted = by_openslide(path)
    np.testing.assert_array_equal(read(path), wanted)
    tile = open_slide(str(path), mpp=0.25).read_tile(0, 0, 0.5, 200)
    assert (
        np.abs(tile.astype(int) - cv2.resize(wanted[:400, :400], (200, 200), interpolation=cv2.INTER_AREA)).mean() < 1
    )


@pytest.mark.parametrize("premultiplied", [False, True])
def test_what_is_transparent_lies_over_white(tmp_path: Path, premultiplied: bool) -> None:
    alpha = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
    part = alpha[..., None] / 255
    colours = (RGB * part).round().astype(np.uint8) if premultiplied else RGB
    extra = "assocalpha" if premultiplied else "unassalpha"
    path = write(tmp_path / "slide.tif", np.dstack([colours, alpha]), compression="zlib", extrasamples=[extra])
    assert np.abs(read(path) - (RGB * part + 255 * (1 - part))).max() <= 1


@pytest.mark.parametrize("compression", ["webp", "jpegxl"])
def test_blocks_of_rgba_that_are_opaque_all_over_are_read_whatever_their_codec_keeps(
    tmp_path: Path, compression: str
) -> None:
    alpha = np.full_like(GREY, 255)
    alpha[:256, 300:] = 0
    lossless = {"compression": compression, "compressionargs": {"lossless": True}}
    path = write(tmp_path / "slide.tif", np.dstack([RGB, alpha]), extrasamples=["unassalpha"], **lossless)
    np.testing.assert_array_equal(read(path), np.where(alpha[..., None], RGB, 255))


def assert_pyramid(slide: Slide) -> None:
    assert slide.backend == "blocks"
    assert slide.level_dimensions == tuple((page.shape[1], page.shape[0]) for page in (RGB, HALF, QUARTER))
    for level, wanted in enumerate((RGB, HALF, QUARTER)):
        np.testing.assert_array_equal(
            slide.read_region((0, 0), level, slide.level_dimensions[level]), wanted, err_msg=f"level {level}"
        )


def test_subifds_of_any_writer_are_levels(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number, page in enumerate((RGB, HALF, QUARTER)):
            tiff.write(page, **OPTIONS, compression="zlib", **({"subfiletype": 1} if number else {"subifds": 2}))
    assert_pyramid(open_slide(str(path)))


def test_pages_without_a_mark_that_shrink_by_one_factor_are_levels_and_others_are_not(tmp_path: Path) -> None:
    assert_pyramid(open_slide(str(write(tmp_path / "a.tif", RGB, HALF, QUARTER, subfiletype=0, compression="zlib"))))
    crop = np.ascontiguousarray(HALF[:200])  # of another aspect
    for name, pages in {"crop": (RGB, crop), "twice": (RGB, RGB), "then a label": (RGB, HALF, crop)}.items():
        slide = open_slide(str(write(tmp_path / f"{name}.tif", *pages, subfiletype=0, compression="zlib")))
        assert len(slide.level_dimensions) == 1 + (name == "then a label"), name


@pytest.mark.parametrize(
    ("xmp", "backend"), [(b"<x:xmpmeta/>", "blocks"), (b"<xmp><iScan Magnification='20'/></xmp>", "openslide")]
)
def test_xmp_sends_only_ventana_s_slides_to_openslide(tmp_path: Path, xmp: bytes, backend: str) -> None:
    path = write(tmp_path / "slide.tif", RGB, compression="zlib", extratags=[(700, 1, len(xmp), xmp, True)])
    assert open_slide(str(path)).backend == backend


def test_a_stripped_tiff_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", rowsperstrip=64)
    with pytest.raises(SlideError, match=r"stripped TIFF.*vips tiffsave .* --tile --pyramid"):
        open_slide(str(path))


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_tiff_of_a_codec_that_nobody_reads_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, byteorder: str
) -> None:
    path = write(tmp_path / "slide.tif", RGB, compression="jpegxr", byteorder=byteorder)
    with pytest.raises(SlideError, match=r"slide\.tif: .*OpenSlide.*vips tiffsave .* --tile --pyramid"):
        open_slide(str(path))


@pytest.mark.parametrize("made", [TiffSlide(), TiffSlide(vendor="generic", empty=((0, 0), (0, 4)), compression="lzw")])
def test_outside_the_scan_and_in_empty_blocks_tiles_are_white_and_regions_openslide_s_black(
    tmp_path: Path, made: TiffSlide
) -> None:
    path = write_tiff(made, tmp_path / "slide.tif")
    slide = open_slide(str(path))
    for x, y in ((-100, -60), (600, 400), (0, 0), (5000, 5000)):
        with openslide.OpenSlide(path) as theirs:
            region = np.asarray(theirs.read_region((x, y), 0, (256, 256)))
        np.testing.assert_array_equal(slide.read_region((x, y), 0, (256, 256)), region[..., :3])
        wanted = np.where(region[..., 3:] == 0, 255, region[..., :3])
        np.testing.assert_array_equal(slide.read_tile(x, y, 0.25, 256), wanted)


def test_a_slide_through_openslide_is_white_outside_the_scan_too(tmp_path: Path) -> None:
    path = write_tiff(STAGED, tmp_path / "slide.svs")
    slide = open_slide(str(path), mpp=0.25)
    assert slide.backend == "openslide"
    tile, region = slide.read_tile(412, 412, 0.25, 200), slide.read_region((412, 412), 0, (200, 200))
    np.testing.assert_array_equal(tile[:100, :100], region[:100, :100])
    assert (tile[100:] == 255).all()
    assert (tile[:, 100:] == 255).all()
    assert (region[100:] == 0).all()


@pytest.mark.parametrize("vendor", ["generic", "ome", "aperio", "philips"])
@pytest.mark.parametrize("empty", [(), (0, 3), (0, 1, 2), (0, 1, 2, 3, 4), (4,), (2, 5), tuple(range(6))])
def test_what_was_scanned_is_what_openslide_tells(tmp_path: Path, vendor: Any, empty: tuple[int, ...]) -> None:
    made = TiffSlide(vendor=vendor, compression="deflate", empty=tuple((0, block) for block in empty))
    path = write_tiff(made, tmp_path / "slide.tif")
    slide = open_slide(str(path))
    assert slide.backend == "blocks"
    with openslide.OpenSlide(path) as theirs:
        names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        width, height = theirs.dimensions
        whole = dict(zip(names, (0, 0, width, height), strict=True))
        wanted = tuple(int(theirs.properties.get(name, whole[name])) for name in names)
    if len(empty) == 6:  # nothing: there is no tissue to draw from
        wanted = (0, 0, width, height)
    assert slide.bounds == wanted
    assert unpack(slide.packed_index).bounds == (
        wanted if vendor in ("generic", "ome") and 0 < len(empty) < 6 else None
    )


def test_a_slide_through_openslide_has_its_bounds_too(tmp_path: Path) -> None:
    # A palette is what no block is decoded of here.
    index = np.ascontiguousarray(RGB[..., 1] // 2)
    colours = np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, axis=0)
    path = write(tmp_path / "slide.tif", index, photometric="palette", colormap=colours)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags[325]
        for block in (0, 1, 2, 3):  # the first row, and the first column
            size = 8 if tag.dtype == 16 else 4
            content[tag.valueoffset + size * block : tag.valueoffset + size * (block + 1)] = bytes(size)
    path.write_bytes(content)
    slide = open_slide(str(path), mpp=0.25)
    assert (slide.backend, slide.bounds) == ("openslide", (256, 256, 444, 244))


@pytest.mark.parametrize("path", sorted(DATA.glob("*")), ids=lambda path: path.name)
def test_real_files_read_as_openslide_or_tifffile_reads_them(path: Path) -> None:
    slide = open_slide(str(path), mpp=0.25)
    width, height = slide.level_dimensions[0]
    x, y, size = width // 3, height // 3, (min(300, width // 2), min(300, height // 2))
    got = slide.read_region((x, y), 0, size)
    try:
        with openslide.OpenSlide(path) as theirs:
            wanted = np.asarray(theirs.read_region((x, y), 0, size))
    except openslide.OpenSlideError:
        wanted = tifffile.imread(path, level=0)[y : y + size[1], x : x + size[0]]
    if "orient" in path.name:  # see test_orientation_is_left_alone
        grey = tifffile.imread(path, level=0)[y : y + size[1], x : x + size[0]]
        wanted = np.repeat(grey[..., None], 3, axis=2)
    # What is transparent is white here, and by OpenSlide the colour that lies below it, or black.
    shown = wanted[..., 3] == 255 if wanted.shape[2] == 4 else np.ones(wanted.shape[:2], bool)
    assert shown.mean() > 0.5
    np.testing.assert_array_equal(got[shown], wanted[shown][:, :3])
