"""Small whole-slide images in DICOM, as the Imaging Data Commons has them, and as it has not.

uri, *others = write_series(folder, svs)        the blocks of a tiled TIFF, not compressed anew, an object a level
"""

from __future__ import annotations

import io
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import VLWholeSlideMicroscopyImageStorage, generate_uid

SYNTAXES = {
    "none": "1.2.840.10008.1.2.1",
    "jpeg": "1.2.840.10008.1.2.4.50",
    "jpegls": "1.2.840.10008.1.2.4.80",
    "jpeg2000": "1.2.840.10008.1.2.4.90",
    "lossy jpeg2000": "1.2.840.10008.1.2.4.91",
    "htj2k": "1.2.840.10008.1.2.4.201",
}
# What the converter of the Imaging Data Commons puts before RGB components: two bytes short of Adobe's.
SHORT_ADOBE = b"\xff\xee\x00\x0cAdobe\x00\x00\x00\x00\x00"
PATIENT = "Doe^Jane^Of^Nowhere"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a series is written."""

    codec: str = ""
    """one of SYNTAXES to compress anew, empty for the blocks as they are"""
    photometric: str = ""
    """PhotometricInterpretation, where it is another than the frames' own"""
    tables: str = "tiff"
    """where frames are found: tiff, big tiff, basic, extended, none"""
    sparse: bool = False
    """frames in any order, each with its position, some left out"""
    parts: int = 1
    """objects of the first level"""
    associated: bool = True
    """whether LABEL, OVERVIEW and THUMBNAIL lie beside it"""
    icc_nbytes: int = 0
    """of the profile in each object; scanners' have 141,992"""
    planes: int = 1
    """focal planes; further ones are black"""
    mpp: tuple[float, float] | None = None
    """µm/px of x and y at level 0; none: as the slide says, or 0.25"""
    suffix: str = ".dcm"
    times: int = 1
    """so often the picture lies side by side, and so many such rows below each other; of levels of whole frames"""
    number: int = 0
    """of the series: others have other UIDs"""
    changes: tuple[tuple[str, Any], ...] = ()
    """attributes to overwrite in every level; None removes one"""


@dataclass(frozen=True)
class _Level:
    width: int
    height: int
    tile: tuple[int, int]
    """width, height"""
    photometric: str
    codec: str
    frames: list[bytes]
    empty: list[bool]


def uid(*what: object) -> str:
    """A UID that is the same each time."""
    return generate_uid(entropy_srcs=[repr(what)])


def write_series(folder: Path, slide: Path, kind: Kind = Kind()) -> list[Path]:
    """A tiled TIFF as a series of DICOM objects; gives those of its levels, the first one's first, then the others."""
    folder.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffFile(slide) as tiff:
        pages = [page for page in tiff.pages if page.is_tiled]
        levels = [_recompressed(page, kind) if kind.codec else _as_it_is(page) for page in pages]
    levels = [_repeated(level, kind.times) for level in levels]
    places = [len(level.frames) for level in levels]
    levels = [_with_further_planes(level, kind.planes) for level in levels]
    series = uid("series", slide.name, kind.number)
    written: list[Path] = []
    for number, level in enumerate(levels):
        parts = np.array_split(_order(level, kind), kind.parts if number == 0 else 1)
        for part, frames in enumerate(parts):
            before = sum(map(len, parts[:part]))
            instance = _instance(series, level, kind, number, levels[0].width / level.width)
            instance.SOPInstanceUID = uid(series, number, part)
            instance.NumberOfFrames = len(frames)
            if number == 0 and kind.parts > 1:
                instance.ConcatenationUID = uid(series, "concatenation")
                instance.SOPInstanceUIDOfConcatenationSource = uid(series, number)
                instance.InConcatenationNumber = part + 1
                instance.InConcatenationTotalNumber = kind.parts
                instance.ConcatenationFrameOffsetNumber = before
            if kind.sparse:
                instance.DimensionOrganizationType = "TILED_SPARSE"
                positions = [_position(level, *divmod(int(frame), places[number])) for frame in frames]
                instance.PerFrameFunctionalGroupsSequence = positions
            written.append(_write(folder, instance, level, [level.frames[i] for i in frames], kind))
    if kind.associated:
        written += [_associated(folder, series, name, kind) for name in ("LABEL", "OVERVIEW", "THUMBNAIL")]
    return written


def _as_it_is(page: Any) -> _Level:
    source = page.parent.filehandle
    frames: list[bytes] = []
    rgb = int(page.photometric) == 2
    for offset, nbytes in zip(page.dataoffsets, page.databytecounts, strict=True):
        source.seek(offset)
        frames.append(source.read(nbytes))
    if int(page.compression) == 7:
        tables = (page.jpegtables or b"").removeprefix(b"\xff\xd8").removesuffix(b"\xff\xd9")
        start = b"\xff\xd8" + (SHORT_ADOBE if rgb else b"") + tables
        frames = [start + frame.removeprefix(b"\xff\xd8") for frame in frames]
        codec, photometric = "jpeg", "RGB" if rgb else "YBR_FULL_422"
    else:
        codec, photometric = "jpeg2000", "YBR_ICT" if int(page.compression) == 33003 else "RGB"
    size = page.imagewidth, page.imagelength
    return _Level(*size, (page.tilewidth, page.tilelength), photometric, codec, frames, [not f for f in frames])


def _recompressed(page: Any, kind: Kind) -> _Level:
    width, height = page.tilewidth, page.tilelength
    pixels, grey = page.asarray(), kind.photometric == "MONOCHROME2"
    rows, columns = -(-pixels.shape[0] // height), -(-pixels.shape[1] // width)
    missing = (0, rows * height - pixels.shape[0]), (0, columns * width - pixels.shape[1]), (0, 0)
    pixels = np.pad(pixels, missing, mode="edge")
    blocks = [
        np.ascontiguousarray(pixels[y : y + height, x : x + width, 1 if grey else slice(None)])
        for y in range(0, rows * height, height)
        for x in range(0, columns * width, width)
    ]
    frames = [encoded(block, kind.codec, kind.photometric) for block in blocks]
    photometric = kind.photometric or ("YBR_FULL_422" if kind.codec == "jpeg" else "RGB")
    size = page.imagewidth, page.imagelength
    return _Level(*size, (width, height), photometric, kind.codec, frames, [bool((b > 235).all()) for b in blocks])


def _repeated(level: _Level, times: int) -> _Level:
    if times == 1:
        return level
    (wide, high), columns = level.tile, level.width // level.tile[0]
    assert (level.width % wide, level.height % high) == (0, 0), "frames can't be repeated that end outside"
    order = np.tile(np.arange(len(level.frames)).reshape(-1, columns), (times, times)).ravel().tolist()
    frames, empty = [level.frames[i] for i in order], [level.empty[i] for i in order]
    return replace(level, width=level.width * times, height=level.height * times, frames=frames, empty=empty)


def _with_further_planes(level: _Level, planes: int) -> _Level:
    black = [b"\0" * len(level.frames[0])] * (len(level.frames) * (planes - 1))
    return replace(level, frames=level.frames + black, empty=level.empty * planes)


def encoded(block: NDArray[np.uint8], codec: str, photometric: str) -> bytes:
    """A frame of uint8 (h, w, 3) or (h, w)."""
    match codec:
        case "none":
            return block.tobytes()
        case "jpeg":
            space = "RGB" if photometric == "RGB" else None
            return imagecodecs.jpeg8_encode(
                block, 90, colorspace=space and "RGB", outcolorspace=space, subsampling="444"
            )
        case "jpegls":
            return imagecodecs.jpegls_encode(block)
        case "jpeg2000":
            mct = photometric in ("YBR_ICT", "YBR_RCT")
            options: Any = {"reversible": photometric != "YBR_ICT", "level": 45 if photometric == "YBR_ICT" else 0}
            return imagecodecs.jpeg2k_encode(block, codecformat="j2k", mct=mct, resolutions=5, **options)
        case "htj2k":
            return imagecodecs.htj2k_encode(block)
        case _:
            raise AssertionError(codec)


def _order(level: _Level, kind: Kind) -> NDArray[np.int64]:
    """Which of a level's frames are written, in which order."""
    order = np.arange(len(level.frames))
    if not kind.sparse:
        return order
    empty = np.array(level.empty).reshape(kind.planes, -1)
    order = order.reshape(empty.shape)
    kept = ~empty & (order[0] % 5 != 3)
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(plane[there]) for plane, there in zip(order, kept, strict=True)])


def _position(level: _Level, plane: int, frame: int) -> Dataset:
    """The functional groups of a frame, at its place in the level."""
    columns = -(-level.width // level.tile[0])
    place, item = Dataset(), Dataset()
    place.ColumnPositionInTotalImagePixelMatrix = frame % columns * level.tile[0] + 1
    place.RowPositionInTotalImagePixelMatrix = frame // columns * level.tile[1] + 1
    place.ZOffsetInSlideCoordinateSystem = plane / 1000
    item.PlanePositionSlideSequence = [place]
    return item


def _instance(series: str, level: _Level, kind: Kind, number: int, downsample: float) -> Dataset:
    instance = _common(
        series, ["DERIVED" if number else "ORIGINAL", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
    )
    x, y = kind.mpp or (0.25, 0.25)
    spacing, shared = Dataset(), Dataset()
    spacing.PixelSpacing = [f"{y * downsample / 1000:.8g}", f"{x * downsample / 1000:.8g}"]
    shared.PixelMeasuresSequence = [spacing]
    instance.SharedFunctionalGroupsSequence = [shared]
    if kind.icc_nbytes:
        instance.OpticalPathSequence[0].ICCProfile = bytes(kind.icc_nbytes)
        instance["OpticalPathSequence"].is_undefined_length = True  # as the converter writes it
        instance.OpticalPathSequence[0].is_undefined_length_sequence_item = True
    grey = level.photometric.startswith("MONOCHROME")
    values = {
        "Rows": level.tile[1],
        "Columns": level.tile[0],
        "TotalPixelMatrixRows": level.height,
        "TotalPixelMatrixColumns": level.width,
        "TotalPixelMatrixFocalPlanes": kind.planes,
        "ImagedVolumeWidth": level.width * x * downsample / 1000,
        "ImagedVolumeHeight": level.height * y * downsample / 1000,
        "ImagedVolumeDepth": 1.0,
        "SamplesPerPixel": 1 if grey else 3,
        "PhotometricInterpretation": kind.photometric or level.photometric,
    }
    for name, value in values.items():
        setattr(instance, name, value)
    if grey:
        del instance.PlanarConfiguration
    return instance


def _common(series: str, image_type: list[str]) -> Dataset:
    instance, optical = Dataset(), Dataset()
    optical.OpticalPathIdentifier = "1"
    values = {
        "SOPClassUID": VLWholeSlideMicroscopyImageStorage,
        "StudyInstanceUID": uid(series, "study"),
        "SeriesInstanceUID": series,
        "PatientName": PATIENT,
        "PatientID": PATIENT.upper(),
        "Modality": "SM",
        "ImageType": image_type,
        "NumberOfOpticalPaths": 1,
        "DimensionOrganizationType": "TILED_FULL",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "OpticalPathSequence": [optical],
    }
    for name, value in values.items():
        setattr(instance, name, value)
    return instance


def _change(instance: Dataset, kind: Kind) -> None:
    for name, value in kind.changes:
        if value is None:
            delattr(instance, name)
        else:
            setattr(instance, name, value)


def _associated(folder: Path, series: str, name: str, kind: Kind) -> Path:
    pixels, out = np.full((60, 100, 3), 200, np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    last = "RESAMPLED" if name == "THUMBNAIL" else "NONE"
    instance = _common(series, ["ORIGINAL", "PRIMARY", name, last])
    instance.SOPInstanceUID = uid(series, name)
    level = _Level(100, 60, (100, 60), "YBR_FULL_422", "jpeg", [out.getvalue()], [False])
    values = {"Rows": 60, "Columns": 100, "TotalPixelMatrixRows": 60, "TotalPixelMatrixColumns": 100}
    values |= {"NumberOfFrames": 1, "SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422"}
    for key, value in values.items():
        setattr(instance, key, value)
    return _write(folder, instance, level, level.frames, replace(kind, changes=()))


def _write(folder: Path, instance: Dataset, level: _Level, frames: Sequence[bytes], kind: Kind) -> Path:
    path = folder / f"{uuid.uuid5(uuid.NAMESPACE_OID, instance.SOPInstanceUID)}{kind.suffix}"
    instance.file_meta = meta = FileMetaDataset()
    lossy = instance.PhotometricInterpretation == "YBR_ICT"
    meta.TransferSyntaxUID = SYNTAXES["lossy jpeg2000" if lossy else level.codec]
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
    if level.codec == "none":
        instance.PixelData = b"".join(frames)
        instance["PixelData"].VR = "OB"
    elif kind.tables == "extended":
        content, table, lengths = encapsulate_extended(list(frames))
        instance.PixelData, instance.ExtendedOffsetTable, instance.ExtendedOffsetTableLengths = content, table, lengths
    else:
        instance.PixelData = encapsulate(list(frames), has_bot=kind.tables == "basic")
    instance["PixelData"].is_undefined_length = level.codec != "none"
    _change(instance, kind)
    dcmwrite(path, instance, enforce_file_format=True)
    if "tiff" in kind.tables and level.codec != "none":
        add_tiff(path, [len(frame) for frame in frames], level, big="big" in kind.tables)
    return path


def frame_places(content: bytes | bytearray, lengths: Sequence[int]) -> list[int]:
    """Where the frames of an encapsulated object lie that has no offset table, by their lengths."""
    at = content.index(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff") + 12 + 8
    places: list[int] = []
    for length in lengths:
        assert content[at : at + 4] == b"\xfe\xff\x00\xe0"
        places.append(at + 8)
        at += 8 + length + length % 2
    return places


def add_tiff(path: Path, lengths: Sequence[int], level: _Level, *, big: bool) -> None:
    """Makes a DICOM file a TIFF as well: a header in the preamble, a directory behind the pixels."""
    content = bytearray(path.read_bytes())
    offsets = frame_places(content, lengths)
    number, size = ("Q", 16) if big else ("I", 13)
    compression = {"jpeg": 7, "jpeg2000": 33005, "htj2k": 33005}.get(level.codec, 1)
    tags: list[tuple[int, str, Sequence[int]]] = [
        (254, "I", [0]),
        (256, "I", [level.width]),
        (257, "I", [level.height]),
        (258, "H", [8, 8, 8]),
        (259, "H", [compression]),
        (262, "H", [2 if level.photometric == "RGB" else 6]),
        (277, "H", [3]),
        (284, "H", [1]),
        (322, "I", [level.tile[0]]),
        (323, "I", [level.tile[1]]),
        (324, number, offsets),
        (325, "I", list(lengths)),
    ]
    at = len(content) + 12  # behind the tag of the trailing padding
    word = 8 if big else 4
    entries, values = bytearray(), bytearray()
    head = struct.pack("<Q" if big else "<H", len(tags))
    values_at = at + len(head) + len(tags) * (20 if big else 12) + word
    kinds = {"H": 3, "I": 4, "Q": size}
    for code, form, numbers in tags:
        raw = struct.pack(f"<{len(numbers)}{form}", *numbers)
        entries += struct.pack("<HHQ" if big else "<HHI", code, kinds[form], len(numbers))
        if len(raw) <= word:
            entries += raw.ljust(word, b"\0")
        else:
            entries += struct.pack("<Q" if big else "<I", values_at + len(values))
            values += raw + b"\0" * (len(raw) % 2)
    padding = head + bytes(entries) + bytes(word) + bytes(values)
    padding += b"\0" * (len(padding) % 2)
    content += struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, len(padding)) + padding
    content[:128] = (struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) if big else struct.pack("<2sHI", b"II", 42, at)).ljust(
        128, b"\0"
    )
    path.write_bytes(content)
