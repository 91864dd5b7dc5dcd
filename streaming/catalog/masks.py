"""Tissue masks that other programs or people made: a file a slide, GeoJSON or an image over the whole slide.

| from | file of `a.svs` | what counts |
|---|---|---|
| TRIDENT | `a.geojson` | its contours without their holes |
| QuPath | `a.geojson`, `a.svs.geojson` | annotations, by class if asked for; `Ignore*` never |
| HistoQC | `a.svs/a.svs_mask_use.png` | white |
| GrandQC | `a.svs_mask.png` | `--masks-include 1`: tissue without artefacts |
| GrandQC, tissue alone | `a.svs_MASK.png` | `--masks-include 0` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from streaming import storage
from streaming.catalog.geojson import IGNORE, read_annotation
from streaming.catalog.painting import coverage
from streaming.errors import ConfigError, SlideError
from streaming.slide import Slide
from streaming.slide.resample import Pixels
from streaming.vision import cv2

_SHAPES = (".geojson", ".json", ".geojson.gz", ".json.gz", ".geojson.zip", ".json.zip")
_IMAGES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
_SUFFIXES = sorted((*_SHAPES, *_IMAGES), key=len, reverse=True)
# What programs add to the name of the slide.
_ADDED = re.compile(r"[_-](?:mask_use|tissue_mask|mask)$", re.IGNORECASE)
_BLACK_AND_WHITE = {0, 255}
_UNNAMED = "tissue"
# How far a mask's sides may be off the slide's: sides are rounded, and some programs crop to whole tiles.
_MAX_OFF, _MAX_OFF_PX = 0.02, 2


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Masks that tell where tissue is."""

    masks: str | None = None
    """folder with a mask a slide, named as the slide: GeoJSON, or an image over the whole slide; none: our own rule"""
    masks_include: tuple[str, ...] = ()
    """class (of an image, value) that is tissue; none: all that are not left out"""
    masks_exclude: tuple[str, ...] = ()
    """class (of an image, value) that is not tissue, also within one that is"""
    masks_within: bool = False
    """whether only what our own rule finds counts within a mask"""

    def __post_init__(self) -> None:
        if self.masks is None and (self.masks_include or self.masks_exclude or self.masks_within):
            raise ConfigError(
                "--masks-include, --masks-exclude and --masks-within say how --masks FOLDER is read; name it"
            )


@dataclass(frozen=True)
class Covered:
    """What a mask tells of a slide."""

    share: Pixels
    """how far it covers each pixel of a picture of the whole slide, uint8 (height, width), 255 whole"""
    classes: frozenset[str]
    """that are in it: names, of an image its values"""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A slide's mask, and how it is read."""

    uri: str
    version: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    within: bool = False

    def text(self) -> str:
        """As a catalog keeps it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> Mask:
        """That of a catalog."""
        found: dict[str, Any] = json.loads(text)
        found |= {"include": tuple(found["include"]), "exclude": tuple(found["exclude"])}
        return cls(**found)

    def covered(self, slide: Slide, height: int, width: int, options: storage.StorageOptions | None = None) -> Covered:
        """How far it covers a picture of the whole slide.

        Raises:
            ConfigError: it is no mask, or classes must be named.
            SlideError: it is the mask of another slide.
            StorageError: it can't be read.
        """
        if self.uri.lower().endswith(_SHAPES):
            return self._of_shapes(slide, height, width, options)
        return self._of_image(slide, height, width, options)

    def _of_shapes(self, slide: Slide, height: int, width: int, options: storage.StorageOptions | None) -> Covered:
        found = read_annotation(self.uri, options, unnamed=_UNNAMED).moved(*slide.bounds[:2])
        areas = [shape for layer in (found.shapes, found.regions, found.ignored) for shape in layer.areas]
        classes = frozenset(shape.name for shape in areas)
        self._check_there(slide, sorted(classes), self.include)
        excluded = {*self.exclude, IGNORE}
        kept = [shape for shape in areas if shape.name in self.include or not self.include]
        counted = [(shape, True) for shape in kept if shape.name not in excluded]
        counted += [(shape, False) for shape in areas if shape.name in excluded]
        return Covered(coverage(counted, height, width, width / slide.level_dimensions[0][0]), classes)

    def _of_image(self, slide: Slide, height: int, width: int, options: storage.StorageOptions | None) -> Covered:
        content = np.frombuffer(storage.read_bytes(self.uri, options), np.uint8)
        try:
            found: Any = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        except cv2.error as error:  # an empty file; an image of over 2^30 px
            why = "is empty" if not content.size else f"can't be decoded ({error.err}); save it with fewer pixels"
            raise ConfigError(f"{self.uri}: {why}") from error
        if found is None or found.dtype != np.uint8 or not (found.ndim == 2 or _is_grey(found)):
            raise ConfigError(f"{self.uri}: no mask; it is an image of 8 bits without colours")
        values: Pixels = found if found.ndim == 2 else found[:, :, 0]
        (slide_width, slide_height), (own_height, own_width) = slide.level_dimensions[0], values.shape
        off = abs(own_width - own_height * slide_width / slide_height)
        if off > max(_MAX_OFF_PX, _MAX_OFF * own_width):
            raise SlideError(
                f"{slide.uri}: {self.uri} of {own_width} × {own_height} px has not the slide's shape, "
                f"{slide_width} × {slide_height}; is it another slide's?"
            )
        there = [int(value) for value in np.unique(values)]
        if self.include:
            self._check_there(slide, there, _codes(self.include))
        share = np.where(self._is_tissue(values, there), 255, 0).astype(np.uint8)
        shrinks = own_width > width or own_height > height
        how = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
        share = np.asarray(cv2.resize(share, (width, height), interpolation=how), dtype=np.uint8)
        return Covered(share, frozenset(map(str, there)))

    def _check_there(self, slide: Slide, there: Sequence[str | int], wanted: Iterable[str | int]) -> None:
        """Refuses a mask in which nothing is of a class that counts, which a wrong name would make of any."""
        if self.include and there and not {*there} & {*wanted}:
            some = ", ".join(map(str, there[:9])) + (", …" if len(there) > 9 else "")
            wanted = ", ".join(self.include)
            raise SlideError(
                f"{slide.uri}: no tissue found by {self.uri}: --masks-include names {wanted}, it has {some}"
            )

    def _is_tissue(self, values: Pixels, there: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        include, exclude = (np.isin(values, _codes(names)) for names in (self.include, self.exclude))
        if self.include:
            return include & ~exclude
        if self.exclude:
            return ~exclude
        if not {*there} <= _BLACK_AND_WHITE:
            some = ", ".join(map(str, there[:9]))
            raise ConfigError(
                f"{self.uri}: its pixels have the values {some}; say which are tissue by --masks-include (of GrandQC's "
                "mask_qc 1, of its tis_det_mask 0)"
            )
        return values == max(_BLACK_AND_WHITE)


def in_none(names: Iterable[str], there: Iterable[str]) -> list[str]:
    """The classes, as a user names them, that are not among those of any mask."""
    # A value of an image may be written `01`.
    known = {name.lstrip("0") or "0" for name in there} | {IGNORE}
    return [name for name in names if (name.lstrip("0") or "0") not in known]


def _is_grey(image: Pixels) -> bool:
    return image.ndim == 3 and bool((image[:, :, :3] == image[:, :, :1]).all())


def _codes(names: Iterable[str]) -> list[int]:
    try:
        codes = [int(name) for name in names]
    except ValueError:
        codes = [-1]
    if any(not 0 <= code <= 255 for code in codes):
        raise ConfigError(f"--masks-include and --masks-exclude of images are values 0 to 255, not {names}")
    return codes


def find_masks(
    asked: MaskOptions, slides: Iterable[str], options: storage.StorageOptions | None = None
) -> tuple[dict[str, Mask], list[str]]:
    """The masks of slides, by the slides' addresses, and the files there that are no slide's.

    Where they lie beside the slides, a slide is nobody's mask.

    Raises:
        ConfigError: two masks fit a slide, or one two slides.
        StorageError: the folder can't be listed.
    """
    if asked.masks is None:
        return {}, []
    slides = list(slides)
    are_slides = {*slides}
    of_name: dict[str, list[storage.ObjectInfo]] = {}
    others = list[str]()
    for info in storage.expand(storage.canonical(asked.masks), options)[0]:
        if info.uri in are_slides:
            continue
        name = storage.name_of(info.uri)
        suffix = next((s for s in _SUFFIXES if name.lower().endswith(s)), "")
        if suffix:
            of_name.setdefault(_ADDED.sub("", name[: -len(suffix)]), []).append(info)
        else:
            others.append(info.uri)
    found, taken = dict[str, Mask](), dict[str, str]()
    for slide in slides:
        name = storage.name_of(slide)
        for info in [info for key in dict.fromkeys((name, PurePosixPath(name).stem)) for info in of_name.get(key, ())]:
            if slide in found:
                raise ConfigError(
                    f"{slide}: {found[slide].uri} and {info.uri} are both its mask; name a folder with one"
                )
            if info.uri in taken:
                raise ConfigError(f"{info.uri}: the mask of {taken[info.uri]} and of {slide}; give slides unlike names")
            found[slide] = Mask(
                uri=info.uri,
                version=info.version,
                include=asked.masks_include,
                exclude=asked.masks_exclude,
                within=asked.masks_within,
            )
            taken[info.uri] = slide
    others += [info.uri for infos in of_name.values() for info in infos if info.uri not in taken]
    return found, sorted(others)
