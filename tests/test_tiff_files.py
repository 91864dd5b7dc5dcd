"""The maker of test slides makes what it says: OpenSlide and tifffile are the judges."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from tests.tiff_files import LABEL_COLOUR, MACRO_COLOUR, TiffSlide, level_pixels, tiff_bytes, write_tiff

PLAIN = ("jpeg", "jpeg-rgb", "lzw", "deflate", "none")
JPEG_2000 = ("jp2k-ycbcr", "jp2k-rgb")
# OpenSlide names the format of philips-tiff by its vendor.
VENDORS = {"aperio": "aperio", "generic": "generic-tiff", "ome": "generic-tiff", "philips": "philips"}
# Mean grey levels that compression may cost at the quality used here.
LOSS = {"jpeg": 5.0, "jpeg-rgb": 3.0, "jp2k-ycbcr": 3.0, "jp2k-rgb": 1.0}


def read_level(slide: openslide.OpenSlide, level: int) -> np.ndarray:
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[:, :, :3]


def assert_shows(slide: TiffSlide, path: Path) -> None:
    assert openslide.OpenSlide.detect_format(path) == VENDORS[slide.vendor]
    with openslide.OpenSlide(path) as opened:
        # OpenSlide 4.0 knows nothing of SubIFDs.
        wanted = slide.level_dimensions[:1] if slide.vendor == "ome" else slide.level_dimensions
        assert opened.level_dimensions == wanted
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        for level in range(opened.level_count):
            off = np.abs(read_level(opened, level).astype(int) - level_pixels(slide, level))
            assert off.mean() <= LOSS.get(slide.compression, 0)


@pytest.mark.parametrize("compression", PLAIN)
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(("bigtiff", "byte_order"), [(False, "<"), (True, "<"), (True, ">")])
def test_openslide_opens_every_container_and_sees_the_pixels(
    tmp_path: Path, vendor, compression, bigtiff: bool, byte_order
) -> None:
    slide = TiffSlide(
        vendor=vendor,
        compression=compression,
        bigtiff=bigtiff,
        byte_order=byte_order,
        predictor=compression in ("lzw", "deflate") and bigtiff,
        shared_tables=not bigtiff,
        block=(256, 128),
        downsamples=(1, 2),
        shuffled=True,
        gap=7,
    )
    assert_shows(slide, write_tiff(slide, tmp_path / "slide.tif"))


@pytest.mark.parametrize("compression", PLAIN)
def test_openslide_refuses_big_endian_classic_tiff_and_tifffile_reads_it(tmp_path: Path, compression) -> None:
    slide = TiffSlide(byte_order=">", compression=compression, downsamples=(1, 2))
    path = write_tiff(slide, tmp_path / "slide.svs")
    # It reads the offset of the first directory as 8 bytes (seen with 4.0.1); also of a file by tifffile.
    assert openslide.OpenSlide.detect_format(path) is None
    with tifffile.TiffFile(path) as tiff:
        for level, page in enumerate(tiff.pages):
            off = np.abs(page.asarray().astype(int) - level_pixels(slide, level))
            assert off.mean() <= LOSS.get(compression, 0)


@pytest.mark.parametrize(("block", "opens"), [((32, 32), True), ((64, 48), True), ((48, 48), False)])
def test_openslide_reads_uncompressed_blocks_of_multiples_of_1024_bytes_only(tmp_path: Path, block, opens) -> None:
    path = write_tiff(TiffSlide(block=block, compression="none"), tmp_path / "slide.svs")
    with tifffile.TiffFile(path) as tiff:
        np.testing.assert_array_equal(tiff.pages[0].asarray(), level_pixels(TiffSlide(), 0))
    with openslide.OpenSlide(path) as slide:
        if opens:
            read_level(slide, 0)
        else:
            # The libtiff of openslide-bin 4.0.1 compares with a buffer rounded up; also for a file by tifffile.
            with pytest.raises(openslide.OpenSlideError, match="Invalid tile byte count"):
                read_level(slide, 0)


@pytest.mark.parametrize("compression", JPEG_2000)
def test_openslide_reads_jpeg_2000_in_aperio_slides_and_refuses_it_elsewhere(tmp_path: Path, compression) -> None:
    slide = TiffSlide(compression=compression, downsamples=(1, 4))
    assert_shows(slide, write_tiff(slide, tmp_path / "slide.svs"))
    for vendor in ("generic", "ome", "philips"):
        path = write_tiff(TiffSlide(compression=compression, vendor=vendor), tmp_path / f"{vendor}.tif")
        with pytest.raises(openslide.OpenSlideError, match="Unsupported TIFF compression"):
            openslide.OpenSlide(path)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("shared_tables", [True, False])
def test_openslide_reads_every_chroma_subsampling(tmp_path: Path, subsampling, shared_tables: bool) -> None:
    slide = TiffSlide(subsampling=subsampling, shared_tables=shared_tables)
    assert_shows(slide, write_tiff(slide, tmp_path / "slide.svs"))
    with tifffile.TiffFile(tmp_path / "slide.svs") as tiff:
        assert (tiff.pages[0].jpegtables is not None) == shared_tables
        assert tiff.pages[0].subsampling == subsampling


def test_levels_are_cut_like_a_scanner_s(tmp_path: Path) -> None:
    slide = TiffSlide(width=4443, height=180, downsamples=(1, 2, 8), compression="lzw", tissue=False)
    assert slide.level_dimensions == ((4443, 180), (2221, 90), (555, 22))
    assert_shows(slide, write_tiff(slide, tmp_path / "slide.svs"))


def test_ome_levels_lie_in_subifds(tmp_path: Path) -> None:
    slide = TiffSlide(vendor="ome", compression="deflate", downsamples=(1, 2, 4))
    with tifffile.TiffFile(write_tiff(slide, tmp_path / "slide.ome.tif")) as tiff:
        assert tiff.is_ome
        assert len(tiff.pages) == 1
        for level, found in enumerate(tiff.series[0].levels):
            np.testing.assert_array_equal(found.asarray(), level_pixels(slide, level))


def test_label_and_macro_have_their_marker_colours(tmp_path: Path) -> None:
    path = write_tiff(TiffSlide(associated=True, downsamples=(1, 2)), tmp_path / "slide.svs")
    with openslide.OpenSlide(path) as opened:
        for name, colour in (("label", LABEL_COLOUR), ("macro", MACRO_COLOUR)):
            assert np.asarray(opened.associated_images[name].convert("RGB"))[5, 5].tolist() == list(colour)


@pytest.mark.parametrize("vendor", ["aperio", "generic"])
def test_empty_blocks_are_black_and_shared_blocks_repeat(tmp_path: Path, vendor) -> None:
    slide = TiffSlide(vendor=vendor, compression="none", empty=((0, 1),), shared=((0, 3, 0),))
    with openslide.OpenSlide(write_tiff(slide, tmp_path / "slide.tif")) as opened:
        pixels = read_level(opened, 0)
    assert not pixels[:256, 256:512].any()
    np.testing.assert_array_equal(pixels[256:, :256], level_pixels(slide, 0)[: 500 - 256, :256])


def test_equal_slides_are_equal_bytes() -> None:
    assert tiff_bytes(TiffSlide(shuffled=True)) == tiff_bytes(TiffSlide(shuffled=True))
