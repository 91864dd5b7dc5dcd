"""How fast slides are read, against OpenSlide, on this machine and in this run: `tilestream bench reader`.

Speed is told as ratios: we and the others take turns on the same tiles; the median of several turns counts.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import BATCH, SIZE, OpenSlideTiles, made_catalog, made_slides, openslide_rate, peer, rate
from benchmarks.latency_server import serve
from benchmarks.table import TURNS, Line, arguments, line, report
from streaming import cluster
from streaming.delivery.stream import BatchShape, TileStream, torch_batches
from streaming.operate.capacity import StageCosts, Surroundings, reader_rates
from streaming.plan import TilePlan
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.slide import Slide, codecs, open_slide
from streaming.slide.index_files import open_index
from streaming.storage.ranges import open_ranges, read_range
from streaming.vision import cv2

MPPS = (0.25, 0.5, 1.0, 2.0)
LATENCY_S = 0.02
DISTANT_S, TURNED_DOWN = 0.1, 0.07


_tile = np.empty((SIZE, SIZE, 3), np.uint8)


def _read(slide: Slide, x: int, y: int, mpp: float) -> None:
    slide.begin_tile(x, y, mpp, SIZE).fill(_tile)


def cpu_ms(reads: Sequence[Callable[[], object]]) -> float:
    """CPU milliseconds of this process for one of some tiles."""
    started = time.process_time()
    for read in reads:
        read()
    return (time.process_time() - started) / len(reads) * 1000


def cpu_lines(paths: list[Path], tiles: int) -> list[Line]:
    """CPU per tile from a local file in the page cache."""
    index = Path(tempfile.mkdtemp()) / "index"
    index.write_bytes(open_slide(str(paths[0])).packed_index or b"")
    slide = open_slide(str(paths[0]), index=open_index(str(index)))
    theirs = OpenSlideTiles(paths[:1])
    width, height = slide.level_dimensions[0]
    random, found = np.random.default_rng(0), list[Line]()
    musts = {0.25: 0.45, 0.5: 0.18}
    for mpp in MPPS:
        whole = round(mpp / 0.25)
        sides = np.array([width, height]) - SIZE * whole
        places = (random.integers(0, sides, (tiles, 2)) // whole * whole).tolist()
        us = [partial(_read, slide, x, y, mpp) for x, y in places]
        they = [partial(theirs, 0, x, y, mpp) for x, y in places]
        cpu_ms(us)
        turns = [(cpu_ms(us), cpu_ms(they)) for _ in range(TURNS)]
        ours, others = (statistics.median(part) for part in zip(*turns, strict=True))
        what = f"CPU per tile at {mpp} µm/px (slide 0.25, levels 1, 4, 16) / OpenSlide + PIL"
        found.append(line(what, ours, others, "ms", most=musts.get(mpp, 0)))
    mean_ours, mean_theirs = statistics.mean(f.ours for f in found), statistics.mean(f.theirs for f in found)
    return [*found, line("the same, mean over the four", mean_ours, mean_theirs, "ms", most=0.25)]


def _decode_all(blocks: list[tuple[bytes, codecs.BlockFormat]], barrier: Any, taken: Any) -> None:
    barrier.wait()
    started = time.perf_counter()
    for content, form in blocks:
        codecs.decode(content, form)
    taken.put(time.perf_counter() - started)


def touched_blocks(plan: TilePlan, paths: list[Path], tiles: int) -> list[list[tuple[bytes, codecs.BlockFormat]]]:
    """The compressed blocks of each of the plan's first tiles."""
    slides = [open_slide(str(path)) for path in paths]
    specs = plan.specs(np.arange(tiles))
    per_tile: list[list[tuple[bytes, codecs.BlockFormat]]] = []
    for slide, x, y in zip(specs.slide, specs.x, specs.y, strict=True):
        level = slides[slide]._levels[0]
        ids = [
            row * level.columns + column
            for row in range(y // level.form.height, (y + SIZE - 1) // level.form.height + 1)
            for column in range(x // level.form.width, (x + SIZE - 1) // level.form.width + 1)
        ]
        places = [[part[0] for part in level.places(i, i)] for i in ids]
        ranges = slides[slide]._ranges
        per_tile.append([(read_range(ranges, at, at + size), level.form) for at, size in places])
    return per_tile


def decode_limit(per_tile: list[list[tuple[bytes, codecs.BlockFormat]]]) -> float:
    """Tiles per second that two processes decode when the blocks are in memory."""
    context = multiprocessing.get_context("spawn")
    barrier, taken = context.Barrier(2), context.Queue()
    shares = [[block for tile in per_tile[i::2] for block in tile] for i in range(2)]
    workers = [context.Process(target=_decode_all, args=(share, barrier, taken)) for share in shares]
    for worker in workers:
        worker.start()
    slowest = max(taken.get() for _ in workers)
    for worker in workers:
        worker.join()
    return len(per_tile) / slowest


def stream_lines(folder: Path, paths: list[Path], steps: int, peers: bool) -> tuple[list[Line], str]:
    """Tiles per second from a store with latency through Ray Data to torch, and what was fetched for it."""
    skip, others = 10, dict[str, float]()
    with serve(folder, LATENCY_S) as server:
        options = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
        catalog = made_catalog([f"s3://bench/{path.name}" for path in paths], options)
        plan = TilePlan(catalog, mpp={0.25: 1}, size=SIZE)
        reader = ReaderOptions(hsv_rule=HsvRule(min_share=0), storage_options=options)
        stream = TileStream(catalog, plan, BatchShape(BATCH), reader=reader, readers=(2, 2))
        cluster.connect(8)
        ours, theirs, limits, fetched = [], [], [], 0.0
        total = (skip + steps) * BATCH
        touched = touched_blocks(plan, paths, total)
        for turn in range(TURNS):
            requests_before, bytes_before = server.sent()
            (shard,) = stream.dataset(0, skip + steps).streaming_split(1, equal=True)
            batches = torch_batches(shard, BATCH)
            ours.append(rate(batches, skip, steps))
            del batches, shard
            requests, sent = server.sent()
            limits.append(decode_limit(touched))
            if turn == 0:
                fetched = (sent - bytes_before) / sum(len(content) for tile in touched for content, _ in tile)
                sys.stderr.write(f"{(requests - requests_before) / total:.2f} requests a tile\n")
            theirs.append(openslide_rate(plan, paths, skip, steps))
        if peers:
            others = peer_rates(folder, paths, plan, server.url)
    us, they, limit = (statistics.median(rates) for rates in (ours, theirs, limits))
    what = f"from S3 with {LATENCY_S * 1000:.0f} ms latency, 2 readers, Ray Data to torch"
    return [
        line(f"{what} / DataLoader (2 workers) + OpenSlide on local files", us, they, "tiles/s", least=1.5),
        line("the same / pure decode of the touched blocks by 2 processes", us, limit, "tiles/s", least=0.55),
        *(line(f"the same / {name}", us, found, "tiles/s") for name, found in others.items()),
        line("bytes fetched / bytes of touched blocks", fetched, 1.0, "", most=1.1),
    ], server.kind


def distant_line(folder: Path, paths: list[Path], batches: int) -> Line:
    """One reader, in-process with two batches under way as its actor has, on storage far away: against `capacity`."""
    skip, micro_batch = 2, 64
    with serve(folder, DISTANT_S) as server:
        options = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
        catalog = made_catalog([f"s3://bench/{path.name}" for path in paths], options)
        plan = TilePlan(catalog, mpp={0.25: 1}, size=SIZE)
        slides, specs = [open_slide(str(path)) for path in paths], plan.specs(np.arange(400))
        tiles = [
            slides[slide].read_tile(int(x), int(y), 0.25, SIZE)
            for slide, x, y in zip(specs.slide, specs.x, specs.y, strict=True)
        ]
        rule = HsvRule(min_share=float(np.quantile([hsv_share(tile) for tile in tiles], TURNED_DOWN)))
        reader = TileReader(plan, catalog, ReaderOptions(hsv_rule=rule, storage_options=options))
        ends, ranges = list[float](), open_ranges(f"s3://bench/{paths[0].name}", options)
        assert ranges is not None, "S3 has ranges"
        waits = [timeit.timeit(partial(read_range, ranges, 0, 10_000), number=1) for _ in range(9)]

        def read(batch: int) -> None:
            reader({"index": np.arange(batch * micro_batch, (batch + 1) * micro_batch)})
            ends.append(time.perf_counter())

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(read, range(batches + 2 * skip)))
    took = reader.counters()
    costs = StageCosts(requests=took["requests"] / took["tiles"], nbytes=took["nbytes"] / took["tiles"])
    around = Surroundings(latency_s=statistics.median(waits), reader_cores=2)
    ours = batches * micro_batch / (ends[skip + batches - 1] - ends[skip - 1])
    what = f"one reader at {DISTANT_S * 1000:.0f} ms, {TURNED_DOWN:.0%} turned down / the model of `capacity`"
    return line(what, ours, min(reader_rates(costs, around)), "tiles/s", least=0.9)


def hsv_share(tile: np.ndarray[Any, Any]) -> float:
    """The share of a tile's pixels within the published HSV bounds."""
    rule = HsvRule()
    low, high = np.array([rule.hue, rule.saturation, rule.value], dtype=np.uint8).T
    return float((cv2.inRange(cv2.cvtColor(tile, cv2.COLOR_RGB2HSV), low, high) > 0).mean())


def peer_rates(folder: Path, paths: list[Path], plan: TilePlan, endpoint: str) -> dict[str, float]:
    """Tiles per second of others, two workers each, on the plan's tiles (wsistream draws its own)."""
    specs = plan.specs(np.arange(60 * BATCH))
    tiles = np.stack([specs.slide, specs.x, specs.y], axis=1).tolist()
    local = [str(path) for path in paths]
    remote = [f"s3://bench/{path.name}" for path in paths]
    found = {
        "tiffslide + s3fs from the same S3": peer(
            "tiffslide", ["tiffslide"], folder, slides=remote, tiles=tiles, endpoint=endpoint
        ),
        "fastslide on local files": peer("fastslide", ["fastslide"], folder, slides=local, tiles=tiles),
        "wsistream on local files": peer("wsistream", ["wsistream"], folder, slides=local),
    }
    return {name: measured["tiles_per_s"] for name, measured in found.items() if measured}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = arguments("reader", __doc__)
    parser.add_argument("--tiles", type=int, default=200, help="tiles a turn of the CPU lines (200)")
    parser.add_argument("--steps", type=int, default=80, help=f"steps of {BATCH} tiles a turn of the stream lines (80)")
    args = parser.parse_args(argv)
    paths = made_slides(args.folder, args.slides)
    lines = cpu_lines(paths, args.tiles)
    streamed, server = stream_lines(args.folder, paths, args.steps, args.peers)
    lines.append(distant_line(args.folder, paths, args.steps // 4))
    return report([*lines, *streamed], args.json, server=server)


if __name__ == "__main__":
    sys.exit(main())
