"""Looking at one slide for the catalog: its row, its tissue and its block index, or why it can't be used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from streaming import storage
from streaming.catalog.given import Given
from streaming.catalog.named import Named
from streaming.catalog.schema import SlideRow
from streaming.catalog.selection import slide_of
from streaming.catalog.tissue import Colour, TissueGrid, blacken_outside, odd_glass, thumbnail, tissue_of_thumbnail
from streaming.errors import TilestreamError
from streaming.slide import Slide, geometry, open_slide
from streaming.slide.block_index import unpack
from streaming.slide.multi_file import as_one
from streaming.storage.staging import Staging

COARSE_MPP = 2.0  # the coarsest magnification of most recipes


@dataclass(frozen=True)
class Inspected:
    """What was found out about a slide, before it is in a catalog."""

    row: SlideRow
    tissue: TissueGrid
    odd_glass: Colour | None = None
    """red, green and blue of its glass, if far from grey"""
    left_out: str = ""
    """what of it is never read, such as further focal planes"""
    mask_classes: frozenset[str] = frozenset()
    """what classes its mask has, if it has one"""
    index: bytes | None = field(default=None, repr=False)
    """its block index, until it is saved in a pack; none where OpenSlide serves"""

    @property
    def coarse_cost(self) -> float:
        """How many of its pixels are read for one pixel of a tile at `COARSE_MPP`."""
        downsamples = tuple(level["downsample"] for level in self.row.levels)
        return geometry.tile_source(self.row.mpp, downsamples, COARSE_MPP, geometry.MPP_TOLERANCE).pixels_read


@dataclass(frozen=True)
class Rejected:
    """A slide that can't be used, and why."""

    slide: str
    size: int
    version: str
    reason: str


def inspect_named(
    named: Named,
    given: Given,
    options: storage.StorageOptions | None,
    staging: Staging,
) -> Inspected | Rejected:
    """What `inspect` tells of what a source names; a series that can't be used goes by its folder."""
    try:
        info = slide_of(named, options)
        found = inspect(info, given, options, staging)
    except TilestreamError as error:
        return Rejected(named.uri, named.nbytes, "", str(error).removeprefix(f"{named.uri}: "))
    except Exception as error:
        # A bug of ours or of a library's: it costs this slide, and is told as what it is.
        why = f"unexpected {type(error).__name__}: {error}; please report it with the slide"
        return Rejected(named.uri, named.nbytes, "", " ".join(why.split()))
    return replace(found, slide=named.uri) if isinstance(found, Rejected) else found


def inspect(
    info: storage.ObjectInfo,
    given: Given,
    options: storage.StorageOptions | None,
    staging: Staging,
) -> Inspected | Rejected:
    """A slide's row, tissue and block index, or why it has none."""
    try:
        slide = open_slide(info.uri, options, expected=info, staging=staging)
        try:
            own_mpp = slide.mpp
            slide.mpp, mpp_from = given.decided(own_mpp)
            info = _as_opened(info, slide)
            image = thumbnail(slide)
            own_tissue = tissue = tissue_of_thumbnail(image)
            classes = frozenset[str]()
            if given.mask is not None:
                covered = given.mask.covered(slide, image.shape[0], image.shape[1], options)
                blacken_outside(covered.share, slide)
                tissue = tissue_of_thumbnail(image, covered.share, within=given.mask.within)
                classes = covered.classes
            if not tissue.fraction.any():
                where = f" by {given.mask.uri}" if given.mask else ""
                return Rejected(info.uri, info.size, info.version, f"no tissue found{where}")
            told = given.mask.text() if given.mask else ""
            row = replace(describe(slide, info, tissue), own_mpp=own_mpp, mpp_from=mpp_from, mask=told)
            glass = odd_glass(image, own_tissue)
            return Inspected(row, tissue, glass, slide.left_out, classes, slide.packed_index)
        finally:
            slide.close()
    except TilestreamError as error:
        return Rejected(info.uri, info.size, info.version, str(error).removeprefix(f"{info.uri}: "))


def _as_opened(info: storage.ObjectInfo, slide: Slide) -> storage.ObjectInfo:
    """The slide by its address, size and version: of a series, those of the files that turned out to be its levels."""
    if not info.files or slide.packed_index is None:
        return info
    files = {file.uri: file for file in info.files}
    return as_one([files[storage.beside(slide.uri, entry.name)] for entry in unpack(slide.packed_index).objects])


def describe(slide: Slide, info: storage.ObjectInfo, tissue: TissueGrid) -> SlideRow:
    """The catalog's row for an open slide with a known mpp."""
    assert slide.mpp is not None, "a slide without mpp has no tissue grid"
    levels = [
        {
            "width": width,
            "height": height,
            "downsample": downsample,
            "compression": compression,
            "block_width": block[0] if block else None,
            "block_height": block[1] if block else None,
        }
        for (width, height), downsample, compression, block in zip(
            slide.level_dimensions,
            slide.level_downsamples,
            slide.level_compressions(),
            slide.level_blocks(),
            strict=True,
        )
    ]
    rows, columns = tissue.fraction.shape
    return SlideRow(
        slide=info.uri,
        size=info.size,
        version=info.version,
        vendor=slide.vendor,
        mpp=slide.mpp,
        width=slide.level_dimensions[0][0],
        height=slide.level_dimensions[0][1],
        bounds=slide.bounds,
        levels=levels,
        backend=slide.backend,
        index=None,
        index_nbytes=0,
        tissue_rows=rows,
        tissue_columns=columns,
        tissue_threshold=tissue.threshold,
        tissue_mm2=tissue.area_mm2,
    )
