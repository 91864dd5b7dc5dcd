"""The mission's mix through Ray Data to torch, from local files and from S3 with latency.

Against what most people have, PyTorch's DataLoader and OpenSlide on local files, and against what no reader can be
faster than: the decoding of the blocks that the tiles touch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import BATCH, openslide_rate, rate
from benchmarks.latency_server import serve
from benchmarks.mission import MadeSlide, Mission, mission
from benchmarks.table import Line, line
from streaming import cluster
from streaming.delivery.stream import BatchShape, TileStream, torch_batches
from streaming.plan import TilePlan
from streaming.plan.footprints import Corners
from streaming.reading.reader import ReaderOptions
from streaming.slide import codecs, open_slide
from streaming.slide.block_slide import PendingBox

# A batch of OpenSlide's takes seconds, and two come at a time: one from each worker.
_SKIP, _THEIR_SKIP, _THEIR_SHARE = 6, 2, 3
CORNERS: tuple[Corners, ...] = ("anywhere", "blocks")
# By latency in ms, ratios that must hold: against OpenSlide on local files, anywhere and on blocks, and the decoding.
_MUSTS = {20: ((2.8, 5.0), 0.65)}

Block = tuple[bytes, codecs.BlockFormat, int]


@contextlib.contextmanager
def served(folder: Path, made: Sequence[MadeSlide], latency_ms: int) -> Generator[tuple[Mission, str]]:
    """The slides behind S3 with that latency, or as local files at 0, and what serves them."""
    if not latency_ms:
        yield mission(made), "local files"
        return
    with serve(folder, latency_ms / 1000) as server:
        yield mission(made, server.url), server.url


def our_rate(source: Mission, plan: TilePlan, steps: int) -> float:
    """Tiles/s of two readers with the HSV rule, as users have them, through Ray Data into torch tensors."""
    cluster.connect(8)
    options = ReaderOptions(storage_options=source.options)
    stream = TileStream(source.catalog, plan, BatchShape(BATCH), reader=options, readers=(2, 2))
    # More than is measured, so that as much is under way at the end as at the beginning.
    num = steps + 2 * _SKIP
    (shard,) = stream.dataset(0, num).streaming_split(1, equal=True)
    batches = torch_batches(shard, BATCH)
    found = rate(batches, _SKIP, steps)
    filtered = sum(int(batch["filtered"].sum()) for batch in batches) / (_SKIP * BATCH)
    sys.stderr.write(f"{plan.corners}: {found:,.0f} tiles/s, {filtered:.0%} turned down\n")
    return found


def touched_blocks(plan: TilePlan, paths: Sequence[Path], tiles: int) -> list[list[Block]]:
    """The compressed blocks of each of the plan's first tiles, and at what scale they are decoded."""
    slides = [open_slide(str(path)) for path in paths]
    specs = plan.specs(np.arange(tiles))
    found: list[list[Block]] = []
    for row, x, y, mpp in zip(specs.slide, specs.x, specs.y, specs.mpp, strict=True):
        tile = slides[row].begin_tile(int(x), int(y), float(mpp), specs.size)
        assert isinstance(tile, PendingBox), "made slides are read by blocks"
        assert tile.coming is not None, "tiles lie on their slide"
        found.append(
            [
                (content[at - run.start : at - run.start + nbytes], tile.level.form, tile.scale)
                for run, content in zip(tile.runs, tile.coming.wait(), strict=True)
                for _, at, nbytes in run.blocks
            ]
        )
    return found


def _decode_all(blocks: list[Block], barrier: Any, taken: Any) -> None:
    for content, form, scale in blocks[:20]:
        codecs.decode(content, form, scale)
    barrier.wait()
    started = time.perf_counter()
    for content, form, scale in blocks:
        codecs.decode(content, form, scale)
    taken.put(time.perf_counter() - started)


def decode_limit(per_tile: list[list[Block]]) -> float:
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


def mix_lines(folder: Path, made: Sequence[MadeSlide], latency_ms: int, steps: int, turns: int) -> list[Line]:
    """Both kinds of corners at one latency; local files at 0."""
    where = f"from S3 with {latency_ms} ms latency" if latency_ms else "from local files"
    ours, limits = ({corners: list[float]() for corners in CORNERS} for _ in range(2))
    theirs, their_steps = list[float](), max(2, steps // _THEIR_SHARE)
    with served(folder, made, latency_ms) as (source, _):
        plans = {corners: source.plan(corners) for corners in CORNERS}
        touched = {corners: touched_blocks(plans[corners], source.paths, their_steps * BATCH) for corners in CORNERS}
        for _ in range(turns):
            for corners in CORNERS:
                ours[corners].append(our_rate(source, plans[corners], steps))
                limits[corners].append(decode_limit(touched[corners]))
            theirs.append(openslide_rate(plans["anywhere"], source.paths, _THEIR_SKIP, their_steps))
    of_loader, of_decoding = _MUSTS.get(latency_ms, ((0.0, 0.0), 0.0))
    found = list[Line]()
    for corners, least in zip(CORNERS, of_loader, strict=True):
        what = f"the mix {where}, 2 readers, corners {corners}"
        loader = f"{what} / DataLoader (2 workers) + OpenSlide on local files, corners anywhere"
        found.append(line(loader, ours[corners], theirs, "tiles/s", least=least))
        decoding = f"{what} / decoding of the touched blocks alone by 2 processes"
        least = of_decoding if corners == "anywhere" else 0.0
        found.append(line(decoding, ours[corners], limits[corners], "tiles/s", least=least))
    return found
