"""QuPath's GeoJSON cut into tiles. The made slides are 2048 × 1536 px at 0.25 µm/px: 8 × 6 tiles of 128 px at 0.5."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
        ([feature(rectangle(0, 0, 9, 9), None)], {}, ConfigError, r"shape 1 \(Polygon\) has no class"),
        ([feature(rectangle(0, 0, 512, 512), "Tumor")], {}, ConfigError, "have 1 class for this task"),
        (
            [feature(rectangle(0, 0, 9, 9), "Tumor"), feature(rectangle(0, 9, 9, 18), "Stroma")],
            {},
            ConfigError,
            r"patient0.svs: no tile of 128 px at 0.5 µm/px lies in the shapes of .*slide.geojson",
        ),
        (
            [feature(rectangle(0, 0, 512, 512), "Tumor"), feature(rectangle(512, 0, 1024, 512), "Stroma")],
            {"mpp": 0.125},
            SlideError,
            r"patient0.svs: has 0.25 µm/px at best, 0.125 is asked for",
        ),
    ],
)
def test_annotations_that_can_not_be_used_are_refused_by_name(
    annotated: Callable[..., Samples], features: list[dict[str, Any]], wanted: dict[str, Any], error: type, named: str
) -> None:
    with pytest.raises(error, match=named):
        annotated(features, **wanted)


def test_what_is_no_geojson_is_refused(table: Write, slides: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": [{"geometry": null}]}')
    with pytest.raises(ConfigError, match=r"a\.geojson: no GeoJSON as QuPath writes it"):
        read_dataset(table([{"slide": slides[0], "annotation": tmp_path / "a.geojson"}]), AnnotatedTiles())


def test_tiles_of_an_annotation_are_read_where_it_says(annotated: Callable[..., Samples], slides: list[Path]) -> None:
    samples = annotated([feature(rectangle(256, 256, 512, 512), "A"), feature(rectangle(512, 256, 768, 512), "B")])
    region = samples.tiles[1].region
    assert region is not None
    whole = open_slide(str(slides[0])).read_region((region.x, region.y), 0, (256, 256))
    tile = open_slide(samples.tiles[1].uri).read_tile(region.x, region.y, region.mpp, region.size)
    np.testing.assert_allclose(cv2.resize(whole, (128, 128), interpolation=cv2.INTER_AREA).astype(int), tile, atol=24)
