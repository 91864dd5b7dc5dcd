"""Opening slides: the one seam between formats and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.slide import block_index
from streaming.slide.block_index import BlockIndex
from streaming.slide.block_level import BlockedSlide, SlideObject
from streaming.slide.block_slide import BlockSlide
from streaming.slide.multi_file import (
    DICOM_MAGIC_NBYTES,
    DICOM_SUFFIXES,
    MULTI_FILE_SUFFIXES,
    as_one,
    is_dicom,
    is_folder,
    is_multi_file,
    may_be_dicom,
    members,
)
from streaming.slide.openslide_slide import open_staged
from streaming.slide.resolution import plausible_mpp, why_no_mpp
from streaming.slide.slide import PendingTile, Slide
from streaming.slide.tiff import read_tiff
from streaming.storage.joined_ranges import JoinedRanges
from streaming.storage.ranges import Ranges, open_ranges, read_range
from streaming.storage.staging import Staging

# What a folder is searched for; a file named outright is tried whatever its suffix.
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide", ".czi"),
    *MULTI_FILE_SUFFIXES,
    *DICOM_SUFFIXES,
)


def open_slide(
    uri: str,
    storage_options: storage.StorageOptions | None = None,
    *,
    mpp: float | None = None,
    index: BlockIndex | None = None,
    expected: storage.ObjectInfo | None = None,
    staging: Staging | None = None,
    count: Counters = UNCOUNTED,
) -> Slide:
    """Opens a whole-slide image by file path, s3://, gs://, az:// or http(s)://.

    Tiled TIFFs (SVS, Philips, OME, generic) and DICOM are read block by block where they lie; other formats go through
    OpenSlide, remote ones on a copy in `staging`. Of DICOM any object of the series may be named, in whose folder the
    others lie; or that folder, if it holds no other series: a local one, or with `/` or `/*` at its end. mpp (µm/px at
    level 0) serves where the metadata has none. With a block index the slide's tags are not read at all. With
    `expected`, a slide of another size or version is refused, and where that tells the files of a slide, they are not
    searched for. Mirrors among the options change where it is read, not what it is called (`streaming.storage.places`).
    What opening takes is added to `count`.

    Raises:
        SlideError: it is no slide, is broken, or is not the version that was expected.
        StorageError: it can't be reached.
    """
    place = storage.place_of(uri, storage_options)
    at, options = place.uri, place.options
    if index is not None:
        return BlockSlide(uri, _ranges_of(place, index), index, mpp)
    if is_folder(at):
        return _open_folder(uri, mpp, storage_options, count)
    if expected is not None and expected.files and not is_multi_file(uri):
        return _open_series(uri, place, [place.there(file) for file in expected.files], mpp, count)
    if uri.lower().endswith(DICOM_SUFFIXES):
        return _open_dicom(uri, place, mpp, expected, count)
    files = members(at, options)
    _check_version(uri, as_one(files), expected, place)
    ranges = None if is_multi_file(uri) else open_ranges(at, options)
    if ranges is None:
        return open_staged(files, options, mpp, staging or Staging(), count)
    if not ranges.size:
        raise SlideError(f"{uri}: is empty; compare it with its source")
    # DICOM's is the longest magic.
    start = read_range(ranges, 0, min(DICOM_MAGIC_NBYTES, ranges.size), count)
    # As OpenSlide does: a file that is both is what its suffix tells.
    if is_dicom(start) and not uri.lower().endswith((".tif", ".tiff")):
        return _open_dicom(uri, place, mpp, expected, count)
    tiff = read_tiff(at, ranges, start, count)
    if tiff is None:
        return open_staged(files, options, mpp, staging or Staging(), count)
    return _blocked(uri, place, tiff, ranges, mpp)


def _check_version(
    uri: str, found: storage.ObjectInfo, expected: storage.ObjectInfo | None, place: storage.Place
) -> None:
    if expected is not None and (
        found.size != expected.size or (not place.by_size and found.version != expected.version)
    ):
        raise SlideError(f"{uri}: changed since it was catalogued; run `tilestream catalog` on it again")


def _open_dicom(
    uri: str, place: storage.Place, mpp: float | None, expected: storage.ObjectInfo | None, count: Counters
) -> BlockSlide:
    """The slide that a DICOM object belongs to, the rest of which lies beside it."""
    from streaming.slide.dicom_series import series_of

    files = series_of(place.uri, place.options)
    _check_version(uri, as_one(files), expected, place)
    return _open_series(uri, place, files, mpp, count)


def _open_folder(
    uri: str, mpp: float | None, storage_options: storage.StorageOptions | None, count: Counters
) -> BlockSlide:
    """The slide whose series a folder holds."""
    from streaming.slide.dicom_series import sort_objects

    folder = storage.canonical(uri.removesuffix("*"))
    place = storage.place_of(folder, storage_options)
    files = storage.list_files(place.uri, may_be_dicom, place.options)
    slides = sort_objects(files, place.options, count).slides
    if len(slides) != 1:
        raise SlideError(f"{uri}: a folder with {len(slides)} DICOM series of slides; name a file of the one you mean")
    return _open_series(storage.join(folder, "any"), place, slides[0].levels, mpp, count)


def _open_series(
    uri: str, place: storage.Place, files: Sequence[storage.ObjectInfo], mpp: float | None, count: Counters
) -> BlockSlide:
    # Its parser is imported for DICOM alone: a quarter of a second that no reader of a catalog needs.
    from streaming.slide.dicom_series import read_series

    slide, ranges = read_series(files, place.options, count)
    return _blocked(storage.beside(uri, slide.objects[0].name), place, slide, ranges, mpp)


def _blocked(uri: str, place: storage.Place, slide: BlockedSlide, ranges: Ranges, mpp: float | None) -> BlockSlide:
    if place.by_size:
        slide = replace(slide, objects=tuple(replace(entry, tag=storage.BY_SIZE) for entry in slide.objects))
    packed = block_index.pack(slide, plausible_mpp(uri, slide.mpp))
    opened = BlockSlide(uri, ranges, block_index.unpack(packed), mpp, packed, slide.left_out)
    opened.no_mpp = why_no_mpp(slide.mpp)
    return opened


def _ranges_of(place: storage.Place, index: BlockIndex) -> Ranges:
    """The ranges of the objects that an index tells of, whose names begin where the slide's address does."""

    def opened(entry: SlideObject) -> Ranges:
        tag = storage.BY_SIZE if place.by_size else entry.tag
        ranges = open_ranges(storage.beside(place.uri, entry.name), place.options, tag, entry.size)
        assert ranges is not None, "only slides whose ranges can be read have an index"
        return ranges

    if len(index.objects) == 1:
        return opened(index.objects[0])
    return JoinedRanges([entry.size for entry in index.objects], [partial(opened, entry) for entry in index.objects])


__all__ = ["SLIDE_SUFFIXES", "PendingTile", "Slide", "Staging", "open_slide"]
