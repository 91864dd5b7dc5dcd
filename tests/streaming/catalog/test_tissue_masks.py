"""Tissue masks of other programs: a file a slide, in place of our own rule or within it."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from streaming import open_slide
from streaming.catalog import Catalog
from streaming.catalog.geojson import Shape
from streaming.catalog.masks import MaskOptions, find_masks
from streaming.catalog.painting import coverage
from streaming.errors import ConfigError
from tests.qupath import feature
from tests.tiff_files import TiffSlide, write_tiff
from trainer.cli import main

CELL = 256  # level-0 px of the made slides, which are 2048 × 1536 at 0.25 µm/px: 8 × 6 cells


pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    (tmp_path / "masks").mkdir()
    return tmp_path / "masks"


def save(path: Path, features: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def fractions(out: Path, row: int = 0) -> np.ndarray:
    return Catalog.load(str(out)).tissue_grid(row).fraction / 255


def shares(area: Any, rows: int = 6, columns: int = 8, cell: float = CELL) -> np.ndarray:
    """Share of each cell that an area covers, by shapely."""
    y, x = np.mgrid[:rows, :columns] * cell
    return shapely.area(shapely.intersection(area, shapely.box(x, y, x + cell, y + cell))) / cell**2


def contour(area: Any, **properties: Any) -> dict[str, Any]:
    """A feature as geopandas writes it for TRIDENT."""
    return {"type": "Feature", "properties": properties, "geometry": shapely.geometry.mapping(area)}


def catalog(*arguments: object) -> int:
    return main(["catalog", *map(str, arguments)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 75), st.integers(0, 75), st.integers(5, 30)), min_size=1, max_size=5))
def test_covered_pixels_are_those_of_shapely(circles: list[tuple[int, int, int]]) -> None:
    whole, counted = shapely.MultiPolygon(), list[tuple[Shape, bool]]()
    for i, (x, y, radius) in enumerate(circles):
        area = shapely.Point(x, y).buffer(radius).difference(shapely.Point(x, y).buffer(radius / 3))
        counts = i % 3 != 2
        whole = whole.union(area) if counts else whole.difference(area)
        counted.append((Shape(name="t", area=shapely.MultiPolygon([area])), counts))
    off = np.abs(coverage(counted, 60, 56, 0.75) / 255 - shares(whole, 60, 56, 1 / 0.75))
    assert off.max() < 0.5  # where shapes meet
    assert off.mean() < 0.02


def test_trident_s_contours_tell_tissue_without_their_holes(slides: list[Path], masks: Path, tmp_path: Path) -> None:
    first = shapely.Point(700, 700).buffer(500).difference(shapely.box(600, 600, 900, 800))
    second = shapely.box(1500, 100, 1900, 400)
    save(masks / "patient0.geojson", [contour(first, tissue_id=0), contour(second, tissue_id=1)])
    assert catalog(slides[0], "--out", tmp_path / "out", "--masks", masks) == 0
    assert np.abs(fractions(tmp_path / "out") - shares(first.union(second))).max() < 0.045


def test_qupath_s_classes_are_included_and_excluded(slides: list[Path], masks: Path, tmp_path: Path) -> None:
    tumour, stroma, pen, ignored = (
        shapely.box(0, 0, 1000, 1000),
        shapely.box(1000, 0, 2000, 1000),
        shapely.box(300, 300, 1500, 700),
        shapely.box(0, 900, 2000, 1000),
    )
    named = {"Tumor": tumour, "Stroma": stroma, "Pen": pen, "Ignore*": ignored}
    features = [feature(shapely.geometry.mapping(area), name) for name, area in named.items()]
    save(masks / "patient0.svs.geojson", features)  # as QuPath calls it by default
    command = (slides[0], "--out", tmp_path / "out", "--masks", masks)
    for options, wanted in (
        ((), tumour.union(stroma).union(pen).difference(ignored)),
        (("--masks-exclude", "Pen"), tumour.union(stroma).difference(pen).difference(ignored)),
        (("--masks-include", "Tumor"), tumour.difference(ignored)),
        (("--masks-include", "Tumor", "--masks-exclude", "Pen"), tumour.difference(pen).difference(ignored)),
    ):
        assert catalog(*command, *options) == 0  # also when only the rule is another than before
        assert np.abs(fractions(tmp_path / "out") - shares(wanted)).max() < 0.045


@pytest.mark.parametrize("kind", ["shapes", "image"])
def test_a_class_that_a_mask_has_not_is_told_with_those_that_it_has(
    slides: list[Path], masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    wrong, there = ("Tumour", "Stroma, Tumor") if kind == "shapes" else ("7", "0, 3")
    if kind == "shapes":
        box = shapely.geometry.mapping(shapely.box(0, 0, 1000, 1000))
        save(masks / "patient0.geojson", [feature(box, "Tumor"), feature(box, "Stroma")])
    else:
        Image.fromarray(np.repeat(np.uint8([[0, 3]] * 150), 100, axis=1)).save(masks / "patient0.png")
    assert catalog(slides[0], "--out", tmp_path / "out", "--masks", masks, "--masks-include", wrong) == 2
    assert f": --masks-include names {wrong}, it has {there}" in capsys.readouterr().err


def test_a_class_that_no_mask_has_is_told_though_others_count(
    slides: list[Path], masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = {"Tumor": shapely.box(0, 0, 1000, 1000), "Pen": shapely.box(300, 300, 700, 700)}
    shapes = [feature(shapely.geometry.mapping(area), name) for name, area in boxes.items()]
    save(masks / "patient0.geojson", shapes)
    save(masks / "patient1.geojson", shapes[:1])
    Image.fromarray(np.repeat(np.uint8([[0, 3]] * 150), 100, axis=1)).save(masks / "patient2.png")
    command = (*slides[:2], "--out", tmp_path / "out", "--masks", masks)
    assert catalog(*command, "--masks-include", "Tumor", "--masks-exclude", "Penn", "--masks-exclude", "Ignore*") == 0
    assert "no mask has Penn; they have Pen, Tumor: spell it so" in capsys.readouterr().err
    assert catalog(*command, "--masks-exclude", "Pen") == 0  # one of the two has it
    assert "no mask has" not in capsys.readouterr().err
    assert (
        catalog(
            slides[2], "--out", tmp_path / "image", "--masks", masks, "--masks-exclude", "07", "--masks-exclude", "03"
        )
        == 0
    )
    assert "no mask has 07; they have 0, 3: spell it so" in capsys.readouterr().err


def test_qupath_counts_from_what_was_scanned_trident_from_the_slide_s_corner(masks: Path, tmp_path: Path) -> None:
    # OpenSlide tells bounds where the first blocks of a generic TIFF are empty.
    empty = tuple((0, i) for i in range(5))
    path = write_tiff(
        TiffSlide(vendor="generic", width=1024, height=768, compression="deflate", empty=empty), tmp_path / "a.tif"
    )
    left, top, width, height = open_slide(str(path)).bounds
    assert (left, top) != (0, 0)
    box = shapely.box(left, top, left + width, top + height)
    drawn = shapely.box(100, 50, 400, 300)
    for name, entry, at in (
        ("qupath", feature(shapely.geometry.mapping(drawn), "Tissue"), shapely.affinity.translate(drawn, left, top)),
        ("trident", contour(shapely.box(0, 0, 700, 500), tissue_id=0), shapely.box(0, 0, 700, 500)),
    ):
        save(masks / "a.geojson", [entry])
        assert catalog(path, "--out", tmp_path / name, "--masks", masks, "--slide-mpp", "0.25") == 0
        assert np.abs(fractions(tmp_path / name) - shares(at.intersection(box), 3, 4)).max() < 0.07


@pytest.mark.parametrize("size", [(2048, 1536), (333, 250), (41, 31)])
def test_histoqc_s_image_tells_tissue_at_any_scale(
    slides: list[Path], masks: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    image = Image.new("L", size)
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2 - 1, size[1] - 1), fill=255)
    (masks / "patient0.svs").mkdir()
    image.save(masks / "patient0.svs/patient0.svs_mask_use.png")
    image.convert("RGB").save(masks / "patient0.svs/patient0.svs_thumb.png")
    assert catalog(slides[0], "--out", tmp_path / "out", "--masks", masks) == 0
    assert np.abs(fractions(tmp_path / "out") - shares(shapely.box(0, 0, 1024, 1536))).max() < 0.25
    assert fractions(tmp_path / "out").sum() == pytest.approx(24, abs=0.7)
    # Within it, what our own rule finds counts.
    plain, within = tmp_path / "plain", tmp_path / "within"
    assert catalog(slides[0], "--out", plain) == 0
    assert catalog(slides[0], "--out", within, "--masks", masks, "--masks-within") == 0
    assert np.abs(fractions(within)[:, :3] - fractions(plain)[:, :3]).max() == 0
    assert not fractions(within)[:, 5:].any()


def test_the_classes_of_an_image_must_be_named(
    slides: list[Path], masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.full((150, 200), 7, np.uint8)  # GrandQC's background
    values[:, :100], values[:50, :100] = 1, 4
    Image.fromarray(values).save(masks / "patient0.svs_mask.png")
    out = tmp_path / "out"
    assert catalog(slides[0], "--out", out, "--masks", masks) == 2
    assert "values 1, 4, 7; say which are tissue by --masks-include" in capsys.readouterr().err
    assert catalog(slides[0], "--out", out, "--masks", masks, "--masks-include", "1") == 0
    assert np.abs(fractions(out) - shares(shapely.box(0, 512, 1024, 1536))).max() < 0.02
    assert catalog(slides[0], "--out", out, "--masks", masks, "--masks-exclude", "7") == 0
    assert np.abs(fractions(out) - shares(shapely.box(0, 0, 1024, 1536))).max() < 0.02
    assert catalog(slides[0], "--out", tmp_path / "x", "--masks", masks, "--masks-include", "pen") == 2
    assert "values 0 to 255" in capsys.readouterr().err
    assert catalog(slides[0], "--out", tmp_path / "x", "--masks", masks, "--masks-include", "999") == 2
    assert "values 0 to 255" in capsys.readouterr().err
    assert catalog(slides[0], "--out", out, "--masks-include", "1") == 2
    assert "--masks FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (Image.new("L", (100, 100), 255), "has not the slide's shape"),
        (Image.new("RGB", (200, 150), (255, 0, 0)), "an image of 8 bits without colours"),
        (Image.new("L", (200, 150), 0), "no tissue found by "),
        (None, "no mask"),
    ],
)
def test_a_mask_that_fits_no_slide_rejects_its_slide_alone(
    slides: list[Path], masks: Path, tmp_path: Path, image: Image.Image | None, told: str
) -> None:
    path = masks / "patient1.png"
    path.write_bytes(b"none") if image is None else image.save(path)
    assert catalog(*slides[:2], "--out", tmp_path / "out", "--masks", masks) == 0
    (rejected,) = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert rejected["slide"] == str(slides[1])
    assert told in rejected["reason"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("patient1.png", b"", "patient1.png: is empty"),
        ("patient1.geojson", b"", "no GeoJSON of shapes"),
        ("patient1.geojson", b"[" * 10**5, "no GeoJSON of shapes (RecursionError"),
        ("patient1.geojson.gz", b"\x1f\x8b\x08\x00none", "no GeoJSON of shapes (EOFError"),
        ("patient1.geojson.zip", b"PK\x03\x04none", "no GeoJSON of shapes (BadZipFile"),
    ],
    ids=["empty image", "empty shapes", "nested without end", "cut gzip", "cut zip"],
)
def test_a_damaged_mask_is_told_by_its_name(
    slides: list[Path], masks: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (masks / name).write_bytes(content)
    assert catalog(*slides[:2], "--out", tmp_path / "out", "--masks", masks) == 0
    (rejected,) = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert rejected["slide"] == str(slides[1])
    assert told in rejected["reason"]


def test_an_image_of_too_many_pixels_is_told(slides: list[Path], masks: Path, tmp_path: Path) -> None:
    path = masks / "patient1.png"
    Image.new("L", (4, 3)).save(path)
    header = b"IHDR" + struct.pack(">II", 44_000, 33_000) + path.read_bytes()[24:29]
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert catalog(*slides[:2], "--out", tmp_path / "out", "--masks", masks) == 0
    (rejected,) = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert "save it with fewer pixels" in rejected["reason"]


def test_what_has_no_partner_is_counted_and_a_mask_is_remembered(
    slides: list[Path], masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = (*slides, "--out", out)
    assert catalog(*command) == 0
    own = [fractions(out, row) for row in range(3)]
    Image.new("L", (200, 150), 255).save(masks / "patient2.png")
    Image.new("L", (200, 150), 255).save(masks / "patient9.png")
    (masks / "notes.txt").write_text("x")
    capsys.readouterr()
    assert catalog(*command, "--masks", masks) == 0
    said = capsys.readouterr()
    assert "3 slides: 0 added, 1 changed, 2 unchanged" in said.out
    assert f"2 slides have no mask (first: {slides[0]})" in said.err
    assert f"2 files beside the masks are no slide's mask (first: {masks / 'notes.txt'})" in said.err
    assert fractions(out, 2).min() == 1
    assert all((fractions(out, row) == own[row]).all() for row in range(2))
    # Looked at anew without --masks, the slide keeps it.
    assert catalog(*command, "--recheck") == 0
    assert fractions(out, 2).min() == 1
    capsys.readouterr()
    # The same again changes nothing, another mask does.
    assert catalog(*command, "--masks", masks) == 0
    assert "3 unchanged" in capsys.readouterr().out
    half = Image.new("L", (200, 150), 255)
    half.paste(0, (0, 0, 100, 150))
    half.save(masks / "patient2.png")
    os.utime(masks / "patient2.png", ns=(1, 1))
    assert catalog(*command, "--masks", masks) == 0
    assert fractions(out, 2).mean() == pytest.approx(0.5, abs=0.01)
    # One that is gone is told.
    (masks / "patient2.png").unlink()
    assert catalog(*command, "--recheck") == 0
    (rejected,) = pq.read_table(out / "rejected.parquet").to_pylist()
    assert f"{masks / 'patient2.png'}: not found" in rejected["reason"]
    assert len(Catalog.load(str(out))) == 3


def test_masks_are_found_by_the_slide_s_name_and_two_of_a_slide_are_refused(masks: Path) -> None:
    names = {
        "0012.geojson": "0012.svs",
        "a.b.svs_MASK.png": "a.b.svs",
        "c.ome.geojson.gz": "c.ome.tif",
        "d.tif": "d.mrxs",
    }
    for name in names:
        (masks / name).write_bytes(b"")
    slides = [f"s3://bucket/x/{slide}" for slide in names.values()]
    found, others = find_masks(MaskOptions(masks=str(masks)), [*slides, "s3://bucket/12.svs"])
    assert {slide: Path(mask.uri).name for slide, mask in found.items()} == dict(zip(slides, names, strict=True))
    assert not others
    (masks / "0012_mask_use.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"0012.* are both its mask"):
        find_masks(MaskOptions(masks=str(masks)), slides)
    # Where masks and slides lie in one folder, a slide is no mask of its namesake, nor a file too many.
    beside = [str(masks / name) for name in ("e.svs", "e.tif")]
    for path in beside:
        Path(path).touch()
    (masks / "0012_mask_use.png").unlink()
    found, others = find_masks(MaskOptions(masks=str(masks)), [*slides, *beside])
    assert set(found) == set(slides)
    assert not others
    with pytest.raises(ConfigError, match="give slides unlike names"):
        find_masks(MaskOptions(masks=str(masks / "d.tif")), ["s3://bucket/x/d.svs", "s3://bucket/y/d.svs"])
