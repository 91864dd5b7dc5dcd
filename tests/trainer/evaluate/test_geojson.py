"""Files of shapes as QuPath's versions and others write them; each says the same two cells, or the same square."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from streaming.catalog.geojson import Annotation, read_annotation
from streaming.errors import ConfigError
from tests.qupath import feature, rectangle

CELL, NUCLEUS = rectangle(100, 100, 140, 120), rectangle(120, 104, 132, 116)


def cell(name: str, **more: Any) -> dict[str, Any]:
    about = {"classification": {"name": name, "colorRGB": -377282}, "isLocked": False}
    return {"type": "Feature", "geometry": CELL, "properties": {**about, **more.pop("properties", {})}, **more}


@pytest.fixture
def read(tmp_path: Path):
    def read(content: Any, name: str = "a.geojson") -> Annotation:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_annotation(str(path))

    return read


CELLS = {
    "0.2": [cell("T", id="PathCellObject", nucleusGeometry=NUCLEUS)],
    "0.3": {
        "type": "FeatureCollection",
        "features": [cell("T", id="PathCellObject", properties={"object_type": "cell"}, nucleusGeometry=NUCLEUS)],
    },
    "0.5": {
        "type": "FeatureCollection",
        "features": [cell("T", id="0f8c2a4e", properties={"objectType": "cell"}, nucleusGeometry=NUCLEUS)],
    },
    "one feature": cell("T", properties={"objectType": "cell"}, nucleusGeometry=NUCLEUS),
}


@pytest.mark.parametrize("version", CELLS)
def test_a_cell_of_any_version_is_an_area_and_a_point_in_its_nucleus(read: Any, version: str) -> None:
    (shape,) = read(CELLS[version]).shapes.shapes
    assert shape.name == "T"
    assert shape.area.equals(shapely.box(100, 100, 140, 120))
    assert shape.points.tolist() == [[126, 110]]


def test_a_detection_without_nucleus_is_a_point_in_its_middle(read: Any) -> None:
    (shape,) = read([cell("T", id="PathDetectionObject")]).shapes.shapes
    assert shape.points.tolist() == [[120, 110]]
    (shape,) = read([cell("T", id="PathAnnotationObject")]).shapes.shapes
    assert shape.points is None


SQUARE = feature(rectangle(0, 0, 100, 100), "A")
WHOLE = {"type": "FeatureCollection", "features": [SQUARE]}
RING = rectangle(0, 0, 100, 100)["coordinates"][0]


def with_geometry(**geometry: Any) -> dict[str, Any]:
    return {**SQUARE, "geometry": geometry}


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_dot_", "."), content)
    return buffer.getvalue()


FILES: dict[str, Any] = {
    "BOM": b"\xef\xbb\xbf" + json.dumps(WHOLE).encode(),
    "UTF-16": json.dumps(WHOLE).encode("utf-16"),
    "gzip": gzip.compress(json.dumps(WHOLE).encode()),
    "zip": zipped(a_dot_geojson=json.dumps(WHOLE).encode(), __MACOSX_dot_geojson=b"x"),
    "class as a string": [{**SQUARE, "properties": {"classification": "A"}}],
    "names": [{**SQUARE, "properties": {"classification": {"names": ["A"]}}}],
    "3-D": [with_geometry(type="Polygon", coordinates=[[[*place, 0] for place in RING]])],
    "unclosed": [with_geometry(type="Polygon", coordinates=[RING[:-1]])],
    "GeometryCollection": [with_geometry(type="GeometryCollection", geometries=[SQUARE["geometry"]])],
    "overlapping parts": [with_geometry(type="MultiPolygon", coordinates=[[RING], [RING]])],
    "touching itself": [with_geometry(type="Polygon", coordinates=[[*RING[:3], [100, 100], *RING[3:]]])],
    "DSA": [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[*place, 0] for place in RING]]},
            "properties": {"type": "polyline", "label": {"value": "A"}, "annotation": {"name": "nuclei"}},
        }
    ],
    "a list of lists": [[SQUARE]],
}


@pytest.mark.parametrize("kind", FILES)
def test_the_same_square_is_read_of_each(read: Any, kind: str) -> None:
    found = read(FILES[kind])
    (shape,) = found.shapes.shapes
    assert shape.name == "A"
    assert shape.area.equals(shapely.box(0, 0, 100, 100))
    assert found.skipped == 0
    assert found.from_scan == (kind != "DSA")


@pytest.mark.parametrize(
    "odd",
    [
        {"type": "Feature", "geometry": None, "properties": {"classification": {"name": "B"}}},
        feature({"type": "Polygon", "coordinates": []}, "B"),
        feature({"type": "Polygon", "coordinates": [[]]}, "B"),
        feature({"type": "MultiPoint", "coordinates": []}, "B"),
        feature({"type": "GeometryCollection", "geometries": []}, "B"),
        feature({"type": "GeometryCollection", "geometries": None}, "B"),
        feature({"type": "Polygon"}, "B"),
        feature({}, "B"),
        {**SQUARE, "properties": {"classification": {"names": [None]}}},
        feature(rectangle(0, 0, 9, 9), None),
        {"type": "Feature", "geometry": rectangle(0, 0, 9, 9), "properties": None},
        rectangle(0, 0, 9, 9),
        feature({"type": "Polygon", "coordinates": [[[float("nan"), 0]] * 4]}, "B"),
    ],
)
def test_what_has_no_class_or_no_place_is_counted(read: Any, odd: dict[str, Any]) -> None:
    found = read([SQUARE, odd])
    assert len(found.shapes.shapes) == 1
    assert found.skipped == 1


def test_a_hole_stays_one_and_a_loop_is_its_two_halves(read: Any) -> None:
    holed = with_geometry(type="Polygon", coordinates=[RING, rectangle(40, 40, 60, 60)["coordinates"][0]])
    loop = with_geometry(type="Polygon", coordinates=[[[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]])
    one, two = read([holed, loop]).shapes.shapes
    assert one.area.area == 100 * 100 - 20 * 20
    assert two.area.area == pytest.approx(5000)


def test_areas_at_a_place_are_those_whose_boxes_overlap_it(read: Any) -> None:
    random = np.random.default_rng(0)
    low = random.integers(0, 900, (200, 2))
    high = low + random.integers(1, 100, (200, 2))
    shapes = [feature(rectangle(*a, *b), "A") for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    layer = read(shapes).shapes
    for left, top in random.integers(0, 900, (50, 2)).tolist():
        wanted = ((low < (left + 80, top + 60)) & (high > (left, top))).all(axis=1).sum()
        found = layer.within(left, top, left + 80, top + 60)
        assert len(found) == wanted
        sizes = [shape.area.area for shape in found]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no GeoJSON of shapes"),
        (b"null", "no GeoJSON of shapes"),
        (b'{"type": "FeatureCollection", "features": [{"geometry": null}]}', "no GeoJSON of shapes"),
        (b'{"type": "Feature", "geometry": {"type": "Circle"}}', "geometry of type 'Circle'"),
        (gzip.compress(json.dumps(WHOLE).encode(), mtime=0)[:40], "no GeoJSON of shapes"),
        (zipped(a_dot_geojson=b"1", b_dot_json=b"2"), "holds 2 files of GeoJSON; zip each slide's by itself"),
    ],
)
def test_what_is_no_geojson_is_refused(read: Any, content: bytes, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"a\.geojson: .*{named}"):
        read(content)
