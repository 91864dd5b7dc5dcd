"""µm/px as scanners and exports write it, against OpenSlide where it knows."""

import re
from pathlib import Path

import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.catalog import Catalog
from streaming.catalog.build import build_catalog
from streaming.errors import ConfigError, SlideError
from streaming.slide import open_slide
from streaming.slide.resolution import number, um_of
from tests.dicom_files import Kind, write_series
from tests.tiff_files import RATIONAL, SHORT, TiffSlide, write_tiff
from trainer.embed.options import EmbedOptions, SlideOptions

HEAD = b"Aperio Image Library v12.0.0 \r\n64x64 -> 64x64 (64x64) JPEG/RGB Q=70|AppMag = 20"


def small(path: Path, **facts: object) -> Path:
    return write_tiff(TiffSlide(width=64, height=64, block=(64, 64), **facts), path)  # type: ignore[arg-type]


def both(path: Path) -> tuple[float | None, float | None]:
    """Our µm/px, and the mean of OpenSlide's."""
    with openslide.OpenSlide(path) as slide:
        told = [slide.properties.get(name) for name in ("openslide.mpp-x", "openslide.mpp-y")]
    theirs = None if None in told else sum(float(value or 0) for value in told) / 2
    return open_slide(str(path)).mpp, theirs


@pytest.mark.parametrize(
    ("facts", "mpp"),
    [
        (b"|MPP = 0.5", 0.5),
        (b"|MPP=0,5000", 0.5),
        (b"|MPP\t= 0.5 ", 0.5),
        (b"|MPP = 0.2520|x=1|MPP=0.5", 0.5),
        (b"|MPP = 0.5|MPP = rubbish", None),
        (b"|MPP = 5e-1", 0.5),
        (b"|MPP = +.5", 0.5),
        (b"|MPP = 0.5 um", None),
        (b"|MPP = 1.2.3", None),
        (b"|MPP = 1,234.5", None),
        (b"|MPP = 0_5", None),
        (b"|MPP = -", None),
        (b"|MPP = ", None),
        (b"|MPP", None),
        (b"|mpp = 0.5", None),
        (b"|Comment = a|MPP:0.25|MPP = 0.5", 0.5),
        (b"|Q = MPP = 0.25|MPP = 0.5", 0.5),
        (b"|User = \xcd\xf5\x81\x9d|MPP = 0.5", 0.5),  # GBK
        (b"|User = M\xfcller|MPP = 0.5", 0.5),
        (b"|MPP = 0.5\0|MPP = 0.25", 0.5),
    ],
)
def test_an_aperio_slide_has_the_mpp_that_openslide_has(tmp_path: Path, facts: bytes, mpp: float | None) -> None:
    # A resolution tag beside it says 1 µm/px: it is not this vendor's word.
    tags = ((282, RATIONAL, (10000, 1)), (283, RATIONAL, (10000, 1)), (296, SHORT, (3,)))
    ours, theirs = both(small(tmp_path / "a.svs", description=HEAD + facts, resolution=tags))
    assert ours == theirs == mpp


@given(st.text("0123456789.,eE+- x", max_size=8))
def test_a_number_is_what_openslide_takes_for_one(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "number.svs"
    small(path, description=HEAD + f"|MPP = {text}".encode())
    with openslide.OpenSlide(path) as slide:
        told = slide.properties.get("openslide.mpp-x")
    assert number(text) == pytest.approx(None if told is None else float(told))


@given(st.binary(max_size=12).filter(lambda user: not set(user) & set(b"\0|=")))
def test_what_else_a_description_says_in_whatever_encoding_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, user: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "encoding.svs"
    small(path, downsamples=(1, 4), description=HEAD + b"|User = " + user + b"|MPP = 0.5")
    slide = open_slide(str(path))
    assert (slide.vendor, slide.mpp, slide.level_dimensions) == ("aperio", 0.5, ((64, 64), (16, 16)))


@pytest.mark.parametrize("unit", [None, 0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "values",
    [((20000, 1), (20000, 1)), ((20000, 1), (20800, 1)), ((20000, 1), None), ((0, 0), (0, 0)), ((1, 0), (1, 0))],
)
def test_resolution_tags_say_what_they_say_to_openslide(
    tmp_path: Path, values: tuple[tuple[int, int] | None, ...], unit: int | None
) -> None:
    tags = [(code, RATIONAL, value) for code, value in zip((282, 283), values, strict=True) if value]
    tags += [] if unit is None else [(296, SHORT, (unit,))]
    ours, theirs = both(small(tmp_path / "a.tif", vendor="generic", resolution=tuple(tags)))
    assert ours == pytest.approx(theirs)


OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels {}/></Image></OME>'


def ome_mpp(path: Path, sizes: str, text: str = OME, encoding: str = "utf-8") -> float | None:
    small(path, vendor="ome", description=text.format(sizes).encode(encoding), resolution=(), downsamples=(1, 4))
    slide = open_slide(str(path))
    assert (slide.vendor, len(slide.level_dimensions)) == ("ome", 2)
    return slide.mpp


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        *((unit, "0.5") for unit in ("\u00b5m", "\u03bcm", "um", "UM", "\u00b5", "micron", "Microns", "micrometer")),
        *((unit, "0.5") for unit in ("micrometres", "\u00c2\u00b5m", "\u00ce\u00bcm", "?m", "\\u00B5m", " \u00b5m ")),
        *((unit, "500") for unit in ("nm", "nanometer")),
        *((unit, "0.0005") for unit in ("mm", "millimetre", "Mm")),
        *((unit, "5e-5") for unit in ("cm", "centimeters")),
        *((unit, "5e-7") for unit in ("m", "metre")),
        *((unit, "5000") for unit in ("\u00c5", "\u212b", "angstrom", "\u00c5ngstr\u00f6m")),
        *((unit, f"{0.5 / 25400}") for unit in ("in", "inch", "inches")),
        *((unit, f"{500 / 25400}") for unit in ("thou",)),
        *((unit, "500000") for unit in ("pm",)),
    ],
)
def test_ome_units_are_known_in_every_spelling(tmp_path: Path, unit: str, value: str) -> None:
    sizes = " ".join(f'PhysicalSize{axis}="{value}" PhysicalSize{axis}Unit="{unit}"' for axis in "XY")
    assert ome_mpp(tmp_path / "a.ome.tif", sizes) == pytest.approx(0.5)
    assert ome_mpp(tmp_path / "b.ome.tif", sizes.replace(".", ",")) == pytest.approx(0.5)


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "", "parsec"])
def test_what_is_no_length_is_no_mpp(unit: str) -> None:
    assert um_of(unit) is None


SIZES = 'PhysicalSizeX="0,5" PhysicalSizeY="0.5"'


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (OME, "latin-1"),
        (OME.replace("<", "<ome:").replace("<ome:/", "</ome:").replace("xmlns", "xmlns:ome"), "utf-8"),
        (OME.replace(' xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"', ""), "utf-8"),
        ("<!--" + "x" * 2500 + "-->" + OME, "utf-8"),
        ('\ufeff<?xml version="1.0" encoding="UTF-8"?>' + OME + "\r\n", "utf-8"),
    ],
)
def test_ome_is_known_by_its_root_however_it_is_written(tmp_path: Path, text: str, encoding: str) -> None:
    assert ome_mpp(tmp_path / "a.ome.tif", f'{SIZES} PhysicalSizeXUnit="\u00b5m"', text, encoding) == 0.5


def test_an_ome_slide_whose_xml_tells_no_size_goes_by_its_resolution_tags_as_openslide_does(tmp_path: Path) -> None:
    tags = ((282, RATIONAL, (50800, 1)), (283, RATIONAL, (50800, 1)))
    for number_, sizes in enumerate(("", 'PhysicalSizeX="1" PhysicalSizeXUnit="pixel"')):
        path = small(
            tmp_path / f"{number_}.ome.tif", vendor="ome", description=OME.format(sizes).encode(), resolution=tags
        )
        assert both(path) == (0.5, 0.5)


@pytest.mark.parametrize(("written", "mpp"), [(b"0,0005", 0.5), (b"rubbish", None), (b"      ", None)])
def test_a_dicom_slide_s_spacing_is_read_in_the_same_way(
    tmp_path: Path, slides: list[Path], written: bytes, mpp: float | None
) -> None:
    for path in write_series(tmp_path, slides[0], Kind(mpp=(0.123, 0.123), associated=False)):
        content = path.read_bytes()
        spacing = re.compile(rb"0\.000123|0\.000492")
        assert spacing.search(content)
        path.write_bytes(spacing.sub(lambda found: written.ljust(len(found[0])), content))
    assert open_slide(str(path)).mpp == mpp


@pytest.mark.usefixtures("in_this_process")
def test_an_mpp_that_no_microscope_has_is_told_with_its_number_and_can_be_given(tmp_path: Path) -> None:
    path = write_tiff(TiffSlide(width=1024, height=768, mpp=28.97), tmp_path / "a.svs")
    with pytest.raises(SlideError, match=r"a.svs: its metadata says 28.97 µm/px, which is no microscope's; pass it"):
        open_slide(str(path)).read_tile(0, 0, 0.5, 64)
    with pytest.raises(Exception, match=r"says 28.97 µm/px, which is no microscope's; give it by --slide-mpp"):
        build_catalog([str(path)], str(tmp_path / "catalog"))
    build_catalog([str(path)], str(tmp_path / "catalog"), mpp=0.5)
    (row,) = Catalog.load(str(tmp_path / "catalog")).to_arrow().to_pylist()
    assert (row["mpp"], row["own_mpp"], row["mpp_from"]) == (0.5, None, "--slide-mpp")


@pytest.mark.parametrize("given_mpp", [0.0, -0.5, 352.8, float("nan")])
def test_an_mpp_that_no_microscope_has_can_t_be_given(tmp_path: Path, given_mpp: float) -> None:
    with pytest.raises(ConfigError, match=r"µm per pixel, a number from 0\.02 to 20"):
        build_catalog([str(tmp_path)], str(tmp_path / "catalog"), mpp=given_mpp)
    for options in (EmbedOptions, SlideOptions):
        with pytest.raises(ConfigError, match=r"slide_mpp .* µm per pixel"):
            options(slide_mpp=given_mpp)


@pytest.mark.usefixtures("in_this_process")
def test_the_catalog_says_whose_word_each_mpp_is(tmp_path: Path) -> None:
    for name, mpp in (("own", 0.25), ("odd", 28.97), ("none", None), ("told", None)):
        write_tiff(TiffSlide(width=1024, height=768, mpp=mpp), tmp_path / f"{name}.svs")
    (tmp_path / "m.csv").write_text("slide;mpp\ntold;0,25\n")
    build_catalog([str(tmp_path)], str(tmp_path / "catalog"), mpp=0.5, metadata_csv=str(tmp_path / "m.csv"))
    rows = Catalog.load(str(tmp_path / "catalog")).to_arrow().to_pylist()
    found = {Path(row["slide"]).stem: (row["mpp"], row["mpp_from"]) for row in rows}
    assert found == {
        "own": (0.25, "metadata"),
        "odd": (0.5, "--slide-mpp"),
        "none": (0.5, "--slide-mpp"),
        "told": (0.25, "table"),
    }
