"""What scanners' metadata say of a tiled TIFF: which of its pages are levels, how large they are, and their mpp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import tifffile

from streaming.slide.resolution import number, tiff_mpp, um_of

# Vendors of whose slides OpenSlide paints empty blocks from finer levels.
PAINTS_EMPTY_BLOCKS = ("aperio",)

# Those of whose empty blocks it tells the bounds of the scan. An OME-TIFF is a generic one to it.
TELLS_BOUNDS = ("generic-tiff", "ome")

_XMP, _NDPI_FORMAT = 700, 65420
_DESCRIPTION, _SOFTWARE, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 270, 305, 282, 283, 296
_OME = re.compile(r"<(\w+:)?OME[\s>]")


@dataclass(frozen=True)
class Pyramid:
    """The levels of a slide as its metadata have them, the finest first; unchecked."""

    vendor: str
    mpp: tuple[float, ...]
    """µm/px at level 0, of x and y or of both; empty where the metadata have none"""
    pages: list[tifffile.TiffPage]
    sizes: list[tuple[int, int]]
    """width and height of each level's picture in its pixels"""


def pyramid_of(pages: Sequence[tifffile.TiffPage]) -> Pyramid | None:
    """The levels among all pages of a tiled TIFF; None where only OpenSlide makes sense of them."""
    first = pages[0]
    description, software = _text(first, _DESCRIPTION), _text(first, _SOFTWARE)
    if description.startswith("Aperio"):
        return _aperio(pages, description)
    if software.startswith("Philips"):
        return _philips(pages, description)
    if _OME.search(description):
        return _ome(first, description)
    # Formats whose blocks overlap or are of several pictures: only OpenSlide knows how they lie.
    if _NDPI_FORMAT in first.tags or _is_ventana(first) or "leica" in description or "MedScan" in software:
        return None
    return _generic(pages)


def _text(page: tifffile.TiffPage, code: int) -> str:
    """A tag of text in whatever encoding: what of it is read here is ASCII, but for units."""
    value: object = page.tags.valueof(code)
    if isinstance(value, bytes):  # neither UTF-8 nor cp1252
        value = value.decode("utf-8", "replace")
    return value.partition("\0")[0] if isinstance(value, str) else ""


def _aperio(pages: Sequence[tifffile.TiffPage], description: str) -> Pyramid:
    """Aperio SVS: all tiled pages are levels (thumbnail, label and macro are not tiled); mpp in the description."""
    levels = [page for page in pages if page.is_tiled]
    facts = {name.strip(): value for name, _, value in (fact.partition("=") for fact in description.split("|"))}
    mpp = number(facts.get("MPP", ""))
    return Pyramid("aperio", () if mpp is None else (mpp,), levels, _sizes(levels))


def _philips(pages: Sequence[tifffile.TiffPage], description: str) -> Pyramid | None:
    """Philips TIFF: all tiled pages are levels; its XML has the pixel spacing of each."""
    levels, spacings = [page for page in pages if page.is_tiled], _philips_spacings(description)
    if len(spacings) < len(levels):
        return None
    # Philips' tags count whole blocks; the spacing tells how much of a level is picture.
    width, height = levels[0].imagewidth, levels[0].imagelength
    factors = [round(spacing[0] / spacings[0][0]) for spacing in spacings[: len(levels)]]
    return Pyramid("philips", spacings[0], levels, [(width // factor, height // factor) for factor in factors])


def _ome(first: tifffile.TiffPage, description: str) -> Pyramid:
    """OME-TIFF: further levels are the first page's SubIFDs; mpp in the XML, else by the resolution tags."""
    levels = [first, *_subifds(first)]
    return Pyramid("ome", _ome_mpp(description) or _resolution_mpp(first), levels, _sizes(levels))


def _generic(pages: Sequence[tifffile.TiffPage]) -> Pyramid:
    """Any other tiled TIFF; mpp by the resolution tags.

    Further levels are pages that are marked as reduced pictures; where there are none, the first page's SubIFDs (as
    libvips writes them), or pages without a mark that are each the one before reduced by the same whole factor (as
    Bio-Formats does).
    """
    first, *others = [page for page in pages if page.is_tiled]
    reduced = [page for page in others if page.subfiletype & 1] or _subifds(first) or _halved_again(first, others)
    levels = [first, *reduced]
    return Pyramid("generic-tiff", _resolution_mpp(first), levels, _sizes(levels))


def _subifds(page: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    return [below for below in page.pages or () if isinstance(below, tifffile.TiffPage) and below.is_tiled]


def _halved_again(first: tifffile.TiffPage, others: Sequence[tifffile.TiffPage]) -> list[tifffile.TiffPage]:
    """Those of some pages that go on from the first as a pyramid does, each smaller by the same whole factor."""
    found: list[tifffile.TiffPage] = []
    factor = round(first.imagewidth / others[0].imagewidth) if others and others[0].imagewidth else 0
    before = first
    for page in others if factor >= 2 else ():
        pairs = ((before.imagewidth, page.imagewidth), (before.imagelength, page.imagelength))
        same = (page.samplesperpixel, page.bitspersample) == (first.samplesperpixel, first.bitspersample)
        # Rounded up or down, and from a size that was rounded itself.
        if not same or any(abs(large / factor - small) > 1 for large, small in pairs):
            break
        found.append(page)
        before = page
    return found


def _is_ventana(page: tifffile.TiffPage) -> bool:
    """Whether its XMP is a Ventana scanner's: Photoshop and others write XMP, too."""
    xmp = page.tags.valueof(_XMP)
    return "iScan" in xmp if isinstance(xmp, str) else b"iScan" in bytes(xmp or b"")


def _sizes(levels: Sequence[tifffile.TiffPage]) -> list[tuple[int, int]]:
    return [(page.imagewidth, page.imagelength) for page in levels]


def _resolution_mpp(page: tifffile.TiffPage) -> tuple[float, ...]:
    unit: object = page.tags.valueof(_RESOLUTION_UNIT)
    per_unit = [page.tags.valueof(code) for code in (_X_RESOLUTION, _Y_RESOLUTION)]
    return tiff_mpp(per_unit, None if unit is None else int(unit) if isinstance(unit, int) else 0)


def _xml(text: str) -> ElementTree.Element | None:
    # No slide needs entities of its own, and nested ones are a known bomb.
    if "<!ENTITY" in text:
        return None
    try:
        return ElementTree.fromstring(text.strip("\ufeff \t\r\n"))
    except ElementTree.ParseError:
        return None


def _philips_spacings(description: str) -> list[tuple[float, ...]]:
    """(x, y) in µm/px of each level."""
    root = _xml(description)
    if root is None:
        return []
    found: list[tuple[float, ...]] = []
    for entry in root.iter("DataObject"):
        if entry.get("ObjectType") == "PixelDataRepresentation":
            for attribute in entry.findall("Attribute"):
                if attribute.get("Name") == "DICOM_PIXEL_SPACING":
                    row, column, *_ = [*map(number, (attribute.text or "").replace('"', "").split()), None, None]
                    if row and column:
                        found.append((column * 1000, row * 1000))
    return sorted(found)


def _ome_mpp(description: str) -> tuple[float, ...]:
    root = _xml(description)
    pixels = next((e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"), None) if root is not None else None
    if pixels is None:
        return ()
    found: list[float] = []
    for axis in "XY":
        value = number(pixels.get(f"PhysicalSize{axis}", ""))
        um = um_of(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if value is not None and um is not None:
            found.append(value * um)
    return tuple(found)
