"""Labelled data: a folder of images by class, or a CSV or Parquet file of paths with labels, masks or annotations."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.geojson import read_annotation
from streaming.catalog.sources import is_of_system
from streaming.catalog.tables import OF_CLAM, SUFFIXES, Row, read_rows
from streaming.errors import ConfigError
from streaming.slide import SLIDE_SUFFIXES
from streaming.slide.resample import Pixels
from streaming.vision import cv2
from trainer.embed.table_slides import TableSlides
from trainer.evaluate.annotations import AnnotatedTiles, Cut, class_names, cut_tiles

Names = NDArray[np.str_]
Part = Literal["train", "val", "test"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_DRIVE = re.compile(r"[A-Za-z]:[\\/](?!/)")
_WHOLE_PATH = re.compile(rf"/|.*://|{_DRIVE.pattern}")
_PARTS: dict[str, Part] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IGNORED = 255
"""Value of a mask where nothing is known."""
_LARGEST = 1 << 15  # px of a tile's side, of which a thread holds one: what is larger is a slip


@dataclass(frozen=True, kw_only=True)
class Region:
    """A square of a slide; x, y are the level-0 pixel of its top-left corner."""

    x: int
    y: int
    mpp: float
    size: int


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a model is shown: an image, or a region of a slide."""

    uri: str
    region: Region | None = None


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Tiles (or whole slides) with what is known of them; each array is (N,), and None where nothing is known."""

    source: str
    tiles: tuple[Tile, ...]
    classes: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    """index of each tile's class"""
    masks: tuple[Callable[[int, int], Pixels], ...] | None = None
    """gives a tile's classes as uint8 (height, width), 255 where unknown, from its height and width"""
    points: tuple[NDArray[np.float64], ...] | None = None
    """(n, 3) of each tile: x, y in its pixels, index of the class"""
    whole_slides: bool = False
    patients: Names | None = None
    slides: Names | None = None
    sites: Names | None = None
    parts: Names | None = None
    """train, val or test"""

    def __len__(self) -> int:
        return len(self.tiles)

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """What a split keeps together and a resample draws: the patient of each tile, else its slide; None: unknown."""
        names = self.patients if self.patients is not None else self.slides
        return None if names is None else np.unique(names, return_inverse=True)[1].astype(np.int64)


def read_dataset(
    uri: str,
    wanted: AnnotatedTiles,
    options: storage.StorageOptions | None = None,
    slides: TableSlides | None = None,
) -> Samples:
    """The samples of a folder or a table; a table's columns say what it is.

    | columns | samples |
    |---|---|
    | path, label | images; with x, y, mpp, size squares of slides |
    | path, mask | images with masks of class indices, 255 where unknown |
    | slide (or path), annotation | `wanted` tiles by QuPath's GeoJSON: by class, with masks and points |
    | slide, label | whole slides |

    `patient`, `slide`, `site` and `split` (train, val, test) may stand beside them. A folder is CLASS/image or
    CLASS/PATIENT/image, both also below train, val and test; what other programs leave in it is passed over. Relative
    paths are below the table's folder. slides opens what slides are named (None: by their addresses).

    Raises:
        ConfigError: it is no such dataset, labels are missing, there is one class, or an annotation can't be used.
        SlideError: a slide tells no mpp, or lacks the resolution that is asked for.
        StorageError: it can't be read.
    """
    if PurePosixPath(uri).suffix.lower() not in SUFFIXES:
        return _of_folder(uri, options)
    rows = read_rows(uri, options, OF_CLAM)
    columns = set(rows[0])
    base = uri.rpartition("/")[0]
    if "annotation" in columns and columns & {"path", "slide"}:
        samples = _annotated(uri, base, rows, wanted, options, slides or TableSlides(None, options))
    elif {"path", "mask"} <= columns:
        samples = _masked(uri, base, rows, options)
    elif "label" in columns and columns & {"path", "slide"}:
        samples = _labelled(uri, base, rows)
    else:
        raise ConfigError(
            f"{uri}: has columns {', '.join(sorted(columns))}; it needs path and label, path and mask, slide and "
            "annotation, or slide and label"
        )
    return samples


def _column(uri: str, rows: Sequence[Row], name: str) -> list[str]:
    """A column in which every row has a value.

    Raises:
        ConfigError: some have none.
    """
    if missing := [row for row in rows if not row.get(name)]:
        first = missing[0].get("path") or missing[0].get("slide") or "?"
        raise ConfigError(
            f"{uri}: {len(missing)} of {len(rows)} rows have no {name} (first: row {missing[0].number}, {first}); "
            "fill them in or leave those rows out"
        )
    return [row[name] for row in rows]


def _places(base: str, values: Sequence[str]) -> list[str]:
    # Paths of Windows, whole or relative: `C:\slides\a.svs`, `slides\a.svs`.
    plain = [v.replace("\\", "/") if _DRIVE.match(v) or "/" not in v else v for v in values]
    return [v if _WHOLE_PATH.match(v) or not base else storage.join(base, v) for v in plain]


def _known(uri: str, rows: Sequence[Row], *, slides: Sequence[str] | None = None) -> dict[str, Any]:
    """The optional columns as fields of `Samples`: arrays of names, or None."""
    columns = rows[0].keys()
    found: dict[str, Names | None] = {
        field: np.array(_column(uri, rows, name)) if name in columns else None
        for field, name in (("patients", "patient"), ("slides", "slide"), ("sites", "site"))
    }
    if slides is not None:
        found["slides"] = np.array(slides)
    if "split" not in columns:
        return {**found, "parts": None}
    named = [value.lower() for value in _column(uri, rows, "split")]
    if unknown := sorted(set(named) - _PARTS.keys()):
        raise ConfigError(f"{uri}: split {unknown[0]!r}; take train, val and test")
    return {**found, "parts": np.array([_PARTS[value] for value in named])}


def _coded(uri: str, labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names in order, and the index of each label's.

    Raises:
        ConfigError: there is one class.
    """
    classes, codes = np.unique(np.array(labels), return_inverse=True)
    if len(classes) < 2:
        raise ConfigError(f"{uri}: all {len(labels)} labels are {str(classes[0])!r}; a task needs two classes or more")
    return tuple(str(name) for name in classes), codes.astype(np.int64)


def _labelled(uri: str, base: str, rows: Sequence[Row]) -> Samples:
    classes, labels = _coded(uri, _column(uri, rows, "label"))
    whole = "path" not in rows[0]
    places = _places(base, _column(uri, rows, "slide" if whole else "path"))
    cut = not whole and {"x", "y", "mpp", "size"} <= rows[0].keys()
    tiles = [Tile(uri=p, region=_region(uri, row) if cut else None) for p, row in zip(places, rows, strict=True)]
    own = places if whole or (cut and "slide" not in rows[0]) else None
    known = _known(uri, rows, slides=own)
    return Samples(source=uri, tiles=tuple(tiles), classes=classes, labels=labels, whole_slides=whole, **known)


def _region(uri: str, row: Row) -> Region:
    try:
        x, y, size = (int(float(row[name])) for name in ("x", "y", "size"))
        mpp = float(row["mpp"])
        if not (0 < mpp < math.inf and 0 < size <= _LARGEST):
            raise ValueError("not in their range")
    except (ValueError, OverflowError) as error:
        values = ", ".join(f"{name} {row[name]!r}" for name in ("x", "y", "mpp", "size"))
        raise ConfigError(
            f"{uri}: {row['path']}: {values}: all must be numbers, mpp above 0, and size (px of the tile) from 1 to "
            f"{_LARGEST:,}"
        ) from error
    return Region(x=x, y=y, mpp=mpp, size=size)


def _of_folder(uri: str, options: storage.StorageOptions | None) -> Samples:
    infos, named_outright = storage.expand(uri, options)
    if named_outright:
        raise ConfigError(f"{uri}: no dataset; give a folder of images by class, a .csv or a .parquet file")
    root = storage.canonical(uri)
    found = {info.uri: storage.canonical(info.uri)[len(root) :].strip("/").split("/") for info in infos}
    of_image = {
        image: parts
        for image, parts in found.items()
        if PurePosixPath(image).suffix.lower() in IMAGE_SUFFIXES and not any(map(is_of_system, parts))
    }
    images, inside = list(of_image), list(of_image.values())
    if not images:
        raise ConfigError(f"{uri}: holds no image ({', '.join(IMAGE_SUFFIXES)}); a dataset is CLASS/image or a table")
    by_part = all(parts[0].lower() in _PARTS for parts in inside)
    paths = [parts[by_part:] for parts in inside]
    _check_folders(uri, images, inside, paths)
    if min(map(len, paths)) < 2:
        loose = next(image for image, parts in zip(images, paths, strict=True) if len(parts) < 2)
        raise ConfigError(f"{uri}: {loose} is in no class; a dataset is CLASS/image, CLASS/PATIENT/image or a table")
    classes, labels = _coded(uri, [parts[0] for parts in paths])
    return Samples(
        source=uri,
        tiles=tuple(Tile(uri=image) for image in images),
        classes=classes,
        labels=labels,
        patients=np.array([parts[1] for parts in paths]) if all(len(parts) > 2 for parts in paths) else None,
        parts=np.array([_PARTS[parts[0].lower()] for parts in inside]) if by_part else None,
    )


def _check_folders(uri: str, images: Sequence[str], inside: Sequence[list[str]], paths: Sequence[list[str]]) -> None:
    """Refuses a folder of which a part is laid out otherwise than the rest: patients or splits would be lost unseen.

    Raises:
        ConfigError: naming an image.
    """
    depths = np.array([len(parts) for parts in paths])
    if depths.min(initial=9) == 2 and depths.max(initial=0) > 2:
        loose, other = images[int(depths.argmin())], images[int(depths.argmax())]
        raise ConfigError(f"{uri}: {loose} is in no patient's folder, as {other} is; give all one, or none")
    splits = np.array([parts[0].lower() in _PARTS for parts in inside])
    if any(parts[0].lower() == "train" for parts in inside) and not splits.all():
        raise ConfigError(
            f"{uri}: {images[int(splits.argmin())]} is in no split, as {images[int(splits.argmax())]} is; put it below "
            "train, val or test, or take it away"
        )


def _masked(uri: str, base: str, rows: Sequence[Row], options: storage.StorageOptions | None) -> Samples:
    places = _places(base, _column(uri, rows, "path"))
    masks = _places(base, _column(uri, rows, "mask"))

    def reader(mask: str) -> Callable[[int, int], Pixels]:
        return lambda height, width: read_mask(mask, height, width, options)

    # The highest index is known once all masks were read: the classes are named by then.
    tiles = tuple(Tile(uri=place) for place in places)
    found = Samples(source=uri, tiles=tiles, classes=(), masks=tuple(map(reader, masks)), **_known(uri, rows))
    return replace(found, classes=_classes_of(uri, masks, options))


def _classes_of(uri: str, masks: Sequence[str], options: storage.StorageOptions | None) -> tuple[str, ...]:
    used = np.zeros(256, dtype=bool)
    for mask in masks:
        used[np.unique(_decoded(mask, options))] = True
    used[IGNORED] = False
    if used.sum() < 2:
        raise ConfigError(f"{uri}: masks hold {int(used.sum())} class; a task needs two or more (255 is unknown)")
    return tuple(str(index) for index in range(int(np.flatnonzero(used)[-1]) + 1))


def _decoded(mask: str, options: storage.StorageOptions | None) -> Pixels:
    found: Any = cv2.imdecode(np.frombuffer(storage.read_bytes(mask, options), np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.ndim != 2 or found.dtype != np.uint8:
        raise ConfigError(f"{mask}: no mask; it is an 8-bit grey image (PNG) of class indices, 255 where unknown")
    return found


def read_mask(mask: str, height: int, width: int, options: storage.StorageOptions | None = None) -> Pixels:
    """Class indices uint8 (height, width) of an image file, resampled to the nearest where it has another size.

    Raises:
        ConfigError: it is no 8-bit grey image.
    """
    found = _decoded(mask, options)
    if found.shape == (height, width):
        return found
    return cv2.resize(found, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.uint8)


def _annotated(
    uri: str,
    base: str,
    rows: Sequence[Row],
    wanted: AnnotatedTiles,
    options: storage.StorageOptions | None,
    slides: TableSlides,
) -> Samples:
    """Tiles of every row's annotation, which inherit the row's patient, site and split."""
    places = _places(base, _column(uri, rows, "path" if "path" in rows[0] else "slide"))
    files = _places(base, _column(uri, rows, "annotation"))
    found = [read_annotation(file, options) for file in files]
    has_points = any(shape.points is not None for one in found for shape in one.shapes.shapes)
    target = wanted.target or ("points" if has_points else "class")
    classes, skipped = class_names(found, target), sum(one.skipped for one in found)
    fewest, kind = (1, "points or cells") if target == "points" else (2, "areas")
    if len(classes) < fewest:
        raise ConfigError(
            f"{uri}: its annotations have {len(classes)} class of {kind}; this task needs {fewest} or more ({skipped} "
            "objects have no class or no place); give them classes, or take another --task"
        )
    if skipped:
        sys.stderr.write(f"{uri}: {skipped:,} objects of its annotations have no class or no place; left out\n")
    cuts, of_row = list[Cut](), list[int]()
    # DICOM may be without a suffix, or a folder.
    suffixes = [PurePosixPath(place).suffix.lower() for place in places]
    slide_of = [suffix in SLIDE_SUFFIXES or suffix not in IMAGE_SUFFIXES for suffix in suffixes]
    if target == "class" and not all(slide_of):
        image = places[slide_of.index(False)]
        raise ConfigError(f"{image}: an image, whose annotation gives no label for the whole; take --task segmentation")
    for i, (place, annotation) in enumerate(zip(places, found, strict=True)):
        opener = slides if slide_of[i] else None
        own = cut_tiles(place, annotation, classes, wanted, target, slides=opener, options=options)
        if not own:
            raise ConfigError(
                f"{place}: no tile of {wanted.size} px at {wanted.mpp:g} µm/px lies in the shapes of {files[i]}; "
                "take smaller tiles, or leave the slide out"
            )
        cuts += own
        of_row += [i] * len(own)
    tiles = [
        Tile(uri=places[i], region=_region_of(one, wanted) if slide_of[i] else None)
        for i, one in zip(of_row, cuts, strict=True)
    ]
    return Samples(
        source=uri,
        tiles=tuple(tiles),
        classes=classes,
        labels=np.array([one.label for one in cuts]) if target == "class" else None,
        masks=tuple(one.mask for one in cuts) if target == "mask" else None,
        points=tuple(one.points for one in cuts) if target == "points" else None,
        **_known(uri, [rows[i] for i in of_row], slides=[places[i] for i in of_row]),
    )


def _region_of(one: Cut, wanted: AnnotatedTiles) -> Region:
    return Region(x=one.x, y=one.y, mpp=wanted.mpp, size=wanted.size)
