"""QuPath's GeoJSON cut into tiles. The made slides are 2048 × 1536 px at 0.25 µm/px: 8 × 6 tiles of 128 px at 0.5."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from streaming import open_slide
from streaming.errors import ConfigError, SlideError
from streaming.vision import cv2
from tests.qupath import feature, rectangle
from tests.tiff_files import TiffSlide, write_tiff
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import IGNORED, Samples, read_dataset

Write = Callable[..., str]
TILES = {"mpp": 0.5, "size": 128}


@pytest.fixture
def annotated(slides: list[Path], geojson: Write, table: Write) -> Callable[..., Samples]:
    """Reads a dataset of one slide with some features."""

    def read(features: list[dict[str, Any]], **wanted: Any) -> Samples:
        uri = table([{"slide": slides[0], "annotation": geojson(features), "patient": "p"}])
        return read_dataset(uri, AnnotatedTiles(**{**TILES, **wanted}))

    return read


def places(samples: Samples) -> list[tuple[int, int]]:
    return [(tile.region.x, tile.region.y) for tile in samples.tiles if tile.region]


def test_tiles_that_a_shape_covers_by_three_quarters_have_its_class(annotated: Callable[..., Samples]) -> None:
    samples = annotated(
        [
            feature(rectangle(0, 0, 256 + 200, 256), "Tumor"),  # the second tile by 200 / 256 = 0.78
            feature(rectangle(512, 0, 768 + 180, 256), "Stroma"),  # its second tile by 0.70
        ]
    )
    assert samples.classes == ("Stroma", "Tumor")
    assert samples.labels is not None
    assert places(samples) == [(0, 0), (256, 0), (512, 0)]
    assert samples.labels.tolist() == [1, 1, 0]
    assert samples.patients is not None
    assert set(samples.patients) == {"p"}


def test_shapes_are_counted_from_what_was_scanned_as_qupath_does(geojson: Write, table: Write, tmp_path: Path) -> None:
    # OpenSlide tells bounds where the first blocks of a generic TIFF are empty.
    made = TiffSlide(
        vendor="generic", width=1024, height=768, compression="deflate", empty=tuple((0, i) for i in range(5))
    )
    path = write_tiff(made, tmp_path / "cropped.tif")
    shapes = [feature(rectangle(256, 128, 512, 384), "Tumor"), feature(rectangle(640, 0, 768, 128), "Stroma")]
    uri = table([{"slide": path, "annotation": geojson(shapes), "patient": "p"}])
    tiles = read_dataset(uri, AnnotatedTiles(**{**TILES, "mpp": 0.25}))
    assert places(tiles) == [(640, 256), *((x, y) for y in (384, 512) for x in (256, 384))]


def test_a_hole_is_not_of_the_shape(annotated: Callable[..., Samples]) -> None:
    ring = rectangle(0, 0, 768, 768)
    ring["coordinates"].append(rectangle(256, 256, 512, 512)["coordinates"][0])  # type: ignore[union-attr,index]
    samples = annotated([feature(ring, "Tumor"), feature(rectangle(1024, 0, 1280, 256), "Stroma")])
    assert samples.labels is not None
    tumour = [place for place, label in zip(places(samples), samples.labels, strict=True) if label == 1]
    assert len(tumour) == 8
    assert (256, 256) not in tumour


def test_several_polygons_and_derived_classes_as_qupath_writes_them(annotated: Callable[..., Samples]) -> None:
    parts = [rectangle(0, 0, 256, 256)["coordinates"], rectangle(512, 512, 768, 768)["coordinates"]]
    several = feature({"type": "MultiPolygon", "coordinates": parts}, None)
    several["properties"]["classification"] = {"names": ["Tumor", "Positive"]}  # type: ignore[index]
    line = feature({"type": "LineString", "coordinates": [[0, 0], [5, 5]]}, None)
    samples = annotated([several, line, feature(rectangle(1024, 0, 1280, 256), "Stroma")])
    assert samples.classes == ("Stroma", "Tumor: Positive")
    assert places(samples) == [(0, 0), (1024, 0), (512, 512)]


def test_a_mask_is_the_shapes_in_the_tile_s_pixels(annotated: Callable[..., Samples]) -> None:
    triangle = {"type": "Polygon", "coordinates": [[[300, 300], [480, 310], [350, 500], [300, 300]]]}
    samples = annotated(
        [
            feature(triangle, "Tumor"),
            feature(rectangle(256, 256, 512, 512), "Region*"),
            feature(rectangle(256, 256, 276, 512), "Ignore*"),
        ],
        target="mask",
    )
    assert samples.classes == ("background", "Tumor")
    assert places(samples) == [(256, 256)]
    assert samples.masks is not None
    mask = samples.masks[0](128, 128)
    x, y = (np.indices((128, 128))[::-1] + 0.5) * 2 + 256  # level-0 px of the pixels' centres
    ring = np.array(triangle["coordinates"][0])
    inside = np.ones((128, 128), dtype=bool)
    for (ax, ay), (bx, by) in pairwise(ring):
        inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    wanted = np.where(x < 276, IGNORED, inside)
    assert (mask == wanted).mean() > 0.994  # what the edge cuts may count either way
    edge = cv2.morphologyEx(wanted.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    np.testing.assert_array_equal(mask[~edge], wanted[~edge])


def test_what_no_shape_covers_is_unknown_without_a_region(annotated: Callable[..., Samples]) -> None:
    shapes = [feature(rectangle(0, 0, 128, 256), "Tumor"), feature(rectangle(32, 32, 64, 64), "Stroma")]
    samples = annotated(shapes, target="mask")
    assert samples.masks is not None
    assert places(samples) == [(0, 0)]
    mask = samples.masks[0](128, 128)
    assert set(np.unique(mask[:, :63])) == {0, 1}  # Stroma, the smaller one, lies above
    assert mask[20, 20] == 0
    assert (mask[:, 65:] == IGNORED).all()


def test_points_and_centres_of_cells_are_placed_in_their_tiles(annotated: Callable[..., Samples]) -> None:
    samples = annotated(
        [
            feature({"type": "MultiPoint", "coordinates": [[300, 300], [1000, 700]]}, "Mitosis"),
            feature({"type": "Point", "coordinates": [511, 256]}, "Mitosis"),
            feature(rectangle(400, 400, 410, 420), "Lymphocyte", kind="cell"),
        ]
    )
    assert samples.classes == ("Lymphocyte", "Mitosis")
    assert places(samples) == [(256 * x, 256 * y) for y in (1, 2) for x in (1, 2, 3)]  # the box around all
    assert samples.points is not None
    assert sorted(samples.points[0].tolist()) == [[22, 22, 1], [74.5, 77, 0], [127.5, 0, 1]]
    assert samples.points[5].tolist() == [[(1000 - 768) / 2, (700 - 512) / 2, 1]]


def test_a_region_bounds_where_points_are_looked_for(annotated: Callable[..., Samples]) -> None:
    point = feature({"type": "Point", "coordinates": [300, 300]}, "Mitosis")
    samples = annotated([point, feature(rectangle(0, 0, 768, 512), "Region*")])
    assert len(samples) == 6
    assert samples.points is not None
    assert sum(len(points) for points in samples.points) == 1


@pytest.mark.parametrize(
    ("features", "wanted", "error", "named"),
    [
        ([feature(rectangle(0, 0, 9, 9), None)], {}, ConfigError, r"0 class of areas.*\(1 objects have no class"),
        ([feature(rectangle(0, 0, 512, 512), "Tumor")], {}, ConfigError, "1 class of areas; this task needs 2"),
        (
            [feature(rectangle(0, 0, 512, 512), "Tumor")],
            {"target": "points"},
            ConfigError,
            "0 class of points or cells; this task needs 1",
        ),
        (
            [feature(rectangle(0, 0, 9, 9), "Tumor"), feature(rectangle(0, 9, 9, 18), "Stroma")],
            {},
            ConfigError,
            r"patient0.svs: no tile of 128 px at 0.5 µm/px lies in the shapes of .*slide.geojson",
        ),
        (
            [feature(rectangle(0, 0, 512, 512), "Tumor"), feature(rectangle(512, 0, 1024, 512), "Stroma")],
            {"mpp": 0.1},
            SlideError,
            r"patient0.svs: has 0.25 µm/px at best: for tiles of 0.1 it would be enlarged 2.5 times, over 2;",
        ),
    ],
)
def test_annotations_that_can_not_be_used_are_refused_by_name(
    annotated: Callable[..., Samples], features: list[dict[str, Any]], wanted: dict[str, Any], error: type, named: str
) -> None:
    with pytest.raises(error, match=named):
        annotated(features, **wanted)


def test_unclassified_parents_round_classified_shapes_are_left_out_and_counted(
    annotated: Callable[..., Samples], capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [feature(rectangle(0, 0, 256, 256), "A"), feature(rectangle(512, 0, 768, 256), "B")]
    samples = annotated([feature(rectangle(0, 0, 2048, 1536), None), *shapes])
    assert places(samples) == [(0, 0), (512, 0)]
    assert "1 objects of its annotations have no class or no place; left out" in capsys.readouterr().err


def test_parts_that_overlap_are_painted_alike(annotated: Callable[..., Samples]) -> None:
    parts = [rectangle(0, 0, 512, 256)["coordinates"], rectangle(256, 0, 768, 256)["coordinates"]]
    samples = annotated(
        [feature({"type": "MultiPolygon", "coordinates": parts}, "A"), feature(rectangle(1024, 0, 1280, 256), "B")]
    )
    assert places(samples) == [(0, 0), (256, 0), (512, 0), (1024, 0)]


def test_shapes_far_beyond_the_slide_are_cut_off(annotated: Callable[..., Samples]) -> None:
    far = 10.0**9
    samples = annotated(
        [feature(rectangle(-far, -far, 256, far), "A"), feature(rectangle(768, -far, far, far), "B")], target="mask"
    )
    assert samples.masks is not None
    at = places(samples)
    assert (samples.masks[at.index((0, 0))](64, 64) == 0).all()
    assert (samples.masks[at.index((1024, 512))](64, 64) == 1).all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(*[st.integers(-100, 2200)] * 2, *[st.integers(20, 900)] * 2), min_size=1, max_size=12))
def test_masks_of_many_rectangles_are_pillow_s(
    annotated: Callable[..., Samples], boxes: list[tuple[int, int, int, int]]
) -> None:
    shapes = [
        feature(rectangle(2 * x, 2 * y, 2 * (x + w), 2 * (y + h)), "AB"[i % 2]) for i, (x, y, w, h) in enumerate(boxes)
    ]
    samples = annotated([*shapes, feature(rectangle(0, 0, 2048, 1536), "Region*")], target="mask")
    image = Image.new("L", (1024, 768), 0)  # a pixel for two of level 0
    order = sorted(enumerate(boxes), key=lambda one: -one[1][2] * one[1][3])
    for i, (x, y, w, h) in order:
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=samples.classes.index("AB"[i % 2]))
    wanted = np.asarray(image)
    assert samples.masks is not None
    assert len(samples.masks) == 48
    for (x, y), mask in zip(places(samples), samples.masks, strict=True):
        np.testing.assert_array_equal(mask(128, 128), wanted[y // 2 : y // 2 + 128, x // 2 : x // 2 + 128])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 1535)), min_size=1, max_size=40))
def test_every_point_is_in_the_tile_round_it(annotated: Callable[..., Samples], points: list[tuple[int, int]]) -> None:
    mitoses = feature({"type": "MultiPoint", "coordinates": [list(point) for point in points]}, "Mitosis")
    samples = annotated([mitoses, feature(rectangle(0, 0, 2048, 1536), "Region*")])
    assert samples.points is not None
    found = [
        (x + 2 * px, y + 2 * py)
        for (x, y), own in zip(places(samples), samples.points, strict=True)
        for px, py, _ in own.tolist()
    ]
    assert sorted(found) == sorted(points)


def test_shapes_drawn_in_qupath_lie_where_the_scan_begins(geojson: Write, table: Write, tmp_path: Path) -> None:
    empty = tuple((0, i) for i in range(64) if i % 8 == 0 or i < 8)  # of 8 × 8 blocks the first row and column
    made = TiffSlide(
        vendor="generic", compression="none", width=2048, height=2048, block=(256, 256), mpp=0.5, empty=empty
    )
    slide = write_tiff(made, tmp_path / "holes.tif")
    properties = openslide.OpenSlide(slide).properties
    x, y = (int(properties[f"openslide.bounds-{axis}"]) for axis in "xy")
    assert (x, y) == (256, 256)
    drawn = [
        feature(rectangle(512 - x, 512 - y, 1024 - x, 1024 - y), "A"),
        feature(rectangle(1024 - x, 512 - y, 1536 - x, 1024 - y), "B"),
        feature({"type": "Point", "coordinates": [600 - x, 700 - y]}, "C"),
    ]
    uri = table([{"slide": slide, "annotation": geojson(drawn)}])
    samples = read_dataset(uri, AnnotatedTiles(mpp=0.5, size=512, target="class"))
    assert samples.labels is not None
    assert [(*place, samples.classes[i]) for place, i in zip(places(samples), samples.labels, strict=True)] == [
        (512, 512, "A"),
        (1024, 512, "B"),
    ]
    pointed = read_dataset(uri, AnnotatedTiles(mpp=0.5, size=512, target="points"))
    assert pointed.points is not None
    assert places(pointed) == [(512, 512)]
    assert pointed.points[0].tolist() == [[88, 188, 0]]


def test_tiles_of_an_annotation_are_read_where_it_says(annotated: Callable[..., Samples], slides: list[Path]) -> None:
    samples = annotated([feature(rectangle(256, 256, 512, 512), "A"), feature(rectangle(512, 256, 768, 512), "B")])
    region = samples.tiles[1].region
    assert region is not None
    whole = open_slide(str(slides[0])).read_region((region.x, region.y), 0, (256, 256))
    tile = open_slide(samples.tiles[1].uri).read_tile(region.x, region.y, region.mpp, region.size)
    np.testing.assert_allclose(cv2.resize(whole, (128, 128), interpolation=cv2.INTER_AREA).astype(int), tile, atol=24)
