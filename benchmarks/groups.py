"""Is there a central wall? What a block costs the busiest process of each kind, as ranks get datasets of their own.

    tilestream bench groups [--groups 1 2 4 8] [--blocks 2000] [--json]

Eight ranks pull constant tiles (nothing is fetched or decoded) in 1, 2, 4 and 8 groups on this machine's Ray, and the
CPU time of each of its processes is counted. A coordinator and a chain serve their own group, a raylet its node; the
GCS serves all. So the last column, cores of the busiest process of 1,000 GPUs of 40 tiles/s in groups of 8, is the cost
of a block times 5 blocks/s of a group, and times 625 blocks/s for the GCS.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.soak import make_catalog
from benchmarks.table import machine
from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, TileStream
from streaming.plan import TilePlan
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions
from streaming.slide import Slide

RANKS, MICRO, SIZE = 8, 8, 32
GPUS, TILES_S, GROUP, BLOCK = 1000, 40, 8, 64
MUST_CORES = 0.5
KINDS = {"coordinator": "ray::SplitCoordinator", "chain": "ray::Chain", "raylet": "/raylet/raylet", "gcs": "gcs_server"}
CENTRAL = ("gcs",)


@dataclass(frozen=True)
class ConstantTile:
    """A tile that is there at once."""

    def when_ready(self, call: Callable[[], object]) -> None:
        """At once."""
        call()

    def fill(self, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Of one colour."""
        out.fill(200)


class ConstantSlide:
    """A slide whose tiles are not read."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slide, name)

    def begin_tile(self, *_: Any, **__: Any) -> ConstantTile:
        """The same wherever."""
        return ConstantTile()


@dataclass(frozen=True)
class ConstantCatalog(Catalog):
    """A catalog of such slides."""

    def open_slide(self, *arguments: Any, **named: Any) -> Any:
        """As the catalog opens it."""
        return ConstantSlide(super().open_slide(*arguments, **named))


def cpu_s() -> dict[str, dict[int, float]]:
    """CPU seconds so far of the processes below this one, by kind and process id."""
    found = defaultdict[str, dict[int, float]](dict)
    for process in psutil.Process().children(recursive=True):
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        for kind, sign in KINDS.items():
            if sign in title:
                found[kind][process.pid] = times.user + times.system
    return found


def run(catalog: Catalog, groups: int, blocks: int) -> dict[str, float]:
    """Milliseconds of CPU that a block costs the busiest process of each kind: of its group's blocks, or of all."""
    stream = TileStream(
        catalog,
        TilePlan(catalog, mpp={0.5: 1}, size=SIZE),
        BatchShape(RANKS * MICRO, RANKS),
        reader=ReaderOptions(hsv_rule=HsvRule(min_share=0)),  # which takes no tile of one colour
        readers=(groups, groups),
        reader_cpus=0.5,
        ranks_per_stream=RANKS // groups,
        segment_blocks=blocks,  # one segment
    )
    # The first ones are skipped: their datasets are planned and their readers started meanwhile.
    num_steps, skip = blocks // RANKS, 10
    steps = stream.steps(0, num_steps)
    for _ in range(skip):
        next(steps)
    before, began = cpu_s(), time.perf_counter()
    for _ in range(num_steps - skip - 2):
        next(steps)
    after, took_s = cpu_s(), time.perf_counter() - began
    steps.close()
    counted = (num_steps - skip - 2) * RANKS
    row: dict[str, float] = {"groups": groups, "blocks_s": counted / took_s}
    for kind in KINDS:
        spent = max(after[kind][pid] - before[kind].get(pid, 0.0) for pid in after[kind])
        shared_by = 1 if kind in (*CENTRAL, "raylet") else groups
        row[f"{kind}_ms"] = 1000 * spent / (counted / shared_by)
    return row


def predicted_cores(row: dict[str, float]) -> dict[str, float]:
    """Cores that the busiest process of each kind takes for 1,000 GPUs."""
    of_group = GROUP * TILES_S / BLOCK
    return {
        kind: row[f"{kind}_ms"] / 1000 * (of_group * GPUS / GROUP if kind in CENTRAL else of_group) for kind in KINDS
    }


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(prog="tilestream bench groups", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="groups of the ranks (1 2 4 8)")
    parser.add_argument("--blocks", type=int, default=2000, help="blocks of each run (2000)")
    parser.add_argument("--json", action="store_true", help="the rows as JSON at the end")
    args = parser.parse_args()
    print(machine())
    cluster.connect(8)
    rows = list[dict[str, float]]()
    print(
        f"{'groups':>6} {'blocks/s':>8}  "
        + " ".join(f"{kind + ', ms':>15}" for kind in KINDS)
        + "  cores at 1,000 GPUs"
    )
    with tempfile.TemporaryDirectory() as folder:
        made = make_catalog(Path(folder))
        catalog = ConstantCatalog(**{part.name: getattr(made, part.name) for part in fields(Catalog)})
        for groups in args.groups:
            row = run(catalog, groups, args.blocks)
            cores = predicted_cores(row)
            busiest = max(cores, key=lambda kind: cores[kind])
            rows.append(row | {"cores": cores[busiest]})
            print(
                f"{groups:6d} {row['blocks_s']:8.0f}  "
                + " ".join(f"{row[f'{kind}_ms']:15.2f}" for kind in KINDS)
                + f"  {cores[busiest]:.2f} ({busiest}; must be at most {MUST_CORES})",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
