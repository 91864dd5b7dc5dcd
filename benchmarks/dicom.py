"""A slide as DICOM beside the same slide as SVS: CPU and requests of a tile, and what cataloguing a series takes.

The series is as the Imaging Data Commons has them: the SVS's own blocks, five files, each a TIFF as well, with a
scanner's colour profile of 142 kB in each header.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import SIZE, made_slides
from benchmarks.latency_server import serve
from benchmarks.reader import cpu_ms
from benchmarks.table import TURNS, Line, arguments, line, report
from streaming import storage
from streaming.catalog.given import Given
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import Rejected, inspect
from streaming.catalog.sources import find_slides
from streaming.counters import Counters
from streaming.slide import Slide, open_slide
from streaming.slide.block_index import unpack
from streaming.slide.multi_file import as_one
from streaming.storage.staging import Staging
from tests.dicom_files import Kind, write_series

LATENCY_S = 0.02
MPPS = (0.25, 0.5, 1.0, 2.0)
PROCESSES, AT_ONCE = 2, 8  # as a catalog is built on two cores

_tile = np.empty((SIZE, SIZE, 3), np.uint8)


def _read(slide: Slide, count: Counters, x: int, y: int, mpp: float) -> None:
    slide.begin_tile(x, y, mpp, SIZE, count=count).fill(_tile)


def made_series(folder: Path, slide: Path) -> list[storage.ObjectInfo]:
    """The objects of a slide's levels, and those beside them; made once."""
    series = folder / "bench" / f"{slide.stem}-dicom"
    if not series.exists():
        sys.stderr.write(f"making {series.name}\n")
        write_series(series, slide, Kind(icc_nbytes=141_992))
    (whole,) = find_slides([str(series)], None)
    levels = list(whole.files)
    others = [storage.stat(str(path)) for path in sorted(series.iterdir()) if str(path) not in {e.uri for e in levels}]
    return [*levels, *others[:2]]


def indexed(uri: str, files: Sequence[storage.ObjectInfo] = ()) -> Slide:
    """A slide by its block index, as readers open it."""
    slide = open_slide(uri, expected=as_one(files) if files else None)
    index = Path(tempfile.mkdtemp()) / "index"
    index.write_bytes(slide.packed_index or b"")
    return open_slide(uri, index=unpack(index.read_bytes()))


def tile_lines(svs: Path, files: Sequence[storage.ObjectInfo], tiles: int) -> list[Line]:
    """CPU and requests per tile from local files in the page cache."""
    both = indexed(files[0].uri, files), indexed(str(svs))
    counts = Counters(), Counters()
    width, height = both[1].level_dimensions[0]
    random, found = np.random.default_rng(0), list[Line]()
    for mpp in MPPS:
        extent = round(SIZE * mpp / 0.25)
        places = random.integers(0, (width - extent, height - extent), (tiles, 2)).tolist()
        us, they = (
            [partial(_read, slide, count, x, y, mpp) for x, y in places]
            for slide, count in zip(both, counts, strict=True)
        )
        cpu_ms(us)
        turns = [(cpu_ms(us), cpu_ms(they)) for _ in range(2 * TURNS + 1)]
        ours, theirs = (statistics.median(part) for part in zip(*turns, strict=True))
        found.append(line(f"CPU per tile at {mpp} µm/px / as SVS", ours, theirs, "ms"))
    means = (statistics.mean(entry.ours for entry in found), statistics.mean(entry.theirs for entry in found))
    # One more turn of ours warmed it up.
    per_tile = counts[0].requests / (2 * TURNS + 2), counts[1].requests / (2 * TURNS + 1)
    per_tile = per_tile[0] / len(MPPS) / tiles, per_tile[1] / len(MPPS) / tiles
    return [
        *found,
        line("the same, mean over the four", *means, "ms", most=1.05),
        line("requests per tile / as SVS", *per_tile, "GETs", most=1.0),
    ]


def request_lines(files: Sequence[storage.ObjectInfo]) -> list[Line]:
    """What is asked of the storage to find all frames of a series whose files are listed, without a thumbnail."""
    heads, slide = Counters(), Counters()
    from streaming.slide.dicom_series import sort_objects

    (series,) = sort_objects(files, None, heads).slides
    open_slide(series.levels[0].uri, expected=as_one(series.levels), count=slide)
    requests, nbytes = heads.requests + slide.requests, heads.nbytes + slide.nbytes
    labels = len(files) - len(series.levels)
    return [
        line("GETs per level to catalogue a series", (requests - labels) / len(series.levels), 4, "GETs", most=1.0),
        line(f"MB to catalogue a series of {len(files)} files", nbytes / 1e6, 1.5, "MB", most=1.0),
    ]


def _catalogued(files: Sequence[storage.ObjectInfo], options: dict[str, Any], count: int) -> int:
    """How many series were inspected, the same again and again."""
    from streaming.slide.dicom_series import sort_objects

    def one(_: int) -> int:
        (series,) = sort_objects(files, options).slides
        (found,) = save_indexes([inspect(as_one(series.levels), Given(), options, Staging())], out, None)
        assert not isinstance(found, Rejected), found
        return 1

    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(one, range(count)))


def rate_line(folder: Path, files: Sequence[storage.ObjectInfo], count: int) -> tuple[Line, str]:
    """Series a second with their tissue and block index, from S3 with latency."""
    with serve(folder, LATENCY_S) as server:
        options = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
        there = [
            storage.ObjectInfo(f"s3://bench/{Path(e.uri).relative_to(folder / 'bench')}", e.size, e.version)
            for e in files
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            work = partial(_catalogued, there, options)
            list(pool.map(work, [2] * PROCESSES))
            started = time.perf_counter()
            done = sum(pool.map(work, [count] * PROCESSES))
            took_s = time.perf_counter() - started
    what = f"series catalogued, {PROCESSES} processes, S3 at {LATENCY_S * 1000:.0f} ms / wanted"
    return line(what, done / took_s, 15, "series/s", least=1.0), server.kind


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = arguments("dicom", __doc__)
    parser.add_argument("--tiles", type=int, default=150, help="tiles a turn (150)")
    parser.add_argument("--series", type=int, default=60, help="series that each process catalogues (60)")
    args = parser.parse_args(argv)
    (svs,) = made_slides(args.folder, 1)
    files = made_series(args.folder, svs)
    rate, server = rate_line(args.folder, files, args.series)
    return report([*tile_lines(svs, files, args.tiles), *request_lines(files), rate], args.json, server=server)


if __name__ == "__main__":
    sys.exit(main())
