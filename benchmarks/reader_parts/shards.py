"""JPEG slides with corners on blocks, against tiles that were cut beforehand into shards, from the same S3."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import CUT_PEERS, peer
from benchmarks.mission import MadeSlide, Mission
from benchmarks.reader_parts.mix import our_rate, served
from benchmarks.table import Line, line
from streaming.plan import TilePlan
from streaming.slide import open_slide

# The plan's first tiles are cut once, and lie in the shards so often: what a tile costs is the same, and a shard's
# reader has enough of them that none comes twice from its own disk.
_COPIES = 8


def shard_lines(
    folder: Path, made: Sequence[MadeSlide], latency_ms: int, steps: int, turns: int, cut: int
) -> list[Line]:
    """Each library's shards, and the fastest of each turn."""
    slides = [each for each in made if each.is_jpeg]
    ours, theirs = list[float](), {name: list[float]() for name in CUT_PEERS}
    with served(folder, slides, latency_ms) as (source, url):
        plan = source.plan("blocks")
        where = cut_tiles(slides[0].path.parent / f"cut-{cut}", source, plan, cut)
        for _ in range(turns):
            ours.append(our_rate(source, plan, steps))
            for name, package in CUT_PEERS.items():
                shards = where / name
                task = {"cut": str(where), "copies": _COPIES, "shards": str(shards), "endpoint": url}
                key = shards.relative_to(folder / "bench")
                measured = peer(name, [package], folder, remote=f"bench/{key}", **task)
                if measured is not None:
                    theirs[name].append(measured["tiles_per_s"])
                    sys.stderr.write(f"{package}: {measured['tiles_per_s']:,.0f} tiles/s\n")
    complete = {name: rates for name, rates in theirs.items() if len(rates) == turns}
    what = f"JPEG slides of the mix from S3 with {latency_ms} ms latency, 2 readers, corners blocks"
    found = [
        line(f"{what} / {CUT_PEERS[name]}: tiles cut beforehand, from the same S3", ours, rates, "tiles/s")
        for name, rates in complete.items()
    ]
    if complete:
        fastest = [max(turn) for turn in zip(*complete.values(), strict=True)]
        found.append(line(f"{what} / the fastest of these", ours, fastest, "tiles/s", least=1.0))
    return found


def cut_tiles(folder: Path, source: Mission, plan: TilePlan, num: int) -> Path:
    """The plan's first tiles as JPEG files in a folder, made once."""
    if (folder / "all").exists():
        return folder
    folder.mkdir(exist_ok=True)
    opened, specs = [open_slide(str(path)) for path in source.paths], plan.specs(np.arange(num))
    for at, (row, x, y, mpp) in enumerate(zip(specs.slide, specs.x, specs.y, specs.mpp, strict=True)):
        tile = opened[row].read_tile(int(x), int(y), float(mpp), specs.size)
        content = io.BytesIO()
        Image.fromarray(tile).save(content, format="jpeg", quality=90)
        (folder / f"{at:06d}.jpg").write_bytes(content.getvalue())
    (folder / "all").touch()
    return folder
