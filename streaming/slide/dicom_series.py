"""A series of DICOM objects as one slide: which of them are its levels, and where their blocks lie."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.slide.block_level import MAX_BLOCK_PX, BlockedSlide, BlockLevel, SlideObject, first_header
from streaming.slide.codecs import BlockFormat, jpeg_prefix
from streaming.slide.dicom import PAGE_NBYTES, Instance, Ints, Picture, Positions, read_instance, read_picture
from streaming.slide.dicom_frames import frames_of
from streaming.slide.multi_file import may_be_dicom
from streaming.storage.joined_ranges import JoinedRanges
from streaming.storage.range_file import RangeFile
from streaming.storage.ranges import Ranges, open_ranges

_MAX_BLOCKS = 2**22  # a square of 520,000 px in blocks of 256
_MAX_HEADS = 16  # read at once
_COMPARE = "compare it with its source"

# By transfer syntax; what kind of JPEG 2000 it is, its first block tells.
_JPEG2000 = "JPEG 2000"
_CODECS = {
    **{"1.2.840.10008.1.2": "NONE", "1.2.840.10008.1.2.1": "NONE"},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG" for number in (50, 51)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEGLS" for number in (80, 81)},
    **{f"1.2.840.10008.1.2.4.{number}": _JPEG2000 for number in (90, 91, 201, 202, 203)},
}
_GREY, _RGB = "MONOCHROME2", "RGB"
_YCBCR = ("YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_COLOURS = {
    "NONE": (_GREY, _RGB),
    "JPEGLS": (_GREY, _RGB),
    "JPEG": (_GREY, _RGB, "YBR_FULL", "YBR_FULL_422"),
    _JPEG2000: (_GREY, _RGB, *_YCBCR),
}


@dataclass(frozen=True, eq=False)
class _Part:
    """An object that is a level, or a part of one."""

    info: storage.ObjectInfo
    ranges: Ranges
    file: RangeFile
    instance: Instance
    count: Counters
    """of its own: parts are read by several threads"""


@dataclass(frozen=True)
class _Frames:
    """What the whole header of a part says."""

    part: _Part
    base: int
    """where it begins among the bytes of all objects"""
    picture: Picture
    positions: Positions | None
    """of its frames, where they do not go row by row"""


@dataclass(frozen=True)
class _Level:
    blocks: BlockLevel
    spacing_um: tuple[float, ...]
    left_out: int
    """frames of further focal planes and optical paths"""


@dataclass(frozen=True)
class Series:
    """The objects of a slide."""

    levels: tuple[storage.ObjectInfo, ...]
    """the first one of the finest level first"""
    beside: tuple[storage.ObjectInfo, ...]
    """label, overview and thumbnail"""


@dataclass(frozen=True)
class Sorted:
    """What some objects are."""

    slides: list[Series]
    others: dict[str, str]
    """what DICOM objects are that are no slides (SEG, SR, CT, ANN, …), by address"""
    broken: dict[str, SlideError]
    """why others can't be told, by address: they are no DICOM, or damaged"""


def sort_objects(
    objects: Sequence[storage.ObjectInfo],
    options: storage.StorageOptions | None = None,
    count: Counters = UNCOUNTED,
) -> Sorted:
    """The slides among some objects: levels of one series in one folder; the beginning of each object is read.

    Raises:
        StorageError: one can't be read.
    """
    series: dict[tuple[str, str], list[tuple[Instance, storage.ObjectInfo]]] = {}
    others, broken = dict[str, str](), dict[str, SlideError]()
    with ThreadPoolExecutor(_MAX_HEADS, thread_name_prefix="dicom") as pool:
        for info, (instance, taken) in zip(objects, pool.map(lambda info: _head(info, options), objects), strict=True):
            count.add(taken)
            if isinstance(instance, SlideError):
                broken[info.uri] = instance
            else:
                folder = storage.folder_of(info.uri)
                series.setdefault((folder, instance.series), []).append((instance, info))
    slides: list[Series] = []
    for found in series.values():
        levels = sorted((instance.order, info.uri, info) for instance, info in found if instance.kind == "VOLUME")
        beside = [(instance, info) for instance, info in found if instance.kind != "VOLUME"]
        if levels:
            companions = tuple(info for instance, info in beside if instance.kind)
            slides.append(Series(tuple(info for _, _, info in levels), companions))
        others.update({info.uri: one.kind or one.modality for one, info in beside if not (levels and one.kind)})
    return Sorted(slides, others, broken)


def _head(info: storage.ObjectInfo, options: storage.StorageOptions | None) -> tuple[Instance | SlideError, Counters]:
    try:
        part = _part(info, options)
        return part.instance, part.count
    except SlideError as error:
        return error, Counters()


def series_of(uri: str, options: storage.StorageOptions | None = None) -> tuple[storage.ObjectInfo, ...]:
    """The objects of the levels of the series that a DICOM object belongs to, beside which the others lie.

    Raises:
        SlideError: it is no DICOM, or no slide.
        StorageError: it does not exist, or its folder can't be listed.
    """
    main = storage.stat(uri, options)
    beside = storage.list_beside(main.uri, may_be_dicom, options)
    others = [other for other in beside if storage.name_of(other.uri) != storage.name_of(main.uri)]
    found = sort_objects([main, *others], options)
    if main.uri in found.broken:
        raise found.broken[main.uri]
    for series in found.slides:
        if main in series.levels or main in series.beside:
            return series.levels
    raise SlideError(f"{uri}: no slide, but DICOM of kind {found.others[main.uri]}; name what it was made of")


def read_series(
    files: Sequence[storage.ObjectInfo], options: storage.StorageOptions | None, count: Counters = UNCOUNTED
) -> tuple[BlockedSlide, Ranges]:
    """The objects of one series as a slide, and the ranges of those that its blocks lie in.

    The first of these is the first object of the finest level. Objects that are no levels are left alone.

    Raises:
        SlideError: an object is broken, a level is missing or there twice, or is not decoded here; names the object.
        StorageError: one can't be read.
    """
    with ThreadPoolExecutor(_MAX_HEADS, thread_name_prefix="dicom") as pool:
        every = list(pool.map(lambda info: _part(info, options), files))
        grouped = _grouped([part for part in every if part.instance.kind == "VOLUME"], files[0].uri)
        parts = [part for level in grouped for part in level]
        bases = dict(zip(parts, [0, *accumulate(part.info.size for part in parts)], strict=False))
        levels = list(pool.map(lambda level: _level(level, [bases[part] for part in level]), grouped))
    for part in every:
        count.add(part.count)
    folder = storage.folder_of(parts[0].info.uri)
    objects = tuple(
        SlideObject(part.info.uri.removeprefix(folder + "/"), part.info.size, part.ranges.tag) for part in parts
    )
    more = sum(level.left_out for level in levels)
    left_out = f"{more:,} frames of further focal planes and optical paths" if more else ""
    slide = BlockedSlide("dicom", levels[0].spacing_um, tuple(level.blocks for level in levels), objects, left_out)
    return slide, JoinedRanges([part.info.size for part in parts], [partial(_itself, part.ranges) for part in parts])


def _itself(ranges: Ranges) -> Ranges:
    return ranges


def _part(info: storage.ObjectInfo, options: storage.StorageOptions | None) -> _Part:
    count = Counters()
    ranges = open_ranges(info.uri, options, size=info.size)
    if ranges is None:
        raise SlideError(
            f"{info.uri}: DICOM is read by byte ranges, which this storage has not; copy the series to a disk"
        )
    file = RangeFile(ranges, count, PAGE_NBYTES)
    return _Part(info, ranges, file, read_instance(info.uri, file), count)


def _grouped(parts: Sequence[_Part], uri: str) -> list[list[_Part]]:
    """The objects of each level, the finest first; parts of a level are of one picture."""
    sizes: dict[tuple[int, int], list[_Part]] = {}
    for part in sorted(parts, key=lambda part: (part.instance.order, part.info.uri)):
        if part.instance.series != parts[0].instance.series:
            raise SlideError(f"{part.info.uri}: of another series than the others here; name their folder as a source")
        size = part.instance.width, part.instance.height
        if min(size) < 1:
            raise SlideError(f"{part.info.uri}: a level of {size[0]} × {size[1]} px; {_COMPARE}")
        sizes.setdefault(size, []).append(part)
    levels = list(sizes.values())
    if not levels:
        raise SlideError(f"{uri}: a label, overview or thumbnail, whose series has no level of a slide here")
    for level in levels:
        first = level[0]
        for other in level[1:]:
            if other.instance.sop != first.instance.sop:
                raise SlideError(
                    f"{other.info.uri}: another picture of {other.instance.width} × {other.instance.height} px than "
                    f"{storage.name_of(first.info.uri)} in the same series; remove the older one"
                )
    if levels[0][0].instance.is_resampled:
        raise SlideError(
            f"{levels[0][0].info.uri}: resampled from a finer level that is missing here; copy the whole series"
        )
    return levels


def _level(parts: Sequence[_Part], bases: Sequence[int]) -> _Level:
    """A level, whose objects begin at `bases` among the bytes of all."""
    read = [
        _Frames(part, base, *read_picture(part.info.uri, part.file)) for part, base in zip(parts, bases, strict=True)
    ]
    # The same object may lie there twice: the first one counts.
    by_offset = {frames.part.instance.frames_before: frames for frames in reversed(read)}
    ordered = [by_offset[offset] for offset in sorted(by_offset)]
    first = ordered[0]
    uri, picture, instance = first.part.info.uri, first.picture, first.part.instance
    wide, high = picture.tile_width, picture.tile_height
    columns, rows = -(-instance.width // max(wide, 1)), -(-instance.height // max(high, 1))
    if not 0 < wide * high <= MAX_BLOCK_PX or columns * rows > _MAX_BLOCKS:
        raise SlideError(
            f"{uri}: frames of {wide:,} × {high:,} px for {instance.width:,} × {instance.height:,}; {_COMPARE}"
        )
    form = _form(uri, picture)
    for other in ordered[1:]:
        if (other.picture.tile_width, other.picture.tile_height) != (wide, high) or _form(uri, other.picture) != form:
            raise SlideError(
                f"{other.part.info.uri}: frames of another kind than in {storage.name_of(uri)}; {_COMPARE}"
            )
    if picture.num_parts not in (0, len(ordered)):
        raise SlideError(
            f"{uri}: {len(ordered)} of the {picture.num_parts} parts of its level are here; copy all of them"
        )
    is_full = all(frames.positions is None for frames in ordered)
    left_out = _further_planes(ordered, columns * rows) if is_full else 0
    # Of all parts together: a further plane may begin with a part.
    plane = next((frames.positions.planes[0] for frames in ordered if frames.positions), None)
    offsets, nbytes = np.zeros(columns * rows, np.int64), np.zeros(columns * rows, np.int64)
    for frames in ordered:
        places = _places(frames, columns, rows, plane)
        left_out += 0 if is_full else int((places < 0).sum())
        found_at, found = frames_of(frames.part.info.uri, frames.part.file, frames.picture)
        offsets[places[places >= 0]] = (found_at + frames.base)[places >= 0]
        nbytes[places[places >= 0]] = found[places >= 0]
    blocks = BlockLevel(instance.width, instance.height, form, offsets, nbytes)
    return _Level(_looked_into(blocks, ordered, picture.photometric), picture.spacing_um, left_out)


def _further_planes(ordered: Sequence[_Frames], num_places: int) -> int:
    """How many frames are of further focal planes and optical paths, where they go row by row.

    Raises:
        SlideError: frames are missing, or there are others than places.
    """
    count = 0
    for frames in ordered:
        uri, offset = frames.part.info.uri, frames.part.instance.frames_before
        if offset != count:
            raise SlideError(
                f"{uri}: begins with frame {offset:,} of its level, of which {count:,} are here; copy all parts"
            )
        count += frames.picture.num_frames
    picture = ordered[0].picture
    if count not in (num_places, num_places * picture.num_planes):
        raise SlideError(
            f"{ordered[-1].part.info.uri}: {count:,} frames for {num_places:,} places"
            f"{f' in {picture.num_planes} planes' if picture.num_planes > 1 else ''}; is a part missing? {_COMPARE}"
        )
    return count - num_places


def _places(frames: _Frames, columns: int, rows: int, plane: object) -> Ints:
    """Which place of the grid, row by row, each frame of an object has; -1 for those of further planes."""
    picture, positions = frames.picture, frames.positions
    if positions is None:
        places = frames.part.instance.frames_before + np.arange(picture.num_frames)
        return np.where(places < columns * rows, places, -1)
    corners, is_other = positions.corners, np.array([other != plane for other in positions.planes])
    column, row = corners[:, 0] // picture.tile_width, corners[:, 1] // picture.tile_height
    wrong = (corners % (picture.tile_width, picture.tile_height) != 0).any(axis=1)
    wrong |= (column < 0) | (column >= columns) | (row < 0) | (row >= rows)
    places = np.where(is_other, -1, row * columns + column)
    _, firsts = np.unique(places, return_index=True)
    wrong |= ~np.isin(np.arange(len(places)), firsts)
    if (wrong & ~is_other).any():
        frame = int((wrong & ~is_other).argmax())
        raise SlideError(
            f"{frames.part.info.uri}, frame {frame}: at pixel {corners[frame, 0]:,}, {corners[frame, 1]:,}, which is "
            f"no place of its own in a grid of {picture.tile_width} × {picture.tile_height} px; {_COMPARE}"
        )
    return places


def _form(uri: str, picture: Picture) -> BlockFormat:
    """How frames are compressed; of JPEG 2000 not yet of which kind."""
    codec, colours = _CODECS.get(picture.syntax), picture.photometric
    is_known = codec is not None and colours in _COLOURS[codec] and picture.bits == (8, 8, 0)
    is_known &= picture.samples == (1 if colours == _GREY else 3) and not (codec == "NONE" and picture.is_planar)
    if codec is None or not is_known:
        planes = " in planes" if picture.is_planar else ""
        raise SlideError(
            f"{uri}: {picture.samples} × {picture.bits[1]} bits of {colours}{planes} in transfer syntax "
            f"{picture.syntax} are not read; 8-bit RGB, YBR and grey (MONOCHROME2) in JPEG, JPEG 2000, JPEG-LS or none "
            "are"
        )
    prefix = jpeg_prefix(b"", rgb=colours == _RGB) if codec == "JPEG" else b""
    return BlockFormat(codec, picture.tile_width, picture.tile_height, prefix, samples=picture.samples)


def _looked_into(level: BlockLevel, ordered: Sequence[_Frames], photometric: str) -> BlockLevel:
    """A level with what only its frames tell.

    Components that the codestream tells to be transformed are RGB to whoever decodes them. Those that it does not, and
    PhotometricInterpretation does, are turned into RGB here.
    """
    if level.form.codec != _JPEG2000:
        return level

    def read(start: int, end: int) -> bytes:
        frames = next(entry for entry in reversed(ordered) if entry.base <= start)
        frames.part.file.seek(start - frames.base)
        return frames.part.file.read(end - start)

    header = first_header(level, read)
    ycbcr = photometric in _YCBCR and not (header and header.is_transformed)
    if header and not header.is_decoded(ycbcr=ycbcr, samples=level.form.samples):
        raise SlideError(
            f"{ordered[0].part.info.uri}: JPEG 2000 of {header.num_tiles} tiles and components (depth, subsampling) "
            f"{header.components}, which are not decoded here; {_COMPARE}"
        )
    halvings = header.halvings if header else 0
    return replace(level, form=replace(level.form, codec="JP2K_YCBCR" if ycbcr else "JP2K_RGB", halvings=halvings))
