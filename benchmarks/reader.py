"""How fast slides are read, against OpenSlide, on this machine and in this run: `tilestream bench reader`.

Speed is told as ratios: we and the others take turns on the same tiles; the median of several turns counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from latency_server import serve
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from streaming import cluster, storage
from streaming.catalog import BLOCKS, Catalog, merge, part_of, write
from streaming.catalog_job import Rejected, inspect
from streaming.plan import TilePlan
from streaming.reader import ReaderOptions
from streaming.slide import Slide, Staging, codecs, open_slide
from streaming.slide.block_index import open_index
from streaming.slide.synthetic import SyntheticSlide
from streaming.slide.synthetic_svs import write_slide
from streaming.stream import BatchShape, TileStream, torch_batches
from streaming.tissue import HsvRule

MPPS = (0.25, 0.5, 1.0, 2.0)
SIZE, BATCH, TURNS, LATENCY_S = 256, 128, 3, 0.02


@dataclass(frozen=True)
class Line:
    """One line of the table; ratio is ours to theirs."""

    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    must: str
    holds: bool


def line(what: str, ours: float, theirs: float, unit: str, *, most: float = 0, least: float = 0) -> Line:
    """A line whose ratio must be at most, or at least, something."""
    ratio = ours / theirs
    must = f"≤ {most}" if most else f"≥ {least}" if least else "–"
    return Line(what, ours, theirs, unit, ratio, must, ratio <= most if most else ratio >= least)


def made_slides(folder: Path, num: int) -> list[Path]:
    """40× slides with levels 1, 4, 16; made once."""
    paths = [folder / "bench" / f"made{patient}.svs" for patient in range(num)]
    folder.joinpath("bench").mkdir(parents=True, exist_ok=True)
    for patient, path in enumerate(paths):
        if not path.exists():
            sys.stderr.write(f"making {path.name}\n")
            write_slide(SyntheticSlide(width=24576, height=20480, patient=patient, downsamples=(1, 4, 16)), path)
    return paths


class OpenSlideTiles:
    """What most loaders do: OpenSlide reads the level, PIL makes the tile."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._slides = [openslide.OpenSlide(path) for path in paths]

    def __call__(self, slide: int, x: int, y: int, mpp: float) -> np.ndarray[Any, Any]:
        """A tile of a made slide, uint8 (SIZE, SIZE, 3)."""
        handle = self._slides[slide]
        level = handle.get_best_level_for_downsample(mpp / 0.25)
        extent = round(SIZE * mpp / 0.25 / handle.level_downsamples[level])
        image = handle.read_region((x, y), level, (extent, extent)).convert("RGB")
        if extent != SIZE:
            image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        return np.asarray(image)


_tile = np.empty((SIZE, SIZE, 3), np.uint8)


def _read(slide: Slide, x: int, y: int, mpp: float) -> None:
    slide.begin_tile(x, y, mpp, SIZE)(_tile)


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


class LocalTiles(IterableDataset[torch.Tensor]):
    """The plan's tiles through OpenSlide on local files, for a DataLoader."""

    def __init__(self, plan: TilePlan, paths: list[Path], stop: int) -> None:
        self._plan, self._paths, self._stop = plan, paths, stop

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This worker's share."""
        info = get_worker_info()
        assert info is not None, "the loader has workers"
        read = OpenSlideTiles(self._paths)
        specs = self._plan.specs(np.arange(info.id, self._stop, info.num_workers))
        for slide, x, y, mpp in zip(specs.slide, specs.x, specs.y, specs.mpp, strict=True):
            yield torch.from_numpy(read(int(slide), int(x), int(y), float(mpp)).copy())


def _rate(batches: Iterator[Any], skip: int, count: int) -> float:
    """Tiles per second of `count` batches after the first ones."""
    for _ in range(skip):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - started)


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
        places = [[int(part[0]) for part in level.places(i, i)] for i in ids]
        ranges = slides[slide]._ranges
        per_tile.append([(ranges.begin(at, at + size)(), level.form) for at, size in places])
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


def stream_lines(folder: Path, paths: list[Path], steps: int) -> tuple[list[Line], str]:
    """Tiles per second from a store with latency through Ray Data to torch, and what was fetched for it."""
    skip = 10
    with serve(folder, LATENCY_S) as server:
        options = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
        out = tempfile.mkdtemp()
        rows = [inspect(storage.stat(f"s3://bench/{p.name}", options), None, options, Staging(), out) for p in paths]
        rejected = [row for row in rows if isinstance(row, Rejected)]
        assert not rejected, rejected
        write(out, *merge([part_of([row for row in rows if not isinstance(row, Rejected)])], None), None)
        assert Path(out, BLOCKS).exists()
        catalog = Catalog.load(out)
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
            ours.append(_rate(batches, skip, steps))
            del batches, shard
            requests, sent = server.sent()
            limits.append(decode_limit(touched))
            if turn == 0:
                fetched = (sent - bytes_before) / sum(len(content) for tile in touched for content, _ in tile)
                sys.stderr.write(f"{(requests - requests_before) / total:.2f} requests a tile\n")
            loader = DataLoader(LocalTiles(plan, paths, total), batch_size=BATCH, num_workers=2)
            theirs.append(_rate(iter(loader), skip, steps))
    us, they, limit = (statistics.median(rates) for rates in (ours, theirs, limits))
    what = f"from S3 with {LATENCY_S * 1000:.0f} ms latency, 2 readers, Ray Data to torch"
    return [
        line(f"{what} / DataLoader (2 workers) + OpenSlide on local files", us, they, "tiles/s", least=1.5),
        line("the same / pure decode of the touched blocks by 2 processes", us, limit, "tiles/s", least=0.55),
        line("bytes fetched / bytes of touched blocks", fetched, 1.0, "", most=1.1),
    ], server.kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = argparse.ArgumentParser(prog="tilestream bench reader", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--tiles", type=int, default=200, help="tiles a turn of the CPU lines (200)")
    parser.add_argument("--steps", type=int, default=80, help=f"steps of {BATCH} tiles a turn of the stream lines (80)")
    parser.add_argument("--slides", type=int, default=2, help="slides that are made for it (2)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "tilestream-bench"), help="where those are kept"
    )
    args = parser.parse_args(arguments)
    paths = made_slides(args.folder, args.slides)
    lines = cpu_lines(paths, args.tiles)
    streamed, server = stream_lines(args.folder, paths, args.steps)
    lines += streamed
    machine = (
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )
    if args.json:
        print(json.dumps({"machine": machine, "server": server, "lines": [asdict(entry) for entry in lines]}))
    else:
        print(f"{machine}; latency server: {server}; median of {TURNS} turns\n")
        print(f"{'ours':>9} {'theirs':>9} {'':8} {'ratio':>6}  {'must':7}      what")
        for entry in lines:
            verdict = "" if entry.must == "–" else "yes" if entry.holds else "NO"
            print(
                f"{entry.ours:9.2f} {entry.theirs:9.2f} {entry.unit:8} {entry.ratio:6.2f}  {entry.must:7} {verdict:4} "
                f"{entry.what}"
            )
    return 0 if all(entry.holds for entry in lines if entry.must != "–") else 1


if __name__ == "__main__":
    sys.exit(main())
