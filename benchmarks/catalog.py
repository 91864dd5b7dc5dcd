"""What a large catalog costs whoever opens it: `tilestream bench catalog`.

A catalog of made slides (block indexes and tissue of real size, removed afterwards) is opened in fresh processes, by
one that does what a reader does: plans tiles and finds their blocks, of slides all over. The same catalog is then
opened on S3 with 20 ms latency by nodes that know nothing of it yet.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.table import TURNS, machine, memory_mib
from streaming.catalog import Catalog
from streaming.catalog.schema import BLOCKS, SCHEMA, SlideRow
from streaming.catalog.tissue_map import Cells
from streaming.catalog.writing import write
from streaming.counters import UNCOUNTED, Counters
from streaming.plan import TilePlan
from streaming.plan.plan import TileSpecs
from streaming.reading.slide_pool import SlidePool
from streaming.slide.block_index import pack
from streaming.slide.block_level import BlockedSlide, BlockLevel, SlideObject
from streaming.slide.block_slide import BlockSlide
from streaming.slide.codecs import BlockFormat
from streaming.slide.geometry import MPP_TOLERANCE
from streaming.storage.ranges import Span
from streaming.storage.staging import Staging

BLOCK, MPP, BATCH = 256, 0.25, 128
STORE = {"anon": True, "endpoint_url": "http://127.0.0.1:9", "region": "us-east-1"}  # nothing is ever asked of it
LATENCY_S = 0.02
REMOTE_BATCHES = 40
PARTS = ["local", "remote", "series"]
_WARM_UP = 64  # series that are catalogued before it counts, by processes that import what they need
PACK = 16  # indexes in a pack, as the builder writes them
_TIMES = 5  # so often the made slide lies in each row and column of a series: 76,800 frames in its first level
KINDS = 16  # so many slides differ; the others are copies of them under other names


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    value: float
    unit: str
    must: str
    holds: bool


def line(what: str, value: float, unit: str, *, most: float = 0, least: float = 0) -> Line:
    """A line whose value must be at most, or at least, something."""
    must = f"≤ {most:,g}" if most else f"≥ {least:,g}" if least else "–"
    return Line(what, value, unit, must, value <= most if most else value >= least)


def made_index(columns: int, rows: int, random: np.random.Generator) -> tuple[bytes, int]:
    """A block index of a pyramid by halves as a scanner writes it, and how many blocks it has."""
    levels, at, form = list[BlockLevel](), 16, BlockFormat("JPEG", BLOCK, BLOCK, random.bytes(600))
    while columns >= 1 and rows >= 1:
        nbytes = random.integers(1_500, 40_000, columns * rows)
        offsets = at + np.cumsum(nbytes) - nbytes
        levels.append(BlockLevel(columns * BLOCK, rows * BLOCK, form, offsets, nbytes))
        at += int(nbytes.sum())
        columns, rows = columns // 2, rows // 2
    slide = BlockedSlide("aperio", (MPP, MPP), tuple(levels), (SlideObject("made.svs", at, "tag"),))
    return pack(slide, MPP), sum(len(entry.nbytes) for entry in levels)


def made_grid(columns: int, rows: int, random: np.random.Generator) -> Cells:
    """Tissue in three blobs: a third of the slide, say."""
    y, x = np.mgrid[:rows, :columns]
    inside = np.zeros((rows, columns), np.bool_)
    for _ in range(3):
        middle_y, middle_x = random.integers(rows // 5, rows * 4 // 5), random.integers(columns // 5, columns * 4 // 5)
        inside |= (y - middle_y) ** 2 + (x - middle_x) ** 2 < (rows * random.uniform(0.15, 0.3)) ** 2
    return np.where(inside, random.integers(120, 256, (rows, columns)), 0).astype(np.uint8)


def make(folder: str, slides: int, blocks: int) -> tuple[int, int]:
    """A catalog of so many slides of about so many blocks; how many blocks, and how many bytes on disk."""
    columns = round((blocks * 0.75 * 1.5) ** 0.5)
    rows = round(columns / 1.5)
    random = np.random.default_rng(0)
    indexes = [made_index(columns, rows, random) for _ in range(KINDS)]
    grids = [made_grid(columns, rows, random) for _ in range(KINDS)]
    Path(folder, BLOCKS).mkdir(parents=True)
    entries: list[dict[str, object]] = []
    for number in range(slides):
        first = number // PACK * PACK
        pack = [indexes[of % KINDS][0] for of in range(first, min(slides, first + PACK))]
        at, name = sum(map(len, pack[: number % PACK])), f"{number // PACK:032x}-{sum(map(len, pack))}"
        if number % PACK == 0:
            # Packs of the same slides are one file by several names.
            kinds = Path(folder, BLOCKS, f"{0:032x}-{sum(map(len, pack))}")
            if number == 0 or not kinds.exists():
                Path(folder, BLOCKS, name).write_bytes(b"".join(pack))
            else:
                os.link(kinds, Path(folder, BLOCKS, name))
        row = SlideRow(
            slide=f"s3://bucket/a/folder/of/some/length/slide{number:05}.svs",
            size=10**9,
            version=f"{number:032x}",
            vendor="aperio",
            mpp=MPP,
            width=columns * BLOCK,
            height=rows * BLOCK,
            bounds=(0, 0, columns * BLOCK, rows * BLOCK),
            levels=[
                {
                    "width": columns * BLOCK >> i,
                    "height": rows * BLOCK >> i,
                    "downsample": 2.0**i,
                    "compression": "JPEG",
                    "block_width": BLOCK,
                    "block_height": BLOCK,
                }
                for i in range(8)
            ],
            backend="blocks",
            index=name,
            index_at=at,
            index_nbytes=len(pack[number % PACK]),
            tissue_rows=rows,
            tissue_columns=columns,
            tissue_threshold=20.0,
            tissue_mm2=100.0,
            metadata=json.dumps({"patient": f"patient{number // 3}", "organ": "lung", "stain": "H&E"}),
        )
        entries.append(asdict(row))
    write(folder, pa.Table.from_pylist(entries, SCHEMA), (grids[number % KINDS] for number in range(slides)), None)
    num_blocks = sum(indexes[number % KINDS][1] for number in range(slides))
    return num_blocks, sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


class Places:
    """Takes the place of a slide's storage: notes what is asked for."""

    size, tag = 0, ""
    requests = 0

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> Places:
        """Counts the requests; nobody waits for the bytes."""
        assert all(end > start for start, end in spans)
        self.requests += len(spans)
        count.requests += len(spans)
        return self

    def wait(self) -> list[bytes]:
        """Nothing."""
        return []


def forget_cached(folder: str) -> None:
    """Puts the catalog's files out of the page cache."""
    os.sync()
    for path in Path(folder).glob("*.*"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reader_s_slides(catalog: Catalog, places: Places) -> SlidePool[int]:
    """A reader's open slides, whose bytes nobody asks for."""

    def opened(row: int, count: Counters) -> BlockSlide:
        found = catalog.open_slide(row, STORE, Staging(), count)
        assert isinstance(found, BlockSlide)
        found._ranges = places
        return found

    return SlidePool(opened)


def find_blocks(pool: SlidePool[int], specs: TileSpecs, count: Counters) -> None:
    """Does for some tiles what a reader does before it waits for their bytes."""
    tiles = list(zip(*(a.tolist() for a in (specs.slide, specs.x, specs.y, specs.mpp)), strict=True))
    pool.prepare(tiles, specs.size, MPP_TOLERANCE, count)
    for tile in tiles:
        pool.begin_tile(*tile, specs.size, MPP_TOLERANCE, count)


def measure_remote(uri: str, url: str, batches: int) -> dict[str, float]:
    """Opens a catalog on S3 and does a reader's work for some batches; run in a process of its own."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started, began = memory_mib(), time.perf_counter(), time.process_time()
    catalog = Catalog.load(uri, {"anon": True, "endpoint_url": url, "region": "us-east-1"})
    plan, places, first = TilePlan(catalog), Places(), dict[str, float]()
    pool = reader_s_slides(catalog, places)
    for number in range(batches):
        find_blocks(pool, plan.specs(np.arange(number * BATCH, (number + 1) * BATCH)), UNCOUNTED)
        if number == 0:
            first = {"first_s": time.perf_counter() - started, "first_cpu_s": time.process_time() - began}
            sys.stdout.write("first\n")
            sys.stdout.flush()
            sys.stdin.readline()
            started = time.perf_counter()
    rate = (batches - 1) * BATCH / (time.perf_counter() - started)
    return {**first, "specs_per_s": rate, "peak_mib": memory_mib("VmHWM") - before}


def remote_turns(folder: Path) -> Iterator[dict[str, float]]:
    """What nodes measure that open the catalog in `folder` from S3, each with an empty cache."""
    from benchmarks.latency_server import serve

    with serve(folder, LATENCY_S) as server:
        for _ in range(TURNS):
            with tempfile.TemporaryDirectory(prefix="tilestream-bench-", dir=folder) as cache:
                before = server.sent()
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "benchmarks.catalog",
                        "--measure-remote",
                        "s3://bucket",
                        "--url",
                        server.url,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "TILESTREAM_STAGING": cache},
                )
                assert process.stdin
                assert process.stdout
                assert process.stdout.readline() == "first\n"
                requests, nbytes = (now - then for now, then in zip(server.sent(), before, strict=True))
                content, _ = process.communicate("go\n")
                yield {**json.loads(content), "first_requests": requests, "first_mb": nbytes / 1e6}


def remote_lines(folder: Path) -> list[Line]:
    """What a node has to wait for and to fetch before its first batch."""
    found = list(remote_turns(folder))
    middle = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
    return [
        line(
            f"S3 at {LATENCY_S * 1000:.0f} ms, empty cache: until the first {BATCH} tiles' blocks are found",
            middle["first_s"],
            "s",
            most=10,
        ),
        line("the same, of this process's CPU", middle["first_cpu_s"], "s"),
        line("what a node has fetched by then", middle["first_mb"], "MB", most=200),
        line("by so many requests", middle["first_requests"], "GETs"),
        line("tiles planned and found a second from then on, by one thread", middle["specs_per_s"], "1/s"),
        line("the most memory of that process", max(t["peak_mib"] for t in found), "MiB", most=300),
    ]


def measure(folder: str, tiles: int) -> dict[str, float]:
    """Opens the catalog and does a reader's work on it; run in a process of its own."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mib()
    started = time.perf_counter()
    catalog = Catalog.load(folder)
    plan = TilePlan(catalog)
    first = plan[0]
    opened = time.perf_counter() - started
    assert first.slide in catalog.slides()
    resident_open = memory_mib() - before
    pickled = len(pickle.dumps((plan, catalog.for_readers()))) / 2**20
    places, planning, seen = Places(), 0.0, set[int]()
    pool = reader_s_slides(catalog, places)
    for start in range(0, tiles, BATCH):
        at = time.process_time()
        specs = plan.specs(np.arange(start, start + BATCH))
        planning += time.process_time() - at
        find_blocks(pool, specs, UNCOUNTED)
        seen.update(specs.slide.tolist())
    peak = memory_mib("VmHWM")
    at = time.process_time()
    plan.specs(np.arange(tiles))
    return {
        "open_s": opened,
        "open_mib": resident_open,
        "peak_mib": peak - before,
        "pickled_mib": pickled,
        "specs_per_s": tiles / (time.process_time() - at),
        "batch_specs_per_s": tiles / planning,
        "slides": len(seen),
        "requests": places.requests / tiles,
    }


def rate_of_cataloguing(folder: Path, num_series: int) -> tuple[float, float, float]:
    """Series catalogued a second at 20 ms of S3, GETs and MB of each; of 20 × 15 mm at 0.25 µm/px and six files."""
    # For this alone: it starts Ray.
    from benchmarks.latency_server import serve, write_listing
    from streaming import cluster
    from streaming.catalog.build import build_catalog
    from streaming.catalog.idc import IdcOptions
    from streaming.synthetic.layout import SyntheticSlide
    from streaming.synthetic.svs import write_slide
    from tests.dicom_files import Kind, write_series
    from tests.idc_index import series, write_index

    bucket, svs = folder / "idc-open-data", folder / "slide.svs"
    write_slide(SyntheticSlide(width=16_384, height=12_288, patient=1, downsamples=(1, 4, 16)), svs)
    files = write_series(bucket / "s00000", svs, Kind(icc_nbytes=141_992, times=_TIMES))
    names = [f"s{number:05}" for number in range(_WARM_UP + num_series)]
    for name in names:
        (bucket / name).mkdir(exist_ok=True)
        for path in files if name != names[0] else ():
            os.link(path, bucket / name / path.name)
        write_listing(bucket, f"{name}/")
    index = write_index(folder / "index", [series("made", name, name) for name in names])
    with serve(folder, 0.02) as server:
        options, out = {"endpoint_url": server.url}, str(folder / "of-series")
        cluster.connect(num_cpus=2)
        first = IdcOptions(idc_index=index, where=f"PatientID < '{names[_WARM_UP]}'")
        assert build_catalog(["idc:made"], out, idc=first, options=options).added == _WARM_UP
        before, started = server.sent(), time.perf_counter()
        report = build_catalog(["idc:made"], out, idc=IdcOptions(idc_index=index), options=options)
        took_s = time.perf_counter() - started
        assert (report.added, report.unchanged) == (num_series, _WARM_UP), report.rejected[:1]
        requests, nbytes = (now - then for now, then in zip(server.sent(), before, strict=True))
    return num_series / took_s, requests / num_series, nbytes / num_series / 1e6


def turns(folder: str, tiles: int) -> Iterator[dict[str, float]]:
    """What fresh processes measure, the first without the page cache's help."""
    for turn in range(TURNS):
        if turn == 0:
            forget_cached(folder)
        command = [sys.executable, "-m", "benchmarks.catalog", "--measure", folder, "--tiles", str(tiles)]
        yield json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def local_lines(folder: str, num_blocks: int, nbytes: int, tiles: int) -> list[Line]:
    """What a process costs that opens a catalog on a local disk."""
    found = list(turns(folder, tiles))
    middle = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
    work = f"plan {tiles:,} tiles and find their blocks, of {middle['slides']:,.0f} slides"
    return [
        line("the catalog on disk, tissue and all, per block", nbytes / num_blocks, "bytes", most=4),
        line("open it and plan a tile, not in the page cache", found[0]["open_s"], "s", most=1),
        line("the same, in the page cache", middle["open_s"], "s", most=1),
        line("memory of a process that opened it", middle["open_mib"], "MiB", most=300),
        line(f"the most memory of one that goes on to {work}", max(t["peak_mib"] for t in found), "MiB", most=300),
        line("plan and catalog as Ray ships them", middle["pickled_mib"], "MiB"),
        line(f"tiles planned a second of CPU, {BATCH} at once", middle["batch_specs_per_s"] / 1000, "1000/s"),
        line("tiles planned a second of CPU, all at once", middle["specs_per_s"] / 1000, "1000/s"),
    ]


def series_lines(folder: Path, num_series: int) -> list[Line]:
    """What it costs to catalogue series of DICOM."""
    sys.stderr.write(f"cataloguing {num_series:,} series of DICOM from S3 with 20 ms latency\n")
    rate, requests, nbytes = rate_of_cataloguing(folder, num_series)
    return [
        line("series of DICOM (76,800 frames) catalogued a second, S3 at 20 ms", rate, "1/s", least=15),
        line("what one asks for, its thumbnail too", requests, "GETs"),
        line("and gets", nbytes, "MB"),
    ]


def lines(args: argparse.Namespace) -> list[Line]:
    """Makes a catalog, measures and removes it."""
    found = list[Line]()
    with tempfile.TemporaryDirectory(prefix="tilestream-bench-", dir=args.folder) as folder:
        if {"local", "remote"} & set(args.parts):
            sys.stderr.write(f"making a catalog of {args.slides:,} slides × {args.blocks:,} blocks\n")
            num_blocks, nbytes = make(f"{folder}/bucket", args.slides, args.blocks)
            if "local" in args.parts:
                found += local_lines(f"{folder}/bucket", num_blocks, nbytes, args.tiles)
            if "remote" in args.parts:
                found += remote_lines(Path(folder))
        if "series" in args.parts:
            found += series_lines(Path(folder), args.series)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="tilestream bench catalog", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--slides", type=int, default=12_000, help="slides of the made catalog (12000)")
    parser.add_argument("--blocks", type=int, default=80_000, help="blocks a slide, over all levels (80000)")
    parser.add_argument("--tiles", type=int, default=200_000, help="tiles planned and found (200000)")
    parser.add_argument("--series", type=int, default=400, help="series of DICOM that are catalogued (400)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where it is made, and removed afterwards")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured (all)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--measure-remote", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure(args.measure, args.tiles)))
        return 0
    if args.measure_remote:
        print(json.dumps(measure_remote(args.measure_remote, args.url, REMOTE_BATCHES)))
        return 0
    found = lines(args)
    if args.json:
        print(json.dumps({"machine": machine(), "lines": [asdict(entry) for entry in found]}))
    else:
        print(f"{machine()}; {args.slides:,} slides × {args.blocks:,} blocks; {TURNS} processes\n")
        print(f"{'value':>9} {'':8} {'must':8}      what")
        for entry in found:
            verdict = "" if entry.must == "–" else "yes" if entry.holds else "NO"
            print(f"{entry.value:9.2f} {entry.unit:8} {entry.must:8} {verdict:4} {entry.what}")
    return 0 if all(entry.holds for entry in found if entry.must != "–") else 1


if __name__ == "__main__":
    sys.exit(main())
