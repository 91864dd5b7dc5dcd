"""What the stream costs over its readers, how soon it starts, and how it does beside others: `tilestream bench stream`.

All slides lie on the local disk here, so that what is measured is the machine's work; `bench reader` measures latency.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import BATCH, CUT_PEERS, SIZE, made_catalog, made_slides, openslide_rate, peer, rate
from benchmarks.table import TURNS, Line, arguments, line, report
from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, TileStream, torch_batches
from streaming.plan import TilePlan
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader

SKIP, FAR = 10, 1_000_000
OPTIONS = ReaderOptions(hsv_rule=HsvRule(min_share=0))
PEERS = {"wsistream": "wsistream"}

# A cold start as a script has it, each phase timed; what it prints is the seconds by phase.
_COLD = """
import json, sys, time
at, phases = time.perf_counter(), {}
def ended(phase):
    global at
    phases[phase], at = time.perf_counter() - at, time.perf_counter()
from streaming import cluster
from streaming.catalog import Catalog
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions
from streaming.delivery.stream import BatchShape, TileStream
ended("imports")
catalog = Catalog.load(sys.argv[1])
plan = TilePlan(catalog, mpp={0.25: 1}, size=int(sys.argv[2]))
ended("catalog and plan")
cluster.connect(8)
ended("ray.init")
next(TileStream(catalog, plan, BatchShape(int(sys.argv[3])), readers=(2, 2)).steps(0, 100))
ended("stream and first batch")
print(json.dumps(phases), flush=True)
"""


def make_stream(catalog: Catalog) -> TileStream:
    """The stream that is measured: two readers, tiles at native resolution."""
    plan = TilePlan(catalog, mpp={0.25: 1}, size=SIZE)
    return TileStream(catalog, plan, BatchShape(BATCH), reader=OPTIONS, readers=(2, 2))


def first_batch_s(stream: TileStream, start: int) -> float:
    """Seconds from asking for a step to its batch, with Ray running."""
    started = time.perf_counter()
    (shard,) = stream.dataset(start, start + 20).streaming_split(1, equal=True)
    next(torch_batches(shard, BATCH))
    return time.perf_counter() - started


def stream_rate(stream: TileStream, steps: int) -> float:
    """Tiles per second through Ray Data into torch tensors."""
    (shard,) = stream.dataset(0, SKIP + steps).streaming_split(1, equal=True)
    return rate(torch_batches(shard, BATCH), SKIP, steps)


def _read_all(uri: str, steps: range, barrier: Any, taken: Any) -> None:
    catalog = Catalog.load(uri)
    reader = TileReader(TilePlan(catalog, mpp={0.25: 1}, size=SIZE), catalog, OPTIONS)
    batches = [{"index": np.arange(step * BATCH, (step + 1) * BATCH)} for step in steps]
    reader(batches[0])
    barrier.wait()
    started = time.perf_counter()
    # Two batches at once, as in an actor.
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda batch: reader(batch) and None, batches):
            pass
    taken.put(time.perf_counter() - started)


def readers_rate(uri: str, steps: int) -> float:
    """Tiles per second of the same two readers called in a loop, each in a process of its own, without Ray."""
    context = multiprocessing.get_context("spawn")
    barrier, taken = context.Barrier(2), context.Queue()
    shares = [range(SKIP + at, SKIP + steps, 2) for at in range(2)]
    workers = [context.Process(target=_read_all, args=(uri, share, barrier, taken)) for share in shares]
    for worker in workers:
        worker.start()
    slowest = max(taken.get() for _ in workers)
    for worker in workers:
        worker.join()
    return steps * BATCH / slowest


def cold_line(uri: str) -> Line:
    """The first batch of a new process; each phase's share goes to stderr."""
    turns: list[dict[str, float]] = []
    for _ in range(TURNS):
        command = [sys.executable, "-c", _COLD, uri, str(SIZE), str(BATCH)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
        turns.append(json.loads(ran.stdout.splitlines()[-1]))
    phases = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
    sys.stderr.write(f"cold start: {told}\n")
    without = statistics.median(sum(turn.values()) - turn["ray.init"] for turn in turns)
    return line(f"first batch after a cold start, ray.init apart, / 8 s ({told})", without, 8.0, "s", most=1.0)


def peer_lines(folder: Path, paths: list[Path], plan: TilePlan, us: float, tiles: int) -> list[Line]:
    """Others on the same slides and cores, two workers each."""
    specs, found = plan.specs(np.arange(tiles)), list[Line]()
    task = {
        "slides": [str(path) for path in paths],
        "tiles": np.stack([specs.slide, specs.x, specs.y], axis=1).tolist(),
    }
    for name, package in {**PEERS, **CUT_PEERS}.items():
        measured = peer(name, [package], folder, **task)
        if measured is None:
            continue
        theirs = measured.pop("tiles_per_s")
        what = f"the same / {package} on tiles cut beforehand" if measured else f"the same / {package}"
        found.append(line(what, us, theirs, "tiles/s", **measured))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = arguments("stream", __doc__)
    parser.add_argument("--steps", type=int, default=60, help=f"steps of {BATCH} tiles a turn (60)")
    parser.add_argument("--cut", type=int, default=2000, help="tiles that are cut for loaders of ready tiles (2,000)")
    args = parser.parse_args(argv)
    paths = made_slides(args.folder, args.slides)
    catalog = made_catalog([str(path) for path in paths])
    lines = [cold_line(catalog.uri)]
    stream = make_stream(catalog)
    cluster.connect(8)
    first_batch_s(stream, 0)
    starts = [(first_batch_s(stream, FAR), first_batch_s(stream, 0)) for _ in range(2 * TURNS)]
    far, near = (statistics.median(part) for part in zip(*starts, strict=True))
    lines.append(line(f"first batch from step {FAR:,} / from step 0, Ray running", far, near, "s", most=1.2))
    ours, loops, openslides = [], [], []
    for _ in range(TURNS):
        ours.append(stream_rate(stream, args.steps))
        loops.append(readers_rate(catalog.uri, args.steps))
        openslides.append(openslide_rate(stream.plan, paths, SKIP, args.steps))
    us, loop, openslide = (statistics.median(rates) for rates in (ours, loops, openslides))
    lines.append(line("Ray Data to torch / the same two readers in a loop", us, loop, "tiles/s", least=0.7))
    lines.append(line("the same / DataLoader (2 workers) + OpenSlide", us, openslide, "tiles/s"))
    if args.peers:
        lines += peer_lines(args.folder, paths, stream.plan, us, args.cut)
    return report(lines, args.json)


if __name__ == "__main__":
    sys.exit(main())
