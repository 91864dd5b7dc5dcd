"""One reader, in-process with two batches under way as its actor has, on storage far away: against `capacity`."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mission import MadeSlide
from benchmarks.reader_parts.mix import served
from benchmarks.table import Line, line
from streaming.operate.capacity import StageCosts, Surroundings, reader_rates
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.slide import open_slide
from streaming.storage.ranges import open_ranges, read_range
from streaming.vision import cv2

_LATENCY_MS, _TURNED_DOWN = 100, 0.07
_SKIP, _MICRO_BATCH = 2, 64


def distant_line(folder: Path, made: Sequence[MadeSlide], batches: int, turns: int) -> Line:
    """Tiles per second, and what the model gives for the requests, bytes and CPU of the same tiles."""
    with served(folder, made, _LATENCY_MS) as (source, _):
        plan = source.plan("anywhere")
        slides, specs = [open_slide(str(path)) for path in source.paths], plan.specs(np.arange(400))
        shares = [
            hsv_share(slides[slide].read_tile(int(x), int(y), float(mpp), specs.size))
            for slide, x, y, mpp in zip(specs.slide, specs.x, specs.y, specs.mpp, strict=True)
        ]
        rule = HsvRule(min_share=float(np.quantile(shares, _TURNED_DOWN)))
        ranges = open_ranges(source.catalog.slides()[0], source.options)
        assert ranges is not None, "S3 has ranges"
        ours, modelled = list[float](), list[float]()
        for _ in range(turns):
            reader = TileReader(plan, source.catalog, ReaderOptions(hsv_rule=rule, storage_options=source.options))
            waits = [timeit.timeit(partial(read_range, ranges, 0, 10_000), number=1) for _ in range(9)]
            cpu = time.process_time()
            with ThreadPoolExecutor(2) as threads:
                ends = list(threads.map(partial(_read, reader), range(batches + 2 * _SKIP)))
            cpu = time.process_time() - cpu
            took = reader.counters()
            costs = StageCosts(
                reader_cpu_s=cpu / took["tiles"],
                requests=took["requests"] / took["tiles"],
                nbytes=took["nbytes"] / took["tiles"],
            )
            around = Surroundings(latency_s=statistics.median(waits), reader_cores=2)
            modelled.append(min(reader_rates(costs, around, _MICRO_BATCH)))
            ours.append(batches * _MICRO_BATCH / (max(ends[: _SKIP + batches]) - max(ends[:_SKIP])))
    what = f"the mix, one reader at {_LATENCY_MS} ms, {_TURNED_DOWN:.0%} turned down / the model of `capacity`"
    return line(what, ours, modelled, "tiles/s", least=0.9)


def _read(reader: TileReader, batch: int) -> float:
    """Reads a batch, and tells when it was read."""
    reader({"index": np.arange(batch * _MICRO_BATCH, (batch + 1) * _MICRO_BATCH)})
    return time.perf_counter()


def hsv_share(tile: np.ndarray[Any, Any]) -> float:
    """The share of a tile's pixels within the published HSV bounds."""
    rule = HsvRule()
    low, high = np.array([rule.hue, rule.saturation, rule.value], dtype=np.uint8).T
    return float((cv2.inRange(cv2.cvtColor(tile, cv2.COLOR_RGB2HSV), low, high) > 0).mean())
