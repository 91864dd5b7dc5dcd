"""Broken and hostile slides: whatever the bytes, a read ends in pixels of the right shape or a TilestreamError.

A case is a number: (seed, case) decides the slide and its mutations. Worker processes run the cases under a memory
bound; the parent gives each case ten seconds, and a hang or crash costs that one worker and is that case's failure.

    python -m tests.streaming.slide.test_fuzz --cases 20000            the long run; prints each failure, exit status 1
    python -m tests.streaming.slide.test_fuzz --case 417 --seed 0      one case, in this process, with its traceback
    python -m tests.streaming.slide.test_fuzz --case 417 --keep a      its files in a folder, too (--dry: only that)
    python -m tests.streaming.slide.test_fuzz --format dicom           series of DICOM instead of TIFFs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import queue
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from streaming.errors import TilestreamError
from streaming.slide import open_slide
from tests.streaming.slide import dicom_mutants
from tests.streaming.slide.foreign_blocks import FOREIGN, foreign_block
from tests.tiff_files import TiffSlide, level_pixels, restyled, tiff_bytes

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared/data"
CASE_S = 10.0
START_S = 240.0  # for a worker's imports
MEMORY_BYTES = 4 * 2**30
READ_PX = 200

MADE = (
    TiffSlide(downsamples=(1, 2), associated=True),
    TiffSlide(compression="jpeg-rgb", shared_tables=False, block=(128, 128)),
    TiffSlide(vendor="generic", subsampling=(2, 1), downsamples=(1, 4), bigtiff=True),
    TiffSlide(vendor="philips", subsampling=(1, 1), downsamples=(1, 2)),
    TiffSlide(compression="jp2k-rgb", block=(128, 128), downsamples=(1, 2)),
    TiffSlide(compression="jp2k-ycbcr", downsamples=(1, 2)),  # blocks that are large enough to be decoded in part
    TiffSlide(vendor="generic", compression="lzw", predictor=True, byte_order=">", bigtiff=True, downsamples=(1, 2)),
    TiffSlide(vendor="generic", compression="deflate", predictor=True, downsamples=(1, 2), shuffled=True, gap=9),
    TiffSlide(compression="deflate", byte_order=">"),
    TiffSlide(compression="none", block=(64, 64), empty=((0, 3),), shared=((0, 5, 4),)),
    TiffSlide(vendor="ome", compression="deflate", downsamples=(1, 2, 4)),
    TiffSlide(vendor="ome", downsamples=(1, 2), bigtiff=True),
    TiffSlide(downsamples=(1, 2, 4), block=(64, 64), empty=((0, 30), (1, 3), (2, 0))),
)
_RGB = level_pixels(MADE[0], 0)[:300, :400]
_WIDE = _RGB.astype(np.uint16) * 257
# What `tests.tiff_files` doesn't write, tifffile does: pixels and options of a page.
WRITTEN: tuple[tuple[np.ndarray, dict[str, Any]], ...] = (
    (_RGB, {"compression": "zstd", "predictor": True}),
    (_RGB, {"compression": "lzma"}),
    (_RGB, {"compression": "packbits"}),
    (_RGB, {"compression": "webp"}),
    (_RGB, {"compression": "jpegxl", "compressionargs": {"effort": 1}}),
    (_RGB, {"compression": "jpeg2000"}),
    (_WIDE, {"compression": "zlib", "predictor": True, "byteorder": ">"}),
    (_WIDE.transpose(2, 0, 1).copy(), {"compression": "zstd", "planarconfig": "separate"}),
    (np.dstack([_RGB, _RGB[..., 0]]), {"compression": "lzw", "extrasamples": ["unassalpha"]}),
    (_RGB[..., 1].copy(), {"compression": "jpeg", "photometric": "minisblack"}),
)
REAL = tuple(path for name in ("CMU-1-crop.svs", "TCGA-CR-7395-TS1.svs") if (path := DATA / name).exists())
ABSURD = (0, 1, 2, 3, 7, 15, 17, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class Entry:
    """One tag of an intact file: where it and its values lie."""

    code: int
    kind: int
    count: int
    at: int
    values_at: int


@dataclass(frozen=True)
class Layout:
    """The structure of an intact file, as tifffile finds it."""

    data: bytes
    order: str
    big: bool
    ifds: tuple[int, ...]
    links: tuple[int, ...]  # where the offset of a next directory is written
    entries: tuple[Entry, ...]
    blocks: tuple[tuple[Entry, Entry, tuple[int, ...], tuple[int, ...]], ...]  # offset and count tags, and values
    compression: int
    block: tuple[int, int]  # width and height of the first level's blocks


def layout(data: bytes) -> Layout:
    """Parses an intact file."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        order, big = tiff.byteorder, tiff.is_bigtiff
        ifds, links, entries, blocks = [], [8 if big else 4], [], []
        pages = [page for top in tiff.pages for page in (top, *(top.pages or ()))]
        for page in pages:
            found = {}
            for tag in page.tags:
                at = Entry(int(tag.code), int(tag.dtype), int(tag.count), tag.offset, tag.valueoffset)
                found[at.code] = at
            ifds.append(page.offset)
            entries += found.values()
            links.append(page.offset + (8 + 20 * len(page.tags) if big else 2 + 12 * len(page.tags)))
            if page.is_tiled:
                blocks.append((found[324], found[325], tuple(page.dataoffsets), tuple(page.databytecounts)))
        return Layout(
            data,
            order,
            big,
            tuple(ifds),
            tuple(links),
            tuple(entries),
            tuple(blocks),
            int(pages[0].compression),
            (pages[0].tilewidth, pages[0].tilelength),
        )


@cache
def intact(index: int) -> Layout:
    """The slide that mutations start from."""
    if index < len(MADE):
        return layout(tiff_bytes(MADE[index]))
    if index < len(MADE) + len(WRITTEN):
        pixels, options = WRITTEN[index - len(MADE)]
        return layout(written(pixels, **options))
    return layout(REAL[index - len(MADE) - len(WRITTEN)].read_bytes())


def written(pixels: np.ndarray, byteorder: str = "<", **options: Any) -> bytes:
    """A slide by tifffile, its second level in a SubIFD."""
    smaller = pixels[..., ::2, ::2].copy() if options.get("planarconfig") else pixels[::2, ::2].copy()
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=byteorder, bigtiff=True) as tiff:
        for number, page in enumerate((pixels, smaller)):
            place = {"subfiletype": 1} if number else {"subifds": 1}
            tiff.write(page, **{"tile": (128, 128), "photometric": "rgb", "metadata": None, **place, **options})
    return file.getvalue()


@dataclass
class Mutant:
    """A file under mutation; `done` tells what was done to it."""

    base: Layout
    rng: np.random.Generator
    data: bytearray
    done: list[str] = field(default_factory=list)

    def one(self, options):
        """One of several, at random."""
        return options[int(self.rng.integers(len(options)))]

    def put(self, at: int, form: str, value: int) -> None:
        """Overwrites a number, cut to its width; nothing where a truncation took the place away."""
        size = struct.calcsize(self.base.order + form)
        if 0 <= at <= len(self.data) - size:
            struct.pack_into(self.base.order + form, self.data, at, value % (1 << (8 * size)))

    def put_address(self, at: int, value: int) -> None:
        """Overwrites an offset or count as wide as this file's."""
        self.put(at, "Q" if self.base.big else "I", value)

    def put_value(self, entry: Entry, index: int, value: int) -> None:
        """Overwrites one value of a tag."""
        size = SIZES.get(entry.kind, 1)
        form = {1: "B", 2: "H", 4: "I", 8: "Q"}[4 if entry.kind in (5, 10) else size]
        self.put(entry.values_at + index * size, form, value)

    def block(self) -> tuple[Entry, Entry, int, int, int]:
        """Offset tag, count tag, index, offset, byte count of some block."""
        offsets, counts, at, nbytes = self.one(self.base.blocks)
        # The blocks that the reads touch are among the first.
        index = int(self.rng.integers(len(at) if self.rng.random() < 0.5 else min(2, len(at))))
        return offsets, counts, index, at[index], nbytes[index]

    def write(self, folder: Path) -> Path:
        """Writes it into a folder; gives the file to open."""
        path = folder / "case.svs"
        path.write_bytes(self.data)
        return path

    def replace_block(self, content: bytes) -> None:
        """Points a block (or all of its level) at other bytes, appended to the file."""
        offsets, counts, index, _, _ = self.block()
        every = self.rng.random() < 0.5
        at = len(self.data)
        self.data += content
        for i in range(offsets.count) if every else (index,):
            self.put_value(offsets, i, at)
            self.put_value(counts, i, len(content))


def truncate(m: Mutant) -> str:
    edge = m.one(m.base.ifds) if m.rng.random() < 0.3 else int(m.rng.integers(len(m.data) + 1))
    cut = min(len(m.data), max(0, edge + int(m.rng.integers(-8, 200))))
    del m.data[cut:]
    return f"cut to {cut} bytes"


def flip_bytes(m: Mutant) -> str:
    num = int(m.rng.integers(1, 12))
    for _ in range(num):
        kind, entry = m.rng.random(), m.one(m.base.entries)
        if kind < 0.3:
            at = int(m.rng.integers(1024))
        elif kind < 0.5:
            at = entry.at + int(m.rng.integers(20 if m.base.big else 12))
        elif kind < 0.8:
            at = entry.values_at + int(m.rng.integers(max(1, min(entry.count * SIZES.get(entry.kind, 1), 4096))))
        else:
            at = int(m.rng.integers(max(1, len(m.data))))
        if at < len(m.data):
            m.data[at] ^= int(m.rng.integers(1, 256))
    return f"{num} bytes flipped"


def break_block(m: Mutant) -> str:
    _, _, index, at, nbytes = m.block()
    for _ in range(int(m.rng.integers(1, 20))):
        place = at + int(m.rng.integers(max(1, min(nbytes, 700 if m.rng.random() < 0.6 else nbytes))))
        if place < len(m.data):
            m.data[place] = int(m.rng.integers(256))
    return f"bytes of block {index} overwritten"


def far_offset(m: Mutant) -> str:
    offsets, _, index, _, _ = m.block()
    value = m.one((len(m.data), len(m.data) - 1, len(m.data) + 10, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 0, 1))
    m.put_value(offsets, index, value)
    return f"offset of block {index} = {value}"


def far_values(m: Mutant) -> str:
    entry = m.one(m.base.entries)
    value = m.one((len(m.data), len(m.data) - 2, 2**31, 2**32 - 1, 2**64 - 1, 0))
    m.put_address(entry.at + (12 if m.base.big else 8), value)
    return f"values of tag {entry.code} at {value}"


def loop_ifds(m: Mutant) -> str:
    link, target = m.one(m.base.links), m.one((*m.base.ifds, len(m.data) - 1, 2**32 - 1))
    for entry in m.base.entries:
        if entry.code == 330 and m.rng.random() < 0.5:
            m.put_value(entry, int(m.rng.integers(entry.count)), target)
            return f"SubIFD at {target}"
    m.put_address(link, target)
    return f"next directory at {target}"


def absurd_value(m: Mutant) -> str:
    codes = (256, 257, 258, 259, 262, 277, 284, 317, 322, 323, 339, 530, 254)
    entry = m.one([entry for entry in m.base.entries if entry.code in codes])
    index, value = int(m.rng.integers(min(entry.count, 4))), int(m.one(ABSURD))
    m.put_value(entry, index, value)
    return f"tag {entry.code}[{index}] = {value}"


def absurd_count(m: Mutant) -> str:
    entry, value = m.one(m.base.entries), int(m.one((*ABSURD, 2**40, 2**63)))
    m.put_address(entry.at + 4, value)
    return f"count of tag {entry.code} = {value}"


def other_type(m: Mutant) -> str:
    entry, value = m.one(m.base.entries), int(m.one((0, 1, 2, 3, 4, 5, 7, 12, 13, 16, 99, 65535)))
    m.put(entry.at + 2, "H", value)
    return f"type of tag {entry.code} = {value}"


def other_tag(m: Mutant) -> str:
    entry, value = m.one(m.base.entries), m.one(m.base.entries).code
    m.put(entry.at, "H", value)
    return f"tag {entry.code} becomes {value}"


def odd_byte_count(m: Mutant) -> str:
    _, counts, index, _, nbytes = m.block()
    value = int(m.one((0, 1, 2, 3, nbytes // 2, nbytes - 1, nbytes * 3 + 7, len(m.data), 2**31, 2**32 - 1)))
    m.put_value(counts, index, value)
    return f"byte count of block {index} = {value}"


def overlap(m: Mutant) -> str:
    offsets, _, index, at, nbytes = m.block()
    value = max(0, at + int(m.rng.integers(-nbytes, nbytes + 1)))
    m.put_value(offsets, index, value)
    return f"block {index} moved from {at} to {value}"


OWN = {
    **{7: "jpeg", 33003: "jpeg 2000", 33005: "jpeg 2000", 34712: "jpeg 2000", 8: "deflate", 5: "lzw"},
    **{50000: "zstd", 50001: "webp", 50002: "jpeg xl", 34925: "lzma", 32773: "packbits"},
}


def swap_block(m: Mutant) -> str:
    # Mostly of the slide's own codec: others are refused at the first byte.
    own = OWN.get(m.base.compression, "zeros")
    same = [kind for kind in FOREIGN if kind.endswith(own)]
    kind = m.one(same if m.rng.random() < 0.7 else FOREIGN)
    m.replace_block(foreign_block(kind))
    return f"a block is a {kind}"


@cache
def deflate_bomb(gib: int) -> bytes:
    """A stream of zeros that inflates to that many GiB; its checksum is wrong, but it comes after them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = [packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)][1]
    return b"\x78\xda" + part * (gib * 64) + b"\x03\x00" + bytes(4)


def jpeg_bomb(m: Mutant) -> bytes:
    """A tiny JPEG whose header claims up to 65500 × 65500 px, baseline or progressive, one to four components."""
    base = foreign_block(m.one(("small jpeg", "grey jpeg", "cmyk jpeg")))
    at = base.index(b"\xff\xc0")
    height, width = (int(m.one((65500, 65535, 20000, 1, 0))) for _ in range(2))
    header = base[:at] + bytes([0xFF, int(m.one((0xC0, 0xC2, 0xC1, 0xC9)))]) + base[at + 2 : at + 5]
    scan = base.index(b"\xff\xda")
    scans = base[scan:-2] * int(m.one((1, 1, 200)))
    return header + struct.pack(">HH", height, width) + base[at + 9 : scan] + scans + b"\xff\xd9"


def jpeg_2000_bomb(m: Mutant) -> bytes:
    """A small JPEG 2000 that lies about image, tile or component sizes (SIZ), or of how many parts it is (COD)."""
    block = foreign_block(m.one(("small jpeg 2000", "grey jpeg 2000", "subsampled jpeg 2000")))
    if m.rng.random() < 0.4:
        side, layers = int(m.one((1, 2, 4, 8, 32, 2**15))), int(m.one((1, 1, 50, 65535)))
        block = restyled(block, precinct=side, code_block=int(m.one((4, 16, 64, 1024))), layers=layers)
        if m.rng.random() < 0.7:
            data = bytearray(block)
            for at in (8, 24):  # image and tile, of the size that the level's blocks have
                struct.pack_into(">II", data, at, *m.base.block)
            return bytes(data)
    data = bytearray(block)
    # After SOC, SIZ, Lsiz and Rsiz: Xsiz Ysiz XOsiz YOsiz XTsiz YTsiz XTOsiz YTOsiz, 4 bytes each, then Csiz.
    for _ in range(int(m.rng.integers(1, 4))):
        if m.rng.random() < 0.8:
            struct.pack_into(">I", data, 8 + 4 * int(m.rng.integers(8)), int(m.one(ABSURD)))
        else:
            struct.pack_into(">H", data, 40, int(m.one((0, 1, 2, 4, 255, 16384, 65535))))
    if m.rng.random() < 0.3:
        struct.pack_into(">II", data, 8, 65500, 65500)
        struct.pack_into(">II", data, 24, int(m.one((64, 65500))), int(m.one((64, 65500))))
    return bytes(data)


def bomb(m: Mutant) -> str:
    kind = OWN.get(m.base.compression, "jpeg")
    if kind == "deflate":
        m.replace_block(deflate_bomb(int(m.one((1, 6)))))
    else:
        m.replace_block(jpeg_2000_bomb(m) if kind == "jpeg 2000" else jpeg_bomb(m))
    return f"a {kind} bomb"


def lie_in_place(m: Mutant) -> str:
    """Size fields of a block's own header, so that tables and all else stay valid."""
    _, _, index, at, nbytes = m.block()
    block = bytes(m.data[at : at + nbytes])
    if m.base.compression == 7 and (sof := block.find(b"\xff\xc0")) >= 0:
        struct.pack_into(">HH", m.data, at + sof + 5, *(int(m.one((0, 1, 8, 17, 300, 65500))) for _ in range(2)))
    elif block[:4] == b"\xff\x4f\xff\x51" and nbytes > 50:
        struct.pack_into(">I", m.data, at + 8 + 4 * int(m.rng.integers(8)), int(m.one(ABSURD)))
    else:
        return break_block(m)
    return f"header of block {index} lies about its size"


MUTATIONS: tuple[tuple[Callable[[Mutant], str], float], ...] = (
    (truncate, 2),
    (flip_bytes, 4),
    (break_block, 2),
    (far_offset, 1),
    (far_values, 1),
    (loop_ifds, 1),
    (absurd_value, 3),
    (absurd_count, 1.5),
    (other_type, 1),
    (other_tag, 0.5),
    (odd_byte_count, 1.5),
    (overlap, 1),
    (swap_block, 2),
    (bomb, 1.5),
    (lie_in_place, 1.5),
)


def mutant(seed: int, case: int) -> Mutant:
    """The file of a case."""
    rng = np.random.default_rng((seed, case))
    # Real slides are read and written whole, so they come less often.
    weights = np.array([1.0] * (len(MADE) + len(WRITTEN)) + [0.6] * len(REAL))
    base = intact(int(rng.choice(len(weights), p=weights / weights.sum())))
    made = Mutant(base, rng, bytearray(base.data))
    chances = np.array([weight for _, weight in MUTATIONS])
    for index in rng.choice(
        len(MUTATIONS), size=int(rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1))), p=chances / chances.sum()
    ):
        made.done.append(MUTATIONS[index][0](made))
    return made


FORMATS: dict[str, tuple[Callable[[int, int], Any], int]] = {
    "tiff": (mutant, len(MADE) + len(WRITTEN) + len(REAL)),
    "dicom": (dicom_mutants.mutant, len(dicom_mutants.KINDS) + len(dicom_mutants.REALS)),
}
"""By format, what makes a case, and from how many intact slides."""


def read_some(path: Path, rng: np.random.Generator) -> None:
    """Opens a slide and reads some regions and tiles.

    Each read may fail by a TilestreamError without sparing the others; the last one is raised at the end.
    """
    slide = open_slide(str(path), mpp=0.25)
    failed: TilestreamError | None = None
    levels = len(slide.level_dimensions)
    places = [((0, 0), 0), ((-50, -70), 0), ((0, 0), levels - 1)]
    for _ in range(2):
        level = int(rng.integers(levels))
        width, height = slide.level_dimensions[0]
        places.append(((int(rng.integers(max(1, width))), int(rng.integers(max(1, height)))), level))
    for location, level in places:
        try:
            region = slide.read_region(location, level, (READ_PX, READ_PX))
            assert region.shape == (READ_PX, READ_PX, 3), f"region of shape {region.shape}"
            assert region.dtype == np.uint8
        except TilestreamError as error:
            failed = error
    for mpp in (0.25, 1.0):
        try:
            tile = slide.read_tile(int(rng.integers(300)), int(rng.integers(300)), mpp, 96)
            assert tile.shape == (96, 96, 3), f"tile of shape {tile.shape}"
        except TilestreamError as error:
            failed = error
    slide.close()
    if failed is not None:
        raise failed


def run_case(form: str, seed: int, case: int, folder: Path) -> str:
    """Runs a case here; "pixels" or "refused", else what was wrong."""
    path = FORMATS[form][0](seed, case).write(folder)
    try:
        read_some(path, np.random.default_rng((seed, case, 1)))
    except TilestreamError as error:
        return "refused" if "Doe" not in str(error) else f"it tells a patient's name: {error}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return f"{type(error).__name__}: {str(error)[:200]} at {where}"
    return "pixels"


def limit_memory() -> None:
    """Bounds the address space to what is mapped now and MEMORY_BYTES more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def work(form: str, seed: int, folder: Path) -> None:
    """A worker: case numbers on stdin; a line on stdout as each one starts and ends."""
    for index in range(FORMATS[form][1]):
        (intact if form == "tiff" else dicom_mutants.intact)(index)
    for kind in FOREIGN:
        foreign_block(kind)
    for gib in (1, 6):
        deflate_bomb(gib)
    limit_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_case(form, seed, int(line), folder)) + "\n")
        sys.stdout.flush()


class Worker:
    """A worker process; the thread that reads its lines lets the parent wait with a bound."""

    def __init__(self, form: str, seed: int, folder: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.streaming.slide.test_fuzz",
            "--worker",
            str(folder),
            *("--seed", str(seed), "--format", form),
        ]
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.lines: queue.Queue[str] = queue.Queue()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        if self.lines.get(timeout=START_S) != "ready\n":
            self.close()
            raise RuntimeError(f"the worker didn't start: {self.complaint()}")

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def complaint(self) -> str:
        """The end of its standard error."""
        return self.errors.read_bytes()[-300:].decode(errors="replace").strip().replace("\n", " | ")

    def run(self, case: int) -> str | None:
        """The outcome of a case; None where the process is gone, "hang" where it doesn't answer."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{case}\n")
            self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=CASE_S)
        except queue.Empty:
            return "hang"
        return json.loads(line) if line else None

    def close(self) -> None:
        """Ends this process and lets go of its pipes."""
        self.process.kill()
        self.process.wait()
        self.thread.join()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def fuzz(form: str, seed: int, cases: range) -> Iterator[tuple[int, str]]:
    """(case, outcome) of each case; "pixels" and "refused" are the permitted ones."""
    with tempfile.TemporaryDirectory() as folder:
        worker: Worker | None = None
        try:
            for case in cases:
                worker = worker or Worker(form, seed, Path(folder))
                outcome = worker.run(case)
                if outcome is None or outcome == "hang":
                    dead = worker
                    worker = None
                    dead.close()
                    code = dead.process.returncode
                    outcome = f"no answer in {CASE_S:.0f} s" if outcome else f"crash, status {code}: {dead.complaint()}"
                yield case, outcome
        finally:
            if worker is not None:
                worker.close()


def explain(form: str, seed: int, case: int, outcome: str) -> str:
    """One line that says how to see a failure again."""
    done = "; ".join(FORMATS[form][0](seed, case).done)
    again = f"python -m tests.streaming.slide.test_fuzz --format {form} --case {case} --seed {seed}"
    return f"case {case} ({done}): {outcome}\n  {again}"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_no_broken_slide_gives_more_than_pixels_or_our_own_error(form: str) -> None:
    failures, counts = [], Counter()
    for case, outcome in fuzz(form, 0, range(100)):
        counts[outcome if outcome in ("pixels", "refused") else "failed"] += 1
        if outcome not in ("pixels", "refused"):
            failures.append(explain(form, 0, case, outcome))
    assert not failures, f"{dict(counts)}\n" + "\n".join(failures)
    assert min(counts["pixels"], counts["refused"]) > 10, f"the fuzzer has lost its edge: {dict(counts)}"


def test_a_case_is_the_same_bytes_every_time_and_cases_differ() -> None:
    files = [bytes(mutant(0, case).data) for case in range(30)]
    assert files == [bytes(mutant(0, case).data) for case in range(30)]
    assert len(set(files)) == 30


def test_every_slide_that_cases_start_from_reads_while_intact(tmp_path: Path) -> None:
    for index in range(len(MADE) + len(WRITTEN)):
        path = tmp_path / f"{index}.svs"
        path.write_bytes(intact(index).data)
        read_some(path, np.random.default_rng(0))


def main() -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, default="tiff")
    parser.add_argument("--case", type=int, help="run this one here, under the memory bound")
    parser.add_argument("--keep", type=Path, help="with --case: where to write its files")
    parser.add_argument("--dry", action="store_true", help="with --case: don't read it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args.format, args.seed, args.worker)
        return 0
    if args.case is not None:
        made = FORMATS[args.format][0](args.seed, args.case)
        sys.stdout.write("; ".join(made.done) + "\n")
        if args.keep:
            args.keep.mkdir(exist_ok=True)
            made.write(args.keep)
        if not args.dry:
            limit_memory()
            with tempfile.TemporaryDirectory() as folder:
                path = made.write(Path(folder))
                read_some(path, np.random.default_rng((args.seed, args.case, 1)))
        return 0
    counts: Counter[str] = Counter()
    for case, outcome in fuzz(args.format, args.seed, range(args.first, args.first + args.cases)):
        kind = outcome if outcome in ("pixels", "refused") else "failed"
        counts[kind] += 1
        if kind == "failed":
            sys.stdout.write(explain(args.format, args.seed, case, outcome) + "\n")
        if (case + 1) % 500 == 0:
            sys.stdout.write(f"after case {case}: {dict(counts)}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{dict(counts)}\n")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
