"""DICOM series for `test_fuzz`, broken by chance: (seed, case) decides the series and what is done to it."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom.tag import Tag

from tests.dicom_files import Kind, write_series
from tests.streaming.slide.foreign_blocks import FOREIGN, foreign_block
from tests.tiff_files import TiffSlide, tiff_bytes

KINDS = (
    Kind(),
    Kind(tables="big tiff", associated=False),
    Kind(tables="basic"),
    Kind(tables="extended", associated=False),
    Kind(tables="none", associated=False),
    Kind(sparse=True),
    Kind(sparse=True, tables="none", associated=False),
    Kind(parts=2, associated=False),
    Kind(codec="none", associated=False),
    Kind(codec="jpeg2000", tables="basic", associated=False),
    Kind(codec="htj2k", tables="none", associated=False),
    Kind(codec="jpegls", associated=False),
    Kind(codec="jpeg2000", photometric="MONOCHROME2", associated=False),
    Kind(icc_nbytes=20_000, associated=False),
)
SOURCE = TiffSlide(downsamples=(1, 2), block=(64, 64), subsampling=(1, 1))
REAL = Path(__file__).parents[4] / "shared/data/dicom"
REALS = tuple(path for name in ("google_jpeg", "hd_sm_image") for path in REAL.glob(f"{name}.*"))
ABSURD = (0, 1, 2, 3, 7, 63, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**40, 2**64 - 1)
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
NUMBERS = {b"US": "H", b"UL": "I", b"OV": "Q", b"UV": "Q", b"SS": "h", b"SL": "i"}
TOLD = ("Rows", "Columns", "TotalPixelMatrixRows", "TotalPixelMatrixColumns", "NumberOfFrames", "SamplesPerPixel")
TOLD += ("BitsAllocated", "BitsStored", "PlanarConfiguration", "TotalPixelMatrixFocalPlanes", "PixelSpacing")
TOLD += ("ConcatenationFrameOffsetNumber", "InConcatenationTotalNumber", "ImageType", "PhotometricInterpretation")
TOLD += ("ColumnPositionInTotalImagePixelMatrix", "RowPositionInTotalImagePixelMatrix", "SeriesInstanceUID")
TOLD += ("DimensionOrganizationType", "SOPInstanceUID", "TransferSyntaxUID", "ExtendedOffsetTable")
TOLD += ("ExtendedOffsetTableLengths", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


@dataclass(frozen=True)
class Element:
    """One element of an intact file."""

    keyword: str
    vr: bytes
    at: int
    length_at: int
    """where its length is written"""
    value_at: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where things are in an intact file."""

    data: bytes
    elements: tuple[Element, ...]
    items: tuple[int, ...]
    """of its pixels"""
    pixels_at: int


def layout(data: bytes) -> Layout:
    """Finds elements, those in sequences too, and items of an intact file of explicit VRs."""
    elements: list[Element] = []
    at = _scan(data, 132, len(data), elements)
    items: list[int] = []
    while data[at : at + 4] == b"\xfe\xff\x00\xe0":
        items.append(at)
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    return Layout(data, tuple(elements), tuple(items), elements[-1].value_at)


def _scan(data: bytes, at: int, end: int, elements: list[Element]) -> int:
    while at < end:
        group, number, vr = struct.unpack_from("<HH2s", data, at)
        if (group, number) in ((0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)):
            at += 8  # an item, or the end of one or of a sequence: what is within follows
            continue
        length_at = at + (8 if vr in LONG else 6)
        value_at = length_at + (4 if vr in LONG else 2)
        length = int.from_bytes(data[length_at:value_at], "little")
        keyword = pydicom.datadict.keyword_for_tag(Tag(group, number))
        elements.append(Element(keyword, vr, at, length_at, value_at, length))
        if keyword == "PixelData":
            return value_at
        at = value_at if vr == b"SQ" else value_at + length
    return at


@cache
def intact(index: int) -> tuple[str, dict[str, Layout]]:
    """The series that mutations start from: the file to open, and all by name."""
    if index >= len(KINDS):
        path = REALS[index - len(KINDS)]
        return path.name, {path.name: layout(path.read_bytes())}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.svs")
        source.write_bytes(tiff_bytes(SOURCE))
        paths = write_series(Path(folder, "series"), source, KINDS[index])
        return paths[0].name, {path.name: layout(path.read_bytes()) for path in paths}


@dataclass
class SeriesMutant:
    """A series under mutation; `done` tells what was done to it."""

    first: str
    base: dict[str, Layout]
    rng: np.random.Generator
    files: dict[str, bytearray]
    done: list[str] = field(default_factory=list)

    def one(self, options):
        """One of several, at random."""
        return options[int(self.rng.integers(len(options)))]

    def file(self) -> tuple[bytearray, Layout]:
        """One of the files, that of the first level more often."""
        name = self.first if self.rng.random() < 0.6 else self.one(list(self.base))
        return self.files.setdefault(name, bytearray()), self.base[name]

    def element(self, found: Layout) -> Element:
        """An element, those that we read more often."""
        told = [element for element in found.elements if element.keyword in TOLD]
        return self.one(told if told and self.rng.random() < 0.7 else found.elements)

    def write(self, folder: Path) -> Path:
        """Writes it into a folder of its own; gives the file to open."""
        for path in folder.glob("case/*"):
            path.unlink()
        (folder / "case").mkdir(exist_ok=True)
        for name, content in self.files.items():
            (folder / "case" / name).write_bytes(content)
        return folder / "case" / self.first


def put(data: bytearray, at: int, raw: bytes) -> None:
    """Overwrites bytes; nothing where a truncation took the place away."""
    if 0 <= at <= len(data) - len(raw):
        data[at : at + len(raw)] = raw


def truncate(m: SeriesMutant) -> str:
    data, found = m.file()
    edges = [element.at for element in found.elements] + list(found.items) + [len(data)]
    edge = m.one(edges) if m.rng.random() < 0.6 else int(m.rng.integers(len(found.data) + 1))
    cut = min(len(data), max(0, edge + int(m.rng.integers(-12, 40))))
    del data[cut:]
    return f"cut to {cut} bytes"


def flip_bytes(m: SeriesMutant) -> str:
    data, found = m.file()
    num = int(m.rng.integers(1, 12))
    for _ in range(num):
        at = int(m.rng.integers(found.pixels_at + 40 if m.rng.random() < 0.8 else len(found.data)))
        if at < len(data):
            data[at] ^= int(m.rng.integers(1, 256))
    return f"{num} bytes flipped"


def absurd_value(m: SeriesMutant) -> str:
    data, found = m.file()
    element = m.element(found)
    if element.vr in NUMBERS:
        form = NUMBERS[element.vr]
        size = struct.calcsize(form)
        at = element.value_at + size * int(m.rng.integers(max(1, element.length // size)))
        value = int(m.one(ABSURD)) % (1 << 8 * size)
        put(data, at, value.to_bytes(size, "little"))
    else:
        value = m.one(
            (b"", b"0", b"-1", b"nan", b"inf", b"1e99", b"99999999999", b"a\\b\\c\\d", b"TILED_SPARSE", b"\0\0")
        )
        value = bytes(value)[: element.length]
        put(data, element.value_at, value.ljust(element.length, b" ") if element.length < 1000 else value)
    return f"{element.keyword} = {value}"


def absurd_length(m: SeriesMutant) -> str:
    data, found = m.file()
    element = m.element(found)
    size = element.value_at - element.length_at
    value = int(m.one((*ABSURD, element.length - 2, element.length + 2, len(found.data)))) % (1 << 8 * size)
    put(data, element.length_at, value.to_bytes(size, "little"))
    return f"length of {element.keyword} = {value}"


def other_tag(m: SeriesMutant) -> str:
    data, found = m.file()
    element, other = m.element(found), m.element(found)
    put(data, element.at, bytes(found.data[other.at : other.at + (4 if m.rng.random() < 0.7 else 6)]))
    return f"{element.keyword} becomes {other.keyword}"


def without(m: SeriesMutant) -> str:
    data, found = m.file()
    element = m.element(found)
    if len(data) == len(found.data) and element.keyword != "PixelData" and element.length < 2**31:
        del data[element.at : element.value_at + element.length]
    return f"no {element.keyword}"


def lying_item(m: SeriesMutant) -> str:
    data, found = m.file()
    if not found.items:
        return absurd_value(m)
    number = int(m.rng.integers(min(4, len(found.items)) if m.rng.random() < 0.5 else len(found.items)))
    at = found.items[number]
    if m.rng.random() < 0.6:
        value = int(m.one(ABSURD)) % 2**32
        put(data, at + 4, value.to_bytes(4, "little"))
        return f"length of item {number} = {value}"
    put(data, at, m.one((b"\xfe\xff\xdd\xe0", b"\xfe\xff\x0d\xe0", b"\xe0\x7f\x10\x00", bytes(4))))
    return f"item {number} is none"


def nested_items(m: SeriesMutant) -> str:
    data, found = m.file()
    if not found.items:
        return flip_bytes(m)
    at = m.one(found.items)
    for inner in range(at + 8, min(at + 8 + 8 * int(m.rng.integers(1, 200)), len(data) - 8), 8):
        put(data, inner, b"\xfe\xff\x00\xe0" + int(m.one((0, 8, 16, 2**32 - 1))).to_bytes(4, "little"))
    return f"items within the item at {at}"


def deep_sequence(m: SeriesMutant) -> str:
    """Sequences within sequences, without end."""
    data, found = m.file()
    element = m.one([element for element in found.elements if element.vr == b"SQ"] or found.elements)
    depth = int(m.one((1, 10, 1000, 5000)))
    inner = b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x48\x00\x05\x01SQ\0\0\xff\xff\xff\xff" * depth
    del data[element.value_at :]
    put(data, element.length_at, b"\xff" * (element.value_at - element.length_at))
    data += inner if m.rng.random() < 0.5 else inner + found.data[element.value_at :]
    return f"{depth} sequences within {element.keyword}"


def lying_table(m: SeriesMutant) -> str:
    """An entry of the table that tells where frames are: the TIFF's, the basic one, the extended one."""
    data, found = m.file()
    tables = [(e.value_at, e.length, 8) for e in found.elements if e.keyword.startswith("ExtendedOffsetTable")]
    if found.items and int.from_bytes(found.data[found.items[0] + 4 : found.items[0] + 8], "little"):
        tables.append((found.items[0] + 8, found.items[1] - found.items[0] - 8, 4))
    if found.data[:2] == b"II":
        big = found.data[2] == 43
        directory = int.from_bytes(found.data[8:16] if big else found.data[4:8], "little")
        tables.append((directory, len(found.data) - directory, 4))
        tables.append((0, 16, 4))
    if not tables:
        return absurd_length(m)
    start, nbytes, size = m.one(tables)
    place = (
        start + size * int(m.rng.integers(max(1, nbytes // size))) + (2 if start and size == 4 and nbytes > 400 else 0)
    )
    before = int.from_bytes(found.data[place : place + size], "little")
    value = int(m.one((*ABSURD, before + 1, before * 2, max(0, before - 8), len(found.data)))) % (1 << 8 * size)
    put(data, place, value.to_bytes(size, "little"))
    return f"table at {place}: {before} = {value}"


def other_frame(m: SeriesMutant) -> str:
    """A frame that is of another size, or another kind."""
    data, found = m.file()
    if len(found.items) < 2:
        return flip_bytes(m)
    at = m.one(found.items[1:])
    nbytes = int.from_bytes(found.data[at + 4 : at + 8], "little")
    kind = m.one(FOREIGN)
    put(data, at + 8, foreign_block(kind)[:nbytes].ljust(nbytes, b"\0"))
    return f"the frame at {at} is a {kind}"


def missing_file(m: SeriesMutant) -> str:
    names = [name for name in m.files if name != m.first]
    if not names:
        return truncate(m)
    name = m.one(names)
    del m.files[name]
    return f"no {name}"


def second_version(m: SeriesMutant) -> str:
    """A copy of a file, as it is or with another UID."""
    _, found = m.file()
    copy = bytearray(found.data)
    if m.rng.random() < 0.7:
        for element in found.elements:
            if element.keyword == "SOPInstanceUID":
                copy[element.value_at + element.length - 2] ^= 1
    m.files["copy.dcm"] = copy
    return "a second version"


MUTATIONS: tuple[tuple[Callable[[SeriesMutant], str], float], ...] = (
    (truncate, 2),
    (flip_bytes, 3),
    (absurd_value, 4),
    (absurd_length, 3),
    (other_tag, 1.5),
    (without, 1.5),
    (lying_item, 2),
    (nested_items, 1),
    (deep_sequence, 0.5),
    (lying_table, 4),
    (other_frame, 1.5),
    (missing_file, 0.7),
    (second_version, 0.7),
)


def mutant(seed: int, case: int) -> SeriesMutant:
    """The series of a case."""
    rng = np.random.default_rng((seed, case))
    first, base = intact(int(rng.integers(len(KINDS) + len(REALS))))
    made = SeriesMutant(first, base, rng, {name: bytearray(found.data) for name, found in base.items()})
    chances = np.array([weight for _, weight in MUTATIONS])
    for index in rng.choice(
        len(MUTATIONS), size=int(rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1))), p=chances / chances.sum()
    ):
        made.done.append(MUTATIONS[index][0](made))
    return made
