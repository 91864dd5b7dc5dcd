"""Shapes with classes from GeoJSON: of QuPath 0.2 to 0.6, and of the Digital Slide Archive.

| | object type | class | coordinates |
|---|---|---|---|
| QuPath 0.2, 0.3 | `id` "PathCellObject", `object_type` | `classification.name` | from the corner of what was scanned |
| QuPath since 0.4 | `objectType` | `classification.name` or `.names` | the same |
| Digital Slide Archive | none | `label.value`, else `group` | from the slide's corner, with a third dimension |
| TRIDENT's contours | none, but `tissue_id` | none | from the slide's corner |

Features stand in a FeatureCollection or a list, or are one alone; a file may be gzipped, or alone in a zip.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import ConfigError

Points = NDArray[np.float64]

REGION, IGNORE = "Region*", "Ignore*"
"""classes of QuPath's: where all is annotated, and what shall not count"""
_GEOMETRIES = ("Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection")
_POINTED = ("cell", "detection")  # objects that are also a point each
# What comes of files that are something else, damaged or (RuntimeError) encrypted or nested without end.
_NO_SHAPES = (
    *(ValueError, TypeError, LookupError, AttributeError, EOFError, OSError, RuntimeError),
    *(zlib.error, zipfile.BadZipFile),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Something with a class, in level-0 px: an area, points (n, 2), or both."""

    name: str
    area: shapely.MultiPolygon | None = None
    points: Points | None = None

    @cached_property
    def rings(self) -> list[list[Points]]:
        """Of each polygon of the area its outer ring and its holes, (n, 2) each."""
        parts: Any = shapely.get_parts(self.area)
        return [[shapely.get_coordinates(ring) for ring in (part.exterior, *part.interiors)] for part in parts]

    def moved(self, x: int, y: int) -> Shape:
        """The same so many px further."""
        by = np.array([x, y])
        area: Any = None if self.area is None else shapely.transform(self.area, lambda places: places + by)
        return Shape(name=self.name, area=area, points=None if self.points is None else self.points + by)


@dataclass(frozen=True)
class Layer:
    """Shapes, of which those at a place are found without looking at all."""

    shapes: tuple[Shape, ...]

    @cached_property
    def areas(self) -> list[Shape]:
        """Those with an area, the largest first: where they overlap, the smaller one lies above."""
        own = [shape for shape in self.shapes if shape.area is not None]
        order = np.argsort([-shapely.area(shape.area) for shape in own], kind="stable") if own else []
        return [own[i] for i in order]

    @cached_property
    def _tree(self) -> shapely.STRtree:
        areas: Any = [shape.area for shape in self.areas]
        return shapely.STRtree(areas)

    @cached_property
    def _bounds(self) -> Points:
        return shapely.bounds([shape.area for shape in self.areas])

    def within(self, left: float, top: float, right: float, bottom: float) -> list[Shape]:
        """The areas whose bounding boxes overlap a box, the largest first."""
        if not self.areas:
            return []
        found = np.sort(self._tree.query(shapely.box(left, top, right, bottom)))
        low, high = self._bounds[found, :2], self._bounds[found, 2:]
        overlapping = (low < (right, bottom)).all(axis=1) & (high > (left, top)).all(axis=1)
        return [self.areas[i] for i in found[overlapping]]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What one file says of one slide."""

    source: str
    shapes: Layer
    regions: Layer
    ignored: Layer
    skipped: int = 0
    """objects without a class or a place"""
    from_scan: bool = True
    """whether coordinates are from the corner of what was scanned, as QuPath's"""

    def moved(self, x: int, y: int) -> Annotation:
        """The same in coordinates of the slide, where the scan begins at x, y."""
        if not self.from_scan or (x, y) == (0, 0):
            return self
        layers = self.shapes, self.regions, self.ignored
        shapes, regions, ignored = (Layer(tuple(shape.moved(x, y) for shape in layer.shapes)) for layer in layers)
        return Annotation(source=self.source, shapes=shapes, regions=regions, ignored=ignored, skipped=self.skipped)


def read_annotation(uri: str, options: storage.StorageOptions | None = None, unnamed: str = "") -> Annotation:
    """Reads a file of shapes. Objects without class or place are counted, lines left out.

    Those without class are called `unnamed`, if that is given.

    Raises:
        ConfigError: it is no such file.
        StorageError: it can't be read.
    """
    try:
        content: Any = json.loads(_unpacked(uri, storage.read_bytes(uri, options)))
        features = list(_features(content))
        read = [_shapes(feature, unnamed) for feature in features]
    except _NO_SHAPES as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{uri}: no GeoJSON of shapes ({type(error).__name__}: {error}); export it anew") from error
    shapes = [shape for one in read if one is not None for shape in one]
    return Annotation(
        source=uri,
        shapes=Layer(tuple(shape for shape in shapes if shape.name not in (REGION, IGNORE))),
        regions=Layer(tuple(shape for shape in shapes if shape.name == REGION)),
        ignored=Layer(tuple(shape for shape in shapes if shape.name == IGNORE)),
        skipped=sum(one is None for one in read),
        from_scan=not any(
            {"annotation", "tissue_id"} & (feature.get("properties") or {}).keys() for feature in features
        ),
    )


def _unpacked(uri: str, content: bytes) -> bytes:
    if content[:2] == b"\x1f\x8b":
        return gzip.decompress(content)
    if content[:4] != b"PK\x03\x04":
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in (".geojson", ".json")]
        names = [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
        if len(names) != 1:
            raise ConfigError(f"{uri}: holds {len(names)} files of GeoJSON; zip each slide's by itself")
        return archive.read(names[0])


def _features(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, list):
        for one in content:
            yield from _features(one)
    elif content["type"] == "FeatureCollection":
        yield from _features(content["features"])
    elif content["type"] in _GEOMETRIES:
        yield {"geometry": content}
    else:
        yield content


def _shapes(feature: dict[str, Any], unnamed: str) -> list[Shape] | None:
    """The shapes of a feature: none of a line, None of what has no class or no place."""
    about = feature.get("properties") or {}
    geometries = list(_flat(feature.get("geometry")))
    if geometries and all(one["type"].endswith("LineString") for one in geometries):
        return []  # lines measure something
    area = _area([one for one in geometries if one["type"].endswith("Polygon")])
    marks = [one["coordinates"] for one in geometries if one["type"].endswith("Point")]
    places = np.concatenate([_places(mark) for mark in marks]) if marks else None
    name = _class(about) or unnamed
    if not name or (area is None and (places is None or not len(places))):
        return None
    if area is not None and _kind(feature, about) in _POINTED:
        nucleus = _area(list(_flat(feature.get("nucleusGeometry") or about.get("nucleusGeometry"))))
        middle: Any = shapely.centroid(nucleus or area)
        places = np.array([[middle.x, middle.y]])
    return [Shape(name=name, area=area, points=places if places is not None and len(places) else None)]


def _flat(geometry: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A geometry, or those of a collection; nothing of none or an empty one."""
    if not geometry:
        return
    if geometry["type"] == "GeometryCollection":
        for one in geometry.get("geometries") or ():
            yield from _flat(one)
    elif geometry["type"] not in _GEOMETRIES:
        raise ValueError(f"a geometry of type {geometry['type']!r}")
    elif geometry.get("coordinates"):
        yield geometry


def _places(coordinates: Sequence[Any]) -> Points:
    """Places (n, 2) of a list of them, or of one; a third dimension falls away."""
    found = np.atleast_2d(np.array(coordinates, dtype=np.float64))[:, :2]
    return found[np.isfinite(found).all(axis=1)]


def _area(geometries: Sequence[dict[str, Any]]) -> shapely.MultiPolygon | None:
    """What polygons cover together, holes left out; None of nothing."""
    parts: list[Any] = []
    for geometry in geometries:
        nested = geometry["coordinates"]
        for polygon in [nested] if geometry["type"] == "Polygon" else nested:
            rings = [places for ring in polygon if len(places := _places(ring)) > 2] if all(polygon) else []
            if rings:
                parts.append(shapely.Polygon(rings[0], rings[1:]))
    if not parts:
        return None
    valid = [part if part.is_valid else shapely.make_valid(part) for part in parts]
    whole: Any = shapely.union_all(valid) if len(valid) > 1 else valid[0]
    # What makes a shape valid may leave lines and points beside areas, in a collection of collections.
    flat: Any = shapely.get_parts(shapely.get_parts(whole))
    areas = [part for part in flat if part.geom_type == "Polygon" and part.area > 0]
    return shapely.MultiPolygon(areas) if areas else None


def _class(about: dict[str, Any]) -> str:
    found: Any = about.get("classification")
    if isinstance(found, dict):
        # A derived class ("Tumor: Positive") has the names of its parts instead.
        found = found.get("name") or ": ".join(filter(None, found.get("names") or ()))
    if not found and "annotation" in about:
        label = about.get("label")
        found = (label.get("value") if isinstance(label, dict) else label) or about.get("group")
    return str(found or "").strip()


def _kind(feature: dict[str, Any], about: dict[str, Any]) -> str:
    """annotation, detection, cell or tile; empty where nothing tells."""
    told = about.get("objectType") or about.get("object_type") or feature.get("id") or ""
    return str(told).lower().removeprefix("path").removesuffix("object")
