"""The easy case: slides of exactly 0.25 µm/px, as no scanner writes them, at their own pixels and without the HSV rule.

It is what other libraries can read as well, and what was measured before the mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import BATCH, SIZE, OpenSlideTiles, made_catalog, openslide_rate, peer, rate
from benchmarks.latency_server import serve
from benchmarks.mission import MPPS
from benchmarks.reader_parts.cpu import cpu_ms, read_into
from benchmarks.reader_parts.mix import decode_limit, touched_blocks
from benchmarks.table import Line, line
from streaming import cluster
from streaming.delivery.stream import BatchShape, TileStream, torch_batches
from streaming.plan import TilePlan
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions
from streaming.storage.staging import Staging

_LATENCY_S, _SKIP = 0.02, 10
_MUSTS = {0.25: 0.45, 0.5: 0.18}


def easy_cpu_lines(paths: Sequence[Path], tiles: int, turns: int) -> list[Line]:
    """CPU per tile from a local file in the page cache."""
    slide = made_catalog([str(paths[0])]).open_slide(0, None, Staging())
    theirs = OpenSlideTiles(paths[:1])
    width, height = slide.level_dimensions[0]
    random, found, rounds = np.random.default_rng(0), list[Line](), list[list[tuple[float, float]]]()
    for mpp in MPPS:
        whole = round(mpp / 0.25)
        sides = np.array([width, height]) - SIZE * whole
        places = (random.integers(0, sides, (tiles, 2)) // whole * whole).tolist()
        us = [partial(read_into, slide, x, y, mpp) for x, y in places]
        they = [partial(theirs, 0, x, y, mpp) for x, y in places]
        cpu_ms(us)
        rounds.append([(cpu_ms(us), cpu_ms(they)) for _ in range(turns)])
        ours, others = zip(*rounds[-1], strict=True)
        what = f"easy: CPU per tile at {mpp} µm/px (slide 0.25, levels 1, 4, 16) / OpenSlide + PIL"
        found.append(line(what, ours, others, "ms", most=_MUSTS.get(mpp, 0)))
    ours, others = np.mean(rounds, axis=0).T
    return [*found, line("easy: mean of the four / OpenSlide + PIL", list(ours), list(others), "ms", most=0.25)]


def easy_stream_lines(folder: Path, paths: Sequence[Path], steps: int, turns: int, peers: bool) -> list[Line]:
    """Tiles per second from a store with latency through Ray Data to torch, and what was fetched for it."""
    others = dict[str, float]()
    with serve(folder, _LATENCY_S) as server:
        options = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
        catalog = made_catalog([f"s3://bench/{path.name}" for path in paths], options)
        plan = TilePlan(catalog, mpp={0.25: 1}, size=SIZE)
        reader = ReaderOptions(hsv_rule=HsvRule(min_share=0), storage_options=options)
        stream = TileStream(catalog, plan, BatchShape(BATCH), reader=reader, readers=(2, 2))
        cluster.connect(8)
        ours, theirs, limits, fetched = list[float](), list[float](), list[float](), 0.0
        touched = touched_blocks(plan, paths, (_SKIP + steps) * BATCH)
        for turn in range(turns):
            _, bytes_before = server.sent()
            (shard,) = stream.dataset(0, _SKIP + steps).streaming_split(1, equal=True)
            ours.append(rate(torch_batches(shard, BATCH), _SKIP, steps))
            _, sent = server.sent()
            limits.append(decode_limit(touched))
            if turn == 0:
                fetched = (sent - bytes_before) / sum(len(content) for tile in touched for content, *_ in tile)
            theirs.append(openslide_rate(plan, paths, _SKIP, steps))
        if peers:
            others = peer_rates(folder, paths, plan, server.url)
    what = f"easy: 0.25 µm/px from S3 with {_LATENCY_S * 1000:.0f} ms latency, 2 readers"
    return [
        line(f"{what} / DataLoader (2 workers) + OpenSlide on local files", ours, theirs, "tiles/s", least=1.5),
        line("the same / decoding of the touched blocks alone by 2 processes", ours, limits, "tiles/s", least=0.55),
        *(line(f"the same / {name}", ours, [found] * turns, "tiles/s") for name, found in others.items()),
        line("bytes fetched / bytes of touched blocks", fetched, 1.0, "", most=1.1),
    ]


def peer_rates(folder: Path, paths: Sequence[Path], plan: TilePlan, endpoint: str) -> dict[str, float]:
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
