"""DICOM slides by their frames: pixels, series, what is asked of the storage, and what is told of broken ones."""

import re
import shutil
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
from pydicom import DataElement, config, dcmread

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.sources import find_slides
from streaming.counters import Counters
from streaming.errors import CatalogError, SlideError
from streaming.slide import Slide, open_slide
from streaming.storage.staging import Staging
from tests.conftest import write_catalog
from tests.dicom_files import PATIENT, Kind, write_series

REAL = Path(__file__).parents[4] / "shared/data/dicom"
OTHERS = {"hd_seg_image_sm_dots.dcm": "SEG", "hd_sr_document.dcm": "SR", "hd_ct_image.dcm": "CT"}
OF_OPENSLIDE = {
    "as the converter writes it": Kind(),
    "BigTIFF": Kind(tables="big tiff"),
    "basic table": Kind(tables="basic"),
    "extended table": Kind(tables="extended"),
    "no table": Kind(tables="none"),
    "sparse": Kind(sparse=True),
    "sparse, no TIFF": Kind(sparse=True, tables="basic"),
    "three parts": Kind(parts=3),
    "sparse in three parts": Kind(parts=3, sparse=True, tables="none"),
    "a colour profile": Kind(icc_nbytes=141_992),
    "uncompressed": Kind(codec="none"),
    "JPEG of RGB": Kind(codec="jpeg", photometric="RGB"),
    "JPEG 2000": Kind(codec="jpeg2000"),
    "JPEG 2000, ICT": Kind(codec="jpeg2000", photometric="YBR_ICT"),
    "JPEG 2000, RCT": Kind(codec="jpeg2000", photometric="YBR_RCT"),
}
OF_OURS = {
    "HTJ2K": Kind(codec="htj2k"),
    "JPEG-LS": Kind(codec="jpegls"),
    "the first of two focal planes": Kind(codec="none", planes=2),
    "grey": Kind(codec="none", photometric="MONOCHROME2"),
    "grey JPEG 2000": Kind(codec="jpeg2000", photometric="MONOCHROME2"),
    "grey JPEG-LS": Kind(codec="jpegls", photometric="MONOCHROME2"),
}


def assert_same_pixels(slide: Slide, oracle: openslide.OpenSlide) -> None:
    for level in range(len(slide.level_dimensions)):
        for location in ((500, 300), (1900, 1400), (-40, -32), (0, 0)):
            wanted = np.asarray(oracle.read_region(location, level, (200, 180)))[:, :, :3]
            assert np.array_equal(slide.read_region(location, level, (200, 180)), wanted), (level, location)


@pytest.mark.parametrize("kind", OF_OPENSLIDE.values(), ids=OF_OPENSLIDE)
def test_the_pixels_equal_openslides(kind: Kind, slides: list[Path], tmp_path: Path) -> None:
    first = write_series(tmp_path, slides[0], kind)[0]
    slide = open_slide(str(first))
    with openslide.OpenSlide(first) as oracle:
        assert (slide.backend, slide.vendor, slide.uri) == ("blocks", "dicom", str(first))
        assert slide.level_dimensions == oracle.level_dimensions
        assert slide.mpp == pytest.approx(float(oracle.properties["openslide.mpp-x"]))
        assert_same_pixels(slide, oracle)


def test_a_series_is_opened_by_a_name_in_the_folder_that_one_is_in(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_series(tmp_path, slides[0], next(iter(OF_OPENSLIDE.values())))[0]
    monkeypatch.chdir(first.parent)
    there, here = open_slide(str(first)), open_slide(first.name)
    assert np.array_equal(here.read_region((500, 300), 0, (9, 9)), there.read_region((500, 300), 0, (9, 9)))


@pytest.mark.parametrize("kind", OF_OURS.values(), ids=OF_OURS)
def test_what_openslide_refuses_has_the_pixels_that_were_written(
    kind: Kind, slides: list[Path], tmp_path: Path
) -> None:
    first = write_series(tmp_path, slides[0], kind)[0]
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(first)
    slide, source = open_slide(str(first)), open_slide(str(slides[0]))
    for level in range(2):
        wanted = source.read_region((500, 300), level, (300, 200))
        wanted = np.repeat(wanted[:, :, 1:2], 3, axis=2) if kind.photometric == "MONOCHROME2" else wanted
        assert np.array_equal(slide.read_region((500, 300), level, (300, 200)), wanted)
    assert ("further focal planes" in slide.left_out) == (kind.planes > 1)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_of_frames_with_positions_those_of_the_first_focal_plane_are_shown(
    parts: int, slides: list[Path], tmp_path: Path
) -> None:
    kind = Kind(codec="none", sparse=True, parts=parts)
    one = write_series(tmp_path / "one", slides[0], kind)[0]
    slide = open_slide(str(write_series(tmp_path / "two", slides[0], replace(kind, planes=2))[0]))
    with openslide.OpenSlide(one) as oracle:
        assert_same_pixels(slide, oracle)
    assert "further focal planes" in slide.left_out


def broken(folder: Path, what: str) -> tuple[Path, str]:
    """Breaks a series; gives the file that must be named."""
    first, second, *_ = sorted(folder.glob("*"), key=lambda path: -path.stat().st_size)
    content = bytearray(first.read_bytes())
    pixels = content.index(b"\xe0\x7f\x10\x00OB\0\0") + 12
    item = pixels + 8 + int.from_bytes(content[pixels + 4 : pixels + 8], "little")
    match what:
        case "the last frames cut off":
            del content[len(content) * 2 // 3 :]
        case "the header cut off":
            del content[pixels - 30 :]
        case "an entry that lies beyond the file":
            content[pixels + 12 : pixels + 16] = b"\xff\xff\xff\x7f"
        case "an entry too few":
            content[pixels + 4 : pixels + 8] = (47 * 4).to_bytes(4, "little")
        case "an entry within its neighbour":
            content[pixels + 16 : pixels + 20] = content[pixels + 12 : pixels + 16]
        case "no items":
            content[item : item + 4] = bytes(4)
        case "items within an item" | "an item without length":
            content[item + 4 : item + 8] = b"\xff\xff\xff\xff"
        case "pixels without end":
            content[-8:-4] = b"\xfe\xff\x00\xe0"
        case "the first level missing":
            first.unlink()
            return second, second.name
        case "two versions of a level":
            uid = content.index(b"UI", content.index(b"\x08\x00\x18\x00")) + 4
            content[uid + 20] ^= 1
            (folder / "older").write_bytes(content)
            return first, "older|" + first.name
        case "a frame of another size":
            frame = content.index(b"\xff\xc0\x00\x11\x08")
            content[frame + 5 : frame + 7] = (128).to_bytes(2)
    first.write_bytes(content)
    return first, first.name


BROKEN = [
    (Kind(tables="none"), "the last frames cut off", r"frame \d+: .* of \d+"),
    (Kind(), "the last frames cut off", r"frame \d+: .*(of a file of|no item)|the pixels end"),
    (Kind(codec="none", tables="none"), "the last frames cut off", r"bytes of pixels for 48 frames of 196,608"),
    (Kind(tables="basic"), "the header cut off", "makes no sense"),
    (Kind(tables="basic"), "an entry that lies beyond the file", r"frame \d+: .*"),
    (Kind(tables="basic"), "an entry within its neighbour", r"frame 2: its offset .* makes no sense"),
    (Kind(tables="none"), "no items", "frame 0: no item at"),
    (Kind(tables="none"), "an item without length", "frame 0: no item at"),
    (Kind(tables="none"), "pixels without end", "frame 48: one more item than frames of 48"),
    (Kind(), "the first level missing", "resampled from a finer level that is missing"),
    (Kind(), "two versions of a level", "another picture of 2048 × 1536 px"),
    (
        Kind(tables="none"),
        "a frame of another size",
        r"level 0, block 0 at byte .*it is of 256 × 128 px, not 256 × 256",
    ),
    (Kind(changes=(("NumberOfFrames", 47),)), "", r"47 frames|48 offsets .* for 47 frames"),
    (
        Kind(tables="extended", changes=(("ExtendedOffsetTableLengths", None),)),
        "",
        "48 offsets and 0 lengths .* for 48 f",
    ),
    (Kind(tables="basic"), "an entry too few", "47 offsets in the basic table for 48 frames"),
    (Kind(tables="none", changes=(("TotalPixelMatrixRows", 3000),)), "", r"48 frames for \d+ places"),
    (Kind(sparse=True, changes=(("Rows", 250),)), "", r"frame \d+: at pixel .* no place of its own"),
    (Kind(mpp=(0.25, 0.5)), "", "pixels of 0.25 × 0.5 µm are not square"),
    (Kind(codec="none", changes=(("PlanarConfiguration", 1),)), "", "bits of RGB in planes in transfer syntax"),
    (Kind(changes=(("BitsStored", 12),)), "", r"3 × 12 bits of RGB|3 × 12 bits of YBR_FULL_422"),
    (Kind(changes=(("PhotometricInterpretation", "PALETTE COLOR"),)), "", "bits of PALETTE COLOR in transfer syntax"),
    (Kind(changes=(("SharedFunctionalGroupsSequence", None),)), "", "no mpp in its metadata"),
    (Kind(mpp=(0.0, 0.0)), "", "its metadata says 0 µm/px, which is no microscope's"),
]


@pytest.mark.parametrize(("kind", "what", "told"), BROKEN, ids=[f"{k.tables} {w or told}" for k, w, told in BROKEN])
def test_a_broken_series_is_one_error_that_names_object_and_frame(
    kind: Kind, what: str, told: str, slides: list[Path], tmp_path: Path
) -> None:
    paths = write_series(tmp_path, slides[0], replace(kind, associated=False))
    path, named = broken(tmp_path, what) if what else (paths[0], paths[0].name)
    with pytest.raises(SlideError, match=told) as caught:
        open_slide(str(path)).read_tile(0, 0, 0.25, 64)
    assert "metadata" in told or re.search(named, str(caught.value))
    assert "Doe" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pydicom_tells_nobody_what_it_read_and_is_left_as_it_was(
    slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """A damaged header has a name for a character set; pydicom's settings are those of the whole program."""
    caplog.set_level("DEBUG")
    kind = Kind(changes=(("SpecificCharacterSet", "ISO_IR 192"),))
    paths = write_series(tmp_path, slides[0], kind)
    for path in paths[:2]:
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 192", b"Doe^Jane99"))
    caplog.clear()
    recwarn.clear()
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert {slide.mpp for slide in pool.map(lambda _: open_slide(str(paths[0])), range(16))} == {0.25}
    assert not caplog.records
    assert not recwarn.list
    assert list(warnings.filters) == filters
    with pytest.warns(UserWarning, match="Doe"):
        str(dcmread(paths[0]).PatientName)
    with pytest.warns(UserWarning, match="exceeds the maximum length"):
        DataElement("PixelSpacing", "DS", "1.23456789012345678901", config.settings.reading_validation_mode)
    assert "Doe" in caplog.text


@pytest.mark.parametrize("name", ["google_jpeg", "google_jpeg2000", "google_raw"])
def test_real_series_have_openslides_pixels(name: str) -> None:
    path = REAL / f"{name}.dicom"
    slide = open_slide(str(path))
    with openslide.OpenSlide(path) as oracle:
        assert slide.level_dimensions == oracle.level_dimensions
        assert slide.mpp == pytest.approx(16.783)
        for location in ((0, 0), (500, 300), (800, 600)):
            wanted = np.asarray(oracle.read_region(location, 0, (300, 200)))[:, :, :3]
            assert np.array_equal(slide.read_region(location, 0, (300, 200)), wanted)


def test_a_real_jpeg_ls_series_has_the_pixels_of_the_same_picture_in_raw() -> None:
    ours, raw = (open_slide(str(REAL / f"hd_sm_image{name}.dcm")) for name in ("_jpegls", ""))
    assert ours.level_compressions() == ["JPEGLS"]
    assert np.array_equal(ours.read_region((0, 0), 0, (50, 50)), raw.read_region((0, 0), 0, (50, 50)))


@pytest.fixture(scope="module")
def many(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five series, with what may lie beside them."""
    folder = tmp_path_factory.mktemp("many")
    for number, suffix in enumerate((".dcm", ".DCM", ".dicom", "", ".123")):
        paths = write_series(folder, slides[number % 3], Kind(number=number, suffix=suffix))
        if suffix == ".dicom":
            paths[1].rename(folder / f".{paths[1].name}")
    for name in OTHERS:
        shutil.copy(REAL / name, folder)
    (folder / "._a.dcm").write_bytes(b"\0\5\x16\7")
    (folder / "notes").write_text("nothing")
    (folder / "empty").touch()
    shutil.copy(slides[0], folder / "a.svs")
    return folder


def test_a_folder_of_five_series_is_five_slides_whatever_lies_beside_them(many: Path) -> None:
    skipped: dict[str, str] = {}
    found = find_slides([str(many)], None, skipped)
    assert len(found) == 6
    assert [len(info.files) for info in found if not info.uri.endswith(".svs")] == [2] * 5
    for info in found:
        slide = open_slide(info.uri, expected=info)
        assert (slide.uri, slide.level_dimensions) == (info.uri, ((2048, 1536), (512, 384)))
    kinds = {f"DICOM {kind}": 1 for kind in OTHERS.values()}
    assert Counter(skipped.values()) == kinds | {"._ files of macOS": 1, "without suffix": 2}


def test_a_series_is_one_slide_whichever_of_its_objects_are_named(many: Path, slides: list[Path]) -> None:
    paths = write_series(many.parent / "one", slides[0])
    (whole,) = find_slides([str(many.parent / "one")], None)
    assert whole.uri == str(paths[0])
    assert find_slides([*map(str, paths)], None) == [whole]
    assert find_slides([str(paths[-1])], None) == [whole]
    assert open_slide(str(paths[-1])).uri == str(paths[0])
    with pytest.raises(CatalogError, match="none of its 1 files is a slide: 1 DICOM SEG"):
        find_slides([str(many / "hd_seg_image_sm_dots.dcm")], None)
    with pytest.raises(SlideError, match="no slide, but DICOM of kind SEG"):
        open_slide(str(many / "hd_seg_image_sm_dots.dcm"))


def test_a_folder_of_one_series_is_opened_as_its_slide_here_and_in_a_bucket(
    many: Path, s3_bucket: str, slides: list[Path], tmp_path: Path
) -> None:
    paths = write_series(tmp_path / "one", slides[0])
    for path in paths:
        storage.write_bytes(f"{s3_bucket}/folder/one/{path.name}", path.read_bytes())
    wanted = open_slide(str(slides[0])).read_region((300, 200), 0, (50, 40))
    for folder in (tmp_path / "one", f"{tmp_path}/one/", f"{s3_bucket}/folder/one/", f"{s3_bucket}/folder/one/*"):
        slide = open_slide(str(folder))
        assert slide.uri == f"{str(folder).rstrip('*').rstrip('/')}/{paths[0].name}"
        np.testing.assert_array_equal(slide.read_region((300, 200), 0, (50, 40)), wanted)
    mirrored = open_slide("s3://idc-open-data/one/*", {"mirrors": {"s3://idc-open-data": str(tmp_path)}})
    assert mirrored.uri == f"s3://idc-open-data/one/{paths[0].name}"
    with pytest.raises(SlideError, match=r"many0: a folder with 5 DICOM series of slides; name a file of"):
        open_slide(str(many))
    with pytest.raises(SlideError, match="a folder with 0 DICOM series"):
        open_slide(f"{s3_bucket}/nowhere/")


def test_a_series_on_s3_is_catalogued_and_read_where_it_lies(
    s3_bucket: str, slides: list[Path], tmp_path: Path
) -> None:
    kind = Kind(parts=2, icc_nbytes=141_992)
    paths = write_series(tmp_path / "series", slides[0], kind)
    for path in paths:
        storage.write_bytes(f"{s3_bucket}/series/{path.name}", path.read_bytes())
    uri = f"{s3_bucket}/series/{paths[0].name}"
    (info,) = find_slides([f"{s3_bucket}/series"], None)
    assert info.uri == uri
    staging = Staging(folder=str(tmp_path / "staged"))
    catalog = Catalog.load(write_catalog(tmp_path / "catalog", [uri], staging=staging))
    slide, source = catalog.open_slide(0, None, staging), open_slide(str(slides[0]))
    assert (catalog[0].backend, slide.uri) == ("blocks", uri)
    for at in ((700, 500), (1500, 1100)):
        for mpp in (0.25, 0.5, 1.0, 2.0):
            assert np.array_equal(slide.read_tile(*at, mpp, 128), source.read_tile(*at, mpp, 128))
    assert not Path(staging.folder).exists()
    content = b"".join(path.read_bytes() for path in (tmp_path / "catalog").rglob("*") if path.is_file())
    assert PATIENT.encode() not in content
    storage.write_bytes(f"{s3_bucket}/series/{paths[1].name}", paths[1].read_bytes() + b"\0\0")
    with pytest.raises(SlideError, match=rf"{paths[1].name}: changed since it was catalogued"):
        slide.read_region((0, 1300), 0, (200, 200))


def test_a_tile_takes_the_requests_of_the_same_slide_as_svs(slides: list[Path], tmp_path: Path) -> None:
    both = [open_slide(str(path)) for path in (slides[0], write_series(tmp_path, slides[0])[0])]
    random = np.random.default_rng(0)
    for x, y in random.integers(0, 1200, (20, 2)).tolist():
        counts = Counters(), Counters()
        for slide, count in zip(both, counts, strict=True):
            slide.begin_tile(x, y, 0.25, 256, count=count).fill(np.empty((256, 256, 3), np.uint8))
        assert counts[0].requests == counts[1].requests
        assert counts[0].blocks == counts[1].blocks


@pytest.mark.parametrize("kind", [Kind(icc_nbytes=141_992), Kind(tables="extended"), Kind(tables="basic")], ids=str)
def test_a_level_takes_four_requests_and_little_more_than_its_tables(
    kind: Kind, slides: list[Path], tmp_path: Path
) -> None:
    write_series(tmp_path, slides[0], kind)
    (info,) = find_slides([str(tmp_path)], None)
    count = Counters()
    open_slide(info.uri, expected=info, count=count)
    assert count.requests + len(info.files) <= 4 * len(info.files)  # one of each to sort the folder's files
    assert count.nbytes < 2 * (kind.icc_nbytes + 4 * 2**14)
