"""JPEG slides with corners on blocks, against tiles that were cut beforehand into shards, from the same S3."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import CUT_PEERS, SIZE, peer
from benchmarks.mission import MPPS, MadeSlide, Mission
from benchmarks.reader_parts.mix import our_rate, served, touched_blocks
from benchmarks.table import Line, line
from streaming.plan import TilePlan
from streaming.slide import open_slide

# The plan's first tiles are cut once, and lie in the shards so often: what a tile costs is the same, and a shard's
# reader has enough of them that none comes twice from its own disk.
_COPIES = 8
_COUNTED = 256  # tiles whose blocks are counted


def shard_lines(
    folder: Path, made: Sequence[MadeSlide], latency_ms: int, steps: int, turns: int, cut: int
) -> list[Line]:
    """The mix's JPEG slides, and those of them whose blocks are tiles: one request and one block a tile."""
    jpeg = [each for each in made if each.is_jpeg]
    # Of 256 px, at the µm/px of their levels.
    whole = [each for each in jpeg if each.slide.block_px == SIZE and each.slide.mpp < 0.3]
    return [
        *_lines("JPEG slides of the mix", folder, jpeg, MPPS, latency_ms, steps, turns, cut),
        *_lines("its JPEG slides whose blocks are tiles", folder, whole, (0.25, 1.0), latency_ms, steps, turns, cut),
    ]


def _lines(
    what: str,
    folder: Path,
    slides: Sequence[MadeSlide],
    mpps: Sequence[float],
    latency_ms: int,
    steps: int,
    turns: int,
    cut: int,
) -> list[Line]:
    """Each library's shards, and the fastest of each turn."""
    ours, theirs = list[float](), {name: list[float]() for name in CUT_PEERS}
    with served(folder, slides, latency_ms) as (source, url):
        plan = source.plan("blocks", mpps)
        blocks = np.mean([len(tile) for tile in touched_blocks(plan, source.paths, _COUNTED)])
        kind = f"{len(slides)}-{'-'.join(map(str, mpps))}"
        where = cut_tiles(slides[0].path.parent / f"cut-{cut}-{kind}", source, plan, cut)
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
    what = f"{what} from S3 with {latency_ms} ms latency, 2 readers, corners blocks ({blocks:.1f} blocks a tile)"
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
