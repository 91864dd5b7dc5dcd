"""What the header of a DICOM object says: which part of which slide it is, and how its frames are compressed.

Only the attributes named here are read: no patient's name leaves the bytes that were fetched. So a message tells what
kind of error a header makes, never the text of it, which might hold a value.
"""

from __future__ import annotations

import logging
import re
import struct
import threading
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, config
from pydicom.filereader import read_partial
from pydicom.tag import Tag

from streaming.errors import SlideError, TilestreamError
from streaming.slide.multi_file import DICOM_MAGIC_NBYTES, is_dicom
from streaming.slide.resolution import number
from streaming.storage.range_file import RangeFile

PAGE_NBYTES = 2**14
"""Of a header, read at once: most end within, but for a colour profile."""

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_MAX_HEADER_NBYTES = 2**26  # positions of 300,000 frames
_PIXEL_DATA = 0x7FE00010
_END_OF_SIZES = 0x00480008  # behind the size of the picture
_CODE = re.compile(r"[A-Z0-9_. ]{1,64}")
_UNDEFINED = 0xFFFFFFFF
_IMPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"

_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType"),
    *("Rows", "Columns", "TotalPixelMatrixRows", "TotalPixelMatrixColumns", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation", "DimensionOrganizationType"),
    *("ConcatenationUID", "SOPInstanceUIDOfConcatenationSource"),
    *("ConcatenationFrameOffsetNumber", "InConcatenationTotalNumber"),
    *("TotalPixelMatrixFocalPlanes", "NumberOfOpticalPaths", "SharedFunctionalGroupsSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Instance:
    """What an object says of itself, before its pixels; sizes in pixels."""

    series: str
    sop: str
    """its own UID, or that of the picture that it is a part of"""
    kind: str
    """VOLUME for a level of a slide, LABEL, OVERVIEW, THUMBNAIL; empty for what is no picture of a slide"""
    modality: str
    """SM for slides, ANN, SEG, SR, CT, …"""
    is_resampled: bool
    width: int
    height: int
    frames_before: int
    """in its level, where it is a part of one"""

    @property
    def order(self) -> tuple[int, int, int]:
        """What sorts the objects of a series: the finest level first, and of it the first part."""
        return -self.width, -self.height, self.frames_before


@dataclass(frozen=True)
class Positions:
    """Where the frames of an object lie."""

    corners: Ints
    """int64 (frames, 2): x and y from 0 on"""
    planes: list[tuple[object, object]]
    """depth and optical path of each"""


@dataclass(frozen=True)
class Picture:
    """All that an object which is a level, or a part of one, says of its frames."""

    instance: Instance
    syntax: str
    tile_width: int
    tile_height: int
    num_frames: int
    samples: int
    photometric: str
    bits: tuple[int, int, int]
    """allocated, stored, and 1 where signed"""
    is_planar: bool
    num_parts: int
    """objects of its level; 0 where it does not say"""
    num_planes: int
    """focal planes times optical paths"""
    spacing_um: tuple[float, ...]
    """µm/px of x and y; empty where it says none"""
    extended: tuple[Ints, Ints] | None
    """the extended offset table, and the lengths of the frames"""
    pixels_at: int
    """where the value of PixelData begins"""
    pixels_nbytes: int | None
    """its length, None where frames are items"""


def read_instance(uri: str, file: RangeFile) -> Instance:
    """What the beginning of an object says; the size of no picture is 0 × 0.

    Raises:
        SlideError: it is no DICOM, or its header makes no sense.
        StorageError: it can't be read.
    """
    try:
        with _quiet():
            return _instance(_header(file, _TAGS, _END_OF_SIZES))
    except TilestreamError:
        raise
    except Exception as error:  # of bytes that are no DICOM, pydicom raises nearly anything
        raise _no_sense(uri, error) from None


def read_picture(uri: str, file: RangeFile) -> tuple[Picture, Positions | None]:
    """What the whole header of a level says, and where its frames lie; None where they go row by row.

    Raises:
        SlideError: the header makes no sense.
        StorageError: it can't be read.
    """
    try:
        with _quiet():
            picture, positions = _picture_and_positions(file)
    except TilestreamError:
        raise
    except Exception as error:  # of bytes that are no DICOM, pydicom raises nearly anything
        raise _no_sense(uri, error) from None
    if positions is not None and (num := len(positions.planes)) != picture.num_frames:
        raise SlideError(f"{uri}: positions of {num:,} frames for {picture.num_frames:,}; compare it with its source")
    return picture, positions


def _picture_and_positions(file: RangeFile) -> tuple[Picture, Positions | None]:
    header = _header(file, _TAGS, _PIXEL_DATA)
    picture = _picture(header, file)
    is_full = header.get("DimensionOrganizationType") == "TILED_FULL"
    if is_full and picture.spacing_um:
        return picture, None
    groups = _header(file, ("PerFrameFunctionalGroupsSequence",), _PIXEL_DATA)
    frames = groups.get("PerFrameFunctionalGroupsSequence") or []
    if frames and not picture.spacing_um:
        picture = replace(picture, spacing_um=_spacing(frames[0]))
    return picture, None if is_full or not frames else _positions(frames)


_quiet_lock = threading.Lock()
_quiet_until = ExitStack()
_num_quiet = 0


@contextmanager
def _quiet() -> Generator[None]:
    """Within it pydicom checks no values and tells nothing of them: what it tells could hold a patient's name.

    Its settings, its log and the filters of warnings are the whole process's, whose other parts may read DICOM, too. So
    they are as they were once no thread is within it.
    """
    global _num_quiet
    with _quiet_lock:
        if _num_quiet == 0:
            log = logging.getLogger("pydicom")
            _quiet_until.callback(setattr, log, "disabled", log.disabled)
            log.disabled = True
            _quiet_until.enter_context(config.disable_value_validation())
            _quiet_until.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module="pydicom")
        _num_quiet += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet -= 1
            if _num_quiet == 0:
                _quiet_until.close()


def _no_sense(uri: str, error: BaseException) -> SlideError:
    return SlideError(f"{uri}: its DICOM header makes no sense ({type(error).__name__}); compare it with its source")


class _Bounded:
    """The beginning of a file, as far as a header may go."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As io's.

        Raises:
            OSError: it goes further than any header.
        """
        if size < 0 or self._file.tell() + size > _MAX_HEADER_NBYTES:
            raise OSError("a header without end")
        return self._file.read(size)


def _header(file: RangeFile, tags: Sequence[str], end: int) -> Dataset:
    """Some elements in front of one; the file is left at that one."""
    file.seek(0)
    start = file.read(DICOM_MAGIC_NBYTES)
    if not is_dicom(start):
        raise ValueError("no DICOM")
    file.seek(0)
    return read_partial(
        cast(Any, _Bounded(file)),
        stop_when=lambda tag, _vr, _length: tag >= end,
        specific_tags=cast(Any, [Tag(name) for name in tags]),
    )


def _instance(header: Dataset) -> Instance:
    is_slide = header.get("SOPClassUID") == _WHOLE_SLIDE
    image_type = _strings(header.get("ImageType"))
    source = header.get("SOPInstanceUIDOfConcatenationSource") or header.get("SOPInstanceUID")
    return Instance(
        series=str(header.get("SeriesInstanceUID") or ""),
        sop=str(source or ""),
        kind=_code(image_type[2]) if is_slide and len(image_type) > 2 else "",
        modality=_code(header.get("Modality")),
        is_resampled=image_type[-1:] == ["RESAMPLED"],
        width=int(header.get("TotalPixelMatrixColumns") or 0),
        height=int(header.get("TotalPixelMatrixRows") or 0),
        frames_before=int(header.get("ConcatenationFrameOffsetNumber") or 0),
    )


def _picture(header: Dataset, file: RangeFile) -> Picture:
    """By all elements in front of the pixels, where the file is left."""
    syntax = _code(header.file_meta.get("TransferSyntaxUID", _IMPLICIT))
    pixels_at, nbytes = _pixel_data(file, syntax)
    shared = header.get("SharedFunctionalGroupsSequence") or []
    tables = [header.get(name) for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    offsets, lengths = (np.frombuffer(table or b"", "<u8").astype(np.int64) for table in tables)
    return Picture(
        instance=_instance(header),
        syntax=syntax,
        tile_width=int(header.Columns),
        tile_height=int(header.Rows),
        num_frames=int(header.get("NumberOfFrames") or 1),
        samples=int(header.SamplesPerPixel),
        photometric=_code(header.PhotometricInterpretation),
        bits=(int(header.BitsAllocated), int(header.BitsStored), int(header.get("PixelRepresentation") or 0)),
        is_planar=bool(header.get("PlanarConfiguration") or 0),
        num_parts=int(header.get("InConcatenationTotalNumber") or 0) if "ConcatenationUID" in header else 1,
        num_planes=int(header.get("TotalPixelMatrixFocalPlanes") or 1) * int(header.get("NumberOfOpticalPaths") or 1),
        spacing_um=_spacing(shared[0]) if shared else (),
        extended=(offsets, lengths) if len(offsets) else None,
        pixels_at=pixels_at,
        pixels_nbytes=nbytes,
    )


def _code(value: object) -> str:
    """A code or UID as it is, if it is one: a damaged length may bring along what no message may tell."""
    return str(value) if _CODE.fullmatch(str(value)) else "unknown"


def _strings(value: Any) -> list[str]:
    """A value of one string or of several."""
    return [str(part) for part in ([value] if isinstance(value, str) else value or [])]


def _pixel_data(file: RangeFile, syntax: str) -> tuple[int, int | None]:
    """Where the value of PixelData begins, in front of which the file is; and its length, None where it is items."""
    order = ">" if syntax == _BIG_ENDIAN else "<"
    head = file.read(12)
    is_implicit = syntax == _IMPLICIT
    group, element, length = struct.unpack(
        f"{order}HHI" if is_implicit else f"{order}HH4xI", head[: 8 if is_implicit else 12]
    )
    if group << 16 | element != _PIXEL_DATA:
        raise ValueError("no pixels")
    return file.tell() - (4 if is_implicit else 0), None if length == _UNDEFINED else length


def _spacing(groups: Dataset) -> tuple[float, ...]:
    """µm/px of x and y by some functional groups; DICOM tells mm, of rows first."""
    measures = groups.get("PixelMeasuresSequence") or []
    # As it stands in the file: of what is no decimal string, pydicom makes an error.
    item = measures[0].get_item("PixelSpacing") if measures else None
    raw = getattr(item, "value", b"")
    parts = raw.decode("ascii", "replace").split("\\") if isinstance(raw, bytes) else map(str, raw or ())
    row, column, *_ = [*map(number, parts), None, None]
    return () if row is None or column is None else (column * 1000, row * 1000)


def _positions(frames: Sequence[Dataset]) -> Positions:
    corners = np.empty((len(frames), 2), np.int64)
    planes: list[tuple[object, object]] = []
    for frame, groups in enumerate(frames):
        place = groups.PlanePositionSlideSequence[0]
        paths = groups.get("OpticalPathIdentificationSequence") or []
        path = paths[0].get("OpticalPathIdentifier") if paths else None
        planes.append((place.get("ZOffsetInSlideCoordinateSystem"), path))
        corners[frame] = (
            int(place.ColumnPositionInTotalImagePixelMatrix) - 1,
            int(place.RowPositionInTotalImagePixelMatrix) - 1,
        )
    return Positions(corners, planes)
